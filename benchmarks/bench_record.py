"""Results that can be compared later: each run is one JSON line, added to those before it, never in their place.

A line holds `about` (commit, whether the checkout had changes, date in UTC, machine, versions) and the figures. Where
GPUCKPT_RESULTS names a file, lines go there instead: `benchmarks/compare.py` reads them from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["QUICK", "RESULTS", "about", "append", "arguments", "latest", "machine"]

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = Path("out/quick")
"""Where quick runs write: their figures are no results."""
_PACKAGES = ("torch", "triton", "numpy", "numba", "cupy-cuda12x", "cupy-cuda13x", "transformers")


def machine() -> dict[str, Any]:
    """Processor, cores, load before the run, GPU if there is one, and torch's threads where torch is loaded."""
    import sys

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (line.split(":")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = next(names, model).strip()
    found: dict[str, Any] = {"processor": model, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def about() -> dict[str, Any]:
    """What a figure cannot be read without."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed": None if changes is None else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions,
    }


def arguments(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """The command line's options, and `--quick`: under a minute, by the values of `quick` where none are given. A quick run adds
    its line to a file of its own."""
    parser.add_argument("--quick", action="store_true", help="small, in under a minute; results go to out/quick")
    found = parser.parse_args()
    if found.quick:
        for name, value in quick.items():
            if getattr(found, name) == parser.get_default(name):
                setattr(found, name, value)
        os.environ.setdefault("GPUCKPT_RESULTS", str(QUICK / "results.jsonl"))
    return found


def append(path: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Add a line with `figures` to `path` and return it as it was written."""
    record = {"about": about(), **figures}
    path = Path(os.environ.get("GPUCKPT_RESULTS") or path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def latest(path: Path) -> dict[str, Any]:
    """The last line of `path`."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy without its history
    return done.stdout.strip()
