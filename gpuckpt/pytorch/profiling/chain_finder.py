"""A model's chain of stages: which submodule calls it consists of.

A chain is found by what runs, not by how a class is written: children of `nn.Sequential` and `nn.ModuleList` containers are
watched during one forward, and calls form a chain where each receives the very tensor that the one before returned. Extra
arguments that every block gets (masks, positions, caches) do not matter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpuckpt.errors import InvalidChain
from gpuckpt.pytorch._torch_internals import forward_inside, group_of, version_number
from gpuckpt.pytorch.engine.kept.current import in_checkpoint
from gpuckpt.pytorch.profiling.call_hooks import intercept, run_module
from gpuckpt.pytorch.profiling.call_paths import SHARE, Call, covered, disjoint_calls, heaviest_path, outermost
from gpuckpt.pytorch.profiling.sharding import around_gathering

__all__ = ["Outputs", "find_chain", "idle_siblings", "tensors_in"]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Outputs:
    """What a stage returned, and in which version: code between stages may change a tensor in place, and a recompute of the
    stage would return it as it was before."""

    __slots__ = ("_versions", "tensors")

    def __init__(self, tensors: Sequence[torch.Tensor] = ()) -> None:
        self.tensors = tensors
        self._versions = [version_number(tensor) for tensor in tensors]

    def unchanged(self) -> dict[int, int]:
        """By id the index of each tensor that nobody has changed in place since it was returned."""
        pairs = zip(self.tensors, self._versions, strict=True)
        return {id(tensor): index for index, (tensor, version) in enumerate(pairs) if version_number(tensor) == version}


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NEXT_TO_NOTHING = (
    0.01  # of what calls of the same class do: enough to draw a random number and hand back what was given
)


def candidates(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that may be stages, with their names: the children of Sequentials, ModuleLists and ModuleDicts, at any depth."""
    found: dict[nn.Module, str] = {}
    for name, container in model.named_modules():
        if isinstance(container, _CONTAINERS):
            for child_name, child in container.named_children():
                if not isinstance(child, nn.ModuleList | nn.ModuleDict):  # these are not called
                    found.setdefault(child, f"{name}.{child_name}" if name else child_name)
    return found


def idle_siblings(model: nn.Module, found: Found) -> tuple[nn.Module, ...]:
    """Modules that did not run, of the class of a stage that is called from the same container: another step may call them
    (LayerDrop, early exits), or they return at once (stochastic depth within blocks). One that ran without being a stage, such as
    a block that is planned call by call, is none."""
    stages = set(found.modules)
    idle: dict[nn.Module, None] = {}
    for container in model.modules():
        if isinstance(container, _CONTAINERS):
            children = list(container.children())
            classes = {type(child) for child in children if child in stages}
            idle.update((child, None) for child in children if type(child) in classes and child not in found.ran)
    return tuple(idle)


def attributes(model: nn.Module, depth: int = 2) -> dict[nn.Module, str]:
    """Modules that a model without containers may be made of: its children by attribute, and theirs."""
    if (inside := forward_inside(model)) is not None:
        return {module: f"module.{name}" for module, name in attributes(inside, depth).items()}
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if name and name.count(".") < depth and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            found.setdefault(module, name)
    return found


def named(model: nn.Module, patterns: Sequence[str]) -> dict[nn.Module, str]:
    """Modules whose names match one of `patterns` ("encoder.*"; a star stands for dots as well). Raises `ValueError` for one that
    none matches."""
    found: dict[nn.Module, str] = {}
    names = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            some = ", ".join(repr(name) for name in get_close_matches(pattern, names) or list(names)[:4])
            raise ValueError(
                f"stages names {pattern!r}, and no module of {type(model).__name__} is called so; there are {some}"
            )
        found.update((names[name], name) for name in matching)
    return found


