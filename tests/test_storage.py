import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_city import small_city, small_data
from torch import nn

from stlora_peft.backbones import Forecaster, build_backbone
from stlora_peft.data import City, Scaler
from stlora_peft.methods import build_adapter
from stlora_peft.storage import load_adapter, load_backbone, save_adapter, save_backbone

SCALER = Scaler(mean=(50.5,), std=(9.25,))


def stgcn(num_nodes: int = 3) -> Forecaster:
    torch.manual_seed(0)
    return build_backbone("stgcn", num_nodes=num_nodes, in_channels=3, hidden_channels=4, head_channels=4).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_backbone(tmp_path / "base", stgcn(), scaler=SCALER, city="la", quantity="speed", time_features="day")
    return tmp_path / "base"


def forecast(model: nn.Module, city: City) -> torch.Tensor:
    data = small_data(city)
    x = data.train.__getitems__([0, 1])["x"]
    with torch.no_grad():
        return model.eval()(x, data.edge_index, data.edge_weight)


def trained_adapter(city: City) -> PeftModel:
    model = build_adapter(stgcn(), small_data(city))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_backbone_round_trip_is_bit_identical_and_keeps_what_is_known(folder: Path) -> None:
    saved, city = load_backbone(folder), small_city(num_nodes=3)
    assert torch.equal(forecast(saved.backbone, city), forecast(stgcn(), city))
    assert saved.scaler == SCALER
    assert (saved.city, saved.quantity, saved.time_features) == ("la", "speed", "day")
    assert saved.backbone.hyperparameters == stgcn().hyperparameters
    assert not saved.backbone.training
    assert saved.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert sorted(path.name for path in folder.iterdir()) == ["backbone.json", "backbone.safetensors"]


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        known = json.loads((folder / "backbone.json").read_text())
        change(known)
        (folder / "backbone.json").write_text(json.dumps(known))

    return damage


