"""`gpuckpt plan --hf`: the page, the same as JSON, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")

from gpuckpt import Chain, Plan, simulate
from gpuckpt.cli.app import app
from gpuckpt.cli.whole_device import device_page
from gpuckpt.pytorch.whole_device.plan_device import plan_device

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Llama-3-8B with four narrow blocks."""
    record = json.loads((CONFIGS / "llama-3-8b.json").read_text())
    record |= {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(record))
    return path


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_page_and_the_same_facts(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--hf", small, "--batch", 4, "--context", 1024, "--budget", "10GiB", "--out", out, "--json")
    facts = json.loads(result.stdout)
    assert facts == json.loads((out / "device.json").read_text())
    # Llama: an embedding, a head, and in each block four projections (two of them a quarter as wide: 8 heads, 8 groups), an MLP
    # of three, two norms; a last norm.
    block = 4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512
    assert facts["parameters"] == 2 * 128256 * 512 + 4 * block + 512
    assert facts["weights_bytes"] == facts["gradients_bytes"] == 2 * facts["parameters"]
    tensors = 4 * 9 + 3
    assert facts["optimizer_state_bytes"] == 4 * facts["parameters"] + 4 * tensors
    assert facts["fits"] is True
    assert facts["peak_bytes"] <= facts["budget_bytes"] == 10 << 30
    chain = Chain.from_json((out / "chain.json").read_text())
    plan = Plan.from_json((out / "plan.json").read_text(), chain)
    assert (
        simulate(chain, plan.tree).total_peak_bytes
        == facts["forward_and_backward_bytes"]
        == plan.certificate.total_peak_bytes
    )
    fixed = sum(facts[name] for name in ("weights_bytes", "optimizer_state_bytes", "rounding_bytes", "set_aside_bytes"))
    fixed += facts["buffers_and_inputs_bytes"]
    assert facts["left_bytes"] == facts["budget_bytes"] - fixed
    assert facts["peak_bytes"] == fixed + facts["forward_and_backward_bytes"]

    page = device_page(facts)
    for text in (f"{facts['parameters']:,} parameters", f"{facts['weights_bytes']:,}", "fits: ", "tokens/s"):
        assert text in page
    assert f"largest batch that fits: {facts['largest_batch']}" in page
    assert f"longest context that fits: {facts['longest_context']:,} tokens (the configuration names 8,192)" in page
    for lever in facts["levers"]:
        assert lever["name"] in page
    assert max(map(len, page.splitlines())) <= 80


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not(small: Path, tmp_path: Path) -> None:
    size = ("--hf", small, "--context", 512, "--budget", "6GiB", "--out", tmp_path, "--json", "--find", "batch")
    largest = json.loads(run(*size).stdout)["largest_batch"]
    assert largest > 1
    for batch, fits in ((largest, True), (largest + 1, False)):
        facts = json.loads(run(*size, "--batch", batch).stdout)
        assert facts["fits"] is fits
        assert facts["largest_batch"] == largest  # from wherever the search begins
    context = ("--hf", small, "--budget", "6GiB", "--out", tmp_path, "--json", "--find", "context")
    longest = json.loads(run(*context).stdout)["longest_context"]
    assert longest % 128 == 0
    assert json.loads(run(*context, "--context", longest).stdout)["fits"] is True
    assert json.loads(run(*context, "--context", longest + 128).stdout)["fits"] is False


def test_what_does_not_fit_says_by_how_much(small: Path, tmp_path: Path) -> None:
    facts = json.loads(run("--hf", small, "--budget", "2GiB", "--out", tmp_path, "--json", "--find", "batch").stdout)
    assert facts["fits"] is False
    assert "plan" not in facts
    assert facts["largest_batch"] == 0
    page = device_page(facts)
    assert "does not fit: " in page
    assert "largest batch that fits: none" in page
    again = run("--hf", small, "--budget", facts["need_bytes"], "--out", tmp_path, "--find", "batch").stdout
    assert "fits: " in again
    assert "does not fit: " not in again


def test_the_fewest_gpus_hold_it_and_half_as_many_do_not(small: Path, tmp_path: Path) -> None:
    whole = CONFIGS / "llama-3-8b.json"
    size = ("--hf", whole, "--context", 256, "--budget", "24GiB", "--out", tmp_path, "--json", "--find", "gpus")
    fewest = json.loads(run(*size).stdout)["fewest_gpus"]
    assert fewest > 1
    for ranks, fits in ((fewest, True), (fewest // 2, False)):
        facts = json.loads(run(*size, "--parallel", f"fsdp={ranks}").stdout)
        assert facts["fits"] is fits
        assert facts["fewest_gpus"] == fewest  # from wherever the search begins
    assert f"fewest GPUs that hold it, under FSDP: {fewest}" in device_page(facts)
    tiny = run("--hf", small, "--context", 256, "--budget", "1600MiB", "--out", tmp_path, "--find", "gpus").stdout
    assert "under FSDP: more than 1,024" in tiny


def test_more_devices_hold_less_each(small: Path) -> None:
    one, eight, two = (plan_device(small, parallel=layout).memory for layout in ("", "fsdp=8", "tp=2"))
    assert sum(eight.weights) * 8 == sum(one.weights)
    assert sum(two.weights) < sum(one.weights) * 0.51
    assert two.chain.saved_bytes < one.chain.saved_bytes == eight.chain.saved_bytes


def test_a_pipeline_shows_its_tightest_rank(small: Path, tmp_path: Path) -> None:
    size = ("--hf", small, "--context", 256, "--budget", "6GiB", "--out", tmp_path, "--find", "batch", "--json")
    facts = json.loads(run(*size, "--parallel", "fsdp=2,pp=2", "--microbatches", 4, "--batch", 2).stdout)
    assert (facts["devices"], facts["pp"], facts["micro_batches"]) == (4, 2, 4)
    rows = 128256 * 512  # the embedding is on the first rank, the head on the last
    blocks = facts["parameters"] - 2 * rows - 512
    numel = rows + blocks // 2 + (512 if facts["tightest_rank"] else 0)
    assert facts["weights_bytes"] == numel  # of two bytes, over two ranks of FSDP
    assert facts["samples_per_s"] == pytest.approx(2 * 4 * 2 / (facts["step_ms"] / 1e3))
    page = device_page(facts)
    assert f"rank {facts['tightest_rank']} of 2 is the tightest" in page
    assert max(map(len, page.splitlines())) <= 80
    largest = json.loads(run(*size, "--parallel", "fsdp=2,pp=2", "--batch", facts["largest_batch"]).stdout)
    assert largest["fits"] is True
    more = json.loads(run(*size, "--parallel", "fsdp=2,pp=2", "--batch", facts["largest_batch"] + 1).stdout)
    assert more["fits"] is False


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_example_has_a_page(config: Path, tmp_path: Path) -> None:
    page = run("--hf", config, "--out", tmp_path).stdout
    assert "fits: " in page or "does not fit: " in page
    assert "largest batch that fits: " in page
    assert "FSDP over 8 devices" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "batch is 0: expected at least 1"),
        (["--context", "-8"], "context is -8"),
        (["--dtype", "int3"], "dtype 'int3': expected one of bf16, fp16, fp32"),
        (["--optimizer", "adam"], "optimizer 'adam' is not known; known are sgd"),
        (["--device", "abacus"], "--device 'abacus' is not known"),
        (["--parallel", "ep=2"], "expected fsdp=N,tp=N,pp=N, each at most once; got 'ep=2'"),
        (["--parallel", "pp=3"], "pp=3 does not divide 4 blocks; allowed are 1, 2, 4"),
        (["--parallel", "tp=3"], "tp=3 does not divide"),
        (["--find", "cards"], "--find 'cards': expected one of batch, context, gpus"),
        (["--budget", "much"], "'much' is not a size in bytes"),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str, small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run("--hf", small, "--out", tmp_path, *arguments)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    command = [sys.executable, "-m", "gpuckpt.cli.app", "plan", "--hf", str(tmp_path / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "model_type 'abacus' is unknown" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_a_function_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def deep(batch, context):\n"
        "    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6)]\n"
        "    return nn.Sequential(*blocks), torch.empty(batch, context or 1, 64)\n"
        "def wrong(batch, context):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    size = ("--context", 1000, "--budget", "2GiB", "--out", tmp_path / "out", "--json")
    facts = json.loads(run("--model", "own_models:deep", *size, "--batch", 4).stdout)
    assert facts["model"] == "Sequential"
    assert facts["parameters"] == 6 * (2 * 64 * 256 + 256 + 64)
    # Of each block: its input, what GELU reads and what it makes.
    assert facts["activations_bytes"] == 4 * 1000 * 2 * 6 * (64 + 2 * 256)
    largest = facts["largest_batch"]
    assert [
        json.loads(run("--model", "own_models:deep", *size, "--batch", largest + n).stdout)["fits"] for n in (0, 1)
    ] == [
        True,
        False,
    ]
    for name, words in (
        ("own_models:none", "has no function none"),
        ("own_models", "expected package.module:factory"),
        ("no_such_module:f", "no_such_module cannot be imported"),
        ("own_models:wrong", r"returned 3; expected \(model, example\)"),
    ):
        with pytest.raises(ValueError, match=words):
            run("--model", name, *size)
    with pytest.raises(ValueError, match="allowed are tp=1, pp=1"):
        run("--model", "own_models:deep", *size, "--parallel", "tp=2")
