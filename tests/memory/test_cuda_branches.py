"""Budgets on a device, with torch tensors that say they are on it: which stream a block lies on, and who waits for whom."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from gpuckpt import BudgetExceeded, CheckpointBudget
from gpuckpt.memory.adapters.torch import TorchForm
from gpuckpt.memory.pools.cupy import torch_stream
from gpuckpt.pytorch.engine.saved_storage import SavedStorage

UNIT = 512


def floats(count: int = 256) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)


@pytest.fixture
def host(cuda_tensors) -> CheckpointBudget:
    return CheckpointBudget("1MiB", device="cpu", hold="pool")


def test_a_host_block_takes_the_bytes_of_a_cuda_tensor(cuda_tensors, host):
    flat = torch.arange(1024, dtype=torch.uint8)
    assert flat.is_cuda
    copy = SavedStorage(1024).copy_in(host, flat)
    assert torch.equal(copy, flat)
    assert not copy.is_cuda
    assert not cuda_tensors.taken


def test_a_form_writes_a_cuda_tensor_to_the_host(host):
    form = TorchForm(floats())
    block = host.take(form.nbytes, "spilled")
    form.write(floats(), block)
    assert torch.equal(form.view(block), floats())


def test_torchs_stream_is_cupys_without_a_warning_and_made_once(cuda_tensors):
    side = cuda_tensors.stream()
    with cuda_tensors.on(side):
        assert torch_stream(0).ptr == side.cuda_stream
        assert torch_stream(0) is torch_stream(torch.device("cuda:0"))
    assert torch_stream(0).ptr == 0


def test_every_block_lies_on_torchs_stream_whatever_is_saved(cuda_tensors, host):
    """Blocks that were taken for host arrays, moved or compressed lay on CuPy's null stream: in an arena of their own."""
    budget = cuda_tensors.budget(10 * UNIT, over_cap=("spill", "compress"), spill_to=host, storage_dtype="float16")
    side = cuda_tensors.stream()
    with cuda_tensors.on(side):
        budget.prefetch(10 * UNIT)
        first = budget.save(floats(768))  # 6 units
        second = budget.save(floats(1024))  # 8: the first goes to the host
        second.free()
        assert torch.equal(first.load(), floats(768))  # a take without an array at hand
        first.evict("compress")
        assert torch.equal(first.load(), floats(768))
        budget.take(2 * UNIT, "anything")
    assert len(cuda_tensors.taken) == 6
    assert set(cuda_tensors.taken) == {side.cuda_stream}


def test_a_bring_back_fits_into_the_piece_that_was_fetched_for_the_plan(cuda_tensors):
    budget = cuda_tensors.budget(10 * UNIT)
    with cuda_tensors.on(cuda_tensors.stream()):
        budget.prefetch(10 * UNIT)
        kept = budget.save(floats(128))
        budget.take(8 * UNIT, "brought back")
    assert kept.nbytes == UNIT


@pytest.mark.parametrize("streams", ["torch", "cupy"])
def test_the_budget_says_whose_streams_its_blocks_lie_on(cuda_tensors, streams):
    side = cuda_tensors.stream()
    cupys = cuda_tensors.cupy.cuda.Stream(non_blocking=True)
    budget = cuda_tensors.budget(8 * UNIT, streams=streams)
    with cuda_tensors.on(side), cupys:
        block = budget.take(UNIT, "block")
    assert block.stream.ptr == (side.cuda_stream if streams == "torch" else cupys.ptr)


def test_a_library_that_is_none_is_refused():
    with pytest.raises(ValueError, match="streams is 'jax'"):
        CheckpointBudget(1, device="cpu", streams="jax")


def test_before_torch_uses_cuda_blocks_follow_cupy(cuda_tensors, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    budget = cuda_tensors.budget(8 * UNIT)
    budget.take(UNIT, "block")
    assert budget._pool.library == "cupy"


def test_a_writer_on_another_stream_waits_and_is_waited_for(cuda_tensors):
    """An array of CuPy's in a budget that follows torch: valid on CuPy's stream, held on torch's."""
    cupy, hostcuda = cuda_tensors.cupy, cuda_tensors.hostcuda
    side, cupys = cuda_tensors.stream(), cupy.cuda.Stream(non_blocking=True)
    budget = cuda_tensors.budget(8 * UNIT)
    with cuda_tensors.on(side), cupys:
        saved = budget.save(cupy.asarray(np.arange(UNIT, dtype=np.uint8)))
        own = torch_stream(0)
        assert hostcuda.waits(cupys, own) == 1, "the memory's last reader may still run on the block's stream"
        assert hostcuda.waits(own, cupys) == 1, "the block is reused in the order of its own stream"
        np.testing.assert_array_equal(saved.load().get(), np.arange(UNIT, dtype=np.uint8))


def test_on_its_own_stream_nothing_waits(cuda_tensors):
    side = cuda_tensors.stream()
    budget = cuda_tensors.budget(8 * UNIT)
    with cuda_tensors.on(side):
        saved = budget.save(floats())
        saved.load()
        own = torch_stream(0)
    null = cuda_tensors.cupy.cuda.Stream.null
    assert [cuda_tensors.hostcuda.waits(a, b) for a in (own, null) for b in (own, null)] == [0, 0, 0, 0]


def test_a_reader_on_another_stream_of_torchs_delays_reuse(cuda_tensors):
    reader = cuda_tensors.stream()
    budget = cuda_tensors.budget(4 * UNIT)
    saved = budget.save(floats(512))
    with cuda_tensors.on(reader):
        view = saved.load()
    assert cuda_tensors.hostcuda.waits(reader.stream, cuda_tensors.default.stream) == 1
    cuda_tensors.hostcuda.hold_stream(reader.stream)
    saved.free()
    del view
    gc.collect()
    assert budget.used_bytes == 4 * UNIT
    cuda_tensors.hostcuda.release_stream(reader.stream)
    assert budget.used_bytes == 0


def test_compression_reads_after_the_write(cuda_tensors):
    budget = cuda_tensors.budget(8 * UNIT, over_cap=("compress",), storage_dtype="float16")
    saved = budget.save(floats(512))
    other = cuda_tensors.stream()
    with cuda_tensors.on(other):
        assert saved.evict("compress") == 2 * UNIT
    assert cuda_tensors.hostcuda.waits(other.stream, cuda_tensors.default.stream) >= 1
    assert torch.equal(saved.load(), floats(512))


def test_a_graph_is_refused_a_block_and_the_ledger_stays(cuda_tensors):
    side = cuda_tensors.stream()
    budget = cuda_tensors.budget(8 * UNIT)
    budget.save(floats(128)).free()
    refused = pytest.raises(RuntimeError, match='capture under a budget with hold="account"')
    with cuda_tensors.on(side), cuda_tensors.hostcuda.capturing(side.stream), refused:
        budget.save(floats(128))
    assert (budget.used_bytes, budget.snapshot().pending_bytes) == (0, 0)
    budget.save(floats(128))


def test_a_tensor_of_the_host_is_refused_by_a_pool_on_the_device(cuda_tensors, host):
    on_host = torch.from_numpy(np.asarray(host.take(UNIT, "block")))
    with pytest.raises(ValueError, match="is on cpu and this budget's pool on cuda:0"):
        cuda_tensors.budget(8 * UNIT).save(on_host)


def test_the_cap_holds_for_cuda_tensors(cuda_tensors):
    budget = cuda_tensors.budget(4 * UNIT)
    held = budget.save(floats(384))
    with pytest.raises(BudgetExceeded):
        budget.save(floats(384))
    assert held.nbytes == budget.used_bytes == 3 * UNIT
