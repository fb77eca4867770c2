"""Arrays in a budget: what comes back, when the bytes go back, and what happens over the cap."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetClosed, BudgetExceeded, NotCheckpointed
from gpuckpt.memory.compression import CompressedForm
from gpuckpt.memory.devices import choose_device


@pytest.fixture
def budget():
    return CheckpointBudget(1 << 16, device="cpu", hold="pool")


NUMPY = {
    "plain": lambda: np.arange(24.0).reshape(2, 3, 4),
    "fortran": lambda: np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "strided": lambda: np.arange(48, dtype=np.int16).reshape(6, 8)[::2, 1::3],
    "reversed": lambda: np.arange(6)[::-1],
    "broadcast": lambda: np.broadcast_to(np.arange(4.0), (5, 4)),
    "scalar": lambda: np.array(3, np.uint8),
    "empty": lambda: np.zeros((0, 3), np.complex64),
    "bool": lambda: np.array([True, False]),
    "complex": lambda: np.arange(3) * (1 + 2j),
    "structured": lambda: np.zeros(3, [("a", "i4"), ("b", "f8")]),
    "one field": lambda: np.zeros(4, [("a", "u1"), ("b", "<f4")])["b"],
    "big-endian": lambda: np.arange(4, dtype=">f4"),
}


@pytest.mark.parametrize("case", NUMPY)
def test_numpy_arrays_come_back_as_they_were(case, budget):
    array = NUMPY[case]()
    saved = budget.save(array)
    view = saved.load()
    assert (type(view), view.dtype, view.shape) == (np.ndarray, array.dtype, array.shape)
    np.testing.assert_array_equal(view, array)
    assert view.size == 0 or view.ctypes.data == saved.load().ctypes.data
    assert budget.used_bytes == saved.nbytes == (4 * 8 if case == "broadcast" else array.nbytes)
    del view
    saved.free()
    assert budget.used_bytes == 0


TORCH = {
    "plain": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(3, 4).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "with gaps": lambda: torch.randn(6, 8)[::2, 1::3],
    "expanded": lambda: torch.randn(4, 1).expand(4, 7),
    "scalar": lambda: torch.tensor(3),
    "empty": lambda: torch.zeros(0, 3),
    "bool": lambda: torch.tensor([True, False]),
    "int8": lambda: torch.arange(5, dtype=torch.int8),
    "bfloat16": lambda: torch.randn(7).bfloat16(),
    "float8": lambda: torch.randn(7).to(torch.float8_e4m3fn),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "gradient": lambda: torch.randn(3, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("case", TORCH)
def test_torch_tensors_come_back_as_they_were(case, budget):
    tensor = TORCH[case]()
    saved = budget.save(tensor)
    view = saved.load()
    assert (view.dtype, view.shape, view.device) == (tensor.dtype, tensor.shape, tensor.device)
    assert not view.requires_grad
    plain = tensor.detach().resolve_conj().resolve_neg()
    assert torch.equal(
        view.view(torch.uint8) if case == "float8" else view, plain.view(torch.uint8) if case == "float8" else plain
    )
    if case in ("plain", "transposed", "channels last"):
        assert view.stride() == tensor.stride()
    assert budget.used_bytes == (16 if case == "expanded" else plain.numel() * plain.element_size())
    del view
    saved.free()
    assert budget.used_bytes == 0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(3, device="meta"), "meta|on meta"),
        (lambda: np.array([None]), "Python objects"),
        (lambda: [1.0], "got list"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[qQ]uantiz.*")
def test_what_has_no_plain_memory_is_refused_by_name(make, reason, budget):
    with pytest.raises((TypeError, ValueError), match=reason):
        budget.save(make())
    assert budget.snapshot()[1:4] == (0, 0, 0)


def test_a_view_that_outlives_free_keeps_its_bytes(budget):
    saved = budget.save(torch.arange(100))
    part = saved.load()[10:20]
    saved.free()
    saved.free()
    assert budget.used_bytes == 800
    assert part.tolist() == list(range(10, 20))
    with pytest.raises(NotCheckpointed, match="freed"):
        saved.load()
    del part
    assert budget.used_bytes == 0
    assert budget._pool.live_bytes == 0


def test_writing_into_a_view_is_seen_by_the_next_load(budget):
    saved = budget.save(np.zeros(3))
    saved.load()[1] = 5
    assert saved.load().tolist() == [0, 5, 0]


def test_a_handle_that_is_dropped_frees_its_bytes(budget):
    budget.save(np.zeros(100))
    assert budget.used_bytes == 0


def test_account_charges_what_a_view_keeps_alive_and_copies_nothing():
    budget = CheckpointBudget(1000, device="cpu")
    tensor = torch.zeros(100)
    saved = budget.save(tensor[:10])
    assert budget.used_bytes == 400
    assert saved.load().data_ptr() == tensor.data_ptr()
    saved.free()
    array = np.zeros(100)
    saved = budget.save(array[::50])
    assert (budget.used_bytes, saved.load().base is array) == (800, True)
    saved.free()
    assert budget.used_bytes == 0


def test_what_lies_in_the_pool_already_is_charged_once(budget):
    saved = budget.save(torch.arange(10))
    again = budget.save(saved.load())
    assert budget.used_bytes == 80
    saved.free()
    assert (budget.used_bytes, again.load().tolist()) == (80, list(range(10)))
    again.free()
    assert budget.used_bytes == 0


def test_the_host_pool_does_not_fragment():
    budget = CheckpointBudget(10, device="cpu", hold="pool")
    budget.save(np.zeros(8, np.uint8)).free()
    one = budget.save(np.zeros(1, np.uint8))
    eight = budget.save(np.zeros(8, np.uint8))
    assert (budget.used_bytes, one.nbytes + eight.nbytes) == (9, 9)


def test_a_refused_save_changes_nothing(budget):
    held = budget.save(np.zeros(1 << 12))
    before = budget.snapshot()
    with pytest.raises(BudgetExceeded, match="'big' is 4096 bytes short"):
        budget.save(np.zeros((1 << 15) + (1 << 12), np.uint8), "big")
    assert budget.snapshot()._replace(refusals=0) == before._replace(refusals=0)
    assert budget._pool.live_bytes + budget._pool.cached_bytes <= budget.max_bytes
    held.free()


def test_the_systems_own_out_of_memory_passes_untouched_and_is_taken_back():
    def allocate(nbytes):
        raise MemoryError("the system has no more")

    budget = CheckpointBudget(1000, device="cpu", hold="pool", allocator=allocate)
    with pytest.raises(MemoryError, match="the system has no more") as error:
        budget.save(np.zeros(10))
    assert not isinstance(error.value, BudgetExceeded)
    assert budget.snapshot()[1:4] == (0, 0, 0)
    assert (budget._pool.live_bytes, budget._pool.cached_bytes) == (0, 0)


def spilling(nbytes=1000, host=1000, **options):
    second = CheckpointBudget(host, device="cpu", hold="pool")
    return CheckpointBudget(nbytes, device="cpu", hold="pool", over_cap=("spill",), spill_to=second, **options), second


def test_the_oldest_are_spilled_first_and_come_back():
    budget, second = spilling(host=1200)
    saved = [budget.save(np.full(50, i, np.float64)) for i in range(5)]  # 400 bytes each, two fit at a time
    assert (budget.used_bytes, second.used_bytes) == (800, 1200)
    assert [handle.nbytes for handle in saved] == [0, 0, 0, 400, 400], "the oldest went first"
    for i in reversed(range(5)):
        np.testing.assert_array_equal(saved[i].load(), np.full(50, i, np.float64))
        saved[i].free()
        assert budget.used_bytes <= 1000
    assert (budget.used_bytes, second.used_bytes) == (0, 0)


def test_a_full_spill_budget_refuses_and_everything_stays_loadable():
    budget, second = spilling(host=500)
    saved = [budget.save(np.full(50, i, np.float64)) for i in range(3)]
    with pytest.raises(BudgetExceeded, match="short"):
        budget.save(np.zeros(50))
    assert (budget.used_bytes, second.used_bytes) == (800, 400)
    saved[2].free()
    for i in (1, 0):
        assert saved[i].load()[0] == i


def test_a_block_with_a_view_out_is_not_spilled():
    budget, second = spilling(500)
    saved = budget.save(np.zeros(50))
    view = saved.load()
    with pytest.raises(BudgetExceeded):
        budget.save(np.zeros(50))
    assert (budget.used_bytes, second.used_bytes) == (400, 0)
    del view
    budget.save(np.ones(50))
    assert second.used_bytes == 400


@pytest.mark.parametrize(
    "make", [lambda i: np.full(50, i, np.float64), lambda i: torch.full((50,), i, dtype=torch.float64)]
)
def test_under_account_the_array_itself_is_spilled_and_comes_back(make):
    second = CheckpointBudget(1200, device="cpu", hold="pool")
    budget = CheckpointBudget(1000, device="cpu", over_cap=("spill",), spill_to=second)
    saved = [budget.save(make(i)) for i in range(5)]
    assert (budget.used_bytes, second.used_bytes) == (800, 1200)
    with pytest.raises(BudgetExceeded):
        budget.save(make(5))
    for i in reversed(range(5)):
        assert float(saved[i].load().sum()) == 50 * i
        assert type(saved[i].load()) is type(make(i))
        saved[i].free()
        assert budget.used_bytes <= 1000
    assert (budget.used_bytes, second.used_bytes) == (0, 0)


@pytest.mark.parametrize("make", [lambda x: x.astype(np.float32), lambda x: torch.from_numpy(x).float()])
def test_compress_halves_the_bytes_within_its_bound(make):
    budget = CheckpointBudget(1300, device="cpu", hold="pool", over_cap=("compress",), storage_dtype="float16")
    values = np.random.default_rng(0).standard_normal(200)
    first = budget.save(make(values))
    second = budget.save(make(values))
    assert (budget.used_bytes, first.nbytes, second.nbytes) == (1200, 400, 800)
    assert budget._pool.live_bytes == budget.used_bytes
    loaded = np.asarray(first.load())
    assert loaded.dtype == np.float32
    relative = np.abs(loaded - values.astype(np.float32)) / np.maximum(np.abs(values), 2**-14)
    assert relative.max() <= 2**-11
    first.free()
    second.free()
    assert budget.used_bytes == budget._pool.live_bytes == 0


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_compress_refuses_to_turn_numbers_into_infinities_and_integers_into_anything(make):
    budget = CheckpointBudget(1000, device="cpu", hold="pool", over_cap=("compress",), storage_dtype="float16")
    for array in (np.full(200, 1e6, np.float32), np.arange(200, dtype=np.int32)):
        saved = budget.save(make(array))
        with pytest.raises(BudgetExceeded):
            budget.save(np.zeros(200, np.float32))
        np.testing.assert_array_equal(saved.load(), array)
        saved.free()
        gc.collect()


@pytest.mark.parametrize(
    "array",
    [np.full(200, 1.1, np.float16), torch.full((200,), 1.1, dtype=torch.float16), torch.full((200,), 1.1).bfloat16()],
)
def test_what_is_as_small_already_is_not_compressed(array):
    """It would take the same bytes, and lose digits where the formats differ."""
    budget = CheckpointBudget(500, device="cpu", hold="pool", over_cap=("compress",), storage_dtype="float16")
    saved = budget.save(array)
    assert saved.evict("compress") == 0
    assert saved._compressed is None
    assert (saved.nbytes, budget.used_bytes) == (400, 400)
    assert (saved.load() == array).all()


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_documented_error_of_each_storage_dtype_holds(storage, library):
    bound = {"float16": 2**-11, "bfloat16": 2**-8, "float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}[storage]
    budget = CheckpointBudget(1 << 16, device="cpu", hold="pool")
    values = np.random.default_rng(1).uniform(0.1, 8, 4096).astype(np.float32)
    saved = budget.save(values if library == "numpy" else torch.from_numpy(values))
    small = CompressedForm.make(saved._form, saved._block, storage)
    block = budget.take(small.nbytes, "small")
    small.store(block)
    loaded = np.asarray(small.expand(saved._form, block))
    assert small.nbytes == 4096 * (1 if "float8" in storage else 2)
    assert 0 < (np.abs(loaded - values) / values).max() <= bound


def test_a_callable_policy_and_the_order_of_policies():
    asked = []
    ballast = []

    def drop_ballast(budget, need_bytes, what):
        asked.append((need_bytes, what))
        return bool(ballast and ballast.pop())

    budget = CheckpointBudget(100, device="cpu", over_cap=(drop_ballast, "raise"))
    ballast.append(budget.charge(80))
    kept = budget.charge(60, "wanted")
    assert (asked, budget.used_bytes) == ([(60, "wanted")], 60)
    with pytest.raises(BudgetExceeded):
        budget.charge(60)
    kept.release()


class Frame:
    """Holds bytes that it can compute again."""

    def __init__(self, budget, nbytes, log):
        self.charge, self.log = budget.charge(nbytes), log
        budget.offer(self)

    def evict(self, how):
        nbytes = self.charge.nbytes
        self.log.append(how)
        if how != "recompute" or not nbytes:
            return 0
        self.charge.release()
        return nbytes


def test_offered_holders_are_asked_oldest_first_until_it_fits():
    budget, log = CheckpointBudget(100, device="cpu", over_cap=("recompute", "raise")), []
    frames = [Frame(budget, 30, log) for _ in range(3)]
    wanted = budget.charge(50)
    assert [frame.charge.nbytes for frame in frames] == [0, 0, 30]
    assert [event.kind for event in budget.events() if event.kind == "recompute"] == ["recompute"] * 2
    budget.withdraw(frames[2])
    with pytest.raises(BudgetExceeded):
        budget.charge(40)
    assert frames[2].charge.nbytes == 30, "one that withdrew is not asked"
    wanted.release()
    ghost = Frame(budget, 10, log)
    del ghost
    gc.collect()
    assert len(list(budget.holders.in_order())) == 2, "the registry keeps nobody alive"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"over_cap": ("pray",)}, "'pray'"),
        ({"over_cap": ("spill",)}, "give spill_to"),
        ({"over_cap": ("compress",)}, "declare storage_dtype"),
        ({"storage_dtype": "float3"}, "'float3'"),
        ({"hold": "tight"}, "'tight'"),
        ({"device": "tpu"}, "'tpu'"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, reason):
    with pytest.raises(ValueError, match=reason):
        CheckpointBudget(100, **{"device": "cpu", **options})


def test_a_copied_model_shares_the_budget_and_a_pickled_one_does_not_travel(budget):
    assert copy.deepcopy({"budget": budget})["budget"] is budget
    assert copy.copy(budget) is budget
    with pytest.raises(BudgetClosed, match="does not travel"):
        pickle.dumps(budget)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_fork_cannot_use_its_parents_budget(budget):
    saved = budget.save(np.arange(4))
    pid = os.fork()
    if pid == 0:  # the child leaves by os._exit: pytest must not run twice
        outcome = 1
        try:
            budget.charge(1)
        except BudgetClosed as error:
            saved.free()
            outcome = 0 if "fork" in str(error) else 2
        finally:
            os._exit(outcome)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    budget.charge(1)
    assert saved.load().tolist() == [0, 1, 2, 3]


def test_a_spawned_process_cannot_be_given_a_budget(budget):
    process = multiprocessing.get_context("spawn").Process(target=print, args=(budget,))
    with pytest.raises(BudgetClosed, match="does not travel"):
        process.start()


def test_importing_memory_loads_neither_torch_nor_cupy():
    code = "import sys, gpuckpt.memory; sys.exit(bool({'torch', 'cupy', 'jax', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_closed_budget_keeps_what_it_holds_until_it_is_freed(budget):
    saved = budget.save(np.arange(4))
    budget.close()
    with pytest.raises(BudgetClosed):
        budget.save(np.arange(4))
    assert saved.load().tolist() == [0, 1, 2, 3]
    saved.free()
    assert budget.used_bytes == 0


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("method", ["take", "charge", "allocate", "free"])
@pytest.mark.parametrize("size", [-63, -1, True, 1.5, None, np.int64(-8), [4]])
def test_a_size_that_is_none_is_refused_before_anything_changes(method, size, hold):
    budget = CheckpointBudget(100, device="cpu", hold=hold)
    arguments = (size, "x") if method in ("take", "charge") else (size,)
    with pytest.raises((TypeError, ValueError), match="size in bytes"):
        getattr(budget, method)(*arguments)
    assert (budget.used_bytes, budget.remaining(), budget.peak_bytes) == (0, 100, 0)


def test_a_size_may_be_any_integer_or_a_string():
    budget = CheckpointBudget(100, device="cpu", hold="pool")
    blocks = [budget.take(size, "x") for size in (np.int64(8), "16 B", 4)]
    assert [block.nbytes for block in blocks] == [8, 16, 4]
    assert budget.used_bytes == 28


LOCKS = {
    "ledger": lambda budget: budget.ledger._lock,
    "pool": lambda budget: budget._pool._lock,
    "budget": lambda budget: budget._pool_lock,
    "moving": lambda budget: budget.moving,
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("lock", LOCKS)
def test_a_child_that_is_forked_while_a_thread_is_inside_does_not_wait(lock):
    spill_to = CheckpointBudget("1MiB", device="cpu", hold="pool")
    budget = CheckpointBudget("1MiB", device="cpu", hold="pool", over_cap=("spill",), spill_to=spill_to)
    saved = budget.save(np.arange(10.0))
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with LOCKS[lock](budget):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            repr(budget), budget.remaining(), saved.load(), saved.free()
            budget.save(np.arange(10.0))
        except BudgetClosed:
            status = 0
        finally:
            os._exit(status)
    leave.set()
    thread.join()
    deadline = time.monotonic() + 20
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if found == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert found == (child, 0), "the child waits for a lock that nobody can release"
    assert saved.load()[3] == 3.0


def test_sixteen_policies_are_taken_and_no_more():
    """A list without an end would never be read through."""
    policies = [lambda budget, need_bytes, what: False] * 17
    assert CheckpointBudget(1, device="cpu", over_cap=policies[:16]).over_cap == tuple(policies[:16])
    with pytest.raises(ValueError, match="over_cap must name"):
        CheckpointBudget(1, device="cpu", over_cap=policies)


@pytest.mark.parametrize(("there", "device"), [(True, "cuda:2"), (False, "cpu"), (None, "cpu")])
def test_without_torch_cupy_says_whether_there_is_a_device(there, device, monkeypatch):
    class Cuda:
        is_available = staticmethod(lambda: there)
        Device = type("Device", (), {"id": 2})

    monkeypatch.delitem(sys.modules, "torch")
    if there is None:
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=Cuda))
    assert choose_device(None) == device


def test_a_host_pool_gives_back_the_oldest_sizes_and_no_more_than_asked():
    budget = CheckpointBudget(1000, device="cpu", hold="pool")
    for nbytes in (100, 200, 300):
        budget.save(np.zeros(nbytes, np.uint8)).free()
    pool = budget._pool
    assert (pool.live_bytes, pool.cached_bytes) == (0, 600)
    found = []
    for keep_bytes in (600, 599, 300, 299, 0):
        pool.trim(keep_bytes)
        found.append(pool.cached_bytes)
    assert found == [600, 500, 300, 0, 0]
    for nbytes in (400, 500):
        budget.save(np.zeros(nbytes, np.uint8)).free()
    held = budget.save(np.zeros(200, np.uint8))
    assert (pool.live_bytes, pool.cached_bytes) == (200, 500), "400 cached bytes went, 500 fit beside it"
    held.free()


@pytest.mark.parametrize("how", ["compress", "spill", "recompute"])
def test_what_holds_nothing_gives_nothing_up(how):
    """An empty array, one that was freed, one that was given up before: 0 bytes, and nothing changes."""
    budget, _ = spilling(1000, 1000, storage_dtype="float16")
    empty, freed, gone = (budget.save(np.zeros(count, np.float32)) for count in (0, 10, 10))
    freed.free()
    assert gone.evict("spill") == 40
    before = budget.snapshot()
    assert [saved.evict(how) for saved in (empty, freed, gone)] == [0, 0, 0]
    assert budget.snapshot() == before
    assert gone.load().tolist() == [0.0] * 10
