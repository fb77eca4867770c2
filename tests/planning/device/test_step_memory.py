"""The whole step's bytes against counts made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpuckpt.errors import BudgetExceeded
from gpuckpt.planning import Chain, Stage
from gpuckpt.planning.device.layout import ParallelLayout
from gpuckpt.planning.device.optimizers import OPTIMIZERS, optimizer_called
from gpuckpt.planning.device.parameters import ParameterShape, rounded_bytes
from gpuckpt.planning.device.pipeline_ranks import cut_blocks
from gpuckpt.planning.device.ranked_step import RankedStep
from gpuckpt.planning.device.step_memory import LOSS_BYTES, SET_ASIDE_BYTES, SET_ASIDE_NCCL_BYTES, StepMemory
from gpuckpt.planning.pipeline import step_seconds

MB = 1 << 20
BLOCKS = 4


def step(optimizer: str = "adamw", layout: ParallelLayout | None = None, rows: int = 1024) -> StepMemory:
    """Four blocks that save 8 MiB each and have a weight of 2 MiB, between an embedding of 4 MiB and a head of 6 MiB."""
    stages, storages = [Stage("prefix")], []
    for block in range(BLOCKS):
        storages += [MB, 7 * MB]
        stages.append(
            Stage(f"h.{block}", 1.0, 2.0, (2 * block, 2 * block + 1), (2 * block,) if block else (), output_bytes=MB)
        )
    stages.append(Stage("suffix", recomputable=False))
    parameters = [
        ParameterShape("wte.weight", (2048, 1024), 2, first=True),
        *(ParameterShape(f"h.{block}.mlp.weight", (rows, 1024), 2) for block in range(BLOCKS)),
        ParameterShape("head.weight", (3072, 1024), 2),
    ]
    return StepMemory(
        Chain(tuple(stages), tuple(storages), 512),
        tuple(parameters),
        optimizer_called(optimizer),
        layout or ParallelLayout(),
    )


def test_gradients_are_there_from_their_backward_on() -> None:
    memory = step()
    added = [stage.workspace_bytes // MB for stage in memory.chain_with_gradients.stages]
    assert added == [6 + 4 * 2 + 4, 6 + 4 * 2, 6 + 3 * 2, 6 + 2 * 2, 6 + 2, 6]
    assert memory.gradient_bytes == 18 * MB


def test_the_peak_is_that_of_a_step_walked_by_hand() -> None:
    memory = step("sgd")
    plain = memory.plan(1 << 40)
    # Weights, the 32 MiB that blocks save, the head's gradient, and what the last block's backward makes: its weight's gradient,
    # and the gradients of its output and of its input.
    assert plain.peak_bytes == SET_ASIDE_BYTES + LOSS_BYTES + (18 + 32 + 6 + 2 + 2) * MB
    assert plain.plan.certificate.recompute_s == 0
    tight = memory.plan(plain.peak_bytes - MB)
    assert tight.plan.certificate.recompute_s > 0
    assert tight.peak_bytes <= plain.peak_bytes - MB
    with pytest.raises(BudgetExceeded) as refused:
        memory.plan(tight.smallest_bytes - 1)
    assert refused.value.need == tight.smallest_bytes
    assert memory.plan(tight.smallest_bytes).peak_bytes <= tight.smallest_bytes


def test_the_optimizers_step_can_be_the_peak() -> None:
    foreach = step("adamw-foreach")
    least = SET_ASIDE_BYTES + (18 + 36 + 18 + 18) * MB  # weights, state, gradients, and a square root of one state
    with pytest.raises(BudgetExceeded) as refused:
        foreach.plan(least - 1)
    assert refused.value.need == least
    assert foreach.plan(least).peak_bytes == least


@pytest.mark.parametrize(
    ("name", "bytes_of_a_thousand", "bytes_of_a_million"),
    [
        ("sgd", 0, 0),
        ("sgd-momentum", 2000, 2_000_000),
        ("adamw", 4004, 4_000_004),
        ("adamw-foreach", 4000, 4_000_000),
        ("adamw-master", 12000, 12_000_000),
        ("adamw-8bit", 8000, 2_000_000 + 2 * 4 * 3907),
    ],
)
def test_state_of_a_bf16_parameter(name: str, bytes_of_a_thousand: int, bytes_of_a_million: int) -> None:
    assert sum(OPTIMIZERS[name].state(1000, 2)) == bytes_of_a_thousand
    assert sum(OPTIMIZERS[name].state(1_000_000, 2)) == bytes_of_a_million


def test_shards_are_padded_and_tensors_rounded() -> None:
    memory = step("sgd", ParallelLayout(fsdp=3), rows=1000)
    # 334 of 1000 rows, 683 of 2048, 1024 of 3072; the embedding and the head stay gathered.
    assert memory.weights == [683 * 2048, *[334 * 2048] * 4, 1024 * 2048]
    assert memory.gathered_bytes == 10 * MB
    assert memory.set_aside_bytes == SET_ASIDE_BYTES + SET_ASIDE_NCCL_BYTES
    last = memory.chain_with_gradients.stages[BLOCKS]
    whole = 1000 * 2048
    assert last.workspace_bytes == LOSS_BYTES + 6 * MB + 3 * whole + whole
    scalars = StepMemory(memory.chain, (ParameterShape("scale", (), 4),), optimizer_called("adamw"), ParallelLayout())
    assert scalars.resident_bytes == 4 * 512
    assert scalars.rounding_bytes == 4 * (512 - 4)


@pytest.mark.parametrize("wrong", ["ep=2", "fsdp", "fsdp=0", "fsdp=-1", "fsdp=2,fsdp=2", "tp=two", "8"])
def test_a_layout_that_is_none(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"parallel.*expected"):
        ParallelLayout.parse(wrong)


def test_layouts_and_optimizers_by_name() -> None:
    assert ParallelLayout.parse(" fsdp=8 , tp=2") == ParallelLayout(8, 2)
    assert ParallelLayout.parse("") == ParallelLayout()
    with pytest.raises(ValueError, match="'adam' is not known; known are sgd, sgd-momentum, adamw"):
        optimizer_called("adam")


def test_own_gradients_count_as_they_are_there_at_the_worst_moment() -> None:
    memory = step()
    block = replace(memory.chain.stages[2], workspace_bytes=5 * MB, gradients_bytes=MB)
    memory = replace(
        memory, chain=replace(memory.chain, stages=(*memory.chain.stages[:2], block, *memory.chain.stages[3:]))
    )
    later = 6 + 2 * 2
    assert memory.chain_with_gradients.stages[2].workspace_bytes == LOSS_BYTES + (5 + 1 + later) * MB
    block = replace(block, workspace_bytes=MB // 2, gradients_bytes=0)  # at the end of its backward it is more
    memory = replace(
        memory, chain=replace(memory.chain, stages=(*memory.chain.stages[:2], block, *memory.chain.stages[3:]))
    )
    assert memory.chain_with_gradients.stages[2].workspace_bytes == LOSS_BYTES + (2 + later) * MB


def test_ranks_of_a_pipeline_hold_their_own_and_what_is_in_flight() -> None:
    """Against the schedule played out: rank i of p keeps p - i micro-batches, one of them at its peak, and all its gradients."""
    names = ("embed", *(f"layers.{i}" for i in range(4)), "head")
    stages = [Stage(name, 1.0, 2.0, (n,), recomputable=name != "embed") for n, name in enumerate(names)]
    chain = Chain(tuple(stages), (8000,) * 6, 512)
    parameters = [ParameterShape("embed.weight", (100, 10), 2, first=True)]
    parameters += [ParameterShape(f"layers.{i}.weight", (64, 8), 2) for i in range(4)]
    whole = StepMemory(chain, (*parameters, ParameterShape("norm.weight", (10,), 2)), optimizer_called("sgd"))
    cuts = cut_blocks(chain, "layers.", 4, 2)
    split = RankedStep.split(whole, cuts, micro_batches=8)
    assert [[p.name for p in rank.parameters] for rank in split.memories] == [
        ["embed.weight", "layers.0.weight", "layers.1.weight"],
        ["layers.2.weight", "layers.3.weight", "norm.weight"],
    ]
    assert sum(sum(rank.weights) for rank in split.memories) == sum(whole.weights)
    for rank, in_flight in zip(split.memories, (2, 1), strict=True):
        saved = 3 * 8192
        gradients = rounded_bytes(rank.weights)
        passing = max(rounded_bytes([size]) for size in rank.weights)  # one that comes, before it is added
        plan = rank.plan(1 << 40)
        assert plan.plan.certificate.peak_bytes == in_flight * saved
        assert plan.plan.certificate.total_peak_bytes >= in_flight * saved + LOSS_BYTES + gradients
        assert plan.plan.certificate.total_peak_bytes <= in_flight * saved + LOSS_BYTES + gradients + passing
        least = rank.least_bytes
        assert rank.plan(least).peak_bytes == least < plan.peak_bytes
        with pytest.raises(BudgetExceeded) as caught:
            rank.plan(least - 1)
        assert caught.value.need == least
    assert split.least_bytes == split.memories[0].least_bytes
    seconds = step_seconds([3.0, 3.0], [6.0, 6.0], 8, "1f1b")
    assert split.plan(1 << 40).step_s(1e12) == pytest.approx(seconds, abs=1e-6)
