"""The solver against brute force, against a second implementation, and its promises on random chains."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import Chain, Keep, Stage, plan_chain, simulate
from gpuckpt.planning.solver import solve
from gpuckpt.planning.solver.problem import build_problem
from gpuckpt.planning.solver.slots import make_pieces


def peak_of(objective: str) -> Callable:
    return lambda run: run.peak_bytes if objective == "held" else run.total_peak_bytes


def check_against_every_tree(chain: Chain, trees: list, rng: random.Random, objective: str) -> None:
    runs = [simulate(chain, tree) for tree in trees]
    peaks = [peak_of(objective)(run) for run in runs]
    least, most = min(peaks), max(peaks)
    for budget in {least, least + 1, rng.randint(least, most)}:
        plan = plan_chain(chain, budget, objective=objective).certificate
        expected = min(run.step_s for run, peak in zip(runs, peaks, strict=True) if peak <= budget)
        assert plan.step_s == pytest.approx(expected, rel=1e-6), (budget, objective)
        assert plan.gap == 0.0
        assert plan.smallest_budget_bytes == least
    if least:
        with pytest.raises(BudgetExceeded) as caught:
            plan_chain(chain, least - 1, objective=objective)
        assert caught.value.need == least


@pytest.mark.parametrize("batch", range(8))
def test_equals_brute_force(batch: int, chain_of, trees_of) -> None:
    for seed in range(batch * 250, (batch + 1) * 250):
        rng = random.Random(seed)
        chain = chain_of(rng, rng.choice([1, 2, 2, 3, 3, 3, 4]), spills=0.0)
        check_against_every_tree(chain, list(trees_of(chain)), rng, "total" if seed % 4 == 0 else "held")


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force_on_five_and_six_stages(seed: int, chain_of, trees_of) -> None:
    rng = random.Random(seed)
    chain = chain_of(rng, 5 + seed % 2, options=0.2 if seed % 2 == 0 else 0.0, spills=0.0)
    check_against_every_tree(chain, list(trees_of(chain)), rng, "total" if seed % 4 < 2 else "held")


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(10))
def test_equals_brute_force_at_length(batch: int, chain_of, trees_of) -> None:
    for seed in range(10_000 + batch * 40, 10_000 + (batch + 1) * 40):
        rng = random.Random(seed)
        chain = chain_of(rng, rng.choice([5, 5, 6]), options=0.1, spills=0.0)
        check_against_every_tree(chain, list(trees_of(chain)), rng, rng.choice(["held", "total"]))


def plain_chain(rng: random.Random, n: int) -> Chain:
    """Stages that save their input, sometimes their output, and bytes of their own; whole costs, one way to keep."""
    sizes = [rng.randint(1, 4) for _ in range(n + 1)] + [rng.randint(0, 8) for _ in range(n)]
    stages = []
    for i in range(n):
        saves = (i, n + 1 + i) + ((i + 1,) if rng.random() < 0.3 else ())
        forward_s = rng.randint(1, 9)
        tail_s = rng.randint(0, forward_s)
        stages.append(Stage(f"s{i}", forward_s, rng.randint(1, 9), saves, (i,), (), (i + 1,), tail_s=tail_s))
    return Chain(tuple(stages), tuple(sizes))


def second_implementation(chain: Chain, budget: int) -> float:
    """Least seconds of a step, by recursion over where the first frame of a stretch ends, in bytes, on plain chains.

    `stretch(i, j, room, ready)`: seconds of recomputing (once) and keeping stages i..j, forwards only, with `room` bytes;
    `ready`: the input of stage i is held by somebody else. Tries frames that end a stretch too.
    """
    n, size = len(chain), chain.storages
    forward = [stage.forward_s for stage in chain.stages]

    @cache
    def stretch(i: int, j: int, room: int, ready: bool, top: bool) -> float:
        if room < 0:
            return math.inf
        if i > j:
            return 0.0
        saves = set(chain.stages[i].saves) - ({i} if ready else set())
        stopped = chain.stages[i].tail_s if i == j and not top else 0
        best = forward[i] - stopped + stretch(i + 1, j, room - sum(size[x] for x in saves), i + 1 in saves, top)
        inside = room - (0 if ready else size[i])
        for k in range(i, j + 1):
            if k == j and ready and not top:
                continue
            once = 0.0 if k == j and not top else sum(forward[i : k + 1])
            if once < best:
                best = min(best, once + stretch(i, k, inside, True, False) + stretch(k + 1, j, inside, False, top))
        return best

    return stretch(0, n - 1, budget, False, True) + sum(stage.backward_s for stage in chain.stages)


@pytest.mark.parametrize(
    ("n", "share"), [(10, 0.4), (12, 0.6), (15, 0.35), (20, 0.5), (25, 0.3), (30, 0.25), (60, 0.07)]
)
def test_equals_a_second_implementation(n: int, share: float) -> None:
    for seed in range(6 if n < 20 else 1):
        chain = plain_chain(random.Random(1000 * n + seed), n)
        most = simulate(chain, tuple(Keep(i) for i in range(n))).peak_bytes
        budget = max(int(most * share), plan_chain(chain, most).certificate.smallest_budget_bytes)
        assert plan_chain(chain, budget).certificate.step_s == second_implementation(chain, budget)


def check_promises(chain: Chain, objective: str, rng: random.Random) -> None:
    peak = peak_of(objective)
    most = peak(simulate(chain, tuple(Keep(i) for i in range(len(chain)))))
    smallest = plan_chain(chain, most, objective=objective).certificate.smallest_budget_bytes
    earlier = None
    for budget in sorted({smallest, most, *(rng.randint(smallest, most + 5) for _ in range(3))}):
        plan = plan_chain(chain, budget, objective=objective)
        run = simulate(chain, plan.tree)
        assert peak(run) <= budget
        assert (run.peak_bytes, run.step_s) == (plan.certificate.peak_bytes, plan.certificate.step_s)
        if earlier is not None and plan.certificate.gap == 0.0 == earlier.gap:
            assert run.step_s <= earlier.step_s * (1 + 1e-6)
            if objective == "held":
                assert run.peak_bytes >= earlier.peak_bytes
        earlier = plan.certificate
    if smallest:
        with pytest.raises(BudgetExceeded) as caught:
            plan_chain(chain, smallest - 1, objective=objective)
        assert caught.value.need == smallest


objectives = st.sampled_from(["held", "held", "total"])


@settings(max_examples=250, deadline=None, derandomize=True)
@given(rng=st.randoms(use_true_random=False), n=st.integers(1, 14), objective=objectives)
def test_promises_hold(chain_of, rng: random.Random, n: int, objective: str) -> None:
    check_promises(chain_of(rng, n, spills=0.0), objective, rng)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(rng=st.randoms(use_true_random=False), n=st.integers(1, 14), objective=objectives)
def test_promises_hold_on_ten_thousand_chains(chain_of, rng: random.Random, n: int, objective: str) -> None:
    check_promises(chain_of(rng, n, spills=0.0), objective, rng)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rng=st.randoms(use_true_random=False), n=st.integers(1, 12), objective=objectives, slots=st.integers(5, 60))
def test_never_over_where_storages_are_shared_in_any_way_and_slots_are_coarse(
    wild_chain_of, rng: random.Random, n: int, objective: str, slots: int
) -> None:
    chain, peak = wild_chain_of(rng, n), peak_of(objective)
    most = peak(simulate(chain, tuple(Keep(i) for i in range(n))))
    for budget in {rng.randint(0, most), rng.randint(0, most)}:
        try:
            plan = plan_chain(chain, budget, objective=objective, slots=slots)
        except BudgetExceeded as error:
            budget = max(budget + 1, error.need)
            plan = plan_chain(chain, budget, objective=objective, slots=slots)
        assert peak(simulate(chain, plan.tree)) <= budget


def test_coarse_slots_cost_time_and_never_the_budget() -> None:
    for seed in range(4):
        rng = random.Random(seed)
        sizes = [rng.randint(10**6, 10**7) for _ in range(80)]
        stages = (Stage(f"s{i}", rng.uniform(1, 9), 1.0, (i, 40 + i), (i,), (), ()) for i in range(40))
        chain = Chain(tuple(stages), tuple(sizes))
        budget = sum(sizes) // rng.choice([2, 3, 5])
        fine = plan_chain(chain, budget, slots=3000).certificate
        coarse = plan_chain(chain, budget, slots=150).certificate
        assert max(fine.peak_bytes, coarse.peak_bytes) <= budget
        assert 0.0 <= fine.gap <= coarse.gap + 1e-9
        # The stated gap is a proof: what finer slots find is within it.
        assert fine.step_s >= coarse.step_s / (1 + coarse.gap) - 1e-9
        assert coarse.step_s <= fine.step_s * 1.1


def periodic_chain(rng: random.Random, head: int, period: int, repeats: int, tail: int) -> Chain:
    kinds = [[rng.randint(0, 9) for _ in range(4)] for _ in range(head + period + tail)]
    order = [*range(head), *[head + k for k in range(period)] * repeats, *range(head + period, head + period + tail)]
    sizes, stages = [3, 5], []
    for x, kind in enumerate(order):
        own, out = len(sizes), len(sizes) + 1
        sizes += [kinds[kind][0], kinds[kind][1]]
        before = 0 if x == 0 else own - 1
        extras = (1,) if kind >= head else ()
        saves = (before, own) if kinds[kind][1] % 2 else (before, own, out)
        stages.append(
            Stage(f"s{x}", kinds[kind][2], kinds[kind][3], saves, (before,), extras, (out,), kinds[kind][1], 2)
        )
    return Chain(tuple(stages), tuple(sizes))


@pytest.mark.parametrize("seed", range(12))
def test_equal_blocks_share_rows_and_nothing_changes(seed: int, monkeypatch) -> None:
    rng = random.Random(seed)
    chain = periodic_chain(rng, rng.randint(0, 3), rng.randint(1, 5), rng.randint(5, 9), rng.randint(0, 3))
    problem = build_problem(chain, rng.choice(["held", "total"]))
    most = simulate(chain, tuple(Keep(i) for i in range(len(chain)))).total_peak_bytes
    shared = solve(chain, problem, most, engine="numpy")
    assert shared.pieces.body_end > shared.pieces.body_start
    monkeypatch.setattr("gpuckpt.planning.solver.slots._periodic_body", lambda problem, run_end: (problem.n, -1, 1))
    alone = solve(chain, problem, most, engine="numpy")
    assert shared.pieces.rows < alone.pieces.rows
    assert np.array_equal(shared.seconds_by_slots, alone.seconds_by_slots)


@pytest.mark.parametrize(("objective", "slots", "block"), [("held", 300, 8), ("total", 300, 8), ("total", 1100, 21)])
def test_compiled_tables_equal_the_plain_ones(objective: str, slots: int, block: int, chain_of, monkeypatch) -> None:
    monkeypatch.setattr("gpuckpt.planning.solver.slots._block_size", lambda n: block)
    for seed, n in enumerate((1, 2, 9, 23, 50)):
        chain = chain_of(random.Random(seed), n, fixed=0.03)
        chains = [chain, periodic_chain(random.Random(seed), 2, 1 + seed, 12, 2)]
        for each in chains:
            problem = build_problem(each, objective)
            most = simulate(each, tuple(Keep(i) for i in range(len(each)))).total_peak_bytes
            plain = solve(each, problem, most, engine="numpy", slots=slots)
            compiled = solve(each, problem, most, engine="numba", slots=slots)
            assert np.allclose(plain.tables.pieces, compiled.tables.pieces, rtol=1e-5)
            assert np.allclose(plain.seconds_by_slots, compiled.seconds_by_slots, rtol=1e-5)


def test_a_thousand_equal_blocks_are_few_rows() -> None:
    chain = periodic_chain(random.Random(0), 1, 1, 1000, 1)
    # One row a length for each kind of start: the head, the first block, and all others; half a million if all differed.
    assert make_pieces(build_problem(chain)).rows <= 3 * len(chain)


@pytest.mark.parametrize("batch", range(4))
def test_the_gap_holds_where_bytes_are_shared_in_any_way(batch: int, wild_chain_of, trees_of) -> None:
    inexact = 0
    for seed in range(batch * 40, (batch + 1) * 40):
        rng = random.Random(seed)
        chain = wild_chain_of(rng, rng.choice([2, 3, 4]))
        runs = [simulate(chain, tree) for tree in trees_of(chain)]
        least, most = min(run.peak_bytes for run in runs), max(run.peak_bytes for run in runs)
        for budget in {most, rng.randint(least, most)}:
            try:
                plan = plan_chain(chain, budget).certificate
            except BudgetExceeded:  # its arrays charge bytes more than once, and nothing seemed to fit
                continue
            inexact += plan.gap > 0
            expected = min(run.step_s for run in runs if run.peak_bytes <= budget)
            assert plan.step_s <= expected * (1 + plan.gap) * (1 + 1e-6), (seed, budget)
    assert inexact, "every plan was proven optimal: nothing was tried"
