"""The committed dossier: `python benchmarks/dossier.py`, or `make audit`.

Compiles every shipped kernel for every architecture, checks the bounds and writes benchmarks/results/dossier.md, with
out/audit.html and out/audit.json beside it. Needs no GPU. Ends with 1 where a bound is broken.
"""

from __future__ import annotations

from pathlib import Path

from gpuckpt.report.audit import run_audit

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    out = HERE.parent / "out"
    raise SystemExit(
        run_audit([], out / "audit.json", out / "audit.html", markdown_path=HERE / "results" / "dossier.md")
    )
