"""`Checkpoint`, `CheckpointedActivation`, `CheckpointedNetwork` and `CheckpointedPipeline`, with and without a budget."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetExceeded, DimMismatch, EmptyPipeline, EmptySegments, NotCheckpointed
from gpuckpt.segments import (
    Checkpoint,
    CheckpointedActivation,
    CheckpointedNetwork,
    CheckpointedPipeline,
    CheckpointStrategy,
    Dense,
    LinearSegment,
)

HOLDS = ("account", "pool")


def chain(lib: Any, dims: list[int], dtype: str = "float64") -> list[Dense]:
    like = lib.array([0.0], dtype)
    return [Dense(dims[k], dims[k + 1], "tanh", seed=k, like=like) for k in range(len(dims) - 1)]


class Square:
    """A recomputable that is no layer: no dimensions, no backward."""

    def forward(self, x: Any) -> Any:
        return x * x

    def input_memory_bytes(self, x: Any) -> int:
        return int(x.nbytes)


def test_a_checkpoint_holds_its_input_only(lib: Any) -> None:
    x = lib.array([1.0, 2.0, 3.0])
    checkpoint = Checkpoint(Square(), x)
    assert checkpoint.memory_bytes() == 12
    np.testing.assert_array_equal(lib.numpy(checkpoint.recompute()), [1, 4, 9])
    checkpoint.free()
    assert checkpoint.memory_bytes() == 0
    with pytest.raises(NotCheckpointed):
        checkpoint.recompute()


@pytest.mark.parametrize("hold", HOLDS)
def test_a_checkpoint_lives_in_its_budget(lib: Any, hold: str) -> None:
    budget = CheckpointBudget(16, device="cpu", hold=hold)
    checkpoint = Checkpoint(Square(), lib.array([1.0, 2.0, 3.0]), budget)
    assert budget.used_bytes == 12
    with pytest.raises(BudgetExceeded) as error:
        Checkpoint(Square(), lib.array([1.0, 2.0]), budget)
    assert (error.value.need, error.value.available) == (8, 4)
    assert budget.used_bytes == 12, "a failed request changes nothing"
    np.testing.assert_array_equal(lib.numpy(checkpoint.recompute()), [1, 4, 9])
    checkpoint.free()
    assert budget.used_bytes == 0


def test_what_a_checkpointed_activation_saves(lib: Any, counting: Any) -> None:
    x = lib.array(np.ones((2, 4)))
    segment = counting(LinearSegment.random_init(4, 12, 0, like=x))
    activation = CheckpointedActivation(segment, x)
    assert (activation.memory_bytes(), activation.full_memory_bytes()) == (32, 128)
    assert activation.memory_savings() == 0.75
    assert segment.forwards == 0, "bytes are not counted by computing"
    assert activation.recompute().shape == (2, 12)
    activation.free()
    assert (activation.memory_bytes(), activation.full_memory_bytes(), activation.memory_savings()) == (0, 0, 0.0)
    assert CheckpointedActivation(segment, lib.array(np.ones((0, 4)))).memory_savings() == 0.0


def test_an_activation_of_unknown_size_is_computed_once_for_it(counting: Any) -> None:
    class Known:  # without output_memory_bytes
        forwards = 0

        def forward(self, x: Any) -> Any:
            Known.forwards += 1
            return np.concatenate([x, x])

        def input_memory_bytes(self, x: Any) -> int:
            return int(x.nbytes)

    activation = CheckpointedActivation(Known(), np.ones(2, np.float32))
    assert [activation.full_memory_bytes() for _ in range(3)] == [24, 24, 24]
    assert Known.forwards == 1


def test_a_network_runs_each_segment_once_and_counts_without_running(lib: Any, counting: Any) -> None:
    segments = [counting(s) for s in chain(lib, [4, 6, 2])]
    network = CheckpointedNetwork(segments)
    assert (network.memory_bytes(), network.full_memory_bytes(), network.memory_savings()) == (0, 0, 0.0)
    x = lib.array(np.ones((3, 4)), "float64")
    y = network.forward(x)
    np.testing.assert_array_equal(lib.numpy(y), lib.numpy(segments[1].inner.forward(segments[0].inner.forward(x))))
    assert network.memory_bytes() == 3 * (4 + 6) * 8
    assert network.full_memory_bytes() == 3 * (6 + 2) * 8
    assert network.memory_savings() == 0.0, "these inputs are larger than the outputs"
    assert [s.forwards for s in segments] == [1, 1]


def test_a_network_really_uses_its_input(lib: Any) -> None:
    network = CheckpointedNetwork(chain(lib, [4, 6, 2]))
    one = lib.numpy(network.forward(lib.array(np.ones(4), "float64")))
    two = lib.numpy(network.forward(lib.array(np.zeros(4), "float64")))
    assert not np.allclose(one, two)


@pytest.mark.parametrize(
    ("strategy", "kept", "recomputed"),
    [
        (CheckpointStrategy.every(), 9, 0),
        (CheckpointStrategy.sqrt(), 3, 6),
        (CheckpointStrategy.every_nth(4), 3, 6),
        (CheckpointStrategy.none(), 1, 8),
    ],
)
def test_strategies_trade_bytes_for_forward_calls(
    lib: Any, counting: Any, plain_gradients: Any, strategy: CheckpointStrategy, kept: int, recomputed: int
) -> None:
    segments = [counting(s) for s in chain(lib, [5] * 10)]
    network = CheckpointedNetwork(segments, strategy=strategy)
    x, grad = (lib.array(np.linspace(-1, 1, 10).reshape(2, 5), "float64") for _ in range(2))
    network.forward(x)
    assert network.memory_bytes() == kept * 80
    assert network.full_memory_bytes() == 9 * 80
    assert network.memory_savings() == pytest.approx(1 - kept / 9)
    dx = network.backward(grad)
    assert sum(s.forwards for s in segments) == 9 + recomputed
    assert [s.backwards for s in segments] == [1] * 9
    assert network.memory_bytes() == 0
    _, expected = plain_gradients(chain(lib, [5] * 10), x, grad)
    np.testing.assert_array_equal(lib.numpy(dx), lib.numpy(expected))


@pytest.mark.parametrize("hold", HOLDS)
def test_a_network_lives_in_its_budget(lib: Any, hold: str) -> None:
    budget = CheckpointBudget(10_000, device="cpu", hold=hold)
    network = CheckpointedNetwork(chain(lib, [4, 8, 8, 2]), budget=budget)
    x = lib.array(np.ones((2, 4)), "float64")
    for _ in range(2):  # the second forward releases what the first kept
        y = network.forward(x)
        assert budget.used_bytes == network.memory_bytes() == 2 * (4 + 8 + 8) * 8
    network.backward(y)
    assert budget.used_bytes == 0
    assert budget.peak_bytes == 2 * (4 + 8 + 8) * 8


@pytest.mark.parametrize("hold", HOLDS)
def test_recomputed_inputs_are_held_in_the_budget_too(lib: Any, hold: str) -> None:
    budget = CheckpointBudget(10_000, device="cpu", hold=hold)
    network = CheckpointedNetwork(chain(lib, [4] * 7), budget=budget, strategy=CheckpointStrategy.every_nth(3))
    y = network.forward(lib.array(np.ones((2, 4)), "float64"))
    assert budget.used_bytes == 2 * 64
    network.backward(y)
    # The other checkpoint, and the three inputs of the run that is replayed.
    assert budget.peak_bytes == 4 * 64
    assert budget.used_bytes == 0


@pytest.mark.parametrize("hold", HOLDS)
def test_a_forward_that_does_not_fit_leaves_nothing_behind(lib: Any, hold: str) -> None:
    budget = CheckpointBudget(100, device="cpu", hold=hold)
    network = CheckpointedNetwork(chain(lib, [4, 8, 2]), budget=budget)
    with pytest.raises(BudgetExceeded, match="memory budget exceeded: need 128, available 36"):
        network.forward(lib.array(np.ones(8).reshape(2, 4), "float64"))
    assert budget.used_bytes == network.memory_bytes() == 0
    network.forward(lib.array(np.ones(4), "float64"))
    assert budget.used_bytes == 96


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize(("where", "position"), [("forward", 0), ("forward", 2), ("backward", 1), ("backward", 3)])
def test_a_backward_that_fails_leaves_nothing_behind(hold: str, where: str, position: int) -> None:
    class Step:
        """The identity, which fails where it is told to."""

        def __init__(self, fails: str = "") -> None:
            self.calls, self.fails = 0, fails

        def forward(self, x: Any) -> Any:
            self.calls += 1
            if self.fails == "forward" and self.calls == 2:
                raise RuntimeError("broken")
            return x + 0

        def backward(self, x: Any, grad: Any) -> Any:
            if self.fails == "backward":
                raise RuntimeError("broken")
            return grad

    steps = [Step(where if k == position else "") for k in range(4)]
    budget = CheckpointBudget(1000, device="cpu", hold=hold)
    network = CheckpointedNetwork(steps, budget=budget, strategy=CheckpointStrategy.none())
    network.forward(np.ones(3))
    with pytest.raises(RuntimeError, match="broken"):
        network.backward(np.ones(3))
    gc.collect()
    assert budget.used_bytes == 0
    with pytest.raises(NotCheckpointed):
        network.backward(np.ones(3))


def test_dropped_outputs_really_die() -> None:
    outputs: list[weakref.ref[np.ndarray]] = []

    class Watched:
        def forward(self, x: np.ndarray) -> np.ndarray:
            y = x + 1.0
            outputs.append(weakref.ref(y))
            return y

    network = CheckpointedNetwork([Watched() for _ in range(6)], strategy=CheckpointStrategy.every_nth(3))
    y = network.forward(np.zeros(4))
    alive = [ref() is not None for ref in outputs]
    assert alive == [False, False, True, False, False, True], "only segment 3's input and the result are alive"
    assert y[0] == 6


def test_recompute_starts_at_the_nearest_kept_input(lib: Any, counting: Any) -> None:
    segments = [counting(s) for s in chain(lib, [5] * 7)]
    network = CheckpointedNetwork(segments, strategy=CheckpointStrategy.every_nth(3))
    y = network.forward(lib.array(np.ones(5), "float64"))
    np.testing.assert_array_equal(lib.numpy(network.recompute(5)), lib.numpy(y))
    assert [s.forwards for s in segments] == [1, 1, 1, 2, 2, 2]
    with pytest.raises(IndexError, match="stage 6 of a chain of 6"):
        network.recompute(6)
    network.release()
    with pytest.raises(NotCheckpointed):
        network.recompute(0)


def test_misuse_is_named() -> None:
    with pytest.raises(EmptySegments):
        CheckpointedNetwork([])
    with pytest.raises(EmptyPipeline):
        CheckpointedPipeline([])
    network = CheckpointedNetwork([Square()])
    with pytest.raises(NotCheckpointed):
        network.backward(np.ones(2))
    network.forward(np.ones(2))
    with pytest.raises(TypeError, match="stage 0 is a Square without backward"):
        network.backward(np.ones(2))
    with pytest.raises(DimMismatch, match="input of segment 1 mismatch: expected 5, got 3"):
        CheckpointedPipeline([LinearSegment.random_init(2, 3, 0), LinearSegment.random_init(5, 3, 0)])
    with pytest.raises(TypeError, match="use CheckpointedNetwork"):
        CheckpointedPipeline([Square()]).total_full_memory()
    with pytest.raises(DimMismatch, match="multiple"):
        CheckpointedPipeline([LinearSegment.random_init(2, 3, 0)]).total_checkpoint_memory(3)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_what_a_pipeline_foretells_is_what_it_holds(lib: Any, rows: int) -> None:
    budget = CheckpointBudget(10_000, device="cpu", hold="pool")
    pipeline = CheckpointedPipeline(chain(lib, [4, 8, 3]), budget=budget)
    y = pipeline.forward(lib.array(np.ones((rows, 4)), "float64"))
    assert budget.used_bytes == pipeline.total_checkpoint_memory(rows * 4) == rows * 12 * 8
    assert pipeline.total_full_memory(rows * 4) == rows * 23 * 8
    assert pipeline.overall_savings(rows * 4) == (pytest.approx(11 / 23) if rows else 0.0)
    assert pipeline.backward(y).shape == (rows, 4)
    assert budget.used_bytes == 0


def test_strategy_arguments() -> None:
    with pytest.raises(ValueError, match="stride of -1"):
        CheckpointStrategy.every_nth(-1)
    with pytest.raises(ValueError, match="unknown strategy"):
        CheckpointStrategy("some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="-1 layers"):
        CheckpointStrategy.every().select_layers(-1)
