"""Parameters of the modules with inputs of every kind; see tests/inputs.py."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gpuckpt.nn as gnn
from tests.inputs import OWN, Call, Make, rows_of


def made(kind: type[nn.Module]) -> Any:
    def run(**arguments: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            module = kind(**arguments)
        weight = next(module.parameters())
        if not weight.is_meta:
            assert isinstance(module(torch.ones(2, arguments["in_features"], dtype=weight.dtype)), torch.Tensor)

    return run


DEVICE = {"device": OWN}  # torch's own answer
OPTIONS = {"norm": None, "norm_eps": 1e-5, "chunk_rows": None, "device": None, "dtype": None}
WIDTHS = {"in_features": 8, "hidden_features": 16, "out_features": 8, "bias": True}
CALLS = {
    "FusedLinear": Call(
        made(gnn.FusedLinear),
        names=DEVICE,
        in_features=8,
        out_features=16,
        bias=True,
        activation="gelu",
        dropout=0.0,
        **OPTIONS,
    ),
    "FusedMLP": Call(made(gnn.FusedMLP), names=DEVICE, activation="gelu", **WIDTHS, **OPTIONS),
    "fuse": Call(gnn.fuse, model=Make(nn.Identity), loss=False),
    "GatedMLP": Call(
        made(gnn.GatedMLP),
        names=DEVICE,
        activation="silu",
        gate_multiplier=1.0,
        down_multiplier=1.0,
        **WIDTHS,
        **OPTIONS,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_work(name):
    CALLS[name].works()


@pytest.mark.parametrize(("call", "parameter"), rows_of(CALLS))
def test_a_parameter_with_inputs_of_every_kind(call, parameter):
    call.check(parameter)
