"""What an optimizer keeps and moves for each parameter, by name.

Bytes are those of the tensors that the named implementation allocates, one by one: a device's allocator rounds each of them.

| name | implementation | state of a parameter of n elements of b bytes |
| --- | --- | --- |
| sgd | torch.optim.SGD | none |
| sgd-momentum | torch.optim.SGD(momentum=...) | n b |
| adamw | torch.optim.AdamW(fused=True) | 2 n b, and its step count (4 bytes) |
| adamw-foreach | torch.optim.AdamW, its default on CUDA | 2 n b; n b more, of all parameters at once, while it steps |
| adamw-master | mixed precision: weights in fp32 as well | 12 n |
| adamw-8bit | bitsandbytes.optim.AdamW8bit | 2 n and 8 bytes for 256 elements; 8 n below 4096 elements |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gpuckpt.checks import shown

__all__ = ["OPTIMIZERS", "OptimizerCosts", "optimizer_called"]


@dataclass(frozen=True)
class OptimizerCosts:
    """An optimizer by its bytes. Functions take the number of elements of a parameter and the bytes of one of them.

    Attributes:
        state: bytes of each tensor that it keeps on the device for the parameter.
        step_bytes: bytes that exist beyond those while it steps, for all parameters at once.
    """

    name: str
    what: str
    state: Callable[[int, int], Sequence[int]]
    step_bytes: Callable[[int, int], int] = lambda numel, item_bytes: 0

    def moved_bytes(self, numel: int, item_bytes: int) -> int:
        """Bytes that one step reads and writes: the gradient in, weights and state in and out, what is temporary out and in."""
        own = numel * item_bytes + sum(self.state(numel, item_bytes))
        return numel * item_bytes + 2 * own + 2 * self.step_bytes(numel, item_bytes)


def _eight_bits(numel: int, item_bytes: int) -> tuple[int, ...]:
    if numel < 4096:  # bitsandbytes' min_8bit_size: kept in fp32
        return (4 * numel, 4 * numel)
    scales = 4 * -(-numel // 256)
    return (numel, numel, scales, scales)


OPTIMIZERS: Mapping[str, OptimizerCosts] = MappingProxyType(
    {
        each.name: each
        for each in (
            OptimizerCosts("sgd", "torch.optim.SGD", lambda n, b: ()),
            OptimizerCosts("sgd-momentum", "torch.optim.SGD with momentum", lambda n, b: (n * b,)),
            OptimizerCosts("adamw", "torch.optim.AdamW(fused=True)", lambda n, b: (n * b, n * b, 4)),
            OptimizerCosts(
                "adamw-foreach",
                "torch.optim.AdamW as it comes",
                lambda n, b: (n * b, n * b),
                lambda n, b: n * b,
            ),
            OptimizerCosts(
                "adamw-master",
                "AdamW on fp32 copies of the weights, moments in fp32",
                lambda n, b: (4 * n, 4 * n, 4 * n),
            ),
            OptimizerCosts("adamw-8bit", "bitsandbytes.optim.AdamW8bit", _eight_bits),
        )
    }
)


def optimizer_called(name: str) -> OptimizerCosts:
    """The optimizer of that name. Raises `ValueError` with the known ones.

    >>> optimizer_called("adamw").state(1000, 2)
    (2000, 2000, 4)
    """
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise ValueError(f"optimizer {shown(name)} is not known; known are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]
