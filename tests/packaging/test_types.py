"""`make check` sees the types of both packages, kernels/ too, which is installed under another name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("room", ["gpuckpt", "kernels", "kernels/host"])
def test_a_wrong_return_type_is_found(room: str, tmp_path: Path) -> None:
    """A tree that is like ours and nearly empty: of the whole one mypy takes a minute."""
    for package in dict.fromkeys(("gpuckpt", "kernels", room)):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / room / "planted.py").write_text('def tiles() -> int:\n    return "x"\n')
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert f'{room}/planted.py:2: error: Incompatible return value type (got "str", expected "int")' in done.stdout


def test_make_check_runs_mypy() -> None:
    _, _, rest = (ROOT / "Makefile").read_text().partition("\ncheck: setup\n")
    assert "\t$(BIN)/mypy\n" in rest.partition("\n\n")[0]
