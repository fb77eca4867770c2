"""The package as others get it: built, installed elsewhere, and imported from outside the checkout."""

from __future__ import annotations

import importlib
import inspect
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ISOLATED = """
import sys
sys.path.insert(0, {wheel!r})
import gpuckpt, gpuckpt.kernels
assert gpuckpt.__file__.startswith({wheel!r}), gpuckpt.__file__
assert gpuckpt.kernels.__file__.startswith({wheel!r}), gpuckpt.kernels.__file__
"""

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import gpuckpt, torch
model = torch.nn.Sequential(*[gpuckpt.nn.FusedMLP(8, 16) for _ in range(4)])
fitted = gpuckpt.fit(model, torch.randn(4, 8), "1MiB")
fitted(torch.randn(4, 8)).sum().backward()
assert fitted.budget.used_bytes == 0
"""

SOURCE_TREE = """
import importlib.metadata, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path_hooks[:] = [hook for hook in sys.path_hooks if "editable" not in str(hook)]
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
sys.path.insert(0, {root!r})
import gpuckpt.kernels.host.tiles
from gpuckpt.cli.doctor import examine
assert examine()["gpuckpt"] == "(a source tree that is not installed)"
"""

NO_ARRAY_API = """
import sys
sys.modules["array_api_compat"] = None
import gpuckpt, torch
gpuckpt.checkpoint, gpuckpt.fit, gpuckpt.nn
try:
    gpuckpt.Dense
except gpuckpt.BackendUnavailable as error:
    assert "pip install array-api-compat" in str(error)
else:
    raise AssertionError("segments were imported without what they need")
"""

NO_IMPORTS = """
import sys, gpuckpt
for room in ("torch", "cupy", "triton", "numba", "numpy", "matplotlib"):
    assert room not in sys.modules, room
gpuckpt.CheckpointBudget(1024, device="cpu").allocate(10)
gpuckpt.BudgetExceeded
for room in ("torch", "cupy", "triton"):
    assert room not in sys.modules, room
"""


def python(code: str, cwd: Path, *options: str) -> None:
    done = subprocess.run([sys.executable, *options, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: building leaves a build folder behind, whose stale files would get into the next wheel.
    source = folder / "source"
    source.mkdir()
    for name in ("gpuckpt", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("gpuckpt-*.whl")
    return path


def test_the_wheel_has_every_room_and_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if name.endswith(".py")}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "gpuckpt").rglob("*.py")}
    expected |= {"gpuckpt/" + str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")}
    assert shipped == expected
    others = {str(path.relative_to(ROOT)) for path in (ROOT / "gpuckpt").rglob("*") if path.is_file()} - expected
    found = {name for name in names if name.startswith("gpuckpt/")} - shipped
    assert found == {name for name in others if "__pycache__" not in name}
    assert {"gpuckpt/py.typed", "gpuckpt/report/page.css", "gpuckpt/report/page.js"} <= set(names)
    assert not any(name.startswith("kernels/") for name in names)


def test_the_wheel_imports_from_anywhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    python(ISOLATED.format(wheel=str(tmp_path / "site")), tmp_path)


def test_the_editable_install_finds_the_kernels_from_outside(tmp_path):
    python("import gpuckpt.kernels; from gpuckpt.kernels.host import tiles", tmp_path)


def test_a_checkout_works_without_being_installed(tmp_path):
    python(SOURCE_TREE.format(root=str(ROOT)), tmp_path)


def test_without_array_api_compat_only_segments_are_missing(tmp_path):
    python(NO_ARRAY_API, tmp_path)


def test_importing_loads_nothing_that_is_not_needed(tmp_path):
    python(NO_IMPORTS, tmp_path)


@pytest.mark.parametrize("missing", [("cupy", "cupy_backends"), ("triton",), ("cupy", "cupy_backends", "triton")])
def test_the_cpu_side_works_without(missing, tmp_path):
    python(WITHOUT.format(missing=missing), tmp_path, "-W", "ignore")


@pytest.mark.parametrize(
    "code",
    [
        "import gpuckpt.nn as gnn; gnn.GatedMLP",
        "from gpuckpt.functional import mlp",
        "from gpuckpt.nn import FusedMLP, GatedMLP",
        "import gpuckpt; assert gpuckpt.nn.GatedMLP is __import__('gpuckpt.nn').nn.GatedMLP",
        "import gpuckpt; gpuckpt.functional.linear",
        "from gpuckpt import functional, nn; assert nn.__name__ == 'gpuckpt.nn'",
        "import gpuckpt; gpuckpt.planning.Chain; gpuckpt.memory.Budget; gpuckpt.errors.StateModified",
        "import gpuckpt; assert gpuckpt.segments.LinearSegment is gpuckpt.LinearSegment; gpuckpt.kernels; gpuckpt.tune",
        "from gpuckpt import LinearSegment, MemoryUsageTracker, StateModified, vjp_checkpoint",
    ],
)
def test_functions_and_modules_import_in_a_fresh_interpreter(code, tmp_path):
    python(code, tmp_path)


def test_every_public_name_is_there():
    import gpuckpt

    for name in gpuckpt.__all__:
        assert getattr(gpuckpt, name) is not None
    assert set(gpuckpt.__all__) <= set(dir(gpuckpt))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gpuckpt.nonsense


def test_dir_shows_the_core_and_the_rooms():
    """What fits on a screen; the classes of a room are shown by the room, and `from gpuckpt import` finds them all the same."""
    import gpuckpt

    shown = dir(gpuckpt)
    rooms = [name for name in shown if inspect.ismodule(getattr(gpuckpt, name))]
    assert rooms == ["errors", "functional", "kernels", "memory", "nn", "planning", "segments"]
    assert 15 <= len(shown) - len(rooms) <= 22
    assert {"fit", "checkpoint", "measure", "plan_chain", "CheckpointBudget", "BudgetExceeded", "tune"} <= {*shown}
    assert not {"LinearSegment", "StateModified"} & {*shown}
    for room in ("errors", "memory", "segments"):
        home = importlib.import_module(f"gpuckpt.{room}")
        for name in home.__all__:
            assert getattr(gpuckpt, name) is getattr(home, name)


def test_the_version_stands_in_one_place(wheel):
    import gpuckpt

    assert wheel.name.split("-")[1] == gpuckpt.__version__
    assert f"\nversion: {gpuckpt.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "\nversion =" not in (ROOT / "pyproject.toml").read_text().split("[tool.setuptools.dynamic]")[0]
