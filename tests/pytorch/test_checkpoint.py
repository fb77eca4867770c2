"""`gpuckpt.checkpoint` gives the gradients of the plain run, whatever it is called with and however backward is run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import gpuckpt
from gpuckpt import CheckpointBudget, RecomputeMismatch, SavedTensorModified
from tests.pytorch.steps import HOLDS, Tally, batch, bits, blocks, gradients, run

pytestmark = pytest.mark.parametrize("hold", HOLDS)


@pytest.fixture
def budget(hold):
    budget = CheckpointBudget("16MiB", device="cpu", hold=hold)
    yield budget
    assert budget.used_bytes == 0, "something is still held"


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def test_a_model_of_blocks(budget):
    model, x = blocks(6), batch()
    plain = gradients(model, lambda: run(model, x))

    def checkpointed() -> Tensor:
        with budget:
            return run(model, x, gpuckpt.checkpoint)

    assert gradients(model, checkpointed) == plain
    assert all(block.tally.count == 3 for block in model)  # plain, forward, recompute


def test_what_is_kept_between_forward_and_backward_is_the_inputs(budget):
    model, x = blocks(4), batch()
    with budget:
        loss = run(model, x, gpuckpt.checkpoint)
    # Each block's input (the first one's is the batch), and the last output for square().
    assert budget.used_bytes == 5 * x.nbytes
    loss.backward()


def test_keyword_arguments_nested_containers_and_other_values(budget):
    @dataclass(frozen=True)
    class Options:
        scale: float

    def fn(x, pair, *, table, name, options, flag=False, missing=None):
        assert name == "fn"
        assert flag
        assert missing is None
        h = torch.tanh(x * pair[0]) * pair[1]["deep"][0]
        return h * table["bias"].exp() * options.scale

    def arguments():
        x, a, b, c = (leaf(3, 4, seed=i) for i in range(4))
        return (
            (x, (a, {"deep": [b, "text", 2]})),
            {
                "table": {"bias": c},
                "name": "fn",
                "options": Options(2.0),
                "flag": True,
            },
            [x, a, b, c],
        )

    args, kwargs, leaves = arguments()
    expected = torch.autograd.grad(fn(*args, **kwargs).sum(), leaves)
    args, kwargs, leaves = arguments()
    got = torch.autograd.grad(gpuckpt.checkpoint(fn, *args, budget=budget, **kwargs).sum(), leaves)
    assert bits(got) == bits(expected)


def test_several_outputs_in_containers_and_values_that_are_no_tensors(budget):
    def fn(x):
        h = x.sin()
        return {"a": h.exp(), "b": [h.cos(), x.argmax()], "n": 3}

    def loss(out):
        assert out["n"] == 3
        assert not out["b"][1].requires_grad
        return (out["a"] * 2 + out["b"][0]).sum()

    x = leaf(5)
    (expected,) = torch.autograd.grad(loss(fn(x)), x)
    (got,) = torch.autograd.grad(loss(gpuckpt.checkpoint(fn, x, budget=budget)), x)
    assert bits([got]) == bits([expected])


def test_outputs_of_which_only_one_is_used(budget):
    def fn(x):
        return x.sin().exp(), x.cos().exp()

    x = leaf(5)
    (expected,) = torch.autograd.grad(fn(x)[0].sum(), x)
    out, unused = gpuckpt.checkpoint(fn, x, budget=budget)
    del unused
    (got,) = torch.autograd.grad(out.sum(), x)
    assert bits([got]) == bits([expected])


def test_an_input_returned_as_it_is(budget):
    x = leaf(4)
    y, z = gpuckpt.checkpoint(lambda x: (x, x.sin()), x * 2, budget=budget)
    (got,) = torch.autograd.grad((y * z).sum(), x)
    (expected,) = torch.autograd.grad(((x * 2) * (x * 2).sin()).sum(), x)
    assert bits([got]) == bits([expected])


def test_integer_inputs_and_inputs_without_gradients(budget):
    table, tokens, scale = leaf(10, 4), torch.tensor([1, 5, 1]), torch.full((3, 4), 2.0)

    def fn(tokens, scale):
        return (torch.nn.functional.embedding(tokens, table) * scale).sin()

    (expected,) = torch.autograd.grad(fn(tokens, scale).sum(), table)
    (got,) = torch.autograd.grad(gpuckpt.checkpoint(fn, tokens, scale, budget=budget).sum(), table)
    assert bits([got]) == bits([expected])


def test_random_numbers_are_drawn_again_and_the_stream_goes_on(budget):
    model, x = blocks(3, dropout=0.5), batch()
    plain = gradients(model, lambda: run(model, x))
    after_plain = torch.rand(1)
    assert gradients(model, lambda: run(model, x, lambda f, x: gpuckpt.checkpoint(f, x, budget=budget))) == plain
    assert torch.equal(torch.rand(1), after_plain)


def test_without_rng_state_other_random_numbers_are_drawn(budget):
    x = leaf(64)

    def fn(x):
        return torch.nn.functional.dropout(x.exp(), 0.5)

    torch.manual_seed(0)
    out = gpuckpt.checkpoint(fn, x, budget=budget, preserve_rng_state=False)
    kept = out != 0
    (got,) = torch.autograd.grad(out.sum(), x)
    assert not torch.equal(got != 0, kept)


def test_autocast(budget):
    model, x = blocks(3), batch()

    def step(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(model, x, call)

    plain = gradients(model, lambda: step(None))
    assert gradients(model, lambda: step(lambda f, x: gpuckpt.checkpoint(f, x, budget=budget))) == plain


def test_autocast_off_in_forward_is_off_in_the_recompute(budget):
    model, x = blocks(2), batch()

    def gradients_of(loss):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # backward's own products run in bfloat16, both times
            loss.backward()
        return bits(p.grad for p in model.parameters())

    plain = gradients_of(run(model, x))
    assert gradients_of(run(model, x, lambda f, x: gpuckpt.checkpoint(f, x, budget=budget, verify="bitwise"))) == plain


def test_torch_autograd_grad_leaves_no_gradients_behind(budget):
    model, x = blocks(3), batch()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(run(model, x), parameters)
    got = torch.autograd.grad(run(model, x, lambda f, x: gpuckpt.checkpoint(f, x, budget=budget)), parameters)
    assert bits(got) == bits(expected)
    assert all(p.grad is None for p in parameters)


def test_the_gradient_of_one_parameter_alone(budget):
    model, x = blocks(4), batch()
    wanted = [model[2].up.weight]
    expected = torch.autograd.grad(run(model, x), wanted)
    loss = run(model, x, lambda f, x: gpuckpt.checkpoint(f, x, budget=budget))
    held = budget.used_bytes
    got = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert bits(got) == bits(expected)
    assert budget.used_bytes == held, "what this backward did not need has been forgotten"
    assert bits(torch.autograd.grad(loss, wanted)) == bits(expected)


def test_a_second_backward_over_a_retained_graph(budget):
    model, x = blocks(3), batch()
    with budget:
        loss = run(model, x, gpuckpt.checkpoint)
    held = budget.used_bytes
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert budget.used_bytes == held
    second = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert budget.used_bytes == held
    third = torch.autograd.grad(loss, parameters)
    assert bits(first) == bits(second) == bits(third) == bits(torch.autograd.grad(run(model, x), parameters))


def test_hooks_fire_once(budget):
    model, x = blocks(2), batch()
    seen: list[str] = []
    loss_of_plain = run(model, x)
    loss_of_plain.backward()
    model.zero_grad()

    def fn(block, x):
        y = block(x)
        y.register_hook(lambda grad: seen.append("output"))
        return y

    model[0].up.weight.register_hook(lambda grad: seen.append("weight"))
    model[0].up.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    x = x.requires_grad_()
    x.register_hook(lambda grad: seen.append("input"))
    h = gpuckpt.checkpoint(fn, model[0], x, budget=budget)
    gpuckpt.checkpoint(fn, model[1], h, budget=budget).sum().backward()
    assert sorted(seen) == ["accumulated", "input", "output", "output", "weight"]


def test_module_backward_hooks_fire_once(budget):
    model, x = blocks(2), batch()
    calls: list[int] = []
    model[1].register_full_backward_hook(lambda module, given, taken: calls.append(1))
    run(model, x, lambda f, x: gpuckpt.checkpoint(f, x, budget=budget)).backward()
    assert calls == [1]


def test_double_backward(budget):
    def fn(x):
        return (x.sin() * x.exp()).tanh()

    def second(out, x):
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)

    x = leaf(6, dtype=torch.float64)
    expected = second(fn(x), x)
    assert bits(second(gpuckpt.checkpoint(fn, x, budget=budget), x)) == bits(expected)
    assert torch.autograd.gradgradcheck(lambda x: gpuckpt.checkpoint(fn, x, budget=budget), (x,))


def test_a_gradient_taken_inside_the_function(budget):
    def fn(x):
        with torch.enable_grad():
            (grad,) = torch.autograd.grad((x.sin() * x).sum(), x, create_graph=True)
        return grad.exp() * x.cos()

    def through(x):
        return fn(x * 1.5)

    x = leaf(6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(through(x).sum(), x)
    (got,) = torch.autograd.grad(gpuckpt.checkpoint(through, x, budget=budget).sum(), x)
    assert bits([got]) == bits([expected])


def test_a_gradient_taken_inside_holds_nothing_afterwards(budget):
    def fn(x):
        h = x.sin().exp()
        inner = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(inner.square().exp().sum(), inner)
        return h * grad

    x = leaf(6)
    (expected,) = torch.autograd.grad(fn(x * 2).sum(), x)
    h = x * 2
    out = gpuckpt.checkpoint(fn, h, budget=budget)
    assert budget.used_bytes == h.nbytes
    (got,) = torch.autograd.grad(out.sum(), x)
    assert bits([got]) == bits([expected])


def test_an_argument_that_was_changed_in_place_before_is_no_matter(budget):
    def fn(h):
        inner = h.detach().requires_grad_()  # shares the argument's version, and looks like a parameter
        (grad,) = torch.autograd.grad(inner.square().exp().sum(), inner)
        return h.sin() * grad

    def through(x):
        h = x * 2
        for _ in range(3):
            h.add_(1)
        return h

    x = leaf(6)
    (expected,) = torch.autograd.grad(fn(through(x)).sum(), x)
    (got,) = torch.autograd.grad(gpuckpt.checkpoint(fn, through(x), budget=budget, verify="bitwise").sum(), x)
    assert bits([got]) == bits([expected])


def test_without_gradients_it_is_a_plain_call(budget):
    calls = []

    def fn(x):
        calls.append(torch.is_grad_enabled())
        return x * 2

    x = leaf(3)
    with torch.no_grad(), budget:
        out = gpuckpt.checkpoint(fn, x)
    assert calls == [False]
    assert not out.requires_grad
    with torch.inference_mode(), budget:
        gpuckpt.checkpoint(fn, torch.zeros(3))
    assert budget.peak_bytes == 0


def test_work_that_needs_no_gradient_holds_nothing(budget):
    out = gpuckpt.checkpoint(lambda x: x.sin().exp(), torch.ones(4), budget=budget)
    assert not out.requires_grad
    assert budget.used_bytes == 0


def test_an_output_deleted_before_backward_frees_its_inputs(budget):
    x = leaf(1000)
    out = gpuckpt.checkpoint(lambda x: x.sin().exp(), x * 2, budget=budget)
    assert budget.used_bytes == 4000
    del out
    assert budget.used_bytes == 0


def test_errors_in_arguments(budget):
    with pytest.raises(TypeError, match="at least one input"):
        gpuckpt.checkpoint(lambda: torch.ones(1))
    with pytest.raises(ValueError, match="verify='sometimes'"):
        gpuckpt.checkpoint(torch.sin, torch.ones(1), verify="sometimes")


# ---- in-place changes and functions that do not repeat themselves


def test_an_argument_changed_in_place_is_named_or_harmless(hold):
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    x = leaf(8)
    h = x * 2
    out = gpuckpt.checkpoint(lambda h: h.sin().exp(), h, budget=budget)
    expected = (2 * torch.cos(2 * x) * torch.exp(torch.sin(2 * x))).detach()
    with torch.no_grad():
        h.add_(1)
    if hold == "pool":
        (got,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(got, expected)
    else:
        with pytest.raises(SavedTensorModified, match=r"float32 tensor of shape \(8,\) was changed in place"):
            out.sum().backward()
    del out
    assert budget.used_bytes == 0


def test_a_parameter_changed_before_the_recompute_is_named(budget):
    model, x = blocks(2), batch()
    loss = run(model, x, lambda f, x: gpuckpt.checkpoint(f, x, budget=budget))
    with torch.no_grad():
        model[1].up.weight.mul_(2)
    with pytest.raises(SavedTensorModified, match=r"shape \(32, 16\)|shape \(16, 32\)"):
        loss.backward()
    del loss


def test_work_that_changes_its_own_argument_runs_again_once(hold):
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)

    def fn(h):
        return h.mul_(2).sin()

    x = leaf(8)
    (expected,) = torch.autograd.grad(fn(x * 3).sum(), x)
    out = gpuckpt.checkpoint(fn, x * 3, budget=budget)
    if hold == "account":
        with pytest.raises(SavedTensorModified):
            torch.autograd.grad(out.sum(), x)
    else:
        (got,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert bits([got]) == bits([expected])
        with pytest.raises(SavedTensorModified, match="only once"):
            torch.autograd.grad(out.sum(), x)
    del out
    assert budget.used_bytes == 0


class _Moody:
    """Does something else when it is called again."""

    def __init__(self, *ways) -> None:
        self.ways = list(ways)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ways.pop(0)(x)


def test_work_that_saves_fewer_tensors_the_second_time(budget):
    fn = _Moody(lambda x: x.sin().exp(), lambda x: x.sin())
    out = gpuckpt.checkpoint(fn, leaf(4), budget=budget)
    with pytest.raises(RecomputeMismatch, match="saved 2 tensors in forward and 1 when"):
        out.sum().backward()
    assert budget.used_bytes == 0
    del out


def test_work_that_saves_another_shape_the_second_time(budget):
    fn = _Moody(lambda x: x.sin().exp(), lambda x: x[:2].sin().exp())
    out = gpuckpt.checkpoint(fn, leaf(4), budget=budget)
    with pytest.raises(
        RecomputeMismatch, match=r"number 0 .*shape \(torch.Size\(\[4\]\) before, torch.Size\(\[2\]\) now"
    ):
        out.sum().backward()
    assert budget.used_bytes == 0
    del out


@pytest.mark.parametrize("verify", [None, "metadata", "bitwise"])
@pytest.mark.parametrize(
    ("again", "named"),
    [
        (lambda x: x.double().sin().exp().float(), r"dtype \(torch.float32 before, torch.float64 now\)"),
        (lambda x: x.bfloat16().sin().exp(), r"dtype \(torch.float32 before, torch.bfloat16 now\)"),
        (lambda x: x.to("meta").sin().exp(), r"device \(cpu before, meta now\)"),
    ],
)
def test_another_dtype_or_device_is_always_caught(budget, again, named, verify):
    out = gpuckpt.checkpoint(_Moody(lambda x: x.sin().exp(), again), leaf(4), budget=budget, verify=verify)
    with pytest.raises(RecomputeMismatch, match=named):
        out.sum().backward()
    assert budget.used_bytes == 0
    del out


@pytest.mark.parametrize(
    ("verify", "again", "named"),
    [
        ("metadata", lambda x: x.double().sin().exp().float(), "dtype"),
        ("metadata", lambda x: x.t().contiguous().t().sin().exp(), "strides"),
        ("bitwise", lambda x: (x + 1e-3).sin().exp(), "contents differ"),
        ("bitwise", lambda x: x.flip(0).sin().exp(), "contents differ"),
    ],
)
def test_verify_catches_what_the_count_does_not(budget, verify, again, named):
    first = lambda x: x.sin().exp()  # noqa: E731
    out = gpuckpt.checkpoint(_Moody(first, again), leaf(4, 4), budget=budget, verify=verify)
    with pytest.raises(RecomputeMismatch, match=named):
        out.sum().backward()
    del out


@pytest.mark.parametrize("verify", ["metadata", "bitwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float64])
def test_verify_lets_repeatable_work_pass(budget, verify, dtype):
    def fn(x):
        y = x.conj() if x.is_complex() else x
        mask = x.abs() > 0.5
        return torch.where(mask, y.sin() * y.exp(), y)[..., ::2]

    x = leaf(4, 5, dtype=dtype)
    (expected,) = torch.autograd.grad(fn(x).abs().sum(), x)
    (got,) = torch.autograd.grad(gpuckpt.checkpoint(fn, x, budget=budget, verify=verify).abs().sum(), x)
    assert torch.equal(got, expected)


def test_verify_bitwise_catches_dropout_without_rng_state(budget):
    def fn(x):
        return nn.functional.dropout(x.exp(), 0.5).sin()

    out = gpuckpt.checkpoint(fn, leaf(64), budget=budget, preserve_rng_state=False, verify="bitwise")
    with pytest.raises(RecomputeMismatch, match="preserve_rng_state"):
        out.sum().backward()
    del out


# ---- exceptions


def test_an_exception_in_forward(budget):
    def fn(x):
        x.sin().exp()
        raise ValueError("forward")

    with pytest.raises(ValueError, match="forward"), budget:
        gpuckpt.checkpoint(fn, leaf(100) * 2)
    assert budget.used_bytes == 0


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_recompute_empties_the_frame_and_the_next_backward_works(budget, kind):
    armed = Tally()

    def fn(x):
        h = x.sin().exp()
        if armed.count:
            raise kind("recompute")
        return h.cos()

    x = leaf(100)
    (expected,) = torch.autograd.grad(fn(x * 2).sum(), x)
    out = gpuckpt.checkpoint(fn, x * 2, budget=budget)
    armed.count = True
    with pytest.raises(kind, match="recompute"):
        torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert budget.used_bytes == 400
    armed.count = False
    (got,) = torch.autograd.grad(out.sum(), x)
    assert bits([got]) == bits([expected])


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_gradient_hook(budget, kind):
    def hook(grad):
        raise kind("hook")

    def step():
        h = gpuckpt.checkpoint(lambda x: x.sin().exp().cos(), leaf(100) * 2, budget=budget)
        middle = h * 2
        middle.register_hook(hook)
        out = gpuckpt.checkpoint(lambda x: x.sin().exp().cos(), middle, budget=budget)
        with pytest.raises(kind, match="hook"):
            out.sum().backward()

    step()
    assert budget.used_bytes == 0


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_it_stands_where_torchs_checkpoint_stood(budget, use_reentrant: bool | None) -> None:
    x = torch.randn(3, requires_grad=True)
    gpuckpt.checkpoint(torch.sin, x, budget=budget, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, x.cos())
