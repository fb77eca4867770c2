"""The fused operations beside the same formulas in torch, on leaves of any shape and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.common import Context, Facts
from gpuckpt import functional as G

OPERATIONS = ("linear", "mlp", "gated_mlp", "linear_cross_entropy")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}
Formula = Callable[..., Tensor]


def make(
    context: Context, op: str, m: int, k: int, h: int, dtype: torch.dtype, activation: str = "gelu_tanh", **options: Any
) -> tuple[tuple[Tensor, ...], Formula, Formula]:
    """(leaves, ours, torch's) of an operation with m rows, width k and hidden size (or classes) h. The options are ours alone."""
    x, w, b = (
        context.rand(m, k, dtype=dtype).requires_grad_(),
        context.leaf(h, k, dtype=dtype),
        context.leaf(h, dtype=dtype),
    )
    act = ACTIVATIONS[activation]
    if op == "linear":
        return (
            (x, w, b),
            lambda x, w, b: G.linear(x, w, b, activation=activation, **options),
            lambda x, w, b: act(F.linear(x, w, b)),
        )
    if op == "mlp":
        return (
            (x, w, b, context.leaf(k, h, dtype=dtype), context.leaf(k, dtype=dtype)),
            lambda x, w, b, v, c: G.mlp(x, w, v, b, c, activation=activation, **options),
            lambda x, w, b, v, c: F.linear(act(F.linear(x, w, b)), v, c),
        )
    if op == "gated_mlp":
        return (
            (x, w, context.leaf(h, k, dtype=dtype), context.leaf(k, h, dtype=dtype)),
            lambda x, g, u, d: G.gated_mlp(x, g, u, d, activation=activation, **options),
            lambda x, g, u, d: F.linear(act(F.linear(x, g)) * F.linear(x, u), d),
        )
    target = torch.randint(0, h, (m,), device=context.device)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        z = F.linear(x, w)
        return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), target)

    return (x, w), lambda x, w: G.linear_cross_entropy(x, w, target, **options), eager


def compare(leaves: Sequence[Tensor], ours: Formula, torchs: Formula) -> Facts:
    """Result and gradients against fp64: the error must stay under twice torch's own plus 1e-6, and a second run give the same
    bits. `error_over_allowed`: the worst of them; 1 is the bound."""

    def run(formula: Formula, leaves: Sequence[Tensor]) -> list[Tensor]:
        y = formula(*leaves)
        dy = torch.linspace(0.5, 1.5, y.numel(), device=y.device, dtype=torch.float64).reshape(y.shape).to(y.dtype)
        return [t.detach().double() for t in (y, *torch.autograd.grad(y, leaves, dy))]

    truth = run(torchs, [t.detach().double().requires_grad_() for t in leaves])
    got, again, eager = run(ours, leaves), run(ours, leaves), run(torchs, leaves)
    worst = 0.0
    for found, own, exact in zip(got, eager, truth, strict=True):
        if not exact.numel():
            continue
        scale = exact.abs().max().clamp_min(1e-30)
        allowed = 2 * ((own - exact).abs().max() / scale).item() + 1e-6
        ratio = ((found - exact).abs().max() / scale).item() / allowed
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return {"ok": worst <= 1 and same, "error_over_allowed": worst, "same_bits_twice": same}
