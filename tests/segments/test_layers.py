"""`CheckpointedLayer` and `SegmentCheckpointer`: what is kept, what is run again, and whose books."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from gpuckpt import CheckpointBudget, MemoryUsageTracker
from gpuckpt.errors import BudgetExceeded, NotCheckpointed
from gpuckpt.segments import CheckpointedLayer, Dense, Layer, SegmentCheckpointer

HOLDS = ("account", "pool")


def dense(lib: Any, count: int, width: int = 4) -> list[Dense]:
    return [Dense(width, width, "tanh", seed=k, like=lib.array([0.0], "float64")) for k in range(count)]


def data(lib: Any, *shape: int) -> Any:
    return lib.array(np.linspace(-1, 1, int(np.prod(shape))).reshape(shape), "float64")


class Remembering(Dense):
    """A layer whose backward needs the pre-activation that its forward left behind, as many layers' does."""

    recomputes_in_backward = False
    forwards = 0

    def forward(self, x: Any) -> Any:
        self.forwards += 1
        self.seen = np.array(x)
        return super().forward(x)

    def backward(self, x: Any, grad: Any) -> Any:
        np.testing.assert_array_equal(self.seen, np.array(x))
        return super().backward(x, grad)


def test_the_inner_backward_gets_the_input(lib: Any) -> None:
    """3 -> 5: handing it the output, as the described system does, could not even be multiplied."""
    like = lib.array([0.0], "float64")
    inner, twin = (Dense(3, 5, "sigmoid", seed=1, like=like) for _ in range(2))
    layer = CheckpointedLayer(inner)
    x, grad = data(lib, 2, 3), data(lib, 2, 5)
    layer.forward(x)
    dx = layer.backward(None, grad)
    np.testing.assert_array_equal(lib.numpy(dx), lib.numpy(twin.backward(x, grad)))
    for ours, theirs in zip(layer.gradients, twin.gradients, strict=True):
        np.testing.assert_array_equal(lib.numpy(ours), lib.numpy(theirs))


def test_what_the_inner_layer_needs_is_computed_again() -> None:
    tracker = MemoryUsageTracker()
    layer = CheckpointedLayer(Remembering(2, 3), tracker)
    x = np.ones((1, 2), np.float32)
    layer.forward(x)
    layer.inner.forward(np.zeros((1, 2), np.float32))  # somebody else ran it in between
    layer.backward(x, np.ones((1, 3), np.float32))
    assert layer.inner.forwards == 3
    assert tracker.recomputed_bytes == 12


def test_a_layer_that_recomputes_by_itself_is_not_run_twice(counting: Any) -> None:
    inner = counting(Dense(2, 3))
    layer = CheckpointedLayer(inner)
    layer.backward(None, layer.forward(np.ones((1, 2), np.float32)))
    assert (inner.forwards, inner.backwards) == (1, 1)


@pytest.mark.parametrize("hold", HOLDS)
def test_books_of_a_checkpointed_layer(lib: Any, hold: str) -> None:
    tracker, budget = MemoryUsageTracker(), CheckpointBudget(1000, device="cpu", hold=hold)
    layer = CheckpointedLayer(dense(lib, 1)[0], tracker, budget=budget)
    x = data(lib, 3, 4)
    for _ in range(2):  # a second forward releases what the first kept
        y = layer.forward(x)
        assert tracker.stored_activation_bytes == layer.memory_bytes() == budget.used_bytes == 96
    for _ in range(2):
        layer.backward(x, y)
        assert (tracker.stored_activation_bytes, budget.used_bytes) == (0, 0)
        assert tracker.gradient_bytes == (16 + 4) * 8, "gradients add up in place: their bytes count once"
        layer.forward(x)
    layer.update(0.1)
    assert tracker.gradient_bytes == 0, "an update uses the gradients up"
    assert tracker.peak_bytes == 96 + 160
    layer.release()
    assert (tracker.stored_activation_bytes, budget.used_bytes) == (0, 0)
    layer.backward(x, layer.forward(x))
    layer.set_gradients([])
    assert tracker.gradient_bytes == 0


