"""Part "kernels": each kernel by itself, beside cuBLAS on the same shape and with other tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu_parts.common import Context, Facts, medians
from gpuckpt.kernels import cross_entropy, gated, linear, mlp, norm
from gpuckpt.kernels.host.tiles import TileConfig

SHAPES = ((8192, 4096, 14336), (4096, 2048, 8192), (8192, 8192, 28672), (2048, 1024, 4096))
TILES = (TileConfig(128, 256, 64, 8, 4), TileConfig(128, 128, 64, 8, 3), TileConfig(128, 128, 64, 4, 3))


def kernels(context: Context) -> None:
    """`ms`, and TFLOP/s or GB/s. The gradients are dense: an expanded one would time another kernel."""
    for shape in ((32, 16, 48),) if context.dry else SHAPES:
        if context.over(15):
            context.say("x".join(map(str, shape)), left_out="out of time")
            continue
        _gemms(context, *shape)
        if not context.dry:
            torch.cuda.empty_cache()
    _rows(context)


def _gemms(context: Context, m: int, k: int, h: int) -> None:
    x, w, wu, b = context.rand(m, k), context.rand(h, k), context.rand(h, k), context.rand(h)
    w2, dy, dh = context.rand(k, h), context.rand(m, k), context.rand(m, h)
    y, h_out, dz, dz_u = (torch.empty(m, h, device=context.device, dtype=torch.bfloat16) for _ in range(4))
    sums = torch.empty(linear.db_partials_shape(x, w), device=context.device)
    work: dict[str, tuple[int, Callable[[], Any]]] = {"torch.mm": (1, lambda: torch.mm(x, w.t(), out=y))}
    for act in ("gelu_tanh", "gelu"):
        work[f"linear_fwd {act}"] = (1, lambda act=act: linear.linear_fwd(x, w, b, y, activation=act))
        work[f"linear_bwd {act}"] = (
            1,
            lambda act=act: linear.linear_recompute_bwd(x, w, b, dh, dz, sums, activation=act),
        )
    for tile in () if context.dry else TILES:
        work[f"linear_fwd {tile.label}"] = (
            1,
            lambda tile=tile: linear.linear_fwd(x, w, b, y, activation="gelu_tanh", tile=tile),
        )
        work[f"linear_bwd {tile.label}"] = (
            1,
            lambda tile=tile: linear.linear_recompute_bwd(x, w, b, dh, dz, None, activation="gelu_tanh", tile=tile),
        )
    for form in ("dual", "plain"):
        work[f"mlp_bwd {form}"] = (
            2,
            lambda form=form: mlp.mlp_recompute_bwd(x, w, b, dy, w2, h_out, dz, activation="gelu_tanh", form=form),
        )
    work["gated_fwd"] = (2, lambda: gated.gated_fwd(x, w, None, wu, None, y))
    for form in ("triple", "plain"):
        work[f"gated_bwd {form}"] = (
            3,
            lambda form=form: gated.gated_recompute_bwd(x, w, None, wu, None, dy, w2, h_out, dz, dz_u, form=form),
        )
    found = medians(context, {name: run for name, (_, run) in work.items()}, repeats=8)
    for name, facts in found.items():
        context.say(f"{name} {m}x{k}x{h}", **_rate(facts, tflops=2e-12 * m * k * h * work[name][0]))


def _rows(context: Context) -> None:
    """Kernels bound by memory."""
    for rows, classes in ((8, 64),) if context.dry else ((128, 65536), (2048, 128256)):
        z, target = context.rand(rows, classes), torch.randint(0, classes, (rows,), device=context.device)
        losses, dloss = torch.empty(rows, device=context.device), torch.ones((), device=context.device).expand(rows)
        found = medians(
            context,
            {
                "cross_entropy_fwd": lambda z=z, t=target, o=losses: cross_entropy.cross_entropy_fwd(z, t, o),
                "cross_entropy_bwd": lambda z=z, t=target, d=dloss: cross_entropy.cross_entropy_bwd(z, t, d),
            },
        )
        for (name, facts), times in zip(found.items(), (2, 6), strict=True):
            context.say(f"{name} {rows}x{classes}", **_rate(facts, gb_per_s=1e-9 * times * rows * classes))
    rows, width = (16, 32) if context.dry else (8192, 4096)
    x, w, y = context.rand(rows, width), context.rand(width), context.rand(rows, width)
    facts = medians(context, {"norm": lambda: norm.norm_fwd(x, w, None, y)})["norm"]
    context.say(f"norm_fwd {rows}x{width}", **_rate(facts, gb_per_s=4e-9 * x.numel()))


def _rate(facts: Facts, **amount: float) -> Facts:
    return facts if "ms" not in facts else facts | {name: each / (facts["ms"] / 1e3) for name, each in amount.items()}
