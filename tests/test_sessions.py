"""What stays open between polls, over real sshds: how many logins there are, and what ends one."""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import paramiko
import pytest
from conftest import NO_PASSWORD_LOGIN, no_leaks, wait_for
from console import NAME, local_console
from paramiko import common
from prometheus_client import generate_latest
from sshd import (
    OPENSSH,
    POSIX,
    Listener,
    Login,
    ParamikoSshd,
    Sshd,
    certified_key,
    make_key,
    public_line,
    send,
    write_private,
)
from sshd import Connection as Accepted
from test_transport import (
    AMPLE,
    Answer,
    access,
    good_login,
    healthy,
    poll,
    settings_digest,
    target,
)

from healthchecker import (
    CONNECTIONS,
    ConnectionContext,
    Counters,
    Deadline,
    KnownHosts,
    LoginGuard,
    Metrics,
    ProbeError,
    Resolver,
    ServingMetrics,
    SessionKeeper,
    SshConnection,
    SshSession,
    Target,
    find_resource,
    revise,
)

RELOGIN = 1000.0


@contextlib.contextmanager
def keeping(
    watched: Target, context: ConnectionContext | None = None, *, leaves_nothing: bool = True
) -> Iterator[SshConnection]:
    """A connection as a poller has it; what it opened ends with the block."""
    context = context or access()
    context = replace(context, keeps=True)      # shares what those behind a bastion know of each other
    connection = CONNECTIONS[watched.settings.platform](watched, context.guard_of(watched), context)
    assert isinstance(connection, SshConnection)
    context.watched[watched.name] = connection
    with no_leaks() if leaves_nothing else contextlib.nullcontext(), contextlib.closing(connection):
        yield connection


def on(server: Any, **settings: Any) -> Target:
    return target(server, **{"timeout": AMPLE, **good_login(server), **settings})


def logins(server: Any) -> int:
    return len(re.findall(r"Accepted \w+ for ", server.log()))


def session(connection: SshConnection) -> SshSession:
    assert isinstance(connection.keeper.session, SshSession)
    return connection.keeper.session


def is_due(connection: SshConnection) -> None:
    """The time for a new login has come."""
    session(connection).due_mono = -math.inf


@pytest.fixture
def server() -> Iterator[Sshd]:
    with Sshd() as server:
        yield server


pytestmark = [OPENSSH, POSIX]


# --- how many logins ------------------------------------------------------------


def test_polls_share_a_login(server: Sshd) -> None:
    watched = on(server)
    with keeping(watched) as connection:
        for number in range(5):
            assert healthy(poll(watched, connection))
            assert connection.keeper.reused is (number > 0)
        assert connection.record.outcomes == {"accepted": 1} and connection.record.last_day == 1
    assert logins(server) == 1


def test_polls_over_a_login_add_nothing_up(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither channels nor names of files: Python's table of names grows once, by megabytes, where they come and go."""
    watched, names = on(server, key_file=server.user_key()), list[str]()
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection))
        monkeypatch.setattr(sys, "intern", lambda name: names.append(name) or name)
        for _ in range(3):
            assert healthy(poll(watched, connection)) and connection.keeper.reused
        seen = cast(Any, session(connection)._transport).channels_seen
        assert not names and not [*seen] and [number in seen for number in range(5)] == [True] * 4 + [False]
    assert logins(server) == 1


@pytest.mark.parametrize("settings", [{"keep": False}, {"interval": 301}])
def test_each_poll_logs_in(server: Sshd, settings: dict[str, Any]) -> None:
    watched = on(server, **settings)
    with keeping(watched) as connection:
        for _ in range(3):
            assert healthy(poll(watched, connection))
            assert connection.keeper.session is None
    assert logins(server) == 3


def test_what_is_only_tried_is_not_kept(server: Sshd) -> None:
    watched, context = on(server), access()
    connection = CONNECTIONS[watched.settings.platform](watched, context.guard_of(watched), context)
    with no_leaks():
        assert healthy(poll(watched, connection)) and healthy(poll(watched, connection))
    assert logins(server) == 2


def test_a_new_login_comes_before_the_end_of_the_old_one(server: Sshd) -> None:
    watched = on(server)
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection))
        old = session(connection)
        is_due(connection)
        assert healthy(poll(watched, connection))
        assert session(connection) is not old and not old.alive
        assert connection.second_try == ""
        assert healthy(poll(watched, connection))
    assert logins(server) == 2


def test_when_it_is_due(server: Sshd) -> None:
    """Spread over half to all of `relogin`; what is open ends after twice the time; 0 is never."""
    for relogin in (RELOGIN, 0.0):
        watched, rests = on(server, relogin=relogin), list[float]()
        with keeping(watched) as connection:
            for _ in range(8):      # none of the last tenth: once in a hundred million times
                assert healthy(poll(watched, connection))
                opened_mono = connection.keeper.opened_mono
                rests.append(session(connection).due_mono - opened_mono)
                lasts = session(connection).ends_mono - opened_mono
                assert lasts == pytest.approx(2 * relogin or math.inf)
                is_due(connection)
        if relogin:
            assert 0.499 * relogin < min(rests) < 0.95 * relogin and max(rests) < 1.001 * relogin
            assert len(set(rests)) == 8
        else:
            assert set(rests) == {math.inf}


@pytest.mark.long
def test_the_cap_of_bytes_is_for_each_poll(server: Sshd) -> None:
    loud = {"name": "loud", "command": "head -c 700000 /dev/zero | tr '\\0' x"}
    watched = on(server, checks=[loud])
    with keeping(watched) as connection:
        for _ in range(4):
            assert healthy(poll(watched, connection))
        assert cast(Any, session(connection)._transport.sock).received < 2 << 20
    assert logins(server) == 1


# --- a login that is refused while the old one lives ------------------------------


