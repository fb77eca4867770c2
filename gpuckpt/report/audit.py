"""`gpuckpt audit`: the static dossier of the kernels as a terminal table, JSON, Markdown and one HTML page.

Everything shown is read from compiled code or follows from it and a data sheet; nothing was run on a GPU, and every rendering
says so. The numbers and bounds come from `gpuckpt.kernels.audit.dossier`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuckpt.report.files import write_whole

if TYPE_CHECKING:
    from gpuckpt.kernels.audit.dossier import Dossier, Entry

__all__ = ["parse_archs", "run_audit", "to_html", "to_markdown"]

_DISCLAIMER = (
    "Compiled ahead of time, not run: registers, memory and instructions are what the compiler produced; "
    "milliseconds are the least that the data sheet of the device allows, not timings."
)

# Heading, what it means, how it is read from an entry.
_COLUMNS: tuple[tuple[str, str, Any], ...] = (
    ("kernel", "name[variant, type, tile w warps s stages]", lambda e: e.spec.name),
    ("regs", "registers a thread, of 255", lambda e: e.report.registers),
    ("spills", "STL + LDL instructions; the bound is 0", lambda e: e.report.spills),
    ("stack", "bytes a thread", lambda e: e.report.stack_bytes),
    ("shared", "bytes of shared memory a block", lambda e: f"{e.report.shared_bytes:,}"),
    ("TMEM", "columns of tensor memory, of 512 on sm_100", lambda e: e.report.tmem_columns or ""),
    (
        "tensor core",
        "instructions in the code",
        lambda e: " ".join(f"{k} {v}" for k, v in e.report.tensor_core.items()),
    ),
    ("K step", "instructions in each tensor-core loop / tensor-core ones of them", lambda e: _loops(e)),
    ("TMA", "UTMALDG instructions", lambda e: e.report.tma_loads or ""),
    ("cp.async", "LDGSTS instructions", lambda e: e.report.async_copies or ""),
    ("atomics", "on global memory; the bound is 0", lambda e: e.report.global_atomics),
    ("stores", "what the program writes, by block", lambda e: _stores(e)),
    ("blocks/SM", "how many fit one multiprocessor, and what runs out first", lambda e: _blocks(e)),
    ("least ms", "roofline / with this tile, on the first device listed", lambda e: _least(e)),
)


def parse_archs(archs: Iterable[str | int]) -> list[int]:
    """ "sm_90", "90" and 90 all mean 90. Raises `ValueError` for what nothing ships for."""
    from gpuckpt.kernels.audit.specs import ARCHS

    found = []
    for arch in archs:
        text = str(arch).removeprefix("sm_")
        if not text.isdigit() or int(text) not in ARCHS:
            known = " ".join(f"sm_{a}" for a in ARCHS)
            raise ValueError(f"unknown architecture {arch!r}; kernels ship for {known}")
        found.append(int(text))
    return list(dict.fromkeys(found))


def run_audit(
    archs: Sequence[str | int],
    json_path: str | Path | None = None,
    html_path: str | Path | None = None,
    jobs: int | None = None,
    *,
    markdown_path: str | Path | None = None,
    quick: bool = False,
) -> int:
    """Compile and check every shipped kernel, print a summary, write the files asked for.

    archs: as `parse_archs` takes them, none for all. json_path: "-" prints the JSON, and the summary goes to stderr. jobs:
    compiler processes, one a core by default. quick: the preferred tile of each kernel only. Returns 0 where every bound is
    kept, else 1.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gpuckpt.kernels.audit import dossier as dossiers
    from gpuckpt.kernels.audit.specs import ARCHS, shipped

    wanted = parse_archs(archs) or list(ARCHS)
    specs = dossiers.representative(wanted) if quick else [s for a in wanted for s in shipped(a)]
    console = Console(stderr=json_path == "-")
    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(specs))
        dossier = dossiers.build(
            wanted,
            jobs,
            lambda r: bar.update(task, advance=1, description=f"sm_{r.arch} {r.name}"),
            specs=specs,
        )
    _print(console, dossier)
    outputs = {
        json_path: lambda: json.dumps(dossier.to_json(), indent=1) + "\n",
        html_path: lambda: to_html(dossier),
        markdown_path: lambda: to_markdown(
            dossier, "make audit" if not quick else "python benchmarks/dossier.py --quick"
        ),
    }
    for path, render in outputs.items():
        if path == "-":
            print(render(), end="")
        elif path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, render())
            console.print(f"wrote {path}")
    return 1 if dossier.violations else 0


def _print(console: Any, dossier: Dossier) -> None:
    from rich.table import Table

    table = Table(title="Kernels as compiled", caption=_DISCLAIMER)
    for heading in ("arch", "kernel", "tiles", "regs", "spills", "KiB", "blocks", "broken"):
        left = heading in ("arch", "kernel")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "kernel", overflow="fold")
    for (arch, kernel), entries in _groups(dossier).items():
        broken = sum(bool(e.violations) for e in entries)
        table.add_row(
            f"sm_{arch}",
            kernel,
            str(len(entries)),
            _span(e.report.registers for e in entries),
            _span(e.report.spills for e in entries),
            _span(e.report.shared_bytes >> 10 for e in entries),
            _span(e.occupancy.blocks for e in entries),
            f"[red]{broken}[/red]" if broken else "[green]none[/green]",
        )
    console.print(table)
    for line in dossier.violations:
        console.print(f"broken bound: {line}", style="red", markup=False, highlight=False)
    console.print(_verdict(dossier), style="red" if dossier.violations else "green")


