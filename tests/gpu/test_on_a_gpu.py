"""Kernels' values, pools with torch's tensors, frames, offload and fit on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch

import gpuckpt
from gpuckpt import BudgetExceeded, CheckpointBudget, functional
from tests.pytorch.ops.fused import OPS, assert_as_good_as_torch, gradients
from tests.pytorch.steps import batch, blocks, run

pytestmark = pytest.mark.gpu
OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


def operands_on(device, op, *sizes, dtype, bias=True):
    drawn = op.draw(*sizes, dtype=dtype, bias=bias)
    return [None if t is None else t.detach().to(device).requires_grad_() for t in drawn]


def check(device, op, *sizes, dtype, expanded=False, **options):
    operands = operands_on(device, op, *sizes, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in operands]
    generator = torch.Generator().manual_seed(5)
    dy = torch.randn(sizes[0], op.shapes(*sizes)[-1][0], generator=generator).to(dtype).to(device)
    dy = dy[:1, :1].expand_as(dy) if expanded else dy
    activation = options.pop("activation", "gelu")
    truth = gradients(op.plain, exact, dy.double(), activation=activation)
    torchs = gradients(op.plain, operands, dy, activation=activation)
    assert_as_good_as_torch(gradients(op.run, operands, dy, activation=activation, **options), truth, torchs)


@OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(128, 64, 128, 64), (37, 21, 40, 18), (1, 128, 256, 128)], ids=str)
def test_values(op, dtype, sizes, device):
    check(device, op, *sizes, dtype=dtype)


@OP
def test_expanded_gradients_and_chunks(op, device):
    check(device, op, 96, 64, 128, 64, dtype=torch.bfloat16, expanded=True)
    check(device, op, 96, 64, 128, 64, dtype=torch.bfloat16, chunk_rows=32)


@OP
@pytest.mark.parametrize("sizes", [(0, 16, 32, 16), (16, 0, 32, 16), (16, 16, 32, 0)], ids=str)
def test_sizes_of_zero(op, sizes, device):
    check(device, op, *sizes, dtype=torch.float32)


def test_dropout_drops_what_the_cpu_drops(device):
    x, w = torch.randn(64, 32), torch.randn(48, 32)
    found = []
    for place in (device, torch.device("cpu")):
        torch.manual_seed(3)
        found.append((functional.linear(x.to(place), w.to(place), dropout=0.4) == 0).cpu())
    assert torch.equal(*found)
    assert 0.3 < found[0].float().mean() < 0.5


def test_a_saved_tensor_comes_back_from_the_pool(device):
    budget = CheckpointBudget("1MiB", device=device, hold="pool")
    tensor = torch.arange(1000, device=device, dtype=torch.float32)
    saved = budget.save(tensor)
    view = saved.load()
    assert view.device == tensor.device
    assert torch.equal(view, tensor)
    assert view.data_ptr() == saved.load().data_ptr() != tensor.data_ptr()
    assert budget.used_bytes == budget.footprint(4000)
    saved.free()
    del view
    assert budget.used_bytes == 0


def test_a_pool_refuses_what_does_not_fit(device):
    budget = CheckpointBudget(4096, device=device, hold="pool")
    held = budget.save(torch.ones(768, device=device))
    with pytest.raises(BudgetExceeded):
        budget.save(torch.ones(768, device=device))
    assert budget.used_bytes == held.nbytes


@pytest.mark.parametrize("policy", ["spill", "compress"])
def test_a_full_pool_gives_bytes_up_and_has_them_back(device, policy):
    host = CheckpointBudget("1MiB", device="cpu", hold="pool")
    options = {"spill_to": host} if policy == "spill" else {"storage_dtype": "float16"}
    budget = CheckpointBudget(6144, device=device, hold="pool", over_cap=[policy], **options)
    first = torch.arange(1024, device=device, dtype=torch.float32)
    one = budget.save(first)
    two = budget.save(-first[:768] if policy == "spill" else -first[:512])
    assert budget.peak_bytes <= 6144
    kept = two.load().clone()
    two.free()
    assert torch.equal(one.load(), first)
    assert torch.equal(kept, -first[: kept.numel()])


def models(device, count=6):
    model = blocks(count).to(device)
    return model, batch(32).to(device)


def steps(model, loss_of):
    """Loss and gradients, as tensors: a device's bits cannot be read in place."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = loss_of()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_frames_give_the_same_bits_and_charge_the_budget(device, hold):
    model, x = models(device)
    expected = steps(model, lambda: run(model, x))
    budget = CheckpointBudget("4MiB", device=device, hold=hold)

    def loss():
        with budget:
            return run(model, x, gpuckpt.checkpoint)

    assert same(steps(model, loss), expected)
    assert budget.peak_bytes > 0
    assert budget.used_bytes == 0


