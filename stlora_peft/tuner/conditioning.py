r"""The six forms in which a node takes part in a low-rank update.

============== ==================================================== =======================================
``"full"``      :math:`A_i` free                                     :math:`N r F_{in} + r F_{out}`
``"core"``      :math:`A_i = G_i A`                                  :math:`N r^2 + r (F_{in} + F_{out})`
``"gate"``      :math:`A_i = \mathrm{diag}(g_i) A`, bias :math:`B h_i`  :math:`2 N r + r (F_{in} + F_{out})`
``"embedding"`` :math:`g_i = 1 + C_g e_i,\; h_i = C_h e_i`           :math:`r (F_{in} + F_{out} + 2 d)`, and
                                                                     :math:`N d` once for all layers
``"bias"``      a node bias :math:`B h_i` alone                        :math:`N r + r F_{out}`
``"shared"``    none, plain LoRA                                     :math:`r (F_{in} + F_{out})`
============== ==================================================== =======================================

All forms but ``"bias"``, which does not read the input, start as the same plain LoRA: gates are one, biases zero,
cores the identity, and the nodes' own :math:`A_i` equal one another. With :math:`B = 0` every update is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.functional import aligned, core_update, gate_update

CONDITIONINGS: Final = ("gate", "core", "full", "embedding", "bias", "shared")
FACTOR_NAMES: Final = ("A", "B", "core", "gate", "node_bias", "gate_map", "node_bias_map", "node_vector")


def factor_shapes(
    conditioning: str, *, r: int, num_nodes: int, in_shape: tuple[int, ...], out_features: int, emb_size: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that one adapted layer owns.

    Args:
        conditioning: One of ``CONDITIONINGS``.
        r: Rank.
        num_nodes: Number of nodes :math:`N`; not used by ``"shared"``.
        in_shape: Input width, followed by the kernel for a convolution.
        out_features: Output width.
        emb_size: Width of the node vectors of ``"embedding"``.

    Returns:
        Factor name to shape.

    Example:
        >>> factor_shapes("gate", r=2, num_nodes=5, in_shape=(3,), out_features=4, emb_size=0)
        {'A': (2, 3), 'B': (4, 2), 'gate': (5, 2), 'node_bias': (5, 2)}
    """
    if conditioning == "bias":
        return {"B": (out_features, r), "node_vector": (num_nodes, r)}
    node_axes = (num_nodes,) if conditioning == "full" else ()
    shapes: dict[str, tuple[int, ...]] = {"A": (*node_axes, r, *in_shape), "B": (out_features, r)}
    if conditioning == "core":
        shapes["core"] = (num_nodes, r, r)
    elif conditioning == "gate":
        shapes["gate"] = shapes["node_bias"] = (num_nodes, r)
    elif conditioning == "embedding":
        shapes["gate_map"] = shapes["node_bias_map"] = (r, emb_size)
    return shapes


def factor_dtype(like: Tensor) -> torch.dtype:
    """Type of adapter tensors beside ``like``: its own, or float32 where it holds integers (a quantised layer)."""
    return like.dtype if like.dtype.is_floating_point else torch.float32


def new_factor(
    name: str, shape: tuple[int, ...], in_shape: tuple[int, ...], *, identity: bool, like: Tensor
) -> nn.Parameter:
    """Make one factor at its starting value.

    Args:
        name: One of ``FACTOR_NAMES``.
        shape: From ``factor_shapes``.
        in_shape: Input width, followed by the kernel for a convolution.
        identity: Start with no effect; otherwise every factor is random.
        like: Tensor whose device, and dtype where it is a float, the factor takes.

    Returns:
        The parameter.
    """
    dtype = factor_dtype(like)
    value = torch.empty(shape, dtype=dtype, device=like.device)
    noise = torch.randn_like if not identity else torch.zeros_like
    if name in ("A", "B") and not (identity and name == "B"):
        bound = 1 / math.sqrt(math.prod(in_shape) if name == "A" else shape[-1])
        tied = shape[-1 - len(in_shape) :] if identity else shape  # all nodes begin with the same A
        value.copy_(torch.empty(tied, dtype=dtype, device=like.device).uniform_(-bound, bound))
    elif name == "core":
        value.copy_(torch.eye(shape[-1], dtype=dtype, device=like.device)).add_(noise(value))
    elif name == "gate":
        value.fill_(1.0).add_(noise(value))
    elif name == "node_vector":  # B is zero: with the vectors zero too, neither would have a gradient
        value.normal_()
    else:
        value.copy_(noise(value))
    return nn.Parameter(value)


def condition(
    u: Tensor, factors: Mapping[str, Tensor], embedding: Callable[[], Tensor] | None, node: int, channel: int
) -> Tensor:
    """Apply the node's part of the form that ``factors`` belongs to; ``"full"`` and ``"shared"`` have none here.

    Args:
        u: Rank directions with an unfolded node axis.
        factors: The layer's factors by name.
        embedding: Gives the node vectors, shape (N, emb_size); needed by ``"embedding"`` only.
        node: Index of the node axis of ``u``.
        channel: Index of the rank axis of ``u``.

    Returns:
        Tensor of the shape of ``u``.

    Raises:
        ValueError: If ``"embedding"`` has no node vectors.
    """
    if "node_vector" in factors:
        return u + aligned(factors["node_vector"], u.ndim, node, channel)
    if "core" in factors:
        return core_update(u, factors["core"], node, channel)
    if "gate" in factors:
        return gate_update(u, factors["gate"], factors["node_bias"], node, channel)
    if "gate_map" in factors:
        if embedding is None:
            raise ValueError(
                message(
                    "an update with conditioning 'embedding' has no node vectors",
                    expected="the node table of its adapter",
                    got="none",
                    fix="add the adapter with get_peft_model or add_adapter, which make the table",
                )
            )
        vectors = embedding().to(u.dtype)
        gate = 1.0 + vectors @ factors["gate_map"].to(u.dtype).mT
        return gate_update(u, gate, vectors @ factors["node_bias_map"].to(u.dtype).mT, node, channel)
    return u
