"""Random chains, every tree of a short chain, and a tiny runtime that plays a tree with explicit holders."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from gpuckpt.planning import Chain, Keep, Recompute, Stage, Variant


def make_chain(
    rng: random.Random, n: int, options: float = 0.3, most: int = 9, fixed: float = 0.1, spills: float = 0.5
) -> Chain:
    """A chain whose storages are a stage's own, shared across one boundary, or one set of extras; small whole costs."""
    sizes: list[int] = []

    def new(most_bytes: int = most) -> int:
        sizes.append(rng.randint(0, most_bytes))
        return len(sizes) - 1

    extras = tuple(new(6) for _ in range(rng.choice([0, 0, 1, 2])))
    activations = [new(6) for _ in range(n + 1)]
    charged = [rng.random() < 0.85 for _ in range(n + 1)]
    stages = []
    for i in range(n):
        uses_extras = extras if rng.random() < 0.7 else ()

        def saves(i: int = i, uses_extras: tuple[int, ...] = uses_extras) -> tuple[int, ...]:
            ids = [new()] if rng.random() < 0.9 else []
            ids += [activations[i]] if charged[i] and rng.random() < 0.6 else []
            ids += [activations[i + 1]] if charged[i + 1] and rng.random() < 0.4 else []
            return (*ids, *(uses_extras if rng.random() < 0.3 else ()))

        forward_s, backward_s = rng.randint(0, 5), rng.randint(0, 5)
        variants = []
        while rng.random() < options and len(variants) < 2:
            forward, backward = max(0, forward_s + rng.randint(-1, 4)), backward_s + rng.randint(0, 3)
            kept, spilled = saves(), ()
            if rng.random() < spills:  # some of it, or all; extras stay
                spilled = tuple(x for x in kept if x not in extras and rng.random() < 0.8)
                kept = tuple(x for x in kept if x not in spilled)
            remade, again_s = (), 0
            if rng.random() < 0.5:  # some of what it may save is made again, with or without what is kept
                remade = tuple(x for x in saves() if x not in extras)
                again_s = rng.randint(0, backward)
            later = tuple(x for x in saves() if x not in extras) if rng.random() < 0.3 else ()
            moved_s = rng.randint(0, min(forward, backward)) if spilled else 0
            variants.append(
                Variant(f"v{len(variants)}", kept, forward, backward, spilled, remade, again_s, moved_s, later)
            )
        stages.append(
            Stage(
                f"s{i}",
                forward_s,
                backward_s,
                saves(),
                (activations[i],) if charged[i] else (),
                uses_extras,
                (activations[i + 1],) if charged[i + 1] else (),
                rng.randint(0, 5),
                rng.randint(0, 5),
                rng.random() >= fixed,
                tuple(variants),
                rng.randint(0, min([forward_s, *(variant.forward_s for variant in variants)])),
                rng.choice([0, 0, rng.randint(0, most)]),
                rng.randint(0, 4) if rng.random() < spills and charged[i] else None,
            )
        )
    return Chain(tuple(stages), tuple(sizes))


