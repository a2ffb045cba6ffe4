"""What machines on one database write and hear of each other, step by step: no thread of theirs runs but the one that
says that it lives. How whole services share the work: test_sharing.py."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, cast

import pytest
from conftest import wait_for
from postgres import PASSWORD, Postgres, Program, open_pgbouncer
from pydantic import SecretStr

import healthchecker
from healthchecker import (
    CLAIM_LIFE,
    TAKE_OVER,
    Claim,
    Company,
    ConnectionContext,
    Deadline,
    Exchange,
    Gates,
    HealthAggregator,
    KnownHosts,
    LoginGuard,
    LoginJournal,
    LoginRecord,
    Membership,
    Platform,
    PollContext,
    Poller,
    PostgresServer,
    ProbeError,
    Recorder,
    Resolver,
    Resource,
    ResourceSettings,
    Sample,
    Store,
    Target,
    Verdict,
    lease_clock,
    owner_of,
    written_logins,
)

GOOD, DOWN = Verdict("healthy"), Verdict("unhealthy", "unreachable", "no route")
REFUSED = Verdict("unhealthy", "auth", "refused")
READ = Sample({}, {}, None, {}, {}, {})


class Machine:
    """A service on the database but for its threads."""

    def __init__(self, name: str, url: str, names: tuple[str, ...], heard: str = "", **more: Any) -> None:
        """`heard`: the URL by which it says that it lives, if that is another one."""
        server, place = (PostgresServer(each, SecretStr(PASSWORD)) for each in (url, heard or url))
        self.name, self.url, self.stack = name, url, contextlib.ExitStack()
        self.store = Store(server, machine=name)
        self.stack.callback(self.store.close)
        self.claim = self.stack.enter_context(place.lock(machine=name))
        assert isinstance(self.claim, Claim)
        self.claim.is_able = lambda: True
        self.members = Membership(self.claim)
        self.aggregator = HealthAggregator(wall=self.store.wall)
        self.recorder = Recorder(self.store, self.aggregator, members=self.members)
        access = ConnectionContext(KnownHosts(Path("none")), Resolver())
        self.guards = access.guards
        context = PollContext(self.aggregator, self.recorder, access, random.Random(1), members=self.members)
        self.exchange = Exchange(self.store, context)
        self.exchange.begin(self.store.wall)
        self.pollers = {target.name: Poller(target, context, self.guards.of(target), 0.0) for target in targets(
            self.store, names, **more)}  # fmt: skip
        for each, poller in self.pollers.items():
            self.aggregator.register(each, poller)
            poller.counted = True
        self.aggregator.start()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 ) -> None:  # fmt: skip
        self.stack.close()

    def look(self) -> None:
        self.exchange.look(self.pollers)

    def find(self, name: str, *verdicts: Verdict) -> None:
        """Its polls of a resource, each with a login, which are written."""
        guard = self.guards.of(self.pollers[name].target)
        for verdict in verdicts:
            self.pollers[name]._epoch = self.members.epoch
            guard.ask(name)
            with contextlib.suppress(ProbeError), self.writing(), guard.attempt(name, Deadline(5), LoginRecord()):
                if verdict.cause == "auth":
                    raise ProbeError("auth", verdict.reason)
            self.pollers[name]._report(verdict, 0.1, READ if verdict.healthy else None)
        self.recorder.flush()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What a login waits for is written."""
        def write() -> None:
            while not done.wait(0.01):
                self.recorder.flush()

        done = threading.Event()
        with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
            stack.callback(done.set)
            pool.submit(write)
            yield

    def knows(self, *names: str) -> bool:
        return self.members.names == {*names}

    def execute(self, statement: str) -> list[Any]:
        with self.store.reading() as session:
            return [tuple(row) for row in session.connection().exec_driver_sql(statement)]


