"""Adapter files that are not what they were when saved: refused before the backbone is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import assert_unchanged, call, pristine, raised, randomised, small_backbone, snapshot

from stlora_peft import PredictorConfig, STLoraConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GATE = "base_model.model.lstm.nall_gate"


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return small_backbone("lstm").eval()


@pytest.fixture
def folder(backbone: nn.Module, tmp_path: Path) -> Path:
    known = {"num_nodes": 7, "node_ids": [f"s{i}" for i in range(7)]}
    config = STLoraConfig(conditioning="gate", r=2, predictor=PredictorConfig(width=8), **known)
    model = get_peft_model(pristine(backbone), config)
    randomised(model).save_pretrained(tmp_path / "city")
    return tmp_path / "city"


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    assert content.keys() >= values.keys()
    (folder / CONFIG).write_text(json.dumps(content | values))


def refused(backbone: nn.Module, folder: Path) -> dict[str, str]:
    """The lines of the error that loading raises; fails unless both ways of loading leave their model alone."""
    model = pristine(backbone)
    before = snapshot(model)
    lines = raised(lambda: PeftModel.from_pretrained(model, folder))
    assert_unchanged(model, before)

    config = STLoraConfig(num_nodes=5, conditioning="gate", r=2)
    peft_model = randomised(get_peft_model(pristine(backbone), config)).eval()
    classes, tensors, trainable = snapshot(peft_model)
    forecast = call(peft_model, 5)
    assert raised(lambda: peft_model.load_adapter(folder, "broken")) == lines | {
        "where": lines["where"].replace("'default'", "'broken'")
    }
    after = snapshot(peft_model)
    assert (after[0], after[2]) == (classes, trainable)
    assert after[1].keys() == tensors.keys()
    assert all(torch.equal(after[1][name], tensors[name]) for name in tensors)
    assert list(peft_model.peft_config) == ["default"]
    assert torch.equal(call(peft_model, 5), forecast)
    return lines


def test_untouched_file_loads(backbone, folder):
    model = PeftModel.from_pretrained(pristine(backbone), folder)
    assert call(model, 7).shape == (2, 4, 7, 1)


def test_refused_with_an_untouched_file_fails(backbone, folder):
    with pytest.raises(AssertionError, match="no ValueError"):
        refused(backbone, folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_refused(backbone, folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    lines = refused(backbone, folder)
    assert lines["where"] == f"adapter file '{folder / WEIGHTS}' cannot be used"
    assert lines["expected"] == "a whole safetensors file"
    assert lines["got"].startswith("a file that cannot be read (")
    assert lines["fix"] == "save the adapter again, or copy the whole folder from where it was trained"


def test_absent_file_is_refused(backbone, folder):
    (folder / WEIGHTS).unlink()
    lines = refused(backbone, folder)
    assert lines["where"] == f"adapter file '{folder / WEIGHTS}' cannot be used"
    assert lines["expected"] == "a whole safetensors file"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_refused(backbone, folder, value):
    edit_tensors(folder, lambda tensors: tensors[GATE][3].__setitem__(1, value))
    lines = refused(backbone, folder)
    assert (lines["expected"], lines["got"]) == (f"finite values in '{GATE}'", "NaN or infinity")


def test_missing_key_is_refused(backbone, folder):
    edit_tensors(folder, lambda tensors: tensors.pop(GATE))
    lines = refused(backbone, folder)
    assert (lines["expected"], lines["got"]) == (f"a tensor '{GATE}' of shape (7, 2)", "no such tensor")


def test_further_key_is_refused(backbone, folder):
    edit_tensors(folder, lambda tensors: tensors.update({"base_model.model.other": torch.zeros(1)}))
    lines = refused(backbone, folder)
    assert lines["expected"] == "the tensors that adapter_config.json lists"
    assert lines["got"] == "a further tensor 'base_model.model.other'"


def test_wrong_shape_is_refused(backbone, folder):
    edit_tensors(folder, lambda tensors: tensors.update({GATE: tensors[GATE][:6].clone()}))
    lines = refused(backbone, folder)
    assert (lines["expected"], lines["got"]) == (f"shape (7, 2) for '{GATE}'", "shape (6, 2)")


@pytest.mark.parametrize(
    ("values", "key", "expected", "got"),
    [
        ({"num_nodes": 9, "node_ids": None}, "head.nall_gate", (9, 2), (7, 2)),
        ({"r": 3}, "head.nall_A", (3, 6), (2, 6)),
        ({"rank_pattern": {"lstm": 4}}, "lstm.nall_A", (4, 6), (2, 6)),
        ({"conditioning": "core"}, "head.nall_core", (7, 2, 2), None),
        ({"conditioning": "shared"}, "head.nall_gate", None, (7, 2)),
        ({"target_modules": ["lstm"]}, "head.nall_A", None, (2, 6)),
        ({"predictor": None}, "stlora_predictor.nall_predictor.A_0", None, (2, 8)),
    ],
    ids=["num_nodes", "r", "rank_pattern", "core", "shared", "target_modules", "predictor"],
)
def test_config_that_does_not_fit_the_tensors_is_refused(backbone, folder, values, key, expected, got):
    edit_config(folder, **values)
    lines = refused(backbone, folder)
    assert lines["where"] == "stlora adapter 'default' does not fit its configuration or this backbone"
    name = f"'base_model.model.{key}'"
    assert lines["expected"] == (f"{name} of shape {expected}" if expected else f"no tensor {name}")
    assert lines["got"] == (f"shape {got}" if got else "no such tensor")
    assert lines["fix"] == (
        "copy adapter_config.json and adapter_model.safetensors of one adapter into the folder; to make a new adapter "
        "from a saved configuration, set its tensors to None"
    )


def test_other_number_of_nodes_beside_node_ids_is_refused(backbone, folder):
    edit_config(folder, num_nodes=9)
    lines = refused(backbone, folder)
    assert lines["where"] == "STLoraConfig.node_ids does not fit num_nodes"
    assert (lines["expected"], lines["got"]) == ("9 names", "7 names")


def test_other_predictor_in_the_config_is_refused(backbone, folder):
    predictor = json.loads((folder / CONFIG).read_text())["predictor"]
    edit_config(folder, predictor=predictor | {"width": 16})
    lines = refused(backbone, folder)
    assert lines["expected"] == "'base_model.model.stlora_predictor.nall_predictor.A_0' of shape (2, 16)"
    assert lines["got"] == "shape (2, 8)"


def test_config_lists_every_tensor_of_the_file(folder):
    listed = json.loads((folder / CONFIG).read_text())["tensors"]
    assert listed == {key: list(value.shape) for key, value in load_file(folder / WEIGHTS).items()}


def test_folder_holds_no_pickle(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_config_read_alone_checks_the_file_too(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(GATE))
    assert raised(lambda: STLoraConfig.from_pretrained(folder))["got"] == "no such tensor"


def test_config_of_a_subfolder_is_checked(folder):
    (folder / WEIGHTS).write_bytes(b"")
    lines = raised(lambda: STLoraConfig.from_pretrained(folder.parent, subfolder=folder.name))
    assert str(folder / WEIGHTS) in lines["where"]


@pytest.mark.parametrize("kind", ["stgcn", "shared module", "modules_to_save"])
def test_tensors_that_are_saved_are_those_that_are_expected(tmp_path, kind):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.ModuleDict({"lin": nn.Linear(3, 3)})
            self.two = nn.ModuleDict({"lin": self.one["lin"]})
            self.head, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two["lin"](self.one["lin"](x)))

    backbone = small_backbone("stgcn", 5) if kind == "stgcn" else Twice()
    options = {} if kind == "stgcn" else {"target_modules": ["lin"], "modules_to_save": ["head", "norm"]}
    model = get_peft_model(pristine(backbone), STLoraConfig(num_nodes=7, conditioning="embedding", **options))
    randomised(model).eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pristine(backbone), tmp_path).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_wrong_shape_of_a_module_to_save_is_refused(backbone, tmp_path):
    config = STLoraConfig(num_nodes=7, r=2, target_modules=["lstm"], modules_to_save=["head"])
    get_peft_model(pristine(backbone), config).save_pretrained(tmp_path)
    key = "base_model.model.head.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.zeros(4, 7)}))
    listed = json.loads((tmp_path / CONFIG).read_text())["tensors"]
    edit_config(tmp_path, tensors=listed | {key: [4, 7]})
    lines = refused(backbone, tmp_path)
    assert (lines["expected"], lines["got"]) == (f"'{key}' of shape (4, 6)", "shape (4, 7)")


def test_node_vectors_of_fewer_nodes_are_refused(backbone, tmp_path):
    randomised(get_peft_model(pristine(backbone), STLoraConfig(num_nodes=7))).save_pretrained(tmp_path)
    key = "base_model.model.stlora_nodes.nall_emb"
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key][:6].clone()}))
    lines = refused(backbone, tmp_path)
    assert (lines["expected"], lines["got"]) == (f"shape (7, 16) for '{key}'", "shape (6, 16)")


def test_saved_configuration_starts_a_new_adapter_without_its_tensors(backbone, folder):
    config = STLoraConfig.from_pretrained(folder)
    config.num_nodes, config.node_ids, config.tensors = 9, None, None
    assert call(get_peft_model(pristine(backbone), config), 9).shape == (2, 4, 9, 1)


def test_saving_leaves_the_configuration_of_the_model_as_it_was(backbone, tmp_path):
    model = get_peft_model(pristine(backbone), STLoraConfig(num_nodes=7))
    before = model.peft_config["default"].to_dict()
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].to_dict() == before
