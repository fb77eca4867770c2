"""The head of a causal language model of transformers with its loss, as one operation that never holds the logits of all rows.

The model's own `forward` runs, on a shallow copy of the model whose head hands on what it is given and whose loss function is
`linear_cross_entropy`. So whatever else a class does (auxiliary losses of a mixture, caches) it goes on doing. What it does
between head and loss is tried when it is fused, in float64 on a few rows: nothing, a factor (Cohere, Granite), or a soft cap
(Gemma 2).

Shapes: hidden states (..., K), head (V, K), labels (...).
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from gpuckpt.pytorch.ops._projections import is_plain
from gpuckpt.pytorch.ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["FusedLossForward", "fuse_loss", "models_with_a_loss"]

_ROWS, _WIDTH, _CLASSES = 6, 5, 7  # of a trial
_TOLERANCE = 1e-9  # in float64


def models_with_a_loss(model: nn.Module) -> list[tuple[str, Any]]:
    """The models of transformers in `model` that have a head and a loss, by name."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return []
    found = [(name, each) for name, each in model.named_modules() if isinstance(each, modeling.PreTrainedModel)]
    return [(name, each) for name, each in found if each.get_output_embeddings() is not None]


def fuse_loss(model: Any) -> tuple[str, str | None, str | None]:
    """Set `forward` on a model of transformers. Returns the head's name, how it is computed now, or why it is left as it is."""
    head = model.get_output_embeddings()
    name = next((key for key, child in model._modules.items() if child is head), None)
    if name is None:
        return "head", None, f"{type(model).__name__} has its head within another part"
    if "forward" in model.__dict__:
        before = model.__dict__["forward"]
        if isinstance(before, FusedLossForward):
            return name, str(before), None
        return name, None, f"the model's forward was replaced already, by {before!r}"
    if type(head) is not nn.Linear:
        return name, None, f"{name} is a {type(head).__name__}"
    if model.loss_function is not _loss_of_transformers():
        return name, None, f"{type(model).__name__} has another loss than that of the next token"
    found = _between_head_and_loss(model, name)
    if found is None or (found[0] != 1.0 and head.bias is not None):
        return name, None, f"{type(model).__name__} makes something else of its head's outputs than their loss"
    model.forward = forward = FusedLossForward(model, name, *found)
    return name, str(forward), None


def _loss_of_transformers() -> Any:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


class FusedLossForward:
    """The `forward` of a model whose head is fused with its loss. An object of its own, for copies and pickles."""

    def __init__(self, model: Any, head: str, scale: float, softcap: float | None) -> None:
        self.model = model
        self.head = head
        self.scale = scale
        self.softcap = softcap

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's own: trainers look at it for what a model takes."""
        return inspect.signature(type(self.model).forward.__get__(self.model))

    def __str__(self) -> str:
        scale = "" if self.scale == 1.0 else f", logits times {self.scale:.6g}"
        return "linear_cross_entropy" + scale + ("" if self.softcap is None else f", softcap {self.softcap:g}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if not self._loss_alone(args, kwargs):
            return type(model).forward(model, *args, **kwargs)
        head, handed_on = model._modules[self.head], _HandedOn()

        def loss(
            logits: Any,
            labels: Tensor,
            vocab_size: int,
            num_items_in_batch: Tensor | int | None = None,
            ignore_index: int = -100,
            shift_labels: Tensor | None = None,
            **others: Any,
        ) -> Tensor:
            if vocab_size != head.weight.shape[0]:
                raise ValueError(
                    f"the head has {head.weight.shape[0]} classes, and the model's configuration says {vocab_size}"
                )
            if shift_labels is None:
                shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            x = handed_on.given if self.scale == 1.0 else handed_on.given * self.scale
            reduction = "mean" if num_items_in_batch is None else "sum"
            found = linear_cross_entropy(
                x.flatten(0, -2),
                head.weight,
                shift_labels.reshape(-1).to(x.device),
                head.bias,
                ignore_index=ignore_index,
                softcap=self.softcap,
                reduction=reduction,
            ).float()
            if num_items_in_batch is None:
                return found
            return found / (
                num_items_in_batch.to(found.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
            )

        out = type(model).forward(_with(model, {self.head: handed_on}, loss), *args, **kwargs)
        return type(out)(**{key: value for key, value in out.items() if key != "logits"})

    def _loss_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call is for the loss, and the head no more than its weights."""
        model = self.model
        if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return False
        given = self.__signature__.bind(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        keep, as_dict = given.get("logits_to_keep"), given.get("return_dict")
        if given.get("labels") is None or (keep is not None and (torch.is_tensor(keep) or keep != 0)):
            return False
        if not (model.config.return_dict if as_dict is None else as_dict):
            return False
        head = model._modules.get(self.head)
        return is_plain(head) and head is not None and model.loss_function is _loss_of_transformers()


class _HandedOn(nn.Module):
    """Stands where a head was. What it is given is noted; what it returns has the rank of logits and a single class."""

    given: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.given = x
        return x.detach()[..., :1]


def _with(model: Any, parts: dict[str, nn.Module], loss: Any) -> Any:
    """A shallow copy of a model with other parts and another loss function."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, **parts}
    twin._loss_function = loss
    return twin


class _Decoded(nn.Module):
    """Stands where a decoder was, and returns hidden states; of whatever else is asked of it, None."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.outputs = _DecoderOutputs(hidden)

    def forward(self, *args: Any, **kwargs: Any) -> _DecoderOutputs:
        return self.outputs


class _DecoderOutputs:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return (self.last_hidden_state, None)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _between_head_and_loss(model: Any, name: str) -> tuple[float, float | None] | None:
    """The factor and the soft cap between head and loss; None where something else lies there. Tried on small parts."""
    draw = torch.Generator().manual_seed(0)
    # Small first: the factor is read off logits; then so large that a cap bends them.
    hidden = torch.randn(2, _ROWS, _WIDTH, generator=draw, dtype=torch.float64)
    hidden = hidden * torch.logspace(-2, 2, _ROWS, dtype=torch.float64)[:, None]
    head = nn.utils.skip_init(nn.Linear, _WIDTH, _CLASSES, bias=False, dtype=torch.float64, device="cpu")
    nn.init.normal_(head.weight, generator=draw)
    labels = torch.zeros(2, _ROWS, dtype=torch.int64)
    seen: list[tuple[Any, Any]] = []

    def loss(logits: Any, labels: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((logits, labels))
        return torch.tensor(3.0)

    takes = inspect.signature(type(model).forward).parameters
    alone = (
        {"output_router_logits": False} if "output_router_logits" in takes else {}
    )  # the loss without that of a router
    try:
        twin = _with(model, {model.base_model_prefix: _Decoded(hidden), name: head}, loss)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            out = type(model).forward(twin, input_ids=labels, labels=labels, **alone)
            plain = head(hidden)
        ((logits, its_labels),) = seen
        if its_labels is not labels or out.loss.item() != 3.0 or logits.shape != plain.shape:
            return None
    except Exception:  # it takes other arguments, has no such parts, or computes its loss by itself
        return None
    scale = (logits[0, 0, 0] / plain[0, 0, 0]).item()
    if math.isfinite(scale) and torch.allclose(logits, scale * plain, rtol=_TOLERANCE, atol=_TOLERANCE):
        return (1.0 if abs(scale - 1.0) < _TOLERANCE else scale), None
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if softcap and torch.allclose(logits, softcap * torch.tanh(plain / softcap), rtol=_TOLERANCE, atol=_TOLERANCE):
        return 1.0, float(softcap)
    return None
