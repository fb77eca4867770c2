"""Tensors of other kinds than most: of inference mode, quantised, sparse, nested, computed weights, and inside of objects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import CheckpointBudget, checkpoint, fit
from gpuckpt.pytorch.engine.subclasses import parts_of
from gpuckpt.pytorch.fitted import Fitted
from tests.pytorch.steps import HOLDS, Layer, batch, bits

ROWS = 8


def constant() -> Tensor:
    with torch.inference_mode():
        return torch.linspace(0, 1, 16)


class WithConstant(Layer):
    def forward(self, x: Tensor, constant: Tensor) -> Tensor:
        return super().forward(x) * 2 + constant


class WithInferenceBuffer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", constant())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.constant


class WithSparseBuffer(Layer):
    """The graph is a buffer, and of no kind that has a storage."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(ROWS).roll(1, 0).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sparse.mm(self.graph, x))


class Stack(nn.Module):
    """Layers that are all given the same further arguments."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(build() for _ in range(6))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *more)
        return x


@dataclass
class Carrier:
    """What blocks hand on is inside of an object, which torch's pytree does not know."""

    x: Tensor


class WithCarrier(Layer):
    def forward(self, carrier: Carrier) -> Carrier:  # type: ignore[override]
        return Carrier(super().forward(carrier.x))


class Carried(Stack):
    def __init__(self) -> None:
        super().__init__(WithCarrier)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        carrier = Carrier(x)
        for layer in self.layers:
            carrier = layer(carrier)
        return carrier.x


def jagged() -> Tensor:
    return torch.nested.nested_tensor([batch(3), batch(5)], layout=torch.jagged)


def step(model: nn.Module, *args: Any) -> list[bytes | None]:
    model.zero_grad(set_to_none=True)
    out = model(*args)
    loss = (out.values() if out.layout is torch.jagged else out).square().sum()
    loss.backward()
    return bits([loss, *(p.grad for p in model.parameters())])


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "an argument of inference mode": lambda: (Stack(WithConstant), (batch(), constant())),
    "a buffer of inference mode": lambda: (Stack(WithInferenceBuffer), (batch(),)),
    "a sparse buffer": lambda: (Stack(WithSparseBuffer), (batch(),)),
    "a nested batch": lambda: (Stack(Layer), (jagged(),)),
    "tensors in objects": lambda: (Carried(), (batch(),)),
}


def in_the_smallest_budget(model: nn.Module, args: tuple, **options: Any) -> Fitted:
    probe = fit(model, args, "16MiB", **options)
    smallest = probe.plan.certificate.smallest_budget_bytes
    probe.unfit()
    return fit(model, args, smallest, **options)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("options", [{}, {"verify": "bitwise"}, {"host_budget": "16MiB"}], ids=["", "verify", "host"])
@pytest.mark.parametrize("name", MODELS)
def test_fitted(name: str, options: dict[str, Any], hold: str) -> None:
    model, args = MODELS[name]()
    expected = step(model, *args)
    fitted = in_the_smallest_budget(model, args, hold=hold, strict=True, **options)
    for _ in range(2):
        assert step(model, *args) == expected
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
        assert fitted.budget.used_bytes == 0


