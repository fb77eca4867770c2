"""What a step of a chain has to be able to do.

`Recomputable` is enough to drop an output and compute it again; `Differentiable` adds the backward; `Layer` adds parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from gpuckpt.checks import shown
from gpuckpt.segments.arrays import Array

__all__ = ["Differentiable", "Layer", "Recomputable", "require_backward", "require_forward", "require_forwards"]


@runtime_checkable
class Recomputable(Protocol):
    """A deterministic step: the same input gives the same output, bit for bit, as often as it is asked.

    >>> from gpuckpt.segments import LinearSegment
    >>> isinstance(LinearSegment([1.0, 2.0], 2, 1), Recomputable)
    True
    """

    def forward(self, input: Array, /) -> Array:
        """The output for `input`."""
        ...

    def input_memory_bytes(self, input: Array, /) -> int:
        """Bytes that keeping `input` takes."""
        ...


@runtime_checkable
class Differentiable(Protocol):
    """A deterministic step with a backward that needs the input alone.

    >>> from gpuckpt.segments import Dense
    >>> isinstance(Dense(2, 1), Differentiable), isinstance(abs, Differentiable)
    (True, False)
    """

    def forward(self, input: Array, /) -> Array:
        """The output for `input`."""
        ...

    def backward(self, input: Array, grad_output: Array, /) -> Array:
        """The gradient of `input`, of its shape; gradients of parameters are added to the step's own."""
        ...


@runtime_checkable
class Layer(Differentiable, Protocol):
    """A step with parameters. `backward` must be computable from `x` alone: nothing is kept between the two calls.

    A layer whose backward recomputes all it needs says so with `recomputes_in_backward = True`; where the attribute is
    missing or False, `CheckpointedLayer` runs `forward` again just before `backward`.

    >>> from gpuckpt.segments import Dense, LinearSegment
    >>> isinstance(Dense(2, 1), Layer), isinstance(LinearSegment([1.0, 2.0], 2, 1), Layer)
    (True, False)
    """

    def update(self, lr: float, /) -> None:
        """params -= lr * gradients; the gradients are used up and released."""
        ...

    @property
    def params(self) -> Sequence[Array]:
        """The parameters, in a fixed order."""
        ...

    @property
    def gradients(self) -> Sequence[Array]:
        """The gradients, in the order of `params`; empty where there are none."""
        ...

    def set_params(self, params: Sequence[Array], /) -> None:
        """Replace all parameters."""
        ...

    def set_gradients(self, gradients: Sequence[Array], /) -> None:
        """Replace all gradients; an empty sequence releases them."""
        ...

    def set_training(self, training: bool, /) -> None:
        """Switch between training and evaluation."""
        ...

    @property
    def is_training(self) -> bool:
        """Whether the layer is in training."""
        ...

    @property
    def layer_type(self) -> str:
        """The kind of layer, as "Dense"."""
        ...

    @property
    def parameter_count(self) -> int:
        """Elements of all parameters."""
        ...

    @property
    def layer_description(self) -> str:
        """One line that tells layers of one kind apart."""
        ...


def require_forward(step: Any, place: str) -> None:
    """Raise `TypeError` unless `step` has a `forward`."""
    if isinstance(step, type) or not callable(getattr(step, "forward", None)):
        raise TypeError(f"{place} is {shown(step)}; expected an object with forward(input)")


def require_forwards(steps: Iterable[Any], name: str) -> list[Any]:
    """The steps as a list. Raises `TypeError`, with the parameter's `name`, where one of them has no `forward`."""
    try:
        found = list(steps)
    except (TypeError, NotImplementedError):  # the second: a tensor without elements in memory
        raise TypeError(f"{name} is {shown(steps)}; expected a sequence of objects with forward(input)") from None
    for k, step in enumerate(found):
        require_forward(step, f"{name}[{k}]")
    return found


def require_backward(step: Any, place: str) -> None:
    """Raise `TypeError` unless `step` has a `backward`."""
    if not callable(getattr(step, "backward", None)):
        raise TypeError(
            f"{place} is a {type(step).__name__} without backward(input, grad_output); it can be recomputed but not "
            "differentiated"
        )
