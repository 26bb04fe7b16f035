"""Cities: readings, graphs, files, windows, splits and a simulator."""

from stlora_peft.data.city import City
from stlora_peft.data.readers import load_city
from stlora_peft.data.scaling import Scaler
from stlora_peft.data.signals import from_signal
from stlora_peft.data.simulator import simulate_city
from stlora_peft.data.splits import CityData, Split, adaptation_split, prepare, pretraining_split
from stlora_peft.data.windows import Windows, time_encoding

__all__ = [
    "City",
    "CityData",
    "Scaler",
    "Split",
    "Windows",
    "adaptation_split",
    "from_signal",
    "load_city",
    "prepare",
    "pretraining_split",
    "simulate_city",
    "time_encoding",
]
