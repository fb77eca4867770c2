"""Every name of torch that is not public, and what it is used for. Checked with torch 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["untraced"]

F = TypeVar("F", bound=Callable[..., Any])

_frames = torch._C._dynamo.eval_frame
_SKIP = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.SKIP)


def untraced(function: F) -> F:
    """Keep torch.compile out of `function` and of all that it calls: as `torch.compiler.disable` does, without a wrapper (so
    that a hook stays the object that it is) and without importing the compiler, which takes as long as torch itself.

    Where compiled code calls `function` there is a graph break; under `fullgraph=True` torch raises its own error, which says
    so.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        f"{function.__module__}.{function.__qualname__} runs eagerly: a ledger is no part of a graph. Compile the blocks "
        "inside instead"
    )
    function._torchdynamo_disable_recursive = True  # type: ignore[attr-defined]
    _frames.set_code_exec_strategy(function.__code__, _SKIP)
    return function
