"""The frame: what a checkpoint is made of, on `torch.autograd.graph.saved_tensors_hooks`.

1. `save` puts the tensors to start from through `save_for_backward` of a small Function outside the frame's own hooks, so
   that an enclosing budget or frame holds them like any other saved tensor.
2. Under `hooks()` autograd's saved tensors are numbered, and nothing is kept.
3. The first unpack replays the work under hooks that put tensor number i into the budget, and stops after the last one
   that somebody still waits for (early stop).
4. What was recomputed dies with the autograd node that asked for it.

torch.utils.checkpoint keeps what it recomputes in a dictionary of its own, where no budget sees it; here nested frames,
budgets and other hooks compose without a special case.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch.autograd.graph import saved_tensors_hooks

from gpuckpt.errors import RecomputeMismatch
from gpuckpt.memory import CheckpointBudget
from gpuckpt.pytorch.saved_tensors import Held, enter, holder_of, is_resident, modified

__all__ = ["Environment", "Frame", "Verify"]

Verify = Literal["metadata", "bitwise"]

_keep_graph = torch._C._autograd._get_current_graph_task_keep_graph


class _EarlyStop(BaseException):
    """All that was waited for has been recomputed. A BaseException, so that user code does not catch it by mistake."""


class _SaveInputs(torch.autograd.Function):
    """Saves tensors through autograd, so that whatever hooks are active hold them; its node is never run."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise AssertionError("the node that keeps a checkpoint's inputs is no part of the graph")


class Environment:
    """What a function sees besides its arguments: random number generators and autocast."""

    __slots__ = ("_autocast", "_cpu_rng", "_device_rng")

    def __init__(self, tensors: Sequence[torch.Tensor], preserve_rng_state: bool) -> None:
        devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
        if not devices and torch.cuda.is_initialized():
            devices = {torch.device("cuda", torch.cuda.current_device())}
        kinds = {"cpu", *(device.type for device in devices)}
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in kinds
        ]
        self._cpu_rng = torch.get_rng_state() if preserve_rng_state else None
        self._device_rng = (
            [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
            if preserve_rng_state
            else []
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same environment once more; the generators continue afterwards as if nothing had been drawn."""
        with ExitStack() as stack:
            if self._cpu_rng is not None:
                stack.callback(torch.set_rng_state, torch.get_rng_state())
                torch.set_rng_state(self._cpu_rng)
            for device, state in self._device_rng:
                module = torch.get_device_module(device)
                stack.callback(module.set_rng_state, module.get_rng_state(device), device)
                module.set_rng_state(state, device)
            for kind, dtype, enabled, cache in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


class _Slot:
    """Stands in the graph for saved tensor number `index` of a frame; filled by a recompute."""

    __slots__ = ("__weakref__", "frame", "held", "index", "seen")

    def __init__(self, frame: Frame, index: int, seen: tuple) -> None:
        self.frame = frame
        self.index = index
        self.seen = seen
        self.held: Held | None = None


class Frame:
    """One piece of work that is run now and replayed in backward.

    `replay(tensors)` does the work again from the tensors that were given to `save`, in that order. It must not refer to
    the frame. `budget` holds what is recomputed; None: nobody is charged.
    """

    def __init__(
        self, replay: Callable[[list[torch.Tensor]], Any], budget: CheckpointBudget | None, verify: Verify | None = None
    ) -> None:
        self._replay = replay
        self._budget = budget
        self._verify = verify
        self._inputs: list[Any] = []
        self._slots: list[weakref.ref[_Slot]] = []
        self._lock = threading.RLock()

    def save(self, tensors: Sequence[torch.Tensor]) -> None:
        """Keep `tensors` to start from, in whatever the active hooks save into. Raises `BudgetExceeded`."""
        if tensors:
            # The anchor makes autograd record a node; the node holds the inputs, and nothing in the graph points to it.
            anchor = torch.empty((), requires_grad=True)
            self._inputs.append(_SaveInputs.apply(anchor, *tensors).grad_fn)  # type: ignore[attr-defined]

    def hooks(self) -> saved_tensors_hooks:
        """The context to do the work in."""
        return saved_tensors_hooks(self._number, _unpack)

    def _number(self, tensor: torch.Tensor) -> _Slot:
        slot = _Slot(self, len(self._slots), _describe(tensor, self._verify))
        self._slots.append(weakref.ref(slot))
        return slot

    def recompute(self) -> None:
        """Replay, and fill the slots that somebody still waits for. After a failure no slot holds anything."""
        waiting = {index: slot for index, ref in enumerate(self._slots) if (slot := ref()) is not None}
        last = max(waiting)
        hold = holder_of(self._budget).hold
        count = 0

        def pack(tensor: torch.Tensor) -> _Slot:
            nonlocal count
            index = count
            count += 1
            # The graph of the replay is thrown away; it gets slots too, so that a failure empties it as well.
            slot = waiting.get(index)
            if slot is None:
                slot = _Slot(self, index, ())
                slot.held = Held(tensor.detach(), -1, None)
                return slot
            _check(slot, tensor, self._verify)
            slot.held = hold(tensor)
            if index == last:
                raise _EarlyStop
            return slot

        tensors = [tensor for saver in self._inputs for tensor in saver.saved_tensors]
        try:
            with torch.enable_grad(), enter(self._budget, pack, _unpack):
                self._replay(tensors)
            raise RecomputeMismatch(
                f"checkpointed work saved {len(self._slots)} tensors in forward and {count} when it was run again; it must do "
                "the same both times (global state, data-dependent branches and caches are the usual reasons)"
            )
        except _EarlyStop:
            return
        except BaseException:
            for slot in waiting.values():
                slot.held = None
            raise


def _unpack(slot: _Slot) -> torch.Tensor:
    with slot.frame._lock:
        if slot.held is None:
            slot.frame.recompute()
        held = slot.held
        assert held is not None
        if _keep_graph():
            # The node outlives this backward (retain_graph), and would keep the bytes with it.
            slot.held = None
    return held.load()


def _describe(tensor: torch.Tensor, verify: Verify | None) -> tuple:
    """What a replay has to reproduce: always the shape, and of a parameter the version."""
    version = tensor._version if is_resident(tensor) else None
    if verify is None:
        return (version, tensor.shape)
    stride = tensor.stride() if tensor.layout is torch.strided else None
    seen = (version, tensor.shape, tensor.dtype, tensor.device, stride)
    return (*seen, _checksum(tensor)) if verify == "bitwise" else seen


def _checksum(tensor: torch.Tensor) -> int:
    """64 bits that change with any byte of the tensor and, unlike an exclusive or, with their order."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    weights = torch.arange(1, 2 * words.numel() + 1, 2, device=words.device)  # odd, so that no bit is multiplied away
    return int((words * weights).sum())


def _check(slot: _Slot, tensor: torch.Tensor, verify: Verify | None) -> None:
    now = _describe(tensor, verify)
    if now[1:] != slot.seen[1:]:
        names = ("shape", "dtype", "device", "strides", "contents")
        changes = [
            f"{name} (contents differ)" if name == "contents" else f"{name} ({old} before, {new} now)"
            for name, old, new in zip(names, slot.seen[1:], now[1:], strict=False)
            if old != new
        ]
        raise RecomputeMismatch(
            f"saved tensor number {slot.index} of checkpointed work is not the same when the work is run again: "
            f"{', '.join(changes)}. It must do the same both times; with random numbers keep preserve_rng_state=True"
        )
    if now[0] is not None and slot.seen[0] is not None and now[0] != slot.seen[0]:
        raise modified(tensor)
