"""The map of the house, read from the imports: no circle, no arrow up, and who may know torch."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import gpuckpt

HOME = Path(gpuckpt.__file__).parent
FILES = {
    path: ".".join(("gpuckpt", *path.relative_to(HOME).with_suffix("").parts)) for path in sorted(HOME.rglob("*.py"))
}
MODULES = {name.removesuffix(".__init__"): path for path, name in FILES.items()}

FLOORS = (
    ("gpuckpt.checks",),
    ("gpuckpt.errors", "gpuckpt.units", "gpuckpt.kernels", "gpuckpt.pytorch._torch_internals"),
    ("gpuckpt.backend", "gpuckpt.memory", "gpuckpt.planning"),
    ("gpuckpt.pytorch.engine", "gpuckpt.segments"),
    ("gpuckpt.budget", "gpuckpt.pytorch.ops"),
    ("gpuckpt.functional", "gpuckpt.nn", "gpuckpt.pytorch.profiling"),
    ("gpuckpt.pytorch.parallel", "gpuckpt.pytorch.whole_device"),
    ("gpuckpt.pytorch",),
    ("gpuckpt.integrations", "gpuckpt.report"),
    ("gpuckpt.cli",),
    ("gpuckpt",),
)
"""Rooms from the ground up. A room knows itself and what lies below it; not its neighbours on the same floor."""


def room_of(module: str) -> tuple[int, str]:
    """Its floor, and its name: of the rooms that a module could be in the one with the longest name."""
    rooms = [(len(room), floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms]
    found = max(entry for entry in rooms if module == entry[2] or module.startswith(entry[2] + "."))
    if found[2] == "gpuckpt" and module != "gpuckpt" and not module.startswith("gpuckpt.__"):
        raise AssertionError(f"{module} stands in no room; give it one in FLOORS")
    return found[1], found[2]


def imports_of(path: Path) -> set[str]:
    """Every module of any package that a file imports, wherever in it: at the top, in a function, for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.partition(".")[0] == "gpuckpt"}


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_points_up(module: str) -> None:
    floor, room = room_of(module)
    for other in ours(MODULES[module]):
        other_floor, other_room = room_of(other)
        assert other_floor < floor or other_room == room, f"{module} ({room}) imports {other} ({other_room})"


def test_no_circle() -> None:
    knows = {module: {name for name in ours(path) if name in MODULES} - {module} for module, path in MODULES.items()}
    while knows:
        free = [module for module, others in knows.items() if not others & knows.keys()]
        assert free, f"a circle among {sorted(knows)}"
        for module in free:
            del knows[module]


ADAPTERS = ("gpuckpt.memory.adapters.torch",)
"""Loaded by whoever has a tensor, and so has torch."""


@pytest.mark.parametrize(
    "room", ["gpuckpt.checks", "gpuckpt.errors", "gpuckpt.units", "gpuckpt.memory", "gpuckpt.planning"]
)
def test_the_lower_rooms_know_neither_torch_nor_triton(room: str) -> None:
    for module, path in MODULES.items():
        if room_of(module)[1] == room and module not in ADAPTERS:
            found = {name.partition(".")[0] for name in imports_of(path)} & {"torch", "triton", "jax"}
            assert not found - ({"torch", "jax"} if module == "gpuckpt.memory.dlpack" else set()), (module, found)


@pytest.mark.parametrize("library", ["cupy", "numpy", "dlpack", "torch"])
def test_adapters_do_not_load_each_others_libraries(library: str) -> None:
    path = MODULES[f"gpuckpt.memory.adapters.{library}"]
    at_the_top = {
        alias.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert at_the_top <= {"numpy", library}


def test_private_names_of_torch_stand_in_one_file() -> None:
    for module, path in MODULES.items():
        if module == "gpuckpt.pytorch._torch_internals":
            continue
        text = path.read_text(encoding="utf-8")
        for forbidden in ("torch._C", "_execution_engine", "torch._dynamo"):
            assert forbidden not in text, f"{module} uses {forbidden}; give it a name in _torch_internals.py"


def test_private_names_of_torch_are_there() -> None:
    """A torch that lacks one fails here, with the name, and not in somebody's backward."""
    internals = importlib.import_module("gpuckpt.pytorch._torch_internals")
    missing = [name for name in internals.__all__ if not hasattr(internals, name)]
    assert not missing, f"this torch lacks what _torch_internals.py needs: {missing}"


def test_files_and_folders_stay_small() -> None:
    """What a reader holds in mind: 350 lines a file, 16 files a folder."""
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, (
            f"{path} is long; is there more than one idea in it?"
        )
    for folder in {path.parent for path in FILES}:
        count = sum(path.parent == folder and path.name != "__init__.py" for path in FILES)
        assert count <= 16, f"{folder} has {count} files"


def test_one_class_name_means_one_thing() -> None:
    """In gpuckpt and its kernels, a leading underscore aside: a name that a reader has met says what is meant."""
    homes: dict[str, list[str]] = {}
    for path in (*FILES, *sorted(HOME.parent.joinpath("kernels").rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(str(path.relative_to(HOME.parent)))
    assert {"GemmProblem", "CheckpointBudget"} <= homes.keys()
    twice = {name: files for name, files in homes.items() if len(files) > 1}
    assert not twice, f"class names that are defined twice: {twice}"
