"""Triton's own way to a GPU, over a driver that runs nothing: specialisation, ptxas, tensor maps, the compiled launcher.

`start(arch)` turns this process into one whose torch tensors say that they are on a GPU of that architecture, and whose
kernels are compiled and launched for it. It cannot be undone, so it belongs into a process of its own (`launches.py`), which
must not have chosen Triton's interpreter. Nothing is computed: results are whatever the memory held.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent


class Unavailable(Exception):
    """The stand-in cannot be built here; the message says why."""


def library(name: str = "libcuda.so.1") -> Path:
    """The stand-in, from the cache or built now, under the name by which loaders find it. Raises `Unavailable`.

    A process that has loaded it as libcuda.so.1 gets it from then on for the real one, so a process that is to go on as it was
    loads it under another name.
    """
    import importlib.util

    spec = importlib.util.find_spec("triton")
    compiler = shutil.which("gcc")
    if spec is None or spec.origin is None:
        raise Unavailable("triton is not installed")
    if compiler is None:
        raise Unavailable("no C compiler: gcc is needed")
    headers = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    text = (HERE / "libcuda.c").read_bytes() + Path(__file__).read_bytes() + str(headers).encode()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuckpt" / "drivercuda"
    folder = root / hashlib.sha256(text).hexdigest()[:16]
    built = folder / name
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"part{os.getpid()}"
        command = [
            compiler,
            "-shared",
            "-fPIC",
            "-O1",
            "-w",
            f"-Wl,-soname,{name}",
            f"-I{headers}",
            str(HERE / "libcuda.c"),
            "-o",
            str(part),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise Unavailable(f"gcc failed: {done.stderr[-300:]}")
        part.replace(built)
    return built


class Driver:
    """What the stand-in has seen: `launches` and encoded tensor `maps`, and of the last launch `grid`, `threads` and `shared`."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name in ("launches", "maps"):
            getattr(self._c, f"drivercuda_{name}").restype = ctypes.c_long

    @property
    def launches(self) -> int:
        return self._c.drivercuda_launches()

    @property
    def maps(self) -> int:
        return self._c.drivercuda_maps()

    @property
    def grid(self) -> list[int]:
        return [self._c.drivercuda_grid(axis) for axis in range(3)]

    @property
    def threads(self) -> int:
        return self._c.drivercuda_threads()

    @property
    def shared(self) -> int:
        return self._c.drivercuda_shared()


def start(arch: int) -> Driver:
    """Make this process launch for a GPU of `arch` (80, 90, 100). Call before anything imports triton."""
    path = library()
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    os.environ.setdefault("TRITON_CACHE_DIR", str(path.parents[1] / "kernels"))
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.pop("GPUCKPT_BACKEND", None)
    driver = Driver(path)
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Stand(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=None: (arch // 10, arch % 10)
            self.get_current_stream = lambda device=None: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

    triton.runtime.driver.set_active(Stand())
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[method-assign, assignment]
    torch.cuda.get_device_capability = lambda device=None: (arch // 10, arch % 10)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
    torch.cuda.current_device = lambda: None  # the index of torch.device("cpu")
    return driver
