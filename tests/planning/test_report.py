"""The report of a plan says what the tree and the simulator say, and agrees with the run."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from gpuckpt import Chain, Stage, fit, plan_chain, simulate
from gpuckpt.errors import InvalidPlan
from gpuckpt.planning import Keep, Recompute, Variant, certify, strategies, with_spill
from gpuckpt.planning.report import explain


def chain_of(count: int, spill: bool = False) -> Chain:
    """Stages that each save a storage of 100 bytes and their input of 10."""
    variants = (Variant("spill", (), 1.1, 2.1),) if spill else ()
    stages = [
        Stage(f"s{i}", 1.0, 2.0, (2 * i, 2 * i + 1), (2 * i,), output=(2 * i + 2,), output_bytes=10, variants=variants)
        for i in range(count)
    ]
    return Chain(tuple(stages), (10, 100) * count + (10,), name="toy")


def test_all_kept() -> None:
    chain = chain_of(3)
    report = explain(chain, plan_chain(chain, 1000))
    assert [stage.fate for stage in report.stages] == ["kept"] * 3
    assert {stage.why for stage in report.stages} == {"everything fits in the budget"}
    assert report.keep_all_bytes == report.promised_peak_bytes == 330
    assert report.recompute_ms == 0
    assert "measured nothing yet" in str(report)


def test_recomputed_stages_name_bytes_and_milliseconds() -> None:
    chain = chain_of(6)
    plan = plan_chain(chain, 330)
    report = explain(chain, plan)
    counts = simulate(chain, plan.tree).forward_counts
    assert [stage.runs for stage in report.stages] == list(counts)
    recomputed = [stage for stage in report.stages if stage.fate == "recomputed"]
    assert recomputed
    assert sum(stage.recompute_ms for stage in report.stages) == pytest.approx(report.recompute_ms)
    assert all(stage.saves_bytes == 110 for stage in report.stages)
    assert any(stage.why == "110 B not held till its backward, for 1 s more" for stage in recomputed)
    kept = [stage for stage in report.stages if stage.fate == "kept"]
    assert all("there is room for its 110 B" in stage.why for stage in kept)


def test_options_are_told_by_name() -> None:
    chain = chain_of(6, spill=True)
    report = explain(chain, plan_chain(chain, 330))
    spilled = [stage for stage in report.stages if stage.fate == "spill"]
    assert spilled
    assert all(stage.forward_ms == 1100 for stage in spilled)
    assert "110 B held as 'spill', 0 B of it here, for 200 ms more" in spilled[0].why


def test_json_and_text_hold_the_same_figures() -> None:
    chain = chain_of(6)
    report = explain(chain, plan_chain(chain, 330), measured_peak_bytes=320)
    record = json.loads(report.to_json())
    assert record["promised_peak_bytes"] == report.promised_peak_bytes
    assert record["measured_peak_bytes"] == 320
    assert [stage["name"] for stage in record["stages"]] == [f"s{i}" for i in range(6)]
    text = str(report)
    assert all(f"s{i}" in text for i in range(6))
    assert f"peak promised {report.promised_peak_bytes} B, measured 320 B, budget 330 B" in text
    assert "proven optimal" in text


def test_a_plan_of_another_chain_is_refused() -> None:
    with pytest.raises(InvalidPlan):
        explain(chain_of(4), plan_chain(chain_of(5), 1000))


def test_a_fitted_model_reports_what_it_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(6)])
    x = torch.randn(4, 16)
    fitted = fit(model, x, 4000)
    assert fitted.report().measured_peak_bytes is None
    model(x).sum().backward()
    report = fitted.report()
    assert report.measured_peak_bytes == report.promised_peak_bytes <= 4000
    assert {stage.fate for stage in report.stages} == {"kept", "recomputed"}
    assert report.stages[0].why.startswith("cannot run twice")
    assert "blocks" in str(report)


def test_it_says_what_is_on_the_host_what_that_waits_for_and_what_more_bytes_would_buy() -> None:
    chain = with_spill(chain_of(6), 200.0)
    last = len(chain) - 1
    tree = (Keep(0), Keep(1, "spill"), Recompute((Keep(2),), "spill"), *(Keep(i) for i in range(3, last + 1)))
    plan, faster = certify(chain, tree, 1000, "by hand"), certify(chain, strategies.keep_all(chain), 3000, "by hand")
    report, seen = explain(chain, plan, faster=faster), simulate(chain, tree)
    assert seen.transfers
    assert report.waited_ms == pytest.approx(1e3 * sum(copy.waited_s for copy in seen.transfers))
    spilled, recomputed = report.stages[1:3]
    assert (spilled.fate, recomputed.fate) == ("spilled", "recomputed")
    assert spilled.host_bytes == chain.charge(chain.stages[1].saves)
    assert recomputed.host_bytes == chain.charge(chain.stages[2].inputs) > 0
    assert "on the host meanwhile" in recomputed.why
    assert recomputed.spill_ms == pytest.approx(2e3 * recomputed.host_bytes / 200)
    saves_ms = 1e3 * (plan.certificate.step_s - faster.certificate.step_s)
    assert (report.more_bytes, report.more_saves_ms) == (2000, pytest.approx(saves_ms))
    assert "with 1.95 KiB more a step would take" in str(report)
    assert "would take" not in explain(chain, plan).summary()[-1]
