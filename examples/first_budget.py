"""A model trains under a number of bytes: `fit` measures it, plans it and wraps it.

python examples/first_budget.py
"""

import torch
from torch import nn

import gpuckpt


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[block(128) for _ in range(8)], nn.Linear(128, 10))
    x, labels = torch.randn(256, 128), torch.randint(10, (256,))

    # What a plain step would hold, from the chain of its stages.
    chain = gpuckpt.measure(model, x)
    print(chain)
    plain_bytes = sum(chain.footprints)

    fitted = gpuckpt.fit(model, x, budget=plain_bytes // 3)
    print(fitted.plan)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(5):
        loss = nn.functional.cross_entropy(fitted(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}, peak {gpuckpt.format_bytes(fitted.budget.peak_bytes)}")

    assert fitted.budget.peak_bytes <= plain_bytes // 3
    assert fitted.budget.used_bytes == 0
    print(fitted.report())


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.LayerNorm(width))


if __name__ == "__main__":
    main()
