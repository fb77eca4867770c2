"""`measure`: the bytes autograd saves, to the byte; times that make sense; nothing changed."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpuckpt import Chain, Keep, fit, measure, plan_chain, simulate
from gpuckpt.cli.transformer import Config, Transformer
from gpuckpt.errors import InvalidChain
from gpuckpt.nn import FusedMLP
from gpuckpt.pytorch.profiling.allocation_trace import LiveBytes
from tests.pytorch.beside_plain import plain_peak_bytes


class Mlp(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def test_bytes_of_a_chain_by_hand() -> None:
    chain = measure(nn.Sequential(Mlp(), Mlp(16, 32), Mlp()), torch.randn(4, 16))
    prefix, *stages, suffix = chain.stages
    assert [stage.name for stage in stages] == ["0", "1", "2"]
    # Each saves its input (4 x 16 x 4 bytes) for `up`, and tanh's output for tanh and `down`.
    sizes = [sorted(chain.storages[i] for i in stage.saves) for stage in stages]
    assert sizes == [[256, 1024], [256, 512], [256, 1024]]
    assert [stage.output_bytes for stage in stages] == [256] * 3
    assert stages[0].output == stages[1].inputs
    assert set(stages[1].inputs) <= set(stages[1].saves)
    assert prefix.saves == suffix.saves == ()
    assert not prefix.recomputable
    assert not suffix.recomputable


def test_inputs_are_given_as_to_fit() -> None:
    model = Transformer(Config(layers=2, width=32, heads=2, context=16))
    tokens = torch.randint(0, 256, (2, 16))
    wanted = measure(model, tokens, tokens).storages
    names = [*inspect.signature(model.forward).parameters]
    assert measure(model, (tokens, tokens)).storages == wanted
    assert measure(model, dict.fromkeys(names, tokens)).storages == wanted
    assert measure(model, **dict.fromkeys(names, tokens)).storages == wanted


def test_all_kept_is_what_a_plain_run_holds() -> None:
    model = Transformer(Config(layers=3, width=32, heads=2, context=16))
    tokens = torch.randint(0, 256, (2, 16))
    chain = measure(model, tokens, tokens)
    kept = simulate(chain, [Keep(i) for i in range(len(chain))]).peak_bytes
    assert kept == plain_peak_bytes(model, (tokens, tokens), {})


def test_the_unit_is_the_pools() -> None:
    model, x = nn.Sequential(Mlp(), Mlp()), torch.randn(3, 16)
    chain = measure(model, x, unit_bytes=512)
    assert chain.unit_bytes == 512
    assert chain.storages == measure(model, x).storages
    assert all(footprint % 512 == 0 for footprint in chain.footprints)


def test_a_fingerprint_is_the_same_every_time() -> None:
    torch.manual_seed(0)
    model = Transformer(Config(layers=3, width=32, heads=2, context=16))
    tokens = torch.randint(0, 256, (2, 16))
    chain = measure(model, tokens, tokens)
    assert measure(model, tokens, tokens).fingerprint() == chain.fingerprint()
    assert Chain.from_json(chain.to_json()) == chain


def test_stages_of_one_kind_share_their_times_and_others_do_not() -> None:
    model = nn.Sequential(*[Mlp(64, 256) for _ in range(4)], *[Mlp(64, 4096) for _ in range(2)])
    stages = measure(model, torch.randn(64, 64), repeats=3).stages[1:-1]
    for group in (stages[1:4], stages[4:]):  # the first stage's input needs no gradient: a kind of its own
        assert len({(stage.forward_s, stage.backward_s) for stage in group}) == 1
        assert group[0].forward_s > 0
        assert group[0].backward_s > 0
    assert stages[4].forward_s > 2 * stages[1].forward_s  # 16 times the work


def test_workspace_is_what_lives_between_operators() -> None:
    class Wide(nn.Module):
        """Forward and backward need `wide` for a moment; it is not saved."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            wide = x.repeat(10, 1)
            return self.linear(wide.unflatten(0, (10, -1)).sum(0))

    x = torch.randn(4, 16)
    stages = measure(nn.Sequential(Wide(), Wide()), x).stages
    assert stages[1].workspace_bytes == 2560
    # Two Mlps: dz of tanh (1024), with dy of the stage and dx counted by the planner.
    assert measure(nn.Sequential(Mlp(), Mlp()), x).stages[2].workspace_bytes == 2 * 1024


def test_the_head_and_its_loss_have_a_backward_and_workspace() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Mlp(), Mlp()])
            self.head = nn.Linear(16, 1000)

        def forward(self, x, y):
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.head(x), y)

    chain = measure(Model(), torch.randn(32, 16), torch.randint(0, 1000, (32,)))
    suffix = chain.stages[-1]
    logits_bytes = 32 * 1000 * 4
    assert suffix.workspace_bytes >= logits_bytes  # their gradient
    assert suffix.backward_s > 0
    total = plan_chain(chain, 10 * logits_bytes, objective="total").certificate
    assert total.total_peak_bytes > total.peak_bytes + logits_bytes


