"""Which operations' outputs checkpointed work keeps: `checkpoint(..., keep=...)`.

An operation is what runs below autograd (`torch.ops.aten.mm.default`). What cannot be brought back is refused: views and in-place
operations (of a view, keep what it looks into), those that return no tensor, and those that torch takes apart into others before
they would run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.checkpoint import CheckpointPolicy

from gpuckpt.checks import shown
from gpuckpt.pytorch._torch_internals import is_taken_apart

__all__ = ["MUST", "NEVER", "PREFER", "Keep", "OperationContext", "Policy", "can_be_kept", "policy_of"]

MUST, PREFER, NEVER = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE, CheckpointPolicy.PREFER_RECOMPUTE

Keep = Collection[OpOverload] | Callable[..., bool | CheckpointPolicy]
Policy = Callable[[OpOverload, Any, tuple, Mapping[str, Any]], CheckpointPolicy]
"""Of an operation that has just run, what it returned, and its arguments: MUST_SAVE, PREFER_SAVE or PREFER_RECOMPUTE."""


class OperationContext(NamedTuple):
    """What a policy that is a function is given first. `is_recompute`: never; it is asked in forward only."""

    op_output: Any
    is_recompute: bool = False


def policy_of(keep: Keep) -> Policy:
    """`keep` as a function. Raises `ValueError` for operations that cannot be kept, `TypeError` for what is no policy."""
    if callable(keep) and not isinstance(keep, OpOverload | OpOverloadPacket):
        return _Asked(keep)
    if isinstance(keep, str | Tensor) or not isinstance(keep, Collection) or getattr(keep, "ndim", 1) == 0:
        raise TypeError(
            f"keep={shown(keep)}: expected operations, such as [torch.ops.aten.mm.default], or a function of them"
        )
    for op in keep:
        if isinstance(op, OpOverloadPacket):
            names = ", ".join(f"torch.ops.{op}.{name}".replace("::", ".") for name in op.overloads()[:4])
            raise ValueError(f"keep names {op}, which is several operations: {names}, ...; name the one that is meant")
        if not isinstance(op, OpOverload):
            raise ValueError(f"keep names {shown(op)}; expected operations, such as torch.ops.aten.mm.default")
        if (why := can_be_kept(op)) is not None:
            raise ValueError(f"keep names {op}, {why}")
    chosen = frozenset(keep)
    return lambda op, output, args, kwargs: MUST if op in chosen else NEVER


class _Asked:
    """A policy that is a function."""

    def __init__(self, policy: Callable[..., bool | CheckpointPolicy]) -> None:
        self._policy = policy

    def __call__(self, op: OpOverload, output: Any, args: tuple, kwargs: Mapping[str, Any]) -> CheckpointPolicy:
        answer = self._policy(OperationContext(output), op, *args, **kwargs)
        if answer is True:
            answer = PREFER
        elif answer is False or answer is CheckpointPolicy.MUST_RECOMPUTE:
            answer = NEVER
        if answer not in (MUST, PREFER, NEVER):
            raise ValueError(
                f"the policy of keep= answers {answer!r} for {op}; expected a bool, or a CheckpointPolicy that saves or "
                "recomputes. What a budget holds goes to the host under over_cap='spill'"
            )
        why = can_be_kept(op)
        if answer is MUST and why is not None:
            raise ValueError(
                f"the policy of keep= answers MUST_SAVE for {op}, {why}. PREFER_SAVE keeps what can be kept"
            )
        return NEVER if why is not None else answer


@cache
def can_be_kept(op: OpOverload) -> str | None:
    """Why the outputs of `op` cannot be kept; None where they can."""
    schema = op._schema
    if schema.is_mutable:
        return "which changes its argument in place: a recompute has to run it"
    if any(returned.alias_info is not None for returned in schema.returns):
        return "which is a view and holds nothing of its own: keep what it looks into"
    if not any("Tensor" in str(returned.type) for returned in schema.returns):
        return "which returns no tensor"
    if is_taken_apart(op):
        return "which torch takes apart before it would run: name the operations that it is made of"
    return None
