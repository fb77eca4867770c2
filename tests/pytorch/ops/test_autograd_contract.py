"""What autograd, torch.compile, export, autocast and torch.func may expect of the fused operations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.library import opcheck

from gpuckpt import CheckpointBudget, functional
from gpuckpt.errors import SavedTensorModified
from gpuckpt.nn import FusedLinear, FusedMLP, GatedMLP
from gpuckpt.pytorch.ops import gated_mlp, linear, mlp
from tests.pytorch.ops.fused import ALL_OPS, OPS, gradients

linear_fwd, linear_bwd = linear.OP.fwd, linear.OP.bwd
mlp_fwd, mlp_bwd = mlp.OP.fwd, mlp.OP.bwd
gated_mlp_fwd, gated_mlp_bwd = gated_mlp.OP.fwd, gated_mlp.OP.bwd
OP = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
ANY_OP = pytest.mark.parametrize("op", ALL_OPS.values(), ids=lambda op: op.name)
# torch scripts parts of its own forward mode and of inductor when they are first used, and warns of itself.
SCRIPTS = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def _calls():
    """Every custom op with arguments of every kind it takes."""
    x, w, b = OPS["linear"].draw(dtype=torch.float32)
    dy, residual, seed = torch.randn(5, 4), torch.randn(5, 4, requires_grad=True), torch.tensor(7)
    yield "linear", linear_fwd, (x, w, b, residual, None, None, "gelu", 0.0, None, None)
    yield "linear, dropout", linear_fwd, (x, w, b, None, seed, None, "silu", 0.5, 2, None)
    yield "linear, no bias", linear_fwd, (x, w, None, None, None, None, "identity", 0.0, None, None)
    yield "linear backward", linear_bwd, (dy, x, w, b, seed, "gelu", 0.5, None, 1000, [True, True, True])
    yield (
        "linear backward, frozen",
        linear_bwd,
        (dy, None, w, b, None, "identity", 0.0, None, None, [True, False, False]),
    )
    operands = OPS["mlp"].draw(dtype=torch.float32)
    yield "mlp", mlp_fwd, (*operands, None, None, "gelu", None, None)
    yield "mlp, frozen", mlp_fwd, (operands[0], *(t.detach() for t in operands[1:]), None, None, "gelu", 2, None)
    for needs in ([True] * 5, [False, False, False, True, False]):
        yield f"mlp backward {needs}", mlp_bwd, (dy, *operands, "gelu", None, None, needs)
    operands = OPS["gated_mlp"].draw(dtype=torch.float32)
    yield "gated", gated_mlp_fwd, (*operands, None, None, None, "silu", 1.0, 0.5, None, None)
    for needs in ([True] * 7, [False, True, False, False, False, False, True]):
        yield f"gated backward {needs}", gated_mlp_bwd, (dy, *operands, "silu", 1.5, 1.0, 3, None, needs)


@pytest.mark.parametrize(("op", "args"), [pytest.param(op, args, id=name) for name, op, args in _calls()])
def test_opcheck(op, args):
    if op in (linear_bwd, mlp_bwd, gated_mlp_bwd):
        # Their own gradient is refused, which the other two checks would ask for.
        args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
    assert set(opcheck(op, args).values()) == {"SUCCESS"}


class Block(nn.Module):
    """All the modules in one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = FusedLinear(width, width, activation="relu2", dropout=0.0)
        self.mlp = FusedMLP(width, 3 * width, activation="gelu_tanh")
        self.gated = GatedMLP(width, 2 * width, gate_multiplier=1.25)

    def forward(self, x):
        x = self.up(x, residual=x)
        return self.gated(x + self.mlp(x))


def _trained(model, x) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@SCRIPTS
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(backend, dynamic):
    torch.manual_seed(0)
    model = Block()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in ((2, 5), (3, 4)):
        x = torch.randn(*rows, 8)
        for got, expected in zip(_trained(compiled, x), _trained(model, x), strict=True):
            torch.testing.assert_close(got, expected)


