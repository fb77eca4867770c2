"""Every public name says what it is, in an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

ROOMS = ("errors", "functional", "memory", "nn", "planning", "segments")

SHOWN_BY = {
    "Budget": "gpuckpt.memory",
    "Certificate": "gpuckpt.planning.plan_chain",
    "Charge": "gpuckpt.memory",
    "Event": "gpuckpt.memory",
    "Fitted": "gpuckpt.fit",
    "Frontier": "gpuckpt.planning.plan_frontier",
    "Fusion": "gpuckpt.nn.fuse",
    "Ledger": "gpuckpt.memory",
    "PipelinePlan": "gpuckpt.planning.plan_pipeline",
    "RankPlan": "gpuckpt.planning.plan_pipeline",
    "Simulation": "gpuckpt.planning.simulate",
    "Snapshot": "gpuckpt.memory",
}
"""What nobody makes by hand, and whose example it is in."""


def public() -> Iterator[tuple[str, Any]]:
    """The classes and functions of the package and its public rooms, each by the name that it is known by."""
    found: set[int] = set()
    for room in ("gpuckpt", *(f"gpuckpt.{room}" for room in ROOMS)):
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            # Aliases of types and constants cannot have a docstring of their own.
            if (inspect.isclass(value) or inspect.isroutine(value)) and id(value) not in found:
                found.add(id(value))
                yield f"{room}.{name}", value


PUBLIC = dict(public())


def looked_up(path: str) -> Any:
    room, _, name = path.rpartition(".")
    return (
        importlib.import_module(path)
        if path in ("gpuckpt.memory", "gpuckpt.errors")
        else getattr(importlib.import_module(room), name)
    )


def examples_of(path: str, value: Any) -> list[doctest.DocTest]:
    home = value if inspect.ismodule(value) else inspect.getmodule(inspect.unwrap(value))
    if inspect.ismodule(value):
        found = [doctest.DocTestParser().get_doctest(value.__doc__ or "", dict(vars(value)), path, None, 0)]
    else:
        found = doctest.DocTestFinder().find(inspect.unwrap(value), path, module=home, globs=dict(vars(home)))
    return [test for test in found if test.examples]


def test_the_walk_finds_the_whole_face() -> None:
    assert len(PUBLIC) > 75
    assert {"gpuckpt.fit", "gpuckpt.nn.GatedMLP", "gpuckpt.segments.Dense", "gpuckpt.errors.StateModified"} <= {*PUBLIC}
    assert {*SHOWN_BY} <= {path.rpartition(".")[2] for path in PUBLIC}


@pytest.mark.parametrize("path", PUBLIC)
def test_it_has_a_docstring_and_so_has_every_method(path: str) -> None:
    value = PUBLIC[path]
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own, path
    if not inspect.isclass(value):
        return
    for name, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        inherited = any(hasattr(base, name) for base in value.__mro__[1:] if base.__module__.startswith("torch."))
        if not name.startswith("_") and inspect.isroutine(function) and not inherited:
            assert function.__doc__ or f"`{name}`" in own, f"{path}.{name} has no docstring"


@pytest.mark.parametrize("path", PUBLIC)
def test_it_has_an_example(path: str) -> None:
    value = PUBLIC[path]
    name = path.rpartition(".")[2]
    if inspect.isclass(value) and issubclass(value, BaseException):
        path = "gpuckpt.errors"
    path = SHOWN_BY.get(name, path)
    assert examples_of(path, looked_up(path)), f"{name} is shown by no example"


@pytest.mark.parametrize("path", [*PUBLIC, "gpuckpt.memory", "gpuckpt.errors"])
def test_its_examples_print_what_they_say(path: str) -> None:
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    for test in examples_of(path, looked_up(path)):
        text: list[str] = []
        result = doctest.DocTestRunner(optionflags=flags).run(test, out=text.append)
        assert result.failed == 0, "".join(text)
