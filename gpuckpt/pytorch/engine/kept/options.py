"""Options of a stage between keeping all and its input only: outputs of some of its products are kept, the rest is recomputed.

Products (matrix multiplications, convolutions, attention, our fused operations) are where a block's seconds are, and what they
put out is a part of what autograd saves. `"attention-2"` keeps the outputs of the first two calls of attention, its statistics
included; `"narrow"` those of products that put out no more elements than their first operand has, too; `"products"` all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

from gpuckpt.pytorch.engine.kept.current import is_open
from gpuckpt.pytorch.engine.kept.operations import changed_by
from gpuckpt.pytorch.engine.kept.policy import NEVER, PREFER, Policy, can_be_kept
from gpuckpt.pytorch.engine.kept.record import Record
from gpuckpt.pytorch.engine.subclasses import parts_of

__all__ = ["OPTIONS", "ProductTrace", "is_option", "option_policy"]

_OURS = ("linear_fwd", "mlp_fwd", "gated_mlp_fwd")


def _is_product(op: OpOverload) -> bool:
    """Whether `op` multiplies matrices, and its output can be kept."""
    namespace, _, name = op._schema.name.partition("::")
    known = op._overloadpacket in flop_registry or _is_attention(op) or (namespace == "gpuckpt" and name in _OURS)
    return known and "backward" not in name and can_be_kept(op) is None


def _is_attention(op: OpOverload) -> bool:
    return "attention" in op._schema.name


def _is_narrow(op: OpOverload, output: Any, args: tuple) -> bool:
    if _is_attention(op):
        return True
    given = next((value for value in args if isinstance(value, torch.Tensor) and value.dim() > 1), None)
    return isinstance(output, torch.Tensor) and given is not None and output.numel() <= given.numel()


OPTIONS: Mapping[str, Callable[[OpOverload, Any, tuple], bool]] = {
    "attention": lambda op, output, args: _is_attention(op),
    "narrow": _is_narrow,
    "products": lambda op, output, args: True,
}
"""What each keeps of the products; each more than the one before it."""


def is_option(variant: str) -> bool:
    """Whether a plan's option is one of these, such as "products-6"."""
    name, _, count = variant.rpartition("-")
    return name in OPTIONS and count.isdecimal()


def option_policy(variant: str) -> Policy:
    """The policy of one run of a stage under an option: of the products that it chooses, the first are kept."""
    name, _, count = variant.rpartition("-")
    chooses, left = OPTIONS[name], int(count)

    def policy(op: OpOverload, output: Any, args: tuple, kwargs: Mapping[str, Any]) -> CheckpointPolicy:
        nonlocal left
        if left == 0 or not _is_product(op) or not chooses(op, output, args):
            return NEVER
        left -= 1
        return PREFER

    return policy


class _Product(NamedTuple):
    """A product that ran: the options that choose it, how much was saved before, and the storages of its outputs, with bytes."""

    chosen_by: frozenset[str]
    saved_before: int
    storages: list[tuple[StorageWeakRef, int]]


class ProductTrace(TorchDispatchMode):
    """Within the context, notes the products of work whose `record` is open, and holds nothing. `saved`: what autograd has saved
    of the work so far."""

    def __init__(self, record: Record, saved: Sized) -> None:
        super().__init__()
        self._record = record
        self._saved = saved
        self._products: list[_Product] = []
        self._changed: set[int] = set()  # addresses of storages of products that were changed in place later

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(op, OpOverload) or not is_open(self._record):
            return op(*args, **kwargs)
        if op._schema.is_mutable:
            known = {ref.cdata for product in self._products for ref, _ in product.storages}
            self._changed.update(known.intersection(storage._cdata for storage in changed_by(op, args, kwargs)))
        output = op(*args, **kwargs)
        if _is_product(op):
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            storages = [part.untyped_storage() for tensor in tensors for part in parts_of(tensor)]
            chosen_by = frozenset(name for name, chooses in OPTIONS.items() if chooses(op, output, args))
            held = [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]
            self._products.append(_Product(chosen_by, len(self._saved), held))
        return output

    def kept_by(self, name: str) -> tuple[str, list[tuple[StorageWeakRef, int]]]:
        """The option called `name` as a plan names it, and the storages that it keeps; "" where it keeps none."""
        chosen = [product for product in self._products if name in product.chosen_by]
        while chosen and chosen[-1].saved_before == len(self._saved):
            chosen.pop()  # a recompute ends before it
        kept = [product for product in chosen if self._changed.isdisjoint(ref.cdata for ref, _ in product.storages)]
        return (f"{name}-{len(chosen)}" if kept else ""), [pair for product in kept for pair in product.storages]
