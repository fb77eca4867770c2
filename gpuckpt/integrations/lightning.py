"""Lightning: `L.Trainer(callbacks=[LightningBudget("40GiB")])`."""

from __future__ import annotations

from typing import Any

import torch

from gpuckpt.errors import BackendUnavailable
from gpuckpt.memory import Budget
from gpuckpt.pytorch.fit import Fitted, fit

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise BackendUnavailable(
        f"gpuckpt.integrations.lightning needs lightning: pip install lightning ({error})"
    ) from error

__all__ = ["LightningBudget"]


class LightningBudget(Callback):
    """Training runs under a budget; validation, checkpoints and predictions as always. The model is planned at the first batch,
    in the precision and on the device that it has then, and given back when training ends. Ranks of one job plan together.

    Args:
        budget: as in `gpuckpt.fit`; bytes where batches differ in length.
        module: the name of the part of the LightningModule that is fitted: the network that `training_step` calls.
        options: others of `gpuckpt.fit`, by name.

    Attributes: `fitted`, what `gpuckpt.fit` returned when training began, None before.

    The progress bar and the loggers get `saved_gib`, the most GiB that were held for a step.

    Raises `ValueError` where the LightningModule has no part of that name, and at the first batch what `gpuckpt.fit` raises.

    >>> LightningBudget("40GiB", module="net").fitted is None
    True
    """

    def __init__(self, budget: Budget | int | str, *, module: str = "model", **options: Any) -> None:
        self.budget = budget
        self.module = module
        self.options = options
        self.fitted: Fitted | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        parts = dict(pl_module.named_modules())
        if not self.module or self.module not in parts:
            children = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"module={self.module!r}: {type(pl_module).__name__} has no such part; it has {children or 'none at all'}"
            )
        together = {"group": torch.distributed.group.WORLD} if trainer.world_size > 1 else {}
        self.fitted = fit(parts[self.module], None, self.budget, **{**together, **self.options})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.fitted is not None:
            pl_module.log("saved_gib", self.fitted.measured_peak_bytes / 2**30, prog_bar=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.fitted is not None:
            self.fitted.unfit()
