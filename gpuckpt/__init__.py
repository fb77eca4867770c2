"""gpuckpt: activation checkpointing under a hard byte budget.

Importing this loads neither torch, CuPy nor Triton; names that need them load them when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_CORE = {
    "gpuckpt.budget": ("CheckpointBudget",),
    "gpuckpt.errors": ("BudgetExceeded", "CheckpointError"),
    "gpuckpt.kernels.tuning": ("tune",),
    "gpuckpt.planning": ("Certificate", "Chain", "Keep", "Plan", "Recompute", "Stage", "plan_chain", "simulate"),
    "gpuckpt.pytorch.checkpoint": ("checkpoint",),
    "gpuckpt.pytorch.fit": ("Fitted", "fit"),
    "gpuckpt.pytorch.graph": ("checkpoint_graph",),
    "gpuckpt.pytorch.profiling.measure": ("measure",),
    "gpuckpt.units": ("format_bytes", "parse_bytes"),
}
_ROOMS = ("errors", "functional", "kernels", "memory", "nn", "planning", "segments")
_BY_ROOM = {
    "gpuckpt.errors": (
        "BackendUnavailable",
        "BudgetClosed",
        "CheckpointLimit",
        "DLPackRefused",
        "DimMismatch",
        "EmptyPipeline",
        "EmptySegments",
        "InvalidChain",
        "InvalidPlan",
        "NotCheckpointed",
        "PromiseBroken",
        "RecomputeMismatch",
        "SavedTensorModified",
        "StateModified",
    ),
    "gpuckpt.memory": ("MemoryUsageTracker",),
    "gpuckpt.segments": (
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
    ),
}
"""Can be imported from here too, and is shown by the room that it lives in."""

_NAMES = {name: home for table in (_CORE, _BY_ROOM) for home, names in table.items() for name in names}

__all__ = ["__version__", *sorted(_ROOMS), *sorted(name for names in _CORE.values() for name in names)]

if TYPE_CHECKING:  # the same names for type checkers and editors, which do not run __getattr__
    from gpuckpt import errors, functional, kernels, memory, nn, planning, segments
    from gpuckpt.budget import CheckpointBudget
    from gpuckpt.errors import (
        BackendUnavailable,
        BudgetClosed,
        BudgetExceeded,
        CheckpointError,
        CheckpointLimit,
        DimMismatch,
        DLPackRefused,
        EmptyPipeline,
        EmptySegments,
        InvalidChain,
        InvalidPlan,
        NotCheckpointed,
        PromiseBroken,
        RecomputeMismatch,
        SavedTensorModified,
        StateModified,
    )
    from gpuckpt.kernels.tuning import tune
    from gpuckpt.memory import MemoryUsageTracker
    from gpuckpt.planning import Certificate, Chain, Keep, Plan, Recompute, Stage, plan_chain, simulate
    from gpuckpt.pytorch.checkpoint import checkpoint
    from gpuckpt.pytorch.fit import Fitted, fit
    from gpuckpt.pytorch.graph import checkpoint_graph
    from gpuckpt.pytorch.profiling.measure import measure
    from gpuckpt.segments import (
        ActivationCheckpointer,
        Chained,
        Checkpoint,
        CheckpointConfig,
        CheckpointedActivation,
        CheckpointedLayer,
        CheckpointedNetwork,
        CheckpointedPipeline,
        CheckpointStrategy,
        Dense,
        Differentiable,
        GraphCheckpointConfig,
        GraphSegment,
        Layer,
        LinearSegment,
        Recomputable,
        SegmentCheckpointer,
        plan_recomputation,
        vjp_checkpoint,
    )
    from gpuckpt.units import format_bytes, parse_bytes


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"gpuckpt.{name}")
    else:
        raise AttributeError(f"module 'gpuckpt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
