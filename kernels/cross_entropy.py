"""Cross entropy over a large vocabulary, in place on one chunk of logits.

One program owns one row. It reads the row once with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) and either
writes the row's loss, or reads it a second time and writes the loss's gradient over the logits. Nothing is kept from forward to
backward: the chunk's logits are computed again, and the log-sum-exp with them, so that chunk by chunk all a training step holds
is one chunk of logits. The GEMMs around this kernel belong to cuBLAS; `gpuckpt.functional.linear_cross_entropy` joins them.

    z' = softcap tanh(z / softcap)                         (Gemma 2, arXiv:2408.00118), or z
    lse = log sum_v exp z'_v
    loss = (1 - s) (lse - z'_target) + s (lse - mean_v z'_v) + w lse^2
           s: label smoothing as in torch; w: z-loss (PaLM, arXiv:2204.02311)

Shapes: logits (M, V), rows at any stride and contiguous along V; target (M) int64; loss, dloss (M) fp32.
A row whose target is `ignore_index` has loss 0 and gradient 0. A target outside [0, V) gives NaN instead of a read out of bounds.

Not here: class weights, probabilities as targets, allocation.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, int64

from .device.activations import activate
from .device.casts import INTERPRETED, narrow, widen
from .host.arguments import check_out, check_shape
from .host.dtypes import dtype_name
from .host.launch import PreparedLaunch, launch
from .host.tiles import BlockTile

__all__ = ["choose_rows", "cross_entropy_bwd", "cross_entropy_fwd"]


TILES = (BlockTile(1, 4096, 8), BlockTile(1, 1024, 4))


def choose_rows(V: int) -> BlockTile:
    """The block for rows of V elements: wide ones where a row fills several of them."""
    return TILES[0] if 4 * TILES[1].columns < V else TILES[1]


@triton.jit
def _load_capped(p_row, o, V, inv_softcap, softcap, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr):
    """z' (BLOCK,) fp32; minus infinity beyond V."""
    z = widen(tl.load(p_row + o, mask=o < V, other=0.0), INTERPRET)
    if SOFTCAP:
        z = softcap * activate(z * inv_softcap, "tanh", tl.float32, False)
    return tl.where(o < V, z, float("-inf"))


