"""Images, and images with text."""

from __future__ import annotations

import torch

from tests.zoo.language import COMMON
from tests.zoo.registry import VOCABULARY, architecture, images, tokens

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


def _to_classify(size: int) -> dict:
    return {"pixel_values": images(size=size), "labels": torch.arange(2)}


@architecture(0.19, fast=True)
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**VIT, num_labels=10, hidden_dropout_prob=0.1)), _to_classify(16)


@architecture(0.18)
def dinov2():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(Dinov2Config(**VIT, num_labels=10, drop_path_rate=0.1)), _to_classify(16)


@architecture(0.31)
def swin():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2, 2], num_heads=[2, 4, 4], window_size=4, num_labels=10
    )
    return SwinForImageClassification(config), _to_classify(32)


@architecture(0.31)
def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=[16, 32, 48], depths=[2, 2, 2], num_stages=3, patch_size=2, drop_path_rate=0.1, num_labels=10
    )
    return ConvNextForImageClassification(config), _to_classify(32)


@architecture(0.12)
def clip():
    from transformers import CLIPConfig, CLIPModel

    written = {name: VIT[name] for name in VIT if name not in ("image_size", "patch_size")}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(
        text_config={**written, **special, "vocab_size": VOCABULARY, "max_position_embeddings": 32},
        vision_config=dict(VIT),
        projection_dim=16,
    )
    return CLIPModel(config), {"input_ids": tokens(2, 16), "pixel_values": images(size=16), "return_loss": True}


@architecture(0.19, gap="what code after the layers has saved of one that is dropped is promised for")
def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VIT),
        text_config=LlamaConfig(**COMMON),
        image_token_index=VOCABULARY - 1,
        vision_feature_layer=-2,
    )
    prompt = tokens(2, 32).clamp(max=VOCABULARY - 2)
    prompt[:, 1:17] = VOCABULARY - 1  # 16 patches
    asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "labels": prompt.clone()}
    return LlavaForConditionalGeneration(config), asked | {"pixel_values": images(size=16)}


@architecture(0.49)
def segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 2, 4],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=16,
        num_labels=4,
    )
    labels = torch.randint(0, 4, (2, 32, 32), generator=torch.Generator().manual_seed(5))
    return SegformerForSemanticSegmentation(config), {"pixel_values": images(size=32), "labels": labels}


@architecture(0.56, fast=True)
def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24, 32], depths=[2, 2, 2], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config), _to_classify(32)
