"""`fit(scope="device")`: budgets for the whole step against torch's own count of what the allocator gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import BudgetExceeded, CheckpointBudget, StepLedger, fit, unfit
from gpuckpt.errors import PromiseBroken
from gpuckpt.pytorch.fitted import Fitted
from gpuckpt.pytorch.whole_device.optimizer_step import dry_step
from tests.pytorch.steps import bits
from tests.pytorch.whole_device.test_step_ledger import profiled_peak_bytes

WIDTH, WORDS = 24, 200


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Words(nn.Module):
    """A language model that returns its loss; its head stands before its embedding in the list of parameters."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.embedding = nn.Linear(WIDTH, WORDS, bias=False), nn.Embedding(WORDS, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(5)), nn.LayerNorm(WIDTH)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor, following: Tensor) -> Tensor:
        x = self.embedding(words)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), following.flatten())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


def batch(samples: int) -> tuple[Tensor, Tensor]:
    words = torch.randint(0, WORDS, (samples, 9), generator=torch.Generator().manual_seed(samples))
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


class Training:
    """Steps of a model: one optimizer, or one for each parameter which steps in backward."""

    def __init__(
        self, kind: str, *, tied: bool = False, samples: int = 16, accumulated: int = 1, set_to_none: bool = True
    ) -> None:
        self.model, self.inputs = Words(tied), batch(samples)
        self.accumulated, self.set_to_none = accumulated, set_to_none
        if kind == "in-backward":
            each = {parameter: torch.optim.AdamW([parameter]) for parameter in self.model.parameters()}

            def step(parameter: Tensor) -> None:
                each[parameter].step()
                each[parameter].zero_grad()

            for parameter in self.model.parameters():
                parameter.register_post_accumulate_grad_hook(step)
            self.optimizer: Any = list(each.values())
        else:
            self.optimizer = OPTIMIZERS[kind](self.model.parameters())

    def fit(self, budget: Any, **options: Any) -> Fitted:
        return fit(self.model, self.inputs, budget, scope="device", optimizer=self.optimizer, repeats=1, **options)

    def step(self) -> None:
        for _ in range(self.accumulated):
            self.model(*self.inputs).backward()
        if isinstance(self.optimizer, torch.optim.Optimizer):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=self.set_to_none)

    def there_bytes(self) -> int:
        """What is there before a step, counted by hand."""
        each = self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]
        state = [v for one in each for s in one.state.values() for v in s.values() if isinstance(v, Tensor)]
        own = [tensor for p in self.model.parameters() for tensor in (p, p.grad) if tensor is not None]
        return sum(tensor.nbytes for tensor in (*state, *own, *self.inputs))

    def taken_bytes(self) -> int:
        """The most bytes of a step: what is there, and what the allocator gave on top by torch's profiler."""
        there_bytes = self.there_bytes()
        return there_bytes + profiled_peak_bytes(self.step)


def smallest_budget(make: Callable[[], Training]) -> int:
    """The smallest that `fit` takes, as its refusal names it."""
    budget = 1
    for _ in range(3):  # weights and state; inputs; and once it has measured them activations
        try:
            make().fit(budget)
        except BudgetExceeded as refused:
            budget = refused.need
    make().fit(budget)
    return budget


CASES: dict[str, dict[str, Any]] = {
    **{name: {"kind": name} for name in (*OPTIMIZERS, "in-backward")},
    "tied": {"kind": "adamw-fused", "tied": True},
    "tied in-backward": {"kind": "in-backward", "tied": True},
    "accumulated": {"kind": "adamw", "accumulated": 3},
    "set to zero": {"kind": "sgd-momentum", "set_to_none": False},
}


@pytest.mark.parametrize("case", CASES)
def test_a_budget_is_kept_in_every_one_of_50_steps(case: str) -> None:
    def make() -> Training:
        training = Training(**CASES[case])
        if case in ("accumulated", "set to zero"):  # with the gradients that are there then
            training.model(*training.inputs).backward()
        return training

    budget = smallest_budget(make)
    training = make()
    fitted = training.fit(budget)
    assert fitted.plan.certificate.recompute_s > 0
    for number in range(50):
        if number in (0, 1, 49):  # the profiler costs a second
            assert training.taken_bytes() <= budget
        else:
            with StepLedger(training.model, training.optimizer) as ledger:
                training.step()
            assert ledger.peak_total_bytes() <= budget
    assert not fitted.deviations
    assert fitted.budget.used_bytes == 0


@pytest.mark.parametrize("samples", [1, 16])
@pytest.mark.parametrize("kind", [*OPTIMIZERS, "in-backward"])
def test_what_is_promised_is_what_is_taken(kind: str, samples: int) -> None:
    training = Training(kind, samples=samples)
    fitted = training.fit("1GiB")
    for _ in range(2):
        training.step()
    promised, taken = fitted.promised_device_bytes, training.taken_bytes()
    assert taken <= promised <= (1.03 if kind == "in-backward" else 1.005) * taken
    with StepLedger(training.model, training.optimizer):
        training.step()
    assert abs(fitted.measured_device_bytes - taken) <= 128  # scalars that an optimizer makes within operators


