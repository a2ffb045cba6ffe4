"""Serve: the real process, from its start to its end."""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from conftest import wait_for
from console import Client, prepared_database
from service import (
    PROGRAM,
    SERVING,
    Program,
    Service,
    ask_to_end,
    command,
    environment,
    prepared_keys,
    prepared_tables,
    write_inventory,
)

HERE = "  - {name: here, platform: local, interval: 1, timeout: 10}"
EXAMPLE = PROGRAM.with_name("inventory.example.yaml")
ENDED = 60.0  # seconds that the end may take, however busy the machine is
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="platform local and signals are POSIX's")

# An application: /slow takes 1.5 s, /hang never ends, everything else answers at once; a file tells who came.
APP = """
import pathlib, threading

def app(environ, start_response):
    path = environ["PATH_INFO"]
    pathlib.Path(__file__).with_name("came" + path.replace("/", "-")).touch()
    threading.Event().wait({"/slow": 1.5, "/hang": 3600}.get(path, 0))
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
    return [b"done"]
"""


@pytest.fixture
def application(tmp_path: Path) -> str:
    """The line of `service` that names the application above."""
    (tmp_path / "shop.py").write_text(APP, encoding="utf-8")
    return "  app: shop:app"


def listen_on(path: Path, address: str) -> Path:
    text = path.read_text(encoding="utf-8").replace("listen: 127.0.0.1:0", f"listen: {address}")
    path.write_text(text, encoding="utf-8")
    return path


class Request(threading.Thread):
    """A GET in flight; `answer` is its status, headers and body, or what went wrong."""

    def __init__(self, service: Service, path: str) -> None:
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection(service.host, service.port, timeout=20)
        self.connection.connect()
        self.path, self.answer = path, "nothing yet"
        self.headers: dict[str, str | None] = {}

    def run(self) -> None:
        with contextlib.closing(self.connection):
            try:
                self.connection.request("GET", self.path)
                answer = self.connection.getresponse()
                self.headers["connection"] = answer.getheader("Connection")
                self.answer = f"{answer.status} {answer.read().decode()}"
            except (OSError, http.client.HTTPException) as error:
                self.answer = repr(error)


# As an account that may have so many threads (for root no such limit holds), in the processes that are called so.
FEW_THREADS = """
import _thread, sys, threading
def start(*given, genuine=_thread.start_new_thread, **more):
    if _thread._count() >= %d:
        raise RuntimeError("can't start new thread")
    return genuine(*given, **more)
if "%s" in " ".join(sys.orig_argv):
    _thread.start_new_thread = threading._start_new_thread = start
"""
MAIN, WORKER = PROGRAM.name, "spawn_main"
MANY = '  - {hostname: "sim[001:100].example.com", platform: simulated, mean_healthy: 1000000, seed: 1}\n'


