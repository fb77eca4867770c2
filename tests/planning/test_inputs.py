"""Parameters of gpuckpt.planning with inputs of every kind (see tests/inputs.py), damaged files, chains of every length."""

from __future__ import annotations

import json
import random
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuckpt.errors import InvalidChain, InvalidPlan
from gpuckpt.planning import (
    STRATEGIES,
    Chain,
    Keep,
    Plan,
    Recompute,
    Stage,
    Variant,
    certify,
    cut_chain,
    in_flight,
    parse_tree,
    plan_chain,
    plan_frontier,
    plan_pipeline,
    simulate,
    step_seconds,
    tree_text,
    with_spill,
)
from tests.inputs import SECONDS, Call, Make, rows_of, within

CHAIN = Chain(tuple(Stage(f"s{i}", 1.0, 2.0, saves=(i,), inputs=(i - 1,) if i else ()) for i in range(6)), (100,) * 6)
TREE = tuple(map(Keep, range(6)))


def stage_used(**fields: Any) -> None:
    chain = Chain((Stage(**fields), Stage("after", 1.0, 1.0, saves=(1,), inputs=(0,))), (10, 20))
    plan = plan_chain(chain, 1000)
    assert Plan.from_json(plan.to_json(), Chain.from_json(chain.to_json())) == plan


def variant_used(**fields: Any) -> None:
    stage_used(name="a", forward_s=1.0, backward_s=2.0, saves=(0,), variants=(Variant(**fields),))


def chain_used(**fields: Any) -> None:
    chain = Chain(**fields)
    plan_chain(chain, 10**6)
    repr(chain), str(chain)


def keep_used(**fields: Any) -> None:
    simulate(CHAIN, (Keep(**fields), *TREE[1:]))


def recompute_used(**fields: Any) -> None:
    simulate(CHAIN, (Recompute(**fields), *TREE[3:]))


def with_chain(method: str) -> Any:
    return lambda **arguments: getattr(CHAIN, method)(**arguments)


