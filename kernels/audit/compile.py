"""Compiles kernels ahead of time, with no GPU, and reports what the machine code does.

`compile_all` hands `KernelSpec`s to worker processes. They run with TRITON_INTERPRET=0 whatever the caller has set, since
a process that interprets kernels cannot compile them; each holds Triton once and takes one spec after another. Registers
and stack come from Triton's bundled `cuobjdump`, shared and tensor memory from Triton's metadata, everything else from the
machine code (`sass.py`) and from the stores in the Triton IR. Checked with triton 3.6.0, 3.7.1 and 3.9.0.

Reports are kept on disk under GPUCKPT_CACHE_DIR, else XDG_CACHE_HOME/gpuckpt, else ~/.cache/gpuckpt. The key is Triton's own
hash of the kernel, its helpers, types and constants, with the options, the architecture, Triton's version and the source of
the analysis: a stale report cannot be read back.

It does not run, time or verify a kernel, and does not know bounds: `dossier.py` does.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .sass import Loop
from .specs import KernelSpec

__all__ = ["COMPILE_LIMIT_S", "Report", "cache_dir", "compile_all", "compile_spec"]

COMPILE_LIMIT_S = 600.0
"""A worker that needs longer for one kernel is ended, and the report says so."""


@dataclass(frozen=True)
class Report:
    """What one kernel became. All counts are static: instructions in the code, not executions.

    error: why there is no code, or None; the other fields are zero then.
    registers: per thread (the hardware's limit is 255). stack_bytes: per thread. shared_bytes: dynamic shared memory a block.
    tmem_columns: tensor memory of sm_100, out of 512. tensor_core: opcode -> count. stores: type of what each store of the
    Triton IR writes ("128x64xbf16") -> how many stores write one. loops: innermost loops that use tensor cores.
    seconds: what the compilation took (of the original one, when cached).
    """

    name: str
    arch: int
    triton: str = ""
    error: str | None = None
    cached: bool = False
    seconds: float = 0.0
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    tmem_columns: int = 0
    threads: int = 0
    instructions: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    tensor_core: dict[str, int] = field(default_factory=dict)
    tma_loads: int = 0
    async_copies: int = 0
    global_loads: int = 0
    global_stores: int = 0
    global_atomics: int = 0
    shared_atomics: int = 0
    stores: dict[str, int] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Report:
        known = {f.name for f in fields(Report)}
        values = {k: v for k, v in data.items() if k in known}
        values["loops"] = [Loop(**loop) for loop in values.get("loops", [])]
        return Report(**values)


def cache_dir() -> Path:
    """Where reports are kept; not created here."""
    if own := os.environ.get("GPUCKPT_CACHE_DIR"):
        return Path(own).expanduser() / "aot"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "gpuckpt" / "aot"


def compile_spec(spec: KernelSpec) -> Report:
    """Compile one kernel in a worker process. A kernel that does not compile gives a report with `error` set."""
    return compile_all([spec], jobs=1)[0]


def compile_all(
    specs: Iterable[KernelSpec],
    jobs: int | None = None,
    progress: Callable[[Report], None] | None = None,
    *,
    use_cache: bool = True,
) -> list[Report]:
    """Compile every spec and report in the order given.

    jobs: worker processes, by default one a core. progress: called in this thread with each report as it comes.
    use_cache: whether earlier reports may be read back; they are written either way.
    """
    todo = list(specs)
    if not todo:
        return []
    if jobs is None:
        jobs = os.cpu_count() or 1
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: at least one worker is needed")
    requests: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
    for number, spec in enumerate(todo):
        requests.put((number, _request(spec, use_cache)))
    answers: queue.SimpleQueue[tuple[int, Report] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    threads = [
        threading.Thread(target=_serve, args=(requests, answers, stop), name=f"gpuckpt-aot-{k}", daemon=True)
        for k in range(min(jobs, len(todo)))
    ]
    for thread in threads:
        thread.start()
    reports: dict[int, Report] = {}
    try:
        while len(reports) < len(todo):
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            reports[answer[0]] = answer[1]
            if progress is not None:
                progress(answer[1])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return [reports[k] for k in range(len(todo))]


def _name_function(fn: Any) -> dict[str, str]:
    """Where a worker finds a kernel: by module, or by file where the module is the script that was started."""
    plain = fn
    while hasattr(plain, "fn"):  # jit, autotune and heuristics wrap one another
        plain = plain.fn
    module = sys.modules.get(plain.__module__)
    source = getattr(module, "__file__", None) or plain.__code__.co_filename
    return {"module": plain.__module__, "file": str(source), "name": plain.__qualname__}


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "fn"):
        return {"function": _name_function(value)}
    if type(value).__name__ == "constexpr":
        return _encode(value.value)
    if type(value).__name__ == "dtype":
        return {"dtype": value.name}
    raise TypeError(f"a constant of type {type(value).__name__} cannot be handed to a compile worker: {value!r}")


def _request(spec: KernelSpec, use_cache: bool) -> dict[str, Any]:
    return {
        "name": spec.name,
        "arch": spec.arch,
        "function": _name_function(spec.fn),
        "signature": dict(spec.signature),
        "constexprs": [[k if isinstance(k, str) else list(k), _encode(v)] for k, v in spec.constexprs.items()],
        "attrs": [[list(path), value] for path, value in spec.attrs.items()],
        "options": {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options},
        "cache": str(cache_dir()),
        "use_cache": use_cache,
    }


class _Worker:
    """One compiling process, spoken to in lines of JSON over its standard input and output."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        # Unset, it means on in triton 3.9 and off in 3.10; what is audited must not change with the version.
        environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        # With exactly this process's path: `python -m` would put the current folder first and could find another gpuckpt there.
        start = (
            f"import sys; sys.path[:] = {sys.path!r}; from {__package__}.compile_worker import main; sys.exit(main())"
        )
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=environment,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The worker's answer, or None where it died or was ended for taking too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(COMPILE_LIMIT_S, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return json.loads(line) if line else None

    def close(self) -> str:
        """End the process; its exit status and the last line it wrote to standard error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:  # it is gone already, which is what is wanted
            self._process.kill()
        status = self._process.wait()
        self._process.stdout.close()
        with self._complaints as written:
            written.seek(0)
            last = written.read().decode(errors="replace").strip().rpartition("\n")[2]
        return f"status {status}" + (f", saying {last[:200]!r}" if last else "")


def _serve(
    requests: queue.SimpleQueue[tuple[int, dict[str, Any]]],
    answers: queue.SimpleQueue[tuple[int, Report] | BaseException],
    stop: threading.Event,
) -> None:
    worker: _Worker | None = None
    try:
        while not stop.is_set():
            try:
                number, request = requests.get_nowait()
            except queue.Empty:
                break
            if worker is None:
                worker = _Worker()
            answer = worker.ask(request)
            if answer is None:
                why = f"the compiler's process crashed, or was killed after {COMPILE_LIMIT_S:.0f} s: {worker.close()}"
                worker = None
                answer = {"name": request["name"], "arch": request["arch"], "error": why}
            answers.put((number, Report.from_json(answer)))
    except BaseException as error:  # handed to the caller's thread, which raises it
        answers.put(error)
    finally:
        if worker is not None:
            worker.close()
