"""The process behind `compile.compile_all`: reads one request a line, compiles, answers one line of JSON.

Started with TRITON_INTERPRET=0. Triton's own cache is pointed at a folder that goes away with the process: it would keep five
copies of the intermediate code of every kernel, and the report is all that is wanted.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import sass

_STORE = re.compile(r"^\s*tt\.(?:store|descriptor_store)\b.*:\s*(.*?)\s*(?:loc\(.*)?$", re.MULTILINE)
_TENSOR = re.compile(r"tensor<([0-9x]+x)(?:!tt\.ptr<([a-zA-Z0-9]+)[^>]*>|([a-zA-Z0-9]+))[^>]*>")
_SCALAR = re.compile(r"!tt\.ptr<([a-zA-Z0-9]+)[^>]*>")


def main() -> int:
    # Compilers print; the answers go to a private copy of standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="gpuckpt-aot-") as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = _answer(request, Path(scratch))
            except Exception as error:  # whatever Triton, ptxas or the kernel's module raised is the report
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps({"name": request["name"], "arch": request["arch"], **answer}) + "\n")
            answers.flush()
    return 0


@functools.cache
def _load(module: str, file: str) -> Any:
    try:
        if module != "__main__":
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
    found = importlib.util.spec_from_file_location(f"_gpuckpt_aot_{Path(file).stem}", file)
    if found is None or found.loader is None:
        raise ImportError(f"no module {module!r} and no Python file {file!r}")
    loaded = importlib.util.module_from_spec(found)
    sys.modules[found.name] = loaded
    found.loader.exec_module(loaded)
    return loaded


def _function(where: dict[str, str]) -> Any:
    from triton.runtime.jit import JITFunction

    found = functools.reduce(getattr, where["name"].split("."), _load(where["module"], where["file"]))
    while not isinstance(found, JITFunction):
        found = found.fn  # under autotune or heuristics
    return found


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if "function" in value:
            return _function(value["function"])
        import triton.language as tl

        return tl.dtype(value["dtype"])
    return value


@functools.cache
def _analysis_hash() -> str:
    sources = [Path(__file__), Path(str(sass.__file__))]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()


def _answer(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=_function(request["function"]),
        signature={n: tuple(t) if isinstance(t, list) else t for n, t in request["signature"].items()},
        constexprs={tuple(k) if isinstance(k, list) else k: _decode(v) for k, v in request["constexprs"]},
        attrs={tuple(path): value for path, value in request["attrs"]},
    )
    parts = [source.hash(), json.dumps(request["options"], sort_keys=True), str(request["arch"]), triton.__version__]
    parts += [os.environ.get("TRITON_DEFAULT_FP_FUSION", ""), _analysis_hash()]
    kept = Path(request["cache"]) / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()}.json"
    if request["use_cache"] and kept.is_file():
        return {**json.loads(kept.read_text(encoding="utf-8")), "cached": True}
    begin = time.perf_counter()
    target = GPUTarget("cuda", request["arch"], 32)
    kernel = triton.compile(source, target=target, options=request["options"])
    answer = _measure(kernel, scratch)
    answer |= {"triton": triton.__version__, "seconds": round(time.perf_counter() - begin, 3)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=kept.parent, suffix=".part", delete=False, encoding="utf-8") as part:
        part.write(json.dumps(answer))
    os.replace(part.name, kept)  # another process never reads half a report
    return answer


def _measure(kernel: Any, scratch: Path) -> dict[str, Any]:
    cubin = scratch / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = _tool("--dump-resource-usage", cubin)
    code = sass.analyse(_tool("-sass", cubin))
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump reported no registers: {usage[-200:]!r}")
    result = {k: v for k, v in vars(code).items() if k != "loops"}
    result["loops"] = [vars(loop) for loop in code.loops]
    return result | {
        "registers": int(registers[1]),
        "stack_bytes": int(stack[1]),
        "shared_bytes": int(kernel.metadata.shared),
        "tmem_columns": int(getattr(kernel.metadata, "tmem_size", 0) or 0),
        "threads": 32 * int(kernel.metadata.num_warps),
        "stores": _stores(kernel.asm["ttir"]),
    }


def _tool(flag: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout:
        raise RuntimeError(f"{tool.name} {flag} failed with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _stores(ttir: str) -> dict[str, int]:
    """Type of what each store writes -> how many stores write one, e.g. {"128x64xbf16": 2, "fp32": 1}."""
    counts: dict[str, int] = {}
    for match in _STORE.finditer(ttir):
        tensors = list(_TENSOR.finditer(match[1]))
        if tensors:
            last = tensors[-1]
            written = last[1] + (last[2] or last[3])
        else:
            scalar = _SCALAR.search(match[1])
            if scalar is None:
                raise RuntimeError(f"a store of unknown type in the Triton IR: {match[0].strip()!r}")
            written = scalar[1]
        counts[written] = counts.get(written, 0) + 1
    return dict(sorted(counts.items()))


if __name__ == "__main__":
    raise SystemExit(main())