def test_the_old_one_that_ends_meanwhile_serves_no_more(server: Sshd) -> None:
    """What the new login ran into is the answer, and nothing is asked over what is dead."""
    watched = on(server)
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection))
        old = session(connection)
        is_due(connection)

        def fails(_deadline: Deadline) -> NoReturn:
            send(server._sessions(), "SIGKILL")
            wait_for(lambda: not old.alive)
            raise ProbeError("unreachable", "connection refused")

        with pytest.raises(ProbeError, match="connection refused"):
            connection.keeper.get(fails, Deadline(AMPLE))
        assert logins(server) == 1


def test_a_key_that_is_taken_away(server: Sshd) -> None:
    """It is noticed at the next login; the first refusal is confirmed before it counts."""
    watched = target(server, key_file=server.user_key(), timeout=AMPLE)
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection))
        server._authorized.write_text("", encoding="ascii")
        assert healthy(poll(watched, connection))
        is_due(connection)
        assert healthy(poll(watched, connection))
        assert "refused" in connection.keeper.complaint
        answer = poll(watched, connection)
        assert answer.cause == "auth"
        assert connection.keeper.session is None
        assert poll(watched, connection).cause == "auth"
        assert connection.record.outcomes["refused"] == 3


def test_a_poll_over_what_is_open_is_no_login(server: Sshd, password: str) -> None:
    """While others are refused it goes on, says nothing of the credential, and ends after twice the time."""
    watched = target(server, password=server.password, timeout=AMPLE)
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection))
        guard = connection._guard
        for other in ("one", "two", "three"):
            guard.refuse(other)
        assert guard.wait(watched.name) > 0
        is_due(connection)
        for _ in range(3):
            assert healthy(poll(watched, connection))
        assert guard.refusals == 3 and logins(server) == 1
        session(connection).ends_mono = -math.inf
        answer = poll(watched, connection)
        assert answer.reason.startswith("not tried: ")
        assert logins(server) == 1


@pytest.mark.long
def test_a_new_login_into_silence_leaves_the_old_one_time(server: Sshd) -> None:
    """The first; the one that confirms it has all of the time, and counts."""
    watched = on(server, timeout=8)
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection))
        old = session(connection)
        is_due(connection)
        send({server._listener.pid}, "SIGSTOP")
        assert healthy(poll(watched, connection))
        assert session(connection) is old and connection.second_try == ""
        assert connection.keeper.complaint.startswith("no answer within")
        answer = poll(replace(watched, settings=watched.settings.model_copy(update={"timeout": 2.0})), connection)
        assert (answer.cause, answer.reason) == ("timeout", "no answer within 2 s")
        assert connection.keeper.session is None
        server.thaw()
        assert healthy(poll(watched, connection))
    assert logins(server) == 2


# --- what it was made from ----------------------------------------------------------


def test_a_revoked_host_key(server: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(server.known_hosts(), encoding="ascii")
    watched = on(server)
    with keeping(watched, access(known)) as connection:
        assert healthy(poll(watched, connection))
        known.write_text(f"{server.known_hosts()}\n# a line about nothing\n", encoding="ascii")
        assert healthy(poll(watched, connection))
        assert logins(server) == 1
        known.write_text(f"@revoked {server.known_hosts()}", encoding="ascii")
        answer = poll(watched, connection)
        assert answer.cause == "host_key" and "revoked" in answer.reason
        assert connection.keeper.session is None


def test_another_key_file(server: Sshd, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(server.user_key().read_bytes())
    watched = target(server, key_file=key, timeout=AMPLE)
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection)) and healthy(poll(watched, connection))
        key.write_bytes(server.user_key("ecdsa").read_bytes())
        assert healthy(poll(watched, connection))
        assert logins(server) == 2
        key.unlink()
        assert poll(watched, connection).cause == "credential"
        assert connection.keeper.session is None


def test_a_certificate_that_is_renewed(server: Sshd, tmp_path: Path) -> None:
    """It is shown at once, as long as the one before it still is good."""
    certify = certified_key(tmp_path, server)
    with settings_digest(server, f"TrustedUserCAKeys {server.folder}/authorities"):
        watched = target(server, key_file=tmp_path / "key", timeout=AMPLE)
        with keeping(watched) as connection:
            for identity in ("first", "second"):
                certify(identity, "-1h:+1h")
                assert healthy(poll(watched, connection)) and healthy(poll(watched, connection))
                assert connection.second_try == "" and f"ID {identity}" in server.log()
        assert logins(server) == 2


def test_a_host_that_moves(server: Sshd) -> None:
    """A look-up that fails or is late changes nothing."""

    class Names(Resolver):
        def __init__(self) -> None:
            super().__init__()
            self.answers: list[Any] = []

        def resolve(self, host: str, port: int, deadline: Deadline) -> list[Any]:
            return self.answers or super().resolve("no-such-name.invalid", port, deadline)

        def _ask(self, *asked: Any) -> list[Any]:
            late.wait()
            return super()._ask(*asked)

    names, late = Names(), threading.Event()
    watched = on(server, hostname="db.example.com")
    names.answers = socket.getaddrinfo(server.address, server.port, type=socket.SOCK_STREAM)
    with keeping(watched, access(resolver=names)) as connection:
        assert healthy(poll(watched, connection))
        names.answers = []
        assert healthy(poll(watched, connection))
        late.set()
        assert healthy(poll(watched, connection))
        assert logins(server) == 1
        elsewhere = socket.getaddrinfo("127.0.0.2", server.port, type=socket.SOCK_STREAM)
        names.answers = elsewhere
        assert poll(watched, connection).cause == "unreachable"     # nobody is there
        assert connection.second_try == "" and connection.keeper.session is None


