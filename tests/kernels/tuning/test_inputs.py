"""Parameters of tune and load with inputs of every kind (see tests/inputs.py), and damaged results."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import pytest

from gpuckpt.kernels.host import tiles
from gpuckpt.kernels.host.tiles import TileConfig
from gpuckpt.kernels.tuning import load, tune, tuner
from tests.inputs import OWN, Call, rows_of


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """A cache of its own, no table in use before or after, and no operands: sizes may be large."""
    monkeypatch.setenv("GPUCKPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiles, "_tuned", MappingProxyType({}))
    monkeypatch.setattr(tuner, "calls", lambda *_: lambda tile: tile)


def second(launch: Any) -> float:
    return 1.0


TILE = vars(TileConfig(64, 64, 64, 4, 2))
TUNE = {
    "kind": "linear",
    "M": 64,
    "N": 64,
    "K": 64,
    "dtype": "bf16",
    "activation": "gelu_tanh",
    "tiles": [TileConfig(**TILE)],
    "rounds": 1,
    "margin": 0.02,
    "flush_bytes": None,
    "device": "cpu",
    "timer": second,
    "arch": 90,
}
CALLS = {
    "tune": Call(tune, names={"device": OWN, "timer": OWN}, **TUNE),
    "TileConfig": Call(
        lambda **fields: tune(**TUNE | {"tiles": [TileConfig(**fields)]}),
        names=dict.fromkeys(TILE, "cannot be timed"),
        **TILE,
    ),
    "load": Call(load, directory=None),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_work(name):
    CALLS[name].works()


@pytest.mark.parametrize(("call", "parameter"), rows_of(CALLS))
def test_a_parameter_with_inputs_of_every_kind(call, parameter):
    call.check(parameter)


def test_what_is_no_timer_is_named() -> None:
    with pytest.raises(TypeError, match=r"timer is 3 .*expected a function"):
        tune(**TUNE | {"timer": 3})


ALLOWED = {"max_registers": (None,), "group_m": (10**30,)}


def parts(record: Any, at: tuple[Any, ...] = ()) -> Any:
    """The place of every entry of a record, however deep."""
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from parts(value, (*at, key))


def test_a_damaged_result_is_refused_with_its_name_and_changes_nothing() -> None:
    tune(**TUNE)
    (path,) = tuner.cache_dir().glob("*.json")
    text = path.read_text()
    used = {"kind", "shape", "dtype", "arch", "tile"}
    for place in [place for place in parts(json.loads(text)) if place[0] in used]:
        for value in (None, True, "x", 1.5, -1, 10**30, [], {}, [[1]], {"a": 1}, float("nan")):
            if value in ALLOWED.get(place[-1], ()) or (len(place) == 2 and place[0] == "shape" and value == 10**30):
                continue
            record = json.loads(text)
            inner = record
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            path.write_text(json.dumps(record))
            with pytest.raises(ValueError, match=r"is no result of gpuckpt.tune|cannot be used"):
                load()
            assert not tiles.has_tuned()
    for damaged in ("", "[" * 10**5, text[:-20], "[]", "null", text.replace("linear", "\\ud800"), "9" * 5000):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"is no result of gpuckpt.tune"):
            load()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"is no result of gpuckpt.tune"):
        load()
