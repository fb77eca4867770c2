"""A budget's ledger over one training step: a picture (forward climbing, backward draining, the cap as a line), and a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuckpt.memory import Event, format_bytes

__all__ = ["chrome_trace", "draw_ledger", "one_step"]


def one_step(events: Sequence[Event]) -> list[Event]:
    """The events of the last complete training step in a log: from the last "forward" mark on."""
    begins = [i for i, event in enumerate(events) if event.kind == "step" and event.what == "forward"]
    return list(events[begins[-1] :]) if begins else []


def chrome_trace(events: Sequence[Event]) -> dict[str, list[dict[str, Any]]]:
    """What a ledger logged (`budget.events()`) as a trace in Chrome's format: bytes held as a counter, the steps of the plan as
    ranges, refusals and evictions as instants. Write it by `json.dump` and open it in Perfetto or chrome://tracing.

    >>> from gpuckpt.memory import Budget
    >>> budget = Budget(1024, device="cpu", log_events=4)
    >>> budget.step("forward")
    >>> budget.allocate(100)
    >>> [(row["ph"], row["name"]) for row in chrome_trace(budget.events())["traceEvents"]]
    [('C', 'held by the budget'), ('C', 'held by the budget'), ('X', 'forward')]
    """
    if not events:
        return {"traceEvents": []}
    began_s = events[0].time_s
    rows: list[dict[str, Any]] = []
    steps: list[Event] = []
    for event in events:
        at_us = round((event.time_s - began_s) * 1e6, 3)
        rows.append(
            {"ph": "C", "name": "held by the budget", "ts": at_us, "pid": 0, "args": {"bytes": event.used_bytes}}
        )
        if event.kind == "step":
            steps.append(event)
        elif event.kind not in ("charge", "release", "allocate", "free"):
            args = {"bytes": event.nbytes, "what": event.what}
            rows.append({"ph": "i", "name": event.kind, "ts": at_us, "pid": 0, "tid": 0, "s": "p", "args": args})
    ends = [*(step.time_s for step in steps[1:]), events[-1].time_s]
    for step, end_s in zip(steps, ends, strict=False):
        start_us, took_us = round((step.time_s - began_s) * 1e6, 3), round((end_s - step.time_s) * 1e6, 3)
        rows.append({"ph": "X", "name": str(step.what), "ts": start_us, "dur": took_us, "pid": 0, "tid": 0})
    return {"traceEvents": rows}


def draw_ledger(
    events: Sequence[Event], cap_bytes: int, promised_bytes: int, plain_peak_bytes: int | None, path: Path, title: str
) -> None:
    """Write a picture (SVG or PNG, by `path`'s suffix) of the bytes held over the events of one step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    began_s = events[0].time_s
    times_ms = [(event.time_s - began_s) * 1e3 for event in events]
    # Ticks at round numbers of a binary unit.
    top_bytes = max(cap_bytes, plain_peak_bytes or 0)
    power = max(0, (top_bytes.bit_length() - 1) // 10)
    unit = 1024**power
    used = [event.used_bytes / unit for event in events]
    turn_ms = next(
        (t for t, event in zip(times_ms, events, strict=True) if event.kind == "step" and event.what == "backward"),
        times_ms[-1],
    )
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    canvas = FigureCanvasSVG(figure) if path.suffix == ".svg" else FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvspan(0, turn_ms, color="#f1f5f9", zorder=0)
    axes.fill_between(times_ms, used, step="post", color="#2563eb", alpha=0.25, linewidth=0)
    axes.step(times_ms, used, where="post", color="#1d4ed8", linewidth=1.4, label="held by the budget")
    axes.axhline(cap_bytes / unit, color="#dc2626", linewidth=1.6, label=f"cap {format_bytes(cap_bytes)}")
    axes.axhline(
        promised_bytes / unit,
        color="#16a34a",
        linewidth=1.2,
        linestyle="--",
        label=f"promised {format_bytes(promised_bytes)}",
    )
    if plain_peak_bytes is not None:
        label = f"plain run {format_bytes(plain_peak_bytes)}"
        axes.axhline(plain_peak_bytes / unit, color="#64748b", linewidth=1.2, linestyle=":", label=label)
    axes.set_xlim(0, max(times_ms[-1], 1e-3))
    top = top_bytes / unit or 1.0
    axes.set_ylim(0, top * 1.18)
    for x, name in ((turn_ms / 2, "forward"), ((turn_ms + times_ms[-1]) / 2, "backward")):
        axes.text(x, top * 1.12, name, ha="center", va="center", color="#475569")
    axes.set_xlabel("milliseconds into the step")
    axes.set_ylabel(f"held, {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}")
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    canvas.print_figure(path, dpi=130)
