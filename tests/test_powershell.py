"""PowerShell Remoting: real logins, real certificates, and every way in which a Windows host can spoil a poll.

The host is tests/wsman_server.py: real sockets, TLS, NTLM and encryption, but no PowerShell. It answers with what
the script prints, as recorded in tests/recorded/windows.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import gc
import importlib.util
import itertools
import json
import logging
import os
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests
import wsman_server
from conftest import late_logins, no_leaks, wait_for
from cryptography.hazmat.primitives import serialization
from pydantic import SecretStr
from service import Service, run_cheaply, write_inventory
from spnego.exceptions import SpnegoError
from test_wsman_server import WAYS, man_in_the_middle
from wsman_server import TLS_HEAD, Answer, Certificate, Misbehaviour, Script, WSManServer

import healthchecker
from healthchecker import (
    AUTH_BACKOFF,
    ConnectionContext,
    Deadline,
    GuardedSocket,
    Guards,
    KnownHosts,
    LoginGuard,
    LoginRecord,
    Output,
    PowerShellConnection,
    ProbeError,
    Resolver,
    ResourceSettings,
    Sample,
    Target,
    Verdict,
    WinrmAdapter,
    explained,
    login_protocol,
    main,
    missing_package,
    poll_once,
    send_beside,
    tls_fault,
)

PASSWORD = "correct horse"  # of the server's account
RECORDINGS = Path(__file__).parent / "recorded" / "windows"
RECORDED = (RECORDINGS / "administrator.json").read_text(encoding="utf-8").partition("\n")[2]
# Every misbehaviour at every step: one way whose messages are encrypted, and one with TLS, which are all the same once
# the login is over.
FULL_WAYS = [("http", "ntlm"), ("https", "certificate")]
AT_ONCE = 24 if sys.platform != "win32" else 12
LATE = 10  # seconds that a busy machine may add
TIMEOUT = 30.0  # seconds; everything that does not wait for it is over long before, on a busy machine, too
DONE = "\ndone\n"
ACCESS = ConnectionContext(KnownHosts(Path("no such file")), Resolver())


class Polled(NamedTuple):
    """What poll_once gave, and how long it took."""

    verdict: Verdict
    sample: Sample | None
    seconds: float

    @property
    def cause(self) -> str:
        return self.verdict.cause

    @property
    def reason(self) -> str:
        return self.verdict.reason


class CountingServer(WSManServer):
    """Counts requests of a connection that is not logged in, too; `reached` is set at the first misbehaviour."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.logins = 0
        self.reached = threading.Event()

    def take_misbehaviour(self, step: str) -> Misbehaviour | None:
        self.logins += step == "auth"
        kind = super().take_misbehaviour(step)
        if kind is not None:
            self.reached.set()
        return kind


def windows(server: WSManServer, **changes: Any) -> dict[str, Any]:
    """Settings of a resource on `server`, as the inventory has them."""
    settings: dict[str, Any] = {"name": "win", "platform": "windows", "hostname": "127.0.0.1", "port": server.port}
    settings |= {"auth": server.auth, "tls": server.scheme == "https", "username": "monitor", "timeout": TIMEOUT}
    if server.scheme == "https":
        settings["ca_file"] = server.ca_file
    if server.auth == "certificate":
        settings |= {"certificate_file": server.client.certificate_file, "key_file": server.client.key_file}
        settings["username"] = None
    return {name: value for name, value in {**settings, **changes}.items() if value is not None}


def target(
    server: WSManServer, *, password: str = PASSWORD, passphrase: str = "", trusted: str = "", **changes: Any
) -> Target:
    """A row as it comes from the database; what a connection does not look at is empty."""
    opened = {"password": SecretStr(password), "key_passphrase": SecretStr(passphrase) if passphrase else None}
    settings = ResourceSettings.model_validate(windows(server, **changes)).model_copy(update=opened)
    known: dict[str, Any] = {field.name: "" for field in fields(Target)}
    return Target(**known | {"settings": settings, "host_key": trusted or None})


def connection_to(resource: Target, guard: LoginGuard | None = None) -> PowerShellConnection:
    return PowerShellConnection(resource, guard or LoginGuard(), ACCESS)


def poll(resource: Target, guard: LoginGuard | None = None, before: Polled | None = None) -> Polled:
    """One poll, which ends with its timeout and gives one line that holds no secret."""
    begin = time.monotonic()
    previous = before.sample if before else None
    connection = connection_to(resource, guard)
    verdict, sample = poll_once(resource, connection, previous)
    seconds = time.monotonic() - begin
    assert seconds < resource.settings.timeout + LATE
    assert connection.host_key == resource.host_key
    assert "\n" not in verdict.reason
    assert not any(secret in verdict.reason for secret in resource.settings.secrets.values())
    return Polled(verdict, sample, seconds)


def send(server: WSManServer, script: str, seconds: float = TIMEOUT, **changes: Any) -> str:
    """The output of a script of our own."""
    deadline = Deadline(seconds)
    output = Output(DONE)
    assert connection_to(target(server, **changes)).run(script or "Get-Date", output, deadline) and not deadline.over
    return output.printed.decode().removesuffix("\n")


# === Good polls ==============================================================


@pytest.mark.parametrize(("scheme", "auth"), WAYS)
def test_a_good_poll(scheme: str, auth: str) -> None:
    seen: list[Script] = []

    def answer(script: Script) -> str:
        seen.append(script)
        return RECORDED

    with no_leaks(), WSManServer(scheme, auth, answer=answer) as server:
        polled = poll(target(server, services=["Spooler"], limits={"disk_percent": "95"}))
        assert (polled.verdict.state, polled.cause) == ("healthy", "")
        assert polled.sample
        assert polled.sample.metrics["disk_percent C:"] == pytest.approx(60)
        assert (server.polls, server.shells) == (1, {})
        assert server.requests == collections.Counter(Create=1, Open=2, Command=1, Receive=1, Delete=1)
    [script] = seen
    assert script.user == ("certificate" if auth == "certificate" else "monitor")
    assert script.configuration_name == "Microsoft.PowerShell"
    assert '"services": ["Spooler"]' in script


def test_what_the_inventory_leaves_out() -> None:
    resource = {"name": "win", "hostname": "win.example.com", "platform": "windows", "username": "monitor"}
    settings = ResourceSettings.model_validate(resource)
    assert (settings.tls, settings.connect_port, settings.auth) == (True, 5986, "negotiate")
    assert ResourceSettings.model_validate(resource | {"tls": "false"}).connect_port == 5985
    assert settings.configuration_name == "Microsoft.PowerShell"


def test_each_poll_has_a_runspace_of_its_own() -> None:
    with CountingServer("https", "ntlm", answer=lambda script: script) as server:
        connection = connection_to(target(server))
        for number in range(1, 4):
            connection.run("", Output(DONE), Deadline(TIMEOUT))
            assert (server.requests["Create"], server.requests["Delete"], server.shells) == (number, number, {})
            assert server.logins == 3 * number  # a request without a token and two with one: nothing is kept


