"""Modules over `gpuckpt.functional`: drop-in replacements that keep their input for backward and nothing else.

    import gpuckpt.nn as gnn

Where one of a module's projections is not a plain `nn.Linear` (replaced by LoRA or a quantised layer, hooked, parametrised,
compiled by itself), the module calls its projections one after the other, as the layer it replaces would: the same values,
and autograd keeps what it keeps there.

A module with `norm="rms"` or `"layer"` has an `nn.RMSNorm` or `nn.LayerNorm` over its input as `norm`, and keeps the raw input.

Every constructor reads: widths, bias, activation, then options by name. `FusedLinear` has `dropout`, as `linear` does; `mlp` and
`gated_mlp` have none: put an `nn.Dropout` behind `FusedMLP` and `GatedMLP`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gpuckpt.checks import check_choice, check_flag, check_int, check_number, shown
from gpuckpt.pytorch.ops._activations import FUNCTIONS, check_activation, gate_activation
from gpuckpt.pytorch.ops._dropout import check_dropout
from gpuckpt.pytorch.ops._projections import is_plain, normed
from gpuckpt.pytorch.ops.gated_mlp import gated_mlp
from gpuckpt.pytorch.ops.linear import linear
from gpuckpt.pytorch.ops.mlp import mlp
from gpuckpt.pytorch.ops.norm import KINDS

__all__ = ["FusedLinear", "FusedMLP", "GatedMLP"]

_WIDEST = 2**31 - 1

Device = torch.device | str | None


def _check(
    widths: dict[str, int],
    bias: bool,
    norm: str | None,
    norm_eps: float,
    chunk_rows: int | None,
    dtype: torch.dtype | None,
    **factors: float,
) -> None:
    for name, width in widths.items():
        check_int(width, name, 0, _WIDEST)
    check_flag(bias, "bias")
    check_choice(norm, "norm", (*KINDS, None))
    check_number(norm_eps, "norm_eps")
    if chunk_rows is not None:
        check_int(chunk_rows, "chunk_rows", 1)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {shown(dtype)}; expected a floating-point dtype of torch, or None")
    for name, factor in factors.items():
        check_number(factor, name, -math.inf)


def _norm(kind: str | None, width: int, eps: float, device: Device, dtype: torch.dtype | None) -> nn.Module | None:
    if kind is None:
        return None
    return (nn.RMSNorm if kind == "rms" else nn.LayerNorm)(width, eps, device=device, dtype=dtype)


class FusedLinear(nn.Linear):
    """`nn.Linear` followed by an activation and, in training, dropout, in one pass.

    Parameters are named and initialised as `nn.Linear`'s. Adapters that add to the output of this module, as LoRA does, add
    behind the activation: use them where `activation` is "identity".

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        activation, dropout, chunk_rows: as in `gpuckpt.functional.linear`; nothing is dropped in `eval()`.
        norm: "rms" or "layer", applied to the input, with norm_eps; None for none.

    Shapes: (..., in_features) -> (..., out_features), and a residual of that shape, added last.

    Raises `TypeError` or `ValueError`, which name the argument, for what is of the wrong kind, an unknown activation or norm, and
    a dropout outside 0 to 1.

    >>> layer = FusedLinear(8, 16, activation="gelu", dropout=0.1, norm="rms")
    >>> layer(torch.ones(2, 8)).shape
    torch.Size([2, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "identity",
        *,
        dropout: float = 0.0,
        norm: str | None = None,
        norm_eps: float = 1e-5,
        chunk_rows: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check({"in_features": in_features, "out_features": out_features}, bias, norm, norm_eps, chunk_rows, dtype)
        check_activation(activation)
        check_dropout(dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.dropout = dropout
        self.chunk_rows = chunk_rows
        self.norm = _norm(norm, in_features, norm_eps, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x, norm = normed(x, self.norm)
        return linear(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            residual=residual,
            dropout=self.dropout if self.training else 0.0,
            norm=norm,
            chunk_rows=self.chunk_rows,
        )

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"{super().extra_repr()}, activation={self.activation}{dropout}"


class FusedMLP(nn.Module):
    """Two linear layers with an activation between them; keeps its input only.

    Parameters: `fc1.weight` (hidden, in), `fc1.bias`, `fc2.weight` (out, hidden), `fc2.bias`, as in the MLPs of GPT-style models.

    Args:
        in_features, hidden_features, out_features: out_features is in_features where it is None.
        bias, device, dtype: of both layers, as in `nn.Linear`.
        activation, chunk_rows: as in `gpuckpt.functional.mlp`; chunk_rows are the rows whose hidden values exist at a time.
        norm: "rms" or "layer", applied to the input, with norm_eps; None for none.

    Shapes: (..., in_features) -> (..., out_features).

    Raises `TypeError` or `ValueError`, which name the argument, for what is of the wrong kind and an unknown activation or norm.

    >>> FusedMLP(8, 32, activation="gelu_tanh")(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        activation: str = "gelu",
        *,
        norm: str | None = None,
        norm_eps: float = 1e-5,
        chunk_rows: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        widths = {"in_features": in_features, "hidden_features": hidden_features, "out_features": out_features}
        _check(widths, bias, norm, norm_eps, chunk_rows, dtype)
        check_activation(activation)
        self.activation = activation
        self.chunk_rows = chunk_rows
        self.norm = _norm(norm, in_features, norm_eps, device, dtype)
        self.fc1 = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not is_plain(self.fc1, self.fc2):
            x = x if self.norm is None else self.norm(x)
            return self.fc2(FUNCTIONS[self.activation](self.fc1(x)))
        x, norm = normed(x, self.norm)
        return mlp(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            norm=norm,
            chunk_rows=self.chunk_rows,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class GatedMLP(nn.Module):
    """The gated MLP of Llama-style models (SwiGLU, GEGLU, ReGLU); keeps its input only.

    Parameters: `gate_proj.weight`, `up_proj.weight` (hidden, in) and `down_proj.weight` (out, hidden), so that a Llama MLP's
    weights load unchanged.

    Args:
        in_features, hidden_features, out_features: out_features is in_features where it is None.
        bias, device, dtype: of all three layers, as in `nn.Linear`.
        activation: of the gate ("silu"), or the form's name ("swiglu", "geglu", ...), as in `gpuckpt.functional.gated_mlp`.
        gate_multiplier, down_multiplier: factors of the gate before its activation and of the output, as in Falcon-H1.
        chunk_rows: rows whose hidden values exist at a time; None for all.
        norm: "rms" or "layer", applied to the input, with norm_eps; None for none.

    Shapes: (..., in_features) -> (..., out_features).

    Raises `TypeError` or `ValueError`, which name the argument, for what is of the wrong kind and an unknown activation or norm.

    >>> GatedMLP(8, 24, activation="swiglu", norm="rms")(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        activation: str = "silu",
        *,
        gate_multiplier: float = 1.0,
        down_multiplier: float = 1.0,
        norm: str | None = None,
        norm_eps: float = 1e-5,
        chunk_rows: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        widths = {"in_features": in_features, "hidden_features": hidden_features, "out_features": out_features}
        factors = {"gate_multiplier": gate_multiplier, "down_multiplier": down_multiplier}
        _check(widths, bias, norm, norm_eps, chunk_rows, dtype, **factors)
        self.activation = gate_activation(activation)
        self.gate_multiplier = gate_multiplier
        self.down_multiplier = down_multiplier
        self.chunk_rows = chunk_rows
        self.norm = _norm(norm, in_features, norm_eps, device, dtype)
        self.gate_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_features, out_features, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not is_plain(gate, up, down):
            x = x if self.norm is None else self.norm(x)
            z = gate(x) if self.gate_multiplier == 1.0 else gate(x) * self.gate_multiplier
            y = down(FUNCTIONS[gate_activation(self.activation)](z) * up(x))
            return y if self.down_multiplier == 1.0 else y * self.down_multiplier
        x, norm = normed(x, self.norm)
        return gated_mlp(
            x,
            gate.weight,
            up.weight,
            down.weight,
            gate.bias,
            up.bias,
            down.bias,
            activation=self.activation,
            gate_multiplier=self.gate_multiplier,
            down_multiplier=self.down_multiplier,
            norm=norm,
            chunk_rows=self.chunk_rows,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
