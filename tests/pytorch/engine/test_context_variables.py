"""Context variables: a recompute finds those of forward. That what they collect keeps no bytes is seen on the zoo's Mixtral."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import gpuckpt

SCALE: contextvars.ContextVar[Any] = contextvars.ContextVar("scale", default=1.0)


class Config:
    def __init__(self, scale: float) -> None:
        self.scale = scale


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (3.0, lambda value: value),
        ({"scale": 3.0}, lambda value: value["scale"]),
        ([1.0, 3.0], lambda value: value[-1]),
        (Config(3.0), lambda value: value.scale),
        (torch.tensor(3.0), float),
    ],
    ids=["number", "dict", "list", "object", "tensor"],
)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in another thread"])
def test_a_recompute_finds_what_forward_found(value, read, elsewhere) -> None:
    def work(x: Tensor) -> Tensor:
        return (x * x * read(SCALE.get())).sin()

    x = torch.linspace(0, 1, 5, requires_grad=True)
    token = SCALE.set(value)
    y = gpuckpt.checkpoint(work, x)
    (expected,) = torch.autograd.grad(work(x).sum(), x)
    SCALE.reset(token)
    SCALE.set({"scale": 7.0} if isinstance(value, dict) else [7.0] if isinstance(value, list) else torch.tensor(7.0))
    try:
        found: list[Tensor] = []
        run = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y.sum(), x)))
        if elsewhere:
            run.start()
            run.join()
        else:
            run.run()
    finally:
        SCALE.set(1.0)
    assert torch.equal(found[0], expected)
