"""Gate: its answers as WSGI, and waitress with our loop around it on real sockets."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import http.client
import io
import json
import math
import os
import selectors
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from conftest import no_leaks, wait_for
from hypothesis import given
from hypothesis import strategies as st
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.receiver import ChunkedReceiver
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

import healthchecker
from healthchecker import (
    HEAD_START,
    POOL_BUFFER,
    Counters,
    Gate,
    GateChannel,
    GateParser,
    GateServer,
    HealthAggregator,
    Lease,
    LineFormatter,
    PathGates,
    Pool,
    RequestCounters,
    ServiceSettings,
    builtin_app,
    strictest,
)

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]
NOW = 1000.0  # seconds, where the clock of a WSGI test stands
OWN = ("/-/livez", "/-/readyz", "/-/gate", "/-/health")
POOL = pytest.mark.parametrize("threads", [0, 2], ids=["loop", "pool"])


def hello(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [b"hello"]


def of_size(size: int) -> Application:
    """An application whose every answer has so many bytes, in one piece."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size))])
        return [bytes(size)]

    return app


# === As WSGI =================================================================
def call(gate: Gate, path: str = "/", **environ: Any) -> tuple[str, dict[str, str], bytes]:
    """Status line, headers by lower-case name (none may come twice), body."""
    answer: list[Any] = []
    request: dict[str, Any] = {}
    setup_testing_defaults(request)
    request |= {"PATH_INFO": path, **environ}

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None) -> Any:
        answer.extend([status, headers])

    body = b"".join(gate(request, start_response))
    status, headers = answer
    named = {name.lower(): value for name, value in headers}
    assert len(named) == len(headers), headers
    if "content-length" in named and environ.get("REQUEST_METHOD") != "HEAD":
        assert int(named["content-length"]) == len(body)
    return status, named, body


@pytest.fixture
def lease() -> Lease:
    return Lease()


@pytest.fixture
def gate(lease: Lease) -> Gate:
    return Gate(hello, lease, lambda: NOW)