def targets(store: Store, names: tuple[str, ...], **more: Any) -> list[Target]:
    """The same for all machines."""
    found = []
    with store.writing() as session:
        for name in names:
            settings = ResourceSettings(
                name=name, platform="linux", hostname="192.0.2.1", username="u", password="p", **more)  # fmt: skip
            row = session.query(Resource).filter_by(name=name).one_or_none() or Resource(origin="inventory")
            row.take_settings(settings)
            session.add(row)
            session.flush()
            found.append(Target(row.id, settings, None, row.settings_digest, row.credential_digest))
    return found


def owned_by(machine: str, count: int, among: str = "ab") -> tuple[str, ...]:
    """Names of resources that are this machine's."""
    names = (f"h{number}" for number in range(1000))
    return tuple([name for name in names if owner_of(name, frozenset(among)) == machine][:count])


Two = Callable[..., "tuple[Machine, Machine]"]


@pytest.fixture
def two(postgres: Postgres) -> Iterator[Two]:
    """Machines a and b, which know each other."""
    with contextlib.ExitStack() as stack:
        def make(*names: str, **more: Any) -> tuple[Machine, Machine]:
            url = postgres.url(postgres.prepared())
            a, b = (stack.enter_context(Machine(name, url, names, **more)) for name in "ab")
            wait_for(lambda: a.knows("a", "b") and b.knows("a", "b"), 60)
            for machine in (a, b):
                machine.look()
            return a, b

        yield make


# --- time
@pytest.mark.long
def test_an_answer_that_is_late_makes_nothing_newer(postgres: Postgres, pgbouncer: Program) -> None:
    """What another machine found counts from then on, however long the database's word of that was on its way."""
    name, [host] = postgres.prepared(), owned_by("b", 1)
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(Machine(each, postgres.url(name, port), (host,)))
                for each, port in (("a", pgbouncer.port), ("b", postgres.port)))  # fmt: skip
        wait_for(lambda: a.knows("a", "b") and b.knows("a", "b"), 60)
        for machine in (a, b):
            machine.look()
        b.find(host, GOOD)
        locker = stack.enter_context(contextlib.closing(b.store.database.connect()))
        locker.execute("BEGIN; LOCK TABLE result")
        looking = stack.enter_context(ThreadPoolExecutor(1)).submit(a.look)
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
        wait_for(lambda: postgres.execute(waits))
        os.kill(pgbouncer.process.pid, signal.SIGSTOP)
        try:
            locker.execute("COMMIT")
            wait_for(lambda: not postgres.execute(waits))
            answered_mono = time.monotonic()
            wait_for(lambda: time.monotonic() > answered_mono + 1)
        finally:
            os.kill(pgbouncer.process.pid, signal.SIGCONT)
        looking.result(60)
        assert a.pollers[host].standing.state == "healthy"
        assert a.pollers[host]._found_mono < b.pollers[host]._found_mono + 0.1


# --- logins
@pytest.mark.long
def test_what_another_machine_was_accepted_with(two: Two) -> None:
    """Clears its refusals here, too; that rise has not been reached is no refusal."""
    names = owned_by("b", 2)
    a, b = two(*names)
    guard = a.guards.of(a.pollers[names[0]].target)
    for name in names:
        b.find(name, REFUSED, REFUSED)
        a.look()
        assert a.pollers[name].standing.cause == "auth" and guard.wait(name) > 0
        b.find(name, GOOD)
        a.look()
        assert a.pollers[name].standing.cause == "auth" and guard.wait(name) == 0
        b.find(name, GOOD)
        a.look()
        assert (guard.wait(name), guard.refusals) == (0, 0)


@pytest.mark.long
def test_all_refusals_of_another_machine_are_heard(two: Two) -> None:
    """Also the first one, which closes nothing yet, and those that were not read one by one."""
    first, second = owned_by("b", 2)
    a, b = two(first, second)
    guard = a.guards.of(a.pollers[first].target)
    b.find(first, REFUSED)
    a.look()
    assert a.pollers[first].standing.state != "healthy" or guard.refusals == 1
    assert guard.wait(first) > 0
    b.find(second, REFUSED, REFUSED, REFUSED)
    a.look()
    assert guard.refusals == 4 and guard.wait(second) > 1800


