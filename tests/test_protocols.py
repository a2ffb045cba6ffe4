"""HTTP, TCP and names: every answer and every way in which a server can spoil one, from real sockets on loopback."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
from conftest import late_logins, no_leaks, wait_for
from console import Local, local_console
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json
from service import run_cheaply, write_inventory
from wsman_server import Certificate, make_certificate

from healthchecker import (
    CONNECTIONS,
    ConnectionContext,
    Counters,
    Deadline,
    Guards,
    KnownHosts,
    LoginGuard,
    LoginRecord,
    Metrics,
    ProbeError,
    Resolver,
    Resource,
    Sample,
    SecretError,
    ServingMetrics,
    Target,
    Verdict,
    binding,
    find_resource,
    import_inventory,
    load_inventory,
    main,
    one_line,
    poll_once,
    quoted,
    read_url,
    status_range,
    value_at,
)

TIMEOUT = 30.0  # seconds; what does not wait for it is over long before
SHORT = 1.0  # seconds of a poll that has to wait for its end
LATE = 10.0  # seconds that a busy machine may add
SECRET = "s3cr3t-W0rd"
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ACCESS = ConnectionContext(KnownHosts(Path("no such file")), Resolver())
Play = Callable[[Any], None]


class Server:
    """A port on loopback; each connection is given to `play`, and ends with it."""

    def __init__(self, play: Play, certificate: Certificate | None = None, host: str = "127.0.0.1",
                 client: Certificate | None = None) -> None:
        self.play, self.requests, self.errors = play, list[str](), list[str]()
        self.ending = threading.Event()
        self._context = None
        if certificate:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate.certificate_file, certificate.key_file)
            if client:
                self._context.verify_mode = ssl.CERT_REQUIRED
                self._context.load_verify_locations(client.certificate_file)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family)
        self.port: int = self._listening.getsockname()[1]
        self.origin = f"{'https' if certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Server:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        with contextlib.suppress(OSError), socket.create_connection(self._listening.getsockname()[:2], 5):
            pass
        for thread in self._threads:
            thread.join()
        self._listening.close()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listening.accept()
            if self.ending.is_set():
                sock.close()
                return
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.settimeout(TIMEOUT)
            try:
                secured = self._context.wrap_socket(sock, server_side=True) if self._context else sock
            except ssl.SSLError as error:
                self.errors.append(str(error))
                return
            with secured:
                self.play((self, secured))
                with contextlib.suppress(OSError):
                    secured.shutdown(socket.SHUT_WR)
                    while secured.recv(4096):  # or what was sent could be lost by a reset
                        pass


def read_request(sock: socket.socket) -> str:
    head = b""
    while b"\r\n\r\n" not in head and (chunk := sock.recv(4096)):
        head += chunk
    return head.decode("latin-1")


def answers(*sent: bytes | Callable[[str], bytes]) -> Play:
    """Answers each request with the next of these, the last one again and again."""
    left = list(sent)

    def play(connection: tuple[Server, socket.socket]) -> None:
        server, sock = connection
        request = read_request(sock)
        if not request:  # it was closed without one
            return
        server.requests.append(request)
        answer = left.pop(0) if len(left) > 1 else left[0]
        sock.sendall(answer(request) if callable(answer) else answer)

    return play


def says(sent: bytes) -> Play:
    """Sends something unasked."""
    return lambda connection: connection[1].sendall(sent)


def endless(first: bytes, more: bytes, pause: float = 0.0) -> Play:
    """Never ends by itself."""

    def play(connection: tuple[Server, socket.socket]) -> None:
        server, sock = connection
        sock.sendall(first)
        while not server.ending.wait(pause):
            sock.sendall(more)

    return play


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def leads(to: str, status: int = 302) -> bytes:
    return answer(b"", f"Location: {to}", status=f"{status} Found")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "host", days=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inventory")


class Asker:
    """A resource as the inventory states it; each poll is one of its own."""

    def __init__(self, folder: Path, access: ConnectionContext = ACCESS, trusted: str | None = None,
                 **stated: Any) -> None:
        path = folder / "inventory.yaml"
        stated = {"name": "asked", "timeout": TIMEOUT, **stated}
        path.write_text(json.dumps({"resources": [stated]}, default=str), encoding="utf-8")  # JSON is YAML
        [self.settings] = load_inventory(path).resources
        known: dict[str, Any] = {field.name: "" for field in fields(Target)}
        self.target = Target(**known | {"settings": self.settings, "host_key": trusted, "fault": None})
        guard = access.guard_of(self.target) if self.settings.password else LoginGuard()
        self.connection = CONNECTIONS[self.settings.platform](self.target, guard, access)

    def poll(self) -> tuple[Verdict, Sample | None]:
        begun = time.monotonic()
        verdict, sample = poll_once(self.target, self.connection, None)
        assert time.monotonic() - begun < self.settings.timeout + LATE
        assert verdict.reason == one_line(verdict.reason)
        assert SECRET not in verdict.reason
        return verdict, sample


def outcome(asker: Asker) -> tuple[str, str, str]:
    verdict, _ = asker.poll()
    return verdict.state, verdict.cause, verdict.reason


# --- HTTP ---
def test_an_answer_as_expected(folder: Path) -> None:
    """What is asked, what is found, and what of it is shown."""
    body = json.dumps({"status": "ok", "checks": [{"state": 3}, {"state": None}], "up": True}).encode()
    with no_leaks(), Server(answers(answer(body))) as server:
        asker = Asker(folder, platform="http", url=f"{server.origin}/health?a=b", headers={"accept": "text/*"}, expect={
            "status": ["200-299"], "contains": "checks", "within": "20 s",
            "json": {"status": "ok", "checks.0.state": "3", "checks.1.state": "null", "up": "true"}})
        verdict, sample = asker.poll()
    assert verdict == Verdict("healthy") and sample
    assert 0 < sample.metrics["response_seconds"] < 20
    assert [*sample.checks] == ["status", "contains", "json status", "json checks.0.state", "json checks.1.state",
                                "json up", "within"]
    [request] = server.requests
    line, *head = request.split("\r\n")
    assert line == "GET /health?a=b HTTP/1.1"
    sent = dict(header.split(": ", 1) for header in head if header)
    assert sent == {"Host": f"127.0.0.1:{server.port}", "Accept": "text/*", "Accept-Encoding": "identity",
                    "Connection": "close", "User-Agent": sent["User-Agent"]}


BODY = json.dumps({"a": {"b": "x'\n; check forged: y\u202e"}, "list": [1]}).encode()
UNEXPECTED: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "status": (answer(b"", status="503 fine; check: ok"), {}, "expected status 200-299, came 503"),
    "several": (answer(b""), {"status": ["201", "300-399"]}, "expected status 201, 300-399, came 200"),
    "redirect": (leads("/login"), {}, 'expected status 200-299, came 302, which leads to "/login"'),
    "another protocol": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", {}, "came 101"),
    "text": (answer(b"all b\"ad\n"), {"contains": "all good"}, r'contains: expected "all good", came "all b\"ad\n"'),
    "long text": (answer(b"x" * 999), {"contains": "y"}, f'came "{"x" * 80}"…'),
    "nothing": (answer(b""), {"contains": "y"}, 'expected "y", came ""'),
    "value": (answer(BODY), {"json": {"a.b": "z"}}, "json a.b: expected \"z\", came \"x'\\n; check forged: y\\u202e\""),
    "no value": (answer(BODY), {"json": {"a.c": "z"}}, 'json a.c: expected "z", came no such value'),
    "no index": (answer(BODY), {"json": {"list.1": "z"}}, "came no such value"),
    "index from behind": (answer(BODY), {"json": {"list.-1": "1"}}, "came no such value"),
    "into a text": (answer(BODY), {"json": {"a.b.0": "x"}}, "came no such value"),
    "no JSON": (answer(b"<html>"), {"json": {"a": "z"}}, "came no JSON: expected value at line 1 column 1"),
    "deep JSON": (answer(b"[" * 100_000), {"json": {"0": "z"}}, "came no JSON: recursion limit exceeded at line 1"),
    "half a character": (answer(rb'{"a": "\udc00"}'), {"json": {"a": "z"}}, "came no JSON: lone leading surrogate in"),
    "long JSON": (answer(b'{"a": "z", "b": "%s"}' % (b"x" * (1 << 19))), {"json": {"a": "z"}},
                  'expected "z", came more than the 512 KiB that are looked at'),
    "a text, not a number": (answer(b'{"a": "1.10"}'), {"json": {"a": "1.1"}}, 'expected "1.1", came "1.10"'),
    "a number, not true": (answer(b'{"a": 1}'), {"json": {"a": "true"}}, 'expected "true", came "1"'),
    "another number": (answer(b'{"a": 1.10}'), {"json": {"a": "1.100001"}}, 'expected "1.100001", came "1.1"'),
}


@pytest.mark.parametrize("case", UNEXPECTED)
def test_an_answer_that_is_not_as_expected(case: str, folder: Path) -> None:
    sent, expect, why = UNEXPECTED[case]
    with Server(answers(sent)) as server:
        state, cause, reason = outcome(Asker(folder, platform="http", url=server.origin, expect=expect))
    assert (state, cause) == ("unhealthy", "check")
    assert why in reason


@pytest.mark.parametrize("number", ["1.10", "1.1", "11e-1", "-0.0", "1e3", "1E+3", "12345678901234567890123"])
def test_a_number_as_it_is_written(number: str, folder: Path) -> None:
    """In the inventory as in the answer, or in another way."""
    with Server(answers(answer(b'{"a": %s}' % number.encode()))) as server:
        for written in (number, json.dumps(json.loads(number))):
            asker = Asker(folder, platform="http", url=server.origin, expect={"json": {"a": written}})
            assert outcome(asker) == ("healthy", "", "")


@pytest.mark.parametrize("before", [b"100 Continue", b"102 Processing", b"103 Early Hints", b"199 Whatever"])
def test_an_answer_that_others_come_before(before: bytes, folder: Path) -> None:
    """Interim responses say nothing of how it is (RFC 9110, 15.2)."""
    interim = b"HTTP/1.1 " + before + b"\r\nLink: </style.css>; rel=preload\r\nContent-Length: 9\r\n\r\n"
    with Server(answers(interim * 3 + GOOD)) as server:
        asker = Asker(folder, platform="http", url=server.origin, expect={"contains": "ok"})
        assert outcome(asker) == ("healthy", "", "")


@pytest.mark.parametrize("answered", [
    answer(b'\xef\xbb\xbf{"a": "z"}'), answer(b'{"a": "z"}', "Content-Encoding: Identity"),
])  # fmt: skip
def test_an_answer_in_another_way_of_writing(answered: bytes, folder: Path) -> None:
    """A mark before the JSON, which a reader may ignore (RFC 8259, 8.1); capitals, which mean nothing there."""
    with Server(answers(answered)) as server:
        asker = Asker(folder, platform="http", url=server.origin, expect={"json": {"a": "z"}})
        assert outcome(asker) == ("healthy", "", "")


@pytest.mark.parametrize("version", [1, 3])
def test_a_certificate_of_no_version(folder: Path, version: int) -> None:
    """Devices write 3 where 2 stands for the third one; what is pinned is valid all the same, and its days are not
    known."""
    made = make_certificate(folder, f"odd{version}", days=20)
    der = x509.load_pem_x509_certificate(made.certificate_file.read_bytes()).public_bytes(serialization.Encoding.DER)
    odd = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01" + bytes([version]), 1)
    made.certificate_file.write_text(ssl.DER_cert_to_PEM_cert(odd), encoding="ascii")
    with Server(answers(GOOD), made) as server:
        pinned = {"platform": "http", "url": server.origin, "certificate_fingerprint": hashlib.sha256(odd).hexdigest()}
        assert outcome(Asker(folder, **pinned)) == ("healthy", "", "")
        assert outcome(Asker(folder, **pinned, expect={"certificate_days": 5}))[0] == "degraded"


def test_an_answer_that_is_late(folder: Path) -> None:
    def slow(_request: str) -> bytes:
        time.sleep(0.3)
        return GOOD

    with Server(answers(slow)) as server:
        state, cause, reason = outcome(Asker(folder, platform="http", url=server.origin, expect={"within": 0.2}))
    assert (state, cause) == ("unhealthy", "check")
    assert reason.startswith("check within: expected 0.2 s, came 0.")


def test_the_wait_for_a_turn_is_not_the_time_of_the_host(folder: Path) -> None:
    """Of a credential that nobody has proven, one login at a time is without outcome."""
    access, opened = ConnectionContext(KnownHosts(Path("no such file")), Resolver(), Guards()), threading.Event()

    def greet(connection: tuple[Server, socket.socket]) -> None:
        opened.set()
        answers(GOOD)(connection)

    with Server(greet) as server:
        asker = Asker(folder, access, platform="http", url=server.origin, username="u", password=SECRET)
        polled: list[tuple[Verdict, Sample | None]] = []
        poller = threading.Thread(target=lambda: polled.append(asker.poll()))
        with asker.connection._guard.attempt("other", Deadline(TIMEOUT), LoginRecord()):
            begun = time.monotonic()
            poller.start()
            assert opened.wait(TIMEOUT)
            assert not server.ending.wait(SHORT)
        poller.join()
        [(_, sample)] = polled
    assert sample and 0 < sample.metrics["response_seconds"] <= time.monotonic() - begun - SHORT


@pytest.mark.parametrize("hops", [0, 1])
@pytest.mark.parametrize(("status", "counted"), [
    ("401 No", {"refused": 1}), ("200 OK", {"accepted": 1}), ("503 Busy", {}),
])  # fmt: skip
def test_what_is_said_of_a_password_after_the_poll(
    folder: Path, status: str, counted: dict[str, int], hops: int
) -> None:
    """A refusal counts, or each poll would send the wrong password again, until the account is locked."""
    may_answer = threading.Event()

    def tardy(_request: str) -> bytes:
        may_answer.wait(30)
        return answer(b"", "WWW-Authenticate: Basic realm=x", status=status)

    access = ConnectionContext(KnownHosts(Path("no such file")), Resolver())
    with no_leaks(), Server(answers(*[leads("/there")] * hops, tardy)) as server:
        asker = Asker(folder, access, platform="http", url=server.origin, username="m", password=SECRET, timeout=1,
                      redirects=hops)
        assert outcome(asker)[1:] == ("timeout", "no answer within 1 s")
        assert "has not answered to the login before" in outcome(asker)[2]
        may_answer.set()
        wait_for(lambda: not late_logins())
        assert len(server.requests) == 1 + hops and asker.connection.record.outcomes == counted


UNAUTHORIZED = b"HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=x\r\n"


@pytest.mark.parametrize("rest", [b"Content-Length: 9\r\n\r\nab", b"Transfer-Encoding: chunked\r\n\r\nx\r\n"])
@pytest.mark.parametrize("stalls", [True, False])
def test_a_refusal_whose_page_is_not_whole(folder: Path, rest: bytes, stalls: bool) -> None:
    """It counts all the same: what was heard of the password is that it is wrong."""
    def play(connection: tuple[Server, socket.socket]) -> None:
        server, sock = connection
        if request := read_request(sock):
            server.requests.append(request)
            sock.sendall(UNAUTHORIZED + rest)
            if stalls:
                server.ending.wait(30)

    access = ConnectionContext(KnownHosts(Path("no such file")), Resolver())
    with no_leaks(), Server(play) as server:
        asker = Asker(folder, access, platform="http", url=server.origin, username="m", password=SECRET, timeout=2)
        assert outcome(asker)[1:] == ("auth", "status 401: the secret is refused; check username and password")
        assert asker.connection.record.outcomes == {"refused": 1}


HEADS: dict[str, tuple[bytes, dict[str, int]]] = {
    "many words": (b"X: " + b"a " * 32_000 + b"\r\n" + b"Y: " + b"b " * 32_000 + b"\r\n", {"refused": 1}),
    "form feed": (b"X: a\x0cB: c\r\n", {"refused": 1}),
    "long number": (b"Content-Type: multipart/mixed; boundary*" + b"1" * 5000 + b"=x\r\n", {}),
    "step": (b"WWW-Authenticate: Negotiate oRQw\xe9\r\n", {"refused": 1}),     # of a login that this one is not
    "step among ways": (b"WWW-Authenticate: Basic realm=y, NTLM TlRM\r\n", {"refused": 1}),
}


@pytest.mark.parametrize("case", HEADS)
def test_what_a_host_writes_over_an_answer_after_the_poll(folder: Path, case: str) -> None:
    """No header keeps it from being heard, or this process busy."""
    may_answer, (more, counted) = threading.Event(), HEADS[case]

    def tardy(_request: str) -> bytes:
        may_answer.wait(30)
        return UNAUTHORIZED + more + b"Content-Length: 0\r\n\r\n"

    access = ConnectionContext(KnownHosts(Path("no such file")), Resolver())
    with no_leaks(), Server(answers(tardy)) as server:
        asker = Asker(folder, access, platform="http", url=server.origin, username="m", password=SECRET, timeout=1)
        assert outcome(asker)[1] == "timeout"
        may_answer.set()
        wait_for(lambda: not late_logins(), 20)
        assert asker.connection.record.outcomes == counted


IN_TIME = [b"", b"HTTP/1.1 401 No", UNAUTHORIZED, b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n",
           b"HTTP/1.1 102 Processing\r\n\r\n" + UNAUTHORIZED[:30]]


@pytest.mark.parametrize("in_time", IN_TIME)
def test_a_refusal_that_begins_during_the_poll_and_ends_after_it(folder: Path, in_time: bytes) -> None:
    """What came in time is not lost, and what comes before the answer itself is not it."""
    may_end, hint = threading.Event(), b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    whole = UNAUTHORIZED + b"Content-Length: 0\r\n\r\n"
    late = whole[len(in_time.rpartition(b"\n\r\n")[2]):]     # of the last one that began

    def play(connection: tuple[Server, socket.socket]) -> None:
        server, sock = connection
        server.requests.append(read_request(sock))
        sock.sendall(in_time)
        may_end.wait(30)
        sock.sendall((b"" if late != whole else hint) + late)

    access = ConnectionContext(KnownHosts(Path("no such file")), Resolver())
    with no_leaks(), Server(play) as server:
        asker = Asker(folder, access, platform="http", url=server.origin, username="m", password=SECRET, timeout=1)
        assert outcome(asker)[1] == "timeout"
        may_end.set()
        wait_for(lambda: not late_logins())
        assert asker.connection.record.outcomes == {"refused": 1} and len(server.requests) == 1


def test_a_token_that_nothing_is_said_of_is_shown_again(folder: Path) -> None:
    """Nobody counts it: the next poll is not kept waiting for what comes of the last."""
    ended = threading.Event()

    def tardy(_request: str) -> bytes:
        ended.wait(30)
        return GOOD

    with no_leaks(), Server(answers(tardy)) as server:
        asker = Asker(folder, platform="http", url=server.origin, password=SECRET, timeout=1)
        for _ in range(2):
            assert outcome(asker)[1:] == ("timeout", "no answer in time")
            assert not late_logins()
        assert len(server.requests) == 2
        ended.set()


PACKED = answer(gzip.compress(b"\0" * (8 << 20)), "Content-Encoding: gzip")
ENDLESS_HEAD = b"HTTP/1.1 200 OK\r\n"
SPOILT: dict[str, tuple[Play, str, str]] = {
    "garbage": (says(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"), "protocol", "not HTTP"),
    "HTTP/0.9": (says(b"<html>"), "protocol", "not HTTP"),
    "no answer": (says(b""), "unreachable", "closed the connection before it answered"),
    "half a body": (answers(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab"), "protocol", "not whole"),
    "bad chunk": (answers(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"), "protocol", "not whole"),
    "long line": (says(b"HTTP/1.1 200 " + b"b" * 70_000), "protocol", "cannot be read: got more than 65536 bytes"),
    "many headers": (says(ENDLESS_HEAD + b"A: b\r\n" * 200), "protocol", "cannot be read: got more than 100 headers"),
    "long header": (says(ENDLESS_HEAD + b"A: " + b"b" * 70_000), "protocol", "cannot be read: got more than 65536"),
    "100 for ever": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), "protocol", "more than 32 answers"),
    "103 for ever": (endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000), "protocol", "more than 32 answers"),
    "early hint alone": (says(b"HTTP/1.1 103 Early Hints\r\n\r\n"), "unreachable", "closed the connection"),
    "endless early hint": (endless(b"HTTP/1.1 103 Early Hints\r\n", b"A: b\r\n" * 50), "protocol", "than 100 headers"),
    "endless head": (endless(ENDLESS_HEAD, b"A: " + b"b" * 60_000 + b"\r\n"), "protocol", ""),
    "endless chunks": (
        endless(ENDLESS_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 1000),
        "protocol",
        "more than",
    ),
    "packed": (answers(PACKED), "protocol", 'packed as "gzip"'),
}


@pytest.mark.parametrize("case", SPOILT)
def test_an_answer_that_is_none(case: str, folder: Path) -> None:
    """It ends by what came, long before the deadline."""
    play, wanted, why = SPOILT[case]
    with no_leaks(), Server(play) as server:
        begun = time.monotonic()
        state, cause, reason = outcome(Asker(folder, platform="http", url=server.origin, expect={"contains": "x"}))
        assert time.monotonic() - begun < TIMEOUT
    assert (state, cause) == ("unhealthy", wanted)
    assert why in reason


LATE_ANSWERS: dict[str, Play] = {
    "silent": lambda connection: connection[0].ending.wait() and None,
    "dripping head": endless(b"HTTP/1.1 200 OK\r\nA: ", b"b", 0.05),
    "dripping body": endless(b"HTTP/1.1 200 OK\r\n\r\n", b"b", 0.05),
}


@pytest.mark.parametrize("case", LATE_ANSWERS)
@pytest.mark.parametrize("tls", [False, True])
def test_an_answer_that_never_ends(case: str, tls: bool, folder: Path, certificate: Certificate) -> None:
    with no_leaks(), Server(LATE_ANSWERS[case], certificate if tls else None) as server:
        state, cause, reason = outcome(Asker(
            folder, platform="http", url=server.origin, timeout=SHORT, ca_file=certificate.certificate_file))
    assert (state, cause) == ("unhealthy", "timeout") and reason.startswith("no answer ")


def test_a_long_body_is_looked_at_as_far_as_it_goes(folder: Path) -> None:
    """A page may be larger than the cap; what stands behind it is not seen."""
    begin = b"HTTP/1.1 200 OK\r\n\r\nfirst"
    with Server(endless(begin, b"x" * 65_536)) as server:
        url = server.origin
        assert outcome(Asker(folder, platform="http", url=url, expect={"contains": "first"}))[0] == "healthy"
        assert outcome(Asker(folder, platform="http", url=url))[0] == "healthy"
        assert "expected" in outcome(Asker(folder, platform="http", url=url, expect={"contains": "last"}))[2]


def test_nobody_listens(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for stated in ({"platform": "http", "url": f"http://127.0.0.1:{port}/"},
                   {"platform": "tcp", "hostname": "127.0.0.1", "port": port}):
        state, cause, reason = outcome(Asker(folder, **stated))
        assert (state, cause) == ("unhealthy", "unreachable")
        assert "connection refused" in reason and "winrm" not in reason.lower()


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 on loopback")
def test_ipv6(folder: Path) -> None:
    with Server(answers(GOOD), host="::1") as server:
        assert outcome(Asker(folder, platform="http", url=f"{server.origin}/x"))[0] == "healthy"
        assert f"Host: [::1]:{server.port}\r\n" in server.requests[0]
    with Server(says(b"220 ok"), host="::1") as server:
        stated = {"platform": "tcp", "hostname": "::1", "port": server.port, "expect": "220 "}
        assert outcome(Asker(folder, **stated))[0] == "healthy"


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "POST", "PUT"])
def test_methods(method: str, folder: Path) -> None:
    with Server(answers(answer(b"" if method == "HEAD" else b"ok"))) as server:
        asker = Asker(folder, platform="http", url=server.origin, method=method, headers={"Host": "other.example.com"})
        assert outcome(asker)[0] == "healthy"
    [request] = server.requests
    assert request.startswith(f"{method} / HTTP/1.1\r\n")
    assert request.lower().count("\r\nhost: ") == 1 and "\r\nHost: other.example.com\r\n" in request
    assert ("Content-Length: 0" in request) == (method in ("POST", "PUT"))


def test_proxies_of_the_environment_are_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(answers(GOOD)) as server, Server(answers(GOOD)) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.origin)
        assert outcome(Asker(folder, platform="http", url=server.origin))[0] == "healthy"
    assert len(server.requests) == 1 and not proxy.requests


# --- secrets ---
def authorization(request: str) -> str:
    return "".join(line.partition(": ")[2] for line in request.split("\r\n") if line.startswith("Authorization: "))


def test_secrets(folder: Path) -> None:
    login = base64.b64encode(f"mönitor:{SECRET}".encode()).decode()
    with Server(answers(GOOD)) as server:
        asked: dict[str, Any] = {"platform": "http", "url": server.origin, "password": SECRET}
        assert outcome(Asker(folder, **asked, username="mönitor"))[0] == "healthy"
        assert outcome(Asker(folder, **asked))[0] == "healthy"
    assert [*map(authorization, server.requests)] == [f"Basic {login}", f"Bearer {SECRET}"]


ECHOES: dict[str, Callable[[str], bytes]] = {
    "body": lambda request: answer(authorization(request).encode()),
    "body that is cut": lambda request: answer(b"x" * 60 + authorization(request).encode()),
    "whole request": lambda request: answer(request.encode()),
    "JSON": lambda request: answer(json.dumps({"a": request}).encode()),
    "header": lambda request: answer(b"key " + "".join(re.findall("X-Key: (.*?)\r", request)).encode()),
    "redirect": lambda request: leads("/login?next=" + quote(request.split(" ")[1], safe="")),
    "redirect decoded": lambda request: leads("/login?next=" + unquote(request.split(" ")[1])),
}


@pytest.mark.parametrize("case", ECHOES)
@pytest.mark.parametrize("login", [{"username": "m", "password": SECRET}, {"password": SECRET}])
def test_no_secret_is_shown_that_a_host_says_again(folder: Path, case: str, login: dict[str, str]) -> None:
    """Debug pages and error pages repeat the request; what a page of ours shows of that goes to whoever may see it."""
    query, key = "q%2FSECRET%2Bq", "key-of-many-letters"
    secrets = [SECRET, base64.b64encode(f"m:{SECRET}".encode()).decode(), query, unquote(query), quote(query), key]
    with Server(answers(ECHOES[case])) as server:
        asker = Asker(folder, platform="http", url=f"{server.origin}/?token={query}", headers={"X-Key": f"Token {key}"},
                      expect={"json": {"a": "b"}} if case == "JSON" else {"contains": "no such text"}, **login)
        verdict, sample = asker.poll()
    shown = f"{verdict.reason} {sample.to_json() if sample else ''}"
    assert "***" in shown and verdict.cause == "check"
    assert not [one for one in secrets for cut in (one, one[:6]) if cut in shown], shown


@pytest.mark.parametrize("password", ["Pa$$w\u00f6rd2024", 'quote"inside2024', 'Gr\u00fcnes"Haus\\2024'])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_no_password_is_shown_that_json_says_again(folder: Path, password: str, ascii_only: bool) -> None:
    """As PHP and Python write JSON, with what is beyond ASCII as \\u00f6; quoted by us that is JSON once more."""
    page = json.dumps({"error": "bad password", "given": password}, ensure_ascii=ascii_only)
    with Server(answers(answer(page.encode()))) as server:
        verdict, _ = Asker(folder, platform="http", url=server.origin, username="m", password=password,
                           expect={"contains": "no such text"}).poll()  # fmt: skip
    assert '\\"given\\": \\"***\\"' in verdict.reason, verdict.reason


@pytest.mark.parametrize("header", ['session="3f9a1c77e5b24d08"', "monitor:3f9a1c77e5b24d08"])
def test_no_part_of_a_header_is_shown_that_a_host_says_again(folder: Path, header: str) -> None:
    with Server(answers(answer(b"Invalid key 3f9a1c77e5b24d08"))) as server:
        verdict, _ = Asker(folder, platform="http", url=server.origin, headers={"X-Key": header},
                           expect={"contains": "no such text"}).poll()  # fmt: skip
    assert "Invalid key ***" in verdict.reason


def test_a_secret_that_is_a_word_of_ours(folder: Path) -> None:
    """Blanked there it would be told; and a short one is no part of other words."""
    with Server(answers(answer(b"", status="401 No"))) as server:
        for word in ("password", "s", "check"):
            asker = Asker(folder, platform="http", url=server.origin, username="a", password=word)
            assert outcome(asker)[2] == "status 401: the secret is refused; check username and password"


def test_no_log_shows_a_secret_that_a_host_says_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Server(answers(GOOD)) as server:
        asker = Asker(folder, platform="http", url=server.origin, password=SECRET)

        def find(*_: object) -> Any:
            raise ArithmeticError(f"it said {SECRET}")

        asker.connection.find = find
        assert outcome(asker)[2] == "the poll failed in an unforeseen way; see the log"
    assert "ArithmeticError: it said ***" in caplog.text and "in find" in caplog.text and SECRET not in caplog.text


@pytest.mark.parametrize("token", [f"{SECRET}\r\nX: y", f"{SECRET} x", f"{SECRET}é"])
def test_a_bearer_token_that_is_no_word(token: str, folder: Path) -> None:
    with Server(answers(GOOD)) as server:
        state, cause, reason = outcome(Asker(folder, platform="http", url=server.origin, password=token))
    assert (state, cause) == ("unhealthy", "credential") and "one word" in reason
    assert not server.requests


def test_a_secret_that_is_refused_is_not_tried_on_and_on(folder: Path) -> None:
    """401 counts as a login that was refused, for all who have the credential; any other bad status as none."""
    access = ConnectionContext(KnownHosts(Path("no such file")), Resolver(), Guards())
    refusal, trouble = answer(b"", status="401 Unauthorized"), answer(b"", status="503 Busy")
    with Server(answers(trouble, refusal, GOOD)) as server:
        stated = {"platform": "http", "url": server.origin, "username": "u", "password": SECRET}
        one, other = (Asker(folder, access, name=name, **stated) for name in ("one", "other"))
        access.guards.keep([one.target, other.target])
        guard = access.guards.of(one.target)
        one.connection._guard = other.connection._guard = guard
        assert outcome(one)[1] == "check" and guard.refusals == 0
        assert outcome(one)[1:] == ("auth", "status 401: the secret is refused; check username and password")
        assert guard.refusals == 1
        assert outcome(one)[2].startswith("not tried: ")
        assert outcome(other)[0] == "healthy" and guard.refusals == 0
    assert len(server.requests) == 3


def test_a_token_that_is_refused_locks_nothing(folder: Path) -> None:
    """No account counts it, so that a new one is tried at the next poll."""
    access = ConnectionContext(KnownHosts(Path("no such file")), Resolver(), Guards())
    with Server(answers(answer(b"", status="401 Unauthorized"))) as server:
        asker = Asker(folder, access, platform="http", url=server.origin, password=SECRET)
        assert [outcome(asker)[1] for _ in range(5)] == ["auth"] * 5
    assert len(server.requests) == 5


def test_a_password_that_is_refused_counts_whatever_status_is_expected(folder: Path) -> None:
    """Or each poll would send it again, until the account is locked."""
    access = ConnectionContext(KnownHosts(Path("no such file")), Resolver(), Guards())
    with Server(answers(answer(b"", status="401 Unauthorized"))) as server:
        asker = Asker(folder, access, platform="http", url=server.origin, username="u", password=SECRET,
                      expect={"status": ["200-499"]})
        assert [outcome(asker)[1] for _ in range(3)] == ["auth"] * 3
    assert len(server.requests) == 1 and asker.connection.record.outcomes == {"refused": 1}


def test_a_401_without_a_secret_is_a_status(folder: Path) -> None:
    with Server(answers(answer(b"", status="401 Unauthorized"))) as server:
        assert outcome(Asker(folder, platform="http", url=server.origin))[1:] == (
            "check", "expected status 200-299, came 401")
        assert outcome(Asker(folder, platform="http", url=server.origin, expect={"status": ["401"]}))[0] == "healthy"


# --- redirects ---
def test_redirects_are_followed_as_far_as_is_said(folder: Path) -> None:
    with Server(answers(leads("/two#part", 301), leads("three"), leads("//127.0.0.1:{0}/four", 307), GOOD)) as server:
        asked = {"platform": "http", "url": f"{server.origin}/one/"}
        assert outcome(Asker(folder, **asked))[2].endswith('came 301, which leads to "/two#part"')
    def last(request: str) -> bytes:
        return {"/": leads("/a/b?c#d"), "/a/b?c": leads("e"), "/a/e": GOOD}[request.split(" ")[1]]

    with Server(answers(last)) as server:
        asked = {"platform": "http", "url": server.origin, "method": "POST"}
        assert "came 302" in outcome(Asker(folder, **asked, redirects=1))[2]
        assert outcome(Asker(folder, **asked, redirects=2))[0] == "healthy"
    asked_for = [" ".join(request.split(" ")[:2]) for request in server.requests]
    assert asked_for == ["POST /", "GET /a/b?c", "POST /", "GET /a/b?c", "GET /a/e"]


def test_a_redirect_in_a_circle_ends(folder: Path) -> None:
    with Server(answers(leads("/"))) as server:
        assert "came 302" in outcome(Asker(folder, platform="http", url=server.origin, redirects=10))[2]
    assert len(server.requests) == 11


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/", "http://u:p@127.0.0.1/", "http://127.0.0.1:99999/", "/\x01"])
def test_a_redirect_to_what_is_no_url(location: str, folder: Path) -> None:
    with Server(answers(leads(location))) as server:
        assert outcome(Asker(folder, platform="http", url=server.origin, redirects=3))[1] == "protocol"
    assert len(server.requests) == 1


@pytest.mark.parametrize(("location", "target"), [
    ("/\u00fcber \u2603?a=b c", "/%C3%BCber%20%E2%98%83?a=b%20c"), ("/%C3%BC%20?a=%2F&b=[1]", "/%C3%BC%20?a=%2F&b=[1]"),
])  # fmt: skip
def test_a_redirect_in_other_characters(location: str, target: str, folder: Path) -> None:
    """Raw ones go as browsers send them; what is written as it should be stays."""
    with Server(answers(leads(location), GOOD)) as server:
        assert outcome(Asker(folder, platform="http", url=server.origin, redirects=1))[0] == "healthy"
        assert server.requests[1].startswith(f"GET {target} HTTP/1.1\r\n")


def test_no_secret_follows_a_redirect_to_another_origin(folder: Path, certificate: Certificate) -> None:
    """Another port, host or scheme: no secret, header or client certificate of ours, and none again on the way back."""
    own: dict[str, Any] = {"platform": "http", "username": "u", "password": SECRET, "redirects": 3,
                           "headers": {"X-Key": SECRET}}
    with Server(answers(GOOD)) as other, Server(answers(leads(f"{other.origin}/x"))) as server:
        assert outcome(Asker(folder, **own, url=server.origin))[0] == "healthy"
        assert authorization(server.requests[0]) and SECRET in server.requests[0]
        assert not authorization(other.requests[0]) and "X-Key" not in other.requests[0]
        named = server.origin.replace("127.0.0.1", "localhost")
    with Server(answers(lambda _: leads(named))) as server:  # the same machine by another name
        named = server.origin.replace("127.0.0.1", "localhost")
        outcome(Asker(folder, **own, url=server.origin))
        assert [bool(authorization(one)) for one in server.requests] == [True, False, False, False]
    with Server(answers(GOOD), certificate, client=certificate) as demanding, \
            Server(answers(leads(demanding.origin)), certificate) as server:
        files = {"ca_file": certificate.certificate_file, "certificate_file": certificate.certificate_file,
                 "key_file": certificate.key_file}
        asked = {"platform": "http", "redirects": 1, **files}
        assert outcome(Asker(folder, **asked, url=demanding.origin))[0] == "healthy"
        assert outcome(Asker(folder, **asked, url=server.origin))[1] in ("protocol", "unreachable")
        assert len(demanding.requests) == len(server.requests) == 1
    with Server(answers(GOOD)) as plain, Server(answers(leads(plain.origin)), certificate) as server:
        asked = {**own, "url": server.origin, "ca_file": certificate.certificate_file}
        assert outcome(Asker(folder, **asked))[0] == "healthy"
        assert authorization(server.requests[0]) and not authorization(plain.requests[0])


CLIENT_WANTED = "the host wants a client certificate"


@pytest.mark.parametrize("shows", [False, True])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_certificate_that_is_wanted_says_nothing_of_the_password(
    folder: Path, tmp_path: Path, version: ssl.TLSVersion, shows: bool
) -> None:
    """TLS 1.3 says so after the handshake, when the login has begun: nobody looked at the password, so that the next
    poll shows it again, and so does the first one of the next start."""
    shown, wanted = make_certificate(tmp_path, "host", days=20), make_certificate(tmp_path, "client", days=20)
    access = ConnectionContext(KnownHosts(Path("no such file")), Resolver(), Guards())
    both = tmp_path / "both.pem"
    both.write_bytes(shown.key_file.read_bytes() + shown.certificate_file.read_bytes())
    other = {"certificate_file": both} if shows else {}
    with Server(answers(GOOD), shown, client=wanted) as demanding:
        assert demanding._context
        demanding._context.maximum_version = version
        asker = Asker(folder, access, platform="http", url=demanding.origin, username="m", password=SECRET,
                      ca_file=shown.certificate_file, **other)
        access.guards.keep([asker.target])
        asker.connection._guard = guard = access.guards.of(asker.target)
        for _ in range(4):
            _, cause, reason = outcome(asker)
            assert cause == "unreachable" or (cause == "protocol" and CLIENT_WANTED in reason)  # if the reset is first
            assert guard.wait("asked") == guard.refusals == 0
        wait_for(lambda: len(demanding.errors) == 4)
        assert demanding.requests == []


def test_a_certificate_cannot_be_trusted_before_ours_is_shown(folder: Path, tmp_path: Path) -> None:
    """With TLS 1.2, where the host shows it whole after ours alone; it says so, unlike one that speaks no cipher of
    ours."""
    shown, wanted = make_certificate(tmp_path, "host", days=20), make_certificate(tmp_path, "client", days=20)
    for client, why in ((wanted, CLIENT_WANTED), (None, "no TLS there")):
        with no_leaks(), Server(answers(GOOD), shown, client=client) as server:
            assert server._context
            server._context.maximum_version = ssl.TLSVersion.TLSv1_2
            if not client:
                server._context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")      # for another kind of key
            asker = Asker(folder, platform="http", url=server.origin)
            with pytest.raises(ProbeError, match=why):
                asker.connection.offered_key(Deadline(TIMEOUT))


def test_a_pin_is_that_of_its_origin(folder: Path, certificate: Certificate, tmp_path: Path) -> None:
    """Where a redirect leads, an authority has to vouch."""
    made = make_certificate(tmp_path, "other")
    with Server(answers(GOOD), made) as other, Server(answers(leads(other.origin)), certificate) as server:
        asked = {"platform": "http", "url": server.origin, "redirects": 1}
        for pin in ({"trusted": f"certificate SHA256:{certificate.fingerprint}"},
                    {"certificate_fingerprint": certificate.fingerprint}):
            assert outcome(Asker(folder, **asked, **pin, ca_file=made.certificate_file))[0] == "healthy"
            assert "not trusted" in outcome(Asker(folder, **asked, **pin))[2]


def test_a_secret_stays_on_the_way_at_its_origin(folder: Path) -> None:
    with Server(answers(leads("/x"), GOOD)) as server:
        asked = {"platform": "http", "url": server.origin, "password": SECRET, "redirects": 1}
        assert outcome(Asker(folder, **asked))[0] == "healthy"
    assert all(authorization(one) == f"Bearer {SECRET}" for one in server.requests)


# --- TLS ---
def asked_with_tls(server: Server, platform: str) -> dict[str, Any]:
    return {"platform": "http", "url": server.origin} if platform == "http" else {
        "platform": "tcp", "hostname": "127.0.0.1", "port": server.port, "tls": "true"}


@pytest.mark.parametrize("platform", ["http", "tcp"])
def test_certificates(platform: str, folder: Path, certificate: Certificate, tmp_path: Path) -> None:
    """One that does not verify is `host_key`, as with WinRM: `trust`, a pin or `ca_file` makes it good; no request is
    sent before."""
    with Server(answers(GOOD), certificate) as server:
        asked = asked_with_tls(server, platform)
        state, cause, reason = outcome(Asker(folder, **asked))
        assert (state, cause) == ("unhealthy", "host_key")
        assert f"SHA256:{certificate.fingerprint}" in reason and "trust asked" in reason
        trusted = f"certificate SHA256:{certificate.fingerprint}"
        assert Asker(folder, **asked).connection.offered_key(Deadline(TIMEOUT)) == trusted
        assert not server.requests
        for good in ({"ca_file": certificate.certificate_file}, {"certificate_fingerprint": certificate.fingerprint},
                     {"trusted": trusted}):
            assert outcome(Asker(folder, **asked, **good))[0] == "healthy"
        state, cause, reason = outcome(Asker(folder, **asked, trusted=f"certificate SHA256:{'0' * 64}"))
        assert cause == "host_key" and "certificate changed" in reason
        asked["ca_file"] = make_certificate(tmp_path, "stranger").certificate_file
        assert outcome(Asker(folder, **asked))[2].endswith("to accept it: trust asked, or correct its ca_file")
    for made, why, advice in (
            (make_certificate(tmp_path, "expired", days=-1), "expired", "renew it there; "),
            (make_certificate(tmp_path, "other", address="192.0.2.1"), "IP address mismatch", "name the host as it ")):
        with Server(answers(GOOD), made) as server:
            asked = asked_with_tls(server, platform) | {"ca_file": made.certificate_file}
            state, cause, reason = outcome(Asker(folder, **asked))
            assert (state, cause) == ("unhealthy", "host_key") and why in reason
            assert f"; {advice}" in reason and "ca_file" not in reason, "which is named, and right"
            assert reason.endswith("trust asked, and trust asked --forget when that is done")
            assert not server.requests


def test_a_certificate_is_left_to_its_authority_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was trusted by hand, for it had ended, closes the gate when the host has a new one: until that is undone."""
    old, new = make_certificate(tmp_path, "old", days=-1), make_certificate(tmp_path, "new")
    with Server(answers(GOOD), old) as server:
        shop = {"name": "shop", "platform": "http", "url": server.origin, "ca_file": new.certificate_file}
        with local_console(tmp_path, f"  - {json.dumps(shop, default=str)}\n") as local:
            path = local.context.inventory.path

        def said(*words: str) -> tuple[int, str]:
            code, shown = main(["--inventory", str(path), *words]), capsys.readouterr()
            return code, shown.out + shown.err

        assert said("trust", "shop", "--yes")[0] == 0
        assert said("check", "--probe")[0] == 0
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(new.certificate_file, new.key_file)
        server._context = context
        code, table = said("check", "--probe")
        assert code == 1 and "certificate changed" in table and "trust shop --forget" in table
        assert said("trust", "shop", "--forget") == (0, "shop: trusted is what its authority vouches for\n")
        assert said("check", "--probe")[0] == 0
        assert said("trust", "shop", "--forget") == (2, "no certificate of shop was trusted by hand\n")