def with_threads(folder: Path, number: int, name: str = "") -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(FEW_THREADS % (number, name), encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.long
def test_more_hosts_than_threads(tmp_path: Path) -> None:
    """Pollers take what the others leave, and what has none says what to raise; a restart would change nothing."""
    path = write_inventory(tmp_path, MANY, "  workers: 1")
    with Program(path, env=with_threads(tmp_path, 60)) as service:
        service.wait_line("its poller died (can't start new thread: raise TasksMax= of the unit, or `ulimit -u` of")
        service.wait_status("/-/livez", 200)
        assert service.get_console("/-/livez").status == 200
        assert service.get("/-/readyz").status == 503


@pytest.mark.long
@pytest.mark.parametrize(("number", "name"), [(3, ""), (0, MAIN), (1, MAIN), (0, WORKER), (1, WORKER), (3, WORKER)])
def test_no_threads_at_all(number: int, name: str, tmp_path: Path, application: str) -> None:
    """One line, and an exit code after which a service manager tries again; no worker keeps it from its end."""
    path = write_inventory(tmp_path, MANY, f"{application}\n  threads: 4\n  workers: 2")
    service = Program(path, env=with_threads(tmp_path, number, name))
    service.begin()
    try:
        assert service.process.wait(60) == 1, service.output
        service.wait_line("can't start new thread: raise TasksMax= of the unit, or `ulimit -u` of the account")
        assert "Traceback" not in service.output
    finally:
        service.kill()


@pytest.mark.long
def test_no_threads_for_a_replacement(tmp_path: Path) -> None:
    """It is tried again until there are some."""
    with Program(write_inventory(tmp_path, HERE), env=with_threads(tmp_path, 60, WORKER)) as service:
        service.wait_status("/", 200)
        with_threads(tmp_path, 0, WORKER)
        (worker,) = [one for one in psutil.Process(service.pid).children() if "--multiprocessing-fork" in one.cmdline()]
        worker.kill()
        service.wait_line("can't start new thread: raise TasksMax= of the unit, or `ulimit -u` of the account; start")
        with_threads(tmp_path, 60, WORKER)
        service.wait_status("/", 200)


# In which a file cannot be opened for want of descriptors, as long as another one is there.
NO_DESCRIPTOR = """
import builtins, errno, io, os
def refuse(path, *given, genuine=open, **more):
    if str(path) == %r and os.path.exists(%r):
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE), str(path))
    return genuine(path, *given, **more)
builtins.open = io.open = refuse
"""
# In which no file can become as large as those of SQLite, which SQLite calls what it calls a quota.
NO_GROWTH = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""


def begun_with(folder: Path, code: str, service: str = "") -> Program:
    """A start that has run such code; `kill` is for who called."""
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    prepared_keys(folder)
    prepared_tables(folder)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    begun = Program(write_inventory(folder, HERE, service), env={"PYTHONPATH": path})
    begun.begin()
    return begun


@pytest.mark.long
@pytest.mark.parametrize(("file", "said"), [
    ("keys/private.pem", "private.pem cannot be read: "), ("lease", "service.lease_file lease: cannot be used: ")])
def test_what_another_start_may_find(file: str, said: str, tmp_path: Path) -> None:
    """A service manager tries again: neither keys nor inventory are wrong."""
    if file == "lease":
        with Service(write_inventory(tmp_path, HERE, "  lease_file: lease")):
            pass
    place = str(tmp_path / file)
    service = begun_with(tmp_path, NO_DESCRIPTOR % (place, place), "  lease_file: lease")
    try:
        assert service.process.wait(60) == 1, service.output
        service.wait_line(said.replace(" lease:", f" {place}:") + os.strerror(errno.ENFILE))
    finally:
        service.kill()


@pytest.mark.long
def test_no_descriptor_for_the_database(tmp_path: Path) -> None:
    """As long as there is none the gate is closed."""
    flag = tmp_path / "flag"
    flag.touch()
    service = begun_with(tmp_path, NO_DESCRIPTOR % (str(tmp_path / "healthchecker.db"), str(flag)))
    try:
        said = service.wait_line("the gate stays closed until the database can be used: ")
        assert f"{os.strerror(errno.ENFILE)}; try again" in said
        flag.unlink()
        service.wait_line("serving on http://")
        assert service.stop() == 0
    finally:
        service.kill()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets one process change the limits of another")
def test_no_quota_for_the_database(tmp_path: Path) -> None:
    """What can be opened for writing is no other database's place."""
    resource: Any = importlib.import_module("resource")
    service = begun_with(tmp_path, NO_GROWTH)
    try:
        said = service.wait_line("the gate stays closed until the database can be used: ")
        assert "disk I/O error; try again" in said and "set service.database" not in said
        hard = resource.prlimit(service.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (hard, hard))
        service.wait_line("serving on http://")
        assert service.stop() == 0
    finally:
        service.kill()


# --- the start ---
def test_serves_at_the_first_start(tmp_path: Path) -> None:
    """With the example beside it where there is one, as shipped but for the ports; this machine is watched."""
    path = tmp_path / "inventory.yaml"
    if EXAMPLE.is_file():
        text = re.sub(r"(?m)^( +|# *)(listen|console):.*\n", "", EXAMPLE.read_text(encoding="utf-8"))
        text = text.replace("\nservice:\n", "\nservice:\n  listen: 127.0.0.1:0\n  console: 127.0.0.1:0\n")
        (tmp_path / EXAMPLE.name).write_text(text, encoding="utf-8")
    else:
        write_inventory(tmp_path, "  - {name: this-machine, platform: local}")
    with Program(path, program=Path(shutil.copy(PROGRAM, tmp_path))) as service:
        service.wait_status("/", 200)
        for own, status in {"/-/livez": 200, "/-/readyz": 200, "/-/gate": 204, "/-/health": 200}.items():
            assert service.get(own).status == status
        assert service.get("/-/").status == service.get("/-/metrics").status == 404
        console = f"http://{service.console[0]}:{service.console[1]}/-/"
        assert f'<a href="{console}">console</a>' in service.get("/").body
        assert service.get_console("/-/livez").status == 200 and service.get_console("/-/login").status == 200
        assert service.output.splitlines()[-1].partition(": ")[0] and console in service.wait_line("serving on")
        assert path.is_file()


def test_without_a_console(tmp_path: Path) -> None:
    with Service(write_inventory(tmp_path, HERE, "  console: off")) as service:
        service.wait_status("/", 200)
        assert service.wait_line("serving on").endswith(", console off\n")
        assert "console" not in service.get("/").body


def test_a_hangup_reopens_the_log(tmp_path: Path) -> None:
    """It was moved away, as logrotate does; nothing ends, and nothing is lost."""
    log, moved = tmp_path / "service.log", tmp_path / "moved.log"
    with Service(write_inventory(tmp_path, HERE, "  log_file: service.log")) as service:
        service.wait_status("/", 200)
        log.rename(moved)
        os.killpg(service.pid, signal.SIGHUP)  # as the end of a terminal does: to the workers, too
        ask_to_end(service.process)
        assert service.process.wait(ENDED) == 0
    written = moved.read_text(encoding="utf-8") + log.read_text(encoding="utf-8")
    assert sorted(written.splitlines()) == sorted(service.output.splitlines())  # of two threads either may be first
    assert log.read_text(encoding="utf-8").endswith(" INFO ended\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets one process lower the limits of another")
def test_hangups_while_the_log_has_no_room(tmp_path: Path) -> None:
    """What had found no room finds none at its end, either: the next hangup is heard all the same."""
    resource: Any = importlib.import_module("resource")
    with Service(write_inventory(tmp_path, HERE, "  log_file: service.log")) as service:
        service.wait_status("/", 200)
        told = re.compile("(?:INFO inventory: |the inventory was not taken over: ).*")
        limits = resource.prlimit(service.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (1, limits[1]))
        for count in range(2, 6):   # the first one was that of the start
            if count == 5:
                resource.prlimit(service.pid, resource.RLIMIT_FSIZE, limits)
            service.process.send_signal(signal.SIGHUP)
            wait_for(lambda count=count: len(told.findall(service.output)) == count, ENDED)
        assert told.findall(service.output)[-1].startswith("INFO inventory: 0 added")
    assert (tmp_path / "service.log").read_text(encoding="utf-8").endswith(" INFO ended\n")


@pytest.mark.long
def test_a_stderr_that_nobody_reads(tmp_path: Path) -> None:
    """A log driver that waits, a terminal that was stopped by Ctrl-S: the gate goes on, and so does the end."""
    log, (reader, writer) = tmp_path / "service.log", os.pipe()

    def fill() -> None:
        with contextlib.suppress(OSError), os.fdopen(writer, "wb", 0) as pipe:
            pipe.write(bytes(1 << 20))

    def status() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", int(found[2]), timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            return connection.getresponse().status

    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as door:
        port = door.getsockname()[1]
        row = f"  - {{name: door, platform: tcp, hostname: 127.0.0.1, port: {port}, interval: 1, retry_interval: 1}}"
        path = write_inventory(tmp_path, row, "  log_file: service.log")
        process = subprocess.Popen(command(path), stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
        filling = threading.Thread(target=fill)
        try:
            wait_for(lambda: log.exists() and SERVING.search(log.read_text(encoding="utf-8")), 60)
            found = cast("re.Match[str]", SERVING.search(log.read_text(encoding="utf-8")))
            wait_for(lambda: status() == 200, 60)
            filling.start()
            door.close()
            wait_for(lambda: status() == 503, 60)
            with socket.create_server(("127.0.0.1", port), reuse_port=True):
                wait_for(lambda: status() == 200, 60)
                process.terminate()
                assert process.wait(ENDED) == 0
        finally:
            process.kill()
            process.wait()
            os.close(reader)
            filling.join(60) if filling.ident else os.close(writer)
    assert log.read_text(encoding="utf-8").endswith(" INFO ended\n")


def test_a_log_file_that_nobody_reads(tmp_path: Path) -> None:
    """It takes nothing, as on a share that hangs: the service serves, watches and ends all the same."""
    prepared_database(tmp_path)
    os.mkfifo(log := tmp_path / "service.log")
    reader, writer = (os.open(log, kind | os.O_NONBLOCK) for kind in (os.O_RDONLY, os.O_WRONLY))
    with open(reader, "rb"), open(writer, "wb", 0) as full:
        while full.write(bytes(1 << 12)):
            pass
        with Service(write_inventory(tmp_path, HERE, "  log_file: service.log")) as service:
            service.wait_status("/", 200)
            client = Client(*service.console).log_in()
            assert client.api("POST", "gate", {"action": "close"}).status == 200
            service.wait_status("/", 503)
            ask_to_end(service.process)
            assert service.process.wait(ENDED) == 0
        assert service.output.endswith(" INFO ended\n")


def loopback() -> str:
    """IPv6's where there is one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return '"[::1]:0"'
    return "127.0.0.1:0"


def test_closed_until_every_resource_has_a_result(tmp_path: Path) -> None:
    """On an IPv6 address."""
    flag, address = tmp_path / "flag", loopback()
    slow = f"checks: [{{name: slow, command: 'while ! test -e {flag}; do sleep 0.05; done', timeout: 9}}]"
    text = f"{HERE}\n  - {{name: slow, platform: local, interval: 1, timeout: 9, {slow}}}"
    with Service(listen_on(write_inventory(tmp_path, text), address)) as service:
        assert service.host in address
        service.wait_line("here: unknown -> healthy")
        for path, status in {"/": 503, "/-/readyz": 503, "/-/gate": 403, "/-/livez": 200}.items():
            assert service.get(path).status == status
        flag.touch()
        service.wait_status("/", 200)


def test_flips_seen_by_a_client_within_one_poll(tmp_path: Path) -> None:
    """And told in a log file, which rotates."""
    log, flag = tmp_path / "logs" / "service.log", tmp_path / "trouble"
    log.parent.mkdir()
    log.write_bytes(b"x" * (10 << 20) + b"\n")  # as large as it may become
    check = f"checks: [{{name: flag, command: 'test ! -e {flag} || {{ echo in trouble; false; }}'}}]"
    text = f"  - {{name: db1, platform: local, interval: 1, rise: 1, fall: 1, {check}}}"
    with Service(write_inventory(tmp_path, text, "  log_file: logs/service.log")) as service:
        service.wait_status("/", 200)
        for _ in range(2):
            flag.touch()
            refused = service.wait_status("/", 503)
            assert 1 <= int(refused.headers["retry-after"]) <= 3
            assert refused.headers["cache-control"] == "no-store"
            assert "db1" not in refused.body + str(refused.headers) and "trouble" not in refused.body
            assert service.get("/-/gate").status == 403
            flag.unlink()
            service.wait_status("/", 200)
    assert log.with_name("service.log.1").stat().st_size >= 10 << 20
    written = log.read_text(encoding="utf-8")
    lines = written.splitlines()
    assert sorted(lines) == sorted(service.output.splitlines()), "the console has the same"
    resource = [line for line in lines if re.search(r" (INFO|WARNING) db1: ", line)]
    assert ["-> healthy" in line for line in resource] == [True, False] * 2 + [True], written
    assert all("check flag: in trouble" in line for line in resource if "-> unhealthy" in line)
    gate = [line for line in lines if " gate: " in line]
    assert ["-> open" in line for line in gate] == [True, False] * 2 + [True], written
    assert all("db1" in line and "in trouble" in line for line in gate if "-> closed" in line)


# --- the end ---
@pytest.mark.parametrize(
    ("number", "threads"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)], ids=["pool", "loop"]
)
def test_a_request_in_flight_is_answered(tmp_path: Path, application: str, number: int, threads: int) -> None:
    with Service(write_inventory(tmp_path, HERE, f"{application}\n  threads: {threads}")) as service:
        service.wait_status("/", 200)
        idle, request = Request(service, "/"), Request(service, "/slow")
        with contextlib.closing(idle.connection):
            idle.connection.request("GET", "/")
            idle.connection.getresponse().read()  # from now on an idle keep-alive connection
            request.start()
            wait_for((tmp_path / "came-slow").is_file)
            os.kill(service.pid, number)
            code = service.process.wait(ENDED)
            request.join(ENDED)
            assert (code, request.answer) == (0, "200 done")
            assert idle.connection.sock.recv(1) == b""
    assert "ended" in service.output.splitlines()[-1]
    assert "still running" not in service.output, "threads that wait for work are no news"
    assert request.headers["connection"] == "close", "a client has to know that it must not ask again here"


@pytest.mark.long
def test_what_never_ends_is_cut_off(tmp_path: Path, application: str) -> None:
    """A request that hangs, one that is half sent, and an impatient user: no more than ten seconds altogether."""
    with Service(write_inventory(tmp_path, HERE, f"{application}\n  threads: 2")) as service:
        service.wait_status("/", 200)
        hanging = Request(service, "/hang")
        with socket.create_connection((service.host, service.port)) as half:
            half.sendall(b"GET / HTTP/1.1\r\nHost:")
            hanging.start()
            wait_for((tmp_path / "came-hang").is_file)
            ask_to_end(service.process)
            with pytest.raises(subprocess.TimeoutExpired):
                service.process.wait(2)
            with pytest.raises(OSError):
                socket.create_connection((service.host, service.port), timeout=1).close()
            ask_to_end(service.process)
            assert service.process.wait(ENDED) == 0
            hanging.join(5)
            assert not hanging.answer.startswith("200")


def test_a_signal_right_after_the_start(tmp_path: Path) -> None:
    with Service(write_inventory(tmp_path, HERE)) as service:
        os.kill(service.pid, signal.SIGTERM)
        assert service.process.wait(ENDED) == 0, service.output


# --- as the first process of a container ---
ALONE = ["unshare", *(["--user", "--map-root-user"] if os.geteuid() else []), "--pid", "--fork", "--mount-proc"] \
    if sys.platform == "linux" else []
no_container = pytest.mark.skipif(
    not ALONE or not shutil.which(ALONE[0]) or subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0,
    reason="needs a Linux where this account may have namespaces")


@contextlib.contextmanager
def first_process(service: Program, *inside: str) -> Iterator[psutil.Process]:
    """Of a container without an init."""
    service.command[:0] = [*ALONE, "--kill-child", *inside]
    service.begin()
    try:
        yield wait_for(lambda: psutil.Process(service.pid).children() or service.process.poll() is not None)[0]
    finally:
        service.kill()


@pytest.mark.long
@no_container
def test_no_zombies_in_a_container(tmp_path: Path) -> None:
    """Of what checks leave behind, at once or after a while; others would not find room for a process at last."""
    came = tmp_path / "came"
    check = f"echo >> {came}; sleep 0.1 & setsid sleep 0.2 & sleep 60 | cat"
    row = f"checks: [{{name: hangs, command: '{check}', timeout: 1}}]"
    path = write_inventory(tmp_path, f"  - {{name: here, platform: local, interval: 1, critical: false, {row}}}")

    def zombies() -> int:
        count = 0
        for each in first.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                count += each.status() == psutil.STATUS_ZOMBIE
        return count

    with first_process(service := Program(path)) as first:
        service.wait_line("serving on http://")
        wait_for(lambda: came.exists() and came.read_text(encoding="utf-8").count("\n") > 3)
        wait_for(lambda: not zombies(), 5)
        first.terminate()
        assert service.process.wait(ENDED) == 0, service.output
        service.wait_line("INFO ended")


@no_container
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, 137)])
def test_a_signal_during_the_imports_in_a_container(number: int, code: int, tmp_path: Path) -> None:
    """It ends the start, as everywhere; so does one to the program alone, whose code is told."""
    with first_process(service := Program(write_inventory(tmp_path, HERE))) as first:
        held = re.compile(r"^SigBlk:\t.*[13579bdf]$", re.MULTILINE)    # SIGHUP is among them
        status = Path(f"/proc/{first.pid}/status")
        wait_for(lambda: first.children() or held.search(status.read_text(encoding="ascii")))
        (first if number == signal.SIGTERM else wait_for(first.children)[0]).send_signal(number)
        assert service.process.wait(ENDED) == code, service.output


# Nothing can be written but the inventory's folder, which is /mnt here, and perhaps memory.
READ_ONLY = """
set -e
mount --bind "$0" /mnt
for folder in /tmp /var/tmp $READ_ONLY_TOO; do
    mount --bind $folder $folder
    mount -o remount,bind,ro $folder
done
cd /proc
exec "$@"
"""
LARGE = """
def app(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Length", "3000000")])
    return [body.ljust(3_000_000, b"x")]
"""


@pytest.mark.long
@no_container
def test_a_root_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large bodies and answers go to memory; where there is none that can be written, it is said what to do."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "large.py").write_text(LARGE, encoding="utf-8")
    write_inventory(tmp_path, HERE, "  app: large:app")
    inventory, inside = Path("/mnt/inventory.yaml"), ("--mount", "sh", "-c", READ_ONLY, str(tmp_path))

    def check(read_only_too: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([*ALONE, *inside, *command(inventory, "check")], capture_output=True, encoding="utf-8",
                              env=environment({"READ_ONLY_TOO": read_only_too}))  # fmt: skip

    assert "is valid" in check().stdout
    with first_process(service := Program(inventory), *inside) as first:
        found = SERVING.search(service.wait_line("serving on http://"))
        assert found
        service.port = int(found[2])
        service.wait_status("/", 200)
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", "/", bytes(900_000))
            answer = connection.getresponse()
            assert answer.status == 200 and len(answer.read()) == 3_000_000
        first.terminate()
        assert service.process.wait(ENDED) == 0, service.output
    said = check("/dev/shm")
    assert said.returncode == 1 and "set TMPDIR to one that can" in said.stderr, said


# --- once more ---
@contextlib.contextmanager
def asking(port: int, statuses: list[int]) -> Iterator[None]:
    """A client that asks all the time and notes every answer that it gets."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.005):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/")
                statuses.append(connection.getresponse().status)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)


def stored_states(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "healthchecker.db", timeout=5)) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM status")]


@pytest.mark.long
def test_a_restart_closes_nothing(tmp_path: Path) -> None:
    """Stored states count on until the first polls (here slow ones) are through: no 503 once listening."""
    slow = "checks: [{name: slow, command: sleep 0.5}]"
    rows = [f"  - {{name: r{number}, platform: local, interval: 20, {slow}}}" for number in range(3)]
    path = write_inventory(tmp_path, "\n".join(rows), "  workers: auto\n")
    statuses: list[int] = []
    with Service(path) as service:
        service.wait_status("/", 200)
        wait_for(lambda: stored_states(tmp_path) == ["healthy"] * 3)
    listen_on(path, f"127.0.0.1:{service.port}")  # it was free a moment ago
    with asking(service.port, statuses):
        with Service(path) as service:
            wait_for(lambda: len(statuses) > 20)
            service.kill()
            service.code = -signal.SIGKILL
        before = len(statuses)
        with Service(path):
            wait_for(lambda: len(statuses) > before + 20)
    assert set(statuses) == {200}
