"""Other planners behind one face: a chain and a nominal budget in, a tree out, for `planner.py` to judge.

Each adapter gives its rival the figures the rival asks for and turns its answer into a tree. Where an answer leaves a choice (a
run of dropped stages is one frame or several) both trees are offered and the better one counts for the rival.

Those that are not installed are skipped by name. `make bench` installs them into out/rivals, without their dependencies:
ckptplan 0.1.0rc1, checkpoint-schedules 1.0.4, rockmate 2.0.0 (its C solver of rotor only).
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuckpt.planning import Chain, Keep, Node, Recompute, strategies

__all__ = ["RIVALS_DIR", "Rival", "load_rivals", "rotor_seconds"]

RIVALS_DIR = Path(__file__).resolve().parent.parent / "out" / "rivals"

Tree = tuple[Node, ...]


@dataclass(frozen=True)
class Rival:
    """`trees(chain, budget_bytes)` offers plans; `budgeted`: the rival was told the budget, so that exceeding it counts."""

    name: str
    trees: Callable[[Chain, int], list[Tree]]
    budgeted: bool


def load_rivals() -> tuple[list[Rival], list[str]]:
    """The rivals that are here, and one line for each that is not."""
    if str(RIVALS_DIR) not in sys.path:
        sys.path.append(str(RIVALS_DIR))
    rivals = [
        Rival("checkpoint_sequential", lambda chain, budget: _uniform(chain), False),
        Rival("DTR's heuristic", _dtr, True),
    ]
    skipped = []
    for name, load in (
        ("ckptplan DP", _load_ckptplan),
        ("checkpoint-schedules Revolve", _load_revolve),
        ("Rockmate's rotor", _load_rotor),
        ("torch greedy_knapsack", lambda: _load_torch("greedy_knapsack")),
        ("torch dp_knapsack", lambda: _load_torch("dp_knapsack")),
        ("torch dp_knapsack_sliding_hirschberg", lambda: _load_torch("dp_knapsack_sliding_hirschberg")),
        ("torch ilp_knapsack", lambda: _load_torch("ilp_knapsack")),
    ):
        try:
            trees, budgeted = load()
        except (ImportError, AttributeError) as error:
            skipped.append(f"{name}: {error}")
            continue
        rivals.append(Rival(name, trees, budgeted))
    return rivals, skipped


def _saved_bytes(chain: Chain) -> list[int]:
    return [chain.charge(stage.saves) for stage in chain.stages]


def _dropped(chain: Chain, dropped: set[int]) -> list[Tree]:
    """Frames around single dropped stages, and around runs of them."""
    dropped = {i for i in dropped if chain.stages[i].recomputable}
    single = tuple(Recompute((Keep(i),)) if i in dropped else Keep(i) for i in range(len(chain)))
    runs: list[Node] = []
    run: list[Node] = []
    for i in range(len(chain) + 1):
        if i in dropped:
            run.append(Keep(i))
            continue
        if run:
            runs.append(Recompute(tuple(run)))
            run = []
        if i < len(chain):
            runs.append(Keep(i))
    return [single, tuple(runs)]


def _uniform(chain: Chain) -> list[Tree]:
    return [strategies.uniform(chain, segments) for segments in range(1, len(chain) + 1)]


def _dtr(chain: Chain, budget_bytes: int) -> list[Tree]:
    """Kirisame et al. 2021: forward in order; over budget, drop what has the least cost / (bytes x staleness).

    The cost of a stage is its own forward and that of its dropped neighbours.
    """
    saved = _saved_bytes(chain)
    held: dict[int, int] = {}
    dropped: set[int] = set()
    for i in range(len(chain)):
        held[i] = saved[i]
        while sum(held.values()) + sum(chain.charge(chain.stages[d].inputs) for d in dropped) > budget_bytes:
            choices = [d for d in held if d != i and chain.stages[d].recomputable and held[d]]
            if not choices:
                break

            def cost(d: int) -> float:
                left, right = d - 1, d + 1
                seconds = chain.stages[d].forward_s
                while left in dropped:
                    seconds, left = seconds + chain.stages[left].forward_s, left - 1
                while right in dropped:
                    seconds, right = seconds + chain.stages[right].forward_s, right + 1
                return seconds

            worst = min(choices, key=lambda d: cost(d) / (held[d] * (i - d)))
            del held[worst]
            dropped.add(worst)
    return _dropped(chain, dropped)


def _load_torch(name: str) -> tuple[Callable[[Chain, int], list[Tree]], bool]:
    solver = getattr(importlib.import_module("torch._functorch._activation_checkpointing.knapsack"), name)
    if name == "ilp_knapsack":
        importlib.import_module("scipy.optimize")

    def trees(chain: Chain, budget_bytes: int) -> list[Tree]:
        # As torch calls it: memory as fractions of the whole, the budget as a ratio.
        saved = _saved_bytes(chain)
        items = [i for i, b in enumerate(saved) if b and chain.stages[i].recomputable]
        whole, fixed = sum(saved), sum(saved) - sum(saved[i] for i in items)
        share = max(0.0, (budget_bytes - fixed) / whole)
        answer = solver([saved[i] / whole for i in items], [chain.stages[i].forward_s for i in items], share)
        return _dropped(chain, {items[i] for i in answer[2]})

    return trees, True


def _load_ckptplan() -> tuple[Callable[[Chain, int], list[Tree]], bool]:
    planner = importlib.import_module("ckptplan.planning.planner")
    kinds = importlib.import_module("ckptplan.types")
    errors = importlib.import_module("ckptplan.errors")
    from torch import nn

    def trees(chain: Chain, budget_bytes: int) -> list[Tree]:
        saved = _saved_bytes(chain)
        profiles, blocks = [], []
        for i, stage in enumerate(chain.stages):
            figures: dict[str, Any] = dict.fromkeys(kinds.BlockProfile.__dataclass_fields__)
            figures.update(
                block_id=str(i),
                order=i,
                device="cpu",
                dtype="torch.float32",
                input_shape_signature=f"in{i}",
                output_shape_signature=f"out{i}",
                timing_only=False,
                activation_bytes_estimate=saved[i],
                recompute_time_upper_bound_ms_mean=1e3 * stage.forward_s,
                eligible_for_checkpoint=stage.recomputable,
            )
            profiles.append(kinds.BlockProfile(**figures))
            blocks.append(kinds.CheckpointableBlock(str(i), i, nn.Identity()))
        bucket = max(1, sum(saved) // 4000)
        try:
            plan = planner.plan_checkpoints(
                profiles,
                blocks,
                target_kind="activation_budget_bytes",
                target_value=float(budget_bytes),
                activation_bucket_bytes=bucket,
            )
        except errors.InfeasibleTargetError:
            return []
        return _dropped(chain, {int(d.block_id) for d in plan.decisions if d.checkpointed})

    return trees, True


def _load_revolve() -> tuple[Callable[[Chain, int], list[Tree]], bool]:
    schedules = importlib.import_module("checkpoint_schedules")

    def trees(chain: Chain, budget_bytes: int) -> list[Tree]:
        n = len(chain)
        offered = []
        for snapshots in sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, n // 2, n - 1} & set(range(1, n))):
            forwards = sum(
                len(range(action.n0, action.n1))
                for action in _until_done(schedules.Revolve(n, snapshots))
                if isinstance(action, schedules.Forward)
            )
            # The package writes one snapshot less than Griewank and Walther count, or as many: both are binomial.
            matching = [s for s in (snapshots, snapshots + 1) if strategies.revolve_steps(n, s) == forwards]
            offered += [strategies.revolve(chain, s) for s in matching]
        return offered

    return trees, False


def _until_done(schedule: Any) -> Iterator[Any]:
    for action in schedule:
        yield action
        if type(action).__name__ == "EndReverse":
            return


def _load_rotor() -> tuple[Callable[[Chain, int], list[Tree]], bool]:
    table = _rotor_table()

    def trees(chain: Chain, budget_bytes: int) -> list[Tree]:
        slot = max(1, -(-budget_bytes // 500))
        limit = budget_bytes // slot
        try:
            operations = table(_rotor_chain(chain, slot), limit).build_sequence(limit)
        except ValueError:
            return []
        return [_rotor_tree(chain, operations)]

    return trees, True


def rotor_seconds(chain: Chain, budget_bytes: int, slots: int) -> float:
    """Wall seconds of Rockmate's C solver; `ImportError` when it is not here."""
    import time

    table = _rotor_table()
    figures = _rotor_chain(chain, -(-budget_bytes // slots))
    start = time.perf_counter()
    table(figures, slots).get_opt(slots)
    return time.perf_counter() - start


def _rotor_table() -> Callable[[Any, int], Any]:
    if str(RIVALS_DIR) not in sys.path:
        sys.path.append(str(RIVALS_DIR))
    if not (RIVALS_DIR / "rockmate").is_dir():
        raise ImportError("rockmate is not in out/rivals")
    # The package's own __init__ wants its graph builder and a GPU; its solver needs neither.
    for name in ("rockmate", "rockmate.solvers", "rockmate.solvers.rk_rotor"):
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__path__ = [str(RIVALS_DIR.joinpath(*name.split(".")))]
            sys.modules[name] = module
    return importlib.import_module("rockmate.solvers.rk_rotor.csolver").RkTable


def _rotor_chain(chain: Chain, slot: int) -> Any:
    """The chain in rotor's terms: cw[i] the input of stage i, cbw[i + 1] what keeping stage i adds, its output included."""
    n = len(chain)
    inputs = [chain.charge(stage.inputs) for stage in chain.stages] + [0]

    def slots(b: int) -> int:
        return -(-b // slot)

    kept = [chain.charge(tuple(set(stage.saves) - set(stage.inputs))) for stage in chain.stages]
    return types.SimpleNamespace(
        ln=n,
        fw=[[stage.forward_s] for stage in chain.stages] + [[0.0]],
        bw=[[stage.backward_s] for stage in chain.stages] + [[0.0]],
        cw=[slots(b) for b in inputs] + [0],
        cbw=[[0]] + [[slots(kept[i] + inputs[i + 1])] for i in range(n)] + [[0]],
        fwd_tmp=[[0]] * (n + 1),
        bwd_tmp=[[0]] * (n + 1),
        ff_fwd_tmp=[0] * (n + 1),
        ff_fw=[stage.forward_s for stage in chain.stages] + [0.0],
        nb_sol=[1] * (n + 1),
    )


def _rotor_tree(chain: Chain, operations: list[Any]) -> Tree:
    at = 0

    def kind() -> str:
        return type(operations[at]).__name__

    def piece(first: int, last: int) -> Tree:
        nonlocal at
        nodes: list[Node] = []
        kept = 0
        after: list[tuple[int, int, int]] = []
        while first <= last:
            name = kind()
            at += 1
            if name == "SeqLoss":
                break
            if name == "SeqBlockFe":
                nodes.append(Keep(first))
                kept, first = kept + 1, first + 1
                after.append((-1, 0, 0))
                continue
            end = first + 1
            while kind() == "SeqBlockFn":
                at, end = at + 1, end + 1
            after.append((len(nodes), first, end - 1))
            nodes.append(Keep(first))  # its frame is read when the right part is done
            first = end
        for place, begin, end in reversed(after):
            if place < 0:
                at += 1
            else:
                nodes[place] = Recompute(piece(begin, end))
        return tuple(nodes)

    return piece(0, len(chain))
