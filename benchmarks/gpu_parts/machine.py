"""Parts "environment", "tests" and "sanitizer": what is installed, `pytest -m gpu`, and compute-sanitizer over one small run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from gpu_parts.common import Context, Facts

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "numpy", "numba", "array-api-compat", "ml_dtypes", "transformers",
    "liger-kernel", "quack-kernels", "gpuckpt",
)  # fmt: skip


def environment(context: Context) -> None:
    """Versions, the commit, the device, and `gpuckpt doctor`."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    context.say(
        "versions", python=platform.python_version(), commit=commit or None, date=time.strftime("%Y-%m-%d"), **versions
    )
    if not context.dry:
        found = torch.cuda.get_device_properties(0)
        context.say(
            "device", gpu=found.name, sms=found.multi_processor_count, l2_bytes=found.L2_cache_size,
            memory_bytes=found.total_memory, capability=torch.cuda.get_device_capability(),
        )  # fmt: skip
    context.item("doctor", lambda: _run(context, [sys.executable, "-m", "gpuckpt.cli.app", "doctor"], 60))


def tests(context: Context) -> None:
    """The tests that are marked gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=20", "-p", "no:cacheprovider", "tests"]
    if context.dry:
        command.insert(-1, "--collect-only")
    context.item("pytest -m gpu", lambda: _run(context, command, context.until_s - time.monotonic() - 3))


def sanitizer(context: Context) -> None:
    """memcheck and racecheck over the part "smoke"."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        context.say("compute-sanitizer", left_out="it is not installed")
        return
    smoke = [sys.executable, "-P", str(ROOT / "benchmarks" / "gpu_suite.py"), "--out", str(context.out / "sanitizer")]
    (context.out / "sanitizer").mkdir(exist_ok=True)
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", *smoke, "--part", "smoke"]
        context.item(kind, lambda command=command: _run(context, command, context.until_s - time.monotonic() - 3))


def _run(context: Context, command: list[str], limit_s: float) -> Facts:
    """The command's exit status as a check; its output goes to the log."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        cwd=ROOT if "pytest" in command else context.out,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=max(5.0, limit_s),
    )
    print(done.stdout[-6000:], done.stderr[-3000:], sep="\n")
    last = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    return {"ok": done.returncode == 0, "status": done.returncode, "last": last[:160]}
