"""Every fused operation on a GPU: checked against fp64, then timed against eager torch, torch.compile and other libraries.

    python benchmarks/gpu_suite.py [--out FILE.jsonl] [--quick]

Checks: outputs and gradients, fp32, bf16 and fp16: the error against fp64 must stay under twice that of eager torch in the
same dtype plus 1e-6. Times: forward and forward+backward, contenders taken in turn at every repetition, medians of CUDA
events, random data, the L2 cache overwritten in between; FLOPs and bytes are related to ceilings measured in the same run.
Liger and flash-swiglu-mlp take part where they are installed.

Without a GPU the same code runs on tiny shapes through Triton's interpreter: the checks mean something then, the times do not
and are left out. On a GPU it ends inside 8 minutes. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["GPUCKPT_BACKEND"] = "triton"

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from gpuckpt import functional as G  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
TIME_LIMIT_S = 8 * 60


@dataclass(frozen=True)
class Case:
    """One operation on one shape. `make(dtype)` gives its tensors; `ours` and `eager` take them."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    gemms: int  # in a training step, ours
    rivals: tuple[tuple[str, Callable[[], Callable[..., Tensor]]], ...] = ()

    def flops(self) -> float:
        """Of one GEMM of the first weight, times the number of GEMMs."""
        (m, k), (n, _) = self.shapes["x"], self.shapes["w1"]
        return 2.0 * m * n * k * self.gemms

    def make(self, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        tensors = {}
        for name, shape in self.shapes.items():
            if name == "target":
                classes = self.shapes["w1"][0]
                tensors[name] = torch.randint(classes, shape, generator=generator, device=DEVICE)
                continue
            scale = 1.0 if name == "x" else shape[-1] ** -0.5
            drawn = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float64) * scale
            tensors[name] = drawn.to(dtype).requires_grad_()
        return tensors


