"""Many HTTP clients in one thread: each asks on a connection of its own, and again when it has its answer."""

from __future__ import annotations

import errno
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

from sshd import wait_for
from typing_extensions import Self  # typing has it from Python 3.11 on

UNDER_WAY = (0, errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0))


class Response(NamedTuple):
    """An answer with the monotonic times at which its request was sent and it was there as a whole."""

    sent: float
    received: float
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes


class Lost(NamedTuple):
    """A request without a whole answer: when it was sent, and its connection begun, the body of the last answer
    before it, what happened."""

    sent: float
    opened: float
    last: bytes
    why: str


def parse(received: bytes) -> tuple[int, dict[str, str], bytes, int] | None:
    """Status, headers, body and the length of all three; None until they are there."""
    head, end, rest = received.partition(b"\r\n\r\n")
    if not end:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    status = int(first.split()[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = 0 if status == 204 else int(headers["content-length"])
    return (status, headers, rest[:length], len(head) + 4 + length) if len(rest) >= length else None


class Client:
    """One connection of `Clients`."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.last = b""  # the body of the last answer
        self.wakes: float | None = None  # when it asks again
        self.asking = False  # a request is out
        self.refused = False
        self._received, self._sent, self._opened = b"", 0.0, time.monotonic()
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if self.socket.connect_ex(clients.address) in UNDER_WAY:
            clients.selector.register(self.socket, selectors.EVENT_WRITE, self)
        else:
            self.refused = True
            self.socket.close()

    @property
    def open(self) -> bool:
        return self.socket.fileno() >= 0

    def act(self, event: int) -> None:
        """Does what its socket is ready for."""
        try:
            if event & selectors.EVENT_WRITE and self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.refused = True
                self.close()
            elif event & selectors.EVENT_WRITE:
                self.clients.selector.modify(self.socket, selectors.EVENT_READ, self)
                self.ask()
            elif part := self.socket.recv(1 << 18):
                self._received += part
                self._take()
            else:
                self.end("closed")
        except OSError as error:
            self.end(errno.errorcode.get(error.errno or 0, str(error)))

    def ask(self) -> None:
        self.wakes, self.asking, self._sent = None, True, time.monotonic()
        self.socket.send(self.clients.request)

    def _take(self) -> None:
        if (answer := parse(self._received)) is None:
            return
        status, headers, self.last, length = answer
        now = time.monotonic()
        self._received, self.asking = self._received[length:], False
        self.clients.note(Response(self._sent, now, status, headers, self.last))
        if self.clients.over or not self.clients.keep or headers.get("connection", "").lower() == "close":
            self.close()
        elif self.clients.pause:
            self.wakes = now + self.clients.pause
        else:
            self.ask()

    def end(self, why: str) -> None:
        if self.asking:
            self.clients.lost.append(Lost(self._sent, self._opened, self.last, why))
        self.close()

    def close(self) -> None:
        if self.open:
            self.clients.selector.unregister(self.socket)
            self.socket.close()


class Clients(threading.Thread):
    """`count` clients that ask for `path`, with `pause` seconds between an answer and the next request.

    with Clients(("127.0.0.1", port), 16) as clients:
        ...
    assert not clients.lost

    A connection that ends is opened again, until that is refused. At the end of the block the requests that are out
    have `patience` seconds; what has no answer by then is lost, like what a connection that ends leaves unanswered.
    """

    def __init__(
        self,
        address: tuple[str, int],
        count: int,
        path: str = "/",
        *,
        keep: bool = True,
        pause: float = 0.0,
        patience: float = 60.0,
    ) -> None:
        super().__init__(name="clients", daemon=True)
        self.address, self.keep, self.pause, self.over = address, keep, pause, False
        self.request = b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: %s\r\n\r\n" % (
            path.encode(),
            b"keep-alive" if keep else b"close",
        )
        self.answers: list[Response] = []
        self.lost: list[Lost] = []
        self.selector = selectors.DefaultSelector()
        self._count, self._patience = count, patience
        self._clients: list[Client] = []
        self._fault: BaseException | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over = True
        self.join(self._patience + 5)
        if self._fault and not error:
            raise self._fault

    def note(self, answer: Response) -> None:
        self.answers.append(answer)

    @property
    def statuses(self) -> Counter[int]:
        """How many answers there are of each status."""
        return Counter(answer.status for answer in list(self.answers))

    @property
    def holders(self) -> Counter[bytes]:
        """How many open connections were last answered with each body."""
        return Counter(client.last for client in list(self._clients) if client.open)

    def holders_of(self, count: int, deadline: float = 60.0) -> Counter[bytes]:
        """`holders` once so many connections are open and were answered."""
        wait_for(lambda: not self.holders[b""] and self.holders.total() == count, deadline)
        return self.holders

    def run(self) -> None:
        try:
            self._clients = [Client(self) for _ in range(self._count)]
            ends: float | None = None
            while self._clients and (ends is None or time.monotonic() < ends):
                for key, event in self.selector.select(0.01) if self.selector.get_map() else ():
                    key.data.act(event)
                ends = time.monotonic() + self._patience if self.over and ends is None else ends
                self._attend(time.monotonic())
            for client in self._clients:
                client.end("no answer in time")
        except Exception as fault:  # noqa: BLE001  # raised again at the end of the block
            self._fault = fault
        finally:
            self.selector.close()

    def _attend(self, now: float) -> None:
        """Wakes who paused, replaces who ended, dismisses who was refused or is not needed any more."""
        for client in self._clients:
            if self.over and not client.asking:
                client.close()
            elif client.wakes is not None and client.wakes <= now:
                try:
                    client.ask()
                except OSError as error:
                    client.end(str(error))
        ended = [client for client in self._clients if not client.open]
        if ended:
            again = [client for client in ended if not client.refused and not self.over]
            self._clients = [client for client in self._clients if client.open] + [Client(self) for _ in again]