# path, status while open, status while closed
STATUSES = {
    "/": (200, 503),
    "/any/path": (200, 503),
    "/-": (200, 503),
    "/-x/livez": (200, 503),
    "/-/livez": (200, 200),
    "/-/readyz": (200, 503),
    "/-/gate": (204, 403),
    "/-/health": (200, 503),
    "/-/": (404, 404),
    "/-/nothing": (404, 404),
    "/-/livez/": (404, 404),
    "/-/livez/../../": (404, 404),
}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("path", "statuses"), STATUSES.items(), ids=STATUSES)
def test_statuses(gate: Gate, lease: Lease, path: str, statuses: tuple[int, int], method: str) -> None:
    for until, expected in (
        (math.inf, statuses[0]),
        (NOW + 0.001, statuses[0]),
        (NOW, statuses[1]),
        (0.0, statuses[1]),
    ):
        lease.until.value = until
        status, headers, body = call(gate, path, REQUEST_METHOD=method)
        assert int(status[:3]) == expected
        if expected != 200 or path.startswith("/-/"):
            assert headers["cache-control"] == "no-store"
            assert body == b"" or (method == "GET" and expected != 204)
        else:
            assert body == (b"hello" if method == "GET" else b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get"])
def test_any_method_asks_the_gate(gate: Gate, lease: Lease, method: str) -> None:
    """Envoy and its like forward the method of the request that they ask about; only the health is for reading."""
    for until, ready, asked in ((0.0, "503", "403"), (math.inf, "200", "204")):
        lease.until.value = until
        answers = {path: call(gate, path, REQUEST_METHOD=method) for path in ("/", *OWN)}
        assert {path: answer[0][:3] for path, answer in answers.items()} == {
            "/": ready, "/-/livez": "200", "/-/readyz": ready, "/-/gate": asked, "/-/health": "405"}  # fmt: skip
        assert answers["/-/health"][1]["allow"] == "GET, HEAD"


# seconds from now at which the gate can open at the soonest, the header
@pytest.mark.parametrize(
    ("seconds", "header"),
    [
        (-1000, "1"),
        (0, "1"),
        (0.2, "1"),
        (1, "1"),
        (1.2, "2"),
        (59.5, "60"),
        (60, "60"),
        (3600, "3600"),
        (1e9, "3600"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/-/readyz"])
def test_retry_after(gate: Gate, lease: Lease, path: str, seconds: float, header: str) -> None:
    lease.opens.value = NOW + seconds
    assert call(gate, path)[1]["retry-after"] == header


# what the client accepts, and whether it gets HTML
ACCEPTS_PER_TURN = {
    "": False,
    "*/*": False,
    "application/json": False,
    "text/plain": False,
    "text/html": True,
    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": True,
    "application/json, text/plain": False,
}


@pytest.mark.parametrize(("accept", "html"), ACCEPTS_PER_TURN.items())
def test_kind_of_refusal(gate: Gate, lease: Lease, accept: str, html: bool) -> None:
    lease.opens.value = NOW + 7
    status, headers, body = call(gate, HTTP_ACCEPT=accept) if accept else call(gate)
    assert status == "503 Service Unavailable"
    if html:
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert b"<html" in body
    else:
        assert headers["content-type"] == "application/json"
        assert json.loads(body)["status"] == 503
        assert len(body) < 300


def test_health_is_health_json(gate: Gate, lease: Lease) -> None:
    for until, word in ((0.0, "fail"), (math.inf, "pass")):
        lease.until.value = until
        _, headers, body = call(gate, "/-/health")
        assert headers["content-type"] == "application/health+json"
        assert json.loads(body)["status"] == word


def test_reasons_and_names_are_not_shown() -> None:
    aggregator = HealthAggregator()
    aggregator.set_resource("db1.internal.example.com", False, "auth: login as monitor refused", opens=5)
    gate = Gate(hello, aggregator.lease)
    for path in ("/", "/db1.internal.example.com", *OWN, "/-/nothing"):
        for accept in ("text/html", "application/json"):
            status, headers, body = call(gate, path, HTTP_ACCEPT=accept)
            shown = f"{status}{headers}{body.decode()}"
            assert not any(
                word in shown for word in ("db1", "internal", "auth", "login", "monitor", "refused")
            )


def test_the_application_may_ask(lease: Lease) -> None:
    told: list[bool] = []

    def asks(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        ask = environ["healthchecker.is_healthy"]
        told.append(ask())
        lease.until.value = 0.0  # meanwhile a machine goes down
        told.append(ask())
        return hello(environ, start_response)

    gate = Gate(asks, lease, lambda: NOW)
    lease.until.value = math.inf
    assert call(gate)[0] == "200 OK"
    assert told == [True, False]
    assert call(gate)[0].startswith("503")
    assert len(told) == 2, "closed: the application is not called"


def test_own_paths_never_reach_the_application(lease: Lease) -> None:
    def never(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        raise AssertionError(environ["PATH_INFO"])

    lease.until.value = math.inf
    for path in (*OWN, "/-/", "/-/login", "/-/api/resources", "/-/nothing"):
        call(Gate(never, lease), path)


# === On sockets ==============================================================
def reads(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    with sock.makefile("rb") as stream:
        return stream.read()


class Serving:
    """A gate around `app`, served on loopback by a thread of its own."""

    def __init__(
        self,
        app: Application,
        threads: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        service: ServiceSettings | None = None,
        connections: int = 100,
        sock: socket.socket | None = None,
        tally: RequestCounters | None = None,
        parts: Iterable[str] = (),
    ) -> None:
        """`parts`: groups and routes, which are open as the site is."""
        self.lease = Lease(parts)
        for lease in (self.lease, *self.lease.parts.values()):
            lease.until.value = math.inf
        self.app: Any = app
        sock = sock or socket.create_server(("127.0.0.1", 0))
        self.address = ("127.0.0.1", sock.getsockname()[1])
        service = (service or ServiceSettings()).model_copy(update={"app": "a:b", "threads": threads})
        self.server = GateServer(Gate(app, self.lease, clock), [sock], service, connections,
                                 tally or RequestCounters(Counters(1), 0))
        self.thread = threading.Thread(target=self.server.serve)

    def __enter__(self) -> Serving:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # test_stopping_twice is about it
            self.server.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()
        wasyncore.close_all(self.server._map)  # nothing is left to close, unless the loop died of an error
        self.server.pool.shutdown(timeout=1)

    @contextlib.contextmanager
    def client(self, timeout: float = 60) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.address[1], timeout=timeout)
        with contextlib.closing(connection):
            yield connection

    def get(self, path: str = "/", timeout: float = 60) -> tuple[int, bytes]:
        with self.client(timeout) as client:
            client.request("GET", path)
            answer = client.getresponse()
            return answer.status, answer.read()

    def raw(self, request: bytes) -> bytes:
        """Everything the server sends until it closes the connection."""
        with socket.create_connection(self.address, timeout=60) as sock:
            sock.sendall(request)
            return reads(sock)


def goes_round(serving: Serving) -> None:
    """Waits until the loop has ended its turn, made a whole one, and done what that has found."""
    for _ in range(3):
        turned = threading.Event()
        serving.server.trigger.pull_trigger(turned.set)
        assert turned.wait(60)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    Lease()  # the first one opens the shared memory of all
    with no_leaks():
        yield


# === Observed ================================================================
WOULD = "would-refuse"


def streamed(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("x-healthchecker", "mine"), ("X-Other", "1")])
    return iter([] if environ["REQUEST_METHOD"] == "HEAD" else [b"one ", b"two"])


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_observe_refuses_nothing(lease: Lease, method: str) -> None:
    """The application answers, marked; its own header of that name stays unless it is marked."""
    told: list[str] = []
    gate = Gate(streamed, lease, lambda: NOW, told.append)
    lease.observes.value = True
    for until, mark in ((NOW, WOULD), (0.0, WOULD), (NOW + 1, "mine")):
        lease.until.value = until
        status, headers, body = call(gate, REQUEST_METHOD=method)
        assert (status, headers["x-healthchecker"], headers["x-other"]) == ("200 OK", mark, "1")
        assert body == (b"" if method == "HEAD" else b"one two")
        assert gate.is_healthy() is (until > NOW), "the application hears the truth"
    assert told == ["", ""]
    for path, status in {"/-/readyz": "200 OK", "/-/gate": "204 No Content"}.items():
        lease.until.value = 0.0
        answer = call(gate, path, REQUEST_METHOD=method)
        assert (answer[0], answer[1]["x-healthchecker"]) == (status, WOULD)
        lease.until.value = NOW + 1
        answer = call(gate, path, REQUEST_METHOD=method)
        assert answer[0] == status and "x-healthchecker" not in answer[1]
    lease.until.value = 0.0
    assert call(gate, "/-/health")[0] == "503 Service Unavailable", "which is a report, and no gate"
    gate.draining = True
    assert call(gate, "/-/readyz")[0] == "503 Service Unavailable"
    gate.hands_over = True  # proxies that ask for each request would refuse, and clients need not see a restart
    assert call(gate, "/-/readyz")[0] == "200 OK"
    assert len(told) == 2, "only requests for the application are counted"


def test_who_is_refused_is_told_why(lease: Lease) -> None:
    """No system is unhealthy where too many requests wait."""
    def refused(by_hand: int, outcome: str, accept: str) -> str:
        gate, found = Gate(hello, lease, lambda: NOW), list[Any]()
        lease.by_hand.value = by_hand
        environ = {"REQUEST_METHOD": "GET", "HTTP_ACCEPT": accept}
        return b"".join(gate.refuse(environ, lambda *said: found.append(said), (lease,), outcome)).decode()

    words = {(0, "refused"): "is not healthy", (-1, "refused"): "taken out of use", (0, "shed"): "more to do than"}
    details = {(0, "refused"): None, (-1, "refused"): "closed by an operator", (0, "shed"): "too many requests wait"}
    for case, word in words.items():
        assert word in refused(*case, "text/html")
        told = json.loads(refused(*case, "*/*"))
        assert (told.get("detail"), told["status"], told["retry_after"]) == (details[case], 503, 1)


def test_observe_hears_of_what_an_application_raises(lease: Lease) -> None:
    def fails(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            start_response("500 Oops", [], sys.exc_info())
        return [b"oops"]

    found: list[Any] = []
    lease.observes.value = True
    environ = {"PATH_INFO": "/", "REQUEST_METHOD": "GET"}
    gate = Gate(fails, lease, lambda: NOW)
    assert [*gate(environ, lambda *answer: found.append(answer) or (lambda data: None))] == [b"oops"]
    assert [answer[:2] for answer in found] == [(text, [("X-HealthChecker", WOULD)]) for text in ("200 OK", "500 Oops")]
    assert found[1][2][0] is ZeroDivisionError


# until of the site, whether it observes, the same of /r: whether each path is admitted
MODES = {
    (0, True, 0, False): {"/": True, "/r/x": False, "/r/../x": False, "/%72": False, "//r": False},
    (0, False, 0, True): {"/": False, "/r/x": True, "/r/../x": False, "/%72": False, "//r": False},
    (0, True, 0, True): {"/": True, "/r/x": True, "/r/../x": True, "/%72": True, "//r": True},
    (NOW + 1, False, 0, True): {"/": True, "/r/x": True, "/r/../x": True, "/%72": True, "//r": True},
    (NOW + 1, True, 0, False): {"/": True, "/r/x": False, "/r/../x": False, "/%72": False, "//r": False},
    (0, False, NOW + 1, True): {"/": False, "/r/x": True, "/r/../x": False, "/%72": False, "//r": False},
}


@pytest.mark.parametrize(("leases", "paths"), MODES.items(), ids=str)
def test_mode_of_a_route(leases: tuple[float, bool, float, bool], paths: dict[str, bool]) -> None:
    """Where a path can be read in two ways, one that refuses decides."""
    lease, told, turned_away = Lease(["/r"]), list[str](), list[str]()
    for one, until, observes in ((lease, *leases[:2]), (lease.parts["/r"], *leases[2:])):
        one.until.value, one.observes.value = until, observes
    def passed(route: str, *, refused: bool = False) -> None:
        (turned_away if refused else told).append(route)

    gate = Gate(hello, lease, lambda: NOW, passed)
    for path, admitted in paths.items():
        assert (gate.route(path)[0] == gate.admit) is admitted, path
        told.clear()
        turned_away.clear()
        status, headers, _ = call(gate, path)
        assert status[:3] == ("200" if admitted else "503"), path
        assert ("x-healthchecker" in headers) is bool(told), path
        assert len(turned_away) == (not admitted), path
    call(gate, "/r/x")
    assert told[-1:] == (["/r"] if leases[3] and leases[2] < NOW else [])


def test_a_path_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its leases are asked again: by then another one may be the strictest."""
    lease, looked = Lease(["/r", "/s"]), []
    for each in (lease, *lease.parts.values()):
        each.until.value = NOW + 1
    find = PathGates._longest
    monkeypatch.setattr(PathGates, "_longest", lambda routes, path: looked.append(path) or find(routes, path))
    gate = Gate(hello, lease, lambda: NOW)
    for path, shuts in (("/r/x", "/r"), ("/x", ""), ("/r/../s", "/s"), ("/s;a/x", "/s")):
        looked.clear()
        way = gate.route(path)
        (lease.parts[shuts] if shuts else lease).until.value = 0.0
        status, _, _ = call(gate, path, **{healthchecker.HANDLER: way})
        assert status[:3] == "503" and len(looked) == {"/r/../s": 0, "/s;a/x": 2}.get(path, 1), path
        (lease.parts[shuts] if shuts else lease).until.value = NOW + 1


def test_a_path_that_may_lead_anywhere_costs_no_more_than_others() -> None:
    """As long as nothing changes: any client may ask for one, and there may be many routes."""
    lease, calls = Lease([f"/part{number}/below" for number in range(100)]), list[str]()
    for each in (lease, *lease.parts.values()):
        each.until.value = NOW + 1
    gate = Gate(hello, lease, lambda: NOW)
    for path in ("/%25252525", "/part1/../part2", "/x\\y"):
        gate.route(path)
        calls.clear()
        sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
        try:
            way = gate.route(path)
        finally:
            sys.setprofile(None)
        assert way[0] == gate.admit and len(way[1]) == 101 and len(calls) < 20, calls     # not one for each


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, NOW, NOW + 1, math.inf]), st.booleans())))
def test_the_strictest_of_all_is_another_as_soon_as_that_changes(changes: list[tuple[int, float, bool]]) -> None:
    lease = Lease(["/r", "/s", "group"])
    found = Gate(hello, lease, lambda: NOW).leases_of("/..")
    assert [each.name for each in found] == ["", "/r", "/s"]
    for place, until, observes in changes:
        one = (lease, *lease.parts.values())[place]
        one.until.value, one.observes.value = until, observes
        assert strictest(found) is min(found, key=lambda each: (each.observes.value, each.until.value))


@POOL
def test_observed_on_a_connection(threads: int) -> None:
    """Kept alive, streamed and HEAD, in the pool and on the loop; each is counted."""
    counters = Counters(1, ["/r"])
    tally = RequestCounters(counters, 0)
    with Serving(streamed, threads, lambda: NOW, tally=tally) as serving:
        serving.lease.until.value, serving.lease.observes.value = 0.0, True
        serving.server.gate._passed = tally.passed
        with serving.client() as client:
            for method in ("GET", "HEAD", "GET"):
                client.request(method, "/")
                answer = client.getresponse()
                assert answer.read() == (b"" if method == "HEAD" else b"one two")
                assert (answer.status, answer.getheader("X-HealthChecker")) == (200, WOULD)
            client.request("GET", "/-/readyz")
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (200, b"closed\n")
            serving.lease.observes.value = False
            client.request("GET", "/")
            answer = client.getresponse()
            assert answer.status == 503 and b"retry_after" in answer.read() and not answer.getheader("X-HealthChecker")
    assert counters.refusals() == {"": (1, 3), "/r": (0, 0)}
    tally.passed("/r")
    assert counters.refusals() == {"": (1, 3), "/r": (0, 1)}


def test_closed_by_hand_says_so(lease: Lease) -> None:
    """The class of the reason, and not the operator's words."""
    gate = Gate(hello, lease, lambda: NOW)
    for by_hand, detail in ((0, None), (1, None), (-1, "closed by an operator")):
        lease.by_hand.value = by_hand
        status, headers, body = call(gate)
        assert (status[:3], json.loads(body).get("detail"), headers["retry-after"]) == ("503", detail, "1")
        page = call(gate, HTTP_ACCEPT="text/html")[2]
        assert (b"out of use" in page) is (by_hand < 0) and (b"not healthy" in page) is (by_hand >= 0)
        assert call(gate, "/-/readyz")[2] == (b"closed by an operator\n" if by_hand < 0 else b"closed\n")


@POOL
def test_open_and_closed(threads: int) -> None:
    with Serving(hello, threads, lambda: NOW) as serving:
        assert serving.get() == (200, b"hello")
        serving.lease.until.value = 0.0
        serving.lease.opens.value = NOW + 30
        for path, status in ({"/": 503, "/x?y=1": 503, "/-/livez": 200, "/-/livez?x=1": 200, "/-/readyz": 503,
                              "/-/gate": 403, "/-/health": 503, "/-/nope": 404, "/%2d/livez": 200,
                              "//-/livez": 200}).items():  # fmt: skip
            assert serving.get(path)[0] == status, path
        with serving.client() as client:
            client.request("GET", "/")
            answer = client.getresponse()
            assert answer.headers["Retry-After"] == "30"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers.get_content_type() == "application/json"
            assert json.loads(answer.read())["status"] == 503
        serving.lease.until.value = math.inf
        assert serving.get() == (200, b"hello")


@POOL
@pytest.mark.parametrize("path", ["/", "/-/livez", "/-/readyz", "/-/gate", "/-/health"])
def test_http_1_0_without_host(threads: int, path: str) -> None:
    """As HAProxy's `option httpchk GET` asks."""
    with Serving(hello, threads) as serving:
        answer = serving.raw(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert answer.split(b"\r\n")[0] in (b"HTTP/1.0 200 OK", b"HTTP/1.0 204 No Content")
        serving.lease.until.value = 0.0
        answer = serving.raw(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
        assert answer.endswith(b"\r\n\r\n")
        assert int(answer.split()[1]) == {"/-/livez": 200, "/-/gate": 403}.get(path, 503)


# until when the lease is, path, status
KEPT = [(math.inf, "/", 200), (0.0, "/", 503), (0.0, "/-/livez", 200), (0.0, "/-/gate", 403), (0.0, "/-/health", 503),
        (math.inf, "/-/gate", 204), (math.inf, "/-/gate", 204), (math.inf, "/-/readyz", 200), (math.inf, "/", 200),
        (math.inf, "/-/x", 404), (math.inf, "/", 200)]  # fmt: skip


@POOL
def test_keep_alive(threads: int) -> None:
    """One connection for everything, through closing and opening."""
    with Serving(hello, threads) as serving, serving.client() as client:
        for until, path, status in KEPT:
            serving.lease.until.value = until
            client.request("GET", path)
            sock = client.sock
            answer = client.getresponse()
            answer.read()
            assert (answer.status, client.sock) == (status, sock), (
                path
            )  # http.client drops a sock that closes


@POOL
def test_methods_that_keep_the_connection(threads: int) -> None:
    """HEAD and 405 have no body to come; the connection stays usable or is said to close."""
    with Serving(hello, threads) as serving:
        for method, path in (
            ("HEAD", "/"),
            ("HEAD", "/-/livez"),
            ("POST", "/-/health"),
            ("OPTIONS", "/-/gate"),
        ):
            with serving.client() as client:
                client.request(method, path)
                answer = client.getresponse()
                assert answer.read() == b""
                client.request(
                    "GET", "/-/livez"
                )  # reconnects by itself if the answer said `Connection: close`
                assert client.getresponse().read() == b"ok\n", (method, path)


@POOL
def test_pipelining(threads: int) -> None:
    """Answers come in the order of the requests, wherever each is made."""

    def echo(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
        return [environ["PATH_INFO"][-4:].encode()]

    paths = ["/-/livez", "/0001", "/-/readyz", "/0002", "/0003", "/-/livez"]
    request = b"".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths)
    request += b"GET /0009 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with Serving(echo, threads) as serving:
        bodies = [part.partition(b"\r\n\r\n")[2] for part in serving.raw(request).split(b"HTTP/1.1 ")[1:]]
        assert bodies == [b"ok\n", b"0001", b"open\n", b"0002", b"0003", b"ok\n", b"0009"]


@POOL
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # asserted below
@pytest.mark.parametrize("error", [ValueError, SystemExit, asyncio.CancelledError])
def test_application_that_raises(
    threads: int, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/late":
            start_response("200 OK", [("Content-Type", "text/plain")])
            yield b"begun"
        raise error("secret-detail")

    with Serving(broken, threads) as serving:
        for path in ("/", "/late", "/"):
            with contextlib.suppress(
                http.client.HTTPException, ConnectionError
            ):  # a closed connection is fair
                status, body = serving.get(path)
                assert status == (200 if path == "/late" else 500)
                assert b"secret-detail" not in body
            assert serving.get("/-/livez") == (200, b"ok\n"), f"after {path} nobody serves any more"


@POOL
def test_stopping_twice(threads: int) -> None:
    """A second Ctrl-C may come when the loop is gone."""
    with Serving(hello, threads) as serving:
        assert serving.get() == (200, b"hello")
        serving.server.stop()
        serving.thread.join(60)
        serving.server.stop()


@POOL
def test_streaming(threads: int) -> None:
    """Chunks of unknown length arrive whole, and `close` is called."""
    closed = threading.Event()

    class Chunks:
        def __iter__(self) -> Iterator[bytes]:
            yield from (b"one ", b"", b"two ", b"three")

        def close(self) -> None:
            closed.set()

    def streams(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return Chunks()

    with Serving(streams, threads) as serving:
        assert serving.get() == (200, b"one two three")
        assert wait_for(closed.is_set)
        assert serving.raw(b"GET / HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\none two three")


def test_a_stream_in_the_pool_arrives_as_it_comes() -> None:
    proceed = threading.Event()

    def streams(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"first"
        proceed.wait(120)
        yield b"last"

    with Serving(streams, 1) as serving, serving.client() as client:
        try:
            client.request("GET", "/")
            answer = client.getresponse()
            assert answer.read1(5) == b"first"
        finally:
            proceed.set()
        assert answer.read() == b"last"


@POOL
def test_a_large_response(threads: int) -> None:
    """100 MB, also to a client that does not read; meanwhile others are served."""
    block, count = b"x" * (1 << 20), 100

    def large(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(count << 20))])
        return (block for _ in range(count))

    with Serving(large, threads) as serving, serving.client() as client:
        client.request("GET", "/")
        answer = client.getresponse()
        wait_for(lambda: left(serving))
        assert serving.get("/-/livez") == (200, b"ok\n")
        size = 0
        while part := answer.read1(1 << 20):
            size += len(part)
        assert size == count << 20
        assert serving.get("/-/livez") == (200, b"ok\n")


def test_a_slow_application_delays_nothing_of_ours() -> None:
    """Both pool threads are busy and requests wait; refusals and our own answers come at once."""
    entered, release = threading.Semaphore(0), threading.Event()

    def slow(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        entered.release()
        release.wait(120)
        return hello(environ, start_response)

    answers: list[tuple[int, bytes]] = []
    with Serving(slow, 2) as serving:
        clients = [threading.Thread(target=lambda: answers.append(serving.get())) for _ in range(5)]
        try:
            for client in clients:
                client.start()
            assert entered.acquire(timeout=60) and entered.acquire(timeout=60)
            wait_for(lambda: serving.server.pool.waiting == 3)      # who came only now would be refused
            for path, status in {"/-/livez": 200, "/-/readyz": 200, "/-/gate": 204, "/-/health": 200}.items():
                assert serving.get(path)[0] == status
            serving.lease.until.value = 0.0
            for path in ("/", "/-/readyz", "/other"):
                assert serving.get(path)[0] == 503
            assert not answers, "both were busy all the time"
        finally:
            release.set()
            for client in clients:
                client.join(60)
    assert sorted(answers)[:2] == [(200, b"hello")] * 2, "requests that were let in are answered"
    assert len(answers) == 5


def test_a_gate_that_opens_in_between_does_not_move_the_application_to_the_loop() -> None:
    """Closed when the request is sorted, open when it is answered: the pool's application may block the loop."""
    where: list[int] = []

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        where.append(threading.get_ident())
        return hello(environ, start_response)

    looks = iter([NOW + 1])  # the first look at the clock comes after the lease, all others before
    with Serving(app, 1, lambda: next(looks, NOW - 1)) as serving:
        serving.lease.until.value = NOW
        assert serving.get()[0] in (200, 503)
        assert serving.thread.ident not in where


# bodies: how the request says its length
BODIES = {
    "length": b"Content-Length: 300000\r\n\r\n" + b"x" * 300_000,
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n" + b"C350\r\n%s\r\n" % (b"x" * 50_000) * 6 + b"0\r\n\r\n",
}


@POOL
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_application_that_reads_a_body(threads: int, body: bytes) -> None:
    def counts(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        size = str(len(environ["wsgi.input"].read())).encode()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(size)))])
        return [size]

    last = b"GET /-/livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    request = b"POST / HTTP/1.1\r\nHost: x\r\n" + body + last
    with Serving(counts, threads) as serving:
        first, _, second = serving.raw(request)[1:].partition(b"HTTP/1.1 ")
        assert first.endswith(b"\r\n\r\n300000")
        assert second.endswith(b"\r\n\r\nok\n")
        serving.lease.until.value = 0.0
        first, _, second = serving.raw(request)[1:].partition(b"HTTP/1.1 ")
        assert b" 503 " in first and second.endswith(b"\r\n\r\nok\n"), "the refusal read the body, too"


@POOL
def test_expect_100_continue(threads: int) -> None:
    def echo(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
        return [environ["wsgi.input"].read()]

    with Serving(echo, threads) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        with sock.makefile("rb") as stream:
            assert stream.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert stream.readline() == b"\r\n"
            sock.sendall(b"body")
            assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
            while stream.readline() != b"\r\n":
                pass
            assert stream.read(4) == b"body"


@POOL
def test_clients_that_leave(threads: int) -> None:
    """In the middle of a request, before the answer, in the middle of it."""

    def large(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return (b"x" * 65536 for _ in range(400))

    with Serving(large, threads) as serving:
        for request in (b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf",
                        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") * 3:  # fmt: skip
            with socket.create_connection(serving.address, timeout=60) as sock:
                sock.sendall(request)
                if b"half" not in request and request.endswith(b"\r\n\r\n"):
                    assert sock.recv(100).startswith(b"HTTP/1.1 200")
        assert serving.get("/-/livez") == (200, b"ok\n")
        assert len(serving.get()[1]) == 400 * 65536


@POOL
def test_a_broken_request_is_answered(threads: int) -> None:
    with Serving(hello, threads) as serving:
        for request in (b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
            assert serving.raw(request).startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
        assert serving.get() == (200, b"hello")


@POOL
def test_many_clients_at_once(threads: int) -> None:
    answers: list[tuple[int, bytes]] = []

    def work() -> None:
        with serving.client() as client:
            for _ in range(20):
                client.request("GET", "/")
                answer = client.getresponse()
                answers.append((answer.status, answer.read()))

    with Serving(hello, threads) as serving:
        clients = [threading.Thread(target=work) for _ in range(16)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(20)
    assert answers == [(200, b"hello")] * 320


def test_wsgi_input_and_file_wrapper() -> None:
    """What a usual application takes for granted of its server."""

    def sends_file(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        wrapper: Iterable[bytes] = environ["wsgi.file_wrapper"](io.BytesIO(b"file" * 1000))
        return wrapper

    with Serving(sends_file, 0) as serving:
        assert serving.get() == (200, b"file" * 1000)


# === The loop ================================================================
class Busy:
    """An application that answers once it is let go, and tells that it was asked; in pieces, the thread sends it."""

    def __init__(self, pieces: int = 1) -> None:
        self.asked, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.pieces = pieces

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.asked.release()
        self.go.acquire(timeout=20)
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(5 * self.pieces))])
        return [b"hello"] * self.pieces


@pytest.fixture(params=[None, selectors.SelectSelector], ids=["best", "select"])
def _selector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of this system, and the one of Windows."""
    if request.param:
        monkeypatch.setattr(GateServer, "selector_class", request.param)


def turns(serving: Serving, seconds: float) -> int:
    """How often the loop turns in that time."""
    count = 0
    original = serving.server._turn

    def counting() -> None:
        nonlocal count
        count += 1
        original()

    serving.server._turn = counting
    time.sleep(seconds)
    serving.server._turn = original
    return count


def rests(serving: Serving) -> None:
    """Soon: what was in the middle of its turn may go on for some."""
    wait_for(lambda: turns(serving, 0.3) <= 10)


def answered(sock: socket.socket, size: int) -> bool:
    """Whether a whole answer of so many bytes comes."""
    found = b""
    while len(found.partition(b"\r\n\r\n")[2]) < size and (part := sock.recv(1)):  # leaves the next one alone
        found += part
    return found.startswith(b"HTTP/1.1 200 ") and found.endswith(b"hello")


@pytest.mark.usefixtures("_selector")
@pytest.mark.parametrize("pieces", [1, 2], ids=["whole", "pieces"])
def test_a_client_that_sends_ahead(pieces: int) -> None:
    """What it sends while its answer is made waits, without work for the loop, and is answered as soon as that is."""
    app, size = Busy(pieces), 5 * pieces
    with Serving(app, 2) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        for _ in range(50):
            sock.sendall(b"GET /1 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert app.asked.acquire(timeout=60)
            sock.sendall(b"GET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
            app.go.release()
            assert answered(sock, size)
            assert app.asked.acquire(timeout=60), "the second one is served"
            app.go.release()
            assert answered(sock, size)
        sock.sendall(b"GET /1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert app.asked.acquire(timeout=60)
        sock.sendall(b"GET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
        rests(serving)
        app.go.release(2)
        assert answered(sock, size) and answered(sock, size)


@pytest.mark.usefixtures("_selector")
def test_a_client_that_leaves_while_its_answer_is_made() -> None:
    """By an end, or by a reset after it has sent more: no work for the loop meanwhile, and nothing is left."""
    app = Busy()
    with Serving(app, 2) as serving:
        for resets in (False, True):
            with socket.create_connection(serving.address, timeout=60) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert app.asked.acquire(timeout=60)
                if resets:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            rests(serving)
            app.go.release()
            wait_for(lambda: not serving.server.active_channels)
        assert app.asked.acquire(blocking=False) is False
        app.go.release(2)
        assert serving.get() == (200, b"hello")


def test_what_a_thread_leaves_to_a_turn_that_is_about_to_wait() -> None:
    """The loop has looked at everything, and does not wait yet: nothing wakes it, and it looks again."""
    with Serving(hello, 0) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        wait_for(lambda: serving.server.active_channels)
        (channel,) = serving.server.active_channels.values()
        tally, left = serving.server.tally, threading.Event()
        turn = tally.turn

        def leaves(queued: int) -> None:
            turn(queued)
            if not left.is_set():
                thread = threading.Thread(target=serving.server.loop.touch, args=(channel,))
                thread.start()
                thread.join(30)
                left.set()

        tally.turn = leaves
        serving.server.adj.asyncore_loop_timeout = 300
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert left.wait(60)
        wait_for(lambda: not channel.touched)
        del tally.turn


@POOL
@pytest.mark.usefixtures("_selector")
def test_a_slow_reader_makes_no_work(threads: int) -> None:
    """The loop waits until it takes more, and then it gets all."""
    size = 8 << 20

    with Serving(of_size(size), threads) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        sock.recv(1)
        wait_for(lambda: all(channel.total_outbufs_len for channel in serving.server.active_channels.values()))
        rests(serving)
        assert len(reads(sock).partition(b"\r\n\r\n")[2]) == size


def test_idle_connections_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests beside many idle connections: the loop looks only at those that do something."""
    looks = 0
    readable = GateChannel.readable

    def counting(channel: GateChannel) -> bool:
        nonlocal looks
        looks += 1
        return bool(readable(channel))

    monkeypatch.setattr(GateChannel, "readable", counting)
    with Serving(hello, 0, connections=400) as serving, contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(serving.address, timeout=60))
        with serving.client() as client:
            client.request("GET", "/")
            client.getresponse().read()
            wait_for(lambda: len(serving.server.active_channels) == 201)
            looks = 0
            for _ in range(100):
                client.request("GET", "/")
                client.getresponse().read()
        assert looks < 1000


def ask(path: str = "/", method: str = "GET", *headers: str) -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *headers, "", "")).encode()


LAST = ask("/", "GET", "Connection: close")


def left(serving: Serving) -> int:
    """Bytes that wait for the clients."""
    return sum(channel.total_outbufs_len for channel in list(serving.server.active_channels.values()))


@pytest.mark.usefixtures("_selector")
def test_a_stream_that_pauses_makes_no_work() -> None:
    """What it has sent so far did not fit the socket at once."""
    go, size = threading.Event(), 8 << 20

    def pauses(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size + 5))])
        yield b"x" * size
        go.wait(120)
        yield b"hello"

    with Serving(pauses, 2) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        sock.sendall(ask())
        wait_for(lambda: left(serving))
        rests(serving)
        received = b""
        while len(received) < size:
            received += sock.recv(1 << 20)
        rests(serving)
        go.set()
        while not received.endswith(b"hello"):
            received += sock.recv(1000)


def test_an_answer_does_not_wait_for_the_one_behind_it() -> None:
    """Our own, made on the loop, with one of the application behind it, which is made in a pool."""
    go = threading.Event()

    def page(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        go.wait(120)
        return hello(environ, start_response)

    with Serving(page, 1) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        sock.sendall(ask("/-/livez") + ask())
        assert sock.recv(1000).endswith(b"ok\n")
        rests(serving)
        go.set()
        assert answered(sock, 5)


def test_a_client_that_sends_ahead_takes_turns_with_the_others() -> None:
    """On the loop, too: 100 requests of one do not hold up the one of another."""
    asked, arrived, go = list[str](), threading.Event(), threading.Event()

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        asked.append(environ["PATH_INFO"])
        arrived.set()
        go.wait(120)
        return hello(environ, start_response)

    with Serving(app, 0) as serving, contextlib.ExitStack() as stack:
        many, one = (stack.enter_context(socket.create_connection(serving.address, timeout=60)) for _ in range(2))
        many.sendall(ask("/many") * 100)
        assert arrived.wait(60)
        one.sendall(ask("/one"))
        go.set()
        assert answered(one, 5)
        for _ in range(100):
            assert answered(many, 5)
    assert asked.index("/one") < 10


def test_answers_that_nobody_takes_are_not_made() -> None:
    """To requests sent ahead, with the application on the loop; all are made once the client takes them."""
    asked, count, size = 0, 100, 1 << 20

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        nonlocal asked
        asked += 1
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size))])
        return [b"x" * size]

    with Serving(app, 0) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        sock.sendall(ask() * (count - 1) + LAST)
        wait_for(lambda: left(serving) > POOL_BUFFER)
        rests(serving)
        assert POOL_BUFFER < left(serving) <= POOL_BUFFER + size + 200
        assert asked < count
        assert len(reads(sock)) > count * size and asked == count


def test_a_large_answer_with_a_request_behind_it() -> None:
    """It is more than waits for a client at most: its pool thread waits, and the loop knows that."""
    size = POOL_BUFFER + (8 << 20)

    with Serving(of_size(size), 2) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        sock.sendall(ask() + LAST)
        wait_for(lambda: left(serving) > POOL_BUFFER)
        rests(serving)
        assert len(reads(sock)) > 2 * size


def test_two_never_send_from_one_buffer() -> None:
    """While a thread has it (to send a 100 Continue), the loop waits with what is left in it."""
    size = 8 << 20

    with Serving(of_size(size), 2) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        sock.sendall(ask() + ask("/", "POST", "Content-Length: 5", "Expect: 100-continue"))
        wait_for(lambda: left(serving))
        (channel,) = serving.server.active_channels.values()
        wait_for(lambda: not channel.requests)
        with channel.outbuf_lock:
            kept = channel.total_outbufs_len
            received = 0
            sock.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                while part := sock.recv(1 << 20):
                    received += len(part)
            assert channel.total_outbufs_len == kept > 0
        sock.settimeout(60)
        while received < size:
            received += len(sock.recv(1 << 20))
        sock.sendall(b"hello")


def with_a_body(kind: str, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """An answer with a body, also to HEAD, which web frameworks leave out and WSGI does not."""
    length = [] if "unknown" in kind else [("Content-Length", "5")]
    write = start_response("200 OK", [("Content-Type", "text/plain"), *length])
    if kind == "written":
        write(b"hello")
        return []
    if kind == "file":
        return environ.get("wsgi.file_wrapper", lambda file: [file.read()])(io.BytesIO(b"hello"))  # type: ignore[no-any-return]
    return [b"hello"] if kind == "list" else iter([b"he", b"llo"])


@POOL
@pytest.mark.parametrize("kind", ["list", "written", "pieces", "file", "pieces, unknown length"])
def test_head_has_no_body(threads: int, kind: str) -> None:
    with Serving(partial(with_a_body, kind), threads) as serving:
        head, _, rest = serving.raw(ask("/", "HEAD") + LAST).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    if "unknown" in kind:
        assert b"\r\nConnection: close" in head and rest == b""
    else:
        assert b"\r\nContent-Length: 5" in head
        assert rest.startswith(b"HTTP/1.1 200 OK\r\n") and rest.endswith(b"\r\n\r\nhello")


@POOL
@pytest.mark.usefixtures("_selector")
def test_an_answer_that_the_disk_has_no_room_for(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large answers that wait are in temporary files: the connection ends, and is no work for the loop."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is no such folder"))
    size = 8 << 20

    with Serving(of_size(size), threads) as serving:
        with contextlib.suppress(ConnectionError):
            serving.raw(ask())
        wait_for(lambda: not serving.server.active_channels)
        rests(serving)


@POOL
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # such a file cannot be closed, either
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_request_that_the_disk_has_no_room_for(
    threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Large bodies are in temporary files, too: 503, which is said, and everybody else is served."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda mode: open("/dev/full", mode))  # noqa: SIM115  # waitress closes it
    with Serving(hello, threads) as serving:
        with socket.create_connection(serving.address, timeout=60) as sock:
            sock.sendall(ask("/", "POST", "Content-Length: 1000000") + bytes(1_000_000))
            assert sock.recv(1000).startswith(b"HTTP/1.1 503 ")
        assert serving.get() == (200, b"hello")
        wait_for(lambda: "a request was refused, for there is no room for temporary files" in caplog.text)
        wait_for(lambda: not serving.server.active_channels)


@POOL
@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody cut a file that is open")
def test_a_file_that_is_cut_while_it_is_sent(threads: int, tmp_path: Path) -> None:
    path, size = tmp_path / "large", 64 << 20

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size))])
        return environ["wsgi.file_wrapper"](path.open("rb"))  # type: ignore[no-any-return]

    with path.open("wb") as file:
        file.truncate(size)
    with Serving(app, threads) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        sock.sendall(ask())
        received = len(sock.recv(1000))
        os.truncate(path, 1 << 20)
        assert received + len(reads(sock)) < size
        wait_for(lambda: not serving.server.active_channels)