def _eager_mlp(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, w1, b1, w2, b2: F.linear(activation(F.linear(x, w1, b1)), w2, b2)


def _eager_gated(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, w1, w3, w2: F.linear(activation(F.linear(x, w1)) * F.linear(x, w3), w2)


def _liger_gated() -> Callable[..., Tensor]:
    ops = importlib.import_module("liger_kernel.ops.swiglu")
    return lambda x, w1, w3, w2: F.linear(ops.LigerSiLUMulFunction.apply(F.linear(x, w1), F.linear(x, w3)), w2)


def _liger_cross_entropy() -> Callable[..., Tensor]:
    ops = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    return lambda x, w1, target: ops.LigerFusedLinearCrossEntropyFunction.apply(x, w1, target)[0]


def _flash_swiglu() -> Callable[..., Tensor]:
    module = importlib.import_module("flash_swiglu_mlp")
    return lambda x, w1, w3, w2: module.swiglu_mlp(x, w1, w3, w2)


def cases(quick: bool) -> list[Case]:
    """The suite. M rows, K width, H hidden, V vocabulary; tiny without a GPU."""
    sizes = [(4096, 4096, 14336)] if quick else [(4096, 2048, 8192), (8192, 4096, 14336), (8192, 8192, 28672)]
    if not GPU:
        sizes = [(33, 24, 40)]
    found = []
    for m, k, h in sizes:
        x, up, down = {"x": (m, k)}, (h, k), (k, h)
        biased = {**x, "w1": up, "b1": (h,), "w2": down, "b2": (k,)}
        gated = {**x, "w1": up, "w3": up, "w2": down}
        rivals = (("liger", _liger_gated), ("flash-swiglu-mlp", _flash_swiglu))
        found += [
            Case(
                f"linear gelu {m}x{k}x{h}",
                {**x, "w1": up, "b1": (h,)},
                lambda x, w1, b1: G.linear(x, w1, b1, activation="gelu"),
                lambda x, w1, b1: F.gelu(F.linear(x, w1, b1)),
                4,
            ),
            Case(
                f"mlp gelu_tanh {m}x{k}x{h}",
                biased,
                lambda x, w1, b1, w2, b2: G.mlp(x, w1, w2, b1, b2, activation="gelu_tanh"),
                _eager_mlp(lambda z: F.gelu(z, approximate="tanh")),
                7,
            ),
            Case(
                f"swiglu {m}x{k}x{h}",
                gated,
                lambda x, w1, w3, w2: G.gated_mlp(x, w1, w3, w2, activation="silu"),
                _eager_gated(F.silu),
                11,
                rivals,
            ),
        ]
        vocabulary = 8 * h if GPU else 5 * h
        found.append(
            Case(
                f"linear cross entropy {m}x{k}x{vocabulary}",
                {**x, "w1": (vocabulary, k), "target": (m,)},
                lambda x, w1, target: G.linear_cross_entropy(x, w1, target),
                lambda x, w1, target: F.cross_entropy(F.linear(x, w1).float(), target),
                4,
                (("liger", _liger_cross_entropy),),
            )
        )
    return found


def results(case: Case, fn: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients, in fp64."""
    for tensor in tensors.values():
        tensor.grad = None
    out = fn(**tensors)
    weight = torch.linspace(0.5, 1.5, out.numel(), device=out.device, dtype=torch.float64).reshape(out.shape)
    (out.double() * weight).sum().backward()
    found = {"out": out.detach().double()}
    found |= {f"d{name}": t.grad.double() for name, t in tensors.items() if t.grad is not None}
    return found


def check(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The worst ratio of our error to what is allowed, over the output and every gradient."""
    tensors = case.make(dtype, seed=1)
    exact = {n: t if n == "target" else t.detach().double().requires_grad_() for n, t in tensors.items()}
    truth = results(case, case.eager, exact)
    ours, eager = results(case, case.ours, tensors), results(case, case.eager, tensors)
    worst, where = 0.0, ""
    for name, expected in truth.items():
        scale = expected.abs().max().clamp_min(1e-30)
        error = ((ours[name] - expected).abs().max() / scale).item()
        allowed = 2 * ((eager[name] - expected).abs().max() / scale).item() + 1e-6
        ratio = error / allowed if error == error else float("inf")
        if ratio > worst:
            worst, where = ratio, name
    return {"case": case.name, "dtype": str(dtype)[6:], "worst": worst, "where": where, "passed": worst <= 1.0}


def ceilings() -> dict[str, float]:
    """What this GPU reaches: bf16 FLOP/s of a large GEMM, bytes/s of a large copy."""
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    b = torch.empty(2**28, device=DEVICE)
    c = torch.empty_like(b)
    gemm_s = median_times({"gemm": lambda: a @ a}, 20)["gemm"]
    copy_s = median_times({"copy": lambda: c.copy_(b)}, 20)["copy"]
    return {"flops_per_s": 2 * 8192**3 / gemm_s, "bytes_per_s": 2 * b.numel() * 4 / copy_s}


def median_times(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turn; the L2 cache is overwritten before every launch."""
    flush = torch.empty(2**26, device=DEVICE, dtype=torch.int32)
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contenders}
    for repeat in range(repeats + 3):
        for name, run in contenders.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            if repeat >= 3:
                spans[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in spans.items()}


def time_case(case: Case, ceiling: dict[str, float], repeats: int) -> dict[str, Any]:
    """Forward and training-step seconds of every contender, in bf16, and the bytes each saves for backward."""
    tensors = case.make(torch.bfloat16, seed=2)
    functions: dict[str, Callable[..., Tensor]] = {"gpuckpt": case.ours, "eager": case.eager}
    functions["compile"] = torch.compile(case.eager)
    skipped = {}
    for name, load in case.rivals:
        try:
            functions[name] = load()
            functions[name](**tensors)
        except (ImportError, AttributeError, RuntimeError, TypeError) as error:
            functions.pop(name, None)
            skipped[name] = str(error).splitlines()[0]
    grads = [t for t in tensors.values() if t.requires_grad]

    def step(fn: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(fn(**tensors).sum(), grads)

    with torch.no_grad():
        forward = median_times({n: (lambda fn=fn: fn(**tensors)) for n, fn in functions.items()}, repeats)
    whole = median_times({n: step(fn) for n, fn in functions.items()}, repeats)
    share = case.flops() / whole["gpuckpt"] / ceiling["flops_per_s"]
    return {"case": case.name, "forward_s": forward, "step_s": whole, "flops_share": share, "skipped": skipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="add the figures to this file as a line of JSON")
    parser.add_argument("--quick", action="store_true", help="one shape each")
    options = parser.parse_args()
    console = Console()
    began_s = time.monotonic()
    device = torch.cuda.get_device_name() if GPU else "no GPU: tiny shapes in Triton's interpreter, nothing timed"
    console.print(f"device: {device}")
    report: dict[str, Any] = {"device": device, "torch": torch.__version__, "checks": [], "times": []}
    suite = cases(options.quick)
    table = Table("case", "dtype", "error / allowed", "worst at", "")
    for case in suite if not GPU else suite[:4]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            row = check(case, dtype)
            report["checks"].append(row)
            passed = "[green]ok" if row["passed"] else "[red]FAILED"
            table.add_row(row["case"], row["dtype"], f"{row['worst']:.2f}", row["where"], passed)
    console.print(table)
    if GPU:
        report["ceilings"] = ceilings()
        times = Table("case", "contender", "forward ms", "step ms", "step vs eager")
        for case in suite:
            if time.monotonic() - began_s > TIME_LIMIT_S:
                console.print(f"out of time: {case.name} and what follows are not timed")
                break
            row = time_case(case, report["ceilings"], 20)
            report["times"].append(row)
            for name, step_s in row["step_s"].items():
                ratio = step_s / row["step_s"]["eager"]
                times.add_row(
                    case.name, name, f"{row['forward_s'][name] * 1e3:.3f}", f"{step_s * 1e3:.3f}", f"{ratio:.2f}"
                )
        console.print(times)
    if options.out is not None:
        from bench_record import append  # a copy of this file elsewhere still checks

        append(options.out, report)
    return 0 if all(row["passed"] for row in report["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
