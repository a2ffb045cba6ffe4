"""The promised figures, measured: `python tests/bench.py [--short] [--strict] [--write README.md] [PART ...]`.

Prints one Markdown table, always; ends with 1 when an answer was wrong or none came, not for a missed figure. What is
compared is measured in turn (A B A B ...); a figure is the median of the rounds, the lowest and the highest follow in
brackets. Machines are noisy, ratios within one run are less so.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import os
import platform
import random
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_history
import bench_sharing
from pwsh import CONSTRAINED, EngineShell, open_engine
from pwsh import FULL as FULL_LANGUAGE
from service import Program, run, write_inventory  # it imports healthchecker
from sshd import SSHD, Sshd
from wsman_server import WSManServer

import healthchecker as hc

WRK, HEY = shutil.which("wrk"), shutil.which("hey")
PLUGIN = Path("/usr/lib/nagios/plugins/check_by_ssh")  # where Debian's monitoring-plugins-basic has it
START, END = "<!-- bench -->", "<!-- /bench -->"
REPORTED = 10_000  # resources of the aggregator's figures
WATCHED = 1000  # simulated resources of the load figures
HOSTS, HOSTS_INTERVAL = 200, 30  # Windows hosts of the load figure; seconds over which their polls are spread
WARMING = 3  # polls before those that count: a shell compiles what it runs
SLEEP = 0.01  # seconds that an answer of /slow takes
# The one-line application, with another line for a page that blocks.
LARGE = 50 << 20  # bytes of an answer that slow clients take
APP = f"""import time
from flask import Flask
app = Flask(__name__)
app.add_url_rule("/", view_func=lambda: "Hello")
app.add_url_rule("/slow", "slow", view_func=lambda: time.sleep({SLEEP}) or "Hello")
def bare(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"Hello"]
def large(environ, start_response):
    if environ["PATH_INFO"] == "/":
        return bare(environ, start_response)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str({LARGE}))])
    return [bytes({LARGE})] if environ["PATH_INFO"] == "/body" else (bytes(1 << 16) for _ in range({LARGE} >> 16))
"""
# A Windows host as far as a poll can tell, for as long as its standard input is open.
WINDOWS_HOST = """import sys
from wsman_server import WSManServer
with open("recorded/windows/administrator.json", encoding="utf-8") as recorded:
    answer = recorded.read()
with WSManServer("http", "ntlm", answer=answer, shell_limit=1000) as server:
    print(server.port, flush=True)
    for _ in sys.stdin:
        print(server.polls, flush=True)
"""
SETTINGS = "  workers: 1\n  threads: 0\n  app: 'oneline:app'\n  known_hosts: known_hosts"
# Healthy at every poll, for an outage of a millisecond is hardly ever met: what is measured is the watching.
SIMULATED = "  - {{name: r{}, platform: simulated, interval: 10, mean_healthy: 1e6, mean_unhealthy: 0.001}}\n"
Rounds = dict[str, list[float]]  # name -> what was measured in each round


@dataclass(frozen=True)
class Plan:
    """How much to measure: rounds, those of what takes milliseconds, whole seconds of one load and of the look at the
    CPU, polls in a row."""

    rounds: int
    quick: int
    load: int
    watch: int
    polls: int


FULL = Plan(rounds=9, quick=25, load=2, watch=30, polls=20)
SHORT = Plan(rounds=1, quick=5, load=1, watch=5, polls=4)


@dataclass(frozen=True)
class Row:
    """A figure of the table; `good` is None where nothing is promised or nothing could be measured."""

    figure: str
    measured: str
    wanted: str = ""
    good: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "ok", False: "MISSED", None: ""}[self.good]
        return f"| {self.figure} | {self.measured} | {self.wanted} | {verdict} |"


def shown(values: list[float], digits: int = 0) -> str:
    """The median, and the range of the rounds."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def at_most(figure: str, values: list[float], limit: float, unit: str, digits: int = 0) -> Row:
    """A row whose median may be `limit`, not more."""
    return Row(figure, f"{shown(values, digits)} {unit}", f"≤ {limit:g} {unit}", median(values) <= limit)


def all_at_most(figure: str, measured: Sequence[list[float]], limit: float, unit: str, digits: int = 0) -> Row:
    """A row of several figures, each of which may be `limit`, not more."""
    text = " / ".join(shown(values, digits) for values in measured)
    return Row(figure, f"{text} {unit}", f"≤ {limit:g} {unit}", all(median(values) <= limit for values in measured))


def in_turn(rounds: int, measures: Mapping[str, Callable[[], float]]) -> Rounds:
    """Each measure once per round, one after the other; a first round, with cold caches, is thrown away."""
    found = [{name: measure() for name, measure in measures.items()} for _ in range(rounds + 1)][1:]
    return {name: [values[name] for values in found] for name in measures}


# === Calls ===================================================================


def each(call: Callable[[], object], unit: float, number: int = 20_000) -> float:
    """How many `unit`s of a second a call takes."""
    return timeit.timeit(call, number=number) / number / unit


