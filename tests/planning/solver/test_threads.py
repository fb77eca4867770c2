"""The solver's threads are its own: torch's count stays, Numba's layer never starts, and solves may run at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpuckpt.planning import Chain, Stage
from gpuckpt.planning.solver import solve
from gpuckpt.planning.solver.problem import build_problem
from gpuckpt.planning.solver.threads import Team

_KEEPS_TORCHS_THREADS = """
import sys
import torch
torch.set_num_threads(int(sys.argv[1]))
torch.randn(512, 512, requires_grad=True).square().sum().backward()  # before it, Numba's layer changed nothing
from gpuckpt.planning import Chain, Stage, plan_chain
for n in (3, 30, 150):
    sizes = tuple(1000 + 37 * i % 211 for i in range(2 * n))
    chain = Chain(tuple(Stage(f"s{i}", 1 + i % 7, 2, (i, n + i), (i,)) for i in range(n)), sizes)
    plan_chain(chain, sum(sizes) // 2, engine="numba", slots=500)
    print(torch.get_num_threads())
from numba.np.ufunc import parallel
print(parallel._is_initialized)
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_a_solve_leaves_torchs_thread_count_alone(threads: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment["NUMBA_NUM_THREADS"] = "2"  # on one core too the solver has a second thread
    done = subprocess.run(
        [sys.executable, "-c", _KEEPS_TORCHS_THREADS, str(threads)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.split() == [str(threads)] * 3 + ["False"]


def chain_of_sizes(seed: int, n: int) -> Chain:
    rng = random.Random(seed)
    stages = (Stage(f"s{i}", rng.randint(1, 9), 1, (i, n + i), (i,)) for i in range(n))
    return Chain(tuple(stages), tuple(rng.randint(1, 1000) for _ in range(2 * n)))


def test_solves_at_once_equal_solves_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.NUMBA_NUM_THREADS", 3)
    monkeypatch.setattr("gpuckpt.planning.solver.dp_numba._SERIAL_SUMS", 0)
    chains = [chain_of_sizes(seed, 20 + 9 * seed) for seed in range(6)]

    def seconds(chain: Chain, engine: str = "numba") -> np.ndarray:
        solution = solve(chain, build_problem(chain), sum(chain.storages) // 3, slots=200, engine=engine)
        return solution.seconds_by_slots.copy()

    with ThreadPoolExecutor(6) as pool:
        at_once = list(pool.map(seconds, chains))
    for chain, found in zip(chains, at_once, strict=True):
        assert np.array_equal(found, seconds(chain))
        assert np.allclose(found, seconds(chain, "numpy"), rtol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_a_team_runs_every_share_once_and_waits(size: int) -> None:
    done: list[tuple[int, int]] = []

    def work(base: int, share: int, shares: int) -> None:
        time.sleep(0.01 * share)
        done.append((base + share, shares))

    before = threading.active_count()
    with Team(size) as team:
        for base in (0, 100):
            team.run(work, base)
            assert sorted(done) == [(base + share, team.size) for share in range(team.size)]
            done.clear()
    assert threading.active_count() == before


@pytest.mark.parametrize("broken", [0, 2])
def test_an_error_in_a_share_is_raised_once_nothing_runs_any_more(broken: int) -> None:
    running: list[int] = []

    def work(share: int, shares: int) -> None:
        running.append(share)
        time.sleep(0.02)
        running.remove(share)
        if share == broken:
            raise ValueError(f"share {share}")

    with Team(3) as team:
        with pytest.raises(ValueError, match=f"share {broken}"):
            team.run(work)
        assert running == []


def test_a_thread_that_is_busy_elsewhere_is_not_waited_for() -> None:
    done: list[int] = []
    with Team(2) as team:
        free = threading.Event()
        assert team._others is not None
        team._others.submit(free.wait, 10)
        team.run(lambda share, shares: done.append(share))
        assert sorted(done) == [0, 1]
        free.set()
