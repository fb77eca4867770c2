"""One HTML page about a fitted model: what a step holds, what becomes of each stage, and what other budgets would cost.

The page stands alone: no script, no network, pictures as SVG. It is made from plain data (`page_data`), which is kept as JSON
beside it, so that `gpuckpt report FOLDER` makes it again. Every name is escaped. Light and dark follow the reader's setting.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from gpuckpt.planning import plan_frontier
from gpuckpt.pytorch.fit import Fitted
from gpuckpt.report.ledger import one_step
from gpuckpt.units import format_bytes

__all__ = ["page_data", "to_page"]

_FORMAT = 1
_MOST_EVENTS = 600  # drawn
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900, 300, 70, 14, 28

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --held: #2563eb; --cap: #dc2626; --promised: #16a34a; }
@media (prefers-color-scheme: dark) { :root { --held: #60a5fa; --cap: #f87171; --promised: #4ade80; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; padding: 0; } .figures li { list-style: none; }
.figures b { display: block; font-size: 1.2rem; } .bad { color: var(--cap); }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; vertical-align: top; }
th:nth-child(2), td:nth-child(2), th:nth-child(3), td:nth-child(3), td:last-child, th:last-child { text-align: left; }
td:last-child { min-width: 16rem; } tr.again td { background: var(--soft); }
@media (max-width: 40rem) { body { margin: .5rem auto; font-size: 15px; } }
@media print { body { max-width: none; } .scroll { overflow: visible; } tr, svg { break-inside: avoid; } }
"""


def page_data(fitted: Fitted, *, plain_peak_bytes: int | None = None, budgets: int = 12) -> dict[str, Any]:
    """What a page shows of a fitted model after a step, as JSON would hold it: the report, the ledger's log of the latest step,
    and the frontier at so many `budgets`. plain_peak_bytes: what a plain step was measured to hold."""
    events = one_step(fitted.budget.events())
    host_bytes = None if fitted.host_budget is None else fitted.host_budget.max_bytes
    began_s = events[0].time_s if events else 0.0
    return {
        "format": _FORMAT,
        "report": json.loads(fitted.report().to_json()),
        "plain_peak_bytes": plain_peak_bytes,
        "events": [[1e3 * (e.time_s - began_s), e.used_bytes, e.kind, str(e.what), str(e.step)] for e in events],
        "frontier": [list(point) for point in plan_frontier(fitted.chain, budgets, host_bytes=host_bytes).points],
    }


def to_page(data: dict[str, Any]) -> str:
    """The page of `page_data`. Raises `ValueError` for data that are something else."""
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"expected the data of a page, format {_FORMAT}, as `gpuckpt train` writes them to page.json")
    try:
        return _page(data)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the data of the page are damaged: {type(error).__name__} {error}") from error


def _page(data: dict[str, Any]) -> str:
    report = data["report"]
    budget_bytes, promised_bytes = report["budget_bytes"], report["promised_peak_bytes"]
    measured_bytes, plain_bytes = report["measured_peak_bytes"], data["plain_peak_bytes"]
    broken = measured_bytes is not None and measured_bytes > promised_bytes
    figures = [
        ("allowed", format_bytes(budget_bytes)),
        ("promised peak", format_bytes(promised_bytes)),
        ("measured peak", "no step yet" if measured_bytes is None else format_bytes(measured_bytes)),
        ("keeping all would hold", format_bytes(report["keep_all_bytes"])),
        ("the smallest budget", format_bytes(report["smallest_budget_bytes"])),
        ("a step, estimated", f"{report['step_ms']:.4g} ms"),
        ("of it recompute", f"{report['recompute_ms']:.4g} ms"),
    ]
    if plain_bytes is not None:
        figures.insert(3, ("a plain step, measured", format_bytes(plain_bytes)))
    title = f"{report['model']} under {format_bytes(budget_bytes)}"
    verdict = "The latest step held more than promised." if broken else ""
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            "<meta name=viewport content='width=device-width, initial-scale=1'>",
            f"<title>{escape(title)}</title><style>{_STYLE}</style>",
            f"<h1>{escape(title)}</h1>",
            f"<p class=bad>{verdict}</p>" if verdict else "",
            "<ul class=figures>",
            *(f"<li>{escape(name)}<b>{escape(value)}</b></li>" for name, value in figures),
            "</ul>",
            "<h2>What the budget holds over a step</h2>",
            _ledger(data["events"], budget_bytes, promised_bytes),
            f"<p>Peak reached at: {escape(str(report['peak_step']))}. Point at the curve for what happens there.</p>",
            "<h2>What becomes of each stage</h2>",
            _stages(report["stages"]),
            "<h2>Budget against step time</h2>",
            _frontier(data["frontier"], promised_bytes, report["step_ms"]),
            "</html>",
            "",
        ]
    )


