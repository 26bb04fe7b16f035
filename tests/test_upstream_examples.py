"""Models in the shape of torch-geometric-temporal's own examples, on its own loaders, adapted with a plain call."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from stlora_peft import STLoraConfig
from stlora_peft.backbones import tgt
from stlora_peft.tuner.bare_layers import STLoraGates
from stlora_peft.tuner.graph_layers import (
    STLoraAdaptiveConv,
    STLoraChebConv,
    STLoraDiffusionConv,
    STLoraGatedGraphConv,
    STLoraGraphConv,
)
from stlora_peft.tuner.host_layers import STLoraLinear
from stlora_peft.tuner.layers import STLoraLayer
from stlora_peft.tuner.recurrent_layers import STLoraRecurrent

pytest.importorskip("torch_geometric")
cells: Any = tgt.load().nn.recurrent
dataset: Any = tgt.load().dataset

pytestmark = pytest.mark.data


class RecurrentGCN(nn.Module):
    """A cell, a ReLU and a linear layer, as in every one of the examples."""

    def __init__(self, recurrent: nn.Module, width: int, outputs: int = 1) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        return self.linear(F.relu(self.recurrent(x, edge_index, edge_weight)))


class CarriedLSTM(RecurrentGCN):
    """Hands the states of the cell back to the caller."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        h, c = self.recurrent(x, edge_index, edge_weight, *state)
        return self.linear(F.relu(h)), h, c


class CarriedDyGrEncoder(RecurrentGCN):
    """Reads the output of the LSTM, and hands on its states."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        out, h, c = self.recurrent(x, edge_index, edge_weight, *state)
        return self.linear(F.relu(out)), h, c


class CarriedAGCRN(RecurrentGCN):
    """Is given the nodes' vectors, and no edges."""

    def forward(self, x: Tensor, e: Tensor, h: Tensor | None = None) -> tuple[Tensor, ...]:
        h = self.recurrent(x, e, h)
        return self.linear(F.relu(h)), h


def over_edges(model: nn.Module, snapshot: Any, state: tuple[Tensor, ...]) -> Any:
    return model(snapshot.x, snapshot.edge_index, snapshot.edge_attr, *state)


def over_vectors(model: nn.Module, snapshot: Any, state: tuple[Tensor, ...]) -> Any:
    nodes = len(snapshot.x)
    out, *after = model(snapshot.x[None], torch.linspace(-1, 1, 4 * nodes).view(nodes, 4), *state)
    return out[0], *after


@dataclass(frozen=True)
class Example:
    """One example: its data, its model, what is adapted and which kinds of layers that makes."""

    name: str
    loader: str
    num_nodes: int
    make: Callable[[], RecurrentGCN]
    targets: tuple[str, ...]
    kinds: frozenset[type[STLoraLayer]]
    call: Callable[[nn.Module, Any, tuple[Tensor, ...]], Any] = over_edges

    def __str__(self) -> str:
        return self.name


EXAMPLES = [
    Example(
        "dcrnn",
        "chickenpox",
        20,
        lambda: RecurrentGCN(cells.DCRNN(4, 32, 1), 32),
        ("conv_x_z", "conv_x_h", "linear"),
        frozenset({STLoraDiffusionConv, STLoraLinear}),
    ),
    Example(
        "gclstm",
        "england_covid",
        129,
        lambda: CarriedLSTM(cells.GCLSTM(8, 32, 2), 32),
        ("recurrent", "conv_i", "conv_f", "conv_c", "conv_o", "linear"),
        frozenset({STLoraGates, STLoraChebConv, STLoraLinear}),
    ),
    Example(
        "tgcn",
        "england_covid",
        129,
        lambda: RecurrentGCN(cells.TGCN(8, 32), 32),
        ("conv_z", "conv_h", "linear_z", "linear_h", "linear"),
        frozenset({STLoraGraphConv, STLoraLinear}),
    ),
    Example(
        "a3tgcn",
        "metr_la",
        207,
        lambda: RecurrentGCN(cells.A3TGCN(2, 32, periods=12), 32, outputs=12),
        ("conv_z.lin", "conv_h.lin", "linear_z", "linear_h", "linear"),
        frozenset({STLoraLinear}),
    ),
    Example(
        "dygrencoder",
        "chickenpox",
        20,
        lambda: CarriedDyGrEncoder(cells.DyGrEncoder(4, 1, "mean", 32, 1), 32),
        ("conv_layer", "recurrent_layer", "linear"),
        frozenset({STLoraGatedGraphConv, STLoraRecurrent, STLoraLinear}),
    ),
    Example(
        "agcrn",
        "chickenpox",
        20,
        lambda: CarriedAGCRN(cells.AGCRN(20, 4, 16, K=2, embedding_dimensions=4), 16),
        ("_gate", "_update", "linear"),
        frozenset({STLoraAdaptiveConv, STLoraLinear}),
        over_vectors,
    ),
]


@pytest.fixture
def snapshots(
    shared_data: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[Any]]:
    """The first snapshots of a data set, read by its loader from the file that the loader would download."""

    def signal(name: str) -> Iterable[Any]:
        if name == "metr_la":
            shutil.copy(shared_data("tgt/METR-LA.zip"), tmp_path)
            return dataset.METRLADatasetLoader(raw_data_dir=str(tmp_path)).get_dataset(12, 12)
        path = shared_data(f"tgt/{name}.json")
        monkeypatch.setattr("urllib.request.urlopen", lambda url, context: path.open("rb"))
        loader = {"chickenpox": dataset.ChickenpoxDatasetLoader, "england_covid": dataset.EnglandCovidDatasetLoader}
        return loader[name]().get_dataset()

    return lambda name: [snapshot for _, snapshot in zip(range(6), signal(name), strict=False)]


def run(model: nn.Module, example: Example, data: list[Any]) -> list[Tensor]:
    """Outputs over the snapshots, states handed on."""
    state: tuple[Tensor, ...] = ()
    outputs = []
    for snapshot in data:
        out = example.call(model, snapshot, state)
        out, *state = out if isinstance(out, tuple) else (out,)
        outputs.append(out)
    return outputs


def cost(model: nn.Module, example: Example, data: list[Any]) -> Tensor:
    """Mean squared error over the snapshots, as the examples compute it."""
    outputs = run(model, example, data)
    losses = [(out - snapshot.y.view_as(out)).square().mean() for out, snapshot in zip(outputs, data, strict=True)]
    return torch.stack(losses).mean()


@pytest.mark.filterwarnings("error:stlora adapter:UserWarning")
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_example_is_adapted_trained_saved_and_loaded(
    example: Example, snapshots: Callable[[str], list[Any]], tmp_path: Path
) -> None:
    data = snapshots(example.loader)
    assert {len(snapshot.x) for snapshot in data} == {example.num_nodes}
    backbone = example.make().requires_grad_(False)
    pristine = copy.deepcopy(backbone)
    config = STLoraConfig(num_nodes=example.num_nodes, target_modules=list(example.targets))
    model = get_peft_model(backbone, config)
    assert {type(module) for module in model.modules() if isinstance(module, STLoraLayer)} == example.kinds

    model.train()
    for found, expected in zip(run(model, example, data), run(pristine, example, data), strict=True):
        assert torch.equal(found, expected)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = cost(model, example, data)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "nall_" in name}

    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(pristine, tmp_path / "adapter").eval()
    for found, expected in zip(run(loaded, example, data), run(model, example, data), strict=True):
        assert torch.equal(found, expected)
