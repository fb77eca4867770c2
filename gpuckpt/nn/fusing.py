"""`fuse(model)`: the MLPs of a model, as its library wrote them, compute by the fused operations and keep only their input.

A module is a candidate where it has projections under names that transformers uses, and is fused only where it computes what a
fused operation computes. That is tried, not assumed: its class's own `forward` runs on a few rows, with small projections in
place of its own, and values and gradients in float64 are compared with the operation's formula under each activation. So
activations need no names, and a module that does something else (a sparse activation, a multiplier) is left as it is.

A fused module stays the same object of the same class with the same parameters; `forward` is set on it. Where a projection is
more than a plain linear layer when it is called (LoRA, a hook, quantised, sharded), or the activation was replaced or hooked,
the class's own `forward` runs.

Shapes: x (..., K), hidden H, y (..., N).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gpuckpt.checks import check_flag, shown
from gpuckpt.nn.fusing_loss import fuse_loss, models_with_a_loss
from gpuckpt.pytorch.ops._activations import FUNCTIONS
from gpuckpt.pytorch.ops._projections import is_hooked, is_linear, is_plain, linear_weight
from gpuckpt.pytorch.ops.gated_mlp import gated_mlp
from gpuckpt.pytorch.ops.mlp import mlp

__all__ = ["Fusion", "fuse"]

_ROWS, _WIDTH, _HIDDEN = 24, 5, 6  # of a trial
_TOLERANCE = 1e-9  # in float64; GELU and its tanh form are 1e-3 apart


@dataclass(frozen=True)
class Fusion:
    """What `fuse` did. `fused`: by module name, the operation and activation that it computes by. `left`: modules that have an
    MLP's projections, or heads, that run as they did, and why."""

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        left = [f"{name}: left as it is: {why}" for name, why in self.left.items()]
        return "\n".join([*(f"{name}: {how}" for name, how in self.fused.items()), *left])


def fuse(model: nn.Module, *, loss: bool = False) -> Fusion:
    """Let the MLPs in `model` compute by `gpuckpt.functional.mlp` and `gated_mlp`, which keep their input only.

    Taken are those of Llama, Mistral, Qwen and Gemma (`gate_proj`, `up_proj`, `down_proj`), Phi-3 (`gate_up_proj`, `down_proj`),
    Phi (`fc1`, `fc2`), GPT-NeoX and GPT-2 (transformers' `Conv1D`), and whatever else has these projections and computes the
    same. Parameters, keys of the `state_dict`, classes and hooks stay as they are. Adapters may be put on afterwards: a module
    with one on a projection runs as its library wrote it. Experts of a mixture that are not such modules stay as they are.

    With `loss=True` also the heads of transformers' causal language models with their loss, by
    `gpuckpt.functional.linear_cross_entropy`: while a model trains and is given labels, logits are formed a chunk of rows at a
    time, and what it returns has none (`logits` is None). Evaluation, generation, calls without labels, with `logits_to_keep` or
    `return_dict=False` form them as ever, and so does a head that an adapter, a hook or a shard was put on.

    Values and gradients differ from the unfused model's in their last bits, within the fused operations' bounds. Call it before
    `fit`. Fusing once more changes nothing; `del module.forward` undoes it for a module.

    Returns a `Fusion`, which says what was fused, and what was left as it is and why.

    >>> class MLP(nn.Module):
    ...     def __init__(self, act):
    ...         super().__init__()
    ...         self.fc1, self.fc2, self.act = nn.Linear(8, 32), nn.Linear(32, 8), act
    ...     def forward(self, x):
    ...         return self.fc2(self.act(self.fc1(x)))
    >>> print(fuse(nn.Sequential(MLP(nn.GELU()), MLP(nn.Mish()))))
    0: mlp, gelu
    1: left as it is: MLP with Mish computes neither mlp nor gated_mlp with a known activation
    """
    check_flag(loss, "loss")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {shown(model)}; expected an nn.Module")
    fusion = Fusion()
    for name, module in model.named_modules():
        form = next((form for form in _FORMS if all(part in module._modules for part in form.parts)), None)
        if form is None:
            continue
        if "forward" in module.__dict__:
            before = module.__dict__["forward"]
            if isinstance(before, FusedForward):
                fusion.fused[name] = f"{before.form.operation}, {before.activation}"
            else:
                fusion.left[name] = f"its forward was replaced already, by {before!r}"
            continue
        why, activation = _reason_against(module, form), None
        if why is None and (activation := _activation_of(module, form)) is None:
            others = ", ".join(type(part).__name__ for part in form.others(module).values()) or "no other module"
            why = f"{type(module).__name__} with {others} computes neither mlp nor gated_mlp with a known activation"
        if activation is None:
            fusion.left[name] = str(why)
            continue
        module.forward = FusedForward(module, form, activation)
        fusion.fused[name] = f"{form.operation}, {activation}"
    for name, owner in models_with_a_loss(model) if loss else ():
        head, how, why = fuse_loss(owner)
        path = f"{name}.{head}" if name else head
        if how is not None:
            fusion.fused[path] = how
        else:
            fusion.left[path] = str(why)
    return fusion


def _reason_against(module: nn.Module, form: _MLPForm) -> str | None:
    for part in form.parts:
        if not is_linear(module._modules[part]):
            return f"{part} is a {type(module._modules[part]).__name__}"
    hooked = [key for key, part in form.others(module).items() if is_hooked(part)]
    return f"{hooked[0]} has a hook" if hooked else None


