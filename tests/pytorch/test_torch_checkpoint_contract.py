"""What torch's own tests of activation checkpointing and of saved-tensor hooks ask for, asked of `gpuckpt.checkpoint`.

By their names in torch's test/test_utils.py (TestCheckpoint) and test/test_autograd.py (TestNestedCheckpoint, TestAutograd).
Which of them behave otherwise here, and why, is told in docs/torch-checkpoint.md.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gpuckpt import CheckpointBudget, RecomputeMismatch, SavedTensorModified, StateModified, checkpoint
from tests.pytorch.steps import Tally

WAYS = ["no budget", "account", "pool"]


@pytest.fixture(params=WAYS)
def ckpt(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`checkpoint` without a budget, or under one of either kind."""
    if request.param == "no budget":
        return checkpoint
    budget = CheckpointBudget("16MiB", device="cpu", hold=request.param)
    return lambda fn, *args, **kwargs: checkpoint(fn, *args, budget=budget, **kwargs)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU())


# ---- TestCheckpoint


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.tally = Tally()

    def forward(self, x: Tensor) -> Tensor:
        self.tally.count += 1
        return x * self.scale


def test_checkpoint_trigger(ckpt) -> None:
    modules = [Counts() for _ in range(6)]
    out = ckpt(nn.Sequential(*modules), leaf(3, 4))
    assert [module.tally.count for module in modules] == [1] * 6
    out.sum().backward()
    assert [module.tally.count for module in modules] == [2] * 6


def test_checkpoint_valid(ckpt) -> None:
    """With `create_graph`, and the derivative of the derivative."""
    model, x = layers(), leaf(1, 20)

    def second(call: Callable[..., Any]) -> list[Tensor]:
        out = call(lambda x: model(x).sin(), x)
        (grad,) = torch.autograd.grad(out, x, torch.ones(1, 5), create_graph=True)
        return [grad, *torch.autograd.grad(grad.square().sum(), [x, model[0].weight])]

    assert all(map(torch.equal, second(ckpt), second(lambda fn, *args: fn(*args))))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_checkpoint(ckpt, parts: int) -> None:
    """The model whole or in parts, from an input that trains: the same output and gradients."""
    model, x = layers(), leaf(1, 20)
    expected = model(x)
    wanted = torch.autograd.grad(expected.sum(), [x, *model.parameters()])
    out = x
    for part in torch.arange(6).chunk(parts):
        out = ckpt(model[int(part[0]) : int(part[-1]) + 1], out)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), [x, *model.parameters()]), wanted))


def test_checkpoint_module_list(ckpt) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module_list = nn.ModuleList(layers())

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.module_list:
                x = layer(x)
            return x

    net, x = Net(), leaf(1, 20)
    wanted = torch.autograd.grad(net(x).sum(), [x, *net.parameters()])
    assert all(map(torch.equal, torch.autograd.grad(ckpt(net, x).sum(), [x, *net.parameters()]), wanted))


def test_checkpoint_rng_cpu(ckpt) -> None:
    first, second, x = nn.Dropout(), nn.Dropout(), leaf(2000)
    state = torch.get_rng_state()
    (got,) = torch.autograd.grad(ckpt(lambda x: second(x), first(x)).sum(), x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    (wanted,) = torch.autograd.grad(second(first(x)).sum(), x)
    assert torch.equal(got, wanted)
    assert torch.equal(torch.get_rng_state(), after)


def test_checkpoint_not_preserve_rng_state(ckpt) -> None:
    layer = nn.Dropout()
    ckpt(lambda x: layer(x), leaf(2), preserve_rng_state=False).sum().backward()


def test_checkpoint_non_tensor(ckpt) -> None:
    def add(a: Tensor, b: Tensor | None) -> Tensor:
        return a if b is None else a + b

    x = leaf(1, 10)
    ckpt(add, x, None).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 10))


def mixed(t1: Any, t2: Any, scale: Any, t3: Any) -> tuple[Any, ...]:
    t4, t5 = t1 + t2 * t3, t1 * t2 + t3
    t4 = t4 * scale
    t5 = t5 * scale
    return scale, t4, None, True, t5, "bar", t1


