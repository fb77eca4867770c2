"""What `fit` leaves alone, refuses, and notices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import gpuckpt
from gpuckpt import CheckpointBudget, Keep, checkpoint, fit
from gpuckpt.errors import BudgetExceeded, InvalidChain, PromiseBroken, RecomputeMismatch
from tests.pytorch.beside_plain import assert_same, plain_peak_bytes, train_step
from tests.pytorch.steps import HOLDS, Tally


class Block(nn.Module):
    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


def blocks(count: int = 8, **options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(**options) for _ in range(count)])


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
PLAIN = 8 * (256 + 1024) + 0  # bytes that 8 blocks save of a (4, 16) batch: each its input and tanh's output


def run(model: nn.Module, x: torch.Tensor = X) -> None:
    model(x).square().sum().backward()


def test_the_model_is_left_as_it_was() -> None:
    model = blocks()
    seen = []
    model[2].register_forward_hook(lambda module, args, out: seen.append("forward"))
    model[2].register_full_backward_hook(lambda module, gin, gout: seen.append("backward"))
    optimizer = torch.optim.AdamW(model.parameters())
    parameters = dict(model.named_parameters())
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = [dict(vars(module)) for module in model.modules()]
    fitted = fit(model, X, "1MiB")
    assert fitted.model is model
    assert type(model) is nn.Sequential
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert list(model.state_dict()) == list(state)
    assert all(map(torch.equal, model.state_dict().values(), state.values()))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None for parameter in model.parameters())
    seen.clear()
    run(model)
    assert seen == ["forward", "backward"]
    optimizer.step()
    assert not torch.equal(model.state_dict()["0.up.weight"], state["0.up.weight"])
    assert fitted.unfit() is model
    assert [set(vars(module)) - {"_compiled_call_impl"} for module in model.modules()] == [set(a) for a in attributes]
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_hooks_fire_again_in_a_recompute_as_in_any_checkpoint() -> None:
    model = blocks()
    calls = []
    model[0].register_forward_hook(lambda module, args, out: calls.append(1))
    fit(model, X, 4096, strategy="every")
    calls.clear()
    run(model)
    assert len(calls) in (1, 2)  # the recompute stops at the last saved tensor, which may be before the hook


def test_hooks_that_change_the_output_take_part() -> None:
    model, plain = blocks(), blocks()
    for each in (model, plain):
        each[3].register_forward_hook(lambda module, args, out: out * 1.25)
        each[4].register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
        each.register_forward_hook(lambda module, args, out: out.sin())
    fitted = fit(model, X, int(0.5 * PLAIN))
    expected = train_step(plain, (X,), {}, torch.optim.SGD(plain.parameters(), 0.1), 0)
    assert_same(train_step(model, (X,), {}, torch.optim.SGD(model.parameters(), 0.1), 0), expected)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def test_a_fitted_model_is_fitted_anew() -> None:
    model, plain = blocks(), blocks()
    first = fit(model, X, 4096)
    out = model(X)  # its backward is still to come
    second = fit(model, X, "1MiB")
    assert gpuckpt.fitted(model) is second
    assert (first.active, second.active) == (False, True)
    out.sum().backward()
    plain(X).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert first.budget.used_bytes == 0
    with pytest.raises(BudgetExceeded):
        fit(model, X, 10)
    assert gpuckpt.fitted(model) is second, "a fit that fails leaves the model as it was"
    model(X).sum().backward()
    assert second.measured_peak_bytes == second.promised_peak_bytes == PLAIN
    assert gpuckpt.unfit(model) is model
    assert gpuckpt.fitted(model) is None
    assert gpuckpt.unfit(model) is model


def test_a_part_of_a_fitted_model_is_not_fitted_by_itself() -> None:
    model = blocks()
    outer = nn.Sequential(model, nn.Linear(16, 16))
    fit(outer, X, "1MiB")
    with pytest.raises(ValueError, match="that is fitted already"):
        fit(model, X, "1MiB")
    assert gpuckpt.fitted(model) is None
    outer(X).sum().backward()


def test_unfit_gives_the_plain_model_back_and_it_can_be_fitted_again() -> None:
    model = blocks()
    fitted = fit(model, X, 4096)
    fitted.unfit()
    budget = CheckpointBudget(1 << 20, device="cpu")
    with budget:
        out = model(X)
    assert budget.peak_bytes == PLAIN
    del out
    run(model)
    assert fitted.budget.used_bytes == 0
    assert fit(model, X, 4096).plan.certificate.peak_bytes <= 4096


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_run_plainly(how: str) -> None:
    model = blocks()
    fitted = fit(model, X, 4096)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    run(twin)
    assert fitted.budget.used_bytes == 0
    run(model)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    fit(twin, X, 4096)
    run(twin)


def test_calls_without_gradients_run_plainly() -> None:
    model, plain = blocks(), blocks()
    fitted = fit(model, X, 4096)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(X[:1]), plain(X[:1]))
    assert len(fitted._maker.plans) == 1
    assert fitted.budget.used_bytes == 0


def test_new_shapes_are_planned_when_they_first_appear() -> None:
    model = blocks()
    fitted = fit(model, X, 8 * 1024)
    first = fitted.latest
    peaks = {}
    for rows in (4, 2, 8, 2, 4):
        x = torch.randn(rows, 16)
        run(model, x)
        assert fitted.measured_peak_bytes == fitted.plan.certificate.peak_bytes <= 8 * 1024
        peaks.setdefault(rows, fitted.latest)
        assert peaks[rows] is fitted.latest
    assert peaks[4] is first
    assert len(fitted._maker.plans) == 3
    with pytest.raises(BudgetExceeded) as refused:
        model(torch.randn(1000, 16))
    assert refused.value.available == 8 * 1024
    run(model)  # and the shapes that fit go on
    assert fitted.budget.used_bytes == 0


def test_one_byte_below_the_smallest_budget_is_refused_before_the_first_step() -> None:
    model = blocks(12)
    smallest = fit(model, X, 1 << 20).plan.certificate.smallest_budget_bytes
    model = blocks(12)
    calls = []
    for block in model:
        block.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(BudgetExceeded) as refused:
        fit(model, X, smallest - 1)
    assert (refused.value.need, refused.value.available) == (smallest, smallest - 1)
    assert all(module._compiled_call_impl is None for module in model.modules())
    fitted = fit(model, X, smallest)
    for _ in range(3):
        run(model)
        assert fitted.budget.used_bytes == 0
        assert fitted.measured_peak_bytes == smallest


class Fickle(Block):
    """Saves more than it was measured with, as the tally says: fit does not look in there."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def forward(self, x):
        out = super().forward(x)
        for _ in range(self.tally.count):
            out = out.exp().log()
        return out


