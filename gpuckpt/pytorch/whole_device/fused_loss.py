"""A causal language model whose last layer and loss are one operation that keeps no logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpuckpt.functional import linear_cross_entropy
from gpuckpt.pytorch.ops._loss_chunks import chunk_rows_for, transient_bytes

__all__ = ["FusedLossModel"]


class FusedLossModel(nn.Module):
    """A Hugging Face causal language model that returns its loss, by `gpuckpt.functional.linear_cross_entropy`.

    Raises `ValueError` for a model whose output is not one linear layer on what its decoder returns.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        plain = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and isinstance(head, nn.Linear)
        if not plain or getattr(model.config, "final_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} has no output layer and loss that could be fused into one operation"
            )
        self.model: Any = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of the next token. input_ids, labels (batch, tokens), -100 where a label does not count."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False)[0]
        head = self.model.get_output_embeddings()
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        rows = hidden.reshape(-1, hidden.shape[-1])
        return linear_cross_entropy(rows, head.weight, shifted.reshape(-1))

    def scratch_bytes(self, rows: int) -> int:
        """What the operation takes within itself, for so many tokens: no operator outside of it sees that."""
        weight = self.model.get_output_embeddings().weight
        vocab, width = weight.shape
        chunk = chunk_rows_for(rows, width, vocab, weight.element_size())
        return transient_bytes(rows, width, vocab, weight.dtype, chunk)
