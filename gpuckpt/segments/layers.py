"""Checkpointing around layers that have a backward of their own: one layer at a time, or a sequence cut into segments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gpuckpt.checks import check_int, shown
from gpuckpt.errors import NotCheckpointed
from gpuckpt.segments.arrays import Array, as_array
from gpuckpt.segments.chain import ReplayChain, Replaying
from gpuckpt.segments.keep import Keeper, Kept
from gpuckpt.segments.protocols import Layer, require_backward, require_forward, require_forwards

if TYPE_CHECKING:
    from gpuckpt.memory import Budget, MemoryUsageTracker

__all__ = ["CheckpointedLayer", "SegmentCheckpointer"]


class CheckpointedLayer:
    """A `Layer` around a layer: forward keeps the input only, backward computes again what the inner layer needs.

    tracker: counts the input while it is kept, what is recomputed, and the layer's gradients until `update` uses
    them up; None: nothing is tracked. budget: where the input lives; None keeps a reference.

    One forward is outstanding at a time: the next one releases the earlier input, and in evaluation nothing is kept.

    >>> from gpuckpt.segments import Dense
    >>> layer = CheckpointedLayer(Dense(2, 3, "tanh"))
    >>> layer.forward([1.0, 2.0]).shape, layer.memory_bytes()
    ((3,), 8)
    >>> layer.backward(None, [1.0, 1.0, 1.0]).shape, layer.memory_bytes()
    ((2,), 0)
    """

    layer_type = "CheckpointedLayer"
    recomputes_in_backward = True

    def __init__(
        self,
        layer: Layer,
        tracker: MemoryUsageTracker | None = None,
        *,
        budget: Budget | None = None,
    ) -> None:
        require_forward(layer, "layer")
        require_backward(layer, "layer")
        if not hasattr(layer, "is_training"):
            raise TypeError(f"layer is {shown(layer)}, without is_training; expected a Layer")
        self.inner = layer
        self._keeper = Keeper(budget, tracker)
        self._kept: Kept | None = None

    def forward(self, x: Array) -> Array:
        """The inner layer's output. Raises `BudgetExceeded` where x does not fit; on any error nothing stays kept."""
        self.release()
        x = as_array(x, "x")
        if self.inner.is_training:
            self._kept = self._keeper.keep(x)
        try:
            return self.inner.forward(x)
        except BaseException:
            self.release()
            raise

    def backward(self, x: Array | None, grad_out: Array) -> Array:
        """The gradient of the input that the last forward kept; the input is released, also on an error.

        x is there for the `Layer` protocol and is not used: what counts is the kept input. Raises `NotCheckpointed`
        without a forward in training before it.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            raise NotCheckpointed("backward of a CheckpointedLayer without a forward in training before it")
        try:
            kept_x = kept.load()
            if not getattr(self.inner, "recomputes_in_backward", False):
                self._keeper.recomputed(self.inner.forward(kept_x))
            return self.inner.backward(kept_x, as_array(grad_out, "grad_out"))
        finally:
            kept.free()
            self._keeper.settle_gradients(self.inner)

    def release(self) -> None:
        """Free the kept input, where no backward will follow."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.free()

    def memory_bytes(self) -> int:
        """Bytes of the kept input; 0 where none is kept."""
        return 0 if self._kept is None else self._kept.nbytes

    def update(self, lr: float) -> None:
        """Update the inner layer; gradients that it releases leave the tracker."""
        self.inner.update(lr)
        self._keeper.settle_gradients(self.inner)

    def set_gradients(self, gradients: Sequence[Array]) -> None:
        """Replace the inner layer's gradients, in the tracker too."""
        self.inner.set_gradients(gradients)
        self._keeper.settle_gradients(self.inner)

    @property
    def layer_description(self) -> str:
        """The inner layer's description, as "CheckpointedLayer(Dense(4 -> 8, tanh))"."""
        return f"CheckpointedLayer({self.inner.layer_description})"

    @property
    def params(self) -> Sequence[Array]:
        """The inner layer's parameters."""
        return self.inner.params

    @property
    def gradients(self) -> Sequence[Array]:
        """The inner layer's gradients."""
        return self.inner.gradients

    @property
    def is_training(self) -> bool:
        """Whether the inner layer is in training."""
        return self.inner.is_training

    @property
    def parameter_count(self) -> int:
        """Elements of the inner layer's parameters."""
        return self.inner.parameter_count

    def set_params(self, params: Sequence[Array]) -> None:
        """Replace the inner layer's parameters."""
        self.inner.set_params(params)

    def set_training(self, training: bool) -> None:
        """Switch the inner layer between training and evaluation."""
        self.inner.set_training(training)

    def __repr__(self) -> str:
        return self.layer_description


class SegmentCheckpointer(Replaying):
    """Layers in order, cut into segments of `checkpoint_every`; each segment keeps its input and nothing else.

    layers: objects with `forward(x)` and `backward(x, grad_out)`; an empty sequence is the identity.
    checkpoint_every: layers in a segment; 0 keeps the input of the whole sequence only.
    tracker, budget: as for `CheckpointedLayer`; what backward recomputes is held in them too.

    For N layers in S segments, forward and backward call layers' forward N + (N - S) times.

    >>> from gpuckpt.segments import Dense
    >>> layers = SegmentCheckpointer([Dense(2, 2, "tanh", seed=k) for k in range(4)], checkpoint_every=2)
    >>> layers.forward([1.0, 2.0]).shape, layers.memory_bytes()
    ((2,), 16)
    """

    def __init__(
        self,
        layers: Iterable[Any] = (),
        checkpoint_every: int = 1,
        tracker: MemoryUsageTracker | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._every = check_int(checkpoint_every, "checkpoint_every", None)
        if self._every < 0:
            raise ValueError(f"checkpoint_every={checkpoint_every}: give 0 (the input only) or more")
        self._keeper = Keeper(budget, tracker)
        self._layers = require_forwards(layers, "layers")
        self._chain = self._rebuilt()

    @property
    def checkpoint_every(self) -> int:
        """Layers in a segment; 0: one segment."""
        return self._every

    def push(self, layer: Any) -> None:
        """Append a layer. Raises `RuntimeError` between a forward and its backward."""
        if self._chain.has_kept:
            raise RuntimeError("push between forward and backward: the kept inputs belong to the layers as they were")
        require_forward(layer, "layer")
        self._layers.append(layer)
        self._chain = self._rebuilt()

    def forward(self, x: Array) -> Array:
        """The last layer's output. Raises `BudgetExceeded` where an input does not fit; nothing is kept then."""
        return self._chain.forward(x)

    def update(self, lr: float) -> None:
        """Update every layer that can be updated; gradients that they release leave the tracker."""
        for layer in {id(layer): layer for layer in self._layers}.values():
            if hasattr(layer, "update"):
                layer.update(lr)
        self._chain.settle_gradients()

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._layers)

    def _rebuilt(self) -> ReplayChain:
        count = len(self._layers)
        starts = range(0, count, self._every) if self._every else range(min(count, 1))
        return ReplayChain(self._layers, starts, self._keeper)
