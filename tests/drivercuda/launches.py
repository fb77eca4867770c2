"""Launches every kernel, and every fused operation with autograd, on the stand-in driver; one line of JSON for each.

    python -m tests.drivercuda.launches --arch 90 [--only PATTERN,...] [--cost]

A line: the name of the case, then for each kernel it launched the registers, spills, tensor-core instructions, loads by tensor
map, grid, shared memory and what the compiled launcher was given; and `again`, the same for the next call, on other tensors of
the same layout, which takes what was prepared for the first. `--cost`: microseconds of Python instead, for forward and backward
of each operation, which are this machine's and no GPU's.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.drivercuda.driver import Driver, start

Case = tuple[str, Callable[[], Any]]


def kernels() -> Iterator[Case]:
    """Each launcher by itself. Shapes M, K, N as people train with: regular, then with odd sizes, then in fp32."""
    import torch

    from gpuckpt.kernels import cross_entropy, gated, linear, mlp, norm
    from gpuckpt.kernels.device.dropout import Dropout

    def case(name: str, M: int, K: int, N: int, dtype: Any) -> Iterator[Case]:
        def t(*shape: int, dtype: Any = dtype) -> Any:
            return torch.empty(shape, dtype=dtype)

        x, w, w2, b, y, dy = t(M, K), t(N, K), t(K, N), t(N), t(M, N), t(M, K)
        sums = torch.float32
        drop = Dropout(0.1, 7)
        yield f"linear_fwd {name}", lambda: linear.linear_fwd(x, w, b, y, activation="gelu_tanh", residual=y)
        yield f"linear_fwd dropout {name}", lambda: linear.linear_fwd(x, w, b, y, activation="gelu", dropout=drop)
        yield (
            f"linear_bwd {name}",
            lambda: linear.linear_recompute_bwd(
                x, w, b, y, t(M, N), t(*linear.db_partials_shape(x, w), dtype=sums), activation="gelu_tanh"
            ),
        )
        yield (
            f"mlp_bwd plain {name}",
            lambda: linear.linear_recompute_bwd(
                x, w, b, y, y, t(*linear.db_partials_shape(x, w), dtype=sums), activation="gelu_tanh", h=t(M, N)
            ),
        )
        yield (
            f"mlp_bwd dual {name}",
            lambda: mlp.mlp_dual_bwd(
                x, w, b, dy, w2, y, t(M, N), t(*mlp.db_partials_shape(x, w, w2, form="dual"), dtype=sums),
                activation="gelu_tanh",
            ),
        )  # fmt: skip
        yield f"gated_fwd {name}", lambda: gated.gated_fwd(x, w, b, w, b, y)
        for form in ("triple", "plain"):
            yield (
                f"gated_bwd {form} {name}",
                lambda form=form: gated.gated_recompute_bwd(
                    x, w, None, w, None, dy, w2, y, t(M, N), t(M, N),
                    *(t(*gated.db_partials_shape(x, w, w, w2, form=form), dtype=sums) for _ in range(2)), form=form,
                ),
            )  # fmt: skip

    yield from case("bf16", 4096, 2048, 8192, torch.bfloat16)
    yield from case("bf16 odd", 4095, 2047, 8191, torch.bfloat16)
    yield from case("fp32", 1024, 512, 2048, torch.float32)
    z, target, losses = torch.empty(128, 65536, dtype=torch.bfloat16), torch.zeros(128).long(), torch.empty(128)
    yield "cross_entropy_fwd", lambda: cross_entropy.cross_entropy_fwd(z, target, losses)
    yield "cross_entropy_bwd", lambda: cross_entropy.cross_entropy_bwd(z, target, torch.ones(()).expand(128))
    x, w, y = torch.empty(8192, 4096).bfloat16(), torch.empty(4096).bfloat16(), torch.empty(8192, 4096).bfloat16()
    yield "norm_fwd", lambda: norm.norm_fwd(x, w, None, y)
    dw = torch.empty(norm.norm_partials_shape(x))
    yield "norm_bwd", lambda: norm.norm_bwd(x, w, y, torch.empty(8192, 4096).bfloat16(), torch.empty(2, 8192), dw)


def operations(M: int = 128, K: int = 128, H: int = 256) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name -> (forward and backward of ours, of eager torch), with a dense gradient, on bf16 tensors."""
    import torch
    import torch.nn.functional as F

    from gpuckpt import functional as G

    def leaf(*shape: int) -> Any:
        return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

    x, w, b, v, c, up = leaf(M, K), leaf(H, K), leaf(H), leaf(K, H), leaf(K), leaf(H, K)
    target = torch.zeros(M, dtype=torch.int64)
    table: dict[str, tuple[tuple[Any, ...], Callable[..., Any], Callable[..., Any], Any]] = {
        "linear": (
            (x, w, b),
            lambda *a: G.linear(*a, activation="gelu"),
            lambda *a: F.gelu(F.linear(*a)),
            torch.ones(M, H).bfloat16(),
        ),
        "mlp": (
            (x, w, b, v, c),
            lambda x, w, b, v, c: G.mlp(x, w, v, b, c, activation="gelu"),
            lambda x, w, b, v, c: F.linear(F.gelu(F.linear(x, w, b)), v, c),
            torch.ones(M, K).bfloat16(),
        ),
        "gated_mlp": (
            (x, w, up, v),
            G.gated_mlp,
            lambda x, w, u, v: F.linear(F.silu(F.linear(x, w)) * F.linear(x, u), v),
            torch.ones(M, K).bfloat16(),
        ),
        "linear_cross_entropy": (
            (x, w),
            lambda x, w: G.linear_cross_entropy(x, w, target),
            lambda x, w: F.cross_entropy(F.linear(x, w).float(), target),
            torch.ones(()),
        ),
    }

    def step(leaves: tuple[Any, ...], fn: Callable[..., Any], dy: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(fn(*leaves), leaves, dy)

    return {
        name: (step(leaves, ours, dy), step(leaves, eager, dy)) for name, (leaves, ours, eager, dy) in table.items()
    }


def summed() -> Iterator[Case]:
    """Operations whose gradient is expanded, as `y.sum()` sends it: strides (0, 0)."""
    import torch

    from gpuckpt import functional as G

    def leaf(*shape: int) -> Any:
        return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

    x, w, v = leaf(256, 256), leaf(512, 256), leaf(256, 512)
    yield "linear summed", lambda: G.linear(x, w, activation="gelu").sum().backward()
    yield "mlp summed", lambda: G.mlp(x, w, v).sum().backward()
    yield "gated_mlp summed", lambda: G.gated_mlp(x, w, w, v).sum().backward()


class Recorder:
    """Notes what is launched, and reads the machine code of each kernel once."""

    def __init__(self, driver: Driver) -> None:
        from triton.backends.nvidia.driver import CudaLauncher

        from gpuckpt.kernels.host.launch import PreparedLaunch

        self.rows: list[dict[str, Any]] = []
        self._code: dict[str, dict[str, Any]] = {}
        given: list[Any] = []
        run, start = PreparedLaunch.run, CudaLauncher.__call__

        def seen(launcher: Any, *args: Any) -> None:
            given[:] = args[:5] + args[9:]  # grid, stream and kernel; then, past metadata and hooks, its arguments
            start(launcher, *args)

        CudaLauncher.__call__ = seen

        def noted(prepared: Any, tensors: Any, numbers: Any) -> None:
            before, maps = driver.launches, driver.maps
            direct = prepared.compiled is not None
            run(prepared, tensors, numbers)
            assert driver.launches == before + 1
            facts = {
                "grid": driver.grid,
                "threads": driver.threads,
                "shared": driver.shared,
                "maps": driver.maps - maps,
                "direct": direct,
                "given": [_told(value, tensors) for value in given],
            }
            self.rows.append({"kernel": prepared.kernel.__name__, **facts, **self._read(prepared.compiled)})

        PreparedLaunch.run = noted  # type: ignore[method-assign]

    def _read(self, kernel: Any) -> dict[str, Any]:
        if kernel.hash not in self._code:
            from gpuckpt.kernels.audit.compile_worker import _measure

            with tempfile.TemporaryDirectory() as scratch:
                found = _measure(kernel, Path(scratch))
            keys = ("registers", "spill_stores", "spill_loads", "tensor_core", "tma_loads", "async_copies")
            self._code[kernel.hash] = {key: found[key] for key in keys}
        return self._code[kernel.hash]


def _told(value: Any, tensors: Any) -> Any:
    """An argument of the compiled launcher, a tensor by its place among those that the kernel was to have."""
    if isinstance(value, tuple | list):
        return [_told(inner, tensors) for inner in value]
    if type(value).__name__ == "TensorDescriptor":
        return {name: _told(inner, tensors) for name, inner in vars(value).items()}
    for place, tensor in enumerate(tensors):
        if value is tensor and tensor is not None:
            return f"tensor {place}"
    return repr(value)


def say(name: str, **facts: Any) -> None:
    print(json.dumps({"name": name, **facts}), flush=True)


def cost(repeats: int) -> None:
    """Microseconds of this thread's processor time for a forward and backward, ours and eager's in turns: the 20th percentile,
    which other jobs on the machine touch least. The tensors are so small that eager's arithmetic hardly counts."""
    for name, contenders in operations(16, 16, 16).items():
        spans: list[list[float]] = [[], []]
        for turn in range(repeats + 20):
            for spent, run in zip(spans, contenders, strict=True):
                began = time.thread_time()
                run()
                if turn >= 20:
                    spent.append(time.thread_time() - began)
        ours, eager = (round(sorted(s)[len(s) // 5] * 1e6, 1) for s in spans)
        say(f"cost {name}", us=ours, eager_us=eager)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--only", default="*", help="patterns of names, separated by commas")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--repeats", type=int, default=300, help="of each operation, for --cost")
    options = parser.parse_args()
    driver = start(options.arch)
    import torch

    torch.set_num_threads(1)
    # cuBLAS would return a 16-bit product in fp32; the CPU has no such product, and nothing is computed here.
    mm = torch.mm
    torch.mm = lambda a, b, *, out_dtype=None, out=None: (
        mm(a, b, out=out) if out_dtype is None else torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)
    )
    if options.cost:
        cost(options.repeats)
        return 0
    recorder = Recorder(driver)
    wanted = options.only.split(",")
    whole, others = ([(f"{name} whole", ours) for name, (ours, _) in operations().items()] for _ in range(2))
    both = zip((*kernels(), *whole, *summed()), (*kernels(), *others, *summed()), strict=True)
    for (name, run), (_, run_again) in both:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
            continue
        recorder.rows.clear()
        run()
        first = list(recorder.rows)
        recorder.rows.clear()
        run_again()
        say(name, launches=first, again=list(recorder.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
