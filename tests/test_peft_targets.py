"""Which layers an adapter is put on, with which rank and scale, and what is refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from contract_toys import NODES, adapted, config, toy, window
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch_geometric.nn import ChebConv, GATConv
from torch_geometric.nn import Linear as PygLinear
from toys import assert_unchanged, raised, snapshot

from stlora_peft import STLoraConfig
from stlora_peft.tuner.layers import STLoraLayer

HOSTS = (
    "torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.LSTM, torch.nn.GRU, torch.nn.LSTMCell, "
    "torch.nn.GRUCell, torch.nn.RNNCell, torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, "
    "torch_geometric.nn.Linear, torch_geometric.nn.GCNConv, torch_geometric.nn.ChebConv, torch_geometric.nn.SAGEConv, "
    "torch_geometric.nn.RGCNConv, torch_geometric.nn.GatedGraphConv, torch_geometric_temporal.nn.DConv, "
    "torch_geometric_temporal.nn.BatchedDConv, torch_geometric_temporal.nn.AVWGCN, "
    "torch_geometric_temporal.nn.ChebConvAttention, torch_geometric_temporal.nn.GCLSTM, "
    "torch_geometric_temporal.nn.HeteroGCLSTM, or a class of your own"
)
FIX = (
    "leave it out of target_modules (or name it in exclude_modules), train it with modules_to_save, or register its "
    "class with register_host_layer"
)


class Stack(nn.Module):
    """Three blocks of two linear layers, the second of them of torch-geometric."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.blocks = nn.ModuleList(
            nn.ModuleDict({"lin": nn.Linear(3, 3), "pyg": PygLinear(3, 3), "act": nn.Tanh()}) for _ in range(3)
        )
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.net.blocks:
            x = block["act"](block["pyg"](block["lin"](x)))
        return self.head(x)


