"""The static dossier: every shipped kernel compiled ahead of time, next to the bounds it promises to keep.

`build` compiles (`compile`), counts how many blocks a multiprocessor holds and what the roofline allows (`roofline`), and
`violations` compares with the bounds below. None of it needs a GPU, and none of it is a measurement of speed.

Bounds: no spill on any architecture, and no stack on sm_90 and sm_100; shared memory within what a block may have; tensor cores
in every K loop, by the instruction the architecture is fast with; TMA where descriptors are used, cp.async where pointers
are; no atomics on global memory; and no other stores than the results: GEMM kernels write as many output matrices as the roofline
model counts, so that a pre-activation that reached memory would show, the others exactly what their spec states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import roofline
from .compile import Report, compile_all
from .specs import ARCHS, KernelSpec, shipped

__all__ = ["SHAPES", "Dossier", "Entry", "Estimate", "build", "representative", "violations"]

SHAPES = {
    "gemm": roofline.Shape(M=8192, N=14336, K=4096, O=4096),
    "cross_entropy": roofline.Shape(M=512, N=128256, K=4096),
}
"""What the roofline is drawn for: 8192 tokens through the MLP of Llama 3 8B, and one chunk of its 128256 classes."""

_TENSOR_CORE_PREFIX = {90: ("HGMMA", "QGMMA", "IGMMA"), 100: ("UTC",)}


@dataclass(frozen=True)
class Estimate:
    """The roofline on one device: least seconds, least with this tile, and what bounds the first."""

    device: str
    best_s: float
    tile_s: float
    bound: str


@dataclass(frozen=True)
class Entry:
    """One kernel of the dossier."""

    spec: KernelSpec
    report: Report
    occupancy: roofline.Occupancy
    shape: roofline.Shape
    work: roofline.Work | None
    estimates: tuple[Estimate, ...]
    violations: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        spec = self.spec
        return {
            **self.report.to_json(),
            "kernel": spec.meta["kernel"],
            "activation": spec.meta.get("activation"),
            "dtype": spec.dtype,
            "tile": spec.tile.label,
            "num_warps": spec.num_warps,
            "num_stages": spec.num_stages,
            "blocks_per_sm": self.occupancy.blocks,
            "occupancy": self.occupancy.fraction,
            "occupancy_limit": self.occupancy.limit,
            "shape": vars(self.shape),
            "flops": self.work.flops if self.work else None,
            "bytes": self.work.bytes if self.work else None,
            "estimates": [vars(e) for e in self.estimates],
            "violations": list(self.violations),
        }


@dataclass(frozen=True)
class Dossier:
    """All entries, in the order they were asked for."""

    entries: tuple[Entry, ...]

    @property
    def violations(self) -> list[str]:
        return [f"sm_{e.spec.arch} {e.spec.name}: {v}" for e in self.entries for v in e.violations]

    def to_json(self) -> dict[str, Any]:
        return {
            "triton": sorted({e.report.triton for e in self.entries if e.report.triton}),
            "archs": sorted({e.spec.arch for e in self.entries}),
            "kernels": [e.to_json() for e in self.entries],
            "violations": self.violations,
        }


def build(
    archs: Iterable[int],
    jobs: int | None = None,
    progress: Callable[[Report], None] | None = None,
    *,
    specs: Iterable[KernelSpec] | None = None,
) -> Dossier:
    """Compile and check every kernel shipped for `archs` (ints, 80 for sm_80), or just `specs`.

    jobs, progress: as in `compile.compile_all`. Raises `ValueError` for an architecture that nothing ships for.
    """
    wanted = [s for arch in dict.fromkeys(archs) for s in shipped(arch)] if specs is None else list(specs)
    reports = compile_all(wanted, jobs, progress)
    return Dossier(tuple(_entry(s, r) for s, r in zip(wanted, reports, strict=True)))


def representative(archs: Iterable[int] = ARCHS) -> list[KernelSpec]:
    """The preferred bf16 configuration of each kernel: what a quick check compiles."""
    found: dict[tuple[int, str], KernelSpec] = {}
    for arch in archs:
        for spec in shipped(arch):
            if spec.dtype == "bf16":
                found.setdefault((arch, spec.meta["kernel"]), spec)
    return list(found.values())


def violations(spec: KernelSpec, report: Report) -> list[str]:
    """Which bounds a compiled kernel breaks, in words with both numbers; none for a sound one."""
    if report.error is not None:
        return [f"does not compile: {report.error.strip().splitlines()[-1][:200]}"]
    limits = roofline.SM_LIMITS[spec.arch]
    found = []
    if report.spills:
        found.append(f"spills: {report.spill_stores} STL and {report.spill_loads} LDL")
    if report.stack_bytes and spec.arch in (90, 100):
        found.append(f"stack of {report.stack_bytes} B a thread")
    if report.shared_bytes > limits.block_shared_bytes:
        found.append(f"shared memory of {report.shared_bytes} B, a block may have {limits.block_shared_bytes}")
    if report.tmem_columns > limits.tmem_columns:
        found.append(f"{report.tmem_columns} columns of tensor memory, there are {limits.tmem_columns}")
    if report.global_atomics:
        found.append(f"{report.global_atomics} atomics on global memory")
    if not _occupancy(spec, report).blocks:
        found.append("not one block fits a multiprocessor")
    found += _pipeline_violations(spec, report)
    work = _work(spec)
    if work is None:
        found.append(f"no roofline model for {spec.meta['kernel']}")
    elif "stores" in spec.meta:
        if report.stores != spec.meta["stores"]:
            found.append(f"stores {report.stores}, its results are {spec.meta['stores']}")
    else:
        written = _matrices_written(spec, report)
        shape = _shape(spec)
        expected = work.write_bytes // (shape.M * shape.N * roofline.ITEM_BYTES[spec.dtype])
        if written != expected:
            found.append(f"writes {written:g} matrices of the output's size, {expected} are its results")
    return found


def _pipeline_violations(spec: KernelSpec, report: Report) -> list[str]:
    found = []
    if spec.meta["tensor_cores"]:
        prefix = _TENSOR_CORE_PREFIX.get(spec.arch, ("HMMA", "IMMA", "QMMA"))
        slow = [op for op in report.tensor_core if not op.startswith(prefix)]
        if len(report.loops) < spec.meta["gemm_loops"]:
            found.append(f"{len(report.loops)} loops on tensor cores, {spec.meta['gemm_loops']} K loops expected")
        if slow or not report.tensor_core:
            found.append(f"tensor-core instructions {sorted(report.tensor_core)}, {'/'.join(prefix)} expected")
    if spec.meta["tma"] and not report.tma_loads:
        found.append("no UTMALDG although it loads through descriptors")
    if spec.meta["pipelined"] and not spec.meta["tma"] and not report.async_copies:
        found.append("no LDGSTS: its loads are not asynchronous")
    return found


def _matrices_written(spec: KernelSpec, report: Report) -> float:
    """Stores of two-dimensional blocks, in tiles."""
    tile_elements = spec.tile.bm * spec.tile.bn
    total = 0
    for written, count in report.stores.items():
        sizes = [int(n) for n in written.split("x")[:-1] if n.isdigit()]
        if len(sizes) == 2:
            total += sizes[0] * sizes[1] * count
    return total / tile_elements


def _work(spec: KernelSpec) -> roofline.Work | None:
    """None where it is not stated what the kernel must move, which is a broken bound."""
    try:
        return roofline.work_of(spec.meta["kernel"], _shape(spec), spec.dtype)
    except ValueError:
        return None


def _shape(spec: KernelSpec) -> roofline.Shape:
    return SHAPES["cross_entropy" if spec.meta["kernel"].startswith("cross_entropy") else "gemm"]


def _occupancy(spec: KernelSpec, report: Report) -> roofline.Occupancy:
    return roofline.occupancy(
        spec.arch, report.registers, report.shared_bytes, report.threads or 32 * spec.num_warps, report.tmem_columns
    )


def _entry(spec: KernelSpec, report: Report) -> Entry:
    shape = _shape(spec)
    work = _work(spec)
    estimates = []
    for found in roofline.DEVICES.values():
        if found.arch == spec.arch and work is not None:
            best = roofline.best_s(work, found, spec.dtype)
            bm, bn = getattr(spec.tile, "bm", 1), getattr(spec.tile, "bn", shape.N)
            tiled = roofline.tile_s(work, shape, bm, bn, found, spec.dtype)
            memory = work.bytes / found.bytes_per_s >= best
            estimates.append(Estimate(found.name, best, tiled, "memory" if memory else "compute"))
    return Entry(spec, report, _occupancy(spec, report), shape, work, tuple(estimates), tuple(violations(spec, report)))
