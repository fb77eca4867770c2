"""A gated MLP's first half (SwiGLU, GEGLU, ReGLU; Shazeer 2020, arXiv:2002.05202), forward and recompute-backward in a pass each.

    z_g = x Wg^T + bg      z_u = x Wu^T + bu      h = act(mu z_g) * z_u          y = h Wd^T (+ bd)
    dh = dy Wd      dz_u = dh * act(mu z_g)      dz_g = dh * z_u * act'(mu z_g) * mu      db_g, db_u: sums over rows

Forward reads x once for both products and writes h only. Backward writes h (for dWd), dz_g and dz_u, and never z_g or z_u, in one
of two forms:
    triple  all three GEMMs in one kernel, with three fp32 accumulators (z_g, z_u, dh), 128 x 64; dh never reaches HBM.
    plain   dh by cuBLAS into the buffer of dz_u, then z_g and z_u, 128 x 128, and dz_u in place over dh: 2 M N more
            elements through HBM.
`backward_form` picks one by arithmetic. mu is `gate_multiplier`, as in Falcon-H1, whose `down_multiplier` scales y: fold it into
the dy given here and into y outside.

act: any of `activations.ACTIVATIONS`; "silu" makes SwiGLU, "gelu" or "gelu_tanh" GEGLU, "relu" ReGLU, "sigmoid" GLU.
Shapes: x (M, K), wg, wu (N, K), bg, bu (N), dy (M, D), wd (D, N), h, dz_g, dz_u (M, N), db partials (ceil(M / bm), N).
Any strides.
Not here: the other GEMMs, allocation, autograd.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.gated_epilogue import emit_gradients, emit_product
from .device.gemm import accumulate, accumulate_two, tile_of
from .host.arguments import check_out, check_shape, strides
from .host.dtypes import dtype_name
from .host.hardware import arch_of
from .host.launch import PreparedLaunch, launch, once
from .host.problem import GemmProblem, check_operands, partials_shape
from .host.tiles import TileConfig, backward_form

__all__ = ["db_partials_shape", "gated_fwd", "gated_plain_bwd", "gated_recompute_bwd", "gated_triple_bwd"]


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
    emit_product(
        z_g, z_u, row0, col0, p_bg, p_bu, p_h, M, N, stride_bg, stride_bu, strides_h, multiplier, ACT, BM, BN,
        EPILOGUE_N, INTERPRET,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gated_triple_bwd_kernel(
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
    emit_gradients(
        z_g, z_u, dh, row0, col0, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, stride_bg, stride_bu, strides_h,
        strides_dzg, strides_dzu, strides_dbg[1], strides_dbu[1], multiplier, ACT, BM, BN, EPILOGUE_N, INTERPRET,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def gated_plain_bwd_kernel(
    p_x, p_wg, p_wu, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, K, strides_x, strides_wg, strides_wu, stride_bg,
    stride_bu, strides_h, strides_dzg, strides_dzu, strides_dbg, strides_dbu, multiplier, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EPILOGUE_N: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    z_g, z_u = accumulate_two(
        p_x, p_wg, p_wu, row0, col0, M, N, K, strides_x, strides_wg, strides_wu, BM, BN, BK, EVEN_K, TMA, INTERPRET,
    )  # fmt: skip
    if p_dbg is not None:
        p_dbg += i_m.to(tl.int64) * strides_dbg[0]
    if p_dbu is not None:
        p_dbu += i_m.to(tl.int64) * strides_dbu[0]
    emit_gradients(
        z_g, z_u, None, row0, col0, p_bg, p_bu, p_h, p_dzg, p_dzu, p_dbg, p_dbu, M, N, stride_bg, stride_bu, strides_h,
        strides_dzg, strides_dzu, strides_dbg[1], strides_dbu[1], multiplier, ACT, BM, BN, EPILOGUE_N, INTERPRET,
    )  # fmt: skip


def _form(x: Tensor, wg: Tensor, wd: Tensor, form: str | None) -> str:
    if form not in (None, "triple", "plain"):
        raise ValueError(f"form must be None, 'triple' or 'plain'; got {form!r}")
    return form or backward_form(wg.shape[0], x.shape[1], wd.shape[0], dtype_name(x), arch_of(x), gated=True)


def db_partials_shape(
    x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, tile: TileConfig | None = None, form: str | None = None
) -> tuple[int, int]:
    """Shape of each of the fp32 buffers that `gated_recompute_bwd` with the same arguments wants for db_g and db_u:
    (ceil(M / bm), N)."""
    if _form(x, wg, wd, form) == "plain":
        return partials_shape("gated_plain", x, wg, wu, tile=tile)
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
    form: str | None = None,
    tile: TileConfig | None = None,
    tma: bool | None = None,
) -> None:
    """h, dz_g and dz_u of `gated_fwd` for the gradient dy of y = h wd^T, everything recomputed from x.

    x, wg, bg, wu, bu, activation, gate_multiplier: as in `gated_fwd`. dy (M, D), wd (D, N): any strides. h (M, N), or None
    where wd is frozen. dz_g, dz_u (M, N). The partials: fp32, of `db_partials_shape` for the same form and tile; their sums over
    rows are db_g and db_u. form: "triple", "plain", or None for `backward_form`'s choice. Everything written is written fully.

    Raises ValueError for shapes, devices or activations that do not fit, TypeError for dtypes.
    """
    if _form(x, wg, wd, form) == "triple":
        gated_triple_bwd(
            x, wg, bg, wu, bu, dy, wd, h, dz_g, dz_u, dbg_partials, dbu_partials, activation=activation,
            gate_multiplier=gate_multiplier, tile=tile, tma=tma,
        )  # fmt: skip
        return
    once(_check_plain, (x, wg, wu, dy, wd, bg, bu, h, dz_g, dz_u), (activation,))
    torch.mm(dy, wd, out=dz_u)
    gated_plain_bwd(
        x, wg, bg, wu, bu, h, dz_g, dz_u, dbg_partials, dbu_partials, activation=activation,
        gate_multiplier=gate_multiplier, tile=tile, tma=tma,
    )  # fmt: skip


def _check_plain(
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
    activation: str,
) -> None:
    """Before dh is written."""
    check_operands(activation, x, {"wg": wg, "wu": wu}, {"dy": dy, "wd": wd})
    M, N = x.shape[0], wg.shape[0]
    outputs = {"h": (h, (M, N)), "dz_g": (dz_g, (M, N)), "dz_u": (dz_u, (M, N))}
    check_shape({"bg": (bg, (N,)), "bu": (bu, (N,)), **outputs}, x)
    check_out(h=h, dz_g=dz_g, dz_u=dz_u)


def gated_plain_bwd(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
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
    """The kernel of `gated_recompute_bwd`'s plain form, whose arguments these are: dz_u comes with dh in it."""
    tensors = x, wg, wu, bg, bu, h, dz_g, dz_u, dbg_partials, dbu_partials
    launch(_prepare_plain_bwd, tensors, (activation, float(gate_multiplier), tile, tma))


