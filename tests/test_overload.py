"""Overload: more requests than the pools take, slow readers of large answers; our own answers come in any case."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
from conftest import no_leaks, wait_for
from load import Clients, parse
from service import Team
from test_gate import Serving, goes_round, hello, reads
from test_workers import workers

import healthchecker
from healthchecker import POOL_BUFFER, SEND_BYTES, Lease, ServiceSettings

KEPT = 12 << 20  # bytes that the allocator of C keeps for a thread that has sent a large answer
THREADS, QUEUE = 4, 8
OWN = {"/-/livez": 200, "/-/readyz": 200, "/-/gate": 204, "/-/health": 200}
SETTINGS = ServiceSettings(queue=QUEUE)

# Behind workers: /wait answers once there is a file, /slow takes 20 ms, /large has 100 MB.
APP = """
import os, pathlib, threading

RELEASE = pathlib.Path(__file__).with_name("release")


def app(environ, start_response):
    path, body = environ["PATH_INFO"], [str(os.getpid()).encode()]
    if path == "/slow":
        threading.Event().wait(0.02)
    while path == "/wait" and not RELEASE.exists():
        threading.Event().wait(0.02)
    headers = [("Content-Type", "text/plain")]
    if path == "/large":
        body = (b"x" * (1 << 16) for _ in range(1600))
    else:
        headers.append(("Content-Length", str(len(body[0]))))
    start_response("200 OK", headers)
    return body
"""


class Waiting:
    """An application whose requests wait until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.go.wait(240)
        return hello(environ, start_response)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    Lease()  # the first one opens the shared memory of all
    if sys.platform != "win32":
        resource_tracker.ensure_running()  # so does the first process
    with no_leaks():
        yield
        gc.collect()  # multiprocessing gives back what belonged to a process when nobody has it any more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the application of the workers in it."""
    (tmp_path / "shop.py").write_text(APP, encoding="utf-8")
    return tmp_path


def is_full(channel: Any) -> bool:
    """Whether a connection is open, and the system takes no more to be sent there."""
    with contextlib.suppress(OSError, ValueError):  # it is being closed
        return bool(channel.connected and not select.select([], [channel.socket], [], 0)[1])
    return False


@contextlib.contextmanager
def filled(app: Waiting, count: int = THREADS + QUEUE, **options: Any) -> Iterator[Serving]:
    """A server in which `count` requests of the application are, each of which gets its answer at the end."""
    with Serving(app, THREADS, service=SETTINGS, **options) as serving:
        wait_for(lambda: not serving.server.pool.active_count)  # all threads have begun
        with Clients(serving.address, count) as inside:
            wait_for(lambda: serving.server.pool.waiting == max(0, count - THREADS))
            yield serving
            assert not inside.answers, "somebody was refused although there was room"
            inside.over = True
            app.go.set()
    assert not inside.lost and inside.statuses == {200: count}


def answers(address: tuple[str, int], path: str, status: int, count: int = 300) -> None:
    """So many answers one after the other, all with that status."""
    with Clients(address, 1, path) as client:
        wait_for(lambda: len(client.answers) >= count)
    assert not client.lost and set(client.statuses) == {status}


# === The bound of the pool ===================================================
def test_beyond_the_bound_is_refused_at_once() -> None:
    """With all threads asleep and as many requests waiting as may."""
    with filled(Waiting()) as serving:
        with Clients(serving.address, 4, pause=0.002) as outside:
            wait_for(lambda: len(outside.answers) > 400)
        assert not outside.lost and set(outside.statuses) == {503}
        assert {answer.headers["retry-after"] for answer in outside.answers} == {"1"}
        assert {json.loads(answer.body)["status"] for answer in outside.answers} == {503}
        answers(serving.address, "/", 503)


def test_our_own_answers_come_at_once_all_the_same() -> None:
    """And what the closed gate refuses does."""
    with filled(Waiting()) as serving:
        for path, status in OWN.items():
            answers(serving.address, path, status)
        serving.lease.until.value = 0.0
        answers(serving.address, "/", 503)
        serving.lease.until.value = healthchecker.lease_clock() + 60


