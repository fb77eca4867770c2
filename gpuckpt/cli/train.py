"""`gpuckpt train`: a byte-level transformer under a hard activation budget, vs. the plain run of its first steps."""

from __future__ import annotations

import copy
import json
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gpuckpt.budget import CheckpointBudget
from gpuckpt.cli.plan import chain_of_sizes
from gpuckpt.cli.text import Batches, read_text
from gpuckpt.cli.transformer import Config, Transformer
from gpuckpt.memory.uncapped import uncapped
from gpuckpt.planning import Chain, plan_chain
from gpuckpt.pytorch.fit import Fitted, fit
from gpuckpt.pytorch.profiling.measure import measure
from gpuckpt.report.files import whole_file, write_whole
from gpuckpt.report.ledger import chrome_trace, draw_ledger, one_step
from gpuckpt.report.page import page_data, to_page
from gpuckpt.units import format_bytes, parse_bytes

__all__ = ["DEFAULT_SHARE", "Options", "TrainReport", "table", "train", "write_report"]

DEFAULT_SHARE = 0.4
"""The default budget, as a share of what the plain run holds."""


@dataclass(frozen=True)
class Options:
    """What `gpuckpt train` was asked for."""

    data: tuple[Path, ...] = ()
    config: Config = field(default_factory=Config)
    batch: int = 8
    steps: int = 60
    plain_steps: int = 5
    seed: int = 0
    learning_rate: float = 1e-3
    budget: str | None = None
    host_budget: str | None = None
    device: str | None = None
    out: Path = Path("out/train")


@dataclass
class TrainReport:
    """What report.json holds. Bytes are ints, seconds floats; None where there is nothing to say."""

    cap_bytes: int
    promised_peak_bytes: int
    measured_peak_bytes: int = 0
    host_promised_peak_bytes: int = 0
    host_measured_peak_bytes: int = 0
    plain_peak_bytes: int | None = None
    smallest_budget_bytes: int = 0
    step_s: float | None = None
    plain_step_s: float | None = None
    recompute_share: float = 0.0
    losses: list[float] = field(default_factory=list)
    plain_losses: list[float] = field(default_factory=list)
    losses_equal: bool | None = None
    leftover_bytes: int = 0
    interrupted: bool = False
    device: str = "cpu"
    plan: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    uncapped: list[dict[str, Any]] = field(default_factory=list)


class _Training:
    """One model in training."""

    def __init__(self, model: Transformer, learning_rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        began_s = time.perf_counter()
        loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - began_s)

    def median_s(self, steps: int | None = None) -> float | None:
        """Median seconds of the steps after the first, which warms up."""
        counted = self.seconds[1:steps] or self.seconds[:1]
        return statistics.median(counted) if counted else None


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is. Raises `ValueError` for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        have = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(
            f"--device {name!r} is not there ({str(error).splitlines()[0]}); this machine has {', '.join(have)}"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r}: expected cpu or cuda")
    return device


def train(options: Options, console: Console) -> tuple[TrainReport, Fitted]:
    """Measure, plan, train, compare; returns the report, whole or as far as Ctrl-C let it come.

    Raises `BudgetExceeded` before the first step where the budget is too small, `ValueError` and `FileNotFoundError` for
    options that make no sense.
    """
    for name in ("batch", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: expected at least 1")
    device = choose_device(options.device)
    cap_bytes = None if options.budget is None else parse_bytes(options.budget, "--budget")
    config = options.config
    data = read_text(options.data, config.context)
    batches = Batches(data, options.batch, config.context, options.seed, device)

    torch.manual_seed(options.seed)
    model = Transformer(config).to(device)
    if cap_bytes is None:  # only then is the model measured before fit measures it
        unit_bytes = CheckpointBudget(0, device=device).unit_bytes
        cap_bytes = int(DEFAULT_SHARE * _plain_peak_bytes(measure(model, *batches[0], unit_bytes=unit_bytes)))
    plain = _Training(copy.deepcopy(model), options.learning_rate)
    budget = CheckpointBudget(cap_bytes, device=device, log_events=1 << 17)
    fitted = fit(model, batches[0], budget, host_budget=options.host_budget)
    chain, certificate = fitted.chain, fitted.plan.certificate
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} bytes of text, {len(chain)} stages"
    )
    console.print(f"the plain run holds {format_bytes(_plain_peak_bytes(chain))}, the cap is {format_bytes(cap_bytes)}")
    report = TrainReport(
        cap_bytes,
        certificate.peak_bytes,
        host_promised_peak_bytes=certificate.host_peak_bytes,
        smallest_budget_bytes=certificate.smallest_budget_bytes,
        recompute_share=certificate.recompute_s / certificate.step_s if certificate.step_s else 0.0,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        plan=repr(fitted.plan),
        options={**asdict(config), **{k: v for k, v in vars(options).items() if k not in ("config", "data", "out")}},
        versions=_versions(),
    )
    run = _Training(model, options.learning_rate)
    try:
        with _interrupts() as interrupted:
            _loop(options, console, batches, run, plain, fitted, report, interrupted)
    except KeyboardInterrupt:  # the second one, in the middle of a step
        report.interrupted = True
    report.uncapped = [row._asdict() for row in uncapped(budget.device, model=model, optimizer=run.optimizer)]
    compared = min(len(run.losses), len(plain.losses))
    report.losses, report.plain_losses = run.losses, plain.losses
    report.step_s, report.plain_step_s = run.median_s(options.plain_steps), plain.median_s()
    report.losses_equal = run.losses[:compared] == plain.losses[:compared] if compared else None
    return report, fitted


