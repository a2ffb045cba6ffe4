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
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import wait_for
from service import Service, run, write_inventory

from healthchecker import (
    ACCESS_CHARS,
    ACCESS_LINES,
    AGENT_CHARS,
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
    note = {"at": 1_700_000_000.9, "size": 5, "seconds": 0.0123456, "address": "192.0.2.7", "request": "GET / HTTP/1.1",
            "status": "200", "referer": "-", "agent": "-", "outcome": "2xx"} | parts  # fmt: skip
    return access_line(tuple(note.values())).removesuffix("\n")  # type: ignore[arg-type]


# === Lines ===================================================================


def test_a_line() -> None:
    text = line(agent="Mozilla/5.0 (X11)", referer="https://example.com/?a=b", request="GET /a?token=b HTTP/1.1")
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
    whole = line(request=text, referer=text, agent=text, address=text)
    assert whole.isascii() and whole.isprintable()
    found = parsed(whole) if sent else LINE.fullmatch(whole[:0] + "-" + whole)
    assert found
    assert (found["request"], found["referer"], found["agent"]) == (logged,) * 3
    assert found["address"] == (logged.replace(" ", "_") if sent else "-")


# === What is noted ===========================================================
def task(path: str = "/", **headers: str) -> Any:
    """As much of a served request as the log looks at."""
    request = SimpleNamespace(headers=headers, first_line=f"GET {path} HTTP/1.1".encode())
    channel = SimpleNamespace(requests=[request], addr=("192.0.2.7", 1), body_bytes=5)
    return SimpleNamespace(channel=channel, request=request, environ=None, status="200 OK", wrote_header=True)


def test_notes_come_in_order_and_in_batches() -> None:
    batches: list[Sequence[Any]] = []
    access_log = AccessLog(batches.append)
    for number in range(10 * ACCESS_LINES + 1):
        access_log.note(task(f"/{number}"), "2xx", 0.001)
    access_log.flush()
    access_log.flush()
    assert [len(batch) for batch in batches] == [ACCESS_LINES] * 10 + [1]
    paths = [parsed(access_line(note).strip())["request"].split()[1] for batch in batches for note in batch]
    assert paths == [f"/{number}" for number in range(10 * ACCESS_LINES + 1)]


def test_a_sink_that_fails_costs_lines_and_no_memory() -> None:
    """As a main process that does not read."""
    batches: list[Sequence[Any]] = []
    broken = True

    def sink(notes: Sequence[Any]) -> None:
        if broken:
            raise BlockingIOError
        batches.append(notes)

    access_log = AccessLog(sink)
    for _ in range(5 * ACCESS_LINES):
        access_log.note(task("/lost"), "2xx", 0.001)
    assert not access_log._notes
    broken = False
    access_log.note(task("/kept"), "2xx", 0.001)
    access_log.flush()
    assert "/kept" in access_line(batches[0][0]) and len(batches) == 1


def test_what_is_kept_of_a_request_is_bounded() -> None:
    batches: list[Sequence[Any]] = []
    access_log = AccessLog(batches.append)
    access_log.note(task("/" + "x" * 9000, REFERER="y" * 9000, USER_AGENT="z" * 9000), "2xx", 0.001)
    access_log.flush()
    found = parsed(access_line(batches[0][0]).strip())
    assert [len(found[name]) for name in ("request", "referer", "agent")] == [ACCESS_CHARS, AGENT_CHARS, AGENT_CHARS]


# === The file ================================================================
NOTE = (1_700_000_000.9, 5, 0.001, "192.0.2.7", "GET / HTTP/1.1", "200", "-", "-", "2xx")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody move a file that is open")
def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    """By logrotate, for example."""
    path = tmp_path / "access.log"
    with contextlib.closing(AccessFile(path)) as file:
        file.write([NOTE, NOTE])
        path.rename(tmp_path / "access.log.1")
        file.write([NOTE])
        path.unlink()
        file.write([NOTE] * 3)
    counts = {old.name: len(old.read_text(encoding="ascii").splitlines()) for old in tmp_path.iterdir()}
    assert counts == {"access.log.1": 2, "access.log": 3}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no file mode")
def test_a_new_file_is_not_for_everyone(tmp_path: Path) -> None:
    """For query strings may hold the application's tokens."""
    path = tmp_path / "access.log"
    with contextlib.closing(AccessFile(path)) as file:
        file.write([NOTE])
    assert path.stat().st_mode & 0o137 == 0


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
            file.write([NOTE])
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
