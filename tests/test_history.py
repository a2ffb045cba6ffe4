"""History: polls as rows, averages, charts, availability, events, and how they are written and dropped."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import sqlalchemy
from bench_history import LOOKED_AT, NOW, fill, milliseconds, resources, site
from conftest import wait_for
from postgres import database_in, execute, refusing
from service import Service, prepared_keys, store_in, write_inventory

import healthchecker
from healthchecker import (
    AVERAGES,
    FILESYSTEMS,
    POLLS,
    QUARTER,
    SAMPLES,
    SPANS,
    Base,
    HealthAggregator,
    Point,
    Recorder,
    Report,
    Resource,
    Retention,
    Sample,
    Standing,
    Status,
    Vault,
    Verdict,
    availability,
    chart,
    events,
    filesystem_charts,
    known_since,
    samples,
)

START = 1_700_000_100 // QUARTER * QUARTER  # Unix time of the begin of a quarter
FULL_HOUR = START // 3600 * 3600
DAY = 86_400  # seconds
LATER = START + 1000 * DAY
TTL = 132  # seconds for which a poll counts, of a resource with default settings


@pytest.fixture
def tmp_path(database_folder: Path) -> Path:
    """Every test here runs on both kinds of database."""
    return database_folder


class Notebook:
    """A database with resources, and what a recorder writes into it when their pollers report."""

    def __init__(self, folder: Path, count: int = 1, retention: Retention | None = None) -> None:
        self.store = store_in(folder)
        with self.store.writing() as session:
            for number in range(count):
                row = Resource(origin="inventory")
                row.take_settings(healthchecker.ResourceSettings(name=f"r{number}", hostname="h", platform="local"))
                session.add(row)
        with self.store.reading() as session:
            self.targets = list(healthchecker.load_targets(session, Vault(folder / "keys")).values())
        self.now = time.time()      # by the aggregator's clock of the wall
        self.aggregator = HealthAggregator(wall=lambda: self.now)
        self.recorder = Recorder(self.store, self.aggregator, retention)

    @property
    def id(self) -> int:
        return self.targets[0].id

    def report(self, at: float, poll: str = "h", after: str = "", number: int = 0, **metrics: float) -> Report:
        """A report at the Unix time `at`; the poll and the state after it by their characters."""
        state, cause = POLLS[after or poll]
        reason = "" if poll == "h" else f"because of {poll}"
        sample = Sample({}, metrics, None, {}, {}, {}) if poll in "hdlc" else None
        return Report(self.targets[number], Standing(), Standing(state, cause, reason, at, 1, 0),
                      Verdict(*POLLS[poll], reason), at, 0.25, sample, waits=300.0 * (poll == "a"))  # fmt: skip

    def write(self, *reports: Report) -> None:
        for report in reports:
            self.recorder.put(report)
        self.recorder.flush()

    def polls(self, text: str, begin: float = START, every: float = 60) -> float:
        """Polls one after the other, a dot where there was none; the time of the one after the last."""
        self.write(*(self.report(begin + every * index, poll) for index, poll in enumerate(text) if poll != "."))
        return begin + every * len(text)

    def tidy(self, now: float) -> int:
        """Until nothing is left to do; how many transactions that took."""
        turns = 1
        while self.recorder.tidy(now):
            turns += 1
        return turns

    def count(self, table: sqlalchemy.Table) -> int:
        with self.store.reading() as session:
            return session.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(table)) or 0

    def execute(self, statement: str, **values: object) -> None:
        """What another program does to the database."""
        execute(self.store.database, statement, **values)

    def available(self, now: float) -> dict[str, float | None]:
        with self.store.reading() as session:
            found = availability(session, self.id, now)
        return {span: None if value is None else round(value, 2) for span, value in found.items()}

    def chart(self, metric: str, span: str, now: float) -> list[Point]:
        with self.store.reading() as session:
            return chart(session, self.id, metric, span, now)

    def strip(self, number: int = 0) -> str:
        with self.store.reading() as session:
            row = session.get(Status, self.targets[number].id)
            return row.strip if row else ""


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    made = Notebook(tmp_path)
    yield made
    made.store.close()


# --- a poll as a row ---
@pytest.mark.parametrize("moved", ["hostname = 'other'", "port = 23", "username = 'v'", "interval = 9"])
def test_a_host_key_is_written_for_the_address_that_showed_it(notebook: Notebook, moved: str) -> None:
    """A change of the address may come between the poll and the recorder's turn."""
    notebook.execute(f"UPDATE resource SET {moved}")
    notebook.write(dataclasses.replace(notebook.report(START), host_key="ssh-ed25519 SHA256:x"))
    with notebook.store.reading() as session:
        row = session.get(Resource, notebook.id)
    assert row and row.host_key == ("ssh-ed25519 SHA256:x" if "interval" in moved else None)


def test_every_result_has_its_character() -> None:
    """A state or cause without one would end the recorder's work."""
    assert {cause for _, cause in POLLS.values()} == set(get_args(healthchecker.Cause))
    assert len(healthchecker.POLL_MARKS) == len(POLLS)


