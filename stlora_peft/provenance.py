"""Where numbers come from: versions, machine and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("stlora-peft", "peft", "torch", "transformers", "torch-geometric", "torch-geometric-temporal", "numpy")


def environment(rows: Iterable[Mapping[str, Any]] = ()) -> dict[str, str]:
    """Return what the numbers were made with: versions, machine, and the commit where the code lies in git.

    Args:
        rows: What was measured, maybe earlier: the commits are those that the rows note, not the present one.

    Example:
        >>> environment([{"commit": "2b"}, {"commit": "1a"}, {}])["commit"]
        '1a, 2b, not noted'
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    commits = {row.get("commit") for row in rows} or {source_commit()}
    named = ", ".join(sorted(commit or "not noted" for commit in commits))
    return found | ({} if commits == {None} else {"commit": named})


def source_commit(folder: Path = Path(__file__).parent) -> str | None:
    """Return the git commit of the source code, or None where it is not in git.

    Args:
        folder: Folder of the code.

    Returns:
        The commit, with ``+ changes`` where the files differ from it.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}{' + changes' if changed else ''}"


def _git(folder: Path, *words: str) -> str:
    """Run git in a folder."""
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
