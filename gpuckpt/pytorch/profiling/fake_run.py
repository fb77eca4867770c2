"""Measuring a model that need not exist: under FakeTensorMode tensors have shapes and no memory.

Parameters and buffers are stood in for by fakes on the CPU device while the model runs (also those of a model on the meta
device), and what autograd saves is what it saves on the CPU. Saved bytes are exact there; on CUDA a few operators save a
little otherwise (attention its random state, for one). Seconds come from the roofline of a named device.

A model that asks whether it is being traced gets a yes: Hugging Face's do so where they make masks, and then make them all.
Give such a model its four-dimensional attention mask, and it saves the same under fakes as in earnest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from gpuckpt.kernels.audit.roofline import Device
from gpuckpt.pytorch.profiling.roofline_clock import Roofline
from gpuckpt.pytorch.profiling.runner import Measured, run_chain

__all__ = ["run_fake"]


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
