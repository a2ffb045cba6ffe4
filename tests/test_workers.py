"""Workers: processes on one port, their share of it, their end and what replaces them."""

from __future__ import annotations

import contextlib
import functools
import gc
import http.client
import importlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import operator
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import open_descriptors, wait_for
from load import Clients, parse
from service import (
    OWN_CONSOLE,
    Program,
    Service,
    Team,
    ask_to_end,
    command,
    environment,
    fresh_processes,
    prepared_keys,
    quick_workers,
    write_inventory,
)

import healthchecker
from healthchecker import (
    HANG_SPACING,
    HANG_TIME,
    LEAD,
    READY_TIME,
    SHARE,
    Lease,
    LineFormatter,
    LineThread,
    LogFile,
    MessagePipe,
    ServiceSettings,
    SparingFilter,
    Supervisor,
    UsageError,
    WorkerProcess,
    listen,
    load_app,
    load_inventory,
)

BACK = 60.0  # seconds in which a worker that was killed is replaced, however busy the machine is
ORPHANED = 30.0  # seconds after which a worker that outlives its main process is a fault; two where nobody else works
ENDED = 60.0  # seconds that the end may take
NUMBERS = itertools.count()
# Of 32 connections, what one of two workers takes at most before it leaves one to the other.
FAIR = next(held for held in range(32) if held > LEAD + SHARE * (32 - held))
SHOP = "  app: shop:app"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's: on Windows they are no processes'")

# An application that tells who answered; /slow takes as many seconds as it is asked to, /hang takes an hour.
APP = """
import gc, json, logging, multiprocessing, os, pathlib, subprocess, sys, threading, time
import healthchecker

HERE = pathlib.Path(__file__).parent


def silent(seconds):
    os.closerange(0, 3)
    time.sleep(seconds)


def leave():
    threading.Thread(target=time.sleep, args=(60,)).start()
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    pids = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **pipes).pid]
    if hasattr(os, "fork"):
        child = multiprocessing.get_context("fork").Process(target=silent, args=(60,))
        child.start()
        pids.append(child.pid)
    return json.dumps(pids)


def same(environ):
    try:
        healthchecker.load_app("there_is:none", HERE)
    except healthchecker.UsageError as error:
        raised = type(error).__module__
    gate = environ["healthchecker.is_healthy"].__self__
    copies = {id(module.Gate) for module in list(sys.modules.values()) if "Gate" in vars(module)}
    return json.dumps([isinstance(gate, healthchecker.Gate), type(gate) is healthchecker.Gate, len(copies)])


def compiled():
    spec = sys.modules["__main__"].__spec__
    return json.dumps([spec.name, os.path.exists(spec.cached) or sys.dont_write_bytecode] if spec else [])


def write():
    logging.getLogger("shop").info("%d sold by %s", 3, os.getpid())
    logging.getLogger("shop").debug("never seen")
    return "written"


def app(environ, start_response):
    path, body = environ["PATH_INFO"], str(os.getpid())
    if path in ("/slow", "/hang"):
        (HERE / f"came-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}").touch()
        threading.Event().wait(3600 if path == "/hang" else float(environ["QUERY_STRING"]))
    elif path == "/same":
        body = same(environ)
    elif path == "/compiled":
        body = compiled()
    elif path == "/collected":
        body = json.dumps([gc.get_freeze_count(), len(gc.get_objects())])
    elif path.startswith("/tell"):
        logging.getLogger("shop").warning("told: %s", path)
    elif path in ("/write", "/leave"):
        body = write() if path == "/write" else leave()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body.encode()]
"""


# Added to it: the worker ends at its first request, and tells when.
DIES = """
def app(environ, start_response):
    (HERE / f"died-{time.monotonic_ns():020}-{os.getpid()}").touch()
    os._exit(1)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the application in it."""
    (tmp_path / "shop.py").write_text(APP, encoding="utf-8")
    return tmp_path


def inventory(folder: Path, threads: int = 2, workers: int = 2) -> Path:
    return write_inventory(folder, "", f"  app: shop:app\n  threads: {threads}\n  workers: {workers}")


def address(service: Service) -> tuple[str, int]:
    return service.host, service.port


def workers(main: int) -> dict[int, psutil.Process]:
    """The worker processes of a main process, by process id."""
    found, parent = {}, psutil.Process(main)
    for process in parent.children():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if "--multiprocessing-fork" in process.cmdline() or process.cmdline() == parent.cmdline():
                found[process.pid] = process
    return found


def descriptors_of(process: psutil.Process) -> int:
    """Without those of the database, which has a connection for each thread that uses it at the same time."""
    if sys.platform == "win32":
        return process.num_handles()
    return process.num_fds() - sum("healthchecker.db" in file.path for file in process.open_files())


