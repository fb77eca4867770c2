"""Steps that are not like the one that was measured: other contents, other numbers, a changed model, two forwards at a time."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import BudgetExceeded, Certificate, PromiseBroken, fit
from tests.pytorch.steps import Block, Tally, bits


def model(count: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(16) for _ in range(count)])


def rows(count: int = 8) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(count))


def certificate_of(m: nn.Module) -> Certificate:
    """Of the plan that keeps everything; its smallest budget is every plan's."""
    fitted = fit(m, rows(), "1MiB")
    fitted.unfit()
    return fitted.plan.certificate


def gradients(m: nn.Module, *args: Any, **kwargs: Any) -> list[bytes | None]:
    m.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    out = m(*args, **kwargs)
    loss = out.square().mean()
    loss.backward()
    return bits([loss, *(p.grad for p in m.parameters())])


# ---- other contents


class Sparse(Block):
    """Saves one tensor more where an entry of its input is large: routing, masks and early exits do such things."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out.exp().log() if bool((x.abs() > 4).any()) else out


def test_a_step_that_holds_more_goes_on_under_the_cap_and_is_noted() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(*[Sparse(16) for _ in range(6)])
    plain = copy.deepcopy(ours)
    fitted = fit(ours, rows(), "1MiB")
    large = rows() * 10
    promised = fitted.plan.certificate.peak_bytes
    assert gradients(ours, large) == gradients(plain, large)
    (noted,) = fitted.deviations
    assert noted.promised_bytes == promised < noted.measured_bytes <= fitted.budget.max_bytes
    assert fitted.report().measured_peak_bytes == fitted.measured_peak_bytes == noted.measured_bytes, (
        "told once, and not forgotten"
    )
    assert gradients(ours, large) == gradients(plain, large)  # measured again, with these contents
    assert len(fitted.deviations) == 1
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes > promised
    for _ in range(5):  # and not again and again
        assert gradients(ours, rows()) == gradients(plain, rows())
        assert gradients(ours, large) == gradients(plain, large)
    assert fitted.budget.used_bytes == 0


def test_what_such_a_step_held_is_not_forgotten_when_its_second_output_is_looked_at() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*[Sparse(16) for _ in range(6)])

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.body(x)
            return {"loss": logits.square().mean(), "logits": logits}

    fitted = fit(WithLoss(), rows(), "1MiB")
    fitted(rows() * 10)["loss"].backward()
    (noted,) = fitted.deviations
    assert fitted.report().measured_peak_bytes == fitted.measured_peak_bytes == noted.measured_bytes


def test_room_is_made_for_a_step_that_holds_more_than_the_cap_has() -> None:
    """Frames drop what they recomputed and compute it once more; the next step is measured with these contents."""
    torch.manual_seed(0)
    ours = nn.Sequential(*[Sparse(16) for _ in range(6)])
    plain = copy.deepcopy(ours)
    least = certificate_of(ours).smallest_budget_bytes
    fitted = fit(ours, rows(), least)
    large = rows() * 10
    assert gradients(ours, large) == gradients(plain, large)
    assert fitted.budget.peak_bytes <= least
    assert fitted.budget.used_bytes == 0
    assert len(fitted.deviations) == 1
    assert gradients(ours, rows()) == gradients(plain, rows())


class Gated(Block):
    """Saves much more for large inputs, in forward already where it is kept."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        for _ in range(6 if bool((x.abs() > 12).any()) else 0):
            out = out.exp().log()
        return out


def test_blocks_are_recomputed_once_the_first_ones_hold_more_than_planned() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(*[Gated(16) for _ in range(6)])
    plain = copy.deepcopy(ours)
    fitted = fit(ours, rows(), certificate_of(ours).peak_bytes)
    assert gradients(ours, rows()) == gradients(plain, rows())
    large = rows() * 10
    assert gradients(ours, large) == gradients(plain, large), "kept as planned it would exceed the cap in forward"
    assert fitted.budget.used_bytes == 0
    assert gradients(ours, large) == gradients(plain, large)
    assert fitted.measured_peak_bytes <= fitted.promised_peak_bytes <= fitted.budget.max_bytes


def test_a_step_that_does_not_fit_is_refused_whole_and_measured_again() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(*[Block(16) for _ in range(5)], Gated(16))  # nothing comes after it that could be recomputed
    plain = copy.deepcopy(ours)
    everything = certificate_of(ours).peak_bytes
    fitted = fit(ours, rows(), everything)
    large = rows() * 10
    with pytest.raises(BudgetExceeded):
        gradients(ours, large)
    assert fitted.budget.used_bytes == 0
    assert gradients(ours, large) == gradients(plain, large), "the same batch again is planned for what it holds"
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= everything


