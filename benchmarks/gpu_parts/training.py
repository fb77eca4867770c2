"""Part "training": a transformer in bf16 under `fit` at three budgets, beside the plain run and torch's checkpoints."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpuckpt
from gpu_parts.common import Context, Facts
from gpuckpt.cli.transformer import Config, Transformer


class Checkpointed(nn.Module):
    """A block in torch's own checkpoint."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=False)


def training(context: Context) -> None:
    """Median `ms` of a step and torch's peak; under fit also whether the promise held."""
    config = Config(3, 32, 2, 16) if context.dry else Config(16, 1024, 16, 1024, "swiglu")
    model = Transformer(config).to(context.device)
    batch = 2 if context.dry else 16
    tokens, targets = (torch.randint(0, 256, (batch, config.context), device=context.device) for _ in range(2))

    def autocast() -> torch.autocast:
        return torch.autocast(context.device.type, dtype=torch.bfloat16)

    def step(own: nn.Module) -> None:
        with autocast():
            loss = own(tokens, targets)
        loss.backward()
        own.zero_grad(set_to_none=True)

    def clock(own: nn.Module) -> Facts:
        peak_bytes = context.peak_bytes(lambda: step(own))
        seconds = []
        for _ in range(2 if context.dry else 6):
            began_s = time.perf_counter()
            step(own)
            context.sync()
            seconds.append(time.perf_counter() - began_s)
        return {"ms": statistics.median(seconds) * 1e3, "peak_mib": peak_bytes / 2**20}

    def torchs() -> Facts:
        own = copy.deepcopy(model)
        for number, block in enumerate(own.blocks):
            own.blocks[number] = Checkpointed(block)
        return clock(own)

    context.item("plain", lambda: clock(model))
    context.item("torch's checkpoint around every block", torchs)
    with autocast():
        chain = gpuckpt.measure(model, tokens, targets, unit_bytes=1 if context.dry else 512)
    whole_bytes = gpuckpt.plan_chain(chain, sum(chain.footprints), strategy="none").certificate.peak_bytes

    def fitted(share: float, hold: str) -> Facts:
        own = copy.deepcopy(model)
        try:
            with autocast():
                fit = gpuckpt.fit(own, (tokens, targets), budget=int(share * whole_bytes), hold=hold)
        except gpuckpt.BudgetExceeded as error:
            return {"left_out": f"no plan holds less than {error.need} of {whole_bytes} bytes"}
        facts = clock(own)
        promised = {"promised_mib": fit.promised_peak_bytes / 2**20, "planned_ms": fit.plan.certificate.step_s * 1e3}
        return {**facts, "ok": fit.measured_peak_bytes <= fit.promised_peak_bytes, **promised}

    for hold in ("account", "pool"):
        for share in (0.7, 0.4, 0.2):
            context.item(f"fit at {share:.0%}, hold={hold}", lambda share=share, hold=hold: fitted(share, hold))
