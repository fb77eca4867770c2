"""The modules: drop-in for their torch and Hugging Face counterparts, state dicts included."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpuckpt
from gpuckpt.nn import FusedLinear, FusedMLP, GatedMLP
from gpuckpt.pytorch.ops._activations import GATED
from tests.pytorch.ops.fused import ACTS, LiveBytes


def same(module: nn.Module, reference: nn.Module, width: int) -> None:
    """Outputs and all gradients agree in float64."""
    x = torch.randn(3, 5, width, dtype=torch.float64, requires_grad=True)
    found = []
    for m in (module.double(), reference.double()):
        y = m(x)
        parameters = dict(sorted(m.named_parameters()))
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters.values()])])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


class LlamaMLP(nn.Module):
    """The names, shapes and arithmetic of Hugging Face's LlamaMLP (transformers/models/llama/modeling_llama.py)."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp_loads_a_llama_mlp(bias):
    llama = LlamaMLP(8, 20, bias)
    ours = GatedMLP(8, 20, bias=bias)
    assert ours.load_state_dict(llama.state_dict()).missing_keys == []
    same(ours, llama, 8)
    llama.load_state_dict(ours.state_dict())


def test_gated_mlp_replaces_a_llama_mlp_inside_a_model():
    model = nn.ModuleDict({"mlp": LlamaMLP(8, 20, False)})
    state = model.state_dict()
    model["mlp"] = GatedMLP(8, 20)
    assert set(model.state_dict()) == set(state)
    model.load_state_dict(state)


class FalconH1MLP(nn.Module):
    """Falcon-H1's multipliers: on the gate before its activation, and on the output (modeling_falcon_h1.py)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        y = self.up_proj(x) * F.silu(self.gate_proj(x) * 0.8)
        return self.down_proj(y) * 0.3


def test_gated_mlp_with_multipliers_is_falcon_h1s():
    falcon = FalconH1MLP(8, 20)
    ours = GatedMLP(8, 20, gate_multiplier=0.8, down_multiplier=0.3)
    ours.load_state_dict(falcon.state_dict())
    same(ours, falcon, 8)


@pytest.mark.parametrize("bias", [True, False])
def test_fused_linear_is_a_linear(bias):
    torch.manual_seed(0)
    reference = nn.Linear(6, 9, bias=bias)
    torch.manual_seed(0)
    ours = FusedLinear(6, 9, bias=bias)
    assert isinstance(ours, nn.Linear)
    for name, value in reference.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    same(ours, reference, 6)


def test_fused_linear_with_an_activation():
    ours = FusedLinear(6, 9, activation="silu")
    reference = nn.Sequential(nn.Linear(6, 9), nn.SiLU())
    reference[0].load_state_dict(ours.state_dict())
    same(ours, reference, 6)


def test_fused_mlp_is_an_mlp():
    reference = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))
    ours = FusedMLP(6, 24)
    state = reference.state_dict()
    ours.load_state_dict({f"fc{1 + int(k[0]) // 2}{k[1:]}": v for k, v in state.items()})
    same(ours, reference, 6)


@pytest.mark.parametrize("make", [FusedMLP, GatedMLP])
def test_chunks_of_a_module_change_its_scratch_and_not_its_result(make):
    whole, chunked = make(8, 64), make(8, 64, chunk_rows=10)
    chunked.load_state_dict(whole.state_dict())
    same(chunked, whole, 8)
    peaks = []
    for module in (whole, chunked):
        y = module(torch.randn(100, 8, dtype=torch.float64))
        with LiveBytes() as live:
            y.sum().backward()
        peaks.append(live.peak_bytes)
    assert peaks[1] < peaks[0] / 2


def test_dropout_only_in_training():
    module = FusedLinear(6, 200, activation="gelu", dropout=0.5)
    x = torch.randn(4, 6)
    dropped = (module(x) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    assert (module.eval()(x) != 0).all()
    assert "dropout=0.5" in repr(module)


def test_residual_of_a_fused_linear():
    module = FusedLinear(6, 6, activation="relu")
    x = torch.randn(4, 6)
    torch.testing.assert_close(module(x, residual=x), F.relu(F.linear(x, module.weight, module.bias)) + x)


def test_output_sizes_devices_and_dtypes():
    assert FusedMLP(6, 12, 5)(torch.randn(2, 6)).shape == (2, 5)
    assert GatedMLP(6, 12, 5)(torch.randn(2, 6)).shape == (2, 5)
    for module in (FusedLinear(6, 6, dtype=torch.bfloat16), FusedMLP(6, 6, dtype=torch.bfloat16)):
        assert module(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    meta = GatedMLP(6, 12, device="meta")
    assert meta(torch.randn(2, 6, device="meta")).shape == (2, 6)


@pytest.mark.parametrize("make", [FusedLinear, FusedMLP, GatedMLP])
def test_wrong_activations_are_refused_when_built(make):
    with pytest.raises(ValueError, match="activation='swish': expected one of"):
        make(4, 4, activation="swish")
    if make is not GatedMLP:  # the names of gated forms are understood where there is a gate
        with pytest.raises(ValueError, match="activation='swiglu': expected one of"):
            make(4, 4, activation="swiglu")
    with pytest.raises(ValueError, match="norm is 'batch'; expected one of 'rms', 'layer', None"):
        make(4, 4, norm="batch")


@pytest.mark.parametrize(("form", "activation"), GATED.items())
def test_gated_forms_are_understood_by_their_names(form, activation):
    ours, by_activation = GatedMLP(6, 8, activation=form), GatedMLP(6, 8, activation=activation)
    ours.load_state_dict(by_activation.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(ours(x), by_activation(x))
    weights = [p.detach() for p in ours.parameters()]
    y = gpuckpt.functional.gated_mlp(x, *weights, activation=form)
    torch.testing.assert_close(
        y, F.linear(ACTS[activation](F.linear(x, weights[0])) * (x @ weights[1].t()), weights[2])
    )


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_norm_in_front(norm, hooked):
    """Against torch's own norm and layers; a norm with a hook is called, and so is one in front of a projection with a hook."""
    makers = {
        "linear": (lambda **o: FusedLinear(6, 6, activation="gelu", **o), lambda m: lambda x: F.gelu(linear(x, m))),
        "mlp": (lambda **o: FusedMLP(6, 8, **o), lambda m: lambda x: linear(F.gelu(linear(x, m.fc1)), m.fc2)),
        "gated": (
            lambda **o: GatedMLP(6, 8, **o),
            lambda m: lambda x: linear(F.silu(linear(x, m.gate_proj)) * linear(x, m.up_proj), m.down_proj),
        ),
    }
    for make, plain in makers.values():
        module = make(norm=norm, norm_eps=1e-3).double()
        nn.init.normal_(module.norm.weight)
        called = []
        for child in (module.norm, *list(module.children())[-1:]) if hooked else ():
            child.register_forward_hook(lambda *args, called=called: called.append(1))
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        weight, bias = module.norm.weight, getattr(module.norm, "bias", None)
        xn = F.rms_norm(x, (6,), weight, 1e-3) if norm == "rms" else F.layer_norm(x, (6,), weight, bias, 1e-3)
        found = []
        for y in (module(x), plain(module)(xn)):
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)
        assert bool(called) == hooked