BLOCK = {"name": "a", "forward_s": 1.0, "backward_s": 2.0, "saves": (0,)}
PLAN = plan_chain(CHAIN, 400)
CALLS = {
    "Stage": Call(
        stage_used,
        names={"forward_s": "a forward of"},
        **BLOCK,
        inputs=(),
        extras=(),
        output=(0,),
        output_bytes=3,
        workspace_bytes=3,
        recomputable=True,
        variants=(),
        tail_s=0.5,
        again_bytes=3,
    ),
    "Variant": Call(
        variant_used,
        names={"name": "variant", "forward_s": "a forward of", "backward_s": "a backward of"},
        name="less",
        saves=(),
        forward_s=1.0,
        backward_s=2.0,
        spilled=(),
        remade=(),
        again_s=0.5,
    ),
    "Chain": Call(chain_used, stages=(Stage(**BLOCK),), storages=(10,), unit_bytes=1, name="chain"),
    "Chain.charge": Call(with_chain("charge"), ids=(0, 1)),
    "Chain.frame_holds": Call(with_chain("frame_holds"), names={"first": "last"}, first=0, last=1),
    "Chain.extras_of": Call(with_chain("extras_of"), names={"first": "last"}, first=0, last=1),
    "Chain.running_bytes": Call(with_chain("running_bytes"), stage=0, held=()),
    "Chain.part": Call(with_chain("part"), names={"first": "last"}, first=0, last=1),
    "Chain.with_unit": Call(with_chain("with_unit"), unit_bytes=512),
    "Chain.from_json": Call(Chain.from_json, names={"text": "a chain file"}, text=CHAIN.to_json()),
    "Plan.from_json": Call(Plan.from_json, names={"text": "a plan file"}, text=PLAN.to_json(), chain=CHAIN),
    "Plan.check": Call(PLAN.check, chain=CHAIN),
    "Keep": Call(keep_used, names={"variant": "option"}, stage=0, variant="keep"),
    "Recompute": Call(recompute_used, names={"children": "the frame"}, children=TREE[:3]),
    "parse_tree": Call(parse_tree, names={"text": "tree"}, text=tree_text(TREE)),
    "tree_text": Call(tree_text, tree=TREE),
    "simulate": Call(simulate, names={"tree": "the plan"}, chain=CHAIN, tree=TREE),
    "certify": Call(certify, names={"tree": "the plan"}, chain=CHAIN, tree=TREE, budget_bytes=1000, strategy="none"),
    "plan_chain": Call(
        plan_chain,
        chain=CHAIN,
        budget_bytes=400,
        strategy="optimal",
        objective="held",
        slots=500,
        engine="auto",
        host_bytes=100,
    ),
    "plan_frontier": Call(
        plan_frontier, names={"budgets": "budget_bytes"}, chain=CHAIN, budgets=3, strategy="optimal", objective="held"
    ),
    "plan_pipeline": Call(
        plan_pipeline, chain=CHAIN, ranks=2, budget_bytes=1000, micro_batches=2, schedule="interleaved", chunks=2
    ),
    "cut_chain": Call(cut_chain, chain=CHAIN, parts=2),
    "in_flight": Call(in_flight, schedule="interleaved", ranks=2, rank=0, micro_batches=2, chunks=2),
    "step_seconds": Call(
        step_seconds,
        forward_s=Make(lambda: [1.0, 1.0]),
        backward_s=Make(lambda: [2.0, 2.0]),
        micro_batches=2,
        schedule="interleaved",
        chunks=1,
    ),
    "with_spill": Call(
        with_spill,
        names={"name": "variant"},
        chain=CHAIN,
        bytes_per_s=1e9,
        latency_s=0.0,
        name="spill",
        staying=(),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_work(name):
    CALLS[name].works()


@pytest.mark.parametrize(("call", "parameter"), rows_of(CALLS))
def test_a_parameter_with_inputs_of_every_kind(call, parameter):
    call.check(parameter)


# ---- files


def test_a_file_of_numpys_numbers_is_one_of_plain_numbers():
    given = Chain(
        (Stage("a", np.float32(1.0), Fraction(1, 2), saves=(np.int64(0),), output_bytes=np.int32(7)),), (np.int64(10),)
    )
    plain = Chain((Stage("a", 1.0, 0.5, saves=(0,), output_bytes=7),), (10,))
    assert given.fingerprint() == plain.fingerprint()
    assert Chain.from_json(given.to_json()) == plain
    plan = plan_chain(given, np.int64(100))
    assert Plan.from_json(plan.to_json(), plain) == plan


@pytest.mark.parametrize(
    ("read", "text", "error"),
    [(Chain.from_json, CHAIN.to_json(), InvalidChain), (Plan.from_json, PLAN.to_json(), InvalidPlan)],
)
class TestDamagedFiles:
    """Each is read as it was written, or refused in one line, and none takes more than its own size in memory."""

    def refused(self, read, text, error, words="."):
        with within(SECONDS), pytest.raises(error, match=words) as caught:
            read(text)
        message = str(caught.value)
        assert len(message) < 1000
        assert "\n" not in message

    def read_or_refused(self, read, text, error):
        """What was read, which is then written and read again; None where it was refused."""
        message, found = "", None
        with within(SECONDS):
            try:
                found = read(text)
            except error as refusal:
                message = str(refusal)
        assert len(message) < 1000
        if found is not None:
            assert read(found.to_json()) == found
            repr(found), str(found)
        return found

    def test_a_file_that_ends_early(self, read, text, error):
        for length in range(len(text)):
            self.refused(read, text[:length], error)

    def test_one_character_is_another(self, read, text, error):
        draw = random.Random(0)
        for _ in range(3000):
            at = draw.randrange(len(text))
            damaged = text[:at] + draw.choice('"[]{}():,-.0129eE abtfn\\\x00\ud800é') + text[at + 1 :]
            self.read_or_refused(read, damaged, error)

    def test_other_versions_and_formats(self, read, text, error):
        record = json.loads(text)
        for other in ("gpuckpt.chain/2", "gpuckpt.plan/0", "", None, 1, [], {}, "x" * 10**6):
            self.refused(read, json.dumps({**record, "format": other}), error, "format")

    @pytest.mark.parametrize("depth", [200, 5000, 200_000])
    def test_deep_ones(self, read, text, error, depth):
        for opening, closing in ("[]", ('{"a":', "}")):
            self.refused(read, opening * depth + "1" + closing * depth, error)
            self.refused(read, opening * depth, error)
            deep = opening * depth + "1" + closing * depth
            before, name, after = re.split(r'(?:(?<="name": )|(?<="strategy": ))"([^"]*)"', text, maxsplit=1)
            assert name
            self.refused(read, before + deep + after, error)

    def test_a_key_that_stands_twice(self, read, text, error):
        self.refused(read, text[:-1] + ', "format": "gpuckpt.chain/1"}', error, "'format' stands twice")

    @pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
    def test_numbers_that_are_no_json(self, read, text, error, word):
        self.refused(read, re.sub(r"(?<=: )\d+\.\d+", word, text, count=1), error, word)

    @pytest.mark.parametrize(
        "number", ["1e999", "-1", "9" * 5000, "1" + "0" * 400, str(2**63), "true", '"1"', "null", "[]", "{}"]
    )
    def test_other_numbers(self, read, text, error, number):
        """In the place of any number of the file."""
        for found in re.finditer(r"(?<=: )-?\d[\d.e-]*(?=[,}])", text):
            made = self.read_or_refused(read, text[: found.start()] + number + text[found.end() :], error)
            assert made is None or (number, text[: found.start()][-7:]) == ("null", '"gap": '), text[: found.end()][
                -60:
            ]

    def test_hundreds_of_files_of_anything(self, read, text, error):
        """Values of JSON of every kind in the place of any value of the file."""
        words = st.text(max_size=5)
        leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
        values = st.recursive(
            leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)
        )

        @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(values, st.randoms(use_true_random=False))
        def check(value, draw):
            record = json.loads(text)
            place = record
            while True:
                keys = list(place) if isinstance(place, dict) else range(len(place))
                key = draw.choice(list(keys))
                if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.3:
                    break
                place = place[key]
            place[key] = value
            self.read_or_refused(read, json.dumps(record), error)

        check()


# ---- lengths


LONG = [
    pytest.param(3000, name, marks=[pytest.mark.slow] if name in ("revolve", "every_nth") else [])
    for name in STRATEGIES
]


@pytest.mark.parametrize(
    ("count", "strategy"), [*((n, name) for n in (1, 2) for name in ("optimal", *STRATEGIES)), (3000, "optimal"), *LONG]
)
def test_chains_of_one_stage_and_of_three_thousand(count, strategy):
    chain = long_chain(count)
    plan = plan_chain(chain, 100 * count, strategy)
    assert simulate(chain, plan.tree).peak_bytes == plan.certificate.peak_bytes <= 100 * count
    assert Plan.from_json(plan.to_json(), Chain.from_json(chain.to_json())) == plan


def test_no_stages_at_all():
    with pytest.raises(InvalidChain, match="no stages"):
        Chain(())
    with pytest.raises(InvalidPlan, match="covers 0 stages"):
        simulate(CHAIN, ())


def long_chain(count: int) -> Chain:
    return Chain(
        tuple(Stage(f"s{i}", 1.0, 2.0, saves=(i,), inputs=(i - 1,) if i else ()) for i in range(count)), (100,) * count
    )


def test_a_hundred_thousand_stages_are_read_and_written():
    chain = long_chain(100_000)
    assert Chain.from_json(chain.to_json()) == chain
    nested = "(" * 100_000 + " ".join(map(str, range(100_000))) + ")" * 100_000
    assert tree_text(parse_tree(nested)) == nested


def test_more_stages_than_are_planned_are_refused_before_the_tables_are_filled():
    chain = long_chain(20_001)
    for call in (
        lambda: plan_chain(chain, 10**9),
        lambda: plan_frontier(chain),
        lambda: certify(chain, map(Keep, range(len(chain))), 10**9, "by hand"),
        lambda: plan_pipeline(chain, 1, 10**9, 1),
    ):
        with within(SECONDS), pytest.raises(InvalidChain, match="20001 stages; at most 20000"):
            call()
