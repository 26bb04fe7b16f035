"""Fast versions of the graph layers of PyG and torch-geometric-temporal, put in place of a network's own.

Importing this package imports neither of them.
"""

from stlora_peft.acceleration.layers import Acceleration, accelerate, decelerate

__all__ = ["Acceleration", "accelerate", "decelerate"]
