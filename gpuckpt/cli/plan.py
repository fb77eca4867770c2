"""`gpuckpt plan`: from a chain file, or the sizes of a transformer, to a plan, its report and the frontier's picture.

Sizes need no such model: it is measured without memory (gpuckpt.pytorch.profiling.measure), for the named device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gpuckpt.cli.pipeline import plan_ranks
from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import LINK_BYTES_PER_S, Chain, Frontier, plan_chain, plan_frontier, with_spill
from gpuckpt.units import format_bytes, parse_bytes

__all__ = ["chain_of_sizes", "frontier_table", "plan"]

_CUDA_UNIT_BYTES = 512
_MORE_BYTES = 1 << 30  # of what so much more would buy the report tells
_DTYPES = ("bf16", "fp16", "fp32")


def chain_of_sizes(
    layers: int,
    width: int,
    heads: int,
    context: int,
    batch: int,
    activation: str,
    dtype: str,
    device: str,
    *,
    unit_bytes: int = _CUDA_UNIT_BYTES,
) -> Chain:
    """The chain of our transformer of these sizes on a named device, measured without memory.

    Raises `ValueError` for sizes that make no sense, a dtype or a device that is not known.
    """
    import torch

    from gpuckpt.cli.transformer import Config, Transformer
    from gpuckpt.pytorch.profiling.measure import measure

    if dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    if batch < 1:
        raise ValueError(f"--batch is {batch}: expected at least 1")
    dtypes = dict(zip(_DTYPES, (torch.bfloat16, torch.float16, torch.float32), strict=True))
    with torch.device("meta"):
        model = Transformer(Config(layers, width, heads, context, activation)).to(dtypes[dtype])
        tokens, targets = torch.empty(2, batch, context, dtype=torch.long).unbind()
    return measure(model, tokens, targets, fake=True, device=device, unit_bytes=unit_bytes)


def frontier_table(frontier: Frontier) -> Table:
    """Budget against step time, the knee marked."""
    rows = Table(title=f"{frontier.chain_name}: budget against step time")
    for column in ("held at the peak", "step", "recomputed"):
        rows.add_column(column, justify="right")
    rows.add_column("")
    for number, each in enumerate(frontier.plans):
        certificate = each.certificate
        share = certificate.recompute_s / certificate.step_s if certificate.step_s else 0.0
        rows.add_row(
            format_bytes(certificate.peak_bytes),
            f"{1e3 * certificate.step_s:.4g} ms",
            f"{share:.1%}",
            "knee" if number == frontier.knee else "",
        )
    return rows


def plan(
    chain_file: Annotated[
        Path | None, typer.Argument(help="a chain as JSON (Chain.to_json); without it, give sizes", metavar="[CHAIN]")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="bytes for activations, as 40GiB [the knee of the frontier]")
    ] = None,
    device: Annotated[str, typer.Option(help="whose roofline gives seconds, with sizes")] = "h100-sxm",
    strategy: Annotated[str, typer.Option(help="optimal, or a classic: none, every, sqrt, uniform, ...")] = "optimal",
    total: Annotated[
        bool, typer.Option("--total", help="the budget is for all bytes alive, not those held alone")
    ] = False,
    spill: Annotated[
        str | None,
        typer.Option(help=f"stages may spill what they save to the host over a link: {', '.join(LINK_BYTES_PER_S)}"),
    ] = None,
    host_budget: Annotated[str | None, typer.Option(help="with --spill: bytes for it on the host [no bound]")] = None,
    layers: Annotated[int, typer.Option(help="transformer blocks")] = 32,
    width: Annotated[int, typer.Option(help="model width")] = 4096,
    heads: Annotated[int, typer.Option(help="attention heads")] = 32,
    context: Annotated[int | None, typer.Option(help="tokens a sample [4096]")] = None,
    batch: Annotated[int, typer.Option(help="samples a step")] = 1,
    activation: Annotated[
        str, typer.Option(help="swiglu for a Llama-like block, gelu for a GPT-like one, ...")
    ] = "swiglu",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32")] = "bf16",
    pipeline: Annotated[
        int | None, typer.Option(help="cut the chain over so many ranks of a pipeline, each with the --budget")
    ] = None,
    microbatches: Annotated[
        int, typer.Option(help="with --pipeline or pp: micro-batches a step, each the chain's batch")
    ] = 8,
    schedule: Annotated[str, typer.Option(help="with --pipeline: gpipe, 1f1b or interleaved")] = "1f1b",
    chunks: Annotated[int, typer.Option(help="with --schedule interleaved: runs of stages a rank")] = 1,
    hf: Annotated[
        Path | None, typer.Option(help="a Hugging Face config.json: plan its whole step, every byte of the device")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="package.module:factory, which makes (model, example) of a batch and a context: planned as with --hf"
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="with --hf: sgd, sgd-momentum, adamw, adamw-8bit, ...")] = "adamw",
    parallel: Annotated[str, typer.Option(help="with --hf: the layout over devices, as fsdp=8,tp=2,pp=4")] = "",
    find: Annotated[
        str | None,
        typer.Option(help="with --hf: look for one thing alone: the largest batch or context, the fewest gpus"),
    ] = None,
    caps: Annotated[
        str | None,
        typer.Option(
            help="with --hf: what recomputing costs where activations are held to so much, as 8GiB,16GiB, alone"
        ),
    ] = None,
    points: Annotated[int, typer.Option(help="budgets on the frontier; 0 leaves it out")] = 16,
    out: Annotated[Path, typer.Option(help="folder for chain.json, plan.json, report.json, frontier.svg")] = Path(
        "out/plan"
    ),
    json: Annotated[bool, typer.Option("--json", help="print the report as JSON, and nothing else")] = False,
) -> None:
    """Plan a chain, or a transformer of given sizes, under a budget. Needs no GPU and no memory."""
    from gpuckpt.planning.report import explain
    from gpuckpt.report.files import write_whole
    from gpuckpt.report.frontier import draw_frontier

    if caps is not None:
        from gpuckpt.cli.caps import plan_caps

        if hf is None or model is not None or parallel or find is not None or budget is not None:
            raise ValueError("--caps needs --hf, and goes with no --model, --parallel, --find or --budget")
        plan_caps(hf, batch, context, dtype, _device_called(device), caps, as_json=json)
        return
    if hf is not None and model is not None:
        raise ValueError("--hf and --model each name a model; give one of them")
    source = model if hf is None else hf
    if source is not None:
        from gpuckpt.cli.whole_device import plan_whole_device

        name = _device_called(device)
        plan_whole_device(
            source, batch, context, dtype, optimizer, name, parallel, microbatches, budget, find, out, json
        )
        return
    console = Console(stderr=json)
    if chain_file is None:
        name = _device_called(device)
        chain = chain_of_sizes(
            layers, width, heads, 4096 if context is None else context, batch, activation, dtype, name
        )
        console.print(f"{chain.name}, {len(chain)} stages, seconds by the roofline of {name}", highlight=False)
    else:
        chain = Chain.from_json(chain_file.read_text(encoding="utf-8"))
        console.print(f"{chain.name}, {len(chain)} stages, from {chain_file}", highlight=False)
    if spill is not None:
        if spill not in LINK_BYTES_PER_S:
            raise ValueError(f"--spill {spill!r}: expected one of {', '.join(LINK_BYTES_PER_S)}")
        chain = with_spill(chain, LINK_BYTES_PER_S[spill])
    elif host_budget is not None:
        raise ValueError("--host-budget bounds what --spill moves to the host; name a link as well")
    objective = "total" if total else "held"
    host_bytes = None if host_budget is None else parse_bytes(host_budget, "--host-budget")
    if budget is None and points < 2 and pipeline is None:
        raise ValueError("--points must be at least 2 where no --budget is given: the plan is then the frontier's knee")
    budget_bytes = None if budget is None else parse_bytes(budget, "--budget")
    if pipeline is not None:
        if budget_bytes is None or total or host_bytes is not None or strategy != "optimal":
            raise ValueError("--pipeline needs a --budget, and goes with no --total, --host-budget or --strategy")
        plan_ranks(chain, pipeline, budget_bytes, microbatches, schedule, chunks, out, console, json)
        return
    if budget_bytes is not None:
        # Before the frontier, which takes longer: a budget that is too small ends at once.
        chosen = plan_chain(chain, budget_bytes, strategy, objective=objective, host_bytes=host_bytes)
    frontier = None
    if points >= 2:
        try:
            frontier = plan_frontier(chain, points, strategy=strategy, objective=objective, host_bytes=host_bytes)
        except BudgetExceeded as error:
            console.print(f"no frontier with {strategy!r}: {error}", highlight=False)
    if budget_bytes is None:
        if frontier is None:
            raise ValueError(f"no frontier to choose from with --strategy {strategy}; give a --budget")
        chosen = frontier.plans[frontier.knee]
    faster = None
    if strategy == "optimal":
        faster = plan_chain(chain, chosen.budget_bytes + _MORE_BYTES, objective=objective, host_bytes=host_bytes)
    report = explain(chain, chosen, faster=faster)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "chain.json", chain.to_json() + "\n")
    write_whole(out / "plan.json", chosen.to_json() + "\n")
    write_whole(out / "report.json", report.to_json() + "\n")
    if frontier is not None:
        draw_frontier(frontier, out / "frontier.svg")
        console.print(frontier_table(frontier))
    print(report.to_json() if json else report)
    written = "chain.json, plan.json, report.json" + ("" if frontier is None else ", frontier.svg")
    console.print(f"in {out}: {written}", highlight=False)


def _device_called(name: str) -> str:
    """The known device for `name`, where case, blanks and dashes do not matter. Raises `ValueError` with the known ones."""
    from gpuckpt.kernels.audit.roofline import DEVICES

    def plain(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    for known in DEVICES:
        if plain(known) == plain(name):
            return known
    raise ValueError(f"--device {name!r} is not known; known are {', '.join(DEVICES)}")