def left_after(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """The processes that still run then. (One that ended may be a zombie until its new parent looks.)"""

    def running(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    with contextlib.suppress(AssertionError):
        wait_for(lambda: not any(map(running, processes)), seconds)
    return [process for process in processes if running(process)]


def family_of(main: int) -> list[psutil.Process]:
    """All that it started; on Windows its workers alone: the host of its console ends when the system comes to it."""
    return list(workers(main).values()) if sys.platform == "win32" else psutil.Process(main).children(recursive=True)


def new_ones(main: int, before: Container[int]) -> list[psutil.Process]:
    """The worker processes of a main process that were not there before."""
    return [worker for pid, worker in workers(main).items() if pid not in before]


def requests_of(folder: Path, pid: int) -> int:
    """How many requests for /slow and /hang came to a worker."""
    return len(list(folder.glob(f"came-{pid}-*")))


@contextlib.contextmanager
def connected(service: Service, path: str = "/") -> Iterator[tuple[http.client.HTTPConnection, str]]:
    """A keep-alive connection that was answered, and the answer."""
    connection = http.client.HTTPConnection(service.host, service.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        yield connection, connection.getresponse().read().decode()


def answering_pid(service: Service) -> str:
    """The process that a new connection gets to."""
    with connected(service) as (_, pid):
        return pid


@contextlib.contextmanager
def on_all(
    address: tuple[str, int], count: int, pids: Collection[int], path: str = "/", **how: Any
) -> Iterator[Clients]:
    """Clients with connections to all of these workers; those that get no processor for HEAD_START leave them all to
    another, and then the clients begin anew."""
    for _ in range(30):
        with Clients(address, count, path, **how) as clients:
            if {int(pid) for pid in clients.holders_of(count)} == set(pids):
                yield clients
                return
    raise AssertionError("one worker took them all again and again")


# === How many =================================================================
def test_automatic_count() -> None:
    """One per CPU that may be used, and no more than eight."""
    assert 1 <= ServiceSettings(workers="auto").worker_count == ServiceSettings().worker_count <= 8
    assert [ServiceSettings(workers=count).worker_count for count in ("1", "20")] == [1, 20]
    if sys.platform == "linux":
        usable = os.sched_getaffinity(0)
        assert ServiceSettings().worker_count == min(len(usable), 8)
        try:
            os.sched_setaffinity(0, {min(usable)})
            assert ServiceSettings().worker_count == 1
        finally:
            os.sched_setaffinity(0, usable)


# === While all is well =======================================================
@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two workers that nobody kills."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "shop.py").write_text(APP, encoding="utf-8")
    with Program(inventory(folder)) as service:
        service.wait_status("/", 200)
        yield service


@pytest.mark.long
@pytest.mark.windows
def test_workers_share_one_port(service: Service) -> None:
    with on_all(address(service), 16, workers(service.pid), pause=0.02) as clients:
        pass
    assert not clients.lost and set(clients.statuses) == {200}
    assert {int(answer.body) for answer in clients.answers} == set(workers(service.pid))
    assert service.pid not in workers(service.pid)


def test_the_application_has_the_same_module(service: Service) -> None:
    assert json.loads(service.get("/same").body) == [True, True, 1]


def test_workers_find_the_program_compiled(service: Service) -> None:
    """Each start of one would compile it anew."""
    assert json.loads(service.get("/compiled").body) == ["healthchecker", True]


def test_collections_do_not_look_through_what_stays(service: Service) -> None:
    """Each of them would hold the requests up for 60 ms."""
    kept, looked_through = json.loads(service.get("/collected").body)
    assert kept > 50_000 and looked_through < kept / 10


@pytest.mark.skipif(sys.platform == "win32", reason="wine tells no sockets of another process")
def test_a_worker_is_given_no_database_and_no_key(service: Service) -> None:
    """Nor a pipe to another worker, or the console's port."""
    for worker in workers(service.pid).values():
        assert not [file.path for file in worker.open_files() if "healthchecker.db" in file.path or ".pem" in file.path]
        ports = {found.laddr.port for found in worker.net_connections("tcp") if found.status == psutil.CONN_LISTEN}
        assert ports == {service.port}


def test_no_record_spans_lines(service: Service) -> None:
    """The application logs a path with a line break."""
    assert service.get("/tell/%0a2026-01-01%20ERROR%20forged%0d%1b%5b31m%e2%80%a8").status == 200
    line = service.wait_line("told: ")
    assert r"/tell/\n2026-01-01 ERROR forged\r\x1b[31m" in line
    assert not [line for line in service.output.splitlines() if line.startswith("2026-01-01")]


def test_no_line_of_a_traceback_looks_like_a_record() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("shop")
    logger.addHandler(handler)
    try:
        raise ValueError("/\nERROR forged\x1b\u2028ERROR forged\rERROR forged")
    except ValueError:
        logger.exception("while serving %s", "/\n", stack_info=True)
    first, *lines = stream.getvalue().splitlines()
    assert first == r"ERROR while serving /\n" and len(lines) > 5
    assert all(line.startswith("    ") and line.isprintable() for line in lines)


def test_a_faulty_logging_call_harms_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    """It is told on the console, as by every handler; what cannot be shown goes through the pipe as text."""
    ours, theirs = multiprocessing.Pipe()
    logger = logging.Logger("shop")
    logger.addHandler(pipe := MessagePipe(theirs))
    if pipe.formatter is None:  # what basicConfig does
        pipe.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    logger.warning("%d sold", "none")
    logger.warning("%d sold\n\udcff", 3)
    assert ours.poll(5) and json.loads(ours.recv_bytes()) == ["log", logging.WARNING, "3 sold\n\udcff", ""]
    pipe.stream.close()
    assert "Message: '%d sold'" in capsys.readouterr().err


def test_what_a_main_process_that_hangs_does_not_read() -> None:
    """It is bounded, and what is missing is said as all else."""
    ours, theirs = multiprocessing.Pipe()
    pipe, text = MessagePipe(theirs), "x" * (1 << 19)
    for _ in range(4):
        pipe.emit(record(text))
    wait_for(lambda: ours.poll() and len(json.loads(ours.recv_bytes())[2]) < 100 and not pipe.stream._dropped)
    pipe.stream.close()


def test_what_the_main_process_cannot_read(caplog: pytest.LogCaptureFixture) -> None:
    """A message of whatever kind ends neither the thread that reads nor the worker."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process()
    worker = WorkerProcess(3, process, ours)
    messages = (b"\x80\x04K.", b"\xff", b"5", b"[", b"[[" * 5000, b'["log", "high", 1, 2]', b'["log"]', b'["new", 1]')
    with caplog.at_level(logging.INFO):
        for message in (*messages, b'["log", 20, "3 sold", ""]', b'["ready"]'):
            theirs.send_bytes(message)
        assert worker.ready.wait(5)
        assert worker.failure == ""
        theirs.close()
        wait_for(lambda: ours.closed)
        worker.stop()  # and nobody hears it
    assert caplog.messages.count("worker 3: 3 sold") == 1
    assert sum("worker 3: a message cannot be read" in text for text in caplog.messages) == len(messages) - 1


@POSIX
def test_workers_end_through_their_pipe_alone(service: Service) -> None:
    before = workers(service.pid)
    with Clients(address(service), 8, pause=0.01) as clients:
        for worker in before.values():
            for number in (signal.SIGTERM, signal.SIGINT):
                worker.send_signal(number)
        answered = len(clients.answers)
        wait_for(lambda: len(clients.answers) > answered + 100)
    assert not clients.lost
    assert workers(service.pid) == before


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_connections_spread(service: Service, at_once: bool) -> None:
    rounds = []
    for _ in range(5):
        with contextlib.ExitStack() as stack:
            if at_once:
                holders = stack.enter_context(Clients(address(service), 32, pause=0.05)).holders_of(32)
                held = Counter(pid.decode() for pid in holders.elements())
            else:
                held = Counter(stack.enter_context(connected(service))[1] for _ in range(32))
        assert held.total() == 32
        rounds.append(max(held.values()))
    assert statistics.median(rounds) <= FAIR, rounds  # a busy machine can keep one of them waiting now and then


@pytest.mark.skipif(sys.platform == "win32", reason="select takes 512 sockets there, the ones of the test among them")
def test_a_new_connection_among_512_busy_ones(folder: Path) -> None:
    healthchecker.connection_limit()  # raises the limit of open files
    with Team(folder, 2, f"{SHOP}\n  threads: 0") as team, Clients(team.address, 512) as crowd:
        crowd.holders_of(512)
        with Clients(team.address, 1, keep=False) as newcomer:
            wait_for(lambda: len(newcomer.answers) >= 10)
    assert not crowd.lost and not newcomer.lost
    assert set(crowd.statuses) == set(newcomer.statuses) == {200}
    before = [sum(answer.sent < each.received < answer.received for each in crowd.answers if each.body == answer.body)
              for answer in newcomer.answers]  # fmt: skip
    assert max(before) < 4 * 512, before  # in turn: it had to wait for those that were there


def test_the_gate_of_each_worker_follows_the_lease(folder: Path) -> None:
    """As fast as `SetResource` says it, in the main process: within 0.1 s."""
    flips: list[tuple[float, float, int]] = []  # before it was told and after that, and the status from then on
    with Team(folder, 2, SHOP) as team, on_all(team.address, 16, workers(os.getpid()), pause=0.002) as clients:
        for healthy in (False, True) * 3:
            before = time.monotonic()
            team.aggregator.SetResource("db1", healthy)
            flips.append((before, time.monotonic(), 200 if healthy else 503))
            wait_for(lambda: clients.answers[-1].sent > flips[-1][1] + 0.2)
    assert not clients.lost
    for (_, told, status), (until, *_) in itertools.pairwise([*flips, (math.inf, math.inf, 0)]):
        later = [answer for answer in clients.answers if answer.sent > told + 0.1 and answer.received < until]
        assert {answer.status for answer in later} == {status}


# === One that dies ===========================================================
def test_a_killed_worker_is_back(folder: Path) -> None:
    """Clients of the other see nothing of it; killed again at once, it is started with pauses."""
    with Service(inventory(folder)) as service:
        service.wait_status("/", 200)
        with Clients(address(service), 16, pause=0.01) as clients:
            clients.holders_of(16)
            before, main = workers(service.pid), psutil.Process(service.pid)
            victim = min(before)
            with Clients(address(service), 1, keep=False, pause=0.01) as prober:
                before[victim].kill()
                known = {str(pid).encode() for pid in before}
                wait_for(lambda: [a for a in list(prober.answers) if a.body not in known], BACK)
        assert not [lost for lost in clients.lost if int(lost.last or victim) != victim]
        assert len(clients.lost) <= 16 and set(clients.statuses) == set(prober.statuses) == {200}
        descriptors = max(descriptors_of(main) for _ in range(5))  # it looks twice, and may miss or count one
        assert all(map(operator.ge, pauses_after_kills(service.pid, before, 2), (0.5, 1)))
        with Clients(address(service), 8, keep=False, pause=0.02) as clients:
            wait_for(lambda: len({answer.body for answer in list(clients.answers)}) == 2, BACK)
        assert not clients.lost
        wait_for(lambda: descriptors_of(main) <= descriptors + (20 if sys.platform == "win32" else 0))
        assert service.output.count("exit code") == 3
        family = family_of(main.pid)
    assert not left_after(family, ORPHANED)


def test_a_worker_that_is_replaced_knows_the_routes(tmp_path: Path) -> None:
    """Closed ones stay closed; what is open is asked of the application, which has no /s."""
    calm = "platform: simulated, mean_healthy: 1000000"
    bad = "platform: simulated, interval: 1, mean_healthy: 0.000001, mean_unhealthy: 1000000"
    rows = f"  - {{name: a, {calm}}}\n  - {{name: b, {bad}}}\nroutes: {{/r: [b], /s: []}}\n"
    with Service(write_inventory(tmp_path, rows, "  workers: 1\n")) as service:
        service.wait_status("/", 200)
        service.wait_status("/r/x", 503)
        before = workers(service.pid)
        (victim,) = before.values()
        victim.kill()
        wait_for(lambda: new_ones(service.pid, before), BACK)

        def asked(path: str) -> int:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return service.get(path).status
            return 0

        wait_for(lambda: asked("/r/x") == 503, BACK)
        assert [asked(path) for path in ("/", "/s", "/-/readyz/r", "/-/readyz/s")] == [200, 404, 503, 200]


def pauses_after_kills(main: int, before: Container[int], times: int) -> list[float]:
    """Seconds until each new process, where the one that is not from before is killed again and again; math.inf of one
    that had lived for long then, on a machine that is slow."""
    pauses = []
    for _ in range(times):
        (victim,) = new_ones(main, before)
        known = workers(main)
        is_long = time.time() - victim.create_time() >= healthchecker.WORKER_LIFE - 1
        begin = time.monotonic()
        victim.kill()
        wait_for(lambda: new_ones(main, known), BACK)  # noqa: B023
        pauses.append(math.inf if is_long else time.monotonic() - begin)
    return pauses


@contextlib.contextmanager
def started(folder: Path, count: int) -> Iterator[Supervisor]:
    """Worker processes that are ready; time goes on for them as the test says, by `look`."""
    settings = load_inventory(write_inventory(folder, "", f"{SHOP}\n  workers: {count}")).service
    supervisor = Supervisor(settings, folder, listen("listen", settings.listen), Lease())
    with contextlib.closing(supervisor), quick_workers():
        supervisor.start()
        yield supervisor


def look_on(supervisor: Supervisor, begin: float, end: float) -> None:
    for half in range(int(2 * begin), int(2 * end) + 1):
        supervisor.look(half / 2)


def test_what_makes_no_turns_is_replaced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After HANG_TIME, one by one. (They may not serve, so that none turns its loop.)"""
    with started(folder, 2) as supervisor:
        before, begin = workers(os.getpid()), math.ceil(time.monotonic())
        look_on(supervisor, begin, begin + HANG_TIME)
        assert workers(os.getpid()) == before
        begin += HANG_TIME
        look_on(supervisor, begin + 0.5, begin + HANG_SPACING)
        assert "worker 0 hangs" in caplog.text and "worker 1 hangs" not in caplog.text
        wait_for(lambda: workers(os.getpid()).keys() != before.keys(), BACK)
        begin += HANG_SPACING
        look_on(supervisor, begin + 0.5, begin + 1)
        assert "worker 1 hangs" in caplog.text
        seconds = itertools.count(int(begin) + 2)
        wait_for(lambda: supervisor.look(next(seconds)) or len(new_ones(os.getpid(), before)) == 2, BACK)
        assert "worker 0 hung; starting another" in caplog.text


def test_nobody_is_judged_by_a_standstill(folder: Path) -> None:
    """Of a machine that was suspended, or of a whole service: the main process may be the first to go on."""
    with started(folder, 1) as supervisor:
        before, begin = workers(os.getpid()), math.ceil(time.monotonic())
        look_on(supervisor, begin, begin + 9)
        begin += 4000
        look_on(supervisor, begin, begin + HANG_TIME)
        assert workers(os.getpid()) == before
        look_on(supervisor, begin + HANG_TIME, begin + HANG_TIME + 1)
        assert not left_after(list(before.values()), BACK)


@pytest.mark.long
@pytest.mark.windows
def test_a_replacement_that_is_never_ready(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It hangs in its import, such as of a database behind a firewall that drops: it is killed, and tried again."""
    with started(folder, 1) as supervisor:
        (first,) = workers(os.getpid()).values()
        (folder / "shop.py").write_text(f"import time\nif 1:\n    time.sleep({BACK:g})\n", encoding="utf-8")
        first.kill()
        wait_for(lambda: supervisor.look(time.monotonic()) or new_ones(os.getpid(), {first.pid}), BACK)
        (hanging,) = new_ones(os.getpid(), {first.pid})
        begin = math.floor(time.monotonic())
        look_on(supervisor, begin, begin + READY_TIME - 1)
        assert hanging.is_running() and not supervisor.unserved, "clients have waited for a moment only"
        wait_for(lambda: supervisor.unserved, BACK)
        (folder / "shop.py").write_text(APP, encoding="utf-8")
        look_on(supervisor, begin + READY_TIME - 0.5, begin + READY_TIME + 3)
        assert not left_after([hanging], BACK)
        assert caplog.text.count("worker 0 hangs: not ready after 60 s; it is killed") == 1
        wait_for(lambda: supervisor.look(time.monotonic()) or not supervisor.unserved, BACK)
        assert caplog.text.count("worker 0 hung; starting another") == 1
        assert supervisor._patience == 2 * READY_TIME, "the next one may take longer"


@pytest.mark.long
@pytest.mark.windows
def test_no_worker_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The gate is open, and nobody answers at its door."""
    with Service(inventory(folder, workers=1)) as service:
        service.wait_status("/", 200)
        words = ["--inventory", str(service.inventory), "status"]
        wait_for(lambda: healthchecker.main(words) == 0)
        begun = folder / "begun"
        app = f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep({BACK:g})\n"
        (folder / "shop.py").write_text(app, encoding="utf-8")
        next(iter(workers(service.pid).values())).kill()
        wait_for(lambda: capsys.readouterr() and healthchecker.main(words) == 2, BACK)
        assert "CLOSED: gate unhealthy (no worker process is ready" in capsys.readouterr().out
        assert service.get_console("/-/health").status == 503
        assert "\nhealthchecker_gate_open 0.0\n" in service.get_console("/-/metrics").body
        wait_for(begun.exists, BACK)    # on Windows one that is ended while it imports complains


@pytest.mark.long
@POSIX
def test_workers_that_hang_are_replaced(folder: Path) -> None:
    """One is in a request on its loop, the other one is stopped."""
    with Service(inventory(folder, threads=0)) as service, socket.socket() as hanging:
        service.wait_status("/", 200)
        hanging.connect(address(service))
        hanging.sendall(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n")
        (came,) = wait_for(lambda: list(folder.glob("came-*")))
        before = workers(service.pid)
        (other,) = before.keys() - {int(came.name.split("-")[1])}
        before[other].suspend()
        wait_for(lambda: len(new_ones(service.pid, before)) == 2, BACK)
        with Clients(address(service), 1, keep=False) as client:
            wait_for(lambda: 200 in client.statuses, BACK)
        assert service.output.count("no turn of its loop for 10 s; it is killed") == 2
        hanging.settimeout(BACK)
        assert hanging.recv(1) == b""


def kill_at_random(folder: Path, times: int, seed: int, orphaned: float = ORPHANED) -> None:
    """Kills the main process at moments all over its start and soon after, and starts it again at once: on the same
    port, and nothing is left of the one before. Raises AssertionError."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = f"{SHOP}\n  workers: 2\n  listen: 127.0.0.1:{port}"
    path, chosen = write_inventory(folder, "", settings), random.Random(seed)
    for number in chosen.sample(range(times), times):
        moment = (number + chosen.random()) * 3 / times
        with psutil.Popen(command(path), env=environment(), creationflags=OWN_CONSOLE, stdout=-3, stderr=-1) as main:
            try:
                with contextlib.suppress(psutil.TimeoutExpired):
                    main.wait(moment)
                assert main.returncode is None, main.stderr.read()
                main.suspend()  # so that it starts no other one meanwhile
                family = family_of(main.pid)
            finally:
                main.kill()
            left = left_after(family, orphaned)
            for process in left:
                process.kill()
        assert not left, f"seed {seed}, after {moment:.3f} s"
    with Service(path) as service:
        service.wait_status("/", 200)


@pytest.mark.long
@pytest.mark.windows
def test_kills_of_the_main_process_leave_nothing(folder: Path) -> None:
    """(Some hundred of them: make soak.)"""
    kill_at_random(folder, 4, 11)


def test_a_killed_main_process_leaves_nothing(folder: Path) -> None:
    """Whatever its workers are at: one hangs in a request on its loop, the other while it starts."""
    with Service(inventory(folder, threads=0)) as service, socket.socket() as hanging:
        service.wait_status("/", 200)
        main = psutil.Process(service.pid)
        hanging.connect(address(service))
        hanging.sendall(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n")
        (came,) = wait_for(lambda: list(folder.glob("came-*")))
        at_work = int(came.name.split("-")[1])
        hang = "import pathlib, threading\npathlib.Path(__file__).with_name('began').touch()\n"
        (folder / "shop.py").write_text(f"{hang}threading.Event().wait()\n", encoding="utf-8")
        next(worker for pid, worker in workers(service.pid).items() if pid != at_work).kill()
        wait_for((folder / "began").is_file, BACK)
        family = family_of(main.pid)
        assert len(workers(service.pid)) == 2
        main.kill()  # whose code on Windows is that of a killed one: what begins just then may say that nobody is there
        left = left_after(family, ORPHANED)
        for process in left:
            process.kill()
        assert not left
        service.code = service.process.wait(ENDED)


def test_an_application_that_breaks_while_serving(folder: Path) -> None:
    """A worker that cannot be replaced is tried again with pauses, while the other one serves."""
    with Service(inventory(folder)) as service:
        service.wait_status("/", 200)
        (folder / "shop.py").write_text("raise RuntimeError('shop closed')\n", encoding="utf-8")
        before = workers(service.pid)
        victim, other = before
        with Clients(address(service), 8, pause=0.01) as clients:
            clients.holders_of(8)
            before[victim].kill()
            wait_for(lambda: service.output.count("RuntimeError: shop closed") >= 2, BACK)
            (folder / "shop.py").write_text(APP, encoding="utf-8")
            answered = len(clients.answers)
            wait_for(lambda: len(clients.answers) > answered + 20)
            assert {int(answer.body) for answer in clients.answers[answered:]} == {other}
        lines = [line for line in service.output.splitlines() if "RuntimeError: shop closed" in line]
        first, second = (datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f") for line in lines[:2])
        assert (second - first).total_seconds() >= 0.5
        assert not [lost for lost in clients.lost if int(lost.last or victim) != victim]
        assert set(clients.statuses) == {200}
        with Clients(address(service), 8, keep=False, pause=0.02) as clients:
            wait_for(lambda: len({answer.body for answer in list(clients.answers)}) == 2, BACK)
        assert "Traceback" not in service.output


@pytest.mark.long
@pytest.mark.windows
def test_an_application_that_loads_slowly_and_dies_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that it takes to load is no sign that it can live: its replacements come with pauses as well."""
    monkeypatch.setattr(healthchecker, "WORKER_LIFE", 3)
    (folder / "shop.py").write_text(f"{APP}\ntime.sleep(3.2)\n{DIES}", encoding="utf-8")
    with Team(folder, 1, SHOP) as team, Clients(team.address, 1, keep=False, pause=0.1, patience=0):
        died = wait_for(lambda: (found := [*folder.glob("died-*")])[1:] and found, 2 * BACK)
        at, pid = max(path.name.split("-")[1:] for path in died)
        wait_for(lambda: new_ones(os.getpid(), {int(pid)}), BACK)
        assert time.monotonic() - int(at) / 1e9 >= 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets one process lower the limits of another")
def test_a_replacement_that_cannot_be_started_now(folder: Path) -> None:
    """No descriptors, memory or processes left: the main process goes on, and tries again."""
    with Service(inventory(folder)) as service:
        service.wait_status("/", 200)
        resource: Any = importlib.import_module("resource")
        limits = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        before = workers(service.pid)
        before[min(before)].kill()
        service.wait_line("Too many open files")
        assert service.get().status == 200
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, limits)
        wait_for(lambda: len(workers(service.pid)) == 2, BACK)


@pytest.mark.skipif(sys.platform == "win32", reason="in wine the end of such a pipe ends pytest-xdist's worker")
@pytest.mark.parametrize("error", [OSError(11, "no more processes"), RuntimeError("can't start new thread")])
def test_whatever_a_replacement_lacks_may_come_back(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service does not end for it."""
    supervisor = Supervisor(ServiceSettings(workers="1"), Path(), [], Lease())
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    worker = WorkerProcess(0, multiprocessing.get_context("spawn").Process(), ours)     # which is not alive

    def refused(_number: int, _short: int = 0) -> WorkerProcess:
        raise error

    monkeypatch.setattr(supervisor, "_launch", refused)
    supervisor._replace(worker, time.monotonic())
    worker.due_mono = 0.0
    supervisor._replace(worker, time.monotonic())
    assert time.monotonic() < worker.due_mono < math.inf


def test_no_thread_that_hears_a_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody hears does not serve, nor is it left behind: not at the start, and not in the place of another."""
    start, refused = threading.Thread.start, {"worker 1"}

    def start_if(thread: threading.Thread) -> None:
        if thread.name in refused:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if)
    with pytest.raises(RuntimeError, match="new thread"), Team(folder, 2, SHOP):
        pass
    assert not workers(os.getpid())
    with Team(folder, 1, SHOP) as team:
        refused.add("worker 0")
        (worker,) = team.supervisor._workers
        worker.process.kill()
        wait_for(lambda: worker.short >= 2)
        wait_for(lambda: not workers(os.getpid()))
        refused.clear()
        wait_for(lambda: len(workers(os.getpid())) == 1, BACK)


# === The log file ============================================================
def record(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text})


@pytest.mark.parametrize("held", range(6))
def test_no_log_is_lost_while_somebody_reads_one(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On Windows what is open is not moved; elsewhere the calls that move it refuse. The newest grows until then."""
    monkeypatch.setattr(healthchecker, "LOG_BYTES", 100)
    path = tmp_path / "log"
    for number in range(1, 6):
        path.with_suffix(f".{number}").write_text(f"older {number}", encoding="utf-8")
    place = path.with_suffix(f".{held}") if held else path
    if not held:
        path.touch()
    with contextlib.ExitStack() as stack:
        if sys.platform == "win32":
            stack.enter_context(place.open("rb"))
        else:
            refusing = stack.enter_context(pytest.MonkeyPatch.context())

            def refused(call: Callable[..., None], *names: Any) -> None:
                if str(place) in map(str, names):
                    raise PermissionError(13, "in use")
                call(*names)

            for name in ("rename", "replace", "remove"):
                refusing.setattr(os, name, functools.partial(refused, getattr(os, name)))
        with contextlib.closing(LogFile(path)) as file:
            for number in range(40):
                file.emit(record(f"line {number:05}"))
        assert path.read_text(encoding="utf-8").split("\n")[:-1] == [f"line {number:05}" for number in range(40)]
        assert [path.with_suffix(f".{number}").read_text(encoding="utf-8") for number in range(1, 6)] == [
            f"older {number}" for number in range(1, 6)]  # fmt: skip
    assert [text.startswith(f"{path} cannot be moved, and grows: ") for text in caplog.messages] == [True]
    with contextlib.closing(LogFile(path)) as file:
        file.emit(record("line 00040"))
    assert path.read_text(encoding="utf-8") == "line 00040\n"
    assert path.with_suffix(".1").read_text(encoding="utf-8").endswith("line 00039\n")
    assert path.with_suffix(".2").read_text(encoding="utf-8") == "older 1"


def rotate_until_killed(path: str, renames: int) -> None:
    """For a process of its own, which ends before it renames a file once more than that."""
    left = iter(range(renames))
    sys.addaudithook(lambda name, _: os._exit(9) if name == "os.rename" and next(left, None) is None else None)
    with contextlib.closing(LogFile(Path(path))) as file:
        file.rotate()


def test_no_log_is_lost_by_a_kill(tmp_path: Path) -> None:
    """Between any two renames: the next rotation overwrites nothing but the oldest."""
    code, renames = 9, 0
    while code == 9:
        folder = tmp_path / str(renames)
        folder.mkdir()
        paths = [folder / "log", *(folder / f"log.{number}" for number in range(1, 6))]
        for number, path in enumerate(paths):
            path.write_text(f"older {number}\n", encoding="utf-8")
        process = fresh_processes().Process(target=rotate_until_killed, args=(str(paths[0]), renames))
        process.start()
        process.join(60)
        code, renames = process.exitcode, renames + 1
        with contextlib.closing(LogFile(paths[0])) as file:
            file.emit(record("newest"))
        if code == 9:
            with contextlib.closing(LogFile(paths[0])) as file:     # the one before has written all: its thread rotates
                file.rotate()
        lines = [line for path in paths if path.exists() for line in path.read_text(encoding="utf-8").splitlines()]
        lines.remove("newest")
        assert lines == [f"older {number}" for number in range(6)][: len(lines)] and len(lines) >= 5, renames
    assert code == 0 and renames > 5


FORKS = """
import logging, multiprocessing

def job():
    logging.getLogger("shop").warning("order of the child")

def app(environ, start_response):
    child = multiprocessing.get_context("fork").Process(target=job)
    child.start()
    child.join()
    start_response("200 OK", [])
    return [b"ok"]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows forks nothing")
def test_what_a_forked_child_logs_is_seen(tmp_path: Path) -> None:
    """It has no thread that sends it to the main process, and would keep it all."""
    (tmp_path / "forks.py").write_text(FORKS, encoding="utf-8")
    calm = "  - {name: db, platform: simulated, mean_healthy: 1000000}"
    with Service(write_inventory(tmp_path, calm, "  app: forks:app\n  workers: 1")) as service:
        service.wait_status("/", 200)
        wait_for(lambda: "order of the child" in service.output)


LEAVING = """
import logging

def app(environ, start_response):
    path = environ["PATH_INFO"]
    size = 2 << 30 if path.startswith("/leave") else 2
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size))])
    while size > 2:
        yield b"x" * (1 << 16)
    if path.startswith("/much"):
        yield b"okay"
    if path.startswith("/fail"):
        raise ValueError("failed")
    if path.startswith("/other"):
        {}["other"]
    logging.getLogger("shop").info("told %s", path)
    yield b"ok"
"""
MUCH = "application-written content exceeded the number of bytes specified by Content-Length header (2)"


def test_no_client_fills_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither who goes away before the answer nor who has the application fail again and again: of each place where it
    does there is one traceback a minute, with little of a path. What the application itself logs is all there."""
    (folder / "shop.py").write_text(LEAVING, encoding="utf-8")
    caplog.set_level(logging.INFO)
    with Team(folder, 1, f"{SHOP}\n  threads: 1") as team:
        for _ in range(5):
            for path in ("/fail", "/much", "/leave", "/other"):
                with socket.create_connection(team.address, timeout=60) as client:
                    request = f"GET {path}/{'x' * 9000} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                    client.sendall(request.encode())
                    assert client.recv(1)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))     # a reset
        for number in range(3):
            with contextlib.closing(http.client.HTTPConnection(*team.address, timeout=60)) as connection:
                connection.request("GET", f"/{number}")
                assert connection.getresponse().read() == b"ok"
        wait_for(lambda: "told /2" in caplog.text)
    told = [record for record in caplog.records if record.getMessage().startswith("worker 0: ")]
    texts = [re.sub("/xx+", "", record.getMessage().removeprefix("worker 0: ")) for record in told]
    texts = [text for text in texts if "service.send_buffer" not in text]   # where it fills before the reset is seen
    assert texts == ["Exception while serving /fail", MUCH, "told /much", "Exception while serving /other",
                     *["told /much"] * 4, "told /0", "told /1", "told /2"]  # fmt: skip
    assert max(len(record.getMessage()) for record in told if record.levelno > logging.INFO) < 1100
    assert [bool(record.exc_text) for record in told] == [text.startswith("Exception") for text in texts]


def test_how_many_complaints_were_kept_back_is_told() -> None:
    now_mono = 100.0
    spared, texts = SparingFilter(lambda: now_mono), list[str]()
    for seconds in (0.0, 1.0, 58.0, 1.0, 0.0, 60.0):
        now_mono += seconds
        one = logging.LogRecord("waitress", logging.WARNING, "task.py", 7, "failed at %s", ("/x" * 999,), None)
        texts += [one.getMessage()] if spared.filter(one) else []
    start = f"failed at {'/x' * 495}"
    assert texts == [start, f"{start} (2 more like it before)", f"{start} (1 more like it before)"]


MISSING = re.compile("[0-9: ,-]+ WARNING (.+) took nothing for a while: ([0-9]+) lines are missing")


def test_a_stderr_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes does not wait; what there is no room for is counted, and told once it goes on."""
    reader, writer = os.pipe()
    big = "\u00e4" * 1_000_000 + "\n"     # more than a pipe holds
    monkeypatch.setattr(healthchecker, "LOG_ROOM", sys.getsizeof(big) + 10 * sys.getsizeof("line 0\n"))
    with open(writer, "w", encoding="utf-8") as plain, open(reader, "rb") as end, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(sys, "stderr", plain)
        with healthchecker.stderr_in_thread():
            stderr: Any = sys.stderr
            assert sys.stderr.write(big) == len(big)
            for number in range(10, 23):
                sys.stderr.write(f"line {number}"[:6] + "\n")
            assert stderr._dropped == 3
            read = pool.submit(end.read)
            wait_for(lambda: not stderr._dropped)
            print("last words", file=sys.stderr)
        assert sys.stderr is plain
        print("words of a thread that nobody waits for", file=stderr, flush=True)
        plain.close()
        lines = read.result(60).decode().splitlines()
        told = MISSING.fullmatch(lines.pop(11))
        assert told and told.groups() == ("stderr", "3")
        assert lines == [big[:-1], *["line 1"] * 10, "last words", "words of a thread that nobody waits for"]


def test_what_waits_is_bounded_by_bytes() -> None:
    """However few writes they are."""
    goes_on, text = threading.Event(), "x" * (1 << 18)
    with contextlib.closing(LineThread("slow", lambda rest: goes_on.wait() and len(rest))) as stream:
        for _ in range(100):
            stream.write(text)
        assert stream._dropped == 96 and stream._waits < healthchecker.LOG_ROOM + 2 * len(text)
        goes_on.set()


def test_what_tells_what_is_missing_may_wait_as_well() -> None:
    """Then, too, nobody waits for room; and for what the main process needs there always is some."""
    taken: list[str] = []
    takes, told = threading.Semaphore(0), threading.Event()

    def send(rest: memoryview) -> int:
        if MISSING.fullmatch(bytes(rest).decode().strip()):
            told.set()
        takes.acquire()
        taken.append(bytes(rest).decode())
        return len(rest)

    with contextlib.closing(LineThread("slow", send)) as stream:
        stream.write("x" * healthchecker.LOG_ROOM)
        stream.write("dropped")
        takes.release()
        assert told.wait(60)
        stream.write("y" * healthchecker.LOG_ROOM)
        begun_mono = time.monotonic()
        for _ in range(30):
            stream.write("dropped")
        assert time.monotonic() - begun_mono < 10 and stream._dropped == 30
        stream.write("ready", needed=True)
        takes.release(10)
        wait_for(lambda: not stream._dropped)
    assert taken[2:4] == ["y" * healthchecker.LOG_ROOM, "ready"] and "30 lines are missing" in taken[4]


def test_a_stderr_that_is_read_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast it comes: who is faster than the thread waits for it."""
    monkeypatch.setattr(healthchecker, "LOG_PATIENCE", 60.0)
    monkeypatch.setattr(healthchecker, "LOG_ROOM", 1000)
    with open(tmp_path / "log", "w", encoding="utf-8") as plain:
        monkeypatch.setattr(sys, "stderr", plain)
        with healthchecker.stderr_in_thread():
            for number in range(5000):
                sys.stderr.write(f"line {number}\n")
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines() == [f"line {number}" for number in range(5000)]


def test_a_stderr_that_tells_what_is_missing_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for room holds the lock of the handler to which others log."""
    reader, writer = os.pipe()
    monkeypatch.setattr(healthchecker, "LOG_ROOM", 1000)
    with open(writer, "w", encoding="utf-8") as plain, open(reader, "rb") as end, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(sys, "stderr", plain)
        with healthchecker.stderr_in_thread():
            handler = logging.StreamHandler()
            logger = logging.Logger("shop")
            logger.addHandler(handler)
            with handler.lock or contextlib.nullcontext():
                sys.stderr.write("x" * 1_000_000)
                logger.warning("dropped")
                read = pool.submit(end.read)
                stderr: Any = sys.stderr
                wait_for(lambda: not stderr._dropped)
            logger.warning("told")
        plain.close()
        first, last = read.result(60).decode().splitlines()
        told = MISSING.fullmatch(first.lstrip("x"))
        assert told and told[2] == "1" and last == "told"


def test_a_stderr_that_takes_nothing_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for a little while. What nobody can read any more is no error."""
    monkeypatch.setattr(healthchecker, "LOG_END", 0.1)
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as plain, open(reader, "rb"):
        monkeypatch.setattr(sys, "stderr", plain)
        with healthchecker.stderr_in_thread():
            stderr: Any = sys.stderr
            stderr.write("x" * 1_000_000)
        assert stderr.thread.is_alive()
        plain.flush()   # as the end of the process does; it waits for nobody
    stderr.thread.join(60)
    assert not stderr.thread.is_alive()


@pytest.mark.parametrize("stderr", [None, io.StringIO()], ids=["none, as under pythonw", "no file"])
def test_a_stderr_that_stays_as_it_is(stderr: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    with healthchecker.stderr_in_thread():
        assert sys.stderr is stderr


def test_a_log_without_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost before a start says what is wrong."""
    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with open(tmp_path / "stderr", "w", encoding="utf-8") as plain:
        monkeypatch.setattr(sys, "stderr", plain)
        with healthchecker.stderr_in_thread(), contextlib.closing(LogFile(tmp_path / "log")) as file:
            file.emit(record("in the file"))
            print("on stderr", file=sys.stderr)
            for name in ("log", "stderr"):
                assert (tmp_path / name).read_text(encoding="utf-8") in ("in the file\n", "on stderr\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_a_log_file_that_takes_nothing(tmp_path: Path) -> None:
    """As on a share that hangs: who logs does not wait."""
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    with open(reader, "rb") as end, ThreadPoolExecutor(1) as pool:
        with contextlib.closing(LogFile(tmp_path / "log")) as file:
            texts = ["x" * 1_000_000, "y" * 1_000_000, "z"]
            for text in texts:
                file.emit(record(text))
            os.set_blocking(reader, True)
            read = pool.submit(end.read)
            wait_for(lambda: not file.stream._dropped)
        *lines, last = read.result(60).decode().splitlines()
        told = MISSING.fullmatch(last)
        assert lines == texts[:2] and told and told.groups() == ("service.log_file", "1")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_what_is_no_file_is_not_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as /dev/stdout, which would be moved away."""
    monkeypatch.setattr(healthchecker, "LOG_BYTES", 10)
    os.mkfifo(tmp_path / "log")
    with open(os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK), "rb") as end:
        with contextlib.closing(LogFile(tmp_path / "log")) as file:
            file.emit(record("more than ten bytes"))
        assert end.read() == b"more than ten bytes\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_complaints_of_several_failures_are_told_once_each(tmp_path: Path) -> None:
    """All errors of a library are raised in one of its lines; in the log file as on stderr."""
    def fails(error: type[Exception]) -> None:
        raise error("no")

    logger, told = logging.Logger("waitress"), [io.StringIO(), io.StringIO()]
    logger.addFilter(SparingFilter())
    for stream in told:
        logger.addHandler(logging.StreamHandler(stream))
    for _ in range(2):
        for call in (lambda: fails(KeyError), lambda: fails(ValueError),
                     lambda: fails(KeyError)):  # fmt: skip
            try:
                call()
            except (KeyError, ValueError):
                logger.exception("failed")
    assert [stream.getvalue().count("failed\n") for stream in told] == [3, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is full is Linux's")
def test_a_complaint_that_nobody_hears_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is full, and the reader of the errors is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        with healthchecker.stderr_in_thread(), contextlib.closing(LogFile(Path("/dev/full"))) as file:
            for handler in (handlers := [logging.StreamHandler(), file]):
                healthchecker.log.addHandler(handler)
            try:
                for _ in range(3):
                    healthchecker.log.error("not heard")
                wait_for(lambda: file._writing.why and file.stream._texts.empty())
                assert file.stream.thread.is_alive()
            finally:
                for handler in handlers:
                    healthchecker.log.removeHandler(handler)


# === The start ===============================================================
# what the application does when it is imported, its name, what is said about it ("": nothing)
ASGI = "is an ASGI application"
NOT_WSGI = "does not take (environ, start_response)"
FACTORY = f"{NOT_WSGI}: for a factory write `module:factory()`"
APPLICATIONS = {
    "there is none": (None, "app", "ModuleNotFoundError: No module named"),
    "raises": ("raise RuntimeError('shop\\nclosed')", "app", "RuntimeError: shop closed"),
    "exits": ("raise SystemExit('bye')", "app", "SystemExit: bye"),
    "syntax": ("def app(:", "app", "SyntaxError"),
    "own import missing": ("import nothing_there", "app", "No module named 'nothing_there'"),
    "has no such name": ("application = 1", "app", "has no attribute 'app'"),
    "is not callable": ("app = 1", "app", "is not callable"),
    "function": ("def app(environ, start_response): ...", "app", ""),
    "nested": ("class A:\n def app(self, environ, start_response): ...\na = A()", "a.app", ""),
    "class": ("class App:\n def __init__(self, environ, start_response): ...", "App", ""),
    "more that it may be given": ("def app(environ, start_response, more=None): ...", "app", ""),
    "whatever it is given": ("def app(*given): ...", "app", ""),
    "Flask": ("import flask\napp = flask.Flask(__name__)", "app", ""),
    "Flask in a factory": ("import flask\ndef create_app(): return flask.Flask(__name__)", "create_app()", ""),
    "factory": ("def create_app(): ...", "create_app", FACTORY),
    "factory with defaults": ("def create_app(config=None, name=None): ...", "create_app", FACTORY),
    "factory that wants something": ("def create_app(config): ...", "create_app", NOT_WSGI),
    "factory that raises": ("def create_app(): raise OSError('full')", "create_app()", "OSError: full"),
    "factory of nothing": ("def create_app(): ...", "create_app()", "is not callable"),
    "ASGI function": ("async def app(scope, receive, send): ...", "app", ASGI),
    "ASGI object": ("class A:\n async def __call__(self, scope, receive, send): ...\napp = A()", "app", ASGI),
    "ASGI in a factory": ("async def app(*given): ...\ndef create_app(): return app", "create_app()", ASGI),
}


@pytest.mark.parametrize(("source", "name", "said"), APPLICATIONS.values(), ids=APPLICATIONS)
def test_load_app(tmp_path: Path, source: str | None, name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"shop_{next(NUMBERS)}"
    monkeypatch.setattr(sys, "path", sys.path[:])
    if source:
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
    service = ServiceSettings(app=f"{module}:{name}")
    if not said:
        assert callable(load_app(service.app or "", tmp_path))
        return
    with pytest.raises(UsageError) as caught:
        load_app(service.app or "", tmp_path)
    assert said in str(caught.value) and str(caught.value).startswith(f"service.app {module}:{name} ")
    assert "\n" not in str(caught.value)


ENDS = {
    "ends the process": ("import os; os._exit(3)", "worker 0 ended with exit code 3"),
    "leaves a thread": (
        "import threading\nthreading.Thread(target=threading.Event().wait).start()\napp = 1",
        "service.app shop:app is not callable",
    ),
}


@pytest.mark.parametrize(("source", "said"), ENDS.values(), ids=ENDS)
def test_bad_application(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "shop.py").write_text(source, encoding="utf-8")
    with pytest.raises(UsageError) as caught, Team(tmp_path, 1, SHOP):
        pass
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not workers(os.getpid())


def test_bad_application_ends_the_start(tmp_path: Path) -> None:
    """With one line and exit code 2. That its output ends says that nobody is left who holds it."""
    (tmp_path / "shop.py").write_text("raise SystemExit(0)", encoding="utf-8")
    main = Service(inventory(tmp_path)).launch()
    with main.stdout:
        *started, last = main.stdout.read().splitlines()
    assert main.wait(ENDED) == 2, last
    assert last.startswith("service.app shop:app ")
    assert all(line.endswith("of 2 worker processes are ready") for line in started), "this machine is slow at most"
    assert not (tmp_path / "healthchecker.db").exists() and not (tmp_path / "keys").exists()


@POSIX
def test_a_worker_that_is_killed_at_the_start(tmp_path: Path) -> None:
    """By a kernel that lacks memory, say: not with an exit code after which nobody starts the service again."""
    (tmp_path / "shop.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", encoding="utf-8")
    with pytest.raises(healthchecker.KilledError, match="ended with exit code -9") as caught, Team(tmp_path, 1, SHOP):
        pass
    assert caught.value.exit_code == 1


@pytest.mark.long
@POSIX
def test_an_interrupt_of_all_at_the_start(folder: Path) -> None:
    """Ctrl-C while the workers start: no tracebacks of theirs, and nothing is left that holds the output."""
    with psutil.Popen(
        command(inventory(folder)), env=environment(), start_new_session=True, stdout=-1, stderr=-2, encoding="utf-8"
    ) as main:
        try:
            wait_for(lambda: len(workers(main.pid)) == 2, BACK)
            os.killpg(main.pid, signal.SIGINT)
            output = main.communicate(timeout=ENDED)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(main.pid, signal.SIGKILL)
    assert main.returncode == 0
    assert "Traceback" not in output and "Interrupt" not in output, output


@pytest.mark.long
@pytest.mark.windows
def test_the_end_of_a_start_that_takes_long(folder: Path) -> None:
    """It tells how far it is, and does not wait for what the application does when it is imported."""
    (folder / "shop.py").write_text("import time\ntime.sleep(60)", encoding="utf-8")
    main = Service(inventory(folder)).launch()
    with main.stdout:
        try:
            assert main.stdout.readline().endswith("INFO 0 of 2 worker processes are ready\n")
            family = family_of(main.pid)
            ask_to_end(main)
            assert main.wait(ENDED) == 0
            assert not left_after(family, ORPHANED)
        finally:
            main.kill()


def test_who_comes_while_it_starts_waits(folder: Path) -> None:
    """The door is open before anything slow, also without a socket of systemd's."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    slow = "HERE.joinpath('began').touch()\nwhile not HERE.joinpath('go').exists():\n    time.sleep(0.02)\n"
    (folder / "shop.py").write_text(APP + slow, encoding="utf-8")
    main = Service(write_inventory(folder, "", f"{SHOP}\n  listen: 127.0.0.1:{port}")).launch()
    with main.stdout:
        try:
            wait_for((folder / "began").is_file, BACK)
            with socket.create_connection(("127.0.0.1", port), timeout=BACK) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                (folder / "go").touch()
                assert sock.recv(12) == b"HTTP/1.1 200"
            ask_to_end(main)
            assert main.wait(ENDED) == 0
        finally:
            main.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of open files there")
def test_a_start_that_lacks_descriptors(folder: Path) -> None:
    """Workers that were started before the one that could not be are ended."""
    resource: Any = importlib.import_module("resource")
    with Team(folder, 1, SHOP):
        pass  # so that what all processes share is open already
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(6, 40):
        gc.collect()    # what others have left open would make room meanwhile
        before, team = open_descriptors(), Team(folder, 2, SHOP)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (before + spare, limits[1]))
            with pytest.raises(OSError), quick_workers():
                team.supervisor.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        started = workers(os.getpid())
        team.supervisor.close()
        if started:
            break
    assert started, "no limit was enough for the first one and too low for the second"
    assert not workers(os.getpid())


# === The end =================================================================
def interrupt(service: Service) -> None:
    """Ctrl-C: to the main process and its workers. (Windows: as every request to end there.)"""
    if sys.platform == "win32":
        ask_to_end(service.process)
    else:
        os.killpg(service.pid, signal.SIGINT)


@pytest.mark.parametrize(
    ("end", "threads"),
    [(lambda service: ask_to_end(service.process), 4), (interrupt, 0)],
    ids=["SIGTERM-pool", "Ctrl-C-loop"],
)
def test_the_end_loses_no_request(folder: Path, end: Callable[[Service], None], threads: int) -> None:
    """Slow requests on both workers, busy connections, new ones, pipelines, one that has yet to ask."""
    with (folder / "shop.py").open("a", encoding="utf-8") as shop:
        shop.write("healthchecker.LAST_ASK = 3\n")  # the one that has yet to ask may be late
    with Service(inventory(folder, threads)) as service, contextlib.ExitStack() as stack:
        service.wait_status("/", 200)
        loads = [
            stack.enter_context(on_all(address(service), 12, workers(service.pid), "/slow?0.1")),
            stack.enter_context(Clients(address(service), 8)),
            stack.enter_context(Clients(address(service), 4, keep=False)),
        ]
        wait_for(lambda: all(requests_of(folder, pid) > 3 for pid in workers(service.pid)))
        late, pipeline = (stack.enter_context(socket.create_connection(address(service), timeout=60)) for _ in range(2))
        came = len(list(folder.glob("came-*")))
        pipeline.sendall(b"GET /slow?0.1 HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        wait_for(lambda: len(list(folder.glob("came-*"))) > came + 12)
        pids, family = workers(service.pid), family_of(service.pid)
        asked = time.monotonic()
        end(service)
        late.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert service.process.wait(ENDED) == 0
        for clients in loads:
            clients.join(60)
        # Between a worker's last look at its door and closing that, the system may connect somebody, whom it resets.
        assert not [lost for clients in loads for lost in clients.lost if lost.opened < asked]
        assert set().union(*(clients.statuses for clients in loads)) == {200}
        afterwards = [answer for answer in loads[0].answers if answer.received > asked]
        assert {int(answer.body) for answer in afterwards if answer.sent < asked} == set(pids)
        assert any(answer.headers.get("connection") == "close" for answer in afterwards)
        assert answers_of(late) == 1
        assert answers_of(pipeline) == 3
        assert not left_after(family, ORPHANED)


@pytest.mark.long
@pytest.mark.windows
def test_what_the_end_does_not_wait_for(folder: Path) -> None:
    """Requests that take longer than `drain` are cut, and told of."""
    settings = "  app: shop:app\n  drain: 3"
    with Service(write_inventory(folder, "", settings)) as service, contextlib.ExitStack() as stack:
        service.wait_status("/", 200)
        socks = [stack.enter_context(socket.create_connection(address(service), timeout=60)) for _ in range(3)]
        for sock, seconds in zip(socks, (60, 60, 0.1), strict=True):
            sock.sendall(b"GET /slow?%g HTTP/1.1\r\nHost: x\r\n\r\n" % seconds)
        wait_for(lambda: len(list(folder.glob("came-*"))) == 3)
        ask_to_end(service.process)
        assert service.process.wait(ENDED) == 0
        assert [sock.recv(15) for sock in socks] == [b"", b"", b"HTTP/1.1 200 OK"]
        service.wait_line("requests cut, for they took longer than service.drain, 3 s: 2")


def answers_of(sock: socket.socket) -> int:
    """How many whole answers, all 200, come until the connection ends."""
    with sock.makefile("rb") as stream:
        received, count = stream.read(), 0
    while received:
        answer = parse(received)
        assert answer and answer[0] == 200, received
        received, count = received[answer[3] :], count + 1
    return count


@pytest.mark.long
@pytest.mark.windows
def test_the_end_of_workers_that_hang(folder: Path) -> None:
    """One in a request on its loop, the other one is frozen and has to be killed."""
    with Service(inventory(folder, threads=0)) as service, socket.socket() as hanging:
        service.wait_status("/", 200)
        hanging.connect(address(service))
        hanging.sendall(b"GET /hang HTTP/1.1\r\nHost: x\r\n\r\n")
        (came,) = wait_for(lambda: list(folder.glob("came-*")))
        family = family_of(service.pid)
        for pid, worker in workers(service.pid).items():
            if pid != int(came.name.split("-")[1]):
                worker.suspend()
        ask_to_end(service.process)
        assert service.process.wait(ENDED) == 0
        assert service.output.count("does not end and is killed") == 1
        assert not left_after(family, ORPHANED)


def test_what_an_application_leaves_does_not_keep_the_service(folder: Path) -> None:
    """A thread, a process, and a fork that has every descriptor of its worker."""
    with Service(inventory(folder)) as service:
        service.wait_status("/", 200)
        with contextlib.ExitStack() as stack:
            left: dict[str, list[int]] = {}
            while len(left) < 2:
                connection, pid = stack.enter_context(connected(service))
                if pid not in left:
                    connection.request("GET", "/leave")
                    left[pid] = json.loads(connection.getresponse().read())
        orphans = [psutil.Process(pid) for pids in left.values() for pid in pids]
        try:
            victim = int(next(iter(left)))
            before = workers(service.pid)
            before[victim].kill()
            wait_for(lambda: new_ones(service.pid, before), BACK)
            # On Windows one that starts complains of its end.
            wait_for(lambda: answering_pid(service) not in left, BACK)
            ask_to_end(service.process)
            assert service.process.wait(ENDED) == 0
            assert not left_after(list(before.values()), ORPHANED)
            socket.create_server(address(service)).close()
            if sys.platform != "win32":  # where the event that ends the service goes to all of its console
                assert all(orphan.is_running() for orphan in orphans), "they are not ours to end"
        finally:
            for orphan in orphans:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()


# === The doors ===============================================================
def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


def test_a_name_listens_on_all_its_addresses(folder: Path) -> None:
    """localhost: of both families, at both doors; none of its connections is lost at the end."""
    both = "  listen: localhost:0\n  console: localhost:0\n  workers: 1\n  app: shop:app"
    families = {found[0] for found in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    expected = ["127.0.0.1", *(["::1"] if has_ipv6() and socket.AF_INET6 in families else [])]
    with Service(write_inventory(folder, "", both)) as service:
        assert service.host == service.console[0] == "localhost"
        service.wait_status("/", 200)
        for host in expected:
            for port, path in ((service.port, "/"), (service.console[1], "/-/livez")):
                connection = http.client.HTTPConnection(host, port, timeout=60)
                with contextlib.closing(connection):
                    connection.request("GET", path)
                    assert connection.getresponse().status == 200, (host, port)
        for host in expected:
            with socket.create_connection((host, service.port), timeout=60) as slow:
                slow.sendall(b"GET /slow?0.5 HTTP/1.1\r\nHost: x\r\n\r\n")
                if host == expected[-1]:
                    wait_for(lambda: len(list(folder.glob("came-*"))) == len(expected))
                    ask_to_end(service.process)
                assert slow.recv(12) == b"HTTP/1.1 200"
        service.process.wait(60)


def test_one_port_for_all_addresses() -> None:
    socks = listen("service.listen", "localhost:0")
    try:
        assert len({sock.getsockname()[1] for sock in socks}) == 1
        assert len({sock.family for sock in socks}) == len(socks)
    finally:
        for sock in socks:
            sock.close()


def test_a_port_that_becomes_free() -> None:
    """Workers of a service that was killed just now hold it a moment longer."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        threading.Timer(0.3, taken.close).start()
        (sock,) = listen("service.listen", f"127.0.0.1:{port}")
    with sock:
        assert sock.getsockname()[1] == port


OF_LINUX = pytest.mark.skipif(sys.platform == "win32", reason="who has one address keeps nobody from all of them there")
SAME_DOORS = [
    ("127.0.0.1", "127.1"),
    ("127.0.0.1", "localhost"),
    ("localhost", "127.0.0.1"),
    *(pytest.param(*both, marks=OF_LINUX) for both in [
        ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "localhost"), ("[::]", "127.0.0.1"),
        ("[::1]", "[::]"), ("0.0.0.0", "[::ffff:127.0.0.1]")]),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME_DOORS)
def test_one_door_that_is_written_in_two_ways(one: str, other: str) -> None:
    """It is said at once: nobody else has to stop, and no wait makes it free."""
    with contextlib.ExitStack() as stack:
        if "[" in one + other and not socket.has_dualstack_ipv6():
            pytest.skip("no IPv6 here")
        doors = [stack.enter_context(sock) for sock in listen("service.listen", f"{one}:0")]
        console = f"{other}:{doors[0].getsockname()[1]}"
        with pytest.raises(UsageError, match=re.escape(f"service.console {console} is the address of --listen; write")):
            listen("service.console", console, 3600.0, ("--listen", doors))


def test_a_port_of_another_program_is_no_door_of_ours() -> None:
    with contextlib.ExitStack() as stack:
        doors = [stack.enter_context(sock) for sock in listen("service.listen", "127.0.0.1:0")]
        taken = stack.enter_context(socket.create_server(("127.0.0.2", doors[0].getsockname()[1])))
        with pytest.raises(UsageError, match="another program uses that port"):
            listen("service.console", f"127.0.0.2:{taken.getsockname()[1]}", 0.0, ("service.listen", doors))


def adopting(folder: Path, port: int, *socks: socket.socket, more: str = "") -> subprocess.Popen[bytes]:
    """A service on `port` that gets `socks` as systemd gives them: from descriptor 3 on, with its own process id."""
    listens = f"  workers: 1\n  listen: 127.0.0.1:{port}{more}"
    path = write_inventory(folder, "  - {name: calm, platform: simulated, mean_healthy: 1000000}", listens)
    numbers = [sock.fileno() for sock in socks]
    code = (
        f"import fcntl, os, sys; kept = [fcntl.fcntl(number, fcntl.F_DUPFD, 100) for number in {numbers}]\n"
        "for place, number in enumerate(kept, 3): os.dup2(number, place)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(kept)))\n"
        "os.execv(sys.executable, sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *command(path)],
        pass_fds=numbers,
        env=environment(None),
        stderr=subprocess.PIPE,
    )


HELLO = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "5")])
    return [b"Hello"]
"""


def ask_once(address: tuple[str, int]) -> int:
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        connection.request("GET", "/")
        return connection.getresponse().status


def keep_asking(address: tuple[str, int], over: threading.Event, answers: list[tuple[int, bytes]], path: str = "/", *,
                keep: bool) -> None:
    """A client of the application, or a proxy that asks for it, on a connection that it keeps, or on a new one for each
    request. Raises what it was refused with; one that a connection ended before the answer began asks again, if it had
    kept that."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=120)) as connection:
        while not over.is_set():
            was_kept = connection.sock is not None
            try:
                connection.request("GET", path, headers={} if keep else {"Connection": "close"})
                answer = connection.getresponse()
            except (ConnectionResetError, BrokenPipeError):     # RemoteDisconnected is one, too
                connection.close()
                if not was_kept:
                    raise
                continue
            answers.append((answer.status, answer.read()))


def restart_often(folder: Path, restarts: int, requests: int) -> int:
    """Whoever comes while no process is there waits for the next one: the socket is systemd's. So many requests or some
    more are sent to an application behind the gate; gives their number. Raises AssertionError, or what a client was
    refused with."""
    prepared_keys(folder)
    (folder / "hello.py").write_text(HELLO, encoding="utf-8")
    over, answers = threading.Event(), list[tuple[int, bytes]]()

    with (
        socket.create_server(("127.0.0.1", 0)) as sock,
        ThreadPoolExecutor(8) as pool,
        contextlib.ExitStack() as ending,
    ):
        ending.callback(over.set)
        address, clients = sock.getsockname(), list[Future[None]]()
        for number in range(restarts + 1):
            with adopting(folder, address[1], sock, more="\n  app: hello:app") as process, \
                    contextlib.ExitStack() as stack:  # fmt: skip
                stack.callback(process.kill)
                assert process.stderr
                said = list(itertools.takewhile(lambda line: b"serving on" not in line, process.stderr))
                assert process.poll() is None, said
                if not clients:
                    wait_for(lambda: ask_once(address) == 200)      # from the first result on nobody is refused
                    for keep, path in [*itertools.product((True, False), ("/", "/-/readyz"))] * 2:
                        clients.append(pool.submit(keep_asking, address, over, answers, path, keep=keep))
                wanted = max(len(answers) + 50, requests * number // restarts)
                wait_for(lambda wanted=wanted: len(answers) > wanted or any(map(Future.done, clients)), 600)
                if number == restarts:
                    over.set()
                    assert [client.result(120) for client in clients] == [None] * 8, "nobody was refused"
                process.terminate()
                assert b"Traceback" not in process.stderr.read() and process.wait(60) == 0
    assert set(answers) == {(200, b"Hello"), (200, b"open\n")}
    return len(answers)


@pytest.mark.long
@POSIX
def test_a_restart_refuses_nobody(tmp_path: Path) -> None:
    """(Ten restarts, 20,000 requests: make soak.)"""
    assert restart_often(tmp_path, 2, 100) > 100


@pytest.mark.long
@POSIX
def test_a_socket_that_nobody_would_answer(tmp_path: Path) -> None:
    prepared_keys(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
        process = adopting(tmp_path, 0, sock)
        _, said = process.communicate(timeout=60)
    expected = f"systemd listens on {address}, which is neither service.listen nor service.console"
    assert process.returncode == 2 and said.decode() == f"{expected}; correct its ListenStream\n"


@pytest.mark.long
@POSIX
def test_two_doors_on_one_port(tmp_path: Path) -> None:
    """Of two addresses: each socket belongs to its own door, or clients would reach the console."""
    prepared_keys(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        with socket.create_server(("127.0.0.2", port)) as console:
            more = f"\n  console: 127.0.0.2:{port}"
            with adopting(tmp_path, port, console, door, more=more) as process, contextlib.ExitStack() as stack:
                stack.callback(process.kill)
                assert process.stderr
                wait_for(lambda said=process.stderr: b"serving on" in said.readline())
                found = {}
                for address in ("127.0.0.1", "127.0.0.2"):
                    connection = http.client.HTTPConnection(address, port, timeout=60)
                    with contextlib.closing(connection):
                        connection.request("GET", "/-/login")
                        found[address] = connection.getresponse().status
    assert found == {"127.0.0.1": 404, "127.0.0.2": 200}