def test_compiles_with_dropout_chunks_and_the_loss():
    def step(x, w, b, head, target):
        h = functional.linear(x, w, b, activation="gelu", dropout=0.5, chunk_rows=4)
        return functional.linear_cross_entropy(h, head, target)

    x, w, b = OPS["linear"].draw(8, 6, 5, 5, dtype=torch.float32)
    head, target = torch.randn(11, 5, requires_grad=True), torch.randint(0, 11, (8,))
    found = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        loss = fn(x, w, b, head, target)
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, w, b, head))])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_exports():
    torch.manual_seed(0)
    model = Block().eval()
    x = torch.randn(4, 8)
    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"gpuckpt.linear_fwd.default", "gpuckpt.mlp_fwd.default", "gpuckpt.gated_mlp_fwd.default"} <= names
    for batch in (x, torch.randn(7, 8)):
        torch.testing.assert_close(program.module()(batch), model(batch))


@OP
def test_autocast_fixes_its_dtype_in_forward_and_saves_parameters_uncast(op):
    x, *others = op.draw(dtype=torch.float32)
    others = [nn.Parameter(t.detach()) for t in others]
    dy = torch.randn(5, 4).bfloat16()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        y = op.run(x, *others, activation="gelu")
    assert y.dtype == torch.bfloat16
    parameters = [t for t in saved if isinstance(t, nn.Parameter)]
    assert {id(t) for t in parameters} == {id(t) for t in others}
    (kept,) = (t for t in saved if not isinstance(t, nn.Parameter))
    assert (kept.dtype, kept.shape) == (torch.bfloat16, x.shape)

    outside = torch.autograd.grad(y, [x, *others], dy, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.float16):  # whatever is on around backward
        inside = torch.autograd.grad(y, [x, *others], dy)
    by_hand = gradients(op.run, [x.detach().bfloat16().requires_grad_(), *others], dy, activation="gelu")
    assert torch.equal(y, by_hand[0])
    for got, again, expected, t in zip(outside, inside, by_hand[1:], [x, *others], strict=True):
        assert got.dtype == t.dtype
        assert torch.equal(got, again)
        assert torch.equal(got, expected.to(t.dtype))


@ANY_OP
@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_inside_autocast_computes_what_forward_did(op, chunk_rows, dtype):
    operands = op.draw(33, 17, 29, 11, dtype=dtype)
    y = op.run(*operands, activation="gelu", chunk_rows=chunk_rows)
    dy = torch.randn_like(y)
    outside = torch.autograd.grad(y, operands, dy, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, operands, dy)
    for got, expected in zip(inside, outside, strict=True):
        assert torch.equal(got, expected)


def test_autocast_leaves_float64_alone():
    x, w, b = OPS["linear"].draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.linear(x, w, b, activation="gelu").dtype == torch.float64


@ANY_OP
def test_double_backward_says_no(op):
    x, *others = op.draw()
    (dx,) = torch.autograd.grad(op.run(x, *others, activation="gelu").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"functional.{op.name} has no second derivative"):
        dx.sum().backward()


@ANY_OP
@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacrev,
        lambda fn: lambda x: torch.func.jvp(fn, (x,), (x,)),
        lambda fn: torch.vmap(torch.func.grad(fn)),
    ],
    ids=["grad", "jacrev", "jvp", "vmap of grad"],
)
@SCRIPTS
def test_func_transforms_say_no(op, transform):
    x, *others = op.draw()
    with pytest.raises(NotImplementedError, match=f"functional.{op.name} does not run under torch.func.grad"):
        transform(lambda x: op.run(x, *others, activation="gelu").sum())(x.detach())


@ANY_OP
@SCRIPTS
def test_forward_mode_says_no(op):
    x, *others = (t.detach() for t in op.draw())
    with torch.autograd.forward_ad.dual_level():
        op.run(x, *others, activation="gelu")  # nothing to differentiate: allowed
        for i in range(len(others) + 1):
            operands = [x, *others]
            operands[i] = torch.autograd.forward_ad.make_dual(operands[i], torch.ones_like(operands[i]))
            with pytest.raises(NotImplementedError, match=f"functional.{op.name} has no forward-mode derivative"):
                op.run(*operands, activation="gelu")


@ANY_OP
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_works(op):
    x, *others = (t.detach() for t in op.draw())
    xs = torch.randn(3, *x.shape, dtype=x.dtype)
    ours, plain = (torch.vmap(lambda x, fn=fn: fn(x, *others, activation="gelu"))(xs) for fn in (op.run, op.plain))
    torch.testing.assert_close(ours, plain)
    weights = torch.randn(3, *others[0].shape, dtype=x.dtype)
    ours, plain = (
        torch.vmap(lambda w, fn=fn: fn(x, w, *others[1:], activation="gelu"))(weights) for fn in (op.run, op.plain)
    )
    torch.testing.assert_close(ours, plain)


