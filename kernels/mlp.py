"""Backward of an MLP's first layer in one kernel: recompute z, multiply by the gradient that comes through the second layer.

    y = act(x W1^T + b1) W2^T (+ b2)
    z = x W1^T + b1      dh = dy W2      h = act(z)      dz = dh * act'(z)      db1 = sum of dz over rows

Two forms write the same h (needed for dW2 = dy^T h) and dz (for dx = dz W1, dW1 = dz^T x); neither writes z:
    dual    both GEMMs in one kernel, two sequential K loops into two fp32 accumulators; dh never reaches HBM either.
    plain   dh by cuBLAS into the buffer of dz, then `linear_recompute_bwd` in place over it: 2 M N more elements through HBM,
            but the second GEMM runs at cuBLAS's speed.
`backward_form` picks one by arithmetic. An MLP's training step has 7 GEMMs either way (forward 2, z again, dh, dW2, dx, dW1).

Shapes: x (M, K), w1 (N, K), b1 (N), w2 (D, N), dy (M, D), h, dz (M, N), db_partials (ceil(M / bm), N). Any strides.
Not here: the other GEMMs, allocation, autograd, the forward pass (`linear_fwd` twice).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device.epilogue import emit_backward
from .device.gemm import accumulate, tile_of
from .host.arguments import check_out, check_shape, strides
from .host.dtypes import dtype_name
from .host.hardware import arch_of
from .host.launch import PreparedLaunch, launch
from .host.problem import GemmProblem, check_operands, partials_shape
from .host.tiles import TileConfig, backward_form
from .linear import db_partials_shape as plain_db_partials_shape
from .linear import linear_recompute_bwd

__all__ = ["db_partials_shape", "mlp_dual_bwd", "mlp_recompute_bwd"]


@triton.jit(do_not_specialize=["M"])
def mlp_dual_bwd_kernel(
    p_x, p_w1, p_dy, p_w2, p_b, p_h, p_dz, p_db, M, N, K, D, strides_x, strides_w1, stride_b, strides_dy, strides_w2,
    strides_h, strides_dz, strides_db, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EPILOGUE_N: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    # Two loops, not one: two dots in one loop would need both pairs of operands in shared memory at once, and two dots into
    # one accumulator miscompiled on Blackwell (triton#10821).
    dh = tl.zeros((BM, BN), tl.float32)
    dh = accumulate(
        dh, p_dy, p_w2, row0, col0, M, N, D, strides_dy, (strides_w2[1], strides_w2[0]), BM, BN, BK, EVEN_D, TMA,
        True, INTERPRET,
    )  # fmt: skip
    z = tl.zeros((BM, BN), tl.float32)
    z = accumulate(
        z, p_x, p_w1, row0, col0, M, N, K, strides_x, strides_w1, BM, BN, BK, EVEN_K, TMA, False, INTERPRET,
    )  # fmt: skip
    if p_db is not None:
        p_db += i_m.to(tl.int64) * strides_db[0]
    emit_backward(
        z, dh, row0, col0, p_b, None, p_dz, p_h, p_db, M, N, stride_b, (0, 0), strides_dz, strides_h, strides_db[1],
        None, ACT, False, BM, BN, EPILOGUE_N, INTERPRET,
    )  # fmt: skip


def _form(x: Tensor, w1: Tensor, w2: Tensor, form: str | None) -> str:
    if form not in (None, "dual", "plain"):
        raise ValueError(f"form must be None, 'dual' or 'plain'; got {form!r}")
    return form or backward_form(w1.shape[0], x.shape[1], w2.shape[0], dtype_name(x), arch_of(x))


def db_partials_shape(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    form: str | None = None,
    tile: TileConfig | None = None,
) -> tuple[int, int]:
    """Shape of the fp32 buffer that `mlp_recompute_bwd` with the same arguments wants for db1."""
    if _form(x, w1, w2, form) == "plain":
        return plain_db_partials_shape(x, w1, tile)
    return partials_shape("dual", x, w1, w2, tile=tile)


def mlp_recompute_bwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    dy: Tensor,
    w2: Tensor,
    h: Tensor | None,
    dz: Tensor,
    db_partials: Tensor | None = None,
    *,
    activation: str,
    form: str | None = None,
    tile: TileConfig | None = None,
    tma: bool | None = None,
) -> None:
    """h = act(z) and dz = (dy w2) * act'(z) with z = x w1^T + b1, which is never written.

    x (M, K), w1 (N, K), dy (M, D), w2 (D, N): one dtype, any strides, any size may be 0. b1 (N). h (M, N), or None where w2 is
    frozen and h is not wanted. dz (M, N). db_partials: fp32, of `db_partials_shape` for the same form and tile; its sum over
    rows is db1. form: "dual", "plain", or None for `backward_form`'s choice. Everything written is written fully.

    Raises ValueError for shapes, devices or activations that do not fit, TypeError for dtypes.
    """
    if _form(x, w1, w2, form) == "dual":
        mlp_dual_bwd(
            x, w1, b1, dy, w2, h, dz, db_partials, activation=activation, tile=tile, tma=tma,
        )  # fmt: skip
        return
    check_operands(activation, x, {"w1": w1}, {"dy": dy, "w2": w2})
    M, N = x.shape[0], w1.shape[0]
    check_shape({"b1": (b1, (N,)), "h": (h, (M, N)), "dz": (dz, (M, N))}, x)
    check_out(h=h, dz=dz)
    torch.mm(dy, w2, out=dz)
    linear_recompute_bwd(
        x, w1, b1, dz, dz, db_partials, activation=activation, h=h, tile=tile, tma=tma,
    )  # fmt: skip


def mlp_dual_bwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    dy: Tensor,
    w2: Tensor,
    h: Tensor | None,
    dz: Tensor,
    db_partials: Tensor | None = None,
    *,
    activation: str,
    tile: TileConfig | None = None,
    tma: bool | None = None,
) -> None:
    """The dual form of `mlp_recompute_bwd`, whose arguments these are. tma: as in `linear_fwd`."""
    launch(_prepare_dual_bwd, (x, w1, dy, w2, b1, h, dz, db_partials), (activation, tile, tma))


def _prepare_dual_bwd(
    x: Tensor,
    w1: Tensor,
    dy: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    h: Tensor | None,
    dz: Tensor,
    db_partials: Tensor | None,
    activation: str,
    tile: TileConfig | None,
    tma: bool | None,
) -> PreparedLaunch | None:
    gemm = GemmProblem.checked("dual", activation, tile, x, {"w1": w1}, {"dy": dy, "w2": w2})
    gemm.check(biases={"b1": b1}, outputs={"h": h, "dz": dz}, sums={"db_partials": db_partials})
    if not gemm.tiles:
        return None
    blocks = gemm.blocks(tma)
    operands = x.stride(), w1.stride(), *strides(b1, 1), dy.stride(), w2.stride()
    sizes = *gemm.sizes, gemm.D, *operands, strides(h, 2), dz.stride(), strides(db_partials, 2)
    return PreparedLaunch(mlp_dual_bwd_kernel, (gemm.tiles,), sizes, {"TMA": bool(blocks)} | gemm.options(), blocks)
