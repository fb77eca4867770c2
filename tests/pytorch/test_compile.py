"""torch.compile around, inside and after: the cap is kept and gradients are right, or one clear error says what to do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import CheckpointBudget, CheckpointError, checkpoint, fit
from gpuckpt.pytorch.fitted import Fitted
from tests.pytorch.steps import bits, blocks

BACKEND = "aot_eager"

# The compiler itself looks at the .grad of tensors that are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Model(nn.Module):
    """A stem, six blocks, a head and its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(16, 16)
        self.blocks = blocks(6)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def limit_bytes(x) -> int:
    """Between the least that will do and what a plain run holds."""
    fitted = fit(Model(), x, "1MiB")
    least, most = fitted.plan.certificate.smallest_budget_bytes, fitted.plan.certificate.peak_bytes
    return (least + most) // 2


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[bytes | None]:
    model.zero_grad(set_to_none=True)
    loss = call(x)
    loss.backward()
    return bits([loss, *(p.grad for p in model.parameters())])


def assert_kept(fitted: Fitted) -> None:
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes == fitted.budget.peak_bytes
    assert 0 < fitted.budget.peak_bytes <= fitted.budget.max_bytes
    assert fitted.budget.used_bytes == 0


def compiled_after(model, x, limit):
    fitted = fit(model, x, limit)
    return fitted, torch.compile(model, backend=BACKEND)


def compiled_before(model, x, limit):
    compiled = torch.compile(model, backend=BACKEND)
    return fit(compiled, x, limit), compiled


def compiled_blocks(model, x, limit):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend=BACKEND)
    return fit(model, x, limit), model


def blocks_compiled_in_place(model, x, limit):
    for block in model.blocks:
        block.compile(backend=BACKEND)
    return fit(model, x, limit), model


def blocks_compiled_in_place_later(model, x, limit):
    fitted = fit(model, x, limit)
    step(model, model, x)
    for block in model.blocks:
        block.compile(backend=BACKEND)
    return fitted, model


def compiled_forwards(model, x, limit):
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=BACKEND)
    return fit(model, x, limit), model


def compiled_loop_over_a_fitted_model(model, x, limit):
    fitted = fit(model, x, limit)
    return fitted, torch.compile(lambda x: fitted(x * 1), backend=BACKEND)


WAYS = (
    compiled_after,
    compiled_before,
    compiled_blocks,
    blocks_compiled_in_place,
    blocks_compiled_in_place_later,
    compiled_forwards,
    compiled_loop_over_a_fitted_model,
)


@pytest.mark.parametrize("way", WAYS)
def test_fit_and_compile(way, x, limit_bytes):
    plain = Model()
    expected = step(plain, plain, x)
    model = Model()
    fitted, call = way(model, x, limit_bytes)
    for _ in range(3):
        assert step(call, model, x) == expected
        assert_kept(fitted)


def compiled_outer_model(model, x, limit):
    fitted = fit(model, x, limit)
    return fitted, torch.compile(nn.Sequential(nn.Identity(), model), backend=BACKEND)


def outer_model_compiled_in_place(model, x, limit):
    fitted = fit(model, x, limit)
    outer = nn.Sequential(nn.Identity(), model)
    outer.compile(backend=BACKEND)
    return fitted, outer


@pytest.mark.parametrize("way", [compiled_outer_model, outer_model_compiled_in_place])
def test_a_fitted_model_inside_a_compiled_one(way, x, limit_bytes):
    test_fit_and_compile(way, x, limit_bytes)


def test_a_call_that_goes_around_the_plan_is_refused(x, limit_bytes):
    """module.compile() takes the place that fit has taken, and with it would go the cap."""
    model = Model()
    fitted = fit(model, x, limit_bytes)
    model.compile(backend=BACKEND)
    with pytest.raises(CheckpointError, match="went around its plan"):
        model(x)
    assert fitted.budget.used_bytes == 0
    with torch.no_grad():
        model(x)
    fitted.unfit()
    plain = Model()
    assert step(model, model, x) == step(plain, plain, x)


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.sigmoid(torch.matmul(x, y)).tanh()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("hold", [None, "account", "pool"])
def test_compiled_code_around_a_checkpoint(hold, backend):
    budget = None if hold is None else CheckpointBudget("1MiB", device="cpu", hold=hold)

    def run(compiled: bool) -> list[bytes | None]:
        x, y = (torch.randn(4, 4, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (1, 2))

        def function(x, y):
            return checkpoint(square, torch.sin(x), y, budget=budget).cos()

        out = (torch.compile(function, backend=backend) if compiled else function)(x, y)
        out.sum().backward()
        return bits([out, x.grad, y.grad])

    assert run(True) == run(False)
    assert budget is None or budget.used_bytes == 0


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_a_budget_around_compiled_code(hold, x):
    plain = Model()
    expected = step(plain, plain, x)
    model = Model()
    compiled = torch.compile(model, backend=BACKEND)
    budget = CheckpointBudget("1MiB", device="cpu", hold=hold)

    def call(x: Tensor) -> Tensor:
        with budget:
            loss = compiled(x)
        assert budget.used_bytes > 0
        return loss

    for _ in range(2):
        assert step(call, model, x) == expected
        assert budget.used_bytes == 0


def test_checkpoints_of_compiled_functions(x):
    budget = CheckpointBudget("1MiB", device="cpu")
    model, plain = Model(), Model()
    inner = [torch.compile(block, backend=BACKEND) for block in model.blocks]

    def call(x: Tensor) -> Tensor:
        x = model.stem(x)
        for block in inner:
            x = checkpoint(block, x, budget=budget)
        return model.head(x).square().mean()

    assert step(call, model, x) == step(plain, plain, x)
    assert budget.used_bytes == 0


def test_full_graphs_are_refused_by_torch_with_our_reason():
    with pytest.raises(Exception, match="runs eagerly"):
        torch.compile(lambda x: checkpoint(torch.sin, x), backend="eager", fullgraph=True)(
            torch.ones(2, requires_grad=True)
        )


def test_a_data_parallel_replica_is_refused(x, limit_bytes):
    model = Model()
    fit(model, x, limit_bytes)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(CheckpointError, match="DataParallel"):
        replica(x)
    block = model.blocks[2]._replicate_for_data_parallel()
    with pytest.raises(CheckpointError, match="DataParallel"):
        block(x)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_fitted_model_are_plain(clone, x, limit_bytes):
    model = Model()
    fitted = fit(model, x, limit_bytes)
    twin = clone(model)
    expected = step(twin, twin, x)
    assert fitted.budget.peak_bytes == 0
    assert step(model, model, x) == expected
    assert_kept(fitted)
    twin.compile(backend=BACKEND)
    assert step(twin, twin, x) == expected
