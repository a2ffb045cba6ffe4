"""Several machines on one database: who polls what, what the others hear of it, and what becomes of it when one of them
dies, sleeps or is cut off. The machines are services of their own on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy
from conftest import wait_for
from console import Client, prepared_database
from postgres import PASSWORD, URL_FILE, Postgres, Program, database_in, execute, open_postgres, refusing
from pydantic import SecretStr
from service import Program as Separate
from service import Service, command, environment, prepared_keys, run, write_inventory
from soak_machines import Gate
from sshd import Login, ParamikoSshd
from test_notify import Hook, hook  # noqa: F401  # a fixture
from test_poll import House, Machines, house, machines, unreachable, vault

from healthchecker import (
    LEASE_GRACE,
    LIVING,
    SCHEMA,
    TAKE_OVER,
    Cause,
    Cut,
    Deadline,
    Exchange,
    Found,
    HealthAggregator,
    LoginGuard,
    Membership,
    PollContext,
    Poller,
    PostgresServer,
    ResourceLease,
    ResourceSettings,
    Standing,
    State,
    Target,
    Uplink,
    Vault,
    lease_clock,
    owner_of,
)

__all__ = ["house", "machines", "vault"]  # fixtures
CLOCK = "import time\nright = time.time\ntime.time = lambda: right() + {ahead}\n"     # libfaketime breaks time.sleep
NAMES = [f"tcp{number}" for number in range(9)]
OFTEN = "interval: 1, retry_interval: 1, timeout: 1, rise: 1, fall: 1"


# --- who polls what
def test_each_has_its_share() -> None:
    """Within 15 % of 5,000; where one goes only its own have another one."""
    machines, names = frozenset("abc"), [f"host{number}.example.com" for number in range(5000)]
    owners = {name: owner_of(name, machines) for name in names}
    assert all(abs(count / (5000 / 3) - 1) < 0.15 for count in Counter(owners.values()).values())
    fewer = {name: owner_of(name, machines - {"b"}) for name in names}
    assert {owner for name, owner in owners.items() if fewer[name] != owner} == {"b"}
    assert owner_of("host1", frozenset()) == ""


# --- machines
class Host:
    """A TCP server that counts its clients, and may be away."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port, self.count, self._ending = self._sock.getsockname()[1], 0, False
        self._begin()

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._serve, args=(self._sock,), daemon=True)
        self._thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock.accept()[0].close()
                self.count += 1

    def leave(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._sock.close()

    def come_back(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", self.port))
        self._begin()


class Site:
    """Machines named a, b, c on one database, and what they watch."""

    def __init__(self, folder: Path, postgres: Postgres, more: str = "") -> None:
        self.folder, self._postgres, self.more, self.behind = folder, postgres, more, ""
        self.url = postgres.url(postgres.prepared())
        self.hosts = {name: Host() for name in NAMES}
        self.machines: dict[str, Separate] = {}
        self._stack = contextlib.ExitStack()

    def write(self, name: str, rows: str = "", service: str = "") -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / URL_FILE).write_text(self.url, encoding="utf-8")
        prepared_keys(folder)
        rows = rows or "".join(f"  - {{name: {each}, platform: tcp, hostname: 127.0.0.1, port: {host.port}, {OFTEN}"
                               f"{self.behind if each != NAMES[0] else ''}}}\n"
                               for each, host in self.hosts.items())  # fmt: skip
        return write_inventory(folder, rows + self.more, f"  machine: {name}\n{service}")

    def begin(self, *names: str, ahead: float = 0) -> None:
        """Their clocks are `ahead` by so many seconds."""
        for name in names:
            path = self.write(name)
            if not self.machines:
                prepared_database(path.parent)
            (path.parent / "sitecustomize.py").write_text(CLOCK.format(ahead=ahead), encoding="utf-8")
            made = Separate(path, env={"PYTHONPATH": str(path.parent)}) if ahead else Service(path, deadline=120)
            self.machines[name] = self._stack.enter_context(made)
            wait_for(lambda: {*self.pollers()} >= {*NAMES}, 60)     # or the next one polls first, too

    def execute(self, statement: str, **values: object) -> list[Any]:
        return execute(database_in(self.folder / "a"), statement, **values)

    def pollers(self) -> dict[str, str]:
        """Which machine found the last result of each."""
        return dict(self.execute("SELECT name, machine FROM result JOIN resource ON resource.id = resource_id"))

    def shared_by(self, *names: str) -> bool:
        able = {name for name, _, _, able in self.execute(LIVING) if able}
        found = self.pollers()      # of what falls silent, too, after a while: that has no owner
        return able == {*names} and all(found.get(name) == owner_of(name, frozenset(names)) for name in NAMES)

    def serial(self) -> int:
        """Of the last transaction that wrote results; 0 while the database is away."""
        with contextlib.suppress(sqlalchemy.exc.OperationalError):
            return int(self.execute("SELECT value FROM setting WHERE name = 'serial'")[0][0])
        return 0

    def answers(self, *names: str) -> set[int]:
        return {self.machines[name].get("/").status for name in names or self.machines}

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self._stack.close()
        for host in self.hosts.values():
            with contextlib.suppress(OSError):
                host.leave()


@pytest.fixture
def site(tmp_path: Path, postgres: Postgres) -> Iterator[Site]:
    made = Site(tmp_path, postgres)
    yield made
    made.close()


def open_until(site: Site, names: str, condition: Any) -> None:
    """Never is a gate of these closed meanwhile."""
    def look() -> bool:
        assert site.answers(*names) == {200}
        return bool(condition())

    wait_for(look, 120)


@pytest.mark.long
def test_three_share_what_is_polled(site: Site) -> None:
    """Each is polled by its owner alone; all gates know what any of them found."""
    site.begin("a", "b", "c")
    wait_for(lambda: site.answers() == {200}, 60)
    open_until(site, "abc", lambda: site.shared_by("a", "b", "c"))
    assert len(set(site.pollers().values())) == 3
    before = {name: host.count for name, host in site.hosts.items()}
    open_until(site, "abc", lambda: all(host.count > before[name] + 5 for name, host in site.hosts.items()))
    for name in NAMES[:3]:
        site.hosts[name].leave()
        wait_for(lambda: site.answers() == {503}, 60)
        site.hosts[name].come_back()
        wait_for(lambda: site.answers() == {200}, 60)
    kinds = Counter(kind for (kind,) in site.execute("SELECT kind FROM event WHERE kind IN ('gate', 'state')"))
    assert kinds["state"] == len(NAMES) + 6, "each change is told by one of them"
    assert kinds["gate"] == 8, "so is what the gate does"
    ends = site.execute('SELECT "end" FROM incident WHERE "group" = \'\' ORDER BY id')
    assert [end for (end,) in ends][-3:] == ["opened"] * 3


@pytest.mark.long
def test_one_is_killed(site: Site) -> None:
    """Others poll what was its own, no gate closes, and when it comes back it has them again."""
    site.begin("a", "b", "c")
    wait_for(lambda: site.shared_by("a", "b", "c") and site.answers() == {200}, 60)
    site.machines["b"].kill()
    open_until(site, "ac", lambda: site.shared_by("a", "c"))
    host = next(name for name in NAMES if owner_of(name, frozenset("abc")) == "b")
    site.hosts[host].leave()
    wait_for(lambda: site.answers("a", "c") == {503}, 60)
    site.hosts[host].come_back()
    wait_for(lambda: site.answers("a", "c") == {200}, 60)
    site.begin("b")
    open_until(site, "ac", lambda: site.shared_by("a", "b", "c"))


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="no SIGSTOP")
def test_one_sleeps(site: Site) -> None:
    """Nothing that it found before, or was finding, counts when it wakes."""
    site.begin("a", "b")
    wait_for(lambda: site.shared_by("a", "b"), 60)
    [epoch] = [row.instance for row in site.execute("SELECT * FROM machine WHERE name = 'b'")]
    os.kill(site.machines["b"].process.pid, signal.SIGSTOP)
    try:
        open_until(site, "a", lambda: site.shared_by("a"))
        host = next(name for name in NAMES if owner_of(name, frozenset("ab")) == "b")
        site.hosts[host].leave()
        wait_for(lambda: site.answers("a") == {503}, 60)
    finally:
        os.kill(site.machines["b"].process.pid, signal.SIGCONT)
    wait_for(lambda: [row for row in site.execute("SELECT * FROM machine WHERE name = 'b'") if row.instance != epoch])
    for _ in range(20):
        assert site.answers("a") == {503}
    wait_for(lambda: site.answers("b") == {503}, 60)
    site.hosts[host].come_back()
    wait_for(lambda: site.shared_by("a", "b") and site.answers() == {200}, 60)


