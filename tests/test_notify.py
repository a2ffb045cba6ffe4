"""Notify: what is said when, by tables of scenarios with a clock of their own; real receivers on loopback."""

from __future__ import annotations

import contextlib
import email
import email.policy
import hashlib
import itertools
import json
import logging
import re
import socket
import socketserver
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from console import prepared_database, prepared_vault
from postgres import database_in, execute, refusing, settings_of
from service import Program, Service, command, environment, prepared_keys, run, store_in, write_inventory
from sshd import wait_for
from test_poll import House, Machines, good, house, machines, maintain, unreachable, vault
from wsman_server import Certificate, make_certificate

import healthchecker
from healthchecker import (
    DAY,
    RETRY_TIME,
    Announcer,
    ChildProcess,
    ConnectionContext,
    Counters,
    Delivery,
    Event,
    HealthAggregator,
    Heartbeat,
    InventoryError,
    KnownHosts,
    Lasting,
    Lease,
    Maintenance,
    Membership,
    Message,
    Metrics,
    Notice,
    NoticeRow,
    Notifier,
    Picture,
    PostgresServer,
    Receiver,
    Recorder,
    Resolver,
    Resource,
    Scope,
    ServingMetrics,
    Setting,
    Status,
    Store,
    check_receivers,
    deliver,
    events,
    generate_latest,
    import_inventory,
    is_seen_to,
    is_service_well,
    lease_clock,
    load_inventory,
    record_event,
    sqlalchemy,
    take_picture,
)

__all__ = ["house", "machines", "vault"]  # fixtures
NOON = 1_800_000_000.0
NAMES = [f"db{number}" for number in range(50)]


class Alone:
    """What is asked of a Monitor: there is no other machine, nothing is to blame for anything, and all of it counts for
    the site alone."""

    members, aggregator = Membership(), HealthAggregator()

    @staticmethod
    def blames(_name: str) -> str:
        return ""


ALONE = cast("healthchecker.Monitor", Alone)


class Desk:
    """One receiver, and everything else as a test says; time goes by in `until`."""

    def __init__(self, joined: float = NOON - 1, **settings: Any) -> None:
        row = Receiver(id=1, name="ops", url="", settings=json.dumps({"name": "ops"} | settings), joined_at=joined,
                       cursor=0, message="", made_at=0.0, tries=0, next_at=0.0, trouble="", delivered=0, failed=0)
        self.announcer, self.now, self.number = Announcer(row, (), "http://127.0.0.1:8081/-/"), NOON, 0
        self.unhealthy: dict[str, Lasting] = {}
        self.known: set[str] = {"db1", "web1"}
        self.excused: dict[str, int] = {}
        self.groups = {"replicas": 1}
        self.problems: dict[str, str] = {}
        self.acknowledged: dict[str, int] = {}
        self.tags: dict[str, frozenset[str]] = {}
        self.works: dict[str, Lasting] = {}
        self.counts = dict.fromkeys(self.known, frozenset([""]))    # for the site
        self.said: list[tuple[float, str, str]] = []
        self.kinds: list[str] = []      # of what was said
        self.is_reachable = True

    @property
    def picture(self) -> Picture:
        healthy = dict.fromkeys(self.known - self.unhealthy.keys(), self.now)
        return Picture(self.unhealthy, healthy, self.excused, self.groups, self.tags, self.problems, self.acknowledged,
                       self.works, self.counts)

    def happens(self, kind: str, state: str = "", text: str = "it is so", name: str = "", at: float = 0.0) -> None:
        """An event, and what the rows say then."""
        self.number += 1
        is_group = kind in ("gate", "group")
        if kind == "state" and state == "unhealthy":
            self.unhealthy[name] = Lasting(at or self.now, text, self.tags.get(name, frozenset()))
        elif kind == "state":
            self.unhealthy.pop(name, None)
        happened = Event(id=self.number, at=at or self.now, kind=kind, state=state, text=text, actor="", address="",
                         resource="" if is_group else name, group=name if is_group else "")
        self.announcer.take(happened, self.picture, self.now)

    def look(self) -> None:
        """As the notifier does, and the receiver answers at once."""
        self.announcer.settle(self.picture, self.now)
        self.announcer.compose(self.picture, self.now)
        row = self.announcer.row
        if row.message and self.now >= row.next_at:
            title, body, kind, _ = json.loads(row.message)
            if self.is_reachable:
                self.kinds.append(kind)
                self.said.append((self.now - NOON, title, body))
            self.announcer.take_result(Delivery(self.is_reachable, "nobody is there"), self.now)

    def until(self, seconds: float) -> None:
        """Looks every second until so many after noon."""
        while self.now < NOON + seconds:
            self.look()
            self.now += 1
        self.look()

    def change(self, what: str, given: dict[str, Any]) -> None:
        """An event, or what the rows say from now on."""
        if what == "event":
            self.happens(**given)
        elif what == "gone":
            self.known -= given.keys()
            self.unhealthy = {}
        elif what == "well":
            self.unhealthy = {}
        elif what == "sick":
            self.unhealthy = {name: Lasting(since, "limit: disk") for name, since in given.items()}
        elif what in ("other", "untold", "unsure"):
            self.unhealthy = {name: one._replace(blame=what) for name, one in self.unhealthy.items()}
        elif what == "minor":
            self.unhealthy = {name: one._replace(closes=frozenset()) for name, one in self.unhealthy.items()}
        elif what == "tags":
            self.tags = {name: frozenset([tag]) for name, tag in given.items()}
        else:
            setattr(self, what, given)

    @property
    def titles(self) -> list[tuple[float, str]]:
        return [(at, title.removeprefix("HealthChecker: ")) for at, title, _ in self.said]


# Each is a row of (seconds after noon, what happens then, its arguments), and what is said when.
Step = tuple[float, str, dict[str, Any]]
CLOSED: dict[str, Any] = {"kind": "gate", "state": "closed", "text": "open -> closed (db1: limit)"}
OPEN: dict[str, Any] = {"kind": "gate", "state": "open", "text": "closed -> open"}
START: dict[str, Any] = {"kind": "gate", "state": "closed", "text": "closed (the service starts)"}
SICK: dict[str, Any] = {"kind": "state", "state": "unhealthy", "name": "db1", "text": "limit: disk"}
WELL: dict[str, Any] = {"kind": "state", "state": "healthy", "name": "db1", "text": "healthy"}
SCENARIOS: dict[str, tuple[dict[str, Any], list[Step], list[tuple[float, str]]]] = {
    "closed and open again": (
        {}, [(0, "event", CLOSED), (100, "event", OPEN)],
        [(20, "the gate is closed"), (100, "the gate is open again")]),
    "no wait": ({"wait": 0}, [(5, "event", CLOSED)], [(5, "the gate is closed")]),
    "too short for the wait is told, too": (
        {}, [(0, "event", CLOSED), (10, "event", OPEN)], [(20, "the gate was closed")]),
    "too short for the minutes is not": ({"after": 1}, [(0, "event", CLOSED), (59, "event", OPEN)], []),
    "an escalation": (
        {"after": 1}, [(0, "event", CLOSED), (300, "event", OPEN)],
        [(80, "the gate is closed"), (300, "the gate is open again")]),
    "recovery of what was told to nobody": ({}, [(0, "event", OPEN)], []),
    "a start that opens": ({}, [(0, "event", START), (3, "event", OPEN)], []),
    "a start that does not": ({}, [(0, "event", START)], [(20, "the gate is closed")]),
    "closed over a restart": (
        {}, [(0, "event", CLOSED), (100, "event", START), (102, "event", OPEN)],
        [(20, "the gate is closed"), (102, "the gate is open again")]),
    "reminders": (
        {"remind": 0.1}, [(0, "event", CLOSED), (800, "event", OPEN)],
        [(20, "the gate is closed"), (380, "the gate is still closed"), (740, "the gate is still closed"),
         (800, "the gate is open again")]),
    "no reminder of what is seen to": (
        {"on": ["state"], "remind": 0.1}, [(0, "event", SICK), (60, "acknowledged", {"db1": 1})],
        [(20, "db1 is unhealthy")]),
    "a group": (
        {"on": ["group"]}, [(0, "event", {**CLOSED, "kind": "group", "name": "replicas"}), (60, "groups", {})],
        [(20, "replicas is closed"), (60, "replicas is removed")]),
    "not of the gate": ({"on": ["state"]}, [(0, "event", CLOSED)], []),
    "a resource": (
        {"on": ["state"]}, [(0, "event", SICK), (60, "event", WELL)],
        [(20, "db1 is unhealthy"), (60, "db1 is healthy again")]),
    "a resource that goes": (
        {"on": ["state"]}, [(0, "event", SICK), (60, "gone", {"db1": 1})],
        [(20, "db1 is unhealthy"), (60, "db1 is removed")]),
    "maintenance of what was told, and still bad after it": (
        {"on": ["state"]}, [(0, "event", SICK), (60, "excused", {"db1": 1}), (200, "excused", {})],
        [(20, "db1 is unhealthy"), (60, "db1 is in maintenance now"), (220, "db1 is unhealthy")]),
    "bad in maintenance alone": (
        {"on": ["state"]}, [(0, "excused", {"db1": 1}), (1, "event", SICK), (50, "event", WELL), (60, "excused", {})],
        []),
    "what another is to blame for": (
        {"on": ["state"]}, [(0, "event", SICK), (5, "other", {"db1": 1})], []),
    "a recovery that its row does not say yet": (
        {"on": ["state"]}, [(0, "event", SICK), (5, "unsure", {"db1": 1}), (6, "event", WELL)],
        [(20, "db1 was unhealthy")]),
    "what is not told anew yet, as after a start": (
        {"on": ["state"], "after": 1}, [(0, "event", SICK), (40, "unsure", {"db1": 1}), (41, "sick", {"db1": NOON})],
        [(80, "db1 is unhealthy")]),
    "what was well again before a start": (
        {"on": ["state"]}, [(0, "event", SICK), (4, "unsure", {"db1": 1}), (60, "event", WELL)],
        [(60, "db1 was unhealthy")]),
    "the recovery whose event is missing": (
        {"on": ["state"]}, [(0, "event", SICK), (60, "well", {"db1": 1})],
        [(20, "db1 is unhealthy"), (60, "db1 is healthy again")]),
    "other tags": (
        {"on": ["state"], "tags": ["web"]}, [(0, "tags", {"db1": "database"}), (0, "event", SICK)], []),
    "its tags": (
        {"on": ["state"], "tags": ["database"]}, [(0, "tags", {"db1": "database"}), (0, "event", SICK)],
        [(20, "db1 is unhealthy")]),
    "the gate, while nothing with its tags is sick": (
        {"tags": ["web"]}, [(0, "tags", {"db1": "database"}), (0, "event", SICK), (0, "event", CLOSED),
                            (50, "event", OPEN)], []),
    "the gate, with its tags": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (0, "event", SICK), (1, "event", CLOSED),
                                 (50, "event", OPEN)],
        [(21, "the gate is closed, 1 unhealthy"), (50, "the gate is open again")]),
    "the gate, with its tags, over before it is told": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (0, "event", SICK), (1, "event", CLOSED),
                                 (9, "event", WELL), (10, "event", OPEN)], [(21, "the gate was closed")]),
    "the gate, with its tags, over before anybody looks": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (1, "event", SICK), (1, "event", CLOSED),
                                 (1, "event", WELL), (1, "event", OPEN)], [(21, "the gate was closed")]),
    "the gate, with its tags, over before anybody looks, told of before what closed it": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (1, "event", CLOSED), (1, "event", OPEN),
                                 (1, "event", SICK), (1, "event", WELL)], [(21, "the gate was closed")]),
    "the gate, with its tags, told of after what closed it was over": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (1, "event", SICK), (5, "event", WELL),
                                 (9, "event", {**CLOSED, "at": NOON + 1}), (9, "event", {**OPEN, "at": NOON + 5})],
        [(21, "the gate was closed")]),
    "the gate, long after what has its tags was over": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (1, "event", SICK), (5, "event", WELL),
                                 (9, "event", CLOSED), (50, "event", OPEN)], []),
    "what is behind another as long as nobody knows": (
        {"on": ["state"]}, [(0, "event", SICK), (4, "untold", {"db1": 1}), (60, "event", WELL)],
        [(20, "db1 is unhealthy"), (60, "db1 is healthy again")]),
    "the gate, over before anybody looks, and what has its tags does not count": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (0, "counts", {}), (1, "event", CLOSED),
                                 (1, "event", OPEN), (1, "event", SICK), (1, "event", WELL)], []),
    "the gate, with other tags, over before it is told": (
        {"tags": ["web"]}, [(0, "tags", {"db1": "database"}), (0, "event", SICK), (1, "event", CLOSED),
                            (9, "event", WELL), (10, "event", OPEN)], []),
    "a start, with its tags": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (0, "event", SICK), (1, "event", START),
                                 (9, "event", WELL), (10, "event", OPEN)], []),
    "the gate, while what has its tags is in maintenance": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (0, "excused", {"db1": 1}), (0, "event", SICK),
                                 (1, "event", CLOSED), (50, "event", OPEN)], []),
    "the gate, while what has its tags closes nothing": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (0, "counts", {}), (0, "event", SICK),
                                 (0, "minor", {}), (1, "event", CLOSED), (50, "event", OPEN)], []),
    "the gate, while what has its tags has been unhealthy for long": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (0, "event", SICK), (0, "minor", {}),
                                 (100, "event", CLOSED), (150, "event", OPEN)], []),
    "the gate, while what has its tags is behind something": (
        {"tags": ["database"]}, [(0, "tags", {"db1": "database"}), (0, "event", SICK), (0, "other", {}),
                                 (1, "event", CLOSED), (50, "event", OPEN)],
        [(21, "the gate is closed"), (50, "the gate is open again")]),
    "a problem": (
        {"on": ["problem"], "wait": 0}, [(3, "problems", {"database": "disk full"}), (60, "problems", {})],
        [(3, "HealthChecker's database is in trouble"), (60, "HealthChecker's database is well again")]),
    "its own trouble": ({"on": ["problem"], "wait": 0}, [(3, "problems", {"receiver ops": "no answer"})], []),
    "a clock that was set": (
        {"on": ["problem"], "wait": 0}, [(3, "event", {"kind": "clock", "text": "the clock was set back by 9 s"})],
        [(3, "HealthChecker's clock was in trouble")]),
    "maintenance": (
        {"on": ["maintenance"], "wait": 0},
        [(0, "works", {"db1": Lasting(NOON, "disks")}), (9, "works", {})],
        [(0, "db1 is in maintenance"), (9, "db1 is no longer in maintenance")]),
    "maintenance of two tags that overlaps": (
        {"on": ["maintenance"], "wait": 0},
        [(0, "works", {"tag db": Lasting(NOON, "disks")}),
         (9, "works", {"tag db": Lasting(NOON, "disks"), "tag web": Lasting(NOON + 9, "cables")}),
         (20, "works", {"tag web": Lasting(NOON + 9, "cables")}), (30, "works", {})],
        [(0, "tag db is in maintenance"), (9, "tag web is in maintenance"), (20, "tag db is no longer in maintenance"),
         (30, "tag web is no longer in maintenance")]),
    "maintenance of others": (
        {"on": ["maintenance"], "wait": 0, "tags": ["web"]},
        [(0, "works", {"db1": Lasting(NOON, "disks", frozenset(["database"]))}),
         (9, "works", {"everything": Lasting(NOON, "cables", frozenset(["database", "web"]))})],
        [(9, "everything is in maintenance")]),
    "maintenance that runs already when somebody joins": (
        {"on": ["maintenance"], "wait": 0}, [(0, "works", {"db1": Lasting(NOON - 9, "disks")}), (9, "works", {})], []),
    "no reminder of the gate while all that closes it is seen to": (
        {"remind": 0.1},
        [(0, "sick", {"db1": NOON, "web1": NOON}), (0, "event", CLOSED), (60, "acknowledged", {"db1": 1}),
         (400, "acknowledged", {"db1": 1, "web1": 1}), (900, "acknowledged", {"web1": 1})],
        [(20, "the gate is closed, 2 unhealthy"), (380, "the gate is still closed, 2 unhealthy"),
         (900, "the gate is still closed, 2 unhealthy")]),
    "a reminder of the gate that nothing keeps closed": (
        {"remind": 0.1}, [(0, "event", CLOSED), (5, "acknowledged", {"db1": 1}), (400, "event", OPEN)],
        [(20, "the gate is closed"), (380, "the gate is still closed"), (400, "the gate is open again")]),
    "still bad after maintenance, the clock set back by a day before it": (
        {"on": ["state"], "joined": NOON + 86_400},
        [(0, "excused", {"db1": 1}), (1, "event", SICK), (60, "excused", {})], [(80, "db1 is unhealthy")]),
    "what is bad already when somebody joins": (
        {"on": ["state"]}, [(0, "sick", {"db1": NOON - 60}), (60, "event", WELL)], []),
    "a clock that was set back by an hour": (
        {}, [(0, "event", {**CLOSED, "at": NOON + 3600}), (100, "event", OPEN)],
        [(20, "the gate is closed"), (100, "the gate is open again")]),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_said_when(name: str) -> None:
    settings, steps, expected = SCENARIOS[name]
    desk = Desk(**settings)
    for at, what, given in steps:
        if NOON + at > desk.now:        # what is of the same moment is seen by the same look
            desk.until(at - 1)
            desk.now = NOON + at
        desk.change(what, given)
    desk.until(1000)
    assert desk.titles == expected


