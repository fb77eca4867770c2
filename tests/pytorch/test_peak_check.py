"""benchmarks/promise.py in small: real models under six budgets each, promised and measured to the byte."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


with pytest.MonkeyPatch.context() as _patch:  # the benchmark imports from its own folder
    _patch.syspath_prepend(str(BENCHMARKS))
    promise = importlib.import_module("promise")


@pytest.mark.parametrize("name", list(promise.MODELS))
def test_promised_is_measured_under_six_budgets(name: str, tmp_path: Path) -> None:
    if name not in ("fused MLP", "our transformer"):
        pytest.importorskip("transformers", reason="Hugging Face models come with the dev extra")
    rows = list(promise.rows_of(name, promise.SIZES["small"]))
    assert len(rows) == 6
    print(promise.table(rows))
    for row in rows:
        assert row.promised_bytes == row.measured_bytes <= row.budget_bytes, row
        assert row.equal, row
        assert row.left_bytes == 0, row
        assert row.kept
    assert rows[0].recompute_share > 0
    assert rows[0].measured_bytes == rows[0].budget_bytes  # the smallest budget of all is used to the last byte
    assert rows[-1].recompute_share == 0
    assert rows[-1].measured_bytes == rows[-1].plain_bytes

    spilled = list(promise.rows_of(name, promise.SIZES["small"], spills=True))
    print(promise.table(spilled))
    assert all(row.kept for row in spilled), spilled
    # Copies that overlap work hold two stages' bytes for a while: under the smallest budgets something is still recomputed.
    assert any(
        row.host_measured_bytes > 0 == row.recompute_share for row in spilled if row.budget_bytes < row.plain_bytes
    )
    assert spilled[-1].host_measured_bytes == 0
    promise.draw(rows + spilled, tmp_path / "promise.png")
    assert (tmp_path / "promise.png").stat().st_size > 10_000
