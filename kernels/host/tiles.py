"""Tile choices: a frozen configuration, one predicate that says whether it can run, one analytic rule that picks it.

Everything here is pure arithmetic on ints and strings; nothing is timed and nothing is tuned, so forward and recompute
always agree on the order of the reduction over K, and a recomputed z has the bits of the first one. The one exception is asked
for: `use_tuned` puts a table of measured tiles (see `tuning`) before the rule, once a process, with the same order over K.

Kinds of kernel: "linear" (forward and recompute-backward of one linear layer), "linear_dropout" (the same with dropout, whose
random numbers need registers), "dual" (an MLP's backward), "gated_fwd", "gated_bwd" (three accumulators) and "gated_plain" (two).
Architectures are ints, 80 for sm_80; 0 is the host, where Triton's interpreter runs one program after another.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gpuckpt.checks import shown

from .dtypes import ELEMENT_BYTES
from .hardware import SHARED_MEMORY_BYTES, SM_COUNT

__all__ = [
    "KINDS",
    "BlockTile",
    "Kind",
    "TileConfig",
    "analytic_choice",
    "backward_form",
    "candidates",
    "choose",
    "epilogue_n",
    "has_tuned",
    "shape_class",
    "unaligned_tile",
    "use_tuned",
    "why_invalid",
]


@dataclass(frozen=True)
class Kind:
    """What a kind of kernel keeps. accumulators: fp32 blocks of a whole tile alive at once; weights_per_step: blocks of
    width bn that one step of its widest K loop reads beside the one block of height bm."""

    accumulators: int
    weights_per_step: int


KINDS = {
    "linear": Kind(1, 1),
    "linear_dropout": Kind(1, 1),
    "dual": Kind(2, 1),
    "gated_fwd": Kind(2, 2),
    "gated_bwd": Kind(3, 2),
    "gated_plain": Kind(2, 2),
}


@dataclass(frozen=True)
class TileConfig:
    """One tile of the output and how it is computed.

    bm, bn: rows and columns of the output tile; bk: step of the K loop; group_m: row tiles that run together, so that
    they share weight tiles in L2; num_warps, num_stages: Triton's options; max_registers: its maxnreg, for a kernel that ptxas
    would rather let spill than have fewer blocks on a multiprocessor.
    """

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    max_registers: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int and not (name == "max_registers" and value is None):
                raise TypeError(f"{name} of a tile is {shown(value)} ({type(value).__name__}); expected an int")

    @property
    def label(self) -> str:
        """Short name, e.g. "128x128x64w8s3", with "r255" where registers are capped."""
        name = f"{self.bm}x{self.bn}x{self.bk}w{self.num_warps}s{self.num_stages}"
        return name if self.max_registers is None else f"{name}r{self.max_registers}"


@dataclass(frozen=True)
class BlockTile:
    """What a program of a kernel without a GEMM takes at a time: a block of rows x columns."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int = 1

    @property
    def label(self) -> str:
        """Short name, e.g. "32x128w4"."""
        return f"{self.rows}x{self.columns}w{self.num_warps}"


_T = TileConfig