def push(machine: Machine, name: str) -> None:
    """Has a resource report by itself."""
    target, news = machine.pollers[name].target, machine.pollers[name].news
    settings = target.settings.model_copy(update={"platform": Platform.PUSH})
    machine.pollers[name].target, news.doubt._asked = replace(target, settings=settings), False


@pytest.mark.long
@pytest.mark.parametrize("platform", [Platform.PUSH, Platform.LINUX])
def test_what_was_said_in_a_life_that_is_over(platform: Platform, two: Two) -> None:
    """By a resource itself, which will not say it again; who is asked is asked again."""
    [name] = owned_by("a", 1)
    a, b = two(name)
    poller = a.pollers[name]
    if platform is Platform.PUSH:
        push(a, name)
    poller._epoch = "the one before"
    poller._report(GOOD, 0.1, READ)
    a.recorder.flush()
    b.look()
    assert b.pollers[name].standing.healthy is (platform is Platform.PUSH)


@pytest.mark.long
@pytest.mark.parametrize("first", ["stale", "the push"])
def test_what_is_late_drops_nothing_that_was_said_in_time(first: str, two: Two) -> None:
    """To another machine, a moment before: whichever is written first, all know what was said."""
    [name] = owned_by("a", 1)
    a, b = two(name, fall=1)
    for machine in (a, b):
        push(machine, name)
        machine.pollers[name]._epoch = machine.members.epoch
    a.pollers[name]._report(GOOD, 0.1, READ)
    a.pollers[name].expires_mono = lease_clock()
    a.pollers[name]._found_mono -= 60
    b.pollers[name]._report(GOOD, 0.1, READ)
    a.pollers[name]._report(Verdict("unhealthy", "stale", "no result for 130 s"), 0.0)
    assert not a.aggregator.is_healthy() and b.aggregator.is_healthy()
    for machine in (a, b) if first == "stale" else (b, a):
        machine.recorder.flush()
    for machine in (a, b):
        machine.look()
        assert machine.aggregator.is_healthy()
    assert a.execute("SELECT state, cause FROM status") == [("healthy", "")]


@pytest.mark.long
def test_what_was_found_before_the_clock_of_the_database_was_set_back(two: Two) -> None:
    """Nobody knows how old it is: taken for new it would count for a dead host, and open the gate."""
    [name] = owned_by("b", 1)
    a, b = two(name)
    b.find(name, GOOD)
    with a.store.writing() as session:
        session.connection().exec_driver_sql("UPDATE result SET found_at = found_at + 3600")
    a.look()
    assert a.pollers[name].standing.state == "unknown" and not a.aggregator.is_healthy()
    b.find(name, GOOD)
    a.look()
    assert a.aggregator.is_healthy()


@pytest.mark.long
def test_what_was_refuted_elsewhere_is_not_known_again_after_a_start(two: Two) -> None:
    """Its row would last until the machine that wrote it logs in again."""
    [name] = owned_by("b", 1)
    a, b = two(name)
    b.find(name, REFUSED, REFUSED, REFUSED)
    a.look()
    a.find(name, GOOD)
    b.look()
    b.recorder.flush()
    assert b.guards.of(b.pollers[name].target).refusals == 0
    with b.store.reading() as session:
        assert written_logins(session, "b") == ({}, {})


@pytest.mark.long
def test_one_machine_at_a_time_tries_what_is_not_proven(two: Two) -> None:
    """Each with its own three refusals they would lock the account together; once it is accepted they go on at once."""
    names = owned_by("a", 1) + owned_by("b", 1)
    machines, outcomes = two(*names), list[str]()
    with contextlib.ExitStack() as stack:
        for machine in machines:
            machine.recorder.start()
            stack.callback(machine.recorder.close)
        a, b = (machine.guards.of(machine.pollers[name].target) for machine, name in zip(machines, names, strict=True))
        for _ in range(8):
            for guard, other, name, second in (a, b, *names), (b, a, *reversed(names)):
                with contextlib.suppress(ProbeError), guard.attempt(name, Deadline(20), LoginRecord()):
                    outcomes.append("tried")
                    try_again = other.attempt(second, Deadline(20), LoginRecord())
                    with pytest.raises(ProbeError, match=r"somebody else logs in|credential was refused"), try_again:
                        outcomes.append("at once")
                    raise ProbeError("auth", "refused")
                guard.ask(name)
                wait_for(lambda: not any(json.loads(text)["unseen"] for (text,) in machines[0].execute(
                    "SELECT text FROM setting WHERE name LIKE 'logins/%%'")))  # fmt: skip
        assert outcomes == ["tried"] * 4, "directories lock at the fifth"


