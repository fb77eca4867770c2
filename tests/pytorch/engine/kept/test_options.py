"""Options inside of blocks: plans that keep a part of a stage hold to the byte what they promise, gradients bitwise."""

from __future__ import annotations

import ctypes
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpuckpt import Chain, CheckpointBudget, InvalidPlan, Keep, Recompute, fit, measure, once, plan_chain
from gpuckpt.planning import Node, tree_text
from gpuckpt.planning.planner import certify
from gpuckpt.pytorch.engine.kept.current import recording
from gpuckpt.pytorch.engine.kept.flow import Flow
from gpuckpt.pytorch.engine.kept.options import KeptPart, is_option, option_name, part_of
from gpuckpt.pytorch.engine.kept.parts import keeping_part
from gpuckpt.pytorch.engine.kept.record import Record
from tests.pytorch.steps import bits

D = 16


class Attention(nn.Module):
    """A decoder's block with a mask that all blocks share: (B, T, D) -> (B, T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D, bias=False)
        self.gate, self.up, self.down = (nn.Linear(D, 3 * D), nn.Linear(D, 3 * D), nn.Linear(3 * D, D))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q.sin(), k.cos(), v, attn_mask=mask)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(D, D), nn.Linear(D, 4)
        self.blocks = nn.ModuleList(Attention() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1]).tril().log()
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x).logsumexp(-1).square().sum()


class Convolutions(nn.Module):
    """(B, C, L) -> (B, C, L); the activation changes what the convolution put out."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv1d(4, 12, 3, padding=1), nn.Conv1d(12, 4, 1)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.norm(F.relu(self.wide(x), inplace=True)).tanh()).sin()


class Chosen(nn.Module):
    """Its experts are decided once; what they put out is squared twice: (B, D) -> (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 4), nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).tanh()
        chosen = once(lambda: (scores + torch.rand_like(scores)).argmax(-1, keepdim=True))
        out = torch.stack([expert(x).square().sin() for expert in self.experts], 1)
        return x + out.gather(1, chosen[..., None].expand(-1, 1, D))[:, 0] * scores.gather(-1, chosen)


class Skips(nn.Module):
    """Later blocks are given what earlier ones put out."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(x)) * self.up(skip)).sigmoid()

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Skips.Block() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x * 1, x * 2]
        for block in self.blocks:
            outputs.append(block(outputs[-1], outputs[-2]))
        return outputs[-1].square().sum()


class Bfloat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "decoder": (Decoder, rows(2, 6, D)),
    "convolutions": (lambda: nn.Sequential(*(Convolutions() for _ in range(4))), rows(2, 4, 10)),
    "chosen": (lambda: nn.Sequential(*(Chosen() for _ in range(4))), rows(5, D)),
    "skips": (Skips, rows(5, D)),
    "bfloat16": (Bfloat, rows(2, 6, D)),
}


def random_nodes(generator: random.Random, chain: Chain, first: int, last: int, depth: int = 0) -> tuple[Node, ...]:
    """Stages first..last, framed at random, each kept under a random option."""
    nodes: list[Node] = []
    while first <= last:
        end = first
        while end < last and chain.stages[end + 1].recomputable and generator.random() < 0.6:
            end += 1
        if chain.stages[first].recomputable and depth < 3 and generator.random() < 0.5:
            nodes.append(Recompute(random_nodes(generator, chain, first, end, depth + 1)))
        else:
            end = first
            nodes.append(Keep(first, generator.choice(chain.stages[first].options).name))
        first = end + 1
    return tuple(nodes)


def train(model: Any, x: Tensor) -> list[Any]:
    torch.manual_seed(4)
    for parameter in model.parameters():
        parameter.grad = None
    loss = model(x).square().sum()
    loss.backward()
    return bits([loss, *(parameter.grad for parameter in model.parameters()), torch.rand(3)])


