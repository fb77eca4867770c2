"""`gpuckpt.nn.fuse(loss=True)`: heads of transformers' models with their loss, against cross entropy of all logits in float64."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from torch import Tensor, nn

import gpuckpt
from gpuckpt.nn import fuse, fusing_loss

transformers = pytest.importorskip("transformers", reason="Hugging Face models come with the dev extra")

from tests.nn.test_fusing import MODELS, SMALL, build, step  # noqa: E402
from tests.pytorch.beside_plain import plain_peak_bytes  # noqa: E402
from tests.zoo.language import EXPERTS  # noqa: E402
from tests.zoo.registry import padded_text  # noqa: E402

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "Cohere": ({"logit_scale": 0.25}, ", logits times 0.25"),
    "Granite": ({"logits_scaling": 5.0}, ", logits times 0.2"),
}
HOW = {"Gemma2": ", softcap 30"}


def loss_only(model: nn.Module) -> nn.Module:
    """`model`, its head fused with its loss and its MLPs as they were."""
    fusion = fuse(model, loss=True)
    for module in model.modules():
        if module is not model:
            module.__dict__.pop("forward", None)
    assert fusion.fused["lm_head"].startswith("linear_cross_entropy"), str(fusion)
    return model


def reference(model: nn.Module, seed: int = 3) -> list[Tensor]:
    """Loss and gradients by cross entropy of the model's logits in their own dtype; transformers rounds them to float32."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    inputs = padded_text()
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def calls(model: nn.Module, **changes: Any) -> int:
    """How often the fused loss is called in a step."""
    seen: list[None] = []
    real = fusing_loss.linear_cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusing_loss, "linear_cross_entropy", lambda *a, **k: seen.append(None) or real(*a, **k))
        model(**{**padded_text(), "use_cache": False, **changes})
    return len(seen)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_gradients_are_those_of_all_logits(name: str) -> None:
    options, how = OTHERS[name] if name in OTHERS else (MODELS[name][0], HOW.get(name, ""))
    model = build(name, **options)
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    fusion = fuse(model, loss=True)
    assert fusion.fused["lm_head"] == "linear_cross_entropy" + how
    assert fuse(model, loss=True) == fusion, "once more changes nothing"
    assert list(model.state_dict()) == keys
    ours, expected, of_transformers = step(model), reference(plain), step(plain)
    assert len(ours) == len(expected)
    for found, wanted in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert ours[0].dtype == of_transformers[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], of_transformers[0])
    assert calls(model) == 1
    assert calls(plain) == 0


def test_tied_weights_stay_tied() -> None:
    model = build("Llama", tie_word_embeddings=True)
    plain = copy.deepcopy(model)
    loss_only(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for found, wanted in zip(step(model)[1:], reference(plain)[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes", [
    {"labels": None}, {"logits_to_keep": 2}, {"logits_to_keep": torch.tensor([0, 3])}, {"return_dict": False},
], ids=["no labels", "the last two", "some", "a tuple"])  # fmt: skip
def test_where_logits_are_asked_for_they_are_there(changes: dict[str, Any]) -> None:
    model = loss_only(build("Llama"))
    inputs = {**padded_text(), "use_cache": False, **changes}
    if "logits_to_keep" in changes:
        inputs["labels"] = inputs["labels"][:, :2]
    assert calls(model, **inputs) == 0
    found = model(**inputs)
    logits = found[1] if isinstance(found, tuple) else found.logits
    expected = type(model).forward(model, **inputs)
    assert torch.equal(logits, expected[1] if isinstance(expected, tuple) else expected.logits)
    model.eval()
    assert calls(model) == 0
    with torch.no_grad():
        assert torch.equal(model(**padded_text()).logits, type(model).forward(model, **padded_text()).logits)


def test_a_training_step_returns_no_logits_and_holds_none() -> None:
    model = build("Llama", vocab_size=4096)
    inputs = {name: tensor.repeat(8, 1) for name, tensor in padded_text().items()}
    unfused_bytes = plain_peak_bytes(model, (), inputs)
    loss_only(model)
    out = model(**inputs, use_cache=False, output_hidden_states=True)
    assert out.logits is None
    assert "logits" not in out
    assert len(out.hidden_states) == 3
    float32_logits, of_the_head = inputs["labels"].numel() * 4096 * 4, 4096 * 32 * 8
    assert unfused_bytes > float32_logits > 2 * of_the_head
    # Instead the gradients of the head and of what it is given may be kept: see linear_cross_entropy.
    assert plain_peak_bytes(model, (), inputs) < unfused_bytes - float32_logits + 2 * of_the_head


def test_under_a_budget_bit_for_bit() -> None:
    model = build("Llama")
    fuse(model, loss=True)
    plain = copy.deepcopy(model)
    fitted = gpuckpt.fit(model, padded_text(), "55%", repeats=1)
    for found, expected in zip(step(model), step(plain), strict=True):
        assert torch.equal(found, expected)
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= fitted.budget.max_bytes


@pytest.mark.parametrize("first", ["fuse", "adapt"])
@pytest.mark.parametrize("how", ["adapter", "copy"])
def test_adapters_on_the_head_are_called(first: str, how: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    on_head = {"target_modules": ["q_proj", "lm_head"]} if how == "adapter" else {"modules_to_save": ["lm_head"]}

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["q_proj"], **on_head})
        return peft.get_peft_model(model, config).double().train()

    plain = adapted(build("Llama"))
    model = build("Llama")
    if first == "fuse":
        model = adapted(loss_only(model))
    else:
        model = adapted(model)
        fusion = fuse(model, loss=True)
        assert [why for name, why in fusion.left.items() if "lm_head" in name or "head" in name], str(fusion)
        for module in model.modules():
            module.__dict__.pop("forward", None)
    assert calls(model) == 0
    for found, wanted in zip(step(model), step(plain), strict=True):
        assert torch.equal(found, wanted)