@pytest.mark.parametrize(("name", "text"), [("db1", "maintenance is over"), ("", "tag db: maintenance is over")])
def test_maintenance_that_ended_while_no_service_ran(name: str, text: str) -> None:
    """Its end is when it ended, not when that was found."""
    desk, work = Desk(on=["maintenance"], wait=0), name or "tag db"
    desk.works = {work: Lasting(NOON, "disks")}
    desk.look()
    desk.now += 7 * DAY
    desk.happens("maintenance", "begun", f"tag dbx: {text}", at=NOON + 3600)    # of something else
    assert not desk.announcer.notices["maintenance", work].over_at
    desk.works = {}
    desk.happens("maintenance", "over", text, name, at=NOON + 7200)
    desk.look()
    _, title, body = desk.said[-1]
    assert title == f"HealthChecker: {work} is no longer in maintenance"
    assert f"{healthchecker.written(NOON + 7200)}, after 2 h" in body


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_what_lasts_while_the_clock_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """It has lasted for as long as it has: nobody is told too soon, or never."""
    with contextlib.closing(store_in(tmp_path)) as store:
        with store.writing() as session:
            session.add(Receiver(name="ops", url="x", joined_at=0.0, cursor=0,
                                 settings=json.dumps({"name": "ops", "after": 30})))
            healthchecker.record_event(session, "gate", "open -> closed (db1: limit)", state="closed",
                                       at=store.wall() - 1000)
        wall, set_by = store.wall, [0]
        monkeypatch.setattr(store, "wall", lambda: wall() + set_by[-1])
        notifier = Notifier(store, cast(Any, None), calm(store), "", ALONE)
        notifier.start()
        try:
            [announcer] = wait_for(lambda: [one for one in notifier._announcers.values() if one.notices])
            [notice] = announcer.notices.values()
            moved = pytest.approx(notice.taken_at + seconds, abs=5)
            set_by.append(seconds)
            wait_for(lambda: all(one.taken_at == one.since_at == moved for one in announcer.notices.values()))
        finally:
            notifier.close()
        assert not announcer.row.message


@pytest.mark.parametrize("is_reachable", [True, False])
@pytest.mark.parametrize("back", [120, 3600, 86_400])
def test_nothing_waits_for_what_a_clock_showed_before_it_was_set_back(back: int, is_reachable: bool) -> None:
    """As of a machine that starts an hour ahead, until it asks for the time: neither for when something was told
    last, nor for when a receiver that does not answer would have been tried again."""
    desk = Desk(wait=5)
    desk.is_reachable = is_reachable
    desk.happens(**CLOSED)
    desk.until(30)
    desk.is_reachable = True
    desk.now -= back
    desk.look()
    desk.happens(**OPEN)
    desk.until(40 - back)
    desk.happens(**CLOSED)
    desk.until(60 - back)
    assert desk.titles == [(5 if is_reachable else 30 - back, "the gate is closed"),
                           (35 - back, "the gate is open again"), (45 - back, "the gate is closed")]  # fmt: skip


def test_fifty_machines_are_one_message() -> None:
    """The gate's transition is the message, the resources are its lines: ten of them, and where the console is."""
    desk = Desk(on=["gate", "state"])
    desk.known |= {*NAMES}
    for number, name in enumerate(NAMES):
        desk.now = NOON + number / 4
        desk.happens("state", "unhealthy", f"unreachable: no route to {name}", name)
        if number == 0:
            desk.happens(**CLOSED)
    desk.until(120)
    ((_, title, body),) = desk.said
    assert title == "HealthChecker: the gate is closed, 50 unhealthy, and 50 more"
    lines = body.splitlines()
    assert lines[0].startswith("the gate: open -> closed (db1: limit); since 20")
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d$", lines[0])
    assert lines[1].startswith("db0: unreachable: no route to db0; since ")
    assert [line for line in lines if line.startswith("db")] == lines[1:11]
    assert lines[11] == "and 40 more" and lines[12] == "http://127.0.0.1:8081/-/" and len(lines) == 13


def test_what_a_host_says_mentions_nobody_and_is_no_link() -> None:
    """Services of chats would take its words for their markup; what they show is the same."""
    said = "check: @everyone <!channel> <@U1> <https://x.example.com|here> [log in](https://x.example.com) <at>a</at>"
    desk = Desk(on=["state", "gate"])
    desk.unhealthy = {"db1": Lasting(NOON, said)}
    desk.happens(**CLOSED | {"text": f"open -> closed ({said})"})
    desk.happens("state", "unhealthy", said, "web1")
    desk.until(30)
    ((_, _, body),) = desk.said
    assert not re.search(r"@\w|<[!@/\w]|\]\(", body) and body.replace("\u200b", "").count(said) == 3
    assert body.endswith("\nhttp://127.0.0.1:8081/-/")


@pytest.mark.parametrize(("told", "kind"), [("works", "info"), ("works and gate", "failure"), ("gate", "failure")])
def test_planned_work_is_no_failure(told: str, kind: str) -> None:
    desk = Desk(on=["gate", "maintenance"])
    if "gate" in told:
        desk.happens(**CLOSED)
    if "works" in told:
        desk.change("works", {"db1": Lasting(NOON, "disks")})
    desk.until(30)
    desk.change("works", {})
    desk.until(60)
    assert desk.kinds[0] == kind and set(desk.kinds[1:]) <= {"info"}


@pytest.mark.parametrize("why", ["opened by command line: a try (mine)", Maintenance(actor="me", reason="a try").why,
                                 Maintenance(reason="patches").why])
@pytest.mark.parametrize("seconds", [100, 10])
def test_an_end_that_is_no_recovery(seconds: float, why: str) -> None:
    """Such as an override, or maintenance, while the resources are as bad as before: who, and no success."""
    desk = Desk()
    desk.happens(**CLOSED)
    desk.until(seconds)
    desk.happens(**OPEN | {"text": f"closed -> open ({why}) after 100 s"})
    desk.until(200)
    said = "was closed" if seconds == 10 else f"is {why}"
    assert (desk.titles[-1][1], desk.kinds[-1]) == (f"the gate {said}", "info")
    assert why in desk.said[-1][2]


def test_how_often_it_happened() -> None:
    """What goes on for another reason has not begun again, told before or not."""
    desk = Desk(on=["state"], remind=0.01)
    for why in ("check: no answer", "unreachable", "check: no answer", "timeout"):
        desk.happens(**SICK | {"text": why})
        desk.until(desk.now - NOON + 15)    # the first of them are told together
    desk.happens(**WELL)
    desk.until(100)
    assert len(desk.said) > 2 and not [body for *_, body in desk.said if " times" in body]
    for state in (SICK, SICK, WELL, SICK, WELL):
        desk.happens(**state)
    desk.until(200)
    assert ", 2 times" in desk.said[-1][2]


def test_a_recovery_is_a_success() -> None:
    desk = Desk(on=["gate", "state"])
    for begin, end in ((CLOSED, OPEN), (SICK, WELL)):
        desk.happens(**begin)
        desk.until(desk.now - NOON + 50)
        desk.happens(**end)
        desk.until(desk.now - NOON + 50)
    assert desk.kinds == ["failure", "success"] * 2


def test_the_lines_of_the_gate_are_what_keeps_it_closed() -> None:
    """Where resources are not told by themselves."""
    desk = Desk()
    desk.unhealthy = {"db1": Lasting(NOON, "check: replication"),
                      "beta": Lasting(NOON, "check: no matter", closes=frozenset()),
                      "behind": Lasting(NOON, "parent: db1", blame="other")}
    desk.happens(**CLOSED)
    desk.until(30)
    ((_, title, body),) = desk.said
    assert title == "HealthChecker: the gate is closed, 1 unhealthy"
    assert "db1: check: replication; since" in body and "beta" not in body and "behind" not in body


def test_the_name_of_a_group_is_said_once() -> None:
    """Its events begin with it."""
    desk = Desk(on=["group"])
    desk.groups = {"/shop": 1}
    desk.happens("group", "closed", "/shop: open -> closed (db1: x)", "/shop")
    desk.until(100)
    desk.happens("group", "open", "/shop: closed -> open", "/shop")
    desk.until(101)
    desk.happens("group", "closed", "/shop: open -> closed (db1: x)", "/shop")
    desk.happens("group", "open", "/shop: closed -> open", "/shop")
    desk.until(200)
    first, _, last = (body for *_, body in desk.said)
    assert first.startswith("/shop: open -> closed (db1: x); since 20")
    assert last.startswith("/shop: open -> closed (db1: x); from 20")


def test_a_group_is_closed_by_its_own() -> None:
    """Whose lines those are, for whose reminders it matters what is seen to, and by whose tags it is told."""
    desk, other = Desk(on=["group"], remind=0.1), Desk(on=["group"], tags=["web"])
    for one in (desk, other):
        one.groups = {"/shop": 1, "stock": 1}
        one.unhealthy = {"db1": Lasting(NOON, "x", closes=frozenset(["/shop"])),
                         "web1": Lasting(NOON, "y", frozenset(["web"]), frozenset(["stock", ""]))}
        one.happens("group", "closed", "/shop: open -> closed (db1: x)", "/shop")
        one.until(100)
    desk.acknowledged = {"db1": 1}
    desk.until(1000)
    ((_, title, body),) = desk.said
    assert title == "HealthChecker: /shop is closed, 1 unhealthy" and not other.said
    assert "\ndb1: x; since" in body and "web1" not in body


