"""The ledger of a whole step against torch's own memory profiler, and predicted steps against the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gpuckpt.planning.device.optimizers import optimizer_called
from gpuckpt.planning.device.step_memory import StepMemory
from gpuckpt.pytorch.whole_device.step_ledger import StepLedger

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64)),
    "transformer": lambda: nn.Sequential(*[nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(3)]),
    "norms": lambda: nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.LayerNorm(64)),
}


def profiled_peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes that `run` had from the CPU's allocator at one time, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_the_peak_is_the_allocators(model: str, optimizer: str) -> None:
    torch.manual_seed(0)
    net = MODELS[model]()
    opt = OPTIMIZERS[optimizer](net.parameters())
    x = torch.randn(2, 32, 64)

    def step() -> None:
        net(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    step()
    ledger = StepLedger(net, opt)

    def watched() -> None:
        with ledger:
            step()

    assert ledger.storages == []
    most = profiled_peak_bytes(watched)
    assert ledger.peak_total_bytes() - ledger.before_bytes() == most
    assert most == profiled_peak_bytes(step)  # which the ledger does not change


def test_kinds_are_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.Tanh(), nn.Linear(20, 5, bias=False))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.ones(7, 10)
    for _ in range(2):
        with StepLedger(model, opt) as ledger:
            model(x).sum().backward()
            opt.step()
            opt.zero_grad()
    weights = 4 * (10 * 20 + 20 * 5)
    by_kind: dict[str, int] = {}
    for life in ledger.storages:
        by_kind[life.kind] = by_kind.get(life.kind, 0) + life.nbytes
    assert by_kind["parameter"] == by_kind["optimizer state"] == by_kind["gradient"] == weights
    assert by_kind["input"] == 4 * 7 * 10
    made = {(life.operator, life.module): life for life in ledger.storages if life.kind == "activation"}
    assert made["aten.tanh.default", "1"].nbytes == 4 * 7 * 20
    assert not ledger.storages[0].module
    assert "activation" in str(ledger)


def test_bytes_can_be_rounded_as_an_allocator_does() -> None:
    model = nn.Linear(3, 3)
    with StepLedger(model) as ledger:
        model(torch.ones(1, 3)).sum().backward()
    assert ledger.at_peak(512)["parameter"] == 2 * 512
    assert ledger.at_peak()["parameter"] == 4 * (9 + 3)


ZOO = ("bert-large", "gpt2-xl", "vit-huge", "llama-3-8b")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum", "in-backward"])
@pytest.mark.parametrize("name", [ZOO[0], *(pytest.param(each, marks=pytest.mark.slow) for each in ZOO[1:])])
def test_a_predicted_step_is_the_measured_one(name: str, optimizer: str) -> None:
    """Never less than was alive, and at most 1% more."""
    transformers = pytest.importorskip("transformers")
    from gpuckpt.pytorch.whole_device.hub_config import example_inputs
    from gpuckpt.pytorch.whole_device.hub_model import HubModel
    from tests.pytorch.whole_device.test_hub_model import small

    torch.manual_seed(0)
    hub = HubModel(small(name, 4), "fp32")
    context = 64 if hub.reads_tokens else None
    model = getattr(transformers, hub.name)._from_config(hub.config, dtype=torch.float32).train()
    inputs = {
        key: torch.randint(1, 900, each.shape) if each.dtype == torch.long else torch.randn(each.shape)
        for key, each in example_inputs(hub.whole, 2, context).items()
    }
    each = {p: OPTIMIZERS["adamw"]([p]) for p in model.parameters()}
    opt: Any = list(each.values()) if optimizer == "in-backward" else OPTIMIZERS[optimizer](model.parameters())

    def step_one(parameter: torch.Tensor) -> None:
        each[parameter].step()
        each[parameter].zero_grad()

    if optimizer == "in-backward":
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step_one)

    def step() -> None:
        model(**inputs).loss.backward()  # what else the model returned is gone by then
        if optimizer != "in-backward":
            opt.step()
            opt.zero_grad()

    step()
    with StepLedger(model, opt) as ledger:
        step()
    memory = StepMemory(
        hub.chain(2, context),
        hub.parameters,
        optimizer_called("adamw" if optimizer == "in-backward" else optimizer),
        buffers_bytes=hub.buffers_bytes(2, context),
        given=hub.given,
        in_backward=optimizer == "in-backward",
    )
    predicted = memory.plan(1 << 40, "none").peak_bytes - memory.set_aside_bytes
    alive = ledger.peak_total_bytes(512)
    assert alive <= predicted <= 1.01 * alive
    there = ledger.at_peak(512)
    assert there["parameter"] + there["optimizer state"] + there["input"] <= memory.resident_bytes
