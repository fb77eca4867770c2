"""How calls of a module are intercepted, and what is done so that this cannot be lost without a word.

Calls are replaced through `nn.Module._compiled_call_impl`, torch's own per-module slot for the implementation of a call:
parameter names, `state_dict`, hooks, `isinstance` and the class stay as they are, and pickling and copying leave it out. What
was in the slot (`module.compile()`) is what an intercepted call runs in the end.

Others use that slot too, or go around it: `module.compile()` overwrites it, torch.compile of a surrounding module inlines what
lies behind it, DataParallel's replicas share it. `Bypass` notices the first two, `Interception` the third.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gpuckpt.errors import CheckpointError
from gpuckpt.pytorch._torch_internals import untraced

__all__ = ["Bypass", "Interception", "intercept", "run_module", "runs_compiled", "set_call"]


class Interception:
    """Stands in a module's slot; a call of the module is `call(module, *args, **kwargs)`."""

    __slots__ = ("before", "call", "module")

    def __init__(self, call: Callable[..., Any], module: nn.Module, before: Callable[..., Any] | None) -> None:
        self.call = call
        self.module = module
        self.before = before

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_locals.get("self")  # of nn.Module.__call__
        if isinstance(caller, nn.Module) and caller is not self.module:
            raise CheckpointError(
                f"a replica of {type(self.module).__name__} was called, which would run the original: a fitted model cannot be "
                "replicated by DataParallel. Use DistributedDataParallel with one process a device, or unfit() first"
            )
        return self.call(self.module, *args, **kwargs)

    @property
    def active(self) -> bool:
        """Whether calls still come here: `module.compile()` takes the slot."""
        return self.module._compiled_call_impl is self

    def restore(self) -> None:
        """Put back what was in the slot, unless something else has been put there since."""
        if self.active:
            self.module._compiled_call_impl = self.before


def set_call(module: nn.Module, call: Callable[..., Any]) -> Interception:
    """Replace what calling `module` does, until `restore()`."""
    before = module._compiled_call_impl
    if isinstance(before, Interception):
        raise ValueError(
            f"{type(module).__name__} is part of another model that is fitted already; call unfit() on that one first"
        )
    ours = module._compiled_call_impl = Interception(call, module, before)
    return ours


def run_module(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `module` as if it were not intercepted: hooks included, and compiled where it was compiled."""
    slot = module._compiled_call_impl
    if isinstance(slot, Interception):
        slot = slot.before
    return (module._call_impl if slot is None else slot)(*args, **kwargs)


def runs_compiled(module: nn.Module) -> bool:
    """Whether `module`, or one inside of it, was compiled: by its own `compile()`, or by torch.compile around it."""
    for part in module.modules():
        slot = part.__dict__.get("_compiled_call_impl")
        slot = slot.before if isinstance(slot, Interception) else slot
        if slot is not None or "_orig_mod" in part._modules:
            return True
    return False


@contextmanager
def intercept(modules: Iterable[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Within the context, calling one of `modules` calls `call(module, *args, **kwargs)` instead.

    `call` reaches the module's own implementation by `run_module`.
    """
    undo = [set_call(module, call) for module in modules]
    try:
        yield
    finally:
        for interception in reversed(undo):
            interception.restore()


class Bypass:
    """A forward pre-hook on an intercepted module that raises where its call was not intercepted."""

    def __init__(self, intercepted: Callable[[], bool] | None = None) -> None:
        self._intercepted = intercepted  # None: a copy, which belongs to no fitted model

    @untraced
    def __call__(self, module: nn.Module, args: tuple) -> None:
        if self._intercepted is not None and not self._intercepted():
            raise CheckpointError(
                f"{type(module).__name__} is fitted, and this call went around its plan: it was compiled by module.compile(), or "
                "inside a compiled module, after fit. Compile first and fit then, or compile the blocks inside: their calls are "
                "planned, compiled or not"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Bypass:
        return Bypass()

    def __reduce__(self) -> Any:
        return Bypass, ()
