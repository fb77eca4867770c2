"""Steps that call other stages than were measured: blocks that are skipped (LayerDrop, early exits), blocks that are called more
often (loops of varying depth).

What a block that was not measured holds is taken from one like it: the same module, or one of its class in the same container.
What skipping it leaves is as if it returned what it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from gpuckpt.planning import Chain, Keep, Node, Stage
from gpuckpt.planning.tree import Token, build_tree, flatten
from gpuckpt.pytorch.profiling.runner import Measured

__all__ = ["ExtraCall", "at_most", "call_like", "skipped_calls", "with_calls", "without"]


class ExtraCall(NamedTuple):
    """A call of `module` that was not measured, after `position` of those that were; it resembles the measured call `like`."""

    position: int
    module: nn.Module
    like: int


def call_like(measured: Measured, module: nn.Module, position: int) -> int | None:
    """The number of the measured call that a call of `module` after `position` measured calls resembles most."""
    calls = [number for number, other in enumerate(measured.modules) if type(other) is type(module)]
    if not calls:
        return None
    stages, modules = measured.chain.stages, measured.modules

    def likeness(number: int) -> tuple[bool, bool, int]:
        return modules[number] is module, bool(stages[measured.owned[number]].inputs), -abs(number - position)

    return max(calls, key=likeness)


def skipped_calls(measured: Measured, model: nn.Module) -> list[ExtraCall]:
    """Calls that other steps may make of blocks that did not run while `model` was measured, each after the blocks that stand
    before it in the container of both (LayerDrop, early exits, a head for each task)."""
    found: list[ExtraCall] = []
    idle = set(measured.idle)
    places = {module: n for n, module in enumerate(measured.modules) if measured.modules.count(module) == 1}
    for container in model.modules():
        children = list(container.children())
        running = [places[child] for child in children if child in places]
        if idle.isdisjoint(children) or not running:
            continue
        position = running[0]
        for child in children:
            if child in places:
                position = places[child] + 1
            elif child in idle and (like := call_like(measured, child, position)) is not None:
                found.append(ExtraCall(position, child, like))
    return sorted(found, key=lambda call: call.position)


def with_calls(measured: Measured, extra: Sequence[ExtraCall], names: Mapping[nn.Module, str]) -> Measured | None:
    """`measured` with more calls, in the order in which they came; None where it does not tell what they would hold."""
    found = measured
    for count, call in enumerate(extra):
        shift = sum(other.position <= call.like for other in extra[:count])  # of the calls that are in by now
        longer = _with_call(found, call.position + count, call.module, call.like + shift, names)
        if longer is None:
            return None
        found = longer
    return found


def _with_call(
    measured: Measured, position: int, module: nn.Module, like: int, names: Mapping[nn.Module, str]
) -> Measured | None:
    chain, owned = measured.chain, measured.owned
    stages = list(chain.stages)
    template = stages[owned[like]]
    # A block before the first one is, as bytes go, another one after it.
    after = owned[max(position - 1, 0)]
    given = stages[owned[like - 1]].output if like else ()
    handed = stages[after].output
    if owned.count(owned[like]) > 1 or not template.inputs or not handed or not set(template.inputs) <= set(given):
        return None
    storages = list(chain.storages)
    links = dict(zip(given, handed, strict=False))
    if not set(template.inputs) <= links.keys():
        return None
    renamed: dict[int, int] = {i: links[i] for i in template.inputs}
    new = _another(chain, owned[like], renamed, storages)
    follows = dict(zip(handed, new.output, strict=False))
    if after + 1 < len(stages):
        stages[after + 1] = _with_ids(stages[after + 1], follows)
    stages.insert(after + 1, new)
    calls = [number + (number > after) for number in owned]
    calls.insert(max(position, 1), after + 1)
    modules = list(measured.modules)
    modules.insert(position, module)
    # What is dropped later than the new one comes goes one stage later; of the new one itself nothing is known.
    for number, stage in enumerate(stages[: after + 1]):
        if stage.dropped_in is not None and number + stage.dropped_in >= after:
            stages[number] = replace(stage, dropped_in=stage.dropped_in + 1)
    stages[after + 1] = replace(stages[after + 1], dropped_in=None)
    for number in (after, after + 1):
        if calls.count(number) == 1:
            name = names.get(modules[calls.index(number)], stages[number].name)
            stages[number] = replace(stages[number], name=name)
    staying = measured.staying | {new for old, new in renamed.items() if old in measured.staying}
    longer = replace(chain, stages=tuple(stages), storages=tuple(storages))
    return replace(measured, chain=longer, modules=tuple(modules), owned=tuple(calls), staying=staying)


def at_most(measured: Measured) -> Measured:
    """`measured` as if each block held what the one that held most of those like it did: what a block saves depends on contents
    or chance, and another step may save as much in any of them."""
    stages, storages = list(measured.chain.stages), list(measured.chain.storages)
    staying = set(measured.staying)
    alike: dict[Any, list[int]] = {}
    for number, module in enumerate(measured.modules):
        stage = measured.owned[number]
        if measured.owned.count(stage) == 1:
            sizes = tuple([tensor.shape for tensor in module.parameters()])
            given = tuple([storages[i] for i in stages[stage].inputs])
            alike.setdefault((type(module), sizes, given), []).append(stage)
    for numbers in alike.values():
        most = max(numbers, key=lambda stage: measured.chain.charge(measured.chain.stages[stage].saves))
        template = measured.chain.stages[most]
        for number in numbers:
            quiet = stages[number]
            if measured.chain.charge(quiet.saves) == measured.chain.charge(template.saves):
                continue
            if quiet.dropped_in != template.dropped_in or quiet.recomputable != template.recomputable:
                continue
            if len(quiet.output) != len(template.output) or set(quiet.output) & {*quiet.inputs, *quiet.extras}:
                continue
            renamed = dict(zip(template.inputs, quiet.inputs, strict=True))
            renamed.update(zip(template.output, quiet.output, strict=True))
            stages[number] = replace(_another(measured.chain, most, renamed, storages), name=quiet.name)
            staying |= {new for old, new in renamed.items() if old in staying}
    chain = replace(measured.chain, stages=tuple(stages), storages=tuple(storages))
    return replace(measured, chain=chain, staying=frozenset(staying))


def without(chain: Chain, tree: Iterable[Node], skipped: Collection[int]) -> tuple[Chain, tuple[Node, ...]]:
    """The chain without some of its stages, and the plan `tree` as a runtime follows it then."""
    stages: list[Stage] = []
    same: dict[int, tuple[int, ...]] = {}  # what stands for the output of a stage that is skipped
    numbers: dict[int, int] = {}
    for number, stage in enumerate(chain.stages):
        now = _renamed(stage, lambda i: same.get(i, (i,))) if same else stage
        if number in skipped:
            given = now.inputs or now.extras
            alike = [i for i in given if stage.output and chain.storages[i] == chain.storages[stage.output[0]]]
            if stage.output and (len(alike) == 1 or not given):
                same[stage.output[0]] = tuple(alike)
            continue
        if now is not stage and stages:
            linked = tuple([i for i in now.inputs if i in stages[-1].output])
            extras = tuple(dict.fromkeys((*[i for i in now.inputs if i not in linked], *now.extras)))
            now = replace(now, inputs=linked, extras=extras)
        numbers[number] = len(stages)
        stages.append(now)
    tokens: list[Token] = []
    ends: list[int] = []
    for index, step in enumerate(steps := flatten(tree)):
        _close(tokens, ends, index)
        if step.variant is None:
            tokens.append("(")
            ends.append(step.end)
        elif step.first in numbers:
            tokens.append(Keep(numbers[step.first], step.variant))
    _close(tokens, ends, len(steps))
    return replace(chain, stages=tuple(stages)), build_tree(tokens)


def _close(tokens: list[Token], ends: list[int], index: int) -> None:
    """Close the frames that end before node `index`; one that is empty goes."""
    while ends and ends[-1] <= index:
        ends.pop()
        if tokens[-1] == "(":
            tokens.pop()
        else:
            tokens.append(")")


def _ids_of(stage: Stage) -> list[int]:
    variants = [i for v in stage.variants for i in v.ids]
    return [*stage.inputs, *stage.extras, *stage.output, *stage.saves, *variants]


def _another(chain: Chain, number: int, renamed: dict[int, int], storages: list[int]) -> Stage:
    """A stage like stage `number`, with the ids that `renamed` has for some of its storages. What is its own gets new ones, added
    to `renamed` and `storages`; what stages before it hold, and its extras, are the same."""
    stage = chain.stages[number]
    known = {i for before in chain.stages[:number] for i in _ids_of(before)} | set(stage.extras)
    for i in _ids_of(stage):
        if i not in renamed and i not in known:
            renamed[i] = len(storages)
            storages.append(chain.storages[i])
    return _with_ids(stage, renamed)


def _with_ids(stage: Stage, names: Mapping[int, int]) -> Stage:
    return _renamed(stage, lambda i: (names.get(i, i),))


def _renamed(stage: Stage, name: Callable[[int], tuple[int, ...]]) -> Stage:
    """The stage with other ids for its storages, or none."""

    def ids(before: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys([now for i in before for now in name(i)]))

    variants = tuple([v.renamed(ids) for v in stage.variants])
    return replace(
        stage,
        saves=ids(stage.saves),
        inputs=ids(stage.inputs),
        extras=ids(stage.extras),
        output=ids(stage.output),
        variants=variants,
    )
