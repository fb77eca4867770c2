"""Plans: who keeps and who recomputes, as a tree of nested frames, with the certificate of what it costs.

A tree is a tuple of nodes that covers stages 0..n-1 in order. `Keep(i)` saves everything of stage i; `Recompute(children)`
keeps its input only and runs its children again in backward. The text form of a tree is what a plan file holds:
`0 (1 2 (3 4) 5) 6:spill` keeps 0, recomputes 1..5 with a frame over 3..4 inside, and keeps 6 under its option "spill".

Trees can nest as deep as the chain is long, so nothing here recurses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from gpuckpt.errors import InvalidPlan
from gpuckpt.planning.chain import KEEP, Chain

__all__ = [
    "Certificate",
    "Keep",
    "Node",
    "Plan",
    "Recompute",
    "Step",
    "Token",
    "build_tree",
    "check_tree",
    "flatten",
    "parse_tree",
    "tree_text",
]

PLAN_FORMAT = "gpuckpt.plan/1"


@dataclass(frozen=True)
class Keep:
    """Stage `stage` is kept, under the option called `variant`."""

    stage: int
    variant: str = KEEP


@dataclass(frozen=True)
class Recompute:
    """A frame: only its input is kept, and `children` run again in backward."""

    children: tuple[Node, ...]


Node = Keep | Recompute
Token = Keep | str


@dataclass(frozen=True, slots=True)
class Step:
    """One node of a tree in preorder.

    `first..last`: the stages it covers; `end`: the index just past its subtree; `ends`: it is its parent's last child;
    `variant`: the option of a `Keep`, None for a frame; `depth`: 0 at top level.
    """

    first: int
    last: int
    end: int
    ends: bool
    variant: str | None
    depth: int


def flatten(tree: Iterable[Node]) -> list[Step]:
    """The nodes of a tree in preorder. `InvalidPlan` when stages are out of order, missing, or a frame is empty."""
    rows: list[list[Any]] = []  # first, last, end, ends, variant, depth
    position = 0
    # A level of the walk: (iterator over siblings, index of their frame's row, index of the latest sibling's row)
    levels: list[list[Any]] = [[iter(tuple(tree)), -1, -1]]
    while levels:
        siblings, frame, latest = levels[-1]
        node = next(siblings, None)
        if node is None:
            levels.pop()
            if latest >= 0:
                rows[latest][3] = True
            if frame >= 0:
                if latest < 0:
                    raise InvalidPlan(f"the frame at stage {position} is empty; it recomputes at least one stage")
                rows[frame][1], rows[frame][2] = position - 1, len(rows)
            continue
        levels[-1][2] = index = len(rows)
        if isinstance(node, Keep):
            if node.stage != position:
                raise InvalidPlan(f"the plan has stage {node.stage!r} where stage {position} comes next")
            rows.append([position, position, index + 1, False, node.variant, len(levels) - 1])
            position += 1
        elif isinstance(node, Recompute):
            rows.append([position, -1, -1, False, None, len(levels) - 1])
            levels.append([iter(node.children), index, -1])
        else:
            raise InvalidPlan(f"a plan is made of Keep and Recompute; got {type(node).__name__}")
    return [Step(*row) for row in rows]


def check_tree(chain: Chain, tree: Iterable[Node]) -> list[Step]:
    """`flatten(tree)`, once it is certain that the tree is a plan for `chain`; `InvalidPlan` otherwise."""
    steps = flatten(tree)
    covered = steps[-1].last + 1 if steps else 0
    if covered != len(chain):
        raise InvalidPlan(f"the plan covers {covered} stages and the chain has {len(chain)}")
    for step in steps:
        if step.variant is None:
            continue
        stage = chain.stages[step.first]
        if step.depth and not stage.recomputable:
            raise InvalidPlan(
                f"stage {step.first} ({stage.name!r}) cannot be recomputed, and the plan puts it in a frame"
            )
        if step.variant != KEEP and all(step.variant != v.name for v in stage.variants):
            names = ", ".join(v.name for v in stage.options)
            raise InvalidPlan(f"stage {step.first} ({stage.name!r}) has no option {step.variant!r}; it has {names}")
    return steps


def tree_text(tree: Iterable[Node]) -> str:
    """The tree as text: stage numbers, `:option` after those not plainly kept, frames in parentheses."""
    words: list[str] = []
    steps = flatten(tree)
    closing: list[int] = []
    for i, step in enumerate(steps):
        while closing and closing[-1] <= i:
            words[-1] += ")"
            closing.pop()
        opening = ""
        if words and words[-1].endswith("("):
            opening = words.pop()
        if step.variant is None:
            words.append(opening + "(")
            closing.append(step.end)
        else:
            words.append(opening + str(step.first) + ("" if step.variant == KEEP else f":{step.variant}"))
    return " ".join(words) + ")" * len(closing)


def build_tree(tokens: Iterable[Token]) -> tuple[Node, ...]:
    """A tree out of its nodes in preorder, with "(" and ")" around what a frame recomputes."""
    levels: list[list[Node]] = [[]]
    for token in tokens:
        if isinstance(token, Keep):
            levels[-1].append(token)
        elif token == "(":
            levels.append([])
        elif len(levels) == 1:
            raise InvalidPlan("the plan's tree closes a frame it never opened")
        else:
            children = tuple(levels.pop())
            levels[-1].append(Recompute(children))
    if len(levels) > 1:
        raise InvalidPlan(f"the plan's tree leaves {len(levels) - 1} frame(s) open")
    return tuple(levels[0])


def parse_tree(text: str) -> tuple[Node, ...]:
    """A tree out of `tree_text`'s form; `InvalidPlan` names what is wrong."""
    tokens: list[Token] = []
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            tokens.append(word)
            continue
        number, _, variant = word.partition(":")
        if not (number.isascii() and number.isdecimal()):
            raise InvalidPlan(f"the plan's tree has {word!r} where a stage number was expected")
        tokens.append(Keep(int(number), variant or KEEP))
    tree = build_tree(tokens)
    flatten(tree)
    return tree


