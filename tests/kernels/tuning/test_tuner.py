"""The tuner without a GPU: its search, its clockwork and its cache with an injected timer; the launches in the interpreter."""

from __future__ import annotations

import contextlib
import json
from types import MappingProxyType

import pytest
import torch
from triton.runtime.errors import OutOfResources

from gpuckpt.kernels.device.casts import INTERPRETED
from gpuckpt.kernels.host import tiles
from gpuckpt.kernels.host.tiles import KINDS, TileConfig, analytic_choice, candidates, choose, why_invalid
from gpuckpt.kernels.linear import db_partials_shape
from gpuckpt.kernels.tuning import launches, tuner


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """A cache of its own, and no table in use before or after."""
    monkeypatch.setenv("GPUCKPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiles, "_tuned", MappingProxyType({}))


class Clock:
    """A timer with a price list by tile; what it is given is remembered, not run."""

    def __init__(self, price, monkeypatch, refuse=()):
        self.price, self.refuse, self.asked = price, refuse, []
        monkeypatch.setattr(tuner, "calls", lambda *_: lambda tile: tile)

    def __call__(self, tile):
        self.asked.append(tile)
        if tile in self.refuse:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return self.price(tile)


def run(clock, kind="linear", M=4096, N=4096, K=1024, **more):
    options = {"timer": clock, "arch": 90, "device": "cpu", "rounds": 5, **more}
    return tuner.tune(kind, M, N, K, **options)


def test_the_fastest_tile_wins_and_is_found_again(monkeypatch):
    best = TileConfig(64, 128, 64, 4, 4)
    found = run(Clock(lambda t: 1e-3 if t == best else 2e-3, monkeypatch))
    assert found.tile == best
    assert found.default_tile == analytic_choice("linear", 4096, 4096, 1024, "bf16", 90) != best
    assert found.speedup == 2.0
    assert len(found.measured) == len(tuner.search_space("linear", "bf16", 90))
    assert choose("linear", 4096, 4096, 1024, "bf16", 90) == found.default_tile, "tuning alone changes no choice"
    table = tuner.load()
    assert dict(table) == {("linear", (4096, 4096, 1024), "bf16", 90): best}
    for M in (2049, 3000, 4096):
        assert choose("linear", M, 4096, 1024, "bf16", 90) == best
    for other in (("linear", 2048, 4096, 1024, "bf16", 90), ("linear", 4096, 4096, 1024, "fp16", 90),
                  ("dual", 4096, 4096, 1024, "bf16", 90), ("linear", 4096, 4096, 1024, "bf16", 100)):  # fmt: skip
        assert choose(*other) == analytic_choice(*other)


def test_a_gain_within_the_margin_changes_nothing(monkeypatch):
    default = analytic_choice("dual", 4096, 4096, 1024, "bf16", 90)
    found = run(Clock(lambda t: 1.0 if t == default else 0.99, monkeypatch), "dual")
    assert found.tile == default
    assert found.speedup == 1.0
    assert run(Clock(lambda t: 1.0 if t == default else 0.97, monkeypatch), "dual").tile != default


def test_tiles_take_turns_and_the_median_counts(monkeypatch):
    a, b, c = candidates("linear", "bf16", 90)[:3]
    noise = iter(range(1000))
    clock = Clock(lambda t: {a: 3.0, b: 2.0, c: 2.5}[t] + (100.0 if next(noise) % 9 == 0 else 0.0), monkeypatch)
    found = run(clock, tiles=[b, c], rounds=9)
    assert found.tile == b
    assert found.measured == ((b, 2.0), (c, 2.5), (a, 3.0))
    turns = [clock.asked[3 + 3 * r : 6 + 3 * r] for r in range(9)]
    assert turns[:3] == [[a, b, c], [b, c, a], [c, a, b]]
    assert all(set(turn) == {a, b, c} for turn in turns)


def test_tiles_that_do_not_fit_are_named_and_passed_over(monkeypatch):
    space = tuner.search_space("gated_fwd", "bf16", 90)
    default = analytic_choice("gated_fwd", 4096, 4096, 1024, "bf16", 90)
    bad = next(t for t in space if t != default)
    found = run(Clock(lambda t: 1.0, monkeypatch, refuse={bad}), "gated_fwd")
    assert [(t, "out of resource: shared memory" in why) for t, why in found.refused] == [(bad, True)]
    assert bad not in [t for t, _ in found.measured]
    with pytest.raises(RuntimeError, match="did not run: out of resource"):
        run(Clock(lambda t: 1.0, monkeypatch, refuse={default}), "gated_fwd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_search_space_can_run_and_sums_in_one_order(kind, arch, dtype):
    space = tuner.search_space(kind, dtype, arch)
    assert space[: len(candidates(kind, dtype, arch))] == candidates(kind, dtype, arch)
    assert len(set(space)) == len(space)
    assert all(why_invalid(kind, t, dtype, arch) is None for t in space)
    assert {t.bk for t in space} == {candidates(kind, dtype, arch)[0].bk}


@pytest.mark.skipif(not INTERPRETED, reason="runs on CPU tensors, in Triton's interpreter")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_timed_is_what_the_layers_run(kind):
    """The launches fill all they should, with the tile they are given."""
    launch = launches.calls(kind, 20, 24, 40, "fp32", "silu", "cpu")(TileConfig(16, 16, 16, 4, 1))
    names = launch.__code__.co_freevars
    outputs = {n: c.cell_contents for n, c in zip(names, launch.__closure__, strict=True)
               if n in ("first", "second", "third", "db", "dbg", "dbu")}  # fmt: skip
    for name, t in outputs.items():
        in_place = kind == "gated_plain" and name == "third"
        t.fill_(1.0 if in_place else float("nan"))
    launch()
    assert kind != "gated_plain" or not (outputs["third"] == 1.0).any()
    assert outputs
    for name, t in outputs.items():
        assert t.isfinite().all(), name
        assert t.abs().sum() > 0, name


@pytest.mark.skipif(not INTERPRETED, reason="runs on CPU tensors, in Triton's interpreter")
def test_a_whole_tuning_in_the_interpreter(monkeypatch):
    times = iter(
        [9.0, 9.0, 3.0, 1.0, 1.0, 3.0]
    )  # compiling, then two rounds of which the second begins with the second tile

    def timer(launch):
        launch()
        return next(times)

    small = TileConfig(64, 64, 64, 4, 2)
    found = tuner.tune("linear", 70, 65, 64, tiles=[small], rounds=2, device="cpu", timer=timer, arch=90)
    assert found.default_seconds == 3.0
    assert found.tile == small
    tuner.load()
    assert choose("linear", 70, 65, 64, "bf16", 90) == small
    # Buffers are sized by the same choice as launches are made; on the host nothing was tuned.
    assert db_partials_shape(torch.empty(70, 64), torch.empty(65, 64)) == (1, 65)


def test_results_of_other_kernels_or_compilers_are_passed_over(monkeypatch):
    run(Clock(lambda t: 1.0 + t.bm, monkeypatch))
    (path,) = tuner.cache_dir().glob("*.json")
    kept = json.loads(path.read_text())
    for key in ("triton", "source"):
        path.write_text(json.dumps({**kept, key: "another"}))
        assert dict(tuner.load()) == {}
    path.write_text(json.dumps(kept))
    assert len(tuner.load()) == 1


def test_a_second_result_replaces_the_first(monkeypatch):
    fast, faster = TileConfig(64, 64, 64, 4, 2), TileConfig(64, 64, 64, 8, 2)
    run(Clock(lambda t: 1.0 if t == fast else 2.0, monkeypatch))
    run(Clock(lambda t: 1.0 if t == faster else 2.0, monkeypatch))
    assert list(tuner.load().values()) == [faster]
    assert [p.suffix for p in tuner.cache_dir().iterdir()] == [".json"]


def test_a_process_chooses_by_one_table_only(monkeypatch):
    run(Clock(lambda t: 1.0 + t.bm, monkeypatch))
    first = tuner.load()
    tuner.load()
    run(Clock(lambda t: 1.0 + t.bm, monkeypatch), "dual")
    with pytest.raises(RuntimeError, match="one table only"):
        tuner.load()
    assert choose("linear", 4096, 4096, 1024, "bf16", 90) == first["linear", (4096, 4096, 1024), "bf16", 90]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": {**vars(TileConfig(64, 64, 32, 4, 2))}}, "order of the sum over K"),
        ({"tile": {**vars(TileConfig(256, 256, 64, 8, 4))}}, "shared memory"),
    ],
)
def test_a_tile_that_must_not_be_used_is_refused(change, message, monkeypatch):
    run(Clock(lambda t: 1.0, monkeypatch))
    (path,) = tuner.cache_dir().glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        tuner.load()
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"no result of gpuckpt.tune \(KeyError\('triton'\)\); delete it"):
        tuner.load()


