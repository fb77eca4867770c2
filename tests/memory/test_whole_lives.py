"""Whole lives of a budget in both holds and on CuPy's pool; see lives.py. `make nightly` runs a million operations on each, and
`python benchmarks/budget_lives.py` notes what they came to."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import pytest
import torch

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory import Ledger
from tests.memory.lives import KINDS, live
from tests.memory.places import Allocator, CupyPlace, HostPlace, Interrupt

ALWAYS = (*KINDS, "refused", "on another thread", "exceptions of a policy", "brought back")
NAMED = ("recompute by policy", "spill by policy")
IN_POOL = ("compress by policy", "faults met", "interrupts")


def lived(place: Any, operations: int, named: tuple[str, ...], seed: int = 1) -> Counter[str]:
    """Nothing was violated, and everything did happen."""
    counts = live(place, operations, seed)
    print(
        f"\n{type(place).__name__} {place.hold}: {counts['operations']} operations, {counts['violations']} violations"
    )
    for kind in (*ALWAYS, *named):
        if kind != "fork":  # once in two thousand
            assert counts[kind] > 0, kind
    return counts


@pytest.mark.parametrize("hold", ["pool", "account"])
def test_lives_on_the_host(hold):
    lived(HostPlace(hold), 6_000, (*NAMED, *IN_POOL) if hold == "pool" else NAMED)


def test_lives_on_cupys_pool(cuda_tensors):
    lived(CupyPlace(cuda_tensors), 6_000, (*NAMED, *IN_POOL))


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["host, account", "host, pool", "cupy, pool"])
def test_a_million_operations(pool, request, record_property):
    """Or as many as GPUCKPT_LIVES_SECONDS allow."""
    place = CupyPlace(request.getfixturevalue("cuda_tensors")) if "cupy" in pool else HostPlace(pool.split(", ")[1])
    begin_s, most_s = time.monotonic(), float(os.environ.get("GPUCKPT_LIVES_SECONDS", "inf"))
    counts: Counter[str] = Counter()
    seed = 10_000
    while counts["operations"] < 1_000_000 and time.monotonic() - begin_s < most_s:
        counts += lived(place, 20_000, NAMED if "account" in pool else (*NAMED, *IN_POOL), seed)
        seed += 1_000
    record_property("pool", pool)
    record_property("seconds", round(time.monotonic() - begin_s, 1))
    record_property("counts", dict(sorted(counts.items())))


def test_a_collection_on_the_way_to_the_ledger_lets_no_charge_pass_beside_what_is_cached(monkeypatch):
    """It freed a block, which stayed cached, and the charge beside it fitted the ledger and not the cap."""
    allocator = Allocator()
    budget = CheckpointBudget(1000, device="cpu", hold="pool", allocator=allocator)
    held = [budget.save(torch.zeros(150))]
    charge = Ledger.charge

    def collected(ledger: Ledger, *arguments: Any) -> None:
        held.clear()
        charge(ledger, *arguments)

    monkeypatch.setattr(Ledger, "charge", collected)
    with pytest.raises(BudgetExceeded):
        budget.charge(700)
    assert budget.snapshot().refusals == 1
    held.clear()
    charged = budget.charge(700)
    assert allocator.held_bytes() + charged.nbytes <= 1000


@pytest.mark.parametrize("fault", [MemoryError, Interrupt])
def test_an_array_that_finds_no_block_when_it_is_compressed_is_not_lost(fault):
    """After an interrupt it was: its block had been given back, and the next load called it freed."""
    allocator = Allocator()
    host = CheckpointBudget(4096, device="cpu", hold="pool")
    budget = CheckpointBudget(
        4096,
        device="cpu",
        hold="pool",
        over_cap=("compress", "spill"),
        spill_to=host,
        storage_dtype="float16",
        allocator=allocator,
    )
    saved = budget.save(torch.full((512,), 3.0))
    allocator.fault = fault
    if fault is MemoryError:
        assert saved.evict("compress") == 1024
    else:
        with pytest.raises(Interrupt):
            saved.evict("compress")
    allocator.fault = None
    assert (budget.used_bytes, saved.nbytes) == (1024, 1024)
    assert torch.equal(saved.load(), torch.full((512,), 3.0))
    assert saved.evict("spill") == 0, "it lies in no block that could be copied"
    assert torch.equal(saved.load(), torch.full((512,), 3.0))
    saved.free()
    assert (budget.used_bytes, host.used_bytes) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_an_empty_tensor_on_cupys_pool(cuda_tensors, dtype):
    """CuPy's empty arrays have strides of 0, and the view as another dtype failed."""
    budget = cuda_tensors.budget(4096)
    loaded = budget.save(torch.empty(0, 3, dtype=dtype)).load()
    assert (loaded.dtype, tuple(loaded.shape)) == (dtype, (0, 3))


def test_an_interrupt_while_autograds_tensors_are_compressed_leaves_them_charged():
    """What backward would read was held, and no longer on the ledger."""
    allocator = Allocator()
    budget = CheckpointBudget(
        4096, device="cpu", hold="pool", over_cap=("compress",), storage_dtype="float16", allocator=allocator
    )
    x = torch.zeros(512, requires_grad=True)
    with budget:
        y = x.exp()
    loss = y.sum()
    del y
    assert budget.used_bytes == 2048
    allocator.fault = Interrupt
    with pytest.raises(Interrupt):
        budget.allocate(3000)
    allocator.fault = None
    assert budget.used_bytes == 1024
    loss.backward()
    assert torch.equal(x.grad, torch.ones(512))
    del loss
    assert budget.used_bytes == 0