def test_adapters_elsewhere_leave_the_head_fused_and_frozen() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted() -> nn.Module:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
        return peft.get_peft_model(build("Llama"), config).double().train()

    model, plain = adapted(), adapted()
    fusion = fuse(model, loss=True)
    assert fusion.fused["base_model.model.lm_head"] == "linear_cross_entropy"
    assert calls(model) == 1
    assert model.base_model.model.lm_head.weight.grad is None
    for found, wanted in zip(step(model)[1:], reference(plain)[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", ["hook", "head", "loss", "compiled"])
def test_what_is_changed_afterwards_runs_as_it_was_written(change: str) -> None:
    model = loss_only(build("Llama"))
    seen: list[str] = []
    if change == "hook":
        model.lm_head.register_forward_hook(lambda *args: seen.append("called"))
    elif change == "head":
        model.lm_head = nn.Linear(32, 128, bias=False, dtype=torch.float64)
    elif change == "loss":
        model.loss_function = lambda logits, labels, **others: seen.append("called") or logits.square().mean()
    else:
        model.lm_head.compile(backend="eager")
    assert calls(model) == (change == "head")
    assert bool(seen) == (change in ("hook", "loss"))


def test_what_does_something_else_is_left() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        @property
        def loss_function(self) -> Any:
            real = super().loss_function
            return lambda **others: 2 * real(**others)

    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.lm_head(self.model(input_ids).last_hidden_state) + 1.0
            return transformers.modeling_outputs.CausalLMOutput(self.loss_function(logits, labels, 128), logits)

    config = transformers.LlamaConfig(**SMALL)
    for kind, why in ((Doubled, "another loss"), (Shifted, "something else of its head's outputs")):
        model = kind(config)
        assert why in fuse(model, loss=True).left["lm_head"]
        assert "forward" not in model.__dict__
    model = build("Llama")
    model.forward = model.forward
    assert "replaced already" in fuse(model, loss=True).left["lm_head"]
    assert "lm_head" not in fuse(build("Llama")).fused, "only where it is asked for"
    with pytest.raises(TypeError, match="loss"):
        fuse(model, loss=1)  # type: ignore[arg-type]


def test_auxiliary_losses_are_added() -> None:
    options = {**EXPERTS, "head_dim": 8, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    model = build("Qwen3Moe", **options).float()
    plain = copy.deepcopy(model)
    loss_only(model)
    for found, wanted in zip(step(model), step(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)
    assert model(**padded_text()).aux_loss > 0


def test_copies_and_pickles_carry_a_forward_of_their_own() -> None:
    model = build("Llama")
    fuse(model, loss=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            other.lm_head.weight.mul_(1.5)
        assert calls(other) == 1
        plain = copy.deepcopy(other)
        for module in plain.modules():
            module.__dict__.pop("forward", None)
        for found, wanted in zip(step(other)[1:], reference(plain)[1:], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_trainer_with_accumulation(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
    from gpuckpt.integrations.transformers import BudgetCallback
    from tests.integrations.test_transformers import llama, losses, trainer_of

    plain = trainer_of(llama(4), tmp_path, max_steps=4)
    plain.train()
    seen: list[None] = []
    real = fusing_loss.linear_cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusing_loss, "linear_cross_entropy", lambda *a, **k: seen.append(None) or real(*a, **k))
        ours = trainer_of(loss_only(llama(4)), tmp_path, BudgetCallback("1MiB", repeats=1), max_steps=4)
        ours.train()
    assert len(seen) >= 8, "two batches a step"
    assert len(losses(plain)) == 4 + 1
    torch.testing.assert_close(torch.tensor(losses(ours)), torch.tensor(losses(plain)), rtol=1e-5, atol=1e-5)
