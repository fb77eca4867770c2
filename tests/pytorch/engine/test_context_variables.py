"""Context variables: a recompute finds those of forward, and what they collect keeps no bytes."""

from __future__ import annotations

import contextvars
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpuckpt
from tests.pytorch.steps import Layer, batch, gradients

COLLECTED: contextvars.ContextVar[Any] = contextvars.ContextVar("collected", default=None)
SCALE: contextvars.ContextVar[Any] = contextvars.ContextVar("scale", default=1.0)


class Outputs:
    """An object that collects."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


def into_dict(out: Tensor) -> None:
    COLLECTED.get()["hidden"].append(out)


def into_object(out: Tensor) -> None:
    COLLECTED.get().seen.append(out)


def into_list(out: Tensor) -> None:
    COLLECTED.get().append(out)


class Collecting(nn.Module):
    """Hands the hidden states of its blocks to whoever collects them, and adds a loss of them, as libraries do for routers."""

    def __init__(self, make: Callable[[], Any], put: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(4))
        self.make, self.put = make, put
        for block in self.blocks:
            block.register_forward_hook(
                lambda module, args, out: self.put(out) if COLLECTED.get() is not None else None
            )

    def forward(self, x: Tensor) -> Tensor:
        token = COLLECTED.set(self.make())
        for block in self.blocks:
            x = block(x)
        found = COLLECTED.get()
        COLLECTED.reset(token)
        hidden = found["hidden"] if isinstance(found, dict) else getattr(found, "seen", found)
        return x.square().mean() + sum(each.abs().mean() for each in hidden)


@pytest.mark.parametrize(
    ("make", "put"),
    [(lambda: defaultdict(list), into_dict), (list, into_list), (Outputs, into_object)],
    ids=["dict", "list", "object"],
)
def test_what_collects_outputs_keeps_no_bytes(make, put) -> None:
    torch.manual_seed(0)
    model, x = Collecting(make, put), batch(32)
    expected = gradients(model, lambda: model(x))
    for share in ("45%", "60%", "100%"):
        fitted = gpuckpt.fit(model, x, share, repeats=1)
        for _ in range(3):
            assert gradients(model, lambda fitted=fitted: fitted(x)) == expected
            assert fitted.budget.used_bytes == 0
        fitted.unfit()


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
