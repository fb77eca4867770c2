"""The bytes of a whole training step, predicted from the configuration alone and measured: ten architectures, three optimizers.

    python benchmarks/whole_step.py [--out benchmarks/results] [--only NAME ...]

The ten configurations of examples/configs, narrowed to a few million parameters so that they train on a CPU. Predicted is what
`gpuckpt plan --hf` counts (no weights, equal blocks measured once), with nothing recomputed and without what it sets aside;
measured is the peak of a real step in a `StepLedger`, each tensor rounded up to 512 bytes as on a GPU. The third optimizer is
AdamW for each parameter, stepped in backward as its gradient comes.
Adds a line to whole_step.jsonl and draws whole_step.svg.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from bench_record import RESULTS, append

from gpuckpt import StepLedger
from gpuckpt.planning.device.optimizers import optimizer_called
from gpuckpt.planning.device.step_memory import StepMemory
from gpuckpt.pytorch.whole_device.hub_config import example_inputs
from gpuckpt.pytorch.whole_device.hub_model import HubModel

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
GOAL = 0.01

_LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 6,
    "vocab_size": 6000,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA,
    "llama-3-70b": _LLAMA | {"num_hidden_layers": 10, "num_key_value_heads": 1},
    "qwen3-8b": _LLAMA,
    "mixtral-8x7b": _LLAMA | {"num_hidden_layers": 4},
    "gemma-3-1b": _LLAMA | {"num_hidden_layers": 7, "sliding_window": 16},
    "gpt2-xl": {"n_embd": 128, "n_head": 4, "n_layer": 6, "vocab_size": 6000},
    "bert-large": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "vocab_size": 6000,
    },
    "t5-large": {
        "d_model": 128,
        "d_ff": 256,
        "num_heads": 4,
        "d_kv": 32,
        "num_layers": 6,
        "num_decoder_layers": 5,
        "vocab_size": 6000,
    },
    "vit-huge": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "image_size": 56,
    },
    "whisper-large": {
        "d_model": 64,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_layers": 4,
        "decoder_layers": 3,
    },
}
BATCH, CONTEXT = 2, 64


@dataclass(frozen=True)
class Row:
    model: str
    optimizer: str
    parameters: int
    predicted_bytes: int
    measured_bytes: int

    @property
    def off(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1


def adamw(model: torch.nn.Module) -> tuple[Any, Callable[[], None]]:
    return _at_the_end(torch.optim.AdamW(model.parameters(), fused=True))


def sgd_momentum(model: torch.nn.Module) -> tuple[Any, Callable[[], None]]:
    return _at_the_end(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))


def in_backward(model: torch.nn.Module) -> tuple[Any, Callable[[], None]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    each = {parameter: torch.optim.AdamW([parameter], fused=True) for parameter in trained}

    def step(parameter: torch.Tensor) -> None:
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(step)
    return list(each.values()), lambda: None


def _at_the_end(optimizer: torch.optim.Optimizer) -> tuple[Any, Callable[[], None]]:
    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, finish


OPTIMIZERS: dict[str, tuple[str, bool, Callable[[torch.nn.Module], tuple[Any, Callable[[], None]]]]] = {
    "AdamW": ("adamw", False, adamw),
    "SGD with momentum": ("sgd-momentum", False, sgd_momentum),
    "AdamW in backward": ("adamw", True, in_backward),
}


def rows_of(name: str) -> list[Row]:
    """`name` under each optimizer."""
    import transformers

    record = {**json.loads((CONFIGS / f"{name}.json").read_text()), **SHAPES[name]}
    # torch's grouped products have float32 only where they are computed
    hub = HubModel(record, "bf16" if name.startswith("mixtral") else "fp32")
    context = CONTEXT if hub.reads_tokens else None
    chain = hub.chain(BATCH, context)
    inputs = {
        key: torch.randint(1, 900, each.shape) if each.dtype == torch.long else torch.randn(each.shape).to(each.dtype)
        for key, each in example_inputs(hub.whole, BATCH, context).items()
    }
    found = []
    for title, (costs, steps_in_backward, make) in OPTIMIZERS.items():
        torch.manual_seed(0)
        model = getattr(transformers, hub.name)._from_config(hub.config, dtype=hub.dtype).train()
        optimizer, finish = make(model)
        for _ in range(2):  # the first makes the optimizer's state
            with StepLedger(model, optimizer) as ledger:
                model(**inputs).loss.backward()
                finish()
        memory = StepMemory(
            chain,
            hub.parameters,
            optimizer_called(costs),
            buffers_bytes=hub.buffers_bytes(BATCH, context),
            given=hub.given,
            in_backward=steps_in_backward,
        )
        predicted_bytes = memory.plan(1 << 50, "none").peak_bytes - memory.set_aside_bytes
        found.append(Row(name, title, hub.parameter_count, predicted_bytes, ledger.peak_total_bytes(512)))
    return found


def table(rows: list[Row]) -> str:
    head = f"{'model':<14} {'optimizer':<18} {'parameters':>12} {'predicted':>14} {'measured':>14} {'off':>7}"
    lines = [head, "-" * len(head)]
    lines += [
        f"{row.model:<14} {row.optimizer:<18} {row.parameters:>12,} {row.predicted_bytes:>14,} {row.measured_bytes:>14,} "
        f"{row.off:>+7.2%}"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """How far off each prediction is; the goal is the grey band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.model for row in rows))
    figure, axis = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    axis.axhspan(-100 * GOAL, 100 * GOAL, color="0.93", zorder=0)
    axis.axhline(0, color="0.6", linewidth=1)
    for shift, (title, marker) in enumerate(zip(OPTIMIZERS, "os^", strict=True)):
        mine = [row for row in rows if row.optimizer == title]
        places = [names.index(row.model) + 0.18 * (shift - 1) for row in mine]
        axis.scatter(places, [100 * row.off for row in mine], marker=marker, s=34, label=title)
    axis.set_xticks(range(len(names)), names, rotation=25, ha="right")
    axis.set(ylabel="predicted against measured, %", ylim=(-1.5, 1.5), title="peak bytes of a whole training step")
    axis.legend(loc="lower left", ncols=3, fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    rows = [row for name in options.only for row in rows_of(name)]
    print(table(rows))
    append(options.out / "whole_step.jsonl", {"rows": [asdict(row) | {"off": row.off} for row in rows]})
    draw(rows, options.out / "whole_step.svg")
    worst = max(abs(row.off) for row in rows)
    print(f"the worst is {worst:.2%} off; {options.out / 'whole_step.jsonl'}, whole_step.svg")
    return 1 if worst > GOAL else 0


if __name__ == "__main__":
    raise SystemExit(main())
