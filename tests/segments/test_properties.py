"""For random chains every class gives the gradients of the plain chain, and all books return to zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuckpt import CheckpointBudget, MemoryUsageTracker
from gpuckpt.segments import (
    ActivationCheckpointer,
    Chained,
    CheckpointConfig,
    CheckpointedLayer,
    CheckpointedNetwork,
    CheckpointedPipeline,
    CheckpointStrategy,
    Dense,
    SegmentCheckpointer,
    vjp_checkpoint,
)
from gpuckpt.segments.pointwise import POINTWISE

RELATIVE_ERROR = 1e-10


def network(layers: list[Dense], n: int, x: Any, grad: Any, books: Any) -> tuple[Any, Any]:
    strategy = [
        CheckpointStrategy.every(),
        CheckpointStrategy.sqrt(),
        CheckpointStrategy.none(),
        CheckpointStrategy.every_nth(n),
    ][n % 4]
    net = CheckpointedNetwork(layers, budget=books[0], strategy=strategy)
    return net.forward(x), net.backward(grad)


def pipeline(layers: list[Dense], n: int, x: Any, grad: Any, books: Any) -> tuple[Any, Any]:
    pipe = CheckpointedPipeline(layers, budget=books[0])
    return pipe.forward(x), pipe.backward(grad)


def layer_by_layer(layers: list[Dense], n: int, x: Any, grad: Any, books: Any) -> tuple[Any, Any]:
    wrapped = [CheckpointedLayer(layer, books[1], budget=books[0]) for layer in layers]
    for layer in wrapped:
        x = layer.forward(x)
    for layer in reversed(wrapped):
        grad = layer.backward(None, grad)
    return x, grad


def segments(layers: list[Dense], n: int, x: Any, grad: Any, books: Any) -> tuple[Any, Any]:
    checkpointer = SegmentCheckpointer(layers, n, books[1], books[0])
    return checkpointer.forward(x), checkpointer.backward(grad)


def layer_function(layers: list[Dense], n: int, x: Any, grad: Any, books: Any) -> tuple[Any, Any]:
    names = [f"layer {k}" for k in range(len(layers))]
    table = dict(zip(names, layers, strict=True))
    checkpointer = ActivationCheckpointer(CheckpointConfig(n, max_checkpoints=1 + n % 3), books[0])

    def forward(name: str, value: Any) -> Any:
        return table[name].forward(value)

    def backward(name: str, value: Any, g: Any) -> Any:
        return table[name].backward(value, g)

    y = checkpointer.checkpointed_forward(x, names, forward)
    return y, checkpointer.checkpointed_backward(grad, names, forward, backward)


def functional(layers: list[Dense], n: int, x: Any, grad: Any, books: Any) -> tuple[Any, Any]:
    cut = max(1, min(n, len(layers)))
    parts: list[Any] = [Chained(layers[:cut], books[0])]
    if layers[cut:]:
        parts.append(Chained([Chained(layers[cut:], books[0])], books[0]))
    y, pullback = vjp_checkpoint(Chained(parts, books[0]), x, budget=books[0])
    return y, pullback(grad)


@pytest.mark.parametrize("run", [network, pipeline, layer_by_layer, segments, layer_function, functional])
@pytest.mark.parametrize("library", ["numpy", "torch"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_gradients_are_those_of_the_plain_chain(
    run: Callable[..., tuple[Any, Any]], library: str, data: st.DataObject
) -> None:
    widths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=10), label="widths")
    kinds = data.draw(
        st.lists(st.sampled_from(sorted(POINTWISE)), min_size=len(widths) - 1, max_size=len(widths) - 1), label="kinds"
    )
    batch = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]), label="batch")
    n = data.draw(st.integers(0, 6), label="n")
    hold: Any = data.draw(st.sampled_from(["account", "pool"]), label="hold")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed"))
    x, grad = rng.standard_normal((*batch, widths[0])), rng.standard_normal((*batch, widths[-1]))

    def as_library(array: np.ndarray) -> Any:
        return array if library == "numpy" else torch.from_numpy(array)

    layers = [
        Dense(widths[k], widths[k + 1], kind, seed=k, like=as_library(np.zeros(1))) for k, kind in enumerate(kinds)
    ]
    # The reference is torch's autograd on the same weights: it shares nothing with ours.
    tx = torch.tensor(x, requires_grad=True)
    weights = [[torch.tensor(np.asarray(p), requires_grad=True) for p in layer.params] for layer in layers]
    ty = tx
    for kind, (w, b) in zip(kinds, weights, strict=True):
        ty = AUTOGRAD[kind](ty @ w.T + b)
    ty.backward(torch.tensor(grad))

    budget, tracker = CheckpointBudget(1 << 20, device="cpu", hold=hold), MemoryUsageTracker()
    y, dx = run(layers, n, as_library(x), as_library(grad), (budget, tracker))

    close(y, ty.detach())
    close(dx, tx.grad)
    for layer, params in zip(layers, weights, strict=True):
        for ours, theirs in zip(layer.gradients, params, strict=True):
            close(ours, theirs.grad)
    assert budget.used_bytes == 0
    assert tracker.stored_activation_bytes == 0


AUTOGRAD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "relu2": lambda z: torch.relu(z) ** 2,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def close(ours: Any, theirs: Any) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= RELATIVE_ERROR * np.linalg.norm(theirs)
