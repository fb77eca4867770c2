"""A recompute sees what forward saw, or says what has changed; and it leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpuckpt import RecomputeMismatch, StateModified, checkpoint, fit
from tests.pytorch.steps import bits

GENERATOR = torch.Generator()
X = torch.linspace(-1, 1, 128).reshape(8, 16)


class Block(nn.Module):
    """A layer whose result depends on everything that a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.dropout = nn.Dropout(0.1)
        self.active = 0
        self.scale = 1.0
        self.act = torch.tanh
        self.options = {"shift": 0.5}
        self.register_buffer("c", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a[self.active](x + self.c)) * self.scale + self.options["shift"]
        return x + self.dropout(h.sin())


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(6)])


class ByHand(nn.Module):
    """Every block of a model under `checkpoint`, called in one of the ways that people call it."""

    def __init__(self, inner: nn.Sequential, how: str) -> None:
        super().__init__()
        self.inner = inner
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inner:
            if self.how == "module":
                x = checkpoint(block, x)
            elif self.how == "method":
                x = checkpoint(block.forward, x)
            elif self.how == "closure":
                x = checkpoint(lambda x, block=block: block(x), x)
            elif self.how == "partial":
                x = checkpoint(partial(nn.Module.__call__, block), x)
            else:
                x = checkpoint(lambda x, f: f(x), x, block)
        return x


def fitted(inner: nn.Sequential) -> nn.Module:
    fit(inner, X, "1MiB", strategy="sqrt")
    return inner


WAYS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "fit": fitted,
    **{how: partial(ByHand, how=how) for how in ("module", "method", "closure", "partial", "argument")},
}
ways = pytest.mark.parametrize("way", WAYS)


def gradients(inner: nn.Module, outer: nn.Module, between: Callable[[nn.Module], object] = lambda m: None):
    inner.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    GENERATOR.manual_seed(1)
    loss = outer(X).square().mean()
    between(inner)
    loss.backward()
    return bits([loss, *(p.grad for p in inner.parameters())])


# ---- what can be as it was


def _set(name: str, value: object) -> Callable[[nn.Module], None]:
    def change(inner: nn.Module) -> None:
        for block in inner:
            setattr(block, name, value)

    return change


RESTORED: dict[str, Callable[[nn.Module], object]] = {
    "eval": lambda inner: inner.eval(),
    "dropout rate": lambda inner: [setattr(block.dropout, "p", 0.5) for block in inner],
    "attribute": _set("scale", 2.0),
    "adapter": _set("active", 1),
    "function": _set("act", torch.sigmoid),
    "entry of a dict": lambda inner: [block.options.update(shift=3.0) for block in inner],
    "another dict": _set("options", {"shift": 3.0}),
    "a new attribute": _set("note", "seen"),
    "another buffer": lambda inner: [setattr(block, "c", torch.zeros(16)) for block in inner],
    "frozen": lambda inner: [block.a[0].requires_grad_(False) for block in inner[2:4]],
    "another parameter": lambda inner: [
        setattr(block.a[0], "bias", nn.Parameter(torch.full((16,), 0.3))) for block in inner[:0]
    ],
}


@ways
@pytest.mark.parametrize("change", RESTORED)
def test_what_changes_between_forward_and_backward_is_as_it_was(change, way):
    plain, ours = model(), model()
    expected = gradients(plain, plain, RESTORED[change])
    outer = WAYS[way](ours)
    assert gradients(ours, outer, RESTORED[change]) == expected
    for mine, theirs in zip(ours.modules(), plain.modules(), strict=True):  # and the change has stayed
        assert mine.training == theirs.training
        assert {k: v for k, v in vars(mine).items() if isinstance(v, int | float | str)} == {
            k: v for k, v in vars(theirs).items() if isinstance(v, int | float | str)
        }


@ways
def test_functional_call(way):
    plain, ours = model(), model()
    outer = WAYS[way](ours)
    prefix = "" if way == "fit" else "inner."
    found = []
    for inner, called, start in ((plain, plain, ""), (ours, outer, prefix)):
        weights = {start + n: (2 * p).detach().requires_grad_() for n, p in inner.named_parameters()}
        torch.manual_seed(1)
        out = functional_call(called, weights, (X,)).square().mean()
        found.append(bits(torch.autograd.grad(out, list(weights.values()), allow_unused=True)))
    assert found[0] == found[1]