def test_cpu_is_known_from_the_second_poll_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reading twice leaves it unknown, and no more."""
    monkeypatch.setattr(healthchecker, "CPU_WINDOW", 0.0)
    answer = json.loads(RECORDED.partition("\n")[0])
    with WSManServer("http", "ntlm", answer=lambda script: json.dumps(answer)) as server:
        resource = target(server, limits={"cpu_percent": "20"})
        first = poll(resource)
        same = poll(resource, before=first)
        assert first.sample and same.sample == first.sample
        assert "cpu_percent" not in same.sample.metrics
        assert (same.verdict.state, same.sample.problems) == ("healthy", {})
        busy, total = answer["amounts"]["cpu_percent"]
        answer["amounts"]["cpu_percent"] = [busy + 25 * 10**7, total + 100 * 10**7]
        later = poll(resource, before=same)
        assert later.sample and later.sample.metrics["cpu_percent"] == pytest.approx(25, abs=0.01)
        assert (later.cause, "cpu_percent at 25.0, fail above 20" in later.reason) == ("limit", True)


@pytest.mark.parametrize(
    ("recording", "limits", "state", "words"),
    [
        ("administrator", {"swap_percent": "90"}, "healthy", ""),
        ("administrator", {"swap_percent": "20"}, "unhealthy", "swap_percent at 21.1, fail above 20"),
        ("plain-user", {"memory_percent": "90"}, "healthy", ""),
        ("plain-user", {"swap_percent": "90"}, "degraded", "swap_percent cannot be read: only an administrator may"),
        ("plain-user", {"disk_percent": "80"}, "unhealthy", "disk_percent C: at 90.0, fail above 80"),
        ("constrained-language", {"memory_percent": "90"}, "degraded", "memory_percent cannot be read: Access denied"),
        ("constrained-language", {"disk_percent": "90"}, "degraded", "(Constrained Language Mode)"),
        ("german", {"cpu_percent": "90"}, "degraded", "cpu_percent cannot be read: Ungültige Klasse"),
        ("german", {"memory_percent": "70"}, "unhealthy", "memory_percent at 75.0, fail above 70"),
        ("powershell-7", {"disk_percent": "40"}, "unhealthy", "disk_percent C: at 50.0, fail above 40"),
    ],
)
def test_each_recording_as_an_answer(recording: str, limits: dict[str, str], state: str, words: str) -> None:
    """What an account may not read, or a language mode hides, is a problem of that metric and never a zero."""
    answer = (RECORDINGS / f"{recording}.json").read_text(encoding="utf-8")
    with WSManServer("https", "negotiate", answer=answer) as server:
        polled = poll(target(server, limits=limits))
        assert (polled.verdict.state, words in polled.reason) == (state, True), polled.reason


def test_texts_of_any_script_come_whole() -> None:
    """Above 1 MB of base64 a script is sent in several parts."""
    with WSManServer("http", "ntlm", answer=lambda script: script[::-1]) as server:
        assert send(server, "olleh ß😀") == "😀ß hello"
        assert len(send(server, "x" * 400_000)) == 400_000
        server.answer = lambda script: str(len(script))
        assert send(server, "x" * 1_500_000) == "1500000"
        assert server.requests["Send"] > 0


def test_the_configuration_name_reaches_the_server() -> None:
    with WSManServer("https", "basic", answer=lambda script: script.configuration_name) as server:
        assert send(server, "", configuration_name="Health.JEA") == "Health.JEA"


def test_the_host_drops_a_forgotten_shell_after_a_minute() -> None:
    for seconds in deadlines("timeout", 0):
        with CountingServer("http", "ntlm", misbehave={"Command": "silent"}) as server:
            assert poll(target(server, timeout=seconds)).cause == "timeout"
            if server.reached.is_set():
                break
    assert [shell.idle_timeout for shell in server.shells.values()] == ["PT60S"]


@pytest.mark.long
@pytest.mark.windows
def test_polls_in_many_threads() -> None:
    with WSManServer("http", "ntlm", answer=lambda script: script, shell_limit=100) as server:
        scripts = [f"script {number}" for number in range(60)]
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(lambda script: send(server, script, 20.0), scripts)) == scripts
        assert server.shells == {}


# === Ways to log in ==========================================================


class ListeningServer(WSManServer):
    """Keeps the tokens of logins."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens: list[bytes] = []

    def new_context(self, bindings: Any) -> Any:
        context = super().new_context(bindings)
        step = context.step

        def kept(token: bytes) -> Any:
            self.tokens.append(token)
            return step(token)

        context.step = kept
        return context


@pytest.mark.parametrize(("scheme", "auth"), [("http", "negotiate"), ("https", "negotiate"), ("https", "ntlm")])
def test_a_password_is_shown_by_one_protocol(scheme: str, auth: str) -> None:
    """What offers several asks a KDC first, where there is one: of one wrong password the directory would count two. In
    Windows SSPI wraps what it chooses."""
    with ListeningServer(scheme, auth, answer=RECORDED) as server:
        assert poll(target(server)).cause == ""
        if sys.platform != "win32":
            assert [token[:12] for token in server.tokens] == [b"NTLMSSP\0\1\0\0\0", b"NTLMSSP\0\3\0\0\0"]


