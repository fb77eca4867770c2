"""The kernels without a GEMM as they ship, for the ahead-of-time compiler."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .. import cross_entropy, norm
from ..host.tiles import BlockTile
from .specs import STORED, KernelSpec, block_dtypes, block_meta, make_spec

__all__ = ["specs"]


def specs(arch: int) -> list[KernelSpec]:
    """Cross entropy and the norms for `arch`."""
    return _cross_entropy_specs(arch) + _norm_specs(arch)


def _cross_entropy_specs(arch: int) -> list[KernelSpec]:
    """Both kernels at both blocks, without and with every option, as called on contiguous 16-byte aligned logits."""
    found = []
    scalars = dict.fromkeys(("smoothing", "z_weight", "inv_softcap", "softcap"), "fp32")
    for dtype in block_dtypes(arch):
        for tile in cross_entropy.TILES:
            for variant, options in (("plain", False), ("softcap_smooth", True)):
                constexprs = {
                    "SOFTCAP": options,
                    "SMOOTH": options,
                    "BLOCK": tile.columns,
                    "INTERPRET": False,
                    "stride_t": 1,
                }
                types = {
                    "p_logits": "T",
                    "p_target": "*i64",
                    "V": "i32",
                    "stride_m": "i32",
                    "ignore_index": "i32",
                    **scalars,
                }
                common: dict[str, Any] = {"variant": variant, "dtype": dtype, "arch": arch, "tile": tile}
                divisible = ("p_logits", "p_target", "V", "stride_m")
                found.append(
                    make_spec(
                        cross_entropy.cross_entropy_fwd_kernel,
                        types={**types, "p_loss": "*fp32"},
                        constexprs=constexprs,
                        divisible=(*divisible, "p_loss"),
                        meta=block_meta({"f32": 1}),
                        **common,
                    )
                )
                found.append(
                    make_spec(
                        cross_entropy.cross_entropy_bwd_kernel,
                        types={**types, "p_dloss": "*fp32"},
                        constexprs={**constexprs, "stride_d": 1},
                        divisible=(*divisible, "p_dloss"),
                        # Zeros for an ignored row, or its gradient.
                        meta=block_meta({f"{tile.columns}x{STORED[dtype]}": 2}),
                        **common,
                    )
                )
    return found


def _norm_specs(arch: int) -> list[KernelSpec]:
    """The kernels for wide rows, in each dtype, as called on contiguous, 16-byte aligned tensors: LayerNorm with weight and bias,
    RMSNorm with a weight. Narrower rows take the same code in smaller blocks."""
    found = []
    for dtype in block_dtypes(arch):
        row = Counter({f"{norm.WIDEST_BLOCK}x{STORED[dtype]}": 1})
        for kind in norm.KINDS:
            found.append(_norm_spec(norm.norm_fwd_kernel, kind, dtype, arch, row))
            found.append(_norm_spec(norm.norm_bwd_rows_kernel, kind, dtype, arch, row + Counter({"f32": 2})))
        # The sums over rows do not know which norm it is; LayerNorm wants both of them.
        found.append(_norm_spec(norm.norm_bwd_columns_kernel, "layer", dtype, arch, {f"{norm.COLUMNS_PER_SUM}xf32": 2}))
    return found


def _norm_spec(fn: Any, kind: str, dtype: str, arch: int, stores: dict[str, int]) -> KernelSpec:
    constants: dict[str, Any] = {"LAYER": kind == "layer", "BLOCK": norm.WIDEST_BLOCK, "INTERPRET": False}
    constants |= {"ROWS": norm.ROWS_PER_SUM, "COLUMNS": norm.COLUMNS_PER_SUM}
    constants |= {"stride_w": 1, "stride_b": 1}
    if kind == "rms":
        constants["p_b"] = None
        del constants["stride_b"]
    constants = {n: v for n, v in constants.items() if n in fn.arg_names}
    special = {"p_stats": "*fp32", "p_dw": "*fp32", "p_db": "*fp32", "eps": "fp32"}
    types: dict[str, str | tuple[str, ...]] = {
        n: ("i32", "1") if n.startswith("strides_") else special.get(n, "T" if n.startswith("p_") else "i32")
        for n in fn.arg_names
        if n not in constants
    }
    shape = (norm.ROWS_PER_SUM, norm.COLUMNS_PER_SUM) if "ROWS" in constants else (1, norm.WIDEST_BLOCK)
    return make_spec(
        fn,
        variant=kind,
        dtype=dtype,
        arch=arch,
        tile=BlockTile(*shape, norm.NUM_WARPS),
        types=types,
        constexprs=constants,
        divisible=tuple(n for n in types if n not in ("eps", "M", "strides_s")),
        meta=block_meta(stores),
    )
