"""Cells that multiply their input with bare parameters: the update goes into their gates."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stlora_peft.tuner.config import STLoraConfig
from stlora_peft.tuner.graph_layers import STLoraGraphConv

ATTRIBUTE = "stlora_gates"


class STLoraGates(STLoraGraphConv):
    r"""The update of a cell's matrices :math:`W_i, W_f, W_c, W_o`, stacked; a part of the cell.

    .. math:: (u_i, u_f, u_c, u_o)_n = \tfrac{\alpha}{r} B A_n x_n

    Args:
        cell: Cell whose input the matrices are multiplied with.
        name: Its name in the backbone, for errors.

    Shapes:
        - **x:** :math:`(*, N, F_{in})`
        - **output:** :math:`(*, N, 4 F_{out})`
    """

    mergeable = True

    def __init__(self, cell: nn.Module, name: str) -> None:
        super().__init__(cell, name)
        del self.base_layer
        self._cell = (cell,)  # in a tuple, or the cell would be a part of its own part

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        sizes = [weight.shape for weight in bare_tensors(base_layer, "W").values()]
        return (int(sizes[0][0]),), sum(int(out_features) for _, out_features in sizes)

    def get_base_layer(self) -> nn.Module:
        """Return the cell."""
        return self._cell[0]

    def _root(self, x: Any) -> Tensor:
        return cast(Tensor, next(iter(x.values())) if isinstance(x, dict) else x)

    def forward(self, x: Any, edges: Any) -> Any:
        """Compute the sum of the active adapters' updates, or None where nothing is to be added."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        if self.merged:
            return None
        for edge_index in edges.values() if isinstance(edges, dict) else (edges,):
            if isinstance(edge_index, Tensor) and edge_index.dtype == torch.long:
                self._check_union(self._root(x), edge_index)
        return self._active_updates(self._root(x))

    def _root_weight(self) -> Tensor:
        weights = bare_tensors(self.get_base_layer(), "W").values()
        return torch.cat([weight.detach().mT for weight in weights])

    def _set_root_weight(self, value: Tensor) -> None:
        weights = bare_tensors(self.get_base_layer(), "W").values()
        for weight, part in zip(weights, value.chunk(len(weights)), strict=True):
            weight.data = part.mT.contiguous()


class STLoraGCLSTM(nn.Module):
    r"""``GCLSTM`` and ``HeteroGCLSTM`` with the update inside their gates.

    .. math:: g_n = \sigma\bigl(x_n W_g + \tfrac{\alpha}{r} (B A_n x_n)_g + \mathrm{conv}_g(h, E)_n + b_g\bigr)

    for each of the gates :math:`g \in \{i, f, c, o\}`; the one of the cell state has :math:`\tanh` for :math:`\sigma`.
    One ``A`` serves the four matrices :math:`W_g`, which are bare parameters of the cell; a shared update merges into
    them. The update conditions on the node whose input is read.

    It takes the cell's place and has the cell's own parts, under their names, so that the convolutions of the gates
    can be targets too; its adapters are one part more, ``stlora_gates``.

    Args:
        cell: Cell to adapt.
        name: Its name in the backbone, for errors.
    """

    mergeable = True
    inner: str | None = ATTRIBUTE
    default_layout = STLoraGates.default_layout

    def __init__(self, cell: nn.Module, name: str) -> None:
        super().__init__()
        # One set of parts for both: a convolution that is adapted here is adapted in the cell.
        self._parameters, self._buffers, self._modules = cell._parameters, cell._buffers, cell._modules
        self.training = cell.training
        self._held = (cell, STLoraGates(cell, name))
        self._arguments = list(inspect.signature(cell.forward).parameters)[:2]

    @staticmethod
    def _sizes(base_layer: nn.Module) -> tuple[tuple[int, ...], int]:
        return STLoraGates._sizes(base_layer)

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        """Nodes of several types have several numbers of nodes, and an adapter has one."""
        held = base_layer.W_i
        if isinstance(held, nn.ParameterDict) and len(held) != 1:
            return f"it has {len(held)} types of nodes, {', '.join(map(repr, held))}, and an adapter belongs to one"
        return None

    @property
    def cell(self) -> nn.Module:
        """The cell as the backbone was built with it."""
        return self._held[0]

    @property
    def gates(self) -> STLoraGates:
        """The adapters."""
        return self._held[1]

    def channel(self, ndim: int) -> int:
        """Index of the channel axis of an input."""
        return self.gates.channel(ndim)

    def node_axes(self, ndim: int) -> tuple[int, ...]:
        """Axes of an input that may hold the nodes."""
        return self.gates.node_axes(ndim)

    def _root(self, x: Any) -> Tensor:
        return self.gates._root(x)

    def update_layer(
        self, adapter_name: str, config: STLoraConfig, *, r: int, lora_alpha: float, layout: str | None
    ) -> None:
        """Add an adapter, or replace the one of that name; see :meth:`STLoraLayer.update_layer`."""
        self.gates.update_layer(adapter_name, config, r=r, lora_alpha=lora_alpha, layout=layout)
        self.add_module(ATTRIBUTE, self.gates)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the cell as it was, with the adapters in its matrices where they are to be merged."""
        if merge:
            self.gates.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        delattr(self, ATTRIBUTE)
        return self.cell

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the cell with the updates in the biases of its gates: where a bias is added, so is the product."""
        self.cell.training = self.training  # it is no part of this one, which has all of its parts
        x, edges = (args + tuple(kwargs[name] for name in self._arguments[len(args) :]))[:2]
        update = self.gates(x, edges)
        if update is None:
            return self.cell(*args, **kwargs)
        biases = bare_tensors(self.cell, "b")
        parts = zip(biases.items(), update.chunk(len(biases), dim=-1), strict=True)
        updated = {name: bias + part.to(bias.dtype) for (name, bias), part in parts}
        return functional_call(self.cell, updated, args, kwargs, tie_weights=False)

    def __getattr__(self, name: str) -> Any:
        """Forward what the backbone asks of its cell, e.g. ``out_channels``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_held":
                raise
            return getattr(self.cell, name)

    def __repr__(self) -> str:
        return f"stlora.{self.cell!r}"


def bare_tensors(cell: nn.Module, letter: str) -> dict[str, Tensor]:
    """A cell's parameters of one letter, ``"W"`` or ``"b"``, by their names in it, in the order of the gates."""
    found: dict[str, Tensor] = {}
    for name in (f"{letter}_{gate}" for gate in "ifco"):
        held = getattr(cell, name)
        found |= {f"{name}.{key}": held[key] for key in held} if isinstance(held, nn.ParameterDict) else {name: held}
    return found
