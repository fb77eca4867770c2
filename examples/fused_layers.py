"""Fused layers keep their input only: an MLP and a gated MLP against the same in plain modules.

python examples/fused_layers.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpuckpt
from gpuckpt import nn as gnn


class PlainGated(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd saves in one forward: held by a budget that has room for all of it."""
    with gpuckpt.CheckpointBudget("1GiB", device="cpu") as budget:
        model(x).sum().backward()
    return budget.peak_bytes


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 128)
    pairs = {
        "MLP": (
            nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)),
            gnn.FusedMLP(128, 512, activation="gelu"),
        ),
        "gated MLP": (PlainGated(128, 512), gnn.GatedMLP(128, 512)),
    }
    for name, (plain, fused) in pairs.items():
        there, here = saved_bytes(plain, x), saved_bytes(fused, x)
        assert here < there
        print(f"{name}: plain modules save {gpuckpt.format_bytes(there)}, fused {gpuckpt.format_bytes(here)}")


if __name__ == "__main__":
    main()
