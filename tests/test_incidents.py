"""Incidents: when the gate was closed and why, how long it was open, and what of that outlives a service."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from console import Clock, console, local_console
from postgres import refusing
from service import store_in

import healthchecker
from healthchecker import (
    STRIP,
    Counters,
    Gates,
    HealthAggregator,
    Incident,
    IncidentLog,
    Lease,
    Override,
    Recorder,
    RequestCounters,
    Retention,
    Setting,
    WatchedTime,
    gate_strip,
    incidents,
    prune_incidents,
    record_event,
    sqlalchemy,
    uptime,
)

DAY = 86_400.0
GATES = Gates.model_validate({"groups": [{"name": "g", "members": ["a"]}, {"name": "lone", "members": ["c"]}],
                              "routes": {"/r": ["lone"], "/free": []}})  # fmt: skip


@pytest.fixture
def tmp_path(database_folder: Path) -> Path:
    """Every test here runs on both kinds of database."""
    return database_folder


class Bench:
    """A service's gate and its log of incidents, with both clocks in hand."""

    def __init__(self, folder: Path, mode: str = "enforce") -> None:
        self.store = store_in(folder)
        self.mono, self.wall = Clock(1000.0), Clock()
        self.counters = Counters(1, ["/r", "/free"])
        self.requests = RequestCounters(self.counters, 0)
        self.mode = mode
        self.begin()

    def begin(self) -> None:
        """A service starts; what was before it ended without a word."""
        self.aggregator = HealthAggregator(Lease(GATES.members({}), observes=self.mode == "observe"), clock=self.mono)
        self.aggregator.arrange(GATES, {})
        for name in ("a", "b", "c"):
            self.aggregator.register(name)
        self.aggregator.start()
        self.log = IncidentLog(self.aggregator, self.counters.refusals, self.mono, self.wall)

    def report(self, **healthy: bool) -> None:
        for name, good in healthy.items():
            self.aggregator.set_resource(name, good, f"{name} is bad", ttl=1e6)
        self.look()

    def look(self, seconds: float = 0.0) -> None:
        """The recorder's turn, a while later."""
        while seconds > 0:
            step = min(seconds, 30.0)
            self.mono.now, self.wall.now, seconds = self.mono.now + step, self.wall.now + step, seconds - step
            self._look()
        self._look()

    def _look(self) -> None:
        waiting = self.aggregator.transitions
        transitions = [waiting.get() for _ in range(waiting.qsize())]
        self.log.look([(self.wall.now, *rest) for _, *rest in transitions])  # type: ignore[misc]  # so many of them
        with self.store.writing() as session:
            self.log.write(session)
        self.log.written()

    def found(self, group: str | None = "", **asked: Any) -> list[Incident]:
        with self.store.reading() as session:
            return incidents(session, group=group, **asked)

    def uptime(self, group: str = "") -> dict[str, float | None]:
        with self.store.reading() as session:
            return uptime(session, group, self.wall.now)

    def strip(self, span: str) -> str:
        with self.store.reading() as session:
            return gate_strip(session, "", span, self.wall.now)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


@pytest.mark.long
def test_a_start_that_opens_is_no_incident(bench: Bench) -> None:
    bench.look(20)
    bench.report(a=True, b=True, c=True)
    bench.look(100)
    assert bench.found(None) == []
    assert bench.uptime() == dict.fromkeys(healthchecker.UPTIMES, 100.0)


def test_what_could_not_be_written_takes_nobody_elses_place(bench: Bench) -> None:
    """Its number is another one's by then."""
    bench.report(a=True, b=True, c=True)
    with refusing(bench.store.database, "INSERT ON incident"), pytest.raises(sqlalchemy.exc.DatabaseError):
        bench.report(b=False)       # closes the site alone
    for good in (False, True):      # the group's begins and ends meanwhile
        bench.aggregator.set_resource("c", good, "c is bad", ttl=1e6)
    bench.look(10)
    found = sorted((one.group, one.end) for one in bench.found(None))
    assert found == [("", ""), ("/r", ""), ("lone", "opened")], "the route is closed as the site is"


