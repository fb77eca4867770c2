"""What a chain refuses, and that it survives a file."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from gpuckpt.errors import InvalidChain
from gpuckpt.planning import Chain, Stage, Variant

GOOD = Stage("block", 1.0, 2.0, (0,), (1,), (), (0,), 4, 8)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (replace(GOOD, forward_s=math.nan), r"stage 0 \('block'\): forward_s is nan"),
        (replace(GOOD, backward_s=math.inf), "backward_s is inf"),
        (replace(GOOD, forward_s=-1.0), "forward_s is -1.0"),
        (replace(GOOD, tail_s=math.inf), "tail_s is inf"),
        (replace(GOOD, forward_s=1.0, tail_s=1.5), "tail_s is 1.5, part of a forward of 1.0 s"),
        (replace(GOOD, forward_s=1.0, tail_s=1.0, variants=(Variant("a", (), 0.5, 0),)), "variant 'a': tail_s is 1.0"),
        (replace(GOOD, forward_s="1"), "forward_s is '1'"),
        (replace(GOOD, forward_s=True), "forward_s is True"),
        (replace(GOOD, output_bytes=-1), "output_bytes: bytes are -1"),
        (replace(GOOD, workspace_bytes=1.5), "workspace_bytes: bytes are 1.5"),
        (replace(GOOD, saves=(2,)), "saves names storage 2; the chain has storages 0..1"),
        (replace(GOOD, inputs=(-1,)), "inputs names storage -1"),
        (replace(GOOD, extras=("x",)), "extras names storage 'x'"),
        (replace(GOOD, variants=(Variant("keep", (), 0, 0),)), "variant 'keep'"),
        (replace(GOOD, variants=(Variant("a b", (), 0, 0),)), "variant 'a b'"),
        (replace(GOOD, variants=(Variant("a", (), 0, 0), Variant("a", (), 0, 0))), "variant 'a'"),
        (replace(GOOD, variants=(Variant("a", (), math.nan, 0),)), "variant 'a': forward_s is nan"),
        (replace(GOOD, variants=(Variant("a", (9,), 0, 0),)), "variant 'a': saves names storage 9"),
        (replace(GOOD, variants=(Variant("a", (), 0, 0, (), (9,)),)), "variant 'a': remade names storage 9"),
        (replace(GOOD, variants=(Variant("a", (), 0, 1, again_s=2),)), "again_s is 2, part of a backward of 1 s"),
    ],
)
def test_costs_that_make_no_sense_are_refused_by_name(stage: Stage, message: str) -> None:
    with pytest.raises(InvalidChain, match=message):
        Chain((stage,), (4, 4), name="net")


def test_an_empty_chain_is_refused() -> None:
    with pytest.raises(InvalidChain, match="chain 'net' has no stages"):
        Chain((), (), name="net")


@pytest.mark.parametrize(("storages", "unit"), [((-1, 4), 1), ((4, math.nan), 1), ((4, 4), 0), ((4, 4), 0.5)])
def test_sizes_that_make_no_sense_are_refused(storages: tuple, unit: int) -> None:
    with pytest.raises(InvalidChain):
        Chain((GOOD,), storages, unit)


def test_zero_costs_are_fine() -> None:
    assert len(Chain((Stage("free"),))) == 1


def test_a_chain_survives_a_file(chain_of) -> None:
    for seed in range(30):
        chain = chain_of(random.Random(seed), 5)
        assert Chain.from_json(chain.to_json()) == chain


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": "gpuckpt.chain/0"}',
        '{"format": "gpuckpt.chain/1"}',
        '{"format": "gpuckpt.chain/1", "stages": 3}',
    ],
)
def test_a_damaged_file_is_refused(text: str) -> None:
    with pytest.raises(InvalidChain):
        Chain.from_json(text)


def test_a_file_with_an_odd_field_or_cost_is_refused() -> None:
    record = json.loads(Chain((GOOD,), (4, 4)).to_json())
    for field, value in (("colour", 1), ("forward_s", None), ("saves", None), ("saves", [7]), ("variants", [{}])):
        damaged = json.loads(json.dumps(record))
        damaged["stages"][0][field] = value
        with pytest.raises(InvalidChain):
            Chain.from_json(json.dumps(damaged))


def test_the_fingerprint_follows_bytes_and_names_and_not_seconds() -> None:
    chain = Chain((GOOD,), (4, 4))
    assert Chain((replace(GOOD, forward_s=9.0, workspace_bytes=1),), (4, 4)).fingerprint() == chain.fingerprint()
    for other in (
        Chain((replace(GOOD, name="other"),), (4, 4)),
        Chain((GOOD,), (4, 5)),
        Chain((replace(GOOD, saves=()),), (4, 4)),
        Chain((replace(GOOD, recomputable=False),), (4, 4)),
        chain.with_unit(512),
    ):
        assert other.fingerprint() != chain.fingerprint()


def test_charges_round_up_to_the_unit_and_count_once() -> None:
    chain = Chain((GOOD,), (1, 1025)).with_unit(512)
    assert chain.footprints == (512, 1536)
    assert chain.charge((0, 1, 0)) == 2048


def test_a_chain_prints_as_a_table() -> None:
    variant = Variant("spill", (), 0.002, 0.003)
    stages = (
        Stage("embedding", 0.001, 0.002, (0,), recomputable=False),
        Stage("a block with quite a long name", 0.001, 0.002, (0, 1), (0,), variants=(variant,)),
    )
    lines = str(Chain(stages, (1024, 2048), name="toy")).splitlines()
    assert lines[0] == "toy: 2 stages that save 3 KiB, step 6 ms"
    assert lines[1].split() == ["stage", "saves", "input", "forward", "backward", "also"]
    assert lines[2].split() == ["0", "embedding", "1", "KiB", "0", "B", "1", "ms", "2", "ms", "kept", "always"]
    assert lines[3].split()[-1] == "spill"
    assert "3 KiB" in lines[3]
    assert max(map(len, lines)) <= 80
