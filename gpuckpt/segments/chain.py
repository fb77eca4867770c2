"""The one engine behind the classes of this room: a chain that keeps some inputs and replays each run between them once.

Forward keeps the inputs of the stages in `starts` and drops everything else. Backward takes the runs from last to first: it
computes the inputs of a run's stages again from the kept one, holds them, and frees each as its stage's backward passes.
Each stage but the last of its run is so computed a second time, never a third (Griewank and Walther, Evaluating
Derivatives, 2nd ed., 2008, section 12.2): N + N - len(starts) forward calls, and one run's inputs alive at a time.

A chain belongs to one thread. Budgets and trackers may be shared between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuckpt.checks import check_int, shown
from gpuckpt.errors import NotCheckpointed
from gpuckpt.segments.arrays import Array, as_array, nbytes
from gpuckpt.segments.keep import Keeper, Kept, release_all
from gpuckpt.segments.protocols import require_backward

__all__ = ["ReplayChain", "Replaying", "replay_backward", "require_backwards"]


def require_backwards(stages: Sequence[Any]) -> None:
    """Raise `TypeError`, naming it, where a stage has no backward."""
    for k, stage in enumerate(stages):
        require_backward(stage, f"stage {k}")


def replay_backward(stages: Sequence[Any], kept: Kept, grad: Array, keeper: Keeper) -> Array:
    """The gradient of the input of a run of stages, of which only that input was kept.

    The inputs of the later stages are computed again, once, and kept; each is freed as its stage's backward passes, and so
    is `kept`. On an error all of them are freed.
    """
    inputs = [kept]
    try:
        x = kept.load()
        for stage in stages[:-1]:
            x = as_array(stage.forward(x))
            keeper.recomputed(x)
            inputs.append(keeper.keep(x))
        # Under a pool a view holds its block: it must be gone before the block can be given back.
        del x
        for stage in reversed(stages):
            grad = as_array(stage.backward(inputs[-1].load(), grad))
            keeper.settle_gradients(stage)
            inputs.pop().free()
    finally:
        release_all(inputs)
    return grad


class ReplayChain:
    """Stages of one forward and backward, and what is kept between the two.

    stages: objects with `forward(x)`, and `backward(x, grad_output)` where backward is used.
    starts: indices of the stages whose input is kept, ascending; stage 0 always is, listed or not.
    """

    def __init__(self, stages: Sequence[Any], starts: Sequence[int], keeper: Keeper) -> None:
        self.stages = list(stages)
        self.starts = sorted({0, *starts}) if self.stages else []
        self.output_bytes: list[int] = []
        self._keeper = keeper
        self._kept: dict[int, Kept] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes of the inputs that are kept at this moment."""
        return sum(k.nbytes for k in self._kept.values())

    @property
    def has_kept(self) -> bool:
        """Whether a forward has run whose backward has not."""
        return bool(self._kept)

    def forward(self, x: Array) -> Array:
        """Run all stages; what an earlier forward kept is released first. On any error nothing stays kept."""
        self.release()
        starts = set(self.starts)
        sizes = []
        x = as_array(x, "the input")
        try:
            for k, stage in enumerate(self.stages):
                if k in starts:
                    self._kept[k] = self._keeper.keep(x)
                x = as_array(stage.forward(x))
                sizes.append(nbytes(x))
        except BaseException:
            self.release()
            raise
        self.output_bytes = sizes
        return x

    def recompute(self, index: int) -> Array:
        """The output of stage `index`, computed again from the nearest kept input before it."""
        index = check_int(index, "index", None)
        if not 0 <= index < len(self.stages):
            raise IndexError(f"stage {shown(index)} of a chain of {len(self.stages)}")
        start = max((s for s in self._kept if s <= index), default=None)
        if start is None:
            raise NotCheckpointed(f"no input is kept at or before stage {index}: run forward first")
        x = self._kept[start].load()
        for stage in self.stages[start : index + 1]:
            x = as_array(stage.forward(x))
            self._keeper.recomputed(x)
        return x

    def backward(self, grad_output: Array) -> Array:
        """The gradient of the chain's input. Everything kept is released, also on an error; the second call raises.

        Raises `NotCheckpointed` where no forward went before, and `TypeError` where a stage has no backward.
        """
        if not self.stages:
            return as_array(grad_output, "grad_output")
        if not self._kept:
            raise NotCheckpointed("backward without a forward before it: nothing is kept to start from")
        require_backwards(self.stages)
        grad = as_array(grad_output, "grad_output")
        try:
            ends = [*self.starts[1:], len(self.stages)]
            for start, end in zip(reversed(self.starts), reversed(ends), strict=True):
                grad = replay_backward(self.stages[start:end], self._kept.pop(start), grad, self._keeper)
        finally:
            self.release()
        return grad

    def settle_gradients(self) -> None:
        """Bring the tracker's gradient bytes up to date, after parameters were updated."""
        for stage in self.stages:
            self._keeper.settle_gradients(stage)

    def release(self) -> None:
        """Free everything that is kept."""
        while self._kept:
            self._kept.popitem()[1].free()


class Replaying:
    """What the public classes around a `ReplayChain` have in common; the chain is `_chain`."""

    _chain: ReplayChain

    def backward(self, grad_output: Array) -> Array:
        """The gradient of the input. Each run between kept inputs is replayed once, the last one first; everything kept is freed.

        Raises `NotCheckpointed` without a forward before it.
        """
        return self._chain.backward(grad_output)

    def release(self) -> None:
        """Free what forward kept, where no backward will follow."""
        self._chain.release()

    def memory_bytes(self) -> int:
        """Bytes of the inputs kept at this moment."""
        return self._chain.kept_bytes
