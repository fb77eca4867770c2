"""Random plans over a small real chain: what the ledger and the forward counters say is what the simulator said."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from gpuckpt import Keep, Recompute, fit, simulate
from gpuckpt.planning import Node, tree_text
from gpuckpt.pytorch.fitted import Fitted
from gpuckpt.pytorch.planned import Planned
from tests.pytorch.mixed_blocks import COUNT, Model


def random_nodes(generator: random.Random, first: int, last: int, depth: int = 0) -> tuple[Node, ...]:
    """Stages first..last, split into runs that are kept or framed at random."""
    nodes: list[Node] = []
    while first <= last:
        end = generator.randint(first, last)
        if depth < 4 and generator.random() < 0.6:
            nodes.append(Recompute(random_nodes(generator, first, end, depth + 1)))
        else:
            end = first
            nodes.append(Keep(first))
        first = end + 1
    return tuple(nodes)


@pytest.fixture
def expected() -> tuple[Model, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(3)
    model = Model()
    x = torch.randn(5, 8)
    torch.manual_seed(4)
    loss = model(x)
    return model, x, [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def put_plan(fitted: Fitted, tree: tuple[Node, ...], peak_bytes: int) -> None:
    (key,) = fitted._maker.plans
    certificate = dataclasses.replace(fitted.plan.certificate, peak_bytes=peak_bytes)
    fitted._maker.plans[key] = Planned(
        fitted.latest.measured, dataclasses.replace(fitted.plan, tree=tree, certificate=certificate)
    )


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_random_trees_hold_and_run_what_the_simulator_says(expected, hold: str) -> None:
    model, x, plain = expected
    generator = random.Random(5)
    fitted = fit(model, x, "1MiB", hold=hold)
    chain = fitted.chain
    assert [stage.name for stage in chain.stages] == ["prefix", *(f"blocks.{i}" for i in range(COUNT)), "suffix"]
    nested = 0
    for _ in range(300 if hold == "account" else 30):
        tree = (Keep(0), *random_nodes(generator, 1, COUNT), Keep(COUNT + 1))
        said = simulate(chain, tree)
        put_plan(fitted, tree, said.peak_bytes)
        for block in model.blocks:
            block.tally.count = 0
        torch.manual_seed(4)
        loss = model(x)
        got = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
        text = tree_text(tree)
        assert fitted.budget.peak_bytes == said.peak_bytes, text
        assert [block.tally.count for block in model.blocks] == list(said.forward_counts[1:-1]), text
        assert fitted.budget.used_bytes == 0, text
        assert all(map(torch.equal, got, plain)), text
        nested += text.count("((") + text.count(" (")
    assert nested > 100 or hold == "pool"
    fitted.unfit()


def test_the_ledger_rises_and_falls_as_the_simulator_says(expected) -> None:
    model, x, _ = expected
    fitted = fit(model, x, "1MiB")
    tree = (
        Keep(0),
        Recompute((Keep(1), Recompute((Keep(2), Keep(3))))),
        Keep(4),
        Recompute((Keep(5), Keep(6), Keep(7))),
        Keep(8),
    )
    said = simulate(fitted.chain, tree)
    put_plan(fitted, tree, said.peak_bytes)
    model(x).backward()
    levels = [event.used_bytes for event in fitted.budget.events()]
    # Every turning point of the simulation is one of the ledger, in order.
    held = [bytes_ for _, bytes_ in said.trace]
    turns = [b for a, b, c in zip(held, held[1:], held[2:], strict=False) if (b - a) * (c - b) < 0]
    at = 0
    for turn in turns:
        assert turn in levels[at:], (turn, levels)
        at = levels.index(turn, at)
    fitted.unfit()
