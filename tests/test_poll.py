"""Poll: real threads, a real database, and machines that do what the test says."""

from __future__ import annotations

import concurrent.futures
import contextlib
import heapq
import itertools
import json
import logging
import math
import random
import re
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy
from conftest import folder_with_database, wait_for
from postgres import database_in, execute, refusing
from pydantic import SecretStr
from service import prepared_keys, store_in

import healthchecker
from healthchecker import (
    AUTH_RETRY,
    CONNECTIONS,
    LOCKOUT_WINDOW,
    REFUSALS,
    Connection,
    ConnectionContext,
    Deadline,
    Event,
    Guards,
    HealthAggregator,
    HostSession,
    KnownHosts,
    LateLogin,
    LoginGuard,
    LoginJournal,
    LoginRecord,
    Monitor,
    NotAllowed,
    Outcome,
    Output,
    Platform,
    PollContext,
    Poller,
    ProbeError,
    Recorder,
    Report,
    Resolver,
    Resource,
    ResourceSettings,
    Sample,
    SimulatedConnection,
    Status,
    Target,
    Uplink,
    Vault,
    import_inventory,
    load_inventory,
)

LATE = 10  # seconds that a busy machine may add
BACKOFF = 300.0  # seconds between two attempts with a refused credential
Behaviour = Callable[[LoginGuard, Deadline], object]


# --- machines ---
class Machines:
    """Stands behind CONNECTIONS: what each machine does when it is polled, and when it was."""

    def __init__(self) -> None:
        self.behaviours: dict[str, Behaviour] = {}
        self.polls: list[tuple[str, float]] = []
        self.logins: list[str] = []
        self.made: list[str] = []  # connections, that is, pollers
        self.ended = threading.Event()  # lets go of whatever hangs

    def connection(self, target: Target, guard: LoginGuard, access: ConnectionContext) -> Machine:
        self.made.append(target.name)
        return Machine(self, target, guard, access)

    def moments(self, name: str) -> list[float]:
        return [moment for polled, moment in self.polls if polled == name]

    # behaviours
    def hang(self, guard: LoginGuard, deadline: Deadline) -> None:
        self.ended.wait(60)
        raise ProbeError("timeout", "let go at the end of the test")

    def takes(self, seconds: float) -> Behaviour:
        return lambda guard, deadline: self.ended.wait(seconds)

    def login(self, name: str, answer: Behaviour | None = None) -> Behaviour:
        """A login around `answer`, counted."""

        def attempt(guard: LoginGuard, deadline: Deadline) -> None:
            with guard.attempt(name, deadline, LoginRecord()):
                self.logins.append(name)
                if answer:
                    answer(guard, deadline)

        return attempt


class Machine(Connection):
    """A connection: the machine prints the least that the POSIX table's parser takes for an answer."""

    def __init__(self, machines: Machines, target: Target, guard: LoginGuard, access: ConnectionContext) -> None:
        super().__init__(target, guard, access)
        self._machines = machines

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        del script
        self._machines.polls.append((self._target.name, time.monotonic()))
        self._machines.behaviours.get(self._target.name, good)(self._guard, deadline)
        mark = output.mark.rpartition(b" ")[0].decode()  # "\n@nonce"
        sections = f"{mark} begin platform freebsd\n{mark} end 0\n{mark} begin hostname\nbox\n{mark} end 0\n"
        return output.take(sections.encode() + output.mark)


def good(guard: LoginGuard, deadline: Deadline) -> None:
    """Answers."""


def unreachable(guard: LoginGuard, deadline: Deadline) -> None:
    raise ProbeError("unreachable", "connection refused")


def refused(guard: LoginGuard, deadline: Deadline) -> None:
    raise ProbeError("auth", "login as monitor refused")


def dies(guard: LoginGuard, deadline: Deadline) -> None:
    raise SystemExit


@pytest.fixture
def machines() -> Iterator[Machines]:
    """`platform: freebsd` is these machines for as long as the test runs."""
    found, before = Machines(), CONNECTIONS[Platform.FREEBSD]
    CONNECTIONS[Platform.FREEBSD] = found.connection
    yield found
    CONNECTIONS[Platform.FREEBSD] = before
    found.ended.set()


# --- the service around them ---
@pytest.fixture(scope="session")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    return Vault(prepared_keys(tmp_path_factory.mktemp("keys")))


class House:
    """A folder with an inventory and a database; `watching` runs the monitor on it, as often as one likes."""

    def __init__(self, folder: Path, vault: Vault) -> None:
        self.folder, self.vault = folder, vault
        self.store = store_in(folder)

    def write(self, *resources: str) -> None:
        """Resources in YAML's flow style; machines of ours where no platform is named."""
        machine = "platform: freebsd, hostname: 192.0.2.1, username: monitor"
        lines = [line if "platform:" in line else f"{line}, {machine}" for line in resources]
        path = self.folder / "inventory.yaml"
        defaults = "defaults: {password: secret, interval: 60, retry_interval: 1, timeout: 1}\n"
        text = defaults + "resources:\n" + "".join(f"  - {{{line}}}\n" for line in lines)
        path.write_text(text if lines else "resources: []\n", encoding="utf-8")
        with self.store.writing() as session:
            import_inventory(session, load_inventory(path), self.vault)

    @contextlib.contextmanager
    def watching(self, wall: Callable[[], float] = time.time, uplink: Uplink | None = None) -> Iterator[House]:
        self.aggregator = HealthAggregator()
        access = ConnectionContext(KnownHosts(self.folder / "known_hosts"), Resolver())
        recorder = Recorder(self.store, self.aggregator)
        watch = PollContext(self.aggregator, recorder, access, random.Random(1), uplink or Uplink())
        self.monitor = Monitor(self.store, self.vault, watch, wall)
        self.monitor.begin()
        self.monitor.start()
        try:
            yield self
        finally:
            self.monitor.close()
            self.monitor.join(5)

    def poller(self, name: str) -> Poller:
        found = self.monitor.pollers.get(name)
        assert found is not None
        return found

    def state(self, name: str) -> tuple[str, str]:
        standing = self.poller(name).standing
        return standing.state, standing.cause

    def stored(self, name: str) -> tuple[str, str]:
        """State and cause in the database."""
        with self.store.reading() as session:
            row = session.scalar(sqlalchemy.select(Status).join(healthchecker.Resource).filter_by(name=name))
            return (row.state, row.cause) if row else ("", "")

    def elsewhere(self, *statements: str) -> None:
        """What another program does to the database, and says so by raising the revision."""
        execute(database_in(self.folder), *statements, "UPDATE setting SET value = value + 1 WHERE name = 'revision'")

    def age(self, seconds: float, name: str = "%") -> float:
        """Makes what is stored of a resource `seconds` old; gives the time of its poll."""
        polled_at = time.time() - seconds
        those = "SELECT id FROM resource WHERE name LIKE :name"
        execute(database_in(self.folder), f"UPDATE status SET polled_at = :at WHERE resource_id IN ({those})",
                at=polled_at, name=name)  # fmt: skip
        with self.store.writing() as session:       # and what was written of logins, whoever's they are
            rows = session.scalars(sqlalchemy.select(healthchecker.Setting).where(
                healthchecker.Setting.name.startswith("logins/"))).all()
            for row in rows if name == "%" else ():
                told = json.loads(row.text)
                later = max(told["refused"] + [at for at, _ in told["unseen"]]) - polled_at
                told["refused"] = [at - later for at in told["refused"]]
                row.text = json.dumps(told | {"unseen": [(at - later, life) for at, life in told["unseen"]]})
        return polled_at


@pytest.fixture
def house(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, vault: Vault, machines: Machines
) -> Iterator[House]:
    made = House(folder_with_database(request, tmp_path_factory), vault)
    yield made
    machines.ended.set()
    wait_for(lambda: not any(thread.name.startswith(("poll ", "recorder", "monitor"))
                             for thread in threading.enumerate()))  # fmt: skip
    made.store.close()


def gaps(moments: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(moments)]


# --- when polls happen ---
@pytest.mark.long
def test_interval_with_jitter(house: House, machines: Machines) -> None:
    names = [f"m{number}" for number in range(12)]
    house.write(*(f"name: {name}, interval: 1" for name in names))
    with house.watching():
        wait_for(lambda: all(len(machines.moments(name)) >= 4 for name in names))
    found = [gap for name in names for gap in gaps(machines.moments(name))]
    assert 0.85 <= statistics.median(found) <= max(found) <= 1.1 + LATE  # one that is late shortens the next gap
    assert max(found) - min(found) > 0.05, "no jitter"


@pytest.mark.long
def test_a_long_poll_does_not_shorten_the_interval(house: House, machines: Machines) -> None:
    house.write("name: slow, interval: 1.5, timeout: 5")
    machines.behaviours["slow"] = machines.takes(1.2)
    with house.watching():
        wait_for(lambda: len(machines.moments("slow")) >= 4)
    found = gaps(machines.moments("slow"))
    assert 1.3 <= statistics.median(found) <= 1.5 + 0.9, found  # 2.7 it would be, were the pause behind the poll


def test_first_polls_are_paced_and_dead_machines_hold_up_nobody(house: House, machines: Machines) -> None:
    names = [f"m{number:02}" for number in range(40)]
    house.write(*(f"name: {name}" for name in names))
    machines.behaviours |= dict.fromkeys(names[:10], machines.hang)
    begin = time.monotonic()
    with house.watching():
        wait_for(lambda: len(machines.polls) == len(names))
        machines.ended.set()
    for rank, name in enumerate(names):
        late = machines.moments(name)[0] - begin - rank / 50
        assert -0.02 < late < LATE, (name, late)


@pytest.mark.parametrize(("count", "interval", "outage"), [(1000, 10, 8), (3000, 60, 30), (1, 60, 100), (0, 60, 0)])
def test_first_polls_come_before_the_leases_end(count: int, interval: float, outage: float) -> None:
    """Of a restart with known states: of polls that were spread over the interval before it."""
    one = healthchecker.ResourceSettings.model_construct(interval=interval, timeout=10)
    left = [one.ttl - outage - interval * number / max(1, count) for number in range(count)]
    random.Random(1).shuffle(left)
    delays = healthchecker.first_polls(left, [one] * count)
    assert all(delay + one.timeout <= lease for delay, lease in zip(delays, left, strict=True))
    gaps_between = gaps(sorted(delays))
    assert not gaps_between or min(gaps_between) > interval / count / 2 * 0.99, "no more than twice the usual load"


def test_first_polls_of_what_is_not_known() -> None:
    """They come first, for the gate waits for them."""
    one = healthchecker.ResourceSettings.model_construct(interval=60, timeout=10)
    assert healthchecker.first_polls([50, 0, 20, 0], [one] * 4) == [0.06, 0, 0.04, 0.02]


@pytest.mark.long
def test_the_shortest_lease_is_polled_first(house: House, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"m{number}" for number in range(6)]
    house.write(*(f"name: {name}" for name in names))
    with house.watching():
        wait_for(lambda: all(house.stored(name)[0] == "healthy" for name in names))
    for number, name in enumerate(names):
        house.age(10 * number, name)
    machines.polls.clear()
    monkeypatch.setattr(healthchecker, "FIRST_POLLS", 1.5)  # so slow that a busy machine changes no order
    with house.watching():
        wait_for(lambda: len(machines.polls) == len(names))
    assert [poll[0] for poll in machines.polls] == names[::-1]


@pytest.mark.long
def test_retry_interval_while_undecided(house: House, machines: Machines) -> None:
    house.write("name: db1, interval: 60, retry_interval: 1, rise: 2, fall: 3")
    with house.watching():
        wait_for(lambda: house.state("db1") == ("healthy", ""))
        machines.behaviours["db1"] = unreachable
        house.poller("db1").poll_now()
        wait_for(lambda: house.state("db1") == ("unhealthy", "unreachable"))
        assert len(machines.polls) == 4  # one good, three bad
        for gap in gaps(machines.moments("db1")[1:]):
            assert 0.5 <= gap <= 1.1 + LATE
        assert not machines.ended.wait(1.2), "decided: the next poll is a minute away"
        assert len(machines.polls) == 4
        machines.behaviours["db1"] = good
        house.poller("db1").poll_now()
        wait_for(lambda: house.state("db1") == ("healthy", ""))
        assert len(machines.polls) == 6


def test_undecided_results_renew_the_lease(house: House, machines: Machines) -> None:
    house.write("name: db1, interval: 1, fall: 1000")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["db1"] = unreachable
        wait_for(lambda: house.poller("db1").standing.bad >= 2)
        wait_for(lambda: 4.5 < lease_left(house) <= 5)  # 2 intervals, timeout, 2 s
        assert house.state("db1") == ("healthy", "")


# --- pollers that fail ---
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # that is what it is about
def test_dead_and_hanging_pollers(house: House, machines: Machines) -> None:
    """The gate closes by itself; a dead one is restarted; all of them are recorded, also what does not count."""
    names = ["dying", "hanging", "optional", "fine"]
    house.write(
        *(f"name: {name}, interval: 1, critical: {str(name != 'optional').lower()}" for name in names)
    )
    with house.watching():
        wait_for(lambda: all(house.state(name)[0] == "healthy" for name in names))
        wait_for(house.aggregator.is_healthy)
        machines.behaviours = {"dying": dies, "hanging": machines.hang, "optional": machines.hang}
        begin, made = time.monotonic(), machines.made.count("dying")
        wait_for(lambda: machines.made.count("dying") > made)
        wait_for(lambda: not house.aggregator.is_healthy())
        assert time.monotonic() - begin > 2, "closed by its lease and not by chance"
        expected = dict.fromkeys(names[:3], ("unhealthy", "stale")) | {"fine": ("healthy", "")}
        with contextlib.suppress(AssertionError):  # the comparison below names the one
            wait_for(lambda: {name: house.stored(name) for name in names} == expected)
        assert {name: house.stored(name) for name in names} == expected
        machines.behaviours["dying"] = good
        wait_for(lambda: house.state("dying") == ("healthy", ""))


@pytest.mark.long
def test_one_that_dies_again_and_again(house: House, machines: Machines, caplog: pytest.LogCaptureFixture) -> None:
    """One line, one attempt at once, and then at its usual interval."""
    house.write("name: db1")
    with house.watching():
        wait_for(lambda: house.state("db1")[0] == "healthy")
        machines.behaviours["db1"] = dies
        house.poller("db1").poll_now()
        wait_for(lambda: len(machines.polls) == 3)
        wait_for(lambda: machines.made.count("db1") == 3)
        assert not machines.ended.wait(2), "nothing happens meanwhile"
        assert len(machines.polls) == 3 and machines.made.count("db1") == 3
        machines.behaviours["db1"] = good
        assert house.monitor.poll_now("db1", 20)
    assert caplog.text.count("its poller died") == caplog.text.count("its poller died (SystemExit)") == 1


class Deadly:
    """What kills the thread that looks at it."""

    @property
    def target(self) -> Target:
        raise SystemExit