class Forward(ParamikoSshd):
    """Does of itself what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.transports: list[paramiko.Transport] = []

    def prepare(self, transport: paramiko.Transport) -> None:
        self.transports.append(transport)


def test_what_nobody_asked_for_between_polls() -> None:
    with Forward() as server:
        watched = on(server)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection)) and healthy(poll(watched, connection))
            assert logins(server) == 1
            with contextlib.suppress(paramiko.ChannelException):
                server.transports[0].open_channel("session", timeout=AMPLE)
            assert session(connection).stale
            assert healthy(poll(watched, connection))
            assert connection.second_try == ""
            assert logins(server) == 2


@pytest.mark.parametrize("what", ["keys", "nothing"])
def test_a_host_that_keeps_us_busy_between_polls(what: str) -> None:
    """With keys that are exchanged again and again, or with packets that say nothing."""
    with Forward() as server:
        watched = on(server)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection))
            host, end = server.transports[0], time.monotonic() + AMPLE
            with contextlib.suppress(paramiko.SSHException, OSError, EOFError):
                while session(connection).alive and time.monotonic() < end:     # a slow machine sends less in a second
                    host.renegotiate_keys() if what == "keys" else host.send_ignore(8)
            wait_for(lambda: not session(connection).alive, 20)
            assert healthy(poll(watched, connection))
            assert logins(server) == 2


@pytest.mark.long
def test_a_host_that_is_stopped_while_keys_are_exchanged_anew() -> None:
    """Nothing can be sent meanwhile: it is silent, too."""
    transports: list[Any] = []

    class Forward(ParamikoSshd):
        def prepare(self, transport: paramiko.Transport) -> None:
            transports.append(transport)

    with Forward() as server:
        watched = on(server, timeout=9)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection))
            transport = cast(Any, session(connection)._transport)
            go_on = threading.Event()
            transports[0]._handler_table[20] = lambda _: go_on.wait()       # the answer of the client
            transports[0]._send_kex_init()
            wait_for(lambda: not transport.clear_to_send.is_set())
            assert healthy(poll(watched, connection))
            assert "no sign of life" in connection.second_try
            go_on.set()
        assert logins(server) == 2


@pytest.mark.long
def test_the_last_word_of_a_host_is_no_sign_of_life_for_ever() -> None:
    """What was on its way when it died comes when the next poll has begun."""
    transports, go_on = list[Any](), threading.Event()

    class Forward(ParamikoSshd):
        def prepare(self, transport: paramiko.Transport) -> None:
            transports.append(transport)

    def die(_: object) -> None:
        transports[0].send_ignore(8)
        go_on.wait()

    with Forward() as server:
        watched = on(server, timeout=12)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection))
            transports[0]._handler_table[90] = die      # where a channel is asked for
            assert healthy(poll(watched, connection))
            assert "no sign of life" in connection.second_try
            go_on.set()
        assert logins(server) == 2


# --- what breaks ----------------------------------------------------------------------


def test_killed_between_polls(server: Sshd) -> None:
    """Three in a row, and each poll opens anew, for a day."""
    watched = on(server)
    with keeping(watched) as connection:
        for number in range(3):
            assert healthy(poll(watched, connection))
            assert connection.keeps, number
            server.kill_sessions()
            wait_for(lambda: not session(connection).alive)
        for _ in range(2):
            assert healthy(poll(watched, connection))
            assert connection.found_dead and connection.keeper.session is None
        connection._fresh_until_mono -= connection.FRESH
        for number in range(2):
            assert healthy(poll(watched, connection))
            assert connection.keeper.reused is (number > 0)
    assert logins(server) == 6


def test_killed_during_three_polls_in_a_row(server: Sshd) -> None:
    """Each of them begins again, and then each opens anew."""
    runs = counter(server)
    dying = f"echo x >> {runs}; case $(wc -l < {runs}) in 2|4|7|9|11) {SUICIDE};; esac"
    watched = on(server, checks=[{"name": "dying", "command": dying, "timeout": AMPLE}], timeout=100)
    with keeping(watched) as connection:
        for tries, found_dead in ((0, False), (1, False), (2, False), (2, False), (3, False), (4, False), (5, True)):
            assert healthy(poll(watched, connection))
            assert (connection.record.second_tries, connection.found_dead) == (tries, found_dead)
        assert connection.keeper.session is None
    assert logins(server) == 6


# Of the session's sshd, by a check.
SUICIDE = f"p=$$; until ps -o comm= -p $p | grep -q sshd; do p=$(ps -o ppid= -p $p); done; kill -9 $p; sleep {AMPLE}"


def counter(server: Sshd) -> Path:
    """A file to which checks add a line."""
    runs = server.folder / "runs"
    runs.touch()
    runs.chmod(0o666)
    return runs


def third(path: Path) -> dict[str, str]:
    """A check that takes long when it runs for the second time."""
    command = f"echo x >> {path}; [ $(wc -l < {path}) != 2 ] || exec sleep 60"
    return {"name": "slow", "command": command, "timeout": "100"}


def test_killed_during_a_poll(server: Sshd, tmp_path: Path) -> None:
    """It begins again, within the same deadline; the next poll does not say so any more."""
    runs = counter(server)
    watched = on(server, checks=[third(runs)], timeout=100)
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection))
        answers: list[Answer] = []
        polling = threading.Thread(target=lambda: answers.append(poll(watched, connection)))
        polling.start()
        wait_for(lambda: runs.read_text(encoding="ascii").count("x") == 2)
        send(server._sessions(), "SIGKILL")
        polling.join()
        assert healthy(answers[0])
        assert "connection lost" in connection.second_try
        assert connection.record.second_tries == 1
        assert healthy(poll(watched, connection))
        assert connection.second_try == ""
    assert logins(server) == 2


def test_a_new_connection_that_breaks_is_not_tried_again(server: Sshd) -> None:
    watched = on(server, checks=[{"name": "end", "command": SUICIDE, "timeout": AMPLE}])
    with keeping(watched) as connection:
        answer = poll(watched, connection)
        assert (answer.cause, answer.reason) == ("unreachable", "connection lost while check end ran")
        assert connection.record.second_tries == 0
    assert logins(server) == 1


ANSWERS = {
    "ended": "echo nobody is here; exit 3",
    "too long": "exec head -c 3000000 /dev/zero",
    "without sense": "echo; /bin/sh -s | grep ' done$'",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_cannot_be_used_is_no_dead_connection(server: Sshd, answer: str) -> None:
    """It would be the same over another one: nothing runs twice."""
    runs, bad, command = counter(server), server.folder / "bad", server.folder / "command"
    command.write_text(f"echo x >> {runs}\n[ -e {bad} ] || exec /bin/sh -s\n{answer}\n", encoding="ascii")
    command.chmod(0o644)
    with settings_digest(server, f"ForceCommand exec /bin/sh {command}"):
        watched = on(server)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection)) and healthy(poll(watched, connection))
            bad.touch()
            assert poll(watched, connection).cause == "protocol"
            assert runs.read_text(encoding="ascii").count("x") == 3
            assert (connection.record.second_tries, connection._deaths) == (0, 0)
            bad.unlink()
            assert healthy(poll(watched, connection))
            assert connection.second_try == ""
        assert logins(server) == 2


def test_another_host_key(server: Sshd) -> None:
    """At once, and it is not learned."""
    watched = on(server)
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection))
        known = connection.host_key
        server.rekey()
        answer = poll(watched, connection)
        assert answer.cause == "host_key" and answer.host_key is None
        assert connection.host_key == known
        assert logins(server) == 0      # in the new log


@pytest.mark.long
@pytest.mark.parametrize("whole", [False, True])
def test_a_host_that_is_stopped(server: Sshd, whole: bool) -> None:
    """A silent death takes a third of the deadline; where only the session is stopped, a new one has the rest."""
    watched = on(server, timeout=3 if whole else 12)
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection))
        if whole:
            server.freeze()
        else:
            send(server._sessions(), "SIGSTOP")
        answer = poll(watched, connection)
        if whole:
            assert answer.cause == "timeout"
        else:
            assert healthy(answer) and answer.seconds >= 4
            assert "no sign of life" in connection.second_try
        server.thaw()


@pytest.mark.long
def test_a_silent_check_runs_once(server: Sshd) -> None:
    """After the first sign of life only the deadline counts."""
    runs, timeout = counter(server), 12
    command = f"echo x >> {runs}; [ $(wc -l < {runs}) = 1 ] || exec sleep {0.8 * timeout}"
    watched = on(server, timeout=timeout, checks=[{"name": "silent", "command": command, "timeout": timeout}])
    with keeping(watched) as connection:
        assert healthy(poll(watched, connection)) and healthy(poll(watched, connection))
        assert connection.second_try == ""
    assert runs.read_text(encoding="ascii").count("x") == 2
    assert logins(server) == 1


class Proxy(Listener):
    """Hands bytes on, until it shall do something else to a connection."""

    def __init__(self, server: Sshd) -> None:
        super().__init__()
        self.server, self.open = server, list[tuple[socket.socket, socket.socket]]()
        self.log, self.username = server.log, server.username
        self.password, self.user_key = server.password, server.user_key
        self.silenced, self.delay = set[socket.socket](), 0.0

    def serve(self, connection: Accepted) -> None:
        with socket.create_connection((self.server.address, self.server.port)) as host:
            self.open.append((connection, host))
            there = threading.Thread(target=self._pump, args=(connection, host), daemon=True)
            there.start()
            self._pump(host, connection)
            there.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                self.closing.wait(self.delay)
                if source not in self.silenced:
                    sink.sendall(chunk)
        with contextlib.suppress(OSError):  # also after a reset: whoever leaves with something unread sends one
            sink.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """RST to both."""
        for sock in [sock for pair in self.open for sock in pair]:   # without those that are opened because of it
            with contextlib.suppress(OSError):  # it has ended
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.shutdown(socket.SHUT_RD)
                sock.close()

    def silent(self) -> None:
        """What is sent through a connection that is open now is lost."""
        self.silenced |= {sock for pair in self.open for sock in pair}

    def half_close(self) -> None:
        """The host says no more, and reads on."""
        for client, _ in list(self.open):
            with contextlib.suppress(OSError):  # it has ended
                client.shutdown(socket.SHUT_WR)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["reset", "half_close", "silent"])
def test_what_stands_between(server: Sshd, fault: str) -> None:
    with Proxy(server) as proxy:
        watched = on(proxy, timeout=24 if fault == "silent" else AMPLE)     # a third of it is waited
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection)) and healthy(poll(watched, connection))
            getattr(proxy, fault)()
            assert healthy(poll(watched, connection))
            assert healthy(poll(watched, connection))
            assert connection.keeper.reused
    assert logins(server) == 2


@pytest.mark.long
@pytest.mark.parametrize("fault", ["reset", "half_close", "silent", "stop"])
def test_what_happens_during_a_poll(server: Sshd, fault: str) -> None:
    """What is seen to have ended begins again; in silence only the deadline counts."""
    runs, ends = counter(server), fault in ("reset", "half_close")
    with Proxy(server) as proxy:
        watched = on(proxy, checks=[third(runs)], timeout=100)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection))
            settings = watched.settings.model_copy(update={"timeout": 100.0 if ends else 6.0})
            answers: list[Answer] = []
            polling = threading.Thread(
                target=lambda: answers.append(poll(replace(watched, settings=settings), connection)))
            polling.start()
            wait_for(lambda: runs.read_text(encoding="ascii").count("x") == 2)
            if fault == "stop":
                send(server._sessions(), "SIGSTOP")
            else:
                getattr(proxy, fault)()
            polling.join()
            if ends:
                assert healthy(answers[0])
                assert "connection lost" in connection.second_try
            else:
                assert answers[0].reason.startswith("no end within 6 s")
                assert connection.keeper.session is None
                server.thaw()
            assert healthy(poll(watched, connection))
            assert connection.record.second_tries == ends
    assert logins(server) == 2


@pytest.mark.long
def test_a_slow_way_to_the_host(server: Sshd) -> None:
    """Slower than before is not dead."""
    with Proxy(server) as proxy:
        watched = on(proxy)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection))
            proxy.delay = 0.3
            answer = poll(watched, connection)
            assert healthy(answer) and answer.seconds > 2 * proxy.delay
            assert connection.second_try == "" and connection.keeper.reused
    assert logins(server) == 1


@pytest.mark.long
def test_a_host_that_hears_nothing_hangs_up(server: Sshd) -> None:
    """ClientAliveCountMax: what it has ended by the next poll is no second try."""
    with settings_digest(server, "ClientAliveInterval 1\nClientAliveCountMax 1"), Proxy(server) as proxy:
        watched = on(proxy)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection))
            proxy.silent()
            wait_for(lambda: not session(connection).alive)
            assert healthy(poll(watched, connection))
            assert connection.record.second_tries == 0
        assert "Timeout, client not responding" in server.log()
        assert logins(server) == 2


def test_a_host_that_takes_no_more_connections(server: Sshd) -> None:
    """MaxStartups: what is open serves on when a login is due; the second refusal in a row counts."""
    with settings_digest(server, "MaxStartups 1"):
        watched = on(server)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection))
            with socket.create_connection((server.address, server.port)) as stranger:
                assert stranger.recv(4) == b"SSH-"
                for _ in range(2):
                    assert healthy(poll(watched, connection))
                is_due(connection)
                assert healthy(poll(watched, connection))
                assert "Exceeded MaxStartups" in connection.keeper.complaint and connection.second_try == ""
                answer = poll(watched, connection)
                assert answer.cause == "unreachable" and "Exceeded MaxStartups" in answer.reason
            wait_for(lambda: not server._sessions())
            assert healthy(poll(watched, connection)) and healthy(poll(watched, connection))
        assert logins(server) == 2


@pytest.mark.long
def test_questions_of_the_host_between_polls(server: Sshd) -> None:
    """ClientAliveInterval: it is answered, and nothing unexpected."""
    with settings_digest(server, "ClientAliveInterval 1\nClientAliveCountMax 1"):
        watched = on(server)
        with keeping(watched) as connection:
            assert healthy(poll(watched, connection))
            wire = cast(Any, session(connection)._transport.sock)
            for _ in range(3):
                before = wire.received
                wait_for(lambda: wire.received > before)    # noqa: B023  # used before it changes
            assert healthy(poll(watched, connection))
            assert connection.keeper.reused
        assert logins(server) == 1


def test_one_session_at_a_time(server: Sshd) -> None:
    with settings_digest(server, "MaxSessions 1"):
        watched = on(server)
        with keeping(watched) as connection:
            ended = server.log().count("Close session")
            assert healthy(poll(watched, connection))
            for number in range(1, 4):  # its processes end before the server has done with a session
                wait_for(lambda: server.log().count("Close session") == ended + number)    # noqa: B023
                assert healthy(poll(watched, connection))
            assert connection.record.second_tries == 0
        assert logins(server) == 1


def test_a_session_that_is_refused_is_opened_anew(server: Sshd) -> None:
    """A command that was left behind takes the one place."""
    with settings_digest(server, "MaxSessions 1"):
        watched = on(server)
        with keeping(watched) as connection:
            ended = server.log().count("Close session")
            assert healthy(poll(watched, connection))
            transport = session(connection)._transport
            wait_for(lambda: server.log().count("Close session") > ended)
            left = transport.open_session(timeout=AMPLE)
            left.exec_command("sleep 100")
            session(connection)._transport.packetizer.uninvited = False
            assert healthy(poll(watched, connection))
            assert "MaxSessions" in connection.second_try
        assert logins(server) == 2


# --- bastions -----------------------------------------------------------------------


@contextlib.contextmanager
def behind(
    bastion: Sshd, *servers: Sshd, known: Path, jump: str = "b", by_key: bool = False
) -> Iterator[list[tuple[Target, SshConnection]]]:
    """Resources behind a bastion, which is one, too; the first is the bastion's own. Those after `h0` are behind
    `jump`."""
    known.write_text("".join(server.known_hosts() for server in (bastion, *servers)), encoding="ascii")
    context = ConnectionContext(KnownHosts(known), Resolver(), keeps=True)
    with no_leaks(), contextlib.ExitStack() as stack:
        keys = [{"password": None, "key_file": one.user_key()} if by_key else {} for one in (bastion, *servers)]
        targets = [on(bastion, name="b", relogin=RELOGIN, **keys[0]), *(
            on(server, name=f"h{number}", proxy_jump=jump if number else "b", timeout=9, relogin=RELOGIN, **key)
            for number, (server, key) in enumerate(zip(servers, keys[1:], strict=True)))]
        yield [(one, stack.enter_context(keeping(one, context, leaves_nothing=False))) for one in targets]


@pytest.mark.long
def test_those_behind_a_bastion_share_its_login(tmp_path: Path) -> None:
    """One that hangs ends its own channel; a dead bastion is logged in to once for all."""
    with Sshd() as bastion, Sshd() as one, Sshd() as two, behind(bastion, one, two, one, known=tmp_path / "k") as hosts:
        for _ in range(2):
            for watched, connection in hosts[1:]:
                assert healthy(poll(watched, connection))
        assert (logins(bastion), logins(one), logins(two)) == (1, 2, 1)
        assert healthy(poll(*hosts[0]))     # over its own
        assert logins(bastion) == 2
        two.freeze()
        assert poll(*hosts[2]).cause == "timeout"
        two.thaw()
        for watched, connection in hosts:
            assert healthy(poll(watched, connection))
        assert logins(bastion) == 2
        bastion.kill_sessions()
        answers: list[Answer] = []
        polling = [threading.Thread(target=lambda pair=pair: answers.append(poll(*pair))) for pair in hosts[1:]]
        for thread in polling:
            thread.start()
        for thread in polling:
            thread.join()
        assert all(map(healthy, answers)) and len(answers) == 3
        assert logins(bastion) == 3


class Forwarder(Login):
    """Opens every way."""

    def check_channel_direct_tcpip_request(self, chanid: int, origin: Any, destination: Any) -> int:
        cast(Any, self.server).hosts[chanid] = socket.create_connection(destination)
        return common.OPEN_SUCCEEDED


class Bastion(ParamikoSshd):
    login = Forwarder

    def __init__(self) -> None:
        super().__init__()
        self.hosts, self.channels = dict[int, socket.socket](), list[Any]()

    def prepare(self, transport: paramiko.Transport) -> None:
        threading.Thread(target=self._forward, args=(transport,), daemon=True).start()

    def _forward(self, transport: paramiko.Transport) -> None:
        wait_for(lambda: transport.ident is not None)   # it has begun, and perhaps ended already
        while transport.is_alive():
            if channel := transport.accept(0.1):
                self.channels.append(channel)
                host = self.hosts.pop(channel.chanid)
                threading.Thread(target=self._pump, args=(host, channel.recv, host.sendall), daemon=True).start()
                threading.Thread(target=self._pump, args=(host, host.recv, channel.sendall), daemon=True).start()

    def _pump(self, host: socket.socket, read: Any, write: Any) -> None:
        with host, contextlib.suppress(OSError):
            while chunk := read(32768):
                write(chunk)
            host.shutdown(socket.SHUT_RDWR)     # wakes the other one


def test_what_nobody_reads_of_a_bastion_ends_it(server: Sshd, tmp_path: Path) -> None:
    """It would lie in the memory: what stands beside a connection's bytes, also once that is closed."""
    aside = paramiko.Message()
    with Bastion() as bastion, behind(cast(Any, bastion), server, known=tmp_path / "known") as hosts:
        assert healthy(poll(*hosts[1]))
        transport = bastion.channels[0].get_transport()
        aside.add_byte(b"\x5f")     # SSH_MSG_CHANNEL_EXTENDED_DATA
        aside.add_int(bastion.channels[0].remote_chanid)
        aside.add_int(1)
        aside.add_string(b"x" * 30_000)
        with contextlib.suppress(OSError, EOFError):
            for _ in range(400):    # 12 MB: 4, and three times the 2 that the host may be taken to have sent
                transport._send_message(aside)
        wait_for(lambda: not transport.is_active(), 20)
        assert healthy(poll(*hosts[1]))
        assert (logins(bastion), logins(server)) == (2, 2)


