"""What `tune` times: one launch of each kind of kernel, on random operands, as the layers call it.

Shapes: x (M, K), weights (N, K), bias (N), the second layer's weight (K, N), so that its gradient dy is (M, K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..audit.specs import DTYPES
from ..device.dropout import Dropout
from ..gated import db_partials_shape as gated_db_shape
from ..gated import gated_fwd, gated_plain_bwd, gated_triple_bwd
from ..host.tiles import TileConfig
from ..linear import db_partials_shape as linear_db_shape
from ..linear import linear_fwd, linear_recompute_bwd
from ..mlp import db_partials_shape as mlp_db_shape
from ..mlp import mlp_dual_bwd

__all__ = ["DTYPES", "calls"]

Launch = Callable[[], None]


def calls(
    kind: str, M: int, N: int, K: int, dtype: str, activation: str, device: str | torch.device
) -> Callable[[TileConfig], Launch]:
    """make(tile): a launch of `kind` with that tile. Operands, results and scratch are allocated here, once for all tiles."""

    def random(*shape: int) -> Tensor:
        # Random bits, not zeros: a GPU's power, and so its clock, depends on the data.
        return torch.randn(shape, device=device, dtype=DTYPES[dtype])

    # No tile is lower than 16 rows, so none has more rows of partial sums than this.
    scratch = torch.empty(2, -(-M // 16) * N, device=device, dtype=torch.float32)

    def sums(number: int, shape: tuple[int, int]) -> Tensor:
        return scratch[number, : shape[0] * shape[1]].view(shape)

    x, w, b = random(M, K), random(N, K), random(N)
    first, second, third = (torch.empty(M, N, device=device, dtype=DTYPES[dtype]) for _ in range(3))

    if kind in ("linear", "linear_dropout"):
        dropout = Dropout(0.1, seed=1) if kind == "linear_dropout" else None
        grad = random(M, N)

        def linear(tile: TileConfig) -> Launch:
            db = sums(0, linear_db_shape(x, w, tile, dropout))

            def launch() -> None:
                linear_fwd(x, w, b, first, activation=activation, dropout=dropout, tile=tile)
                linear_recompute_bwd(
                    x, w, b, grad, second, db, activation=activation, h=third, dropout=dropout, tile=tile
                )

            return launch

        return linear

    dy, wd = random(M, K), random(K, N)
    if kind == "dual":

        def dual(tile: TileConfig) -> Launch:
            db = sums(0, mlp_db_shape(x, w, wd, form="dual", tile=tile))
            return lambda: mlp_dual_bwd(x, w, b, dy, wd, first, second, db, activation=activation, tile=tile)

        return dual

    wu, bu = random(N, K), random(N)
    if kind == "gated_fwd":
        return lambda tile: lambda: gated_fwd(x, w, b, wu, bu, first, activation=activation, tile=tile)

    third.copy_(random(M, N))  # dh, which plain overwrites with dz_u

    def plain(tile: TileConfig) -> Launch:
        dbg, dbu = (sums(number, gated_db_shape(x, w, wu, wd, tile, "plain")) for number in range(2))
        return lambda: gated_plain_bwd(
            x, w, b, wu, bu, first, second, third, dbg, dbu, activation=activation, tile=tile
        )

    def triple(tile: TileConfig) -> Launch:
        dbg, dbu = (sums(number, gated_db_shape(x, w, wu, wd, tile, "triple")) for number in range(2))
        return lambda: gated_triple_bwd(
            x, w, b, wu, bu, dy, wd, first, second, third, dbg, dbu, activation=activation, tile=tile
        )

    return plain if kind == "gated_plain" else triple
