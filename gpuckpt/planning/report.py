"""Why a plan does with each stage what it does: a table for people, JSON for machines.

Everything is read off the chain, the plan's tree and the simulator; of a run it takes only the measured peak.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from gpuckpt.planning.chain import KEEP, Chain, Stage, Variant
from gpuckpt.planning.plan import Plan
from gpuckpt.planning.simulate import simulate
from gpuckpt.planning.tables import text_table
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
        recompute_ms: time of its forward beyond the first; spill_ms: of its transfers, there and back.
        host_bytes: what it spills at the most; storages that others hold already stay.
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


@dataclass(frozen=True)
class PlanReport:
    """All stages under a plan, and the plan's figures. Measured peaks are those of the latest step, None before the first.
    `predicted`: bytes and seconds follow from those of inputs of other sizes."""

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
        transfers = f" and transfers {_ms(self.spill_ms)}" if self.promised_host_peak_bytes else ""
        return [
            f"{promised}, reached at: {self.peak_step}",
            f"keeping all holds {format_bytes(self.keep_all_bytes)}; the smallest budget is {self.smallest_budget_bytes} B",
            *(host if self.promised_host_peak_bytes else []),
            f"a step takes {_ms(self.step_ms)}, of which recompute {_ms(self.recompute_ms)}{transfers}; {gap}",
            *(["not measured: bytes and seconds follow from those of other sizes"] if self.predicted else []),
        ]


def explain(
    chain: Chain, plan: Plan, measured_peak_bytes: int | None = None, measured_host_peak_bytes: int | None = None
) -> PlanReport:
    """The report of `plan` for `chain`. Raises `InvalidPlan` where the plan is not for the chain."""
    plan.check(chain)
    simulation = simulate(chain, plan.tree)
    keep_all_bytes = chain.saved_bytes
    fits = keep_all_bytes <= plan.budget_bytes
    steps = {step.first: step for step in check_tree(chain, plan.tree) if step.variant is not None}
    stages = []
    for number, stage in enumerate(chain.stages):
        runs, variant = simulation.forward_counts[number], steps[number].variant or KEEP
        option = stage.option(variant)
        recomputed = steps[number].depth > 0
        fate = "spilled" if option.spilled else variant
        if variant == KEEP:
            fate = "recomputed" if recomputed else "kept"
        stopped_s = stage.tail_s if recomputed and steps[number].ends else 0.0
        recompute_s = (runs - 1) * stage.forward_s - stopped_s + option.again_s
        spill_s = option.forward_s + option.backward_s - stage.forward_s - stage.backward_s if option.spilled else 0.0
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
                sum(chain.storages[number] for number in option.spilled),
                _why(chain, stage, option, fate, recompute_s, fits),
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
    )


def _why(chain: Chain, stage: Stage, option: Variant, fate: str, recompute_s: float, fits: bool) -> str:
    saves = format_bytes(chain.charge(stage.saves))
    if not stage.recomputable:
        return "cannot run twice: it lies outside the blocks, or changes its input or a buffer"
    if fate == "recomputed":
        return f"{saves} not held till its backward, for {_ms(1e3 * recompute_s)} more"
    if fate != "kept":
        extra_s = option.forward_s + option.backward_s - stage.forward_s - stage.backward_s
        if option.spilled:
            moved = format_bytes(sum(chain.storages[number] for number in option.spilled))
            other = f"running it again would take {_ms(1e3 * stage.forward_s)}"
            return f"{moved} to the host and back for {_ms(1e3 * extra_s)} more; {other}"
        if option.remade:
            held, remade = (format_bytes(chain.charge(ids)) for ids in (option.saves, option.remade))
            return f"{held} held till its backward, which makes {remade} again for {_ms(1e3 * extra_s)} more"
        return f"{saves} held as {fate!r}, {format_bytes(chain.charge(option.saves))} of it here, for {_ms(1e3 * extra_s)} more"
    if fits:
        return "everything fits in the budget"
    if not stage.saves:
        return "it saves nothing"
    return f"there is room for its {saves}; running it again would take {_ms(1e3 * stage.forward_s)}"


def _ms(value: float) -> str:
    return f"{value:.3g} ms"
