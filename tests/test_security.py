"""What docs/security.md says of the sources: JSON is all that is read, nothing is evaluated or fetched; licences are listed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "gpuckpt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "yaml",
    "urllib",
    "http",
    "requests",
    "socket",
    "ftplib",
}
CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "os.system", "joblib.load"}


def forbidden(tree: ast.AST) -> list[str]:
    """What a file imports or calls that would run, unpickle or fetch something."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            shell = any(word.arg == "shell" for word in node.keywords)
            if name in CALLS or shell:
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_evaluated_or_fetched(path):
    assert forbidden(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text", ["import pickle", "from urllib import request", "eval(x)", "torch.load(x)", "subprocess.run(x, shell=True)"]
)
def test_the_reader_finds_them(text):
    assert forbidden(ast.parse(text))


def test_every_dependency_has_its_licence_on_the_page():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = project[project.index("\ndependencies") : project.index("[project.scripts]")]
    names = {re.sub(r"-cuda1\dx$", "", name) for name in re.findall(r'"([A-Za-z][\w-]*?)(?:\[\w+\])?[><=;]', wanted)}
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert len(names) > 15
    assert not {name for name in names if name not in page}
