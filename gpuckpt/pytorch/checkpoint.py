"""Run a function now and again in backward: `checkpoint(fn, *args)`.

One small frame on `torch.autograd.graph.saved_tensors_hooks`:

1. the tensors among the arguments go through `save_for_backward` of a small Function outside the frame's own hooks, so
   that an enclosing budget or frame holds them like any other saved tensor;
2. `fn` runs under hooks that number what autograd saves and keep nothing;
3. the first unpack runs `fn` again, under hooks that put tensor number i into the budget, and stops after the last one
   that somebody still waits for (early stop);
4. what was recomputed dies with the autograd node that asked for it.

torch.utils.checkpoint keeps what it recomputes in its own dictionary, where no budget sees it; here nested frames, budgets
and other hooks compose without a special case. The idea of replaying a function from its input: Chen et al., "Training
deep nets with sublinear memory cost" (2016).

Not tracked: tensors that `fn` reaches through closures or inside opaque objects (they are used as they are at the time of
the recompute), and in-place changes of such tensors.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from gpuckpt.errors import RecomputeMismatch
from gpuckpt.memory import CheckpointBudget
from gpuckpt.pytorch.saved_tensors import Held, current_budget, enter, holder_of, is_resident, modified

__all__ = ["Verify", "checkpoint", "run_frame"]

Verify = Literal["metadata", "bitwise"]

_keep_graph = torch._C._autograd._get_current_graph_task_keep_graph


class _EarlyStop(BaseException):
    """Everything that was waited for has been recomputed. A BaseException, so that `fn` does not catch it by mistake."""


class _SaveInputs(torch.autograd.Function):
    """Saves tensors through autograd, so that whatever hooks are active hold them; its node is never run."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise AssertionError("the node that keeps a checkpoint's inputs is no part of the graph")