def test_strict_makes_it_an_error() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(*[Sparse(16) for _ in range(6)])
    fit(ours, rows(), "1MiB", strict=True)
    with pytest.raises(PromiseBroken):
        gradients(ours, rows() * 10)


# ---- other numbers


class Stepwise(nn.Module):
    """Takes numbers that change from step to step; `depth` decides how much is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = model(6)
        self.runs = Tally()

    def forward(self, x: Tensor, step: int = 0, name: str = "", depth: int = 0, rate: float = 0.0) -> Tensor:
        self.runs.count += 1
        for block in self.blocks:
            x = block(x)
        x = x * (1.0 + rate)
        for _ in range(depth):
            x = x.exp().log()
        return x


def test_a_step_number_is_no_reason_to_plan_again() -> None:
    ours = Stepwise()
    plain = copy.deepcopy(ours)
    fitted = fit(ours, {"x": rows(), "step": 0, "name": "a"}, "1MiB")
    before = ours.runs.count
    for step in range(1, 11):
        call = {"x": rows(), "step": step, "name": f"step {step}", "rate": step / 10}
        assert gradients(ours, **call) == gradients(plain, **call)
        if step == 1:
            before = ours.runs.count  # `rate` was new
    assert ours.runs.count == before + 9, "one forward a step"
    assert len(fitted._maker.plans) <= 2
    assert not fitted.deviations


def test_a_number_that_decides_bytes_is_seen_to() -> None:
    ours = Stepwise()
    plain = copy.deepcopy(ours)
    fitted = fit(ours, {"x": rows(), "depth": 0}, "1MiB")
    for depth in (0, 3, 0, 3, 5, 3):
        call = {"x": rows(), "depth": depth}
        assert gradients(ours, **call) == gradients(plain, **call)
    assert len(fitted.deviations) == 1
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def test_a_step_number_beside_contents_that_decide_bytes_is_not_planned_for_ever() -> None:
    """Contents made a step hold more than promised; the number that is new in each step had no part in it."""

    class ByContents(Stepwise):
        def forward(self, x: Tensor, step: int) -> Tensor:
            return super().forward(x, depth=3 if x[0, 0] > 0 else 0)

    ours = ByContents()
    plain = copy.deepcopy(ours)
    fitted = fit(ours, {"x": -torch.ones(4, 16), "step": 0}, "1MiB", repeats=1)
    for step in range(1, 61):
        call = {"x": -torch.ones(4, 16) if step % 2 else torch.ones(4, 16), "step": step}
        if step == 31:
            before = ours.runs.count
        assert gradients(ours, **call) == gradients(plain, **call)
    assert ours.runs.count == before + 30, "one forward a step"
    assert fitted.deviations
    assert len(fitted._maker._observed) <= 64


def test_a_few_numbers_that_decide_bytes_keep_a_plan_each() -> None:
    ours = Stepwise()
    fitted = fit(ours, {"x": rows(), "depth": 0}, "1MiB", repeats=1)
    draw = random.Random(0)
    for _ in range(60):
        ours(rows(), depth=draw.randrange(24)).sum().backward()
    before = ours.runs.count
    for depth in range(24):
        ours(rows(), depth=depth).sum().backward()
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert ours.runs.count <= before + 24 + 10, "each number that came before is known"


def test_plans_are_not_kept_for_ever() -> None:
    ours = model(3)
    fitted = fit(ours, rows(1), "1MiB", repeats=1)
    for count in range(1, 80):
        fitted.plan_for(rows(count))
    assert len(fitted._maker.plans) == 64


# ---- sizes that were never measured


def sized(count: int, rows: int) -> Tensor:
    return torch.randn(count, rows, 16, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("options", [{}, {"hold": "pool"}, {"host_budget": "1MiB"}], ids=["account", "pool", "host"])
def test_a_new_length_is_planned_without_measuring(options: dict[str, Any]) -> None:
    ours = model(6)
    plain = copy.deepcopy(ours)
    everything = fit(ours, sized(4, 32), "1GiB").plan.certificate.peak_bytes
    fitted = fit(ours, sized(4, 32), everything * 2 // 3, repeats=1, **options)
    for count, length in ((4, 32), (4, 24), (3, 24)):
        assert gradients(ours, sized(count, length)) == gradients(plain, sized(count, length))
    for count, length in ((4, 30), (2, 17), (3, 32), (4, 9), (4, 31)):
        before = ours[0].tally.count
        fitted.plan_for(sized(count, length))
        assert fitted.latest.predicted
        assert ours[0].tally.count == before, "nothing runs"
        assert "not measured" in str(fitted.report())
        assert gradients(ours, sized(count, length)) == gradients(plain, sized(count, length))
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes
        assert fitted.measured_host_peak_bytes == fitted.promised_host_peak_bytes
    assert not fitted.deviations
    assert fitted.budget.used_bytes == 0


class Padded(Block):
    """Works on whole tiles of 16 rows, as some kernels do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 16)))[:, : x.shape[1]]


