"""From a launcher's operands to the GPU: what one launch is, worked out once and then repeated.

A launcher checks its operands, chooses a tile, decides on descriptors and has Triton specialise the kernel. All of that depends
on shapes, strides, dtypes, devices, alignment and options alone, so for operands like earlier ones the earlier
`PreparedLaunch` is taken and its compiled kernel called directly, which costs about a fifth.

Triton's specialisation (`JITFunction.run`) sees of a tensor its dtype and whether its address is a multiple of 16, of an int its
value, of a descriptor dtype and block: all of them are part of the key. Numbers that change from launch to launch (a seed) are
named in `do_not_specialize`; Triton then sees whether they fit 32 bits, and so does the key. `M` is named there too: a batch of
another size is prepared anew, and has the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from .arguments import descriptor
from .hardware import on_device
from .tiles import has_tuned

__all__ = ["PreparedLaunch", "launch", "once"]

Block = tuple[int, int]

_MOST = 4096
"""Results that are kept, some 2 KB each; batches of ever new sizes would add one each."""
_MISSING = object()
_found: dict[tuple[Any, ...], Any] = {}


class PreparedLaunch:
    """One launch of a kernel: `kernel[grid](*tensors, *sizes, *numbers, **constants)`.

    blocks: rows and columns of the descriptors through which the kernel loads its first tensors; () where it takes pointers.
    sizes: ints and tuples of strides. constants: the kernel's own, then Triton's options.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        sizes: tuple[Any, ...],
        constants: dict[str, Any],
        blocks: Sequence[Block] = (),
    ) -> None:
        self.kernel = kernel
        self.constants = constants
        self.compiled: CompiledKernel | None = None
        self._grid = grid
        self._blocks = blocks
        self._sizes = sizes
        self._descriptors: list[dict[str, Any]] = []
        self._rest: tuple[Any, ...] = ()
        self._run: Callable[..., Any] | None = None

    def arguments(self, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> list[Any]:
        """The kernel's arguments in its order, without the constants."""
        described = [descriptor(t, *block) for t, block in zip(tensors, self._blocks, strict=False) if t is not None]
        return [*described, *tensors[len(described) :], *self._sizes, *numbers]

    def run(self, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        """Launch on the current device."""
        if self._run is not None:
            ready = [_like(known, t) for known, t in zip(self._descriptors, tensors, strict=False)]
            self._run(*ready, *tensors[len(ready) :], *self._sizes, *numbers, *self._rest)
            return
        arguments = self.arguments(tensors, numbers)
        compiled = self.kernel[self._grid](*arguments, **self.constants)
        if isinstance(compiled, CompiledKernel):
            # Not the descriptors: they would keep the tensors.
            known = arguments[: len(self._blocks)]
            self._descriptors = [{k: v for k, v in vars(d).items() if k != "base"} for d in known]
            self._rest = tuple(self.constants[name] for name in self.kernel.arg_names[len(arguments) :])
            self.compiled = compiled
            self._run = compiled[(*self._grid, 1, 1)[:3]]


def launch(
    prepare: Callable[..., PreparedLaunch | None],
    tensors: Sequence[Tensor | None],
    options: tuple[Any, ...] = (),
    numbers: tuple[float, ...] = (),
) -> None:
    """Run what `prepare(*tensors, *options)` makes for such tensors; nothing where that is None. tensors: in the kernel's order,
    the first on the device to launch on. numbers: arguments that the preparation does not depend on."""
    wide = tuple(number > 0x7FFFFFFF for number in numbers)
    made = once(prepare, tensors, options, wide)
    if made is not None:
        assert tensors[0] is not None
        with on_device(tensors[0]):
            made.run(tensors, numbers)


def once(
    make: Callable[..., Any], tensors: Sequence[Tensor | None], options: tuple[Any, ...] = (), extra: Any = None
) -> Any:
    """What `make(*tensors, *options)` returned for tensors of the same shapes, strides, dtypes, devices and alignment to 16
    bytes, and equal options. Tensors need memory. An error is raised anew each time."""
    layouts = [None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in tensors]
    key = (make, options, extra, has_tuned(), *layouts)
    found = _found.get(key, _MISSING)
    if found is _MISSING:
        found = make(*tensors, *options)
        if len(_found) >= _MOST:
            _found.clear()
        _found[key] = found
    return found


def _like(known: dict[str, Any], t: Tensor | None) -> TensorDescriptor:
    """A descriptor of t like an earlier one, whose checks have been made."""
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(known, base=t)
    return found
