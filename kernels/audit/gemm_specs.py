"""The GEMM kernels as they ship, for the ahead-of-time compiler: what a launch can be, and what of it is compiled.

tile, dtype, loading    Every combination that the launchers choose by themselves: on sm_90 and sm_100 16-bit operands come
                        through descriptors. Pointers there are for who asks for them (`tma=False`): bf16 with one activation.
layout                  Operands are regular (`arguments.regular`: inner strides are the constant 1, outer ones and sizes
                        multiples of 16), or nothing is known about them and the small unaligned tile is taken: both are
                        compiled. Where pointers are used, so is a K that is no multiple of the preferred tile's step;
                        descriptors mask it.
optional operands       Bias, residual, h and the sums for db are all given. A launch without one is the same code less its
                        loads, stores and addresses.
activation              A kernel's registers depend on it, and not only upwards: ptxas may hold a light kernel to a round number
                        of registers for one more block on a multiprocessor, and spill. So on sm_80, sm_90 and sm_100, whose code
                        differs, the preferred bf16 tile is compiled with every activation, the others with the lightest
                        (identity) and with those that needed most registers (gelu_tanh, silu). fp32 is compiled with
                        the extremes, and so is dropout, whose random numbers need more registers than any activation. fp16,
                        which differs from bf16 in conversions alone, is compiled with gelu_tanh.
sm_86, sm_89, sm_120    run sm_80's tiles through the same code generator: the extremes only, fp16 with the preferred tile.

Not compiled: outputs and gradients whose layout is irregular beside regular operands (they are allocated contiguous; such a dy
cost up to 12 spills outside of the K loop), strides past 2^31, and outputs of another dtype than the operands.

Constants and options are those of the launchers (`arguments.gemm_options`); a test compares whole launches with what is compiled.
Types follow from the arguments' names, so a new argument needs no entry here.
"""

from __future__ import annotations

import functools
from typing import Any

from ..device.activations import ACTIVATIONS
from ..gated import gated_fwd_kernel, gated_recompute_bwd_kernel
from ..host.arguments import gemm_options
from ..host.tiles import KINDS, TileConfig, candidates, unaligned_tile
from ..linear import linear_fwd_kernel, linear_recompute_bwd_kernel
from ..mlp import mlp_dual_bwd_kernel
from .specs import WHOLE_ARCHS, KernelSpec, make_spec

__all__ = ["dual_specs", "gated_specs", "linear_specs", "specs", "uses_tma"]

_TYPES = {
    **dict.fromkeys(("seed", "offset", "first_row", "threshold"), "i64"),
    **dict.fromkeys(("scale", "multiplier"), "fp32"),
    **dict.fromkeys(("p_db", "p_dbg", "p_dbu"), "*fp32"),
}

_EXTREMES = ("gelu_tanh", "identity")


