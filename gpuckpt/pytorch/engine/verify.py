"""Whether work that is run again saves what it saved in forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor

from gpuckpt.checks import shown
from gpuckpt.errors import RecomputeMismatch
from gpuckpt.pytorch._torch_internals import version_number
from gpuckpt.pytorch.engine.kept.current import paused
from gpuckpt.pytorch.engine.subclasses import parts_of

__all__ = ["Verify", "check_verify", "checksum", "compare", "differ", "seen", "sum_of", "unread", "version_of"]

Verify = Literal["metadata", "bitwise"]

_NAMES = ("shape", "dtype", "device", "strides", "contents")


def check_verify(verify: object) -> None:
    """Raise `ValueError` for what is no way to verify a recompute: a typo would check less than was asked for."""
    if not (verify is None or (isinstance(verify, str) and verify in ("metadata", "bitwise"))):
        raise ValueError(f"verify={shown(verify)}: expected None, 'metadata' or 'bitwise'")


def seen(tensor: torch.Tensor, verify: Verify | None) -> tuple[Any, ...]:
    """What is compared of a saved tensor: shape, dtype and device; under "metadata" its strides, under "bitwise" its bytes."""
    try:
        shape = tensor.shape
    except RuntimeError:
        raise TypeError(
            "a nested tensor of strided layout cannot be saved by checkpointed work; make it with layout=torch.jagged"
        ) from None
    if verify is None:
        return shape, tensor.dtype, tensor.device
    stride = tensor.stride() if tensor.layout is torch.strided else None
    details = shape, tensor.dtype, tensor.device, stride
    return (*details, checksum(tensor)) if verify == "bitwise" else details


_unread = (
    threading.local()
)  # `storages`: of what is saved and read by no backward, in the replays that this thread is in


def unread(tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Until what is returned is called, the contents of `tensors` are not compared in this thread: batch_norm saves running
    statistics, updates them in the same kernel, and reads none of them in a backward of training."""
    before: frozenset[int] = getattr(_unread, "storages", frozenset())
    _unread.storages = before.union(tensor.untyped_storage()._cdata for tensor in tensors)

    def end() -> None:
        _unread.storages = before

    return end


def compare(number: int, before: tuple[Any, ...], now: tuple[Any, ...], tensor: torch.Tensor) -> None:
    """Raise `RecomputeMismatch` where saved tensor `number` is not what it was. `tensor`: what it is now."""
    if now == before:
        return
    storages = getattr(_unread, "storages", ())
    if storages and now[:4] == before[:4] and tensor.untyped_storage()._cdata in storages:
        return
    changes = [
        f"{name} (contents differ)" if name == "contents" else f"{name} ({old} before, {new} now)"
        for name, old, new in zip(_NAMES, before, now, strict=False)
        if old != new
    ]
    raise RecomputeMismatch(
        f"saved tensor number {number} of checkpointed work is not the same when the work is run again: "
        f"{', '.join(changes)}. It must do the same both times; with random numbers keep preserve_rng_state=True"
    )


def version_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Which storage a tensor is in, and how often that was changed in place."""
    return (tensor.untyped_storage()._cdata, version_number(tensor)) if tensor.layout is torch.strided else None


def checksum(tensor: torch.Tensor) -> int:
    """64 bits that change with any byte of the tensor and, unlike an exclusive or, with their order."""
    if tensor.is_meta:
        return 0
    parts = parts_of(tensor)
    if len(parts) != 1 or parts[0] is not tensor:
        return hash(tuple(map(checksum, parts)))
    with paused():
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
        # Odd weights, so that no bit is multiplied away.
        weights = torch.arange(1, 2 * words.numel() + 1, 2, device=words.device)
        return int((words * weights).sum())


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_of(tensor: torch.Tensor | None) -> int | None:
    """What the bits of a plain tensor add up to as integers, which changes with nearly anything that writes to it; None for what
    has none that could be read now."""
    if (
        tensor is None
        or tensor.layout is not torch.strided
        or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or tensor.element_size() not in _INTEGERS
        or tensor.is_meta
        or tensor.is_complex()
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    return int(tensor.detach().view(_INTEGERS[tensor.element_size()]).sum())


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape have other contents; False for what has none that could be compared."""
    return one.layout is torch.strided and not isinstance(one, FakeTensor) and not torch.equal(one, other)
