"""`fit(stages=[...])`: the user says which modules are the stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import InvalidChain, fit, fitted
from tests.pytorch.beside_plain import beside_plain
from tests.pytorch.steps import Block


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(Block(16), Block(16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = Encoder(), Encoder()
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(x)) + x)


def rows() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def names(*stages: str) -> list[str]:
    chain = fit(Model(), rows(), "1MiB", repeats=1, stages=stages).chain
    return [stage.name for stage in chain.stages if stage.recomputable]


LAYERS = [f"{tower}.layers.{n}" for tower in ("encoder", "decoder") for n in range(3)]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (("encoder", "decoder"), ["encoder", "decoder"]),
        (("encoder.*", "decoder.*"), LAYERS),
        (("*.layers.?",), LAYERS),
        (("encoder.layers.*.1", "decoder"), [*(f"encoder.layers.{n}.1" for n in range(3)), "decoder"]),
        (("*coder", "head"), ["encoder", "decoder", "head"]),
        (("*",), ["encoder", "decoder", "head"]),
    ],
)
def test_the_outermost_that_match(stages: tuple[str, ...], expected: list[str]) -> None:
    assert names(*stages) == expected


@pytest.mark.parametrize("stages", [["encoder", "decoder"], ["*.layers.?", "head"], ["decoder.layers.*.0", "encoder"]])
@pytest.mark.parametrize("share", [None, 0.9])
def test_the_promise_holds(stages: list[str], share: float | None) -> None:
    fitted_ = beside_plain(Model(), rows(), share=share, fit_options={"stages": stages})
    assert not fitted_.deviations


@pytest.mark.parametrize(
    ("stages", "error", "words"),
    [
        (
            ["encodr.*"],
            ValueError,
            r"stages names 'encodr.\*', and no module of Model is called so; there are 'encoder'",
        ),
        (["encoder", "tail"], ValueError, "stages names 'tail'"),
        (["head"], InvalidChain, "found no chain of stages"),
        ("encoder.*", TypeError, r"expected patterns of modules' names, such as \['encoder.layers.\*'\]"),
        ([1], TypeError, "expected patterns"),
    ],
)
def test_what_is_refused(stages: object, error: type[Exception], words: str) -> None:
    model = Model()
    with pytest.raises(error, match=words):
        fit(model, rows(), "1MiB", stages=stages)
    assert fitted(model) is None
