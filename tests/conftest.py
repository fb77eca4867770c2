"""Shared by all rooms' tests."""

from __future__ import annotations

import os

# Two test processes on two cores: one intra-op thread each keeps them from fighting, and results repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Kernels run in Triton's interpreter on CPU tensors, which is chosen before triton is imported. On a GPU they are compiled, and
# tests that want the interpreter are skipped unless the variable is set from outside.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.hostcuda import loader

# Before anybody imports CuPy: its one runtime module is then met over host memory. Nothing is built until then.
loader.install()

from tests.faults import fail_request  # noqa: E402, F401
from tests.hostcuda.fixture import _hostcuda_runtime, hostcuda  # noqa: E402, F401
from tests.hostcuda.torch_on_host import cuda_tensors  # noqa: E402, F401


def pytest_terminal_summary(terminalreporter):
    """Print what the tests of the cap counted: operations, faults injected, violations."""
    passed = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    lines = [line for report in passed for line in report.capstdout.splitlines() if line.endswith("violations")]
    if lines:
        terminalreporter.section("the cap")
        for line in sorted(lines):
            terminalreporter.write_line(line)
