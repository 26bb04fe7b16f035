"""Reading and writing tensors as safetensors files, never half-written and never pickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from stlora_peft.errors import message
from stlora_peft.files import atomic_write


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the content of a safetensors file.

    Args:
        tensors: Tensors by name, on any device; views of one storage are written apart.

    Example:
        >>> len(tensors_to_bytes({"x": torch.zeros(2)})) > 8
        True
    """
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file, under a temporary name first.

    Args:
        path: Name of the file.
        tensors: Tensors by name.
    """
    content = tensors_to_bytes(tensors)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read tensors from a safetensors file.

    Args:
        path: Name of the file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: If the file is absent.
        ValueError: If it is truncated or damaged, or holds a value that is not finite.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(
            message(f"file '{source}' is missing", expected="a safetensors file", got="nothing", fix="check the path")
        )
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(source.read_bytes())
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            message(
                f"file '{source}' cannot be read",
                expected="a whole safetensors file",
                got=f"{source.stat().st_size} bytes that fail with: {error}",
                fix="copy or save the file again",
            )
        ) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                message(
                    f"tensor '{name}' of file '{source}' is not finite",
                    expected="finite numbers only",
                    got=f"{count} of {tensor.numel()} values are NaN or infinite",
                    fix="train again with a smaller learning rate and save the result",
                )
            )
    return tensors
