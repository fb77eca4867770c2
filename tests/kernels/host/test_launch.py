"""What is prepared once, and what anew. That a prepared launch passes on what Triton's own way does: tests/drivercuda."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from gpuckpt.kernels import linear
from gpuckpt.kernels.device.dropout import Dropout
from gpuckpt.kernels.host import launch, tiles
from gpuckpt.kernels.host.launch import once
from gpuckpt.kernels.host.tiles import TileConfig


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(launch, "_found", {})


def matrix(rows=4, columns=8, dtype=torch.float32, skip=0):
    """Whose first element lies `skip` elements past an aligned address."""
    return torch.zeros(rows * columns + 16, dtype=dtype)[skip:].as_strided((rows, columns), (columns, 1))


class Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        return self.calls


def test_the_same_layout_is_prepared_once():
    make = Counted()
    found = [once(make, (matrix(), None, matrix()), ("gelu", None)) for _ in range(3)]
    assert found == [1, 1, 1]


@pytest.mark.parametrize(
    "other",
    [
        matrix(5),
        matrix(4, 8).t().contiguous().t(),
        matrix(dtype=torch.bfloat16),
        matrix(skip=1),
        matrix().to("meta"),
        None,
    ],
    ids=["shape", "strides", "dtype", "alignment", "device", "absent"],
)
def test_another_layout_is_prepared_anew(other):
    make = Counted()
    assert once(make, (matrix(), matrix())) == 1
    assert once(make, (matrix(), other)) == 2
    assert once(make, (matrix(), matrix())) == 1


def test_other_options_another_function_and_tuned_tiles_are_prepared_anew(monkeypatch):
    make, second = Counted(), Counted()
    assert once(make, (matrix(),), ("gelu", TileConfig(16, 16, 16, 4, 1))) == 1
    assert once(make, (matrix(),), ("gelu", TileConfig(16, 16, 16, 4, 2))) == 2
    assert once(make, (matrix(),), ("relu", TileConfig(16, 16, 16, 4, 1))) == 3
    assert once(second, (matrix(),), ("relu", TileConfig(16, 16, 16, 4, 1))) == 1
    monkeypatch.setattr(tiles, "_tuned", MappingProxyType({("linear", (4, 8, 8), "fp32", 90): None}))
    assert once(make, (matrix(),), ("relu", TileConfig(16, 16, 16, 4, 1))) == 4


def test_a_seed_beyond_32_bits_is_prepared_anew_and_another_small_one_is_not():
    """Triton types a number by its size: a kernel compiled for an i32 would cut the larger one off."""
    x, w, y = matrix(16, 16), matrix(16, 16), matrix(16, 16)
    results = {}
    for seed in (1, 2, 1 << 40, (1 << 40) + 1):
        linear.linear_fwd(x, w, None, y, dropout=Dropout(0.5, seed))
        results[seed] = len(launch._found)
    assert list(results.values()) == [1, 1, 2, 2]


def test_an_error_is_raised_each_time_and_nothing_is_kept():
    for _ in range(2):
        with pytest.raises(ValueError, match="out has shape"):
            linear.linear_fwd(matrix(4, 8), matrix(6, 8), None, matrix(4, 5))
    assert not launch._found


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(launch, "_MOST", 8)
    make = Counted()
    for rows in range(1, 100):
        once(make, (matrix(rows),))
        assert len(launch._found) <= 8


def test_what_is_kept_holds_no_tensor():
    import gc
    import weakref

    x, w, y = matrix(16, 16), matrix(16, 16), matrix(16, 16)
    linear.linear_fwd(x, w, None, y)
    alive = [weakref.ref(t) for t in (x, w, y)]
    del x, w, y
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
