"""Files of chains and plans: JSON objects that name their format."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from gpuckpt.checks import shown
from gpuckpt.planning.tables import cut_text

__all__ = ["read_record"]


def read_record(text: str, expected: str, what: str, error_type: type[Exception]) -> dict[str, Any]:
    """The object in `text`; `error_type` where it is no JSON object of the format `expected`.

    Refused as well: a key that stands twice in an object, of which readers of JSON take one or the other; NaN and infinity,
    which are no JSON; objects within objects deeper than Python's recursion goes. `TypeError` where `text` is no string.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is {shown(text)}; expected the text of a {what} file")
    try:
        record = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise error_type(f"a {what} file is JSON; {cut_text(str(error), 200)}") from None
    if not isinstance(record, dict) or record.get("format") != expected:
        got = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise error_type(f"a {what} file has format {expected!r}; got {shown(got)}")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
