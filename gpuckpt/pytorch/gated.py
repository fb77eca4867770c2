"""`gated_mlp`: y = (act(x Wg^T + bg) * (x Wu^T + bu)) Wd^T + bd, saving x and the weights and nothing else.

Shazeer, "GLU variants improve transformer" (2020): SwiGLU has act = silu, GEGLU gelu, ReGLU relu. The two pre-activations
and their product are recomputed from x in backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch.activations import act_backward, act_forward, check_activation
from gpuckpt.pytorch.linear import autocast_input, cast, check_weight

__all__ = ["gated_mlp"]


def _hidden(x: Tensor, wg: Tensor, bg: Tensor | None, wu: Tensor, bu: Tensor | None) -> tuple[Tensor, Tensor]:
    return F.linear(x, cast(wg, x), cast(bg, x)), F.linear(x, cast(wu, x), cast(bu, x))


@torch.library.custom_op("gpuckpt::gated_mlp_fwd", mutates_args=())
def gated_mlp_fwd(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    wd: Tensor,
    bd: Tensor | None,
    activation: str,
) -> Tensor:
    """x (M, K), wg and wu (H, K), bg and bu (H,), wd (N, H), bd (N,) -> (M, N) in x's dtype."""
    gate, up = _hidden(x, wg, bg, wu, bu)
    return F.linear(act_forward(activation, gate) * up, cast(wd, x), cast(bd, x))


@gated_mlp_fwd.register_fake
def _(
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    wd: Tensor,
    bd: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape[0], wd.shape[0])


@torch.library.custom_op("gpuckpt::gated_mlp_bwd", mutates_args=())
def gated_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    wd: Tensor,
    bd: Tensor | None,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of x, wg, bg, wu, bu, wd, bd that `needs` asks for, in that order; each in its input's dtype."""
    needs_x, needs_wg, needs_bg, needs_wu, needs_bu, needs_wd, needs_bd = needs
    grads: dict[int, Tensor] = {}
    if any(needs[:6]):
        gate, up = _hidden(x, wg, bg, wu, bu)
        act = act_forward(activation, gate)
        if needs_wd:
            grads[5] = (dy.t() @ (act * up)).to(wd.dtype)
        if any(needs[:5]):
            dh = dy @ cast(wd, x)
            d_up = dh * act
            d_gate = act_backward(activation, dh * up, gate)
            del act, dh, gate, up
            if needs_x:
                grads[0] = (d_gate @ cast(wg, x)).addmm_(d_up, cast(wu, x))
            for index, (need, d, weight) in enumerate(((needs_wg, d_gate, wg), (needs_wu, d_up, wu))):
                if need:
                    grads[1 + 2 * index] = (d.t() @ x).to(weight.dtype)
            for index, (need, d, bias) in enumerate(((needs_bg, d_gate, bg), (needs_bu, d_up, bu))):
                if need:
                    assert bias is not None
                    grads[2 + 2 * index] = d.sum(0, dtype=torch.float32).to(bias.dtype)
    if needs_bd:
        assert bd is not None
        grads[6] = dy.sum(0, dtype=torch.float32).to(bd.dtype)
    return [grads[index] for index in sorted(grads)]


@gated_mlp_bwd.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    wg: Tensor,
    bg: Tensor | None,
    wu: Tensor,
    bu: Tensor | None,
    wd: Tensor,
    bd: Tensor | None,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (x, wg, bg, wu, bu, wd, bd)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need and t is not None]


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.activation = inputs[7]


def _backward(ctx, dy: Tensor):
    needs = list(ctx.needs_input_grad[:7])
    grads = iter(gated_mlp_bwd(dy, *ctx.saved_tensors, ctx.activation, needs) if any(needs) else ())
    return (*(next(grads) if need else None for need in needs), None)


gated_mlp_fwd.register_autograd(_backward, setup_context=_setup)


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
) -> Tensor:
    """(act(x gate^T + b) * (x up^T + b)) down^T + b, keeping only x for backward.

    Args:
        x: (..., K), floating point.
        gate_weight, up_weight: (H, K); gate_bias, up_bias: (H,) or None.
        down_weight: (N, H); down_bias: (N,) or None.
        activation: of the gate: silu (SwiGLU), gelu (GEGLU), relu (ReGLU) or any other that `linear` takes.

    Returns:
        (..., N), in x's dtype (autocast's where that is on).

    Raises:
        DimMismatch: a dimension does not fit.
        ValueError: an unknown activation.
    """
    check_activation(activation)
    check_weight(x, gate_weight, gate_bias, "gate_weight")
    check_weight(x, up_weight, up_bias, "up_weight")
    if up_weight.shape[0] != gate_weight.shape[0]:
        raise DimMismatch(gate_weight.shape[0], up_weight.shape[0], "hidden size of up_weight")
    if down_weight.dim() != 2 or down_weight.shape[1] != gate_weight.shape[0]:
        raise DimMismatch(
            gate_weight.shape[0], down_weight.shape[-1], "last dimension of down_weight (the hidden size)"
        )
    if down_bias is not None and down_bias.shape != down_weight.shape[:1]:
        raise DimMismatch(down_weight.shape[0], down_bias.numel(), "length of down_bias")
    x = autocast_input(x)
    rows = x.reshape(-1, x.shape[-1])
    y = gated_mlp_fwd(rows, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias, activation)
    return y.reshape(*x.shape[:-1], down_weight.shape[0])