def test_a_wrong_prediction_is_noted_and_measured() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(*[Padded(16) for _ in range(6)])
    plain = copy.deepcopy(ours)
    fitted = fit(ours, sized(4, 64), "1MiB", repeats=1)
    fitted.plan_for(sized(4, 32))
    for _ in range(2):
        assert gradients(ours, sized(4, 33)) == gradients(plain, sized(4, 33))
    assert len(fitted.deviations) == 1, "33 rows take as much as 48"
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert not fitted.latest.predicted
    assert gradients(ours, sized(4, 50)) == gradients(plain, sized(4, 50))
    assert fitted.latest.predicted, "and now the law is known"
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert len(fitted.deviations) == 1


def test_strict_measures_every_size() -> None:
    fitted = fit(model(3), sized(4, 64), "1MiB", repeats=1, strict=True)
    for length in (32, 48, 16):
        assert not fitted.plan_for(sized(4, length)).predicted


def test_a_length_that_does_not_fit_is_refused_as_it_is_measured() -> None:
    ours = model(6)
    fitted = fit(ours, sized(4, 32), "64KiB", repeats=1)
    fitted.plan_for(sized(4, 16))
    before = ours[0].tally.count
    with pytest.raises(BudgetExceeded) as refused:
        ours(sized(4, 200))
    assert ours[0].tally.count > before
    assert refused.value.available == 64 * 1024
    assert refused.value.need == fit(ours, sized(4, 200), "1GiB").plan.certificate.smallest_budget_bytes
    ours(sized(4, 24)).sum().backward()
    assert fitted.budget.used_bytes == 0


# ---- blocks that are skipped


