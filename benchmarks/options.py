"""What options inside of blocks spare: the recomputed share of a step with them and without, at shares of the plain peak.

    python benchmarks/options.py [MODEL ...] [--percents 20 40 60] [--cpu-seconds] [--record]

Hugging Face's models with random weights, on the CPU, one thread: "llama" (12 blocks, width 256, 2 x 512 tokens), "llama-long" (6
blocks, 1 x 2048 tokens), "gpt2" and "vit" (6 blocks, width 256). Both plans are made from one measurement. `held`: whether a step
held what its plan promised, byte for byte; `same`: whether its gradients are bitwise those of the plain run. --cpu-seconds times
by the thread's own seconds, for a machine that others use; --record adds lines to results/options.jsonl.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_record import append, arguments
from torch import Tensor

import gpuckpt
from gpuckpt.planning import Chain, Plan
from gpuckpt.planning.tree import flatten
from gpuckpt.pytorch import plan_maker

RESULTS = Path(__file__).parent / "results" / "options.jsonl"


class ThreadSeconds:
    exact = False

    def now(self) -> float:
        return time.thread_time()


def make_model(blocks: int, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def make_case(name: str) -> tuple[Any, dict[str, Any]]:
    """A model and the keyword arguments of a call that returns its loss."""
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    if name == "vit":
        sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
        model: Any = ViTForImageClassification(ViTConfig(**sizes, image_size=128, patch_size=8))
        return model, {"pixel_values": torch.randn(4, 3, 128, 128), "labels": torch.tensor([0, 1, 0, 1])}
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=256, n_layer=6, n_head=4, use_cache=False))
    else:
        model = make_model(6 if name == "llama-long" else 12, 256)
    tokens = torch.randint(0, 512, (1, 2048) if name == "llama-long" else (2, 512))
    return model, {"input_ids": tokens, "labels": tokens, "use_cache": False}


def gradients(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def without_options(chain: Chain) -> Chain:
    return replace(chain, stages=tuple(replace(stage, variants=()) for stage in chain.stages))


def share(plan: Plan) -> float:
    return plan.certificate.recompute_s / plan.certificate.step_s


def run(name: str, percents: list[int]) -> list[dict[str, Any]]:
    model, batch = make_case(name)
    expected = gradients(model, batch)
    fitted = gpuckpt.fit(model, batch, "1TiB", repeats=5)
    chain, peak_bytes = fitted.chain, fitted.plan.certificate.peak_bytes
    print(f"{name}: plain peak {gpuckpt.format_bytes(peak_bytes)}; a block and its options:")
    for option in chain.stages[2].options:
        held, again = gpuckpt.format_bytes(chain.charge(option.saves)), 1e3 * option.again_s
        print(f"  {option.name:50} holds {held:>11}, recomputes {again:6.2f} ms")
    print("budget  without  with  planned in  held  same  options")
    rows = []
    for percent in percents:
        max_bytes = peak_bytes * percent // 100
        plain = gpuckpt.plan_chain(without_options(chain), max_bytes)
        began_s = time.thread_time()
        plan = gpuckpt.plan_chain(chain, max_bytes)
        planned_s = time.thread_time() - began_s
        fitted = gpuckpt.fit(model, batch, max_bytes, plan=plan, repeats=1)
        gradients(model, batch)
        same = all(map(torch.equal, gradients(model, batch), expected))
        held_so = fitted.measured_peak_bytes == fitted.promised_peak_bytes
        used = sum(step.variant not in (None, "keep") for step in flatten(plan.tree))
        rows.append({"model": name, "percent": percent, "whole_blocks": share(plain), "with_options": share(plan)})
        rows[-1] |= {"planned_s": planned_s, "held": held_so, "same": same}
        print(
            f"{percent:5}%  {share(plain):7.3f}  {share(plan):.3f}  {planned_s:8.2f} s  {'yes' if held_so else 'no':4}  "
            f"{'yes' if same else 'no':4}  {used}"
        )
        fitted.unfit()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--percents", type=int, nargs="+", default=[20, 40, 60, 80])
    parser.add_argument("--cpu-seconds", action="store_true")
    parser.add_argument("--record", action="store_true")
    given = arguments(parser, models=["gpt2"], percents=[40])
    torch.set_num_threads(1)
    if given.cpu_seconds:
        plan_maker.WallClock = ThreadSeconds  # type: ignore[misc,assignment]
    for name in given.models or ("llama", "llama-long", "gpt2", "vit"):
        for row in run(name, given.percents):
            if given.record or given.quick:
                append(RESULTS, row | {"clock": "cpu seconds" if given.cpu_seconds else "wall seconds"})


if __name__ == "__main__":
    main()
