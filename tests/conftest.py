"""Shared by all rooms' tests."""

from __future__ import annotations

import os

# Kernels run in Triton's interpreter on CPU tensors; it has to be chosen before triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Two test processes on two cores: one intra-op thread each keeps them from fighting, and results repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
