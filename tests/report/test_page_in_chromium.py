"""The page as a reader has it: headless Chromium draws it, moves the chosen budget by key and mouse, and tells what it shows."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpuckpt
from gpuckpt.planning.tables import format_seconds
from gpuckpt.report.page import page_data, to_page
from gpuckpt.units import format_bytes
from tests.pytorch.steps import batch, blocks
from tests.report.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None or os.name != "posix", reason="no Chromium is installed")

LONG = "a_module_with_a_long_name." * 6
WIDTHS = {"desk": 1280, "phone": 390}


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    fitted = gpuckpt.fit(nn.Sequential(*blocks(6)), batch(), "45%", repeats=1)
    fitted(batch()).square().sum().backward()
    longer = {"256 rows": gpuckpt.measure(nn.Sequential(*blocks(6)), torch.cat([batch()] * 8), repeats=1)}
    found: dict[str, Any] = json.loads(json.dumps(page_data(fitted, budgets=6, longer=longer)))
    for plan in (found["report"], *found["plans"]):
        plan["stages"][2]["name"] = LONG
    return found


@pytest.fixture(scope="module")
def page(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(to_page(data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _nothing_went_wrong(browser: Browser) -> Iterator[None]:
    browser.events.clear()
    yield
    wrong = [e for e in browser.events if e.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert wrong == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert all(url.startswith("file:") for url in asked)


def rows_of(browser: Browser) -> list[list[str]]:
    script = "[...document.querySelectorAll('.stages tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    found: list[list[str]] = browser.js(script)
    return found


def expected_rows(data: dict[str, Any], plan: int) -> list[list[str]]:
    """Number, name, fate, runs and reason of each stage under a plan."""
    stages = data["plans"][plan]["stages"]
    return [[str(s["number"]), s["name"], s["fate"], str(s["runs"]), s["why"]] for s in stages]


def shown_plan(browser: Browser) -> int:
    return int(browser.js("document.querySelector('.budgets').getAttribute('aria-valuenow')"))


def assert_shows(browser: Browser, data: dict[str, Any], plan: int) -> None:
    """Ring, sentence, table and button are those of plan number `plan`."""
    assert shown_plan(browser) == plan
    assert [row[:4] + row[-1:] for row in rows_of(browser)] == expected_rows(data, plan)
    told = browser.js("document.querySelector('#plan').textContent")
    assert f"{format_bytes(data['plans'][plan]['peak_bytes'])} held" in told
    assert f"a step of {format_seconds(data['plans'][plan]['step_s'])}" in told
    assert told.startswith("The plan that ran" if plan == data["ran"] else "Another plan")
    assert browser.js("document.querySelector('#back').hidden") == (plan == data["ran"])
    ran = data["plans"][data["ran"]]["stages"]
    changed = [a["fate"] != b["fate"] for a, b in zip(data["plans"][plan]["stages"], ran, strict=True)]
    assert browser.js("[...document.querySelectorAll('.stages tbody tr')].map(r => r.matches('.changed'))") == changed
    dot, ring = (box(browser, place) for place in (f".dot:nth-of-type({plan + 1})", ".ring"))
    assert centre(dot) == pytest.approx(centre(ring), abs=1)


def box(browser: Browser, place: str) -> list[float]:
    script = "(r => [r.left, r.top, r.width, r.height])(document.querySelector('PLACE').getBoundingClientRect())"
    found: list[float] = browser.js(script.replace("PLACE", place))
    return found


def centre(of: list[float]) -> tuple[float, float]:
    return of[0] + of[2] / 2, of[1] + of[3] / 2


@pytest.mark.parametrize("forward", [None, 0.001, 0.5, 0.95], ids=["as it ran", "at once", "half", "nearly all"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=list(WIDTHS))
def test_nothing_is_cut_and_nothing_overlaps(
    browser: Browser, data: dict[str, Any], tmp_path: Path, width: int, forward: float | None
) -> None:
    """`forward`: the share of the step's time that it takes."""
    data = copy.deepcopy(data)
    if forward is not None:
        events = data["events"]
        turn = next(i for i, e in enumerate(events) if e[3] == "step" and e[4] == "backward")
        for i, event in enumerate(events):
            event[0] = forward * i / turn if i < turn else forward + (1 - forward) * (i - turn) / (len(events) - turn)
    page = tmp_path / "page.html"
    page.write_text(to_page(data), encoding="utf-8")
    browser.open(page, width)
    assert browser.js("document.documentElement.scrollWidth") <= width
    cut = """[...document.querySelectorAll('h1, h2, p, li, b, td, th, span, output')].filter(e => e.offsetParent &&
        (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline' ||
         e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < 0)).map(e => e.outerHTML)"""
    assert browser.js(cut) == []
    overlapping = """(() => {
        const all = document.querySelectorAll('.plot span, .legend li, .figures li, h2, .told');
        const texts = [...all].filter(e => e.offsetParent);
        const boxes = texts.map(e => e.getBoundingClientRect());
        const found = [];
        boxes.forEach((a, i) => boxes.slice(0, i).forEach((b, j) => {
            if (texts[i].contains(texts[j]) || texts[j].contains(texts[i])) return;
            if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
                found.push([texts[i].textContent, texts[j].textContent]);
        }));
        return found;
    })()"""
    assert browser.js(overlapping) == []


