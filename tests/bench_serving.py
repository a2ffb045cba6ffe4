"""Serving, measured beside others: the rows of `make bench` on requests, workers, pools, crowds and memory.

Every contestant serves the same Flask application. Run as a script with a port, this file is the crowd of clients.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from bench import (
    APP,
    HEY,
    LARGE,
    SETTINGS,
    SHORT,
    SIMULATED,
    SLEEP,
    WRK,
    Plan,
    Rounds,
    Row,
    at_most,
    gated,
    in_turn,
    shown,
    slowest_percent,
    url,
)
from service import Service, environment
from sshd import SSHD, Sshd, wait_for

from healthchecker import ServiceSettings, middleware_text

SLOW, SLOW_RATE = 64, 20_000  # clients that take large answers slowly, and bytes that each takes in a second
CROWD = 512  # clients that keep their connection
IDLE = 2000  # clients that do so and ask nothing
POLLED, REAL = 500, 20  # hosts polled beside full load, and how many of them are an sshd
REFUSING = "  - {name: bad, platform: local, checks: [{name: never, command: 'false'}]}\n"
# What waitress.serve() does with the one-line application, but with the port told; a check that is always healthy.
FILES = {
    "oneline.py": APP,
    "waiting.py": """import logging, sys, waitress
from oneline import app
logging.basicConfig()
if sys.argv[1] == "silenced":
    logging.getLogger("waitress.queue").setLevel(logging.CRITICAL)
server = waitress.create_server(app, listen="127.0.0.1:0")
print(f"Listening at: http://127.0.0.1:{server.effective_port}", file=sys.stderr, flush=True)
server.run()
""",
    # Nothing is ever written to this path: a gate that is closed.
    "hc_gate.py": middleware_text(Path("lease")),
    "refusing.py": "import hc_gate, oneline\napp = hc_gate.Gate(oneline.app)\n",
    "flask_health.py": """from healthcheck import HealthCheck
from oneline import app
health = HealthCheck(checkers=[lambda: (True, "healthy")], success_ttl=None)
app.add_url_rule("/health", "health", view_func=health.run)
""",
    "django_health.py": """from django.conf import settings
settings.configure(SECRET_KEY="measured", ALLOWED_HOSTS=["*"], ROOT_URLCONF="django_health",
                   INSTALLED_APPS=["health_check"])
from django.core.wsgi import get_wsgi_application
from django.urls import path
from health_check.base import HealthCheck
from health_check.views import HealthCheckView
class Healthy(HealthCheck):
    def run(self):
        pass
urlpatterns = [path("health", HealthCheckView.as_view(checks=[Healthy]))]
app = get_wsgi_application()
""",
}
GUNICORN = ("-m", "gunicorn", "-b", "127.0.0.1:0", "--no-control-socket")  # a socket in the home folder
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


class Loaded(NamedTuple):
    """Requests per second and the 99th percentile of their milliseconds."""

    rate: float
    slowest: float


def full_load(address: str, seconds: int, clients: int = 32, status: str = "2xx") -> Loaded:
    """What `clients` that ask without a pause get; an error when the answers are not of the expected kind."""
    command = [str(WRK), "-t1", f"-c{clients}", f"-d{seconds}s", "--latency", address]
    said = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    total, bad = re.search(r"(\d+) requests in", said), re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    rate, slowest = re.search(r"Requests/sec:\s+([\d.]+)", said), re.search(r"99%\s+([\d.]+)(us|ms|s)", said)
    if not (total and rate and slowest) or int(bad[1] if bad else 0) != (0 if status == "2xx" else int(total[1])):
        raise RuntimeError(f"not the expected answers from {address}: {said}")
    return Loaded(float(rate[1]), float(slowest[1]) * UNITS[slowest[2]])


def times_as_many(figure: str, rounds: Rounds, ours: str, others: Mapping[str, float]) -> Row:
    """A row that wants so many times the requests of each of the others, or more; 0 wants nothing."""
    ratios = {name: median(rounds[ours]) / median(rounds[name]) for name in others}
    to = " / ".join(shown(rounds[name]) for name in others)
    measured = f"{' / '.join(f'{ratio:.2f}' for ratio in ratios.values())} times ({median(rounds[ours]):,.0f} to {to})"
    if not any(others.values()):
        return Row(figure, measured)
    good = all(ratios[name] >= limit for name, limit in others.items())
    return Row(figure, measured, f"≥ {' / '.join(f'{limit:g}' for limit in others.values())} times", good)


def beside_granian(figure: str, ours: Sequence[Loaded], granian: Sequence[Loaded]) -> Row:
    """How far we are from a server in Rust: nothing is promised."""
    rates, late = ([[one[kind] for one in many] for many in (ours, granian)] for kind in (0, 1))
    text = f"{median(rates[0]) / median(rates[1]):.2f} times ({' to '.join(shown(values) for values in rates)}), "
    return Row(figure, text + f"p99 {' ms to '.join(shown(values, 1) for values in late)} ms")


# === Servers =================================================================


def settings(workers: int, threads: int) -> str:
    return SETTINGS.replace("workers: 1", f"workers: {workers}").replace("threads: 0", f"threads: {threads}")


def healthy(workers: int, threads: int, app: str = "oneline:app") -> contextlib.AbstractContextManager[Service]:
    """The service with an open gate."""
    return gated(SIMULATED.format(0), 200, settings(workers, threads).replace("oneline:app", app))


def granian(workers: int, app: str = "oneline:app") -> contextlib.AbstractContextManager[str]:
    """Granian serving WSGI, otherwise as it comes; it cannot choose a port by itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return other("-m", "granian", "--interface", "wsgi", "--port", str(port), "--workers", str(workers), app)


