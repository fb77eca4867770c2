"""What every fused operation asks of its operands: shapes that fit, one dtype to compute in, autocast's where that is on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpuckpt.backend import use_triton
from gpuckpt.checks import shown
from gpuckpt.errors import DimMismatch
from gpuckpt.pytorch._torch_internals import all_ordinary, innermost_transform, unwatched

__all__ = [
    "as_if_cast",
    "autocast_input",
    "cast",
    "cast_bytes",
    "check_bias",
    "check_second_weight",
    "check_weight",
    "is_plain_call",
    "like_rows_of",
    "no_double_backward",
    "wants_copy",
    "without_autocast",
    "without_derivative",
]

_NOTHING = contextlib.nullcontext()


@overload
def cast(tensor: Tensor, like: Tensor) -> Tensor: ...
@overload
def cast(tensor: None, like: Tensor) -> None: ...
@overload
def cast(tensor: Tensor | None, like: Tensor) -> Tensor | None: ...
def cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """`tensor` in the dtype of `like`."""
    return tensor if tensor is None or tensor.dtype == like.dtype else tensor.to(like.dtype)


@overload
def as_if_cast(tensor: Tensor, like: Tensor) -> Tensor: ...
@overload
def as_if_cast(tensor: None, like: Tensor) -> None: ...
def as_if_cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """What `cast` returns, for its shape, strides and alignment alone: where it would copy, a tensor without memory."""
    if tensor is None or tensor.dtype == like.dtype:
        return tensor
    return torch.empty_like(tensor, dtype=like.dtype, device="meta")


def cast_bytes(dtype: torch.dtype, *tensors: Tensor | None) -> int:
    """What casting `tensors` to `dtype` allocates."""
    return sum(t.numel() * dtype.itemsize for t in tensors if t is not None and t.dtype != dtype)


def autocast_input(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on. The cast is autograd's own, so x's gradient keeps x's dtype."""
    kind = x.device.type
    if _autocast_on(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _autocast_on(kind: str) -> bool:
    # Some devices ("meta") have no autocast to ask for.
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def rows_of(x: Tensor) -> Tensor:
    """x (..., K) as a matrix (M, K). `reshape(-1, K)` would not know M where K is 0."""
    if x.dim() == 2:
        return x
    return x[None] if x.dim() == 1 else x.flatten(0, -2)


def like_rows_of(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) as (..., N) for x (..., K) with M rows."""
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])


def wants_copy(dy: Tensor) -> bool:
    """Whether a GPU should be given a copy of the gradient dy (M, N) to multiply: one whose rows are not whole, such as the
    expanded one with strides (0, 0) that `y.sum()` sends. As it is, no operand of a kernel would come through descriptors, and
    cuBLAS would be given a copy in each product."""
    if not use_triton(dy) or dy.is_contiguous():
        return False
    width, itemsize = dy.shape[1], dy.element_size()
    whole = dy.stride(1) == 1 and dy.stride(0) >= width
    # A copy of rows that end unaligned is no better aligned.
    return not whole or (dy.stride(0) * itemsize % 16 != 0 and width * itemsize % 16 == 0)


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """Inside an operation the dtype is settled; a GEMM there must not be cast a second time."""
    return torch.autocast(kind, enabled=False) if _autocast_on(kind) else _NOTHING


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, name: str = "weight") -> None:
    """Raise unless x (..., K), weight (N, K) and bias (N,) fit together."""
    if weight.dim() != 2:
        raise DimMismatch(2, weight.dim(), f"number of dimensions of {name}")
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"x: expected a floating-point tensor of shape (..., {weight.shape[1]}), got {x.dtype} of shape {tuple(x.shape)}"
        )
    if x.shape[-1] != weight.shape[1]:
        raise DimMismatch(weight.shape[1], x.shape[-1], f"last dimension of the input of {name}")
    check_bias(bias, weight, name)


def check_second_weight(weight: Tensor, bias: Tensor | None, hidden: int, name: str) -> None:
    """Raise unless weight (N, hidden) and bias (N,) fit together."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name}: expected a tensor (N, {hidden}), got {shown(weight)}; weights come first, then biases"
        )
    if weight.dim() != 2:
        raise DimMismatch(2, weight.dim(), f"number of dimensions of {name}; weights come first, then biases")
    if weight.shape[1] != hidden:
        raise DimMismatch(hidden, weight.shape[1], f"last dimension of {name} (the hidden size)")
    check_bias(bias, weight, name)


def check_bias(bias: Tensor | None, weight: Tensor, name: str) -> None:
    """Raise unless `bias` is None or (N,) for weight (N, K)."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise DimMismatch(weight.shape[0], bias.numel(), f"length of the bias of {name}")


def no_double_backward(op: torch.library.CustomOpDef, name: str) -> None:
    """Make the gradient of `op`, itself the backward of the public function `name`, a clear error."""

    op.register_autograd(lambda ctx, *grads: _refuse_second_derivative(name))


def _refuse_second_derivative(name: str) -> NoReturn:
    raise NotImplementedError(
        f"gpuckpt.functional.{name} has no second derivative: its backward recomputes what autograd would have to "
        "differentiate again. Write the layer with torch.nn.functional.linear where you need double backward"
    )


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, marker: Tensor, name: str) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        _refuse_second_derivative(ctx.name)


def without_derivative(grad: Tensor, name: str) -> Tensor:
    """A gradient of the public function `name`, whose own gradient is a clear error."""
    found: Tensor = _Refusal.apply(grad, torch.zeros((), requires_grad=True), name)
    return found


def refuse_grad_transforms(name: str, *operands: Tensor | None) -> None:
    """Raise `NotImplementedError` inside torch.func.grad and its kin, and for operands that carry a forward-mode tangent, which
    would be dropped without a word. Under vmap alone the operation is run once for each element."""
    if torch.compiler.is_compiling():
        return
    if innermost_transform() not in (None, "Vmap"):
        raise NotImplementedError(
            f"gpuckpt.functional.{name} does not run under torch.func.grad, vjp, jvp or jacrev; use torch.autograd.grad, "
            "or torch.nn.functional.linear inside the transform"
        )
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in operands if t is not None
    ):
        raise NotImplementedError(
            f"gpuckpt.functional.{name} has no forward-mode derivative; use torch.nn.functional.linear where you need one"
        )


def is_plain_call(args: Sequence[Any]) -> bool:
    """Whether the operator would do nothing for these arguments but call its function."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or not unwatched():
        return False
    return all_ordinary(args)
