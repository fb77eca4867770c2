"""Importing the room, and using it on NumPy arrays, loads no torch, CuPy or Triton."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import gpuckpt.segments as s
from gpuckpt import CheckpointBudget
import numpy as np
net = s.CheckpointedNetwork([s.Dense(2, 2, "tanh")] * 3, budget=CheckpointBudget("1KiB", device="cpu"))
net.backward(net.forward(np.ones(2, np.float32)))
c = s.ActivationCheckpointer(s.CheckpointConfig(storage_dtype="float16"))
c.save(0, np.ones(4, np.float32))
c.get(0)
print(sorted({"torch", "cupy", "triton"} & set(sys.modules)))
"""


def test_numpy_users_load_numpy_only() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import gpuckpt.segments as segments

    assert segments.__all__ == sorted(segments.__all__, key=lambda n: (not n[0].isupper(), n))
    for name in segments.__all__:
        assert getattr(segments, name).__doc__, f"{name} has no docstring"
