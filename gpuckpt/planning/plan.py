"""Plans: a tree for one chain, with the certificate of what it costs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from gpuckpt.checks import shown
from gpuckpt.errors import InvalidPlan
from gpuckpt.planning._checks import MOST_SECONDS, plain_number
from gpuckpt.planning._json import read_record
from gpuckpt.planning.chain import Chain, check_chain
from gpuckpt.planning.tables import WIDTH, cut_text, format_seconds, text_table
from gpuckpt.planning.tree import Node, check_tree, flatten, parse_tree, steps_text, tree_text
from gpuckpt.units import format_bytes

__all__ = ["Certificate", "Plan"]

PLAN_FORMAT = "gpuckpt.plan/1"

# Lines of the top level that `print(plan)` shows; of more those in the middle are left out.
_MOST_ROWS = 40


@dataclass(frozen=True)
class Certificate:
    """What a plan promises, by the simulator.

    Attributes:
        peak_bytes, peak_step: the most bytes held, and the step where that is first reached.
        total_peak_bytes: the most bytes alive: held, running outputs, gradients in flight, workspace.
        recompute_s: seconds of forward run again in backward; step_s: seconds of the whole step.
        smallest_budget_bytes: the smallest budget that any plan for this chain fits in (under the plan's objective).
        layout_bytes: size of one slab that holds the step at offsets known beforehand: the peak, and two buffers of the most that
            is offloaded at a time.
        gap: how far `step_s` may be above the optimum, as a fraction of it: 0.0 is proven optimal, None is not computed.
        slot_bytes: the granule the solver planned in; 0 for a strategy that needs none.
        host_peak_bytes: the most bytes spilled to the host at one time.
    """

    peak_bytes: int
    peak_step: str
    total_peak_bytes: int
    recompute_s: float
    step_s: float
    smallest_budget_bytes: int
    layout_bytes: int
    gap: float | None = None
    slot_bytes: int = 0
    host_peak_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """A tree for the chain of one fingerprint, with its certificate.

    `budget_bytes` is what it was planned for, under `objective`: "held" bytes or "total" bytes; `strategy`, who made it.

    >>> from gpuckpt.planning import Chain, Stage, plan_chain
    >>> chain = Chain((Stage("a", 1.0, 2.0, saves=(0,)),), (100,))
    >>> plan = plan_chain(chain, 100)
    >>> plan.certificate.peak_bytes, plan.certificate.peak_step
    (100, 'forward a')
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    tree: tuple[Node, ...]
    certificate: Certificate
    fingerprint: str
    budget_bytes: int
    strategy: str = "optimal"
    objective: str = "held"

    def __eq__(self, other: object) -> bool:
        # Not field by field: comparing deep trees recurses.
        return self.to_json() == other.to_json() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.fingerprint, tree_text(self.tree)))

    def __repr__(self) -> str:
        c = self.certificate
        return (
            f"Plan({self.strategy}, {cut_text(tree_text(self.tree), 60)!r}, peak {c.peak_bytes} of {self.budget_bytes} bytes, "
            f"step {c.step_s:.6g} s of which recompute {c.recompute_s:.6g} s)"
        )

    def __str__(self) -> str:
        """A table of the top level, runs of stages that are held alike on one line, and the certificate."""
        c = self.certificate
        rows = [("stages", "held as", "sub-plan that backward runs again"), *_top_level_rows(self.tree)]
        gap = (
            "not computed"
            if c.gap is None
            else "proven optimal"
            if c.gap == 0
            else f"at most {100 * c.gap:.2f}% above optimal"
        )
        figures = [
            ("peak", f"{format_bytes(c.peak_bytes)} held ({c.peak_bytes} B), at: {c.peak_step}"),
            ("budget", f"{format_bytes(self.budget_bytes)} of {self.objective} bytes ({self.budget_bytes} B)"),
            ("smallest budget", f"{format_bytes(c.smallest_budget_bytes)} ({c.smallest_budget_bytes} B)"),
            ("step", f"{format_seconds(c.step_s)}, of which recompute {format_seconds(c.recompute_s)}; {gap}"),
        ]
        if c.host_peak_bytes:
            figures.insert(1, ("peak on the host", f"{format_bytes(c.host_peak_bytes)} ({c.host_peak_bytes} B)"))
        lines = [f"{self.strategy} plan", *text_table(rows, (False, False, False), most_rows=_MOST_ROWS), ""]
        lines += [f"{name.ljust(16)}  {value}" for name, value in figures]
        return "\n".join(cut_text(line, WIDTH) for line in lines)

    def check(self, chain: Chain) -> None:
        """Raise `InvalidPlan` unless this is a plan for `chain`."""
        check_chain(chain)
        if chain.fingerprint() != self.fingerprint:
            raise InvalidPlan(
                f"the plan was made for a chain with fingerprint {shown(self.fingerprint)} and chain {chain.name!r} has "
                f"{chain.fingerprint()}; plan this chain again"
            )
        check_tree(chain, self.tree)

    def to_json(self) -> str:
        """The plan as JSON text."""
        record = {
            "format": PLAN_FORMAT,
            "fingerprint": self.fingerprint,
            "strategy": self.strategy,
            "objective": self.objective,
            "budget_bytes": self.budget_bytes,
            "tree": tree_text(self.tree),
            "certificate": asdict(self.certificate),
        }
        return json.dumps(record, default=plain_number)

    @classmethod
    def from_json(cls, text: str, chain: Chain | None = None) -> Plan:
        """A plan out of `to_json`'s text; with `chain`, one that belongs to it. `InvalidPlan` names what is wrong."""
        record = read_record(text, PLAN_FORMAT, "plan", InvalidPlan)
        for key, kind in _PLAN_FIELDS.items():
            if not isinstance(record.get(key), kind):
                raise InvalidPlan(f"the plan file's {key!r} is {shown(record.get(key))}; expected {kind.__name__}")
        if record["objective"] not in ("held", "total"):
            raise InvalidPlan(f"the plan file's objective is {shown(record['objective'])}; expected 'held' or 'total'")
        if isinstance(record["budget_bytes"], bool) or not 0 <= record["budget_bytes"] < 2**63:
            raise InvalidPlan(
                f"the plan file's budget_bytes is {shown(record['budget_bytes'])}; expected an int of bytes"
            )
        plan = cls(
            parse_tree(record["tree"]),
            _certificate_from(record["certificate"]),
            record["fingerprint"],
            record["budget_bytes"],
            record["strategy"],
            record["objective"],
        )
        if chain is not None:
            plan.check(chain)
        return plan


