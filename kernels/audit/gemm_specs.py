"""The GEMM kernels as they ship, for the ahead-of-time compiler: what a launch can be, and what of it is compiled.

tile, dtype, loading    Every combination that the launchers choose by themselves: on sm_90 and sm_100 16-bit operands come
                        through descriptors. Pointers there are for who asks for them (`tma=False`): bf16 with one activation.
layout                  Operands are regular (`arguments.regular`: inner strides are the constant 1, outer ones and sizes
                        multiples of 16), or nothing is known about them and the small unaligned tile is taken: both are
                        compiled. Where pointers are used with 16-bit operands, so is a K that is no multiple of the preferred
                        tile's step; descriptors mask it, and the step of fp32 is 16, which a regular K is a multiple of.
optional operands       Bias, residual, h and the sums for db are all given. A launch without one is the same code less its
                        loads, stores and addresses.
activation              A kernel's registers depend on it, and not only upwards: ptxas may hold a light kernel to a round number
                        of registers for one more block on a multiprocessor, and spill. So on sm_80, sm_90 and sm_100, whose code
                        differs, the preferred bf16 tile is compiled with every activation, the others with the lightest
                        (identity) and with those that needed most registers (gelu_tanh, gelu). fp32 is compiled with
                        the extremes, and so is dropout, whose random numbers need more registers than any activation. fp16,
                        which differs from bf16 in conversions alone, is compiled with gelu_tanh.
sm_86, sm_89, sm_120    run sm_80's tiles through the same code generator: the extremes only, fp16 with the preferred tile.

Not compiled: outputs and gradients whose layout is irregular beside regular operands (they are allocated contiguous; such a dy
cost up to 12 spills outside of the K loop), strides past 2^31, and outputs of another dtype than the operands.

Nothing of a launch is written here: the launchers are called on tensors without memory, and `record` keeps what they pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device.activations import ACTIVATIONS
from ..device.dropout import Dropout
from ..gated import db_partials_shape as gated_db_shape
from ..gated import gated_fwd, gated_plain_bwd, gated_triple_bwd
from ..host.tiles import KINDS, TileConfig, candidates, unaligned_tile
from ..linear import db_partials_shape as linear_db_shape
from ..linear import linear_fwd, linear_recompute_bwd
from ..mlp import db_partials_shape as mlp_db_shape
from ..mlp import mlp_dual_bwd
from .record import Launch, recorded_spec, recording
from .specs import DTYPES, WHOLE_ARCHS, KernelSpec

__all__ = ["specs", "uses_tma"]

_SIZES = {"": (4097, 4096, 4096, 4096), "uneven": (4097, 4096, 4112, 4112), "loose": (1025, 1031, 1021, 1019)}
"""M, N, K and D of the launch that stands for all of a layout. No M is a multiple of 16: nothing is known of a batch."""

_DROPOUT = Dropout(0.9, seed=1 << 40, offset=1 << 40, first_row=1 << 31)
"""Numbers that need 64 bits where they can."""

_EXTREMES = ("gelu_tanh", "identity")


def specs(arch: int) -> list[KernelSpec]:
    """Every GEMM kernel for `arch`, the preferred configuration of each first."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for kind in KINDS:
            own = candidates(kind, dtype, arch)
            for tile in own:
                for activation in _activations(kind, dtype, arch, tile is own[0]):
                    found += _recorded(kind, dtype, arch, tile, activation)
            if uses_tma(dtype, arch):
                for tile in own if dtype == "bf16" else ():
                    found += _recorded(kind, dtype, arch, tile, "gelu_tanh", tma=False)
            elif kind != "linear_dropout" and dtype != "fp32" and (arch in WHOLE_ARCHS or dtype != "fp16"):
                found += _recorded(kind, dtype, arch, own[0], "gelu_tanh", layout="uneven")
            if arch not in WHOLE_ARCHS and dtype == "fp16":
                continue
            for activation in _EXTREMES if dtype == "bf16" else _EXTREMES[:1]:
                found += _recorded(kind, dtype, arch, unaligned_tile(kind, dtype, arch), activation, layout="loose")
    return found


