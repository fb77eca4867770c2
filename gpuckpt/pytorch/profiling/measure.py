"""`measure(model, example_inputs)`: a model's chain, with the bytes that autograd saves in each stage and each stage's seconds.

The model runs forward once, and every stage is cut loose from the graph as it comes: run with autograd under hooks that
note which storages are saved, timed a few times forward, as far forward as a recompute runs (early stop), and backward, and
dropped before the next one. So measuring needs the memory of one stage, not of a plain step. What lies before the first stage,
after the last, or between two becomes a stage that can only be kept. A call that changes in place what the one before returned
(ReLU(inplace=True)) is one stage with it: run again from the input of the first, both do the same.

Of products (see engine/kept/options.py) it is noted what keeping their outputs would hold, and the rest of the stage is timed
without them: up to three options of each kind of stage.

Bytes held are exact: those of the storages autograd saves, parameters and buffers left out. Workspace is what operators were
seen to bring to life (see live.py), gradients of parameters left out. Seconds are medians after a warm-up, shared by stages
of one kind (same code, same shapes); the prefix is timed once, and its backward taken as twice its forward. The model, its
gradients and buffers and the random number generators are afterwards as before.

With `fake` a model is measured that need not exist: under FakeTensorMode tensors have shapes and no memory.
Parameters and buffers are stood in for by fakes on the CPU device while the model runs (also those of a model on the meta
device), and what autograd saves is what it saves on the CPU. Saved bytes are exact there; on CUDA a few operators save a
little otherwise (attention its random state, for one). Seconds come from the roofline of a named device.

A model that asks whether it is being traced gets a yes: Hugging Face's do so where they make masks, and then make them all.
Give such a model its four-dimensional attention mask, and it saves the same under fakes as in earnest.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from gpuckpt.checks import check_flag, check_int, shown
from gpuckpt.kernels.audit.roofline import Device
from gpuckpt.kernels.audit.roofline import device as device_called
from gpuckpt.planning import Chain
from gpuckpt.pytorch.engine.fence.fence import Fence
from gpuckpt.pytorch.engine.fence.randomness import capturing
from gpuckpt.pytorch.profiling.clock import Clock, Roofline, WallClock
from gpuckpt.pytorch.profiling.isolation import ModelState, cut, random_states, set_random_states, unchanged
from gpuckpt.pytorch.profiling.runner import Measured, run_chain
from gpuckpt.pytorch.profiling.save_recorder import residents_of

__all__ = ["MOST_REPEATS", "call_of", "check_model", "measure", "run_fake", "run_measured"]

MOST_REPEATS = 10_000


_MOST_UNIT_BYTES = 1 << 30


def measure(
    model: nn.Module,
    *inputs: Any,
    unit_bytes: int = 1,
    repeats: int = 3,
    fake: bool = False,
    device: str = "H100 SXM",
    **kwargs: Any,
) -> Chain:
    """Measure the chain of `model` for these inputs.

    Args:
        model: an `nn.Sequential`, or any module that runs the blocks of `nn.ModuleList`s or `nn.Sequential`s one after another.
        inputs, kwargs: as in `fit` one example: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
            Or the arguments themselves, one by one. If the model returns its loss, the loss is part of the chain.
        unit_bytes: the granule of the pool that the plan is for (512 on CUDA).
        repeats: timed runs of the first stage of each kind; the others of its kind add one each, up to three times as many.
        fake: measure without memory or device; model and inputs may be on the meta device. See above.
        device: with `fake`, the device whose roofline gives the seconds.

    Raises:
        InvalidChain: there is no chain of stages in the model, or a stage does something else when it runs again.
        TypeError, ValueError: a device that is not known, and other arguments that make no sense.

    >>> import torch
    >>> chain = measure(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), torch.ones(2, 4), fake=True)
    >>> [chain.charge(stage.saves) for stage in chain.stages]
    [0, 32, 64, 64, 0]
    """
    check_model(model)
    check_int(unit_bytes, "unit_bytes", 1, _MOST_UNIT_BYTES)
    check_int(repeats, "repeats", 1, MOST_REPEATS)
    check_flag(fake, "fake")
    if len(inputs) == 1 and not kwargs:
        inputs, kwargs = call_of(model, inputs[0])
    if fake:
        return run_fake(model, inputs, kwargs, unit_bytes, device_called(device)).chain
    return run_measured(model, inputs, kwargs, unit_bytes, WallClock(), repeats).chain


def check_model(model: object) -> None:
    """Raise `TypeError` for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {shown(model)} ({type(model).__name__}); expected an nn.Module")


