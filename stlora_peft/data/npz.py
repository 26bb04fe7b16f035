"""Reading of array files, without anything pickled."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stlora_peft.errors import message

# What numpy and zipfile raise on damaged files and on pickled arrays. AttributeError: a bare .npy array has no keys.
UNREADABLE = (ValueError, OSError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error)


def read_npz(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    """Read every array of an ``.npz`` file, refusing pickled ones."""
    require_file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            message(
                f"{file_label(path)} cannot be read",
                expected="a whole .npz file of arrays of numbers and text",
                got=str(error).splitlines()[0] if str(error) else type(error).__name__,
                fix="copy or download the file again; arrays of Python objects must be converted before",
            )
        ) from error


def require_file(path: str | os.PathLike[str]) -> None:
    """Raise where there is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            message(f"{file_label(path)} is missing", expected="a file", got="nothing", fix="check the path")
        )


def file_label(path: str | os.PathLike[str]) -> str:
    """How messages call a file of a city."""
    return f"city file '{os.fspath(path)}'"
