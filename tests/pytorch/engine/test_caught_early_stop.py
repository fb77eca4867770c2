"""What ends a replay early may be caught on its way out, by TorchScript's interpreter or by the work: it is over all the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gpuckpt
from tests.pytorch.beside_plain import beside_plain
from tests.pytorch.steps import HOLDS

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")


def scripted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Callable[..., Tensor] = torch.jit.script(function)
    for _ in range(4):  # it compiles anew in its first runs, and adds up otherwise then
        x = torch.ones(8, 16, requires_grad=True)
        compiled(*((x, x[0], x, 0.1, True) if len(compiled.schema.arguments) > 1 else (x,))).sum().backward()  # type: ignore[attr-defined]
    return compiled


@scripted
def scripted_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / 1.41421))


@scripted
def scripted_bias_dropout(x: Tensor, bias: Tensor, residual: Tensor, rate: float, training: bool) -> Tensor:
    return residual + torch.nn.functional.dropout(torch.tanh(x + bias), p=rate, training=training)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)


class EndsInAScriptedFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return scripted_gelu(self.down(scripted_gelu(self.up(x))))


class EndsInAScriptedDropout(Block):
    def forward(self, x: Tensor) -> Tensor:
        return scripted_bias_dropout(self.down(torch.sigmoid(self.up(x))), self.down.bias, x, 0.1, self.training)


class CatchesEverything(Block):
    """As code does that tries one kernel, and then another."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(torch.sigmoid(self.up(x)))
        try:
            return x + torch.tanh(h)
        except:  # noqa: E722
            return x + torch.tanh(h).exp().sin()


class RaisesAnotherError(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.down(torch.sigmoid(self.up(x)))
        try:
            return x + torch.tanh(h)
        except BaseException as error:
            raise RuntimeError(f"failed for {tuple(x.shape)}") from error


KINDS = [EndsInAScriptedFunction, EndsInAScriptedDropout, CatchesEverything, RaisesAnotherError]


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("share", [0.6, None])
@pytest.mark.parametrize("kind", KINDS)
def test_under_a_plan(kind, share, hold):
    torch.manual_seed(0)
    beside_plain(
        nn.Sequential(*[kind() for _ in range(4)]), torch.randn(8, 16), share=share, fit_options={"hold": hold}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_under_a_checkpoint(kind):
    torch.manual_seed(0)
    block, budget = kind(), gpuckpt.CheckpointBudget("1MiB", device="cpu")
    for _ in range(4):
        x = torch.randn(8, 16, requires_grad=True)
        state = torch.get_rng_state()
        block(x).square().sum().backward()
        expected = [x.grad, *[p.grad for p in block.parameters()]]
        x.grad = None
        block.zero_grad()
        torch.set_rng_state(state)
        with budget:
            gpuckpt.checkpoint(block, x).square().sum().backward()
        assert budget.used_bytes == 0
        assert all(map(torch.equal, [x.grad, *[p.grad for p in block.parameters()]], expected))
        block.zero_grad()


def test_an_error_of_the_works_own_is_raised():
    class FailsWhenRunAgain(Block):
        def forward(self, x: Tensor) -> Tensor:
            if gpuckpt.is_recomputing():
                raise RuntimeError("of its own")
            return self.down(torch.tanh(self.up(x)))

    y = gpuckpt.checkpoint(FailsWhenRunAgain(), torch.randn(8, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="of its own"):
        y.sum().backward()


@pytest.mark.parametrize("make", [torch.jit.script, lambda block: torch.jit.trace(block, torch.randn(8, 16))])
def test_a_scripted_module_is_refused(make):
    """Its `training` and its buffers are in C++, where a recompute cannot put them back."""
    compiled = make(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)))
    x = torch.randn(8, 16, requires_grad=True)
    before = {name: value.clone() for name, value in compiled.state_dict().items()}
    with pytest.raises(NotImplementedError, match=r"'Sequential' as a torch\.jit\.ScriptModule.*torch\.compile"):
        gpuckpt.checkpoint(compiled, x)
    with pytest.raises(NotImplementedError, match="the module that it was made from"):
        gpuckpt.checkpoint(lambda x: compiled(x), x)
    model = nn.Sequential(nn.Linear(16, 16), compiled, nn.Linear(16, 16))
    with pytest.raises(NotImplementedError, match="the module that it was made from"):
        gpuckpt.fit(model, x, "1MiB")
    assert all(torch.equal(value, before[name]) for name, value in compiled.state_dict().items())
    assert model(x).shape == (8, 16)