@pytest.mark.long
def test_what_is_not_written_in_time_leaves_each_machine_its_share(two: Two) -> None:
    """The database has just fallen silent: nobody hears of the others' refusals, and it takes seconds until that is
    known. Once it is written, even late, all is as ever."""
    first, second = owned_by("a", 2)
    a, _ = two(first, second)
    guard = a.guards.of(a.pollers[first].target)
    with pytest.raises(ProbeError, match="wrong"), guard.attempt(first, Deadline(1), LoginRecord()):
        raise ProbeError("auth", "wrong")
    with pytest.raises(ProbeError, match="not tried: "), guard.attempt(second, Deadline(1), LoginRecord()):
        raise AssertionError("it has had its share")
    a.recorder.flush()
    assert guard.wait(second) <= 1


def test_what_others_were_refused_at_that_moment_is_waited_for() -> None:
    """Each proves the credential and writes nothing before its login; with a second one at once they would be four."""
    now_mono, begun = 1000.0, list[str]()

    def keep(row: str, text: str, patience: float, rows: object) -> bool:
        begun.extend([row] * (patience > 0))
        return True

    def try_it() -> list[str]:
        begun.clear()
        with guard.attempt("second", Deadline(5), LoginRecord()):
            return [*begun]

    guard = LoginGuard(lambda: now_mono, journal=LoginJournal(keep, machines=lambda: 3))
    guard.rows.of = {"first": "first's", "second": "second's"}
    assert (try_it(), try_it()) == (["second's"], [])
    guard.refuse("first")       # elsewhere, as was heard
    assert 0 < guard.wait("second") <= 1
    guard.ask("second")
    assert guard.wait("second") == 0, "who asks for it has another one"
    guard._asked.clear()
    now_mono += 1
    assert guard.wait("second") == 0 and try_it() == ["second's"], "what others begin just now is to be seen"


def test_who_comes_back_first_waits_for_what_others_were_refused() -> None:
    """Each had its one attempt while the database was away, and writes of it when it comes back, one by one."""
    now_mono, company = 1000.0, Company("before", frozenset("abc"), frozenset("abc"), 1000.0)
    claim = SimpleNamespace(machine="a", company=company)
    members = Membership(cast(Claim, claim), lambda: now_mono)
    guard = LoginGuard(lambda: now_mono, journal=LoginJournal(
        machines=lambda: members.count, is_heard=lambda: members.is_heard(writes=True)))  # fmt: skip
    assert guard.wait("first") == 0
    now_mono += CLAIM_LIFE
    guard.refuse("first")
    assert guard.wait("second") > 1800, "cut off"
    alone = frozenset("a")
    for later, waits in (0.0, True), (TAKE_OVER - 1, True), (TAKE_OVER, False):
        now_mono = 1000.0 + CLAIM_LIFE + later
        claim.company = Company("now", alone, alone, now_mono)
        assert (guard.wait("second") > 1800) is waits, later


@pytest.mark.long
def test_check_now_elsewhere_opens_the_gate_of_the_owner(two: Two) -> None:
    """It polls as soon as it is told that another machine was accepted."""
    [name] = owned_by("a", 1)
    a, b = two(name)
    poller, guard = a.pollers[name], a.guards.of(a.pollers[name].target)
    for _ in range(3):
        guard.refuse(name)
    a.find(name, REFUSED, REFUSED, REFUSED)
    assert not poller.doubt.is_urged and guard.wait(name) > 1800
    b.look()
    b.find(name, GOOD)
    a.look()
    assert poller.doubt.is_urged and guard.wait(name) == 0


