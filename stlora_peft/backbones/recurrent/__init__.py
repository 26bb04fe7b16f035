"""Forecasters around the recurrent classes of torch-geometric-temporal, one file for each family.

Importing this package imports neither torch-geometric nor torch-geometric-temporal; the files in it do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CLASSES: Final[Mapping[str, tuple[str, str]]] = {
    "a3tgcn": ("a3tgcn", "A3TGCNForecaster"),
    "a3tgcn2": ("a3tgcn", "A3TGCN2Forecaster"),
    "agcrn": ("agcrn", "AGCRNForecaster"),
    "batcheddcrnn": ("diffusion", "BatchedDCRNNForecaster"),
    "dcrnn": ("diffusion", "DCRNNForecaster"),
    "dygrencoder": ("dygrencoder", "DyGrEncoderForecaster"),
    "evolvegcnh": ("evolve", "EvolveGCNHForecaster"),
    "evolvegcno": ("evolve", "EvolveGCNOForecaster"),
    "gclstm": ("gconv", "GCLSTMForecaster"),
    "gconvgru": ("gconv", "GConvGRUForecaster"),
    "gconvlstm": ("gconv", "GConvLSTMForecaster"),
    "lrgcn": ("relational", "LRGCNForecaster"),
    "mpnnlstm": ("mpnn_lstm", "MPNNLSTMForecaster"),
    "tgcn": ("tgcn", "TGCNForecaster"),
    "tgcn2": ("tgcn", "TGCN2Forecaster"),
}
"""Name of a backbone to the file of this package and the class in it."""