def aggregator_rows(plan: Plan) -> Iterator[Row]:
    """What asking and reporting cost."""
    small, large, names = hc.HealthAggregator(), hc.HealthAggregator(), [f"r{i}" for i in range(REPORTED)]
    small.SetResource("r", True)

    def report(healthy: bool) -> float:
        # All of them in random order, so that the clearing up of outdated entries is part of it.
        random.shuffle(names)
        begin = time.perf_counter()
        for name in names:
            large.SetResource(name, healthy, "measured")
        return (time.perf_counter() - begin) / REPORTED * 1e6

    up, down = partial(report, True), partial(report, False)
    told = in_turn(min(7, plan.quick), {"again": up, "down": down, "up": up})
    one, many = partial(each, small.IsHealthy, 1e-9), partial(each, large.IsHealthy, 1e-9)
    asked = in_turn(plan.quick, {"one": one, "many": many})
    if not (small.IsHealthy() and large.IsHealthy()):
        raise RuntimeError("the aggregators are not healthy")
    yield all_at_most(f"`IsHealthy()`, 1 / {REPORTED:,} resources", (asked["one"], asked["many"]), 200, "ns")
    batches = told["again"], told["down"], told["up"]
    figure = f"`SetResource()`, {REPORTED:,} resources, renewals / to unhealthy / to healthy"
    yield all_at_most(figure, batches, 20, "μs", 1)


def beyond(rounds: Rounds, more: str, less: str) -> list[float]:
    """What one measure has more than another, round by round."""
    return [one - other for one, other in zip(rounds[more], rounds[less], strict=True)]