def test_a_burst_for_which_there_is_room_is_served() -> None:
    """As many at once as threads are idle and may wait, again and again."""

    def brief(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        threading.Event().wait(0.001)
        return hello(environ, start_response)

    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with Serving(brief, THREADS, service=SETTINGS) as serving, contextlib.ExitStack() as stack:
        pool = serving.server.pool
        clients = [
            stack.enter_context(socket.create_connection(serving.address, timeout=60))
            for _ in range(THREADS + QUEUE)
        ]
        for _ in range(100):
            for client in clients:
                client.sendall(request)
            assert {client.recv(1000)[:12] for client in clients} == {b"HTTP/1.1 200"}
            wait_for(lambda: not pool.queue and not pool.active_count)  # all of them are idle again


def test_pipelined_requests_keep_their_order() -> None:
    """Answers of the pool, of the loop and refusals, many connections at once."""

    def echo(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environ["PATH_INFO"][1:].encode()
        threading.Event().wait(0.001)
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]

    shuffle, outcomes = random.Random(4), set()
    kinds = {"/-/livez": b"ok\n", "/-/readyz": b"open\n", "/-/nothing": b"not found\n"}
    with (
        Serving(echo, 2, service=ServiceSettings(queue=1)) as serving,
        contextlib.ExitStack() as stack,
    ):
        pipelines = []
        for number in range(12):
            paths = [shuffle.choice([*kinds, f"/{number}-{place}", f"/{number}-{place}"]) for place in range(40)]
            sock = stack.enter_context(socket.create_connection(serving.address, timeout=60))
            pipelines.append((sock, paths))
        for sock, paths in pipelines:
            last = b"GET /-/livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            sock.sendall(b"".join(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode() for path in paths) + last)
        for sock, paths in pipelines:
            received = reads(sock)
            for path in [*paths, "/-/livez"]:
                answer = parse(received)
                assert answer, "an answer is missing"
                status, _, body, length = answer
                received = received[length:]
                if status == 503:
                    assert path not in ("/-/livez", "/-/readyz") and body != b"ending\n"
                else:
                    assert body == kinds.get(path, path[1:].encode())
                outcomes.add((status, path in kinds))
            assert received == b""
    assert {(200, False), (503, False), (200, True), (404, True)} <= outcomes


# === Large answers ===========================================================
def test_a_slow_client_never_stops_the_loop() -> None:
    """Requests pipelined behind a large answer that nobody takes are answered on the loop when its buffer is full."""
    servings: list[Serving] = []

    def left() -> int:
        """Bytes for which there is room in the buffer."""
        return POOL_BUFFER - max(
            (channel.total_outbufs_len for channel in list(servings[0].server.active_channels.values())), default=0
        )

    def fills(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """First most of the buffer, and all that the system takes; then the rest but for a few bytes."""
        size = POOL_BUFFER
        if environ["PATH_INFO"] == "/rest":
            size = 0
            (channel,) = servings[0].server.active_channels.values()
            while not is_full(channel) or size != left() - 150:  # until the system takes no more
                size = left() - 150
                time.sleep(0.2)
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size))])
        return (b"x" * min(1 << 16, size - begin) for begin in range(0, size, 1 << 16))

    paths = ["/most", "/rest", *["/-/livez"] * 400]  # more than the system may take meanwhile
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # or the system takes more and more
    with Serving(fills, 1, sock=listening) as serving, socket.socket() as greedy:
        servings.append(serving)
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        greedy.settimeout(60)
        greedy.connect(serving.address)
        greedy.sendall(b"".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths))
        wait_for(lambda: left() < 0)
        assert serving.get("/-/livez") == (200, b"ok\n")
        received = bytearray()
        while received.count(b"HTTP/1.1 200") < len(paths) or not received.endswith(b"ok\n"):
            received += greedy.recv(1 << 20)


@pytest.mark.long
@pytest.mark.parametrize("readers", [1, 2])
def test_a_large_answer_takes_no_more_memory_than_its_buffer(folder: Path, readers: int) -> None:
    """100 MB to clients that do not read, and then do; others are served meanwhile."""
    request = b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    settings = f"  app: shop:app\n  threads: {THREADS}"
    with Team(folder, 1, settings, quick=False) as team, contextlib.ExitStack() as stack:
        with Clients(team.address, 2, pause=0.01) as clients:
            wait_for(lambda: len(clients.answers) > 50)
            (worker,) = workers(os.getpid()).values()
            before = worker.memory_full_info().uss
            slow = [
                stack.enter_context(socket.create_connection(team.address, timeout=60)) for _ in range(readers)
            ]
            for sock in slow:
                sock.sendall(request)
            highest = before
            seen = len(clients.answers)
            for sock in slow:
                received = 0
                while part := sock.recv(1 << 20):
                    received += len(part)
                    highest = max(highest, worker.memory_full_info().uss)
                assert received > 1600 << 16
            assert len(clients.answers) > seen
        assert highest - before < readers * POOL_BUFFER + THREADS * KEPT
        assert set(clients.statuses) == {200} and not clients.lost