def test_dropout_in_a_frame_is_the_same_in_the_recompute(device):
    model = blocks(3, dropout=0.5).to(device)
    x = batch(32).to(device)
    expected = steps(model, lambda: run(model, x))
    assert same(steps(model, lambda: run(model, x, gpuckpt.checkpoint)), expected)


def test_backward_in_another_thread(device):
    model, x = models(device)
    expected = steps(model, lambda: run(model, x))
    budget = CheckpointBudget("4MiB", device=device, hold="pool")
    with budget:
        loss = run(model, x, gpuckpt.checkpoint)
    model.zero_grad(set_to_none=True)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert same([p.grad for p in model.parameters()], expected[1:])
    del loss, thread
    gc.collect()
    assert budget.used_bytes == 0


def to_fit(device, rows):
    """A model, a batch, the gradients of a plain step, and the bytes that keeping everything takes."""
    model = torch.nn.Sequential(*blocks(8)).to(device)
    x = batch(rows).to(device)
    plain = copy.deepcopy(model)
    expected = steps(plain, lambda: plain(x).square().sum())
    whole = gpuckpt.fit(model, x, CheckpointBudget("64MiB", device=device), strategy="none")
    whole.unfit()
    return model, x, expected, whole.plan.certificate.peak_bytes


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_fit_keeps_its_promise(device, hold, share):
    model, x, expected, whole_bytes = to_fit(device, 32)
    fitted = gpuckpt.fit(model, x, CheckpointBudget(int(share * whole_bytes), device=device, hold=hold))
    for _ in range(2):
        assert same(steps(model, lambda: model(x).square().sum()), expected)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= share * whole_bytes
    assert fitted.budget.used_bytes == 0


def test_offload_under_fit(device):
    model, x, expected, whole_bytes = to_fit(device, 256)
    fitted = gpuckpt.fit(model, x, int(0.4 * whole_bytes), hold="pool", host_budget="64MiB")
    assert same(steps(model, lambda: model(x).square().sum()), expected)
    assert fitted.measured_peak_bytes <= fitted.promised_peak_bytes
    assert fitted.measured_host_peak_bytes <= fitted.promised_host_peak_bytes
    assert fitted.budget.used_bytes == fitted.host_budget.used_bytes == 0


def test_a_step_on_another_stream(device, dry):
    if dry:
        pytest.skip("no streams on the CPU")
    model = torch.nn.Sequential(*blocks(8)).to(device)
    x = batch(256).to(device)
    fitted = gpuckpt.fit(model, x, "2MiB", hold="pool", host_budget="64MiB")
    expected = steps(model, lambda: model(x).square().sum())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = steps(model, lambda: model(x).square().sum())
    torch.cuda.synchronize()
    assert same(found, expected)
    assert fitted.budget.used_bytes == 0


def test_a_graph_is_refused_what_it_cannot_replay(device, dry):
    if dry:
        pytest.skip("no graphs on the CPU")
    x, w = torch.randn(64, 64, device=device), torch.randn(64, 64, device=device)
    expected = functional.linear(x, w, activation="gelu")
    budget = CheckpointBudget("1MiB", device=device, hold="pool")
    budget.save(x).free()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="CUDA graph"):
            budget.save(x)
        with pytest.raises(RuntimeError, match="CUDA graph"):
            functional.linear(x, w, dropout=0.5)
        replayed = functional.linear(x, w, activation="gelu")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(replayed, expected)
