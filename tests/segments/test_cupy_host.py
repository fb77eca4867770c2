"""CuPy arrays over the host-memory runtime: storage, budget and accounting. Kernels do not run there, so the steps here
move bytes only (copies), which is all that the books can tell apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuckpt import CheckpointBudget, MemoryUsageTracker
from gpuckpt.errors import BudgetExceeded, NotCheckpointed
from gpuckpt.segments import (
    ActivationCheckpointer,
    Chained,
    Checkpoint,
    CheckpointConfig,
    CheckpointedActivation,
    CheckpointedLayer,
    CheckpointedNetwork,
    CheckpointedPipeline,
    CheckpointStrategy,
    Dense,
    LinearSegment,
    SegmentCheckpointer,
    vjp_checkpoint,
)

ROW = 512  # bytes of one activation: one unit of CuPy's pools
HOLDS = ("account", "pool")


def copied(x: Any) -> Any:
    """A device-to-device copy; `x.copy()` would launch a kernel."""
    y = type(x)(x.shape, x.dtype)
    y.data.copy_from_device(x.data, x.nbytes)
    return y


class Copy:
    """The identity by a copy, forward and backward; a layer without parameters."""

    gradients = ()
    is_training = True

    def forward(self, x: Any) -> Any:
        return copied(x)

    def backward(self, x: Any, grad: Any) -> Any:
        assert x.shape == grad.shape
        return copied(grad)

    def input_memory_bytes(self, x: Any) -> int:
        return int(x.nbytes)


@pytest.fixture
def array(hostcuda: Any) -> Any:
    return hostcuda.cupy.asarray(np.arange(ROW // 4, dtype=np.float32))


def budget(hold: Any, rows: int) -> CheckpointBudget:
    return CheckpointBudget(rows * ROW, device="cuda:0", hold=hold)


def same(a: Any, b: Any) -> None:
    assert type(a).__module__.startswith("cupy")
    np.testing.assert_array_equal(a.get(), b.get())


def test_weights_take_the_library_and_device_of_like(array: Any) -> None:
    segment = LinearSegment.random_init(4, 3, 1, like=array)
    assert type(segment.weights).__module__.startswith("cupy")
    np.testing.assert_array_equal(segment.weights.get(), LinearSegment.random_init(4, 3, 1).weights)
    layer = Dense(4, 3, like=array)
    np.testing.assert_array_equal(layer.bias.get(), np.zeros(3, np.float32))
    assert segment.output_memory_bytes(array) == ROW // 4 * 3
    pipeline = CheckpointedPipeline([segment, LinearSegment.random_init(3, 2, 1, like=array)])
    assert pipeline.total_checkpoint_memory(8) == 2 * 7 * 4
    with pytest.raises(TypeError, match="numpy on cpu, the weights are cupy on cuda:0"):
        segment.forward(np.ones(4, np.float32))


@pytest.mark.parametrize("hold", HOLDS)
def test_checkpoints(array: Any, hold: str) -> None:
    books = budget(hold, 2)
    one = Checkpoint(Copy(), array, books)
    two = CheckpointedActivation(Copy(), array, books)
    assert books.used_bytes == one.memory_bytes() + two.memory_bytes() == 2 * ROW
    with pytest.raises(BudgetExceeded):
        Checkpoint(Copy(), array, books)
    same(one.recompute(), array)
    assert two.memory_savings() == 0.5
    one.free()
    two.free()
    assert books.used_bytes == 0


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize(("strategy", "kept", "peak"), [("every", 6, 6), ("none", 1, 6), ("sqrt", 2, 4)])
def test_networks(array: Any, hold: str, strategy: str, kept: int, peak: int) -> None:
    books = budget(hold, 6)
    network = CheckpointedNetwork([Copy()] * 6, budget=books, strategy=CheckpointStrategy(strategy))  # type: ignore[arg-type]
    same(network.forward(array), array)
    assert books.used_bytes == network.memory_bytes() == kept * ROW
    assert network.full_memory_bytes() == 6 * ROW
    same(network.backward(array), array)
    assert (books.used_bytes, books.peak_bytes) == (0, peak * ROW)


@pytest.mark.parametrize("hold", HOLDS)
def test_layers_and_segments(array: Any, hold: str) -> None:
    books, tracker = budget(hold, 4), MemoryUsageTracker()
    layer = CheckpointedLayer(Copy(), tracker, budget=books)  # type: ignore[arg-type]
    layer.forward(array)
    assert books.used_bytes == tracker.stored_activation_bytes == ROW
    same(layer.backward(None, array), array)
    checkpointer = SegmentCheckpointer([Copy()] * 6, 3, tracker, books)
    same(checkpointer.forward(array), array)
    assert books.used_bytes == tracker.stored_activation_bytes == 2 * ROW
    same(checkpointer.backward(array), array)
    assert (books.used_bytes, books.peak_bytes, tracker.peak_bytes) == (0, 4 * ROW, 4 * ROW)
    tight = SegmentCheckpointer([Copy()] * 6, 3, tracker, budget(hold, 3))
    tight.forward(array)
    with pytest.raises(BudgetExceeded):
        tight.backward(array)
    assert tracker.stored_activation_bytes == 0


@pytest.mark.parametrize("hold", HOLDS)
def test_a_layer_function(array: Any, hold: str) -> None:
    books = budget(hold, 8)
    checkpointer = ActivationCheckpointer(CheckpointConfig(2), books)
    labels = list("abcdef")
    checkpointer.checkpointed_forward(array, labels, lambda label, x: copied(x))
    assert books.used_bytes == checkpointer.memory_stored_bytes() == 4 * ROW
    assert checkpointer.memory_saved_bytes() == 3 * ROW
    same(checkpointer.get("c"), array)
    same(checkpointer.recompute_from_checkpoint("f", labels, lambda label, x: copied(x)), array)
    same(
        checkpointer.checkpointed_backward(array, labels, lambda label, x: copied(x), lambda label, x, g: copied(g)),
        array,
    )
    assert books.used_bytes == 0


@pytest.mark.parametrize("hold", HOLDS)
def test_a_function_and_its_inputs(array: Any, hold: str) -> None:
    books = budget(hold, 4)
    y, pullback = vjp_checkpoint(Chained([Copy()] * 3, books), array, budget=books)
    assert books.used_bytes == ROW
    same(y, array)
    same(pullback(array), array)
    assert books.used_bytes == 0
    with pytest.raises(NotCheckpointed):
        pullback(array)


@pytest.mark.parametrize("hold", HOLDS)
def test_device_memory_follows_the_books(hostcuda: Any, array: Any, hold: str) -> None:
    """What a network keeps is really there, and really gone after backward."""
    pool = hostcuda.cupy.get_default_memory_pool()
    books = budget(hold, 6)
    network = CheckpointedNetwork([Copy()] * 6, budget=books, strategy=CheckpointStrategy.every_nth(2))
    before = pool.used_bytes()
    y = network.forward(array)
    kept = pool.used_bytes() - before - ROW  # the output is alive as well
    # The first kept input is the caller's own array; a pool of the budget's own holds copies of all three.
    assert kept == (0 if hold == "pool" else 2 * ROW)
    del y
    network.backward(array)
    assert pool.used_bytes() == before
    assert books.used_bytes == 0


def host_view(array: Any) -> Any:
    """A CPU tensor on the CuPy array's memory, which on this runtime is the host's."""
    import ctypes

    import torch

    buffer = (ctypes.c_char * max(array.nbytes, 1)).from_address(array.data.ptr)
    flat = torch.frombuffer(buffer, dtype=getattr(torch, array.dtype.name), count=array.size)
    strides = [s // array.itemsize for s in array.strides]
    return flat.as_strided(array.shape, strides)


@pytest.fixture
def kernels_on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused path of CuPy arrays, with CPU views of the pool's blocks in place of CUDA views, for the interpreter."""
    import contextlib

    from gpuckpt.segments import fused

    @contextlib.contextmanager
    def as_tensors(*arrays: Any) -> Any:
        yield [None if a is None else host_view(a) for a in arrays]

    monkeypatch.delenv("GPUCKPT_BACKEND", raising=False)
    monkeypatch.setattr(fused, "as_tensors", as_tensors)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_the_fused_kernel_writes_into_cupys_blocks(
    hostcuda: Any, kernels_on_host: None, shape: tuple[int, ...]
) -> None:
    cupy = hostcuda.cupy
    x = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    segment = LinearSegment.random_init(4, 5, 3, like=cupy.asarray(x))
    y = segment.forward(cupy.asarray(x))
    assert type(y).__module__.startswith("cupy")
    assert y.shape == (*shape[:-1], 5)
    np.testing.assert_allclose(y.get(), LinearSegment.random_init(4, 5, 3).forward(x), rtol=1e-6, atol=1e-6)
    layer = Dense(4, 5, "gelu_tanh", seed=3, like=cupy.asarray(x))
    plain = Dense(4, 5, "gelu_tanh", seed=3)
    np.testing.assert_allclose(layer.forward(cupy.asarray(x)).get(), plain.forward(x), rtol=1e-6, atol=1e-6)