class FusedForward:
    """The `forward` of a fused module. An object of its own, so that copies and pickles of the module carry one of theirs."""

    def __init__(self, module: nn.Module, form: _MLPForm, activation: str) -> None:
        self.module = module
        self.form = form
        self.activation = activation
        self.others = form.others(module)

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        projections = [module._modules[part] for part in self.form.parts]
        others = [(module._modules.get(key), part) for key, part in self.others.items()]
        if not is_plain(*projections) or any(now is not then or is_hooked(then) for now, then in others):
            return type(module).forward(module, x)
        y = self.form.fused(x, projections, self.activation)
        dropout = _dropout_of(module)
        return y if dropout is None else dropout(y)


@dataclass(frozen=True)
class _MLPForm:
    """Projections by their names, what is computed of them fused, and the same in plain torch."""

    operation: str
    parts: tuple[str, ...]
    fused: Callable[[Tensor, list[Any], str], Tensor]
    plain: Callable[[Tensor, list[Any], Callable[[Tensor], Tensor]], Tensor]

    def others(self, module: nn.Module) -> dict[str, nn.Module]:
        """What a module has besides its projections: an activation, a dropout."""
        return {key: part for key, part in module._modules.items() if key not in self.parts and part is not None}


def _fused_gated(x: Tensor, projections: list[Any], activation: str) -> Tensor:
    gate, up, down = projections
    weights = linear_weight(gate), linear_weight(up), linear_weight(down)
    return gated_mlp(x, *weights, gate.bias, up.bias, down.bias, activation=activation)


def _fused_joined(x: Tensor, projections: list[Any], activation: str) -> Tensor:
    """gate_up (2 H, K): the gate's rows, then the others. By unbind, whose backward writes both halves once."""
    gate_up, down = projections
    wg, wu = linear_weight(gate_up).unflatten(0, (2, -1)).unbind()
    bg, bu = (None, None) if gate_up.bias is None else gate_up.bias.unflatten(0, (2, -1)).unbind()
    return gated_mlp(x, wg, wu, linear_weight(down), bg, bu, down.bias, activation=activation)


def _fused_mlp(x: Tensor, projections: list[Any], activation: str) -> Tensor:
    up, down = projections
    return mlp(x, linear_weight(up), linear_weight(down), up.bias, down.bias, activation=activation)


def _plain_gated(x: Tensor, projections: list[Any], act: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up, down = projections
    return down(act(gate(x)) * up(x))


def _plain_joined(x: Tensor, projections: list[Any], act: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = projections[0](x).chunk(2, -1)
    return projections[1](act(gate) * up)


def _plain_mlp(x: Tensor, projections: list[Any], act: Callable[[Tensor], Tensor]) -> Tensor:
    return projections[1](act(projections[0](x)))


_FORMS = (
    _MLPForm("gated_mlp", ("gate_proj", "up_proj", "down_proj"), _fused_gated, _plain_gated),
    _MLPForm("gated_mlp", ("gate_up_proj", "down_proj"), _fused_joined, _plain_joined),
    *(
        _MLPForm("mlp", parts, _fused_mlp, _plain_mlp)
        for parts in (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"))
    ),
)


def _dropout_of(module: nn.Module) -> nn.Module | None:
    """The dropout behind the last projection: GPT-2 has one."""
    dropout = module._modules.get("dropout")
    return dropout if type(dropout) is nn.Dropout else None


def _activation_of(module: nn.Module, form: _MLPForm) -> str | None:
    """By which activation `form` computes what the class's own forward does; None where by none. Tried on small projections."""
    twin = copy.copy(module)
    hidden = 2 * _HIDDEN if form.parts[0] == "gate_up_proj" else _HIDDEN
    draw = torch.Generator().manual_seed(0)
    small = []
    for part in form.parts:
        outward = part == form.parts[-1]
        shape = (_WIDTH, _HIDDEN) if outward else (hidden, _WIDTH)
        has_bias = getattr(module._modules[part], "bias", None) is not None
        projection = nn.utils.skip_init(nn.Linear, shape[1], shape[0], bias=has_bias, dtype=torch.float64, device="cpu")
        for parameter in projection.parameters():
            nn.init.normal_(parameter, generator=draw)
        small.append(projection)
    twin._modules = {**module._modules, **dict(zip(form.parts, small, strict=True))}
    twin._buffers = {key: None if buffer is None else buffer.clone() for key, buffer in module._buffers.items()}
    x = torch.randn(2, _ROWS, _WIDTH, generator=draw, dtype=torch.float64)
    x = x.mul(torch.tensor([1.0, 30.0])[:, None, None]).requires_grad_()  # activations that clip do so above 6 or 10
    dy = torch.randn(2, _ROWS, _WIDTH, generator=draw, dtype=torch.float64)
    inputs = [x, *(p for projection in small for p in projection.parameters())]

    def values_and_gradients(compute: Callable[[], Tensor]) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            torch.manual_seed(0)
            y = compute()
            return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    def formula(act: Callable[[Tensor], Tensor]) -> Tensor:
        y = form.plain(x, small, act)
        dropout = _dropout_of(module)
        return y if dropout is None else dropout(y)

    try:
        expected = values_and_gradients(lambda: type(module).forward(twin, x))
    except Exception:  # it wants its own sizes, other arguments, or returns no tensor: not one of these
        return None
    for name, act in FUNCTIONS.items():
        found = values_and_gradients(lambda act=act: formula(act))  # type: ignore[misc]
        if all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in zip(found, expected, strict=True)):
            return name
    return None
