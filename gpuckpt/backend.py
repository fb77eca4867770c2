"""Which back end runs an operation: Triton's kernels or plain array code.

By default the device decides: Triton on CUDA, plain code elsewhere and for float64, which no kernel takes. Matrix products of
float32 are cuBLAS's on CUDA as well: a kernel of ours would have to do without tensor cores to keep torch's precision, and is two
to three times slower there; what follows the product is done in place. `torch.set_float32_matmul_precision` holds as elsewhere.
`GPUCKPT_BACKEND=triton|torch` overrides it for the whole process; `triton` on CPU tensors runs the real kernels in Triton's
interpreter, which is slow and exact and meant for tests. The variable is read at every call, so a test may set it, but Triton
itself decides at its import whether it interprets, and torch imports it when the first operation runs: where `triton` is
asked for and there is no GPU, the choice is made here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gpuckpt.errors import BackendUnavailable

if TYPE_CHECKING:
    import torch

__all__ = ["BACKENDS", "backend_named", "load_kernels", "multiply_by_triton", "use_triton"]

BACKENDS = ("triton", "torch")


def backend_named() -> str | None:
    """What `GPUCKPT_BACKEND` asks for, None where it is not set. Raises `ValueError` for an unknown back end."""
    choice = os.environ.get("GPUCKPT_BACKEND", "")
    if choice and choice not in BACKENDS:
        raise ValueError(
            f"GPUCKPT_BACKEND={choice!r}: expected one of {', '.join(BACKENDS)}, or unset to choose by device"
        )
    return choice or None


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` run on the Triton kernels. Raises `ValueError` for an unknown `GPUCKPT_BACKEND`."""
    choice = backend_named()
    return tensor.is_cuda and tensor.element_size() <= 4 if choice is None else choice == "triton"


def multiply_by_triton(tensor: torch.Tensor) -> bool:
    """Whether matrix products of `tensor`, and what is fused into them, run on the Triton kernels."""
    return use_triton(tensor) and (tensor.element_size() < 4 or backend_named() is not None)


def load_kernels(tensor: torch.Tensor) -> None:
    """Make sure that the Triton kernels can run on `tensor`; call before importing from `gpuckpt.kernels`.

    Raises `BackendUnavailable` without Triton, or on a CPU tensor where Triton was imported without its interpreter, or with one
    that does not work with this NumPy.
    """
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailable(
            "the Triton kernels need the package `triton` (Linux): pip install triton, or set GPUCKPT_BACKEND=torch"
        ) from error
    # Triton's own functions show what it chose at its import; its knob would show the variable as it is now.
    if tensor.is_cuda:
        return
    if isinstance(triton.language.cdiv, triton.JITFunction):
        raise BackendUnavailable(
            "GPUCKPT_BACKEND=triton on a CPU tensor needs Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        )

    if triton.__version__.startswith("3.6.") and _numpy_takes_no_length_one():
        raise BackendUnavailable(
            f"the interpreter of Triton {triton.__version__} takes int() of arrays, which NumPy 2.4 and newer refuse: install "
            "triton>=3.7, or numpy<2.4"
        )


def _numpy_takes_no_length_one() -> bool:
    import numpy

    major, minor = numpy.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 4)


def _choose_interpreter() -> None:
    if os.environ.get("GPUCKPT_BACKEND") == "triton" and "TRITON_INTERPRET" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"


_choose_interpreter()