def test_the_fused_backward_recomputes_in_cupys_blocks(hostcuda: Any, kernels_on_host: None) -> None:
    """Up to dz: the two GEMMs after it are cuBLAS's, and the sum of db's partials is a CuPy kernel."""
    from gpuckpt.segments.fused import _fused_dz
    from gpuckpt.segments.pointwise import derivative

    cupy = hostcuda.cupy
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(s).astype(np.float32) for s in ((3, 4), (5, 4), (3, 5)))
    dz, dbias = _fused_dz(cupy.asarray(x), cupy.asarray(w), None, cupy.asarray(dy), "tanh")
    assert dbias is None
    np.testing.assert_allclose(dz.get(), dy * derivative("tanh", x @ w.T), rtol=2e-6, atol=2e-6)


def test_cupy_arrays_are_shown_to_torch_on_cupys_current_stream(
    hostcuda: Any, array: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU build of torch cannot import CUDA memory; what is asked of it is recorded instead."""
    import contextlib

    import torch

    from gpuckpt.segments import fused

    asked: list[Any] = []

    @contextlib.contextmanager
    def entered(stream: Any) -> Any:
        asked.append(stream)
        yield
        asked.append("left")

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: ("external", pointer, device))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", device))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(fused, "exchange", lambda a, library: (library, a.data.ptr, a.strides))

    flipped = array.reshape(2, -1)[:, :1]
    with fused.as_tensors(array, None, flipped) as (one, nothing, view):
        assert one == ("torch", array.data.ptr, (4,))
        assert nothing is None
        assert view == ("torch", array.data.ptr, flipped.strides), "a view with gaps is shared, not copied"
    stream = hostcuda.cupy.cuda.Stream(non_blocking=True)
    with stream, fused.as_tensors(array):
        pass
    assert asked == [("default", 0), "left", ("external", stream.ptr, 0), "left"]