@pytest.mark.long
@pytest.mark.parametrize("wait", [0, 1, 20, 60])
def test_a_flood(wait: float) -> None:
    """300 machines flap for an hour: at most one message per wait, and what is kept stays bounded."""
    desk = Desk(on=["gate", "state"], wait=wait)
    names = [f"flap{number}" for number in range(300)]
    desk.known |= {*names}
    for second in range(0, 3600, 15):
        desk.now = NOON + second
        for number, name in enumerate(names):
            if (second // 15 + number) % 3 == 0:
                state = "unhealthy" if name not in desk.unhealthy else "healthy"
                desk.happens("state", state, "limit: flaps", name)
        desk.happens(**(CLOSED if second % 30 else OPEN))
        desk.look()
        assert len(desk.announcer.notices) <= 301
        assert len(desk.announcer.row.message) < 300_000
    times = [at for at, *_ in desk.said]
    assert len(times) > 3600 / max(wait, 15) / 3
    assert all(later - earlier >= wait for earlier, later in itertools.pairwise(times))
    assert all(len(body) < 20_000 for *_, body in desk.said)


def test_a_receiver_that_cannot_be_reached() -> None:
    """Tries with pauses that grow for an hour; then it is given up, and what lasts is told when it can be."""
    desk = Desk(wait=0)
    desk.is_reachable = False
    tries: list[float] = []
    desk.happens(**CLOSED)
    while desk.now < NOON + RETRY_TIME + 1200 and not desk.announcer.row.failed:
        before = desk.announcer.row.tries
        desk.look()
        if desk.announcer.row.tries > before:
            tries.append(desk.now - NOON)
        desk.now += 1
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses == sorted(pauses) and pauses[0] == 10 and pauses[-1] == 600
    assert tries[-1] < RETRY_TIME + 600
    assert desk.announcer.row.failed == 1 and desk.announcer.row.trouble == "nobody is there"
    assert not desk.said
    desk.is_reachable = True
    desk.until(desk.now - NOON + 700)
    assert [title for _, title in desk.titles] == ["the gate is closed"] and desk.announcer.row.trouble == ""
    desk.happens(**OPEN)
    desk.look()
    assert [title for _, title in desk.titles][1:] == ["the gate is open again"]


def test_an_end_that_was_given_up_is_told_later() -> None:
    desk = Desk(wait=0)
    desk.happens(**CLOSED)
    desk.look()
    desk.is_reachable = False
    desk.now += 60
    desk.happens(**OPEN)
    desk.until(RETRY_TIME + 1300)
    assert desk.announcer.row.failed == 1
    desk.is_reachable = True
    desk.until(RETRY_TIME + 3000)
    assert [title for _, title in desk.titles] == ["the gate is closed", "the gate is open again"]
    assert not desk.announcer.notices


def test_a_reminder_that_is_given_up_is_followed_by_the_end() -> None:
    """Although nothing with the receiver's tags is unhealthy any more: it was told of the trouble."""
    desk = Desk(wait=0, remind=2, tags=["database"])
    desk.tags = {"db1": frozenset(["database"])}
    desk.happens(**SICK)
    desk.happens(**CLOSED)
    desk.until(3600)
    desk.is_reachable = False
    desk.until(9000)
    desk.happens(**WELL)
    desk.happens(**OPEN)
    desk.until(2 * 3600 + RETRY_TIME + 1300)
    assert desk.announcer.row.failed == 1
    desk.is_reachable = True
    desk.until(2 * 3600 + RETRY_TIME + 3000)
    assert [title for _, title in desk.titles] == ["the gate is closed, 1 unhealthy", "the gate is open again"]
    assert not desk.announcer.notices


def test_an_end_of_a_kind_that_nobody_knows() -> None:
    """As of a database that was restored: what else the message holds goes into the next one."""
    desk = Desk()
    ends = [[1, kind, "", "why", "", 1, NOON, NOON, NOON, NOON] for kind in ("nonsense", "gate")]
    desk.announcer.row.message, desk.announcer.row.made_at = json.dumps(["", "", "", ends]), NOON
    assert not desk.announcer.take_result(Delivery(False, "nobody is there"), NOON + healthchecker.RETRY_TIME)
    assert list(desk.announcer.notices) == [("gate", "")]
    desk.announcer.compose(desk.picture, NOON + healthchecker.RETRY_TIME)


def test_a_receiver_that_wants_to_be_left_alone() -> None:
    """Its Retry-After counts, where it is longer than the pause; never for longer than an hour."""
    row = Desk().announcer.row
    row.message, row.made_at = json.dumps(["", "", "", []]), NOON
    for wanted, waits in ((0.0, 10), (5.0, 20), (120.0, 120), (1e9, 3600)):
        Announcer(row).take_result(Delivery(False, "the answer was 429", wanted), NOON)
        assert row.next_at - NOON == waits


# --- real receivers


class Request(NamedTuple):
    path: str
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Hook(ThreadingHTTPServer):
    """A web server that keeps what it is sent and answers as it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HookHandler)
        self.requests: list[Request] = []
        self.status, self.headers, self.way, self.body = 200, dict[str, str](), "", b"{}"
        self.inside: ssl.SSLContext | None = None   # of the host that it leads to as a proxy
        self.released = threading.Event()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients that were killed are no news."""


class HookHandler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(Request(self.path, body))
        if self.server.way == "slow":
            self.server.released.wait(4.5)      # apprise itself waits for 4
        if self.server.way == "hang":
            self.server.released.wait(60)
        if self.server.way in ("hang", "drop"):
            self.close_connection = True
            return
        self.send_response(self.server.status)
        for name, value in ({"Content-Length": "2"} | self.server.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.body)
        if self.server.way == "flood":
            self.wfile.write(bytes(1 << 21))
            self.server.released.wait(60)

    do_GET = do_PUT = do_POST

    def do_CONNECT(self) -> None:
        """As a proxy that leads nowhere, or to itself under another name."""
        self.server.requests.append(Request(self.path, b""))
        self.close_connection = True
        if self.server.inside:
            self.send_response_only(200)
            self.end_headers()
            with contextlib.suppress(OSError), self.server.inside.wrap_socket(self.connection, server_side=True) as it:
                HookHandler(it, self.client_address, self.server)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    server = Hook()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


TEXT = "db1: limit\nzwölf € <b>&amp;</b>\nhttp://127.0.0.1/-/"
MESSAGE = Message("HealthChecker: the gate is closed", TEXT, "failure")
WEB = {     # forms of web hooks whose URL names a host: what of the request holds title and text
    "json": ("json://{}/x", lambda got: (got.json["title"], got.json["message"])),
    "gotify": ("gotify://{}/Token12345678", lambda got: (got.json["title"], got.json["message"])),
    "ntfy": ("ntfy://{}/topic", lambda got: (got.json["title"], got.json["message"])),
    "form": ("form://{}/x", lambda got: (MESSAGE.title, MESSAGE.body)),
    "mattermost": ("mmost://{}/Token12345678", lambda got: (MESSAGE.title, got.json["text"])),
}


@pytest.mark.parametrize("form", WEB)
def test_web_hooks(form: str, hook: Hook) -> None:
    url, read = WEB[form]
    assert deliver(url.format(hook.place), MESSAGE, ChildProcess()) == Delivery(True)
    (got,) = hook.requests
    title, text = read(got)
    assert MESSAGE.title in title and TEXT in text


def test_nothing_is_imported_from_the_folder_it_is_started_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be anybody's: /tmp, when `check` is called there."""
    for name in ("json", "logging", "threading", "apprise", "requests"):
        (tmp_path / f"{name}.py").write_text(f"open('was-{name}', 'w').close()\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    answer = ChildProcess().ask(["json://localhost/x"])
    assert answer and answer["targets"] == [1] and not [*tmp_path.glob("was-*")]


def test_what_is_too_long_for_a_service_is_cut(hook: Hook) -> None:
    """Or it would refuse the very message that names the most; one message stays one."""
    long = MESSAGE._replace(body="\n".join(f"db{number}: {'x' * 200}" for number in range(30)))
    url = f"rocket://web/hook@{hook.place}/#ops?mode=webhook"
    assert deliver(url, long, ChildProcess()) == Delivery(True)
    (got,) = hook.requests
    assert 500 < len(got.json["text"]) <= 1000 and "db0: xxx" in got.json["text"]


@pytest.mark.long
def test_a_web_hook_that_hangs(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is ended at the deadline, whatever it waits for."""
    monkeypatch.setattr(healthchecker, "DELIVERY_TIMEOUT", 3.0)
    hook.way = "hang"
    child = ChildProcess()
    why = "apprise gave no answer within 3 s"
    assert deliver(f"json://{hook.place}/x?rto=60&cto=60", MESSAGE, child) == Delivery(False, why)
    assert child._process.poll() is not None


@pytest.mark.long
def test_a_web_hook_that_takes_its_time(hook: Hook) -> None:
    """It was told, and would be again and again for an hour."""
    hook.way = "slow"
    assert deliver(f"json://{hook.place}/x", MESSAGE, ChildProcess()) == Delivery(True)
    assert len(hook.requests) == 1


ASKS = """
import sys
sys.path.insert(0, {root!r})
import healthchecker
healthchecker.DELIVERY_TIMEOUT = 12.0
print(healthchecker.deliver({url!r}, healthchecker.Message("t", "b"), healthchecker.ChildProcess()), flush=True)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's: on Windows they are no processes'")
def test_what_was_told_while_the_service_stood_still_is_known_to_be(hook: Hook) -> None:
    """A machine that is suspended, or a process that a debugger stops, past the end of a try: it was told again."""
    hook.way = "slow"
    script = ASKS.format(root=str(Path(healthchecker.__file__).parent), url=f"json://{hook.place}/x")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, encoding="utf-8") as service:
        begin, process = time.monotonic(), psutil.Process(service.pid)
        try:
            wait_for(lambda: bool(hook.requests), 60)
            process.suspend()
            wait_for(lambda: all(child.status() == psutil.STATUS_ZOMBIE for child in process.children()), 60)
            wait_for(lambda: time.monotonic() > begin + 25, 60)
        finally:
            process.resume()
        assert service.stdout and service.stdout.read() == f"{Delivery(True)}\n"
    assert len(hook.requests) == 1


def test_a_web_hook_whose_answer_has_no_end(hook: Hook) -> None:
    """A mebibyte of it is enough: all of it would take the machine's memory."""
    hook.way, hook.headers = "flood", {"Content-Length": str(1 << 40)}
    assert deliver(f"json://{hook.place}/x", MESSAGE, ChildProcess()) == Delivery(True)


def test_a_web_hook_that_drops(hook: Hook) -> None:
    hook.way = "drop"
    assert deliver(f"json://{hook.place}/x", MESSAGE, ChildProcess()) == Delivery(False, "no answer (ConnectionError)")


def test_a_web_hook_that_wants_to_be_left_alone(hook: Hook) -> None:
    hook.status, hook.headers = 429, {"Retry-After": "77"}
    assert deliver(f"json://{hook.place}/x", MESSAGE, ChildProcess()) == Delivery(False, "the answer was 429", 77.0)
    hook.headers = {"Retry-After": formatdate(time.time() + 900, usegmt=True)}
    came = deliver(f"json://{hook.place}/x", MESSAGE, ChildProcess())
    assert came.why == "the answer was 429" and 800 < came.retry_after <= 900


@pytest.mark.parametrize("text", [
    "", "soon", "-1", "1e9", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 99999999999999999999 07:28:00 GMT", "0 0",
    "Wed, 21 Oct 99999 07:28:00 GMT", ",", "Wed, 21 Oct 2015 07:28:00 +9999999999999999", "\x00", "1 2 3 4 5 6" * 1000,
])  # fmt: skip
def test_a_wait_that_is_none(text: str) -> None:
    """What is over, or no date: nobody forges an error by it."""
    assert healthchecker.seconds_of(text) == 0


def test_no_redirect_is_followed(hook: Hook) -> None:
    """What is said, and the token of the URL, go to nobody else."""
    hook.status, hook.headers = 307, {"Location": f"http://{hook.place}/elsewhere"}
    assert not deliver(f"json://{hook.place}/x", MESSAGE, ChildProcess()).is_delivered
    assert [got.path for got in hook.requests] == ["/x"]


def secured(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate_file, certificate.key_file)
    return context


def test_slack(hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its URL names no host: its own is asked and none else, through the proxy, and nothing without its certificate."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://{hook.place}")
    certificate = make_certificate(tmp_path, "slack", host="hooks.slack.com")
    hook.inside, hook.body = secured(certificate), b"ok"    # as Slack says it
    url = "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#general"
    assert not deliver(url, MESSAGE, ChildProcess()).is_delivered
    assert {got.path for got in hook.requests} == {"hooks.slack.com:443"}
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.certificate_file))
    assert deliver(url, MESSAGE, ChildProcess()) == Delivery(True)
    said = hook.requests[-1]
    assert said.path == "/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ"
    assert said.json["channel"] == "#general" and "the gate is closed" in str(said.json) and "zwölf" in str(said.json)