def test_the_name_at_the_root_is_the_function():
    from gpuckpt import tune
    from gpuckpt.kernels import tuning

    assert tune is tuning.tune is tuner.tune


def test_mistakes_are_explained(monkeypatch):
    clock = Clock(lambda t: 1.0, monkeypatch)
    with pytest.raises(ValueError, match="unknown kind 'gemm'; choose one of linear"):
        run(clock, "gemm")
    with pytest.raises(ValueError, match="unknown dtype 'fp8'"):
        run(clock, dtype="fp8")
    with pytest.raises(ValueError, match="M=0"):
        run(clock, M=0)
    with pytest.raises(ValueError, match="cannot be timed: bm=48 must be a power of two"):
        run(clock, tiles=[TileConfig(48, 64, 64, 4, 2)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match="torch finds none here; without tuning, tiles are chosen by arithmetic"):
        tuner.tune("linear", 64, 64, 64)
    with pytest.raises(RuntimeError, match="got device='cpu'"):
        tuner.tune("linear", 64, 64, 64, device="cpu")


def test_what_is_timed_is_the_replay_of_a_graph_behind_work_that_hides_the_queue(monkeypatch):
    """A launch from Python takes longer than many a kernel, and between two events it would be counted."""
    order = []

    class Noted:
        def __init__(self, *args, **options): ...
        def wait_stream(self, other): ...
        def synchronize(self): ...
        def replay(self):
            order.append("replay")

        def record(self):
            order.append("event")

        def elapsed_time(self, other):
            return 2.0

    for name in ("Event", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Noted)
    monkeypatch.setattr(torch.cuda, "current_stream", Noted)
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "zero_", lambda t: order.append(t.nbytes) or t)
    timer = tuner._EventTimer(torch.device("cpu"), 1 << 20)

    def launch():
        order.append("launch")

    assert [timer(launch), timer(launch)] == [2e-3, 2e-3]
    assert order[:2] == ["launch", "launch"], "compiled, then captured"
    flushes = order.count(1 << 20) // 2
    assert flushes * (1 << 20) >= 1 << 29
    assert order[2:] == [*[1 << 20] * flushes, "event", "replay", "event"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device and compiled kernels")
def test_on_a_gpu_two_tiles_are_timed():
    arch = tiles.nearest_arch(*torch.cuda.get_device_capability())
    found = tuner.tune("linear", 512, 512, 512, tiles=candidates("linear", "bf16", arch)[-2:], rounds=3)
    assert all(0 < seconds < 1 for _, seconds in found.measured)
