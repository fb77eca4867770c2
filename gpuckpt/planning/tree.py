"""Trees of who keeps and who recomputes, and their text.

A tree is a tuple of nodes that covers stages 0..n-1 in order. `Keep(i)` saves everything of stage i; `Recompute(children)`
keeps its input only and runs its children again in backward; at top level that input may be on the host. The text form of a
tree is what a plan file holds: `0 (1 2 (3 4) 5) 6:spill (7):spill` keeps 0, recomputes 1..5 with a frame over 3..4 inside, keeps
6 under its option "spill", and recomputes 7 from an input on the host.

Trees can nest as deep as the chain is long, so nothing here recurses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from gpuckpt.checks import shown
from gpuckpt.errors import InvalidPlan
from gpuckpt.planning._checks import is_int
from gpuckpt.planning.chain import KEEP, Chain, Stage, check_chain

__all__ = [
    "SPILL",
    "DroppedRuns",
    "Keep",
    "Node",
    "RangeMax",
    "Recompute",
    "Step",
    "Token",
    "build_tree",
    "check_tree",
    "first_stage",
    "flatten",
    "last_stage",
    "nodes_of",
    "parse_tree",
    "steps_text",
    "tree_text",
]

SPILL = "spill"
"""The option to keep what a stage saves, or the input of a frame, on the host."""


@dataclass(frozen=True)
class Keep:
    """Stage `stage` is kept, under the option called `variant`.

    >>> Keep(3), Keep(3, "spill")
    (Keep(stage=3, variant='keep'), Keep(stage=3, variant='spill'))
    """

    stage: int
    variant: str = KEEP


@dataclass(frozen=True)
class Recompute:
    """A frame: only its input is kept, and `children` run again in backward. `variant`: "spill" where the input, but for
    extras, goes to the host and comes back.

    >>> tree_text([Keep(0), Recompute((Keep(1), Keep(2))), Recompute((Keep(3),), "spill")])
    '0 (1 2) (3):spill'
    """

    children: tuple[Node, ...]
    variant: str = KEEP


_MOST_DIGITS = 18  # of a stage number in a file

Node = Keep | Recompute
Token = Keep | str


@dataclass(frozen=True, slots=True)
class Step:
    """One node of a tree in preorder.

    `first..last`: the stages it covers; `end`: the index just past its subtree; `ends`: it is its parent's last child;
    `variant`: the option of a `Keep`, None for a frame; `depth`: 0 at top level; `moved`: a frame whose input goes to the host.
    """

    first: int
    last: int
    end: int
    ends: bool
    variant: str | None
    depth: int
    moved: bool = False


def flatten(tree: Iterable[Node]) -> list[Step]:
    """The nodes of a tree in preorder. `InvalidPlan` when stages are out of order, missing, or a frame is empty."""
    rows: list[list[Any]] = []  # first, last, end, ends, variant, depth, moved
    position = 0
    # A level of the walk: (iterator over siblings, index of their frame's row, index of the latest sibling's row)
    levels: list[list[Any]] = [[iter(nodes_of(tree)), -1, -1]]
    while levels:
        siblings, frame, latest = levels[-1]
        node = next(siblings, _END)
        if node is _END:
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
            if not is_int(node.stage) or node.stage != position:
                raise InvalidPlan(f"the plan has stage {shown(node.stage)} where stage {position} comes next")
            if not isinstance(node.variant, str):
                raise InvalidPlan(f"stage {position} has variant {shown(node.variant)}; expected the name of an option")
            rows.append([position, position, index + 1, False, node.variant, len(levels) - 1, False])
            position += 1
        elif isinstance(node, Recompute):
            if node.variant not in (KEEP, SPILL):
                raise InvalidPlan(
                    f"the frame at stage {position} is {shown(node.variant)}; its input is {KEEP!r} or {SPILL!r}"
                )
            rows.append([position, -1, -1, False, None, len(levels) - 1, node.variant == SPILL])
            levels.append([iter(nodes_of(node.children, "children")), index, -1])
        else:
            raise InvalidPlan(f"a plan's tree and children are Keep and Recompute; got {type(node).__name__}")
    return [Step(*row) for row in rows]


_END = object()


def nodes_of(nodes: Iterable[Node], what: str = "tree") -> tuple[Node, ...]:
    """`nodes` as a tuple; `InvalidPlan` where they are none."""
    try:
        return tuple(nodes)
    except TypeError:
        raise InvalidPlan(f"{what} is {shown(nodes)}; expected Keep and Recompute in a tuple") from None


def check_tree(chain: Chain, tree: Iterable[Node]) -> list[Step]:
    """`flatten(tree)`, once it is certain that the tree is a plan for `chain`; `InvalidPlan` otherwise."""
    check_chain(chain)
    steps = flatten(tree)
    covered = steps[-1].last + 1 if steps else 0
    if covered != len(chain):
        raise InvalidPlan(f"the plan covers {covered} stages and the chain has {len(chain)}")
    for step in steps:
        if step.variant is None:
            if step.moved and (step.depth or chain.stages[step.first].input_moved_s is None):
                raise InvalidPlan(
                    f"the plan has the input of stage {step.first} ({chain.stages[step.first].name!r}) on the host; "
                    + (
                        "that of a frame inside another stays here"
                        if step.depth
                        else "the chain says that it stays here"
                    )
                )
            continue
        stage = chain.stages[step.first]
        if step.depth and not stage.recomputable:
            raise InvalidPlan(
                f"stage {step.first} ({stage.name!r}) cannot be recomputed, and the plan puts it in a frame"
            )
        if step.variant != KEEP and all(step.variant != v.name for v in stage.variants):
            names = ", ".join(v.name for v in stage.options)
            raise InvalidPlan(
                f"stage {step.first} ({shown(stage.name)}) has no option {shown(step.variant)}; it has {names}"
            )
    return steps


def tree_text(tree: Iterable[Node]) -> str:
    """The tree as text: stage numbers, `:option` after those not plainly kept, frames in parentheses.

    >>> tree_text([Keep(0), Recompute((Keep(1), Recompute((Keep(2),)))), Keep(3, "spill")])
    '0 (1 (2)) 3:spill'
    """
    steps = flatten(tree)
    return steps_text(steps, 0, len(steps))


def steps_text(steps: Sequence[Step], start: int, end: int) -> str:
    """`tree_text` of the nodes `start..end-1` of a flattened tree."""
    words: list[str] = []
    closing: list[tuple[int, str]] = []
    for i in range(start, end):
        step = steps[i]
        while closing and closing[-1][0] <= i:
            words[-1] += closing.pop()[1]
        opening = ""
        if words and words[-1].endswith("("):
            opening = words.pop()
        if step.variant is None:
            words.append(opening + "(")
            closing.append((step.end, f"):{SPILL}" if step.moved else ")"))
        else:
            words.append(opening + str(step.first) + ("" if step.variant == KEEP else f":{step.variant}"))
    return " ".join(words) + "".join(text for _, text in reversed(closing))


def build_tree(tokens: Iterable[Token]) -> tuple[Node, ...]:
    """A tree out of its nodes in preorder, with "(" and ")" around what a frame recomputes; "):spill" ends one whose input is on
    the host."""
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
            levels[-1].append(Recompute(children, token[2:] or KEEP))
    if len(levels) > 1:
        raise InvalidPlan(f"the plan's tree leaves {len(levels) - 1} frame(s) open")
    return tuple(levels[0])


def parse_tree(text: str) -> tuple[Node, ...]:
    """A tree out of `tree_text`'s form; `InvalidPlan` names what is wrong.

    >>> parse_tree("0:spill (1)")
    (Keep(stage=0, variant='spill'), Recompute(children=(Keep(stage=1, variant='keep'),), variant='keep'))
    """
    if not isinstance(text, str):
        raise TypeError(f"text is {shown(text)}; expected a plan's tree as tree_text gives it")
    tokens: list[Token] = []
    for word in re.findall(rf"\(|\):{SPILL}|\)|[^\s()]+", text):
        if word in ("(", ")", f"):{SPILL}"):
            tokens.append(word)
            continue
        number, _, variant = word.partition(":")
        if not (number.isascii() and number.isdecimal()) or len(number) > _MOST_DIGITS:
            raise InvalidPlan(f"the plan's tree has {shown(word)} where a stage number was expected")
        tokens.append(Keep(int(number), variant or KEEP))
    tree = build_tree(tokens)
    flatten(tree)
    return tree


class DroppedRuns:
    """Which runs of stages have nothing that a backward comes to."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._staying = [0, *accumulate(stage.dropped_in is None for stage in stages)]
        dropped = self._staying[-1] < len(stages)
        ends = [number + 1 + (stage.dropped_in or 0) for number, stage in enumerate(stages)] if dropped else []
        self._ends = RangeMax(ends)

    def at(self, first: int, last: int) -> int | None:
        """The stage before which all that `first..last` hold is dropped; None where some of it stays."""
        return self._ends.over(first, last) if self._staying[last + 1] == self._staying[first] else None


class RangeMax:
    """The largest of any run of values, in constant time after n log n."""

    def __init__(self, values: list[int]) -> None:
        self.levels = [values]
        width = 1
        while 2 * width <= len(values):
            below = self.levels[-1]
            self.levels.append([max(below[i], below[i + width]) for i in range(len(below) - width)])
            width *= 2

    def over(self, first: int, last: int) -> int:
        level = (last - first + 1).bit_length() - 1
        row = self.levels[level]
        return max(row[first], row[last + 1 - (1 << level)])


def first_stage(node: Node) -> int:
    """The number of the first stage that a node covers."""
    while isinstance(node, Recompute):
        node = node.children[0]
    return node.stage


def last_stage(node: Node) -> int:
    """The number of the last stage that a node covers."""
    while isinstance(node, Recompute):
        node = node.children[-1]
    return node.stage
