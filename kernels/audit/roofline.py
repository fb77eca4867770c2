"""Named devices, what a kernel has to move and compute, and the least time that takes: the roofline model.

    best_s = max(flops / peak flops per second, bytes / HBM bytes per second)        Williams, Waterman and Patterson 2009

It is a bound from below: launch, latency, imperfect caching and clocks below boost only add to it. `tile_s` tightens it by what
the choice of tile costs for certain: rows and columns padded to whole tiles, and a last round of tiles that leaves processors
idle. Nothing here is measured. Also here: how many blocks of a kernel one multiprocessor can hold (occupancy).

Shapes: M rows (tokens), K width of the input, N width of the output (hidden size of an MLP, vocabulary of a head).
Pure: standard library only, so the planner can use the table of devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gpuckpt.checks import shown

__all__ = [
    "DEVICES",
    "ITEM_BYTES",
    "SM_LIMITS",
    "Device",
    "Occupancy",
    "Shape",
    "SmLimits",
    "Work",
    "best_s",
    "device",
    "occupancy",
    "tile_s",
    "work_of",
]

_T = 1e12
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Device:
    """What a data sheet promises. flops_per_s: dense (no sparsity), fp32 accumulation, at boost clock, by operand type;
    "tf32" is fp32 operands on tensor cores, "fp32" the plain multiply-add units. bytes_per_s: device memory."""

    name: str
    arch: int
    sms: int
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: Mapping[str, float]


def _device(name: str, arch: int, sms: int, gib: int, gb_per_s: float, tera: Mapping[str, float]) -> Device:
    rates = {"fp16": tera["bf16"], **tera}
    return Device(name, arch, sms, gib << 30, gb_per_s * 1e9, MappingProxyType({k: v * _T for k, v in rates.items()}))


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        d.name: d
        for d in (
            # NVIDIA A100 datasheet (June 2021): SXM 80 GB and PCIe 40 GB.
            _device("A100-80GB", 80, 108, 80, 2039, {"fp32": 19.5, "tf32": 156, "bf16": 312, "int8": 624}),
            _device("A100-40GB", 80, 108, 40, 1555, {"fp32": 19.5, "tf32": 156, "bf16": 312, "int8": 624}),
            # NVIDIA GA102 whitepaper v2, table of RTX 3090 (FP16 and BF16 with FP32 accumulate) and of RTX A6000.
            _device("RTX 3090", 86, 82, 24, 936, {"fp32": 35.6, "tf32": 35.6, "bf16": 71.2, "int8": 284.7}),
            _device("RTX A6000", 86, 84, 48, 768, {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8, "int8": 309.7}),
            # NVIDIA Ada whitepaper v2, appendix A (RTX 4090, FP32 accumulate); NVIDIA L40S datasheet.
            _device(
                "RTX 4090", 89, 128, 24, 1008, {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp8": 330.3, "int8": 660.6}
            ),
            _device("L40S", 89, 142, 48, 864, {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp8": 733, "int8": 733}),
            # NVIDIA H100 and H200 datasheets, SXM; the sparse figures there are twice these.
            _device("H100 SXM", 90, 132, 80, 3350, {"fp32": 67, "tf32": 494.5, "bf16": 989, "fp8": 1979, "int8": 1979}),
            _device(
                "H200 SXM", 90, 132, 141, 4800, {"fp32": 67, "tf32": 494.5, "bf16": 989, "fp8": 1979, "int8": 1979}
            ),
            # NVIDIA HGX B200 datasheet divided by its eight GPUs, dense.
            _device("B200", 100, 148, 180, 7700, {"fp32": 75, "tf32": 1125, "bf16": 2250, "fp8": 4500, "int8": 4500}),
            # NVIDIA RTX Blackwell whitepaper, appendix A (FP32 accumulate).
            _device(
                "RTX 5090", 120, 170, 32, 1792, {"fp32": 104.8, "tf32": 104.8, "bf16": 209.5, "fp8": 419, "int8": 838}
            ),
        )
    }
)


def device(name: str) -> Device:
    """A device by name, upper or lower case. Raises `ValueError` that lists the known ones."""
    for known, found in DEVICES.items() if isinstance(name, str) else ():
        if known.lower() == name.strip().lower():
            return found
    raise ValueError(f"unknown device {shown(name)}; known: {', '.join(DEVICES)}")


@dataclass(frozen=True)
class SmLimits:
    """One multiprocessor (CUDA programming guide, "Technical specifications per compute capability").

    reserved_bytes: shared memory the system takes from every block. warps, blocks: the most that may be resident.
    """

    block_shared_bytes: int
    shared_bytes: int
    warps: int
    blocks: int
    reserved_bytes: int = 1024
    registers: int = 65536
    thread_registers: int = 255
    tmem_columns: int = 0


SM_LIMITS: Mapping[int, SmLimits] = MappingProxyType(
    {
        80: SmLimits(166_912, 167_936, 64, 32),
        86: SmLimits(101_376, 102_400, 48, 16),
        89: SmLimits(101_376, 102_400, 48, 24),
        90: SmLimits(232_448, 233_472, 64, 32),
        100: SmLimits(232_448, 233_472, 64, 32, tmem_columns=512),
        120: SmLimits(101_376, 102_400, 48, 24),
    }
)


@dataclass(frozen=True)
class Occupancy:
    """blocks: how many fit one multiprocessor, 0 if not one does. fraction: of its warps. limit: what runs out first."""

    blocks: int
    fraction: float
    limit: str


def occupancy(arch: int, registers: int, shared_bytes: int, threads: int, tmem_columns: int = 0) -> Occupancy:
    """How many blocks of a kernel one multiprocessor of `arch` holds.

    registers: a thread. Registers are handed out to warps in units of 256 and warps are spread over four schedulers.
    """
    limits = SM_LIMITS[arch]
    warps = -(-threads // 32)
    warp_registers = -(-max(registers, 1) * 32 // 256) * 256
    fits = {
        "registers": 4 * (limits.registers // 4 // warp_registers) // warps,
        "shared memory": limits.shared_bytes // (shared_bytes + limits.reserved_bytes),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    if tmem_columns:
        fits["tensor memory"] = limits.tmem_columns // tmem_columns
    limit = min(fits, key=lambda k: fits[k])
    blocks = fits[limit] if shared_bytes <= limits.block_shared_bytes else 0
    return Occupancy(blocks, blocks * warps / limits.warps, limit)


@dataclass(frozen=True)
class Shape:
    """A problem: M rows, N outputs, K inputs; O outputs of the second linear of an MLP (0 where there is none)."""

    M: int
    N: int
    K: int
    O: int = 0  # noqa: E741 - the fourth letter beside M, N, K


@dataclass(frozen=True)
class Work:
    """flops (a multiply-add is two) and bytes that must cross device memory at least once, each once."""

    flops: int
    read_bytes: int
    write_bytes: int

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.write_bytes

    @property
    def intensity(self) -> float:
        """flops a byte."""
        return self.flops / self.bytes if self.bytes else 0.0


def _gemms(shape: Shape, item_bytes: int, weights: int, read_rows: int, written: int) -> Work:
    """`weights` GEMMs of (M, K) by (N, K), with `read_rows` more (M, N) inputs and `written` (M, N) outputs."""
    M, N, K = shape.M, shape.N, shape.K
    read = M * K + weights * N * K + read_rows * M * N
    return Work(2 * M * N * K * weights, read * item_bytes, written * M * N * item_bytes)


def work_of(kernel: str, shape: Shape, dtype: str) -> Work:
    """What `kernel` must compute and move. Biases and partial sums (below a thousandth) are left out.

    Raises `ValueError` for a kernel without a model.
    """
    s, b = shape, ITEM_BYTES[dtype]
    match kernel:
        case "linear_fwd":
            return _gemms(s, b, 1, 0, 1)
        case "linear_recompute_bwd":  # x, W and dy in; dz and h out
            return _gemms(s, b, 1, 1, 2)
        case "mlp_dual_bwd":  # x, W1, dy and W2 in; dz and h out
            flops = 2 * s.M * s.N * (s.K + s.O)
            return Work(flops, (s.M + s.N) * (s.K + s.O) * b, 2 * s.M * s.N * b)
        case "gated_triple_bwd":  # x, Wg, Wu, dy and Wd in; dz_g, dz_u and h out
            flops = 2 * s.M * s.N * (2 * s.K + s.O)
            return Work(flops, (s.M * (s.K + s.O) + s.N * (2 * s.K + s.O)) * b, 3 * s.M * s.N * b)
        case "gated_plain_bwd":  # x, Wg, Wu and dh in; dz_g, dz_u and h out
            return _gemms(s, b, 2, 1, 3)
        case "gated_fwd":
            return _gemms(s, b, 2, 0, 1)
        case "cross_entropy_bwd":  # logits in, their gradient out, in place
            return Work(8 * s.M * s.N, s.M * s.N * b, s.M * s.N * b)
        case "cross_entropy_fwd":
            return Work(4 * s.M * s.N, s.M * s.N * b, s.M * 4)
        case "norm_fwd":
            return Work(6 * s.M * s.K, s.M * s.K * b, s.M * s.K * b)
        case "norm_bwd_rows":  # x and the gradient in; dx, mean and rstd out
            return Work(12 * s.M * s.K, 2 * s.M * s.K * b, s.M * s.K * b + 8 * s.M)
        case "norm_bwd_columns":  # x and the gradient in; a row of sums for dw and for db from each 32 rows
            return Work(5 * s.M * s.K, 2 * s.M * s.K * b, 2 * -(-s.M // 32) * s.K * 4)
    raise ValueError(f"no roofline model for kernel {kernel!r}")


def best_s(work: Work, on: Device, dtype: str) -> float:
    """The least seconds `work` can take on a device."""
    return max(work.flops / on.flops_per_s[dtype], work.bytes / on.bytes_per_s)


def tile_s(work: Work, shape: Shape, bm: int, bn: int, on: Device, dtype: str) -> float:
    """The least seconds with output tiles of (bm, bn), one multiprocessor each: `best_s`, and no less than the busiest
    multiprocessor needs for its whole tiles."""
    tiles = -(-shape.M // bm) * -(-shape.N // bn)
    rounds = -(-tiles // on.sms)
    tile_flops = work.flops / (shape.M * shape.N) * bm * bn
    return max(best_s(work, on, dtype), rounds * tile_flops / (on.flops_per_s[dtype] / on.sms))
