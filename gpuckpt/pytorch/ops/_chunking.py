"""How many rows an operation takes at a time, and what its backward holds meanwhile.

Backward recomputes hidden-size tensors. Taken for all rows at once they are the largest thing in the step; taken for `chunk`
rows at a time they are as small as wanted, at the price of adding up dW over the chunks. The chunk is settled in forward from
shapes, dtypes and limits alone, so that forward and backward, and a recompute of both, do the same arithmetic.

Not counted: the workspaces that BLAS libraries take inside one GEMM, and copies they make of operands with odd strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpuckpt.errors import BudgetExceeded

__all__ = ["LEAST_ROWS", "choose_chunk_rows", "chunks", "first_rows", "limits", "take"]

LEAST_ROWS = 128
"""Where a budget sets the limit no chunk is smaller: GEMMs of fewer rows leave most of a tile empty."""


def limits(
    chunk_rows: int | None, scratch_bytes: int | None, least_rows: int = LEAST_ROWS
) -> tuple[int | None, int | None]:
    """`chunk_rows` and `scratch_bytes` of a public function as the limits that `choose_chunk_rows` takes.

    With neither given the budget that the caller has entered sets the limit: one operation's scratch stays below its
    `max_bytes`, which is a constant of the run; what happens to be free at the moment is not, and would change the bits.
    Only where a cap is smaller than that scratch do gradients differ in their last bits from those of a run without a budget.
    """
    if chunk_rows is not None and scratch_bytes is not None:
        raise ValueError(f"chunk_rows={chunk_rows} and scratch_bytes={scratch_bytes}: give one of them")
    for name, value in (("chunk_rows", chunk_rows), ("scratch_bytes", scratch_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if chunk_rows is None and scratch_bytes is None and not torch.compiler.is_compiling():
        from gpuckpt.pytorch.engine.hooks import current_budget

        budget = current_budget()
        if budget is not None:
            return least_rows, budget.max_bytes
    return chunk_rows, scratch_bytes


def choose_chunk_rows(
    rows: int, bytes_of: Callable[[int], int], least_rows: int | None, scratch_bytes: int | None
) -> int:
    """Rows to take at a time: all; or `least_rows`; or as many as keep `bytes_of(chunk)` within `scratch_bytes`, but no fewer
    than `least_rows`.

    Raises `BudgetExceeded` where `scratch_bytes` alone is given and one row does not fit.
    """
    rows = max(rows, 1)
    if scratch_bytes is None:
        return rows if least_rows is None else min(least_rows, rows)
    if bytes_of(rows) <= scratch_bytes:
        return rows
    fitting, too_many = 0, rows
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if bytes_of(middle) <= scratch_bytes else (fitting, middle)
    if fitting >= LEAST_ROWS:
        fitting -= fitting % LEAST_ROWS
    if least_rows is not None:
        return min(max(fitting, least_rows), rows)
    if fitting == 0:
        raise BudgetExceeded(bytes_of(1), scratch_bytes, "the scratch of one row is the least: raise scratch_bytes")
    return fitting


def chunks(rows: int, chunk: int) -> Iterator[slice]:
    """Slices of at most `chunk` rows that cover `rows`."""
    for first in range(0, rows, chunk):
        yield slice(first, min(first + chunk, rows))


def take(t: Tensor, part: slice) -> Tensor:
    """The rows of one of `chunks`. One chunk for all is the usual case, and a slice costs as much as a launch's own arguments."""
    return t if part.stop - part.start == t.shape[0] else t[part]


def first_rows(buffer: Tensor, part: slice) -> Tensor:
    """As many rows of a buffer as the chunk has."""
    rows = part.stop - part.start
    return buffer if rows == buffer.shape[0] else buffer[:rows]