def test_a_start_that_stays_closed_is_one(bench: Bench) -> None:
    """From its begin on: that is when requests were refused first."""
    begun = bench.wall.now
    bench.look(10)
    bench.report(a=True, b=False, c=True)
    [incident] = bench.found()
    assert (incident.from_at, incident.to_at, incident.end, incident.why) == (begun, begun + 10, "", "b: b is bad")
    assert bench.uptime()["day"] == 0.0


def test_a_start_without_results(bench: Bench) -> None:
    """It may take a minute; then it is an outage like others."""
    begun = bench.wall.now
    bench.look(59)
    assert bench.found(None) == []
    bench.look(30)
    [incident] = bench.found()
    assert incident.from_at == begun and "no result of" in incident.why


def test_from_to_why_and_by_whom(bench: Bench) -> None:
    bench.report(a=True, b=True, c=True)
    bench.look(100)
    with bench.store.writing() as session:
        override = Override(action="close", at=0.0, seconds=None, reason="move", actor="olga")
        session.merge(Setting(name="override", text=override.model_dump_json()))
        record_event(session, "change", "changed: limits", resource="b", actor="adam", at=bench.wall.now - 30)
        record_event(session, "maintenance", "tag db: maintenance is over", at=bench.wall.now - 20)
        record_event(session, "change", "long ago", actor="adam", at=bench.wall.now - 3600)
    begun = bench.wall.now
    bench.aggregator.overrule(override, 1e9)
    bench.look(40)
    bench.aggregator.overrule(None, 0.0)
    bench.look()
    [incident] = bench.found()
    assert (incident.from_at, incident.to_at, incident.end) == (begun + 30, begun + 40, "opened")
    assert (incident.actor, incident.why) == ("olga", "closed by olga: move")
    assert incident.before == "tag db: maintenance is over; adam: b changed: limits"


def test_who_acted_is_read_once_for_all_that_opens(bench: Bench) -> None:
    """However many groups open together, and however much was done meanwhile: no other write waits for it."""
    bench.report(a=True, b=True, c=True)
    bench.look(100)
    bench.report(a=False, c=False)
    with bench.store.writing() as session:
        for number, (name, group) in enumerate([("a", ""), ("b", ""), ("", "lone"), ("", "")] * 50):
            record_event(session, "maintenance", "begun", resource=name, group=group, at=bench.wall.now + number / 10,
                         actor=f"{name or group or 'all'} {number % 2}")  # fmt: skip
        record_event(session, "change", "before", resource="a", actor="adam", at=bench.wall.now - 1)
    bench.look(60)
    reads, asked = list[str](), list[str]()
    real = bench.aggregator._tree.counting_on

    def note(*call: Any) -> None:
        reads.extend([call[2]] if "event.actor" in call[2] and "BETWEEN" in call[2] else [])

    def counting_on(name: str, now: float) -> frozenset[str]:
        asked.append(name)
        return real(name, now)

    bench.aggregator._tree.counting_on = counting_on  # type: ignore[method-assign]  # which goes on as it was
    sqlalchemy.event.listen(bench.store.engine, "before_cursor_execute", note)
    bench.report(a=True, c=True)
    sqlalchemy.event.remove(bench.store.engine, "before_cursor_execute", note)
    assert {one.group: one.actor for one in bench.found(None)} == {
        "": "a 0, b 1, all 1", "/r": "a 0, b 1, lone 0, all 1", "lone": "lone 0, all 1", "g": "a 0, all 1"}  # fmt: skip
    assert len(reads) == 1 and sorted(filter(None, asked)) == ["a", "b", "lone"]