@pytest.mark.parametrize(("user", "has_kerberos", "protocol"), [
    ("monitor", True, "ntlm"), ("EXAMPLE\\monitor", True, "ntlm"),
    ("monitor@EXAMPLE.COM", True, "kerberos"), ("monitor@EXAMPLE.COM", False, "ntlm"),
])  # fmt: skip
def test_credssp_shows_a_password_by_one_protocol(
    user: str, has_kerberos: bool, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = ["socket" if has_kerberos else "no_such_package"]
    monkeypatch.setattr(healthchecker, "EXTRAS", {"credssp": [], "kerberos": packages})
    with WSManServer("https", "credssp") as server:
        settings = target(server, username=user).settings
    assert login_protocol(settings) == ("auto" if sys.platform == "win32" else protocol)


def test_the_readme_names_the_spn_that_kerberos_asks_for() -> None:
    """Not HTTP/, which may belong to an application of IIS; a directory derives that from HOST/."""
    said = (Path(healthchecker.__file__).parent / "README.md").read_text(encoding="utf-8")
    with WSManServer("https", "negotiate") as server, GuardedSocket() as opened:
        opened.begin(Deadline(TIMEOUT))
        service = connection_to(target(server, auth="kerberos"))._transport(opened).session.auth.service
    assert re.findall(r"SPN (\w+)/`hostname`", said) == [service.upper()]


def test_credssp() -> None:
    with no_leaks(), ListeningServer("https", "credssp", answer=RECORDED) as server:
        assert poll(target(server)).verdict.state == "healthy"


@pytest.mark.parametrize(("auth", "offered"), [
    ("negotiate", "Kerberos"), ("ntlm", "Basic"), ("credssp", "Negotiate"),
])  # fmt: skip
def test_a_host_that_offers_no_such_login_has_refused_no_password(auth: str, offered: str) -> None:
    def spoil(octets: bytes) -> bytes:
        return octets.replace(b"Authenticate: Negotiate\r\n", b"Authenticate: %b\r\n" % offered.encode())

    with WSManServer("https", "negotiate", spoil=spoil) as server:
        guard = LoginGuard()
        polled = poll(target(server, auth=auth), guard)
        assert (polled.cause, f"offers no such login, but: {offered}; correct auth" in polled.reason) == ("auth", True)
        assert guard.refusals == 0


def test_a_password_that_credssp_refuses_counts() -> None:
    """By a 401 that carries a token with an error, as Windows does; it was none of WinRM's answers."""
    with CountingServer("https", "credssp", answer=RECORDED) as server:
        guard = LoginGuard()
        first = poll(target(server, password="wrong"), guard)
        assert (first.cause, "no login as monitor" in first.reason, guard.refusals) == ("auth", True, 1)
        logins = server.logins
        assert (poll(target(server, password="wrong"), guard).cause, server.logins) == ("auth", logins)


@pytest.mark.parametrize(("kind", "cause"), [("not soap", "protocol"), ("drop", "unreachable"), (503, "unreachable")])
def test_what_is_no_answer_to_a_login_by_credssp_counts_for_none(kind: Misbehaviour, cause: str) -> None:
    guard = LoginGuard()
    with WSManServer("https", "credssp", misbehave={"auth": kind}) as server:
        assert (poll(target(server), guard).cause, guard.refusals) == (cause, 0)


@pytest.mark.parametrize("record", [b"\x15\3\3\0\2\2\x28", b"\x16\3\1\0\x10" + 16 * b"x"], ids=["alert", "damaged"])
def test_no_tls_within_credssp_is_no_refusal(record: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cipher lockdown, say, before any password is shown."""
    guard = LoginGuard()
    with WSManServer("https", "credssp", answer=RECORDED) as server:
        def step(self: Any, token: bytes) -> None:
            raise self._unauthorized(record)

        for handler in [each for each in vars(wsman_server).values() if hasattr(each, "_unauthorized")]:
            monkeypatch.setattr(handler, "_step", step)
        polled = poll(target(server), guard)
    assert (polled.cause, "no TLS within CredSSP" in polled.reason, guard.refusals) == ("protocol", True, 0)


def test_a_login_that_goes_on_after_its_poll_is_no_refusal() -> None:
    """A ticket that came too late: the poll has closed the socket, of which urllib3 would say ValueError."""
    with WSManServer("https", "negotiate") as server, GuardedSocket() as opened:
        opened.begin(Deadline(0))
        adapter = WinrmAdapter(opened, target(server).settings)
    with pytest.raises(ProbeError) as caught:
        adapter.send(requests.Request("POST", "http://h/").prepare())
    assert caught.value.cause == "timeout"


@pytest.mark.parametrize("auth", ["kerberos", "ntlm"])
def test_a_login_that_no_thread_begins_is_no_refusal(auth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with WSManServer("https", "negotiate") as server, GuardedSocket() as opened:
        settings = target(server, auth=auth).settings
        opened.begin(Deadline(5))
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(ProbeError) as caught, explained(settings, opened):
            send_beside(opened, settings, lambda: None)
        monkeypatch.undo()
        opened.end()
        assert (caught.value.cause, opened.fileno()) == ("protocol", -1)


class Krb5Error(Exception):
    """In the shape of krb5's (https://pypi.org/project/krb5, _exceptions.pyi), which needs a compiler."""

    def __init__(self, number: int) -> None:
        super().__init__(f"Kerberos says {number}")
        self.err_code = number - 1765328384  # of RFC 4120, or behind those of MIT krb5's krb5_err.et


class GSSError(Exception):
    """In the shape of gssapi's (https://pypi.org/project/gssapi, raw/misc.pyx), of GSS_S_FAILURE."""

    def __init__(self, number: int) -> None:
        super().__init__(f"Kerberos says {number}")
        self.maj_code, self.min_code = 13 << 16, (number - 1765328384) % (1 << 32)


KERBEROS_SAYS = {
    **dict.fromkeys((6, 12, 18, 23, 24, 31, 60), ("auth", 1, "check username and password")),
    **dict.fromkeys((29, 154, 156, 220), ("unreachable", 0, "DNS and port 88")),
    **dict.fromkeys((37, 148), ("unreachable", 0, "NTP")),
    **dict.fromkeys((7, 35), ("auth", 0, "HOST/hostname")),
}


@pytest.mark.parametrize("number", KERBEROS_SAYS)
@pytest.mark.parametrize("shape", [Krb5Error, GSSError])
def test_what_kerberos_says_of_a_credential_counts(shape: type[Exception], number: int) -> None:
    """And nothing else: a KDC that is away for a moment stopped all that log in with a credential for half an hour."""
    cause, refusals, words = KERBEROS_SAYS[number]
    guard, error = LoginGuard(), shape(number)
    with WSManServer("https", "negotiate") as server, GuardedSocket() as opened:
        resource = target(server, auth="kerberos")
        attempt = guard.attempt("win", Deadline(TIMEOUT), LoginRecord())
        with pytest.raises(ProbeError) as caught, attempt, explained(resource.settings, opened):
            if shape is GSSError:   # as pyspnego raises it
                raise SpnegoError(base_error=error, context_msg="Processing security token") from error
            raise error
    assert (caught.value.cause, guard.refusals) == (cause, refusals)
    assert words in str(caught.value) and f"Kerberos says {number}" in str(caught.value)


def test_a_silent_kdc_is_not_waited_for() -> None:
    """What it says at last of the password counts, and until then no other thread asks it."""
    guard, may_answer = LoginGuard(), threading.Event()

    def send() -> None:     # as krb5 does, which asks each KDC several times
        may_answer.wait(60)
        raise Krb5Error(24)

    def login() -> None:
        opened.begin(Deadline(1))
        with guard.attempt("win", Deadline(1), LoginRecord()), explained(settings, opened):
            send_beside(opened, settings, send)

    with WSManServer("https", "negotiate") as server, no_leaks(), GuardedSocket() as opened:
        settings = target(server, auth="kerberos").settings
        for reason in ("no answer of a KDC within 1 s", "not tried: the host has not answered to the login before"):
            begin = time.monotonic()
            with pytest.raises(ProbeError, match=reason) as caught:
                login()
            assert (caught.value.cause, time.monotonic() - begin < 1 + LATE) == ("timeout", True)
        may_answer.set()
        wait_for(lambda: not late_logins())
        assert guard.refusals == 1


# === Answers after the poll ==================================================


class TardyServer(WSManServer):
    """Waits before it answers to a password, by NTLM after the step before it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.may_answer, self.asked, self.steps = threading.Event(), 0, 0
        self.late_at = 4 if self.auth == "credssp" else 2
        self.users = SlowUsers(self)

    def wait(self) -> None:
        self.asked += 1
        self.may_answer.wait(60)

    def new_context(self, bindings: Any) -> Any:
        context = super().new_context(bindings)
        step, tokens = context.step, list[bytes]()

        def late(token: bytes) -> Any:
            tokens.append(token)
            self.steps += 1
            if len(tokens) == self.late_at:
                self.wait()
            return step(token)

        context.step = late
        return context


class SlowUsers(dict[str, str]):
    def __init__(self, server: TardyServer) -> None:
        super().__init__(server.users)
        self._server = server

    def get(self, user: str, other: Any = None) -> Any:
        self._server.wait()
        return super().get(user, other)


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize(("scheme", "auth"), [
    ("http", "ntlm"), ("https", "negotiate"), ("https", "basic"), ("https", "credssp"),
])  # fmt: skip
def test_what_is_said_of_a_password_after_the_poll(scheme: str, auth: str, right: bool) -> None:
    """A refusal counts, or each poll would send the wrong password again, until the account is locked."""
    with no_leaks(), TardyServer(scheme, auth, answer=RECORDED) as server:
        guard, password = LoginGuard(), PASSWORD + "x" * (not right)
        resource = target(server, password=password, timeout=3)
        connection = PowerShellConnection(resource, guard, replace(ACCESS, records={}))
        for reason in ("no answer within 3 s", "not tried: the host has not answered to the login before"):
            verdict, _ = poll_once(resource, connection, None)
            assert (verdict.cause, verdict.reason) == ("timeout", reason)
        server.may_answer.set()
        wait_for(lambda: not late_logins())
        assert server.asked == 1
        assert connection.record.outcomes == {"accepted" if right else "refused": 1}
        assert guard.refusals == (not right)
        connection.close()


@pytest.mark.parametrize(("scheme", "auth", "last"), [("http", "ntlm", 1), ("https", "credssp", 3)])
def test_no_password_is_shown_after_the_poll(scheme: str, auth: str, last: int) -> None:
    """The host's answer to that might come when nobody waits for it any more, and not count."""
    with no_leaks(), TardyServer(scheme, auth, answer=RECORDED) as server:
        server.late_at = last
        guard, resource = LoginGuard(), target(server, password="wrong", timeout=3)
        connection = PowerShellConnection(resource, guard, replace(ACCESS, records={}))
        assert poll_once(resource, connection, None)[0].cause == "timeout"
        server.may_answer.set()
        wait_for(lambda: not late_logins())
        assert (server.steps, server.asked, guard.refusals) == (last, 1, 0)
        connection.close()


@pytest.mark.parametrize(("scheme", "auth"), [("http", "ntlm"), ("https", "negotiate"), ("https", "basic")])
@pytest.mark.parametrize("more", [b"Content-Length: 9", b"Content-Encoding: gzip\r\nContent-Length: 0"])
def test_a_refusal_counts_whatever_its_page_is(scheme: str, auth: str, more: bytes) -> None:
    """Cut off, or packed: what was heard of the password is that it is wrong."""
    refusals = list[bytes]()    # without a token; but for basic, the first one is none to a password

    def spoil(octets: bytes) -> bytes:
        if not re.match(rb"HTTP/1.1 401 (?s:.*)\r\nWWW-Authenticate: \w+\r\n", octets):
            return octets
        refusals.append(octets)
        is_first = auth != "basic" and len(refusals) == 1
        return octets if is_first else octets.replace(b"Content-Length: 0", more)

    with WSManServer(scheme, auth, spoil=spoil) as server:
        guard = LoginGuard()
        assert poll(target(server, password="wrong"), guard).cause == "auth"
        assert guard.refusals == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_refusal_that_carries_a_token_is_one(scheme: str) -> None:
    """pypsrp would log in again for each token (here RFC 4178's `reject`), which is one more wrong password."""
    reject = b"Negotiate " + base64.b64encode(bytes.fromhex("a1073005a0030a0102"))

    def spoil(octets: bytes) -> bytes:
        if server.logins < 3:   # the first 401 asks for a login, the second one is a step
            return octets
        return octets.replace(b"Authenticate: Negotiate\r\n", b"Authenticate: %b\r\n" % reject)

    with CountingServer(scheme, "ntlm", spoil=spoil) as server:
        guard = LoginGuard()
        assert poll(target(server, password="wrong"), guard).cause == "auth"
        assert (guard.refusals, server.logins) == (1, 3)


# === Misbehaviour ============================================================

BEFORE_HTTP: dict[Misbehaviour, str] = {
    "silent": "timeout", "drip": "timeout", "drop": "unreachable", "endless": "protocol",
}  # fmt: skip
BYTES: dict[Misbehaviour, str] = {
    "silent": "timeout", "drip": "timeout", "drip head": "timeout",
    "endless": "protocol", "continue": "protocol", "gzip": "protocol",
    "cut": "unreachable", "drop": "unreachable",
}  # fmt: skip
ANSWERS: dict[Misbehaviour, str] = {
    "not soap": "protocol", "bad xml": "protocol", "wrong reply": "protocol",
    301: "protocol", 401: "auth", 403: "auth", 404: "protocol", 500: "protocol", 503: "unreachable",
    "access denied": "auth", "quota": "protocol", "shell gone": "protocol",
}  # fmt: skip
GARBAGE = [("Open", "garbage", "protocol"), ("Receive", "garbage", "protocol")]
MESSAGES = ("Create", "Open", "Command", "Receive")
Case = tuple[str, Misbehaviour, str]  # step, what is wrong, cause


def deadlines(cause: str, number: int) -> Iterator[float]:
    """Seconds to try. A case that waits for its deadline gets more only when it did not come to what is wrong.

    No two deadlines are the same: several dozen threads that end at one moment would all be late.
    """
    for seconds in (1.5, 3, 6, 12, 24, 48) if cause == "timeout" else (90,):
        yield seconds + 0.05 * (number % AT_ONCE)


def cases(scheme: str, steps: Iterable[str]) -> list[Case]:
    """Those that wait for the deadline come first."""
    early = [("accept", kind, cause) for kind, cause in BEFORE_HTTP.items()]
    early += [("tls", kind, cause) for kind, cause in BEFORE_HTTP.items() if scheme == "https"]
    late = [(step, kind, cause) for step in steps for kind, cause in {**BYTES, **ANSWERS}.items()]
    return sorted([*early, *late, *GARBAGE], key=lambda case: case[2] != "timeout")


@pytest.mark.long
@pytest.mark.windows
@pytest.mark.parametrize(("scheme", "auth"), WAYS)
def test_every_misbehaviour_ends_in_time_with_its_cause(scheme: str, auth: str) -> None:
    """A hundred cases, each on a server of its own and several at once; the login alone where the rest is the same."""

    def outcome(case: Case) -> Case:
        step, kind, cause = case
        with CountingServer(scheme, auth, answer=RECORDED, misbehave={step: kind}) as server:
            for seconds in deadlines(cause, expected.index(case)):
                polled = poll(target(server, timeout=seconds))
                if server.reached.is_set():
                    return step, kind, polled.cause
            return step, kind, f"not reached: {polled.reason}"

    expected = cases(scheme, ("auth", *(MESSAGES if (scheme, auth) in FULL_WAYS else ())))
    with no_leaks(), ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(outcome, expected)) == expected


def test_a_handshake_whose_time_ends_at_a_tick_of_the_clock_is_late() -> None:
    """What comes byte by byte wakes it at such a tick, where a clock stands for 16 ms (Windows): CPython then raises
    SSLWantReadError, as on a socket that never waits (Modules/_ssl.c: PySSL_select with a timeout of 0)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    causes: collections.Counter[str] = collections.Counter()
    for _ in range(30):
        ours, theirs = socket.socketpair()
        with ours, theirs, ThreadPoolExecutor(1) as pool:
            ours.settimeout(0.05)
            handshake = pool.submit(context.wrap_socket, ours)
            theirs.sendall(TLS_HEAD)
            while not handshake.done():
                with contextlib.suppress(OSError):  # the other end is closed just before it is done
                    theirs.send(b"\0")
                time.sleep(0.001)
            error = handshake.exception()
            assert isinstance(error, OSError)
            causes[tls_fault(error, "").cause] += 1
    assert causes == {"timeout": 30}
    assert tls_fault(ssl.SSLWantReadError(), "").cause == "timeout"


NAMED: list[Misbehaviour] = ["silent", "drip", "endless", "drop", 503, "quota", "access denied"]
EVERY: list[Misbehaviour] = [*BYTES, "bad xml", 401, 503, "quota", "access denied"]
WRONG = [(way, kind) for way in FULL_WAYS for kind in (EVERY if way == FULL_WAYS[0] else NAMED)]
Wrong = tuple[tuple[str, str], Misbehaviour]  # scheme and auth; what is wrong


def together(outcome: Callable[[Wrong], str], wrong: list[Wrong]) -> dict[Wrong, str]:
    """What each case gives; fewer at once, for these cost more."""
    with ThreadPoolExecutor(AT_ONCE // 2) as pool:
        return dict(zip(wrong, pool.map(outcome, wrong), strict=True))


@pytest.mark.long
@pytest.mark.windows
def test_misbehaviour_while_a_long_script_is_sent() -> None:
    causes = {**BYTES, **ANSWERS}

    def outcome(wrong: Wrong) -> str:
        way, kind = wrong
        with CountingServer(*way, misbehave={"Send": kind}) as server:
            for seconds in deadlines(causes[kind], WRONG.index(wrong)):
                begin = time.monotonic()
                with pytest.raises(ProbeError) as caught:
                    send(server, "x" * 700_000, seconds)
                assert time.monotonic() - begin < seconds + LATE
                if server.reached.is_set():
                    return caught.value.cause
        return "not reached"

    assert together(outcome, WRONG) == {wrong: causes[wrong[1]] for wrong in WRONG}


@pytest.mark.long
@pytest.mark.windows
def test_a_failing_delete_costs_no_result() -> None:
    def outcome(wrong: Wrong) -> str:
        way, kind = wrong
        with CountingServer(*way, answer=RECORDED, misbehave={"Delete": kind}) as server:
            polled = poll(target(server, timeout=TIMEOUT))
            assert server.reached.is_set()
            return polled.verdict.state

    wrong = [*WRONG, (FULL_WAYS[0], "garbage")]
    assert together(outcome, wrong) == dict.fromkeys(wrong, "healthy")


@pytest.mark.parametrize("way", FULL_WAYS)
def test_a_slow_script_is_stopped(way: tuple[str, str]) -> None:
    for seconds in deadlines("timeout", 0):
        with WSManServer(*way, answer=Answer(delay=float("inf"))) as server:
            polled = poll(target(server, timeout=seconds))
            if server.requests["Signal"] and not server.shells:
                break
    assert (polled.cause, "raise timeout" in polled.reason) == ("timeout", True)
    assert server.requests["Signal"] == 1
    assert server.shells == {}


@pytest.mark.long
@pytest.mark.windows
def test_a_host_that_hangs_when_a_shell_is_deleted_delays_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a poll that is late as it is: `poll` looks at the clock."""
    monkeypatch.setattr(healthchecker, "SHELL_END", 3.0 * LATE)
    for seconds in deadlines("timeout", 0):
        answer = Answer(delay=float("inf"))
        with CountingServer("http", "ntlm", answer=answer, misbehave={"Delete": "silent"}) as server:
            assert poll(target(server, timeout=seconds)).cause == "timeout"
            if server.reached.is_set():
                break
    assert server.reached.is_set()


@pytest.mark.long
@pytest.mark.windows
def test_misbehaviour_while_a_slow_script_is_stopped() -> None:
    def outcome(wrong: Wrong) -> str:
        way, kind = wrong
        with CountingServer(*way, answer=Answer(delay=float("inf")), misbehave={"Signal": kind}) as server:
            for seconds in deadlines("timeout", WRONG.index(wrong)):  # a host whose own word comes late gets no Signal
                polled = poll(target(server, timeout=seconds))
                if server.reached.is_set():
                    return polled.cause
            return "not reached"

    assert together(outcome, WRONG) == dict.fromkeys(WRONG, "timeout")


def test_the_host_may_say_not_yet() -> None:
    misbehave: dict[str, Misbehaviour] = {"Receive": "once operation timeout"}
    with WSManServer("http", "ntlm", answer=RECORDED, misbehave=misbehave) as server:
        assert poll(target(server)).cause == ""
        assert server.requests["Receive"] == 2
        server.misbehave["Receive"] = "operation timeout"
        assert poll(target(server, timeout=1)).cause == "timeout"
        server.misbehave = {"Open": "operation timeout"}
        assert poll(target(server, timeout=1)).cause == "timeout"


def peak(work: Callable[[], object]) -> int:
    """Bytes of memory that this process grew by at most while `work` ran."""
    memory, done = psutil.Process(), threading.Event()
    gc.collect()
    before = memory.memory_info().rss
    sampled = [before]

    def sample() -> None:
        while not done.wait(0.002):
            sampled.append(memory.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        sampler.join(30)
    return max(sampled) - before


@pytest.mark.long
@pytest.mark.windows
@pytest.mark.parametrize(("scheme", "auth"), [("http", "ntlm"), ("https", "basic")])
def test_an_endless_answer_takes_no_memory(scheme: str, auth: str) -> None:
    def end(cause: str) -> None:
        assert poll(target(server)).cause == cause

    with WSManServer(scheme, auth, answer=RECORDED) as server:
        end("")  # what is allocated once
        server.answer = Answer(output=itertools.repeat("x" * 10_000))
        assert peak(lambda: end("protocol")) < 20 << 20
        for step, kind in itertools.product(("Create", "Receive"), ("endless", "continue", "gzip")):
            server.misbehave = {step: kind}
            assert peak(lambda: end("protocol")) < 20 << 20, (step, kind)


def test_an_answer_is_capped_as_over_ssh() -> None:
    """At 1 MiB on the line, where base64 makes four bytes of three."""
    with WSManServer("https", "basic", answer="x" * 740_000) as server:
        assert len(send(server, "", 20)) == 740_000
        server.answer = "x" * 800_000
        with pytest.raises(ProbeError, match="more than 1048576 bytes") as caught:
            send(server, "", 20)
        assert caught.value.cause == "protocol"


@pytest.mark.parametrize(("code", "says"), [(3, "exit code 3"), (b"x", "whose code cannot be had"),
                                            ("three", "whose code cannot be had")])
def test_an_exit_code_that_is_no_number_is_none(code: object, says: str) -> None:
    row = {"number": 1, "name": "c", "good": True, "text": "", "code": None, "then": "exit"}
    answer = Answer(output=[*RECORDED.splitlines()[:1], json.dumps(row)], exit_code=code)
    with WSManServer("http", "ntlm", answer=answer) as server:
        polled = poll(target(server, checks=[{"name": "c", "command": "exit 3"}]))
    assert polled.cause == "check" and says in polled.reason


@pytest.mark.long
@pytest.mark.windows
def test_failed_polls_leave_nothing_behind(often: Callable[[int, int], int]) -> None:
    """In the suite each fault at one of the servers in turn."""
    kinds: list[Misbehaviour] = ["silent", "drop", "endless", "cut", "bad xml", 401, 503, "quota"]

    def fail(resource: Target) -> str:
        deadline = Deadline(0.5 if kind == "silent" else TIMEOUT)
        with pytest.raises(ProbeError) as caught:
            connection_to(resource).run("Get-Date", Output(DONE), deadline)
        return caught.value.cause

    with no_leaks(), contextlib.ExitStack() as stack:
        servers = [stack.enter_context(WSManServer(*way, shell_limit=1000)) for way in WAYS if way != WAYS[1]]
        resources, causes = list(map(target, servers)), collections.Counter[str]()
        with ThreadPoolExecutor(8) as pool:
            for kind, step in itertools.product(kinds, ("auth", "Create", "Open", "Command", "Receive")):
                for server in servers:
                    server.misbehave = {step: kind}
                resources.append(resources.pop(0))
                causes.update(pool.map(fail, resources[: often(1, len(servers))]))
        assert causes.total() == often(40, 200)
        assert set(causes) == {"timeout", "unreachable", "protocol", "auth"}
        for server in servers:
            server.misbehave = {}
            assert send(server, "") == ""


# === Messages ================================================================


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("access denied", "Remote Management Users"),
        ("quota", "MaxShellsPerUser"),
        (503, "winrm quickconfig"),
        (403, "winrm quickconfig"),
        ("not soap", "port"),
        (401, "check username, password and auth"),
        ("drop", "closed the connection"),
    ],
)
def test_a_reason_says_what_to_do(kind: Misbehaviour, words: str) -> None:
    with WSManServer("https", "basic", misbehave={"Create": kind}) as server:
        assert words in poll(target(server)).reason


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_refused_unknown_and_without_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, WSManServer("http", "ntlm") as server:
        assert poll(target(server, port=listener.getsockname()[1], timeout=1)).cause == "timeout"
        unknown = poll(target(server, hostname="nowhere.invalid"))
        assert (unknown.cause, "does not resolve" in unknown.reason) == ("unreachable", True)
        refused = poll(target(server, port=free_port()))
        assert refused.cause == "unreachable"
        assert "winrm quickconfig" in refused.reason and "port" in refused.reason