def test_gradients_are_those_of_the_plain_run() -> None:
    ours, plain = Training("adamw"), Training("adamw")
    ours.fit(smallest_budget(lambda: Training("adamw")))
    for _ in range(3):
        ours.step()
        plain.step()
    assert bits(list(ours.model.parameters())) == bits(list(plain.model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stepped", [False, True])
def test_state_is_known_before_the_first_step(name: str, stepped: bool) -> None:
    training = Training(name)
    if stepped:
        training.step()
    before = bits([*training.model.parameters()])
    found = dry_step(training.optimizer)
    assert bits([*training.model.parameters()]) == before
    assert bool(training.optimizer.state) is stepped
    training.step()
    tensors = [v for state in training.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert found.state_bytes == sum(tensor.nbytes for tensor in tensors)


def test_gradients_that_come_to_stay_are_planned_for() -> None:
    training = Training("adamw")
    fitted = training.fit("1GiB")
    with StepLedger(training.model, training.optimizer):
        training.step()
    first = fitted.promised_device_bytes
    training.model(*training.inputs).backward()
    training.model(*training.inputs)
    weights = sum(p.nbytes for p in training.model.parameters())
    assert first < fitted.promised_device_bytes <= first + weights
    assert not fitted.deviations


def test_what_was_not_foreseen_is_noted_and_planned_for() -> None:
    """A loss outside of the model keeps bytes that no plan knows of."""
    body = nn.Sequential(*(Block() for _ in range(4)))
    optimizer, x = torch.optim.SGD(body.parameters(), lr=0.1), torch.ones(64, WIDTH)
    fitted = fit(body, x, "1MiB", scope="device", optimizer=optimizer)

    def step() -> None:
        (body(x).repeat(16, 1).exp().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        with StepLedger(body, optimizer) as ledger:
            step()
    noted = [each for each in fitted.deviations if each.of_device]
    assert len(noted) == 1
    assert noted[0].measured_bytes > noted[0].promised_bytes
    assert fitted.measured_device_bytes == ledger.peak_total_bytes() <= fitted.promised_device_bytes
    strict = fit(body, x, "1MiB", scope="device", optimizer=optimizer, strict=True)
    with pytest.raises(PromiseBroken, match="other tensors on the device"), StepLedger(body, optimizer):
        step()
    assert strict.budget.used_bytes == 0


def test_what_cannot_fit_is_refused_with_what_takes_how_much() -> None:
    training = Training("adamw-foreach")
    weights = sum(p.nbytes for p in training.model.parameters())
    with pytest.raises(
        BudgetExceeded, match=r"weights .* KiB, optimizer state .*, gradients .*, optimizer's temp"
    ) as e:
        training.fit(weights - 1)
    assert e.value.available == weights - 1
    assert e.value.need >= 5 * weights  # with two moments, gradients and a square root
    assert unfit(training.model) is training.model  # and untouched: it runs plainly
    training.step()


def test_a_second_micro_batch_that_does_not_fit_is_refused_before_it_runs() -> None:
    training = Training("adamw-fused", samples=64)
    training.fit(smallest_budget(lambda: Training("adamw-fused", samples=64)))
    training.model(*training.inputs).backward()
    before = bits([p.grad for p in training.model.parameters()])
    with pytest.raises(BudgetExceeded, match="of a whole step"):
        training.model(*training.inputs)
    assert bits([p.grad for p in training.model.parameters()]) == before


MODEL = Words()


def wrong() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    own = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    other = torch.optim.SGD(Words().parameters(), lr=0.1)
    device = {"scope": "device", "optimizer": own}
    yield "scope", {"scope": "card"}, ValueError, "scope"
    yield "no optimizer", {"scope": "device"}, TypeError, "expected a torch.optim.Optimizer"
    yield "other", {"scope": "device", "optimizer": other}, ValueError, "none of the parameters of Words"
    yield "saved", {"optimizer": own}, ValueError, 'optimizer= is for scope="device"'
    yield "share", {**device, "budget": "40%"}, TypeError, "expects the bytes of the device"
    yield "object", {**device, "budget": CheckpointBudget(9)}, TypeError, "expects the bytes of the device"
    yield "pool", {**device, "hold": "pool"}, ValueError, 'expected hold="account"'
    lbfgs = torch.optim.LBFGS(MODEL.parameters())
    yield "closure", {"scope": "device", "optimizer": lbfgs}, ValueError, "cannot be told beforehand"


@pytest.mark.parametrize("case", list(wrong()), ids=lambda case: case[0])
def test_mistakes_are_named(case: tuple[str, dict[str, Any], type[Exception], str]) -> None:
    _, options, kind, words = case
    with pytest.raises(kind, match=words):
        fit(MODEL, batch(2), options.pop("budget", "1GiB"), **options)
