import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_city import small_data
from torch import nn

from stlora_peft.backbones import build_backbone
from stlora_peft.checkpoints import newest_checkpoint, signature, trainable_state
from stlora_peft.data import CityData
from stlora_peft.training import TrainingOptions, train

OPTIONS = TrainingOptions(max_epochs=1, progress=False)


@pytest.fixture(scope="module")
def data() -> CityData:
    return small_data()


def lora() -> nn.Module:
    torch.manual_seed(0)
    backbone = build_backbone("lstm", in_channels=3, hidden_size=4)
    return get_peft_model(backbone, LoraConfig(r=2, target_modules=["head"]))


def test_checkpoint_of_an_adapter_holds_the_adapter_only(data: CityData, tmp_path: Path) -> None:
    train(lora(), data, OPTIONS, output_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    for name in ("state", "average", "best"):
        keys = set(load_file(folder / f"{name}.safetensors"))
        assert keys == {f"base_model.model.head.lora_{letter}.default.weight" for letter in "AB"}
    assert json.loads((folder / "progress.json").read_text())["best_epoch"] == 1


def test_checkpoint_holds_no_pickled_arguments(data: CityData, tmp_path: Path) -> None:
    train(lora(), data, OPTIONS, output_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    binary = {path.name for path in folder.iterdir() if path.suffix not in (".json", ".safetensors")}
    assert binary == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name in binary - {"rng_state.pth"}:
        torch.load(folder / name, weights_only=True)


def test_newest_checkpoint_skips_one_that_was_not_finished(tmp_path: Path) -> None:
    for step, content in ((9, "{}"), (10, "{}"), (100, '{"epoch": 1.'), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_newest_checkpoint_of_no_folder_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None


def test_signature_sees_a_change_of_frozen_values(data: CityData) -> None:
    one, other = lora(), lora()
    assert signature(one, data, OPTIONS) == signature(other, data, OPTIONS)
    with torch.no_grad():
        other.base_model.model.lstm.weight_hh_l0[0, 0] += 1e-3
    before, after = signature(one, data, OPTIONS), signature(other, data, OPTIONS)
    assert {key for key in before if before[key] != after[key]} == {"frozen weights"}


def test_trainable_state_is_trainable_parameters_and_saved_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    names = ["0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(trainable_state(model)) == names