def test_a_name_with_a_final_dot(folder: Path, tmp_path: Path) -> None:
    """It says that the name is whole; no certificate and no SNI has it (RFC 6066, 3)."""

    class Here(Resolver):
        def resolve(self, host: str, port: int, deadline: Deadline) -> list[Any]:
            assert host == "shop.example.com."
            return super().resolve("127.0.0.1", port, deadline)

    made, asked_for = make_certificate(tmp_path, "shop", host="shop.example.com"), list[str | None]()
    with Server(answers(GOOD), made) as server:
        assert server._context
        server._context.sni_callback = lambda _sock, name, _context: asked_for.append(name)
        shared, ca_file = replace(ACCESS, resolver=Here()), {"ca_file": made.certificate_file}
        tls = {"platform": "tcp", "hostname": "shop.example.com.", "port": server.port, "tls": "true"}
        for asked in ({"platform": "http", "url": f"https://shop.example.com.:{server.port}/"}, tls):
            assert outcome(Asker(folder, shared, **asked, **ca_file)) == ("healthy", "", "")
    assert asked_for == ["shop.example.com"] * 2


@pytest.mark.parametrize("platform", ["http", "tcp"])
def test_days_of_a_certificate(platform: str, folder: Path, certificate: Certificate) -> None:
    """It is good still, so that it closes nothing."""
    with Server(answers(GOOD), certificate) as server:
        asked = asked_with_tls(server, platform) | {"ca_file": certificate.certificate_file}
        for days, state in ((14, "healthy"), (30, "degraded")):
            limit = {"expect": {"certificate_days": days}} if platform == "http" else {"certificate_days": days}
            verdict, sample = Asker(folder, **asked, **limit).poll()
            assert verdict.state == state and sample
            assert 18 < sample.metrics["certificate_days"] < 20.1
    assert (verdict.cause, verdict.reason) == ("check", "check certificate: expected 30 days, came 20.0")


