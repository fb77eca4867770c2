"""The shell around every fused operation: its torch operators, what autograd saves, main_grad, autocast, and what is refused.

An operator costs torch some 150 us of Python for a forward and backward. torch.compile, fake tensors, subclasses, modes and
transforms need it; where none of them is at hand, the same functions run in an autograd node of our own.

An operation is two functions without autograd, whose annotations are the schemas of its operators:

    forward(x, *tensors, *options) -> y
    gradients(dy, x, *saved, *options, needs, mains) -> [dx, ...]

`saved` are those of `tensors` that backward needs besides x, in their order; a tensor that only forward takes (a residual) is
added to the result, and its gradient is dy. `needs` says for each differentiable operand whether its gradient is wanted, and
`mains` holds for each weight the `main_grad` that its gradient is added to in place. Gradients come in the order of the
operands, None where not wanted or added to a main_grad.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpuckpt.pytorch.engine.early_stop import about_to_save
from gpuckpt.pytorch.ops._operands import (
    autocast_input,
    is_plain_call,
    no_double_backward,
    refuse_grad_transforms,
    rows_of,
    without_autocast,
)
from gpuckpt.pytorch.ops._weight_grads import main_grad_of
from gpuckpt.pytorch.ops.norm import RECIPE, Norm, normalise, restored

__all__ = ["FusedOp"]


class _Direct(torch.autograd.Function):
    """The node of a `FusedOp` that no operator is made for: its tensors as the operator has them, then all else in one."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, (op, rest) = args
        inputs = (*tensors, *rest)
        y: Tensor = op.run_forward(*inputs)
        op.setup(ctx, inputs, y)
        ctx.op = op
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = ctx.op.backward(ctx, dy)
        return found


KeepsInput = Callable[[Sequence[bool], Sequence[Any], Sequence[Any]], bool]


