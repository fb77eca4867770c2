"""The roofline and occupancy models against figures worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpuckpt.kernels.audit import roofline as rl


def test_imports_neither_torch_nor_triton():
    script = (
        "import sys, gpuckpt.kernels.audit.roofline; assert not {'torch', 'triton', 'cupy', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_linear_forward_by_hand():
    shape = rl.Shape(M=1024, N=2048, K=512)
    work = rl.work_of("linear_fwd", shape, "bf16")
    assert work.flops == 2 * 1024 * 2048 * 512
    assert work.read_bytes == 2 * (1024 * 512 + 2048 * 512)
    assert work.write_bytes == 2 * 1024 * 2048
    assert work.intensity == work.flops / (work.read_bytes + work.write_bytes)
    h100 = rl.device("H100 SXM")
    assert rl.best_s(work, h100, "bf16") == pytest.approx(max(work.flops / 989e12, work.bytes / 3.35e12))


def test_dual_and_gated_count_every_gemm():
    shape = rl.Shape(M=64, N=96, K=32, O=16)
    product = 2 * 64 * 96
    assert rl.work_of("mlp_dual_bwd", shape, "fp16").flops == product * (32 + 16)
    gated = rl.work_of("gated_triple_bwd", shape, "fp16")
    assert gated.flops == product * (32 + 32 + 16)
    # x, two gate weights, dy, the down weight in; h, dz_g and dz_u out.
    assert gated.read_bytes == 2 * (64 * 32 + 2 * 96 * 32 + 64 * 16 + 96 * 16)
    assert gated.write_bytes == 2 * 3 * 64 * 96


def test_the_plain_gated_backward_reads_dh_and_writes_three():
    shape = rl.Shape(M=64, N=96, K=32, O=16)
    plain = rl.work_of("gated_plain_bwd", shape, "fp16")
    assert plain.flops == 2 * 64 * 96 * (32 + 32)
    assert plain.read_bytes == 2 * (64 * 32 + 2 * 96 * 32 + 64 * 96)
    assert plain.write_bytes == 2 * 3 * 64 * 96


def test_norms_by_hand():
    shape = rl.Shape(M=100, N=1, K=48)
    forward, rows, columns = (rl.work_of(f"norm_{k}", shape, "bf16") for k in ("fwd", "bwd_rows", "bwd_columns"))
    assert (forward.read_bytes, forward.write_bytes) == (2 * 100 * 48, 2 * 100 * 48)
    # x and the gradient in; dx and two statistics a row out; then both again, and a row of sums for dw and db each 32 rows.
    assert (rows.read_bytes, rows.write_bytes) == (2 * 2 * 100 * 48, 2 * 100 * 48 + 2 * 4 * 100)
    assert (columns.read_bytes, columns.write_bytes) == (2 * 2 * 100 * 48, 2 * 4 * 4 * 48)


def test_recompute_buys_memory_not_speed_beyond_a_width():
    # Saving and loading z (bf16) costs 4 M N bytes, computing it again 2 M N K flops: on an H100 they meet at K = 590.
    h100 = rl.device("h100 sxm")
    meet = 4 * h100.flops_per_s["bf16"] / (2 * h100.bytes_per_s)
    assert round(meet) == 590


def test_a_kernel_without_a_model_says_so():
    with pytest.raises(ValueError, match="no roofline model for kernel 'softmax'"):
        rl.work_of("softmax", rl.Shape(1, 1, 1), "bf16")


def test_whole_tiles_and_last_rounds_cost():
    a100 = rl.device("A100-80GB")  # 108 multiprocessors
    full = rl.Shape(M=128 * 108, N=128, K=4096)
    work = rl.work_of("linear_fwd", full, "bf16")
    assert rl.tile_s(work, full, 128, 128, a100, "bf16") == pytest.approx(rl.best_s(work, a100, "bf16"))
    more = rl.Shape(M=128 * 109, N=128, K=4096)
    work = rl.work_of("linear_fwd", more, "bf16")
    assert rl.tile_s(work, more, 128, 128, a100, "bf16") == pytest.approx(2 * 128 * 128 * 2 * 4096 / (312e12 / 108))


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks", "limit"),
    [
        # As NVIDIA's occupancy calculator has them.
        (80, 128, 0, 256, 2, "registers"),  # 65536 / (128 * 256)
        (80, 129, 0, 256, 1, "registers"),  # 129 rounds up to 136 a thread
        (80, 32, 65536, 256, 2, "shared memory"),  # (64 + 1) KiB twice in 164 KiB
        (80, 32, 0, 256, 8, "registers"),  # also all 64 warps
        (86, 16, 0, 64, 16, "blocks"),
        (89, 40, 0, 1024, 1, "registers"),
        (90, 32, 232_448, 256, 1, "shared memory"),
        (90, 32, 232_449, 256, 0, "shared memory"),
        (120, 24, 0, 768, 2, "warps"),
    ],
)
def test_occupancy(arch, registers, shared, threads, blocks, limit):
    found = rl.occupancy(arch, registers, shared, threads)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.fraction == blocks * threads / 32 / rl.SM_LIMITS[arch].warps


def test_tensor_memory_limits_blocks_too():
    assert rl.occupancy(100, 64, 1000, 128, tmem_columns=256).blocks == 2
    assert rl.occupancy(100, 64, 1000, 128, tmem_columns=256).limit == "tensor memory"


def test_devices_are_complete_and_consistent():
    for found in rl.DEVICES.values():
        assert found.arch in rl.SM_LIMITS
        assert found.flops_per_s["bf16"] == found.flops_per_s["fp16"] > found.flops_per_s["fp32"]
        assert found.memory_bytes >= 24 << 30
    assert {d.arch for d in rl.DEVICES.values()} == set(rl.SM_LIMITS)
    with pytest.raises(ValueError, match="unknown device 'H900'; known: A100-80GB"):
        rl.device("H900")


def test_limits_agree_with_the_tile_rule():
    from gpuckpt.kernels.host import tiles

    assert {a: limits.block_shared_bytes for a, limits in rl.SM_LIMITS.items()} == {
        a: size for a, size in tiles.SHARED_MEMORY_BYTES.items() if a
    }
