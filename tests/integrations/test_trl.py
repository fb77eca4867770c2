"""TRL's trainers are Trainers: the same callback, losses of the plain run. Models and a tokenizer of few words, from configs."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from gpuckpt.integrations.transformers import BudgetCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """dill cannot pickle what pyarrow 26 brings along, and nothing here is looked up in a cache."""
    number = itertools.count()
    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", classmethod(lambda cls, value: f"{next(number):016x}"))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, num_attention_heads=4))


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(60))]
    found = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, **names)


def sentences() -> list[tuple[str, str, str]]:
    draw = torch.Generator().manual_seed(0)
    return [
        tuple(
            " ".join(f"w{n}" for n in torch.randint(60, (length,), generator=draw).tolist()) for length in (6, 10, 10)
        )
        for _ in range(16)
    ]  # type: ignore[misc]


def tune(folder: Path, own: bool, *callbacks: Any) -> Any:
    rows = [{"text": f"{prompt} {answer}"} for prompt, answer, _ in sentences()]
    return SFTTrainer(
        llama(),
        SFTConfig(str(folder), gradient_checkpointing=own, **OPTIONS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


def prefer(folder: Path, own: bool, *callbacks: Any) -> Any:
    rows = [{"prompt": prompt, "chosen": f" {yes}", "rejected": f" {no}"} for prompt, yes, no in sentences()]
    return DPOTrainer(
        llama(),
        ref_model=llama(),
        args=DPOConfig(str(folder), gradient_checkpointing=own, **OPTIONS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


OPTIONS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}


@pytest.mark.parametrize("make", [tune, prefer])
def test_its_trainers_take_the_callback(make: Any, tmp_path: Path) -> None:
    callback = BudgetCallback("40%", repeats=1)
    found = []
    for callbacks in ([callback], []):
        trainer = make(tmp_path, bool(callbacks), *callbacks)  # TRL checkpoints by itself unless it is told not to
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert len(set(found[0])) == 6, "it learns something"
    assert callback.fitted is not None
    assert callback.fitted.budget.peak_bytes <= callback.fitted.budget.max_bytes
    assert callback.fitted.plan.certificate.recompute_s > 0
    assert callback.fitted.deviations == []