@dataclass(frozen=True)
class Certificate:
    """What a plan promises, by the simulator.

    Attributes:
        peak_bytes, peak_step: the most bytes held, and the step where that is first reached.
        total_peak_bytes: the most bytes alive: held, running outputs, gradients in flight, workspace.
        recompute_s: seconds of forward run again in backward; step_s: seconds of the whole step.
        smallest_budget_bytes: the smallest budget that any plan for this chain fits in (under the plan's objective).
        layout_bytes: size of one slab that holds the step at offsets known beforehand.
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
            f"Plan({self.strategy}, {tree_text(self.tree)!r}, peak {c.peak_bytes} of {self.budget_bytes} bytes, "
            f"step {c.step_s:.6g} s of which recompute {c.recompute_s:.6g} s)"
        )

    def check(self, chain: Chain) -> None:
        """Raise `InvalidPlan` unless this is a plan for `chain`."""
        if chain.fingerprint() != self.fingerprint:
            raise InvalidPlan(
                f"the plan was made for a chain with fingerprint {self.fingerprint} and chain {chain.name!r} has "
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
        return json.dumps(record)

    @classmethod
    def from_json(cls, text: str, chain: Chain | None = None) -> Plan:
        """A plan out of `to_json`'s text; with `chain`, one that belongs to it. `InvalidPlan` names what is wrong."""
        try:
            record = json.loads(text)
        except ValueError as error:
            raise InvalidPlan(f"a plan file is JSON; {error}") from None
        if not isinstance(record, dict) or record.get("format") != PLAN_FORMAT:
            got = record.get("format") if isinstance(record, dict) else type(record).__name__
            raise InvalidPlan(f"a plan file has format {PLAN_FORMAT!r}; got {got!r}")
        for key, kind in _PLAN_FIELDS.items():
            if not isinstance(record.get(key), kind):
                raise InvalidPlan(f"the plan file's {key!r} is {record.get(key)!r}; expected {kind.__name__}")
        if record["objective"] not in ("held", "total"):
            raise InvalidPlan(f"the plan file's objective is {record['objective']!r}; expected 'held' or 'total'")
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
        raise InvalidPlan(f"the plan file's certificate lacks or does not know {', '.join(odd)}")
    for key, value in record.items():
        if key == "peak_step":
            good = isinstance(value, str)
        elif key.endswith("_bytes"):
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        else:
            good = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            good = good or (key == "gap" and value is None)
        if not good:
            raise InvalidPlan(f"the plan file's certificate has {key} = {value!r}")
    return Certificate(**record)
