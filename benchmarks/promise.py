"""Six models under six budgets each, with recompute alone and with a host budget to spill to: what the plan promised, what the
ledgers measured, and whether gradients are the same.

    python benchmarks/promise.py [--size small|full] [--out benchmarks/results]

The budgets go in five equal steps from the smallest that any plan fits in to the plain run's peak. Each run is one training
step next to a plain one from the same weights and the same random numbers; "equal" means that the loss, every gradient and
every buffer are the same bit for bit. For the runs that spill, transfers are planned as if they took no time: on these sizes
the planner would rarely choose them otherwise, and here bytes are checked, not speed.
Hugging Face models are built from configs; nothing is downloaded.
Adds a line to promise.jsonl and draws promise.png.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from bench_record import QUICK, RESULTS, append, arguments
from torch import nn

from gpuckpt import CheckpointBudget, fit, format_bytes
from gpuckpt.cli.transformer import Config, Transformer
from gpuckpt.functional import mlp
from gpuckpt.nn import FusedLinear, FusedMLP
from gpuckpt.pytorch.engine.residency import mark_resident
from gpuckpt.pytorch.link_speed import Link

Inputs = dict[str, torch.Tensor]
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Size:
    """How large the models are: depth, width (divisible by 8 heads or 2), tokens and rows, pixels."""

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    pixels: int


SIZES = {"small": Size(4, 32, 2, 16, 2, 16), "full": Size(8, 64, 4, 64, 4, 32)}


@dataclass(frozen=True)
class Row:
    """One model under one budget. Bytes."""

    model: str
    stages: int
    budget_bytes: int
    promised_bytes: int
    measured_bytes: int
    plain_bytes: int
    left_bytes: int
    recompute_share: float
    equal: bool
    spills: bool = False
    host_promised_bytes: int = 0
    host_measured_bytes: int = 0

    @property
    def kept(self) -> bool:
        """The promise: what was promised was measured, within the budget, with the same gradients, and nothing is left."""
        exact = self.promised_bytes == self.measured_bytes <= self.budget_bytes
        exact = exact and self.host_promised_bytes == self.host_measured_bytes
        return exact and self.equal and self.left_bytes == 0


class Mlp(FusedMLP):
    """Its rows a chunk are named: under a budget smaller than backward's scratch the layer would choose them by the budget, and
    the plain run has none to choose by. So both do the same arithmetic."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.fc1.weight, self.fc2.weight, self.fc1.bias, self.fc2.bias
        return mlp(x, *weights, activation=self.activation, chunk_rows=128)


class FusedBlocks(nn.Module):
    """An MLP of fused layers: a linear with its activation, then residual MLP blocks, and a mean squared error."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.stem = FusedLinear(size.width, size.width, activation="silu")
        self.blocks = nn.ModuleList(Mlp(size.width, 4 * size.width, activation="gelu") for _ in range(size.layers))
        self.head = nn.Linear(size.width, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return (self.head(x).squeeze(-1) - y).square().mean()


def fused_mlp(size: Size) -> tuple[nn.Module, Inputs]:
    rows = size.batch * size.context
    return FusedBlocks(size), {"x": torch.randn(rows, size.width), "y": torch.randn(rows)}


def our_transformer(size: Size) -> tuple[nn.Module, Inputs]:
    tokens = torch.randint(0, 256, (size.batch, size.context + 1))
    model = Transformer(Config(size.layers, size.width, size.heads, size.context))
    return model, {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def gpt2(size: Size) -> tuple[nn.Module, Inputs]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=size.context,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLMLoss",
    )
    tokens = torch.randint(0, 256, (size.batch, size.context))
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


def llama(size: Size) -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.width,
        intermediate_size=8 * size.width // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        max_position_embeddings=size.context,
        use_cache=False,
    )
    tokens = torch.randint(0, 256, (size.batch, size.context))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def vit(size: Size) -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        image_size=size.pixels,
        patch_size=8,
        num_labels=10,
        hidden_dropout_prob=0.1,
    )
    return ViTForImageClassification(config), images(size)


def resnet(size: Size) -> tuple[nn.Module, Inputs]:
    from transformers import ResNetConfig, ResNetForImageClassification

    width = size.width // 2
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=10,
    )
    return ResNetForImageClassification(config), images(size)


def images(size: Size) -> Inputs:
    pixels = torch.randn(2 * size.batch, 3, size.pixels, size.pixels)
    return {"pixel_values": pixels, "labels": torch.randint(0, 10, (2 * size.batch,))}


MODELS: dict[str, Callable[[Size], tuple[nn.Module, Inputs]]] = {
    "fused MLP": fused_mlp,
    "our transformer": our_transformer,
    "GPT-2": gpt2,
    "Llama": llama,
    "ViT": vit,
    "ResNet": resnet,
}


def loss_of(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.loss


def trained(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """The loss, the gradients and the state after one step's forward and backward."""
    torch.manual_seed(1)
    loss = loss_of(model(**inputs))
    loss.backward()
    gradients = [torch.zeros(0) if p.grad is None else p.grad for p in model.parameters()]
    return [loss.detach(), *gradients, *model.state_dict().values()]


