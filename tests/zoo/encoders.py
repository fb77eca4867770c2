"""Encoders, and encoders with decoders, of text and speech."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.registry import SKIPPED, VOCABULARY, architecture, padded_text, tokens

WIDE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


def _to_classify() -> dict[str, Any]:
    return padded_text() | {"labels": torch.tensor([0, 1])}


def _to_translate() -> dict[str, Any]:
    return padded_text() | {"labels": tokens(2, 16, seed=6)}


@architecture(0.21, fast=True)
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**TEXT, **WIDE)), _to_classify()


@architecture(0.19)
def deberta():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        **TEXT,
        **WIDE,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    )
    return DebertaV2ForSequenceClassification(config), _to_classify()


@architecture(0.19)
def modernbert():
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(**TEXT, **WIDE, **SPECIAL, cls_token_id=1, sep_token_id=2, local_attention=8)
    return ModernBertForMaskedLM(config), padded_text()


@architecture(0.18)
def albert_shared_layers():
    from transformers import AlbertConfig, AlbertForMaskedLM

    return AlbertForMaskedLM(AlbertConfig(**TEXT, **WIDE, embedding_size=16, hidden_dropout_prob=0.1)), padded_text()


@architecture(0.19)
def electra():
    from transformers import ElectraConfig, ElectraForTokenClassification

    return ElectraForTokenClassification(ElectraConfig(**TEXT, **WIDE, embedding_size=16, num_labels=VOCABULARY)), (
        padded_text()
    )


@architecture(0.17, fast=True)
def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), _to_translate()


@architecture(0.23)
def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(**TEXT, **LAYERS, **SPECIAL, decoder_start_token_id=2, forced_eos_token_id=2)
    return BartForConditionalGeneration(config), _to_translate()


@architecture(0.21)
def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **LAYERS,
        **SPECIAL,
        vocab_size=VOCABULARY,
        max_source_positions=32,
        max_target_positions=32,
        num_mel_bins=8,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        dropout=0.1,
    )
    features = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(5))
    return WhisperForConditionalGeneration(config), {"input_features": features, "labels": tokens(2, 16)}


@architecture(0.21, varies=SKIPPED)
def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **WIDE,
        vocab_size=32,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.05,
        mask_time_length=2,
    )
    sound = torch.randn(2, 1200, generator=torch.Generator().manual_seed(5))
    return Wav2Vec2ForCTC(config), {"input_values": sound, "labels": tokens(2, 10, top=32)}
