"""The planner vs. its rivals: how fast it solves, and how much it recomputes at the same actual peak.

    python benchmarks/planner.py [--out benchmarks/results/planner.jsonl] [--chains 50] [--quick]

Solve times are those of the tables (code compiled), the best of some repetitions, wall and processor seconds both: the wall
is what counts on an idle machine. Rivals are swept over budgets on chains shaped like GPT, Llama, ViT and ResNet models and on
random ones; every tree is judged by `gpuckpt.planning.simulate`, and ours is planned for exactly the peak the rival's tree
reached. Exit code 1 when a rival recomputes less than ours anywhere.

`make bench` installs the rivals; those missing are skipped by name. Needs no GPU.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_record import RESULTS, append
from rival_planners import Rival, load_rivals, rotor_seconds

from gpuckpt.planning import Chain, Stage, plan_chain, plan_frontier, simulate, strategies
from gpuckpt.planning.solver import solve
from gpuckpt.planning.solver.problem import build_problem
from gpuckpt.report.frontier import draw_frontier

MIB = 1 << 20


def chain_from(rows: list[tuple[str, float, int, int]], name: str) -> Chain:
    """Stages of (name, forward seconds, bytes of their own, bytes of input): each saves its input too, backward is 2 forwards."""
    inputs = [row[3] for row in rows]
    own = [row[2] for row in rows]
    n = len(rows)
    stages = tuple(
        Stage(
            row[0],
            row[1],
            2 * row[1],
            (i, n + i),
            (i,),
            (),
            (i + 1,) if i + 1 < n else (),
            inputs[i + 1] if i + 1 < n else 4,
        )
        for i, row in enumerate(rows)
    )
    return Chain(stages, (*inputs, *own), 512, name)


def transformer(layers: int, width: int, tokens: int, vocabulary: int, name: str, split: bool) -> Chain:
    """bf16 blocks without scores kept (34 tokens x width bytes each, Korthikanti et al. 2022), seconds at 400 TFLOP/s."""
    act = 2 * tokens * width
    rows = [("embed", 1e-5, 0, 8 * tokens)]
    flops = 24 * tokens * width * width
    for i in range(layers):
        if split:  # attention and MLP as stages of their own
            rows.append((f"attention{i}", flops / 3 / 400e12 * 1.3, 10 * tokens * width, act))
            rows.append((f"mlp{i}", flops * 2 / 3 / 400e12, 18 * tokens * width, act))
        else:
            rows.append((f"block{i}", flops / 400e12 * 1.1, 32 * tokens * width, act))
    rows.append(("head", 2 * tokens * width * vocabulary / 400e12, 2 * tokens * vocabulary, act))
    return chain_from(rows, name)


def resnet(blocks: tuple[int, ...], batch: int, name: str) -> Chain:
    """Bottleneck blocks of four resolutions: bytes fall and widths rise from stage to stage, fp32."""
    rows = [("stem", 118e6 * 2 * batch / 60e12, 4 * batch * 64 * 112 * 112 * 2, 4 * batch * 3 * 224 * 224)]
    for level, count in enumerate(blocks):
        side, width = 56 >> level, 64 << level
        for i in range(count):
            act = 4 * batch * 4 * width * side * side
            rows.append((f"layer{level}.{i}", 218e6 * 2 * batch / 60e12, act * 7 // 4, act))
    rows.append(("head", 2 * 2e6 * batch / 60e12, 4 * batch * 3000, 4 * batch * 2048 * 49))
    return chain_from(rows, name)


def random_chain(n: int, seed: int) -> Chain:
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        rows.append((f"s{i}", rng.uniform(1, 10) * 1e-3, rng.randint(MIB // 2, 8 * MIB), rng.randint(MIB // 4, MIB)))
    return chain_from(rows, f"random{n}-{seed}")


def equal_blocks(n: int) -> Chain:
    rows = (
        [("embed", 1e-3, 0, MIB)] + [(f"b{i}", 1e-2, 17 * MIB, MIB) for i in range(n)] + [("head", 5e-3, 50 * MIB, MIB)]
    )
    return chain_from(rows, f"equal{n}")


def chains(count: int) -> list[Chain]:
    made = [
        transformer(12, 768, 8192, 50257, "gpt2", False),
        transformer(12, 768, 8192, 50257, "gpt2 split", True),
        transformer(24, 1024, 8192, 50257, "gpt2-medium", False),
        transformer(24, 1024, 8192, 50257, "gpt2-medium split", True),
        transformer(48, 1600, 4096, 50257, "gpt2-xl", False),
        transformer(32, 4096, 4096, 32000, "llama-7b", False),
        transformer(32, 4096, 4096, 32000, "llama-7b split", True),
        transformer(80, 8192, 2048, 128256, "llama-70b", False),
        transformer(12, 768, 197 * 64, 1000, "vit-b", False),
        transformer(24, 1024, 197 * 64, 1000, "vit-l split", True),
        resnet((3, 4, 6, 3), 64, "resnet50"),
        resnet((3, 4, 23, 3), 64, "resnet101"),
        resnet((3, 8, 36, 3), 32, "resnet152"),
    ]
    lengths = [8, 12, 16, 24, 32, 48, 64]
    made += [random_chain(lengths[seed % len(lengths)], seed) for seed in range(max(0, count - len(made)))]
    return made[:count]


def half_budget(chain: Chain) -> int:
    return simulate(chain, strategies.keep_all(chain)).peak_bytes // 2


def solve_times(quick: bool) -> list[dict]:
    cases = [("random", 100, 0.03), ("random", 339, 0.6), ("equal", 1000, 0.2)]
    if not quick:
        cases.append(("equal", 10000, 10.0))
    solve(random_chain(12, 0), build_problem(random_chain(12, 0)), 10 * MIB, engine="numba")  # compiles, or loads
    rows = []
    for kind, n, bound_s in cases:
        chain = random_chain(n, 1) if kind == "random" else equal_blocks(n)
        budget, problem = half_budget(chain), build_problem(chain)
        wall, processor = [], []
        for _ in range(2 if n >= 10000 else 9):
            start, used = time.perf_counter(), time.process_time()
            solution = solve(chain, problem, budget, slots=500, engine="numba")
            wall.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
        row = {
            "chain": f"{kind} {n}",
            "slots": solution.grid.slots,
            "wall_s": min(wall),
            "processor_s": min(processor),
            "bound_s": bound_s,
            "table_bytes": solution.tables.pieces.nbytes + solution.tables.top.nbytes,
        }
        if kind == "random" and (n <= 100 or not quick):
            try:
                row["rotor_s"] = rotor_seconds(chain, budget, 500)
            except ImportError:
                row["rotor_s"] = None
        rows.append(row)
    return rows


def duel(rival: Rival, made: list[Chain]) -> dict:
    """Ours against every tree that is the rival's best for some budget."""
    ratios, savings, over, losses, plans = [], [], [], [], 0
    for chain in made:
        most = simulate(chain, strategies.keep_all(chain)).peak_bytes
        for share in (0.2, 0.35, 0.5, 0.7) if rival.budgeted else (0.0,):
            budget = int(most * share)
            runs = [simulate(chain, tree) for tree in rival.trees(chain, budget)]
            if not runs:
                continue
            if rival.budgeted:
                runs = [min(runs, key=lambda run: (run.peak_bytes > budget, run.step_s, run.peak_bytes))]
                over.append(max(0.0, runs[0].peak_bytes / budget - 1))
            else:
                runs = sorted(runs, key=lambda run: run.peak_bytes)
                runs = [r for i, r in enumerate(runs) if all(r.step_s < earlier.step_s for earlier in runs[:i])][:6]
            for run in runs:
                ours = plan_chain(chain, run.peak_bytes).certificate
                plans += 1
                if ours.recompute_s > run.recompute_s * (1 + 1e-6) + 1e-12:
                    losses.append((chain.name, run.peak_bytes, ours.recompute_s, run.recompute_s))
                if run.recompute_s > 0:
                    ratios.append(ours.recompute_s / run.recompute_s)
                savings.append((run.recompute_s - ours.recompute_s) / run.step_s)
    return {
        "rival": rival.name,
        "plans": plans,
        "recompute_ratio_mean": sum(ratios) / len(ratios) if ratios else None,
        "recompute_ratio_worst": max(ratios, default=None),
        "step_saved_most": max(savings, default=None),
        "over_budget_share": sum(x > 0 for x in over) / len(over) if over else None,
        "over_budget_most": max(over, default=None),
        "losses": losses,
    }


