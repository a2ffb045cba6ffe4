"""The access log: its lines, its file, what happens when it cannot be written; and a real service that keeps one."""

from __future__ import annotations

import calendar
import contextlib
import http.client
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import no_leaks, wait_for
from service import Service, run, write_inventory

from healthchecker import (
    ACCESS_CHARS,
    ACCESS_LINES,
    ACCESS_WAITING,
    AGENT_CHARS,
    LOG_BYTES,
    LOG_FILES,
    AccessFile,
    AccessLog,
    UsageError,
    access_line,
)

# The combined log format, then milliseconds and outcome.
LINE = re.compile(
    r'(?P<address>\S+) - - \[(?P<at>\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "(?P<request>(\\.|[^"\\])*)" '
    r'(?P<status>\d{3}) (?P<size>\d+) "(?P<referer>(\\.|[^"\\])*)" "(?P<agent>(\\.|[^"\\])*)" '
    r"(?P<ms>\d+\.\d{3}) (?P<outcome>\w+)"
)
HEALTHY = "  - {name: r, platform: simulated, mean_healthy: 1e6}"


def parsed(line: str) -> dict[str, str]:
    found = LINE.fullmatch(line)
    assert found, line
    return found.groupdict()


def line(**parts: Any) -> str:
    entry = {"at": 1_700_000_000.9, "address": "192.0.2.7", "request": b"GET / HTTP/1.1", "status": "200", "size": 5,
             "seconds": 0.0123456, "outcome": "2xx", "referer": "-", "agent": "-"} | parts  # fmt: skip
    return access_line(tuple(entry.values()))  # type: ignore[arg-type]


# === Lines ===================================================================


def test_a_line() -> None:
    text = line(agent="Mozilla/5.0 (X11)", referer="https://example.com/?a=b", request=b"GET /a?token=b HTTP/1.1")
    found = parsed(text)
    assert {name: found[name] for name in ("address", "request", "status", "size", "ms", "outcome")} == {
        "address": "192.0.2.7",
        "request": "GET /a?token=b HTTP/1.1",
        "status": "200",
        "size": "5",
        "ms": "12.346",
        "outcome": "2xx",
    }
    assert (found["referer"], found["agent"]) == ("https://example.com/?a=b", "Mozilla/5.0 (X11)")
    moment = calendar.timegm(time.strptime(found["at"][:20], "%d/%b/%Y:%H:%M:%S"))
    zone = int(found["at"][21:24]) * 3600 + int(found["at"][21] + found["at"][24:]) * 60
    assert moment - zone == 1_700_000_000


# what a client sends, what is logged of it
ESCAPED = {
    b"GET / HTTP/1.1": "GET / HTTP/1.1",
    b"": "",
    b'GET /" 200 5 "-" "-" 1.000 2xx': r"GET /\x22 200 5 \x22-\x22 \x22-\x22 1.000 2xx",
    b"GET /\\x22": r"GET /\x5cx22",
    b"GET /\r\n192.0.2.1 - -": r"GET /\x0d\x0a192.0.2.1 - -",
    b"GET /\x1b[2J\x00\x7f\t": r"GET /\x1b[2J\x00\x7f\x09",
    "GET /é☃".encode(): r"GET /\xc3\xa9\xe2\x98\x83",
    b"GET /\x85\xa0\xff": r"GET /\x85\xa0\xff",
}


@pytest.mark.parametrize(("sent", "logged"), ESCAPED.items())
def test_nothing_sent_can_forge_a_line(sent: bytes, logged: str) -> None:
    text = sent.decode("latin-1")
    whole = line(request=sent, referer=text, agent=text, address=text)
    assert whole.isascii() and whole.isprintable()
    found = parsed(whole) if sent else LINE.fullmatch(whole[:0] + "-" + whole)
    assert found
    assert (found["request"], found["referer"], found["agent"]) == (logged,) * 3
    assert found["address"] == (logged.replace(" ", "_") if sent else "-")


# === The thread ==============================================================


def task(path: str = "/", **headers: str) -> Any:
    """As much of a served request as the log looks at."""
    request = SimpleNamespace(headers=headers, first_line=f"GET {path} HTTP/1.1".encode())
    channel = SimpleNamespace(requests=[request], addr=("192.0.2.7", 1), body_bytes=5)
    return SimpleNamespace(channel=channel, request=request, environ=None, status="200 OK", wrote_header=True)


@contextlib.contextmanager
def running(sink: Any) -> Iterator[AccessLog]:
    access_log = AccessLog(sink)
    access_log.start()
    try:
        yield access_log
    finally:
        access_log.close()
        access_log.join(10)
        assert not access_log.is_alive()


