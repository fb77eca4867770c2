"""A Hugging Face model under a budget by one line of the user's script: losses, weights and checkpoints of the plain run."""

from __future__ import annotations

import copy
import doctest
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from torch import Tensor, nn

import gpuckpt
from gpuckpt.errors import InvalidChain

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gpuckpt.integrations.transformers import BudgetCallback, enable
from tests.pytorch.parallel.ranks import needs_ranks, on_ranks

STEPS = 20
VOCABULARY = 96


def llama(layers: int = 8) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Sentences(torch.utils.data.Dataset):
    """`count` sentences of 9 to 24 tokens, the same every time."""

    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(1)
        lengths = torch.randint(9, 25, (count,), generator=draw).tolist()
        self.rows = [torch.randint(3, VOCABULARY, (length,), generator=draw) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded to the next multiple of 8."""
    tokens = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    tokens = nn.functional.pad(tokens, (0, -tokens.shape[1] % 8))
    mask = (tokens != 0).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


class PlainPeak(TrainerCallback):
    """Counts by itself the bytes that autograd saves in each step of a plain run: storages that are no parameter's, once each."""

    def __init__(self) -> None:
        self.peak_bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        resident = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in resident:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if module.training:
                seen.clear()
                seen.update({t.untyped_storage().data_ptr(): 0 for t in kwargs.values() if isinstance(t, Tensor)})
                hooks.__enter__()

        def end(module: nn.Module, args: tuple, out: Any) -> None:
            if module.training:
                hooks.__exit__(None, None, None)
                self.peak_bytes = max(self.peak_bytes, sum(seen.values()))

        model.register_forward_pre_hook(begin, with_kwargs=True)
        model.register_forward_hook(end)


def trainer_of(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """A Trainer with padding, accumulation, evaluation and saving, on the CPU."""
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=8,
        save_steps=10,
        logging_steps=1,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"max_steps": STEPS, **options},
    )
    data = {"train_dataset": Sentences(50), "eval_dataset": Sentences(6)}
    return Trainer(model, args, data_collator=padded, callbacks=list(callbacks), **data)


