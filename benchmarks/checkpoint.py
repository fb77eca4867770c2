"""What a checkpoint costs vs. torch.utils.checkpoint: one small function, forward alone and forward with backward.

    python benchmarks/checkpoint.py [--rounds 200] [--json]

The function is a chain of three elementwise operations on 4 KiB, so that nearly all of the time is the checkpoint's own.
The rivals take turns round by round; reported are medians of the thread's CPU seconds, and medians of the ratios within a
round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from bench_record import about, arguments
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import gpuckpt

CALLS = 20


def fn(x: torch.Tensor) -> torch.Tensor:
    return x.sin().exp().cos()


def rivals() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    account = gpuckpt.CheckpointBudget("64MiB", device="cpu")
    pool = gpuckpt.CheckpointBudget("64MiB", device="cpu", hold="pool")

    def under(budget: gpuckpt.CheckpointBudget) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            with budget:
                for _ in range(CALLS):
                    x = gpuckpt.checkpoint(fn, x)
            return x

        return run

    def repeated(call: Callable[..., torch.Tensor], **options: object) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            for _ in range(CALLS):
                x = call(fn, x, **options)
            return x

        return run

    return {
        "no checkpoint": repeated(lambda fn, x: fn(x)),
        "torch.utils.checkpoint": repeated(torch_checkpoint, use_reentrant=False),
        "gpuckpt, no budget": repeated(gpuckpt.checkpoint),
        "gpuckpt, account": under(account),
        "gpuckpt, pool": under(pool),
    }


def measure(rounds: int) -> dict[str, dict[str, float]]:
    runs = rivals()
    forward: dict[str, list[float]] = {name: [] for name in runs}
    whole: dict[str, list[float]] = {name: [] for name in runs}
    x = torch.randn(1024, requires_grad=True)
    for at in range(rounds + 3):
        for name, run in runs.items():
            start = time.thread_time()
            loss = run(x * 1).sum()
            middle = time.thread_time()
            loss.backward()
            end = time.thread_time()
            del loss
            if at >= 3:  # the first ones warm up
                forward[name].append((middle - start) / CALLS)
                whole[name].append((end - start) / CALLS)

    def ratio(values: list[float], to: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(values, to, strict=True))

    rival = "torch.utils.checkpoint"
    return {
        name: {
            "forward_s": statistics.median(forward[name]),
            "step_s": statistics.median(whole[name]),
            "forward_ratio": ratio(forward[name], forward[rival]),
            "step_ratio": ratio(whole[name], whole[rival]),
        }
        for name in runs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = arguments(parser, rounds=10)
    torch.set_num_threads(1)
    rows = measure(options.rounds)
    if options.json:
        print(json.dumps({"about": about(), "checkpoint": rows}, indent=1))
        return
    print(
        f"one checkpoint of three operations on 4 KiB; {options.rounds} rounds, medians, ratios to torch.utils.checkpoint"
    )
    for name, row in rows.items():
        print(
            f"  {name:24} forward {1e6 * row['forward_s']:8.2f} us  x{row['forward_ratio']:.2f}"
            f"   forward and backward {1e6 * row['step_s']:8.2f} us  x{row['step_ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
