"""`StepLedger`: every storage of a training step, what it is for, and what was alive when most was.

A dispatch mode sees what each operator returns, weak references tell when it dies. What was there before (parameters, buffers,
gradients, optimizer state, the batch) counts from the beginning. What an operator allocates within itself is not seen: a
library's workspace, or the scalar that a division in a loop over parameters makes of a Python number.

Kinds: "parameter" (buffers too), "optimizer state", "gradient" (what a parameter's `.grad` held at any time), "input" (there
before, and none of those), "activation" (made in forward and alive when backward begins), "transient" (all else: what forward
drops at once, what backward hands on, what a recompute brings back, the optimizer's temporaries).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.module_tracker import ModuleTracker

from gpuckpt.checks import check_int
from gpuckpt.planning.tables import text_table
from gpuckpt.pytorch._torch_internals import graph_task_id
from gpuckpt.pytorch.engine.subclasses import parts_of
from gpuckpt.pytorch.profiling.allocation_trace import LiveBytes
from gpuckpt.pytorch.profiling.measure import check_model
from gpuckpt.pytorch.whole_device.optimizer_step import optimizers_of
from gpuckpt.units import format_bytes

__all__ = ["KINDS", "StepLedger", "StorageLife", "ledger_of"]

KINDS = ("parameter", "optimizer state", "gradient", "input", "activation", "transient")


@dataclass
class StorageLife:
    """One storage: its bytes, what it is for, the operator and the module that made it ("" where it was there before), and
    whether it was there before."""

    nbytes: int
    kind: str
    operator: str
    module: str
    before: bool


class StepLedger(LiveBytes):
    """Within the context the step of `model` is written down, its optimizer's step included. `optimizer`: one, or several.

    >>> model = nn.Linear(8, 4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> x = torch.ones(2, 8)
    >>> with StepLedger(model, optimizer) as ledger:
    ...     model(x).sum().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> {kind: nbytes for kind, nbytes in ledger.at_peak().items() if kind in ("parameter", "gradient")}
    {'parameter': 144, 'gradient': 144}
    """

    def __init__(self, model: nn.Module, optimizer: Any = None) -> None:
        super().__init__()
        check_model(model)
        self.model = model
        self.optimizers = [] if optimizer is None else optimizers_of(optimizer)
        self.storages: list[StorageLife] = []
        self._modules = ModuleTracker()
        self._in_backward = False
        self._dead: set[int] = set()
        self._hooks: list[Any] = []

    def __enter__(self) -> StepLedger:
        for kind, tensors in (
            ("parameter", [*self.model.parameters(), *self.model.buffers()]),
            ("optimizer state", self._state()),
            ("gradient", [p.grad for p in self.model.parameters() if p.grad is not None]),
        ):
            self._there_before(tensors, kind)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._accumulated))
        self._modules.__enter__()
        super().__enter__()
        _watching[self.model] = weakref.ref(self)
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        _watching.pop(self.model, None)
        self._modules.__exit__(*reason)
        for hook in self._hooks:
            hook.remove()
        self._mark(self._state(), "optimizer state")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_backward = graph_task_id() != -1
        if in_backward and not self._in_backward:
            for number in set(range(len(self.storages))) - self._dead:
                life = self.storages[number]
                if life.kind == "transient":
                    life.kind = "activation"
        self._in_backward = in_backward
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _born(self, storage: torch.UntypedStorage, operator: str) -> None:
        module = max(self._modules.parents, key=len, default="") if self._modules.parents else ""
        self.storages.append(StorageLife(storage.nbytes(), "transient", operator, module.partition(".")[2], False))
        super()._born(storage, operator)

    def _gone(self, number: int) -> None:
        self._dead.add(number)
        super()._gone(number)

    def _met(self, storages: Iterable[torch.UntypedStorage]) -> None:
        for storage in storages:
            if storage._cdata not in self._births:
                self._add_before(storage, "input")

    def at_peak(self, unit_bytes: int = 1) -> dict[str, int]:
        """Bytes of each kind at the moment when most was alive, each storage rounded up to `unit_bytes` (512 for torch's caching
        allocator). The first such moment, if there are several."""
        unit_bytes = check_int(unit_bytes, "unit_bytes", 1)
        alive: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        for life in self.storages:
            if life.before:
                alive[life.kind] += -(-life.nbytes // unit_bytes) * unit_bytes
        now = most = sum(alive.values())
        peak = dict(alive)
        for number, born in self._events:
            life = self.storages[number]
            if born and life.before:
                continue  # counted from the beginning
            nbytes = -(-life.nbytes // unit_bytes) * unit_bytes * (1 if born else -1)
            alive[life.kind] += nbytes
            now += nbytes
            if now > most:
                most, peak = now, dict(alive)
        return peak

    def alive_at_last(self) -> list[StorageLife]:
        """What was alive when the last storage was made: of a step that failed, at the moment that it failed."""
        last = max((n for n, (_, born) in enumerate(self._events) if born), default=-1)
        alive = dict.fromkeys(number for number, life in enumerate(self.storages) if life.before)
        for number, born in self._events[: last + 1]:
            if born:
                alive[number] = None
            else:
                alive.pop(number, None)
        return [self.storages[number] for number in alive]

    def peak_total_bytes(self, unit_bytes: int = 1) -> int:
        """The most bytes alive."""
        return sum(self.at_peak(unit_bytes).values())

    def before_bytes(self) -> int:
        """Bytes that were there before the step."""
        return sum(life.nbytes for life in self.storages if life.before)

    def __str__(self) -> str:
        """What was alive at the peak, by kind."""
        peak = self.at_peak()
        rows = [("alive at the peak", "bytes", "")]
        rows += [
            (kind, f"{nbytes:,}", format_bytes(nbytes)) for kind, nbytes in (*peak.items(), ("all", sum(peak.values())))
        ]
        return "\n".join(text_table(rows, (False, True, True)))

    def _state(self) -> list[torch.Tensor]:
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]

    def _there_before(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        for tensor in tensors:
            for part in parts_of(tensor):
                if part.untyped_storage()._cdata not in self._births:
                    self._add_before(part.untyped_storage(), kind)

    def _add_before(self, storage: torch.UntypedStorage, kind: str) -> None:
        self.storages.append(StorageLife(storage.nbytes(), kind, "", "", True))
        super()._born(storage, "")

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._mark([parameter.grad], "gradient")

    def _mark(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        for number in self.numbers(list(tensors)):
            self.storages[number].kind = kind


_watching: weakref.WeakKeyDictionary[nn.Module, weakref.ref[StepLedger]] = weakref.WeakKeyDictionary()


def ledger_of(model: nn.Module) -> StepLedger | None:
    """The ledger that is entered around steps of `model`, if there is one."""
    ref = _watching.get(model)
    return None if ref is None else ref()
