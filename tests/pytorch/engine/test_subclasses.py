"""Tensor subclasses: charged by the bytes that they hold, and handed back with what they carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree

from gpuckpt import BudgetExceeded, CheckpointBudget, checkpoint
from gpuckpt.pytorch.engine.residency import mark_resident
from tests.pytorch.beside_plain import beside_plain

WAYS = ["no budget", "account", "pool", "nested in account"]


@pytest.fixture(params=["account", "pool"])
def budget(request: pytest.FixtureRequest) -> CheckpointBudget:
    return CheckpointBudget("1MiB", device="cpu", hold=request.param)


def run(way: str, fn: Callable[..., Any], *args: Any) -> Any:
    if way == "no budget":
        return checkpoint(fn, *args)
    if way.startswith("nested"):
        return run("account", lambda *args: checkpoint(fn, *args), *args)
    return checkpoint(fn, *args, budget=CheckpointBudget("1MiB", device="cpu", hold=way))


# ---- bytes


class Quantised(Tensor):
    """int8 inside, float32 to look at, as torchao does."""

    @staticmethod
    def __new__(cls, inner: Tensor, scale: float) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32, device=inner.device)

    def __init__(self, inner: Tensor, scale: float) -> None:
        self.inner, self.scale = inner, scale

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["inner"], self.scale

    @classmethod
    def __tensor_unflatten__(cls, inside: dict[str, Tensor], scale: float, *_: Any) -> Quantised:
        return cls(inside["inner"], scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner.detach(), args[0].scale)

        def dequantised(leaf: Any) -> Any:
            return leaf.inner.float() * leaf.scale if isinstance(leaf, Quantised) else leaf

        return func(*pytree.tree_map(dequantised, args), **pytree.tree_map(dequantised, kwargs or {}))


def quantised(count: int = 1000) -> Quantised:
    draw = torch.Generator().manual_seed(0)
    return Quantised(torch.randint(-9, 9, (count,), dtype=torch.int8, generator=draw), 0.1)


def test_a_quantised_tensor_costs_its_integers(budget: CheckpointBudget) -> None:
    q, w = quantised(), torch.randn(1000, requires_grad=True)
    with budget:
        y = w * q
    assert budget.used_bytes == 1000
    y.sum().backward()
    assert torch.equal(w.grad, q.inner.float() * 0.1)
    assert budget.used_bytes == 0


def test_a_tensor_of_two_costs_both(budget: CheckpointBudget) -> None:
    pair = TwoTensor(torch.randn(1000), torch.randn(1000)).requires_grad_()
    with budget:
        y = pair.exp()
    assert budget.used_bytes == 8000
    with budget:
        z = pair.detach().requires_grad_().exp() * y.detach()
    assert budget.used_bytes == 8000 + 8000  # `y` is held already
    y.sum().backward()
    del z
    assert budget.used_bytes == 0


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_a_sharded_tensor_costs_this_ranks_share(budget: CheckpointBudget, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard

    local = torch.randn(1000, 10)
    x = DTensor.from_local(local, mesh, [Shard(0)]).requires_grad_() * 1.0
    with budget:
        y = x.exp()
    assert budget.used_bytes == local.nbytes
    del y
    with budget:
        views = x.view(4, 1000, 10).sin(), x.cos()
    assert budget.used_bytes == local.nbytes  # one storage
    del views
    kept = checkpoint(lambda t: t.sin().exp(), x, budget=budget)
    assert budget.used_bytes == local.nbytes
    del kept
    assert budget.used_bytes == 0


def test_sharded_parameters_that_belong_to_the_model_cost_nothing(budget: CheckpointBudget, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)]))
    mark_resident([weight])
    with budget:
        y = weight.detach().requires_grad_() * weight.detach()
    assert budget.used_bytes == 0
    del y


def test_a_budget_that_has_room_for_the_bytes_is_no_obstacle() -> None:
    q, w = quantised(), torch.randn(1000, requires_grad=True)
    with CheckpointBudget(1000, device="cpu"):
        (w * q).sum().backward()
    with pytest.raises(BudgetExceeded), CheckpointBudget(999, device="cpu"):
        _ = w * q


class UsesQuantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1000, 1000) for _ in range(4))

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(torch.tanh(x) * q)
        return x.square().mean()


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_plans_count_what_wrappers_hold(hold: str) -> None:
    torch.manual_seed(0)
    beside_plain(UsesQuantised(), torch.randn(2, 1000), quantised(), share=1.0, fit_options={"hold": hold}, steps=1)


# ---- what they carry


class Scaled(Tensor):
    """A tensor with a number beside it."""

    scale: float
    owner: str

    @staticmethod
    def __new__(cls, data: Tensor, scale: float) -> Scaled:
        made = Tensor._make_subclass(cls, data, data.requires_grad)
        made.scale, made.owner = scale, "test"
        return made


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Scaled) -> Tensor:
        ctx.save_for_backward(s)
        return x * s.as_subclass(Tensor) * s.scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        return grad * s.as_subclass(Tensor) * s.scale, None


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_that_knows_its_variant(way: str) -> None:
    def attend(q: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).sin()

    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    bias = causal_lower_right(6, 6)
    (expected,) = torch.autograd.grad(attend(q, bias).sum(), q)
    (got,) = torch.autograd.grad(run(way, attend, q, bias).sum(), q)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", [False, True])
def test_an_argument_with_an_attribute(way: str, trained: bool) -> None:
    def scaled(x: Tensor, s: Scaled) -> Tensor:
        assert s.owner == "test"
        return (x * s.as_subclass(Tensor) * s.scale).sin()

    x, s = torch.randn(3, requires_grad=True), Scaled(torch.ones(3, requires_grad=trained), 2.0)
    (expected,) = torch.autograd.grad(scaled(x, s).sum(), x)
    (got,) = torch.autograd.grad(run(way, scaled, x, s).sum(), x)
    assert torch.equal(got, expected)


def test_a_saved_tensor_with_an_attribute(budget: CheckpointBudget) -> None:
    x, s = torch.randn(3, requires_grad=True), Scaled(torch.ones(3), 2.0)
    with budget:
        y = Scale.apply(x, s)
    assert budget.used_bytes == s.nbytes
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