@ANY_OP
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_nothing_that_is_given_or_saved_is_written(op, chunk_rows):
    operands = op.draw()
    dy = torch.randn_like(op.run(*operands, activation="gelu"))
    given = [*operands, dy]
    before = [t.detach().clone() for t in given]
    for activation in ("identity", "relu", "relu2", "gelu", "sigmoid"):
        op.run(*operands, activation=activation, chunk_rows=chunk_rows).backward(dy)
    for t, old in zip(given, before, strict=True):
        assert torch.equal(t, old)
        assert t._version == 0


@ANY_OP
def test_an_input_changed_in_place_is_an_error(op):
    operands = op.draw()
    x = operands[0].detach().clone()
    y = op.run(x, *operands[1:], activation="gelu")
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    x = operands[0] * 2
    with CheckpointBudget("1MiB", device="cpu"):
        y = op.run(x, *operands[1:], activation="gelu")
    x.detach().add_(1)
    with pytest.raises(SavedTensorModified):
        y.sum().backward()


@ANY_OP
@pytest.mark.parametrize("options", [{}, {"chunk_rows": 2}], ids=str)
def test_second_backward_and_reruns_have_the_same_bits(op, options):
    operands = op.draw(33, 17, 29, 11, dtype=torch.float32)
    dy = torch.randn_like(op.run(*operands, activation="gelu"))
    y = op.run(*operands, activation="gelu", **options)
    first = torch.autograd.grad(y, operands, dy, retain_graph=True)
    second = torch.autograd.grad(y, operands, dy)
    again = gradients(op.run, operands, dy, activation="gelu", **options)
    assert torch.equal(again[0], y)
    for a, b, c in zip(first, second, again[1:], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, operands, dy)


def test_second_backward_through_dropout_drops_the_same():
    x, w, b = OPS["linear"].draw(33, 17, 29, 11, dtype=torch.float32)
    y = functional.linear(x, w, b, activation="gelu", dropout=0.5)
    first = torch.autograd.grad(y.sum(), (x, w, b), retain_graph=True)
    torch.manual_seed(99)
    for a, b_ in zip(first, torch.autograd.grad(y.sum(), (x, w, b)), strict=True):
        assert torch.equal(a, b_)


def test_each_parameter_gradient_is_emitted_once():
    """A weight that is used twice gets one accumulated gradient for each use, and its hook fires once a backward."""
    torch.manual_seed(0)
    model = Block()
    fired: dict[str, int] = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.update({name: fired.get(name, 0) + 1}))
    x = torch.randn(3, 8, requires_grad=True)
    model(x).sum().backward()
    assert set(fired.values()) == {1}
    assert len(fired) == len(list(model.parameters()))


@OP
def test_one_tensor_in_two_places(op):
    """x that is also a weight, and biases that are one tensor, get the sum of both gradients."""
    operands = op.draw(6, 6, 6, 6)
    w = operands[1]
    bias = operands[2]
    shared = [w, *(w if name.startswith("w") else bias for name in op.names[1:])]
    dy = torch.randn(6, 6, dtype=torch.float64)
    ours, plain = (torch.autograd.grad(fn(*shared, activation="gelu"), (w, bias), dy) for fn in (op.run, op.plain))
    for got, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, expected)


def test_dropout_follows_torchs_generator():
    x, w, b = OPS["linear"].draw(40, 17, 29, 50, dtype=torch.float32)

    def run():
        return functional.linear(x, w, b, dropout=0.5)

    torch.manual_seed(1)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert torch.equal(run(), second)
    kept = first != 0
    torch.testing.assert_close(first[kept], 2 * functional.linear(x, w, b)[kept])
    assert abs(kept.float().mean() - 0.5) < 0.05
    assert not functional.linear(x, w, b, dropout=1.0).any()
    state = torch.get_rng_state()
    functional.linear(x, w, b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_dropout_has_the_gradient_of_what_it_computed(activation):
    x, w, b = OPS["linear"].draw()

    def fn(x, w, b):
        torch.manual_seed(5)
        return functional.linear(x, w, b, activation=activation, dropout=0.4, chunk_rows=2)

    assert torch.autograd.gradcheck(fn, (x, w, b))
