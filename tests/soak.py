"""What takes long: `python tests/soak.py [--only PART ...] [--seconds 60] [--threads 4] [--fuzz 1200]`; see PARTS.

A minute at full load while a resource flips every second.

Every answer has to be right for the lease at its time: a refusal only if the gate was closed at some moment between
request and answer, the application's answer only if it was open. None may be lost, and neither threads nor descriptors
nor memory may grow in the workers or in the main process, which is this one. Prints one line of progress and a
verdict; exit code 1 if something was wrong. Then tests run in full of which the suite has a few rounds (pytest
--soak), those of polls and console on PostgreSQL, the database is locked for a minute, processes are stopped for 20
seconds, and first starts, imports, service, migrations and rotations are killed a thousand times: nothing may be half.
The main process is killed some hundred times, at any moment of its start and after: nothing may be left of it two
seconds later, and the next one gets its port. Ten restarts on a socket of systemd's refuse none of 20,000 requests,
and 20 minutes of damaged inputs (tests/fuzz.py) give only documented errors. For ten minutes connections that are kept
die in every way (tests/soak_sessions.py), and 500 polls of one shell may not make it grow. An hour of 50 hosts that
fail in three ways and 50 that are well, polled every two seconds, leaves the service as it was after five minutes.
Three machines on one database lose each other and it (tests/soak_machines.py): no gate may be wrong at any moment.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import queue
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import pytest
import soak_machines
import soak_sessions
from fuzz import TARGETS, fuzz_all
from load import Clients, Response
from service import Program, Team, write_inventory
from sshd import Sshd, make_key, write_private
from test_crashes import kill_anywhere, lock_for, stand_still
from test_workers import APP as SHOP
from test_workers import kill_at_random, restart_often, workers

APP = """
import flask

app = flask.Flask(__name__)
app.add_url_rule("/", view_func=lambda: "Hello")
"""
RECORD = struct.Struct("<ddI")  # when the request was sent, when the answer was there (monotonic), status
FLIP = 1.0  # seconds
WARM_UP = 0.25  # part of the time
GROWTH = 0.05  # part of what there was after the warm-up
HOSTS = 50  # that fail, and as many that are well
HOST = """  - {{name: {name}, hostname: {address}, port: {port}, username: {username}, key_file: {key}, platform: linux,
     interval: 2, timeout: 30, retry_interval: 2, fall: 1, rise: 1, checks: [{{name: says, command: "{check}"}}]}}
