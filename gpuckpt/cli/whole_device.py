"""`gpuckpt plan --hf config.json`: does a training step of a Hugging Face model fit the device, under which plan, how fast."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from gpuckpt.planning.tables import format_seconds, text_table
from gpuckpt.pytorch.whole_device.factory_model import factory_called
from gpuckpt.pytorch.whole_device.plan_device import DevicePlan, plan_device
from gpuckpt.report.files import write_whole
from gpuckpt.units import format_bytes

__all__ = ["device_facts", "device_page", "plan_whole_device"]

FIND = ("batch", "context", "gpus")
ROOFLINE = (
    "      by the roofline, a bound from below: without launches, without transfers",
    "      between devices; no GPU has checked it yet",
)


def plan_whole_device(
    source: Path | str,
    batch: int,
    context: int | None,
    dtype: str,
    optimizer: str,
    device: str,
    parallel: str,
    micro_batches: int,
    budget: str | None,
    find: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """`source`: a config.json, or the name of a function that makes a model. Plan, print the page (or JSON), and write
    chain.json, plan.json and device.json to `out`."""
    if find is not None and find not in FIND:
        raise ValueError(f"--find {find!r}: expected one of {', '.join(FIND)}")
    planned = plan_device(
        factory_called(source) if isinstance(source, str) else source,
        batch=batch,
        context=context,
        dtype=dtype,
        optimizer=optimizer,
        device=device,
        parallel=parallel,
        micro_batches=micro_batches,
        budget=budget,
    )
    facts = device_facts(planned, find)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "device.json", json.dumps(facts, indent=1) + "\n")
    written = ["device.json"]
    if planned.found is not None:
        write_whole(out / "chain.json", planned.memory.chain_with_gradients.to_json() + "\n")
        write_whole(out / "plan.json", planned.found.plan.to_json() + "\n")
        written += ["chain.json", "plan.json"]
    sys.stdout.write((json.dumps(facts, indent=1) if as_json else device_page(facts)) + "\n")
    Console(stderr=as_json).print(f"in {out}: {', '.join(written)}", highlight=False)


def device_facts(planned: DevicePlan, find: str | None = None) -> dict[str, Any]:
    """What the page says, as plain values. `find`: search for that alone ("batch", "context" or "gpus"); by default for the
    first two, and with the levers."""
    model, memory, found = planned.model, planned.memory, planned.found
    chain = memory.chain
    last = chain.stages[-1]
    earlier = {i for stage in chain.stages[:-1] for i in stage.saves}
    facts: dict[str, Any] = {
        "model": model.name,
        "parameters": model.parameter_count,
        "dtype": model.dtype_name,
        "device": planned.device.name,
        "batch": planned.batch,
        "context": planned.context,
        "devices": model.layout.devices,
        "fsdp": model.layout.fsdp,
        "tp": model.layout.tp,
        "pp": model.layout.pp,
        "micro_batches": planned.step.micro_batches,
        "tightest_rank": planned.tightest,
        "optimizer": memory.optimizer.name,
        "budget_bytes": planned.budget_bytes,
        "weights_bytes": sum(memory.weights),
        "gathered_bytes": memory.gathered_bytes,
        "optimizer_state_bytes": sum(memory.state),
        "buffers_and_inputs_bytes": memory.buffers_bytes,
        "rounding_bytes": memory.rounding_bytes,
        "set_aside_bytes": memory.set_aside_bytes,
        "left_bytes": planned.budget_bytes - memory.resident_bytes - memory.set_aside_bytes,
        "gradients_bytes": memory.gradient_bytes,
        "optimizer_step_bytes": memory.optimizer_peak_bytes,
        "activations_bytes": chain.saved_bytes,
        "fits": planned.fits,
        "need_bytes": planned.need_bytes,
    }
    if planned.tightest == len(planned.step.memories) - 1:  # which has what follows the last block
        facts["last_stage_saved_bytes"] = chain.charge([i for i in last.saves if i not in earlier])
        facts["last_stage_workspace_bytes"] = last.workspace_bytes
    if found is not None:
        certificate, seconds = found.plan.certificate, planned.step_s or 0.0
        facts["peak_bytes"] = found.peak_bytes
        facts["held_bytes"] = certificate.peak_bytes
        facts["forward_and_backward_bytes"] = certificate.total_peak_bytes
        facts["recompute_ms"] = 1e3 * certificate.recompute_s
        facts["step_ms"] = 1e3 * seconds
        if planned.context is not None and seconds:
            facts["tokens_per_s"] = planned.samples * planned.context / seconds
        facts["samples_per_s"] = planned.samples / seconds if seconds else None
        facts["plan"] = str(found.plan).splitlines()
    if find in (None, "batch"):
        facts["largest_batch"] = planned.largest_batch()
    if find in (None, "context"):
        facts["longest_context"] = planned.longest_context()
        facts["positions"] = model.context_limit[0]
    if find == "gpus":
        facts["fewest_gpus"] = planned.fewest_gpus()
    if find is None:
        facts["levers"] = [
            {
                "name": lever.name,
                "smallest_bytes": lever.smallest_bytes,
                "peak_bytes": lever.peak_bytes,
                "step_ms": None if lever.step_s is None else 1e3 * lever.step_s,
            }
            for lever in planned.levers()
        ]
    return facts


def device_page(facts: dict[str, Any]) -> str:
    """The facts as a page, at most 80 columns wide."""
    tokens = "" if facts["context"] is None else f" of {facts['context']:,} tokens"
    layout = ", ".join(f"{name}={facts[name]}" for name in ("fsdp", "tp", "pp") if facts[name] > 1)
    lines = [
        f"{facts['model']}: {facts['parameters']:,} parameters, {facts['dtype']}, {facts['optimizer']}",
        f"{facts['batch']} samples{tokens} a device and step, {facts['device']}",
        *([f"{facts['devices']} devices: {layout}"] if layout else []),
        *([] if facts["pp"] == 1 else _pipeline_lines(facts)),
        "",
        *text_table(_byte_rows(facts), (False, True, True, False)),
        "",
    ]
    over = facts["need_bytes"] - facts["budget_bytes"]
    if facts["fits"]:
        spare = facts["budget_bytes"] - facts["peak_bytes"]
        lines.append(
            f"fits: {format_bytes(facts['peak_bytes'])} of {format_bytes(facts['budget_bytes'])}, {format_bytes(spare)} to spare"
        )
        lines.append(f"      no plan needs less than {format_bytes(facts['need_bytes'])}")
        in_tokens = "tokens_per_s" in facts
        rate = f"{facts['tokens_per_s']:,.0f} tokens/s" if in_tokens else f"{facts['samples_per_s']:,.0f} samples/s"
        step, again = [format_seconds(facts[key] / 1e3) for key in ("step_ms", "recompute_ms")]
        lines.append(f"step: {step}, of which recompute {again}, {rate}")
        lines += [*ROOFLINE, "", *facts["plan"]]
    else:
        lines.append(
            f"does not fit: {format_bytes(facts['need_bytes'])} is the least, {format_bytes(over)} more than "
            f"{format_bytes(facts['budget_bytes'])}"
        )
    lines.append("")
    if "largest_batch" in facts:
        lines.append(f"largest batch that fits: {facts['largest_batch'] or 'none'}")
    if facts.get("longest_context") is not None:
        named = f" (the configuration names {facts['positions']:,})" if facts["positions"] else ""
        longest = f"{facts['longest_context']:,} tokens{named}" if facts["longest_context"] else "none"
        lines.append(f"longest context that fits: {longest}")
    if "fewest_gpus" in facts:
        lines.append(f"fewest GPUs that hold it, under FSDP: {facts['fewest_gpus'] or 'more than 1,024'}")
    if "levers" in facts:
        lines += ["", *text_table(_lever_rows(facts), (False, True, True, True))]
    return "\n".join(lines).rstrip()


def _pipeline_lines(facts: dict[str, Any]) -> list[str]:
    """Which of the ranks the bytes below are of."""
    rank, ranks, count = facts["tightest_rank"], facts["pp"], facts["micro_batches"]
    return [
        f"1F1B, {count} micro-batches a step; rank {rank} of {ranks} is the tightest ({min(count, ranks - rank)} in flight):"
    ]


def _byte_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    named = [
        ("weights", "weights_bytes", "all the time"),
        ("weights kept gathered", "gathered_bytes", "outside of FSDP's blocks"),
        ("optimizer state", "optimizer_state_bytes", "from the first step on"),
        ("buffers and inputs", "buffers_and_inputs_bytes", "all the time"),
        ("allocator rounding", "rounding_bytes", "each to 512 bytes"),
        ("set aside", "set_aside_bytes", "driver, CUDA, libraries"),
        ("left for the step", "left_bytes", "for all that follows"),
        ("gradients", "gradients_bytes", "grow through backward"),
        ("optimizer's step", "optimizer_step_bytes", "gradients, temporaries"),
        ("activations, all kept", "activations_bytes", "if none is recomputed"),
        ("  logits, loss: saved", "last_stage_saved_bytes", "of these"),
        ("  logits, loss: at work", "last_stage_workspace_bytes", "beyond, in its backward"),
        ("activations, planned", "held_bytes", "at the plan's peak"),
        ("forward and backward", "forward_and_backward_bytes", "the plan's highest point"),
    ]
    rows: list[tuple[str, ...]] = [("", "bytes", "", "when")]
    for title, key, when in named:
        if key in facts and (facts[key] or key != "gathered_bytes"):
            rows.append((title, f"{facts[key]:,}", format_bytes(facts[key]), when))
    return rows


def _lever_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("what else could be done", "takes at least", "as planned", "step")]
    for lever in facts["levers"]:
        fits, step_ms = lever["peak_bytes"] is not None, lever["step_ms"]
        rows.append(
            (
                lever["name"],
                format_bytes(lever["smallest_bytes"]),
                format_bytes(lever["peak_bytes"]) if fits else "does not fit",
                "" if step_ms is None else format_seconds(step_ms / 1e3),
            )
        )
    return rows
