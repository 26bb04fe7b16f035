"""The table of ST-LoRA's paper on any cities: baselines, each backbone, and each backbone with an adapter."""

from stlora_peft.table.plan import BASELINES, PAPER_BACKBONES, PAPER_SIZES, REGIMES, SMALL_SIZES, Plan
from stlora_peft.table.runs import make_table

__all__ = ["BASELINES", "PAPER_BACKBONES", "PAPER_SIZES", "REGIMES", "SMALL_SIZES", "Plan", "make_table"]