def test_more_bytes_than_promised_is_an_error_with_both_numbers() -> None:
    model = nn.Sequential(*[Fickle() for _ in range(4)])
    fitted = fit(model, X, "1MiB", strict=True)
    promised = fitted.plan.certificate.peak_bytes
    run(model)
    model[1].tally.count = 2
    with pytest.raises(PromiseBroken) as broken:
        run(model)
    assert broken.value.promised_bytes == promised
    assert broken.value.measured_bytes == promised + 2 * 256  # what exp returns is saved, by exp and by log
    assert str(promised) in str(broken.value)
    assert str(broken.value.measured_bytes) in str(broken.value)
    assert fitted.budget.used_bytes == 0
    model[1].tally.count = 0
    run(model)
    assert fitted.measured_peak_bytes == promised


def test_overlapping_steps_may_hold_what_each_promised() -> None:
    model = blocks()
    fitted = fit(model, X, "1MiB")
    (model(X).sum() + model(X + 1).sum()).backward()
    assert fitted.promised_peak_bytes == 2 * fitted.plan.certificate.peak_bytes
    assert fitted.measured_peak_bytes <= fitted.promised_peak_bytes
    run(model)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes == fitted.plan.certificate.peak_bytes


def test_forward_without_backward_and_retained_graphs() -> None:
    model = blocks()
    fitted = fit(model, X, "1MiB", strategy="sqrt")
    model(X)
    assert fitted.budget.used_bytes == 0
    loss = model(X).square().sum()
    loss.backward(retain_graph=True)  # what the graph keeps alive is held longer than the plan foresees
    assert fitted.budget.used_bytes > 0
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * grad) for p, grad in zip(model.parameters(), first, strict=True))
    del loss
    assert fitted.budget.used_bytes == 0


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("how", ["retain_graph", "create_graph", "penalty"])
def test_a_graph_that_stays_is_named_where_the_plan_has_no_room_for_it(how: str, hold: str) -> None:
    """Blocks that are kept do not go as backward goes, and what is recomputed comes on top."""
    model = blocks()
    plain_bytes = fit(model, X, "1MiB", hold=hold).plan.certificate.peak_bytes
    fitted = fit(model, X, plain_bytes // 2, hold=hold)
    assert any(isinstance(node, Keep) for node in fitted.plan.tree[1:-1])
    x = X.clone().requires_grad_()

    def step() -> None:
        loss = model(x).square().sum()
        if how == "penalty":
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + g.square().sum()).backward()
        else:
            loss.backward(**{how: True})

    with pytest.raises(BudgetExceeded, match=r"retain_graph or create_graph .* needs a larger budget"):
        step()
    model.zero_grad()  # gradients of backward(create_graph=True) keep the graph, says torch
    x.grad = None
    assert fitted.budget.used_bytes == 0
    fit(model, X, 4 * plain_bytes, hold=hold)
    step()
    model.zero_grad()


