"""One fuzzed call of a launcher: draws sizes, layouts, dtypes and options, and runs it under the sanitizer between guards."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from tests.sanitizer import Arena, Watch, watch

__all__ = ["DTYPES", "Call"]

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
        return self.random.choice(self.module("device.activations").ACTIVATIONS)

    def tile(self) -> object:
        """A small one, one that splits its epilogue in two, a flat one, or None for the launcher's own choice."""
        make = self.module("host.tiles").TileConfig
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
        return self.module("device.dropout").Dropout(p, seed, first_row=row)

    def run(self, launcher: Callable[..., None], *args: object, **options: object) -> Watch:
        self.arena.keep(*self.inputs)
        with watch(*self.written) as seen:
            launcher(*args, **options)
        self.arena.check()
        return seen
