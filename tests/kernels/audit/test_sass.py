"""Reading machine code: which instructions count as what, and what is a loop."""

from __future__ import annotations

import pytest

from gpuckpt.kernels.audit import sass


def listing(*lines: str) -> str:
    """SASS as cuobjdump prints it, 16 bytes an instruction, with the line of encoding bits after each."""
    text = ["\tcode for sm_90", "\t\tFunction : kernel", '\t.headerflags\t@"EF_CUDA_SM90"']
    for n, line in enumerate(lines):
        text.append(f"        /*{16 * n:04x}*/                   {line} ;      /* 0x0000000000007918 */")
        text.append("                                                                    /* 0x000fc00000000000 */")
    return "\n".join(text)


def test_counts_by_kind():
    report = sass.analyse(
        listing(
            "LDC R1, c[0x0][0x28]",
            "@P0 LDG.E.128 R4, desc[UR4][R2.64]",
            "LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]",
            "UTMALDG.2D [UR8], [UR4]",
            "STL [R1], R4",
            "LDL.64 R4, [R1]",
            "STG.E.128 desc[UR4][R2.64], R4",
            "@!P1 RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4",
            "ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R2.64], R5",
            "ATOMS.OR RZ, [UR4], R5",
            "REDUX.SUM UR4, R4",
            "UTCATOMSWS.AND URZ, UR4",
            "EXIT",
        )
    )
    assert (report.instructions, report.spill_stores, report.spill_loads) == (13, 1, 1)
    assert (report.global_loads, report.async_copies, report.tma_loads) == (1, 1, 1)
    assert (report.global_stores, report.global_atomics, report.shared_atomics) == (1, 2, 1)
    assert report.tensor_core == {}
    assert report.loops == []


@pytest.mark.parametrize(
    "op", ["HMMA.16816.F32.BF16", "HGMMA.64x128x16.F32.BF16", "UTCHMMA", "UTCQMMA.2CTA", "IMMA.16832.S8.S8"]
)
def test_tensor_core_loop(op):
    report = sass.analyse(
        listing("MOV R1, R2", f"{op} R4, R8", "LDGSTS.E [R5], R2", "IADD3 R1, R1, 0x1", "@P0 BRA 0x10", "EXIT")
    )
    assert report.tensor_core == {op.split(".")[0]: 1}
    assert report.loops == [sass.Loop(0x10, 4, 1, 0, 1, 0, 0)]


def test_only_innermost_loops_are_reported():
    report = sass.analyse(
        listing(
            "MOV R1, R2",
            "MOV R3, R4",  # 0x10: a persistent loop over tiles
            "HMMA.16816.F32 R4, R8",  # 0x20: the K loop
            "@P0 BRA 0x20",
            "HMMA.16816.F32 R4, R8",  # 0x40: the last step, outside of the K loop
            "STG.E desc[UR4][R2.64], R4",
            "@P1 BRA 0x10",
            "EXIT",
        )
    )
    assert [(loop.address, loop.instructions) for loop in report.loops] == [(0x20, 2)]


def test_a_wait_moved_behind_the_kernel_is_no_loop():
    # ptxas puts the slow half of a barrier wait after EXIT; its jump back spans the MMA without looping over it.
    report = sass.analyse(
        listing(
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R2",
            "@!P3 BRA 0x60",
            "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]",  # 0x20
            "STG.E desc[UR4][R2.64], R4",
            "EXIT",
            "NOP",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R2",  # 0x60: spins on itself
            "@!P3 BRA 0x60",
            "BRA 0x20",
        )
    )
    assert report.tensor_core == {"UTCHMMA": 1}
    assert report.loops == []


def test_the_same_wait_inside_a_loop_belongs_to_its_body():
    report = sass.analyse(
        listing(
            "MOV R1, R2",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R2",  # 0x10
            "@!P3 BRA 0x70",
            "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]",  # 0x30
            "BRA.U UP0, 0x10",
            "EXIT",
            "NOP",
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR4], R2",  # 0x70
            "@!P3 BRA 0x70",
            "BRA 0x30",
        )
    )
    assert [(loop.address, loop.instructions, loop.tensor_core) for loop in report.loops] == [(0x10, 7, 1)]


def test_a_meeting_point_register_that_serves_twice_hides_no_loop():
    """B0 is used before the loop and inside of it; the BSYNC before the loop does not lead into its middle."""
    report = sass.analyse(
        listing(
            "BSSY.RECONVERGENT B0, 0x40",
            "@P1 BRA 0x30",
            "MOV R1, R2",
            "BSYNC.RECONVERGENT B0",  # 0x30
            "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]",  # 0x40
            "BSSY.RECONVERGENT B0, 0x90",
            "@P1 BRA 0x80",
            "MOV R1, R2",
            "BSYNC.RECONVERGENT B0",  # 0x80
            "MOV R3, R2",  # 0x90
            "@P0 BRA 0x40",
            "EXIT",
        )
    )
    assert [(loop.address, loop.instructions) for loop in report.loops] == [(0x40, 7)]


def test_scheduling_notes_of_sm_120_are_not_operands():
    report = sass.analyse(
        listing("HMMA.16816.F32 R4, R8 &req={1} ?trans5", "@P0 BRA 0x0   &req={4}   ?WAIT15_END_GROUP", "EXIT")
    )
    assert [loop.instructions for loop in report.loops] == [2]


def test_two_loops_in_a_row_and_a_subroutine():
    report = sass.analyse(
        listing(
            "HMMA.16816.F32 R4, R8",
            "@P0 BRA 0x0",
            "CALL.REL.NOINC 0x60",
            "HMMA.16816.F32 R4, R8",  # 0x30
            "@P0 BRA 0x30",
            "EXIT",
            "MUFU.RCP R1, R2",  # 0x60
            "RET.REL.NODEC R4 0x0",
        )
    )
    assert [loop.address for loop in report.loops] == [0x0, 0x30]


def test_only_the_first_function_is_read():
    report = sass.analyse(listing("MOV R1, R2", "EXIT") + "\n" + listing("STL [R1], R4", "EXIT"))
    assert (report.instructions, report.spill_stores) == (2, 0)


def test_text_without_instructions_is_refused():
    with pytest.raises(ValueError, match="no SASS instruction"):
        sass.analyse("cuobjdump info : nothing here")
