"""No kernel touches an address outside of its operands, on fuzzed shapes and strides; and the check itself has teeth."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import gpuckpt.kernels
from gpuckpt.kernels.device.casts import INTERPRETED
from tests.sanitizer import Arena, Fault, watch

sys.path.insert(0, str(Path(__file__).parent))

from tests.kernels.fuzzed_launches import CASES, SEVERAL, Call

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="these tests run on CPU tensors, in Triton's interpreter"),
    # Masked-off lanes compute on nothing in particular, of which numpy warns.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

CALLS = 16


def fuzz(kernel, package):
    """(kernels launched, lanes checked) over all calls of a case."""
    launches, lanes = [], 0
    for number in range(CALLS):
        try:
            seen = CASES[kernel](Call(kernel, number, package))
        except Fault as fault:
            raise Fault(f"call {number}: {fault}") from fault
        launches += seen.launches
        lanes += seen.lanes
    return launches, lanes


def kernels_of(case):
    return SEVERAL.get(case, {f"{case}_kernel"})


@pytest.mark.parametrize("kernel", CASES)
def test_no_lane_leaves_its_operands(kernel):
    launches, lanes = fuzz(kernel, gpuckpt.kernels)
    assert set(launches) == kernels_of(kernel)
    assert len(launches) >= CALLS - 3, "at most M, N and D of zero launch nothing"
    assert lanes > 100 * CALLS


def test_every_kernel_there_is_is_fuzzed():
    names = [m.name for m in pkgutil.walk_packages(gpuckpt.kernels.__path__, "gpuckpt.kernels.")]
    modules = [importlib.import_module(name) for name in names]
    assert set().union(*map(kernels_of, CASES)) == {
        name for module in modules for name in vars(module) if name.endswith("_kernel")
    }


MUTANTS = {
    "rows of x unmasked": (
        "linear_fwd",
        "gemm",
        "mask=m_m[:, None] & m_k[None, :]",
        "mask=(m_m[:, None] | True) & m_k[None, :]",
    ),
    "columns of the weight unmasked": ("mlp_dual_bwd", "gemm", "m_n = o_n < N", "m_n = o_n >= 0"),
    "last step of K unmasked": ("gated_fwd", "gemm", "m_k = o_k < K - i_k * BK", "m_k = o_k < BK"),
    "wrong stride in K": ("linear_recompute_bwd", "gemm", "p_b += step * strides_b[1]", "p_b += step * strides_b[0]"),
    "output unmasked in M": ("linear_fwd", "epilogue", "(o_m < M)[:, None]", "(o_m >= 0)[:, None]"),
    "bias unmasked": ("linear_fwd", "epilogue", "mask=o_n < N, other", "mask=o_n < N + 64, other"),
    "half of the tile twice": (
        "linear_recompute_bwd",
        "epilogue",
        "o_n = col0 + i * EPILOGUE_N",
        "o_n = col0 + 0 * EPILOGUE_N",
    ),
    "all partial sums in one row": (
        "linear_recompute_bwd",
        "linear",
        "p_db += i_m.to(tl.int64) * strides_db[0]",
        "p_db += 0 * strides_db[0]",
    ),
    "gate written beyond N": (
        "gated_triple_bwd",
        "gated_epilogue",
        "m = (o_m < M)[:, None] & m_n[None, :]",
        "m = (o_m < M)[:, None] | m_n[None, :]",
    ),
    "target used as an address": (
        "cross_entropy_fwd",
        "cross_entropy",
        "mask=inside, other=0.0",
        "mask=target >= 0, other=0.0",
    ),
    "row one too long": ("cross_entropy_bwd", "cross_entropy", "INTERPRET), mask=o < V", "INTERPRET), mask=o <= V"),
    "norm over a row too long": ("norm_fwd", "norm", "mask=k + o_k < K, other", "mask=k + o_k <= K, other"),
    "statistics of rows beyond M": ("norm_bwd", "norm", "mask=o_m < M, other", "mask=o_m <= M, other"),
}
"""Fault -> (case, module, text, the text that takes its place)."""


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_faulty_kernel_is_caught(fault, mutant):
    kernel, *mutation = MUTANTS[fault]
    with pytest.raises(Fault, match=rf"^call \d+: {kernel}\w*_kernel: (program|\d+ elements)"):
        fuzz(kernel, mutant(*mutation))


@triton.jit
def copy_kernel(p_x, p_y, n, m, BLOCK: tl.constexpr):
    """y[:m] = x[:n], both checked against the size given and no other."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n, other=0.0), mask=o < m)


