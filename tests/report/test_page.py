"""The page: stands alone, is well formed, shows the figures it was given, and escapes every name."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import gpuckpt
from gpuckpt.planning import plan_chain, simulate
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
    longer = {"256 rows": gpuckpt.measure(nn.Sequential(*blocks(6)), torch.cat([batch()] * 8), repeats=1)}
    found = page_data(fitted, plain_peak_bytes=12345, budgets=5, longer=longer)
    assert found["report"]["measured_peak_bytes"] == fitted.budget.peak_bytes
    assert max(event[1] for event in found["events"]) == fitted.budget.peak_bytes
    return json.loads(json.dumps(found))


def test_other_plans_and_longer_inputs_are_what_the_planner_says(data: dict[str, Any]) -> None:
    model = nn.Sequential(*blocks(6))
    chain = gpuckpt.measure(model, batch(), repeats=1)
    peaks = [plan["peak_bytes"] for plan in data["plans"]]
    assert peaks == sorted(set(peaks))
    assert 5 <= len(peaks) <= 6
    assert peaks[0] == data["report"]["smallest_budget_bytes"]
    assert peaks[-1] == data["report"]["keep_all_bytes"]
    assert peaks[data["ran"]] == data["report"]["promised_peak_bytes"]
    assert data["plans"][data["ran"]]["stages"] == data["report"]["stages"]
    assert all(stage["fate"] == "kept" for stage in data["plans"][-1]["stages"])
    for plan in data["plans"]:
        # A stage is run again as often as a plan of that budget runs it, whatever seconds were measured.
        again = sum(stage["runs"] - 1 for stage in plan["stages"])
        expected = plan_chain(chain, plan["peak_bytes"])
        assert again == sum(count - 1 for count in simulate(chain, expected.tree).forward_counts)
    (longer,) = data["longer"]
    assert longer["keep_all_bytes"] > 7 * data["report"]["keep_all_bytes"]
    assert longer["fits"] == (longer["smallest_budget_bytes"] <= data["report"]["budget_bytes"])
    assert not longer["fits"]


def test_the_page_shows_its_data_and_needs_nothing_else(data: dict[str, Any]) -> None:
    text = to_page(data)
    markup = Markup(text)
    assert markup.open == []
    names = [tag for tag, _ in markup.tags]
    assert not {"link", "img", "iframe", "object"} & {*names}
    assert all("src" not in attrs and "href" not in attrs for _, attrs in markup.tags)
    assert "://" not in text
    assert "url(" not in text
    policy = next(attrs["content"] for tag, attrs in markup.tags if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
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
    assert format_bytes(data["longer"][0]["keep_all_bytes"]) in markup.texts
    rows = len(report["stages"]) + 1
    assert names.count("tr") == rows + len(data["longer"]) + 1
    again = sum(attrs.get("class") == "again" for tag, attrs in markup.tags if tag == "tr")
    assert again == sum(stage["fate"] != "kept" for stage in report["stages"]) > 0
    assert sum(attrs.get("class") == "dot" for _, attrs in markup.tags) == len(data["plans"])
    for wanted in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", "width=device-width"):
        assert wanted in text


def test_the_curve_peaks_where_the_ledger_did(data: dict[str, Any]) -> None:
    many = copy.deepcopy(data)
    many["events"] = [[i / 10, 100, 1, "charge", "x", "s"] for i in range(5000)]
    many["events"][3210][1] = data["report"]["budget_bytes"]
    path = next(attrs["d"] for tag, attrs in Markup(to_page(many)).tags if tag == "path")
    assert path is not None
    heights = [float(y) for y in re.findall(r"V([\d.]+)", path)]
    assert min(heights) == 0, "thinning keeps the peak, and the cap is the top"
    assert len(heights) <= 601


def test_names_are_escaped(data: dict[str, Any]) -> None:
    evil = copy.deepcopy(data)
    evil["report"]["model"] = evil["report"]["peak_step"] = EVIL
    for stage in evil["report"]["stages"]:
        stage["name"] = stage["why"] = EVIL
    for plan in evil["plans"]:
        for stage in plan["stages"]:
            stage["fate"] = stage["why"] = EVIL
    for event in evil["events"]:
        event[3] = event[4] = event[5] = EVIL
    evil["longer"][0]["what"] = EVIL
    text = to_page(evil)
    assert "<script>alert" not in text
    assert text.count("<script") == text.count("</script") == 2
    markup = Markup(text)
    assert markup.texts.count(EVIL) >= 2 * len(evil["report"]["stages"])
    assert all(name not in EVIL for _, attrs in markup.tags for name in attrs)


@pytest.mark.parametrize("broken", [None, [], {}, {"format": 1}, {"format": 2}, {"format": 2, "report": {}}])
def test_other_data_are_refused(broken: Any) -> None:
    with pytest.raises(ValueError, match="page"):
        to_page(broken)


def test_before_any_step() -> None:
    fitted = gpuckpt.fit(nn.Sequential(*blocks(4)), batch(), "60%", repeats=1)
    text = to_page(json.loads(json.dumps(page_data(fitted, budgets=3))))
    assert "no step yet" in text
    assert "No step was run yet." in text
