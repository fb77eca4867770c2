"""The modules: drop-in for their torch and Hugging Face counterparts, state dicts included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pytorch.ops.fused import LiveBytes
from torch import nn

import gpuckpt
from gpuckpt.nn import FusedLinear, FusedMLP, GatedMLP


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
    with pytest.raises(ValueError, match="activation='swiglu': expected one of"):
        make(4, 4, activation="swiglu")


def test_wrong_dropout_is_refused_when_built():
    with pytest.raises(ValueError, match=r"dropout=-0\.1"):
        FusedLinear(4, 4, dropout=-0.1)


def test_public_names():
    assert gpuckpt.nn.GatedMLP is GatedMLP
    assert set(gpuckpt.functional.__all__) >= {"linear", "mlp", "gated_mlp", "linear_cross_entropy"}
    for name in gpuckpt.functional.__all__:
        assert callable(getattr(gpuckpt.functional, name))
