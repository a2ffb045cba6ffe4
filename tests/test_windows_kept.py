"""Polls of a Windows host over what the last one left open: a login and a shell, which die apart.

The host is tests/wsman_server.py, at the end with tests/pwsh.py behind it; the poll is the product's own.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
from conftest import no_leaks, wait_for
from pwsh import CONSTRAINED, FULL, Engine, EngineShell, open_engine
from pypsrp.powershell import PowerShell, RunspacePool
from pypsrp.wsman import WSMan
from test_powershell import ACCESS, PASSWORD, RECORDED, CountingServer, target
from test_wsman_server import settings_for
from wsman_server import Answer, Script, WSManServer

import healthchecker
from healthchecker import (
    Check,
    Deadline,
    LoginGuard,
    PowerShellConnection,
    Resolver,
    Sample,
    Verdict,
    WinrmSession,
    build_windows_script,
    poll_once,
)

TIMEOUT = 120.0  # seconds; wine may be slow, and the first poll of a run starts PowerShell for the first time
CLEAN = json.dumps({**json.loads(RECORDED.partition("\n")[0]), "clean": True})
CMD = "C:\\windows\\system32\\cmd.exe"  # PowerShell in wine finds no program without its path


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


# === The connection ==========================================================


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
        wait_for(lambda: time.monotonic() > kept.connection.keeper._due_mono)
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


@pytest.mark.parametrize(
    ("fault", "shells", "tries"),
    [
        (forget_shell, 2, 1),
        (forget_all, 2, 0),
        (want_login, 1, 1),
        (lose_step, 1, 1),
        (drop_command, 1, 1),
        (drop_answer, 2, 1),
        (cut_answer, 2, 1),
        (spoil_answer, 2, 1),
        (die_silently, 1, 1),
    ],
)
def test_no_fault_of_what_was_open_is_one_of_the_host(fault: Callable[[Kept], None], shells: int, tries: int) -> None:
    """And a shell is not given up for its connection, unless it may hold what is left of a poll."""
    with keeping(counting(scheme="http"), timeout=6) as kept:
        kept.good()
        fault(kept)
        kept.good()
        kept.good()
        assert (kept.server.requests["Create"], kept.connection.record.second_tries) == (shells, tries)
        assert kept.connection.record.outcomes == {"accepted": 2}
        assert len(kept.server.shells) == 1


def test_what_fails_twice_is_the_host_s() -> None:
    with keeping(counting()) as kept:
        kept.good()
        kept.server.misbehave = {"Command": "access denied"}
        assert kept.poll()[0].cause == "auth"
        assert kept.connection.record.second_tries == 1
        kept.server.misbehave = {}


def test_a_check_that_is_silent_for_most_of_the_time_runs_once() -> None:
    """Only until it is taken has a script a third of the deadline."""
    with keeping(counting(), timeout=4) as kept:
        kept.good()
        kept.server.answer = Answer(output=(CLEAN,), delay=3.2)
        kept.good()
        assert kept.server.polls == 2


def test_bytes_are_counted_per_poll() -> None:
    with keeping(counting(f"{' ' * 400_000}\n{CLEAN}")) as kept:
        for _ in range(4):
            kept.good()
        assert kept.server.requests["Create"] == 1


@pytest.mark.parametrize("answer", [RECORDED, CLEAN.replace('"clean": true', '"clean": false')])
def test_a_shell_that_is_not_as_before_is_not_used_again(answer: str) -> None:
    """Nor one of which nobody says so."""
    with keeping(counting(answer)) as kept:
        for number in (1, 2):
            kept.good()
            assert (kept.server.requests["Create"], kept.server.requests["Delete"]) == (number, number)
        assert kept.connection.record.second_tries == 0


# === In the engine ===========================================================


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine() as engine:
        yield engine


@pytest.fixture(scope="module", params=(FULL, CONSTRAINED), ids=("full", "constrained"))
def host(engine: Engine, request: pytest.FixtureRequest) -> Iterator[WSManServer]:
    with WSManServer("https", "negotiate", open_shell=engine.opener(request.param)) as server:
        yield server
        wait_for(lambda: not server.shells)


class Polled(Kept):
    """With checks, which may change from poll to poll as they do not in life."""

    def ask(self, timeout: float = 60, **checks: str) -> dict[str, tuple[bool, str]]:
        asked = [{"name": name, "command": command, "timeout": timeout} for name, command in checks.items()]
        self.target = target(self.server, checks=asked, services=["Eventlog"], timeout=TIMEOUT)
        verdict, sample = self.poll()
        assert sample, verdict
        assert sample.services["Eventlog"].good
        assert sample.metrics["disk_percent C:"] == pytest.approx(40.16, abs=0.01)
        return {name: (outcome.good, outcome.text) for name, outcome in sample.checks.items()}

    @property
    def process(self) -> int:
        """The id of the one process on the host."""
        (shell,) = self.server.shells.values()
        assert isinstance(shell, EngineShell)
        return shell.process.pid

    @property
    def keeps(self) -> bool:
        return self.connection.keeper.session is not None


@pytest.fixture
def polled(host: WSManServer) -> Iterator[Polled]:
    polled = Polled(host, timeout=TIMEOUT)
    yield polled
    polled.connection.close()
    wait_for(lambda: not host.shells)  # who ends it does not wait until it has ended


def test_a_shell_serves_one_poll_after_another(polled: Polled) -> None:
    checks = {"one": "$zz = 1; Get-Service Eventlog | Out-Null; '1'", "two": f"{CMD} /c echo 2", "three": '"3$zz"'}
    polled.ask(**checks)
    first = polled.process
    for _ in range(3):
        assert [text.strip() for _, text in polled.ask(**checks).values()] == ["1", "2", "3"]
    assert polled.process == first
    assert polled.connection.record.outcomes == {"accepted": 1}


def test_nothing_of_a_check_is_found_by_the_next_poll(polled: Polled) -> None:
    """As in a shell that is kept: there this one would make all services run."""
    mine = "function global:Get-Service { [pscustomobject]@{ Status = 'Running' } }; function global:mine { 1 }"
    polled.ask(check="'as it was'")
    for _ in range(2):
        assert polled.ask(mine=mine, finds="Test-Path Function:mine") == {"mine": (True, ""), "finds": (True, "True")}
        assert not polled.keeps
        wait_for(lambda: not polled.server.shells)
    assert polled.ask(finds="Test-Path Function:mine")["finds"] == (False, "False")
    assert polled.keeps
    assert polled.connection.record.second_tries == 0


LEFT = {  # what a check leaves, and how it goes
    "function": ("function global:Get-Service { 'mine' }", "Remove-Item Function:Get-Service"),
    "alias": ("Set-Alias Get-Service Get-Date -Scope Global", "Remove-Item Alias:Get-Service"),
    "environment": ("$env:LEFT = 1", "Remove-Item Env:LEFT"),
    "folder": ("Push-Location C:\\windows", "Pop-Location"),
    "drive": ("$null = New-PSDrive left FileSystem C:\\ -Scope Global", "Remove-PSDrive left"),
    "job": ("$null = Start-Job { 1 } | Wait-Job", "Get-Job | Remove-Job"),
    "variable": ("$global:OFS = 1", "Remove-Variable OFS -Scope Global"),
    "preference": ("$global:ErrorActionPreference = 'Stop'", "$global:ErrorActionPreference = 'Continue'"),
    "default": ("$PSDefaultParameterValues['Get-Date:Year'] = 1", "$PSDefaultParameterValues.Clear()"),
}
GONE = ("Set-StrictMode -Version Latest", "$zz = 1", "function mine { 1 }", "$ErrorActionPreference = 'Stop'", "exit 3")


@pytest.fixture(scope="module")
def pool(host: WSManServer) -> Iterator[RunspacePool]:
    """A shell that goes on whatever is left in it."""
    waits = {"operation_timeout": int(TIMEOUT), "read_timeout": 2 * int(TIMEOUT)}
    with WSMan("127.0.0.1", **waits, **settings_for(host)) as wsman, RunspacePool(wsman) as pool:
        assert is_clean(pool, "'x'")
        yield pool


def run_script(pool: RunspacePool, script: str) -> str:
    shell = PowerShell(pool).add_script(script, use_local_scope=True)
    shell.invoke()
    assert not shell.streams.error
    shell.close()
    return "\n".join(map(str, shell.output))


def is_clean(pool: RunspacePool, *commands: str) -> bool:
    """What the last row of a poll with these checks says of the shell."""
    checks = [Check(name=str(number), command=command) for number, command in enumerate(commands)]
    lines = run_script(pool, build_windows_script(["Eventlog"], checks, "")).split("\n")
    return bool(json.loads([line for line in lines if line.startswith("{")][-1])["clean"])


@pytest.mark.parametrize("left", LEFT)
def test_what_a_check_leaves_is_seen(pool: RunspacePool, left: str) -> None:
    make, mend = LEFT[left]
    if left in ("job", "default") and run_script(pool, "$ExecutionContext.SessionState.LanguageMode") != "FullLanguage":
        pytest.skip("constrained language begins no jobs, and does not take a default back")
    assert not is_clean(pool, make, "'x'")
    run_script(pool, f". {{ {mend} }}")
    assert is_clean(pool, "'x'")


def test_what_ends_with_a_check_is_not(pool: RunspacePool) -> None:
    for command in GONE:
        assert is_clean(pool, "'x'", command), command


def test_programs_that_a_check_leaves_are_ended(pool: RunspacePool) -> None:
    """A hundred polls leave none."""
    known = {process.pid for process in psutil.process_iter()}
    start = f"Start-Process {CMD} -ArgumentList '/c', 'pause'"
    for _ in range(3):
        assert is_clean(pool, start)
    wait_for(lambda: not [process for process in psutil.process_iter(["cmdline"])
                          if process.pid not in known and "pause" in (process.info["cmdline"] or [])])  # fmt: skip
