"""Frames: what is run again, what is held meanwhile, and what ends a recompute."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import gpuckpt
from gpuckpt import Chain, CheckpointBudget, Keep, Recompute, Stage, simulate
from gpuckpt.planning.tree import parse_tree
from tests.pytorch.steps import HOLDS, bits

SIZES = (300, 500, 200, 700, 400, 600)  # elements each stage puts out

SHAPES = (
    "(0 1 2) (3 4 5)",
    "0 (1 2 3 4) 5",
    "((0 1) (2 3)) (4 5)",
    "(0 (1 (2 (3 (4 5)))))",
    "(((((0) 1) 2) 3) 4) 5",
    "(0 1 (2 3) 4) (5)",
    "((0 1 2) (3 4 5))",
    "(0 (1 2) 3 (4)) 5",
)


class _Stage(torch.autograd.Function):
    """Puts out `size` elements that depend on all of its input, and saves its output and a copy of it."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int) -> Tensor:
        y = (x.sum() + torch.arange(size, dtype=x.dtype)).sin()
        ctx.save_for_backward(y, y.clone())
        ctx.size = x.numel()
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, copy = ctx.saved_tensors
        return (grad * (y + copy)).sum().expand(ctx.size), None


def _chain() -> Chain:
    """The same stages for the planner. Storage 0 is the chain's input; stage i saves 2i+1, its output, and 2i+2."""
    before = [0, *(2 * i + 1 for i in range(5))]
    stages = [
        Stage(f"s{i}", 1.0, 1.0, saves=(2 * i + 1, 2 * i + 2), inputs=(before[i],), output=(2 * i + 1,))
        for i in range(6)
    ]
    return Chain(tuple(stages), (4 * 100, *(4 * n for n in SIZES for _ in range(2))))


