"""What a chain is made of, and must be to be planned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from gpuckpt.errors import InvalidChain

__all__ = ["KEEP", "check_bytes", "check_stage", "is_int"]

KEEP = "keep"
"""The name of the option every stage has: save what autograd saves."""


def is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_bytes(value: object, what: str) -> None:
    if not is_int(value) or value < 0:  # type: ignore[operator]
        raise InvalidChain(f"{what}: bytes are {value!r}; expected an int of at least 0")


def _check_seconds(value: object, what: str) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise InvalidChain(f"{what} is {value!r}; expected finite seconds of at least 0")


def _check_tail(tail_s: object, forward_s: float, what: str) -> None:
    _check_seconds(tail_s, f"{what}: tail_s")
    if tail_s > forward_s:  # type: ignore[operator]
        raise InvalidChain(f"{what}: tail_s is {tail_s!r}, part of a forward of {forward_s!r} s; expected at most that")


def _check_ids(ids: Sequence[int], n_storages: int, what: str) -> None:
    for i in ids:
        if not is_int(i) or not 0 <= i < n_storages:
            raise InvalidChain(f"{what} names storage {i!r}; the chain has storages 0..{n_storages - 1}")


def check_stage(stage: Any, what: str, n_storages: int) -> None:
    """Raise `InvalidChain` where a `Stage` holds what cannot be planned."""
    _check_seconds(stage.forward_s, f"{what}: forward_s")
    _check_seconds(stage.backward_s, f"{what}: backward_s")
    check_bytes(stage.output_bytes, f"{what}: output_bytes")
    check_bytes(stage.workspace_bytes, f"{what}: workspace_bytes")
    check_bytes(stage.again_bytes, f"{what}: again_bytes")
    for field in ("saves", "inputs", "extras", "output"):
        _check_ids(getattr(stage, field), n_storages, f"{what}: {field}")
    _check_tail(stage.tail_s, stage.forward_s, what)
    names = {KEEP}
    for variant in stage.variants:
        if not variant.name or variant.name in names or any(c in "():" or c.isspace() for c in variant.name):
            raise InvalidChain(
                f"{what}: variant {variant.name!r}; names are unique, not {KEEP!r}, not empty, "
                "and have no spaces, colons or parentheses"
            )
        names.add(variant.name)
        _check_seconds(variant.forward_s, f"{what}: variant {variant.name!r}: forward_s")
        _check_seconds(variant.backward_s, f"{what}: variant {variant.name!r}: backward_s")
        _check_tail(stage.tail_s, variant.forward_s, f"{what}: variant {variant.name!r}")
        _check_ids(variant.saves, n_storages, f"{what}: variant {variant.name!r}: saves")
        _check_ids(variant.spilled, n_storages, f"{what}: variant {variant.name!r}: spilled")
        _check_ids(variant.remade, n_storages, f"{what}: variant {variant.name!r}: remade")
        _check_seconds(variant.again_s, f"{what}: variant {variant.name!r}: again_s")
        if variant.again_s > variant.backward_s:
            raise InvalidChain(
                f"{what}: variant {variant.name!r}: again_s is {variant.again_s!r}, part of a backward of "
                f"{variant.backward_s!r} s; expected at most that"
            )
