"""`checkpoint(keep=...)`: what is kept is held byte for byte and does not run again; gradients are those of the plain run.

Also what torch's own tests of selective checkpointing ask for (TestSelectiveActivationCheckpoint in test/test_autograd.py).
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import gpuckpt.functional
from gpuckpt import BudgetExceeded, CheckpointBudget, RecomputeMismatch, SavedTensorModified, checkpoint, once
from tests.pytorch.steps import bits

aten = torch.ops.aten
MM = aten.mm.default


def everything(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    return True


class Ran(TorchDispatchMode):
    """Counts the operations whose kernels run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Any] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.count[op] += 1
        return op(*args, **(kwargs or {}))


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


W, V = leaf(16, 32, seed=1), leaf(32, 16, seed=2)
SQUARE = leaf(16, 16, seed=3)


def mlp(x: Tensor) -> Tensor:
    return x + F.dropout((x @ W).tanh(), 0.2) @ V * 0.1


def linear(x: Tensor) -> Tensor:
    return F.linear(F.linear(x, W.T, V[:, 0]).sigmoid(), V.T).exp()


def attention(x: Tensor) -> Tensor:
    q, k, v = (
        (x @ SQUARE).sin().reshape(1, -1, 2, 8).transpose(1, 2),
        x.reshape(1, 2, -1, 8),
        x.exp().reshape(1, 2, -1, 8),
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).square()


def convolution(x: Tensor) -> Tensor:
    return F.conv1d(
        x[None], W[:, :3, None].expand(-1, -1, 3)[:, : x.shape[0]] if x.shape[0] == 3 else V[:8, :8, None]
    ).tanh()


def norms(x: Tensor) -> Tensor:
    return F.layer_norm(x.exp(), (16,), W[:, 0], W[:, 1]).softmax(-1) * x


def router(x: Tensor) -> Tensor:
    """Several outputs, of which autograd saves one; and an operation that is kept twice."""
    values, chosen = (x @ SQUARE).topk(4)
    return values.softmax(-1) * x.sort(-1).values.gather(-1, chosen).exp()


def fused(x: Tensor) -> Tensor:
    return gpuckpt.functional.mlp(x, V.T[:16, :].T.contiguous(), V.T.contiguous()).sin()


def noise(x: Tensor) -> Tensor:
    """Random numbers that are kept, before some that are not."""
    return F.dropout(x * torch.rand_like(x).exp() * torch.rand(16), 0.5).exp() * torch.randn(16)


def sums(x: Tensor) -> Tensor:
    return (x.cumsum(0).sin() @ SQUARE).logsumexp(-1).exp() * x.sum().cos()


CASES: list[tuple[Callable[[Tensor], Tensor], list[Any]]] = [
    (mlp, [MM]),
    (mlp, [MM, aten.tanh.default]),
    (linear, [aten.addmm.default, MM]),
    (attention, [aten._scaled_dot_product_flash_attention_for_cpu.default]),
    (attention, [MM, aten.exp.default]),
    (convolution, [aten.convolution.default]),
    (norms, [aten.native_layer_norm.default]),
    (norms, [aten._softmax.default, aten.exp.default]),
    (router, [aten.topk.default, aten.sort.default]),
    (router, [MM]),
    (fused, [torch.ops.gpuckpt.mlp_fwd.default]),
    (noise, [aten.rand_like.default]),
    (noise, [aten.rand.default, aten.exp.default]),
    (sums, [aten.cumsum.default, aten.logsumexp.default]),
]
IDS = [f"{work.__name__}-{'-'.join(str(op).split('.')[1] for op in ops)}" for work, ops in CASES]
HOLDS = ["no budget", "account", "pool"]


def budget_of(hold: str) -> CheckpointBudget | None:
    return None if hold == "no budget" else CheckpointBudget("1MiB", device="cpu", hold=hold)


def batch() -> Tensor:
    return leaf(8, 16, seed=4) * 1


def gradients(call: Callable[..., Tensor], work: Callable[[Tensor], Tensor]) -> tuple[list[Any], Counter[Any]]:
    """The bits of the result, of all gradients and of what is drawn afterwards; and what ran in backward."""
    torch.manual_seed(5)
    x = batch()
    y = call(work, x)
    ran = Ran()
    with ran:
        found = torch.autograd.grad(y.sin().sum(), [x, W, V, SQUARE], allow_unused=True)
    return bits([y, *found, torch.rand(3)]), ran.count


