"""Tiles measured on the GPU at hand: `tune` measures and keeps, `load` puts to use what was kept."""

from .tuner import Tuned, load, tune

__all__ = ["Tuned", "load", "tune"]
