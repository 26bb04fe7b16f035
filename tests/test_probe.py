"""Layouts that two probing forwards find, and targets that no forward calls."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from einops import rearrange
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from toys import CONDITIONINGS, assert_unchanged, error_lines, graph, raised, small_backbone, snapshot, windows

from stlora_peft import STLoraConfig, find_layouts
from stlora_peft.tuner.probe import UnreachedTargets

B, T, N, C = 2, 6, 5, 3


class Rearranged(nn.Module):
    """Lays the window out as ``pattern`` and runs a layer on it."""

    def __init__(self, layer: nn.Module, pattern: str) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": layer})
        self.unused = nn.Linear(2, 2)
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        out = self.encoder["layer"](rearrange(x, f"b t n c -> {self.pattern}"))
        return out[0] if isinstance(out, tuple) else out


def window() -> Tensor:
    return torch.randn(B, T, N, C)


LAYERS = [
    (lambda: nn.Linear(C, 4), "b t n c"),
    (lambda: nn.Linear(C, 4), "(b n) t c"),
    (lambda: nn.Linear(C, 4), "(n b) t c"),
    (lambda: nn.Linear(C, 4), "t (b n) c"),
    (lambda: nn.LSTM(C, 4, batch_first=True), "(b n) t c"),
    (lambda: nn.GRU(C, 4), "t (b n) c"),
    (lambda: nn.GRU(C, 4), "t (n b) c"),
    (lambda: nn.Conv2d(C, 4, (1, 3)), "b c n t"),
    (lambda: nn.Conv2d(C, 4, (3, 1)), "b c t n"),
    (lambda: nn.Conv1d(C, 4, 3), "(b n) c t"),
]


@pytest.mark.parametrize(("make", "pattern"), LAYERS, ids=lambda value: value if isinstance(value, str) else "")
def test_find_layouts_reads_the_pattern_that_was_used(make, pattern):
    found = find_layouts(Rearranged(make(), pattern), window(), num_nodes=N, target_modules=["layer"])
    assert list(found) == ["encoder.layer"]
    assert found["encoder.layer"].translate(str.maketrans("bt", "xx")).replace("u", "x") == pattern.translate(
        str.maketrans("bt", "xx")
    )


def test_find_layouts_of_the_backbones_equal_their_own():
    backbone = small_backbone("stgcn", N)
    names = ["conv_1", "_graph_conv", "head.hidden"]
    found = find_layouts(backbone, windows(N), graph(N)[0], num_nodes=N, target_modules=names)
    assert found == {
        "block1._temporal_conv1.conv_1": "b c n t",
        "block1._temporal_conv2.conv_1": "b c n t",
        "block2._temporal_conv1.conv_1": "b c n t",
        "block2._temporal_conv2.conv_1": "b c n t",
        "block1._graph_conv": "b t n c",
        "block2._graph_conv": "b t n c",
        "head.hidden": "b n c",
    }


def test_find_layouts_sees_layers_whose_forward_is_called_directly():
    gnn = pytest.importorskip("torch_geometric.nn")

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = gnn.ChebConv(C, 4, K=4)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.conv(x, edge_index)

    names = [f"lins.{k}" for k in range(4)]
    found = find_layouts(Holder(), window(), graph(N)[0], num_nodes=N, target_modules=names)
    assert found == {f"conv.lins.{k}": "b t n c" for k in range(4)}


@pytest.mark.parametrize("mode", [True, False])
def test_find_layouts_leaves_the_backbone_as_it_was(mode):
    backbone = Rearranged(nn.Sequential(nn.Linear(C, 4), nn.BatchNorm2d(T), nn.Dropout()), "b t n c").train(mode)
    backbone.encoder["layer"][2].eval()
    before, attributes = snapshot(backbone), {m: dict(vars(m)) for m in backbone.modules()}
    x = window()
    kept = x.clone()
    assert find_layouts(backbone, x, num_nodes=N, target_modules=["layer.0"])
    assert_unchanged(backbone, before)
    assert torch.equal(x, kept)
    assert [m.training for m in backbone.modules()] == [values["training"] for values in attributes.values()]
    assert all(vars(m).keys() == values.keys() for m, values in attributes.items())


def test_find_layouts_after_a_failing_forward_leaves_the_backbone_as_it_was():
    backbone = Rearranged(nn.Linear(C + 1, 4), "b t n c").train()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        find_layouts(backbone, window(), num_nodes=N, target_modules=["layer"])
    assert backbone.training
    assert "forward" not in vars(backbone.encoder["layer"])


def test_find_layouts_keeps_a_forward_that_the_user_put_on_a_layer():
    backbone = Rearranged(nn.Linear(C, 4), "b t n c")
    layer = backbone.encoder["layer"]
    layer.forward = own = lambda x: nn.functional.linear(x, layer.weight)
    find_layouts(backbone, window(), num_nodes=N, target_modules=["layer"])
    assert layer.forward is own


def test_find_layouts_takes_the_samples_of_another_axis():
    backbone = Rearranged(nn.Linear(C, 4), "(b n) t c")
    x = window()

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = backbone

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1))

    found = find_layouts(Transposed(), x.transpose(0, 1), num_nodes=N, target_modules=["layer"], batch_axis=1)
    assert found["inner.encoder.layer"].startswith("(b n)")


def test_find_layouts_takes_a_window_of_whole_numbers():
    class Counts(Rearranged):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    counts = torch.randint(0, 9, (B, T, N, C))
    assert find_layouts(Counts(nn.Linear(C, 4), "(b n) t c"), counts, num_nodes=N, target_modules=["layer"]) == {
        "encoder.layer": "(b n) t c"
    }


def test_find_layouts_of_an_unreached_layer_raises():
    backbone = Rearranged(nn.Linear(C, 4), "b t n c")
    lines = raised(lambda: find_layouts(backbone, window(), num_nodes=N, target_modules=["unused"]))
    assert lines == {
        "where": "layer 'unused' is not reached by the probing forward",
        "expected": "a layer that the backbone calls",
        "got": "no call",
        "fix": "leave it out of target_modules: an adapter on it would have no effect",
    }


def test_find_layouts_of_a_name_that_is_not_there_raises():
    backbone = Rearranged(nn.Linear(C, 4), "b t n c")
    lines = raised(lambda: find_layouts(backbone, window(), num_nodes=N, target_modules=["layer", "decoder"]))
    assert lines["where"] == "no layer is called 'decoder'"


@pytest.mark.parametrize(("pattern", "shape"), [("(b t n) c", (B, T, N, C)), ("b t n c", (N, T, N, C))])
def test_find_layouts_never_guesses(pattern, shape):
    backbone = Rearranged(nn.Linear(C, 4), pattern)
    lines = raised(lambda: find_layouts(backbone, torch.randn(shape), num_nodes=N, target_modules=["layer"]))
    assert lines["where"] == "layer 'encoder.layer': the node axis cannot be found"
    assert " or " in lines["got"]


# -- targets of an adapter that the forward never calls -----------------------------------------------------


class Branches(nn.Module):
    """Calls ``used``, reads the weight of ``read`` without calling it, and calls ``late`` for long windows only."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read, self.unused, self.late = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.used(x), self.read.weight)
        return self.late(x) if x.shape[1] > T else x


