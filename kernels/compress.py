"""Activations stored in one byte an element: int8, fp8 e4m3 or fp8 e5m2, with an fp32 scale for each 128 elements of a row.

    s = max |x| of the block / largest code value        code = round(x / s)        x' = code * s

Rounding is to nearest (ties away from zero), or stochastic: up with the probability that makes the mean of x' exactly x, drawn
from Philox by (seed, row, column), so the same seed gives the same bits and rows can be compressed a chunk at a time.

Error bound, with a the block's largest magnitude, for rounding to nearest; stochastic rounding at most doubles it:
    int8    |x' - x| <= a / 254
    e4m3    |x' - x| <= max(|x| / 16, a / 458752)                  (Micikevicius et al. 2022, arXiv:2209.05433: 3 mantissa bits)
    e5m2    |x' - x| <= max(|x| / 8, a / 7516192768)               (2 mantissa bits, more range)
each plus |x| 2^-22 for the fp32 arithmetic; a result written as 16-bit floats is rounded once more. A block with a NaN or an
infinity comes back as NaN everywhere; one whose largest magnitude is below 2^-100 comes back as zero.

Codes are built and read with integer arithmetic, not with the hardware's fp8 conversions, which sm_80 and sm_86 lack: the
same arithmetic on every architecture and in the interpreter. Their bits are those of torch.int8, float8_e4m3fn and float8_e5m2.

Shapes: x (M, K), fp32, fp16 or bf16; codes (M, K) uint8; scales (M, ceil(K / 128)) fp32. K may be any size; any strides.
A forward and a recompute that load codes directly are in `compressed_linear`. Not here: allocation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32, uint8

from .launch import check_out, check_shape, dtype_name, on_device
from .numerics import INTERPRETED, narrow, widen
from .registry import STORED, KernelSpec, block_dtypes, block_meta, make_spec
from .tiles import BlockTile

__all__ = ["FORMATS", "GROUP", "check_codes", "compress", "decode", "decompress", "scales_shape", "specs"]

GROUP = 128
"""Elements of a row that share a scale."""

FORMATS = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0}
"""Format -> largest value a code stands for."""


_TILE = BlockTile(32, GROUP, 4)


@triton.jit
def _fp8_code(v, shift_up, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, LARGEST: tl.constexpr):
    """The byte for v >= 0. With the exponent field E no less than LOWEST, that of the smallest normal number, the unit in the
    last place is 2^(E - 127 - MANTISSA), and (E - LOWEST) 2^MANTISSA + v / unit counts the codes below v, subnormal ones
    included."""
    exponent = tl.maximum((v.to(tl.int32, bitcast=True) >> 23) & 0xFF, LOWEST)
    per_unit = ((254 + MANTISSA - exponent) << 23).to(tl.float32, bitcast=True)
    steps = tl.floor(v * per_unit + shift_up).to(tl.int32)
    return tl.minimum(((exponent - LOWEST) << MANTISSA) + steps, LARGEST)


@triton.jit
def decode(codes, scale, FORMAT: tl.constexpr):
    """uint8 codes (R, C) and their rows' scales (R,) fp32 -> what they stand for, fp32, rounded once."""
    if FORMAT == "int8":
        value = codes.to(tl.int8, bitcast=True).to(tl.float32)
    elif FORMAT == "e5m2":
        # e5m2 is the upper byte of an fp16.
        value = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        tl.static_assert(FORMAT == "e4m3", "unknown format")
        # Its exponent and mantissa moved into an fp16's read as the value over 256 (the biases are 7 and 15); the scale of the
        # row takes the 256, which is exact, so an element costs one multiplication.
        wide = codes.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
        scale = scale * 256.0
    return value * scale[:, None]


