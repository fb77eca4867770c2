"""Options of a stage between keeping all and its input only: what some of its operations put out is kept, the rest recomputed.

A plan names them by what they keep: "kept-3+7+12" holds what operations number 3, 7 and 12 of the stage returned, counted among
those whose outputs can be kept. "kept-3+7/20" does, and makes the rest again in two halves: of the tensors that autograd saves in
the stage first those from number 20 on, and when backward is done with them those before. So it holds one half at a time.
"kept-3+7@host" holds these, and what the stage starts from, on the host meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from gpuckpt.planning.variants import ON_HOST

__all__ = ["KeptPart", "is_option", "option_name", "part_of"]


class KeptPart(NamedTuple):
    """What an option keeps, by numbers of operations, the saved tensor at which its second half ends (0: it has no halves), and
    whether what is kept goes to the host."""

    kept: frozenset[int]
    cut: int = 0
    on_host: bool = False


_NAME = re.compile(rf"kept-(\d{{1,6}}(?:\+\d{{1,6}})*)(?:/(\d{{1,6}}))?({ON_HOST})?", re.ASCII)


def option_name(kept: Iterable[int], cut: int) -> str:
    """How a plan calls the option that keeps what these operations return."""
    return f"kept-{'+'.join(map(str, sorted(kept)))}" + (f"/{cut}" if cut else "")


def is_option(variant: str) -> bool:
    """Whether a plan's option is one of these."""
    return _NAME.fullmatch(variant) is not None


def part_of(variant: str) -> KeptPart:
    """What an option keeps."""
    match = _NAME.fullmatch(variant)
    assert match is not None, variant
    return KeptPart(frozenset(map(int, match[1].split("+"))), int(match[2] or 0), match[3] is not None)
