"""Whether a fused module may compute with its projections' parameters, or has to call them.

A fused module takes weight and bias from its projections and computes without calling them. That is right as long as a
projection is a plain `nn.Linear`. It is not where the projection was replaced (LoRA, quantisation), hooked, parametrised
or given another forward: all of that happens in the call.
"""

from __future__ import annotations

from typing import Any

import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.module_tracker import ModuleTracker

from gpuckpt.pytorch.ops.norm import Norm

__all__ = ["calls_nothing_else", "is_hooked", "is_linear", "is_plain", "linear_weight", "normed"]

_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.LayerNorm, nn.RMSNorm)}


def is_plain(*modules: nn.Module | None) -> bool:
    """Whether calling each of `modules` does what torch's nn.Linear, nn.LayerNorm or nn.RMSNorm does, or what transformers'
    Conv1D does, and nothing besides."""
    if not calls_nothing_else():
        return False
    for module in modules:
        if module is None:
            continue
        kind = type(module)
        if not _is_conv1d(kind) and (kind not in _FORWARDS or kind.forward is not _FORWARDS[kind]):
            return False
        if "forward" in module.__dict__:
            return False
        if is_hooked(module):
            return False
        if module._compiled_call_impl is not None:  # module.compile(), or whoever else takes torch's slot for a call
            return False
        # The weights of DTensor and torchao: they know torch's own operators, and not ours.
        if module.weight is not None and is_traceable_wrapper_subclass(module.weight):
            return False
    return True


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook is registered on a module."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer that a fused operation can compute with: torch's, or transformers' Conv1D."""
    return type(module) is nn.Linear or _is_conv1d(type(module))


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, (outputs, inputs): of a Conv1D, which keeps it the other way round, a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if _is_conv1d(type(module)) else weight


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def normed(x: Tensor, norm: nn.Module | None) -> tuple[Tensor, Norm | None]:
    """What a fused operation is given for norm(x): x and the norm, or norm(x) alone where the norm has to be called."""
    if norm is None:
        return x, None
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm) and is_plain(norm):
        return x, Norm.of(norm)
    return norm(x), None


def calls_nothing_else() -> bool:
    """Whether no hook is registered for all modules at once. The tracker of torch's FlopCounterMode only notes names."""
    return not any(
        not _is_tracker(hook)
        for hooks in (
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
            torch_module._global_backward_hooks,
            torch_module._global_backward_pre_hooks,
        )
        for hook in hooks.values()
    )


def _is_tracker(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), ModuleTracker)