def test_an_error_in_a_stage_leaves_nothing_behind() -> None:
    model = blocks()
    fitted = fit(model, X, 4096)

    def fail(*_):
        raise KeyError("mine")

    handle = model[5].register_forward_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        model(X)
    handle.remove()
    assert fitted.budget.used_bytes == 0
    run(model)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


@pytest.mark.parametrize(
    "model",
    [nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16)), nn.Sequential()],
    ids=["one layer", "a chain of one", "empty"],
)
def test_models_that_are_no_chain_are_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(InvalidChain, match=f"{type(model).__name__}: found no chain of stages"):
        fit(model, X, "1MiB")


def test_random_stages_without_their_random_numbers_are_refused_by_name() -> None:
    model = nn.Sequential(Block(), Block(), Block(), Block(dropout=0.5), Block())
    with pytest.raises(InvalidChain, match=r"stage '3' of Sequential draws random numbers"):
        fit(model, X, "1MiB", preserve_rng_state=False)
    model = blocks(dropout=0.5).eval()
    fit(model, X, "1MiB", preserve_rng_state=False)
    with pytest.raises(InvalidChain, match="stage '0' of Sequential draws random numbers"):
        run(model.train())


def test_a_stage_that_keeps_state_is_refused_by_name() -> None:
    class Caches(Block):
        def __init__(self):
            super().__init__()
            self.past = []

        def forward(self, x):
            self.past.append(x.detach())
            return super().forward(torch.cat(self.past)[-len(x) :]) * torch.cat(self.past).sum(0)

    class Grows(Block):
        def __init__(self):
            super().__init__()
            self.tally = Tally()

        def forward(self, x):
            self.tally.count += 1
            return super().forward(torch.cat([x] * self.tally.count)).mean(0, keepdim=True).expand(len(x), -1)

    with pytest.raises(InvalidChain, match=r"stage '1' \(Grows\) saved .* It keeps state between calls"):
        fit(nn.Sequential(Block(), Grows(), Block()), X, "1MiB")


def test_a_stage_that_does_something_else_in_its_recompute_is_caught() -> None:
    class Changes(Block):
        def __init__(self):
            super().__init__()
            self.tally = Tally()
            self.tally.count = 1

        def forward(self, x):
            count = self.tally.count
            return super().forward(torch.tanh(x.repeat(count, 1))).reshape(count, *x.shape).mean(0)

    model = nn.Sequential(Changes(), Changes(), Changes(), Changes())
    fit(model, X, 4096, strategy="every")
    loss = model(X).sum()
    model[1].tally.count = 2
    with pytest.raises(RecomputeMismatch, match="shape"):
        loss.backward()


