"""Stages that spill what they save to the host: as planned to the byte in both budgets, bit for bit, and under faults."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

import gpuckpt.pytorch.plan_maker as plan_maker
from gpuckpt import BudgetExceeded, CheckpointBudget, Keep, Recompute, fit, plan_chain, simulate
from gpuckpt.errors import InvalidPlan, PromiseBroken
from gpuckpt.planning import Chain, Node, tree_text, with_spill
from gpuckpt.pytorch.engine.copies import CopyThread
from gpuckpt.pytorch.engine.offload import Spill
from gpuckpt.pytorch.fitted import Fitted
from gpuckpt.pytorch.link_speed import Link, measure_link
from gpuckpt.pytorch.plan_runner import Walk
from gpuckpt.pytorch.planned import Planned
from tests.pytorch.beside_plain import assert_same, beside_plain, plain_peak_bytes, train_step
from tests.pytorch.mixed_blocks import COUNT, Model
from tests.pytorch.steps import Tally

both = pytest.mark.parametrize("hold", ["account", "pool"])


class Dear(nn.Module):
    """Much work for what it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("turn", torch.eye(16))

    def forward(self, x):
        with torch.no_grad():
            turned = x
            for _ in range(200):
                turned = turned @ self.turn
        return torch.tanh(self.linear(x)) + turned


def dear(count: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Dear() for _ in range(count)])


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
PEAK = plain_peak_bytes(dear(), (X,), {})
QUICK = Link(1e12, 0.0)


@pytest.fixture
def quick_link(monkeypatch) -> None:
    """Transfers that cost next to nothing, whatever the machine is doing: plans are then the same everywhere."""
    monkeypatch.setattr(plan_maker, "measure_link", lambda *_: QUICK)


def random_nodes(generator: random.Random, chain: Chain, first: int, last: int, depth: int = 0) -> tuple[Node, ...]:
    """Stages first..last, split into runs that are kept, spilled or framed at random, with inputs here and on the host."""
    nodes: list[Node] = []
    while first <= last:
        end = generator.randint(first, last)
        if depth < 4 and generator.random() < 0.5:
            moved = depth == 0 and chain.stages[first].input_moved_s is not None and generator.random() < 0.6
            nodes.append(Recompute(random_nodes(generator, chain, first, end, depth + 1), "spill" if moved else "keep"))
        else:
            end = first
            nodes.append(Keep(first, generator.choice(["keep", "spill", "spill"])))
        first = end + 1
    return tuple(nodes)


def put_plan(fitted: Fitted, tree: tuple[Node, ...]) -> None:
    """Run `tree` from now on, under what the simulator says of it."""
    said = simulate(fitted.chain, tree)
    (key,) = fitted._maker.plans
    certificate = dataclasses.replace(
        fitted.plan.certificate, peak_bytes=said.peak_bytes, host_peak_bytes=said.host_peak_bytes
    )
    plan = dataclasses.replace(fitted.plan, tree=tree, certificate=certificate)
    fitted._latest = fitted._maker.plans[key] = Planned(fitted.latest.measured, plan)


@both
def test_random_trees_hold_here_and_there_what_the_simulator_says(hold: str) -> None:
    torch.manual_seed(3)
    model, x, generator = Model(), torch.randn(5, 8), random.Random(5)
    torch.manual_seed(4)
    loss = model(x)
    plain = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    fitted = fit(model, x, "1MiB", hold=hold, host_budget="1MiB")
    chain, host = fitted.chain, fitted.host_budget
    assert [len(stage.variants) for stage in chain.stages] == [0, *[1] * COUNT, 0]
    framed = inputs = overlapped = 0
    for _ in range(150 if hold == "account" else 60):
        tree = (Keep(0), *random_nodes(generator, chain, 1, COUNT), Keep(COUNT + 1))
        said, text = simulate(chain, tree), tree_text(tree)
        put_plan(fitted, tree)
        for block in model.blocks:
            block.tally.count = 0
        torch.manual_seed(4)
        loss = model(x)
        got = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
        assert (fitted.budget.peak_bytes, host.peak_bytes) == (said.peak_bytes, said.host_peak_bytes), text
        assert [block.tally.count for block in model.blocks] == list(said.forward_counts[1:-1]), text
        assert (fitted.budget.used_bytes, host.used_bytes) == (0, 0), text
        assert all(map(torch.equal, got, plain)), text
        framed += any(":spill" in part.split(")")[0] for part in text.split("(")[1:])
        inputs += "):spill" in text
        overlapped += any(copy.direction == "back" for copy in said.transfers)
    assert min(framed, inputs, overlapped) > 20
    fitted.unfit()