def test_lines_come_in_order_and_in_batches() -> None:
    batches: list[Sequence[str]] = []
    with no_leaks(), running(batches.append) as access_log:
        for number in range(1000):
            access_log.note(task(f"/{number}"), "2xx", 0.001)
        assert wait_for(lambda: sum(map(len, batches)) == 1000)
        access_log.note(task("/last"), "2xx", 0.001)
    paths = [parsed(text)["request"].split()[1] for batch in batches for text in batch]
    assert paths == [*(f"/{number}" for number in range(1000)), "/last"], "what was noted before the end is written"
    assert max(map(len, batches)) == ACCESS_LINES and len(batches) <= 1000 // ACCESS_LINES + 10


def test_the_end_waits_for_the_last_lines() -> None:
    batches: list[Sequence[str]] = []

    def sink(lines: Sequence[str]) -> None:
        threading.Event().wait(0.2)  # what a disk may take
        batches.append(lines)

    access_log = AccessLog(sink)
    access_log.start()
    access_log.note(task(), "2xx", 0.001)
    access_log.close()
    assert len(batches) == 1


def test_a_sink_that_blocks_costs_lines_and_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    free, batches, blocked = threading.Event(), [], threading.Event()

    def sink(lines: Sequence[str]) -> None:
        blocked.set()
        assert free.wait(30)
        batches.append(lines)

    with caplog.at_level(logging.WARNING, "healthchecker"), running(sink) as access_log:
        access_log.note(task("/first"), "2xx", 0.001)
        assert blocked.wait(10)
        notes = [threading.Thread(target=lambda: [access_log.note(task(), "2xx", 0.001) for _ in range(ACCESS_WAITING)])
                 for _ in range(2)]  # fmt: skip
        for thread in notes:
            thread.start()
        for thread in notes:
            thread.join(30)
        free.set()
        wait_for(lambda: caplog.messages, 20)
    written = sum(map(len, batches))
    assert ACCESS_WAITING < written <= ACCESS_WAITING + 10, "a few more where threads note at the same moment"
    dropped = [int(number) for message in caplog.messages for number in re.findall(r"(\d+) requests", message)]
    assert written + sum(dropped) == 1 + 2 * ACCESS_WAITING


def test_a_sink_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """As the pipe to a main process that is gone: the thread goes on, and lines count as dropped."""
    batches: list[Sequence[str]] = []
    broken = threading.Event()
    broken.set()

    def sink(lines: Sequence[str]) -> None:
        if broken.is_set():
            raise BrokenPipeError
        batches.append(lines)

    with caplog.at_level(logging.WARNING, "healthchecker"), running(sink) as access_log:
        for _ in range(3):
            access_log.note(task("/lost"), "2xx", 0.001)
        wait_for(lambda: caplog.messages)
        broken.clear()
        access_log.note(task("/kept"), "2xx", 0.001)
        assert "/kept" in wait_for(lambda: batches)[0][0]
    assert "3 requests were dropped" in caplog.text and len(batches) == 1


def test_what_is_kept_of_a_request_is_bounded() -> None:
    batches: list[Sequence[str]] = []
    with running(batches.append) as access_log:
        access_log.note(task("/" + "x" * 9000, REFERER="y" * 9000, USER_AGENT="z" * 9000), "2xx", 0.001)
    found = parsed(batches[0][0])
    assert [len(found[name]) for name in ("request", "referer", "agent")] == [ACCESS_CHARS, AGENT_CHARS, AGENT_CHARS]


# === The file ================================================================


def test_it_rotates(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_bytes(b"x" * LOG_BYTES)
    with contextlib.closing(AccessFile(path)) as file:
        file.write(["a", "b"])
        file.write(["c"])
        assert path.read_bytes().split() == [b"a", b"b", b"c"]
        assert path.with_name("access.log.1").stat().st_size == LOG_BYTES
        for _ in range(LOG_FILES + 2):
            file.write(["y" * LOG_BYTES])
    assert len([*tmp_path.iterdir()]) == 1 + LOG_FILES


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no file mode")
def test_a_new_file_is_not_for_everyone(tmp_path: Path) -> None:
    """For query strings may hold the application's tokens."""
    path = tmp_path / "access.log"
    with contextlib.closing(AccessFile(path)) as file:
        file.write(["z" * LOG_BYTES])
        file.write(["a"])
    for name in ("access.log", "access.log.1"):
        assert (tmp_path / name).stat().st_mode & 0o137 == 0, name


@pytest.mark.parametrize("path", ["no/such/folder/access.log", "."])
def test_a_file_that_cannot_be_written(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match=r"service\.access_log .* cannot be written"):
        AccessFile(tmp_path / path)
    done = run(write_inventory(tmp_path, "", f"  access_log: {path}"))
    assert done.returncode == 2
    assert "service.access_log" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "healthchecker.db").exists(), "nothing was touched"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    file = AccessFile(Path("/dev/full"))
    with caplog.at_level(logging.ERROR, "healthchecker"):
        for _ in range(3):
            file.write(["a line"])
    assert [message for message in caplog.messages if "access_log" in message and "No space" in message]
    assert len(caplog.messages) == 1
    with contextlib.suppress(OSError):  # what it could not write
        file.close()


