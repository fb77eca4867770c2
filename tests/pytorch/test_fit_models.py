"""`fit` on models of every build: bit for bit the plain run, and the bytes that were promised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpuckpt import CheckpointBudget, SavedTensorModified, fit
from gpuckpt.cli.transformer import Config, Transformer
from gpuckpt.planning import Recompute
from tests.pytorch.beside_plain import beside_plain, plain_peak_bytes


def recomputed(fitted) -> int:
    """How many stages run more than once."""
    from gpuckpt import simulate

    return sum(count > 1 for count in simulate(fitted.chain, fitted.plan.tree).forward_counts)


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *more, scale=None):
        h = F.gelu(self.up(self.norm(x)))
        for extra in more:
            h = h * extra.sum()
        if scale is not None:
            h = h * scale
        return x + self.dropout(self.down(h))


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_sequential_of_blocks() -> None:
    fitted = beside_plain(nn.Sequential(*[Block(16) for _ in range(8)]), rows(4, 16))
    assert recomputed(fitted) >= 3


def test_sequential_of_plain_layers() -> None:
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())]
    assert recomputed(beside_plain(nn.Sequential(*layers), rows(32, 16))) >= 3


def test_twelve_blocks_under_forty_percent_of_the_plain_peak() -> None:
    model = Transformer(Config(layers=12, width=32, heads=2, context=24))
    tokens = torch.randint(0, 256, (2, 24))
    fitted = beside_plain(model, tokens, tokens, share=0.4)
    assert recomputed(fitted) >= 4
    assert any(isinstance(node, Recompute) for node in fitted.plan.tree)


@pytest.mark.parametrize("strategy", ["every", "sqrt", "uniform", "revolve", "optimal"])
def test_every_strategy(strategy: str) -> None:
    model = Transformer(Config(layers=7, width=32, heads=2, context=16))
    tokens = torch.randint(0, 256, (2, 16))
    beside_plain(model, tokens, tokens, share=0.6, fit_options={"strategy": strategy}, steps=1)


def test_smallest_budget_of_all() -> None:
    fitted = beside_plain(nn.Sequential(*[Block(16) for _ in range(9)]), rows(4, 16), share=None)
    assert fitted.budget.max_bytes == fitted.plan.certificate.smallest_budget_bytes


class WithExtras(nn.Module):
    """Blocks that share a mask, and each get a scale of their own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, dropout) for _ in range(6))
        self.scales = nn.Parameter(torch.linspace(0.5, 1.0, 6))

    def forward(self, x, mask):
        x = x * 2
        for i, block in enumerate(self.blocks):
            x = block(x, mask, scale=self.scales[i].exp())
        return x.square().mean()


def test_extra_arguments_shared_and_differing() -> None:
    beside_plain(WithExtras(), rows(4, 16), rows(300, seed=1))


def test_extra_argument_that_needs_a_gradient() -> None:
    x, mask = rows(4, 16).requires_grad_(), rows(10, seed=1).requires_grad_()
    model = WithExtras()
    out = model(x, mask)
    expected = torch.autograd.grad(out, [x, mask])
    fitted = fit(model, (x, mask), int(0.5 * plain_peak_bytes(model, (x, mask), {})))
    got = torch.autograd.grad(fitted(x, mask), [x, mask])
    assert all(map(torch.equal, got, expected))
    assert recomputed(fitted)
    assert fitted.budget.used_bytes == 0


class Pair(nn.Module):
    """Takes and returns a tuple of two streams; the second passes through every other block untouched."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.block = Block(16)
        self.mixes = mixes

    def forward(self, streams):
        a, b = streams
        return self.block(a + b), (torch.sin(b) if self.mixes else b)


def test_tuples_between_blocks() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[Pair(i % 2 == 0) for i in range(7)])

        def forward(self, x, y):
            a, b = self.blocks((x * 1.5, y * 0.5))
            return (a * b).sum()

    assert recomputed(beside_plain(Model(), rows(4, 16), rows(4, 16, seed=1), share=0.5))


class Nested(nn.Module):
    """Containers of containers, as vision models are built."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(*[nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3)])
            for _ in range(3)
        )

    def forward(self, x):
        for level in self.levels:
            x = level(x)
        return x


def test_nested_containers() -> None:
    assert recomputed(beside_plain(Nested(), rows(8, 16)))


def test_tied_blocks_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            block = Block(16)
            self.token = nn.Embedding(32, 16)
            self.blocks = nn.ModuleList([block, Block(16), block, Block(16), block, block])
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.token.weight

        def forward(self, ids):
            x = self.token(ids)
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())

    assert recomputed(beside_plain(Tied(), torch.randint(0, 32, (3, 8)), share=0.5))


def test_dropout_recomputes_with_the_same_random_numbers() -> None:
    beside_plain(WithExtras(dropout=0.3), rows(4, 16), rows(30, seed=1))


