"""Copies that overlap work, over a link of settable speed: as long as the simulator says, in its order, and under faults."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import gpuckpt.pytorch.plan_maker as plan_maker
from gpuckpt import CheckpointBudget, Keep, Recompute, fit, simulate
from gpuckpt.errors import OffloadFailed, SavedTensorModified
from gpuckpt.planning import Node
from gpuckpt.pytorch.engine.copies import CopyRecord, CopyThread, _ThreadCopy
from gpuckpt.pytorch.engine.offload import Spill
from gpuckpt.pytorch.fitted import Fitted
from gpuckpt.pytorch.link_speed import Link
from tests.pytorch.engine.test_offload import put_plan

COUNT, WIDTH = 9, 250_000
FORWARD_S, BACKWARD_S = 0.03, 0.05
INPUT_BYTES = 4 * WIDTH
X = torch.linspace(-1, 1, WIDTH)[None]


class Sleep(torch.autograd.Function):
    """Takes its time, saves its input and as much again, and computes next to nothing."""

    @staticmethod
    def forward(ctx, x, scale):
        time.sleep(FORWARD_S)
        ctx.save_for_backward(x, x * scale, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        time.sleep(BACKWARD_S)
        x, y, scale = ctx.saved_tensors
        return grad * scale + 0 * y, (grad * x).sum()


class Sleeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.01))

    def forward(self, x):
        return Sleep.apply(x, self.scale) + 1


def sleepers() -> nn.Sequential:
    return nn.Sequential(*[Sleeper() for _ in range(COUNT)])


def fitted_over(link: CopyThread, monkeypatch, **options) -> Fitted:
    monkeypatch.setattr(plan_maker, "copies_for", lambda device: link)
    speed = Link(link.bytes_per_s, link.latency_s)
    monkeypatch.setattr(plan_maker, "measure_link", lambda *_: speed)
    return fit(sleepers(), X, "1GiB", host_budget="1GiB", repeats=1, **options)


def all_spilled(last: int) -> tuple[Node, ...]:
    return (Keep(0), *(Keep(i, "spill") for i in range(1, last)), Keep(last))


def inputs_away(last: int) -> tuple[Node, ...]:
    return (Keep(0), Keep(1), *(Recompute((Keep(i),), "spill") for i in range(2, last)), Keep(last))


def some_of_both(last: int) -> tuple[Node, ...]:
    return (
        Keep(0),
        Keep(1, "spill"),
        Recompute((Keep(2), Keep(3)), "spill"),
        Keep(4),
        Keep(5, "spill"),
        Recompute((Keep(6),)),
        *(Keep(i) for i in range(7, last + 1)),
    )


trees = pytest.mark.parametrize("tree_of_last", [all_spilled, inputs_away, some_of_both])


def step(fitted: Fitted, x: torch.Tensor = X) -> list[torch.Tensor]:
    fitted.zero_grad()
    fitted(x).sum().backward()
    return [parameter.grad.clone() for parameter in fitted.parameters()]


def held(fitted: Fitted) -> tuple[int, int]:
    """Bytes here and on the host, once copies that nobody waits for are done."""
    deadline_s = time.perf_counter() + 5.0
    while fitted.host_budget.used_bytes and time.perf_counter() < deadline_s:
        time.sleep(0.001)
    return fitted.budget.used_bytes, fitted.host_budget.used_bytes


def timed_step(fitted: Fitted, link: CopyThread) -> tuple[float, list[CopyRecord]]:
    link.records.clear()
    began_s = time.perf_counter()
    step(fitted)
    return time.perf_counter() - began_s, list(link.records)


@pytest.mark.timed
@trees
@pytest.mark.parametrize("forwards", [0.5, 2.0])
def test_a_step_takes_what_the_simulator_says(tree_of_last: Callable, forwards: float, monkeypatch) -> None:
    """Within 10%, on a link over which what a stage saves takes half a forward, or two."""
    link = CopyThread(2 * INPUT_BYTES / (forwards * FORWARD_S))
    fitted = fitted_over(link, monkeypatch)
    chain = fitted.chain
    tree = tree_of_last(len(chain) - 1)
    put_plan(fitted, tree)
    said = simulate(chain, tree)
    step(fitted)
    runs = [timed_step(fitted, link) for _ in range(4)]
    seconds, records = min(runs, key=lambda run: run[0])
    assert seconds == pytest.approx(said.step_s, rel=0.1)
    assert fitted.budget.peak_bytes == said.peak_bytes
    assert fitted.host_budget.peak_bytes == said.host_peak_bytes
    # One record is one storage of one transfer: in the order that was said, and one behind the other.
    moved_bytes = sum(record.nbytes for record in records)
    assert moved_bytes == sum(copy.nbytes for copy in said.transfers)
    assert all(later.began_s >= earlier.done_s for earlier, later in pairwise(records))
    waits: deque[CopyRecord] = deque(records)
    for copy in said.transfers:
        mine: list[CopyRecord] = []
        while sum(record.nbytes for record in mine) < copy.nbytes:
            mine.append(waits.popleft())
        stood_still_s = sum(record.waited_s for record in mine)
        assert stood_still_s == pytest.approx(copy.waited_s, abs=0.5 * FORWARD_S), copy
    if forwards > 1 and tree_of_last is all_spilled:
        assert sum(copy.waited_s for copy in said.transfers) > 0.1
    plain = sleepers()
    plain(X).sum().backward()
    assert all(map(torch.equal, step(fitted), [parameter.grad for parameter in plain.parameters()]))


@pytest.mark.timed
def test_overlap_is_worth_it_and_the_plan_knows(monkeypatch) -> None:
    link = CopyThread(2 * INPUT_BYTES / (0.5 * FORWARD_S))
    monkeypatch.setattr(plan_maker, "copies_for", lambda device: link)
    plain = sleepers()
    fitted = fit(sleepers(), X, 8 * INPUT_BYTES, host_budget="1GiB", repeats=1)
    seconds = min(timed_step(fitted, link)[0] for _ in range(3))
    plan = fitted.plan.certificate
    assert plan.host_peak_bytes > 0
    assert plan.recompute_s == 0
    assert fitted.measured_peak_bytes == plan.peak_bytes <= 8 * INPUT_BYTES
    assert seconds == pytest.approx(plan.step_s, rel=0.1)
    assert seconds < COUNT * (FORWARD_S + BACKWARD_S) * 1.15
    plain(X).sum().backward()
    assert all(map(torch.equal, step(fitted), [parameter.grad for parameter in plain.parameters()]))


class Faulty(CopyThread):
    """A link that breaks in the middle of copy number `fails`."""

    fails = -1
    count = 0

    def move(self, target: np.ndarray, source: np.ndarray) -> None:
        self.count += 1
        if self.count - 1 == self.fails:
            target[: len(target) // 2] = source[: len(source) // 2]
            raise OSError("the link is down")
        super().move(target, source)


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr("tests.pytorch.engine.test_offload_overlap.FORWARD_S", 0.0)
    monkeypatch.setattr("tests.pytorch.engine.test_offload_overlap.BACKWARD_S", 0.0)


@trees
@pytest.mark.parametrize("hold", ["account", "pool"])
def test_every_copy_of_a_step_fails_once(tree_of_last: Callable, hold: str, quick, monkeypatch) -> None:
    link = Faulty()
    fitted = fitted_over(link, monkeypatch, hold=hold)
    put_plan(fitted, tree_of_last(len(fitted.chain) - 1))
    expected = step(fitted)
    count, failed, said = link.count, 0, set()
    link.count = 0
    step(fitted)
    assert link.count == count > 4
    for link.fails in range(count):
        link.count = 0
        try:
            found = step(fitted)
        except OffloadFailed as error:
            said.add(str(error))
            failed += 1
        else:
            assert all(map(torch.equal, found, expected))  # of a copy that nothing waits for
        assert held(fitted) == (0, 0), link.fails
    link.fails = -1
    assert all("the link is down" in text and "plan without host_budget" in text for text in said)
    # What the last two stages send stays here, and nobody needs the copy.
    assert failed >= count - 2 > 2
    assert all(map(torch.equal, step(fitted), expected))
    assert fitted.budget.peak_bytes == fitted.plan.certificate.peak_bytes


@trees
def test_ctrl_c_in_every_wait(tree_of_last: Callable, quick, monkeypatch) -> None:
    link = CopyThread()
    fitted = fitted_over(link, monkeypatch)
    put_plan(fitted, tree_of_last(len(fitted.chain) - 1))
    expected = step(fitted)
    left = [10**9]
    wait = _ThreadCopy.wait

    def interrupted(self: _ThreadCopy) -> None:
        left[0] -= 1
        if left[0] < 0:
            left[0] = 10**9
            raise KeyboardInterrupt
        wait(self)

    monkeypatch.setattr(_ThreadCopy, "wait", interrupted)
    interrupts = 0
    found: list[torch.Tensor] | None
    for number in range(100):
        left[0] = number
        try:
            found = step(fitted)
        except KeyboardInterrupt:
            interrupts += 1
            found = None
        assert held(fitted) == (0, 0), number
        if found is not None:
            assert all(map(torch.equal, found, expected))
            break
    assert interrupts > 4


def test_a_full_host_is_refused_in_forward_and_nothing_stays(quick, monkeypatch) -> None:
    expected = step(fitted_over(CopyThread(), monkeypatch))
    fitted = fitted_over(CopyThread(), monkeypatch)
    put_plan(fitted, all_spilled(len(fitted.chain) - 1))
    hog = fitted.host_budget.charge(fitted.host_budget.max_bytes - 3 * INPUT_BYTES)
    with pytest.raises(MemoryError, match="the host budget has no room for what a spilled stage saves"):
        step(fitted)
    deadline_s = time.perf_counter() + 5.0
    while fitted.host_budget.used_bytes > hog.nbytes and time.perf_counter() < deadline_s:
        time.sleep(0.001)
    assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (0, hog.nbytes)
    hog.release()
    assert all(map(torch.equal, step(fitted), expected))


def test_what_changes_in_place_before_it_is_out_is_an_error() -> None:
    class Late(CopyThread):
        def move(self, target: np.ndarray, source: np.ndarray) -> None:
            time.sleep(0.01)
            super().move(target, source)

    budget = CheckpointBudget("1GiB", device="cpu")
    host = CheckpointBudget("1GiB", device="cpu", hold="pool")
    spill = Spill(budget, host, Late())
    x = torch.randn(50, requires_grad=True)
    with spill.run((), replayed=False):
        y = x.sigmoid()
    spill.send()
    with torch.no_grad():
        y.zero_()
    with pytest.raises(SavedTensorModified):
        spill.let_go()
    del y, spill
    assert (budget.used_bytes, host.used_bytes) == (0, 0)


def test_copies_that_nobody_needs_any_more_hold_nothing_while_they_wait_for_their_turn() -> None:
    class Busy(CopyThread):
        def move(self, target: np.ndarray, source: np.ndarray) -> None:
            free.wait(10)
            super().move(target, source)

    free, link = threading.Event(), Busy()
    host = CheckpointBudget("1GiB", device="cpu", hold="pool")
    spills = []
    for number in range(3):  # the thread is at the first; the others wait behind it
        spill = Spill(CheckpointBudget("1GiB", device="cpu"), host, link, number)
        with spill.run((), replayed=False):
            y = torch.randn(50, requires_grad=True).sigmoid()
        spill.send()
        spills.append((y, spill))
    first = spills.pop(0)
    assert host.used_bytes == 3 * 200
    del y, spill
    spills.clear()
    assert host.used_bytes == 200
    free.set()
    del first
    assert host.used_bytes == 0


def test_a_step_that_never_goes_backward_leaves_nothing(quick, monkeypatch) -> None:
    fitted = fitted_over(CopyThread(1e9), monkeypatch)
    for tree_of_last in (all_spilled, inputs_away, some_of_both):
        put_plan(fitted, tree_of_last(len(fitted.chain) - 1))
        loss = fitted(X).sum()
        assert fitted.host_budget.used_bytes > 0
        del loss  # with copies under way
        assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (0, 0)
