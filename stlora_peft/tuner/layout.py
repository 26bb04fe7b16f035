"""Where the node axis of a layer's input is: axis patterns, and reading them off a shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stlora_peft.errors import message

_TOKEN = re.compile(r"\.\.\.|\([^()]*\)|[^\s()]+")
_NAMES = ("b", "t", "u", "v")


@dataclass(frozen=True)
class Layout:
    """A parsed axis pattern such as ``"b t n c"`` or ``"(b n) t c"``.

    ``n`` is the node axis, ``c`` the channel axis; every other name is free. Round brackets fold axes
    into one, the last name running fastest: in ``"(b n) t c"`` row ``i`` belongs to node ``i % N``.
    A leading ``...`` stands for any number of axes.

    Args:
        pattern: The text.
        groups: One tuple of axis names for each axis after the ellipsis.
        ellipsis: Whether the pattern begins with ``...``.
    """

    pattern: str
    groups: tuple[tuple[str, ...], ...]
    ellipsis: bool

    def node_axis(self, ndim: int) -> int:
        """Index of the axis that holds the nodes in a tensor of ``ndim`` axes."""
        return ndim - len(self.groups) + self._position("n")

    def channel_axis(self, ndim: int) -> int:
        """Index of the channel axis in a tensor of ``ndim`` axes."""
        return ndim - len(self.groups) + self._position("c")

    def _position(self, axis: str) -> int:
        return next(i for i, group in enumerate(self.groups) if axis in group)

    @property
    def _node_group(self) -> tuple[str, ...]:
        return self.groups[self._position("n")]

    @property
    def folded(self) -> bool:
        """Whether the node axis shares its dimension with others."""
        return len(self._node_group) > 1

    @property
    def node_fastest(self) -> bool:
        """Whether neighbouring rows of a folded node axis are neighbouring nodes."""
        return self._node_group[-1] == "n"

    def fits(self, shape: Sequence[int], num_nodes: int) -> bool:
        """Whether a tensor of this shape can hold ``num_nodes`` nodes in this layout."""
        if len(shape) < len(self.groups) or (len(shape) > len(self.groups) and not self.ellipsis):
            return False
        size = shape[self.node_axis(len(shape))]
        return size % num_nodes == 0 and size > 0 if self.folded else size == num_nodes

    def split(self, x: Tensor, num_nodes: int) -> tuple[Tensor, int, int]:
        """View ``x`` with an unfolded node axis.

        Args:
            x: Tensor in this layout.
            num_nodes: Number of nodes :math:`N`.

        Returns:
            The view, the index of its node axis (of size :math:`N`) and of its channel axis.
        """
        node, channel = self.node_axis(x.ndim), self.channel_axis(x.ndim)
        if not self.folded:
            return x, node, channel
        sizes = (-1, num_nodes) if self.node_fastest else (num_nodes, -1)
        view = x.unflatten(node, sizes)
        return view, node + int(self.node_fastest), channel + int(channel > node)


def parse_layout(pattern: str) -> Layout:
    """Read an axis pattern.

    Args:
        pattern: Axis names separated by blanks, e.g. ``"b c n t"``, ``"(b n) t c"``, ``"... n c"``.

    Returns:
        The layout.

    Raises:
        ValueError: If ``n`` or ``c`` is absent or doubled, ``c`` is folded, ``n`` is in the middle of a
            fold, a name is repeated or the text is no pattern.

    Example:
        >>> parse_layout("(b n) t c").node_axis(ndim=3)
        0
    """
    tokens = _TOKEN.findall(pattern)
    ellipsis = bool(tokens) and tokens[0] == "..."
    groups = tuple(tuple(t.strip("()").split()) for t in tokens[int(ellipsis) :])
    names = [name for group in groups for name in group]
    problem = None
    whole = "".join(tokens).replace(" ", "") == pattern.replace(" ", "") and () not in groups
    if not whole or any(not name.isidentifier() for name in names):
        problem = "text that is no axis pattern"
    elif len(set(names)) != len(names):
        problem = "an axis name that is repeated"
    elif "n" not in names or "c" not in names:
        problem = "no node axis 'n'" if "n" not in names else "no channel axis 'c'"
    elif ("c",) not in groups:
        problem = "a folded channel axis"
    elif "n" not in {group[end] for group in groups for end in (0, -1) if group}:
        problem = "a node axis in the middle of a fold"
    if problem:
        raise ValueError(
            message(
                f"node layout '{pattern}' cannot be read",
                expected="axis names with one 'n' (nodes) and one 'c' (channels), e.g. 'b t n c' or '(b n) t c'",
                got=problem,
                fix="say where the axes of the layer's input are, e.g. node_layout={'encoder': 'b t n c'}",
            )
        )
    return Layout(pattern, groups, ellipsis)


def check_layout(layout: Layout, shape: Sequence[int], num_nodes: int, where: str) -> None:
    """Raise if an input of this shape does not hold ``num_nodes`` nodes where ``layout`` says.

    Raises:
        ValueError: With the layer, the layout, the shape and the remedy.
    """
    if layout.fits(shape, num_nodes):
        return
    few = len(shape) < len(layout.groups)
    if few or (len(shape) > len(layout.groups) and not layout.ellipsis):
        raise ValueError(
            message(
                f"{where}: wrong number of axes",
                expected=f"an input laid out as '{layout.pattern}'",
                got=f"an input of shape {tuple(shape)}",
                fix="pass node_layout={<layer name>: <pattern>} in STLoraConfig with the axes of this input",
            )
        )
    size = shape[layout.node_axis(len(shape))]
    axis = f"on axis 'n' of layout '{layout.pattern}'"
    city, rows = f"num_nodes={size} for this city", f"N={size}"
    if layout.folded:
        city, rows = "this city's num_nodes", f"{size} rows"
    raise ValueError(
        message(
            f"{where}: wrong number of nodes",
            expected=f"a multiple of N={num_nodes} rows {axis}" if layout.folded else f"N={num_nodes} {axis}",
            got=f"{rows} from an input of shape {tuple(shape)}",
            fix=f"build the adapter with {city}, activate the adapter that belongs to it, or correct node_layout if "
            "the nodes are on another axis",
        )
    )


def infer_layout(shape: Sequence[int], num_nodes: int, channel: int, node_axes: Sequence[int], where: str) -> Layout:
    """Find the node axis of an input from its sizes, or say why they do not tell.

    Args:
        shape: Shape of the input.
        num_nodes: Number of nodes :math:`N`.
        channel: Index of the channel axis.
        node_axes: Axes that may hold nodes in this kind of layer.
        where: Name of the layer, for the error.

    Returns:
        The only layout that fits.

    Raises:
        ValueError: If no axis, or more than one reading, fits; an axis of a multiple of :math:`N` rows can
            be folded two ways, which sizes cannot tell apart.
    """
    readings = layout_readings(shape, num_nodes, channel, node_axes)
    if len(readings) == 1:
        return parse_layout(readings[0])
    got = f"an input of shape {tuple(shape)}, which " + (
        f"reads as {' or '.join(repr(r) for r in readings)}" if readings else "has no axis of that size"
    )
    raise ValueError(
        message(
            f"{where}: the node axis cannot be found",
            expected=f"exactly one axis of N={num_nodes} nodes",
            got=got,
            fix="say which is true in STLoraConfig(node_layout={<layer name>: <pattern>}), or let find_layouts "
            "find it with sizes that cannot be confused"
            if readings
            else "build the adapter with this city's number of nodes, or say in node_layout where the nodes are",
        )
    )


def layout_readings(shape: Sequence[int], num_nodes: int, channel: int, node_axes: Sequence[int]) -> list[str]:
    """Every axis pattern that a shape allows, one per axis of N entries and two per axis of a multiple of N."""
    readings = [_reading(len(shape), channel, axis, "n") for axis in node_axes if shape[axis] == num_nodes]
    for axis in node_axes:
        if shape[axis] > num_nodes and shape[axis] % num_nodes == 0:
            readings += [_reading(len(shape), channel, axis, fold) for fold in ("(b n)", "(n b)")]
    return readings


def _reading(ndim: int, channel: int, node: int, fold: str) -> str:
    names = iter(name for name in _NAMES + tuple(f"a{i}" for i in range(ndim)) if name != "b" or fold == "n")
    return " ".join("c" if i == channel else fold if i == node else next(names) for i in range(ndim))


def check_union(edge_index: Tensor, num_rows: int, num_nodes: int, layout: Layout, where: str) -> None:
    """Raise if folded rows are not a union of equal graphs of ``num_nodes`` nodes.

    Raises:
        ValueError: If an edge joins two graphs: then the rows are one larger graph.
    """
    if num_rows == num_nodes or torch.compiler.is_compiling():
        return
    graph = edge_index // num_nodes if layout.node_fastest else edge_index % (num_rows // num_nodes)
    if not bool((graph[0] == graph[1]).all()):
        raise ValueError(
            message(
                f"{where}: wrong number of nodes",
                expected=f"N={num_nodes} rows, or a batch of separate graphs of {num_nodes} nodes each",
                got=f"{num_rows} rows with edges from one graph of {num_nodes} nodes to another",
                fix=f"build the adapter with num_nodes={num_rows}, or activate the adapter that belongs to this city",
            )
        )
