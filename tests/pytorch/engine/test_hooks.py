"""What `with budget:` charges, when it gives bytes back, and that backward sees what was saved."""

from __future__ import annotations

import multiprocessing
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpuckpt
from gpuckpt import BudgetClosed, BudgetExceeded, CheckpointBudget, SavedTensorModified
from gpuckpt.pytorch.engine.residency import mark_resident
from gpuckpt.pytorch.engine.storage_index import index_of
from tests.pytorch.steps import HOLDS, batch, bits, blocks, gradients, run

both = pytest.mark.parametrize("hold", HOLDS)


class _Save(torch.autograd.Function):
    """Saves `tensors` and multiplies the anchor by 1; backward hands what it finds to `found`."""

    @staticmethod
    def forward(ctx, anchor: Tensor, found: list, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.found = found
        return anchor.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.found.extend(ctx.saved_tensors)
        return (grad, None, *(None for _ in ctx.saved_tensors))


def save(budget: CheckpointBudget, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A tensor whose graph holds `tensors` in the budget, and the list that its backward puts them into."""
    found: list[Tensor] = []
    anchor = torch.ones(1, requires_grad=True)
    with budget:
        return _Save.apply(anchor, found, *tensors), found


def new_budget(hold: str, size: int | str = "1MiB", **options) -> CheckpointBudget:
    return CheckpointBudget(size, device="cpu", hold=hold, **options)


# ---- what is charged


@both
def test_a_plain_model_is_held_and_given_back(hold):
    model, x = blocks(3), batch()
    plain = gradients(model, lambda: run(model, x))
    budget = new_budget(hold)

    def held() -> Tensor:
        with budget:
            loss = run(model, x)
        assert budget.used_bytes > 0
        return loss

    assert gradients(model, held) == plain
    assert budget.used_bytes == 0


@both
def test_parameters_and_their_views_are_not_charged(hold):
    class Attention(nn.Module):
        """Chunked qkv, a transposed weight, a slice of a frozen one, a tied one."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.randn(48, 16))
            self.frozen = nn.Parameter(torch.randn(16, 16), requires_grad=False)
            self.tied = self.qkv

        def forward(self, x: Tensor) -> list[Tensor]:
            q, k, v = self.qkv.chunk(3)
            return [
                q,
                k,
                v.t(),
                self.frozen[:4],
                self.tied[3],
                self.qkv,
                self.frozen,
                self.frozen.t(),
                self.qkv.detach(),
            ]

    model = Attention()
    mark_resident(model.parameters())
    budget = new_budget(hold)
    out, found = save(budget, *model(batch()))
    assert budget.peak_bytes == 0
    out.backward()
    assert bits(found) == bits(model(batch()))


@both
def test_the_weights_of_layers_are_not_charged(hold):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Linear(64, 16, bias=False))
    x = batch()
    budget = new_budget(hold)
    with budget:
        y = model(x)
    assert budget.used_bytes == x.nbytes + 8 * 64 * 4  # the two inputs; no weight.t()
    y.sum().backward()
    assert budget.used_bytes == 0


@both
def test_buffers_are_not_charged_once_they_are_resident(hold):
    buffer = torch.randn(16)
    budget = new_budget(hold)
    mark_resident([buffer])
    out, _ = save(budget, buffer, buffer[3:])
    assert budget.used_bytes == 0
    del out, buffer
    mark_resident([])
    storage = torch.zeros(16)
    out, _ = save(budget, storage)  # perhaps at the address where the buffer was
    assert budget.used_bytes == 64
    del out


@both
def test_a_shared_storage_is_charged_once_and_until_its_last_user_is_gone(hold):
    budget = new_budget(hold)
    x = torch.randn(100)
    first, found = save(budget, x, x[:50], x.view(10, 10).t())
    second, _ = save(budget, x[90:])
    assert budget.used_bytes == 400
    first.backward()
    assert bits(found) == bits([x, x[:50], x.view(10, 10).t()])
    found.clear()
    del first
    assert budget.used_bytes == 400
    del second
    assert budget.used_bytes == 0


@both
def test_a_view_is_charged_by_what_it_keeps_alive(hold):
    budget = new_budget(hold)
    out, found = save(budget, torch.arange(1000.0)[500:501])
    assert budget.used_bytes == 4000
    out.backward()
    assert found[0].item() == 500


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool, torch.uint8,
    torch.int16, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_comes_back_as_it_was(hold, dtype):
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 960, np.uint8))
    x = (raw % 2).bool()[:60] if dtype is torch.bool else raw.view(dtype)[:60]
    x = x.clone().reshape(3, 4, 5)
    tensors = [
        x,
        x.transpose(0, 2),
        x[:, 1:3, ::2],
        x[1, 2, 3],  # no dimensions
        x[:0],  # nothing in it, but alive
        x[:1].expand(7, 4, 5),
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    budget = new_budget(hold)
    out, found = save(budget, *tensors)
    assert budget.used_bytes == 2 * x.untyped_storage().nbytes()  # x, and the permuted copy of it
    out.backward()
    for saved, loaded in zip(tensors, found, strict=True):
        assert (loaded.dtype, loaded.shape, loaded.stride()) == (saved.dtype, saved.shape, saved.stride())
        assert bits([loaded]) == bits([saved])
    found.clear()
    del out, loaded
    assert budget.used_bytes == 0


@both
def test_zero_size_conjugate_and_negative_views(hold):
    budget = new_budget(hold)
    z = torch.randn(6, dtype=torch.complex64)
    tensors = [torch.empty(0, 3), z.conj(), z.conj().imag, torch._neg_view(z.real), z.real, z[2:4].conj()]
    assert tensors[1].is_conj()
    assert tensors[2].is_neg()
    out, found = save(budget, *tensors)
    assert budget.used_bytes == 48
    out.backward()
    for saved, loaded in zip(tensors, found, strict=True):
        assert (loaded.is_conj(), loaded.is_neg()) == (saved.is_conj(), saved.is_neg())
        assert torch.equal(loaded.resolve_conj().resolve_neg(), saved.resolve_conj().resolve_neg())


@both
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_tensors_are_charged_by_their_parts(hold):
    budget = new_budget(hold)
    ends, places, values = torch.arange(5), torch.arange(4), torch.full((4,), 3.0)
    coo = torch.sparse_coo_tensor(torch.stack([places, places]), values, (4, 4))
    csr = torch.sparse_csr_tensor(ends, places, values, (4, 4))
    csc = torch.sparse_csc_tensor(ends, places, values, (4, 4))
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for tensor, nbytes in [
        (coo, 2 * 4 * 8 + 4 * 4),
        (csr, 5 * 8 + 4 * 8 + 4 * 4),
        (csc, 5 * 8 + 4 * 8 + 4 * 4),
        (nested, 5 * 4 + 3 * 8),
    ]:
        out, found = save(budget, tensor, tensor)
        assert budget.used_bytes == nbytes
        out.backward()
        assert found[0].layout == tensor.layout
        found.clear()
        del out
        assert budget.used_bytes == 0


@both
def test_a_model_with_a_sparse_product_and_complex_numbers(hold):
    matrix = (torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float().to_sparse()
    x = torch.randn(6, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def fn(x):
        y = (x * 2).conj() * x.abs()
        return torch.sparse.mm(matrix, y.real.exp()).sum() + torch.fft.fft(y).abs().square().sum()

    (expected,) = torch.autograd.grad(fn(x), x)
    budget = new_budget(hold)
    with budget:
        loss = fn(x)
    (got,) = torch.autograd.grad(loss, x)
    assert torch.equal(got, expected)
    assert budget.used_bytes == 0


@both
def test_an_output_saved_by_its_own_node_does_not_hold_itself(hold):
    """exp saves its own output; without care output -> node -> output would be a cycle that only the collector finds."""
    budget = new_budget(hold)
    x = torch.ones(100, requires_grad=True)
    with budget:
        y = x.exp()
    assert budget.used_bytes == 400
    del y
    assert budget.used_bytes == 0


# ---- in-place changes


def test_an_in_place_change_is_named_under_account():
    budget = new_budget("account")
    x = torch.ones(3, 5, requires_grad=True)
    with budget:
        h = x * 2
        y = h.sin()
    h.add_(1)
    with pytest.raises(SavedTensorModified, match=r"float32 tensor of shape \(3, 5\) was changed in place"):
        y.sum().backward()


def test_an_in_place_change_of_a_view_is_noticed():
    budget = new_budget("account")
    h = torch.ones(4, 4, requires_grad=True) * 2
    with budget:
        y = h.sin()
    h[2].zero_()
    with pytest.raises(SavedTensorModified):
        y.sum().backward()


def test_an_in_place_change_after_saving_does_not_reach_the_pool():
    budget = new_budget("pool")
    x = torch.linspace(0, 1, 6).requires_grad_()
    with budget:
        h = x * 2
        y = h.sin()
        with torch.no_grad():
            h.add_(1)
        z = h.cos()  # saved again, with other contents
    assert budget.used_bytes == 2 * h.nbytes
    (y.sum() + z.sum()).backward()
    first = x.detach() * 2
    assert torch.equal(x.grad, 2 * first.cos() - 2 * (first + 1).sin())


@both
def test_an_in_place_operation_that_autograd_allows_is_allowed(hold):
    budget = new_budget(hold)
    x = torch.linspace(-1, 1, 6).requires_grad_()

    def fn():
        return (((x * 2).relu_() + 1).sqrt_() * 3).sigmoid_().sum()

    (expected,) = torch.autograd.grad(fn(), x)
    with budget:
        loss = fn()
    (got,) = torch.autograd.grad(loss, x)
    assert torch.equal(got, expected)


# ---- the cap


@both
def test_a_tensor_that_does_not_fit_changes_nothing_and_is_named(hold):
    budget = new_budget(hold, 399)
    x = torch.ones(100, requires_grad=True)
    h = (x * 2).exp()
    with pytest.raises(BudgetExceeded, match="float32 tensor of shape") as refusal, budget:
        h.sin()
    assert (refusal.value.need, refusal.value.available) == (400, 399)
    assert "ExpBackward" in str(refusal.value)
    assert "1 bytes short" in str(refusal.value)
    assert "400 bytes" in str(refusal.value)
    del refusal
    assert budget.used_bytes == 0


@both
def test_a_budget_of_zero_holds_parameters_and_nothing_else(hold):
    budget = new_budget(hold, 0)
    weight = nn.Parameter(torch.ones(3))
    with budget:
        (weight * weight).sum().backward()
        with pytest.raises(BudgetExceeded):
            (weight * 2).sin()


@both
def test_two_models_share_one_budget(hold):
    first, second, x = blocks(2), blocks(3), batch()
    budget = new_budget(hold)
    expected = gradients(first, lambda: run(first, x)), gradients(second, lambda: run(second, x))
    for model in (first, second):
        model.zero_grad()
    torch.manual_seed(3)
    with budget:
        a = run(first, x)
        one = budget.used_bytes
        b = run(second, x)
    assert budget.used_bytes > one
    a.backward()
    b.backward()
    assert [bits(p.grad for p in model.parameters()) for model in (first, second)] == [expected[0][1], expected[1][1]]
    assert budget.used_bytes == 0


@both
def test_a_closed_budget_takes_nothing_more_and_gives_back_what_it_has(hold):
    budget = new_budget(hold)
    x = torch.ones(100, requires_grad=True)
    with budget:
        y = (x * 2).sin()
        budget.close()
        with pytest.raises(BudgetClosed):
            y.exp()
    with pytest.raises(BudgetClosed, match="closed"), budget:
        pass
    y.sum().backward()
    assert torch.equal(x.grad, 2 * (x.detach() * 2).cos())
    assert budget.used_bytes == 0


@both
def test_entering_twice_and_leaving_by_an_exception(hold):
    budget = new_budget(hold)
    x = torch.ones(100, requires_grad=True)
    with budget:
        with pytest.raises(ZeroDivisionError), budget:
            raise ZeroDivisionError
        y = (x * 2).sin()
    (x * 3).sin()
    assert budget.used_bytes == 400
    del y
    assert budget.used_bytes == 0


# ---- the pool


def test_pooled_bytes_lie_in_the_pool_and_the_original_is_free_to_go():
    budget = new_budget("pool")
    out, found = save(budget, torch.randn(256))
    out.backward()
    assert budget.owns(found[0].data_ptr())
    assert budget.used_bytes == 1024, "who still looks at a block keeps it charged"
    found.clear()
    del out
    assert budget.used_bytes == 0


def test_a_tensor_that_lies_in_the_pool_is_not_copied_again():
    """As when a fused kernel writes its output into a block."""
    budget = new_budget("pool", 4096)
    saved = budget.save(torch.randn(1024))
    output = saved.load()
    expected = output.clone()
    out, found = save(budget, output, output[10:], output.view(32, 32).t())
    assert budget.used_bytes == 4096
    out.backward()
    assert found[0].data_ptr() == output.data_ptr()
    assert torch.equal(found[1], expected[10:])
    saved.free()
    del output, saved
    found.clear()
    del out
    assert budget.used_bytes == 0


def test_a_kernels_output_in_a_fresh_block_is_not_copied_again():
    budget = new_budget("pool", 4096)
    block = budget.take(4096, "output")
    output = torch.from_numpy(np.asarray(block)).view(torch.float32)
    del block
    output.copy_(torch.arange(1024.0))
    out, found = save(budget, output)
    assert budget.peak_bytes == 4096
    del output
    out.backward()
    assert torch.equal(found[0], torch.arange(1024.0))
    found.clear()
    del out
    assert budget.used_bytes == 0


def test_a_change_of_what_lies_in_the_pool_is_noticed():
    budget = new_budget("pool")
    output = budget.save(torch.ones(16)).load()
    out, _ = save(budget, output)
    output.add_(1)
    with pytest.raises(SavedTensorModified):
        out.backward()


def test_what_the_pool_cannot_hold_is_charged_where_it_is():
    class Named(torch.Tensor):
        pass

    budget = new_budget("pool")
    out, found = save(budget, torch.ones(100).as_subclass(Named), torch.ones(50, device="meta"))
    assert budget.used_bytes == 600
    out.backward()
    assert type(found[0]) is Named


# ---- processes


def _use(budget: CheckpointBudget, answers) -> None:
    try:
        with budget:
            (torch.ones(3, requires_grad=True) * 2).sin()
        answers.put("used")
    except BudgetClosed as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_budget_is_closed_in_a_fork():
    context = multiprocessing.get_context("fork")
    budget, answers = new_budget("account"), context.Queue()
    child = context.Process(target=_use, args=(budget, answers))
    child.start()
    assert "belongs to the process that made it" in answers.get(timeout=60)
    child.join()
    assert budget.used_bytes == 0


class _Items(torch.utils.data.Dataset):
    """A data set that has got hold of a budget."""

    def __init__(self, budget: CheckpointBudget) -> None:
        self.budget = budget

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> str:
        try:
            self.budget.allocate(1)
        except BudgetClosed:
            return "closed"
        return "used"


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_budget_is_closed_in_a_data_loaders_worker():
    budget = new_budget("account")
    loader = torch.utils.data.DataLoader(_Items(budget), num_workers=1, multiprocessing_context="fork")
    assert [item for batch in loader for item in batch] == ["closed", "closed"]
    assert budget.used_bytes == 0


def test_a_budget_does_not_travel_to_a_spawned_process():
    with pytest.raises(BudgetClosed, match="does not travel"):
        pickle.dumps(_Items(new_budget("account")))


# ---- bookkeeping


@both
def test_the_index_of_storages_does_not_grow_without_end(hold):
    budget = new_budget(hold)
    x = torch.ones(4, requires_grad=True)
    for _ in range(2000):
        with budget:
            (x * 2).sin().sum().backward()
    assert len(index_of(budget)._holdings) <= 512


_IN_PLACE = nn.Sequential(nn.Linear(8, 8), nn.RReLU(inplace=True))
NOISY = {
    "module": nn.RReLU(),
    "in place": lambda x: torch.rrelu_(x, training=True),
    "recomputed": lambda x: gpuckpt.checkpoint(nn.RReLU(), x),
    "recomputed twice": lambda x: gpuckpt.checkpoint(lambda x: gpuckpt.checkpoint(nn.RReLU(), x).sin(), x),
    "recomputed in place": lambda x: gpuckpt.checkpoint(_IN_PLACE, x),
    "in a block": nn.Sequential(nn.Linear(8, 8), nn.RReLU(inplace=True), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("noisy", NOISY.values(), ids=NOISY)
def test_noise_that_is_filled_in_after_saving_is_recomputed_whole_and_never_copied(noisy):
    x = batch(4, 8)
    expected = _noisy_gradient(noisy, x, None)
    account = CheckpointBudget("1MiB", device="cpu")
    assert torch.equal(_noisy_gradient(noisy, x, account), expected)  # a replay may not stop before the noise is there
    pool = CheckpointBudget("1MiB", device="cpu", hold="pool")
    with pytest.raises(NotImplementedError, match=r"rrelu in training .*hold='account'"):
        _noisy_gradient(noisy, x, pool)
    assert account.used_bytes == pool.used_bytes == 0


def test_rrelu_that_draws_no_noise_is_held_by_a_pool():
    x = batch(4, 8)
    still = nn.RReLU().eval()
    pool = CheckpointBudget("1MiB", device="cpu", hold="pool")
    assert torch.equal(_noisy_gradient(still, x, pool), _noisy_gradient(still, x, None))


def _noisy_gradient(noisy, x: Tensor, budget: CheckpointBudget | None) -> Tensor:
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    with nullcontext() if budget is None else budget:
        y = noisy(x * 1.0)
    y.sum().backward()
    assert x.grad is not None
    return x.grad