def test_a_checkpointed_layer_is_a_layer() -> None:
    inner = Dense(2, 3, "relu")
    layer = CheckpointedLayer(inner)
    assert isinstance(layer, Layer)
    assert layer.layer_type == "CheckpointedLayer"
    assert layer.layer_description == "CheckpointedLayer(Dense(2 -> 3, relu))"
    assert layer.parameter_count == 9
    new = [np.ones((3, 2), np.float32), np.ones(3, np.float32)]
    layer.set_params(new)
    assert layer.params[0] is new[0]
    assert inner.bias is new[1]
    layer.set_gradients(new)
    assert inner.gradients[0] is layer.gradients[0] is new[0]
    layer.set_training(False)
    assert not inner.is_training
    assert not layer.is_training


def test_in_evaluation_nothing_is_kept() -> None:
    tracker = MemoryUsageTracker()
    layer = CheckpointedLayer(Dense(2, 3), tracker)
    layer.set_training(False)
    layer.forward(np.ones(2, np.float32))
    assert tracker.peak_bytes == 0
    with pytest.raises(NotCheckpointed, match="forward in training"):
        layer.backward(None, np.ones(3, np.float32))


def test_backward_runs_once_for_each_forward() -> None:
    layer = CheckpointedLayer(Dense(2, 3))
    with pytest.raises(NotCheckpointed):
        layer.backward(None, np.ones(3, np.float32))
    y = layer.forward(np.ones(2, np.float32))
    layer.backward(None, y)
    with pytest.raises(NotCheckpointed):
        layer.backward(None, y)


@pytest.mark.parametrize("hold", HOLDS)
def test_a_failing_layer_leaves_nothing_behind(hold: str) -> None:
    tracker, budget = MemoryUsageTracker(), CheckpointBudget(40, device="cpu", hold=hold)
    layer = CheckpointedLayer(Dense(2, 3), tracker, budget=budget)
    with pytest.raises(BudgetExceeded):
        layer.forward(np.ones((6, 2), np.float32))
    with pytest.raises(ValueError, match="last dimension"):
        layer.forward(np.ones((1, 5), np.float32))
    assert (tracker.stored_activation_bytes, budget.used_bytes) == (0, 0)
    layer.forward(np.ones((1, 2), np.float32))
    with pytest.raises(ValueError, match="last dimension"):
        layer.backward(None, np.ones((1, 2), np.float32))
    assert (tracker.stored_activation_bytes, budget.used_bytes) == (0, 0)


