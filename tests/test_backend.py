"""Which back end runs, and what is said where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import torch
import triton

from gpuckpt.backend import load_kernels, use_triton
from gpuckpt.errors import BackendUnavailable


def test_the_device_decides(monkeypatch):
    monkeypatch.delenv("GPUCKPT_BACKEND", raising=False)
    assert not use_triton(torch.zeros(1))


@pytest.mark.parametrize(("choice", "expected"), [("triton", True), ("torch", False), ("", False)])
def test_the_variable_overrides(choice, expected, monkeypatch):
    monkeypatch.setenv("GPUCKPT_BACKEND", choice)
    assert use_triton(torch.zeros(1)) is expected


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("GPUCKPT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="GPUCKPT_BACKEND='cuda': expected one of triton, torch"):
        use_triton(torch.zeros(1))


def test_without_triton_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendUnavailable, match="pip install triton, or set GPUCKPT_BACKEND=torch"):
        load_kernels(torch.zeros(1))


def test_too_late_for_the_interpreter(monkeypatch):
    compiled = triton.JITFunction(getattr(triton.language.cdiv, "fn", triton.language.cdiv))
    monkeypatch.setattr(triton.language, "cdiv", compiled)
    with pytest.raises(BackendUnavailable, match="set TRITON_INTERPRET=1 before Python starts"):
        load_kernels(torch.zeros(1))


@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "works"),
    [("3.6.0", "2.5.2", False), ("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.5.2", True)],
)
def test_an_interpreter_that_this_numpy_breaks_is_named(of_triton, of_numpy, works, monkeypatch):
    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(numpy, "__version__", of_numpy)
    if works:
        load_kernels(torch.zeros(1))
        return
    with pytest.raises(BackendUnavailable, match=r"install triton>=3\.7, or numpy<2\.4"):
        load_kernels(torch.zeros(1))


RUN = """
import sys
import torch
from gpuckpt.functional import linear
print(linear(torch.ones(2, 3), torch.ones(4, 3), activation="relu")[0, 0].item(), "triton" in sys.modules)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the kernels are compiled")
def test_the_interpreter_is_chosen_where_it_is_needed():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env=env | {"GPUCKPT_BACKEND": "triton"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.strip() == "3.0 True"
