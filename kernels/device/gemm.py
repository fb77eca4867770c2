"""What every GEMM kernel here shares: which tile a program computes, the K loop, and the split of a block in pieces.

Shapes: a (M, K), b (N, K); acc (BM, BN) = a b^T in fp32.

The K loop reads through pointers (any strides; cp.async from sm_80 on) or through tensor descriptors (TMA, sm_90 and sm_100;
rows contiguous and 16-byte aligned, see `arguments.describable`). Both add in the same order, so both give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .casts import operand

__all__ = ["accumulate", "accumulate_two", "pieces", "tile_of"]


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of the pid-th tile. GROUP_M row tiles advance together through the columns, so that the programs
    that run at one time touch a near-square patch of the output and find their operands in L2."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    per_group = GROUP_M * tiles_n
    first_m = (pid // per_group) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % per_group
    return first_m + within % rows, within // rows


@triton.jit
def accumulate(
    acc, p_a, p_b, row0, col0, M, N, K, strides_a, strides_b, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, B_IS_KN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """acc + a[row0:row0+BM] b[col0:col0+BN]^T, K in steps of BK from 0 up: the order that makes a recomputed z bitwise equal.

    row0, col0 are int64, and so is every offset before it meets a stride. fp32 operands are multiplied in full precision
    ("ieee", no tensor cores): TF32 would make fp32 gradients differ from torch's default. With TMA, p_a and p_b are
    descriptors, strides are unused, and B_IS_KN says that b is stored as (K, N).
    """
    if TMA:
        row = row0.to(tl.int32)
        col = col0.to(tl.int32)
        for i_k in tl.range(0, tl.cdiv(K, BK)):
            b_a = p_a.load([row, i_k * BK])
            b_b = p_b.load([i_k * BK, col]) if B_IS_KN else tl.trans(p_b.load([col, i_k * BK]))
            acc = tl.dot(operand(b_a, INTERPRET), operand(b_b, INTERPRET), acc, input_precision="ieee")
    else:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        o_k = tl.arange(0, BK)
        m_m = o_m < M
        m_n = o_n < N
        p_a += o_m[:, None] * strides_a[0] + o_k[None, :].to(tl.int64) * strides_a[1]
        p_b += o_n[None, :] * strides_b[0] + o_k[:, None].to(tl.int64) * strides_b[1]
        step = tl.full((), BK, tl.int64)
        for i_k in tl.range(0, tl.cdiv(K, BK)):
            if EVEN_K:
                b_a = tl.load(p_a, mask=m_m[:, None], other=0.0)
                b_b = tl.load(p_b, mask=m_n[None, :], other=0.0)
            else:
                m_k = o_k < K - i_k * BK
                b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
                b_b = tl.load(p_b, mask=m_n[None, :] & m_k[:, None], other=0.0)
            acc = tl.dot(operand(b_a, INTERPRET), operand(b_b, INTERPRET), acc, input_precision="ieee")
            p_a += step * strides_a[1]
            p_b += step * strides_b[1]
    return acc


@triton.jit
def accumulate_two(
    p_a, p_b, p_c, row0, col0, M, N, K, strides_a, strides_b, strides_c, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, EVEN_K: tl.constexpr, TMA: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(a b^T, a c^T) for b and c (N, K), each as `accumulate` would have it, with a read once for both."""
    acc_b = tl.zeros((BM, BN), tl.float32)
    acc_c = tl.zeros((BM, BN), tl.float32)
    if TMA:
        row = row0.to(tl.int32)
        col = col0.to(tl.int32)
        for i_k in tl.range(0, tl.cdiv(K, BK)):
            b_a = operand(p_a.load([row, i_k * BK]), INTERPRET)
            b_b = operand(tl.trans(p_b.load([col, i_k * BK])), INTERPRET)
            b_c = operand(tl.trans(p_c.load([col, i_k * BK])), INTERPRET)
            acc_b = tl.dot(b_a, b_b, acc_b, input_precision="ieee")
            acc_c = tl.dot(b_a, b_c, acc_c, input_precision="ieee")
    else:
        o_m = row0 + tl.arange(0, BM)
        o_n = col0 + tl.arange(0, BN)
        o_k = tl.arange(0, BK)
        m_m = o_m < M
        m_n = o_n < N
        p_a += o_m[:, None] * strides_a[0] + o_k[None, :].to(tl.int64) * strides_a[1]
        p_b += o_n[None, :] * strides_b[0] + o_k[:, None].to(tl.int64) * strides_b[1]
        p_c += o_n[None, :] * strides_c[0] + o_k[:, None].to(tl.int64) * strides_c[1]
        step = tl.full((), BK, tl.int64)
        for i_k in tl.range(0, tl.cdiv(K, BK)):
            if EVEN_K:
                b_a = tl.load(p_a, mask=m_m[:, None], other=0.0)
                b_b = tl.load(p_b, mask=m_n[None, :], other=0.0)
                b_c = tl.load(p_c, mask=m_n[None, :], other=0.0)
            else:
                m_k = o_k < K - i_k * BK
                b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
                b_b = tl.load(p_b, mask=m_n[None, :] & m_k[:, None], other=0.0)
                b_c = tl.load(p_c, mask=m_n[None, :] & m_k[:, None], other=0.0)
            b_a = operand(b_a, INTERPRET)
            acc_b = tl.dot(b_a, operand(b_b, INTERPRET), acc_b, input_precision="ieee")
            acc_c = tl.dot(b_a, operand(b_c, INTERPRET), acc_c, input_precision="ieee")
            p_a += step * strides_a[1]
            p_b += step * strides_b[1]
            p_c += step * strides_c[1]
    return acc_b, acc_c


@triton.jit
def pieces(v, BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr):
    """A (BM, BN) block as a tuple of blocks (BM, WIDTH), from left to right, by halving: the tensor cores' layouts split in
    registers."""
    if BN > WIDTH:
        left, right = tl.split(tl.permute(tl.reshape(v, (BM, 2, BN // 2)), (0, 2, 1)))
        r = pieces(left, BM, BN // 2, WIDTH) + pieces(right, BM, BN // 2, WIDTH)
    else:
        r = (v,)
    return r
