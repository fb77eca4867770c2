"""The GEMM of one launch, checked: what the launchers of `linear`, `mlp` and `gated` share.

Shapes: x (M, K), each weight (N, K), results (M, N); where there is a second layer dy (M, D) and its weight (D, N).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..device.casts import INTERPRETED
from .arguments import (
    check_activation,
    check_out,
    check_shape,
    check_sums,
    check_tile,
    has_no_memory,
    regular,
    use_descriptors,
)
from .dtypes import dtype_name
from .hardware import arch_of
from .launch import Block, once
from .tiles import TileConfig, choose, epilogue_n

__all__ = ["GemmProblem", "check_operands", "partials_shape"]


def check_operands(activation: str, x: Tensor, weights: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Matrices of one dtype whose shapes fit. second: dy and the second layer's weight by their names, or nothing."""
    check_activation(activation)
    for name, t in {"x": x, **weights, **second}.items():
        if t.dim() != 2:
            raise ValueError(f"x, {', '.join((*weights, *second))} must be matrices; {name} has shape {tuple(t.shape)}")
        if t.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype} and {name} {t.dtype}; cast one of them")
    (M, K), N = x.shape, next(iter(weights.values())).shape[0]
    check_shape({name: (t, (N, K)) for name, t in weights.items()}, x)
    if second:
        (dy_name, dy), (weight_name, weight) = second.items()
        D = dy.shape[1]
        check_shape({dy_name: (dy, (M, D)), weight_name: (weight, (D, N))}, x)


def partials_shape(kind: str, x: Tensor, *weights: Tensor, tile: TileConfig | None) -> tuple[int, int]:
    """Shape of the fp32 buffer for sums over rows: a row of sums for each row of tiles, (ceil(M / bm), N)."""
    if any(has_no_memory(t) for t in (x, *weights)):
        return _partials_shape(x, *weights, kind, tile)
    shape: tuple[int, int] = once(_partials_shape, (x, *weights), (kind, tile))
    return shape


def _partials_shape(x: Tensor, *rest: Any) -> tuple[int, int]:
    *weights, kind, tile = rest
    return -(-x.shape[0] // _tile(kind, x, tuple(weights), tile).bm), weights[0].shape[0]


def _tile(kind: str, x: Tensor, weights: tuple[Tensor, ...], tile: TileConfig | None) -> TileConfig:
    (M, K), N = x.shape, weights[0].shape[0]
    dtype, arch = dtype_name(x), arch_of(x)
    tile = tile or choose(kind, M, N, K, dtype, arch, regular=regular(x, *weights))
    check_tile(kind, tile, dtype, arch)
    return tile


@dataclass(frozen=True)
class GemmProblem:
    """What one launch multiplies, and the tile it does that in. kind: a key of `tiles.KINDS`. second: (dy, weight) or ()."""

    kind: str
    activation: str
    x: Tensor
    weights: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    tile: TileConfig

    @classmethod
    def checked(
        cls,
        kind: str,
        activation: str,
        tile: TileConfig | None,
        x: Tensor,
        weights: Mapping[str, Tensor],
        second: Mapping[str, Tensor] | None = None,
    ) -> GemmProblem:
        """Raises ValueError or TypeError for operands or a tile that do not fit; a tile of None is chosen."""
        check_operands(activation, x, weights, second or {})
        own, rest = tuple(weights.values()), tuple((second or {}).values())
        return cls(kind, activation, x, own, rest, _tile(kind, x, (*own, *rest[1:]), tile))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.x.shape[0], self.weights[0].shape[0], self.x.shape[1]

    @property
    def D(self) -> int:
        """Width of the second layer's output."""
        return self.second[0].shape[1]

    @property
    def tiles(self) -> int:
        """How many tiles the result has; 0 where it is empty."""
        M, N, _ = self.sizes
        return -(-M // self.tile.bm) * -(-N // self.tile.bn)

    def check(
        self,
        *,
        biases: Mapping[str, Tensor | None],
        inputs: Mapping[str, Tensor | None] | None = None,
        outputs: Mapping[str, Tensor | None],
        sums: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        """biases (N,); inputs and outputs (M, N); sums (ceil(M / bm), N) in fp32. None where absent."""
        (M, N, _), sums = self.sizes, sums or {}
        partials = (-(-M // self.tile.bm), N)
        shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {name: (t, (N,)) for name, t in biases.items()}
        shapes |= {name: (t, (M, N)) for name, t in {**(inputs or {}), **outputs}.items()}
        check_shape({**shapes, **{name: (t, partials) for name, t in sums.items()}}, self.x)
        check_out(**outputs, **sums)
        check_sums(**sums)

    def blocks(self, tma: bool | None) -> tuple[Block, ...]:
        """Rows and columns of the descriptors of x, the weights, dy and the second weight; () where pointers are used."""
        matrices = [self.x, *self.weights, *self.second]
        is_regular = regular(self.x, *self.weights, *self.second[1:])
        if not use_descriptors(tma, arch_of(self.x), is_regular, *matrices):
            return ()
        t = self.tile
        blocks = ((t.bm, t.bk), *[(t.bn, t.bk)] * len(self.weights), (t.bm, t.bk), (t.bk, t.bn))
        return blocks[: len(matrices)]

    def options(self) -> dict[str, Any]:
        """What every GEMM kernel is compiled with: its constants, beyond those of its own, then Triton's options."""
        tile = self.tile
        own = {
            "ACT": self.activation,
            "BM": tile.bm,
            "BN": tile.bn,
            "BK": tile.bk,
            "EPILOGUE_N": epilogue_n(tile, self.kind),
            "GROUP_M": tile.group_m,
            "EVEN_K": self.x.shape[1] % tile.bk == 0,
            "INTERPRET": INTERPRETED,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "maxnreg": tile.max_registers,
        }
        return own | ({"EVEN_D": self.D % tile.bk == 0} if self.second else {})