def test_a_host_that_fails_ends_no_login_of_its_bastion(tmp_path: Path) -> None:
    """Whether it takes no login, or does not listen."""
    known, wrong = tmp_path / "known_hosts", tmp_path / "wrong"
    write_private(wrong, make_key("ed25519"))
    with Sshd() as bastion, Sshd() as one, Sshd() as two, behind(bastion, one, one, two, known=known) as hosts:
        for host in hosts[1:]:
            assert healthy(poll(*host))
        hosts[2][1]._settings = hosts[2][0].settings.model_copy(update={"password": None, "key_file": wrong})
        assert poll(*hosts[2]).cause == "auth"
        two.stop()
        assert "it refuses a connection to" in poll(*hosts[3]).reason
        assert healthy(poll(*hosts[1])) and hosts[1][1].keeper.reused
        assert (logins(bastion), logins(one)) == (1, 2)


@pytest.mark.long
def test_a_bastion_too_slow_for_one_is_not_for_the_others(tmp_path: Path) -> None:
    """Who has more time tries it, too."""
    with Sshd() as bastion, Sshd() as one, behind(bastion, one, one, known=tmp_path / "k") as hosts:
        answers: list[Answer] = []

        def begin(host: tuple[Target, SshConnection], timeout: float) -> threading.Thread:
            settings = host[0].settings.model_copy(update={"timeout": timeout})
            watched = replace(host[0], settings=settings)
            thread = threading.Thread(target=lambda: answers.append(poll(watched, host[1])))
            thread.start()
            return thread

        bastion.freeze()
        first = begin(hosts[1], 3.0)
        wait_for(lambda: hosts[0][1]._turn.locked() or answers)
        second = begin(hosts[2], 60.0)
        first.join()
        bastion.thaw()
        second.join()
        assert answers[0].cause == "timeout"
        assert healthy(answers[1])


