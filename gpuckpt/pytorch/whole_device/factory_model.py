"""`FactoryModel`: a model that a function makes, for any batch, as `plan_device` sees it: on the meta device, measured whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gpuckpt.checks import shown
from gpuckpt.errors import CheckpointError
from gpuckpt.kernels.audit.roofline import device as device_called
from gpuckpt.planning import Chain
from gpuckpt.planning.device.layout import ParallelLayout
from gpuckpt.planning.device.parameters import ParameterShape, rounded_bytes
from gpuckpt.pytorch.profiling.measure import call_of, run_fake

__all__ = ["Factory", "FactoryModel", "factory_called"]

Factory = Callable[[int, int | None], tuple[nn.Module, Any]]
"""Of a batch and a context (None where none was given): a model, and an example to call it with, as `measure` takes it."""

_CUDA_UNIT_BYTES = 512


def factory_called(name: str) -> Factory:
    """The function that "package.module:factory" names. Raises `ValueError` where there is none."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"model {shown(name)}: expected package.module:factory")
    try:
        found = getattr(import_module(module), function, None)
    except Exception as error:  # whatever the module does when it is imported
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"model {shown(name)}: {module} cannot be imported ({reason})") from None
    if not callable(found):
        raise ValueError(f"model {shown(name)}: {module} has no function {function}; expected package.module:factory")
    made: Factory = found
    return made


class FactoryModel:
    """What `factory` makes, with weights and inputs in `dtype`, on one device or under FSDP.

    Raises `ValueError` for a factory that fails or returns something else, and for tensor and pipeline parallelism, which have to
    know how a model is built.
    """

    given: frozenset[int] = frozenset()  # of the latest chain, ids of inputs that its first stage saves
    context_limit: tuple[int | None, bool] = (None, False)

    def __init__(
        self,
        factory: Factory,
        dtype: str,
        torch_dtype: torch.dtype,
        layout: ParallelLayout,
        batch: int,
        context: int | None,
    ) -> None:
        if layout.tp > 1 or layout.pp > 1:
            raise ValueError(
                f"tp={layout.tp}, pp={layout.pp}: a model that a function makes is planned on one device or under FSDP; allowed "
                "are tp=1, pp=1 (or a Hugging Face config.json)"
            )
        self._factory, self.dtype_name, self._dtype, self.layout = factory, dtype, torch_dtype, layout
        self._users: dict[str, frozenset[int]] = {}
        self._model, self._example = self._made(batch, context)
        self._sizes = batch, context
        self.reads_tokens = context is not None

    @property
    def name(self) -> str:
        return type(self._model).__name__

    @property
    def parameter_count(self) -> int:
        """Each shared parameter is counted once."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def pipeline_blocks(self) -> tuple[str, int]:
        raise ValueError("pp: a model that a function makes is not cut")

    @cached_property
    def parameters(self) -> tuple[ParameterShape, ...]:
        """Each parameter, with where it is used outside of the stages, as the chain showed."""
        found, number = [], 0
        for name, parameter in self._model.named_parameters():
            users = {stage for stage, numbers in self._users.items() if parameter.requires_grad and number in numbers}
            number += parameter.requires_grad
            before, after = "prefix" in users, bool(users - {"prefix"})
            shape, nbytes = tuple(parameter.shape), parameter.element_size()
            found.append(
                ParameterShape(name, shape, nbytes, before and not after, parameter.requires_grad, before and after)
            )
        return tuple(found)

    def chain(self, batch: int, context: int | None, device: str = "H100 SXM") -> Chain:
        """The chain of one step, seconds by the roofline of `device`. Raises `ValueError` for a step that fails."""
        model, example = self._at(batch, context)
        args, kwargs = call_of(model, example)
        try:
            measured = run_fake(model, args, kwargs, _CUDA_UNIT_BYTES, device_called(device))
        except (CheckpointError, ValueError):
            raise
        except Exception as error:  # a forward that fails, for whatever reason it has
            raise ValueError(f"{self.name} cannot run its example: {_first_line(error)}") from None
        self._users = dict(measured.trained)
        self.given = measured.given.intersection(measured.chain.stages[0].saves)
        return measured.chain

    def with_fused_loss(self) -> FactoryModel:
        raise ValueError(f"{self.name} has no output layer and loss that could be fused into one operation")

    def buffers_bytes(self, batch: int, context: int | None) -> int:
        """Bytes of the model's buffers and of one step's inputs, as an allocator rounds them."""
        model, example = self._at(batch, context)
        inputs = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor)]
        return rounded_bytes(tensor.numel() * tensor.element_size() for tensor in [*model.buffers(), *inputs])

    def _at(self, batch: int, context: int | None) -> tuple[nn.Module, Any]:
        return (self._model, self._example) if (batch, context) == self._sizes else self._made(batch, context)

    def _made(self, batch: int, context: int | None) -> tuple[nn.Module, Any]:
        try:
            with torch.device("meta"):
                made = self._factory(batch, context)
        except Exception as error:
            raise ValueError(
                f"source, the model's factory, fails for batch={batch}, context={context}: {_first_line(error)}"
            ) from None
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
            raise ValueError(f"the model's factory returned {shown(made)}; expected (model, example)")
        model, example = made

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

        return model.to(self._dtype), pytree.tree_map_only(torch.Tensor, cast, example)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