# === The service =============================================================
APP = """
import logging

logging.getLogger("waitress").disabled = True   # Service takes a traceback for a fault of ours

def app(environ, start_response):
    if environ["PATH_INFO"] == "/boom":
        raise ValueError("boom")
    length = int(environ["QUERY_STRING"].partition("length=")[2] or 4)
    headers = [] if environ["PATH_INFO"] == "/chunks" else [("Content-Length", str(length))]
    start_response("200 OK", [("Content-Type", "text/plain"), *headers])
    return iter([b"x" * length]) if not headers else [b"x" * length]
"""


def raw(service: Service, request: bytes) -> bytes:
    with socket.create_connection((service.host, service.port), timeout=10) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def entries(folder: Path) -> list[dict[str, str]]:
    """The log's lines, without those of `wait_status`."""
    lines = [parsed(text) for text in (folder / "access.log").read_text(encoding="ascii").splitlines()]
    return [entry for entry in lines if entry["request"] != "GET /-/readyz HTTP/1.1"]


@pytest.mark.parametrize("threads", [0, 2], ids=["loop", "pool"])
def test_a_service_keeps_one(tmp_path: Path, threads: int) -> None:
    (tmp_path / "shop.py").write_text(APP, encoding="utf-8")
    inventory = write_inventory(
        tmp_path, HEALTHY, f"  app: shop:app\n  threads: {threads}\n  access_log: access.log"
    )
    forged = b'GET /" HTTP/1.1\r\nHost: x\r\nUser-Agent: a\t"\xff\r\nReferer: \\\r\nConnection: close\r\n\r\n'
    begin = time.time()
    with Service(inventory) as service:
        service.wait_status("/-/readyz", 200, 8)
        service.get("/?length=70000", {"User-Agent": "client/1"})
        service.get("/chunks?length=9")
        service.get("/boom")
        service.get("/-/livez", {"Authorization": "Bearer never-logged"}, "HEAD")
        service.get("/-/nothing?query")
        raw(service, forged)
        raw(service, b"nonsense\r\n\r\n")
        wait_for(lambda: len(entries(tmp_path)) == 7)
        service.get("/last")
    wanted = [
        ("GET /?length=70000 HTTP/1.1", "200", "2xx"),
        ("GET /chunks?length=9 HTTP/1.1", "200", "2xx"),
        ("GET /boom HTTP/1.1", "500", "5xx"),
        ("HEAD /-/livez HTTP/1.1", "200", "own"),
        ("GET /-/nothing?query HTTP/1.1", "404", "own"),
        (r"GET /\x22 HTTP/1.1", "200", "2xx"),
        ("nonsense", "400", "bad"),
        ("GET /last HTTP/1.1", "200", "2xx"),
    ]
    requests = [request for request, _, _ in wanted]  # of several threads a later one may be noted first
    found = sorted(entries(tmp_path), key=lambda entry: requests.index(entry["request"]))
    assert [(entry["request"], entry["status"], entry["outcome"]) for entry in found] == wanted
    sizes = [int(entry["size"]) for entry in found]
    assert sizes[0] == 70000 and 9 <= sizes[1] < 40 and sizes[3] == 0 and min(sizes[4:]) > 0
    assert found[0]["agent"] == "client/1"
    assert (found[5]["agent"], found[5]["referer"]) == (r"a\x09\x22\xff", r"\x5c")
    assert {entry["address"] for entry in found} == {"127.0.0.1"}
    assert all(0 < float(entry["ms"]) < 10_000 for entry in found)
    last = calendar.timegm(time.strptime(found[-1]["at"], "%d/%b/%Y:%H:%M:%S %z")) - time.localtime().tm_gmtoff
    assert begin - 1 <= last <= time.time() + 1
    assert "never-logged" not in (tmp_path / "access.log").read_text(encoding="ascii")


def test_none_by_default(tmp_path: Path) -> None:
    with Service(write_inventory(tmp_path, HEALTHY)) as service:
        service.wait_status("/", 200, 8)
    assert {path.name for path in tmp_path.iterdir() if "log" in path.name} == set()


def test_no_request_is_missing(tmp_path: Path) -> None:
    """Of many clients at once, up to the last one before the end; the log holds them all, and as often."""
    clients, each = 8, 250
    inventory = write_inventory(tmp_path, HEALTHY, "  access_log: access.log")

    def ask(number: int) -> None:
        connection = http.client.HTTPConnection(service.host, service.port, timeout=20)
        with contextlib.closing(connection):
            for turn in range(each):
                connection.request("GET", f"/-/livez?{number}.{turn}")
                connection.getresponse().read()

    with Service(inventory) as service:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    paths = [entry["request"].split()[1] for entry in entries(tmp_path)]
    assert sorted(paths) == sorted(f"/-/livez?{number}.{turn}" for number in range(clients) for turn in range(each))
    for number in range(clients):
        mine = [path for path in paths if path.startswith(f"/-/livez?{number}.")]
        assert mine == [f"/-/livez?{number}.{turn}" for turn in range(each)], "in the order of a connection"
    assert "dropped" not in service.output