def linear(x, module):
    return F.linear(x, module.weight, module.bias)


def test_a_norm_costs_no_saved_tensor():
    x = torch.randn(4, 6).requires_grad_() * 2
    for module in (
        FusedLinear(6, 6, activation="gelu", norm="rms"),
        FusedMLP(6, 8, norm="layer"),
        GatedMLP(6, 8, norm="rms"),
    ):
        budget = gpuckpt.CheckpointBudget(x.nbytes, device="cpu")
        with budget:
            y = module(x)
        assert budget.used_bytes == x.nbytes
        del y


def test_wrong_dropout_is_refused_when_built():
    with pytest.raises(ValueError, match=r"dropout is -0\.1; expected a number from 0 to 1"):
        FusedLinear(4, 4, dropout=-0.1)


def test_public_names():
    assert gpuckpt.nn.GatedMLP is GatedMLP
    assert set(gpuckpt.functional.__all__) >= {"linear", "mlp", "gated_mlp", "linear_cross_entropy"}
    for name in gpuckpt.functional.__all__:
        assert callable(getattr(gpuckpt.functional, name))


def test_one_order_of_arguments():
    """Widths, bias, activation; then options by name, and those that all have come last, in one order."""
    for module in (FusedLinear, FusedMLP, GatedMLP):
        parameters = inspect.signature(module).parameters.values()
        sizes = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert sizes[-2:] == ["bias", "activation"]
        assert options[-5:] == ["norm", "norm_eps", "chunk_rows", "device", "dtype"]
        operation = {FusedLinear: "linear", FusedMLP: "mlp", GatedMLP: "gated_mlp"}[module]
        own = inspect.signature(getattr(gpuckpt.functional, operation)).parameters
        assert {"dropout", "norm", "chunk_rows"} & {*own} == {"dropout", "norm", "chunk_rows"} & {*options}