def test_checkpoint_non_tensor_inputs_outputs(ckpt) -> None:
    t1, t2, t3 = leaf(10), torch.rand(10, requires_grad=True), torch.rand(10)
    found = ckpt(mixed, t1, t2, 7, t3)
    expected = mixed(t1, t2, 7, t3)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b
    assert found[6] is t1
    roots = [expected[1].sum(), expected[4].sum(), expected[6].sum()]
    wanted = torch.autograd.grad(roots, [t1, t2])
    found[1].sum().backward(retain_graph=True)
    found[4].sum().backward(retain_graph=True)
    found[6].sum().backward()
    torch.testing.assert_close([t1.grad, t2.grad], list(wanted))


def test_checkpoint_no_tensors(ckpt) -> None:
    numbers = [random.random() for _ in range(4)]
    assert ckpt(mixed, *numbers) == mixed(*numbers)


def test_checkpoint_partial_grad(ckpt) -> None:
    trained, fixed = leaf(1, 4), torch.randn(1, 4)
    out = ckpt(lambda a, b: (a, b), trained, fixed)
    out[0].sum().backward()
    assert not out[1].requires_grad
    other = ckpt(lambda a, b: a, fixed, trained)  # nothing to train: a plain result, as without a checkpoint
    assert not other.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        other.sum().backward()


