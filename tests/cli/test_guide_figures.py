"""The bytes in the guide on the whole device are those that its command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from gpuckpt.cli.caps import plan_caps
from gpuckpt.cli.plan import chain_of_sizes
from gpuckpt.cli.whole_device import device_facts
from gpuckpt.planning import plan_chain
from gpuckpt.planning.report import explain
from gpuckpt.pytorch.whole_device.plan_device import plan_device
from gpuckpt.units import format_bytes

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"


def test_the_table_of_llama() -> None:
    planned = plan_device(ROOT / "examples" / "configs" / "llama-3-8b.json", batch=2, context=4096)
    facts = device_facts(planned, "nothing further")
    page = (ROOT / "docs" / "guides" / "whole-device.md").read_text()
    table = page.partition("## Line by line")[2].partition("So a plan is needed")[0]
    stated = {int(number.replace(",", "")) for number in re.findall(r"\| ([\d,]{6,}) \|", table)}
    names = (
        "weights",
        "optimizer_state",
        "rounding",
        "buffers_and_inputs",
        "set_aside",
        "left",
        "gradients",
        "activations",
        "last_stage_saved",
        "last_stage_workspace",
        "held",
        "forward_and_backward",
    )
    assert stated == {facts[f"{name}_bytes"] for name in names}
    assert f"({facts['recompute_ms']:.0f} ms of {facts['step_ms']:.0f} ms, by the\nroofline)" in page
    assert facts["weights_bytes"] == 2 * 8_030_261_248


def test_what_a_cap_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of 8,192 tokens; the others come from the same command."""
    plan_caps(CONFIGS / "llama-3-8b.json", 1, 8192, "bf16", "H100 SXM", "8GiB,16GiB,20GiB,24GiB", as_json=False)
    printed = re.findall(r"(\d+ GiB) +(\S+%) +(\S+%) +(\S+%)", capsys.readouterr().out)
    page = (ROOT / "docs" / "guides" / "whole-device.md").read_text()
    assert len(printed) == 4
    for row in printed:
        assert f"| {' | '.join(row)} |" in page


def test_the_figures_from_a_fresh_machine() -> None:
    page = (ROOT / "docs" / "guides" / "fresh-machine.md").read_text()
    chain = chain_of_sizes(6, 64, 4, 128, 8, "gelu", "fp32", "H100 SXM", unit_bytes=1)
    plain_bytes = plan_chain(chain, chain.saved_bytes, strategy="none").certificate.peak_bytes
    for name, nbytes in (("cap", int(0.4 * plain_bytes)), ("peak of the plain run", plain_bytes)):
        assert re.search(rf"│ {name} +│ +{nbytes:,} B \({format_bytes(nbytes)}\) │", page), (name, nbytes)
    assert f"the plain run holds {format_bytes(plain_bytes)}, the cap is {format_bytes(int(0.4 * plain_bytes))}" in page

    chain = chain_of_sizes(32, 4096, 32, 4096, 1, "swiglu", "bf16", "H100 SXM")
    plan, more = (plan_chain(chain, nbytes) for nbytes in (4 << 30, 5 << 30))
    for line in explain(chain, plan, faster=more).summary():
        assert line in page
