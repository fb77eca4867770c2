"""A linear layer in one pass forward, and its recompute-backward in one pass too.

    forward    y  = act(x W^T + b) (+ residual)          z = x W^T + b is never written
    backward   dz = dy * act'(z), db, optionally h = act(z)   z is computed again in the kernel, from x and W

Then dx = dz W and dW = dz^T x are plain GEMMs and belong to cuBLAS. With `h` asked for and `dz` given the buffer of `dy`,
the backward kernel is the in-place recompute epilogue of an MLP (see `mlp`).

Shapes: x (M, K), weight (N, K), bias (N), y, dy, dz, h, residual (M, N), db_partials (ceil(M / bm), N). Any strides.
Accumulation, activation and derivative are in fp32. db comes as one row of partial sums for each row of tiles, in a fixed
order and without atomics; the caller adds the rows up.

Not here: dx and dW, allocation, autograd. Memory: none but the tensors given.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, derivative, needs_z
from .gemm import accumulate, halves, tile_of
from .launch import arch_of, check_activation, check_out, check_shape, check_tile, dtype_name, on_device
from .numerics import INTERPRETED, narrow, widen
from .registry import KernelSpec, make_spec
from .tiles import TileConfig, candidates, choose, epilogue_piece

__all__ = ["db_partials_shape", "linear_fwd", "linear_recompute_bwd", "specs"]


@triton.jit
def linear_fwd_kernel(
    p_x,
    p_w,
    p_b,
    p_res,
    p_y,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    stride_rm,
    stride_rn,
    stride_ym,
    stride_yn,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    z = tl.zeros((BM, BN), tl.float32)
    z = accumulate(
        z, p_x, p_w, row0, col0, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, BM, BN, BK, EVEN_K, INTERPRET
    )
    o_m = row0 + tl.arange(0, BM)
    o_n = col0 + tl.arange(0, BN)
    m_n = o_n < N
    m = (o_m < M)[:, None] & m_n[None, :]
    if p_b is not None:
        z += widen(tl.load(p_b + o_n * stride_b, mask=m_n, other=0.0), INTERPRET)[None, :]
    y = activate(z, ACT)
    if p_res is not None:
        p_res += o_m[:, None] * stride_rm + o_n[None, :] * stride_rn
        y += widen(tl.load(p_res, mask=m, other=0.0), INTERPRET)
    p_y += o_m[:, None] * stride_ym + o_n[None, :] * stride_yn
    tl.store(p_y, narrow(y, p_y.dtype.element_ty, INTERPRET), mask=m)


@triton.jit
def _emit(
    z,
    row0,
    col0,
    p_b,
    p_dy,
    p_dz,
    p_h,
    p_db,
    M,
    N,
    stride_b,
    stride_dym,
    stride_dyn,
    stride_dzm,
    stride_dzn,
    stride_hm,
    stride_hn,
    stride_dbn,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PIECE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The backward epilogue for columns col0 .. col0 + BN, PIECE at a time: act' of a whole tile would not fit in
    registers beside z (255 of them and 80 spills at 128 x 128 on sm_90)."""
    if BN > PIECE:
        left, right = halves(z, BM, BN)
        _emit(
            left, row0, col0,
            p_b, p_dy, p_dz, p_h, p_db, M, N, stride_b, stride_dym, stride_dyn, stride_dzm, stride_dzn,
            stride_hm, stride_hn, stride_dbn, ACT, BM, BN // 2, PIECE, INTERPRET,
        )  # fmt: skip
        _emit(
            right, row0, col0 + BN // 2,
            p_b, p_dy, p_dz, p_h, p_db, M, N, stride_b, stride_dym, stride_dyn, stride_dzm, stride_dzn,
            stride_hm, stride_hn, stride_dbn, ACT, BM, BN // 2, PIECE, INTERPRET,
        )  # fmt: skip
    else:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        m_n = o_n < N
        m = (o_m < M)[:, None] & m_n[None, :]
        if p_b is not None:
            z += widen(tl.load(p_b + o_n * stride_b, mask=m_n, other=0.0), INTERPRET)[None, :]
        if p_h is not None:
            h = activate(z, ACT)
            tl.store(
                p_h + o_m[:, None] * stride_hm + o_n[None, :] * stride_hn,
                narrow(h, p_h.dtype.element_ty, INTERPRET),
                mask=m,
            )
        p_dy += o_m[:, None] * stride_dym + o_n[None, :] * stride_dyn
        dz = widen(tl.load(p_dy, mask=m, other=0.0), INTERPRET) * derivative(z, ACT)
        p_dz += o_m[:, None] * stride_dzm + o_n[None, :] * stride_dzn
        tl.store(p_dz, narrow(dz, p_dz.dtype.element_ty, INTERPRET), mask=m)
        if p_db is not None:
            # A row beyond M has z = b there, and 0 * act'(z) is NaN where act' is not finite: dropped, not added.
            db = tl.sum(tl.where(m, dz, 0.0), axis=0)
            tl.store(p_db + o_n * stride_dbn, db, mask=m_n)


