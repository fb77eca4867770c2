"""What every launcher needs before it calls a kernel: checked arguments, the architecture, the current device.

Launchers allocate nothing. They accept any strides of inputs, and outputs whose elements do not overlap.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gpuckpt.checks import shown

from ..device.activations import ACTIVATIONS
from .dtypes import dtype_name
from .tiles import TileConfig, why_invalid

__all__ = [
    "check_activation",
    "check_out",
    "check_shape",
    "check_sums",
    "check_tile",
    "describable",
    "descriptor",
    "has_no_memory",
    "regular",
    "strides",
    "use_descriptors",
]


def check_activation(activation: str) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {shown(activation)}; choose one of {', '.join(ACTIVATIONS)}")


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


def check_sums(**sums: Tensor | None) -> None:
    """Sums, where wanted, are written in fp32, whatever the matrices are."""
    for name, t in sums.items():
        if t is not None and dtype_name(t) != "fp32":
            raise TypeError(f"{name} must be float32; got {t.dtype}")


def check_tile(kind: str, tile: TileConfig, dtype: str, arch: int) -> None:
    reason = why_invalid(kind, tile, dtype, arch)
    if reason is not None:
        raise ValueError(f"tile {tile.label} cannot be used: {reason}")


def describable(*tensors: Tensor) -> bool:
    """Whether a tensor descriptor (TMA) can describe every one: a non-empty 16-bit matrix with contiguous rows, each starting
    at a multiple of 16 bytes. Others go through pointers: a wrong stride gives wrong tiles, silently (triton#10927)."""
    return all(
        t.dim() == 2
        and t.element_size() == 2
        and t.numel() > 0
        and max(t.shape) < 1 << 31
        and t.stride(1) == 1
        and t.stride(0) > 0
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) * t.element_size() < 1 << 40
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def regular(x: Tensor, *weights: Tensor) -> bool:
    """Whether a GEMM's operands are what the large tiles are made for: contiguous rows that start at multiples of 16 elements and
    of 16 bytes, sizes that are multiples of 16, of x (M, K) but for M. Otherwise every element has an address of its own, which
    takes more registers than a large tile leaves: see `tiles.unaligned_tile`."""
    sizes = (x.shape[1], *(n for w in weights for n in w.shape))
    return all(n % 16 == 0 for n in sizes) and all(
        t.stride(1) == 1 and t.stride(0) % 16 == 0 and _address(t) % 16 == 0 for t in (x, *weights)
    )


def _address(t: Tensor) -> int:
    """Where t begins; for a tensor without memory, where it would begin in an aligned one."""
    if has_no_memory(t):
        return int(t.storage_offset()) * t.element_size()
    return t.data_ptr()


def has_no_memory(t: Tensor) -> bool:
    """Whether t has a shape, strides and a place in its storage, but no address."""
    return t.is_meta or isinstance(t, FakeTensor)


def use_descriptors(asked: bool | None, arch: int, is_regular: bool, *tensors: Tensor) -> bool:
    """Whether to load through descriptors: on sm_90 and sm_100 for regular operands, where all tensors allow it, or as asked.

    Raises ValueError where they are asked for and a tensor does not allow it.
    """
    if asked is None:
        return arch in (90, 100) and is_regular and describable(*tensors)
    if asked and not describable(*tensors):
        raise ValueError(
            "tensor descriptors need 16-bit matrices with contiguous rows, 16-byte aligned and at least one element"
        )
    return asked


def descriptor(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A host-side descriptor of t in blocks (rows, cols); it allocates nothing on the device."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])


def strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides for a kernel's arguments, zeros for an absent tensor."""
    return t.stride() if t is not None else (0,) * dims
