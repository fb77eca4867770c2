"""Small deliberate faults, planted one at a time: which of them do the tests of their own room see?

    python -m tests.mutants --minutes 10            # a sample of every room: `make mutants`
    python -m tests.mutants --minutes 600 memory    # as much as fits, of one room

The sources are copied: the checkout stays as it is. Each room's tests run once under coverage, which tells who reaches a
line; a mutant is then put before those tests, the quickest first, in a process that has loaded torch already. A mutant
is seen if a test fails or takes far longer. What no test reaches is unseen without a run. The sample depends on `--seed` alone.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent.parent
ROOMS = {
    "memory": (["gpuckpt/memory"], ["tests/memory"]),
    "engine": (["gpuckpt/pytorch/engine"], ["tests/pytorch/engine"]),
    "planning": (["gpuckpt/planning"], ["tests/planning"]),
    "kernels": (["kernels/*.py", "kernels/host"], ["tests/kernels/*.py", "tests/kernels/host"]),
}
"""Sources, and the tests that have to see what is wrong with them."""

MOST_S = 30.0  # of tests for one mutant, by what they took without a fault
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
}  # fmt: skip


class Mutant(NamedTuple):
    """`source[start:end]` of the file at `path` replaced by `text`."""

    path: str
    line: int
    start: int
    end: int
    before: str
    text: str

    def __str__(self) -> str:
        before, after = (" ".join(part.split())[:70] for part in (self.before, self.text))
        return f"{self.path}:{self.line}: {before}  ->  {after}"


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """Every mutant of one file. Compiled functions are left out (coverage does not see them), and so are messages and reprs."""
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text.encode()))
    data = source.encode()

    def replaced(node: Any, text: str) -> Mutant:
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        return Mutant(path, node.lineno, start, end, data[start:end].decode(), text)

    def walk(node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.FunctionDef):
            marks = " ".join(map(ast.unparse, node.decorator_list))
            if any(word in marks for word in ("jit", "compiled")) or node.name in ("__repr__", "__str__"):
                return
            for part in node.body:
                yield from walk(part)
            return
        if isinstance(node, ast.Raise):
            yield replaced(node, "pass")
            return
        if isinstance(node, ast.Assert | ast.JoinedStr | ast.AnnAssign | ast.Import | ast.ImportFrom):
            return
        yield from _changes(node, replaced)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from walk(node)


def _changes(node: Any, replaced: Any) -> Iterator[Mutant]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        other = copy.copy(node)
        other.ops = [SWAPS[type(node.ops[0])]()]
        yield replaced(node, f"({ast.unparse(other)})")
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in SWAPS:
        other = copy.copy(node)
        other.op = SWAPS[type(node.op)]()
        yield replaced(node, f"({ast.unparse(other)})")
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        other = copy.copy(node)
        other.op = SWAPS[type(node.op)]()
        yield replaced(node, ast.unparse(other))
        yield replaced(node, "pass")
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield replaced(node, f"bool({ast.unparse(node.operand)})")
    elif isinstance(node, ast.If | ast.IfExp):
        yield replaced(node.test, f"(not ({ast.unparse(node.test)}))")
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield replaced(node, f"({node.value} + 1)")
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield replaced(node, "pass")
    elif isinstance(node, ast.With) and "lock" in (held := ast.unparse(node.items[0].context_expr)).lower():
        yield replaced(node.items[0].context_expr, f"__import__('contextlib').nullcontext({held})")


class Recorder:
    """A plugin: seconds of each test, and how many failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def run_tests(place: Path, words: list[str], limit_s: float, answer: Path | None = None) -> int | None:
    """Run pytest in a fork of this process, which has loaded what takes long; its exit code, None where it was ended after
    `limit_s`."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            os.chdir(place)
            sys.path.insert(0, str(place))
            os.environ["PYTHONPATH"] = str(place)
            out = os.open(place / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(out, number)
            import pytest

            recorder = Recorder()
            code = int(pytest.main(words, plugins=[recorder]))
            if answer is not None:
                answer.write_text(json.dumps({"seconds": recorder.seconds, "failed": recorder.failed}))
        finally:
            if code == 70:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + limit_s
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


class Room:
    """One room in a copy of the sources at `place`: its mutants, and who reaches which line."""

    def __init__(self, name: str, place: Path, seed: int) -> None:
        self.name, self.place = name, place
        sources, self.tests = ROOMS[name]
        files = [path for pattern in sources for path in sorted(place.glob(pattern))]
        files = [path for each in files for path in ([each] if each.is_file() else sorted(each.rglob("*.py")))]
        self.mutants = [
            mutant
            for path in files
            for mutant in mutants_of(str(path.relative_to(place)), path.read_text(encoding="utf-8"))
        ]
        random.Random(seed).shuffle(self.mutants)
        self.seen = 0
        self.unseen: list[str] = []
        self.spent_s = 0.0

    def look_once(self) -> None:
        """Run the tests under coverage. Raises `RuntimeError` where they fail without any fault."""
        began, answer = time.monotonic(), self.place / f"{self.name}.json"
        os.environ["COVERAGE_FILE"] = str(self.place / f".coverage-{self.name}")
        paths = [str(path.relative_to(self.place)) for each in self.tests for path in sorted(self.place.glob(each))]
        words = [
            *paths,
            "-q",
            "-m",
            "not slow and not timed and not gpu",
            "--cov=gpuckpt",
            "--cov-context=test",
            "--cov-report=",
        ]
        code = run_tests(self.place, words, 3600.0, answer)
        found = json.loads(answer.read_text()) if answer.exists() else {"failed": "?", "seconds": {}}
        if code != 0:
            raise RuntimeError(
                f"the tests of {self.name} fail without any fault (exit code {code}): {found['failed']}\n"
                + (self.place / "pytest.log").read_text(errors="replace")[-2000:]
            )
        self.seconds: dict[str, float] = found["seconds"]
        from coverage import CoverageData

        data = CoverageData(os.environ["COVERAGE_FILE"])
        data.read()
        self.reached = {
            str(Path(file).relative_to(self.place)): data.contexts_by_lineno(file) for file in data.measured_files()
        }
        self.spent_s += time.monotonic() - began

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Tests that reach the line, quickest first, as many as take `MOST_S`."""
        contexts = self.reached.get(mutant.path, {}).get(mutant.line, [])
        names = {context.partition("|")[0] for context in contexts} & self.seconds.keys()
        chosen, total_s = [], 0.0
        for name in sorted(names, key=self.seconds.__getitem__):
            total_s += self.seconds[name]
            if chosen and total_s > MOST_S:
                break
            chosen.append(name)
        return chosen

    def put(self, mutant: Mutant) -> None:
        """Plant one mutant and ask the tests."""
        began = time.monotonic()
        chosen = self.tests_of(mutant)
        code: int | None = 0
        if chosen:
            path = self.place / mutant.path
            whole = path.read_bytes()
            path.write_bytes(whole[: mutant.start] + mutant.text.encode() + whole[mutant.end :])
            try:
                limit_s = 30.0 + 5 * sum(self.seconds[name] for name in chosen)
                code = run_tests(self.place, [*chosen, "-q", "-x", "--no-cov"], limit_s)
            finally:
                path.write_bytes(whole)
        if code == 0:
            self.unseen.append(str(mutant) + ("" if chosen else "  (reached by no test of the room)"))
        else:
            self.seen += 1
        self.spent_s += time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", choices=[[], *ROOMS], help="which rooms [all]")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, the runs under coverage not counted")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.dont_write_bytecode = True  # two mutants of one size and second would be taken for each other
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        place = Path(folder).resolve()
        for name in subprocess.check_output(["git", "ls-files"], cwd=HERE, text=True).splitlines():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / name, place / name)
        rooms = [Room(name, place, options.seed) for name in options.rooms or ROOMS]
        for room in rooms:
            room.look_once()
            share_s = room.spent_s + options.minutes * 60 / len(rooms)
            for mutant in room.mutants:
                if room.spent_s > share_s:
                    break
                room.put(mutant)
            print("\n".join(room.unseen), flush=True)
            tried = room.seen + len(room.unseen)
            print(
                f"{room.name}: {room.seen} of {tried} seen ({room.seen / max(tried, 1):.0%}), of {len(room.mutants)} mutants; "
                f"seed {options.seed}, {room.spent_s:.0f} s\n",
                flush=True,
            )


if __name__ == "__main__":
    main()
