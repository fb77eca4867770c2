"""What work reaches through helpers, classes, other modules and functions in attributes; and state that is carried on."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import CheckpointBudget, RecomputeMismatch, checkpoint, fit
from tests.pytorch.engine import settings_elsewhere
from tests.pytorch.steps import HOLDS, Layer, batch, bits

RATE = 1.0
LOSSES: list[Tensor] = []
COUNTS = {"calls": 0}
CONTEXT = contextvars.ContextVar("rate", default=1.0)
OF_THREAD = threading.local()


class Config:
    """Settings as attributes of a class that nobody makes an instance of."""

    rate = 1.0


class Schedule:
    def __init__(self) -> None:
        self.rate = 1.0

    def now(self) -> float:
        return self.rate


SCHEDULE = Schedule()


def scaled(x: Tensor) -> Tensor:
    return x * RATE


def temperature() -> float:
    return SCHEDULE.now()


class Scaled(Layer):
    """`rate()` says by how much; it is looked up in ways that differ."""

    schedule = Schedule()

    def __init__(self, rate: Any = None) -> None:
        super().__init__()
        self.rate = rate

    def scale(self, x: Tensor) -> Tensor:
        return x * self.rate()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.scale(x))


class OfClass(Scaled):
    def scale(self, x: Tensor) -> Tensor:
        return x * Config.rate


class ByHelper(Scaled):
    def scale(self, x: Tensor) -> Tensor:
        return scaled(x)


class ByObject(Scaled):
    def scale(self, x: Tensor) -> Tensor:
        return x * temperature()


class OfModule(Scaled):
    def scale(self, x: Tensor) -> Tensor:
        return settings_elsewhere.scaled(x)


class OfClassAttribute(Scaled):
    def scale(self, x: Tensor) -> Tensor:
        return x * self.schedule.rate


class OfContext(Scaled):
    def scale(self, x: Tensor) -> Tensor:
        return x * CONTEXT.get()


class OfThread(Scaled):
    def scale(self, x: Tensor) -> Tensor:
        return x * OF_THREAD.rate


def set_global(rate: float) -> None:
    global RATE
    RATE = rate


def of_a_variable() -> tuple[Callable[[], nn.Module], Callable[[float], Any]]:
    rates = [1.0]

    class Closing(Scaled):
        def scale(self, x: Tensor) -> Tensor:
            return x * rates[0]

    return Closing, lambda rate: rates.__setitem__(0, rate)


def of_a_function() -> tuple[Callable[[], nn.Module], Callable[[float], Any]]:
    rates = [1.0]
    return lambda: Scaled(lambda: rates[0]), lambda rate: rates.__setitem__(0, rate)


def of_a_method() -> tuple[Callable[[], nn.Module], Callable[[float], Any]]:
    schedule = Schedule()
    return lambda: Scaled(schedule.now), lambda rate: setattr(schedule, "rate", rate)


def of_a_partial() -> tuple[Callable[[], nn.Module], Callable[[float], Any]]:
    schedule = Schedule()
    return lambda: Scaled(functools.partial(Schedule.now, schedule)), lambda rate: setattr(schedule, "rate", rate)


WAYS: dict[str, Callable[[], tuple[Callable[[], nn.Module], Callable[[float], Any]]]] = {
    "class": lambda: (OfClass, lambda rate: setattr(Config, "rate", rate)),
    "helper": lambda: (ByHelper, set_global),
    "object": lambda: (ByObject, lambda rate: setattr(SCHEDULE, "rate", rate)),
    "module": lambda: (OfModule, lambda rate: setattr(settings_elsewhere, "RATE", rate)),
    "class attribute": lambda: (OfClassAttribute, lambda rate: setattr(Scaled.schedule, "rate", rate)),
    "context": lambda: (OfContext, CONTEXT.set),
    "thread": lambda: (OfThread, lambda rate: setattr(OF_THREAD, "rate", rate)),
    "variable": of_a_variable,
    "function": of_a_function,
    "method": of_a_method,
    "partial": of_a_partial,
}


def row_of(make: Callable[[], nn.Module], count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[make() for _ in range(count)])


def calls_of(
    model: nn.Module, way: str, hold: str, share: str = "60%"
) -> tuple[Callable[..., Tensor], CheckpointBudget]:
    """`model` under checkpoints of its blocks, or fitted; and the budget."""
    if way == "fit":
        return model, fit(model, batch(), share, hold=hold).budget
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)

    def call(x: Tensor) -> Tensor:
        for block in model.children():
            x = checkpoint(block, x, budget=budget)
        return x

    return call, budget


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("way", ["fit", "checkpoint"])
@pytest.mark.parametrize("name", WAYS)
def test_what_changed_before_backward_is_as_it_was(name: str, way: str, hold: str) -> None:
    results = []
    for plain in (True, False):
        make, change = WAYS[name]()
        change(1.0)
        model = row_of(make)
        call, budget = (model, None) if plain else calls_of(model, way, hold)
        result: list[Any] = []
        for rate in (2.0, 3.0, 4.0):
            change(rate)
            loss = call(batch()).square().mean()
            change(rate + 0.5)
            loss.backward()
            result += bits([loss, *(p.grad for p in model.parameters()), model[0].scale(torch.ones(1))])
            model.zero_grad()
        change(1.0)
        results.append(result)
        assert budget is None or budget.used_bytes == 0
    assert results[0] == results[1]


@pytest.mark.parametrize("way", ["fit", "checkpoint"])
def test_a_forward_that_is_replaced_between(way: str) -> None:
    results = []
    for plain in (True, False):
        model = row_of(Layer)
        call = model if plain else calls_of(model, way, "account")[0]
        loss = call(batch()).square().mean()
        for block in model:
            block.up.forward = lambda x, up=block.up: nn.functional.linear(x, 2 * up.weight, up.bias)
        loss.backward()
        results.append(bits(p.grad for p in model.parameters()))
    assert results[0] == results[1]


def test_context_variables_in_a_backward_of_another_thread() -> None:
    """As on CUDA, where autograd has threads of its own."""
    found = []
    for plain in (True, False):
        model = row_of(OfContext)
        token = CONTEXT.set(3.0)
        loss = (model(batch()) if plain else checkpoint(model, batch())).square().mean()
        CONTEXT.reset(token)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        found.append(bits(p.grad for p in model.parameters()))
    assert found[0] == found[1]


class Balanced(Layer):
    """Its auxiliary loss and a count go where a helper puts them."""

    def forward(self, x: Tensor) -> Tensor:
        note(self.up(x).softmax(-1).square().mean())
        return super().forward(x)


def note(loss: Tensor) -> None:
    LOSSES.append(loss)
    COUNTS["calls"] += 1


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("way", ["fit", "checkpoint"])
def test_losses_in_a_global_list_are_those_of_forward(way: str, hold: str) -> None:
    results = []
    for plain in (True, False):
        LOSSES.clear()
        COUNTS["calls"] = 0
        model = row_of(Balanced)
        call = model if plain else calls_of(model, way, hold)[0]
        assert not LOSSES
        for _ in range(3):
            loss = call(batch()).square().mean() + sum(LOSSES)
            LOSSES.clear()
            loss.backward()
            assert not LOSSES
        results.append((bits(p.grad for p in model.parameters()), COUNTS["calls"]))
    assert results[0] == results[1]


def test_tensors_that_a_second_run_leaves_in_variables_are_taken_out() -> None:
    losses: list[Tensor] = []
    latest: dict[str, Tensor] = {}

    def work(x: Tensor) -> Tensor:
        losses.append(x.sin().sum())
        latest["loss"] = losses[-1]
        return x.sin()

    out = checkpoint(work, batch().requires_grad_())
    first = losses.copy()
    losses.clear()
    out.sum().backward()
    assert not losses
    assert latest["loss"] is first[0]


class Carrying(Layer):
    """A state that is carried on with its graph, as in backpropagation through time."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] = []
        self.state: Tensor | None = None
        self.pair: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.state is not None and self.pair is not None:
            x = torch.tanh(x + self.state + self.states[-1] + self.pair[0])
        self.state = x.sin()
        self.states.append(x.cos())
        self.pair = x.exp().sin(), x
        return super().forward(x)

    def reset(self) -> None:
        self.states.clear()
        self.state = self.pair = None


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("way", ["fit", "checkpoint"])
def test_a_state_that_is_carried_on_with_its_graph(way: str, hold: str) -> None:
    results = []
    for plain in (True, False):
        model = row_of(Carrying)
        call, budget = (model, None) if plain else calls_of(model, way, hold, "1MiB")
        for _ in range(3):
            for block in model:
                block.reset()
            loss = sum(call(batch() + step).square().mean() for step in range(3))
            for block in model:
                block.reset()
            loss.backward()
        results.append(bits(p.grad for p in model.parameters()))
        assert budget is None or budget.used_bytes == 0
    assert results[0] == results[1]


