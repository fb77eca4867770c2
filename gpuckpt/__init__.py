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

_CORE = {
    "gpuckpt.budget": ("CheckpointBudget",),
    "gpuckpt.errors": ("BudgetExceeded", "CheckpointError"),
    "gpuckpt.kernels.tuning": ("tune",),
    "gpuckpt.planning": ("Chain", "Keep", "Plan", "Recompute", "plan_chain", "simulate"),
    "gpuckpt.pytorch.checkpoint": ("checkpoint",),
    "gpuckpt.pytorch.engine.kept.choices": ("once",),
    "gpuckpt.pytorch.engine.kept.current": ("is_recomputing",),
    "gpuckpt.pytorch.fit": ("Fitted", "fit", "fitted", "unfit"),
    "gpuckpt.pytorch.graph": ("checkpoint_graph",),
    "gpuckpt.pytorch.profiling.measure": ("measure",),
    "gpuckpt.pytorch.whole_device.plan_device": ("plan_device",),
    "gpuckpt.pytorch.whole_device.step_ledger": ("StepLedger",),
}
_NAMES = {name: home for home, names in _CORE.items() for name in names}
_UNSHOWN = {"explain_oom": "gpuckpt.pytorch.explain_oom"}
_ROOMS = ("errors", "functional", "kernels", "memory", "nn", "planning", "segments")
_OPEN_ROOMS = ("errors", "memory", "segments", "units", "planning")
"""What these show can be imported from here too. Here it is not shown."""

__all__ = ["__version__", *_ROOMS, *sorted(_NAMES)]

if TYPE_CHECKING:  # the same names for type checkers and editors, which do not run __getattr__
    from gpuckpt import errors, functional, kernels, memory, nn, planning, segments
    from gpuckpt.budget import CheckpointBudget
    from gpuckpt.errors import *
    from gpuckpt.kernels.tuning import tune
    from gpuckpt.memory import *
    from gpuckpt.planning import *
    from gpuckpt.pytorch.checkpoint import checkpoint
    from gpuckpt.pytorch.engine.kept.choices import once
    from gpuckpt.pytorch.engine.kept.current import is_recomputing
    from gpuckpt.pytorch.explain_oom import explain_oom
    from gpuckpt.pytorch.fit import Fitted, fit, fitted, unfit
    from gpuckpt.pytorch.graph import checkpoint_graph
    from gpuckpt.pytorch.profiling.measure import measure
    from gpuckpt.pytorch.whole_device.plan_device import plan_device
    from gpuckpt.pytorch.whole_device.step_ledger import StepLedger
    from gpuckpt.segments import *
    from gpuckpt.units import *


def __getattr__(name: str) -> Any:
    value = _find(name)
    globals()[name] = value
    return value


def _find(name: str) -> Any:
    if (home := _NAMES.get(name) or _UNSHOWN.get(name)) is not None:
        return getattr(importlib.import_module(home), name)
    if name in _ROOMS:
        return importlib.import_module(f"gpuckpt.{name}")
    for room in _OPEN_ROOMS if name[0].isalpha() else ():
        module = importlib.import_module(f"gpuckpt.{room}")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module 'gpuckpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