@triton.jit
def _row_sums(
    p_row,
    V,
    inv_softcap,
    softcap,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """max z' of a row, sum exp(z' - max), and sum z' where SMOOTH. max and log sum are never added up before something of
    the same size is subtracted: at logits of 100 that would cost four digits of a probability near 1."""
    top = tl.full((), float("-inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for v0 in range(0, V, BLOCK):
        o = v0 + tl.arange(0, BLOCK)
        z = _load_capped(p_row, o, V, inv_softcap, softcap, SOFTCAP, INTERPRET)
        higher = tl.maximum(top, tl.max(z, axis=0))
        # While every logit is minus infinity there is nothing to subtract: inf - inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), axis=0)
        top = higher
        if SMOOTH:
            total += tl.sum(tl.where(o < V, z, 0.0), axis=0)
    return top, mass, total


@triton.jit
def cross_entropy_fwd_kernel(
    p_logits,
    p_target,
    p_loss,
    V,
    stride_m,
    stride_t,
    ignore_index,
    smoothing,
    z_weight,
    inv_softcap,
    softcap,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + i_m * stride_t).to(tl.int64)
    p_row = p_logits + i_m * stride_m
    loss = tl.full((), 0.0, tl.float32)
    if target != ignore_index:
        top, mass, total = _row_sums(p_row, V, inv_softcap, softcap, SOFTCAP, SMOOTH, BLOCK, INTERPRET)
        inside = (target >= 0) & (target < V)
        picked = widen(tl.load(p_row + target, mask=inside, other=0.0), INTERPRET)
        if SOFTCAP:
            picked = softcap * activate(picked * inv_softcap, "tanh", tl.float32, False)
        log_mass = tl.log(mass)
        loss = (top - tl.where(inside, picked, float("nan"))) + log_mass
        if SMOOTH:
            loss = (1.0 - smoothing) * loss + smoothing * ((top - total / V) + log_mass)
        lse = top + log_mass
        loss += z_weight * lse * lse
    tl.store(p_loss + i_m, loss)


@triton.jit
def cross_entropy_bwd_kernel(
    p_logits,
    p_target,
    p_dloss,
    V,
    stride_m,
    stride_t,
    stride_d,
    ignore_index,
    smoothing,
    z_weight,
    inv_softcap,
    softcap,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + i_m * stride_t).to(tl.int64)
    p_row = p_logits + i_m * stride_m
    if target == ignore_index:
        for v0 in range(0, V, BLOCK):
            o = v0 + tl.arange(0, BLOCK)
            zero = tl.full((BLOCK,), 0.0, tl.float32)
            tl.store(p_row + o, narrow(zero, p_logits.dtype.element_ty, INTERPRET), mask=o < V)
    else:
        dloss = widen(tl.load(p_dloss + i_m * stride_d), INTERPRET)
        dloss = tl.where((target >= 0) & (target < V), dloss, float("nan"))
        top, mass, _ = _row_sums(p_row, V, inv_softcap, softcap, SOFTCAP, False, BLOCK, INTERPRET)
        scale = (1.0 + 2.0 * z_weight * (top + tl.log(mass))) / mass
        for v0 in range(0, V, BLOCK):
            o = v0 + tl.arange(0, BLOCK)
            z = _load_capped(p_row, o, V, inv_softcap, softcap, SOFTCAP, INTERPRET)
            d = scale * tl.exp(z - top) - tl.where(o == target, 1.0 - smoothing, 0.0)
            if SMOOTH:
                d -= smoothing / V
            if SOFTCAP:
                t = tl.where(o < V, z * inv_softcap, 0.0)
                d *= (1.0 - t) * (1.0 + t)
            tl.store(p_row + o, narrow(dloss * d, p_logits.dtype.element_ty, INTERPRET), mask=o < V)


def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    loss: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    tile: BlockTile | None = None,
) -> None:
    """loss[i] = the loss of row i, in fp32. Writes every element of `loss`, and nothing else.

    logits (M, V): fp32, fp16 or bf16, contiguous along V. target (M): int64. loss (M): fp32, contiguous.
    """
    launch(_prepare_fwd, (logits, target, loss), (ignore_index, label_smoothing, z_loss, softcap, tile))


def _prepare_fwd(logits: Tensor, target: Tensor, loss: Tensor, *options: Any) -> PreparedLaunch | None:
    M, V = _check(logits, target, *options)
    check_shape({"loss": (loss, (M,))}, logits)
    if dtype_name(loss) != "fp32" or not loss.is_contiguous():
        raise TypeError(f"loss must be a contiguous float32 vector; got {loss.dtype} with strides {loss.stride()}")
    if M == 0:
        return None
    sizes = V, logits.stride(0), target.stride(0)
    return _prepared(cross_entropy_fwd_kernel, M, V, sizes, *options)


def cross_entropy_bwd(
    logits: Tensor,
    target: Tensor,
    dloss: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    tile: BlockTile | None = None,
) -> None:
    """Overwrites the logits with dloss[i] * d loss[i] / d logits[i, :].

    dloss (M): any stride, also zero, any of the three float types. The rest as in `cross_entropy_fwd`, with the same values.
    """
    launch(_prepare_bwd, (logits, target, dloss), (ignore_index, label_smoothing, z_loss, softcap, tile))


def _prepare_bwd(logits: Tensor, target: Tensor, dloss: Tensor, *options: Any) -> PreparedLaunch | None:
    M, V = _check(logits, target, *options)
    check_shape({"dloss": (dloss, (M,))}, logits)
    check_out(logits=logits)
    if M == 0:
        return None
    sizes = V, logits.stride(0), target.stride(0), dloss.stride(0)
    return _prepared(cross_entropy_bwd_kernel, M, V, sizes, *options)


def _check(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    tile: BlockTile | None,
) -> tuple[int, int]:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be a matrix with at least one column; got shape {tuple(logits.shape)}")
    M, V = logits.shape
    dtype_name(logits)
    if V > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits must be contiguous along the vocabulary; got strides {logits.stride()}")
    if target.shape != (M,) or target.dtype != int64 or target.device != logits.device:
        raise ValueError(
            f"target must be int64 of shape ({M},) on {logits.device}; "
            f"got {target.dtype} of shape {tuple(target.shape)} on {target.device}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be from 0 to 1")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap={softcap} must be positive, or None for no cap")
    return M, V


def _prepared(
    kernel: Any,
    M: int,
    V: int,
    sizes: tuple[int, ...],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    tile: BlockTile | None,
) -> PreparedLaunch:
    tile = tile or choose_rows(V)
    caps = (0.0, 0.0) if softcap is None else (1.0 / softcap, float(softcap))
    constants = {
        "SOFTCAP": softcap is not None,
        "SMOOTH": label_smoothing != 0.0,
        "BLOCK": tile.columns,
        "INTERPRET": INTERPRETED,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return PreparedLaunch(kernel, (M,), (*sizes, ignore_index, float(label_smoothing), float(z_loss), *caps), constants)