@pytest.mark.long
def test_clocks_an_hour_apart(site: Site) -> None:
    """All go by the database's: gates, what they wrote, and what was said on one of them of all: maintenance, and that
    the gate is open or closed, whoever has started when."""
    begun_at = time.time()
    for name, ahead in (("a", 0), ("b", 3600), ("c", -3600)):
        site.begin(name, ahead=ahead)
    wait_for(lambda: site.shared_by("a", "b", "c") and site.answers() == {200}, 60)
    for name in NAMES[:3]:
        site.hosts[name].leave()
        wait_for(lambda: site.answers() == {503}, 60)
        site.hosts[name].come_back()
        wait_for(lambda: site.answers() == {200}, 60)
    clients = [Client(*machine.console).log_in() for machine in site.machines.values()]
    for name, client in zip(NAMES, clients, strict=False):
        assert client.api("POST", "maintenance", {"resources": [name], "for": "300s", "reason": "x"}).status == 201
        wait_for(lambda: all(each.api("GET", f"resources/{name}").json["maintenance"]  # noqa: B023
                             for each in clients), 60)  # fmt: skip
    site.hosts[NAMES[4]].leave()
    wait_for(lambda: site.answers() == {503}, 60)
    for client in clients:
        for action, status in (("open", 200), ("close", 503), ("auto", 503)):
            assert client.api("POST", "gate", {"action": action}).status == 200
            site.execute("UPDATE setting SET text = replace(text, '\"boot\":', '\"boot\": 1') WHERE name = 'override'")
            site.execute("UPDATE setting SET value = value + 1 WHERE name = 'revision'")
            wait_for(lambda: {(each.api("GET", "gate").json["override"] or {"action": "auto"})["action"]
                              for each in clients} == {action} and site.answers() == {status}, 60)  # noqa: B023
    for column in ("at FROM event", "polled_at FROM status", "seen_at FROM machine", "found_at FROM result"):
        rows = site.execute(f"SELECT *, {column}")
        assert [row for row in rows if not begun_at - 5 < row[-1] < time.time() + 5] == []


