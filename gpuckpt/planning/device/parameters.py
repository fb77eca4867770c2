"""Parameters by their shapes: bytes of weights, gradients and optimizer state, whole or sharded, as an allocator rounds them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["CUDA_BLOCK_BYTES", "ParameterShape", "rounded_bytes"]

CUDA_BLOCK_BYTES = 512
"""What torch's caching allocator rounds every tensor up to (kMinBlockSize in CUDACachingAllocator)."""


class ParameterShape(NamedTuple):
    """A parameter: its name in the model, its shape, bytes of an element; `first`: whether only what comes before the first stage
    reads it, so that its gradient is the last to come; `trained`: whether it has a gradient and optimizer state at all; `tied`:
    whether what comes before the first stage and what comes after the last one both read it."""

    name: str
    shape: tuple[int, ...]
    item_bytes: int
    first: bool = False
    trained: bool = True
    tied: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def shard_numel(self, ranks: int) -> int:
        """Elements on the fullest of `ranks` ranks: FSDP2 deals out rows and pads the last shard.

        >>> ParameterShape("weight", (10, 3), 2).shard_numel(4)
        9
        """
        rows, rest = (self.shape[0], math.prod(self.shape[1:])) if self.shape else (1, 1)
        return -(-rows // ranks) * rest


def rounded_bytes(sizes: Iterable[int]) -> int:
    """What tensors of these sizes take from the caching allocator.

    >>> rounded_bytes([1, 512, 513, 0])
    2048
    """
    return sum(-(-size // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES for size in sizes)