@triton.jit
def compress_kernel(
    p_x,
    p_codes,
    p_scales,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_cm,
    stride_ck,
    stride_sm,
    stride_sg,
    seed,
    first_row,
    FORMAT: tl.constexpr,
    LARGEST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    groups = tl.cdiv(K, GROUP)
    i_g = (tl.program_id(0) % groups).to(tl.int64)
    o_m = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_k = i_g * GROUP + tl.arange(0, GROUP)
    m = (o_m < M)[:, None] & (o_k < K)[None, :]
    x = widen(tl.load(p_x + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk, mask=m, other=0.0), INTERPRET)
    finite = tl.abs(x) < float("inf")  # false for NaN
    x = tl.where(finite, x, 0.0)
    largest = tl.max(tl.abs(x), axis=1)
    largest = tl.where(largest < 7.888609052210118e-31, 0.0, largest)
    # Divisions are rounded as IEEE wants: plain `/` may be two units off on a GPU.
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    one = tl.full(largest.shape, 1.0, tl.float32)
    v = tl.abs(x) * tl.where(largest > 0, tl.div_rn(one, tl.where(largest > 0, scale, 1.0)), 0.0)[:, None]
    if STOCHASTIC:
        column = tl.broadcast_to(o_k[None, :], v.shape).to(tl.uint32)
        row = tl.broadcast_to((o_m + first_row)[:, None], v.shape).to(tl.uint32)
        zero = tl.full(v.shape, 0, tl.uint32)
        word, _, _, _ = tl.philox(seed, column, row, zero, zero)
        shift_up = (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # from 0 to 1 - 2^-24
    else:
        shift_up = tl.full(v.shape, 0.5, tl.float32)
    if FORMAT == "int8":
        steps = tl.minimum(tl.floor(v + shift_up).to(tl.int32), 127)
        codes = tl.where(x < 0, -steps, steps).to(tl.int8).to(tl.uint8, bitcast=True)
    else:
        if FORMAT == "e4m3":
            magnitude = _fp8_code(v, shift_up, 3, 121, 0x7E)
        else:
            tl.static_assert(FORMAT == "e5m2", "unknown format")
            magnitude = _fp8_code(v, shift_up, 2, 113, 0x7B)
        codes = (magnitude + tl.where(x < 0, 128, 0)).to(tl.uint8)
    tl.store(p_codes + o_m[:, None] * stride_cm + o_k[None, :] * stride_ck, codes, mask=m)
    whole = tl.min(finite.to(tl.int32), axis=1) == 1
    tl.store(p_scales + o_m * stride_sm + i_g * stride_sg, tl.where(whole, scale, float("nan")), mask=o_m < M)


@triton.jit
def decompress_kernel(
    p_codes,
    p_scales,
    p_x,
    M,
    K,
    stride_cm,
    stride_ck,
    stride_sm,
    stride_sg,
    stride_xm,
    stride_xk,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    groups = tl.cdiv(K, GROUP)
    i_g = (tl.program_id(0) % groups).to(tl.int64)
    o_m = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_k = i_g * GROUP + tl.arange(0, GROUP)
    m = (o_m < M)[:, None] & (o_k < K)[None, :]
    codes = tl.load(p_codes + o_m[:, None] * stride_cm + o_k[None, :] * stride_ck, mask=m, other=0)
    scale = tl.load(p_scales + o_m * stride_sm + i_g * stride_sg, mask=o_m < M, other=0.0)
    x = decode(codes, scale, FORMAT)
    p_x += o_m[:, None] * stride_xm + o_k[None, :] * stride_xk
    tl.store(p_x, narrow(x, p_x.dtype.element_ty, INTERPRET), mask=m)


def scales_shape(M: int, K: int) -> tuple[int, int]:
    """Shape of the scales of an (M, K) matrix; with the codes it is stored in M K + 4 M ceil(K / 128) bytes."""
    return M, -(-K // GROUP)


def check_codes(codes: Tensor, scales: Tensor, format: str, like: Tensor) -> tuple[int, int]:
    """(M, K) of a compressed matrix on `like`'s device. Raises ValueError or TypeError for what it cannot be."""
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    if codes.dim() != 2:
        raise ValueError(f"codes must be a matrix; got shape {tuple(codes.shape)}")
    if codes.dtype != uint8 or scales.dtype != float32:
        raise TypeError(f"codes must be uint8 and scales float32; got {codes.dtype} and {scales.dtype}")
    if codes.device != like.device:
        raise ValueError(f"codes are on {codes.device}, expected {like.device}")
    M, K = codes.shape
    check_shape({"scales": (scales, scales_shape(M, K))}, codes)
    return M, K


def compress(
    x: Tensor, codes: Tensor, scales: Tensor, *, format: str = "e4m3", seed: int | None = None, first_row: int = 0
) -> None:
    """Write x's codes and scales.

    x (M, K), codes (M, K) uint8, scales of `scales_shape`, fp32. format: "int8", "e4m3" or "e5m2". seed: from 0 to 2^63 - 1 for
    stochastic rounding, None for rounding to nearest. first_row: which row of a larger matrix x starts at, for the random
    numbers.
    The error bound is in the module's docstring.
    """
    M, K = check_codes(codes, scales, format, x)
    check_shape({"x": (x, (M, K))}, codes)
    check_out(codes=codes, scales=scales)
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed} must lie in [0, 2^63), or be None for rounding to nearest")
    if M == 0 or K == 0:
        return
    with on_device(x):
        compress_kernel[(triton.cdiv(M, _TILE.rows) * triton.cdiv(K, GROUP),)](
            x,
            codes,
            scales,
            M,
            K,
            *x.stride(),
            *codes.stride(),
            *scales.stride(),
            seed or 0,
            first_row,
            FORMAT=format,
            LARGEST=FORMATS[format],
            STOCHASTIC=seed is not None,
            GROUP=GROUP,
            ROWS=_TILE.rows,
            INTERPRET=INTERPRETED,
            num_warps=_TILE.num_warps,
            num_stages=_TILE.num_stages,
        )


def decompress(codes: Tensor, scales: Tensor, out: Tensor, *, format: str = "e4m3") -> None:
    """out (M, K) = what the codes stand for, rounded once to out's dtype. format: as it was compressed."""
    M, K = check_codes(codes, scales, format, out)
    check_shape({"out": (out, (M, K))}, codes)
    check_out(out=out)
    dtype_name(out)
    if M == 0 or K == 0:
        return
    with on_device(out):
        decompress_kernel[(triton.cdiv(M, _TILE.rows) * triton.cdiv(K, GROUP),)](
            codes,
            scales,
            out,
            M,
            K,
            *codes.stride(),
            *scales.stride(),
            *out.stride(),
            FORMAT=format,
            GROUP=GROUP,
            ROWS=_TILE.rows,
            INTERPRET=INTERPRETED,
            num_warps=_TILE.num_warps,
            num_stages=_TILE.num_stages,
        )


def specs(arch: int) -> list[KernelSpec]:
    """Both directions in every format and dtype, nearest and stochastic, on contiguous 16-byte aligned matrices."""
    block = f"{_TILE.rows}x{GROUP}"
    sizes = dict.fromkeys(("M", "K", "stride_xm", "stride_cm", "stride_sm"), "i32")
    pointers = {"p_x": "T", "p_codes": "*u8", "p_scales": "*fp32"}
    inner = dict.fromkeys(("stride_xk", "stride_ck", "stride_sg"), 1)
    fixed = {**inner, "GROUP": GROUP, "ROWS": _TILE.rows, "INTERPRET": False}
    divisible = ("p_x", "p_codes", "p_scales", "K", "stride_xm", "stride_cm")
    found = []
    for dtype in block_dtypes(arch):
        for format, largest in FORMATS.items():
            for stochastic in (False, True):
                found.append(
                    make_spec(
                        compress_kernel,
                        variant=f"{format},stochastic" if stochastic else format,
                        dtype=dtype,
                        arch=arch,
                        tile=_TILE,
                        types={**sizes, **pointers, "seed": "i64", "first_row": "i64"},
                        constexprs={**fixed, "FORMAT": format, "LARGEST": largest, "STOCHASTIC": stochastic},
                        divisible=divisible,
                        meta=block_meta({f"{block}xi8": 1, f"{_TILE.rows}xf32": 1}),
                    )
                )
            found.append(
                make_spec(
                    decompress_kernel,
                    variant=format,
                    dtype=dtype,
                    arch=arch,
                    tile=_TILE,
                    types={**sizes, **pointers},
                    constexprs={**fixed, "FORMAT": format},
                    divisible=divisible,
                    meta=block_meta({f"{block}x{STORED[dtype]}": 1}),
                )
            )
    return found
