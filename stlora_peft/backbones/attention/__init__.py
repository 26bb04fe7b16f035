"""Forecasters around the attention family of torch-geometric-temporal, one file for each class.

Importing this package imports neither torch-geometric nor torch-geometric-temporal; the files in it do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CLASSES: Final[Mapping[str, tuple[str, str]]] = {
    "aagcn": ("aagcn", "AAGCN"),
    "astgcn": ("astgcn", "ASTGCN"),
    "dnntsp": ("dnntsp", "DNNTSP"),
    "gman": ("gman", "GMAN"),
    "mstgcn": ("mstgcn", "MSTGCN"),
    "mtgnn": ("mtgnn", "MTGNN"),
}
"""Name of a backbone to the file of this package and the class in it."""