@triton.jit
def linear_recompute_bwd_kernel(
    p_x,
    p_w,
    p_b,
    p_dy,
    p_dz,
    p_h,
    p_db,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
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
    ACT: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    PIECE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_m, i_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP_M)
    row0 = i_m.to(tl.int64) * BM
    col0 = i_n.to(tl.int64) * BN
    z = tl.zeros((BM, BN), tl.float32)
    if RECOMPUTE:
        z = accumulate(
            z, p_x, p_w, row0, col0, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, BM, BN, BK, EVEN_K, INTERPRET
        )
    if p_db is not None:
        p_db += i_m.to(tl.int64) * stride_dbm
    _emit(
        z,
        row0,
        col0,
        p_b,
        p_dy,
        p_dz,
        p_h,
        p_db,
        M,
        N,
        stride_b,
        stride_dym,
        stride_dyn,
        stride_dzm,
        stride_dzn,
        stride_hm,
        stride_hn,
        stride_dbn,
        ACT,
        BM,
        BN,
        PIECE,
        INTERPRET,
    )


def _tile(x: Tensor, weight: Tensor, tile: TileConfig | None) -> TileConfig:
    (M, K), N = x.shape, weight.shape[0]
    dtype, arch = dtype_name(x), arch_of(x)
    tile = tile or choose("linear", M, N, K, dtype, arch)
    check_tile("linear", tile, dtype, arch)
    return tile


def _check(x: Tensor, weight: Tensor, activation: str) -> tuple[int, int, int]:
    check_activation(activation)
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"x and weight must be matrices; got shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    (M, K), N = x.shape, weight.shape[0]
    check_shape({"weight": (weight, (N, K))}, x)
    if weight.dtype != x.dtype:
        raise TypeError(f"x is {x.dtype} and weight {weight.dtype}; cast one of them")
    return M, N, K


