"""`gpuckpt.checkpoint` as a function over its inputs: one and several, chained, nested, vector outputs, hooks on leaves.

The frame itself, its budgets and its failures are tested in test_checkpoint.py and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt


class Counted:
    """A function that counts its calls."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.fn(*args)


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_one_input() -> None:
    square = Counted(lambda x: x * x)
    x = leaf(3.0)
    y = gpuckpt.checkpoint(square, x)
    assert (float(y.detach()), square.calls) == (9.0, 1)
    y.backward()
    assert (float(x.grad), square.calls) == (6.0, 2)


def test_several_inputs() -> None:
    a, b, c = leaf(2.0), leaf(3.0), leaf(5.0)
    y = gpuckpt.checkpoint(lambda a, b, c: a * b + c, a, b, c)
    y.backward()
    assert (float(y.detach()), float(a.grad), float(b.grad), float(c.grad)) == (11.0, 3.0, 2.0, 1.0)


def test_an_input_without_a_gradient_among_others() -> None:
    x, constant = leaf(2.0), torch.tensor([7.0], dtype=torch.float64)
    gpuckpt.checkpoint(lambda x, c: x * x * c, x, constant).backward()
    assert float(x.grad) == 28.0
    assert constant.grad is None


def test_an_input_used_twice() -> None:
    x = leaf(3.0)
    gpuckpt.checkpoint(lambda a, b: a * b * a, x, x).backward()
    assert float(x.grad) == 27.0


def test_chained() -> None:
    first, second, third = Counted(torch.sin), Counted(torch.exp), Counted(lambda x: x * 3)
    x = leaf(0.5)
    y = gpuckpt.checkpoint(third, gpuckpt.checkpoint(second, gpuckpt.checkpoint(first, x)))
    y.backward()
    expected = leaf(0.5)
    (torch.exp(torch.sin(expected)) * 3).backward()
    assert torch.equal(x.grad, expected.grad)
    assert (first.calls, second.calls) == (2, 2)