def test_no_tls_there(folder: Path) -> None:
    with Server(says(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as server:
        url = server.origin.replace("http", "https")
        assert outcome(Asker(folder, platform="http", url=url))[1] == "protocol"


# --- TCP ---
def test_a_port(folder: Path) -> None:
    def talk(connection: tuple[Server, socket.socket]) -> None:
        connection[1].sendall(b"+PONG\r\n" if connection[1].recv(64) == b"PING\r\n" else b"-ERR 'x'\r\nmore\r\n")

    with no_leaks(), Server(talk) as server:
        asked = {"platform": "tcp", "hostname": "127.0.0.1", "port": server.port}
        assert outcome(Asker(folder, **asked, send="PING\r\n", expect="+PONG"))[0] == "healthy"
        assert outcome(Asker(folder, **asked, send="PANG\r\n", expect="+PONG")) == (
            "unhealthy", "check", "check answer: expected \"+PONG\", came \"-ERR 'x'\\r\\nmore\\r\\n\"")
        verdict, sample = Asker(folder, **asked, expect={"within": 20}).poll()
        assert verdict.state == "healthy" and sample and sample.checks["answer"].text == "connected"


def test_a_port_that_says_too_little_or_too_much(folder: Path) -> None:
    asked: dict[str, Any] = {"platform": "tcp", "hostname": "127.0.0.1", "timeout": SHORT, "expect": "220"}
    for play, cause, why in (
        (lambda connection: connection[0].ending.wait() and None, "timeout", "no answer "),
        (endless(b"hello ", b"", 0.05), "check", 'came "hello "'),
        (says(b""), "check", 'came ""'),
    ):
        with no_leaks(), Server(play) as server:
            verdict = outcome(Asker(folder, **asked, port=server.port))
            assert verdict[1] == cause and why in verdict[2]
    with Server(endless(b"", b"x" * 65_536)) as server:
        begun = time.monotonic()
        verdict = outcome(Asker(folder, **{**asked, "timeout": TIMEOUT}, port=server.port))
        assert verdict[1] == "check" and time.monotonic() - begun < TIMEOUT


@pytest.mark.parametrize("asked", [{"platform": "http"}, {"platform": "tcp", "send": "HEAD\r\n\r\n", "expect": "HTTP"}])
def test_each_poll_is_a_connection_of_its_own(folder: Path, asked: dict[str, Any]) -> None:
    """Also of a host that would keep one, in a service that keeps those to machines: the handshake is asked for."""
    connections = list[object]()

    def play(connection: tuple[Server, socket.socket]) -> None:
        connections.append(connection)
        while read_request(connection[1]):
            connection[1].sendall(answer(b"ok"))

    with no_leaks(), Server(play) as server:
        places: dict[str, Any] = {"http": {"url": server.origin}, "tcp": {"hostname": "127.0.0.1", "port": server.port}}
        asker = Asker(folder, replace(ACCESS, keeps=True), **asked, **places[asked["platform"]])
        for number in (1, 2, 3):
            assert outcome(asker)[0] == "healthy"
            assert len(connections) == number


# --- names ---
def test_names(folder: Path) -> None:
    asked: dict[str, Any] = {"platform": "dns", "hostname": "localhost"}
    verdict, sample = Asker(folder, **asked).poll()
    assert verdict.state == "healthy" and sample and "response_seconds" in sample.metrics
    found = sample.checks["addresses"].text.split(", ")
    assert "127.0.0.1" in found or "::1" in found
    assert outcome(Asker(folder, **asked, expect=found))[0] == "healthy"
    assert outcome(Asker(folder, **asked, expect=["192.0.2.1"])) == (
        "unhealthy", "check", f"check addresses: expected 192.0.2.1, came {', '.join(found)}")
    assert outcome(Asker(folder, **asked, expect=[*found, "192.0.2.1"]))[0] == "unhealthy"
    state, cause, reason = outcome(Asker(folder, platform="dns", hostname="no-such-name.invalid"))
    assert (state, cause) == ("unhealthy", "unreachable") and "does not resolve" in reason
    stated = {"hostname": "127.0.0.1", "expect": {"addresses": ["127.0.0.1"]}}
    assert outcome(Asker(folder, platform="dns", **stated))[0] == "healthy"


# --- what is read: any text ---
@given(st.text(max_size=60) | st.text("htps:/[]@.a1?#%\\ \t", max_size=30).map(lambda rest: f"http://{rest}"))
def test_any_url(text: str) -> None:
    """It is refused, or means the same to whoever reads it: no user, no fragment, nothing that ends a line."""
    try:
        url = read_url(text)
    except ValueError:
        return
    assert url.scheme in ("http", "https") and 0 < url.port < 65_536 and url.target.startswith("/")
    parts = urlsplit(text)
    assert (parts.scheme, parts.hostname, parts.username, parts.fragment) == (url.scheme, url.host, None, "")
    assert (parts.port or {"http": 80, "https": 443}[url.scheme]) == url.port
    assert url.target.isascii() and url.target.isprintable() and " " not in url.target and "\\" not in url.target


@given(st.sampled_from(["http", "HTTPS"]), st.sampled_from(["a.example.com", "192.0.2.1", "[2001:db8::1]"]),
       st.integers(0, 70_000) | st.none(), st.sampled_from(["", "/", "/a/b%20c?d=e&f", "?q"]))
def test_urls(scheme: str, host: str, port: int | None, target: str) -> None:
    text = f"{scheme}://{host}{'' if port is None else f':{port}'}{target}"
    if port is not None and not 0 < port < 65_536:
        with pytest.raises(ValueError, match="must be http"):
            read_url(text)
        return
    usual = 80 if scheme == "http" else 443
    wanted = (scheme.lower(), host.strip("[]"), port or usual, target if target[:1] == "/" else f"/{target}")
    assert read_url(text) == wanted


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.text("ab0.", max_size=3), inner, max_size=3), max_leaves=8)


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()), st.text("ab01.-", max_size=9))
def test_any_value_of_json(body: bytes, path: str) -> None:
    """What it leads to is what Python finds there, or nothing."""
    try:
        found = value_at(body, path)
    except ValueError:
        return
    value = from_json(body)
    for part in path.split("."):
        value = value[int(part) if isinstance(value, list) else part]
    assert json.dumps(found) == json.dumps(value)