def test_measuring_changes_nothing() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)) for _ in range(3)])
    x = torch.randn(16, 8)
    (model(x).sum()).backward()
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    objects = {name: id(buffer) for name, buffer in model.named_buffers()}
    measure(model, x)
    assert all(
        p.grad is grad and torch.equal(grad, was) for p, (grad, was) in zip(model.parameters(), grads, strict=True)
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == objects
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module._compiled_call_impl is None for module in model.modules())


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    layers = [(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for _ in range(10)]
    return nn.Sequential(*[layer for three in layers for layer in three]), torch.randn(4, 8, 32, 32)


def nested_sequentials() -> tuple[nn.Module, torch.Tensor]:
    """Of which the blocks and their layers are calls that might be stages."""
    inner = [nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)) for _ in range(16)]
    return nn.Sequential(*inner), torch.randn(256, 64)


def plain_blocks() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*[Mlp(64, 512) for _ in range(16)]), torch.randn(256, 64)


@pytest.mark.parametrize("build", [convolutions, nested_sequentials, plain_blocks])
def test_fit_itself_needs_the_memory_of_a_few_stages_not_of_all(build) -> None:
    """A model that does not fit into memory plainly is measured all the same."""
    model, x = build()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def live_bytes(run) -> int:
        live = LiveBytes()
        with live:
            run()
        return live.peak_bytes(0, live.mark(), set())

    plain_bytes = live_bytes(lambda: model(x).sum().backward())
    assert live_bytes(lambda: fit(model, x, "1GiB")) < 0.5 * plain_bytes


def test_an_error_of_the_model_comes_through_and_leaves_it_whole() -> None:
    model = nn.Sequential(Mlp(), Mlp(), nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match="running_mean should contain"):
        measure(model, torch.randn(4, 16))
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert not model[2].running_mean.any()


def test_sparse_saved_tensors_count_by_their_parts() -> None:
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return torch.sparse.mm(torch.eye(4).to_sparse_coo(), x @ self.weight)

    chain = measure(nn.Sequential(Sparse(), Sparse()), torch.randn(4, 16))
    sizes = [chain.storages[number] for number in chain.stages[1].saves]
    assert sorted(sizes) == [4 * 4, 2 * 4 * 8, 4 * 16 * 4]  # values, indices, and the input of the dense product


def test_costs_that_make_no_sense_are_refused() -> None:
    chain = measure(nn.Sequential(Mlp(), Mlp()), torch.randn(4, 16))
    for field in ("forward_s", "backward_s"):
        for value in (float("nan"), float("inf"), -1.0):
            stage = dataclasses.replace(chain.stages[1], **{field: value})
            with pytest.raises(InvalidChain, match=field):
                dataclasses.replace(chain, stages=(chain.stages[0], stage, *chain.stages[2:]))


class Pair(nn.Module):
    """One stage of two steps."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_the_tail_is_what_a_recompute_is_spared() -> None:
    """By the roofline's clock, to the second: a product saves its operands first, a ReLU its result last."""
    model = nn.Sequential(
        nn.Linear(64, 64),
        Pair(nn.ReLU(), nn.Linear(64, 64)),
        Pair(nn.Linear(64, 64), nn.ReLU()),
        Pair(nn.Linear(64, 64), FusedMLP(64, 256)),
        FusedMLP(64, 256),
        nn.Softshrink(0.5),
    )
    stages = measure(model, torch.randn(32, 64), fake=True).stages[1:-1]
    linear, relu_linear, linear_relu, linear_mlp, mlp, _ = stages
    assert linear.tail_s == linear.forward_s > 0
    assert relu_linear.tail_s == pytest.approx(linear.forward_s)
    assert relu_linear.forward_s > relu_linear.tail_s
    assert linear_relu.tail_s == 0
    assert mlp.tail_s == mlp.forward_s
    assert linear_mlp.tail_s == pytest.approx(mlp.forward_s)
    assert linear_mlp.forward_s == pytest.approx(linear.forward_s + mlp.forward_s)


def test_a_stage_that_saves_nothing_need_not_run_again() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Flatten(0), nn.Unflatten(0, (4, 8)), nn.Linear(8, 8))
    for stage in measure(model, torch.randn(4, 8)).stages[2:4]:
        assert stage.saves == ()
        assert stage.tail_s == stage.forward_s


def test_the_tail_of_joined_calls_is_that_of_the_last() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.ReLU(inplace=True))
    apart = nn.Sequential(Pair(nn.Linear(64, 64), nn.ReLU()), Pair(nn.Linear(64, 64), nn.ReLU()))
    x = torch.randn(32, 64)
    assert [stage.tail_s for stage in measure(model, x, fake=True).stages] == [0.0] * 4
    assert [stage.tail_s for stage in measure(apart, x, fake=True).stages] == [0.0] * 4


def test_gradients_of_a_stage_come_on_top_of_its_workspace() -> None:
    """A linear's backward makes both gradients at once; a wide activation is gone before the weight's is there."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            return self.up(x).repeat(1, 500).tanh()[:, :8]

    linear = measure(nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), torch.ones(4, 8))
    assert [stage.gradients_bytes for stage in linear.stages[1:-1]] == [4 * (64 + 8)] * 3
    wide = measure(nn.Sequential(*[Wide() for _ in range(3)]), torch.ones(4, 8))
    assert [stage.gradients_bytes for stage in wide.stages[1:-1]] == [0] * 3
    assert all(stage.workspace_bytes >= 4 * 4 * 8 * 500 for stage in wide.stages[1:-1])