def test_a_session_of_a_bastion_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    """Nor asked again and again, with everybody behind it waiting: who comes just then logs in anew."""
    with Sshd() as bastion, Sshd() as one, behind(bastion, one, one, known=tmp_path / "k") as hosts:
        assert healthy(poll(*hosts[1]))
        ending, go_on = threading.Event(), threading.Event()
        stack = cast(Any, hosts[0][1]._relay.session)._stack
        stack.callback(go_on.wait)
        stack.callback(ending.set)  # the first that is called
        too_late = threading.Timer(20, go_on.set)
        threads = [threading.Thread(target=hosts[1][1].close), too_late]
        for thread in threads:
            thread.start()
        try:
            ending.wait()
            assert healthy(poll(*hosts[2]))
            assert not go_on.is_set() and logins(bastion) == 2
        finally:
            too_late.cancel()
            go_on.set()
            for thread in threads:
                thread.join()


@pytest.mark.long
def test_a_bastion_that_is_stopped(tmp_path: Path) -> None:
    """Its session: whoever opens a channel finds out, and logs in anew for all."""
    with Sshd() as bastion, Sshd() as one, behind(bastion, one, known=tmp_path / "k") as hosts:
        assert healthy(poll(*hosts[1]))
        send(bastion._sessions(), "SIGSTOP")
        answer = poll(*hosts[1])
        assert healthy(answer)
        assert "no sign of life" in hosts[1][1].second_try
        assert logins(bastion) == 2
        bastion.thaw()


