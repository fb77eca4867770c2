"""Whose bytes are charged: the caller's data by the part that a model is given, leaves that a forward makes like anything else,
and nothing that another checkpoint hides."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from gpuckpt import CheckpointBudget, InvalidChain, fit
from tests.pytorch.beside_plain import beside_plain
from tests.pytorch.steps import Layer, bits

WIDTH = 16


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.layers = nn.Sequential(*[Layer() for _ in range(5)])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens)).square().mean()


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer() for _ in range(6)])


# ---- the caller's data


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_micro_batches_are_parts_of_a_batch(share: float, hold: str) -> None:
    ours = layers()
    plain = copy.deepcopy(ours)
    batch = torch.randn(32, WIDTH)
    probe = fit(ours, torch.randn(8, WIDTH), "16MiB", hold=hold)
    least, most = probe.plan.certificate.smallest_budget_bytes, probe.plan.certificate.peak_bytes
    fitted = fit(ours, torch.randn(8, WIDTH), least + int(share * (most - least)), hold=hold)
    for part in batch.chunk(4):
        ours(part).square().mean().backward()
        plain(part).square().mean().backward()
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert bits(p.grad for p in ours.parameters()) == bits(p.grad for p in plain.parameters())
    assert not fitted.deviations
    assert fitted.budget.used_bytes == 0


SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda data: data[8:16],
    "columns": lambda data: data.view(-1, 2 * WIDTH)[:8, :WIDTH],
    "every other row": lambda data: data[0:16:2],
}


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize("name", SLICES)
def test_a_slice_of_a_data_set_costs_its_own_bytes(name: str, hold: str) -> None:
    part = SLICES[name](torch.randn(4000, WIDTH))
    whole = fit(layers(), part.clone(), "16MiB", hold=hold).plan.certificate
    sliced = fit(layers(), part, "16MiB", hold=hold).plan.certificate
    assert sliced.smallest_budget_bytes == whole.smallest_budget_bytes
    beside_plain(layers(), part, budget=whole.smallest_budget_bytes, fit_options={"hold": hold})


def test_tokens_out_of_a_data_set() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 32, (5000,))[16:48]
    least = fit(Tokens(), tokens.clone(), "16MiB").plan.certificate.smallest_budget_bytes
    beside_plain(Tokens(), tokens, budget=least)


def test_a_slice_that_is_changed_in_place_is_noticed() -> None:
    model, data = layers(), torch.randn(4000, WIDTH)
    fit(model, data[:8], "16MiB", hold="pool")
    loss = model(data[:8]).sum()
    data.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


# ---- leaves that a forward makes


class MadeByHook(Tokens):
    """Adapters over a frozen embedding: its output is made a leaf that requires a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.weight.requires_grad_(False)
        self.embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())


class MadeInForward(Tokens):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens).detach().requires_grad_()).square().mean()


class MadeBetween(Tokens):
    """Layers are trained apart from each other: what one is given is cut from what came before."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        losses = []
        for layer in self.layers:
            x = layer(x.detach().requires_grad_())
            losses.append(x.square().mean())
        return torch.stack(losses).sum()


@pytest.mark.parametrize("share", [None, 1.0])
@pytest.mark.parametrize("build", [MadeByHook, MadeInForward, MadeBetween])
def test_leaves_that_forward_makes_are_charged(build: type[nn.Module], share: float | None) -> None:
    torch.manual_seed(0)
    model, tokens = build(), torch.randint(0, 32, (8,))
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    known = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens)
    truth = sum(nbytes for storage, nbytes in held.items() if storage not in known)
    loss.backward()
    model.zero_grad()
    fitted = fit(model, tokens, "16MiB")
    assert fitted.plan.certificate.peak_bytes == truth
    fitted.unfit()
    if share is None:
        # What is cut off dies at once; a plan counts it for as long as the code between two stages runs.
        exact = build is MadeByHook
        beside_plain(model, tokens, budget=fitted.plan.certificate.smallest_budget_bytes, exact=exact)


def test_an_input_that_is_trained_is_the_callers() -> None:
    model, x = layers(), torch.randn(8, WIDTH, requires_grad=True)
    fitted = fit(model, x, "16MiB")
    frozen = fit(layers(), x.detach(), "16MiB").plan.certificate.peak_bytes
    assert fitted.plan.certificate.peak_bytes == frozen - x.nbytes
    model(x).sum().backward()
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert x.grad is not None


# ---- another checkpoint inside


class Checkpointing(Layer):
    gradient_checkpointing = True
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing:
            return torch_checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return super().forward(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_torchs_own_checkpoint_inside_is_refused(reentrant: bool) -> None:
    model, x = nn.Sequential(*[Checkpointing() for _ in range(4)]), torch.randn(8, WIDTH, requires_grad=True)
    for layer in model:
        layer.reentrant = reentrant
    with pytest.raises(InvalidChain, match=r"torch.utils.checkpoint.*gradient_checkpointing_disable"):
        fit(model, x, "1MiB")
    model(x).sum().backward()  # it runs plainly, as before
    for layer in model:
        layer.gradient_checkpointing = False
    fitted = fit(model, x, "1MiB")
    model(x).sum().backward()
    for layer in model:
        layer.gradient_checkpointing = True
    with pytest.raises(InvalidChain, match="gradient_checkpointing_disable"):
        model(x)
    assert fitted.budget.used_bytes == 0


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_two_fitted_models_in_a_row_share_one_budget(hold: str) -> None:
    """What the other one holds breaks no promise, and is no reason to measure again for ever."""

    class Counted(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x)

    def tower() -> nn.Sequential:
        return Counted(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])

    torch.manual_seed(0)
    first, second = tower(), tower()
    plain = copy.deepcopy(first), copy.deepcopy(second)
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    x = torch.randn(4, 8)
    one, two = fit(first, x, budget), fit(second, torch.randn(4, 8, requires_grad=True) * 1, budget)
    for step in range(8):
        if step == 6:
            Counted.calls = 0
        for a, b in ((one, two), plain):
            b(a(x)).square().sum().backward()
        assert budget.used_bytes == 0
    for ours, theirs in zip((first, second), plain, strict=True):
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert Counted.calls == 2 * 4, "two models, twice as planned and twice plainly, and nothing measured"