# metrics that were read, and what is kept of them
READ = {
    "nothing": ({}, {}),
    "all": (
        {"cpu_percent": 12.346, "memory_percent": 0.0, "swap_percent": 100.0, "load_per_cpu": 1.5},
        {"cpu_percent": 12.35, "memory_percent": 0.0, "swap_percent": 100.0, "load_per_cpu": 1.5},
    ),
    "the fullest disk": ({"disk_percent /": 40.0, "disk_percent /var": 71.5}, {"disk_percent": 71.5}),
    "beyond what fits": ({"load_per_cpu": 1e9}, {"load_per_cpu": 21_474_836.47}),
    "of no interest": ({"fans": 3.0}, {}),
}


@pytest.mark.parametrize(("read", "kept"), READ.values(), ids=READ)
def test_readings(read: dict[str, float], kept: dict[str, float], notebook: Notebook) -> None:
    notebook.write(notebook.report(START, "h", **read))
    with notebook.store.reading() as session:
        [poll] = samples(session, notebook.id, LATER)
    assert poll.readings == pytest.approx(kept | {"seconds": 0.25}, abs=1e-9)
    assert poll.at == START


def test_a_row_of_very_many_filesystems(notebook: Notebook) -> None:
    """The page and the API show what is stored."""
    many = {f"disk_percent /{number}": number / 1000 for number in range(30_000)}
    notebook.write(notebook.report(START, "h", **many))
    with notebook.store.reading() as session:
        row, [poll] = session.get(Status, notebook.id), samples(session, notebook.id, LATER)
    assert row and len(row.sample) < 10_000 and json.loads(row.sample)["metrics"]["disk_percent /29999"] == 29.999
    assert json.loads(row.sample)["details"]["more_filesystems"] == "29900 more"
    assert poll.readings["disk_percent"] == 30.0


def test_nothing_was_read_is_not_zero(notebook: Notebook) -> None:
    notebook.write(notebook.report(START, "u"))
    with notebook.store.reading() as session:
        [poll] = samples(session, notebook.id, LATER)
    assert poll.readings == {"seconds": 0.25}


def test_samples(notebook: Notebook) -> None:
    """State, cause and reason of the poll, and the state after it; the last ones, oldest first."""
    notebook.write(*(notebook.report(START + 60 * index, poll, after) for index, (poll, after)
                     in enumerate([("h", "h"), ("u", "h"), ("t", "t"), ("d", "t")])))  # fmt: skip
    with notebook.store.reading() as session:
        found = samples(session, notebook.id, LATER)
        assert samples(session, notebook.id, LATER, limit=2) == found[2:]
        assert samples(session, notebook.id, LATER, since=START + 60) == found[1:]
    assert [poll[1:5] for poll in found] == [
        ("healthy", "", "", "healthy"),
        ("unhealthy", "unreachable", "because of u", "healthy"),
        ("unhealthy", "timeout", "because of t", "unhealthy"),
        ("degraded", "limit", "because of d", "unhealthy"),
    ]


def test_strip(notebook: Notebook) -> None:
    """One string per resource: the last 60 polls, whether they come one by one or many at once."""
    notebook.polls("hhu")
    assert notebook.strip() == "hhu"
    notebook.polls("d", START + 180)
    assert notebook.strip() == "hhud"
    notebook.polls("h" * 58, START + 240)
    assert notebook.strip() == "ud" + "h" * 58
    notebook.polls("t" * 70, START + 6000)
    assert notebook.strip() == "t" * 60


# --- events ---
def test_transitions_are_events(notebook: Notebook) -> None:
    good, bad = Standing("healthy", since_at=START), Standing("unhealthy", "unreachable", "no\nroute", START + 60)
    for before, after in ((Standing(), good), (good, good), (good, bad), (bad, bad)):
        verdict = Verdict(after.state, after.cause, after.reason)
        notebook.write(Report(notebook.targets[0], before, after, verdict, START + 60, 0.1))
    for passed, healthy in (5, True), (7, False):
        notebook.now += passed
        notebook.aggregator.set_resource("r0", healthy, "down")
    notebook.recorder.flush()
    with notebook.store.reading() as session:
        found = [(one.kind, one.resource, one.text) for kind in ("gate", "state") for one in events(session, kind=kind)]
        assert [event.at for event in events(session, kind="state")] == [START + 60] * 2
    assert found[:2] == [("gate", "", "open -> closed (r0: down) after 7 s"), ("gate", "", "closed -> open after 5 s")]
    assert found[2:] == [
        ("gate", "", "closed (the service starts)"),
        ("state", "r0", "healthy -> unhealthy (unreachable: no route) after 60 s"),
        ("state", "r0", "unknown -> healthy"),
    ]


def test_looking_through_events(notebook: Notebook) -> None:
    with notebook.store.writing() as session:
        for number in range(10):
            healthchecker.record_event(session, "change" if number % 2 else "login", f"{number}", actor="admin",
                                       resource="a" if number < 5 else "b", at=START + number)  # fmt: skip
    with notebook.store.reading() as session:

        def found(**wanted: object) -> str:
            return "".join(event.text for event in events(session, **wanted))  # type: ignore[arg-type]

        assert found() == "9876543210"
        assert (found(resource="a"), found(kind="login"), found(resource="b", kind="change")) == (
            "43210", "86420", "975")  # fmt: skip
        page = events(session, limit=4)
        assert found(limit=4) == "9876" and found(before=page[-1].id, limit=4) == "5432"


