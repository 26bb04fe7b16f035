"""Ways to bring a pretrained backbone to another city, each as the model that it would train."""

from __future__ import annotations

from collections.abc import Iterable

from stlora_peft.baselines import BASELINES
from stlora_peft.errors import message
from stlora_peft.methods import trained
from stlora_peft.methods.candidates import (
    DEFAULT_FORM,
    FORMS,
    Build,
    Candidate,
    Method,
    build_adapter,
    calibrated,
    forward_batches,
    frugal,
)
from stlora_peft.tuner.conditioning import CONDITIONINGS

__all__ = [
    "DEFAULT_FORM",
    "FORMS",
    "METHODS",
    "Build",
    "Candidate",
    "Method",
    "build_adapter",
    "calibrated",
    "find_methods",
    "forward_batches",
    "frugal",
]

NODE_VECTORS = {
    "conditioning": "bias",
    "r": 32,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "predictor": None,
    "freeze_backbone": False,
}

METHODS: dict[str, Method] = {
    "zero-shot": Method("the backbone as it is, with the new city's scaler", trained.zero_shot, trained=False),
    "zero-shot+": Method(
        "an adapter whose predictor is fitted to the given days in closed form", trained.zero_shot_plus, trained=False
    ),
    "persistence": Method("the last reading, at every step; no model", trained=False),
    "ha": Method("historical average by time of day", trained=False, baseline=BASELINES["ha"]),
    "var": Method("vector autoregression of all nodes", trained=False, baseline=BASELINES["var"]),
    "svr": Method("linear support vector regression of each node", trained=False, baseline=BASELINES["svr"]),
    "scratch": Method("train a new backbone on the city alone", trained.scratch),
    "head": Method("train the layers that make the forecast from the last hidden state", trained.head),
    "norm": Method("train normalisation layers and biases", trained.norm),
    "full": Method("train every parameter", trained.full),
    "ia3": Method("train a factor for each output of the adapted layers, PEFT's IA3", trained.ia3),
    "dora": Method("train low-rank updates of directions and a length for each output, PEFT's DoRA", trained.dora),
    "lora": Method("train low-rank updates that all nodes share", trained.lora),
    "node-embedding": Method("train a free vector for each node, added to the input", trained.node_embedding),
    "node-prompt": Method("train a low-rank prompt for each node, added to the input's values", trained.node_prompt),
    "full+node-embedding": Method(
        "train every parameter, and a vector for each node behind every target layer",
        trained.adapter(**NODE_VECTORS),
    ),
    "st-lora": Method("train node-conditioned low-rank updates and the node-specific predictor", trained.adapter()),
    "full+st-lora": Method(
        "the same, and train the backbone too: what freezing costs", trained.adapter(freeze_backbone=False)
    ),
}
"""Methods by name. Every trained method re-estimates and trains the modules that are bound to the number of nodes."""

for form in (form for form in CONDITIONINGS if form != "shared"):
    METHODS[f"st-lora-{form}"] = Method(f"st-lora in the form '{form}'", trained.adapter(conditioning=form))
    METHODS[f"st-lora-{form}-layers"] = Method(
        "the same without the predictor", trained.adapter(conditioning=form, predictor=None)
    )
METHODS["st-lora-frugal"] = Method("a small adapter: rank 1, few numbers for each node", trained.frugal_adapter)
METHODS["st-lora-auto"] = Method("st-lora in the form that is best on held-out days", trained.auto, chooses=True)
METHODS["st-lora-predictor"] = Method("the node-specific predictor alone", trained.adapter(target_modules=[]))


def find_methods(names: Iterable[str]) -> dict[str, Method]:
    """Look methods up.

    Args:
        names: Names of :data:`METHODS`.

    Returns:
        The methods by name, in the order given.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> list(find_methods(["full", "st-lora"]))
        ['full', 'st-lora']
    """
    names = list(names)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(
            message(
                "unknown method" if unknown else "no method was given",
                expected=f"names of {', '.join(METHODS)}",
                got=", ".join(unknown) or "none",
                fix="correct the list of methods",
            )
        )
    return {name: METHODS[name] for name in names}
