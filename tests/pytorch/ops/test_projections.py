"""Fused modules whose projections are more than plain linears: the values and gradients of the layer they replace."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from gpuckpt.nn import FusedLinear, FusedMLP, GatedMLP
from gpuckpt.pytorch.ops._activations import FUNCTIONS
from tests.pytorch.ops.fused import ACTS

WIDTH, HIDDEN = 6, 10


class PlainMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class PlainGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x) * 0.8) * self.up_proj(x)) * 0.3


PAIRS = {
    "FusedMLP": (lambda: FusedMLP(WIDTH, HIDDEN), PlainMLP, ("fc1", "fc2")),
    "GatedMLP": (
        lambda: GatedMLP(WIDTH, HIDDEN, gate_multiplier=0.8, down_multiplier=0.3),
        PlainGated,
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


class Lora(nn.Module):
    """The shape of PEFT's adapters: it wraps a linear, and its `weight` is the wrapped one's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(2, base.in_features))
        self.lora_b = nn.Parameter(torch.randn(base.out_features, 2))

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + 0.5 * (x @ self.lora_a.t() @ self.lora_b.t())


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 1.5 * super().forward(x)


class Quantised(nn.Linear):
    """The shape of bitsandbytes' layers: a subclass whose weight is packed integers that F.linear would not take."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.weight = nn.Parameter((base.weight.detach() * 100).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) / 100, self.bias)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def set_child(module: nn.Module, name: str, child: nn.Module) -> None:
    setattr(module, name, child)


def lora(module, name):
    set_child(module, name, Lora(getattr(module, name)))


def quantised(module, name):
    set_child(module, name, Quantised(getattr(module, name)))


def subclass(module, name):
    base = getattr(module, name)
    other = Scaled(base.in_features, base.out_features, base.bias is not None)
    other.load_state_dict(base.state_dict())
    set_child(module, name, other)


def sequential(module, name):
    set_child(module, name, nn.Sequential(getattr(module, name), nn.Tanh()))


def forward_hook(module, name):
    getattr(module, name).register_forward_hook(lambda module, args, out: out * 2)


def forward_pre_hook(module, name):
    getattr(module, name).register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def forward_hook_with_kwargs(module, name):
    getattr(module, name).register_forward_hook(lambda module, args, kwargs, out: out + 1, with_kwargs=True)


def backward_hook(module, name):
    getattr(module, name).register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))


def backward_pre_hook(module, name):
    getattr(module, name).register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 3,))


def parametrization(module, name):
    nn.utils.parametrize.register_parametrization(getattr(module, name), "weight", Doubled())


def weight_norm(module, name):
    parametrizations.weight_norm(getattr(module, name))


def pruned(module, name):
    prune.l1_unstructured(getattr(module, name), "weight", 0.5)


def own_forward(module, name):
    child = getattr(module, name)
    child.forward = lambda x: F.linear(x, child.weight, child.bias) * 2


def compiled_call(module, name):
    child = getattr(module, name)
    child._compiled_call_impl = lambda x: child._call_impl(x) * 2


CHANGES: list[Callable[[nn.Module, str], None]] = [
    lora,
    quantised,
    subclass,
    sequential,
    forward_hook,
    forward_pre_hook,
    forward_hook_with_kwargs,
    backward_hook,
    backward_pre_hook,
    parametrization,
    weight_norm,
    pruned,
    own_forward,
    compiled_call,
]


def results(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The output and every gradient, by name."""
    x = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH).requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same(ours: nn.Module, plain: nn.Module) -> None:
    got, expected = results(ours), results(plain)
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def pair(kind: str) -> tuple[nn.Module, nn.Module, tuple[str, ...]]:
    fused, plain, names = PAIRS[kind]
    ours, reference = fused(), plain()
    ours.load_state_dict(reference.state_dict())
    return ours, reference, names


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_projection_is_called(kind, change):
    _, _, names = pair(kind)
    for name in names:
        ours, reference, _ = pair(kind)
        before = results(copy.deepcopy(reference))
        for module in (ours, reference):
            torch.manual_seed(1)
            change(module, name)
        assert_same(ours, reference)
        after = results(reference)
        changed = any(
            key not in after or (value is not None and not torch.equal(after[key], value))
            for key, value in before.items()
        )
        assert changed, "the change does not show in the plain layer: the test says nothing"