class AsManyRows(nn.Module):
    """Goes on with as many rows as a sparse matrix has entries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Stack(Layer)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        return self.layers(x[: which._nnz()])


def jagged_batches() -> list[tuple[Tensor, ...]]:
    of = [(3, 5), (4, 4), (2, 9, 1), (7,), (3, 3, 3), (20, 1)]
    return [(torch.nested.nested_tensor([batch(rows) for rows in lengths], layout=torch.jagged),) for lengths in of]


def sparse_batches(layout: torch.layout) -> list[tuple[Tensor, ...]]:
    found = []
    for count in (4, 9, 2, 12, 7):
        dense = torch.zeros(16, 16)
        dense[:count, 0] = 1
        found.append((batch(16), dense.to_sparse(layout=layout)))
    return found


BATCHES = {
    "jagged": (lambda: Stack(Layer), jagged_batches),
    "sparse": (AsManyRows, lambda: sparse_batches(torch.sparse_coo)),
    "sparse rows": (AsManyRows, lambda: sparse_batches(torch.sparse_csr)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_other_lengths_that_no_outer_shape_tells(name: str) -> None:
    make, batches = BATCHES[name]
    torch.manual_seed(0)
    model, (first, *others) = make(), batches()
    plain = copy.deepcopy(model)
    fitted = fit(model, max((first, *others), key=lambda args: parts_of(args[-1])[0].numel()), "60%")
    promises = set()
    for args in (first, *others, first):
        assert step(model, *args) == step(plain, *args)
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
        promises.add(fitted.promised_peak_bytes)
    assert len(promises) > 2
    assert not fitted.deviations


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_batch_of_strided_layout_is_refused() -> None:
    nested = torch.nested.nested_tensor([batch(3), batch(5)])
    with pytest.raises(TypeError, match=r"nested tensor of strided layout, .* layout=torch.jagged"):
        fit(model := Stack(Layer), nested, "1MiB")
    model(nested)


ARGUMENTS: dict[str, Callable[[], Tensor]] = {
    "of inference mode": constant,
    "quantised": lambda: torch.quantize_per_tensor(torch.linspace(0, 1, 16), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.linspace(0, 1, 16).to_sparse(),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_checkpoint(name: str, hold: str) -> None:
    def work(x: Tensor, other: Tensor) -> Tensor:
        dense = other.dequantize() if other.is_quantized else other.to_dense() if other.is_sparse else other
        return (x * (dense + 0)).sin().exp()

    x, other = batch().requires_grad_(), ARGUMENTS[name]()
    (expected,) = torch.autograd.grad(work(x, other).sum(), x)
    with CheckpointBudget("1MiB", device="cpu", hold=hold) as budget:
        loss = checkpoint(work, x, other, verify="bitwise").sum()
    (got,) = torch.autograd.grad(loss, x)
    assert torch.equal(got, expected)
    assert budget.used_bytes == 0


@pytest.mark.parametrize("before", [False, True])
def test_an_argument_that_is_frozen_or_trained_between_forward_and_backward(before: bool) -> None:
    layer, x = Layer(), batch().requires_grad_(before)
    layer(x).sum().backward()
    expected = bits(p.grad for p in layer.parameters())
    layer.zero_grad(set_to_none=True)
    loss = checkpoint(layer, x).sum()
    x.requires_grad_(not before)
    loss.backward()
    assert bits(p.grad for p in layer.parameters()) == expected
    assert x.requires_grad != before


@pytest.mark.parametrize("hold", HOLDS)
def test_weights_that_are_computed_are_part_of_the_plan(hold: str) -> None:
    """functional_call with weights that are no leaves (adapters, hypernetworks, MAML): autograd saves them, budgets hold them."""
    model, x = Stack(Layer), batch()
    plain = copy.deepcopy(model)
    fitted = fit(model, x, "1MiB", hold=hold, strict=True, strategy="sqrt")
    found = []
    for one in (model, plain):
        scale = torch.tensor(1.5, requires_grad=True)
        for _ in range(3):
            weights = {name: p.detach() * scale for name, p in one.named_parameters()}
            torch.func.functional_call(one, weights, (x,)).square().sum().backward()
            del weights
        found.append(scale.grad)
    assert torch.equal(*found)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert fitted.budget.used_bytes == 0


def test_an_interrupted_backward_leaves_nothing_for_the_next_step() -> None:
    model, x = Stack(Layer), batch()
    expected = step(model, x)
    fitted = in_the_smallest_budget(model, (x,), strict=True)

    def interrupt(_: Tensor) -> None:
        handle.remove()
        raise KeyboardInterrupt

    handle = model.layers[2].up.weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x).square().sum().backward()
    for _ in range(2):
        assert step(model, x) == expected
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def test_a_block_of_two_models_is_fitted_in_one_of_them() -> None:
    first = nn.Sequential(*[Layer() for _ in range(4)])
    second, x = nn.Sequential(*first, Layer()), batch()
    expected = step(second, x)
    fitted = fit(first, x, "1MiB")
    with pytest.raises(ValueError, match="part of another model that is fitted"):
        fit(second, x, "1MiB")
    assert fitted.active
    assert step(second, x) == expected
    fitted.unfit()
    fit(second, x, "1MiB", strategy="sqrt")
    assert step(second, x) == expected