@contextlib.contextmanager
def other(*arguments: str) -> Iterator[str]:
    """Another server in Python with these arguments, and none of its messages after the first; gives its URL."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in FILES.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        log = Path(folder) / "log"
        with log.open("wb") as sink:
            server = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        try:
            told = partial(lambda: re.search(r"Listening at: (http://\S+)", log.read_text(encoding="utf-8")))
            address = wait_for(told, 60)[1] + "/"
            wait_for(partial(status_of, address), 60)
            yield address
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            with contextlib.suppress(ProcessLookupError):  # its workers may have ended with it
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def status_of(address: str, patience: float = 5) -> int:
    """What a server answers, 0 for nothing: a port may listen before its workers do."""
    try:
        with urllib.request.urlopen(address, timeout=patience) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return refusal.code
    except OSError:
        return 0


def workers(service: Service) -> list[psutil.Process]:
    """The worker processes of a service."""
    children = psutil.Process(service.pid).children()
    return [child for child in children if any("spawn_main" in part for part in child.cmdline())]


def megabytes(process: psutil.Process) -> float:
    """The proportional set size of a process: pages that several share count in parts."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    return int(text.partition("\nPss:")[2].split()[0]) * 1024 / 1e6


# === One worker ==============================================================


def process_rows(plan: Plan) -> Iterator[Row]:
    """One worker: on the loop, in the pool, refusals, the question alone; waitress and gunicorn beside it."""
    thread = "-w1", "-k", "gthread", "--threads", "8"
    with contextlib.ExitStack() as running:
        enter = running.enter_context
        loop, pool = enter(healthy(1, 0)), enter(healthy(1, 8))
        closed = enter(gated(REFUSING, 503))
        addresses = {
            "loop": url(loop),
            "refused": url(closed),
            "shipped": enter(other("waiting.py", "shipped")),
            "silenced": enter(other("waiting.py", "silenced")),
            "pool": url(pool),
            "gthread": enter(other(*GUNICORN, *thread, "oneline:app")),
            "asked": url(loop) + "-/readyz",
            "flask": enter(other(*GUNICORN, *thread, "flask_health:app")) + "health",
            "django": enter(other(*GUNICORN, *thread, "django_health:app")) + "health?format=json",
        }
        kinds = {name: "5xx" if name == "refused" else "2xx" for name in addresses}

        def rate(name: str) -> float:
            return full_load(addresses[name], plan.load, status=kinds[name]).rate

        rounds = in_turn(plan.rounds, {name: partial(rate, name) for name in addresses})
        yield times_as_many("Flask in one line, gated, 1 worker, `threads: 0`, to waitress as shipped / silenced",
                            rounds, "loop", {"shipped": 2, "silenced": 4})  # fmt: skip
        yield times_as_many("... `threads: 8`, to gunicorn gthread with 8", rounds, "pool", {"gthread": 1})
        yield times_as_many("A refusal to an answer", rounds, "refused", {"loop": 2})
        yield times_as_many("`/-/readyz` to py-healthcheck / django-health-check under gunicorn gthread",
                            rounds, "asked", {"flask": 0, "django": 0})  # fmt: skip
        if HEY:
            yield at_half_rate(url(loop), median(rounds["loop"]), plan)
        yield idle_row(loop, plan)