def db_partials_shape(x: Tensor, weight: Tensor, tile: TileConfig | None = None) -> tuple[int, int]:
    """Shape of the fp32 buffer `linear_recompute_bwd` wants for db: one row for each row of tiles, (ceil(M / bm), N)."""
    return -(-x.shape[0] // _tile(x, weight, tile).bm), weight.shape[0]


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    activation: str = "identity",
    residual: Tensor | None = None,
    tile: TileConfig | None = None,
) -> None:
    """out = act(x weight^T + bias) + residual, in one pass; the pre-activation is never written.

    x (M, K), weight (N, K), of one dtype: fp32, fp16 or bf16. bias (N), residual (M, N) and out (M, N): any of the three
    dtypes. Any strides; M, N or K may be 0. `out` may be the residual's own memory. tile: None chooses it by shape, dtype
    and architecture. fp32 is multiplied in full precision, not TF32.

    Raises ValueError for shapes, devices or activations that do not fit, TypeError for dtypes.
    """
    M, N, K = _check(x, weight, activation)
    check_shape({"bias": (bias, (N,)), "residual": (residual, (M, N)), "out": (out, (M, N))}, x)
    check_out(out=out)
    tile = _tile(x, weight, tile)
    if M == 0 or N == 0:
        return
    grid = (triton.cdiv(M, tile.bm) * triton.cdiv(N, tile.bn),)
    with on_device(x):
        linear_fwd_kernel[grid](
            x,
            weight,
            bias,
            residual,
            out,
            M,
            N,
            K,
            *x.stride(),
            *weight.stride(),
            *_strides(bias, 1),
            *_strides(residual, 2),
            *out.stride(),
            ACT=activation,
            BM=tile.bm,
            BN=tile.bn,
            BK=tile.bk,
            GROUP_M=tile.group_m,
            EVEN_K=K % tile.bk == 0,
            INTERPRET=INTERPRETED,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


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
    tile: TileConfig | None = None,
) -> None:
    """dz = dy * act'(x weight^T + bias), with the pre-activation recomputed in the kernel and never written.

    x, weight, bias, activation and tile: as in `linear_fwd`. dy (M, N): any strides, zero strides too. dz (M, N): may be
    dy's own memory with the same strides. db_partials: fp32, of `db_partials_shape`; its sum over rows is db. h (M, N):
    written with act(z) where given. Everything written is written fully.

    Raises ValueError for shapes, devices or activations that do not fit, TypeError for dtypes.
    """
    M, N, K = _check(x, weight, activation)
    tile = _tile(x, weight, tile)
    partials = (db_partials, db_partials_shape(x, weight, tile))
    check_shape(
        {"bias": (bias, (N,)), "dy": (dy, (M, N)), "dz": (dz, (M, N)), "h": (h, (M, N)), "db_partials": partials}, x
    )
    check_out(dz=dz, h=h, db_partials=db_partials)
    if db_partials is not None and dtype_name(db_partials) != "fp32":
        raise TypeError(f"db_partials must be float32; got {db_partials.dtype}")
    if M == 0 or N == 0:
        return
    grid = (triton.cdiv(M, tile.bm) * triton.cdiv(N, tile.bn),)
    with on_device(x):
        linear_recompute_bwd_kernel[grid](
            x,
            weight,
            bias,
            dy,
            dz,
            h,
            db_partials,
            M,
            N,
            K,
            *x.stride(),
            *weight.stride(),
            *_strides(bias, 1),
            *dy.stride(),
            *dz.stride(),
            *_strides(h, 2),
            *_strides(db_partials, 2),
            ACT=activation,
            RECOMPUTE=needs_z(activation) or h is not None,
            PIECE=epilogue_piece(tile),
            BM=tile.bm,
            BN=tile.bn,
            BK=tile.bk,
            GROUP_M=tile.group_m,
            EVEN_K=K % tile.bk == 0,
            INTERPRET=INTERPRETED,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    return t.stride() if t is not None else (0,) * dims


def specs(arch: int) -> list[KernelSpec]:
    """Both kernels at every tile and dtype of `arch`, as called on contiguous 16-byte aligned tensors with bias."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for tile in candidates("linear", dtype, arch):
            for activation in ("gelu_tanh", "silu") if dtype == "bf16" else ("gelu_tanh",):
                found += _pair(dtype, arch, tile, activation)
    return found


def _pair(dtype: str, arch: int, tile: TileConfig, activation: str) -> list[KernelSpec]:
    sizes = dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn"), "i32")
    shared = {
        "ACT": activation,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP_M": tile.group_m,
        "EVEN_K": True,
        "INTERPRET": False,
        "stride_xk": 1,
        "stride_wk": 1,
        "stride_b": 1,
    }
    meta = {
        "activation": activation,
        "gemm_loops": 1,
        "tensor_cores": dtype != "fp32",
        "tma": False,
        "pipelined": True,
    }
    always = ("p_x", "p_w", "p_b", "N", "K", "stride_xm", "stride_wn")
    fwd = make_spec(
        linear_fwd_kernel,
        variant=activation,
        dtype=dtype,
        arch=arch,
        tile=tile,
        types={
            **sizes,
            "p_x": "T",
            "p_w": "T",
            "p_b": "T",
            "p_res": "T",
            "p_y": "T",
            "stride_rm": "i32",
            "stride_ym": "i32",
        },
        constexprs={**shared, "stride_rn": 1, "stride_yn": 1},
        divisible=(*always, "p_res", "p_y", "stride_rm", "stride_ym"),
        meta=meta,
    )
    rows = ("stride_dym", "stride_dzm", "stride_hm", "stride_dbm")
    bwd = make_spec(
        linear_recompute_bwd_kernel,
        variant=activation,
        dtype=dtype,
        arch=arch,
        tile=tile,
        types={
            **sizes,
            **dict.fromkeys(("p_x", "p_w", "p_b", "p_dy", "p_dz", "p_h"), "T"),
            **dict.fromkeys(rows, "i32"),
            "p_db": "*fp32",
        },
        constexprs={
            **shared,
            **dict.fromkeys(("stride_dyn", "stride_dzn", "stride_hn", "stride_dbn"), 1),
            "RECOMPUTE": True,
            "PIECE": epilogue_piece(tile),
        },
        divisible=(*always, "p_dy", "p_dz", "p_h", "p_db", *rows),
        meta=meta,
    )
    return [fwd, bwd]