# Preferred first. bk is the same for every kind on one architecture and dtype, so that all kernels reduce alike. What is not
# here was tried and spilled, or does not fit in shared memory; `make audit` compiles all that is.
_WIDE = _T(128, 256, 64, 8, 3)
_LARGE = {3: _T(128, 128, 64, 8, 3), 4: _T(128, 128, 64, 8, 4)}
_TALL = _T(128, 64, 64, 8, 3)
# Left to itself ptxas 12.8 stops at 128 or 80 registers in one kernel or another, for one more block, and spills a few.
_TALL_WHOLE = _T(128, 64, 64, 8, 3, max_registers=255)
# Three accumulators: with 4 warps 64 x 64 spills on sm_80, sm_100 and sm_120.
_SMALL_8 = _T(64, 64, 64, 8, 3, max_registers=255)
_MEDIUM = {3: _T(128, 64, 64, 4, 3), 4: _T(128, 64, 64, 4, 4)}
_SMALL = _T(64, 64, 64, 4, 3)
# Where the address of every element is kept, nothing larger is free of spills; such loads are not asynchronous.
_UNALIGNED = _T(64, 64, 64, 8, 2, max_registers=255)
_UNALIGNED_LOW = _T(32, 64, 64, 8, 2, max_registers=255)
_UNALIGNED_FP32 = _T(64, 64, 16, 8, 4, max_registers=224)
_HOPPER: dict[str, tuple[TileConfig, ...]] = {
    "linear": (_WIDE, _LARGE[4], _MEDIUM[4]),
    "linear_dropout": (_LARGE[4], _MEDIUM[4]),
    "dual": (_LARGE[4], _TALL),
    "gated_fwd": (_LARGE[3], _TALL),
    "gated_bwd": (_TALL_WHOLE, _SMALL_8),
    "gated_plain": (_LARGE[3], _TALL),
}
_AMPERE: dict[str, tuple[TileConfig, ...]] = {
    "linear": (_LARGE[3], _MEDIUM[3]),
    "linear_dropout": (_LARGE[3], _MEDIUM[3]),
    "dual": (_TALL_WHOLE, _SMALL),
    "gated_fwd": (_TALL, _SMALL),
    "gated_bwd": (_TALL, _SMALL_8),
    "gated_plain": (_TALL, _SMALL),
}
# fp32 has no tensor cores here. With 32 outputs a thread some architecture spills (ptxas 12.8); with 16 none does. Smaller tiles
# spill again: ptxas then limits itself to 80 or 96 registers.
_FP32: dict[str, tuple[TileConfig, ...]] = dict.fromkeys(KINDS, (_T(64, 64, 16, 8, 4),))

_TABLE: dict[tuple[int, bool], dict[str, tuple[TileConfig, ...]]] = {
    **{(arch, True): _AMPERE for arch in (80, 86, 89, 120)},
    **{(arch, True): _HOPPER for arch in (90, 100)},
    **{(arch, False): _FP32 for arch in (80, 86, 89, 90, 100, 120)},
}


def why_invalid(kind: str, tile: TileConfig, dtype: str, arch: int) -> str | None:
    """None where `tile` can run, else the reason. The single statement of what a tile has to satisfy.

    kind: a key of KINDS; dtype: "fp32" | "fp16" | "bf16"; arch: a key of SHARED_MEMORY_BYTES.
    """
    for name in ("bm", "bn", "bk"):
        v = getattr(tile, name)
        if v < 16 or v & (v - 1):
            return f"{name}={v} must be a power of two of at least 16"
    if tile.num_warps not in (1, 2, 4, 8):
        return f"num_warps={tile.num_warps} must be 1, 2, 4 or 8"
    if tile.num_stages < 1 or tile.group_m < 1:
        return f"num_stages={tile.num_stages} and group_m={tile.group_m} must be at least 1"
    if tile.max_registers is not None and not 24 <= tile.max_registers <= 255:
        return f"max_registers={tile.max_registers} must lie in [24, 255]"
    if arch == 0:
        return None
    stage_bytes = (tile.bm + KINDS[kind].weights_per_step * tile.bn) * tile.bk * ELEMENT_BYTES[dtype]
    # The barriers of the pipeline take a few dozen bytes more.
    loop_bytes = tile.num_stages * stage_bytes + 1024
    # The epilogue turns the accumulator's layout into a coalesced one through the same shared memory.
    epilogue_bytes = tile.bm * tile.bn * 4
    need_bytes = max(loop_bytes, epilogue_bytes)
    if need_bytes > SHARED_MEMORY_BYTES[arch]:
        return f"{tile.label} needs {need_bytes} B of shared memory; sm_{arch} has {SHARED_MEMORY_BYTES[arch]}"
    accumulator_registers = KINDS[kind].accumulators * tile.bm * tile.bn // (32 * tile.num_warps)
    if accumulator_registers > 128:
        return f"{tile.label} keeps {accumulator_registers} accumulator registers a thread; more than 128 spills"
    if dtype == "fp32" and accumulator_registers > 16 * KINDS[kind].accumulators:
        return f"{tile.label} gives a thread more than 16 fp32 outputs; without tensor cores that spills"
    if arch in (90, 100) and dtype != "fp32" and (tile.bm < 64 or tile.num_warps < 4):
        return f"{tile.label}: the tensor cores of sm_{arch} need 64 rows and 4 warps"
    return None


