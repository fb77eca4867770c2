"""`checkpoint_graph`: real traced models with ranges of nodes recomputed; gradients equal, saved bytes as planned."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule, Tracer, symbolic_trace

from gpuckpt import CheckpointBudget
from gpuckpt.errors import BudgetExceeded
from gpuckpt.pytorch.graph import checkpoint_graph
from gpuckpt.segments import GraphCheckpointConfig, GraphSegment, plan_recomputation


def mlp(depth: int = 4, width: int = 8) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers).double()


class Branchy(nn.Module):
    """Attributes, several inputs, chunks, a skip connection, a keyword argument and a tuple of results."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.register_buffer("shift", torch.linspace(-1, 1, 6))
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x: torch.Tensor, y: torch.Tensor, gain: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.blocks[0](x) * self.scale + self.shift
        a, b = torch.chunk(h, 2, dim=-1)
        h = torch.cat([torch.sin(a) * b, torch.cos(b)], dim=-1)
        z = self.blocks[1](y).sigmoid() * gain
        out = self.blocks[2](h + z) + x
        return out, (z * h).sum(dim=-1, keepdim=True)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.drop(self.first(x)))).sum(dim=0)


class Block(nn.Module):
    """A transformer block: what a traced model really looks like, views and keyword arguments included."""

    def __init__(self, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        heads = [t.reshape(t.size(0), self.heads, -1).transpose(0, 1) for t in (q, k, v)]
        a = nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1).reshape(x.size(0), -1)
        x = x + self.drop(self.proj(a))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh")))


def gradients(module: nn.Module, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(outputs, gradients of inputs and parameters), the random numbers the same every time."""
    torch.manual_seed(0)
    leaves = [i.clone().requires_grad_() for i in inputs]
    module.zero_grad()
    outputs = module(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    sum((o * torch.arange(1, o.numel() + 1).reshape(o.shape)).sum() for o in outputs).backward()
    grads = [leaf.grad for leaf in leaves] + [p.grad.clone() for p in module.parameters()]
    return [o.detach() for o in outputs], grads


def inputs_for(count: int, width: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, width, generator=generator, dtype=torch.float64) for _ in range(count)]


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "mlp": (mlp, 1, 8),
    "branchy": (lambda: Branchy().double(), 2, 6),
    "noisy": (lambda: Noisy().double(), 1, 6),
    "transformer": (lambda: nn.Sequential(Block(), Block()).double(), 1, 6),
}


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ranges_give_the_plain_gradients_bit_for_bit(name: str, data: st.DataObject) -> None:
    make, count, width = MODELS[name]
    torch.manual_seed(2)
    traced = symbolic_trace(make())
    num_nodes = len(traced.graph.nodes)
    cuts = sorted(data.draw(st.sets(st.integers(0, num_nodes - 1), max_size=8), label="cuts"))
    segments = [GraphSegment(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    inputs = inputs_for(count, width)
    expected = gradients(traced, inputs)
    again = gradients(checkpoint_graph(traced, GraphCheckpointConfig(segments)), inputs)
    for ours, theirs in zip(expected[0] + expected[1], again[0] + again[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("hold", ["account", "pool"])
def test_saved_bytes_are_as_planned(hold: Any) -> None:
    """A row of activations is 3 x 8 doubles = 192 bytes. Saved without a plan: every linear's input, every tanh's output;
    the output of one is the input of the next, so 4 rows and the model's input."""
    row = 3 * 8 * 8
    traced = symbolic_trace(mlp())
    assert [n.op for n in traced.graph.nodes] == ["placeholder", *["call_module"] * 8, "output"]
    x = inputs_for(1, 8)[0].requires_grad_()

    def saved(config: GraphCheckpointConfig) -> tuple[int, int]:
        budget = CheckpointBudget("1MiB", device="cpu", hold=hold)
        module = checkpoint_graph(traced, config)
        with budget:
            loss = module(x).sum()
            held_bytes = budget.used_bytes
            loss.backward()
        del loss
        assert budget.used_bytes == 0
        return held_bytes, budget.peak_bytes

    # x itself is a leaf of the user's and so never charged; a range that starts with it keeps nothing more.
    assert saved(GraphCheckpointConfig()) == (4 * row, 4 * row)
    assert saved(GraphCheckpointConfig([GraphSegment(1, 8)])) == (0, 4 * row)
    two_halves = GraphCheckpointConfig([GraphSegment(1, 4), GraphSegment(5, 8)])
    assert plan_recomputation(10, two_halves) == [False, *[True] * 8, False]
    # The second half's input; then its two activations beside it.
    assert saved(two_halves) == (row, 3 * row)
    # Nodes 5 to 8 as they are: they save the outputs of nodes 4, 6 and 8.
    assert saved(GraphCheckpointConfig([GraphSegment(1, 4)])) == (3 * row, 3 * row)


def test_a_budget_that_only_the_plan_fits() -> None:
    row = 3 * 8 * 8
    traced = symbolic_trace(mlp())
    x = inputs_for(1, 8)[0].requires_grad_()
    config = GraphCheckpointConfig([GraphSegment(1, 4), GraphSegment(5, 8)])
    with pytest.raises(BudgetExceeded), CheckpointBudget(3 * row, device="cpu"):
        traced(x)
    with CheckpointBudget(3 * row, device="cpu"):
        checkpoint_graph(traced, config)(x).sum().backward()


def test_each_node_of_a_range_runs_twice_and_no_other() -> None:
    calls: SimpleQueue[str] = SimpleQueue()  # a list would be put back after the recompute

    class Spied(nn.Module):
        def __init__(self, label: str) -> None:
            super().__init__()
            self.label, self.linear = label, nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.put(self.label)
            return torch.sin(self.linear(x))

    class LeafTracer(Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Spied)

    model = nn.Sequential(*[Spied(c) for c in "abcde"])
    traced = GraphModule(model, LeafTracer().trace(model))
    module = checkpoint_graph(traced, GraphCheckpointConfig([GraphSegment(1, 2), GraphSegment(4, 4)]))
    module(torch.ones(1, 2)).sum().backward()
    assert "".join(calls.get() for _ in range(calls.qsize())) == "abcde" + "d" + "ab"


def test_a_range_that_reads_parameters_only() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(6) + 0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight / self.weight.norm())

    traced = symbolic_trace(Normed().double())
    names = [n.name for n in traced.graph.nodes]
    start, end = names.index("norm"), names.index("truediv")
    expected = gradients(traced, inputs_for(1))
    again = gradients(checkpoint_graph(traced, GraphCheckpointConfig([GraphSegment(start, end)])), inputs_for(1))
    for ours, theirs in zip(expected[0] + expected[1], again[0] + again[1], strict=True):
        assert torch.equal(ours, theirs)