def test_what_maintenance_opens_is_no_recovery(bench: Bench) -> None:
    """It is said what has opened it, of each that counts on what is in maintenance; who acted is who did something
    about that while it lasted."""
    bench.report(a=True, b=True, c=True)
    bench.report(a=False, c=False)
    bench.look(100)
    with bench.store.writing() as session:
        for kind, text, about, actor in (
            ("acknowledgement", "seen: I look", {"resource": "a"}, "olga"),
            ("acknowledgement", "seen: I look, too", {"resource": "c"}, "carla"),
            ("acknowledgement", "recovered", {"resource": "a"}, ""), ("change", "user x added", {}, "root"),
            ("maintenance", "tag db: in maintenance until tomorrow: disks", {}, "adam"),
            ("change", "gate left to the resources again", {}, "eve"), ("attempt", "failed login", {}, "mallory"),
        ):  # fmt: skip
            record_event(session, kind, text, actor=actor, at=bench.wall.now, **about)
    bench.aggregator.deregister("a", "opened by maintenance (adam): disks")
    bench.look()
    opened = {one.group: (one.end, one.opened_by, one.actor) for one in bench.found(None)}
    assert opened.pop("") == ("opened", "opened by maintenance (adam): disks", "olga, adam, eve")
    assert opened == {"g": ("opened", "opened by maintenance (adam): disks", "olga, adam, eve"),
                      "lone": ("", "", ""), "/r": ("", "", "")}  # fmt: skip
    bench.report(c=True)
    assert {one.opened_by for group in ("lone", "/r") for one in bench.found(group)} == {""}, "that has recovered"
    bench.aggregator.deregister("b", "opened by maintenance (adam): disks")     # which was well
    bench.aggregator.register("a")
    bench.report(a=False)
    bench.report(a=True)
    assert bench.found()[0].opened_by == ""


def test_another_machine_goes_on(bench: Bench, tmp_path: Path) -> None:
    """With who, why and what was before; the requests are those of whoever has written, each of them once."""
    other, override = Bench(tmp_path), Override(action="close", at=0.0, seconds=None, reason="move", actor="olga")

    def turn(speaker: Bench, refused: int) -> int:
        """The other one has seen as many requests, which count once it writes."""
        for one in (bench, other):
            one.requests.passed("", refused=True)
            one.log.begin_anew()        # as after an outage
            one.log.speak(speaks=one is speaker)
            one.look(10)
        [incident] = speaker.found()
        assert (incident.actor, incident.why, incident.end) == ("olga", "closed by olga: move", "")
        assert incident.before == "adam: b changed: limits" and incident.refused == refused
        return int(incident.id)

    with contextlib.closing(other.store):
        for one in (bench, other):
            one.log.speak(speaks=one is bench)
            one.report(a=True, b=True, c=True)
        with bench.store.writing() as session:
            session.merge(Setting(name="override", text=override.model_dump_json()))
            record_event(session, "change", "changed: limits", resource="b", actor="adam", at=bench.wall.now)
        bench.aggregator.overrule(override, 1e9)
        other.aggregator.overrule(override.model_copy(update={"reason": "seen later"}), 1e9)
        bench.look()
        other.look()
        with bench.store.writing() as session:
            session.merge(Setting(name="override", text=""))
        turns = [turn(bench, 1), turn(bench, 2), turn(other, 5), turn(other, 6), turn(bench, 9), turn(other, 11)]
        assert len({*turns}) == 1


def test_groups_and_routes_have_their_own(bench: Bench) -> None:
    """What closes a route alone leaves the site open; a group of the site closes both."""
    bench.report(a=True, b=True, c=True)
    bench.report(c=False)
    assert sorted(one.group for one in bench.found(None)) == ["/r", "lone"] and not bench.found()
    bench.requests.passed("/r", refused=True)
    bench.look(10)
    assert [one.refused for group in ("/r", "lone") for one in bench.found(group)] == [1, 1]
    bench.report(a=False)
    for route in ("", "", "/r"):
        bench.requests.passed(route, refused=True)
    bench.look(10)
    refused = {one.group: one.refused for one in bench.found(None)}
    assert refused == {"": 3, "g": 3, "/r": 2, "lone": 2}
    bench.report(a=True, c=True)
    assert {one.end for one in bench.found(None)} == {"opened"} and not bench.found("/free")


def test_observe_is_marked(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "observe")
    with contextlib.closing(bench.store):
        bench.report(a=True, b=False, c=True)
        bench.requests.passed("")
        bench.look(1)
        [incident] = bench.found()
        assert (incident.mode, incident.refused, incident.would_refuse) == ("observe", 0, 1)


def test_a_service_that_was_away(bench: Bench) -> None:
    """Its incident has the end at which it was seen last, and the time without a service counts for nothing."""
    bench.report(a=True, b=True, c=True)
    bench.look(900)
    bench.report(b=False)
    bench.look(100)
    seen = bench.wall.now
    bench.mono.now, bench.wall.now = 50.0, seen + 7200
    bench.begin()
    bench.report(a=True, b=True, c=True)
    bench.look(1000)
    [incident] = bench.found()
    assert (incident.to_at, incident.end) == (seen, "unseen")
    assert bench.uptime()["day"] == pytest.approx(95.0)


