"""Steps that skip blocks, or call more of them than were measured: planned for, within the cap, and promised what they hold."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import BudgetExceeded, Fitted, fit
from gpuckpt.planning import Keep, Node, simulate
from gpuckpt.planning.tree import flatten, parse_tree, tree_text
from gpuckpt.pytorch.other_calls import ExtraCall, with_calls, without
from gpuckpt.pytorch.plan_maker import PlanMaker
from gpuckpt.pytorch.profiling.clock import WallClock
from gpuckpt.pytorch.profiling.measure import run_measured
from gpuckpt.pytorch.profiling.runner import Measured
from tests.pytorch import mixed_blocks
from tests.pytorch.steps import Block, batch, blocks, gradients
from tests.pytorch.test_plan_runner import put_plan, random_nodes

WIDTH, ROWS = 16, 32


class LayerDrop(nn.Module):
    """Skips blocks at random."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if torch.rand(()) > 0.3:
                x = block(x)
        return x.square().mean()


class EarlyExit(nn.Module):
    """Leaves after three blocks or more."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks(8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[: int(torch.randint(3, 9, ()))]:
            x = block(x)
        return x.square().mean()


class Tasks(nn.Module):
    """A head for each task, one of which runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks(5)
        self.heads = nn.ModuleDict({name: Block(WIDTH) for name in "abc"})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.heads["abc"[int(torch.randint(0, 3, ()))]](x).square().mean()