def _stages(stages: Sequence[dict[str, Any]]) -> str:
    rows = []
    for stage in stages:
        cells = [
            str(stage["number"]),
            stage["name"],
            stage["fate"],
            str(stage["runs"]),
            format_bytes(stage["saves_bytes"]),
            f"{stage['forward_ms']:.3g}",
            f"{stage['backward_ms']:.3g}",
            f"{stage['recompute_ms'] + stage['spill_ms']:.3g}",
            stage["why"],
        ]
        mark = "" if stage["fate"] == "kept" else " class=again"
        rows.append(f"<tr{mark}>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    names = ("", "stage", "what", "runs", "saves", "forward ms", "backward ms", "again ms", "why")
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _thinned(events: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """So few events that they can be drawn, the highest of each group among them."""
    size = -(-len(events) // _MOST_EVENTS) or 1
    return [max(events[i : i + size], key=lambda event: event[1]) for i in range(0, len(events), size)]


def _ledger(events: Sequence[Sequence[Any]], budget_bytes: int, promised_bytes: int) -> str:
    if len(events) < 2:
        return "<p>No step was run yet.</p>"
    drawn = _thinned(events)
    end_ms = max(event[0] for event in events) or 1.0
    top_bytes = max(budget_bytes, promised_bytes, *(event[1] for event in drawn)) or 1

    def at(ms: float, held_bytes: int) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT) * ms / end_ms
        return round(x, 1), round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - held_bytes / top_bytes), 1)

    path, bars = [f"M{_LEFT} {_HEIGHT - _BOTTOM}"], []
    for number, (ms, held_bytes, kind, what, step) in enumerate(drawn):
        x, y = at(ms, held_bytes)
        right = at(drawn[number + 1][0], 0)[0] if number + 1 < len(drawn) else _WIDTH
        path.append(f"H{x}V{y}")
        told = f"{ms:.3g} ms: {format_bytes(held_bytes)} held; {kind} {what}; {step}"
        bars.append(
            f"<rect x={x} y={_TOP} width={max(right - x, 0.5):.1f} height={_HEIGHT - _TOP - _BOTTOM} fill=transparent>"
            f"<title>{escape(told)}</title></rect>"
        )
    lines = [
        _line(at(0, nbytes)[1], colour, f"{name} {format_bytes(nbytes)}", shift, dash)
        for nbytes, colour, name, shift, dash in (
            (budget_bytes, "cap", "allowed", 12, ""),
            (promised_bytes, "promised", "promised", 26, " stroke-dasharray='6 4'"),
        )
    ]
    turn_ms = next((event[0] for event in events if event[2] == "step" and event[3] == "backward"), end_ms)
    x, _ = at(turn_ms, 0)
    below = _HEIGHT - _BOTTOM
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='bytes held over a step'>"
        f"<path d='{''.join(path)}H{_WIDTH}V{below}Z' fill='var(--held)' fill-opacity=.25 stroke='var(--held)'/>"
        + "".join(lines)
        + f"<path d='M{x} {_TOP}V{below}' stroke='var(--line)'/><text x={_LEFT} y={_HEIGHT - 8}>forward</text>"
        f"<text x={x + 4} y={_HEIGHT - 8}>backward</text>"
        f"<text x={_WIDTH} y={_HEIGHT - 8} text-anchor=end>{end_ms:.4g} ms</text><text x=0 y={_TOP + 8}>"
        f"{escape(format_bytes(top_bytes))}</text><text x=0 y={below}>0</text>{''.join(bars)}</svg>"
    )


def _line(y: float, colour: str, name: str, shift: int, dash: str) -> str:
    return (
        f"<path d='M{_LEFT} {y}H{_WIDTH}' stroke='var(--{colour})' stroke-width='1.6'{dash}/>"
        f"<text x={_WIDTH - 4} y={y + shift} text-anchor=end style='fill: var(--{colour})'>{escape(name)}</text>"
    )


def _frontier(points: Sequence[Sequence[Any]], peak_bytes: int, step_ms: float) -> str:
    shown = [(int(held_bytes), 1e3 * step_s) for held_bytes, step_s in points]
    lowest, highest = min(p[0] for p in (*shown, (peak_bytes, 0))), max(p[0] for p in (*shown, (peak_bytes, 0)))
    fast, slow = min(p[1] for p in (*shown, (0, step_ms))), max(p[1] for p in (*shown, (0, step_ms)))

    def at(held_bytes: int, ms: float) -> tuple[float, float]:
        x = _LEFT + 10 + (_WIDTH - _LEFT - 30) * (held_bytes - lowest) / ((highest - lowest) or 1)
        return round(x, 1), round(
            _TOP + 10 + (_HEIGHT - _TOP - _BOTTOM - 20) * (1 - (ms - fast) / ((slow - fast) or 1)), 1
        )

    marks = "".join(
        f"<circle cx={at(*p)[0]} cy={at(*p)[1]} r=4 fill='var(--held)'><title>"
        f"{escape(format_bytes(p[0]))}, {p[1]:.4g} ms</title></circle>"
        for p in shown
    )
    x, y = at(peak_bytes, step_ms)
    path = "L".join(f"{at(*p)[0]} {at(*p)[1]}" for p in shown)
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='budget against step time'>"
        f"<path d='M{path}' fill=none stroke='var(--held)'/>{marks}"
        f"<circle class=chosen cx={x} cy={y} r=8 fill=none stroke='var(--cap)' stroke-width=2><title>this plan</title></circle>"
        f"<text x=0 y={_TOP + 14}>{slow:.4g} ms</text><text x=0 y={_HEIGHT - _BOTTOM - 6}>{fast:.4g} ms</text>"
        f"<text x={_LEFT} y={_HEIGHT - 8}>{escape(format_bytes(lowest))}</text>"
        f"<text x={_WIDTH - 4} y={_HEIGHT - 8} text-anchor=end>{escape(format_bytes(highest))}</text></svg>"
        "<p>Each dot is a plan: its peak, and a step's time by the measured stages. The ring is this one.</p>"
    )
