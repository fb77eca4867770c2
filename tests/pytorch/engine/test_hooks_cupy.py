"""`with budget:` over CuPy's real memory pool, on a device of host memory.

There are no CUDA tensors here, so CPU tensors stand in for them: a block of the pool is looked at through its address, which is
host memory. What is real: CuPy's pool with its limit, its units of 512 bytes, its fragmentation and its out-of-memory; that a
backward thread, in which nothing of CuPy is current, allocates all the same. What is not: streams, and torch's DLPack import.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

import gpuckpt
from gpuckpt import BudgetExceeded, CheckpointBudget
from gpuckpt.memory.adapters import cupy as cupy_form
from gpuckpt.pytorch.engine.storage_index import index_of
from gpuckpt.pytorch.link_speed import Link
from tests.pytorch.steps import batch, bits, blocks, gradients, run


class _Exporter:
    """A block of the pool as NumPy sees host memory."""

    def __init__(self, block) -> None:
        self.block = block
        data = (block.address, False)
        self.__array_interface__ = {"data": data, "shape": (block.nbytes,), "typestr": "|u1", "version": 3}


@pytest.fixture
def new_budget(hostcuda, monkeypatch):
    monkeypatch.setattr(cupy_form, "flat_array", lambda block: np.asarray(_Exporter(block)))

    def make(size: int | str, **options) -> CheckpointBudget:
        budget = CheckpointBudget(size, device="cuda:0", hold="pool", **options)
        index_of(budget)._copies_on = torch.device("cpu")
        return budget

    return make


def units(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


def checkpointed(model, x: Tensor, budget: CheckpointBudget) -> Tensor:
    with budget:
        return run(model, x, gpuckpt.checkpoint)


def test_a_step_in_cupys_pool(hostcuda, new_budget):
    model, x = blocks(12), batch()
    plain = gradients(model, lambda: run(model, x))
    budget = new_budget("1MiB")
    assert gradients(model, lambda: checkpointed(model, x, budget)) == plain
    assert budget.used_bytes == 0
    assert budget.peak_bytes % 512 == 0
    assert hostcuda.peak_bytes() <= budget.max_bytes

    exact = new_budget(budget.peak_bytes)
    assert gradients(model, lambda: checkpointed(model, x, exact)) == plain
    short = new_budget(budget.peak_bytes - 512)
    with pytest.raises(BudgetExceeded):
        gradients(model, lambda: checkpointed(model, x, short))
    assert short.used_bytes == 0


def test_what_is_held_is_charged_at_whole_units(new_budget):
    budget = new_budget("1MiB")
    x = torch.ones(200, requires_grad=True)
    with budget:
        y = (x * 2).sin()
        assert budget.used_bytes == 1024
        z = (x[:3] * 2).sin()
        assert budget.used_bytes == 1536
    (y.sum() + z.sum()).backward()
    del y, z
    assert budget.used_bytes == 0


def test_backward_in_a_thread_that_knows_nothing_of_cupy(new_budget):
    model, x = blocks(4), batch()
    expected = gradients(model, lambda: run(model, x))[1]
    budget = new_budget("1MiB")
    model.zero_grad(set_to_none=True)
    thread = threading.Thread(target=checkpointed(model, x, budget).backward)
    thread.start()
    thread.join()
    assert bits(p.grad for p in model.parameters()) == expected
    del thread
    assert budget.used_bytes == 0


def test_allocations_of_the_device_fail_one_after_another(hostcuda, new_budget):
    """CuPy gives back what it caches and tries once more, so the step gets through, or is refused and leaves nothing."""
    model, x = blocks(12), batch()
    plain = gradients(model, lambda: run(model, x))
    for at in range(40):
        budget = new_budget("1MiB")
        hostcuda.fail_allocation(at)
        assert gradients(model, lambda budget=budget: checkpointed(model, x, budget)) == plain
        assert budget.used_bytes == 0, f"after failure {at}"


def test_a_device_that_is_full_is_named_with_its_cause(hostcuda, new_budget):
    model, x = blocks(12), batch()
    plain = gradients(model, lambda: run(model, x))
    budget = new_budget("1MiB")
    gradients(model, lambda: checkpointed(model, x, budget))
    needed = budget.peak_bytes
    budget.close()
    refusals = 0
    for capacity in range(0, needed, 2048):
        hostcuda.set_capacity(hostcuda.used_bytes() + capacity)
        budget = new_budget("1MiB")
        with pytest.raises(BudgetExceeded, match="the device has no such block") as refusal:
            gradients(model, lambda budget=budget: checkpointed(model, x, budget))
        assert isinstance(refusal.value.__cause__, hostcuda.cupy.cuda.memory.OutOfMemoryError)
        del refusal
        refusals += 1
        assert (budget.used_bytes, budget.snapshot().pending_bytes) == (0, 0)
        hostcuda.set_capacity(1 << 30)
        assert gradients(model, lambda budget=budget: checkpointed(model, x, budget)) == plain
        budget.close()
    print(f"{refusals} steps refused by the device itself, 0 violations")


def test_spilled_to_the_host_and_back(new_budget):
    model, x = blocks(6), batch(32)
    plain = gradients(model, lambda: run(model, x))
    roomy = new_budget("4MiB")

    def held(budget: CheckpointBudget) -> Tensor:
        with budget:
            return run(model, x)

    gradients(model, lambda: held(roomy))
    host = CheckpointBudget("4MiB", device="cpu", hold="pool")
    budget = new_budget(units(roomy.peak_bytes // 3), over_cap=["spill"], spill_to=host)
    assert gradients(model, lambda: held(budget)) == plain
    assert host.peak_bytes > 0
    assert (budget.used_bytes, host.used_bytes) == (0, 0)


def test_a_plan_that_spills_from_cupys_pool_to_the_host(new_budget, monkeypatch):
    monkeypatch.setattr("gpuckpt.pytorch.plan_maker.measure_link", lambda *_: Link(1e12, 0.0))
    model, x = torch.nn.Sequential(*blocks(8)), batch(32)
    plain = gradients(model, lambda: model(x).square().sum())
    budget = new_budget("4MiB")
    roomy = gpuckpt.fit(model, x, budget, strategy="none")
    peak_bytes = roomy.plan.certificate.peak_bytes
    roomy.unfit()
    budget, host = new_budget(units(peak_bytes // 3)), CheckpointBudget("4MiB", device="cpu", hold="pool")
    fitted = gpuckpt.fit(model, x, budget, host_budget=host)
    assert gradients(model, lambda: model(x).square().sum()) == plain
    certificate = fitted.plan.certificate
    assert certificate.peak_bytes % 512 == 0
    assert (fitted.measured_peak_bytes, fitted.measured_host_peak_bytes) == (
        certificate.peak_bytes,
        certificate.host_peak_bytes,
    )
    assert certificate.host_peak_bytes > peak_bytes // 3
    assert (budget.used_bytes, host.used_bytes) == (0, 0)