@pytest.mark.long
def test_recorder_and_monitor_go_on(house: House, machines: Machines, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever ends a step of theirs, and it is told."""
    deadly = threading.Event()

    def wall() -> float:
        if deadly.is_set() and threading.current_thread().name == "monitor":
            deadly.clear()
            raise SystemExit
        return time.time()

    house.write("name: db1, interval: 1, fall: 1")
    with house.watching(wall):
        wait_for(lambda: house.stored("db1") == ("healthy", ""))
        house.monitor._context.recorder._reports.append(cast(Report, Deadly()))
        deadly.set()
        wait_for(lambda: caplog.text.count("SystemExit") == 2)
        machines.behaviours["db1"] = unreachable
        wait_for(lambda: house.stored("db1") == ("unhealthy", "unreachable"))
        house.write("name: db1, interval: 1, fall: 1", "name: db2")
        wait_for(lambda: house.stored("db2") == ("healthy", ""))


@pytest.mark.parametrize("hanging", ["", "recorder", "monitor"])
def test_the_gate_closes_when_nobody_watches(
    house: House, machines: Machines, monkeypatch: pytest.MonkeyPatch, hanging: str
) -> None:
    """Polls go on, and their leases last; the one of who writes them, and of who sees them end, does not."""
    let_go, hangs = threading.Event(), threading.Event()

    def wall() -> float:
        if hanging == "monitor" and threading.current_thread().name == "monitor":
            hangs.set()
            let_go.wait(60)
        return time.time()

    house.write("name: db1, interval: 100")
    with house.watching(wall):
        wait_for(house.aggregator.is_healthy)
        recorder = house.monitor._context.recorder
        write = recorder.flush

        def flush() -> bool:
            hangs.set()
            let_go.wait(60)
            return write()

        if hanging == "recorder":
            monkeypatch.setattr(recorder, "flush", flush)
        if hanging:  # its beat is before that, so that there is none any more
            assert hangs.wait(60)
            assert hanging in house.aggregator.beats
        house.aggregator._clock = lambda: healthchecker.lease_clock() + 140
        wait_for(lambda: house.aggregator.is_healthy() is not bool(hanging))
        assert not machines.ended.wait(1.5)
        assert house.aggregator.is_healthy() is not bool(hanging)
        let_go.set()
        wait_for(house.aggregator.is_healthy)


@pytest.mark.long
def test_hanging_first_poll_after_a_restart(house: House, machines: Machines) -> None:
    """What is left of the stored lease runs out, and that is recorded, too."""
    house.write("name: db1, interval: 2")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
    house.age(3)  # of 7
    machines.behaviours["db1"] = machines.hang
    with house.watching():
        assert house.aggregator.is_healthy()
        wait_for(lambda: not house.aggregator.is_healthy())
        wait_for(lambda: house.stored("db1") == ("unhealthy", "stale"))


@pytest.mark.parametrize("was", ["", ", was: old"], ids=["same name", "renamed"])
def test_another_machine_has_to_show_that_it_is_well(house: House, machines: Machines, was: str) -> None:
    """Its first refusal is not confirmed for minutes, and what was known is of the machine before it."""
    name = "new" if was else "old"
    house.write("name: old")
    machines.behaviours["old"] = machines.login("old")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        machines.behaviours[name] = machines.login(name, refused)
        house.write(
            f"name: {name}{was}, hostname: 192.0.2.99, username: u, password: w, platform: freebsd, interval: 600"
        )
        wait_for(lambda: name in house.monitor.pollers and house.poller(name).target.settings.hostname == "192.0.2.99")
        wait_for(lambda: house.state(name) == ("unhealthy", "auth"))
        wait_for(lambda: not house.aggregator.is_healthy())


def test_who_is_down_is_so_under_another_name(house: House, machines: Machines) -> None:
    """Renamed without `was`: it is another resource, but the gate does not open until that is known to be well."""
    house.write("name: old, fall: 1")
    machines.behaviours["old"] = unreachable
    with house.watching():
        wait_for(lambda: house.stored("old")[0] == "unhealthy")
        machines.behaviours["new"] = machines.takes(60)
        house.write("name: new, fall: 1")
        wait_for(lambda: machines.moments("new"))
        assert not house.aggregator.is_healthy() and house.state("new")[0] == "unknown"
        machines.ended.set()
        wait_for(house.aggregator.is_healthy)


@pytest.mark.parametrize("interval", [50.0, 60.0], ids=["with a change", "renamed alone"])
def test_who_takes_the_name_of_a_removed_one_is_still_down(house: House, machines: Machines, interval: float) -> None:
    """Both between two looks of the monitor: what the removed one found is not news of the other."""
    house.write("name: a, fall: 1", "name: b, fall: 1")
    machines.behaviours["a"] = unreachable
    with house.watching():
        wait_for(lambda: house.stored("a")[0] == "unhealthy" and house.stored("b")[0] == "healthy")
        before = house.poller("a"), house.poller("b")
        machines.behaviours["b"] = machines.hang
        with house.store.writing() as session:  # as the API does it, in two requests
            rows = {row.name: row for row in session.scalars(sqlalchemy.select(Resource))}
            session.delete(rows["b"])
            session.flush()
            healthchecker.reseal(session, [rows["a"]], house.vault, "b")
            rows["a"].interval = interval
            healthchecker.revise(session)
        wait_for(lambda: house.monitor.pollers.keys() == {"b"} and house.poller("b") not in before)
        wait_for(lambda: not any(poller.is_alive() for poller in before))
        assert house.state("b")[0] == "unhealthy"
        assert not house.aggregator.is_healthy()
    assert {*turns(house)} == {"closed"}


@pytest.mark.long
def test_no_thread_for_one_poller(
    house: House, machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are watched all the same, changes are followed, and it begins once there is room."""
    start, limited = Poller.start, [True]

    def start_if(poller: Poller) -> None:
        if limited[0] and poller.target.name == "extra":
            raise RuntimeError("can't start new thread")
        start(poller)

    monkeypatch.setattr(Poller, "start", start_if)
    house.write("name: db1, interval: 1")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        house.write("name: db1, interval: 1", "name: extra, critical: false, interval: 1")
        wait_for(lambda: "extra: its poller died (can't start new thread: raise TasksMax=" in caplog.text)
        before = house.aggregator.beats["monitor"]
        wait_for(lambda: house.aggregator.beats["monitor"] > before)
        limited[0] = False
        wait_for(lambda: house.state("extra") == ("healthy", ""))
        limited[0] = True
        house.write("name: db1, interval: 1", "name: extra, critical: false, interval: 2")
        wait_for(lambda: house.poller("extra").target.settings.interval == 2)
        house.write("name: db1, interval: 1")
        wait_for(lambda: "extra" not in house.monitor.pollers)
        assert house.aggregator.is_healthy()


def test_no_thread_for_a_look_up(
    house: House, machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That is no fault of the host, nor one that nobody foresaw: a reason that says what to do, and no traceback."""
    start, limited = threading.Thread.start, [True]

    def start_if(thread: threading.Thread) -> None:
        if limited[0] and thread.name == "look-up":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        house.write(f"name: web, platform: tcp, hostname: localhost, port: {port}, interval: 1, fall: 1, rise: 1")
        with house.watching():
            wait_for(lambda: house.state("web")[0] == "unhealthy")
            assert house.poller("web").standing.reason == (
                "not polled: can't start new thread: raise TasksMax= of the unit, or `ulimit -u` of the account")
            limited[0] = False
            wait_for(lambda: house.state("web")[0] == "healthy")
    assert "unforeseen" not in caplog.text and "Traceback" not in caplog.text


def test_what_no_one_foresaw(house: House, machines: Machines, caplog: pytest.LogCaptureFixture) -> None:
    """An error of a library's own ends no poller."""

    def odd(guard: LoginGuard, deadline: Deadline) -> None:
        raise KeyError("surprise")

    house.write("name: db1, interval: 1")
    machines.behaviours["db1"] = odd
    with house.watching():
        wait_for(lambda: len(machines.polls) >= 2)
        assert machines.made == ["db1"]
        assert house.state("db1") == ("unhealthy", "protocol")
    assert "db1" in caplog.text


# --- logging and recording ---
def test_transitions_are_logged_once(
    house: House, machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "healthchecker")
    house.write("name: db1, interval: 1, rise: 1, fall: 1", "name: db2, interval: 60")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        for behaviour, state in ((unreachable, "unhealthy"), (good, "healthy")):
            machines.behaviours["db1"] = behaviour
            wait_for(lambda state=state: house.stored("db1")[0] == state)  # type: ignore[misc]
    lines = [record.getMessage() for record in caplog.records]
    told = [line for line in lines if line.startswith("db1")]
    assert len(told) == 3, lines
    assert "unknown -> healthy" in told[0]
    assert "healthy -> unhealthy" in told[1] and "unreachable: connection refused" in told[1]
    assert "unhealthy -> healthy" in told[2]
    assert all(" s" in line for line in told[1:]), "for how long"
    gate = [line for line in lines if line.startswith("gate")]
    assert len(gate) == 3, lines
    assert ["open" in line.split("->")[1].split()[0] for line in gate] == [True, False, True]
    assert "db1" in gate[1] and "connection refused" in gate[1]
    assert [line for line in lines if line.startswith("db2")] == [
        line for line in lines if "db2: unknown" in line
    ]


@pytest.mark.parametrize("resources", [[], ["name: db1, critical: false"]], ids=["empty", "not critical"])
def test_open_with_a_warning(house: House, caplog: pytest.LogCaptureFixture, resources: list[str]) -> None:
    house.write(*resources)
    with house.watching():
        assert house.aggregator.is_healthy()
    assert [record.levelname for record in caplog.records if "no critical" in record.getMessage()] == [
        "WARNING"
    ]


# --- refused logins: the guard by itself ---
# steps: `a no` refused, `a yes` accepted, `a odd` neither, `+5` seconds pass, `a ask` somebody wants it, `a=300` waits
GUARDS = {
    "nothing happened": "a=0",
    "one's own refusal": "a no; a=300; b=0; +299; a=1; +1; a=0",
    "the second attempt of a proven one": "a yes; a no; a=60; +60; a=0; a no; a=300; b=0",
    "proven by another": "b yes; a no; a=60; b yes; +60; a no; a=300; b yes; +300; a no; a=1860; b=0",
    "accepted too long ago": "a yes; +3601; a no; a=300",
    "another fault is no refusal": "a odd; a odd; a odd; b odd; c odd; a=0; d=0",
    "two odd ones": "a no; b no; c=0; c yes; d=0; a=60; b=60",
    "three refused stop all": "a no; b no; c no; d=1860; +10; d=1850; a=1850; +1850; d=0; a=0",
    "then the same once more": "a no; b no; c no; +1860; d no; e no; a=0; f no; g=1860",
    "accepted frees the others": "a no; b no; c no; +1860; d yes; a=0; e=0",
    "but not those refused themselves": "a yes; a no; +30; b yes; c=0; a=30",
    "an odd one for ever": "a no; b yes; +300; a no; b yes; +300; a no; c=0; a=1860; +1860; a no; b=0; a=60",
    "three odd ones for ever": "a no; x yes; b no; x yes; c no; x yes; +300; a no; b no; c no; x=0; a=300",
    "one alone": "a no; +300; a no; +300; a no; a=1860; b=1860",
    "two alone": "a no; b no; +300; a no; b=1860; a=1860",
    "accepted, then wrong everywhere": "a yes; b yes; c yes; a no; b no; c no; a=1860; d=1860",
    "the last attempt is of one that was accepted": "x yes; a no; b no; a=1860; b=1860; c=1860; x=0; x yes; a=60; c=0",
    "or of all, where none was": "a no; +60; b no; a=240; c=0; c no; a=1860; d=1860",
    "check now": "a no; a ask; a=0; a no; a=300",
    "check now, again and again": "a no; a ask; a no; a ask; a no; a ask; a no; a ask; a=1860; b ask; b=1860",
    "check now while all are stopped": "a no; b no; c no; d ask; d=0; a=1860; d no; d ask; d=1860",
    "who asks leaves the last attempt to one that was accepted": (
        "x yes; +1; a ask; a no; a ask; a no; a ask; a=1860; x=0; x yes; a=0; +1; a no; x=0; y=0"
    ),
    "accepted clears its own": "a no; +300; a yes; a=0; +1; a no; a=60",
}


@pytest.mark.parametrize("steps", GUARDS.values(), ids=GUARDS)
def test_guard(steps: str) -> None:
    now = [10_000.0]
    guard = LoginGuard(lambda: now[0])
    for step in map(str.strip, steps.split(";")):
        name, _, what = step.partition("=" if "=" in step else " ")
        if step.startswith("+"):
            now[0] += float(step)
        elif "=" in step:
            assert guard.wait(name) == float(what), step
        elif what == "ask":
            guard.ask(name)
        else:
            with contextlib.suppress(ProbeError), guard.attempt(name, Deadline(5), LoginRecord()):
                if what != "yes":
                    raise ProbeError("auth" if what == "no" else "timeout", "as the test wants it")


@pytest.mark.parametrize("gone", ["a", "monitor@jump:22"], ids=["removed", "an address"])
def test_the_last_attempt_is_left_to_who_is_asked(gone: str) -> None:
    """Neither to who was removed nor to a bastion that is no resource: or all would wait for half an hour."""
    def target(number: int, name: str) -> Target:
        settings = ResourceSettings(name=name, hostname="h", username="u", password=SecretStr("p"))
        return Target(number, settings, None, "", "")

    guards, others = Guards(), [target(1, "b"), target(2, "c")]
    guards.keep([target(0, gone), *others])
    guard = guards.of(others[0])
    now = guard._clock()
    guard._clock = lambda: now
    guard.accept(gone)
    guards.keep(others)
    now += 600
    guard.refuse("b")
    guard.refuse("c")
    assert guard.wait("b") == AUTH_RETRY


def test_guard_remembers_what_was_before_the_restart() -> None:
    guard = LoginGuard(lambda: 10_000.0)
    guard.refuse("a", 100)
    assert (guard.wait("a"), guard.wait("b")) == (200, 0)
    guard.refuse("b", 250)
    guard.refuse("b", 250)
    assert (guard.wait("b"), guard.wait("c")) == (LOCKOUT_WINDOW - 100, LOCKOUT_WINDOW - 100)
    guard.accept("d", 50)
    assert (guard.wait("a"), guard.wait("b"), guard.wait("c"), guard.refusals) == (0, 50, 0, 0)


def written(*refused: float, unseen: Sequence[float] = ()) -> str:
    """What a guard writes of logins so many seconds ago."""
    return json.dumps({"refused": [time.time() - ago for ago in refused],
                       "unseen": [(time.time() - ago, ago) for ago in unseen], "alone": False})  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="perf_counter counts the time of a suspended machine there")
def test_a_wait_ends_while_the_machine_is_suspended() -> None:
    """Else a password that is right again would wait for the rest of it after each night."""
    assert LoginGuard()._clock is healthchecker.lease_clock


def test_refusals_within_a_tick_of_monotonic_count() -> None:
    """Windows' has 16 ms, within which a host that answers at once can accept and refuse many times."""
    guard = LoginGuard()
    guard.accept("a")
    for _ in range(3):
        guard.refuse("a")
    assert guard.refusals == 3


def test_a_refusal_that_is_told_again_counts_once() -> None:
    """As machines do that share the work, each time one of them reads everything anew."""
    now = 1000.0
    guard = LoginGuard(lambda: now)
    guard.refuse("a", 100.0)
    for ago in (100.0, 99.0, 101.0):
        guard.hear("a", written(ago), is_own=False)
    assert guard.refusals == 1
    guard.hear("a", written(100.0, 10.0), is_own=False)
    assert guard.refusals == 2


def test_two_refusals_at_nearly_the_same_time_are_two() -> None:
    """Of which this machine knows one."""
    guard = LoginGuard(lambda: 1000.0)
    guard.refuse("a", 100.0)
    guard.hear("a", written(100.0, 102.0), is_own=False)
    assert guard.refusals == 2


def test_nothing_is_tried_until_the_login_before_is_answered() -> None:
    """Not even where the credential is proven. A late `not allowed` is no wrong password, and frees the next one."""
    def log_in(answer: concurrent.futures.Future[bool | None]) -> None:
        with guard.attempt("a", Deadline(5), record):
            raise LateLogin(Deadline(5), answer)

    guard, record, answer = LoginGuard(), LoginRecord(), concurrent.futures.Future[bool | None]()
    guard.accept("a")
    with pytest.raises(LateLogin):
        log_in(answer)
    with pytest.raises(ProbeError, match="not answered to the login before") as caught:
        log_in(answer)
    assert caught.value.cause == "timeout"
    answer.set_exception(NotAllowed("auth", "it was right and does not suffice"))
    assert (guard.refusals, guard.wait("a"), record.outcomes) == (0, 0, {})
    with pytest.raises(LateLogin):
        log_in(answer)


def test_a_key_locks_nothing() -> None:
    guard = LoginGuard(locks=False)
    for _ in range(20):
        with contextlib.suppress(ProbeError), guard.attempt("a", Deadline(5), LoginRecord()):
            raise ProbeError("auth", "refused")
    assert guard.wait("a") == 0 and guard.refusals == 0, "one more for each poll would fill the memory"


def test_who_tries_is_counted_whatever_changes_meanwhile(house: House) -> None:
    """A change of any resource between the question and the host's refusal: a guess that nobody counts."""
    house.write("name: a")
    with house.store.reading() as session:
        [target] = healthchecker.load_targets(session, house.vault).values()
    guards = Guards()
    for wrong in range(1, 4):
        guard = guards.trial(target, LoginRecord())
        guards.keep([])
        with contextlib.suppress(ProbeError), guard.attempt("a", Deadline(5), LoginRecord()):
            guards.keep([])
            raise ProbeError("auth", "refused")
        guards.keep([])
        assert guards.trial(target, LoginRecord()).refusals == wrong


def refuse_trial(guards: Guards, target: Target) -> bool:
    """One trial that is refused; whether it was made."""
    made, record, name = [], LoginRecord(), target.name
    with contextlib.suppress(ProbeError), guards.trial(target, record).attempt(name, Deadline(5), record):
        made.append(name)
        raise ProbeError("auth", "refused")
    return bool(made)


def one_target(house: House, password: str) -> Target:
    house.write(f"name: a, password: {password}")
    with house.store.reading() as session:
        [target] = healthchecker.load_targets(session, house.vault).values()
    return target


def test_refusals_of_before_the_start_are_several(house: House) -> None:
    """A restart tells of three: trials of other passwords count with all of them."""
    guards, watched = Guards(), one_target(house, "wrong")
    guards.keep([watched])
    guards.of(watched).hear("a", written(80.0, 70.0, 60.0), is_own=True)
    made = [refuse_trial(guards, one_target(house, f"guess{number}")) for number in range(5)]
    assert made == [True, False, False, False, False], "four in all: a directory locks at the fifth"


def test_what_was_typed_and_refused_counts_after_a_restart_and_elsewhere(house: House) -> None:
    """For what is typed there; no password that is saved waits for a guess."""
    def begin(before: Mapping[str, str]) -> Guards:
        guards = Guards()
        guards.begin(healthchecker.LoginJournal(keep), before)
        guards.keep([])
        return guards

    def keep(row: str, text: str, patience: float, siblings: Collection[str]) -> bool:
        rows.update({row: text} if text else {})
        return True

    rows, guesses = dict[str, str](), [one_target(house, f"guess{number}") for number in range(6)]
    here, elsewhere = begin({}), begin({})
    assert [refuse_trial(here, one) for one in guesses[:2]] == [True, True]
    elsewhere.hear({row: [text] for row, text in rows.items()})
    assert refuse_trial(elsewhere, guesses[2])
    here.hear({row: [text] for row, text in rows.items()})
    assert [refuse_trial(here, one) for one in guesses[3:5]] == [True, False]
    restarted, saved = begin(rows), one_target(house, "saved")
    assert not refuse_trial(restarted, guesses[5])
    restarted.keep([saved])
    assert restarted.of(saved).wait("a") == 0


def test_what_was_typed_and_accepted_after_a_restart_is_refused_no_more(house: House) -> None:
    rows = dict[str, str]()

    def begin() -> Guards:
        guards = Guards()
        guards.begin(healthchecker.LoginJournal(lambda row, text, *_: bool(rows.update({row: text})) or True), rows)
        return guards

    wrong, right, record = one_target(house, "wrong"), one_target(house, "right"), LoginRecord()
    assert refuse_trial(begin(), wrong)
    with begin().trial(right, record).attempt("a", Deadline(5), record):
        pass
    assert not any(rows.values()), "a directory counts anew"
    assert [refuse_trial(begin(), wrong) for _ in range(5)] == [True] * 4 + [False]


@pytest.mark.parametrize("password", ["wrong", "right", "another"])
def test_what_was_typed_and_refused_is_no_new_password(house: House, password: str) -> None:
    """Tested, and saved all the same; one that nobody has tried is tried at once, and one that was accepted."""
    guards, wrong, record = Guards(), one_target(house, "wrong"), LoginRecord()
    guards.keep([])
    right = one_target(house, "right")
    with guards.trial(right, record).attempt("a", Deadline(5), record):
        pass
    assert [refuse_trial(guards, wrong) for _ in range(5)] == [True] * 4 + [False]
    saved = one_target(house, password)
    for _ in range(2):
        guards.keep([saved])
        assert (guards.of(saved).wait("a") > 0) is (password == "wrong")


@pytest.mark.parametrize("other", [
    "platform: tcp, hostname: 192.0.2.2, port: 25", "platform: dns, hostname: example.com",
    "platform: local", "platform: simulated",
])  # fmt: skip
def test_what_shows_no_secret_waits_for_nobody(house: House, other: str) -> None:
    """A port that wants our certificate is `auth`; told of that at a start, all without a credential would wait."""
    house.write("name: a, platform: tcp, hostname: 192.0.2.1, port: 993, tls: true", f"name: b, {other}")
    with house.store.reading() as session:
        targets = healthchecker.load_targets(session, house.vault)
    port, beside = targets.values()
    guards = Guards()
    guards.keep([port, beside])
    for _ in range(5):
        with contextlib.suppress(ProbeError), guards.of(port).attempt("a", Deadline(5), LoginRecord()):
            raise ProbeError("auth", "the host wants a client certificate")
    assert guards.of(port).wait("a") == guards.of(beside).wait("b") == 0


class Login(HostSession):
    """Polls over it succeed, whatever becomes of the password."""

    alive, stale = True, False

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        return output.take(output.mark)

    def close(self) -> None:
        pass


class Account(Connection):
    """A host of a directory, and what its poller has of it."""

    def __init__(self, directory: Directory, name: str, guard: LoginGuard) -> None:
        settings = directory.settings.model_copy(update={"name": name})
        access = ConnectionContext(KnownHosts(Path("none")), Resolver(), keeps=directory.keeps)
        super().__init__(Target(1, settings, None, "", ""), guard, access)
        self.keeper.clock, self._directory = lambda: directory.now, directory

    def open_session(self, deadline: Deadline) -> HostSession:
        with self._guard.attempt(self._target.name, deadline, self.record):
            self._directory.log_in(self._target.name, self._guard)
        return Login()


class Directory:
    """An account in a directory that is locked by the fifth wrong password in 30 minutes; a discrete simulation of
    hosts that are polled with one credential, by a clock of its own."""

    settings = ResourceSettings.model_validate(
        {"name": "a", "hostname": "192.0.2.1", "username": "monitor", "password": "p", "relogin": 600})  # fmt: skip

    def __init__(self, moment: float, followed: float, seed: int, *, keeps: bool) -> None:
        self.now, self.changes, self.follows, self.keeps = 0.0, moment, moment + followed, keeps
        self.wrong: list[tuple[float, str]] = []
        self.lost: set[str] = set()  # in the time in which what was open could have served on
        self.random = random.Random(seed)
        self.guards = [LoginGuard(lambda: self.now), LoginGuard(lambda: self.now)]  # of the old one and the new one
        self.accounts: dict[tuple[str, LoginGuard], Account] = {}
        self.right: dict[str, float] = {}

    def log_in(self, name: str, guard: LoginGuard) -> None:
        if (guard is self.guards[1]) != (self.now >= self.changes):
            self.wrong.append((self.now, name))
            assert sum(then > self.now - 1800 for then, _ in self.wrong) < 5, "locked"
            raise ProbeError("auth", "refused")

    def due(self, name: str, at: float) -> float:
        """What the poller of `name` does at `at`; gives when it does so again."""
        self.now = at
        guard = self.guards[at >= self.follows]
        if (name, guard) not in self.accounts:
            self.accounts[name, guard] = Account(self, name, guard)
        account = self.accounts[name, guard]
        if account.keeper.lives or guard.wait(name) <= 0:
            with contextlib.suppress(ProbeError):
                account.run("", Output("mark"), Deadline(10))
                self.right.setdefault(name, at)
                return at + 60 * self.random.uniform(0.9, 1.1)
        if name in self.right and at < min(self.follows, self.changes + 600):
            self.lost.add(name)
        return at + min(60, guard.wait(name))

    def run(self, hosts: int) -> float:
        """Until a good while after the inventory has the new password; the seconds after it until all are right."""
        queue = [(number * 60 / hosts, f"host{number}") for number in range(hosts)]
        heapq.heapify(queue)
        renewed = False
        while queue[0][0] < self.follows + 600:
            at, name = heapq.heappop(queue)
            if at >= self.follows and not renewed:  # its pollers start anew, 50 in a second
                names, renewed = [name, *(other for _, other in queue)], True
                queue = [(self.follows + number / 50, other) for number, other in enumerate(names)]
                heapq.heapify(queue)
                self.right.clear()
                continue
            heapq.heappush(queue, (self.due(name, at), name))
        return max(self.right.values()) - self.follows if len(self.right) == hosts else math.inf


@pytest.mark.long
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("keeps", [False, True], ids=["fresh", "kept"])
def test_a_password_that_changes_locks_no_account(seed: int, keeps: bool) -> None:
    """At an arbitrary moment, of 200 hosts; the inventory follows after an arbitrary while."""
    luck = random.Random(seed)
    directory = Directory(luck.uniform(0, 300), luck.uniform(0, 1700), seed, keeps=keeps)
    assert directory.run(200) <= 60
    assert len(directory.wrong) <= 3
    confirmed = {name for name, count in Counter(name for _, name in directory.wrong).items() if count > 1}
    assert not keeps or directory.lost <= confirmed


class Mixed(Directory):
    """Whose password stays what it is, beside hosts with an account of their own that never accept it."""

    settings = Directory.settings.model_copy(update={"relogin": 900.0})

    def log_in(self, name: str, guard: LoginGuard) -> None:
        if name.startswith("odd"):
            raise ProbeError("auth", "refused")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("odd", [1, 2, 3])
def test_hosts_that_never_accept_cost_the_others_no_poll(odd: int, seed: int) -> None:
    """In six hours. They come after the others, whose open sessions prove nothing of the credential meanwhile."""
    directory = Mixed(math.inf, 0, seed, keeps=True)
    names = [*(f"host{number}" for number in range(5)), *(f"odd{number}" for number in range(odd))]
    queue = [(number / 50, name) for number, name in enumerate(names)]
    while queue[0][0] < 6 * 3600:
        at, name = heapq.heappop(queue)
        heapq.heappush(queue, (directory.due(name, at), name))
    assert directory.right.keys() == set(names[:5])
    assert directory.lost == set()


def attempts(
    guard: LoginGuard, count: int, outcome: str, seconds: float, at_once: int = 1
) -> tuple[int, int]:
    """Logins in `count` threads at once, each taking `seconds`; how many were made, and at most at once. The first
    ones wait until so many are there."""
    lock, made, running, most = threading.Lock(), 0, 0, 0
    full = threading.Event()

    def login(name: str) -> None:
        nonlocal made, running, most
        with guard.attempt(name, Deadline(60), LoginRecord()):
            with lock:
                made, running = made + 1, running + 1
                most = max(most, running)
                if most >= at_once:
                    full.set()
            full.wait(10)
            threading.Event().wait(seconds)
            with lock:
                running -= 1
            if outcome == "no":
                raise ProbeError("auth", "refused")

    def work(name: str) -> None:
        with contextlib.suppress(ProbeError):
            login(name)

    threads = [threading.Thread(target=work, args=(f"m{number}",)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return made, most


def test_many_at_once_with_a_wrong_password() -> None:
    assert attempts(LoginGuard(), 30, "no", 0.01) == (3, 1)


@pytest.mark.long
def test_many_at_once_with_a_wrong_password_that_is_refused_slowly() -> None:
    """sshd takes its time to refuse (two seconds and more with PAM), so the others must not lose patience together."""
    assert attempts(LoginGuard(), 30, "no", 1.2) == (3, 1)


def test_many_at_once_when_a_password_has_changed() -> None:
    guard = LoginGuard()
    guard.accept("other")
    assert attempts(guard, 30, "no", 0.3, at_once=3) == (3, 3)


def test_first_logins_go_one_after_the_other_until_one_is_accepted() -> None:
    guard = LoginGuard()
    assert attempts(guard, 1, "yes", 0.0) == (1, 1)
    made, most = attempts(guard, 8, "yes", 0.2, at_once=3)
    assert (made, most) == (8, 3), "as many as could be refused"
    fresh = LoginGuard()
    made, most = attempts(fresh, 2, "yes", 0.2)
    assert (made, most) == (2, 1)


# --- refused logins: with pollers ---
NAMES = ["a", "b", "c", "d", "e"]


def test_wrong_password_stops_all_and_survives_a_restart(house: House, machines: Machines) -> None:
    def write(password: str = "secret", limits: str = "{}") -> None:
        rest = f"interval: 1, password: {password}, limits: {limits}"
        house.write(*(f"name: {name}, {rest}" for name in NAMES), "name: other, username: other, platform: freebsd,"
                    " hostname: 192.0.2.1, interval: 1")  # fmt: skip

    write()
    machines.behaviours = {name: machines.login(name, refused) for name in NAMES}
    machines.behaviours["other"] = machines.login("other")
    with house.watching():
        wait_for(lambda: all(house.state(name) == ("unhealthy", "auth") for name in NAMES))
        wait_for(lambda: machines.logins.count("other") >= 3)
        assert house.state("other") == ("healthy", "")
        tried = [name for name in machines.logins if name != "other"]
        assert len(tried) == len(set(tried)) == 3
    for limits in ("{}", "{cpu_percent: 90}"):  # a restart, also with another change than that of the credential
        write(limits=limits)
        machines.logins.clear()
        with house.watching():
            wait_for(lambda: machines.logins.count("other") >= 2)
            assert set(machines.logins) == {"other"}, limits
            assert all(house.state(name) == ("unhealthy", "auth") for name in NAMES)
    with house.watching():
        machines.logins.clear()
        write("changed")
        machines.behaviours |= {name: machines.login(name) for name in NAMES}
        wait_for(lambda: set(NAMES) <= set(machines.logins))
        wait_for(house.aggregator.is_healthy)


def test_a_restart_between_a_refusal_and_its_second_attempt(house: House, machines: Machines) -> None:
    """What was known lasts until the attempt has an outcome, as it does without a restart."""
    house.write("name: a, interval: 1, timeout: 3")
    machines.behaviours["a"] = machines.login("a")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["a"] = machines.login("a", refused)
        wait_for(lambda: house.poller("a").standing.bad == 1)
        assert 58 < lease_left(house) <= 65
        wait_for(lambda: house.monitor._context.recorder.flush())
    with house.watching():
        assert house.aggregator.is_healthy()
        assert 50 < lease_left(house) <= 65
        assert house.poller("a").expires_mono - healthchecker.lease_clock() > 50
    house.age(50)
    with house.watching():
        assert house.aggregator.is_healthy()
        assert 0 < lease_left(house) < 20
    house.age(300)
    with house.watching():
        assert not house.aggregator.is_healthy()


@pytest.mark.long
@pytest.mark.parametrize(("age", "tried"), [
    (0, False), (200, False), (280, False), (301, True), (-60, False), (-4000, False)])
def test_age_of_a_refusal_at_a_restart(house: House, machines: Machines, age: float, tried: bool) -> None:
    """Less than 0: the wall clock was set back, and when it was is not known."""
    house.write("name: a, interval: 1")
    machines.behaviours["a"] = machines.login("a", refused)
    with house.watching():
        wait_for(lambda: house.stored("a") == ("unhealthy", "auth"))
    house.age(age)
    machines.logins.clear()
    with house.watching():
        wait_for(lambda: house.state("a") == ("unhealthy", "auth"))
        if tried:
            wait_for(lambda: machines.logins)
        assert not machines.ended.wait(0.3)
        assert machines.logins == (["a"] if tried else [])


def kept_logins(house: House) -> list[dict[str, Any]]:
    """What is written of logins, of each resource that anything is written of."""
    with house.store.reading() as session:
        own, _ = healthchecker.written_logins(session, "")
    return [json.loads(text) for text in own.values()]


@pytest.mark.long
def test_restarts_during_a_login_count(house: House, machines: Machines) -> None:
    """Whoever was killed before the host said no sends the next wrong password at the next start, and so on."""
    house.write("name: a, interval: 1", "name: b, interval: 1")
    machines.behaviours = {"a": machines.login("a", machines.hang), "b": machines.login("b")}
    machines.behaviours["b"] = unreachable
    for life in range(1, REFUSALS + 1):
        with house.watching():
            wait_for(lambda life=life: machines.logins == ["a"] * life)     # type: ignore[misc]
    with house.watching():
        wait_for(lambda: house.monitor.login_wait("a") > 0)
        why = "before each of the last starts a login with the same credential had no outcome yet; next attempt in "
        assert why in house.monitor.guards.of(house.poller("a").target).why("a")
        assert 0 < house.monitor.login_wait("b") <= healthchecker.AUTH_RETRY
        assert machines.logins == ["a"] * REFUSALS
    house.age(healthchecker.AUTH_RETRY)
    machines.behaviours["a"] = machines.login("a")
    with house.watching():
        wait_for(lambda: house.state("a") == ("healthy", ""))
        wait_for(lambda: not kept_logins(house))


@pytest.mark.parametrize("seen", [0, 1])
def test_unseen_logins_count_with_a_refused_one(seen: int) -> None:
    guard = LoginGuard(lambda: 10_000.0)
    guard.hear("a", written(*[100.0] * seen, unseen=[40.0, 30.0]), is_own=True)
    assert guard.wait("b") == (pytest.approx(LOCKOUT_WINDOW - 30, abs=1) if seen else 0)
    assert guard.refusals == seen
    guard.accept("b")
    assert guard.wait("b") == 0


def test_refusals_behind_a_kept_session_are_known_after_a_restart(house: House, machines: Machines) -> None:
    """No poll is refused meanwhile, for the session that is open serves on; each start logs in anew."""
    house.write("name: a, interval: 1")
    tries = 0
    for _ in range(7):
        with house.watching():
            wait_for(lambda: house.stored("a") == ("healthy", ""))
            guard, before = house.monitor.guards.of(house.poller("a").target), tries
            with contextlib.suppress(ProbeError), guard.attempt("a", Deadline(5), LoginRecord()):
                tries += 1
                raise ProbeError("auth", "refused")
            wait_for(lambda guard=guard: len(kept_logins(house)[0]["refused"]) == guard.refusals)   # type: ignore[misc]
        with house.store.writing() as session:
            [row] = session.scalars(sqlalchemy.select(Status))
            sample = json.loads(row.sample)
            row.sample = json.dumps({**sample, "details": {**sample["details"], "session_seconds": 4000.0}})
    assert tries == before == 4, "directories lock at the fifth"


def test_refusals_are_written_anew_when_the_clock_is_set(house: House, machines: Machines) -> None:
    """By the clock of before they would be older than they are, and be tried again at once after a start."""
    house.write("name: a, interval: 1")
    machines.behaviours["a"] = machines.login("a", refused)
    ahead = 0.0
    with house.watching(lambda: time.time() + ahead):
        wait_for(lambda: kept_logins(house) and kept_logins(house)[0]["refused"])
        [before] = kept_logins(house)[0]["refused"]
        ahead = 900.0
        wait_for(lambda: kept_logins(house)[0]["refused"] == [pytest.approx(before + 900, abs=LATE)])
        assert house.monitor.login_wait("a") > 200


def test_refusals_and_boots_with_a_clock_that_is_wrong(house: House, machines: Machines) -> None:
    """Of one that is ahead, until it is put right, they look too old, and of one that is behind as if of the future:
    they count all the same, or each such start would show the password once more."""
    house.write("name: a, interval: 1")
    machines.behaviours["a"] = machines.login("a", refused)
    with house.watching():
        wait_for(lambda: house.stored("a") == ("unhealthy", "auth"))
    house.age(60)   # or the next one could be the same
    for ahead, count in (7200.0, 2), (-7200.0, 2), (-FAR_AWAY, 2):
        house.elsewhere("UPDATE setting SET value = value + 1 WHERE name = 'boot'")
        wrong = [ahead]
        with house.watching(lambda wrong=wrong: time.time() + wrong[-1]):   # type: ignore[misc]
            wait_for(lambda: house.state("a") == ("unhealthy", "auth"))
            wrong.append(0.0)
            wait_for(lambda: abs(house.monitor._zero_at - (time.time() - healthchecker.lease_clock())) < 1)
            wait_for(lambda count=count: [len(told["refused"]) for told in kept_logins(house)] == [count])  # type: ignore[misc]
            assert house.monitor.guards.of(house.poller("a").target).refusals == count
            assert len(machines.logins) == count and house.monitor.login_wait("a") > 200


@pytest.mark.long
def test_a_late_refusal_is_written_down(house: House, machines: Machines) -> None:
    house.write("name: a, interval: 1")

    def late(guard: LoginGuard, deadline: Deadline) -> None:
        answer = concurrent.futures.Future[bool | None]()
        answer.set_exception(ProbeError("auth", "refused"))
        raise LateLogin(deadline, answer)

    machines.behaviours["a"] = machines.login("a", late)
    with house.watching():
        wait_for(lambda: [len(told["refused"]) for told in kept_logins(house)] == [1])
    machines.logins.clear()
    with house.watching():
        wait_for(lambda: house.state("a") == ("unhealthy", "stale"))
        assert not machines.logins and house.monitor.login_wait("a") > 200


def test_refusals_of_another_machine_count(house: House) -> None:
    """Of the same resource, or of another with its credential; what that machine tries at the moment does not."""
    house.write("name: a", "name: b")
    with house.store.reading() as session:
        a, b = healthchecker.load_targets(session, house.vault).values()
    rows: dict[str, str] = {}
    later = 0.0
    here, there, late = Guards(), Guards(), Guards()

    def keep(row: str, text: str, patience: float, siblings: Collection[str]) -> bool:
        rows[row] = text
        return True

    for guards in here, there, late:
        guards.begin(healthchecker.LoginJournal(keep, lambda: time.time() + later), {})
    for guards in here, there:
        guards.keep([a, b])
        assert guards.of(a) is guards.of(b)
        guards.of(a)._clock = lambda: time.perf_counter() + later
    record = LoginRecord()
    for name, refusals in ("a", 1), ("b", 2), ("a", 3):
        there.of(a).ask(name)
        with contextlib.suppress(ProbeError), there.of(a).attempt(name, Deadline(5), record):
            here.hear({row: [text] for row, text in rows.items()})
            assert here.of(a).refusals == refusals - 1
            later += 400.0
            raise ProbeError("auth", "refused")
        for _ in range(2):
            here.hear({row: [text] for row, text in rows.items()})
        assert here.of(a).refusals == refusals
    assert here.of(b).wait("b") > 1000
    later = 0.0
    late.hear({row: [text] for row, text in rows.items()})
    late.keep([a, b])
    assert [late.of(one).refusals for one in (a, b)] == [2, 3], "as they become known"


def test_thousands_of_credentials_are_taken_up_at_once(house: House) -> None:
    """A start, and a clock that is set back: each looked through all that was written of the others."""
    a = one_target(house, "wrong")
    targets = [replace(a, login_mark=str(number), settings=a.settings.model_copy(update={
        "name": f"a{number}", "password": SecretStr(f"wrong{number}")})) for number in range(6000)]  # fmt: skip
    rows = [healthchecker.login_row(one.login_mark, one.name, one.settings.hostname, one.settings.username)
            for one in targets]  # fmt: skip
    guards = Guards()
    guards.begin(healthchecker.LoginJournal(), dict.fromkeys(rows, written(100.0)))
    begun = time.thread_time()     # of a machine that has other work
    guards.keep(targets)
    assert all(guards.of(one).refusals == 1 for one in targets)
    guards.hear_gone()
    guards.write_again(is_back=True)
    assert time.thread_time() - begun < 5


def test_logins_of_the_last_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hours; what is older is forgotten."""
    now_mono, record = 1e6, LoginRecord()
    monkeypatch.setattr(healthchecker, "time", SimpleNamespace(monotonic=lambda: now_mono))
    for outcome in ("accepted", "refused"):
        record.count(outcome)
        now_mono += 12 * 3600
    assert record.last_day == 1     # a day after the first
    now_mono += 10 * 3600
    assert record.last_day == 1
    now_mono += 3 * 3600
    assert record.last_day == 0
    for _ in range(100):
        record.count("accepted")
        now_mono += 3600
    assert record.outcomes == {"accepted": 101, "refused": 1}
    assert 23 <= record.last_day <= 24 and len(record._hours) <= 24


def test_a_test_of_other_settings_brings_no_old_refusals_back(house: House) -> None:
    """With the same password, of a host that refused before the start and was accepted since."""
    watched = one_target(house, "right")
    row = healthchecker.login_row(watched.login_mark, "a", watched.settings.hostname, watched.settings.username)
    guards, record = Guards(), LoginRecord()
    guards.begin(healthchecker.LoginJournal(), {row: written(900.0, 600.0, 300.0)})
    guards.keep([watched])
    assert guards.of(watched).refusals == 3
    guards.of(watched).ask("a")
    with guards.of(watched).attempt("a", Deadline(5), record):
        pass
    for _ in range(2):
        with guards.trial(replace(watched, login_mark="of another place"), record).attempt(
                "a", Deadline(5), record):  # fmt: skip
            pass
        assert guards.of(watched).refusals == 0 and guards.of(watched).rows.of["a"] == row


@pytest.mark.parametrize("how", ["rotated", "renamed"])
def test_refusals_follow_a_resource(house: House, machines: Machines, how: str) -> None:
    """Its mark is another one then, by which the next start knows it."""
    house.write("name: a, interval: 1")
    machines.behaviours["a"] = machines.login("a", refused)
    with house.watching():
        wait_for(lambda: [len(told["refused"]) for told in kept_logins(house)] == [1])
    with house.store.writing() as session:
        [row] = session.scalars(sqlalchemy.select(Resource))
        if how == "renamed":
            healthchecker.reseal(session, [row], house.vault, "b")
        else:
            house.vault.create("next.pem")
            healthchecker.reseal(session, [row], house.vault)
        name = row.name
    if how == "rotated":
        house.vault.retire()
    machines.logins.clear()
    machines.behaviours[name] = machines.login(name, refused)
    with house.watching():
        assert house.monitor.login_wait(name) > 200
        wait_for(lambda: house.state(name) == ("unhealthy", "auth"))
        assert not machines.logins


def test_a_rename_counts_no_refusal_again(house: House, machines: Machines) -> None:
    """It would be the third of a password that others are accepted with, and stop them, too."""
    machines.behaviours = {name: machines.login(name, refused) for name in "ab"} | {"good": machines.login("good")}
    house.write("name: good, interval: 1", "name: a, interval: 60, critical: false")
    with house.watching():
        wait_for(lambda: house.state("a") == ("unhealthy", "auth"))
        house.monitor.poll_now("a", 5)
        wait_for(lambda: [len(told["refused"]) for told in kept_logins(house)] == [2])
        house.write("name: good, interval: 1", "name: b, was: a, interval: 60, critical: false")
        house.monitor.catch_up()
        guard = house.monitor.guards.of(house.poller("b").target)
        assert guard.refusals <= 2 and guard.has_refused("b") and not guard.has_refused("a")
        assert [house.monitor.login_wait(name) > 0 for name in ("good", "b")] == [False, True]
        wait_for(lambda: [len(told["refused"]) for told in kept_logins(house)] == [2])
        wait_for(lambda: not guard.refusals)        # the other one is accepted again
        machines.behaviours["b"] = machines.login("b")
        assert house.monitor.poll_now("b", 5)
        wait_for(lambda: not kept_logins(house))


@pytest.mark.parametrize("meanwhile", ["name: b, platform: simulated", "name: a, password: another"],
                         ids=["taken out", "another password"])  # fmt: skip
def test_a_refused_password_that_comes_back_after_a_restart_is_known(
    house: House, machines: Machines, meanwhile: str
) -> None:
    """Each edit with a restart would show it four more times otherwise, and a directory locks at the fifth."""
    machines.behaviours["a"] = machines.login("a", refused)
    house.write("name: a, interval: 1")
    with house.watching():
        wait_for(lambda: [len(told["refused"]) for told in kept_logins(house)] == [1])
        house.monitor.poll_now("a", 5)
    assert len(machines.logins) == 2
    machines.behaviours["a"] = unreachable
    house.write(meanwhile)
    with house.watching():
        wait_for(lambda: len(house.monitor.pollers) == 1)
    machines.behaviours["a"] = machines.login("a", refused)
    house.write("name: a, interval: 1")
    with house.watching():
        assert house.monitor.login_wait("a") > 200
        wait_for(lambda: house.state("a") == ("unhealthy", "auth"))
        assert len(machines.logins) == 2


@pytest.mark.parametrize("then", ["name: a, hostname: elsewhere", "name: b"], ids=["hostname", "name"])
@pytest.mark.parametrize("is_good", [False, True], ids=["refused", "accepted elsewhere"])
def test_refusals_outlast_what_a_resource_is_called(
    house: House, machines: Machines, then: str, is_good: bool
) -> None:
    """A corrected hostname or name is another row of logins, and a directory counts on; unless it has cleared."""
    def write(line: str) -> None:
        house.write(f"{line}, interval: 1, platform: freebsd, username: monitor", *["name: good"] * is_good)

    machines.behaviours = {name: machines.login(name, refused) for name in "ab"} | {"good": machines.login("good")}
    write("name: a, hostname: here")
    with house.watching():
        wait_for(lambda: house.state("a") == ("unhealthy", "auth"))
        for _ in range(2):
            house.monitor.poll_now("a", 5)
        wait_for(lambda: not is_good or house.state("good")[0] == "healthy")
        for _ in range(is_good):    # after all refusals
            house.monitor.poll_now("good", 5)
    tried = len(machines.logins)
    write(then if "hostname" in then else f"{then}, hostname: here")
    for _ in range(2):
        with house.watching():
            name = then[6]
            assert (house.monitor.login_wait(name) > 1800) is not is_good
            assert is_good or house.monitor.guards.of(house.poller(name).target).refusals == 3
    assert is_good or len(machines.logins) == tried
    write("name: a, hostname: here")
    with house.watching():
        assert is_good or house.monitor.guards.of(house.poller("a").target).refusals == 3, "each is still one"


def test_another_user_of_a_bastion_was_not_refused(house: House) -> None:
    """The same password of another account is another credential, also after a restart: or one host that refuses its
    own would cut off all that is behind the bastion."""
    target, rows = one_target(house, "wrong"), dict[str, str]()

    def watched(user: str, hop: str) -> Target:
        settings = target.settings.model_copy(update={"username": user, "proxy_jump": f"{hop}@192.0.2.9:22"})
        return replace(target, settings=settings)

    def keep(row: str, text: str, *_: object) -> bool:
        rows[row] = text
        return True

    app, guards = watched("app", "jump"), Guards()
    guards.begin(healthchecker.LoginJournal(keep), {})
    guards.keep([app])
    for _ in range(3):
        guards.of(app).refuse("a")
        guards.of(app).write("a")
    for hop, refusals in (("jump", 0), ("APP", 3)):
        one, again = watched("app", hop), Guards()
        again.begin(healthchecker.LoginJournal(), {row: text for row, text in rows.items() if text})
        again.keep([one])
        found = [again.of(each) for each in (one, *one.bastions())]
        again.hear_gone()
        assert [guard.refusals for guard in found] == [3, refusals]


def test_nobody_without_the_key_can_try_which_password_was_refused(house: House, tmp_path: Path) -> None:
    """What the database says of logins is the same for the same password under one key, and under no other."""
    [mark, again, other] = [one_target(house, password).login_mark for password in ("wrong", "wrong", "right")]
    assert mark == again != other
    another = healthchecker.Vault(tmp_path / "other keys")
    another.create()
    with house.store.reading() as session:
        [row] = session.scalars(sqlalchemy.select(healthchecker.Resource))
        row.password = another.seal("wrong", *healthchecker.binding("password", row))
        assert healthchecker.mark_of(row, another, "wrong") != mark


def test_refusals_that_an_older_version_stored_count(house: House) -> None:
    """It wrote nothing but what the last polls were. What was not tried is no refusal."""
    target = one_target(house, "wrong")
    for reason, strip, refusals in ("refused", "haa", 2), ("not tried: before", "haa", 0), ("", "aah", 0):
        guard = LoginGuard()
        stored = Status(credential_digest=target.credential_digest, strip=strip, reason=reason, sample="null")
        assert healthchecker.restore_login(guard, target, stored, 30.0)
        assert guard.refusals == refusals


def test_refusals_are_written_anew_where_a_secret_is_sealed_anew(house: House) -> None:
    """A rotation of keys gives the same password another mark, by which the next start knows it."""
    rows: dict[str, str] = {}

    def keep(row: str, text: str, patience: float, siblings: Collection[str]) -> bool:
        rows[row] = text
        return True

    guards, before = Guards(), one_target(house, "wrong")
    guards.begin(healthchecker.LoginJournal(keep), {})
    with contextlib.suppress(ProbeError), guards.of(before).attempt("a", Deadline(5), LoginRecord()):
        raise ProbeError("auth", "refused")
    after = replace(before, login_mark="of another key")
    known = guards.of(before)
    assert guards.of(after) is known
    later = Guards()
    later.begin(healthchecker.LoginJournal(keep), dict(rows))
    assert later.of(after).refusals == 1


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"refused": 1}', '{"refused": ["x"], "unseen": []}', "NaN",
                                  '{"refused": [NaN], "unseen": [[1e999, NaN]], "alone": 3}'])  # fmt: skip
def test_a_damaged_row_says_nothing(text: str) -> None:
    guard = LoginGuard()
    guard.hear("a", text, is_own=True)
    assert guard.wait("a") == 0


@pytest.mark.long
@pytest.mark.parametrize("restart", [False, True])
def test_odd_hosts_that_do_not_count_close_nothing(house: House, machines: Machines, restart: bool) -> None:
    """Two refuse a credential that the others accept; they come first, and `restart`: nothing fresh is stored."""
    house.write("name: odd1, critical: false, interval: 1", "name: odd2, critical: false, interval: 1",
                *(f"name: {name}, interval: 1" for name in NAMES))  # fmt: skip
    machines.behaviours = {name: machines.login(name, refused) for name in ("odd1", "odd2")}
    machines.behaviours |= {name: machines.login(name) for name in NAMES}
    for _ in range(1 + restart):
        with house.watching():
            wait_for(house.aggregator.is_healthy)
            wait_for(lambda: house.state("odd1") == house.state("odd2") == ("unhealthy", "auth"))
            again = machines.logins.copy()
            wait_for(lambda again=again: min(map((machines.logins[len(again):]).count, NAMES)) > 6)  # type: ignore[misc]
            assert house.aggregator.is_healthy()
            assert max(machines.logins.count("odd1"), machines.logins.count("odd2")) <= 1 + restart
        house.age(100)
        house.age(200, "odd%")
    assert turns(house) == ["closed", "open"] * (1 + restart), "closed by its start alone"


@pytest.mark.parametrize(("odd", "before"), [(["odd1", "odd2"], ""), (["odd1"], "h")], ids=["never", "no longer"])
def test_a_restart_beside_hosts_that_refuse_closes_nothing(
    house: House, machines: Machines, odd: list[str], before: str
) -> None:
    """The others' sessions were kept: three refusals are the last that is known of the credential."""
    house.write(*(f"name: {name}, critical: false, interval: 1" for name in odd),
                *(f"name: {name}, interval: 1" for name in NAMES))  # fmt: skip
    machines.behaviours = {name: machines.login(name, refused) for name in odd}
    machines.behaviours |= {name: machines.login(name) for name in NAMES}
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        wait_for(lambda: all(house.stored(name) == ("unhealthy", "auth") for name in odd))
    with house.store.writing() as session:
        names = {row.id: row.name for row in session.scalars(sqlalchemy.select(healthchecker.Resource))}
        for kept in session.scalars(sqlalchemy.select(healthchecker.Setting)):
            if kept.name.startswith("logins/"):
                kept.text = written(*[40.0, 20.0, 0.0][:3 // len(odd)])
        for row in session.scalars(sqlalchemy.select(Status)):
            if names[row.resource_id] in odd:
                row.strip = before + 3 * healthchecker.REFUSED_MARK
            else:
                sample = json.loads(row.sample)
                row.sample = json.dumps({**sample, "details": {**sample["details"], "session_seconds": 400.0}})
    machines.logins.clear()
    with house.watching():
        wait_for(lambda: set(NAMES) <= set(machines.logins))
        assert house.aggregator.is_healthy()
        assert not set(odd) & set(machines.logins)


def turns(house: House) -> list[str]:
    """How the gate turned, as far as it is written."""
    with house.store.reading() as session:
        return [*session.scalars(sqlalchemy.select(Event.state).where(Event.kind == "gate").order_by(Event.id))]


@pytest.mark.long
def test_the_standing_of_siblings_holds_until_their_lease_ends(house: House, machines: Machines) -> None:
    house.write(*(f"name: {name}, interval: 1, fall: 1" for name in NAMES))
    machines.behaviours = {name: machines.login(name) for name in NAMES}
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        changed = Machines()
        machines.behaviours = {name: changed.login(name, refused) for name in NAMES}
        wait_for(lambda: len(changed.logins) == 3)
        odd, siblings = set(changed.logins), set(NAMES) - set(changed.logins)
        wait_for(lambda: all(house.state(name) == ("unhealthy", "auth") for name in odd))
        assert all(house.state(name) == ("healthy", "") for name in siblings)
        wait_for(lambda: all(house.state(name) == ("unhealthy", "stale") for name in siblings))
        assert "the same credential was refused" in house.poller(siblings.pop()).standing.reason
        assert len(changed.logins) == 3


def test_a_refusal_counts_by_fall_and_renews_the_lease(house: House, machines: Machines) -> None:
    """A directory's hiccup: the second attempt comes after a minute, until then the host is what it was."""
    house.write("name: a, interval: 1, timeout: 3")
    machines.behaviours["a"] = machines.login("a")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["a"] = machines.login("a", refused)
        wait_for(lambda: house.poller("a").standing.bad == 1)
        wait_for(lambda: 55 < lease_left(house) - 5 <= 60)
        machines.logins.clear()
        assert not machines.ended.wait(1.5)
        assert (machines.logins, house.state("a")) == ([], ("healthy", ""))
    machines.behaviours["a"] = machines.hang
    with house.watching():  # a restart between does not forget it
        assert 0 < house.monitor.guards.of(house.poller("a").target).wait("a") <= 60


def test_an_accepted_login_frees_the_others(house: House, machines: Machines) -> None:
    house.write(*(f"name: {name}, interval: 1" for name in NAMES))
    machines.behaviours = {name: machines.login(name, refused) for name in NAMES}
    with house.watching():
        wait_for(lambda: all(house.state(name) == ("unhealthy", "auth") for name in NAMES))
        tried, free = set(machines.logins), set(NAMES) - set(machines.logins)
        assert len(machines.logins) == len(tried) == 3
        machines.behaviours = {name: machines.login(name) for name in NAMES}
        house.poller(min(free)).poll_now()
        wait_for(lambda: free <= set(machines.logins))  # never refused themselves: an interval of 1 s
        assert not tried & set(machines.logins[3:])


# --- what is stored, after a restart ---
def lease_left(house: House) -> float:
    return float(house.aggregator.lease.until.value) - time.monotonic()


# age of the stored state in seconds, a change of the inventory; whether it counts (its lease was 123 s)
STORED = {
    "fresh": (0.0, "", True),
    "older": (100.0, "", True),
    "just fresh": (113.0, "", True),
    "too old": (124.0, "", False),
    "days old": (200_000.0, "", False),
    "from the future": (-5.0, "", False),
    "a shorter interval": (1.0, ", interval: 59, fall: 3, tags: [t]", True),
    "a longer interval": (1.0, ", interval: 61, fall: 3, tags: [t]", False),
    "another limit": (1.0, ", limits: {cpu_percent: 91}", False),
    "another password": (1.0, ", password: other", False),
}


@pytest.mark.parametrize(("age", "change", "counts"), STORED.values(), ids=STORED)
def test_stored_state(house: House, machines: Machines, age: float, change: str, counts: bool) -> None:
    house.write("name: db1")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
    polled_at = house.age(age)
    house.write("name: db1" + change)
    machines.behaviours["db1"] = machines.hang
    with house.watching():
        assert house.aggregator.is_healthy() is counts
        if counts:
            ttl = house.poller("db1").target.settings.ttl
            assert lease_left(house) == pytest.approx(polled_at + ttl - time.time(), abs=0.5)
        machines.ended.set()


def test_stored_bad_state_keeps_counting(house: House, machines: Machines) -> None:
    """After a restart `rise` still wants its good results; the reason and its time are those of before."""
    house.write("name: db1, rise: 3, retry_interval: 60")
    machines.behaviours["db1"] = unreachable
    with house.watching():
        wait_for(lambda: house.state("db1") == ("unhealthy", "unreachable"))
        since = house.poller("db1").standing.since_at
    machines.behaviours["db1"] = good
    with house.watching():
        wait_for(lambda: house.poller("db1").standing.good == 1)
        assert house.state("db1") == ("unhealthy", "unreachable")
        assert house.poller("db1").standing.since_at == since
        assert not house.aggregator.is_healthy()


@pytest.mark.parametrize("names", [("old", "new"), ("new", "old")])
def test_a_new_resource_at_the_start_keeps_the_gate_closed(
    house: House, machines: Machines, names: tuple[str, str]
) -> None:
    house.write("name: old")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
    house.write(*(f"name: {name}" for name in names))
    machines.behaviours["new"] = machines.hang
    with house.watching():
        assert not house.aggregator.is_healthy()
        machines.behaviours["new"] = good
        machines.ended.set()


# --- following the rows ---
def test_changes_by_another_process(house: House, machines: Machines) -> None:
    house.write("name: db1", "name: db2")
    machines.behaviours["db2"] = unreachable
    with house.watching():
        wait_for(lambda: house.state("db2")[0] == "unhealthy" and house.state("db1")[0] == "healthy")
        house.elsewhere("UPDATE resource SET interval = 30 WHERE name = 'db1'")
        wait_for(lambda: house.poller("db1").target.settings.interval == 30)
        assert machines.made == ["db1", "db2", "db1"], "only what changed starts anew"
        assert not house.aggregator.is_healthy()
        house.elsewhere("DELETE FROM resource WHERE name = 'db2'")
        wait_for(lambda: "db2" not in house.monitor.pollers and house.aggregator.is_healthy())
        house.elsewhere("UPDATE resource SET host_key = 'ssh-ed25519 SHA256:x' WHERE name = 'db1'")
        wait_for(lambda: house.poller("db1").target.host_key)
        assert house.aggregator.is_healthy(), "a change never closes a gate that is open"


def test_resources_that_come_and_go(house: House, machines: Machines) -> None:
    house.write("name: db1")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["db2"] = machines.hang
        house.write("name: db1", "name: db2, interval: 1")
        wait_for(lambda: "db2" in machines.made)
        wait_for(lambda: machines.moments("db2"))
        assert house.aggregator.is_healthy(), "it counts from its first result on"
        house.write("name: db1, critical: false")
        wait_for(lambda: "db2" not in house.monitor.pollers)
        machines.behaviours["db1"] = unreachable
        house.poller("db1").poll_now()
        house.write("name: db1, critical: false, fall: 1")
        wait_for(lambda: house.state("db1")[0] == "unhealthy")
        assert house.aggregator.is_healthy()


def marks_of(damage: str) -> tuple[pytest.MarkDecorator, ...]:
    """Nothing but a file takes words for a number, or bytes for text."""
    return (pytest.mark.of_files,) if re.search(r"(port|interval|_at|good) = |x'|zeroblob", damage) else ()


DAMAGES = {
    "platform": ("platform = 'amiga'", "protocol"),
    "settings": ("settings = '{'", "protocol"),
    "settings that are none": ("settings = '[]'", "protocol"),
    "settings without an end": ("settings = replace(hex(zeroblob(100000)), '00', '[')", "protocol"),
    "setting of a later version": ("settings = '{\"later\": 1}'", "protocol"),
    "words for a number": ("interval = 'soon'", "protocol"),
    "port": ("port = 'ssh'", "protocol"),
    "never": ("interval = 9e999", "protocol"),
    "not UTF-8": ("platform = CAST(x'ff' AS TEXT)", "protocol"),
    "bytes": ("hostname = x'ff'", "protocol"),
    "bytes for a token": ("password = x'ff'", "credential"),
    "name": ("password = NULL, settings = '{}', username = CAST(x'ff' AS TEXT), platform = x'00'", "protocol"),
    "moved": ("hostname = '192.0.2.2'", "credential"),
    "token": ("password = 'HC2.0'", "credential"),
    "key": ("password = replace(password, substr(password, 5, 16), '0123456789abcdef')", "credential"),
}


@pytest.mark.long
@pytest.mark.parametrize(("damage", "cause"), [pytest.param(*case, id=name, marks=marks_of(case[0]))
                                               for name, case in DAMAGES.items()])  # fmt: skip
def test_a_damaged_row_costs_its_resource_alone(house: House, machines: Machines, damage: str, cause: str) -> None:
    """It is unhealthy, and the others go on, at the start and while the service runs; changes are taken over."""
    house.write("name: db1, interval: 1", "name: db2")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        house.elsewhere(f"UPDATE resource SET {damage} WHERE name = 'db2'")
        wait_for(lambda: house.stored("db2") == ("unhealthy", cause))
        assert not house.aggregator.is_healthy()
    with house.watching():
        polls = len(machines.moments("db1"))
        wait_for(lambda: len(machines.moments("db1")) > polls)
        wait_for(lambda: house.state("db2") == ("unhealthy", cause))
        assert house.state("db1") == ("healthy", "") and not house.aggregator.is_healthy()
        machines.behaviours["db3"] = unreachable
        house.elsewhere("UPDATE resource SET origin = 'api' WHERE name = 'db2'")    # so that no import mends it
        house.write("name: db1, interval: 1", "name: db3, interval: 1")
        wait_for(lambda: house.stored("db3") == ("unhealthy", "unreachable"))
        assert house.monitor.poll_now("db2", 20), "who checks it now is answered"
        machines.behaviours["db3"] = good
        house.elsewhere("DELETE FROM resource WHERE name = 'db2'")
        wait_for(lambda: "db2" not in house.monitor.pollers)
        wait_for(house.aggregator.is_healthy)


STATUS_DAMAGES = ["state = 'odd'", "cause = 'odd'", "polled_at = 'soon'", "since_at = 'then'", "good = 'many'",
                  "strip = x'ff'", "sample = '{'", "reason = CAST(x'ff' AS TEXT)", "state = x'00'"]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("damage", [pytest.param(damage, marks=marks_of(damage)) for damage in STATUS_DAMAGES])
def test_a_damaged_status_stops_no_start(house: House, machines: Machines, damage: str) -> None:
    house.write("name: db1, interval: 1", "name: db2, interval: 1")
    with house.watching():
        wait_for(lambda: house.stored("db1") == house.stored("db2") == ("healthy", ""))
    house.elsewhere(f"UPDATE status SET {damage} WHERE resource_id = 2")
    with house.watching():
        wait_for(lambda: all(poller.standing.good for poller in house.monitor.pollers.values()))
        machines.behaviours["db2"] = unreachable
        wait_for(lambda: house.stored("db2") == ("unhealthy", "unreachable"))
        assert house.state("db1") == ("healthy", "")


def test_a_change_by_hand_is_noticed(house: House, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a raised revision, too, within a minute; what did not change goes on."""
    assert healthchecker.FOLLOW_INTERVAL <= 60
    monkeypatch.setattr(healthchecker, "FOLLOW_INTERVAL", 0.1)
    house.write("name: db1", "name: db2")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        execute(database_in(house.folder), "UPDATE resource SET interval = 30 WHERE name = 'db1'")
        wait_for(lambda: house.poller("db1").target.settings.interval == 30)
        assert machines.made == ["db1", "db2", "db1"]


def test_a_secret_is_opened_once(house: House, machines: Machines) -> None:
    """5,000 of them would take seconds at each change."""
    opened: list[str] = []

    class Counting(Vault):
        def open(self, token: str, *row: str) -> str:
            opened.append(row[1])
            return super().open(token, *row)

    house.write("name: db1", "name: db2", "name: db3")
    house.vault = Counting(house.vault.folder)
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        assert opened == ["db1", "db2", "db3"]
        house.elsewhere("UPDATE resource SET interval = 30 WHERE name = 'db2'")
        wait_for(lambda: house.poller("db2").target.settings.interval == 30)
        assert opened == ["db1", "db2", "db3", "db2"]
        assert house.poller("db2").target.settings.secrets["password"] == "secret"


def test_a_change_makes_nothing_of_what_is_as_it_was(house: House, machines: Machines) -> None:
    """Neither of rows nor of what was found: of 10,000 that would take a second at each change."""
    made: list[str] = []

    def note(row: object, *_: object) -> None:
        made.append(type(row).__name__)

    house.write(*(f"name: m{number}" for number in range(30)))
    with house.watching():
        wait_for(lambda: house.aggregator.is_healthy() and all(house.stored(f"m{number}")[0] for number in range(30)))
        listened = [(healthchecker.Resource, "init"), (healthchecker.Resource, "load"), (Status, "load")]
        with contextlib.ExitStack() as stack:
            for kind, moment in listened:
                sqlalchemy.event.listen(kind, moment, note)
                stack.callback(sqlalchemy.event.remove, kind, moment, note)
            house.elsewhere("UPDATE resource SET interval = 30 WHERE name = 'm7'")
            wait_for(lambda: house.poller("m7").target.settings.interval == 30)
            assert house.monitor.catch_up()
        assert 1 <= made.count("Resource") <= 2     # which its poll looks at, too
        assert 1 <= made.count("Status") <= 2


# --- maintenance ---
def put_into_maintenance(names: str, until_at: float) -> list[str]:
    """What another process writes to put resources in maintenance, instead of that in which they are."""
    scope = json.dumps({"resources": names.split()})
    return [f"DELETE FROM maintenance WHERE scope = '{scope}'",
            "INSERT INTO maintenance (state, start_at, until_at, scope, reason, actor, plan, turn_at) VALUES "
            f"('begun', {min(time.time(), until_at) - 1}, {until_at}, '{scope}', 'disks', '', '', 0)"]  # fmt: skip


def maintain(house: House, names: str, seconds: float) -> None:
    house.elsewhere(*put_into_maintenance(names, time.time() + seconds))


@contextlib.contextmanager
def sick_one_aside(house: House, machines: Machines, seconds: float,
                   wall: Callable[[], float] = time.time) -> Iterator[None]:  # fmt: skip
    """Of db1 and db2, the first one is unreachable, and in maintenance for so long: the gate is open."""
    house.write("name: db1", "name: db2")
    machines.behaviours["db1"] = unreachable
    with house.watching(wall):
        wait_for(lambda: house.state("db1")[0] == "unhealthy" and house.state("db2")[0] == "healthy")
        maintain(house, "db1", seconds)
        wait_for(house.aggregator.is_healthy)
        yield


def maintenance_events(house: House) -> list[str]:
    with house.store.reading() as session:
        found = healthchecker.events(session, kind="maintenance")
        return [f"{event.resource}: {event.text}" for event in found]


@pytest.mark.long
def test_maintenance(house: House, machines: Machines) -> None:
    """Polled, shown, not counted; it ends by itself at its time, without a poll, and that is told once."""
    house.write("name: db1, interval: 1, fall: 1", "name: db2, interval: 60")
    machines.behaviours["db1"] = unreachable
    with house.watching():
        wait_for(lambda: house.stored("db1")[0] == "unhealthy" and house.stored("db2")[0] == "healthy")
        assert not house.aggregator.is_healthy()
        maintain(house, "db1", 3600)
        wait_for(house.aggregator.is_healthy)
        polls = len(machines.moments("db1"))
        wait_for(lambda: len(machines.moments("db1")) > polls)
        assert house.stored("db1") == ("unhealthy", "unreachable")
        assert maintenance_events(house) == []
        maintain(house, "db1", 1)
        wait_for(lambda: not house.aggregator.is_healthy())
        wait_for(lambda: maintenance_events(house) == ["db1: maintenance is over"])
        with house.store.reading() as session:
            assert [row.state for row in session.scalars(sqlalchemy.select(healthchecker.Maintenance))] == ["over"]
        assert machines.made == ["db1", "db2"], "it is no change of the configuration"
        maintain(house, "db1", 3600)
        wait_for(house.aggregator.is_healthy)
        house.elsewhere("DELETE FROM maintenance")  # by hand, before its time
        wait_for(lambda: not house.aggregator.is_healthy())


@pytest.mark.long
def test_what_is_bad_in_maintenance_is_asked_often(house: House, machines: Machines) -> None:
    """Or maintenance would end on a result of before the repair, and close the gate for a healthy host."""
    house.write("name: db1, interval: 3600")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        maintain(house, "db1", 3600)
        wait_for(lambda: house.poller("db1").counted is False)
        machines.behaviours["db1"] = unreachable
        house.poller("db1").poll_now().result(60)
        wait_for(lambda: house.state("db1")[0] == "unhealthy")
        polls = len(machines.moments("db1"))
        wait_for(lambda: len(machines.moments("db1")) > polls + 1)
        machines.behaviours["db1"] = good
        wait_for(lambda: house.state("db1")[0] == "healthy")
        polls = len(machines.moments("db1"))
        house.elsewhere("DELETE FROM maintenance")
        wait_for(lambda: house.poller("db1").counted)
        assert house.aggregator.is_healthy() and len(machines.moments("db1")) == polls, "it is well: not so often"


@pytest.mark.long
def test_maintenance_ends_between_two_polls(house: House, machines: Machines) -> None:
    """The state that it has counts at once, whatever the interval, and its lease is that of its last poll."""
    with sick_one_aside(house, machines, 3600):
        maintain(house, "db1", 1)
        wait_for(lambda: not house.aggregator.is_healthy())
        maintain(house, "db2", 1)
        wait_for(lambda: len(maintenance_events(house)) == 2)
        machines.behaviours["db1"] = good
        house.poller("db1").poll_now()
        wait_for(house.aggregator.is_healthy)
        assert lease_left(house) < 123 - 2, "that of db2, which was polled at the start"
        assert len(machines.moments("db2")) == 1


@pytest.mark.long
def test_maintenance_of_a_group_begins_and_ends_for_all_at_once(house: House, machines: Machines) -> None:
    """Of alternatives one is bad: the gate does not close for the moment between the one and the other."""
    house.write("name: db1", "name: db2")
    machines.behaviours["db1"] = unreachable
    gates = '{"groups": [{"name": "g", "members": ["db1", "db2"], "healthy": "any"}]}'
    house.elsewhere("DELETE FROM setting WHERE name = 'gates'",
                    f"INSERT INTO setting (name, value, text) VALUES ('gates', 0, '{gates}')")  # fmt: skip
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        for seconds, counted in ((3600, False), (3, True)):
            maintain(house, "db1 db2", seconds)
            wait_for(lambda: all(house.poller(name).counted is counted for name in ("db1", "db2")))  # noqa: B023
        wait_for(lambda: len(maintenance_events(house)) == 1)
        assert house.aggregator.is_healthy()
    with house.store.reading() as session:
        found = [event.text for event in healthchecker.events(session, kind="gate")]
    assert [text.partition(" after")[0] for text in found] == ["closed -> open", "closed (the service starts)"]


def test_maintenance_of_what_does_not_count(house: House, machines: Machines) -> None:
    house.write("name: db1, critical: false", "name: db2")
    machines.behaviours["db1"] = unreachable
    with house.watching():
        wait_for(lambda: house.state("db1")[0] == "unhealthy" and house.aggregator.is_healthy())
        maintain(house, "db1", 1)
        wait_for(lambda: maintenance_events(house) == ["db1: maintenance is over"])
        assert house.aggregator.is_healthy()


def test_maintenance_over_a_restart(house: House, machines: Machines) -> None:
    """It holds from the start on; one that ended while no service ran is over, and that is told, too."""
    house.write("name: db1, interval: 1, fall: 1", "name: db2")
    machines.behaviours["db1"] = unreachable
    with house.watching():
        wait_for(lambda: house.stored("db1")[0] == "unhealthy" and house.stored("db2")[0] == "healthy")
    maintain(house, "db1", 3600)
    with house.watching():
        assert house.aggregator.is_healthy()
    maintain(house, "db1", -1)
    with house.watching():
        assert not house.aggregator.is_healthy()
        wait_for(lambda: maintenance_events(house) == ["db1: maintenance is over"])
    with house.watching():
        assert not machines.ended.wait(0.7)
        assert maintenance_events(house) == ["db1: maintenance is over"]


def test_maintenance_of_the_only_one_at_the_start(house: House, machines: Machines) -> None:
    """Nothing is waited for; when it ends before the first result, that one decides."""
    house.write("name: db1, timeout: 3")
    machines.behaviours["db1"] = machines.hang
    maintain(house, "db1", 3600)
    with house.watching():
        assert house.aggregator.is_healthy()
        maintain(house, "db1", 1)
        wait_for(lambda: maintenance_events(house) != [])
        assert house.aggregator.is_healthy(), "a resource that is added counts from its first result on"
        machines.ended.set()
        wait_for(lambda: not house.aggregator.is_healthy())


def test_seen_ends_with_recovery(house: House, machines: Machines) -> None:
    """And not with a restart; that is told once."""
    house.write("name: db1, fall: 1, rise: 1", "name: db2")
    machines.behaviours["db1"] = unreachable

    def seen() -> bool:
        with house.store.reading() as session:
            return "db1" in healthchecker.remarks(session, 0.0).seen

    with house.watching():
        wait_for(lambda: house.stored("db1")[0] == "unhealthy")
        house.elsewhere("INSERT INTO acknowledgement VALUES (1, 1.0, 'adam', 'on my way')")
        house.poller("db1").poll_now().result(60)
    with house.watching():
        house.poller("db2").poll_now().result(60)
        assert seen()
        machines.behaviours.clear()
        house.poller("db1").poll_now()
        wait_for(lambda: not seen())
    with house.store.reading() as session:
        found = session.scalars(sqlalchemy.select(healthchecker.Event).filter_by(kind="acknowledgement")).all()
    assert [(one.resource, one.state) for one in found] == [("db1", "over")]


def test_seen_ends_with_removal(house: House, machines: Machines) -> None:
    house.write("name: db1", "name: db2")
    house.elsewhere("INSERT INTO acknowledgement VALUES (1, 1.0, 'adam', 'on my way')")
    house.write("name: db2")
    with house.store.writing() as session:  # as the recorder does with each write
        healthchecker.end_acknowledgements(session, [], 1.0)
    house.write("name: db1", "name: db2")
    with house.store.reading() as session:
        assert not healthchecker.remarks(session, 0.0).seen


def test_check_now_of_what_is_replaced_just_then(house: House, machines: Machines) -> None:
    """A change and a click at once: the new poller answers, and nobody waits for one that has ended."""
    house.write("name: db1")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        old = house.poller("db1")
        old.stop()
        assert old.poll_now().cancelled() or wait_for(lambda: not old.is_alive())
        assert old.poll_now().cancelled()
        report = house.monitor.poll_now("db1", 60)  # which the monitor has replaced by then
        assert report and report.verdict.healthy and house.poller("db1") is not old


@pytest.mark.parametrize("ends", [False, True])
def test_check_now_of_what_is_stopped_while_it_hangs(house: House, machines: Machines, ends: bool) -> None:
    """Who waits for the poll that runs, or for the next one, is answered by the new poller, or at the end; that poll
    may take its whole deadline."""
    house.write("name: db1, timeout: 60")
    begun, reports = threading.Event(), list[object]()

    def hangs(guard: LoginGuard, deadline: Deadline) -> None:
        begun.set()
        machines.hang(guard, deadline)

    def ask() -> None:
        reports.append(house.monitor.poll_now("db1", 55))

    with house.watching():
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["db1"] = hangs
        old = house.poller("db1")
        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        assert begun.wait(60)
        threads[1].start()
        wait_for(lambda: old._asked.qsize() == 2)
        machines.behaviours["db1"] = good
        if ends:
            house.monitor.close()
        else:
            house.write("name: db1, timeout: 59")
        for thread in threads:
            thread.join(50)
        assert len(reports) == 2 and reports.count(None) == 2 * ends and old.is_alive()
        machines.ended.set()


# --- a clock that is set ---
FAR_AWAY = 120 * 86_400.0  # seconds by which the clock of a dead battery is wrong


def clock_events(house: House) -> list[str]:
    with house.store.reading() as session:
        return [event.text for event in healthchecker.events(session, kind="clock")]


def clock_taken_down(house: House) -> int:
    """Milliseconds: as the monitor read stored times at its last look."""
    with house.store.reading() as session:
        return int(session.scalar(sqlalchemy.text("SELECT value FROM setting WHERE name = 'clock'")))


@pytest.mark.long
def test_a_clock_that_is_set_ends_nothing(house: House, machines: Machines) -> None:
    ahead = [0.0]
    with sick_one_aside(house, machines, 600, lambda: time.time() + ahead[-1]):
        for seconds, told in ((3600.0, "forward by 3,600 s"), (-3600.0, "back by 7,200 s"),
                              (FAR_AWAY, "forward by 10,371,600 s"), (-FAR_AWAY, "back by 20,736,000 s")):  # fmt: skip
            ahead.append(seconds)
            wait_for(lambda told=told: told in "".join(clock_events(house)[:1]))
            assert told in house.monitor.clock_step[1]
            assert house.aggregator.is_healthy() and maintenance_events(house) == []
        before = clock_taken_down(house)
        ahead.append(ahead[-1] + 30)  # that is an adjustment
        wait_for(lambda: clock_taken_down(house) > before + 20_000)
        maintain(house, "db1", ahead[-1] + 1)  # by the clock as it is now
        wait_for(lambda: maintenance_events(house) == ["db1: maintenance is over"])
        assert len(clock_events(house)) == 4


def test_a_step_that_cannot_be_written_down_is_written_later(house: House, machines: Machines) -> None:
    """And holds up nothing else."""
    house.write("name: db1")
    ahead = [0.0]
    with house.watching(lambda: time.time() + ahead[-1]):
        with refusing(database_in(house.folder), "INSERT ON event", "NEW.kind = 'clock'"):
            wait_for(house.aggregator.is_healthy)
            ahead.append(7200.0)
            house.write("name: db1", "name: db2")
            wait_for(lambda: "db2" in house.monitor.pollers)
            assert clock_events(house) == []
        wait_for(lambda: clock_events(house) == ["the clock was set forward by 7,200 s"])


def test_after_a_suspension_everything_is_polled_at_once(house: House, machines: Machines) -> None:
    """All leases have ended by then, and what waits for the next poll stood still, too."""
    house.write("name: db1, interval: 600, rise: 3")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        house.poller("db1").expires_mono = 0.0
        wait_for(lambda: house.stored("db1") == ("unhealthy", "stale"))
        wait_for(house.aggregator.is_healthy)


def test_the_result_that_counts_is_the_one_that_is_stored(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever says another thing meanwhile: a poll, the monitor of a lease that ends, what reports by itself."""
    house.write("name: job, platform: push, password: 0123456789abcdef")
    with house.watching():
        wait_for(lambda: "job" in house.monitor.pollers)
        poller = house.poller("job")
        recorder, sample = poller._context.recorder, Sample({}, {}, None, {}, {}, {})
        put, bad = recorder.put, replace(sample, checks={"report": Outcome(False, "x")})
        later = threading.Thread(target=poller.take, args=(bad,))

        def put_late(report: Report) -> None:
            monkeypatch.setattr(recorder, "put", put)
            later.start()
            later.join(1)   # unless it waits for this one
            put(report)

        monkeypatch.setattr(recorder, "put", put_late)
        poller.take(sample)
        later.join(60)
        recorder.flush()
        assert house.state("job") == house.stored("job") == ("unhealthy", "check")


def test_a_suspension_during_a_poll(house: House, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before it counts from then on, that is, no more."""
    house.write("name: db1")
    real, slept = healthchecker.lease_clock, [0.0]
    monkeypatch.setattr(healthchecker, "lease_clock", lambda: real() + slept[0])
    with house.watching():
        wait_for(house.aggregator.is_healthy)

        def sleeps(guard: LoginGuard, deadline: Deadline) -> None:
            slept[0] += 7200

        machines.behaviours["db1"] = sleeps
        report = house.poller("db1").poll_now().result(60)
        assert report.verdict.healthy and report.counts < 0
        del machines.behaviours["db1"]
        wait_for(lambda: house.state("db1") == ("healthy", "") and house.aggregator.is_healthy())


def test_what_is_to_wait_waits(house: House, machines: Machines) -> None:
    """Or all that another machine polled would be polled at the same moment."""
    house.write("name: db1")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        house.poller("db1").rest()
        begun, count = time.monotonic(), len(machines.moments("db1"))
        house.poller("db1").go_on(2.0)
        wait_for(lambda: len(machines.moments("db1")) > count)
        assert machines.moments("db1")[count] >= begun + 2.0


@pytest.mark.skipif(not healthchecker.boot_number(), reason="the system numbers no boots")
def test_a_small_step_is_known_at_the_next_start(house: House, machines: Machines) -> None:
    """A machine boots with a clock that is 20 s slow and put right soon: no event, and what polls found counts."""
    house.write("name: db1, fall: 1")
    behind = [20.0]
    with house.watching(lambda: time.time() - behind[-1]):
        behind.append(0.0)
        wait_for(lambda: house.stored("db1")[0] == "healthy")
        wait_for(lambda: abs(house.monitor._zero_at - (time.time() - healthchecker.lease_clock())) < 1)
        assert clock_events(house) == []
    machines.behaviours["db1"] = machines.hang
    with house.watching():
        assert house.aggregator.is_healthy()


@pytest.mark.long
@pytest.mark.skipif(not healthchecker.boot_number(), reason="the system numbers no boots")
@pytest.mark.parametrize("step", [0.0, -50.0, 50.0])
def test_what_is_stored_is_as_old_after_the_clock_was_set(house: House, machines: Machines, step: float) -> None:
    """In the same boot: set back it made an old result look fresh, set forward a fresh one old."""
    moved = [0.0]

    def wall() -> float:
        return time.time() + moved[0]

    house.write("name: db1")
    with house.watching(wall):
        wait_for(lambda: house.stored("db1") == ("healthy", ""))
        ttl, zero_at = house.poller("db1").target.settings.ttl, house.monitor._zero_at
        moved[0] = step
        wait_for(lambda: abs(house.monitor._zero_at - zero_at - step) < 1)
    machines.behaviours["db1"] = machines.hang
    for seconds, is_fresh in ((ttl - 10, True), (11, False)):  # a while later, and once more
        execute(database_in(house.folder), "UPDATE status SET polled_at = polled_at - :age", age=seconds)
        with house.watching(wall):
            assert house.aggregator.is_healthy() is is_fresh


def test_maintenance_and_a_clock_that_is_set_between_two_starts(house: House, machines: Machines) -> None:
    house.write("name: db1, fall: 1", "name: db2")
    machines.behaviours["db1"] = unreachable
    with house.watching():
        wait_for(lambda: house.stored("db1")[0] == "unhealthy" and house.stored("db2")[0] == "healthy")
        maintain(house, "db1", 600)
        wait_for(house.aggregator.is_healthy)
    with house.watching(lambda: time.time() + 3600):
        assert house.aggregator.is_healthy()
        wait_for(lambda: clock_events(house) != [])
        assert house.aggregator.is_healthy() and maintenance_events(house) == []


def test_maintenance_and_a_start_with_a_clock_that_is_behind(house: House, machines: Machines) -> None:
    """Of a machine whose battery is dead, until it has the time from others: what was begun before ends when it was to,
    and not those 120 days later, for which a sick machine would not count."""
    with sick_one_aside(house, machines, 600):
        pass
    house.elsewhere("UPDATE setting SET value = value + 1 WHERE name = 'boot'")
    behind = [FAR_AWAY]
    with house.watching(lambda: time.time() - behind[-1]):
        wait_for(house.aggregator.is_healthy)
        behind.append(0.0)
        wait_for(lambda: clock_events(house)[0] == "the clock was set forward by 10,368,000 s")
        [(until_at,)] = execute(database_in(house.folder), "SELECT until_at FROM maintenance")
        assert until_at < time.time() + 600 and maintenance_events(house) == []


@pytest.mark.long
@pytest.mark.skipif(not healthchecker.boot_number(), reason="the system numbers no boots")
@pytest.mark.parametrize("seconds", [3600.0, -3600.0, FAR_AWAY, -FAR_AWAY])
def test_a_clock_that_is_set_between_two_starts(house: House, machines: Machines, seconds: float) -> None:
    """What a poll found counts by the time since boot; after another boot only the clock is left."""
    house.write("name: db1, fall: 1")
    with house.watching():
        wait_for(lambda: house.stored("db1")[0] == "healthy")
    machines.behaviours["db1"] = machines.hang
    how = f"{'forward' if seconds > 0 else 'back'} by {abs(seconds):,.0f} s"
    with house.watching(lambda: time.time() + seconds):
        assert house.aggregator.is_healthy()
        wait_for(lambda: clock_events(house) == [f"the clock was set {how}"])
        assert house.aggregator.is_healthy()
    house.elsewhere("UPDATE setting SET value = value + 1 WHERE name = 'boot'")
    with house.watching():  # and a clock that was put right meanwhile
        assert not house.aggregator.is_healthy()


@pytest.mark.long
@pytest.mark.parametrize("days", [-120, 120])
def test_a_boot_with_a_clock_that_is_wrong(days: int, house: House, machines: Machines) -> None:
    """Behind what was written last it is told, as a clock that was set, and once; ahead is what being off looks like.
    Put right it is another step, after which nothing is of a time to come, whatever was polled meanwhile."""
    house.write("name: db1", "name: db2")
    with house.watching():
        wait_for(lambda: house.stored("db1")[0] == house.stored("db2")[0] == "healthy")
    machines.behaviours["db2"] = machines.hang
    house.elsewhere("UPDATE setting SET value = value + 1 WHERE name = 'boot'")
    wrong = [days * 86_400.0]
    with house.watching(lambda: time.time() + wrong[-1]):
        wait_for(lambda: house.stored("db1")[0] == "healthy")
        told = clock_events(house)
        assert len(told) == (days < 0) and (house.monitor.clock_step[1] in told or not told)
        assert all(re.fullmatch(r"the clock was set back by 10,36[78],\d\d\d s", text) for text in told)
        wrong.append(0.0)
        wait_for(lambda: len(clock_events(house)) == len(told) + 1)
    newest = execute(database_in(house.folder), "SELECT max(polled_at) FROM status")[0][0]
    assert newest < time.time() + 60
    house.elsewhere("UPDATE setting SET value = value + 1 WHERE name = 'boot'")
    with house.watching():
        assert len(clock_events(house)) == len(told) + 1


@pytest.mark.parametrize(("seen", "since"), [(50, 40), (0, 0)], ids=["noted late", "shortened"])
def test_what_is_stale_is_so_since_clients_were_refused(
    seen: int, since: int, house: House, machines: Machines
) -> None:
    """However late that is noted, as by a process that was hung; but not since before it was last seen to last, for a
    reload, or a clock that was set, may have moved the end of its lease."""
    house.write("name: db1")
    with house.watching():
        wait_for(lambda: house.stored("db1") == ("healthy", ""))
        machines.behaviours["db1"] = machines.hang
        poller = house.poller("db1")
        with poller._lock:
            poller.expires_mono = healthchecker.lease_clock() - 40
            poller._lasted_mono = healthchecker.lease_clock() - seen
        wait_for(lambda: poller.standing.cause == "stale")
        assert time.time() - poller.standing.since_at == pytest.approx(since, abs=15)


def test_a_poll_is_due_before_the_lease_ends(house: House, machines: Machines) -> None:
    """A machine that was suspended has less time left than the wait for the next poll, whose clock stood still."""
    house.write("name: db1")
    with house.watching():
        wait_for(lambda: house.stored("db1") == ("healthy", ""))
        poller = house.poller("db1")
        poller.expires_mono = healthchecker.lease_clock() + 2.5
        wait_for(lambda: len(machines.moments("db1")) == 2)
        wait_for(lambda: poller.expires_mono > healthchecker.lease_clock() + 10)
        assert poller.standing.healthy and "stale" not in poller.standing.why
        with house.store.reading() as session:
            assert not [event for event in healthchecker.events(session, kind="state") if "stale" in event.text]


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
def test_what_lasts_while_the_clock_is_set(house: House, seconds: float) -> None:
    """It has lasted for as long as it has, by what is said of its end, too."""
    house.write("name: db1")
    ahead = [0.0]
    with house.watching(lambda: time.time() + ahead[-1]):
        wait_for(lambda: house.stored("db1")[0] == "healthy")
        poller = house.poller("db1")
        before = poller.standing.since_at
        ahead.append(seconds)
        wait_for(lambda: poller.standing.since_at == pytest.approx(before + seconds, abs=5))
        assert poller.news.told.since_at == poller.standing.since_at


def test_after_a_step_forward_everything_is_polled_at_once(house: House, machines: Machines) -> None:
    """A machine that its hypervisor paused looks like that: all its clocks stood still, and what it knows is old."""
    house.write("name: db1, interval: 600, fall: 1", "name: db2, interval: 600")
    ahead = [0.0]
    with house.watching(lambda: time.time() + ahead[-1]):
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["db1"] = unreachable
        ahead.append(3600.0)
        wait_for(lambda: not house.aggregator.is_healthy())
        wait_for(lambda: len(machines.moments("db2")) == 2)
        assert house.state("db1") == ("unhealthy", "unreachable")


@pytest.mark.skipif(not healthchecker.boot_number(), reason="the system numbers no boots")
@pytest.mark.parametrize("starts", [1, 2])
def test_a_boot_whose_clock_goes_on_from_where_it_stopped(house: House, starts: int) -> None:
    """Without a battery it does: for how long the machine was off shows when it has the time from others, and then what
    was heard before is as old as it is, and stays so."""
    house.write("name: db1", "name: job, platform: push, password: 0123456789abcdef, interval: 86400")
    with house.watching():
        wait_for(lambda: "job" in house.monitor.pollers)
        house.poller("job").take(Sample({}, {}, None, {}, {}, {}))
        wait_for(lambda: house.stored("job") == house.stored("db1") == ("healthy", ""))
    house.elsewhere("UPDATE setting SET value = value + 1 WHERE name = 'boot'")
    off = [0.0]
    for start in range(starts):
        with house.watching(lambda: time.time() + off[-1]):
            wait_for(house.aggregator.is_healthy)
            if start == starts - 1:
                off.append(3 * 86_400.0)
                wait_for(lambda: house.stored("job") == ("unhealthy", "stale"))
                wait_for(lambda: clock_events(house) == ["the clock was set forward by 259,200 s"])
    with house.watching(lambda: time.time() + off[-1]):
        assert not house.aggregator.is_healthy() and house.state("job")[0] != "healthy"
    now = house.age(100) + 100
    for booted_at, moved in (now - 50, 0), (now - 150, 3600):
        with house.store.writing() as session:
            healthchecker.move_rows(session, 3600, now, booted_at)
            assert {row.polled_at for row in session.scalars(sqlalchemy.select(Status))} == {now - 100 + moved}


@pytest.mark.skipif(not healthchecker.boot_number(), reason="the system numbers no boots")
def test_what_was_to_end_while_the_machine_was_off(house: House, machines: Machines) -> None:
    """Its clock goes on from where it stopped; once that is put right it is over."""
    begun = time.time() - healthchecker.lease_clock() - 60   # before this boot
    seconds = time.time() - begun + 600
    house.write("name: db1", "name: db2")
    machines.behaviours["db1"] = unreachable
    said = healthchecker.Override(action="open", at=begun, seconds=seconds, reason="release", actor="adam", boot=1)
    off = [0.0]
    with house.store.writing() as session:
        session.merge(healthchecker.Setting(name="override", value=0, text=said.model_dump_json()))
    with house.watching(lambda: time.time() + off[-1]):
        house.elsewhere(*put_into_maintenance("db1", begun + seconds), f"UPDATE maintenance SET start_at = {begun}")
        wait_for(lambda: house.state("db1")[0] == "unhealthy" and house.stored("db2")[0] == "healthy")
        wait_for(lambda: house.poller("db1").counted is False)
        assert house.aggregator.is_healthy() and house.monitor.override.now
        off.append(8 * 3600.0)
        wait_for(lambda: not house.aggregator.is_healthy())
        wait_for(lambda: maintenance_events(house) == ["db1: maintenance is over"])
        wait_for(lambda: house.monitor.override.now is None)


def test_a_gate_closed_by_hand_outlasts_a_clock_that_is_ahead_for_a_moment(house: House) -> None:
    """Nobody is let in during the work, though it began before the machine booted."""
    house.write("name: db1")
    begun = time.time() - healthchecker.lease_clock() - 60
    said = healthchecker.Override(action="close", at=begun, seconds=time.time() - begun + 600, reason="disks",
                                  actor="adam", boot=1)  # fmt: skip
    ahead = [0.0]
    with house.store.writing() as session:
        session.merge(healthchecker.Setting(name="override", value=0, text=said.model_dump_json()))
    with house.watching(lambda: time.time() + ahead[-1]):
        wait_for(lambda: house.stored("db1")[0] == "healthy")
        for seconds, way in ((5 * 3600.0, "forward"), (0.0, "back")):
            ahead.append(seconds)
            wait_for(lambda way=way: way in house.monitor.clock_step[1])  # type: ignore[misc]
            wait_for(lambda: house.monitor.override.now and not house.aggregator.is_healthy())


# --- a poll on demand ---
def test_check_now(house: House, machines: Machines) -> None:
    """The report of a poll that began after the call, already written."""
    house.write("name: db1, fall: 1")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["db1"] = unreachable
        begin = time.time()
        report = house.monitor.poll_now("db1", 5)
        assert report and report.at >= begin
        assert (report.standing.state, report.verdict.cause) == ("unhealthy", "unreachable")
        assert house.stored("db1") == ("unhealthy", "unreachable")
        assert len(machines.polls) == 2
        assert house.monitor.poll_now("nobody", 5) is None


def test_check_now_while_a_poll_runs(house: House, machines: Machines) -> None:
    """That poll may have begun before what was repaired; the answer is the next one's."""
    house.write("name: db1, timeout: 5, fall: 1")
    begun = threading.Event()

    def first_slow_then_bad(guard: LoginGuard, deadline: Deadline) -> None:
        if begun.is_set():
            raise ProbeError("unreachable", "the second poll")
        begun.set()
        machines.ended.wait(0.5)

    machines.behaviours["db1"] = first_slow_then_bad
    with house.watching():
        assert begun.wait(5)
        report = house.monitor.poll_now("db1", 5)
        assert report and report.verdict.reason == "the second poll"


def test_check_now_of_a_machine_that_hangs(house: House, machines: Machines) -> None:
    house.write("name: db1, timeout: 30")
    machines.behaviours["db1"] = machines.hang
    with house.watching():
        begin = time.monotonic()
        assert house.monitor.poll_now("db1", 0.5) is None
        assert 0.5 <= time.monotonic() - begin < 0.5 + LATE
        machines.behaviours["db1"] = good
        machines.ended.set()
        report = house.monitor.poll_now("db1", 5)
        assert report and report.verdict.healthy


def test_check_now_by_many(house: House, machines: Machines) -> None:
    """Each gets an answer, and not each a poll of its own."""
    house.write("name: db1")
    asked: list[int] = []
    reports: list[object] = []

    def ask() -> None:
        asked.append(1)
        reports.append(house.monitor.poll_now("db1", 60))

    def answer(guard: LoginGuard, deadline: Deadline) -> None:
        wait_for(lambda: len(asked) == 20)
        machines.ended.wait(0.2)

    with house.watching():
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["db1"] = answer
        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert len(reports) == 20 and None not in reports
    assert len(machines.polls) <= 8


def test_check_now_goes_through_the_guard(house: House, machines: Machines) -> None:
    """As often as cannot lock an account; after that it says what the guard says, and changes nothing."""
    house.write("name: a, interval: 1")
    machines.behaviours["a"] = machines.login("a", refused)
    with house.watching():
        wait_for(lambda: house.state("a") == ("unhealthy", "auth"))
        for count in (2, 3, 4, 4, 4):
            report = house.monitor.poll_now("a", 5)
            assert report and report.verdict.cause == "auth" and len(machines.logins) == count
        assert "not tried" in report.verdict.reason and "next attempt in 18" in report.verdict.reason
        assert "not tried" not in house.poller("a").standing.reason
        machines.behaviours["a"] = machines.login("a")
        house.write("name: a, interval: 1, password: right")
        house.monitor.catch_up()
        report = house.monitor.poll_now("a", 5)
        assert report and report.verdict.healthy


@pytest.mark.parametrize("restarts", [False, True], ids=["reload", "restart"])
def test_a_wrong_password_in_place_of_a_refused_one_is_tried_once(
    house: House, machines: Machines, restarts: bool
) -> None:
    """The directory counts the account: a typo while the password is replaced would have three tries of its own."""
    for name in NAMES:
        machines.behaviours[name] = machines.login(name, refused)
    counts = []
    with contextlib.ExitStack() as stack:
        for password in ("old", "typo", "slip", "blunder"):
            house.write(*(f"name: {name}, interval: 1, password: {password}" for name in NAMES))
            if restarts:
                stack.close()
            if restarts or not counts:
                stack.enter_context(house.watching())
            house.monitor.catch_up()
            for name in NAMES:
                house.monitor.poll_now(name, 5)
                wait_for(lambda name=name: house.state(name)[0] == "unhealthy")
            counts.append(len(machines.logins))
        assert counts == [4, 5, 5, 5]


def test_a_right_password_in_place_of_a_refused_one_is_tried_at_once(house: House, machines: Machines) -> None:
    """Also where one of the hosts, whichever, does not answer."""
    for name in NAMES:
        machines.behaviours[name] = machines.login(name, refused)
    house.write(*(f"name: {name}, interval: 1, critical: {name != NAMES[0]}, password: old" for name in NAMES))
    with house.watching():
        wait_for(lambda: len(machines.logins) == 3)
        machines.behaviours = {name: machines.login(name) for name in NAMES} | {NAMES[0]: unreachable}
        house.write(*(f"name: {name}, interval: 1, critical: {name != NAMES[0]}, password: new" for name in NAMES))
        wait_for(house.aggregator.is_healthy)


def fleet_of(house: House, passwords: Mapping[str, str]) -> None:
    house.write(*(f"name: {name}, interval: 1, critical: {name != 'odd'}, password: {password}"
                  for name, password in passwords.items()))  # fmt: skip


@pytest.mark.parametrize("then", [unreachable, None], ids=["is down", "refuses it, too"])
def test_a_mistyped_password_of_one_host_closes_no_other(
    house: House, machines: Machines, then: Behaviour | None
) -> None:
    """It is given the one that all others have, and are accepted with."""
    fleet = dict.fromkeys(NAMES, "fleet")
    machines.behaviours = {name: machines.login(name) for name in NAMES} | {"odd": machines.login("odd", refused)}
    fleet_of(house, fleet | {"odd": "typo"})
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        for _ in range(4):
            house.monitor.poll_now("odd", 5)
        assert machines.logins.count("odd") == 4
        machines.behaviours["odd"] = then or machines.behaviours["odd"]
        fleet_of(house, fleet | {"odd": "fleet"})
        house.monitor.catch_up()
        for _ in range(2):
            assert [house.monitor.login_wait(name) for name in NAMES] == [0.0] * len(NAMES)
            house.monitor.poll_now("odd", 5)
        assert house.aggregator.is_healthy()


def test_one_password_in_place_of_many_that_were_refused_is_tried_at_once(house: House, machines: Machines) -> None:
    """Each host had its own root's, which is no other's account."""
    machines.behaviours = {name: machines.login(name, refused) for name in NAMES}
    fleet_of(house, {name: f"old{name}" for name in NAMES})
    with house.watching():
        wait_for(lambda: all(house.stored(name) == ("unhealthy", "auth") for name in NAMES))
        machines.behaviours = {name: machines.login(name) for name in NAMES}
        fleet_of(house, dict.fromkeys(NAMES, "new"))
        wait_for(house.aggregator.is_healthy)


def test_a_new_password_is_tried_where_only_who_is_down_had_refused_the_old_one(
    house: House, machines: Machines
) -> None:
    """The others' sessions were kept over the rotation."""
    machines.behaviours = {name: machines.login(name) for name in NAMES} | {"odd": machines.login("odd", refused)}
    fleet_of(house, dict.fromkeys((*NAMES, "odd"), "old"))
    with house.watching():
        wait_for(lambda: house.state("odd") == ("unhealthy", "auth"))
        for _ in range(3):
            house.monitor.poll_now("odd", 5)
        machines.behaviours["odd"] = unreachable
        fleet_of(house, dict.fromkeys((*NAMES, "odd"), "new"))
        house.monitor.catch_up()
        wait_for(house.aggregator.is_healthy)


def test_an_account_is_one_however_it_is_spelled(house: House) -> None:
    """An address list of Active Directory has both forms, and CredSSP's Kerberos takes but one of them."""
    users = "EXAMPLE\\monitor", "monitor@example.com", "example\\Monitor", "monitor", "other"
    targets = [Target(0, ResourceSettings(name=f"h{number}", hostname="h", username=user, password=SecretStr("word")),
                      None, "", "") for number, user in enumerate(users)]  # fmt: skip
    guards = Guards()
    guards.keep(targets)
    assert [len({id(guards.of(target)) for target in some}) for some in (targets[:4], targets)] == [1, 2]


def test_what_was_tested_and_is_refused_after_it_was_saved_counts(house: House) -> None:
    """The host takes three seconds to refuse, and somebody saves before."""
    guards, target = Guards(), one_target(house, "wrong")
    record = LoginRecord()
    with contextlib.suppress(ProbeError), guards.trial(target, record).attempt("a", Deadline(5), record):
        guards.keep([target])
        assert guards.of(target).refusals == 0
        raise ProbeError("auth", "refused")
    assert guards.of(target).refusals == 1


def test_a_test_says_that_other_hosts_refused_the_user() -> None:
    """Each of which has a root of its own, as far as anybody knows who is not told so."""
    def target(name: str) -> Target:
        settings = ResourceSettings(name=name, hostname=name, username="root", password=SecretStr(f"{name}'s"))
        return Target(0, settings, None, "", "")

    guards, watched, record = Guards(), [target(f"h{number}") for number in range(4)], LoginRecord()
    guards.keep(watched)
    for one in watched:
        guards.of(one).refuse(one.name)
    trial = guards.trial(target("h4"), record)
    with pytest.raises(ProbeError, match=r"of this user were refused before, here or by other hosts; .* in 18\d\d s"):
        trial.require_no_wait("h4")


def test_what_is_refused_while_a_test_waits_counts_for_it(house: House) -> None:
    """Both are asked about before either has an answer."""
    guards, watched, typed = Guards(), one_target(house, "wrong"), one_target(house, "typed")
    guards.keep([watched])
    record = LoginRecord()
    trial = guards.trial(typed, record)
    for _ in range(healthchecker.REFUSALS + 1):
        guards.of(watched).refuse("a")
    with pytest.raises(ProbeError, match="not tried"), trial.attempt("a", Deadline(5), record):
        pass


@pytest.mark.parametrize("meanwhile", ["name: b, platform: simulated", "name: a, password: another"],
                         ids=["gone", "changed"])  # fmt: skip
def test_a_refused_password_that_comes_back_is_none_that_nobody_tried(
    house: House, machines: Machines, meanwhile: str
) -> None:
    """An edit that is taken back, or a resource that is commented out and in again: a directory has counted on."""
    house.write("name: a, interval: 1")
    machines.behaviours["a"] = machines.login("a", refused)
    with house.watching():
        wait_for(lambda: house.state("a") == ("unhealthy", "auth"))
        for _ in range(2):
            house.monitor.poll_now("a", 5)
        assert machines.logins == ["a"] * 3
        for tried in (4, 4):
            machines.behaviours["a"] = unreachable
            house.write(meanwhile)
            house.monitor.catch_up()
            house.write("name: a, interval: 1")
            house.monitor.catch_up()
            machines.behaviours["a"] = machines.login("a", refused)     # but never the other password
            assert house.monitor.login_wait("a") > 1800
            for _ in range(3):
                house.monitor.poll_now("a", 5)
            assert len(machines.logins) == tried, "the one more that who asks for it has"


def test_what_was_refused_is_forgotten_in_the_end() -> None:
    """Of credentials that nobody has any more: after half an hour, and the oldest where there are too many."""
    def target(password: str) -> Target:
        settings = ResourceSettings(name="a", hostname="h", username="u", password=SecretStr(password))
        return Target(0, settings, None, "", "")

    guards, count = Guards(), healthchecker.REMEMBERED
    for number in range(count + 1):
        guards.of(target(f"p{number}")).refuse("a")
    guards.of(target("old")).refuse("a", LOCKOUT_WINDOW + 1)
    guards.keep([])
    assert len(guards._guards) == count
    assert [guards.of(target(f"p{number}")).refusals for number in (0, 1, count)] == [0, 1, 1]


def test_what_nobody_has_any_more_keeps_no_other_password_from_being_tried() -> None:
    """Somebody saved five wrong ones, of which one is left; another host with an account of that name has its own."""
    def target(name: str, password: str) -> Target:
        settings = ResourceSettings(name=name, hostname=name, username="u", password=SecretStr(password))
        return Target(0, settings, None, "", "")

    guards = Guards()
    for number in range(5):
        saved = target("a", f"wrong{number}")
        guards.keep([saved])
        guards.of(saved).refuse("a")
    assert guards.trial(target("b", "right"), LoginRecord()).wait("b") == 0
    assert guards.trial(target("b", "wrong0"), LoginRecord()).refusals == 1, "that one is known"


def test_check_now_with_the_settings_of_now(house: House, machines: Machines) -> None:
    """A change is followed first."""
    house.write("name: db1")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        house.write("name: db1, interval: 30", "name: db2")
        house.monitor.catch_up()
        for name in ("db1", "db2"):
            report = house.monitor.poll_now(name, 5)
            assert report and report.target.settings.interval == (30 if name == "db1" else 60)


# --- simulated ---
@pytest.mark.long
def test_simulated_outages(house: House) -> None:
    house.write("name: s, platform: simulated, mean_healthy: 0.5, mean_unhealthy: 0.5, seed: 3, interval: 1,"
                " rise: 1, fall: 1")  # fmt: skip
    with house.watching():
        assert wait_for(lambda: house.state("s")[0] != "unknown")
        for state in ("unhealthy", "healthy"):
            wait_for(lambda state=state: house.state("s")[0] == state, 20)  # type: ignore[misc]
        wait_for(lambda: house.stored("s")[0] != "")


def test_simulated_starts_healthy_and_repeats_with_a_seed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def row(seed: int, number: int) -> str:
        return f"name: s{seed}-{number}, platform: simulated, mean_healthy: 0.1, mean_unhealthy: 0.1, seed: {seed}"

    house.write(*(row(seed, number) for seed in (1, 2) for number in (1, 2)))
    with house.store.reading() as session:
        targets = healthchecker.load_targets(session, house.vault).values()
    access = ConnectionContext(KnownHosts(house.folder / "known_hosts"), Resolver())
    connections = [SimulatedConnection(target, LoginGuard(), access) for target in targets]
    runs = []
    for _ in range(100):
        runs.append([connection.sample(Deadline(1)).checks["simulation"].good for connection in connections])
        now += 0.01
    assert runs[0] == [True] * 4
    differences = [sum(run[one] != run[other] for run in runs) for one, other in ((0, 1), (2, 3), (0, 2))]
    assert differences[:2] == [0, 0]
    assert differences[2] > 10, "another seed, other flips"


# --- what depends on others ---
def events(house: House) -> list[tuple[str, str]]:
    """Of states, oldest first; those without a name are of the gate."""
    house.monitor._context.recorder.flush()
    with house.store.reading() as session:
        rows = session.scalars(sqlalchemy.select(healthchecker.Event).order_by(healthchecker.Event.id))
        return [(row.resource, row.text.partition(" after ")[0]) for row in rows if row.kind == "state"]


def test_what_is_not_tried_for_a_moment_is_no_result(
    house: House, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a refusal several machines wait for what the others had begun: resources that were added then closed the
    gate, and healthy hosts were told as refused."""
    monkeypatch.setattr(healthchecker, "JOURNAL_TIME", 3.0)
    house.write("name: a, critical: false, timeout: 10")
    machines.behaviours |= {name: machines.login(name, refused if name == "a" else None) for name in "ab"}
    with house.watching():
        house.poller("a")._guard.rows.journal = LoginJournal(machines=lambda: 2)
        wait_for(lambda: house.state("a") == ("unhealthy", "auth"))
        house.write("name: a, critical: false, timeout: 10", "name: b, timeout: 10")
        wait_for(lambda: "b" in house.monitor.pollers and house.state("b")[0] != "unknown")
        assert ("b", "unknown -> healthy") in events(house) and house.aggregator.is_healthy()
    assert machines.logins == ["a", "b"]


CHILDREN = [f"h{number}" for number in range(5)]


def test_a_parent_that_fails_is_one_event(house: House, machines: Machines) -> None:
    """The child that fails first has it polled; nobody tells of a child, though each fails on its own, too."""
    house.write("name: switch, fall: 2, rise: 1", "name: hop, depends_on: [switch], rise: 1",
                *(f"name: {name}, depends_on: [hop], rise: 1" for name in CHILDREN))  # fmt: skip
    names = ["switch", "hop", *CHILDREN]
    with house.watching():
        wait_for(lambda: all(house.state(name) == ("healthy", "") for name in names))
        wait_for(lambda: len(events(house)) == len(names))
        machines.behaviours |= dict.fromkeys(names, unreachable)
        for name in CHILDREN:
            house.poller(name).poll_now()
        wait_for(lambda: all(house.state(name)[0] == "unhealthy" for name in names))
        wait_for(lambda: len(events(house)) > len(names))
        wait_for(lambda: not any(house.poller(name).news.waits for name in names))  # a sweep has dropped them
        assert events(house)[len(names):] == [
            ("switch", "healthy -> unhealthy (unreachable: connection refused; 6 behind it)")]  # fmt: skip
        standing = house.monitor.behind("h3")
        assert standing and (standing.cause, standing.reason) == ("parent", "behind switch")
        machines.behaviours["switch"] = good
        house.poller("switch").poll_now().result(60)
        assert house.monitor.behind("hop") is None and house.monitor.behind("h3"), "hop's own last result is bad"
        machines.behaviours |= dict.fromkeys(names[:-1], good)
        for name in names[1:]:
            house.poller(name).poll_now().result(60)
        wait_for(lambda: len(events(house)) == len(names) + 3)
        told = events(house)[len(names) + 1 :]
        assert sorted(told) == [("h4", "healthy -> unhealthy (unreachable: connection refused)"),
                                ("switch", "unhealthy -> healthy")]  # fmt: skip


def test_a_child_wakes_its_parent_no_more_often_than_it_may(house: House, machines: Machines) -> None:
    """However many fail, and again and again: it was polled less than its retry_interval ago."""
    house.write("name: parent, retry_interval: 60", *(f"name: {name}, depends_on: [parent]" for name in CHILDREN))
    with house.watching():
        wait_for(lambda: all(house.state(name) == ("healthy", "") for name in ("parent", *CHILDREN)))
        wait_for(lambda: len(events(house)) == 1 + len(CHILDREN))
        for behaviour in (unreachable, good, unreachable):
            machines.behaviours |= dict.fromkeys(CHILDREN, behaviour)
            for answer in [house.poller(name).poll_now() for name in CHILDREN]:
                answer.result(60)
        wait_for(lambda: all(house.state(name) == ("unhealthy", "unreachable") for name in CHILDREN))
        assert house.poller("parent").doubt.is_urged
        assert len(machines.moments("parent")) == 1
        house.poller("parent").poll_now()
        wait_for(lambda: len(events(house)) == 1 + 2 * len(CHILDREN))
        assert not house.poller("parent").doubt.is_urged
        assert len(machines.moments("parent")) == 2


def test_a_woken_parent_keeps_its_guard(house: House, machines: Machines) -> None:
    """A refused password is not tried again because others fail; meanwhile these are behind it."""
    house.write("name: parent, fall: 1", "name: child, depends_on: [parent]")
    machines.behaviours["parent"] = machines.login("parent", refused)
    with house.watching():
        wait_for(lambda: house.state("parent") == ("unhealthy", "auth") and house.state("child") == ("healthy", ""))
        assert house.monitor.behind("child")
        parent = house.poller("parent").doubt
        parent.urge()
        wait_for(lambda: not parent.is_urged)
        assert machines.logins == ["parent"]


def test_a_change_waits_until_the_parent_has_answered(house: House, machines: Machines) -> None:
    """And is told as soon as it is not to blame: not with the next poll, a minute later."""
    house.write("name: parent, timeout: 60", "name: child, depends_on: [parent], fall: 1")
    with house.watching():
        wait_for(lambda: house.state("parent") == house.state("child") == ("healthy", ""))
        wait_for(lambda: len(events(house)) == 2)
        machines.behaviours |= {"parent": machines.hang, "child": unreachable}
        house.poller("child").poll_now()
        wait_for(lambda: len(machines.moments("parent")) == 2)
        assert house.state("child") == ("unhealthy", "unreachable")
        assert not house.aggregator.is_healthy(), "the gate does not wait"
        assert len(events(house)) == 2
        machines.behaviours["parent"] = good
        machines.ended.set()
        wait_for(lambda: len(events(house)) == 3, 30)
        assert events(house)[-1] == ("child", "healthy -> unhealthy (unreachable: connection refused)")


def test_a_change_that_waits_is_told_at_the_end(house: House, machines: Machines) -> None:
    """For the next start takes what is stored for told."""
    house.write("name: parent, timeout: 60", "name: child, depends_on: [parent], fall: 1")
    with house.watching():
        wait_for(lambda: house.state("parent") == house.state("child") == ("healthy", ""))
        wait_for(lambda: len(events(house)) == 2)
        machines.behaviours |= {"parent": machines.hang, "child": unreachable}
        house.poller("child").poll_now().result(60)
        wait_for(lambda: len(machines.moments("parent")) == 2)
        assert len(events(house)) == 2
        recorder = house.monitor._context.recorder
    wait_for(lambda: not recorder.is_alive())
    assert events(house)[2:] == [("child", "healthy -> unhealthy (unreachable: connection refused)")]


@pytest.mark.long
def test_nobody_waits_for_the_word_of_a_parent_that_reports_by_itself(house: House, machines: Machines) -> None:
    house.write("name: parent, platform: push, password: 0123456789abcdef", "name: child, depends_on: [parent]")
    with house.watching():
        wait_for(lambda: house.state("child") == ("healthy", ""))
        wait_for(lambda: ("child", "unknown -> healthy") in events(house))
        machines.behaviours["child"] = unreachable
        house.poller("child").poll_now()
        wait_for(lambda: events(house)[-1] == ("child", "healthy -> unhealthy (unreachable: connection refused)"))


def test_a_parent_in_maintenance_makes_nobody_unhealthy(house: House, machines: Machines) -> None:
    house.write("name: parent, fall: 1, critical: false", "name: child, depends_on: [parent]")
    machines.behaviours["parent"] = unreachable
    with house.watching():
        wait_for(lambda: house.monitor.behind("child") is not None)
        assert not house.aggregator.is_healthy()
        maintain(house, "parent", 3600)
        wait_for(house.aggregator.is_healthy)
        assert house.monitor.behind("child") is None
        house.elsewhere("DELETE FROM maintenance")
        wait_for(lambda: not house.aggregator.is_healthy())


def test_a_restart_while_a_parent_is_down(house: House, machines: Machines) -> None:
    """What was known of both counts on, and nobody tells later of children that were never told of."""
    house.write("name: parent, fall: 1, rise: 1", "name: child, depends_on: [parent], rise: 1")
    machines.behaviours |= dict.fromkeys(("parent", "child"), unreachable)
    with house.watching():
        wait_for(lambda: house.stored("parent") == house.stored("child") == ("unhealthy", "unreachable"))
        count = len(events(house))
    with house.watching():
        for name in ("parent", "child"):
            house.poller(name).poll_now().result(60)
        assert house.monitor.behind("child")
        machines.behaviours.clear()
        for name in ("parent", "child"):
            house.poller(name).poll_now()
        wait_for(house.aggregator.is_healthy)
        wait_for(lambda: len(events(house)) > count)
        assert events(house)[count:] == [("parent", "unhealthy -> healthy")]


def test_a_restart_while_a_child_that_failed_first_is_behind_its_parent(house: House, machines: Machines) -> None:
    """It was told of by itself: its recovery is told, too, and its failure not again."""
    house.write("name: parent, fall: 1, rise: 1", "name: child, depends_on: [parent], fall: 1, rise: 1")
    with house.watching():
        wait_for(lambda: house.state("parent") == house.state("child") == ("healthy", ""))
        for name in ("child", "parent"):
            machines.behaviours[name] = unreachable
            house.poller(name).poll_now()
            wait_for(lambda name=name: events(house)[-1][0] == name and "unhealthy" in events(house)[-1][1])
        wait_for(lambda: house.stored("parent") == house.stored("child") == ("unhealthy", "unreachable"))
        count = len(events(house))
    with house.watching():
        for name in ("parent", "child"):
            house.poller(name).poll_now().result(60)
        for name in ("parent", "child"):
            machines.behaviours[name] = good
            for each in ("parent", "child"):
                house.poller(each).poll_now().result(60)
    assert events(house)[count:] == [("parent", "unhealthy -> healthy"), ("child", "unhealthy -> healthy")]


@pytest.mark.long
def test_a_parent_that_goes_stale(house: House, machines: Machines) -> None:
    """No result of it in time is as bad as a bad one."""
    house.write("name: parent, interval: 1, timeout: 1, critical: false", "name: child, depends_on: [parent]")
    with house.watching():
        wait_for(lambda: house.state("parent") == house.state("child") == ("healthy", ""))
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["parent"] = machines.hang
        wait_for(lambda: house.state("parent") == ("unhealthy", "stale"), 30)
        assert house.monitor.behind("child") and not house.aggregator.is_healthy()
