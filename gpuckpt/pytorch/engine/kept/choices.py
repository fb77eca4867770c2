"""`once(fn, *args)`: what is decided in forward and must not be decided anew in a recompute.

Top-k among near ties, a sort, a sample, a clock or a counter may turn out otherwise when it runs again, and backward would then
be that of other experts than forward's. `fn` runs in forward only; a recompute is given what it returned.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from gpuckpt.checks import shown
from gpuckpt.errors import CheckpointError, RecomputeMismatch
from gpuckpt.pytorch._torch_internals import innermost_transform, untraced
from gpuckpt.pytorch.engine.fence.randomness import Draws
from gpuckpt.pytorch.engine.fence.scope import Scope
from gpuckpt.pytorch.engine.kept.current import open_records, paused, reader
from gpuckpt.pytorch.engine.kept.record import KeptTensor, Record

__all__ = ["once"]


@untraced
def once(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call `fn(*args, **kwargs)` in forward, and in a recompute return what it returned then.

    For what may turn out otherwise when it runs again (top-k with ties, sorting, sampling, a clock), is not worth running again
    (an all-to-all) or has effects outside (counting, logging). The tensors that it returns are held, by the budget if there is
    one, until the backward of the surrounding work is done; other values are kept as they are. Outside of checkpointed work it
    is a plain call.

    Args:
        fn: takes no part in autograd: it returns no tensor that requires a gradient. What the surrounding work needs of it is
            what it returns; what it writes into modules is not written again in a recompute. Random numbers that it draws count
            as drawn there.

    Raises:
        TypeError: `fn` is not callable, or returns a tensor that requires a gradient.
        BudgetExceeded: what it returns does not fit.
        RecomputeMismatch: the recompute calls `once` more often than forward did, or with another function.
        SavedTensorModified: in a recompute, where what it returned was changed in place.
        NotImplementedError: inside a transform of torch.func within checkpointed work.

    >>> import gpuckpt
    >>> def experts(scores):
    ...     chosen = once(lambda: scores.topk(2).indices)
    ...     return scores.gather(-1, chosen).softmax(-1)
    >>> scores = torch.tensor([[0.1, 0.7, 0.2]], requires_grad=True)
    >>> gpuckpt.checkpoint(experts, scores).sum().backward()
    """
    if not callable(fn):
        raise TypeError(
            f"once({shown(fn)}, ...): expected something to call, as in once(lambda: scores.topk(2).indices)"
        )
    replay, records = reader(), open_records()
    if replay is None and not records:
        value = fn(*args, **kwargs)
        _refuse_gradients(fn, value)
        return value
    if innermost_transform() is not None:
        raise NotImplementedError(
            f"once({_name(fn)}) inside a transform of torch.func in checkpointed work: what it returns lives in the transform "
            "only; call once() outside and hand the result in"
        )
    if replay is None:
        value, draws = _decide(fn, args, kwargs)
    else:
        choice: Choice = replay.next_choice()
        if choice.code is not _code(fn):
            raise RecomputeMismatch(
                f"checkpointed work called once({choice.name}) in forward and once({_name(fn)}) there when it was run again; "
                "it must do the same both times"
            )
        value, draws = choice.load(), choice.draws
        if draws is not None:
            draws.repeat()
    with paused():
        choices = [Choice(fn, value, draws, record) for record in records]  # all of them, or none
    for record, choice in zip(records, choices, strict=True):
        record.choices.append(choice)
    return value


class Choice:
    """What one call of `once` returned, as a record keeps it."""

    __slots__ = ("_spec", "_values", "code", "draws", "name")

    def __init__(self, fn: Any, value: Any, draws: Draws | None, record: Record) -> None:
        leaves, self._spec = pytree.tree_flatten(value)
        for leaf in leaves:
            if record.flow is not None and isinstance(leaf, torch.Tensor):
                record.flow.given(leaf)
        self._values = [record.keep(leaf, exact=True) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.code, self.name, self.draws = _code(fn), _name(fn), draws

    @property
    def tensors(self) -> list[KeptTensor]:
        return [value for value in self._values if isinstance(value, KeptTensor)]

    def load(self) -> Any:
        """What was returned, in containers of its own."""
        leaves = [value.load() if isinstance(value, KeptTensor) else value for value in self._values]
        return pytree.tree_unflatten(leaves, self._spec)


def _decide(fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Draws | None]:
    """What `fn` returns, and the random numbers that it drew. Nothing of it is saved by the work around."""
    leaves = pytree.tree_leaves((args, kwargs))
    draws, inner = Draws(leaves, Scope(fn, leaves).generators), _Within()
    with paused(), saved_tensors_hooks(inner.pack, _unpack):
        value = fn(*args, **kwargs)
    inner.close()
    _refuse_gradients(fn, value)
    return value, draws if draws.were_made() else None


class _Within:
    """What autograd saves inside of `fn` is of use there (for derivatives that it takes itself), and to no backward after."""

    def __init__(self) -> None:
        self._tokens: list[weakref.ref[_TokenOfOnce]] = []

    @untraced
    def pack(self, tensor: torch.Tensor) -> _TokenOfOnce:
        token = _TokenOfOnce(tensor.detach())
        self._tokens.append(weakref.ref(token))
        return token

    def close(self) -> None:
        for ref in self._tokens:
            token = ref()
            if token is not None:
                token.tensor = None


class _TokenOfOnce:
    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor


@untraced
def _unpack(token: _TokenOfOnce) -> torch.Tensor:
    if token.tensor is None:
        raise CheckpointError(
            "backward reached a tensor that was made inside once() and kept elsewhere (an attribute, a list): what runs once "
            "takes no part in autograd; detach() it there, or compute it outside of once()"
        )
    return token.tensor


def _refuse_gradients(fn: Any, value: Any) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            raise TypeError(
                f"once({_name(fn)}) returned a {leaf.dtype} tensor of shape {tuple(leaf.shape)} that requires a gradient, and "
                "takes no part in autograd: return what decides (indices, a mask) and compute the values outside, as in "
                "scores.gather(-1, indices); or detach() them"
            )


def _code(fn: Any) -> Any:
    """What tells functions apart that are made anew in each run, as lambdas are."""
    return getattr(fn, "__code__", None) or type(fn)


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__
