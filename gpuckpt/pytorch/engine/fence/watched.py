"""Which modules are looked at, and what of them: looked up once, and learned from their forwards."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gpuckpt.pytorch._torch_internals import forward_inside, sharded_parameters, sharding_of
from gpuckpt.pytorch.engine.fence.attributes import INTERNAL
from gpuckpt.pytorch.engine.fence.holders import PLAIN
from gpuckpt.pytorch.engine.fence.norms import is_norm
from gpuckpt.pytorch.engine.fence.tensors import TensorUse

__all__ = ["Watched", "refuse_scripted", "watch"]


class _Part:
    """One module: which of its attributes are looked at. It is not held: what is learned of a module shall not keep it alive."""

    __slots__ = (
        "_values",
        "buffers",
        "child_names",
        "children",
        "count",
        "is_norm",
        "is_sharded",
        "kind",
        "names",
        "owner",
        "ref",
        "tensors",
    )

    def __init__(self, module: nn.Module) -> None:
        held = module.__dict__
        self.ref = weakref.ref(module)
        self.kind = type(module)  # fully_shard gives a module another
        self.owner = type(module).__name__
        self.is_norm = is_norm(module)
        self.is_sharded = sharding_of(module) is not None
        self.count = len(held)
        self.children = list(map(id, module._modules.values()))
        self.child_names = tuple(module._modules)
        self.buffers = tuple(module._buffers)
        self.tensors = len(module._parameters), len(module._buffers)
        self.names = tuple(name for name in held if name not in INTERNAL)
        self._values: list[Any] | None = None

    def know(self, values: list[Any]) -> None:
        """These attributes are all to be put back as they are. Not noted where there may be references to the module in them."""
        self._values = values if all(type(value) in PLAIN or type(value) is tuple for value in values) else None

    def known(self, values: list[Any]) -> bool:
        """Whether the very same attributes were known before."""
        return self._values is not None and all(map(is_, values, self._values))

    def current(self) -> bool:
        module = self.ref()
        return (
            module is not None
            and type(module) is self.kind
            and len(module.__dict__) == self.count
            and (len(module._parameters), len(module._buffers)) == self.tensors
            and list(map(id, module._modules.values())) == self.children
        )


class _Place(NamedTuple):
    """Where a parameter or buffer stands: module number `part`, and the name there. `is_state`: it may be there for forwards to
    write, as buffers and small frozen parameters are (averages, the vectors of a power iteration)."""

    part: int
    is_buffer: bool
    name: str
    is_state: bool


_LARGEST_STATE_BYTES = 1 << 20


def _is_state(parameter: torch.Tensor) -> bool:
    return (
        not parameter.requires_grad
        and type(parameter) in (torch.Tensor, nn.Parameter)
        and parameter.layout is torch.strided
        and parameter.numel() * parameter.element_size() <= _LARGEST_STATE_BYTES
    )


def refuse_scripted(modules: Iterable[nn.Module]) -> None:
    """Raise `NotImplementedError` for a module of TorchScript."""
    scripted = next((module for module in modules if isinstance(module, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise NotImplementedError(
            f"checkpointed work uses {scripted.original_name!r} as a torch.jit.ScriptModule, whose flags and buffers lie where a "
            "recompute cannot put them back; use the module that it was made from, or torch.compile (functions of "
            "torch.jit.script are fine)"
        )


class Watched:
    """The modules below some roots, looked up once.

    Attributes: `written`, places of state that a forward was seen to write; `trials`, forwards that are still watched for that;
    `norms`, `with_shards`, `wrappers`: the numbers of modules of these kinds, the last of those that another module is inside of;
    `adjusted`, places of parameters that the last of those changed through `.data`;
    `rewritten`, the name of a parameter that a forward was seen to change in place itself;
    `sharded`, the sharded forms of parameters that are gathered for each use, with their owner and name.
    """

    __slots__ = (
        "adjusted",
        "norms",
        "parts",
        "places",
        "rewritten",
        "sharded",
        "trials",
        "uses",
        "with_shards",
        "wrappers",
        "written",
    )

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        refuse_scripted(modules)
        self.parts = [_Part(module) for module in modules]
        self.norms = [number for number, part in enumerate(self.parts) if part.is_norm]
        self.with_shards = [number for number, part in enumerate(self.parts) if part.is_sharded]
        self.wrappers = [number for number, module in enumerate(modules) if forward_inside(module) is not None]
        # Sharded parameters come and go with their gathered form: torch's FSDP sees to it that a recompute finds them.
        sharded = [found for module in modules for found in sharded_parameters(module)]
        gathered = {(id(module), name) for found in sharded for module, name in found.places}
        self.places = [
            _Place(part, held is module._buffers, name, held is module._buffers or _is_state(tensor))
            for part, module in enumerate(modules)
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
            and not is_lazy(tensor)
            and not (held is module._buffers and is_norm(module))
            and (id(module), name) not in gathered
        ]
        self.sharded = [
            (weakref.ref(found.tensor), type(module).__name__, name)
            for found in sharded
            for module, name in found.places[:1]
        ]
        self.written: set[int] = set()
        self.adjusted: list[int] = []
        self.rewritten: str | None = None
        self.uses: dict[tuple[int, str], TensorUse] = {}  # of tensors that attributes lead to, by part and name
        self.trials = 2

    def learn_from(self, other: Watched) -> None:
        """Take over what was learned of the same modules when they were made up otherwise."""
        if [part.ref() for part in self.parts] != [part.ref() for part in other.parts]:
            return
        self.uses = other.uses
        known = set(other.places)
        written = {other.places[number] for number in other.written}
        self.written = {number for number, place in enumerate(self.places) if place in written}
        if all(place in known for place in self.places):
            self.trials = other.trials
            adjusted = {other.places[number] for number in other.adjusted}
            self.adjusted = [number for number, place in enumerate(self.places) if place in adjusted]

    def current(self) -> bool:
        """Whether the modules are still made up as they were."""
        return all(part.current() for part in self.parts)


_watched: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Watched]] = weakref.WeakKeyDictionary()
_MOST_TOGETHER = 64


def watch(roots: Sequence[nn.Module], work: Sequence[nn.Module]) -> Watched:
    """What is watched of `roots`, of which there is one at least. `work`: the modules whose forward reaches them, if any: what
    that reads of them says nothing of what they read themselves."""
    known, key = _watched.setdefault((work or roots)[0], {}), tuple(map(id, roots))
    watched = known.get(key)
    if watched is None or not watched.current():
        if len(known) >= _MOST_TOGETHER:  # modules that are called with ever other ones
            known.clear()
        before, watched = watched, Watched(roots)
        if before is not None:
            watched.learn_from(before)
        known[key] = watched
    return watched
