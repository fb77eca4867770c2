"""What a block makes in its first forward and reads in later ones: fitted as every step but the first finds it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gpuckpt import Fitted, InvalidChain, fit
from gpuckpt.pytorch.plan_maker import PlanMaker
from tests.pytorch.steps import Layer, batch, gradients

WIDTH, ROWS = 16, 32


class Table(Layer):
    """Positions that are worked out once, and again for longer inputs."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < len(x):
            self.table = torch.arange(float(len(x) * WIDTH)).view(-1, WIDTH).cos()
        return super().forward(x * self.table[: len(x)])


class Masks(Layer):
    """A mask for each length, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.masks:
            self.masks[len(x)] = torch.ones(len(x), len(x)).tril()
        return super().forward(self.masks[len(x)] @ x)


class Memory(Layer):
    """What the step before ended with, as Transformer-XL remembers it."""

    memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before, self.memory = self.memory, x.detach()
        return super().forward(x if before is None else x * before.sigmoid())


class State:
    def __init__(self) -> None:
        self.scale: Tensor | None = None


class InAnObject(Layer):
    """A scale that the first forward finds, in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()

    def forward(self, x: Tensor) -> Tensor:
        if self.state.scale is None:
            self.state.scale = x.detach().square().add(1).sqrt()
        return super().forward(x / self.state.scale)


class Buffer(Layer):
    """A table that becomes a buffer in the first forward."""

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self._buffers:
            self.register_buffer("table", torch.arange(float(len(x) * WIDTH)).view(-1, WIDTH).cos(), persistent=False)
        return super().forward(x * self.table)


class Shared(Layer):
    """The first block works out a gate for all, which the training loop takes out after each step; each makes a mask."""

    def __init__(self, gates: dict[str, Tensor]) -> None:
        super().__init__()
        self.gates = gates
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(len(x), 1)
        if "gate" not in self.gates:
            self.gates["gate"] = self.down(self.up(x)).sigmoid()
        return super().forward(x * self.mask) * self.gates["gate"]


class Left(Layer):
    """Leaves its output, with its graph, for others to see."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last * 1


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def fitted_at(model: nn.Module, share: float, x: Tensor) -> Fitted:
    """Between the smallest budget (0) and one that holds all (1)."""
    certificate = fit(copy.deepcopy(model), x, 1 << 40).plan.certificate
    smallest_bytes, largest_bytes = certificate.smallest_budget_bytes, certificate.peak_bytes
    return fit(model, x, int(smallest_bytes + share * (largest_bytes - smallest_bytes)))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block", [Table, Masks, Memory, InAnObject, Buffer, Left])
def test_every_step_but_the_first_holds_what_is_promised(
    block: Callable[[], nn.Module], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []
    make = PlanMaker.make
    monkeypatch.setattr(PlanMaker, "make", lambda self, *args: measured.append(args) or make(self, *args))
    model, x = Net(block), batch(ROWS)
    plain = copy.deepcopy(model)
    fitted = fitted_at(model, share, x)
    measured.clear()
    for step in range(4):
        assert gradients(model, lambda: fitted(x), step) == gradients(plain, lambda: plain(x), step)
        assert fitted.measured_peak_bytes <= fitted.promised_peak_bytes <= fitted.budget.max_bytes
        assert step == 0 or fitted.measured_peak_bytes == fitted.promised_peak_bytes
        for each in (*model.modules(), *plain.modules()):
            if isinstance(each, Left):
                each.__dict__.pop("last", None)
        assert fitted.budget.used_bytes == 0
    assert not fitted.deviations
    assert not measured


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_one_forward_leaves_with_its_graph_is_not_there_in_the_next(share: float) -> None:
    gates: dict[str, Tensor] = {}
    model, x = Net(lambda: Shared(gates)), batch(ROWS)
    plain = copy.deepcopy(model)
    fitted = fitted_at(model, share, x)
    assert not gates
    for step in range(3):
        found = [gradients(m, lambda m=m: m(x), step) for m in (model, plain)]
        assert found[0] == found[1]
        assert fitted.measured_peak_bytes <= fitted.promised_peak_bytes
        assert plain.blocks[0].gates.pop("gate").requires_grad
        assert gates.pop("gate").requires_grad
    assert not fitted.deviations


@pytest.mark.parametrize("block", [Table, Masks, Memory, InAnObject, Buffer, Left])
def test_fit_leaves_no_state(block: Callable[[], nn.Module]) -> None:
    model = Net(block)
    before = [(dict(part.__dict__), dict(part._buffers)) for part in model.blocks]
    fit(model, batch(ROWS), "1MiB")
    for part, (attributes, buffers) in zip(model.blocks, before, strict=True):
        assert {name: part.__dict__.get(name) for name in attributes if name != "_compiled_call_impl"} == {
            name: value for name, value in attributes.items() if name != "_compiled_call_impl"
        }
        assert not isinstance(part, Table | Memory | Left) or not {"table", "memory", "last"} & part.__dict__.keys()
        assert dict(part._buffers) == buffers
        assert not isinstance(part, Masks) or part.masks == {}
        assert not isinstance(part, InAnObject) or part.state.scale is None


class Linears(nn.Module):
    """Lazy layers of one kind, whose tensors have no shape before the first forward."""

    def __init__(self, first: nn.Module, *rest: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).square().mean()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Linears(*(nn.LazyLinear(WIDTH) for _ in range(4))), (4, WIDTH)),
        (lambda: Linears(*(nn.LazyConv1d(4, 3, padding=1) for _ in range(4))), (2, 4, 8)),
        (lambda: Linears(nn.Linear(WIDTH, WIDTH), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyBatchNorm1d()), (4, WIDTH)),
    ],
)
@pytest.mark.parametrize("example", [True, False])
def test_lazy_modules_are_refused_until_they_have_shapes(
    make: Callable[[], nn.Module], shape: tuple[int, ...], example: bool
) -> None:
    model, x = make(), torch.randn(shape)
    with pytest.raises(
        InvalidChain, match=r"'blocks.\d.\w+' gets its shape in the first forward .* call the model once"
    ):
        fit(model, x if example else None, "1MiB")
    model(x)
    plain = copy.deepcopy(model)
    fitted = fit(model, x if example else None, "1MiB")
    assert gradients(model, lambda: fitted(x)) == gradients(plain, lambda: plain(x))
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes


def test_parameters_that_the_first_batch_decides_are_refused_by_name() -> None:
    class ActNorm(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.ready = nn.Parameter(torch.ones(WIDTH)), False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                with torch.no_grad():
                    self.scale.copy_(1 / (x.std(0) + 1))
                self.ready = True
            return super().forward(x * self.scale)

    model, x = Net(ActNorm), batch(ROWS)
    with pytest.raises(InvalidChain, match=r"'scale' in place .* \(call the model once on a batch, then fit it\)"):
        fit(model, x, "1MiB")
    model(x)
    plain = copy.deepcopy(model)
    fitted = fitted_at(model, 0.0, x)
    assert gradients(model, lambda: fitted(x)) == gradients(plain, lambda: plain(x))
    assert fitted.measured_peak_bytes == fitted.promised_peak_bytes
