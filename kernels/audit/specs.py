"""Every kernel that ships: what is compiled, with which types, tiles and promises.

A `KernelSpec` is all that an ahead-of-time compiler needs; nothing here touches a GPU or compiles anything. `gemm_specs` and
`block_specs` say which launches there are, `record` makes specs of them, and `shipped` collects these.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "ARCHS",
    "DTYPES",
    "SPEC_MODULES",
    "STORED",
    "WHOLE_ARCHS",
    "KernelSpec",
    "block_dtypes",
    "block_meta",
    "make_spec",
    "shipped",
]

ARCHS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that kernels are shipped for, as ints: 80 is sm_80."""

SPEC_MODULES: tuple[str, ...] = ("gemm_specs", "block_specs")
"""Modules of this room that state specs, each in a function `specs(arch)`."""

WHOLE_ARCHS = (80, 90, 100)
"""Those that everything is compiled for. sm_86, sm_89 and sm_120 run sm_80's kernels through the same code generator: for them it
is bf16 in full, and of the other dtypes what is preferred."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

STORED = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
"""What Triton's IR calls an element of each dtype."""

_POINTER_TYPES = {
    "fp32": "*fp32",
    "fp16": "*fp16",
    "bf16": "*bf16",
}


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """One kernel at one tile, dtype and architecture, as `triton.compile(ASTSource(...))` wants it.

    name: unique within an architecture, e.g. "linear_fwd[gelu_tanh,bf16,128x128x64]".
    fn: the `triton.jit` function. Under TRITON_INTERPRET=1 it is an interpreted one and cannot be compiled.
    signature: argument name -> Triton type ("*bf16", "i64", "constexpr", ...), in the order of `fn`'s arguments; of strides that
    are passed as a tuple, a tuple of types.
    constexprs: argument name -> value, or (argument index, place in the tuple) -> value.
    attrs: {(argument index,): [["tt.divisibility", 16]]}, or (argument index, place); without it nothing is pipelined.
    dtype: "fp32" | "fp16" | "bf16", the type of the matrices. arch: 80, 86, 89, 90, 100 or 120.
    tile: the `TileConfig` or `BlockTile` used. options: of the compiler, beyond num_warps and num_stages.
    meta: what to check in the compiled code. Keys:
        kernel: the function's name without type and tile; activation: its name or None;
        gemm_loops: K loops with a `tl.dot` in them; tensor_cores: whether each must use them;
        tma: whether loads go through tensor descriptors; pipelined: whether loads must be asynchronous (LDGSTS/UTMALDG);
        stores: for kernels without a GEMM, everything that a program writes ("128xbf16" -> how many stores).
    """

    name: str
    fn: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str | tuple[int, int], Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    dtype: str
    arch: int
    tile: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


def make_spec(
    fn: Any,
    *,
    variant: str,
    dtype: str,
    arch: int,
    tile: Any,
    types: Mapping[str, str | tuple[str, ...]],
    constexprs: Mapping[str, Any],
    divisible: tuple[str, ...],
    meta: Mapping[str, Any],
) -> KernelSpec:
    """Fill in what follows from the kernel's own argument list.

    types: runtime argument -> type; "T" stands for a pointer to `dtype`, "1" in a tuple for the constant. Every argument
    that is neither in `types` nor in `constexprs` is an error. divisible: names of arguments that are multiples of 16
    (bytes for pointers, elements for integers).
    """
    names = list(fn.arg_names)
    missing = [n for n in names if n not in types and n not in constexprs]
    unknown = [n for n in (*types, *constexprs, *divisible) if n not in names]
    if missing or unknown:
        raise ValueError(f"{fn.__name__}: arguments without a type: {missing}; names it does not have: {unknown}")
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[Any, Any] = dict(constexprs)
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    marked: list[tuple[int, ...]]
    for place, name in enumerate(names):
        own = "constexpr" if name in constexprs else types[name]
        if isinstance(own, tuple):
            constants |= {(place, k): 1 for k, t in enumerate(own) if t == "1"}
            marked = [(place, k) for k, t in enumerate(own) if t != "1"]
            signature[name] = tuple("constexpr" if t == "1" else t for t in own)
        else:
            marked = [(place,)]
            signature[name] = _POINTER_TYPES[dtype] if own == "T" else own
        if name in divisible:
            attrs |= {path: [["tt.divisibility", 16]] for path in marked}
    kernel = str(fn.__name__).lstrip("_").removesuffix("_kernel")
    most = getattr(tile, "max_registers", None)
    return KernelSpec(
        name=f"{kernel}[{variant},{dtype},{tile.label}]",
        fn=fn,
        signature=signature,
        constexprs=constants,
        attrs=attrs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        dtype=dtype,
        arch=arch,
        tile=tile,
        options={} if most is None else {"maxnreg": most},
        meta={"kernel": kernel, **meta},
    )


def block_meta(stores: Mapping[str, int]) -> dict[str, Any]:
    """The meta of a kernel without a GEMM, which streams through memory once and writes `stores`."""
    return {
        "activation": None,
        "gemm_loops": 0,
        "tensor_cores": False,
        "tma": False,
        "pipelined": False,
        "stores": dict(stores),
    }


def block_dtypes(arch: int) -> tuple[str, ...]:
    """What kernels without a GEMM are compiled in: every dtype, which differ in conversions alone, or bf16 to stand for them."""
    return ("bf16", "fp16", "fp32") if arch in WHOLE_ARCHS else ("bf16",)


def shipped(arch: int) -> list[KernelSpec]:
    """Every kernel x tile x dtype that ships for `arch`, names unique."""
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}; kernels ship for {ARCHS}")
    found = [s for m in SPEC_MODULES for s in importlib.import_module(f"{__package__}.{m}").specs(arch)]
    names = [s.name for s in found]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"two kernels share a name: {twice}")
    return found
