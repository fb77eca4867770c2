"""CuPy's real pool under a budget, over host memory: the cap, streams, fragmentation and errors."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetExceeded
from gpuckpt.memory.adapters.torch import torch_allocator
from gpuckpt.memory.pools.cupy import CupyPool, pinned_buffer
from gpuckpt.memory.pools.host import HostPool

UNIT = 512


@pytest.fixture
def budget(hostcuda):
    return CheckpointBudget(10 * UNIT, device="cuda:0", hold="pool")


def array(hostcuda, nbytes: int, fill: int = 7):
    return hostcuda.cupy.asarray(np.full(nbytes, fill, np.uint8))


def test_a_saved_array_comes_back_as_it_was_from_the_pool(hostcuda, budget):
    values = np.arange(300, dtype=np.float32).reshape(20, 15)
    saved = budget.save(hostcuda.cupy.asarray(values))
    assert budget.used_bytes == saved.nbytes == 3 * UNIT  # 1200 bytes, in units
    view = saved.load()
    assert isinstance(view, hostcuda.cupy.ndarray)
    np.testing.assert_array_equal(view.get(), values)
    assert view.data.ptr == saved.load().data.ptr, "load() must not copy"


def test_fortran_order_is_kept(hostcuda, budget):
    values = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    view = budget.save(hostcuda.cupy.asarray(np.ascontiguousarray(values.T)).T).load()
    assert view.flags.f_contiguous
    np.testing.assert_array_equal(view.T.get(), values.T)


def test_a_view_that_outlives_free_keeps_its_bytes(hostcuda, budget):
    saved = budget.save(array(hostcuda, 600))
    view = saved.load()[100:200]
    saved.free()
    assert budget.used_bytes == 2 * UNIT
    assert view.get().tolist() == [7] * 100
    del view
    assert budget.used_bytes == 0


def test_the_cap_is_the_pools_too(hostcuda, budget):
    held = [budget.save(array(hostcuda, UNIT)) for _ in range(10)]
    with pytest.raises(BudgetExceeded, match="smallest budget that would have done is 5632 bytes"):
        budget.save(array(hostcuda, 1))
    assert budget.used_bytes == budget.peak_bytes == 10 * UNIT
    assert budget._pool.live_bytes == 10 * UNIT
    del held
    assert budget.used_bytes == 0


def test_8_1_8_is_refused_by_the_name_of_fragmentation(hostcuda, budget):
    eight = budget.save(array(hostcuda, 8 * UNIT))
    eight.free()
    one = budget.save(array(hostcuda, UNIT))
    before = budget.snapshot()
    with pytest.raises(BudgetExceeded, match="fragmentation") as refusal:
        budget.save(array(hostcuda, 8 * UNIT))
    assert type(refusal.value.__cause__).__name__ == "OutOfMemoryError", "CuPy's own error is the cause"
    after = budget.snapshot()
    assert (after.used_bytes, after.peak_bytes, after.pending_bytes) == (before.used_bytes, before.peak_bytes, 0)
    assert after.used_bytes == UNIT
    one.free()
    budget.save(array(hostcuda, 8 * UNIT))  # with nothing in between there is no fragment


def test_a_prefetched_piece_has_no_gaps_for_a_planned_step(hostcuda, budget):
    budget.prefetch(9 * UNIT)
    assert (budget.used_bytes, budget._pool.cached_bytes) == (0, 9 * UNIT)
    budget.save(array(hostcuda, 8 * UNIT)).free()
    held = [budget.save(array(hostcuda, UNIT))]
    held.append(budget.save(array(hostcuda, 8 * UNIT)))  # piece by piece this is refused, see above
    assert budget.used_bytes == 9 * UNIT


@pytest.mark.parametrize("seed", range(20))
def test_nested_lifetimes_fit_into_their_peak(hostcuda, seed):
    random = np.random.default_rng(seed)
    held_units, peak_units, sequence, stack = 0, 0, [], []
    for _ in range(120):
        if stack and random.random() < 0.5:
            held_units -= stack.pop()
            sequence.append(0)
        else:
            units = int(random.integers(1, 9))
            stack.append(units)
            sequence.append(units)
            held_units += units
            peak_units = max(peak_units, held_units)
    budget = CheckpointBudget(peak_units * UNIT, device="cuda:0", hold="pool")
    budget.prefetch(peak_units * UNIT)
    held = []
    for units in sequence:
        if units:
            held.append(budget.save(array(hostcuda, units * UNIT)))
        else:
            held.pop().free()
    assert budget.peak_bytes == peak_units * UNIT


def test_the_devices_own_limit_is_told_apart(hostcuda, budget):
    source = array(hostcuda, 8 * UNIT)
    hostcuda.cupy.get_default_memory_pool().free_all_blocks()
    hostcuda.set_capacity(hostcuda.used_bytes() + 4 * UNIT)
    with pytest.raises(BudgetExceeded, match="other allocators hold it"):
        budget.save(source)
    assert budget.used_bytes == 0


def test_one_failed_cuda_allocation_is_retried_by_cupy_and_three_are_refused(hostcuda, budget):
    source = array(hostcuda, UNIT)
    hostcuda.fail_allocation(0)
    saved = budget.save(source)  # CuPy frees its blocks and asks again
    assert saved.load().get()[0] == 7


def test_other_cuda_errors_pass_untouched(hostcuda, budget, monkeypatch):
    runtime = hostcuda.cupy.cuda.runtime
    source = array(hostcuda, UNIT)
    pool = CupyPool(10 * UNIT, 0, allocator=hostcuda.cupy.cuda.PythonFunctionAllocator(_illegal(runtime), None).malloc)
    with pytest.raises(runtime.CUDARuntimeError, match="Unknown"):
        pool.take(UNIT)
    monkeypatch.setattr(budget, "_pool", pool)
    with pytest.raises(runtime.CUDARuntimeError):
        budget.save(source)
    assert budget.snapshot()[1:4] == (0, 0, 0)


def _illegal(runtime):
    def malloc(nbytes, device_id):
        raise runtime.CUDARuntimeError(700)

    return malloc


def test_a_budget_that_is_gone_leaves_nothing_on_the_device(hostcuda):
    before_bytes = hostcuda.used_bytes()
    budget = CheckpointBudget(1 << 20, device="cuda:0", hold="pool")
    saved = [budget.save(hostcuda.cupy.empty(nbytes, dtype="u1")) for nbytes in (100, 600, 5000)]
    saved.pop(1).free()
    hostcuda.cupy.get_default_memory_pool().free_all_blocks()
    assert hostcuda.used_bytes() > before_bytes
    del saved, budget
    gc.collect()
    assert hostcuda.used_bytes() == before_bytes


def test_zero_is_never_forwarded_to_cupy(hostcuda):
    budget = CheckpointBudget(0, device="cuda:0", hold="pool")
    with pytest.raises(BudgetExceeded):
        budget.save(array(hostcuda, 1))
    empty = budget.save(hostcuda.cupy.empty((0, 3), np.float32))
    assert empty.load().shape == (0, 3)
    pool = CupyPool(0, 0)
    with pytest.raises(BudgetExceeded, match="has none left"):
        pool.take(1)
    assert budget.used_bytes == 0


def test_a_block_lies_on_the_device_of_its_budget(hostcuda):
    cupy = hostcuda.cupy
    budget = CheckpointBudget(4 * UNIT, device="cuda:1", hold="pool")
    with cupy.cuda.Device(1):
        source = array(hostcuda, UNIT)
    assert cupy.cuda.Device().id == 0
    saved = budget.save(source)
    assert saved.load().device.id == 1
    assert cupy.cuda.Device().id == 0, "the caller's device stays current"
    with pytest.raises(ValueError, match="on cuda:0 and this budget's pool on cuda:1"):
        budget.save(array(hostcuda, UNIT))


def test_a_block_is_not_reused_before_its_last_reader_is_done(hostcuda, budget):
    cupy = hostcuda.cupy
    reader = cupy.cuda.Stream(non_blocking=True)
    saved = budget.save(array(hostcuda, 4 * UNIT))
    address = saved.load().data.ptr
    with reader:
        view = saved.load()
    hostcuda.hold_stream(reader)  # the reader's work is not done
    saved.free()
    del view
    gc.collect()
    assert budget.used_bytes == 4 * UNIT, "bytes under a reader are neither free nor uncounted"
    other = budget.save(array(hostcuda, 4 * UNIT))
    assert other.load().data.ptr != address
    hostcuda.release_stream(reader)
    assert budget.used_bytes == 4 * UNIT
    third = budget.save(array(hostcuda, 4 * UNIT))
    assert third.load().data.ptr == address, "and reused once the reader is done"


def test_a_request_that_needs_a_delayed_block_waits_for_its_reader(hostcuda, budget):
    reader = hostcuda.cupy.cuda.Stream(non_blocking=True)
    saved = budget.save(array(hostcuda, 8 * UNIT))
    with reader:
        view = saved.load()
    hostcuda.hold_stream(reader)
    saved.free()
    del view
    assert budget.used_bytes == 8 * UNIT
    budget.save(array(hostcuda, 8 * UNIT))  # waits, then has the room


def test_the_same_stream_waits_for_nothing(hostcuda, budget):
    cupy = hostcuda.cupy
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        saved = budget.save(array(hostcuda, 4 * UNIT))
        hostcuda.hold_stream(stream)
        saved.load()
        saved.free()
    assert budget.used_bytes == 0, "reuse on the same stream is ordered by the stream"
    hostcuda.release_stream(stream)


def test_another_thread_saves_into_the_same_pool_on_its_own_stream(hostcuda, budget):
    """Backward runs on other threads, where CuPy's current stream, device and allocator are all forgotten."""
    cupy = hostcuda.cupy
    source, result = array(hostcuda, 2 * UNIT), []

    def backward():
        with cupy.cuda.Device(1), cupy.cuda.Stream(non_blocking=True) as stream, cupy.cuda.Device(0):
            result.append((budget.save(source), stream))

    worker = threading.Thread(target=backward)
    worker.start()
    worker.join()
    saved, _ = result.pop()
    assert saved.load().device.id == 0
    assert budget.used_bytes == budget._pool.live_bytes == 2 * UNIT
    del saved
    assert budget.used_bytes == 0