class FusedOp:
    """One fused operation, called with x (..., K), its other tensors and its options; returns what `forward` does.

    `fwd` and `bwd` are its two operators, gpuckpt::<name>_fwd and gpuckpt::<name>_bwd. Besides its own arguments `fwd` is given
    what only backward needs: the weights' main_grads and the norm that made x.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Tensor],
        gradients: Callable[..., list[Tensor | None]],
        *,
        operands: tuple[str, ...],
        fake: Callable[..., Tensor] | None = None,
        keeps_input: KeepsInput = lambda needs, saved, options: True,
    ) -> None:
        """operands: the differentiable arguments, x first; weights are those whose names begin with "w". fake: `forward` for
        shapes and dtypes alone; by default (rows of x, rows of the last weight) in x's dtype. keeps_input(needs, saved,
        options): whether x has to be kept for the gradients that are wanted."""
        self.name = name
        self._forward = forward
        self._gradients = gradients
        self._keeps_input = keeps_input
        given = inspect.signature(forward, eval_str=True).parameters
        wanted = inspect.signature(gradients, eval_str=True).parameters
        tensors = [key for key, p in given.items() if p.annotation in (Tensor, Tensor | None)]
        assert [*given][: len(operands)] == [*operands]
        assert [*given][: len(tensors)] == tensors
        assert [*wanted][2:-2] == [key for key in given if key in wanted and key != "x"]

        weights = [key for key in operands if key.startswith("w")]
        self._operands = len(operands)
        self._weights = [tensors.index(key) for key in weights]
        self._saved = [tensors.index(key) for key in tensors[1:] if key in wanted]
        self._added = [key not in wanted for key in tensors[len(operands) :]]
        self._mains = slice(len(tensors), len(tensors) + len(weights))
        self._options = slice(self._mains.stop, self._mains.stop + len(given) - len(tensors))
        self._tensors = len(tensors)
        self._no_mains = (None,) * len(weights)
        self._define(fake or self._fake, given, wanted, weights)

    def _define(self, fake: Any, given: Any, wanted: Any, weights: list[str]) -> None:
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        mains = [inspect.Parameter(f"main_{key}", keyword, annotation=Tensor | None) for key in weights]
        own = [*given.values()]
        parameters = [*own[: self._tensors], *mains, *own[self._tensors :], *RECIPE]

        def fwd(*args: Any) -> Tensor:
            return self.run_forward(*args)

        def fwd_fake(*args: Any) -> Tensor:
            return fake(*args[: self._tensors], *args[self._options])

        def bwd(*args: Any) -> list[Tensor]:
            return [grad for grad in self._run_gradients(args, self._no_mains) if grad is not None]

        # What torch reads the schemas from.
        fwd.__signature__ = inspect.Signature(parameters, return_annotation=Tensor)  # type: ignore[attr-defined]
        bwd.__signature__ = inspect.Signature([*wanted.values()][:-1], return_annotation=list[Tensor])  # type: ignore[attr-defined]
        self.fwd = torch.library.custom_op(f"gpuckpt::{self.name}_fwd", fwd, mutates_args=())
        self.bwd = torch.library.custom_op(f"gpuckpt::{self.name}_bwd", bwd, mutates_args=())
        self.fwd.register_fake(fwd_fake)
        self.bwd.register_fake(self._fake_gradients)
        self.fwd.register_autograd(self.backward, setup_context=self.setup)
        no_double_backward(self.bwd, self.name)

    def __call__(self, x: Tensor, *args: Any, norm: Norm | None = None) -> Tensor:
        """args: the other tensors of `forward` and its options. norm: of x, to compute with instead of x."""
        plain = is_plain_call((x, *args))
        if not plain:
            affine = () if norm is None else (norm.weight, norm.bias)
            refuse_grad_transforms(self.name, x, *args[: self._tensors - 1], *affine)
        rows, *recipe = normalise(rows_of(autocast_input(x)), norm)
        tensors = (rows, *args[: self._tensors - 1])
        mains = [main_grad_of(tensors[i]) for i in self._weights]
        rest = (*mains, *args[self._tensors - 1 :], *recipe)
        inputs = (*tensors, *rest)
        about_to_save(self.saved, inputs)
        if plain:
            y: Tensor = _Direct.apply(*tensors, (self, rest))
            return y
        return self.fwd(*inputs)

    def run_forward(self, *args: Any) -> Tensor:
        """`forward` itself, for the arguments of `fwd`."""
        with without_autocast(args[0].device.type):
            return self._forward(*args[: self._tensors], *args[self._options])

    def saved(self, inputs: Sequence[Any], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """What autograd keeps: the tensors that backward needs, then x, or what the norm makes it of."""
        kept = [inputs[i] for i in self._saved]
        x, raw = inputs[0], inputs[self._options.stop : self._options.stop + 3]
        if not self._keeps_input(needs, kept, inputs[self._options]):
            return (*kept, None, None, None, None)
        return (*kept, x, None, None, None) if raw[0] is None else (*kept, None, *raw)

    def setup(self, ctx: Any, inputs: Any, output: Tensor) -> None:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(*self.saved(inputs, needs))
        mains = zip(inputs[self._mains], self._weights, strict=True)
        ctx.mains = [main if needs[i] else None for main, i in mains]
        ctx.options, ctx.norm = inputs[self._options], inputs[-2:]

    def backward(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments of `fwd`."""
        *kept, x, raw, norm_weight, norm_bias = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[: self._operands]]
        grads: list[Tensor | None] = [None] * self._operands
        if any(needs):
            x = restored(x, (raw, norm_weight, norm_bias, *ctx.norm))
            args = (dy, x, *kept, *ctx.options, needs)
            mains = any(main is not None for main in ctx.mains)
            if mains or (not torch.is_grad_enabled() and is_plain_call((dy, x, *kept))):
                grads = self._run_gradients(args, ctx.mains)
            else:
                found = iter(self.bwd(*args))
                grads = [next(found) if need else None for need in needs]
        after = zip(self._added, ctx.needs_input_grad[self._operands : self._tensors], strict=True)
        rest = [dy if added and need else None for added, need in after]
        return (*grads, *rest, *(None,) * (len(ctx.needs_input_grad) - self._tensors))

    def _run_gradients(self, args: Sequence[Any], mains: Sequence[Tensor | None]) -> list[Tensor | None]:
        with without_autocast(args[0].device.type):
            return self._gradients(*args, mains)

    def _fake(self, x: Tensor, *args: Any) -> Tensor:
        return x.new_empty(x.shape[0], args[self._weights[-1] - 1].shape[0])

    def _fake_gradients(self, dy: Tensor, x: Tensor | None, *args: Any) -> list[Tensor]:
        others, needs = args[: self._operands - 1], args[-1]
        like = dy.new_empty(dy.shape[0], others[0].shape[1]) if x is None and needs[0] else x
        return [t.new_empty(t.shape) for t, need in zip((like, *others), needs, strict=True) if need and t is not None]
