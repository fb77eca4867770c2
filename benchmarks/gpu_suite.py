"""Everything that is to be learned on a GPU, in one command: checks first, then speed; facts on disk as they are found.

    python -P benchmarks/gpu_suite.py --out DIR [--limit SECONDS] [--only PART,...] [--dry]

Each part runs in a process of its own under a limit of its own, in the order of what is worth most: a part that fails, hangs or
loses its CUDA context costs its own lines and no others, and what does not fit in `--limit` is left out by name.

DIR/results.jsonl   a line of JSON for each fact, written when it is found: {"part", "name", ...}; a check has "ok"
DIR/log.txt         what the parts printed
DIR/summary.md      written last: failed checks, then every figure
DIR/golden.json     the figures by name. Where benchmarks/results/golden/<device>.json is there, they are compared with it

Exit code 1 where a check failed, a part crashed or ran out of its time. `--dry`: tiny shapes on the CPU, kernels in Triton's
interpreter; its checks mean something, its times do not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "benchmarks"):  # with -P neither is there; a checkout need not be installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

GOLDEN = ROOT / "benchmarks" / "results" / "golden"
SLOWER = 1.10
"""How many times as long as before a figure may take before the summary names it."""


@dataclass(frozen=True)
class Part:
    """The function `name` of gpu_parts' `module`. limit_s: seconds it may take. shards: processes side by side. interpreted:
    whether a dry run takes the kernels through Triton's interpreter."""

    name: str
    module: str
    limit_s: float
    shards: int = 1
    interpreted: bool = False


PARTS = (  # in the order of worth
    Part("environment", "machine", 30),
    Part("smoke", "values", 60, interpreted=True),
    Part("pools", "memory", 70),
    Part("values", "values", 110, shards=6, interpreted=True),
    Part("ceilings", "speed", 20),
    Part("kernels", "kernels", 75, interpreted=True),
    Part("operations", "speed", 110),
    Part("overhead", "speed", 25),
    Part("training", "training", 75),
    Part("streams", "memory", 40),
    Part("tests", "machine", 70),
    Part("sanitizer", "machine", 60),
)


def run_all(options: argparse.Namespace) -> int:
    """Every part that is asked for and fits into the time; then the summary."""
    out, began_s = Path(options.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    wanted = options.only.split(",") if options.only else [part.name for part in PARTS]
    unknown = set(wanted) - {part.name for part in PARTS}
    if unknown:
        print(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in PARTS)}")
        return 2
    for part in PARTS:
        if part.name not in wanted:
            continue
        left_s = options.limit - (time.monotonic() - began_s)
        if left_s < 8:
            say(out, part.name, "the whole part", left_out=f"{max(left_s, 0):.0f} s were left")
            continue
        start_s = time.monotonic()
        codes = run_part(part, out, min(part.limit_s, left_s - 3), options.dry)
        spent_s = time.monotonic() - start_s
        say(out, part.name, "the whole part", ok=all(code == 0 for code in codes), codes=codes, seconds=spent_s)
        print(f"[{part.name}] {codes} in {spent_s:.0f} s", flush=True)
    return summarise(out, compare=not options.dry)


def run_part(part: Part, out: Path, limit_s: float, dry: bool) -> list[int | str]:
    """The exit codes of the part's processes, "timeout" for one that had to be ended."""
    shards = 1 if dry else part.shards
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "GPUCKPT_BACKEND")}
    if dry and part.interpreted:
        env |= {"TRITON_INTERPRET": "1", "GPUCKPT_BACKEND": "triton"}
    command = [sys.executable, "-P", __file__, "--out", str(out), "--part", part.name, "--limit", str(limit_s)]
    command += ["--dry"] if dry else []
    until_s = time.monotonic() + limit_s
    with (out / "log.txt").open("a") as log:
        log.write(f"\n==== {part.name}\n")
        log.flush()
        runs = [
            subprocess.Popen(
                [*command, "--shard", f"{k}/{shards}"],
                stdout=log,
                stderr=log,
                env=env,
                cwd=ROOT,
                start_new_session=True,
            )
            for k in range(shards)
        ]
        codes: list[int | str] = []
        for run in runs:
            try:
                codes.append(run.wait(max(1.0, until_s - time.monotonic())))
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)  # with the processes that it started
                run.wait()
                codes.append("timeout")
    return codes


def say(out: Path, part: str, name: str, **facts: Any) -> None:
    """Add a line. One write each, so that shards can append side by side."""
    line = json.dumps({"part": part, "name": name, **facts}, default=str) + "\n"
    file = os.open(out / "results.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def summarise(out: Path, *, compare: bool) -> int:
    """Write summary.md and golden.json from what is on disk; returns the exit code."""
    path = out / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    failed = [row for row in rows if row.get("ok") is False]
    figures = {f"{row['part']}: {row['name']}": row["ms"] for row in rows if isinstance(row.get("ms"), float)}
    (out / "golden.json").write_text(json.dumps(figures, indent=1) + "\n")
    lines = [f"{sum(row.get('ok') is True for row in rows)} checks passed, {len(failed)} failed", ""]
    lines += ["FAILED " + _line(row) for row in failed]
    lines += slower(figures, next((row["gpu"] for row in rows if row.get("gpu")), None)) if compare else []
    lines += [_line(row) for row in rows if row not in failed and (row.get("ok") is not True or "ms" in row)]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines)[:11000])
    return 1 if failed or not rows else 0


def slower(figures: dict[str, float], device: str | None) -> list[str]:
    """What takes longer than the figures that were kept of the same device say."""
    path = GOLDEN / (re.sub(r"[^a-z0-9]+", "-", (device or "none").lower()).strip("-") + ".json")
    if not path.exists():
        return [f"no earlier figures of this device: copy golden.json to {path.relative_to(ROOT)}"]
    before = json.loads(path.read_text())
    return [
        f"SLOWER {name}: {ms:.4g} ms, before {before[name]:.4g}"
        for name, ms in figures.items()
        if name in before and ms > SLOWER * before[name]
    ]


def _line(row: dict[str, Any]) -> str:
    rest = {key: value for key, value in row.items() if key not in ("part", "name")}
    facts = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in rest.items()
    )
    return f"{row['part']:11s} {row['name'][:70]:70s} {facts[:200]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out/gpu_suite", help="folder for what is found")
    parser.add_argument("--limit", type=float, default=460, help="seconds for everything")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.part:
        return run_all(options)
    from gpu_parts.common import Context

    part = next(part for part in PARTS if part.name == options.part)
    shard, shards = map(int, options.shard.split("/"))
    context = Context(Path(options.out), part.name, options.dry, time.monotonic() + options.limit, shard, shards, say)
    getattr(importlib.import_module(f"gpu_parts.{part.module}"), part.name)(context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
