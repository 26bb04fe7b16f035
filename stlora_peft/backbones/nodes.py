"""Modules with one entry for each node: how they become those of another city, and how a mismatch is noticed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from stlora_peft.backbones.base import Forecaster


class NodeBound(nn.Module):
    """A module whose tensors depend on the number of nodes and which can be rebuilt for another number.

    Subclasses set ``num_nodes`` and say in :meth:`tensors_for` what their tensors are in another city. Tensors that
    they do not name are copied. The tensors are the module's own: an adapter file has no names for those of its parts.

    Attributes:
        num_nodes: Number of nodes that the module was built for.
        node_axes: Its tensors with an entry for each node, by name with their node axis, where they are all that has
            to be cut for :func:`stlora_peft.node_subset`; None where the module cannot be cut.
    """

    num_nodes: int
    node_axes: ClassVar[Mapping[str, int] | None] = None

    def resized(self, num_nodes: int) -> Self:
        """Copy the module for ``num_nodes`` nodes; with their number unchanged the copy is exact.

        Args:
            num_nodes: Number of nodes of the new city.
        """
        new = copy.deepcopy(self)
        if num_nodes != self.num_nodes:
            for name, value in self.tensors_for(num_nodes).items():
                setattr(new, name, nn.Parameter(value))
            new.num_nodes = num_nodes
            if isinstance(new, nn.Embedding):
                new.num_embeddings = num_nodes
        return new

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """Values, for another number of nodes, of the parameters that are bound to it."""
        raise NotImplementedError


class NodeVectors(nn.Embedding, NodeBound):
    """A vector for each node.

    In another city the vectors are drawn anew, with the mean and the spread of the old ones and always the same random
    numbers: in a graph learned from them, nodes that all had the mean would hear each other alike or not at all.

    Args:
        num_nodes: Number of nodes.
        emb_size: Width of the vectors.
        seed: Where the random numbers of another city begin.
    """

    def __init__(self, num_nodes: int, emb_size: int, seed: int) -> None:
        super().__init__(num_nodes, emb_size)
        self.num_nodes = num_nodes
        self.seed = seed

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """Draw new vectors."""
        old, generator = self.weight.detach(), torch.Generator().manual_seed(self.seed)
        noise = torch.randn(num_nodes, self.embedding_dim, generator=generator)
        return {"weight": old.mean(0) + old.std(0, correction=0) * noise.to(old)}


class NoVectors(NodeBound):
    """Nothing, for any number of nodes."""

    num_nodes = 0
    node_axes: ClassVar[Mapping[str, int] | None] = {}

    def tensors_for(self, num_nodes: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}


class NodeBoundForecaster(Forecaster):
    """A forecaster that refuses an input whose nodes are not those of its node-bound modules."""

    def check_input(self, x: Tensor) -> None:
        """Refuse an input that does not fit, before any arithmetic.

        The number of nodes is that of the node-bound modules as they stand, those of an active adapter included.

        Raises:
            ValueError: If the number of axes, of steps, of channels or of nodes is wrong.
        """
        super().check_input(x)
        found = x.shape[2]
        for name in self.stlora_spec.node_bound:
            module = self.get_submodule(name)
            bound = getattr(module, "num_nodes", getattr(module, "num_embeddings", found))
            if bound != found and next(module.parameters(), None) is not None:
                self.refuse(
                    "wrong number of nodes",
                    f"N={bound} on axis 'n' of 'b t n c', the number of nodes that '{name}' was built for",
                    f"N={found} from an input of shape {tuple(x.shape)}",
                    f"adapt it to the new city with STLoraConfig(num_nodes={found}), or build it with "
                    f"num_nodes={found}",
                )


def mean_entry(value: Tensor, axis: int, num_nodes: int, *, summed: bool) -> Tensor:
    """Mean over the nodes on one axis, once for each node of another city.

    Args:
        value: Tensor with one entry for each old node on ``axis``.
        axis: Axis of the nodes.
        num_nodes: Number of new nodes.
        summed: The network sums over this axis: the entries are scaled so that their sum stays.

    Example:
        >>> import torch
        >>> mean_entry(torch.tensor([1.0, 3.0]), 0, 4, summed=True)
        tensor([1., 1., 1., 1.])
    """
    mean = value.detach().mean(axis, keepdim=True)
    scale = value.shape[axis] / num_nodes if summed else 1.0
    return (mean * scale).repeat_interleave(num_nodes, axis)


def mean_pair(value: Tensor, num_nodes: int, *, summed: bool) -> Tensor:
    """Mean over the pairs of a node with itself and over all other pairs, for the pairs of another city.

    Args:
        value: Tensor with one entry for each pair of old nodes on its last two axes.
        num_nodes: Number of new nodes.
        summed: The network sums over the second node of a pair: what differs is scaled so that the sum stays.

    Example:
        >>> import torch
        >>> mean_pair(torch.tensor([[1.0, 4.0], [2.0, 3.0]]), 3, summed=False)
        tensor([[2., 3., 3.],
                [3., 2., 3.],
                [3., 3., 2.]])
    """
    value, old = value.detach(), value.shape[-1]
    same = value.diagonal(dim1=-2, dim2=-1).mean(-1)
    other = (value.sum((-2, -1)) - same * old) / max(old * (old - 1), 1)
    if summed:
        other = other * (old - 1) / max(num_nodes - 1, 1)
    pairs = other[..., None, None].repeat(*[1] * other.ndim, num_nodes, num_nodes)
    pairs.diagonal(dim1=-2, dim2=-1).copy_(same[..., None].expand(*same.shape, num_nodes))
    return pairs
