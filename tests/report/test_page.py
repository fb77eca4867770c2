"""The page: stands alone, is well formed, shows the figures it was given, and escapes every name."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from torch import nn

import gpuckpt
from gpuckpt.report.page import page_data, to_page
from gpuckpt.units import format_bytes
from tests.pytorch.steps import batch, blocks

EVIL = "<script>alert(1)</script>'\"&"


class Markup(HTMLParser):
    """Notes tags and texts, and that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    fitted = gpuckpt.fit(nn.Sequential(*blocks(6)), batch(), "45%", repeats=1)
    fitted(batch()).square().sum().backward()
    found = page_data(fitted, plain_peak_bytes=12345, budgets=5)
    assert found["report"]["measured_peak_bytes"] == fitted.budget.peak_bytes
    assert max(event[1] for event in found["events"]) == fitted.budget.peak_bytes
    assert len(found["frontier"]) == 5
    return json.loads(json.dumps(found))


def test_the_page_shows_its_data_and_needs_nothing_else(data: dict[str, Any]) -> None:
    text = to_page(data)
    markup = Markup(text)
    assert markup.open == []
    names = [tag for tag, _ in markup.tags]
    assert not {"script", "link", "img", "iframe", "object"} & {*names}
    assert "http" not in text
    assert "url(" not in text
    report = data["report"]
    for key in (
        "budget_bytes",
        "promised_peak_bytes",
        "measured_peak_bytes",
        "keep_all_bytes",
        "smallest_budget_bytes",
    ):
        assert format_bytes(report[key]) in markup.texts
    assert format_bytes(12345) in markup.texts
    assert names.count("tr") == len(report["stages"]) + 1
    again = sum(attrs.get("class") == "again" for tag, attrs in markup.tags if tag == "tr")
    assert again == sum(stage["fate"] != "kept" for stage in report["stages"]) > 0
    assert names.count("circle") == 5 + 1
    assert names.count("rect") == len(data["events"])
    for wanted in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", "width=device-width"):
        assert wanted in text


def test_the_curve_peaks_where_the_ledger_did(data: dict[str, Any]) -> None:
    many = copy.deepcopy(data)
    many["events"] = [[i / 10, 100, "charge", "x", "s"] for i in range(5000)]
    many["events"][3210][1] = data["report"]["budget_bytes"]
    path = next(attrs["d"] for tag, attrs in Markup(to_page(many)).tags if tag == "path")
    assert path is not None
    heights = [float(y) for y in re.findall(r"V([\d.]+)", path)]
    assert min(heights) == 14, "thinning keeps the peak, and the cap is the top"
    assert len(heights) <= 601


def test_names_are_escaped(data: dict[str, Any]) -> None:
    evil = copy.deepcopy(data)
    evil["report"]["model"] = evil["report"]["peak_step"] = EVIL
    for stage in evil["report"]["stages"]:
        stage["name"] = stage["why"] = EVIL
    for event in evil["events"]:
        event[3] = event[4] = EVIL
    text = to_page(evil)
    assert "<script" not in text
    assert Markup(text).texts.count(EVIL) >= 2 * len(evil["report"]["stages"])


@pytest.mark.parametrize("broken", [None, [], {}, {"format": 2}, {"format": 1}, {"format": 1, "report": {}}])
def test_other_data_are_refused(broken: Any) -> None:
    with pytest.raises(ValueError, match="page"):
        to_page(broken)


def test_before_any_step() -> None:
    fitted = gpuckpt.fit(nn.Sequential(*blocks(4)), batch(), "60%", repeats=1)
    text = to_page(json.loads(json.dumps(page_data(fitted, budgets=3))))
    assert "no step yet" in text
    assert "No step was run yet." in text
