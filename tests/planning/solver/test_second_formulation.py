"""The solver against an integer program that shares nothing with it: frames as intervals, bytes by holder and moment.

A plan is a set of intervals that do not cross (frames) and an option for each stage. What is held just before the backward of
stage s: what stage r <= s keeps, and the input of a frame that begins at or before s, unless a frame around it ends before s
(that one has yet to run again). No frame ends where another does: its content, kept there, costs a forward less.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from gpuckpt.planning import Chain, Stage, Variant, plan_chain, simulate
from gpuckpt.planning._offload import library_of
from gpuckpt.planning.strategies import keep_all

optimize = pytest.importorskip("scipy.optimize", reason="the integer program is solved by HiGHS through scipy")
sparse = pytest.importorskip("scipy.sparse")


class IntegerProgram:
    """Columns are added one by one, and rows `low <= sum of coefficient * column <= high`."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.integral: list[int] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []

    def column(self, cost: float = 0.0, integral: bool = False) -> int:
        self.cost.append(cost)
        self.integral.append(int(integral))
        return len(self.cost) - 1

    def row(self, terms: dict[int, float], low: float = -np.inf, high: float = np.inf) -> None:
        self.rows.append((terms, low, high))

    def least(self) -> float:
        matrix = sparse.lil_matrix((len(self.rows), len(self.cost)))
        for number, (terms, _, _) in enumerate(self.rows):
            for column, coefficient in terms.items():
                matrix[number, column] = coefficient
        lows, highs = [row[1] for row in self.rows], [row[2] for row in self.rows]
        found = optimize.milp(
            self.cost,
            integrality=self.integral,
            bounds=optimize.Bounds(0, 1),
            constraints=optimize.LinearConstraint(matrix.tocsr(), lows, highs),
            options={"mip_rel_gap": 0.0, "time_limit": 120.0},
        )
        assert found.status in (0, 2), found.message
        return np.inf if found.status == 2 else float(found.fun)


def least_seconds(chain: Chain, budget_bytes: int, host_bytes: int | None = None, price: float = 0.0) -> float:
    """Seconds of the fastest step, those on the link counted for `price`; infinity where nothing fits."""
    n, program = len(chain), IntegerProgram()

    def seconds(stage: int, option: Variant) -> float:
        later = sum(each.recomputable for each in chain.stages[stage + 1 :])
        moved_s = option.moved_s * (price if later >= 2 else 0.0)  # what the last two save may stay
        return option.forward_s + option.backward_s + 2 * (moved_s - option.moved_s)

    kept = [[program.column(seconds(i, o), True) for o in stage.options] for i, stage in enumerate(chain.stages)]
    for columns in kept:
        program.row(dict.fromkeys(columns, 1.0), 1.0, 1.0)
    frames = {
        (i, j): program.column(sum(s.forward_s for s in chain.stages[i : j + 1]) - chain.stages[j].tail_s, True)
        for i in range(n)
        for j in range(i, n)
        if all(s.recomputable for s in chain.stages[i : j + 1])
    }
    for j in range(n):
        program.row({column: 1.0 for (_, end), column in frames.items() if end == j}, high=1.0)
    for (i, j), column in frames.items():
        for (k, m), other in frames.items():
            if i < k <= j < m:
                program.row({column: 1.0, other: 1.0}, high=1.0)

    for s in range(n):
        held: dict[int, int] = {}  # of a storage: the column that says whether it is held

        def holds(x: int, terms: dict[int, float], constant: float = 0.0, held: dict[int, int] = held) -> None:
            """Storage x is held where `terms` add up to more than `constant`."""
            column = held.setdefault(x, -1)
            if column < 0:
                column = held[x] = program.column()
            program.row({column: 1.0, **{k: -v for k, v in terms.items()}}, low=-constant)

        on_host: dict[int, float] = {}
        for r in range(s + 1):
            waiting = {column: -1.0 for (i, j), column in frames.items() if i <= r <= j < s}
            for option, chosen in zip(chain.stages[r].options, kept[r], strict=True):
                back = (*option.spilled, *option.remade) if r == s else ()
                for x in (*option.saves, *back):
                    holds(x, {chosen: 1.0, **waiting})
                if option.spilled and host_bytes is not None:
                    there = program.column()
                    program.row({there: 1.0, chosen: -1.0, **dict.fromkeys(waiting, 1.0)}, low=0.0)
                    on_host[there] = sum(chain.storages[x] for x in option.spilled)
        for (a, b), column in frames.items():
            if a <= s:
                around = {other: -1.0 for (i, j), other in frames.items() if i <= a and b <= j < s and (i, j) != (a, b)}
                for x in chain.frame_holds(a, b):
                    holds(x, {column: 1.0, **around})
        program.row({column: float(chain.footprints[x]) for x, column in held.items()}, high=float(budget_bytes))
        if host_bytes is not None and on_host:
            program.row(on_host, high=float(host_bytes))
    return program.least()


