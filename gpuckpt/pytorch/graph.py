"""`checkpoint_graph`: run a traced PyTorch model with ranges of its nodes recomputed in backward.

Each range becomes one call under `gpuckpt.checkpoint`: its inputs are kept, what its nodes save for autograd is not. Ranges
are contiguous in the graph's own order, so whatever a range needs is computed before it and nothing can go in a circle.

The new module shares the old one's submodules, parameters and buffers, under the same names: an optimizer, `state_dict`,
`to` and `train` see no difference. What a range writes into its buffers is written once: running statistics of BatchNorm and
InstanceNorm stand still while it is run again, and a range that writes into a buffer by itself is run again on copies of what
the buffers were. Not handled: other side effects of nodes, which happen twice.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from gpuckpt.checks import shown
from gpuckpt.pytorch.checkpoint import checkpoint
from gpuckpt.segments.graph import GraphCheckpointConfig

__all__ = ["checkpoint_graph"]

_COMPUTES = ("call_function", "call_method", "call_module")
"""Nodes that do work. Placeholders, attributes and the output count as nodes too, but there is nothing in them to redo."""


def checkpoint_graph(graph_module: GraphModule, config: GraphCheckpointConfig) -> GraphModule:
    """A module that computes what `graph_module` computes, with the config's ranges recomputed in backward.

    Node ids count `graph_module.graph.nodes` from 0, placeholders and the output included. What is kept is held by the
    budget whose `with` block the module runs in, if any; random numbers are repeated in the recompute.

    Raises `ValueError`, naming segment and nodes, where a segment runs past the graph. (Segments that overlap or run
    backward cannot be built: see `GraphCheckpointConfig` and `GraphSegment`.)

    >>> from gpuckpt.segments import GraphSegment
    >>> traced = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)))
    >>> x = torch.ones(4, 2)
    >>> recomputed = checkpoint_graph(traced, GraphCheckpointConfig([GraphSegment(1, 2)]))
    >>> torch.equal(recomputed(x), traced(x))
    True
    """
    if not isinstance(graph_module, GraphModule):
        raise TypeError(
            f"graph_module is {shown(graph_module)}; expected a GraphModule, such as torch.fx.symbolic_trace gives"
        )
    if not isinstance(config, GraphCheckpointConfig):
        raise TypeError(f"config is {shown(config)}; expected a GraphCheckpointConfig")
    nodes = list(graph_module.graph.nodes)
    try:
        config.check_within(len(nodes))
    except ValueError as error:
        raise ValueError(f"{error} (0 is {nodes[0].name!r}, {len(nodes) - 1} is {nodes[-1].name!r})") from None

    graph = Graph()
    graph.set_codegen(copy.copy(graph_module.graph._codegen))
    env: dict[Node, Node] = {}
    ranges: dict[str, _Range] = {}
    inside: list[Node] = []
    for index, node in enumerate(nodes):
        segment = config.segment_of(index)
        computes = segment is not None and node.op in _COMPUTES
        if computes:
            inside.append(node)
        if inside and segment is not None and (index == segment.end_node or node.op == "output"):
            name = f"recomputed_{segment.start_node}_to_{segment.end_node}"
            ranges[name] = _emit(graph, env, graph_module, inside, name)
            inside = []
        if not computes:
            # An attribute read inside a range is read before the range's call, and handed to it.
            env[node] = graph.node_copy(node, lambda n: env[n])

    graph.lint()
    holder = torch.nn.Module()
    _share_members(graph_module, holder)
    for name, module in ranges.items():
        holder.add_module(name, module)
    result = GraphModule(holder, graph, f"Checkpointed{type(graph_module).__name__}")
    # GraphModule takes over only what its nodes name; the ranges' own submodules belong to it as well.
    _share_members(holder, result)
    result.train(graph_module.training)
    return result


class _Range(torch.nn.Module):
    """One range of nodes. `inner` is kept out of the module tree: its members are there already, under their own names.

    buffers: positions of inputs that are buffers which the range may write into.
    """

    def __init__(self, inner: GraphModule, buffers: tuple[int, ...]) -> None:
        super().__init__()
        self._hidden = (inner,)
        self._written = buffers

    def forward(self, *inputs: Any) -> Any:
        """What the nodes of the range that are used outside of it give, as a tuple."""
        inner = self._hidden[0]
        if not torch.is_grad_enabled():
            return inner(*inputs)
        # What the buffers are now is kept to start from; the first run, and no other, gets the buffers themselves.
        real = [{i: inputs[i] for i in self._written}]

        def run(values: tuple[Any, ...]) -> Any:
            if real:
                buffers = real.pop()
                return inner(*(buffers.get(i, value) for i, value in enumerate(values)))
            return inner(*(value.clone() if i in self._written else value for i, value in enumerate(values)))

        # One tuple as the only argument: a range may well have no input, and is run again all the same.
        return checkpoint(run, tuple(value.clone() if i in self._written else value for i, value in enumerate(inputs)))


def _emit(graph: Graph, env: dict[Node, Node], owner: GraphModule, inside: list[Node], name: str) -> _Range:
    """Write one call into `graph` for the nodes `inside`, and enter its results in `env`."""
    members = set(inside)
    inputs = list(dict.fromkeys(i for n in inside for i in n.all_input_nodes if i not in members))
    outputs = [n for n in inside if any(user not in members for user in n.users)]

    body = Graph()
    inner = {i: body.placeholder(i.name) for i in inputs}
    for node in inside:
        inner[node] = body.node_copy(node, lambda n: inner[n])
    body.output(tuple(inner[n] for n in outputs))

    call = graph.create_node("call_module", name, tuple(env[i] for i in inputs), name=name)
    for position, node in enumerate(outputs):
        env[node] = graph.call_function(_item, (call, position))
        env[node].meta = copy.copy(node.meta)
    buffers = tuple(k for k, i in enumerate(inputs) if _is_buffer(owner, i)) if any(map(_writes, inside)) else ()
    return _Range(GraphModule(owner, body, name), buffers)


def _item(values: tuple[Any, ...], position: int) -> Any:
    return values[position]


_IN_PLACE_OPERATORS = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)

_HIDDEN_WRITERS = ("batch_norm", "instance_norm")
"""Functions that update running statistics though neither their name nor their schema says so."""


def _writes(node: Node) -> bool:
    """Whether a node may change one of its inputs in place, as far as its name, schema or arguments tell."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        return True
    name = getattr(node.target, "__name__", "").partition(".")[0]
    in_place = node.target in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    return in_place or name.endswith(_HIDDEN_WRITERS) or "out" in node.kwargs or node.kwargs.get("inplace") is True


def _is_buffer(owner: GraphModule, node: Node) -> bool:
    """Whether a node reads a tensor attribute that is no parameter."""
    if node.op != "get_attr":
        return False
    value: Any = owner
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)


def _share_members(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Make the members of `source` members of `target` too: the same objects, under the same names, in the same order.

    Optimizers number parameters by their order.
    """
    for kind in ("_modules", "_parameters", "_buffers"):
        theirs, ours = getattr(source, kind), getattr(target, kind)
        merged = {**theirs, **{name: member for name, member in ours.items() if name not in theirs}}
        ours.clear()
        ours.update(merged)
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