def at_half_rate(address: str, most: float, plan: Plan) -> Row:
    """hey sends half of what wrk got at most."""
    clients = 16
    taken = [slowest_percent(address, 2 * plan.load, clients, most / 2) for _ in range(plan.rounds)]
    return at_most(f"... p99 at half of that rate ({most / 2:,.0f} requests/s)", taken, 10, "ms", 1)


def idle_row(service: Service, plan: Plan) -> Row:
    """What many connections cost that are kept and not used."""
    figure = f"{IDLE:,} idle keep-alive connections beside 32 busy ones, to none"
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * IDLE:
        return Row(figure, "skipped: too few descriptors are allowed")
    found: dict[str, list[Loaded]] = {"idle": [], "none": []}

    def measure(name: str) -> float:
        with idle_connections(service.host, service.port, IDLE if name == "idle" else 0):
            found[name].append(full_load(url(service), plan.load))
        return found[name][-1].rate

    in_turn(plan.rounds, {name: partial(measure, name) for name in found})
    return beside(figure, found["idle"][1:], found["none"][1:])


def granian_rows(plan: Plan) -> Iterator[Row]:
    """The distance to a server whose loop is no Python; nothing is promised of it."""
    if plan is SHORT:
        yield Row("Flask in one line, to Granian", "skipped: takes a minute, and nothing is promised")
        return
    for workers, app, figure in (
        (1, "oneline:app", "Flask in one line, 1 worker"),
        (2, "oneline:app", "... 2 workers"),
        (1, "oneline:bare", "WSGI without a framework, 1 worker"),
    ):
        with healthy(workers, 0, app) as service, granian(workers, app) as address:
            addresses = {"ours": url(service), "granian": address}
            found: dict[str, list[Loaded]] = {name: [] for name in addresses}

            def measure(name: str, addresses: Mapping[str, str] = addresses, found: Any = found) -> float:
                found[name].append(full_load(addresses[name], plan.load))
                return float(found[name][-1].rate)

            in_turn(plan.rounds, {name: partial(measure, name) for name in addresses})
        yield beside_granian(f"{figure}, to Granian with as many", found["ours"][1:], found["granian"][1:])
    with gated(REFUSING, 503) as service, granian(1, "refusing:app") as address:
        rounds = in_turn(plan.rounds, {
            name: partial(lambda place: full_load(place, plan.load, status="5xx").rate, place)
            for name, place in (("ours", url(service)), ("granian", address))})  # fmt: skip
        yield times_as_many("Refusals, 1 worker, to the printed gate under Granian", rounds, "ours", {"granian": 0})


# === Workers =================================================================


def worker_rows(plan: Plan) -> Iterator[Row]:
    """Two workers beside one and beside gunicorn's; a crowd, a blocking application, a worker that is killed."""
    with contextlib.ExitStack() as running:
        enter = running.enter_context
        one, two = enter(healthy(1, 0)), enter(healthy(2, 0))
        addresses = {
            "two": url(two),
            "one": url(one),
            "gthread": enter(other(*GUNICORN, "-w2", "-k", "gthread", "--threads", "8", "oneline:app")),
            "sync": enter(other(*GUNICORN, "-w2", "-k", "sync", "oneline:app")),
        }

        def rate(name: str) -> float:
            return full_load(addresses[name], plan.load).rate

        rounds = in_turn(plan.rounds, {name: partial(rate, name) for name in addresses})
        yield times_as_many("2 workers, `threads: 0`, to gunicorn with 2, gthread / sync",
                            rounds, "two", {"gthread": 1.5, "sync": 1.5})  # fmt: skip
        yield times_as_many("2 workers to 1", rounds, "two", {"one": 1.4})
        crowds = [crowd_apart(two) for _ in range(plan.rounds)]
        yield at_most(f"{CROWD} keep-alive clients at once: slowest first answer", crowds, 1, "s", 2)
        main, each = megabytes(psutil.Process(two.pid)), [megabytes(worker) for worker in workers(two)]
        memory = f"{main:.0f} / {max(each):.0f} MB"
        good = main <= 100 and max(each) <= 80
        yield Row("Memory (PSS) of the main process / of a worker", memory, "≤ 100 / 80 MB", good)
        yield at_most("A worker killed: until the next one answers", [replaced(one)], 2, "s", 2)
    yield from pool_rows(plan)


