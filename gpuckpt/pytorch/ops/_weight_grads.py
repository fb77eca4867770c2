"""Gradients of weights and biases, added up over chunks of rows: dW = sum of a^T b, db = sum of rows.

Sums of several 16-bit chunks are kept in float32. A parameter that carries `main_grad` (float32, as Megatron-LM keeps it)
gets its gradient added there in place instead, and autograd sees none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpuckpt.errors import DimMismatch

__all__ = [
    "CUDA_BLOCK",
    "BiasGrad",
    "Scratch",
    "WeightGrad",
    "bias_scratch",
    "main_grad_of",
    "sum_rows",
    "weight_scratch",
]

_BLOCK = 256
"""Rows of a 16-bit matrix that the CPU widens to float32 at a time: there torch widens no products or sums by itself."""
CUDA_BLOCK = 8192
"""Rows of dW whose float32 product is made at a time on CUDA."""


def main_grad_of(weight: Tensor) -> Tensor | None:
    """The `main_grad` of a parameter, or None. Raises `DimMismatch`, or `RuntimeError` under `torch.compile`."""
    main = getattr(weight, "main_grad", None)
    if main is None or not weight.requires_grad:
        return None
    if main.shape != weight.shape:
        raise DimMismatch(weight.numel(), main.numel(), f"main_grad of shape {tuple(main.shape)}: number of elements")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "main_grad is written in place by backward, which torch.compile cannot trace; delete it, or run eagerly"
        )
    return main


class Scratch(NamedTuple):
    """Bytes in addition to the gradients: `held` until the result is made, `passing` while one chunk is added."""

    held: int
    passing: int


def weight_scratch(weight: Tensor, dtype: torch.dtype, rows: int, several: bool, main: Tensor | None = None) -> Scratch:
    """Of the `WeightGrad` of a weight (A, B) that adds chunks of `rows` rows in `dtype`."""
    (a, b), own = weight.shape, weight.dtype
    if main is None and not several:
        return Scratch(0 if own == dtype else a * b * dtype.itemsize, 0)
    wide = torch.promote_types(dtype, torch.float32) if main is None else main.dtype
    held = 0 if own == wide or main is not None else a * b * wide.itemsize
    if wide == dtype:
        return Scratch(held, 0)
    block = min(CUDA_BLOCK, a) * b if weight.is_cuda else min(_BLOCK, rows) * (a + b)
    return Scratch(held, wide.itemsize * block)


def bias_scratch(bias: Tensor, dtype: torch.dtype, rows: int, several: bool) -> Scratch:
    """Of the `BiasGrad` of a bias (A,) that adds sums of `rows` rows in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    vector = bias.numel() * wide.itemsize
    blocks = 0 if dtype == wide or bias.is_cuda else 1 + min(_BLOCK, rows)
    return Scratch(0 if bias.dtype == wide else vector, (blocks + several) * vector)


class WeightGrad:
    """dW of one weight (A, B): `add(a, b)` for each chunk, a (C, A) and b (C, B), then `result()`."""

    def __init__(self, weight: Tensor, several: bool, main: Tensor | None = None) -> None:
        self._weight = weight
        self._several = several
        self._main = main
        self._total: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        if self._main is not None:
            _add_product(self._main, a, b)
        elif not self._several or (self._total is None and a.dtype.itemsize >= 4):
            self._total = torch.mm(a.t(), b)
        else:
            if self._total is None:
                self._total = torch.zeros(self._weight.shape, dtype=torch.float32, device=a.device)
            _add_product(self._total, a, b)

    def result(self) -> Tensor | None:
        """The gradient in the weight's dtype; None where it went to `main_grad`."""
        if self._main is not None:
            return None
        if self._total is None:
            return torch.zeros_like(self._weight, memory_format=torch.contiguous_format)
        return self._total.to(self._weight.dtype)


class BiasGrad:
    """db of one bias (A,): `add` sums of rows in float32 (float64 for float64), then `result()`."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias
        self._total: Tensor | None = None

    def add(self, total: Tensor) -> None:
        self._total = total if self._total is None else self._total.add_(total)

    def result(self) -> Tensor:
        """The gradient in the bias's dtype."""
        return torch.zeros_like(self._bias) if self._total is None else self._total.to(self._bias.dtype)


def sum_rows(t: Tensor) -> Tensor:
    """The sum over rows of t (M, A), in float32 or wider."""
    if t.dtype.itemsize >= 4 or t.is_cuda:
        return t.sum(0, dtype=torch.promote_types(t.dtype, torch.float32))
    # On a CPU torch would make a float32 copy of all of t.
    total = torch.zeros(t.shape[1], dtype=torch.float32, device=t.device)
    for first in range(0, t.shape[0], _BLOCK):
        total += t[first : first + _BLOCK].float().sum(0)
    return total


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b, with the product in total's dtype: rounding it to 16 bits for each chunk would show in the sum."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda:
        for first in range(0, total.shape[0], CUDA_BLOCK):
            part = slice(first, first + CUDA_BLOCK)
            total[part] += torch.mm(a[:, part].t(), b, out_dtype=total.dtype)
    else:
        for first in range(0, a.shape[0], _BLOCK):
            rows = slice(first, first + _BLOCK)
            total.addmm_(a[rows].to(total.dtype).t(), b[rows].to(total.dtype))
