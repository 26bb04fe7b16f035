"""What is in a saved adapter file, and whether it is whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stlora_peft.errors import message
from stlora_peft.files import atomic_write
from stlora_peft.tuner.registration import PREFIX

_WHOLE = "node_bound|predictor"  # containers of modules; the others hold one tensor for each adapter
_OF_ANOTHER_ADAPTER = re.compile(rf"\.{PREFIX}(?:(?:{_WHOLE})\.[^.]+|(?!(?:{_WHOLE})\.)\w+)\.[^.]+$")


def describe_tensors(folder: Path) -> dict[str, list[int]] | None:
    """Shapes of the tensors of the adapter file in ``folder``; None where there is no file."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as content:
        return {key: list(content.get_slice(key).get_shape()) for key in sorted(content.keys())}


def drop_other_adapters(folder: Path) -> None:
    """Take the tensors of other adapters out of the adapter file in ``folder``.

    PEFT before 0.20 writes those of all adapters into the file of each; an adapter's own have lost its name.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as content:
        keys, metadata = list(content.keys()), content.metadata()
        own = [key for key in keys if not _OF_ANOTHER_ADAPTER.search(key)]
        if len(own) == len(keys):
            return
        tensors = {key: content.get_tensor(key) for key in own}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, metadata=metadata)


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
