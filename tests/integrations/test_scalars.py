"""Scalars of a step through the writers of TensorBoard and Weights & Biases: what was measured, under the step that was given."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import gpuckpt
from gpuckpt.errors import CheckpointError
from gpuckpt.integrations import scalars
from gpuckpt.integrations.scalars import step_scalars, write_scalars
from tests.inputs import Call
from tests.pytorch.steps import batch, blocks


@pytest.fixture(scope="module")
def fitted() -> gpuckpt.Fitted:
    made = gpuckpt.fit(nn.Sequential(*blocks(6)), batch(), "45%", repeats=1)
    made(batch()).square().sum().backward()
    return made


def test_the_figures_are_those_of_the_ledger(fitted: Any) -> None:
    found = step_scalars(fitted)
    assert found["gpuckpt/held_gib"] * 2**30 == fitted.budget.peak_bytes > 0
    assert found["gpuckpt/budget_gib"] * 2**30 == fitted.budget.max_bytes
    assert found["gpuckpt/promised_gib"] * 2**30 == fitted.plan.certificate.peak_bytes
    assert 0 < found["gpuckpt/recompute_share"] < 1
    assert found["gpuckpt/deviations"] == 0
    assert "gpuckpt/host_held_gib" not in found
    assert all(type(value) is float for value in found.values())


def test_each_writer_gets_them_its_own_way(fitted: Any) -> None:
    class Board:
        def __init__(self) -> None:
            self.rows: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.rows.append((tag, scalar_value, global_step))

    class Run:
        def __init__(self) -> None:
            self.rows: list[tuple[dict[str, float], int]] = []

        def log(self, data: dict[str, float], step: int) -> None:
            self.rows.append((data, step))

    board, run = Board(), Run()
    write_scalars(board, fitted, 3)
    write_scalars(run, fitted, 4)
    expected = step_scalars(fitted)
    assert board.rows == [(name, value, 3) for name, value in expected.items()]
    assert run.rows == [(expected, 4)]
    with pytest.raises(TypeError, match="writer is a dict; expected TensorBoard's SummaryWriter"):
        write_scalars({}, fitted, 3)


def test_before_the_first_step_there_is_nothing_to_write() -> None:
    waiting = gpuckpt.fit(nn.Sequential(*blocks(4)), None, "1MiB")
    with pytest.raises(CheckpointError, match="nothing is planned yet"):
        step_scalars(waiting)


def test_what_tensorboard_reads_back(fitted: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        write_scalars(writer, fitted, 5)
    read = EventAccumulator(str(tmp_path)).Reload()
    for name, value in step_scalars(fitted).items():
        (event,) = read.Scalars(name)
        assert (event.step, event.value) == (5, pytest.approx(value, rel=1e-6))


def test_what_weights_and_biases_keeps(fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=str(tmp_path)) as run:
        write_scalars(run, fitted, 5)
        assert run.summary["gpuckpt/held_gib"] == step_scalars(fitted)["gpuckpt/held_gib"]


def test_the_examples_print_what_they_say() -> None:
    found = doctest.testmod(scalars, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted > 8


@pytest.mark.parametrize("parameter", ["fitted", "step"])
def test_a_parameter_with_inputs_of_every_kind(fitted: Any, parameter: str) -> None:
    """See tests/inputs.py."""

    class Board:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            assert type(step) is int

    call = Call(write_scalars, writer=Board(), fitted=fitted, step=1)
    call.works()
    call.check(parameter)
