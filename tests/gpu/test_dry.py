"""The tests that need a GPU, on the CPU: what they say cannot show there, but a slip in them can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run by themselves here")
def test_the_gpu_tests_run_on_the_cpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(Path(__file__).parent / "test_on_a_gpu.py")]
    env = {**os.environ, "GPUCKPT_GPU_TESTS": "dry"}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 skipped" in done.stdout
