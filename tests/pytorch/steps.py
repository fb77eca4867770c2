"""What the tests of checkpoints and budgets share: small models, and gradients compared bit by bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

HOLDS = ("account", "pool")


class Tally:
    """Counts what really runs: checkpoints put back the state that they find in Python's objects, and do not look in here."""

    def __init__(self) -> None:
        self._number = ctypes.c_long(0)

    @property
    def count(self) -> int:
        return self._number.value

    @count.setter
    def count(self, value: int) -> None:
        self._number.value = value


class Block(nn.Module):
    """x + w2 gelu(w1 norm(x)), with dropout: (B, D) -> (B, D)."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.tally = Tally()

    def forward(self, x: Tensor) -> Tensor:
        self.tally.count += 1
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Layer(nn.Module):
    """x + w2 tanh(w1 x): (B, D) -> (B, D)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def blocks(count: int, width: int = 16, dropout: float = 0.0) -> nn.ModuleList:
    """The same `count` blocks every time."""
    torch.manual_seed(count)
    return nn.ModuleList(Block(width, dropout) for _ in range(count))


def batch(rows: int = 8, width: int = 16) -> Tensor:
    """The same input every time; no leaf that requires a gradient, so a budget charges it."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(7))


def bits(tensors: Iterable[Tensor | None]) -> list[bytes | None]:
    """The bytes of tensors, for comparison bit by bit."""
    return [None if t is None else _bytes(t.detach()) for t in tensors]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def gradients(model: nn.Module, loss_of: Callable[[], Tensor], seed: int = 3) -> tuple[list[bytes | None], ...]:
    """The bits of the loss and of every parameter's gradient after one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = loss_of()
    loss.backward()
    return bits([loss]), bits(p.grad for p in model.parameters())


def run(model: Iterable[nn.Module], x: Tensor, call: Callable[..., Any] | None = None) -> Tensor:
    """The loss of blocks in a row, each called by `call(block, x)` if given."""
    for block in model:
        x = block(x) if call is None else call(block, x)
    return x.square().sum()