def candidates(kind: str, dtype: str, arch: int) -> tuple[TileConfig, ...]:
    """The tiles that ship for a kind, preferred first. Every one satisfies `why_invalid`."""
    try:
        return _TABLE[arch, dtype != "fp32"][kind]
    except KeyError:
        raise ValueError(f"no tiles for kind={kind!r}, dtype={dtype!r}, arch={arch!r}") from None


def choose(kind: str, M: int, N: int, K: int, dtype: str, arch: int, *, regular: bool = True) -> TileConfig:
    """The tile for an (M, N) output reduced over K: `unaligned_tile` for operands that are not `regular`, else a tuned one where
    `use_tuned` gave one, else the analytic choice.

    K does not enter that: the reduction order depends on bk alone, which all candidates of a dtype and architecture share.
    """
    if arch and not regular:
        return unaligned_tile(kind, dtype, arch)
    tuned = _tuned.get((kind, shape_class(M, N, K), dtype, arch))
    return tuned or analytic_choice(kind, M, N, K, dtype, arch)


def unaligned_tile(kind: str, dtype: str, arch: int) -> TileConfig:
    """The tile for operands that are not `arguments.regular`: small, because each element's address is kept in registers."""
    if dtype == "fp32":
        # Uncapped, sm_90 spills in a light kernel, for a second block; capped, sm_100 and sm_120 do, which pair registers.
        return candidates(kind, dtype, arch)[0] if arch in (100, 120) else _UNALIGNED_FP32
    needy = kind in ("gated_fwd", "gated_bwd", "gated_plain", "linear_dropout")
    return _UNALIGNED_LOW if needy and arch not in (90, 100) else _UNALIGNED


