"""`gpuckpt doctor`: what is installed, what runs where, and what no budget caps.

It answers within two seconds, and so does without torch, whose import takes longer: its version is what is installed, and GPUs
are those that CUDA's driver names.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuckpt.memory.uncapped import uncapped
from gpuckpt.units import format_bytes

__all__ = ["doctor", "examine", "own_version"]

_NEEDED = {
    "torch": "pip install torch",
    "triton": "pip install triton (Linux); without it the plain torch path runs",
    "cupy": "pip install 'gpuckpt[cuda12]' or 'gpuckpt[cuda13]'; without it budgets on CUDA cannot hold bytes in a pool",
    "numba": "pip install numba; the solver needs it",
    "ml_dtypes": "pip install ml_dtypes; NumPy and CuPy arrays in bf16 and fp8 need it",
}


def examine() -> dict[str, Any]:
    """Versions, devices, back ends and uncapped memory as plain values."""
    packages = {name: _package(name, advice) for name, advice in _NEEDED.items()}
    gpus = _gpus()
    torch = packages["torch"]
    if gpus and (torch["version"] or "").endswith("+cpu"):
        torch["advice"] = "there is a GPU, and this torch is built without CUDA: pip install --force-reinstall torch"
    cpu = {"name": "cpu", "description": platform.processor() or platform.machine(), "memory_bytes": None}
    return {
        "gpuckpt": own_version(),
        "python": platform.python_version(),
        "packages": packages,
        "devices": [cpu, *gpus],
        "fused_operations": "Triton kernels on CUDA, plain torch on the CPU",
        "uncapped": [row._asdict() for row in uncapped("cuda:0" if gpus else "cpu")],
    }


def _package(name: str, advice: str) -> dict[str, Any]:
    """The version of a package; where it is missing or does not import, why, and what to do."""
    try:
        if name == "torch":
            return {"version": metadata.version("torch"), "advice": None}
        return {"version": getattr(importlib.import_module(name), "__version__", "?"), "advice": None}
    except ImportError as error:  # of metadata as well
        return {"version": None, "advice": advice, "error": str(error).splitlines()[0]}


def _gpus(driver: Any = None) -> list[dict[str, Any]]:
    """The GPUs that CUDA's driver shows this process: none where there is no driver, or it does not start."""
    try:
        cuda = driver or ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        device, nbytes, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(nbytes), device)
        arch = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            arch.append(str(value.value))
        description = f"{name.value.decode(errors='replace')}, sm_{''.join(arch)}"
        found.append({"name": f"cuda:{index}", "description": description, "memory_bytes": nbytes.value})
    return found


def own_version() -> str:
    """The package's version, as it was installed."""
    try:
        return metadata.version("gpuckpt")
    except metadata.PackageNotFoundError:
        return "(a source tree that is not installed)"


def doctor(console: Console) -> None:
    """Print `examine()` as tables."""
    found = examine()
    console.print(f"gpuckpt {found['gpuckpt']}, Python {found['python']}")
    packages = Table(title="packages", title_justify="left")
    packages.add_column("package")
    packages.add_column("version")
    packages.add_column("what to do")
    for name, row in found["packages"].items():
        packages.add_row(name, row["version"] or "[red]missing", row["advice"] or "")
    console.print(packages)
    devices = Table(title=f"devices ({found['fused_operations']})", title_justify="left")
    devices.add_column("device")
    devices.add_column("what it is")
    devices.add_column("memory", justify="right")
    for row in found["devices"]:
        nbytes = row["memory_bytes"]
        devices.add_row(row["name"], row["description"], "" if nbytes is None else format_bytes(nbytes))
    console.print(devices)
    outside = Table(title="what no budget caps", title_justify="left")
    outside.add_column("memory")
    outside.add_column("now", justify="right")
    outside.add_column("why")
    for row in found["uncapped"]:
        outside.add_row(row["name"], "-" if row["nbytes"] is None else format_bytes(row["nbytes"]), row["why"])
    console.print(outside)
