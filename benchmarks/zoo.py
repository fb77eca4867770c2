"""Every architecture of tests/zoo: its smallest budget, and its step vs. a plain one and the library's own checkpointing.

    python benchmarks/zoo.py [NAME ...] [--rounds 5] [--page docs/zoo.md]

Writes the table of the page with --page; prints it otherwise. Steps take turns round by round; ratios are medians of the ratios
within a round, of the thread's CPU seconds. Models are tiny, so that most of a step is Python and not arithmetic: a recompute
costs more here than on models of a useful size.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the models are those of the tests
from bench_record import arguments

from gpuckpt import fit, format_bytes
from tests.pytorch.beside_plain import default_loss, plain_peak_bytes
from tests.zoo.checks import seed_all
from tests.zoo.models import ZOO, Architecture

PAGE = """# Zoo

Architectures as people train them, built small from configs: own loss, padding, dropout, caches. Each is fitted in the tests
under its smallest budget, 40% and 60% of what a plain step saves: promised bytes are measured to the byte, losses, gradients and
buffers are those of the plain run bit for bit ([tests/zoo](../tests/zoo/test_zoo.py)). `make nightly` writes this page.

*Smallest*: the smallest budget as a share of what a plain step saves. Step times are ratios to the plain step, under the smallest
budget, under 60%, and with the library's own gradient checkpointing where it has one. The models are tiny: most of a step is
Python, and ratios are above those of models of a useful size.

| architecture | saved by a plain step | smallest | step, smallest | step, 60% | library's own | exact |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
"""


@dataclass(frozen=True)
class Row:
    """One architecture. Times are ratios to the plain step; None: not possible, or the library has none."""

    name: str
    plain_bytes: int
    smallest_bytes: int
    at_smallest: float
    at_sixty: float | None
    of_library: float | None
    remark: str

    def __str__(self) -> str:
        share = f"{self.smallest_bytes / self.plain_bytes:.2f}"
        times = [f"{ratio:.2f}" if ratio else "" for ratio in (self.at_smallest, self.at_sixty, self.of_library)]
        cells = [self.name.replace("_", " "), format_bytes(self.plain_bytes), share, *times, self.remark]
        return f"| {' | '.join(cells)} |"


def step_of(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], float]:
    """A function that trains one step and returns its seconds."""

    def step() -> float:
        seed_all(0)
        model.zero_grad()
        began_s = time.thread_time()
        default_loss(model(**inputs)).backward()
        return time.thread_time() - began_s

    return step


def with_the_librarys(model: nn.Module) -> nn.Module | None:
    """A copy under the library's own gradient checkpointing."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return None
    copied = copy.deepcopy(model)
    copied.gradient_checkpointing_enable({"use_reentrant": False})
    return copied


def measure(architecture: Architecture, rounds: int) -> Row:
    seed_all(0)
    model, inputs = architecture.build()
    model.train()
    plain_bytes = plain_peak_bytes(model, (), inputs)
    models = {"plain": copy.deepcopy(model), "smallest": copy.deepcopy(model)}
    seed_all(0)
    probe = fit(copy.deepcopy(model), inputs, 2 * plain_bytes)
    smallest_bytes = probe.plan.certificate.smallest_budget_bytes
    fit(models["smallest"], inputs, smallest_bytes)
    if smallest_bytes <= 0.6 * plain_bytes:
        models["sixty"] = copy.deepcopy(model)
        fit(models["sixty"], inputs, int(0.6 * plain_bytes))
    library = with_the_librarys(model)
    if library is not None:
        models["library"] = library
    steps = {name: step_of(variant, inputs) for name, variant in models.items()}
    for step in steps.values():
        step()
    taken = [{name: step() for name, step in steps.items()} for _ in range(rounds)]
    ratios = {name: statistics.median(row[name] / row["plain"] for row in taken) for name in steps}
    remark = f"no: {architecture.gap}" if architecture.gap else "yes"
    return Row(
        architecture.name,
        plain_bytes,
        smallest_bytes,
        ratios["smallest"],
        ratios.get("sixty"),
        ratios.get("library"),
        f"{remark}; {architecture.varies}" if architecture.varies else remark,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", type=Path)
    options = arguments(parser, names=["nanogpt", "resnet"], rounds=1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in sorted(options.names or ZOO):
        rows.append(measure(ZOO[name], options.rounds))
        print(rows[-1], flush=True)
    if options.page:
        options.page.write_text(PAGE + "".join(f"{row}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
