"""A model whose blocks save in different ways and share an argument: what plans of every shape are run on."""

from __future__ import annotations

import torch
from torch import nn

from tests.pytorch.steps import Tally

COUNT = 7


class Block(nn.Module):
    """Blocks of three kinds: one that saves its output, one that does not, one that saves much; all get `gain`."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.2)
        self.tally = Tally()

    def forward(self, x, gain):
        self.tally.count += 1
        x = self.dropout(self.linear(x) * gain)
        if self.kind == 0:
            return torch.tanh(x)
        if self.kind == 1:
            return x + 1
        return torch.cat([x, x.exp(), x.sin()]).unflatten(0, (3, -1)).mean(0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i % 3) for i in range(COUNT))
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x, gain = x.sigmoid(), self.gain.exp()
        for block in self.blocks:
            x = block(x, gain)
        return x.square().sum()