def test_light_and_dark_and_print(browser: Browser, page: Path) -> None:
    from io import BytesIO

    from matplotlib.image import imread

    shown = {}
    for name, scheme, media in (("light", "light", ""), ("dark", "dark", ""), ("print", "dark", "print")):
        browser.open(page, 794, scheme=scheme, media=media)
        assert browser.js("document.documentElement.scrollWidth") <= 794, name
        shown[name] = imread(BytesIO(browser.picture()))[..., :3].mean(axis=2)
        assert shown[name].std() > 0.05, f"{name}: something is drawn"
    assert shown["light"].mean() > 0.85 > 0.3 > shown["dark"].mean()
    assert shown["print"].mean() > 0.85, "dark readers print on white paper"
    hints = browser.js("[...document.querySelectorAll('.screen')].map(e => e.offsetParent)")
    assert hints == [None, None, None], "what only a screen can do is not printed"


def test_the_budget_is_moved_by_key(browser: Browser, page: Path, data: dict[str, Any]) -> None:
    browser.open(page, 1280)
    assert_shows(browser, data, data["ran"])
    last = len(data["plans"]) - 1
    for _ in range(20):  # the curve, then the budgets
        browser.press("Tab")
        if browser.js("document.activeElement.matches('.budgets')"):
            break
    browser.press("ArrowRight")
    assert_shows(browser, data, data["ran"] + 1)
    browser.press("End")
    browser.press("ArrowRight")
    assert_shows(browser, data, last)
    assert all(row[2] == "kept" for row in rows_of(browser))
    browser.press("Home")
    assert_shows(browser, data, 0)
    browser.press("Escape")
    assert_shows(browser, data, data["ran"])
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_budget_is_dragged(browser: Browser, page: Path, data: dict[str, Any]) -> None:
    browser.open(page, 390, height=1600)
    start, end = (centre(box(browser, f".dot:nth-of-type({1 + plan})")) for plan in (data["ran"], 0))
    browser.mouse("mousePressed", *start, held=True)
    browser.mouse("mouseMoved", (start[0] + end[0]) / 2, start[1], held=True)
    browser.mouse("mouseMoved", *end, held=True)
    browser.mouse("mouseReleased", *end)
    assert_shows(browser, data, 0)
    browser.mouse("mouseMoved", *start)
    assert_shows(browser, data, 0)
    browser.mouse("mousePressed", *centre(box(browser, "#back")), held=True)
    browser.mouse("mouseReleased", *centre(box(browser, "#back")))
    assert_shows(browser, data, data["ran"])


def test_what_is_held_at_a_moment(browser: Browser, page: Path, data: dict[str, Any]) -> None:
    browser.open(page, 1280)
    left, top, width, height = box(browser, ".step")
    end_ms = data["events"][-1][0]
    highest = max(range(len(data["events"])), key=lambda i: data["events"][i][1])
    # In the middle of the time for which that is held.
    until_ms = next(event[0] for event in data["events"][highest:] if event[1] < data["events"][highest][1])
    x = left + width * (data["events"][highest][0] + until_ms) / 2 / end_ms
    browser.mouse("mouseMoved", x, top + height / 2)
    told = browser.js("document.querySelector('#moment').textContent")
    assert f"{format_bytes(data['report']['measured_peak_bytes'])} held" in told
    browser.js("document.querySelector('.step').focus()")
    browser.press("Home")
    browser.press("ArrowRight")
    first = data["events"][1]
    told = browser.js("document.querySelector('#moment').textContent")
    assert told.startswith(f"{format_seconds(first[0] / 1e3)}: {format_bytes(first[1])} held; {first[3]}")
    browser.press("End")
    assert ": 0 B held; release" in browser.js("document.querySelector('#moment').textContent")


def test_without_its_script_the_page_is_whole(browser: Browser, page: Path, data: dict[str, Any]) -> None:
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page, 1280)
        assert [row[:4] + row[-1:] for row in rows_of(browser)] == expected_rows(data, data["ran"])
        assert browser.js("[...document.querySelectorAll('.screen')].every(e => e.hidden)"), (
            "nothing that would do nothing"
        )
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)


def test_the_dom_as_chromium_writes_it(page: Path, data: dict[str, Any], tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    for stage in data["report"]["stages"]:
        assert stage["why"] in done.stdout
    assert done.stdout.count('class="dot"') == len(data["plans"])


def test_before_any_step_and_with_names_that_look_like_markup(
    browser: Browser, data: dict[str, Any], tmp_path: Path
) -> None:
    evil = "</script><script>document.title = 'taken'</script><!--"
    other: dict[str, Any] = json.loads(json.dumps(data))
    other["events"], other["longer"] = [], []
    other["report"].update(model=evil, measured_peak_bytes=None)
    for plan in other["plans"]:
        for stage in plan["stages"]:
            stage["why"] = evil
    path = tmp_path / "page.html"
    path.write_text(to_page(other), encoding="utf-8")
    browser.open(path, 1280)
    assert browser.js("document.title").startswith(evil)
    assert browser.js("document.querySelectorAll('script').length") == 2
    assert browser.js("document.querySelector('.step')") is None
    browser.js("document.querySelector('.budgets').focus()")
    browser.press("End")
    assert_shows(browser, other, len(other["plans"]) - 1)
