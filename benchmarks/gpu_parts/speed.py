"""Parts "ceilings", "operations" and "overhead": what the device reaches, whole training steps, and Python's share of one."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpu_parts.cases import OPERATIONS, make
from gpu_parts.common import Context, medians


def ceilings(context: Context) -> None:
    """A copy, and cuBLAS in bf16."""
    count = 64 if context.dry else 1 << 28
    source = context.rand(count, dtype=torch.float32)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    facts = medians(context, {"copy": copy})["copy"]
    context.say("copy", **facts, gb_per_s=8e-9 * count / (facts["ms"] / 1e3))
    shapes = [(8192, 8192, 8192), (4096, 2048, 8192), (8192, 4096, 14336), (2048, 1024, 4096)]
    for m, k, n in [(64, 32, 64)] if context.dry else shapes:
        a, b = context.rand(m, k), context.rand(n, k)
        out = torch.empty(m, n, device=context.device, dtype=torch.bfloat16)
        facts = medians(context, {"mm": lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out)})["mm"]
        context.say(f"cuBLAS bf16 {m}x{k}x{n}", **facts, tflops=2e-12 * m * k * n / (facts["ms"] / 1e3))


def _rivals(op: str) -> dict[str, Callable[..., Tensor]]:
    """Other libraries' formulas for the same leaves, where they are installed."""

    def liger_gated() -> Callable[..., Tensor]:
        silu_mul = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        return lambda x, g, u, d: F.linear(silu_mul.apply(F.linear(x, g), F.linear(x, u)), d)

    def liger_loss() -> Callable[..., Tensor]:
        module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
        return lambda x, w: module.LigerFusedLinearCrossEntropyFunction.apply(x, w, _targets(x, w))[0]

    def quack_mlp() -> Callable[..., Tensor]:
        module = importlib.import_module("quack.mlp")
        return lambda x, w, b, v, c: module.mlp_func(x, w, v, bias1=b, bias2=c, activation="gelu_tanh_approx")

    found = {}
    known = {
        "gated_mlp": {"liger": liger_gated},
        "linear_cross_entropy": {"liger": liger_loss},
        "mlp": {"quack": quack_mlp},
    }
    for name, load in known.get(op, {}).items():
        try:
            found[name] = load()
        except (ImportError, AttributeError, RuntimeError):
            continue
    return found


def _targets(x: Tensor, w: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) % w.shape[0]


def operations(context: Context) -> None:
    """Forward and backward with peak MiB: ours, eager, torch.compile for this shape, torch's checkpoint, other libraries."""
    shapes = [(32, 16, 64)] if context.dry else [(8192, 4096, 14336), (4096, 2048, 8192), (2048, 1024, 4096)]
    for m, k, h in shapes:
        for op in OPERATIONS:
            classes = 8 * h if op == OPERATIONS[-1] and not context.dry else h
            name = f"{op} {m}x{k}x{classes}"
            context.item(name, lambda op=op, name=name, sizes=(m, k, classes): _operation(context, name, op, *sizes))


def _operation(context: Context, name: str, op: str, m: int, k: int, h: int) -> None:
    leaves, ours, eager = make(context, op, m, k, h, torch.bfloat16, "silu" if op == "gated_mlp" else "gelu_tanh")
    # Dense: `.sum()` would send strides (0, 0).
    dy = torch.ones((), device=context.device) if op == OPERATIONS[-1] else context.rand(m, h if op == "linear" else k)

    def step(formula: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(formula(*leaves), leaves, dy)

    contenders = {"gpuckpt": ours, "eager": eager, "checkpoint": lambda *a: checkpoint(eager, *a, use_reentrant=False)}
    if not context.dry:
        torch._dynamo.reset()  # from the second shape on it would compile for any
        contenders |= {"compile": torch.compile(eager, dynamic=False), **_rivals(op)}
    peaks: dict[str, Any] = {}
    for rival, formula in contenders.items():
        try:
            peaks[rival] = round(context.peak_bytes(step(formula)) / 2**20, 1)
        except Exception as error:
            peaks[rival] = f"{type(error).__name__}: {str(error)[:80]}"
    found = medians(context, {rival: step(formula) for rival, formula in contenders.items()}, repeats=8)
    for rival, facts in found.items():
        context.say(f"{name} {rival}", **facts, peak_mib=peaks[rival])


def overhead(context: Context) -> None:
    """Microseconds of Python for forward and backward of small tensors, which the device is never waited for."""
    for op in OPERATIONS:
        leaves, ours, eager = make(context, op, 64, 64, 64, torch.bfloat16)
        for rival, formula in (("gpuckpt", ours), ("eager", eager)):
            dy = torch.ones_like(formula(*leaves))
            turns = 2 if context.dry else 60
            for _ in range(turns // 3 + 1):
                torch.autograd.grad(formula(*leaves), leaves, dy)
            context.sync()
            began_s = time.perf_counter()
            for _ in range(turns):
                torch.autograd.grad(formula(*leaves), leaves, dy)
            spent_s = time.perf_counter() - began_s
            context.sync()
            context.say(f"{op} {rival}", us=spent_s / turns * 1e6)
