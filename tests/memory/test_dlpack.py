"""Exchange between libraries: the same bytes, or a refusal that names the reason."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from gpuckpt import CheckpointBudget
from gpuckpt.errors import DLPackRefused
from gpuckpt.memory.dlpack import exchange


@pytest.fixture
def jax():
    return pytest.importorskip(
        "jax", reason="JAX is not installed; its exchange was verified by hand, see docs/promises.md"
    )


def test_numpy_and_torch_share_their_bytes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = exchange(array, "torch")
    tensor[0, 0] = 42
    assert array[0, 0] == 42
    back = exchange(tensor, "numpy")
    back[1, 2] = 43
    assert array[1, 2] == 43
    assert exchange(array, "numpy") is array


def test_either_side_keeps_the_bytes_alive():
    tensor = exchange(np.full(1 << 16, 7, np.int64), "torch")
    gc.collect()
    assert int(tensor.sum()) == 7 << 16
    array = exchange(torch.full((1 << 16,), 3), "numpy")
    gc.collect()
    assert int(array.sum()) == 3 << 16


def test_the_exporter_dies_with_the_last_importer():
    class Owner(np.ndarray):
        pass

    owner = np.zeros(8).view(Owner)
    ref = weakref.ref(owner)
    tensor = exchange(owner, "torch")
    del owner
    gc.collect()
    assert ref() is not None
    del tensor
    gc.collect()
    assert ref() is None


def test_strided_zero_size_and_scalar_arrays_pass():
    array = np.arange(24.0).reshape(4, 6)[::2, 1::3]
    assert torch.equal(exchange(array, "torch"), torch.tensor(array.copy()))
    assert exchange(np.zeros((0, 3), np.int8), "torch").shape == (0, 3)
    assert exchange(torch.tensor(5), "numpy").shape == ()


REFUSED_TORCH = {
    "gradient": (lambda: torch.ones(2, requires_grad=True), "numpy", "detach"),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "numpy", "resolve_conj"),
    "negative": (lambda: torch._neg_view(torch.ones(2)), "numpy", "resolve_neg"),
    "bfloat16": (lambda: torch.ones(2).bfloat16(), "numpy", "view\\(torch.uint8\\)"),
    "float8": (lambda: torch.ones(2).to(torch.float8_e5m2), "numpy", "float8_e5m2"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "numpy", "sparse_coo"),
    "host to cupy": (lambda: torch.ones(2), "cupy", "CUDA memory only"),
}


@pytest.mark.parametrize("case", REFUSED_TORCH)
def test_torch_tensors_that_cannot_travel_are_refused_by_name(case):
    make, library, reason = REFUSED_TORCH[case]
    with pytest.raises(DLPackRefused, match=reason):
        exchange(make(), library)


def read_only(array):
    array.flags.writeable = False
    return array


REFUSED_NUMPY = {
    "negative strides": (lambda: np.arange(4)[::-1], "negative strides"),
    "read-only": (lambda: read_only(np.arange(4)), "read-only"),
    "byte order": (lambda: np.arange(4, dtype=">i4"), ">i4"),
    "objects": (lambda: np.array([None]), "object"),
    "structured": (lambda: np.zeros(2, [("a", "i4")]), "cannot be exchanged"),
    "dates": (lambda: np.zeros(2, "M8[s]"), "datetime64"),
    "odd strides": (lambda: np.zeros(4, [("a", "u1"), ("b", "<f4")])["b"], "no multiples"),
    "long double": (lambda: np.zeros(2, np.longdouble), "no other library"),
}


@pytest.mark.parametrize("case", REFUSED_NUMPY)
def test_numpy_arrays_that_cannot_travel_are_refused_by_name(case):
    make, reason = REFUSED_NUMPY[case]
    with pytest.raises(DLPackRefused, match=reason):
        exchange(make(), "torch")


def test_a_capsule_is_refused():
    with pytest.raises(DLPackRefused, match="negotiates no stream"):
        exchange(torch.ones(2).__dlpack__(), "numpy")


def test_what_is_no_array_and_an_unknown_library_are_refused():
    with pytest.raises(TypeError, match="got list"):
        exchange([1, 2], "torch")
    with pytest.raises(ValueError, match="tensorflow"):
        exchange(np.ones(2), "tensorflow")


def test_cupy_arrays_stay_where_they_are(hostcuda):
    cupy = hostcuda.cupy
    array = cupy.asarray(np.arange(6))
    with pytest.raises(DLPackRefused, match="host memory only"):
        exchange(array, "numpy")
    with pytest.raises(DLPackRefused, match="without a copy"):
        exchange(array, "torch")  # a CPU build of torch, and rightly so
    with pytest.raises(DLPackRefused, match="negative strides"):
        exchange(array[::-1], "torch")
    with pytest.raises(DLPackRefused, match="CUDA memory only"):
        exchange(np.ones(2), "cupy")


class Exporter:
    """A foreign library's array on a CUDA device: exports itself, and records the stream it was asked for."""

    def __init__(self, array):
        self.array = array
        self.streams = []

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_streams_are_negotiated_by_the_objects(hostcuda):
    cupy = hostcuda.cupy
    exporter = Exporter(cupy.asarray(np.arange(6)))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        imported = exchange(exporter, "cupy")
    assert exporter.streams == [stream.ptr], "the importer names its stream, so that the exporter can order the two"
    assert imported.data.ptr == exporter.array.data.ptr


def test_a_loaded_view_can_travel_and_keeps_its_block():
    budget = CheckpointBudget(1024, device="cpu", hold="pool")
    saved = budget.save(np.arange(8.0))
    tensor = exchange(saved.load(), "torch")
    saved.free()
    assert budget.used_bytes == 64
    assert tensor.tolist() == list(range(8))
    del tensor
    gc.collect()
    assert budget.used_bytes == 0


def test_jax_shares_its_bytes(jax):
    array = jax.numpy.arange(8.0)
    assert exchange(array, "numpy").ctypes.data == array.unsafe_buffer_pointer()
    assert exchange(array, "torch").data_ptr() == array.unsafe_buffer_pointer()
    aligned = CheckpointBudget(64, device="cpu", hold="pool").take(64, "aligned")
    assert exchange(np.asarray(aligned), "jax").unsafe_buffer_pointer() == aligned.address


def test_jax_arrays_live_in_a_budget(jax):
    budget = CheckpointBudget(1024, device="cpu", hold="pool")
    saved = budget.save(jax.numpy.arange(8, dtype=jax.numpy.float32))
    view = saved.load()
    assert isinstance(view, jax.Array)
    assert view.tolist() == list(range(8))
    assert budget.used_bytes == 32
    saved.free()
    assert budget.used_bytes == 32, "the view holds the block"
    del view
    gc.collect()
    assert budget.used_bytes == 0


def test_what_jax_would_copy_is_refused(jax):
    with pytest.raises(DLPackRefused):
        exchange(np.arange(24.0).reshape(4, 6)[:, ::2], "jax")
    with pytest.raises(DLPackRefused):
        exchange(jax.numpy.ones(4, jax.numpy.bfloat16), "numpy")
