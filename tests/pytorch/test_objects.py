"""Caches, batches, dicts and lists that blocks read and write: a recompute has what forward had, and nobody sees it twice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpuckpt
from gpuckpt.pytorch.engine.arguments import Objects
from tests.pytorch.beside_plain import beside_plain
from tests.pytorch.steps import Layer, gradients

WIDTH = 16


class Keys:
    """A cache of keys, one entry a layer, as Hugging Face's are: opaque to pytree, written by the blocks."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []
        self.seen = 0

    def update(self, key: Tensor) -> Tensor:
        self.layers.append(key)
        self.seen += 1
        return key * self.seen


@dataclass
class Batch:
    x: Tensor
    scale: Tensor
    names: list[str] = field(default_factory=lambda: ["a"])


class WithObject(Layer):
    def forward(self, x: Tensor, cache: Keys) -> Tensor:
        return super().forward(x) + cache.update(x.sin())


class CacheOfTheModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WithObject() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        cache = Keys()
        for layer in self.layers:
            x = layer(x, cache)
        return (x.square() + sum(cache.layers) * cache.seen).mean()


class WithDict(Layer):
    def forward(self, x: Tensor, shared: dict[Any, Any], number: int) -> Tensor:
        if number % 2 == 0:
            shared["key"] = self.up(x)
            shared.pop("other", None)
        else:
            shared["other"] = x.cos()
        return super().forward(x) + self.down(shared["key"])


class DictOfTheModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WithDict() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            x = layer(x, shared, number)
        return x.square().mean() + shared["other"].mean()


class WithList(Layer):
    def forward(self, x: Tensor, states: list[Tensor], weights: list[Tensor]) -> Tensor:
        out = super().forward(x)
        states.append(out.tanh())
        weights[0] = weights[0] * 0.5
        return out + weights[0].sum()


class ListsOfTheModel(nn.Module):
    """Hidden states are collected, and an entry is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WithList() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor] = []
        weights = [x.new_ones(WIDTH)]
        for layer in self.layers:
            x = layer(x, states, weights)
        return torch.stack(states).square().mean() + weights[0].mean()


class OfABatch(nn.Module):
    """Each block is given the whole batch, an instance of a dataclass."""

    class Part(Layer):
        def forward(self, x: Tensor, batch: Batch) -> Tensor:
            assert batch.names == ["a"]
            return super().forward(x) * batch.scale

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Part() for _ in range(6))

    def forward(self, batch: Batch) -> Tensor:
        x = batch.x
        for layer in self.layers:
            x = layer(x, batch)
        return x.square().mean()


def _batch(rows: int = 8) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("share", [None, 0.5, 0.7])
@pytest.mark.parametrize("build", [CacheOfTheModel, DictOfTheModel, ListsOfTheModel, OfABatch])
def test_what_blocks_write(build: type[nn.Module], share: float | None) -> None:
    torch.manual_seed(0)
    given = Batch(_batch(), torch.rand(WIDTH)) if build is OfABatch else _batch()
    beside_plain(build(), given, share=share)


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_an_object_among_the_arguments_of_checkpoint(hold: str) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(WithObject() for _ in range(4))

    def loss(call: Any) -> Tensor:
        cache, x = Keys(), _batch()
        for layer in layers:
            x = call(layer, x, cache)
        assert cache.seen == len(cache.layers) == 4
        return x.square().mean()

    plain = gradients(layers, lambda: loss(lambda layer, *args: layer(*args)))
    budget = gpuckpt.CheckpointBudget("1MiB", device="cpu", hold=hold)
    assert gradients(layers, lambda: loss(gpuckpt.checkpoint)) == plain
    assert gradients(layers, lambda: loss(lambda *args: gpuckpt.checkpoint(*args, budget=budget))) == plain
    assert budget.used_bytes == 0


def test_tensors_inside_of_objects_are_charged_and_freed() -> None:
    layer, cache = WithObject(), Keys()
    cache.layers.append(torch.randn(64, WIDTH))
    budget = gpuckpt.CheckpointBudget("1MiB", device="cpu")
    out = gpuckpt.checkpoint(layer, _batch(), cache, budget=budget)
    assert budget.used_bytes == 64 * WIDTH * 4 + 8 * WIDTH * 4
    out.sum().backward()
    assert budget.used_bytes == 0
    assert len(cache.layers) == 2, "the recompute wrote into the caller's cache"


def test_an_object_that_refers_to_itself_is_one_object() -> None:
    class Ring:
        def __init__(self) -> None:
            self.me, self.weight = self, torch.ones(2)

    ring = Ring()
    objects = Objects([ring, 3, ring])
    (weight,) = objects.tensors
    assert weight is ring.weight
    first, three, second = objects.rebuilt([ring, 3, ring], [torch.zeros(2)])
    assert first is second is first.me is not ring
    assert three == 3
    assert not first.weight.any()
    assert ring.weight.all()


def test_plain_arguments_have_no_objects() -> None:
    assert not Objects([torch.ones(2), 3, "x", nn.Linear(2, 2), torch.Generator(), print, torch.float32, None])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


def test_a_context_that_was_not_there_when_it_was_fitted() -> None:
    """What is saved depends on SDPA's back end: a call in another context is measured for itself."""
    model, x = nn.Sequential(*[Attention() for _ in range(6)]), torch.randn(2, 8, 16)
    fitted = gpuckpt.fit(model, x, 30_000, strict=True)
    first = fitted.plan.certificate.peak_bytes
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(x).sum()
    loss.backward()
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    model(x).sum().backward()
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes == first
    assert not fitted.deviations
