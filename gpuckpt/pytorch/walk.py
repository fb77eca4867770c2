"""Runs a model's stages, one call at a time, under a plan's tree.

The model calls its blocks itself; each call arrives here as `Walk.step`. Frames therefore open and close around calls that
come one by one: a frame that covers stages i..j saves what stage i receives, and of the later ones what they receive
besides their predecessor's output; its hooks are active inside the stages' calls only. In backward a frame replays its part
of the tree through a walk of its own, so nesting needs no special case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpuckpt.memory import CheckpointBudget
from gpuckpt.planning import Node, Recompute
from gpuckpt.pytorch.frame import Environment, Frame, Verify
from gpuckpt.pytorch.stages import statistics_frozen, tensors_in

__all__ = ["Walk"]

_HERE = object()  # where a kept tensor stood among the arguments


class _Link:
    """Stands among the arguments for output number `index` of the stage before."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class _Open:
    """A frame whose stages are still arriving."""

    def __init__(self, node: Recompute, walk: Walk) -> None:
        self.program: list[tuple[torch.nn.Module, list[Any], Any, Environment]] = []
        program, budget, verify, preserve = self.program, walk.budget, walk.verify, walk.preserve_rng_state
        children, first = node.children, _first(node)

        def replay(kept: list[torch.Tensor]) -> None:
            again = iter(kept)
            inner = Walk(children, budget, verify, preserve, first)
            for module, template, spec, environment in program:
                leaves = [
                    next(again) if leaf is _HERE else inner.previous[leaf.index] if isinstance(leaf, _Link) else leaf
                    for leaf in template
                ]
                args, kwargs = pytree.tree_unflatten(leaves, spec)
                with environment.again(), statistics_frozen(module.modules()):
                    inner.step(module, args, kwargs)

        self.frame = Frame(replay, budget, verify)
        self.last = _last(node)

    def receive(
        self,
        module: torch.nn.Module,
        leaves: Sequence[Any],
        spec: Any,
        previous: Sequence[Any],
        environment: Environment,
    ) -> None:
        """Save what the next stage's replay needs besides the output of the stage before."""
        links = {id(tensor): index for index, tensor in enumerate(previous)} if self.program else {}
        template: list[Any] = []
        kept: list[torch.Tensor] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                template.append(leaf)
            elif id(leaf) in links:
                template.append(_Link(links[id(leaf)]))
            else:
                template.append(_HERE)
                kept.append(leaf)
        self.frame.save(kept)
        self.program.append((module, template, spec, environment))


class Walk:
    """One pass over the stages that `nodes` cover.

    `budget` holds what frames recompute. `previous`: the tensors that the latest stage returned.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        budget: CheckpointBudget | None,
        verify: Verify | None = None,
        preserve_rng_state: bool = True,
        first: int = 0,
    ) -> None:
        self.budget = budget
        self.verify = verify
        self.preserve_rng_state = preserve_rng_state
        self.previous: list[torch.Tensor] = []
        self.position = first
        self._opens: dict[int, list[Recompute]] = {}
        self._collect(nodes)
        self._open: list[_Open] = []

    def _collect(self, nodes: Iterable[Node]) -> None:
        """Which frames begin at which stage, outermost first. Plans nest deeply: no recursion."""
        waiting = list(nodes)[::-1]
        while waiting:
            node = waiting.pop()
            if isinstance(node, Recompute):
                self._opens.setdefault(_first(node), []).append(node)
                waiting.extend(reversed(node.children))

    def step(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the next stage: `module` with these arguments."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        self._open += [_Open(node, self) for node in self._opens.get(self.position, ())]
        with ExitStack() as hooks:
            if self._open:
                environment = Environment(tensors_in(leaves), self.preserve_rng_state)
                for opened in self._open:
                    opened.receive(module, leaves, spec, self.previous, environment)
                    hooks.enter_context(opened.frame.hooks())
            del leaves
            out = module._call_impl(*args, **kwargs)
        while self._open and self._open[-1].last == self.position:
            self._open.pop()
        self.previous = tensors_in(out)
        self.position += 1
        return out


def _first(node: Node) -> int:
    while isinstance(node, Recompute):
        node = node.children[0]
    return node.stage


def _last(node: Node) -> int:
    while isinstance(node, Recompute):
        node = node.children[-1]
    return node.stage