def test_http_spoken_to_a_tls_port_and_tls_to_an_http_port() -> None:
    with WSManServer("https", "ntlm") as secured, WSManServer("http", "ntlm", request_time=2) as plain:
        assert poll(target(secured, tls=False, ca_file=None)).cause in ("unreachable", "protocol")
        spoken = poll(target(plain, tls=True))
        assert (spoken.cause, "tls" in spoken.reason) == ("protocol", True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Cannot invoke method. Method invocation is supported only on core types in this language mode.", "language"),
        ("no.\nreally", "no. really"),
        ("", "the script failed"),
    ],
)
def test_a_script_that_is_blocked(text: str, said: str) -> None:
    with WSManServer("http", "ntlm", answer=Answer(errors=(text,), failed=True)) as server:
        polled = poll(target(server))
        assert polled.cause == "protocol"
        assert "the script failed" in polled.reason and said in polled.reason
        assert server.shells == {}


@pytest.mark.parametrize("output", ["", "Access denied by policy", RECORDED.partition("\n")[0][:-50]])
def test_an_output_that_is_no_answer(output: str) -> None:
    with WSManServer("http", "ntlm", answer=output) as server:
        polled = poll(target(server))
        assert polled.cause == "protocol"
        said = " ".join(output.split())[:200] or "none"
        assert polled.reason == f"the script was not run; output: {said}"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("krb5", "requests_credssp"):     # as if none was installed
        monkeypatch.setitem(sys.modules, module, None)
    for auth in ("credssp", "kerberos"):
        if sys.platform != "win32" or auth == "credssp":    # Windows brings Kerberos along
            assert missing_package(auth) == f"auth {auth} needs a package: pip install pypsrp[{auth}]"
    if sys.platform != "win32" and not importlib.util.find_spec("gssapi"):
        with WSManServer("https", "negotiate") as server:
            polled = poll(target(server, auth="kerberos"))
        assert (polled.cause, "pip install pypsrp[kerberos]" in polled.reason) == ("credential", True)