def test_no_worker_answers(bench: Bench, tmp_path: Path) -> None:
    """Clients had no answer although the gate was open, for the seconds before that is known, too; not where another
    machine lives, which answers them. What closes the gate meanwhile is the same incident."""
    bench.report(a=True, b=True, c=True)
    bench.look(1000)
    bench.log.changed_at[""] = bench.wall.now - 1000
    bench.log.unserved = lambda: "no worker is ready"
    bench.log.look((), alone=False)
    assert not bench.found()
    bench.look(10)
    bench.report(b=False)
    bench.look(10)
    bench.report(b=True)
    bench.look(10)
    [one] = bench.found()
    assert (one.end, one.why) == ("", "no worker is ready")
    assert one.from_at == bench.wall.now - 20 - healthchecker.UNSERVED_TIME
    with bench.store.writing() as session:
        bench.log.tell(session, lambda _: bench.wall.now - 1030, "standing")
        told = healthchecker.ServiceView.model_validate_json(session.get(Setting, "standing").text)  # type: ignore[union-attr]
    assert told.state == "closed" and told.gates[0].since and told.gates[0].since.timestamp() == one.from_at
    bench.log.unserved = str
    bench.look(970)
    [one] = bench.found()
    assert (one.end, one.to_at - one.from_at, one.opened_by) == ("opened", 25 + 30, "")
    assert bench.uptime()["day"] == pytest.approx(100 * (1 - 55 / 2000))


def test_where_nobody_answers_nothing_is_observed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "observe")
    with contextlib.closing(bench.store):
        bench.report(a=True, b=True, c=True)
        bench.log.unserved = lambda: "no worker is ready"
        bench.look(10)
        assert [one.mode for one in bench.found()] == ["enforce"]


def test_a_suspended_machine(bench: Bench) -> None:
    """Of the time nothing is known, and what lasted ends with the last look."""
    bench.report(a=True, b=False, c=True)
    bench.look(100)
    seen = bench.wall.now
    bench.mono.now, bench.wall.now = bench.mono.now + 3600, seen + 3600
    bench._look()
    newest, older = bench.found()
    assert (older.to_at, older.end, newest.from_at, newest.end) == (seen, "unseen", seen + 3600, "")
    with bench.store.reading() as session:
        assert len(session.scalars(sqlalchemy.select(WatchedTime)).all()) == 2


@pytest.mark.parametrize("is_hung", [True, False], ids=["hung", "suspended"])
def test_a_process_that_was_hung_knows_that_the_gate_was_closed(bench: Bench, is_hung: bool) -> None:
    """Its workers refused since the lease had ended; of a suspended machine nothing is known."""
    bench.aggregator._wall = bench.wall
    bench.log.awake = lambda: bench.mono.now if is_hung else 0.0
    bench.report(a=True, b=True, c=True)
    bench.look(1000)
    bench.aggregator.set_resource("a", True, ttl=20.0)
    bench.mono.now, bench.wall.now = bench.mono.now + 520, bench.wall.now + 520
    bench.aggregator.set_resource("a", True, ttl=1e6)
    bench.log.look(healthchecker.turned_since(bench.aggregator, bench.log.follow_clock()))
    bench.look()
    seconds = [one.to_at - one.from_at for one in bench.found()]
    assert (seconds, bench.uptime()["day"]) == (
        ([500.0], pytest.approx(100 * (1 - 500 / 1520))) if is_hung else ([0.0], 100.0))


@pytest.mark.parametrize("step", [-7200.0, 7200.0])
def test_a_clock_that_is_set(bench: Bench, step: float) -> None:
    """It makes nothing longer or shorter."""
    bench.report(a=True, b=True, c=True)
    bench.look(300)
    bench.report(b=False)
    bench.look(100)
    bench.log.changed_at[""] = bench.wall.now - 100
    bench.wall.now += step
    bench.report(b=True)
    assert bench.wall.now - bench.log.changed_at[""] == pytest.approx(100)
    [incident] = bench.found()
    assert incident.to_at - incident.from_at == pytest.approx(100) and incident.to_at == bench.wall.now
    assert bench.uptime()["day"] == pytest.approx(75.0)


