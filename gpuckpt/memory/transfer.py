"""Moving what a block holds, byte for byte, to another block, and arrays to a host budget and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuckpt.memory.adapters import form_of
from gpuckpt.memory.adapters.inspect import library_of
from gpuckpt.memory.pools.host import HostBlock
from gpuckpt.memory.protocols import Holds

__all__ = ["copy_bytes", "copy_to_host"]


def copy_bytes(source: Any, target: Any) -> None:
    """Copy the bytes of one block into another of the same size, on the host or on a CUDA device, and wait for them."""
    if isinstance(source, HostBlock) and isinstance(target, HostBlock):
        np.copyto(np.asarray(target), np.asarray(source))
        return
    from gpuckpt.memory.adapters.cupy import flat_array

    if isinstance(source, HostBlock):
        flat_array(target).set(np.asarray(source), stream=target.stream)
        target.stream.synchronize()
        target.written()
    else:
        flat_array(source).get(stream=source.stream, out=np.asarray(target), blocking=True)


def copy_to_host(array: Any, budget: Holds, what: str) -> tuple[Callable[[], Any], int]:
    """Save a copy of `array` in a host budget. Returns how to make the array again where it was, and its bytes there."""
    on_host, back = form_of(array, library_of(array)).to_host(array)
    saved = budget.save(on_host, what)
    return lambda: back(saved.load()), int(array.nbytes)
