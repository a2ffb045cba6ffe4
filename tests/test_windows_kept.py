"""Polls of a Windows host over what the last one left open: a login and a shell, which die apart.

The host is tests/wsman_server.py; the poll is the product's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import no_leaks, wait_for
from test_powershell import ACCESS, PASSWORD, RECORDED, CountingServer, target
from wsman_server import SHELL_LIMIT, Answer, Script, Shell, WSManServer

import healthchecker
from healthchecker import (
    Deadline,
    LoginGuard,
    PowerShellConnection,
    Resolver,
    Sample,
    Verdict,
    WinrmSession,
    poll_once,
)

CLEAN = f"{RECORDED.partition(chr(10))[0]}\n" + json.dumps({"number": 0, "clean": True})


@pytest.fixture(autouse=True)
def _ample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine has time to delete a shell."""
    monkeypatch.setattr(healthchecker, "SHELL_END", 60.0)


class Kept:
    """A resource with its connection, as a poller has them."""

    def __init__(self, server: WSManServer, **changes: Any) -> None:
        self.server, self.guard = server, LoginGuard()
        self.target = target(server, **changes)
        self.connection = PowerShellConnection(self.target, self.guard, replace(ACCESS, keeps=True, records={}))

    def poll(self) -> tuple[Verdict, Sample | None]:
        return poll_once(self.target, self.connection, None)

    def good(self) -> Sample:
        verdict, sample = self.poll()
        assert verdict.state == "healthy" and sample, verdict
        return sample

    @property
    def session(self) -> WinrmSession:
        session = self.connection.keeper.session
        assert isinstance(session, WinrmSession)
        return session

    def hang_up(self) -> None:
        """The host ends the connection, and not the shell."""
        self.server.end_connections()
        wait_for(lambda: self.session.hung_up)


@contextlib.contextmanager
def keeping(server: WSManServer, **changes: Any) -> Iterator[Kept]:
    """On a server that is left without a shell, when the resource goes."""
    with no_leaks(), server:
        kept = Kept(server, **changes)
        try:
            yield kept
        finally:
            kept.connection.close()
        assert server.shells == {}


def counting(answer: Callable[[Script], Answer | str] | Answer | str = CLEAN, scheme: str = "https",
             auth: str = "ntlm") -> CountingServer:  # fmt: skip
    return CountingServer(scheme, auth, answer=answer)


@pytest.mark.parametrize(
    ("scheme", "auth", "login"),
    [("https", "basic", 0), ("https", "ntlm", 3), ("http", "ntlm", 3), ("https", "certificate", 0)],
)
def test_polls_share_a_login_and_a_shell(scheme: str, auth: str, login: int) -> None:
    with keeping(counting(scheme=scheme, auth=auth), interval=40, timeout=10) as kept:
        for _ in range(3):
            kept.good()
        assert (kept.server.requests["Create"], kept.server.requests["Delete"]) == (1, 0)
        assert kept.connection.record.outcomes == {"accepted": 1}
        if login:
            assert kept.server.logins == login  # requests of a login
        (shell,) = kept.server.shells.values()
        assert shell.idle_timeout == "PT80S"
        assert shell.pipelines == {}  # a shell holds a thousand commands, and no more
    assert kept.server.requests["Delete"] == 1


def test_without_keep_each_poll_has_its_own() -> None:
    with keeping(counting(), keep=False) as kept:
        for number in (1, 2):
            kept.good()
            assert (kept.server.requests["Create"], kept.server.requests["Delete"]) == (number, number)


class Noted(list[Any]):
    """Events of a session, and how many there were in all."""

    count = 0

    def append(self, event: Any) -> None:
        self.count += 1
        super().append(event)


def test_events_of_a_host_are_not_kept() -> None:
    """pypsrp has them for whoever looks, as long as the shell lives."""

    def lines() -> Iterator[str]:
        (shell,) = server.shells.values()
        shell._pool.send_event(1, "mine")
        yield from CLEAN.splitlines()

    server = counting(lambda _: Answer(output=lines()))
    with keeping(server) as kept:
        kept.good()
        events = kept.session.pool.user_events = Noted()
        for number in range(1, 3):
            kept.good()
            assert (events.count, list(events)) == (number, [])


def test_a_host_that_hangs_up_on_an_idle_connection_gets_another_login_for_the_same_shell() -> None:
    with keeping(counting()) as kept:
        for number in range(3):
            kept.good()
            assert kept.connection.record.outcomes == {"accepted": 1 + number}
            kept.hang_up()
        assert kept.server.requests["Create"] == 1
        assert kept.connection.record.second_tries == 0
    assert kept.server.requests["Delete"] == 1  # after another login


