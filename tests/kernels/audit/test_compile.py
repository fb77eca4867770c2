"""Ahead-of-time compilation from a process that interprets kernels: what is reported, cached, and survived."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl

from gpuckpt.kernels.audit import compile as compiler
from gpuckpt.kernels.audit.specs import KernelSpec, make_spec
from gpuckpt.kernels.host.tiles import TileConfig


@triton.jit
def gemm_kernel(
    p_a, p_b, p_c, M, N, K, stride_a, stride_b, stride_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    p_a += o_m[:, None] * stride_a + o_k[None, :]
    p_b += o_n[None, :] * stride_b + o_k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(tl.cdiv(K, BK)):
        acc = tl.dot(tl.load(p_a), tl.load(p_b), acc)
        p_a += BK
        p_b += BK
    tl.store(
        p_c + o_m[:, None] * stride_c + o_n[None, :], acc.to(tl.bfloat16), mask=(o_m < M)[:, None] & (o_n < N)[None, :]
    )


@triton.jit
def atomic_kernel(p_x, p_sum, BLOCK: tl.constexpr):
    tl.atomic_add(p_sum, tl.sum(tl.load(p_x + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def refused_kernel(p_x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 7, "only seven will do")
    tl.store(p_x, 0.0)


TILE = TileConfig(128, 128, 64, 8, 3)
META = {"gemm_loops": 1, "tensor_cores": True, "tma": False, "pipelined": True}


def gemm(arch: int, tile: TileConfig = TILE, **meta) -> KernelSpec:
    pointers, sizes = ("p_a", "p_b", "p_c"), ("M", "N", "K", "stride_a", "stride_b", "stride_c")
    return make_spec(
        gemm_kernel,
        variant="test",
        dtype="bf16",
        arch=arch,
        tile=tile,
        types={**dict.fromkeys(pointers, "T"), **dict.fromkeys(sizes, "i32")},
        constexprs={"BM": tile.bm, "BN": tile.bn, "BK": tile.bk},
        divisible=(*pointers, *sizes),
        meta={**META, **meta},
    )


def vector(fn, types, block: int = 256) -> KernelSpec:
    constexprs = {"BLOCK": block}
    return make_spec(
        fn,
        variant="test",
        dtype="fp32",
        arch=90,
        tile=TILE,
        types=types,
        constexprs=constexprs,
        divisible=(),
        meta=META,
    )


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUCKPT_CACHE_DIR", str(tmp_path))
    return tmp_path / "aot"


def test_reports_what_each_architecture_does():
    assert triton.knobs.runtime.interpret, "this process must be one that interprets"
    reports = compiler.compile_all([gemm(80), gemm(90), gemm(100)], jobs=2)
    ampere, hopper, blackwell = reports
    for report in reports:
        assert report.error is None
        assert report.triton == triton.__version__
        assert report.spills == report.stack_bytes == report.global_atomics == 0
        assert 64 <= report.registers <= 255
        assert report.threads == 256
        assert report.stores == {"128x128xbf16": 1}
        assert report.async_copies > 0
        assert report.tma_loads == 0
        assert len(report.loops) == 1
        assert report.loops[0].async_copies > 0
        assert report.shared_bytes >= 2 * 2 * 128 * 64 * 2, "at least two stages of both blocks"
    assert [list(r.tensor_core) for r in reports] == [["HMMA"], ["HGMMA"], ["UTCHMMA"]]
    assert ampere.loops[0].tensor_core == 128 * 128 * 64 // (16 * 8 * 16) // 8, "mma instructions of a warp in a step"
    assert hopper.loops[0].tensor_core == 64 // 16, "wgmma instructions of a warp group in a step"
    assert [r.tmem_columns for r in reports] == [0, 0, 128]
    assert blackwell.loops[0].instructions < blackwell.instructions


def test_sees_spills_and_atomics():
    squeezed = gemm(80, TileConfig(128, 128, 64, 2, 2))  # 256 accumulators a thread, of 255 registers
    atomic = vector(atomic_kernel, {"p_x": "*fp32", "p_sum": "*fp32"})
    spilled, added = compiler.compile_all([squeezed, atomic], jobs=2)
    assert spilled.spill_stores > 0
    assert spilled.spill_loads > 0
    assert spilled.stack_bytes > 0
    assert added.global_atomics == 1
    assert added.tensor_core == {}


def test_a_kernel_that_does_not_compile_is_a_report_and_hurts_no_other():
    good = vector(refused_kernel, {"p_x": "*fp32"}, block=7)
    reports = compiler.compile_all([vector(refused_kernel, {"p_x": "*fp32"}, block=8), good], jobs=1)
    assert "only seven will do" in reports[0].error
    assert reports[0].registers == 0
    assert reports[1].error is None


def test_cache_is_keyed_by_everything_that_matters(own_cache):
    spec = vector(refused_kernel, {"p_x": "*fp32"}, block=7)
    first = compiler.compile_spec(spec)
    assert not first.cached
    again = compiler.compile_spec(spec)
    assert again.cached
    assert dataclasses.replace(again, cached=False) == first
    others = [
        dataclasses.replace(spec, arch=80),
        dataclasses.replace(spec, num_warps=4),
        dataclasses.replace(spec, attrs={(0,): [["tt.divisibility", 16]]}),
    ]
    assert not any(r.cached for r in compiler.compile_all(others, jobs=1))
    assert len(list(own_cache.glob("*.json"))) == 4
    assert [p for p in own_cache.iterdir() if p.suffix != ".json"] == []


def test_failures_are_not_cached(own_cache):
    spec = vector(refused_kernel, {"p_x": "*fp32"}, block=8)
    assert compiler.compile_spec(spec).error
    assert not own_cache.exists()


def test_an_edited_helper_is_compiled_again(own_cache, tmp_path):
    script = """
