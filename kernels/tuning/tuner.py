"""Measure tiles on the GPU at hand, keep the result on disk, and use it when asked: `tune`, then `load`.

Nothing here runs unless it is called: no tuning at start-up, and `tiles.choose` knows of no file. `tune` times the tiles that
`tiles.why_invalid` lets through with the shipped step over K, so that a tuned tile sums in the same order as any other. `load`
reads what was kept for this version of Triton and these kernels, and puts it before the analytic rule until the process ends.

Timing: all tiles take turns, each round from another one on, so that clocks and heat touch them alike; the median of a tile's
rounds counts, by CUDA events around the replay of a CUDA graph: a launch from Python takes longer than many a kernel. Before
each replay a buffer as large as the device's L2 cache is overwritten, often enough to keep the device busy until the replay is
queued; it is no larger, because a tuner that takes 256 MiB would not fit next to a budget. A tile has to beat the analytic
choice by `margin` to replace it.

One JSON file a result under GPUCKPT_CACHE_DIR, else XDG_CACHE_HOME/gpuckpt, else ~/.cache/gpuckpt, in the folder "tiles".

Not here: kernels that have no choice of tile (cross entropy, norms), and speed on any device that is not at hand.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from gpuckpt.checks import check_function, check_int, check_number, check_sequence, shown

from ..audit.compile import cache_dir as reports_dir
from ..device.casts import INTERPRETED
from ..host.arguments import check_activation
from ..host.hardware import SM_COUNT, arch_of
from ..host.tiles import KINDS, TileConfig, TunedKey, analytic_choice, candidates, shape_class, use_tuned, why_invalid
from .launches import DTYPES, calls

__all__ = ["Tuned", "cache_dir", "interleaved_medians", "load", "search_space", "tune"]

Timer = Callable[[Callable[[], None]], float]
"""Runs one launch and gives the seconds it took."""

_SOURCES = ("device/*.py", "host/tiles.py", "gated.py", "linear.py", "mlp.py")
"""Files whose text decides how fast a tile is; a change to any makes what was measured stale."""


@dataclass(frozen=True)
class Tuned:
    """What one `tune` found.

    tile, seconds: the winner and its median. default_tile, default_seconds: the analytic choice's. measured: every tile and its
    median, fastest first. refused: tiles that did not compile or did not fit, and why.
    """

    kind: str
    shape: tuple[int, int, int]
    dtype: str
    arch: int
    device: str
    tile: TileConfig
    seconds: float
    default_tile: TileConfig
    default_seconds: float
    measured: tuple[tuple[TileConfig, float], ...]
    refused: tuple[tuple[TileConfig, str], ...]

    @property
    def speedup(self) -> float:
        """How many times faster than the analytic choice; 1.0 where that is kept."""
        return self.default_seconds / self.seconds


def cache_dir() -> Path:
    """Where results are kept; not created here."""
    return reports_dir().parent / "tiles"


def search_space(kind: str, dtype: str, arch: int) -> tuple[TileConfig, ...]:
    """The tiles worth timing: those that ship, preferred first, then the other valid ones of usual sizes and that step over K."""
    shipped = candidates(kind, dtype, arch)
    grid = itertools.product((32, 64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4))
    others = (TileConfig(bm, bn, shipped[0].bk, warps, stages) for bm, bn, warps, stages in grid)
    return tuple(dict.fromkeys((*shipped, *(t for t in others if why_invalid(kind, t, dtype, arch) is None))))


def interleaved_medians(launches: Sequence[Callable[[], None]], timer: Timer, rounds: int) -> list[float]:
    """Median seconds of each launch over `rounds` turns. Turn t begins with launch t: none is always the first after a pause."""
    seconds: list[list[float]] = [[] for _ in launches]
    for turn in range(rounds):
        for place in range(len(launches)):
            number = (turn + place) % len(launches)
            seconds[number].append(timer(launches[number]))
    return [statistics.median(s) for s in seconds]


def tune(
    kind: str,
    M: int,
    N: int,
    K: int,
    *,
    dtype: str = "bf16",
    activation: str = "gelu_tanh",
    tiles: Sequence[TileConfig] | None = None,
    rounds: int = 20,
    margin: float = 0.02,
    flush_bytes: int | Literal["L2"] | None = "L2",
    device: str | torch.device = "cuda",
    timer: Timer | None = None,
    arch: int | None = None,
) -> Tuned:
    """Time the tiles of a kind of kernel at one shape, keep the winner on disk and return it. `load` puts it to use.

    kind: a key of `tiles.KINDS`; "linear" and "linear_dropout" are timed forward and backward together, since both use one tile.
    M, N, K: rows, outputs and reduction; an MLP's second layer is taken to have K outputs. dtype: "bf16", "fp16" or "fp32".
    tiles: what to time, by default `search_space` (24 to 68 tiles, each compiled once); the analytic choice is always among them.
    rounds: launches a tile is timed by. margin: the share by which a tile must beat the analytic choice. flush_bytes: the buffer
    overwritten between launches; "L2": as large as the device's cache, None: none. Operands, results and scratch take up to
    2 M K + 3 N K + 4.25 M N elements in addition, outside of any budget, and are freed at the end.
    timer, arch: for measuring by other means; a timer given needs no GPU.

    Raises ValueError for what cannot be tuned, RuntimeError where there is no GPU to measure on, or where no tile ran.

    >>> best = tune("linear", 8192, 14336, 4096).tile  # doctest: +SKIP
    >>> tune("linear", 8192, 14336, 0)
    Traceback (most recent call last):
    ValueError: M=8192, N=14336, K=0 and rounds=20 must be at least 1, margin=0.02 at least 0
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind {shown(kind)}; choose one of {', '.join(KINDS)}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {shown(dtype)}; choose one of {', '.join(DTYPES)}")
    M, N, K = (check_int(size, name, None, 2**31 - 1) for name, size in (("M", M), ("N", N), ("K", K)))
    rounds = check_int(rounds, "rounds", None, _MOST_ROUNDS)
    margin = check_number(margin, "margin", -math.inf)
    if min(M, N, K) < 1 or rounds < 1 or margin < 0:
        raise ValueError(f"M={M}, N={N}, K={K} and rounds={rounds} must be at least 1, margin={margin} at least 0")
    check_activation(activation)
    if flush_bytes is not None and not (isinstance(flush_bytes, str) and flush_bytes == "L2"):
        flush_bytes = check_int(flush_bytes, "flush_bytes")
    check_function(timer, "timer")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device is {shown(device)}; expected a torch.device or its name")
    if arch is not None:
        arch = check_int(arch, "arch")
    tiles = None if tiles is None else check_sequence(tiles, "tiles", TileConfig, "TileConfigs in a sequence, or None")
    if timer is None:
        _need_gpu(device)
        timer = _EventTimer(torch.device(device), flush_bytes)
    make = calls(kind, M, N, K, dtype, activation, device)
    if arch is None:
        arch = arch_of(torch.empty(0, device=device))
    default = analytic_choice(kind, M, N, K, dtype, arch)
    wanted = list(dict.fromkeys((default, *(search_space(kind, dtype, arch) if tiles is None else tiles))))
    for tile in wanted:
        reason = why_invalid(kind, tile, dtype, arch)
        if reason is not None:
            raise ValueError(f"tile {tile.label} cannot be timed: {reason}")

    refused: list[tuple[TileConfig, str]] = []
    running: list[tuple[TileConfig, Callable[[], None]]] = []
    for tile in wanted:
        launch = make(tile)
        try:
            timer(launch)  # compiles
        except (OutOfResources, PTXASError) as error:
            refused.append((tile, str(error)))
        else:
            running.append((tile, launch))
    if not running or running[0][0] != default:
        raise RuntimeError(f"the analytic choice {default.label} of {kind} did not run: {dict(refused)[default]}")
    medians = interleaved_medians([launch for _, launch in running], timer, rounds)
    default_s = medians[0]
    measured = sorted(zip((tile for tile, _ in running), medians, strict=True), key=lambda pair: pair[1])
    tile, seconds = measured[0]
    if seconds > default_s * (1 - margin):
        tile, seconds = default, default_s
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)
    result = Tuned(
        kind, shape_class(M, N, K), dtype, arch, name, tile, seconds, default, default_s, tuple(measured), tuple(refused)
    )  # fmt: skip
    _keep(result)
    return result