def test_relogin_goes_on_with_the_same_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    with keeping(counting(), relogin=1) as kept:
        kept.good()
        before = kept.session
        wait_for(lambda: time.monotonic() > kept.session.due_mono)
        kept.good()
        assert kept.session is not before and kept.session.pool is before.pool
        assert kept.server.requests["Create"] == 1
        assert kept.connection.record.outcomes == {"accepted": 2}
        assert before.opened.fileno() == -1


def test_a_password_that_is_changed_is_found_out_by_the_next_login() -> None:
    with keeping(counting()) as kept:
        kept.good()
        kept.server.users["monitor"] = "another"
        kept.good()  # a poll over it is no login
        kept.hang_up()
        verdict, _ = kept.poll()
        assert verdict.cause == "auth" and kept.guard.refusals == 1
        kept.server.users["monitor"] = PASSWORD  # so that the shell can go
        kept.guard.ask("win")


@pytest.mark.parametrize("name", ["ca_file", "certificate_file", "key_file"])
def test_another_file_of_the_login(name: str) -> None:
    """It is shown at once, and not for the shell of the login before it."""
    with keeping(counting(auth="certificate")) as kept:
        kept.good()
        kept.good()
        assert kept.connection.record.outcomes == {"accepted": 1}
        os.utime(getattr(kept.target.settings, name), (0, 0))
        kept.good()
        kept.good()
        assert (kept.server.requests["Create"], kept.connection.record.outcomes) == (2, {"accepted": 2})
        assert kept.connection.record.second_tries == 0


def test_another_certificate_of_the_host() -> None:
    """What is open is still that of the host that was known; the next login sends nothing to another one."""
    with keeping(counting(), ca_file=None) as kept:
        kept.connection._settings = kept.connection._settings.model_copy(
            update={"certificate_fingerprint": kept.server.fingerprint})
        kept.good()
        before = kept.server.logins
        kept.server.rotate_certificate()
        kept.good()
        kept.hang_up()
        assert kept.poll()[0].cause == "host_key"
        assert kept.server.logins == before
        kept.server.shells.clear()


def test_what_nobody_asked_for_between_polls() -> None:
    with keeping(counting(scheme="http")) as kept:
        kept.good()
        kept.good()
        for sock in kept.server._listener.sockets:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        wait_for(lambda: kept.session.stale)
        kept.good()
        assert kept.connection.record.outcomes == {"accepted": 2}
        assert kept.connection.record.second_tries == 0


def test_a_host_that_moves() -> None:
    """Its shell ends where it was."""

    class Names(Resolver):
        answers = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)

        def resolve(self, host: str, port: int, deadline: Deadline) -> list[Any]:
            return [(*found[:4], (found[4][0], port)) for found in self.answers]

    with keeping(counting()) as kept:
        names = Names()
        kept.connection._context = replace(kept.connection._context, resolver=names)
        kept.good()
        kept.good()
        names.answers = socket.getaddrinfo("127.0.0.2", 0, type=socket.SOCK_STREAM)
        assert kept.poll()[0].cause == "unreachable"  # nobody is there
        wait_for(lambda: not kept.server.shells)
        assert kept.connection.record.outcomes == {"accepted": 1}


def forget_shell(kept: Kept) -> None:
    kept.server.shells.clear()


def forget_all(kept: Kept) -> None:
    forget_shell(kept)
    kept.hang_up()


def want_login(kept: Kept) -> None:
    kept.server.misbehave = {"Command": "once 401"}


def want_login_later(kept: Kept) -> None:
    kept.server.misbehave = {"Receive": "once 401"}


def lose_step(kept: Kept) -> None:
    kept.session.pool.connection.transport.encryption.context.wrap(b"a message that the host never sees")


def drop_command(kept: Kept) -> None:
    kept.server.misbehave = {"Command": "once drop"}


def drop_answer(kept: Kept) -> None:
    kept.server.misbehave = {"Receive": "once drop"}


def cut_answer(kept: Kept) -> None:
    kept.server.misbehave = {"Receive": "once cut"}


def spoil_answer(kept: Kept) -> None:
    kept.server.misbehave = {"Receive": "once bad xml"}


def die_silently(kept: Kept) -> None:
    kept.server.misbehave = {"Command": "once silent"}


def change_answer(kept: Kept, part: bytes, change: Callable[[bytes], bytes]) -> None:
    """The first answer with such a part, as it is sent."""
    seen: list[bytes] = []

    def spoil(octets: bytes) -> bytes:
        if part in octets:
            seen.append(octets)
        if not seen or not octets.startswith(b"HTTP/"):
            return octets
        kept.server.spoil = bytes
        return change(octets)

    kept.server.spoil = spoil


