"""The first half of a gated MLP, forward and backward, for the rows of one chunk on either back end; see `gated`.

Shapes: C rows of a chunk; x (C, K), wg and wu (H, K), bg and bu (H,), wd (N, H), dy (C, N), h, dz_g, dz_u and buffers (C, H).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpuckpt.backend import load_kernels, multiply_by_triton
from gpuckpt.pytorch.ops._activations import activate_, differentiate, finish, keep_
from gpuckpt.pytorch.ops._operands import as_if_cast
from gpuckpt.pytorch.ops._rows import affine_into
from gpuckpt.pytorch.ops._weight_grads import BiasGrad, WeightGrad, sum_rows

__all__ = ["GatedForm", "Pair", "backward_buffers", "forward_buffers", "gradients_of", "hidden_of"]


class GatedForm(NamedTuple):
    """What is computed besides the GEMMs."""

    activation: str
    gate_multiplier: float
    down_multiplier: float


class Pair(NamedTuple):
    """The first half's weights and biases, in x's dtype."""

    wg: Tensor
    bg: Tensor | None
    wu: Tensor
    bu: Tensor | None


def forward_buffers(x: Tensor) -> int:
    """Buffers (C, H) that `hidden_of` works in."""
    return 1 if multiply_by_triton(x) else 2


def backward_buffers(x: Tensor, needs_h: bool) -> int:
    """Buffers (C, H) that `gradients_of` works in."""
    return 2 + needs_h if multiply_by_triton(x) else 3


def partials_bytes(x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, chunk: int) -> int:
    """What the backward kernel needs for one sum over rows; nothing where torch adds them up."""
    if not multiply_by_triton(x):
        return 0
    load_kernels(x)
    from gpuckpt.kernels import gated as kernel

    return 4 * math.prod(kernel.db_partials_shape(x[:chunk], *(as_if_cast(w, x) for w in (wg, wu, wd))))


def hidden_of(buffers: Sequence[Tensor], x: Tensor, pair: Pair, form: GatedForm) -> Tensor:
    """h = act(mg (x wg^T + bg)) * (x wu^T + bu), in the first buffer."""
    h = buffers[0]
    if multiply_by_triton(x):
        load_kernels(x)
        from gpuckpt.kernels import gated as kernel

        kernel.gated_fwd(x, *pair, h, activation=form.activation, gate_multiplier=form.gate_multiplier)
        return h
    return activate_(form.activation, _gate_into(h, x, pair, form)).mul_(affine_into(buffers[1], x, pair.wu, pair.bu))


def gradients_of(
    buffers: Sequence[Tensor],
    dy: Tensor,
    x: Tensor,
    pair: Pair,
    wd: Tensor,
    form: GatedForm,
    dwd: WeightGrad | None,
    db_g: BiasGrad | None,
    db_u: BiasGrad | None,
) -> tuple[Tensor, Tensor]:
    """dz_g and dz_u for dy, the gradient of h wd^T; h is computed on the way, and what this chunk adds to dWd and to
    the two biases' gradients is added where those are given."""
    if multiply_by_triton(x):
        return _gradients_by_kernel(buffers, dy, x, pair, wd, form, dwd, db_g, db_u)
    gate, up, spare = buffers
    kept = keep_(form.activation, _gate_into(gate, x, pair, form))
    affine_into(up, x, pair.wu, pair.bu)
    if dwd is not None:
        dwd.add(dy, finish(form.activation, kept, spare).mul_(up))
    dh = torch.mm(dy, wd, out=spare)
    dz_g = differentiate(form.activation, up.mul_(dh), kept, up)
    if form.gate_multiplier != 1.0:
        dz_g.mul_(form.gate_multiplier)
    # The activation a second time, in place: cheaper than a fourth buffer.
    dz_u = finish(form.activation, kept, kept).mul_(dh)
    for db, dz in ((db_g, dz_g), (db_u, dz_u)):
        if db is not None:
            db.add(sum_rows(dz))
    return dz_g, dz_u


def _gradients_by_kernel(
    buffers: Sequence[Tensor],
    dy: Tensor,
    x: Tensor,
    pair: Pair,
    wd: Tensor,
    form: GatedForm,
    dwd: WeightGrad | None,
    db_g: BiasGrad | None,
    db_u: BiasGrad | None,
) -> tuple[Tensor, Tensor]:
    load_kernels(x)
    from gpuckpt.kernels import gated as kernel

    dz_g, dz_u = buffers[:2]
    h = None if dwd is None else buffers[2]
    shape = kernel.db_partials_shape(x, pair.wg, pair.wu, wd)
    partials = [None if db is None else torch.empty(shape, dtype=torch.float32, device=x.device) for db in (db_g, db_u)]
    kernel.gated_recompute_bwd(
        x,
        *pair,
        dy,
        wd,
        h,
        dz_g,
        dz_u,
        *partials,
        activation=form.activation,
        gate_multiplier=form.gate_multiplier,
    )
    if dwd is not None:
        assert h is not None
        dwd.add(dy, h)
    for db, partial in zip((db_g, db_u), partials, strict=True):
        if db is not None and partial is not None:
            db.add(partial.sum(0))
    return dz_g, dz_u


def _gate_into(out: Tensor, x: Tensor, pair: Pair, form: GatedForm) -> Tensor:
    gate = affine_into(out, x, pair.wg, pair.bg)
    return gate if form.gate_multiplier == 1.0 else gate.mul_(form.gate_multiplier)
