"""Cycles that a compiled kernel should take on an H100, from its machine code: a prediction, within 20% at best, and no timing.

`profile` counts what one warp's pass through each K loop, and through the rest of the kernel once, asks of each unit of a
multiprocessor; `predict` adds that up for tiles, multiprocessors and rounds.

What is published (CUDA C++ programming guide, "Throughput of native arithmetic instructions", column 9.0; H100 whitepaper):
results a clock and multiprocessor are 128 for fp32 add, multiply and multiply-add, 64 for integers, comparisons, selections and
conversions, 16 for exp2 and reciprocal, 32 for shuffles; four schedulers issue one warp's instruction each; tensor cores do 4096
16-bit flops; shared memory moves 128 bytes and the port to L2 at most 64.

What is assumed: `CLOCK_HZ`, `L2_BYTES_PER_CYCLE`, `ISSUE_SHARE`, `BARRIER_CYCLES`, `LOAD_CYCLES`, `HBM_SHARE`, each with its
reason. Not counted: bank conflicts, misses of L2, instruction fetch, launch.

How a multiprocessor's time adds up. With one block on it nothing overlaps a tile's epilogue: fill the pipeline, run the K loop at
the pace of the busiest unit (or of its own chain of waits, where no product is left in flight meanwhile), run the rest. With more
blocks, one's epilogue hides behind another's K loop: the time is that of the busiest unit for all of them, or of one block's own
chain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from . import sass

__all__ = ["CLOCK_HZ", "L2_BYTES_PER_CYCLE", "Prediction", "Profile", "Region", "predict", "profile"]

SMS = 132
CLOCK_HZ = 1.41e9
"""What a card of 700 W holds under dense products: there the tensor cores do 762 TFLOP/s, of which cuBLAS' 700 to 750 are 95%.
Kernels that use them less are clocked higher, up to 1.98 GHz, and come out better than predicted."""
ISSUE_SHARE = 0.75
"""Of the schedulers' slots outside K loops: two warps on each wait for one another's results now and then."""
BARRIER_CYCLES = 30
"""From the last warp's arrival at a barrier of the block until all go on."""
LOAD_CYCLES = 700
"""From a load of global memory to its first use: between the 300 of L2 and the 1000 of a busy HBM."""
HBM_SHARE = 0.9
HBM_BYTES_PER_S = 3.35e12

L2_BYTES_PER_CYCLE = 42
"""To one multiprocessor while all of them load: two thirds of the port. Chosen so that the published 564 TFLOP/s of a persistent
Triton GEMM (65536 x 1024 x 1024, bf16) come out; it is what the model knows least."""

_FLOPS_PER_CYCLE = 4096
_SHARED_BYTES_PER_CYCLE = 128

_FMA = frozenset({"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"})
_SHARED = frozenset({"LDS", "STS", "LDSM", "STSM"})
_GLOBAL = frozenset({"LDG", "STG", "LDGSTS"})
_CONTROL = frozenset({"NOP", "BRA", "EXIT", "BAR", "SYNCS", "WARPGROUP", "DEPBAR", "BSSY", "BSYNC", "WARPSYNC", "LDC"})
_HGMMA = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)\.")
_WIDTH = re.compile(r"\.(64|128)\b")
_MATRICES = re.compile(r"\.(2|4)$")
_REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass(frozen=True)
class Region:
    """One pass of one warp through a loop, or through all that is outside of the loops.

    units: unit -> cycles that the multiprocessor's one of it is taken by this warp. flops: on tensor cores where the region uses
    them (a warp's quarter of its group's products), else of multiply-adds. barriers: of the block. waits: for each batch of
    loads from global memory, how many instructions stand between its first load and its first use. in_flight: products that the
    loop leaves running when it goes on, None where it does not wait for any. fetches: loads by tensor map.
    """

    instructions: int
    units: dict[str, float]
    flops: int
    barriers: int
    waits: tuple[int, ...]
    in_flight: int | None
    fetches: int


@dataclass(frozen=True)
class Profile:
    """A kernel: its K loops in the order of their addresses, and the rest."""

    loops: tuple[Region, ...]
    rest: Region


@dataclass(frozen=True)
class Prediction:
    """tile_cycles: one tile by itself; loop_cycles: of these, in K loops. tiles_each: of the
    multiprocessor with most. busiest: the unit that the whole is bound by. seconds, flops_per_s: of the launch."""

    tile_cycles: float
    loop_cycles: float
    tiles_each: int
    busiest: str
    seconds: float
    flops_per_s: float


def unit_of(instruction: sass.Instruction) -> tuple[str, float]:
    """The unit that runs an instruction of one warp, and the cycles of the multiprocessor that this takes of it."""
    op, opcode = instruction.op, instruction.opcode
    if match := _HGMMA.match(opcode):
        m, n, k = (int(size) for size in match.groups())
        return "tensor", 2 * m * n * k / _FLOPS_PER_CYCLE / 4
    if instruction.is_tensor_core:
        raise ValueError(f"{opcode}: the model knows the tensor cores of sm_90 on 16-bit operands alone")
    if op in _FMA:
        return "fma", 32 / 128
    if op == "IMAD":
        return "fma", 32 / 64
    if op == "MUFU":
        return "mufu", 32 / 16
    if op == "SHFL":
        return "shared", 1.0
    if op in _SHARED:
        return "shared", 32 * _lane_bytes(opcode) / _SHARED_BYTES_PER_CYCLE
    if op in _GLOBAL:
        return "l2", 32 * _lane_bytes(opcode) / L2_BYTES_PER_CYCLE
    if op in _CONTROL:
        return "issue", 0.0
    if op.startswith("U") or op in ("R2UR", "VOTEU", "ELECT"):
        return "uniform", 32 / 64
    return "alu", 32 / 64