def test_events_stand_in_the_order_of_time(notebook: Notebook) -> None:
    """The recorder writes a second late. When the clock was set, what is newer stands first whatever its time."""
    with notebook.store.writing() as session:
        for kind, text, at in (
            ("change", "2", 20), ("state", "1", 10), ("state", "far", 9000), ("change", "far too", 8999),
            ("clock", "back", 30), ("change", "4", 50), ("state", "3", 40),
        ):  # fmt: skip
            healthchecker.record_event(session, kind, text, at=START + at)
            session.flush()
    with notebook.store.reading() as session:
        order = ["4", "3", "back", "far", "far too", "2", "1"]
        assert [event.text for event in events(session)] == order
        pages, page = list[str](), events(session, limit=1)
        while page:
            pages += [event.text for event in page]
            page = events(session, limit=1, before=page[-1].id)
        assert pages == order
        assert [event.text for event in events(session, kind="state", limit=2)] == ["3", "far"]
        assert events(session, kind="clock", before=events(session, limit=2)[-1].id)[0].text == "back"


def test_an_event_is_one_line(notebook: Notebook) -> None:
    before = notebook.store.wall()  # PostgreSQL's is its own
    with notebook.store.writing() as session:
        healthchecker.record_event(session, "login", "a\r\nb\x1b[2J" + "x" * 10_000, actor="m\nn", address="192.0.2.1")
    with notebook.store.reading() as session:
        [event] = events(session)
        assert event.text.startswith("a b [2Jxx") and len(event.text) <= 500
        assert (event.actor, event.address, event.resource) == ("m n", "192.0.2.1", "")
        assert before <= event.at <= notebook.store.wall()


# --- what is known of a time ---
# polls of a minute each from the begin of a quarter on; seconds after it; percent of the known time that was healthy
TIMES = {
    "nothing": ("", 900, None),
    "one poll, until it does not count any more": ("h", 900, 100.0),
    "healthy": ("h" * 15, 900, 100.0),
    "degraded is available": ("d" * 15, 900, 100.0),
    "a third": ("hhhhhlllll" + "lllll", 900, 33.33),
    "until now": ("hhll", 240, 50.0),
    "longer than a quarter": ("h" * 20 + "c" * 20, 2400, 50.0),
    "over midnight of a quarter": ("h" * 14 + "u" * 2, 960, 87.5),
    "the service was off": ("hh" + "." * 60 + "uu", 64 * 60, 61.54),  # healthy for 60 + 132 s, unhealthy for 120 s
    "off for hours": ("h" * 10 + "." * 600 + "h" * 10 + "u" * 20, 640 * 60, 51.46),  # 1,272 of 2,472 s
    "a refused login is not tried again for a while": ("a" + "." * 6 + "hhhhhhh", 14 * 60, 50.0),
}


@pytest.mark.long
@pytest.mark.parametrize("rolled", [False, True], ids=["raw", "averages"])
@pytest.mark.parametrize(("polls", "seconds", "percent"), TIMES.values(), ids=TIMES)
def test_availability(polls: str, seconds: int, percent: float | None, rolled: bool, notebook: Notebook) -> None:
    """The same from the polls and from the averages made of them."""
    notebook.polls(polls)
    now = START + seconds
    if rolled:
        notebook.tidy(now + 10)
        assert notebook.count(AVERAGES) or seconds < QUARTER or not polls
    assert notebook.available(now) == {"day": percent, "week": percent, "month": percent}


def test_what_is_known_begins_with_the_first_poll(notebook: Notebook) -> None:
    """And not with its quarter: a new resource was said to be watched before it was there."""
    begin = START + QUARTER - 60
    end = notebook.polls("h" * 30, begin)
    notebook.tidy(end + QUARTER)
    assert notebook.count(AVERAGES)
    with notebook.store.reading() as session:
        assert known_since(session, notebook.id) == begin
    notebook.execute("DELETE FROM sample WHERE at < :at", at=START + QUARTER)
    with notebook.store.reading() as session:
        assert known_since(session, notebook.id) == START   # once they are gone


# --- averages and charts ---
def test_an_average(notebook: Notebook) -> None:
    """Of what was read; what no poll read is missing and not zero."""
    notebook.write(
        notebook.report(START, "h", cpu_percent=10.0, memory_percent=50.0),
        notebook.report(START + 60, "u"),
        notebook.report(START + 120, "h", cpu_percent=20.0),
        notebook.report(START + 180, "h", cpu_percent=60.0),
        notebook.report(START + QUARTER, "h", cpu_percent=99.0),
    )
    notebook.tidy(START + QUARTER + 6)
    with notebook.store.reading() as session:
        [row] = session.execute(sqlalchemy.select(AVERAGES))
    assert row == (
        *(notebook.id, START),
        *(3120, 2520),  # tenths of a second: 180 + 132 s known, 60 of them unhealthy
        *(3000, 5000, None, None, None, 25),
        *(1000, 5000, None, None, None, 25),
        *(6000, 5000, None, None, None, 25),
    )