def test_autocast() -> None:
    def around():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    model = Transformer(Config(layers=6, width=32, heads=2, context=16))
    tokens = torch.randint(0, 256, (2, 16))
    fitted = beside_plain(model, tokens, tokens, share=0.5, around=around)
    assert recomputed(fitted)
    # Planned again without autocast: other bytes.
    model(tokens, tokens)
    assert len(fitted._maker.plans) == 2


def test_autocast_of_layers_before_the_first_block() -> None:
    class Stemmed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(16, 16)
            self.blocks = nn.ModuleList(Block(16) for _ in range(5))

        def forward(self, x):
            x = torch.tanh(self.stem(x))
            for block in self.blocks:
                x = block(x)
            return x

    def around():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    beside_plain(Stemmed(), rows(8, 16), share=0.7, around=around)


def test_autocast_with_tied_blocks_promises_no_less_than_it_holds() -> None:
    block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([block] * 6)

        def forward(self, x):
            for each in self.blocks:
                x = each(x)
            return x

    def around():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    beside_plain(Model(), rows(8, 16), share=0.9, around=around, exact=False)


class ConvBlock(nn.Module):
    def __init__(self, momentum: float | None = 0.1, inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, momentum=momentum)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x):
        return x + self.act(self.norm(self.conv(x)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_statistics_are_updated_once(momentum: float | None) -> None:
    model = nn.Sequential(*[ConvBlock(momentum) for _ in range(6)])
    fitted = beside_plain(model, rows(2, 4, 6, 6))
    assert recomputed(fitted) >= 2
    assert model[0].norm.num_batches_tracked == 3


def test_in_place_activations_inside_blocks() -> None:
    assert recomputed(beside_plain(nn.Sequential(*[ConvBlock(inplace=True) for _ in range(6)]), rows(2, 4, 6, 6)))


@pytest.mark.parametrize("share", [None, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("host", [None, "1MiB"])
def test_in_place_activations_between_layers_are_one_stage_with_what_they_change(share, host) -> None:
    layers = [layer for _ in range(5) for layer in (nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 16))]
    options = {"host_budget": host}
    fitted = beside_plain(nn.Sequential(*layers), rows(8, 16), share=share, fit_options=options)
    names = [stage.name for stage in fitted.chain.stages[1:-1]]
    assert names == [name for i in range(0, 15, 3) for name in (f"{i}+{i + 1}", str(i + 2))]
    assert all(stage.recomputable for stage in fitted.chain.stages[1:-1])
    if host is None:
        assert recomputed(fitted) or share == 1.0


def test_a_vgg_with_in_place_activations_and_dropout_runs_in_its_smallest_budget() -> None:
    layers: list[nn.Module] = []
    for width, last in ((3, 8), (8, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(width, last, 3, padding=1), nn.BatchNorm2d(last), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if width == last else []
    head = [nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(32, 10)]
    fitted = beside_plain(nn.Sequential(*layers, *head), rows(2, 3, 8, 8), share=None)
    names = [stage.name for stage in fitted.chain.stages]
    assert {"1+2", "4+5", "8+9", "11+12", "16+17"} <= set(names)
    assert all(stage.recomputable for stage in fitted.chain.stages[1:-1])
    assert recomputed(fitted) > 5


class Seen(nn.Module):
    """Its input, as another tensor of the same storage."""

    def forward(self, x):
        return x.view_as(x)


def test_what_is_changed_in_place_through_a_view_is_one_stage_with_who_made_it() -> None:
    def piece():
        return nn.Linear(16, 16), Seen(), nn.ReLU(inplace=True), nn.Linear(16, 16)

    fitted = beside_plain(nn.Sequential(*piece(), *piece(), *piece()), rows(8, 16), share=None)
    names = [stage.name for stage in fitted.chain.stages[1:-1]]
    assert names == ["0+1+2", "3", "4+5+6", "7", "8+9+10", "11"]
    assert recomputed(fitted) > 1


@pytest.mark.parametrize(
    ("first", "name", "recomputable"),
    [(Seen, "body.0+body.1", False), (nn.Identity, "body.1", False), (nn.Dropout, "body.0+body.1", True)],
)
def test_what_is_changed_in_place_in_front_of_the_chain_is_kept(first, name: str, recomputable: bool) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(16, 16)
            self.body = nn.Sequential(first(), nn.ReLU(inplace=True), Block(16), Block(16), Block(16), Block(16))

        def forward(self, x):
            return self.body(self.stem(x))

    fitted = beside_plain(Model(), rows(8, 16), share=0.6)
    stages = {stage.name: stage.recomputable for stage in fitted.chain.stages}
    expected = {"prefix": False, name: recomputable, "suffix": False}
    assert stages == expected | {f"body.{i}": True for i in range(2, 6)}
    assert recomputed(fitted)


def test_spectral_norm_is_recomputed_with_the_vectors_that_it_had() -> None:
    def layer():
        return nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))

    model = nn.Sequential(layer(), Block(16), Block(16), layer(), Block(16), Block(16))
    fitted = beside_plain(model, rows(8, 16), share=0.7)
    stages = {stage.name: stage.recomputable for stage in fitted.chain.stages}
    assert all(stages[str(i)] for i in range(6))
    assert recomputed(fitted)


def test_measuring_leaves_a_buffer_that_is_replaced() -> None:
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.register_buffer("mean", torch.zeros(16))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return torch.tanh(self.linear(x - self.mean))

    model = nn.Sequential(Average(), Block(16), Average(), Block(16), Block(16))
    before = model[0].mean
    fitted = fit(model, rows(8, 16), 1 << 20)
    assert model[0].mean is before
    assert not before.any()
    assert all(stage.recomputable for stage in fitted.chain.stages[1:6])
    fitted.unfit()
    beside_plain(model, rows(8, 16), share=0.8)


def test_eval_mode_is_planned_by_itself() -> None:
    model = nn.Sequential(*[ConvBlock() for _ in range(6)])
    x = rows(2, 4, 6, 6)
    fitted = beside_plain(model, x)
    model.eval()
    expected = [p.clone() for p in model.state_dict().values()]
    loss = model(x).square().sum()
    assert len(fitted._maker.plans) == 2
    loss.backward()
    fitted.check_promise()
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
    assert all(map(torch.equal, model.state_dict().values(), expected))


@pytest.mark.parametrize("freeze", ["first half", "every other", "all but the head"])
def test_frozen_parameters(freeze: str) -> None:
    model = Transformer(Config(layers=6, width=32, heads=2, context=16))
    for i, block in enumerate(model.blocks):
        frozen = {"first half": i < 3, "every other": i % 2 == 0, "all but the head": True}[freeze]
        block.requires_grad_(not frozen)
    if freeze != "every other":
        model.token.requires_grad_(False)
        model.place.requires_grad_(False)
    tokens = torch.randint(0, 256, (2, 16))
    fitted = beside_plain(model, tokens, tokens, share=1.0 if freeze == "all but the head" else 0.8)
    if freeze == "all but the head":
        assert all(not stage.saves for stage in fitted.chain.stages[1:7])


def test_inputs_that_train_and_inputs_that_do_not() -> None:
    model = nn.Sequential(*[Block(16) for _ in range(6)])
    for trained in (False, True):
        x = rows(4, 16).requires_grad_(trained)
        fitted = fit(model, x, 40_000)
        model(x).sum().backward()
        assert (x.grad is not None) == trained
        assert fitted.budget.used_bytes == 0
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
        fitted.unfit()


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_both_ways_to_hold(hold: str) -> None:
    model = Transformer(Config(layers=6, width=32, heads=2, context=16))
    tokens = torch.randint(0, 256, (2, 16))
    beside_plain(model, tokens, tokens, share=0.6, fit_options={"hold": hold})


def test_a_budget_that_others_use_as_well() -> None:
    model = nn.Sequential(*[Block(16) for _ in range(6)])
    x = rows(4, 16)
    budget = CheckpointBudget(1 << 20, device="cpu")
    budget.allocate(1000)
    fitted = fit(model, x, budget)
    for _ in range(2):
        model(x).sum().backward()
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
        assert budget.used_bytes == 1000


class ChangedBetween(nn.Module):
    """Blocks between which the outer forward changes something in place."""

    def __init__(self, change) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(6))
        self.shift = nn.Parameter(torch.linspace(-1, 1, 16))
        self.change = change

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in (1, 2, 4):
                self.change(self, x)
        return x.square().mean()


def _mask_fill(model, x):
    x.masked_fill_(x > 1, 0.5)


def _write_a_row(model, x):
    x[0] = model.shift


def _through_a_view(model, x):
    x.view(-1)[::3].mul_(1.5)


def _add_a_parameter(model, x):
    x += model.shift


@pytest.mark.parametrize("change", [_add_a_parameter, _mask_fill, _write_a_row, _through_a_view])
@pytest.mark.parametrize("share", [None, 0.6])
def test_what_the_outer_forward_changes_in_place_between_blocks(change, share) -> None:
    beside_plain(ChangedBetween(change), rows(4, 16), share=share)


class Shifted(nn.Module):
    """Blocks that all get one tensor, which changes in place between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(6))

    def forward(self, x):
        scale = torch.ones(4)
        for block in self.blocks:
            x = block(x, scale)
            scale += 0.5
        return x.square().mean()


def test_an_argument_of_all_blocks_that_is_changed_between_them() -> None:
    beside_plain(Shifted(), rows(4, 16), share=0.7, fit_options={"hold": "pool"}, exact=False)


def test_an_argument_that_is_changed_between_blocks_cannot_stay_where_it_is() -> None:
    fitted = fit(Shifted(), rows(4, 16), "1MiB")
    fitted.unfit()
    fitted = fit(fitted.model, rows(4, 16), fitted.plan.certificate.smallest_budget_bytes)
    with pytest.raises(SavedTensorModified, match="hold='pool'"):
        fitted(rows(4, 16)).backward()
    assert fitted.budget.used_bytes == 0
