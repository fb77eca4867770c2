"""The command line: `gpuckpt train | plan | audit | doctor | oom | report | bench`.

Each command's work is in a module of its own, imported when the command runs. What a user got wrong ends with exit code 2
and one line.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from io import TextIOWrapper
from json import dumps
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from gpuckpt.cli.plan import plan
from gpuckpt.errors import BudgetExceeded, CheckpointError
from gpuckpt.units import format_bytes

__all__ = ["app", "main"]

_EXIT_CODES = """Exit codes: 0 done; 1 a bound is broken (audit), or what a benchmark ends with; 2 a mistake in what was asked,
or a file that cannot be read or written, in one line; 130 interrupted by Ctrl-C; 143 by SIGTERM."""


def _examples(*lines: str) -> str:
    """Examples for the end of a command's help: paragraphs, which stay lines of their own."""
    return "\n\n".join(("Examples:", *(f"  {line}" for line in lines)))


app = typer.Typer(
    help="Activation checkpointing under a hard byte budget.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from gpuckpt.cli.doctor import own_version

        print(f"gpuckpt {own_version()}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Activation checkpointing under a hard byte budget."""


@app.command(
    epilog=_examples(
        "gpuckpt train --out out/demo",
        "gpuckpt train --data README.md --layers 6 --budget 4MiB --steps 100",
        "gpuckpt train --budget 2MiB --host-budget 64MiB --json",
    )
)
def train(
    data: Annotated[
        list[Path] | None, typer.Option(help="files or folders to learn from [the standard library]")
    ] = None,
    layers: Annotated[int, typer.Option(help="transformer blocks")] = 12,
    width: Annotated[int, typer.Option(help="model width")] = 128,
    heads: Annotated[int, typer.Option(help="attention heads")] = 4,
    context: Annotated[int, typer.Option(help="bytes a sample looks back")] = 128,
    batch: Annotated[int, typer.Option(help="samples a step")] = 8,
    steps: Annotated[int, typer.Option(help="training steps")] = 60,
    seed: Annotated[int, typer.Option(help="of the weights and the batches")] = 0,
    activation: Annotated[
        str, typer.Option(help="gelu, gelu_tanh, silu, relu, relu2, swiglu, geglu, reglu, ...")
    ] = "gelu",
    budget: Annotated[str | None, typer.Option(help="bytes for activations, as 64MiB [40% of the plain run]")] = None,
    host_budget: Annotated[
        str | None, typer.Option(help="bytes of host memory to spill to where that is faster than recomputing [none]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [a GPU if there is one]")] = None,
    out: Annotated[Path, typer.Option(help="folder for report.json and the picture of the ledger")] = Path("out/train"),
    json: Annotated[bool, typer.Option("--json", help="print the report as JSON, and nothing else")] = False,
) -> None:
    """Train a byte-level transformer under a hard activation budget, and compare it with the plain run."""
    from rich.console import Console

    from gpuckpt.cli import train as command
    from gpuckpt.cli.transformer import Config

    console = Console(stderr=json)
    options = command.Options(
        data=tuple(data or ()),
        config=Config(layers, width, heads, context, activation),
        batch=batch,
        steps=steps,
        seed=seed,
        budget=budget,
        host_budget=host_budget,
        device=device,
        out=out,
    )
    report, fitted = command.train(options, console)
    command.write_report(report, fitted, out)
    if json:
        print(dumps(asdict(report), indent=1, default=str))
    else:
        console.print(command.table(report))
        for what, name in (("report", "report.json"), ("picture", "ledger.png"), ("page", "page.html")):
            if (out / name).exists():
                console.print(f"{what + ':':<9}{out / name}", highlight=False, soft_wrap=True)
    if report.interrupted:
        raise typer.Exit(130)


app.command(
    epilog=_examples(
        "gpuckpt plan --layers 32 --width 4096 --context 8192 --budget 16GiB",
        "gpuckpt plan --hf config.json --device h100-sxm --parallel fsdp=8 --find context",
        "gpuckpt plan out/plan/chain.json --budget 8GiB --spill pcie-gen5-x16 --json",
        "gpuckpt plan --pipeline 4 --budget 16GiB --schedule interleaved --chunks 2",
    )
)(plan)


@app.command(epilog=_examples("gpuckpt audit --quick", "gpuckpt audit --arch sm_90 --html out/audit.html"))
def audit(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, ...; several may follow [all that ship]")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    json: Annotated[bool, typer.Option("--json", help="print the dossier as JSON")] = False,
    html: Annotated[Path | None, typer.Option(help="write the dossier as a page")] = None,
    jobs: Annotated[int | None, typer.Option(help="compiler processes [one a core]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="the preferred tile of each kernel only")] = False,
) -> None:
    """Compile every shipped kernel ahead of time and check registers, spills and instructions. Needs no GPU."""
    from gpuckpt.report.audit import run_audit

    archs = [*(arch or ()), *(more or ())]
    raise typer.Exit(run_audit(archs, "-" if json else None, html, jobs, quick=quick))


@app.command(epilog=_examples("gpuckpt report out/demo"))
def report(
    folder: Annotated[Path, typer.Argument(help="where `gpuckpt train` wrote page.json")],
    json: Annotated[bool, typer.Option("--json", help="print what the page shows as JSON")] = False,
) -> None:
    """Make the page of a run again from its data: FOLDER/page.json becomes FOLDER/page.html."""
    from json import loads

    from gpuckpt.report.files import write_whole
    from gpuckpt.report.page import to_page

    path = folder / "page.html"
    facts = loads((folder / "page.json").read_text(encoding="utf-8"))
    write_whole(path, to_page(facts))
    print(dumps({"page": str(path), **facts}) if json else f"wrote {path}")


@app.command(epilog=_examples("gpuckpt oom out/oom.json"))
def oom(
    file: Annotated[Path, typer.Argument(help="what explain_oom(..., save=FILE) wrote")],
    json: Annotated[bool, typer.Option("--json", help="print the facts as JSON")] = False,
) -> None:
    """What was alive when a step ran out of memory, and what would have helped."""
    from gpuckpt.cli.oom import read_oom

    page = read_oom(file)
    print(file.read_text(encoding="utf-8").rstrip() if json else page)


@app.command(epilog=_examples("gpuckpt doctor", "gpuckpt doctor --json"))
def doctor(json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False) -> None:
    """What is installed, what runs where, and what no budget caps."""
    from rich.console import Console

    from gpuckpt.cli import doctor as command

    if json:
        print(dumps(command.examine(), indent=1))
    else:
        command.doctor(Console())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=_examples(
        "gpuckpt bench", "gpuckpt bench checkpoint --quick", "gpuckpt bench step_time --layers 6 --rounds 5"
    ),
)
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="which; without it, all are listed")] = None,
    device: Annotated[str | None, typer.Option(help="refuse a benchmark that does not run there: cpu or cuda")] = None,
    json: Annotated[bool, typer.Option("--json", help="the list, or a benchmark's own figures, as JSON")] = False,
) -> None:
    """Run a benchmark of the checkout by name. Its own options may follow: --quick (under a minute), --rounds, ..."""
    from gpuckpt.cli.bench import benchmarks, run_benchmark

    if name is not None:
        raise typer.Exit(run_benchmark(name, device, [*context.args, *(["--json"] if json else [])]))
    found = benchmarks()
    if json:
        print(dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    rows = Table.grid(padding=(0, 2))
    for each, what in found.items():
        rows.add_row(each, what)
    Console().print(rows, highlight=False, markup=False)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, _end)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # as long as the process
        if isinstance(stream := getattr(sys, name), TextIOWrapper):  # names of stages may be in any script
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="gpuckpt")
    except SystemExit:
        _flush()
        raise
    except BudgetExceeded as error:
        _fail(
            f"a budget of {error.available} bytes ({format_bytes(error.available)}) is too small: "
            f"the smallest that would do is {error.need} bytes ({format_bytes(error.need)})"
        )
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        _fail(str(error))


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """On SIGTERM: end as by an exception, so that nothing half written stays."""
    raise SystemExit(128 + number)


def _flush() -> None:
    """Write what is left to stdout now, while it can still be said that it failed: a full disk, a reader that is gone."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more when it ends
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"gpuckpt: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
