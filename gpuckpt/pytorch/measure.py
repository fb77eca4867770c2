"""`measure(model, *inputs)`: a model's chain, with the bytes that autograd saves in each stage and each stage's seconds.

The model runs forward once, and every stage is cut loose from the graph as it comes: run with autograd under hooks that
note which storages are saved, timed forward and backward a few times, and dropped before the next one. So measuring needs
the memory of one stage, not of a plain step. What lies before the first stage, after the last, or between two becomes a
stage that can only be kept.

Bytes are exact: they are those of the storages autograd saves, parameters and buffers left out. Seconds are medians after a
warm-up (the prefix and suffix are timed once, and their backward is taken as twice their forward). The model's parameters,
gradients, buffers and the random number generators are afterwards as before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from gpuckpt.errors import InvalidChain
from gpuckpt.planning import Chain, Stage
from gpuckpt.pytorch.stages import find_chain, intercept, tensors_in

__all__ = ["measure", "run_measured"]


class _Storages:
    """Numbers storages; parameters, buffers and leaves that the caller trains have none."""

    def __init__(self, residents: Sequence[torch.Tensor]) -> None:
        self._resident = {tensor.untyped_storage()._cdata for tensor in residents}
        self._number: dict[int, int] = {}
        # Weak references keep an address from naming two storages, and no memory alive.
        self._refs: list[StorageWeakRef] = []
        self.sizes: list[int] = []

    def of(self, tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Ids of the storages of `tensors`, each once, in order."""
        ids: dict[int, None] = {}
        for tensor in tensors:
            for part in _strided_parts(tensor):
                storage = part.untyped_storage()
                if storage._cdata in self._resident:
                    continue
                number = self._number.get(storage._cdata)
                if number is None:
                    number = self._number[storage._cdata] = len(self.sizes)
                    self._refs.append(StorageWeakRef(storage))
                    self.sizes.append(storage.nbytes())
                ids[number] = None
        return tuple(ids)


def _strided_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout is torch.strided:
        return [tensor]
    raise InvalidChain(
        f"measuring saved tensors of layout {tensor.layout} is not supported; keep such layers out of the chain"
    )


class _Connect(torch.autograd.Function):
    """Makes a tensor that is cut from its graph require a gradient without becoming a leaf (which autograd would take
    for a parameter, and which must not be changed in place) and without a copy."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None]:
        return None, None


class _Measurement:
    """What is known so far of the chain, while the model runs."""

    def __init__(self, chain: list[nn.Module], names: dict[nn.Module, str], storages: _Storages, repeats: int) -> None:
        self.expected = chain
        self.names = names
        self.storages = storages
        self.repeats = repeats
        self.stages: list[Stage] = []
        self.position = 0
        self.previous: list[torch.Tensor] = []
        self.owned: list[int] = []  # numbers of the stages that are modules' calls
        self.outside: list[torch.Tensor] = []  # saved since the last stage ended
        self.inside = False
        self.outside_began = time.perf_counter()

    def stage(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.position >= len(self.expected) or self.expected[self.position] is not module:
            return module._call_impl(*args, **kwargs)  # a call that is no part of the chain
        self.close_outside("prefix" if self.position == 0 else f"between {self.position - 1} and {self.position}")
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = tensors_in(leaves)
        linked = set(map(id, self.previous))
        inputs = self.storages.of([tensor for tensor in tensors if id(tensor) in linked])
        extras = self.storages.of([tensor for tensor in tensors if id(tensor) not in linked])

        self.inside = True
        saved: list[torch.Tensor] = []
        cut = pytree.tree_map_only(torch.Tensor, _cut, (args, kwargs))
        before = _versions(tensors), _buffer_versions(module)
        with saved_tensors_hooks(_note(saved), _identity):
            out = module._call_impl(*cut[0], **cut[1])
        undisturbed = before == (_versions(tensors), _buffer_versions(module))
        outputs = tensors_in(out)
        forward_s, backward_s = self._time(module, leaves, spec)
        self.owned.append(len(self.stages))
        self.stages.append(
            Stage(
                name=self.names[module],
                forward_s=forward_s,
                backward_s=backward_s,
                saves=self.storages.of(saved),
                inputs=inputs,
                extras=extras,
                output=self.storages.of(outputs),
                output_bytes=sum(tensor.numel() * tensor.element_size() for tensor in outputs),
                # An input or a buffer that is changed in place cannot be read again as it was.
                recomputable=undisturbed,
            )
        )
        del saved, cut
        out = pytree.tree_map_only(torch.Tensor, _cut, out)
        self.position += 1
        self.previous = tensors_in(out)
        self.inside = False
        self.outside_began = time.perf_counter()
        return out

    def close_outside(self, name: str) -> None:
        """Turn what was saved outside stages since the last one into a stage of its own that is always kept."""
        seconds = time.perf_counter() - self.outside_began
        saves = self.storages.of(self.outside)
        self.outside.clear()
        if saves or name in ("prefix", "suffix"):
            self.stages.append(Stage(name, seconds, 2 * seconds, saves, recomputable=False))

    def note_outside(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.inside:
            _note(self.outside)(tensor)
        return tensor.detach()

    def _time(self, module: nn.Module, leaves: list[Any], spec: Any) -> tuple[float, float]:
        forward_s, backward_s = [], []
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for _ in range(self.repeats):
            cut = [_fresh(leaf) for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(cut, spec)
            with _timer() as elapsed:
                out = module._call_impl(*args, **kwargs)
            forward_s.append(elapsed())
            roots = [tensor for tensor in tensors_in(out) if tensor.requires_grad]
            wanted = [tensor for tensor in tensors_in(cut) if tensor.requires_grad] + parameters
            if not roots or not wanted:
                backward_s.append(0.0)
                continue
            grads = [torch.ones_like(root) for root in roots]
            with _timer() as elapsed:
                torch.autograd.grad(roots, wanted, grads, allow_unused=True)
            backward_s.append(elapsed())
        return statistics.median(forward_s), statistics.median(backward_s)


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _note(saved: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Of a fake parameter's view only `_base` tells that it is one; of a real one its storage does.
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            saved.append(tensor.detach())
        return tensor.detach()

    return pack


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def _buffer_versions(module: nn.Module) -> list[tuple[int, int]]:
    """Which buffers there are and how often each was changed. The count of batches of a norm is taken care of."""
    return [
        (id(buffer), buffer._version)
        for name, buffer in module.named_buffers()
        if not name.endswith("num_batches_tracked")
    ]


def _cut(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its past, on the same bytes; requires a gradient as before, and is no leaf if it was none."""
    if tensor.is_leaf:
        return tensor
    return _Connect.apply(torch.empty((), requires_grad=True), tensor.detach())  # type: ignore[no-any-return]


