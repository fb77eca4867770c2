"""Parameters of StepLedger and plan_device with inputs of every kind; see tests/inputs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gpuckpt import StepLedger, explain_oom, plan_device
from tests.inputs import Call, Make, rows_of


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Some of the values are names of files."""
    monkeypatch.chdir(tmp_path)


CONFIG = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 11, "n_positions": 16}


def ledger_used(model: Any, optimizer: Any) -> None:
    with StepLedger(model, optimizer) as ledger:
        model(torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert sum(ledger.at_peak().values()) == ledger.peak_total_bytes() > 0


def explained(model: Any, optimizer: Any, save: Any) -> None:
    """Whatever `save` is, what goes on is the error of the step."""
    with pytest.raises(MemoryError), explain_oom(model, optimizer, save=save):
        raise MemoryError("full")


def with_ledger(method: str) -> Any:
    def call(**arguments: Any) -> None:
        model = nn.Linear(8, 4)
        with StepLedger(model) as ledger:
            model(torch.ones(2, 8)).sum().backward()
        getattr(ledger, method)(**arguments)

    return call


CALLS = {
    "StepLedger": Call(ledger_used, model=Make(lambda: nn.Linear(8, 4)), optimizer=None),
    "explain_oom": Call(explained, model=Make(lambda: nn.Linear(8, 4)), optimizer=None, save=None),
    "at_peak": Call(with_ledger("at_peak"), unit_bytes=512),
    "peak_total_bytes": Call(with_ledger("peak_total_bytes"), unit_bytes=512),
}
PLAN_DEVICE = Call(
    plan_device,
    names={"source": "the configuration"},
    source=CONFIG,
    batch=1,
    context=8,
    dtype="bf16",
    optimizer="adamw",
    device="H100 SXM",
    parallel="",
    budget=None,
    fused_loss=False,
)


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_work(name):
    CALLS[name].works()


@pytest.mark.parametrize(("call", "parameter"), rows_of(CALLS))
def test_a_parameter_with_inputs_of_every_kind(call, parameter):
    call.check(parameter)


@pytest.mark.parametrize("parameter", ["works", *PLAN_DEVICE.good])
def test_a_parameter_of_plan_device_with_inputs_of_every_kind(parameter):
    pytest.importorskip("transformers")
    if parameter == "works":
        PLAN_DEVICE.works()
    else:
        PLAN_DEVICE.check(parameter)
