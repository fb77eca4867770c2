"""Teeth: each deliberate fault in a kernel's source must be caught by the very checks that the tests use."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from gpuckpt.kernels.device.casts import INTERPRETED
from gpuckpt.kernels.host.tiles import TileConfig, epilogue_n

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="these tests run on CPU tensors, in Triton's interpreter"),
    # A faulty kernel may compute on the NaN beside its operands, of which numpy warns.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SQUARE = TileConfig(16, 16, 16, 4, 1, group_m=2)
SPLIT = TileConfig(32, 64, 16, 1, 1, group_m=2)
"""One warp for 32 rows: the backward epilogue takes the 64 columns in two pieces."""


@pytest.fixture(scope="session")
def linear_tests():
    """The module with the checks, loaded by path: tests are no package."""
    path = Path(__file__).with_name("test_linear.py")
    spec = importlib.util.spec_from_file_location("linear_checks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FORWARD = {
    "no bias": ("epilogue", "v += widen(", "v += 0 * widen("),
    "dropped residual": ("epilogue", "y += widen(own_r", "y += 0 * widen(own_r"),
    "activation forgotten": ("epilogue", "y = activate(v, ACT, p_y.dtype.element_ty, INTERPRET)", "y = v"),
    "another activation": (
        "activations_16",
        "_sigmoid(z * -1.4426950409, INTERPRET)\n        y = z * s",
        "_sigmoid(z * -1.4426950409, INTERPRET)\n        y = s",
    ),
    "swapped operands": (
        "gemm",
        "tl.dot(operand(b_a, INTERPRET), operand(b_b, INTERPRET), acc",
        "tl.dot(operand(tl.trans(b_b), INTERPRET), operand(tl.trans(b_a), INTERPRET), acc",
    ),
    "missing mask over K": ("gemm", "m_k = o_k < K - i_k * BK", "m_k = o_k < BK"),
    "last step of K left out": ("gemm", "range(0, tl.cdiv(K, BK))", "range(0, K // BK)"),
    "no accumulation": ("gemm", "acc, input_precision", "tl.zeros((BM, BN), tl.float32), input_precision"),
    "tiles in the wrong place": ("gemm", "within // rows", "within // GROUP_M"),
}

BACKWARD = {
    "no bias": ("epilogue", "v += widen(", "v += 0 * widen("),
    "derivative of another activation": (
        "activations_16",
        "d = s * (1.0 + z * rest)",
        "d = s * rest",
    ),
    "derivative forgotten": ("epilogue", "* derivative(v, ACT, p_dz.dtype.element_ty, INTERPRET)", "* 1.0"),
    "value instead of derivative": ("epilogue", "* derivative(v", "* activate(v"),
    "half of the tile twice": ("epilogue", "v = parts[i]", "v = parts[0]"),
    "db of one row of tiles": ("linear", "p_db += i_m.to(tl.int64) * strides_db[0]", "p_db += 0 * strides_db[0]"),
    "h left unactivated": ("epilogue", "h = activate(v, ACT, p_h.dtype.element_ty, INTERPRET)", "h = v"),
}


@pytest.mark.parametrize("fault", FORWARD)
def test_forward_fault_is_caught(fault, mutant, linear_tests, as_good_as_torch):
    kernels = mutant(*FORWARD[fault])
    fwd = importlib.import_module(f"{kernels.__name__}.linear").linear_fwd
    x, w, b, r, _ = linear_tests.draw(48, 70, 53, torch.bfloat16)
    # The original passes with the very same arguments, so that it is the fault that is caught.
    linear_tests.check_forward(as_good_as_torch, x, w, b, r, "silu", SQUARE)
    with pytest.raises(AssertionError, match="error"):
        linear_tests.check_forward(as_good_as_torch, x, w, b, r, "silu", SQUARE, fwd=fwd)


@pytest.mark.parametrize("fault", BACKWARD)
def test_backward_fault_is_caught(fault, mutant, linear_tests, as_good_as_torch):
    kernels = mutant(*BACKWARD[fault])
    assert epilogue_n(SPLIT) < SPLIT.bn
    bwd = importlib.import_module(f"{kernels.__name__}.linear").linear_recompute_bwd
    x, w, b, _, dy = linear_tests.draw(48, 70, 53, torch.bfloat16)
    linear_tests.check_backward(as_good_as_torch, x, w, b, dy, "silu", SPLIT)
    with pytest.raises(AssertionError, match="error"):
        linear_tests.check_backward(as_good_as_torch, x, w, b, dy, "silu", SPLIT, bwd=bwd)


def test_a_mutation_that_no_longer_applies_is_an_error(mutant):
    with pytest.raises(AssertionError, match="adapt the mutation"):
        mutant("linear", "text that is not there", "")
