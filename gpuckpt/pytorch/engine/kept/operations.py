"""Selective checkpointing: outputs of operations that are kept in forward and given back in a recompute, where they do not run.

Both runs are watched below autograd, by a dispatch mode. So autograd records a recompute as it recorded forward, derivatives
inside the work included, and only the kernels of what is kept are left out.

A recompute has to call what is kept in forward's order: calls of the operations of which any output is kept are compared, by
operation and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from gpuckpt.errors import RecomputeMismatch, SavedTensorModified
from gpuckpt.pytorch._torch_internals import sharing_versions
from gpuckpt.pytorch.engine.fence.randomness import Draws
from gpuckpt.pytorch.engine.kept.current import is_open, paused, reader, reading
from gpuckpt.pytorch.engine.kept.flow import UNWATCHED, changed_by
from gpuckpt.pytorch.engine.kept.policy import MUST, NEVER, Policy, can_be_kept
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.engine.saved_storage import Geometry, flat_bytes
from gpuckpt.pytorch.engine.subclasses import detached, parts_of

__all__ = ["Operation", "draws_of", "keeping", "returning", "shapes_of"]


class _Output:
    """A tensor that an operation returned, as `record` keeps it. `storages`: the addresses of where it lay, which weak references
    keep from naming others."""

    __slots__ = ("_copied", "_geometry", "_kept", "_refs", "storages")

    def __init__(self, tensor: torch.Tensor, record: Record) -> None:
        self._refs = [StorageWeakRef(part.untyped_storage()) for part in parts_of(tensor)]
        self.storages = frozenset(ref.cdata for ref in self._refs)
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        self._geometry = Geometry(tensor) if plain else None
        self._copied = False
        self._kept = record.keep(detached(tensor))

    def copy_from(self, storage: torch.UntypedStorage, record: Record) -> bool:
        """Keep a copy instead of what lies in `storage`, as long as that is as it was; whether there is a copy."""
        if self._geometry is not None and not self._copied:
            self._kept = record.keep(self._geometry.of(flat_bytes(storage, self._geometry.device)).clone())
            self._copied = True
        return self._copied

    def load(self) -> Callable[[], torch.Tensor]:
        tensor = self._kept.load()
        # Autograd makes what an operation returns a part of its graph; and work that changes it will do so again.
        return tensor.clone if self._copied else tensor.detach


class Operation:
    """An operation that ran in forward; of one that is kept, what it returned."""

    __slots__ = ("_spec", "_values", "_wanted", "draws", "op", "saved_before", "shapes")

    def __init__(self, op: OpOverload, shapes: tuple, wanted: CheckpointPolicy, saved_before: int) -> None:
        self.op = op
        self.shapes = shapes
        self.saved_before = saved_before  # by autograd, of the work around
        self._wanted = wanted
        self.draws: Draws | None = None
        self._values: list[Any] | None = None

    @property
    def kept(self) -> bool:
        return self._values is not None

    def keep(self, output: Any, record: Record, draws: Draws | None) -> None:
        """Raises `BudgetExceeded`."""
        leaves, self._spec = pytree.tree_flatten(output)
        with paused(), sharing_versions():
            self._values = [_Output(leaf, record) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.draws = draws

    def forget(self) -> None:
        """Keep it no longer."""
        self._values = None

    def will_change(self, storage: torch.UntypedStorage, changed_by: OpOverload, record: Record) -> None:
        """The bytes of `storage` are about to be changed. If it returned any of them, keep a copy where it has to be kept, and
        else nothing. Raises `BudgetExceeded`, and `ValueError` for a tensor that cannot be copied so."""
        outputs = [
            value for value in self._values or () if isinstance(value, _Output) and storage._cdata in value.storages
        ]
        if outputs and self._wanted is not MUST:
            self.forget()
            return
        with paused(), sharing_versions():
            if not all(output.copy_from(storage, record) for output in outputs):
                raise ValueError(
                    f"keep= holds what {self.op} returned, which {changed_by} is about to change in place: replace the in-place "
                    "operation, or leave this one out of keep="
                )

    def load(self) -> Callable[[], Any]:
        """Bring back what it returned; what is returned gives it, or raises why it is not there, when it is asked for."""
        assert self._values is not None
        try:
            found = [value.load() if isinstance(value, _Output) else value for value in self._values]
        except SavedTensorModified as error:
            refused = error

            def refuse() -> Any:
                raise refused

            return refuse
        given = [isinstance(value, _Output) for value in self._values]

        def give() -> Any:
            leaves = [value() if output else value for value, output in zip(found, given, strict=True)]
            return pytree.tree_unflatten(leaves, self._spec)

        return give


class keeping(TorchDispatchMode):
    """Within the context, `record` keeps the outputs of operations that `policy` chooses, while it is open. `saved`: the tensors
    that autograd has saved of the work so far. What is made after the last of them is not kept: a recompute ends before it."""

    def __init__(self, record: Record, policy: Policy, saved: Sized) -> None:
        super().__init__()
        self._record = record
        self._policy = policy
        self._saved = saved

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for call in reversed(self._record.operations):
            if call.saved_before < len(self._saved):
                break
            call.forget()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        record = self._record
        if op in UNWATCHED or not isinstance(op, OpOverload) or not is_open(record):
            return op(*args, **kwargs)
        if can_be_kept(op) is not None:
            if op._schema.is_mutable:
                # What is kept of these would not be what it was.
                for storage in changed_by(op, args, kwargs):
                    for operation in record.operations:
                        operation.will_change(storage, op, record)
            output = op(*args, **kwargs)
            with paused():
                self._policy(op, output, args, kwargs)  # which may refuse
            return output
        draws = draws_of(op, args, kwargs)
        shapes = shapes_of(args)
        output = op(*args, **kwargs)
        with paused():
            wanted = self._policy(op, output, args, kwargs)
        call = Operation(op, shapes, wanted, len(self._saved))
        if wanted is not NEVER:
            call.keep(output, record, draws if draws is not None and draws.were_made() else None)
        record.operations.append(call)
        return output


def draws_of(op: OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> Draws | None:
    """What `op` is about to draw; None where it is no random operation."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return None
    return Draws(args, [kwargs["generator"]] if kwargs.get("generator") is not None else ())