def test_reports_that_nobody_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the recorder waits for a database, say: the newest are kept, and nobody waits for room."""
    monkeypatch.setattr(healthchecker, "PENDING_ROWS", 3)
    notebook = Notebook(tmp_path, count=2)
    with contextlib.closing(notebook.store):
        reports = [notebook.report(START + at, number=at % 2) for at in range(9)]
        for report in reports:
            notebook.recorder.put(report)
        assert len(notebook.recorder._reports) == 3
        notebook.write()
        with notebook.store.reading() as session:
            rows = session.execute(sqlalchemy.select(Status.resource_id, Status.polled_at)).all()
        assert {*map(tuple, rows)} == {(report.target.id, report.at) for report in reports[-2:]}
        assert notebook.count(healthchecker.SAMPLES) == 3


def test_a_quarter_is_not_summed_up_before_its_last_reports_are_written(notebook: Notebook) -> None:
    notebook.polls("h" * 16)
    notebook.tidy(START + QUARTER + 4)
    assert notebook.count(AVERAGES) == 0
    notebook.tidy(START + QUARTER + 6)
    assert notebook.count(AVERAGES) == 1
    notebook.tidy(START + QUARTER + 60)
    notebook.tidy(START + 2 * QUARTER + 6)
    assert notebook.count(AVERAGES) == 2


def test_chart_of_an_hour(notebook: Notebook) -> None:
    """A point per poll, none where there was none, nothing from before."""
    now = START + 7200
    for at in (now - 3700, now - 3590, now - 60, now - 40, now - 31):
        notebook.write(notebook.report(at, "h", cpu_percent=at - now + 4000))
    notebook.write(notebook.report(now - 20, "u"))
    assert notebook.chart("cpu_percent", "hour", now) == [
        (now - 3590, 410, 410, 410),
        (now - 60, 3940, 3940, 3940),
        (now - 40, (3960 + 3969) / 2, 3960, 3969),
    ]
    assert notebook.chart("swap_percent", "hour", now) == []
    assert len(notebook.chart("seconds", "hour", now)) == 4


# --- odd times ---
def test_beyond_2038(notebook: Notebook) -> None:
    """Times of more than 31 bits are written, summed up, charted and shown as all others."""
    begin = 2**31 // QUARTER * QUARTER - QUARTER
    end = notebook.polls("hhuhh" * 12, begin)
    notebook.tidy(end + 10)
    assert notebook.count(AVERAGES) == 4
    with notebook.store.reading() as session:
        polls = samples(session, notebook.id, end)
        assert [poll.at for poll in polls][-1] > 2**31 and len(polls) == 60
        assert availability(session, notebook.id, end)["day"] == 80
        assert max(event.at for event in events(session)) > 2**31
        status = session.get(Status, notebook.id)
        assert status and status.polled_at == end - 60
    assert healthchecker.utc_time(2**31).isoformat() == "2038-01-19T03:14:08+00:00"
    assert healthchecker.local_time(2**31)[:5] == "2038-"


def test_the_second_that_comes_twice(notebook: Notebook) -> None:
    """A leap second as Unix time has it: every poll is kept that is not of the very same time, in its order."""
    leap = 1_483_228_800
    times = [leap - 1.5, leap - 0.5, leap - 0.4, leap - 0.5, leap + 0.5]
    for at in times:
        notebook.write(notebook.report(at))
    with notebook.store.reading() as session:
        assert [poll.at for poll in samples(session, notebook.id, leap + 60)] == [*times[:3], times[-1]]
        assert availability(session, notebook.id, leap + 1)["day"] == 100


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows takes no time zone from the environment")
def test_the_hour_that_comes_twice(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the one that does not come: shown apart; what is computed knows no time zone."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        second = 1_792_891_800      # 2026-10-25 02:30 CET
        shown = [healthchecker.local_time(at) for at in (second - 3600, second)]
        assert shown[0] != shown[1] and {text[:19] for text in shown} == {"2026-10-25 02:30:00"}
        assert any(text.endswith((" CET", " CEST")) for text in shown)
        assert healthchecker.local_time(1_774_746_000)[:19] == "2026-03-29 03:00:00"    # a second after 01:59:59
        assert healthchecker.local_time(1_774_745_999)[:19] == "2026-03-29 01:59:59"
        for change in (second - 1800, 1_774_746_000):
            end = notebook.polls("hh" * 60, change - 3600)
            with notebook.store.reading() as session:
                assert availability(session, notebook.id, end)["day"] == 100
                assert len(chart(session, notebook.id, "seconds", "day", end)) == 120 * 60 // 300
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.long
@pytest.mark.parametrize("span", SPANS)
def test_chart_over_the_border_of_averages(span: str, notebook: Notebook) -> None:
    """Averages first, polls after them: every moment once, and never more points than a screen has."""
    now = START + 40 * DAY
    seconds, step = SPANS[span]
    every = max(60, seconds / 2000)
    begin = int(now - seconds - 3 * QUARTER)
    with notebook.store.writing() as session:
        rows = [notebook.report(at, "h", cpu_percent=float((at - begin) % 90)).sample_row
                for at in range(begin, now, int(every))]  # fmt: skip
        session.execute(sqlalchemy.insert(SAMPLES), rows)
    direct = notebook.chart("cpu_percent", span, now) if span in ("hour", "day") else None
    notebook.tidy(now)
    points = notebook.chart("cpu_percent", span, now)
    assert 50 < len(points) <= 362
    assert [point.at for point in points] == sorted({point.at for point in points})
    assert all(point.at % step == 0 for point in points)
    assert now - seconds - step < points[0].at and points[-1].at < now <= points[-1].at + 2 * max(step, every)
    assert all(0 <= point.minimum <= point.average <= point.maximum < 90 for point in points)
    kept = [point for point in points if point.at >= now - Retention().raw * DAY + QUARTER]
    if direct is None:
        assert notebook.count(SAMPLES) < len(rows), "nothing was dropped"
        assert points[0].at < now - Retention().raw * DAY
    else:
        assert kept == direct
    assert {after.at - before.at for before, after in itertools.pairwise(points)} == {max(step, int(every))}


@pytest.mark.parametrize(("span", "value"), [("hour", 10), ("day", 10), ("week", 99), ("month", 99)])
def test_charts_of_long_spans_are_made_of_averages(span: str, value: float, notebook: Notebook) -> None:
    """Also where the polls are still there: one a second would be 170,000 of them."""
    notebook.write(*(notebook.report(START + 60 * index, "h", cpu_percent=10.0) for index in range(15)))
    notebook.tidy(START + QUARTER + 10)
    notebook.execute("UPDATE average SET cpu_percent = 9900, cpu_percent_minimum = 9900, cpu_percent_maximum = 9900")
    assert {point.average for point in notebook.chart("cpu_percent", span, START + QUARTER + 10)} == {value}


def test_points_fit_a_screen() -> None:
    assert all(seconds / step <= 400 for seconds, step in SPANS.values())


def disks(**filled: float) -> dict[str, float]:
    return {f"disk_percent /{mount}": percent for mount, percent in filled.items()}


def test_charts_of_every_filesystem(notebook: Notebook) -> None:
    """The first reading of an hour, of those that there are today; of a single one the polls say it."""
    for number, (at, found) in enumerate([
        (FULL_HOUR, disks(a=10, b=20)), (FULL_HOUR + 60, disks(a=11, b=21)), (FULL_HOUR + 3600, disks(a=12, gone=1)),
        (FULL_HOUR + 7200, {}), (FULL_HOUR + 7260, disks(a=13.5, b=22)),
    ]):  # fmt: skip
        notebook.write(notebook.report(at, **found))
        assert notebook.count(FILESYSTEMS) == (1, 1, 2, 2, 3)[number]
    notebook.write(notebook.report(FULL_HOUR + 3 * 3600, **disks(a=14)))
    with notebook.store.reading() as session:
        found = filesystem_charts(session, notebook.id, "day", FULL_HOUR + 8000)
        assert {mount: [(point.at, point.average) for point in points] for mount, points in found.items()} == {
            "/a": [(FULL_HOUR, 10), (FULL_HOUR + 3600, 12), (FULL_HOUR + 7200, 13.5)],
            "/b": [(FULL_HOUR, 20), (FULL_HOUR + 7200, 22)],
        }  # fmt: skip
        assert filesystem_charts(session, notebook.id, "hour", FULL_HOUR + 8000) == {}


@pytest.mark.parametrize("damage", ["{", "[]", "7", '{"/": "x"}', '{"/": null}'])
def test_damaged_filesystems_are_left_out(notebook: Notebook, damage: str) -> None:
    with notebook.store.writing() as session:
        for at, percents in enumerate(('{"/": 1000}', damage, '{"/": 3000}'), FULL_HOUR):
            session.execute(FILESYSTEMS.insert().values(resource_id=notebook.id, at=at, percents=percents))
    with notebook.store.reading() as session:
        found = filesystem_charts(session, notebook.id, "day", FULL_HOUR + 80)
    assert found == {"/": [(FULL_HOUR, 10, 10, 10), (FULL_HOUR + 2, 30, 30, 30)]}


def test_filesystems_are_bounded(notebook: Notebook) -> None:
    """However many a host names, and however it calls them, and also over time."""
    for turn in range(3):
        names = {f"{turn}-{number}": 1.0 for number in range(500)}
        notebook.write(notebook.report(START + turn, **disks(**{"x" * 5000: 2.0}, **names)))
    with notebook.store.reading() as session:
        [text] = session.scalars(sqlalchemy.select(FILESYSTEMS.c.percents))
    assert len(json.loads(text)) == 20 and len(text) < 500
    for turn in range(3):
        notebook.tidy(START + 200 * DAY + turn * QUARTER)
    assert notebook.count(FILESYSTEMS) == 0


# --- what is dropped ---
def test_retention(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, retention=Retention(raw=0.5, averages=1, events=1))
    end = notebook.polls("h" * 200, every=600)  # 33 hours
    now = end + 20 * QUARTER
    for turn in range(21):  # a part at each
        notebook.tidy(end + turn * QUARTER)
    with notebook.store.reading() as session:
        raw = session.scalars(sqlalchemy.select(SAMPLES.c.at).order_by(SAMPLES.c.at)).all()
        averages = session.scalars(sqlalchemy.select(AVERAGES.c.at).order_by(AVERAGES.c.at)).all()
        left = [event.at for event in events(session, kind="state", limit=1000)]
    assert now - 0.5 * DAY <= raw[0] < now - 0.5 * DAY + 600 and raw[-1] == end - 600
    assert now - DAY <= averages[0] < now - DAY + QUARTER and averages[-1] + QUARTER > end - 600
    assert left and min(left) >= now - DAY
    notebook.store.close()


@pytest.mark.long
def test_events_are_bounded(notebook: Notebook) -> None:
    """Whatever flaps, the newest 100,000 are kept."""
    notebook.execute(
        "INSERT INTO event (at, kind, resource, text, actor, address, \"group\", state) WITH RECURSIVE number(n) AS "
        "(SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 120000) "
        "SELECT :start + n / 1000.0, 'state', 'r0', CAST(n AS VARCHAR), '', '', '', '' FROM number",
        start=START)  # fmt: skip
    for turn in range(3):
        notebook.tidy(START + turn * QUARTER)
    with notebook.store.reading() as session:
        assert session.scalar(sqlalchemy.text("SELECT count(*) FROM event")) == 100_000
        [newest] = events(session, limit=1)
    assert newest.text == "120000"


def test_a_clock_that_was_set_back(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is of the future goes in the end, and averages are made again."""
    notebook.polls("h" * 32, START + 365 * DAY)
    notebook.tidy(START + 365 * DAY + 32 * 60)
    assert notebook.count(AVERAGES) == 2
    now = notebook.polls("u" * 32)
    monkeypatch.setattr(healthchecker, "STILL_ROUNDS", 2)
    for turn in range(7):  # a part at each
        notebook.tidy(now - QUARTER + turn * QUARTER)
    with notebook.store.reading() as session:
        assert list(session.scalars(sqlalchemy.select(AVERAGES.c.at)))[:2] == [START, START + QUARTER]
        assert {poll.state for poll in samples(session, notebook.id, now)} == {"unhealthy"}
    assert notebook.available(now) == {"day": 0, "week": 0, "month": 0}


