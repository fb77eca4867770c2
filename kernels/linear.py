"""A linear layer in one pass forward, and its recompute-backward in one pass too.

    forward    y  = dropout(act(x W^T + b)) (+ residual)              z = x W^T + b is never written
    backward   dz = dropout(dy) * act'(z), db, optionally h = dropout(act(z))   z is computed again, from x and W

Then dx = dz W and dW = dz^T x are plain GEMMs and belong to cuBLAS. With `h` asked for and `dz` given the buffer of `dy`,
the backward kernel is the in-place recompute epilogue of an MLP (see `mlp`).

Shapes: x (M, K), weight (N, K), bias (N), y, dy, dz, h, residual (M, N), db_partials (ceil(M / bm), N). Any strides.
Accumulation, activation and derivative are in fp32. db comes as one row of partial sums for each row of tiles, in a fixed
order and without atomics; the caller adds the rows up.

On sm_90 and sm_100 operands are loaded through tensor descriptors where their strides and alignment allow it, else through
pointers; forward then runs a persistent grid, one program for each multiprocessor.

Not here: dx and dW, allocation, autograd. Memory: none but the tensors given.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device.activations import needs_z
from .device.dropout import NO_DROPOUT, Dropout
from .device.epilogue import emit_backward, emit_forward
from .device.gemm import accumulate, tile_of
from .host.arguments import strides
from .host.hardware import multiprocessors
from .host.launch import PreparedLaunch, launch
from .host.problem import GemmProblem, partials_shape
from .host.tiles import TileConfig

__all__ = ["db_partials_shape", "linear_fwd", "linear_recompute_bwd"]

# Neither a new seed or offset nor another number of rows must compile a new kernel.
_NOT_SPECIALIZED = ["M", "seed", "offset", "first_row", "threshold"]


@triton.jit
def _forward_tile(
    pid, p_x, p_w, p_b, p_res, p_y, M, N, K, strides_x, strides_w, stride_b, strides_res, strides_y, dropout,
    ACT: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EPILOGUE_N: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of(pid, M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    z = tl.zeros((BM, BN), tl.float32)
    z = accumulate(
        z, p_x, p_w, row0, col0, M, N, K, strides_x, strides_w, BM, BN, BK, EVEN_K, TMA, False, INTERPRET,
    )  # fmt: skip
    emit_forward(
        z, row0, col0, p_b, p_res, p_y, M, N, stride_b, strides_res, strides_y, dropout, ACT, DROPOUT, BM, BN,
        EPILOGUE_N, INTERPRET,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def linear_fwd_kernel(
    p_x, p_w, p_b, p_res, p_y, M, N, K, strides_x, strides_w, stride_b, strides_res, strides_y, seed, offset,
    first_row, threshold, scale, ACT: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EPILOGUE_N: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr,
    PERSISTENT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    dropout = (seed, offset, first_row, threshold, scale)
    if PERSISTENT:
        tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
        for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            _forward_tile(
                pid, p_x, p_w, p_b, p_res, p_y, M, N, K, strides_x, strides_w, stride_b, strides_res, strides_y,
                dropout, ACT, DROPOUT, BM, BN, BK, EPILOGUE_N, GROUP_M, EVEN_K, TMA, INTERPRET,
            )  # fmt: skip
    else:
        _forward_tile(
            tl.program_id(0), p_x, p_w, p_b, p_res, p_y, M, N, K, strides_x, strides_w, stride_b, strides_res,
            strides_y, dropout, ACT, DROPOUT, BM, BN, BK, EPILOGUE_N, GROUP_M, EVEN_K, TMA, INTERPRET,
        )  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def linear_recompute_bwd_kernel(
    p_x, p_w, p_b, p_dy, p_dz, p_h, p_db, M, N, K, strides_x, strides_w, stride_b, strides_dy, strides_dz, strides_h,
    strides_db, seed, offset, first_row, threshold, scale, ACT: tl.constexpr, RECOMPUTE: tl.constexpr,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EPILOGUE_N: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    dropout = (seed, offset, first_row, threshold, scale)
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    z = tl.zeros((BM, BN), tl.float32)
    if RECOMPUTE:
        z = accumulate(
            z, p_x, p_w, row0, col0, M, N, K, strides_x, strides_w, BM, BN, BK, EVEN_K, TMA, False, INTERPRET,
        )  # fmt: skip
    if p_db is not None:
        p_db += i_m.to(tl.int64) * strides_db[0]
    emit_backward(
        z, None, row0, col0, p_b, p_dy, p_dz, p_h, p_db, M, N, stride_b, strides_dy, strides_dz, strides_h,
        strides_db[1], dropout, ACT, DROPOUT, BM, BN, EPILOGUE_N, INTERPRET,
    )  # fmt: skip


def _kind(dropped: bool) -> str:
    return "linear_dropout" if dropped else "linear"


def _fixed_numbers(dropped: bool) -> tuple[float, ...]:
    """Dropout's arguments where there is none; else they come with each launch."""
    return () if dropped else NO_DROPOUT.kernel_args()


