"""Dropout whose mask is a function of seed and position, so that backward computes it again and nothing is stored but the seed.

The same bits as `gpuckpt.kernels.device.dropout`: element (m, n) is dropped where Philox4x32-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"), with the seed as key and (n, m, 0, 0) as counter, gives a word below p 2^32. Numba, because
the ten rounds are 120 passes over memory when they are written as operations on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

from gpuckpt.checks import check_number
from gpuckpt.pytorch.engine.fence.randomness import capturing

if TYPE_CHECKING:
    from gpuckpt.kernels.device.dropout import Dropout

__all__ = ["Mask", "check_dropout", "draw_seed"]

_BLOCK = 256  # rows of the mask that exist at a time

_U = np.uint64


@dataclass(frozen=True)
class Mask:
    """The mask of one operation. p: probability of dropping an element. seed: 0 to 2^63 - 1."""

    p: float
    seed: int

    @staticmethod
    def of(p: float, seed: Tensor | None) -> Mask | None:
        """None where nothing is dropped. Raises `RuntimeError` while a CUDA graph is being captured."""
        if seed is None:
            return None
        if capturing():
            raise RuntimeError(
                f"dropout={p}: its seed would become a constant of the CUDA graph, and all replays would drop the same elements; "
                "capture with dropout=0.0 and a torch.nn.Dropout after it"
            )
        return Mask(p, int(seed))

    def kernel(self, first_row: int) -> Dropout:
        """The same for a Triton kernel whose first row is row `first_row` of the whole."""
        from gpuckpt.kernels.device.dropout import Dropout

        return Dropout(self.p, self.seed, first_row=first_row)

    def apply_(self, t: Tensor, first_row: int) -> Tensor:
        """Drop elements of t (C, N) in place, and scale the others by 1 / (1 - p)."""
        if self.p >= 1.0:
            return t.zero_()
        t.mul_(1.0 / (1.0 - self.p))
        threshold = _U(round(self.p * 2**32))
        for first in range(0, t.shape[0], _BLOCK):
            part = t[first : first + _BLOCK]
            dropped = np.empty(part.shape, dtype=np.bool_)
            _fill(dropped, _U(self.seed), _U(first_row + first), threshold)
            part.masked_fill_(torch.from_numpy(dropped).to(t.device), 0)
        return t


@numba.njit(cache=True, nogil=True)
def _fill(dropped: Any, seed: Any, first_row: Any, threshold: Any) -> None:
    low = np.uint64(0xFFFFFFFF)
    for m in range(dropped.shape[0]):
        for n in range(dropped.shape[1]):
            c0, c1 = np.uint64(n) & low, (first_row + np.uint64(m)) & low
            c2, c3 = np.uint64(0), np.uint64(0)
            k0, k1 = seed & low, seed >> np.uint64(32)
            for _ in range(10):
                a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
                c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & low, (a >> np.uint64(32)) ^ c3 ^ k1, a & low
                k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
            dropped[m, n] = c0 < threshold


def check_dropout(p: float) -> None:
    """Raise `TypeError` or `ValueError` for a p that is no probability."""
    if type(p) is not float or not 0.0 <= p <= 1.0:
        check_number(p, "dropout", 0.0, 1.0)


def draw_seed(p: float) -> Tensor | None:
    """A seed from torch's CPU generator, as a tensor on the CPU; None where nothing is dropped."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64) if p > 0.0 else None
