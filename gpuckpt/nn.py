"""Modules over `gpuckpt.functional`: drop-in replacements that keep their input for backward and nothing else.

Where one of a module's projections is not a plain `nn.Linear` (replaced by LoRA or a quantised layer, hooked, parametrised,
compiled by itself), the module calls its projections one after the other, as the layer it replaces would: the same values,
and autograd keeps what it keeps there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpuckpt.pytorch.ops._activations import FUNCTIONS, check_activation
from gpuckpt.pytorch.ops._dropout import check_dropout
from gpuckpt.pytorch.ops._projections import is_plain
from gpuckpt.pytorch.ops.gated_mlp import gated_mlp
from gpuckpt.pytorch.ops.linear import linear
from gpuckpt.pytorch.ops.mlp import mlp

__all__ = ["FusedLinear", "FusedMLP", "GatedMLP"]


class FusedLinear(nn.Linear):
    """`nn.Linear` followed by an activation and, in training, dropout, in one pass; parameters are named and initialised as
    `nn.Linear`'s.

    Shapes: (..., in_features) -> (..., out_features), and a residual of that shape, added last.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "identity",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation)
        check_dropout(dropout)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return linear(x, self.weight, self.bias, activation=self.activation, residual=residual, dropout=dropout)

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return f"{super().extra_repr()}, activation={self.activation}{dropout}"


class FusedMLP(nn.Module):
    """Two linear layers with an activation between them; keeps its input only.

    Shapes: (..., in_features) -> (..., out_features). Parameters: `fc1.weight` (hidden, in), `fc1.bias`, `fc2.weight`
    (out, hidden), `fc2.bias`, as in the MLPs of GPT-style models.
    `chunk_rows`: rows whose hidden values exist at a time, see `mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        activation: str = "gelu",
        chunk_rows: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.chunk_rows = chunk_rows
        self.fc1 = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.fc2 = nn.Linear(
            hidden_features, in_features if out_features is None else out_features, bias, device, dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        if not is_plain(self.fc1, self.fc2):
            return self.fc2(FUNCTIONS[self.activation](self.fc1(x)))
        return mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            activation=self.activation,
            chunk_rows=self.chunk_rows,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class GatedMLP(nn.Module):
    """The gated MLP of Llama-style models (SwiGLU, GEGLU, ReGLU); keeps its input only.

    Shapes: (..., in_features) -> (..., out_features). Parameters: `gate_proj.weight`, `up_proj.weight` (hidden, in) and
    `down_proj.weight` (out, hidden), so that a Llama MLP's weights load unchanged. `gate_multiplier` scales the gate before its
    activation and `down_multiplier` the output, as in Falcon-H1.
    `chunk_rows`: rows whose hidden values exist at a time, see `mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        activation: str = "silu",
        gate_multiplier: float = 1.0,
        down_multiplier: float = 1.0,
        chunk_rows: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.gate_multiplier = gate_multiplier
        self.down_multiplier = down_multiplier
        self.chunk_rows = chunk_rows
        self.gate_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = nn.Linear(
            hidden_features, in_features if out_features is None else out_features, bias, device, dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not is_plain(gate, up, down):
            z = gate(x) if self.gate_multiplier == 1.0 else gate(x) * self.gate_multiplier
            y = down(FUNCTIONS[self.activation](z) * up(x))
            return y if self.down_multiplier == 1.0 else y * self.down_multiplier
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
            chunk_rows=self.chunk_rows,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
