"""gpuckpt: activation checkpointing under a hard byte budget.

Importing this loads neither torch, CuPy nor Triton; names that need them load them when they are first touched.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the kernels lie beside this folder, and an installation puts them into it; see pyproject.toml.
_above = os.path.dirname(__path__[0])
if not os.path.isdir(os.path.join(__path__[0], "kernels")) and os.path.isfile(
    os.path.join(_above, "kernels", "gated.py")
):
    __path__.append(_above)

_HOME = {
    "gpuckpt.errors": (
        "BackendUnavailable",
        "BudgetClosed",
        "BudgetExceeded",
        "CheckpointError",
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
    "gpuckpt.budget": ("CheckpointBudget",),
    "gpuckpt.kernels.tuning": ("tune",),
    "gpuckpt.memory": ("MemoryUsageTracker",),
    "gpuckpt.units": ("format_bytes", "parse_bytes"),
    "gpuckpt.planning": ("Certificate", "Chain", "Keep", "Plan", "Recompute", "Stage", "plan_chain", "simulate"),
    "gpuckpt.pytorch.checkpoint": ("checkpoint",),
    "gpuckpt.pytorch.fit": ("Fitted", "fit"),
    "gpuckpt.pytorch.graph": ("checkpoint_graph",),
    "gpuckpt.pytorch.profiling.measure": ("measure",),
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
_MODULES = {
    "functional": "gpuckpt.functional",
    "nn": "gpuckpt.nn",
}
_NAMES = {name: home for home, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULES), *sorted(_NAMES)]

if TYPE_CHECKING:  # the same names for type checkers and editors, which do not run __getattr__
    from gpuckpt import functional, nn
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
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'gpuckpt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