class ReturnsAtOnce(nn.Module):
    """Calls all of its blocks, some of which hand back what they were given: stochastic depth within blocks."""

    class Inner(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if torch.rand(()) > 0.4 else x

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[self.Inner(WIDTH) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


class GivesNothing(ReturnsAtOnce):
    """Residual branches that are left out: nothing is added."""

    class Inner(Block):
        def forward(self, x: Tensor) -> Tensor | None:
            return super().forward(x) if torch.rand(()) > 0.4 else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            added = block(x)
            x = x if added is None else added
        return x.square().mean()


class Grows(ReturnsAtOnce):
    """Deeper from step to step: two blocks do something in the first."""

    class Inner(Block):
        depth = 0

        def forward(self, x: Tensor, depth: int) -> Tensor:
            return super().forward(x) if self.depth < depth else x

    def __init__(self) -> None:
        super().__init__()
        for number, block in enumerate(self.blocks):
            block.depth = number
        self.steps = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        depth = 2 + int(torch.randint(0, 7, ())) if int(self.steps) else 2
        for block in self.blocks:
            x = block(x, depth)
        return x.square().mean()


class Loop(nn.Module):
    """Runs its blocks as often as the contents of a tensor say."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.blocks = blocks(count)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        for _ in range(int(times)):
            for block in self.blocks:
                x = block(x)
        return x.square().mean()


class Universal(nn.Module):
    """One block, as often as a number says, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = blocks(2)
        self.steps = blocks(1)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        x = self.ends[0](x)
        for _ in range(int(times)):
            x = self.steps[0](x)
        return self.ends[1](x).square().mean()


def smallest_and_largest(model: nn.Module, *args: Any) -> tuple[int, int]:
    """What the smallest plan, and one that recomputes nothing, hold."""
    torch.manual_seed(0)
    certificate = fit(copy.deepcopy(model), args, 1 << 40).plan.certificate
    return certificate.smallest_budget_bytes, certificate.peak_bytes


def fitted_at(model: nn.Module, share: float, *args: Any) -> tuple[Fitted, nn.Module]:
    """`model` fitted between the smallest budget (0) and one that holds all (1), and a plain copy."""
    smallest_bytes, largest_bytes = smallest_and_largest(model, *args)
    plain = copy.deepcopy(model)
    torch.manual_seed(0)
    return fit(model, args, int(smallest_bytes + share * (largest_bytes - smallest_bytes))), plain


def same_step(fitted: Fitted, plain: nn.Module, seed: int, *args: Any) -> None:
    ours = gradients(fitted.model, lambda: fitted(*args), seed)
    assert ours == gradients(plain, lambda: plain(*args), seed)
    assert fitted.budget.used_bytes == 0
    assert fitted.budget.peak_bytes <= fitted.budget.max_bytes


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("make", [LayerDrop, EarlyExit, Tasks])
def test_steps_that_skip_blocks_hold_what_they_promise(make: Callable[[], nn.Module], share: float) -> None:
    """Also where blocks run that were skipped while the model was measured; each step is promised what it holds."""
    fitted, plain = fitted_at(make(), share, x := batch(ROWS))
    promises = set()
    for seed in range(8):
        same_step(fitted, plain, seed, x)
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.plan.certificate.peak_bytes
        promises.add(fitted.promised_peak_bytes)
    assert not fitted.deviations
    assert share == 0 or make is Tasks or len(promises) > 1, "every step was the same"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("make", [ReturnsAtOnce, GivesNothing, Grows])
def test_blocks_that_return_at_once_are_planned_for_all_the_same(make: Callable[[], nn.Module], share: float) -> None:
    """They may work in another step, and are then held as blocks like them are."""
    fitted, plain = fitted_at(make(), share, x := batch(ROWS))
    assert sum(bool(stage.saves) for stage in fitted.chain.stages) >= 8
    most = 0
    for seed in range(8):
        same_step(fitted, plain, seed, x)
        assert fitted.measured_peak_bytes <= fitted.promised_peak_bytes == fitted.plan.certificate.peak_bytes
        most = max(most, fitted.measured_peak_bytes)
        for model in (fitted.model, plain):
            if make is Grows:
                model.steps.fill_(1)
    # What comes around a block that returns nothing is held beside: the smallest budget makes room for it.
    assert not fitted.deviations or (make is GivesNothing and share == 0)
    assert most > 0.8 * fitted.promised_peak_bytes, "steps came close to what was promised"


@pytest.mark.parametrize("make", [Loop, Universal])
def test_calls_beyond_those_measured_are_recomputed_and_planned_for(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    make_plan = PlanMaker.make
    monkeypatch.setattr(PlanMaker, "make", lambda self, *args: measured.append(args) or make_plan(self, *args))
    model, x = make(), batch(ROWS)
    smallest_bytes, _ = smallest_and_largest(model, x, torch.tensor(2))
    plain = copy.deepcopy(model)
    inputs = 9 if make is Loop else 5
    fitted = fit(
        model, (x, torch.tensor(2)), smallest_bytes + inputs * x.nbytes, strategy="every"
    )  # no room for a block
    calls = len(fitted.chain)
    measured.clear()
    ran = [block for block in model.modules() if isinstance(block, Block)]
    for block in ran:
        block.tally.count = 0
    same_step(fitted, plain, 0, x, torch.tensor(3))
    assert sum(block.tally.count for block in ran) == 2 * (9 if make is Loop else 5), (
        "once in forward, once in backward"
    )
    for seed, times in enumerate((2, 3, 1, 3)):
        same_step(fitted, plain, seed, x, torch.tensor(times))
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert len(fitted.chain) == calls + (3 if make is Loop else 1)
    assert not measured


def test_a_call_for_which_there_is_room_is_kept() -> None:
    model = Loop()
    _, largest_bytes = smallest_and_largest(model, x := batch(ROWS), torch.tensor(2))
    fitted = fit(model, (x, torch.tensor(2)), 3 * largest_bytes)
    for block in model.blocks:
        block.tally.count = 0
    fitted(x, torch.tensor(3)).backward()
    assert [block.tally.count for block in model.blocks] == [3, 3, 3]


def test_a_deeper_step_that_fails_is_measured_when_it_comes_again() -> None:
    fitted, plain = fitted_at(Loop(), 0.0, x := batch(ROWS), torch.tensor(2))
    with pytest.raises(BudgetExceeded):
        fitted(x, torch.tensor(8)).backward()
    fitted.model.zero_grad()
    same_step(fitted, plain, 0, x, torch.tensor(8))
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    same_step(fitted, plain, 0, x, torch.tensor(2))
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


# ---- the arithmetic


def measured(model: nn.Module, *args: Any) -> Measured:
    return run_measured(model, args, {}, 1, WallClock(), 1)


def trees(count: int) -> list[tuple[Node, ...]]:
    """Plans for a chain whose first and last stage are kept always."""
    last, blocks = count - 1, range(1, count - 1)
    half = count // 2
    rest = " ".join(map(str, range(half, last)))
    nested = "1"
    for number in blocks[1:]:
        nested = f"({nested}) {number}"
    return [
        parse_tree(text)
        for text in (
            " ".join(map(str, range(count))),
            " ".join(["0", *(f"({n})" for n in blocks), str(last)]),
            f"0 (1 {' '.join(map(str, range(2, half)))}) {rest} {last}",
            f"0 ({nested}) {last}",
        )
    ]


@pytest.mark.parametrize("position", [1, 3, 6])
def test_a_chain_with_more_calls_is_that_of_a_deeper_model(position: int) -> None:
    model, x = Loop(3), batch(ROWS)
    short, deep = measured(model, x, torch.tensor(2)), measured(model, x, torch.tensor(3))
    modules = list(model.blocks)
    extra = [ExtraCall(position, modules[(position + n) % 3], 1 + (position + n) % 3) for n in range(3)]
    longer = with_calls(short, extra, {})
    assert longer is not None
    assert list(longer.modules) == list(deep.modules) or position % 3
    assert len(longer.chain) == len(deep.chain)
    for tree in trees(len(deep.chain)):
        assert simulate(longer.chain, tree).peak_bytes == simulate(deep.chain, tree).peak_bytes


def test_a_chain_without_some_calls_is_that_of_a_shallower_model() -> None:
    model, x = Loop(2), batch(ROWS)
    deep, short = measured(model, x, torch.tensor(4)), measured(model, x, torch.tensor(3))
    for tree in trees(len(deep.chain)):
        for skipped in ({1, 2}, {3, 6}, {7, 8}, {1, 8}):
            chain, left = without(deep.chain, tree, skipped)
            assert len(chain) == len(short.chain)
            assert simulate(chain, left).peak_bytes == simulate(short.chain, left).peak_bytes


class Skipping(nn.Module):
    """Blocks of three kinds, of which some are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mixed_blocks.Block(number % 3) for number in range(mixed_blocks.COUNT))
        self.gain = nn.Parameter(torch.ones(8))
        self.skipped: frozenset[int] = frozenset()

    def forward(self, x: Tensor) -> Tensor:
        x, gain = x.sin(), self.gain.exp()
        for number, block in enumerate(self.blocks):
            if number not in self.skipped:
                x = block(x, gain)
        return x.exp().sum()


def test_random_plans_hold_without_random_blocks_what_is_promised() -> None:
    generator, x = random.Random(5), batch(5, 8)
    model = Skipping()
    plain = copy.deepcopy(model)
    fitted = fit(model, x, "1MiB")
    chain, gaps = fitted.chain, 0
    for seed in range(150):
        tree = (Keep(0), *random_nodes(generator, 1, mixed_blocks.COUNT), Keep(mixed_blocks.COUNT + 1))
        put_plan(fitted, tree, simulate(chain, tree).peak_bytes)
        skipped = frozenset(number for number in range(mixed_blocks.COUNT) if generator.random() < 0.4)
        model.skipped = plain.skipped = skipped
        same_step(fitted, plain, seed, x)
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes, (tree_text(tree), skipped)
        gaps += fitted.promised_peak_bytes < fitted.plan.certificate.peak_bytes
    assert gaps > 75


def test_frames_that_are_left_empty_go() -> None:
    model, x = Loop(3), batch(ROWS)
    chain = measured(model, x, torch.tensor(2)).chain
    tree = parse_tree("0 (1 (2 3) (4)) (5) 6 7")
    for skipped, text in (({2, 3}, "0 (1 (2)) (3) 4 5"), ({5}, "0 (1 (2 3) (4)) 5 6"), ({1, 2, 3, 4, 5, 6}, "0 1")):
        _, left = without(chain, tree, skipped)
        assert tree_text(left) == text
        flatten(left)


class Group(nn.Module):
    """Blocks of a level, as networks of several resolutions have them; more than one are planned one by one."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = blocks(count)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Levels(nn.Module):
    def __init__(self, container: Callable[[list[nn.Module]], nn.Module], *counts: int) -> None:
        super().__init__()
        self.levels = container([Group(count) for count in counts])

    def forward(self, x: Tensor) -> Tensor:
        for level in self.levels.values() if isinstance(self.levels, nn.ModuleDict) else self.levels:
            x = level(x)
        return x.square().mean()


@pytest.mark.parametrize("counts", [(1, 3), (3, 1, 1), (1, 4, 2)])
@pytest.mark.parametrize(
    "container",
    [
        nn.ModuleList,
        lambda levels: nn.Sequential(*levels),
        lambda levels: nn.ModuleDict({f"level{n}": level for n, level in enumerate(levels)}),
    ],
    ids=["ModuleList", "Sequential", "ModuleDict"],
)
def test_a_block_that_is_planned_call_by_call_is_not_one_that_did_not_run(container, counts):
    """It was taken for one that another step called besides, was recomputed as a whole, and its own calls were not seen."""
    torch.manual_seed(0)
    model, x = Levels(container, *counts), batch(ROWS)
    plain = copy.deepcopy(model)
    expected = gradients(plain, lambda: plain(x))
    whole = fit(copy.deepcopy(model), x, 1 << 30, repeats=1)
    smallest = whole.plan.certificate.smallest_budget_bytes
    assert not whole.latest.measured.idle
    for budget in (smallest, 2 * smallest):
        fitted = fit(copy.deepcopy(model), x, budget, repeats=1)
        assert fitted.plan.certificate.recompute_s > 0
        assert gradients(fitted.model, lambda fitted=fitted: fitted(x)) == expected
        assert fitted.deviations == []
        assert fitted.measured_peak_bytes == fitted.plan.certificate.peak_bytes
