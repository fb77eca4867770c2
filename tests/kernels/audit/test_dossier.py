"""The dossier: shipped kernels keep their bounds, and a kernel that breaks one is found out."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser

import pytest

from gpuckpt.kernels.audit import dossier as dossiers
from gpuckpt.kernels.audit import roofline
from gpuckpt.kernels.audit.compile import Report
from gpuckpt.kernels.audit.sass import Loop
from gpuckpt.kernels.audit.specs import ARCHS, shipped
from gpuckpt.report import audit


def pick(arch, kernel, **meta):
    wanted = [s for s in shipped(arch) if s.meta["kernel"] == kernel and s.dtype == "bf16"]
    return next(s for s in wanted if all(s.meta[k] == v for k, v in meta.items()))


def sound(spec):
    """A report that keeps every bound, for linear_fwd."""
    op = {90: "HGMMA", 100: "UTCHMMA"}.get(spec.arch, "HMMA")
    tma = spec.meta["tma"]
    return Report(
        name=spec.name,
        arch=spec.arch,
        triton="3.7.1",
        registers=128,
        shared_bytes=65536,
        threads=32 * spec.num_warps,
        instructions=900,
        tensor_core={op: 8},
        tma_loads=6 if tma else 0,
        async_copies=0 if tma else 24,
        stores={f"{spec.tile.bm}x{spec.tile.bn}xbf16": 1},
        loops=[Loop(0x100, 90, 4, 2, 0, 0, 0)],
    )


def test_a_sound_report_breaks_nothing():
    for arch in ARCHS:
        spec = pick(arch, "linear_fwd")
        assert dossiers.violations(spec, sound(spec)) == []


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        (90, {"spill_stores": 3}, "spills: 3 STL and 0 LDL"),
        (80, {"spill_loads": 1}, "spills: 0 STL and 1 LDL"),
        (90, {"stack_bytes": 16}, "stack of 16 B"),
        (100, {"stack_bytes": 16}, "stack of 16 B"),
        (90, {"shared_bytes": 232_449}, "a block may have 232448"),
        (80, {"shared_bytes": 166_913}, "a block may have 166912"),
        (86, {"shared_bytes": 101_377}, "a block may have 101376"),
        (89, {"shared_bytes": 101_377}, "a block may have 101376"),
        (120, {"shared_bytes": 101_377}, "a block may have 101376"),
        (100, {"tmem_columns": 513}, "there are 512"),
        (90, {"global_atomics": 1}, "1 atomics on global memory"),
        (90, {"tensor_core": {}}, "HGMMA/QGMMA/IGMMA expected"),
        (90, {"tensor_core": {"HMMA": 64}}, r"instructions \['HMMA'\]"),
        (100, {"tensor_core": {"HMMA": 64}}, "UTC expected"),
        (80, {"loops": []}, "0 loops on tensor cores, 1 K loops expected"),
        (90, {"tma_loads": 0}, "no UTMALDG"),
        (80, {"async_copies": 0}, "no LDGSTS"),
        (90, {"stores": {"128x128xbf16": 9}}, "matrices of the output's size, 1 are its results"),
        (90, {"error": "CompilationError: at 1:1\nno such name"}, "does not compile: no such name"),
        (90, {"registers": 255, "threads": 1024}, "not one block fits"),
    ],
)
def test_every_bound_is_checked(arch, change, message):
    spec = pick(arch, "linear_fwd", tma=arch in (90, 100))
    found = dossiers.violations(spec, dataclasses.replace(sound(spec), **change))
    import re

    assert any(re.search(message, v) for v in found), found


def test_stack_without_spills_is_allowed_on_sm_80():
    spec = pick(80, "linear_fwd")
    assert dossiers.violations(spec, dataclasses.replace(sound(spec), stack_bytes=16)) == []


def test_a_kernel_without_a_gemm_stores_what_it_states_and_nothing_else():
    spec = pick(90, "norm_bwd_rows")
    report = Report(name=spec.name, arch=90, registers=40, threads=128, stores={"1024xbf16": 1, "f32": 2})
    assert dossiers.violations(spec, report) == []
    for stores in ({"1024xbf16": 2, "f32": 2}, {"1024xbf16": 1}, {"1024xf32": 1, "f32": 2}):
        found = dossiers.violations(spec, dataclasses.replace(report, stores=stores))
        assert found == [f"stores {stores}, its results are {{'1024xbf16': 1, 'f32': 2}}"]


def test_a_kernel_nobody_modelled_is_a_broken_bound():
    spec = pick(80, "linear_fwd")
    spec = dataclasses.replace(spec, meta={**spec.meta, "kernel": "novel"})
    assert dossiers.violations(spec, sound(spec)) == ["no roofline model for novel"]


def test_every_shipped_kernel_has_a_roofline_model_and_is_represented():
    for arch in ARCHS:
        kernels = {s.meta["kernel"] for s in shipped(arch)}
        assert {"linear_fwd", "linear_recompute_bwd", "cross_entropy_fwd", "cross_entropy_bwd"} <= kernels
        for kernel in kernels:
            assert roofline.work_of(kernel, dossiers.SHAPES["gemm"], "bf16").bytes > 0
        assert sorted(s.meta["kernel"] for s in dossiers.representative([arch])) == sorted(kernels)


# What was compiled before is read from the user's cache; from nothing this takes about a minute of two cores.
QUICK = {
    "mlp_dual_bwd",
    "gated_plain_bwd",
    "gated_triple_bwd",
    "linear_recompute_bwd",
    "cross_entropy_bwd",
    "norm_fwd",
    "norm_bwd_rows",
    "norm_bwd_columns",
}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_reduced_audit_keeps_every_bound(arch):
    specs = [s for s in dossiers.representative([arch]) if s.meta["kernel"] in QUICK]
    assert len(specs) == len(QUICK)
    dossier = dossiers.build([arch], 2, specs=specs)
    assert dossier.violations == []
    for entry in dossier.entries:
        assert entry.report.instructions > 0
        assert entry.occupancy.blocks >= 1
        for estimate in entry.estimates:
            assert 0 < estimate.best_s <= estimate.tile_s


@pytest.fixture
def dossier():
    """One sound kernel and one that spills, without compiling."""
    spec = pick(90, "linear_fwd")
    good = dossiers._entry(spec, sound(spec))
    bad = dossiers._entry(spec, dataclasses.replace(sound(spec), spill_stores=7))
    return dossiers.Dossier((good, bad))


class Text(HTMLParser):
    """All text of a page, and the tags that are open at its end."""

    def __init__(self):
        super().__init__()
        self.text, self.open, self.rows = "", [], 0

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        if tag not in ("meta", "input", "p", "html", "title"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("p", "html", "title"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_whole_and_names_the_broken_bound(dossier):
    page = Text()
    page.feed(audit.to_html(dossier))
    assert page.open == []
    assert page.rows == 3
    assert "1 of 2 configurations break a bound." in page.text
    assert "spills: 7 STL and 0 LDL" in page.text
    assert "not timings" in page.text
    assert "H100 SXM" in page.text


def test_names_are_escaped_in_html(dossier):
    spec = dataclasses.replace(dossier.entries[0].spec, name="<script>x</script>")
    entry = dataclasses.replace(dossier.entries[0], spec=spec)
    assert "<script>x" not in audit.to_html(dossiers.Dossier((entry,)))


def test_markdown_tables_are_rectangular(dossier):
    rows = [line for line in audit.to_markdown(dossier).splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize("broken", [True, False])
def test_run_audit_writes_what_was_asked_and_answers(dossier, broken, tmp_path, monkeypatch, capsys):
    kept = dossier if broken else dossiers.Dossier(dossier.entries[:1])
    asked = []
    monkeypatch.setattr(
        dossiers, "build", lambda archs, jobs, progress, specs: asked.append((archs, jobs, len(specs))) or kept
    )
    status = audit.run_audit(["sm_90"], tmp_path / "deep" / "a.json", tmp_path / "a.html", 1, quick=True)
    assert status == (1 if broken else 0)
    assert asked == [([90], 1, len(dossiers.representative([90])))]
    data = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert [k["spill_stores"] for k in data["kernels"]] == ([0, 7] if broken else [0])
    assert data["kernels"][0]["estimates"][0]["device"] == "H100 SXM"
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    printed = capsys.readouterr().out
    assert ("broken bound" in printed) == broken


def test_json_to_standard_output_is_nothing_but_json(dossier, monkeypatch, capsys):
    monkeypatch.setattr(dossiers, "build", lambda *a, **k: dossier)
    audit.run_audit([90], "-", quick=True)
    assert json.loads(capsys.readouterr().out)["archs"] == [90]


@pytest.mark.parametrize("arch", ["sm_75", "hopper", 91, "", "sm_"])
def test_unknown_architectures_are_named(arch):
    with pytest.raises(ValueError, match=r"unknown architecture .* kernels ship for sm_80 sm_86"):
        audit.parse_archs([arch])


def test_architectures_by_name_or_number():
    assert audit.parse_archs(["sm_90", "80", 90]) == [90, 80]
