"""Folding of adapters that are the same for every node into the weights of their layers."""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from stlora_peft.errors import message
from stlora_peft.tuner.functional import delta_weight
from stlora_peft.tuner.nodes import AdapterModule


class MergingLayer(AdapterModule):
    """What a layer with a low-rank update has for merging it; a kind of layer says which weight equals the update."""

    mergeable = False
    name: str
    nall_B: nn.ParameterDict  # noqa: N815 - the method's own letter
    scaling: dict[str, float]
    conditioning: dict[str, str]

    def factors(self, adapter_name: str) -> dict[str, Tensor]:
        """The adapter's tensors by factor name."""
        raise NotImplementedError

    def _root_weight(self) -> Tensor:
        """Weight that a shared update is merged into."""
        return cast(Tensor, self.get_base_layer().weight)

    def _set_root_weight(self, value: Tensor) -> None:
        """Put values into that weight."""
        self._root_weight().data = value

    def merge_refusal(self, adapter_name: str) -> str | None:
        """Why the adapter cannot be folded into this layer's weights, or None."""
        if self.conditioning.get(adapter_name, "shared") != "shared":
            form = self.conditioning[adapter_name]
            return f"its update depends on the node (conditioning='{form}'): one weight cannot hold N of them"
        if self.mergeable:
            return None
        return f"{type(self.get_base_layer()).__name__} has no weight that equals the update"

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Dense update of a shared adapter, in the shape of the weight that it is merged into."""
        factors = self.factors(adapter_name)
        return delta_weight(factors["B"], factors["A"], self.scaling[adapter_name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold shared adapters into the wrapped layer's weights.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Adapters to fold; the active ones by default.

        Raises:
            ValueError: If an adapter depends on the node, or the result is not finite. Nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.nall_B]
        if names:
            self._set_root_weight(self.merged_weight(names, safe_merge))
            self.merged_adapters.extend(names)

    def merged_weight(self, adapter_names: list[str], safe_merge: bool = False) -> Tensor:
        """Compute the wrapped layer's weight with adapters folded in; arguments and errors as of :meth:`merge`."""
        for name in adapter_names:
            check_mergeable(self.merge_refusal(name), name, self.name)
        merged = self._root_weight().data
        for name in adapter_names:
            merged = merged + self.get_delta_weight(name).to(merged.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    message(
                        f"adapter '{name}' cannot be merged into '{self.name}'",
                        expected="finite weights",
                        got="NaN or infinity",
                        fix="train the adapter again with a smaller learning rate",
                    )
                )
        return merged

    def unmerge(self) -> None:
        """Take merged adapters out of the wrapped layer's weights again; nothing happens if there are none."""
        while self.merged_adapters:
            weight = self._root_weight().data
            self._set_root_weight(weight - self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype))


def check_mergeable(refusal: str | None, adapter_name: str, where: str) -> None:
    """Raise if there is a reason not to merge."""
    if refusal:
        raise ValueError(
            message(
                f"adapter '{adapter_name}' cannot be merged into '{where}'",
                expected="an update that is the same for every node (conditioning='shared')",
                got=refusal,
                fix="keep the adapter beside the backbone: call the model as it is, or unload() to get the backbone",
            )
        )