@pytest.mark.parametrize("step", [-7200.0, 7200.0])
def test_what_turns_as_the_clock_is_set(bench: Bench, step: float) -> None:
    """It is told by the new one, for as long as it has lasted; and has not lasted for longer because of it."""
    aggregator = HealthAggregator(clock=bench.mono, wall=bench.wall)
    aggregator.register("a")
    aggregator.start()
    recorder = Recorder(bench.store, aggregator, None, IncidentLog(aggregator, dict, bench.mono, bench.wall))
    begun = bench.wall.now
    aggregator.set_resource("a", True, "", ttl=1e6)
    recorder.flush()
    bench.mono.now, bench.wall.now = bench.mono.now + 100, bench.wall.now + 100 + step
    aggregator.set_resource("a", False, "a is bad", ttl=1e6)
    recorder.flush()
    assert recorder.changed_at("") == bench.wall.now == begun + 100 + step
    with bench.store.reading() as session:
        assert any(one.text.endswith(" after 100 s") for one in healthchecker.events(session, kind="gate"))


def test_what_cannot_be_written_is_kept(bench: Bench) -> None:
    """And written once."""
    bench.report(a=True, b=True, c=True)
    with pytest.raises(ZeroDivisionError), bench.store.writing() as session:
        bench.aggregator.set_resource("b", False, "b is bad")
        transitions = [bench.aggregator.transitions.get()]
        bench.log.look([(bench.wall.now, *rest) for _, *rest in transitions])  # type: ignore[misc]
        bench.log.write(session)
        raise ZeroDivisionError
    bench.report(b=True)
    assert [one.end for one in bench.found()] == ["opened"]


@pytest.mark.long
def test_the_strip_of_a_day(bench: Bench) -> None:
    """A part is 24 minutes: open, closed for a while, closed, and before all that not known."""
    bench.report(a=True, b=True, c=True)
    bench.look(1440)
    bench.report(b=False)
    bench.look(600)
    bench.report(b=True)
    bench.look(840)
    bench.report(b=False)
    bench.look(1440)
    assert len(bench.strip("day")) == STRIP and bench.strip("day").endswith(" hdl")