@pytest.mark.parametrize("way", ["fit", "module", "closure"])
def test_weights_that_are_computed(way):
    """An inner step of MAML: the blocks run with weights that are no leaves, and gradients go through to the real ones."""
    plain, ours = model(), model()
    outer = WAYS[way](ours)
    found = []
    for inner, called, start in ((plain, plain, ""), (ours, outer, "" if way == "fit" else "inner.")):
        inner.zero_grad(set_to_none=True)
        weights = {start + n: p * 1.5 + 0.1 for n, p in inner.named_parameters()}
        torch.manual_seed(1)
        functional_call(called, weights, (X,)).square().mean().backward()
        found.append(bits(p.grad for p in inner.parameters()))
    assert found[0] == found[1]


@ways
def test_two_adapters_and_one_backward(way):
    plain, ours = model(), model()
    outer = WAYS[way](ours)
    found = []
    for inner, called in ((plain, plain), (ours, outer)):
        torch.manual_seed(1)
        _set("active", 0)(inner)
        first = called(X).square().mean()
        _set("active", 1)(inner)
        (first + called(X).square().mean()).backward()
        found.append(bits(p.grad for p in inner.parameters()))
    assert found[0] == found[1]


# ---- random numbers


class Draws(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.how = how
        self.own = torch.Generator()
        self.rng = np.random.default_rng(0)
        self.python = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "python":
            noise: float | Tensor = random.random()
        elif self.how == "numpy":
            noise = torch.from_numpy(np.random.rand(8, 16).astype("f4"))
        elif self.how == "global generator":
            noise = torch.rand(8, 16, generator=GENERATOR)
        elif self.how == "own generator":
            noise = torch.rand(8, 16, generator=self.own)
        elif self.how == "own numpy":
            noise = torch.from_numpy(self.rng.random((8, 16)).astype("f4"))
        else:
            noise = self.python.random()
        return torch.tanh(self.linear(x + noise))


@pytest.mark.parametrize("way", ["fit", "module", "closure"])
@pytest.mark.parametrize("how", ["python", "numpy", "global generator", "own generator", "own numpy", "own python"])
def test_the_same_random_numbers(how, way):
    torch.manual_seed(0)
    plain = nn.Sequential(*[Draws(how) for _ in range(6)])
    ours = copy.deepcopy(plain)
    for block, twin in zip(plain, ours, strict=True):
        block.own.manual_seed(3)
        twin.own.manual_seed(3)
    outer = WAYS[way](ours)
    for _ in range(4):  # beyond the calls that are watched
        assert gradients(ours, outer) == gradients(plain, plain)
    assert random.random() == (random.seed(1), [random.random() for _ in range(7 if how == "python" else 1)])[1][-1]


# ---- settings of torch


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).reshape(1, 2, 8, 8)
        return x + nn.functional.scaled_dot_product_attention(h, h, h).reshape(8, 16) * torch.ones(())


