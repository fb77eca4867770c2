"""What the parts share: where facts go, one guarded item after the other, tensors, and times of contenders in turns."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Facts = dict[str, Any]

_LOST = ("CUDA error", "illegal memory access", "unspecified launch failure", "misaligned address")
_FLUSH_BYTES = 1 << 28  # five times an L2 cache, and long enough to write (100 us) that a replay is queued meanwhile


@dataclass(frozen=True)
class Context:
    """One process of one part. until_s: the monotonic second at which it will be ended."""

    out: Path
    part: str
    dry: bool
    until_s: float
    shard: int
    shards: int
    write: Callable[..., None]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def say(self, name: str, **facts: Any) -> None:
        self.write(self.out, self.part, name, **facts)

    def over(self, margin_s: float = 5.0) -> bool:
        """Whether too little time is left for another item."""
        return time.monotonic() > self.until_s - margin_s

    def item(self, name: str, work: Callable[[], Facts | None]) -> None:
        """One fact, if `work` returns it. What raises is a failed check and the next item runs, unless the context is lost."""
        if self.over():
            self.say(name, left_out="out of time")
            return
        try:
            facts = work()
        except Exception as error:
            traceback.print_exc()
            self.say(name, ok=False, error=f"{type(error).__name__}: {str(error)[:300]}")
            if any(lost in str(error) for lost in _LOST):
                raise SystemExit(3) from None
        else:
            if facts is not None:
                self.say(name, **facts)

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def rand(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype)

    def leaf(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A weight or bias that requires a gradient, of a scale that keeps values near 1."""
        return self.rand(*shape, dtype=dtype, scale=shape[-1] ** -0.5 if len(shape) > 1 else 0.1).requires_grad_()

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """What torch's allocator held at most during `run`, beyond what it held before; 0 in a dry run."""
        if self.dry:
            run()
            return 0
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def medians(context: Context, contenders: dict[str, Callable[[], Any]], repeats: int = 12) -> dict[str, Facts]:
    """Median `ms` of each contender, taken in turns, the L2 cache overwritten before; `how` it was run: as the replay of a CUDA
    graph, or eagerly where it cannot be captured. `error` where it cannot run at all."""
    if context.dry:
        found: dict[str, Facts] = {}
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            found[name] = {"ms": (time.perf_counter() - began) * 1e3, "how": "cpu"}
        return found
    ready, found = {}, {}
    for name, run in contenders.items():
        try:
            ready[name] = _ready(run)
        except Exception as error:  # one contender less
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:160]}"}
            if any(lost in str(error) for lost in _LOST):
                raise
    flush = torch.empty(_FLUSH_BYTES // 4, device="cuda")
    spans: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        pairs = []
        for name, (run, _) in ready.items():
            flush.normal_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((name, begin, end))
        torch.cuda.synchronize()
        for name, begin, end in pairs:
            spans[name].append(begin.elapsed_time(end))
    for name, (_, how) in ready.items():
        ordered = sorted(spans[name])
        found[name] = {"ms": statistics.median(ordered), "p20": ordered[len(ordered) // 5], "how": how}
    return found


def _ready(run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        torch.cuda.synchronize()
        return run, f"eager ({type(error).__name__})"
    return graph.replay, "graph"