def specs(arch: int) -> list[KernelSpec]:
    """Every GEMM kernel for `arch`, the preferred configuration of each first."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for kind in KINDS:
            own = candidates(kind, dtype, arch)
            for tile in own:
                for activation in _activations(kind, dtype, arch, tile is own[0]):
                    found += _kind_specs(kind, dtype, arch, tile, activation, tma=uses_tma(dtype, arch))
            if uses_tma(dtype, arch):
                for tile in own if dtype == "bf16" else ():
                    found += _kind_specs(kind, dtype, arch, tile, "gelu_tanh", tma=False)
            elif kind != "linear_dropout" and (arch in WHOLE_ARCHS or dtype != "fp16"):
                found += _kind_specs(kind, dtype, arch, own[0], "gelu_tanh", even=False)
            if arch not in WHOLE_ARCHS and dtype == "fp16":
                continue
            for activation in _EXTREMES if dtype == "bf16" else _EXTREMES[:1]:
                found += _kind_specs(kind, dtype, arch, unaligned_tile(kind, dtype, arch), activation, unaligned=True)
    return found


def uses_tma(dtype: str, arch: int) -> bool:
    """Whether regular operands come through descriptors."""
    return arch in (90, 100) and dtype != "fp32"


def _activations(kind: str, dtype: str, arch: int, preferred: bool) -> tuple[str, ...]:
    if kind == "linear_dropout":
        return _EXTREMES if dtype == "bf16" else _EXTREMES[:1] if arch in WHOLE_ARCHS or preferred else ()
    if arch in WHOLE_ARCHS and dtype == "bf16":
        return tuple(dict.fromkeys((*_EXTREMES, *ACTIVATIONS))) if preferred else (*_EXTREMES, "silu")
    if dtype == "fp16":
        return _EXTREMES[:1] if arch in WHOLE_ARCHS or preferred else ()
    return _EXTREMES


def _kind_specs(kind: str, dtype: str, arch: int, tile: TileConfig, activation: str, **form: bool) -> list[KernelSpec]:
    if kind.startswith("gated"):
        return gated_specs(kind, dtype, arch, tile, activation, **form)
    if kind == "dual":
        return dual_specs(dtype, arch, tile, activation, **form)
    return linear_specs(dtype, arch, tile, activation, dropout=kind == "linear_dropout", **form)


def linear_specs(
    dtype: str,
    arch: int,
    tile: TileConfig,
    activation: str,
    *,
    tma: bool = False,
    dropout: bool = False,
    unaligned: bool = False,
    even: bool = True,
) -> list[KernelSpec]:
    """Forward and recompute-backward of one linear layer."""
    blocks = {"p_x": (tile.bm, tile.bk), "p_w": (tile.bn, tile.bk)} if tma else {}
    shared = {"DROPOUT": dropout, "TMA": tma}
    common = functools.partial(
        _spec, kind="linear", dtype=dtype, arch=arch, tile=tile, activation=activation, blocks=blocks,
        unaligned=unaligned, even=even,
    )  # fmt: skip
    return [
        common(linear_fwd_kernel, flags={**shared, "PERSISTENT": tma}),
        common(linear_recompute_bwd_kernel, flags={**shared, "RECOMPUTE": True}),
    ]


def dual_specs(
    dtype: str,
    arch: int,
    tile: TileConfig,
    activation: str,
    *,
    tma: bool = False,
    unaligned: bool = False,
    even: bool = True,
) -> list[KernelSpec]:
    """The dual-GEMM backward of an MLP."""
    square = (tile.bm, tile.bk)
    blocks = {"p_x": square, "p_w1": (tile.bn, tile.bk), "p_dy": square, "p_w2": (tile.bk, tile.bn)} if tma else {}
    flags = {"TMA": tma, "EVEN_D": True}
    return [
        _spec(mlp_dual_bwd_kernel, "dual", dtype, arch, tile, activation, blocks, flags, unaligned=unaligned, even=even)
    ]


def gated_specs(
    kind: str,
    dtype: str,
    arch: int,
    tile: TileConfig,
    activation: str,
    *,
    tma: bool = False,
    unaligned: bool = False,
    even: bool = True,
) -> list[KernelSpec]:
    """Forward (kind "gated_fwd") or recompute-backward ("gated_bwd") of a gated MLP."""
    rows, weights = (tile.bm, tile.bk), (tile.bn, tile.bk)
    blocks = {"p_x": rows, "p_wg": weights, "p_wu": weights} if tma else {}
    flags = {"TMA": tma}
    fn = gated_fwd_kernel
    if kind == "gated_bwd":
        fn = gated_recompute_bwd_kernel
        blocks |= {"p_dy": rows, "p_wd": (tile.bk, tile.bn)} if tma else {}
        flags |= {"EVEN_D": True}
    return [_spec(fn, kind, dtype, arch, tile, activation, blocks, flags, unaligned=unaligned, even=even)]


def _spec(
    fn: Any,
    kind: str,
    dtype: str,
    arch: int,
    tile: TileConfig,
    activation: str,
    blocks: dict[str, tuple[int, int]],
    flags: dict[str, Any],
    *,
    unaligned: bool,
    even: bool,
) -> KernelSpec:
    """blocks: descriptors and their block shapes. flags: constants beyond those of every GEMM kernel. unaligned: no stride is
    known, and nothing is a multiple of anything. even: K and D are multiples of the tile's step."""
    options = gemm_options(kind, tile, 0, activation, dropout=flags.get("DROPOUT", False))
    constexprs = {n: options[n] for n in fn.arg_names if n in options} | flags
    constexprs["INTERPRET"] = False
    if unaligned or not even:
        constexprs |= {n: False for n in ("EVEN_K", "EVEN_D") if n in constexprs}
    if not unaligned:
        constexprs |= {n: 1 for n in fn.arg_names if n.startswith("stride_")}
    types: dict[str, str | tuple[str, ...]] = {}
    for n in fn.arg_names:
        if n in blocks:
            types[n] = f"tensordesc<{dtype}[{blocks[n][0]},{blocks[n][1]}]>"
        elif n.startswith("strides_"):
            types[n] = ("i32", "i32" if unaligned else "1")
        elif n not in constexprs:
            types[n] = _TYPES.get(n, "T" if n.startswith("p_") else "i32")
    aligned = [n for n in types if n not in blocks and (n.startswith(("p_", "stride")) or n in ("N", "K", "D"))]
    marks = (
        "tma" if blocks else "",
        "dropout" if flags.get("DROPOUT") else "",
        "loose" if unaligned else "" if even else "uneven",
    )
    return make_spec(
        fn,
        variant=",".join((activation, *filter(None, marks))),
        dtype=dtype,
        arch=arch,
        tile=tile,
        types=types,
        constexprs=constexprs,
        divisible=() if unaligned else tuple(aligned),
        meta={
            "activation": activation,
            "gemm_loops": 1 + ("p_dy" in fn.arg_names and "D" in fn.arg_names),
            "tensor_cores": dtype != "fp32",
            "tma": bool(blocks),
            "pipelined": not unaligned,
        },
    )