def rows_of(name: str, size: Size, spills: bool = False) -> Iterator[Row]:
    """`name` under six budgets; where it `spills`, with as much host memory as it likes and transfers that take no time."""
    with mock.patch("gpuckpt.pytorch.plan_maker.measure_link", return_value=Link(1e15, 0.0)):
        yield from _rows_of(name, size, 1 << 40 if spills else None)


def _rows_of(name: str, size: Size, host_bytes: int | None) -> Iterator[Row]:
    torch.manual_seed(0)
    model, inputs = MODELS[name](size)
    plain = trained(copy.deepcopy(model), inputs)
    held = copy.deepcopy(model)
    mark_resident([*held.parameters(), *held.buffers()])
    ledger = CheckpointBudget(1 << 40, device="cpu")
    with ledger:
        loss = loss_of(held(**inputs))
    del loss
    plain_bytes = ledger.peak_bytes
    probe = copy.deepcopy(model)
    smallest_bytes = fit(probe, inputs, plain_bytes, host_budget=host_bytes).plan.certificate.smallest_budget_bytes
    for share in SHARES:
        budget_bytes = smallest_bytes + round(share * (plain_bytes - smallest_bytes))
        ours = copy.deepcopy(model)
        fitted = fit(ours, inputs, budget_bytes, host_budget=host_bytes)
        got = trained(ours, inputs)
        certificate, host = fitted.plan.certificate, fitted.host_budget
        yield Row(
            name,
            len(fitted.chain),
            budget_bytes,
            certificate.peak_bytes,
            fitted.budget.peak_bytes,
            plain_bytes,
            fitted.budget.used_bytes + (0 if host is None else host.used_bytes),
            certificate.recompute_s / certificate.step_s,
            len(got) == len(plain) and all(map(torch.equal, got, plain)),
            host is not None,
            certificate.host_peak_bytes,
            0 if host is None else host.peak_bytes,
        )


def table(rows: list[Row]) -> str:
    columns = f"{'promised':>12} {'measured':>12} {'plain':>12} {'on host':>12} {'measured':>12} {'recompute':>9}"
    head = f"{'model':<16} {'stages':>6} {'budget':>10} {columns}  equal  kept"
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.model:<16} {row.stages:>6} {format_bytes(row.budget_bytes):>10} {row.promised_bytes:>12} "
            f"{row.measured_bytes:>12} {row.plain_bytes:>12} "
            f"{row.host_promised_bytes:>12} {row.host_measured_bytes:>12} {row.recompute_share:>8.1%}  "
            f"{'yes' if row.equal else 'NO':<5}  {'yes' if row.kept else 'NO'}"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Promised against measured, one panel a model: every point should lie on its ring and under the diagonal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.model for row in rows))
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.5), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        mine = [row for row in rows if row.model == name]
        scale = mine[0].plain_bytes
        shares = [row.budget_bytes / scale for row in mine]
        axis.plot([0, 1.05], [0, 1.05], color="0.8", zorder=0)
        axis.scatter(shares, [row.promised_bytes / scale for row in mine], s=90, facecolors="none", edgecolors="C0")
        axis.scatter(shares, [row.measured_bytes / scale for row in mine], s=16, color="C3")
        axis.set(title=f"{name}: plain {format_bytes(scale)}", xlim=(0, 1.05), ylim=(0, 1.05))
    figure.supxlabel("budget, as a share of the plain run's peak (grey: all of it used)")
    figure.supylabel("bytes held at the peak, same scale")
    figure.suptitle("ring: promised by the plan; dot: measured in the ledger")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = arguments(parser, size="small", models=list(MODELS)[:1], out=QUICK)
    rows: list[Row] = []
    for name in options.models:
        try:
            for spills in (False, True):
                rows += rows_of(name, SIZES[options.size], spills)
        except ImportError as missing:
            print(f"{name}: skipped, {missing.name} is not installed")
    print(table(rows))
    figures = {"size": asdict(SIZES[options.size]), "rows": [asdict(row) | {"kept": row.kept} for row in rows]}
    append(options.out / "promise.jsonl", figures)
    draw(rows, options.out / "promise.png")
    broken = sum(not row.kept for row in rows)
    print(
        f"{len(rows) - broken} of {len(rows)} promises kept to the byte; {options.out / 'promise.jsonl'}, promise.png"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
