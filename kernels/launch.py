"""What every launcher needs before it calls a kernel: checked arguments, the architecture, the current device.

Launchers allocate nothing. They accept any strides of inputs, and outputs whose elements do not overlap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .numerics import INTERPRETED
from .tiles import TileConfig, nearest_arch, why_invalid

__all__ = ["arch_of", "check_activation", "check_out", "check_shape", "check_tile", "dtype_name", "on_device"]

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def dtype_name(t: Tensor) -> str:
    """ "fp32", "fp16" or "bf16"; TypeError for anything else."""
    try:
        return _DTYPES[t.dtype]
    except KeyError:
        raise TypeError(f"kernels take float32, float16 or bfloat16; got {t.dtype}") from None


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
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")


def check_shape(tensors: Mapping[str, tuple[Tensor | None, tuple[int, ...]]], like: Tensor) -> None:
    """Each tensor, where given, has the shape beside it and lives where `like` does."""
    for name, (t, shape) in tensors.items():
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {shape}")
        if t.device != like.device:
            raise ValueError(f"{name} is on {t.device}, the input on {like.device}")
        dtype_name(t)


def check_out(**outputs: Tensor | None) -> None:
    """Outputs must have an address of its own for each element; two programs would write one otherwise."""
    for name, t in outputs.items():
        if t is None:
            continue
        reach = 0
        for size, stride in sorted(zip(t.shape, t.stride(), strict=True), key=lambda p: p[1]):
            if size > 1 and stride <= reach:
                raise ValueError(
                    f"{name} overlaps itself (shape {tuple(t.shape)}, strides {t.stride()}); give a dense one"
                )
            reach += (size - 1) * stride if size > 1 else 0


def check_tile(kind: str, tile: TileConfig, dtype: str, arch: int) -> None:
    reason = why_invalid(kind, tile, dtype, arch)
    if reason is not None:
        raise ValueError(f"tile {tile.label} cannot be used: {reason}")
