"""`gpuckpt bench`: the benchmarks that lie beside the package in a checkout, by name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["benchmarks", "run_benchmark"]

_GPU = ("gpu_suite",)
"""What wants a GPU; the others measure this machine's processor."""


def _folder() -> Path:
    """The checkout's benchmarks. Raises `FileNotFoundError` for a package that was installed without them."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not (folder / "bench_record.py").exists():
        raise FileNotFoundError(
            "the benchmarks are no part of the installed package: get the source tree, run `pip install -e .` in it, and "
            "`gpuckpt bench` there"
        )
    return folder


def benchmarks() -> dict[str, str]:
    """Every benchmark by name, with the first paragraph of what it says of itself."""
    found = {}
    for path in sorted(_folder().glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text:
            found[path.stem] = " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())
    return found


def run_benchmark(name: str, device: str | None, more: Sequence[str]) -> int:
    """Run one in a process of its own, in the folder at hand; returns its exit code. `more`: its own options."""
    known = benchmarks()
    if name not in known:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(known)}")
    if device is not None:
        runs_on = "cuda" if name in _GPU else "cpu"
        if device.partition(":")[0] != runs_on:
            others = ", ".join(each for each in known if (each in _GPU) != (name in _GPU))
            raise ValueError(f"{name} runs on {runs_on}, and not on --device {device}; there run {others}")
    folder = _folder()
    path = os.pathsep.join(filter(None, (str(folder.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(folder / f"{name}.py"), *more]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
