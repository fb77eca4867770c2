"""State that work reaches without being given it: variables, attributes that are tensors or objects, and what is inside."""

from __future__ import annotations

import collections
import gc
import itertools
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from gpuckpt import CheckpointBudget, RecomputeMismatch, SavedTensorModified, StateModified, checkpoint, fit
from gpuckpt.errors import InvalidChain
from tests.pytorch.steps import HOLDS, Layer, batch, bits

RATE = 1.0
TABLE = {"rate": 1.0, "shift": torch.zeros(16)}


class Settings:
    """An object of the user's, as configurations are."""

    def __init__(self) -> None:
        self.rate = 1.0
        self.shift = torch.zeros(16)
        self.inner = {"rates": [1.0, 2.0]}


class Slotted:
    __slots__ = ("rate", "shift")

    def __init__(self) -> None:
        self.rate, self.shift = 1.0, torch.zeros(16)


# ---- checkpoint: a function and what it sees. Each gives work, and what changes before backward.


def a_variable_of_a_loop() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    rate = 1.0

    def change() -> None:
        nonlocal rate
        rate = 3.0

    return lambda x: (x * rate).sin(), change


def a_tensor_that_is_replaced() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    scale = torch.linspace(0, 1, 16)

    def change() -> None:
        nonlocal scale
        scale = torch.ones(16)

    return lambda x: (x * scale).sin(), change


def a_global() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    global RATE
    RATE = 1.0

    def change() -> None:
        global RATE
        RATE = 3.0

    return lambda x: (x * RATE).sin(), change


def a_table_of_the_module() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    TABLE.update(rate=1.0, shift=torch.zeros(16))

    def change() -> None:
        TABLE.update(rate=3.0, shift=torch.ones(16))

    return lambda x: (x * TABLE["rate"] + TABLE["shift"]).sin(), change


def a_list() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    rates = [1.0, 2.0]
    return lambda x: (x * rates[0]).sin(), lambda: rates.insert(0, 3.0)


def an_object() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    settings = Settings()

    def change() -> None:
        settings.rate, settings.shift = 3.0, torch.ones(16)
        settings.inner["rates"][0] = 5.0

    return lambda x: (x * settings.rate * settings.inner["rates"][0] + settings.shift).sin(), change


def an_object_with_slots() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    settings = Slotted()

    def change() -> None:
        settings.rate, settings.shift = 3.0, torch.ones(16)

    return lambda x: (x * settings.rate + settings.shift).sin(), change


def a_method_of_an_object() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    class Net:
        def __init__(self) -> None:
            self.layers = [nn.Sequential(nn.Identity(), nn.Dropout(0.5))]
            self.rate = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return (self.layers[0](x) * self.rate).sin()

    net = Net()

    def change() -> None:
        net.layers[0].eval()
        net.rate = 3.0

    return net.forward, change


CHANGES: dict[str, Callable[[], tuple[Callable[[Tensor], Tensor], Callable[[], Any]]]] = {
    make.__name__: make
    for make in (
        a_variable_of_a_loop,
        a_tensor_that_is_replaced,
        a_global,
        a_table_of_the_module,
        a_list,
        an_object,
        an_object_with_slots,
        a_method_of_an_object,
    )
}


@pytest.mark.parametrize("hold", [None, *HOLDS])
@pytest.mark.parametrize("name", CHANGES)
def test_what_others_change_between_forward_and_backward_is_as_it_was(name: str, hold: str | None) -> None:
    work, _ = CHANGES[name]()
    expected = gradient(work(x := leaf()), x)
    work, change = CHANGES[name]()
    budget = None if hold is None else CheckpointBudget("1MiB", device="cpu", hold=hold)
    out = checkpoint(work, x := leaf(), budget=budget)
    change()
    assert bits([gradient(out, x)]) == bits([expected])
    torch.manual_seed(0)
    changed = work(x)
    torch.manual_seed(0)
    plain, change = CHANGES[name]()
    change()
    torch.manual_seed(0)
    assert bits([changed]) == bits([plain(x)])  # and the change has stayed
    del out
    assert budget is None or budget.used_bytes == 0


def leaf() -> Tensor:
    torch.manual_seed(0)
    return batch().requires_grad_()


