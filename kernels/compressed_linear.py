"""`linear` on an input that is stored compressed: the codes are loaded and decoded in the K loop, the input is never written out.

    x' = code * scale, rounded to the weight's dtype          z = x' W^T + b
    forward    y = act(z)           backward    dz = dy * act'(z), h = act(z), db partials          (as in `linear`)

One K loop serves forward and recompute, so both see the same x' and the same z, bit for bit. A training step that keeps the codes
instead of x computes the gradients of the function of x', and of x itself only up to the compression's error (see `compress`).

Shapes: codes (M, K) uint8, scales (M, ceil(K / 128)) fp32, weight (N, K), bias (N), y, dy, dz, h (M, N),
db_partials (ceil(M / bm), N) fp32. Any strides. Not here: dx and dW (decompress, then plain GEMMs), dropout, allocation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .compress import GROUP, check_codes, decode
from .epilogue import emit_backward, emit_forward
from .gemm import tile_of
from .launch import (
    arch_of,
    check_activation,
    check_out,
    check_shape,
    check_sums,
    check_tile,
    dtype_name,
    gemm_options,
    on_device,
    regular,
    strides,
)
from .numerics import narrow, operand
from .tiles import TileConfig, candidates, choose

__all__ = ["compressed_linear_fwd", "compressed_linear_recompute_bwd", "compressed_tiles", "db_partials_shape"]


@triton.jit
def _accumulate_compressed(
    p_codes,
    p_scales,
    p_w,
    row0,
    col0,
    M,
    N,
    K,
    stride_cm,
    stride_ck,
    stride_sm,
    stride_sg,
    stride_wn,
    stride_wk,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """x' W^T for one tile (BM, BN), fp32. BK divides GROUP, so one step needs one scale a row."""
    tl.static_assert(GROUP % BK == 0, "a step of K must lie within one scale group")
    o_m = row0 + tl.arange(0, BM)
    o_n = col0 + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m = o_m < M
    m_n = o_n < N
    p_codes += o_m[:, None] * stride_cm + o_k[None, :].to(tl.int64) * stride_ck
    p_scales += o_m * stride_sm
    p_w += o_n[None, :] * stride_wn + o_k[:, None].to(tl.int64) * stride_wk
    step = tl.full((), BK, tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        if EVEN_K:
            b_codes = tl.load(p_codes, mask=m_m[:, None], other=0)
            b_w = tl.load(p_w, mask=m_n[None, :], other=0.0)
        else:
            m_k = o_k < K - i_k * BK
            b_codes = tl.load(p_codes, mask=m_m[:, None] & m_k[None, :], other=0)
            b_w = tl.load(p_w, mask=m_n[None, :] & m_k[:, None], other=0.0)
        b_scale = tl.load(p_scales + (i_k * BK // GROUP) * stride_sg, mask=m_m, other=0.0)
        b_x = narrow(decode(b_codes, b_scale, FORMAT), p_w.dtype.element_ty, INTERPRET)
        acc = tl.dot(operand(b_x, INTERPRET), operand(b_w, INTERPRET), acc, input_precision="ieee")
        p_codes += step * stride_ck
        p_w += step * stride_wk
    return acc


@triton.jit
def compressed_linear_fwd_kernel(
    p_codes,
    p_scales,
    p_w,
    p_b,
    p_y,
    M,
    N,
    K,
    stride_cm,
    stride_ck,
    stride_sm,
    stride_sg,
    stride_wn,
    stride_wk,
    stride_b,
    stride_ym,
    stride_yn,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    z = _accumulate_compressed(
        p_codes, p_scales, p_w, row0, col0, M, N, K, stride_cm, stride_ck, stride_sm, stride_sg, stride_wn, stride_wk,
        FORMAT, GROUP, BM, BN, BK, EVEN_K, INTERPRET,
    )  # fmt: skip
    emit_forward(
        z, row0, col0, p_b, None, p_y, M, N, stride_b, 0, 0, stride_ym, stride_yn,
        0, 0, 0, 0, 1.0, ACT, False, BM, BN, PIECE, INTERPRET,
    )  # fmt: skip


@triton.jit
def compressed_linear_recompute_bwd_kernel(
    p_codes,
    p_scales,
    p_w,
    p_b,
    p_dy,
    p_dz,
    p_h,
    p_db,
    M,
    N,
    K,
    stride_cm,
    stride_ck,
    stride_sm,
    stride_sg,
    stride_wn,
    stride_wk,
    stride_b,
    stride_dym,
    stride_dyn,
    stride_dzm,
    stride_dzn,
    stride_hm,
    stride_hn,
    stride_dbm,
    stride_dbn,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    z = _accumulate_compressed(
        p_codes, p_scales, p_w, row0, col0, M, N, K, stride_cm, stride_ck, stride_sm, stride_sg, stride_wn, stride_wk,
        FORMAT, GROUP, BM, BN, BK, EVEN_K, INTERPRET,
    )  # fmt: skip
    if p_db is not None:
        p_db += i_m.to(tl.int64) * stride_dbm
    emit_backward(
        z, None, row0, col0, p_b, p_dy, p_dz, p_h, p_db, M, N, stride_b, stride_dym, stride_dyn, stride_dzm,
        stride_dzn, stride_hm, stride_hn, stride_dbn, 0, 0, 0, 0, 1.0,
        ACT, False, BM, BN, PIECE, INTERPRET,
    )  # fmt: skip


def db_partials_shape(codes: Tensor, weight: Tensor, tile: TileConfig | None = None) -> tuple[int, int]:
    """Shape of the fp32 buffer that `compressed_linear_recompute_bwd` wants for db: (ceil(M / bm), N)."""
    return -(-codes.shape[0] // _tile(codes, weight, tile).bm), weight.shape[0]


def compressed_tiles(dtype: str, arch: int) -> list[TileConfig]:
    """A large and a small one of `linear`'s. Not those of 256 columns: what decodes does not fit beside their accumulators."""
    narrow_enough = [t for t in candidates("linear", dtype, arch) if t.bn <= 128]
    return [narrow_enough[0], narrow_enough[-1]]


def _tile(codes: Tensor, weight: Tensor, tile: TileConfig | None) -> TileConfig:
    (M, K), N = codes.shape, weight.shape[0]
    dtype, arch = dtype_name(weight), arch_of(weight)
    if dtype == "fp32":
        raise TypeError("a compressed input is multiplied in 16 bits; weight is float32: cast it, or decompress first")
    if tile is None:
        is_regular = regular(codes, weight)
        tile = choose("linear", M, N, K, dtype, arch, regular=is_regular)
        if arch and is_regular:
            large, small = compressed_tiles(dtype, arch)
            tile = large if tile.bm * tile.bn >= large.bm * large.bn else small
    check_tile("linear", tile, dtype, arch)
    if GROUP % tile.bk:
        raise ValueError(f"tile {tile.label} cannot be used: bk={tile.bk} does not divide the scale group of {GROUP}")
    return tile


def _check(codes: Tensor, scales: Tensor, weight: Tensor, format: str, activation: str) -> tuple[int, int, int]:
    check_activation(activation)
    if weight.dim() != 2:
        raise ValueError(f"weight must be a matrix; got shape {tuple(weight.shape)}")
    M, K = check_codes(codes, scales, format, weight)
    check_shape({"weight": (weight, (weight.shape[0], K))}, codes)
    return M, weight.shape[0], K


def compressed_linear_fwd(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    format: str = "e4m3",
    activation: str = "identity",
    tile: TileConfig | None = None,
) -> None:
    """out (M, N) = act(x' weight^T + bias), where x' is what codes and scales stand for.

    codes, scales, format: as `compress` wrote them. weight (N, K): fp16 or bf16, the type x' is multiplied in. The
    rest as in `linear.linear_fwd`.
    """
    M, N, K = _check(codes, scales, weight, format, activation)
    check_shape({"bias": (bias, (N,)), "out": (out, (M, N))}, codes)
    check_out(out=out)
    tile = _tile(codes, weight, tile)
    if M == 0 or N == 0:
        return
    with on_device(weight):
        compressed_linear_fwd_kernel[(triton.cdiv(M, tile.bm) * triton.cdiv(N, tile.bn),)](
            codes,
            scales,
            weight,
            bias,
            out,
            M,
            N,
            K,
            *codes.stride(),
            *scales.stride(),
            *weight.stride(),
            *strides(bias, 1),
            *out.stride(),
            FORMAT=format,
            GROUP=GROUP,
            **gemm_options("linear", tile, K, activation),
        )


def compressed_linear_recompute_bwd(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    dz: Tensor,
    db_partials: Tensor | None = None,
    *,
    format: str = "e4m3",
    activation: str = "identity",
    h: Tensor | None = None,
    tile: TileConfig | None = None,
) -> None:
    """dz = dy * act'(x' weight^T + bias), and h = act(...) where given; z is computed again from the codes.

    As `linear.linear_recompute_bwd`, with codes and scales in place of x.
    """
    M, N, K = _check(codes, scales, weight, format, activation)
    tile = _tile(codes, weight, tile)
    partials = (db_partials, db_partials_shape(codes, weight, tile))
    check_shape(
        {"bias": (bias, (N,)), "dy": (dy, (M, N)), "dz": (dz, (M, N)), "h": (h, (M, N)), "db_partials": partials}, codes
    )
    check_out(dz=dz, h=h, db_partials=db_partials)
    check_sums(db_partials=db_partials)
    if M == 0 or N == 0:
        return
    with on_device(weight):
        compressed_linear_recompute_bwd_kernel[(triton.cdiv(M, tile.bm) * triton.cdiv(N, tile.bn),)](
            codes,
            scales,
            weight,
            bias,
            dy,
            dz,
            h,
            db_partials,
            M,
            N,
            K,
            *codes.stride(),
            *scales.stride(),
            *weight.stride(),
            *strides(bias, 1),
            *dy.stride(),
            *dz.stride(),
            *strides(h, 2),
            *strides(db_partials, 2),
            FORMAT=format,
            GROUP=GROUP,
            **gemm_options("linear", tile, K, activation),
        )
