"""What launchers know of the device: its architecture, shared memory and multiprocessors."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..device.casts import INTERPRETED

__all__ = ["SHARED_MEMORY_BYTES", "SM_COUNT", "arch_of", "multiprocessors", "nearest_arch", "on_device"]

SHARED_MEMORY_BYTES = {0: 1 << 40, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Shared memory that one block may use, by architecture (CUDA programming guide, table of compute capabilities)."""

SM_COUNT = {0: 1, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of the largest common card (A100, RTX 3090 class, RTX 4090, H100 SXM, B200, RTX 5090)."""

_NOTHING = contextlib.nullcontext()


def nearest_arch(major: int, minor: int) -> int:
    """The architecture whose table serves compute capability major.minor: the newest one of the same family, not newer.

    >>> nearest_arch(8, 7), nearest_arch(9, 0), nearest_arch(10, 3), nearest_arch(12, 1)
    (86, 90, 100, 120)
    """
    cc = 10 * major + minor
    fitting = [a for a in SHARED_MEMORY_BYTES if 0 < a <= cc]
    if not fitting:
        raise ValueError(f"compute capability {major}.{minor} is not supported; kernels need 8.0 (Ampere) or newer")
    return max(fitting)


def arch_of(t: Tensor) -> int:
    """The architecture whose tiles serve t's device: 0 on the host, 80, 86, 89, 90, 100 or 120 on a GPU."""
    if t.is_cuda:
        return nearest_arch(*torch.cuda.get_device_capability(t.device))
    if not INTERPRETED:
        raise ValueError(
            f"Triton kernels cannot run on a tensor of device {t.device}: use a CUDA device, "
            "or set TRITON_INTERPRET=1 before triton is imported"
        )
    return 0


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Make t's device current: Triton launches on the current device, whatever its arguments live on."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(t.device)


def multiprocessors(t: Tensor) -> int:
    """How many programs a persistent grid should have on t's device."""
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 1