def trained(name: str) -> tuple[nn.Module, Tensor, list[bytes | None]]:
    """A model as it was before its first step, what it is given, and what a plain step leaves."""
    make, x = MODELS[name]
    torch.manual_seed(3)
    model = make()
    expected = train(model, x)
    model.apply(lambda module: module.reset_running_stats() if isinstance(module, nn.BatchNorm1d) else None)
    return model, x, expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("hold", ["account", "pool"])
def test_random_plans_hold_what_they_promise(name: str, hold: str) -> None:
    model, x, expected = trained(name)
    generator, met = random.Random(5), Counter()
    chain = fit(model, x, CheckpointBudget("1MiB", device="cpu", hold=hold), repeats=1).chain
    for _ in range(14):
        tree = random_nodes(generator, chain, 0, len(chain) - 1)
        met.update(["kept"] * tree_text(tree).count("kept-"))
        met.update(["halves"] * tree_text(tree).count("/"))
        plan = certify(chain, tree, 1 << 20, "by hand")
        budget = CheckpointBudget(plan.certificate.peak_bytes, device="cpu", hold=hold)
        fitted = fit(model, x, budget, plan=plan, strict=True, repeats=1)
        assert train(fitted, x) == expected, tree_text(tree)
        assert budget.peak_bytes == plan.certificate.peak_bytes, tree_text(tree)
        assert budget.used_bytes == 0
        assert fitted.plan.tree == tree
    fitted.unfit()
    assert met["kept"] or name == "skips", met  # what a later stage is given is held as it is
    assert met["halves"] or name not in ("decoder", "bfloat16"), met


def test_what_is_offered() -> None:
    """What holds more makes less again; in halves one half is held at a time."""
    torch.manual_seed(0)
    chain = measure(Decoder(), rows(2, 6, D))
    for stage in chain.stages[1:5]:
        shared = {*stage.inputs, *stage.extras}
        at_once = [variant for variant in stage.variants if not part_of(variant.name).cut]
        assert 2 <= len(at_once) <= 8
        held = [chain.charge(variant.saves) for variant in at_once]
        assert held == sorted(held, reverse=True)
        for variant in at_once:
            assert shared <= set(variant.saves)
            assert set(variant.remade) == set(stage.saves) - set(variant.saves)
            assert chain.charge(variant.saves) < chain.charge(stage.saves)
        for variant in set(stage.variants) - set(at_once):
            same = next(each for each in at_once if part_of(each.name).kept == part_of(variant.name).kept)
            assert variant.saves == same.saves
            assert {*variant.remade, *variant.remade_later} == set(same.remade)
            assert max(chain.charge(variant.remade), chain.charge(variant.remade_later)) <= 0.8 * chain.charge(
                same.remade
            )
    assert any(part_of(variant.name).cut for stage in chain.stages for variant in stage.variants)


def test_names() -> None:
    assert part_of(option_name([12, 3], 0)) == ({3, 12}, 0, False)
    assert part_of(option_name([3], 20)) == ({3}, 20, False)
    assert part_of("kept-3+7/20@host") == ({3, 7}, 20, True)
    assert [
        name
        for name in ("kept-3+12", "kept-3/20", "kept-3@host", "kept-", "kept-3/", "kept-a", "keep", "kept-٣", "kept-3@")
        if is_option(name)
    ] == ["kept-3+12", "kept-3/20", "kept-3@host"]


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.count[op._schema.name] += 1
        return op(*args, **(kwargs or {}))


def test_what_is_kept_does_not_run_again_nor_what_only_that_needs() -> None:
    torch.manual_seed(0)
    model, x = Decoder(), rows(2, 6, D)
    chain = fit(model, x, "1MiB").chain

    def count(option: str) -> Counter[str]:
        tree = (Keep(0), *(Keep(stage, option) for stage in range(1, 5)), Keep(5))
        fitted = fit(model, x, "1MiB", plan=certify(chain, tree, 1 << 20, "by hand"))
        for _ in range(2):  # the first notes what the second follows
            loss = fitted(x)
            with Products() as ran:
                loss.backward()
        return ran.count

    kept = count("keep")
    options = [variant.name for variant in chain.stages[2].variants if not part_of(variant.name).cut]
    most, *_, least = [count(option) for option in options]
    assert most["aten::addmm"] == kept["aten::addmm"]
    assert most["aten::mm"] <= kept["aten::mm"] + 4  # for the sake of a dropout's mask
    assert least["aten::addmm"] > kept["aten::addmm"]
    assert least["aten::addmm"] <= kept["aten::addmm"] + 4 * 4  # not the last of a block, after which nothing is saved