def medium_chain(rng: random.Random, n: int, *, spills: bool = False) -> Chain:
    """Stages that save their input, two storages of their own and sometimes their output, with options that keep less of it."""
    sizes = [rng.randint(1, 4) for _ in range(n + 1)] + [rng.randint(1, 6) for _ in range(2 * n)]
    stages = []
    for i in range(n):
        own = (n + 1 + 2 * i, n + 2 + 2 * i)
        output = (i + 1,) if rng.random() < 0.3 else ()
        forward_s, backward_s = rng.randint(2, 9), rng.randint(2, 9)
        again_s = rng.randint(1, forward_s)
        variants = [Variant("part", (i, own[0]), forward_s, backward_s + again_s, remade=(own[1],), again_s=again_s)]
        if rng.random() < 0.5:
            variants.append(Variant("fused", (i, *output), forward_s, backward_s + forward_s - 1))
        if spills:
            moved_s = rng.randint(1, 4)
            away = {"spilled": own, "moved_s": moved_s}
            variants.append(Variant("spill", (i, *output), forward_s + moved_s, backward_s + moved_s, **away))
        stages.append(
            Stage(
                f"s{i}",
                forward_s,
                backward_s,
                (i, *own, *output),
                (i,),
                output=(i + 1,),
                recomputable=rng.random() > 0.05,
                variants=tuple(variants),
                tail_s=rng.randint(0, forward_s),
            )
        )
    return Chain(tuple(stages), tuple(sizes))


@pytest.mark.parametrize("seed", range(8))
def test_equals_an_integer_program(seed: int) -> None:
    rng = random.Random(seed)
    chain = medium_chain(rng, 6 + seed)
    most = simulate(chain, keep_all(chain)).peak_bytes
    smallest = plan_chain(chain, most).certificate.smallest_budget_bytes
    for budget in (smallest, round(smallest + 0.15 * (most - smallest)), round(smallest + 0.5 * (most - smallest))):
        found = plan_chain(chain, budget).certificate
        assert found.gap == 0.0
        assert found.step_s == pytest.approx(least_seconds(chain, budget), rel=1e-6), budget
    assert least_seconds(chain, smallest - 1) == np.inf


@pytest.mark.parametrize("seed", range(8))
def test_what_no_offload_is_faster_than_equals_an_integer_program(seed: int) -> None:
    rng = random.Random(seed)
    chain = medium_chain(rng, 6 + seed, spills=True)
    most = simulate(chain, keep_all(chain)).peak_bytes
    library = library_of(chain, "held", "auto")
    for budget in (most // 3, most // 2, most * 3 // 4):
        expected_s = max(least_seconds(chain, budget, price=price) / (1 + price) for price in (0.0, 0.2, 1.0))
        assert library.least_s(budget) == pytest.approx(expected_s, rel=1e-6)
    free = plan_chain(chain, most // 2).certificate
    for host_bytes in (free.host_peak_bytes // 3, free.host_peak_bytes):
        found = plan_chain(chain, most // 2, host_bytes=host_bytes).certificate
        assert found.step_s >= least_seconds(chain, most // 2, host_bytes) * (1 - 1e-6)
        assert found.host_peak_bytes <= host_bytes