def _rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "backbone.safetensors")
        change(tensors)
        save_file(tensors, folder / "backbone.safetensors")

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "json missing": (lambda f: (f / "backbone.json").unlink(), "backbone.json' is missing", "a JSON file"),
    "weights missing": (
        lambda f: (f / "backbone.safetensors").unlink(),
        "backbone.safetensors' is missing",
        "a safetensors file",
    ),
    "weights truncated": (
        lambda f: (f / "backbone.safetensors").write_bytes((f / "backbone.safetensors").read_bytes()[:-5]),
        "backbone.safetensors' cannot be read",
        "a whole safetensors file",
    ),
    "json damaged": (lambda f: (f / "backbone.json").write_text("{"), "backbone.json' cannot be read", "JSON text"),
    "json of another kind": (
        lambda f: (f / "backbone.json").write_text("[]"),
        "backbone.json' cannot be used",
        "a description of format 1",
    ),
    "other format": (
        _edit(lambda known: known.update(format=9)),
        "backbone.json' cannot be used",
        "a description of format 1",
    ),
    "no scaler": (_edit(lambda known: known.pop("scaler")), "backbone.json' cannot be used", "the keys "),
    "unknown backbone": (
        _edit(lambda known: known.update(name="mlp")),
        "backbone.json' cannot be used",
        "the description of a backbone of this version",
    ),
    "unknown argument": (
        _edit(lambda known: known["hyperparameters"].update(depth=3)),
        "backbone.json' cannot be used",
        "the description of a backbone of this version",
    ),
    "other shape": (
        _edit(lambda known: known["hyperparameters"].update(num_nodes=4)),
        "backbone.safetensors' cannot be used",
        "tensor 'block1._batch_norm.bias' of shape (4,)",
    ),
    "tensor missing": (
        _rewrite(lambda tensors: tensors.pop("head.output.bias")),
        "backbone.safetensors' cannot be used",
        "tensor 'head.output.bias' of shape (12,)",
    ),
    "further tensor": (
        _rewrite(lambda tensors: tensors.update(more=torch.zeros(1))),
        "backbone.safetensors' cannot be used",
        "no tensor 'more'",
    ),
    "not finite": (
        _rewrite(lambda tensors: tensors["head.output.bias"].fill_(torch.nan)),
        "tensor 'head.output.bias' of file",
        "finite numbers only",
    ),
    "other values": (
        _rewrite(lambda tensors: tensors["head.output.bias"].add_(1)),
        "backbone.safetensors' cannot be used",
        "weights with the fingerprint ",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_load_backbone_of_a_damaged_folder_names_file_and_problem(folder: Path, case: str) -> None:
    damage, where, expected = DAMAGE[case]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_backbone(folder)
    lines = str(error.value).splitlines()
    assert where in lines[0]
    assert lines[1].startswith(f"  expected: {expected}")
    assert "  got:      " in str(error.value)
    assert lines[-1].startswith("  to fix:   ")


def test_adapter_round_trip_into_the_pristine_backbone_is_bit_identical(tmp_path: Path) -> None:
    city = small_city(num_nodes=5)
    model = trained_adapter(city)
    save_adapter(tmp_path / "adapter", model)
    pristine = stgcn()
    loaded = load_adapter(pristine, tmp_path / "adapter", city)
    assert torch.equal(forecast(loaded, city), forecast(model, city))
    assert not loaded.training
    for one, other in zip(pristine.state_dict().values(), stgcn().state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_save_adapter_leaves_only_the_adapter_folder(tmp_path: Path) -> None:
    save_adapter(tmp_path / "deep" / "adapter", trained_adapter(small_city(num_nodes=5)))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["adapter"]
    names = {path.name for path in (tmp_path / "deep" / "adapter").iterdir()}
    assert names - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors"}


def test_save_adapter_replaces_an_adapter_and_keeps_other_files(tmp_path: Path) -> None:
    city = small_city(num_nodes=5)
    save_adapter(tmp_path / "adapter", trained_adapter(city))
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    model = trained_adapter(city)
    save_adapter(tmp_path / "adapter", model)
    assert torch.equal(forecast(load_adapter(stgcn(), tmp_path / "adapter"), city), forecast(model, city))
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_save_adapter_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    city = small_city(num_nodes=5)
    model = trained_adapter(city)
    save_adapter(tmp_path / "adapter", model)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(tmp_path / "adapter", trained_adapter(city))
    monkeypatch.undo()
    assert torch.equal(forecast(load_adapter(stgcn(), tmp_path / "adapter"), city), forecast(model, city))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_save_adapter_of_a_named_adapter_writes_the_same_layout(tmp_path: Path) -> None:
    city = small_city(num_nodes=5)
    model = trained_adapter(city)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    save_adapter(tmp_path / "adapter", model)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert torch.equal(forecast(load_adapter(stgcn(), tmp_path / "adapter"), city), forecast(model, city))


def test_save_adapter_over_something_else_raises(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not overwritten") as error:
        save_adapter(tmp_path, trained_adapter(small_city(num_nodes=5)))
    assert str(error.value).splitlines() == [
        f"folder '{tmp_path}' is not an adapter and is not overwritten.",
        "  expected: a new or empty folder, or one with 'adapter_config.json' in it",
        "  got:      a folder with other files",
        "  to fix:   give another folder",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_load_adapter_without_files_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no adapter in folder") as error:
        load_adapter(stgcn(), tmp_path)
    assert str(error.value).splitlines()[2] == "  got:      no file 'adapter_config.json'"


def test_load_adapter_that_is_truncated_names_the_file(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", trained_adapter(small_city(num_nodes=5)))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors' cannot be read"):
        load_adapter(stgcn(), tmp_path / "adapter")


def test_load_adapter_for_other_nodes_names_both_sides(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", trained_adapter(small_city(num_nodes=5)))
    with pytest.raises(ValueError, match="belongs to other nodes") as error:
        load_adapter(stgcn(), tmp_path / "adapter", small_city(num_nodes=4))
    assert "expected: 5 nodes" in str(error.value)
    assert "got:      4 nodes" in str(error.value)


def test_load_adapter_on_another_backbone_raises(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", trained_adapter(small_city(num_nodes=5)))
    other = stgcn()
    with torch.no_grad():
        other.head.output.bias += 1
    with pytest.raises(ValueError, match="belongs to another backbone"):
        load_adapter(other, tmp_path / "adapter")
