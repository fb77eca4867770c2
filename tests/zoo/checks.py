"""A fitted architecture beside a plain copy, under several budgets."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from gpuckpt import fit
from gpuckpt.pytorch.fitted import Fitted
from tests.pytorch.beside_plain import Trained, assert_same, plain_peak_bytes, train_step
from tests.zoo.registry import Architecture

__all__ = ["Case", "Ticks", "prepared"]

_SEEDS = (0, 1)
"""Of the steps. The first is the one that models are measured with: the same contents, the same random numbers."""


class Ticks:
    """A clock by which everything takes equally long: plans do not depend on how busy the machine is."""

    exact = False  # samples are run as often as by a clock of seconds

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        self.seconds += 1e-3
        return self.seconds


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@dataclass
class Case:
    """What a plain run of an architecture does."""

    architecture: Architecture
    model: nn.Module
    inputs: dict[str, Any]
    peak_bytes: int
    smallest_bytes: int
    steps: list[Trained]
    inexact: list[str] = field(default_factory=list)  # promises that were not what was measured

    def check(self, share: float | None) -> None:
        """Train a copy under a share of the plain peak (None: the smallest budget): the same losses, gradients and buffers to the
        bit, within the cap. Whether it was as promised is noted."""
        budget_bytes = self.smallest_bytes if share is None else int(share * self.peak_bytes)
        model = copy.deepcopy(self.model)
        fitted = fitted_from(model, self.inputs, budget_bytes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        for seed, expected in zip(_SEEDS, self.steps, strict=True):
            assert_same(trained(model, self.inputs, optimizer, seed), expected)
            assert fitted.budget.used_bytes == 0
            assert fitted.budget.peak_bytes <= budget_bytes
            promised, measured = fitted.plan.certificate.peak_bytes, fitted.measured_peak_bytes
            if seed == _SEEDS[0] or self.architecture.varies is None:
                exact = measured == promised == fitted.promised_peak_bytes <= budget_bytes and not fitted.deviations
                if not exact:
                    self.inexact.append(f"under {budget_bytes}: {promised} promised, {measured} measured")
        assert share is None or fitted.plan.certificate.recompute_s > 0, "a plain run fits"


def trained(model: nn.Module, inputs: dict[str, Any], optimizer: torch.optim.Optimizer, seed: int) -> Trained:
    seed_all(seed)
    return train_step(model, (), inputs, optimizer, seed)


def fitted_from(model: nn.Module, inputs: dict[str, Any], budget_bytes: int) -> Fitted:
    seed_all(_SEEDS[0])
    return fit(model, inputs, budget_bytes, repeats=1)


def prepared(architecture: Architecture) -> Case:
    """Build, run plainly, and find out the smallest budget."""
    seed_all(0)
    model, inputs = architecture.build()
    model.train()
    seed_all(_SEEDS[0])
    peak_bytes = plain_peak_bytes(model, (), inputs)
    smallest_bytes = fitted_from(copy.deepcopy(model), inputs, peak_bytes).plan.certificate.smallest_budget_bytes
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.5)
    steps = [trained(plain, inputs, optimizer, seed) for seed in _SEEDS]
    return Case(architecture, model, inputs, peak_bytes, smallest_bytes, steps)