def config(*targets: str, **options: object) -> STLoraConfig:
    defaults = {"num_nodes": N, "target_modules": list(targets), "predictor": None, "init_weights": False}
    return STLoraConfig(**({"conditioning": "gate", "lora_dropout": 0.0} | defaults | options))


def reports(model: nn.Module, steps: int = T) -> list[dict[str, str]]:
    """The warnings of one forward, as their four lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.randn(B, steps, N, C))
    assert all(warning.category is UserWarning for warning in caught)
    return [error_lines(warning.message) for warning in caught]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_targets_that_the_first_forward_does_not_call_are_reported_after_it_and_once(conditioning, mode):
    targets = config("used", "read", "unused", conditioning=conditioning)
    model = get_peft_model(Branches(), targets).train(mode)
    assert reports(model) == [
        {
            "where": "stlora adapter 'default' on 'read', 'unused': not called by the forward",
            "expected": "layers that the backbone calls",
            "got": "no call",
            "fix": "leave them out of target_modules: an adapter there has no effect; ignore this if another input "
            "leads there",
        }
    ]
    assert reports(model) == []
    assert not model.get_base_model()._forward_hooks


def test_nothing_is_reported_where_every_target_is_called():
    model = get_peft_model(Branches(), config("used", "late"))
    assert reports(model, steps=T + 1) == []
    assert reports(model) == []
    assert not model.get_base_model()._forward_hooks


def test_each_adapter_is_reported_when_it_first_runs():
    model = get_peft_model(Branches(), config("used", "late"), adapter_name="one")
    model.add_adapter("two", config("used", "unused"))
    with model.disable_adapter():
        assert reports(model) == []
    (lines,) = reports(model)
    assert lines["where"] == "stlora adapter 'one' on 'late': not called by the forward"
    assert reports(model) == []
    model.set_adapter("two")
    (lines,) = reports(model)
    assert lines["where"] == "stlora adapter 'two' on 'unused': not called by the forward"
    assert not model.get_base_model()._forward_hooks


def test_layer_that_another_adapter_reached_is_reported_for_the_one_that_does_not():
    model = get_peft_model(Branches(), config("used", "late"), adapter_name="one")
    assert reports(model, steps=T + 1) == []
    model.add_adapter("two", config("used", "late"))
    model.set_adapter("two")
    (lines,) = reports(model)
    assert lines["where"] == "stlora adapter 'two' on 'late': not called by the forward"


def test_adapter_that_replaces_one_of_its_name_is_reported_again():
    model = get_peft_model(Branches(), config("used", "late"), adapter_name="one")
    assert reports(model, steps=T + 1) == []
    model.add_adapter("two", config("used"))
    model.delete_adapter("one")
    model.add_adapter("one", config("used", "late"))
    model.set_adapter("one")
    (lines,) = reports(model)
    assert lines["where"] == "stlora adapter 'one' on 'late': not called by the forward"


def test_merged_and_deleted_adapters_are_not_reported():
    model = get_peft_model(Branches(), config("used", "unused", conditioning="shared"))
    model.merge_adapter()
    assert reports(model) == []
    model.unmerge_adapter()
    assert len(reports(model)) == 1
    model.add_adapter("other", config("unused"))
    model.delete_adapter("other")
    assert reports(model) == []


def test_loaded_injected_and_copied_adapters_are_reported(tmp_path):
    backbone = Branches()
    model = get_peft_model(copy.deepcopy(backbone), config("used", "unused"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path)
    injected = inject_adapter_in_model(config("used", "unused"), copy.deepcopy(backbone))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model, loaded, injected):
        (lines,) = reports(twin)
        assert lines["where"] == "stlora adapter 'default' on 'unused': not called by the forward"
        assert reports(twin) == []


def test_unloading_before_any_forward_leaves_no_hook():
    backbone = Branches()
    before = snapshot(backbone)
    model = get_peft_model(backbone, config("used", "unused"))
    assert [type(hook) for hook in backbone._forward_hooks.values()] == [UnreachedTargets]
    backbone.requires_grad_(True)
    assert_unchanged(model.unload(), before)


def test_failing_forward_reports_nothing_and_the_next_one_does():
    model = get_peft_model(Branches(), config("used", "unused"))
    with pytest.raises(ValueError, match="the node axis cannot be found"):
        model(torch.randn(B, T, N + 1, C))
    assert len(reports(model)) == 1


def test_compiled_forward_is_not_stopped_by_the_report():
    model = get_peft_model(Branches(), config("used", "unused")).get_base_model()
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(B, T, N, C)
    with torch.no_grad():
        assert torch.equal(compiled(x), compiled(x))
        assert len(reports(model)) == 1
        assert torch.equal(compiled(x), model(x))
