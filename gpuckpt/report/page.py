"""One HTML page about a fitted model: what a step holds, what becomes of each stage, what other budgets and longer inputs need.

The page stands alone: one file, no network (its own policy forbids it), pictures as SVG, light and dark by the reader's setting.
It is whole without its script, which adds what is held at a moment and the plans of other budgets. It is made from plain data
(`page_data`), which is kept as JSON beside it, so that `gpuckpt report FOLDER` makes it again. Every name is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from typing import Any

from gpuckpt.planning import Chain, Plan, plan_chain, plan_frontier
from gpuckpt.planning.report import explain
from gpuckpt.planning.tables import format_seconds
from gpuckpt.pytorch.fit import Fitted
from gpuckpt.report.ledger import one_step
from gpuckpt.report.page_plots import frontier_places, frontier_plot, ledger_plot
from gpuckpt.units import format_bytes

__all__ = ["page_data", "to_page"]

_FORMAT = 2
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page_data(
    fitted: Fitted,
    *,
    plain_peak_bytes: int | None = None,
    budgets: int = 12,
    longer: Mapping[str, Chain] | None = None,
) -> dict[str, Any]:
    """What a page shows of a fitted model after a step, as JSON would hold it.

    Args:
        plain_peak_bytes: what a plain step was measured to hold.
        budgets: how many other budgets are planned, from the smallest that works to the one that keeps all.
        longer: chains of the same model with other inputs, by what to call these ("context 8192"): what they need is listed.
            `gpuckpt.measure(..., fake=True)` makes them without memory, before the model is fitted.

    Returns the report, the ledger's log of the latest step (milliseconds, bytes held, bytes, kind, what, step of each event), the
    plans by rising peak with the stages of each, and what longer inputs need.

    >>> import gpuckpt, torch
    >>> model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(4)))
    >>> longer = {"64 rows": gpuckpt.measure(model, torch.ones(64, 8), fake=True)}
    >>> fitted = gpuckpt.fit(model, torch.ones(4, 8), "80%")
    >>> fitted(torch.ones(4, 8)).sum().backward()
    >>> data = page_data(fitted, longer=longer)
    >>> data["longer"][0]["what"], data["longer"][0]["fits"]
    ('64 rows', False)
    """
    events = one_step(fitted.budget.events())
    host_bytes = None if fitted.host_budget is None else fitted.host_budget.max_bytes
    began_s = events[0].time_s if events else 0.0
    plans, ran = _plans(fitted, budgets, host_bytes)
    return {
        "format": _FORMAT,
        "report": json.loads(fitted.report().to_json()),
        "plain_peak_bytes": plain_peak_bytes,
        "events": [
            [1e3 * (e.time_s - began_s), e.used_bytes, e.nbytes, e.kind, str(e.what), str(e.step)] for e in events
        ],
        "plans": [_plan_data(fitted.chain, plan) for plan in plans],
        "ran": ran,
        "longer": [_needs(what, chain, fitted.budget.max_bytes) for what, chain in (longer or {}).items()],
    }


def _plans(fitted: Fitted, budgets: int, host_bytes: int | None) -> tuple[list[Plan], int]:
    """Plans of rising peaks, the fitted one among them, and its place."""
    by_peak = {
        plan.certificate.peak_bytes: plan for plan in plan_frontier(fitted.chain, budgets, host_bytes=host_bytes).plans
    }
    by_peak[fitted.plan.certificate.peak_bytes] = fitted.plan
    peaks = sorted(by_peak)
    return [by_peak[peak] for peak in peaks], peaks.index(fitted.plan.certificate.peak_bytes)


def _plan_data(chain: Chain, plan: Plan) -> dict[str, Any]:
    certificate = plan.certificate
    return {
        "peak_bytes": certificate.peak_bytes,
        "host_peak_bytes": certificate.host_peak_bytes,
        "step_s": certificate.step_s,
        "recompute_s": certificate.recompute_s,
        "stages": [asdict(stage) for stage in explain(chain, plan).stages],
    }


def _needs(what: str, chain: Chain, budget_bytes: int) -> dict[str, Any]:
    least_bytes = plan_chain(chain, chain.saved_bytes).certificate.smallest_budget_bytes
    return {
        "what": what,
        "keep_all_bytes": chain.saved_bytes,
        "smallest_budget_bytes": least_bytes,
        "fits": least_bytes <= budget_bytes,
    }


def to_page(data: dict[str, Any]) -> str:
    """The page of `page_data`. Raises `ValueError` for data that are something else."""
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"expected the data of a page, format {_FORMAT}, as `gpuckpt train` writes them to page.json")
    try:
        return _page(data)
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"the data of the page are damaged: {type(error).__name__} {error}") from error


def _page(data: dict[str, Any]) -> str:
    report, plans, ran = data["report"], data["plans"], data["ran"]
    budget_bytes, promised_bytes = report["budget_bytes"], report["promised_peak_bytes"]
    measured_bytes = report["measured_peak_bytes"]
    broken = measured_bytes is not None and measured_bytes > promised_bytes
    title = f"{report['model']} under {format_bytes(budget_bytes)}"
    picture, moments = ledger_plot(data["events"], budget_bytes, promised_bytes, measured_bytes)
    told = [_told(plan, number == ran) for number, plan in enumerate(plans)]
    points = [(plan["peak_bytes"], plan["step_s"]) for plan in plans]
    rows, numbers = _rows([plan["stages"] for plan in plans])
    for_script = {
        "moments": moments,
        "plans": [
            {"at": at, "told": text, "rows": its}
            for at, text, its in zip(frontier_places(points), told, numbers, strict=True)
        ],
        "ran": ran,
        "rows": rows,
    }
    hint = "Point at the curve, or use the arrow keys on it, for what is held at a moment."
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">',
            "<meta name=viewport content='width=device-width, initial-scale=1'>",
            f"<title>{escape(title)}</title><style>{_asset('page.css')}</style>",
            f"<h1>{escape(title)}</h1>",
            "<p class=bad>The latest step held more than promised.</p>" if broken else "",
            "<ul class=figures>",
            *(f"<li>{escape(name)}<b>{escape(value)}</b></li>" for name, value in _figures(data)),
            "</ul>",
            "<h2>What the budget holds over a step</h2>",
            picture,
            f"<p>Peak reached at: {escape(str(report['peak_step']))}. <output id=moment class=told>"
            f"<span class=screen hidden>{hint if moments else ''}</span></output></p>",
            "<h2>Budget against step time</h2>",
            frontier_plot(points, ran, told),
            f"<p><output id=plan class=told>{escape(told[ran])}</output>"
            "<span class=screen hidden>Drag the ring, or use the arrow keys on it, for the plan of another budget.</span> "
            "<button id=back class=screen hidden>back to the plan that ran</button></p>",
            "<h2>What becomes of each stage</h2>",
            _stages(report["stages"], [rows[number] for number in numbers[ran]]),
            _longer(data["longer"], budget_bytes),
            f"<script type=application/json id=data>{json.dumps(for_script).replace('<', chr(92) + 'u003c')}</script>",
            f"<script>{_asset('page.js')}</script></html>",
            "",
        ]
    )


def _asset(name: str) -> str:
    return resources.files("gpuckpt.report").joinpath(name).read_text(encoding="utf-8")


def _figures(data: dict[str, Any]) -> list[tuple[str, str]]:
    report, plain_bytes = data["report"], data["plain_peak_bytes"]
    measured_bytes = report["measured_peak_bytes"]
    plain = [] if plain_bytes is None else [("a plain step, measured", format_bytes(plain_bytes))]
    return [
        ("allowed", format_bytes(report["budget_bytes"])),
        ("promised peak", format_bytes(report["promised_peak_bytes"])),
        ("measured peak", "no step yet" if measured_bytes is None else format_bytes(measured_bytes)),
        *plain,
        ("keeping all would hold", format_bytes(report["keep_all_bytes"])),
        ("the smallest budget", format_bytes(report["smallest_budget_bytes"])),
        ("a step, estimated", format_seconds(report["step_ms"] / 1e3)),
        ("of it recompute", format_seconds(report["recompute_ms"] / 1e3)),
    ]


def _told(plan: dict[str, Any], ran: bool) -> str:
    stages = plan["stages"]
    again = sum(stage["fate"] != "kept" for stage in stages)
    host = f", {format_bytes(plan['host_peak_bytes'])} on the host" if plan["host_peak_bytes"] else ""
    took, recompute = format_seconds(plan["step_s"]), format_seconds(plan["recompute_s"])
    who = "The plan that ran" if ran else "Another plan"
    return (
        f"{who}: {format_bytes(plan['peak_bytes'])} held at most{host}, a step of {took}, of it recompute {recompute}; "
        f"{again} of {len(stages)} stages are not kept whole."
    )


def _rows(plans: Sequence[Sequence[dict[str, Any]]]) -> tuple[list[tuple[Any, ...]], list[list[int]]]:
    """Of each plan the numbers of its stages' rows, and each row once: whether it is marked, then its cells."""
    known: dict[tuple[Any, ...], int] = {}
    numbers = [[known.setdefault(_row(stage), len(known)) for stage in stages] for stages in plans]
    return list(known), numbers


