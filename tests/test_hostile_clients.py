"""Serve against clients that send what two programs could read in two ways, too much, too slowly, or nothing."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import no_leaks, wait_for
from hypothesis import given
from hypothesis import strategies as st
from service import Service, fresh_processes, write_inventory
from test_gate import POOL, Serving, goes_round, reads
from test_workers import workers
from waitress.adjustments import Adjustments
from waitress.receiver import FixedStreamReceiver

from healthchecker import LINGER_BYTES, LINGER_TIME, ROW, ROWS, GateParser, GateServer, Lease, ServiceSettings

GET = b"GET / HTTP/1.1\r\nHost: example.com\r\n"
POST = b"POST / HTTP/1.1\r\nHost: example.com\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
INNER = b"GET /inner HTTP/1.1\r\nHost: example.com\r\n\r\n"  # what a smuggler wants to be taken for a request
LIMIT = 1000  # bytes of a body, in this file
HEADER = 16 << 10  # bytes of the request line and the headers


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    Lease()
    fresh_processes()  # stays, too
    with no_leaks():
        yield


class Echo:
    """An application that tells what it was asked for, and notes it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.asked.append(environ["PATH_INFO"])
        host = environ.get("HTTP_HOST", "-")
        target = environ["PATH_INFO"] + ("?" + environ["QUERY_STRING"] if environ["QUERY_STRING"] else "")
        body = f"{environ['REQUEST_METHOD']} {host} {target} ".encode("latin-1") + environ["wsgi.input"].read()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]


def serving(threads: int = 0, **options: Any) -> Serving:
    return Serving(Echo(), threads, service=ServiceSettings(body_limit=LIMIT), **options)


class Clock:
    """The clock by which a server watches its connections: it stands, and goes on when the test says so.

    A request that is being read is timed from `time.monotonic()` on, see `begun`."""

    def __init__(self, server: Serving) -> None:
        self._server, self.begin = server, time.monotonic()
        self.now = self.begin
        server.server.clock = lambda: self.now

    def shows(self, seconds: float) -> None:
        """So many seconds since it was made, one more than before at least; the server has looked around since."""
        self.now = self.begin + seconds
        goes_round(self._server)

    def begun(self, count: int) -> tuple[float, float]:
        """When the first and the last of so many headers began that are being read, in seconds since it was made."""

        def found() -> list[float]:
            requests = [channel.request for channel in list(self._server.server.active_channels.values())]
            return [request.begun for request in requests if request and request.header_plus]

        wait_for(lambda: len(found()) == count)
        return min(found()) - self.begin, max(found()) - self.begin


    def kept(self) -> int:
        """How many connections are neither closed nor refused."""
        return sum(not channel.lingers for channel in list(self._server.server.active_channels.values()))


def forgets(server: Serving) -> None:
    """Waits until the pool is idle: a client may have its answer before its request is over."""
    wait_for(lambda: not server.server.pool.queue and not server.server.pool.active_count)


def silent(*socks: socket.socket) -> bool:
    """Whether nothing has come, not even the end."""
    return not select.select(socks, [], [], 0)[0]


def connect(stack: contextlib.ExitStack, address: tuple[str, int], count: int) -> list[socket.socket]:
    return [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(count)]


class Reply(NamedTuple):
    status: int
    head: str
    body: bytes


def replies(stream: bytes) -> list[Reply]:
    """The answers in what a server has sent; all have their length."""
    found = []
    while stream:
        head, _, stream = stream.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        size = int(length[1]) if length else 0
        found.append(Reply(int(head.split()[1]), head.decode("latin-1"), stream[:size]))
        stream = stream[size:]
    return found


