"""`gpuckpt doctor`: what is installed, what runs where, and what no budget caps."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gpuckpt.memory.uncapped import uncapped
from gpuckpt.units import format_bytes

__all__ = ["doctor", "examine"]

_NEEDED = {
    "torch": "pip install torch",
    "triton": "pip install triton (Linux); without it the plain torch path runs",
    "cupy": "pip install 'gpuckpt[cuda12]' or 'gpuckpt[cuda13]'; without it budgets on CUDA cannot hold bytes in a pool",
    "numba": "pip install numba; the solver needs it",
    "ml_dtypes": "pip install ml_dtypes; NumPy and CuPy arrays in bf16 and fp8 need it",
}


def examine() -> dict[str, Any]:
    """Versions, devices, back ends and uncapped memory as plain values."""
    packages = {}
    for name, advice in _NEEDED.items():
        try:
            module = importlib.import_module(name)
            packages[name] = {"version": getattr(module, "__version__", "?"), "advice": None}
        except ImportError as error:
            packages[name] = {"version": None, "advice": advice, "error": str(error).splitlines()[0]}
    devices: list[dict[str, Any]] = [
        {"name": "cpu", "description": platform.processor() or platform.machine(), "memory_bytes": None}
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        devices.append(
            {
                "name": f"cuda:{index}",
                "description": f"{properties.name}, {arch}",
                "memory_bytes": properties.total_memory,
            }
        )
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return {
        "gpuckpt": _own_version(),
        "python": platform.python_version(),
        "packages": packages,
        "devices": devices,
        "fused_operations": "Triton kernels on CUDA, plain torch on the CPU",
        "uncapped": [row._asdict() for row in uncapped(device)],
    }


def _own_version() -> str:
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
