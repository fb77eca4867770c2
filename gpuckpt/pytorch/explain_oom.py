"""`explain_oom`: when a step runs out of memory, what was alive, what the plan had expected, and what would have helped."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpuckpt.checks import shown
from gpuckpt.errors import BudgetExceeded, CheckpointError
from gpuckpt.planning.tables import cut_text, text_table
from gpuckpt.pytorch.fit import fitted
from gpuckpt.pytorch.whole_device.step_ledger import KINDS, StepLedger
from gpuckpt.units import format_bytes

__all__ = ["OOM_FORMAT", "explain_oom", "oom_page"]

OOM_FORMAT = "gpuckpt.oom/1"
_MOST_MODULES = 8


class explain_oom(StepLedger):
    """Within the context, around one step of `model`, running out of memory is explained on stderr and in the error's notes.

    Args:
        model: fitted or not.
        optimizer: what steps it, one or several; without it their state counts as input.
        save: a file that the facts go to as JSON, for `gpuckpt oom FILE`.

    It looks at `BudgetExceeded`, `torch.OutOfMemoryError` and `MemoryError`, which go on as they came; it counts what operators
    return (see `StepLedger`), and costs a few microseconds for each operator.

    >>> import contextlib, io
    >>> from gpuckpt import CheckpointBudget
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    >>> page = io.StringIO()
    >>> with contextlib.redirect_stderr(page), contextlib.suppress(MemoryError):
    ...     with explain_oom(model), CheckpointBudget("20KiB", device="cpu"):
    ...         model(torch.ones(100, 64))
    >>> print(page.getvalue().splitlines()[0])
    out of memory: 25,600 bytes were asked for, 20,480 were free
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, *, save: str | Path | None = None) -> None:
        super().__init__(model, optimizer)
        if save is not None and not isinstance(save, str | os.PathLike):
            raise TypeError(f"save is {shown(save)}; expected the name of a file, or None")
        self.save = None if save is None else Path(save)
        self.facts: dict[str, Any] | None = None

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        error = reason[1]
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return
        self.facts = self._facts(error)
        page = oom_page(self.facts)
        error.add_note(page)
        sys.stderr.write(page + "\n")
        if self.save is not None:
            try:
                self.save.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
            except (OSError, ValueError) as problem:  # the second: a name that no file can have
                # The error that is on its way says more than this one, and must not be hidden by it.
                why = getattr(problem, "strerror", None) or problem
                sys.stderr.write(f"the facts were not saved to {shown(str(self.save))}: {why}\n")

    def _facts(self, error: BaseException) -> dict[str, Any]:
        alive = self.alive_at_last()
        kinds, modules = Counter(dict.fromkeys(KINDS, 0)), Counter[str]()
        for life in alive:
            kinds[life.kind] += life.nbytes
            if not life.before:
                modules[life.module or "outside of modules"] += life.nbytes
        if not self._in_backward:  # then what forward has made so far is there for backward
            kinds["activation"] += kinds.pop("transient")
        need, free = _asked(error)
        facts: dict[str, Any] = {
            "format": OOM_FORMAT,
            "error": f"{type(error).__name__}: {cut_text(str(error), 300)}",
            "asked_bytes": need,
            "free_bytes": free,
            "alive_bytes": sum(kinds.values()),
            "kinds": dict(kinds),
            "modules": dict(modules.most_common(_MOST_MODULES)),
            "expected": self._expected(),
        }
        return facts | {"levers": self._levers(kinds, facts["expected"])}

    def _expected(self) -> dict[str, Any] | None:
        """What the plan said; None without one."""
        now = fitted(self.model)
        try:
            certificate = None if now is None else now.plan.certificate
        except CheckpointError:  # it waits for its first batch
            certificate = None
        if now is None or certificate is None:
            return None
        expected = {
            "held_bytes": certificate.peak_bytes,
            "at": certificate.peak_step,
            "device_bytes": now.promised_device_bytes,
            "budget_bytes": now.budget.max_bytes,
            "smallest_budget_bytes": certificate.smallest_budget_bytes,
        }
        if now.deviations:
            first = now.deviations[0]
            expected["deviation"] = [first.promised_bytes, first.measured_bytes]
        return expected

    def _levers(self, kinds: Mapping[str, int], expected: dict[str, Any] | None) -> list[list[Any]]:
        """What else could be done, with the bytes that it would free at most, least first."""
        found = [("let gradients go into the optimizer as they come (a step for each parameter)", kinds["gradient"])]
        if expected is None:
            found.append(("recompute: gpuckpt.fit(model, example, budget)", kinds["activation"] + kinds["transient"]))
        else:
            less = expected["budget_bytes"] - expected["smallest_budget_bytes"]
            found.append(
                (f"a budget of {expected['smallest_budget_bytes']:,} bytes, the smallest for a plan", max(0, less))
            )
        found.append(("half the batch", (kinds["activation"] + kinds["transient"]) // 2))
        found.append(("an 8-bit optimizer", 3 * kinds["optimizer state"] // 4))
        return [[name, nbytes] for name, nbytes in sorted(found, key=lambda lever: lever[1]) if nbytes]


def oom_page(facts: Mapping[str, Any]) -> str:
    """The facts of an out-of-memory error as text."""
    asked, free = facts["asked_bytes"], facts["free_bytes"]
    first = facts["error"] if asked is None else f"{asked:,} bytes were asked for, {free:,} were free"
    lines = [f"out of memory: {first}", ""]
    rows = [("alive then", "bytes", ""), *_rows(facts["kinds"]), *_rows({"all": facts["alive_bytes"]})]
    lines += text_table(rows, (False, True, True))
    if facts["modules"]:
        lines += ["", *text_table([("made in", "bytes", ""), *_rows(facts["modules"])], (False, True, True))]
    expected = facts["expected"]
    lines.append("")
    if expected is None:
        lines.append("the model ran without a plan")
    else:
        of_device = f", {expected['device_bytes']:,} bytes of the device" if expected["device_bytes"] else ""
        lines.append(f"its plan expected {expected['held_bytes']:,} bytes held at {expected['at']!r}{of_device}")
        deviation = expected.get("deviation")
        lines.append(
            "no step before held more than promised"
            if deviation is None
            else f"the first step that took more: {deviation[1]:,} bytes, promised were {deviation[0]:,}"
        )
    short = None if asked is None else asked - free
    enough = [lever for lever in facts["levers"] if short is None or lever[1] >= short]
    if enough:
        name, nbytes = enough[0]
        lines.append(f"the smallest change that would have helped: {name} (frees up to {format_bytes(nbytes)})")
    elif short is not None:
        lines.append(f"no single change frees the {format_bytes(short)} that were missing")
    return "\n".join(lines)


def _rows(sizes: Mapping[str, int]) -> list[tuple[str, str, str]]:
    return [(name, f"{nbytes:,}", format_bytes(nbytes)) for name, nbytes in sizes.items() if nbytes]


def _asked(error: BaseException) -> tuple[int | None, int]:
    """Bytes that were asked for and that were free, where the error tells."""
    if isinstance(error, BudgetExceeded):
        return error.need, error.available
    found = re.search(
        r"Tried to allocate ([\d.]+) ([KMG]iB).*?of which ([\d.]+) ([KMG]iB) is free", str(error), re.DOTALL
    )
    if found is None:
        return None, 0
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    return int(float(found[1]) * units[found[2]]), int(float(found[3]) * units[found[4]])
