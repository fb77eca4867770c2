"""Plans that spill no more than the host has room for.

The solver knows one kind of memory. Where the plan it likes best spills more than `host_bytes`, fewer stages are given the
choice: those first whose recompute takes the most seconds for a spilled byte, and of equal ones the earliest, as what they
save lies idle the longest. How many of them is found by bisection. That is a heuristic, and the gap says how far it can be from
the optimum: the seconds of the plan without a bound on the host are a bound from below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning.chain import Chain
from gpuckpt.planning.plan import Plan

__all__ = ["plan_within_host"]


def plan_within_host(chain: Chain, host_bytes: int, plan: Callable[[Chain], Plan]) -> Plan:
    """What `plan` makes of `chain`, with at most `host_bytes` on the host. `BudgetExceeded` where neither memory has room."""
    free = plan(chain)
    if free.certificate.host_peak_bytes <= host_bytes:
        return free
    ranked = sorted((i for i in range(len(chain)) if _spilled_bytes(chain, i)), key=lambda i: -_worth(chain, i))
    best: Plan | None = None
    refusal: BudgetExceeded | None = None
    low, high = 0, len(ranked)
    while low <= high:
        count = (low + high) // 2
        try:
            found = plan(_only(chain, set(ranked[:count])))
        except BudgetExceeded as error:
            refusal = error if refusal is None or error.need > refusal.need else refusal
            low = count + 1  # the device needs more of them to spill
            continue
        if found.certificate.host_peak_bytes > host_bytes:
            high = count - 1
            continue
        low = count + 1
        if best is None or found.certificate.step_s < best.certificate.step_s:
            best = found
    if best is None:
        assert refusal is not None, "without spilling the host always has room"
        hint = (
            f"with {free.certificate.host_peak_bytes} bytes on the host a plan of chain {chain.name!r} would fit; the host "
            f"budget is {host_bytes}. Raise either"
        )
        raise BudgetExceeded(refusal.need, refusal.available, hint)
    least_s = free.certificate.step_s / (1.0 + (free.certificate.gap or 0.0))
    known = free.certificate.gap is not None and least_s > 0
    certificate = replace(
        best.certificate,
        gap=max(0.0, best.certificate.step_s / least_s - 1.0) if known else None,
        smallest_budget_bytes=free.certificate.smallest_budget_bytes,
    )
    return replace(best, fingerprint=chain.fingerprint(), certificate=certificate)


def _spilled_bytes(chain: Chain, i: int) -> int:
    return max((sum(chain.storages[x] for x in v.spilled) for v in chain.stages[i].variants), default=0)


def _worth(chain: Chain, i: int) -> float:
    """Seconds that spilling stage i instead of recomputing it once spares, by byte."""
    stage = chain.stages[i]
    extra_s = min(v.forward_s + v.backward_s for v in stage.variants if v.spilled) - stage.forward_s - stage.backward_s
    return (stage.forward_s - extra_s) / _spilled_bytes(chain, i)


def _only(chain: Chain, allowed: set[int]) -> Chain:
    """The chain in which the stages that are not allowed to spill have no option to."""
    stages = tuple(
        stage if i in allowed else replace(stage, variants=tuple(v for v in stage.variants if not v.spilled))
        for i, stage in enumerate(chain.stages)
    )
    return replace(chain, stages=stages)
