"""The cycle model: units and waits of short listings counted by hand, and how tiles and rounds add up."""

from __future__ import annotations

import pytest

from gpuckpt.kernels.audit import cycles
from tests.kernels.audit.test_sass import listing

KERNEL = listing(
    "S2R R0, SR_CTAID.X",
    "UTMALDG.2D [UR8], [UR4]",  # 0x10: the K loop
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR28], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P1 BRA 0x10",
    "LDG.E.128 R4, desc[UR4][R2.64]",  # 0x70: the epilogue
    "LDG.E R8, desc[UR4][R2.64+0x10]",
    "FFMA R9, R24, R25, R26",
    "FADD R10, R7, R8",  # the first use of the loads, three after they began
    "MUFU.EX2 R10, R10",
    "FSEL R11, R10, 1, !P1",
    "STS.128 [R3], R8",
    "STSM.16.M88.4 [R3], R8",
    "STG.E.128 desc[UR4][R2.64], R8",
    "EXIT",
)


def test_units_of_a_loop_and_of_what_surrounds_it():
    found = cycles.profile(KERNEL)
    (loop,) = found.loops
    # A 64 x 256 x 16 product is 2^19 flops: 128 cycles of the tensor cores for four warps, 32 for each; two of them.
    assert loop.units == {"issue": 6 / 4, "tensor": 64.0, "uniform": 0.5}
    assert loop.flops == 2 * 2**19 / 4
    assert (loop.barriers, loop.in_flight, loop.fetches, loop.waits) == (1, 1, 1, ())
    rest = found.rest
    assert rest.instructions == 11
    # FFMA and FADD at 128 results a cycle; S2R and FSEL at 64; MUFU at 16; 16-byte accesses of 32 lanes are 512 bytes.
    assert rest.units["fma"] == 0.5
    assert rest.units["alu"] == 1.0
    assert rest.units["mufu"] == 2.0
    assert rest.units["shared"] == 512 / 128 * 2
    assert rest.units["l2"] == (512 + 128 + 512) / cycles.L2_BYTES_PER_CYCLE
    assert rest.waits == (3,)


def test_loads_that_are_used_apart_are_waited_for_apart():
    found = cycles.profile(
        listing(
            "LDG.E.64 R4, desc[UR4][R2.64]",
            "FADD R6, R5, 1",  # R5 is the second half of the load
            "LDG.E R8, desc[UR4][R2.64]",
            "FADD R6, R4, 1",  # nothing of the second load
            "FADD R6, R8, 1",
            "EXIT",
        )
    )
    assert found.rest.waits == (1, 2)
    assert found.loops == ()


def predicted(blocks: int = 1, tiles: int = 132, hbm_bytes: int = 0, rest: int = 0) -> cycles.Prediction:
    """A kernel of 8 warps that does 64 steps of 1024 cycles on tensor cores, then `rest` instructions."""
    loop = cycles.Region(10, {"issue": 2.5, "tensor": 128.0}, 128 * 4096, 0, (), 1, 1)
    own = cycles.Region(rest, {"issue": rest / 4}, 0, 0, (), None, 0)
    flops = 64 * 1024 * 4096
    return cycles.predict(
        cycles.Profile((loop,), own),
        warps=8,
        blocks=blocks,
        tiles=tiles,
        flops=[flops],
        loaded=[0],
        hbm_bytes=hbm_bytes,
    )


def test_one_tile_is_fill_loop_and_rest():
    found = predicted(rest=3000)
    assert found.loop_cycles == 64 * 1024
    assert found.tile_cycles == cycles.LOAD_CYCLES + 64 * 1024 + 3000 * 8 / 4 / cycles.ISSUE_SHARE
    assert found.seconds == pytest.approx(found.tile_cycles / cycles.CLOCK_HZ)
    assert found.flops_per_s == pytest.approx(132 * 64 * 1024 * 4096 / found.seconds)
    assert (found.tiles_each, found.busiest) == (1, "tensor")


def test_one_tile_more_than_multiprocessors_takes_a_round_more():
    assert predicted(tiles=133).seconds == 2 * predicted(tiles=132).seconds == predicted(tiles=264).seconds


def test_a_second_block_hides_the_rest_behind_the_loop_and_not_the_loop_itself():
    alone, pair = predicted(rest=9000, tiles=1320), predicted(2, rest=9000, tiles=1320)
    assert pair.seconds < alone.seconds
    assert pair.seconds * cycles.CLOCK_HZ >= 10 * 64 * 1024


def test_memory_is_a_floor():
    found = predicted(hbm_bytes=10**9)
    assert found.busiest == "HBM"
    assert found.seconds == 10**9 / (cycles.HBM_SHARE * cycles.HBM_BYTES_PER_S)


def test_a_loop_that_leaves_no_product_running_pays_for_its_chain():
    text = KERNEL.replace("gsb0, 0x1", "gsb0, 0x0")
    args = {"warps": 8, "blocks": 1, "tiles": 1, "flops": [64 * 2**20 * 2], "loaded": [0], "hbm_bytes": 0}
    running, waiting = (cycles.predict(cycles.profile(t), **args) for t in (KERNEL, text))
    # 64 steps of 6 instructions on two warps a scheduler, and a barrier.
    assert waiting.loop_cycles - running.loop_cycles == 64 * (6 * 2 + cycles.BARRIER_CYCLES)


def test_tensor_cores_of_another_architecture_are_refused():
    with pytest.raises(ValueError, match="sm_90"):
        cycles.profile(listing("HMMA.16816.F32.BF16 R4, R8, R12, R4", "EXIT"))
