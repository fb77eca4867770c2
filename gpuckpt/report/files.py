"""Files that are whole or not there: written under another name in the same folder, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole_file", "write_whole"]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to. At the end what stands there takes the place of `path`; after an exception it is gone, and `path` is
    as it was. Of two processes that write one `path`, one has the last word. A device or a pipe is written to directly.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder) / "report.json") as name:
    ...         _ = name.write_text("{}")
    ...     os.listdir(folder)
    ['report.json']
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()  # a link stays a link
    name = path.with_name(f".{path.stem[:100]}-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield name
        os.replace(name, path)
    finally:
        name.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` to `path`, in UTF-8, whole or not at all."""
    with whole_file(path) as name:
        name.write_text(text, encoding="utf-8")
