"""The reference vectors: float32 to 1e-6, integers exactly."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from gpuckpt.segments import (
    CheckpointedPipeline,
    CheckpointStrategy,
    GraphCheckpointConfig,
    LinearSegment,
    plan_recomputation,
)
from gpuckpt.segments.lcg import lcg_states

TOLERANCE = 1e-6


def sequential_states(seed: int, count: int) -> list[int]:
    """The LCG as it is written down, one state after the other."""
    states, state = [], seed
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        states.append(state)
    return states


@pytest.mark.parametrize("seed", [0, 1, 42, 2**63, 2**64 - 1, 2**64 + 5, -3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 100, 2**14 - 1, 2**14, 2**14 + 1, 3 * 2**14 + 77])
def test_states_are_those_of_the_sequential_generator(seed: int, count: int) -> None:
    assert lcg_states(seed, count).tolist() == sequential_states(seed, count)


@pytest.mark.parametrize("kind", ["linear_init", "segment_init"])
def test_initial_weights_and_outputs(vectors: dict[str, Any], lib: Any, kind: str) -> None:
    for case in vectors[kind]:
        like = lib.array([0.0])
        if kind == "linear_init":
            segment = LinearSegment.random_init(case["in"], case["out"], case["seed"], like=like)
        else:
            segment = LinearSegment.init_lcg("a", case["in"], case["out"], case["seed"], like=like)
        assert lib.owns(segment.weights)
        np.testing.assert_allclose(lib.numpy(segment.weights).ravel(), case["w"], atol=TOLERANCE, rtol=0)
        y = segment.forward(lib.array(case["x"]))
        np.testing.assert_allclose(lib.numpy(y), case["y"], atol=TOLERANCE, rtol=0)
        batch = segment.forward(lib.array([case["x"], case["x"]]))
        np.testing.assert_allclose(lib.numpy(batch), [case["y"]] * 2, atol=TOLERANCE, rtol=0)


def test_the_interpreted_kernel_gives_the_same_outputs(vectors: dict[str, Any], interpreted_kernels: None) -> None:
    import torch

    for case in vectors["linear_init"]:
        segment = LinearSegment.random_init(case["in"], case["out"], case["seed"], like=torch.zeros(1))
        y = segment.forward(torch.tensor(case["x"]))
        np.testing.assert_allclose(y.numpy(), case["y"], atol=TOLERANCE, rtol=0)


def test_selected_layers(vectors: dict[str, Any]) -> None:
    strategies = {
        "every": CheckpointStrategy.every(),
        "sqrt": CheckpointStrategy.sqrt(),
        "none": CheckpointStrategy.none(),
    }
    for total, name, expected in vectors["select"]:
        strategy = strategies.get(name) or CheckpointStrategy.every_nth(int(name.removeprefix("every_nth_")))
        assert strategy.select_layers(total) == expected, (total, name)


def test_pipeline_sums_and_outputs(vectors: dict[str, Any], lib: Any) -> None:
    for case in vectors["pipeline"]:
        dims = case["dims"]
        segments = [
            LinearSegment.init_lcg(f"s{k}", dims[k], dims[k + 1], k, like=lib.array([0.0]))
            for k in range(len(dims) - 1)
        ]
        pipeline = CheckpointedPipeline(segments)
        assert pipeline.num_segments() == len(dims) - 1
        assert pipeline.total_checkpoint_memory(dims[0]) == case["ckpt"]
        assert pipeline.total_full_memory() == case["full"]
        assert pipeline.overall_savings(dims[0]) == pytest.approx(case["savings"], abs=TOLERANCE)
        y = pipeline.forward(lib.array(case["x"]))
        np.testing.assert_allclose(lib.numpy(y), case["y"], atol=TOLERANCE, rtol=0)


def test_uniform_ranges_and_their_plans(vectors: dict[str, Any]) -> None:
    for case in vectors["uniform"]:
        config = GraphCheckpointConfig.uniform(case["n"], case["k"])
        assert [[s.start_node, s.end_node] for s in config.segments] == case["segments"]
        assert plan_recomputation(case["n"], config) == case["plan"]
        assert [config.should_checkpoint(k) for k in range(case["n"])] == case["plan"]


@pytest.mark.timed
def test_a_large_layer_initialises_well_under_a_second() -> None:
    seconds = []
    for _ in range(2):  # the other core may be busy: the better of two
        start = time.process_time()
        LinearSegment.random_init(4096, 4096, 7)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.7, f"4096 x 4096 took {min(seconds):.2f} s of CPU time"


@pytest.mark.timed
def test_a_million_nodes_plan_well_under_a_second() -> None:
    seconds = []
    for _ in range(2):
        start = time.process_time()
        config = GraphCheckpointConfig.uniform(1_000_000, 100_000)
        plan = plan_recomputation(1_000_000, config)
        seconds.append(time.process_time() - start)
        assert all(plan)
    assert min(seconds) < 0.7, f"took {min(seconds):.2f} s of CPU time"
