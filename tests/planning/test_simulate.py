"""The simulator against a tiny runtime with explicit holders, and against known schedules."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from gpuckpt.errors import InvalidPlan
from gpuckpt.planning import Chain, Keep, Recompute, Stage, Variant, certify, simulate, strategies


def test_agrees_with_a_runtime_on_random_trees(chain_of, tree_of, played) -> None:
    for seed in range(400):
        rng = random.Random(seed)
        chain = chain_of(rng, rng.randint(1, 12), fixed=0.05)
        tree = tree_of(rng, chain)
        expected, got = played(chain, tree), simulate(chain, tree)
        assert got.peak_bytes == expected.peak_bytes, (seed, tree)
        assert got.forward_counts == tuple(expected.counts), (seed, tree)
        assert got.step_s == pytest.approx(expected.seconds), (seed, tree)
        assert got.recompute_s == pytest.approx(expected.again_s), (seed, tree)
        assert got.total_peak_bytes == expected.total_peak_bytes, (seed, tree)
        assert got.host_peak_bytes == expected.host_peak_bytes, (seed, tree)
        assert got.trace[-1][1] == 0
        assert max(held for _, held in got.trace) == got.peak_bytes


def test_agrees_where_storages_are_shared_in_any_way(wild_chain_of, tree_of, played) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        chain = wild_chain_of(rng, rng.randint(1, 9))
        tree = tree_of(rng, chain)
        expected, got = played(chain, tree), simulate(chain, tree)
        assert got.peak_bytes == expected.peak_bytes, (seed, tree)
        assert got.host_peak_bytes == expected.host_peak_bytes, (seed, tree)
        # Total bytes count what runs inside a frame as if nobody held it: never less than what is alive.
        assert got.total_peak_bytes >= expected.total_peak_bytes, (seed, tree)


def test_agrees_where_results_are_dropped(wild_chain_of, tree_of, played) -> None:
    less = 0
    for seed in range(250):
        rng = random.Random(seed)
        chain = wild_chain_of(rng, rng.randint(1, 9), dropping=True)
        tree = tree_of(rng, chain)
        expected, got = played(chain, tree), simulate(chain, tree)
        assert got.peak_bytes == expected.peak_bytes, (seed, tree)
        assert got.forward_counts == tuple(expected.counts), (seed, tree)
        assert got.total_peak_bytes >= expected.total_peak_bytes, (seed, tree)
        kept = replace(chain, stages=tuple(replace(stage, dropped_in=None) for stage in chain.stages))
        less += got.peak_bytes < simulate(kept, tree).peak_bytes
        if not got.transfers:  # what is laid out has room for what goes early as well
            laid_out_bytes = certify(chain, tree, 1 << 60, "by hand").certificate.layout_bytes
            assert best_fit_bytes(expected.events, chain.unit_bytes) <= laid_out_bytes, (seed, tree)
    assert less > 50


def best_fit_bytes(events, unit_bytes: int) -> int:
    """The memory that ("alloc", id, nbytes) and ("free", id) reach into where each array goes to the smallest gap that has room,
    neighbouring gaps merge, and the memory grows where there is none: what CuPy's pool does with one piece."""
    places: dict[object, tuple[int, int]] = {}  # (offset, end)
    size_bytes = 0
    for event in events:
        if event[0] == "free":
            del places[event[1]]
            continue
        need = -(-event[2] // unit_bytes) * unit_bytes
        taken = sorted(places.values())
        begins = [0, *(end for _, end in taken)]
        gaps = [(end - begin, begin) for begin, (end, _) in zip(begins, taken, strict=False) if end - begin >= need]
        offset = min(gaps)[1] if gaps and need else begins[-1]
        places[event[1]] = (offset, offset + need)
        size_bytes = max(size_bytes, offset + need)
    return size_bytes


def test_lifetimes_nest_so_that_the_layout_is_the_peak(wild_chain_of, tree_of, played) -> None:
    nested = 0
    for seed in range(100):
        rng = random.Random(seed)
        chain = wild_chain_of(rng, rng.randint(1, 9))
        tree = tree_of(rng, chain)
        said = simulate(chain, tree)
        size_bytes = best_fit_bytes(played(chain, tree).events, chain.unit_bytes)
        # What leaves and comes back while stages run nests in nothing: it may take two buffers of the largest.
        beside_bytes = 2 * max((copy.nbytes + 4 * chain.unit_bytes for copy in said.transfers), default=0)
        assert said.peak_bytes <= size_bytes <= said.peak_bytes + beside_bytes
        nested += not said.transfers
    assert nested > 20


def test_known_figures() -> None:
    # Stage i saves its input (id i, 4 bytes) and 10 bytes of its own (id 4 + i).
    chain = Chain(
        tuple(Stage(f"s{i}", 1, 2, (i, 4 + i), (i,), (), (i + 1,) if i < 3 else (), 4) for i in range(4)),
        (4, 4, 4, 4, 10, 10, 10, 10),
    )
    everything = simulate(chain, tuple(Keep(i) for i in range(4)))
    assert (everything.peak_bytes, everything.step_s, everything.recompute_s) == (56, 12, 0)
    assert everything.peak_step == "forward s3"
    framed = simulate(chain, (Recompute((Keep(0), Keep(1))), Keep(2), Keep(3)))
    assert framed.peak_bytes == 4 + 14 + 14
    assert framed.forward_counts == (2, 2, 1, 1)
    ending = simulate(chain, (Recompute((Keep(0), Keep(1), Recompute((Keep(2),)))), Keep(3)))
    assert ending.forward_counts == (2, 2, 2, 1), (
        "a frame that ends a sub-plan does not run in the sub-plan's recompute"
    )
    assert framed.trace[:3] == (("forward input of s0..s1", 4), ("forward s2", 18), ("forward s3", 32))


def test_a_recompute_stops_before_the_tail_of_its_last_stage() -> None:
    chain = Chain(tuple(Stage(f"s{i}", 10, 1, (i,), (), tail_s=tail) for i, tail in enumerate((1, 2, 4))), (4,) * 3)
    for tree, recompute_s in (
        ((Recompute((Keep(0),)), Keep(1), Keep(2)), 9),
        ((Recompute((Keep(0), Keep(1))), Keep(2)), 18),
        # Run again: s0 whole and s1 but for its tail, then s2 but for its tail.
        ((Recompute((Keep(0), Recompute((Keep(1),)), Keep(2))),), 10 + 10 + 6 + 8),
        ((Recompute((Keep(0), Recompute((Keep(1), Keep(2))))),), 10 + 10 + 6),
    ):
        assert simulate(chain, tree).recompute_s == recompute_s


def test_known_figures_of_spilling() -> None:
    # Stage i saves its input (id i, 4 bytes) and 10 bytes of its own (id 4 + i); spilled, it sends both to the host, in 2 s.
    stages = (
        Stage(
            f"s{i}",
            1,
            2,
            (i, 4 + i),
            (i,),
            variants=(Variant("spill", (), 3, 4, (i, 4 + i), moved_s=2),),
            input_moved_s=1,
        )
        for i in range(4)
    )
    chain = Chain(tuple(stages), (4, 4, 4, 4, 10, 10, 10, 10))
    spill = [Keep(i, "spill") for i in range(4)]
    mixed = simulate(chain, (spill[0], spill[1], Keep(2), Keep(3)))
    assert mixed.trace == (
        ("forward s0 (spill)", 14),
        ("forward s1 (spill)", 28),
        ("forward s2", 28),  # s0 has left
        ("forward s3", 28),  # and s1
        ("backward s3", 14),
        ("backward s2", 0),
        ("bring back s1", 14),
        ("bring back s0", 28),
        ("backward s1", 14),
        ("backward s0", 0),
    )
    assert (mixed.peak_bytes, mixed.host_peak_bytes) == (28, 28)
    # s0 goes out from 1 to 3 s while s1 runs for one of them; s2 waits till 3, and s3 for s1, which is out from 3 to 5; two
    # backwards end at 10, s1 is back at 12 and s0 at 14, when s1's backward is over.
    assert [(c.what, c.direction, c.asked_s, c.done_s, c.queued_behind, c.waited_s) for c in mixed.transfers] == [
        ("s0", "out", 1, 3, None, 1),
        ("s1", "out", 3, 5, None, 1),
        ("s1", "back", 10, 12, None, 2),
        ("s0", "back", 12, 14, None, 0),
    ]
    assert (mixed.step_s, mixed.recompute_s) == (16, 0)
    # The last ones never leave: nothing waits for them.
    last = simulate(chain, (Keep(0), Keep(1), Keep(2), spill[3]))
    assert (last.transfers, last.peak_bytes, last.step_s) == ((), 4 * 14, 12)
    # A frame sends its input while its first stage runs, and has it back while the frame after it runs again.
    frames = simulate(chain, tuple(Recompute((Keep(i),), "spill") for i in range(4)))
    assert [(c.what, c.direction) for c in frames.transfers] == [
        *((f"s{i}", "out") for i in range(4)),
        *((f"s{i}", "back") for i in (2, 1, 0)),
    ]
    assert frames.peak_bytes == 4 + 4 + 14 - 4  # s3's stays; s2's comes back while s3 runs again
    assert frames.step_s == 4 + 4 * 3  # nothing waits
    # Within a frame transfers stop the work. The frame holds the input of s1 anyway: only the other 10 bytes go.
    framed = simulate(chain, (Keep(0), Recompute((spill[1], Keep(2))), Keep(3)))
    assert (framed.peak_bytes, framed.host_peak_bytes, framed.transfers) == (14 + 4 + 14, 10, ())
    assert framed.step_s == 4 + 4 * 2 + (1 + 2 + 1) + 2


def test_the_unit_is_charged() -> None:
    chain = Chain((Stage("s", 1, 1, (0, 1, 2)),), (1, 0, 513), unit_bytes=512)
    assert simulate(chain, (Keep(0),)).peak_bytes == 512 + 1024


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ((Keep(1), Keep(0)), "stage 1 where stage 0"),
        ((Keep(0),), "covers 1 stages and the chain has 3"),
        ((), "covers 0 stages"),
        ((Recompute(()), Keep(0), Keep(1), Keep(2)), "is empty"),
        ((Keep(0), Keep(1), Recompute((Keep(2),))), "cannot be recomputed"),
        ((Keep(0, "spill"), Keep(1), Keep(2)), "no option 'spill'; it has keep, packed"),
        ((Keep(0), Keep(0), Keep(1), Keep(2)), "stage 0 where stage 1"),
        ((0, Keep(1), Keep(2)), "got int"),
    ],
)
def test_a_tree_that_is_no_plan_is_refused(tree: tuple, message: str) -> None:
    chain = Chain((Stage("a", variants=(Variant("packed", (), 0, 0),)), Stage("b"), Stage("loss", recomputable=False)))
    with pytest.raises(InvalidPlan, match=message):
        simulate(chain, tree)


