"""Three machines, a PostgreSQL and 60 resources on a real sshd: each gate is asked 20 times a second while one machine
is killed, sleeps, or is cut from the database, the resources or both, each way, and while all lose the database, for a
minute or to its standby. A gate may never be closed while everything is well, nor open later than BOUND after something
is not."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console import prepared_database
from postgres import URL_FILE, Postgres, Program, database_in, execute, missing_postgres, open_pgbouncer, open_postgres
from service import Program as Machine
from service import prepared_keys, write_inventory
from sshd import Sshd, wait_for

from healthchecker import LIVING, owner_of

# Every 5 s: hosts and machines have the same processors here, and at 2 s the hosts' own shells, three times as many
# while each machine polls all, want 3 of them (measured while the work is shared: 1.1, of which 0.2 are ours).
COUNT, INTERVAL, MACHINES = 60, 5, "abc"
BOUND = 2 * INTERVAL + 10.0  # seconds, as promised where a machine is replaced
HOLD = 90  # seconds
NOBODY = "02:00:00:00:00:01"  # no interface has this address: what is sent there is lost, and nobody is told
ROW = """  - {{name: host{number}, hostname: {address}, port: {port}, username: {username}, key_file: {key},
     platform: linux, interval: {interval}, retry_interval: 1, timeout: 10, rise: 1,
     checks: [{{name: up, command: "test -e {folder}/up{number}"}}]}}
"""


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=30)


class Cable:
    """To a network namespace, with addresses of those for tests between networks (RFC 2544) that no other process has;
    packets to and from the database, and to and from the resources, may be lost on it."""

    def __init__(self) -> None:
        self.name, self._here, self._there = (f"hc{os.getpid()}{end}" for end in ("", "a", "b"))
        base = ipaddress.ip_address("198.18.0.0") + os.getpid() % 8192 * 16
        self._own, self.database, self.hosts, self.machine, *own = (str(base + number) for number in range(1, 7))
        self._ways = {"database": (self.database, own[0]), "hosts": (self.hosts, own[1])}
        self._lost: list[tuple[object, ...]] = []

    def __enter__(self) -> Cable:
        try:
            ip("netns", "add", self.name)
            ip("link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self.name)
        except (OSError, subprocess.SubprocessError):
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
            pytest.skip("ip cannot make a network namespace: that needs root, and ip")
        for address in (self._own, self.database, self.hosts):    # the first is that of who asks the gate there
            ip("addr", "add", f"{address}/28", "dev", self._here)
        ip("link", "set", self._here, "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        for address in (self.machine, *(own for _, own in self._ways.values())):
            ip("-n", self.name, "addr", "add", f"{address}/28", "dev", self._there)
        ip("-n", self.name, "link", "set", self._there, "up")
        for address, own in self._ways.values():
            ip("-n", self.name, "route", "add", f"{address}/32", "dev", self._there, "src", own)
        return self

    def __exit__(self, *_: object) -> None:
        ip("netns", "del", self.name)

    def lose(self, what: str, way: str) -> None:
        """From now on what is sent there, or comes back from there."""
        there, own = self._ways[what]
        place = ["-n", self.name, "neigh"] if way == "there" else ["neigh"]
        who = [there, "dev", self._there] if way == "there" else [own, "dev", self._here]
        ip(*place, "replace", *who, "lladdr", NOBODY, "nud", "permanent")
        self._lost.append((*place, "del", *who))

    def mend(self) -> None:
        while self._lost:
            ip(*self._lost.pop())


class Gate(threading.Thread):
    """What a machine's gate answers, 20 times a second: monotonic time of the question, and status."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(daemon=True)
        self._machine, self._ending, self.answers = machine, threading.Event(), list[tuple[float, int]]()
        self.start()

    def run(self) -> None:
        while not self._ending.wait(0.05):
            asked_mono = time.monotonic()
            with contextlib.suppress(OSError):
                self.answers.append((asked_mono, self._machine.get("/").status))

    def close(self) -> None:
        self._ending.set()
        self.join(60)

    def last(self) -> int:
        return self.answers[-1][1] if self.answers else 0