def _top_level_rows(tree: tuple[Node, ...]) -> list[tuple[str, str, str]]:
    """(stages, what is held of them, the sub-plan of a frame) for each frame and each run of stages held alike."""
    rows: list[tuple[int, int, str, str]] = []
    steps = flatten(tree)
    position = 0
    while position < len(steps):
        step = steps[position]
        held, again = step.variant or "input only", ""
        if step.variant is None:
            again = cut_text(steps_text(steps, position + 1, step.end), 48)
        if rows and not again and rows[-1][2:] == (held, again):
            rows[-1] = (rows[-1][0], step.last, held, again)
        else:
            rows.append((step.first, step.last, held, again))
        position = step.end
    return [(str(a) if a == b else f"{a}..{b}", held, again) for a, b, held, again in rows]


_PLAN_FIELDS: dict[str, type] = {
    "tree": str,
    "certificate": dict,
    "fingerprint": str,
    "budget_bytes": int,
    "strategy": str,
    "objective": str,
}


def _certificate_from(record: dict[str, Any]) -> Certificate:
    known = {field.name for field in fields(Certificate)}
    record = {"host_peak_bytes": 0, **record}  # plans made before there was spilling have none
    if set(record) != known:
        odd = sorted(set(record) ^ known)
        raise InvalidPlan(f"the plan file's certificate lacks or does not know {cut_text(', '.join(odd), 200)}")
    for key, value in record.items():
        if key == "peak_step":
            good = isinstance(value, str)
        elif key.endswith("_bytes"):
            good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        else:
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_SECONDS
            good = good or (key == "gap" and value is None)
        if not good:
            raise InvalidPlan(f"the plan file's certificate has {key} = {shown(value)}")
    return Certificate(**record)