# === What is refused =========================================================
# name: what the client sends, the status of the one answer
REFUSED: dict[str, tuple[bytes, int]] = {
    # how long is the body?
    "length and coding": (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER, 400),
    "coding and length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + INNER, 400),
    "coding and no length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length:\r\n\r\n0\r\n\r\n", 400),
    "coding twice": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "coding twice in one": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    "coding twice, one unknown": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n", 400),
    "coding empty": (POST + b"Transfer-Encoding:\r\n\r\n", 400),
    "coding with a comma": (POST + b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n", 400),
    "coding identity": (POST + b"Transfer-Encoding: identity\r\nContent-Length: 3\r\n\r\nabc", 400),
    "coding gzip": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "coding unknown": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + INNER, 400),
    "coding quoted": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', 400),
    "coding with a parameter": (POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n", 400),
    "coding after a vertical tab": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + INNER, 400),
    "coding after \\x85": (POST + b"Transfer-Encoding: \x85chunked\r\n\r\n0\r\n\r\n" + INNER, 400),
    "coding after \\xa0": (POST + b"Transfer-Encoding: \xa0chunked\r\n\r\n0\r\n\r\n" + INNER, 400),
    "coding before a colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + INNER, 400),
    "coding in HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER, 400),
    "coding in HTTP/1.0, kept alive": (
        b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER, 400),
    "length twice": (POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
    "length twice, different": (POST + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\nhello" + INNER, 400),
    "length twice in one": (POST + b"Content-Length: 5,5\r\n\r\nhello", 400),
    "length twice, one empty": (POST + b"Content-Length: 5\r\nContent-Length:\r\n\r\nhello", 400),
    "length with a plus": (POST + b"Content-Length: +5\r\n\r\nhello", 400),
    "length with a minus": (POST + b"Content-Length: -5\r\n\r\nhello", 400),
    "length empty": (POST + b"Content-Length:\r\n\r\n", 400),
    "length of blanks": (POST + b"Content-Length:   \r\n\r\n", 400),
    "length hexadecimal": (POST + b"Content-Length: 0x5\r\n\r\nhello", 400),
    "length with underscores": (POST + b"Content-Length: 1_0\r\n\r\nhellohello", 400),
    "length with a fraction": (POST + b"Content-Length: 5.0\r\n\r\nhello", 400),
    "length with a blank": (POST + b"Content-Length: 5 0\r\n\r\nhello", 400),
    "length of superscripts": (POST + b"Content-Length: \xb2\r\n\r\nhi", 400),
    "length in words": (POST + b"Content-Length: five\r\n\r\nhello", 400),
    # who is asked?
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + b"Host: example.com\r\n\r\n", 400),
    "two hosts, HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: a.example.com\r\nHost: b.example.com\r\n\r\n", 400),
    "two hosts, both empty": (b"GET / HTTP/1.1\r\nHost:\r\nHost:\r\n\r\n", 400),
    "two hosts, one empty": (b"GET / HTTP/1.1\r\nHost:\r\nHost: example.com\r\n\r\n", 400),
    "hosts in one": (b"GET / HTTP/1.1\r\nHost: a.example.com, b.example.com\r\n\r\n", 400),
    "host with a path": (b"GET / HTTP/1.1\r\nHost: example.com/x\r\n\r\n", 400),
    "host with a user": (b"GET / HTTP/1.1\r\nHost: admin@example.com\r\n\r\n", 400),
    "host with a blank": (b"GET / HTTP/1.1\r\nHost: example.com x\r\n\r\n", 400),
    "host in quotes": (b'GET / HTTP/1.1\r\nHost: "example.com"\r\n\r\n', 400),
    "host with a tag": (b"GET / HTTP/1.1\r\nHost: <b>\r\n\r\n", 400),
    "host beyond ASCII": (b"GET / HTTP/1.1\r\nHost: ex\xe4mple.com\r\n\r\n", 400),
    "host's port in words": (b"GET / HTTP/1.1\r\nHost: example.com:http\r\n\r\n", 400),
    "host's port too high": (b"GET / HTTP/1.1\r\nHost: example.com:65536\r\n\r\n", 400),
    "host of two colons": (b"GET / HTTP/1.1\r\nHost: example.com:80:80\r\n\r\n", 400),
    "host in open brackets": (b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
    "host in brackets, no address": (b"GET / HTTP/1.1\r\nHost: [::1::]\r\n\r\n", 400),
    # where does a line end?
    "bare CR in the request line": (b"GET /\rx HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "bare CR in a value": (GET + b"X: a\rContent-Length: 5\r\n\r\n", 400),
    "bare CR before the end": (GET + b"X: a\r\r\n\r\n", 400),
    "CR CR LF": (b"GET / HTTP/1.1\r\r\nHost: example.com\r\n\r\n", 400),
    "bare LF after the request line": (b"GET / HTTP/1.1\nHost: example.com\r\n\r\n", 400),
    "bare LF in a value": (GET + b"X: a\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "bare LFs only": (b"GET / HTTP/1.1\nHost: example.com\n\n", 400),
    "bare LF at the end": (GET + b"X: a\r\n\n", 400),
    "bare LFs before": (b"\n\n" + GET + b"\r\n", 400),
    "LF CR": (GET + b"X: a\n\r\n\r\n", 400),
    "CR and LF apart": (GET + b"X: a\rb\nc\r\n\r\n", 400),
    "folded with a blank": (GET + b"X: a\r\n b\r\n\r\n", 400),
    "folded with a tab": (GET + b"X: a\r\n\tContent-Length: 5\r\n\r\n", 400),
    "folded first header": (b"GET / HTTP/1.1\r\n Host: example.com\r\n\r\n", 400),
    "folded coding": (POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + INNER, 400),
    # what is in it?
    "NUL in the request line": (b"GET /\0 HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "NUL in a name": (GET + b"X\0: a\r\n\r\n", 400),
    "NUL in a value": (GET + b"X: a\0b\r\n\r\n", 400),
    "vertical tab in a value": (GET + b"X: a\x0bb\r\n\r\n", 400),
    "escape in a value": (GET + b"X: \x1b[2J\r\n\r\n", 400),
    "DEL in a value": (GET + b"X: a\x7f\r\n\r\n", 400),
    "DEL in the request line": (b"GET /\x7f HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "tab in the request line": (b"GET\t/ HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "form feed before": (b"\x0c" + GET + b"\r\n", 400),
    "blank before the colon": (GET + b"X : a\r\n\r\n", 400),
    "tab before the colon": (GET + b"X\t: a\r\n\r\n", 400),
    "no name": (GET + b": a\r\n\r\n", 400),
    "no colon": (GET + b"Content-Length\r\n\r\n", 400),
    "blank in a name": (GET + b"Content Length: 5\r\n\r\n", 400),
    "name in brackets": (GET + b"[X]: a\r\n\r\n", 400),
    "name beyond ASCII": (GET + b"X\xe4: a\r\n\r\n", 400),
    "name of 129 characters": (GET + b"X" * 129 + b": a\r\n\r\n", 400),
    # the request line
    "blank before": (b" " + GET + b"\r\n", 400),
    "two blanks": (b"GET  / HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "blank behind": (b"GET / HTTP/1.1 \r\nHost: example.com\r\n\r\n", 400),
    "blank in the target": (b"GET /a b HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "no target": (b"GET HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "only a method": (b"GET\r\nHost: example.com\r\n\r\n", 400),
    "no request line": (b"Host: example.com\r\n\r\n", 400),
    "relative target": (b"GET inner HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "fragment": (b"GET /#inner HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "asterisk": (b"GET * HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "absolute, broken": (b"GET http://[ HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "absolute, no host": (b"GET http:///x HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "absolute, bad host": (b"GET http://ex%ample/ HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "absolute, bad port": (b"GET http://example.com:x/ HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "absolute, a user": (b"GET http://u:p@example.com/ HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "absolute, no header Host": (b"GET http://example.com/ HTTP/1.1\r\n\r\n", 400),
    "absolute, another scheme": (b"GET ftp://example.com/ HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "absolute, no scheme": (b"GET ://example.com/ HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "tunnel": (b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "method in lower case": (b"get / HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "method in brackets": (b"G(E)T / HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "method of 33 characters": (b"G" * 33 + b" / HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/1": (b"GET / HTTP/1\r\nHost: example.com\r\n\r\n", 400),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: example.com\r\n\r\n", 400),
    "HTTP/1.10": (b"GET / HTTP/1.10\r\nHost: example.com\r\n\r\n", 400),
    "HTTP/2.0": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "http/1.1": (b"GET / http/1.1\r\nHost: example.com\r\n\r\n", 400),
    "HTTPS/1.1": (b"GET / HTTPS/1.1\r\nHost: example.com\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
    # chunks
    "chunk size with 0x": (CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size with a plus": (CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size with a minus": (CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size with an underscore": (CHUNKED + b"0_5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size after a blank": (CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size before a blank": (CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n", 400),
    "chunk size before a tab": (CHUNKED + b"5\t\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size of no digit": (CHUNKED + b"\r\n5\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size in words": (CHUNKED + b"five\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size of 17 digits": (CHUNKED + b"00000000000000005\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size with NUL": (CHUNKED + b"5\0\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size before bare LF": (CHUNKED + b"5\nhello\r\n0\r\n\r\n", 400),
    "chunk size before LF CR LF": (CHUNKED + b"5\n\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size before CR CR LF": (CHUNKED + b"5\r\r\nhello\r\n0\r\n\r\n", 400),
    "chunk size before bare CR": (CHUNKED + b"5\rX\r\nhello\r\n0\r\n\r\n", 400),
    "chunk extension with bare CR": (CHUNKED + b"5;a=\rb\r\nhello\r\n0\r\n\r\n", 400),
    "chunk extension with bare LF": (CHUNKED + b"5;a\nhello\r\n0\r\n\r\n", 400),
    "chunk extension with LF in quotes": (CHUNKED + b'5;a="\n"\r\nhello\r\n0\r\n\r\n', 400),
    "chunk extension with NUL": (CHUNKED + b"5;a=\0\r\nhello\r\n0\r\n\r\n", 400),
    "chunk extension without a name": (CHUNKED + b"5;\r\nhello\r\n0\r\n\r\n", 400),
    "chunk extension, quotes left open": (CHUNKED + b'5;a="b\r\nhello\r\n0\r\n\r\n', 400),
    "chunk longer than said": (CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n", 400),
    "chunk shorter than said": (CHUNKED + b"5\r\nhell\r\n0\r\n\r\n", 400),
    "chunk without an end": (CHUNKED + b"5\r\nhello0\r\n\r\n" + INNER, 400),
    "chunk before bare LF": (CHUNKED + b"5\r\nhello\n0\r\n\r\n", 400),
    "last chunk before bare LF": (CHUNKED + b"5\r\nhello\r\n0\n\n" + INNER, 400),
    "no end after the last chunk": (CHUNKED + b"0\r\n" + INNER, 400),
    "trailer": (CHUNKED + b"5\r\nhello\r\n0\r\nX: a\r\n\r\n", 400),
    "trailer with a length": (CHUNKED + b"0\r\nContent-Length: 50\r\n\r\n" + INNER, 400),
    "endless chunk line": (CHUNKED + b"5;a=" + b"x" * 20_000, 400),
    "chunk line longer than a header, not than the body": (
        CHUNKED + b"3e0\r\n" + b"x" * 992 + b"\r\n1" + b";a" * 8250 + b"\r\nx\r\n0\r\n\r\n", 400),
    "chunks of one byte": (CHUNKED + b"1\r\nx\r\n" * 20_000, 413),
    "chunk lines longer than their chunks": (CHUNKED + b"1;a=%b\r\nx\r\n" % (b"x" * 100) * 500, 400),
    # how much?
    "header too large": (GET + b"X: " + b"x" * HEADER + b"\r\n\r\n", 431),
    "header too large, many": (GET + b"".join(b"X-%d: x\r\n" % number for number in range(2000)) + b"\r\n", 431),
    "header without an end": (GET + b"X: " + b"x" * 40_000, 431),
    "target too large": (b"GET /" + b"x" * HEADER + b" HTTP/1.1\r\nHost: example.com\r\n\r\n", 431),
    "length beyond the limit": (POST + b"Content-Length: %d\r\n\r\n" % (LIMIT + 1), 413),
    "length beyond it, sent": (POST + b"Content-Length: 300000\r\n\r\n" + b"x" * 300_000, 413),
    "length beyond it, expected": (POST + b"Content-Length: 2000\r\nExpect: 100-continue\r\n\r\n", 413),
    "length of 5,000 digits": (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
    "chunk beyond the limit": (CHUNKED + b"3e9\r\n", 413),
    "chunk of 16 digits": (CHUNKED + b"ffffffffffffffff\r\n", 413),
    "chunks beyond the limit": (CHUNKED + b"1f4\r\n%b\r\n" % (b"x" * 500) * 3 + b"0\r\n\r\n", 413),
}  # fmt: skip


def is_refused(stream: bytes, status: int, request: bytes) -> None:
    """One answer, which ends the connection and has nothing of the request in it."""
    (reply,) = replies(stream)
    assert reply.status == status
    head = reply.head.lower()
    assert head.startswith("http/1.") and "\r\nconnection: close" in head and head.count("connection:") == 1
    assert reply.body.split()[0] == str(status).encode() and len(reply.body) < 60
    assert (b"service.body_limit" in reply.body) is (status == 413)
    assert b"inner" not in stream and b"waitress" not in stream and b"Traceback" not in stream


@pytest.mark.parametrize(("request_", "status"), REFUSED.values(), ids=REFUSED)
def test_refused(request_: bytes, status: int) -> None:
    with serving() as server:
        is_refused(server.raw(request_), status, request_)
        assert server.app.asked == []
        assert server.get("/after")[0] == 200


def test_refused_in_a_pool_and_while_closed() -> None:
    with serving(threads=2) as server:
        for until in (time.monotonic() + 60, 0.0):
            server.lease.until.value = until
            for request, status in list(REFUSED.values())[::9]:
                is_refused(server.raw(request), status, request)


# === What is served ==========================================================
LONG = b"X: " + b"x" * (HEADER - len(GET) - 3)  # so that all headers together are as long as allowed
# name: what the client sends, the body of each answer
SERVED: dict[str, tuple[bytes, list[bytes]]] = {
    "plain": (GET, [b"GET example.com / "]),
    "HTTP/1.0": (b"GET /x HTTP/1.0\r\n", [b"GET - /x "]),
    # the send string of F5's manual for its HTTP monitors, which know no name
    "host empty": (b"GET /x HTTP/1.1\r\nHost: \r\nConnection: Close\r\n", [b"GET - /x "]),
    "HTTP/1.0 with an empty host": (b"GET / HTTP/1.0\r\nHost:\r\n", [b"GET - / "]),
    "absolute, host empty": (b"GET http://example.com/x HTTP/1.1\r\nHost:\r\n", [b"GET example.com /x "]),
    "HTTP/1.0 with a host": (b"GET / HTTP/1.0\r\nHost: example.com:80\r\n", [b"GET example.com:80 / "]),
    "blank lines before": (b"\r\n\r\n\r\n" + GET, [b"GET example.com / "]),
    "host with a port": (b"GET / HTTP/1.1\r\nHost: example.com:8080\r\n", [b"GET example.com:8080 / "]),
    "host with an empty port": (b"GET / HTTP/1.1\r\nHost: example.com:\r\n", [b"GET example.com: / "]),
    "host with an underscore": (b"GET / HTTP/1.1\r\nHost: my_shop\r\n", [b"GET my_shop / "]),
    "host with IPv4": (b"GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n", [b"GET 192.0.2.1 / "]),
    "host with IPv6": (b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n", [b"GET [2001:db8::1]:80 / "]),
    "host without blanks": (b"GET / HTTP/1.1\r\nhost:example.com\r\n", [b"GET example.com / "]),
    "host between blanks": (b"GET / HTTP/1.1\r\nHost: \t example.com \t\r\n", [b"GET example.com / "]),
    "query": (b"GET /a%20b;c?x=%31&y HTTP/1.1\r\nHost: example.com\r\n", [b"GET example.com /a b;c?x=%31&y "]),
    "unusual characters": (b'GET /"{}|\\^`<>[] HTTP/1.1\r\nHost: x\r\n', [b'GET x /"{}|\\^`<>[] ']),
    "beyond ASCII": (b"GET /\xc3\xa4 HTTP/1.1\r\nHost: x\r\nX: \xe4\r\n", [b"GET x /\xc3\xa4 "]),
    "absolute": (b"GET http://a.example.com/x?y HTTP/1.1\r\nHost: b.example.com\r\n", [b"GET a.example.com /x?y "]),
    "absolute, HTTP/1.0": (b"GET http://example.com/x HTTP/1.0\r\n", [b"GET example.com /x "]),
    "absolute, no path": (b"GET HTTPS://example.com:443 HTTP/1.1\r\nHost: x\r\n", [b"GET example.com:443 / "]),
    "absolute, query only": (b"GET http://example.com?x HTTP/1.1\r\nHost: x\r\n", [b"GET example.com /?x "]),
    "absolute, ours": (b"GET http://example.com/-/livez HTTP/1.1\r\nHost: x\r\n", [b"ok\n"]),
    "options": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n", [b"OPTIONS x * "]),
    "unusual method": (b"M-SEARCH / HTTP/1.1\r\nHost: x\r\n", [b"M-SEARCH x / "]),
    "names with an underscore": (GET + b"Content_Length: 5\r\nTransfer_Encoding: x\r\n", [b"GET example.com / "]),
    "headers as long as allowed": (GET + LONG + b"\r\n", [b"GET example.com / "]),
    "no value": (GET + b"X:\r\nX:\r\n", [b"GET example.com / "]),
    "length 0": (POST + b"Content-Length: 0\r\n", [b"POST example.com / "]),
    "length 0, expected": (POST + b"Content-Length: 0\r\nExpect: 100-continue\r\n", [b"POST example.com / "]),
    "no length, expected": (GET + b"Expect: 100-continue\r\n", [b"GET example.com / "]),
    "expects something else": (GET + b"Expect: the unexpected\r\n", [b"GET example.com / "]),
    "HTTP/1.0 with options": (b"GET / HTTP/1.0\r\nConnection: TE, Upgrade\r\n", [b"GET - / "]),
    "HTTP/1.0 kept alive": (b"GET / HTTP/1.0\r\nConnection: TE, Keep-Alive\r\n", [b"GET - / "]),
    "closed among options": (GET + b"Connection: TE, Close\r\nTE: trailers\r\n", [b"GET example.com / "]),
}
# name: what follows the headers of a POST up to the empty line, what the application reads
BODIES: dict[str, tuple[bytes, bytes]] = {
    "length": (b"Content-Length: 5\r\n\r\nhello", b"hello"),
    "length with zeros": (b"Content-Length: 0005\r\n\r\nhello", b"hello"),
    "length as long as allowed": (b"Content-Length: %d\r\n\r\n" % LIMIT + b"x" * LIMIT, b"x" * LIMIT),
    "a request as body": (b"Content-Length: %d\r\n\r\n" % len(INNER) + INNER, INNER),
    "no chunk": (b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b""),
    "a chunk": (b"Transfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "chunks": (b"Transfer-Encoding: chunked\r\n\r\n00A\r\n0123456789\r\n1\r\nx\r\n000\r\n\r\n", b"0123456789x"),
    "chunks as long as allowed": (b"Transfer-Encoding: chunked\r\n\r\n1f4\r\n%b\r\n1F4\r\n%b\r\n0\r\n\r\n"
                                  % (b"x" * 500, b"y" * 500), b"x" * 500 + b"y" * 500),
    "chunks of ends": (b"Transfer-Encoding: chunked\r\n\r\n4\r\n\r\n\r\n\r\n2\r\n0\r\r\n0\r\n\r\n", b"\r\n\r\n0\r"),
    "chunks with extensions": (
        b'Transfer-Encoding: chunked\r\n\r\n5;a;b=c;d="e;\\"f"\r\nhello\r\n0;last\r\n\r\n', b"hello"),
    "small chunks": (b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * LIMIT + b"0\r\n\r\n", b"x" * LIMIT),
}  # fmt: skip
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
ENDS = ("HTTP/1.0", "HTTP/1.0 with a host", "HTTP/1.0 with an empty host", "HTTP/1.0 with options",
        "absolute, HTTP/1.0", "closed among options", "host empty")  # fmt: skip


def whole() -> dict[str, tuple[bytes, list[bytes]]]:
    """All requests that are served, to the last byte."""
    bodies = {f"body: {name}": (POST + sent, [b"POST example.com / " + read]) for name, (sent, read) in BODIES.items()}
    return {**{name: (head + b"\r\n", bodies) for name, (head, bodies) in SERVED.items()}, **bodies}


@POOL
def test_served(threads: int) -> None:
    """Each by itself, followed by another request where the connection goes on."""
    with serving(threads) as server:
        for name, (request, bodies) in whole().items():
            last = [] if name in ENDS else [b"GET x /last "]
            found = replies(server.raw(request if name in ENDS else request + LAST))
            assert [(reply.status, reply.body) for reply in found] == [(200, body) for body in bodies + last], name


def test_pipelined_requests_keep_their_order_and_a_refusal_ends_them() -> None:
    """All in one send; nothing behind what is refused is read."""
    good = {name: value for name, value in whole().items() if name not in ENDS}
    stream = b"".join(request for request, _ in good.values())
    bodies = [body for _, bodies in good.values() for body in bodies]
    with serving() as server:
        found = replies(server.raw(stream + REFUSED["two hosts"][0] + INNER))
        assert [reply.body for reply in found[:-1]] == bodies
        assert found[-1].status == 400
        assert "/inner" not in server.app.asked


# === The parser by itself ====================================================
def outcome(pieces: Iterable[bytes]) -> tuple[str, int]:
    """What becomes of the first request (the status of its refusal, "served" or "waits"), bytes that belong to it."""
    adjustments = Adjustments(max_request_body_size=LIMIT)
    parser, taken = GateParser(adjustments), 0
    for piece in pieces:
        while piece and not parser.completed:
            count = parser.received(piece)
            assert 0 < count <= len(piece)
            piece, taken = piece[count:], taken + count
        taken += len(piece) if parser.unread else 0  # nothing behind it is read
    parser.close()
    if parser.error:
        return parser.error.status, 0
    return ("served", taken) if parser.completed else ("waits", taken)


def cut(request: bytes, size: int) -> Iterator[bytes]:
    return (request[at : at + size] for at in range(0, len(request), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_it_does_not_matter_how_a_request_is_cut(size: int) -> None:
    longest = 100_000 if size == 1000 else 3000
    for name, (request, _) in {**REFUSED, **whole()}.items():
        if len(request) > longest:
            continue
        assert outcome(cut(request, size)) == outcome([request]), name


BITS = [b"\r\n", b"\r", b"\n", b"\0", b"\xff", b" ", b"\t", b":", b",", b"[", b"0", b"5", b"a", b"chunked", b"HTTP/1.1",
        b"http://", b"Content-Length", b"Transfer-Encoding", b"Host", b"Expect", b"X-Forwarded-For"]  # fmt: skip
SEEDS = st.sampled_from([request for request, _ in {**REFUSED, **whole()}.values() if len(request) < 2000])
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 4), st.one_of(st.sampled_from(BITS), st.binary(max_size=3)))
Edits = list[tuple[float, int, bytes]]  # where, how many bytes go there, what comes instead


@given(SEEDS, st.lists(EDIT, max_size=5), st.integers(1, 50))
def test_anything_is_served_refused_or_waited_for(request: bytes, edits: Edits, size: int) -> None:
    """However it is mutilated and cut: no error of Python's, and always the same outcome."""
    for where, gone, put in edits:
        at = int(where * len(request))
        request = request[:at] + put + request[at + gone :]
    result = outcome([request])
    assert result[0] in ("served", "waits") or int(result[0][:3]) in (400, 413, 431)
    assert outcome(cut(request, size)) == result


LONG_WINDED = {
    "blanks before a value": GET + b"X:" + b" " * 16_000,
    "a long name": GET + b"a" * 16_000,
    "many colons": GET + b"a:" * 8_000,
    "many headers": GET + b"a:\r\n" * 4_000 + b"\r\n",
    "a long method": b"G" * 16_000,
    "brackets": b"GET http://" + b"[" * 16_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long host": b"GET / HTTP/1.1\r\nHost: " + b"a." * 8_000 + b"\r\n\r\n",
    "many colons in a host": b"GET / HTTP/1.1\r\nHost: [" + b":" * 16_000 + b"]\r\n\r\n",
    "chunk extensions": CHUNKED + b"5;" + b"a=a;" * 4_000 + b"\r\n",
    "quotes in a chunk extension": CHUNKED + b'5;a="' + b'\\"' * 8_000 + b"\r\n",
}


@pytest.mark.parametrize("request_", LONG_WINDED.values(), ids=LONG_WINDED)
def test_no_header_takes_long_to_read(request_: bytes) -> None:
    """What makes a careless regular expression run for seconds or years."""
    begin = time.process_time()
    outcome([request_])
    assert time.process_time() - begin < 0.5


# === The end of a refused connection =========================================
@POOL
@pytest.mark.parametrize("head", [b"Content-Length: 3\r\n", b"Content-Length: 3\r\nExpect: 100-continue\r\n",
                                  b"Content-Length: 5000000000\r\n", b"Transfer-Encoding: chunked\r\n"],
                         ids=["length", "expected", "beyond the limit", "chunks"])  # fmt: skip
@pytest.mark.parametrize("rest", [b"", b"3\r\nabc\r\n0\r\n\r\n" + INNER], ids=["nothing", "more"])
def test_who_asks_the_gate_sends_no_body(threads: int, head: bytes, rest: bytes) -> None:
    """An nginx that asks with `auth_request` tells the length of its client's body, unless that is taken out, and never
    sends it. It is answered at once, and of what comes behind nothing is a request."""
    with serving(threads) as server, socket.create_connection(server.address, timeout=60) as sock:
        clock = Clock(server)
        sock.sendall(b"GET /-/gate HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n" + rest)
        (answer,) = replies(reads(sock))
        assert answer.status == 204 and "connection: close" in answer.head.lower()
        clock.shows(LINGER_TIME + 1)
        assert wait_for(lambda: not server.server.active_channels)


@POOL
@pytest.mark.parametrize("coding", ["length", "chunks"])
def test_a_client_that_sends_before_it_reads_gets_its_refusal(threads: int, coding: str) -> None:
    """Eight megabytes too many: closing at once would reset the connection, and the answer would be lost."""
    block = b"x" * (1 << 20)
    with serving(threads) as server, socket.create_connection(server.address, timeout=60) as sock:
        Clock(server)
        if coding == "length":
            sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % (8 << 20))
        else:
            sock.sendall(CHUNKED + b"800000\r\n")
        for _ in range(8):
            sock.sendall(block)
        is_refused(reads(sock), 413, b"")
        sock.sendall(b"x")  # it is still read
        sock.shutdown(socket.SHUT_WR)
        assert wait_for(lambda: not server.server.active_channels)


def test_a_refused_client_that_never_stops_is_left_after_seconds() -> None:
    with serving() as server, socket.create_connection(server.address, timeout=60) as sock:
        clock = Clock(server)
        sock.sendall(GET + GET + b"\r\n")
        (channel,) = wait_for(lambda: list(server.server.active_channels.values()))
        wait_for(lambda: channel._lingers_until < math.inf)
        for seconds in (1, 2, 3):
            sock.sendall(b"x" * 100)
            wait_for(lambda seconds=seconds: channel._discarded == 100 * seconds)
            clock.shows(seconds)
            assert channel.connected
        clock.shows(4.1)
        assert not channel.connected
        with pytest.raises(OSError):
            while True:
                sock.send(b"x" * 100)


def test_a_refused_client_that_never_stops_is_left_after_megabytes() -> None:
    """Sixteen, and what the system holds."""
    sent = 0
    with serving() as server, socket.create_connection(server.address, timeout=60) as sock:
        Clock(server)
        sock.sendall(GET + GET + b"\r\n")
        with pytest.raises(OSError):
            while sent < 40 << 20:
                sent += sock.send(b"x" * (1 << 16))
        assert LINGER_BYTES < sent < 40 << 20
        assert wait_for(lambda: not server.server.active_channels)


# === Slow clients ============================================================
@POOL
def test_slow_headers(threads: int) -> None:
    """Five seconds from the first byte on, however the others come; meanwhile nobody waits."""
    with serving(threads) as server, contextlib.ExitStack() as stack:
        clock = Clock(server)
        socks = connect(stack, server.address, 3)
        socks[2].sendall(GET + b"\r\n")
        assert socks[2].recv(1000).endswith(b"GET example.com / ")
        forgets(server)
        for sock in socks:
            sock.sendall(b"G")
        first, last = clock.begun(3)
        channels = list(server.server.active_channels.values())
        for number, seconds in enumerate((1.5, 3, 4.9), 1):
            for sock in socks[1:]:
                sock.sendall(b"E")
            sizes = [1, 1 + number, 1 + number]
            wait_for(lambda sizes=sizes: sorted(len(channel.request.header_plus) for channel in channels) == sizes)
            clock.shows(first + seconds)
            assert clock.kept() == 3 and silent(*socks)
        assert server.get("/meanwhile")[0] == 200
        assert silent(*socks)
        clock.shows(last + 5.95)
        for sock in socks:
            is_refused(reads(sock), 408, b"")
        assert server.app.asked == ["/", "/meanwhile"]


@POOL
def test_slow_bodies(threads: int) -> None:
    with serving(threads) as server, contextlib.ExitStack() as stack:
        clock = Clock(server)
        starts = (POST + b"Content-Length: 900\r\n\r\n", CHUNKED, CHUNKED + b"384\r\n")
        socks = connect(stack, server.address, len(starts))
        for sock, start in zip(socks, starts, strict=True):
            sock.sendall(start)
        channels = server.server.active_channels
        wait_for(lambda: [bool(each.request and each.request.headers_finished) for each in list(channels.values())]
                 == [True] * 3)  # fmt: skip
        clock.shows(1)
        begun = [channel.request.begun - clock.begin for channel in channels.values()]
        bodies = [channel.request.body_rcv for channel in channels.values()]
        (body,) = (body for body in bodies if isinstance(body, FixedStreamReceiver))
        for number, seconds in enumerate((2.5, 10, 20, 29.9), 1):
            socks[0].sendall(b"x")
            wait_for(lambda number=number: body.remain == 900 - number)
            clock.shows(min(begun) + seconds)
            assert clock.kept() == 3 and silent(*socks)
        clock.shows(max(begun) + 30.95)
        for sock in socks:
            is_refused(reads(sock), 408, b"")
        assert server.app.asked == []


@pytest.mark.parametrize(("threads", "best"), [(0, True), (2, False)], ids=["best", "select"])
def test_idle_connections(threads: int, best: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one has 15 s, one that was used 75 s; blank lines are no use."""
    if not best:  # what Windows has
        monkeypatch.setattr(GateServer, "selector_class", selectors.SelectSelector)
    with serving(threads) as server, contextlib.ExitStack() as stack:
        clock = Clock(server)
        new, kept, blank = connect(stack, server.address, 3)
        kept.sendall(GET + b"\r\n")
        assert kept.recv(1000).endswith(b"GET example.com / ")
        blank.sendall(b"\r\n\r\n")
        channels = server.server.active_channels
        wait_for(lambda: sorted(bool(channel.request) for channel in list(channels.values())) == [False, False, True])
        forgets(server)
        for channel in channels.values():  # by a clock that shows 16 ms at once, as on Windows
            channel.creation_time = channel.last_activity
        clock.shows(1)
        clock.shows(14.9)
        assert clock.kept() == 3 and silent(new, kept, blank)
        clock.shows(16)
        assert new.recv(1) == b""
        clock.shows(70)
        assert clock.kept() == 2 and silent(kept, blank)
        kept.sendall(GET + b"\r\n")
        assert kept.recv(1000).endswith(b"GET example.com / "), "used again in time"
        forgets(server)
        clock.shows(71)
        clock.shows(71 + 74.9)
        assert clock.kept() == 1 and silent(kept)
        clock.shows(71 + 76)
        assert kept.recv(1) == b"" and blank.recv(1) == b""


@POOL
def test_time_in_the_application_does_not_count(threads: int) -> None:
    """Nor does the time of a pipelined request that begins behind it."""
    entered, release = threading.Event(), threading.Event()

    def slow(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        entered.set()
        release.wait(120)
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
        return [b"done"]

    with Serving(slow, threads) as server, socket.create_connection(server.address, timeout=60) as sock:
        clock = Clock(server)
        try:
            sock.sendall(GET + b"\r\n" + GET)
            assert entered.wait(60)
            if threads:  # on the loop nothing is watched while the application works
                clock.shows(300)
            clock.now = clock.begin + 302
            assert clock.kept() == 1 and silent(sock)
        finally:
            release.set()
        assert sock.recv(1000).endswith(b"done")
        if threads:
            (channel,) = server.server.active_channels.values()
            wait_for(lambda: channel.request.begun == clock.now)
            clock.shows(306.9)
            assert clock.kept() == 1 and silent(sock)
            sock.sendall(b"Connection: close\r\n\r\n")
            assert reads(sock).endswith(b"done")


def is_full(sock: socket.socket) -> bool:
    """Whether the system takes no more to be sent there."""
    return not select.select([], [sock], [], 0)[1]


@POOL
def test_a_client_that_does_not_read_its_answer(threads: int) -> None:
    """It has a minute; then its pool thread is free again."""
    closed = threading.Event()

    class Endless:
        def __iter__(self) -> Iterator[bytes]:
            return itertools.repeat(b"x" * (1 << 20), 40)

        def close(self) -> None:
            closed.set()

    def large(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/small":
            start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
            return [b"ok"]
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(40 << 20))])
        return Endless()

    with Serving(large, threads) as server, socket.create_connection(server.address, timeout=60) as sock:
        clock = Clock(server)
        sock.sendall(GET + b"\r\n")
        assert sock.recv(10)
        channel = next(iter(server.server.active_channels.values()))
        assert wait_for(lambda: channel.total_outbufs_len > 0 and is_full(channel.socket))
        while channel.connected:
            since = channel._since
            clock.shows(since - clock.begin + 59.9)
            assert channel.connected
            clock.shows(since - clock.begin + 61)
            assert not channel.connected or channel._since > since, "the system may take a little more after that"
        assert wait_for(lambda: not server.server.active_channels)
        assert wait_for(closed.is_set)
        for _ in range(threads + 1):
            assert server.get("/small") == (200, b"ok")


def test_slow_readers_while_others_starve() -> None:
    """Those who take next to nothing leave their threads to the requests that wait; who takes its answer keeps its."""
    size = 64 << 20

    def large(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        large = environ["PATH_INFO"] == "/"
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size if large else 2))])
        return itertools.repeat(b"x" * (1 << 16), size >> 16) if large else [b"ok"]

    with Serving(large, 3) as server, contextlib.ExitStack() as stack:
        clock = Clock(server)
        none, little, reading = connect(stack, server.address, 3)
        for number, sock in enumerate((none, little, reading), 1):
            sock.sendall(GET + b"\r\n")
            wait_for(lambda number=number: len(server.server.waited_for) == number)
        ours = {channel.addr[1]: channel for channel in server.server.active_channels.values()}
        for seconds in (2, 4):
            wait_for(lambda: all(is_full(channel.socket) for channel in ours.values()))
            clock.shows(seconds)
        received = 0
        while received < 4 << 20:
            received += len(reading.recv(1 << 20))
        little.recv(1000)
        wait_for(lambda: ours[reading.getsockname()[1]].taken_at == clock.now)
        clock.shows(14)
        wait_for(lambda: len(server.server.waited_for) == 3)  # nobody is in want of their threads
        assert server.get("/inner", 60)[1] == b"ok"
        assert not all(ours[sock.getsockname()[1]].connected for sock in (none, little))
        while received < size:
            received += len(reading.recv(1 << 20))


def test_a_refusal_counts_the_time_of_its_own() -> None:
    """A request that was never complete is not timed from an earlier one, or from when the machine was started."""
    with serving() as server, socket.create_connection(server.address, timeout=60) as sock:
        clock = Clock(server)
        sock.sendall(GET + b"\r\n")
        assert sock.recv(1000).endswith(b"GET example.com / ")
        (channel,) = server.server.active_channels.values()
        channel.began -= 1000
        sock.sendall(GET)
        clock.shows(clock.begun(1)[1] + 6)
        is_refused(reads(sock), 408, b"")
        assert server.server.tally._cells[ROWS["bad"] + ROW - 1] < 100


@POOL
def test_what_a_client_has_begun_does_not_keep_its_connection(threads: int) -> None:
    """After a failure: one answer, and the end, although a part of another request is there."""

    def fails(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        raise ValueError(environ["PATH_INFO"])

    with Serving(fails, threads) as server, socket.create_connection(server.address, timeout=60) as sock:
        clock = Clock(server)
        sock.sendall(GET + b"\r\n" + GET)
        assert reads(sock).startswith(b"HTTP/1.1 500 ")
        forgets(server)
        clock.shows(4)
        assert not server.server.active_channels
        assert server.server.tally._cells[ROWS["bad"] : ROWS["bad"] + ROW - 1].tolist() == [0.0] * (ROW - 1)


@POOL
def test_an_application_that_fails(threads: int) -> None:
    """Nobody keeps the answer, and to HEAD it has no body."""

    def fails(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        raise ValueError(environ["PATH_INFO"])

    with Serving(fails, threads) as server:
        for method in (b"GET", b"HEAD"):
            head, _, body = server.raw(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n").partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 500 ") and b"\r\nCache-Control: no-store" in head
            assert int(head.partition(b"Content-Length: ")[2].split()[0]) > 0
            assert bool(body) is (method == b"GET"), body
        assert server.raw(b"HEAD / HTTP/1.1\r\nHost: a b\r\n\r\n").endswith(b"\r\n\r\n")


def test_what_has_come_is_answered_though_its_connection_was_idle() -> None:
    """To close on a request that nobody has read yet would reset the connection."""
    with serving() as server, socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(GET + b"\r\n")
        assert sock.recv(1000).endswith(b"GET example.com / ")
        (channel,) = server.server.active_channels.values()

        def sweep() -> None:  # on the loop, which reads nothing meanwhile
            sock.sendall(GET + b"\r\n")
            assert select.select([channel.socket], [], [], 60)[0]
            look()

        def look() -> None:
            for later in (0, 80):
                channel.sweep(server.server.clock() + later, False)

        server.server.trigger.pull_trigger(sweep)
        assert sock.recv(1000).endswith(b"GET example.com / ")
        server.server.trigger.pull_trigger(look)
        assert sock.recv(1000) == b""


def test_the_wall_clock_may_jump() -> None:
    """waitress measures by it; here it is only a mark of whether something happened."""
    with serving() as server, socket.create_connection(server.address, timeout=60) as sock:
        sock.sendall(GET + b"\r\n")
        assert sock.recv(1000).endswith(b"GET example.com / ")
        (channel,) = server.server.active_channels.values()
        clock = Clock(server)
        for seconds, jump in ((2, -1e9), (4, 1e9)):  # what a jump of the clock the other way looks like
            channel.last_activity += jump
            clock.shows(seconds)
            assert clock.kept() == 1 and silent(sock)
        clock.shows(80)
        assert sock.recv(1) == b""


# === Many clients ============================================================
@contextlib.contextmanager
def room_for(connections: int) -> Iterator[None]:
    """As many descriptors for this process; the test is skipped where there are too few."""
    if sys.platform == "win32":
        pytest.skip("a process serves no more than 400 there")
    import resource  # noqa: PLC0415  # POSIX only

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < connections + 200:
        pytest.skip(f"only {hard} descriptors are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, connections + 200), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


STEADY = "  - {name: steady, platform: simulated, mean_healthy: 1000000, seed: 1, interval: 20}"


def timed(service: Service) -> float:
    """Seconds that a normal request takes."""
    begin = time.monotonic()
    assert service.get("/").status == 200
    return time.monotonic() - begin


@pytest.mark.long
def test_five_hundred_slow_headers(tmp_path: Path) -> None:
    """A normal request is answered within 6 s, and from then on at once; the slow ones are told."""
    with room_for(600), Service(write_inventory(tmp_path, STEADY)) as service, contextlib.ExitStack() as stack:
        service.wait_status("/", 200)
        begin = time.monotonic()
        socks = connect(stack, (service.host, service.port), 500)
        for sock in socks:
            sock.sendall(b"GET / HTTP/1.1\r\nHo")
        assert timed(service) < 6
        while time.monotonic() - begin < 4:
            for sock in socks[::10]:
                sock.sendall(b"o")
            assert timed(service) < 3
        for sock in socks:
            is_refused(reads(sock), 408, b"")
        assert time.monotonic() - begin < 5 + 20
        assert timed(service) < 3


def test_two_thousand_idle_sockets(tmp_path: Path) -> None:
    with room_for(2000), Service(write_inventory(tmp_path, STEADY)) as service, contextlib.ExitStack() as stack:
        service.wait_status("/", 200)
        last = connect(stack, (service.host, service.port), 2000)[-1]
        last.settimeout(30)
        last.sendall(GET + b"\r\n")
        assert last.recv(1000).startswith(b"HTTP/1.1 200"), "all are accepted"
        for _ in range(5):
            assert timed(service) < 3
        stack.close()
        assert timed(service) < 5


class CountingSocket(socket.socket):
    """A listening socket that counts how often somebody was to be accepted."""

    accepts = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.accepts += 1
        return super().accept()


def test_the_loop_does_not_spin_without_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    with room_for(0), contextlib.ExitStack() as stack:
        import resource  # noqa: PLC0415  # POSIX only

        sock = stack.enter_context(CountingSocket())
        sock.bind(("127.0.0.1", 0))
        starved = serving(sock=sock)
        client = stack.enter_context(socket.create_connection(starved.address, timeout=60))
        client.sendall(GET + b"\r\n")
        clock = Clock(starved)
        free = os.dup(client.fileno())
        os.close(free)  # the next descriptor to be had
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with starved:
                wait_for(lambda: sock.accepts)
                for seconds in (1, 2, 3):
                    clock.shows(seconds)
                    wait_for(lambda seconds=seconds: sock.accepts >= 1 + seconds)
                    assert sock.accepts == 1 + seconds
                assert silent(client)
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                clock.shows(4)
                assert client.recv(1000).endswith(b"GET example.com / ")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caplog.text.count("cannot be accepted: Too many open files") == 1


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit can be set from outside on Linux only")
def test_no_descriptor_left(tmp_path: Path) -> None:
    """As many sockets as there are descriptors, and more: the process lives and serves again."""
    import resource  # noqa: PLC0415  # POSIX only

    inventory = write_inventory(tmp_path, STEADY)
    with room_for(600), Service(inventory) as service, contextlib.ExitStack() as stack:
        service.wait_status("/", 200)
        (worker,) = workers(service.pid)
        soft, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE, (200, 300))
        socks = connect(stack, (service.host, service.port), 400)
        service.wait_line("a connection cannot be accepted")
        for sock in socks[:150]:  # busy ones stay, idle ones give way
            sock.sendall(GET)
        assert service.wait_status("/", 200, 12)
        stack.close()
        assert timed(service) < 3
        assert service.output.count("cannot be accepted") < 3, "said once, not for each"
        assert service.output.count("Traceback") == 0
    assert soft >= 200 and hard >= 300


def test_no_connection_left() -> None:
    """Beyond the limit of connections the next wait; idle ones make room for them."""
    with serving(connections=20) as server, contextlib.ExitStack() as stack:
        clock = Clock(server)
        connect(stack, server.address, 40)
        channels = server.server.active_channels
        (last,) = connect(stack, server.address, 1)
        last.sendall(GET + b"\r\n")
        for seconds in range(1, 10):
            wait_for(lambda: len(channels) >= 18 or not silent(last))
            assert len(channels) <= 20
            clock.shows(seconds)
        assert last.recv(1000).endswith(b"GET example.com / ")
