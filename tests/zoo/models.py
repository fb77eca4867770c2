"""All of the zoo."""

from __future__ import annotations

from tests.zoo import by_hand, encoders, language, vision
from tests.zoo.registry import ZOO, Architecture

__all__ = ["ZOO", "Architecture", "by_hand", "encoders", "language", "vision"]