@pytest.mark.long
@pytest.mark.parametrize("jump", ["b", "h0"])
def test_a_bastion_that_takes_nothing(tmp_path: Path, jump: str) -> None:
    """Nor says anything: a poll that waits until another one could send ends in time, and each begins again; also where
    there is another bastion between."""
    known = tmp_path / "known_hosts"
    with Sshd() as bastion, Sshd() as one, behind(bastion, *[one] * 4, known=known, jump=jump) as hosts:
        for host in hosts[2:]:
            assert healthy(poll(*host))
        send(bastion._sessions(), "SIGSTOP")
        sock = cast(Any, hosts[0][1]._relay.session)._transport.sock
        sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                socket.socket.send(sock, bytes(1 << 20))
        answers: dict[float, Answer] = {}

        def ask(host: tuple[Target, SshConnection], timeout: float) -> None:
            settings = host[0].settings.model_copy(update={"timeout": timeout})
            answers[timeout] = poll(replace(host[0], settings=settings), host[1])

        polling = [threading.Thread(target=ask, args=how) for how in zip(hosts[2:], (90, 60, 9), strict=True)]
        for thread in polling:
            thread.start()
        for thread in polling:
            thread.join()
        assert all(map(healthy, answers.values())), answers
        assert max(answer.seconds for answer in answers.values()) < 20, answers
        assert logins(bastion) == 2


