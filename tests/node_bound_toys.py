"""A backbone with a node-bound normalisation, and batches of a city for it."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from stlora_peft import STLoraConfig


def used(norm: nn.Module) -> nn.Module:
    """A normalisation in float64 whose entries all differ."""
    norm = norm.double()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if value is not None:
                value.add_(torch.rand(value.shape))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(7)
    return norm


class Normalised(nn.Module):
    """A backbone with a node-bound normalisation, one over channels and a table."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 4)
        self.norm = used(nn.BatchNorm2d(num_nodes))
        self.channels = used(nn.BatchNorm1d(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:  # [b t n c]
        h = self.norm(self.lin(x).transpose(1, 2))  # [b n t c]
        return self.channels(h.flatten(0, 2)).view_as(h).transpose(1, 2)


def city_model(num_nodes: int = 7, **options: object) -> PeftModel:
    defaults = {"conditioning": "gate", "lora_dropout": 0.0, "predictor": None}
    options = {"target_modules": ["lin"], "node_bound": ["norm"]} | defaults | options
    return get_peft_model(Normalised(5), STLoraConfig(num_nodes=num_nodes, **options))


def city_batches(num_nodes: int = 7, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of different sizes and levels, as the weeks of a record are."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": 3.0 * level + torch.randn(size, 6, num_nodes, 3, generator=generator, dtype=torch.float64)}
        for level, size in enumerate((4, 4, 1))
    ]
