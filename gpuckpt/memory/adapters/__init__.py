"""How arrays of each library are laid into a pool's block and looked at there. A library is loaded when its arrays appear."""

from __future__ import annotations

import importlib
from typing import Any

from gpuckpt.memory.protocols import Form

__all__ = ["form_of"]

_FORMS = {"numpy": "NumpyForm", "torch": "TorchForm", "cupy": "CupyForm", "dlpack": "DLPackForm"}


def form_of(array: Any, library: str) -> Form:
    """The form of an array of `library` ("numpy", "torch", "cupy", "dlpack"). `TypeError` for what has no plain memory."""
    form: Form = getattr(importlib.import_module(f"{__name__}.{library}"), _FORMS[library])(array)
    return form
