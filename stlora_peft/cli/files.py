"""Lists that a user types, and where a command may write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stlora_peft.errors import message

Number = TypeVar("Number", int, float)


def read_list(option: str, text: str, kind: Callable[[str], Number], *, unique: bool = True) -> list[Number]:
    """Read numbers between commas.

    Args:
        option: Name of the option, for the error.
        text: What the user wrote.
        kind: ``int`` or ``float``.
        unique: Leave repetitions out.

    Returns:
        The numbers.

    Raises:
        ValueError: If it is no such list.

    Example:
        >>> read_list("--seeds", "0, 1,2", int)
        [0, 1, 2]
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            message(
                f"option '{option}' cannot be read",
                expected="whole numbers between commas" if kind is int else "numbers between commas",
                got=repr(text),
                fix="write for instance 0,1,2" if kind is int else "write for instance 0.001,0.003",
            )
        ) from error
    return list(dict.fromkeys(numbers)) if unique else numbers


def check_new(path: Path, force: bool) -> None:
    """Refuse to overwrite a result that nobody said may go.

    Args:
        path: File that a command is about to write.
        force: The user's ``--force``.

    Raises:
        ValueError: If something lies there.
    """
    if path.exists() and not force:
        raise ValueError(
            message(
                f"'{path}' exists already",
                expected="a new place for the result",
                got="a folder" if path.is_dir() else f"a file of {path.stat().st_size} bytes",
                fix="give another --out, or --force to overwrite it",
            )
        )


def check_adapter_folder(folder: Path, force: bool) -> None:
    """Refuse a folder for a new adapter before hours of training, as ``save_adapter`` would after them.

    Args:
        folder: Where the adapter is to lie.
        force: The user's ``--force``, which may replace an adapter but nothing else.

    Raises:
        ValueError: If something lies there that may not go.
    """
    from stlora_peft.storage import ADAPTER_CONFIG

    is_adapter = (folder / ADAPTER_CONFIG).exists()
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not (is_free or (is_adapter and force)):
        raise ValueError(
            message(
                f"'{folder}' exists already",
                expected="a new or empty folder for the adapter",
                got="an adapter" if is_adapter else "something that is no adapter",
                fix="give another --out" + (", or --force to overwrite it" if is_adapter else ""),
            )
        )
