"""A replay that ends in a fused operation ends before the operation's work, and nothing else changes."""

from __future__ import annotations

import itertools
import weakref
from queue import SimpleQueue

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import gpuckpt
from gpuckpt import CheckpointBudget, functional
from gpuckpt.pytorch.engine import early_stop
from gpuckpt.pytorch.ops import _register
from gpuckpt.pytorch.ops import norm as norm_module
from gpuckpt.pytorch.ops.norm import Norm
from tests.pytorch.ops.fused import OPS
from tests.pytorch.steps import HOLDS, Tally, bits

TARGET = torch.tensor([0, 3, -100, 1, 2])


def loss_of(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return functional.linear_cross_entropy(x, w, TARGET, b)


@pytest.fixture
def forwards(monkeypatch) -> list[str]:
    """The names of the fused forwards that have run."""
    ran: list[str] = []
    run = _register.FusedOp.run_forward

    def noted(op, *args):
        ran.append(f"gpuckpt::{op.name}_fwd")
        return run(op, *args)

    monkeypatch.setattr(_register.FusedOp, "run_forward", noted)
    normed = norm_module._normed

    def noted_norm(*args):
        ran.append("gpuckpt::norm_fwd")
        return normed(*args)

    monkeypatch.setattr(norm_module, "_normed", noted_norm)
    return ran


def announced_and_packed(monkeypatch, run) -> tuple[list[Tensor], list[Tensor]]:
    """What an operation says it will save, and what autograd is then given."""
    said: list[Tensor] = []
    packed: list[Tensor] = []

    def about_to_save(saved, inputs) -> None:
        needs = [isinstance(given, Tensor) and given.requires_grad for given in inputs]
        said.extend(tensor for tensor in saved(inputs, needs) if tensor is not None)
        packed.clear()  # what came before is not this operation's

    monkeypatch.setattr(_register, "about_to_save", about_to_save)
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        run()
    return said, packed


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("norm", [False, True])
def test_what_is_announced_is_what_autograd_saves(name, norm, monkeypatch):
    op = OPS[name]
    recipe = Norm("layer", nn.Parameter(torch.ones(7).double()), nn.Parameter(torch.zeros(7).double()))
    for needs in itertools.product((False, True), repeat=len(op.names)):
        if not any(needs):
            continue
        for activation, bias in itertools.product(("identity", "gelu"), (True, False)):
            operands = op.draw(bias=bias)
            for operand, need in zip(operands, needs, strict=True):
                if operand is not None:
                    operand.requires_grad_(need)
            options = {"activation": activation, "norm": recipe if norm else None}
            if name == "linear":
                options |= {"dropout": 0.5, "residual": torch.ones(5, 4).double()}
            said, packed = announced_and_packed(
                monkeypatch, lambda operands=operands, options=options: op.run(*operands, **options)
            )
            if not packed:  # nothing that has a value wants a gradient
                continue
            assert len(said) == len(packed)
            assert all(a is b for a, b in zip(said, packed, strict=True)), (needs, activation, bias)


def test_what_a_loss_announces_is_what_autograd_saves(monkeypatch):
    x, w, b = OPS["linear"].draw()
    said, packed = announced_and_packed(monkeypatch, lambda: loss_of(x, w, b))
    assert [*map(id, said)] == [*map(id, packed)]


BLOCKS = {name: lambda *operands, name=name: OPS[name].run(operands[0].sin(), *operands[1:]) for name in OPS}
BLOCKS["loss"] = lambda *operands: loss_of(operands[0].sin(), *operands[1:])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("hold", HOLDS)
def test_a_checkpoint_that_ends_in_a_fused_operation_runs_its_forward_once(block, hold, forwards):
    operands = OPS["linear" if block == "loss" else block].draw()
    run = BLOCKS[block]

    def gradients(call) -> list[Tensor]:
        y = call(*operands)
        return [y.detach(), *torch.autograd.grad(y, operands, torch.ones_like(y))]

    expected = gradients(run)
    forwards.clear()
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    with budget:
        got = gradients(lambda *operands: gpuckpt.checkpoint(run, *operands))
    assert bits(got) == bits(expected)
    assert len(forwards) == 1
    assert budget.used_bytes == 0
    # What comes after is waited for as well: then its result is needed.
    forwards.clear()
    gradients(lambda *operands: gpuckpt.checkpoint(lambda *operands: run(*operands).exp(), *operands))
    assert len(forwards) == 2


def test_of_two_fused_operations_the_first_runs_again(forwards):
    x, w1, b1, w2, b2 = OPS["mlp"].draw()

    def both(x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, w1, b1, activation="gelu"), w2, b2, activation="silu")

    expected = torch.autograd.grad(both(x).sum(), x)
    forwards.clear()
    got = torch.autograd.grad(gpuckpt.checkpoint(both, x).sum(), x)
    assert bits(got) == bits(expected)
    assert len(forwards) == 3