def test_nested() -> None:
    inner = Counted(lambda x: torch.sin(x) * x)
    x = leaf(0.7)

    def outer(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(gpuckpt.checkpoint(inner, x * 2)) + x

    gpuckpt.checkpoint(outer, x).backward()
    expected = leaf(0.7)
    (torch.exp(torch.sin(expected * 2) * (expected * 2)) + expected).backward()
    assert torch.equal(x.grad, expected.grad)
    # Forward, again for the outer recompute, and again for its own.
    assert inner.calls == 3


def test_a_vector_output() -> None:
    x = leaf(1.0, 2.0, 3.0)
    y = gpuckpt.checkpoint(lambda x: x**3, x)
    assert y.shape == (3,)
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    y.backward(weights)
    assert torch.equal(x.grad, 3 * x.detach() ** 2 * weights)


def test_several_outputs() -> None:
    x = leaf(1.0, 2.0)
    split = Counted(lambda x: (x.sin(), {"double": x * 2, "note": "kept as it is"}))
    s, rest = gpuckpt.checkpoint(split, x)
    assert rest["note"] == "kept as it is"
    (s.sum() + (rest["double"] * s).sum()).backward()
    expected = leaf(1.0, 2.0)
    s, rest = split.fn(expected)
    (s.sum() + (rest["double"] * s).sum()).backward()
    assert torch.equal(x.grad, expected.grad)
    assert split.calls == 2, "one recompute serves all outputs"


def test_hooks_on_leaves_fire_once_with_the_right_gradient() -> None:
    seen: list[tuple[str, torch.Tensor]] = []
    x, w = leaf(2.0, 3.0), torch.nn.Parameter(torch.tensor([5.0, 7.0], dtype=torch.float64))
    x.register_hook(lambda g: seen.append(("x", g.clone())))
    w.register_hook(lambda g: seen.append(("w", g.clone())))
    w.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", p.grad.clone())))

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x * w

    gpuckpt.checkpoint(lambda x: gpuckpt.checkpoint(inner, x).sin().sum(), x).backward()
    cos = torch.cos(torch.tensor([10.0, 21.0], dtype=torch.float64))
    assert sorted(name for name, _ in seen) == ["accumulated", "w", "x"]
    for name, gradient in seen:
        factor = w.detach() if name == "x" else x.detach()
        torch.testing.assert_close(gradient, cos * factor, rtol=1e-12, atol=0)


class Averaging(torch.nn.Module):
    """Writes a buffer and reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 3, dtype=torch.float64)
        self.register_buffer("average", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        self.average.mul_(0.5).add_(y.detach())
        return y * self.average.clone()


def reads_a_global() -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: (x @ MIX).sin()


@pytest.mark.parametrize("make", [Averaging, reads_a_global])
def test_what_is_learned_between_changes_no_recompute_of_a_checkpoint_within(make: Callable[[], Any]) -> None:
    work, plain = make(), make()
    for step in range(4):
        x, y = leaf(1.0, 2.0, step), leaf(1.0, 2.0, step)
        inner = lambda x: gpuckpt.checkpoint(work, x) * 2  # noqa: E731
        gpuckpt.checkpoint(lambda x: gpuckpt.checkpoint(inner, x).sin(), x).sum().backward()  # noqa: B023
        (plain(y) * 2).sin().sum().backward()
        assert torch.equal(x.grad, y.grad)
    if isinstance(work, Averaging):
        assert torch.equal(work.average, plain.average)
        assert torch.equal(work.linear.weight.grad, plain.linear.weight.grad)


class Counting(torch.nn.Module):
    """Registers a count in its first forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "count" not in self._buffers:
            self.register_buffer("count", torch.zeros(()))
        self.count.add_(1)
        return x.sin()


def test_a_buffer_that_forward_registers_is_written_once() -> None:
    model, x = Counting(), leaf(1.0, 2.0)
    for step in range(3):
        gpuckpt.checkpoint(model, x).sum().backward()
        assert model.count.item() == step + 1


def test_no_inputs_raise() -> None:
    with pytest.raises(TypeError, match="at least one input"):
        gpuckpt.checkpoint(lambda: torch.ones(1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    ops=st.lists(st.sampled_from(["sin", "tanh", "exp_small", "square", "mix"]), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 8), max_size=4),
    data=st.data(),
)
def test_random_chains_of_nested_checkpoints_give_the_plain_gradients(
    ops: list[str], cuts: list[int], data: st.DataObject
) -> None:
    table: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "sin": torch.sin,
        "tanh": torch.tanh,
        "exp_small": lambda x: torch.exp(-x * x),
        "square": lambda x: x * x * 0.5,
        "mix": lambda x: x @ MIX,
    }
    functions = [table[op] for op in ops]

    def run(x: torch.Tensor, part: list[Any], depth: int) -> torch.Tensor:
        if len(part) == 1:
            return part[0](x)
        at = cuts[depth % len(cuts)] % (len(part) - 1) + 1 if cuts else 1
        x = gpuckpt.checkpoint(lambda v: run(v, part[:at], depth + 1), x)
        return run(x, part[at:], depth + 1)

    values = data.draw(st.lists(st.floats(-2, 2), min_size=3, max_size=3))
    x, y = leaf(*values), leaf(*values)
    budget = gpuckpt.CheckpointBudget("64KiB", device="cpu")
    with budget:
        out = run(x, functions, 0)
        out.sum().backward()
    plain = y
    for function in functions:
        plain = function(plain)
    plain.sum().backward()
    assert torch.equal(x.grad, y.grad)
    del out
    assert budget.used_bytes == 0


MIX = torch.tensor([[0.5, 0.2, -0.1], [0.3, -0.4, 0.2], [0.1, 0.6, 0.7]], dtype=torch.float64)