def _plain_peak_bytes(chain: Chain) -> int:
    """What a run without recompute holds at its peak."""
    return plan_chain(chain, sum(chain.footprints), strategy="none").certificate.peak_bytes


def _loop(
    options: Options,
    console: Console,
    batches: Batches,
    run: _Training,
    plain: _Training,
    fitted: Fitted,
    report: TrainReport,
    interrupted: Callable[[], bool],
) -> None:
    budget = fitted.budget
    tokens = options.batch * options.config.context
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s  budget {task.fields[held]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.steps, loss=0.0, rate=0.0, held="")
        for number in range(options.steps):
            if interrupted():
                report.interrupted = True
                break
            batch = batches[number]
            if number < options.plain_steps:
                if number == 0:  # what the plain run holds, counted by the same ledger
                    with CheckpointBudget("1PiB", device=budget.device) as ledger:
                        plain.step(batch)
                    report.plain_peak_bytes = ledger.peak_bytes
                else:
                    plain.step(batch)
            run.step(batch)
            fitted.check_promise()
            report.measured_peak_bytes = max(report.measured_peak_bytes, budget.peak_bytes)
            left_bytes = sum(each.used_bytes for each in (budget, fitted.host_budget) if each is not None)
            report.leftover_bytes = max(report.leftover_bytes, left_bytes)
            report.host_measured_peak_bytes = max(report.host_measured_peak_bytes, fitted.measured_host_peak_bytes)
            progress.update(
                task,
                advance=1,
                loss=run.losses[-1],
                rate=tokens / run.seconds[-1],
                held=f"{format_bytes(budget.peak_bytes)} of {format_bytes(budget.max_bytes)}",
            )


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed: the first time the step is finished, the second time it is left.

    A KeyboardInterrupt that Python happens to raise inside a finalizer is printed and lost, and a step runs many of them.
    """
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("gpuckpt", "torch", "triton", "numpy", "numba", "cupy-cuda12x", "cupy-cuda13x"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _longer_contexts(options: dict[str, Any], unit_bytes: int) -> dict[str, Chain]:
    """The chains of the same model with 2, 4 and 8 times the context, measured without memory."""
    found = {}
    for times in (2, 4, 8):
        context = times * options["context"]
        layers, width, heads, batch = (options[name] for name in ("layers", "width", "heads", "batch"))
        kind = options["activation"], "fp32", "H100 SXM"  # its roofline: no seconds of these chains are shown
        found[f"context {context}"] = chain_of_sizes(layers, width, heads, context, batch, *kind, unit_bytes=unit_bytes)
    return found


def write_report(report: TrainReport, fitted: Fitted, out: Path) -> None:
    """report.json, of the ledger's last step the picture and a trace, and the page, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "report.json", json.dumps(asdict(report), indent=1, default=str) + "\n")
    events = one_step(fitted.budget.events())
    write_whole(out / "trace.json", json.dumps(chrome_trace(events)) + "\n")
    if report.losses:
        longer = _longer_contexts(report.options, fitted.budget.unit_bytes)
        data = page_data(fitted, plain_peak_bytes=report.plain_peak_bytes, longer=longer)
        write_whole(out / "page.json", json.dumps(data) + "\n")
        write_whole(out / "page.html", to_page(data))
    if len(events) > 1 and report.losses:
        peak, cap = format_bytes(report.measured_peak_bytes), format_bytes(report.cap_bytes)
        title = f"One training step: {peak} held at the peak, {cap} allowed"
        for suffix in ("svg", "png"):
            with whole_file(out / f"ledger.{suffix}") as path:
                draw_ledger(events, report.cap_bytes, report.promised_peak_bytes, report.plain_peak_bytes, path, title)


def table(report: TrainReport) -> Table:
    """The end of the run at a glance."""

    def size(nbytes: int | None) -> str:
        return "-" if nbytes is None else f"{nbytes:,} B ({format_bytes(nbytes)})"

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f} s"

    equal = {None: "not compared", True: "bitwise equal", False: "DIFFERENT"}[report.losses_equal]
    rows = Table(title="gpuckpt train" + (" (interrupted)" if report.interrupted else ""), show_header=False)
    rows.add_column(style="bold")
    rows.add_column(justify="right")
    rows.add_row("cap", size(report.cap_bytes))
    rows.add_row("peak promised by the plan", size(report.promised_peak_bytes))
    rows.add_row("peak measured", size(report.measured_peak_bytes))
    if report.options.get("host_budget") is not None:
        rows.add_row("on the host, promised by the plan", size(report.host_promised_peak_bytes))
        rows.add_row("on the host, measured", size(report.host_measured_peak_bytes))
    rows.add_row("peak of the plain run", size(report.plain_peak_bytes))
    rows.add_row("smallest budget that would do", size(report.smallest_budget_bytes))
    rows.add_row("held after every step", size(report.leftover_bytes))
    rows.add_row("a step under the plan", seconds(report.step_s))
    rows.add_row("a plain step", seconds(report.plain_step_s))
    rows.add_row("recomputed share of a step", f"{report.recompute_share:.1%}")
    rows.add_row(f"losses of {len(report.plain_losses)} steps, plan and plain", equal)
    if report.losses:
        rows.add_row("loss, first and last step", f"{report.losses[0]:.4f} -> {report.losses[-1]:.4f}")
    return rows
