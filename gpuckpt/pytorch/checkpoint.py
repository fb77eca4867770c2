"""`checkpoint(fn, *args)`: run a function now and again in backward.

Recomputing from kept inputs: Chen et al., "Training deep nets with sublinear memory cost" (2016). How it is done: frame.py.

What `fn` sees besides its arguments is as it was when it runs again, see engine/fence/: also the variables that it closes over
and what is inside of them. What cannot be as it was is refused. Inside of a transform of torch.func (vmap, jvp, jacfwd) it is a
plain call, and warns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import noop_context_fn

from gpuckpt.checks import check_flag, shown
from gpuckpt.errors import StateModified
from gpuckpt.memory import Budget
from gpuckpt.pytorch._torch_internals import innermost_transform, untraced
from gpuckpt.pytorch.engine.arguments import Objects
from gpuckpt.pytorch.engine.fence.fence import Fates, Fence
from gpuckpt.pytorch.engine.fence.scope import reaches_anything
from gpuckpt.pytorch.engine.frame import Frame
from gpuckpt.pytorch.engine.hooks import current_budget, enter, plain_call
from gpuckpt.pytorch.engine.kept.current import by_hand, open_records, paused, reader, reading, recording
from gpuckpt.pytorch.engine.kept.operations import keeping, returning
from gpuckpt.pytorch.engine.kept.policy import Keep, policy_of
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.engine.storage_index import index_of
from gpuckpt.pytorch.engine.verify import Verify, check_verify

__all__ = ["checkpoint"]


@untraced
def checkpoint(
    fn: Callable[..., Any],
    /,
    *args: Any,
    budget: Budget | None = None,
    preserve_rng_state: bool = True,
    verify: Verify | None = None,
    keep: Keep | None = None,
    use_reentrant: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Call `fn(*args, **kwargs)`, keeping only its tensor arguments; what backward needs is recomputed there.

    Args:
        fn: any function of tensors, nested containers of tensors and other values, with any outputs. It must do the same
            work when it is called again. Tensors that it closes over and reads are held like arguments, from the second call on.
        budget: holds the arguments, and during backward what is recomputed. Default: the budget whose `with` block this
            call runs in, if any.
        preserve_rng_state: run again with the same random numbers (CPU and the devices of the arguments).
        verify: compare what is recomputed with the first forward: always the number, shapes, dtypes and devices of the
            saved tensors; "metadata" adds strides; "bitwise" adds their contents, by checksum.
        keep: operations whose outputs are held from forward on and not computed again, such as `[torch.ops.aten.mm.default]`, by
            the name that they run under below autograd; or a function `(ctx, op, *args, **kwargs)` of each that runs, which
            returns a bool or a `torch.utils.checkpoint.CheckpointPolicy`. True and PREFER_SAVE keep what can be kept.
        use_reentrant: taken, so that this can stand where `torch.utils.checkpoint.checkpoint` stood, and without meaning.

    Raises:
        BudgetExceeded: the arguments, or in backward what is recomputed, do not fit.
        RecomputeMismatch: the second run of `fn` differs from the first.
        SavedTensorModified: an argument or a parameter was changed in place in between.
        StateModified: what `fn` reads without being given it was changed in place in between.
        TypeError: an iterator among the arguments or in a variable of `fn`, which it would use up; no arguments, and nothing that
            `fn` reaches by itself; a `budget` that is none; a `keep` that is no policy; options of torch.utils.checkpoint that
            ask for something else than what is done here.
        NotImplementedError: `fn` uses a `torch.jit.ScriptModule`, or runs inside of `parametrize.cached()`.
        ValueError: `keep` names what cannot be kept, such as views and in-place operations.

    >>> x = torch.linspace(0, 1, 3, requires_grad=True)
    >>> y = checkpoint(lambda x: x.sin().exp(), x)
    >>> y.sum().backward()
    >>> torch.equal(x.grad, x.cos() * x.sin().exp())
    True
    """
    check_verify(verify)
    if preserve_rng_state is not True:
        check_flag(preserve_rng_state, "preserve_rng_state")
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(
            f"budget={shown(budget)}: expected a CheckpointBudget, such as CheckpointBudget('2GiB'), or None"
        )
    if not callable(fn):
        raise TypeError(
            f"checkpoint({shown(fn)}, ...): expected something to call first, and then what to call it with"
        )
    if kwargs and not _OF_TORCH.keys().isdisjoint(kwargs):
        kwargs, policies = _without_torchs_options(fn, args, kwargs)
        if policies is not None:
            if keep is not None:
                raise TypeError("checkpoint(keep=..., context_fn=...): both say what to keep; expected one of them")
            keep = policies
    if not args and not kwargs and not reaches_anything(fn):
        raise TypeError("checkpoint(fn, *args): expected at least one input to recompute from, got none")
    policy = None if keep is None else policy_of(keep)
    if not torch.is_grad_enabled():
        with by_hand():
            return fn(*args, **kwargs)
    if innermost_transform() is not None:
        with plain_call("gpuckpt.checkpoint", budget):
            return fn(*args, **kwargs)

    # Of a checkpoint within others.
    around, again = open_records(), reader()
    fates = None if again is None else again.next_fates()
    with paused():
        frame, record, fence = _framed(fn, args, kwargs, budget, preserve_rng_state, verify, policy is not None, fates)
    for outer in around:
        outer.fates.append(fence.fates)
    kept = _NOTHING if policy is None else keeping(record, policy, frame.slots)
    with frame.hooks(), recording(record), by_hand(), kept, fence.watching():
        out = fn(*args, **kwargs)
    with paused():
        fence.learn()
    return out


