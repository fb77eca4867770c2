"""Budgets around torch steps: nested, shared, on other threads; nothing leaks; and what no budget counts is listed."""

from __future__ import annotations

import gc
import os
import threading

import numpy as np
import pytest
import torch

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetClosed, BudgetExceeded
from gpuckpt.memory.uncapped import uncapped

HOLDS = ["account", "pool"]


def model(width: int = 8, depth: int = 4) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (torch.nn.Linear(width, width), torch.nn.GELU())]
    return torch.nn.Sequential(*layers)


def step(net, budget=None, x=None):
    net.zero_grad()
    x = torch.ones(5, 8) if x is None else x
    if budget is None:
        loss = net(x).square().sum()
    else:
        with budget:
            loss = net(x).square().sum()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("hold", HOLDS)
def test_a_budget_is_empty_after_each_step_and_gradients_are_bitwise_the_plain_ones(hold):
    net, budget = model(), CheckpointBudget("1MiB", device="cpu", hold=hold)
    plain = step(net)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(step(net, budget), plain, strict=True))
        assert budget.used_bytes == 0
    assert budget.peak_bytes > 0


@pytest.mark.parametrize("hold", HOLDS)
def test_every_request_of_a_step_fails_once_and_nothing_is_left(hold, fail_request):
    net, budget = model(), CheckpointBudget("1MiB", device="cpu", hold=hold)
    plain = step(net)
    fault = fail_request(budget, None)
    step(net, budget)
    requests = fault.requests
    for n in range(requests):
        fault = fail_request(budget, n)
        with pytest.raises(BudgetExceeded):
            step(net, budget)
        assert fault.fired
        gc.collect()
        assert budget.snapshot()[1] == budget.snapshot().pending_bytes == 0
        fail_request(budget, None)
        assert all(torch.equal(a, b) for a, b in zip(step(net, budget), plain, strict=True))
    print(f"\n{hold}: {requests} requests failed one after another, 0 bytes left behind")
    assert requests > 8


def test_two_models_share_one_budget_and_nested_budgets_each_hold_their_own():
    first, second = model(), model()
    shared = CheckpointBudget("1MiB", device="cpu")
    with shared:
        losses = [first(torch.ones(5, 8)).sum(), second(torch.ones(5, 8)).sum()]
    both = shared.used_bytes
    losses.pop().backward()
    assert 0 < shared.used_bytes < both
    losses.pop().backward()
    assert shared.used_bytes == 0

    outer, inner = CheckpointBudget("1MiB", device="cpu"), CheckpointBudget("1MiB", device="cpu")
    with outer:
        hidden = first(torch.ones(5, 8))
        before = outer.used_bytes
        with inner, inner:  # the same one twice is no harm
            loss = second(hidden).sum()
        assert outer.used_bytes == before, "the innermost budget holds"
        assert inner.used_bytes > 0
        loss = loss * loss
    loss.backward()
    assert (outer.used_bytes, inner.used_bytes) == (0, 0)


def test_each_thread_enters_for_itself():
    budget, held = CheckpointBudget("1MiB", device="cpu"), []

    def elsewhere():
        loss = model()(torch.ones(5, 8)).sum()  # this thread has entered nothing
        held.append(budget.used_bytes)
        loss.backward()
        with budget:
            loss = model()(torch.ones(5, 8)).sum()
        held.append(budget.used_bytes)
        held.append(loss)

    with budget:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert held[0] == 0
    assert held[1] > 0
    backward = threading.Thread(target=lambda: held.pop().backward())
    backward.start()
    backward.join()
    assert budget.used_bytes == 0, "backward on another thread gives everything back"


@pytest.mark.parametrize("hold", HOLDS)
def test_an_output_dropped_before_backward_and_an_exception_inside_leak_nothing(hold):
    net, budget = model(), CheckpointBudget("1MiB", device="cpu", hold=hold)
    with budget:
        loss = net(torch.ones(5, 8)).sum()
    assert budget.used_bytes > 0
    del loss
    gc.collect()
    assert budget.used_bytes == 0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), budget:
        net[0](torch.ones(5, 8)) @ torch.ones(3, 3)
    gc.collect()
    assert budget.used_bytes == 0
    step(net, budget)


def test_a_closed_budget_cannot_be_entered():
    budget = CheckpointBudget("1MiB", device="cpu")
    budget.close()
    with pytest.raises(BudgetClosed), budget:
        pass


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc, which is Linux's"
)
@pytest.mark.parametrize("hold", HOLDS)
def test_a_hundred_steps_leave_the_process_as_it_was(hold):
    net, budget = model(), CheckpointBudget("1MiB", device="cpu", hold=hold)
    for _ in range(20):
        step(net, budget)
    gc.collect()
    before = resident_bytes()
    for _ in range(100):
        step(net, budget)
        assert budget.used_bytes == 0
    gc.collect()
    assert resident_bytes() <= 1.01 * before


def test_what_no_budget_counts_is_listed_and_measured():
    net = model()
    step(net)
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.step()
    rows = {row.name: row.nbytes for row in uncapped("cpu", model=net, optimizer=optimizer)}
    parameter_bytes = sum(p.numel() * 4 for p in net.parameters())
    assert rows["parameters and buffers"] == rows["gradients"] == parameter_bytes
    assert rows["optimizer state"] == 2 * parameter_bytes + 4 * len(list(net.parameters()))
    assert rows["process, resident"] > 10 << 20
    assert all(row.why for row in uncapped("cpu"))


def test_on_a_device_the_default_pool_and_the_rest_are_measured(hostcuda):
    cupy = hostcuda.cupy
    held = cupy.asarray(np.zeros(3000, np.uint8))
    budget = CheckpointBudget(8192, device="cuda:0", hold="pool")
    saved = budget.save(held)
    rows = {row.name: row.nbytes for row in uncapped("cuda:0")}
    assert rows["CuPy's default pool"] == 3072
    assert rows["context and others"] == hostcuda.used_bytes() - 3072 >= saved.nbytes
    assert rows["torch's cache"] is None
