"""`gpuckpt oom FILE`: the page of an out-of-memory error that `gpuckpt.explain_oom(..., save=FILE)` wrote down."""

from __future__ import annotations

import json
from pathlib import Path

from gpuckpt.pytorch.explain_oom import OOM_FORMAT, oom_page

__all__ = ["read_oom"]


def read_oom(path: Path) -> str:
    """The page. Raises `ValueError` for any other file: torch's own snapshots are pickles, which run code when they are read."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != OOM_FORMAT:
        raise ValueError(
            f"{path} is no JSON of gpuckpt.explain_oom(model, optimizer, save=...), and nothing else is read; torch's own memory "
            "snapshots are pickles, which can run code: open them with torch's viewer"
        )
    try:
        return oom_page(facts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