class House:
    """The machines, what they watch, and what is wrong with their answers."""

    def __init__(self, folder: Path, postgres: Postgres, pooler: Program, server: Sshd, cable: Cable) -> None:
        self.folder, self.cable, self.wrong, self.gates = folder, cable, list[str](), dict[str, Gate]()
        name = postgres.database()
        pooled = postgres.url(name, pooler.port).replace("127.0.0.1", cable.database)
        self._urls = {"a": postgres.url(name), "b": pooled, "c": postgres.url(name)}
        self._uplink = f"  uplink: ['{cable.hosts}:{server.port}']\n  hold: {HOLD}\n"
        self.machines: dict[str, Machine] = {}
        self._stack = contextlib.ExitStack()
        for number in range(COUNT):
            (folder / f"up{number}").touch()
        self._rows = "".join(ROW.format(number=number, address=server.address, port=server.port, interval=INTERVAL,
                                        username=server.username, key=server.user_key(), folder=folder)
                             for number in range(COUNT))  # fmt: skip
        self._known = server.known_hosts()
        self._wrong_from = time.monotonic()

    def begin(self, name: str) -> None:
        own = self.folder / name
        own.mkdir(exist_ok=True)
        (own / URL_FILE).write_text(self._urls[name], encoding="utf-8")
        (own / "known_hosts").write_text(self._known, encoding="ascii")
        prepared_keys(own)
        if not self.machines:
            prepared_database(own)
        is_elsewhere = name == "b"
        path = write_inventory(own, self._rows, f"  machine: {name}\n  workers: 1\n  known_hosts: known_hosts\n"
                               f"  listen: {self.cable.machine if is_elsewhere else '127.0.0.1'}:0\n{self._uplink}")
        machine = Machine(path, deadline=120, as_module=True)
        machine.command[:0] = ["ip", "netns", "exec", self.cable.name] if is_elsewhere else []
        self.machines[name] = self._stack.enter_context(machine)
        self.gates[name] = Gate(self.machines[name])

    def execute(self, statement: str) -> list[Any]:
        return execute(database_in(self.folder / "a"), statement)

    def found(self) -> dict[str, tuple[str, float]]:
        """By which machine a resource was polled last, and when."""
        rows = self.execute("SELECT name, machine, found_at FROM result JOIN resource ON resource.id = resource_id")
        return {name: (machine, at) for name, machine, at in rows}

    def is_shared_by(self, names: str) -> bool:
        able, found = {name for name, _, _, able in self.execute(LIVING) if able}, self.found()
        return able == {*names} and len(found) == COUNT and all(
            machine == owner_of(name, frozenset(names)) for name, (machine, _) in found.items())

    def wait(self, what: str, condition: Any, seconds: float) -> float:
        """Seconds until it is so; longer than that is wrong."""
        begun = time.monotonic()
        with contextlib.suppress(AssertionError):
            wait_for(condition, seconds)
            return time.monotonic() - begun
        self.wrong.append(f"{what}: not within {seconds:g} s")
        return seconds

    def judge(self, what: str, names: str, status: int, begun: float, ended: float) -> None:
        """Nothing else may have been answered to what was asked then."""
        for name in names:
            found = [at - begun for at, found in self.gates[name].answers if begun <= at <= ended and found != status]
            if found:
                self.wrong.append(f"{what}: {len(found)} wrong answers of {name}, {found[0]:.1f} to {found[-1]:.1f} s")

    @contextlib.contextmanager
    def open(self, what: str, names: str = MACHINES) -> Iterator[None]:
        """Meanwhile all is well, and nothing else is said."""
        begun = time.monotonic()
        yield
        self.judge(what, names, 200, begun, time.monotonic())
        print(f"machines: {what}: {time.monotonic() - begun:.0f} s", flush=True)

    def fault(self, what: str, names: str, number: int) -> None:
        """One resource fails, and is well again."""
        (self.folder / f"up{number}").unlink()
        took = self.wait(f"{what}: closed", lambda: all(self.gates[name].last() == 503 for name in names), BOUND)
        begun = time.monotonic()
        threading.Event().wait(2 * INTERVAL)
        self.judge(f"{what}: closed", names, 503, begun, time.monotonic())
        (self.folder / f"up{number}").touch()
        again = self.wait(f"{what}: open", lambda: all(self.gates[name].last() == 200 for name in names), BOUND)
        print(f"machines: {what}: closed after {took:.1f} s, open after {again:.1f} s", flush=True)

    def close(self) -> None:
        for gate in self.gates.values():
            gate.close()
        with contextlib.suppress(AssertionError):
            self._stack.close()


def owned(name: str) -> int:
    """The number of a resource that is a machine's."""
    return next(number for number in range(COUNT) if owner_of(f"host{number}", frozenset(MACHINES)) == name)


def killed(house: House) -> None:
    gate = house.gates["b"]
    with house.open("b is killed", "ac"):
        gate.close()
        [(at,)] = house.execute("SELECT extract(epoch FROM clock_timestamp())")
        house.machines["b"].kill()
        took = house.wait("what was of b is polled", lambda: all(
            machine != "b" and found > float(at) for machine, found in house.found().values()), BOUND)
        print(f"machines: all of b is polled by others after {took:.1f} s", flush=True)
    house.fault("a resource of b", "ac", owned("b"))
    with house.open("b is back", "ac"):
        house.begin("b")
        house.wait("b has its own again", lambda: house.is_shared_by(MACHINES), 60)
        house.wait("b is open", lambda: house.gates["b"].last() == 200, 60)