@given(st.text(max_size=200) | st.binary(max_size=400))
def test_what_a_host_sent_is_one_word(said: str | bytes) -> None:
    shown = quoted(said)
    assert shown.isprintable() and one_line(shown) == " ".join(shown.split()) and len(shown) < 1100
    assert isinstance(json.loads(shown.removesuffix("…")), str)


@given(st.text("0123456789-", max_size=8))
def test_any_range_of_statuses(text: str) -> None:
    try:
        first, _, last = status_range(text).partition("-")
    except ValueError:
        return
    assert 100 <= int(first) <= int(last or first) <= 599


# --- secrets in the database ---
def stored(folder: Path, local: Local, text: str) -> Resource:
    with local.store.writing() as session:
        inventory = load_inventory(write_inventory(folder, f"  - {text}\n"))
        import_inventory(session, inventory, local.context.vault)
        return find_resource(session, "shop")


def test_a_sealed_secret_is_bound_to_its_origin(tmp_path: Path) -> None:
    """Not even who can write to the database sends it by another scheme, or to another host or port."""
    secret = f"username: u, password: {SECRET}"
    with local_console(tmp_path) as local:
        def place(origin: str, more: str = "") -> Resource:
            return stored(tmp_path, local, f"{{name: shop, platform: http, url: '{origin}/x', {more}}}")

        vault, row = local.context.vault, place("https://shop.example.com:8080", secret)
        assert vault.open(str(row.password), *binding("password", row)) == SECRET
        before = row.settings
        for other in ("http://shop.example.com:8080", "https://shop.example.com", "https://other.example.com:8080"):
            row.settings = before.replace("https://shop.example.com:8080", other)
            with pytest.raises(SecretError):
                vault.open(str(row.password), *binding("password", row))
        row.settings = before
        assert place("https://shop.example.com:8080", secret).password == row.password
        for other in ("https://shop.example.com", "https://other.example.com:8080"):
            with pytest.raises(SecretError, match="write the password again"):
                place(other, "username: u, " + f"password: {row.password}")
        assert place("https://shop.example.com:8080").password is None


