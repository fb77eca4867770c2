"""RMSNorm and LayerNorm before a fused operation, which then saves the raw input and not the normalised one.

    xn = (x - mean) / sqrt(var + eps) * w + b      LayerNorm (Ba et al. 2016, arXiv:1607.06450)
    xn = x / sqrt(mean(x^2) + eps) * w             RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)

The norm is an operation of its own, whose backward recomputes its statistics from x. The operation behind it is given x
as well: what it saves is x, which the norm saves anyway, and its backward makes xn again: one more transient of x's size.
Statistics and gradients are in float32 (float64 for float64).

Shapes: x, xn, dxn, dx (M, K), weight and bias (K,).
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpuckpt.backend import load_kernels, use_triton
from gpuckpt.checks import shown
from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch.ops._operands import cast, is_plain_call, no_double_backward

__all__ = ["RECIPE", "Norm", "normalise", "restored"]

RECIPE = [
    inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=default)
    for name, annotation, default in (
        ("raw", Tensor | None, None),
        ("norm_weight", Tensor | None, None),
        ("norm_bias", Tensor | None, None),
        ("norm_kind", str, "rms"),
        ("norm_eps", float, 1.0),
    )
]
"""The arguments of an operator that say how its x was made; see `normalise`."""

KINDS = ("rms", "layer")


class Norm(NamedTuple):
    """A norm over the last dimension. kind: "rms" or "layer"; weight, bias: (K,) or None; eps > 0.

    >>> Norm.of(nn.RMSNorm(8, eps=1e-6)).kind
    'rms'
    """

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    @staticmethod
    def of(module: nn.LayerNorm | nn.RMSNorm) -> Norm:
        """The norm that a torch module computes. Raises `ValueError` for one over more than the last dimension."""
        if len(module.normalized_shape) != 1:
            raise ValueError(
                f"a norm over {tuple(module.normalized_shape)}: expected one over the last dimension alone"
            )
        if isinstance(module, nn.RMSNorm):
            eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
            return Norm("rms", module.weight, None, eps)
        return Norm("layer", module.weight, module.bias, module.eps)

    def check(self, x: Tensor) -> None:
        """Raise `ValueError` or `DimMismatch` for what does not fit x (..., K)."""
        if self.kind not in KINDS:
            raise ValueError(f"norm of kind {shown(self.kind)}: expected one of {', '.join(KINDS)}")
        if not self.eps > 0:
            raise ValueError(f"norm with eps={self.eps}: expected a positive number")
        for name, t in (("weight", self.weight), ("bias", self.bias)):
            if t is not None and t.shape != x.shape[-1:]:
                raise DimMismatch(x.shape[-1], t.numel(), f"length of the norm's {name}")


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """x (M, K) -> xn (M, K), in x's dtype."""
    if use_triton(x):
        load_kernels(x)
        from gpuckpt.kernels import norm as kernel

        out = x.new_empty(x.shape)
        kernel.norm_fwd(x, cast(weight, x), cast(bias, x), out, kind=kind, eps=eps)
        return out
    xn, _ = _standardise(x, kind, eps)
    if weight is not None:
        xn.mul_(weight)
    if bias is not None:
        xn.add_(bias)
    return xn.to(x.dtype)


norm_fwd = torch.library.custom_op("gpuckpt::norm_fwd", _normed, mutates_args=())


@norm_fwd.register_fake
def _(x, weight, bias, kind, eps) -> Tensor:
    return x.new_empty(x.shape)


def _gradients(
    dxn: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, needs: list[bool]
) -> list[Tensor]:
    """The gradients of x, weight and bias that `needs` asks for, in that order; each in its input's dtype."""
    needs_x, needs_weight, needs_bias = needs
    if use_triton(x):
        dx, dw, db = _kernel_gradients(dxn, x, weight, kind, eps, needs_weight, needs_bias)
    else:
        xn, rstd = _standardise(x, kind, eps)
        g = dxn.to(xn.dtype)
        dw = (g * xn).sum(0) if needs_weight else None
        db = g.sum(0) if needs_bias else None
        g = g if weight is None else g * weight
        dx = g - xn * (g * xn).mean(-1, keepdim=True)
        if kind == "layer":
            dx -= g.mean(-1, keepdim=True)
        dx = dx.mul_(rstd)
    found = []
    if needs_x:
        found.append(dx.to(x.dtype))
    for grad, like in ((dw, weight), (db, bias)):
        if grad is not None and like is not None:
            found.append(grad.to(like.dtype))
    return found


norm_bwd = torch.library.custom_op("gpuckpt::norm_bwd", _gradients, mutates_args=())


@norm_bwd.register_fake
def _(dxn, x, weight, bias, kind, eps, needs) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((x, weight, bias), needs, strict=True) if need]


no_double_backward(norm_bwd, "linear, mlp or gated_mlp with norm=")


def _standardise(x: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) rstd and rstd (M, 1), in float32 or wider; mean is 0 for RMSNorm."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True) if kind == "layer" else wide
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def _kernel_gradients(
    dxn: Tensor, x: Tensor, weight: Tensor | None, kind: str, eps: float, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    load_kernels(x)
    from gpuckpt.kernels import norm as kernel

    dx = x.new_empty(x.shape)
    stats = torch.empty(2, x.shape[0], dtype=torch.float32, device=x.device)
    partials = [
        torch.empty(kernel.norm_partials_shape(x), dtype=torch.float32, device=x.device) if need else None
        for need in (needs_weight, needs_bias)
    ]
    kernel.norm_bwd(x, cast(weight, x), dxn, dx, stats, *partials, kind=kind, eps=eps)
    dw, db = (None if p is None else p.sum(0) for p in partials)
    return dx, dw, db


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, kind, eps = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.options = (kind, eps)


def _backward(ctx, dxn: Tensor):
    x, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    plain = not torch.is_grad_enabled() and is_plain_call((dxn, x, weight, bias))
    run = _gradients if plain else norm_bwd
    kind, eps = ctx.options
    found = iter(run(dxn, x, weight, bias, kind, eps, needs) if any(needs) else ())
    return (*(next(found) if need else None for need in needs), None, None)


norm_fwd.register_autograd(_backward, setup_context=_setup)


class _DirectNorm(torch.autograd.Function):
    """The norm in a node of its own, for plain calls; see `_register`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup(ctx, inputs, None)
        return _normed(*inputs)

    @staticmethod
    def backward(ctx: Any, dxn: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dxn)


def normalise(
    rows: Tensor, norm: Norm | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, str, float]:
    """(xn, *recipe): the rows to compute with, and from what backward makes them again: (raw rows, weight, bias, kind, eps),
    with raw rows None where there is no norm."""
    if norm is None:
        return rows, None, None, None, "rms", 1.0
    norm.check(rows)
    weight, bias, kind, eps = norm.weight, norm.bias, norm.kind, float(norm.eps)
    run = _DirectNorm.apply if is_plain_call((rows, weight, bias)) else norm_fwd
    return run(rows, weight, bias, kind, eps), rows, weight, bias, kind, eps


def restored(x: Tensor | None, recipe: tuple[Tensor | None, Tensor | None, Tensor | None, str, float]) -> Tensor | None:
    """In backward: the saved rows x, or where `recipe` has raw rows the normalised ones, computed again."""
    raw, weight, bias, kind, eps = recipe
    if raw is None:
        return x
    with torch.no_grad():
        return (_normed if is_plain_call((raw, weight, bias)) else norm_fwd)(raw, weight, bias, kind, eps)
