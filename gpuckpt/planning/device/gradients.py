"""Gradients of parameters in the bytes of a step: when they come, how long they stay, and what a plan makes of that.

Backward adds the gradients of one stage after another. A plan for all bytes alive (`plan_chain(objective="total")`) knows of them
as workspace of the stages in whose backward they are there. In the first forward they are not there yet; that costs nothing, for
a stage's forward never holds more than its own backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning.chain import Chain
from gpuckpt.planning.plan import Plan
from gpuckpt.planning.planner import plan_chain
from gpuckpt.planning.simulate import simulate

__all__ = ["Gradient", "check_total", "plan_total", "stages_of", "stages_within", "with_gradients"]


class Gradient(NamedTuple):
    """Of one parameter: the stages whose backward make it, its bytes, and whether it stays until the optimizer has stepped; if
    not, it is gone before the next one comes, and so is what is needed to be done with it.

    A tied one has several stages. What comes first waits in autograd for the others, and is added to them out of place.
    """

    stages: tuple[int, ...]
    nbytes: int
    stays: bool = True
    step_bytes: int = 0


def with_gradients(chain: Chain, gradients: Iterable[Gradient], *, always_bytes: int = 0) -> Chain:
    """`chain`, each stage's workspace with the gradients that are there at the worst moment of its backward. `always_bytes`: what
    else is there all through the step.

    >>> from gpuckpt.planning import Stage
    >>> chain = Chain((Stage("a", 1.0, 2.0, (0,)), Stage("b", 1.0, 2.0, (1,))), (100, 100))
    >>> [stage.workspace_bytes for stage in with_gradients(chain, [Gradient((1,), 30), Gradient((0,), 7)]).stages]
    [37, 30]
    >>> [stage.workspace_bytes for stage in with_gradients(chain, [Gradient((0, 1), 30, stays=False, step_bytes=9)]).stages]
    [99, 30]
    """
    count = len(chain)
    came, passing = [0] * count, [0] * count
    for gradient in gradients:
        last, tied = max(gradient.stages), len(gradient.stages) > 1
        if gradient.stays or tied:
            came[last] += gradient.nbytes
        for stage in gradient.stages:
            if stage < last or not (gradient.stays or tied):
                passing[stage] = max(passing[stage], (1 + tied) * gradient.nbytes + gradient.step_bytes)
    stages, there = [], always_bytes
    for number in reversed(range(count)):
        plain = chain.stages[number]
        # At the worst moment of its backward; and when that has ended, and no workspace is left.
        worst = there + plain.workspace_bytes + plain.gradients_bytes
        there += came[number]
        stages.append(replace(plain, workspace_bytes=max(worst, there + passing[number])))
    return replace(chain, stages=tuple(reversed(stages)))


def plan_total(
    chain: Chain,
    total: Chain,
    budget_bytes: int,
    strategy: str = "optimal",
    host_bytes: int | None = None,
    *,
    engine: str = "auto",
) -> Plan:
    """A plan for `chain` whose bytes alive, as `total` counts them, stay within `budget_bytes`; its certificate promises of what
    is held what `chain` says. Raises `BudgetExceeded`."""
    plan = plan_chain(total, budget_bytes, strategy, objective="total", host_bytes=host_bytes, engine=engine)
    held = simulate(chain, plan.tree)
    moved_bytes = plan.certificate.layout_bytes - plan.certificate.peak_bytes
    certificate = replace(
        plan.certificate,
        peak_bytes=held.peak_bytes,
        peak_step=held.peak_step,
        layout_bytes=held.peak_bytes + moved_bytes,
    )
    return replace(plan, certificate=certificate, fingerprint=chain.fingerprint())


def check_total(chain: Chain, total: Chain, plan: Plan, budget_bytes: int) -> Plan:
    """A plan that was made elsewhere for `chain`, with a certificate for all bytes alive. Raises `BudgetExceeded`."""
    found = simulate(total, plan.tree)
    if found.total_peak_bytes > budget_bytes:
        hint = f"the plan given for {chain.name!r} takes that much at {found.total_peak_step!r}"
        raise BudgetExceeded(found.total_peak_bytes, budget_bytes, hint)
    certificate = replace(plan.certificate, total_peak_bytes=found.total_peak_bytes)
    return replace(plan, certificate=certificate, objective="total")


def stages_of(chain: Chain) -> dict[str, list[int]]:
    """Numbers of the stages of each module that is one, by its name."""
    known: dict[str, list[int]] = {}
    for number, stage in enumerate(chain.stages):
        for name in stage.name.split("+"):
            known.setdefault(name, []).append(number)
    return known


def stages_within(name: str, known: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """The stages that a parameter of that name belongs to; none where it is outside of all."""
    while name:
        if name in known:
            return known[name]
        name = name.rpartition(".")[0]
    return ()
