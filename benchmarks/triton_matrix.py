"""Every kernel that ships, through several versions of Triton's compiler: `python benchmarks/triton_matrix.py`, or `make matrix`.

For each version: installs that wheel by its exact number, alone, into a folder of its own (torch pins no Triton), puts it first
on the import path of a fresh process, compiles there the preferred bf16 tile of each kernel and way of loading for each
architecture, and checks the bounds of `gpuckpt.kernels.audit.dossier`. Writes benchmarks/results/triton_matrix.md. Needs no GPU.
Ends with 1 where a bound is broken, and with an error where a version cannot be had.

Not done: running the kernels. That needs a GPU, and Triton 3.6.0's interpreter needs an older NumPy than is pinned here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
ARCHS = (80, 90, 100)


def install(version: str, home: Path) -> Path:
    """The folder that holds triton `version`, filled once."""
    folder = home / f"triton-{version}"
    if not any(folder.glob(f"triton-{version}.dist-info")):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), f"triton=={version}"], check=True)
    return folder


def compile_here(archs: list[int], jobs: int | None, every_tile: bool) -> dict[str, Any]:
    """In the process that has the version: the dossier as `Dossier.to_json` writes it."""
    import triton

    from gpuckpt.kernels.audit.compile import Report
    from gpuckpt.kernels.audit.dossier import build
    from gpuckpt.kernels.audit.specs import KernelSpec, shipped

    def progress(report: Report) -> None:
        print(
            f"  {triton.__version__} sm_{report.arch} {report.name} {report.seconds:.1f} s", file=sys.stderr, flush=True
        )

    preferred: dict[tuple[int, str, bool], KernelSpec] = {}
    for arch in archs:
        for spec in shipped(arch):
            if spec.dtype == "bf16":
                preferred.setdefault((arch, spec.meta["kernel"], spec.meta["tma"]), spec)
    dossier = build(archs, jobs, progress, specs=None if every_tile else preferred.values())
    return {"version": triton.__version__, **dossier.to_json()}


def compile_with(version: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`compile_here` in a process whose Triton is the one in `folder`."""
    path = os.pathsep.join([str(folder), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    said = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(said, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if found != version:
        raise RuntimeError(f"asked for triton {version}, a process with {folder} on its path imports {found}")
    command = [sys.executable, __file__, "--here", "--archs", *map(str, args.archs)]
    command += ["--every-tile"] if args.every_tile else []
    command += ["--jobs", str(args.jobs)] if args.jobs else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def to_markdown(results: list[dict[str, Any]]) -> str:
    """One row a kernel and architecture, one column a version: registers, spill instructions and shared memory."""
    versions = [r["version"] for r in results]
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for result in results:
        for k in result["kernels"]:
            fine = f"{k['registers']} / {k['spill_stores'] + k['spill_loads']} / {k['shared_bytes']:,}"
            text = fine if not k["violations"] else "; ".join(k["violations"]).replace("|", "/")
            cells.setdefault((k["arch"], k["name"]), {})[result["version"]] = text
    broken = sum(len(r["violations"]) for r in results)
    lines = [
        "# Kernels through several versions of Triton's compiler",
        "",
        "Made by `make matrix` (`python benchmarks/triton_matrix.py`). Compiled ahead of time, not run. The preferred bf16 tile",
        "of each kernel and way of loading, checked against the bounds of the dossier; a cell shows registers a thread / spill",
        "instructions / bytes of shared memory, or which bound is broken.",
        "",
        f"{sum(len(r['kernels']) for r in results)} compilations, broken bounds: {broken}.",
        "",
        "| kernel | sm | " + " | ".join(f"triton {v}" for v in versions) + " |",
        "| --- | --- | " + " | ".join("---" for _ in versions) + " |",
    ]
    for (arch, name), row in sorted(cells.items(), key=lambda item: (item[0][1], item[0][0])):
        lines.append(f"| {name} | {arch} | " + " | ".join(row.get(v, "not shipped") for v in versions) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS))
    parser.add_argument("--archs", nargs="+", type=int, default=list(ARCHS))
    parser.add_argument("--jobs", type=int, help="compiler processes, one a core by default")
    parser.add_argument("--every-tile", action="store_true", help="every tile and dtype instead of the preferred ones")
    parser.add_argument("--home", type=Path, default=HERE.parent / "out" / "triton", help="where the wheels are put")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "triton_matrix.md")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(compile_here(args.archs, args.jobs, args.every_tile)))
        return 0
    results = [compile_with(v, install(v, args.home), args) for v in args.versions]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(to_markdown(results), encoding="utf-8")
    broken = [f"triton {r['version']}: {v}" for r in results for v in r["violations"]]
    print("\n".join(broken) or f"no bound broken; {args.out} written")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