def lose_command(kept: Kept) -> None:
    """It is taken, and runs, but nobody hears so."""
    change_answer(kept, b"<rsp:CommandResponse>", lambda _: b"")


def lose_step_of_host(kept: Kept) -> None:
    """What it says is sealed, and cannot be opened."""
    change_answer(kept, b"<rsp:ReceiveResponse>", lambda answer: answer[:-60] + bytes(10) + answer[-50:])


def hang(kept: Kept) -> None:
    """The process behind the shell; WinRM itself answers on."""
    (shell,) = kept.server.shells.values()
    gone = threading.Event()
    shell.send = lambda *_: gone.wait(60)  # type: ignore[method-assign, assignment]
    shell.close = gone.set  # type: ignore[method-assign]


def close_at_the_end(kept: Kept) -> None:
    """The host says with the last answer of the next poll that it hangs up, as proxies do."""
    line = b"\r\nConnection: close\r\n"
    change_answer(kept, b"<rsp:SignalResponse/>", lambda answer: answer.replace(b"\r\n", line, 1))


def deny_shell(kept: Kept) -> None:
    kept.server.misbehave = {"Get": "once access denied"}
    kept.hang_up()


@pytest.mark.long
@pytest.mark.windows
@pytest.mark.parametrize(
    ("fault", "shells", "tries"),
    [
        (forget_shell, 2, 1),
        (forget_all, 2, 0),
        (want_login, 1, 1),
        (want_login_later, 2, 1),
        (lose_step, 1, 1),
        (lose_step_of_host, 2, 1),
        (drop_command, 2, 1),
        (lose_command, 2, 1),
        (hang, 2, 1),
        (close_at_the_end, 1, 0),
        (deny_shell, 2, 0),
        (drop_answer, 2, 1),
        (cut_answer, 2, 1),
        (spoil_answer, 2, 1),
        (die_silently, 2, 1),
    ],
)
def test_no_fault_of_what_was_open_is_one_of_the_host(fault: Callable[[Kept], None], shells: int, tries: int) -> None:
    """And a shell is not given up for its connection, unless a poll may run in it or have left something."""
    with keeping(counting(scheme="http"), timeout=6) as kept:
        kept.good()
        fault(kept)
        kept.good()
        kept.good()
        assert (kept.server.requests["Create"], kept.connection.record.second_tries) == (shells, tries)
        assert kept.connection.record.outcomes == {"accepted": 2} and not kept.guard.refusals
        assert len(kept.server.shells) == 1


def test_deaths_with_good_polls_between_are_not_three_in_a_row() -> None:
    """Also where the host hangs up after each poll: a shell that goes on was found alive, unless by a second try."""
    with keeping(counting(scheme="http")) as kept:
        kept.good()
        for number in range(1, 4):
            kept.hang_up()
            kept.good()
            kept.hang_up()
            drop_command(kept)
            kept.good()
            assert (kept.connection.record.second_tries, kept.connection.found_dead) == (number, False)
        kept.good()
        for number in range(1, 4):
            want_login(kept)
            kept.good()
            assert (kept.connection.record.second_tries, kept.connection.found_dead) == (3 + number, number == 3)


def test_what_fails_twice_is_the_host_s() -> None:
    with keeping(counting()) as kept:
        kept.good()
        kept.server.misbehave = {"Command": "access denied"}
        assert kept.poll()[0].cause == "auth"
        assert kept.connection.record.second_tries == 1
        kept.server.misbehave = {}


@pytest.mark.long
@pytest.mark.windows
def test_a_check_that_is_silent_for_most_of_the_time_runs_once() -> None:
    """Only until it is taken has a script a third of the deadline."""
    with keeping(counting(), timeout=4) as kept:
        kept.good()
        kept.server.answer = Answer(output=(CLEAN,), delay=3.2)
        kept.good()
        assert kept.server.polls == 2


@pytest.mark.long
@pytest.mark.windows
def test_silence_in_the_middle_lasts_until_the_deadline() -> None:
    """Once, for then the connection and the shell are others."""
    with keeping(counting(), timeout=4) as kept:
        kept.good()
        kept.server.misbehave = {"Receive": "once silent"}
        assert kept.poll()[0].cause == "timeout"
        kept.good()
        assert (kept.server.requests["Create"], kept.connection.record.second_tries) == (2, 0)


def test_bytes_are_counted_per_poll() -> None:
    with keeping(counting(f"{' ' * 400_000}\n{CLEAN}")) as kept:
        for _ in range(4):
            kept.good()
        assert kept.server.requests["Create"] == 1


