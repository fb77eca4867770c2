"""`device` for the tests that need a GPU; GPUCKPT_GPU_TESTS=dry runs their code on the CPU, so that a slip shows without one."""

from __future__ import annotations

import os

import pytest
import torch

from gpuckpt.kernels.device.casts import INTERPRETED


@pytest.fixture
def device() -> torch.device:
    if os.environ.get("GPUCKPT_GPU_TESTS") == "dry":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if INTERPRETED:
        pytest.skip("needs compiled kernels: unset TRITON_INTERPRET")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def dry(device) -> bool:
    return device.type == "cpu"