def analytic_choice(kind: str, M: int, N: int, K: int, dtype: str, arch: int) -> TileConfig:
    """The first candidate that gives every multiprocessor a tile, else the one with most tiles.

    On the host (arch 0) each program costs the interpreter milliseconds, so one tile covers as much as is sensible.
    """
    if arch == 0:
        return TileConfig(_clip(M, 128), _clip(N, 128), _clip(K, 128), 4, 1)
    options = candidates(kind, dtype, arch)
    for tile in options:
        if -(-M // tile.bm) * -(-N // tile.bn) >= SM_COUNT[arch]:
            return tile
    return options[-1]


TunedKey = tuple[str, tuple[int, int, int], str, int]
"""Kind, shape class, dtype and architecture."""

_tuned: Mapping[TunedKey, TileConfig] = MappingProxyType({})


def shape_class(M: int, N: int, K: int) -> tuple[int, int, int]:
    """Shapes that share a measured tile: each size rounded up to a power of two."""
    return _power_of_two(M), _power_of_two(N), _power_of_two(K)


def use_tuned(table: Mapping[TunedKey, TileConfig]) -> None:
    """From now on `choose` gives these tiles where the table has one. Once a process, before the first forward pass: backward
    sizes its scratch by the tile and must find the same one.

    Raises ValueError for a tile that cannot run or that steps over K otherwise than the tiles that ship, RuntimeError where
    another table is in use.
    """
    global _tuned
    for (kind, _, dtype, arch), tile in table.items():
        reason = why_invalid(kind, tile, dtype, arch)
        shipped_bk = candidates(kind, dtype, arch)[0].bk
        if reason is None and tile.bk != shipped_bk:
            reason = f"bk={tile.bk} would change the order of the sum over K; tiles for {dtype} on sm_{arch} have bk={shipped_bk}"
        if reason is not None:
            raise ValueError(f"the tuned tile {tile.label} of {kind} cannot be used: {reason}")
    if _tuned and dict(_tuned) != dict(table):
        raise RuntimeError("other tuned tiles are in use already; a process can choose by one table only")
    _tuned = MappingProxyType(dict(table))


def has_tuned() -> bool:
    """Whether `use_tuned` has been called: what was chosen before may be another tile than is chosen now."""
    return bool(_tuned)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _clip(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16 to `most`."""
    return max(16, min(most, _power_of_two(size)))


def epilogue_n(tile: TileConfig, kind: str = "linear") -> int:
    """Columns that an epilogue handles at a time, so that its temporaries, and the operands of the next ones, fit beside the
    accumulators: 16 elements a thread, 8 where several accumulators take half of the registers."""
    accumulators = KINDS[kind].accumulators
    full = accumulators * tile.bm * tile.bn >= 128 * 32 * tile.num_warps
    several = accumulators == 3 or kind == "gated_plain" or (accumulators == 2 and full)
    per_thread = 8 if several else 16
    return min(tile.bn, max(16, per_thread * 32 * tile.num_warps // tile.bm))


# FLOPs that the tensor cores do while HBM moves a byte (bf16 dense over bandwidth, from the data sheets): A100 80 GB, RTX 3090,
# RTX 4090, H100 SXM, B200, RTX 5090.
_FLOPS_PER_BYTE = {80: 153.0, 86: 76.0, 89: 164.0, 90: 295.0, 100: 292.0, 120: 117.0}
# Shares of an H100's peak. cuBLAS' is assumed; of our backward kernels, epilogues included, they are predicted by the cycle
# model (benchmarks/results/cycle_model.md): 530, 431, 587 and 405 of 989 TFLOP/s. No GPU has measured any.
_EFFICIENCY = {"cublas": 0.74, "linear": 0.54, "dual": 0.44, "gated_plain": 0.59, "triple": 0.41}


@functools.cache
def backward_form(N: int, K: int, D: int, dtype: str, arch: int, *, gated: bool = False) -> str:
    """ "dual" or "plain": the cheaper way to an MLP's dz and h, by arithmetic on one output element of the (M, N) result; for a
    gated one "triple" or "plain".

    plain costs 2 elements of HBM traffic more (dh written and read again); dual computes dh (2 D flops) and z (2 K flops) at
    the lower rate of a kernel with two accumulators. Counted in flops at peak, dual wins where
        2 D (1 / e_dual - 1 / e_cublas) + 2 K (1 / e_dual - 1 / e_linear) <= 2 element_bytes flops_per_byte.
    With these efficiencies that is D + 0.46 K <= 640 for bf16 on H100. fp32 is always plain: our fp32 GEMM forgoes the
    tensor cores and blocks by 16, so the GEMM that can go to cuBLAS should. On the host: "dual", so that tests run it.
    N does not enter: both sides grow with it alike. A gated one computes z twice, by "triple" or by "gated_plain":
        2 D (1 / e_triple - 1 / e_cublas) + 4 K (1 / e_triple - 1 / e_gated_plain) <= 2 element_bytes flops_per_byte,
    which for bf16 on H100 is D + 1.37 K <= 540: hardly ever.
    """
    fused, z_flops, plainly = ("triple", 4 * K, "gated_plain") if gated else ("dual", 2 * K, "linear")
    if arch == 0:
        return fused
    if dtype == "fp32":
        return "plain"
    e = _EFFICIENCY
    slower_flops = 2 * D * (1 / e[fused] - 1 / e["cublas"]) + z_flops * (1 / e[fused] - 1 / e[plainly])
    return fused if slower_flops <= 2 * ELEMENT_BYTES[dtype] * _FLOPS_PER_BYTE[arch] else "plain"
