"""Fuzzed calls of every launcher in kernels/: shapes, strides, alignment, dtypes, absent operands, tiles and ways of loading.

Each case draws its arguments from a seeded generator, calls the launcher under the sanitizer and checks the poison around its
tensors. A case takes the package to fuzz, so that mutated copies of the kernels go through the same calls.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from types import ModuleType

import torch
from sanitizer import Arena, Watch, watch
from torch import Tensor

EDGES = (1, 2, 7, 15, 16, 17, 31, 32, 33, 40)
"""Sizes around the tiles' own, of 16 and 32."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Call:
    """One fuzzed call. number 0 to 3: M, N, K (and D) of zero in turn, from 4 on: any size."""

    def __init__(self, case: str, number: int, kernels: ModuleType) -> None:
        self.random = random.Random(f"{case} {number}")
        self.number = number
        self.arena = Arena()
        self.inputs: list[Tensor] = []
        self.written: list[Tensor] = []
        self._kernels = kernels
        self._sizes = 0

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self._kernels.__name__}.{name}")

    def size(self, least: int = 0) -> int:
        self._sizes += 1
        if self._sizes - 1 == self.number:
            return least
        return self.random.choice((*EDGES, self.random.randint(1, 45)))

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, zeros: bool, tma: bool = False
    ) -> Tensor:
        """zeros: strides of 0 are allowed. tma: rows contiguous and 16-byte aligned, as a descriptor needs them."""
        pad, gap = self.random.choice((0, 1, 5)), self.random.choice((1, 2, 3))
        if len(shape) == 1:
            layouts = {"dense": (1,), "strided": (gap + 1,), "zero": (0,)}
        else:
            rows, columns = shape
            layouts = {
                "dense": (columns, 1),
                "padded": (columns + pad, 1),
                "transposed": (1, rows + pad),
                "strided": (columns * (gap + 1) + pad, gap + 1),
                "strided transposed": (gap, rows * gap + pad),
                "zero row": (0, 1),
                "zero": (0, 0),
            }
        chosen = self.random.choice([k for k in layouts if zeros or "zero" not in k])
        strides = tuple(max(s, 0 if "zero" in chosen else 1) for s in layouts[chosen])
        if tma:
            strides = (-(-(shape[1] + pad) // 8) * 8, 1)
        return self.arena.tensor(name, shape, dtype, strides, skew=0 if tma else self.random.choice((0, 0, 1, 3)))

    def input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, tma: bool = False) -> Tensor:
        t = self.tensor(name, shape, dtype, zeros=True, tma=tma)
        # Where a stride is 0 there is one row, or one column, to fill.
        own = t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]
        own.copy_(torch.randn(own.shape, generator=torch.Generator().manual_seed(self.random.getrandbits(32))))
        self.inputs.append(t)
        return t

    def maybe(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return self.input(name, shape, self.random.choice(DTYPES)) if self.flag() else None

    def output(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        t = self.tensor(name, shape, dtype, zeros=False)
        self.written.append(t)
        return t

    def in_place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        t = self.output(name, shape, dtype)
        t.copy_(torch.randn(shape))
        return t

    def activation(self) -> str:
        return self.random.choice(self.module("activations").ACTIVATIONS)

    def tile(self) -> object:
        """A small one, one that splits its epilogue in two, a flat one, or None for the launcher's own choice."""
        make = self.module("tiles").TileConfig
        return self.random.choice(
            (
                make(16, 32, 16, 4, 1, group_m=2),
                make(32, 64, 16, 1, 1, group_m=1),
                make(32, 16, 32, 4, 1, group_m=3),
                None,
            )
        )

    def dropout(self) -> object | None:
        if self.flag():
            return None
        p, seed, row = self.random.choice((0.0, 0.3, 1.0)), self.random.getrandbits(63), self.random.getrandbits(20)
        return self.module("dropout").Dropout(p, seed, first_row=row)

    def run(self, launcher: Callable[..., None], *args: object, **options: object) -> Watch:
        self.arena.keep(*self.inputs)
        with watch(*self.written) as seen:
            launcher(*args, **options)
        self.arena.check()
        return seen


def _linear(call: Call, tma: bool) -> tuple[tuple[int, int, int], torch.dtype, Tensor, Tensor]:
    least = 1 if tma else 0
    M, N, K = call.size(least), call.size(least), call.size(least)
    dtype = call.random.choice(DTYPES[1:] if tma else DTYPES)
    return (M, N, K), dtype, call.input("x", (M, K), dtype, tma), call.input("weight", (N, K), dtype, tma)


def linear_fwd(call: Call) -> Watch:
    tma = call.random.random() < 0.3
    (M, N, _), _, x, w = _linear(call, tma)
    bias, residual = call.maybe("bias", (N,)), call.maybe("residual", (M, N))
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
    tile, dropout = call.tile(), call.dropout()
    h = call.output("h", (M, N), dtype) if call.flag() else None
    dz = call.output("dz", (M, N), dtype)
    shape = mlp.db_partials_shape(x, w1, w2, dropout=dropout, form="dual", tile=tile)
    db = call.output("db_partials", shape, torch.float32) if call.flag() else None
    return call.run(
        mlp.mlp_recompute_bwd, x, w1, call.maybe("b1", (N,)), dy, w2, h, dz, db, activation=call.activation(),
        dropout=dropout, form="dual", tile=tile, tma=tma,
    )  # fmt: skip


def gated_fwd(call: Call) -> Watch:
    tma = call.random.random() < 0.3
    (M, N, K), dtype, x, wg = _linear(call, tma)
    wu, out = call.input("wu", (N, K), dtype, tma), call.output("h", (M, N), dtype)
    return call.run(
        call.module("gated").gated_fwd, x, wg, call.maybe("bg", (N,)), wu, call.maybe("bu", (N,)), out,
        activation=call.activation(), gate_multiplier=0.5, tile=call.tile(), tma=tma,
    )  # fmt: skip


def gated_recompute_bwd(call: Call) -> Watch:
    gated, tma = call.module("gated"), call.random.random() < 0.3
    (M, N, K), dtype, x, wg = _linear(call, tma)
    D = call.size(1 if tma else 0)
    wu, wd = call.input("wu", (N, K), dtype, tma), call.input("wd", (D, N), dtype, tma)
    dy, tile = call.input("dy", (M, D), dtype, tma), call.tile()
    h = call.output("h", (M, N), dtype) if call.flag() else None
    dz_g, dz_u = call.output("dz_g", (M, N), dtype), call.output("dz_u", (M, N), dtype)
    dbg, dbu = (
        call.output(name, gated.db_partials_shape(x, wg, tile), torch.float32) if call.flag() else None
        for name in ("dbg_partials", "dbu_partials")
    )
    return call.run(
        gated.gated_recompute_bwd, x, wg, call.maybe("bg", (N,)), wu, call.maybe("bu", (N,)), dy, wd, h, dz_g, dz_u, dbg,
        dbu, activation=call.activation(), tile=tile, tma=tma,
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
        "tile": call.random.choice((call.module("cross_entropy").RowTile(16, 1), None)),
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
    """A K of one scale group of 128, or more, or less."""
    return call.random.choice((call.size(), call.size(), 127, 128, 129, 256, 300)) if call.number != 2 else 0


def _codes(call: Call, M: int, K: int, *, written: bool) -> tuple[Tensor, Tensor]:
    cp = call.module("compress")
    if written:
        return call.output("codes", (M, K), torch.uint8), call.output("scales", cp.scales_shape(M, K), torch.float32)
    codes = call.tensor("codes", (M, K), torch.uint8, zeros=True)
    for row in codes:
        row[:1] = call.random.randint(0, 100)
    call.inputs.append(codes)
    return codes, call.input("scales", cp.scales_shape(M, K), torch.float32)


def compress(call: Call) -> Watch:
    M, K, cp = call.size(), _wide(call), call.module("compress")
    x = call.input("x", (M, K), call.random.choice(DTYPES))
    codes, scales = _codes(call, M, K, written=True)
    seed = call.random.choice((None, call.random.getrandbits(63)))
    return call.run(cp.compress, x, codes, scales, format=call.random.choice(list(cp.FORMATS)), seed=seed)


def decompress(call: Call) -> Watch:
    M, K, cp = call.size(), _wide(call), call.module("compress")
    codes, scales = _codes(call, M, K, written=False)
    out = call.output("out", (M, K), call.random.choice(DTYPES))
    return call.run(cp.decompress, codes, scales, out, format=call.random.choice(list(cp.FORMATS)))


def compressed_linear_fwd(call: Call) -> Watch:
    M, N, K = call.size(), call.size(), _wide(call)
    codes, scales = _codes(call, M, K, written=False)
    w, bias = call.input("weight", (N, K), call.random.choice(DTYPES[1:])), call.maybe("bias", (N,))
    out = call.output("out", (M, N), call.random.choice(DTYPES))
    return call.run(
        call.module("compressed_linear").compressed_linear_fwd, codes, scales, w, bias, out, tile=call.tile(),
        format=call.random.choice(("int8", "e4m3", "e5m2")), activation=call.activation(),
    )  # fmt: skip


def compressed_linear_recompute_bwd(call: Call) -> Watch:
    cl, M, N, K = call.module("compressed_linear"), call.size(), call.size(), _wide(call)
    codes, scales = _codes(call, M, K, written=False)
    w, tile = call.input("weight", (N, K), call.random.choice(DTYPES[1:])), call.tile()
    dy, dz = call.input("dy", (M, N), w.dtype), call.output("dz", (M, N), w.dtype)
    h = call.output("h", (M, N), w.dtype) if call.flag() else None
    db = call.output("db_partials", cl.db_partials_shape(codes, w, tile), torch.float32) if call.flag() else None
    return call.run(
        cl.compressed_linear_recompute_bwd, codes, scales, w, call.maybe("bias", (N,)), dy, dz, db, h=h, tile=tile,
        format=call.random.choice(("int8", "e4m3", "e5m2")), activation=call.activation(),
    )  # fmt: skip


CASES: dict[str, Callable[[Call], Watch]] = {
    case.__name__: case
    for case in (
        linear_fwd,
        linear_recompute_bwd,
        mlp_dual_bwd,
        gated_fwd,
        gated_recompute_bwd,
        cross_entropy_fwd,
        cross_entropy_bwd,
        compress,
        decompress,
        compressed_linear_fwd,
        compressed_linear_recompute_bwd,
    )
}
"""Kernel -> the calls that reach it, under the names that `registry.shipped` gives kernels."""