@both
def test_where_recompute_is_dear_the_planner_spills_and_the_step_is_the_plain_one(hold: str, quick_link) -> None:
    model, plain = dear(), dear()
    fitted = fit(model, X, int(0.4 * PEAK), hold=hold, host_budget="1MiB")
    without = plan_chain(fitted.chain, fitted.budget.max_bytes, host_bytes=0)
    assert without.certificate.recompute_s > 0
    assert fitted.plan.certificate.recompute_s == 0
    assert fitted.plan.certificate.step_s < without.certificate.step_s
    ours, theirs = (torch.optim.SGD(each.parameters(), 0.1, momentum=0.5) for each in (model, plain))
    for seed in range(3):
        expected = train_step(plain, (X,), {}, theirs, seed)
        assert_same(train_step(model, (X,), {}, ours, seed), expected)
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes == fitted.plan.certificate.peak_bytes
        assert fitted.measured_host_peak_bytes == fitted.promised_host_peak_bytes > 0
        assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (0, 0)
    report = fitted.report()
    spilled = [stage for stage in report.stages if stage.fate == "spilled"]
    assert spilled
    assert all(stage.runs == 1 and stage.spill_ms > 0 and stage.recompute_ms == 0 for stage in spilled)
    assert report.spill_ms == pytest.approx(sum(stage.spill_ms for stage in spilled))
    assert "to the host and back, " in spilled[0].why
    assert "running it again would take" in spilled[0].why
    assert (
        f"on the host: peak promised {fitted.promised_host_peak_bytes} B, measured {fitted.measured_host_peak_bytes} B"
        in str(report)
    )
    assert "for which it stands still" in str(report)