def uses_tma(dtype: str, arch: int) -> bool:
    """Whether regular operands come through descriptors."""
    return arch in (90, 100) and dtype != "fp32"


def _activations(kind: str, dtype: str, arch: int, preferred: bool) -> tuple[str, ...]:
    if kind == "linear_dropout":
        return _EXTREMES if dtype == "bf16" else _EXTREMES[:1] if arch in WHOLE_ARCHS or preferred else ()
    if arch in WHOLE_ARCHS and dtype == "bf16":
        return tuple(dict.fromkeys((*_EXTREMES, *ACTIVATIONS))) if preferred else (*_EXTREMES, "gelu")
    if dtype == "fp16":
        return _EXTREMES[:1] if arch in WHOLE_ARCHS or preferred else ()
    return _EXTREMES


def _recorded(
    kind: str, dtype: str, arch: int, tile: TileConfig, activation: str, *, layout: str = "", tma: bool | None = None
) -> list[KernelSpec]:
    """The launches of a kind. layout: "" for regular operands, "uneven" for a K that is no multiple of the tile's step, "loose"
    for operands of which nothing is known, and the tile that the launcher chooses for them."""
    with recording(arch) as launches:
        _launch(kind, DTYPES[dtype], layout, activation, tma, None if layout == "loose" else tile)
    return [_spec(launch, dtype, arch, tile, activation, layout) for launch in launches]


def _spec(launch: Launch, dtype: str, arch: int, tile: TileConfig, activation: str, layout: str) -> KernelSpec:
    tma = launch.arguments["TMA"]
    marks = ("tma" if tma else "", "dropout" if launch.arguments.get("DROPOUT") else "", layout)
    return recorded_spec(
        launch,
        variant=",".join((activation, *filter(None, marks))),
        dtype=dtype,
        arch=arch,
        tile=tile,
        meta={
            "activation": activation,
            "gemm_loops": 1 + ("D" in launch.arguments),
            "tensor_cores": dtype != "fp32",
            "tma": tma,
            "pipelined": layout != "loose",
        },
    )


def _launch(
    kind: str, dtype: torch.dtype, layout: str, activation: str, tma: bool | None, tile: TileConfig | None
) -> None:
    """Every kernel of a kind once, with all that is optional, on tensors without memory."""
    M, N, K, D = _SIZES[layout]

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        if layout != "loose":
            return torch.empty(shape, dtype=of, device="meta")
        strides = (3 * shape[-1] + 1, 3)[-len(shape) :]
        return torch.empty(strides[0] * shape[0] + 1, dtype=of, device="meta").as_strided(shape, strides, 1)

    def sums(shape: tuple[int, int]) -> Tensor:
        return empty(*shape, of=torch.float32)

    x, w, b, dy, wd = empty(M, K), empty(N, K), empty(N), empty(M, D), empty(D, N)
    first, second, third = (empty(M, N) for _ in range(3))
    if kind in ("linear", "linear_dropout"):
        dropout = _DROPOUT if kind == "linear_dropout" else None
        db = sums(linear_db_shape(x, w, tile, dropout))
        linear_fwd(x, w, b, first, residual=second, activation=activation, dropout=dropout, tile=tile, tma=tma)
        linear_recompute_bwd(
            x, w, b, first, second, db, h=third, activation=activation, dropout=dropout, tile=tile, tma=tma
        )
    elif kind == "dual":
        db = sums(mlp_db_shape(x, w, wd, form="dual", tile=tile))
        mlp_dual_bwd(x, w, b, dy, wd, first, second, db, activation=activation, tile=tile, tma=tma)
    elif kind == "gated_fwd":
        gated_fwd(x, w, b, w, b, first, activation=activation, tile=tile, tma=tma)
    elif kind == "gated_plain":
        both = [sums(gated_db_shape(x, w, w, wd, tile, "plain")) for _ in range(2)]
        gated_plain_bwd(x, w, b, w, b, first, second, third, *both, activation=activation, tile=tile, tma=tma)
    else:
        both = [sums(gated_db_shape(x, w, w, wd, tile, "triple")) for _ in range(2)]
        gated_triple_bwd(x, w, b, w, b, dy, wd, first, second, third, *both, activation=activation, tile=tile, tma=tma)
