"""Plain attributes of modules, and lists and dicts of such: taken down, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from gpuckpt.pytorch.engine.fence.holders import LARGEST, PLAIN, ValueKind, is_foreign, kind_of

__all__ = [
    "ABSENT",
    "ELSEWHERE",
    "INTERNAL",
    "captured",
    "containers",
    "hooks_of",
    "refill",
    "restore",
    "restore_hooks",
    "take_new",
]

INTERNAL = (frozenset(nn.Module().__dict__) - {"training"}) | {"_compiled_call_impl"}
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.startswith("_forward_") and "hooks" in name)
ABSENT: Any = object()
ELSEWHERE: Any = object()
"""What is put back by reached.py."""


def captured(value: Any) -> Any:
    """A value to be put back: itself, or a copy of a container. `ELSEWHERE` for tensors, objects and what contains them."""
    kind = kind_of(value)
    if value is ABSENT or kind is ValueKind.PLAIN or (kind is ValueKind.CODE and is_foreign(value)):
        return value
    if type(value) in (list, dict, set, tuple):
        if len(value) > LARGEST:
            return ABSENT
        if all(_harmless(item) for item in (value.values() if type(value) is dict else value)):
            return (value, value.copy()) if type(value) is not tuple else value
    return ELSEWHERE


def _harmless(value: Any) -> bool:
    return type(value) in PLAIN or (isinstance(value, tuple) and all(type(item) in PLAIN for item in value))


def restore(held: dict[str, Any], names: Sequence[str], seen: list[Any], contents: dict[int, tuple[Any, Any]]) -> None:
    """Let a module's attributes be those called `names`, with the values in `seen`, as far as those are known. `contents`: by id
    the containers that this fills, each with what is in it now."""
    for name in [name for name in held if name not in INTERNAL and name not in names]:
        del held[name]  # made since
    for name, value in zip(names, seen, strict=True):
        if value is ABSENT:
            continue
        if type(value) is tuple and len(value) == 2 and type(value[0]) in (list, dict, set):
            container, content = value
            contents.setdefault(id(container), (container, container.copy()))
            refill(container, content)
            held[name] = container  # the same one, which other modules may share
        elif held.get(name, ABSENT) is not value:
            held[name] = value


def hooks_of(held: dict[str, Any]) -> list[dict[int, Any]] | None:
    """A module's forward hooks; None where it has none."""
    if not (held["_forward_hooks"] or held["_forward_pre_hooks"]):
        return None
    return [dict(held[name]) for name in _HOOKS]


def restore_hooks(held: dict[str, Any], hooks: list[dict[int, Any]] | None) -> None:
    if hooks is None and hooks_of(held) is None:
        return
    for number, name in enumerate(_HOOKS):
        refill(held[name], {} if hooks is None else hooks[number])


def containers(held: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Containers among a module's attributes, with copies of what is in them."""
    return [
        (value, value.copy())
        for name, value in held.items()
        if type(value) in (list, dict, set) and name not in INTERNAL and len(value) <= LARGEST
    ]


def refill(container: Any, content: Any) -> None:
    if len(container) == len(content) and (container is content or _same_items(container, content)):
        return
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


def _same_items(container: Any, content: Any) -> bool:
    if isinstance(container, list):
        return all(a is b for a, b in zip(container, content, strict=True))
    if isinstance(container, dict):
        return all(container.get(key, ABSENT) is value for key, value in content.items())
    return container == content


def take_new(held: Iterable[tuple[dict[str, Any], Sequence[str]]]) -> list[tuple[dict[str, Any], str, Any]]:
    """Take out of dicts whose names were known what has come since, such as buffers that forward registers; where, and what."""
    grown = [(each, known) for each, known in held if len(each) > len(known)]
    return [(each, name, each.pop(name)) for each, known in grown for name in list(each) if name not in known]