# --- the console, the command line ---
@pytest.mark.long
@pytest.mark.windows
def test_in_the_console(tmp_path: Path, folder: Path) -> None:
    """Added, tried, changed and shown as any other resource; its secret is never shown."""
    with Server(answers(GOOD)) as server, local_console(tmp_path) as local:
        local.log_in()
        shop = {"name": "shop", "platform": "http", "url": f"{server.origin}/x", "password": SECRET, "interval": 3600,
                "expect": {"status": [200, "301-302"], "json": {"a": 1, "b": None}, "within": "2 s"}}
        trial = local.api("POST", "test", shop).json
        assert (trial["state"], trial["cause"]) == ("unhealthy", "check") and "json a" in trial["reason"]
        shop["expect"]["json"] = {}
        assert local.api("POST", "test", shop).json["state"] == "healthy"
        made = local.api("POST", "resources", shop)
        assert made.status == 201 and SECRET not in made.body and made.json["has_secret"]
        assert made.json["hostname"] == "127.0.0.1" and made.json["port"] == server.port and not made.json["tls"]
        wait_for(lambda: local.api("GET", "resources/shop").json["state"] == "healthy")
        found = local.api("GET", "resources/shop").json
        assert found["sample"]["checks"]["status"]["text"] == "200" and found["expect"]["within"] == 2
        assert f"Bearer {SECRET}" == authorization(server.requests[-1])
        metrics = Metrics(
            ServingMetrics(local.context.lease, Counters(1)), local.store, None, local.context.connections)
        wait_for(lambda: any(family.name == "healthchecker_resource_response_seconds" and family.samples
                             for family in metrics.collect()))      # which the recorder writes
        families = {family.name: family for family in metrics.collect()}
        seconds, = families["healthchecker_resource_response_seconds"].samples
        assert seconds.labels == {"resource": "shop"} and seconds.value > 0
        good = {one.labels["check"]: one.value for one in families["healthchecker_resource_check_good"].samples}
        assert good == {"status": 1, "within": 1}

        moved = local.api("PATCH", "resources/shop", {"url": f"http://localhost:{server.port}/"})
        assert moved.status == 422 and "write the password again" in moved.body
        moved = local.api("PATCH", "resources/shop", {"url": f"{server.origin}/y", "expect": {"contains": "no"}})
        assert moved.status == 200 and moved.json["expect"]["contains"] == "no"
        assert local.api("POST", "resources/shop/check").json["cause"] == "check"
        wrong = local.api("PATCH", "resources/shop", {"services": ["x"], "hostname": "x"})
        assert wrong.status == 422 and wrong.fields.keys() == {"services", "hostname"}

        local.open_session()
        page = local.ask("GET", "/-/resources/shop").body
        assert "Response time" in page and re.search(r"[0-9]+ ms", page) and "check contains" in page
        edit = local.ask("GET", "/-/resources/shop/edit").body
        assert f'value="{server.origin}/y"' in edit and "contains: " in edit and "tls" not in re.findall(
            r"<textarea[^>]*>([^<]*)", edit)[0] and SECRET not in edit
        settings = "expect: {contains: ok, status: [200-299]}"
        form = {"platform": "http", "name": "shop", "url": f"{server.origin}/z", "settings": settings, "do": "save"}
        assert local.form("/-/resources/shop/edit", form).status == 303
        assert local.form("/-/resources/shop/check", {}).status == 303
        assert local.api("GET", "resources/shop").json["url"].endswith("/z")
        port = {"platform": "tcp", "name": "port", "hostname": "127.0.0.1", "port": str(server.port), "do": "test"}
        assert "healthy in" in local.form("/-/add", port).body
        assert "healthy in" in local.form("/-/add", {"platform": "dns", "hostname": "localhost", "do": "test"}).body
        assert "url is missing" in local.form("/-/add", {"platform": "http", "do": "test"}).body
        events = local.api("GET", "events?resource=shop").json
        assert {"added", "changed: expect, url"} <= {event["text"] for event in events}