class LayerDrop(nn.Module):
    """Skips blocks at random, by one generator or another."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.blocks = model(8)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or self.draw() > 0.3:
                x = block(x)
        return x


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), random.random])
def test_layer_drop(draw: Callable[[], float]) -> None:
    ours = LayerDrop(draw)
    plain = copy.deepcopy(ours)
    budget = certificate_of(ours.eval()).peak_bytes
    fitted = fit(ours.train(), rows(), budget)
    plain.train()
    for seed in range(12):
        found = []
        for m in (ours, plain):
            m.zero_grad(set_to_none=True)
            torch.manual_seed(seed)
            random.seed(seed)
            loss = m(rows()).square().mean()
            loss.backward()
            found.append(bits([loss, *(p.grad for p in m.parameters())]))
        assert found[0] == found[1]
        assert fitted.budget.used_bytes == 0
    assert fitted.budget.peak_bytes <= budget


# ---- batches of every kind


@dataclass
class Batch:
    x: Tensor


class Opaque:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = model(6)

    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, list):
            x = torch.stack(batch)
        elif isinstance(batch, dict | collections.UserDict):
            x = batch["x"]
        else:
            x = batch.x
        return self.blocks(x)


BATCHES = {
    "dict": lambda n: {"x": rows(n)},
    "list": lambda n: list(rows(n)),
    "UserDict": lambda n: collections.UserDict(x=rows(n)),
    "dataclass": lambda n: Batch(rows(n)),
    "object": lambda n: Opaque(rows(n)),
    "nested object": lambda n: Opaque(rows(n)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_as_the_one_argument(kind: str) -> None:
    make = BATCHES[kind]
    ours = Takes()
    plain = copy.deepcopy(ours)
    fitted = fit(ours, make(8), "1MiB")
    for count in (8, 4, 16, 8):
        assert gradients(ours, make(count)) == gradients(plain, make(count))
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert len(fitted._maker.plans) == 3, "a plan for each size"


@pytest.mark.parametrize("kind", [dict, collections.UserDict])
def test_a_batch_of_keyword_arguments(kind: Any) -> None:
    ours = Stepwise()
    plain = copy.deepcopy(ours)
    fit(ours, kind({"x": rows(), "depth": 1}), "1MiB")
    assert gradients(ours, x=rows(), depth=1) == gradients(plain, x=rows(), depth=1)


# ---- a model that was changed


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _wrap(m: nn.Module) -> None:
    torch.manual_seed(5)
    for block in m:
        block.up = Lora(block.up)


def _append(m: nn.Module) -> None:
    torch.manual_seed(5)
    m.append(Block(16))


CHANGES = {
    "a block appended": _append,
    "a block taken out": lambda m: m.pop(3),
    "LoRA": _wrap,
    "dropout": lambda m: [setattr(block.dropout, "p", 0.3) for block in m],
    "frozen": lambda m: [block.requires_grad_(False) for block in m[:3]],
    "double and back": lambda m: m.double().float(),
    "other weights": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "eval": lambda m: m.eval(),
    "another activation in one block": lambda m: m.__setitem__(2, nn.Sequential(m[2], nn.Tanh())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_changed_after_fit(change: str) -> None:
    ours = model()
    plain = copy.deepcopy(ours)
    fitted = fit(ours, rows(), "1MiB")
    least = fitted.plan.certificate.smallest_budget_bytes
    fitted.unfit()
    fitted = fit(ours, rows(), 3 * least)
    assert gradients(ours, rows()) == gradients(plain, rows())
    for m in (ours, plain):
        CHANGES[change](m)
    for _ in range(2):
        assert gradients(ours, rows()) == gradients(plain, rows())
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes
    assert not fitted.deviations


# ---- two forwards, then backward


def two_towers(m: nn.Module) -> list[bytes | None]:
    m.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = m(rows(8)).square().mean() - m(rows(8) * 2).sin().mean()
    loss.backward()
    return bits([loss, *(p.grad for p in m.parameters())])


def test_two_forwards_are_planned_as_asked() -> None:
    ours = model()
    plain = copy.deepcopy(ours)
    budget = certificate_of(ours).peak_bytes + 1000
    fitted = fit(ours, rows(), budget, live=2)
    for _ in range(3):
        assert two_towers(ours) == two_towers(plain)
        assert fitted.measured_peak_bytes <= fitted.promised_peak_bytes <= budget
    assert gradients(ours, rows()) == gradients(plain, rows())
    assert fitted.budget.used_bytes == 0


def test_a_second_forward_is_planned_for_what_remains() -> None:
    ours = model()
    plain = copy.deepcopy(ours)
    certificate = certificate_of(ours)
    fitted = fit(ours, rows(), certificate.peak_bytes + certificate.smallest_budget_bytes)
    for _ in range(2):
        assert two_towers(ours) == two_towers(plain)
        assert (
            certificate.peak_bytes < fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes
        )
    assert not fitted.deviations
    assert fitted.budget.used_bytes == 0


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_backwards_of_two_forwards_in_any_order(order: list[int]) -> None:
    """The one that was planned for half may recompute while the other still waits."""
    ours = model()
    plain = copy.deepcopy(ours)
    least = certificate_of(ours).smallest_budget_bytes
    fitted = fit(ours, rows(), 3 * least, live=2)
    for m in (ours, plain):
        torch.manual_seed(1)
        losses = [m(rows(8)).square().mean(), m(rows(8) * 2).sin().mean()]
        for number in order:
            losses[number].backward()
    assert bits(p.grad for p in ours.parameters()) == bits(p.grad for p in plain.parameters())
    assert fitted.budget.peak_bytes <= fitted.budget.max_bytes
    assert fitted.budget.used_bytes == 0


def test_a_second_forward_without_room_says_what_to_do() -> None:
    ours = model()
    certificate = certificate_of(ours)
    fitted = fit(ours, rows(), certificate.peak_bytes)
    with pytest.raises(BudgetExceeded, match=r"fit\(live=2\)"):
        two_towers(ours)
    plain = model()
    assert gradients(ours, rows()) == gradients(plain, rows())
    assert fitted.budget.used_bytes == 0


@pytest.mark.parametrize("live", [0, -1, 1.5, True, "2", None])
def test_a_live_that_is_none_is_refused(live: Any) -> None:
    with pytest.raises(ValueError, match="live="):
        fit(model(), rows(), "1MiB", live=live)


# ---- a fitted model is used like a model


def test_what_a_fitted_model_does_not_have_is_the_models() -> None:
    ours = model()
    fitted = fit(ours, rows(), "1MiB")
    assert list(fitted.parameters()) == list(ours.parameters())
    assert fitted.state_dict().keys() == ours.state_dict().keys()
    assert not fitted.eval().training
    assert fitted.train() is ours
    torch.optim.SGD(fitted.parameters(), 0.1)
    with pytest.raises(AttributeError, match="no attribute"):
        _ = fitted.nothing_of_the_kind