def pool_rows(plan: Plan) -> Iterator[Row]:
    """Answers that block, for some more clients than there are threads."""
    threads, most = 32, 32 / SLEEP
    with healthy(1, threads) as slow:
        address = url(slow) + "slow"
        loads = in_turn(plan.rounds, {"slow": lambda: full_load(address, plan.load, threads + 8).rate})["slow"]
    share = median(loads) / most
    measured = f"{share:.2f} times ({shown(loads)} requests/s to {most:,.0f})"
    figure = f"Answers that sleep for {SLEEP * 1e3:.0f} ms, `threads: {threads}`, 1 worker: to {threads} sleepers"
    yield Row(figure, measured, "≥ 0.9 times", share >= 0.9)


def slow_rows(plan: Plan) -> Iterator[Row]:
    """What one who asks for little waits behind clients that take large answers slowly, and what memory that takes."""
    bound = ServiceSettings().send_buffer / 1e6
    for kind in ("generator", "body") if plan is not SHORT else ("generator",):
        with healthy(1, 8, "oneline:large") as service:
            (worker,) = workers(service)
            before, peaks = megabytes(worker), list[float]()
            with slow_clients(service.host, service.port, kind):
                waits, ends = list[float](), time.monotonic() + 4 * plan.load + 4
                while time.monotonic() < ends:
                    begin = time.monotonic()
                    if status_of(url(service), 60) != 200:
                        raise RuntimeError("who asks for little got no answer")
                    waits.append(time.monotonic() - begin)
                    peaks.append(megabytes(worker) - before)
                    time.sleep(0.05)
        taken = f"{SLOW_RATE / 1e3:.0f} kB/s of {LARGE >> 20} MB"
        figure = f"Longest wait behind {SLOW} clients that take {taken}, a {kind}"
        yield at_most(figure, [max(waits)], 5, "s", 1)
        bodies = 0 if kind == "generator" else (8 + 2) * LARGE / 1e6    # those of the application, one in each thread
        yield at_most("... memory (PSS) that the worker takes more", [max(peaks)], round(2 * bound + bodies), "MB")


@contextlib.contextmanager
def slow_clients(host: str, port: int, kind: str) -> Iterator[None]:
    """So many; who is cut comes again."""
    ending = threading.Event()

    def take() -> None:
        while not ending.is_set():
            with contextlib.suppress(OSError), socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
                sock.settimeout(5)
                sock.connect((host, port))
                sock.sendall(f"GET /{kind} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                while not ending.wait(0.1) and sock.recv(SLOW_RATE // 10):
                    pass

    threads = [threading.Thread(target=take) for _ in range(SLOW)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def replaced(service: Service) -> float:
    """Seconds from kill -9 of the only worker to an answer of the one that takes its place."""
    (worker,) = workers(service)
    begin = time.monotonic()
    worker.send_signal(signal.SIGKILL)
    service.wait_status("/", 200)
    return time.monotonic() - begin


# === A crowd =================================================================


def crowd_apart(service: Service) -> float:
    """`crowd` in a process of its own."""
    command = [sys.executable, __file__, service.host, str(service.port)]
    said = subprocess.run(command, capture_output=True, check=True, timeout=90).stdout
    return float(said)


@contextlib.contextmanager
def idle_connections(host: str, port: int, count: int) -> Iterator[None]:
    """So many connections that asked once, and are kept; an error when one was closed meanwhile."""
    request, look = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), select.poll()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.create_connection((host, port), 60))
            client.sendall(request)
            received = b""
            while not received.endswith(b"Hello"):
                if not (part := client.recv(1 << 16)):
                    raise RuntimeError("a connection was closed")
                received += part
            look.register(client, select.POLLIN)
        yield
        if closed := len(look.poll(0)):
            raise RuntimeError(f"{closed} of {count} idle connections were closed")