def call_of(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How to call `model` with an example: spread over its parameters where they take it so, else as the one argument."""
    if isinstance(example, Mapping):
        spread: tuple[tuple[Any, ...], dict[str, Any]] = ((), {str(name): value for name, value in example.items()})
    elif type(example) in (tuple, list):
        spread = (tuple(example), {})
    else:
        return (example,), {}
    try:
        parameters = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return spread
    for args, kwargs in (spread, ((example,), {})):
        try:
            parameters.bind(*args, **kwargs)
        except TypeError:
            continue
        return args, kwargs
    return spread  # the model itself says what is missing


def run_measured(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    unit_bytes: int,
    clock: Clock,
    repeats: int,
    copies: bool = False,
    stages: Sequence[str] = (),
) -> Measured:
    """`measure`, and what `fit` needs to know besides."""
    if capturing():
        raise RuntimeError("nothing can be measured while a CUDA graph is being captured: run one such step before")
    fence = Fence(model, pytree.tree_leaves((args, kwargs)), preserve_rng_state=True)
    counting = clock if isinstance(clock, Roofline) else nullcontext()
    # What earlier forwards left has a graph, which is not to be used up.
    with unchanged(model), fence.restored(fence.kept, cut), counting:
        state, random, residents = ModelState(model), random_states(), residents_of(model, args, kwargs)
        try:
            measured = run_chain(model, args, kwargs, unit_bytes, clock, repeats, copies, stages, residents)
        except RuntimeError as error:
            if "torch.func." not in str(error) or "saved tensor hooks" not in str(error):
                raise
            raise NotImplementedError(
                f"{type(model).__name__} calls torch.func.grad, vjp, jacrev or hessian in its forward; they take no hooks on "
                "saved tensors, and so no budget. Use torch.autograd.grad(..., create_graph=True) there"
            ) from error
        if state.outlived():  # a first forward is not like the others, which find what it has made
            set_random_states(random)
            measured = run_chain(model, args, kwargs, unit_bytes, clock, repeats, copies, stages, residents)
        return measured


def run_fake(model: nn.Module, args: tuple, kwargs: dict[str, Any], unit_bytes: int, device: Device) -> Measured:
    """`gpuckpt.measure(fake=True)`. The model and its inputs are only looked at."""
    made = next((tensor for tensor in [*model.parameters(), *model.buffers()] if isinstance(tensor, FakeTensor)), None)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if made is None else made.fake_mode
    clock = Roofline(device)
    with _faked(model, mode) as fake, mode, clock:
        args, kwargs = pytree.tree_map_only(torch.Tensor, fake, (args, kwargs))
        return run_chain(model, args, kwargs, unit_bytes, clock, repeats=1)


@contextmanager
def _faked(model: nn.Module, mode: FakeTensorMode) -> Iterator[Any]:
    """Within the context the model's parameters and buffers are fakes; gives the function that makes fakes."""
    made: dict[int, torch.Tensor] = {}  # tied tensors stay tied

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        known = made.get(id(tensor))
        if known is None:
            with mode:
                known = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    known = nn.Parameter(known, tensor.requires_grad)
                else:
                    known.requires_grad_(tensor.requires_grad)
            made[id(tensor)] = known
        return known

    places: list[dict[str, Any]] = [
        held for module in model.modules() for held in (module._parameters, module._buffers)
    ]
    before = [dict(held) for held in places]
    try:
        for held in places:
            held.update({name: None if tensor is None else fake(tensor) for name, tensor in held.items()})
        yield fake
    finally:
        for held, tensors in zip(places, before, strict=True):
            held.clear()
            held.update(tensors)
