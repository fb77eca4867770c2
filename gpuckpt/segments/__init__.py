"""Checkpointing without autograd, on NumPy, torch and CuPy arrays (others through DLPack), under the same budgets.

Five interfaces over one engine (`chain`): segments and networks of them; layers with a backward of their own; a layer
function over labels; ranges of a graph; a function and its inputs. docs/seeds.md shows one network through each.

Importing this loads NumPy only: torch, CuPy and Triton are imported when one of their arrays appears.
"""

from __future__ import annotations

from gpuckpt.segments.checkpoint import Chained, Checkpoint, CheckpointedActivation, vjp_checkpoint
from gpuckpt.segments.function import ActivationCheckpointer, CheckpointConfig
from gpuckpt.segments.graph import GraphCheckpointConfig, GraphSegment, plan_recomputation
from gpuckpt.segments.layers import CheckpointedLayer, SegmentCheckpointer
from gpuckpt.segments.linear import Dense, LinearSegment
from gpuckpt.segments.network import CheckpointedNetwork, CheckpointedPipeline
from gpuckpt.segments.protocols import Differentiable, Layer, Recomputable
from gpuckpt.segments.strategy import CheckpointStrategy

__all__ = [
    "ActivationCheckpointer",
    "Chained",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointStrategy",
    "CheckpointedActivation",
    "CheckpointedLayer",
    "CheckpointedNetwork",
    "CheckpointedPipeline",
    "Dense",
    "Differentiable",
    "GraphCheckpointConfig",
    "GraphSegment",
    "Layer",
    "LinearSegment",
    "Recomputable",
    "SegmentCheckpointer",
    "plan_recomputation",
    "vjp_checkpoint",
]