def _framed(
    fn: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    budget: Budget | None,
    preserve_rng_state: bool,
    verify: Verify | None,
    keeps: bool,
    fates: Fates | None,
) -> tuple[Frame, Record, Fence]:
    """The frame to call `fn` in, which has kept what it takes to call it again; its record, and what `fn` will see. `keeps`: the
    record will have operations; `fates`: of what `fn` reaches, where it is run again within a recompute."""
    # Nearly every call has tensors alone, for which taking them apart would be a tenth of its cost.
    bare = not kwargs and all(type(arg) is torch.Tensor for arg in args)
    leaves, spec = (list(args), None) if bare else pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    others = [_HERE if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    fence = Fence(fn, leaves, preserve_rng_state, fates)
    objects = Objects(others)
    if objects:
        others = objects.taken_out(others)
    count = len(tensors)
    tensors += [*objects.release(), *fence.kept]
    inside = count + objects.count
    # One tensor given twice is one again when `fn` runs again: attention asks whether `query is key`.
    unique = {id(tensor): tensor for tensor in tensors}
    order = None
    if len(unique) < len(tensors):
        places = {key: place for place, key in enumerate(unique)}
        order = [places[id(tensor)] for tensor in tensors]
        tensors = list(unique.values())
    record = Record()

    def replay(kept: list[torch.Tensor]) -> None:
        if fence.rewritten is not None:
            raise StateModified(
                f"parameter {fence.rewritten!r} is changed in place by the checkpointed work itself (max_norm of nn.Embedding "
                "does that), so that it cannot run again; leave that part outside of what is checkpointed"
            )
        run = reading(record)
        given_back = returning(run) if keeps else _NOTHING
        if order is not None:
            kept = [kept[place] for place in order]
        given = iter(kept)
        flat = [next(given) if leaf is _HERE else leaf for leaf in others]
        if objects:
            flat = objects.rebuilt(flat, kept[count:inside])
        args, kwargs = (flat, {}) if spec is None else pytree.tree_unflatten(flat, spec)
        with fence.restored(kept[inside:]), run, given_back:
            fn(*args, **kwargs)

    frame = Frame(replay, current_budget() if budget is None else budget, verify)
    with _NOTHING if budget is None else enter(budget, index_of(budget).hold):
        record.begin()
        frame.save(tensors)
    return frame, record, fence


_OF_TORCH = {
    "early_stop": (True, False),
    "determinism_check": ("default",),
    "debug": (False,),
    "context_fn": (noop_context_fn,),
}
"""Options of torch.utils.checkpoint, with the values that ask for nothing else than what is done here."""


def _without_torchs_options(
    fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Keep | None]:
    """`kwargs` without options of torch.utils.checkpoint, where `fn` does not take them itself; and what its `context_fn` keeps.
    Raises `TypeError` for one that asks for something else."""
    try:
        parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn)
        parameters.bind(*args, **kwargs)
    except TypeError:
        pass
    except ValueError:  # written in C, without a signature
        return kwargs, None
    else:
        return kwargs, None
    keep = None
    for name in _OF_TORCH.keys() & kwargs.keys():
        value = kwargs[name]
        if any(value is meant or value == meant for meant in _OF_TORCH[name]):
            continue
        if name == "context_fn" and (keep := _kept_by(value)) is not None:
            continue
        raise TypeError(
            f"{name}={shown(value)} is an option of torch.utils.checkpoint that gpuckpt.checkpoint does not have; see "
            "the page on coming from torch.utils.checkpoint"
        )
    own = parameters.parameters
    return {name: value for name, value in kwargs.items() if name not in _OF_TORCH or name in own}, keep


def _kept_by(context_fn: Any) -> Keep | None:
    """The policy of torch's `create_selective_checkpoint_contexts`; None for contexts of other makes."""
    contexts = context_fn() if callable(context_fn) else None
    return getattr(contexts[0], "policy_fn", None) if isinstance(contexts, tuple) else None


_NOTHING = nullcontext()
_HERE = object()  # where a tensor stood among the arguments
