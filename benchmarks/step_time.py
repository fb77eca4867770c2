"""Seconds of a training step on this CPU: gpuckpt under a budget against torch.utils.checkpoint at the same peak.

    python benchmarks/step_time.py [--mlp fused|plain] [--layers 12] [--width 128] [--rounds 15] [--clock wall|cpu]

A block ends in its MLP. Fused, it saves its input alone, and our replays stop before its work (engine/early_stop.py), as
torch's cannot. Plain, in three torch modules, both stop before the last product: what is compared is plans and overhead.

torch's best uniform choice under a budget: groups of equally many consecutive blocks, each group checkpointed (the last one
or not), the fastest of those whose peak fits. The peak of a choice is what gpuckpt's ledger measures when the very same
groups run under it, since torch's own checkpoint keeps what it recomputes where nothing can count it. For every such peak
gpuckpt plans within just as many bytes. Then steps of both, and of the plain run, take turns, and medians are compared.
Adds a line to step_time_fused.jsonl or step_time_plain.jsonl and draws it as .png.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_record import QUICK, RESULTS, append, arguments
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from gpuckpt import Keep, Recompute, fit, format_bytes, simulate
from gpuckpt.cli.transformer import Config, Transformer
from gpuckpt.planning import Node

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], object]


def plain_mlp(width: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width))


def with_torch(model: Transformer, group: int, last: bool) -> Step:
    """The model's forward with torch.utils.checkpoint around every `group` blocks; `last`: around the last group too."""
    blocks = list(model.blocks)
    groups = [blocks[i : i + group] for i in range(0, len(blocks), group)]

    def run(part: list[torch.nn.Module], x: torch.Tensor) -> torch.Tensor:
        for block in part:
            x = block(x)
        return x

    def forward(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = model.token(tokens) + model.place(torch.arange(tokens.shape[1]))
        for part in groups:
            framed = last or part is not groups[-1]
            x = torch_checkpoint(run, part, x, use_reentrant=False) if framed else run(part, x)
        logits = model.head(model.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return forward


def tree_of(layers: int, group: int, last: bool) -> tuple[Node, ...]:
    """The same groups as a plan: stage 0 is the embedding, the stage after the blocks the loss."""
    groups = [range(i, min(i + group, layers + 1)) for i in range(1, layers + 1, group)]
    nodes: list[Node] = [Keep(0)]
    for part in groups:
        kept = tuple(Keep(i) for i in part)
        nodes += [Recompute(kept)] if last or part is not groups[-1] else kept
    return (*nodes, Keep(layers + 1))


def timed(step: Callable[[], torch.Tensor], clock: Callable[[], float]) -> float:
    began_s = clock()
    step().backward()
    return clock() - began_s


def medians(steps: dict, rounds: int, clock: Callable[[], float]) -> dict:
    """Median seconds of each step; they take turns, and the first turn warms up."""
    seconds: dict = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            elapsed_s = timed(step, clock)
            if turn:
                seconds[name].append(elapsed_s)
    return {name: statistics.median(all_s) for name, all_s in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlp", choices=("fused", "plain"), default="fused")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of this process, on a machine that is busy"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = arguments(parser, layers=2, width=32, context=32, batch=2, rounds=2, out=QUICK)
    torch.manual_seed(0)
    base = Transformer(Config(options.layers, options.width, 4, options.context))
    if options.mlp == "plain":
        for block in base.blocks:
            block.mlp = plain_mlp(options.width)
    tokens = torch.randint(0, 256, (options.batch, options.context))
    inputs = (tokens, tokens.roll(-1, 1))
    plain = copy.deepcopy(base)
    fitted = fit(copy.deepcopy(base), inputs, 1 << 40, repeats=options.rounds)
    chain = fitted.chain
    plain_bytes = fitted.plan.certificate.peak_bytes
    choices = {
        (group, last): simulate(chain, tree_of(options.layers, group, last)).peak_bytes
        for group in range(1, options.layers + 1)
        if options.layers % group == 0
        for last in (True, False)
        if group < options.layers or last
    }
    clock = CLOCKS[options.clock]
    torch_steps: dict[tuple[int, bool], Step] = {}
    for group, last in choices:
        forward = with_torch(copy.deepcopy(base), group, last)
        torch_steps[group, last] = lambda forward=forward: forward(*inputs)
    first_s = medians(torch_steps, 3, clock)

    rows = []
    plain_s = []
    print(f"{'peak':>10} {'torch':>22} {'ms':>8} {'ours ms':>8} {'ratio':>6}  ours held")
    for peak in sorted({peak for peak in choices.values() if peak < plain_bytes}):
        group, last = min((choice for choice, needed in choices.items() if needed <= peak), key=first_s.__getitem__)
        ours = fit(copy.deepcopy(base), inputs, peak, repeats=options.rounds)
        rivals = {"torch": torch_steps[group, last], "ours": lambda: ours(*inputs), "plain": lambda: plain(*inputs)}  # noqa: B023
        median_s = medians(rivals, options.rounds, clock)
        torch_s, ours_s, held = median_s["torch"], median_s["ours"], ours.measured_peak_bytes
        plain_s.append(median_s["plain"])
        label = f"groups of {group}{'' if last else ', last kept'}"
        print(
            f"{format_bytes(peak):>10} {label:>22} {torch_s * 1e3:8.1f} {ours_s * 1e3:8.1f} {ours_s / torch_s:6.3f}  "
            f"{format_bytes(held)}",
            flush=True,
        )
        rows.append(
            {
                "peak_bytes": peak,
                "torch": label,
                "torch_s": torch_s,
                "ours_s": ours_s,
                "ratio": ours_s / torch_s,
                "ours_peak_bytes": held,
                "ours_within": held <= peak,
            }
        )
    print(f"plain: {format_bytes(plain_bytes)}, {statistics.median(plain_s) * 1e3:.1f} ms a step")
    worst = max(row["ratio"] for row in rows)
    print(f"ratio: worst {worst:.3f}, median {statistics.median(row['ratio'] for row in rows):.3f}")
    figures = {
        "config": dataclasses.asdict(base.config)
        | {"mlp": options.mlp, "batch": options.batch, "rounds": options.rounds, "clock": options.clock},
        "plain_bytes": plain_bytes,
        "plain_s": statistics.median(plain_s),
        "rows": rows,
    }
    path = options.out / f"step_time_{options.mlp}.jsonl"
    draw(append(path, figures), path.with_suffix(".png"))
    return 0


def described(about: dict) -> str:
    machine, torch_version = about["machine"], about["versions"]["torch"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, torch {torch_version}, {machine['torch_threads']} threads"
    )


def draw(record: dict, path: Path) -> None:
    """Step time against peak, of both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    shares = [row["peak_bytes"] / record["plain_bytes"] for row in record["rows"]]
    for key, label, marker in (("torch_s", "torch.utils.checkpoint, best uniform", "s"), ("ours_s", "gpuckpt", "o")):
        axis.plot(shares, [row[key] * 1e3 for row in record["rows"]], marker=marker, label=label)
    axis.axhline(record["plain_s"] * 1e3, color="0.6", linestyle=":", label="plain run")
    axis.set(
        xlabel="peak of what is held, as a share of the plain run's",
        ylabel="ms a step (median)",
        title=f"{record['config']['mlp']} MLPs; {described(record['about'])}",
    )
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
