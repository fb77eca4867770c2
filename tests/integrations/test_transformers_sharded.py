"""FSDP2 under the Trainer with the one line, on two ranks of gloo: losses and weights of the sharded plain run, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from gpuckpt.integrations.transformers import BudgetCallback
from gpuckpt.nn import fuse
from tests.integrations import test_transformers
from tests.integrations.test_transformers import llama, losses, trainer_of
from tests.pytorch.parallel.ranks import needs_ranks, on_ranks


class ShardedTrainer(Trainer):
    """accelerate shards on accelerators alone; it is told here what it would say of itself there, and calls `fully_shard`."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
        )
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def train_sharded(rank: int, folder: str, budget: str, fused: bool) -> list[Any]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # asked for, and not used: the ranks have met
    test_transformers.Trainer = ShardedTrainer  # type: ignore[misc]
    callback = BudgetCallback(budget, repeats=1)
    found = []
    for callbacks in ([], [callback]):
        model = llama()
        if fused:
            assert len(fuse(model, loss=True).fused) == 8 + 1
        trainer = trainer_of(model, Path(folder), *callbacks, max_steps=4, save_strategy="no")
        trainer.train()
        for module in trainer.model_wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the evaluation at the end gathered them
        parameters = list(trainer.model_wrapped.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        whole = [parameter.full_tensor().detach() for parameter in parameters]
        found.append((losses(trainer), whole))
    (expected, weights), (ours, our_weights) = found
    assert len(expected) == 4 + 1
    assert ours == expected
    assert all(torch.equal(a, b) for a, b in zip(our_weights, weights, strict=True))
    fitted = callback.fitted
    assert fitted is not None
    assert not fitted.deviations
    assert fitted.plan.certificate.recompute_s > 0
    return [fitted.budget.peak_bytes, fitted.promised_peak_bytes, fitted.budget.max_bytes]


@needs_ranks
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sharded_on_two_ranks(fused: bool, tmp_path: Path) -> None:
    for peak_bytes, promised_bytes, max_bytes in on_ranks(train_sharded, str(tmp_path), "60%", fused, limit_s=120):
        assert 0 < peak_bytes == promised_bytes <= max_bytes