def _fresh(leaf: Any) -> Any:
    """A copy of a tensor that takes a gradient: a stage that changes its input must not change the original again."""
    if not isinstance(leaf, torch.Tensor) or isinstance(leaf, nn.Parameter) or not leaf.requires_grad:
        return leaf
    return _Connect.apply(torch.empty((), requires_grad=True), leaf.detach().clone())


@contextmanager
def _timer() -> Iterator[Callable[[], float]]:
    """Seconds of the block, devices included."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    began = time.perf_counter()
    ended = [began]
    yield lambda: ended[0] - began
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    ended[0] = time.perf_counter()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers and random number generators are afterwards as before."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    cpu_rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        torch.set_rng_state(cpu_rng)
        if cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)


def measure(model: nn.Module, *inputs: Any, unit_bytes: int = 1, repeats: int = 3, **kwargs: Any) -> Chain:
    """Measure the chain of `model` for these inputs.

    Args:
        model: an `nn.Sequential`, or any module that runs the blocks of `nn.ModuleList`s or `nn.Sequential`s one after another.
        inputs, kwargs: what the model is called with. If the model returns its loss, the loss is part of the chain.
        unit_bytes: granule of the pool that the plan is for (512 on CUDA).
        repeats: timed runs of each stage.

    Raises:
        InvalidChain: there is no chain of stages in the model.
    """
    return run_measured(model, inputs, kwargs, unit_bytes, repeats)[0]


def run_measured(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], unit_bytes: int, repeats: int
) -> tuple[Chain, list[nn.Module], list[int]]:
    """`measure`, with the modules whose calls are stages, in calling order, and the numbers of those stages."""
    names = {module: name for name, module in model.named_modules()}
    residents = [*model.parameters(), *model.buffers()]
    residents += [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_leaf and tensor.requires_grad]
    with _unchanged(model):
        modules = find_chain(model, args, kwargs)
        run = _Measurement(modules, names, _Storages(residents), repeats)
        hooks = saved_tensors_hooks(run.note_outside, _identity)
        with torch.enable_grad(), intercept(dict.fromkeys(modules), run.stage), hooks:
            out = model._call_impl(*args, **kwargs)
        run.close_outside("suffix")
        if run.position != len(modules):
            raise InvalidChain(
                f"{type(model).__name__} called {run.position} of {len(modules)} stages with autograd on; a chain runs the same "
                "stages whether or not gradients are wanted"
            )
        del out
    chain = Chain(tuple(run.stages), tuple(run.storages.sizes), unit_bytes, type(model).__name__)
    return chain, modules, run.owned