@pytest.mark.long
@pytest.mark.parametrize("kind", ["whole", "pieces"])
def test_many_slow_readers_of_large_answers(kind: str) -> None:
    """The slowest are cut: what waits to be sent is bounded, and who asks for little behind them gets it."""
    size, count, limit = 50 << 20, 32, 8 << 20
    waits: list[int] = []

    def large(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/small":
            return hello(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(size))])
        return [bytes(size)] if kind == "whole" else (bytes(1 << 16) for _ in range(size >> 16))

    service = ServiceSettings(send_buffer=limit)
    with Serving(large, THREADS, service=service) as serving, contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(serving.address, timeout=60))
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with Clients(serving.address, 1, "/small", patience=60) as client:
            wait_for(lambda: waits.append(total(serving)) or len(client.answers) > 5, 60)
        assert not client.lost and set(client.statuses) == {200}
        wait_for(lambda: total(serving) <= limit + size)
        assert max(waits) < 2 * limit + (THREADS + 2) * size < count * size
        (lone,) = (stack.enter_context(socket.create_connection(serving.address, timeout=60)) for _ in range(1))
        lone.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert len(reads(lone)) > size, "who takes it gets an answer that is larger than all that may wait"


def test_behind_a_crowd_that_takes_nothing() -> None:
    """The more wait for a thread, the sooner those are cut who keep one: nobody honest waits for all of them."""

    def large(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/small":
            return hello(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return (bytes(1 << 16) for _ in range(200))

    service, begin = ServiceSettings(send_buffer=4 << 20), time.monotonic()
    now = [begin]
    with Serving(large, THREADS, service=service) as serving, contextlib.ExitStack() as stack:
        serving.server.clock = lambda: now[0]  # it stands
        for _ in range(16 * THREADS):
            sock = stack.enter_context(socket.create_connection(serving.address, timeout=60))
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: serving.server.pool.waiting > 14 * THREADS)
        channels = list(serving.server.active_channels.values())
        assert max(channel.sendbuf_len for channel in channels) <= SEND_BYTES, "each try reads so much of a file again"
        with Clients(serving.address, 1, "/small", patience=60) as client:
            while not client.answers:
                wait_for(lambda: client.answers or [*map(is_full, list(serving.server.waited_for))] == [True] * THREADS)
                now[0] += 0.05
                goes_round(serving)
        assert not client.lost and now[0] - begin < 5, "at half a second for each it is 10 s"


def total(serving: Serving) -> int:
    """Bytes that wait to be sent."""
    return sum(channel.total_outbufs_len for channel in list(serving.server.active_channels.values()))


# === With workers ============================================================
def test_workers_whose_pools_are_asleep(folder: Path) -> None:
    """Our own answers come at once from each; afterwards everybody is answered."""
    settings = "  app: shop:app\n  threads: 2\n  queue: 2"
    with Team(folder, 2, settings) as team, Clients(team.address, 16, "/wait", pause=0.05) as inside:
        wait_for(lambda: inside.statuses[503] > 100, 20)  # eight are in, the others are refused again and again
        for path, status in OWN.items():
            answers(team.address, path, status)
        assert set(inside.statuses) == {503}
        (folder / "release").touch()
        wait_for(lambda: inside.statuses[200] > 16)
    assert not inside.lost


def test_after_the_load_all_is_as_before(folder: Path) -> None:
    """Many more clients than there is room for; those who get in are served, and when it ends, everybody is."""
    settings = f"  app: shop:app\n  threads: {THREADS}\n  queue: {QUEUE}"
    with Team(folder, 2, settings) as team:
        with Clients(team.address, 64, "/slow") as crowd:
            wait_for(lambda: crowd.statuses[200] > 100 and crowd.statuses[503] > 100)
        with Clients(team.address, 4, "/slow", keep=False) as clients:
            wait_for(lambda: len(clients.answers) >= 40)
    assert not crowd.lost and not clients.lost
    assert set(crowd.statuses) == {200, 503}
    assert set(clients.statuses) == {200}