# --- events
def events(machine: Machine, *kinds: str) -> list[tuple[str, str]]:
    return [(text, state) for kind, text, state in machine.execute("SELECT kind, text, state FROM event ORDER BY id")
            if kind in kinds]  # fmt: skip


@pytest.mark.long
def test_what_closes_while_the_speaker_is_dead(two: Two) -> None:
    """And nobody has heard of that yet. What it has told is told once."""
    silent, speaker = sorted("ab", key=lambda name: owner_of("", frozenset("ab")) == name)
    [name] = owned_by(silent, 1)
    machines = {machine.name: machine for machine in two(name, fall=1)}
    first, second = machines[speaker], machines[silent]
    second.find(name, GOOD)
    first.look()
    first.recorder.flush()
    told = events(second, "gate")
    assert told[-1][1] == "open"
    second.find(name, DOWN)
    assert events(second, "gate") == told, "it is the other one's to tell"
    first.stack.close()
    wait_for(lambda: second.knows(silent), 60)
    second.recorder.flush()
    second.recorder.flush()
    found = events(second, "gate")
    assert len(found) == len(told) + 1 and found[-1][1] == "closed" and found[-1][0].startswith("open -> closed (h")
    second.find(name, GOOD, GOOD)
    assert [state for _, state in events(second, "gate")][len(told):] == ["closed", "open"]


@pytest.mark.long
def test_what_was_said_to_another_machine_than_its_owner_is_told(two: Two) -> None:
    """By its owner, who will not find it again; once, also where both have heard it."""
    [name] = owned_by("a", 1)
    a, b = two(name, fall=1, rise=1)
    for machine in (a, b):
        push(machine, name)
    for machines, verdict in (([b], GOOD), ([b], DOWN), ([a], DOWN), ([a], GOOD), ([b], GOOD), ([b], DOWN),
                              ([a, b], GOOD), ([b, a], DOWN)):  # fmt: skip
        for machine in machines:
            machine.find(name, verdict)
        for other in (a, b):
            other.look()
            other.recorder.flush()
    assert [state for _, state in events(a, "state")] == ["healthy", "unhealthy"] * 3


@pytest.mark.long
def test_what_its_owner_tells_another_machine_does_not(two: Two) -> None:
    """That one was cut off, and polled all by itself."""
    [name] = owned_by("b", 1)
    a, b = two(name, fall=1, rise=1)
    for machine in (a, b):
        push(machine, name)
    b.find(name, GOOD)
    a.look()
    a.recorder.flush()
    a.pollers[name].go_on(0.0)
    b.find(name, DOWN)
    for machine in (a, b):
        machine.look()
        machine.recorder.flush()
    assert [state for _, state in events(a, "state")] == ["healthy", "unhealthy"]


@pytest.mark.long
def test_what_another_found_later_is_shown(two: Two) -> None:
    """And not for good what a machine that is not the owner found when it was asked."""
    [name] = owned_by("b", 1)
    a, b = two(name, fall=1, rise=1)
    a.find(name, GOOD)
    assert a.pollers[name].news.last
    b.look()
    b.find(name, DOWN)
    a.look()
    assert not a.pollers[name].news.last and a.pollers[name].standing.state == "unhealthy"


@pytest.mark.long
def test_who_joins_tells_how_it_stands_once(two: Two) -> None:
    """That all is open is no news; that it is closed would be, where it was told to be open."""
    [name] = owned_by("b", 1)
    a, b = two(name)
    b.find(name, GOOD)
    a.look()
    for machine in (a, b) * 2:
        machine.recorder.flush()
    assert [state for _, state in events(a, "gate")].count("open") == 1