@pytest.mark.parametrize("kind", PAIRS)
def test_hooks_on_all_modules_are_called(kind):
    ours, reference, names = pair(kind)
    called = []

    def double(module, args, out):
        if isinstance(module, nn.Linear):
            called.append(module)
            return out * 2

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert_same(ours, reference)
    finally:
        handle.remove()
    assert len(called) == 2 * len(names)


@pytest.mark.parametrize("kind", PAIRS)
def test_hooks_and_changes_that_are_taken_back_leave_the_fused_form(kind):
    ours, reference, names = pair(kind)
    child = getattr(ours, names[0])
    handles = [child.register_forward_hook(lambda *args: None), child.register_full_backward_hook(lambda *args: None)]
    assert len(saved_by(ours)) > 1
    for handle in handles:
        handle.remove()
    assert len(saved_by(ours)) == 1
    with FlopCounterMode(display=False):  # its hooks note the names of modules, and change nothing
        assert len(saved_by(ours)) == 1
    assert_same(ours, reference)


def saved_by(module: nn.Module) -> list[torch.Tensor]:
    """What autograd saves, parameters and views of them left out."""
    saved: list[torch.Tensor] = []
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(torch.ones(3, WIDTH, requires_grad=True))
    return [t for t in saved if t.untyped_storage().data_ptr() not in own]


@pytest.mark.parametrize("kind", PAIRS)
def test_weights_of_a_tensor_subclass_are_left_to_torch(kind):
    """DTensor's and torchao's weights know torch's operators only; TwoTensor stands for them."""
    ours, reference, names = pair(kind)
    with torch.no_grad():
        expected = reference(torch.ones(2, WIDTH))
        for name in names:
            child = getattr(ours, name)
            child.weight = nn.Parameter(TwoTensor(child.weight.detach(), child.weight.detach().clone()))
        y = ours(torch.ones(2, WIDTH))
    assert isinstance(y, TwoTensor)
    torch.testing.assert_close(y.a, expected)


def test_a_fused_linear_with_hooks_and_parametrizations():
    for change in (forward_hook, forward_pre_hook, backward_hook, parametrization, weight_norm, pruned):
        ours, reference = nn.ModuleDict({"fc": FusedLinear(5, 5)}), nn.ModuleDict({"fc": nn.Linear(5, 5)})
        ours.load_state_dict(reference.state_dict())
        found = []
        for model in (ours, reference):
            change(model, "fc")
            x = torch.linspace(-1, 1, 20).reshape(4, 5).requires_grad_()
            y = model["fc"](x)
            y.square().sum().backward()
            found.append([y.detach(), x.grad, *(p.grad for _, p in sorted(model.named_parameters()))])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", PAIRS)
def test_compiles_with_a_lora(kind):
    ours, reference, names = pair(kind)
    for module in (ours, reference):
        torch.manual_seed(1)
        lora(module, names[0])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.ones(3, WIDTH)), reference(torch.ones(3, WIDTH)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_differentiable_activations_are_the_same(name):
    z = torch.linspace(-3, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(FUNCTIONS[name](z), ACTS[name](z), rtol=0, atol=0)


def test_adapters_of_peft():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    plain = nn.ModuleDict({"mlp": PlainGated()})
    model = nn.ModuleDict({"mlp": PAIRS["GatedMLP"][0]()})
    model.load_state_dict(plain.state_dict())
    found = []
    for layers in (plain, model):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, layers)
        y = layers["mlp"](torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH))
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for name, p in layers.named_parameters() if "lora" in name)])
    assert len(found[0]) == 7
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
