"""A gated MLP's first half (SwiGLU, GEGLU, ReGLU; Shazeer 2020, arXiv:2002.05202), forward and recompute-backward in a pass each.

    z_g = x Wg^T + bg      z_u = x Wu^T + bu      h = act(mu z_g) * z_u          y = h Wd^T (+ bd)
    dh = dy Wd      dz_u = dh * act(mu z_g)      dz_g = dh * z_u * act'(mu z_g) * mu      db_g, db_u: sums over rows

Forward reads x once for both products and writes h only. Backward holds three fp32 accumulators (z_g, z_u, dh) and writes h (for
dWd), dz_g and dz_u; z_g, z_u and dh never reach HBM. mu is `gate_multiplier`, as in Falcon-H1, whose `down_multiplier` scales y:
fold it into the dy given here and into y outside.

act: any of `activations.ACTIVATIONS`; "silu" makes SwiGLU, "gelu" or "gelu_tanh" GEGLU, "relu" ReGLU, "sigmoid" GLU.
Shapes: x (M, K), wg, wu (N, K), bg, bu (N), dy (M, D), wd (D, N), h, dz_g, dz_u (M, N), db partials (ceil(M / bm), N).
Any strides.
Not here: the other GEMMs, allocation, autograd.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device.activations import activate, derivative
from .device.casts import narrow, widen
from .device.gemm import accumulate, accumulate_two, halves, tile_of
from .host.arguments import strides
from .host.launch import PreparedLaunch, launch
from .host.problem import GemmProblem, partials_shape
from .host.tiles import TileConfig

__all__ = ["db_partials_shape", "gated_fwd", "gated_recompute_bwd"]


@triton.jit
def _emit_product(
    z_g, z_u, row0, col0, p_bg, p_bu, p_h, M, N, stride_bg, stride_bu, strides_h, multiplier, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EPILOGUE_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    if BN > EPILOGUE_N:
        g_left, g_right = halves(z_g, BM, BN)
        u_left, u_right = halves(z_u, BM, BN)
        _emit_product(
            g_left, u_left, row0, col0, p_bg, p_bu, p_h, M, N, stride_bg, stride_bu, strides_h, multiplier, ACT, BM,
            BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
        _emit_product(
            g_right, u_right, row0, col0 + BN // 2, p_bg, p_bu, p_h, M, N, stride_bg, stride_bu, strides_h,
            multiplier, ACT, BM, BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
    else:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        m_n = o_n < N
        if p_bg is not None:
            z_g += widen(tl.load(p_bg + o_n * stride_bg, mask=m_n, other=0.0), INTERPRET)[None, :]
        if p_bu is not None:
            z_u += widen(tl.load(p_bu + o_n * stride_bu, mask=m_n, other=0.0), INTERPRET)[None, :]
        h = activate(z_g * multiplier, ACT) * z_u
        p_h += o_m[:, None] * strides_h[0] + o_n[None, :] * strides_h[1]
        tl.store(p_h, narrow(h, p_h.dtype.element_ty, INTERPRET), mask=(o_m < M)[:, None] & m_n[None, :])


@triton.jit
def _emit_gradients(
    z_g, z_u, dh, row0, col0, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, stride_bg, stride_bu, strides_h,
    strides_dzg, strides_dzu, stride_dbgn, stride_dbun, multiplier, ACT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, EPILOGUE_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    if BN > EPILOGUE_N:
        g_left, g_right = halves(z_g, BM, BN)
        u_left, u_right = halves(z_u, BM, BN)
        d_left, d_right = halves(dh, BM, BN)
        _emit_gradients(
            g_left, u_left, d_left, row0, col0, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, stride_bg,
            stride_bu, strides_h, strides_dzg, strides_dzu, stride_dbgn, stride_dbun, multiplier, ACT, BM, BN // 2,
            EPILOGUE_N, INTERPRET,
        )  # fmt: skip
        _emit_gradients(
            g_right, u_right, d_right, row0, col0 + BN // 2, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N,
            stride_bg, stride_bu, strides_h, strides_dzg, strides_dzu, stride_dbgn, stride_dbun, multiplier, ACT, BM,
            BN // 2, EPILOGUE_N, INTERPRET,
        )  # fmt: skip
    else:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        m_n = o_n < N
        m = (o_m < M)[:, None] & m_n[None, :]
        if p_bg is not None:
            z_g += widen(tl.load(p_bg + o_n * stride_bg, mask=m_n, other=0.0), INTERPRET)[None, :]
        if p_bu is not None:
            z_u += widen(tl.load(p_bu + o_n * stride_bu, mask=m_n, other=0.0), INTERPRET)[None, :]
        z_g *= multiplier
        a = activate(z_g, ACT)
        if p_h is not None:
            p_h += o_m[:, None] * strides_h[0] + o_n[None, :] * strides_h[1]
            tl.store(p_h, narrow(a * z_u, p_h.dtype.element_ty, INTERPRET), mask=m)
        dz_u = dh * a
        p_dzu += o_m[:, None] * strides_dzu[0] + o_n[None, :] * strides_dzu[1]
        tl.store(p_dzu, narrow(dz_u, p_dzu.dtype.element_ty, INTERPRET), mask=m)
        # Rows beyond M are dropped from the sums, not added as zeros: 0 * act'(b) is NaN where act' is not finite.
        if p_dbu is not None:
            tl.store(p_dbu + o_n * stride_dbun, tl.sum(tl.where(m, dz_u, 0.0), axis=0), mask=m_n)
        dz_g = dh * z_u * derivative(z_g, ACT) * multiplier
        p_dzg += o_m[:, None] * strides_dzg[0] + o_n[None, :] * strides_dzg[1]
        tl.store(p_dzg, narrow(dz_g, p_dzg.dtype.element_ty, INTERPRET), mask=m)
        if p_dbg is not None:
            tl.store(p_dbg + o_n * stride_dbgn, tl.sum(tl.where(m, dz_g, 0.0), axis=0), mask=m_n)


@triton.jit(do_not_specialize=["M"])
def gated_fwd_kernel(
    p_x, p_wg, p_wu, p_bg, p_bu, p_h, M, N, K, strides_x, strides_wg, strides_wu, stride_bg, stride_bu, strides_h,
    multiplier, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EPILOGUE_N: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    z_g, z_u = accumulate_two(
        p_x, p_wg, p_wu, row0, col0, M, N, K, strides_x, strides_wg, strides_wu, BM, BN, BK, EVEN_K, TMA, INTERPRET,
    )  # fmt: skip
    _emit_product(
        z_g, z_u, row0, col0, p_bg, p_bu, p_h, M, N, stride_bg, stride_bu, strides_h, multiplier, ACT, BM, BN,
        EPILOGUE_N, INTERPRET,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gated_recompute_bwd_kernel(
    p_x, p_wg, p_wu, p_dy, p_wd, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, K, D, strides_x, strides_wg,
    strides_wu, stride_bg, stride_bu, strides_dy, strides_wd, strides_h, strides_dzg, strides_dzu, strides_dbg,
    strides_dbu, multiplier, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EPILOGUE_N: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    dh = tl.zeros((BM, BN), tl.float32)
    dh = accumulate(
        dh, p_dy, p_wd, row0, col0, M, N, D, strides_dy, (strides_wd[1], strides_wd[0]), BM, BN, BK, EVEN_D, TMA,
        True, INTERPRET,
    )  # fmt: skip
    z_g, z_u = accumulate_two(
        p_x, p_wg, p_wu, row0, col0, M, N, K, strides_x, strides_wg, strides_wu, BM, BN, BK, EVEN_K, TMA, INTERPRET,
    )  # fmt: skip
    if p_dbg is not None:
        p_dbg += i_m.to(tl.int64) * strides_dbg[0]
    if p_dbu is not None:
        p_dbu += i_m.to(tl.int64) * strides_dbu[0]
    _emit_gradients(
        z_g, z_u, dh, row0, col0, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, stride_bg, stride_bu, strides_h,
        strides_dzg, strides_dzu, strides_dbg[1], strides_dbu[1], multiplier, ACT, BM, BN, EPILOGUE_N, INTERPRET,
    )  # fmt: skip


def db_partials_shape(x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, tile: TileConfig | None = None) -> tuple[int, int]:
    """Shape of each of the fp32 buffers that `gated_recompute_bwd` wants for db_g and db_u: (ceil(M / bm), N)."""
    return partials_shape("gated_bwd", x, wg, wu, wd, tile=tile)


def gated_fwd(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    h: Tensor,
    *,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    tile: TileConfig | None = None,
    tma: bool | None = None,
) -> None:
    """h = act(gate_multiplier (x wg^T + bg)) * (x wu^T + bu); neither factor is written.

    x (M, K), wg and wu (N, K): one dtype, any strides; M, N or K may be 0. bg, bu (N) or None. h (M, N).
    tile, tma: as in `linear_fwd`.

    Raises ValueError for shapes, devices or activations that do not fit, TypeError for dtypes.
    """
    launch(_prepare_fwd, (x, wg, wu, bg, bu, h), (activation, float(gate_multiplier), tile, tma))


def _prepare_fwd(
    x: Tensor,
    wg: Tensor,
    wu: Tensor,
    bg: Tensor | None,
    bu: Tensor | None,
    h: Tensor,
    activation: str,
    multiplier: float,
    tile: TileConfig | None,
    tma: bool | None,
) -> PreparedLaunch | None:
    gemm = GemmProblem.checked("gated_fwd", activation, tile, x, {"wg": wg, "wu": wu})
    gemm.check(biases={"bg": bg, "bu": bu}, outputs={"h": h})
    if not gemm.tiles:
        return None
    blocks = gemm.blocks(tma)
    operands = x.stride(), wg.stride(), wu.stride(), *strides(bg, 1), *strides(bu, 1)
    sizes = *gemm.sizes, *operands, h.stride(), multiplier
    return PreparedLaunch(gated_fwd_kernel, (gemm.tiles,), sizes, {"TMA": bool(blocks)} | gemm.options(), blocks)


def gated_recompute_bwd(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    dy: Tensor,
    wd: Tensor,
    h: Tensor | None,
    dz_g: Tensor,
    dz_u: Tensor,
    dbg_partials: Tensor | None = None,
    dbu_partials: Tensor | None = None,
    *,
    activation: str = "silu",
    gate_multiplier: float = 1.0,
    tile: TileConfig | None = None,
    tma: bool | None = None,
) -> None:
    """h, dz_g and dz_u of `gated_fwd` for the gradient dy of y = h wd^T, everything recomputed from x.

    x, wg, bg, wu, bu, activation, gate_multiplier: as in `gated_fwd`. dy (M, D), wd (D, N): any strides. h (M, N), or None
    where wd is frozen. dz_g, dz_u (M, N). The partials: fp32, of `db_partials_shape`; their sums over rows are db_g and db_u.
    Everything written is written fully.

    Raises ValueError for shapes, devices or activations that do not fit, TypeError for dtypes.
    """
    tensors = x, wg, wu, dy, wd, bg, bu, h, dz_g, dz_u, dbg_partials, dbu_partials
    launch(_prepare_recompute_bwd, tensors, (activation, float(gate_multiplier), tile, tma))


def _prepare_recompute_bwd(
    x: Tensor,
    wg: Tensor,
    wu: Tensor,
    dy: Tensor,
    wd: Tensor,
    bg: Tensor | None,
    bu: Tensor | None,
    h: Tensor | None,
    dz_g: Tensor,
    dz_u: Tensor,
    dbg_partials: Tensor | None,
    dbu_partials: Tensor | None,
    activation: str,
    multiplier: float,
    tile: TileConfig | None,
    tma: bool | None,
) -> PreparedLaunch | None:
    gemm = GemmProblem.checked("gated_bwd", activation, tile, x, {"wg": wg, "wu": wu}, {"dy": dy, "wd": wd})
    outputs = {"h": h, "dz_g": dz_g, "dz_u": dz_u}
    sums = {"dbg_partials": dbg_partials, "dbu_partials": dbu_partials}
    gemm.check(biases={"bg": bg, "bu": bu}, outputs=outputs, sums=sums)
    if not gemm.tiles:
        return None
    blocks = gemm.blocks(tma)
    operands = x.stride(), wg.stride(), wu.stride(), *strides(bg, 1), *strides(bu, 1), dy.stride(), wd.stride()
    results = strides(h, 2), dz_g.stride(), dz_u.stride(), strides(dbg_partials, 2), strides(dbu_partials, 2)
    sizes = *gemm.sizes, gemm.D, *operands, *results, multiplier
    return PreparedLaunch(
        gated_recompute_bwd_kernel, (gemm.tiles,), sizes, {"TMA": bool(blocks)} | gemm.options(), blocks
    )
