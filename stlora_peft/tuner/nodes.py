"""What all modules of an adapter have in common, and the node vectors that its layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stlora_peft.tuner.conditioning import factor_dtype

TABLE_ATTRIBUTE = "stlora_nodes"


class AdapterModule(nn.Module, BaseTunerLayer):
    """What PEFT expects of every module that holds adapters, whether it wraps a layer or not."""

    in_features = 0
    out_features = 0

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = []
        self.cast_input_dtype_enabled = True

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the device of the backbone, in the dtype that it was loaded in."""
        # PEFT reads `.weight`, which recurrent and graph layers lack, and rounds to the backbone's dtype.
        device = device or next((p.device for p in self.get_base_layer().parameters()), None)
        for attribute in self.adapter_layer_names:
            values = getattr(self, attribute)
            if adapter_name in values and not any(p.is_meta for p in values.parameters()):
                values[adapter_name] = values[adapter_name].to(device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Node-conditioned updates are no plain LoRA."""
        return False


class CityModule(AdapterModule):
    """What an adapter has once for its city, beside the layers that it adapts.

    Args:
        backbone: Where it lives; its device is the adapter's.
    """

    other_param_names: tuple[str, ...] = ()

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self._backbone = (backbone,)  # in a tuple, or it would be a sub-module

    def get_base_layer(self) -> nn.Module:
        """Return the backbone."""
        return self._backbone[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to fold: adapters that need this module are refused before."""

    def unmerge(self) -> None:
        """Nothing was folded."""


class NodeTable(CityModule):
    r"""One vector :math:`e_i` for each node and adapter, for ``conditioning="embedding"``.

    Starts from a standard normal distribution; the maps that read it start at zero. In training every pass of the
    backbone reads

    .. math:: e_i + \nu \epsilon_i, \qquad \epsilon_i \sim \mathcal N(0, I),

    the same :math:`\epsilon_i` in all layers: what a node learns must then hold around its vector, too, and a few days
    are learned less by heart. Otherwise it reads :math:`e_i` itself. A pass is a call of the
    backbone as a module.

    Shapes:
        - **nall_emb[adapter]:** :math:`(N, d)`

    References:
        Regularised node vectors: Cini et al. (Taming Local Effects), NeurIPS 2023, arXiv:2302.04071. Differs: the
        variance is given, not learned, and nothing is added to the loss.
    """

    adapter_layer_names = ("nall_emb",)
    other_param_names = ("emb_noise",)

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.nall_emb = nn.ParameterDict()
        self.emb_noise: dict[str, float] = {}
        self._drawn: dict[str, Tensor] = {}

    def update_layer(
        self, adapter_name: str, num_nodes: int, emb_size: int, like: Tensor, *, emb_noise: float = 0.0
    ) -> None:
        """Add the vectors of an adapter."""
        vectors = torch.randn(num_nodes, emb_size, dtype=factor_dtype(like), device=like.device)
        self.nall_emb[adapter_name] = nn.Parameter(vectors)
        self.emb_noise[adapter_name] = emb_noise

    def vectors(self, adapter_name: str) -> Tensor:
        """Vectors of an adapter, shape (N, emb_size), in training with the noise of this pass."""
        table: Tensor = self.nall_emb[adapter_name]
        if not (self.training and self.emb_noise[adapter_name]):
            return table
        noise = self._drawn.get(adapter_name)
        if noise is None or noise.shape != table.shape:  # other nodes, in a layer that is called by itself
            noise = self._drawn[adapter_name] = self.emb_noise[adapter_name] * torch.randn_like(table)
        return table + noise

    def forget_noise(self) -> None:
        """Draw other noise when the vectors are read next."""
        self._drawn.clear()


def begin_pass(backbone: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward hook before the backbone: noise of the node vectors lasts for one pass."""
    cast(NodeTable, getattr(backbone, TABLE_ATTRIBUTE)).forget_noise()


def attach_table(backbone: nn.Module) -> NodeTable:
    """Return the backbone's node table, adding it and its hook on the first call."""
    if not hasattr(backbone, TABLE_ATTRIBUTE):
        setattr(backbone, TABLE_ATTRIBUTE, NodeTable(backbone))
        backbone.register_forward_pre_hook(begin_pass)
    return cast(NodeTable, getattr(backbone, TABLE_ATTRIBUTE))


def detach(backbone: nn.Module, attribute: str, hook: Callable[..., Any]) -> None:
    """Remove a child of the backbone that has what an adapter has once, and its hook, if they are there."""
    if hasattr(backbone, attribute):
        delattr(backbone, attribute)
        for hooks in (backbone._forward_pre_hooks, backbone._forward_hooks):
            for key in [key for key, known in hooks.items() if known is hook]:
                del hooks[key]
                backbone._forward_hooks_with_kwargs.pop(key, None)
