"""What the frozen part of a model computes, kept for every window instead of computed at every pass."""

from stlora_peft.frozen.activations import MEMORY_LIMIT, FrozenActivations

__all__ = ["MEMORY_LIMIT", "FrozenActivations"]
