"""Fuzzed calls of every launcher in kernels/: shapes, strides, alignment, dtypes, absent operands, tiles and ways of loading.

A case takes its arguments from a `Call`, which names the package to fuzz, so that mutated copies of the kernels go through the
same calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels.fuzzed_call import DTYPES, Call
from tests.sanitizer import Watch


def _linear(call: Call, tma: bool) -> tuple[tuple[int, int, int], torch.dtype, Tensor, Tensor]:
    least = 1 if tma else 0
    M, N, K = call.size(least), call.size(least), call.size(least)
    dtype = call.random.choice(DTYPES[1:] if tma else DTYPES)
    return (M, N, K), dtype, call.input("x", (M, K), dtype, tma), call.input("weight", (N, K), dtype, tma)


def linear_fwd(call: Call) -> Watch:
    tma = call.random.random() < 0.3
    (M, N, _), _, x, w = _linear(call, tma)
    bias, residual = call.maybe("bias", (N,)), call.maybe("residual", (M, N))
    if residual is None and call.flag():
        out = residual = call.in_place("residual and out", (M, N), call.random.choice(DTYPES))
    else:
        out = call.output("out", (M, N), call.random.choice(DTYPES))
    return call.run(
        call.module("linear").linear_fwd, x, w, bias, out, activation=call.activation(), residual=residual,
        dropout=call.dropout(), tile=call.tile(), tma=tma,
    )  # fmt: skip


def linear_recompute_bwd(call: Call) -> Watch:
    linear, tma = call.module("linear"), call.random.random() < 0.3
    (M, N, _), dtype, x, w = _linear(call, tma)
    tile, dropout = call.tile(), call.dropout()
    if call.flag():
        dy = dz = call.in_place("dy and dz", (M, N), dtype)
    else:
        dy, dz = call.input("dy", (M, N), dtype), call.output("dz", (M, N), call.random.choice(DTYPES))
    h = call.output("h", (M, N), dtype) if call.flag() else None
    shape = linear.db_partials_shape(x, w, tile, dropout)
    db = call.output("db_partials", shape, torch.float32) if call.flag() else None
    return call.run(
        linear.linear_recompute_bwd, x, w, call.maybe("bias", (N,)), dy, dz, db, activation=call.activation(), h=h,
        dropout=dropout, tile=tile, tma=tma,
    )  # fmt: skip


def mlp_dual_bwd(call: Call) -> Watch:
    mlp, tma = call.module("mlp"), call.random.random() < 0.3
    (M, N, _), dtype, x, w1 = _linear(call, tma)
    D = call.size(1 if tma else 0)
    dy, w2 = call.input("dy", (M, D), dtype, tma), call.input("w2", (D, N), dtype, tma)
    tile = call.tile()
    h = call.output("h", (M, N), dtype) if call.flag() else None
    dz = call.output("dz", (M, N), dtype)
    shape = mlp.db_partials_shape(x, w1, w2, form="dual", tile=tile)
    db = call.output("db_partials", shape, torch.float32) if call.flag() else None
    return call.run(
        mlp.mlp_recompute_bwd, x, w1, call.maybe("b1", (N,)), dy, w2, h, dz, db, activation=call.activation(),
        form="dual", tile=tile, tma=tma,
    )  # fmt: skip


def gated_fwd(call: Call) -> Watch:
    tma = call.random.random() < 0.3
    (M, N, K), dtype, x, wg = _linear(call, tma)
    wu, out = call.input("wu", (N, K), dtype, tma), call.output("h", (M, N), dtype)
    return call.run(
        call.module("gated").gated_fwd, x, wg, call.maybe("bg", (N,)), wu, call.maybe("bu", (N,)), out,
        activation=call.activation(), gate_multiplier=0.5, tile=call.tile(), tma=tma,
    )  # fmt: skip


def gated_triple_bwd(call: Call) -> Watch:
    gated, tma = call.module("gated"), call.random.random() < 0.3
    (M, N, K), dtype, x, wg = _linear(call, tma)
    D = call.size(1 if tma else 0)
    wu, wd = call.input("wu", (N, K), dtype, tma), call.input("wd", (D, N), dtype, tma)
    dy, tile = call.input("dy", (M, D), dtype, tma), call.tile()
    h = call.output("h", (M, N), dtype) if call.flag() else None
    dz_g, dz_u = call.output("dz_g", (M, N), dtype), call.output("dz_u", (M, N), dtype)
    dbg, dbu = (
        call.output(name, gated.db_partials_shape(x, wg, wu, wd, tile, "triple"), torch.float32)
        if call.flag()
        else None
        for name in ("dbg_partials", "dbu_partials")
    )
    return call.run(
        gated.gated_triple_bwd, x, wg, call.maybe("bg", (N,)), wu, call.maybe("bu", (N,)), dy, wd, h, dz_g, dz_u, dbg,
        dbu, activation=call.activation(), tile=tile, tma=tma,
    )  # fmt: skip


def gated_plain_bwd(call: Call) -> Watch:
    gated, tma = call.module("gated"), call.random.random() < 0.3
    (M, N, K), dtype, x, wg = _linear(call, tma)
    wu, tile = call.input("wu", (N, K), dtype, tma), call.tile()
    h = call.output("h", (M, N), dtype) if call.flag() else None
    dz_g, dz_u = call.output("dz_g", (M, N), dtype), call.in_place("dz_u", (M, N), dtype)
    wd = torch.empty(1, N, dtype=dtype)
    dbg, dbu = (
        call.output(name, gated.db_partials_shape(x, wg, wu, wd, tile, "plain"), torch.float32) if call.flag() else None
        for name in ("dbg_partials", "dbu_partials")
    )
    return call.run(
        gated.gated_plain_bwd, x, wg, call.maybe("bg", (N,)), wu, call.maybe("bu", (N,)), h, dz_g, dz_u, dbg, dbu,
        activation=call.activation(), tile=tile, tma=tma,
    )  # fmt: skip


def _cross_entropy(call: Call) -> tuple[int, int, Tensor, dict[str, object]]:
    M, V = min(call.size(), 5), call.size(1)  # a program for each row, and all rows alike
    target = call.tensor("target", (M,), torch.int64, zeros=True)
    # Classes, rows to ignore, and targets outside of the vocabulary, which must not become addresses.
    for row in range(M):
        target[row] = call.random.choice((0, V - 1, V // 2, -100, V, -1, 1 << 40))
    call.inputs.append(target)
    options = {
        "label_smoothing": call.random.choice((0.0, 0.1)),
        "z_loss": call.random.choice((0.0, 1e-3)),
        "softcap": call.random.choice((None, 20.0)),
        "tile": call.random.choice((call.module("host.tiles").BlockTile(1, 16, 1), None)),
    }
    return M, V, target, options


def _logits(call: Call, M: int, V: int) -> Tensor:
    logits = call.arena.tensor(
        "logits", (M, V), call.random.choice(DTYPES), (V + call.random.choice((0, 1, 9)), 1), skew=1
    )
    return logits.copy_(torch.randn(M, V))


def cross_entropy_fwd(call: Call) -> Watch:
    M, V, target, options = _cross_entropy(call)
    logits = _logits(call, M, V)
    call.inputs.append(logits)
    loss = call.arena.tensor("loss", (M,), torch.float32, (1,))
    call.written.append(loss)
    return call.run(call.module("cross_entropy").cross_entropy_fwd, logits, target, loss, **options)


def cross_entropy_bwd(call: Call) -> Watch:
    M, V, target, options = _cross_entropy(call)
    logits = _logits(call, M, V)
    call.written.append(logits)
    dloss = call.input("dloss", (M,), call.random.choice(DTYPES))
    return call.run(call.module("cross_entropy").cross_entropy_bwd, logits, target, dloss, **options)


def _wide(call: Call) -> int:
    """A K of one block of 128, or more, or less."""
    return call.random.choice((call.size(), call.size(), 127, 128, 129, 256, 300)) if call.number != 2 else 0


def norm_fwd(call: Call) -> Watch:
    (M, K), dtype = (min(call.size(), 5), _wide(call)), call.random.choice(DTYPES)  # a program for each row
    if call.flag():
        x = out = call.in_place("x and out", (M, K), dtype)
    else:
        x, out = call.input("x", (M, K), dtype), call.output("out", (M, K), call.random.choice(DTYPES))
    kind = call.random.choice(("rms", "layer"))
    return call.run(
        call.module("norm").norm_fwd, x, call.maybe("weight", (K,)), call.maybe("bias", (K,)), out, kind=kind
    )


def norm_bwd(call: Call) -> Watch:
    norm, (M, K), dtype = call.module("norm"), (call.size(), _wide(call)), call.random.choice(DTYPES)
    M = min(M, call.random.choice((2, 4, 34)))  # a program for each row, and one for 32 of them
    x, sums = call.input("x", (M, K), dtype), [call.flag(), call.flag()]
    dw, db = (
        call.output("partials", norm.norm_partials_shape(x), torch.float32) if wanted else None for wanted in sums
    )
    if not any(sums) and call.flag():
        dxn = dx = call.in_place("dxn and dx", (M, K), dtype)
    else:
        dxn, dx = call.input("dxn", (M, K), dtype), call.output("dx", (M, K), dtype)
    # Scratch: of no use, and left alone, where there is nothing to normalise.
    stats = call.output("stats", (2, M), torch.float32) if K else torch.empty(2, M)
    kind = call.random.choice(("rms", "layer"))
    return call.run(norm.norm_bwd, x, call.maybe("weight", (K,)), dxn, dx, stats, dw, db, kind=kind)


CASES: dict[str, Callable[[Call], Watch]] = {
    case.__name__: case
    for case in (
        linear_fwd,
        linear_recompute_bwd,
        mlp_dual_bwd,
        gated_fwd,
        gated_plain_bwd,
        gated_triple_bwd,
        cross_entropy_fwd,
        cross_entropy_bwd,
        norm_fwd,
        norm_bwd,
    )
}
"""Launcher, or the one kernel that it launches -> its calls."""

SEVERAL = {"norm_bwd": {"norm_bwd_rows_kernel", "norm_bwd_columns_kernel"}}
"""Cases that launch other kernels than the one of their own name."""
