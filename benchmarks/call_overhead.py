"""Microseconds of Python that a forward and backward of each fused operation costs, and what eager torch's costs.

    python benchmarks/call_overhead.py [--repeats 400] [--arch 90]

Over the stand-in driver of tests/drivercuda: Triton's own launch path, with a driver that runs nothing. The tensors are so small
that arithmetic hardly counts, and torch's own operators run on the CPU. So the figures are this machine's Python and no GPU's;
compare them with eager's of the same run, or of two revisions in turns (`make bench-compare SCRIPT=call_overhead`).

Ours and eager's take turns; given is the 20th percentile of this thread's processor time, which other jobs touch least.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench_record import RESULTS, append, arguments

ROOT = Path(__file__).resolve().parent.parent


def measure(arch: int, repeats: int) -> dict[str, dict[str, float]]:
    """{operation: {"ours_s", "eager_s"}}. In a process of its own, which cannot be undone from being the stand-in's. Raises
    `RuntimeError` with its output where it fails."""
    command = [
        sys.executable,
        "-m",
        "tests.drivercuda.launches",
        "--arch",
        str(arch),
        "--cost",
        "--repeats",
        str(repeats),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        row["name"].removeprefix("cost "): {"ours_s": row["us"] / 1e6, "eager_s": row["eager_us"] / 1e6} for row in rows
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="architecture to launch for")
    parser.add_argument("--repeats", type=int, default=400)
    options = arguments(parser, repeats=40)
    found = measure(options.arch, options.repeats)
    append(RESULTS / "call_overhead.jsonl", {"arch": options.arch, "operations": found})
    for name, row in found.items():
        ours, eager = 1e6 * row["ours_s"], 1e6 * row["eager_s"]
        print(f"{name:22} {ours:7.1f} us   eager {eager:7.1f} us   {ours / eager:.2f}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
