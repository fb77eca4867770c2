"""What a budget does not count, measured where it can be: for `gpuckpt doctor` and every report.

A budget caps what it holds. Device memory also goes to things that no budget sees; this module names each of them, and gives its
bytes at this moment where the driver, torch or CuPy can tell. It loads no library that is not loaded already, and creates no
CUDA context.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

__all__ = ["Uncapped", "uncapped"]


class Uncapped(NamedTuple):
    """One kind of memory outside of every budget. `nbytes` is None where it cannot be measured here; `why` says what it is."""

    name: str
    nbytes: int | None
    why: str


def uncapped(device: str = "cpu", *, model: Any = None, optimizer: Any = None) -> list[Uncapped]:
    """What no budget on `device` ("cpu" or "cuda:N") counts, in bytes. A torch `model` and `optimizer` are measured."""
    listed = [
        Uncapped(
            "parameters and buffers", _sum_bytes(_model_tensors(model)), "they belong to the model, not to a step"
        ),
        Uncapped("gradients", _sum_bytes(_gradients(model)), "autograd allocates them as backward goes"),
        Uncapped("optimizer state", _sum_bytes(_state_tensors(optimizer)), "it belongs to the optimizer"),
        Uncapped(
            "transient outputs",
            None,
            "an operation's output exists before autograd saves it, and while it is not saved",
        ),
    ]
    return listed + (_host() if device == "cpu" else _cuda(int(device.removeprefix("cuda:"))))


def _host() -> list[Uncapped]:
    return [
        Uncapped(
            "process, resident",
            _resident_bytes(),
            "all of this process in memory: interpreter, libraries, budgets and arrays",
        ),
        Uncapped(
            "allocator slack",
            None,
            "malloc keeps freed memory, and pads blocks; a host pool pads each by at most 63 bytes",
        ),
    ]


def _cuda(index: int) -> list[Uncapped]:
    listed: list[Uncapped] = []
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    known = 0
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        reserved, allocated = torch.cuda.memory_reserved(index), torch.cuda.memory_allocated(index)
        known += reserved
        listed.append(Uncapped("torch's cache", reserved - allocated, "blocks that torch's allocator keeps for later"))
    else:
        listed.append(Uncapped("torch's cache", None, "torch has not used CUDA in this process"))
    if cupy is not None and cupy.cuda.is_available():
        with cupy.cuda.Device(index):
            pool = cupy.get_default_memory_pool()
            known += pool.total_bytes()
            listed.append(
                Uncapped("CuPy's default pool", pool.total_bytes(), "arrays made outside of a budget, and its cache")
            )
            unused, whole = cupy.cuda.runtime.memGetInfo()
        rest = whole - unused - known
        listed.append(
            Uncapped(
                "context and others", rest, "CUDA contexts, libraries' workspaces, budgets' pools, and other processes"
            )
        )
    elif torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        unused, whole = torch.cuda.mem_get_info(index)
        rest = whole - unused - known
        listed.append(
            Uncapped(
                "context and others", rest, "CUDA contexts, libraries' workspaces, budgets' pools, and other processes"
            )
        )
    else:
        listed.append(Uncapped("context and others", None, "no library in this process has reached a CUDA device"))
    listed.append(
        Uncapped("library workspaces", None, "cuBLAS and cuDNN take scratch memory of their own, some MiB a stream")
    )
    return listed


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not on Linux
        return None


def _model_tensors(model: Any) -> list[Any] | None:
    return None if model is None else [*model.parameters(), *model.buffers()]


def _gradients(model: Any) -> list[Any] | None:
    return None if model is None else [p.grad for p in model.parameters() if p.grad is not None]


def _state_tensors(optimizer: Any) -> list[Any] | None:
    if optimizer is None:
        return None
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if hasattr(value, "untyped_storage")]


def _sum_bytes(tensors: list[Any] | None) -> int | None:
    """Bytes of distinct storages."""
    if tensors is None:
        return None
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
