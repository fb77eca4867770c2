"""Why a plan does with each stage what it does: a table for people, JSON for machines.

Everything is read off the chain, the plan's tree and the simulator; of a run it takes only the measured peak.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from gpuckpt.planning.chain import KEEP, Chain, Stage, Variant
from gpuckpt.planning.plan import Plan
from gpuckpt.planning.simulate import simulate
from gpuckpt.planning.tables import format_seconds, text_table
from gpuckpt.planning.tree import check_tree
from gpuckpt.units import format_bytes

__all__ = ["PlanReport", "StageReport", "explain"]


@dataclass(frozen=True)
class StageReport:
    """One stage under a plan.

    Attributes:
        fate: "kept", "recomputed", "spilled" (to the host and back), or the name of another option it is kept under.
        runs: how often its forward runs in a step.
        saves_bytes: what autograd saves in it, and so what keeping it holds (shared storages counted in each stage).
        recompute_ms: time of its forward beyond the first; spill_ms: of its transfers, there and back; waited_ms: how long the
            step stands still for them.
        host_bytes: what it sends to the host at the most, or of a recompute that starts with it the input; storages that others
            hold already stay.
    """

    number: int
    name: str
    fate: str
    runs: int
    saves_bytes: int
    forward_ms: float
    backward_ms: float
    recompute_ms: float
    spill_ms: float
    host_bytes: int
    why: str
    waited_ms: float = 0.0


@dataclass(frozen=True)
class PlanReport:
    """All stages under a plan, and the plan's figures. Measured peaks are those of the latest step, None before the first.
    `predicted`: bytes and seconds follow from those of inputs of other sizes. `waited_ms`: how long a step stands still for
    transfers. `more_saves_ms`: by how much a step would be faster with `more_bytes` more on the device; None where that was not
    asked."""

    model: str
    stages: tuple[StageReport, ...]
    budget_bytes: int
    promised_peak_bytes: int
    measured_peak_bytes: int | None
    keep_all_bytes: int
    smallest_budget_bytes: int
    peak_step: str
    step_ms: float
    recompute_ms: float
    gap: float | None
    spill_ms: float = 0.0
    promised_host_peak_bytes: int = 0
    measured_host_peak_bytes: int | None = None
    predicted: bool = False
    waited_ms: float = 0.0
    more_bytes: int = 0
    more_saves_ms: float | None = None

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        rows = [("stage", "what", "runs", "saves", "forward", "backward", "again", "why")]
        for stage in self.stages:
            rows.append(
                (
                    stage.name,
                    stage.fate,
                    str(stage.runs),
                    format_bytes(stage.saves_bytes),
                    _ms(stage.forward_ms),
                    _ms(stage.backward_ms),
                    _ms(stage.recompute_ms + stage.spill_ms) if stage.runs > 1 or stage.spill_ms else "-",
                    stage.why,
                )
            )
        numeric = (False, False, True, True, True, True, True, False)
        return "\n".join([*text_table(rows, numeric), *self.summary()])

    def summary(self) -> list[str]:
        """The plan's figures in a few lines."""
        measured, there = (
            "nothing yet" if peak_bytes is None else f"{peak_bytes} B"
            for peak_bytes in (self.measured_peak_bytes, self.measured_host_peak_bytes)
        )
        gap = {None: "not computed", 0.0: "proven optimal"}.get(
            self.gap, f"at most {100 * (self.gap or 0):.2f}% from optimal"
        )
        promised = f"peak promised {self.promised_peak_bytes} B, measured {measured}, budget {self.budget_bytes} B"
        host = [f"on the host: peak promised {self.promised_host_peak_bytes} B, measured {there}"]
        transfers = ""
        if self.promised_host_peak_bytes:
            transfers = f"; transfers {_ms(self.spill_ms)}, for which it stands still {_ms(self.waited_ms)}"
        more = []
        if self.more_saves_ms is not None:
            more = [f"with {format_bytes(self.more_bytes)} more a step would take {_ms(self.more_saves_ms)} less"]
        return [
            f"{promised}, reached at: {self.peak_step}",
            f"keeping all holds {format_bytes(self.keep_all_bytes)}; the smallest budget is {self.smallest_budget_bytes} B",
            *(host if self.promised_host_peak_bytes else []),
            f"a step takes {_ms(self.step_ms)}, of which recompute {_ms(self.recompute_ms)}{transfers}; {gap}",
            *more,
            *(["not measured: bytes and seconds follow from those of other sizes"] if self.predicted else []),
        ]


