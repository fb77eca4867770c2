"""Checkpoint by hand inside a budget: the blocks to recompute are yours to choose, the cap is enforced.

python examples/by_hand.py
"""

import torch
from torch import nn

import gpuckpt


def main() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)) for _ in range(6))
    x = torch.randn(128, 64, requires_grad=True)

    def run(recomputed: set[int]) -> torch.Tensor:
        h = x
        for number, block in enumerate(blocks):
            h = gpuckpt.checkpoint(block, h) if number in recomputed else block(h)
        return h.square().mean()

    plain = torch.autograd.grad(run(set()), [x, *blocks.parameters()])

    for recomputed in (set(), {0, 1, 2}, set(range(6))):
        budget = gpuckpt.CheckpointBudget("8MiB", device="cpu")
        with budget:
            gradients = torch.autograd.grad(run(recomputed), [x, *blocks.parameters()])
        assert all(map(torch.equal, gradients, plain)), "gradients are bitwise those of the plain run"
        print(f"{len(recomputed)} of 6 blocks recomputed: peak {gpuckpt.format_bytes(budget.peak_bytes)}")

    # Too small a budget refuses, by name and with the bytes that would have done; nothing stays held.
    tight = gpuckpt.CheckpointBudget("64KiB", device="cpu")
    try:
        with tight:
            run(set())
    except gpuckpt.BudgetExceeded as error:
        print(f"refused: {error}")
    assert tight.used_bytes == 0


if __name__ == "__main__":
    main()