def test_a_bastion_that_dies_while_a_channel_is_opened(tmp_path: Path) -> None:
    """For a host that is new behind it, and has nothing of its own that was open before."""
    with Sshd() as bastion, Sshd() as one, behind(bastion, one, one, known=tmp_path / "k") as hosts:
        assert healthy(poll(*hosts[1]))
        send(sessions := bastion._sessions(), "SIGSTOP")
        transport = cast(Any, hosts[0][1]._relay.session)._transport
        settings = hosts[2][0].settings.model_copy(update={"timeout": AMPLE})
        answers: list[Answer] = []
        polling = threading.Thread(
            target=lambda: answers.append(poll(replace(hosts[2][0], settings=settings), hosts[2][1])))
        polling.start()
        wait_for(lambda: len(transport._channels) == 2)
        send(sessions, "SIGKILL")
        polling.join()
        assert healthy(answers[0])
        assert logins(bastion) == 2


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """By how many seconds all that keeps sessions is ahead."""
    shift = [0.0]
    monkeypatch.setattr(SessionKeeper, "clock", staticmethod(lambda: time.monotonic() + shift[0]))
    return shift


@pytest.mark.parametrize("behind_it", [0, 1, 2])
def test_a_key_that_a_bastion_takes_away(tmp_path: Path, later: list[float], behind_it: int) -> None:
    """It is noticed within `relogin` of the bastion's login, however new those of the hosts behind are: by its own poll
    after a first refusal, and by others after one more for each login on the way."""
    with Sshd() as bastion, Sshd() as one, behind(
            bastion, one, one, known=tmp_path / "k", jump="h0", by_key=True) as hosts:
        watched, connection = hosts[behind_it]
        assert healthy(poll(watched, connection))
        later[0] = 0.49 * RELOGIN
        if behind_it:
            is_due(connection)
            assert healthy(poll(watched, connection)) and logins(one) == 1 + behind_it
        bastion._authorized.write_text("", encoding="ascii")
        assert healthy(poll(watched, connection)) and connection.keeper.reused
        later[0] = RELOGIN
        answers = [poll(watched, connection) for _ in range(2 + behind_it)]
        assert answers[-1].cause == ("unreachable" if behind_it else "auth"), answers
        assert "refused" in answers[-1].reason and all(map(healthy, answers[:-1]))


@pytest.mark.long
def test_a_bastions_new_login_is_one_for_all_behind_it(tmp_path: Path, later: list[float]) -> None:
    """And each of them has one over it, after which it rests."""
    with Sshd() as bastion, Sshd() as one, behind(
            bastion, one, one, known=tmp_path / "k", by_key=True) as hosts:
        for host in hosts[1:]:
            assert healthy(poll(*host))
        for number in (1, 2, 3):
            for host in hosts[1:] * 2:
                assert healthy(poll(*host)) and not host[1].second_try
            assert (logins(bastion), logins(one)) == (number, 2 * number)
            later[0] += RELOGIN


def test_while_a_bastion_waits_those_behind_it_go_on(tmp_path: Path, later: list[float]) -> None:
    """Without a login for each poll, until twice the time is over; one that is new gets through, too."""
    with Sshd() as bastion, Sshd() as one, behind(
            bastion, one, one, known=tmp_path / "k", by_key=True) as hosts:
        guard = hosts[0][1]._guard = LoginGuard()
        assert healthy(poll(*hosts[1]))
        for other in ("one", "two", "three"):
            guard.refuse(other)
        later[0] = RELOGIN
        for host in hosts[1:] * 3:
            assert healthy(poll(*host)), host
        assert (logins(bastion), logins(one)) == (1, 2)
        later[0] = 2 * RELOGIN + 60
        for host in hosts[1:]:
            answer = poll(*host)
            assert answer.cause == "unreachable" and answer.reason.startswith("not tried: bastion b: "), answer
        assert (logins(bastion), logins(one)) == (1, 2)


def test_what_a_bastion_refuses_is_the_bastions(tmp_path: Path) -> None:
    with Sshd() as bastion, Sshd() as one, behind(bastion, one, one, known=tmp_path / "k") as hosts:
        bad, connection = hosts[0]
        wrong = make_key("ed25519")
        write_private(tmp_path / "wrong", wrong)
        assert public_line(wrong)
        connection._settings = bad.settings.model_copy(update={"key_file": tmp_path / "wrong", "password": None})
        for watched, behind_it in hosts[1:]:
            answer = poll(watched, behind_it)
            assert answer.cause == "unreachable", answer
            assert re.match("bastion b: login as|not tried: bastion b: ", answer.reason), answer
            assert not behind_it.record.outcomes


