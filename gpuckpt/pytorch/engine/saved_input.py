"""How a frame keeps what it starts from: as a node of autograd would save it, in whatever the active hooks make of it."""

from __future__ import annotations

from typing import Any

import torch

from gpuckpt.pytorch._torch_internals import make_saved_tensor

__all__ = ["saved_input"]


class _SaveInput(torch.autograd.Function):
    """Saves a tensor through autograd, so that the active hooks hold it; its node is never run. For torch before 2.13."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return anchor.clone()  # no view, whose tangent would have to be one

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise AssertionError("the node that keeps a checkpoint's inputs is no part of the graph")

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        """Of the output, which nobody uses; the tensor that is saved keeps its own."""
        return torch.zeros((), device="cpu")


class _Input:
    """A tensor that `_SaveInput` saved."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # The anchor makes autograd record a node, which holds the tensor while its output lives (torch 2.11) or itself.
        anchor = torch.empty((), device="cpu", requires_grad=True)
        self._output: torch.Tensor = _SaveInput.apply(anchor, tensor)

    def unpack(self) -> torch.Tensor:
        node: Any = self._output.grad_fn
        (tensor,) = node.saved_tensors
        return tensor


class _Constant:
    """A tensor of `torch.inference_mode`, which autograd does not save and nobody changes in place."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def unpack(self) -> torch.Tensor:
        return self._tensor


def saved_input(tensor: torch.Tensor) -> Any:
    """`tensor`, in what the active hooks make of it; `unpack()` gives it back."""
    if tensor.is_inference():
        return _Constant(tensor)
    return _Input(tensor) if make_saved_tensor is None else make_saved_tensor(tensor, False)