def to_markdown(dossier: Dossier, command: str = "make audit") -> str:
    """A page for the repository: the verdict, then every configuration. command: what makes the page."""
    lines = [
        "# The kernels as compiled",
        "",
        f"Made by `{command}` with triton {', '.join(dossier.to_json()['triton'])}. {_DISCLAIMER}",
        "",
        _verdict(dossier),
        "",
        *(f"- {v}" for v in dossier.violations),
    ]
    if dossier.violations:
        lines.append("")
    lines += [
        "Columns:",
        "",
        *(f"- **{heading}**: {meaning}" for heading, meaning, _ in _COLUMNS),
        "",
        _shapes(dossier),
    ]
    for arch in sorted({e.spec.arch for e in dossier.entries}):
        entries = [e for e in dossier.entries if e.spec.arch == arch]
        lines += ["", f"## sm_{arch}", "", _devices(entries[0]), ""]
        lines.append("| " + " | ".join(heading for heading, _, _ in _COLUMNS) + " |")
        lines.append("| --- |" + " ---: |" * (len(_COLUMNS) - 1))
        lines += ["| " + " | ".join(str(read(e)) for _, _, read in _COLUMNS) + " |" for e in entries]
    return "\n".join(lines) + "\n"


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c62828; --good: #2e7d32; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } .verdict { font-weight: 600; } .bad { color: var(--bad); } .good { color: var(--good); }
input { font: inherit; padding: .3rem .6rem; width: 22rem; max-width: 100%; margin: .5rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th { cursor: help; } tbody tr:hover td { background: var(--soft); } tr.broken td { color: var(--bad); }
td small { color: var(--bad); white-space: normal; display: block; }
"""

_FILTER = """
document.querySelector('input').addEventListener('input', e => {
  const words = e.target.value.toLowerCase().split(/\\s+/);
  for (const row of document.querySelectorAll('tbody tr'))
    row.hidden = !words.every(w => row.dataset.words.includes(w));
});
"""


def to_html(dossier: Dossier) -> str:
    """One page with no outside resources: the verdict, a filter, and a table for each architecture."""
    archs = sorted({e.spec.arch for e in dossier.entries})
    head = "".join(f'<th title="{escape(meaning)}">{escape(heading)}</th>' for heading, meaning, _ in _COLUMNS)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>gpuckpt: the kernels as compiled</title><style>{_STYLE}</style>",
        "<h1>The kernels as compiled</h1>",
        f"<p>triton {escape(', '.join(dossier.to_json()['triton']))}. {escape(_DISCLAIMER)}</p>",
        f'<p class="verdict {"bad" if dossier.violations else "good"}">{escape(_verdict(dossier))}</p>',
        f"<p>{escape(_shapes(dossier))} Headings explain themselves when pointed at.</p>",
        "<input type=search placeholder='filter: e.g. bf16 128x128 tma' aria-label='filter kernels'>",
    ]
    for arch in archs:
        entries = [e for e in dossier.entries if e.spec.arch == arch]
        rows = "".join(_html_row(e) for e in entries)
        parts.append(
            f"<h2>sm_{arch}</h2><p>{escape(_devices(entries[0]))}</p><div class=scroll><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )
    return "\n".join([*parts, f"<script>{_FILTER}</script></html>"]) + "\n"


def _html_row(entry: Entry) -> str:
    cells = [escape(str(read(entry))) for _, _, read in _COLUMNS]
    cells[0] += "".join(f"<small>{escape(v)}</small>" for v in entry.violations)
    words = escape(f"sm_{entry.spec.arch} {entry.spec.name} {'broken' if entry.violations else 'sound'}".lower())
    mark = " class=broken" if entry.violations else ""
    return f'<tr{mark} data-words="{words}">' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>\n"


def _groups(dossier: Dossier) -> dict[tuple[int, str], list[Entry]]:
    groups: dict[tuple[int, str], list[Entry]] = {}
    for e in dossier.entries:
        groups.setdefault((e.spec.arch, e.spec.meta["kernel"]), []).append(e)
    return groups


def _verdict(dossier: Dossier) -> str:
    count, broken = len(dossier.entries), sum(bool(e.violations) for e in dossier.entries)
    if broken:
        return f"{broken} of {count} configurations break a bound."
    return f"All {count} configurations keep every bound."


def _shapes(dossier: Dossier) -> str:
    shapes = {f"M={e.shape.M}, N={e.shape.N}, K={e.shape.K}" for e in dossier.entries}
    return f"The roofline is drawn for {' and '.join(sorted(shapes))}."


def _devices(entry: Entry) -> str:
    if not entry.estimates:
        return "No device of this architecture is in the table."
    return f"Least milliseconds are those of {entry.estimates[0].device}."


def _span(values: Iterable[int]) -> str:
    found = list(values)
    low, high = min(found), max(found)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _loops(entry: Entry) -> str:
    return " ".join(f"{loop.instructions}/{loop.tensor_core}" for loop in entry.report.loops)


def _stores(entry: Entry) -> str:
    return " ".join(f"{count}×{block}" if count > 1 else block for block, count in entry.report.stores.items())


def _blocks(entry: Entry) -> str:
    return f"{entry.occupancy.blocks} ({entry.occupancy.limit})"


def _least(entry: Entry) -> str:
    if not entry.estimates:
        return ""
    first = entry.estimates[0]
    return f"{first.best_s * 1e3:.3f} / {first.tile_s * 1e3:.3f}"