OWN_ADDRESSES = ["169.254.7.7", "2851997447", "::ffff:169.254.7.7", "fe80::1", "fd00:ec2::1"]
FOR_THE_INVENTORY = "is an address that only this machine reaches: state a resource for it in the inventory"


@pytest.mark.long
@pytest.mark.windows
@pytest.mark.parametrize("address", OWN_ADDRESSES)
def test_what_only_this_machine_reaches_is_for_the_inventory(address: str, tmp_path: Path) -> None:
    """A cloud gives its machines their credentials there; whoever writes the console's rows has none to read them."""
    host = f"[{address}]" if ":" in address else address
    with Server(answers(leads(f"http://{host}/latest/"))) as server, local_console(tmp_path) as local:
        local.log_in()
        login = {"username": "u", "password": "p", "hostname": address}
        for asked in (
            {"platform": "http", "url": f"http://{host}/"}, {"platform": "tcp", "hostname": address, "port": 80},
            {"platform": "http", "url": server.origin, "redirects": 1}, {"platform": "linux", **login},
            {"platform": "linux", **login, "hostname": "192.0.2.1", "proxy_jump": f"{host}:22"},
            {"platform": "windows", "tls": False, **login},
        ):  # fmt: skip
            found = local.api("POST", "test", {"name": "one", "timeout": SHORT, **asked}).json
            assert FOR_THE_INVENTORY in found["reason"], found
        assert local.api("POST", "resources", {"name": "one", **asked, "timeout": SHORT}).status == 201
        assert FOR_THE_INVENTORY in local.api("POST", "resources/one/check").json["reason"]


