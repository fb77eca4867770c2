"""`gpuckpt bench`, and what the help of all commands says: examples that are understood, exit codes, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import gpuckpt
from gpuckpt.cli import app as cli
from gpuckpt.cli import bench

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def run(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpuckpt.cli.app", *words]
    path = str(Path(gpuckpt.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=env, cwd=cwd, check=False)


def test_a_benchmark_by_name_with_its_own_options(tmp_path: Path) -> None:
    done = run("bench", "memory", "--quick", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["about"]["versions"]["torch"]
    assert all(row["median_s"] > 0 for rows in found["saved_tensor"].values() for row in rows.values())
    refused = run("bench", "memory", "--no-such-option", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--no-such-option" in refused.stderr


def test_the_list(tmp_path: Path) -> None:
    done = run("bench", COLUMNS="80", cwd=tmp_path)
    listed = json.loads(run("bench", "--json").stdout)
    assert {"checkpoint", "memory", "planner", "step_time", "zoo", "gpu_suite"} <= set(listed)
    assert not {"bench_record", "rival_planners"} & set(listed), "those are no programs"
    assert all(listed.values())
    assert max(map(len, done.stdout.splitlines())) <= 80
    words = done.stdout.split()
    assert all(name in words for name in listed)


def test_what_cannot_be_run_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no benchmark 'memori'; there are .*memory"):
        bench.run_benchmark("memori", None, [])
    with pytest.raises(ValueError, match="memory runs on cpu, and not on --device cuda; there run gpu_suite"):
        bench.run_benchmark("memory", "cuda", [])
    with pytest.raises(ValueError, match="gpu_suite runs on cuda, and not on --device cpu"):
        bench.run_benchmark("gpu_suite", "cpu", [])
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "gpuckpt" / "cli" / "bench.py"))
    with pytest.raises(FileNotFoundError, match="no part of the installed package"):
        bench.benchmarks()
    done = run("bench", "memori")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_a_benchmark_that_fails_says_so_by_its_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "bench_record.py").touch()
    script = "import sys\nif __name__ == '__main__':\n    sys.exit(3 if sys.argv[1:] == ['--quick'] else 4)\n"
    (folder / "fails.py").write_text(script)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "gpuckpt" / "cli" / "bench.py"))
    assert bench.benchmarks() == {"fails": ""}
    assert bench.run_benchmark("fails", "cpu", ["--quick"]) == 3


def test_quick_runs_leave_the_history_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import argparse

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import bench_record

    monkeypatch.setenv("GPUCKPT_RESULTS", "")
    monkeypatch.delenv("GPUCKPT_RESULTS")
    for words, rounds, elsewhere in (
        (["x"], 9, False),
        (["x", "--quick"], 2, True),
        (["x", "--quick", "--rounds", "5"], 5, True),
    ):
        monkeypatch.delenv("GPUCKPT_RESULTS", raising=False)
        monkeypatch.setattr(sys, "argv", words)
        parser = argparse.ArgumentParser()
        parser.add_argument("--rounds", type=int, default=9)
        assert bench_record.arguments(parser, rounds=2).rounds == rounds
        assert ("GPUCKPT_RESULTS" in os.environ) == elsewhere


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_are_understood(name: str) -> None:
    command = COMMANDS[name]
    examples = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("gpuckpt")]
    assert examples
    for example in examples:
        program, its_name, *words = example.split()
        assert (program, its_name) == ("gpuckpt", name)
        command.make_context(name, words)  # raises for an option that is not there
    shown = run(name, "--help", COLUMNS="100").stdout
    assert all(example in shown for example in examples)


def test_version_exit_codes_and_completion() -> None:
    assert run("--version").stdout == f"gpuckpt {gpuckpt.__version__}\n"
    shown = run("--help").stdout
    for words in ("Exit codes: 0 done; 1", "130 interrupted by", "--install-completion", "Usage: gpuckpt"):
        assert words in shown
    completed = run(_GPUCKPT_COMPLETE="complete_bash", COMP_WORDS="gpuckpt do", COMP_CWORD="1")
    assert completed.stdout.split() == ["doctor"]
