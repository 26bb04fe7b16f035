"""Node-conditioned low-rank adapters for spatio-temporal graph networks, as a tuner for Hugging Face PEFT.

Importing this package registers the adapter type ``STLORA`` with PEFT.
"""

from importlib.metadata import PackageNotFoundError, version

from stlora_peft.acceleration import accelerate, decelerate
from stlora_peft.serving import MultiCity
from stlora_peft.tuner.calibration import calibrate
from stlora_peft.tuner.config import PredictorConfig, STLoraConfig
from stlora_peft.tuner.hosts import register_host_layer
from stlora_peft.tuner.identity import check_nodes, fingerprint
from stlora_peft.tuner.model import STLoraModel
from stlora_peft.tuner.node_bound import rebuild
from stlora_peft.tuner.probe import find_layouts
from stlora_peft.tuner.reestimation import reestimate
from stlora_peft.tuner.registration import register
from stlora_peft.tuner.spec import BackboneSpec
from stlora_peft.tuner.subset import node_subset

try:
    __version__ = version("stlora-peft")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BackboneSpec",
    "MultiCity",
    "PredictorConfig",
    "STLoraConfig",
    "STLoraModel",
    "accelerate",
    "calibrate",
    "check_nodes",
    "decelerate",
    "find_layouts",
    "fingerprint",
    "node_subset",
    "rebuild",
    "reestimate",
    "register_host_layer",
]

register(STLoraConfig, STLoraModel)
