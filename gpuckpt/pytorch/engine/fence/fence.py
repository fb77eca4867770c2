"""What a piece of work sees besides its arguments, and how it sees the same when it runs again.

Settings of torch (switches.py), generators of random numbers (randomness.py), the state of the modules that it uses
(module_state.py) and of other Python objects (reached.py), as far as it can reach them (scope.py). What a recompute changes of
settings, generators and modules is undone when it ends.

Python's and NumPy's own generators are captured for code that names `random`, or that was seen to draw from them: in its first
two calls, or while a model was observed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.nn.utils.parametrize import is_parametrized

from gpuckpt.errors import StateModified
from gpuckpt.pytorch._torch_internals import weights_are_cached
from gpuckpt.pytorch.engine.fence.module_state import ModuleState
from gpuckpt.pytorch.engine.fence.randomness import Generators, other_states, same_states
from gpuckpt.pytorch.engine.fence.scope import Scope, scope_of
from gpuckpt.pytorch.engine.fence.switches import Switches
from gpuckpt.pytorch.engine.fence.tensors import TensorFate
from gpuckpt.pytorch.engine.fence.watched import watch

__all__ = ["Fates", "Fence"]


class Fates(NamedTuple):
    """What becomes of tensors, and of modules' buffers, that a call reaches."""

    tensors: tuple[TensorFate, ...]
    states: tuple[tuple[bool, frozenset[int]], ...]


class Fence:
    """What a call of `function` that begins now sees. `leaves`: its arguments, flattened. `fates`: those of the call of forward
    that is run again within a recompute, which has to keep as many tensors; more may be known by now.

    `kept`: tensors that the caller has to keep for `restored`.
    """

    __slots__ = ("_before", "_fates", "_generators", "_reached", "_scope", "_states", "_switches", "kept")

    def __init__(
        self, function: Callable[..., Any], leaves: Sequence[Any], preserve_rng_state: bool, fates: Fates | None = None
    ) -> None:
        devices = {
            leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and not (leaf.is_cpu or leaf.is_meta)
        }
        if not devices and torch.cuda.is_initialized():
            devices = {torch.device("cuda", torch.cuda.current_device())}
        self._switches = Switches(("cpu", *{device.type for device in devices}) if devices else ("cpu",))
        scope = self._scope = Scope(function, leaves)
        if scope.iterators:
            raise TypeError(
                f"checkpointed work is given an iterator, {scope.iterators[0]}, which forward uses up before the work runs "
                "again; take the values out first and hand those in"
            )
        if weights_are_cached() and any(is_parametrized(part) for root in scope.roots for part in root.modules()):
            raise NotImplementedError(
                "checkpointed work inside torch.nn.utils.parametrize.cached(): whoever uses a weight first computes it for all, "
                "so that a recompute would save other tensors than forward; enter cached() within the work, or leave it out"
            )
        self._reached = scope.reached
        self._states: list[ModuleState] = []
        self._fates = fates
        self._look(scope.roots)
        if scope.reached.leads_on(len(scope.roots)):
            self._look_further()
        self._reached.begin(None if fates is None else fates.tensors)
        self.kept: list[torch.Tensor] = [
            *self._reached.kept,
            *(tensor for state in self._states for tensor in state.kept),
        ]
        self._generators: Generators | None = None
        self._before: Any = None
        if preserve_rng_state:
            draws = any(known.draws for known in scope.learned)
            watched_still = not draws and any(known.trials for known in scope.learned)
            self._generators = Generators(devices, scope.generators, draws or watched_still)
            if watched_still:
                self._before = other_states()

    def _look(self, roots: tuple[Any, ...]) -> None:
        """Take down the state of modules."""
        if roots:
            for root in roots:
                self._scope.lead(scope_of(root).lead, whole=True)
            given = () if self._fates is None else self._fates.states[len(self._states) :]
            self._states.append(
                ModuleState(watch(roots, self._scope.roots), self._reached, given[0] if given else None)
            )

    def _look_further(self) -> None:
        """Where objects and functions lead that were met, and modules that stand in attributes without being submodules."""
        scope, reached = self._scope, self._reached
        known, classes = {module for state in self._states for module in state.modules}, set[type]()
        roots: tuple[Any, ...] = ()
        while True:
            for kind, whole in [item for item in reached.classes.items() if item[0] not in classes]:
                classes.add(kind)
                for learned in scope.learned:
                    scope.lead(learned.lead_of(kind), whole)
            scope.follow()
            roots = tuple(module for module in reached.modules.values() if module not in known)
            if not roots and len(classes) == len(reached.classes):
                return
            self._look(roots)
            known |= self._states[-1].modules if roots else set()

    def learn(self, for_good: bool = False) -> None:
        """The work has run: what did it touch? `for_good`: it has been observed, and touches no other buffers from now on."""
        if self._before is not None:
            draws = not same_states(self._before)
            for known in self._scope.learned:
                known.draws = known.draws or draws
                known.trials = max(0, known.trials - 1)
            self._before = None
        self._reached.learn()
        for state in self._states:
            state.learn(for_good)

    @property
    def fates(self) -> Fates:
        """What becomes of what it reaches, for a call that does the same again."""
        return Fates(self._reached.fates, tuple([state.fates for state in self._states]))

    def watching(self) -> AbstractContextManager[object]:
        """The context in which forward runs."""
        return self._reached.watching()

    @property
    def rewritten(self) -> str | None:
        """The name of a parameter that the work was seen to change in place itself: it cannot run again."""
        return next((state.rewritten for state in self._states if state.rewritten), None)

    @property
    def copies(self) -> list[torch.Tensor]:
        """Copies that it holds itself, of buffers that the work may write, for as long as it is not known which it does."""
        return [*self._reached.copies, *(copy for state in self._states for copy in state.copies)]

    def restored(
        self, kept: Sequence[torch.Tensor] = (), cut: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> Restored:
        """The context of a recompute. Entering raises `RecomputeMismatch` where something cannot be as it was. `cut`: what the
        work is to find instead of tensors that are reached otherwise than as parameters and buffers."""
        return Restored(self, kept, cut)


class Restored:
    """No `ExitStack`: its tracebacks are cycles, which would keep a failed replay's tensors."""

    __slots__ = ("_cut", "_fence", "_kept", "_leave")

    def __init__(self, fence: Fence, kept: Sequence[torch.Tensor], cut: Any) -> None:
        self._fence = fence
        self._cut = cut
        self._kept = kept
        self._leave: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        fence = self._fence
        try:
            kept = self._kept
            self._leave.append(fence._reached.enter(kept[: len(fence._reached.kept)], self._cut))
            kept = kept[len(fence._reached.kept) :]
            for state in fence._states:
                self._leave.append(state.enter(kept[: len(state.kept)]))
                kept = kept[len(state.kept) :]
            if fence._generators is not None:
                self._leave.append(fence._generators.enter())
            self._leave.append(fence._switches.enter())
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        while self._leave:
            leave = self._leave.pop()
            try:
                leave()
            except StateModified:  # all is as it was, and nothing else may stay undone
                self.__exit__()
                raise
