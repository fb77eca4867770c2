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
from collections.abc import Iterator, Mapping
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


class _Recorder:
    """Stands where a kernel does: `recorder[grid](...)` keeps the launch."""

    def __init__(self, fn: Any, kept: list[Launch]) -> None:
        self.fn = fn
        self.kept = kept

    def __getitem__(self, grid: Any) -> Any:
        return self._keep

    def _keep(self, *args: Any, **named: Any) -> None:
        given = dict(zip(self.fn.arg_names, args, strict=False)) | named
        options = {name: given.pop(name) for name in _OPTIONS if name in given}
        self.kept.append(Launch(self.fn, given, options))


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """The launches that the operations' launchers would make on `arch` within the context. For the whole process: no kernel can
    run in another thread meanwhile."""
    kept: list[Launch] = []
    with contextlib.ExitStack() as patches:
        for module in _MODULES:
            stand_ins = {"arch_of": lambda t: arch, "INTERPRETED": False}
            stand_ins |= {name: _Recorder(fn, kept) for name, fn in vars(module).items() if name.endswith("_kernel")}
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
    constants = _constants(launch)
    kept = getattr(launch.fn, "kwargs", {})  # of an interpreted kernel
    plain = getattr(launch.fn, "do_not_specialize", None) or kept.get("do_not_specialize") or ()
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


def _constants(launch: Launch) -> dict[str, Any]:
    parameters = inspect.signature(launch.fn.fn).parameters
    return {
        name: value
        for name, value in launch.arguments.items()
        if "constexpr" in str(parameters[name].annotation) or value is None or (type(value) is int and value == 1)
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