class ShortOfMemory(selectors.DefaultSelector):
    """Refuses to wait for a connection as often as is said; the system does so when it lacks memory."""

    refuses = 0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if isinstance(data, GateChannel) and ShortOfMemory.refuses:
            ShortOfMemory.refuses -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().register(fileobj, events, data)


@pytest.mark.parametrize("known", [False, True], ids=["a new one", "one that is waited for again"])
def test_a_connection_that_cannot_be_waited_for(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends; the others stay."""
    monkeypatch.setattr(GateServer, "selector_class", ShortOfMemory)
    app = Busy()
    with Serving(app, 2) as serving, contextlib.ExitStack() as stack:
        if known:
            sock = stack.enter_context(socket.create_connection(serving.address, timeout=60))
            sock.sendall(ask() * 2)
            assert app.asked.acquire(timeout=60)
            sock.sendall(ask())
            wait_for(lambda: not any(channel.watched for channel in serving.server.active_channels.values()))
        monkeypatch.setattr(ShortOfMemory, "refuses", 1)
        if not known:
            sock = stack.enter_context(socket.create_connection(serving.address, timeout=60))
        app.go.release(10)
        with contextlib.suppress(ConnectionError):
            while sock.recv(1000):
                pass
        assert ShortOfMemory.refuses == 0
        assert serving.get() == (200, b"hello")


def test_an_address_that_cannot_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a door with several: all of them are tried again."""

    class RefusesOnce(selectors.DefaultSelector):
        refused: socket.socket | None

        def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
            if fileobj is RefusesOnce.refused:
                RefusesOnce.refused = None
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().register(fileobj, events, data)

    monkeypatch.setattr(GateServer, "selector_class", RefusesOnce)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        RefusesOnce.refused = socks[1]
        server = GateServer(Gate(hello, Lease()), socks, ServiceSettings(), 100, RequestCounters(Counters(1), 0))
        stack.callback(wasyncore.close_all, server._map)
        stack.enter_context(contextlib.closing(server._selector))
        server.loop.watch(server, selectors.EVENT_READ)
        assert not server.watched
        server.loop.watch(server, selectors.EVENT_READ)
        assert {key.fileobj for key in server._selector.get_map().values()} >= set(socks)


class Resets(socket.socket):
    """A listening socket on which the first connection is reset before it is accepted, as Windows tells."""

    told = False

    def accept(self) -> Any:
        if not self.told:
            self.told = True
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return super().accept()


def test_a_client_that_is_gone_before_it_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    """It is no reason to accept nobody for a while."""
    listening = Resets()
    listening.bind(("127.0.0.1", 0))
    listening.listen(10)
    with Serving(hello, 0, sock=listening) as serving:
        assert serving.get() == (200, b"hello")
    assert listening.told and not caplog.text


@POOL
def test_what_nobody_foresaw(threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It ends the connection, not the thread, nor the loop."""
    faulty, close = [True], GateParser.close

    def fails(request: GateParser) -> None:
        close(request)
        if faulty:
            raise RuntimeError("unforeseen")

    monkeypatch.setattr(GateParser, "close", fails)
    with Serving(hello, threads) as serving:
        for _ in range(3):
            with socket.create_connection(serving.address, timeout=60) as sock:
                sock.sendall(ask() * 2)
                assert len(reads(sock)) < 1000
        faulty.clear()
        assert serving.get() == (200, b"hello")
    assert 3 <= caplog.text.count("a request could not be answered") <= 6  # the second of two may be known or not


# === What a server owes its application and its clients ======================
@POOL
def test_the_whole_validator_of_wsgiref(threads: int, caplog: pytest.LogCaptureFixture) -> None:
    """Around the application, and around the gate's own answers."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        assert environ["wsgi.multiprocess"] is True and environ["wsgi.multithread"] is (threads > 1)
        size = str(len(environ["wsgi.input"].read(10_000))).encode()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(size)))])
        return [size]

    service = ServiceSettings(workers="2")
    with Serving(validator(app), threads, service=service) as serving:
        request = ask("/a%20b?c=d", "POST", "Content-Length: 5", "Connection: close")
        assert serving.raw(request + b"hello").endswith(b"5")
        serving.server.application = validator(serving.server.application)
        for path, status in {"/x": 200, "/-/livez": 200, "/-/gate": 204, "/-/health": 200, "/-/none": 404}.items():
            assert serving.get(path)[0] == status
        serving.lease.until.value = 0.0
        assert [serving.get(path)[0] for path in ("/", "/-/readyz", "/-/gate")] == [503, 503, 403]
    assert not caplog.text


