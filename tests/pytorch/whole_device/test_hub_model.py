"""Models by their configuration: published sizes, and the chain of equal blocks measured once against the whole one measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from gpuckpt.planning.device.layout import ParallelLayout
from gpuckpt.pytorch.profiling.measure import measure, run_fake
from gpuckpt.pytorch.profiling.runner import Measured
from gpuckpt.pytorch.whole_device import hub_model
from gpuckpt.pytorch.whole_device.hub_config import example_inputs, one_sequence_a_sample
from gpuckpt.pytorch.whole_device.hub_model import HubModel

CONFIGS = Path(__file__).parents[3] / "examples" / "configs"

PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-3-1b": 999_885_952,
    "gpt2-xl": 1_557_611_200,
    "bert-large": 335_174_458,
    "t5-large": 737_668_096,
    "vit-huge": 632_045_800,
    "whisper-large": 1_543_304_960,
}
"""Of BERT's the masked language model without pooler; of ViT-H/14 with a classifier for 1,000 classes."""


def contents(name: str, **changed: Any) -> dict[str, Any]:
    return {**json.loads((CONFIGS / f"{name}.json").read_text()), **changed}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name: str) -> None:
    model = HubModel(CONFIGS / f"{name}.json")
    assert model.parameter_count == PUBLISHED[name]
    assert sum(parameter.numel for parameter in model.parameters) == PUBLISHED[name]


def test_every_example_is_counted() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == PUBLISHED.keys()