@pytest.mark.long
def test_what_was_found_before_another_machine_joined(two: Two) -> None:
    """Is told by who found it: what is not written yet, and what waits for the poll of a parent."""
    names = [name for name in owned_by("a", 100) if owner_of(name, frozenset("abc")) == "c"][:2]
    [switch] = owned_by("b", 1)
    a, _ = two(*names, switch, fall=1)
    a.aggregator.arrange(Gates(), {}, {names[1]: (switch,)})
    for name in (switch, *names):
        a.find(name, GOOD)
    for name in names:
        a.pollers[name]._report(DOWN, 0.1)
    assert a.pollers[names[1]].news.waits
    with Machine("c", a.url, (*names, switch), fall=1):
        wait_for(lambda: a.knows("a", "b", "c"), 60)
        a.look()
        a.recorder.flush()
    assert all(a.pollers[name].rests for name in names)
    assert [state for _, state in events(a, "state")] == ["healthy"] * 2 + ["unhealthy"] * 2


@pytest.mark.long
@pytest.mark.parametrize("what", ["cut off", "wakes", "all are"])
def test_what_the_gate_does_while_the_speaker_is_cut_off(what: str, postgres: Postgres) -> None:
    """Is told and written once: by the machine that took its place, where there is one. Who wakes reaches the database
    before it has heard that it was taken for dead."""
    quiet, speaking = sorted("ab", key=lambda name: owner_of("", frozenset("ab")) == name)
    database, [host] = postgres.prepared(), owned_by(quiet, 1)
    with open_pgbouncer(postgres) as bouncer, contextlib.ExitStack() as stack:
        near, far = postgres.url(database), postgres.url(database, bouncer.port)
        places = {quiet: (far if what == "all are" else near, ""), speaking: (near if what == "wakes" else far, far)}
        other, speaker = (stack.enter_context(Machine(name, url, (host,), heard, fall=1, rise=1))
                          for name, (url, heard) in places.items())  # fmt: skip
        wait_for(lambda: other.knows("a", "b") and speaker.knows("a", "b"), 60)
        for verdict in (GOOD, GOOD):
            other.find(host, verdict)
            speaker.look()
            speaker.recorder.flush()
        told, epoch = events(other, "gate"), speaker.members.epoch
        assert told[-1][1] == "open"
        bouncer.end()
        wait_for(lambda: speaker.members.is_cut_off and (what == "all are" or other.knows(quiet)), 60)
        for verdict in (GOOD, DOWN, GOOD):
            for machine in (speaker,) if what == "all are" else (other, speaker):
                machine.find(host, verdict)
                assert machine.aggregator.is_healthy() is verdict.healthy
        bouncer.begin()
        wait_for(lambda: speaker.members.epoch != epoch and speaker.knows("a", "b"), 60)
        for _ in range(2):
            speaker.recorder.flush()
        assert [state for _, state in events(other, "gate")][len(told):] == ["closed", "open"]
        assert speaker.execute("SELECT \"group\", \"end\" FROM incident") == [("", "opened")]
        seen = speaker.execute("SELECT from_at, to_at FROM watched_time ORDER BY from_at")
        assert len(seen) == (1 if what == "all are" else 3)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(seen))


