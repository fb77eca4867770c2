"""Shared by all rooms' tests."""

from __future__ import annotations

import os

# Kernels run in Triton's interpreter on CPU tensors; it has to be chosen before triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Two test processes on two cores: one intra-op thread each keeps them from fighting, and results repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
