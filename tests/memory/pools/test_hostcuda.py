"""The stand-in itself: CuPy's pools behave on it as on a device, and it refuses what a device would refuse."""

from __future__ import annotations

import numpy as np
import pytest


def test_contents_travel_and_the_books_follow(hostcuda):
    cupy = hostcuda.cupy
    pool = cupy.cuda.MemoryPool()
    before = hostcuda.used_bytes()
    with cupy.cuda.using_allocator(pool.malloc):
        array = cupy.asarray(np.arange(1000, dtype=np.float32))
    assert hostcuda.used_bytes() - before == pool.total_bytes() == 4096
    np.testing.assert_array_equal(array.get(), np.arange(1000, dtype=np.float32))
    del array
    pool.free_all_blocks()
    assert hostcuda.used_bytes() == before


def test_out_of_memory_is_cupys_own_error(hostcuda):
    hostcuda.set_capacity(4096)
    pool = hostcuda.cupy.cuda.MemoryPool()
    kept = pool.malloc(4096)
    with pytest.raises(hostcuda.cupy.cuda.memory.OutOfMemoryError):
        pool.malloc(1)
    del kept


def test_a_copy_past_the_end_is_refused(hostcuda):
    runtime = hostcuda.cupy.cuda.runtime
    pointer = runtime.malloc(512)
    source = np.zeros(1024, np.uint8)
    with pytest.raises(runtime.CUDARuntimeError, match="InvalidValue"):
        runtime.memcpy(pointer, source.ctypes.data, 513, runtime.memcpyHostToDevice)
    with pytest.raises(runtime.CUDARuntimeError, match="InvalidValue"):
        runtime.free(pointer + 8)
    runtime.free(pointer)


def test_the_nth_allocation_fails_once(hostcuda):
    runtime = hostcuda.cupy.cuda.runtime
    hostcuda.fail_allocation(1)
    first = runtime.malloc(512)
    with pytest.raises(runtime.CUDARuntimeError, match="MemoryAllocation"):
        runtime.malloc(512)
    runtime.free(runtime.malloc(512))
    runtime.free(first)


def test_a_held_stream_keeps_its_events_back(hostcuda):
    cupy = hostcuda.cupy
    stream = cupy.cuda.Stream(non_blocking=True)
    hostcuda.hold_stream(stream)
    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    assert not event.done
    hostcuda.release_stream(stream)
    assert event.done


def test_devices_have_books_of_their_own(hostcuda):
    cupy = hostcuda.cupy
    with cupy.cuda.Device(1):
        held = cupy.cuda.MemoryPool().malloc(2048)
    assert held.device_id == 1
    assert hostcuda.used_bytes(1) >= 2048
