"""Fixtures of this room: the array libraries under test, the reference vectors, and layers that count their calls."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


class Library:
    """One array library: makes arrays from NumPy data, and reads them back."""

    def __init__(self, name: str) -> None:
        self.name = name

    def array(self, data: Any, dtype: str = "float32") -> Any:
        host = np.asarray(data, dtype=dtype)
        if self.name == "numpy":
            return host
        module = importlib.import_module(self.name)
        return module.from_numpy(host.copy()) if self.name == "torch" else module.asarray(host)

    def numpy(self, array: Any) -> np.ndarray:
        if self.name == "cupy":
            return array.get()
        return np.asarray(array)

    def owns(self, array: Any) -> bool:
        return type(array).__module__.split(".")[0] == self.name


# CuPy's arithmetic needs a device; its storage and accounting are tested over host memory, in test_cupy_host.py.
LIBRARIES = ["numpy", "torch", *([pytest.param("cupy", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=LIBRARIES)
def lib(request: pytest.FixtureRequest) -> Library:
    """Every library whose arithmetic runs on this machine."""
    return Library(request.param)


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """The reference behaviour of the five systems, as numbers."""
    return json.loads(Path(__file__).with_name("seed_vectors.json").read_text())


class Counting:
    """A step that counts the calls of an inner one, and writes them down in order."""

    def __init__(self, inner: Any, log: list[str] | None = None, label: str = "") -> None:
        self.inner = inner
        self.forwards = 0
        self.backwards = 0
        self._log = log
        self._label = label

    def forward(self, x: Any) -> Any:
        self.forwards += 1
        if self._log is not None:
            self._log.append(f"F{self._label}")
        return self.inner.forward(x)

    def backward(self, x: Any, grad: Any) -> Any:
        self.backwards += 1
        if self._log is not None:
            self._log.append(f"B{self._label}")
        return self.inner.backward(x, grad)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture
def counting() -> type[Counting]:
    return Counting


@pytest.fixture
def plain_gradients() -> Any:
    """(steps, x, grad) -> (output, gradient of x): every input remembered, nothing recomputed."""

    def run(steps: list[Any], x: Any, grad: Any) -> tuple[Any, Any]:
        inputs = []
        for step in steps:
            inputs.append(x)
            x = step.forward(x)
        for step, kept in zip(reversed(steps), reversed(inputs), strict=True):
            grad = step.backward(kept, grad)
        return x, grad

    return run


@pytest.fixture
def interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels on torch CPU tensors, through the interpreter."""
    monkeypatch.setenv("GPUCKPT_BACKEND", "triton")