class returning(TorchDispatchMode):
    """Within the context, what the record that `run` reads has kept is returned, and not computed again. Made before the work
    begins: bringing back what a budget has moved, or an outer frame recomputes, is no part of the work."""

    def __init__(self, run: reading) -> None:
        super().__init__()
        self._run = run
        calls: Sequence[Operation] = run.record.operations  # type: ignore[attr-defined]
        self._ops = {call.op for call in calls if call.kept}
        self._calls = iter([_Given(call, call.load() if call.kept else None) for call in calls if call.op in self._ops])

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if op not in self._ops or reader() is not self._run:
            return op(*args, **kwargs)
        call, output = next(self._calls, _NONE)
        shapes = shapes_of(args)
        if call is None or call.op is not op or call.shapes != shapes:
            before = "no such call" if call is None else f"{call.op} of tensors of shapes {_text(call.shapes)}"
            raise RecomputeMismatch(
                f"checkpointed work called {op} of tensors of shapes {_text(shapes)} when it was run again, where forward made "
                f"{before}; it must do the same both times"
            )
        if output is None:
            return op(*args, **kwargs)
        if call.draws is not None:
            call.draws.repeat()
        return output()


class _Given(NamedTuple):
    call: Operation | None
    output: Callable[[], Any] | None


_NONE = _Given(None, None)


def shapes_of(args: tuple) -> tuple:
    return tuple([given.shape for given in args if isinstance(given, torch.Tensor)])


def _text(shapes: tuple) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes) or "none"
