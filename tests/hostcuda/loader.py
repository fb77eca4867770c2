"""Puts the host-memory runtime under CuPy: a finder for one module, in place before anybody imports CuPy.

It does nothing where a real device is present, and builds nothing until CuPy is imported for the first time.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from tests.hostcuda import build

RUNTIME = "cupy_backends.cuda.api.runtime"


def real_device_present() -> bool:
    """Whether a CUDA driver with at least one device is on this machine."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


class Finder:
    """Answers for CuPy's runtime module alone. `why_not` says why it could not, once it was asked."""

    why_not: str | None = None
    module: Path | None = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != RUNTIME:
            return None
        try:
            self.module = build.cached_module()
        except build.Unavailable as reason:
            self.why_not = str(reason)
            return None
        loader = importlib.machinery.ExtensionFileLoader(name, str(self.module))
        return importlib.util.spec_from_file_location(name, str(self.module), loader=loader)


def install() -> Finder:
    """Put the finder in place; idempotent. A finder that may not act says why in `why_not`."""
    for finder in sys.meta_path:
        if isinstance(finder, Finder):
            return finder
    finder = Finder()
    if real_device_present():
        finder.why_not = "a real CUDA device is present"
    elif RUNTIME in sys.modules:
        finder.why_not = "CuPy was imported before the stand-in was in place"
    else:
        # CuPy's CUB carries a static CUDA runtime of its own and ignores its failure: sums would be garbage.
        os.environ["CUPY_ACCELERATORS"] = ""
        sys.meta_path.insert(0, finder)
    return finder


def guard(cupy: Any) -> None:
    """Make the entry points raise that would bring a CUDA runtime of their own, past the stand-in."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no kernels on the host-memory stand-in for CUDA")

    cupy.random.default_rng = refuse
    cupy.random.Generator = refuse
    for name in ("device_reduce", "device_scan", "device_csrmv", "device_segmented_reduce", "device_histogram"):
        if hasattr(getattr(cupy.cuda, "cub", None), name):
            setattr(cupy.cuda.cub, name, refuse)
