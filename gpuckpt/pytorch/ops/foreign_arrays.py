"""The fused operations on arrays of other libraries: NumPy, CuPy and JAX in, the same library out, nothing copied on the way.

Arrays are shown to torch as tensors of the same memory (DLPack, `gpuckpt.memory.exchange`), and what torch computes is handed
back the same way; its memory belongs to torch's allocator. On a CUDA device everything runs on CuPy's current stream, or
on the device's default stream for JAX. Calling an operation on arrays records no gradient; `vjp` is the way to get one.

Not here: arrays of different libraries in one call, which is refused; bfloat16 in NumPy, which it does not have.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, get_args

import numpy as np
import torch
from torch import Tensor

from gpuckpt.checks import shown
from gpuckpt.errors import CheckpointError
from gpuckpt.memory.adapters.inspect import device_of, library_of
from gpuckpt.memory.dlpack import exchange

__all__ = ["accepts_arrays", "vjp"]

P = ParamSpec("P")


def accepts_arrays(operation: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """`operation`, for arrays as well as for tensors: what the first argument is decides. A `TypeError` names an argument of
    another kind than the annotations say."""

    @functools.wraps(operation)
    def on_either(*args: P.args, **options: P.kwargs) -> Any:
        if not args or isinstance(args[0], Tensor):
            try:
                return operation(*args, **options)
            except CheckpointError:
                raise
            except Exception as error:  # looked at afterwards: a call that is right pays nothing for it
                _check_kinds(operation, args, options, str(error) if isinstance(error, TypeError | ValueError) else "")
                raise
        if not _is_array(args[0]):
            _check_kinds(operation, args, options)
        library = _one_library(*args, *options.values())
        with torch.no_grad(), _stream_of(library, args[0]):
            tensors, named = [_tensor(a) for a in args], {name: _tensor(a) for name, a in options.items()}
            return _array(operation(*tensors, **named), library)

    return on_either


def _check_kinds(operation: Callable[..., Any], args: tuple, options: dict[str, Any], said: str = "") -> None:
    """Raise `TypeError` for the first argument that is not of its annotated kind, `ValueError` for a number beyond 64 bits. One
    that was named already in what was `said` is left at that."""
    signature = inspect.signature(operation, eval_str=True)
    for name, value in signature.bind(*args, **options).arguments.items():
        if re.search(rf"\b{name}\b", said):
            continue
        annotation = signature.parameters[name].annotation
        kinds = get_args(annotation) or (annotation,)
        meant = [each for kind in kinds for each in _NUMBERS.get(kind, (kind,))]
        if not isinstance(value, tuple(meant)) or isinstance(value, bool):
            expected = " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds)
            raise TypeError(f"{name} is {shown(value)} ({type(value).__name__}); expected {expected}") from None
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} is {shown(value)}; expected a number of 64 bits") from None


_WORDS = {type(None): "None", Tensor: "Tensor or array"}
_NUMBERS: dict[Any, tuple[type, ...]] = {
    int: (int, np.integer),
    float: (int, float, np.integer, np.floating),
}


def vjp(operation: Callable[..., Tensor], *arrays: Any, **options: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """The result of `operation(*arrays, **options)` and the function that takes its gradient back to the arrays.

    Args:
        operation: one of `gpuckpt.functional`.
        arrays: of one library, NumPy, CuPy, JAX or torch, in the operation's order; None where it takes None. Arrays of
            floating point are differentiated.
        options: the operation's own.

    Returns:
        (y, pull): y in that library; pull(dy) gives one gradient for each of `arrays`, None for those that have none. Until
        `pull` is gone it keeps `arrays` and nothing of hidden size; it can be called once.

    Raises:
        TypeError: arrays of different libraries.
        DLPackRefused: an array cannot be shown to torch without a copy.

    >>> import numpy as np
    >>> from gpuckpt.functional import linear, vjp
    >>> y, pull = vjp(linear, np.ones((2, 3)), np.ones((4, 3)), activation="relu")
    >>> dx, dw = pull(np.ones_like(y))
    >>> dx[0].tolist(), dw.shape
    ([4.0, 4.0, 4.0], (4, 3))
    """
    library = _one_library(*arrays)
    with torch.enable_grad(), _stream_of(library, arrays[0]):
        tensors = [_tensor(a) for a in arrays]
        wanted = [
            t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors
        ]
        y = operation(*wanted, **options)

    def pull(dy: Any) -> tuple[Any, ...]:
        _one_library(arrays[0], dy)
        with _stream_of(library, dy):
            leaves = [t for t in wanted if isinstance(t, Tensor) and t.requires_grad]
            found = iter(torch.autograd.grad(y, leaves, _tensor(dy)))
            return tuple(
                _array(next(found), library) if isinstance(t, Tensor) and t.requires_grad else None for t in wanted
            )

    return _array(y.detach(), library), pull


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__dlpack__")


def _one_library(*values: Any) -> str:
    libraries = {_library(value) for value in values if _is_array(value)}
    if len(libraries) != 1:
        found = " and ".join(sorted(libraries)) if libraries else "none"
        raise TypeError(
            f"expected arrays of one library, got {found}; gpuckpt.memory.dlpack.exchange shows one library's array to another"
        )
    return libraries.pop()


def _library(array: Any) -> str:
    library = library_of(array)
    return "jax" if library == "dlpack" and type(array).__module__.partition(".")[0] in ("jax", "jaxlib") else library


def _tensor(value: Any) -> Any:
    return exchange(value, "torch") if _is_array(value) else value


def _array(tensor: Tensor, library: str) -> Any:
    return exchange(tensor.contiguous(), library)


def _stream_of(library: str, array: Any) -> AbstractContextManager[Any]:
    """Torch's work goes where the arrays' own library would put it."""
    if library != "cupy":
        return contextlib.nullcontext()
    import cupy

    device = int(device_of(array, library).partition(":")[2])
    pointer = cupy.cuda.get_current_stream(device).ptr
    # Pointer 0 is the default stream, which torch does not accept as an external one.
    stream = torch.cuda.ExternalStream(pointer, device=device) if pointer else torch.cuda.default_stream(device)
    return torch.cuda.stream(stream)
