from pathlib import Path

import pytest
import torch

from stlora_peft.tensorfiles import load_tensors, save_tensors, tensors_to_bytes


def test_tensors_round_trip_bit_for_bit_and_views_are_written_apart(tmp_path: Path) -> None:
    matrix = torch.randn(3, 4)
    tensors = {"view": matrix[:2], "turned": matrix.T, "count": torch.tensor(3), "half": torch.ones(2).bfloat16()}
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert (tmp_path / "x.safetensors").stat().st_size == len(tensors_to_bytes(tensors))


def test_load_tensors_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors' is missing"):
        load_tensors(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_load_tensors_of_a_truncated_file_names_it(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensors_to_bytes({"x": torch.zeros(9)})[:kept])
    with pytest.raises(ValueError, match="cannot be read") as error:
        load_tensors(path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"file '{path}' cannot be read."
    assert lines[1] == "  expected: a whole safetensors file"
    assert lines[2].startswith(f"  got:      {path.stat().st_size} bytes that fail with: ")
    assert lines[3] == "  to fix:   copy or save the file again"


def test_load_tensors_that_are_not_finite_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(2), "b": torch.tensor([1.0, torch.inf, torch.nan])})
    with pytest.raises(ValueError, match="is not finite") as error:
        load_tensors(path)
    assert str(error.value).splitlines() == [
        f"tensor 'b' of file '{path}' is not finite.",
        "  expected: finite numbers only",
        "  got:      2 of 3 values are NaN or infinite",
        "  to fix:   train again with a smaller learning rate and save the result",
    ]