def explain(
    chain: Chain,
    plan: Plan,
    measured_peak_bytes: int | None = None,
    measured_host_peak_bytes: int | None = None,
    *,
    faster: Plan | None = None,
) -> PlanReport:
    """The report of `plan` for `chain`; `faster`: the plan for a larger budget, to say what that would buy. Raises `InvalidPlan`
    where the plan is not for the chain."""
    plan.check(chain)
    simulation = simulate(chain, plan.tree)
    keep_all_bytes = chain.saved_bytes
    fits = keep_all_bytes <= plan.budget_bytes
    nodes = check_tree(chain, plan.tree)
    steps = {step.first: step for step in nodes if step.variant is not None}
    moved = {
        step.first: [i for i in chain.stages[step.first].inputs if i not in chain.extras_of(step.first, step.last)]
        for step in nodes
        if step.moved
    }
    waited_s = dict.fromkeys(range(len(chain)), 0.0)
    for copy in simulation.transfers:
        waited_s[copy.stage] += copy.waited_s
    stages = []
    for number, stage in enumerate(chain.stages):
        runs, variant = simulation.forward_counts[number], steps[number].variant or KEEP
        option = stage.option(variant)
        recomputed = steps[number].depth > 0
        fate = "spilled" if option.spilled and not option.remade else variant
        if variant == KEEP:
            fate = "recomputed" if recomputed else "kept"
        stopped_s = stage.tail_s if recomputed and steps[number].ends else 0.0
        recompute_s = (runs - 1) * stage.forward_s - stopped_s + option.again_s
        spill_s = option.forward_s + option.backward_s - stage.forward_s - stage.backward_s if option.spilled else 0.0
        spill_s -= option.again_s if option.spilled else 0.0
        host_bytes = sum(chain.storages[i] for i in (*option.spilled, *moved.get(number, ())))
        why = _why(chain, stage, option, fate, recompute_s, fits)
        if number in moved:
            spill_s += 2 * (stage.input_moved_s or 0.0)
            why += f"; what it starts from, {format_bytes(host_bytes)}, on the host meanwhile"
        stages.append(
            StageReport(
                number,
                stage.name,
                fate,
                runs,
                chain.charge(stage.saves),
                1e3 * option.forward_s,
                1e3 * option.backward_s,
                1e3 * recompute_s,
                1e3 * spill_s,
                host_bytes,
                why,
                1e3 * waited_s[number],
            )
        )
    certificate = plan.certificate
    return PlanReport(
        chain.name,
        tuple(stages),
        plan.budget_bytes,
        certificate.peak_bytes,
        measured_peak_bytes,
        keep_all_bytes,
        certificate.smallest_budget_bytes,
        certificate.peak_step,
        1e3 * certificate.step_s,
        1e3 * certificate.recompute_s,
        certificate.gap,
        sum(stage.spill_ms for stage in stages),
        certificate.host_peak_bytes,
        measured_host_peak_bytes,
        waited_ms=sum(stage.waited_ms for stage in stages),
        more_bytes=0 if faster is None else faster.budget_bytes - plan.budget_bytes,
        more_saves_ms=None if faster is None else 1e3 * (certificate.step_s - faster.certificate.step_s),
    )


def _why(chain: Chain, stage: Stage, option: Variant, fate: str, recompute_s: float, fits: bool) -> str:
    saves = format_bytes(chain.charge(stage.saves))
    if not stage.recomputable:
        return "cannot run twice: it lies outside the blocks, or changes its input or a buffer"
    if fate == "recomputed":
        return f"{saves} not held till its backward, for {format_seconds(recompute_s)} more"
    if fate != "kept":
        extra_s = option.forward_s + option.backward_s - stage.forward_s - stage.backward_s
        if option.spilled:
            moved = format_bytes(sum(chain.storages[number] for number in option.spilled))
            other = f"running it again would take {format_seconds(stage.forward_s)}"
            if option.remade:
                made_bytes = chain.charge((*option.remade, *option.remade_later))
                other = f"{format_bytes(made_bytes)} are made again in {format_seconds(option.again_s)}"
            return f"{moved} to the host and back, {format_seconds(extra_s - option.again_s)} on the link; {other}"
        if option.remade:
            ids = (option.saves, (*option.remade, *option.remade_later))
            held, remade = (format_bytes(chain.charge(each)) for each in ids)
            return f"{held} held till its backward, which makes {remade} again for {format_seconds(extra_s)} more"
        here = format_bytes(chain.charge(option.saves))
        return f"{saves} held as {fate!r}, {here} of it here, for {format_seconds(extra_s)} more"
    if fits:
        return "everything fits in the budget"
    if not stage.saves:
        return "it saves nothing"
    return f"there is room for its {saves}; running it again would take {format_seconds(stage.forward_s)}"


def _ms(value: float) -> str:
    return format_seconds(value / 1e3)
