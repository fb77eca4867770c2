"""Models of every build: stages that are not linked, skips, branches, several outputs. Promise exact, gradients bitwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.pytorch.beside_plain import beside_plain

WIDTH = 16


def feed_forward(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.ff = feed_forward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        for extra in more:
            x = x + extra
        return x + self.dropout(self.ff(x))


class ResidualOutside(nn.Module):
    """x = f(x) + x, written in the model's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([feed_forward(), feed_forward()]) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.layers:
            x = first(x) + x
            x = second(x) + x
        return x.square().mean()


class InADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Block() for i in range(7)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x.square().mean()


class AsAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i in range(7):
            setattr(self, f"layer{i}", Block())

    def forward(self, x: Tensor) -> Tensor:
        for i in range(7):
            x = getattr(self, f"layer{i}")(x)
        return x.square().mean()


class UNet(nn.Module):
    """Skips from the way down to the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block(dropout=0.1) for _ in range(4))
        self.middle = Block()
        self.up = nn.ModuleList(Block(2 * WIDTH) for _ in range(4))
        self.back = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block, back in zip(self.up, self.back, strict=True):
            x = back(block(torch.cat([x, skips.pop()], -1)))
        return x.square().mean()


class EncoderDecoder(nn.Module):
    """Every block of the decoder gets what the encoder made."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.ModuleList(Block() for _ in range(4)) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.encoder:
            x = block(x)
        x = self.norm(x)
        for block in self.decoder:
            y = block(y, x)
        return y.square().mean()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0).square().mean()


class Siamese(nn.Module):
    """One tower, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(*[Block() for _ in range(4)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.tower(x) * self.tower(y)).mean()


class Shared(nn.Module):
    """One block, run again and again, with functional code between."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.sin(self.blocks[0](x)) + x
        return x.square().mean()


class Wrapped(nn.Module):
    """The layers are attributes of a model inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AsAttributes()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.head(x))


class Dense(nn.Module):
    """Every block sees the outputs of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH * (i + 1), WIDTH), nn.Tanh()) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for block in self.blocks:
            seen.append(block(torch.cat(seen, -1)))
        return torch.cat(seen, -1).square().mean()


class SavedSkips(nn.Module):
    """Blocks save what they return, and one further on is given it as well: run again, there are two of it."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            return torch.tanh(self.linear(x if skip is None else x * skip))

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.Part() for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        made: list[Tensor] = []
        for number, part in enumerate(self.parts):
            x = part(x, made[number - 2] if number > 1 else None)
            made.append(x)
        return x.square().mean()


class Weights(nn.Module):
    """What a block returns is a weight of the next one."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(x))))

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.Part() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x.sin()])
        for number, part in enumerate(self.parts):
            x = torch.func.functional_call(part, {"first.weight": x} if number else {}, (x,))
        return x.square().mean()


MODELS = {
    "weights": (Weights, 1),
    "saved skips": (SavedSkips, 1),
    "residual outside": (ResidualOutside, 1),
    "ModuleDict": (InADict, 1),
    "attributes": (AsAttributes, 1),
    "U-Net": (UNet, 1),
    "encoder and decoder": (EncoderDecoder, 2),
    "branches": (Branches, 1),
    "siamese": (Siamese, 2),
    "shared": (Shared, 1),
    "wrapped": (Wrapped, 1),
    "dense": (Dense, 1),
}


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("share", [None, 0.6])
@pytest.mark.parametrize("name", MODELS)
def test_promise_and_gradients(name: str, share: float | None, hold: str) -> None:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    x = [torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(inputs)]
    if share is not None and name in ("dense", "siamese", "saved skips"):
        share = 0.85
    beside_plain(build(), *x, share=share, fit_options={"hold": hold})


LEAST = {
    "residual outside": 0.35,
    "ModuleDict": 0.35,
    "attributes": 0.35,
    "U-Net": 0.55,
    "encoder and decoder": 0.45,
    "branches": 0.35,
    "wrapped": 0.35,
}


@pytest.mark.parametrize("name", LEAST)
def test_the_smallest_budget_is_a_small_share_of_the_plain_peak(name: str) -> None:
    from gpuckpt import fit

    torch.manual_seed(0)
    build, inputs = MODELS[name]
    fitted = fit(build(), tuple(torch.randn(8, WIDTH) for _ in range(inputs)), "16MiB")
    certificate = fitted.plan.certificate
    assert certificate.smallest_budget_bytes <= LEAST[name] * certificate.peak_bytes, (
        certificate.smallest_budget_bytes / certificate.peak_bytes
    )


@pytest.mark.parametrize("strategy", ["sqrt", "every", "greedy"])
@pytest.mark.parametrize("name", MODELS)
def test_frames_over_several_stages(name: str, strategy: str) -> None:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    x = [torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(inputs)]
    beside_plain(build(), *x, budget=1 << 24, fit_options={"strategy": strategy})
