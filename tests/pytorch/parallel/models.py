"""Models for several ranks, and what is compared with the plain run of the same wrapped model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import gpuckpt

WIDTH = 32
ROWS = 16


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, hidden: int = 64) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Tower(nn.Module):
    """A stem, blocks in a row, a head: returns its loss."""

    def __init__(self, blocks: int = 6, unused: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(hidden=48 if i % 2 else 64) for i in range(blocks))
        self.head = nn.Linear(WIDTH, 1)
        if unused:
            self.extra = nn.Linear(WIDTH, 1)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def tower(**options: Any) -> Tower:
    torch.manual_seed(0)
    return Tower(**options)


def batch(rank: int, rows: int = ROWS) -> torch.Tensor:
    """Other numbers on every rank."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(100 + rank))


def budget_between(model: Callable[[], nn.Module], example: Any, share: float = 0.3) -> int:
    """Bytes between the smallest budget and keeping all, of the model that `model()` makes."""
    certificate = gpuckpt.fit(model(), example, 1 << 40).plan.certificate
    least = certificate.smallest_budget_bytes
    return least + int(share * (certificate.peak_bytes - least))


def train(model: nn.Module, *batches: torch.Tensor, steps: int = 3) -> list[torch.Tensor]:
    """Losses of each step, and the gradients of the last: SGD on batches in turn."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses + [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, as a plain one."""
    held: Any = getattr(tensor, "_local_tensor", tensor)
    return held.detach().clone()


def same(found: list[torch.Tensor], plain: list[torch.Tensor]) -> bool:
    return len(found) == len(plain) and all(map(torch.equal, found, plain))
