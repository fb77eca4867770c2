"""Checkpointing over a layer function: `forward_fn(layer, x)` for a list of labels, with checkpoints in a dictionary.

What is stored under a label is that layer's *output*. The chain's input is always stored as well, so that a recompute never
lacks a start. Between two checkpoints nothing is stored.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuckpt.checks import check_int, shown
from gpuckpt.errors import BudgetExceeded, CheckpointLimit, NotCheckpointed
from gpuckpt.segments.arrays import Array, as_array, nbytes
from gpuckpt.segments.chain import replay_backward
from gpuckpt.segments.keep import Keeper, Kept, release_all
from gpuckpt.segments.storage import Packed, pack, storage_format, unpack

if TYPE_CHECKING:
    from gpuckpt.memory import Budget

__all__ = ["ActivationCheckpointer", "CheckpointConfig"]

ForwardFn = Callable[[Any, Array], Array]
"""(layer, input) -> output, deterministic."""
BackwardFn = Callable[[Any, Array, Array], Array]
"""(layer, input, gradient of the output) -> gradient of the input."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How an `ActivationCheckpointer` stores.

    checkpoint_every_n_layers: positions 0, n, 2n, ... of the layer list are checkpoints; 0: none but the chain's input.
    max_checkpoints: the most layers that are stored at one time, the chain's input not counted.
    storage_dtype: None stores activations as they are; "float16", "bfloat16", "float8_e4m3fn" or "float8_e5m2" (or a
    torch or NumPy dtype) stores them in fewer bits, within the error bound told in `storage`.

    >>> CheckpointConfig(checkpoint_every_n_layers=2, storage_dtype="bfloat16").max_checkpoints
    64
    """

    checkpoint_every_n_layers: int = 4
    max_checkpoints: int = 64
    storage_dtype: Any = None

    def __post_init__(self) -> None:
        for name in ("checkpoint_every_n_layers", "max_checkpoints"):
            number = check_int(getattr(self, name), name, None)
            if number < 0:
                raise ValueError(f"{name}={shown(number)}: give 0 or more")
            object.__setattr__(self, name, number)
        storage_format(self.storage_dtype)


@dataclass
class _Stored:
    kept: Kept
    packed: Packed  # without its bits: those live in `kept`
    full_bytes: int  # of the activation in its own precision

    def load(self) -> Array:
        return unpack(self.packed, self.kept.load())


class ActivationCheckpointer:
    """Stores activations by layer, runs a chain of layers with few of them stored, and computes the others again.

    budget: where they live; None keeps references. One thread at a time.

    >>> checkpointer = ActivationCheckpointer(CheckpointConfig(checkpoint_every_n_layers=2))
    >>> checkpointer.checkpointed_forward([2.0], [10, 20, 30], lambda factor, x: factor * x).tolist()
    [12000.0]
    >>> checkpointer.num_checkpoints(), checkpointer.memory_stored_bytes()
    (2, 12)
    >>> layers = [10, 20, 30]
    >>> checkpointer.checkpointed_backward([1.0], layers, lambda k, x: k * x, lambda k, x, grad: k * grad).tolist()
    [6000.0]
    """

    def __init__(self, config: CheckpointConfig | None = None, budget: Budget | None = None) -> None:
        if config is not None and not isinstance(config, CheckpointConfig):
            raise TypeError(f"config is {shown(config)}; expected a CheckpointConfig, or None")
        self.config = config or CheckpointConfig()
        self._format = storage_format(self.config.storage_dtype)
        self._keeper = Keeper(budget)
        self._entries: dict[Hashable, _Stored] = {}
        self._input: _Stored | None = None
        self._dropped_bytes = 0
        self._positions: dict[Hashable, int] = {}

    def save(self, layer: Hashable, activation: Array) -> None:
        """Store a layer's activation; one stored before under the same label is replaced, and counted once.

        Raises `CheckpointLimit` where `max_checkpoints` other layers are stored, `BudgetExceeded` where it does not fit;
        the old one stays then.
        """
        if not _is_label(layer):
            raise TypeError(
                f"layer is {shown(layer)}, which cannot be hashed; expected a label, such as a number or a name"
            )
        if layer not in self._entries and len(self._entries) >= self.config.max_checkpoints:
            raise CheckpointLimit(self.config.max_checkpoints, f"layer {shown(layer)}")
        entry = self._packed(as_array(activation, "activation"))
        old = self._entries.pop(layer, None)
        self._entries[layer] = entry
        if old is not None:
            old.kept.free()

    def get(self, layer: Hashable) -> Array | None:
        """The layer's activation, in its own precision; None where it is not stored."""
        entry = self._entries.get(layer) if _is_label(layer) else None
        return None if entry is None else entry.load()

    def clear(self) -> None:
        """Forget everything: all bytes go back."""
        entries = [*self._entries.values(), *([self._input] if self._input is not None else [])]
        self._entries, self._input, self._dropped_bytes, self._positions = {}, None, 0, {}
        release_all(e.kept for e in entries)

    def memory_stored_bytes(self) -> int:
        """Bytes held, the chain's input included."""
        return sum(e.kept.nbytes for e in self._all())

    def memory_saved_bytes(self) -> int:
        """Bytes that keeping every activation in its own precision would hold on top of `memory_stored_bytes`."""
        return self._dropped_bytes + sum(e.full_bytes - e.kept.nbytes for e in self._all())

    def num_checkpoints(self) -> int:
        """Layers stored, the chain's input not counted."""
        return len(self._entries)

    def is_checkpoint_layer(self, layer: Any) -> bool:
        """Whether the config makes `layer` a checkpoint: its position in the chain that ran last, or the number itself."""
        try:
            position = operator.index(self._positions.get(layer, layer))
        except TypeError:
            raise TypeError(
                f"layer {shown(layer)} is in no chain that has run and is no integer: its position is not known"
            ) from None
        every = self.config.checkpoint_every_n_layers
        return every > 0 and position % every == 0

    def checkpointed_forward(self, input: Array, layers: Sequence[Any], forward_fn: ForwardFn) -> Array:
        """Run `forward_fn(layer, x)` through the layers; store the input and the outputs of checkpoint layers.

        layers: distinct labels in the order of the chain; hashable, of any kind. What was stored before is forgotten.
        Where `max_checkpoints` or the budget do not allow all checkpoints, fewer are stored and more is recomputed; only
        an input that does not fit raises `BudgetExceeded`. On any error in the run nothing stays stored.
        """
        layers, positions = _positions(layers)
        _require_function(forward_fn, "forward_fn")
        x = as_array(input, "input")
        self.clear()
        self._positions = positions
        stored = self._chosen(len(layers))
        try:
            self._input = self._packed(x)
            for k, layer in enumerate(layers):
                x = as_array(forward_fn(layer, x))
                if k not in stored or not self._try_save(layer, x):
                    self._dropped_bytes += nbytes(x)
        except BaseException:
            self.clear()
            raise
        return x

    def recompute_from_checkpoint(self, target_layer: Any, layers: Sequence[Any], forward_fn: ForwardFn) -> Array:
        """The output of `target_layer`, computed from the nearest checkpoint at or before it.

        Raises `ValueError` where the target is not among the layers, `NotCheckpointed` where nothing was stored before it.
        """
        layers, positions = _positions(layers)
        _require_function(forward_fn, "forward_fn")
        if not _is_label(target_layer) or target_layer not in positions:
            raise ValueError(f"target_layer: layer {shown(target_layer)} is not among the {len(layers)} layers given")
        start, entry = self._nearest(layers, positions[target_layer])
        x = entry.load()
        for layer in layers[start : positions[target_layer] + 1]:
            x = as_array(forward_fn(layer, x))
        return x

    def checkpointed_backward(
        self, grad_output: Array, layers: Sequence[Any], forward_fn: ForwardFn, backward_fn: BackwardFn
    ) -> Array:
        """The gradient of the chain's input, after `checkpointed_forward` over the same layers; everything is released.

        Each run between checkpoints is recomputed once, the last one first, and its activations are held, in full
        precision and in the budget, until `backward_fn(layer, x, grad)` has used them. Raises `NotCheckpointed` without a
        forward before it.
        """
        if self._input is None:
            raise NotCheckpointed("checkpointed_backward without a checkpointed_forward before it")
        layers, _ = _positions(layers)
        _require_function(forward_fn, "forward_fn")
        _require_function(backward_fn, "backward_fn")
        steps = [_LayerCall(layer, forward_fn, backward_fn) for layer in layers]
        grad = as_array(grad_output, "grad_output")
        end = len(steps)
        try:
            while end > 0:
                # Layers start..end-1 need their inputs: the output of start-1, which is stored, and what follows from it.
                start, entry = self._nearest(layers, end - 2)
                last = self._entries.pop(layers[end - 1], None)
                if last is not None:
                    last.kept.free()
                grad = replay_backward(steps[start:end], self._unpacked(entry), grad, self._keeper)
                end = start
        finally:
            self.clear()
        return grad

    def _unpacked(self, entry: _Stored) -> Kept:
        """The entry's activation in its own precision, held in its place."""
        if entry.packed.format is None:
            return entry.kept
        full = entry.load()
        entry.kept.free()
        return self._keeper.keep(full)

    def _nearest(self, layers: Sequence[Any], position: int) -> tuple[int, _Stored]:
        """(first layer to run, its input) to get behind `position`, from the nearest thing stored."""
        for k in range(position, -1, -1):
            entry = self._entries.get(layers[k])
            if entry is not None:
                return k + 1, entry
        if self._input is None:
            raise NotCheckpointed("nothing is stored at or before that layer: run checkpointed_forward, or save one")
        return 0, self._input

    def _chosen(self, count: int) -> set[int]:
        """Positions to store: every n-th, thinned out evenly where there would be more than `max_checkpoints`."""
        every, most = self.config.checkpoint_every_n_layers, self.config.max_checkpoints
        if every == 0 or most == 0:
            return set()
        wanted = range(0, count, every)
        return set(wanted[:: max(-(-len(wanted) // most), 1)])

    def _try_save(self, layer: Hashable, x: Array) -> bool:
        try:
            self.save(layer, x)
        except BudgetExceeded:
            # A checkpoint is a convenience here: without it the run is recomputed from an earlier one.
            return False
        return True

    def _packed(self, array: Array) -> _Stored:
        packed = pack(array, self._format)
        kept = self._keeper.keep(packed.bits)
        return _Stored(kept, Packed(None, packed.format, packed.exponent, packed.dtype), nbytes(array))

    def _all(self) -> list[_Stored]:
        return [*self._entries.values(), *([] if self._input is None else [self._input])]


class _LayerCall:
    """A layer of a layer function, as a stage."""

    def __init__(self, layer: Any, forward_fn: ForwardFn, backward_fn: BackwardFn) -> None:
        self._layer = layer
        self._forward_fn = forward_fn
        self._backward_fn = backward_fn

    def forward(self, x: Array) -> Array:
        return self._forward_fn(self._layer, x)

    def backward(self, x: Array, grad: Array) -> Array:
        return self._backward_fn(self._layer, x, grad)


def _positions(layers: Sequence[Any]) -> tuple[list[Any], dict[Hashable, int]]:
    """The labels as a list, and where each stands."""
    try:
        found = list(layers)
        positions = {layer: k for k, layer in enumerate(found)}
    except (TypeError, NotImplementedError):  # the second: a tensor without elements in memory
        raise TypeError(f"layers is {shown(layers)}; expected labels that can be hashed, in a sequence") from None
    if len(positions) != len(found):
        raise ValueError(f"layers is {shown(layers)}; the labels must be distinct: a checkpoint is found by its label")
    return found, positions


def _is_label(layer: Any) -> bool:
    try:
        hash(layer)
    except TypeError:
        return False
    return True


def _require_function(value: Any, name: str) -> None:
    if not callable(value):
        raise TypeError(f"{name} is {shown(value)}; expected a function")