def test_a_shell_that_hangs_is_found_out_behind_another_login_too() -> None:
    """For WinRM says that it is there."""
    with keeping(counting(scheme="http"), timeout=6) as kept:
        kept.good()
        hang(kept)
        kept.hang_up()
        for _ in range(2):
            kept.good()
            assert (kept.server.requests["Create"], kept.connection.record.second_tries) == (2, 1)
        assert kept.connection.record.outcomes == {"accepted": 3}
        assert len(kept.server.shells) == 1


@pytest.mark.parametrize("kind", ["quota", "silent"])
def test_an_old_shell_that_cannot_be_deleted_is_left_alone(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Its host ends it after the idle time."""
    with keeping(counting(), timeout=20) as kept:
        kept.good()
        kept.server.misbehave = {"Receive": "once drop", "Delete": f"once {kind}"}
        monkeypatch.setattr(healthchecker, "SHELL_END", 0.2)
        for _ in range(3):
            kept.good()
        monkeypatch.setattr(healthchecker, "SHELL_END", 60.0)
        assert (kept.server.requests["Create"], kept.connection.record.second_tries) == (2, 1)
        kept.server.shells = {shell.id: shell for shell in list(kept.server.shells.values())[-1:]}


@contextlib.contextmanager
def shells_of_others(server: WSManServer, count: int) -> Iterator[None]:
    """Who use the same account."""
    names = [str(uuid.uuid4()) for _ in range(count)]
    for name in names:
        shell = Shell(server, "", "")
        shell.id = name
        server.add_shell(shell)
    yield
    for name in names:
        del server.shells[name]


def test_others_may_have_all_shells_but_one() -> None:
    """Where another is needed, the old one goes first."""
    with keeping(counting(scheme="http")) as kept:
        kept.good()
        with shells_of_others(kept.server, SHELL_LIMIT - 1):
            kept.good()
            for fault in (drop_answer, lose_command):
                fault(kept)
                kept.good()
            assert (kept.connection.record.second_tries, len(kept.server.shells)) == (2, SHELL_LIMIT)
            kept.server.shells.popitem()
            with shells_of_others(kept.server, 1):
                verdict, _ = kept.poll()
                assert verdict.cause == "protocol" and "MaxShellsPerUser" in verdict.reason
            kept.good()


def test_at_the_end_no_shell_is_opened_to_delete_one() -> None:
    with keeping(counting()) as kept:
        kept.good()
        kept.server.misbehave = {"Receive": "drop"}
        assert kept.poll()[0].cause == "unreachable"
        assert len(kept.server.shells) == 2
        kept.server.misbehave = {}
    assert (kept.server.requests["Create"], kept.server.requests["Delete"]) == (2, 2)


def test_a_host_that_deletes_nothing_costs_no_other_one_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end, where they share a credential: who waits for the end of a shell has long logged in."""
    monkeypatch.setattr(healthchecker, "SHELL_END", 10.0)
    with no_leaks(), counting(scheme="http") as silent, counting(scheme="http") as well:
        guard, hosts = LoginGuard(), [*(Kept(silent, name=f"w{number}") for number in range(4)), Kept(well, name="w")]
        for host in hosts:
            host.connection._guard = guard
            host.good()
            host.hang_up()
        silent.misbehave = {"Delete": "silent"}
        ends = [threading.Thread(target=host.connection.close) for host in hosts[:4]]
        for end in ends:
            end.start()
        wait_for(lambda: guard._running == 3 or silent.requests["Delete"] == 4)
        hosts[4].connection.close()
        assert (len(silent.shells), len(well.shells)) == (4, 0)
        silent.misbehave = {}
        silent.end_connections()
        for end in ends:
            end.join()


def test_a_file_of_the_login_that_cannot_be_read_is_named() -> None:
    with keeping(counting()) as kept:
        kept.good()
        before = kept.connection._settings
        name = "a|b" if sys.platform == "win32" else "x" * 300  # which there is none of
        kept.connection._settings = before.model_copy(update={"key_file": Path(name)})
        verdict, _ = kept.poll()
        assert verdict.cause == "credential" and "cannot be read" in verdict.reason
        kept.connection._settings = before


@pytest.mark.parametrize("answer", [RECORDED, CLEAN.replace('"clean": true', '"clean": false')])
def test_a_shell_that_is_not_as_before_is_not_used_again(answer: str) -> None:
    """Nor one of which nobody says so."""
    with keeping(counting(answer)) as kept:
        for number in (1, 2):
            kept.good()
            assert (kept.server.requests["Create"], kept.server.requests["Delete"]) == (number, number)
        assert kept.connection.record.second_tries == 0
