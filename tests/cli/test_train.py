"""The main job: `gpuckpt train` on a small model, its report, its picture, and its refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gpuckpt.units import format_bytes

SMALL = ["--layers", "12", "--width", "32", "--heads", "2", "--context", "32", "--batch", "2", "--steps", "6"]


def gpuckpt(*arguments, cwd):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "gpuckpt.cli.app", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    done = gpuckpt("train", *SMALL, "--out", folder / "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out" / "report.json").read_text()), folder / "out"


def test_the_run_holds_exactly_what_the_plan_promised_and_no_more_than_the_cap(trained):
    _, report, _ = trained
    assert report["measured_peak_bytes"] == report["promised_peak_bytes"] <= report["cap_bytes"]
    assert report["cap_bytes"] == int(0.4 * report["plain_peak_bytes"])  # 12 blocks under 40% of the plain peak
    assert report["leftover_bytes"] == 0


def test_losses_are_bitwise_those_of_the_plain_run(trained):
    _, report, _ = trained
    assert len(report["losses"]) == 6
    assert report["losses"][: len(report["plain_losses"])] == report["plain_losses"] != []
    assert report["losses_equal"] is True
    assert report["losses"][-1] < report["losses"][0]


def test_report_and_picture_are_complete(trained):
    stdout, report, out = trained
    expected = ["cap_bytes", "promised_peak_bytes", "measured_peak_bytes", "plain_peak_bytes", "step_s", "plain_step_s"]
    expected += ["recompute_share", "losses", "plain_losses", "losses_equal", "device", "versions"]
    assert set(expected) <= set(report)
    assert report["recompute_share"] > 0
    assert report["versions"]["torch"]
    page = (out / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert format_bytes(report["plain_peak_bytes"]) in page
    (out / "page.html").unlink()
    done = gpuckpt("report", str(out), "--json", cwd=out)
    assert json.loads(done.stdout) == {"page": str(out / "page.html"), **json.loads((out / "page.json").read_text())}
    assert (out / "page.html").read_text() == page, "the same page, from its data alone"
    trace = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert max(row["args"]["bytes"] for row in trace if row["ph"] == "C") == report["measured_peak_bytes"]
    assert (out / "ledger.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "ledger.svg").read_text()
    assert "bitwise equal" in stdout


def test_json_is_all_that_is_printed(tmp_path):
    done = gpuckpt("train", *SMALL[:-1], 1, "--activation", "swiglu", "--json", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "report.json").read_text())


def test_with_a_host_budget_both_peaks_are_as_promised(tmp_path):
    options = ["--steps", 2, "--host-budget", "64MiB"]
    done = gpuckpt("train", *SMALL[:-2], *options, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["measured_peak_bytes"] == report["promised_peak_bytes"] <= report["cap_bytes"]
    assert report["host_measured_peak_bytes"] == report["host_promised_peak_bytes"]
    assert report["losses_equal"] is True
    assert report["leftover_bytes"] == 0
    assert "on the host, measured" in done.stdout


def test_a_budget_one_byte_too_small_is_refused_before_the_first_step(trained, tmp_path):
    smallest = trained[1]["smallest_budget_bytes"]
    refused = gpuckpt("train", *SMALL, "--budget", smallest - 1, "--out", tmp_path / "a", cwd=tmp_path)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert str(smallest - 1) in line
    assert f"the smallest that would do is {smallest} bytes" in line
    assert not (tmp_path / "a").exists()
    passed = gpuckpt("train", *SMALL[:-1], 1, "--budget", smallest, "--out", tmp_path / "b", cwd=tmp_path)
    assert passed.returncode == 0, passed.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", "empty"], "no bytes"),
        (["--data", "short"], "one context of 32 needs 33"),
        (["--width", "33"], "not divisible by --heads 2"),
        (["--device", "cuda:99"], "is not there"),
        (["--device", "bicycle"], "is not there"),
        (["--budget", "many"], "'many' is not a size in bytes"),
        (["--steps", "0"], "--steps is 0"),
        (["--activation", "swish9"], "swish9"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(arguments, says, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("x" * 32)
    done = gpuckpt("train", *SMALL, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpuckpt: ")
    assert says in line


def test_interrupted_it_leaves_a_valid_report(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-u", "-m", "gpuckpt.cli.app", "train", *SMALL[:-1], "100000", "--out", str(out)]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # measured and planned
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 130, output
    report = json.loads((out / "report.json").read_text())
    assert report["interrupted"] is True
    assert 0 < len(report["losses"]) < 100000
    assert report["measured_peak_bytes"] <= report["cap_bytes"]


@pytest.mark.parametrize("text", [None, "[]", "{", '{"format": 1}'])
def test_a_report_of_something_else_is_refused_in_one_line(text, tmp_path):
    if text is not None:
        (tmp_path / "page.json").write_text(text)
    done = gpuckpt("report", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpuckpt: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
