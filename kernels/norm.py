"""RMSNorm and LayerNorm before a fused linear layer, recomputed in backward from the raw input alone.

    xn = (x - mean) * rstd * w + b         LayerNorm (Ba et al. 2016, arXiv:1607.06450): rstd = 1 / sqrt(var + eps)
    xn = x * rstd * w                      RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): rstd = 1 / sqrt(mean(x^2) + eps)

The raw x is all that a layer "norm, then linear" has to save: xn goes into a transient buffer forward, and again in backward, a
chunk of rows at a time. It is a kernel of its own and not a prologue inside the GEMM's K loop, because dW = dz^T xn is a
plain GEMM that needs xn in memory in backward anyway, and because operands that pass through registers would leave the
asynchronous path from memory to the tensor cores. It costs 2 M K elements of traffic next to 2 M N K flops.

Backward in two kernels: rows (statistics and dx), then columns (dw and db as partial sums in fixed order, without atomics).
Statistics are computed in fp32 in two passes (mean, then squared deviations), never as a difference of large sums.

Shapes: x, xn, dxn, dx (M, K), weight, bias (K), stats (2, M) fp32 scratch, partials (ceil(M / 32), K) fp32. Any strides.
Not here: allocation, autograd, adding up the partials.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .device.casts import INTERPRETED, narrow, widen
from .host.arguments import check_out, check_shape, check_sums, strides
from .host.dtypes import dtype_name
from .host.hardware import arch_of
from .host.launch import PreparedLaunch, launch, once

__all__ = ["norm_bwd", "norm_fwd", "norm_partials_shape"]

ROWS_PER_SUM = 32
COLUMNS_PER_SUM = 128
WIDEST_BLOCK = 1024
NUM_WARPS = 4
KINDS = ("rms", "layer")


@triton.jit
def _statistics(p_x, K, stride_xk, eps, LAYER: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """Mean (0 for RMSNorm) and rstd of one row; p_x points at its first element."""
    o_k = tl.arange(0, BLOCK).to(tl.int64)
    mean = tl.full((), 0.0, tl.float32)
    if LAYER:
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, K, BLOCK):
            total += widen(tl.load(p_x + (k + o_k) * stride_xk, mask=k + o_k < K, other=0.0), INTERPRET)
        mean = tl.sum(total, axis=0) / K
    squares = tl.zeros((BLOCK,), tl.float32)
    rest = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, K, BLOCK):
        v = widen(tl.load(p_x + (k + o_k) * stride_xk, mask=k + o_k < K, other=0.0), INTERPRET) - mean
        v = tl.where(k + o_k < K, v, 0.0)
        squares += v * v
        rest += v
    variance = tl.sum(squares, axis=0) / K
    if LAYER:
        # The first mean has the rounding of a large sum; what it left over is small and summed nearly exactly.
        left = tl.sum(rest, axis=0) / K
        mean += left
        variance -= left * left
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def norm_fwd_kernel(
    p_x,
    p_w,
    p_b,
    p_y,
    K,
    strides_x,
    stride_w,
    stride_b,
    strides_y,
    eps,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_x += row * strides_x[0]
    p_y += row * strides_y[0]
    mean, rstd = _statistics(p_x, K, strides_x[1], eps, LAYER, BLOCK, INTERPRET)
    o_k = tl.arange(0, BLOCK).to(tl.int64)
    for k in range(0, K, BLOCK):
        o = k + o_k
        y = (widen(tl.load(p_x + o * strides_x[1], mask=o < K, other=0.0), INTERPRET) - mean) * rstd
        if p_w is not None:
            y *= widen(tl.load(p_w + o * stride_w, mask=o < K, other=0.0), INTERPRET)
        if p_b is not None:
            y += widen(tl.load(p_b + o * stride_b, mask=o < K, other=0.0), INTERPRET)
        tl.store(p_y + o * strides_y[1], narrow(y, p_y.dtype.element_ty, INTERPRET), mask=o < K)


@triton.jit
def norm_bwd_rows_kernel(
    p_x,
    p_w,
    p_dy,
    p_dx,
    p_stats,
    K,
    strides_x,
    stride_w,
    strides_dy,
    strides_dx,
    strides_s,
    eps,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_x += row * strides_x[0]
    p_dy += row * strides_dy[0]
    p_stats += row * strides_s[1]
    mean, rstd = _statistics(p_x, K, strides_x[1], eps, LAYER, BLOCK, INTERPRET)
    tl.store(p_stats, mean)
    tl.store(p_stats + tl.full((), 0, tl.int64) + strides_s[0], rstd)
    o_k = tl.arange(0, BLOCK).to(tl.int64)
    # g = dy * w; dx = rstd (g - xhat mean(g xhat) [- mean(g)]).
    sum_g = tl.zeros((BLOCK,), tl.float32)
    sum_gx = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, K, BLOCK):
        o = k + o_k
        xhat = (widen(tl.load(p_x + o * strides_x[1], mask=o < K, other=0.0), INTERPRET) - mean) * rstd
        g = widen(tl.load(p_dy + o * strides_dy[1], mask=o < K, other=0.0), INTERPRET)
        if p_w is not None:
            g *= widen(tl.load(p_w + o * stride_w, mask=o < K, other=0.0), INTERPRET)
        sum_g += g
        sum_gx += g * xhat
    mean_gx = tl.sum(sum_gx, axis=0) / K
    mean_g = tl.sum(sum_g, axis=0) / K
    p_dx += row * strides_dx[0]
    for k in range(0, K, BLOCK):
        o = k + o_k
        xhat = (widen(tl.load(p_x + o * strides_x[1], mask=o < K, other=0.0), INTERPRET) - mean) * rstd
        dx = widen(tl.load(p_dy + o * strides_dy[1], mask=o < K, other=0.0), INTERPRET)
        if p_w is not None:
            dx *= widen(tl.load(p_w + o * stride_w, mask=o < K, other=0.0), INTERPRET)
        dx -= xhat * mean_gx
        if LAYER:
            dx -= mean_g
        tl.store(p_dx + o * strides_dx[1], narrow(dx * rstd, p_dx.dtype.element_ty, INTERPRET), mask=o < K)


@triton.jit(do_not_specialize=["M"])
def norm_bwd_columns_kernel(
    p_x,
    p_dy,
    p_stats,
    p_dw,
    p_db,
    M,
    K,
    strides_x,
    strides_dy,
    strides_s,
    strides_dw,
    strides_db,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * ROWS + tl.arange(0, ROWS)
    o_k = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_k = o_k < K
    m = (o_m < M)[:, None] & m_k[None, :]
    dy = widen(
        tl.load(p_dy + o_m[:, None] * strides_dy[0] + o_k[None, :] * strides_dy[1], mask=m, other=0.0), INTERPRET
    )
    if p_dw is not None:
        p_stats += o_m * strides_s[1]
        mean = tl.load(p_stats, mask=o_m < M, other=0.0)
        rstd = tl.load(p_stats + strides_s[0], mask=o_m < M, other=0.0)
        x = widen(
            tl.load(p_x + o_m[:, None] * strides_x[0] + o_k[None, :] * strides_x[1], mask=m, other=0.0), INTERPRET
        )
        dw = tl.sum(dy * (x - mean[:, None]) * rstd[:, None], axis=0)
        tl.store(p_dw + i_m * strides_dw[0] + o_k * strides_dw[1], dw, mask=m_k)
    if p_db is not None:
        tl.store(p_db + i_m * strides_db[0] + o_k * strides_db[1], tl.sum(dy, axis=0), mask=m_k)


def _check(x: Tensor, kind: str, eps: float) -> tuple[int, int]:
    if kind not in KINDS:
        raise ValueError(f"unknown norm {kind!r}; choose 'rms' or 'layer'")
    if x.dim() != 2:
        raise ValueError(f"x must be a matrix; got shape {tuple(x.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be positive; got {eps}")
    dtype_name(x)
    arch_of(x)
    return x.shape[0], x.shape[1]


def _block(K: int) -> int:
    return max(16, min(WIDEST_BLOCK, triton.next_power_of_2(K)))


def norm_partials_shape(x: Tensor) -> tuple[int, int]:
    """Shape of each fp32 buffer that `norm_bwd` wants for dw and db: (ceil(M / 32), K)."""
    return -(-x.shape[0] // ROWS_PER_SUM), x.shape[1]


def norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, *, kind: str = "rms", eps: float = 1e-5
) -> None:
    """out = norm(x) * weight + bias by rows. x (M, K), weight and bias (K) or None, out (M, K); out may be x's own memory.

    kind: "rms" or "layer". Any strides; M or K may be 0. Raises ValueError or TypeError for what does not fit.
    """
    launch(_prepare_fwd, (x, weight, bias, out), (kind, float(eps)))


def _prepare_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, kind: str, eps: float
) -> PreparedLaunch | None:
    M, K = _check(x, kind, eps)
    check_shape({"weight": (weight, (K,)), "bias": (bias, (K,)), "out": (out, (M, K))}, x)
    check_out(out=out)
    if M == 0 or K == 0:
        return None
    sizes = K, x.stride(), *strides(weight, 1), *strides(bias, 1), out.stride(), eps
    return PreparedLaunch(norm_fwd_kernel, (M,), sizes, _constants(LAYER=kind == "layer", BLOCK=_block(K)))


def _constants(**own: int) -> dict[str, Any]:
    return {**own, "INTERPRET": INTERPRETED, "num_warps": NUM_WARPS, "num_stages": 1}


def norm_bwd(
    x: Tensor,
    weight: Tensor | None,
    dxn: Tensor,
    dx: Tensor,
    stats: Tensor,
    dw_partials: Tensor | None = None,
    db_partials: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-5,
) -> None:
    """Gradients of `norm_fwd`, statistics recomputed from x. dxn (M, K): gradient of its output.

    Writes dx (M, K), stats (2, M) fp32 (mean and rstd; scratch), and, where given, partial sums over rows of dw and db, fp32
    of `norm_partials_shape`. dx may be dxn's own memory only where neither dw nor db is asked for.
    Raises ValueError or TypeError for what does not fit.
    """
    once(_check_bwd, (x, weight, dxn, dx, stats, dw_partials, db_partials), (kind, eps))
    wants_sums = dw_partials is not None or db_partials is not None
    if wants_sums and dx.data_ptr() == dxn.data_ptr() and dx.numel():
        raise ValueError("dx and dxn share memory, but dw or db still needs dxn: give dx a buffer of its own")
    launch(_prepare_bwd_rows, (x, weight, dxn, dx, stats), (kind, float(eps)))
    if wants_sums:
        launch(_prepare_bwd_columns, (x, dxn, stats, dw_partials, db_partials))


def _check_bwd(
    x: Tensor,
    weight: Tensor | None,
    dxn: Tensor,
    dx: Tensor,
    stats: Tensor,
    dw_partials: Tensor | None,
    db_partials: Tensor | None,
    kind: str,
    eps: float,
) -> None:
    M, K = _check(x, kind, eps)
    partials = norm_partials_shape(x)
    check_shape(
        {
            "weight": (weight, (K,)),
            "dxn": (dxn, (M, K)),
            "dx": (dx, (M, K)),
            "stats": (stats, (2, M)),
            "dw_partials": (dw_partials, partials),
            "db_partials": (db_partials, partials),
        },
        x,
    )
    check_out(dx=dx, stats=stats, dw_partials=dw_partials, db_partials=db_partials)
    check_sums(stats=stats, dw_partials=dw_partials, db_partials=db_partials)


def _prepare_bwd_rows(
    x: Tensor, weight: Tensor | None, dxn: Tensor, dx: Tensor, stats: Tensor, kind: str, eps: float
) -> PreparedLaunch | None:
    M, K = x.shape
    if M == 0 or K == 0:
        return None
    sizes = K, x.stride(), *strides(weight, 1), dxn.stride(), dx.stride(), stats.stride(), eps
    return PreparedLaunch(norm_bwd_rows_kernel, (M,), sizes, _constants(LAYER=kind == "layer", BLOCK=_block(K)))


def _prepare_bwd_columns(
    x: Tensor, dxn: Tensor, stats: Tensor, dw_partials: Tensor | None, db_partials: Tensor | None
) -> PreparedLaunch | None:
    M, K = x.shape
    if M == 0 or K == 0:
        return None
    results = strides(dw_partials, 2), strides(db_partials, 2)
    sizes = M, K, x.stride(), dxn.stride(), stats.stride(), *results
    grid = norm_partials_shape(x)[0], triton.cdiv(K, COLUMNS_PER_SUM)
    return PreparedLaunch(norm_bwd_columns_kernel, grid, sizes, _constants(ROWS=ROWS_PER_SUM, COLUMNS=COLUMNS_PER_SUM))
