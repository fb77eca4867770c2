"""`ActivationCheckpointer`: a layer function over labels, with checkpoints by position, limit, budget and precision."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetExceeded, CheckpointLimit, NotCheckpointed
from gpuckpt.segments import ActivationCheckpointer, CheckpointConfig, Dense
from gpuckpt.segments.storage import STORAGE_FORMATS

HOLDS = ("account", "pool")


class Model:
    """Layers by label, with a count of forward calls."""

    def __init__(self, lib: Any, labels: list[Any], width: int = 4, dtype: str = "float64") -> None:
        like = lib.array([0.0], dtype)
        self.layers = {label: Dense(width, width, "tanh", seed=k, like=like) for k, label in enumerate(labels)}
        self.calls: list[Any] = []

    def forward(self, layer: Any, x: Any) -> Any:
        self.calls.append(layer)
        return self.layers[layer].forward(x)

    def backward(self, layer: Any, x: Any, grad: Any) -> Any:
        return self.layers[layer].backward(x, grad)

    def outputs(self, x: Any) -> list[Any]:
        found = []
        for layer in self.layers.values():
            x = layer.forward(x)
            found.append(x)
        return found


def data(lib: Any, *shape: int, dtype: str = "float64") -> Any:
    return lib.array(np.linspace(-1, 1, int(np.prod(shape))).reshape(shape), dtype)


def test_saving_by_hand(lib: Any) -> None:
    checkpointer = ActivationCheckpointer(CheckpointConfig(max_checkpoints=2))
    checkpointer.save("a", data(lib, 3))
    checkpointer.save("b", data(lib, 5))
    assert (checkpointer.num_checkpoints(), checkpointer.memory_stored_bytes()) == (2, 64)
    checkpointer.save("a", data(lib, 4))
    assert (checkpointer.num_checkpoints(), checkpointer.memory_stored_bytes()) == (2, 72), "twice counts once"
    np.testing.assert_array_equal(lib.numpy(checkpointer.get("a")), lib.numpy(data(lib, 4)))
    assert checkpointer.get("c") is None
    with pytest.raises(CheckpointLimit, match="layer 'c' cannot be stored: max_checkpoints=2") as error:
        checkpointer.save("c", data(lib, 1))
    assert error.value.limit == 2
    assert checkpointer.memory_stored_bytes() == 72
    assert checkpointer.memory_saved_bytes() == 0
    checkpointer.clear()
    assert (checkpointer.num_checkpoints(), checkpointer.memory_stored_bytes()) == (0, 0)


@pytest.mark.parametrize("hold", HOLDS)
def test_what_is_saved_lives_in_the_budget(lib: Any, hold: str) -> None:
    budget = CheckpointBudget(64, device="cpu", hold=hold)
    checkpointer = ActivationCheckpointer(budget=budget)
    checkpointer.save(0, data(lib, 3))
    checkpointer.save(0, data(lib, 2))
    assert budget.used_bytes == 16
    with pytest.raises(BudgetExceeded):
        checkpointer.save(0, data(lib, 7))
    assert lib.numpy(checkpointer.get(0)).shape == (2,), "a failed save leaves the old activation in place"
    checkpointer.clear()
    assert budget.used_bytes == 0


def test_the_rule_by_number_and_by_position(lib: Any) -> None:
    checkpointer = ActivationCheckpointer(CheckpointConfig(3))
    assert [k for k in range(8) if checkpointer.is_checkpoint_layer(k)] == [0, 3, 6]
    assert checkpointer.is_checkpoint_layer(np.int64(6))
    assert not any(ActivationCheckpointer(CheckpointConfig(0)).is_checkpoint_layer(k) for k in range(8))
    with pytest.raises(TypeError, match="layer 'stem'"):
        checkpointer.is_checkpoint_layer("stem")
    labels = ["stem", "a", "b", "c", "head"]
    checkpointer.checkpointed_forward(data(lib, 4), labels, Model(lib, labels).forward)
    assert [label for label in labels if checkpointer.is_checkpoint_layer(label)] == ["stem", "c"]


LABELS: list[list[Any]] = [
    list(range(10)),
    list(range(100, 110)),
    [9, 2, 5, 1, 0, 3, 8, 7, 4, 6],
    [f"block.{k}" for k in range(10)],
    [("enc", k) for k in range(5)] + [("dec", k) for k in range(5)],
]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("every", [0, 1, 3, 4, 20])
def test_any_layer_can_be_recomputed_from_the_nearest_checkpoint(lib: Any, labels: list[Any], every: int) -> None:
    model = Model(lib, labels)
    checkpointer = ActivationCheckpointer(CheckpointConfig(every))
    x = data(lib, 2, 4)
    y = checkpointer.checkpointed_forward(x, labels, model.forward)
    expected = model.outputs(x)
    np.testing.assert_array_equal(lib.numpy(y), lib.numpy(expected[-1]))
    stored = list(range(0, 10, every)) if every else []
    assert checkpointer.num_checkpoints() == len(stored)
    assert checkpointer.memory_stored_bytes() == 64 * (len(stored) + 1)
    assert checkpointer.memory_saved_bytes() == 64 * (10 - len(stored))
    for k, label in enumerate(labels):
        model.calls.clear()
        again = checkpointer.recompute_from_checkpoint(label, labels, model.forward)
        np.testing.assert_array_equal(lib.numpy(again), lib.numpy(expected[k]))
        start = max((s for s in stored if s <= k), default=-1)
        assert model.calls == labels[start + 1 : k + 1], "from the nearest checkpoint, and no further"


@pytest.mark.parametrize(
    ("every", "most", "stored"), [(1, 5, 5), (1, 4, 4), (2, 3, 3), (4, 1, 1), (1, 0, 0), (1, 100, 10)]
)
def test_the_limit_reached_while_running_recomputes_more(lib: Any, every: int, most: int, stored: int) -> None:
    labels = list(range(10))
    model = Model(lib, labels)
    checkpointer = ActivationCheckpointer(CheckpointConfig(every, most))
    x = data(lib, 4)
    checkpointer.checkpointed_forward(x, labels, model.forward)
    assert checkpointer.num_checkpoints() == stored
    held = [k for k in labels if checkpointer.get(k) is not None]
    gaps = np.diff([-1, *held, 10])
    assert gaps.max() <= 2 * -(-10 // max(stored, 1)) + 1, "what is stored is spread over the chain"
    model.calls.clear()
    checkpointer.checkpointed_backward(data(lib, 4), labels, model.forward, model.backward)
    # All inputs but the chain's own and those stored are computed once more.
    assert len(model.calls) == 9 - len([k for k in held if k < 9])


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("labels", LABELS[2:4])
def test_backward_gives_the_plain_gradients(
    lib: Any, plain_gradients: Any, labels: list[Any], every: int, hold: str
) -> None:
    budget = CheckpointBudget(64 * 12, device="cpu", hold=hold)
    model, twin = Model(lib, labels), Model(lib, labels)
    checkpointer = ActivationCheckpointer(CheckpointConfig(every), budget)
    x, grad = data(lib, 2, 4), data(lib, 2, 4)
    checkpointer.checkpointed_forward(x, labels, model.forward)
    dx = checkpointer.checkpointed_backward(grad, labels, model.forward, model.backward)
    _, expected = plain_gradients(list(twin.layers.values()), x, grad)
    np.testing.assert_array_equal(lib.numpy(dx), lib.numpy(expected))
    for label in labels:
        ours, theirs = model.layers[label].gradients, twin.layers[label].gradients
        np.testing.assert_array_equal(lib.numpy(ours[0]), lib.numpy(theirs[0]))
    assert (budget.used_bytes, checkpointer.memory_stored_bytes(), checkpointer.memory_saved_bytes()) == (0, 0, 0)
    stored = list(range(0, 9, every)) if every else []
    assert len(model.calls) == 10 + 9 - len(stored)
    with pytest.raises(NotCheckpointed):
        checkpointer.checkpointed_backward(grad, labels, model.forward, model.backward)


@pytest.mark.parametrize("hold", HOLDS)
def test_a_budget_too_small_for_all_checkpoints_recomputes_more(lib: Any, plain_gradients: Any, hold: str) -> None:
    labels = list(range(8))
    budget = CheckpointBudget(64 * 4, device="cpu", hold=hold)
    model, twin = Model(lib, labels), Model(lib, labels)
    checkpointer = ActivationCheckpointer(CheckpointConfig(2), budget)
    x = data(lib, 2, 4)
    checkpointer.checkpointed_forward(x, labels, model.forward)
    assert (checkpointer.num_checkpoints(), budget.used_bytes) == (3, 64 * 4)
    again = checkpointer.recompute_from_checkpoint(7, labels, model.forward)
    np.testing.assert_array_equal(lib.numpy(again), lib.numpy(twin.outputs(x)[-1]))
    none = ActivationCheckpointer(CheckpointConfig(2), CheckpointBudget(63, device="cpu", hold=hold))
    with pytest.raises(BudgetExceeded):
        none.checkpointed_forward(x, labels, model.forward)
    assert none.memory_stored_bytes() == 0


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("name", STORAGE_FORMATS)
def test_reduced_precision_is_real(lib: Any, name: str, hold: str) -> None:
    """float32 in half or a quarter of its bytes: in the ledger, in the budget, and in the memory behind them."""
    fmt = STORAGE_FORMATS[name]
    budget = CheckpointBudget(1 << 20, device="cpu", hold=hold)
    checkpointer = ActivationCheckpointer(CheckpointConfig(storage_dtype=name), budget)
    activation = lib.array(np.random.default_rng(2).standard_normal((64, 64)), "float32")
    checkpointer.save("a", activation)
    held_bytes = 64 * 64 * fmt.nbytes
    assert checkpointer.memory_stored_bytes() == budget.used_bytes == held_bytes
    assert checkpointer.memory_saved_bytes() == 64 * 64 * 4 - held_bytes
    x = lib.numpy(activation).astype("float64")
    bound = fmt.error_bound(np.abs(x), np.abs(x).max())
    restored = lib.numpy(checkpointer.get("a"))
    assert restored.dtype == np.float32
    assert np.all(np.abs(restored - x) <= bound)
    if lib.name == "numpy":
        death = weakref.ref(activation)
        del activation
        gc.collect()
        assert death() is None, "the full-precision array is not kept beside the small one"


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("name", STORAGE_FORMATS)
def test_gradients_from_reduced_precision_are_close_and_books_return_to_zero(
    lib: Any, plain_gradients: Any, name: str, hold: str
) -> None:
    labels = [f"l{k}" for k in range(6)]
    budget = CheckpointBudget(1 << 16, device="cpu", hold=hold)
    model, twin = Model(lib, labels, dtype="float32"), Model(lib, labels, dtype="float32")
    checkpointer = ActivationCheckpointer(CheckpointConfig(2, storage_dtype=name), budget)
    x, grad = (data(lib, 8, 4, dtype="float32") for _ in range(2))
    checkpointer.checkpointed_forward(x, labels, model.forward)
    nbytes = STORAGE_FORMATS[name].nbytes
    assert budget.used_bytes == 4 * 32 * nbytes
    dx = lib.numpy(checkpointer.checkpointed_backward(grad, labels, model.forward, model.backward))
    expected = lib.numpy(plain_gradients(list(twin.layers.values()), x, grad)[1])
    # Relative to the whole gradient: six layers amplify the storage error a few times.
    assert np.linalg.norm(dx - expected) <= 4 * STORAGE_FORMATS[name].roundoff * np.linalg.norm(expected)
    assert budget.used_bytes == 0


def test_misuse_is_named(lib: Any) -> None:
    checkpointer = ActivationCheckpointer()
    assert checkpointer.config == CheckpointConfig(4, 64, None)
    model = Model(lib, [0, 1])
    with pytest.raises(NotCheckpointed, match="nothing is stored at or before"):
        checkpointer.recompute_from_checkpoint(1, [0, 1], model.forward)
    with pytest.raises(ValueError, match="layer 5 is not among"):
        checkpointer.recompute_from_checkpoint(5, [0, 1], model.forward)
    with pytest.raises(ValueError, match="distinct"):
        checkpointer.checkpointed_forward(data(lib, 4), [0, 0], model.forward)
    with pytest.raises(ValueError, match="max_checkpoints=-1"):
        CheckpointConfig(max_checkpoints=-1)
    with pytest.raises(ValueError, match="storage_dtype='int4'"):
        CheckpointConfig(storage_dtype="int4")


@pytest.mark.parametrize("hold", HOLDS)
def test_failures_leave_nothing_behind(lib: Any, hold: str) -> None:
    labels = [0, 1, 2, 3]
    budget = CheckpointBudget(1000, device="cpu", hold=hold)
    model = Model(lib, labels)
    checkpointer = ActivationCheckpointer(CheckpointConfig(1), budget)

    def broken(layer: Any, *args: Any) -> Any:
        if layer == 2:
            raise RuntimeError("broken")
        return args[-1]

    with pytest.raises(RuntimeError, match="broken"):
        checkpointer.checkpointed_forward(data(lib, 4), labels, broken)
    assert budget.used_bytes == 0
    checkpointer.checkpointed_forward(data(lib, 4), labels, model.forward)
    with pytest.raises(RuntimeError, match="broken"):
        checkpointer.checkpointed_backward(data(lib, 4), labels, model.forward, broken)
    gc.collect()
    assert budget.used_bytes == 0


def test_an_empty_chain_is_the_identity(lib: Any) -> None:
    checkpointer = ActivationCheckpointer()
    x = data(lib, 4)
    model = Model(lib, [])
    np.testing.assert_array_equal(lib.numpy(checkpointer.checkpointed_forward(x, [], model.forward)), lib.numpy(x))
    dx = checkpointer.checkpointed_backward(x, [], model.forward, model.backward)
    np.testing.assert_array_equal(lib.numpy(dx), lib.numpy(x))
