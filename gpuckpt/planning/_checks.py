"""What a chain is made of, and must be to be planned."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from gpuckpt.checks import shown
from gpuckpt.errors import InvalidChain

__all__ = ["KEEP", "MOST_BYTES", "MOST_SECONDS", "check_bytes", "check_stage", "is_int", "plain_number"]

KEEP = "keep"
"""The name of the option every stage has: save what autograd saves."""

MOST_BYTES = 2**60
"""Of one storage, and of all of a chain: sums of a few of them stay within 64 bits."""

MOST_SECONDS = 1e15


def is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def plain_number(value: object) -> int | float:
    """What JSON writes for a number that is neither an int nor a float: NumPy's, fractions. `TypeError` for what is none."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{shown(value)} is no number")


def check_bytes(value: object, what: str) -> None:
    if not is_int(value) or not 0 <= value <= MOST_BYTES:  # type: ignore[operator]
        raise InvalidChain(f"{what}: bytes are {shown(value)}; expected an int of at least 0, at most 2^60")


def _check_seconds(value: object, what: str) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= MOST_SECONDS:  # type: ignore[operator]
        raise InvalidChain(f"{what} is {shown(value)}; expected finite seconds of at least 0, at most 10^15")


def _check_tail(tail_s: object, forward_s: float, what: str) -> None:
    _check_seconds(tail_s, f"{what}tail_s")
    if tail_s > forward_s:  # type: ignore[operator]
        raise InvalidChain(f"{what}tail_s is {tail_s!r}, part of a forward of {forward_s!r} s; expected at most that")


def _check_ids(ids: object, n_storages: int, what: str) -> None:
    if not isinstance(ids, tuple):
        raise InvalidChain(f"{what} is {shown(ids)}; expected a tuple of ids of storages")
    for i in ids:
        if not is_int(i) or not 0 <= i < n_storages:
            raise InvalidChain(f"{what} names storage {shown(i)}; the chain has storages 0..{n_storages - 1}")


def check_stage(stage: Any, n_storages: int) -> None:
    """Raise `InvalidChain` where a `Stage` holds what cannot be planned."""
    if not isinstance(stage.name, str):
        raise InvalidChain(f"name is {shown(stage.name)}; expected a string")
    if not isinstance(stage.recomputable, bool):
        raise InvalidChain(f"recomputable is {shown(stage.recomputable)}; expected True or False")
    _check_seconds(stage.forward_s, "forward_s")
    _check_seconds(stage.backward_s, "backward_s")
    check_bytes(stage.output_bytes, "output_bytes")
    check_bytes(stage.workspace_bytes, "workspace_bytes")
    check_bytes(stage.gradients_bytes, "gradients_bytes")
    check_bytes(stage.again_bytes, "again_bytes")
    for field in ("saves", "inputs", "extras", "output"):
        _check_ids(getattr(stage, field), n_storages, field)
    _check_tail(stage.tail_s, stage.forward_s, "")
    if stage.input_moved_s is not None:
        _check_seconds(stage.input_moved_s, "input_moved_s")
    if stage.dropped_in is not None:
        check_bytes(stage.dropped_in, "dropped_in")
        if stage.variants or stage.input_moved_s is not None:
            raise InvalidChain(
                "its result is dropped, and no backward comes to it: expected no options but to keep it here"
            )
    _check_variants(stage, n_storages)


def _check_variants(stage: Any, n_storages: int) -> None:
    if not isinstance(stage.variants, tuple) or not all(hasattr(each, "remade") for each in stage.variants):
        raise InvalidChain(f"variants is {shown(stage.variants)}; expected a tuple of Variant")
    names = {KEEP}
    for variant in stage.variants:
        name = variant.name
        if not isinstance(name, str) or not name or name in names or any(c in "():" or c.isspace() for c in name):
            raise InvalidChain(
                f"variant {shown(name)}: names are strings, unique, not {KEEP!r}, not empty, "
                "and have no spaces, colons or parentheses"
            )
        names.add(name)
        of_variant = f"variant {shown(name)}"
        _check_seconds(variant.forward_s, f"{of_variant}: forward_s")
        _check_seconds(variant.backward_s, f"{of_variant}: backward_s")
        _check_tail(stage.tail_s, variant.forward_s, f"{of_variant}: ")
        for field in ("saves", "spilled", "remade", "remade_later"):
            _check_ids(getattr(variant, field), n_storages, f"{of_variant}: {field}")
        _check_seconds(variant.again_s, f"{of_variant}: again_s")
        _check_seconds(variant.moved_s, f"{of_variant}: moved_s")
        if variant.moved_s > min(variant.forward_s, variant.backward_s):
            raise InvalidChain(
                f"{of_variant}: moved_s is {variant.moved_s!r}, part of a forward of {variant.forward_s!r} s and of a backward "
                f"of {variant.backward_s!r} s; expected at most either"
            )
        if variant.again_s > variant.backward_s:
            raise InvalidChain(
                f"{of_variant}: again_s is {variant.again_s!r}, part of a backward of {variant.backward_s!r} s; "
                "expected at most that"
            )
