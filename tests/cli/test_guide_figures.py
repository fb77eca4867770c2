"""The bytes in the guide on the whole device are those that its command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from gpuckpt.cli.whole_device import device_facts
from gpuckpt.pytorch.whole_device.plan_device import plan_device

ROOT = Path(__file__).parents[2]


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
    )
    assert stated == {facts[f"{name}_bytes"] for name in (*names, "last_stage_saved")}
    assert facts["weights_bytes"] == 2 * 8_030_261_248
