"""D2STGNN: what spreads over the roads and what belongs to a node, forecast apart."""

from stlora_peft.backbones.d2stgnn.model import D2STGNN

__all__ = ["D2STGNN"]
