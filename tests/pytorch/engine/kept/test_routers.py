"""The routers of Hugging Face's mixtures of experts: their choices in a recompute, as they are and given back by `once`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpuckpt
from tests.pytorch.steps import Tally, bits
from tests.zoo.language import COMMON, EXPERTS

transformers = pytest.importorskip("transformers")


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen3() -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=8))


class OnceRouter(nn.Module):
    """Routes as `router` does; of experts that are close, any may be taken, and another one when it is asked again."""

    def __init__(self, router: Any, decide: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.top_k, self.decide = router.weight, router.top_k, decide
        self.asked = Tally()

    def choose(self, scores: Tensor) -> Tensor:
        self.asked.count += 1
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(self.asked.count))
        return (scores.detach() + noise).topk(self.top_k).indices

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        chosen = self.decide(self.choose, logits)
        scores = logits.softmax(-1).gather(-1, chosen)
        return logits, scores / scores.sum(-1, keepdim=True), chosen


def step(model: nn.Module, call: Callable[[nn.Module], Any]) -> tuple[list[bytes | None], list[Tensor]]:
    """The bits of all gradients, and the experts that were chosen, in the order of the calls of routers."""
    chosen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda router, args, out: LIST.append(out[2]))
    LIST.clear()
    call(model)
    chosen += LIST
    return bits(parameter.grad for parameter in model.parameters()), chosen


LIST: list[Tensor] = []
TEXT = torch.arange(40).reshape(2, 20) % 60


def train(model: Any) -> None:
    model(input_ids=TEXT, labels=TEXT, use_cache=False).loss.backward()


def recompute_all(model: nn.Module) -> None:
    """Under the smallest budget that does."""
    example = {"input_ids": TEXT, "labels": TEXT, "use_cache": False}
    fitted = gpuckpt.fit(model, example, "1GiB")
    fitted = gpuckpt.fit(model, example, fitted.plan.certificate.smallest_budget_bytes)
    for layer in model.model.layers:
        if isinstance(layer.mlp.gate, OnceRouter):
            layer.mlp.gate.asked.count = 0
    LIST.clear()
    train(fitted)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


@pytest.mark.parametrize("made", [mixtral, qwen3])
def test_as_they_are_they_choose_the_same_again(made: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = made()
    expected, chosen = step(model, train)
    torch.manual_seed(0)
    got, again = step(made(), recompute_all)
    assert (got == expected) is True
    forward, recomputed = again[:4], again[4:]
    assert all(map(torch.equal, forward, chosen))
    assert len(recomputed) >= 3
    assert all(any(torch.equal(one, other) for other in forward) for one in recomputed)


@pytest.mark.parametrize("made", [mixtral, qwen3])
@pytest.mark.parametrize("decide", [gpuckpt.once, lambda fn, *args: fn(*args)], ids=["once", "again"])
def test_routers_whose_choices_flip(made: Callable[[], nn.Module], decide: Callable[..., Tensor]) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        found = made()
        for layer in found.model.layers:
            layer.mlp.gate = OnceRouter(layer.mlp.gate, decide)
        return found

    def is_as_plain() -> bool:  # a bool: to show where so many bytes differ takes an hour
        return step(model(), recompute_all)[0] == expected

    expected, _ = step(model(), train)
    if decide is gpuckpt.once:
        assert is_as_plain()
    else:  # other experts, or as many tokens to an expert as no plan and no forward had
        with pytest.raises((gpuckpt.CheckpointError, AssertionError)):
            assert is_as_plain()


@pytest.mark.parametrize("made", [mixtral, qwen3])
def test_their_choices_kept_without_a_change_to_their_code(made: Callable[[], nn.Module]) -> None:
    def train_checkpointed(model: Any) -> None:
        for layer in model.model.layers:
            layer.forward = functools.partial(
                gpuckpt.checkpoint, layer.forward, keep=[torch.ops.aten.topk.default], budget=budget
            )
        with Tops() as tops:
            train(model)
        assert tops.count == 4

    budget = gpuckpt.CheckpointBudget("1MiB", device="cpu")
    torch.manual_seed(0)
    expected, _ = step(made(), train)
    torch.manual_seed(0)
    assert step(made(), train_checkpointed)[0] == expected
    assert budget.used_bytes == 0


class Tops(TorchDispatchMode):
    """Counts how often top-k runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.count += op is torch.ops.aten.topk.default
        return op(*args, **(kwargs or {}))
