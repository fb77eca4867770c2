"""How long the largest chains take, and how much memory: 339 stages and 10,000 blocks, with options.

Seconds are those of processors, over the two cores that the bounds are for: other work on the machine does not count.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpuckpt.planning import Chain, Plan, Stage, Variant, plan_chain, simulate
from gpuckpt.planning.strategies import keep_all

CORES = 2


def chain_with_options(n: int, options: int, *, equal: bool) -> Chain:
    """Stages that save their input and five storages; option k makes the last k of them again."""
    rng, sizes, stages = random.Random(0), [], []
    for i in range(n):
        if not i or not equal:
            new = [rng.randint(50, 100), *(rng.randint(50, 300) for _ in range(5))]
            forward_s = rng.uniform(0.5, 2.0)
        first = len(sizes)
        sizes += new
        ids = tuple(range(first, first + 6))
        variants = tuple(
            Variant(
                f"less{k}",
                ids[: 6 - k],
                forward_s,
                (2 + 0.1 * k) * forward_s,
                remade=ids[6 - k :],
                again_s=0.1 * k * forward_s,
            )
            for k in range(1, options)
        )
        output = (first + 6,) if i + 1 < n else ()
        stages.append(
            Stage(
                f"s{i}", forward_s, 2 * forward_s, ids, ids[:1], (), output, variants=variants, tail_s=0.1 * forward_s
            )
        )
    return Chain(tuple(stages), tuple(sizes))


def timed_plan(chain: Chain, share: float) -> tuple[Plan, float]:
    """A plan in 500 slots, and the seconds that two idle cores would take for it."""
    began_s = time.process_time()
    plan = plan_chain(chain, int(share * simulate(chain, keep_all(chain)).peak_bytes), slots=500, engine="numba")
    return plan, (time.process_time() - began_s) / CORES


@pytest.mark.timed
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_339_stages_with_six_options_in_500_slots(share: float) -> None:
    timed_plan(chain_with_options(60, 6, equal=False), 0.5)  # compiles, or loads
    plan, seconds = timed_plan(chain_with_options(339, 6, equal=False), share)
    assert seconds < 1.5
    assert plan.certificate.gap is not None
    assert plan.certificate.gap < 0.1


@pytest.mark.slow
@pytest.mark.timed
def test_ten_thousand_equal_blocks_with_four_options() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_sizes as t;"
        "t.timed_plan(t.chain_with_options(60, 4, equal=False), 0.5);"
        "plan, seconds = t.timed_plan(t.chain_with_options(10_000, 4, equal=True), 0.3);"
        # Not getrusage: its maximum counts what the parent had when it started this process.
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(seconds, peak, plan.certificate.gap)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=True
    )
    seconds, peak_kib, gap = map(float, done.stdout.split())
    assert seconds < 15.0
    assert peak_kib * 1024 < 1 << 30
    assert gap < 0.4
