"""Networks of recomputable segments: keep inputs, drop outputs, compute again when asked.

`CheckpointedNetwork` measures what a run keeps; `CheckpointedPipeline` also says beforehand what a run will keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpuckpt.checks import check_int, shown
from gpuckpt.errors import DimMismatch, EmptyPipeline, EmptySegments
from gpuckpt.segments.arrays import Array
from gpuckpt.segments.chain import ReplayChain, Replaying
from gpuckpt.segments.keep import Keeper
from gpuckpt.segments.protocols import require_forwards
from gpuckpt.segments.strategy import CheckpointStrategy

if TYPE_CHECKING:
    from gpuckpt.memory import Budget

__all__ = ["CheckpointedNetwork", "CheckpointedPipeline"]


class CheckpointedNetwork(Replaying):
    """Segments in order; forward keeps the inputs that `strategy` selects and drops every output but the last.

    segments: any `Recomputable`; backward needs them to be `Differentiable`. Raises `EmptySegments` without one.
    budget: where the inputs live, and what backward recomputes; they are freed as backward passes. None keeps references.
    strategy: which segments keep their input; every one by default. The first one's is always kept.

    >>> from gpuckpt.segments import Dense
    >>> network = CheckpointedNetwork([Dense(2, 2, "tanh", seed=k) for k in range(4)], strategy=CheckpointStrategy.sqrt())
    >>> network.forward([1.0, 2.0]).shape, network.memory_bytes(), network.full_memory_bytes()
    ((2,), 16, 32)
    >>> network.backward([1.0, 1.0]).shape, network.memory_bytes()
    ((2,), 0)
    """

    def __init__(
        self,
        segments: Sequence[Any],
        *,
        budget: Budget | None = None,
        strategy: CheckpointStrategy | None = None,
    ) -> None:
        stages = require_forwards(segments, "segments")
        if not stages:
            raise EmptySegments
        if strategy is not None and not isinstance(strategy, CheckpointStrategy):
            raise TypeError(f"strategy is {shown(strategy)}; expected a CheckpointStrategy, or None")
        starts = (strategy or CheckpointStrategy.every()).select_layers(len(stages))
        self._chain = ReplayChain(stages, starts, Keeper(budget))

    @property
    def segments(self) -> list[Any]:
        """The segments, in order."""
        return list(self._chain.stages)

    def forward(self, input: Array) -> Array:
        """The output of the last segment. What an earlier forward kept is released.

        Raises `BudgetExceeded` where an input does not fit; nothing is kept then.
        """
        return self._chain.forward(input)

    def recompute(self, index: int) -> Array:
        """The output of segment `index`, from the nearest kept input. `NotCheckpointed` without a forward before.

        Raises `IndexError` where there is no such segment.
        """
        return self._chain.recompute(index)

    def full_memory_bytes(self) -> int:
        """Bytes of all outputs of the last forward: what a network that drops none would hold. 0 before the first."""
        return sum(self._chain.output_bytes)

    def memory_savings(self) -> float:
        """1 - memory_bytes / full_memory_bytes, in [0, 1): 0 where the inputs are no less, or nothing is stored."""
        kept_bytes, full_bytes = self.memory_bytes(), self.full_memory_bytes()
        return max(0.0, 1.0 - kept_bytes / full_bytes) if kept_bytes and full_bytes else 0.0


class CheckpointedPipeline(Replaying):
    """Segments in order, each keeping its input, with the sums known before anything runs.

    segments: as in `CheckpointedNetwork`, with `in_dim` and `out_dim` for the sums; they must follow on each other, or
    `DimMismatch`. Raises `EmptyPipeline` without one. budget: as there.

    >>> from gpuckpt.segments import LinearSegment
    >>> pipeline = CheckpointedPipeline([LinearSegment.random_init(4, 8, seed=1), LinearSegment.random_init(8, 2, seed=2)])
    >>> pipeline.total_checkpoint_memory(4), pipeline.total_full_memory(4)
    (48, 88)
    """

    def __init__(self, segments: Sequence[Any], *, budget: Budget | None = None) -> None:
        stages = require_forwards(segments, "segments")
        if not stages:
            raise EmptyPipeline
        for k, (left, right) in enumerate(itertools.pairwise(stages)):
            gives, takes = getattr(left, "out_dim", None), getattr(right, "in_dim", None)
            if gives is not None and takes is not None and gives != takes:
                raise DimMismatch(takes, gives, f"input of segment {k + 1}")
        self._chain = ReplayChain(stages, range(len(stages)), Keeper(budget))

    def num_segments(self) -> int:
        """How many segments there are."""
        return len(self._chain.stages)

    def forward(self, input: Array) -> Array:
        """The output of the last segment; every segment's input is kept."""
        return self._chain.forward(input)

    def total_checkpoint_memory(self, input_size: int) -> int:
        """Bytes of all segments' inputs, for an input of `input_size` elements: a multiple of the first `in_dim`."""
        rows = self._rows(input_size)
        return rows * sum(s.in_dim * _itemsize(s) for s in self._sized())

    def total_full_memory(self, input_size: int | None = None) -> int:
        """Bytes of all segments' inputs and outputs, for `input_size` elements; one sample where it is None."""
        rows = 1 if input_size is None else self._rows(input_size)
        return rows * sum((s.in_dim + s.out_dim) * _itemsize(s) for s in self._sized())

    def overall_savings(self, input_size: int) -> float:
        """1 - total_checkpoint_memory / total_full_memory, for `input_size` elements, in [0, 1]; 0 for an empty input."""
        full_bytes = self.total_full_memory(input_size)
        return 1.0 - self.total_checkpoint_memory(input_size) / full_bytes if full_bytes else 0.0

    def _sized(self) -> list[Any]:
        for k, segment in enumerate(self._chain.stages):
            if not all(hasattr(segment, name) for name in ("in_dim", "out_dim", "weights")):
                raise TypeError(
                    f"segment {k} is a {type(segment).__name__} without in_dim, out_dim and weights, so its bytes are "
                    "not known before it runs; use CheckpointedNetwork, which measures them"
                )
        return self._chain.stages

    def _rows(self, input_size: int) -> int:
        in_dim = self._sized()[0].in_dim
        size = check_int(input_size, "input_size", None)
        rows, rest = divmod(size, in_dim)
        if rest or size < 0:
            raise DimMismatch(in_dim, size, "input_size (it must be a multiple of the first segment's in_dim)")
        return int(rows)


def _itemsize(segment: Any) -> int:
    return int(segment.weights.dtype.itemsize)
