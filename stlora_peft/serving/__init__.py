"""Forecasts of many cities at once, on one backbone."""

from stlora_peft.serving.cities import CityReport, MultiCity

__all__ = ["CityReport", "MultiCity"]
