"""`once`: what is decided in forward is not decided anew in a recompute, and its bytes are counted."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpuckpt import (
    BudgetExceeded,
    CheckpointBudget,
    CheckpointError,
    Keep,
    RecomputeMismatch,
    SavedTensorModified,
    checkpoint,
    fit,
    is_recomputing,
    measure,
    once,
    simulate,
)
from tests.pytorch.steps import Tally, batch, bits, gradients, run

Decide = Callable[..., Any]


def again(fn: Callable[..., Any], *args: Any) -> Any:
    """What `once` is compared with: decided anew in a recompute."""
    return fn(*args)


class Source(Tally):
    """Answers otherwise each time that it is asked, and counts; no fence restores it."""

    def noise(self, like: Tensor) -> Tensor:
        self.count += 1
        return torch.rand(like.shape, generator=torch.Generator().manual_seed(self.count))


class Experts(nn.Module):
    """Each row of x goes through the two of four experts that its scores, of which many tie, choose: (B, D) -> (B, D)."""

    def __init__(self, decide: Decide, source: Source, width: int = 16) -> None:
        super().__init__()
        self.decide, self.source = decide, source
        self.router = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def choose(self, scores: Tensor) -> Tensor:
        return (scores.round() + 0.5 * self.source.noise(scores)).topk(2).indices

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        chosen = self.decide(lambda: self.choose(scores))  # (B, 2)
        weights = scores.gather(-1, chosen).softmax(-1)
        out = torch.stack([expert(x).tanh() for expert in self.experts], 1)  # (B, 4, D)
        return x + (out.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1])) * weights[..., None]).sum(1)


def experts(count: int, decide: Decide = once) -> tuple[nn.Sequential, Source]:
    torch.manual_seed(0)
    source = Source()
    return nn.Sequential(*(Experts(decide, source) for _ in range(count))), source


CHOSEN_BYTES = 8 * 2 * 8  # of a batch of 8 rows, two int64 each
INPUT_BYTES = 8 * 16 * 4


def budgets() -> dict[str, Callable[[], CheckpointBudget | None]]:
    def host() -> CheckpointBudget:
        return CheckpointBudget("1MiB", device="cpu", hold="pool")

    made: dict[str, Callable[[], CheckpointBudget | None]] = {
        "no budget": lambda: None,
        "account": lambda: CheckpointBudget("1MiB", device="cpu"),
        "pool": lambda: CheckpointBudget("1MiB", device="cpu", hold="pool"),
        # Less than the frames recompute, so that the policies are put to use.
        "recompute": lambda: CheckpointBudget(9000, device="cpu", over_cap="recompute"),
        "spill": lambda: CheckpointBudget(7000, device="cpu", over_cap="spill", spill_to=host()),
        "spill from a pool": lambda: CheckpointBudget(
            11000, device="cpu", hold="pool", over_cap="spill", spill_to=host()
        ),
    }
    return made


@pytest.mark.parametrize("way", budgets())
def test_experts_are_those_of_forward(way: str) -> None:
    model, source = experts(6)
    expected = gradients(model, lambda: run(model, batch()))
    assert source.count == 6
    source.count = 0
    budget = budgets()[way]()
    assert gradients(model, lambda: run(model, batch(), lambda *a: checkpoint(*a, budget=budget))) == expected
    assert source.count == 6
    if budget is not None:
        assert budget.used_bytes == 0

    model, source = experts(6, again)  # without it backward is that of other experts
    assert gradients(model, lambda: run(model, batch(), checkpoint))[1] != expected[1]
    assert source.count == 12


def test_a_budget_that_compresses_leaves_choices_as_they_are() -> None:
    """Noise in fp32, which would lose bits, next to saved tensors that do."""

    def work(x: Tensor) -> Tensor:
        noise = once(torch.rand, 64)
        seen.append(noise.clone())
        return (x * noise).exp()

    seen: list[Tensor] = []
    budget = CheckpointBudget(1000, device="cpu", over_cap="compress", storage_dtype="float16")
    x = torch.linspace(0, 1, 64, requires_grad=True)
    with budget:
        y = checkpoint(work, x)
        others = [(torch.rand(64, requires_grad=True) + i).sin() for i in range(3)]
    assert budget.used_bytes == 256 + 128 + 2 * 256  # the oldest that may be
    sum(others).sum().backward()
    y.sum().backward()
    assert torch.equal(*seen)
    del y, others
    assert budget.used_bytes == 0


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_what_is_held_is_the_input_and_the_choice(hold: str) -> None:
    model, _ = experts(1)
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    y = checkpoint(model[0], batch(), budget=budget)
    assert budget.used_bytes == INPUT_BYTES + CHOSEN_BYTES
    y.sum().backward()
    assert budget.used_bytes == 0


def test_a_choice_that_does_not_fit_changes_nothing() -> None:
    model, _ = experts(1)
    budget = CheckpointBudget(INPUT_BYTES + CHOSEN_BYTES - 1, device="cpu")
    with pytest.raises(BudgetExceeded):
        checkpoint(model[0], batch(), budget=budget)
    assert budget.used_bytes == 0


def test_frames_within_frames() -> None:
    """A choice made three frames deep is held once, and every recompute of any of the frames is given it."""
    model, source = experts(4)
    expected = gradients(model, lambda: run(model, batch()))
    source.count = 0
    budget = CheckpointBudget("1MiB", device="cpu")

    def all_of_it(x: Tensor) -> Tensor:
        return checkpoint(lambda x: checkpoint(model[3], half(x)), x)

    def half(x: Tensor) -> Tensor:
        return checkpoint(lambda x: checkpoint(model[2], checkpoint(model[1], model[0](x))), x)

    held = []

    def loss() -> Tensor:
        y = checkpoint(all_of_it, batch(), budget=budget)
        held.append(budget.used_bytes)
        return y.square().sum()

    assert gradients(model, loss) == expected
    assert held == [INPUT_BYTES + 4 * CHOSEN_BYTES]
    assert source.count == 4
    assert budget.used_bytes == 0


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_a_plan_knows_the_bytes(hold: str) -> None:
    model, source = experts(6)
    expected = gradients(model, lambda: run(model, batch()))
    chain = measure(model, batch())
    everything = simulate(chain, [Keep(stage) for stage in range(len(chain))]).peak_bytes
    fitted = fit(model, batch(), everything, hold=hold)
    smallest_bytes = fitted.plan.certificate.smallest_budget_bytes
    for max_bytes in range(smallest_bytes, everything + 1, max(1, (everything - smallest_bytes) // 8)):
        budget = CheckpointBudget(max_bytes, device="cpu", hold=hold)
        fitted = fit(model, batch(), budget, strict=True)
        source.count = 0
        assert gradients(model, functools.partial(_loss, fitted)) == expected
        assert source.count == 6
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
        assert budget.used_bytes == 0


def _loss(model: Any) -> Tensor:
    return model(batch()).square().sum()


# ---- what can be decided


def by_clock(x: Tensor) -> Tensor:
    return x.exp() * once(time.perf_counter)


def by_counter(x: Tensor) -> Tensor:
    return x.exp() * once(next, COUNTER)


def by_order(x: Tensor) -> Tensor:
    """Of equal keys, whichever comes first."""
    noise = SOURCE.noise
    return x.exp()[once(lambda: (x.detach().round() + 0.1 * noise(x)).argsort())] * x


def by_mask(x: Tensor) -> Tensor:
    return torch.where(once(lambda: SOURCE.noise(x) < 0.5), x.exp(), x.sin())


def by_structure(x: Tensor) -> Tensor:
    """Several tensors and plain values in containers."""
    made = once(lambda: {"scale": (SOURCE.noise(x), 3), "shift": [SOURCE.noise(x).double()], "none": None})
    assert made["none"] is None
    return (x * made["scale"][0]).exp() * made["scale"][1] + made["shift"][0]


def by_slice(x: Tensor) -> Tensor:
    """A view, and the same tensor twice."""
    a, b = once(lambda: (noise := SOURCE.noise(torch.empty(2, x.numel())), noise[1]))
    return (x * a[0]).exp() * b


def by_branch(x: Tensor) -> Tensor:
    return x.exp() if once(lambda: SOURCE.noise(x).sum().item() > x.numel() / 2) else x.sin().cos()


SOURCE = Source()
COUNTER = iter(range(1, 1000))
WAYS = [by_clock, by_counter, by_order, by_mask, by_structure, by_slice, by_branch]


@pytest.mark.parametrize("work", WAYS)
@pytest.mark.parametrize("times", [1, 2])
def test_what_can_be_decided(work: Callable[[Tensor], Tensor], times: int) -> None:
    """A recompute saves what forward saved, byte for byte, also the second time and for second derivatives."""
    x = torch.linspace(-1, 2, 12, requires_grad=True)
    y = checkpoint(work, x, verify="bitwise")
    for _ in range(times):
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_derivatives_inside_of_the_work(where: str) -> None:
    """Forces: the work differentiates through what was decided, in forward and in the recompute."""

    def energy(x: Tensor) -> Tensor:
        return (x * once(lambda: source.noise(x))).exp().square()

    def work(x: Tensor) -> Tensor:
        call = functools.partial(checkpoint, energy) if where == "inside" else energy
        (force,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        return force.sin() * energy(x)

    def gradient(call: Callable[..., Tensor]) -> list[bytes | None]:
        source.count = 0
        x = torch.linspace(0, 1, 9, requires_grad=True)
        return bits(torch.autograd.grad(call(work, x).sum(), x))

    source = Source()
    assert gradient(checkpoint) == gradient(again)
    assert source.count == 2


@pytest.mark.parametrize("draw", [torch.rand, lambda n: random.random(), lambda n: np.random.rand(n)[0]])
def test_numbers_drawn_once_count_as_drawn(draw: Callable[[int], Any]) -> None:
    """What comes after draws the same numbers, though in the recompute nothing was drawn before."""

    def work(x: Tensor) -> Tensor:
        x = x * once(draw, 12)
        return torch.nn.functional.dropout(x * random.random() + float(np.random.rand()), 0.5).exp()

    def gradient(call: Callable[..., Tensor]) -> tuple[Any, ...]:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        x = torch.linspace(0, 1, 12, requires_grad=True)
        y = call(work, x)
        after = random.random(), np.random.rand(), torch.rand(3)
        found = bits([y, *torch.autograd.grad(y.sum(), x)])
        return (*found, after[:2], bits([after[2], torch.rand(3)]), random.random())

    for _ in range(3):  # code that was not seen to draw is watched only at first
        assert gradient(checkpoint) == gradient(again)


def test_effects_happen_once() -> None:
    said: list[float] = []

    def work(x: Tensor) -> Tensor:
        y = x.exp()
        once(lambda: said.append(y.detach().sum().item()))
        return y.sin()

    x = torch.zeros(3, requires_grad=True)
    checkpoint(lambda x: checkpoint(work, x), x).sum().backward()
    work(x)
    with torch.no_grad():
        checkpoint(work, x)
    assert said == [3.0, 3.0, 3.0]


def test_once_within_once() -> None:
    """The inner call is part of the outer one, which does not run again."""

    def work(x: Tensor) -> Tensor:
        scale = once(lambda: once(SOURCE.noise, x.detach()) + 1)
        return (x * scale).exp() * once(SOURCE.noise, x.detach())

    x = torch.linspace(0, 1, 4, requires_grad=True)
    checkpoint(work, x, verify="bitwise").sum().backward()


def test_work_that_knows_that_it_runs_again() -> None:
    seen: list[bool] = []

    def work(x: Tensor) -> Tensor:
        seen.append(is_recomputing())
        once(lambda: seen.append(is_recomputing()))
        return x.exp()

    x = torch.zeros(3, requires_grad=True)
    work(x)
    with torch.no_grad():
        checkpoint(work, x)
    y = checkpoint(work, x)
    assert seen == [False] * 6
    backward = threading.Thread(target=y.sum().backward)
    backward.start()
    backward.join()
    assert seen == [*[False] * 6, True]
    assert not is_recomputing()


def test_no_frame_is_left_open_by_an_error() -> None:
    def work(x: Tensor) -> Tensor:
        once(lambda: 1 / 0)
        return x

    with pytest.raises(ZeroDivisionError):
        checkpoint(work, torch.zeros(3, requires_grad=True))
    assert once(lambda: 1) == 1
    assert not is_recomputing()


# ---- what is refused


@pytest.mark.parametrize("call", [again, checkpoint], ids=["plain", "checkpointed"])
def test_gradients_do_not_go_through_it(call: Callable[..., Any]) -> None:
    x = torch.linspace(0, 1, 4, requires_grad=True)
    with pytest.raises(TypeError, match=r"requires a gradient.*scores\.gather"):
        call(lambda x: once(lambda: x.topk(2))[0].exp(), x)
    with pytest.raises(TypeError, match="something to call"):
        call(lambda x: once(x.topk(2).indices), x)


def test_what_it_leaves_elsewhere_has_no_backward() -> None:
    left: list[Tensor] = []

    def work(x: Tensor) -> Tensor:
        once(lambda: left.append(x.exp().sum()))
        return x.sin()

    checkpoint(work, torch.zeros(3, requires_grad=True))
    with pytest.raises(CheckpointError, match="made inside once"):
        left[0].backward()


def test_a_derivative_inside_of_it() -> None:
    def work(x: Tensor) -> Tensor:
        def slope() -> Tensor:
            at = x.detach().requires_grad_()
            return torch.autograd.grad(at.exp().sum(), at)[0]

        return x * once(slope)

    x = torch.zeros(3, requires_grad=True)
    checkpoint(work, x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


def test_a_choice_that_is_changed_in_place() -> None:
    def work(x: Tensor) -> Tensor:
        return x.exp() * once(lambda: torch.ones(3)).add_(1)

    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(SavedTensorModified):
        checkpoint(work, x).sum().backward()
    y = checkpoint(work, x, budget=CheckpointBudget("1MiB", device="cpu", hold="pool"))  # holds a copy
    y.sum().backward(retain_graph=True)
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    with pytest.raises(SavedTensorModified):  # which the recompute has changed
        y.sum().backward()


@pytest.mark.parametrize("first", [True, False])
def test_other_calls_than_forward_made(first: bool) -> None:
    def work(x: Tensor) -> Tensor:
        if is_recomputing():
            scale = once(torch.tensor, 2.0) if first else once(lambda: 1.0) * once(lambda: 2.0)
        else:
            scale = once(lambda: 2.0)
        return x.exp() * scale

    y = checkpoint(work, torch.zeros(3, requires_grad=True))
    with pytest.raises(RecomputeMismatch, match="once"):
        y.sum().backward()


@pytest.mark.parametrize("call", [again, checkpoint], ids=["plain", "checkpointed"])
def test_inside_of_a_transform(call: Callable[..., Any]) -> None:
    def work(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: row * once(lambda: row.detach().argmax()))(x)

    refused = pytest.raises(NotImplementedError, match="inside a transform") if call is checkpoint else nullcontext()
    with refused:
        call(work, torch.ones(3, 3, requires_grad=True))
