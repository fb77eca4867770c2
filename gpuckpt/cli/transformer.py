"""The model of `gpuckpt train`: a decoder-only transformer over bytes, with the fused MLPs.

Shapes: B batch, T context, D width, V = 256 byte values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpuckpt.nn import FusedMLP, GatedMLP
from gpuckpt.pytorch.ops._activations import ACTIVATIONS, GATED

__all__ = ["VOCABULARY", "Config", "Transformer"]

VOCABULARY = 256


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `width` must be divisible by `heads`."""

    layers: int = 12
    width: int = 128
    heads: int = 4
    context: int = 128
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.activation not in (*ACTIVATIONS, *GATED):
            raise ValueError(f"--activation {self.activation!r}: expected one of {', '.join((*ACTIVATIONS, *GATED))}")
        for name in ("layers", "width", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: expected at least 1")
        if self.width % self.heads:
            raise ValueError(
                f"--width {self.width} is not divisible by --heads {self.heads}; choose a multiple of {self.heads}"
            )


class Attention(nn.Module):
    """Causal self-attention: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        gate = GATED.get(config.activation)
        self.mlp: nn.Module = (
            FusedMLP(config.width, 4 * config.width, activation=config.activation)
            if gate is None
            else GatedMLP(config.width, 8 * config.width // 3, activation=gate)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Bytes (B, T) and the bytes that follow them (B, T) -> the mean cross entropy in nats."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(VOCABULARY, config.width)
        self.place = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
