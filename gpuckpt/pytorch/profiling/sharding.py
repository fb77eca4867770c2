"""Running parts of a model that torch's FSDP2 shards, and leaving its bookkeeping as it was.

A part that runs by itself takes itself for the root of the model, its gathered parameters wait for a backward that does not come,
and a run that is stopped half-way leaves its module in the middle of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from gpuckpt.pytorch._torch_internals import param_groups, sharded_parameters, sharding_of

__all__ = ["around_gathering", "gathered_around", "sharding_unchanged"]

_OF_A_STATE = ("_is_root", "_state_ctx", "_comm_ctx", "_training_state")
_OF_A_GROUP = ("comm_ctx", "post_forward_mesh_info", "reduce_grads", "_training_state")
_OF_THE_MODEL = ("iter_forward_root", "post_backward_final_callback_queued")


@contextmanager
def sharding_unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the parameters of `model`, and of the model that it is a part of, are sharded or gathered as before, and what
    `fully_shard` notes of a step under way is as before. Where they have to be gathered again the ranks meet in a collective."""
    states = [state for module in model.modules() if (state := sharding_of(module)) is not None]
    states += [other for state in states for other in state._state_ctx.all_states]
    states = list(dict.fromkeys(states))
    put_back = [_noted(state) for state in states]
    try:
        yield
    finally:
        for put in put_back:
            put()


def _noted(state: Any) -> Callable[[], None]:
    groups = param_groups(state)
    values = [(state, name, getattr(state, name)) for name in _OF_A_STATE]
    values += [(group, name, getattr(group, name)) for group in groups for name in _OF_A_GROUP]
    values += [(state._state_ctx, name, getattr(state._state_ctx, name)) for name in _OF_THE_MODEL]
    lists = [group._post_forward_indices for group in groups] + [state._state_ctx.all_states]
    lists += [state._comm_ctx.post_forward_order] if hasattr(state._comm_ctx, "post_forward_order") else []
    contents = [(held, list(held)) for held in lists]
    gathered = [group.is_unsharded for group in groups]
    for group in groups:
        group.reduce_grads = False  # gradients that wait for more to be added are not measuring's to reduce
    idle = type(state._training_state).IDLE

    def put_back() -> None:
        for group, was_gathered in zip(groups, gathered, strict=True):
            group._training_state = idle
            group.wait_for_unshard()
            if was_gathered:
                group.unshard()
                group.wait_for_unshard()
            else:
                group.reshard()
        for held, content in contents:
            held[:] = content
        for owner, name, value in values:
            setattr(owner, name, value)

    return put_back


@contextmanager
def gathered_around(model: nn.Module, part: nn.Module, inputs: Sequence[torch.Tensor]) -> Iterator[Callable[[], None]]:
    """Within the context, `part` of `model` runs by itself with the parameters that modules around it gather for their calls, its
    own and those among its `inputs`. What is given has to be called before each run: a backward of the part ends with everything
    sharded."""
    inside, given = set(part.modules()), set(map(id, inputs))
    around = [
        module
        for module in model.modules()
        if module not in inside
        and any(
            id(found.gathered) in given or any(owner in inside for owner, _ in found.places)
            for found in sharded_parameters(module)
        )
    ]
    groups = [group for module in around for group in param_groups(sharding_of(module))]
    sharded = [group for group in groups if not group.is_unsharded]

    def gather() -> None:
        for group in sharded:
            group.unshard()
            group.wait_for_unshard()

    gather()
    try:
        yield gather
    finally:
        for group in sharded:
            group.reshard()


@contextmanager
def around_gathering(model: nn.Module, each: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within the context, whenever a part of `model` gathers its parameters or frees them, it does so inside of `each()`."""
    groups = [group for module in model.modules() if (state := sharding_of(module)) for group in param_groups(state)]
    names = ("unshard", "wait_for_unshard", "reshard")
    for group in groups:
        for name in names:
            setattr(group, name, _inside(each, getattr(group, name)))
    try:
        yield
    finally:
        for group in groups:
            for name in names:
                vars(group).pop(name, None)  # the method shows again


def _inside(each: Callable[[], AbstractContextManager[Any]], method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with each():
            return method(*args, **kwargs)

    return call
