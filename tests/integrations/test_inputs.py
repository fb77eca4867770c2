"""Parameters of the Hugging Face integration with inputs of every kind; see tests/inputs.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from gpuckpt.integrations.transformers import BudgetCallback, enable
from tests.inputs import VALUES, Call, Make, rows_of


def blocks() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])


def enabled(**arguments: Any) -> None:
    fitted = enable(**arguments)
    if isinstance(arguments["model"], nn.Sequential):
        arguments["model"](torch.ones(4, 8)).sum().backward()
    fitted.unfit()


def trained(**arguments: Any) -> None:
    callback, model = BudgetCallback(**arguments), blocks()
    callback.on_train_begin(SimpleNamespace(world_size=1), None, None, model=model)
    model(torch.ones(4, 8)).sum().backward()
    callback.on_train_end(None, None, None)
    assert callback.fitted is not None
    assert not callback.fitted.active


CALLS = {
    "enable": Call(enabled, model=Make(blocks), budget="1MiB", strict=False),
    "BudgetCallback": Call(trained, budget="1MiB", live=1),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_work(name):
    CALLS[name].works()


@pytest.mark.parametrize(("call", "parameter"), rows_of(CALLS))
def test_a_parameter_with_inputs_of_every_kind(call, parameter):
    call.check(parameter)


def test_a_model_whose_budget_is_refused_keeps_checkpointing_of_its_own():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.activation_checkpointing_enable()
    for title in ("None", "a word", "1.5"):
        with pytest.raises((TypeError, ValueError), match="budget"):
            enable(model, VALUES[title]())
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()), title
    enable(model, "1MiB").unfit()
    assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
