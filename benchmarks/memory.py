"""What a budget costs: one saved tensor under `with budget:` in both holds, vs. torch's own hooks, and bare accounting.

    python benchmarks/memory.py [--rounds 200] [--json]

A saved tensor is measured as a forward and backward of `x.sin()`, whose backward saves x: packed once, unpacked once. No hooks,
hooks that do nothing, `save_on_cpu`, hooks that copy, and the two holds take turns, round by round, so that a noisy machine is
noisy for all. Reported are medians, and medians of the ratios within a round. The thread's CPU seconds are taken, not those on
the wall: what other processes take then counts less. On CPU tensors `save_on_cpu` copies nothing (`tensor.cpu()` is the tensor
itself), so hooks that clone are listed next to `hold="pool"`, which does copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from bench_record import about, arguments
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from gpuckpt import CheckpointBudget

SIZES = {"4 KiB": 1 << 10, "4 MiB": 1 << 20}  # float32 elements


def contexts(nbytes: int) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What is compared, by name; each call gives a context to run one forward in."""
    account = CheckpointBudget(nbytes, device="cpu", hold="account")
    pool = CheckpointBudget(nbytes, device="cpu", hold="pool")
    return {
        "no hooks": nullcontext,
        "empty hooks": lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        "save_on_cpu": lambda: save_on_cpu(pin_memory=False),
        "copying hooks": lambda: saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor),
        "budget, account": lambda: account,
        "budget, pool": lambda: pool,
    }


def forward_backward(context: AbstractContextManager[Any], inputs: list[torch.Tensor]) -> None:
    with context:
        total = sum(tensor.sin().sum() for tensor in inputs)  # sin saves its input
    total.backward()  # type: ignore[union-attr]


def saved_tensor_seconds(elements: int, tensors: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per saved tensor, of every round, by name."""
    parameter = torch.ones(1, requires_grad=True)
    inputs = [torch.randn(elements) * parameter for _ in range(tensors)]  # no leaves: a budget charges them
    rivals = contexts(8 * elements * 4 * tensors)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for at in range(rounds + 3):
        for name, make in rivals.items():
            leaves = [tensor.detach() * parameter for tensor in inputs]
            start = time.thread_time()
            forward_backward(make(), leaves)
            if at >= 3:  # the first ones warm up
                seconds[name].append((time.thread_time() - start) / tensors)
    return seconds


def accounting_seconds(calls: int, rounds: int) -> dict[str, float]:
    """Median seconds of `allocate` and `free` together, of a charge that is released, and of what they are made of."""
    import threading

    budget = CheckpointBudget("1GiB", device="cpu")
    lock, clock = threading.RLock(), time.perf_counter

    def accounting() -> None:
        budget.allocate(4096)
        budget.free(4096)

    def charge() -> None:
        budget.charge(4096).release()

    def two_locks() -> None:
        with lock:
            pass
        with lock:
            pass

    def two_clocks() -> None:
        clock()
        clock()

    parts = {
        "allocate + free": accounting,
        "charge + release": charge,
        "two RLocks": two_locks,
        "two clocks": two_clocks,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, call in parts.items():
            start = time.thread_time()
            for _ in range(calls):
                call()
            seconds[name].append((time.thread_time() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    options = arguments(parser, rounds=6)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"about": about(), "saved_tensor": {}}
    for size, elements in SIZES.items():
        seconds = saved_tensor_seconds(elements, 64 if elements < 1 << 16 else 4, options.rounds)
        empty, on_cpu, copying = seconds["empty hooks"], seconds["save_on_cpu"], seconds["copying hooks"]
        report["saved_tensor"][size] = {
            name: {
                "median_s": statistics.median(values),
                "ratio_to_empty_hooks": statistics.median(a / b for a, b in zip(values, empty, strict=True)),
                "ratio_to_save_on_cpu": statistics.median(a / b for a, b in zip(values, on_cpu, strict=True)),
                "ratio_to_copying_hooks": statistics.median(a / b for a, b in zip(values, copying, strict=True)),
            }
            for name, values in seconds.items()
        }
    report["accounting_s"] = accounting_seconds(5000, max(5, options.rounds // 4))
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for size, rows in report["saved_tensor"].items():
        print(f"\none saved tensor of {size}, forward and backward; {options.rounds} rounds, medians")
        for name, row in rows.items():
            print(
                f"  {name:16} {1e6 * row['median_s']:9.2f} us   x{row['ratio_to_empty_hooks']:.2f} of empty hooks"
                f"   x{row['ratio_to_save_on_cpu']:.2f} of save_on_cpu   x{row['ratio_to_copying_hooks']:.2f} of copying hooks"
            )
    print("\naccounting")
    for name, value in report["accounting_s"].items():
        print(f"  {name:16} {1e9 * value:9.0f} ns")


if __name__ == "__main__":
    main()