@dataclass
class Client:
    """One of the crowd."""

    sock: socket.socket
    answered: float = 0.0  # seconds from the start to its first answer
    received: bytes = b""


def crowd(host: str, port: int, seconds: float = 3.0) -> float:
    """Clients that connect all at once and ask without a pause; seconds from then to the slowest first answer."""
    request = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        begin = time.monotonic()
        clients = [Client(stack.enter_context(socket.socket())) for _ in range(CROWD)]
        for client in clients:
            client.sock.setblocking(False)
            client.sock.connect_ex((host, port))
            selector.register(client.sock, selectors.EVENT_WRITE, client)
        while (now := time.monotonic() - begin) < seconds or not all(client.answered for client in clients):
            if now > 60:
                raise RuntimeError("some of the clients get no answer")
            for key, events in selector.select(1):
                attend(selector, key.data, bool(events & selectors.EVENT_WRITE), request)
                key.data.answered = key.data.answered or (key.data.received and time.monotonic() - begin)
    return max(client.answered for client in clients)


def attend(selector: selectors.BaseSelector, client: Client, asks: bool, request: bytes) -> None:
    """One step of a client: it asks, or it reads and turns to asking again."""
    if asks:
        client.sock.sendall(request)
        client.received = b""
        selector.modify(client.sock, selectors.EVENT_READ, client)
        return
    if not (part := client.sock.recv(1 << 16)):
        raise RuntimeError("a connection was closed")
    client.received += part
    if client.received.endswith(b"Hello"):
        if not client.received.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"not the expected answer: {client.received!r}")
        selector.modify(client.sock, selectors.EVENT_WRITE, client)


# === Polling beside full load ================================================


def polling_rows(plan: Plan) -> Iterator[Row]:
    """What polling does to a loaded service, and the memory that it takes."""
    with contextlib.ExitStack() as running:
        real, simulated = 0, SIMULATED.replace("interval: 10", "interval: 30")
        hosts = "".join(simulated.format(number) for number in range(POLLED - REAL))
        if SSHD:
            sshd, real = running.enter_context(Sshd()), REAL
            host = f"hostname: {sshd.address}, port: {sshd.port}, platform: linux, username: {sshd.username}"
            host += f", key_file: {sshd.user_key()}, host_key: '{sshd.fingerprint()}', interval: 30, timeout: 25"
            hosts += "".join(f"  - {{name: real{number}, {host}}}\n" for number in range(real))
        figure = f"{POLLED - REAL + real} hosts polled at 30 s, {real} of them an sshd, beside full load of 2 workers"
        idle = running.enter_context(healthy(2, 0))
        busy = running.enter_context(gated(hosts, 200, settings(2, 0)))
        found: dict[str, list[Loaded]] = {"busy": [], "idle": []}

        def measure(name: str) -> float:
            found[name].append(full_load(url(busy if name == "busy" else idle), 2 * plan.load))
            return found[name][-1].rate

        in_turn(plan.rounds, {name: partial(measure, name) for name in found})
        yield beside(figure, found["busy"][1:], found["idle"][1:])
        yield Row("... memory (PSS) of the main process", f"{megabytes(psutil.Process(busy.pid)):.0f} MB")


def beside(figure: str, busy: Sequence[Loaded], idle: Sequence[Loaded]) -> Row:
    rate = median(one.rate for one in busy) / median(one.rate for one in idle)
    late, calm = (median(one.slowest for one in many) for many in (busy, idle))
    measured = f"{rate:.2f} times the requests, {late / calm:.2f} times the p99 ({late:.1f} ms to {calm:.1f} ms)"
    return Row(figure, measured, "≥ 0.9 / ≤ 2 times", rate >= 0.9 and late <= 2 * calm)


def serving_rows(plan: Plan) -> Iterator[Row]:
    """All rows of this file."""
    if not WRK:
        yield Row("Requests per second", "skipped: wrk is not installed")
        return
    for part in (process_rows, granian_rows, worker_rows, slow_rows, polling_rows):
        yield from part(plan)


if __name__ == "__main__":
    print(crowd(sys.argv[1], int(sys.argv[2])))
