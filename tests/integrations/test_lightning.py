"""A LightningModule under a budget by one line: losses, weights and checkpoints of the plain run."""

from __future__ import annotations

import doctest
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpuckpt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports are not ours
    L = pytest.importorskip("lightning", reason="lightning is not installed")

from gpuckpt.integrations.lightning import LightningBudget
from tests.pytorch.parallel.ranks import needs_ranks, on_ranks
from tests.pytorch.steps import Layer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n_steps|litlogger|dirpath has changed):UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

ROWS = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))


class Noted(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Sequential(Layer(), nn.Dropout(0.1)) for _ in range(8)))
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.model(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("checked", self.model(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def train(folder: Path, *callbacks: Any, resume: str | None = None, **options: Any) -> tuple[Noted, Any]:
    module = Noted()
    defaults = {"accelerator": "cpu", "devices": 1, "max_steps": 6, "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        **{**defaults, **options},
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_model_summary=False,
        accumulate_grad_batches=2,
    )
    data = torch.utils.data.DataLoader(ROWS, batch_size=4)
    torch.manual_seed(1)
    trainer.fit(module, data, data, ckpt_path=resume)
    return module, trainer


def same(ours: nn.Module, plain: nn.Module) -> bool:
    pairs = zip(ours.state_dict().values(), plain.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_line_trains_the_same_under_two_fifths(precision: str, tmp_path: Path) -> None:
    plain, _ = train(tmp_path / "plain", precision=precision)
    callback = LightningBudget("40%", repeats=1)
    ours, trainer = train(tmp_path / "ours", callback, precision=precision)
    assert len(ours.losses) == 12
    assert ours.losses == plain.losses
    assert same(ours, plain)
    assert callback.fitted is not None
    assert callback.fitted.budget.peak_bytes == callback.fitted.plan.certificate.peak_bytes
    assert callback.fitted.budget.peak_bytes <= callback.fitted.budget.max_bytes
    assert callback.fitted.plan.certificate.recompute_s > 0
    shown = trainer.progress_bar_metrics["saved_gib"]
    assert shown == pytest.approx(callback.fitted.budget.peak_bytes / 2**30, rel=1e-6)
    assert gpuckpt.fitted(ours.model) is None, "the model is given back"

    (saved,) = (tmp_path / "ours").rglob("*.ckpt")
    before = len(ours.losses)
    resumed, _ = train(
        tmp_path / "again", LightningBudget("40%", repeats=1), resume=str(saved), max_steps=8, precision=precision
    )
    expected, _ = train(tmp_path / "expected", resume=str(saved), max_steps=8, precision=precision)
    assert len(resumed.losses) == 4 < before
    assert resumed.losses == expected.losses
    assert same(resumed, expected)


def train_on_rank(rank: int, folder: str) -> list[Any]:
    """Losses of the plain run and of ours, whether their weights are equal, and the bytes of ours."""
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # asked for, and not used: the ranks have met
    found = []
    callback = LightningBudget("40%", repeats=1)
    for callbacks in ([], [callback]):
        strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
        module, trainer = train(Path(folder), *callbacks, devices=2, strategy=strategy, enable_checkpointing=False)
        assert trainer.world_size == 2
        assert (
            isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel) or trainer.strategy.model is module
        )
        found.append(module)
    fitted = callback.fitted
    assert fitted is not None
    assert fitted.plan.certificate.recompute_s > 0
    assert not fitted.deviations
    plain, ours = found
    weights = [parameter.tolist() for parameter in ours.parameters()]
    return [plain.losses, ours.losses, same(ours, plain), fitted.budget.peak_bytes, fitted.budget.max_bytes, weights]


@needs_ranks
def test_ddp_on_two_ranks(tmp_path: Path) -> None:
    ranks = on_ranks(train_on_rank, str(tmp_path), limit_s=120)
    for expected, ours, equal, peak_bytes, max_bytes, _ in ranks:
        assert len(expected) > 4
        assert ours == expected
        assert equal
        assert 0 < peak_bytes <= max_bytes
    assert ranks[0][0] != ranks[1][0], "each rank has batches of its own"
    assert ranks[0][-1] == ranks[1][-1], "and their gradients were averaged"


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"module='net': Noted has no such part; it has model"):
        train(tmp_path, LightningBudget("40%", module="net"))


def test_the_example_prints_what_it_says() -> None:
    import gpuckpt.integrations.lightning as module

    assert doctest.testmod(module) == (0, 1)