class _Environment:
    """What `fn` sees besides its arguments: random number generators and autocast."""

    __slots__ = ("autocast", "cpu_rng", "device_rng", "device_type")

    def __init__(self, tensors: list[torch.Tensor], preserve_rng_state: bool) -> None:
        devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
        self.device_type = next(iter(devices)).type if devices else "cuda" if torch.cuda.is_initialized() else None
        types = ("cpu",) if self.device_type is None else ("cpu", self.device_type)
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in types
        ]
        self.cpu_rng: torch.Tensor | None = None
        self.device_rng: list[tuple[torch.device, torch.Tensor]] = []
        if preserve_rng_state:
            self.cpu_rng = torch.get_rng_state()
            module = None if self.device_type is None else torch.get_device_module(self.device_type)
            if module is not None:
                if not devices:
                    devices = {torch.device(self.device_type, module.current_device())}
                self.device_rng = [(device, module.get_rng_state(device)) for device in devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same environment once more; the generators continue afterwards as if nothing had been drawn."""
        with ExitStack() as stack:
            if self.cpu_rng is not None:
                stack.callback(torch.set_rng_state, torch.get_rng_state())
                torch.set_rng_state(self.cpu_rng)
                for device, state in self.device_rng:
                    module = torch.get_device_module(device)
                    stack.callback(module.set_rng_state, module.get_rng_state(device), device)
                    module.set_rng_state(state, device)
            for kind, dtype, enabled, cache in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


class _Slot:
    """Stands in the graph for tensor number `index` that `fn` saved; filled by a recompute."""

    __slots__ = ("__weakref__", "frame", "held", "index", "seen")

    def __init__(self, frame: _Frame, index: int, seen: tuple) -> None:
        self.frame = frame
        self.index = index
        self.seen = seen
        self.held: Held | None = None


class _Frame:
    """One call of a checkpointed function."""

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        budget: CheckpointBudget | None,
        preserve_rng_state: bool,
        verify: Verify | None,
        recompute_context: Callable[[], AbstractContextManager[Any]] | None,
    ) -> None:
        self.fn = fn
        self.budget = budget
        self.verify = verify
        self.recompute_context = recompute_context
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self.environment = _Environment(tensors, preserve_rng_state)
        # The anchor makes autograd record a node; the node holds the inputs and nothing in the graph points to it.
        self.inputs: Any = _SaveInputs.apply(torch.empty((), requires_grad=True), *tensors).grad_fn  # type: ignore[attr-defined]
        self.slots: list[weakref.ref[_Slot]] = []
        self.lock = threading.RLock()

    def pack(self, tensor: torch.Tensor) -> _Slot:
        slot = _Slot(self, len(self.slots), _describe(tensor, self.verify))
        self.slots.append(weakref.ref(slot))
        return slot

    def recompute(self) -> None:
        """Run `fn` again and fill the slots that somebody still waits for. After a failure no slot holds anything."""
        waiting = {index: slot for index, ref in enumerate(self.slots) if (slot := ref()) is not None}
        last = max(waiting)
        holder = holder_of(self.budget)
        count = 0

        def pack(tensor: torch.Tensor) -> _Slot:
            nonlocal count
            index = count
            count += 1
            # The graph of this second run is thrown away; it gets slots, so that a failure empties it as well.
            slot = waiting.get(index)
            if slot is None:
                slot = _Slot(self, index, ())
                slot.held = Held(tensor.detach(), -1, None)
                return slot
            _check(slot, tensor, self.verify, index)
            slot.held = holder.hold(tensor)
            if index == last:
                raise _EarlyStop
            return slot

        leaves = iter(self.inputs.saved_tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(leaves) if is_tensor else leaf for leaf, is_tensor in zip(self.leaves, self.is_tensor, strict=True)],
            self.spec,
        )
        try:
            with self.environment.again(), torch.enable_grad(), ExitStack() as stack:
                if self.recompute_context is not None:
                    stack.enter_context(self.recompute_context())
                stack.callback(enter(self.budget, pack, _unpack).exit)
                self.fn(*args, **kwargs)
            raise RecomputeMismatch(
                f"a checkpointed function saved {len(self.slots)} tensors in forward and {count} when run again; it must do "
                "the same work both times (global state, data-dependent branches or caches are the usual reasons)"
            )
        except _EarlyStop:
            pass
        except BaseException:
            for slot in waiting.values():
                slot.held = None
            raise


def _unpack(slot: _Slot) -> torch.Tensor:
    with slot.frame.lock:
        if slot.held is None:
            slot.frame.recompute()
        held = slot.held
        assert held is not None
        if _keep_graph():
            # The node outlives this backward (retain_graph), and would hold the bytes with it.
            slot.held = None
    return held.load()


def _describe(tensor: torch.Tensor, verify: Verify | None) -> tuple:
    """What a recompute has to reproduce: shape always; parameters must still be the same version."""
    version = tensor._version if is_resident(tensor) else None
    if verify is None:
        return (version, tensor.shape)
    stride = tensor.stride() if tensor.layout is torch.strided else None
    seen = (version, tensor.shape, tensor.dtype, tensor.device, stride)
    return (*seen, _checksum(tensor)) if verify == "bitwise" else seen


def _checksum(tensor: torch.Tensor) -> int:
    return int(torch.hash_tensor(tensor.detach())) if tensor.numel() else 0


def _check(slot: _Slot, tensor: torch.Tensor, verify: Verify | None, index: int) -> None:
    now = _describe(tensor, verify)
    if now == slot.seen:
        return
    if now[1:] == slot.seen[1:] and now[0] is not None and slot.seen[0] is not None:
        raise modified(tensor)
    if now[1:] != slot.seen[1:]:
        names = ("shape", "dtype", "device", "strides", "contents")
        differs = [name for name, old, new in zip(names, slot.seen[1:], now[1:], strict=False) if old != new]
        raise RecomputeMismatch(
            f"saved tensor number {index} of a checkpointed function differs in {', '.join(differs)} when the function is run "
            f"again: first {tuple(slot.seen[1])}, now {tuple(now[1])} (shapes). The function must do the same work both "
            "times; with random numbers keep preserve_rng_state=True"
        )


def checkpoint(
    fn: Callable[..., Any],
    *args: Any,
    budget: CheckpointBudget | None = None,
    preserve_rng_state: bool = True,
    verify: Verify | None = None,
    **kwargs: Any,
) -> Any:
    """Call `fn(*args, **kwargs)`, keeping only its tensor arguments; what backward needs is recomputed there.

    Args:
        fn: any function of tensors, nested containers of tensors and other values, with any outputs. It must do the same
            work when it is called again.
        budget: holds the arguments, and during backward what is recomputed. Default: the budget whose `with` block this
            call runs in, if any.
        preserve_rng_state: run again with the same random numbers (CPU and the devices of the arguments).
        verify: compare what is recomputed with the first forward: always the number and shapes of the saved tensors;
            "metadata" adds dtype, device and strides; "bitwise" adds their contents, by checksum.

    Raises:
        BudgetExceeded: the arguments, or in backward what is recomputed, do not fit.
        RecomputeMismatch: the second run of `fn` differs from the first.
        SavedTensorModified: an argument or a parameter was changed in place in between.
        TypeError: no tensor arguments at all.
    """
    if verify not in (None, "metadata", "bitwise"):
        raise ValueError(f"verify={verify!r}: expected None, 'metadata' or 'bitwise'")
    if not args and not kwargs:
        raise TypeError("checkpoint(fn, *args): expected at least one input to recompute from, got none")
    return run_frame(fn, args, kwargs, budget, preserve_rng_state, verify)


def run_frame(
    fn: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    budget: CheckpointBudget | None = None,
    preserve_rng_state: bool = True,
    verify: Verify | None = None,
    recompute_context: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Any:
    """`checkpoint` for callers that also need `recompute_context()` entered around the recompute alone."""
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    with ExitStack() as stack:
        if budget is None:
            budget = current_budget()
        else:
            stack.callback(enter(budget).exit)
        frame = _Frame(fn, args, kwargs, budget, preserve_rng_state, verify, recompute_context)
    with saved_tensors_hooks(frame.pack, _unpack):
        return fn(*args, **kwargs)
