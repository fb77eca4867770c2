"""What the fused operations keep and what they compute: the input and nothing else, and no GEMM that nobody asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gpuckpt import CheckpointBudget, functional
from tests.pytorch.ops.fused import OPS, Counter, gradients

OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


def saved_by(fn) -> list[torch.Tensor]:
    """What autograd saves while fn() runs, parameters left out."""
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fn()
    return [t for t in saved if not isinstance(t, torch.nn.Parameter)]


def with_parameters(op, needs=None, **sizes):
    """x, and the other operands as parameters; needs: which of all of them want a gradient."""
    x, *others = op.draw(**sizes)
    operands = [x, *(torch.nn.Parameter(t.detach()) for t in others)]
    for t, need in zip(operands, needs or [True] * len(operands), strict=True):
        t.requires_grad_(need)
    return operands


@OP
@pytest.mark.parametrize("activation", ["identity", "gelu", "relu"])
def test_saves_its_input_and_nothing_else(op, activation):
    x, *others = with_parameters(op)
    (saved,) = saved_by(lambda: op.run(x, *others, activation=activation))
    assert saved.data_ptr() == x.data_ptr()
    assert saved.untyped_storage().nbytes() == x.nbytes


@OP
def test_a_budget_is_charged_the_input_and_nothing_else(op):
    x, *others = with_parameters(op)
    x = x.detach() * 2  # no leaf: leaves that need gradients count as parameters
    budget = CheckpointBudget(x.nbytes, device="cpu")
    with budget:
        y = op.run(x, *others, activation="gelu")
    assert budget.used_bytes == x.nbytes
    y.sum().backward()
    del y
    assert budget.used_bytes == 0


def test_dropout_saves_its_seed_besides():
    x, w, b = with_parameters(OPS["linear"])
    saved = saved_by(lambda: functional.linear(x, w, b, activation="gelu", dropout=0.5))
    assert sorted(t.nbytes for t in saved) == [8, x.nbytes]


def test_a_frozen_plain_linear_keeps_nothing():
    x, w, b = with_parameters(OPS["linear"], [True, False, False])
    assert saved_by(lambda: functional.linear(x, w, b)) == []
    assert len(saved_by(lambda: functional.linear(x, w, b, activation="gelu"))) == 1
    x, w, b = with_parameters(OPS["linear"], [False, False, True])
    assert saved_by(lambda: functional.linear(x, w, b)) == []


@pytest.mark.parametrize("name", ["mlp", "gated_mlp"])
def test_the_last_bias_alone_needs_no_input(name):
    op = OPS[name]
    operands = with_parameters(op, [False] * (len(op.names) - 1) + [True])
    assert saved_by(lambda: op.run(*operands, activation="gelu")) == []
    (_, db) = gradients(op.run, operands, torch.ones(5, 4, dtype=torch.float64), activation="gelu")
    assert torch.equal(db, torch.full((4,), 5.0, dtype=torch.float64))


def expected_gemms(name: str, needs: tuple[bool, ...], activation: str) -> int:
    """Of a forward and a backward for exactly these gradients."""
    if name == "linear":
        x, w, _ = needs
        return 1 + (activation != "identity" and any(needs)) + x + w
    if name == "mlp":
        x, w1, b1, w2, _ = needs
        first = x or w1 or b1
        return 2 + 2 * first + (w2 and not first) + x + w1 + w2
    x, wg, bg, wu, bu, wd, _ = needs
    first = x or wg or bg or wu or bu
    return 3 + 3 * first + 2 * (wd and not first) + 2 * x + wg + wu + wd


@OP
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_every_subset_of_gradients_costs_its_own_gemms_only(op, activation):
    dy = torch.randn(5, 4, dtype=torch.float64)
    for needs in itertools.product([True, False], repeat=len(op.names)):
        if not any(needs):
            continue
        operands = with_parameters(op, needs)
        plain = gradients(op.plain, operands, dy, activation=activation)
        with Counter() as counter:
            ours = gradients(op.run, operands, dy, activation=activation)
        for got, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(got, expected)
        assert counter.gemms == expected_gemms(op.name, needs, activation), needs


@OP
def test_no_gradients_cost_the_forward_only(op):
    operands = with_parameters(op, [False] * len(op.names))
    with Counter() as counter:
        y = op.run(*operands, activation="gelu")
    assert counter.gemms == expected_gemms(op.name, (False,) * len(op.names), "gelu")
    assert not y.requires_grad
    with torch.no_grad():
        assert saved_by(lambda: op.run(*with_parameters(op), activation="gelu")) == []


def test_gemms_of_a_training_step_beside_plain_and_checkpointed():
    """7 against 6 and 8 for an MLP, 11 against 9 and 12 for a gated one. torch's early stop spares a checkpoint the last GEMM of
    its recompute, where the MLP is the end of what is checkpointed."""
    counts = {}
    for op in OPS.values():
        operands = with_parameters(op)
        dy = torch.ones(5, 4, dtype=torch.float64)

        def checkpointed(*operands, op=op, early_stop):
            return checkpoint(op.plain, *operands, "gelu", use_reentrant=False, early_stop=early_stop)

        found = []
        for fn, options in (
            (op.plain, {"activation": "gelu"}),
            (op.run, {"activation": "gelu"}),
            (checkpointed, {"early_stop": False}),
            (checkpointed, {"early_stop": True}),
        ):
            with Counter() as counter:
                gradients(fn, operands, dy, **options)
            found.append(counter.gemms)
        counts[op.name] = tuple(found)
    assert counts == {"linear": (3, 4, 4, 4), "mlp": (6, 7, 8, 7), "gated_mlp": (9, 11, 12, 11)}
