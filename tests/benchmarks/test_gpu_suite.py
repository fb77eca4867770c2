"""The GPU suite runs dry without a GPU, its checks can fail, and a part that hangs or crashes costs its own lines only."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks" / "gpu_suite.py"


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(SUITE.parent))
    import gpu_suite

    return gpu_suite


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def dry(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(SUITE), "--out", str(out), "--dry", *options]
    return subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=900)


def test_parts_run_dry_from_anywhere(tmp_path):
    done = dry(tmp_path, "--only", "smoke,ceilings,streams", "--limit", "400")
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    rows = rows_of(tmp_path)
    assert [row["name"] for row in rows if row["part"] == "smoke"] == [
        "linear", "mlp", "gated_mlp", "linear_cross_entropy", "the whole part",
    ]  # fmt: skip
    assert all(row["ok"] for row in rows if row["part"] == "smoke")
    assert {row["part"] for row in rows} == {"smoke", "ceilings", "streams"}
    assert (tmp_path / "summary.md").read_text().startswith("7 checks passed, 0 failed")
    assert "ceilings: copy" in json.loads((tmp_path / "golden.json").read_text())


@pytest.mark.slow
def test_every_part_runs_dry(tmp_path):
    done = dry(tmp_path, "--limit", "800")
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    rows = rows_of(tmp_path)
    whole = [row for row in rows if row["name"] == "the whole part"]
    assert len(whole) == 12
    assert all(row["ok"] for row in whole)
    assert sum(row.get("ok") is True for row in rows) >= 60


def test_a_part_that_is_none_is_refused(tmp_path):
    done = dry(tmp_path, "--only", "nonsense")
    assert done.returncode == 2
    assert "no such part: nonsense" in done.stdout


def test_a_part_out_of_time_is_ended_and_keeps_what_it_found(suite, tmp_path):
    began_s = time.monotonic()
    assert suite.run_part(suite.PARTS[1], tmp_path, 0.2, dry=True) == ["timeout"]
    assert time.monotonic() - began_s < 30
    suite.say(tmp_path, "smoke", "linear", ok=True)
    suite.say(tmp_path, "smoke", "the whole part", ok=False, codes=["timeout"])
    assert suite.summarise(tmp_path, compare=False) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("1 checks passed, 1 failed")
    assert "FAILED smoke" in summary


def test_a_part_that_crashes_is_a_failure(suite, tmp_path, monkeypatch):
    broken = suite.Part("nowhere", "values", 60)
    codes = suite.run_part(broken, tmp_path, 60, dry=True)
    assert codes == [1]
    monkeypatch.setattr(suite, "PARTS", (broken,))
    options = argparse.Namespace(out=tmp_path, only="", limit=100, dry=True)
    assert suite.run_all(options) == 1
    assert rows_of(tmp_path)[-1]["codes"] == [1]


def test_what_does_not_fit_in_the_time_is_left_out_by_name(suite, tmp_path):
    options = argparse.Namespace(out=tmp_path, only="smoke", limit=5, dry=True)
    suite.run_all(options)
    assert rows_of(tmp_path) == [{"part": "smoke", "name": "the whole part", "left_out": "5 s were left"}]


@pytest.fixture
def context(suite, tmp_path):
    from gpu_parts.common import Context

    return Context(tmp_path, "values", True, time.monotonic() + 100, 0, 1, suite.say)


@pytest.mark.parametrize("op", ["linear", "mlp", "gated_mlp", "linear_cross_entropy"])
def test_a_wrong_result_fails_a_check(context, op):
    from gpu_parts.cases import compare, make

    leaves, ours, torchs = make(context, op, 16, 8, 24, torch.float32, "gelu")
    assert compare(leaves, ours, torchs)["ok"]
    assert not compare(leaves, lambda *a: 1.0001 * ours(*a), torchs)["ok"]
    assert not compare(leaves, lambda *a: ours(*a) * float("nan"), torchs)["ok"]
    drift = iter((1.0, 1.001))
    drifting = compare(leaves, lambda *a: ours(*a) * next(drift), torchs)
    assert drifting["error_over_allowed"] <= 1
    assert not drifting["same_bits_twice"]
    assert not drifting["ok"]


def test_an_item_that_raises_is_a_failed_check_and_a_lost_context_ends_the_part(context, tmp_path):
    def raises(text):
        raise RuntimeError(text)

    context.item("first", lambda: raises("wrong"))
    context.item("second", lambda: {"ok": True})
    with pytest.raises(SystemExit):
        context.item("third", lambda: raises("CUDA error: an illegal memory access was encountered"))
    assert [(row["name"], row["ok"]) for row in rows_of(tmp_path)] == [
        ("first", False),
        ("second", True),
        ("third", False),
    ]


def test_figures_are_compared_with_those_of_the_same_device(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "GOLDEN", tmp_path)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    assert "copy golden.json to nvidia-h100-80gb.json" in suite.slower({"a": 1.0}, "NVIDIA H100 80GB")[0]
    (tmp_path / "nvidia-h100-80gb.json").write_text(json.dumps({"a": 1.0, "b": 1.0}))
    assert suite.slower({"a": 1.05, "b": 1.2, "c": 9.0}, "NVIDIA H100 80GB") == ["SLOWER b: 1.2 ms, before 1"]
