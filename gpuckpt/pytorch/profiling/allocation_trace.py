"""Bytes that operators allocate: what a stage needs on top of what it is given, returns and saves.

A dispatch mode sees every tensor that an operator returns, and a weak reference on its storage tells when it dies. What an
operator allocates within itself (a library's workspace, the insides of a fused kernel) is not seen: the figures are those of
the tensors between operators, no more.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpuckpt.pytorch._torch_internals import innermost_mode
from gpuckpt.pytorch.engine.subclasses import parts_of

__all__ = ["Gradients", "LiveBytes", "gradients_of", "least_workspace"]

Gradients = tuple[list[torch.Tensor], list[torch.Tensor | None]]
"""Those that are handed on, and those of the parameters that are trained."""


class LiveBytes(TorchDispatchMode):
    """Within the context every storage that is born is noted, and when it dies. `unit_bytes`: sizes are rounded up to that."""

    def __init__(self, unit_bytes: int = 1) -> None:
        super().__init__()
        self._unit_bytes = unit_bytes
        self._births: dict[int, int] = {}  # address of a storage -> its latest number
        self._sizes: list[int] = []
        self._events: list[tuple[int, bool]] = []  # (number, born), in order
        self._refs: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given: dict[int, torch.UntypedStorage] | None = None
        for tensor in _parts(pytree.tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata in self._births:
                continue
            if given is None:
                leaves = pytree.tree_leaves((args, kwargs))
                given = {part.untyped_storage()._cdata: part.untyped_storage() for part in _parts(leaves)}
                self._met(given.values())
            if storage._cdata not in given:  # a view of something older is nothing new
                self._born(storage, str(func))
        return out

    def _met(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """An operator that made something new was given these."""

    def _born(self, storage: torch.UntypedStorage, operator: str) -> None:
        """An operator has made a storage; from now on it has a number."""
        number, address = len(self._sizes), storage._cdata
        self._sizes.append(-(-storage.nbytes() // self._unit_bytes) * self._unit_bytes)
        self._events.append((number, True))
        self._births[address] = number

        def died(_: Any) -> None:
            self._gone(number)
            if self._births.get(address) == number:
                del self._births[address]

        self._refs.append(weakref.ref(storage, died))

    def _gone(self, number: int) -> None:
        """The storage of that number is gone."""
        self._events.append((number, False))

    def mark(self) -> int:
        """A position in the record, for `peak_bytes`."""
        return len(self._events)

    def numbers(self, tensors: Sequence[torch.Tensor]) -> set[int]:
        """Numbers of those storages of `tensors` that were born in here."""
        found = (self._births.get(tensor.untyped_storage()._cdata) for tensor in _parts(tensors))
        return {number for number in found if number is not None}

    def peak_bytes(self, begin: int, end: int, without: set[int]) -> int:
        """The most bytes alive between two marks, relative to `begin`, storages numbered in `without` left out."""
        live = peak = 0
        for number, born in self._events[begin:end]:
            if number not in without:
                live += self._sizes[number] if born else -self._sizes[number]
                peak = max(peak, live)
        return peak

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context nothing is noted, where no other mode was entered since this one."""
        if innermost_mode() is not self:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def position(self) -> tuple[int, int]:
        """Where the record is now, for `made_since`."""
        return len(self._events), len(self._sizes)

    def made_since(self, position: tuple[int, int], held: Sequence[torch.Tensor]) -> int:
        """The most bytes alive at one time of what was made since then, without `held`."""
        begin, first = position
        return self.peak_bytes(begin, self.mark(), self.numbers(held) | set(range(first)))

    def beside_gradients(self, passing: Sequence[torch.Tensor], own: Sequence[torch.Tensor | None]) -> tuple[int, int]:
        """The most bytes alive without gradients of parameters, `own`; and what these add at the worst moment. Those that are
        handed on, `passing`, are counted by the planner, as if they were there all the time."""
        handed_on = sum(self._sizes[number] for number in self.numbers(passing))
        peaks = [
            self.peak_bytes(0, self.mark(), without)
            for without in (self.numbers([g for g in own if g is not None]), set())
        ]
        workspace_bytes, with_own_bytes = [max(0, nbytes - handed_on) for nbytes in peaks]
        return workspace_bytes, with_own_bytes - workspace_bytes


def gradients_of(
    roots: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    *,
    retain_graph: bool,
) -> Gradients:
    """Go backward from `roots`, whose gradients are ones, to what comes before and to parameters: the gradients of either.
    Parameters that are not reached have None."""
    ends = [tensor for tensor in before if tensor.requires_grad]
    leaves = [*ends, *(parameter for parameter in parameters if parameter.requires_grad)]
    if not roots or not leaves:
        return [], []
    grads = [torch.ones_like(root) for root in roots]
    found = torch.autograd.grad(roots, leaves, grads, allow_unused=True, retain_graph=retain_graph)
    return [gradient for gradient in found[: len(ends)] if gradient is not None], list(found[len(ends) :])


def least_workspace(forward_bytes: int, workspace_bytes: int, gradients_bytes: int) -> tuple[int, int]:
    """Workspace and what gradients add to it, where forward takes as much by itself."""
    more = max(0, forward_bytes - workspace_bytes)
    return workspace_bytes + more, max(0, gradients_bytes - more)


def _parts(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [part for leaf in leaves if isinstance(leaf, torch.Tensor) for part in parts_of(leaf)]
