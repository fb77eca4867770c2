"""Hugging Face: `enable(model, budget)` where a script calls `gradient_checkpointing_enable()`, `BudgetCallback` for a Trainer.

Both wait for the first batch, so that what is measured is the model as the trainer runs it: its dtype, device, autocast and
wrappers. The library's own checkpointing is switched off: which layers run again is what the plan decides.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from gpuckpt.errors import BackendUnavailable
from gpuckpt.memory import Budget
from gpuckpt.pytorch.fit import Fitted, fit

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise BackendUnavailable(
        "gpuckpt.integrations.transformers needs transformers, and its Trainer accelerate: "
        f"pip install 'transformers[torch]' ({error})"
    ) from error

__all__ = ["BudgetCallback", "enable"]

_log = logging.getLogger(__name__)


def enable(model: nn.Module, budget: Budget | int | str, **options: Any) -> Fitted:
    """Let `model` train under `budget`, planned for the first batch that it is called with.

    Args:
        model: a model of transformers or of PEFT, wrapped for several ranks or not. It stays the same object; `gpuckpt.unfit`
            gives it back as it was, but for checkpointing of its own, which is switched off.
        budget: bytes for what autograd saves, "40GiB" or an int; a share of what the first batch saves, "40%"; or a
            `CheckpointBudget`. Where batches differ in length, bytes: the first batch may be a short one.
        options: others of `gpuckpt.fit`, by name.

    Returns what `gpuckpt.fit` returns. Raises what it raises, part of it at the first batch: `BudgetExceeded`, with the smallest
    budget that would do, where no plan fits.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> fitted = enable(model, "60%")
    >>> tokens = torch.arange(32).reshape(2, 16)
    >>> model(tokens, labels=tokens).loss.backward()
    >>> fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes
    True
    """
    fitted = fit(model, None, budget, **options)  # first: what it refuses leaves the model as it was
    _disable_own_checkpointing(model)
    return fitted


class BudgetCallback(TrainerCallback):
    """`Trainer(..., callbacks=[BudgetCallback("40GiB")])`: training runs under the budget, evaluation and saving as always.

    The model is fitted when training begins, after the trainer has moved, cast and wrapped it, and given back when it ends. Under
    several processes the ranks plan together. TRL's trainers are Trainers.

    Args:
        budget, options: as in `enable`.

    Attributes: `fitted`, what `gpuckpt.fit` returned when training began, None before; `print(callback.fitted.report())` says
    what was kept and what ran again, and holds the promised peak against the measured one.

    Raises what `enable` raises, from `train()`.

    >>> callback = BudgetCallback("40GiB")
    >>> callback.fitted is None
    True
    """

    def __init__(self, budget: Budget | int | str, **options: Any) -> None:
        self.budget = budget
        self.options = options
        self.fitted: Fitted | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        together = {"group": torch.distributed.group.WORLD} if args.world_size > 1 else {}
        self.fitted = enable(kwargs["model"], self.budget, **{**together, **self.options})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.fitted is not None:
            self.fitted.unfit()


def _disable_own_checkpointing(model: nn.Module) -> None:
    """Both names: transformers 5.23 renamed the methods and warns at the old one."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return
    for module in model.modules():  # from the outside in: wrappers have neither
        disable = getattr(module, "activation_checkpointing_disable", None) or getattr(
            module, "gradient_checkpointing_disable", None
        )
        if disable is not None:
            disable()
            _log.warning(
                "gradient checkpointing of %s is switched off: its budget decides what is recomputed",
                type(module).__name__,
            )
            return
