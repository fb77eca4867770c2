"""docs/seeds.md says what is so: its code runs, its results are equal, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "seeds.md"
MARK = "<!-- same y and dx as the plain run -->"


def test_every_block_runs_and_gives_the_plain_results(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {}
    compared = 0
    for part in re.findall(r"```python\n(.*?)```|(" + re.escape(MARK) + ")", PAGE.read_text(), flags=re.DOTALL):
        code, mark = part
        if code:
            exec(compile(code, str(PAGE), "exec"), scope)
        if mark:
            np.testing.assert_allclose(scope.pop("y"), scope["plain_y"], rtol=1e-12)
            np.testing.assert_allclose(scope.pop("dx"), scope["plain_dx"], rtol=1e-12)
            compared += 1
    assert compared == 6, "five interfaces, the last one in two forms"
    assert "MemoryUsage { stored_activations: 0 KiB" in capsys.readouterr().out


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert len(links) >= 10
    missing = [link for link in links if not (PAGE.parent / link).resolve().exists()]
    assert not missing


def test_every_name_in_the_table_is_public() -> None:
    import gpuckpt

    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "test_" in line]
    assert len(rows) == 5, "one row for each system"
    for row in rows:
        names = re.findall(r"`(\w+)`", row.split("|")[2])
        assert names
        for name in names:
            assert hasattr(gpuckpt, name), name
