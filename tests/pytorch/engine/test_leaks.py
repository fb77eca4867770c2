"""Nothing stays: not in cycles that only the collector finds, not after failures, not over many steps."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gpuckpt
from gpuckpt import BudgetExceeded, CheckpointBudget, RecomputeMismatch, SavedTensorModified
from gpuckpt.pytorch.engine.hooks import current_budget, enter
from tests.pytorch.steps import HOLDS, Tally, batch, blocks, run

both = pytest.mark.parametrize("hold", HOLDS)


@pytest.fixture(autouse=True)
def _no_collector():
    """Only reference counts free anything here: a cycle would show."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def exp_tanh(x: Tensor) -> Tensor:
    """Nodes that save their own outputs."""
    return x.exp().tanh().sigmoid()


@both
@pytest.mark.parametrize("backward", [True, False])
def test_no_cycles(hold, backward):
    budget = CheckpointBudget("16MiB", device="cpu", hold=hold)
    model, x = blocks(3), batch()
    with budget:
        loss = run(model, exp_tanh(x.requires_grad_() * 2), gpuckpt.checkpoint)
        loss = loss + gpuckpt.checkpoint(lambda x: gpuckpt.checkpoint(exp_tanh, x * 2).sum(), loss)
    if backward:
        loss.backward()
    del loss
    assert budget.used_bytes == 0


def test_no_cycles_without_a_budget():
    """What is recomputed while nobody is charged dies as early."""
    x = torch.zeros(10, requires_grad=True)
    out = gpuckpt.checkpoint(lambda h: _Witness.apply(h).exp().tanh().sin(), x * 2)
    assert _Witness.alive == 1
    out.sum().backward(retain_graph=True)
    assert _Witness.alive == 1, "the replay's graph is gone"
    del out
    assert _Witness.alive == 0
    out = gpuckpt.checkpoint(lambda h: (_Witness.apply(h).exp(), h.sin().exp())[1], x * 2)
    out.sum().backward()
    assert _Witness.alive == 0, "and so is what nobody wanted of it"


class _Witness(torch.autograd.Function):
    """Counts its own nodes: one that saves its own output and is held by what it saved would never die."""

    alive = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.clone()
        ctx.save_for_backward(y)
        ctx.counter = _Counter()
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class _Counter:
    def __init__(self) -> None:
        _Witness.alive += 1

    def __del__(self) -> None:
        _Witness.alive -= 1


@both
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["forward", "recompute", "tensor hook", "node hook", "backward"])
def test_an_exception_anywhere_leaves_nothing(hold, kind, where):
    budget = CheckpointBudget("16MiB", device="cpu", hold=hold)
    model, x = blocks(4), batch()
    armed = Tally()

    def strike(*args):
        if armed.count:
            raise kind(where)

    class Striking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            strike()
            return grad * ctx.saved_tensors[0]

    def fn(block, x):
        y = block(x)
        if where in ("forward", "recompute"):
            strike()
        if where == "tensor hook":
            y.register_hook(strike)
        if where == "backward":
            y = Striking.apply(y)
        return block(y)

    def step():
        with budget:
            armed.count = where == "forward"
            loss = run(model, x, lambda block, x: gpuckpt.checkpoint(fn, block, x))
        if where == "node hook":
            loss.grad_fn.next_functions[0][0].register_prehook(strike)
        armed.count = True
        loss.backward()

    for _ in range(3):
        with pytest.raises(kind, match=where):
            step()
    with budget:
        pass  # the engine's queue is emptied at the latest when a budget is entered
    assert budget.used_bytes == 0
    armed.count = False
    where = "nowhere"
    step()
    assert budget.used_bytes == 0


def two_branches(other: Callable[[], Tensor]) -> Tensor:
    """A sum of two branches. The node of the first is ready, and waits in the engine's queue, when that of `other` runs."""
    table = torch.ones(10, 4, requires_grad=True)
    rows = torch.nn.functional.embedding(torch.zeros(16, dtype=torch.long), table).sin()
    return (rows + other()).sum()


@both
def test_a_recompute_that_fails_leaves_no_ready_nodes_behind(hold):
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    calls: list[int] = []

    def fn(x):
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("again")
        return x.exp().sin()

    def step():
        with budget:
            loss = two_branches(lambda: gpuckpt.checkpoint(fn, torch.ones(16, 4, requires_grad=True) * 2))
        loss.backward()

    with pytest.raises(ValueError, match="again"):
        step()
    assert budget.used_bytes == 0


