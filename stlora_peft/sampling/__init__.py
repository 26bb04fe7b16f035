"""Training and evaluation on parts of a large graph, so that memory does not grow with the number of nodes."""

from stlora_peft.sampling.batches import PartBatches, city_parts, core_forecast, evaluate_parts, reestimate_parts
from stlora_peft.sampling.optimizer import RowAdamW, clip_gradients
from stlora_peft.sampling.partition import Neighbourhoods, SubGraph, partition

__all__ = [
    "Neighbourhoods",
    "PartBatches",
    "RowAdamW",
    "SubGraph",
    "city_parts",
    "clip_gradients",
    "core_forecast",
    "evaluate_parts",
    "partition",
    "reestimate_parts",
]