class One(nn.Module):
    """A backbone around one layer that is never run."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def stacked(**options: object) -> PeftModel:
    return get_peft_model(Stack(), STLoraConfig(**({"num_nodes": NODES, "predictor": None} | options)))


def layers(model: nn.Module) -> dict[str, STLoraLayer]:
    prefix = "base_model.model."
    return {key.removeprefix(prefix): m for key, m in model.named_modules() if isinstance(m, STLoraLayer)}


ALL = [f"net.blocks.{i}.{name}" for i in range(3) for name in ("lin", "pyg")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["lin"]}, ALL[::2]),
        ({"target_modules": ["blocks.1.pyg", "head"]}, ["net.blocks.1.pyg", "head"]),
        ({"target_modules": r".*\.[01]\.(lin|pyg)"}, ALL[:4]),
        ({"target_modules": "all-linear"}, [*ALL, "head"]),
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, ALL),
        ({"target_modules": "all-linear", "exclude_modules": ["head", "pyg"]}, ALL[::2]),
        ({"target_modules": ["lin", "pyg"], "exclude_modules": r".*blocks\.0\..*"}, ALL[2:]),
        ({"target_modules": ["lin"], "layers_to_transform": 1}, ["net.blocks.1.lin"]),
        (
            {"target_modules": ["lin"], "layers_to_transform": [0, 2], "layers_pattern": ["blocks"]},
            ["net.blocks.0.lin", "net.blocks.2.lin"],
        ),
    ],
)
def test_targets_are_selected(options: dict[str, object], expected: list[str]) -> None:
    model = stacked(**options)
    assert list(layers(model)) == expected
    x = torch.rand(2, NODES, 3)
    assert model(x).shape == (2, NODES, 1)


def test_all_linear_of_a_second_adapter_takes_the_same_layers() -> None:
    model = stacked(target_modules="all-linear", modules_to_save=["head"])
    model.add_adapter("oslo", STLoraConfig(num_nodes=NODES, target_modules="all-linear", predictor=None))
    assert list(layers(model)) == ALL
    assert all(set(layer.r) == {"default", "oslo"} for layer in layers(model).values())


def test_no_match_is_an_error_of_peft() -> None:
    with pytest.raises(ValueError, match=r"Target modules .*nothing.* not found"):
        stacked(target_modules=["nothing"])


def test_no_target_modules_for_an_unknown_backbone_is_an_error() -> None:
    model = toy("linear")
    before = snapshot(model)
    assert raised(lambda: get_peft_model(model, STLoraConfig(num_nodes=NODES))) == {
        "where": "Please specify `target_modules` in STLoraConfig",
        "expected": "names of layers, or a backbone with defaults of its own",
        "got": "target_modules=None on a Toy",
        "fix": "pass target_modules=[<names from backbone.named_modules()>] or 'all-linear'",
    }
    assert_unchanged(model, before)


@pytest.mark.parametrize("option", ["modules_to_save", "node_layout"])
def test_name_that_matches_no_module_is_refused(option: str) -> None:
    model = toy("linear")
    before = snapshot(model)
    value: object = ["haed"] if option == "modules_to_save" else {"haed": "b t n c"}
    assert raised(lambda: get_peft_model(model, config("linear", **{option: value}))) == {
        "where": f"STLoraConfig.{option}: no module is called 'haed'",
        "expected": "the last part of a module's name",
        "got": "'haed'",
        "fix": "take it from backbone.named_modules()",
    }
    assert_unchanged(model, before)


def test_backbone_whose_module_has_the_prefix_is_refused() -> None:
    model = Stack()
    model.nall_net = nn.Linear(3, 3)
    before = snapshot(model)
    lines = raised(lambda: get_peft_model(model, STLoraConfig(num_nodes=NODES, target_modules=["lin"])))
    assert lines["where"] == "module 'nall_net' of the backbone has the name of an adapter's tensor"
    assert lines["fix"] == "rename it: PEFT would take it for part of the adapter"
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({"lin": 3}, [3, 8] * 3 + [8]),
        ({"blocks.1.pyg": 5}, [8, 8, 8, 5, 8, 8, 8]),
        ({r"blocks\.[02]\..*": 1}, [1, 1, 8, 8, 1, 1, 8]),
        ({"^head": 2}, [8] * 6 + [2]),
    ],
)
def test_rank_and_alpha_patterns_apply_layer_by_layer(pattern: dict[str, int], expected: list[int]) -> None:
    model = stacked(target_modules="all-linear", rank_pattern=pattern, alpha_pattern=pattern)
    for layer, value in zip(layers(model).values(), expected, strict=True):
        alpha = value if value != 8 else 16
        assert layer.r["default"] == value
        assert layer.lora_alpha["default"] == alpha
        assert layer.scaling["default"] == alpha / value
        assert layer.nall_A["default"].shape[0] == value


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3 / 4), (True, 3 / 2)])
def test_rank_stabilised_scale(rslora: bool, scale: float) -> None:
    (layer,) = layers(adapted("linear", r=4, lora_alpha=3, use_rslora=rslora)).values()
    assert layer.scaling == {"default": scale}


@pytest.mark.parametrize(
    ("layer", "got"),
    [
        (nn.Embedding(3, 3), "torch.nn.modules.sparse.Embedding"),
        (nn.Conv3d(3, 3, 1), "torch.nn.modules.conv.Conv3d"),
        (nn.Bilinear(3, 3, 3), "torch.nn.modules.linear.Bilinear"),
        (nn.RNN(3, 3), "torch.nn.modules.rnn.RNN"),
        (nn.TransformerDecoderLayer(4, 2), "torch.nn.modules.transformer.TransformerDecoderLayer"),
        (GATConv(3, 3), "torch_geometric.nn.conv.gat_conv.GATConv"),
        (nn.Conv1d(4, 4, 1, groups=2), "torch.nn.modules.conv.Conv1d; it is a grouped convolution (groups=2)"),
        (
            nn.Conv2d(4, 4, (2, 2)),
            "torch.nn.modules.conv.Conv2d; its kernel (2, 2) spans two axes, so it mixes nodes or is no convolution "
            "along time",
        ),
        (
            PygLinear(-1, 3),
            "torch_geometric.nn.dense.linear.Linear; it is lazy and has no size yet: run the backbone once before "
            "adapting it",
        ),
        (
            ChebConv(-1, 3, K=2),
            "torch_geometric.nn.conv.cheb_conv.ChebConv; it is lazy: run the backbone once before adapting it",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_unsupported_layer_is_refused_with_the_list_of_what_works(layer: nn.Module, got: str) -> None:
    model = One(layer)
    children = [type(m) for m in model.modules()]
    refused = {"where": "layer 'layer' cannot be adapted", "expected": f"one of {HOSTS}", "got": got, "fix": FIX}
    options = {"num_nodes": NODES, "target_modules": ["layer"], "predictor": None}
    assert raised(lambda: get_peft_model(model, STLoraConfig(**options))) == refused
    assert raised(lambda: inject_adapter_in_model(STLoraConfig(**options), model)) == refused
    assert [type(m) for m in model.modules()] == children


def test_one_unsupported_target_among_good_ones_leaves_the_backbone_untouched() -> None:
    model = Stack()
    before = snapshot(model)
    lines = raised(lambda: get_peft_model(model, STLoraConfig(num_nodes=NODES, target_modules=["lin", "act"])))
    assert lines["where"] == "layer 'net.blocks.0.act' cannot be adapted"
    assert_unchanged(model, before)


def attention() -> nn.Module:
    return One(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("out_proj", "nn.MultiheadAttention reads its weight without calling it, so an update would have no effect"),
        ("linear1", "nn.TransformerEncoderLayer reads its weights without calling it when it does not train"),
        ("linear2", "nn.TransformerEncoderLayer reads its weights without calling it when it does not train"),
    ],
)
def test_linear_layer_that_is_not_called_is_refused(target: str, reason: str) -> None:
    model = attention()
    before = snapshot(model)
    lines = raised(lambda: get_peft_model(model, STLoraConfig(num_nodes=NODES, target_modules=[target])))
    assert lines["got"].endswith(f"; {reason}")
    assert_unchanged(model, before)


def test_all_linear_asks_to_exclude_an_encoder_layer() -> None:
    model = attention()
    model.lin = nn.Linear(4, 4)
    options = {"num_nodes": NODES, "target_modules": "all-linear", "predictor": None}
    assert raised(lambda: get_peft_model(model, STLoraConfig(**options)))["fix"] == FIX
    found = get_peft_model(model, STLoraConfig(exclude_modules=["linear1", "linear2"], **options))
    assert list(layers(found)) == ["lin"]


def test_wrong_number_of_nodes_names_layer_layout_and_remedy() -> None:
    model = adapted("conv2d")
    lines = raised(lambda: model(window(num_nodes=7)))
    assert lines["where"] == "stlora adapter 'default' on 'enc': wrong number of nodes"
    assert lines["expected"] == "N=5 on axis 'n' of layout 'b c n t'"
    assert lines["got"] == "N=7 from an input of shape (2, 3, 7, 6)"
    assert lines["fix"].startswith("build the adapter with num_nodes=7 for this city")