def gate_rows(plan: Plan) -> Iterator[Row]:
    """What the gate adds to a request that it lets through."""

    def app(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    def start_response(status: str, headers: list[tuple[str, str]]) -> None:
        if status != "200 OK":
            raise RuntimeError(status)

    lease, environ = hc.Lease(), {"PATH_INFO": "/", "REQUEST_METHOD": "GET", "HTTP_ACCEPT": "*/*"}
    lease.until.value = float("inf")
    gate: Any = hc.Gate(app, lease)
    measures = {"gate": lambda: each(lambda: gate(environ, start_response), 1e-6)}
    measures["app"] = lambda: each(lambda: app(environ, start_response), 1e-6)
    rounds = in_turn(plan.quick, measures)
    yield at_most("The gate adds to a request", beyond(rounds, "gate", "app"), 3, "μs", 2)
    routes = [f"/part{number}/below" for number in range(100)]
    many = hc.Gate(app, hc.Lease(routes))
    look_up = {name: partial(each, partial(one.route, "/part50/below/page"), 1e-6)
               for name, one in (("none", gate), ("many", many))}  # fmt: skip
    found = in_turn(plan.quick, look_up)
    yield at_most("... and with 100 routes", beyond(found, "many", "none"), 1, "μs", 2)


def driven(app: Any, scope: dict[str, Any]) -> Callable[[], None]:
    """A call of an ASGI application that waits for nothing."""

    def call() -> None:
        with contextlib.suppress(StopIteration):
            app(scope, None, None).send(None)
            raise RuntimeError("it waits")

    return call


def middleware_rows(plan: Plan) -> Iterator[Row]:
    """What the printed gate adds to a request in another server."""

    def app(environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        return [b"ok"]

    async def asgi_app(*_: object) -> None:
        pass

    environ, scope = {"PATH_INFO": "/part50/x", "SCRIPT_NAME": ""}, {"type": "http", "path": "/part50/x"}
    calls: dict[str, Callable[[], object]] = {"WSGI": lambda: app(environ, print), "ASGI": driven(asgi_app, scope)}
    with tempfile.TemporaryDirectory() as folder:
        for count in (0, 100):
            path = Path(folder) / f"lease{count}"
            names, module = [f"/part{number}" for number in range(count)], dict[str, Any]()
            exec(hc.middleware_text(path), module)
            file = hc.LeaseFile(path, names)
            for name in ("", *names):
                file.put(name, hc.lease_clock() + 1e6, 0.0)
            calls[f"WSGI{count}"] = partial(module["Gate"](app), environ, print)
            calls[f"ASGI{count}"] = driven(module["AsgiGate"](asgi_app), scope)
        rounds = in_turn(plan.quick, {name: partial(each, call, 1e-6) for name, call in calls.items()})
    for kind, limit in (("WSGI", 1), ("ASGI", 3)):
        yield at_most(f"The printed gate adds to a request, {kind}", beyond(rounds, f"{kind}0", kind), limit, "μs", 2)
        yield at_most("... and with 100 routes", beyond(rounds, f"{kind}100", f"{kind}0"), 1, "μs", 2)


# === Requests ================================================================


@contextlib.contextmanager
def gated(resources: str, status: int, settings: str = SETTINGS, deadline: float = 90, *,
          steady: bool = False) -> Iterator[Program]:
    """The service in front of the one-line application, once it answers with `status`; `steady`: each poll is due
    exactly an interval after the one before, which chance spreads else."""
    with tempfile.TemporaryDirectory() as name:
        folder, program = Path(name), Path(hc.__file__)
        (folder / "oneline.py").write_text(APP, encoding="utf-8")
        env = {"PYTHONPATH": str(program.parent)}
        if steady:
            program = folder / "steady.py"
            program.write_text(STEADY, encoding="utf-8")
        inventory = write_inventory(folder, resources, settings)
        with Program(inventory, env=env, deadline=deadline, program=program, as_module=True) as service:
            service.wait_status("/", status)
            yield service


def url(service: Program) -> str:
    return f"http://{service.host}:{service.port}/"


def start_rows(plan: Plan) -> Iterator[Row]:
    """From the command to the first answer of the application, and back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "oneline.py").write_text(APP, encoding="utf-8")
        path = write_inventory(folder, SIMULATED.format(0), SETTINGS)
        starts, stops = [], []
        for _ in range(plan.rounds + 1):
            begin = time.monotonic()
            with Program(path, deadline=90, as_module=True) as service:
                service.wait_status("/", 200)
                starts.append(time.monotonic() - begin)
                begin = time.monotonic()
                service.stop(60)
                stops.append(time.monotonic() - begin)
    figure = "A start until the application answers: the first in a folder / later"
    yield all_at_most(figure, (starts[:1], starts[1:]), 5, "s", 2)
    yield at_most("Its end", stops, 5, "s", 2)


def closing_rows(plan: Plan) -> Iterator[Row]:
    """From the moment at which something is wrong to the closed gate, and back."""
    with tempfile.TemporaryDirectory() as name:
        up = Path(name) / "up"
        up.touch()
        often = "interval: 1, timeout: 10, retry_interval: 1, fall: 1, rise: 1"
        check = f"checks: [{{name: up, command: 'test -e {up}'}}]"
        with gated(f"  - {{name: here, platform: local, {often}, {check}}}\n", 200) as service:

            def taken(change: Callable[[], None], status: int) -> float:
                begin = time.monotonic()
                change()
                service.wait_status("/", status, 60)
                return time.monotonic() - begin

            measures = {"closed": partial(taken, up.unlink, 503), "open": partial(taken, up.touch, 200)}
            rounds = in_turn(plan.rounds, measures)
    figure = "A check fails, interval 1 s: until the gate is closed / open again"
    yield all_at_most(figure, list(rounds.values()), 2, "s", 2)


# === Many resources ==========================================================


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def slowest_percent(address: str, seconds: int, clients: int = 4, rate: float = 400) -> float:
    """The 99th percentile in milliseconds at a steady rate, by default far below what is possible."""
    command = [str(HEY), "-z", f"{seconds}s", "-c", str(clients), "-q", str(rate / clients), "-o", "csv", address]
    said = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    answers = list(csv.DictReader(io.StringIO(said)))
    if not answers or any(answer["status-code"] != "200" for answer in answers):
        raise RuntimeError(f"not the expected answers: {said[-300:]}")
    return sorted(float(answer["response-time"]) for answer in answers)[len(answers) * 99 // 100] * 1e3


def slowed_row(figure: str, busy: Program, idle: Program, plan: Plan) -> Row:
    """A row that wants the slowest requests of `busy` to take twice as long as those of `idle` at most."""
    if not HEY:
        return Row(figure, "skipped: hey is not installed")
    measures = {"busy": lambda: slowest_percent(url(busy), 2 * plan.load)}
    measures["idle"] = lambda: slowest_percent(url(idle), 2 * plan.load)
    rounds = in_turn(plan.rounds, measures)
    ratio = median(rounds["busy"]) / median(rounds["idle"])
    measured = f"{ratio:.2f} times ({shown(rounds['busy'], 1)} ms to {shown(rounds['idle'], 1)} ms)"
    return Row(f"{figure} at 400 requests/s", measured, "≤ 2 times", ratio <= 2)


def watching_rows(plan: Plan) -> Iterator[Row]:
    """What watching many resources costs, and what it does to requests."""
    name = f"{WATCHED:,} simulated resources at 10 s"
    many = "".join(SIMULATED.format(number) for number in range(WATCHED))
    with gated(SIMULATED.format(0), 200) as idle, gated(many, 200) as busy:
        started, begin = cpu_seconds(busy.pid), time.monotonic()
        threading.Event().wait(plan.watch)
        share = (cpu_seconds(busy.pid) - started) / (time.monotonic() - begin)
        status = Path(f"/proc/{busy.pid}/status").read_text(encoding="ascii")
        megabytes = int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6
        measured = f"{started:.1f} s / {share:.2f} CPU / {megabytes:.0f} MB"
        figure = f"{name}: CPU time until each was polled / share over {plan.watch} s after that / memory"
        yield Row(figure, measured, "≤ 0.3 CPU / 250 MB", share <= 0.3 and megabytes <= 250)
        yield slowed_row(f"{name} to one: p99", busy, idle, plan)


# === SSH =====================================================================


def pollers(folder: Path, resources: str) -> dict[str, Callable[[], None]]:
    """For each resource of an inventory a function that polls it once, as its poller does."""
    installation, guards = hc.Installation(write_inventory(folder, resources, SETTINGS)), hc.Guards()
    with hc.rehearsal(installation) as (_, _, targets):
        access = installation.access()

    def poller(target: hc.Target) -> Callable[[], None]:
        connection = hc.CONNECTIONS[target.settings.platform](target, guards.of(target), access)

        def poll() -> None:
            verdict, _ = hc.poll_once(target, connection, None)
            if not verdict.healthy:
                raise RuntimeError(verdict.reason)

        return poll

    return {name: poller(target) for name, target in targets.items()}


def client_cpu(action: Callable[[], object], number: int) -> float:
    """Milliseconds of CPU time per action, of this process and of the children that it waits for."""

    def spent() -> float:
        who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
        return sum(sum(resource.getrusage(one)[:2]) for one in who)

    begin = spent()
    for _ in range(number):
        action()
    return (spent() - begin) / number * 1e3


def check_by_ssh(sshd: Sshd, folder: Path, *options: str) -> Callable[[], object]:
    """Debian's plug-in running the command set of a poll, with the same key and the same known host."""
    command = [str(PLUGIN), "-H", sshd.address, "-p", str(sshd.port), "-l", sshd.username, "-E"]
    options += ("IdentitiesOnly=yes", "IdentityAgent=none", f"UserKnownHostsFile={folder / 'known_hosts'}")
    command += [f"-o{option}" for option in options] + ["-F", "/dev/null", "-i", str(sshd.user_key())]
    settings = {"name": "a", "hostname": "a", "username": "u", "platform": "linux"}
    command += ["-C", hc.build_script(hc.ResourceSettings.model_validate(settings), "0" * 16)]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def ssh_rows(plan: Plan) -> Iterator[Row]:
    """The client's share of a poll of a real sshd, a fresh connection each time."""
    if not SSHD:
        yield Row("A poll over SSH", "skipped: sshd is not installed")
        return
    with tempfile.TemporaryDirectory() as name, Sshd() as sshd:
        folder = Path(name)
        (folder / "known_hosts").write_text(sshd.known_hosts(), encoding="ascii")
        host = f"hostname: {sshd.address}, port: {sshd.port}, platform: linux, username: {sshd.username}"
        host += f", key_file: {sshd.user_key()}, timeout: 30"
        slow = f"  - {{name: slow, {host}, checks: [{{name: wait, command: sleep 1}}]}}"
        polls = pollers(folder, f"  - {{name: plain, {host}}}\n{slow}")
        measures = {"plain": lambda: client_cpu(polls["plain"], plan.polls)}
        measures["slow"] = lambda: client_cpu(polls["slow"], max(2, plan.polls // 5))
        if PLUGIN.exists():
            shipped = check_by_ssh(sshd, folder)
            alike = check_by_ssh(sshd, folder, "KexAlgorithms=curve25519-sha256")
            measures["`check_by_ssh`"] = lambda: client_cpu(shipped, plan.polls)
            measures["`check_by_ssh` with the key exchange X25519"] = lambda: client_cpu(alike, plan.polls)
        rounds = in_turn(plan.rounds, measures)
    ours = rounds.pop("plain")
    yield at_most("A poll over SSH: CPU of the client", ours, 8, "ms", 1)
    yield at_most("... with a command that takes 1 s", rounds.pop("slow"), 8, "ms", 1)
    for plugin, values in rounds.items():
        ratio = f"{median(values) / median(ours):.2f} times ({shown(values, 1)} ms)"
        yield Row(f"{plugin}, the same commands, to our poll: CPU", ratio)
    if not rounds:
        yield Row("check_by_ssh to our poll", "skipped: monitoring-plugins-basic is not installed")


def times(action: Callable[[], object], number: int) -> tuple[float, float]:
    """Milliseconds of this process's CPU time, and of time, per action."""
    begin, cpu = time.perf_counter(), client_cpu(action, number)
    return cpu, (time.perf_counter() - begin) / number * 1e3


def kept_rows(plan: Plan) -> Iterator[Row]:
    """What a connection that stays open saves, side by side with a new one for each poll."""
    if not SSHD:
        yield Row("A poll over SSH, kept to fresh", "skipped: sshd is not installed")
        return
    with tempfile.TemporaryDirectory() as name, Sshd() as sshd, contextlib.ExitStack() as stack:
        found = {}
        for keeps in (False, True):
            settings = hc.ResourceSettings.model_validate({
                "name": "host", "hostname": sshd.address, "port": sshd.port, "platform": "linux", "timeout": 30,
                "username": sshd.username, "key_file": sshd.user_key()})
            watched = hc.Target(1, settings, f"ssh-ed25519 {sshd.fingerprint()}", "", "")
            access = hc.ConnectionContext(hc.KnownHosts(Path(name) / "none"), hc.Resolver(), keeps=keeps)
            plain = hc.SshConnection(watched, access.guard_of(watched), access)
            quick = hc.SshConnection(replace(watched, settings=settings.model_copy(update={"endpoint": True})),
                                     access.guard_of(watched), access)
            stack.enter_context(contextlib.closing(plain)), stack.enter_context(contextlib.closing(quick))

            def poll(watched: hc.Target = watched, connection: hc.Connection = plain) -> None:
                verdict, _ = hc.poll_once(watched, connection, None)
                if not verdict.healthy:
                    raise RuntimeError(verdict.reason)

            def ask(connection: hc.Connection = quick) -> None:
                if not connection.run("echo 0123456789", hc.Output("0123456789"), hc.Deadline(30)):
                    raise RuntimeError("no answer")

            found[keeps] = poll, ask
        pairs = {(keeps, number): partial(times, found[keeps][number], plan.polls)
                 for number in (0, 1) for keeps in (False, True)}
        rounds = [{key: measure() for key, measure in pairs.items()} for _ in range(plan.rounds + 1)][1:]
    for figure, number, unit, most in (("A poll over SSH, kept to fresh: our CPU", 0, 0, 0.5), ("... time", 0, 1, 0.6),
                                       ("... of an endpoint that answers at once: time", 1, 1, 0.2)):
        fresh, kept = (median([one[keeps, number][unit] for one in rounds]) for keeps in (False, True))
        yield kept_row(figure, kept, fresh, most)


CROWD = 500
CROWD_ROW = """  - {{name: h{number}, hostname: {address}, port: {port}, username: {username}, key_file: {key},
     platform: linux, endpoint: true, interval: 20, timeout: 15, keep: {keep}}}
"""
STEADY = """import healthchecker

healthchecker.JITTER = 0.0
if __name__ == "__main__":
    raise SystemExit(healthchecker.main())
"""


class Crowd(NamedTuple):
    """Of the main process: CPU seconds in a second, and for a poll; its memory in bytes; seconds of the latest poll."""

    share: float
    poll: float
    memory: float
    late: float


def watch_crowd(rows: str, settings: str, plan: Plan) -> Crowd:
    """What watching costs after the first minute, and by how much a poll began later than it was due."""
    with gated(rows, 200, settings, steady=True) as service:
        threading.Event().wait(60)
        begin_at, started, begin = time.time(), cpu_seconds(service.pid), time.monotonic()
        threading.Event().wait(max(60, plan.watch))
        spent, seconds = cpu_seconds(service.pid) - started, time.monotonic() - begin
        status = Path(f"/proc/{service.pid}/status").read_text(encoding="ascii")
        with contextlib.closing(sqlite3.connect(service.inventory.parent / "healthchecker.db")) as database:
            found = database.execute(
                "SELECT resource_id, at, seconds FROM sample WHERE at > ? ORDER BY 1, 2", [begin_at]).fetchall()
    memory = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    begun = [(resource_id, at - took / 100) for resource_id, at, took in found]     # hundredths of a second
    late = max(after[1] - before[1] - 20 for before, after in itertools.pairwise(begun) if before[0] == after[0])
    return Crowd(spent / seconds, spent / len(found), memory, late)


def crowd_rows(plan: Plan) -> Iterator[Row]:
    """Many hosts on one sshd, which answers at once with what an endpoint said before: ours is all that counts."""
    figure = f"{CROWD} hosts over SSH at 20 s, kept to fresh: our CPU of a poll"
    if plan is SHORT or not SSHD:
        yield Row(figure, "skipped: takes minutes" if SSHD else "skipped: sshd is not installed")
        return
    from test_endpoints import NONCE, authorize, install  # noqa: PLC0415  # only here

    with tempfile.TemporaryDirectory() as name, Sshd() as sshd:
        folder, told, known = Path(name), sshd.folder / "told", Path(name) / "known_hosts"
        known.write_text(sshd.known_hosts(), encoding="ascii")
        row: dict[str, Any] = {"address": sshd.address, "port": sshd.port, "username": sshd.username}
        settings = hc.ResourceSettings.model_validate({
            "name": "h0", "hostname": sshd.address, "port": sshd.port, "platform": "linux", "endpoint": True,
            "username": sshd.username})
        settings = settings.model_copy(update={"key_file": install(sshd, folder, settings)})
        watched = hc.Target(1, settings, f"ssh-ed25519 {sshd.fingerprint()}", "", "")
        access = hc.ConnectionContext(hc.KnownHosts(known), hc.Resolver())
        output = hc.Output(hc.end_mark(NONCE))
        with contextlib.closing(hc.SshConnection(watched, access.guard_of(watched), access)) as connection:
            connection.run(NONCE, output, hc.Deadline(30))
        told.write_bytes(output.printed)
        key = authorize(sshd, folder, f'command="exec sed s/{NONCE}/$SSH_ORIGINAL_COMMAND/g {told}",restrict KEY')
        trusts = SETTINGS.replace("known_hosts: known_hosts", f"known_hosts: {known}")

        def crowd(keep: str) -> Crowd:
            rows = (CROWD_ROW.format(number=number, key=key, keep=keep, **row) for number in range(CROWD))
            return watch_crowd("".join(rows), trusts, plan)

        fresh, kept = crowd("false"), crowd("true")
    yield kept_row(figure, kept.poll * 1e3, fresh.poll * 1e3, 0.6)
    yield Row("... share of a core, kept", f"{kept.share:.2f}", "≤ 0.25", kept.share <= 0.25)
    each = (kept.memory - fresh.memory) / CROWD / 1e3
    yield Row("... memory for each that is kept", f"{each:.0f} KB", "≤ 150 KB", each <= 150)
    yield Row("... the latest poll after the first minute, kept", f"{kept.late:.1f} s", "≤ 1 s", kept.late <= 1)


MANY = 10_000
MANY_ROW = "  - {{hostname: 'h[1:{}]', platform: simulated, mean_healthy: 1e6, mean_unhealthy: 0.001}}\n"


def many_rows(plan: Plan) -> Iterator[Row]:
    """One entry of many simulated resources at 60 s: to read it, to watch them, and to add one more."""
    if plan is SHORT:
        yield Row(f"{MANY} hosts of one entry", "skipped: takes minutes")
        return
    with gated(MANY_ROW.format(MANY), 200, deadline=900) as service:
        loads = [min(timeit.repeat(lambda: hc.load_inventory(service.inventory), number=1, repeat=3))]
        threading.Event().wait(60)
        shares = []
        for _ in range(2):
            started, begin = cpu_seconds(service.pid), time.monotonic()
            if shares:
                write_inventory(service.inventory.parent, MANY_ROW.format(MANY + 1), SETTINGS)
                run(service.inventory, "reload", timeout=120)
            threading.Event().wait(max(0, begin + 60 - time.monotonic()))
            shares.append((cpu_seconds(service.pid) - started) / 60)
        status = Path(f"/proc/{service.pid}/status").read_text(encoding="ascii")
    yield at_most(f"{MANY} hosts of one entry: to read the inventory", loads, 3, "s", 1)
    yield at_most("... at 60 s each: share of a core", shares[:1], 0.5, "", 2)
    yield at_most("... CPU to add one more", [60 * (shares[1] - shares[0])], 3, "s", 1)
    memory = int(status.partition("VmRSS:")[2].split()[0]) / 1e6
    yield at_most("... memory of the main process", [memory], 1.2, "GB", 2)


WRITTEN_ROW = ("  - {{hostname: h{}.example.com, username: monitor, password: p, limits: {{disk_percent: 90, "
               "memory_percent: {{warn: 80, fail: 95}}}}, checks: [{{name: replication, command: replication.sh}}]}}\n")


def written_rows(plan: Plan) -> Iterator[Row]:
    """As many hosts as MANY, each with an entry of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_inventory(Path(folder), "".join(map(WRITTEN_ROW.format, range(MANY))), SETTINGS)
        loads = timeit.repeat(lambda: hc.load_inventory(path), "import gc; gc.enable()", number=1, repeat=plan.rounds)
    yield at_most(f"{MANY} hosts written out, with limits and a check: to read the inventory", loads, 3, "s", 1)


def kept_row(figure: str, kept: float, fresh: float, most: float) -> Row:
    """What a poll costs in milliseconds over what is open, and with a login."""
    return Row(figure, f"{kept / fresh:.2f} times ({kept:,.1f} ms to {fresh:,.1f} ms)", f"≤ {most} times",
               kept / fresh <= most)


class Polled(NamedTuple):
    """Milliseconds of a poll of a Windows host: the time, the CPU of what runs there, and of this thread."""

    time: float
    host: float
    ours: float


def watched_host(server: WSManServer, **changes: Any) -> hc.Target:
    """A Windows host of tests/wsman_server.py."""
    settings = hc.ResourceSettings.model_validate({
        "name": "host", "hostname": "127.0.0.1", "port": server.port, "platform": "windows", "tls": False,
        "auth": "ntlm", "username": "monitor", "password": "correct horse", "timeout": 120, **changes})
    return hc.Target(1, settings, None, "", "")


def way_to(watched: hc.Target, keeps: bool) -> hc.PowerShellConnection:
    access = hc.ConnectionContext(hc.KnownHosts(Path("none")), hc.Resolver(), keeps=keeps)
    return hc.PowerShellConnection(watched, access.guard_of(watched), access)


def measured_poll(
    server: WSManServer, watched: hc.Target, connection: hc.Connection, deaths: Sequence[str]
) -> Polled:
    """Raises RuntimeError where it is not healthy; skips where the host's PowerShell ended by itself: nothing was
    measured then."""

    def cpu() -> float:
        """Seconds of all processes that the host had so far."""
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        now = [psutil.Process(cast(EngineShell, shell).process.pid).cpu_times() for shell in server.shells.values()]
        return ended.ru_utime + ended.ru_stime + sum(one.user + one.system for one in now)

    begin, before, ours = time.perf_counter(), cpu(), time.thread_time()
    verdict, _ = hc.poll_once(watched, connection, None)
    if deaths:
        pytest.skip(f"{verdict.reason} ({'; '.join(deaths)})")
    if not verdict.healthy:
        raise RuntimeError(verdict.reason)
    ours = time.thread_time() - ours
    return Polled((time.perf_counter() - begin) * 1e3, (cpu() - before) * 1e3, ours * 1e3)


def kept_windows_rows(plan: Plan) -> Iterator[Row]:
    """The same of a Windows host with PowerShell behind it: the time, and the CPU of what runs there."""
    figure = "A poll of a Windows host, kept to fresh"
    try:
        # Each shell is a process, as on a host: none that is warm waits for the next one.
        with open_engine() as engine, WSManServer("http", "ntlm", open_shell=engine.opener(fresh=True)) as server:
            watched = watched_host(server)
            with contextlib.ExitStack() as stack:
                ways = {keeps: way_to(watched, keeps) for keeps in (False, True)}
                for way in ways.values():
                    stack.callback(way.close)
                rounds = [{keeps: measured_poll(server, watched, way, engine.deaths) for keeps, way in ways.items()}
                          for _ in range(plan.rounds + WARMING)][WARMING:]
    except pytest.skip.Exception as missing:
        yield Row(figure, f"skipped: {missing}")
        return
    for unit, (what, most) in enumerate(((f"{figure}: time", 0.15), ("... CPU of the host's process", 0.05))):
        fresh, kept = (median([one[keeps][unit] for one in rounds]) for keeps in (False, True))
        yield kept_row(what, kept, fresh, most)


FORTY = [{"name": f"check {number}", "command": "$true"} for number in range(40)]


def checks_rows(plan: Plan) -> Iterator[Row]:
    """What checks add to a poll over what is kept, beside the same poll without, in the same shell."""
    figure = "40 checks `$true` of a Windows host add"
    try:
        with open_engine() as engine:
            for language, session in (("full", FULL_LANGUAGE), ("constrained", CONSTRAINED)):
                with WSManServer("http", "ntlm", open_shell=engine.opener(session)) as server:
                    watched = watched_host(server, checks=FORTY)
                    bare = replace(watched, settings=watched.settings.model_copy(update={"checks": []}))
                    with contextlib.closing(way_to(watched, keeps=True)) as way:
                        rounds = [[measured_poll(server, one, way, engine.deaths) for one in (watched, bare)]
                                  for _ in range(plan.rounds + WARMING)][WARMING:]
                added = [[with_them[unit] - without[unit] for with_them, without in rounds] for unit in range(3)]
                seconds, cpu = ([value / 1e3 for value in values] for values in added[:2])
                yield at_most(f"{figure} to its time, {language} language", seconds, 1, "s", 2)
                yield at_most("... to the CPU of the host's process", cpu, 0.5, "s", 2)
                yield at_most("... to ours, for each", [value / len(FORTY) for value in added[2]], 1.5, "ms", 2)
    except pytest.skip.Exception as missing:
        yield Row(figure, f"skipped: {missing}")


# === Windows =================================================================


@contextlib.contextmanager
def windows_host() -> Iterator[tuple[str, Callable[[], int]]]:
    """A WSMan server in a process of its own: the settings of a resource on it, and how often it was polled so far."""
    command, pipe = [sys.executable, "-c", WINDOWS_HOST], subprocess.PIPE
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdin=pipe, stdout=pipe, text=True) as server:
        asked, told = server.stdin, server.stdout
        assert asked and told
        host = f"hostname: 127.0.0.1, port: {int(told.readline())}, platform: windows, tls: false, auth: ntlm"
        host += ", username: monitor, password: correct horse, timeout: 30"

        def polled() -> int:
            print(file=asked, flush=True)
            return int(told.readline())

        try:
            yield host, polled
        finally:
            asked.close()


def windows_rows(plan: Plan) -> Iterator[Row]:
    """The client's share of a poll of a Windows host, and what polling many of them does to requests.

    The service begins with FIRST_POLLS polls a second, which would come again in such waves. Intervals from 15 to 41 s
    spread them: the second polls of all hosts come evenly over 30 s, later ones a little closer.
    The gate that watches nothing is measured while the other service goes on polling, so that both have to share the
    CPUs with the same polls and with the WSMan server, which no real machine has beside its gate: what is compared is
    the gate of the process that polls with another one, not a machine that polls with one that does not.
    """
    step = HOSTS_INTERVAL / HOSTS - 1 / hc.FIRST_POLLS
    spread = [HOSTS_INTERVAL / 2 + number * step for number in range(HOSTS)]
    with windows_host() as (host, polled), tempfile.TemporaryDirectory() as folder:
        poll = pollers(Path(folder), f"  - {{name: one, {host}}}")["one"]
        many = "".join(f"  - {{name: w{number}, {host}, interval: {pause}}}\n" for number, pause in enumerate(spread))
        with gated(SIMULATED.format(0), 200) as idle, gated(many, 200) as busy:
            spreads = time.monotonic() + min(spread) - HOSTS / hc.FIRST_POLLS
            spent = in_turn(plan.rounds, {"poll": lambda: client_cpu(poll, plan.polls)})["poll"]
            yield at_most("A poll of a Windows host, HTTP with NTLM: CPU of the client", spent, 25, "ms", 1)
            threading.Event().wait(max(0.0, spreads - time.monotonic()))
            begin, before = time.monotonic(), polled()
            name = f"{HOSTS} Windows hosts at {HOSTS_INTERVAL} s"
            yield slowed_row(f"{name}, to none: p99", busy, idle, plan)
            if HEY:
                pace = (polled() - before) / (time.monotonic() - begin)
                yield Row("... and meanwhile of these hosts", f"{pace:.1f} polls/s", "≥ 6 polls/s", pace >= 6)


# === The table ===============================================================


def noise(plan: Plan) -> str:
    """How much longer the same work takes at one moment than at another."""
    number = 16 * plan.quick
    samples = sorted(each(lambda: sum(range(50_000)), 1e-3, 1) for _ in range(number))
    return f"{samples[number * 19 // 20] / samples[number // 20]:.1f}"


def table(rows: list[Row], noises: list[str]) -> str:
    """All rows as Markdown, with the day and the machine above them."""
    head = f"{date.today():%Y-%m-%d}, {os.cpu_count()} CPUs, Python {platform.python_version()}; "
    head += f"the same work took up to {max(noises, key=float)} times as long at one moment as at another."
    columns = "| figure | measured: median (lowest to highest round) | wanted | |\n|---|---|---|---|\n"
    return f"{head}\n\n{columns}" + "\n".join(map(str, rows)) + "\n"


def quoted(rows: list[Row], text: str) -> list[Row]:
    """What a file's table quotes: the figures that it names already, and every one that was missed."""
    named = re.findall(r"^\| (?!figure )(.+?) \|", text, re.MULTILINE)
    return [row for row in rows if not named or row.figure in named or row.good is False]


def history_rows(plan: Plan) -> Iterator[Row]:
    """Size and pages of what `bench_history` fills."""
    for found in bench_history.rows(plan.load == 1):
        yield Row(*found)


def sharing_rows(plan: Plan) -> Iterator[Row]:
    """Several machines on one database."""
    if plan is SHORT:
        yield Row("Several machines on PostgreSQL", "skipped: takes minutes")
        return
    for found in bench_sharing.rows():
        yield Row(*found)


Part = Callable[[Plan], Iterator[Row]]


PARTS: dict[str, Part] = {
    "aggregator": aggregator_rows,
    "gate": gate_rows,
    "middleware": middleware_rows,
    "start": start_rows,
    "closing": closing_rows,
    "watching": watching_rows,
    "ssh": ssh_rows,
    "kept": kept_rows,
    "crowd": crowd_rows,
    "many": many_rows,
    "written": written_rows,
    "kept_windows": kept_windows_rows,
    "checks": checks_rows,
    "windows": windows_rows,
    "history": history_rows,
    "sharing": sharing_rows,
}


def measured(parts: Sequence[Part], plan: Plan) -> tuple[list[Row], list[str], list[str]]:
    """Rows, noises, and the traceback of each part that ended early: an answer was wrong there, or none came."""
    rows, noises, wrong = [], [noise(plan)], []
    for part in parts:
        begin = time.monotonic()
        try:
            for row in part(plan):
                rows.append(row)
                print(row, file=sys.stderr)
        except Exception as error:  # noqa: BLE001  # the other parts still have their figures to show
            wrong.append(traceback.format_exc())
            rows.append(Row(f"{part.__name__} ended early", " ".join(str(error).split()).replace("|", "/"), "", False))
        print(f"{part.__name__} took {time.monotonic() - begin:.0f} s", file=sys.stderr)
        noises.append(noise(plan))
    return rows, noises, wrong


def raise_limit() -> None:
    """As many descriptors as are allowed, for the service too: a shell's usual limit is 1,024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """Measures, prints, writes; 1 when an answer was wrong, with --strict also when a figure was missed."""
    parser = argparse.ArgumentParser(description="Measure what HealthChecker promises.")
    parser.add_argument("--short", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a figure is missed")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"measure anew what its table quotes, after {START}")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, serving; default: all")
    arguments = parser.parse_intermixed_args()
    text = arguments.write.read_text(encoding="utf-8") if arguments.write else f"{START}{END}"
    raise_limit()
    before, start, rest = text.partition(START)
    old, end, after = rest.partition(END)
    if not (start and end):
        parser.error(f"{arguments.write} has no {START} ... {END}")
    from bench_serving import serving_rows  # noqa: PLC0415  # it imports this file

    parts = PARTS | {"serving": serving_rows}
    if unknown := set(arguments.parts) - parts.keys():
        parser.error(f"no such part: {', '.join(unknown)}")
    chosen = [part for name, part in parts.items() if name in (arguments.parts or parts)]
    rows, noises, wrong = measured(chosen, SHORT if arguments.short else FULL)
    print("\n" + table(rows, noises))
    if arguments.write and not wrong:
        content = f"{before}{START}\n{table(quoted(rows, old), noises)}{END}{after}"
        arguments.write.write_text(content, encoding="utf-8", newline="\n")
    for text in wrong:
        print(text, file=sys.stderr)
    return int(bool(wrong) or (arguments.strict and any(row.good is False for row in rows)))


if __name__ == "__main__":
    sys.modules["bench"] = sys.modules[__name__]  # the same for the files that import it
    sys.exit(main())
