"""A benchmark of this checkout against the same of another revision, in turns: medians and ratios.

    python benchmarks/compare.py --base main [--rounds 5] checkpoint [-- --rounds 20]

The base is checked out in a temporary folder and runs its own script on its own library, with the Python that runs this one;
what follows `--` goes to both. After a round that is not counted (it compiles and fills caches) the two take turns, the
first of a pair changing each time. Compared are all figures in seconds that both have; a ratio below 1 means that this checkout
is faster. A figure whose quartiles of the ratio lie on both sides of 1 is marked as noise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_record import arguments, latest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def seconds_in(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(path, figure) of every number under a key that ends in `_s`, lists by position; "about" is left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "about":
                yield from seconds_in(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from seconds_in(inner, f"{name}[{number}]")
    elif isinstance(value, int | float) and not isinstance(value, bool) and _is_seconds(name):
        yield name, float(value)


def _is_seconds(name: str) -> bool:
    # In {"step_s": {"ours": 1.0}} the key further out names the unit.
    return any(part.split("[")[0].endswith("_s") for part in name.split(".")) and not name.endswith("bound_s")


def run(checkout: Path, script: str, arguments: list[str]) -> dict[str, float]:
    """The seconds of one run of a checkout's benchmark. Raises `RuntimeError` with its output where it fails."""
    file = checkout / "benchmarks" / f"{script}.py"
    if not file.exists():
        raise RuntimeError(f"{checkout} has no benchmark called {script!r}")
    extra = ["--json"] if '"--json"' in file.read_text() and "--json" not in arguments else []
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        environment = {**os.environ, "GPUCKPT_RESULTS": str(results), "PYTHONPATH": str(checkout)}
        done = subprocess.run(
            [sys.executable, file, *arguments, *extra], cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{file} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        if results.exists():
            record = latest(results)
        else:
            try:
                record = json.loads(done.stdout)
            except json.JSONDecodeError:
                raise RuntimeError(
                    f"{file} neither added a record to its results nor printed one as JSON; is that revision older than records?"
                ) from None
    return dict(seconds_in(record))


def compare(base: Path, head: Path, script: str, arguments: list[str], rounds: int) -> list[dict[str, Any]]:
    """Rows of figure, both medians, median and quartiles of the paired ratios."""
    found: dict[Path, list[dict[str, float]]] = {base: [], head: []}
    for number in range(-1, rounds):
        for checkout in (base, head) if number % 2 else (head, base):
            seconds = run(checkout, script, arguments)
            if number >= 0:
                found[checkout].append(seconds)
    rows = []
    for name in found[head][0]:
        if any(name not in seconds for both in found.values() for seconds in both):
            continue
        was, now = ([seconds[name] for seconds in found[checkout]] for checkout in (base, head))
        ratios = [b / a for a, b in zip(was, now, strict=True) if a > 0]
        if ratios:
            low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            row = {"figure": name, "base_s": statistics.median(was), "head_s": statistics.median(now)}
            rows.append({**row, "ratio": ratio, "low": low, "high": high, "noise": low <= 1 <= high})
    return rows


def check_out(revision: str, folder: Path) -> Path:
    """The revision as a worktree in `folder`, importable as it stands."""
    checkout = folder / "base"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", checkout, revision], cwd=ROOT, check=True)
    kernels = checkout / "gpuckpt" / "kernels"
    if not kernels.exists():
        kernels.symlink_to(checkout / "kernels")  # an install maps one to the other
    return checkout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="a file of benchmarks/, without .py")
    parser.add_argument("--base", default="HEAD", help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("arguments", nargs="*", help="after --: for the script")
    options = arguments(parser, rounds=1)
    own = [*options.arguments, *(["--quick"] if options.quick else [])]
    with tempfile.TemporaryDirectory(prefix="gpuckpt-base-") as folder:
        checkout = check_out(options.base, Path(folder))
        try:
            rows = compare(checkout, ROOT, options.script, own, options.rounds)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", checkout], cwd=ROOT, check=True)
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    table = Table(title=f"{options.script}: {options.rounds} rounds, medians")
    for column in ("figure", "base ms", "head ms", "head / base", "quartiles", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["figure"],
            f"{1e3 * row['base_s']:.4g}",
            f"{1e3 * row['head_s']:.4g}",
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} .. {row['high']:.3f}",
            "noise" if row["noise"] else "",
        )
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
