"""Results are added, never replaced, and say where they are from; two revisions are compared in pairs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench_record(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_record

    return bench_record


@pytest.fixture
def compare(bench_record):
    import compare

    return compare


def test_a_record_says_commit_date_machine_and_versions(bench_record) -> None:
    found = bench_record.about()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert found["commit"] == head.stdout.strip()
    assert isinstance(found["changed"], bool)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])
    assert abs(age.total_seconds()) < 60
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["processor"]


def test_a_copy_without_history_has_no_commit(bench_record, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench_record, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = bench_record.about()
    assert found["commit"] is found["changed"] is None


def test_records_are_added_and_the_latest_is_the_last(bench_record, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("GPUCKPT_RESULTS", raising=False)
    path = tmp_path / "new" / "figures.jsonl"
    for number in range(3):
        assert bench_record.append(path, {"step_s": number})["step_s"] == number
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step_s"] for line in lines] == [0, 1, 2]
    assert all(line["about"]["date"] for line in lines)
    assert bench_record.latest(path) == lines[-1]
    monkeypatch.setenv("GPUCKPT_RESULTS", str(tmp_path / "elsewhere.jsonl"))
    bench_record.append(path, {"step_s": 3})
    assert len(path.read_text().splitlines()) == 3
    assert bench_record.latest(tmp_path / "elsewhere.jsonl")["step_s"] == 3


def test_every_result_in_the_repository_is_lines_that_say_where_they_are_from() -> None:
    files = sorted((BENCHMARKS / "results").glob("*.jsonl"))
    assert files
    assert not list((BENCHMARKS / "results").glob("*.json"))
    for file in files:
        for line in file.read_text().splitlines():
            about = json.loads(line)["about"]
            assert re.fullmatch(r"[0-9a-f]{40}", about["commit"] or about["recorded_in"]), file
            assert datetime.fromisoformat(about["date"]).tzinfo is not None
            assert about["machine"]


def test_seconds_are_found_wherever_they_stand(compare) -> None:
    record = {
        "about": {"machine": {"boot_s": 9.0}},
        "rows": [{"step_s": 1.0, "bytes": 5, "bound_s": 7.0}, {"step_s": 2, "done_s": True}],
        "forward_s": {"ours": 3.0},
    }
    assert dict(compare.seconds_in(record)) == {"rows[0].step_s": 1.0, "rows[1].step_s": 2.0, "forward_s.ours": 3.0}


BENCHMARK = """
import sys, pathlib
sys.path.insert(0, {library!r})
from bench_record import append
runs = pathlib.Path({runs!r})
number = len(runs.read_text().split()) if runs.exists() else 0
with runs.open("a") as file:
    file.write({name!r} + "\\n")
append(pathlib.Path("never.jsonl"), {{"step_s": {seconds} + 0.25 * number, "only_here_{name}_s": 1.0}})
"""


def test_two_checkouts_take_turns_and_ratios_are_of_pairs(compare, tmp_path) -> None:
    runs = tmp_path / "runs"
    for name, seconds in (("base", 1.0), ("head", 3.0)):
        folder = tmp_path / name / "benchmarks"
        folder.mkdir(parents=True)
        source = BENCHMARK.format(library=str(BENCHMARKS), runs=str(runs), name=name, seconds=seconds)
        (folder / "toy.py").write_text(source)
    (row,) = compare.compare(tmp_path / "base", tmp_path / "head", "toy", [], 3)
    order = runs.read_text().split()
    # One pair is thrown away; the first of a pair changes.
    assert order == ["base", "head", "head", "base", "base", "head", "head", "base"]
    was = [1 + 0.25 * number for number in (3, 4, 7)]
    now = [3 + 0.25 * number for number in (2, 5, 6)]
    assert row["figure"] == "step_s"
    assert (row["base_s"], row["head_s"]) == (was[1], now[1])
    assert row["ratio"] == sorted(b / a for a, b in zip(was, now, strict=True))[1]
    assert row["noise"] is False


def test_a_benchmark_that_fails_is_told_with_its_output(compare, tmp_path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "toy.py").write_text("print('so far'); raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match=r"ended with 1:\nso far\nno such thing"):
        compare.run(tmp_path, "toy", [])
    with pytest.raises(RuntimeError, match="no benchmark called 'other'"):
        compare.run(tmp_path, "other", [])


def test_a_benchmark_without_figures_is_told(compare, tmp_path) -> None:
    script = tmp_path / "benchmarks" / "talk.py"
    script.parent.mkdir()
    script.write_text("print('100 stages in 0.01 s')\n")
    with pytest.raises(RuntimeError, match=r"talk\.py neither added a record"):
        compare.run(tmp_path, "talk", [])


@pytest.mark.parametrize(
    "path", [path for path in sorted(BENCHMARKS.glob("*.py")) if "__main__" in path.read_text()], ids=lambda p: p.stem
)
def test_each_runs_by_its_path_from_anywhere(path: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.name in done.stdout
