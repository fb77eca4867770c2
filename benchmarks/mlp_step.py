"""A training step of the fused layers on the CPU, vs. eager torch and torch.utils.checkpoint.

    python benchmarks/mlp_step.py [--rows 2048] [--width 256] [--hidden 1024] [--repeats 15] [--threads 1] [--out FILE.jsonl]

eager keeps every hidden-size tensor; the checkpoint keeps the input only, as ours does: the fair opponent. One step is forward
and backward for all gradients. Contenders take turns at every repetition; medians are given of wall time and of the process's
CPU time, which says more on a busy machine. saved_bytes: what autograd holds between forward and backward, parameters left out.
scratch_bytes: the most that backward holds in addition to the gradients, as operations of torch see it.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_record import RESULTS, append, arguments
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gpuckpt.functional as G


def contenders(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(ours, eager) of an operation on x and its weights and biases in order."""
    if name == "linear + gelu":
        return lambda x, w, b: G.linear(x, w, b, activation="gelu"), lambda x, w, b: F.gelu(F.linear(x, w, b))
    if name == "mlp, gelu":
        return (
            lambda x, w1, b1, w2, b2: G.mlp(x, w1, w2, b1, b2, activation="gelu"),
            lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        )
    return (
        lambda x, wg, wu, wd: G.gated_mlp(x, wg, wu, wd, activation="silu"),
        lambda x, wg, wu, wd: F.linear(F.silu(F.linear(x, wg)) * F.linear(x, wu), wd),
    )


SHAPES: dict[str, Callable[[int, int], tuple[tuple[int, ...], ...]]] = {
    "linear + gelu": lambda width, hidden: ((hidden, width), (hidden,)),
    "mlp, gelu": lambda width, hidden: ((hidden, width), (hidden,), (width, hidden), (width,)),
    "gated mlp, silu": lambda width, hidden: ((hidden, width), (hidden, width), (width, hidden)),
}


class Scratch(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive: now, and at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in OPDEFS:  # look inside ours
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in self._known | old:
                storage = t.untyped_storage()
                self._known.add(key)
                self.live_bytes += storage.nbytes()
                weakref.finalize(storage, self._dead, key, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return out

    def _dead(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= nbytes


def bytes_of(fn: Callable[..., Tensor], x: Tensor, parameters: list[Tensor], dy: Tensor) -> tuple[int, int]:
    """(saved_bytes, scratch_bytes) of one step."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not any(t.untyped_storage()._cdata == p.untyped_storage()._cdata for p in parameters):
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = fn(x, *parameters)
    with Scratch() as scratch:
        grads = torch.autograd.grad(y, [x, *parameters], dy)
    return sum(kept.values()), scratch.peak_bytes - sum(g.nbytes for g in grads)


def measure(name: str, rows: int, width: int, hidden: int, repeats: int) -> dict[str, dict[str, float]]:
    """Per contender: wall_s, cpu_s, saved_bytes, scratch_bytes."""
    torch.manual_seed(0)
    x = torch.randn(rows, width, requires_grad=True)
    parameters = [nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5) for shape in SHAPES[name](width, hidden)]
    ours, eager = contenders(name)
    steps = {
        "ours": ours,
        "eager": eager,
        "checkpoint": lambda *operands: checkpoint(eager, *operands, use_reentrant=False),
    }
    dy = torch.randn_like(ours(x, *parameters))
    found = {}
    for key, fn in steps.items():
        saved_bytes, scratch_bytes = bytes_of(fn, x, parameters, dy)
        found[key] = {"saved_bytes": saved_bytes, "scratch_bytes": scratch_bytes}
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in steps}
    for _ in range(repeats):
        for key, fn in steps.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            torch.autograd.grad(fn(x, *parameters), [x, *parameters], dy)
            times[key].append((time.perf_counter() - wall_s, time.process_time() - cpu_s))
    for key, values in times.items():
        found[key]["wall_s"], found[key]["cpu_s"] = (statistics.median(column) for column in zip(*values, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 2048), ("width", 256), ("hidden", 1024), ("repeats", 15), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / "mlp_step.jsonl")
    options = arguments(parser, rows=256, width=64, hidden=256, repeats=3)
    torch.set_num_threads(options.threads)
    table = Table(title=f"One training step, float32, {options.rows} x {options.width}, hidden {options.hidden}")
    columns = ("operation", "contender", "wall ms", "cpu ms", "ours / it (cpu)", "saved MiB", "scratch MiB")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    report = {}
    for name in SHAPES:
        found = measure(name, options.rows, options.width, options.hidden, options.repeats)
        for key, row in found.items():
            row["ours_over_it_cpu"] = found["ours"]["cpu_s"] / row["cpu_s"]
            row["ours_over_it_wall"] = found["ours"]["wall_s"] / row["wall_s"]
            table.add_row(
                name,
                key,
                f"{row['wall_s'] * 1e3:.1f}",
                f"{row['cpu_s'] * 1e3:.1f}",
                f"{row['ours_over_it_cpu']:.2f}",
                f"{row['saved_bytes'] / 2**20:.2f}",
                f"{row['scratch_bytes'] / 2**20:.2f}",
            )
        report[name] = found
    Console(width=110).print(table)
    sizes = {key: getattr(options, key) for key in ("rows", "width", "hidden", "repeats", "threads")}
    append(options.out, {"sizes": sizes, "results": report})


if __name__ == "__main__":
    main()
