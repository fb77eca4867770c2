"""The kernels without a GEMM as they ship, for the ahead-of-time compiler: the launches of their launchers, recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from .. import cross_entropy, norm
from ..host.tiles import BlockTile
from .record import Launch, recorded_spec, recording
from .specs import DTYPES, STORED, KernelSpec, block_dtypes, block_meta

__all__ = ["specs"]

_ROWS = 33
"""No multiple of 16: nothing is known of a batch."""


def specs(arch: int) -> list[KernelSpec]:
    """Cross entropy and the norms for `arch`."""
    return _cross_entropy_specs(arch) + _norm_specs(arch)


def _cross_entropy_specs(arch: int) -> list[KernelSpec]:
    """Both kernels at both blocks, without and with every option, as called on contiguous 16-byte aligned logits."""
    found = []
    target = torch.empty(_ROWS, dtype=torch.int64, device="meta")
    loss = torch.empty(_ROWS, device="meta")
    for dtype in block_dtypes(arch):
        for tile in cross_entropy.TILES:
            logits = torch.empty(_ROWS, 4 * tile.columns, dtype=DTYPES[dtype], device="meta")
            # What a program writes: a row's loss; zeros for an ignored row, or its gradient.
            stores = {"cross_entropy_fwd": {"f32": 1}, "cross_entropy_bwd": {f"{tile.columns}x{STORED[dtype]}": 2}}
            for variant, softcap, smoothing in (("plain", None, 0.0), ("softcap_smooth", 30.0, 0.1)):
                with recording(arch) as launches:
                    for run in (cross_entropy.cross_entropy_fwd, cross_entropy.cross_entropy_bwd):
                        run(logits, target, loss, softcap=softcap, label_smoothing=smoothing, tile=tile)
                found += [_spec(launch, variant, dtype, arch, tile, stores) for launch in launches]
    return found


def _norm_specs(arch: int) -> list[KernelSpec]:
    """The kernels for wide rows, in each dtype, as called on contiguous, 16-byte aligned tensors: LayerNorm with weight and bias,
    RMSNorm with a weight. Narrower rows take the same code in smaller blocks. The sums over rows do not know which norm it is;
    LayerNorm wants both of them."""
    found = []
    for dtype in block_dtypes(arch):
        row = Counter({f"{norm.WIDEST_BLOCK}x{STORED[dtype]}": 1})
        stores = {
            "norm_fwd": row,
            "norm_bwd_rows": row + Counter({"f32": 2}),
            "norm_bwd_columns": {f"{norm.COLUMNS_PER_SUM}xf32": 2},
        }
        # With memory: the launcher asks whether two of them share it.
        x, dy, out = (torch.empty(_ROWS, norm.WIDEST_BLOCK, dtype=DTYPES[dtype]) for _ in range(3))
        weight, stats = x[0], torch.empty(2, _ROWS)
        sums = [torch.empty(norm.norm_partials_shape(x)) for _ in range(2)]
        for kind, bias, wanted in (("rms", None, []), ("layer", weight, sums)):
            with recording(arch) as launches:
                norm.norm_fwd(x, weight, bias, out, kind=kind)
                norm.norm_bwd(x, weight, dy, out, stats, *wanted, kind=kind)
            for launch in launches:
                rows, columns = (launch.arguments.get(name) for name in ("ROWS", "COLUMNS"))
                tile = BlockTile(rows or 1, columns or norm.WIDEST_BLOCK, norm.NUM_WARPS)
                found.append(_spec(launch, kind, dtype, arch, tile, stores))
    return found


def _spec(
    launch: Launch, variant: str, dtype: str, arch: int, tile: BlockTile, stores: Mapping[str, Mapping[str, int]]
) -> KernelSpec:
    meta = block_meta(stores[launch.fn.__name__.removesuffix("_kernel")])
    return recorded_spec(launch, variant=variant, dtype=dtype, arch=arch, tile=tile, meta=meta)