@pytest.mark.long
def test_teams_over_tls(hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workflow of Teams; its certificate is verified."""
    certificate = make_certificate(tmp_path, "hook")
    hook.socket = secured(certificate).wrap_socket(hook.socket, server_side=True)
    url = f"workflows://localhost:{hook.server_port}/workflow123/signature123"
    assert deliver(url, MESSAGE, ChildProcess()) == Delivery(False, "no answer (SSLError)")
    assert not hook.requests
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate.certificate_file))
    assert deliver(url, MESSAGE, ChildProcess()) == Delivery(True)
    assert "db1: limit" in hook.requests[0].body.decode()


class MailServer(Controller):
    """On a free port, from the begin: nobody else can have it in between."""

    def __init__(self, box: Mailbox, **settings: Any) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        super().__init__(box, *self.sock.getsockname(), ready_timeout=60, **settings)

    def _create_server(self) -> Any:
        return self.loop.create_server(self._factory_invoker, sock=self.sock)


class Mailbox:
    """What an SMTP server is sent."""

    def __init__(self) -> None:
        self.letters: list[bytes] = []
        self.logins: list[tuple[bytes, bytes]] = []

    async def handle_DATA(self, _server: Any, session: Any, envelope: Any) -> str:
        assert session.ssl
        self.letters.append(envelope.content)
        return "250 OK"

    def authenticate(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, given: Any) -> AuthResult:
        self.logins.append((given.login, given.password))
        return AuthResult(success=True)


@pytest.mark.long
def test_mail_with_starttls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The login and the letter go over TLS alone, to a server whose certificate is verified."""
    certificate, box = make_certificate(tmp_path, "mail"), Mailbox()
    controller = MailServer(box, tls_context=secured(certificate), require_starttls=True, auth_required=True,
                            authenticator=box.authenticate)
    controller.start()
    try:
        url = (f"mailto://monitor:s3cret@localhost:{controller.port}?mode=starttls&smtp=localhost&from=hc@example.com"
               "&to=ops@example.com&format=text")
        assert not deliver(url, MESSAGE, ChildProcess()).is_delivered and not box.letters
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certificate_file))
        assert deliver(url, MESSAGE, ChildProcess()) == Delivery(True)
    finally:
        controller.stop()
    assert box.logins == [(b"monitor", b"s3cret")]
    letter: Any = email.message_from_bytes(box.letters[0], policy=email.policy.default)
    assert letter["subject"] == MESSAGE.title
    text = letter.get_body(("plain",)).get_content().replace("\r\n", "\n")
    assert text.strip() == MESSAGE.body


class EndlessGreeting(socketserver.StreamRequestHandler):
    """Of an SMTP server, as far as half a gibibyte has none."""

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        self.rfile.readline()
        with contextlib.suppress(OSError):
            for _ in range(1 << 11):
                self.wfile.write((b"250-" + b"x" * 1018 + b"\r\n") * 256)
            self.server.is_whole = True     # type: ignore[attr-defined]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="macOS and wine enforce no limit of memory")
def test_a_mail_server_whose_answer_has_no_end() -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), EndlessGreeting) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"mailto://u:p@localhost:{server.server_address[1]}?mode=insecure&smtp=localhost&to=ops@example.com"
        assert not deliver(url, MESSAGE, ChildProcess()).is_delivered
        thread.join()
    assert not hasattr(server, "is_whole")


# --- what is refused

RESOURCES = "  - {name: this, platform: simulated, tags: [db]}\n"
BAD = {     # an entry of notify with ¦ where the fault is, and what is said
    "no url": ("¦{name: ops}", "notify[0].url: is missing"),
    "no URL": ("{name: ops, url: ¦nonsense}", "must be a URL of Apprise"),
    "blanks": ("{name: ops, url: ¦'json://a/b json://c'}", "must be a URL of Apprise"),
    "this machine": ("{name: ops, url: ¦'syslog://x'}", "syslog:// is this machine itself"),
    "a file": ("{name: ops, url: ¦'fcm://project/token?keyfile=/etc/passwd'}", "names a file of this machine"),
    "an escaped file": ("{name: ops, url: ¦'slack://a/b/c?template=file%3A///etc/passwd'}", "names a file of"),
    "a duration": ("{name: ops, url: 'json://h', wait: ¦1x}", "notify[0].wait: must be a valid number"),
    "a wait that is too long": ("{name: ops, url: 'json://h', wait: ¦3601}", "must be less than or equal to 3600"),
    "minutes before now": ("{name: ops, url: 'json://h', after: ¦-1}", "must be greater than or equal to 0"),
    "not a kind": ("{name: ops, url: 'json://h', on: [¦gates]}", "must be 'gate', 'group', 'state', 'problem'"),
    "nothing": ("{name: ops, url: 'json://h', on: ¦[]}", "notify[0].on: must have at least one entry"),
    "a tag of nobody": ("{name: ops, url: 'json://h', tags: [db, ¦nix]}", "tags[1]: no tag has this name"),
    "a setting that is none": ("{name: ops, url: 'json://h', ¦tag: [db]}", "did you mean tags?"),
    "two sources": ("{name: ops, url: 'json://h', url_env: ¦OPS}", "use one of url, url_env"),
    "no variable": ("{name: ops, url_env: ¦NOT_SET_ANYWHERE}", "this environment variable is not set"),
    "no file": ("{name: ops, url_file: ¦nowhere}", "this file cannot be read as text"),
    "one name twice": ("{name: ops, url: 'json://h'}\n  - {name: ¦ops, url: 'json://h'}", "another receiver has this"),
}


def with_notify(folder: Path, *entries: str, service: str = "") -> Path:
    path = write_inventory(folder, RESOURCES, service)
    text = "notify:\n" + "".join(f"  - {entry}\n" for entry in entries) if entries else ""
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_named_with_its_place(name: str, tmp_path: Path) -> None:
    entry, why = BAD[name]
    marked = with_notify(tmp_path, entry)
    text = marked.read_text(encoding="utf-8")
    before = text[:text.index("¦")]
    marked.write_text(text.replace("¦", ""), encoding="utf-8")
    with pytest.raises(InventoryError) as error:
        load_inventory(marked)
    place = f"inventory.yaml:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}: "
    [fault] = str(error.value).splitlines()
    assert place in fault and why in fault
    assert "//h" not in str(error.value) and "passwd" not in str(error.value)


HEARTBEATS = {"json://h": "must be http:// or https://", "https://u:secret@h": "must be http:// or https://"}


@pytest.mark.parametrize("url", HEARTBEATS)
def test_a_heartbeat_that_cannot_be(url: str, tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match=f"service.heartbeat: {HEARTBEATS[url]}") as error:
        load_inventory(write_inventory(tmp_path, service=f"  heartbeat: '{url}'"))
    assert "secret" not in str(error.value)


def test_check_names_the_url_of_no_service(tmp_path: Path) -> None:
    """With its line and column, and nothing of the URL: apprise alone knows what there is."""
    prepared_keys(tmp_path)
    inventory = load_inventory(with_notify(
        tmp_path, "{name: good, url: 'json://localhost/x'}", "{name: bad, url: 'nosuch://s3cret'}",
        "{name: half, url: 'slack://s3cret'}", "{name: file, url: 'slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ"
        "?template=/etc/passwd'}"))
    faults = [str(fault) for fault in check_receivers(inventory, prepared_vault(tmp_path))]
    line = (tmp_path / "inventory.yaml").read_text(encoding="utf-8").split("notify:")[0].count("\n") + 3
    why = "is that of no service that apprise knows, or lacks a part"
    assert faults == [f"inventory.yaml:{line + number}:{column}: notify[{number + 1}].url: {why}"
                      for number, column in enumerate((22, 23, 23))]


def test_check_names_a_url_of_several(tmp_path: Path) -> None:
    """One of them that cannot be reached would have the others told again and again."""
    prepared_keys(tmp_path)
    urls = {"mailto://u:p@mail.example.com?to=a@example.com,b@example.com": 2,
            "tgram://123456789:abcdefg_hijk/11/12/13": 3,
            "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#a/#b": 2, "json://localhost/x?retry=2": 1,
            "mailto://u:p@mail.example.com?to=a@example.com&cc=b@example.com": 1}
    inventory = load_inventory(with_notify(
        tmp_path, *(f"{{name: n{number}, url: '{url}'}}" for number, url in enumerate(urls))))
    faults = [str(fault).partition(": ")[2] for fault in check_receivers(inventory, prepared_vault(tmp_path))]
    assert faults == [
        f"notify[{number}].url: names {count} who are told, of which a receiver has one: write as many receivers"
        for number, count in enumerate(urls.values()) if count > 1]  # fmt: skip


def test_check_without_apprise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_keys(tmp_path)
    inventory = load_inventory(with_notify(tmp_path, "{name: good, url: 'json://localhost/x'}"))
    monkeypatch.setitem(sys.modules, "apprise", None)   # as Python has it for what must not be imported
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    faults = [str(fault) for fault in check_receivers(inventory, prepared_vault(tmp_path))]
    assert len(faults) == 1 and "pip install" in faults[0]
    (tmp_path / "other").mkdir()
    assert not [*check_receivers(load_inventory(write_inventory(tmp_path / "other")), prepared_vault(tmp_path))]


