"""Plans that offload: against every tree, against both halves of the choice, and by more bytes here and there."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import ON_HOST, Chain, Keep, Recompute, Stage, Variant, plan_chain, simulate, with_spill
from gpuckpt.planning._offload import without_offload


def blocks(n: int, rng: random.Random | None = None) -> Chain:
    """n stages of 1 s forward and 2 s backward; each saves its input of 4 bytes and 12 of its own. `rng`: about that."""

    def about(value: float) -> float:
        return value if rng is None else value * rng.uniform(0.5, 2.0)

    sizes = [round(about(size)) for size in (4,) * (n + 1) + (12,) * n]
    stages = (Stage(f"s{i}", about(1), about(2), (i, n + 1 + i), (i,), (), (i + 1,), 4) for i in range(n))
    return Chain(tuple(stages), tuple(sizes))


def offloading_everything(chain: Chain) -> list[tuple]:
    """Every stage spilled, and every one recomputed from an input on the host."""
    spilled = tuple(Keep(i, "spill" if stage.variants else "keep") for i, stage in enumerate(chain.stages))
    inputs = tuple(
        Recompute((Keep(i),), "keep" if stage.input_moved_s is None else "spill")
        for i, stage in enumerate(chain.stages)
    )
    return [spilled, inputs]


@pytest.mark.parametrize("batch", range(6))
def test_no_tree_is_faster_than_the_gap_says(batch: int, chain_of, trees_of) -> None:
    inexact = offloaded = refused = 0
    for seed in range(batch * 25, (batch + 1) * 25):
        rng = random.Random(seed)
        chain = chain_of(rng, rng.choice([2, 3, 3, 4]), spills=0.8)
        runs = [simulate(chain, tree) for tree in trees_of(chain)]
        objective = rng.choice(["held", "held", "total"])
        peaks = [run.peak_bytes if objective == "held" else run.total_peak_bytes for run in runs]
        host_bytes = rng.choice([None, rng.randint(0, 12)])
        for budget in {min(peaks), rng.randint(min(peaks), max(peaks)), max(peaks)}:
            fitting = [
                run.step_s
                for run, peak in zip(runs, peaks, strict=True)
                if peak <= budget and (host_bytes is None or run.host_peak_bytes <= host_bytes)
            ]
            try:
                plan = plan_chain(chain, budget, objective=objective, host_bytes=host_bytes).certificate
            except BudgetExceeded:
                refused += bool(fitting)  # not every tree is weighed
                continue
            assert fitting, (seed, budget, host_bytes)
            assert min(fitting) <= plan.step_s * (1 + 1e-6)
            assert plan.step_s <= min(fitting) * (1 + plan.gap) + 1e-5, (seed, budget, host_bytes)
            inexact += plan.gap > 0
            offloaded += plan.host_peak_bytes > 0
    assert min(inexact, offloaded) > 5 > refused


@pytest.mark.parametrize("link", [2.0, 8.0, 32.0, 512.0])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_never_slower_than_recompute_alone_or_offload_alone_and_monotone(link: float, seed: int | None) -> None:
    rng = None if seed is None else random.Random(seed)
    chain = with_spill(blocks(12, rng), link, latency_s=0.01)
    alone = without_offload(chain)
    others = [simulate(chain, tree) for tree in offloading_everything(chain)]
    most = simulate(chain, tuple(Keep(i) for i in range(12))).peak_bytes
    seconds: dict[tuple[int, int], float] = {}
    used = 0
    budgets, hosts = range(24, most + 1, 12), (0, 30, 60, 120, 10**6)
    for budget in budgets:
        for host in hosts:
            try:
                found = plan_chain(chain, budget, host_bytes=host).certificate
            except BudgetExceeded:
                continue
            seconds[budget, host] = found.step_s
            used += found.host_peak_bytes > 0
            assert max(found.peak_bytes - budget, found.host_peak_bytes - host) <= 0
            rivals = [run.step_s for run in others if run.peak_bytes <= budget and run.host_peak_bytes <= host]
            try:
                rivals.append(plan_chain(alone, budget).certificate.step_s)
            except BudgetExceeded:
                assert rivals or found.host_peak_bytes
            assert all(found.step_s <= rival * (1 + 1e-9) for rival in rivals)
    assert used > 5 or link <= 8.0
    for (budget, host), step_s in seconds.items():
        for more in ((budget + 12, host), *((budget, other) for other in hosts if other > host)):
            assert seconds.get(more, 0.0) <= step_s * (1 + 1e-9)


def test_a_fast_link_hides_all_and_a_slow_one_is_left_alone() -> None:
    hidden = plan_chain(with_spill(blocks(12), 64.0), 64).certificate
    assert hidden.recompute_s == 0.0
    assert hidden.step_s == pytest.approx(36.0, abs=0.51)  # the first one to come back is waited for
    alone = plan_chain(blocks(12), 64).certificate
    slow = plan_chain(with_spill(blocks(12), 0.1), 64).certificate
    assert (slow.host_peak_bytes, slow.step_s) == (0, alone.step_s)
    assert hidden.step_s < alone.step_s


def test_inputs_on_the_host_where_a_stage_takes_most_of_the_budget() -> None:
    """Long contexts: what one block saves takes most of the budget, and its input the link a twentieth of its forward."""
    sizes = (4,) * 17 + (88,) * 16
    stages = (Stage(f"s{i}", 1, 2, (i, 17 + i), (i,), (), (i + 1,), 4) for i in range(16))
    chain = with_spill(Chain(tuple(stages), sizes), 80.0)
    found = plan_chain(chain, 104)
    assert sum(isinstance(node, Recompute) and node.variant == "spill" for node in found.tree) >= 13
    # The input of the first stays, as the last block's does; one more is on its way.
    assert found.certificate.peak_bytes == 4 + 92 + 4
    assert found.certificate.recompute_s == 15
    assert found.certificate.step_s == pytest.approx(16 * 3 + 15 + 0.05)  # the first that comes back is waited for
    assert plan_chain(without_offload(chain), 104).certificate.recompute_s > 24


def test_what_is_dear_crosses_the_link_and_the_rest_is_made_again() -> None:
    """Blocks that save 16 bytes over a link of 8 bytes a second: of these 6 take a second to make, and the others a tenth."""
    ids = [(i, 13 + 2 * i, 14 + 2 * i) for i in range(12)]
    stages = []
    for i, saves in enumerate(ids):
        part = Variant("part", saves[:2], 1.0, 2.1, remade=saves[2:], again_s=0.1)
        stages.append(Stage(f"s{i}", 1.0, 2.0, saves, saves[:1], (), (i + 1,), 4, variants=(part,)))
    chain = Chain(tuple(stages), (*[4] * 13, *[2, 10] * 12))
    moved = with_spill(chain, 8.0)
    assert [option.name for option in moved.stages[3].options] == ["keep", "part", "spill", f"part{ON_HOST}"]
    hosted = moved.stages[3].option(f"part{ON_HOST}")
    assert (hosted.saves, hosted.spilled, hosted.remade) == ((), ids[3][:2], ids[3][2:])
    assert (hosted.moved_s, hosted.forward_s, hosted.backward_s) == (0.75, 1.75, 2.85)
    found = plan_chain(moved, 40)
    assert sum(isinstance(node, Keep) and node.variant.endswith(ON_HOST) for node in found.tree) >= 8
    assert found.certificate.step_s < 36 + 12 * 0.1 + 1
    assert found.certificate.recompute_s <= 12 * 0.1 + 1e-9
    without = with_spill(Chain(tuple(replace(stage, variants=()) for stage in stages), chain.storages), 8.0)
    for other in (chain, without):
        assert plan_chain(other, 40).certificate.step_s > 39


def test_a_device_and_a_host_that_are_both_too_small_are_refused_with_what_would_do() -> None:
    plain, chain = blocks(8), with_spill(blocks(8), 64.0)
    with pytest.raises(BudgetExceeded) as alone:
        plan_chain(plain, 18)
    least = plan_chain(chain, 10**6).certificate.smallest_budget_bytes
    assert least <= alone.value.need
    with pytest.raises(BudgetExceeded) as refused:
        plan_chain(chain, 18, host_bytes=10)
    assert plan_chain(chain, refused.value.need, host_bytes=10).certificate.peak_bytes <= refused.value.need
    with pytest.raises(ValueError, match="host_bytes is -1"):
        plan_chain(chain, 64, host_bytes=-1)


def test_a_deep_chain_is_planned() -> None:
    chain = with_spill(blocks(400), 16.0)
    plan = plan_chain(chain, 200)
    assert plan.certificate.peak_bytes <= 200
    plan.check(chain)


def test_a_small_host_is_used_and_each_byte_of_it_buys_time() -> None:
    chain = with_spill(blocks(24), 1e6)
    peak = simulate(chain, tuple(Keep(i) for i in range(24))).peak_bytes
    for budget in (peak * 4 // 10, peak * 6 // 10):
        plans = [plan_chain(chain, budget, host_bytes=peak * percent // 100).certificate for percent in (0, 10, 20, 40)]
        steps = [plan.step_s for plan in plans]
        assert steps == sorted(steps, reverse=True)
        assert steps[0] > steps[1] > steps[3]
        assert plans[1].host_peak_bytes > peak // 20
