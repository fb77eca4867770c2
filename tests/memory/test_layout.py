"""Planned steps: one slab, every array in its place, and the plan held to."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from gpuckpt.errors import BudgetExceeded, InvalidPlan
from gpuckpt.memory import CheckpointBudget, lay_out


def nested(sizes):
    return [("alloc", i, n) for i, n in enumerate(sizes)] + [("free", i) for i in reversed(range(len(sizes)))]


def test_nested_lifetimes_need_exactly_the_peak():
    slab = lay_out(nested([100, 50, 7, 0, 300]))
    assert (slab.size_bytes, slab.peak_bytes) == (457, 457)
    assert [slab.offsets[i] for i in range(5)] == [0, 100, 150, 0, 157]
    assert lay_out(nested([100, 50]), unit_bytes=512).size_bytes == 1024


def test_8_1_8_fits_in_nine_when_it_is_planned():
    slab = lay_out([("alloc", "a", 8), ("free", "a"), ("alloc", "b", 1), ("alloc", "c", 8)])
    assert slab.size_bytes == slab.peak_bytes == 9


def test_a_gap_is_filled_by_what_fits_best():
    sequence = [
        ("alloc", 0, 10),
        ("alloc", 1, 1),
        ("alloc", 2, 5),
        ("alloc", 3, 1),
        ("free", 0),
        ("free", 2),
        ("alloc", 4, 5),
    ]
    slab = lay_out(sequence)
    assert slab.size_bytes == 17
    assert slab.offsets[4] == slab.offsets[2]


def test_neighbouring_gaps_become_one(monkeypatch):
    monkeypatch.setattr("gpuckpt.memory.layout._LARGEST_FIRST_UP_TO", 0)  # best fit alone
    sizes = [("alloc", 0, 5), ("alloc", 1, 5), ("alloc", 2, 5), ("alloc", 3, 1)]
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1]):
        slab = lay_out([*sizes, *(("free", i) for i in order), ("alloc", 4, 15)])
        assert (slab.size_bytes, slab.offsets[4]) == (16, 0)


def test_no_steps_need_nothing():
    assert lay_out([]).size_bytes == 0


@pytest.mark.parametrize(
    ("sequence", "reason"),
    [
        ([("alloc", 1, 5), ("alloc", 1, 5)], "second time"),
        ([("free", 1)], "not alive"),
        ([("alloc", 1, 5), ("free", 1), ("free", 1)], "not alive"),
        ([("alloc", 1, -5)], "-5 bytes"),
        ([("alloc", 1, 1.5)], "1.5 bytes"),
        ([("grow", 1)], "was expected"),
    ],
)
def test_sequences_that_make_no_sense_are_refused_by_name(sequence, reason):
    with pytest.raises(ValueError, match=reason):
        lay_out(sequence)


def test_a_planned_step_runs_in_its_slab_again_and_again():
    slab = lay_out(nested([800, 400, 1600]))
    budget = CheckpointBudget(slab.size_bytes, device="cpu", hold="pool")
    arena = budget.reserve(slab)
    assert budget.used_bytes == slab.size_bytes == 2800
    arrays = [np.full(100, 1.0), torch.full((100,), 2.0), np.full(200, 3.0)]
    for _ in range(3):
        views = [arena.save(i, array) for i, array in enumerate(arrays)]
        assert [float(np.asarray(view).mean()) for view in views] == [1.0, 2.0, 3.0]
        base = np.asarray(views[0]).ctypes.data
        assert np.asarray(views[2]).ctypes.data - base == slab.offsets[2]
        while views:
            views.pop()
    with pytest.raises(BudgetExceeded):
        budget.allocate(1)
    del arena
    gc.collect()
    assert budget.used_bytes == 0


def test_a_step_that_departs_from_its_plan_is_told_so():
    slab = lay_out([("alloc", "a", 80), ("free", "a"), ("alloc", "b", 80)])
    budget = CheckpointBudget(80, device="cpu", hold="pool")
    arena = budget.reserve(slab)
    kept = arena.save("a", np.zeros(10))
    with pytest.raises(InvalidPlan, match="'b' is to lie where 'a' still is"):
        arena.save("b", np.ones(10))
    assert kept.tolist() == [0.0] * 10
    del kept
    assert arena.save("b", np.ones(10)).sum() == 10
    with pytest.raises(InvalidPlan, match="88 bytes and its place 80"):
        arena.save("a", np.zeros(11))
    with pytest.raises(InvalidPlan, match="no place for 'c'"):
        arena.save("c", np.zeros(1))


def test_a_view_keeps_the_slab_when_the_arena_is_gone():
    slab = lay_out(nested([80]))
    budget = CheckpointBudget(80, device="cpu", hold="pool")
    view = budget.reserve(slab).save(0, np.arange(10.0))
    gc.collect()
    assert budget.used_bytes == 80
    assert view.tolist() == list(range(10))
    del view
    gc.collect()
    assert budget.used_bytes == 0


def test_a_slab_on_cupys_pool_is_one_chunk(hostcuda):
    cupy = hostcuda.cupy
    slab = lay_out(nested([600, 600, 100]), unit_bytes=512)
    budget = CheckpointBudget(slab.size_bytes, device="cuda:0", hold="pool")
    arena = budget.reserve(slab)
    assert budget.used_bytes == budget._pool.live_bytes == 5 * 512
    reader = cupy.cuda.Stream(non_blocking=True)
    for fill in (1, 2):
        views = [arena.save(i, cupy.asarray(np.full(n, fill, np.uint8))) for i, n in enumerate((600, 600, 100))]
        assert views[1].data.ptr - views[0].data.ptr == 1024
        assert {int(x) for view in views for x in np.unique(view.get(stream=reader))} == {fill}
        while views:
            views.pop()
    with pytest.raises(BudgetExceeded):
        budget.reserve(slab)


def test_a_slab_that_does_not_fit_is_refused_in_one_piece():
    budget = CheckpointBudget(79, device="cpu", hold="pool")
    with pytest.raises(BudgetExceeded, match="planned step"):
        budget.reserve(lay_out(nested([80])))
    assert budget.used_bytes == 0
