"""What the kernels should reach on an H100, predicted from their machine code: `python benchmarks/cycle_model.py`.

Each launch below is recorded, compiled for sm_90 and handed to `gpuckpt.kernels.audit.cycles`, which counts the cycles of a
tile by unit. Needs no GPU and measures nothing: within 20% at best. A run adds a line to results/cycle_model.jsonl and writes
results/cycle_model.md from the first line and the last, so that the page says what changed.

Shapes: 8192 tokens through the MLP of Llama 3 8B (K = D = 4096, N = 14336), bf16, unless a row says otherwise. Operands are as
people pass them: biases where layers have them, none in a gated MLP.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # an interpreted kernel has no machine code

import torch
import triton
from bench_record import RESULTS, append
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpuckpt.kernels import gated, linear, mlp
from gpuckpt.kernels.audit import compile_worker, cycles, roofline
from gpuckpt.kernels.audit.record import Launch, recorded_spec, recording
from gpuckpt.kernels.host.tiles import choose
from gpuckpt.pytorch.ops._loss_chunks import chunk_rows_for

H100 = roofline.device("H100 SXM")
CUBLAS_FLOPS_PER_S = 730e12
"""What cuBLAS reaches on large bf16 products there, assumed; published figures lie between 580 and 760."""
LLAMA = roofline.Shape(M=8192, N=14336, K=4096, O=4096)
ODD = roofline.Shape(M=4095, N=8191, K=2047, O=2047)
WIDE = roofline.Shape(M=65536, N=1024, K=1024)
FP32 = roofline.Shape(M=4096, N=4096, K=4096)


@dataclass(frozen=True)
class Case:
    """One launch. kind: of its tile; loops: for each K loop its depth and how many products it makes; written: matrices (M, N)
    that it reads besides its operands or writes."""

    kind: str
    shape: roofline.Shape
    loops: tuple[tuple[int, int], ...]
    written: int
    launch: Callable[..., None]
    dtype: str = "bf16"


def _launches() -> dict[str, Case]:
    s, D = LLAMA, LLAMA.O
    gelu: dict[str, Any] = {"activation": "gelu_tanh"}

    def sums(shape: tuple[int, int]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    def plain(x: Tensor, w: Tensor, b: Tensor, y: Tensor, **_: Tensor) -> None:
        linear.linear_fwd(x, w, None, y)

    def fwd(x: Tensor, w: Tensor, b: Tensor, y: Tensor, **_: Tensor) -> None:
        linear.linear_fwd(x, w, b, y, **gelu)

    def added(x: Tensor, w: Tensor, b: Tensor, y: Tensor, **_: Tensor) -> None:
        linear.linear_fwd(x, w, b, y, residual=y, **gelu)

    def bwd(x: Tensor, w: Tensor, b: Tensor, y: Tensor, **_: Tensor) -> None:
        linear.linear_recompute_bwd(x, w, b, y, y, sums(linear.db_partials_shape(x, w)), **gelu)

    def hidden(x: Tensor, w: Tensor, b: Tensor, y: Tensor, **_: Tensor) -> None:
        linear.linear_recompute_bwd(x, w, b, y, y, sums(linear.db_partials_shape(x, w)), h=y, **gelu)

    def dual(x: Tensor, w: Tensor, b: Tensor, y: Tensor, dy: Tensor, wd: Tensor) -> None:
        mlp.mlp_dual_bwd(x, w, b, dy, wd, y, y, sums(mlp.db_partials_shape(x, w, wd, form="dual")), **gelu)

    def gated_fwd(x: Tensor, w: Tensor, y: Tensor, **_: Tensor) -> None:
        gated.gated_fwd(x, w, None, w, None, y)

    def gated_plain(x: Tensor, w: Tensor, y: Tensor, **_: Tensor) -> None:
        gated.gated_plain_bwd(x, w, None, w, None, y, y, y)

    def gated_triple(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, wd: Tensor, **_: Tensor) -> None:
        gated.gated_triple_bwd(x, w, None, w, None, dy, wd, y, y, y)

    one, two = ((s.K, 1),), ((s.K, 2),)
    return {
        "a product alone, 65536 x 1024 x 1024": Case("linear", WIDE, ((WIDE.K, 1),), 1, plain),
        "linear forward": Case("linear", s, one, 1, fwd),
        "linear forward with a residual": Case("linear", s, one, 2, added),
        "linear backward": Case("linear", s, one, 2, bwd),
        "MLP backward, plain form's kernel": Case("linear", s, one, 3, hidden),
        "MLP backward, dual form": Case("dual", s, ((D, 1), (s.K, 1)), 2, dual),
        "gated forward": Case("gated_fwd", s, two, 1, gated_fwd),
        "gated backward, plain form's kernel": Case("gated_plain", s, two, 4, gated_plain),
        "gated backward, triple form": Case("gated_bwd", s, ((D, 1), (s.K, 2)), 3, gated_triple),
        "linear forward, 4095 x 2047 x 8191": Case("linear", ODD, ((ODD.K, 1),), 1, fwd),
        "linear forward in fp32, 4096^3": Case("linear", FP32, ((FP32.K, 1),), 1, fwd, "fp32"),
    }


def _recorded(case: Case) -> tuple[Launch, Any]:
    s, dtype = case.shape, getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[case.dtype])

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with recording(90) as launches:
        case.launch(
            x=empty(s.M, s.K),
            w=empty(s.N, s.K),
            b=empty(s.N),
            y=empty(s.M, s.N),
            dy=empty(s.M, s.O),
            wd=empty(s.O, s.N),
        )
    (launch,) = launches
    even = all(size % 16 == 0 for size in (s.N, s.K, s.O))
    return launch, choose(case.kind, s.M, s.N, s.K, case.dtype, 90, regular=even)


def predicted(case: Case) -> dict[str, float]:
    """Compile a launch for sm_90 and predict it."""
    launch, tile = _recorded(case)
    spec = recorded_spec(launch, variant="", dtype=case.dtype, arch=90, tile=tile, meta={})
    source = ASTSource(spec.fn, dict(spec.signature), dict(spec.constexprs), dict(spec.attrs))
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        report = compile_worker._measure(compiled, Path(scratch))
        profile = cycles.profile(compile_worker._tool("-sass", cubin))
    s, item, area = case.shape, roofline.ITEM_BYTES[case.dtype], tile.bm * tile.bn
    blocks = roofline.occupancy(90, report["registers"], report["shared_bytes"], report["threads"]).blocks
    products = sum(depth * n for depth, n in case.loops)
    operands = s.M * s.K + s.N * products + (s.M * s.O if len(case.loops) > 1 else 0)
    found = cycles.predict(
        profile,
        warps=spec.num_warps,
        blocks=blocks,
        tiles=-(-s.M // tile.bm) * -(-s.N // tile.bn),
        flops=[2 * area * depth * n for depth, n in case.loops],
        loaded=[(tile.bm + n * tile.bn) * depth * item for depth, n in case.loops],
        hbm_bytes=(operands + case.written * s.M * s.N) * item,
    )
    flops = 2 * s.M * s.N * products
    return {
        "tile": tile.label,
        "registers": report["registers"],
        "spills": report["spill_stores"] + report["spill_loads"],
        "blocks": blocks,
        "instructions_per_output": round(profile.rest.instructions * 32 * spec.num_warps / area, 1),
        "tile_cycles": round(found.tile_cycles),
        "loop_share": round(found.loop_cycles / found.tile_cycles, 3),
        "bound": found.busiest,
        "ms": round(1e3 * found.seconds, 3),
        "tf": round(flops / found.seconds / 1e12),
    }


def _cublas_s(flops: float) -> float:
    return flops / CUBLAS_FLOPS_PER_S


def _moved_s(elements: float) -> float:
    """16-bit elements through device memory."""
    return 2 * elements / (cycles.HBM_SHARE * cycles.HBM_BYTES_PER_S)


def loss_s(rows: int, width: int, classes: int, chunk: int, products: int) -> float:
    """Linear and cross entropy, forward and backward. The logits of a chunk are read for the loss, then turned into their
    gradient in place; where there are several chunks each adds a product to the fp32 sum of dW: 16 bytes an element."""
    chunks = -(-rows // chunk)
    sums = classes * width * 8 * chunks if chunks > 1 else 0
    logits = 3 * rows * classes * (products - 2)
    return _cublas_s(products * 2 * rows * width * classes) + _moved_s(logits + sums)


def swiglu_steps_s(forward_ms: float, backward_ms: float) -> tuple[float, float]:
    """Seconds of a training step: ours, and torch's checkpoint around the plain layer, which runs gate and up again, and reads or
    writes 5 hidden-size tensors in each of its forwards and 9 in backward."""
    s = LLAMA
    hidden = 2 * s.M * s.N * s.K
    ours = (forward_ms + backward_ms) / 1e3 + _cublas_s(7 * hidden)
    return ours, _cublas_s(11 * hidden) + _moved_s(19 * s.M * s.N)


def composed(launches: dict[str, Any]) -> dict[str, float]:
    """Whole operations, from the kernels and what cuBLAS does beside them."""
    rows, width, classes = 4096, 2048, 65536
    eager = _cublas_s(6 * rows * width * classes) + _moved_s(11 * rows * classes)
    s, chunk = LLAMA, chunk_rows_for(rows, width, classes, 2)
    fwd, bwd = launches["gated forward"]["ms"], launches["gated backward, plain form's kernel"]["ms"]
    ours, checkpoint = swiglu_steps_s(fwd, bwd)
    triple = swiglu_steps_s(fwd, launches["gated backward, triple form"]["ms"] - 1e3 * _cublas_s(2 * s.M * s.N * s.O))[
        0
    ]
    plain = launches["MLP backward, plain form's kernel"]["ms"] + 1e3 * _cublas_s(2 * s.M * s.N * s.O)
    odd = ODD
    copied = _moved_s(2 * (odd.M * odd.K + odd.N * odd.K))
    even = 2 * odd.M * odd.N * odd.K / (1e12 * launches["linear forward"]["tf"])
    return {
        "loss, 3 products": loss_s(rows, width, classes, chunk, 3) / eager,
        "loss, 4 products": loss_s(rows, width, classes, chunk, 4) / eager,
        "loss, 4 products, 128 rows": loss_s(rows, width, classes, 128, 4) / eager,
        "SwiGLU step, plain form": ours / checkpoint,
        "SwiGLU step, triple form": triple / checkpoint,
        "MLP backward, plain form, ms": plain,
        "odd sizes, copied to even ones, TF": 2 * odd.M * odd.N * odd.K / (copied + even) / 1e12,
    }


HEAD = """# What the kernels should reach on an H100 SXM

