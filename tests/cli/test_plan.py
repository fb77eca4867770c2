"""`gpuckpt plan`: from sizes or a chain file to a plan, its report and the frontier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gpuckpt import Chain, Plan, simulate
from gpuckpt.cli.plan import chain_of_sizes, plan
from gpuckpt.errors import BudgetExceeded, InvalidChain

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(plan)

SIZES = ["--layers", "4", "--width", "64", "--heads", "2", "--context", "32", "--batch", "2", "--points", "5"]


def run(*arguments: object, out: Path) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(out)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_sizes_to_plan_report_and_frontier(tmp_path: Path) -> None:
    text = run(*SIZES, out=tmp_path)
    chain = Chain.from_json((tmp_path / "chain.json").read_text())
    chosen = Plan.from_json((tmp_path / "plan.json").read_text(), chain)
    assert chain.unit_bytes == 512
    assert [stage.name for stage in chain.stages] == ["prefix", *(f"blocks.{i}" for i in range(4)), "suffix"]
    assert simulate(chain, chosen.tree).peak_bytes == chosen.certificate.peak_bytes
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["promised_peak_bytes"] == chosen.certificate.peak_bytes
    assert "blocks.3" in text
    assert text.count("knee") == 1
    assert "<svg" in (tmp_path / "frontier.svg").read_text()


def test_a_chain_file_under_a_budget_as_json(tmp_path: Path) -> None:
    run(*SIZES, out=tmp_path)
    file = tmp_path / "chain.json"
    chain = Chain.from_json(file.read_text())
    half = sum(chain.footprints) // 2
    text = run(file, "--budget", half, "--json", "--points", 0, out=tmp_path / "half")
    report = json.loads(text)
    assert report["budget_bytes"] == half
    assert report["promised_peak_bytes"] <= half
    fates = {stage["fate"] for stage in report["stages"]}
    assert "kept" in fates
    assert any(fate == "recomputed" or fate.startswith("kept-") for fate in fates)
    assert not (tmp_path / "half" / "frontier.svg").exists()
    total = json.loads(run(file, "--budget", half * 4, "--total", "--json", "--points", 0, out=tmp_path))
    assert total["budget_bytes"] == half * 4


def test_spilling_over_a_link_is_an_option(tmp_path: Path) -> None:
    text = run(*SIZES, "--spill", "nvlink-c2c", "--json", out=tmp_path)
    chain = Chain.from_json((tmp_path / "chain.json").read_text())
    for stage in chain.stages[1:-1]:
        names = [option.name for option in stage.options]
        assert names[0] == "keep"
        assert "spill" in names
    assert json.loads(text)["model"] == "Transformer"


def test_a_host_budget_bounds_what_is_spilled(tmp_path: Path) -> None:
    # So wide that running a block's attention again takes longer than the way to the host and back; its MLP is not run again.
    # The smallest budget has no room for what is on its way while a block goes back; twice as much has.
    sizes = (*SIZES, "--width", 32768, "--heads", 64, "--context", 2048)
    budget = json.loads(run(*sizes, "--json", out=tmp_path))["smallest_budget_bytes"] * 2
    wanted = (*sizes, "--spill", "nvlink-c2c", "--budget", budget, "--json")
    free = json.loads(run(*wanted, out=tmp_path))
    assert free["promised_host_peak_bytes"] > 0
    assert free["spill_ms"] > 0
    assert {"spilled"} <= {stage["fate"] for stage in free["stages"]}
    bound = free["promised_host_peak_bytes"] - 1
    bounded = json.loads(run(*wanted, "--host-budget", bound, out=tmp_path / "bounded"))
    assert bounded["promised_host_peak_bytes"] <= bound
    assert bounded["step_ms"] > free["step_ms"]
    assert (tmp_path / "bounded" / "frontier.svg").exists()
    none = json.loads(run(*wanted, "--host-budget", 0, out=tmp_path / "none"))
    assert none["promised_host_peak_bytes"] == none["spill_ms"] == 0


def test_a_pipeline_has_a_plan_for_every_rank(tmp_path: Path) -> None:
    wanted = (*SIZES, "--pipeline", 2, "--microbatches", 4, "--budget", "1GiB")
    text = run(*wanted, out=tmp_path)
    chain = Chain.from_json((tmp_path / "chain.json").read_text())
    record = json.loads((tmp_path / "pipeline.json").read_text())
    assert [rank["in_flight"] for rank in record["ranks"]] == [2, 1]
    assert "1f1b, 4 micro-batches: a step takes" in text
    for number, rank in enumerate(record["ranks"]):
        ((first, last),) = rank["stages"]
        part = chain.part(first, last)
        own = Plan.from_json((tmp_path / f"rank{number}.0.plan.json").read_text(), part)
        # Micro-batches at rest hold all that is kept: nothing is recomputed with so much room.
        assert rank["peak_bytes"] == rank["in_flight"] * simulate(part, own.tree).peak_bytes
        assert rank["forward_s"] == pytest.approx(sum(stage.forward_s for stage in part.stages))
    interleaved = json.loads(run(*wanted, "--schedule", "interleaved", "--chunks", 3, "--json", out=tmp_path))
    assert [len(rank["stages"]) for rank in interleaved["ranks"]] == [3, 3]


def test_a_device_is_found_however_it_is_written(tmp_path: Path) -> None:
    run(*SIZES, "--device", "a100-80gb", "--points", 0, "--budget", "1GiB", out=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (["--device", "abacus"], ValueError, "--device 'abacus' is not known; known are A100"),
        (["--dtype", "int3"], ValueError, "--dtype 'int3'"),
        (["--batch", "0"], ValueError, "--batch is 0"),
        (["--heads", "3"], ValueError, "not divisible"),
        (["--spill", "string"], ValueError, "--spill 'string'"),
        (["--host-budget", "1GiB"], ValueError, "--host-budget bounds what --spill moves"),
        (["--pipeline", "2"], ValueError, "--pipeline needs a --budget"),
        (["--pipeline", "2", "--budget", "1GiB", "--total"], ValueError, "goes with no --total"),
        (["--pipeline", "2", "--budget", "1GiB", "--schedule", "zigzag"], ValueError, "zigzag"),
        (["--pipeline", "2", "--budget", "1KiB"], BudgetExceeded, "rank 0 of 2"),
        (["--points", "0"], ValueError, "--points must be at least 2"),
        (["--budget", "1KiB"], BudgetExceeded, "need"),
        (["--strategy", "luck"], ValueError, "luck"),
        (["missing.json"], FileNotFoundError, "missing.json"),
    ],
)
def test_mistakes_are_named(wrong: list[str], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        run(*SIZES, *wrong, out=tmp_path)


def test_a_damaged_chain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chain.json").write_text('{"format": "something else"}')
    with pytest.raises(InvalidChain, match="a chain file has format"):
        run(tmp_path / "chain.json", out=tmp_path)


def test_more_of_everything_takes_longer_and_holds_more() -> None:
    small = chain_of_sizes(2, 64, 2, 32, 1, "swiglu", "bf16", "H100 SXM")
    large = chain_of_sizes(2, 128, 2, 64, 4, "swiglu", "bf16", "H100 SXM")
    assert large.stages[1].forward_s > small.stages[1].forward_s
    assert large.charge(large.stages[1].saves) > 4 * small.charge(small.stages[1].saves)
    double = chain_of_sizes(2, 64, 2, 32, 1, "swiglu", "fp32", "H100 SXM")
    assert sum(double.storages) > 1.8 * sum(small.storages)


def test_caps_for_a_model_from_the_hub(tmp_path: Path) -> None:
    """Options pay no more than whole blocks, and with the host no more than without; each plan holds what it is allowed."""
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 6}
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(config | {"num_attention_heads": 2, "vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0})
    )
    asked = ["--hf", file, "--batch", 2, "--context", 64]
    found = json.loads(run(*asked, "--caps", "400KiB,1MiB,1.5MiB,1GiB", "--json", out=tmp_path))
    assert found["context"] == 64
    gained = 0
    for row in found["caps"]:
        plans = [row[name] for name in ("blocks", "options", "host")]
        assert all(each["peak_bytes"] <= row["cap_bytes"] for each in plans if each["fits"])
        more = [each["more"] if each["fits"] else float("inf") for each in plans]
        assert more[0] >= more[1] >= more[2] >= 0.0
        gained += more[0] > more[1]
        assert plans[0]["host_bytes"] == 0 if plans[0]["fits"] else plans[0]["need_bytes"] > row["cap_bytes"]
    assert gained >= 2
    assert more == [0.0, 0.0, 0.0]
    assert found["kept_bytes"] == plans[0]["peak_bytes"]
    text = run(*asked, "--caps", "10B, 1MiB", out=tmp_path)
    assert "options inside" in text
    assert "needs " in text
    for wrong, message in ((["--caps", "1MiB"], "needs --hf"), ([*asked, "--caps", "1x"], "--caps")):
        with pytest.raises(ValueError, match=message):
            run(*wrong, out=tmp_path)
