"""What a stage has saved whose result is dropped in forward goes with it: the promise says so."""

from __future__ import annotations

from collections import deque
from functools import partial

import pytest
from torch import Tensor, nn

from tests.pytorch.beside_plain import beside_plain
from tests.pytorch.profiling.test_what_is_held import WIDTH, Block, rows


class Wide(Block):
    """Two results, of which later code may want only one."""

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x, *more)
        return y, y.tanh()


class Tower(nn.Module):
    """Layers before a model, of which one is read that is not the last, as LLaVA reads a vision tower's."""

    def __init__(self, take, block=Block) -> None:
        super().__init__()
        self.tower = nn.ModuleList(block() for _ in range(5))
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.take, self.project = take, nn.Linear(WIDTH, WIDTH)

    def layers(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for block in self.tower:
            y = block(found[-1])
            found.append(y if isinstance(y, Tensor) else y[0])
        return found

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.take(self.layers(x)))
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("share", [None, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Tower(lambda found: found[-2]),
        lambda: Tower(lambda found: found[2]),
        lambda: Tower(lambda found: found[0] + found[-3].detach()),
        lambda: Tower(lambda found: found[-2], Wide),
    ],
    ids=["the last but one", "the second", "none", "two results"],
)
def test_layers_whose_result_nobody_reads(make, share: float | None, hold: str) -> None:
    model = make()
    # Of two results one is dropped at each layer: what it alone has saved is promised for until that layer's backward.
    exact = not isinstance(model.tower[0], Wide)
    fitted = beside_plain(model, rows(), share=share, fit_options={"hold": hold}, exact=exact)
    names = [stage.name.partition(".")[0] for stage in fitted.chain.stages if stage.dropped_in is not None]
    assert names
    assert set(names) == {"tower"}


class AuxiliaryLoss(Tower):
    """The last layer's result is dropped, and a loss that it has left beside it is not."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + sum(block.loss for block in self.tower)


class Leaves(Block):
    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        y = super().forward(x, *more)
        self.loss = y.square().mean()
        return y


@pytest.mark.parametrize("share", [None, 0.4, 0.7])
def test_a_dropped_result_that_has_left_a_loss_is_needed(share: float | None) -> None:
    fitted = beside_plain(AuxiliaryLoss(lambda found: found[-2], Leaves), rows(), share=share)
    assert all(stage.dropped_in is None for stage in fitted.chain.stages)


class Hooked(Tower):
    """What is read was kept by a hook on the layer, not handed on by the code that calls it (as in Hugging Face's models)."""

    def __init__(self) -> None:
        super().__init__(lambda found: found[-1])
        self.collected = deque[Tensor](maxlen=1)
        self.tower[-2].register_forward_hook(partial(collect, self.collected))

    def layers(self, x: Tensor) -> list[Tensor]:
        super().layers(x)
        return [self.collected.pop()]


def collect(into: deque[Tensor], module: nn.Module, args: tuple, out: Tensor) -> None:
    into.append(out)


@pytest.mark.parametrize("share", [None, 0.4, 0.7])
def test_a_layer_that_a_hook_reads_is_recomputed_like_others(share: float | None) -> None:
    fitted = beside_plain(Hooked(), rows(), share=share)
    assert all(stage.recomputable for stage in fitted.chain.stages if stage.name.startswith("tower."))