@pytest.mark.long
def test_the_database_is_away(tmp_path: Path, postgres: Postgres) -> None:
    """Each polls everything itself: no gate closes because of it, and what fails meanwhile closes all of them."""
    made = Site(tmp_path, postgres)
    with contextlib.closing(made):
        made.begin("a", "b")
        wait_for(lambda: made.shared_by("a", "b") and made.answers() == {200}, 60)
        postgres.end()
        try:
            before = {name: host.count for name, host in made.hosts.items()}
            open_until(made, "ab", lambda: all(host.count > before[name] + 10 for name, host in made.hosts.items()))
            made.hosts[NAMES[0]].leave()
            wait_for(lambda: made.answers() == {503}, 60)
            made.hosts[NAMES[0]].come_back()
            wait_for(lambda: made.answers() == {200}, 60)
        finally:
            postgres.begin()
        open_until(made, "ab", lambda: made.shared_by("a", "b"))


@pytest.mark.long
@pytest.mark.parametrize("what", ["writes", "reads"])
def test_results_that_do_not_get_through(site: Site, what: str) -> None:
    """The machines hear that the others live, and nothing else: each polls everything before it is too late."""
    site.begin("a", "b")
    wait_for(lambda: site.shared_by("a", "b") and site.answers() == {200}, 60)
    before = {name: host.count for name, host in site.hosts.items()}
    with contextlib.ExitStack() as stack:
        if what == "writes":
            stack.enter_context(refusing(database_in(site.folder / "a"), "INSERT ON result"))
        else:
            site.execute("ALTER TABLE result RENAME TO away")
            stack.callback(site.execute, "ALTER TABLE away RENAME TO result")
        begun = time.monotonic()
        open_until(site, "ab", lambda: time.monotonic() - begun > 45)
        assert all(host.count > before[name] + 45 for name, host in site.hosts.items())
        site.hosts[NAMES[0]].leave()
        wait_for(lambda: site.answers() == {503}, 10)
        site.hosts[NAMES[0]].come_back()
        wait_for(lambda: site.answers() == {200}, 10)
    open_until(site, "ab", lambda: site.shared_by("a", "b"))


@pytest.mark.long
def test_what_falls_silent_closes_every_gate(tmp_path: Path, postgres: Postgres) -> None:
    """Soon after each other, whichever machine it reports to: from that one nobody takes it over."""
    token = "0123456789abcdef"
    made = Site(tmp_path, postgres, f"  - {{name: job, platform: push, password: {token}, interval: 4}}\n")
    with contextlib.closing(made):
        made.begin("a", "b")
        wait_for(lambda: made.shared_by("a", "b"), 60)
        for machine in made.machines.values():
            client, said_mono = Client(*machine.console), time.monotonic()
            client.token = token
            assert client.api("POST", "push/job", {"healthy": True}).status == 204
            wait_for(lambda: made.answers() == {200}, 60)
            wait_for(lambda: made.answers() == {503}, 60)
            assert time.monotonic() - said_mono < 4 + TAKE_OVER


MACHINE = ResourceSettings(name="one", platform="linux", hostname="192.0.2.1", username="u", password="p")
PUSHED = ResourceSettings(name="one", platform="push", hostname="one", password="x" * 32)


def watched(uplink: Uplink, settings: ResourceSettings = MACHINE) -> ResourceLease:
    """A lease that counts, alone, and of which nothing is known yet."""
    context = PollContext(HealthAggregator(), cast("Any", None), cast("Any", None), random.Random(1), uplink)
    lease = ResourceLease(Target(1, settings, None, "", ""), context, 0.0)
    context.aggregator.register("one", lease)
    context.aggregator.start()
    return lease


def is_open(lease: ResourceLease) -> bool:
    return lease._context.aggregator.is_healthy()


def found(state: State, cause: Cause = "", good: int = 0, bad: int = 0) -> Found:
    return Found(1, "", Standing(state, cause, "x", time.time(), good, bad), lease_clock(), 130.0, 0.0)


def test_what_another_one_found_is_not_held_against() -> None:
    """Who is cut off holds what was healthy; not what a machine that gets through found to be bad."""
    uplink = Uplink(["192.0.2.1:22"], 300)
    lease = watched(uplink)
    lease.outage._since_mono, lease.outage._was_healthy = lease_clock(), True
    cut = uplink.cut = uplink.last = Cut(lease_clock(), time.time(), lease_clock() + 300, -math.inf, "cut", math.inf)
    assert lease.held > 0, "or it shows nothing"
    lease.rest()
    uplink.cut, uplink.last = None, cut._replace(over_mono=lease_clock())
    assert lease.held > 0, "the cut is over, and nothing is known yet of what it has to leave to others"
    lease.adopt(found("unhealthy", "timeout", good=1))
    assert lease.held > 0, "nor did that one know it before"
    bad = found("unhealthy", "check", bad=2)
    lease.adopt(bad)
    assert lease.held == 0.0 and not is_open(lease)
    lease.adopt(found("unhealthy", "stale", bad=2))
    assert lease.standing == bad.standing, "that another one has no result says nothing while this one counts"


def test_who_reports_no_more_is_late_everywhere() -> None:
    """No machine polls in the place of another what reports by itself: what the first one says of it counts at once,
    but for what was reported here since."""
    lease = watched(Uplink(), PUSHED)
    lease.rest()
    lease.adopt(found("healthy", good=1)._replace(counts=0.0))
    assert is_open(lease) and lease.expires_mono < lease_clock() + LEASE_GRACE, "which is for the way of the next one"
    lease.adopt(found("unhealthy", "stale", bad=1))
    assert not is_open(lease)
    lease.adopt(found("healthy", good=1))
    lease.adopt(found("unhealthy", "stale", bad=1))
    assert is_open(lease)