@POOL
def test_an_answer_does_not_wait_for_what_its_application_closes(threads: int) -> None:
    """Flask's `call_on_close`; on the loop nothing else can run meanwhile."""
    go, closed = threading.Event(), threading.Event()

    class Closes(list[bytes]):
        def close(self) -> None:
            go.wait(120)
            closed.set()

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return Closes(hello(environ, start_response))

    if not threads:
        go.set()
    with Serving(app, threads) as serving:
        assert serving.get() == (200, b"hello")
        assert closed.is_set() is not bool(threads)
        go.set()
        wait_for(closed.is_set)


@POOL
@pytest.mark.parametrize(("method", "status"), [("HEAD", "200 OK"), ("GET", "204 No Content")])
def test_a_head_before_a_failure(threads: int, method: str, status: str) -> None:
    """What was written before the application raised is sent, although it has no body."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response(status, [("X-Said", "so")] + ([("Content-Type", "text/plain")] if method == "HEAD" else []))
        yield b"x"
        raise ValueError("after its head")

    with Serving(app, threads) as serving:
        answer = serving.raw(ask("/", method))
    assert answer.startswith(f"HTTP/1.1 {status}".encode()) and b"X-Said: so" in answer


@POOL
def test_no_path_begins_a_line_of_the_log(threads: int, caplog: pytest.LogCaptureFixture) -> None:
    def broken(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        raise ValueError("broken")

    with Serving(broken, threads) as serving:
        assert serving.get("/%0aERROR%20forged")[0] == 500
    (record,) = (record for record in caplog.records if record.name == "waitress")
    first, *lines = LineFormatter().format(record).splitlines()  # as workers log
    assert r"\nERROR forged" in first and record.exc_info
    assert lines and all(line.startswith("    ") for line in lines)


@POOL
def test_no_websockets(threads: int) -> None:
    """The application would take it for a plain GET."""
    with Serving(hello, threads) as serving:
        answer = serving.raw(ask("/chat", "GET", "Connection: Upgrade, close", "Upgrade: WebSocket"))
        assert answer.startswith(b"HTTP/1.1 501 ") and b"websockets" in answer
        assert serving.raw(ask("/-/gate", "GET", "Connection: Upgrade, close", "Upgrade: websocket"))[9:12] == b"204"


TARGETS = [b"/?\xff", b"/\xff\xfe", b"/%00%0d%0a", b"/%ff?%ff=%", b"//x/%2e%2e/", b"/" + b"%" * 1000]


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_a_request_holds(target: bytes, lease: Lease, caplog: pytest.LogCaptureFixture) -> None:
    """Of the built-in page, and of the closed gate: bounded words."""
    with Serving(builtin_app(ServiceSettings()), 0) as serving:
        for until in (math.inf, 0.0):
            serving.lease.until.value = until
            headers = b"Host: x\r\nX: \xff\xc3\r\nConnection: close"
            answer = serving.raw(b"GET %b HTTP/1.1\r\n%b\r\n\r\n" % (target, headers))
            assert int(answer[9:12]) in (200, 404, 503) and len(answer) < 1000 and b"Traceback" not in answer
    assert not caplog.text


def test_requests_that_the_end_does_not_wait_for(caplog: pytest.LogCaptureFixture) -> None:
    """While the pool goes on taking them from their connections."""

    class Vanishing(list[Any]):
        def __bool__(self) -> bool:
            return True

        def __getitem__(self, index: Any) -> Any:
            return [][0]

    with Serving(hello, 1) as serving, socket.create_connection(serving.address, timeout=60):
        wait_for(lambda: serving.server.active_channels)
        (channel,) = serving.server.active_channels.values()
        channel.requests = Vanishing()
        serving.server._note_cut()
        channel.requests = []
    assert [record.getMessage() for record in caplog.records] == [
        "requests cut, for they took longer than service.drain, 7.5 s: 1"]  # fmt: skip


def test_a_share_of_the_connections() -> None:
    """A worker takes one at a time once it holds more than the least busy of the others and some."""
    counters = Counters(3)
    one, two = RequestCounters(counters, 0), RequestCounters(counters, 1)
    one.hold(500)
    assert not one.ahead, "it is alone"
    two.hold(0)
    assert one.ahead and not two.ahead
    for held, ahead in ((4, False), (5, True), (0, False)):
        one.hold(held)
        assert one.ahead is ahead


def test_who_is_ahead_lets_the_others_come_first() -> None:
    """Each time, and not only when it gets ahead: one of two workers took all new connections of a busy machine."""
    now, counters, sock = [1000.0], Counters(2), socket.create_server(("127.0.0.1", 0))
    with Serving(hello, 0, sock=sock, tally=RequestCounters(counters, 0)) as serving, contextlib.ExitStack() as stack:
        server, other = serving.server, RequestCounters(counters, 1)
        server.clock = lambda: now[0]
        other.hold(0)

        def holds(number: int) -> bool:
            held = len(server.active_channels)
            return held == number and not server._alone  # who comes in a turn in which it has so many is taken, too

        def come(number: int, until: int) -> None:
            for _ in range(number):
                stack.enter_context(socket.create_connection(serving.address, timeout=60))
            wait_for(lambda: not server.watched)
            assert len(server.active_channels) == until
            now[0] += HEAD_START
            wait_for(lambda: holds(until + number))

        for _ in range(5):
            stack.enter_context(socket.create_connection(serving.address, timeout=60))
        wait_for(lambda: len(server.active_channels) == 5)
        come(3, 5)
        now[0] += 1
        come(2, 8)
        now[0] += 1
        come(70, 10)  # more than it takes in a turn
        other.hold(60)
        now[0] += 1
        stack.enter_context(socket.create_connection(serving.address, timeout=60))
        wait_for(lambda: holds(81))


# What is used of waitress inside: of an object of that class, which name. Another version fails here first.
INTERNALS = {
    HTTPChannel: "request requests requests_lock outbuf_lock outbufs total_outbufs_len will_close close_when_flushed "
    "last_activity creation_time connected addr adj server task_class error_task_class parser_class "
    "received service send readable writable handle_write handle_close handle_expt_event add_channel del_channel "
    "cancel _flush_exception _flush_some_if_lockable _flush_outbufs_below_high_watermark",
    TcpWSGIServer: "application adj channel_class active_channels trigger accepting _map socket readable accept "
    "handle_accept set_reuse_addr pull_trigger add_task del_channel",
    WSGITask: "channel request version status wrote_header has_body chunked_response environ "
    "service get_environment set_close_on_finish build_response_header write finish",
    ErrorTask: "request channel service",
    HTTPRequestParser: "completed headers_finished header_plus error body_rcv chunked expect_continue empty headers "
    "received close parse_header",
    ThreadedTaskDispatcher: "queue lock threads active_count set_thread_count add_task shutdown",
    Adjustments: "asyncore_loop_timeout asyncore_use_poll connection_limit outbuf_high_watermark send_bytes "
    "inbuf_overflow max_request_body_size url_scheme threads",
    ChunkedReceiver: "buf completed received",
}


def test_every_internal_of_waitress_is_there() -> None:
    with Serving(hello, 0) as serving, socket.create_connection(serving.address, timeout=60) as sock:
        sock.sendall(ask()[:-2])
        wait_for(lambda: [channel for channel in serving.server.active_channels.values() if channel.request])
        (channel,) = serving.server.active_channels.values()
        objects = {HTTPChannel: channel, TcpWSGIServer: serving.server, Adjustments: channel.adj}
        objects[HTTPRequestParser] = HTTPRequestParser(channel.adj)
        objects[ThreadedTaskDispatcher] = ThreadedTaskDispatcher()
        objects[WSGITask], objects[ErrorTask] = WSGITask(channel, channel.request), ErrorTask(channel, channel.request)
        objects[ChunkedReceiver] = ChunkedReceiver(OverflowableBuffer(1))
        missing = [f"{kind.__name__}.{name}" for kind, names in INTERNALS.items() for name in names.split()
                   if not hasattr(objects[kind], name)]  # fmt: skip
    assert not missing
    assert "sendbuf_len" in HTTPChannel._flush_some.__code__.co_names, "ours is set, whether it is read or not"
    assert all(map(callable, (wasyncore.read, wasyncore.write, wasyncore.close_all, wasyncore.loop)))


# === The pool ================================================================
class Task:
    """What a pool's thread runs, instead of a connection."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.service, self.cancelled = run, False

    def cancel(self) -> None:
        self.cancelled = True


