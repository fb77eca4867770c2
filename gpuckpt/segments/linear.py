"""Linear steps of a chain: `LinearSegment` (y = W x) and `Dense` (y = act(W x + b)), which is also a `Layer`.

Both keep nothing between forward and backward: `backward` takes the input and computes the pre-activation again, in the
fused Triton kernel where there is one (see `fused`). Inputs are single, (in_dim,), or batched, (..., in_dim).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpuckpt.checks import check_flag, check_int, check_number, shown
from gpuckpt.errors import DimMismatch
from gpuckpt.segments import lcg
from gpuckpt.segments.arrays import Array, as_array, check_last_dim, compat, like_array, matching, nbytes
from gpuckpt.segments.fused import linear_backward, linear_forward
from gpuckpt.segments.pointwise import check_activation

__all__ = ["Dense", "LinearSegment"]

_MOST = 2**30  # a product of two has a size in bytes that 64 bits can say


class _Affine:
    """act(W x + b) with gradients that add up over backward calls until `update` or `set_gradients`."""

    recomputes_in_backward = True

    def __init__(self, weights: Array, bias: Array | None, activation: str) -> None:
        self.weights = weights
        self.bias = bias
        self.activation = activation
        self.out_dim, self.in_dim = (int(n) for n in weights.shape)
        self._gradients: list[Array] = []

    def forward(self, x: Array) -> Array:
        """act(W x + b), shape (..., out_dim). x: (..., in_dim), of the weights' library and device.

        Raises `DimMismatch` for another last dimension, `TypeError` for another library or device.
        """
        x = self._input(x)
        y = linear_forward(self._rows(x), self.weights, self.bias, self.activation)
        return self._reshape(y, (*x.shape[:-1], self.out_dim))

    def backward(self, x: Array, grad_output: Array) -> Array:
        """The gradient of x, of its shape; gradients of the parameters are added to `gradients`.

        grad_output: (..., out_dim), with the leading dimensions of x; `DimMismatch` otherwise.
        """
        x = self._input(x)
        grad = matching(grad_output, self.weights, "the gradient")
        check_last_dim(grad, self.out_dim, "last dimension of the gradient")
        if grad.shape[:-1] != x.shape[:-1]:
            raise DimMismatch(math.prod(x.shape[:-1]), math.prod(grad.shape[:-1]), "batch of the gradient")
        dx, dweights, dbias = linear_backward(self._rows(x), self.weights, self.bias, self._rows(grad), self.activation)
        new = [dweights] if dbias is None else [dweights, dbias]
        self._gradients = [a + b for a, b in zip(self._gradients, new, strict=True)] if self._gradients else new
        return self._reshape(dx, x.shape)

    def input_memory_bytes(self, x: Array) -> int:
        """Bytes that keeping `x` takes."""
        return nbytes(as_array(x))

    def output_memory_bytes(self, x: Array) -> int:
        """Bytes of the output for `x`, without computing it."""
        return nbytes(as_array(x)) // self.in_dim * self.out_dim

    def update(self, lr: float) -> None:
        """params -= lr * gradients, written into the parameters' own memory; the gradients are released."""
        lr = check_number(lr, "lr", -math.inf)
        for param, grad in zip(self.params, self._gradients, strict=False):
            param -= lr * grad
        self._gradients = []

    @property
    def params(self) -> list[Array]:
        """Weights (out_dim, in_dim), and the bias (out_dim,) where there is one."""
        return [self.weights] if self.bias is None else [self.weights, self.bias]

    @property
    def gradients(self) -> list[Array]:
        """Gradients in the order of `params`; empty before the first backward and after an update."""
        return list(self._gradients)

    @property
    def parameter_count(self) -> int:
        """Elements of weights and bias."""
        return self.out_dim * (self.in_dim + (self.bias is not None))

    def set_params(self, params: Sequence[Array]) -> None:
        """Replace the parameters; they come in the order and the shapes of `params`."""
        new = self._checked(_listed(params, "parameters"), "parameters")
        self.weights = new[0]
        if self.bias is not None:
            self.bias = new[1]

    def set_gradients(self, gradients: Sequence[Array]) -> None:
        """Replace the gradients; an empty sequence releases them."""
        new = _listed(gradients, "gradients")
        self._gradients = self._checked(new, "gradients") if new else []

    def _checked(self, arrays: list[Array], what: str) -> list[Array]:
        if len(arrays) != len(self.params):
            raise DimMismatch(len(self.params), len(arrays), f"number of {what}")
        new = [as_array(a, what) for a in arrays]
        for own, other in zip(self.params, new, strict=True):
            if tuple(own.shape) != tuple(other.shape):
                raise DimMismatch(math.prod(own.shape), math.prod(other.shape), f"size of one of the {what}")
        return new

    def _input(self, x: Array) -> Array:
        array = matching(x, self.weights, "the input")
        check_last_dim(array, self.in_dim, "last dimension of the input")
        return array

    @staticmethod
    def _rows(x: Array) -> Array:
        return x if x.ndim == 2 else _Affine._reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))

    @staticmethod
    def _reshape(x: Array, shape: tuple[int, ...]) -> Array:
        return x if tuple(x.shape) == tuple(shape) else compat.array_namespace(x).reshape(x, tuple(shape))


