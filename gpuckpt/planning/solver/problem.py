"""A chain as arrays of bytes and seconds, in the form the solver's recurrences need.

The solver walks a piece of the chain from its first stage on and asks what each choice adds to what is held already. Two facts
about what is held matter: whether the piece's input is (a frame holds it, or the stage before saved its output), and, at top
level, whether the extras are (masks and the like, held from their first holder on). Everything else a stage saves is its own.

Where a chain shares storages in other ways (a skip connection over several stages, two different sets of extras) the arrays
charge such bytes more than once, and what a stage holds whose result is dropped until the end: plans stay sound, and `exact` is
False.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuckpt.checks import shown
from gpuckpt.errors import InvalidChain
from gpuckpt.planning.chain import Chain

__all__ = ["Problem", "build_problem"]

_MOST_STAGES = 20_000  # for which the smallest budget takes seconds; its time goes with the square

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Problem:
    """Arrays over stages (n) and ways to keep them (n, v); bytes are int64, seconds float64.

    Attributes:
        option_bytes: (2, n, v); what keeping adds, [0] when the stage's input is not held yet, [1] when it is.
        option_s: (n, v); seconds of a step above those of plainly keeping; inf where a stage has fewer options.
        option_covers: (2, n, v); whether the next stage's input is held afterwards.
        option_extras: (n, v); whether keeping holds extras.
        input_bytes: (n,); what a frame that starts here adds for its input.
        extras_bytes: bytes of all extras together; uses_extras: (n,), stages whose frames hold them.
        forward_s, tail_s: (n,); recomputable: (n,).
        option_need, back_need: (2, n, v); bytes alive beyond what keeping holds while a kept stage runs forward, and in its
            backward, where what was spilled or is made again is held as well, and what checkpoints inside of it recompute.
        first_need, run_need: (n,); the same for a stage that runs forward in a frame, as its first stage and further on.
        gradient_bytes: (n,); gradient of the stage's output, alive while a frame that ends with it recomputes.
        input_away_s: (n,); seconds for which a frame of the top level holds nothing for its input; inf where it has to.
        exact: the arrays charge every byte once.
    All the needs and gradients are zero when the plan has to fit held bytes only, but for what is held in backward alone.
    """

    option_bytes: Ints
    option_s: Floats
    option_covers: Bools
    option_extras: Bools
    input_bytes: Ints
    extras_bytes: int
    uses_extras: Bools
    forward_s: Floats
    tail_s: Floats
    recomputable: Bools
    option_need: Ints
    back_need: Ints
    first_need: Ints
    run_need: Ints
    gradient_bytes: Ints
    input_away_s: Floats
    exact: bool

    @property
    def n(self) -> int:
        """Number of stages."""
        return len(self.input_bytes)

    def again_s(self, i: int, j: int) -> NDArray[np.float32]:
        """Seconds that the recompute of a frame over i..k takes, for k in i..j-1: it stops before the tail of its last stage."""
        return (np.cumsum(self.forward_s[i:j]) - self.tail_s[i:j]).astype(np.float32)


def build_problem(chain: Chain, objective: str = "held") -> Problem:
    """The arrays of `chain`, for plans that fit "held" or "total" bytes. Raises `InvalidChain` for too many stages."""
    n, stages = len(chain), chain.stages
    if n > _MOST_STAGES:
        raise InvalidChain(
            f"chain {shown(chain.name)} has {n} stages; at most {_MOST_STAGES} are planned: make one stage of several blocks"
        )
    v = max(len(stage.variants) for stage in stages) + 1
    footprints = chain.footprints
    extras = frozenset(i for stage in stages for i in stage.extras)

    def charge(ids: set[int] | frozenset[int]) -> int:
        return sum(footprints[i] for i in ids if i not in extras)

    option_bytes = np.zeros((2, n, v), np.int64)
    option_s = np.full((n, v), np.inf)
    option_covers = np.zeros((2, n, v), bool)
    option_extras = np.zeros((n, v), bool)
    option_need, back_need = np.zeros((2, n, v), np.int64), np.zeros((2, n, v), np.int64)
    input_bytes, uses_extras = np.zeros(n, np.int64), np.zeros(n, bool)
    inputs = [frozenset(stage.inputs) for stage in stages] + [frozenset[int]()]
    for i, stage in enumerate(stages):
        input_bytes[i] = charge(inputs[i])
        uses_extras[i] = bool(stage.extras)
        following = inputs[i + 1]
        for o, option in enumerate(stage.options):
            saves = frozenset(option.saves)
            option_bytes[0, i, o] = charge(saves)
            option_bytes[1, i, o] = charge(saves - inputs[i])
            option_s[i, o] = option.forward_s + option.backward_s - stage.forward_s - stage.backward_s
            option_covers[0, i, o] = saves >= following - extras
            option_covers[1, i, o] = saves | inputs[i] >= following - extras
            option_extras[i, o] = not saves.isdisjoint(extras)
            spilled = frozenset(option.spilled) - saves
            backs = [spilled | frozenset(ids) - saves for ids in (option.remade, option.remade_later)]
            for c in (0, 1):
                before = inputs[i] - extras if c else frozenset[int]()
                alive_bytes = stage.again_bytes
                if objective == "total":
                    held = saves | spilled | (inputs[i] if c else frozenset())
                    away_bytes = chain.charge(tuple(spilled - before))
                    option_need[c, i, o] = away_bytes + stage.workspace_bytes + chain.running_bytes(i, held)
                    gradients_bytes = stage.output_bytes + (stages[i - 1].output_bytes if i else 0)
                    alive_bytes += stage.workspace_bytes + gradients_bytes
                for back in backs:
                    need_bytes = alive_bytes
                    if objective == "total" and (option.remade or option.remade_later):
                        again_bytes = stage.workspace_bytes + chain.running_bytes(i, held | back)
                        need_bytes = max(need_bytes, stage.output_bytes + again_bytes)
                    need_bytes += chain.charge(tuple(back - before))
                    back_need[c, i, o] = max(back_need[c, i, o], need_bytes)
        uses_extras[i] |= bool(option_extras[i].any()) or not inputs[i].isdisjoint(extras)

    first_need, run_need, gradient_bytes = (np.zeros(n, np.int64) for _ in range(3))
    if objective == "total":
        workspace = np.array([stage.workspace_bytes for stage in stages], np.int64)
        gradient_bytes = np.array([stage.output_bytes for stage in stages], np.int64)
        run_need = workspace + np.array([chain.running_bytes(i) for i in range(n)], np.int64)
        first_need = workspace + np.array([chain.running_bytes(i, inputs[i]) for i in range(n)], np.int64)

    return Problem(
        option_bytes=option_bytes,
        option_s=option_s,
        option_covers=option_covers,
        option_extras=option_extras,
        input_bytes=input_bytes,
        extras_bytes=sum(footprints[i] for i in extras),
        uses_extras=uses_extras,
        forward_s=np.array([stage.forward_s for stage in stages], np.float64),
        tail_s=np.array([stage.tail_s for stage in stages], np.float64),
        recomputable=np.array([stage.recomputable for stage in stages], bool),
        option_need=option_need,
        back_need=back_need,
        first_need=first_need,
        run_need=run_need,
        gradient_bytes=gradient_bytes,
        input_away_s=np.array([np.inf if s.input_moved_s is None else 2 * s.input_moved_s for s in stages], np.float64),
        exact=_charges_once(chain, inputs, extras) and all(stage.dropped_in is None for stage in stages),
    )


def _charges_once(chain: Chain, inputs: list[frozenset[int]], extras: frozenset[int]) -> bool:
    """Whether every storage is a stage's own, or shared across one boundary, or one of a single set of extras."""
    boundary_of: dict[int, int] = {}
    for i, ids in enumerate(inputs):
        for x in ids - extras:
            if boundary_of.setdefault(x, i) != i:
                return False
    owner_of: dict[int, int] = {}
    for i, stage in enumerate(chain.stages):
        if stage.extras and frozenset(stage.extras) != extras:
            return False
        if not stage.extras and not inputs[i].isdisjoint(extras):
            return False
        for option in stage.options:
            saves = frozenset(option.saves)
            if not saves.isdisjoint(extras) and not (saves >= extras and stage.extras):
                return False
            following = inputs[i + 1] - extras
            if not (saves >= following or saves.isdisjoint(following)):
                return False
            spilled = frozenset(option.spilled)
            if not extras.isdisjoint((*spilled, *option.remade, *option.remade_later)):
                return False
            for x in frozenset(option.ids) - extras:
                boundary = boundary_of.get(x)
                if boundary is None:
                    if owner_of.setdefault(x, i) != i:
                        return False
                elif i not in (boundary - 1, boundary):
                    return False
    return True
