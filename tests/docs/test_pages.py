"""The Python on every page of the site runs in its order, and what the navigation names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NEEDS = {
    "guides/hugging-face.md": ("transformers", "accelerate", "peft"),
    "guides/lightning.md": ("lightning",),
}
"""What the code on a page imports besides the package and what it depends on."""
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n_steps|litlogger):UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in (DOCS / page).read_text()])
def test_the_python_on_a_page_runs_in_order(page: str) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package, reason=f"the page is about {package}, which is not installed")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        exec(compile(block, page, "exec"), names)


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert sorted(re.findall(r"^ +- ([\w/-]+\.md)$", config, flags=re.MULTILINE)) == PAGES


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("reference/")])
def test_every_public_name_of_the_reference_is_there(page: str) -> None:
    import importlib

    names = re.findall(r"^::: ([\w.]+)$", (DOCS / page).read_text(), flags=re.MULTILINE)
    assert names
    for name in names:
        room, _, last = name.rpartition(".")
        if name == "gpuckpt.errors":
            importlib.import_module(name)
        elif room.startswith("gpuckpt.integrations."):
            assert getattr(pytest.importorskip(room, exc_type=ImportError), last).__doc__, name
        else:
            assert getattr(importlib.import_module(room) if room != "gpuckpt.nn" else nn(), last).__doc__, name


def nn() -> object:
    import gpuckpt

    return gpuckpt.nn


def test_the_index_takes_the_first_screen_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    from site_links import _MARK, first_screen

    screen = first_screen((ROOT / "README.md").read_text())
    assert _MARK in (DOCS / "index.md").read_text()
    assert "No GPU has run any of this yet" in screen
    assert "gpuckpt.fit(" in screen
    assert len(screen.splitlines()) < 40
    assert "](" not in screen  # a link would lead elsewhere from the site


def test_the_map_for_contributors_names_every_room() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## The map")[2].partition("## Names")[0]
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall(r"`(.+?)`", row)
    }
    rooms = {path.parent for top in ("gpuckpt", "kernels") for path in (ROOT / top).rglob("*.py")} - {ROOT / "gpuckpt"}
    shown = {ROOT / home / name for home in ("", "gpuckpt") for name in named if (ROOT / home / name).exists()}
    assert rooms <= shown, {str(room) for room in rooms - shown}
    assert len(shown) == len(named), named