def _run(node: Keep | Recompute, x: Tensor, budget: CheckpointBudget, calls: list[int]) -> Tensor:
    if isinstance(node, Keep):
        calls[node.stage] += 1
        return _Stage.apply(x, SIZES[node.stage])

    def children(x: Tensor) -> Tensor:
        for child in node.children:
            x = _run(child, x, budget, calls)
        return x

    return gpuckpt.checkpoint(children, x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hold", HOLDS)
def test_nested_frames_do_what_the_simulator_says(shape, hold):
    tree = parse_tree(shape)
    promised = simulate(_chain(), tree)
    budget = CheckpointBudget(promised.peak_bytes, device="cpu", hold=hold)
    start = torch.linspace(0, 1, 100, dtype=torch.float32).requires_grad_()

    def gradient(run) -> Tensor:
        y = run(start * 2)
        return torch.autograd.grad(y, start, torch.ones_like(y))[0]

    def plain(x: Tensor) -> Tensor:
        for size in SIZES:
            x = _Stage.apply(x, size)
        return x

    expected = gradient(plain)
    calls = [0] * 6

    def planned(x: Tensor) -> Tensor:
        with budget:
            for node in tree:
                x = _run(node, x, budget, calls)
        return x

    got = gradient(planned)
    assert bits([got]) == bits([expected])
    assert tuple(calls) == promised.forward_counts
    assert budget.peak_bytes == promised.peak_bytes
    assert budget.used_bytes == 0

    budget = CheckpointBudget(promised.peak_bytes - 1, device="cpu", hold=hold)
    with pytest.raises(gpuckpt.BudgetExceeded):  # one byte less, and the same run does not pass
        gradient(planned)
    assert budget.used_bytes == 0


def test_the_books_follow_the_trace_of_the_simulator():
    """Not only the peak: after every step the same bytes are held."""
    tree = parse_tree("0 (1 2 (3 4)) 5")
    promised = [held for _, held in simulate(_chain(), tree).trace]
    budget = CheckpointBudget("1MiB", device="cpu")
    x = torch.linspace(0, 1, 100).requires_grad_() * 2
    with budget:
        for node in tree:
            x = _run(node, x, budget, [0] * 6)
    x.sum().backward()
    seen = iter([event.used_bytes for event in budget.events()])
    assert all(any(held == now for now in seen) for held in _changes(promised))


def _changes(values):
    return [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


def test_a_recompute_stops_after_the_last_tensor_that_is_waited_for():
    ran: list[str] = []

    def fn(x):
        h = x.sin()
        ran.append("sin")
        h = h.exp()
        ran.append("exp")
        return h

    x = torch.ones(3, requires_grad=True)
    out = gpuckpt.checkpoint(fn, x * 2, budget=CheckpointBudget("1MiB", device="cpu"))
    ran.clear()
    out.sum().backward()
    assert ran == ["sin"], "exp's output is its last saved tensor, so nothing after it is run"


def test_an_inner_checkpoint_inherits_the_budget_of_the_outer_one():
    budget = CheckpointBudget("1MiB", device="cpu")
    x = torch.ones(100, requires_grad=True)

    def inner(h):
        return h.sin().exp().cos()

    def outer(h):
        return gpuckpt.checkpoint(inner, h * 2)

    out = gpuckpt.checkpoint(outer, x * 2, budget=budget)
    assert budget.used_bytes == 400
    out.sum().backward()
    # The outer input; the inner one, which sin saves as well; and exp's output, which cos saves as well.
    assert budget.peak_bytes == 3 * 400
    assert budget.used_bytes == 0


def test_nested_budgets_hold_what_was_saved_in_each():
    outer, inner = (CheckpointBudget("1MiB", device="cpu") for _ in range(2))
    x = torch.ones(100, requires_grad=True)
    with outer:
        h = (x * 2).sin()
        with inner:
            h = gpuckpt.checkpoint(lambda h: h.exp().cos(), h)
        h = h.sin()
    assert (outer.used_bytes, inner.used_bytes) == (800, 400)
    h.sum().backward()
    assert (outer.used_bytes, inner.used_bytes) == (0, 0)
    assert inner.peak_bytes == 400 * 2  # its input, and exp's output, which cos saves as well
    assert gpuckpt.pytorch.engine.hooks.current_budget() is None


@pytest.mark.parametrize("hold", HOLDS)
def test_a_retained_backward_needs_no_more_than_a_plain_one(hold):
    def peak(retain: bool) -> int:
        budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
        with budget:
            h = torch.ones(100, requires_grad=True) * 2
            for _ in range(6):
                h = gpuckpt.checkpoint(lambda h: h.sin().exp().cos(), h)
        h.sum().backward(retain_graph=retain)
        return budget.peak_bytes

    assert peak(True) == peak(False)


@pytest.mark.parametrize("hold", HOLDS)
def test_a_backward_that_wants_an_early_tensor_gets_by_with_room_for_it(hold):
    """Of a frame with two branches, the shorter one's backward runs first; recomputing for the other as well would not fit."""

    def fn(h):
        short = h.sin()
        for _ in range(10):
            h = h.exp().tanh()
        return short.exp(), h

    def gradients_under(budget):
        x = torch.linspace(0, 1, 100).requires_grad_()
        short, long = gpuckpt.checkpoint(fn, x * 2, budget=budget)
        (first,) = torch.autograd.grad(short.sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(long.sum(), x)
        return bits([first, second])

    expected = gradients_under(CheckpointBudget("1MiB", device="cpu"))
    budget = CheckpointBudget(4 * 400, device="cpu", hold=hold, over_cap=["recompute"])
    assert gradients_under(budget) == expected
    assert budget.used_bytes == 0
    refusing = CheckpointBudget(4 * 400, device="cpu", hold=hold)
    with pytest.raises(gpuckpt.BudgetExceeded):
        gradients_under(refusing)


@pytest.mark.parametrize("hold", HOLDS)
def test_backward_on_another_thread(hold):
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    x = torch.linspace(0, 1, 100).requires_grad_()

    def fn(h):
        return gpuckpt.checkpoint(lambda h: h.exp().cos(), h.sin())

    (expected,) = torch.autograd.grad((x * 2).sin().exp().cos().sum(), x)
    with budget:
        loss = gpuckpt.checkpoint(fn, x * 2).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert bits([x.grad]) == bits([expected])
    del loss
    assert budget.used_bytes == 0


@pytest.mark.parametrize("hold", HOLDS)
def test_one_graph_and_several_threads(hold):
    """Backward of one retained graph on four threads at once: every one gets the gradients."""
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    x = torch.linspace(0, 1, 100).requires_grad_()
    with budget:
        h = x * 2
        for _ in range(5):
            h = gpuckpt.checkpoint(lambda h: h.sin().exp().cos(), h)
        loss = h.sum()
    held = budget.used_bytes
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    results: list[object] = []

    def work(loss: Tensor) -> None:
        try:
            for _ in range(20):
                results.append(bits(torch.autograd.grad(loss, x, retain_graph=True)))
        except BaseException as error:  # handed to the test's own thread
            results.append(error)

    threads = [threading.Thread(target=work, args=(loss,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [bits([expected])] * 80
    assert budget.used_bytes == held
    del loss, h, thread, threads
    assert budget.used_bytes == 0


def test_looking_at_a_nodes_saved_tensor_gives_it_and_keeps_nothing():
    budget = CheckpointBudget("1MiB", device="cpu")
    x = torch.ones(100, requires_grad=True)
    out = gpuckpt.checkpoint(lambda h: h.sin().exp(), x * 2, budget=budget)
    seen = out.grad_fn._saved_result
    assert torch.equal(seen, (x * 2).sin().exp())
    assert budget.used_bytes == 400
    out.sum().backward()
    assert budget.used_bytes == 0


def test_frames_keep_to_the_order_of_a_chain_of_many():
    """500 frames in a row and 60 inside one another: no recursion limit, no growth."""
    budget = CheckpointBudget("64KiB", device="cpu")
    x = torch.linspace(0, 1, 4).requires_grad_()

    def nest(h, depth):
        return h.sin() if depth == 0 else gpuckpt.checkpoint(nest, h.sin(), depth - 1)

    with budget:
        h = x * 2
        for _ in range(500):
            h = gpuckpt.checkpoint(torch.sin, h)
        h = nest(h, 60)
    h.sum().backward()
    expected = x.detach() * 2
    y = expected.requires_grad_()
    for _ in range(561):
        y = y.sin()
    (grad,) = torch.autograd.grad(y.sum(), expected)
    assert torch.equal(x.grad, grad * 2)
    assert budget.used_bytes == 0
