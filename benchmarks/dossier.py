"""The committed dossier: `python benchmarks/dossier.py [--quick]`, or `make audit`.

Compiles every shipped kernel for every architecture (with --quick the preferred configuration of each), checks the bounds and
writes benchmarks/results/dossier.md, and out/audit.html and out/audit.json. Needs no GPU. Ends with 1 where a bound is
broken.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gpuckpt.report.audit import run_audit

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the preferred configuration of each kernel alone")
    quick = parser.parse_args().quick
    out = HERE.parent / "out"
    page = HERE / "results" / "dossier.md"
    raise SystemExit(run_audit([], out / "audit.json", out / "audit.html", markdown_path=page, quick=quick))