def db_partials_shape(
    x: Tensor, weight: Tensor, tile: TileConfig | None = None, dropout: Dropout | None = None
) -> tuple[int, int]:
    """Shape of the fp32 buffer `linear_recompute_bwd` wants for db: one row for each row of tiles, (ceil(M / bm), N)."""
    return partials_shape(_kind(dropout is not None), x, weight, tile=tile)


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    activation: str = "identity",
    residual: Tensor | None = None,
    dropout: Dropout | None = None,
    tile: TileConfig | None = None,
    tma: bool | None = None,
) -> None:
    """out = dropout(act(x weight^T + bias)) + residual, in one pass; the pre-activation is never written.

    x (M, K), weight (N, K), of one dtype: fp32, fp16 or bf16. bias (N), residual (M, N) and out (M, N): any of the three
    dtypes. Any strides; M, N or K may be 0. `out` may be the residual's own memory. fp32 is multiplied in full precision,
    not TF32. tile: None chooses it by shape, dtype and architecture. tma: load through tensor descriptors; None chooses by
    architecture and alignment.

    Raises ValueError for shapes, devices or activations that do not fit, TypeError for dtypes.
    """
    options = activation, dropout is not None, tile, tma
    launch(_prepare_fwd, (x, weight, bias, residual, out), options, () if dropout is None else dropout.kernel_args())


def _prepare_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    activation: str,
    dropped: bool,
    tile: TileConfig | None,
    tma: bool | None,
) -> PreparedLaunch | None:
    gemm = GemmProblem.checked(_kind(dropped), activation, tile, x, {"weight": weight})
    gemm.check(biases={"bias": bias}, inputs={"residual": residual}, outputs={"out": out})
    if not gemm.tiles:
        return None
    blocks = gemm.blocks(tma)
    grid = min(gemm.tiles, multiprocessors(x)) if blocks else gemm.tiles
    vectors = *strides(bias, 1), strides(residual, 2)
    sizes = *gemm.sizes, x.stride(), weight.stride(), *vectors, out.stride(), *_fixed_numbers(dropped)
    own = {"DROPOUT": dropped, "TMA": bool(blocks), "PERSISTENT": bool(blocks)}
    return PreparedLaunch(linear_fwd_kernel, (grid,), sizes, own | gemm.options(), blocks)


def linear_recompute_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    dz: Tensor,
    db_partials: Tensor | None = None,
    *,
    activation: str = "identity",
    h: Tensor | None = None,
    dropout: Dropout | None = None,
    tile: TileConfig | None = None,
    tma: bool | None = None,
) -> None:
    """dz = dropout(dy) * act'(x weight^T + bias), with the pre-activation recomputed in the kernel and never written.

    x, weight, bias, activation, dropout, tile and tma: as in `linear_fwd`, and the same, so that z and the
    mask have the same bits. dy (M, N): any strides, zero strides too. dz (M, N): may be dy's own memory with the same strides.
    db_partials: fp32, of `db_partials_shape`; its sum over rows is db. h (M, N): written with dropout(act(z)) where given.
    Everything written is written fully.

    Raises ValueError for shapes, devices or activations that do not fit, TypeError for dtypes.
    """
    options = activation, dropout is not None, tile, tma
    tensors = x, weight, bias, dy, dz, h, db_partials
    launch(_prepare_recompute_bwd, tensors, options, () if dropout is None else dropout.kernel_args())


def _prepare_recompute_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    dz: Tensor,
    h: Tensor | None,
    db_partials: Tensor | None,
    activation: str,
    dropped: bool,
    tile: TileConfig | None,
    tma: bool | None,
) -> PreparedLaunch | None:
    gemm = GemmProblem.checked(_kind(dropped), activation, tile, x, {"weight": weight})
    outputs, sums = {"dz": dz, "h": h}, {"db_partials": db_partials}
    gemm.check(biases={"bias": bias}, inputs={"dy": dy}, outputs=outputs, sums=sums)
    if not gemm.tiles:
        return None
    blocks = gemm.blocks(tma)
    results = dy.stride(), dz.stride(), strides(h, 2), strides(db_partials, 2)
    sizes = *gemm.sizes, x.stride(), weight.stride(), *strides(bias, 1), *results, *_fixed_numbers(dropped)
    own = {"RECOMPUTE": needs_z(activation) or h is not None, "DROPOUT": dropped, "TMA": bool(blocks)}
    return PreparedLaunch(linear_recompute_bwd_kernel, (gemm.tiles,), sizes, own | gemm.options(), blocks)
