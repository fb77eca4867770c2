"""What would be launched on a GPU is legal, spills nothing, and comes through tensor maps and tensor cores where it should.

Every launcher goes through Triton's own specialisation, ptxas, the encoding of tensor maps and the compiled launcher, over a
driver that holds them against its documentation (`driver.py`). `make test` takes the operations with autograd and the largest
kernels for sm_90, `make nightly` every launcher for three architectures.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.drivercuda.driver import Unavailable, library

ROOT = Path(__file__).parents[2]
FEW = "* summed,linear_cross_entropy whole,gated_bwd triple bf16,linear_bwd bf16,linear_fwd bf16,norm_bwd"
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
GEMMS = {  # and how many operands they load
    "linear_fwd_kernel": 2,
    "linear_recompute_bwd_kernel": 2,
    "mlp_dual_bwd_kernel": 4,
    "gated_fwd_kernel": 3,
    "gated_plain_bwd_kernel": 3,
    "gated_triple_bwd_kernel": 5,
}


def lines(*options: str) -> dict[str, dict[str, Any]]:
    try:
        library()
    except Unavailable as reason:
        pytest.skip(f"kernels cannot be launched over a stand-in driver here: {reason}")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.drivercuda.launches", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def check(found: dict[str, dict[str, Any]], arch: int) -> None:
    for name, row in found.items():
        assert row["launches"], f"{name} launched nothing"
        for launch in row["launches"]:
            what = f"{name}: { {k: v for k, v in launch.items() if k != 'given'} }"
            assert launch["spill_stores"] == launch["spill_loads"] == 0, what
            assert launch["registers"] * launch["threads"] <= 65536, what
            if launch["kernel"] not in GEMMS or "fp32" in name:
                continue
            assert launch["tensor_core"].get(TENSOR_CORE[arch]), what
            regular = "odd" not in name
            operands = GEMMS[launch["kernel"]]
            assert launch["maps"] == (operands if regular and arch >= 90 else 0), what
            assert (launch["tma_loads"] > 0) == (regular and arch >= 90), what
            if regular and arch == 80:
                assert launch["async_copies"] > 0, what


def check_repeated(found: dict[str, dict[str, Any]]) -> None:
    """What was prepared once launches what Triton's own way had: the same kernel with the same arguments, on the tensors of
    this call."""
    for name, row in found.items():
        assert len(row["again"]) == len(row["launches"]), name
        for first, second in zip(row["launches"], row["again"], strict=True):
            assert second["direct"], f"{name} went through Triton's specialisation a second time"
            assert second | {"direct": False} == first | {"direct": False}, name
            assert sum(str(given).count("tensor ") for given in first["given"]) >= 3, name


def test_operations_and_the_largest_kernels_on_sm_90():
    found = lines("--arch", "90", "--only", FEW)
    assert len(found) == 8
    check(found, 90)
    check_repeated(found)
    assert found["linear_fwd bf16"]["launches"][0]["grid"] == [132, 1, 1], "persistent: a program a multiprocessor"
    kernels = [launch["kernel"] for launch in found["gated_mlp summed"]["launches"]]
    assert kernels == ["gated_fwd_kernel", "gated_plain_bwd_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_launcher(arch):
    found = lines("--arch", str(arch))
    assert len(found) == 35
    check(found, arch)
    check_repeated(found)


@pytest.mark.slow
def test_what_a_call_costs_in_python():
    """Microseconds for forward and backward, printed; what is checked is only that they were measured."""
    found = lines("--arch", "90", "--cost")
    for name, row in found.items():
        print(f"{name}: {row['us']} us, eager {row['eager_us']} us of this machine's Python")
        assert row["us"] > row["eager_us"] / 10
    assert len(found) == 4


class TensorMap(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 128)]


@pytest.fixture
def driver():
    try:
        return ctypes.CDLL(str(library("libdrivercuda.so")))
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_the_stand_in_is_not_taken_for_a_driver(driver: Any):
    """It is in this process, and who asks for CUDA finds what was there before: a driver or none."""
    assert hasattr(driver, "drivercuda_launches")
    try:
        found = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    assert hasattr(found, "cuInit")
    assert not hasattr(found, "drivercuda_launches")


def encode(driver: Any, *, address=0, sizes=(64, 64), stride=128, box=(64, 64), swizzle=3) -> str | None:
    """None, or why the stand-in refuses the map of a bf16 matrix (9: bfloat16; swizzle 3: 128 bytes)."""
    room = ctypes.create_string_buffer(256)
    at = -ctypes.addressof(room) % 64 + ctypes.addressof(room)
    driver.drivercuda_why.restype = ctypes.c_char_p
    status = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), 9, 2, ctypes.c_void_p(4096 + address), (ctypes.c_uint64 * 2)(*sizes),
        (ctypes.c_uint64 * 1)(stride), (ctypes.c_uint32 * 2)(*box), (ctypes.c_uint32 * 2)(1, 1), 0, swizzle, 0, 0,
    )  # fmt: skip
    return driver.drivercuda_why().decode() if status else None


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({}, None),
        ({"address": 8}, "aligned to 16"),
        ({"stride": 136}, "multiple of 16"),
        ({"stride": 64}, "rows overlap"),
        ({"sizes": (0, 64)}, "a size is 0"),
        ({"box": (64, 512)}, "beyond 256"),
        ({"box": (128, 64)}, "beyond the swizzle"),
        ({"box": (4, 64)}, "inner side of the box is no multiple"),
    ],
)
def test_the_stand_in_refuses_what_a_driver_refuses(driver, wrong, why):
    found = encode(driver, **wrong)
    assert found is None if why is None else why in found
