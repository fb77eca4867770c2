"""The frontier and its picture."""

from __future__ import annotations

from gpuckpt.planning import Chain, Keep, Stage, plan_chain, plan_frontier, simulate
from gpuckpt.report.frontier import draw_frontier


def blocks(n: int) -> Chain:
    """n equal stages of 1 s forward and 2 s backward; each saves its input of 4 bytes and 12 of its own."""
    stages = (Stage(f"s{i}", 1, 2, (i, n + 1 + i), (i,), (), (i + 1,), 4) for i in range(n))
    return Chain(tuple(stages), (4,) * (n + 1) + (12,) * n)


def test_the_frontier_falls_and_its_knee_lies_below_the_chord(tmp_path) -> None:
    frontier = plan_frontier(blocks(16), 10)
    peaks, seconds = zip(*frontier.points, strict=True)
    assert list(peaks) == sorted(peaks)
    assert list(seconds) == sorted(seconds, reverse=True)
    assert peaks[-1] == simulate(blocks(16), tuple(Keep(i) for i in range(16))).peak_bytes
    assert 0 < frontier.knee < len(frontier.plans) - 1
    picture = draw_frontier(frontier, tmp_path / "f.svg", others={"sqrt": plan_chain(blocks(16), 999, "sqrt")})
    assert "knee" in picture.read_text()
