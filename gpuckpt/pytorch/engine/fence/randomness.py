"""Random number generators: their state in forward, and the same numbers again in a recompute."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from gpuckpt.pytorch._torch_internals import unwatched

__all__ = ["GENERATORS", "Draws", "Generators", "capturing", "is_generator", "other_states", "same_states"]

State = tuple[Callable[[], Any], Callable[[Any], object]]  # how to read a generator's state, and how to set it

_PYTHON: State = (random.getstate, random.setstate)
_NUMPY: State = (lambda: np.random.get_state(legacy=False), np.random.set_state)
_CPU: State = (torch.get_rng_state, torch.set_rng_state)


GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def capturing() -> bool:
    """Whether the work of this thread is being captured into a CUDA graph instead of done."""
    # A build of torch without CUDA has no such function behind the name.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def is_generator(value: object) -> bool:
    """Whether `value` draws random numbers by a state of its own: torch's, Python's or NumPy's generators."""
    return isinstance(value, GENERATORS)


def _state_of(generator: Any) -> State:
    if isinstance(generator, torch.Generator):
        return generator.get_state, generator.set_state
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if isinstance(generator, np.random.RandomState):
        return lambda: generator.get_state(legacy=False), generator.set_state
    bits = generator.bit_generator

    def put(state: Any) -> None:
        bits.state = state

    return lambda: bits.state, put


def _device_state(device: torch.device) -> State:
    module = torch.get_device_module(device)

    def get() -> Any:
        if device.type == "cuda" and capturing():
            raise RuntimeError(
                "the state of CUDA's random number generator cannot be read while a CUDA graph is being captured; capture with "
                "preserve_rng_state=False, which is right where nothing that is recomputed draws random numbers"
            )
        return module.get_rng_state(device)

    return get, lambda state: module.set_rng_state(state, device)


_UNWATCHED = nullcontext()


class Generators:
    """The states of torch's default generators (CPU and `devices`), of `explicit` ones, and with `others` of Python's and
    NumPy's own."""

    __slots__ = ("_states",)

    def __init__(self, devices: Iterable[torch.device], explicit: Sequence[Any], others: bool) -> None:
        ways = [_CPU, *map(_device_state, devices), *map(_state_of, explicit)]
        if others:
            ways += [_PYTHON, _NUMPY]
        self._states = [(get, put, _shared(get())) for get, put in ways]

    def enter(self) -> Callable[[], None]:
        """Set the generators to where they stood; returns what lets them go on as if nothing had been drawn."""
        now = [(put, get()) for get, put, _ in self._states]
        for _, put, state in self._states:
            put(state)

        def leave() -> None:
            for put, state in now:
                put(state)

        return leave


class Draws:
    """What some work draws from torch's default generators (CPU and the devices of `leaves`), from Python's and NumPy's own, and
    from `explicit` ones; so that it need not run again for the sake of the numbers that come after."""

    __slots__ = ("_states",)

    def __init__(self, leaves: Iterable[Any], explicit: Sequence[Any]) -> None:
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda}
        if torch.cuda.is_initialized():
            devices.add(torch.device("cuda", torch.cuda.current_device()))
        if capturing():  # a graph draws by an offset of its own
            devices.clear()
        ways = [_CPU, _PYTHON, _NUMPY, *map(_device_state, devices), *map(_state_of, explicit)]
        self._states = [(get, put, get(), None) for get, put in ways]

    def were_made(self) -> bool:
        """Whether anything has been drawn since; note what."""
        now = [(get, put, before, get()) for get, put, before, _ in self._states]
        self._states = [drawn for drawn in now if not _same(*drawn[2:])]
        return bool(self._states)

    def repeat(self) -> None:
        """Let generators that stand where they stood go on as if the work had run; others are not being repeated."""
        for get, put, before, after in self._states:
            if _same(get(), before):
                put(after)


def _shared(state: Any) -> Any:
    """A state, as the tensor that stands for it already where nothing was drawn since: the CPU's has 5,056 bytes."""
    global _latest
    if not isinstance(state, torch.Tensor):
        return state
    latest = None if _latest is None else _latest()
    if latest is not None and _same(latest, state):
        return latest
    _latest = weakref.ref(state)
    return state


_latest: weakref.ref[torch.Tensor] | None = None


def _same(one: Any, other: Any) -> bool:
    """Whether two states of a generator are one."""
    if isinstance(one, torch.Tensor):
        # Bytes are compared in a quarter of the time that torch.equal takes.
        with _UNWATCHED if unwatched() else _disable_current_modes():
            return one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else bool(one == other)


def other_states() -> tuple[Any, Any]:
    """Where Python's and NumPy's own generators stand, to be compared with `same_states`."""
    return _PYTHON[0](), _NUMPY[0]()


def same_states(before: tuple[Any, Any]) -> bool:
    """Whether neither of the two has drawn since `other_states()` gave `before`."""
    return all(map(_same, other_states(), before))
