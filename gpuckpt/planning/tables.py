"""Tables in plain text, at most 80 columns wide, for people who print a chain, a plan or a report."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["WIDTH", "cut_text", "format_seconds", "text_table"]

WIDTH = 80


def text_table(rows: Sequence[Sequence[str]], numeric: Sequence[bool], *, most_rows: int | None = None) -> list[str]:
    """The rows as aligned lines, the first one a heading; `numeric` columns are aligned to the right.

    Of more than `most_rows` rows the ones in the middle are left out, and a line says how many.
    """
    heading, *body = rows
    left_out = 0 if most_rows is None else len(body) - most_rows
    if left_out > 0 and most_rows is not None:
        body = [*body[: most_rows // 2], *body[len(body) - (most_rows - most_rows // 2) :]]
    widths = [max(map(len, column)) for column in zip(heading, *body, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (heading, *body)
    ]
    if left_out > 0 and most_rows is not None:
        lines.insert(1 + most_rows // 2, f"... {left_out} more ...")
    return lines


def cut_text(text: str, width: int = WIDTH) -> str:
    """`text`, its end replaced by "..." where it is longer than `width`."""
    return text if len(text) <= width else f"{text[: max(0, width - 3)]}..."


def format_seconds(seconds: float) -> str:
    """Seconds for reading: "12.3 ms", "1.35 s", "1,234 s".

    >>> format_seconds(0.0123), format_seconds(1.3456), format_seconds(1234.5)
    ('12.3 ms', '1.35 s', '1,234 s')
    """
    if abs(seconds) < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if abs(seconds) < 999.5 else f"{seconds:,.0f} s"
