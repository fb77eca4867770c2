"""Parameters of gpuckpt.functional with inputs of every kind; see tests/inputs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpuckpt import functional
from tests.inputs import VALUES, Call, rows_of


def used(operation: Any) -> Any:
    def run(**arguments: Any) -> None:
        assert isinstance(operation(X, **arguments), torch.Tensor)

    return run


X, W, B = torch.ones(4, 8), torch.ones(6, 8), torch.ones(6)
DOWN, DOWN_B = torch.ones(8, 6), torch.ones(8)
SIZES = {"chunk_rows": None, "scratch_bytes": None}
CALLS = {
    "linear": Call(
        used(functional.linear),
        weight=W,
        bias=B,
        activation="gelu",
        residual=torch.ones(4, 6),
        dropout=0.0,
        norm=None,
        **SIZES,
    ),
    "mlp": Call(
        used(functional.mlp),
        names={"w1": "w2", "b1": "bias of w1", "b2": "bias of w2"},
        w1=W,
        w2=DOWN,
        b1=B,
        b2=DOWN_B,
        activation="gelu",
        norm=None,
        **SIZES,
    ),
    "gated_mlp": Call(
        used(functional.gated_mlp),
        names={f"{name}_bias": f"bias of {name}_weight" for name in ("gate", "up", "down")},
        gate_weight=W,
        up_weight=W,
        down_weight=DOWN,
        gate_bias=B,
        up_bias=B,
        down_bias=DOWN_B,
        activation="silu",
        gate_multiplier=1.0,
        down_multiplier=1.0,
        norm=None,
        **SIZES,
    ),
    "linear_cross_entropy": Call(
        used(functional.linear_cross_entropy),
        weight=W,
        target=torch.zeros(4, dtype=torch.long),
        bias=B,
        ignore_index=-100,
        label_smoothing=0.0,
        z_loss=0.0,
        softcap=None,
        reduction="mean",
        norm=None,
        **SIZES,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_of_the_table_work(name):
    CALLS[name].works()


@pytest.mark.parametrize(("call", "parameter"), rows_of(CALLS))
def test_a_parameter_with_inputs_of_every_kind(call, parameter):
    call.check(parameter)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", VALUES)
def test_what_is_no_array_is_named(name: str, value: str) -> None:
    x = VALUES[value]()
    if isinstance(x, torch.Tensor) or hasattr(x, "__dlpack__"):
        pytest.skip("an array")
    with pytest.raises(TypeError, match=r"^x is .*expected Tensor"):
        getattr(functional, name)(x, **CALLS[name].good)
