"""The matrix of Triton versions: its table and its isolation always, the compilations themselves in the nightly run."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "triton_matrix.py"


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("triton_matrix", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(name, arch, **more):
    return {"name": name, "arch": arch, "registers": 128, "spill_stores": 0, "spill_loads": 0, "shared_bytes": 65536,
            "violations": [], **more}  # fmt: skip


def test_a_broken_bound_stands_in_its_cell(matrix):
    text = matrix.to_markdown(
        [
            {"version": "3.6.0", "kernels": [entry("f[bf16]", 90), entry("g[bf16]", 90)], "violations": []},
            {
                "version": "3.9.0",
                "kernels": [entry("f[bf16]", 90, spill_stores=3, violations=["spills: 3 STL and 0 LDL"])],
                "violations": ["sm_90 f[bf16]: spills: 3 STL and 0 LDL"],
            },
        ]
    )
    assert "3 compilations, broken bounds: 1." in text
    assert "| kernel | sm | triton 3.6.0 | triton 3.9.0 |" in text
    assert "| f[bf16] | 90 | 128 / 0 / 65,536 | spills: 3 STL and 0 LDL |" in text
    assert "| g[bf16] | 90 | 128 / 0 / 65,536 | not shipped |" in text


def test_a_version_that_is_there_is_not_fetched_again(matrix, tmp_path, monkeypatch):
    (tmp_path / "triton-9.9.9" / "triton-9.9.9.dist-info").mkdir(parents=True)
    monkeypatch.setattr(matrix.subprocess, "run", lambda *_, **__: pytest.fail("it asked pip"))
    assert matrix.install("9.9.9", tmp_path) == tmp_path / "triton-9.9.9"


def test_another_version_than_the_one_asked_for_is_noticed(matrix, tmp_path):
    """An empty folder comes first on the path: the process then finds the Triton of this environment."""
    args = argparse.Namespace(archs=[80], every_tile=False, jobs=1)
    with pytest.raises(RuntimeError, match=rf"asked for triton 1\.2\.3, .* imports {triton.__version__}"):
        matrix.compile_with("1.2.3", tmp_path, args)


@pytest.mark.slow
def test_every_version_compiles_every_kernel_within_its_bounds(tmp_path):
    """Needs the three wheels; about half an hour of two cores where nothing is cached."""
    out = tmp_path / "matrix.md"
    done = subprocess.run([sys.executable, SCRIPT, "--out", out], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "broken bounds: 0." in out.read_text()