# === Certificates ============================================================


def test_a_certificate_of_a_known_authority() -> None:
    with WSManServer("https", "basic", answer=RECORDED) as server:
        assert poll(target(server)).cause == ""
        assert poll(target(server, hostname="localhost")).cause == ""
        missing = poll(target(server, ca_file="missing.crt"))
        assert (missing.cause, "ca_file" in missing.reason) == ("credential", True)


@pytest.mark.parametrize(
    ("address", "days", "why"), [("192.0.2.1", 1, "not valid for '127.0.0.1'"), ("127.0.0.1", -1, "expired")]
)
def test_a_certificate_of_a_known_authority_that_does_not_fit(address: str, days: int, why: str) -> None:
    with CountingServer("https", "basic", answer=RECORDED) as server:
        server.rotate_certificate(address, days)
        polled = poll(target(server))
        assert polled.cause == "host_key"
        assert why in polled.reason and server.fingerprint in polled.reason
        assert server.logins == 0


def with_colons(fingerprint: str) -> str:
    return ":".join(re.findall("..", fingerprint.upper()))


@pytest.mark.parametrize("write", [str, with_colons, "SHA256:{}".format], ids=["plain", "colons", "prefix"])
def test_a_pinned_certificate(write: Callable[[str], str]) -> None:
    with CountingServer("https", "negotiate", answer=RECORDED) as server:
        pinned = target(server, ca_file=None, certificate_fingerprint=write(server.fingerprint))
        assert poll(pinned).cause == ""
        old, logins = server.fingerprint, server.logins
        server.rotate_certificate()
        changed = poll(pinned)
        assert changed.cause == "host_key"
        assert old in changed.reason and server.fingerprint in changed.reason
        assert server.logins == logins