def make_wild_chain(rng: random.Random, n: int, dropping: bool = False) -> Chain:
    """A chain that shares storages in any way at all, with a pool's unit. `dropping`: results of some stages are dropped."""
    sizes = tuple(rng.randint(0, 3000) for _ in range(2 * n + 2))
    unit_bytes = rng.choice([1, 64, 512])

    def some(most: int) -> tuple[int, ...]:
        return tuple(rng.sample(range(len(sizes)), rng.randint(0, min(most, len(sizes)))))

    stages = tuple(
        Stage(
            f"s{i}",
            1 + rng.random(),
            rng.random(),
            some(4),
            some(2),
            some(2) if rng.random() < 0.3 else (),
            some(2),
            rng.randint(0, 2000),
            rng.randint(0, 2000),
            rng.random() < 0.9,
            (Variant("v", some(3), 1 + rng.random(), 1 + rng.random(), some(3), some(3), 0.5, rng.random()),)
            if rng.random() < 0.3
            else (),
            tail_s=rng.random(),
            again_bytes=rng.choice([0, rng.randint(0, 3000) // unit_bytes * unit_bytes]),
            input_moved_s=rng.choice([None, rng.random()]),
        )
        for i in range(n)
    )
    if dropping:
        stages = tuple(
            replace(stage, dropped_in=rng.randint(0, 3), variants=(), input_moved_s=None)
            if rng.random() < 0.4
            else stage
            for stage in stages
        )
    return Chain(stages, sizes, unit_bytes)


def every_tree(chain: Chain, first: int, last: int, depth: int = 0, opening: bool = False) -> Iterator[tuple]:
    """Every tuple of nodes over first..last; with `opening`, what a frame can hold, which is not one frame again."""
    if first > last:
        yield ()
        return
    stage = chain.stages[first]
    if stage.recomputable or depth == 0:
        for option in stage.options:
            for rest in every_tree(chain, first + 1, last, depth):
                yield (Keep(first, option.name), *rest)
    for end in range(first, last + (0 if opening else 1)):
        if not all(s.recomputable for s in chain.stages[first : end + 1]):
            return
        for children in every_tree(chain, first, end, depth + 1, True):
            for rest in every_tree(chain, end + 1, last, depth):
                yield (Recompute(children), *rest)
                if depth == 0 and stage.input_moved_s is not None:
                    yield (Recompute(children, "spill"), *rest)


def make_tree(rng: random.Random, chain: Chain, first: int, last: int, depth: int = 0) -> tuple:
    """A random tree over first..last, frames around frames included."""
    nodes = []
    while first <= last:
        reach = first
        while reach <= last and chain.stages[reach].recomputable:
            reach += 1
        if reach > first and depth < 6 and rng.random() < 0.45:
            end = rng.randint(first, reach - 1)
            moved = depth == 0 and chain.stages[first].input_moved_s is not None and rng.random() < 0.6
            nodes.append(Recompute(make_tree(rng, chain, first, end, depth + 1), "spill" if moved else "keep"))
            first = end + 1
        else:
            nodes.append(Keep(first, rng.choice(chain.stages[first].options).name))
            first += 1
    return tuple(nodes)


@dataclass
class Played:
    """What the tiny runtime saw. `events`: ("alloc", name, bytes) and ("free", name) in order, a new name for every alloc."""

    peak_bytes: int = 0
    total_peak_bytes: int = 0
    host_peak_bytes: int = 0
    seconds: float = 0.0
    again_s: float = 0.0
    counts: list[int] = field(default_factory=list)
    events: list[tuple] = field(default_factory=list)


def play(chain: Chain, tree: tuple) -> Played:
    """Run a tree with explicit holders, stage by stage, by recursion: shares nothing with the simulator but the rules."""
    seen = Played(counts=[0] * len(chain))
    holds: set[tuple[object, int]] = set()
    times: dict[object, int] = {}
    on_host: set[tuple[object, int]] = set()

    # What the top level offloads, in forward order: owner, ids that go, seconds one way, first stage, where it is, copy done at.
    moving: list[list] = []
    link_free_s = 0.0
    finished: list[int] = []  # stages whose offloads wait for the next one's start

    # A storage is a number, or ("again", number): a twin of an extra, which its maker makes when it is run again.
    def bytes_of(x: object) -> int:
        return chain.storages[x[1] if isinstance(x, tuple) else x]

    def size(ids: set) -> int:
        return sum(-(-bytes_of(x) // chain.unit_bytes) * chain.unit_bytes for x in ids)

    def held() -> set:
        return {x for _, x in holds}

    def maker(x: int) -> int | None:
        """The stage that makes x, if a later stage has it as an extra."""
        for i, stage in enumerate(chain.stages):
            if x in stage.inputs or x in stage.extras:
                return None
            if (
                any(
                    x in (*option.saves, *option.spilled, *option.remade, *option.remade_later)
                    for option in stage.options
                )
                or x in stage.output
            ):
                return i if any(x in later.extras for later in chain.stages[i + 1 :]) else None
        return None

    def seen_by(i: int, ids: tuple, outermost: tuple | None, links_only: bool = False) -> tuple:
        """What stage i means by `ids` while everything in the frame `outermost` runs again."""
        if outermost is None:
            return ids
        foreign = () if links_only else chain.stages[i].extras
        return tuple(("again", x) if maker(x) in span_of(outermost) and x not in foreign else x for x in ids)

    def span_of(nodes: tuple) -> list[int]:
        return [x for node in nodes for x in span(node)]

    def hold(owner: object, ids: tuple[int, ...]) -> None:
        for x in dict.fromkeys(ids):
            if x not in held():
                times[x] = times.get(x, 0) + 1
                seen.events.append(("alloc", (x, times[x]), bytes_of(x)))
            holds.add((owner, x))
        seen.peak_bytes = max(seen.peak_bytes, size(held()))

    def let_go(owner: object, ids: tuple[int, ...]) -> None:
        for x in reversed(list(dict.fromkeys(ids))):
            holds.discard((owner, x))
            if x not in held():
                seen.events.append(("free", (x, times[x])))

    def alive(beyond: set, more_bytes: int) -> None:
        seen.total_peak_bytes = max(seen.total_peak_bytes, size(held() | beyond) + more_bytes)

    def span(node: Keep | Recompute) -> list[int]:
        return [node.stage] if isinstance(node, Keep) else [x for child in node.children for x in span(child)]

    def run_stage(i: int, seconds: float, gradient_bytes: int, again: bool, leaving: Iterable[int] = ()) -> None:
        seen.counts[i] += 1
        seen.seconds += seconds
        seen.again_s += seconds if again else 0.0
        alive_while_it_runs(i, gradient_bytes, leaving)

    def alive_while_it_runs(i: int, gradient_bytes: int, leaving: Iterable[int] = ()) -> None:
        stage = chain.stages[i]
        touched = {*stage.inputs, *stage.output, *leaving}
        loose_bytes = 0 if stage.output else stage.output_bytes
        if i > 0:
            touched |= set(chain.stages[i - 1].output)
            if not stage.inputs and not chain.stages[i - 1].output:
                loose_bytes += chain.stages[i - 1].output_bytes
        alive(touched, loose_bytes + stage.workspace_bytes + gradient_bytes)

    def frame_ids(node: Recompute, outermost: tuple | None) -> tuple:
        stages = span(node)
        extras = [x for i in stages for x in chain.stages[i].extras]
        inputs = seen_by(stages[0], chain.stages[stages[0]].inputs, outermost, links_only=True)
        return tuple(dict.fromkeys([*inputs, *extras]))

    def offload(owner: object, ids: tuple, seconds: float, stage: int) -> list:
        here = held()
        gone = [x for x in dict.fromkeys(ids) if x not in here]
        hold(owner, ids)
        on_host.update((owner, x) for x in gone)
        seen.host_peak_bytes = max(seen.host_peak_bytes, sum(bytes_of(x) for x in {x for _, x in on_host}))
        whole = sum(bytes_of(x) for x in set(ids))
        share = sum(map(bytes_of, gone)) / whole if whole else 0
        moving.append([owner, gone, seconds * share, stage, "here" if gone else "stays", 0.0])
        return moving[-1]

    def copy(item: list, state: str) -> None:
        nonlocal link_free_s
        link_free_s = max(link_free_s, seen.seconds) + item[2]
        item[4:] = [state, link_free_s]

    def start(stage: int, moves: bool = False) -> None:
        blocks = [i for i, each in enumerate(chain.stages) if each.recomputable]
        lets_go = stage == blocks[-1] or moves or bool(finished)
        finished.clear()
        for item in moving:
            if item[4] == "leaving" and lets_go:
                seen.seconds = max(seen.seconds, item[5])
                let_go(item[0], tuple(item[1]))
                item[4] = "there"
            elif item[4] == "done":
                copy(item, "leaving")

    def reach(stage: int, after: int) -> None:
        for item in [item for item in moving if item[3] == stage]:
            if item[4] == "there":
                hold(item[0], tuple(item[1]))
                copy(item, "coming")
            if item[4] == "coming":
                seen.seconds = max(seen.seconds, item[5])
        own = any(item[1] for item in moving if item[3] == stage)
        earlier = [item for item in moving if item[3] < stage and item[1]]
        if earlier and earlier[-1][4] == "there" and (own or earlier[-1][3] >= after):
            hold(earlier[-1][0], tuple(earlier[-1][1]))
            copy(earlier[-1], "coming")

    def forget(owner: object) -> None:
        let_go(owner, tuple(x for item in moving if item[0] == owner for x in item[1] if (owner, x) in holds))
        on_host.difference_update([pair for pair in on_host if pair[0] == owner])

    leaving: list[tuple[int, Keep | Recompute]] = []  # the stage before which a node's results are dropped

    def dropped_before(node: Keep | Recompute) -> int | None:
        left = {i: chain.stages[i].dropped_in for i in span(node)}
        return None if None in left.values() else max(i + 1 + count for i, count in left.items())

    def drop(stage: int, starts_from: tuple = ()) -> None:
        going = [node for before, node in leaving if before <= stage]
        if going:
            hold("start", starts_from)
        for node in going:
            owner = node if isinstance(node, Keep) else id(node)
            let_go(owner, tuple(x for holder, x in holds if holder == owner))
        if going:
            let_go("start", starts_from)
        leaving[:] = [(before, node) for before, node in leaving if before > stage]

    def forward(nodes: tuple, outermost: tuple | None, gradient_bytes: int) -> None:
        again = outermost is not None
        for node in nodes:
            dropped = dropped_before(node) is not None
            if again and dropped and node is nodes[-1]:
                continue
            if not again and dropped:
                leaving.append((dropped_before(node), node))
            if not again and isinstance(node, Keep):
                given = chain.stages[node.stage]
                drop(node.stage, () if node.variant in ("keep", "spill") else (*given.inputs, *given.extras))
            if not again and chain.stages[span(node)[0]].recomputable:
                start(span(node)[0], isinstance(node, Recompute) and node.variant == "spill")
            if isinstance(node, Keep):
                option = chain.stages[node.stage].option(node.variant)
                saves, spilled = (seen_by(node.stage, ids, outermost) for ids in (option.saves, option.spilled))
                saves = () if again and dropped else saves
                if not again and spilled:
                    item = offload(node, tuple(x for x in spilled if x not in saves), option.moved_s, node.stage)
                    hold(node, saves)
                    run_stage(node.stage, option.forward_s - option.moved_s, gradient_bytes, again)
                    item[4] = "done" if item[4] == "here" else "stays"
                    finished.append(node.stage)
                    continue
                # What is spilled and already here stays; the rest is on the host from the stage's end on.
                stays = [x for x in spilled if x in held()]
                leaves = [x for x in spilled if x not in stays and x not in saves]
                hold(node, (*saves, *stays))
                stops = again and node is nodes[-1]  # once the last tensor is saved
                seconds = option.forward_s - (chain.stages[node.stage].tail_s if stops else 0)
                run_stage(node.stage, seconds, gradient_bytes, again, set(leaves))
                on_host.update((node, x) for x in leaves)
                there = {x for _, x in on_host}
                seen.host_peak_bytes = max(seen.host_peak_bytes, sum(bytes_of(x) for x in there))
            else:
                if node.variant == "spill":
                    first = span(node)[0]
                    extras = [x for i in span(node) for x in chain.stages[i].extras]
                    moved = tuple(x for x in chain.stages[first].inputs if x not in extras)
                    item = offload(id(node), moved, chain.stages[first].input_moved_s, first)
                    if item[1]:
                        copy(item, "leaving")
                hold(id(node), () if again and dropped else frame_ids(node, outermost))
                if not again:
                    drop(span(node)[0])
                if not (again and node is nodes[-1]):
                    for i in span(node):
                        if not again and i > span(node)[0]:
                            start(i)
                        run_stage(i, chain.stages[i].forward_s, gradient_bytes, again)

    def backward_of(stage: Stage, node: Keep, gradients: int) -> None:
        alive(set(), gradients + stage.workspace_bytes + stage.again_bytes)
        if stage.again_bytes:
            seen.events += [("alloc", ("inside", node), stage.again_bytes), ("free", ("inside", node))]
        seen.peak_bytes = max(seen.peak_bytes, size(held()) + stage.again_bytes)

    def backward(nodes: tuple, outermost: tuple | None = None) -> None:
        for node in reversed(nodes):
            if dropped_before(node) is not None:
                continue
            if isinstance(node, Keep):
                stage, option = chain.stages[node.stage], chain.stages[node.stage].option(node.variant)
                at_top = outermost is None and bool(option.spilled)
                if outermost is None and (option.spilled or option.remade):
                    reach(node.stage, node.stage - 1 if option.remade else node.stage)
                seen.seconds += option.backward_s - (option.moved_s if at_top else 0)
                gradients = stage.output_bytes + (chain.stages[node.stage - 1].output_bytes if node.stage else 0)
                back = [] if at_top else [x for owner, x in on_host if owner is node]
                hold(node, tuple(back))
                seen.again_s += option.again_s if option.remade else 0
                for half, made in enumerate((option.remade, option.remade_later)):
                    if not made:
                        continue  # the stage itself runs again, and makes twins of what later stages had from it
                    if half:
                        backward_of(stage, node, gradients)
                        let_go((node, 0), tuple(x for owner, x in holds if owner == (node, 0)))
                    twins = [
                        x not in stage.extras and (-1 if maker(x) is None else maker(x)) >= node.stage for x in made
                    ]
                    ids = tuple(("again", x) if twin else x for x, twin in zip(made, twins, strict=True))
                    hold((node, half), ids)
                    alive_while_it_runs(node.stage, stage.output_bytes)
                backward_of(stage, node, gradients)
                for owner in ((node, 1), (node, 0), node):
                    let_go(owner, tuple(x for holder, x in holds if holder is owner or holder == owner))
                forget(node)
            else:
                if outermost is None:
                    reach(span(node)[0], 0)
                forward(node.children, outermost or (node,), chain.stages[span(node)[-1]].output_bytes)
                backward(node.children, outermost or (node,))
                let_go(id(node), frame_ids(node, outermost))
                forget(id(node))

    forward(tree, None, 0)
    drop(4 * len(chain))
    backward(tree)
    assert not holds
    assert not on_host
    return seen


@pytest.fixture(scope="session")
def chain_of() -> Callable[..., Chain]:
    return make_chain


@pytest.fixture(scope="session")
def wild_chain_of() -> Callable[..., Chain]:
    return make_wild_chain


@pytest.fixture(scope="session")
def trees_of() -> Callable[[Chain], Iterator[tuple]]:
    return lambda chain: every_tree(chain, 0, len(chain) - 1)


@pytest.fixture(scope="session")
def tree_of() -> Callable[[random.Random, Chain], tuple]:
    return lambda rng, chain: make_tree(rng, chain, 0, len(chain) - 1)


@pytest.fixture(scope="session")
def played() -> Callable[[Chain, tuple], Played]:
    return play