def test_what_was_said_before_another_took_it_for_late() -> None:
    """To a third machine, and heard after that: it counts for as long as it does."""
    lease = watched(Uplink(), PUSHED)
    lease.rest()
    lease.adopt(found("healthy", good=1)._replace(counts=0.0))
    said = found("healthy", good=1)
    lease.adopt(found("unhealthy", "stale", bad=1))
    assert not is_open(lease)
    lease.adopt(said)
    assert is_open(lease)


def test_the_newest_result_counts_whoever_polls() -> None:
    """Who polls may have changed just then, or somebody asked for a poll elsewhere."""
    lease = watched(Uplink())
    assert not lease.rests
    lease.adopt(found("healthy", good=1))
    assert is_open(lease)
    lease.adopt(found("unhealthy", "host_key", bad=1))
    assert not is_open(lease)
    lease.adopt(found("healthy", good=2)._replace(found_mono=lease_clock() - 60))
    assert not is_open(lease)


def test_a_good_result_closes_nothing() -> None:
    """A machine that comes back from a cut takes what it did not reach for unhealthy until it has answered again."""
    lease = watched(Uplink())
    lease.rest()
    lease.adopt(found("healthy", good=1))
    lease.adopt(found("unhealthy", "timeout", good=1))
    assert is_open(lease)
    lease.adopt(found("unhealthy", "timeout", bad=1))
    assert not is_open(lease)
    lease.adopt(found("unhealthy", "timeout", good=1))
    assert lease.standing.good == 1


class Life(Membership):
    """That of a machine which polls nothing of its own."""

    epoch, is_shared = "before", True  # type: ignore[assignment]

    def polls(self, name: str) -> bool:
        return False


def shared(house: House, name: str) -> tuple[Life, Poller]:
    life, poller = Life(), house.poller(name)
    poller._context = dataclasses.replace(poller._context, members=life)
    return life, poller


def test_a_poll_of_a_life_that_is_over_says_nothing(house: House, machines: Machines) -> None:
    """It began while this machine was cut off, perhaps."""
    house.write("name: m0, fall: 1")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        life, poller = shared(house, "m0")

        def ends(guard: LoginGuard, deadline: Deadline) -> None:
            life.epoch = "after"
            unreachable(guard, deadline)

        machines.behaviours["m0"] = ends
        assert not poller.poll_now().result(60).verdict.healthy
        assert poller.standing.healthy and poller.standing.bad == 0


def test_who_comes_back_looks_for_itself(house: House, machines: Machines) -> None:
    """At what did not answer, whoever is to poll it now; others may poll it in an hour."""
    house.write("name: m0, fall: 1, interval: 300", "name: m1, interval: 300")
    with house.watching():
        wait_for(house.aggregator.is_healthy)
        _, poller = shared(house, "m0")
        machines.behaviours["m0"] = unreachable
        poller.poll_now().result(60)
        assert not house.aggregator.is_healthy()
        del machines.behaviours["m0"]
        before = len(machines.moments("m1"))
        Exchange(house.store, poller._context)._share({"m0": poller, "m1": shared(house, "m1")[1]})
        assert poller.rests
        wait_for(house.aggregator.is_healthy)
        assert poller.standing.good >= poller.target.settings.rise and len(machines.moments("m1")) == before
        left = poller.expires_mono - lease_clock()
        assert poller._next_mono() - time.monotonic() < left - 1, "or its lease ends before it looks again"


@pytest.mark.long
def test_the_database_is_silent(tmp_path: Path) -> None:
    """As behind a network that drops everything: no query fails, and none ends. What counts is still found in time."""
    with open_postgres() as server:
        made = Site(tmp_path, server)
        with contextlib.closing(made):
            made.begin("a", "b")
            wait_for(lambda: made.shared_by("a", "b") and made.answers() == {200}, 60)
            before = {name: host.count for name, host in made.hosts.items()}
            with server.silent():
                open_until(made, "ab", lambda: all(host.count > before[name] + 30 for name, host in made.hosts.items()))
                made.hosts[NAMES[0]].leave()
                wait_for(lambda: made.answers() == {503}, 10)
                made.hosts[NAMES[0]].come_back()
                wait_for(lambda: made.answers() == {200}, 10)
            open_until(made, "ab", lambda: made.shared_by("a", "b"))


