"""Our kernels vs. others', through the same compiler: `python benchmarks/kernels.py`; `make bench` fetches the others first.

Compiled ahead of time, with no GPU: ours at their preferred tile, a plain tutorial-style GEMM, flash-swiglu-mlp 0.4.3 at
configurations out of its own tuning list, and Liger 0.8.5 as its launchers would call it on an H100. Shown are registers, spills,
shared memory, instructions in each tensor-core loop (one K step of 64), the flops and bytes of what the kernel does, and the
least time the roofline allows. None of it is a timing. Rivals that cannot be imported are named and left out.

Shape: the MLP of Llama 3 8B, M = 8192 tokens, K = O = 4096, N = 14336, bf16; cross entropy on 512 rows of 128256 classes.
Kernels differ in what they do: flash-swiglu-mlp and Liger keep the gate and up products of the forward pass (4 M N bytes) and
read them back; ours keeps neither and computes both again, so its backward holds two GEMMs more.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from bench_record import QUICK, arguments

from gpuckpt.kernels.audit import roofline
from gpuckpt.kernels.audit.compile import Report, compile_all
from gpuckpt.kernels.audit.dossier import SHAPES, representative
from gpuckpt.kernels.audit.specs import KernelSpec, make_spec, shipped
from gpuckpt.kernels.host.tiles import TileConfig

HERE = Path(__file__).resolve().parent
MLP, HEAD = SHAPES["gemm"], SHAPES["cross_entropy"]
DEVICE = {80: "A100-80GB", 90: "H100 SXM", 100: "B200"}
OURS = (
    "linear_fwd",
    "gated_fwd",
    "gated_plain_bwd",
    "gated_triple_bwd",
    "mlp_dual_bwd",
    "cross_entropy_fwd",
    "cross_entropy_bwd",
)
CHECKED = {"tensor_cores": False, "gemm_loops": 0, "tma": False, "pipelined": False}
Row = tuple[str, KernelSpec, roofline.Work]


@triton.jit
def tutorial_gemm_kernel(p_a, p_b, p_c, M, N, K, sa, sb, sc, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c (M, N) = a (M, K) b (N, K)^T through pointers, one tile a program, as Triton's first tutorials do it."""
    pid = tl.program_id(0)
    columns = tl.cdiv(N, BN)
    o_m = (pid // columns * BM + tl.arange(0, BM)) % M
    o_n = (pid % columns * BN + tl.arange(0, BN)) % N
    o_k = tl.arange(0, BK)
    p_a += o_m[:, None] * sa + o_k[None, :]
    p_b += o_n[None, :] * sb + o_k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(tl.cdiv(K, BK)):
        a = tl.load(p_a, mask=o_k[None, :] < K - k * BK, other=0.0)
        b = tl.load(p_b, mask=o_k[:, None] < K - k * BK, other=0.0)
        acc = tl.dot(a, b, acc)
        p_a += BK
        p_b += BK
    o_m = pid // columns * BM + tl.arange(0, BM)
    o_n = pid % columns * BN + tl.arange(0, BN)
    tl.store(p_c + o_m[:, None] * sc + o_n[None, :], acc.to(tl.bfloat16), mask=(o_m[:, None] < M) & (o_n[None, :] < N))


@dataclass(frozen=True)
class Flat:
    """The block of a kernel without a matrix tile."""

    block: int
    num_warps: int
    num_stages: int = 3

    @property
    def label(self) -> str:
        return f"{self.block}w{self.num_warps}"


def ours(arch: int) -> list[Row]:
    found = {s.meta["kernel"]: s for s in representative([arch])}
    # SwiGLU, which is what the others' gated kernels compute.
    for spec in reversed(shipped(arch)):
        if spec.meta["kernel"].startswith("gated") and spec.meta["activation"] == "silu" and spec.dtype == "bf16":
            found[spec.meta["kernel"]] = spec
    rows = []
    for kernel in OURS:
        shape = HEAD if kernel.startswith("cross_entropy") else MLP
        rows.append(("gpuckpt", found[kernel], roofline.work_of(kernel, shape, "bf16")))
    return rows


def tutorial(arch: int) -> list[Row]:
    tile = TileConfig(128, 128, 64, 8, 3)
    sizes = ("M", "N", "K", "sa", "sb", "sc")
    spec = make_spec(
        tutorial_gemm_kernel,
        variant="gemm",
        dtype="bf16",
        arch=arch,
        tile=tile,
        types={"p_a": "T", "p_b": "T", "p_c": "T", **dict.fromkeys(sizes, "i32")},
        constexprs={"BM": tile.bm, "BN": tile.bn, "BK": tile.bk},
        divisible=("p_a", "p_b", "p_c", *sizes),
        meta=CHECKED,
    )
    return [("tutorial", spec, roofline.work_of("linear_fwd", MLP, "bf16"))]


def flash_swiglu(arch: int) -> list[Row]:
    """Its training kernels; it keeps gate and up, so its backward reads both. They need tensor descriptors: sm_90 and newer."""
    if arch < 90:
        return []
    module = importlib.import_module("flash_swiglu_mlp.kernel")
    M, N, K, D = MLP.M, MLP.N, MLP.K, MLP.O
    x, w, hidden, out = M * K, N * K, M * N, M * D
    kernels = {
        # h, gate and up out.
        "_swiglu_kernel_forward": roofline.Work(4 * M * N * K, 2 * (x + 2 * w), 2 * 3 * hidden),
        # dh = dy Wd with gate and up read back; their gradients out.
        "_swiglu_kernel_backward_dGU": roofline.Work(2 * M * N * D, 2 * (out + w + 2 * hidden), 2 * 2 * hidden),
        "_swiglu_kernel_backward_dI": roofline.Work(4 * M * N * K, 2 * (2 * hidden + 2 * w), 2 * x),
    }
    rows = []
    for name, work in kernels.items():
        fn = _unwrap(getattr(module, name))
        for bm in (128, 64):
            tile = TileConfig(bm, 128, 64, 8, 3)
            block = {"A": (1, bm, 128), "K": (1, bm, 64), "W": (128, 64), "T": (64, 128)}
            kinds = {"input": "K", "dO": "K", "Wg": "W", "Wu": "W", "Wd": "T"}
            if name.endswith("dI"):
                kinds |= {"dG": "K", "dU": "K", "Wg": "T", "Wu": "T"}
            types = {
                n: f"tensordesc<bf16[{','.join(map(str, block[kinds.get(n.removeprefix('desc_'), 'A')]))}]>"
                if n.startswith("desc_")
                else "i32"
                for n in fn.arg_names
                if n.islower() or n.startswith("desc_") or n in ("S", "bucket_M")
            }
            sizes = {"BLOCK_M": bm, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_SIZE_M": 8}
            fixed = {"gate_multiplier": 1.0, "down_multiplier": 1.0}
            constexprs = {**sizes, **{k: v for k, v in fixed.items() if k in fn.arg_names}}
            types = {n: t for n, t in types.items() if n not in constexprs}
            rows.append(("flash-swiglu-mlp", _rival(fn, arch, tile, types, constexprs, ("dim", "hidden_dim")), work))
    return rows


def liger(arch: int) -> list[Row]:
    """Its element-wise SwiGLU (the GEMMs around it are torch's, and gate and up are kept) and its in-place cross entropy."""
    swiglu = importlib.import_module("liger_kernel.ops.swiglu")
    loss = importlib.import_module("liger_kernel.ops.cross_entropy")
    hidden = MLP.M * MLP.N
    row = {"stride": "i32", "gate_multiplier": "fp32"}
    wide = Flat(16384, 32)
    rows = []
    for name, pointers, read, written in (
        ("_swiglu_forward_kernel", ("a_ptr", "b_ptr", "c_ptr"), 2, 1),
        ("_swiglu_backward_kernel", ("dc_ptr", "a_ptr", "b_ptr"), 3, 2),
    ):
        fn = _unwrap(getattr(swiglu, name))
        types = {**dict.fromkeys(pointers, "T"), **row}
        constexprs = {"n_cols": MLP.N, "BLOCK_SIZE": wide.block}
        work = roofline.Work(8 * hidden, 2 * read * hidden, 2 * written * hidden)
        rows.append(("Liger", _rival(fn, arch, wide, types, constexprs, (*pointers, "stride")), work))
    fn = _unwrap(loss.liger_cross_entropy_kernel)
    flags = ("RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY", "RETURN_PREDICTED_TOKENS", "HAS_WEIGHT", "HAS_SOFTCAPPING")
    absent = ("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap")
    whole = Flat(32768, 32)
    constexprs = {
        **dict.fromkeys(flags, False),
        **dict.fromkeys(absent),
        "HAS_GRADIENTS": True,
        "BLOCK_SIZE": whole.block,
        "lse_square_scale": 0.0,
        "label_smoothing": 0.0,
        "reduction": "mean",
    }
    special = {"X_ptr": "T", "Y_ptr": "*i64", "loss_ptr": "*fp32"}
    floats = ("n_non_ignore", "sum_non_ignore_weight", "weight_sum")
    types = {n: special.get(n, "fp32" if n in floats else "i32") for n in fn.arg_names if n not in constexprs}
    logits = 2 * HEAD.M * HEAD.N
    spec = _rival(fn, arch, whole, types, constexprs, ("X_ptr", "Y_ptr", "loss_ptr", "X_stride", "n_cols"))
    rows.append(("Liger", spec, roofline.Work(8 * HEAD.M * HEAD.N, logits, logits)))
    return rows


def _unwrap(fn: Any) -> Any:
    while not hasattr(fn, "arg_names") or hasattr(fn, "configs"):
        fn = fn.fn
    return fn


def _rival(
    fn: Any, arch: int, tile: Any, types: dict[str, str], constexprs: dict[str, Any], divisible: tuple[str, ...]
) -> KernelSpec:
    return make_spec(
        fn,
        variant="",
        dtype="bf16",
        arch=arch,
        tile=tile,
        types=types,
        constexprs=constexprs,
        divisible=divisible,
        meta=CHECKED,
    )


def collect(arch: int) -> tuple[list[Row], list[str]]:
    """Rows to compile, and why some are missing."""
    rows, missing = [*ours(arch), *tutorial(arch)], []
    rivals: dict[str, Callable[[int], list[Row]]] = {"flash-swiglu-mlp 0.4.3": flash_swiglu, "Liger 0.8.5": liger}
    for name, make in rivals.items():
        try:
            rows += make(arch)
        except ImportError as error:
            missing.append(f"{name} is left out: {error}. `make bench` installs it.")
    return rows, missing


def line(arch: int, library: str, spec: KernelSpec, work: roofline.Work, report: Report) -> list[str]:
    if report.error is not None:
        return [library, spec.name, f"does not compile: {report.error.strip().splitlines()[-1][:90]}", *[""] * 7]
    best_ms = roofline.best_s(work, roofline.device(DEVICE[arch]), "bf16") * 1e3
    return [
        library,
        spec.name.replace("[,", "["),
        str(report.registers),
        str(report.spills),
        f"{report.shared_bytes:,}",
        " ".join(f"{loop.instructions}/{loop.tensor_core}" for loop in report.loops),
        str(report.tma_loads or report.async_copies or ""),
        f"{work.flops / 1e12:.2f}",
        f"{work.bytes / 2**20:,.0f}",
        f"{best_ms:.3f}",
    ]


HEADINGS = ("from", "kernel", "regs", "spills", "shared B", "K step", "async loads", "TFLOP", "MiB", "least ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 100], choices=sorted(DEVICE))
    parser.add_argument(
        "--rivals", type=Path, default=HERE.parent / "out" / "rivals", help="where `make bench` put them"
    )
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kernels.md")
    options = arguments(parser, arch=[90], out=QUICK / "kernels.md")
    if options.rivals.is_dir():
        sys.path.append(str(options.rivals))
    lines = ["# Kernels beside others', as compiled", "", (__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    lines.append(f"triton {triton.__version__}. K step: instructions in a tensor-core loop / tensor-core ones of them.")
    for arch in options.arch:
        rows, missing = collect(arch)
        reports = compile_all([spec for _, spec, _ in rows], options.jobs)
        lines += ["", f"## sm_{arch}, least time on {DEVICE[arch]}", ""]
        lines += ["| " + " | ".join(HEADINGS) + " |", "| --- | --- |" + " ---: |" * (len(HEADINGS) - 2)]
        for (library, spec, work), report in zip(rows, reports, strict=True):
            lines.append("| " + " | ".join(line(arch, library, spec, work, report)) + " |")
        lines += ["", *missing] if missing else []
    text = "\n".join(lines) + "\n"
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
