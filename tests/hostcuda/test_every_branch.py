"""Every branch on CUDA in gpuckpt is run by the tests that have tensors on the stand-in device.

Two kinds are read from the source: each place that asks a tensor `is_cuda`, within an expression too, which has to have heard
yes; and each `if` whose condition names "cuda" or asks `torch.cuda`, of which the side for CUDA has to have run. That the other
side is run needs no list: all other tests do that.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for place in ("gpuckpt/backend.py", "gpuckpt/budget.py", "gpuckpt/memory", "gpuckpt/pytorch")
    for path in (sorted((ROOT / place).rglob("*.py")) if (ROOT / place).is_dir() else [ROOT / place])
]
TESTS = ("tests/memory/test_cuda_branches.py", "tests/pytorch/test_cuda_branches.py")


def asks(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """First and last line of each `x.is_cuda`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "is_cuda":
            yield node.lineno, node.end_lineno or node.lineno


def branches(tree: ast.AST) -> Iterator[tuple[int, int, bool]]:
    """Line of each `if` about CUDA, that of the first statement that it guards, and whether that statement is for CUDA."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            text = ast.unparse(node.test)
            if "'cuda'" in text or "torch.cuda" in text or "capturing" in text:
                yield node.lineno, node.body[0].lineno, "not torch.cuda" not in text and "not in" not in text


def test_each_branch_is_run(tmp_path):
    told, covered = tmp_path / "told", tmp_path / "covered.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *TESTS,
        "--cov=gpuckpt",
        "--cov-branch",
        f"--cov-report=json:{covered}",
    ]
    environment = {**os.environ, "GPUCKPT_TOLD_YES": str(told), "COVERAGE_FILE": str(tmp_path / ".coverage")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    heard: dict[str, set[int]] = {}
    for line in told.read_text().splitlines():
        name, _, number = line.rpartition(":")
        heard.setdefault(name, set()).add(int(number))
    files = json.loads(covered.read_text())["files"]
    missed, seen = [], 0
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = str(path.relative_to(ROOT))
        taken = {(first, to) for first, to in files.get(name, {}).get("executed_branches", ())}
        for first, last in asks(tree):
            seen += 1
            if not heard.get(str(path), set()) & set(range(first, last + 1)):
                missed.append(f"{name}:{first} asks is_cuda, and no tensor on a device was asked")
        for line, body, is_for_cuda in branches(tree):
            seen += 1
            if not any(first == line and (to == body) == is_for_cuda for first, to in taken):
                missed.append(f"{name}:{line} is about CUDA, and its side for CUDA was not run")
    assert seen > 15
    assert not missed, "\n" + "\n".join(missed) + "\nwrite a test of each in " + " or ".join(TESTS)
