"""`vjp_checkpoint` and `Chained`: a function and its inputs, without an autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetExceeded, EmptySegments, NotCheckpointed
from gpuckpt.segments import Chained, Dense, Recomputable, vjp_checkpoint


class Product:
    """Two inputs, elementwise."""

    def forward(self, a: Any, b: Any) -> Any:
        return a * b

    def backward(self, a: Any, b: Any, grad: Any) -> tuple[Any, Any]:
        return grad * b, grad * a


class Sum:
    """A vector to a number."""

    def forward(self, x: Any) -> Any:
        return x.sum()

    def backward(self, x: Any, grad: Any) -> Any:
        return x * 0 + grad


def dense(lib: Any, count: int) -> list[Dense]:
    return [Dense(3, 3, "tanh", seed=k, like=lib.array([0.0], "float64")) for k in range(count)]


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_one_input(lib: Any, hold: str) -> None:
    budget = CheckpointBudget(1000, device="cpu", hold=hold)
    layer, twin = dense(lib, 1)[0], dense(lib, 1)[0]
    x, grad = lib.array([1.0, 2.0, 3.0], "float64"), lib.array([1.0, 0.0, -1.0], "float64")
    y, pullback = vjp_checkpoint(layer, x, budget=budget)
    assert budget.used_bytes == 24
    np.testing.assert_array_equal(lib.numpy(y), lib.numpy(twin.forward(x)))
    np.testing.assert_array_equal(lib.numpy(pullback(grad)), lib.numpy(twin.backward(x, grad)))
    np.testing.assert_array_equal(lib.numpy(layer.gradients[0]), lib.numpy(twin.gradients[0]))
    assert budget.used_bytes == 0
    with pytest.raises(NotCheckpointed):
        pullback(grad)


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_several_inputs(lib: Any, hold: str) -> None:
    budget = CheckpointBudget(1000, device="cpu", hold=hold)
    a, b = lib.array([1.0, 2.0]), lib.array([3.0, 5.0])
    y, pullback = vjp_checkpoint(Product(), a, b, budget=budget)
    assert budget.used_bytes == 16
    da, db = pullback(lib.array([1.0, 10.0]))
    np.testing.assert_array_equal(lib.numpy(y), [3, 10])
    np.testing.assert_array_equal(lib.numpy(da), [3, 50])
    np.testing.assert_array_equal(lib.numpy(db), [1, 20])
    assert budget.used_bytes == 0


def test_a_scalar_output_and_chained_pullbacks(lib: Any) -> None:
    layer = dense(lib, 1)[0]
    x = lib.array([0.5, 0.25, -1.0], "float64")
    h, pull_h = vjp_checkpoint(layer, x)
    total, pull_total = vjp_checkpoint(Sum(), h)
    dx = pull_h(pull_total(lib.array(1.0, "float64")))
    step = 1e-6
    for k in range(3):
        shifted = np.asarray([0.5, 0.25, -1.0])
        shifted[k] += step
        slope = (lib.numpy(layer.forward(lib.array(shifted, "float64"))).sum() - float(total)) / step
        assert float(dx[k]) == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_nesting_recomputes_inside_recomputes(lib: Any, counting: Any, plain_gradients: Any, hold: str) -> None:
    budget = CheckpointBudget(1000, device="cpu", hold=hold)
    steps = [counting(layer) for layer in dense(lib, 6)]
    nested = Chained([Chained(steps[:3], budget), Chained(steps[3:5], budget), steps[5]], budget)
    assert isinstance(nested, Recomputable)
    x, grad = lib.array([[0.1, -0.2, 0.3]], "float64"), lib.array([[1.0, 2.0, 3.0]], "float64")
    y, pullback = vjp_checkpoint(nested, x, budget=budget)
    assert budget.used_bytes == 24, "the input alone"
    dx = pullback(grad)
    expected_y, expected = plain_gradients(dense(lib, 6), x, grad)
    np.testing.assert_array_equal(lib.numpy(y), lib.numpy(expected_y))
    np.testing.assert_array_equal(lib.numpy(dx), lib.numpy(expected))
    # Once forward; once to get the outer inputs (not the last step); once inside each inner chain (not its last step).
    assert [s.forwards for s in steps] == [3, 3, 2, 3, 2, 1]
    assert [s.backwards for s in steps] == [1] * 6
    assert budget.used_bytes == 0


def test_misuse_is_named(lib: Any) -> None:
    with pytest.raises(ValueError, match="at least one input"):
        vjp_checkpoint(Product())
    with pytest.raises(TypeError, match="the step is a object without backward"):
        vjp_checkpoint(object(), lib.array([1.0]))
    with pytest.raises(EmptySegments):
        Chained([])


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_failures_leave_nothing_behind(lib: Any, hold: str) -> None:
    class Broken(Product):
        def forward(self, a: Any, b: Any) -> Any:
            raise RuntimeError("broken")

    class BrokenBackward(Product):
        def backward(self, a: Any, b: Any, grad: Any) -> Any:
            raise RuntimeError("broken")

    budget = CheckpointBudget(12, device="cpu", hold=hold)
    a, b = lib.array([1.0]), lib.array([2.0])
    with pytest.raises(BudgetExceeded):
        vjp_checkpoint(Product(), a, lib.array([1.0, 2.0, 3.0]), budget=budget)
    assert budget.used_bytes == 0
    with pytest.raises(RuntimeError, match="broken"):
        vjp_checkpoint(Broken(), a, b, budget=budget)
    assert budget.used_bytes == 0
    _, pullback = vjp_checkpoint(BrokenBackward(), a, b, budget=budget)
    with pytest.raises(RuntimeError, match="broken"):
        pullback(lib.array([1.0]))
    assert budget.used_bytes == 0