def plain(work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return work(x)


def ran_again(work: Callable[[Tensor], Tensor], hold: str, keep: Any) -> Counter[Any]:
    """What a recompute runs; the gradients are those of the plain run."""
    expected, backward = gradients(plain, work)
    budget = budget_of(hold)
    got, count = gradients(functools.partial(checkpoint, budget=budget, keep=keep), work)
    assert got == expected
    if budget is not None:
        assert budget.used_bytes == 0
    count.subtract(backward)
    return count


@pytest.mark.parametrize(("work", "ops"), CASES, ids=IDS)
@pytest.mark.parametrize("hold", HOLDS)
def test_what_is_kept_does_not_run_again(work: Callable[[Tensor], Tensor], ops: list[Any], hold: str) -> None:
    count = ran_again(work, hold, ops)
    assert [count[op] for op in ops] == [0] * len(ops)
    if hold == "no budget":
        without = ran_again(work, hold, None)
        assert all(without[op] > 0 for op in ops), "a recompute reaches them"


@pytest.mark.parametrize("work", list(dict.fromkeys(work for work, _ in CASES)))
@pytest.mark.parametrize("hold", HOLDS)
def test_everything_that_can_be_kept(work: Callable[[Tensor], Tensor], hold: str) -> None:
    """Views, in-place operations and what these change still run, and nothing else."""
    count = ran_again(work, hold, everything)
    helpers = {aten.detach.default, aten.empty_like.default} if hold != "pool" else set(count)
    assert not {op for op, times in count.items() if times > 0 and not gpuckpt_policy(op)} - helpers


def gpuckpt_policy(op: Any) -> str | None:
    from gpuckpt.pytorch.engine.kept.policy import can_be_kept

    return can_be_kept(op)


# ---- bytes


@pytest.mark.parametrize("hold", ["account", "pool"])
@pytest.mark.parametrize(
    ("work", "ops", "kept_bytes"),
    [
        (mlp, [MM], 8 * 32 * 4),  # of the two, that which autograd saves something after
        (mlp, [aten.tanh.default], 8 * 32 * 4),
        (mlp, [MM, aten.tanh.default], 2 * 8 * 32 * 4),
        (router, [aten.topk.default], 8 * 4 * (4 + 8)),
        (norms, [aten.native_layer_norm.default], 8 * 16 * 4 + 2 * 8 * 4),
    ],
)
def test_bytes_are_those_of_the_input_and_of_what_is_kept(work, ops, kept_bytes: int, hold: str) -> None:
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
    y = checkpoint(work, batch(), budget=budget, keep=ops)
    assert budget.used_bytes == 8 * 16 * 4 + kept_bytes
    y.sum().backward()
    assert budget.used_bytes == 0

    budget = CheckpointBudget(8 * 16 * 4 + kept_bytes - 1, device="cpu", hold=hold)
    with pytest.raises(BudgetExceeded):
        checkpoint(work, batch(), budget=budget, keep=ops)
    assert budget.used_bytes == 0


def test_what_is_kept_and_saved_again_counts_once() -> None:
    budget = CheckpointBudget("1MiB", device="cpu")
    y = checkpoint(lambda x: (x @ W).exp().sin(), batch(), budget=budget, keep=[MM, aten.exp.default])
    held_bytes = budget.used_bytes
    y.sum().backward()
    assert budget.peak_bytes == held_bytes == 8 * 16 * 4 + 2 * 8 * 32 * 4


# ---- policies


def prefer(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_SAVE if op is MM else CheckpointPolicy.PREFER_RECOMPUTE


def must(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is MM else CheckpointPolicy.MUST_RECOMPUTE


def by_output(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    assert not ctx.is_recompute
    return op is MM and ctx.op_output.shape[-1] == 32


def by_argument(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    return op is MM and args[1].shape[-1] == 32


POLICIES: list[Any] = [prefer, must, by_output, by_argument, (MM,), {MM}, frozenset({MM})]


@pytest.mark.parametrize("keep", POLICIES)
def test_ways_to_say_what_is_kept(keep: Any) -> None:
    assert ran_again(mlp, "account", keep)[MM] == 0
    if isinstance(keep, tuple | set | frozenset):
        return
    context_fn = functools.partial(create_selective_checkpoint_contexts, keep)
    expected, backward = gradients(plain, mlp)
    got, count = gradients(lambda fn, x: checkpoint(fn, x, use_reentrant=False, context_fn=context_fn), mlp)
    assert got == expected
    assert count[MM] == backward[MM]


def test_torchs_contexts_with_a_list() -> None:
    expected, backward = gradients(plain, mlp)
    call = functools.partial(checkpoint, context_fn=lambda: create_selective_checkpoint_contexts([MM]))
    got, count = gradients(call, mlp)
    assert got == expected
    assert count[MM] == backward[MM]


def test_a_policy_that_counts() -> None:
    """Every second product, as in torch's tutorial."""
    made: Counter[Any] = Counter()

    def every_second(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        made[op] += 1
        return op is MM and made[op] % 2 == 1

    def work(x: Tensor) -> Tensor:
        for _ in range(5):
            x = (x @ SQUARE).sin()
        return x

    assert ran_again(work, "account", every_second)[MM] == 2


def refused() -> list[tuple[Any, type[Exception], str]]:
    def answer(value: Any) -> Callable[..., Any]:
        return lambda ctx, op, *args, **kwargs: value

    return [
        ([aten.view.default], ValueError, "aten.view.default, which is a view"),
        ([MM, aten.t.default], ValueError, "aten.t.default, which is a view"),
        ([aten.add_.Tensor], ValueError, "in place"),
        ([aten.bernoulli_.float], ValueError, "in place"),
        ([aten.linear.default], ValueError, "takes apart"),
        ([aten.scaled_dot_product_attention.default], ValueError, "takes apart"),
        ([aten.equal.default], ValueError, "returns no tensor"),
        ([aten.mm], ValueError, r"several operations: torch\.ops\.aten\.mm\.default"),
        (["mm"], ValueError, "keep names 'mm'"),
        ("mm", TypeError, "expected operations"),
        (3, TypeError, "expected operations"),
        (MM, TypeError, "expected operations"),
        (answer(CheckpointPolicy.MUST_SAVE), ValueError, "MUST_SAVE for aten.*PREFER_SAVE"),
        (answer(None), ValueError, "answers None"),
        (answer(CheckpointPolicy.PREFER_CPU_OFFLOAD), ValueError, "spill"),
        (answer(1), ValueError, "answers 1"),
    ]


@pytest.mark.parametrize(("keep", "error", "text"), refused())
def test_what_cannot_be_kept(keep: Any, error: type[Exception], text: str) -> None:
    budget = CheckpointBudget("1MiB", device="cpu")
    with pytest.raises(error, match=text):
        checkpoint(linear, batch(), budget=budget, keep=keep)
    assert budget.used_bytes == 0


def test_two_policies() -> None:
    with pytest.raises(TypeError, match="one of them"):
        checkpoint(mlp, batch(), keep=[MM], context_fn=lambda: create_selective_checkpoint_contexts([MM]))


# ---- outputs that are changed in place


def changed(x: Tensor) -> Tensor:
    y = x @ W
    y.add_(1)
    return F.relu(y.mul(2), inplace=True).exp()


@pytest.mark.parametrize("hold", HOLDS)
def test_what_is_changed_later(hold: str) -> None:
    """A copy is kept where it has to be, and nothing where not; a view of it may be what is changed."""

    def through_a_view(x: Tensor) -> Tensor:
        values, _ = (x @ SQUARE).topk(4)
        values[:, 1].mul_(2)
        return values.sin().mul_(3).exp()

    assert ran_again(changed, hold, [MM])[MM] == 0
    assert ran_again(changed, hold, everything)[MM] == 1
    assert ran_again(through_a_view, hold, [aten.topk.default, aten.sin.default])[aten.topk.default] == 0
    inner = functools.partial(checkpoint, through_a_view, keep=[aten.topk.default])
    ran_again(lambda x: inner(x).sin(), hold, [MM])
    ran_again(lambda x: checkpoint(inner, x).sin(), hold, None)

    x = batch()
    y = checkpoint(through_a_view, x, keep=[aten.topk.default], budget=budget_of(hold))
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(first, *torch.autograd.grad(y.sum(), x))
    budget = CheckpointBudget("1MiB", device="cpu", hold="account" if hold == "no budget" else hold)
    y = checkpoint(changed, batch(), keep=[MM], budget=budget)
    assert budget.used_bytes == 8 * 16 * 4 + 8 * 32 * 4


@pytest.mark.parametrize("hold", ["no budget", "account"])
def test_what_is_changed_where_nobody_sees_it(hold: str) -> None:
    def work(x: Tensor) -> Tensor:
        made.append(x @ W)
        return made[-1].tanh()

    made: list[Tensor] = []
    y = checkpoint(work, batch(), keep=[MM], budget=budget_of(hold))
    with torch.no_grad():
        made[0].add_(1)
    with pytest.raises(SavedTensorModified):
        y.sum().backward()


# ---- frames within frames, derivatives, and what a budget does when it is full


def test_frames_within_frames() -> None:
    """Each keeps of its own work; what an inner one keeps, the outer one drops and brings back."""
    inner = functools.partial(checkpoint, mlp, keep=[MM])

    def work(x: Tensor) -> Tensor:
        return checkpoint(lambda x: inner(inner(x)), x).sin()

    for keep in (None, [aten.sin.default], [MM], everything):
        for hold in HOLDS:
            ran_again(work, hold, keep)
    budget = CheckpointBudget("1MiB", device="cpu")
    y = checkpoint(work, batch(), budget=budget)
    assert budget.used_bytes == 8 * 16 * 4
    y.sum().backward()
    assert budget.used_bytes == 0


@pytest.mark.parametrize("hold", HOLDS)
def test_backward_twice_and_second_derivatives(hold: str) -> None:
    def second(call: Callable[..., Tensor]) -> list[Any]:
        x = batch()
        torch.manual_seed(0)
        y = call(mlp, x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found = torch.autograd.grad(first.square().sum(), [x, W, V], retain_graph=True)
        return bits([first, *found, *torch.autograd.grad(y.sum(), [x, W])])

    budget = budget_of(hold)
    for keep in ([MM], [aten.tanh.default], everything):
        assert second(functools.partial(checkpoint, budget=budget, keep=keep)) == second(plain)
    assert budget is None or budget.used_bytes == 0


def force(x: Tensor) -> Tensor:
    """The work differentiates what it makes, through operations that are kept."""
    energy = (x @ W).tanh() @ V
    (found,) = torch.autograd.grad(energy.square().sum(), x, create_graph=True)
    return found.sin() * energy


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("keep", [[MM], [aten.tanh.default], everything])
def test_derivatives_inside_of_the_work(keep: Any, hold: str) -> None:
    ran_again(force, hold, keep)
    ran_again(lambda x: checkpoint(force, x, keep=keep).exp(), hold, [MM])


def full_budgets() -> Iterator[tuple[str, Callable[[], CheckpointBudget]]]:
    def host() -> CheckpointBudget:
        return CheckpointBudget("1MiB", device="cpu", hold="pool")

    yield "recompute", lambda: CheckpointBudget(9800, device="cpu", over_cap="recompute")
    yield "spill", lambda: CheckpointBudget(7000, device="cpu", over_cap="spill", spill_to=host())
    yield "pool", lambda: CheckpointBudget(8000, device="cpu", hold="pool", over_cap="spill", spill_to=host())


@pytest.mark.parametrize("budget_of", [pytest.param(make, id=name) for name, make in full_budgets()])
def test_a_full_budget(budget_of: Callable[[], CheckpointBudget]) -> None:
    """Three blocks, each of which keeps 1 KiB and more, and recomputes more."""

    def run(call: Callable[..., Tensor], x: Tensor) -> Tensor:
        for _ in range(3):
            x = call(mlp, x)
        return x

    expected, _ = gradients(lambda work, x: run(plain, x), mlp)
    budget = budget_of()
    keep = [MM, aten.tanh.default]
    got, _ = gradients(lambda work, x: run(functools.partial(checkpoint, budget=budget, keep=keep), x), mlp)
    assert got == expected
    assert budget.used_bytes == 0
    assert budget.peak_bytes > 6000


# ---- alongside everything else


def test_contents_are_compared_and_nothing_is_kept_of_that() -> None:
    """A checksum is made of operations too, more of them in forward than in the recompute."""

    def work(x: Tensor) -> Tensor:
        (x @ W).exp().sin()  # its result is dropped, and what it saved
        return mlp(x).exp()

    expected, _ = gradients(plain, work)
    for hold in HOLDS:
        call = functools.partial(checkpoint, budget=budget_of(hold), keep=everything, verify="bitwise")
        assert gradients(call, work)[0] == expected


def into_a_pool(x: Tensor) -> Tensor:
    with CheckpointBudget("1MiB", device="cpu", hold="pool"):
        return (x @ W).exp().sin()


class Average(nn.Module):
    """Takes off a moving average: (B, D) -> (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.mean
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return y


def with_buffers(x: Tensor) -> Tensor:
    norm = Average()
    energy = checkpoint(lambda x: norm(x).exp() @ W, x)
    (found,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return found.sin() * energy.mean()


def with_buffers_plainly(x: Tensor) -> Tensor:
    norm = Average()
    energy = norm(x).exp() @ W
    (found,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return found.sin() * energy.mean()


@pytest.mark.parametrize(
    ("work", "alone"), [(into_a_pool, lambda x: (x @ W).exp().sin()), (with_buffers, with_buffers_plainly)]
)
@pytest.mark.parametrize("hold", HOLDS)
def test_what_else_runs_within_the_work_is_none_of_its_operations(work, alone, hold: str) -> None:
    """Copies into a pool, of which a recompute makes fewer; buffers that are copied for a frame inside, and put back."""
    expected, _ = gradients(plain, alone)
    x = batch()
    with Ran() as ran:
        alone(x)
    asked: Counter[Any] = Counter()

    def counted(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        asked[op] += 1
        return True

    assert gradients(functools.partial(checkpoint, budget=budget_of(hold), keep=counted), work)[0] == expected
    del ran.count[aten.detach.default]
    assert asked == ran.count


def test_what_runs_once_is_no_operation_of_the_work() -> None:
    def work(x: Tensor) -> Tensor:
        scale = once(lambda: (x.detach() @ W.detach()).abs().max())
        return (x @ W).tanh() * scale

    for hold in HOLDS:
        assert ran_again(work, hold, [MM])[MM] == 0


def test_autocast() -> None:
    def work(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (x @ W).tanh() @ V + (x @ W) @ V

    for keep in ([MM], [aten._to_copy.default], everything):
        count = ran_again(work, "account", keep)
        assert count[MM] == (3 if keep == [aten._to_copy.default] else 0)  # a recompute ends before the last


def test_other_work_than_forward() -> None:
    calls: list[Tensor] = []

    def work(x: Tensor) -> Tensor:
        calls.append(x)
        return x.exp() * (x.detach() @ SQUARE.detach()[:, : 16 // len(calls)]).mean()

    y = checkpoint(work, batch(), keep=[MM])
    with pytest.raises(RecomputeMismatch, match=r"called aten.mm.default of tensors of shapes \(8, 16\), \(16, 8\)"):
        y.sum().backward()


def test_other_threads() -> None:
    """Forward on one, backward on another, while a third one does the same."""

    def train(out: list[Any]) -> None:
        x = batch()
        y = checkpoint(force, x, keep=[MM])
        backward = threading.Thread(target=lambda: out.append(torch.autograd.grad(y.sum(), [x, W])))
        backward.start()
        backward.join()

    found: list[Any] = []
    threads = [threading.Thread(target=train, args=(found,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    x = batch()
    expected = bits(torch.autograd.grad(force(x).sum(), [x, W]))
    assert [bits(grads) for grads in found] == [expected] * 3


def test_without_gradients_and_in_transforms_it_is_a_plain_call() -> None:
    with torch.no_grad():
        assert torch.equal(checkpoint(linear, batch(), keep=[MM]), linear(batch()))
    with pytest.warns(UserWarning, match="plain call"):
        torch.func.vmap(lambda x: checkpoint(torch.sin, x, keep=[MM]))(batch())


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_code_inside() -> None:
    """Its operations are not seen; those around it are."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    compiled = torch.compile(lambda x: x.sin() @ SQUARE, backend="aot_eager")

    def trained(call: Callable[..., Tensor]) -> list[Any]:
        torch.manual_seed(0)
        x = batch()
        y = call(lambda x: compiled(layer(compiled(x)[None])).exp(), x)
        return bits([y, *torch.autograd.grad(y.sum(), [x, SQUARE, *layer.parameters()])])

    expected = trained(lambda fn, x: fn(x))
    for keep in ([aten.addmm.default], [MM], everything):
        assert trained(functools.partial(checkpoint, keep=keep)) == expected


def test_tensors_made_of_others() -> None:
    """DTensor: its operations are kept, and not those on the parts inside."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))

        def work(x: Tensor) -> Tensor:
            return (x.sin() @ DTensor.from_local(W, mesh, [Shard(1)])).tanh().to_local()

        def call(work: Any, x: Tensor) -> Tensor:
            return work(DTensor.from_local(x, mesh, [Shard(0)]))

        for keep in ([MM], [MM, aten.sin.default]):
            expected, backward = gradients(call, work)
            got, count = gradients(call, functools.partial(checkpoint, work, keep=keep))
            assert got == expected
            assert all(count[op] == backward[op] for op in keep)
    finally:
        torch.distributed.destroy_process_group()