def gradient(out: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(out.square().sum(), x)
    return found


@pytest.mark.parametrize("hold", [None, *HOLDS])
def test_the_blocks_of_a_loop_that_a_lambda_sees(hold: str | None) -> None:
    """`lambda x: block(x)` sees the variable `block`, which is the last one by the time of backward."""
    layers = [Layer() for _ in range(4)]
    budget = None if hold is None else CheckpointBudget("1MiB", device="cpu", hold=hold)
    found = []
    for call in (lambda fn, x: fn(x), lambda fn, x: checkpoint(fn, x, budget=budget)):
        x = batch()
        for layer in layers:
            x = call(lambda x: layer(x), x)  # noqa: B023
        x.square().sum().backward()
        found.append(bits(p.grad for layer in layers for p in layer.parameters()))
        for layer in layers:
            layer.zero_grad(set_to_none=True)
    assert found[0] == found[1]


@pytest.mark.parametrize("where", ["variable", "object"])
def test_bytes_that_changed_are_refused(where: str) -> None:
    scale, settings = torch.ones(16), Settings()
    if where == "object":
        out = checkpoint(lambda x: (x * (settings.shift + 1)).sin(), batch().requires_grad_())
        settings.shift += 1
    else:
        out = checkpoint(lambda x: (x * scale).sin(), batch().requires_grad_())
        scale += 1
    with pytest.raises(StateModified, match="changed in place"):
        out.sum().backward()


def test_bytes_that_a_budget_has_a_copy_of_may_change() -> None:
    scale = torch.ones(16)
    budget = CheckpointBudget("1MiB", device="cpu", hold="pool")
    kept = CheckpointBudget("1MiB", device="cpu")

    def work(x: Tensor) -> Tensor:
        return (x * (scale + 0)).sin()

    x = leaf()
    expected = gradient(work(x), x)
    gradient(checkpoint(work, x, budget=budget), x)  # from now on it is known that `scale` is read
    out = checkpoint(work, x, budget=budget)
    other = checkpoint(work, x, budget=kept)
    assert kept.used_bytes == scale.nbytes  # x is a leaf that is trained
    scale += 1
    assert torch.equal(gradient(out, x), expected)
    with pytest.raises(SavedTensorModified, match="changed in place"):
        gradient(other, x)


STATISTICS: dict[str, Callable[[], tuple[Any, Callable[[Tensor], Tensor]]]] = {}


def statistics(make: Callable[[], tuple[Any, Callable[[Tensor], Tensor]]]) -> None:
    STATISTICS[make.__name__] = make


@statistics
def a_norm_in_a_dict() -> tuple[Any, Callable[[Tensor], Tensor]]:
    norms = {"a": nn.BatchNorm1d(16)}
    return lambda: list(norms["a"].buffers()), lambda x: norms["a"](x).sin()


@statistics
def a_norm_of_an_object_that_is_called() -> tuple[Any, Callable[[Tensor], Tensor]]:
    class Net:
        def __init__(self) -> None:
            self.norms = collections.deque([nn.BatchNorm1d(16)])

        def __call__(self, x: Tensor) -> Tensor:
            return self.norms[0](x).sin()

    net = Net()
    return lambda: list(net.norms[0].buffers()), net


@statistics
def a_generator_of_an_object() -> tuple[Any, Callable[[Tensor], Tensor]]:
    settings = Settings()
    settings.random = torch.Generator().manual_seed(3)  # type: ignore[attr-defined]
    return (
        lambda: [settings.random.get_state()],  # type: ignore[attr-defined]
        lambda x: (x * torch.rand(16, generator=settings.random)).sin(),  # type: ignore[attr-defined]
    )


@statistics
def a_moving_average_that_is_replaced() -> tuple[Any, Callable[[Tensor], Tensor]]:
    state = {"mean": torch.zeros(16)}

    def work(x: Tensor) -> Tensor:
        state["mean"] = state["mean"] * 0.9 + x.detach().mean(0)
        return (x - state["mean"]).sin()

    return lambda: [state["mean"]], work


@statistics
def a_moving_average_in_place() -> tuple[Any, Callable[[Tensor], Tensor]]:
    mean = torch.zeros(16)

    def work(x: Tensor) -> Tensor:
        mean.mul_(0.9).add_(x.detach().mean(0))
        return (x - mean.clone()).sin()

    return lambda: [mean], work


@pytest.mark.parametrize("hold", [None, *HOLDS])
@pytest.mark.parametrize("name", STATISTICS)
def test_state_is_updated_once(name: str, hold: str | None) -> None:
    budget = None if hold is None else CheckpointBudget("1MiB", device="cpu", hold=hold)
    results = []
    for call in (lambda fn, x: fn(x), lambda fn, x: checkpoint(fn, x, budget=budget)):
        torch.manual_seed(0)
        state, work = STATISTICS[name]()
        gradients = [gradient(call(work, x := leaf()), x) for _ in range(4)]
        results.append(bits([*gradients, *state()]))
    assert results[0] == results[1]
    gc.collect()
    assert budget is None or budget.used_bytes == 0


def test_what_forward_counts_itself_is_counted_again() -> None:
    """A log, such as a list of calls, says what ran."""
    calls: list[str] = []
    checkpoint(lambda x: (calls.append("call"), x.sin())[1], leaf()).sum().backward()
    assert calls == ["call", "call"]


def test_objects_that_others_use_at_the_same_time_are_left_alone() -> None:
    class Shared:
        def __init__(self) -> None:
            self.lock, self.rate = threading.Lock(), 1.0

    shared = Shared()
    out = checkpoint(lambda x: (x * shared.rate).sin(), x := leaf(), verify="bitwise")
    shared.rate = 2.0
    with pytest.raises(RecomputeMismatch, match="contents differ"):
        gradient(out, x)


@pytest.mark.parametrize("given", [iter([1.0, 2.0]), itertools.count(1), (rate for rate in (1.0, 2.0))])
def test_iterators_are_refused_before_anything_runs(given: Any) -> None:
    ran = []
    with pytest.raises(TypeError, match="iterator"):
        checkpoint(lambda x, rates: (ran.append(1), x * next(rates))[1], leaf(), given)
    with pytest.raises(TypeError, match="called 'given'"):
        checkpoint(lambda x: (ran.append(1), x * next(given))[1], leaf())
    assert not ran
    next(given)  # nothing was taken


def test_code_that_draws_late_draws_the_same() -> None:
    def work(x: Tensor, number: int) -> Tensor:
        return (x * (random.random() if number > 3 else 1.0)).sin()

    results = []
    for call in (lambda fn, *args: fn(*args), checkpoint):
        random.seed(0)
        h = x = leaf()
        for number in range(8):
            h = call(work, h, number)
        results.append(bits([gradient(h, x), torch.tensor(random.random())]))
    assert results[0] == results[1]


# ---- fit: attributes of modules


class MovingMean(Layer):
    """State in an attribute that is a plain tensor; `how` it is written."""

    rate = 1.0

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.settings = Settings()
        self.counts = {"calls": [0]}
        self.array = np.zeros(16, dtype=np.float32)
        self.mean = torch.zeros(16)
        self.means = [torch.zeros(16)]
        self.register_buffer("tracked", torch.zeros(16))
        self.hidden = [nn.BatchNorm1d(16)]  # not a submodule: kept out of the state_dict

    def forward(self, x: Tensor) -> Tensor:
        new = x.detach().mean(0)
        if self.how == "replaced":
            self.mean = self.mean * 0.9 + new
        elif self.how == "in place":
            self.mean.mul_(0.9).add_(new)
        elif self.how == "in a list":
            self.means[0] = self.means[0] * 0.9 + new
        elif self.how == "in an object":
            self.settings.shift = self.settings.shift * 0.9 + new
        elif self.how == "grown list":
            self.means = [*self.means[-3:], new]
        elif self.how == "appended":
            self.means.append(new)
        elif self.how == "counted":
            self.counts["calls"][0] += 1
            self.settings.rate += 1.0
        elif self.how == "array":
            self.array += new.numpy()
        elif self.how == "through data":
            self.tracked.data.mul_(0.9).add_(new)
        elif self.how == "hidden norm":
            x = self.hidden[0](x)
        shift = self.mean + sum(self.means) + self.settings.shift + torch.from_numpy(self.array.copy()) + self.tracked
        return super().forward(x * (self.rate * self.settings.rate + self.counts["calls"][0]) - shift.clone())

    def state(self) -> list[Tensor]:
        plain = [torch.tensor([self.settings.rate, self.counts["calls"][0]]), torch.from_numpy(self.array)]
        return [self.mean, *self.means, self.settings.shift, self.tracked, *self.hidden[0].buffers(), *plain]


GROWING = {"grown list", "appended"}  # hold more from step to step, all of which is read


def set_class_attribute(model: nn.Sequential, step: int) -> None:
    MovingMean.rate = 1.0 + step


def set_attributes(model: nn.Sequential, step: int) -> None:
    for block in model:
        block.settings.rate *= 1.1
        block.mean = block.mean * 1.1
        block.means[0] = block.means[0] + 0.1


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("change", [None, set_class_attribute, set_attributes])
@pytest.mark.parametrize(
    "how",
    [
        "read",
        "replaced",
        "in place",
        "in a list",
        "in an object",
        "grown list",
        "appended",
        "counted",
        "array",
        "through data",
        "hidden norm",
    ],
)
def test_attributes_of_a_fitted_model(how: str, change: Any, smallest: bool, hold: str) -> None:
    results = []
    for fitted in (False, True):
        torch.manual_seed(0)
        MovingMean.rate = 1.0
        model, x, budget = nn.Sequential(*[MovingMean(how) for _ in range(4)]), batch(), None
        if fitted:
            probe = fit(model, x, "1MiB", hold=hold)
            certificate = probe.plan.certificate
            probe.unfit()
            bytes_ = certificate.smallest_budget_bytes if smallest and how not in GROWING else 1 << 20
            budget = fit(model, x, bytes_, hold=hold, strategy="optimal" if smallest else "sqrt").budget
        result: list[bytes | None] = []
        for step in range(3):
            loss = model(x).square().mean()
            if change is not None:
                change(model, step)
            loss.backward()
            result += bits([loss, *(p.grad for p in model.parameters()), *(t for b in model for t in b.state())])
        results.append(result)
        assert budget is None or budget.used_bytes == 0
    MovingMean.rate = 1.0
    assert results[0] == results[1]


@pytest.mark.parametrize("hold", HOLDS)
def test_outputs_that_are_left_in_attributes_are_not_kept_alive(hold: str) -> None:
    """`self.last = h.detach()`, for others to look at: no forward reads the one before."""

    class Leaves(Layer):
        def forward(self, x: Tensor) -> Tensor:
            self.last = torch.tanh(self.up(x))
            self.seen = self.last.detach().clone()
            return x + self.down(self.last)

    model, x = nn.Sequential(*[Leaves() for _ in range(4)]), batch()
    fitted = fit(model, x, "1MiB", hold=hold, strategy="sqrt", strict=True)
    for _ in range(3):
        before = [
            weakref.ref(getattr(block, name)) for block in model for name in ("last", "seen") if hasattr(block, name)
        ]
        loss = model(x).square().mean()
        assert not any(ref() is not None for ref in before)
        loss.backward()
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
        assert fitted.budget.used_bytes == 0


def remove_hooks(model: nn.Sequential) -> None:
    for block in model:
        block._forward_hooks.clear()


def add_hooks(model: nn.Sequential) -> None:
    for block in model:
        block.up.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def other_submodules(model: nn.Sequential) -> None:
    for block in model:
        block.up = nn.Linear(16, 64)


@pytest.mark.parametrize("change", [remove_hooks, add_hooks, other_submodules])
@pytest.mark.parametrize("way", ["fit", "checkpoint"])
def test_hooks_and_submodules_are_those_of_forward(way: str, change: Callable[[nn.Sequential], None]) -> None:
    results = []
    for fitted in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(*[Layer() for _ in range(4)]), batch()
        for block in model:
            block.register_forward_hook(lambda module, args, out: out * 1.5)
        weights = list(model.parameters())
        if fitted and way == "fit":
            fit(model, x, "1MiB", strategy="sqrt")
        out = checkpoint(model, x) if fitted and way == "checkpoint" else model(x)
        loss = out.square().mean()
        change(model)
        loss.backward()
        found = bits(p.grad for p in weights)
        results.append((found, bits([model(x)]), [len(block._forward_hooks) for block in model]))
    assert results[0] == results[1]


def test_a_parameter_that_work_changes_itself_is_named() -> None:
    class Normed(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 16, max_norm=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.table(torch.arange(8)))

    x = batch()
    with pytest.raises(InvalidChain, match="changes its parameter 'weight' in place"):
        fit(nn.Sequential(Normed(), Normed()), x, "1MiB")
    out = checkpoint(Normed(), x)
    with pytest.raises(StateModified, match="by the checkpointed work itself"):
        out.sum().backward()


@pytest.mark.parametrize("way", ["fit", "checkpoint", "inside"])
def test_weights_that_several_blocks_share_by_a_cache_are_refused(way: str) -> None:
    class Within(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with parametrize.cached():
                return super().forward(x)

    kind = Within if way == "inside" else nn.Sequential
    model = nn.Sequential(*[kind(weight_norm(nn.Linear(16, 16)), nn.Tanh()) for _ in range(4)])
    x = batch()
    if way == "inside":
        model(x).sum().backward()
        expected = bits(p.grad for p in model.parameters())
        model.zero_grad(set_to_none=True)
        checkpoint(model, x).sum().backward()
        assert bits(p.grad for p in model.parameters()) == expected
        return
    budget = fit(model, x, "1MiB", strategy="sqrt").budget if way == "fit" else None
    with parametrize.cached(), pytest.raises(NotImplementedError, match=r"parametrize\.cached"):
        model(x) if way == "fit" else checkpoint(model, x)
    assert budget is None or budget.used_bytes == 0