@pytest.mark.parametrize("retain", [False, True])
def test_checkpointing_early_free(retain: bool) -> None:
    """What is recomputed is freed as backward goes, also where the graph is kept."""
    budget = CheckpointBudget("1MiB", device="cpu")
    seen: list[int] = []

    def chain(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x**2
            x.register_hook(lambda _: seen.append(budget.used_bytes))
        return (x**2).sum()

    checkpoint(chain, torch.ones(10, requires_grad=True), budget=budget).backward(retain_graph=retain)
    first_run = seen[:3]
    assert first_run == sorted(first_run, reverse=True)
    assert len(set(first_run)) == 3
    assert budget.used_bytes == 0


@pytest.mark.parametrize("kind", ["meta", "cpu"])
def test_checkpoint_preserves_device_context(ckpt, kind: str) -> None:
    """`with torch.device(...)` of forward holds in the recompute, and that of backward does not."""
    made: list[str] = []

    def creates(x: Tensor) -> Tensor:
        made.append(torch.empty(4).device.type)
        return x.sin().exp()

    with torch.device(kind):
        out = ckpt(creates, leaf_on_cpu())
    loss = out.sum()
    with torch.device("meta" if kind == "cpu" else "cpu"):
        loss.backward()
    assert made == [kind, kind]


def leaf_on_cpu() -> Tensor:
    return torch.ones(4, device="cpu", requires_grad=True)


def test_the_default_device_of_a_context_that_is_entered_inside(ckpt) -> None:
    def creates(x: Tensor) -> Tensor:
        with torch.device("meta"):
            assert torch.empty(1).is_meta
        assert torch.empty(1).device.type == "cpu"
        return x.sin().exp()

    x = leaf(4)
    (got,) = torch.autograd.grad(ckpt(creates, x).sum(), x)
    assert torch.equal(got, torch.autograd.grad(creates(x).sum(), x)[0])


# ---- TestNestedCheckpoint


def grad(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(x: Tensor, *more: Any) -> Tensor:
        with torch.enable_grad():
            (found,) = torch.autograd.grad(fn(x, *more), (x,), create_graph=True)
        return found

    return wrapper


def sum_of(fn: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *args: sum(value for value in fn(*args) if isinstance(value, Tensor))


def f(x: Tensor) -> Tensor:
    return x.sin().exp().sin()


def g(x: Tensor) -> Tensor:
    return x.cos().sin().exp()


def test_nested_checkpoint(ckpt) -> None:
    def c(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: ckpt(fn, *args)

    x = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for nested, plain in (
        (grad(c(f)), grad(f)),
        (grad(c(c(f))), grad(f)),
        (grad(c(lambda x: c(f)(c(g)(x)))), grad(lambda x: f(g(x)))),  # two children
        (grad(c(grad(f))), grad(grad(f))),
        (grad(c(grad(c(f)))), grad(grad(f))),
        (c(grad(grad(c(f)))), grad(grad(f))),
        (grad(c(c(grad(c(f))))), grad(grad(f))),
        (grad(grad(c(grad(c(f))))), grad(grad(grad(f)))),
    ):
        torch.testing.assert_close(nested(x), plain(x), rtol=1e-12, atol=0)


def test_nested_checkpoint_two_children(ckpt) -> None:
    x = leaf(3)

    def hh(x: Tensor, call: Callable[..., Any]) -> Tensor:
        return call(f, call(g, x)) + call(g, x)

    (got,) = torch.autograd.grad(ckpt(lambda x: hh(x, ckpt), x).sum(), x)
    assert torch.equal(got, torch.autograd.grad(hh(x, lambda fn, *args: fn(*args)).sum(), x)[0])


def test_nested_checkpoint_non_tensor_inputs_and_outputs(ckpt) -> None:
    def k(a: Any, b: Any, c: Any) -> tuple[Any, ...]:
        return a.sin() * b * c, (a * b).exp() + c, 1, None, "more", b

    def c(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: ckpt(fn, *args)

    x, y = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), torch.tensor(0.5, dtype=torch.float64)
    for nested, plain in (
        (grad(sum_of(c(c(k)))), grad(sum_of(k))),
        (grad(c(grad(sum_of(c(k))))), grad(grad(sum_of(k)))),
    ):
        torch.testing.assert_close(nested(x, y, 2.0), plain(x, y, 2.0), rtol=1e-12, atol=0)


def test_nested_checkpoint_kwargs(ckpt) -> None:
    def blocked(a: Tensor, *, blah: Tensor) -> Tensor:
        return a.sin() * blah.exp()

    a, b = leaf(2), torch.rand(2, requires_grad=True)
    got = torch.autograd.grad(ckpt(lambda a, *, blah: ckpt(blocked, a, blah=blah), a, blah=b).sum(), [a, b])
    wanted = torch.autograd.grad(blocked(a, blah=b).sum(), [a, b])
    assert all(map(torch.equal, got, wanted))


def test_nested_checkpoint_same_graph(ckpt) -> None:
    """The inner checkpoint's gradients flow in the outer one's graph: hooks fire in the order of the plain run, each once."""
    order: list[str] = []

    def hook(name: str, tensor: Tensor) -> Tensor:
        tensor.register_hook(lambda _: order.append(name))
        return tensor

    def inner(a: Tensor) -> Tensor:
        return hook("inner", (a**2).sin()).exp()

    def outer(a: Tensor, call: Callable[..., Any]) -> Tensor:
        return hook("outer", call(inner, a)).cos()

    runs = []
    for call in (ckpt, lambda fn, *args: fn(*args)):
        order.clear()
        x = leaf(2)
        call(lambda x, call=call: outer(x, call), x).sum().backward()
        runs.append([x.grad, list(order)])
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] == ["outer", "inner"]


def test_nested_checkpoint_reentrant_backwards(ckpt) -> None:
    class Reenters(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.detach())
            return x * 2.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                ckpt(lambda y: ckpt(lambda y: y.sin().exp(), y), y).sum().backward()
            return grad * 2.0 + 0.0 * y.grad

    def work(x: Tensor) -> Tensor:
        return Reenters.apply(x.sin().exp()).sin()

    x = leaf(2)
    (got,) = torch.autograd.grad(ckpt(work, x).sum(), x)
    (wanted,) = torch.autograd.grad((x.sin().exp() * 2.0).sin().sum(), x)
    assert torch.equal(got, wanted)


def test_nested_checkpoint_stops_early(ckpt) -> None:
    """What the last saved tensor does not need is not run again, in the inner and the outer work."""
    calls: list[str] = []

    def inner(x: Tensor) -> Tensor:
        y = x.sin().exp()
        calls.append("inner")  # behind all that is saved
        return y

    def outer(x: Tensor) -> Tensor:
        y = ckpt(inner, x)
        calls.append("outer")
        return y + 1

    out = ckpt(outer, leaf(2))
    assert calls == ["inner", "outer"]
    out.sum().backward()
    assert calls == ["inner", "outer"]  # both recomputes ended before


def test_nothing_is_recomputed_where_nothing_was_saved(ckpt) -> None:
    calls: list[int] = []

    def doubles(x: Tensor) -> Tensor:
        calls.append(1)
        return x + x

    ckpt(doubles, leaf(2)).sum().backward()
    assert calls == [1]


# ---- TestAutograd: checkpoint


@pytest.mark.parametrize("trained", [True, False])
def test_checkpointing_input_requires_grad(ckpt, trained: bool) -> None:
    model, x = layers(), torch.randn(2, 20).requires_grad_(trained)
    ckpt(model, x).sum().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    assert (x.grad is not None) == trained
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(got, model.parameters(), strict=True))


def test_checkpointing_parameter_used_in_an_op(ckpt) -> None:
    weight, x = torch.randn(10, 10, requires_grad=True), leaf(10, 10)
    wanted = torch.autograd.grad((x @ weight).sin().sum() + weight.sum(), [weight, x])
    got = torch.autograd.grad(ckpt(lambda x: (x @ weight).sin(), x).sum() + weight.sum(), [weight, x])
    assert all(map(torch.equal, got, wanted))


def test_checkpoint_detects_non_determinism(ckpt) -> None:
    calls: list[int] = []

    def moody(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin().exp() if len(calls) == 1 else x[:1].sin().exp()

    with pytest.raises(RecomputeMismatch, match="shape"):
        ckpt(moody, leaf(3)).sum().backward()


def test_checkpointing_arbitrary_input_output(ckpt) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5, bias=False)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
            return {"result": self.layer(batch["x"]).sin(), "size": batch["x"].shape}

    net, x = Net(), leaf(5, 5)
    (wanted,) = torch.autograd.grad(net({"x": x})["result"].sum(), net.layer.weight)
    out = ckpt(net, {"x": x})
    assert out["size"] == (5, 5)
    assert torch.equal(torch.autograd.grad(out["result"].sum(), net.layer.weight)[0], wanted)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x * 2)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, doubled = ctx.saved_tensors
        assert torch.equal(doubled, ctx.saved_tensors[1])  # looked at twice
        return grad * x * doubled * 1.5


def test_checkpointing_custom_function_works(ckpt) -> None:
    x = leaf(4)
    (got,) = torch.autograd.grad(ckpt(lambda x: Cube.apply(x.exp()).sin(), x).sum(), x)
    assert torch.equal(got, torch.autograd.grad(Cube.apply(x.exp()).sin().sum(), x)[0])


def test_access_saved_tensor_twice_without_recomputation(ckpt) -> None:
    calls: list[int] = []

    def work(x: Tensor) -> Tensor:
        calls.append(1)
        return Cube.apply(x.exp()) * 1.0

    ckpt(work, leaf(4)).sum().backward()
    assert len(calls) == 2


def test_accessing_a_saved_tensor_after_backward_is_an_error(ckpt) -> None:
    out = ckpt(lambda x: x.exp(), leaf(4))
    out.sum().backward()
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        _ = out.grad_fn._saved_result


def test_checkpointing_detached_tensor(ckpt) -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    out = ckpt(lambda x: layer(x).detach(), x)
    assert not out.requires_grad


def test_checkpointing_saved_object_identity(ckpt) -> None:
    """What user hooks pack inside the work is what they unpack."""
    objects: list[Any] = []

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            objects.append(weakref.ref(self))

    def work(x: Tensor) -> Tensor:
        with saved_tensors_hooks(Box, lambda box: box.tensor):
            return x.sin().exp()

    x = leaf(4)
    (got,) = torch.autograd.grad(ckpt(work, x).sum(), x)
    assert torch.equal(got, torch.autograd.grad(x.sin().exp().sum(), x)[0])
    gc.collect()
    assert objects
    assert all(ref() is None for ref in objects)


def test_checkpoint_valid_reset_on_error(ckpt) -> None:
    x = leaf(5)
    first = ckpt(lambda x: x.sin().exp(), x)
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
        first.backward()
    ckpt(lambda x: x.sin().exp(), x).sum().backward()


def test_checkpoint_graph_with_several_backwards(ckpt) -> None:
    """The same graph, twice retained, by different roots."""
    x = leaf(4)
    out = ckpt(lambda x: (x.sin().exp(), x.cos().exp()), x)
    wanted = torch.autograd.grad((x.sin().exp().sum(), x.cos().exp().sum()), x)[0]
    total = sum(torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in out)
    torch.testing.assert_close(total, wanted)
    again = sum(torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in out)
    assert torch.equal(again, total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpointing_autocast_cpu(ckpt, dtype: torch.dtype) -> None:
    model, x = layers(), leaf(2, 20)
    with torch.autocast("cpu", dtype=dtype):
        wanted = torch.autograd.grad(model(x).float().sum(), [x, *model.parameters()])
    with torch.autocast("cpu", dtype=dtype):
        out = ckpt(model, x)
    got = torch.autograd.grad(out.float().sum(), [x, *model.parameters()])
    assert all(map(torch.equal, got, wanted))


# ---- TestAutograd: hooks on saved tensors


@pytest.fixture(params=["account", "pool"])
def budget(request: pytest.FixtureRequest) -> CheckpointBudget:
    return CheckpointBudget("16MiB", device="cpu", hold=request.param)


def test_the_inner_of_two_hooks_is_used(budget: CheckpointBudget) -> None:
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(1)
        return tensor.detach()

    x = leaf(8)
    with budget, saved_tensors_hooks(pack, lambda tensor: tensor):
        out = x.exp()
    assert packed
    assert budget.used_bytes == 0
    with saved_tensors_hooks(pack, lambda tensor: tensor), budget:
        again = x.exp()
    assert len(packed) == 1
    assert budget.used_bytes == again.nbytes
    (out + again).sum().backward()
    assert budget.used_bytes == 0


def test_hooks_around_a_checkpoint_hold_its_inputs(ckpt) -> None:
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.detach().clone()

    x = leaf(8)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = checkpoint(lambda x: x.sin().exp(), x * 1.0)
    assert (8,) in packed
    (got,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(got, torch.autograd.grad((x * 1.0).sin().exp().sum(), x)[0])


def test_save_on_cpu_and_checkpoint(ckpt) -> None:
    x = leaf(2, 2)
    (wanted,) = torch.autograd.grad((x * 1.0).pow(3).exp().pow(2).sum(), x)
    with torch.autograd.graph.save_on_cpu():
        outside = checkpoint(lambda x: x.pow(3).exp().pow(2), x * 1.0)
    assert torch.equal(torch.autograd.grad(outside.sum(), x)[0], wanted)

    def inside(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return x.pow(3).exp().pow(2)

    assert torch.equal(torch.autograd.grad(ckpt(inside, x * 1.0).sum(), x)[0], wanted)


def test_default_saved_tensors_hooks_double_backward(budget: CheckpointBudget) -> None:
    x = leaf(5)
    with budget:
        (first,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x.detach())
    del first
    assert budget.used_bytes == 0


def test_disabled_hooks_say_so(ckpt) -> None:
    disabled = torch.autograd.graph.disable_saved_tensors_hooks("no hooks here")
    with disabled, pytest.raises(RuntimeError, match="no hooks here"):
        ckpt(f, leaf(3) * 1.0)
    ckpt(f, leaf(3)).sum().backward()


def test_an_error_in_a_users_unpack_comes_through(ckpt) -> None:
    class Wrong(Exception):
        pass

    def unpack(_: Any) -> Tensor:
        raise Wrong

    def work(x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda tensor: tensor, unpack):
            return x.exp()

    with pytest.raises(Wrong):
        ckpt(work, leaf(3)).sum().backward()
    ckpt(f, leaf(3)).sum().backward()


def test_saved_tensors_do_not_share_a_version_counter(budget: CheckpointBudget) -> None:
    """An in-place change of the result of a checkpoint is seen by who saved it, and by nobody else."""
    x = leaf(4)
    with budget:
        y = x.exp()
    z = y.detach()
    z += 1
    if budget.hold == "account":
        with pytest.raises(SavedTensorModified):
            y.sum().backward()
    else:
        y.sum().backward()
        assert torch.equal(x.grad, x.detach().exp())


def test_a_parameter_that_is_changed_before_backward_is_named(ckpt) -> None:
    layer = nn.Linear(3, 3)
    out = ckpt(layer, torch.randn(2, 3))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(StateModified, match="'weight' of Linear"):
        out.sum().backward()
