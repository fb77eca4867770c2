"""`explain_oom`: what it says is counted by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from gpuckpt import BudgetExceeded, CheckpointBudget, explain_oom, fit
from gpuckpt.cli.app import app
from gpuckpt.cli.oom import read_oom
from gpuckpt.pytorch.explain_oom import oom_page

ROWS, WIDTH = 100, 64


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))


def test_what_was_alive_is_counted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = network(), torch.ones(ROWS, WIDTH)
    saved = 4 * ROWS * WIDTH
    watch = explain_oom(model, save=tmp_path / "oom.json")
    with pytest.raises(BudgetExceeded) as refused, watch, CheckpointBudget(2 * saved + saved // 2, device="cpu"):
        model(x)
    page = capsys.readouterr().err.rstrip("\n")
    assert refused.value.__notes__ == [page]
    facts = watch.facts
    assert facts is not None
    assert facts == json.loads((tmp_path / "oom.json").read_text())
    weights = sum(p.nbytes for p in model.parameters())
    assert facts["kinds"]["parameter"] == weights
    assert facts["kinds"]["input"] == saved
    # x is saved, then the first block's output; what the second block makes of that is one too many.
    assert facts["kinds"]["activation"] == sum(facts["modules"].values())
    assert facts["kinds"]["activation"] % saved == 0
    assert set(facts["modules"]) <= {"0.1", "1.0", "1.1", "2.0"}
    assert facts["alive_bytes"] == sum(facts["kinds"].values())
    assert facts["asked_bytes"] - facts["free_bytes"] == saved // 2
    assert facts["expected"] is None
    assert "the model ran without a plan" in page
    assert "the smallest change that would have helped: " in page
    shown = CliRunner().invoke(app, ["oom", str(tmp_path / "oom.json")])
    assert shown.stdout.rstrip("\n") == page
    assert json.loads(CliRunner().invoke(app, ["oom", str(tmp_path / "oom.json"), "--json"]).stdout) == facts


def test_what_the_plan_expected_and_the_first_step_that_took_more() -> None:
    model, x = network(), torch.ones(ROWS, WIDTH)
    fitted = fit(model, x, "1MiB", live=2)
    watch = explain_oom(model)

    def step() -> None:
        model(x)
        raise MemoryError("no memory")

    with pytest.raises(MemoryError), watch:
        step()
    assert watch.facts is not None
    expected = watch.facts["expected"]
    assert expected["held_bytes"] == fitted.plan.certificate.peak_bytes
    assert expected["at"] == fitted.plan.certificate.peak_step
    page = oom_page(watch.facts)
    assert f"its plan expected {expected['held_bytes']:,} bytes held" in page
    assert "no step before held more than promised" in page
    page = oom_page({**watch.facts, "expected": {**expected, "deviation": [5, 7000]}})
    assert "the first step that took more: 7,000 bytes, promised were 5" in page


def test_torchs_own_error_tells_how_much_is_short() -> None:
    watch = explain_oom(network())
    words = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.50 GiB is free."
    with pytest.raises(torch.OutOfMemoryError), watch:
        raise torch.OutOfMemoryError(words)
    assert watch.facts is not None
    assert (watch.facts["asked_bytes"], watch.facts["free_bytes"]) == (2 << 30, 3 << 29)
    assert "no single change frees the 512 MiB that were missing" in oom_page(watch.facts)


def test_other_errors_and_steps_that_end_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    with explain_oom(model) as watch:
        model(torch.ones(2, WIDTH)).sum().backward()
    with pytest.raises(ValueError, match="mine"), explain_oom(model):
        raise ValueError("mine")
    assert watch.facts is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", pickle.dumps({"segments": []}), b'{"format": "gpuckpt.oom/1"}']
)
def test_only_its_own_files_are_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"snapshots are pickles, which can run code|is damaged"):
        read_oom(tmp_path / "file")