@pytest.mark.parametrize("count", [1, 2, 7, 12])
@pytest.mark.parametrize("every", [0, 1, 2, 3, 5, 100])
def test_each_segment_is_replayed_once(lib: Any, counting: Any, plain_gradients: Any, count: int, every: int) -> None:
    layers = [counting(layer) for layer in dense(lib, count)]
    tracker = MemoryUsageTracker()
    checkpointer = SegmentCheckpointer(layers, every, tracker)
    segments = -(-count // every) if every else 1
    x, grad = data(lib, 2, 4), data(lib, 2, 4)
    y = checkpointer.forward(x)
    assert tracker.stored_activation_bytes == checkpointer.memory_bytes() == segments * 64
    dx = checkpointer.backward(grad)
    assert sum(layer.forwards for layer in layers) == count + (count - segments)
    assert max(layer.forwards for layer in layers) <= 2
    assert tracker.recomputed_bytes == (count - segments) * 64
    assert tracker.stored_activation_bytes == 0
    expected_y, expected = plain_gradients(dense(lib, count), x, grad)
    np.testing.assert_array_equal(lib.numpy(y), lib.numpy(expected_y))
    np.testing.assert_array_equal(lib.numpy(dx), lib.numpy(expected))


def test_the_replay_goes_segment_by_segment(counting: Any) -> None:
    log: list[str] = []
    layers = [counting(Dense(2, 2, seed=k), log, str(k)) for k in range(5)]
    checkpointer = SegmentCheckpointer(layers, 2)
    checkpointer.backward(checkpointer.forward(np.ones(2, np.float32)))
    assert " ".join(log) == "F0 F1 F2 F3 F4 B4 F2 B3 B2 F0 B1 B0"


@pytest.mark.parametrize("hold", HOLDS)
def test_one_segments_activations_are_held_at_a_time(lib: Any, hold: str) -> None:
    """12 layers in segments of 3: 4 inputs are kept, and a replay adds 2. SavedStorage everything would be 12."""
    budget = CheckpointBudget(6 * 64, device="cpu", hold=hold)
    tracker = MemoryUsageTracker()
    checkpointer = SegmentCheckpointer(dense(lib, 12), 3, tracker, budget)
    y = checkpointer.forward(data(lib, 2, 4))
    assert budget.used_bytes == 4 * 64
    checkpointer.backward(y)
    assert budget.peak_bytes == 6 * 64
    assert (budget.used_bytes, tracker.stored_activation_bytes) == (0, 0)
    assert tracker.gradient_bytes == 12 * 20 * 8
    checkpointer.update(0.1)
    assert tracker.gradient_bytes == 0
    tight = SegmentCheckpointer(dense(lib, 12), 3, None, CheckpointBudget(5 * 64, device="cpu", hold=hold))
    tight.forward(data(lib, 2, 4))
    with pytest.raises(BudgetExceeded):
        tight.backward(y)


def test_a_layer_that_occurs_twice(lib: Any, plain_gradients: Any) -> None:
    tracker = MemoryUsageTracker()
    (shared,), (twin,) = dense(lib, 1), dense(lib, 1)
    checkpointer = SegmentCheckpointer([shared, shared, shared], 2, tracker)
    x, grad = data(lib, 2, 4), data(lib, 2, 4)
    checkpointer.forward(x)
    dx = checkpointer.backward(grad)
    _, expected = plain_gradients([twin, twin, twin], x, grad)
    np.testing.assert_array_equal(lib.numpy(dx), lib.numpy(expected))
    np.testing.assert_array_equal(lib.numpy(shared.gradients[0]), lib.numpy(twin.gradients[0]))
    assert tracker.gradient_bytes == 160
    before = lib.numpy(shared.weights).copy()
    gradient = lib.numpy(shared.gradients[0]).copy()
    checkpointer.update(0.5)
    np.testing.assert_allclose(lib.numpy(shared.weights), before - 0.5 * gradient, rtol=1e-14)


def test_an_empty_one_is_the_identity(lib: Any) -> None:
    checkpointer = SegmentCheckpointer([], 3)
    x = data(lib, 4)
    assert checkpointer.forward(x) is x or lib.name == "torch"
    np.testing.assert_array_equal(lib.numpy(checkpointer.forward(x)), lib.numpy(x))
    np.testing.assert_array_equal(lib.numpy(checkpointer.backward(x)), lib.numpy(x))
    assert (len(checkpointer), list(checkpointer), checkpointer.memory_bytes()) == (0, [], 0)


def test_it_grows_layer_by_layer(lib: Any, plain_gradients: Any) -> None:
    checkpointer = SegmentCheckpointer(checkpoint_every=2)
    layers = dense(lib, 5)
    for layer in layers:
        checkpointer.push(layer)
    assert (len(checkpointer), checkpointer.checkpoint_every) == (5, 2)
    assert all(a is b for a, b in zip(checkpointer, layers, strict=True))
    x = data(lib, 1, 4)
    with pytest.raises(NotCheckpointed):
        checkpointer.backward(x)
    y = checkpointer.forward(x)
    with pytest.raises(RuntimeError, match="push between forward and backward"):
        checkpointer.push(layers[0])
    expected_y, expected = plain_gradients(dense(lib, 5), x, y)
    np.testing.assert_array_equal(lib.numpy(y), lib.numpy(expected_y))
    np.testing.assert_array_equal(lib.numpy(checkpointer.backward(y)), lib.numpy(expected))
    checkpointer.push(layers[0])
    assert len(checkpointer) == 6
    with pytest.raises(ValueError, match="checkpoint_every=-1"):
        SegmentCheckpointer([], -1)


def test_one_tracker_and_one_budget_for_many_threads(lib: Any) -> None:
    tracker, budget = MemoryUsageTracker(), CheckpointBudget(10**6, device="cpu")
    failures: list[BaseException] = []

    def train(seed: int) -> None:
        try:
            checkpointer = SegmentCheckpointer(dense(lib, 6), 1 + seed % 3, tracker, budget)
            for _ in range(10):
                checkpointer.backward(checkpointer.forward(data(lib, 2, 4)))
                checkpointer.update(0.01)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (tracker.stored_activation_bytes, tracker.gradient_bytes, budget.used_bytes) == (0, 0, 0)