def test_an_untrusted_certificate_is_shown_before_any_login() -> None:
    with CountingServer("https", "basic", answer=RECORDED) as server:
        shown = poll(target(server, ca_file=None))
        assert shown.cause == "host_key"
        assert server.fingerprint in shown.reason and "trust win" in shown.reason
        trusted = connection_to(target(server, ca_file=None)).offered_key(Deadline(TIMEOUT))
        assert trusted == f"certificate SHA256:{server.fingerprint}"
        assert server.logins == 0
        assert poll(target(server, ca_file=None, trusted=trusted)).cause == ""
        server.rotate_certificate()
        changed = poll(target(server, ca_file=None, trusted=trusted))
        assert changed.cause == "host_key"
        old = trusted.removeprefix("certificate ")
        assert old in changed.reason and server.fingerprint in changed.reason and "trust win" in changed.reason


@pytest.mark.parametrize("kind", ["silent", "drip"])
def test_asking_for_the_certificate_again_ends_in_time(kind: Misbehaviour) -> None:
    """The second connection, which only looks at the certificate, can hang as the first could."""

    class Hanging(WSManServer):
        handshakes = 0

        def take_misbehaviour(self, step: str) -> Misbehaviour | None:
            self.handshakes += step == "tls"
            return kind if step == "tls" and self.handshakes == 2 else None

    with Hanging("https", "basic") as server:
        assert poll(target(server, ca_file=None, timeout=1)).cause == "timeout"


