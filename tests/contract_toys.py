"""One small backbone for each host layer, on which the contract with PEFT is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch_geometric.nn import ChebConv, GCNConv
from torch_geometric.nn import Linear as PygLinear
from toys import CONDITIONINGS, graph

from stlora_peft import PredictorConfig, STLoraConfig

NODES, WINDOW, HORIZON, CHANNELS, HIDDEN = 5, 6, 2, 3, 8


class Toy(nn.Module):
    """Backbone ``(b, window, n, c) -> (b, horizon, n, 1)``: a layer ``enc``, something fixed around it, a ``head``."""

    layout: str | None = None

    def __init__(self, enc: nn.Module, width: int = HIDDEN) -> None:
        super().__init__()
        self.enc = enc
        self.head = nn.Linear(width, HORIZON)

    def encode(self, x: Tensor) -> Tensor:
        """Hidden state ``[b n h]`` of a window."""
        return self.enc(x).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous, or torch lets `requires_grad` choose how the head's product is computed.
        return self.head(torch.tanh(self.encode(x)).contiguous()).transpose(1, 2)[..., None]


class Conv1dToy(Toy):
    layout = "(b n) c t"

    def encode(self, x: Tensor) -> Tensor:
        rows = self.enc(x.permute(0, 2, 3, 1).flatten(0, 1))
        return rows.mean(-1).unflatten(0, (-1, x.shape[2]))


class Conv2dToy(Toy):
    layout = "b c n t"

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(x.permute(0, 3, 2, 1)).mean(-1).transpose(1, 2)


class RecurrentToy(Toy):
    layout = "(b n) t c"

    def encode(self, x: Tensor) -> Tensor:
        rows, _ = self.enc(x.transpose(1, 2).flatten(0, 1))
        return rows[:, -1].unflatten(0, (-1, x.shape[2]))


class GraphToy(Toy):
    def encode(self, x: Tensor) -> Tensor:
        return self.enc(x[:, -1], graph(x.shape[2])[0])


class CityToy(Toy):
    """With normalisation: ``norm`` has one entry for each node, ``batch_norm`` one for each channel."""

    def __init__(self, enc: nn.Module, num_nodes: int = NODES) -> None:
        super().__init__(enc)
        self.norm = nn.BatchNorm2d(num_nodes)
        self.batch_norm = nn.BatchNorm2d(HIDDEN)
        for norm in (self.norm, self.batch_norm):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def encode(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.enc(x).transpose(1, 2))  # [b n t h]
        return self.batch_norm(hidden.permute(0, 3, 1, 2)).mean(-1).transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """How to build a toy and an adapter for it."""

    build: Callable[[], Toy]
    mergeable: bool = True
    options: dict[str, Any] = field(default_factory=dict)


CITY_OPTIONS = {
    "node_bound": ["norm"],
    "predictor": PredictorConfig(window=WINDOW, horizon=HORIZON, in_channels=CHANNELS, out_channels=1, width=4),
}
CASES = {
    "linear": Case(lambda: Toy(nn.Linear(CHANNELS, HIDDEN))),
    "pyg_linear": Case(lambda: Toy(PygLinear(CHANNELS, HIDDEN))),
    "conv1d": Case(lambda: Conv1dToy(nn.Conv1d(CHANNELS, HIDDEN, 3, dilation=2))),
    "conv2d": Case(lambda: Conv2dToy(nn.Conv2d(CHANNELS, HIDDEN, (1, 3), padding=(0, 1)))),
    "lstm": Case(lambda: RecurrentToy(nn.LSTM(CHANNELS, HIDDEN, batch_first=True)), mergeable=False),
    "gru": Case(lambda: RecurrentToy(nn.GRU(CHANNELS, HIDDEN, batch_first=True)), mergeable=False),
    "cheb": Case(lambda: GraphToy(ChebConv(CHANNELS, HIDDEN, K=2))),
    "gcn": Case(lambda: GraphToy(GCNConv(CHANNELS, HIDDEN)), mergeable=False),
    "city": Case(lambda: CityToy(nn.Linear(CHANNELS, HIDDEN)), mergeable=False, options=CITY_OPTIONS),
}
GRID = [(name, conditioning) for name in CASES for conditioning in CONDITIONINGS]


def toy(name: str, seed: int = 0) -> Toy:
    """A toy backbone in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    return CASES[name].build().eval()


def config(name: str, conditioning: str = "gate", **options: Any) -> STLoraConfig:
    """Configuration of an adapter on ``enc`` whose factors are random, so that it has an effect."""
    layout = type(CASES[name].build()).layout
    defaults: dict[str, Any] = {
        "num_nodes": NODES,
        "r": 2,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "emb_size": 4,
        "target_modules": ["enc"],
        "predictor": None,
        "init_weights": False,
        "node_layout": {"enc": layout} if layout else {},
        "conditioning": conditioning,
    }
    return STLoraConfig(**(defaults | CASES[name].options | options))


def adapted(name: str, conditioning: str = "gate", seed: int = 1, **options: Any) -> PeftModel:
    """A toy with an adapter called ``default``, in evaluation mode."""
    model = toy(name)
    torch.manual_seed(seed)
    return get_peft_model(model, config(name, conditioning, **options)).eval()


def window(num_nodes: int = NODES, batch: int = 2, seed: int = 0) -> Tensor:
    """Input of a toy, ``[b t n c]``."""
    return torch.randn(batch, WINDOW, num_nodes, CHANNELS, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forecast(model: nn.Module, num_nodes: int = NODES) -> Tensor:
    """Output of a toy, adapted or not."""
    out: Tensor = model(window(num_nodes))
    return out


def train_step(model: nn.Module, learning_rate: float = 0.1) -> None:
    """One step of gradient descent on everything that is trainable."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate)
    (model(window()) - 1.0).square().mean().backward()
    optimizer.step()
    model.eval()