@pytest.mark.long
def test_check_says_that_apprise_is_missing(tmp_path: Path) -> None:
    """The command itself, where it is not installed."""
    prepared_keys(tmp_path)
    path = with_notify(tmp_path, "{name: good, url: 'json://localhost/x'}")
    (tmp_path / "without").mkdir()
    hides = "import sys\nsys.modules['apprise'] = None\n"      # as Python has it for what must not be imported
    (tmp_path / "without" / "sitecustomize.py").write_text(hides, encoding="utf-8")
    done = subprocess.run(command(path, "check"), env=environment({"PYTHONPATH": str(tmp_path / "without")}),
                          capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "Traceback" not in done.stdout
    assert 'notify needs the package apprise: run `pip install "apprise>=' in done.stderr


# --- rows, and the whole


@pytest.fixture
def tmp_path(database_folder: Path) -> Path:
    """What has a folder here runs on both kinds of database."""
    return database_folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    database = database_in(tmp_path)
    machine = socket.gethostname() if isinstance(database, PostgresServer) else ""  # as the inventory has it
    with contextlib.closing(store_in(tmp_path, machine)) as store:
        yield store


def calm(store: Store) -> Recorder:
    """Of a service that is well."""
    return Recorder(store, HealthAggregator())


def take_over(store: Store, folder: Path, *entries: str, service: str = "") -> list[str]:
    """Has the rows follow the file; gives what changed."""
    with store.writing() as session:
        return import_inventory(session, load_inventory(with_notify(folder, *entries, service=service)),
                                prepared_vault(folder)).changed


def receivers(store: Store) -> dict[str, Receiver]:
    with store.reading() as session:
        found = {row.name: row for row in session.scalars(sqlalchemy.select(Receiver))}
        session.expunge_all()
    return found


def happen(store: Store, kind: str, state: str, text: str = "it is so", **about: str) -> None:
    with store.writing() as session:
        record_event(session, kind, text, state=state, at=NOON, **about)


def look_until(notifier: Notifier, hook: Hook, count: int, now: float) -> None:
    """Looks with this clock until so many requests came and were taken up."""
    def is_done() -> bool:
        notifier.look(now)
        return len(hook.requests) >= count and not notifier._deliveries.threads
    wait_for(is_done)
    assert len(hook.requests) == count


def test_rows_follow_the_file_and_urls_are_sealed(tmp_path: Path, store: Store) -> None:
    entry, beat = "{name: ops, url: 'json://u:s3cret@localhost/x'}", "  heartbeat: https://hc.example.com/s3cret\n"
    assert take_over(store, tmp_path, entry, service=beat) == ["who is told"]
    first = receivers(store)
    own = store.own("")
    assert first.keys() == {"ops", own} and "s3cret" not in first["ops"].url + first["ops"].settings + first[own].url
    assert take_over(store, tmp_path, entry, service=beat) == []
    assert receivers(store)["ops"].url == first["ops"].url
    assert take_over(store, tmp_path, entry.replace("}", ", wait: 5}"), service=beat) == ["who is told"]
    happen(store, "gate", "closed")
    assert take_over(store, tmp_path, "{name: other, url: 'json://h'}") == ["who is told"]
    assert receivers(store).keys() == {"other"} and receivers(store)["other"].cursor == 1


@pytest.mark.long
def test_seal_rotate_and_replace(tmp_path: Path) -> None:
    """URLs in the file and in the rows are treated as passwords are."""
    prepared_database(tmp_path)
    path = with_notify(tmp_path, "{name: ops, url: 'json://u:s3cret@localhost/x'}   # of the team",
                       service="  heartbeat: 'https://hc.example.com/s3cret'\n")
    count = 3 if settings_of(tmp_path) else 2  # the password of the database is one
    assert f"{count} secrets sealed" in run(path, "seal").stdout
    text = path.read_text(encoding="utf-8")
    assert "s3cret" not in text and text.count("HC2.") == count and "# of the team" in text
    shown = run(path, "check")
    assert shown.returncode == 0 and "s3cret" not in shown.stdout + shown.stderr
    assert run(path, "reload").returncode == 0
    with contextlib.closing(Store(database_in(tmp_path))) as store:
        before = receivers(store)["ops"].url
        assert run(path, "keys", "rotate").returncode == 0
        assert path.read_text(encoding="utf-8") != text
        vault, row = healthchecker.Vault(tmp_path / "keys"), receivers(store)["ops"]
        assert row.url != before and vault.open(row.url, *row.bound) == "json://u:s3cret@localhost/x"
        assert run(path, "check").returncode == 0
        for name in ("private.pem", "public.pem"):
            (tmp_path / "keys" / name).unlink()
        path.write_text(re.sub("url: .*HC2[^'}]*", "url: 'json://u:s3cret@localhost/x", with_notify(
            tmp_path, "{name: ops, url: 'json://u:s3cret@localhost/x'}").read_text(encoding="utf-8")), encoding="utf-8")
        assert run(path, "keys", "replace").returncode == 0
        vault, row = healthchecker.Vault(tmp_path / "keys"), receivers(store)["ops"]
        assert vault.open(row.url, *row.bound) == "json://u:s3cret@localhost/x"


def test_an_event_is_told_once(tmp_path: Path, store: Store, hook: Hook) -> None:
    """Also over a restart; what was told is known there, and gets its end."""
    take_over(store, tmp_path, f"{{name: ops, url: 'json://{hook.place}/x', wait: 0}}")
    happen(store, "gate", "closed", "open -> closed (this: limit)")
    first = Notifier(store, prepared_vault(tmp_path), calm(store), "http://console/", ALONE)
    look_until(first, hook, 1, NOON + 5)
    first.close()
    said = hook.requests[0].json
    assert said["title"] == "HealthChecker: the gate is closed" and said["message"].endswith("http://console/")
    row = receivers(store)["ops"]
    assert (row.message, row.delivered, row.cursor, row.trouble) == ("", 1, 1, "")
    second = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    second.look(NOON + 10)
    second.look(NOON + 11)
    assert not second._deliveries.threads
    happen(store, "gate", "open", "closed -> open")
    look_until(second, hook, 2, NOON + 60)
    second.close()
    assert hook.requests[1].json["title"] == "HealthChecker: the gate is open again"
    with store.reading() as session:
        assert not [*session.scalars(sqlalchemy.select(Notice))]


@pytest.mark.long
def test_no_thread_can_be_started(tmp_path: Path, store: Store, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while: the message is sent later."""
    take_over(store, tmp_path, f"{{name: ops, url: 'json://{hook.place}/x', wait: 0}}")
    happen(store, "gate", "closed")
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            notifier.look(NOON)
    look_until(notifier, hook, 1, NOON + 1)
    notifier.close()


@pytest.mark.long
def test_a_damaged_row_silences_nobody(tmp_path: Path, store: Store, hook: Hook) -> None:
    """Its receiver is told what is told where nothing is set: of the gate."""
    url = f"json://{hook.place}"
    take_over(store, tmp_path, f"{{name: ops, url: '{url}/ops', wait: 0}}",
              f"{{name: odd, url: '{url}/odd', on: [state]}}")
    with store.writing() as session:
        session.execute(sqlalchemy.text("UPDATE receiver SET settings = '[' WHERE name = 'odd'"))
    happen(store, "gate", "closed")
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    look_until(notifier, hook, 1, NOON)
    look_until(notifier, hook, 2, NOON + 60)
    notifier.close()
    assert [got.path for got in hook.requests] == ["/ops", "/odd"]


@pytest.mark.long
@pytest.mark.parametrize("damage", [
    "UPDATE receiver SET message = '[' WHERE name = 'odd'", "UPDATE receiver SET message = '[1]' WHERE name = 'odd'",
    "UPDATE receiver SET message = '[1, 2, 3, 4]' WHERE name = 'odd'",
    "UPDATE receiver SET message = '[\"a\", \"b\", \"info\", [{}]]' WHERE name = 'odd'",
    "UPDATE resource SET settings = '[]'", "UPDATE resource SET settings = '{\"tags\": 5}'",
    "UPDATE resource SET settings = '{\"tags\": [[1]]}'",
    "INSERT INTO notice SELECT id, 'no', 'x', '', '', 1, 1, 1, 0, 0 FROM receiver WHERE name = 'odd'"])
def test_nor_does_any_other(damage: str, tmp_path: Path, store: Store, hook: Hook) -> None:
    """Whatever a restored database holds of messages, of what was told, or of an unhealthy resource."""
    url = f"json://{hook.place}"
    take_over(store, tmp_path, f"{{name: odd, url: '{url}/odd', wait: 0}}", f"{{name: ops, url: '{url}/ops', wait: 0}}")
    with store.writing() as session:
        number = session.scalars(sqlalchemy.select(Resource.id)).first()
        session.merge(Status(resource_id=number, settings_digest="", credential_digest="", state="unhealthy",
                             cause="check", reason="", since_at=NOON, polled_at=NOON, good=0, bad=1, seconds=0,
                             sample="null"))
        session.execute(sqlalchemy.text(damage))
    happen(store, "gate", "closed")
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    look_until(notifier, hook, 2, NOON)
    notifier.close()
    assert {got.path for got in hook.requests} == {"/ops", "/odd"}


@pytest.mark.long
def test_a_receiver_that_hangs_holds_nobody_up(tmp_path: Path, store: Store, hook: Hook) -> None:
    stuck = Hook()
    stuck.way = "hang"
    thread = threading.Thread(target=stuck.serve_forever, args=(0.05,))
    thread.start()
    try:
        take_over(store, tmp_path, f"{{name: slow, url: 'json://{stuck.place}/x?rto=60', wait: 0}}",
                  f"{{name: ops, url: 'json://{hook.place}/x', wait: 0}}")
        happen(store, "gate", "closed")
        notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
        notifier.look(NOON + 5)
        wait_for(lambda: bool(hook.requests and stuck.requests))
        notifier.close()
        rows = receivers(store)
        assert rows["ops"].delivered == 1
        assert rows["slow"].message and rows["slow"].tries == 1     # it is sent again after the next start
    finally:
        stuck.released.set()
        stuck.shutdown()
        thread.join()
        stuck.server_close()


@pytest.mark.long
def test_few_are_told_at_a_time(tmp_path: Path, store: Store, hook: Hook) -> None:
    """Each of them takes a process. Those that hang leave their places in the end, and those have them who have not
    failed; then who is due longest."""
    names = [f"r{number}" for number in range(12)]
    take_over(store, tmp_path, *(
        f"{{name: {name}, url: 'json://{hook.place}/{name}?rto=60', wait: 0}}" for name in names))
    happen(store, "gate", "closed")
    notifier, hook.way = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE), "hang"
    notifier.look(NOON)
    first = {*notifier._deliveries.threads}
    wait_for(lambda: len(hook.requests) == len(first))
    notifier.look(NOON + 1)
    assert {*notifier._deliveries.threads} == {*notifier._deliveries.running} == first and len(first) == 8
    hook.way = "drop"
    hook.released.set()
    wait_for(lambda: notifier._deliveries.results.qsize() == 8)
    hook.way = ""
    notifier._take_results(NOON + 2)
    notifier.look(NOON + 30)        # when all of them are due
    assert len(notifier._deliveries.threads) == 4 and not {*notifier._deliveries.threads} & first
    look_until(notifier, hook, 20, NOON + 30)
    notifier.close()
    assert {row.delivered for row in receivers(store).values()} == {1}


@pytest.mark.long
def test_many_that_hang_delay_nobody(tmp_path: Path, store: Store, hook: Hook) -> None:
    """Neither while they are due, nor while they are tried."""
    stuck = Hook()
    stuck.way = "hang"
    thread = threading.Thread(target=stuck.serve_forever, args=(0.05,))
    thread.start()
    try:
        take_over(store, tmp_path, *(f"{{name: r{number:02}, url: 'json://{stuck.place}/x?rto=60', wait: 0}}"
                                     for number in range(60)), f"{{name: z, url: 'json://{hook.place}/x', wait: 0}}")
        with store.writing() as session:    # as it is after their first message
            session.execute(sqlalchemy.update(Receiver).where(Receiver.name != "z").values(trouble="no answer"))
        happen(store, "gate", "closed")
        notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
        notifier.look(NOON)
        wait_for(lambda: hook.requests and len(stuck.requests) == 3, 10)
        wait_for(lambda: notifier._deliveries.results.qsize() == 1)
        happen(store, "gate", "open")
        notifier.look(NOON + 100)
        wait_for(lambda: len(hook.requests) == 2, 10)
        notifier.close()
    finally:
        stuck.released.set()
        stuck.shutdown()
        thread.join()
        stuck.server_close()


@pytest.mark.long
def test_a_database_that_cannot_be_written_is_told(tmp_path: Path, store: Store, hook: Hook) -> None:
    """Although nothing of it can be kept, and once."""
    take_over(store, tmp_path, f"{{name: ops, url: 'json://{hook.place}/x', wait: 0, on: [problem]}}")
    recorder = calm(store)
    recorder._unwritten.why = "it is full"
    notifier = Notifier(store, prepared_vault(tmp_path), recorder, "", ALONE)
    with refusing(store.database, "UPDATE ON receiver"):
        look_until(notifier, hook, 1, NOON)
        for second in range(1, 5):
            notifier.look(NOON + second)
        notifier.close()
    assert len(hook.requests) == 1 and "it is full" in hook.requests[0].json["message"]


def test_what_cannot_be_written_is_told(tmp_path: Path, store: Store, hook: Hook) -> None:
    """When it happens, once, and by who hears of the gate alone; what is written again is no news."""
    take_over(store, tmp_path, f"{{name: ops, url: 'json://{hook.place}/x', wait: 0}}",
              f"{{name: db, url: 'json://{hook.place}/y', wait: 0, on: [state]}}")
    aggregator = HealthAggregator()
    recorder = Recorder(store, aggregator)
    for name in ("this", "that"):
        aggregator.register(name)
        aggregator.set_resource(name, True, ttl=1e6)
    aggregator.start()
    assert recorder.flush()
    notifier = Notifier(store, prepared_vault(tmp_path), recorder, "", ALONE)
    notifier.look(time.time())

    def happens(what: str, count: int) -> None:
        aggregator.set_resource("this", what == "open", "on fire", ttl=1e6)
        recorder.note("state", f"it is {what}", time.time(), resource="this",
                      state="healthy" if what == "open" else "unhealthy")
        assert recorder.flush() is (what == "again")
        look_until(notifier, hook, count, time.time())

    with refusing(store.database, "INSERT ON event"):
        happens("closed", 2)
        notifier.look(time.time())
        happens("open", 4)
    assert recorder.flush() and not healthchecker.waiting_events(recorder)
    for _ in range(3):
        notifier.look(time.time())
    happens("again", 6)
    notifier.close()
    told = sorted(request.json["title"].removeprefix("HealthChecker: ") for request in hook.requests)
    assert told == ["the gate is closed", "the gate is closed", "the gate is open again",
                    "this is healthy again", "this is unhealthy", "this is unhealthy"]


def test_a_look_without_a_change_costs_little(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many have been told of however much; and only what changes is written."""
    names = [f"db{number:03}" for number in range(200)]
    rows = [f"  - {{name: {name}, platform: simulated}}\n" for name in names]
    told = [f"  - {{name: r{number}, url: 'json://127.0.0.1:9', on: [state], after: {after}}}\n"
            for number, after in enumerate([60, 60, 1])]  # fmt: skip
    path = write_inventory(tmp_path, "".join([*rows, "notify:\n", *told]))
    written, settled = list[tuple[str, int]](), list[float]()
    with store.writing() as session:
        import_inventory(session, load_inventory(path), prepared_vault(tmp_path))
        for number, name in session.execute(sqlalchemy.select(Resource.id, Resource.name)).all():
            session.merge(Status(resource_id=number, settings_digest="", credential_digest="", state="unhealthy",
                                 cause="check", reason="", since_at=NOON, polled_at=NOON, good=0, bad=1, seconds=0,
                                 sample="null"))  # fmt: skip
            record_event(session, "state", "it is so", state="unhealthy", at=NOON, resource=name)

    def note(_connection: object, _cursor: object, statement: str, given: Any, _context: object, many: bool) -> None:
        if statement.startswith(("INSERT INTO notice", "DELETE FROM notice", "UPDATE receiver")):
            written.append((statement[:6], len(given) if many else 1))

    real = Announcer.settle
    monkeypatch.setattr(Announcer, "settle", lambda self, picture, now: settled.append(now) or real(self, picture, now))
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    notifier.look(NOON + 1)
    sqlalchemy.event.listen(store.engine, "before_cursor_execute", note)
    settled.clear()
    for second in range(2, 20):
        notifier.look(NOON + second)
    assert not written and not settled, "nothing has changed"
    with store.writing() as session:
        session.execute(sqlalchemy.update(Status).where(Status.resource_id == 1).values(
            state="healthy", polled_at=NOON + 19))
        record_event(session, "state", "again", state="healthy", at=NOON + 19, resource=names[0])
    notifier.look(NOON + 20)
    assert sorted(written) == [("DELETE", 1)] * 3 + [("UPDATE", 1)] * 3, "what was too short is forgotten"
    with store.reading() as session:
        assert session.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(Notice)) == 3 * 199
    settled.clear()
    for second in (21, 40, 49, 50, 79):
        notifier.look(NOON + second)
    assert settled == [NOON + 50] * 3, "all are looked at from time to time"
    assert not receivers(store)["r2"].message
    notifier.look(NOON + 80)
    notifier.close()
    assert receivers(store)["r2"].message, "its minute and the wait are over"


@pytest.mark.long
def test_a_look_with_a_change_costs_a_few_without_one(tmp_path: Path, store: Store) -> None:
    """Of 40 who have been told of 500: what concerns one of these concerns one in 20,000."""
    rows = [f"  - {{name: db{number:03}, platform: simulated}}\n" for number in range(500)]
    told = [f"  - {{name: r{number}, url: 'json://127.0.0.1:9', on: [state], after: 60}}\n" for number in range(40)]
    path, costs = write_inventory(tmp_path, "".join([*rows, "notify:\n", *told])), dict[bool, list[float]]()
    with store.writing() as session:
        import_inventory(session, load_inventory(path), prepared_vault(tmp_path))
        for number, name in session.execute(sqlalchemy.select(Resource.id, Resource.name)).all():
            session.add(Status(resource_id=number, settings_digest="", credential_digest="", state="unhealthy",
                               cause="check", reason="", since_at=NOON, polled_at=NOON, good=0, bad=1, seconds=0,
                               sample="null"))  # fmt: skip
            record_event(session, "state", "it is so", state="unhealthy", at=NOON, resource=name)
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    notifier.look(NOON + 1)
    for second in range(2, 12):
        if changes := second % 2 == 0:
            with store.writing() as session:
                session.execute(sqlalchemy.update(Status).where(Status.resource_id == second).values(
                    state="healthy", polled_at=NOON + second))  # fmt: skip
        begun = time.process_time()
        notifier.look(NOON + second)
        costs.setdefault(changes, []).append(time.process_time() - begun)
    notifier.close()
    with store.reading() as session:
        assert session.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(Notice)) == 40 * 495
    assert min(costs[True]) < 12 * min(costs[False]), costs


