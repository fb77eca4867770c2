"""The largest size that fits, against trying every one; chains between measured ones, against chains made for the size."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.planning import Chain, Stage, Variant
from gpuckpt.planning.device.interpolate import chain_at
from gpuckpt.planning.device.largest import largest_fitting


@given(
    st.integers(0, 900),
    st.integers(1, 40),
    st.fractions(0, Fraction(1, 100)),
    st.integers(0, 20_000),
    st.sampled_from([10, 100, 10_000]),
    st.integers(1, 200),
    st.sampled_from([1, 4]),
)
def test_it_is_the_largest(
    fixed: int, each: int, square: Fraction, budget: int, limit: int, start: int, step: int
) -> None:
    def need(size: int) -> int:
        return fixed + each * size + int(square * size * size)

    found = largest_fitting(need, budget, 0, start, limit=limit, step=step)
    fitting = [size for size in range(0, limit + 1, step) if size == 0 or need(size) <= budget]
    assert found == fitting[-1]


def test_it_asks_little() -> None:
    asked: list[int] = []
    found = largest_fitting(lambda n: asked.append(n) or 300 + 7 * n, 10**7, 0, 8, limit=1 << 24)
    assert found == (10**7 - 300) // 7
    assert len(asked) <= 5


def chain_of(batch: int, length: int) -> Chain:
    stages = (
        Stage("a", 1.0, 2.0, (0, 1), output=(2,), output_bytes=6 * batch * length),
        Stage("b", 1.0, 2.0, (2,), (2,)),
    )
    return Chain(stages, (4 * batch * length, 2 * batch * length**2 + 10, 6 * batch * length), 512)


@pytest.mark.parametrize("size", [1, 3, 100, 777])
def test_a_chain_between_and_beyond_measured_ones(size: int) -> None:
    assert chain_at(size, (2, 4), [chain_of(2, 64), chain_of(4, 64)]) == chain_of(size, 64)
    lengths = (64, 128, 192)
    assert chain_at(size, lengths, [chain_of(2, length) for length in lengths]) == chain_of(2, size)


def test_no_chain_where_none_can_be_told() -> None:
    other = Chain(chain_of(4, 64).stages[:1], chain_of(4, 64).storages, 512)
    assert chain_at(3, (2, 4), [chain_of(2, 64), other]) is None
    halves = [Chain((Stage("a", saves=(0,)),), (size,)) for size in (1, 2)]
    assert chain_at(3, (2, 4), halves) is None
    assert chain_at(6, (2, 4), halves) == Chain((Stage("a", saves=(0,)),), (3,))


def test_options_of_all_sizes_and_what_bends() -> None:
    """Of a stage only options that it had at every size; workspace that falls and ends at 0 stays there."""

    def measured(options: tuple[str, ...], workspace_bytes: int) -> Chain:
        variants = tuple(Variant(name, (0,), 1.0, 2.0) for name in options)
        stage = Stage("a", 1.0, 2.0, (0, 1), (0,), variants=variants, workspace_bytes=workspace_bytes)
        return Chain((stage,), (64, 64))

    found = chain_at(9, (2, 3), [measured(("kept-1", "kept-2"), 700), measured(("kept-2", "kept-3"), 0)])
    assert found is not None
    assert [variant.name for variant in found.stages[0].variants] == ["kept-2"]
    assert found.stages[0].workspace_bytes == 0
