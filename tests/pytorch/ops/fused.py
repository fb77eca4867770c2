"""The fused operations under test, beside the same formulas in plain torch, and the tools to look at them.

Shapes: x (M, K), hidden H, out N.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from gpuckpt import functional

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Op:
    """run(*operands, **options) is ours, plain(*operands, activation) autograd's; shapes(M, K, H, N) those of the operands."""

    name: str
    names: tuple[str, ...]
    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: Callable[[int, int, int, int], tuple[tuple[int, ...], ...]]

    def draw(self, M=5, K=7, H=6, N=4, *, dtype=torch.float64, bias=True, seed=0) -> list[Tensor | None]:
        """Operands that need gradients, of a scale that keeps values near 1; biases None where `bias` is false."""
        g = torch.Generator().manual_seed(seed)
        operands: list[Tensor | None] = []
        for name, shape in zip(self.names, self.shapes(M, K, H, N), strict=True):
            if name.startswith("b") and not bias:
                operands.append(None)
                continue
            scale = max(shape[-1], 1) ** -0.5 if name.startswith("w") else 1.0
            operands.append((torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_())
        return operands


def _mlp(x, w1, b1, w2, b2, **options):
    return functional.mlp(x, w1, w2, b1, b2, **options)


def _gated(x, wg, bg, wu, bu, wd, bd, **options):
    return functional.gated_mlp(x, wg, wu, wd, bg, bu, bd, **options)


def _plain_gated(x, wg, bg, wu, bu, wd, bd, activation, gate_multiplier=1.0, down_multiplier=1.0):
    h = ACTS[activation](F.linear(x, wg, bg) * gate_multiplier) * F.linear(x, wu, bu)
    return F.linear(h, wd, bd) * down_multiplier


OPS = {
    "linear": Op(
        "linear",
        ("x", "w", "b"),
        functional.linear,
        lambda x, w, b, activation: ACTS[activation](F.linear(x, w, b)),
        lambda M, K, H, N: ((M, K), (N, K), (N,)),
    ),
    "mlp": Op(
        "mlp",
        ("x", "w1", "b1", "w2", "b2"),
        _mlp,
        lambda x, w1, b1, w2, b2, activation: F.linear(ACTS[activation](F.linear(x, w1, b1)), w2, b2),
        lambda M, K, H, N: ((M, K), (H, K), (H,), (N, H), (N,)),
    ),
    "gated_mlp": Op(
        "gated_mlp",
        ("x", "wg", "bg", "wu", "bu", "wd", "bd"),
        _gated,
        _plain_gated,
        lambda M, K, H, N: ((M, K), (H, K), (H,), (H, K), (H,), (N, H), (N,)),
    ),
}


def _target(x, w):
    return (torch.arange(x.shape[:-1].numel()) % w.shape[0]).reshape(x.shape[:-1])


def _loss(x, w, b, activation="identity", **options):
    return functional.linear_cross_entropy(x, w, _target(x, w), b, reduction="none", **options)


def _plain_loss(x, w, b, activation="identity"):
    logits = F.linear(x, w, b)
    logits = logits.float() if x.dtype.itemsize == 2 else logits
    return F.cross_entropy(logits, _target(x, w), reduction="none")


ALL_OPS = OPS | {
    "linear_cross_entropy": Op(
        "linear_cross_entropy",
        ("x", "w", "b"),
        _loss,
        _plain_loss,
        lambda M, K, H, N: ((M, K), (N, K), (N,)),
    )
}
"""Those that take an activation, and the loss: what holds for one of them holds for all."""


def gradients(fn: Callable[..., Tensor], operands: Sequence[Tensor | None], dy: Tensor, **options: Any) -> list[Tensor]:
    """[y, *gradients of those operands that want one]."""
    y = fn(*operands, **options)
    wanted = [t for t in operands if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def assert_as_good_as_torch(got: Iterable[Tensor], truth: Iterable[Tensor], torchs: Iterable[Tensor]) -> None:
    """max |got - truth| < 2 max |torchs - truth| + 1e-6 for each; truth in float64, torchs what torch computes in got's dtype."""
    for index, (g, t, own) in enumerate(zip(got, truth, torchs, strict=True)):
        assert t.dtype == torch.float64
        assert g.shape == t.shape
        assert g.dtype == own.dtype
        if g.numel():
            error, bound = (g.double() - t).abs().max().item(), 2 * (own.double() - t).abs().max().item() + 1e-6
            assert error < bound, f"result {index}: error {error:.3g}, bound {bound:.3g}"


class Inside(TorchDispatchMode):
    """Sees every operation, those inside our own ones too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("gpuckpt::"):
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        self.seen(name.removeprefix("aten::"), (args, kwargs), out)
        return out

    def seen(self, name: str, given: Any, out: Any) -> None:
        raise NotImplementedError


class Counter(Inside):
    """How many GEMMs were run."""

    def __init__(self) -> None:
        super().__init__()
        self.gemms = 0

    def seen(self, name: str, given: Any, out: Any) -> None:
        self.gemms += name in ("mm", "addmm", "addmm_", "linear")


class LiveBytes(Inside):
    """Bytes of the storages that operations inside the mode made and that are still alive; their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, int] = {}

    def seen(self, name: str, given: Any, out: Any) -> None:
        old = {t.untyped_storage()._cdata for t in tensors_in(given)}
        for t in tensors_in(out):
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in old and key not in self._known and not t.is_meta:
                self._known[key] = storage.nbytes()
                self.live_bytes += storage.nbytes()
                weakref.finalize(storage, self._dead, key)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _dead(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key)


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [t for branch in tree for t in tensors_in(branch)]
