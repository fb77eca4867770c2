"""`linear_cross_entropy` against plain autograd on whole logits, on both back ends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetExceeded, DimMismatch
from gpuckpt.pytorch.ops import _loss_chunks as module
from gpuckpt.pytorch.ops.linear_cross_entropy import chunk_rows_for, linear_cross_entropy, transient_bytes


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("GPUCKPT_BACKEND", request.param)
    return request.param


def problem(M=37, V=130, K=24, dtype=torch.float32, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).to(dtype)
    weight = (torch.randn(V, K, generator=g) / K**0.5).to(dtype)
    b = torch.randn(V, generator=g).to(dtype) if bias else None
    target = torch.randint(0, V, (M,), generator=g)
    target[::7] = -100
    leaves = [t.requires_grad_() for t in (x, weight, b) if t is not None]
    return (*leaves, *([None] if b is None else [])), target


def plain(
    x, weight, bias, target, *, z_loss=0.0, softcap=None, reduction="mean", ignore_index=-100, label_smoothing=0.0
):
    logits = F.linear(x, weight, bias)
    if x.dtype.itemsize == 2:
        logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    same = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(logits, target, reduction="none", **same)
    kept = target != ignore_index
    loss = loss + torch.where(kept, z_loss * torch.logsumexp(logits, -1).square(), 0)
    return loss if reduction == "none" else loss.sum() / (kept.sum() if reduction == "mean" else 1)


def gradients(loss, leaves):
    upstream = torch.linspace(0.7, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad(loss, [t for t in leaves if t is not None], upstream)


def assert_within_twice_torch(leaves, target, **options):
    chunk = options.pop("chunk_rows", None)
    x, weight, bias = leaves
    got = linear_cross_entropy(x, weight, target, bias, chunk_rows=chunk, **options)
    theirs = plain(x, weight, bias, target, **options)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    want = plain(*wide, target, **options)
    results = zip(
        ("loss", "dx", "dW", "db"),
        (got, *gradients(got, leaves)),
        (theirs, *gradients(theirs, leaves)),
        (want, *gradients(want, wide)),
        strict=False,
    )
    for name, g, t, w in results:
        error, allowed = (g.double() - w).abs().max().item(), 2 * (t.double() - w).abs().max().item() + 1e-6
        assert error < allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 8.0}, {"chunk_rows": 10}],
    ids=["plain", "all", "chunks"],
)
def test_loss_and_all_gradients(backend, dtype, reduction, options):
    leaves, target = problem(dtype=dtype)
    assert_within_twice_torch(leaves, target, reduction=reduction, **options)


@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, 1000])
def test_the_chunk_does_not_change_the_loss(backend, chunk_rows):
    (x, weight, bias), target = problem()
    whole = linear_cross_entropy(x, weight, target, bias, reduction="none", chunk_rows=37)
    parts = linear_cross_entropy(x, weight, target, bias, reduction="none", chunk_rows=chunk_rows)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_leading_dimensions_and_strides(backend):
    (x, weight, _), target = problem(M=24, bias=False)
    shaped = x.detach().reshape(2, 12, 24).transpose(0, 1).requires_grad_()
    targets = target.reshape(2, 12).t()
    wide_weight = torch.zeros(130, 48)
    wide_weight[:, ::2] = weight.detach()
    loss = linear_cross_entropy(shaped, wide_weight[:, ::2], targets, reduction="none", chunk_rows=5)
    assert loss.shape == (12, 2)
    want = plain(shaped.reshape(-1, 24), weight, None, targets.reshape(-1), reduction="none").reshape(12, 2)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, [shaped])[0], gradients(want, [shaped])[0])


def test_only_the_input_the_targets_and_the_parameters_are_saved(backend):
    (x, weight, bias), target = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(x, weight, target, bias)
    expected = {t.untyped_storage().data_ptr() for t in (x, weight, bias, target)}
    assert {t.untyped_storage().data_ptr() for t in saved} == expected


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_the_asked_gradients_are_computed(backend, monkeypatch, wanted):
    leaves, target = problem()
    whole = gradients(plain(*leaves, target), leaves)
    used = [t.detach().requires_grad_(want) for t, want in zip(leaves, wanted, strict=True)]
    products = []
    add = module.WeightGrad.add
    monkeypatch.setattr(module.WeightGrad, "add", lambda *a: products.append(1) or add(*a))
    linear_cross_entropy(used[0], used[1], target, used[2], chunk_rows=10).backward(torch.tensor(0.7))
    for t, want, reference in zip(used, wanted, whole, strict=True):
        if want:
            torch.testing.assert_close(t.grad, reference)
        else:
            assert t.grad is None
    assert len(products) == (4 if wanted[1] else 0), "a frozen weight costs no dW"


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that was made under it."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return out


def test_logits_are_never_held_for_all_rows(backend):
    M, V, K, chunk = 64, 256, 16, 8
    (x, weight, bias), target = problem(M, V, K)
    what = module.LossOptions(-100, 0.1, 0.0, None)
    with torch.no_grad(), Largest() as seen:
        module.forward_chunks(x, weight, bias, target, what, "mean", chunk)
        module.backward_chunks(torch.tensor(1.0), x, weight, bias, target, what, "mean", chunk, [True, True, True])
    # The parameters and their gradients are the largest that remain: 16 KiB, where all logits would be 64 KiB.
    assert seen.nbytes == 4 * V * K > 4 * chunk * V


@pytest.mark.parametrize(("cap_bytes", "rows"), [(0, 16), (100_000, 16), (160_000, 19), (1 << 20, 128), (1 << 22, 300)])
def test_a_budget_sets_the_chunk(monkeypatch, cap_bytes, rows):
    """All 300 rows by default, 2.3 MiB; inside a budget no more than it has, and never fewer than 16 rows."""
    V = 2048
    (x, weight, bias), target = problem(M=300, V=V, K=24)
    seen = []
    logits = module._logits
    monkeypatch.setattr(module, "_logits", lambda x, *rest: seen.append(len(x)) or logits(x, *rest))
    budget = CheckpointBudget(cap_bytes + target.nbytes, device="cpu")
    with budget:
        loss = linear_cross_entropy(x, weight, target, bias)
    got = gradients(loss, (x, weight, bias))
    assert max(seen) == rows == min(300, max(16, budget.max_bytes // (4 * V)))
    gradient_bytes = sum(t.nbytes for t in (x, weight, bias))
    assert sum(seen) == (1 if gradient_bytes <= cap_bytes else 2) * 300
    for a, b in zip(got, gradients(plain(x, weight, bias, target), (x, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_many_16_bit_chunks_are_summed_in_float32(backend):
    # With 16-bit sums the error would grow with the number of chunks; it has to stay that of one rounding.
    g = torch.Generator().manual_seed(3)
    x = torch.rand(128, 8, generator=g).to(torch.bfloat16)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(128, dtype=torch.int64)
    linear_cross_entropy(x, weight, target, reduction="sum", chunk_rows=4).backward()
    wide = weight.detach().double().requires_grad_()
    plain(x.double(), wide, None, target, reduction="sum").backward()
    assert ((weight.grad.double() - wide.grad) / wide.grad).abs().max() < 2**-8


def test_a_second_backward_is_right(backend):
    (x, weight, bias), target = problem()
    loss = linear_cross_entropy(x, weight, target, bias, chunk_rows=10)
    first = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_fixes_the_dtype_in_forward(backend):
    (x, weight, bias), target = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target, bias)
    assert loss.dtype == torch.float32
    grads = gradients(loss, (x, weight, bias))
    assert [g.dtype for g in grads] == [torch.float32] * 3
    low = [t.detach().bfloat16().requires_grad_() for t in (x, weight, bias)]
    reference = linear_cross_entropy(low[0], low[1], target, low[2])
    torch.testing.assert_close(loss, reference, rtol=0, atol=0)
    torch.testing.assert_close(grads[0].bfloat16(), gradients(reference, low)[0], rtol=0, atol=0)


def test_nothing_but_ignored_rows_is_nan_with_zero_gradients_as_in_torch(backend):
    (x, weight, bias), target = problem()
    target.fill_(-100)
    loss = linear_cross_entropy(x, weight, target, bias)
    assert loss.isnan()
    assert all((g == 0).all() for g in gradients(loss, (x, weight, bias)))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_rows_at_all(backend, reduction):
    weight = torch.ones(5, 3, requires_grad=True)
    loss = linear_cross_entropy(torch.ones(0, 3), weight, torch.zeros(0, dtype=torch.int64), reduction=reduction)
    loss.sum().backward()
    assert loss.sum() == 0
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck(reduction, frozen):
    (x, weight, bias), target = problem(M=9, V=12, K=4)
    args = (x, weight.detach() if frozen else weight, bias, target, None, -100, 0.1, 0.01, 9.0, reduction, 4, None)
    torch.library.opcheck(torch.ops.gpuckpt.linear_cross_entropy_fwd.default, args)


def test_compiles_as_one_graph():
    (x, weight, bias), target = problem()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, weight, target, bias), linear_cross_entropy(x, weight, target, bias))
    got = gradients(compiled(x, weight, target, bias), (x, weight, bias))
    for a, b in zip(got, gradients(plain(x, weight, bias, target), (x, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


def test_chunk_follows_from_the_scratch():
    assert chunk_rows_for(8192, 4096, 128256, 2, scratch_bytes=64 << 20) == (64 << 20) // (128256 * 2) == 261
    assert chunk_rows_for(8192, 4096, 128256, 2) == 2048
    assert chunk_rows_for(1 << 17, 4096, 128256, 2) == 8192  # as large as x
    assert chunk_rows_for(100, 4096, 128256, 2) == 100
    assert chunk_rows_for(0, 4096, 128256, 2) == 1
    with pytest.raises(BudgetExceeded) as caught:
        chunk_rows_for(8192, 4096, 128256, 2, scratch_bytes=1000)
    assert caught.value.need == 256512


def test_transient_bytes_states_every_piece():
    one = transient_bytes(512, 4096, 128256, torch.bfloat16, 512)
    assert one == 512 * 128256 * 2
    many = transient_bytes(8192, 4096, 128256, torch.bfloat16, 512)
    assert many == one + 4 * (128256 + 8192) * 4096
    assert transient_bytes(8192, 4096, 128256, torch.bfloat16, 512, needs_weight=False) == one


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction='avg'"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing=-0.1"),
        ({"softcap": -1.0}, ValueError, "softcap=-1.0"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows=0"),
        ({"chunk_rows": 4, "scratch_bytes": 4}, ValueError, "give one of them"),
        ({"scratch_bytes": 4}, BudgetExceeded, "one row of logits"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, DimMismatch, "target of shape"),
        ({"target": torch.zeros(4)}, TypeError, "int64"),
        ({"target": torch.full((4,), 6)}, ValueError, "target 6 is not a class"),
        ({"weight": torch.zeros(6, 4)}, DimMismatch, "weight"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "no classes"),
        ({"bias": torch.zeros(5)}, DimMismatch, "bias"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"x": torch.zeros(4, 3), "weight": torch.zeros(6, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **change})
