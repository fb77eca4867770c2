"""Which device a budget belongs to."""

from __future__ import annotations

import re
import sys
from typing import Any

from gpuckpt.checks import check_choice, shown
from gpuckpt.errors import BackendUnavailable

__all__ = ["choose_device", "choose_streams"]

_DEVICE = re.compile(r"cpu|cuda(?::(?P<index>\d{1,4}))?")


def choose_device(device: Any = None) -> str:
    """ "cpu" or "cuda:N". `device`: such a string, "cuda" for the current device, a torch device, or None, which takes the
    current CUDA device where there is one. Raises `ValueError` for another name, `BackendUnavailable` where CUDA is asked for
    and no package that can reach it is installed."""
    if device is None:
        return f"cuda:{_current_cuda()}" if _cuda_is_there() else "cpu"
    match = _DEVICE.fullmatch(str(device))
    if match is None:
        raise ValueError(f'device must be "cpu", "cuda", "cuda:N" or None, got {shown(device)}')
    if str(device) == "cpu":
        return "cpu"
    return f"cuda:{_current_cuda() if match['index'] is None else int(match['index'])}"


def choose_streams(library: Any = None) -> Any:
    """ "torch", "cupy" or None (to be found out when a pool is made). Raises `ValueError` for another name."""
    check_choice(library, "streams", (None, "torch", "cupy"))
    return library


def _cuda_is_there() -> bool:
    # A program that works with torch has loaded it, and then torch decides: it may be a CPU build on a machine with a GPU.
    torch = sys.modules.get("torch")
    if torch is not None:
        return bool(torch.cuda.is_available())
    cupy = sys.modules.get("cupy")
    return cupy is not None and bool(cupy.cuda.is_available())


def _current_cuda() -> int:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.current_device())
    try:
        import cupy
    except ImportError:
        raise BackendUnavailable("a CUDA budget needs CuPy: install gpuckpt[cuda12] or gpuckpt[cuda13]") from None
    return int(cupy.cuda.Device().id)
