"""Training a 12-block transformer under a plan: the certified peak is exact, and a step that fails leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpuckpt
from gpuckpt import BudgetExceeded, CheckpointBudget
from gpuckpt.cli.transformer import Config, Transformer
from gpuckpt.memory.pools.host import aligned_buffer
from gpuckpt.pytorch.link_speed import Link
from tests.pytorch.steps import HOLDS, batch, bits, blocks, run

both = pytest.mark.parametrize("hold", HOLDS)


def transformer(activation: str = "gelu") -> Transformer:
    """The same 12 blocks every time."""
    torch.manual_seed(0)
    return Transformer(Config(layers=12, width=8, heads=2, context=8, activation=activation))


def tokens() -> tuple[Tensor, Tensor]:
    data = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    return data[:, :-1].contiguous(), data[:, 1:].contiguous()


def step(model: nn.Module, budget: CheckpointBudget | None = None) -> list[bytes | None]:
    """One training step, its forward inside `with budget:` if given; the bits of the loss and of all gradients."""
    model.zero_grad(set_to_none=True)
    with nullcontext() if budget is None else budget:
        loss = model(*tokens()) if isinstance(model, Transformer) else run(model, batch())
    loss.backward()
    return bits([loss, *(p.grad for p in model.parameters())])


def plain_peak(model: nn.Module) -> int:
    budget = CheckpointBudget("1GiB", device="cpu")
    step(model, budget)
    return budget.peak_bytes


@both
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_certified_peak_passes_and_one_byte_less_is_refused(hold, activation):
    model = transformer(activation)
    undisturbed = step(model)
    budget = CheckpointBudget(int(0.4 * plain_peak(model)), device="cpu", hold=hold)
    fitted = gpuckpt.fit(model, tokens(), budget, repeats=1)
    promised = fitted.plan.certificate.peak_bytes
    assert promised <= budget.max_bytes
    assert step(model) == undisturbed
    assert (budget.peak_bytes, budget.used_bytes) == (promised, 0)

    fitted._maker.budget = CheckpointBudget(promised, device="cpu", hold=hold)
    assert step(model) == undisturbed
    assert (fitted.budget.peak_bytes, fitted.budget.used_bytes) == (promised, 0)

    fitted._maker.budget = CheckpointBudget(promised - 1, device="cpu", hold=hold)
    with pytest.raises(BudgetExceeded):
        step(model)
    assert fitted.budget.used_bytes == 0


@both
def test_a_budget_one_byte_under_the_smallest_is_refused_before_the_first_step(hold):
    model = transformer()
    undisturbed = step(model)
    fitted = gpuckpt.fit(model, tokens(), CheckpointBudget("1GiB", device="cpu", hold=hold), repeats=1)
    smallest = fitted.plan.certificate.smallest_budget_bytes
    fitted.unfit()
    with pytest.raises(BudgetExceeded, match=str(smallest)):
        gpuckpt.fit(model, tokens(), CheckpointBudget(smallest - 1, device="cpu", hold=hold), repeats=1)
    budget = CheckpointBudget(smallest, device="cpu", hold=hold)
    gpuckpt.fit(model, tokens(), budget, repeats=1)
    assert step(model) == undisturbed
    assert (budget.peak_bytes, budget.used_bytes) == (smallest, 0)


# ---- faults


class Faults:
    """Fails request number `at` (0: the next one); counts them."""

    def __init__(self) -> None:
        self.seen = 0
        self.at: int | None = None
        self.kind: type[BaseException] = BudgetExceeded

    def arm(self, at: int | None) -> None:
        self.seen, self.at = 0, at
        # Running out, the machine itself running out, and Ctrl-C, in turn.
        self.kind = (BudgetExceeded, MemoryError, KeyboardInterrupt)[(at or 0) % 3]

    def pass_by(self, nbytes: int) -> None:
        self.seen += 1
        if self.seen - 1 == self.at:
            raise self.kind(nbytes, 0) if self.kind is BudgetExceeded else self.kind()


class FaultyBudget(CheckpointBudget):
    """A budget whose requests fail where `faults` says so."""

    faults: Faults

    def charge(self, nbytes, what="charge"):
        self.faults.pass_by(nbytes)
        return super().charge(nbytes, what)

    def take(self, nbytes, what):
        self.faults.pass_by(nbytes)
        return super().take(nbytes, what)


def faulty(size: int | str, faults: Faults, **options) -> FaultyBudget:
    budget = FaultyBudget(size, device="cpu", **options)
    budget.faults = faults
    return budget


def books(*budgets: CheckpointBudget) -> list[tuple[int, int, int]]:
    """Bytes held, admitted but not placed, and live in the pool."""
    out = []
    for budget in budgets:
        live = 0 if budget._pool is None else budget._pool.live_bytes
        out.append((budget.used_bytes, budget.snapshot().pending_bytes, live))
    return out


def fail_every_request(
    faults: Faults,
    take_step: Callable[[], object],
    *budgets: CheckpointBudget,
    check_every: int = 1,
    made_up_for: bool = False,
) -> int:
    """Let every request of a step fail, one after another; returns how many there are.

    After each failure the books are as before the step; after every `check_every`-th one a step is taken, which gives the
    gradients of an undisturbed one. With `made_up_for` a policy may find another way, and then the gradients are right.
    """
    before = books(*budgets)
    faults.arm(None)
    undisturbed = take_step()
    requests = faults.seen
    survived = 0
    for at in range(requests):
        faults.arm(at)
        failure = _failure(take_step, undisturbed)
        survived += failure is None
        assert failure in (faults.kind, None)
        del failure
        assert books(*budgets) == before, f"after failure {at}"
        if at % check_every == 0:
            faults.arm(None)
            assert take_step() == undisturbed, f"after failure {at}"
            assert books(*budgets) == before
    assert made_up_for or not survived
    return requests


def _failure(take_step: Callable[[], object], undisturbed: object) -> type[BaseException] | None:
    try:
        result = take_step()
    except (MemoryError, KeyboardInterrupt) as error:
        return type(error)
    assert result == undisturbed
    return None


@both
def test_every_request_of_a_planned_step_fails_once(hold):
    model, faults = transformer(), Faults()
    budget = faulty(int(0.4 * plain_peak(model)), faults, hold=hold)
    gpuckpt.fit(model, tokens(), budget, repeats=1)
    requests = fail_every_request(faults, lambda: step(model), budget, check_every=5)
    assert requests > 12 * 10
    print(f"{requests} faults injected in a planned step under {hold}, 0 violations")


@both
def test_every_request_of_a_step_that_spills_as_planned_fails_once(hold, monkeypatch):
    monkeypatch.setattr("gpuckpt.pytorch.plan_maker.measure_link", lambda *_: Link(1e12, 0.0))
    model, faults = transformer(), Faults()
    host = faulty("1GiB", faults, hold="pool")
    budget = faulty(int(0.5 * plain_peak(model)), faults, hold=hold)
    fitted = gpuckpt.fit(model, tokens(), budget, repeats=1, host_budget=host)
    assert [stage.fate for stage in fitted.report().stages].count("spilled") > 3
    # What is asked for ahead of time and not had is asked for again when backward needs it.
    requests = fail_every_request(faults, lambda: step(model), budget, host, check_every=20, made_up_for=True)
    assert host.peak_bytes == fitted.plan.certificate.host_peak_bytes
    assert requests > 12 * 10
    print(f"{requests} faults injected in a step that spills as planned under {hold}, 0 violations")


@both
def test_every_request_of_a_spilling_step_fails_once(hold):
    model, faults = blocks(12), Faults()
    host = faulty("1GiB", faults, hold="pool")
    budget = faulty(int(0.6 * plain_peak(model)), faults, hold=hold, over_cap=["spill"], spill_to=host)
    requests = fail_every_request(faults, lambda: step(model, budget), budget, host, made_up_for=True)
    assert host.peak_bytes > 0
    print(f"{requests} faults injected in a spilling step under {hold}, 0 violations")


@both
def test_every_request_of_a_compressing_step_fails_once(hold):
    model, faults = blocks(12), Faults()
    options = {"over_cap": ["compress"], "storage_dtype": "float16"}
    budget = faulty(int(0.7 * plain_peak(model)), faults, hold=hold, **options)
    requests = fail_every_request(faults, lambda: step(model, budget), budget)
    assert any(event.kind == "compress" for event in budget.events())
    print(f"{requests} faults injected in a compressing step under {hold}, 0 violations")


@both
def test_every_request_of_a_recomputing_step_fails_once(hold):
    model, faults = blocks(12), Faults()

    def everything(x: Tensor) -> Tensor:
        for block in model:
            x = block(x)
        return x

    def take_step(budget: CheckpointBudget) -> list[bytes | None]:
        model.zero_grad(set_to_none=True)
        loss = gpuckpt.checkpoint(everything, batch(), budget=budget).square().sum()
        loss.backward()
        return bits([loss, *(p.grad for p in model.parameters())])

    roomy = CheckpointBudget("1GiB", device="cpu")
    take_step(roomy)
    budget = faulty(int(0.5 * roomy.peak_bytes), faults, hold=hold, over_cap=["recompute"])
    requests = fail_every_request(faults, lambda: take_step(budget), budget, made_up_for=True, check_every=3)
    assert any(event.kind == "recompute" for event in budget.events())
    print(f"{requests} faults injected in a recomputing step under {hold}, 0 violations")


def test_every_allocation_behind_the_pool_fails_once():
    """Of the host pool's own buffers, in a step that compresses. Nothing is cached: every budget is new."""
    model, faults = blocks(12), Faults()
    cap = int(0.7 * plain_peak(model))
    latest: list[CheckpointBudget] = []

    def allocate(nbytes: int) -> np.ndarray:
        faults.pass_by(nbytes)
        return aligned_buffer(nbytes)

    def take_step() -> list[bytes | None]:
        budget = CheckpointBudget(
            cap, device="cpu", hold="pool", over_cap=["compress"], storage_dtype="float16", allocator=allocate
        )
        latest[:] = [budget]
        return step(model, budget)

    undisturbed = take_step()
    requests = faults.seen
    assert requests > 12 * 5
    for at in range(requests):
        faults.arm(at)
        assert _failure(take_step, undisturbed) in (
            faults.kind,
            None,
        )  # a buffer for compressed bytes can be done without
        assert books(*latest) == [(0, 0, 0)], f"after failure {at}"
    faults.arm(None)
    assert take_step() == undisturbed
    print(f"{requests} allocation faults injected, 0 violations")
