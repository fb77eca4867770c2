"""Thousands of steps and many threads: what is resident, what a step takes and what is held stay as they were."""

from __future__ import annotations

import copy
import gc
import os
import random
import statistics
import threading
import time

import pytest
import torch
from torch import nn

from gpuckpt import CheckpointBudget, checkpoint, fit
from tests.pytorch.steps import Block, bits


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(16) for _ in range(6)])


def run_steps(count: int, hold: str) -> str:
    """`count` steps with ever other rows; 24 sizes in all, one step in eight of contents that save more."""

    class Deeper(nn.Sequential):
        def forward(self, x: torch.Tensor, step: int = 0) -> torch.Tensor:
            out = super().forward(x)
            return out.exp().log() if bool(x[0, 0] > 3) else out

    ours = Deeper(*model())
    fitted = fit(ours, torch.zeros(8, 16), "1MiB", hold=hold, repeats=1)
    draw = random.Random(0)
    seconds, resident = [], []

    def step(number: int) -> None:
        x = torch.randn(draw.randrange(8, 32), 16)
        x[0, 0] = 4.0 if number % 8 == 0 else 0.0
        ours(x, step=number).sum().backward()
        ours.zero_grad()
        assert fitted.budget.used_bytes == 0

    for number in range(count):
        began = time.thread_time()  # of this thread alone, whatever else the machine does
        step(number)
        seconds.append(time.thread_time() - began)
        if number % (count // 20) == 0:
            gc.collect()
            resident.append(resident_bytes())
    # All sizes have come within the first part; from then on nothing may grow.
    later = resident[8:]
    assert max(later) <= 1.01 * later[0], [f"{each / 2**20:.1f}" for each in resident]
    quarter = count // 4
    second, last = (statistics.median(seconds[at : at + quarter]) for at in (quarter, count - quarter))
    assert last < 1.5 * second, (second, last)
    maker = fitted._maker
    assert len(maker.plans) <= 64
    assert max(len(maker._observed), len(maker._unpredictable), len(fitted.deviations)) <= 1024
    assert len(fitted.budget.events()) <= 4096
    return (
        f"{count} steps, hold={hold!r}: resident {later[0] / 2**20:.1f} MiB after 8 of 20 parts, {later[-1] / 2**20:.1f} at the "
        f"end, at "
        f"most {max(later) / 2**20:.1f}; a step {1e3 * second:.2f} ms in the second quarter, {1e3 * last:.2f} ms in the last; "
        f"{len(maker.plans)} plans, {len(fitted.deviations)} deviations, 0 bytes held after each"
    )


def run_threads(threads: int, seconds: float, hold: str) -> str:
    """Threads that train models of their own under one budget; gradients are those of the plain run, in every step."""
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    wrong: list[str] = []
    counts = [0] * threads
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        ours = model()
        plain = copy.deepcopy(ours)
        x = torch.randn(4 + number, 16, generator=torch.Generator().manual_seed(number))
        try:
            plain(x).square().mean().backward()
            expected = bits([p.grad for p in plain.parameters()])
            while time.monotonic() < end or not counts[number]:
                ours.zero_grad()
                with budget:
                    y = x
                    for block in ours:
                        y = checkpoint(block, y)
                    loss = y.square().mean()
                loss.backward()
                if bits([p.grad for p in ours.parameters()]) != expected:
                    wrong.append(f"thread {number}: other gradients")
                    return
                if budget.used_bytes > budget.max_bytes:
                    wrong.append(f"thread {number}: more than the cap")
                    return
                del y, loss
                counts[number] += 1
        except Exception as error:
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    group = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in group:
        thread.start()
    for thread in group:
        thread.join()
    assert not wrong, wrong[:3]
    gc.collect()
    assert budget.used_bytes == 0
    assert budget.peak_bytes <= budget.max_bytes
    if hold == "pool":
        assert budget._pool.live_bytes == 0
    return (
        f"{threads} threads, hold={hold!r}: {sum(counts)} steps in {seconds:.0f} s, at least {min(counts)} each, peak "
        f"{budget.peak_bytes} of {budget.max_bytes} bytes, 0 held at the end, every gradient bitwise the plain one"
    )


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_three_hundred_steps(hold):
    run_steps(300, hold)


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_sixteen_threads_under_one_budget(hold):
    run_threads(16, 2.0, hold)


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["account", "pool"])
def test_two_thousand_steps(hold):
    print("\n" + run_steps(2000, hold))


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["account", "pool"])
def test_sixteen_threads_for_a_minute(hold):
    print("\n" + run_threads(16, 60.0, hold))