def test_planned_budgets_use_them() -> None:
    """Where products are what takes time, as they are at sizes that matter."""
    torch.manual_seed(0)
    model, x = Decoder(), rows(2, 6, D)
    expected = train(model, x)
    fitted = fit(model, x, "1MiB")
    chain, peak_bytes = fitted.chain, fitted.plan.certificate.peak_bytes
    stages = []
    for stage in chain.stages:
        of_stage = chain.charge(stage.saves)
        variants = [(variant, 9.0 * (1 - chain.charge(variant.saves) / of_stage) ** 2) for variant in stage.variants]
        variants = [replace(v, forward_s=10.0, backward_s=20.0 + again_s, again_s=again_s) for v, again_s in variants]
        stages.append(replace(stage, forward_s=10.0, backward_s=20.0, tail_s=1.0, variants=tuple(variants)))
    timed = replace(chain, stages=tuple(stages))
    plain = replace(timed, stages=tuple(replace(stage, variants=()) for stage in stages))
    used: Counter[str] = Counter()
    for percent in (50, 60, 70, 80, 90):
        max_bytes = peak_bytes * percent // 100
        plan = plan_chain(timed, max_bytes)
        fitted = fit(model, x, max_bytes, plan=plan, strict=True)
        assert train(fitted, x) == expected
        assert fitted.measured_peak_bytes == fitted.promised_peak_bytes <= max_bytes
        assert plan.certificate.recompute_s <= plan_chain(plain, max_bytes).certificate.recompute_s
        used.update(["kept"] * ("kept-" in tree_text(plan.tree)))
    assert used["kept"] >= 3


def test_an_option_that_is_none() -> None:
    model, x = Decoder(), rows(2, 6, D)
    chain = fit(model, x, "1MiB").chain
    with pytest.raises(InvalidPlan):
        certify(chain, (*(Keep(n, "kept-999" if n == 2 else "keep") for n in range(6)),), 1 << 20, "by hand")


