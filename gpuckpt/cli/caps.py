"""`gpuckpt plan --hf config.json --caps 8GiB,16GiB`: what recomputing costs where activations are held to so many bytes.

Three plans for each: whole blocks are recomputed or not; what is inside of blocks is chosen (options); and that with the
host, over PCIe. Seconds are those of forward and backward by the roofline, above a step that keeps everything.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import LINK_BYTES_PER_S, Chain, plan_chain, with_spill
from gpuckpt.planning.tables import text_table
from gpuckpt.pytorch.whole_device.hub_model import HubModel
from gpuckpt.units import format_bytes, parse_bytes

__all__ = ["plan_caps"]

_LINK = "pcie-gen5-x16"
_ENDLESS = 1 << 62


def plan_caps(
    config: Path, batch: int, context: int | None, dtype: str, device: str, caps: str, *, as_json: bool
) -> None:
    """Print the table, or JSON. Raises `ValueError` for caps that are no bytes, and for a model that cannot run."""
    sizes = [parse_bytes(each.strip(), "--caps") for each in caps.split(",")]
    model = HubModel(config, dtype)
    try:
        model = model.with_fused_loss()  # logits of all rows would take most of a small cap
        loss = "the loss fused with the output layer"
    except ValueError:
        loss = "its own loss"
    if context is None and model.reads_tokens:
        context = min(4096, model.context_limit[0] or 4096)
    chain = model.chain(batch, context, device)
    kept = plan_chain(chain, _ENDLESS).certificate
    facts: dict[str, Any] = {
        "model": model.name,
        "device": device,
        "batch": batch,
        "context": context,
        "loss": loss,
        "kept_bytes": kept.peak_bytes,
        "kept_step_ms": 1e3 * kept.step_s,
        "link": _LINK,
        "caps": [_row(chain, size, kept.step_s) for size in sizes],
    }
    sys.stdout.write((json.dumps(facts, indent=1) if as_json else _page(facts)) + "\n")


def _row(chain: Chain, max_bytes: int, kept_s: float) -> dict[str, Any]:
    whole = replace(chain, stages=tuple(replace(stage, variants=()) for stage in chain.stages))
    row: dict[str, Any] = {"cap_bytes": max_bytes}
    chains = {"blocks": whole, "options": chain, "host": with_spill(chain, LINK_BYTES_PER_S[_LINK])}
    for name, each in chains.items():
        try:
            found = plan_chain(each, max_bytes).certificate
        except BudgetExceeded as error:
            row[name] = {"fits": False, "need_bytes": error.need}
            continue
        row[name] = {
            "fits": True,
            "peak_bytes": found.peak_bytes,
            "more": found.step_s / kept_s - 1.0,
            "host_bytes": found.host_peak_bytes,
        }
    return row


def _page(facts: dict[str, Any]) -> str:
    tokens = "" if facts["context"] is None else f" of {facts['context']:,} tokens"
    rows: list[tuple[str, ...]] = [
        ("activations held to", "whole blocks", "options inside", "and the host", "bytes there")
    ]
    for row in facts["caps"]:
        found = row["host"]
        there = format_bytes(found["host_bytes"]) if found["fits"] else ""
        rows.append((format_bytes(row["cap_bytes"]), *(_more(row[n]) for n in ("blocks", "options", "host")), there))
    lines = [
        f"{facts['model']} with {facts['loss']}: {facts['batch']} samples{tokens}, by the roofline of {facts['device']}",
        f"keeping all holds {format_bytes(facts['kept_bytes'])}, forward and backward take {facts['kept_step_ms']:.4g} ms",
        f"more for each cap, what is made again counted among its bytes; the host over {facts['link']} at its raw rate",
        "",
        *text_table(rows, (True, True, True, True, True)),
    ]
    return "\n".join(lines)


def _more(found: dict[str, Any]) -> str:
    return f"+{found['more']:.1%}" if found["fits"] else f"needs {format_bytes(found['need_bytes'])}"
