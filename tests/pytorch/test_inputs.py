"""Parameters of fit, checkpoint, measure and their kin with inputs of every kind; see tests/inputs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gpuckpt import checkpoint, checkpoint_graph, fit, fitted, measure, once, unfit
from gpuckpt.segments import GraphCheckpointConfig, GraphSegment
from tests.inputs import OWN, Call, Make, rows_of


def model() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])


def rows() -> torch.Tensor:
    return torch.ones(4, 8)


def fit_used(**arguments: Any) -> None:
    made = fit(**arguments)
    if arguments["example_inputs"] is None:
        made(rows()).sum().backward()
    made.unfit()


def device_used(*, model: Any, optimizer: Any, **arguments: Any) -> None:
    if optimizer is torch.optim.SGD and isinstance(model, nn.Module):
        optimizer = optimizer([*model.parameters()] or [torch.zeros(1)], lr=0.1)
    fit(model, optimizer=optimizer, scope="device", **arguments).unfit()


def checkpoint_used(*, fn: Any, x: Any, **options: Any) -> None:
    out = checkpoint(fn, x, **options)
    if isinstance(out, torch.Tensor) and out.requires_grad and not out.is_complex():
        out.sum().backward()


FIT = {
    "example_inputs": Make(rows),
    "budget": "1MiB",
    "strategy": "optimal",
    "hold": "account",
    "preserve_rng_state": True,
    "verify": None,
    "repeats": 1,
    "host_budget": None,
    "live": 1,
    "strict": False,
    "group": None,
    "plan": None,
    "stages": (),
    "scope": "saved",
    "optimizer": None,
}
CALLS = {
    "fit": Call(fit_used, names={"example_inputs": OWN}, model=Make(model), **FIT),
    "checkpoint": Call(
        checkpoint_used,
        names={"fn": OWN, "x": OWN, "keep": OWN},
        fn=torch.sin,
        x=Make(lambda: torch.ones(4, requires_grad=True)),
        budget=None,
        preserve_rng_state=True,
        verify=None,
        keep=None,
        use_reentrant=None,
    ),
    "measure": Call(
        lambda *, model, x, **options: measure(model, x, **options),
        names={"x": OWN},
        model=Make(model),
        x=Make(rows),
        unit_bytes=1,
        repeats=1,
        fake=False,
        device="H100 SXM",
    ),
    "fit(scope='device')": Call(
        device_used,
        model=Make(model),
        example_inputs=Make(rows),
        budget="1MiB",
        optimizer=torch.optim.SGD,
        repeats=1,
        names={"example_inputs": OWN},
    ),
    "fitted": Call(fitted, model=Make(model)),
    "unfit": Call(unfit, model=Make(model)),
    "checkpoint_graph": Call(
        lambda **arguments: checkpoint_graph(**arguments)(rows()).sum().backward(),
        graph_module=Make(lambda: torch.fx.symbolic_trace(model())),
        config=GraphCheckpointConfig([GraphSegment(1, 2)]),
    ),
    "once": Call(lambda *, fn: once(fn), names={"fn": OWN}, fn=dict),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_work(name):
    CALLS[name].works()


@pytest.mark.parametrize(("call", "parameter"), rows_of(CALLS))
def test_a_parameter_with_inputs_of_every_kind(call, parameter):
    call.check(parameter)