def test_verify_catches_a_stage_whose_numbers_change() -> None:
    class Drifts(Block):
        def __init__(self):
            super().__init__()
            self.tally = Tally()

        def forward(self, x):
            self.tally.count += 1
            return super().forward(x * self.tally.count)

    model = nn.Sequential(*[Drifts() for _ in range(4)])
    fit(model, X, 4096, strategy="every", verify="bitwise")
    with pytest.raises(RecomputeMismatch, match="contents differ"):
        run(model)


def test_a_model_that_skips_blocks_is_refused_by_name() -> None:
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))
            self.tally = Tally()
            self.tally.count = 4

        def forward(self, x):
            for block in self.blocks[: self.tally.count]:
                x = block(x)
            return x

    model = Skips()
    fitted = fit(model, X, "1MiB", strict=True)
    model.tally.count = 3
    with pytest.raises(InvalidChain, match="Skips ran 3 stages and 4 when it was measured"):
        model(X)
    model.tally.count = 4
    run(model)
    assert fitted.budget.used_bytes == 0


def test_a_model_that_is_cast_after_it_was_fitted_is_planned_again() -> None:
    class Shifted(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.randn(16))

        def forward(self, x):
            return super().forward(x * self.shift)

    model = nn.Sequential(*[Shifted() for _ in range(6)])
    fitted = fit(model, X, 16_000)
    run(model)
    model.double()
    run(model, X.double())  # the buffers are other tensors now, and still nobody is charged for them
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert fitted.budget.used_bytes == 0


def test_gradients_of_functional_autograd_and_of_parameters_only() -> None:
    model, plain = blocks(), blocks()
    fit(model, X, int(0.5 * plain_peak_bytes(plain, (X,), {})))
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    got = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    expected = torch.autograd.grad(plain(y).square().sum(), [y, *plain.parameters()])
    assert all(map(torch.equal, got, expected))


def test_keyword_inputs_and_several_positional_ones() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x, *, gain, shift=None):
            for block in self.blocks:
                x = block(x)
            return x * gain + (0 if shift is None else shift)

    model = Model()
    fitted = fit(model, {"x": X, "gain": 2.0}, 4096)
    model(X, gain=2.0).sum().backward()
    model(x=X, gain=2.0).sum().backward()
    assert len(fitted._maker.plans) == 2  # called another way is another signature, planned anew
    model(x=X, gain=3.0).sum().backward()
    assert len(fitted._maker.plans) == 2  # and another rate is not
    model(x=X, gain=2.0, shift=X).sum().backward()
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


@pytest.mark.parametrize("front", [nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Embedding(16, 8)])
def test_a_fitted_model_behind_another_trainable_module(front: nn.Module) -> None:
    """Measuring a new input shape happens in the middle of the caller's graph, and must not touch a tensor of it."""
    torch.manual_seed(0)
    trunk = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    plain = copy.deepcopy(trunk)
    fitted = fit(trunk, torch.randn(4, 8), "1MiB")
    for rows in (4, 4, 6, 6):
        x = torch.randint(0, 16, (rows,)) if isinstance(front, nn.Embedding) else torch.randn(rows, 8)
        found = []
        for model in (fitted, plain):
            h = front(x)
            version = h._version
            loss = model(h).sum()
            assert h._version == version
            found.append(torch.autograd.grad(loss, [*front.parameters()]))
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("verify", ["bitwize", "Bitwise", True, 1, ["bitwise"], ""])
def test_a_verify_that_is_none_is_refused(verify) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"verify=.*expected None, 'metadata' or 'bitwise'"):
        fit(model, torch.randn(4, 8), "1MiB", verify=verify)
    with pytest.raises(ValueError, match=r"verify=.*expected None, 'metadata' or 'bitwise'"):
        checkpoint(model, torch.randn(4, 8), verify=verify)
    assert model._compiled_call_impl is None
