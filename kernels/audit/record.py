"""Launches recorded instead of run, as on an architecture that need not be there.

Within `recording` a launcher does with tensors that have no memory all that it does on a GPU: it checks, chooses its tile and
decides on descriptors. Only the launch itself is left out; its arguments are kept, and `recorded_spec` makes of them what the
ahead-of-time compiler is given. So what is audited is what would be launched, and nothing of it is written a second time.

Triton's rules for a launch, which `recorded_spec` follows: an int that is 1 is a constant, one that is a multiple of 16 is known
to be, and so is a pointer; None is a constant; ints named in `do_not_specialize` have a type only.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import cross_entropy, gated, linear, mlp, norm
from ..host import hardware, problem
from ..host.dtypes import dtype_name
from .specs import KernelSpec, make_spec

__all__ = ["Launch", "recorded_spec", "recording"]

_MODULES = (cross_entropy, gated, hardware, linear, mlp, norm, problem)
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """A launch that was not made: the kernel, its arguments by name, and options of the compiler."""

    fn: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """The launches that the operations' launchers would make on `arch` within the context. For the whole process: no kernel can
    run in another thread meanwhile."""
    kept: list[Launch] = []

    def make(make: Callable[..., Any], tensors: Sequence[Any], options: tuple[Any, ...] = ()) -> Any:
        return make(*tensors, *options)

    def keep(
        prepare: Callable[..., Any], tensors: Sequence[Any], options: tuple[Any, ...] = (), numbers: Any = ()
    ) -> None:
        made = prepare(*tensors, *options)
        given = dict(zip(made.kernel.arg_names, made.arguments(tensors, numbers), strict=False)) | made.constants
        compiler = {name: given.pop(name) for name in _OPTIONS if name in given}
        kept.append(Launch(made.kernel, given, compiler))

    stand_ins = {"arch_of": lambda t: arch, "INTERPRETED": False, "launch": keep, "once": make}
    with contextlib.ExitStack() as patches:
        for module in _MODULES:
            for name, value in stand_ins.items():
                if hasattr(module, name):
                    patches.enter_context(mock.patch.object(module, name, value))
        yield kept


def recorded_spec(
    launch: Launch, *, variant: str, dtype: str, arch: int, tile: Any, meta: Mapping[str, Any]
) -> KernelSpec:
    """What compiles to the code of `launch`. Raises `ValueError` where its options are not those of `tile`."""
    options = {"num_stages": 3, "maxnreg": None, **launch.options}
    asked = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": getattr(tile, "max_registers", None),
    }
    if options != asked:
        raise ValueError(f"{launch.fn.__name__} is launched with {options}, and {tile.label} has {asked}")
    kept = getattr(launch.fn, "kwargs", {})  # of an interpreted kernel
    plain = getattr(launch.fn, "do_not_specialize", None) or kept.get("do_not_specialize") or ()
    constants = _constants(launch, plain)
    types: dict[str, str | tuple[str, ...]] = {}
    divisible = []
    for name, value in launch.arguments.items():
        if name in constants:
            continue
        parts = value if isinstance(value, tuple) else (value,)
        found = tuple("1" if type(part) is int and part == 1 else _type_of(part) for part in parts)
        types[name] = found if isinstance(value, tuple) else found[0]
        known = {_is_multiple(part) for part in parts if type(part) is not int or part != 1}
        if len(known) > 1:
            raise ValueError(f"{name}={value}: of a tuple all are multiples of 16, or none is; give other sizes")
        if known == {True} and name not in plain:
            divisible.append(name)
    return make_spec(
        launch.fn,
        variant=variant,
        dtype=dtype,
        arch=arch,
        tile=tile,
        types=types,
        constexprs=constants,
        divisible=tuple(divisible),
        meta=meta,
    )


def _constants(launch: Launch, plain: Sequence[str]) -> dict[str, Any]:
    parameters = inspect.signature(launch.fn.fn).parameters
    one = {name for name, value in launch.arguments.items() if type(value) is int and value == 1 and name not in plain}
    return {
        name: value
        for name, value in launch.arguments.items()
        if "constexpr" in str(parameters[name].annotation) or value is None or name in one
    }


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{'i64' if not value.is_floating_point() else dtype_name(value)}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{dtype_name(value.base)}[{','.join(map(str, value.block_shape))}]>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _is_multiple(value: Any) -> bool:
    """Of 16: bytes for pointers, which count from an aligned address, elements for ints."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