def _prepare_plain_bwd(x: Tensor, wg: Tensor, wu: Tensor, *rest: Any) -> PreparedLaunch | None:
    return _prepared_bwd(gated_plain_bwd_kernel, "gated_plain", x, wg, wu, {}, *rest)


def gated_triple_bwd(
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
    """The triple form of `gated_recompute_bwd`, whose arguments these are."""
    tensors = x, wg, wu, dy, wd, bg, bu, h, dz_g, dz_u, dbg_partials, dbu_partials
    launch(_prepare_triple_bwd, tensors, (activation, float(gate_multiplier), tile, tma))


def _prepare_triple_bwd(x: Tensor, wg: Tensor, wu: Tensor, dy: Tensor, wd: Tensor, *rest: Any) -> PreparedLaunch | None:
    return _prepared_bwd(gated_triple_bwd_kernel, "gated_bwd", x, wg, wu, {"dy": dy, "wd": wd}, *rest)


def _prepared_bwd(
    kernel: Any,
    kind: str,
    x: Tensor,
    wg: Tensor,
    wu: Tensor,
    second: dict[str, Tensor],
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
    """second: dy and wd, where the kernel multiplies these as well."""
    gemm = GemmProblem.checked(kind, activation, tile, x, {"wg": wg, "wu": wu}, second)
    outputs = {"h": h, "dz_g": dz_g, "dz_u": dz_u}
    sums = {"dbg_partials": dbg_partials, "dbu_partials": dbu_partials}
    gemm.check(biases={"bg": bg, "bu": bu}, outputs=outputs, sums=sums)
    if not gemm.tiles:
        return None
    blocks = gemm.blocks(tma)
    depths = (*gemm.sizes, gemm.D) if second else gemm.sizes
    vectors = *strides(bg, 1), *strides(bu, 1)
    operands = x.stride(), wg.stride(), wu.stride(), *vectors, *[tensor.stride() for tensor in second.values()]
    results = strides(h, 2), dz_g.stride(), dz_u.stride(), strides(dbg_partials, 2), strides(dbu_partials, 2)
    sizes = *depths, *operands, *results, multiplier
    return PreparedLaunch(kernel, (gemm.tiles,), sizes, {"TMA": bool(blocks)} | gemm.options(), blocks)