def test_a_block_that_is_in_the_pool_already_is_not_copied_again(hostcuda, budget):
    cupy = hostcuda.cupy
    block = budget.take(6 * UNIT, "kernel output")
    output = cupy.ndarray((6 * UNIT,), np.uint8, memptr=block.pointer())
    del block
    saved = budget.save(output)
    assert budget.used_bytes == 6 * UNIT
    assert saved.load().data.ptr == output.data.ptr
    del output
    assert budget.used_bytes == 6 * UNIT
    saved.free()
    assert budget.used_bytes == 0


def test_account_and_pool_share_one_cap_cached_blocks_included(hostcuda, budget):
    budget.save(array(hostcuda, 6 * UNIT)).free()
    assert budget._pool.cached_bytes == 6 * UNIT
    budget.allocate(8 * UNIT)
    assert budget._pool.cached_bytes + budget.used_bytes <= budget.max_bytes
    budget.free(8 * UNIT)


def test_the_pool_may_draw_from_torchs_allocator(hostcuda, monkeypatch):
    torch = pytest.importorskip("torch")
    runtime = hostcuda.cupy.cuda.runtime
    owned: dict[int, int] = {}
    attempts = []

    def alloc(nbytes, device, stream):
        attempts.append(nbytes)
        if sum(owned.values()) + nbytes > 6 * UNIT:
            raise torch.OutOfMemoryError("CUDA out of memory")
        address = runtime.malloc(nbytes)
        owned[address] = nbytes
        return address

    def delete(address):
        owned.pop(address)
        runtime.free(address)

    monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", alloc)
    monkeypatch.setattr(torch.cuda, "caching_allocator_delete", delete)
    budget = CheckpointBudget(8 * UNIT, device="cuda:0", hold="pool", allocator=torch_allocator())
    saved = budget.save(array(hostcuda, 4 * UNIT))
    assert sum(owned.values()) == 4 * UNIT
    with pytest.raises(BudgetExceeded, match="other allocators hold it"):
        budget.save(array(hostcuda, 4 * UNIT))
    assert attempts[-3:] == [4 * UNIT] * 3, "CuPy flushed and tried again"
    saved.free()
    with pytest.raises(BudgetExceeded, match="short"):
        budget.save(array(hostcuda, 9 * UNIT))
    budget.close()
    assert not owned, "close() gives cached blocks back to torch"


def test_a_pinned_host_pool_has_a_limit_and_does_not_round(hostcuda):
    before = hostcuda.pinned_bytes()
    pool = HostPool(1000, allocate=pinned_buffer)
    block = pool.take(601)
    assert hostcuda.pinned_bytes() - before == 601
    np.asarray(block)[:] = 3
    with pytest.raises(BudgetExceeded):
        pool.take(400)
    del block
    pool.trim()
    assert hostcuda.pinned_bytes() == before


def test_spilling_from_the_device_to_the_host_and_back(hostcuda):
    host = CheckpointBudget(8 * UNIT, device="cpu", hold="pool", allocator=pinned_buffer)
    budget = CheckpointBudget(8 * UNIT, device="cuda:0", hold="pool", over_cap=("spill", "raise"), spill_to=host)
    first = budget.save(array(hostcuda, 6 * UNIT, fill=1), "first")
    second = budget.save(array(hostcuda, 6 * UNIT, fill=2), "second")
    assert (budget.used_bytes, host.used_bytes) == (6 * UNIT, 6 * UNIT)
    assert set(second.load().get()) == {2}
    second.free()
    assert set(first.load().get()) == {1}
    assert (budget.used_bytes, host.used_bytes) == (6 * UNIT, 0)
