"""A picture of a chain's frontier: step time against peak bytes, the knee marked, and classic strategies for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gpuckpt.planning.frontier import Frontier
from gpuckpt.planning.plan import Plan
from gpuckpt.planning.tables import cut_text
from gpuckpt.report.files import whole_file

__all__ = ["draw_frontier"]

_GIB = float(1 << 30)


def draw_frontier(frontier: Frontier, path: str | Path, *, others: Mapping[str, Plan] | None = None) -> Path:
    """Write the picture to `path` (its suffix decides the format: .svg, .png, .pdf) and return the path.

    `others`: plans by name to mark as well, such as those of `plan_chain(chain, budget, "sqrt")`.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    gib = [peak_bytes / _GIB for peak_bytes, _ in frontier.points]
    ms = [1e3 * step_s for _, step_s in frontier.points]
    axes.plot(gib, ms, marker="o", markersize=3, linewidth=1.4, color="#1f5fa8", label="optimal")
    for name, plan in (others or {}).items():
        axes.plot(plan.certificate.peak_bytes / _GIB, 1e3 * plan.certificate.step_s, "x", label=name)
    knee = frontier.knee
    axes.annotate(
        f"knee: {gib[knee]:.3g} GiB, {ms[knee]:.4g} ms",
        (gib[knee], ms[knee]),
        xytext=(12, 18),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->", "color": "#444444"},
    )
    axes.set_xlabel("peak of held bytes, GiB")
    axes.set_ylabel("step time, ms")
    # As it is: a file's name is no formula, and no XML.
    name = "".join(c if c.isprintable() else "?" for c in frontier.chain_name)
    axes.set_title(cut_text(name), parse_math=False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished)
    return path
