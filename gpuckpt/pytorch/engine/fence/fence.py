"""What a piece of work sees besides its arguments, and how it sees the same when it runs again.

Settings of torch (switches.py), generators of random numbers (randomness.py) and the state of the modules that it uses
(module_state.py), as far as it can reach them (scope.py). What a recompute changes of any of these is undone when it ends.

Python's and NumPy's own generators are captured for code that was seen to draw from them: in its first two calls, or while a
model was observed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpuckpt.pytorch.engine.fence.module_state import ModuleState, watch
from gpuckpt.pytorch.engine.fence.randomness import Generators, other_states, same_states
from gpuckpt.pytorch.engine.fence.scope import Scope
from gpuckpt.pytorch.engine.fence.switches import Switches

__all__ = ["Fence"]


class Fence:
    """What a call of `function` that begins now sees. `leaves`: its arguments, flattened.

    `kept`: tensors that the caller has to keep for `restored`.
    """

    __slots__ = ("_before", "_generators", "_scope", "_state", "_switches", "kept")

    def __init__(self, function: Callable[..., Any], leaves: Sequence[Any], preserve_rng_state: bool) -> None:
        devices = {
            leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and not (leaf.is_cpu or leaf.is_meta)
        }
        if not devices and torch.cuda.is_initialized():
            devices = {torch.device("cuda", torch.cuda.current_device())}
        self._switches = Switches(("cpu", *{device.type for device in devices}) if devices else ("cpu",))
        scope = self._scope = Scope(function, leaves)
        watched = watch(scope.roots)
        self._state = None if watched is None else ModuleState(watched)
        self.kept: Sequence[torch.Tensor] = () if self._state is None else self._state.kept
        self._generators: Generators | None = None
        self._before: Any = None
        if preserve_rng_state:
            draws = any(known.draws for known in scope.learned)
            watched_still = not draws and any(known.trials for known in scope.learned)
            self._generators = Generators(devices, scope.generators, draws or watched_still)
            if watched_still:
                self._before = other_states()

    def learn(self, for_good: bool = False) -> None:
        """The work has run: what did it touch? `for_good`: it has been observed, and touches no other buffers from now on."""
        if self._before is not None:
            draws = not same_states(self._before)
            for known in self._scope.learned:
                known.draws = known.draws or draws
                known.trials = max(0, known.trials - 1)
            self._before = None
        if self._state is not None:
            self._state.learn(for_good)

    @property
    def copies(self) -> list[torch.Tensor]:
        """Copies that it holds itself, of buffers that the work may write, for as long as it is not known which it does."""
        return [] if self._state is None else self._state.copies

    def restored(self, kept: Sequence[torch.Tensor] = ()) -> Restored:
        """The context of a recompute. Entering raises `RecomputeMismatch` where something cannot be as it was."""
        return Restored(self, kept)


class Restored:
    """No `ExitStack`: its tracebacks are cycles, which would keep a failed replay's tensors."""

    __slots__ = ("_fence", "_kept", "_leave")

    def __init__(self, fence: Fence, kept: Sequence[torch.Tensor]) -> None:
        self._fence = fence
        self._kept = kept
        self._leave: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        fence = self._fence
        try:
            if fence._state is not None:
                self._leave.append(fence._state.enter(self._kept))
            if fence._generators is not None:
                self._leave.append(fence._generators.enter())
            self._leave.append(fence._switches.enter())
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        while self._leave:
            self._leave.pop()()
