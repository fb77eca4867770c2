"""`gpuckpt.nn.fuse`: MLPs of transformers' models compute by the fused operations, and nobody else notices."""

from __future__ import annotations

import copy
import io
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from torch import Tensor, nn

import gpuckpt
from gpuckpt.nn import fuse, fusing

transformers = pytest.importorskip("transformers", reason="Hugging Face models come with the dev extra")

from tests.pytorch.beside_plain import plain_peak_bytes  # noqa: E402
from tests.zoo.language import COMMON, EXPERTS  # noqa: E402
from tests.zoo.registry import padded_text  # noqa: E402

SMALL = {**COMMON, "num_hidden_layers": 2}


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    if name == "GPT2":
        options = {"vocab_size": 128, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **options}
    else:
        sizes = dict(SMALL)
        if name in ("Phi", "GPTNeoX"):
            sizes.pop("num_key_value_heads")
        options = {**sizes, **({"head_dim": 8} if name in ("Gemma", "Gemma2", "Gemma3", "Qwen3") else {}), **options}
    return getattr(transformers, kind)(config(**options)).double().train()


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Llama": ({"mlp_bias": True}, "gated_mlp, silu"),
    "Mistral": ({}, "gated_mlp, silu"),
    "Qwen2": ({}, "gated_mlp, silu"),
    "Qwen3": ({}, "gated_mlp, silu"),
    "Gemma": ({}, "gated_mlp, gelu_tanh"),
    "Gemma2": ({}, "gated_mlp, gelu_tanh"),
    "Gemma3": ({}, "gated_mlp, gelu_tanh"),
    "Phi3": ({}, "gated_mlp, silu"),
    "Phi": ({}, "mlp, gelu_tanh"),
    "GPTNeoX": ({}, "mlp, gelu"),
    "GPT2": ({"resid_pdrop": 0.1}, "mlp, gelu_tanh"),
}


def step(model: nn.Module, seed: int = 3) -> list[Tensor]:
    """Loss and gradients of one step."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model(**padded_text(), use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def calls_of_ours(model: nn.Module) -> int:
    """How often a fused operation is called in a step."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mlp", "gated_mlp"):
            real = getattr(fusing, name)
            patch.setattr(fusing, name, lambda *args, real=real, **kwargs: calls.append("") or real(*args, **kwargs))
        step(model)
    return len(calls)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_fused(name: str) -> None:
    options, how = MODELS[name]
    model = build(name, **options)
    plain = copy.deepcopy(model)
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    parameters = list(model.parameters())

    fusion = fuse(model)
    assert list(fusion.fused.values()) == [how] * 2, str(fusion)
    assert not fusion.left
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert fuse(model) == fusion, "once more changes nothing"

    for ours, expected in zip(step(model), step(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)
    assert calls_of_ours(model) == 2
    assert calls_of_ours(plain) == 0
    model.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**padded_text()).logits, plain(**padded_text()).logits, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("hf", "ours"), {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "relu": "relu",
    "relu2": "relu2", "sigmoid": "sigmoid", "tanh": "tanh", "linear": "identity",
    "quick_gelu": None, "mish": None, "gelu_10": None, "hardswish": None, "relu6": None, "leaky_relu": None, "prelu": None,
}.items())  # fmt: skip
def test_activations_of_transformers(hf: str, ours: str | None) -> None:
    model = build("Llama", hidden_act=hf)
    fusion = fuse(model)
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert list(fusion.fused.values()) == ([] if ours is None else [f"gated_mlp, {ours}"] * 2)
    assert list(fusion.left) == ([] if ours is not None else names)
    if ours is None:
        assert type(model.model.layers[0].mlp.act_fn).__name__ in fusion.left[names[0]]
        assert calls_of_ours(model) == 0


