"""The two pictures of a page. Curves are SVG that stretches to the reader's width; texts and dots are HTML over it, of one size
at any width. Places are in percent of the picture, from its upper left corner."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from gpuckpt.planning.tables import format_seconds
from gpuckpt.units import format_bytes

__all__ = ["frontier_places", "frontier_plot", "ledger_plot", "thinned"]

_MOST_EVENTS = 600  # drawn


def thinned(events: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """So few events that they can be drawn, the one that holds most of each group among them."""
    size = -(-len(events) // _MOST_EVENTS) or 1
    return [max(events[i : i + size], key=lambda event: event[1]) for i in range(0, len(events), size)]


def ledger_plot(
    events: Sequence[Sequence[Any]], budget_bytes: int, promised_bytes: int, measured_bytes: int | None
) -> tuple[str, list[tuple[float, str]]]:
    """The picture of what is held over a step, and of each moment its place and what is told. `events`: as in `page_data`."""
    if len(events) < 2:
        return "<p>No step was run yet.</p>", []
    drawn = thinned(events)
    end_ms = max(event[0] for event in events) or 1.0
    top_bytes = max(budget_bytes, promised_bytes, *(event[1] for event in drawn)) or 1

    def y(held_bytes: int) -> float:
        return round(100 * (1 - held_bytes / top_bytes), 2)

    path, moments = ["M0 100"], []
    for ms, held_bytes, nbytes, kind, what, step in drawn:
        x = round(100 * ms / end_ms, 3)
        path.append(f"H{x}V{y(held_bytes)}")
        did = f"{kind} {what}" + (f", {format_bytes(nbytes)}" if nbytes else "")
        moments.append((x, f"{format_seconds(ms / 1e3)}: {format_bytes(held_bytes)} held; {did}; in {step}"))
    turn = next((100 * e[0] / end_ms for e in events if e[3] == "step" and e[4] == "backward"), 100.0)
    lines = ((budget_bytes, "cap", ""), (promised_bytes, "promised", " stroke-dasharray='6 4'"))
    curve = "".join(path) + "H100"
    measured = "" if measured_bytes is None else f", at most {format_bytes(measured_bytes)}"
    picture = (
        "<ul class=legend>"
        f"<li><i class=held></i>held{escape(measured)}</li>"
        f"<li><i class=cap></i>allowed {escape(format_bytes(budget_bytes))}</li>"
        f"<li><i class=promised></i>promised {escape(format_bytes(promised_bytes))}</li></ul>"
        f"<div class=plot><div class=up><span>{escape(format_bytes(top_bytes))}</span><span>0</span></div>"
        "<div class='area step' tabindex=0 role=slider aria-label='bytes held over a step' aria-valuemin=0 "
        f"aria-valuemax={len(drawn) - 1} aria-valuenow=0 aria-valuetext='not chosen'>"
        "<svg viewBox='0 0 100 100' preserveAspectRatio=none aria-hidden=true>"
        f"<path d='{curve}V100Z' fill='var(--held)' fill-opacity=.25 /><path d='{curve}' fill=none stroke='var(--held)'/>"
        + "".join(
            f"<path d='M0 {y(nbytes)}H100' stroke='var(--{name})' stroke-width=2{dash} />"
            for nbytes, name, dash in lines
        )
        + f"<path d='M{turn:.2f} 0V100' stroke='var(--line)'/></svg><i class=cursor hidden></i></div>"
        # "backward" stands where backward begins, or as near to it as the words beside it leave room.
        f"<div class=along style='display:grid;grid-template-columns:minmax(max-content,{turn:.1f}%) 1fr max-content;gap:.5rem'>"
        f"<span>forward</span><span>backward</span><span>{escape(format_seconds(end_ms / 1e3))}</span></div></div>"
    )
    return picture, moments


def frontier_places(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Where plans of (peak bytes, step seconds) stand: small ones to the left, slow ones at the top."""
    lowest, highest = min(p[0] for p in points), max(p[0] for p in points)
    fast, slow = min(p[1] for p in points), max(p[1] for p in points)
    wide, high = (highest - lowest) or 1, (slow - fast) or 1.0
    return [(round(100 * (p[0] - lowest) / wide, 2), round(100 * (slow - p[1]) / high, 2)) for p in points]


def frontier_plot(points: Sequence[tuple[int, float]], ran: int, told: Sequence[str]) -> str:
    """The picture of plans of (peak bytes, step seconds), sorted by bytes; `told` says each in a sentence, `ran` is chosen."""
    places = frontier_places(points)
    lowest, highest = points[0][0], points[-1][0]
    fast, slow = min(p[1] for p in points), max(p[1] for p in points)
    x, y = places[ran]
    up, along = (format_seconds(slow), format_seconds(fast)), (format_bytes(lowest), format_bytes(highest))
    return (
        f"<div class=plot><div class=up><span>{escape(up[0])}</span><span>{escape(up[1])}</span></div>"
        f"<div class='area budgets' tabindex=0 role=slider aria-label='budget' aria-valuemin=0 aria-valuemax={len(points) - 1} "
        f"aria-valuenow={ran} aria-valuetext=\"{escape(told[ran])}\"><div class=room style='position:absolute;inset:.75rem 0'>"
        "<svg viewBox='0 0 100 100' preserveAspectRatio=none aria-hidden=true>"
        f"<path d='M{'L'.join(f'{a} {b}' for a, b in places)}' fill=none stroke='var(--held)'/></svg>"
        + "".join(
            f'<i class=dot style="left:{a}%;top:{b}%" title="{escape(text)}"></i>'
            for (a, b), text in zip(places, told, strict=True)
        )
        + f"<i class=ring style='left:{x}%;top:{y}%'></i></div></div>"
        f"<div class=along><span>{escape(along[0])}</span><span>{escape(along[1])}</span></div></div>"
    )