class _TensorNumbers:
    """Numbers tensors, and keeps none alive: an address may be used again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._count = 0

    def of(self, tree: Any) -> frozenset[int]:
        """The numbers of the tensors in nested containers."""
        return frozenset(map(self._number, tensors_in(tree)))

    def _number(self, tensor: torch.Tensor) -> int:
        ref, number = self._known.get(id(tensor), (None, 0))
        if ref is None or ref() is not tensor:
            self._count = number = self._count + 1
            self._known[id(tensor)] = weakref.ref(tensor), number
        return number


class _CountBytes(TorchDispatchMode):
    """Counts the bytes that operators produce: a position in the run, and a measure of how much work lies in between. `groups`:
    process groups that collectives were called in, by name."""

    def __init__(self, groups: dict[str, Any]) -> None:
        super().__init__()
        self.position = 0
        self.groups = groups
        self._counts = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context nothing is counted: gathering parameters is no work that a stage does."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._counts:
            self.position += 1 + sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(out))
        if (group := group_of(func, args, kwargs or {})) is not None:
            self.groups.setdefault(group.group_name, group)
        return out


class Found(NamedTuple):
    """The modules whose calls are a model's stages, in calling order (one module may occur several times), whether the forward
    goes backward itself (forces, gradient penalties), the process groups of the collectives that it calls, and all modules that
    were seen to do any work, as stages or not."""

    modules: list[nn.Module]
    differentiates: bool
    groups: tuple[Any, ...]
    ran: frozenset[nn.Module]


def find_chain(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], grad: bool = False, stages: Sequence[str] = ()
) -> Found:
    """The calls that are the model's stages. `stages`: patterns of the names of modules whose outermost calls these are.

    A chain of calls that hand on a tensor, where it covers the model; otherwise any calls that do not overlap: what crosses them
    (skip connections, an encoder's output) is an argument like others. Runs one forward, or two, without autograd if not `grad`.
    Raises `InvalidChain` where there are fewer than two calls.
    """
    unpacked: list[bool] = []
    groups: dict[str, Any] = {}
    ran: set[nn.Module] = set()

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        unpacked.append(True)
        return tensor

    with torch.set_grad_enabled(grad), saved_tensors_hooks(lambda tensor: tensor.detach(), unpack):
        if stages:
            calls, _, inside = _watch(model, named(model, stages), args, kwargs, groups, ran)
            modules = _modules_of(model, outermost(calls), inside)
        else:
            modules = _find(model, args, kwargs, groups, ran)
    return Found(modules, bool(unpacked), tuple(groups.values()), frozenset(ran))


def _find(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], groups: dict[str, Any], ran: set[nn.Module]
) -> list[nn.Module]:
    calls, work, inside = _watch(model, candidates(model), args, kwargs, groups, ran)
    chain, cut = heaviest_path(calls), disjoint_calls(calls)
    finer = len(cut) >= 2 * len(chain) and covered(cut) >= SHARE * covered(chain)
    if finer or covered(cut) * SHARE > covered(chain):
        chain = cut
    if len(chain) < 2 or covered(chain) < (1 - SHARE) * work:
        calls, _, inside = _watch(model, {**attributes(model), **candidates(model)}, args, kwargs, groups, ran)
        cut = disjoint_calls(calls)
        if len(cut) >= 2 and covered(cut) > covered(chain):
            chain = cut
    return _modules_of(model, chain, inside)


def _modules_of(model: nn.Module, chain: Sequence[Call], inside: Sequence[nn.Module]) -> list[nn.Module]:
    if len(chain) < 2 and inside:
        raise InvalidChain(
            f"{type(model).__name__} runs {type(inside[0]).__name__} and {len(inside) - 1} other modules inside "
            "gpuckpt.checkpoint, and nothing else is left to plan; call them without it: fit chooses what to recompute"
        )
    if len(chain) < 2:
        raise InvalidChain(
            f"{type(model).__name__}: found no chain of stages to plan. Expected two modules or more, called one after the "
            "other; wrap parts of the model in gpuckpt.checkpoint instead"
        )
    return [call.module for call in chain]


def _watch(
    model: nn.Module,
    modules: dict[nn.Module, str],
    args: tuple,
    kwargs: dict[str, Any],
    groups: dict[str, Any],
    ran: set[nn.Module],
) -> tuple[list[Call], int, list[nn.Module]]:
    """The calls of `modules` in one forward, how much work that was, and those among them that checkpoints made by hand cover.
    `groups` takes up those of collectives, by name, and `ran` all modules that did any work."""
    calls: list[Call] = []
    numbers = _TensorNumbers()
    counter = _CountBytes(groups)
    inside: list[nn.Module] = []

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if in_checkpoint():
            ran.add(module)
            inside.append(module)
            return run_module(module, args, kwargs)
        record = Call(module, counter.position, numbers.of((args, kwargs)))
        calls.append(record)
        given = Outputs(tensors_in((args, kwargs)))
        out = run_module(module, args, kwargs)
        record.end, record.outputs = counter.position, numbers.of(out)
        record.begun = len(calls)
        record.idle = record.outputs <= record.inputs and len(given.unchanged()) == len({*map(id, given.tensors)})
        return out

    with intercept(modules, call), around_gathering(model, counter.paused), counter:
        run_module(model, args, kwargs)
    most: dict[type, int] = {}
    for record in calls:
        most[type(record.module)] = max(record.work, most.get(type(record.module), 0))
    for record in calls:
        record.idle = record.idle and record.work <= _NEXT_TO_NOTHING * most[type(record.module)]
    ran.update(record.module for record in calls if not record.idle)
    return calls, counter.position, inside
