"""The zoo's architectures by name: how each is built, and what is known of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn

__all__ = ["ZOO", "Architecture", "architecture", "images", "padded_text", "text", "tokens"]

VOCABULARY = 128
SKIPPED = "LayerDrop skips layers"
Built = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """`build`: a model and the keyword arguments of a call that returns its loss. `least`: the smallest budget is at most this
    share of what a plain step saves. `fast`: part of `make test`. `varies`: why steps of equal sizes save different bytes. `gap`:
    why the promise is not yet exact."""

    name: str
    build: Callable[[], Built]
    least: float
    fast: bool = False
    varies: str | None = None
    gap: str | None = None


ZOO: dict[str, Architecture] = {}


def architecture(least: float, **known: Any) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Enter what a function builds into the zoo, under the function's name. `known`: other fields of `Architecture`."""

    def enter(build: Callable[[], Built]) -> Callable[[], Built]:
        ZOO[build.__name__] = Architecture(build.__name__, build, least, **known)
        return build

    return enter


def tokens(batch: int = 2, length: int = 24, top: int = VOCABULARY, seed: int = 5) -> Tensor:
    return torch.randint(3, top, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(batch: int = 2, length: int = 24) -> dict[str, Tensor]:
    """Tokens, and the same as labels."""
    found = tokens(batch, length)
    return {"input_ids": found, "attention_mask": torch.ones_like(found), "labels": found.clone()}


def padded_text(batch: int = 2, length: int = 24) -> dict[str, Tensor]:
    """`text` of sequences of different lengths: padding is masked, and no label."""
    batch_of = text(batch, length)
    for row in range(batch):
        batch_of["attention_mask"][row, length - 5 * row :] = 0
    batch_of["labels"][batch_of["attention_mask"] == 0] = -100
    return batch_of


def images(batch: int = 2, size: int = 32, channels: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))