def first_call_seconds() -> float:
    code = (
        "import time; t = time.perf_counter(); from gpuckpt.planning import Chain, Stage, plan_chain;"
        "c = Chain(tuple(Stage(f's{i}', 1, 2, (i, 60 + i), (i,)) for i in range(60)), tuple(range(100, 220)));"
        "plan_chain(c, 5000); print(time.perf_counter() - t)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def solver_peak_bytes() -> int:
    """Most resident bytes of a fresh process that solves 339 stages in 500 slots: Python, NumPy and Numba included."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import planner as p;"
        "c = p.random_chain(339, 1); p.solve(c, p.build_problem(c), p.half_budget(c), slots=500, engine='numba');"
        # Not getrusage: its maximum counts what the parent had when it started this process.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "planner.jsonl")
    parser.add_argument("--chains", type=int, default=50)
    parser.add_argument(
        "--quick", action="store_true", help="leave out 10,000 blocks and the longest chain for the rival solver"
    )
    args = parser.parse_args()
    console = Console()
    report: dict = {"first_call_s": first_call_seconds(), "solve": solve_times(args.quick)}
    report["solver_peak_bytes"] = solver_peak_bytes()

    table = Table(title="Seconds to solve, 500 slots, code compiled")
    for column in ("chain", "wall", "processor", "bound", "tables MiB", "Rockmate's C", "times faster"):
        table.add_column(column)
    for row in report["solve"]:
        rotor = row.get("rotor_s")
        cells = [row["chain"], f"{row['wall_s']:.3f}", f"{row['processor_s']:.3f}", f"{row['bound_s']}"]
        cells += [f"{row['table_bytes'] / MIB:.0f}", f"{rotor:.2f}" if rotor else "-"]
        table.add_row(*cells, f"{rotor / row['wall_s']:.0f}" if rotor else "-")
    console.print(table)
    console.print(f"a process that solves 339 stages: {report['solver_peak_bytes'] / MIB:.0f} MiB at most, bound 512")
    console.print(f"first call in a fresh process, 60 stages: {report['first_call_s']:.2f} s, imports included")

    made = chains(args.chains)
    rivals, skipped = load_rivals()
    report["rivals"], report["skipped"] = [], skipped
    table = Table(title=f"Recompute at equal actual peak, {len(made)} chains")
    for column in (
        "rival",
        "plans",
        "ours / theirs, mean",
        "worst",
        "step saved, most",
        "over budget",
        "by at most",
        "lost",
    ):
        table.add_column(column)
    for rival in rivals:
        row = duel(rival, made)
        report["rivals"].append(row)

        def share(key: str, row: dict = row) -> str:
            return "-" if row[key] is None else f"{100 * row[key]:.1f}%"

        cells = [rival.name, str(row["plans"]), share("recompute_ratio_mean"), share("recompute_ratio_worst")]
        cells += [
            share("step_saved_most"),
            share("over_budget_share"),
            share("over_budget_most"),
            str(len(row["losses"])),
        ]
        table.add_row(*cells)
    console.print(table)
    for line in skipped:
        console.print(f"skipped {line}")

    append(args.out, report)
    chain = transformer(32, 4096, 4096, 32000, "Llama-7B-shaped, 4096 tokens, one sequence", True)
    frontier = plan_frontier(chain, 24)
    middle = frontier.plans[len(frontier.plans) // 2].certificate.peak_bytes
    others = {name: plan_chain(chain, middle, name) for name in ("sqrt", "uniform", "greedy")}
    draw_frontier(frontier, args.out.with_suffix(".svg"), others=others)
    return 1 if any(row["losses"] for row in report["rivals"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
