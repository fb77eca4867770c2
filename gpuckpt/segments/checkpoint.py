"""One recomputable step and its input: the smallest checkpoint there is.

`vjp_checkpoint` is the functional form, for NumPy and CuPy users without an autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpuckpt.errors import EmptySegments, NotCheckpointed
from gpuckpt.segments.arrays import Array, as_array, nbytes
from gpuckpt.segments.chain import replay_backward, require_backwards
from gpuckpt.segments.keep import Keeper, Kept, release_all
from gpuckpt.segments.protocols import Recomputable, require_backward, require_forward, require_forwards

if TYPE_CHECKING:
    from gpuckpt.memory import Budget

__all__ = ["Chained", "Checkpoint", "CheckpointedActivation", "vjp_checkpoint"]


class Checkpoint:
    """A `Recomputable` and the input it was given; the output is computed again whenever it is asked for.

    budget: where the input lives; None keeps a reference. Raises `BudgetExceeded` where the input does not fit.

    >>> from gpuckpt.segments import LinearSegment
    >>> kept = Checkpoint(LinearSegment([1.0, 2.0], 2, 1), [3.0, 4.0])
    >>> kept.memory_bytes(), kept.recompute().tolist()
    (8, [11.0])
    """

    def __init__(self, recomputable: Recomputable, input: Array, budget: Budget | None = None) -> None:
        require_forward(recomputable, "recomputable")
        self.recomputable = recomputable
        self._kept = Keeper(budget).keep(as_array(input, "input"))

    @property
    def input(self) -> Array:
        """The input that is kept. Raises `NotCheckpointed` after `free()`."""
        return self._kept.load()

    def recompute(self) -> Array:
        """The output, computed from the input. Raises `NotCheckpointed` after `free()`."""
        return self.recomputable.forward(self.input)

    def memory_bytes(self) -> int:
        """Bytes held: those of the input, 0 after `free()`."""
        return self._kept.nbytes

    def free(self) -> None:
        """Let go of the input."""
        self._kept.free()


class CheckpointedActivation(Checkpoint):
    """A `Checkpoint` that also knows what it saves. `segment`: any `Recomputable`.

    >>> from gpuckpt.segments import LinearSegment
    >>> kept = CheckpointedActivation(LinearSegment([1.0, 2.0, 3.0, 4.0], 1, 4), [2.0])
    >>> kept.memory_bytes(), kept.full_memory_bytes(), kept.memory_savings()
    (4, 20, 0.8)
    """

    def __init__(self, segment: Recomputable, input: Array, budget: Budget | None = None) -> None:
        require_forward(segment, "segment")
        super().__init__(segment, input, budget)
        self._output_bytes: int | None = None

    def recompute(self) -> Array:
        """The output, computed from the input."""
        output = super().recompute()
        self._output_bytes = nbytes(output)
        return output

    def full_memory_bytes(self) -> int:
        """Bytes of input and output together; 0 after `free()`.

        The output's size comes from `segment.output_memory_bytes(input)` where the segment has that, otherwise from the
        first recompute, which is run for it once.
        """
        if self.memory_bytes() == 0:
            return 0
        if self._output_bytes is None:
            predict = getattr(self.recomputable, "output_memory_bytes", None)
            self._output_bytes = int(predict(self.input)) if predict is not None else nbytes(self.recompute())
        return self.memory_bytes() + self._output_bytes

    def memory_savings(self) -> float:
        """The part of `full_memory_bytes` that is not held, in [0, 1); 0 where nothing is stored."""
        full_bytes = self.full_memory_bytes()
        return 0.0 if full_bytes == 0 else 1.0 - self.memory_bytes() / full_bytes


class Chained:
    """Several steps as one: a `Recomputable` with a backward that needs the first step's input alone. It nests.

    steps: at least one `Differentiable`, or `EmptySegments`. budget: holds, during backward, the input and what is
    recomputed from it; None keeps references.

    >>> from gpuckpt.segments import LinearSegment
    >>> both = Chained([LinearSegment([2.0], 1, 1), LinearSegment([3.0], 1, 1)])
    >>> both.forward([1.0]).tolist(), both.backward([1.0], [1.0]).tolist()
    ([6.0], [6.0])
    """

    def __init__(self, steps: Sequence[Any], budget: Budget | None = None) -> None:
        self.steps = require_forwards(steps, "steps")
        if not self.steps:
            raise EmptySegments
        self._keeper = Keeper(budget)

    def forward(self, x: Array) -> Array:
        """The last step's output; nothing is kept."""
        for step in self.steps:
            x = step.forward(x)
        return x

    def backward(self, x: Array, grad_output: Array) -> Array:
        """The gradient of x: every step but the last is run again, once."""
        require_backwards(self.steps)
        return replay_backward(
            self.steps, self._keeper.keep(as_array(x, "x")), as_array(grad_output, "grad_output"), self._keeper
        )

    def input_memory_bytes(self, x: Array) -> int:
        """Bytes that keeping `x` takes."""
        return nbytes(as_array(x))


def vjp_checkpoint(step: Any, *inputs: Array, budget: Budget | None = None) -> tuple[Array, Callable[[Array], Any]]:
    """Run `step` on `inputs`, keep the inputs alone, and return (output, pullback).

    step: has `forward(*inputs)` and `backward(*inputs, grad_output)`, which gives the gradient of the input, or a tuple of
    them, one for each. It is differentiated from its inputs alone, so everything inside it is computed again.
    budget: where the inputs live until the pullback has run; None keeps references.

    `pullback(grad_output)` gives what `step.backward` gives and releases the inputs, also where it fails. It runs once:
    the second call raises `NotCheckpointed`. Raises `ValueError` without inputs, `TypeError` where `step` has no backward.

    >>> from gpuckpt.segments import LinearSegment
    >>> y, pullback = vjp_checkpoint(LinearSegment([1.0, 2.0], 2, 1), [3.0, 4.0])
    >>> y.tolist(), pullback([1.0]).tolist()
    ([11.0], [1.0, 2.0])
    """
    if not inputs:
        raise ValueError("vjp_checkpoint needs at least one input: without one there is nothing to differentiate")
    require_backward(step, "the step")
    require_forward(step, "the step")
    keeper = Keeper(budget)
    kept: list[Kept] = []
    try:
        for k, value in enumerate(inputs):
            kept.append(keeper.keep(as_array(value, f"inputs[{k}]")))
        output = step.forward(*(k.load() for k in kept))
    except BaseException:
        release_all(kept)
        raise

    def pullback(grad_output: Array) -> Any:
        if not kept:
            raise NotCheckpointed("this pullback has run already and its inputs are released; run vjp_checkpoint again")
        try:
            return step.backward(*(k.load() for k in kept), as_array(grad_output))
        finally:
            release_all(kept)
            kept.clear()

    return output, pullback
