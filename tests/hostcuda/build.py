"""Builds CuPy's runtime module against the host-memory stand-in of hostcuda.c, and keeps it in the user's cache.

CuPy's wheel links the CUDA runtime statically into one extension module, `cupy_backends.cuda.api.runtime`; every other module
of CuPy reaches the runtime through that one. So only this module is built again, from the sdist of the installed version,
and all the rest of CuPy runs as shipped. Needs a C compiler and a package index; `Unavailable` says what was missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version  # by name: tests put others in its place
from pathlib import Path

HERE = Path(__file__).parent
# The headers must be of the CUDA version that CuPy's cuda12x wheels are built with.
HEADER_PACKAGES = ("nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-nvcc-cu12==12.9.86")
CUDA_VERSION = 12090
PROFILER_HEADER = """#pragma once
#include <cuda_runtime_api.h>
extern "C" cudaError_t cudaProfilerStart(void);
extern "C" cudaError_t cudaProfilerStop(void);
"""
CYTHONIZE = """
import sys, Cython
from Cython.Compiler.Main import CompilationOptions, compile
options = CompilationOptions(
    cplus=True, language_level=3, include_path=["."], output_file="cupy_backends/cuda/api/runtime.cpp",
    compile_time_env=dict(CUPY_CUDA_VERSION=int(sys.argv[1]), CUPY_HIP_VERSION=0, CUPY_USE_CUDA_PYTHON=False,
                          CUPY_CUFFT_STATIC=False, CUPY_CYTHON_VERSION=Cython.__version__),
    compiler_directives=dict(binding=False, c_api_binop_methods=True, embedsignature=True, freethreading_compatible=True))
sys.exit(compile("cupy_backends/cuda/api/runtime.pyx", options).num_errors)
"""


class Unavailable(Exception):
    """The stand-in cannot be built here; the message says why."""


def cached_module() -> Path:
    """The built module, from the cache or built now (about 20 s). Raises `Unavailable`."""
    installed = cupy_version()
    digest = hashlib.sha256((HERE / "hostcuda.c").read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuckpt" / "hostcuda"
    folder = root / f"cupy{installed}-{sysconfig.get_config_var('SOABI')}-{digest}"
    module = folder / "runtime.so"
    if module.exists():
        return module
    root.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(root / "lock"):
        if not module.exists():  # another process may have built it while this one waited
            with tempfile.TemporaryDirectory(dir=root) as work:
                built = _build(installed, Path(work))
                folder.mkdir(exist_ok=True)
                built.replace(module)
    return module


def cupy_version() -> str:
    """The installed version of cupy-cuda12x. Raises `Unavailable` without one."""
    try:
        return version("cupy-cuda12x")
    except PackageNotFoundError:
        raise Unavailable("cupy-cuda12x is not installed") from None


def _build(version: str, work: Path) -> Path:
    compiler, linker = shutil.which("gcc"), shutil.which("g++")
    if compiler is None or linker is None:
        raise Unavailable("no C compiler: gcc and g++ are needed")
    # Without READTHEDOCS the metadata step of CuPy's sdist looks for a CUDA toolkit and fails.
    _pip(work, ["--no-binary", "cupy", f"cupy=={version}"], {"READTHEDOCS": "True"})
    for package in HEADER_PACKAGES:
        _pip(work, ["--only-binary", ":all:", package], {})
    for wheel in work.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(work / "headers")
    with tarfile.open(next(work.glob("cupy-*.tar.gz"))) as sdist:
        members = [member for member in sdist.getmembers() if "/cupy_backends/" in member.name]
        sdist.extractall(work, members=members, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = work / f"cupy-{version}"
    (work / "cuda_profiler_api.h").write_text(PROFILER_HEADER)
    includes = [f"-I{path}" for path in (work, *work.glob("headers/nvidia/*/include"), source)]
    includes.append(f"-I{sysconfig.get_paths()['include']}")
    _do([sys.executable, "-c", CYTHONIZE, str(CUDA_VERSION)], source)
    common = ["-O1", "-w", "-fPIC", *includes, "-c"]
    runtime = "cupy_backends/cuda/api/runtime.cpp"
    _do([linker, '-DCYTHON_EXTERN_C=extern "C"', *common, runtime, "-o", "runtime.o"], source)
    _do([compiler, *common, str(HERE / "hostcuda.c"), "-o", "hostcuda.o"], source)
    _do([linker, "-shared", "runtime.o", "hostcuda.o", "-lpthread", "-o", "runtime.so"], source)
    return source / "runtime.so"


def _pip(folder: Path, request: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", *request]
    _do(command, folder, environment)


def _do(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    try:
        subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or "").strip()[-600:]
        raise Unavailable(f"`{' '.join(command[:6])} ...` failed: {said or error}") from error


@contextlib.contextmanager
def _one_at_a_time(path: Path):
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