class Sparse(nn.Module):
    """A gated MLP by its parts, which computes something else."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = nn.SiLU()
        self.scale = scale
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate * self.scale) * self.up_proj(x))


class Detached(Sparse):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))


class Wider(Sparse):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * mask


def test_what_computes_something_else_is_left_and_nothing_is_touched() -> None:
    model = nn.ModuleDict({"other": Sparse(0.5), "detached": Detached(), "wider": Wider(), "same": Sparse()})
    generator = torch.random.get_rng_state()
    fusion = fuse(model)
    assert list(fusion.left) == ["other", "detached", "wider"]
    assert list(fusion.fused) == ["same"]
    assert "computes neither mlp nor gated_mlp" in str(fusion)
    assert model["other"].calls == model["same"].calls == 0
    assert torch.equal(torch.random.get_rng_state(), generator)

    quantised = nn.Sequential(Sparse())
    quantised[0].up_proj = nn.Bilinear(8, 8, 16)
    assert fuse(quantised).left == {"0": "up_proj is a Bilinear"}
    patched = nn.Sequential(Sparse())
    patched[0].forward = lambda x: x
    assert "replaced already" in fuse(patched).left["0"]
    hooked = nn.Sequential(Sparse())
    hooked[0].act_fn.register_forward_hook(lambda *args: None)
    assert fuse(hooked).left == {"0": "act_fn has a hook"}


@pytest.mark.parametrize("change", ["projection", "activation", "hook", "hook on the activation"])
def test_what_is_changed_afterwards_runs_as_it_was_written(change: str) -> None:
    model = build("Llama")
    fuse(model)
    mlp = model.model.layers[0].mlp
    seen: list[str] = []
    if change == "projection":

        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        doubled = Doubled(32, 88, bias=False, dtype=torch.float64)
        doubled.load_state_dict(mlp.up_proj.state_dict())
        mlp.up_proj = doubled
    elif change == "activation":
        mlp.act_fn = nn.Mish()
    else:
        (mlp.up_proj if change == "hook" else mlp.act_fn).register_forward_hook(lambda *args: seen.append("called"))
    assert calls_of_ours(model) == 1
    assert bool(seen) == ("hook" in change)
    ours = step(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    for found, expected in zip(ours, step(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("first", ["fuse", "adapt"])
def test_adapters(first: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[0], init_lora_weights=False
    )

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        return peft.get_peft_model(model, config).double().train()

    plain = adapted(build("Llama"))
    model = build("Llama")
    if first == "fuse":
        fuse(model)
        model = adapted(model)
    else:
        model = adapted(model)
        (left,) = fuse(model).left.values()
        assert left == "up_proj is a Linear"  # of peft
    assert list(model.state_dict()) == list(plain.state_dict())
    for found, expected in zip(step(model), step(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert calls_of_ours(model) == 1, "the layer without an adapter"


def test_copies_and_pickles_carry_a_forward_of_their_own() -> None:
    model = build("Phi3")
    fuse(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert calls_of_ours(other) == 2
        plain = copy.deepcopy(other)
        for module in plain.modules():
            module.__dict__.pop("forward", None)
        for found, expected in zip(step(other), step(plain), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPT2"])
def test_under_a_budget_bit_for_bit_and_with_fewer_bytes(name: str) -> None:
    model = build(name, **MODELS[name][0])
    unfused_bytes = plain_peak_bytes(model, (), padded_text())
    fuse(model)
    assert plain_peak_bytes(model, (), padded_text()) < 0.8 * unfused_bytes
    plain = copy.deepcopy(model)
    fitted = gpuckpt.fit(model, padded_text(), "55%", repeats=1)
    for found, expected in zip(step(model), step(plain), strict=True):
        assert torch.equal(found, expected)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes


# The compiler itself looks at the .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_layers_that_are_compiled() -> None:
    torch._dynamo.reset()
    model = build("Llama")
    plain = copy.deepcopy(model)
    fuse(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", dynamic=False)
    for found, expected in zip(step(model), step(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_experts_stay_as_they_are() -> None:
    model = build("Qwen3Moe", **EXPERTS, head_dim=8).float()  # torch's grouped products know no float64
    before = step(model)
    assert str(fuse(model)) == ""
    assert all(torch.equal(a, b) for a, b in zip(before, step(model), strict=True))