def encrypted(certificate: Certificate, passphrase: str) -> Path:
    """A copy of a certificate's key file that needs a passphrase."""
    key = serialization.load_pem_private_key(certificate.key_file.read_bytes(), None)
    path = certificate.key_file.with_name("encrypted.key")
    seal = serialization.BestAvailableEncryption(passphrase.encode())
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, seal))
    return path


def test_client_certificates() -> None:
    with WSManServer("https", "certificate", answer=RECORDED) as server, WSManServer("https", "certificate") as other:
        stranger = target(server, certificate_file=other.client.certificate_file, key_file=other.client.key_file)
        unmapped = poll(stranger)
        assert (unmapped.cause, "map it to an account" in unmapped.reason) == ("protocol", True)
        server.misbehave = {"auth": 401}  # so a host answers that trusts a certificate but has no account for it
        unmapped = poll(target(server))
        assert (unmapped.cause, "map it to an account" in unmapped.reason) == ("auth", True)
        server.misbehave = {}
        key = encrypted(server.client, "open sesame")
        assert poll(target(server, key_file=key, passphrase="open sesame")).cause == ""
        pinned = target(server, ca_file=None, certificate_fingerprint=server.fingerprint)
        assert poll(pinned).cause == ""
        renewed = poll(target(server, key_file=other.client.key_file))
        assert renewed.cause == "protocol", "the other one of the two may be on its way: it does not count at once"
        for file in (key, server.certificate.certificate_file, server.client.certificate_file, other.client.key_file):
            os.utime(file, (0, 0))
        for unusable in (
            target(server, key_file=key, passphrase="wrong sesame"),
            target(server, key_file=key, passphrase=400 * "sesame"),
            target(server, key_file=key),
            target(server, certificate_file="missing.crt"),
            target(server, key_file=other.client.key_file),
        ):
            polled = poll(unusable)
            assert polled.cause == "credential", polled
            assert "sesame" not in polled.reason


def test_a_certificate_that_is_asked_for_after_the_handshake() -> None:
    """As WinRM's listener does under TLS 1.3: it looks at the request first."""
    with WSManServer("https", "certificate", answer=RECORDED) as server:
        server.tls.post_handshake_auth = True
        server.tls.minimum_version = ssl.TLSVersion.TLSv1_3
        assert poll(target(server)).cause == ""


@pytest.mark.parametrize(("hashed", "says"), [(True, "check username, password and auth"), (False, "channel binding")])
def test_a_refused_login_says_that_it_was_not_bound_to_the_channel(hashed: bool, says: str) -> None:
    """A certificate whose signature names no hash has no binding (RFC 5929): a host that demands one refuses."""
    with WSManServer("https", "ntlm", answer=RECORDED) as server:
        server.rotate_certificate(hashed=hashed)
        refused = poll(target(server, password="not the password"))
        assert (refused.cause, says in refused.reason) == ("auth", True)
        assert ("channel binding" in refused.reason) is not hashed


def test_kerberos_needs_no_password(tmp_path: Path) -> None:
    """A keytab does (KRB5_CLIENT_KTNAME); `check` says which package is missing."""
    row = "  - {{name: {0}, hostname: {0}, platform: windows, username: monitor, auth: {0}{1}}}\n"
    rows = row.format("kerberos", "") + row.format("credssp", ", password: p")
    code, said = run_cheaply("--inventory", str(write_inventory(tmp_path, rows)), "check")
    assert code == 0
    for auth, package in (("kerberos", "krb5"), ("credssp", "requests_credssp")):
        absent = importlib.util.find_spec(package) is None and not (auth == "kerberos" and sys.platform == "win32")
        assert (f"{auth}: auth {auth} needs a package: pip install pypsrp[{auth}]" in said) is absent


def test_a_refused_certificate_locks_nothing() -> None:
    with CountingServer("https", "certificate", misbehave={"auth": 401}) as server:
        guards, win = Guards(), target(server)
        guard = guards.of(win)
        assert poll(win, guard).cause == "auth"
        logins = server.logins
        again = poll(win, guard)
        assert (again.cause, "not tried" in again.reason, server.logins > logins) == ("auth", False, True)


@pytest.mark.parametrize("bound", [True, False])
def test_a_login_is_bound_to_the_channel(bound: bool) -> None:
    """Relayed by a host whose certificate is accepted, too, a login still does not work elsewhere."""
    with (
        WSManServer("https", "ntlm", answer=RECORDED, channel_binding=bound) as server,
        WSManServer("https", "ntlm") as mirror,
        man_in_the_middle(server, mirror) as port,
    ):
        assert poll(target(server, port=port, ca_file=mirror.ca_file)).cause == ("auth" if bound else "")