def _row(stage: dict[str, Any]) -> tuple[Any, ...]:
    again_ms = stage["recompute_ms"] + stage["spill_ms"]
    return (
        stage["fate"] != "kept",
        stage["fate"],
        str(stage["runs"]),
        format_bytes(stage["saves_bytes"]),
        format_seconds(stage["forward_ms"] / 1e3),
        format_seconds(stage["backward_ms"] / 1e3),
        format_seconds(again_ms / 1e3) if again_ms else "-",
        stage["why"],
    )


_NAMES = ("what", "runs", "saves", "forward", "backward", "again", "why")


def _stages(stages: Sequence[dict[str, Any]], rows: Sequence[tuple[Any, ...]]) -> str:
    lines = []
    for stage, (again, *cells) in zip(stages, rows, strict=True):
        first = f"<td>{stage['number']}</td><td>{escape(stage['name'])}</td>"
        rest = "".join(
            f"<td class='cell{' text' if name in ('what', 'why') else ''}{' why' if name == 'why' else ''}'"
            f"{'' if name in ('what', 'why') else f' data-name={name}'}>{escape(cell)}</td>"
            for name, cell in zip(_NAMES, cells, strict=True)
        )
        lines.append(f"<tr{' class=again' if again else ''}>{first}{rest}</tr>")
    head = "".join(
        f"<th scope=col{' class=text' if name in ('what', 'why') else ''}>{name}</th>"
        for name in ("", "stage", *_NAMES)
    )
    return f"<div class=scroll><table class=stages><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _longer(needs: Sequence[dict[str, Any]], budget_bytes: int) -> str:
    if not needs:
        return ""
    lines = []
    for need in needs:
        least_bytes = need["smallest_budget_bytes"]
        verdict = "fits" if need["fits"] else f"{format_bytes(least_bytes - budget_bytes)} too small"
        cells = (format_bytes(need["keep_all_bytes"]), format_bytes(least_bytes), verdict)
        lines.append(
            f"<tr><td class=text>{escape(need['what'])}</td>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    names = ("inputs", "keeping all holds", "the smallest budget", "this budget")
    head = "".join(f"<th scope=col{'' if number else ' class=text'}>{name}</th>" for number, name in enumerate(names))
    return (
        "<h2>What longer inputs need</h2><div class=scroll><table class=wider>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