@pytest.mark.long
@pytest.mark.parametrize("days", [-120, 120, 2])
def test_a_wrong_clock_drops_nothing(days: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead battery, or a typo in `date`: a week of it costs nothing, nor does that it is put right, whether there is
    another start meanwhile or not. What was removed keeps its row, and the key of its host."""
    retention = Retention(raw=2, averages=2, events=2)
    notebook = Notebook(tmp_path, 2, retention)
    end = notebook.polls("h" * 144, every=300)
    notebook.write(*(notebook.report(START + 60 * index, "h", number=1) for index in range(100)))
    notebook.execute(f"INSERT INTO setting (name, value, text) VALUES ('logins/x', {end:.0f}, 'x')")
    tables = [SAMPLES, AVERAGES, *map(Base.metadata.tables.get, ("event", "resource", "setting"))]
    notebook.tidy(end)
    notebook.execute("UPDATE resource SET origin = 'removed', host_key = 'k' WHERE name = 'r1'")
    before = [notebook.count(table) for table in tables]
    monkeypatch.setattr(healthchecker, "STILL_ROUNDS", 20)
    for now in end + days * DAY, end + QUARTER:
        for turn in range(19):
            notebook.tidy(now + turn * QUARTER)
            if turn % 7 == 3:
                notebook.recorder = Recorder(notebook.store, notebook.aggregator, retention)
    assert all(notebook.count(table) >= count for table, count in zip(tables, before, strict=True))
    for turn in range(100):
        notebook.tidy(end + turn * 0.9 * DAY)
    assert [notebook.count(table) for table in (SAMPLES, AVERAGES, *tables[2:4])] == [0, 0, 1, 1]  # one: of the start
    notebook.store.close()


def test_a_clock_that_is_hours_behind_drops_nothing(notebook: Notebook) -> None:
    """Until it is put right: that takes longer than a quarter of an hour where nobody is there."""
    end = notebook.polls("h" * 200)
    notebook.tidy(end)
    before = notebook.count(SAMPLES), notebook.count(AVERAGES)
    for turn in range(4):
        notebook.tidy(end - 7200 + turn * QUARTER)
    assert (notebook.count(SAMPLES), notebook.count(AVERAGES)) == before == (200, 13)


def test_a_machine_that_is_off_each_weekend_drops_what_is_old(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To be off looks like a step, and begins no other time without dropping before one is over."""
    monkeypatch.setattr(healthchecker, "STILL_ROUNDS", 8)
    now = notebook.polls("h" * 100, every=10)
    left = []
    for _ in range(5):
        for turn in range(6):
            notebook.tidy(now + turn * QUARTER)
        now += 7 * DAY
        left.append(notebook.count(SAMPLES))
    assert left[1] == 100 > left[2] == left[3] > left[4]


@pytest.mark.parametrize("days", [1, 120])
def test_what_a_clock_that_was_ahead_left_hides_nothing(days: int, notebook: Notebook) -> None:
    """It stays for a week after the clock was put right: averages are made as ever, and of what they are is shown."""
    notebook.tidy(notebook.polls("h" * 30) + 10)
    notebook.tidy(notebook.polls("u" * 30, START + days * DAY + 2 * QUARTER) + 10)
    count = notebook.count(AVERAGES)
    now = notebook.polls("h" * 60, START + 2 * QUARTER)
    notebook.tidy(now + 10)
    assert notebook.count(AVERAGES) == count + 3
    assert notebook.available(now) == {"day": 100, "week": 100, "month": 100}
    if days == 1:       # the time comes that it showed
        notebook.tidy(notebook.polls("h" * 1500, now) + 10)
        assert not notebook.recorder._unsummed.why


@pytest.mark.parametrize("days", [-120, 120])
def test_a_start_with_a_wrong_clock_drops_nothing(
    days: int, notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first minutes, until the machine has the time from others; nor do many starts, one after another."""
    end = notebook.polls("h" * 200)
    monkeypatch.setattr(notebook.store, "wall", lambda: end + days * DAY)
    for _ in range(2):
        recorder = Recorder(notebook.store, notebook.aggregator)
        recorder.start()
        wait_for(lambda recorder=recorder: recorder._rolled and not recorder._untidy)
        recorder.close()
    assert notebook.count(SAMPLES) == 200
    with notebook.store.reading() as session:
        assert len(events(session, kind="state", limit=1000)) == 200


def test_a_removed_resource_takes_its_history_along(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path, 2)
    for number in range(2):
        notebook.write(*(notebook.report(START + 60 * index, "h", number=number) for index in range(16)))
    notebook.tidy(START + QUARTER + 10)
    assert (notebook.count(SAMPLES), notebook.count(AVERAGES)) == (32, 2)
    with notebook.store.writing() as session:
        session.delete(session.get(Resource, notebook.id))
    notebook.write(notebook.report(START + 960, "u"))  # of a poll that ran
    assert (notebook.count(SAMPLES), notebook.count(AVERAGES)) == (16, 1)
    with notebook.store.reading() as session:
        assert {event.resource for event in events(session)} == {"", "r0", "r1"}
    notebook.store.close()


def test_the_pages_that_the_bench_times(tmp_path: Path) -> None:
    """They are pages, or `make bench` would end there."""
    store = resources(tmp_path, LOOKED_AT)
    for name, (call, _) in site(store).items():
        if "page" in name or name == "overview":
            call()
    store.close()


# --- one writer, in small transactions ---
def test_what_is_noted_waits_for_no_database(notebook: Notebook) -> None:
    """Or this machine, when it is cut off from its database, too, would ask no uplink meanwhile."""
    flushing, writer = notebook.recorder._flushing, threading.Thread(target=notebook.recorder.flush)

    def is_held() -> bool:
        if is_free := flushing.acquire(blocking=False):
            flushing.release()
        return not is_free

    with notebook.store.writing():  # beside which no other writes
        writer.start()
        wait_for(is_held)
        begun = time.monotonic()
        notebook.recorder.note("service", "cut off", START)
        assert time.monotonic() - begun < 2
    writer.join()
    assert notebook.recorder.flush()
    with notebook.store.reading() as session:
        assert [(event.text, event.at) for event in events(session, kind="service")] == [("cut off", START)]


def test_what_falls_is_written_at_once(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a start after a kill would open the gate on the last good result; many that fall are written together."""
    monkeypatch.setattr(healthchecker, "FLUSH_INTERVAL", 60)
    writers = list[threading.Thread]()
    sqlalchemy.event.listen(
        sqlalchemy.orm.Session, "after_commit", note := lambda _: writers.append(threading.current_thread()))
    notebook.recorder.start()
    try:
        notebook.recorder.put(notebook.report(START, "h"))
        notebook.recorder.put(notebook.report(START + 1, "u"))
        wait_for(lambda: notebook.strip() == "hu", 10)
        writers.clear()
        begun_mono = time.monotonic()
        for number in range(200):
            notebook.recorder.put(notebook.report(START + 2 + number, "u"))
            time.sleep(0.001)       # as they come from their threads
        wait_for(lambda: notebook.count(SAMPLES) == 202, 10)
        seconds = time.monotonic() - begun_mono
        assert writers.count(notebook.recorder) <= 2 + seconds / healthchecker.WOKEN_INTERVAL
    finally:
        sqlalchemy.event.remove(sqlalchemy.orm.Session, "after_commit", note)
        notebook.recorder.close()
    assert not notebook.recorder.is_alive()


@pytest.mark.of_files
def test_a_loss_of_power_takes_no_more_than_polls_that_found_nothing_new(notebook: Notebook) -> None:
    """Of SQLite, whose commits wait for the disk only where they are told to."""
    waits = list[bool]()

    def note(session: sqlalchemy.orm.Session) -> None:
        waits.append(session.scalar(sqlalchemy.text("PRAGMA synchronous")) == 2)

    def waited(at: float, poll: str, *, is_new: bool) -> bool:
        report = notebook.report(at, poll)
        waits.clear()
        notebook.write(report if is_new else dataclasses.replace(report, before=report.standing))
        return waits == [True]

    sqlalchemy.event.listen(sqlalchemy.orm.Session, "before_commit", note)
    try:
        assert waited(START, "h", is_new=True) and not waited(START + 1, "h", is_new=False)
        assert waited(START + 2, "u", is_new=True) and not waited(START + 3, "u", is_new=False)
        notebook.recorder.logins.keep("row", "a login that begins", 0, ())
        assert waited(START + 4, "u", is_new=False)
        waits.clear()
        with notebook.store.writing() as session:
            session.delete(session.get(Resource, notebook.id))
        assert waits == [True]
    finally:
        sqlalchemy.event.remove(sqlalchemy.orm.Session, "before_commit", note)


@pytest.mark.long
def test_summing_up_goes_in_short_transactions(tmp_path: Path) -> None:
    """Others may write in between, and in the end every resource is done."""
    notebook = Notebook(tmp_path, 150)
    notebook.write(*(notebook.report(START + 60 * index, "h", number=number, cpu_percent=1.0)
                     for number in range(150) for index in range(16)))  # fmt: skip
    assert notebook.tidy(START + QUARTER + 10) > 2
    assert notebook.count(AVERAGES) == 150
    assert notebook.tidy(START + QUARTER + 11) == 1, "nothing is left to do"
    notebook.store.close()


def test_what_cannot_be_written_is_written_later(notebook: Notebook, caplog: pytest.LogCaptureFixture) -> None:
    """All of it: polls, states and events; meanwhile nothing of it is there."""
    notebook.recorder.flush()
    with refusing(notebook.store.database, "INSERT ON event"):
        notebook.polls("hhuuh")
        assert (notebook.count(SAMPLES), notebook.strip()) == (0, "")
        assert "the database cannot be written: as the test wants" in caplog.text
        for _ in range(5):
            assert not notebook.recorder.flush(), "so that nothing is summed up before it is there"
        assert caplog.text.count("cannot be written") == 1, "a full disk must not fill the log"
    notebook.polls("t", START + 300)
    assert (notebook.count(SAMPLES), notebook.strip()) == (6, "hhuuht")
    with notebook.store.reading() as session:
        assert len(events(session, kind="state")) == 6


def test_one_statement_however_many_reported(tmp_path: Path) -> None:
    """Each connection of SQLite keeps the last 128 of them, each of which takes kilobytes."""
    book, seen = Notebook(tmp_path, 5), list[str]()

    def note(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        seen.append(statement)

    book.write(*(book.report(START, number=number) for number in range(5)))
    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
    try:
        for count in range(1, 5):
            book.write(*(book.report(START + 60 * count, number=number) for number in range(count)))
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", note)
    book.store.close()
    assert len({statement for statement in seen if "FROM resource" in statement and " IN (" in statement}) == 1


def test_a_resource_that_cannot_be_summed_up_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notebook = Notebook(tmp_path, 3)
    for number in range(3):
        notebook.write(*(notebook.report(START + 60 * index, "h", number=number) for index in range(16)))
    with refusing(notebook.store.database, "INSERT ON average", "NEW.resource_id = 1"):
        notebook.tidy(START + QUARTER + 10)
    assert "cannot be summed up" in caplog.text
    with notebook.store.reading() as session:
        done = set(session.scalars(sqlalchemy.select(AVERAGES.c.resource_id)))
    assert done == {target.id for target in notebook.targets[1:]}
    notebook.store.close()


# --- the promised figures ---
@pytest.mark.of_files  # its size, and an import by its own program
def test_growth_and_speed(tmp_path: Path) -> None:
    """100 resources at 60 s over the whole retention: 288,000 polls and 864,000 averages. A fifth of it, filled."""
    retention, store = Retention(), resources(tmp_path, 20)
    fill(store.database.path, 20, retention.raw, retention.averages)
    assert 5 * store.database.path.stat().st_size <= 250e6
    with store.reading() as session:
        assert len(chart(session, 7, "cpu_percent", "month", NOW)) >= 360
        for read in (lambda: chart(session, 7, "cpu_percent", "month", NOW), lambda: availability(session, 7, NOW)):
            assert milliseconds(read, 5, time.process_time) <= 150, "of CPU time: others run on this machine, too"
    store.close()


# --- a restart of the service ---
def stored(folder: Path, query: str) -> list[str]:
    return [str(text) for (text,) in execute(database_in(folder), query)]


@pytest.mark.long
def test_history_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Strip and events go on; what the first run has left to sum up, the second one sums up."""
    rows = "  - {name: here, platform: simulated, interval: 1, mean_healthy: 1e6, mean_unhealthy: 0.001}"
    prepared_keys(tmp_path)
    path = write_inventory(tmp_path, rows)
    begin = int(time.time() // QUARTER) * QUARTER
    an_hour_ago = begin - 4 * QUARTER
    with Service(path):
        wait_for(lambda: len(stored(tmp_path, "SELECT at FROM sample")) >= 3)
    [first] = stored(tmp_path, "SELECT strip FROM status")
    execute(database_in(tmp_path), "INSERT INTO sample (resource_id, at, reason, poll, standing, counts, seconds) "
            "SELECT 1, :at, '', poll, standing, counts, seconds FROM sample LIMIT 1", at=an_hour_ago)  # fmt: skip
    with Service(path) as service:
        service.wait_status("/", 200)
        averages = f"SELECT at FROM average WHERE at < {begin}"  # a quarter that is over meanwhile has one, too
        wait_for(lambda: stored(tmp_path, averages) == [str(an_hour_ago)])
        wait_for(lambda: stored(tmp_path, "SELECT strip FROM status") != [first])
    [strip] = stored(tmp_path, "SELECT strip FROM status")
    assert strip == "h" * (len(stored(tmp_path, "SELECT at FROM sample")) - 1)
    assert len(strip) > len(first)
    gate = stored(tmp_path, "SELECT text FROM event WHERE kind = 'gate' ORDER BY id")
    assert [text.split(" after")[0] for text in gate] == ["closed (the service starts)", "closed -> open"] * 2