"""


class Flip(NamedTuple):
    """The gate has changed between these two monotonic times."""

    before: float
    after: float
    is_open: bool


class Usage(NamedTuple):
    """What a process has of that which must not grow."""

    threads: float
    descriptors: float
    memory: float  # bytes that are its own


class Recorder(Clients):
    """Clients in a process of their own: what they see goes to a file."""

    def __init__(self, port: int, count: int, path: Path) -> None:
        super().__init__(("127.0.0.1", port), count)
        self._file = path.open("wb", buffering=1 << 16)

    def note(self, answer: Response) -> None:
        self._file.write(RECORD.pack(answer.sent, answer.received, answer.status))

    def close(self) -> None:
        self._file.close()


def be_clients(port: int, count: int, path: Path) -> int:
    """The process of the clients: asks until its standard input ends; says what was lost."""
    with Recorder(port, count, path) as clients:
        sys.stdin.read()
    clients.close()
    for lost in clients.lost:
        print(f"lost: {lost}")
    return 1 if clients.lost else 0


def usage(process: psutil.Process) -> Usage:
    with process.oneshot():
        descriptors = process.num_handles() if sys.platform == "win32" else process.num_fds()
        memory = process.memory_info()
        # Of a file's pages that nobody has written the kernel takes and brings back some, as much as 1.5 MB.
        own = memory.rss - memory.shared if sys.platform == "linux" else process.memory_full_info().uss
        return Usage(process.num_threads(), descriptors, own)


def right(flips: list[Flip], records: Iterator[tuple[float, float, int]]) -> Iterator[bool]:
    """For each answer, whether the gate was at some moment between request and answer as the answer says.

    `flips` are in order and change the gate in turn; while one is under way, both is right."""
    afters, befores = [flip.after for flip in flips], [flip.before for flip in flips]
    for sent, received, status in records:
        first = max(0, bisect.bisect_right(afters, sent) - 1)  # the last one that was over before the request
        last = bisect.bisect_right(befores, received)  # the first one that began after the answer
        yield status in {200 if flip.is_open else 503 for flip in flips[first:last]}


def growth(samples: list[Usage]) -> Iterator[tuple[str, float, float]]:
    """Name, value after the warm-up and at the end, of each that grew too much."""
    steady = samples[int(len(samples) * WARM_UP) :]
    part = max(1, len(steady) // 5)
    for index, name in enumerate(Usage._fields):
        begin, end = (median(sample[index] for sample in some) for some in (steady[:part], steady[-part:]))
        if end > begin * (1 + GROWTH):
            yield name, begin, end


def flip_until(end: float, team: Team, flips: list[Flip], seen: dict[psutil.Process, list[Usage]]) -> Iterator[None]:
    """Lets the resource flip, and looks at the processes in between."""
    while time.monotonic() < end:
        is_open = not flips[-1].is_open
        before = time.monotonic()
        team.aggregator.SetResource("db1", is_open, "it flips")
        flips.append(Flip(before, time.monotonic(), is_open))
        with contextlib.suppress(queue.Empty):
            while True:
                team.aggregator.transitions.get_nowait()  # the service's recorder does that
        for process, samples in seen.items():
            samples.append(usage(process))
        yield
        threading.Event().wait(max(0.0, before + FLIP - time.monotonic()))


def read_records(path: Path) -> Iterator[tuple[float, float, int]]:
    with path.open("rb") as file:
        while part := file.read(RECORD.size * 10_000):
            yield from RECORD.iter_unpack(part)


def soak(options: argparse.Namespace, folder: Path) -> int:
    """Returns the exit code."""
    (folder / "oneline.py").write_text(APP, encoding="utf-8")
    settings = f"  app: oneline:app\n  threads: {options.threads}\n  queue: {max(64, options.clients)}"
    path = folder / "answers"
    with Team(folder, options.workers, settings, quick=False) as team:
        processes = [psutil.Process(), *workers(psutil.Process().pid).values()]
        seen: dict[psutil.Process, list[Usage]] = {process: [] for process in processes}
        begin = time.monotonic()
        flips = [Flip(begin, begin, True)]
        command = [sys.executable, __file__, "--clients-of", str(team.address[1]), str(options.clients), str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as clients:
            for _ in flip_until(begin + options.seconds, team, flips, seen):
                answers = path.stat().st_size // RECORD.size if path.exists() else 0
                print(f"\r{time.monotonic() - begin:3.0f} s: {answers:,} answers", end="", flush=True)
            lost = clients.communicate(timeout=60)[0].splitlines()
        alive = all(process.is_running() for process in processes)
    verdicts = Counter(right(flips, read_records(path)))
    statuses = Counter(status for _, _, status in read_records(path))
    grown = [(process.pid, *found) for process, samples in seen.items() for found in growth(samples)]
    good = alive and not lost and not grown and clients.returncode == 0 and not verdicts[False]
    good = good and statuses[200] > 0 < statuses[503] and statuses.keys() == {200, 503}
    print(f"\n{verdicts.total():,} answers ({verdicts.total() / options.seconds:,.0f}/s; {dict(statuses)}),")
    print(f"{verdicts[False]} wrong, {len(lost)} lost, {len(flips) - 1} flips; grown: {grown or 'nothing'}")
    for process, samples in seen.items():
        first, last = samples[int(len(samples) * WARM_UP)], samples[-1]
        print(f"process {process.pid}: threads {first.threads} -> {last.threads}, descriptors {first.descriptors} -> "
              f"{last.descriptors}, memory {first.memory / 1e6:.1f} -> {last.memory / 1e6:.1f} MB")  # fmt: skip
    print("\n".join(lost[:10]) + ("passed" if good else "FAILED"))
    return 0 if good else 1


def repeated(_options: argparse.Namespace, _folder: Path) -> int:
    tests = [sys.executable, "-m", "pytest", "--soak"]
    return subprocess.run(tests, cwd=Path(__file__).parent.parent, check=False).returncode


def on_postgresql(_options: argparse.Namespace, _folder: Path) -> int:
    """What the suite runs on both databases is there already."""
    names = ("poll", "api", "pages", "overview", "overrides", "status", "security", "reload")
    tests = [sys.executable, "-m", "pytest", "-n", "4", "--postgresql", *(f"tests/test_{name}.py" for name in names)]
    return subprocess.run(tests, cwd=Path(__file__).parent.parent, check=False).returncode


def locked(_options: argparse.Namespace, folder: Path) -> int:
    lock_for(folder, 60)
    print("locked for 60 s: passed", flush=True)
    return 0


def stopped(_options: argparse.Namespace, folder: Path) -> int:
    stand_still(folder, 20)
    print("stopped for 20 s: passed", flush=True)
    return 0


def crashes(options: argparse.Namespace, folder: Path) -> int:
    seed = time.time_ns()
    kill_anywhere(folder, options.crashes, seed, orphaned=6.0)
    print(f"{options.crashes} kills left nothing half (seed {seed})", flush=True)
    return 0


def kills(options: argparse.Namespace, folder: Path) -> int:
    (folder / "shop.py").write_text(SHOP, encoding="utf-8")
    seed = time.time_ns()
    kill_at_random(folder, options.kills, seed, orphaned=2.0)
    print(f"{options.kills} kills of the main process left nothing (seed {seed})", flush=True)
    return 0


def restarts(options: argparse.Namespace, folder: Path) -> int:
    asked = restart_often(folder, options.restarts, 2000 * options.restarts)
    print(f"{asked:,} requests over {options.restarts} restarts: none was refused", flush=True)
    return 0


def sessions(options: argparse.Namespace, _folder: Path) -> int:
    """Kept connections that die in every way."""
    plan = soak_sessions.Plan(options.sessions, time.time_ns(), engine=options.engine)
    return told("sessions", lambda: soak_sessions.soak(plan))


def shells(options: argparse.Namespace, _folder: Path) -> int:
    """A shell of a Windows host, polled again and again."""
    return told("shells", lambda: soak_sessions.grow(options.polls))


def machines(_options: argparse.Namespace, _folder: Path) -> int:
    """Three of them on one PostgreSQL: one is killed, sleeps, or loses the database; all lose it."""
    return told("machines", soak_machines.soak)


def host_rows(server: Sshd, wrong_key: Path, closed_port: int) -> str:
    """Those that are well, and those that fail: by a check, by a port where nobody listens, by a refused key."""
    well = {"address": server.address, "port": server.port, "username": server.username, "key": server.user_key(),
            "check": "true"}  # fmt: skip
    faults: list[dict[str, object]] = [{"check": "false"}, {"port": closed_port}, {"key": wrong_key}]
    bad = [HOST.format(name=f"bad{number}", **well | faults[number % len(faults)]) for number in range(HOSTS)]
    return "".join([*(HOST.format(name=f"good{number}", **well) for number in range(HOSTS)), *bad])


def grown_after_warm_up(who: str, samples: list[Usage]) -> Iterator[str]:
    """What has grown, and prints how it was."""
    warm = samples[min(300, len(samples) // 4):]
    first, last = ([median(each[place] for each in some) for place in range(3)] for some in (warm[:60], warm[-60:]))
    print(f"\n{who} after the warm-up and at the end: threads, descriptors, bytes: {first}, {last}", end="")
    yield from (f"{name} of {who}" for name, before, after in zip(Usage._fields, first, last, strict=True)
                if after > before + (1e6 if name == "memory" else 0))


def hosts(options: argparse.Namespace, folder: Path) -> int:
    """Machines that fail and machines that are well, for an hour; neither the service nor its worker, which is asked
    each second, may grow, and it says what is so."""
    with Sshd() as server, socket.create_server(("127.0.0.1", 0)) as closed:
        (folder / "known_hosts").write_text(server.known_hosts(), encoding="ascii")
        write_private(folder / "wrong_key", make_key("ed25519"))
        port = closed.getsockname()[1]
        closed.close()
        inventory = write_inventory(folder, host_rows(server, folder / "wrong_key", port),
                                    "  workers: 1\n  known_hosts: known_hosts")  # fmt: skip
        wrong, begin = Counter[str](), time.monotonic()
        with Program(inventory, deadline=120) as service, contextlib.closing(
                sqlite3.connect(folder / "healthchecker.db")) as database:  # fmt: skip
            service.wait_status("/-/livez", 200)
            processes, seen_at = [psutil.Process(service.pid), *workers(service.pid).values()], 0.0
            samples: list[list[Usage]] = [[] for _ in processes]
            while (passed := time.monotonic() - begin) < options.hosts:
                threading.Event().wait(1)
                wrong["the gate is open"] += service.get("/").status != 503
                for process, seen in zip(processes, samples, strict=True):
                    seen.append(usage(process))
                for name, state, polled_at in database.execute(
                        "SELECT name, state, polled_at FROM resource JOIN status ON resource_id = resource.id"):
                    wrong[f"{name} is {state}"] += state != ("healthy" if name[:4] == "good" else "unhealthy")
                    seen_at = max(seen_at, polled_at)
                print(f"\r{passed:5.0f} s: {[seen[-1] for seen in samples]}", end="", flush=True)
            assert time.time() - seen_at < 60, "nothing was polled for a minute"
            count = database.execute("SELECT count(*) FROM sample").fetchone()[0]
    grown = [what for number, seen in enumerate(samples)
             for what in grown_after_warm_up(f"worker {number}" if number else "the service", seen)]
    print(f"\n{count:,} polls")
    found = {text: times for text, times in wrong.items() if times}
    print(f"grown: {grown or 'nothing'}; wrong: {found or 'nothing'}: {'FAILED' if grown or found else 'passed'}")
    return int(bool(grown or found))


def told(part: str, run: Callable[[], list[str]]) -> int:
    """Prints what was wrong, or what is missing; gives the exit code."""
    try:
        wrong = run()
    except pytest.skip.Exception as missing:
        print(f"{part}: skipped: {missing}", flush=True)
        return 0
    print("\n".join(wrong) or f"{part}: passed", flush=True)
    return int(bool(wrong))


def fuzzed(options: argparse.Namespace, _folder: Path) -> int:
    print(f"{fuzz_all(list(TARGETS), options.fuzz, time.time_ns()):,} damaged inputs gave only documented errors")
    return 0


PARTS: dict[str, Callable[[argparse.Namespace, Path], int]] = {
    "load": soak, "tests": repeated, "postgresql": on_postgresql, "locked": locked, "stopped": stopped,
    "crashes": crashes, "kills": kills, "restarts": restarts, "hosts": hosts, "sessions": sessions,
    "shells": shells, "machines": machines, "fuzz": fuzzed}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="What takes long; by default all of it.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=60, help="of full load; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=4, help="pool threads; 0 = on the loop; default: %(default)s")
    parser.add_argument("--clients", type=int, default=32, help="keep-alive connections; default: %(default)s")
    parser.add_argument("--kills", type=int, default=300, help="of the main process; default: %(default)s")
    parser.add_argument("--crashes", type=int, default=1000, help="kills at other moments; default: %(default)s")
    parser.add_argument("--hosts", type=float, default=3600, help="seconds of 100 hosts; default: %(default)s")
    parser.add_argument("--restarts", type=int, default=10, help="with 2,000 requests each; default: %(default)s")
    parser.add_argument("--sessions", type=float, default=600, metavar="SECONDS",
                        help="of connections that die; default: %(default)s")  # fmt: skip
    parser.add_argument("--engine", action="store_true", help="a real PowerShell behind the sessions by WinRM")
    parser.add_argument("--polls", type=int, default=500, help="of one shell of PowerShell; default: %(default)s")
    parser.add_argument("--fuzz", type=float, default=1200, help="seconds of damaged inputs; default: %(default)s")
    parser.add_argument("--clients-of", nargs=3, metavar=("PORT", "COUNT", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clients_of:
        port, count, path = options.clients_of
        return be_clients(int(port), int(count), Path(path))
    code = 0
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            code |= PARTS[name](options, Path(folder))
    return code


if __name__ == "__main__":
    sys.exit(main())