@pytest.mark.long
def test_one_is_cut_from_the_database(tmp_path: Path, postgres: Postgres, pgbouncer: Program) -> None:
    """It polls everything itself, the other one takes its own over; and back."""
    made = Site(tmp_path, postgres)
    with contextlib.closing(made):
        made.begin("a")
        direct, made.url = made.url, made.url.replace(f":{postgres.port}/", f":{pgbouncer.port}/")
        made.begin("b")
        made.url = direct
        wait_for(lambda: made.shared_by("a", "b") and made.answers() == {200}, 60)
        pgbouncer.end()
        try:
            open_until(made, "ab", lambda: made.shared_by("a"))
            for name in NAMES[:4]:
                made.hosts[name].leave()
                wait_for(lambda: made.answers() == {503}, 60)
                made.hosts[name].come_back()
                wait_for(lambda: made.answers() == {200}, 60)
        finally:
            pgbouncer.begin()
        open_until(made, "ab", lambda: made.shared_by("a", "b"))


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2], ids=["its address", "another one"])
def test_a_standby_takes_over(count: int, tmp_path: Path) -> None:
    """At the primary's address, or at its own of two that the URL names, after the primary was lost, perhaps with its
    last rows: no gate closes, asked 20 times a second, and the work is shared again."""
    with open_postgres() as primary, primary.standby() as standby, contextlib.closing(Site(tmp_path, primary)) as made:
        if count == 2:
            made.url = primary.url_of(made.url.rpartition("/")[2], primary.port, standby.port)
        made.begin("a", "b")
        wait_for(lambda: made.shared_by("a", "b") and made.answers() == {200}, 60)
        gates = [Gate(machine) for machine in made.machines.values()]
        primary.end(signal.SIGQUIT)
        if count == 1:
            standby.end()
            (primary.folder / "standby" / "standby.signal").unlink()
            standby.port = primary.port
            standby.begin()
        else:
            primary.execute("SELECT pg_promote()", port=standby.port)
        open_until(made, "ab", lambda: made.serial() > 0)
        serial = made.serial()
        open_until(made, "ab", lambda: made.serial() > serial + 5 and made.shared_by("a", "b"))
        for gate in gates:
            gate.close()
            assert {status for _, status in gate.answers} == {200}
        made.hosts[NAMES[0]].leave()
        wait_for(lambda: made.answers() == {503}, 60)
        made.hosts[NAMES[0]].come_back()
        wait_for(lambda: made.answers() == {200}, 60)


# --- what all of them could do
@pytest.mark.long
def test_a_message_is_sent_once(tmp_path: Path, postgres: Postgres, hook: Hook) -> None:  # noqa: F811
    """Of a gate that three see close, and by another one when who spoke is dead."""
    made = Site(tmp_path, postgres, f"notify: [{{name: ops, url: 'json://{hook.place}/x', wait: 1}}]\n")
    with contextlib.closing(made):
        made.begin("a", "b", "c")
        wait_for(lambda: made.shared_by("a", "b", "c") and made.answers() == {200}, 60)
        speaker = owner_of("", frozenset("abc"))
        for count, rest in ((0, "abc"), (2, "abc".replace(speaker, ""))):
            made.hosts[NAMES[0]].leave()
            wait_for(lambda: made.answers(*rest) == {503} and len(hook.requests) > count, 60)  # noqa: B023
            made.hosts[NAMES[0]].come_back()
            wait_for(lambda: made.answers(*rest) == {200} and len(hook.requests) > count + 1, 60)  # noqa: B023
            wait_for(lambda: made.execute("SELECT message FROM receiver") == [("",)], 60)  # or it is sent again
            if not count:
                made.machines.pop(speaker).kill()
                wait_for(lambda: made.shared_by(*rest), 60)  # noqa: B023
        assert ["closed" in each.json["title"] for each in hook.requests] == [True, False] * 2


@pytest.mark.long
def test_a_message_that_waits_is_left_to_another_one(tmp_path: Path, postgres: Postgres, pgbouncer: Program,
                                                      hook: Hook) -> None:  # noqa: F811  # fmt: skip
    """Who speaks is cut off from the database while its receiver is down: another one speaks by now, and tells it."""
    made = Site(tmp_path, postgres, f"notify: [{{name: ops, url: 'json://{hook.place}/x', wait: 1}}]\n")
    speaker = owner_of("", frozenset("ab"))
    other = "ab".replace(speaker, "")
    with contextlib.closing(made):
        made.begin(other)
        direct, made.url = made.url, made.url.replace(f":{postgres.port}/", f":{pgbouncer.port}/")
        made.begin(speaker)
        made.url = direct
        tries = "SELECT tries FROM receiver WHERE name = 'ops'"
        asked = functools.partial(execute, database_in(tmp_path / other))
        wait_for(lambda: made.shared_by("a", "b") and made.answers() == {200}, 60)
        hook.status = 503
        made.hosts[NAMES[0]].leave()
        wait_for(lambda: asked(tries)[0][0] >= 1, 60)
        pgbouncer.end()
        try:
            wait_for(lambda: {name for name, *_ in asked(LIVING)} == {other}, 60)
            hook.requests.clear()
            hook.status = 200
            wait_for(lambda: asked("SELECT message FROM receiver WHERE name = 'ops'") == [("",)], 120)
            begun = time.monotonic()
            wait_for(lambda: time.monotonic() - begun > 10, 60)     # for so long it would be told by the other one, too
            titles = [each.json["title"].split()[1:] for each in hook.requests]
            assert titles.count("the gate is closed, 1 unhealthy".split()) == 1, titles
        finally:
            pgbouncer.begin()


@pytest.mark.long
def test_of_what_is_behind_another_nobody_is_told(tmp_path: Path, postgres: Postgres, hook: Hook) -> None:  # noqa: F811
    """Whichever machine polls it, and whichever speaks."""
    made = Site(tmp_path, postgres, f"notify: [{{name: ops, url: 'json://{hook.place}/x', wait: 0, on: [state]}}]\n")
    made.behind = f", depends_on: [{NAMES[0]}]"
    with contextlib.closing(made):
        made.begin("a", "b")
        wait_for(lambda: made.shared_by("a", "b") and made.answers() == {200}, 60)
        bad = "SELECT count(*) FROM status WHERE state = 'unhealthy'"
        made.hosts[NAMES[0]].leave()
        wait_for(lambda: made.execute(bad) == [(1,)] and hook.requests, 60)
        for name in NAMES[1:]:
            made.hosts[name].leave()
        wait_for(lambda: made.execute(bad) == [(len(NAMES),)], 60)
        for name in reversed(NAMES):
            made.hosts[name].come_back()
        wait_for(lambda: made.answers() == {200} and len(hook.requests) > 1, 60)
        wait_for(lambda: made.execute("SELECT message FROM receiver") == [("",)], 60)
        assert [each.json["title"] for each in hook.requests] == [
            f"HealthChecker: {NAMES[0]} is {how}" for how in ("unhealthy", "healthy again")]  # fmt: skip