@triton.jit
def shift_kernel(p_x, n, BLOCK: tl.constexpr):
    """Each program reads what its neighbour writes."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(p_x + o + 1, mask=o + 1 < n, other=0.0)
    tl.store(p_x + o, v, mask=o < n)


@triton.jit
def count_kernel(p_x, BLOCK: tl.constexpr):
    tl.atomic_add(p_x + tl.arange(0, BLOCK), 1.0)


@triton.jit
def reinterpret_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x.to(tl.pointer_type(tl.float16)) + 2 * o))


@triton.jit
def same_kernel(p_x, p_y, BLOCK: tl.constexpr):
    """Every program writes all of y."""
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o))


@triton.jit
def described_copy_kernel(d_x, p_y, BLOCK: tl.constexpr):
    tl.store(p_y + tl.arange(0, BLOCK), d_x.load([0, 0]).reshape(BLOCK))


def vectors(n=24):
    arena = Arena()
    x, y = arena.tensor("x", (n,), torch.float32, (1,)), arena.tensor("y", (n,), torch.float32, (1,))
    x.copy_(torch.arange(n))
    arena.keep(x)
    return arena, x, y


def test_a_sound_kernel_passes_and_is_counted():
    arena, x, y = vectors()
    with watch(y) as seen:
        copy_kernel[(2,)](x, y, 24, 24, BLOCK=16)
    arena.check()
    assert torch.equal(x, y)
    assert seen.launches == ["copy_kernel"]
    assert seen.lanes == 2 * 24


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        (25, 24, r"program 1 loads from 1 of 9 addresses out of bounds"),
        (24, 32, r"program 1 stores to 8 of 16 addresses out of bounds"),
        (24, 23, r"1 of 24 elements were never written"),
    ],
)
def test_a_mask_that_is_off_by_little(n, m, message):
    arena, x, y = vectors()
    with pytest.raises(Fault, match=message), watch(y):
        copy_kernel[(2,)](x, y, n, m, BLOCK=16)
    arena.check()  # the access itself never happened


def test_the_gap_between_elements_is_out_of_bounds():
    x = torch.zeros(48)[::2]
    with pytest.raises(Fault, match="loads from"), watch():
        copy_kernel[(1,)](x, torch.zeros(16), 16, 16, BLOCK=16)


def test_an_input_must_not_be_written_nor_an_element_twice():
    x, y = torch.zeros(16), torch.zeros(16)
    with pytest.raises(Fault, match="program 0 writes an input"), watch(x):
        copy_kernel[(1,)](x, y, 16, 16, BLOCK=16)
    with pytest.raises(Fault, match="program 1 writes an element for the second time"), watch(y):
        same_kernel[(2,)](x, y, BLOCK=16)


def test_a_race_is_seen_though_programs_run_one_after_another():
    x = torch.zeros(32)
    with pytest.raises(Fault, match="1 elements are written by one program and read by another"), watch(x):
        shift_kernel[(2,)](x, 32, BLOCK=16)


def test_atomics_casts_and_descriptors_are_watched():
    with pytest.raises(Fault, match="modifies 1 of 16"), watch():
        count_kernel[(1,)](torch.zeros(15), BLOCK=16)
    with pytest.raises(Fault, match=r"loads from 8 of 16 addresses out of bounds"), watch():
        reinterpret_kernel[(1,)](torch.zeros(8), torch.zeros(16), BLOCK=16)
    whole = torch.zeros(4, 16, dtype=torch.float16)
    y = torch.zeros(64, dtype=torch.float16)
    with watch(y):
        described_copy_kernel[(1,)](TensorDescriptor(whole[:3], [3, 16], [16, 1], [4, 16]), y, BLOCK=64)
    with pytest.raises(Fault, match="loads from 16 of 64"), watch():
        described_copy_kernel[(1,)](TensorDescriptor(whole[:3], [4, 16], [16, 1], [4, 16]), y, BLOCK=64)


def test_the_arena_sees_a_write_that_the_watch_did_not():
    arena, x, y = vectors()
    copy_kernel[(2,)](x, y, 24, 25, BLOCK=16)
    with pytest.raises(Fault, match="memory around y"):
        arena.check()
    arena, x, _ = vectors()
    x[3] = 0
    with pytest.raises(Fault, match="input x was changed"):
        arena.check()
