"""The option to spill, and plans within a bound on the host."""

from __future__ import annotations

import pytest

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import Chain, Keep, Stage, plan_chain, simulate, with_spill


def blocks(n: int) -> Chain:
    """n equal stages of 1 s forward and 2 s backward; each saves its input of 4 bytes and 12 of its own."""
    stages = (Stage(f"s{i}", 1, 2, (i, n + 1 + i), (i,), (), (i + 1,), 4) for i in range(n))
    return Chain(tuple(stages), (4,) * (n + 1) + (12,) * n)


def test_spilling_is_an_option_the_solver_uses() -> None:
    chain = with_spill(blocks(8), 16.0, overlap=0.5)
    assert [variant.name for variant in chain.stages[0].variants] == ["spill"]
    assert chain.stages[0].variants[0].forward_s == 1 + 0.5 * 16 / 16
    plan = plan_chain(chain, 80)
    assert plan.certificate.peak_bytes <= 80
    assert any(isinstance(node, Keep) and node.variant == "spill" for node in plan.tree)
    assert plan.certificate.step_s < plan_chain(blocks(8), 80).certificate.step_s


def test_a_host_that_is_too_small_for_all_takes_what_it_can() -> None:
    plain, chain = blocks(8), with_spill(blocks(8), 64.0, latency_s=0.01)
    spare = next(variant for variant in chain.stages[0].variants)
    assert spare.forward_s == pytest.approx(chain.stages[0].forward_s + 16 / 64 + 0.01 * len(spare.spilled))
    free = plan_chain(chain, 64)
    most = free.certificate.host_peak_bytes
    assert most > 0
    assert free.certificate.gap == 0.0
    seconds = []
    for host_bytes in range(0, most + 1, 8):
        plan = plan_chain(chain, 64, host_bytes=host_bytes)
        plan.check(chain)
        seen = simulate(chain, plan.tree)
        assert (seen.peak_bytes, seen.host_peak_bytes) == (
            plan.certificate.peak_bytes,
            plan.certificate.host_peak_bytes,
        )
        assert seen.peak_bytes <= 64
        assert seen.host_peak_bytes <= host_bytes
        gap = seen.step_s / free.certificate.step_s - 1
        assert plan.certificate.gap == pytest.approx(gap)
        seconds.append(seen.step_s)
    assert seconds[0] == plan_chain(plain, 64).certificate.step_s
    assert seconds[-1] == free.certificate.step_s
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) > 3
    with pytest.raises(ValueError, match="host_bytes is -1"):
        plan_chain(chain, 64, host_bytes=-1)


def test_a_device_and_a_host_that_are_both_too_small_are_refused_with_what_would_do() -> None:
    plain, chain = blocks(8), with_spill(blocks(8), 64.0)
    with pytest.raises(BudgetExceeded) as alone:
        plan_chain(plain, 18)
    assert plan_chain(chain, 18).certificate.host_peak_bytes > 10
    with pytest.raises(BudgetExceeded, match="the host budget is 10") as refused:
        plan_chain(chain, 18, host_bytes=10)
    assert refused.value.need == alone.value.need
