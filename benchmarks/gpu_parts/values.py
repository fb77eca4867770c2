"""Parts "smoke" and "values": results against fp64, on every way that a launch can go."""

from __future__ import annotations

import os

import torch

from gpu_parts.cases import OPERATIONS, compare, make
from gpu_parts.common import Context, Facts

DTYPES = ("bfloat16", "float16", "float32")


def smoke(context: Context) -> None:
    """Each operation once."""
    sizes = (33, 24, 40) if context.dry else (256, 128, 256)
    for op in OPERATIONS:
        context.item(op, lambda op=op: compare(*make(context, op, *sizes, torch.bfloat16, "gelu")))


def values(context: Context) -> None:
    """Regular and odd sizes, three dtypes, chunks, both forms of the MLP, dropout, recomputed h, outputs full of NaN."""
    shapes = [(33, 24, 40), (16, 32, 48)]
    if not context.dry:
        shapes = [
            (1, 128, 256),
            (17, 256, 512),
            (257, 776, 1000),
            (1000, 1024, 4096),
            (4096, 2048, 8192),
            (4095, 2047, 8191),
        ]
    special = {
        "the two forms of an MLP's backward, outputs full of NaN": lambda: both_forms(context),
        "h of the recompute has the bits of forward's": lambda: same_hidden(context),
        "dropout drops the same on the device and on the CPU": lambda: same_mask(context),
    }
    items = [
        (f"{op} {'x'.join(map(str, shape))} {dtype} {act}", (op, shape, dtype, act))
        for shape in shapes
        for dtype in DTYPES
        for op in OPERATIONS
        for act in (
            ("gelu_tanh", "silu") if dtype == "bfloat16" and op != OPERATIONS[-1] and not context.dry else ("gelu",)
        )
    ]
    if context.shard == 0:
        for name, work in special.items():
            context.item(name, work)
        for op in OPERATIONS:
            context.item(f"{op} in chunks", lambda op=op: in_chunks(context, op))
            context.item(f"{op} in float32 by the kernels", lambda op=op: by_kernels(context, op))
    for number, (name, (op, shape, dtype, act)) in enumerate(items):
        if number % context.shards == context.shard:
            case = (op, *shape, getattr(torch, dtype), act)
            context.item(name, lambda case=case: compare(*make(context, *case)))


def in_chunks(context: Context, op: str) -> Facts:
    """A backward of a third of the rows at a time."""
    m, k, h = (16, 32, 48) if context.dry else (1000, 1024, 4096)
    return compare(*make(context, op, m, k, h, torch.bfloat16, "gelu", chunk_rows=m // 3))


def by_kernels(context: Context, op: str) -> Facts:
    """float32, whose products go to cuBLAS where nothing else is asked for."""
    before = os.environ.get("GPUCKPT_BACKEND")
    os.environ["GPUCKPT_BACKEND"] = "triton"
    try:
        return compare(*make(context, op, *((33, 24, 40) if context.dry else (257, 776, 1000)), torch.float32, "gelu"))
    finally:
        del os.environ["GPUCKPT_BACKEND"]
        if before is not None:
            os.environ["GPUCKPT_BACKEND"] = before


def _mlp(context: Context) -> tuple[torch.Tensor, ...]:
    """x, w1, b1, dy and w2."""
    m, k, n = (33, 32, 48) if context.dry else (1000, 1024, 4096)
    x, b, dy = context.rand(m, k), context.rand(n), context.rand(m, k)
    return x, context.rand(n, k, scale=k**-0.5), b, dy, context.rand(k, n, scale=n**-0.5)


def both_forms(context: Context) -> Facts:
    """ "dual" and "plain" write the same h, dz and sums, whatever the memory held."""
    from gpuckpt.kernels import mlp

    x, w1, b, dy, w2 = _mlp(context)
    found = []
    for form in ("dual", "plain"):
        h, dz = torch.full((2, x.shape[0], w1.shape[0]), float("nan"), device=x.device, dtype=x.dtype)
        sums = torch.full(mlp.db_partials_shape(x, w1, w2, form=form), float("nan"), device=x.device)
        mlp.mlp_recompute_bwd(x, w1, b, dy, w2, h, dz, sums, activation="gelu_tanh", form=form)
        found.append([t.float() for t in (h, dz, sums.sum(0))])
    distances = [((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True)]
    worst = max(d if d == d else float("inf") for d in distances)
    return {"ok": worst < 1e-2, "distance": worst}


def same_hidden(context: Context) -> Facts:
    """What backward writes as h is what forward computed."""
    from gpuckpt.kernels import linear

    x, w1, b, _, _ = _mlp(context)
    forward, again, dz = torch.full((3, x.shape[0], w1.shape[0]), float("nan"), device=x.device, dtype=x.dtype)
    linear.linear_fwd(x, w1, b, forward, activation="gelu_tanh")
    linear.linear_recompute_bwd(x, w1, b, torch.ones_like(dz), dz, activation="gelu_tanh", h=again)
    return {"ok": torch.equal(forward, again)}


def same_mask(context: Context) -> Facts:
    """The mask is a function of seed and position alone."""
    from gpuckpt import functional as G

    m, k, n = (33, 24, 40) if context.dry else (300, 128, 256)
    x, w = context.rand(m, k), context.rand(n, k, scale=0.1)
    torch.manual_seed(7)
    here = G.linear(x, w, dropout=0.3)
    torch.manual_seed(7)
    there = G.linear(x.cpu(), w.cpu(), dropout=0.3)
    dropped = there == 0
    return {"ok": torch.equal(here.cpu() == 0, dropped) and bool(dropped.any())}