def losses(trainer: Trainer) -> list[float]:
    history = trainer.state.log_history
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = weights(model)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses, weights and peak of the plain run."""
    count = PlainPeak()
    trainer = trainer_of(llama(), tmp_path_factory.mktemp("plain"), count)
    trainer.train()
    return losses(trainer), weights(trainer.model), count.peak_bytes


def test_the_trainer_trains_under_two_fifths_of_the_plain_peak(plain: Any, tmp_path: Path) -> None:
    expected, expected_weights, peak_bytes = plain
    callback = BudgetCallback(peak_bytes * 2 // 5, repeats=1)
    trainer = trainer_of(llama(), tmp_path, callback)
    trainer.train()
    assert len(losses(trainer)) == STEPS + 3
    assert losses(trainer) == expected
    assert_same_weights(trainer.model, expected_weights)
    assert callback.fitted is not None
    budget = callback.fitted.budget
    assert 0 < budget.peak_bytes <= budget.max_bytes == peak_bytes * 2 // 5
    assert budget.used_bytes == 0
    assert callback.fitted.report().measured_peak_bytes == callback.fitted.plan.certificate.peak_bytes
    assert gpuckpt.fitted(trainer.model) is None, "the model is given back"

    resumed = trainer_of(llama(), tmp_path, BudgetCallback(peak_bytes * 2 // 5, repeats=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert losses(resumed)[-10:] == expected[-10:]
    assert_same_weights(resumed.model, expected_weights)


def test_the_examples_print_what_they_say() -> None:
    import gpuckpt.integrations.transformers as module

    found = doctest.testmod(module, raise_on_error=False)
    assert (found.failed, found.attempted) == (0, 9)


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    rows = Sentences(2 * count)
    return [padded([rows[2 * n], rows[2 * n + 1]]) for n in range(count)]


def trained(model: nn.Module, train: Any) -> list[Tensor]:
    """Losses and final trained parameters of a plain loop over `batches()`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    torch.manual_seed(5)
    for batch in batches():
        loss = train(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return found + [p.detach().clone() for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    loss.backward()
    return loss


def assert_trains_the_same(model: nn.Module, plain: nn.Module, **options: Any) -> gpuckpt.Fitted:
    """Under two fifths of what the batch that saves most holds in a plain step."""
    probe = PlainPeak()
    counted = copy.deepcopy(plain)
    probe.on_train_begin(None, None, None, model=counted)
    for batch in batches():
        counted(**batch)
    fitted = enable(model, probe.peak_bytes * 2 // 5, repeats=1, **options)
    for ours, expected in zip(trained(model, step), trained(plain, step), strict=True):
        assert torch.equal(ours, expected)
    assert fitted.budget.peak_bytes <= fitted.budget.max_bytes == probe.peak_bytes * 2 // 5
    assert fitted.plan.certificate.recompute_s > 0
    assert fitted.budget.used_bytes == 0
    return fitted


def test_bf16_autocast_around_the_model() -> None:
    def under_autocast(model: nn.Module) -> nn.Module:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate does
        return model

    assert_trains_the_same(under_autocast(llama()), under_autocast(llama()))


@pytest.mark.parametrize("frozen_embedding_hook", [False, True])
def test_adapters_by_peft(frozen_embedding_hook: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted() -> nn.Module:
        config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"])
        model = peft.get_peft_model(llama(), config)
        if frozen_embedding_hook:
            model.enable_input_require_grads()
        return model.train()

    assert_trains_the_same(adapted(), adapted())


# The compiler itself looks at the .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_layers_that_are_compiled_one_by_one() -> None:
    def compiled() -> LlamaForCausalLM:
        model = llama(4)
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", dynamic=False)
        return model

    torch._dynamo.reset()
    assert_trains_the_same(compiled().train(), compiled().train())


def test_checkpointing_of_its_own_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    model.activation_checkpointing_enable()
    fitted = enable(model, "50%", repeats=1)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert "LlamaForCausalLM is switched off" in caplog.text
    step(model, batches()[0])
    assert fitted.budget.peak_bytes <= fitted.budget.max_bytes

    model = llama()
    caplog.clear()
    enable(model, "50%")
    assert caplog.text == "", "nothing was switched off"


def test_checkpointing_that_is_switched_on_later_is_refused() -> None:
    model = llama()
    enable(model, "50%", repeats=1)
    model.activation_checkpointing_enable()
    with pytest.raises(InvalidChain, match=r"torch\.utils\.checkpoint"):
        step(model, batches()[0])


def test_the_trainers_own_argument_is_switched_off(plain: Any, tmp_path: Path) -> None:
    callback = BudgetCallback(plain[2] * 2 // 5, repeats=1)
    trainer = trainer_of(llama(), tmp_path, callback, activation_checkpointing=True)
    trainer.train()
    assert losses(trainer) == plain[0]
    assert callback.fitted is not None
    assert callback.fitted.budget.peak_bytes <= plain[2] * 2 // 5


def test_a_budget_that_is_too_small_names_one_that_would_do(tmp_path: Path) -> None:
    trainer = trainer_of(llama(), tmp_path, BudgetCallback("10KiB", repeats=1))
    before = weights(trainer.model)
    with pytest.raises(gpuckpt.BudgetExceeded) as refusal:
        trainer.train()
    assert refusal.value.need > refusal.value.available == 10 * 1024
    assert_same_weights(trainer.model, before)
    with pytest.raises(ValueError, match="12 parsecs"):
        trainer_of(llama(), tmp_path, BudgetCallback("12 parsecs")).train()


def trainer_on_rank(folder: str, *callbacks: TrainerCallback, steps: int) -> Trainer:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # asked for, and not used: the ranks have met
    return trainer_of(llama(), Path(folder), *callbacks, max_steps=steps, ddp_find_unused_parameters=False)


def train_on_rank(rank: int, folder: str, steps: int, budget_bytes: int) -> tuple[list[float], list[float], int]:
    if rank == 1:
        refused = trainer_on_rank(folder, BudgetCallback("10KiB", repeats=1), steps=1)
    else:
        refused = trainer_on_rank(folder, BudgetCallback("1GiB", repeats=1), steps=1)
    with pytest.raises(gpuckpt.BudgetExceeded):  # the smallest budget decides for all, and nobody waits for anybody
        refused.train()
    callback = BudgetCallback(budget_bytes, repeats=1)
    found = []
    for callbacks in ([], [callback]):
        trainer = trainer_on_rank(folder, *callbacks, steps=steps)
        trainer.train()
        assert trainer.args.world_size == 2
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        found.append(losses(trainer))
    assert callback.fitted is not None
    return found[0], found[1], callback.fitted.budget.peak_bytes


@needs_ranks
@pytest.mark.parametrize("steps", [4, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_on_two_ranks(steps: int, plain: Any, tmp_path: Path) -> None:
    budget_bytes = plain[2] * 2 // 5
    for expected, ours, peak_bytes in on_ranks(train_on_rank, str(tmp_path), steps, budget_bytes, limit_s=120):
        assert len(expected) == steps + steps // 8 + (steps % 8 > 0)
        assert ours == expected
        assert 0 < peak_bytes <= budget_bytes
