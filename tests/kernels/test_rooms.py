"""The rooms of kernels/: who may import whom, and that host code is annotated."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gpuckpt.kernels

HOME = Path(gpuckpt.kernels.__file__).parent
FILES = sorted(HOME.rglob("*.py"))
MAY_KNOW = {
    "device": set(),
    "host": {"device"},
    "operations": {"device", "host"},
    "testing": {"device", "host", "operations"},
    "audit": {"device", "host", "operations", "testing"},
    "tuning": {"device", "host", "operations", "testing", "audit"},
}
"""Room -> the rooms below it. "operations" is the top of the package: one operation, one file."""


def place(path):
    parts = path.relative_to(HOME).with_suffix("").parts
    return tuple(p for p in parts if p != "__init__")


def room(parts):
    return parts[0] if parts and parts[0] in MAY_KNOW else "operations"


def imported(path):
    """What a file imports of the package, anywhere in it, as parts below kernels/."""
    package = path.relative_to(HOME).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(
                (node.module or "").split(".") if node.module else ()
            )
            for alias in node.names:
                inner = (*base, alias.name)
                is_module = (HOME.joinpath(*inner)).with_suffix(".py").exists() or HOME.joinpath(*inner).is_dir()
                yield inner if is_module else base


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(place(p)) or "kernels")
def test_no_arrow_points_up(path):
    own = room(place(path))
    for other in imported(path):
        assert room(other) == own or room(other) in MAY_KNOW[own], f"{own} imports {'.'.join(other)}"


def test_no_circle():
    knows = {place(p): set(imported(p)) - {place(p)} for p in FILES}
    while knows:
        free = [name for name, others in knows.items() if not others & knows.keys()]
        assert free, f"a circle among {sorted('.'.join(n) for n in knows)}"
        for name in free:
            del knows[name]


def test_files_and_folders_are_small():
    assert max(len(p.read_text(encoding="utf-8").splitlines()) for p in FILES) < 350
    assert max(len(list(folder.glob("*.py"))) for folder in {p.parent for p in FILES}) <= 16


def is_jit(node):
    return any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(place(p)) or "kernels")
def test_every_function_but_a_kernel_says_its_types(path):
    """As mypy's disallow_untyped_defs, which cannot leave out the bodies under triton.jit."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not is_jit(node):
            given = [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]
            bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
            assert node.returns is not None and not bare, f"{node.name}: {bare or 'no return type'}"  # noqa: PT018
