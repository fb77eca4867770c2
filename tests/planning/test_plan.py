"""Plan files, tree text, and what `plan_chain` refuses."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from gpuckpt.errors import BudgetExceeded, InvalidPlan
from gpuckpt.planning import (
    STRATEGIES,
    Chain,
    Keep,
    Plan,
    Recompute,
    Stage,
    parse_tree,
    plan_chain,
    simulate,
    tree_text,
)


def blocks(n: int) -> Chain:
    """n equal stages; each saves its input of 3 bytes and 10 of its own."""
    stages = (Stage(f"s{i}", 1, 2, (i, n + i), (i,), (), (i + 1,) if i < n - 1 else (), 3) for i in range(n))
    return Chain(tuple(stages), (3,) * n + (10,) * n)


@pytest.mark.parametrize("text", ["0", "0 (1 2 (3 4) 5) 6:spill", "((0) 1)", "(((0)))", "(0) (1)", "(0:a (1 2:b))"])
def test_tree_text_goes_both_ways(text: str) -> None:
    assert tree_text(parse_tree(text)) == text


def test_random_trees_survive_text(chain_of, tree_of) -> None:
    for seed in range(100):
        rng = random.Random(seed)
        tree = tree_of(rng, chain_of(rng, rng.randint(1, 12)))
        assert parse_tree(tree_text(tree)) == tree


@pytest.mark.parametrize("text", ["(0", "0)", "1", "0 0", "0 ()", "0 x", "0 -1", "0 1.5", "(0 2)", "0 ²"])
def test_text_that_is_no_tree_is_refused(text: str) -> None:
    with pytest.raises(InvalidPlan):
        parse_tree(text)


def test_a_plan_survives_a_file() -> None:
    chain = blocks(12)
    for strategy in ("optimal", *STRATEGIES):
        plan = plan_chain(chain, 156, strategy)
        assert Plan.from_json(plan.to_json(), chain) == plan
        assert hash(Plan.from_json(plan.to_json())) == hash(plan)
        assert simulate(chain, plan.tree).peak_bytes == plan.certificate.peak_bytes == plan.certificate.layout_bytes


def test_a_plan_for_another_model_is_refused() -> None:
    plan = plan_chain(blocks(12), 80)
    with pytest.raises(InvalidPlan, match="fingerprint"):
        Plan.from_json(plan.to_json(), blocks(13))
    with pytest.raises(InvalidPlan, match="fingerprint"):
        plan.check(blocks(12).with_unit(512))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "gpuckpt.plan/9"),
        (("tree",), "0 ("),
        (("tree",), None),
        (("budget_bytes",), "80"),
        (("objective",), "most"),
        (("certificate", "peak_bytes"), -1),
        (("certificate", "peak_bytes"), 1.5),
        (("certificate", "step_s"), float("nan")),
        (("certificate", "recompute_s"), None),
        (("certificate", "peak_step"), 3),
        (("certificate", "colour"), 3),
        (("fingerprint",), 3),
    ],
)
def test_a_damaged_plan_file_is_refused(path: tuple[str, ...], value: object) -> None:
    record = json.loads(plan_chain(blocks(4), 80).to_json())
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InvalidPlan):
        Plan.from_json(json.dumps(record))


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_file_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(InvalidPlan):
        Plan.from_json(text)


def test_a_budget_below_the_minimum_says_what_would_do() -> None:
    with pytest.raises(BudgetExceeded) as caught:
        plan_chain(blocks(12), 15)
    assert (caught.value.need, caught.value.available) == (16, 15)
    assert plan_chain(blocks(12), 16).certificate.peak_bytes == 16
    with pytest.raises(BudgetExceeded, match="'optimal' needs 16") as caught:
        plan_chain(blocks(12), 30, "sqrt")
    assert plan_chain(blocks(12), caught.value.need, "sqrt").certificate.peak_bytes == caught.value.need


@pytest.mark.parametrize("budget", [-1, 1.5, "80", True, None])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget: object) -> None:
    with pytest.raises((TypeError, ValueError), match="budget_bytes"):
        plan_chain(blocks(4), budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", [{"strategy": "best"}, {"objective": "most"}, {"slots": 0}, {"engine": "cuda"}])
def test_arguments_that_make_no_sense_are_refused(argument: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        plan_chain(blocks(4), 30, **argument)


def test_every_strategy_fits_or_says_so(chain_of) -> None:
    for seed in range(15):
        chain = chain_of(random.Random(seed), 8)
        most = simulate(chain, tuple(Keep(i) for i in range(8))).peak_bytes
        for strategy in STRATEGIES:
            try:
                plan = plan_chain(chain, most * 3 // 4, strategy)
            except BudgetExceeded:
                continue
            assert plan.certificate.peak_bytes <= most * 3 // 4
            best = plan_chain(chain, most * 3 // 4).certificate
            assert best.step_s <= plan.certificate.step_s + 1e-9


def test_uniform_is_what_checkpoint_sequential_does() -> None:
    plan = plan_chain(blocks(11), 1000, "uniform")
    assert tree_text(plan.tree) == "0 1 2 3 4 5 6 7 8 9 10"
    from gpuckpt.planning import strategies

    assert tree_text(strategies.uniform(blocks(11), 3)) == "(0 1 2) (3 4 5) 6 7 8 9 10"
    assert tree_text(strategies.sqrt(blocks(9))) == "(0 1 2) (3 4 5) (6 7 8)"
    assert strategies.every(blocks(2)) == (Recompute((Keep(0),)), Recompute((Keep(1),)))


def test_importing_planning_costs_no_compiler() -> None:
    code = (
        "import sys, gpuckpt.planning as p; c = p.Chain((p.Stage('a', 1, 1, (0,), ()), p.Stage('b', 1, 1, (1,), ())), (9, 9));"
        "p.plan_chain(c, 9); print([m for m in ('numba', 'torch', 'triton', 'cupy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_prints_as_a_table() -> None:
    plan = plan_chain(blocks(12), 80)
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "optimal plan"
    held = {line.split()[0]: line for line in lines[2 : lines.index("")]}
    # Every stage stands in one line of the top level, in order.
    covered = [stage for span in held for stage in range(int(span.split("..")[0]), int(span.split("..")[-1]) + 1)]
    assert covered == list(range(12))
    for node in plan.tree:
        if isinstance(node, Recompute):
            assert any("input only" in line and tree_text_inside(node) in line for line in held.values())
    assert f"({plan.certificate.peak_bytes} B)" in str(plan)
    assert "proven optimal" in str(plan)
    assert "..." not in repr(plan)


def tree_text_inside(node: Recompute) -> str:
    """The children of a frame as text, by hand and recursion."""
    parts = [str(n.stage) if isinstance(n, Keep) else f"({tree_text_inside(n)})" for n in node.children]
    return " ".join(parts)


def test_a_long_plan_and_a_long_chain_print_in_few_narrow_lines() -> None:
    chain = blocks(500)
    plan = plan_chain(chain, 3000, "every")
    for text in (str(chain), str(plan)):
        lines = text.splitlines()
        assert len(lines) < 60
        assert max(map(len, lines)) <= 80
    assert "... 460 more ..." in str(plan)
    assert len(repr(plan)) < 200
    assert repr(chain) == "Chain('chain', 500 stages, 1000 storages)"