@pytest.mark.long
def test_pruning(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """90 days stay whatever the retention is, and of a group that flaps no more than EVENTS; nobody else's go, nor what
    looks like a future of hours while a clock is wrong."""
    most = 500  # 100,000 in one statement are not to be had in its time on a busy machine
    monkeypatch.setattr(healthchecker, "EVENTS", most)
    now, row = bench.wall.now, dict.fromkeys(("end", "why", "actor", "opened_by", "before", "mode"), "x")

    def times(group: str, at: float) -> dict[str, Any]:
        return {"group": group, "from_at": at, "to_at": at + 1, "refused": 0, "would_refuse": 0, **row}

    with bench.store.writing() as session:
        session.execute(sqlalchemy.insert(Incident), [
            *(times("", now - days * DAY) for days in (91, 89, -0.1, -2)),
            *(times("g", now - 60 * DAY + number) for number in range(most + 5))])  # fmt: skip
        prune_incidents(session, Retention(events=1), now)
    assert [one.from_at for one in bench.found()] == [now + 0.1 * DAY, now - 89 * DAY]
    found = bench.found("g", limit=most + 5)
    assert (len(found), found[-1].from_at) == (most, now - 60 * DAY + 5)


ROW = {"why": "db: limit", "actor": "", "opened_by": "", "before": "", "mode": "enforce", "would_refuse": 0}


def test_the_page(tmp_path: Path) -> None:
    """From, to, why, who acted, what was changed before, and refusals; all of it escaped, and as CSV no formula."""
    # What is of a future goes at the recorder's next turn, so this is of today.
    with local_console(tmp_path, clock=Clock(float(int(time.time())))) as local:
        now = local.clock.now
        with local.store.writing() as session:
            session.add(WatchedTime(from_at=now - 1000, to_at=now))
            session.add(Incident(group="", from_at=now - 500, to_at=now - 400, end="opened", refused=42,
                                 **ROW | {"why": "=1+1 <b>", "actor": "olga", "opened_by": "opened by adam",
                                          "before": "adam: limits <i>", "would_refuse": 7}))
            session.add(Incident(group="", from_at=now - 90 * DAY - 9, to_at=now - 40 * DAY, end="unseen", refused=0,
                                 **ROW | {"mode": "observe"}))
            session.add(Incident(group="", from_at=now - 80 * DAY, to_at=now - 79 * DAY, end="opened", refused=8,
                                 **ROW | {"mode": "observe"}))      # a group's, whose route refused
        local.log_in()
        token, local.token = local.token, ""
        page = local.open_session().ask("GET", "/-/incidents?span=day").body
        for part in ("=1+1 &lt;b&gt;", ">olga<", "opened by adam", "adam: limits &lt;i&gt;", "90.000 %", ">42", "1 min",
                     "7 would have been", "1 in the last day", "Last day: 59 unknown, 1 degraded"):  # fmt: skip
            assert part in page, part
        assert "observe: nothing" not in page and 'href="/-/incidents" aria-current="page"' in page
        old = local.ask("GET", "/-/incidents?span=90+days").body
        assert old.count("observe: nothing was refused<") == 1 and "seen last" in old and "3 in the last 90 days" in old
        links = re.findall(r'href="(/-/api/[^"]+)"', page)
        assert len(links) == 4
        for link in links:
            reply = local.ask("GET", html.unescape(link))
            is_csv = "format=csv" in link
            assert reply.status == 200 and reply.headers["content-type"].startswith("text/csv" if is_csv else "app")
            assert ("attachment" in reply.headers.get("content-disposition", "")) is is_csv
        text = local.ask("GET", html.unescape(next(link for link in links if "incidents?format" in link))).body
        [row] = csv.DictReader(io.StringIO(text))
        assert (row["why"], row["actor"], row["refused"]) == ("'=1+1 <b>", "olga", "42")
        assert local.ask("GET", "/-/incidents?group=none&span=none").status == 200
        local.cookie, local.token = "", token
        assert local.api("GET", "uptime?group=none").status == 404
        spans = {row["span"]: row for row in local.api("GET", "uptime").json}
        assert [(spans[name]["incidents"], spans[name]["refused"]) for name in ("day", "90 days")] == [(1, 42), (3, 50)]


def test_a_page_of_a_gate_that_flaps(tmp_path: Path) -> None:
    """It says that there are more than it shows, of which none is left out of what is downloaded."""
    with local_console(tmp_path, "  []\n") as local:
        now = local.clock.now
        with local.store.writing() as session:
            session.add(WatchedTime(from_at=now - 1000, to_at=now))
            session.add_all(Incident(group="", from_at=now - 300 + each, to_at=now - 299.999 + each, end="opened",
                                     refused=0, **ROW) for each in range(120))
        local.log_in()
        page = local.ask("GET", "/-/incidents?span=day").body
        assert "120 in the last day" in page and "The last 100, newest first" in page
        assert "99.988 %" in page, "99.9880"
        [link] = re.findall(r'href="(/-/api/incidents[^"]+)"[^>]*>JSON', page)
        assert len(local.ask("GET", html.unescape(link)).json) == 120
        with local.store.writing() as session:
            session.execute(sqlalchemy.delete(Incident).where(Incident.from_at > now - 300))
        assert "99.999 %" in local.ask("GET", "/-/incidents?span=day").body, "and not 100"


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", " =1", "\t=1", "\r\n@x", *"\uff1d\uff0b\uff0d\uff20"])
def test_no_cell_is_a_formula(text: str) -> None:
    shown = healthchecker.csv_text([{"a": text, "b": -1.5}], ["a", "b"])
    [row] = csv.DictReader(io.StringIO(shown, newline=""))
    assert row == {"a": f"'{text}", "b": "-1.5"}
    shown = healthchecker.csv_text([{"a": f"limit;{text}; x-1=2", "b": 1}], ["a", "b"])   # as Excel reads it in Berlin
    assert f"limit;'{text}; x-1=2" in shown


SICK = "  - {name: sick, platform: tcp, hostname: 127.0.0.1, port: 9, interval: 1, retry_interval: 1, fall: 1}"


def test_served(tmp_path: Path) -> None:
    """From a real gate to JSON, CSV and the page; formulas stay text."""
    with console(tmp_path, SICK) as (service, client):
        service.wait_status("/-/readyz", 503)
        for _ in range(3):
            assert service.get("/").status == 503
        wait_for(lambda: [one["refused"] for one in client.api("GET", "incidents?group=").json] == [3])
        [incident] = client.api("GET", "incidents?since=2020-01-01T00:00:00Z&limit=5").json
        assert incident["end"] == "" and "sick: " in incident["why"] and incident["mode"] == "enforce"
        assert client.api("GET", "incidents?since=2999-01-01T00:00:00Z").json == []
        assert client.api("GET", "incidents?limit=0").status == 422
        for path, accepted in (("incidents?format=csv", "*/*"), ("incidents", "text/csv")):
            reply = client.ask("GET", f"/-/api/{path}", headers={"Accept": accepted})
            [row] = csv.DictReader(io.StringIO(reply.body))
            assert reply.headers["content-type"].startswith("text/csv") and row["refused"] == "3"
        assert {row["span"]: row["percent"] for row in client.api("GET", "uptime").json}["90 days"] == 0.0
        page = client.open_session().ask("GET", "/-/incidents?span=day").body
        assert "sick: " in page and ">lasts<" in page
    text = healthchecker.csv_text([{"a": "=1+1", "b": 'say "x"'}], ["a", "b"])
    assert text == 'a,b\r\n\'=1+1,"say ""x"""\r\n'


def test_maintenance_opens(tmp_path: Path) -> None:
    """Of a real service: who began it, in the event and in the incident."""
    with console(tmp_path, SICK) as (service, client):
        service.wait_status("/-/readyz", 503)
        wait_for(lambda: client.api("GET", "incidents?group=").json)
        assert client.api("POST", "resources/sick/acknowledgement", {"comment": "on it"}).status == 200
        assert client.api("POST", "maintenance", {"all": True, "for": "1h", "reason": "disks"}).status == 201
        service.wait_status("/-/readyz", 200)
        wait_for(lambda: client.api("GET", "incidents?group=").json[0]["end"] == "opened")
        [incident] = client.api("GET", "incidents?group=").json
        [actor] = {event["actor"] for event in client.api("GET", "events?kind=acknowledgement").json}
        why = f"opened by maintenance ({actor}): disks"
        assert actor and (incident["actor"], incident["opened_by"]) == (actor, why)
        text = client.api("GET", "events?kind=gate").json[0]["text"]
        assert re.fullmatch(re.escape(f"closed -> open ({why})") + r" after \d+ s", text)


# === What is written once ====================================================
def test_what_opens_when_others_may_have_written_is_one_incident(bench: Bench) -> None:
    """And not two, of which one ends where this machine was taken for dead."""
    bench.report(a=True, b=True, c=True)
    bench.look(100)
    bench.report(b=False)
    bench.look(100)
    bench.log.begin_anew()
    bench.report(b=True)
    bench.look(100)
    [one] = bench.found()
    assert (one.end, round(one.to_at - one.from_at)) == ("opened", 100)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_first_write_that_fails_is_made_up_for(bench: Bench, failures: int) -> None:
    """Or what lasted when the last service ended would last for ever."""
    bench.report(a=True, b=True, c=True)
    bench.report(b=False)
    bench.look(50)
    bench.begin()
    with refusing(bench.store.database, "INSERT ON watched_time"):
        for _ in range(failures):
            with pytest.raises(sqlalchemy.exc.DatabaseError):
                bench.report(a=True, b=True, c=True)
    bench.look(100)
    assert [one.end for one in bench.found()] == ["unseen"]


def test_requests_of_a_gap_and_of_two_incidents_at_once_count_once(bench: Bench) -> None:
    bench.report(a=True, b=True, c=True)
    bench.report(b=False)
    for _ in range(100):
        bench.requests.passed("", refused=True)
    for good in (True, False):
        bench.aggregator.set_resource("b", good, "again", ttl=1e6)
    bench.look(1)
    assert sum(one.refused for one in bench.found()) == 100
    for _ in range(500):
        bench.requests.passed("", refused=True)
    bench.mono.now, bench.wall.now = bench.mono.now + 120, bench.wall.now + 120
    bench.look()
    assert sum(one.refused for one in bench.found()) == 600