def asleep(house: House) -> None:
    number, process = owned("b"), house.machines["b"].pid
    with house.open("b sleeps", "ac"):
        os.kill(process, signal.SIGSTOP)
        house.wait("shared by two", lambda: house.is_shared_by("ac"), BOUND)
        threading.Event().wait(30)
    (house.folder / f"up{number}").unlink()
    house.wait("closed while b sleeps", lambda: all(house.gates[name].last() == 503 for name in "ac"), BOUND)
    begun = time.monotonic()
    os.kill(process, signal.SIGCONT)
    house.wait("shared by three again", lambda: house.is_shared_by(MACHINES), 60)
    house.judge("b wakes while a resource fails", MACHINES, 503, begun, time.monotonic())
    (house.folder / f"up{number}").touch()
    house.wait("open again", lambda: all(gate.last() == 200 for gate in house.gates.values()), BOUND)


def cut_off(house: House, what: str, way: str) -> None:
    """b loses what it sends to the database, the hosts, or both, or what comes back, and is right for all that as long
    as it has one of them; without both it goes on for as long as it is allowed to."""
    cable, both = house.cable, what == "both"
    name, seen = f"b is cut from {what}, the way {way}", "ac" if both else MACHINES
    with house.open(name, seen):
        for each in ("database", "hosts") if both else (what,):
            cable.lose(each, way)
        begun = time.monotonic()
        house.wait(f"{name}: the others have its share", lambda: house.is_shared_by("ac"), 60)
        print(f"machines: {name}: the others have its share after {time.monotonic() - begun:.1f} s", flush=True)
        threading.Event().wait(20)
    house.fault(f"a resource of b, {name}", seen, owned("b"))
    if both:
        house.wait(f"{name}: it is closed", lambda: house.gates["b"].last() == 503, HOLD + 60)
    with house.open(f"mended: {name}", seen):
        cable.mend()
        house.wait("shared after that", lambda: house.is_shared_by(MACHINES), 120)
        house.wait("b is open", lambda: house.gates["b"].last() == 200, 60)
    house.fault("a resource after that", MACHINES, owned("b"))


def without_database(house: House, which: str, server: Postgres | Program, names: str) -> None:
    """`names` lose it for a minute."""
    with house.open(f"{which} has ended"):
        server.end()
        threading.Event().wait(60)
    for name in MACHINES:
        house.fault(f"a resource of {name}, {which} has ended", MACHINES, owned(name))
    with house.open(f"{which} is back"):
        server.begin()
        house.wait(f"{which} is back, shared", lambda: house.is_shared_by(MACHINES), 120)
    house.fault(f"a resource after that, seen by {names}", MACHINES, owned(names[0]))


def failed_over(house: House, server: Postgres) -> None:
    """The database is lost, and half a minute later its standby has its address: so long Patroni takes."""
    with server.standby() as standby:
        with house.open("a standby takes over"):
            server.end(signal.SIGQUIT)
            standby.end()
            (server.folder / "standby" / "standby.signal").unlink()
            threading.Event().wait(30)
            standby.port = server.port
            standby.begin()
            wait_for(server._is_ready)
            house.wait("the standby has taken over, shared", lambda: house.is_shared_by(MACHINES), 120)
        for name in MACHINES:
            house.fault(f"a resource of {name}, by the standby", MACHINES, owned(name))


def silent(house: House, server: Postgres) -> None:
    with house.open("the database is silent"), server.silent():
        threading.Event().wait(30)
    house.wait("shared after the silence", lambda: house.is_shared_by(MACHINES), 120)
    house.fault("a resource after the silence", MACHINES, owned("c"))


def soak() -> list[str]:
    """What was wrong."""
    if why := missing_postgres():
        pytest.skip(why)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        cable, postgres = stack.enter_context(Cable()), stack.enter_context(open_postgres())
        sshd = stack.enter_context(Sshd(address=cable.hosts))
        pooler = stack.enter_context(open_pgbouncer(postgres, cable.database))
        house = stack.enter_context(contextlib.closing(House(folder, postgres, pooler, sshd, cable)))
        for name in MACHINES:
            house.begin(name)
        wait_for(lambda: house.is_shared_by(MACHINES) and all(gate.last() == 200 for gate in house.gates.values()), 120)
        with house.open("all is well"):
            threading.Event().wait(20)
        house.fault("a resource", MACHINES, owned("a"))
        killed(house)
        asleep(house)
        for what in ("database", "hosts", "both"):
            for way in ("there", "back"):
                cut_off(house, what, way)
        without_database(house, "the pooler of b", pooler, "b")
        without_database(house, "the database", postgres, "abc")
        silent(house, postgres)
        failed_over(house, postgres)
    return house.wrong
