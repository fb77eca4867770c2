"""A million operations in whole lives of a budget (tests/memory/lives.py) on each pool; a line of their counts is added to
results/budget_lives.jsonl.

    python benchmarks/budget_lives.py [--seconds S]    S: what each pool may take, where a million take longer
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from bench_record import RESULTS, append

TESTS = Path(__file__).resolve().parent.parent / "tests"


class Collected:
    """What the tests recorded, each with its outcome."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed:
            self.runs.append({"outcome": report.outcome, **dict(report.user_properties)})


def main() -> None:
    """Run the slow tests of the lives and append what they did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float)
    seconds = parser.parse_args().seconds
    if seconds is not None:
        os.environ["GPUCKPT_LIVES_SECONDS"] = str(seconds)
    collected = Collected()
    code = pytest.main(["-q", "-m", "slow", str(TESTS / "memory" / "test_whole_lives.py")], plugins=[collected])
    append(RESULTS / "budget_lives.jsonl", {"seconds_allowed": seconds, "runs": collected.runs})
    raise SystemExit(code)


if __name__ == "__main__":
    main()
