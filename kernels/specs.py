"""The GEMM kernels as they ship: every tile, dtype and way of loading, for the ahead-of-time compiler.

A spec is compiled as the kernel is called on contiguous, 16-byte aligned matrices with a bias: inner strides are the constant
1, outer ones multiples of 16. Types follow from the arguments' names, so a new argument needs no entry here.
"""

from __future__ import annotations

from typing import Any

from .gated import gated_fwd_kernel, gated_recompute_bwd_kernel
from .linear import linear_fwd_kernel, linear_recompute_bwd_kernel
from .mlp import mlp_dual_bwd_kernel
from .registry import KernelSpec, make_spec
from .tiles import TileConfig, candidates, epilogue_piece

__all__ = ["specs"]

_DTYPES = ("bf16", "fp16", "fp32")
_SCALARS = {"seed": "i64", "offset": "i64", "first_row": "i64", "threshold": "i64"}


def specs(arch: int) -> list[KernelSpec]:
    """Every kernel of `linear`, `mlp` and `gated` at every tile and dtype of `arch`."""
    found = []
    for dtype in _DTYPES:
        for tma in (True, False) if arch in (90, 100) and dtype != "fp32" else (False,):
            for tile in candidates("linear", dtype, arch):
                found += linear_specs(dtype, arch, tile, "gelu_tanh", tma=tma)
            for tile in candidates("dual", dtype, arch):
                found += dual_specs(dtype, arch, tile, "gelu_tanh", tma=tma)
            for kind in ("gated_fwd", "gated_bwd"):
                for tile in candidates(kind, dtype, arch):
                    for activation in ("silu", "gelu_tanh") if dtype == "bf16" else ("silu",):
                        found += gated_specs(kind, dtype, arch, tile, activation, tma=tma)
    # Random numbers compile for long; one dtype stands for both 16-bit ones.
    for tma in (True, False) if arch in (90, 100) else (False,):
        for tile in candidates("linear_dropout", "bf16", arch):
            found += linear_specs("bf16", arch, tile, "gelu_tanh", tma=tma, dropout=True)
    return found


def linear_specs(
    dtype: str, arch: int, tile: TileConfig, activation: str, *, tma: bool, dropout: bool = False, ws: bool = False
) -> list[KernelSpec]:
    """Forward and recompute-backward of one linear layer."""
    blocks = {"p_x": (tile.bm, tile.bk), "p_w": (tile.bn, tile.bk)} if tma else {}
    inner = ("stride_xk", "stride_wk", "stride_b")
    shared = {"DROPOUT": dropout, "TMA": tma, "WARP_SPECIALIZE": ws}
    return [
        _spec(
            linear_fwd_kernel,
            "linear",
            (*inner, "stride_rn", "stride_yn"),
            {**shared, "PERSISTENT": tma},
            dtype, arch, tile, activation, blocks, gemm_loops=1,
        ),
        _spec(
            linear_recompute_bwd_kernel,
            "linear",
            (*inner, "stride_dyn", "stride_dzn", "stride_hn", "stride_dbn"),
            {**shared, "RECOMPUTE": True},
            dtype, arch, tile, activation, blocks, gemm_loops=1,
        ),
    ]  # fmt: skip


def dual_specs(
    dtype: str, arch: int, tile: TileConfig, activation: str, *, tma: bool, dropout: bool = False, ws: bool = False
) -> list[KernelSpec]:
    """The dual-GEMM backward of an MLP."""
    square = (tile.bm, tile.bk)
    blocks = {"p_x": square, "p_w1": (tile.bn, tile.bk), "p_dy": square, "p_w2": (tile.bk, tile.bn)} if tma else {}
    inner = tuple(f"stride_{n}" for n in ("xk", "w1k", "b", "dyd", "w2n", "hn", "dzn", "dbn"))
    flags = {"DROPOUT": dropout, "TMA": tma, "WARP_SPECIALIZE": ws, "EVEN_D": True}
    return [_spec(mlp_dual_bwd_kernel, "dual", inner, flags, dtype, arch, tile, activation, blocks, gemm_loops=2)]


def gated_specs(
    kind: str, dtype: str, arch: int, tile: TileConfig, activation: str, *, tma: bool, ws: bool = False
) -> list[KernelSpec]:
    """Forward (kind "gated_fwd") or recompute-backward ("gated_bwd") of a gated MLP."""
    rows, weights = (tile.bm, tile.bk), (tile.bn, tile.bk)
    blocks = {"p_x": rows, "p_wg": weights, "p_wu": weights} if tma else {}
    inner = tuple(f"stride_{n}" for n in ("xk", "wgk", "wuk", "bg", "bu", "hn"))
    flags = {"TMA": tma, "WARP_SPECIALIZE": ws}
    if kind == "gated_fwd":
        return [_spec(gated_fwd_kernel, kind, inner, flags, dtype, arch, tile, activation, blocks, gemm_loops=1)]
    if tma:
        blocks |= {"p_dy": rows, "p_wd": (tile.bk, tile.bn)}
    inner += tuple(f"stride_{n}" for n in ("dyd", "wdn", "dzgn", "dzun", "dbgn", "dbun"))
    flags |= {"EVEN_D": True}
    return [_spec(gated_recompute_bwd_kernel, kind, inner, flags, dtype, arch, tile, activation, blocks, gemm_loops=2)]


def _spec(
    fn: Any,
    kind: str,
    inner: tuple[str, ...],
    flags: dict[str, Any],
    dtype: str,
    arch: int,
    tile: TileConfig,
    activation: str,
    blocks: dict[str, tuple[int, int]],
    *,
    gemm_loops: int,
) -> KernelSpec:
    """inner: strides that are 1. flags: constexprs beyond the tile's own. blocks: descriptors and their block shapes."""
    names = list(fn.arg_names)
    constexprs = {
        "ACT": activation,
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": tile.bk,
        "PIECE": epilogue_piece(tile, kind, flags.get("DROPOUT", False)),
        "GROUP_M": tile.group_m,
        "EVEN_K": True,
        "INTERPRET": False,
        **dict.fromkeys(inner, 1),
        **flags,
    }
    types: dict[str, str] = {}
    for n in names:
        if n in blocks:
            types[n] = f"tensordesc<{dtype}[{blocks[n][0]},{blocks[n][1]}]>"
        elif n in constexprs:
            continue
        elif n.startswith("p_"):
            types[n] = "*fp32" if n.startswith("p_db") else "T"
        else:
            types[n] = "fp32" if n in ("scale", "multiplier") else _SCALARS.get(n, "i32")
    divisible = [n for n in types if n not in blocks and (n.startswith(("p_", "stride_")) or n in ("N", "K", "D"))]
    variant = ",".join((activation, *(["tma"] if blocks else []), *(k.lower() for k in ("DROPOUT",) if flags.get(k))))
    return make_spec(
        fn,
        variant=variant,
        dtype=dtype,
        arch=arch,
        tile=tile,
        types=types,
        constexprs=constexprs,
        divisible=tuple(divisible),
        meta={
            "activation": activation,
            "gemm_loops": gemm_loops,
            "tensor_cores": dtype != "fp32",
            "tma": bool(blocks),
            "pipelined": True,
        },
    )
