"""What is in a saved adapter file, and whether it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from stlora_peft.errors import message


def describe_tensors(folder: Path) -> dict[str, list[int]] | None:
    """Shapes of the tensors of the adapter file in ``folder``; None where there is no file."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as content:
        return {key: list(content.get_slice(key).get_shape()) for key in sorted(content.keys())}


def check_adapter_file(folder: Path, tensors: Mapping[str, list[int]]) -> None:
    """Raise unless the adapter file holds the tensors that its configuration lists, all finite.

    Args:
        folder: Folder of the adapter.
        tensors: Expected shape of each tensor.

    Raises:
        ValueError: Naming the file and the first tensor that is wrong.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(file, framework="pt") as content:
            found = {key: content.get_tensor(key) for key in content.keys()}
    except (SafetensorError, OSError) as error:
        _refuse(file, "a whole safetensors file", f"a file that cannot be read ({error})")
    for key in sorted({*tensors, *found}):
        if key not in found:
            _refuse(file, f"a tensor '{key}' of shape {tuple(tensors[key])}", "no such tensor")
        if key not in tensors:
            _refuse(file, "the tensors that adapter_config.json lists", f"a further tensor '{key}'")
        value = found[key]
        if list(value.shape) != list(tensors[key]):
            _refuse(file, f"shape {tuple(tensors[key])} for '{key}'", f"shape {tuple(value.shape)}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            _refuse(file, f"finite values in '{key}'", "NaN or infinity")


def _refuse(file: Path, expected: str, got: str) -> None:
    raise ValueError(
        message(
            f"adapter file '{file}' cannot be used",
            expected=expected,
            got=got,
            fix="save the adapter again, or copy the whole folder from where it was trained",
        )
    )
