"""Charts: what is drawn, and what of it can be read without seeing it."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import PASSWORD, chromium, enter, visit
from conftest import wait_for
from console import local_console, served

from healthchecker import (
    CANCELLED,
    FILESYSTEMS,
    QUARTER,
    SAMPLES,
    Event,
    Mark,
    Point,
    amount,
    chart_svg,
    marks_of,
    record_event,
    table_rows,
    unit_of,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BEGIN, END = 1000.0, 2000.0


def test_units() -> None:
    """A point of a chart is told in the unit of its axis; elsewhere the time of an answer is in milliseconds."""
    metrics = ("disk_percent", "seconds", "response_seconds", "load_per_cpu")
    assert [unit_of(metric) for metric in metrics] == [" %", " s", " s", ""]
    assert [amount(metric, 1.25) for metric in metrics] == ["1.2 %", "1.25 s", "1250 ms", "1.25"]


def event(at: float, kind: str, text: str) -> Event:
    state = ("over" if text.startswith("maintenance") else "begun") if kind == "maintenance" else ""
    return Event(at=at, kind=kind, text=text, state=state, resource="one", actor="", address="")


def test_events_and_maintenance_are_marks() -> None:
    """Also what began before the chart, and what has not ended; what it does not show is left out."""
    found = [
        event(1960, "maintenance", CANCELLED),  # of what was planned beside the one that runs
        event(1950, "maintenance", "in maintenance until 2026-01-01T00:00:00+00:00: later"),
        event(1700, "state", "unhealthy -> healthy after 200 s"),
        event(1500, "state", "healthy -> unhealthy (check: <b>) after 9 s"),
        event(1400, "change", "changed: interval"),
        event(1300, "maintenance", "maintenance is over"),
        event(900, "maintenance", "in maintenance until 2026-01-01T00:00:00+00:00: early"),
        event(800, "maintenance", "maintenance ended"),
        event(700, "maintenance", "in maintenance until 2026-01-01T00:00:00+00:00: before"),
        event(600, "state", "unknown -> healthy"),
    ]
    marks = list(marks_of(found, BEGIN, END))
    assert [(mark.state, mark.at, mark.until) for mark in marks] == [
        ("maintenance", 1950, 2000), ("healthy", 1700, 1700), ("unhealthy", 1500, 1500), ("maintenance", 1000, 1300),
    ]  # fmt: skip
    svg = chart_svg([Point(1100, 5.0, 4.0, 6.0)], {}, (BEGIN, END), 10.0, marks)
    assert 'class="mark unhealthy" d="M50.00 0v100h0.00v-100z"' in svg and "M0.00 0v100h30.00v-100z" in svg
    assert "check: &lt;b&gt;" in svg and "<b>" not in svg


@pytest.mark.parametrize(("times", "drawn"), [
    ("1100< 1200< 1300>", [(1200, 1300), (1100, 2000)]),
    ("1100< 1200< 1300> 1400>", [(1200, 1300), (1100, 1400)]),
    ("900< 950< 1300>", [(1000, 1300), (1000, 2000)]),
    ("700< 800< 850> 900>", []),
    ("1100< 1200> 1200< 1300>", [(1200, 1300), (1100, 1200)]),
], ids=["one goes on", "nested", "since before", "before", "in a row"])  # fmt: skip
def test_several_times_of_maintenance_end_each_for_itself(times: str, drawn: list[tuple[float, float]]) -> None:
    texts = {"<": "in maintenance until 2026-01-01T00:00:00+00:00: work", ">": "maintenance ended"}
    found = [event(float(word[:-1]), "maintenance", texts[word[-1]]) for word in times.split()]
    assert [(mark.at, mark.until) for mark in marks_of(reversed(found), BEGIN, END)] == drawn


def test_a_hostile_mark_is_text() -> None:
    svg = chart_svg([], {}, (BEGIN, END), 10.0, [Mark('"><script>', 1500, 1500, '"><script>')])
    assert "<script>" not in svg


def test_a_table_says_the_same() -> None:
    points = [Point(1000 + 10 * n, float(n), n - 1.0, n + 1.0) for n in range(100)]
    rows = table_rows(points, BEGIN, END)
    assert len(rows) == 12 and (rows[0].minimum, rows[-1].maximum) == (-1.0, 100.0)
    assert rows[0].average == pytest.approx(sum(range(9)) / 9)
    assert table_rows([], BEGIN, END) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="the pages are the same there, but no chromium is")
def test_values_on_hover_and_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    """Both say time, values and what happened then, and stay when the page refreshes itself."""
    row = "  - {name: one, platform: simulated, mean_healthy: 1000000, interval: 600, seed: 1}\n"
    with local_console(tmp_path, row, password=PASSWORD, clock=time.time) as local, served(local):
        wait_for(lambda: local.context.monitor.pollers["one"].news.last)
        local.context.monitor.poll_now("one", 60)
        assert local.context.monitor.flush()    # or the polls would come among what is written here
        now = time.time()
        begin = (now - 1900) // QUARTER * QUARTER   # an average that is made meanwhile holds nothing of before
        with local.store.writing() as session:
            session.execute(SAMPLES.delete())
            session.execute(SAMPLES.insert(), [
                {"resource_id": 1, "at": begin + 100 * n, "reason": "", "poll": "h", "standing": "h",
                 "counts": 100, "cpu_percent": 100 * n, "memory_percent": 5000} for n in range(19)])  # fmt: skip
            session.execute(FILESYSTEMS.insert(), [
                {"resource_id": 1, "at": int(now) - at, "percents": json.dumps({"/<b>": percent, "/var": 1})}
                for at, percent in ((3000, 1000), (500, 4000))])  # fmt: skip
            record_event(session, "state", "healthy -> unhealthy (check: <i>)", resource="one", at=begin + 900)
        context, page, faults = visit(browser, local)
        enter(page, local)
        page.goto("/-/resources/one")
        figure = page.locator("figure", has_text="CPU")
        slider, text = figure.get_by_role("slider", name="CPU: point in time"), figure.locator(".scan p")
        slider.focus()
        page.keyboard.press("Home")
        assert "average 0 %, 0 % to 0 %" in (slider.get_attribute("aria-valuetext") or "")
        for _ in range(9):
            page.keyboard.press("ArrowRight")
        said = text.inner_text()
        wanted = r"[\d-]+ [\d:]+ [\w+-]+: average 9 %, 9 % to 9 %; healthy -> unhealthy \(check: <i>\)"
        assert re.fullmatch(wanted, said)   # a zone without a name is +11
        figure.locator(".graph").hover(position={"x": 1, "y": 5})
        assert "average 0 %" in text.inner_text()
        now_said = page.locator("section.now p.soft")
        now_said.evaluate("each => { each.textContent = 'before' }")
        wait_for(lambda: now_said.inner_text() != "before")
        assert "average 0 %" in text.inner_text()
        figure.get_by_text("CPU as a table").click()
        assert figure.get_by_role("table", name="CPU").locator("tbody tr").count() in (6, 7, 8)
        names = [text.split(" average")[0] for text in page.locator("figcaption").all_inner_texts()]
        assert [name for name in names if name.startswith("Disk")] == ["Disk /<b>", "Disk /var"]
        assert page.locator("figure", has_text="Disk /<b>").locator("figcaption").inner_text().endswith(
            "average 25.0 %, highest 40.0 %")  # fmt: skip
        context.close()
        assert not faults
