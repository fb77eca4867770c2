"""What time is measured by: real seconds, or those that a roofline says.

Without running every operator takes as long as the roofline of a named device says:

    seconds of an operator = max(flops / peak flops per second, bytes in and out / memory bandwidth)

Flops come from torch's own formulas (`torch.utils.flop_counter`), and for gpuckpt's fused operators from the GEMMs they are
made of. It is a bound from below for each operator, and knows neither launches nor overlap nor caches: good for comparing
stages with each other, which is all that a plan needs.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from gpuckpt.kernels.audit.roofline import Device

__all__ = ["Clock", "Roofline", "WallClock", "flops_of"]


class Clock(Protocol):
    """Seconds that have gone by, by whatever counts them. `exact`: the same work always takes the same."""

    exact: bool

    def now(self) -> float: ...


class WallClock:
    """Real seconds, the devices' work included."""

    exact = False

    def now(self) -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


_aten = torch.ops.aten
# Weights that our fused backwards multiply by a third time, because they recompute instead of remembering.
_RECOMPUTED = {
    "gpuckpt::linear_bwd": ("weight",),
    "gpuckpt::mlp_bwd": ("w1",),
    "gpuckpt::gated_mlp_bwd": ("wg", "wu"),
    "gpuckpt::linear_cross_entropy_bwd": ("weight",),
}
_NOTHING_MOVED = ("aten::empty", "aten::empty_strided")
_WEIGHTS = ("weight", "w1", "w2", "wg", "wu", "wd")


class Roofline(TorchDispatchMode):
    """Within the context operators advance a clock by what they would take on `device`."""

    exact = True

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.flops = 0
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func._schema.name in _NOTHING_MOVED:
            return out
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not made:  # a question, such as which device a tensor is on
            return out
        flops = flops_of(func, args, kwargs, out)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        moved_bytes = sum(map(_bytes, given)) + sum(map(_bytes, made))
        # The largest operand's: a fused loss is given the gradient of its mean first, one float32.
        rate = self._flops_per_s(max(given, key=torch.Tensor.numel).dtype) if given else 1.0
        self.flops += flops
        self.seconds += max(flops / rate, moved_bytes / self.device.bytes_per_s)
        return out

    def _flops_per_s(self, dtype: torch.dtype) -> float:
        rates = self.device.flops_per_s
        if dtype in (torch.bfloat16, torch.float16):
            return rates["bf16"]
        if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
            return rates["tf32"]
        return rates["fp32"]


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes to read or write; a dimension that is repeated is read once."""
    if tensor.layout is not torch.strided:
        return tensor.numel() * tensor.element_size()
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size() if tensor.numel() else 0


def flops_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """Floating point operations of one call of an operator."""
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    name = func._schema.name
    if not name.startswith("gpuckpt::"):
        return 0
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    weights = {key: given[key] for key in _WEIGHTS if isinstance(given.get(key), torch.Tensor)}
    rows = given["x"] if isinstance(given.get("x"), torch.Tensor) else given["dy"]
    height = rows.numel() // max(1, rows.shape[-1])
    gemms = dict.fromkeys(weights, 2 if name.endswith("_bwd") else 1)
    for key in _RECOMPUTED.get(name, ()):
        gemms[key] += given.get("activation") != "identity"
    return sum(2 * height * weights[key].numel() * count for key, count in gemms.items())
