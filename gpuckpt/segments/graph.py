"""Ranges of a graph's nodes that are computed again in backward. Pure: integers in, booleans out.

`gpuckpt.checkpoint_graph` (gpuckpt/pytorch/graph.py) runs a traced PyTorch model under such a configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gpuckpt.checks import check_int, check_sequence, shown

__all__ = ["GraphCheckpointConfig", "GraphSegment", "plan_recomputation"]

_LAST_NODE = 2**63 - 1  # ids are looked up in arrays of int64


@dataclass(frozen=True, order=True)
class GraphSegment:
    """Nodes `start_node` to `end_node`, both included. Raises `ValueError` where it would be empty or begin before 0.

    >>> len(GraphSegment(2, 5)), 5 in GraphSegment(2, 5)
    (4, True)
    """

    start_node: int
    end_node: int

    def __post_init__(self) -> None:
        for name in ("start_node", "end_node"):
            object.__setattr__(self, name, check_int(getattr(self, name), name, None, _LAST_NODE))
        if self.start_node < 0:
            raise ValueError(f"{self} begins before node 0")
        if self.end_node < self.start_node:
            raise ValueError(f"{self} runs backward: its end must not lie before its start")

    def __contains__(self, node_id: int) -> bool:
        return self.start_node <= node_id <= self.end_node

    def __len__(self) -> int:
        return self.end_node - self.start_node + 1


class GraphCheckpointConfig:
    """Disjoint segments of a graph, in any order. Raises `ValueError`, naming the pair, where two overlap.

    >>> config = GraphCheckpointConfig.uniform(num_nodes=10, num_segments=3)
    >>> [(segment.start_node, segment.end_node) for segment in config.segments], config.should_checkpoint(4)
    ([(0, 2), (3, 5), (6, 9)], True)
    """

    def __init__(self, segments: Iterable[GraphSegment] = ()) -> None:
        self.segments: tuple[GraphSegment, ...] = _sorted(segments)
        for left, right in itertools.pairwise(self.segments):
            if right.start_node <= left.end_node:
                raise ValueError(f"{left} and {right} overlap: a node can be recomputed with one segment only")
        self._starts = np.fromiter((s.start_node for s in self.segments), dtype=np.int64, count=len(self.segments))
        self._ends = np.fromiter((s.end_node for s in self.segments), dtype=np.int64, count=len(self.segments))

    @classmethod
    def uniform(cls, num_nodes: int, num_segments: int) -> GraphCheckpointConfig:
        """`num_segments` ranges of num_nodes // num_segments nodes, the last one with the rest.

        No ranges where either number is 0 or there are more segments than nodes. At most 2^24 segments.
        """
        num_nodes = check_int(num_nodes, "num_nodes", None, _LAST_NODE)
        num_segments = check_int(num_segments, "num_segments", None, 2**24)
        if num_nodes < 0 or num_segments < 0:
            raise ValueError(
                f"cannot cut {num_nodes} nodes into {num_segments} segments: num_nodes and num_segments must be 0 or more"
            )
        if num_nodes == 0 or num_segments == 0 or num_segments > num_nodes:
            return cls()
        size = num_nodes // num_segments
        last = num_segments - 1
        return cls(
            GraphSegment(k * size, num_nodes - 1 if k == last else (k + 1) * size - 1) for k in range(num_segments)
        )

    def segment_of(self, node_id: int) -> GraphSegment | None:
        """The segment that holds the node, or None. O(log segments)."""
        node_id = check_int(node_id, "node_id", None)
        k = int(np.searchsorted(self._starts, node_id, side="right")) - 1
        return self.segments[k] if k >= 0 and node_id in self.segments[k] else None

    def should_checkpoint(self, node_id: int) -> bool:
        """Whether the node lies in a segment, and so is recomputed in backward."""
        return self.segment_of(node_id) is not None

    def check_within(self, num_nodes: int) -> None:
        """Raise `ValueError`, naming the segment, where one runs past a graph of `num_nodes` nodes."""
        if self.segments and self.segments[-1].end_node >= num_nodes:
            raise ValueError(f"{self.segments[-1]} runs past the graph, whose nodes are 0 to {num_nodes - 1}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GraphCheckpointConfig) and self.segments == other.segments

    def __hash__(self) -> int:
        return hash(self.segments)

    def __repr__(self) -> str:
        return f"GraphCheckpointConfig({list(self.segments)!r})"


def _sorted(segments: Iterable[GraphSegment]) -> tuple[GraphSegment, ...]:
    return tuple(sorted(check_sequence(segments, "segments", GraphSegment, "GraphSegments in a sequence")))


def plan_recomputation(num_nodes: int, config: GraphCheckpointConfig) -> list[bool]:
    """For each of `num_nodes` nodes, in order, whether it is recomputed (True) or kept (False).

    Linear in nodes plus segments. Raises `ValueError` for a negative number of nodes, or a segment past the last one.

    >>> plan_recomputation(5, GraphCheckpointConfig([GraphSegment(1, 2)]))
    [False, True, True, False, False]
    """
    num_nodes = check_int(num_nodes, "num_nodes", None, _LAST_NODE)
    if num_nodes < 0:
        raise ValueError(f"num_nodes: a graph cannot have {shown(num_nodes)} nodes")
    if not isinstance(config, GraphCheckpointConfig):
        raise TypeError(f"config is {shown(config)}; expected a GraphCheckpointConfig")
    config.check_within(num_nodes)
    recomputed = np.zeros(num_nodes, dtype=np.bool_)
    for segment in config.segments:
        recomputed[segment.start_node : segment.end_node + 1] = True
    return list(recomputed.tolist())
