"""`gpuckpt plan --pipeline`: a chain cut over the ranks of a pipeline, each with a plan within its own budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from gpuckpt.planning import Chain, PipelinePlan, plan_pipeline
from gpuckpt.planning.tables import format_seconds, text_table
from gpuckpt.report.files import write_whole
from gpuckpt.units import format_bytes

__all__ = ["pipeline_record", "pipeline_text", "plan_ranks"]


def plan_ranks(
    chain: Chain,
    ranks: int,
    budget_bytes: int,
    micro_batches: int,
    schedule: str,
    chunks: int,
    out: Path,
    console: Console,
    as_json: bool,
) -> None:
    """Plan every rank, print the table (or JSON), and write chain.json, pipeline.json and a plan file for each chunk to `out`."""
    planned = plan_pipeline(chain, ranks, budget_bytes, micro_batches, schedule=schedule, chunks=chunks)
    record = json.dumps(pipeline_record(planned, budget_bytes), indent=1)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "chain.json", chain.to_json() + "\n")
    write_whole(out / "pipeline.json", record + "\n")
    for number, rank in enumerate(planned.ranks):
        for chunk, plan in enumerate(rank.plans):
            write_whole(out / f"rank{number}.{chunk}.plan.json", plan.to_json() + "\n")
    print(record if as_json else pipeline_text(planned))
    console.print(f"in {out}: chain.json, pipeline.json, rank*.plan.json", highlight=False)


def pipeline_text(planned: PipelinePlan) -> str:
    """A line for each rank, and the seconds of the step."""
    rows = [("rank", "stages", "in flight", "peak", "forward", "backward", "recomputed")]
    for number, rank in enumerate(planned.ranks):
        rows.append(
            (
                str(number),
                ", ".join(f"{first}..{last}" for first, last in rank.chunks),
                str(rank.in_flight),
                format_bytes(rank.peak_bytes),
                format_seconds(rank.forward_s),
                format_seconds(rank.backward_s),
                format_seconds(sum(plan.certificate.recompute_s for plan in rank.plans)),
            )
        )
    step = f"{planned.schedule}, {planned.micro_batches} micro-batches: a step takes {format_seconds(planned.step_s)}"
    return "\n".join([*text_table(rows, (True, False, True, True, True, True, True)), step])


def pipeline_record(planned: PipelinePlan, budget_bytes: int) -> dict[str, Any]:
    """The same as plain values; seconds are of one micro-batch, but for those of the step."""
    ranks = [
        {
            "stages": rank.chunks,
            "in_flight": rank.in_flight,
            "peak_bytes": rank.peak_bytes,
            "forward_s": rank.forward_s,
            "backward_s": rank.backward_s,
            "recompute_s": sum(plan.certificate.recompute_s for plan in rank.plans),
        }
        for rank in planned.ranks
    ]
    return {
        "schedule": planned.schedule,
        "micro_batches": planned.micro_batches,
        "budget_bytes": budget_bytes,
        "step_s": planned.step_s,
        "ranks": ranks,
    }
