"""Storing floating-point arrays in a smaller dtype."""

from __future__ import annotations

from typing import Any

from gpuckpt.checks import shown
from gpuckpt.memory.adapters import form_of
from gpuckpt.memory.adapters.inspect import library_of
from gpuckpt.memory.ledger import Charge
from gpuckpt.memory.protocols import STORAGE_BYTES, Form

__all__ = ["CompressedForm", "LooseBlock", "parse_storage_dtype"]


def parse_storage_dtype(name: Any) -> str | None:
    """The storage dtype for "compress", by its name. Raises `ValueError` for another."""
    if name is None:
        return None
    short = str(name).removeprefix("torch.")
    if short not in STORAGE_BYTES:
        raise ValueError(f"storage_dtype must be one of {', '.join(STORAGE_BYTES)} or None, got {shown(name)}")
    return short


class LooseBlock:
    """A compressed array that found no block of its own in the pool: charged, but held where it was made."""

    __slots__ = ("__weakref__", "array", "charge", "nbytes")
    foreign_readers = False

    def __init__(self, array: Any, nbytes: int, charge: Charge) -> None:
        self.array = array
        self.nbytes = nbytes
        self.charge: Charge | None = charge


class CompressedForm:
    """A floating-point array, stored in a smaller dtype.

    Rounding is to nearest: a relative error of at most 2^-11 in float16, 2^-8 in bfloat16, 2^-4 in float8_e4m3fn and 2^-3
    in float8_e5m2 for values in the dtype's normal range, and an absolute one of half its smallest subnormal below that.
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self._form = form_of(array, library_of(array))
        self.nbytes: int = self._form.nbytes

    @classmethod
    def make(cls, form: Form, block: Any, storage_dtype: str | None) -> CompressedForm | None:
        """What `block` holds, in the smaller dtype; None where that saves nothing or would turn numbers into infinities."""
        small = None if storage_dtype is None else form.shrunk(block, storage_dtype)
        return None if small is None else cls(small)

    def store(self, block: Any) -> None:
        """Write the compressed array into its block and forget the copy of it."""
        self._form.write(self._array, block)
        self._array = None

    def loose(self, charge: Charge) -> LooseBlock:
        """The compressed array as its own block."""
        array, self._array = self._array, None
        return LooseBlock(array, self.nbytes, charge)

    def view(self, block: Any) -> Any:
        """The compressed array in its block."""
        return block.array if isinstance(block, LooseBlock) else self._form.view(block)

    def expand(self, form: Form, block: Any) -> Any:
        """The array in its own dtype and shape: a copy, outside the budget, as every output is before it is saved."""
        return form.grown(self.view(block))