@pytest.mark.parametrize("address", OWN_ADDRESSES)
def test_no_host_leads_to_what_only_this_machine_reaches(address: str, folder: Path) -> None:
    """Nor from a row of the inventory: who names the place is the host, and what it says becomes the reason."""
    place = f"http://{f'[{address}]' if ':' in address else address}/latest/"
    with Server(answers(leads(place))) as server:
        asked = {"platform": "http", "url": server.origin, "redirects": 2, "timeout": SHORT}
        assert FOR_THE_INVENTORY in outcome(Asker(folder, **asked))[2]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "2130706433", "[::ffff:127.0.0.1]", "127.9.9.9"])
def test_no_host_leads_to_loopback_that_is_not_there(host: str, folder: Path) -> None:
    """Of what answers there the reason shows the beginning. The tests know no address but loopback: that the host has
    another one is said."""
    deadline = Deadline(SHORT)
    with Server(answers(answer(b"a local secret"))) as local, Server(answers(leads(local.origin))) as server:
        asked = {"platform": "http", "redirects": 2, "timeout": SHORT, "expect": {"contains": "welcome"}}
        there = Asker(folder, **asked, url=server.origin)
        led = there.connection._redirected(f"http://{host}:{local.port}/", is_here=False)
        with pytest.raises(ProbeError, match=FOR_THE_INVENTORY), led._opened(deadline, {}):
            raise AssertionError("it is open")
        by_a_way_round = led._redirected(local.origin, is_here=True)
        with pytest.raises(ProbeError, match=FOR_THE_INVENTORY), by_a_way_round._opened(deadline, {}):
            raise AssertionError("it is open")
        assert not local.requests
        assert "a local secret" in outcome(there)[2], "what is there may lead there"


