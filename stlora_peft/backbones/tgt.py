"""The only place that imports torch-geometric-temporal.

Version 0.56.2 imports ``torch_sparse`` for one name that stands in a type annotation, and declares
``torch-sparse`` and ``torch-scatter``, which compile from source, as requirements. It is therefore installed with
``--no-deps``, and where ``torch_sparse`` is absent PyG's own placeholder of ``SparseTensor`` takes its place for as
long as the import runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from stlora_peft.errors import message

_PACKAGE = "torch_geometric_temporal"
INSTALL = {
    "torch_geometric": "pip install torch-geometric",
    _PACKAGE: "pip install --no-deps torch-geometric-temporal==0.56.2",
}


def load() -> ModuleType:
    """Import torch-geometric-temporal, also where ``torch_sparse`` is not installed.

    A ``torch_sparse`` that is installed is used as it is. When this function has returned, the ordinary
    ``from torch_geometric_temporal.nn.recurrent import TGCN2`` works too. An import that fails leaves nothing behind
    in ``sys.modules``.

    Returns:
        The package ``torch_geometric_temporal``.

    Raises:
        ImportError: If torch-geometric, torch-geometric-temporal or something that they need cannot be imported.

    Example:
        >>> load().nn.STConv.__name__
        'STConv'
    """
    loaded = sys.modules.get(_PACKAGE)
    if loaded is not None:
        return loaded
    before = set(sys.modules)
    try:
        with _torch_sparse():
            return importlib.import_module(_PACKAGE)
    except Exception as error:  # a binary that does not fit torch raises OSError or RuntimeError, not ImportError
        for name in set(sys.modules) - before:
            if name == _PACKAGE or name.startswith(f"{_PACKAGE}."):
                del sys.modules[name]
        raise import_error(error) from error


@contextmanager
def _torch_sparse() -> Iterator[None]:
    """Provide ``torch_sparse.SparseTensor`` while torch-geometric-temporal is imported, if nothing else does."""
    name = "torch_sparse"
    if sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None:
        yield
        return
    stand_in = ModuleType(name, "Placeholder of torch_sparse, taken from torch_geometric.typing.")
    stand_in.__dict__["SparseTensor"] = importlib.import_module("torch_geometric.typing").SparseTensor
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


def import_error(error: Exception) -> ImportError:
    """Say which package is missing or broken and how to install it.

    Args:
        error: What its import raised.
    """
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None:
        root = missing.partition(".")[0]
        fix, got = INSTALL.get(root, f"pip install {root}"), f"no module named '{missing}'"
        if root in INSTALL:
            fix += " (the tuner itself works without it, on any backbone of your own)"
    else:
        fix = "install releases of torch, torch-geometric and torch-sparse that fit together"
        got = f"{type(error).__name__}: {error}"
    text = message(
        "torch-geometric-temporal cannot be imported",
        expected="torch-geometric and torch-geometric-temporal 0.56.2, which this backbone is made of",
        got=got,
        fix=fix,
    )
    return ImportError(text, name=missing or _PACKAGE)
