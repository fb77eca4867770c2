"""Files of chains and plans: JSON objects that name their format."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["read_record"]


def read_record(text: str, expected: str, what: str, error_type: type[Exception]) -> dict[str, Any]:
    """The object in `text`; `error_type` where it is no JSON object of the format `expected`."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise error_type(f"a {what} file is JSON; {error}") from None
    if not isinstance(record, dict) or record.get("format") != expected:
        got = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise error_type(f"a {what} file has format {expected!r}; got {got!r}")
    return record