# --- in the console -------------------------------------------------------------------


@pytest.mark.long
def test_each_change_of_a_resource_logs_in_anew(server: Sshd, tmp_path: Path) -> None:
    """And nothing of one that was removed stays open."""
    if not server.password:
        pytest.skip(NO_PASSWORD_LOGIN)
    row = {"name": "host", "hostname": server.address, "port": server.port, "username": server.username,
           "password": server.password, "platform": "linux", "timeout": 30}  # fmt: skip
    with local_console(tmp_path, keeps=True) as local:
        local.log_in_as(NAME, "token")
        assert local.api("POST", "resources", row).status == 201
        for number in (1, 2):
            wait_for(lambda: logins(server) == number)  # noqa: B023  # used before it changes
            checked = local.api("POST", "resources/host/check").json
            assert (checked["state"], checked["kept"], logins(server)) == ("healthy", True, number)
            assert local.api("PATCH", "resources/host", {"interval": 60 + number}).status == 200
        wait_for(lambda: logins(server) == 3)
        assert local.api("DELETE", "resources/host").status == 204
        wait_for(lambda: not server._sessions())
        assert logins(server) == 3


@pytest.mark.long
def test_what_is_shown(server: Sshd, tmp_path: Path) -> None:
    """A poll by hand uses what is open and says so; what somebody tries logs in; at the end nothing is left."""
    row = (f"  - {{name: host, hostname: {server.address}, port: {server.port}, username: {server.username}, "
           f"key_file: {server.user_key()}, interval: 60, timeout: 30}}")  # fmt: skip
    begun_at = time.time()
    with local_console(tmp_path, row, keeps=True) as local:
        local.log_in_as(NAME, "token")

        def shown() -> Any:
            return local.api("GET", "resources/host").json

        assert local.api("POST", "resources/host/check").json["state"] == "healthy"
        checked = local.api("POST", "resources/host/check").json
        assert (checked["state"], checked["kept"]) == ("healthy", True)
        assert shown()["connection"] == {
            "opened": shown()["connection"]["opened"], "kept": True, "logins": 1, "second_try": "", "complaint": "",
            "found_dead": False}  # fmt: skip
        opened_at = datetime.datetime.fromisoformat(shown()["connection"]["opened"]).timestamp()
        assert begun_at <= opened_at <= time.time()
        page = local.ask("GET", "/-/resources/host").body
        assert "1 login in 24 h" in page and "connected since <time" in page and ", and so was the last poll" in page
        assert logins(server) == 1
        send(server._sessions(), "SIGSTOP")
        connection = local.context.connections.watched["host"]
        connection._settings = connection._settings.model_copy(update={"timeout": 9})
        assert local.api("POST", "resources/host/check").json["state"] == "healthy"
        assert "no sign of life" in shown()["connection"]["second_try"]
        assert "The last poll began again, for what was open had failed: " in local.ask("GET", "/-/resources/host").body
        assert logins(server) == 2
        assert local.api("POST", "resources/host/trust", {}).status in (200, 204)
        assert logins(server) == 2
        wait_for(lambda: local.api("POST", "resources/host/check").json.get("state") == "healthy")
        before = logins(server)
        if server.password:
            body = {name: getattr(connection._settings, name) for name in ("hostname", "port", "username", "platform")}
            tried = local.api("POST", "test", {**body, "name": "x", "timeout": 30, "password": server.password})
            assert tried.json["state"] == "healthy", tried
            assert logins(server) == before + 1
        found = Metrics(ServingMetrics(local.context.lease, Counters(1)), local.store, None, local.context.connections)
        lines = generate_latest(found).decode()
        assert f'healthchecker_logins_total{{outcome="accepted",resource="host"}} {before}.0' in lines
        assert 'healthchecker_host_connections{kept="true"} 1.0' in lines
        assert "healthchecker_second_tries_total 1.0" in lines
        why = "Three that were open in a row were found dead: for a day each poll opens anew."
        for number in range(1, 4):
            connection = local.context.connections.watched["host"]
            server.kill_sessions()
            wait_for(lambda: not session(connection).alive)     # noqa: B023  # used before it changes
            assert local.api("POST", "resources/host/check").json["state"] == "healthy"
            assert shown()["connection"]["found_dead"] is (number == 3)
            assert (why in local.ask("GET", "/-/resources/host").body) is (number == 3)
        assert shown()["connection"]["opened"] is None
    wait_for(lambda: not server._sessions())


def test_trust_logs_in_anew(server: Sshd, tmp_path: Path) -> None:
    """Nothing is sent to a host with another key; once that is trusted the login is one of the guard's, and counted."""
    row = (f"  - {{name: host, hostname: {server.address}, port: {server.port}, username: {server.username}, "
           f"key_file: {server.user_key()}, interval: 60, timeout: 30}}")  # fmt: skip
    with local_console(tmp_path, row, keeps=True) as local:
        local.log_in_as(NAME, "token")
        connections = local.context.connections

        def is_checked(state: str) -> bool:
            return bool(local.api("POST", "resources/host/check").json.get("state") == state)

        assert is_checked("healthy")
        before, wrong = connections.watched["host"], f"ssh-ed25519 SHA256:{'A' * 43}"
        with local.store.writing() as rows:
            find_resource(rows, "host").host_key = wrong
            revise(rows)
        assert local.context.monitor.catch_up()
        wait_for(lambda: is_checked("unhealthy"))
        assert connections.records["host"].outcomes == {"accepted": 1} and logins(server) == 1
        assert local.api("POST", "resources/host/trust", {}).status == 200
        assert local.context.monitor.catch_up()
        wait_for(lambda: is_checked("healthy"))
        assert connections.watched["host"] is not before and before.keeper.session is None
        assert connections.records["host"].outcomes == {"accepted": 2} and logins(server) == 2
        assert local.api("GET", "resources/host").json["connection"]["logins"] == 2
