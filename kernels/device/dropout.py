"""Dropout whose mask is a function of position, so that it is computed again in backward and never stored.

Element (m, n) is kept where Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), with the seed
as key and (n, m, offset) as counter, gives a 32-bit word of at least p 2^32. The mask does not depend on tiles, strides,
dtype or device; rows can be taken a chunk at a time by saying where the chunk starts (`first_row`). One of the four words of a
Philox call is used: three quarters of the arithmetic buy an element's independence from its neighbours' layout.

Kept values are scaled by 1 / (1 - p), as torch does; the bits of the mask are not torch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

__all__ = ["NO_DROPOUT", "Dropout", "drop"]


@dataclass(frozen=True)
class Dropout:
    """Which elements to drop. p: probability, 0 <= p <= 1. seed: 0 <= seed < 2^63. offset: 0 <= offset < 2^63, a stream of its
    own for each value. first_row: which row of the mask the first row of the tensors is."""

    p: float
    seed: int
    offset: int = 0
    first_row: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise ValueError(f"dropout probability must lie in [0, 1]; got {self.p}")
        for name in ("seed", "offset"):
            if not 0 <= getattr(self, name) < 1 << 63:
                raise ValueError(f"dropout {name} must lie in [0, 2^63); got {getattr(self, name)}")
        if not 0 <= self.first_row < 1 << 32:
            raise ValueError(f"dropout first_row must lie in [0, 2^32); got {self.first_row}")

    @property
    def threshold(self) -> int:
        """Words below it are dropped."""
        return round(self.p * 2**32)

    @property
    def scale(self) -> float:
        """What a kept value is multiplied by; 0 where nothing is kept."""
        return 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0

    def kernel_args(self) -> tuple[int, int, int, int, float]:
        return self.seed, self.offset, self.first_row, self.threshold, self.scale


NO_DROPOUT = Dropout(0.0, 0)


@triton.jit
def drop(v, o_m, o_n, dropout):
    """v (BM, BN) in fp32 with dropped elements zero and kept ones scaled. o_m (BM), o_n (BN): int64 positions.
    dropout: `Dropout.kernel_args`."""
    seed, offset, first_row, threshold, scale = dropout
    column = tl.broadcast_to(o_n[None, :], v.shape).to(tl.uint32)
    row = tl.broadcast_to((o_m + first_row)[:, None], v.shape).to(tl.uint32)
    stream = tl.full(v.shape, 0, tl.int64) + offset
    word, _, _, _ = tl.philox(seed, column, row, stream.to(tl.uint32), (stream >> 32).to(tl.uint32))
    return tl.where(word.to(tl.int64) >= threshold, v * scale, 0.0)