def test_no_task_is_forgotten() -> None:
    """Tasks from several sides, in bursts and one by one, brief and blocking; threads change at almost every step."""
    pool, count = Pool(4), 3000
    done = collections.deque[int]()

    def run(number: int) -> None:
        if number % 7 == 0:
            time.sleep(0.0002)
        done.append(number)

    def put(numbers: Iterable[int]) -> None:
        for number in numbers:
            pool.add_task(Task(partial(run, number)))  # type: ignore[arg-type]
            if number % 50 == 0:
                wait_for(lambda: not pool.waiting)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        sides = [threading.Thread(target=put, args=(range(side, count, 3),)) for side in range(3)]
        for side in sides:
            side.start()
        for side in sides:
            side.join(60)
        wait_for(lambda: len(done) == count)
        assert sorted(done) == list(range(count))
        wait_for(lambda: not pool.queue and not pool.active_count)
    finally:
        sys.setswitchinterval(interval)
        pool.shutdown(timeout=5)


def test_tasks_that_block_get_a_thread_each() -> None:
    pool, together = Pool(4), threading.Barrier(5)
    assert not pool.active_count, "threads that begin are idle"
    try:
        for _ in range(4):
            pool.add_task(Task(lambda: together.wait(60) and None))  # type: ignore[arg-type]
        together.wait(60)
    finally:
        pool.shutdown(timeout=5)


def test_the_end_of_a_pool() -> None:
    """Idle threads end at once, a busy one after its task; what no thread has begun is cancelled."""
    pool, go, began = Pool(2), threading.Event(), threading.Semaphore(0)

    def busy() -> None:
        began.release()
        go.wait(120)

    first = [Task(busy), Task(busy)]
    for task in first:
        pool.add_task(task)  # type: ignore[arg-type]
        assert began.acquire(timeout=60)
    late = Task(busy)
    pool.add_task(late)  # type: ignore[arg-type]
    assert pool.waiting == 1
    pool.shutdown(timeout=0.1)
    assert len(pool.threads) == 2, "it does not wait for the busy ones"
    assert late.cancelled and not any(task.cancelled for task in first)
    go.set()
    wait_for(lambda: not pool.threads)
    assert not began.acquire(blocking=False)