@pytest.mark.parametrize(("steps", "snapshots", "forwards"), [(24, 4, 75), (100, 8, 345), (10, 1, 55), (7, 7, 13)])
def test_revolve_needs_the_published_number_of_forwards(steps: int, snapshots: int, forwards: int) -> None:
    chain = Chain(tuple(Stage(f"s{i}", 1, 1, (), (i,)) for i in range(steps)), (1,) * steps)
    run = simulate(chain, strategies.revolve(chain, snapshots))
    assert sum(run.forward_counts) == forwards == strategies.revolve_steps(steps, snapshots)
    assert run.peak_bytes <= snapshots


def test_a_frame_as_deep_as_the_chain_is_long() -> None:
    n = 3000
    chain = Chain(tuple(Stage(f"s{i}", 1, 1, (), (i,)) for i in range(n)), (1,) * n)
    run = simulate(chain, strategies.revolve(chain, 1))
    assert sum(run.forward_counts) == n * (n + 1) // 2
    assert run.peak_bytes == 1


def test_an_extra_that_a_stage_of_the_frame_makes_is_there_twice_while_its_maker_runs_again() -> None:
    # 0: made by the first stage, saved by it and the second, given to the third as well.
    first = Stage("a", saves=(0,), output=(0,))
    second = Stage("b", saves=(0, 1), inputs=(0,), output=(1,))
    third = Stage("c", saves=(0, 1), inputs=(1,), extras=(0,), output=(2,))
    chain = Chain((first, second, third), (100, 10, 1))
    assert chain.made_extras == {0: 0}
    kept = simulate(chain, (Keep(0), Keep(1), Keep(2)))
    assert kept.peak_bytes == 110, "forward makes it once"
    again = simulate(chain, (Recompute((Keep(0), Keep(1), Keep(2))),))
    assert again.trace[0][1] == 100, "the frame holds forward's"
    assert again.peak_bytes == 100 + 100 + 10
    apart = simulate(chain, (Recompute((Keep(0),)), Recompute((Keep(1), Keep(2)))))
    assert apart.peak_bytes == 110, "the maker is in another frame, which runs when the others are done"