def test_what_arrives_early_is_verified_too():
    x, *weights = OPS["mlp"].draw()
    tally = Tally()

    def changing(x: Tensor) -> Tensor:
        tally.count += 1
        return OPS["mlp"].run(x * tally.count, *weights)

    y = gpuckpt.checkpoint(changing, x, verify="bitwise")
    with pytest.raises(gpuckpt.RecomputeMismatch, match="contents differ"):
        y.sum().backward()
    y = gpuckpt.checkpoint(lambda x: OPS["mlp"].run(x.sin(), *weights), x)
    with torch.no_grad():
        weights[0].mul_(2)
    with pytest.raises(gpuckpt.SavedTensorModified):
        torch.autograd.grad(y.sum(), x)


def test_the_same_bytes_are_held(monkeypatch):
    x, *weights = (operand.detach().requires_grad_() for operand in OPS["mlp"].draw(64, 32, 48, 16))

    def peak() -> int:
        budget = CheckpointBudget("1MiB", device="cpu")
        with budget:
            y = gpuckpt.checkpoint(lambda x: OPS["mlp"].run(x.sin().exp(), *weights), x * 2)
            held = budget.used_bytes
            y.sum().backward()
        assert held == x.nbytes
        assert budget.used_bytes == 0
        return budget.peak_bytes

    with_stop = peak()
    monkeypatch.setattr(_register, "about_to_save", lambda saved, inputs: None)
    assert peak() == with_stop


def test_hooks_inside_the_checkpointed_work_still_see_what_is_saved(forwards):
    x, *weights = OPS["mlp"].draw()
    seen: SimpleQueue[Tensor] = SimpleQueue()  # a list would be put back after the recompute

    def run(x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda t: seen.put(t) or t, lambda t: t):
            return OPS["mlp"].run(x, *weights)

    expected = torch.autograd.grad(OPS["mlp"].run(x * 2, *weights).sum(), x)
    forwards.clear()
    y = gpuckpt.checkpoint(lambda x: run(x * 2).exp().log(), x)
    got = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, expected)
    assert len(forwards) == 2
    assert seen.qsize() == 2 * 5


def test_a_checkpoint_within_a_checkpoint(forwards):
    x, *weights = OPS["mlp"].draw()

    def inner(x: Tensor) -> Tensor:
        return OPS["mlp"].run(x.sin(), *weights)

    def outer(x: Tensor) -> Tensor:
        return gpuckpt.checkpoint(inner, x.cos())

    expected = torch.autograd.grad(inner(x.cos()).sum(), x)
    forwards.clear()
    got = torch.autograd.grad(gpuckpt.checkpoint(outer, x).sum(), x)
    assert bits(got) == bits(expected)
    assert (
        len(forwards) == 1
    )  # the outer replay ends where the inner input is saved, the inner one before the operation


def test_no_replay_no_effect():
    """A forward outside of any replay, and one without gradients inside of one, are never cut short."""
    x, *weights = OPS["mlp"].draw()

    class Never:
        def pack(self, tensor: Tensor) -> Tensor:
            return tensor

        def arrive(self, tensors) -> None:
            raise AssertionError("nobody waits")

    never = Never()
    OPS["mlp"].run(x, *weights)
    with early_stop.replaying(never):
        OPS["mlp"].run(x, *weights)  # its hook is not the active one
        with saved_tensors_hooks(never.pack, lambda t: t):
            with torch.no_grad():
                OPS["mlp"].run(x, *weights)
            with pytest.raises(AssertionError, match="nobody waits"):
                OPS["mlp"].run(x, *weights)


def test_a_replay_whose_end_was_lost_is_not_kept(monkeypatch):
    """As where Ctrl-C ends `__exit__` before its first line."""
    x, *weights = OPS["mlp"].draw()

    class Abandoned:
        def pack(self, tensor: Tensor) -> Tensor:
            return tensor

    monkeypatch.setattr(early_stop._current, "replay", None, raising=False)
    replay = Abandoned()
    early_stop.replaying(replay).__enter__()
    gone = weakref.ref(replay)
    del replay
    assert gone() is None
    OPS["mlp"].run(x, *weights)