def test_a_changed_tensor_leaves_no_ready_nodes_behind():
    budget = CheckpointBudget("1MiB", device="cpu")
    h = torch.ones(16, 4, requires_grad=True) * 2

    def step():
        with budget:
            loss = two_branches(h.sin)
        h.add_(1)
        loss.backward()

    with pytest.raises(SavedTensorModified):
        step()
    assert budget.used_bytes == 0


@both
def test_ready_nodes_of_any_failed_backward_are_gone_when_a_budget_is_entered(hold):
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)

    def strike(grad):
        raise ValueError("hook")

    def other():
        out = (torch.ones(16, 4, requires_grad=True) * 2).sin()
        out.register_hook(strike)
        return out

    def step():
        with budget:
            loss = two_branches(other)
        loss.backward()

    with pytest.raises(ValueError, match="hook"):
        step()
    assert budget.used_bytes > 0, (
        "torch keeps them; if not, gpuckpt.pytorch.engine.failed_backward has outlived its purpose"
    )
    with budget:
        assert budget.used_bytes == 0


def test_a_context_that_nobody_leaves_is_left_when_it_dies():
    """As where Ctrl-C comes before the first line of `__exit__`."""
    budget, outer = CheckpointBudget("1MiB", device="cpu"), CheckpointBudget("1MiB", device="cpu")
    x = torch.ones(100, requires_grad=True)
    context = enter(budget)
    assert current_budget() is budget
    del context
    assert current_budget() is None
    with outer:
        forgotten = enter(budget)
        assert current_budget() is budget
    assert current_budget() is None, "leaving the outer one leaves what is inside of it"
    (x * 2).sin()
    assert (budget.peak_bytes, outer.peak_bytes) == (0, 0)
    forgotten.__exit__()
    assert current_budget() is None


@both
def test_an_interrupt_from_another_thread_leaves_nothing(hold, monkeypatch):
    """Ctrl-C at whatever instant it comes, many times."""
    # Of one that comes within a finalizer pytest would keep the traceback, and with it the tensors.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    budget = CheckpointBudget("16MiB", device="cpu", hold=hold)
    model, x = blocks(4), batch()

    def step():
        with budget:
            loss = run(model, x, gpuckpt.checkpoint)
        loss.backward()

    step()
    interrupts = 0
    main = threading.main_thread().ident
    assert main is not None
    for trial in range(50):
        timer = threading.Timer(0.0003 * trial, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            while timer.is_alive():
                step()
            step()  # a signal that arrived between the last two lines
        except KeyboardInterrupt:
            interrupts += 1
        timer.join()
        del timer
        while current_budget() is not None:
            # It came before the first line of `CheckpointBudget.__exit__`, which no context manager in Python can help.
            budget.__exit__(None, None, None)
        with budget:
            pass
        assert budget.used_bytes == 0, f"after interrupt {interrupts}"
    assert interrupts > 25
    print(f"{interrupts} interrupts at random instants under {hold}, 0 bytes left")
    step()


@both
def test_refusals_and_mismatches_leave_nothing(hold):
    model, x = blocks(4), batch()
    budget = CheckpointBudget(6 * x.nbytes, device="cpu", hold=hold)
    for _ in range(3):
        with pytest.raises(BudgetExceeded):
            _step(budget, model, x)
        assert budget.used_bytes == 0
    flips = Tally()

    def fn(block, x):
        flips.count += 1
        return block(x[: 4 + flips.count % 2])

    budget = CheckpointBudget("16MiB", device="cpu", hold=hold)
    for _ in range(3):
        with pytest.raises(RecomputeMismatch):
            _step(budget, model, x, fn)
        assert budget.used_bytes == 0


def _step(budget, model, x, fn=None):
    with budget:
        call = gpuckpt.checkpoint if fn is None else lambda block, x: gpuckpt.checkpoint(fn, block, x)
        loss = run(model, x, call)
    loss.backward()


def resident_bytes() -> int:
    """Of this process, as the system counts it."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@both
def test_a_hundred_steps_hold_nothing_between_them_and_the_process_does_not_grow(hold):
    model, x = blocks(6, 64), batch(128, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    budget = CheckpointBudget("64MiB", device="cpu", hold=hold)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with budget:
            h = model[0](x)
            for block in model[1:]:
                h = gpuckpt.checkpoint(block, h)
            loss = h.square().mean()
        loss.backward()
        optimizer.step()

    for _ in range(30):
        step()
        assert budget.used_bytes == 0
    before, peak = resident_bytes(), budget.peak_bytes
    for _ in range(100):
        step()
        assert budget.used_bytes == 0
    assert budget.peak_bytes == peak
    assert resident_bytes() <= 1.01 * before
