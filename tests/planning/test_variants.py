"""The options that further variants give a chain."""

from __future__ import annotations

import pytest

from gpuckpt.planning import Chain, Keep, Stage, plan_chain, with_spill


def blocks(n: int) -> Chain:
    """n equal stages of 1 s forward and 2 s backward; each saves its input of 4 bytes and 12 of its own."""
    stages = (Stage(f"s{i}", 1, 2, (i, n + 1 + i), (i,), (), (i + 1,), 4) for i in range(n))
    return Chain(tuple(stages), (4,) * (n + 1) + (12,) * n)


def test_what_may_go_to_the_host_and_how_long_that_takes() -> None:
    chain = with_spill(blocks(8), 16.0, latency_s=0.01)
    first, second = chain.stages[:2]
    assert [variant.name for variant in first.variants] == ["spill"]
    (spill,) = second.variants
    assert (spill.saves, spill.spilled) == ((), second.saves)
    assert spill.moved_s == pytest.approx(16 / 16 + 0.01 * 2)
    assert (spill.forward_s, spill.backward_s) == pytest.approx((1 + spill.moved_s, 2 + spill.moved_s))
    assert second.input_moved_s == pytest.approx(4 / 16 + 0.01)
    assert first.input_moved_s is None  # what the model is given is the caller's
    staying = with_spill(blocks(8), 16.0, staying=(1,)).stages[1]
    assert (staying.input_moved_s, staying.variants[0].saves) == (None, (1,))
    plan = plan_chain(chain, 80)
    assert plan.certificate.peak_bytes <= 80
    assert any(isinstance(node, Keep) and node.variant == "spill" for node in plan.tree)
    assert plan.certificate.step_s < plan_chain(blocks(8), 80).certificate.step_s
    assert Chain.from_json(chain.to_json()) == chain


@pytest.mark.parametrize(("link", "latency_s"), [(0.0, 0.0), (-1.0, 0.0), (1.0, -1.0), (1.0, float("inf"))])
def test_a_link_that_is_none_is_refused(link: float, latency_s: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        with_spill(blocks(2), link, latency_s=latency_s)