Predictions, not measurements: made by `python benchmarks/cycle_model.py` from the machine code of each kernel, with the model in
`kernels/audit/cycles.py`. No GPU has run any of it. Within 20% at best; least is known of what L2 delivers, and that bounds most
rows. "Before" is commit {before}, by the same model. Shapes: 8192 tokens through the MLP of Llama 3 8B, bf16, unless a row says
otherwise.

"""


def page(first: dict[str, Any], last: dict[str, Any]) -> str:
    """The results as Markdown, from a line of the results file before and one after."""
    lines = [HEAD.format(before=(first["about"]["commit"] or "unknown")[:10]) + "## Each kernel", ""]
    lines += [
        "| launch | tile | registers | instructions an output, outside of K loops | share of K loops | bound | TFLOP/s |"
    ]
    lines += ["| --- | --- | ---: | ---: | ---: | --- | ---: |"]
    for name, now in last["launches"].items():
        then = first["launches"].get(name, {})

        def both(key: str, now: dict[str, Any] = now, then: dict[str, Any] = then) -> str:
            return f"{then[key]} -> {now[key]}" if key in then and then[key] != now[key] else f"{now[key]}"

        cells = (both(key) for key in ("tile", "registers", "instructions_per_output", "loop_share", "bound", "tf"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Whole operations", "", *_goals(first, last)]
    return "\n".join(lines) + "\n"


def _goals(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    then, now, old, new = first["launches"], last["launches"], first["composed"], last["composed"]
    wide, plain = "linear forward", "gated backward, plain form's kernel"

    def epilogue(name: str) -> str:
        was, own = (side[name]["instructions_per_output"] for side in (then, now))
        return f"{was} -> {own} ({100 * (own / was - 1):+.0f}%)"

    share = now[wide]["tf"] * 1e12 / CUBLAS_FLOPS_PER_S
    dual = now["MLP backward, dual form"]["ms"]
    rows = (
        (
            "linear + cross entropy, 4096 x 2048 x 65536, vs. eager",
            f"{old['loss, 4 products, 128 rows']:.2f}x in chunks of 128 rows",
            f"{new['loss, 3 products']:.2f}x with 3 products, {new['loss, 4 products']:.2f}x with 4",
            "1.05x Liger's, which has 3",
        ),
        (
            "gated backward's kernel, TFLOP/s",
            f"{then['gated backward, triple form']['tf']} (triple form)",
            f"{now[plain]['tf']} (plain form; with cuBLAS' product beside it)",
            "",
        ),
        (
            "step of SwiGLU vs. torch's checkpoint",
            f"{old['SwiGLU step, triple form']:.2f}x (triple form)",
            f"{new['SwiGLU step, plain form']:.2f}x",
            "at most 1x",
        ),
        ("epilogue, instructions an output: linear forward", "", epilogue(wide), "-40%"),
        ("the same: linear backward", "", epilogue("linear backward"), "-40%"),
        ("the same: gated backward", "", epilogue(plain), "-40%"),
        (
            "fp32, TFLOP/s",
            f"{then['linear forward in fp32, 4096^3']['tf']} (our kernel)",
            f"cuBLAS', out of {H100.flops_per_s['fp32'] / 1e12:.0f}, or {H100.flops_per_s['tf32'] / 1e12:.0f} in TF32",
            "cuBLAS'",
        ),
        (
            "linear forward, 128 x 256, of cuBLAS' assumed 730",
            f"{then[wide]['tf'] * 1e12 / CUBLAS_FLOPS_PER_S:.2f}x",
            f"{share:.2f}x",
            "0.92x",
        ),
        (
            "sizes that are no multiple of 16, TFLOP/s",
            f"{then['linear forward, 4095 x 2047 x 8191']['tf']}",
            f"{now['linear forward, 4095 x 2047 x 8191']['tf']}; {new['odd sizes, copied to even ones, TF']:.0f} if operands "
            "were copied to even sizes, which is not done",
            "padded where that pays",
        ),
        (
            "MLP backward, ms",
            f"dual {then['MLP backward, dual form']['ms']:.2f}",
            f"dual {dual:.2f}, plain with cuBLAS' product {new['MLP backward, plain form, ms']:.2f}",
            "chosen by a table",
        ),
    )
    lines = ["| what | before | now | goal |", "| --- | --- | --- | --- |"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = {}
    for name, case in _launches().items():
        found[name] = predicted(case)
        print(f"{name:40} {found[name]}", flush=True)
    target = Path(os.environ.get("GPUCKPT_RESULTS") or RESULTS / "cycle_model.jsonl")
    append(target, {"device": H100.name, "launches": found, "composed": composed(found)})
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    target.with_suffix(".md").write_text(page(lines[0], lines[-1]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