def test_the_inventory_reaches_what_only_this_machine_reaches(tmp_path: Path) -> None:
    """Of this machine alone, so that nothing leaves it."""
    rows = "  - {name: one, platform: tcp, hostname: fe80::1%lo, port: 1, timeout: 1}\n"
    with local_console(tmp_path, rows) as local:
        local.log_in()
        found = local.api("POST", "resources/one/check").json
        assert found["state"] == "unhealthy" and "inventory" not in found["reason"]


def test_a_url_is_shown_no_login_of_machines(tmp_path: Path) -> None:
    """It may be anybody's; what it needs itself is what it is shown."""
    (tmp_path / "fleet").write_text("of every machine\n", encoding="utf-8")
    with Server(answers(GOOD)) as other, Server(answers(GOOD)) as server:
        rows = f"  - {{name: other, platform: http, url: '{other.origin}'}}\n"
        rows += f"  - {{name: one, platform: http, url: '{server.origin}', password: {SECRET}}}\n"
        defaults = "\ndefaults: {username: monitor, password_file: fleet}\n"
        with local_console(tmp_path, rows, defaults) as local:
            local.log_in()
            wait_for(lambda: {row["state"] for row in local.api("GET", "resources").json} == {"healthy"})
    assert {*map(authorization, other.requests)} == {""}
    assert {*map(authorization, server.requests)} == {f"Bearer {SECRET}"}


def test_the_form_of_a_new_one_takes_no_defaults_of_machines(tmp_path: Path) -> None:
    """It shows them before the platform is chosen; what somebody writes there is looked at as ever."""
    defaults = "\ndefaults: {limits: {cpu_percent: 9}}\n"
    with Server(answers(GOOD)) as server, local_console(tmp_path, "", defaults) as local:
        local.log_in()
        local.open_session()
        shown = re.findall(r"<textarea[^>]*>([^<]*)", local.ask("GET", "/-/add").body)[0]
        assert shown.strip() == "limits:\n  cpu_percent: {fail: 9}"
        form = {"platform": "http", "url": server.origin, "settings": shown, "do": "test"}
        assert "healthy in" in local.form("/-/add", form).body
        form["settings"] += "services: [a]\n"
        assert "services has no meaning with platform http" in local.form("/-/add", form).body


def test_trust_in_the_console(tmp_path: Path, certificate: Certificate) -> None:
    """A certificate of nobody's is shown, and trusted when somebody says so; a name has none."""
    with Server(answers(GOOD), certificate) as server:
        rows = f"  - {{name: shop, platform: http, url: '{server.origin}', retry_interval: 1, interval: 2}}\n"
        with local_console(tmp_path, rows + "  - {name: name, platform: dns, hostname: localhost}\n") as local:
            local.log_in()
            wait_for(lambda: local.api("GET", "resources/shop").json["cause"] == "host_key")
            trusted = f"certificate SHA256:{certificate.fingerprint}"
            assert local.api("POST", "resources/shop/trust", {}).json["trusted_key"] == trusted
            wait_for(lambda: local.api("GET", "resources/shop").json["state"] == "healthy")
            refused = local.api("POST", "resources/name/trust", {})
            assert refused.status == 409 and "has no certificate" in refused.body


def test_check_probe(tmp_path: Path) -> None:
    with Server(answers(GOOD)) as server:
        path = write_inventory(tmp_path, f"""
  - {{name: shop, platform: http, url: '{server.origin}'}}
  - {{name: port, platform: tcp, hostname: 127.0.0.1, port: {server.port}}}
  - {{name: name, platform: dns, hostname: localhost}}
  - {{name: other, platform: dns, hostname: localhost, expect: [192.0.2.1]}}
""")
        code, output = run_cheaply("--inventory", str(path), "check", "--probe")
    assert code == 1
    states = dict(line.split()[:2] for line in output.splitlines()[-4:])
    assert states == {"shop": "healthy", "port": "healthy", "name": "healthy", "other": "unhealthy"}
