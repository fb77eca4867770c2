"""What a refusal says of the way to a smaller budget."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuckpt import BudgetExceeded
from gpuckpt.planning import Chain, Stage, plan_chain

MIB = 2**20


def stage(name: str, *saves: int, recomputable: bool = True, again_bytes: int = 0) -> Stage:
    inputs = saves[:1] if recomputable else ()
    return Stage(name, 1.0, 2.0, saves, inputs, recomputable=recomputable, again_bytes=again_bytes)


CHAIN = Chain(
    (
        stage("prefix", 0, recomputable=False),
        stage("block 0", 1, 2),
        stage("block 1", 3, 4),
        stage("between block 1 and block 2", 5, recomputable=False),
        stage("block 2", 6, 7),
        stage("suffix", 8, recomputable=False),
    ),
    (MIB, MIB, 9 * MIB, MIB, 12 * MIB, 3 * MIB, MIB, 9 * MIB, 3 * MIB),
)


def refusal(chain: Chain) -> str:
    with pytest.raises(BudgetExceeded) as refused:
        plan_chain(chain, MIB)
    assert refused.value.need == plan_chain(chain, 1 << 40).certificate.smallest_budget_bytes
    return refused.value.hint


def test_it_names_the_share_what_is_kept_always_and_the_largest_stage() -> None:
    words = refusal(CHAIN)
    assert "82% of the 40 MiB that a step saves can be recomputed" in words
    assert "kept always: between block 1 and block 2 (3 MiB), suffix (3 MiB), prefix (1 MiB); code outside" in words
    assert "the largest stage, block 1, holds 13 MiB while it goes backward" in words


def test_what_checkpoints_inside_recompute_counts_for_the_largest() -> None:
    last = replace(CHAIN.stages[4], again_bytes=8 * MIB)
    words = refusal(replace(CHAIN, stages=(*CHAIN.stages[:4], last, CHAIN.stages[5])))
    assert "the largest stage, block 2, holds 18 MiB" in words


def test_many_are_counted_and_none_is_left_out() -> None:
    fixed = tuple(stage(f"loose {n}", n, recomputable=False) for n in range(5))
    words = refusal(Chain(fixed, tuple(range(MIB, 6 * MIB, MIB))))
    assert "0% of the 15 MiB" in words
    assert "loose 4 (5 MiB), loose 3 (4 MiB), loose 2 (3 MiB) and 2 more" in words
    assert "largest stage" not in words


def test_where_all_can_be_recomputed_nothing_is_kept_always() -> None:
    words = refusal(Chain((stage("a", 0, 1), stage("b", 2, 3)), (MIB, 5 * MIB, MIB, 5 * MIB)))
    assert words.startswith("no plan of chain 'chain' holds less: 100% of the 12 MiB")
    assert "kept always" not in words
