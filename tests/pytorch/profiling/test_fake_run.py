"""Measuring without memory: the same chain as measuring in earnest, and models that no machine here could hold."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from gpuckpt import measure, plan_chain
from gpuckpt.cli.transformer import Config, Transformer
from gpuckpt.errors import InvalidChain
from gpuckpt.kernels.audit.roofline import DEVICES
from gpuckpt.kernels.audit.roofline import device as device_called
from gpuckpt.pytorch.profiling.clock import Roofline
from gpuckpt.pytorch.profiling.measure import run_measured
from gpuckpt.pytorch.profiling.sample import Sample, option_seconds
from gpuckpt.pytorch.profiling.stage_timing import StageKind


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.dropout(torch.relu(self.norm(self.conv(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, mask=None):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(16, 32)
        self.embed = nn.Embedding(32, 16)
        self.head.weight = self.embed.weight

    def forward(self, ids, mask):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, mask)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def models():
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (2, 24))
    ids = torch.randint(0, 32, (2, 8))
    return {
        "transformer": (Transformer(Config(layers=3, width=32, heads=2, context=24)), (tokens, tokens)),
        "gated": (Transformer(Config(layers=2, width=48, heads=2, context=24, activation="swiglu")), (tokens, tokens)),
        "convolutions": (nn.Sequential(*[Residual() for _ in range(4)]), (torch.randn(2, 4, 6, 6),)),
        "mask and tied weights": (Masked(), (ids, torch.ones(8, 8, dtype=torch.bool).tril())),
    }


@pytest.mark.parametrize("name", list(models()))
def test_the_same_chain_as_in_earnest(name: str) -> None:
    model, inputs = models()[name]
    real = measure(model, *inputs, repeats=1)
    fake = measure(model, *inputs, fake=True)
    assert fake.storages == real.storages
    assert fake.fingerprint() == real.fingerprint()
    assert [stage.workspace_bytes for stage in fake.stages] == [stage.workspace_bytes for stage in real.stages]
    assert all(stage.forward_s > 0 and stage.backward_s > 0 for stage in fake.stages[1:-1])


def test_the_model_is_only_looked_at() -> None:
    model, inputs = models()["convolutions"]
    parameters, state = dict(model.named_parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    buffers, rng = dict(model.named_buffers()), torch.get_rng_state()
    measure(model, *inputs, fake=True)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_model_on_the_meta_device() -> None:
    real_model, inputs = models()["gated"]
    with torch.device("meta"):
        model = Transformer(Config(layers=2, width=48, heads=2, context=24, activation="swiglu"))
    on_meta = inputs[0].to("meta")
    for given in (inputs, (on_meta, on_meta)):  # one tensor twice: one storage
        assert measure(model, *given, fake=True).fingerprint() == measure(real_model, *inputs).fingerprint()


def llama_70b(layers: int) -> tuple[Transformer, tuple[torch.Tensor, torch.Tensor]]:
    with torch.device("meta"):
        model = Transformer(Config(layers=layers, width=8192, heads=64, context=4096, activation="swiglu"))
        tokens = torch.zeros(1, 4096, dtype=torch.long)
    return model.to(torch.bfloat16), (tokens, tokens)


def test_a_model_of_many_gigabytes_is_planned_here() -> None:
    model, inputs = llama_70b(6)
    chain = measure(model, *inputs, fake=True, unit_bytes=512, device="H100 SXM")
    block = chain.stages[3]
    kept_bytes = chain.charge(block.saves)
    assert kept_bytes > 300 << 20
    # Two thirds of the GEMMs are the gated MLP's: 3 of (8192, 21845) against 4 of (8192, 8192) and attention.
    flops = 2 * 4096 * (3 * 8192 * 21845 + 4 * 8192 * 8192) + 4 * 4096 * 4096 * 8192
    assert flops / 989e12 < block.forward_s < 1.5 * flops / 989e12  # norms and residuals move bytes besides
    assert 2 * block.forward_s < block.backward_s < 3 * block.forward_s  # our MLP recomputes gate and up
    budget = plan_chain(chain, sum(chain.footprints)).certificate.peak_bytes // 2
    assert plan_chain(chain, budget).certificate.peak_bytes <= budget


@pytest.mark.slow
def test_eighty_blocks_of_a_70b_model_in_half_a_minute() -> None:
    model, inputs = llama_70b(80)
    began_s = time.process_time()  # of this process: other work on the machine does not count
    chain = measure(model, *inputs, fake=True, unit_bytes=512)
    elapsed_s = time.process_time() - began_s
    assert len(chain) == 82
    assert elapsed_s < 30, elapsed_s


def test_devices_differ_and_unknown_ones_are_refused() -> None:
    model, inputs = llama_70b(2)
    seconds = {
        name: measure(model, *inputs, fake=True, device=name).stages[1].forward_s for name in ("A100-80GB", "H100 SXM")
    }
    assert seconds["A100-80GB"] > 2 * seconds["H100 SXM"]
    with pytest.raises(ValueError, match="unknown device"):
        measure(model, *inputs, fake=True, device="abacus")


def test_a_model_that_is_no_chain_is_refused_and_left_whole() -> None:
    model = nn.Linear(4, 4)
    weight = model.weight
    with pytest.raises(InvalidChain):
        measure(model, torch.randn(2, 4), fake=True)
    assert model.weight is weight


def test_roofline_of_a_product_by_hand() -> None:
    device = DEVICES["H100 SXM"]
    a, b = torch.randn(64, 32), torch.randn(32, 16)
    with Roofline(device) as clock:
        torch.mm(a, b)
    assert clock.flops == 2 * 64 * 32 * 16
    moved_bytes = 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert clock.now() == max(clock.flops / device.flops_per_s["fp32"], moved_bytes / device.bytes_per_s)
    before = clock.now()
    with clock:
        a.t().view(32, 64)
    assert clock.now() == before


def test_a_stage_with_a_buffer_needs_no_contents_to_compare() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    model = nn.Sequential(*[Scaled() for _ in range(3)])
    x = torch.ones(4, 8)
    assert measure(model, x, fake=True).fingerprint() == measure(model, x).fingerprint()


def test_seconds_of_a_fused_loss_are_those_of_its_operands() -> None:
    """Its backward is given the gradient of the mean first: one float32, whose rate is none of the GEMMs'."""
    from gpuckpt.functional import linear_cross_entropy

    rows, width, vocab = 4096, 4096, 32768

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*[nn.Linear(width, width, dtype=torch.bfloat16, device="meta") for _ in range(2)])
            self.head = nn.Linear(width, vocab, bias=False, dtype=torch.bfloat16, device="meta")

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy(self.body(x), self.head.weight, target)

    x = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
    target = torch.empty(rows, dtype=torch.long, device="meta")
    last = measure(Loss(), x, target, fake=True).stages[-1]
    gemm_s = 2 * rows * width * vocab / 989e12
    assert gemm_s <= last.forward_s * (1 + 1e-9) < 1.5 * gemm_s  # the last digits of two times of a clock
    assert 3 * gemm_s <= last.backward_s < 4 * gemm_s


@pytest.mark.parametrize("name", list(models()))
def test_options_take_what_their_recomputes_take(name: str, monkeypatch) -> None:
    """Seconds of options are added up from one run; here the recomputes run, by the same clock."""
    ran: list[tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]] = []
    count = StageKind.count

    def counted(kind: StageKind, sample: Sample, clock: Roofline, *rest: Any, **options: Any) -> None:
        count(kind, sample, clock, *rest, **options)
        if sample.options:  # the first of the three turns takes checksums too
            ran.append((dict(kind.option_s), option_seconds(sample, lambda: None, clock, 3)))

    monkeypatch.setattr(StageKind, "count", counted)
    model, inputs = models()[name]
    run_measured(model, inputs, {}, 1, Roofline(device_called("H100 SXM")), 1)
    assert ran
    for added_up, timed in ran:
        assert added_up.keys() == timed.keys()
        for option, seconds in added_up.items():
            assert seconds == pytest.approx(timed[option], rel=1e-9, abs=1e-18)