def _lane_bytes(opcode: str) -> int:
    if opcode.startswith(("LDSM", "STSM")):
        match = _MATRICES.search(opcode)
        return 4 * int(match[1]) if match else 4
    match = _WIDTH.search(opcode)
    return int(match[1]) // 8 if match else 4


def profile(text: str) -> Profile:
    """Read a kernel's SASS, as `cuobjdump -sass` prints it. Raises `ValueError` for tensor cores that the model does
    not know."""
    code = sass.parse(text)
    bodies = sass.k_loops(code)
    inside = set().union(*bodies)
    return Profile(
        tuple(_region([code[n] for n in sorted(body)]) for body in bodies),
        _region([i for n, i in enumerate(code) if n not in inside]),
    )


def _region(code: list[sass.Instruction]) -> Region:
    units: dict[str, float] = {"issue": len(code) / 4}
    for instruction in code:
        unit, cycles = unit_of(instruction)
        units[unit] = units.get(unit, 0.0) + cycles
    on_tensor_cores = units.get("tensor", 0.0) * _FLOPS_PER_CYCLE
    waited = [i.operands.split(",")[-1] for i in code if i.opcode.startswith("WARPGROUP.DEPBAR")]
    return Region(
        instructions=len(code),
        units=units,
        flops=int(on_tensor_cores or 64 * sum(i.op == "FFMA" for i in code)),
        barriers=sum(i.opcode.startswith("BAR.SYNC") for i in code),
        waits=_waits(code),
        in_flight=max(int(left, 16) for left in waited) if waited else None,
        fetches=sum(i.op in sass.TMA_LOADS for i in code),
    )


def _waits(code: list[sass.Instruction]) -> tuple[int, ...]:
    """For each batch of loads, the instructions from its first load to the first that reads what one of them brings."""
    found: list[int] = []
    first = 0
    pending: set[int] = set()
    for n, instruction in enumerate(code):
        named = [int(r) for r in _REGISTER.findall(instruction.operands)]
        if pending and pending & set(named):
            found.append(n - first)
            pending = set()
        if instruction.op == "LDG" and named:
            first = first if pending else n
            pending |= set(range(named[0], named[0] + max(1, _lane_bytes(instruction.opcode) // 4)))
    return tuple(found)


def _chain(region: Region, warps: int, share: float) -> float:
    """Cycles of a pass in which nothing runs ahead: instructions, barriers, and loads as far as nothing hides them."""
    cycles_each = warps / 4
    waits = sum(max(0.0, LOAD_CYCLES - wait * cycles_each) for wait in region.waits)
    return region.instructions * cycles_each / share + region.barriers * BARRIER_CYCLES + waits


def predict(
    kernel: Profile, *, warps: int, blocks: int, tiles: int, flops: Sequence[int], loaded: Sequence[int], hbm_bytes: int
) -> Prediction:
    """One launch. warps: of a block; blocks: that a multiprocessor holds; tiles: output tiles. flops, loaded: for each K loop the
    flops of a tile and the bytes that it loads by tensor map (else the code's own loads count). hbm_bytes: that the launch must
    move."""
    busy: dict[str, float] = {}
    loop_cycles = 0.0
    for region, own, fetched in zip(kernel.loops, flops, loaded, strict=True):
        steps = own / (region.flops * warps)
        units = {unit: cycles * warps * steps for unit, cycles in region.units.items()}
        if region.fetches:
            units["l2"] = fetched / L2_BYTES_PER_CYCLE
        chain = _chain(region, warps, 1.0) * steps
        most = max(units.values())
        loop_cycles += max(most, chain if region.in_flight else chain + units.get("tensor", 0.0))
        busy = {unit: busy.get(unit, 0.0) + units.get(unit, 0.0) for unit in busy | units}
    rest = {unit: cycles * warps for unit, cycles in kernel.rest.units.items()}
    busy = {unit: busy.get(unit, 0.0) + rest.get(unit, 0.0) for unit in busy | rest}
    alone = LOAD_CYCLES + loop_cycles + max(*rest.values(), _chain(kernel.rest, warps, ISSUE_SHARE))
    each = -(-tiles // SMS)
    busiest = max(busy, key=lambda unit: busy[unit])
    cycles = alone * -(-each // blocks)
    if blocks > 1:
        cycles = max(cycles, busy[busiest] * each + alone - loop_cycles)
    seconds = cycles / CLOCK_HZ
    moved = hbm_bytes / (HBM_SHARE * HBM_BYTES_PER_S)
    if moved > seconds:
        busiest, seconds = "HBM", moved
    return Prediction(alone, loop_cycles, each, busiest, seconds, sum(flops) * tiles / seconds)
