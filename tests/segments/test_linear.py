"""`LinearSegment` and `Dense`: arithmetic, gradients, errors, and the choice of back end."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch

from gpuckpt.errors import DimMismatch
from gpuckpt.segments import Dense, Layer, LinearSegment, Recomputable
from gpuckpt.segments.fused import runs_fused
from gpuckpt.segments.pointwise import POINTWISE, activate, derivative

ACTIVATIONS = tuple(POINTWISE)


def torch_activation(name: str, z: torch.Tensor) -> torch.Tensor:
    functions = {
        "identity": lambda t: t,
        "relu2": lambda t: torch.relu(t) ** 2,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    return functions.get(name, getattr(torch, name, None))(z)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_derivatives_are_torchs(lib: Any, name: str) -> None:
    z = np.concatenate([np.linspace(-8, 8, 161), [-700.0, 700.0, 1e-9]])
    reference = torch.tensor(z, requires_grad=True)
    y = torch_activation(name, reference)
    y.sum().backward()
    np.testing.assert_allclose(lib.numpy(activate(name, lib.array(z, "float64"))), y.detach(), rtol=1e-12, atol=1e-14)
    ours = lib.numpy(derivative(name, lib.array(z, "float64")))
    np.testing.assert_allclose(ours, reference.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (0, 5)])
def test_gradients_are_autograds(lib: Any, activation: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    x, grad = rng.standard_normal(shape), rng.standard_normal((*shape[:-1], 4))
    layer = Dense(5, 4, activation, seed=9, like=lib.array([0.0], "float64"))
    layer.set_params([layer.weights, lib.array(rng.standard_normal(4), "float64")])

    w, b = (torch.tensor(lib.numpy(p), requires_grad=True) for p in layer.params)
    tx = torch.tensor(x, requires_grad=True)
    y = torch_activation(activation, tx @ w.T + b)
    y.backward(torch.tensor(grad))

    np.testing.assert_allclose(lib.numpy(layer.forward(lib.array(x, "float64"))), y.detach(), rtol=1e-12, atol=1e-14)
    dx = layer.backward(lib.array(x, "float64"), lib.array(grad, "float64"))
    assert dx.shape == shape
    for ours, theirs in zip([dx, *layer.gradients], [tx.grad, w.grad, b.grad], strict=True):
        np.testing.assert_allclose(lib.numpy(ours), theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("activation", ["identity", "gelu_tanh", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 2, 5)])
def test_the_fused_kernel_gives_the_plain_results(
    monkeypatch: pytest.MonkeyPatch, activation: str, bias: bool, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(*shape, generator=generator), torch.randn(*shape[:-1], 6, generator=generator)
    results = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("GPUCKPT_BACKEND", backend)
        layer = Dense(5, 6, activation, bias=bias, seed=2, like=torch.zeros(1))
        if bias:
            layer.set_params([layer.weights, torch.linspace(-1, 1, 6)])
        assert runs_fused(x) == (backend == "triton")
        results[backend] = [layer.forward(x), layer.backward(x, grad), *layer.gradients]
    assert len(results["triton"]) == 3 + bias
    for fused, plain in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(fused, plain, rtol=2e-6, atol=2e-6)


def test_the_fused_kernel_is_really_launched(monkeypatch: pytest.MonkeyPatch, interpreted_kernels: None) -> None:
    import gpuckpt.kernels.linear as kernels

    launched = []

    def spied(name: str, real: Any) -> Any:
        def spy(*args: Any, **kwargs: Any) -> None:
            launched.append(name)
            real(*args, **kwargs)

        return spy

    for name in ("linear_fwd", "linear_recompute_bwd"):
        monkeypatch.setattr(kernels, name, spied(name, getattr(kernels, name)))
    segment = LinearSegment.random_init(3, 2, 1, like=torch.zeros(1))
    x = torch.ones(4, 3)
    segment.backward(x, segment.forward(x))
    assert launched == ["linear_fwd"], "dz of the identity is dy: there is nothing to recompute"
    layer = Dense(3, 2, "silu", like=torch.zeros(1))
    layer.backward(x, layer.forward(x))
    assert launched == ["linear_fwd", "linear_fwd", "linear_recompute_bwd"]


def test_what_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUCKPT_BACKEND", raising=False)
    assert not runs_fused(torch.zeros(1))
    monkeypatch.setenv("GPUCKPT_BACKEND", "triton")
    assert runs_fused(torch.zeros(1, dtype=torch.bfloat16))
    assert not runs_fused(torch.zeros(1, dtype=torch.float64)), "the kernels have no float64"
    assert not runs_fused(np.zeros(1, np.float32))
    monkeypatch.setenv("GPUCKPT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="GPUCKPT_BACKEND='cuda'"):
        runs_fused(torch.zeros(1))


def test_both_are_what_they_claim_to_be() -> None:
    assert isinstance(Dense(2, 3), Layer)
    assert isinstance(LinearSegment.random_init(2, 3, 0), Recomputable)
    layer = Dense(2, 3, "tanh")
    assert (layer.layer_type, layer.parameter_count, layer.layer_description) == ("Dense", 9, "Dense(2 -> 3, tanh)")
    assert layer.is_training
    layer.set_training(False)
    assert not layer.is_training


def test_gradients_add_up_until_an_update_uses_them(lib: Any) -> None:
    layer = Dense(2, 2, like=lib.array([0.0], "float64"))
    before = [lib.numpy(p).copy() for p in layer.params]
    owned = layer.weights
    x, grad = lib.array([[1.0, 2.0]], "float64"), lib.array([[1.0, -1.0]], "float64")
    assert layer.gradients == []
    layer.backward(x, grad)
    layer.backward(x, grad)
    np.testing.assert_allclose(lib.numpy(layer.gradients[0]), [[2, 4], [-2, -4]])
    np.testing.assert_allclose(lib.numpy(layer.gradients[1]), [2, -2])
    layer.update(0.5)
    assert layer.gradients == []
    np.testing.assert_allclose(lib.numpy(layer.weights), before[0] - [[1, 2], [-1, -2]])
    np.testing.assert_allclose(lib.numpy(layer.bias), before[1] - [1, -1])
    assert layer.weights is owned, "an update is written into the parameter's own memory"


def test_sizes_are_known_without_computing(lib: Any) -> None:
    segment = LinearSegment.random_init(3, 5, 0, like=lib.array([0.0]))
    x = lib.array(np.zeros((4, 3)))
    assert segment.input_memory_bytes(x) == 48
    assert segment.output_memory_bytes(x) == segment.forward(x).nbytes == 80


@pytest.mark.parametrize(
    ("make", "expected", "got"),
    [
        (lambda: LinearSegment([1.0] * 5, 2, 3), 6, 5),
        (lambda: LinearSegment(np.zeros((2, 3), np.float32), 2, 3), 3, 2),
        (lambda: LinearSegment([1.0] * 6, 2, 3).forward([1.0]), 2, 1),
        (lambda: LinearSegment([1.0] * 6, 2, 3).forward(np.zeros((2, 3), np.float32)), 2, 3),
        (lambda: LinearSegment([1.0] * 6, 2, 3).forward(1.0), 2, 0),
        (lambda: LinearSegment([1.0] * 6, 2, 3).backward([1.0, 2.0], [1.0, 2.0]), 3, 2),
        (lambda: Dense(2, 3).backward(np.zeros((4, 2)), np.zeros((5, 3))), 4, 5),
        (lambda: Dense(2, 3).set_params([np.zeros((3, 2))]), 2, 1),
        (lambda: Dense(2, 3).set_gradients([np.zeros((3, 2)), np.zeros(2)]), 3, 2),
    ],
)
def test_wrong_lengths_name_both_numbers(make: Any, expected: int, got: int) -> None:
    with pytest.raises(DimMismatch) as error:
        make()
    assert (error.value.expected, error.value.got) == (expected, got)
    assert f"expected {expected}, got {got}" in str(error.value)


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        Dense(2, 3, "gelu")
    with pytest.raises(ValueError, match="0 -> 3"):
        Dense(0, 3)
    with pytest.raises(TypeError, match="torch on cpu, the weights are numpy on cpu"):
        Dense(2, 3).forward(torch.zeros(2))


def test_lists_and_flat_weights() -> None:
    segment = LinearSegment([1, 2, 3, 4, 5, 6], 3, 2, name="first")
    assert segment.name == "first"
    np.testing.assert_array_equal(segment.forward([1.0, 0.0, -1.0]), np.asarray([-2, -2], np.float32))


def test_arrays_of_another_library_come_in_through_dlpack() -> None:
    class Foreign:
        """An array that only speaks DLPack."""

        def __init__(self, data: np.ndarray) -> None:
            self._data = data

        def __dlpack__(self, **kwargs: Any) -> Any:
            return self._data.__dlpack__(**kwargs)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self._data.__dlpack_device__()

    x = np.asarray([[1.0, 2.0, 3.0]], np.float32)
    segment = LinearSegment.random_init(3, 2, 5)
    np.testing.assert_array_equal(segment.forward(Foreign(x)), segment.forward(x))


def test_torch_inputs_leave_no_graph_behind() -> None:
    weights = torch.nn.Parameter(torch.ones(2, 3))
    segment = LinearSegment(weights, 3, 2)
    y = segment.forward(torch.ones(3, requires_grad=True))
    assert not y.requires_grad
    segment.backward(torch.ones(3), torch.ones(2))
    segment.update(1.0)
    np.testing.assert_array_equal(weights.detach(), np.zeros((2, 3)))  # the parameter itself was updated


def test_bfloat16_stays_bfloat16(interpreted_kernels: None) -> None:
    layer = Dense(4, 3, "relu", like=torch.zeros(1, dtype=torch.bfloat16))
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    y = layer.forward(x)
    dx = layer.backward(x, torch.ones_like(y))
    assert {t.dtype for t in (y, dx, *layer.gradients)} == {torch.bfloat16}
    assert array_api_compat.is_torch_array(y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("library", ["torch", "cupy"])
@pytest.mark.parametrize("bias", [True, False])
def test_on_a_device_the_fused_kernel_gives_numpys_results(library: str, bias: bool) -> None:
    """CuPy on a stream of its own: the kernel has to wait for what CuPy wrote there, and CuPy for the kernel."""
    import cupy

    rng = np.random.default_rng(4)
    x, grad = (rng.standard_normal((200, n)).astype(np.float32) for n in (96, 160))
    plain = Dense(96, 160, "gelu_tanh", bias=bias, seed=2)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        on_device = cupy.asarray if library == "cupy" else lambda a: torch.from_numpy(a).cuda()
        layer = Dense(96, 160, "gelu_tanh", bias=bias, seed=2, like=on_device(x[:1]))
        assert runs_fused(on_device(x))
        results = [layer.forward(on_device(x)), layer.backward(on_device(x), on_device(grad)), *layer.gradients]
        stream.synchronize()
    expected = [plain.forward(x), plain.backward(x, grad), *plain.gradients]
    for ours, theirs in zip(results, expected, strict=True):
        host = ours.get() if library == "cupy" else ours.cpu().numpy()
        np.testing.assert_allclose(host, theirs, rtol=1e-4, atol=1e-4)
