"""Reading and writing 16-bit floats alike on a GPU and in Triton's interpreter.

On a GPU the tensor cores are fed the 16-bit operands as loaded and `.to(dtype)` rounds to nearest even. The interpreter
computes on bfloat16's raw bits as if they were integers (triton 3.6 to 3.9) and truncates when it casts down, so under it
operands are widened to fp32 first and results rounded here. `INTERPRET` is a constexpr: a GPU build contains none of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

__all__ = ["INTERPRETED", "narrow", "operand", "widen"]

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""Whether kernels of this process run in the interpreter; fixed when this module is imported, as `triton.jit` is."""


@triton.jit
def widen(v, INTERPRET: tl.constexpr):
    """A float block as fp32, exactly."""
    if INTERPRET and v.dtype == tl.bfloat16:
        r = (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        r = v.to(tl.float32)
    return r


@triton.jit
def operand(v, INTERPRET: tl.constexpr):
    """A block as `tl.dot` should get it: unchanged on a GPU, fp32 in the interpreter (right for bf16, and 10x faster)."""
    if INTERPRET:
        v = widen(v, True)
    return v


@triton.jit
def narrow(v, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """An fp32 block rounded to nearest even as DTYPE."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = v.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding could carry a NaN's payload into infinity: keep a quiet NaN instead.
        r = tl.where(v == v, up, (bits >> 16) | 0x40).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        r = v.to(DTYPE)
    return r
