"""What an optimizer's step takes, without stepping: its twin steps on tensors that have shapes and no memory.

That tells the state of an optimizer that has not stepped yet, of any class whose step is made of torch's operators.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpuckpt.pytorch.profiling.allocation_trace import LiveBytes

__all__ = ["OptimizerBytes", "dry_step", "optimizers_of"]

_LATER = 1000.0  # a step count, learning rate or product of them that a step reads, long after warm-ups


class OptimizerBytes(NamedTuple):
    """`state_bytes`: what it keeps from its first step on; `step_bytes`: what is there besides while it steps."""

    state_bytes: int
    step_bytes: int


def dry_step(optimizer: torch.optim.Optimizer, unit_bytes: int = 1) -> OptimizerBytes:
    """The bytes of `optimizer`, whose parameters all have gradients then. It stays as it is.

    `unit_bytes`: what an allocator rounds each tensor up to. Raises `ValueError` for an optimizer that cannot step so.

    >>> weight = torch.nn.Parameter(torch.ones(10, 10))
    >>> dry_step(torch.optim.AdamW([weight], foreach=True))
    OptimizerBytes(state_bytes=804, step_bytes=400)
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _twin_of(optimizer, mode)
    try:
        with mode, _Readable(), LiveBytes(unit_bytes) as live:
            twin.step()
            begin = live.mark()
            twin.step()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"what a step of {type(optimizer).__name__} takes cannot be told beforehand ({reason}); expected an optimizer whose "
            'step() takes no closure and is made of torch\'s operators. Use scope="saved" with it'
        ) from None
    states = [value for state in twin.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in states}
    state_bytes = sum(-(-nbytes // unit_bytes) * unit_bytes for nbytes in storages.values())
    return OptimizerBytes(state_bytes, live.peak_bytes(begin, live.mark(), set()))


def optimizers_of(value: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that `fit` was given: one, several, or a mapping of them. Raises `TypeError` for anything else."""
    try:
        found = list(value.values() if isinstance(value, Mapping) else value)
    except TypeError:  # one that is no container
        found = [value]
    if not found or not all(isinstance(each, torch.optim.Optimizer) for each in found):
        raise TypeError(
            f"optimizer is a {type(value).__name__}; expected a torch.optim.Optimizer, or a list of them where several step"
        )
    return list({id(each): each for each in found}.values())


class _Readable(TorchDispatchMode):
    """Numbers that are read from tensors without contents."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _LATER if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _twin_of(optimizer: torch.optim.Optimizer, mode: FakeTensorMode) -> Any:
    """The same class with the same settings and state, for parameters without memory, which have gradients."""

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)

    def trained(parameter: torch.Tensor) -> torch.Tensor:
        stand_in: torch.Tensor = fake(parameter)
        if parameter.requires_grad:
            stand_in.requires_grad_()
            with mode:
                stand_in.grad = torch.empty_like(stand_in, requires_grad=False)
        return stand_in

    twin: Any = object.__new__(type(optimizer))
    # A scheduler leaves a `step` of its own in the optimizer, which belongs to that one.
    twin.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    made = {id(p): trained(p) for group in optimizer.param_groups for p in group["params"]}
    twin.param_groups = [
        {**group, "params": [made[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    twin.state = defaultdict(dict)
    for parameter, state in optimizer.state.items():
        twin.state[made[id(parameter)]] = {name: fake(value) for name, value in state.items()}
    return twin