class Normed(nn.Module):
    """Statistics that change, dropout, and an activation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)])
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        up, norm, down = self.parts
        return x + down(self.dropout(norm(up(x)).relu_()))


@both
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_statistics_dropout_and_autocast(hold: str, precision: torch.dtype | None, quick_link) -> None:
    def around():
        return torch.autocast("cpu", dtype=precision, enabled=precision is not None)

    options = {"hold": hold, "host_budget": "1MiB"}
    model = nn.Sequential(nn.Linear(16, 16), *[Normed() for _ in range(6)])
    fitted = beside_plain(model, X, share=0.5, around=around, fit_options=options)
    assert [stage.fate for stage in fitted.report().stages].count("spilled") > 1
    assert fitted.measured_host_peak_bytes == fitted.promised_host_peak_bytes
    assert fitted.host_budget.used_bytes == 0


def test_over_a_slow_link_nothing_is_spilled(monkeypatch) -> None:
    monkeypatch.setattr(plan_maker, "measure_link", lambda *_: Link(1.0, 1.0))
    model = dear()
    fitted = fit(model, X, int(0.4 * PEAK), host_budget="1GiB")
    assert fitted.plan.certificate.host_peak_bytes == 0
    model(X).sum().backward()
    assert fitted.host_budget.peak_bytes == 0
    assert "on the host" not in str(fitted.report())


def test_the_link_is_timed_on_the_device_and_leaves_the_host_budget_alone() -> None:
    host = CheckpointBudget(0, device="cpu", hold="pool")
    link = measure_link(torch.device("cpu"), host, plan_maker.WallClock(), CopyThread())
    assert 1e6 < link.bytes_per_s < 1e13
    assert 0 < link.latency_s < 0.1
    assert host.events() == []


def test_a_small_host_budget_takes_what_it_can(quick_link) -> None:
    max_bytes, shares = int(0.4 * PEAK), (0.0, 0.2, 0.4, 1.0)
    for share in shares:
        model, plain = dear(), dear()
        host = CheckpointBudget(int(share * PEAK), device="cpu", hold="pool")
        fitted = fit(model, X, max_bytes, host_budget=host)
        optimizers = (torch.optim.SGD(each.parameters(), 0.1) for each in (model, plain))
        assert_same(*(train_step(m, (X,), {}, o, 0) for m, o in zip((model, plain), optimizers, strict=True)))
        assert host.peak_bytes == fitted.plan.certificate.host_peak_bytes <= host.max_bytes
    # By one measurement: what each part of a block takes differs a little from one to the next.
    plans = [plan_chain(fitted.chain, max_bytes, host_bytes=int(share * PEAK)).certificate for share in shares]
    seconds = [plan.recompute_s for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[2] > seconds[3]
    hosts = [plan.host_peak_bytes for plan in plans]
    assert hosts == sorted(hosts)
    assert hosts[0] == 0 < hosts[2] < hosts[3]


def spilling(model: nn.Module, **options) -> Fitted:
    """Fitted, with every second stage spilled and the last two of a frame."""
    fitted = fit(model, X, "1MiB", host_budget="1MiB", **options)
    last = len(fitted.chain) - 1
    frame = Recompute((Keep(last - 3), Keep(last - 2, "spill"), Keep(last - 1, "spill")))
    tree = (Keep(0), *(Keep(i, "spill" if i % 2 else "keep") for i in range(1, last - 3)), frame, Keep(last))
    put_plan(fitted, tree)
    return fitted


def all_spilled(model: nn.Module, **options) -> Fitted:
    """Fitted, with every stage spilled."""
    fitted = fit(model, X, "1MiB", host_budget="1MiB", **options)
    last = len(fitted.chain) - 1
    put_plan(fitted, (Keep(0), *(Keep(i, "spill") for i in range(1, last)), Keep(last)))
    return fitted


class Tables:
    def __init__(self) -> None:
        self.mix = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))


class ReadsTables(nn.Module):
    """Reads a table that stands in an attribute, of its own or shared, or in an object."""

    def __init__(self, tables: Tables, where: str) -> None:
        super().__init__()
        self.linear, self.down = nn.Linear(16, 16), nn.Linear(4, 16)
        self.tables, self.where = tables, where
        self.mix = tables.mix if where == "shared" else tables.mix.clone()

    def forward(self, x):
        mix = self.tables.mix if self.where == "object" else self.mix
        return torch.tanh(self.linear(x)) * self.down(x @ mix)


@both
@pytest.mark.parametrize("fitting", [spilling, all_spilled])
@pytest.mark.parametrize("where", ["own", "shared", "object"])
def test_tables_that_are_read_from_attributes_stay(where: str, fitting: Callable[..., Fitted], hold: str) -> None:
    """Others may read them as well: the plan holds them here, and nothing of them goes to the host."""
    torch.manual_seed(0)
    tables = Tables()
    model = nn.Sequential(*[ReadsTables(tables, where) for _ in range(8)])
    (plain := copy.deepcopy(model))(X).square().sum().backward()
    fitted = fitting(model, hold=hold)
    for _ in range(3):
        model.zero_grad()
        model(X).square().sum().backward()
        assert all(map(torch.equal, grads(model), grads(plain)))
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
        assert fitted.measured_host_peak_bytes == fitted.promised_host_peak_bytes > 0
        assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (0, 0)


def grads(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


@both
def test_retained_graphs_keep_the_host_copies_and_nothing_here(hold: str) -> None:
    model = dear()
    model(X).sum().backward()
    once = grads(model)
    model.zero_grad()
    fitted = spilling(model, hold=hold)
    loss = model(X).sum()
    held = fitted.budget.used_bytes
    loss.backward(retain_graph=True)
    assert all(map(torch.equal, grads(model), once))
    assert fitted.budget.used_bytes <= held
    assert fitted.host_budget.used_bytes > 0
    loss.backward()
    assert all(torch.equal(p.grad, 2 * grad) for p, grad in zip(model.parameters(), once, strict=True))
    del loss
    assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (0, 0)


@both
def test_a_retained_graph_needs_no_more_at_a_time_than_one_that_is_not(hold: str) -> None:
    model = dear()
    fitted = all_spilled(model, hold=hold)
    loss = model(X).sum()
    loss.backward(retain_graph=True)
    assert fitted.budget.peak_bytes == fitted.plan.certificate.peak_bytes
    loss.backward()
    del loss
    assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (0, 0)


@both
def test_gradients_of_some_and_a_look_at_a_node_leave_nothing_back(hold: str) -> None:
    model = dear()
    between: list[torch.Tensor] = []
    model[-1].linear.register_forward_hook(lambda module, args, out: between.append(out))
    fitted = all_spilled(model, hold=hold)
    between.clear()
    loss = model(X).sum()
    held, there = fitted.budget.used_bytes, fitted.host_budget.used_bytes
    assert there == fitted.plan.certificate.host_peak_bytes > 0
    # A look at a saved tensor brings the stage back for the moment.
    node = loss.grad_fn
    while not hasattr(node, "_saved_result"):
        node = node.next_functions[0][0]
    assert node._saved_result.shape == X.shape
    assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (held, there)
    # Up to the last linear layer the whole stage comes back; what that layer saved is not asked for, and does not stay.
    torch.autograd.grad(loss, between[0], retain_graph=True)
    # The last stage had not left; now it has, as the graph stays.
    assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (held - 2 * X.nbytes, there)
    expected = copy.deepcopy(model)
    expected.zero_grad()
    expected(X).sum().backward()
    loss.backward()
    assert all(map(torch.equal, grads(model), grads(expected)))
    del loss, node
    between.clear()
    assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (0, 0)


def test_forwards_without_backwards_overlapping_steps_and_unfit() -> None:
    model = dear()
    fitted = spilling(model)
    model(X)
    assert (fitted.budget.used_bytes, fitted.host_budget.used_bytes) == (0, 0)
    (model(X).sum() + model(X + 1).sum()).backward()
    # What waits of the first forward, and what the second was promised: less than both promises together.
    one = fitted.plan.certificate.host_peak_bytes
    assert one < fitted.measured_host_peak_bytes <= fitted.promised_host_peak_bytes <= 2 * one
    model(X).sum().backward()
    assert fitted.measured_host_peak_bytes == fitted.promised_host_peak_bytes == fitted.plan.certificate.host_peak_bytes
    fitted.host_budget.reset_peak()
    assert fitted.unfit() is model
    model(X).sum().backward()
    assert fitted.host_budget.peak_bytes == 0


class Fickle(Dear):
    """Saves more than it was measured with, as the tally says: fit does not look in there."""

    def __init__(self) -> None:
        super().__init__()
        self.tally = Tally()

    def forward(self, x):
        out = super().forward(x)
        for _ in range(self.tally.count):
            out = out.exp().log()
        return out


def test_more_bytes_on_the_host_than_promised_is_an_error_with_both_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Fickle() for _ in range(8)])
    fitted = spilling(model, strict=True)
    promised = fitted.plan.certificate.host_peak_bytes
    model(X).sum().backward()
    model[2].tally.count = 1
    with pytest.raises(PromiseBroken, match="the host budget") as broken:
        model(X).sum().backward()
    assert broken.value.promised_bytes == promised
    assert broken.value.measured_bytes == promised + X.nbytes  # what exp returns is saved, by exp and by log
    model[2].tally.count = 0
    model(X).sum().backward()
    assert fitted.measured_host_peak_bytes == promised


def test_what_is_changed_in_place_after_it_was_spilled_is_read_as_it_was() -> None:
    budget = CheckpointBudget("1MiB", device="cpu")
    host = CheckpointBudget("1MiB", device="cpu", hold="pool")
    x = torch.randn(5, requires_grad=True)
    with Spill(budget, host).run((), replayed=False):
        y = x.sigmoid()
    expected = (y * (1 - y)).detach().clone()
    with torch.no_grad():
        y.zero_()
    y.sum().backward()
    assert torch.equal(x.grad, expected)
    del y
    assert (budget.used_bytes, host.used_bytes) == (0, 0)


def test_views_of_one_storage_are_one_copy_there_and_one_storage_here() -> None:
    budget = CheckpointBudget("1MiB", device="cpu")
    host = CheckpointBudget("1MiB", device="cpu", hold="pool")
    x = torch.randn(6, 4, requires_grad=True)
    with Spill(budget, host).run((), replayed=False):
        y = x.exp()
        out = (y.t()[1:] * y.t()[:3]).sum()  # three views of what exp returned, which saves it as well
    assert (budget.used_bytes, host.used_bytes) == (0, 96)
    out.backward()
    assert (budget.peak_bytes, host.peak_bytes) == (96, 96)
    got, x.grad = x.grad, None
    y = x.exp()
    (y.t()[1:] * y.t()[:3]).sum().backward()
    assert torch.equal(got, x.grad)


def test_what_does_not_fit_on_its_way_back_leaves_nothing_back() -> None:
    budget, host = CheckpointBudget(150, device="cpu"), CheckpointBudget("1KiB", device="cpu", hold="pool")
    spill, tensors = Spill(budget, host), [torch.arange(25.0), torch.arange(25.0) + 1]
    parts = [spill.hold(tensor) for tensor in tensors]
    with pytest.raises(BudgetExceeded):
        parts[0].load()
    assert (budget.used_bytes, host.used_bytes) == (0, 200)
    del parts[1]
    assert torch.equal(parts[0].load(), tensors[0])
    with pytest.raises(BudgetExceeded, match="the host budget has no room for what a spilled stage saves"):
        spill.hold(torch.zeros(1000))


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (lambda budget: budget, "host_budget is the budget itself"),
        (lambda budget: budget.spill_to, "host_budget is the budget's own spill_to"),
        (lambda budget: CheckpointBudget(1, device="cpu"), "hold='account'; expected a size"),
        (lambda budget: "much", "much"),
        (lambda budget: -1, "-1"),
    ],
)
def test_a_host_budget_that_is_none_is_refused(host, message: str) -> None:
    there = CheckpointBudget("1MiB", device="cpu", hold="pool")
    budget = CheckpointBudget("1MiB", device="cpu", hold="pool", over_cap=("spill",), spill_to=there)
    model = dear()
    with pytest.raises(ValueError, match=message):
        fit(model, X, budget, host_budget=host(budget))
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_an_option_that_cannot_be_run_is_refused_by_name() -> None:
    with pytest.raises(InvalidPlan, match="stage 3 under the option 'packed'"):
        Walk((Keep(3, "packed"),), None)
    with pytest.raises(InvalidPlan, match="'spill' with a host_budget"):
        Walk((Keep(3, "spill"),), CheckpointBudget(1, device="cpu"))


def test_the_chain_names_what_a_spill_moves_and_keeps_what_stages_share() -> None:
    model, x = Model(), torch.randn(5, 8)
    chain = with_spill(fit(model, x, "1MiB").chain, 100.0, latency_s=0.5)
    stage = chain.stages[2]
    (variant,) = stage.variants
    assert set(variant.saves) == set(stage.saves) & set(stage.extras) != set()
    assert set(variant.spilled) == set(stage.saves) - set(stage.extras)
    moved = sum(chain.storages[i] for i in variant.spilled)
    assert variant.forward_s == pytest.approx(stage.forward_s + moved / 100 + 0.5 * len(variant.spilled))