class Odd(nn.Module):
    """A block whose data flows where no operation shows it, or otherwise from step to step: (B, D) -> (B, D)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, [0]
        self.one, self.two, self.three = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.one(x).sin(), self.two(x).cos()
        if self.kind == "read behind torch's back":
            z = z * float(y.detach().numpy().sum())
        elif self.kind == "integers that Python reads":
            z = z * (1 + y.detach().abs().mul(10).long().sum(0).tolist()[0] / 100)
        elif self.kind == "sizes that Python reads":
            count = y.detach().gt(0).sum(0).tolist()[0]
            z = torch.cat([part * n for n, part in enumerate(z.split([count, len(z) - count]), 1)])
        elif self.kind == "written behind torch's back":
            made = torch.empty_like(y.detach())
            made.numpy()[:] = y.detach().numpy() * 2
            z = z * made
        elif self.kind == "other operations in later steps":
            z = z.tanh() if os.environ["GPUCKPT_TEST_STEP"] == "1" else z.exp()
        elif self.kind == "other tensors in later steps":
            y, z = (z, y) if os.environ["GPUCKPT_TEST_STEP"] == "1" else (y, z)
            z = (z + y.sigmoid()).tanh() * z
        elif self.kind == "differentiates inside" or (
            self.kind == "differentiates inside in later steps" and os.environ["GPUCKPT_TEST_STEP"] == "1"
        ):
            with torch.enable_grad():
                (inner,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            z = z * inner
        return x + self.three(y.square() * z.tanh()).sin()


@pytest.mark.parametrize(
    "kind",
    [
        "read behind torch's back",
        "integers that Python reads",
        "sizes that Python reads",
        "written behind torch's back",
        "other operations in later steps",
        "other tensors in later steps",
        "differentiates inside",
        "differentiates inside in later steps",
    ],
)
def test_what_no_operation_shows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Odd(kind) for _ in range(4))), rows(6, D).requires_grad_()
    plain = []
    for step in ("0", "1", "1", "0"):
        monkeypatch.setenv("GPUCKPT_TEST_STEP", step)
        plain.append(train(model, x))
    monkeypatch.setenv("GPUCKPT_TEST_STEP", "0")
    chain = measure(model, x)
    names = list(dict.fromkeys(variant.name for stage in chain.stages for variant in stage.variants))
    for name in names:
        tree = [
            Keep(n, name if name in [v.name for v in stage.variants] else "keep")
            for n, stage in enumerate(chain.stages)
        ]
        monkeypatch.setenv("GPUCKPT_TEST_STEP", "0")
        fitted = fit(model, x, "1MiB", plan=certify(chain, tree, 1 << 20, "by hand"))
        for step, expected in zip(("0", "1", "1", "0"), plain, strict=True):
            monkeypatch.setenv("GPUCKPT_TEST_STEP", step)
            assert train(fitted, x) == expected, name
            assert fitted.budget.used_bytes == 0
        fitted.unfit()
    assert names or kind in ("differentiates inside", "read behind torch's back", "written behind torch's back")


class Reads(nn.Module):
    """Multiplies by a number that Python reads out of what the block made."""

    def __init__(self, read: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.read = read
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        largest = (100 * h.detach().abs().amax(0)).long()
        return x + self.down((torch.tanh(h) * (1 + self.read(largest) / 1000)).sin())


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.tolist()[0],
        lambda t: int(t.numpy()[0]),
        lambda t: int(np.asarray(t)[0]),
        lambda t: int(np.from_dlpack(t)[0]),
        lambda t: ctypes.c_int64.from_address(t.data_ptr()).value,
        lambda t: t.untyped_storage()[0],
    ],
    ids=["tolist", "numpy", "asarray", "dlpack", "data_ptr", "storage"],
)
def test_numbers_that_python_reads_are_not_those_of_memory_left_as_it_was(read):
    """What stands for an operation that is left out has any contents: no operator says that Python looked at them."""
    for number, block in enumerate((Reads(read), Reads(lambda t: 3), Reads(lambda t: int(t[0])))):
        flow, record, x = Flow(), Record().begin(), torch.randn(8, D)
        flow.begin([x, *block.parameters()])
        with recording(record), keeping_part(record, KeptPart(frozenset()), flow, [], known=False):
            block(x)
        assert len(flow.ran) > 10
        assert flow.seen == bool(number), "an operator that hands out a number is seen, and always runs"


def test_what_is_made_like_a_tensor_needs_nothing_of_it() -> None:
    """Noise of dropout has the shape of what is dropped, which does not run again for it."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.dropout(self.up(x).sin(), 0.3, True)
            return x + torch.dropout(self.down(y), 0.5, True) * torch.ones_like(y)

    torch.manual_seed(2)
    model, x = nn.Sequential(*(Drops() for _ in range(4))), rows(5, D)
    expected = train(model, x)
    chain = fit(model, x, "1MiB", repeats=1).chain
    least = [min(s.variants, key=lambda o: chain.charge(o.saves)).name if s.variants else "keep" for s in chain.stages]
    assert sum(map(is_option, least)) == 4
    tree = tuple(Keep(number, name) for number, name in enumerate(least))
    plan = certify(chain, tree, 1 << 20, "by hand")
    fitted = fit(model, x, "1MiB", plan=plan, strict=True, repeats=1)
    for _ in range(3):  # from the third on by a flow that is known
        assert train(fitted, x) == expected
        assert fitted.measured_peak_bytes == plan.certificate.peak_bytes
    torch.manual_seed(4)
    loss = fitted(x).square().sum()
    with Products() as products:
        loss.backward()
    assert products.count["aten::addmm"] == 0, products.count  # `up` is kept, and nothing needs `down`
    fitted.unfit()
