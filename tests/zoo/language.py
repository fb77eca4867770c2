"""Decoders: dense, mixtures of experts, state spaces. Caches on, as configured by default; sequences are padded."""

from __future__ import annotations

from typing import Any

from tests.zoo.registry import SKIPPED, VOCABULARY, architecture, padded_text, text

ROUTED = "experts get as many tokens as are routed to them"
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@architecture(0.20, fast=True)
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**COMMON)), padded_text()


@architecture(0.18)
def llama_eager_attention_dropout():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**COMMON, attn_implementation="eager", attention_dropout=0.1)
    return LlamaForCausalLM(config), padded_text()


@architecture(0.18)
def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8)), padded_text()


@architecture(0.17, fast=True)
def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=8)), padded_text()


@architecture(0.19)
def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=8, sliding_window=8)), padded_text()


@architecture(0.20)
def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**COMMON, sliding_window=8)), padded_text()


@architecture(0.19)
def phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**COMMON, resid_pdrop=0.1)), padded_text()


@architecture(0.18, fast=True)
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config), padded_text()


@architecture(0.17)
def gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**config, hidden_dropout=0.1)), padded_text()


@architecture(0.16, varies=SKIPPED)
def opt_layerdrop():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=4,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        layerdrop=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return OPTForCausalLM(config), padded_text()


@architecture(0.26, varies=ROUTED)
def deepseek_v3():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return DeepseekV3ForCausalLM(config), padded_text()


@architecture(0.20, fast=True, varies=ROUTED)
def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    return MixtralForCausalLM(config), padded_text()


@architecture(0.16, varies=ROUTED)
def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=8)), padded_text()


@architecture(0.25, varies=ROUTED)
def qwen3_next():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **COMMON,
        **EXPERTS,
        head_dim=8,
        shared_expert_intermediate_size=32,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        use_cache=False,  # the library's own forward fails on its cache when it trains
    )
    return Qwen3NextForCausalLM(config), padded_text()


def _small_ids() -> dict[str, int]:
    return {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _unmasked(batch: int, length: int) -> dict[str, Any]:
    found = text(batch, length)
    return {"input_ids": found["input_ids"], "labels": found["labels"]}


@architecture(0.29, fast=True)
def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(**_small_ids(), hidden_size=16, state_size=4, num_hidden_layers=3)), _unmasked(
        2, 12
    )


@architecture(0.24)
def mamba2():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        **_small_ids(),
        hidden_size=16,
        state_size=4,
        num_hidden_layers=3,
        head_dim=8,
        num_heads=4,
        n_groups=2,
        chunk_size=8,
    )
    return Mamba2ForCausalLM(config), _unmasked(2, 16)


@architecture(0.32)
def rwkv():
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        attention_hidden_size=16,
        num_hidden_layers=3,
        context_length=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return RwkvForCausalLM(config), _unmasked(2, 16)


@architecture(0.15)
def falcon_h1():
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        **COMMON,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    )
    return FalconH1ForCausalLM(config), text(2, 16)
