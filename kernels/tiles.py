"""Tile choices: a frozen configuration, one predicate that says whether it can run, one analytic rule that picks it.

Everything here is pure arithmetic on ints and strings; nothing is timed and nothing is tuned, so forward and recompute
always agree on the order of the reduction over K, and a recomputed z has the bits of the first one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TileConfig"]


@dataclass(frozen=True)
class TileConfig:
    """One tile of the output and how it is computed.

    bm, bn: rows and columns of the output tile; bk: step of the K loop; group_m: row tiles that run together, so that they
    share weight tiles in L2; num_warps, num_stages: Triton's options.
    """

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    @property
    def label(self) -> str:
        """Short name, e.g. "128x128x64w8s3"."""
        return f"{self.bm}x{self.bn}x{self.bk}w{self.num_warps}s{self.num_stages}"