CONTEXTS = {
    "sdpa": lambda: sdpa_kernel(SDPBackend.MATH),
    "device": lambda: torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_that_are_left_before_backward(context):
    torch.manual_seed(0)
    plain = nn.Sequential(*[Attends() for _ in range(4)])
    ours = copy.deepcopy(plain)
    found = []
    for inner, outer in ((plain, plain), (ours, ByHand(ours, "module"))):
        with CONTEXTS[context]():
            loss = outer(X).square().mean()
        loss.backward()
        found.append(bits(p.grad for p in inner.parameters()))
    assert found[0] == found[1]


def test_the_default_dtype():
    def work(x: Tensor) -> Tensor:
        return (x * torch.full((), 0.1)).sin()  # a tensor of the default dtype

    found = []
    for call in (work, lambda x: checkpoint(work, x)):
        x = X.double().requires_grad_()
        torch.set_default_dtype(torch.float64)
        try:
            out = call(x)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(bits(torch.autograd.grad(out.sum(), x)))
        assert torch.get_default_dtype() is torch.float32
    assert found[0] == found[1]


# ---- what cannot be as it was


@torch.no_grad()
def _buffer(inner: nn.Module) -> None:
    for block in inner:
        block.c.mul_(0.5)


@torch.no_grad()
def _bias(inner: nn.Module) -> None:
    for block in inner:
        block.a[0].bias.add_(0.5)


def _data(inner: nn.Module) -> None:
    for block in inner:
        block.a[0].bias.data = block.a[0].bias.data + 0.5


@ways
@pytest.mark.parametrize(
    ("change", "named"),
    [(_buffer, "buffer 'c' of Block"), (_bias, "parameter 'bias' of Linear"), (_data, "parameter 'bias' of Linear")],
)
def test_bytes_that_changed_are_named(change, named, way):
    ours = model()
    outer = WAYS[way](ours)
    with pytest.raises(StateModified, match=named) as caught:
        gradients(ours, outer, change)
    assert isinstance(caught.value, RecomputeMismatch)
    del caught
    fresh = model()
    ours.load_state_dict(fresh.state_dict())
    assert gradients(ours, outer) == gradients(fresh, fresh)


# ---- no trace


class Counts(nn.Module):
    """Counts its calls, and depends on the count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.calls = 0
        self.log: list[int] = []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        with torch.no_grad():
            self.seen += 1
        return torch.tanh(self.linear(x)) * self.calls * self.seen


@pytest.mark.parametrize("way", ["module", "closure", "fit"])
def test_counters_count_once(way):
    torch.manual_seed(0)
    plain = nn.Sequential(*[Counts() for _ in range(4)])
    ours = copy.deepcopy(plain)
    outer = WAYS[way](ours)
    for _ in range(4):
        assert gradients(ours, outer) == gradients(plain, plain)
        for mine, theirs in zip(ours, plain, strict=True):
            assert (mine.calls, mine.log, float(mine.seen)) == (theirs.calls, theirs.log, float(theirs.seen))


NORMS = {
    "batch": lambda: nn.BatchNorm1d(16),
    "cumulative": lambda: nn.BatchNorm1d(16, momentum=None),
    "instance": lambda: nn.InstanceNorm1d(8, track_running_stats=True),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
}


@pytest.mark.parametrize("way", ["module", "closure", "method"])
@pytest.mark.parametrize("norm", NORMS)
def test_statistics_are_updated_once(norm, way):
    torch.manual_seed(0)
    plain = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), NORMS[norm](), nn.Tanh()) for _ in range(3)])
    ours = copy.deepcopy(plain)
    outer = ByHand(ours, way)
    for _ in range(3):
        assert gradients(ours, outer) == gradients(plain, plain)
        for (name, mine), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(mine, theirs), name
        assert [m.momentum for m in ours.modules() if hasattr(m, "momentum")] == [
            m.momentum for m in plain.modules() if hasattr(m, "momentum")
        ]


class InstallsHooks(nn.Module):
    """Installs its hooks when it first runs, as libraries do to record hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.installed = False
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            for block in self.blocks:
                block.register_forward_hook(lambda module, args, out: self.seen.append(out))
            self.installed = True
        self.seen.clear()
        for block in self.blocks:
            x = block(x)
        return torch.stack(self.seen).sum(0)


@pytest.mark.parametrize("way", ["fit", "whole"])
def test_hooks_that_a_first_run_installs(way):
    torch.manual_seed(0)
    plain = InstallsHooks()
    ours = copy.deepcopy(plain)
    if way == "fit":
        fit(ours, X, "1MiB", strategy="every")
    outer = ours if way == "fit" else lambda x: checkpoint(ours, x)
    for _ in range(3):
        assert gradients(ours, outer) == gradients(plain, plain)
        assert len(ours.seen) == 4


def test_a_class_that_no_module_defines():
    """Code that is run from text: its functions have no module."""
    names: dict[str, object] = {"nn": nn}
    exec("class Doubled(nn.Linear):\n    def forward(self, x):\n        return super().forward(2 * x)", names)
    torch.manual_seed(0)
    block = names["Doubled"](16, 16)
    assert gradients(block, lambda x: checkpoint(block, x)) == gradients(block, block)