def test_a_name_that_another_one_had_takes_its_place(tmp_path: Path, store: Store) -> None:
    """Also where a receiver was not told of the end of that yet: or no start would come up any more."""
    rows = "  - {{name: {}, platform: simulated}}\n"
    entry = "notify: [{name: ops, url: 'json://127.0.0.1:9/', on: [state]}]\n"

    def take(*resources: str) -> None:
        path = write_inventory(tmp_path, "".join(resources) + entry)
        with store.writing() as session:
            import_inventory(session, load_inventory(path), prepared_vault(tmp_path))

    take(rows.format("a"), rows.format("b"))
    with store.writing() as session:
        for name, over_at in ("a", 0.0), ("b", NOON + 2):
            session.add(Notice(receiver_id=1, kind="state", name=name, text=f"{name} is bad", ending="", times=1,
                               since_at=NOON, taken_at=NOON, over_at=over_at, told_at=NOON + 1))  # fmt: skip
    take(rows.format("a"))
    take("  - {name: b, was: a, platform: simulated}\n")
    with store.reading() as session:
        assert [(one.name, one.text) for one in session.scalars(sqlalchemy.select(Notice))] == [("b", "a is bad")]


class Lives:
    """As Alone, of a machine of several whose life changes."""

    is_shared = True

    def __init__(self, *, speaks: bool = True) -> None:
        self.members = self
        self.epoch, self.speaks, self.is_cut_off, self.names = "first", speaks, False, frozenset("ab")
        self.blames, self.aggregator = Alone.blames, Alone.aggregator

    @property
    def life(self) -> tuple[str, bool]:
        return self.epoch, self.is_cut_off and len(self.names) > 1

    @staticmethod
    def lives(_session: Any) -> bool:
        return True


@pytest.mark.parametrize("begins_again", [False, True], ids=["goes on", "begins again"])
def test_a_database_that_is_away_is_told(tmp_path: Path, store: Store, hook: Hook, *, begins_again: bool) -> None:
    """Although nothing can be read; and its end, also where others took this machine for dead meanwhile."""
    take_over(store, tmp_path, f"{{name: ops, url: 'json://{hook.place}/x', wait: 0, on: [problem]}}")
    recorder, lives = calm(store), Lives()
    notifier = Notifier(store, prepared_vault(tmp_path), recorder, "", cast("healthchecker.Monitor", lives))
    notifier.look(NOON)
    for name in ("event", "receiver"):
        execute(store.database, f"ALTER TABLE {name} RENAME TO {name}_away")
    recorder._unwritten.why = "it is away"
    look_until(notifier, hook, 1, NOON + 1)
    notifier.look(NOON + 2)
    for name in ("event", "receiver"):
        execute(store.database, f"ALTER TABLE {name}_away RENAME TO {name}")
    recorder._unwritten.why = ""
    lives.epoch = "second" if begins_again else "first"
    look_until(notifier, hook, 2, NOON + 60)
    notifier.close()
    first, second = (request.json for request in hook.requests)
    assert "it is away" in first["message"] and "again" in second["title"], second


def two_machines(folder: Path, store: Store, place: str, **speak: bool) -> Iterator[tuple[Lives, Notifier]]:
    """Each with its notifier, on the same database."""
    take_over(store, folder, f"{{name: ops, url: 'json://{place}/x', wait: 0}}")
    for speaks in speak.values():
        lives = Lives(speaks=speaks)
        yield lives, Notifier(store, prepared_vault(folder), calm(store), "", cast("healthchecker.Monitor", lives))


@pytest.mark.long
@pytest.mark.parametrize("speaks", ["the same", "another"])
@pytest.mark.parametrize("hangs", [False, True], ids=["has been delivered", "hangs"])
def test_what_was_told_before_a_cut_hears_its_end(
    tmp_path: Path, store: Store, hook: Hook, hangs: bool, speaks: str
) -> None:
    """The database is back while the message that it is away is on its way, or was not looked at again."""
    take_over(store, tmp_path, f"{{name: ops, url: 'json://{hook.place}/x', wait: 1, on: [gate, problem]}}")
    recorder, lives, others = calm(store), Lives(), Lives(speaks=False)
    vault = prepared_vault(tmp_path)
    one = Notifier(store, vault, recorder, "", cast("healthchecker.Monitor", lives))
    other = Notifier(store, vault, calm(store), "", cast("healthchecker.Monitor", others))
    one.look(NOON)
    happen(store, "gate", "closed")
    look_until(one, hook, 1, NOON + 10)
    one.look(NOON + 11)
    if speaks == "the same":
        with one._unkept.caught():
            raise OSError("its first write failed")
    lives.is_cut_off, hook.way = True, "slow" if hangs else ""
    recorder._unwritten.why = "it is away"
    one.look(NOON + 20)
    one.look(NOON + 25)
    wait_for(lambda: len(hook.requests) == 2 and one._deliveries.results.qsize() == (not hangs))
    lives.is_cut_off, lives.epoch = False, "second"
    recorder._unwritten.why = ""
    lives.speaks, others.speaks = speaks == "the same", speaks == "another"
    for now in (26, 27):
        for each in (other, one):
            each.look(NOON + now)
    hook.released.set()
    happen(store, "gate", "open", "closed -> open")
    for now in (45, 60, 90, 130, 200, 400):
        for each in (other, one):
            wait_for(lambda each=each: each._deliveries.results.qsize() == len(each._deliveries.threads))
            each.look(NOON + now)
    for each in (other, one):
        each.close()
    titles = [request.json["title"] for request in hook.requests]
    assert sum("open again" in title for title in titles) == 1, titles


@pytest.mark.long
@pytest.mark.parametrize("end", ["told", "refused", "killed"])
def test_what_is_on_its_way_when_another_one_speaks(tmp_path: Path, store: Store, hook: Hook, end: str) -> None:
    """Who began to send it says what became of that; a try that failed is made up for, and of one who was killed, too,
    once it would be over."""
    (lives, first), (others, second) = two_machines(tmp_path, store, hook.place, first=True, second=False)
    happen(store, "gate", "closed")
    hook.way = "slow"
    first.look(NOON)
    wait_for(lambda: len(hook.requests) == 1)
    lives.speaks, others.speaks = False, True
    for now in (NOON + 1, NOON + 2):
        first.look(now)
        second.look(now)
    assert not second._deliveries.threads and receivers(store)["ops"].message
    hook.way, hook.status = "", 200 if end == "told" else 500
    hook.released.set()
    wait_for(lambda: first._deliveries.results.qsize() == 1)
    hook.status = 200
    if end != "killed":
        first.look(NOON + 3)
        assert receivers(store)["ops"].delivered == (end == "told")
        first.look(NOON + 4)
        assert not first._announcers
    happen(store, "gate", "open", "closed -> open")
    for now in (NOON + 5, NOON + 6):
        second.look(now)
    look_until(second, hook, 2 if end == "told" else 3, NOON + 60)
    second.look(NOON + 120)
    first.close()
    second.close()
    assert [request.json["title"].rpartition(" is ")[2] for request in hook.requests] == (
        ["closed", "open again"] if end == "told" else ["closed", "closed", "open again"])


def test_who_speaks_beside_another_one_tells_nothing_twice(tmp_path: Path, store: Store, hook: Hook) -> None:
    """For a moment both do, and have read the rows before either has written."""
    (_, first), (_, second) = two_machines(tmp_path, store, hook.place, first=True, second=True)
    first.look(NOON - 1)
    second.look(NOON - 1)
    happen(store, "gate", "closed")
    first.look(NOON)
    for now in (NOON, NOON + 1, NOON + 2):
        second.look(now)
        assert not second._deliveries.threads
    look_until(first, hook, 1, NOON + 3)
    second.look(NOON + 60)
    second.look(NOON + 61)
    look_until(second, hook, 1, NOON + 62)
    first.close()
    second.close()


@pytest.mark.parametrize("others", ["", "b"], ids=["alone", "others"])
def test_who_is_cut_off_leaves_the_rows_to_others(tmp_path: Path, store: Store, hook: Hook, others: str) -> None:
    """What could not be delivered, and what waits; but that the database is away is told. Alone all of it goes on."""
    take_over(store, tmp_path, f"{{name: ops, url: 'json://{hook.place}/x', wait: 1, on: [gate, problem]}}")
    recorder, lives = calm(store), Lives()
    lives.names = frozenset("a" + others)
    notifier = Notifier(store, prepared_vault(tmp_path), recorder, "", cast("healthchecker.Monitor", lives))
    notifier.look(NOON)
    with store.writing() as session:
        record_event(session, "gate", "open -> closed", state="closed", at=NOON)
    hook.status = 503
    look_until(notifier, hook, 1, NOON + 10)

    def titles(now: float) -> list[str]:
        notifier.look(now)
        return [" ".join(request.json["title"].split()[1:]) for request in hook.requests]

    hook.status, lives.is_cut_off = 200, True
    recorder._unwritten.why = "it is away"
    notifier.look(NOON + 40)
    closed, away = "the gate is closed", "HealthChecker's database is in trouble"
    wait_for(lambda: titles(NOON + 100)[-1] == away and not notifier._deliveries.threads)
    assert titles(NOON + 101) == ([closed, away] if others else [closed, closed, away])
    lives.is_cut_off = False
    recorder._unwritten.why = ""
    well = "HealthChecker's database is well again"
    wait_for(lambda: titles(NOON + 200)[-1] == well and not notifier._deliveries.threads)
    notifier.close()
    assert titles(NOON + 201) == ([closed, away, closed, well] if others else [closed, closed, away, well])