# === Passwords ===============================================================


@pytest.mark.parametrize(("scheme", "auth"), [way for way in WAYS if way[1] != "certificate"])
def test_a_wrong_password_is_tried_once(scheme: str, auth: str) -> None:
    """The resources with the same credential share one guard, whatever their platform; this one was the first."""
    with CountingServer(scheme, auth, answer=RECORDED) as server:
        guards = Guards()
        win, other = (target(server, password="wrong", name=name) for name in ("win", "other"))
        unix = ResourceSettings(
            name="unix", hostname="unix.example.com", username="monitor", password=SecretStr("wrong")
        )
        guard = guards.of(win)
        assert guards.of(other) is guard
        assert guards.of(Target(**{**vars(win), "settings": unix})) is guard
        assert guards.of(target(server)) is not guard
        first = poll(win, guard)
        assert (first.cause, "login as monitor refused" in first.reason) == ("auth", True)
        assert AUTH_BACKOFF - 10 < guard.wait("win") <= AUTH_BACKOFF
        logins = server.logins
        again = poll(win, guard)
        assert (again.cause, "not tried" in again.reason) == ("auth", True)
        assert server.logins == logins
        for name in ("other", "third"):  # one odd host does not speak for its siblings, nor do two
            assert "refused" in poll(target(server, password="wrong", name=name), guard).reason
        logins = server.logins
        fourth = poll(target(server, password="wrong", name="fourth"), guard)
        assert (fourth.cause, "not tried" in fourth.reason, server.logins) == ("auth", True, logins)


def test_a_password_that_a_host_says_again() -> None:
    with WSManServer("http", "ntlm", answer=Answer(errors=(f"no {PASSWORD!r} here",), failed=True)) as server:
        assert "no '***' here" in poll(target(server)).reason


@pytest.mark.parametrize("kind", ["access denied", 403])
def test_an_account_without_the_right_to_a_shell_stops_no_other_host(kind: Misbehaviour) -> None:
    """Its password was right: three such hosts at the first contact wait each for itself."""
    guard = LoginGuard()
    with WSManServer("https", "basic", misbehave={"Create": kind}) as server:
        for name in ("a", "b", "c"):
            assert poll(target(server, name=name), guard).cause == "auth"
            assert guard.wait(name) > 0
    assert guard.wait("d") == guard.refusals == 0


@pytest.mark.long
@pytest.mark.windows
def test_a_host_without_an_answer_is_no_login() -> None:
    """It neither holds up the resources with the same credential nor uses up their one attempt in five minutes."""
    guard = LoginGuard()
    with CountingServer("https", "basic", misbehave={"tls": "silent"}) as dead:
        with ThreadPoolExecutor(1) as pool, WSManServer("https", "basic", answer=RECORDED) as server:
            waiting = pool.submit(poll, target(dead, name="dead", timeout=8), guard)
            assert dead.reached.wait(8)
            polled = poll(target(server), guard)
            assert (polled.cause, waiting.done()) == ("", False)
            assert waiting.result(60).cause == "timeout"
        guard = LoginGuard()
        for name in ("one", "two"):
            guard.refuse(name, ago=AUTH_BACKOFF)
        assert poll(target(dead, name="dead", timeout=1), guard).cause == "timeout"
        assert guard.wait("three") == 0


def traces(secret: str) -> Iterator[str]:
    """The forms in which a secret could be written."""
    yield secret
    for raw in (secret.encode(), f"monitor:{secret}".encode(), secret.encode("utf-16-le")):
        yield base64.b64encode(raw).decode()
        yield raw.hex()


@pytest.mark.parametrize(("scheme", "auth"), [way for way in WAYS if way[1] != "certificate"])
def test_no_log_holds_the_password(scheme: str, auth: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not even that of pypsrp, urllib3 and spnego when all of it is written."""
    wrong = "wrong-Pässword"
    for name in ("pypsrp", "urllib3", "spnego", "requests", ""):
        caplog.set_level(logging.DEBUG, name)
    with WSManServer(scheme, auth, answer=RECORDED) as server:
        reasons = [poll(target(server)).reason, poll(target(server, password=wrong)).reason]
        for kind in ("drop", 503, "not soap", "access denied", "bad xml"):
            server.misbehave = {"Command": kind}
            reasons.append(poll(target(server)).reason)
    names = {record.name.partition(".")[0] for record in caplog.records}
    assert {"pypsrp", "urllib3"} | (set() if auth == "basic" else {"spnego"}) <= names
    text = caplog.text + "".join(reasons)
    assert [trace for secret in (PASSWORD, wrong) for trace in traces(secret) if trace in text] == []


# === The whole service =======================================================


def row(server: WSManServer, more: str, name: str = "win") -> str:
    return (
        f"  - {{name: {name}, platform: windows, hostname: 127.0.0.1, port: {server.port}, auth: {server.auth},"
        f" username: monitor, interval: 1, timeout: 5, rise: 1, {more}}}\n"
    )


def test_certificates_and_passwords_in_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown certificate and a changed one are shown, close the gate, and `trust` opens it while serving."""
    wrong = "not-the-password"
    with CountingServer("https", "ntlm", answer=RECORDED) as server, CountingServer("http", "ntlm") as odd:
        rows = row(server, f"password: {PASSWORD}") + row(
            odd, f"password: {wrong}, tls: 'false', critical: 'false'", "odd"
        )
        rows += row(server, f"password: {PASSWORD}, certificate_fingerprint: '{'0' * 64}', critical: 'false'", "pinned")
        inventory = write_inventory(tmp_path, rows)
        old = server.fingerprint
        with Service(inventory) as service:
            line = service.wait_line("win: unknown -> unhealthy (host_key")
            assert old in line and "trust win" in line
            assert (service.get("/-/readyz").status, server.logins) == (503, 0)
            code, said = run_cheaply("--inventory", str(inventory), "trust", "win", "--yes")
            assert (code, old in said, "no key" in said) == (0, True, True)
            service.wait_status("/-/readyz", 200)
            server.rotate_certificate()
            line = service.wait_line("win: healthy -> unhealthy (host_key")
            assert old in line and server.fingerprint in line
            code, again = run_cheaply("--inventory", str(inventory), "trust", "win", "--yes")
            assert (code, old in again, server.fingerprint in again) == (0, True, True)
            service.wait_status("/-/readyz", 200)
            service.wait_line("odd: unknown -> unhealthy (auth")
            wait_for(lambda: server.polls >= 4)
            assert odd.requests == {}
            assert odd.logins == 3  # one login: a request without a token and two with one
            for name, why in {"pinned": "in the inventory", "odd": "no certificate", "wim": "mean win?"}.items():
                assert main(["--inventory", str(inventory), "trust", name]) == 2
                assert why in capsys.readouterr().err
        assert [secret for secret in (PASSWORD, wrong) if secret in service.output + said + again] == []