@pytest.mark.long
def test_a_login_holds_everywhere(site: Site) -> None:
    """And a resource is polled at once by the machine that is asked, whoever polls it else."""
    site.begin("a", "b")
    wait_for(lambda: site.shared_by("a", "b"), 60)
    client = Client(*site.machines["a"].console).log_in()
    client.host, client.port = site.machines["b"].console
    assert client.api("GET", "resources").status == 200
    for name in [name for name in NAMES if owner_of(name, frozenset("ab")) == "a"][:2]:
        wait_for(lambda: client.api("POST", f"resources/{name}/check").status == 200  # noqa: B023
                 and site.pollers()[name] == "b")  # noqa: B023  # until a polls it again, a second later


class Hesitant(Login):
    """Says after three seconds that a password is wrong."""

    def check_auth_password(self, username: str, password: str) -> int:
        if password != self.server.password:
            time.sleep(3)
        return super().check_auth_password(username, password)


@pytest.mark.long
@pytest.mark.parametrize("away", [False, True], ids=["refused slowly", "the database is away"])
def test_a_changed_password_locks_no_account(tmp_path: Path, *, away: bool) -> None:
    """Three machines that all know it for right try it four times at most between them, though none of them may have
    heard of the others' refusals when it begins; the common policy locks at the fifth."""
    with open_postgres() as server, contextlib.closing(Site(tmp_path, server)) as made, ParamikoSshd() as sshd:
        sshd.login, right = Login if away else Hesitant, sshd.password
        rows = "".join(f"  - {{name: h{number}, hostname: {sshd.address}, port: {sshd.port}, "
                       f"username: {sshd.username}, password: {right}, platform: linux, interval: 2, "
                       "retry_interval: 1, timeout: 10}\n"
                       for number in range(12))  # fmt: skip
        with contextlib.ExitStack() as stack:
            for name in "abc":
                path = made.write(name, rows, "  known_hosts: known_hosts\n")
                (path.parent / "known_hosts").write_text(sshd.known_hosts(), encoding="utf-8")
                if name == "a":
                    prepared_database(path.parent)
                made.machines[name] = stack.enter_context(Service(path, deadline=120))
            wait_for(lambda: made.answers() == {200} and {*made.pollers().values()} == {*"abc"}, 120)
            for each in made.machines.values():
                each.wait_line("machines that poll: a, b, c", 60)
            if away:
                server.end()
                wait_for(lambda: sshd.log().count("Accepted password") >= 36, 120)
                for each in made.machines.values():
                    wait_for(lambda: "the database cannot be written" in each.output, 60)  # noqa: B023
            sshd.password = "another one"
            sshd.kill_sessions()
            wait_for(lambda: sshd.log().count("Failed password") > 2, 60)
            begun = time.monotonic()
            wait_for(lambda: sshd.log().count("Failed password") > 4 or time.monotonic() - begun > 15, 60)
            assert sshd.log().count("Failed password") in (3, 4)


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="no SIGSTOP")
def test_a_key_is_trusted_wherever_it_is_asked_for(site: Site) -> None:
    """And a connection is tested from the machine that is asked, whichever polls the host."""
    with ParamikoSshd() as sshd:
        names = [f"h{number}" for number in range(6)]
        rows = "".join(f"  - {{name: {name}, hostname: {sshd.address}, port: {sshd.port}, username: {sshd.username}, "
                       f"password: {sshd.password}, platform: linux, interval: 2, retry_interval: 1}}\n"
                       for name in names)  # fmt: skip
        prepared_database(site.write("a", rows).parent)
        with Service(site.write("a", rows), deadline=60) as a, Service(site.write("b", rows), deadline=60) as b:
            wait_for(lambda: (a.get("/").status, b.get("/").status) == (200, 200), 60)
            wait_for(lambda: {*site.pollers().values()} == {"a", "b"}, 60)
            client = Client(*b.console).log_in()
            far = next(name for name in names if owner_of(name, frozenset("ab")) == "a")
            sshd.rekey()
            wait_for(lambda: (a.get("/").status, b.get("/").status) == (503, 503), 60)
            body = {"name": "new", "hostname": sshd.address, "port": sshd.port, "username": sshd.username,
                    "password": sshd.password, "platform": "linux"}  # fmt: skip
            os.kill(a.pid, signal.SIGSTOP)
            try:
                # If it was writing just then, nobody else can until the server has ended that.
                wait_for(lambda: client.api("POST", f"resources/{far}/trust", {}).status != 503, 30)
                answers = [client.api("POST", f"resources/{far}/{what}", {}) for what in ("trust", "check")]
                answers.append(client.api("POST", "test", body))
            finally:
                os.kill(a.pid, signal.SIGCONT)
            assert [answer.status for answer in answers] == [200, 200, 200]
            assert answers[-1].json["state"] == "healthy", answers[-1].body
            for name in names:
                assert client.api("POST", f"resources/{name}/trust", {}).status == 200
            wait_for(lambda: (a.get("/").status, b.get("/").status) == (200, 200), 60)