import sys, triton, triton.language as tl
sys.path.insert(0, {folder!r})
import edited
from gpuckpt.kernels.audit.compile import compile_spec
from gpuckpt.kernels.audit import compile as compiler
from gpuckpt.kernels.audit.specs import KernelSpec
if __name__ == "__main__":
    report = compile_spec(KernelSpec("edited", edited.kernel, {{"p_x": "*fp32"}}, {{}}, {{}}, 4, 1, "fp32", 90, None))
    print(report.error, report.cached, report.global_stores)
"""
    kernel = """
import triton, triton.language as tl
@triton.jit
def helper(p_x, v):
    {body}
@triton.jit
def kernel(p_x):
    helper(p_x, 1.0)
"""
    run = tmp_path / "run.py"
    run.write_text(script.format(folder=str(tmp_path)))
    seen = []
    for body in ("tl.store(p_x, v)", "tl.store(p_x, v); tl.store(p_x + 5, v)"):
        Path(tmp_path / "edited.py").write_text(kernel.format(body=body))
        done = subprocess.run([sys.executable, str(run)], capture_output=True, text=True, timeout=300, check=True)
        seen.append(done.stdout.split())
    assert seen == [["None", "False", "1"], ["None", "False", "2"]]


def test_a_compiler_that_hangs_or_dies_is_reported_and_replaced(own_cache, monkeypatch):
    monkeypatch.setattr(compiler, "COMPILE_LIMIT_S", 0.01)
    reports = compiler.compile_all([gemm(90), gemm(80)], jobs=1)
    assert [r.error is not None and "killed" in r.error for r in reports] == [True, True]
    monkeypatch.undo()


def test_a_worker_that_cannot_start_says_why(own_cache, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "triton").is_dir()])
    report = compiler.compile_spec(vector(refused_kernel, {"p_x": "*fp32"}, block=7))
    assert "triton" in report.error


def test_progress_comes_once_for_each_in_the_callers_thread(own_cache):
    import threading

    seen = []
    specs = [vector(refused_kernel, {"p_x": "*fp32"}, block=b) for b in (7, 8, 9)]
    reports = compiler.compile_all(specs, 1, lambda r: seen.append((r.name, threading.get_ident())))
    assert len(seen) == len(reports) == 3
    assert {who for _, who in seen} == {threading.get_ident()}


def test_an_error_in_progress_ends_the_workers(own_cache):
    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiler.compile_all([vector(refused_kernel, {"p_x": "*fp32"}, block=7)] * 3, 2, stop)


def test_no_specs_and_no_jobs():
    assert compiler.compile_all([]) == []
    with pytest.raises(ValueError, match="jobs=0"):
        compiler.compile_all([gemm(90)], jobs=0)


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("GPUCKPT_CACHE_DIR", str(tmp_path / "own"))
    assert compiler.cache_dir() == tmp_path / "own" / "aot"
    monkeypatch.delenv("GPUCKPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_dir() == tmp_path / "gpuckpt" / "aot"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert compiler.cache_dir() == tmp_path / ".cache" / "gpuckpt" / "aot"