@pytest.mark.long
@pytest.mark.parametrize("falls", [False, True], ids=["well again", "down again"])
@pytest.mark.parametrize("dies", [True, False], ids=["it died", "it lives"])
def test_what_is_found_while_nobody_reaches_the_database(dies: bool, falls: bool, postgres: Postgres) -> None:
    """Of the site, and of a resource of its own, the speaker tells; the other one does where that one is dead by the
    return. Once, and last how it stands: a closed gate was told as open."""
    quiet, speaking = sorted("ab", key=lambda name: owner_of("", frozenset("ab")) == name)
    database, [host] = postgres.prepared(), owned_by(speaking, 1)
    with open_pgbouncer(postgres) as bouncer, contextlib.ExitStack() as stack:
        far = postgres.url(database, bouncer.port)
        other, speaker = (stack.enter_context(Machine(name, far, (host,), fall=1, rise=1))
                          for name in (quiet, speaking))  # fmt: skip
        wait_for(lambda: other.knows("a", "b") and speaker.knows("a", "b"), 60)
        for _ in range(2):
            other.look()
            other.recorder.flush()
            speaker.find(host, GOOD)
        other.look()
        other.find(host, GOOD)      # as it does every few seconds, it writes something
        with other.store.writing() as session:      # what was found last does not count any more when it falls
            session.connection().exec_driver_sql("UPDATE result SET found_at = found_at - 3600")
        told = events(speaker, "gate", "state")
        assert events(speaker, "gate")[-1][1] == "open"
        epoch = other.members.epoch
        bouncer.end()
        wait_for(lambda: speaker.members.is_cut_off and other.members.is_cut_off, 60)
        for verdict in (DOWN, GOOD, *[DOWN] * falls):
            for machine in (other, speaker):
                machine.find(host, verdict)
        if dies:
            speaker.stack.close()
        bouncer.begin()
        wait_for(lambda: other.members.epoch != epoch and other.knows(*(quiet if dies else "ab")), 60)
        for machine in (other, other) if dies else (other, speaker) * 2:
            machine.recorder.flush()
        found = sorted(events(other, "gate", "state")[len(told):], key=lambda event: event[1])
        again = {"closed", "unhealthy"} if falls else set()
        assert [state for _, state in found] == sorted(["closed", "healthy", "open", "unhealthy", *again])
        assert events(other, "gate")[-1][1] == ("closed" if falls else "open")
        if not falls:
            assert other.execute("SELECT \"group\", \"end\" FROM incident") == [("", "opened")]


def test_what_two_machines_saw_a_moment_apart_is_told_once(tmp_path: Path) -> None:
    """Whichever of them writes first. What falls again, or for another cause, is told again."""
    store = Store(tmp_path / "db")
    for kind, word, good, bad in (("gate", "closed", "open", "closed"), ("state", "unhealthy", "healthy", "unhealthy")):
        for seen in (([0.4, bad], [6.3, good]), ([0.0, bad], [6.0, good]), ([0.5, bad], [6.5, good], [8.0, bad])):
            with store.writing() as session:
                rows = [{"kind": kind, "state": state, "at": 1e9 + at, "text": f"other -> {state}"}
                        for at, state in seen]  # fmt: skip
                for row in healthchecker.unsaid(session, rows):
                    healthchecker.record_event(session, **row)
        with store.writing() as session:
            again = {"kind": kind, "state": word, "at": 1e9 + 9, "text": f"{word} -> {word} (limit)"}
            assert bool([*healthchecker.unsaid(session, [again])]) is (kind == "state")
            told = [row.at - 1e9 for row in healthchecker.events(session, kind=kind)]
        assert told[::-1] == pytest.approx([0.4, 6.3, 8.0], abs=1e-3)
    store.close()


def polls(machine: Machine) -> str:
    return "".join(poll for (poll,) in machine.execute("SELECT poll FROM sample ORDER BY at"))


@pytest.mark.long
@pytest.mark.parametrize("is_away", [True, False], ids=["cut off", "all are"])
def test_what_is_found_in_a_life_that_is_over(is_away: bool, two: Two) -> None:
    """Neither history nor events have what the others know better; where nobody does, it is true as far as is known."""
    [name] = owned_by("b", 1)
    a, b = two(name, fall=1, rise=1)
    b.find(name, GOOD)
    epoch = b.members.epoch
    b.pollers[name]._report(DOWN, 0.1)
    b.recorder._gather(speaks=False)
    with a.store.writing() as session:
        session.connection().exec_driver_sql("UPDATE machine SET seen_at = seen_at - 60 WHERE name = 'b'")
    wait_for(lambda: b.members.epoch != epoch, 60)
    if is_away:
        a.find(name, GOOD)
    b.pollers[name]._report(DOWN, 0.1)      # its poll was under way
    b.find(name)
    if not is_away:
        assert polls(a) == "huu"
        assert [state for _, state in events(a, "state")] == ["healthy", "unhealthy"]
        return
    assert polls(a) == "hh"
    b.find(name, GOOD)
    assert [state for _, state in events(a, "state")] == ["healthy"], "nor is it told that it is over"
    b.find(name, DOWN)
    assert polls(a) == "hhhu"
    assert [state for _, state in events(a, "state")] == ["healthy", "unhealthy"]
