"""The dtypes kernels take, and what they are called here."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ELEMENT_BYTES", "dtype_name"]

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def dtype_name(t: Tensor) -> str:
    """ "fp32", "fp16" or "bf16"; TypeError for anything else."""
    try:
        return _DTYPES[t.dtype]
    except KeyError:
        raise TypeError(f"kernels take float32, float16 or bfloat16; got {t.dtype}") from None