def small(name: str, blocks: int) -> dict[str, Any]:
    """The architecture with narrow layers."""
    shapes = {
        "llama-3-8b": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
        "mixtral-8x7b": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "gemma-3-1b": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "sliding_window": 8},
        "gpt2-xl": {"n_embd": 64, "n_head": 4},
        "bert-large": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
        "t5-large": {"d_model": 64, "d_ff": 96, "num_heads": 4, "d_kv": 16, "num_decoder_layers": blocks - 1},
        "whisper-large": {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "decoder_layers": blocks - 1},
        "vit-huge": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 28},
    }
    depth = {"gpt2-xl": "n_layer", "t5-large": "num_layers", "whisper-large": "encoder_layers"}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4} if name == "whisper-large" else {}
    vocab = {} if name == "whisper-large" else {"vocab_size": 6000}  # its special tokens come last
    return contents(name, **shapes[name], **heads, **{depth.get(name, "num_hidden_layers"): blocks}, **vocab)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("llama-3-8b", 7),
        ("mixtral-8x7b", 5),
        pytest.param("gemma-3-1b", 19, marks=pytest.mark.slow),
        ("gpt2-xl", 6),
        ("bert-large", 6),
        pytest.param("t5-large", 7, marks=pytest.mark.slow),
        ("whisper-large", 6),
        ("vit-huge", 6),
    ],
)
def test_blocks_measured_once_are_those_of_the_whole_model(
    name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HubModel(small(name, blocks))
    depths: list[int] = []

    def counted(*args: Any) -> Measured:
        measured = run_fake(*args)
        depths.append(len(measured.chain))
        return measured

    monkeypatch.setattr(hub_model, "run_fake", counted)
    context = 64 if model.reads_tokens else None
    found = model.chain(2, context)
    with one_sequence_a_sample():
        whole = measure(model.whole, example_inputs(model.whole, 2, context), fake=True, unit_bytes=512)
    assert depths[-1] < len(whole) == len(found)
    assert found.fingerprint() == whole.fingerprint()
    assert [stage.workspace_bytes for stage in found.stages] == [stage.workspace_bytes for stage in whole.stages]
    for one, other in zip(found.stages, whole.stages, strict=True):
        assert (one.forward_s, one.backward_s) == pytest.approx((other.forward_s, other.backward_s), rel=1e-9)


def test_a_model_whose_blocks_all_differ_is_measured_whole() -> None:
    sizes = {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 97,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        **sizes,
    }
    model = HubModel(config)
    assert len(model.chain(1, 8)) == 5


def test_a_rank_of_tensor_parallelism_has_its_part() -> None:
    whole, rank = (
        HubModel(CONFIGS / "llama-3-8b.json"),
        HubModel(CONFIGS / "llama-3-8b.json", layout=ParallelLayout(tp=2)),
    )
    assert rank.parameter_count == whole.parameter_count
    norms = (2 * 32 + 1) * 4096  # of two in a block, and one after the last, each rank has all
    assert sum(p.numel for p in rank.parameters) == (whole.parameter_count - norms) // 2 + norms
    half, full = rank.chain(1, 256), whole.chain(1, 256)
    sizes = [
        (full.storages[i], half.storages[j])
        for one, other in zip(full.stages[1:-1], half.stages[1:-1], strict=True)
        for i, j in zip(one.saves, other.saves, strict=True)
    ]
    assert {big / small for big, small in sizes} == {1.0, 2.0}
    # What the norms read and put out stays whole (and tables of positions); heads and MLPs are split.
    assert {big // 256 for big, small in sizes if big == small} == {4, 2 * 128, 2 * 4096, 4 * 4096}
    assert {big // 256 for big, small in sizes if big > small} == {4 * 32, 2 * 1024, 2 * 4096, 2 * 14336}


def test_the_fused_loss_keeps_no_logits() -> None:
    plain, fused = HubModel(small("llama-3-8b", 4)), HubModel(small("llama-3-8b", 4), fused_loss=True)
    logits_bytes = 2 * 64 * 6000 * 4
    before, after = plain.chain(2, 64), fused.chain(2, 64)
    assert before.charge(before.stages[-1].saves) > logits_bytes
    assert after.charge(after.stages[-1].saves) < logits_bytes / 20
    assert [stage.name for stage in after.stages[1:-1]] == [f"model.{stage.name}" for stage in before.stages[1:-1]]
    with pytest.raises(ValueError, match="BertForMaskedLM has no output layer and loss that could be fused"):
        HubModel(small("bert-large", 3), fused_loss=True)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, "has no model_type"),
        ({"model_type": "abacus"}, "model_type 'abacus' is unknown to transformers"),
        (contents("llama-3-8b", architectures=["AbacusForCausalLM"]), "architecture 'AbacusForCausalLM' is unknown"),
        (contents("llama-3-8b", hidden_size=-4), "cannot be built|is no configuration"),
        (contents("llama-3-8b", num_attention_heads=31), "cannot be built|is no configuration"),
        (contents("llama-3-8b", hidden_size="wide"), "cannot be built|is no configuration"),
    ],
)
def test_configurations_that_make_no_model(source: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HubModel(source)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"is no JSON .*expected a Hugging Face config\.json"):
        HubModel(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="has no model_type"):
        HubModel(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        ("llama-3-8b", ParallelLayout(tp=3), "tp=3 does not divide .*num_key_value_heads=8.*; allowed are 1, 2, 4, 8"),
        ("gpt2-xl", ParallelLayout(tp=2), "no tensor-parallel plan for 'gpt2'; allowed is tp=1"),
    ],
)
def test_layouts_that_do_not_match(name: str, layout: ParallelLayout, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HubModel(CONFIGS / f"{name}.json", layout=layout)


def test_steps_that_cannot_be() -> None:
    gpt2, vit = HubModel(CONFIGS / "gpt2-xl.json"), HubModel(CONFIGS / "vit-huge.json")
    for model, batch, context, words in (
        (gpt2, 0, 8, "batch is 0"),
        (gpt2, 1, 0, "context is 0"),
        (gpt2, 1, 1025, "GPT2LMHeadModel has 1024 positions"),
        (vit, 1, 8, "reads images, which have no length"),
    ):
        with pytest.raises(ValueError, match=words):
            model.chain(batch, context)
    with pytest.raises(ValueError, match="dtype 'int8': expected one of bf16, fp16, fp32"):
        HubModel(CONFIGS / "gpt2-xl.json", "int8")


def test_a_forward_that_fails_says_why() -> None:
    """torch's grouped products have no float32 where nothing is computed."""
    model = HubModel(small("mixtral-8x7b", 3), "fp32")
    with pytest.raises(ValueError, match=r"MixtralForCausalLM cannot run 2 samples of 64 tokens in fp32: .*BF16"):
        model.chain(2, 64)
