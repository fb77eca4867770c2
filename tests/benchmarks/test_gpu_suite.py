"""The GPU suite's code runs without a GPU, on tiny shapes through Triton's interpreter, and its checks can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


def test_the_suite_checks_every_operation_without_a_gpu(tmp_path):
    out = tmp_path / "suite.json"
    done = subprocess.run([sys.executable, SUITE, "--out", out], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert len(report["checks"]) == 12
    assert {row["dtype"] for row in report["checks"]} == {"float32", "bfloat16", "float16"}
    assert all(row["passed"] for row in report["checks"])


def test_a_wrong_result_fails_the_suite(tmp_path):
    broken = tmp_path / "broken.py"
    source = SUITE.read_text()
    assert 'activation="gelu_tanh"' in source
    broken.write_text(source.replace('activation="gelu_tanh"', 'activation="silu"'))
    done = subprocess.run([sys.executable, broken], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