def test_measuring_between_two_forwards_of_one_graph_leaves_the_first_whole() -> None:
    results = []
    for plain in (True, False):
        model = row_of(Carrying)
        if not plain:
            fit(model, batch(), "1MiB", strategy="sqrt")
        for block in model:
            block.reset()
        first = model(batch()).square().mean()
        if not plain:
            fit(model, batch(), "2MiB", strategy="sqrt")
        second = model(batch() + 1).square().mean()
        (first + second).backward()
        results.append(bits(p.grad for p in model.parameters()))
    assert results[0] == results[1]


@pytest.mark.parametrize("way", ["fit", "checkpoint"])
def test_what_was_not_seen_to_be_read_is_refused_and_kept_from_then_on(way: str) -> None:
    class Sometimes(Layer):
        last: Tensor | None = None
        reads = False

        def forward(self, x: Tensor) -> Tensor:
            h = x * self.last if self.reads and self.last is not None else x * 1
            self.last = h.detach() + 1
            return super().forward(torch.tanh(h))

    model = row_of(Sometimes)
    call = fit(model, batch(), "1MiB", strategy="sqrt") if way == "fit" else lambda x: checkpoint(model, x)
    for _ in range(3):
        call(batch()).sum().backward()
    Sometimes.reads = True
    loss = call(batch()).sum()
    with pytest.raises(RecomputeMismatch, match="not seen to read before"):
        loss.backward()
    del loss
    model.zero_grad()
    plain = row_of(Sometimes)
    for ours, theirs in zip(model, plain, strict=True):
        theirs.last = ours.last
    loss = call(batch()).sum()
    loss.backward()
    plain(batch()).sum().backward()
    assert bits(p.grad for p in model.parameters()) == bits(p.grad for p in plain.parameters())


class Stash(Layer):
    def __init__(self, stash: dict[str, Tensor]) -> None:
        super().__init__()
        self.stash = stash

    def forward(self, x: Tensor) -> Tensor:
        self.stash["skip"] = x * 2
        return super().forward(x)


class Pop(Stash):
    def forward(self, x: Tensor) -> Tensor:
        return Layer.forward(self, x + self.stash.pop("skip").sin())


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("way", ["fit", "checkpoint"])
def test_a_dict_that_blocks_share_stays_shared(way: str, hold: str) -> None:
    results = []
    for plain in (True, False):
        torch.manual_seed(0)
        stash: dict[str, Tensor] = {}
        model = nn.Sequential(Stash(stash), Layer(), Pop(stash), Stash(stash), Layer(), Pop(stash))
        call, budget = (model, None) if plain else calls_of(model, way, hold)
        for _ in range(3):
            call(batch()).square().mean().backward()
            assert not stash
        results.append(bits(p.grad for p in model.parameters()))
        assert budget is None or budget.used_bytes == 0
    assert results[0] == results[1]
