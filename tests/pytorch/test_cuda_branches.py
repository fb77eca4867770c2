"""What the torch side does on a CUDA device, with tensors that say they are on the stand-in one."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpuckpt
from gpuckpt import CheckpointBudget, backend, functional
from gpuckpt.backend import multiply_by_triton, use_triton
from gpuckpt.kernels import gated as gated_kernels
from gpuckpt.kernels import linear as linear_kernels
from gpuckpt.kernels import mlp as mlp_kernels
from gpuckpt.memory.adapters.torch import TorchForm
from gpuckpt.memory.devices import choose_device
from gpuckpt.memory.uncapped import uncapped
from gpuckpt.pytorch.engine.copies import CopySide, copies_for
from gpuckpt.pytorch.engine.fence.fence import Fence
from gpuckpt.pytorch.engine.fence.randomness import Draws, Generators
from gpuckpt.pytorch.link_speed import Link
from gpuckpt.pytorch.ops._weight_grads import CUDA_BLOCK, WeightGrad, bias_scratch, sum_rows, weight_scratch
from gpuckpt.pytorch.peak_check import DevicePeak, StepPeaks
from gpuckpt.pytorch.profiling.clock import WallClock
from gpuckpt.pytorch.profiling.isolation import watch_draws
from gpuckpt.segments.fused import runs_fused
from tests.hostcuda.torch_on_host import TorchStream
from tests.pytorch.steps import batch, blocks, gradients, run

CUDA = torch.device("cuda", 0)


def units(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


@pytest.fixture
def generator(monkeypatch):
    """A CUDA generator of sorts: one number, which `monkeypatch`ed torch.cuda reads and sets."""
    state = [torch.tensor([0], dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state[0].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new, device: state.__setitem__(0, new))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state[0].clone()])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda new: state.__setitem__(0, new[0]))
    return state


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("call", [None, gpuckpt.checkpoint], ids=["plain", "checkpoint"])
def test_a_step_on_a_side_stream_keeps_every_block_there(cuda_tensors, generator, call):
    model, x = blocks(6), batch()
    expected = gradients(model, lambda: run(model, x))
    budget = cuda_tensors.budget("1MiB")

    def loss() -> torch.Tensor:
        with budget:
            return run(model, x, call)

    side = cuda_tensors.stream()
    with cuda_tensors.on(side):
        assert gradients(model, loss) == expected
    assert set(cuda_tensors.taken) == {side.cuda_stream}
    assert budget.used_bytes == 0


def test_backward_on_another_stream_reads_in_order(cuda_tensors):
    budget = cuda_tensors.budget("1MiB")
    x = torch.ones(200, requires_grad=True)
    with budget:
        y = (x * 2).sin()
    other = cuda_tensors.stream()
    with cuda_tensors.on(other):
        y.sum().backward()
    assert cuda_tensors.hostcuda.waits(other.stream, cuda_tensors.default.stream) >= 1
    assert x.grad is not None


@pytest.mark.parametrize("policy", ["spill", "compress"])
def test_a_full_pool_gives_bytes_up_on_the_stream_of_the_step(cuda_tensors, policy):
    def step(budget) -> torch.Tensor:
        with budget:
            return run(model, x)

    model, x = blocks(6), batch(32)
    expected = gradients(model, lambda: run(model, x))
    roomy = cuda_tensors.budget("4MiB")
    gradients(model, lambda: step(roomy))
    host = CheckpointBudget("4MiB", device="cpu", hold="pool")
    small = units(roomy.peak_bytes // (3 if policy == "spill" else 1) * 2 // (2 if policy == "spill" else 3))
    options = {"spill_to": host} if policy == "spill" else {"storage_dtype": "float16"}
    budget = cuda_tensors.budget(small, over_cap=[policy], **options)
    cuda_tensors.taken.clear()
    side = cuda_tensors.stream()
    with cuda_tensors.on(side):
        found = gradients(model, lambda: step(budget))
    assert (found == expected) == (policy == "spill")
    assert set(cuda_tensors.taken) == {side.cuda_stream}
    assert (budget.used_bytes, host.used_bytes) == (0, 0)
    assert budget.peak_bytes <= small


def test_a_plan_that_spills_brings_back_on_the_stream_of_the_step(cuda_tensors, generator, monkeypatch):
    monkeypatch.setattr("gpuckpt.pytorch.plan_maker.measure_link", lambda *_: Link(1e12, 0.0))
    model, x = torch.nn.Sequential(*blocks(8)), batch(32)
    expected = gradients(model, lambda: model(x).square().sum())
    roomy = gpuckpt.fit(model, x, cuda_tensors.budget("4MiB"), strategy="none")
    peak_bytes = roomy.plan.certificate.peak_bytes
    roomy.unfit()
    budget = cuda_tensors.budget(units(peak_bytes // 3))
    side = cuda_tensors.stream()
    cuda_tensors.taken.clear()
    with cuda_tensors.on(side):
        host = CheckpointBudget("4MiB", device="cpu", hold="pool")
        fitted = gpuckpt.fit(model, x, budget, host_budget=host)
        assert gradients(model, lambda: model(x).square().sum()) == expected
    assert fitted.measured_peak_bytes == fitted.plan.certificate.peak_bytes
    assert fitted.measured_host_peak_bytes > 0
    assert set(cuda_tensors.taken) == {side.cuda_stream}


def test_the_device_waits_are_part_of_the_time(cuda_tensors):
    WallClock().now()
    assert cuda_tensors.synchronized == 1


def test_the_generator_of_the_device_is_watched_and_set(cuda_tensors, generator):
    have_drawn = watch_draws()
    assert not have_drawn()
    states = Generators([CUDA], [], False)
    generator[0] = torch.tensor([5], dtype=torch.uint8)
    assert have_drawn()
    leave = states.enter()
    assert generator[0].item() == 0
    leave()
    assert generator[0].item() == 5


def test_without_tensors_the_current_device_is_fenced(cuda_tensors, generator):
    fence = Fence(lambda: None, [], True)
    generator[0] = torch.tensor([5], dtype=torch.uint8)
    with fence.restored():
        assert generator[0].item() == 0
    assert generator[0].item() == 5


class OnTheDevice(torch.Tensor):
    """Whose device says so too."""

    device = property(lambda tensor: CUDA)


def test_what_is_drawn_on_the_device_is_seen(cuda_tensors, generator, monkeypatch):
    leaf = torch.ones(2).as_subclass(OnTheDevice)
    assert not Draws([leaf], []).were_made()
    draws = Draws([leaf], [])
    generator[0] = torch.tensor([5], dtype=torch.uint8)
    assert draws.were_made()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    draws = Draws([leaf], [])
    generator[0] = torch.tensor([6], dtype=torch.uint8)
    assert not draws.were_made(), "a graph draws by an offset of its own"


def test_a_graph_cannot_record_a_generator_and_is_told_so(cuda_tensors, generator, capturing):
    with pytest.raises(RuntimeError, match="capture with preserve_rng_state=False"):
        Fence(lambda: None, [], True)
    Fence(lambda: None, [], False)


def test_a_graph_cannot_be_measured_and_is_told_so(cuda_tensors, capturing):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="run one such step before"):
        gpuckpt.measure(torch.nn.Sequential(model, model), torch.ones(1, 2))


def test_dropout_in_a_graph_is_refused(capturing):
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="all replays would drop the same"):
        functional.linear(x, w, dropout=0.5)
    assert functional.linear(x, w).shape == (2, 4)


def test_tensors_of_the_device_run_on_the_kernels(cuda_tensors, monkeypatch):
    monkeypatch.delenv("GPUCKPT_BACKEND")
    assert use_triton(torch.ones(1))
    assert not use_triton(torch.ones(1, dtype=torch.float64))
    assert runs_fused(torch.ones(1))


@pytest.mark.parametrize(("dtype", "by_triton"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_products_of_float32_are_left_to_cublas(dtype, by_triton, cuda_tensors, monkeypatch):
    monkeypatch.delenv("GPUCKPT_BACKEND")
    assert multiply_by_triton(torch.ones(1, dtype=getattr(torch, dtype))) is by_triton


@pytest.mark.parametrize("name", ["linear", "mlp", "gated_mlp"])
def test_float32_is_multiplied_and_differentiated_without_a_kernel(name, cuda_tensors, monkeypatch):
    monkeypatch.delenv("GPUCKPT_BACKEND")
    for module in (linear_kernels, mlp_kernels, gated_kernels):
        for launcher in module.__all__:
            monkeypatch.setattr(module, launcher, None)
    x, a, b, c = (torch.randn(n, 8, requires_grad=True) for n in (5, 16, 16, 16))
    down = torch.randn(8, 16, requires_grad=True)
    if name == "linear":
        used, y, expected = (x, a), functional.linear(x, a, activation="silu"), F.silu(x @ a.t())
    elif name == "mlp":
        y, expected = functional.mlp(x, a, down, activation="silu"), F.silu(x @ a.t()) @ down.t()
        used = (x, a, down)
    else:
        y, expected = functional.gated_mlp(x, b, c, down), (F.silu(x @ b.t()) * (x @ c.t())) @ down.t()
        used = (x, b, c, down)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, used, dy), torch.autograd.grad(expected, used, dy), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_mask_of_float32_is_made_by_the_kernel(cuda_tensors, monkeypatch):
    monkeypatch.delenv("GPUCKPT_BACKEND")
    given = []
    monkeypatch.setattr(linear_kernels, "linear_fwd", lambda x, *rest, **options: given.append(options["dropout"].p))
    functional.linear(torch.ones(2, 3), torch.ones(4, 3), dropout=0.5)
    assert given == [0.5]


def test_what_a_step_took_of_a_device_is_what_its_allocator_counted(monkeypatch):
    counted = iter([100, 900, 900, 700])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(counted))
    scope = SimpleNamespace(after_backward=lambda: None, unit_bytes=512, unforeseen_bytes=0)
    steps = StepPeaks(CheckpointBudget(1000, device="cpu"), None, strict=False)
    peak = DevicePeak(nn.Linear(2, 2), scope, [], steps.check)
    peak._device, peak.next_bytes = CUDA, 500
    peak.begin()
    assert peak.broken()
    assert (peak.measured_bytes, scope.unforeseen_bytes) == (900, 400)
    peak.next_bytes = 900
    peak.begin()
    assert not peak.broken(), "an earlier step took as much"


def test_copies_on_a_stream_of_their_own_are_ordered_with_the_step(cuda_tensors, monkeypatch):
    class SideStream(TorchStream):
        def __init__(self, device):
            super().__init__(cuda_tensors.cupy.cuda.Stream(non_blocking=True))

        def wait_stream(self, other):
            self.stream.wait_event(other.stream.record())

        def record_event(self):
            return self.stream.record()

    monkeypatch.setattr(torch.cuda, "Stream", SideStream)
    monkeypatch.setattr(torch.cuda, "stream", cuda_tensors.on)
    monkeypatch.setattr(TorchStream, "wait_event", lambda self, event: self.stream.wait_event(event), raising=False)
    form = TorchForm(torch.empty(1024, dtype=torch.uint8))
    host, budget = CheckpointBudget("1MiB", device="cpu", hold="pool"), cuda_tensors.budget("1MiB")
    blocks = [place.take(form.nbytes, "test") for place in (host, budget, host)]
    first, there, back = (CopySide(form.view(block), block) for block in blocks)
    first.flat.copy_(torch.arange(1024))
    copies = copies_for(CUDA)
    side, step = copies._stream.stream, cuda_tensors.default.stream
    for target, source in ((there, first), (back, there)):
        before = cuda_tensors.hostcuda.waits(side, step), cuda_tensors.hostcuda.waits(step, side)
        copies.copy(target, source, "test").wait()
        after = cuda_tensors.hostcuda.waits(side, step), cuda_tensors.hostcuda.waits(step, side)
        assert all(b < a for b, a in zip(before, after, strict=True))
    assert there.flat.is_cuda
    assert not back.flat.is_cuda
    assert torch.equal(back.flat, torch.arange(1024).to(torch.uint8))


def test_kernels_are_loaded_without_the_interpreter(cuda_tensors, monkeypatch):
    monkeypatch.setattr(backend, "_numpy_takes_no_length_one", lambda: pytest.fail("asked about the interpreter"))
    monkeypatch.setattr("triton.__version__", "3.6.0")
    backend.load_kernels(torch.ones(1))


def test_where_there_is_a_gpu_the_interpreter_is_not_chosen(monkeypatch):
    monkeypatch.setenv("GPUCKPT_BACKEND", "triton")
    for available in (True, False):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        backend._choose_interpreter()
        assert os.environ.get("TRITON_INTERPRET") == (None if available else "1")


def test_the_targets_of_a_loss_are_not_waited_for(cuda_tensors, monkeypatch):
    x, w, target = torch.randn(5, 4), torch.randn(7, 4), torch.tensor([0, 6, -100, 3, 2])
    expected = torch.nn.functional.cross_entropy(x @ w.t(), target)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", lambda t: pytest.fail("waited for the device"))
        loss = functional.linear_cross_entropy(x, w, target)
    torch.testing.assert_close(loss, expected)


def test_sums_of_16_bit_chunks_are_wide_and_made_in_blocks(cuda_tensors, monkeypatch):
    """On CUDA cuBLAS gives a 16-bit product in float32, for `CUDA_BLOCK` rows of dW at a time."""
    made = []

    def mm(a, b, *, out_dtype=None, out=None):
        made.append((tuple(a.shape), out_dtype))
        return torch.matmul(a.to(out_dtype), b.to(out_dtype)) if out is None else torch.matmul(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(CUDA_BLOCK + 3, 4, dtype=torch.bfloat16)
    a, b = (torch.randn(6, n, generator=generator).bfloat16() for n in weight.shape)
    sums = WeightGrad(weight, several=True)
    for part in (slice(0, 4), slice(4, 6)):
        sums.add(a[part], b[part])
    assert made[:2] == [((CUDA_BLOCK, 4), torch.float32), ((3, 4), torch.float32)]
    expected = (a.double().t() @ b.double()).bfloat16()
    assert torch.equal(sums.result(), expected)
    assert weight_scratch(weight, torch.bfloat16, 4, True).passing == 4 * CUDA_BLOCK * 4
    bias = torch.empty(5, dtype=torch.bfloat16)
    assert bias_scratch(bias, torch.bfloat16, 4, False) == (20, 0)
    total = a.float().sum(0)
    monkeypatch.setattr(torch.Tensor, "float", lambda t: pytest.fail("widened block by block, as on the CPU"))
    assert torch.equal(sum_rows(a), total)


def test_a_current_device_is_the_default_of_a_budget(cuda_tensors, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == choose_device("cuda") == "cuda:0"


def test_what_no_budget_counts_is_measured_on_the_device(cuda_tensors, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 200)
    monkeypatch.setattr(cuda_tensors.cupy.cuda, "is_available", lambda: True)
    kept = cuda_tensors.cupy.asarray(np.zeros(100, np.uint8))
    found = {row.name: row.nbytes for row in uncapped("cuda:0")}
    assert found["torch's cache"] == 500
    assert found["CuPy's default pool"] == 512
    assert found["context and others"] == cuda_tensors.hostcuda.used_bytes() - 512 - 700
    del kept
    monkeypatch.setattr(cuda_tensors.cupy.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1000, 5000))
    assert {row.name: row.nbytes for row in uncapped("cuda:0")}["context and others"] == 3300
