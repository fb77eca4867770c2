"""y = act(x W^T + b) and its backward: by the fused Triton kernels where they can run, by the array API elsewhere.

The kernels serve float32, float16 and bfloat16 on a CUDA device, torch tensors and CuPy arrays alike: CuPy arrays are
shown to them as torch views of the same memory, on CuPy's current stream. `GPUCKPT_BACKEND=triton|torch` overrides the
choice: `triton` on torch CPU tensors runs the kernels in Triton's interpreter, `torch` keeps to plain array code.
NumPy arrays and float64 always take plain array code.

Shapes: x (M, K), weight (N, K), bias (N), y and dy (M, N). Either way z = x W^T + b is computed again in backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gpuckpt.backend import backend_named
from gpuckpt.memory.adapters.inspect import library_of
from gpuckpt.memory.dlpack import exchange
from gpuckpt.segments.arrays import Array, compat
from gpuckpt.segments.pointwise import activate, derivative

__all__ = ["as_tensors", "linear_backward", "linear_forward", "runs_fused"]

_KERNEL_DTYPES = ("float32", "float16", "bfloat16")


def runs_fused(x: Array) -> bool:
    """Whether a layer's arithmetic on `x` runs on the Triton kernels. Raises `ValueError` for an unknown GPUCKPT_BACKEND."""
    choice = backend_named()
    library = library_of(x)
    if library == "numpy" or choice == "torch" or str(x.dtype).removeprefix("torch.") not in _KERNEL_DTYPES:
        return False
    return library == "cupy" or bool(x.is_cuda) or choice == "triton"


def linear_forward(x: Array, weight: Array, bias: Array | None, activation: str) -> Array:
    """act(x weight^T + bias), shape (M, N), in the library and dtype of `x`."""
    if not runs_fused(x):
        return activate(activation, _pre_activation(x, weight, bias))
    y = _empty(x, (x.shape[0], weight.shape[0]), x.dtype)
    with as_tensors(x, weight, bias, y) as (tx, tw, tb, ty):
        from gpuckpt.kernels.linear import linear_fwd

        linear_fwd(tx, tw, tb, ty, activation=activation)
    return y


def linear_backward(
    x: Array, weight: Array, bias: Array | None, dy: Array, activation: str
) -> tuple[Array, Array, Array | None]:
    """(dx, dweight, dbias) for dy, in the shapes of x, weight and bias; dbias is None where bias is."""
    xp = compat.array_namespace(x)
    if activation != "identity" and runs_fused(x):
        dz, dbias = _fused_dz(x, weight, bias, dy, activation)
    else:
        # The identity's dz is dy: there is nothing to recompute, and a kernel would only copy it.
        dz = dy if activation == "identity" else dy * derivative(activation, _pre_activation(x, weight, bias))
        dbias = xp.sum(dz, axis=0, dtype=dz.dtype) if bias is not None else None
    # Two plain GEMMs: every library hands them to its BLAS, on a CUDA device cuBLAS.
    return xp.matmul(dz, weight), xp.matmul(dz.T, x), dbias


def _pre_activation(x: Array, weight: Array, bias: Array | None) -> Array:
    z = compat.array_namespace(x).matmul(x, weight.T)
    return z if bias is None else z + bias


def _fused_dz(x: Array, weight: Array, bias: Array | None, dy: Array, activation: str) -> tuple[Array, Array | None]:
    xp = compat.array_namespace(x)
    dz = _empty(x, dy.shape, x.dtype)
    with as_tensors(x, weight, bias, dy, dz) as (tx, tw, tb, tdy, tdz):
        from gpuckpt.kernels.linear import db_partials_shape, linear_recompute_bwd

        partials = _empty(x, db_partials_shape(tx, tw), xp.float32) if bias is not None else None
        with as_tensors(partials) as (tpartials,):
            linear_recompute_bwd(tx, tw, tb, tdy, tdz, tpartials, activation=activation)
    if bias is None:
        return dz, None
    return dz, xp.astype(xp.sum(partials, axis=0), bias.dtype, copy=False)


def _empty(like: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return compat.array_namespace(like).empty(shape, dtype=dtype, device=compat.device(like))


@contextlib.contextmanager
def as_tensors(*arrays: Array | None) -> Iterator[list[Any]]:
    """The arrays as torch tensors of the same memory; inside, what is launched goes to CuPy's current stream.

    The arrays must outlive the block, not the kernels: CuPy gives freed memory back to the stream it was used on.
    """
    if all(a is None or library_of(a) == "torch" for a in arrays):
        yield list(arrays)
        return
    import cupy
    import torch

    device = next(a for a in arrays if a is not None).device.id
    pointer = cupy.cuda.get_current_stream(device).ptr
    # Pointer 0 is the default stream, which torch does not accept as an external one.
    stream = torch.cuda.ExternalStream(pointer, device=device) if pointer else torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        yield [None if a is None else exchange(_exportable(a), "torch") for a in arrays]


def _exportable(array: Array) -> Array:
    # CuPy 14 exports arrays with negative strides wrongly; only inputs can have them, outputs are made here.
    import cupy

    return cupy.ascontiguousarray(array) if any(s < 0 for s in array.strides) else array