def test_a_database_that_cannot_be_read_is_one_trouble(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is over when it can be, and not with the next step."""
    caplog.set_level(logging.INFO)
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    execute(store.database, "ALTER TABLE receiver RENAME TO gone")
    notifier.start()
    wait_for(lambda: "receiver" in caplog.text)
    notifier.close()
    assert "that is over" not in caplog.text
    execute(store.database, "ALTER TABLE gone RENAME TO receiver")
    notifier.look(NOON)
    assert caplog.text.count("that is over, after") == 1


@pytest.mark.long
def test_what_is_given_up_is_an_event_and_shown(tmp_path: Path, store: Store, hook: Hook,
                                                caplog: pytest.LogCaptureFixture) -> None:
    hook.status = 500
    take_over(store, tmp_path, f"{{name: ops, url: 'json://u:s3cret@{hook.place}/x', wait: 0}}")
    happen(store, "gate", "closed")
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    with caplog.at_level(logging.DEBUG):
        look_until(notifier, hook, 1, NOON + 1)
        look_until(notifier, hook, 2, NOON + 2 + RETRY_TIME)
        notifier.look(NOON + 3 + RETRY_TIME)
    notifier.close()
    row = receivers(store)["ops"]
    assert (row.failed, row.trouble, row.message) == (1, "the answer was 500", "")
    assert "could not be delivered before" in hook.requests[1].json["message"]
    with store.reading() as session:
        assert "a notification to ops was given up: the answer was 500" in [
            event.text for event in events(session, kind="service")]
    access = ConnectionContext(KnownHosts(tmp_path / "known_hosts"), Resolver())
    metrics = generate_latest(cast(Any, Metrics(ServingMetrics(Lease(), Counters(1)), store, None, access))).decode()
    for result, count in (("failed", 1), ("delivered", 0)):
        assert f'healthchecker_notifications_total{{receiver="ops",result="{result}"}} {count}.0' in metrics
    assert "s3cret" not in caplog.text and "ops was not told: the answer was 500" in caplog.text


@pytest.mark.long
def test_a_reload_takes_receivers_up(tmp_path: Path, store: Store, hook: Hook) -> None:
    """Without a restart; a new one hears nothing of the past."""
    take_over(store, tmp_path, f"{{name: ops, url: 'json://{hook.place}/ops', wait: 0}}")
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    happen(store, "gate", "closed")
    look_until(notifier, hook, 1, NOON)
    take_over(store, tmp_path, f"{{name: new, url: 'json://{hook.place}/new', wait: 0}}")
    notifier.look(NOON + 50)
    happen(store, "gate", "open")
    notifier.look(NOON + 60)
    happen(store, "gate", "closed")
    look_until(notifier, hook, 2, NOON + 70)
    notifier.close()
    assert [got.path for got in hook.requests] == ["/ops", "/new"]


@pytest.mark.parametrize("late", [False, True], ids=["after its failure", "before it was seen"])
def test_a_receiver_that_is_corrected_is_tried_at_once(late: bool, tmp_path: Path, store: Store, hook: Hook) -> None:
    """Not when the pause has passed that its wrong URL brought about, or will yet: it may be asked just then."""
    entry = f"{{name: ops, url: 'json://{hook.place}/x', wait: 0}}"
    take_over(store, tmp_path, "{name: ops, url: 'json://127.0.0.1:1', wait: 0}")
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    happen(store, "gate", "closed")
    notifier.look(NOON)
    wait_for(lambda: notifier._deliveries.results.qsize() == 1)
    if not late:
        notifier.look(NOON)
        assert receivers(store)["ops"].next_at == NOON + 10
    take_over(store, tmp_path, entry)
    look_until(notifier, hook, 1, NOON + 1)
    notifier.close()
    assert len(hook.requests) == 1


DB = frozenset({"db"})


def test_a_picture_of_the_rows(tmp_path: Path, store: Store) -> None:
    take_over(store, tmp_path, "{name: ops, url: 'json://h'}")
    status = {"settings_digest": "", "credential_digest": "", "cause": "check", "reason": "check why", "good": 0,
              "bad": 3, "polled_at": NOON, "seconds": 1.0, "sample": "null"}
    with store.writing() as session:
        row = session.scalars(sqlalchemy.select(Resource)).one()
        session.add(Maintenance(state="begun", start_at=NOON - 1, until_at=NOON + 10, scope='{"resources": ["this"]}',
                                reason="disks"))
        session.add(healthchecker.Status(resource_id=row.id, state="unhealthy", since_at=NOON - 9, **status))
    with store.reading() as session:
        picture = take_picture(session, [], {}, NOON, ALONE)
        assert picture.unhealthy == {"this": Lasting(NOON - 9, "check why", DB)} and picture.excused == {"this"}
        assert take_picture(session, [], {}, NOON + 11, ALONE).excused == set()


def test_pictures_of_maintenance(tmp_path: Path, store: Store) -> None:
    """What is of a tag is not of everything, and two that overlap are two."""
    take_over(store, tmp_path)
    times: dict[str, Any] = {"state": "begun", "start_at": NOON - 1, "until_at": NOON + 10, "reason": "disks"}
    with store.writing() as session:
        for scope in ('{"all": true}', '{"tags": ["web"]}', '{"groups": ["web"]}'):
            session.add(Maintenance(**times, scope=scope))
        session.add(Maintenance(**times | {"until_at": NOON - 1}, scope='{"resources": ["this"]}'))
        session.add(Maintenance(**times | {"state": "planned"}, scope='{"resources": ["this"]}'))
    with store.reading() as session:
        works = take_picture(session, [], {}, NOON, ALONE).works
    assert works.keys() == {"everything", "tag web", "group web"}
    assert works["tag web"].why.endswith(": disks") and works["tag web"].since_at == NOON - 1
    assert works["everything"].tags == DB and not works["tag web"].tags


@pytest.mark.long
def test_a_receiver_with_a_new_name(tmp_path: Path, store: Store, hook: Hook) -> None:
    """It has the same URL: what was told under the old name gets its end, once; another URL is another receiver."""
    url = f"json://{hook.place}/x"
    take_over(store, tmp_path, f"{{name: ops, url: '{url}', wait: 0}}", "{name: also, url: 'json://h'}")
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    happen(store, "gate", "closed")
    look_until(notifier, hook, 1, NOON)
    take_over(store, tmp_path, "{name: also, url: 'json://h'}", f"{{name: night, url: '{url}', wait: 0}}")
    assert receivers(store).keys() == {"also", "night"} and receivers(store)["night"].delivered == 1
    notifier.look(NOON + 1)
    happen(store, "gate", "open")
    look_until(notifier, hook, 2, NOON + 2)
    notifier.close()
    assert hook.requests[1].json["title"] == "HealthChecker: the gate is open again"
    assert take_over(store, tmp_path, f"{{name: night, url: '{url}', wait: 0}}",
                     f"{{name: later, url: '{url}', wait: 0, after: 30}}") == ["who is told"]
    assert receivers(store)["later"].delivered == 0


def test_a_reload_while_a_message_arrives(tmp_path: Path, store: Store, hook: Hook) -> None:
    """What is taken up anew is what is known by then: the message is not sent again."""
    entry = f"{{name: ops, url: 'json://{hook.place}/x', wait: 0}}"
    take_over(store, tmp_path, entry)
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    happen(store, "gate", "closed")
    notifier.look(NOON)
    wait_for(lambda: notifier._deliveries.results.qsize() == 1)
    take_over(store, tmp_path, entry, "{name: new, url: 'json://h'}")
    notifier.look(NOON + 1)
    assert receivers(store)["ops"].delivered == 1 and not notifier._deliveries.threads
    notifier.close()
    assert len(hook.requests) == 1


@pytest.mark.long
def test_a_reload_after_what_could_not_be_kept(tmp_path: Path, store: Store, hook: Hook) -> None:
    entry = f"{{name: ops, url: 'json://{hook.place}/x', wait: 0}}"
    take_over(store, tmp_path, entry)
    notifier = Notifier(store, prepared_vault(tmp_path), calm(store), "", ALONE)
    notifier.look(NOON)
    happen(store, "gate", "closed")
    with refusing(store.database, "UPDATE ON receiver", "NEW.message != ''"):
        notifier.look(NOON + 1)
    take_over(store, tmp_path, entry, "{name: new, url: 'json://h'}")
    look_until(notifier, hook, 1, NOON + 2)
    notifier.look(NOON + 30)
    notifier.look(NOON + 60)
    assert not notifier._deliveries.threads and receivers(store)["ops"].delivered == 1
    notifier.close()
    assert len(hook.requests) == 1


@pytest.mark.long
def test_killed_between_event_and_delivery(tmp_path: Path, hook: Hook) -> None:
    """What was on its way is sent again after the next start, with the time that it is of."""
    prepared_database(tmp_path)
    path = write_inventory(tmp_path, "  - {name: bad, platform: simulated, mean_healthy: 0.000001,"
                                     " mean_unhealthy: 1000000, interval: 1}\n")
    text = f"notify:\n  - {{name: ops, url: 'json://{hook.place}/x?rto=60', wait: 0}}\n"
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
    hook.way = "hang"
    service = Service(path)
    service.__enter__()
    try:
        wait_for(lambda: bool(hook.requests), 60)
    finally:
        service.kill()
    hook.way, first = "", hook.requests[0].json["message"]
    hook.released.set()
    with Service(path):
        wait_for(lambda: len(hook.requests) > 1, 60)
        with contextlib.closing(Store(database_in(tmp_path))) as store:
            wait_for(lambda: receivers(store)["ops"].delivered == 1, 60)
    again = hook.requests[1].json["message"]
    assert again.startswith(first.rpartition("\n")[0])
    assert hook.requests[0].json["title"].startswith("HealthChecker: the gate is closed")


@pytest.mark.long
def test_groups_that_open_while_no_service_runs(tmp_path: Path, hook: Hook) -> None:
    """Killed while a group and a route are closed: who was told of that hears of their end after the next start."""
    prepared_database(tmp_path)
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))     # nobody listens there yet
        rows = "".join(f"  - {{name: {name}}}\n" for name in (
            f"aside, platform: tcp, hostname: 127.0.0.1, port: {door.getsockname()[1]}, interval: 1, retry_interval: 1,"
            " timeout: 2, fall: 1, rise: 1", "calm, platform: simulated, mean_healthy: 1000000"))
        path = write_inventory(tmp_path, rows)
        text = (f"groups: [{{name: shop, members: [aside, calm]}}]\nroutes: {{/reports: [shop]}}\nnotify:\n"
                f"  - {{name: ops, url: 'json://{hook.place}/x', wait: 0, on: [group]}}\n")
        path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")

        def said(*lines: str) -> bool:
            """Whether all of these were told, and that is written down."""
            told = "\n".join(request.json["message"] for request in hook.requests)
            row = receivers(store)["ops"] if all(line in told for line in lines) else None
            return row is not None and not row.message and row.delivered == len(hook.requests)

        with contextlib.closing(Store(database_in(tmp_path))) as store:
            service = Service(path)
            service.__enter__()
            try:
                wait_for(lambda: said("shop: closed (aside: ", "/reports: closed (shop: "))
            finally:
                service.kill()
            door.listen()
            with Service(path):
                wait_for(lambda: said("shop: open again, ", "/reports: open again, "))


def seen_of(process: int) -> bytes:
    """What other programs of this machine can see of a process and of what it started: arguments, environment."""
    found, waiting = b"", [process]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        with contextlib.suppress(OSError):      # it has ended
            found += (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.of_files
def test_a_url_is_nowhere_to_be_seen(tmp_path: Path, hook: Hook) -> None:
    """Of those given by variables: not in the process list while a message is on its way, nor in anything that is
    written or shown, whatever went wrong with it."""
    prepared_database(tmp_path)
    path = with_notify(tmp_path, "{name: ops, url_env: OPS_URL, wait: 0}", "{name: odd, url_env: ODD_URL, wait: 0}",
                       service=f"  heartbeat_env: BEAT_URL\n  log_file: {tmp_path}/log\n")
    path.write_text(path.read_text(encoding="utf-8").replace(
        RESOURCES, "  - {name: this, platform: simulated, mean_healthy: 0.000001, mean_unhealthy: 1000000}\n"))
    urls = {"OPS_URL": f"json://u:s3cret@{hook.place}/s3cret?+Key=s3cret&rto=60", "ODD_URL": "slack://s3cret",
            "BEAT_URL": f"http://{hook.place}/s3cret"}
    hook.way = "hang"
    with Program(path, env=urls) as service:
        wait_for(lambda: any(got.path.startswith("/s3cret") and got.body for got in hook.requests), 60)
        assert b"s3cret" not in seen_of(service.pid)
        hook.status, hook.way = 500, ""
        hook.released.set()
        with contextlib.closing(Store(tmp_path / "healthchecker.db")) as store:
            wait_for(lambda: all(row.trouble for name, row in receivers(store).items() if name), 60)
        shown = service.get_console("/-/metrics").body + run(path, "check", env=urls).stdout
        shown += run(path, "maintenance", "list").stdout
        assert run(path, "backup", str(tmp_path / "saved.tgz"), env=urls).returncode == 0
    with tarfile.open(tmp_path / "saved.tgz") as saved:
        saved.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)    # it is ours
        saved.extractall(tmp_path / "saved")
    shown += service.output
    assert "s3cret" not in shown and "ops" in shown
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"s3cret" not in file.read_bytes(), file


def test_notify_test(tmp_path: Path, hook: Hook) -> None:
    """One line and an exit code; nothing shows the URL."""
    prepared_keys(tmp_path)
    path = with_notify(tmp_path, f"{{name: ops, url: 'json://u:s3cret@{hook.place}/x'}}")
    done = run(path, "notify", "test", "ops")
    assert (done.returncode, done.stdout) == (0, "ops: delivered\n")
    assert hook.requests[0].json["title"] == "HealthChecker: a test"
    hook.status = 403
    done = run(path, "notify", "test", "ops")
    assert (done.returncode, done.stdout) == (1, "ops: not delivered: the answer was 403\n")
    done = run(path, "notify", "test", "opps")
    assert done.returncode == 2 and "did you mean ops?" in done.stderr
    done = run(with_notify(tmp_path), "notify", "test", "ops")
    assert (done.returncode, done.stderr) == (2, "inventory.yaml names nobody to notify\n")


# --- what another is to blame for


def picture_of(house: House) -> Picture:
    house.monitor.flush()
    with house.store.reading() as session:
        return take_picture(session, [], {}, house.store.wall(), house.monitor)


def poll(house: House, machines: Machines, behaviour: Any, *names: str) -> None:
    machines.behaviours |= dict.fromkeys(names, behaviour)
    for name in names:
        house.poller(name).poll_now().result(60)


def notify(house: House, hook: Hook, settings: str) -> None:
    """Has the inventory name a receiver."""
    path = house.folder / "inventory.yaml"
    entry = f"notify:\n  - {{name: ops, url: 'json://{hook.place}/x', {settings}}}\n"
    path.write_text(path.read_text(encoding="utf-8") + entry, encoding="utf-8")
    with house.store.writing() as session:
        import_inventory(session, load_inventory(path), house.vault)


@pytest.mark.long
def test_of_what_is_behind_another_nobody_is_told(house: House, machines: Machines, hook: Hook) -> None:
    """Neither while that is down nor after it, until its own results say something; the lines of the gate are the
    cause's alone, and who has seen that is not reminded."""
    house.write("name: switch, fall: 1, rise: 1, interval: 300", "name: web, depends_on: [switch], fall: 1, rise: 1,"
                " interval: 300")
    notify(house, hook, "wait: 0, on: [gate, state], remind: 1")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        notifier = Notifier(house.store, house.vault, calm(house.store), "", house.monitor)
        now = house.store.wall()

        def look(count: int, after: float) -> str:
            house.monitor.flush()
            look_until(notifier, hook, count, now + after)
            return "\n".join(f"{got.json['title']}\n{got.json['message']}" for got in hook.requests[-1:])

        look(0, 0)
        poll(house, machines, unreachable, "switch", "web")
        house.monitor.flush()
        assert house.stored("web") == ("unhealthy", "unreachable")
        said = look(1, 10)
        assert said.startswith("HealthChecker: the gate is closed, 1 unhealthy, and 1 more\n") and "\nweb: " not in said
        look(1, 20)
        with house.store.writing() as session:
            row = session.scalars(sqlalchemy.select(Resource).where(Resource.name == "switch")).one()
            session.add(healthchecker.Acknowledgement(resource_id=row.id, at=NOON, actor="me", comment="on my way"))
        look(1, 4000)
        poll(house, machines, good, "switch")
        said = look(2, 4010)
        assert "switch: healthy again" in said and not house.aggregator.is_healthy(), "web was not polled yet"
        look(2, 4020)
        poll(house, machines, good, "web")
        assert look(3, 4030).startswith("HealthChecker: the gate is open again\nthe gate: open again, ")
        notifier.close()


def test_who_is_to_blame(house: House, machines: Machines) -> None:
    """Also one that is not critical, for who counts and is behind it; what is bad by itself is told when that is
    known."""
    house.write("name: switch, fall: 1, rise: 1, interval: 300, critical: false",
                "name: web, depends_on: [switch], fall: 1, rise: 1, interval: 300",
                "name: db, depends_on: [switch], interval: 300")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        poll(house, machines, unreachable, "switch", "web")
        picture = picture_of(house)
        assert picture.unhealthy.keys() == {"switch", "web", "db"} and picture.keepers().keys() == {"switch"}
        closed = NoticeRow(1, "gate", "", "", "", 1, NOON, NOON, 0.0, 0.0)
        assert is_seen_to(closed, picture._replace(acknowledged=["switch"]))
        maintain(house, "web", 3600)
        maintain(house, "db", 3600)
        wait_for(house.aggregator.is_healthy)
        assert not picture_of(house).keepers()
        house.elsewhere("DELETE FROM maintenance")
        wait_for(lambda: not house.aggregator.is_healthy())
        poll(house, machines, good, "switch")
        picture = picture_of(house)
        assert picture.unhealthy.keys() == {"web"} and not picture.keepers(), "its next result decides"
        assert house.monitor.blames("web") == "untold"
        poll(house, machines, unreachable, "web")
        assert picture_of(house).keepers().keys() == {"web"}


def test_an_outage_that_is_over_before_its_row_says_so_is_told(house: House, machines: Machines, hook: Hook) -> None:
    """The notifier looked between a poll and its row, and took what was over for another's fault."""
    house.write("name: db, fall: 1, rise: 1, interval: 300")
    notify(house, hook, "wait: 30, on: [state]")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        notifier = Notifier(house.store, house.vault, calm(house.store), "", house.monitor)
        now = house.store.wall()
        notifier.look(now)
        poll(house, machines, unreachable, "db")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(healthchecker.Recorder, "flush", lambda _: None)  # by its thread
            house.monitor.flush()
            notifier.look(now + 1)
            poll(house, machines, good, "db")
            assert house.stored("db") == ("unhealthy", "unreachable") and house.monitor.blames("db") == "unsure"
            notifier.look(now + 2)
        house.monitor.flush()
        look_until(notifier, hook, 1, now + 40)
        assert hook.requests[0].json["title"] == "HealthChecker: db was unhealthy"
        notifier.close()


# --- the heartbeat


def test_the_heartbeat(tmp_path: Path, store: Store, hook: Hook) -> None:
    """Asked while the database can be written; who does not answer is shown."""
    access = ConnectionContext(KnownHosts(tmp_path / "known_hosts"), Resolver())
    take_over(store, tmp_path, service=f"  heartbeat: 'http://{hook.place}/ping/s3cret'\n")
    heart = Heartbeat(store, prepared_vault(tmp_path), access, lambda: True)
    heart.beat(NOON)
    assert [got.path for got in hook.requests] == ["/ping/s3cret"]
    with store.reading() as session:
        assert session.get(Setting, "heartbeat").value == NOON
    hook.status = 302
    hook.headers = {"Location": f"http://{hook.place}/s3cret"}
    with pytest.raises(healthchecker.ProbeError) as error:
        heart.beat(NOON + 120)
    assert "s3cret" not in str(error.value) and "302" in receivers(store)[store.own("")].trouble
    hook.status = 200
    heart.beat(NOON + 180)
    assert receivers(store)[store.own("")].trouble == ""
    take_over(store, tmp_path)
    heart.beat(NOON + 240)
    assert len(hook.requests) == 3


def test_a_heart_beats_again_and_again(
    tmp_path: Path, store: Store, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every minute; here the minutes are shorter. One that nobody answers is followed by the next all the same."""
    assert healthchecker.HEARTBEAT_INTERVAL == 60
    for name in ("HEARTBEAT_INTERVAL", "NOTIFY_INTERVAL"):
        monkeypatch.setattr(healthchecker, name, 0.02)
    take_over(store, tmp_path, service=f"  heartbeat: 'http://{hook.place}/ping'\n")
    hook.status, access = 500, ConnectionContext(KnownHosts(tmp_path / "known_hosts"), Resolver())
    heart = Heartbeat(store, prepared_vault(tmp_path), access, lambda: True)
    heart.start()
    wait_for(lambda: len(hook.requests) > 2)
    heart.close()
    heart.join()


def test_a_heart_beats_as_soon_as_all_is_well(
    tmp_path: Path, store: Store, hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a minute after a start; and that a failure is over is said of a beat alone."""
    monkeypatch.setattr(healthchecker, "NOTIFY_INTERVAL", 0.02)
    caplog.set_level(logging.INFO)
    take_over(store, tmp_path, service=f"  heartbeat: 'http://{hook.place}/ping'\n")
    looks, access, well = [0], ConnectionContext(KnownHosts(tmp_path / "known_hosts"), Resolver()), [False]

    def is_well() -> bool:
        looks[0] += 1
        return well[0]

    heart = Heartbeat(store, prepared_vault(tmp_path), access, is_well)
    heart.start()
    try:
        wait_for(lambda: looks[0] > 3)
        assert not hook.requests
        monkeypatch.setattr(healthchecker, "HEARTBEAT_INTERVAL", 0.02)
        well[0], hook.status = True, 500
        wait_for(lambda: "the heartbeat is not told: " in caplog.text)
        well[0], before = False, looks[0]
        wait_for(lambda: looks[0] > before + 3)
        assert "that is over" not in caplog.text
        well[0], hook.status = True, 200
        wait_for(lambda: "that is over" in caplog.text)
    finally:
        heart.close()
        heart.join()


def test_what_a_heartbeat_says(tmp_path: Path, store: Store) -> None:
    """That those live who watch, that their findings can be written, and that the gate is open."""
    clock = [lease_clock()]
    aggregator = HealthAggregator(clock=lambda: clock[0])
    recorder = Recorder(store, aggregator)
    aggregator.register("a")
    aggregator.start()
    aggregator.set_resource("a", True, ttl=1e6)
    aggregator.beat("monitor", 1e6)
    assert not is_service_well(aggregator, recorder), "nobody writes"
    recorder.start()
    try:
        wait_for(lambda: is_service_well(aggregator, recorder))
        aggregator.set_resource("a", False, "on fire")
        assert not is_service_well(aggregator, recorder), "the gate is closed"
        aggregator.set_resource("a", True, ttl=1e6)
        assert is_service_well(aggregator, recorder)
        aggregator.beat("monitor", -1.0)
        assert not is_service_well(aggregator, recorder), "nobody watches"
        aggregator.beat("monitor", 1e6)
        recorder.incidents.unserved = lambda: "no worker is ready"
        assert not is_service_well(aggregator, recorder), "nobody serves"
        assert healthchecker.service_problems(recorder) == {"workers": "no worker is ready"}
        recorder.incidents.unserved = str
        with refusing(store.database, "INSERT ON event"):
            recorder.note("service", "something", NOON)
            wait_for(lambda: not is_service_well(aggregator, recorder))
        wait_for(lambda: is_service_well(aggregator, recorder))
    finally:
        recorder.close()


def test_a_service_beats(tmp_path: Path, hook: Hook) -> None:
    prepared_database(tmp_path)
    with Service(write_inventory(tmp_path, service=f"  heartbeat: 'http://{hook.place}/ping'\n")):
        wait_for(lambda: bool(hook.requests), 60)


def test_what_was_written_just_now_is_told_once(tmp_path: Path, store: Store, hook: Hook) -> None:
    """Its writer has not yet forgotten it."""
    take_over(store, tmp_path, f"{{name: ops, url: 'json://{hook.place}/x', wait: 0}}")
    recorder = calm(store)
    assert recorder.flush()
    for state in ("closed", "open"):
        happen(store, "gate", state)
        recorder.note("gate", "it is so", NOON, state=state)
    recorder._gather(speaks=True)
    recorder._unwritten.why = "it was full a moment ago"
    notifier = Notifier(store, prepared_vault(tmp_path), recorder, "", ALONE)
    notifier.look(NOON + 1)
    recorder._events.clear()
    look_until(notifier, hook, 1, NOON + 2)
    notifier.close()
    [told] = hook.requests
    assert told.json["title"] == "HealthChecker: the gate was closed" and "times" not in told.json["message"]


@pytest.mark.long
def test_a_service_that_cannot_write_tells_of_its_gate(tmp_path: Path, hook: Hook) -> None:
    """As where the disk is full: then, and no second time when it can."""
    prepared_database(tmp_path)
    door = socket.create_server(("127.0.0.1", 0))
    place = door.getsockname()
    path = write_inventory(tmp_path, f"  - {{name: web, platform: tcp, hostname: 127.0.0.1, port: {place[1]}, "
                                     "interval: 1, retry_interval: 1, timeout: 1, rise: 1, fall: 1}\n")
    entry = f"notify: [{{name: ops, url: 'json://{hook.place}/x', wait: 0}}]\n"
    path.write_text(path.read_text(encoding="utf-8") + entry, encoding="utf-8")
    with contextlib.ExitStack() as stack:
        service, store = stack.enter_context(Service(path, deadline=60)), Store(database_in(tmp_path))
        stack.enter_context(contextlib.closing(store))
        service.wait_status("/", 200)

        def last_event() -> int:
            with store.reading() as session:
                return max([event.id for event in events(session, kind="gate")], default=0)

        before = wait_for(last_event)
        with refusing(store.database, "INSERT ON event"):
            door.close()
            service.wait_status("/", 503)
            wait_for(lambda: hook.requests)
            stack.enter_context(socket.create_server(place))
            service.wait_status("/", 200)
            wait_for(lambda: len(hook.requests) > 1)
            assert last_event() == before
        wait_for(lambda: receivers(store)["ops"].cursor >= last_event() > before)
    assert [request.json["title"] for request in hook.requests] == [
        "HealthChecker: the gate is closed", "HealthChecker: the gate is open again"]


def test_work_of_many_by_name(tmp_path: Path) -> None:
    """Its begin, reason and end are told apart, and what was told can be kept (PostgreSQL indexes 2,704 bytes)."""
    names = [f"{hashlib.sha256(b'%d' % number).hexdigest()}.example.com" for number in range(300)]
    with contextlib.closing(store_in(tmp_path)) as store:
        begun, now = Scope(resources=tuple(names)), store.wall()
        with store.writing() as session:
            session.add(Receiver(name="ops", url="x", joined_at=0.0, cursor=0,
                                 settings=json.dumps({"name": "ops", "on": ["maintenance"], "wait": 0})))
            row = Maintenance(scope=begun.scope_json, reason="disks", state="planned", start_at=now,
                              until_at=now + 3600, actor="a")
            session.add(row)
            healthchecker.begin_work(session, row, now)
        notifier, told = Notifier(store, cast(Any, None), calm(store), "http://127.0.0.1/", ALONE), []
        notifier._dispatch = lambda *_: None  # type: ignore[method-assign]  # nothing is sent
        for _ in range(2):
            notifier._looked_at = 0.0
            notifier.look(store.wall())
            assert not notifier._unkept.why
            [announcer] = notifier._announcers.values()
            told.append(json.loads(announcer.row.message)[:2])
            announcer.take_result(Delivery(True), store.wall())
            with store.writing() as session:
                for row in session.scalars(sqlalchemy.select(Maintenance)):
                    healthchecker.finish_work(session, row, "maintenance is over", store.wall())
        with store.reading() as session:
            texts = [event.text for event in healthchecker.events(session)]
    assert told[0][0] != told[1][0] and ": disks" in told[0][1] and "no longer in maintenance" in told[1][1]
    assert len({*texts}) == 2 and all("299 more" in text for text in texts)
    assert begun.brief != Scope(resources=(*names, "one")).brief != Scope(resources=(*names, "two")).brief


def test_a_long_reason_leaves_room_for_when_and_how_often() -> None:
    desk = Desk(on=["state"])
    for _ in range(2):
        desk.happens("state", "unhealthy", "check replication: " + "the lag is too high; " * 20, "db1")
        desk.now += 3
        desk.happens("state", "healthy", "it is well", "db1")
        desk.now += 3
    desk.until(60)
    [(_, _, body)] = desk.said
    assert " to " in body and "2 times" in body, body