WATCHED = ("the inventory of a is watched; `reload` there, or here with --accept-removals once that machine is gone "
           "for good\n")  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="no SIGHUP")
def test_a_difference_is_said_when_it_comes_and_when_it_goes(site: Site) -> None:
    """After a `reload` of the machine whose inventory is watched, once, in the log and on the overview; the other one
    takes its own over neither then nor while the first is stopped, which a restart is, too."""
    one, two = (f"  - {{name: {name}, platform: simulated, mean_healthy: 1e6}}\n" for name in ("one", "two"))
    path = site.write("a", one)
    prepared_database(path.parent)
    with contextlib.ExitStack() as stack:
        with Service(path, deadline=60):
            other = stack.enter_context(Service(site.write("b", one), deadline=60))
            client = Client(*other.console).log_in()
            said = "that of a is watched, and the one here differs from it"
            assert said not in other.output and "differs" not in str(client.ask("GET", "/-/").body)
            site.write("a", one + two)
            assert run(path, "reload").returncode == 0
            other.wait_line(said)
            wait_for(lambda: "the one here differs" in str(client.ask("GET", "/-/").body))
        refused = run(other.inventory, "reload")
        assert (refused.returncode, refused.stderr) == (2, WATCHED)
        os.kill(other.pid, signal.SIGHUP)
        other.wait_line("the inventory was not taken over: the inventory of a is watched")
        assert site.execute("SELECT name FROM resource ORDER BY name") == [("one",), ("two",)]
        with Service(path, deadline=60):
            site.write("b", one + two)
            assert run(other.inventory, "reload").returncode == 2
            other.wait_line("the one here differs no more from that of a")
            wait_for(lambda: "the one here differs" not in str(client.ask("GET", "/-/").body))
            assert other.output.count(said) == 1
        assert run(other.inventory, "reload").returncode == 0, "it says the same, and the first one is gone"


NAMED = "import socket\nfrom pathlib import Path\nsocket.gethostname = lambda: Path({file!r}).read_text()\n"
ONE, TWO, THREE = (f"  - {{name: {name}, platform: simulated}}\n" for name in ("one", "two", "three"))


def replace_in(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text("utf-8").replace(old, new), encoding="utf-8")


@pytest.mark.long
def test_a_container_that_is_recreated_takes_its_inventory_over(site: Site) -> None:
    """Under another name each time, with what it adds and changes; what it takes away has to be said twice, and until
    then `check` and `status` say that nobody watches it."""
    path, watched = site.write("a", ONE), "SELECT name FROM resource WHERE origin = 'inventory' ORDER BY name"
    prepared_database(path.parent)
    with Service(path, deadline=60):
        pass
    replace_in(path, "machine: a", "machine: f3a91c0b7d11")
    replace_in(path, ONE, ONE + TWO)
    said = run(path, "check")
    assert said.returncode == 0 and "a start would make: 1 added" in said.stdout, said
    with Service(path, deadline=60) as service:
        assert "inventory: 1 added" in service.output and site.execute(watched) == [("one",), ("two",)]
    assert site.execute("SELECT last_value FROM resource_id_seq") == [(2,)], "it was imported once"
    replace_in(path, "machine: f3a91c0b7d11", "machine: a")     # it was here before: its texts may be older
    replace_in(path, ONE, ONE.replace("one", "zero") + ONE)
    said = run(path, "check")
    assert said.returncode == 1 and "not take it over: the inventory of f3a91c0b7d11 is watched" in said.stdout, said
    with Service(path, deadline=60) as service:
        assert "that of f3a91c0b7d11 is watched" in service.output
        assert site.execute(watched) == [("one",), ("two",)]
    replace_in(path, ONE.replace("one", "zero"), "")
    replace_in(path, "machine: a", "machine: 7c22de9a0042")
    replace_in(path, ONE, THREE)
    said = run(path, "check")
    assert said.returncode == 1 and "not take it over: the inventory of f3a91c0b7d11 is watched" in said.stdout, said
    with Service(path, deadline=60) as service:
        assert "not taken over: inventory.yaml: 1 resources are not in it any more (one)" in service.output
        assert site.execute(watched) == [("one",), ("two",)]
        wait_for(lambda: run(path, "status").returncode == 1, 60)
        assert "inventory degraded (another machine's is watched, which does not run" in run(path, "status").stdout
        assert run(path, "--accept-removals", "reload").returncode == 0
        assert site.execute(watched) == [("three",), ("two",)]
        wait_for(lambda: run(path, "status").returncode == 0, 60)


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="no SIGHUP")
def test_a_machine_that_is_renamed_while_it_serves(site: Site) -> None:
    """It goes on under its name; what asks under the new one does not say that its gate is closed."""
    path = site.write("a", ONE)
    prepared_database(path.parent)
    replace_in(path, "  machine: a\n", "")
    name, environ = path.with_name("name"), {"PYTHONPATH": str(path.parent)}
    path.with_name("sitecustomize.py").write_text(NAMED.format(file=str(name)), encoding="utf-8")

    def ask(*words: str) -> str:
        done = subprocess.run(command(path, *words), env=environment(environ), capture_output=True, timeout=120,
                              encoding="utf-8", check=False)  # fmt: skip
        return done.stdout + done.stderr

    name.write_text("localhost", encoding="utf-8")
    with Separate(path, env=environ) as service:
        name.write_text("web1", encoding="utf-8")
        for asked in ("status", "gate"):
            assert "cut off from there, unless the host had another name when it began" in ask(asked)
        replace_in(path, ONE, ONE + TWO)
        assert "not take it over: the inventory of localhost is watched" in ask("check")
        os.kill(service.pid, signal.SIGHUP)
        service.wait_line("inventory: 1 added")