class LinearSegment(_Affine):
    """y = W x.

    weights: out_dim * in_dim numbers, row-major: a flat list or array, or one of shape (out_dim, in_dim). Arrays are used
    as they are, so that their owner sees an update. Raises `DimMismatch` for any other number of weights.

    >>> LinearSegment([1.0, 2.0, 3.0, 4.0], in_dim=2, out_dim=2).forward([1.0, 1.0]).tolist()
    [3.0, 7.0]
    """

    def __init__(self, weights: Any, in_dim: int, out_dim: int, name: str = "") -> None:
        array = as_array(weights, "weights")
        in_dim, out_dim = _checked_dims(in_dim, out_dim)
        if math.prod(array.shape) != in_dim * out_dim:
            raise DimMismatch(in_dim * out_dim, math.prod(array.shape), "number of weights (in_dim * out_dim)")
        if array.ndim > 1 and tuple(array.shape) != (out_dim, in_dim):
            raise DimMismatch(out_dim, int(array.shape[0]), "rows of the weights (out_dim)")
        super().__init__(self._reshape(array, (out_dim, in_dim)), None, "identity")
        self.name = name

    @classmethod
    def random_init(
        cls, in_dim: int, out_dim: int, seed: int, *, name: str = "", like: Array | None = None
    ) -> LinearSegment:
        """Weights in [-limit, limit], limit = sqrt(6 / (in_dim + out_dim)), from the 64-bit LCG of `lcg`.

        like: an array whose library, device and floating dtype the weights take; float32 NumPy without it.
        """
        in_dim, out_dim = _checked_dims(in_dim, out_dim)
        return cls(like_array(lcg.scaled_uniform(seed, in_dim, out_dim), like), in_dim, out_dim, name)

    @classmethod
    def init_lcg(cls, name: str, in_dim: int, out_dim: int, seed: int, *, like: Array | None = None) -> LinearSegment:
        """Weights in [0, 1] from the same LCG; `like` as in `random_init`."""
        in_dim, out_dim = _checked_dims(in_dim, out_dim)
        return cls(like_array(lcg.unit_uniform(seed, in_dim, out_dim), like), in_dim, out_dim, name)

    def __repr__(self) -> str:
        return f"LinearSegment({self.in_dim} -> {self.out_dim}, {self.name!r})"


class Dense(_Affine):
    """A `Layer`: y = act(W x + b), W (out_dim, in_dim), b (out_dim,).

    activation: identity, relu, relu2, gelu_tanh, silu, sigmoid or tanh. seed: weights as `LinearSegment.random_init` gives
    them, bias 0. like: as there. Raises `ValueError` for an unknown activation or dimensions below 1.

    >>> layer = Dense(4, 8, "tanh", seed=1)
    >>> layer.forward([[1.0, 2.0, 3.0, 4.0]]).shape, layer.parameter_count
    ((1, 8), 40)
    """

    layer_type = "Dense"

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        activation: str = "identity",
        *,
        bias: bool = True,
        seed: int = 0,
        like: Array | None = None,
    ) -> None:
        in_dim, out_dim = _checked_dims(in_dim, out_dim)
        check_activation(activation)
        check_flag(bias, "bias")
        weights = like_array(lcg.scaled_uniform(seed, in_dim, out_dim), like)
        zeros = compat.array_namespace(weights).zeros(out_dim, dtype=weights.dtype, device=compat.device(weights))
        super().__init__(weights, zeros if bias else None, activation)
        self._training = True

    def set_training(self, training: bool) -> None:
        """Switch between training and evaluation; the arithmetic is the same in both."""
        check_flag(training, "training")
        self._training = training

    @property
    def is_training(self) -> bool:
        """Whether the layer is in training."""
        return self._training

    @property
    def layer_description(self) -> str:
        """As "Dense(4 -> 8, tanh)"."""
        return f"Dense({self.in_dim} -> {self.out_dim}, {self.activation})"

    def __repr__(self) -> str:
        return self.layer_description


def _listed(arrays: Sequence[Array], what: str) -> list[Array]:
    try:
        return list(arrays)
    except (TypeError, NotImplementedError):  # the second: a tensor without elements in memory
        raise TypeError(f"{what}: expected a sequence of arrays, got {shown(arrays)}") from None


def _checked_dims(in_dim: int, out_dim: int) -> tuple[int, int]:
    in_dim, out_dim = check_int(in_dim, "in_dim", None, _MOST), check_int(out_dim, "out_dim", None, _MOST)
    if in_dim < 1 or out_dim < 1:
        raise ValueError(
            f"a layer needs dimensions of at least 1; got {shown(in_dim)} -> {shown(out_dim)} for in_dim and out_dim"
        )
    return in_dim, out_dim