def load(directory: str | Path | None = None) -> Mapping[TunedKey, TileConfig]:
    """Use what was tuned with this version of Triton and these kernels, from now on; the table that is used.

    Call it before the first forward pass; a second call may find the same results only. directory: by default `cache_dir()`.
    Results of other versions are passed over. Raises ValueError for a file that `tune` did not write, a tile that cannot run, or
    a directory that is not there; the default one need not be.
    """
    if directory is not None and not (isinstance(directory, str | os.PathLike) and os.path.isdir(directory)):
        raise ValueError(f"directory is {shown(directory)}; expected a folder that tune has written to, or None")
    table: dict[TunedKey, TileConfig] = {}
    for path in sorted(Path(cache_dir() if directory is None else directory).glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if (found["triton"], found["source"]) != (triton.__version__, _source_hash()):
                continue
            kind, dtype, arch = found["kind"], found["dtype"], found["arch"]
            M, N, K = (check_int(size, "shape", 1) for size in found["shape"])
            if kind not in KINDS or dtype not in DTYPES or arch not in SM_COUNT:
                raise ValueError(f"no kernel of kind {shown(kind)} for {shown(dtype)} on sm_{shown(arch)}")
            table[kind, (M, N, K), dtype, arch] = TileConfig(**found["tile"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no result of gpuckpt.tune ({shown(error)}); delete it") from error
    use_tuned(table)
    return table


_MOST_ROUNDS = 10_000
"""Of 68 tiles that take a millisecond each: 11 minutes."""

_BUSY_BYTES = 1 << 29
"""What a device takes longer to overwrite (100 us at 5 TB/s) than Python to queue a replay between two events."""


class _EventTimer:
    """Seconds of a launch by CUDA events around its graph, on the current stream, with the L2 cache overwritten before.

    The first call of a launch compiles it and captures its graph, which is kept as long as the timer."""

    def __init__(self, device: torch.device, flush_bytes: int | Literal["L2"] | None) -> None:
        if flush_bytes == "L2":
            flush_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(flush_bytes or 0, dtype=torch.uint8, device=device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushes = -(-_BUSY_BYTES // flush_bytes) if flush_bytes else 0
        self._graphs: dict[Callable[[], None], torch.cuda.CUDAGraph] = {}
        self._device = device

    def __call__(self, launch: Callable[[], None]) -> float:
        with torch.cuda.device(self._device):
            graph = self._graphs.get(launch)
            if graph is None:
                graph = self._graphs[launch] = _captured(launch)
            for _ in range(self._flushes):
                self._flush.zero_()
            self._begin.record()
            graph.replay()
            self._end.record()
            self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3


def _captured(launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The graph of one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()  # compiles, which a capture could not
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch()
    return graph


def _need_gpu(device: str | torch.device) -> None:
    hint = "without tuning, tiles are chosen by arithmetic (gpuckpt.kernels.host.tiles.choose), which needs no GPU"
    if torch.device(device).type != "cuda":
        raise RuntimeError(f"gpuckpt.tune measures on a CUDA device; got device={str(device)!r}. {hint}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"gpuckpt.tune measures on a CUDA device, and torch finds none here; {hint}")
    if INTERPRETED:
        raise RuntimeError("gpuckpt.tune cannot measure kernels that are interpreted; unset TRITON_INTERPRET")


def _source_hash() -> str:
    home = Path(__file__).parents[1]
    files = [path for pattern in _SOURCES for path in sorted(home.glob(pattern))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _keep(result: Tuned) -> None:
    """Write the result over an earlier one of the same key; readers never see half a file."""
    source = _source_hash()
    key = (result.kind, result.shape, result.dtype, result.arch, triton.__version__, source)
    found: dict[str, Any] = {**asdict(result), "triton": triton.__version__, "source": source}
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as part:
        part.write(json.dumps(found, indent=1))
    os.replace(part.name, folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json")