@pytest.mark.long
def test_inventories_that_differ(site: Site) -> None:
    """The first one's is watched; the other says so, undoes nothing, and takes over when the first is gone."""
    site.begin("a")
    wait_for(lambda: len(site.pollers()) == len(NAMES), 60)
    path = site.write("b", f"  - {{name: other, platform: simulated, {OFTEN}}}\n")
    with Service(path, deadline=60) as other:
        assert "that of a is watched, and the one here differs from it" in other.output
        assert other.get("/").status in (200, 503) and len(site.execute("SELECT * FROM resource")) == len(NAMES)
        refused = run(path, "reload")
        assert (refused.returncode, refused.stderr) == (2, WATCHED)
    site.machines["a"].kill()
    with Service(path, deadline=60):
        wait_for(lambda: run(path, "--accept-removals", "reload").returncode == 0, 60)
        wait_for(lambda: {*site.pollers()} - {*NAMES} == {"other"}, 60)
        assert site.execute("SELECT count(*) FROM resource WHERE origin = 'inventory'") == [(1,)]


@pytest.mark.long
def test_one_that_follows(site: Site) -> None:
    """It takes no inventory over, neither before another machine has nor after that is gone."""
    path = site.write("b", service="  inventory: follow\n")
    refused = run(path)
    assert refused.returncode == 4 and "first start one with `inventory: own`" in refused.stderr
    site.begin("a")
    with Service(path, deadline=60) as follower:
        wait_for(lambda: site.shared_by("a", "b") and follower.get("/").status == 200, 60)
        site.machines["a"].kill()
        wait_for(lambda: site.shared_by("b"), 60)
        refused = run(path, "reload")
        assert (refused.returncode, refused.stderr) == (2, "the inventory of a is watched; `reload` there\n")
    with Service(path, deadline=60) as follower:
        follower.wait_status("/", 200)


def test_secrets_of_a_machine_s_own(site: Site) -> None:
    """Each has the heartbeat and the status token of its own inventory, whosever is watched."""
    def path(name: str, token: str = "") -> Path:
        own = f"  status_token: {token or name * 16}\n  heartbeat: http://127.0.0.1:9/{name}\n"
        return site.write(name, "  - {name: one, platform: simulated}\n", own)

    def statuses(machine: Service, *tokens: str) -> list[int]:
        client = Client(*machine.console)
        return [client.ask("GET", "/-/status", None, {"Authorization": f"Bearer {token}"}).status for token in tokens]

    prepared_database(path("a").parent)
    names = "SELECT name FROM receiver ORDER BY name"
    with Service(path("a"), deadline=60) as first, Service(path("b"), deadline=60) as second:
        assert statuses(first, "a" * 16, "b" * 16) == [200, 401] and statuses(second, "a" * 16, "b" * 16) == [401, 200]
        assert site.execute(names) == [("/-/status/a",), ("/-/status/b",), ("/a",), ("/b",)]
        assert run(path("a", "c" * 16), "reload").returncode == 0
        assert statuses(first, "a" * 16, "c" * 16) == [401, 200] and statuses(second, "b" * 16) == [200]
        assert site.execute(names) == [("/-/status/a",), ("/-/status/b",), ("/a",), ("/b",)]


@pytest.mark.long
def test_another_key_is_refused(site: Site) -> None:
    site.begin("a")
    path = site.write("b")
    for file in (path.parent / "keys").iterdir():
        file.unlink()
    refused = run(path)
    assert refused.returncode == 3 and "private.pem is key none, and that of the other machines is" in refused.stderr
    assert not [*(path.parent / "keys").iterdir()]
    vault = Vault(path.parent / "keys")
    vault.create()
    vault.publish()
    refused, known = run(path), Vault(site.folder / "a" / "keys").key_id
    assert refused.returncode == 3 and known != vault.key_id
    assert f"private.pem is key {vault.key_id}, and that of the other machines is {known}: copy" in refused.stderr


@pytest.mark.long
def test_an_upgrade_waits_for_the_others(site: Site) -> None:
    """A version with another schema changes nothing under those that live: it names them, and they go on until they are
    stopped. Then it brings the database to its own, on which the others begin again."""
    site.begin("a")
    site.execute("UPDATE setting SET value = value - 1 WHERE name = 'schema'")
    before = site.execute("SELECT * FROM setting WHERE name = 'schema'")
    refused = run(site.write("b"))
    assert refused.returncode == 4 and refused.stderr.endswith(
        "\nan earlier version uses this database on a, and this one changes it: "
        "stop that first, start this one, then update it\n")  # fmt: skip
    assert site.execute("SELECT * FROM setting WHERE name = 'schema'") == before
    serial = site.serial()
    open_until(site, "a", lambda: site.serial() > serial)
    site.machines["a"].stop()
    site.begin("b")
    assert site.execute("SELECT value FROM setting WHERE name = 'schema'") == [(SCHEMA,)]
    site.begin("a")
    wait_for(lambda: site.shared_by("a", "b"), 60)


def test_a_name_is_taken(site: Site) -> None:
    site.begin("a")
    refused = run(site.folder / "a" / "inventory.yaml")
    assert refused.returncode == 4 and "another HealthChecker (a) is using database" in refused.stderr
    server = PostgresServer(site.url, SecretStr(PASSWORD))
    with pytest.raises(Exception, match="another HealthChecker"):
        server.lock()