def test_a_graph_of_aten_operators() -> None:
    """torch.export flattens inputs and outputs and lifts parameters: another shape of graph, the same ranges."""
    model = Branchy().double()
    inputs = inputs_for(2)
    exported = torch.export.export(model, tuple(inputs)).module()
    assert isinstance(exported, GraphModule)
    half = len(exported.graph.nodes) // 2
    config = GraphCheckpointConfig([GraphSegment(half - 6, half + 5)])
    expected = gradients(exported, inputs)
    again = gradients(checkpoint_graph(exported, config), inputs)
    for ours, theirs in zip(expected[0] + expected[1], again[0] + again[1], strict=True):
        assert torch.equal(ours, theirs)


def test_parameters_keep_their_order() -> None:
    """Optimizers number them; here the first layer is in a range and the others are not."""
    traced = symbolic_trace(mlp())
    module = checkpoint_graph(traced, GraphCheckpointConfig([GraphSegment(1, 2)]))
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in traced.named_parameters()]
    assert list(module.state_dict()) == list(traced.state_dict())


def test_the_new_module_shares_everything_with_the_old() -> None:
    traced = symbolic_trace(Branchy())
    module = checkpoint_graph(traced, GraphCheckpointConfig.uniform(len(traced.graph.nodes), 3))
    assert list(module.state_dict()) == list(traced.state_dict())
    for (name, ours), (other, theirs) in zip(module.named_parameters(), traced.named_parameters(), strict=True):
        assert name == other
        assert ours is theirs
    module.double()
    module(*inputs_for(2))[0].sum().backward()
    assert traced.get_submodule("blocks.0").weight.grad is not None
    module.eval()
    assert not module.get_submodule("blocks.0").training
    twin = copy.deepcopy(module)
    assert twin.get_submodule("blocks.0").weight is not module.get_submodule("blocks.0").weight
    before = module.get_submodule("blocks.0").weight.grad.clone()
    twin.zero_grad()
    twin(*inputs_for(2))[0].sum().backward()
    assert torch.equal(module.get_submodule("blocks.0").weight.grad, before)
    torch.testing.assert_close(twin.get_submodule("blocks.0").weight.grad, before)


def test_ranges_that_cannot_be_are_refused_by_name() -> None:
    traced = symbolic_trace(mlp())
    with pytest.raises(
        ValueError, match=r"end_node=10\) runs past the graph.* 0 to 9 \(0 is 'input_1', 9 is 'output'\)"
    ):
        checkpoint_graph(traced, GraphCheckpointConfig([GraphSegment(2, 10)]))
    with pytest.raises(ValueError, match=r"GraphSegment\(start_node=5, end_node=4\) runs backward"):
        GraphSegment(5, 4)
    with pytest.raises(ValueError, match="before node 0"):
        GraphSegment(-1, 4)
    with pytest.raises(ValueError, match=r"start_node=1, end_node=4\) and .*start_node=4, end_node=6\) overlap"):
        GraphCheckpointConfig([GraphSegment(4, 6), GraphSegment(1, 4)])
    with pytest.raises(ValueError, match="runs past the graph, whose nodes are 0 to 3"):
        plan_recomputation(4, GraphCheckpointConfig([GraphSegment(2, 4)]))
    for arguments in ((-1, 2), (2, -1)):
        with pytest.raises(ValueError, match="0 or more"):
            GraphCheckpointConfig.uniform(*arguments)


def test_ranges_with_nothing_to_recompute_change_nothing() -> None:
    traced = symbolic_trace(mlp(1))
    ends = GraphCheckpointConfig([GraphSegment(0, 0), GraphSegment(3, 3)])
    module = checkpoint_graph(traced, ends)
    assert [n.op for n in module.graph.nodes] == [n.op for n in traced.graph.nodes]
    everything = checkpoint_graph(traced, GraphCheckpointConfig([GraphSegment(0, 3)]))
    targets: list[Any] = [n.target for n in everything.graph.nodes]
    assert "recomputed_0_to_3" in targets
    assert operator.length_hint(targets) == 4
