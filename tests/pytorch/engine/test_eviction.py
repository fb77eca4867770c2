"""What a full budget does with saved tensors: recompute, spill, compress, a callable, and at last a refusal."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import gpuckpt
from gpuckpt import BudgetExceeded, CheckpointBudget, SavedTensorModified
from gpuckpt.pytorch.engine.saved_storage import Geometry, MovableStorage
from gpuckpt.pytorch.engine.storage_index import index_of
from tests.pytorch.steps import HOLDS, batch, bits, blocks, gradients, run

both = pytest.mark.parametrize("hold", HOLDS)


def peak_of(step) -> int:
    """What a step holds at most."""
    budget = CheckpointBudget("64MiB", device="cpu")
    step(budget)
    return budget.peak_bytes


def policy_budget(hold: str, size: int, *policies, host: int | str = "64MiB", **options) -> CheckpointBudget:
    spill_to = CheckpointBudget(host, device="cpu", hold="pool") if "spill" in policies else None
    return CheckpointBudget(size, device="cpu", hold=hold, over_cap=policies, spill_to=spill_to, **options)


def plain_step(model, x, budget):
    with budget:
        loss = run(model, x)
    loss.backward()
    return loss


# ---- spill


@both
@pytest.mark.parametrize("share", [0.15, 0.3, 0.6, 0.95])
def test_spilled_tensors_are_back_in_time_and_bit_for_bit(hold, share):
    model, x = blocks(6), batch(64)
    plain = gradients(model, lambda: run(model, x))
    peak = peak_of(lambda budget: plain_step(model, x, budget))
    budget = policy_budget(hold, int(share * peak), "spill")

    def held() -> Tensor:
        with budget:
            return run(model, x)

    assert gradients(model, held) == plain
    assert budget.peak_bytes <= budget.max_bytes
    assert budget.spill_to.peak_bytes > 0
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (0, 0)
    assert any(event.kind == "spill" for event in budget.events())


@both
def test_the_oldest_are_spilled_first_and_come_back_once(hold):
    budget = policy_budget(hold, 1000, "spill")
    x = torch.ones(100, requires_grad=True)
    with budget:
        h = x * 2
        graphs = []
        for _ in range(4):
            h = h * 1.5
            graphs.append(h.sin())
        h = None
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (800, 800)
    oldest = graphs[0]
    del graphs[2:]
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (0, 800)
    oldest.sum().backward(retain_graph=True)
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (400, 400)
    del oldest, graphs
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (0, 0)


@both
def test_views_of_one_spilled_storage_share_it_again(hold):
    budget = policy_budget(hold, 500, "spill")
    x = torch.arange(100.0, requires_grad=True)
    with budget:
        base = (x * 2).reshape(10, 10)
        first, second = base.t().sin(), base[3:].cos()
        loss = first.sum() + second.sum()
        del first, second, base
        other = (x * 3).exp().detach() + (x * 3).sin()  # takes the room of both
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (400, 400)
    del other
    loss.backward(retain_graph=True)
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (400, 0)
    y = x.detach().clone().requires_grad_()
    (y * 2).reshape(10, 10).t().sin().sum().add((y * 2).reshape(10, 10)[3:].cos().sum()).backward()
    assert torch.equal(x.grad, y.grad)
    with budget:
        third = loss * 1
    del loss, third
    assert budget.used_bytes == 0


@both
def test_what_somebody_else_looks_at_is_not_spilled(hold):
    """Moving it would free nothing."""
    budget = policy_budget(hold, 500, "spill")
    x = torch.ones(100, requires_grad=True)
    with budget:
        h = x * 2
        y = h.sin()
        loaded = y.grad_fn._saved_self if hold == "pool" else h
        with pytest.raises(BudgetExceeded):
            (x * 3).sin()
        assert budget.spill_to.used_bytes == 0
        del h, loaded
        z = (x * 3).sin()
    assert budget.spill_to.used_bytes == 400
    del y, z


def test_a_tensor_that_was_changed_is_not_spilled_away_from_its_error():
    budget = policy_budget("account", 500, "spill")
    x = torch.ones(100, requires_grad=True)
    with budget:
        h = x * 2
        y = h.sin()
        h.add_(1)
        del h
        with pytest.raises(BudgetExceeded):
            (x * 3).sin()
    with pytest.raises(SavedTensorModified):
        y.sum().backward()


@both
def test_a_full_spill_budget_ends_in_a_refusal_that_says_what_would_do(hold):
    budget = policy_budget(hold, 1000, "spill", host=400)
    x = torch.ones(100, requires_grad=True)
    kept = []
    with budget:
        for factor in (2, 3, 4):
            kept.append((x * factor).sin())
        with pytest.raises(BudgetExceeded, match=r"200 bytes short.*smallest budget that would have done is 1200"):
            (x * 5).sin()
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (800, 400)
    torch.autograd.backward([y.sum() for y in kept])
    del kept
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (0, 0)


# ---- compress


@both
def test_compressed_tensors_stay_within_the_rounding_of_their_dtype(hold):
    model, x = blocks(6), batch(64)
    gradients(model, lambda: run(model, x))
    exact = [p.grad.clone() for p in model.parameters()]
    peak = peak_of(lambda budget: plain_step(model, x, budget))
    budget = policy_budget(hold, int(0.6 * peak), "compress", storage_dtype="float16")

    def held() -> Tensor:
        with budget:
            return run(model, x)

    gradients(model, held)
    for p, grad in zip(model.parameters(), exact, strict=True):
        # Values of about one, rounded to 11 bits.
        assert (p.grad - grad).abs().max() <= 4e-3 * grad.abs().max()
    assert any(event.kind == "compress" for event in budget.events())
    assert budget.peak_bytes <= budget.max_bytes
    assert budget.used_bytes == 0


@both
def test_one_compressed_tensor_is_its_own_rounding(hold):
    budget = policy_budget(hold, 600, "compress", storage_dtype="bfloat16")
    x = torch.linspace(-3, 3, 100).requires_grad_()
    with budget:
        y = (x * 1).square()
        assert budget.used_bytes == 400
        z = (x * 1).square()
    assert budget.used_bytes == 600
    y.sum().backward()
    assert torch.equal(x.grad, 2 * x.detach().bfloat16().float())
    del y, z
    assert budget.used_bytes == 0


@both
def test_what_compressing_would_spoil_stays_as_it_is(hold):
    budget = policy_budget(hold, 900, "compress", storage_dtype="float16")
    x = torch.ones(100, requires_grad=True)
    with budget:
        too_large = (x * 1e6).sin()  # 1e6 is no float16
        numbers = torch.arange(50)
        picked = x[numbers]
        del numbers
        with pytest.raises(BudgetExceeded):
            (x * 2).sin()
    (too_large.sum() + picked.sum()).backward()
    expected = torch.full((100,), 1e6) * torch.tensor(1e6).cos()
    expected[:50] += 1
    assert torch.equal(x.grad, expected)


@both
@pytest.mark.parametrize("how", ["compress", "spill"])
def test_what_a_running_backward_has_loaded_stays_where_it_is(hold, how):
    """Nothing would be freed: the pool would hold more than the ledger says, and more than the cap."""
    budget = policy_budget(hold, 6000, how, storage_dtype="float16")
    holder = index_of(budget)
    held = holder.hold(torch.full((1000,), 2.0))
    loaded = [held.load()]  # what autograd has while the node's backward runs
    with pytest.raises(BudgetExceeded):
        holder.hold(torch.full((1000,), 3.0))
    view = loaded.pop()[:10]
    with pytest.raises(BudgetExceeded):
        holder.hold(torch.full((1000,), 3.0))
    in_pool = 4000 if budget._pool is None else budget._pool.live_bytes
    assert (budget.used_bytes, in_pool) == (4000, 4000)
    del view
    other = holder.hold(torch.full((1000,), 3.0))
    assert budget.used_bytes <= 6000
    assert budget._pool is None or budget._pool.live_bytes == budget.used_bytes
    assert torch.equal(held.load(), torch.full((1000,), 2.0))
    del other


def test_a_backward_that_loads_while_a_tensor_is_compressed_keeps_the_block(monkeypatch):
    budget = policy_budget("pool", 6000, "compress", storage_dtype="float16")
    holder = index_of(budget)
    held, loaded = holder.hold(torch.full((1000,), 2.0)), []
    leave = MovableStorage._leave

    def load_first(holding: MovableStorage) -> bool:
        view = held.load().view(2, 500) if not loaded else None
        left = leave(holding)
        if view is not None:  # as if another thread had loaded it after the last look
            held.tensor, held.geometry = None, Geometry(view.view(1000))
            holding.flat = None
            loaded.append(view)
            left = True
        return left

    monkeypatch.setattr(MovableStorage, "_leave", load_first)
    with pytest.raises(BudgetExceeded):
        holder.hold(torch.full((1000,), 3.0))
    assert (budget.used_bytes, budget._pool.live_bytes) == (4000, 4000)
    assert torch.equal(held.load(), torch.full((1000,), 2.0))
    assert torch.equal(loaded[0].view(1000), torch.full((1000,), 2.0))


@both
def test_compressed_first_and_spilled_when_that_was_not_enough(hold):
    budget = policy_budget(hold, 600, "compress", "spill", storage_dtype="float16")
    x = torch.linspace(0, 1, 100).requires_grad_()
    with budget:
        graphs = [(x * 1).square() for _ in range(4)]
    assert budget.used_bytes <= 600
    assert budget.spill_to.used_bytes > 0
    kinds = [event.kind for event in budget.events()]
    assert kinds.index("compress") < kinds.index("spill")
    for graph in graphs[:3]:
        x.grad = None
        graph.sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=2**-11, atol=0)
    del graphs, graph
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (0, 0)


# ---- recompute


def one_frame(model, x, budget):
    def everything(x):
        for block in model:
            x = block(x)
        return x

    with budget:
        loss = gpuckpt.checkpoint(everything, x).square().sum()
    loss.backward()
    return loss


@both
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95])
def test_a_frame_gets_by_with_less_than_all_it_saves(hold, share):
    model, x = blocks(6, dropout=0.2), batch(32)
    plain = gradients(model, lambda: run(model, x))
    peak = peak_of(lambda budget: one_frame(model, x, budget))
    refusing = CheckpointBudget(int(share * peak), device="cpu", hold=hold)
    with pytest.raises(BudgetExceeded):
        one_frame(model, x, refusing)
    assert refusing.used_bytes == 0

    budget = policy_budget(hold, int(share * peak), "recompute")
    for block in model:
        block.tally.count = 0
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = one_frame(model, x, budget)
    assert (bits([loss]), bits(p.grad for p in model.parameters())) == plain
    assert budget.peak_bytes <= budget.max_bytes
    assert model[0].tally.count > 2, "more work for fewer bytes"
    del loss
    assert budget.used_bytes == 0


@both
def test_nested_frames_drop_what_outer_ones_can_bring_again(hold):
    model, x = blocks(8), batch(32)
    plain = gradients(model, lambda: run(model, x))

    def nested(budget):
        def halves(x, part):
            for block in part:
                x = gpuckpt.checkpoint(block, x)
            return x

        with budget:
            x1 = gpuckpt.checkpoint(halves, x, model[:4])
            loss = gpuckpt.checkpoint(halves, x1, model[4:]).square().sum()
        loss.backward()
        return loss

    peak = peak_of(nested)
    budget = policy_budget(hold, int(0.8 * peak), "recompute")
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = nested(budget)
    assert (bits([loss]), bits(p.grad for p in model.parameters())) == plain
    assert budget.peak_bytes <= budget.max_bytes
    del loss
    assert budget.used_bytes == 0


@both
def test_all_policies_together_under_a_small_cap(hold):
    model, x = blocks(6), batch(32)
    plain = gradients(model, lambda: run(model, x))

    def mixed(budget):
        with budget:
            h = x
            for block in model[:3]:
                h = block(h)
            for block in model[3:]:
                h = gpuckpt.checkpoint(block, h)
            loss = h.square().sum()
        loss.backward()
        return loss

    budget = policy_budget(hold, int(0.25 * peak_of(mixed)), "recompute", "spill")
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = mixed(budget)
    assert (bits([loss]), bits(p.grad for p in model.parameters())) == plain
    del loss
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (0, 0)


# ---- a callable, order, threads


@both
def test_a_callable_frees_what_it_likes(hold):
    x = torch.ones(100, requires_grad=True)
    cache: list[Tensor] = []
    asked: list[tuple[int, str]] = []

    def drop_cache(budget, need_bytes, what):
        asked.append((need_bytes, what))
        cache.clear()
        return True

    budget = policy_budget(hold, 500, drop_cache)
    with budget:
        cache.append((x * 2).sin())
        y = (x * 3).sin()
    assert asked == [(400, "saved tensor")]
    assert not cache
    del y
    assert budget.used_bytes == 0


@both
def test_raise_ends_the_list(hold):
    asked: list[int] = []
    budget = policy_budget(hold, 500, "raise", lambda budget, need, what: asked.append(need))
    x = torch.ones(100, requires_grad=True)
    with budget:
        y = (x * 2).sin()
        with pytest.raises(BudgetExceeded):
            (x * 3).sin()
    assert not asked
    del y


@both
def test_four_threads_under_one_spilling_budget(hold):
    """Each trains its own model; all evict one another's tensors."""
    models = [blocks(4) for _ in range(4)]
    x = batch(64)
    expected = gradients(models[0], lambda: run(models[0], x))[1]
    peak = peak_of(lambda budget: plain_step(models[0], x, budget))
    budget = policy_budget(hold, int(1.5 * peak), "spill")
    results: list[object] = [None] * 4

    def work(index: int) -> None:
        model = models[index]
        try:
            for _ in range(5):
                model.zero_grad(set_to_none=True)
                with budget:
                    loss = run(model, x)
                loss.backward()
                del loss
                results[index] = bits(p.grad for p in model.parameters())
        except BaseException as error:  # handed to the test's own thread
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == [expected] * 4
    assert budget.peak_bytes <= budget.max_bytes
    assert (budget.used_bytes, budget.spill_to.used_bytes) == (0, 0)
