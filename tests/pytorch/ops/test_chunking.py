"""Chunks of rows: the scratch of a backward is what its formula says, the bits do not depend on when, and sums are exact."""

from __future__ import annotations

import pytest
import torch

from gpuckpt import CheckpointBudget, functional
from gpuckpt.errors import BudgetExceeded, DimMismatch
from gpuckpt.pytorch.ops._chunking import LEAST_ROWS, choose_chunk_rows
from tests.pytorch.ops.fused import ALL_OPS, OPS, LiveBytes, assert_as_good_as_torch, gradients

OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
FORMULAS = {
    "linear": functional.linear_scratch_bytes,
    "mlp": functional.mlp_scratch_bytes,
    "gated_mlp": functional.gated_mlp_scratch_bytes,
}
M, K, H, N = 600, 24, 40, 32


def backward_scratch(op, operands, dy, **options) -> int:
    """Peak of what a backward holds beside the gradients that it returns."""
    wanted = [t for t in operands if t is not None and t.requires_grad]
    y = op.run(*operands, activation="gelu", **options)
    with LiveBytes() as live:
        found = torch.autograd.grad(y, wanted, dy)
    assert live.live_bytes == sum(t.nbytes for t in found)
    return live.peak_bytes - live.live_bytes


@OP
@pytest.mark.parametrize("chunk_rows", [None, 600, 599, 300, 128, 7, 1])
def test_scratch_of_backward_is_the_formula_to_the_byte(op, chunk_rows):
    operands = op.draw(M, K, H, N, dtype=torch.float32)
    dy = torch.randn(M, N)
    promised = FORMULAS[op.name](*operands, chunk_rows or M)
    assert backward_scratch(op, operands, dy, chunk_rows=chunk_rows) == promised


@OP
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")], ids="-".join
)
@pytest.mark.parametrize("chunk_rows", [None, 300, 16])
def test_scratch_in_16_bits_is_within_the_formula(op, dtypes, chunk_rows):
    kind, parameters = (getattr(torch, name) for name in dtypes)
    operands = op.draw(M, K, H, N, dtype=parameters)
    operands[0] = operands[0].detach().to(kind).requires_grad_()
    promised = FORMULAS[op.name](*operands, chunk_rows or M)
    measured = backward_scratch(op, operands, torch.randn(M, N).to(kind), chunk_rows=chunk_rows)
    # The formula counts every gradient beside the sum that it is made from; at the peak some of both may not exist yet.
    assert promised - 2 * sum(t.nbytes for t in operands[1:]) <= measured <= promised


@OP
def test_scratch_of_forward_is_less(op):
    operands = op.draw(M, K, H, N, dtype=torch.float32)
    for chunk_rows in (None, 100):
        with torch.no_grad(), LiveBytes() as live:
            y = op.run(*operands, activation="gelu", chunk_rows=chunk_rows)
        assert live.peak_bytes - y.nbytes <= FORMULAS[op.name](*operands, chunk_rows or M)


@OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scratch_bytes_is_kept_and_used(op, dtype):
    operands = op.draw(M, K, H, N, dtype=dtype)
    dy = torch.randn(M, N).to(dtype)
    formula = FORMULAS[op.name]
    for scratch_bytes in (
        formula(*operands, M),
        formula(*operands, M) - 1,
        formula(*operands, 200),
        formula(*operands, 1),
    ):
        measured = backward_scratch(op, operands, dy, scratch_bytes=scratch_bytes)
        assert measured <= scratch_bytes
    with pytest.raises(BudgetExceeded, match="the scratch of one row is the least"):
        backward_scratch(op, operands, dy, scratch_bytes=min(formula(*operands, 1), formula(*operands, M)) - 1)


def test_a_plain_linear_needs_no_scratch():
    x, w, b = OPS["linear"].draw(M, K, H, N, dtype=torch.float32)
    y = functional.linear(x, w, b)
    dy = torch.randn(M, N)
    with LiveBytes() as live:
        found = torch.autograd.grad(y, (x, w, b), dy)
    assert live.peak_bytes == sum(t.nbytes for t in found)
    assert functional.linear_scratch_bytes(x, w, b, M, plain=True) == 0


@OP
def test_a_budget_sets_the_chunk(op):
    """Scratch stays below the cap of the budget that is entered, and is the same whenever it is asked for."""
    operands = op.draw(M, K, H, N, dtype=torch.float32)
    dy = torch.randn(M, N)
    cap_bytes = FORMULAS[op.name](*operands, 300)
    assert FORMULAS[op.name](*operands, LEAST_ROWS) < cap_bytes < FORMULAS[op.name](*operands, M)
    by_hand = gradients(op.run, operands, dy, activation="gelu", chunk_rows=256)
    budget = CheckpointBudget(max(cap_bytes, operands[0].nbytes), device="cpu")
    found = []
    for taken in (0, budget.max_bytes):
        budget.allocate(taken)
        with budget:
            y = op.run(*operands, activation="gelu")
        budget.free(taken)
        with LiveBytes() as live:
            grads = torch.autograd.grad(y, operands, dy)
        assert live.peak_bytes - sum(t.nbytes for t in grads) <= budget.max_bytes
        found.append([y.detach(), *grads])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    if budget.max_bytes == cap_bytes:
        assert all(torch.equal(a, b) for a, b in zip(by_hand, found[0], strict=True))


