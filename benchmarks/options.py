"""What options inside of blocks spare: the recomputed share of a step with them and without, at shares of the plain peak.

    python benchmarks/options.py [--blocks 12] [--tokens 512] [--width 256]

A Llama of Hugging Face's with random weights, on the CPU, one thread. Both plans are made from one measurement. `held`: whether a
step held what its plan promised, byte for byte; `same`: whether its gradients are bitwise those of the plain run.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from bench_record import arguments
from torch import Tensor

import gpuckpt
from gpuckpt.planning import Chain, Plan
from gpuckpt.planning.tree import tree_text


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


def gradients(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def without_options(chain: Chain) -> Chain:
    return replace(chain, stages=tuple(replace(stage, variants=()) for stage in chain.stages))


def share(plan: Plan) -> float:
    return plan.certificate.recompute_s / plan.certificate.step_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    given = arguments(parser, blocks=4, tokens=128, width=64)
    torch.set_num_threads(1)
    model = make_model(given.blocks, given.width)
    tokens = torch.randint(0, 512, (2, given.tokens))
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    expected = gradients(model, batch)
    fitted = gpuckpt.fit(model, batch, "1TiB", repeats=5)
    chain, peak_bytes = fitted.chain, fitted.plan.certificate.peak_bytes
    print(f"plain peak {gpuckpt.format_bytes(peak_bytes)}; a block and its options:")
    for option in chain.stages[2].options:
        held, again = gpuckpt.format_bytes(chain.charge(option.saves)), 1e3 * option.again_s
        print(f"  {option.name:12} holds {held:>11}, recomputes {again:6.2f} ms")
    print("budget  without  with    step s  held  same  plan")
    for percent in (40, 60, 80):
        max_bytes = peak_bytes * percent // 100
        plain = gpuckpt.plan_chain(without_options(chain), max_bytes)
        plan = gpuckpt.plan_chain(chain, max_bytes)
        fitted = gpuckpt.fit(model, batch, max_bytes, repeats=5)
        gradients(model, batch)
        began_s = time.perf_counter()
        same = all(map(torch.equal, gradients(model, batch), expected))
        seconds = time.perf_counter() - began_s
        held = fitted.measured_peak_bytes == fitted.promised_peak_bytes
        print(
            f"{percent:5}%  {share(plain):7.3f}  {share(plan):.3f}  {seconds:6.2f}  {'yes' if held else 'no':4}  "
            f"{'yes' if same else 'no':4}  {tree_text(plan.tree)}"
        )


if __name__ == "__main__":
    main()