@OP
def test_a_tiny_budget_still_gets_whole_tiles(op):
    operands = op.draw(M, K, H, N, dtype=torch.float32)
    dy = torch.randn(M, N)
    y = op.run(*operands, activation="gelu", chunk_rows=LEAST_ROWS)
    expected = torch.autograd.grad(y, operands, dy)
    with CheckpointBudget(0, device="cpu"):
        y = op.run(*operands, activation="gelu")  # all operands are leaves: nothing is charged
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y, operands, dy), expected, strict=True))


@OP
@pytest.mark.parametrize("chunk_rows", [1, 100, 599, 10_000])
def test_chunks_do_not_change_the_result(op, chunk_rows):
    operands = op.draw(M, K, H, N, dtype=torch.float64)
    dy = torch.randn(M, N, dtype=torch.float64)
    whole, chunked = (gradients(op.run, operands, dy, activation="silu", chunk_rows=c) for c in (None, chunk_rows))
    for got, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(got, expected)


@OP
def test_many_16_bit_chunks_lose_nothing(op):
    """16-bit sums of 300 chunks would be off by far more than torch's own error."""
    operands = op.draw(M, K, H, N, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in operands]
    dy = torch.randn(M, N).bfloat16()
    truth = gradients(op.plain, exact, dy.double(), activation="gelu")
    torchs = gradients(op.plain, operands, dy, activation="gelu")
    assert_as_good_as_torch(gradients(op.run, operands, dy, activation="gelu", chunk_rows=2), truth, torchs)


@pytest.mark.parametrize("op", ALL_OPS.values(), ids=lambda op: op.name)
@pytest.mark.parametrize("chunk_rows", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_takes_the_gradients_of_weights(op, chunk_rows, dtype):
    operands = op.draw(M, K, H, N, dtype=dtype)
    dy = torch.randn_like(op.run(*operands, activation="gelu"))
    exact = [t.detach().double().requires_grad_() for t in operands]
    _, *truth = gradients(op.plain, exact, dy.double(), activation="gelu")
    _, *torchs = gradients(op.plain, operands, dy, activation="gelu")
    weights = [i for i, name in enumerate(op.names) if name.startswith("w")]
    for i in weights:
        operands[i].main_grad = torch.full(operands[i].shape, 0.5)
    for _ in range(2):
        op.run(*operands, activation="gelu", chunk_rows=chunk_rows).backward(dy)
    for i, t in enumerate(operands):
        if i in weights:
            assert t.grad is None
            assert t.main_grad.dtype == torch.float32
            got = t.main_grad.sub(0.5).div(2).to(dtype)
        else:
            got = t.grad / 2
        assert_as_good_as_torch([got], [truth[i]], [torchs[i]])


def test_main_grad_of_a_frozen_weight_is_left_alone_and_a_wrong_one_refused():
    x, w, b = OPS["linear"].draw(dtype=torch.float32)
    w.requires_grad_(False)
    w.main_grad = torch.zeros(4, 7)
    functional.linear(x, w, b, activation="gelu").sum().backward()
    assert not w.main_grad.any()
    w.requires_grad_(True)
    w.main_grad = torch.zeros(7, 4)
    with pytest.raises(DimMismatch, match="main_grad"):
        functional.linear(x, w, b)


def test_scratch_with_main_grad_is_the_formula():
    for op in OPS.values():
        operands = op.draw(M, K, H, N, dtype=torch.float32)
        mains = []
        for name, t in zip(op.names, operands, strict=True):
            if name.startswith("w"):
                t.main_grad = torch.zeros_like(t)
                mains.append(t.main_grad)
        found = {"main": mains[0]} if op.name == "linear" else {"mains": mains}
        y = op.run(*operands, activation="gelu", chunk_rows=100)
        wanted = [t for t in operands if not hasattr(t, "main_grad")]
        dy = torch.randn(M, N)
        with LiveBytes() as live:
            y.backward(dy, inputs=operands)
        outputs = sum(t.nbytes for t in wanted)
        assert live.peak_bytes - outputs <= FORMULAS[op.name](*operands, 100, **found)


@pytest.mark.parametrize(
    ("rows", "least", "most", "expected"),
    [
        (1000, None, None, 1000),
        (1000, 30, None, 30),
        (10, 30, None, 10),
        (0, None, None, 1),
        (0, 5, 50, 1),
        (1000, None, 10_000, 1000),
        (1000, None, 9_999, 896),  # whole tiles
        (1000, None, 1_270, 127),
        (1000, None, 10, 1),
        (1000, 128, 10, 128),
        (100, 128, 10, 100),
        (1000, 128, 5_000, 384),
    ],
)
def test_the_chunk_follows_from_the_limits(rows, least, most, expected):
    assert choose_chunk_rows(rows, lambda chunk: 10 * chunk, least, most) == expected
