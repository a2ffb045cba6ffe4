"""Polls of a Windows host over what the last one left open: a login and a shell, which die apart.

The host is tests/wsman_server.py, at the end with tests/pwsh.py behind it; the poll is the product's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import no_leaks, wait_for
from pwsh import CONSTRAINED, FULL, Engine, EngineShell, open_engine
from pypsrp.powershell import PowerShell, RunspacePool
from pypsrp.wsman import WSMan
from test_powershell import ACCESS, PASSWORD, RECORDED, CountingServer, target
from test_wsman_server import settings_for
from wsman_server import SHELL_LIMIT, Answer, Script, Shell, WSManServer

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
CLEAN = f"{RECORDED.partition(chr(10))[0]}\n" + json.dumps({"number": 0, "clean": True})
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


def test_a_file_of_the_login_that_cannot_be_read_is_named() -> None:
    with keeping(counting()) as kept:
        kept.good()
        before = kept.connection._settings
        kept.connection._settings = before.model_copy(update={"key_file": Path("x" * 300)})
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


def test_a_last_check_that_ends_the_script_costs_no_shell(polled: Polled) -> None:
    for _ in range(2):
        assert polled.ask(one="'1'", last="'2'; exit 3")["last"] == (False, "exit code 3\n2")
        assert polled.keeps
    assert polled.connection.record.outcomes == {"accepted": 1}


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
PROCESS = {  # the same of what belongs to all of the process, in full language
    "certificates": (
        "[Net.ServicePointManager]::ServerCertificateValidationCallback = { $true }",
        "[Net.ServicePointManager]::ServerCertificateValidationCallback = $null",
    ),
    "protocols": (
        "[Net.ServicePointManager]::SecurityProtocol = 'Tls12'",
        "[Net.ServicePointManager]::SecurityProtocol = 'SystemDefault'",
    ),
    "proxy": (
        "[Net.WebRequest]::DefaultWebProxy = New-Object Net.WebProxy",
        "[Net.WebRequest]::DefaultWebProxy = [Net.WebRequest]::GetSystemWebProxy()",
    ),
    "directory": ("[Environment]::CurrentDirectory = 'C:\\windows'", "[Environment]::CurrentDirectory = 'FOLDER'"),
    "subscriber": (
        "Register-ObjectEvent (New-Object Timers.Timer) Elapsed mine",
        "Get-EventSubscriber | Unregister-Event",
    ),
    "encoding": (
        "$global:OutputEncoding = [Text.Encoding]::Unicode",
        "$global:OutputEncoding = [Text.Encoding]::Default",
    ),
}
GONE = ("Set-StrictMode -Version Latest", "$zz = 1", "function mine { 1 }", "$ErrorActionPreference = 'Stop'", "exit 3")


FOUND = {  # how the next poll would see it
    "function": "Test-Path Function:Get-Service",
    "alias": "Test-Path Alias:Get-Service",
    "environment": "Test-Path Env:LEFT",
    "folder": '"$PWD"',
    "drive": "Test-Path left:",
    "job": "@(Get-Job).Count",
    "strict": '"none$none"',
}


def test_what_checks_change_ends_with_the_poll(engine: Engine) -> None:
    change = {name: make for name, (make, _) in LEFT.items() if name in FOUND}
    change |= {"job": "$null = Register-EngineEvent mine -Action { 1 }", "strict": GONE[0]}
    with WSManServer("https", "negotiate", open_shell=engine.opener(fresh=True)) as server:
        polled = Polled(server, timeout=TIMEOUT)
        before = polled.ask(**FOUND)
        assert polled.keeps
        assert all(good for good, _ in polled.ask(**change).values())
        assert polled.ask(**FOUND) == before
        assert polled.connection.record.second_tries == 0
        polled.connection.close()


@contextlib.contextmanager
def open_pool(server: WSManServer) -> Iterator[RunspacePool]:
    waits = {"operation_timeout": int(TIMEOUT), "read_timeout": 2 * int(TIMEOUT)}
    with WSMan("127.0.0.1", **waits, **settings_for(server)) as wsman, RunspacePool(wsman) as pool:
        yield pool


@pytest.fixture(scope="module")
def pool(host: WSManServer) -> Iterator[RunspacePool]:
    """A shell that goes on whatever is left in it."""
    with open_pool(host) as pool:
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


@pytest.mark.parametrize("left", PROCESS)
def test_what_a_check_changes_in_the_process_is_seen(pool: RunspacePool, left: str) -> None:
    make, mend = PROCESS[left]
    if run_script(pool, "$ExecutionContext.SessionState.LanguageMode") != "FullLanguage":
        pytest.skip("constrained language changes nothing there")
    folder = run_script(pool, "[Environment]::CurrentDirectory")
    assert not is_clean(pool, make, "'x'")
    run_script(pool, f". {{ {mend.replace('FOLDER', folder)} }}")
    assert is_clean(pool, "'x'")


def test_a_session_that_lacks_a_cmdlet_is_polled_and_not_kept(pool: RunspacePool) -> None:
    """A configuration of the host's own may have no more than what a poll used to need."""
    forget = "Remove-Variable HealthChecker -Scope Global"
    run_script(pool, f". {{ Set-Alias Get-PSDrive No-Such-Command -Scope Global; {forget} }}")
    assert not is_clean(pool, "'x'")
    run_script(pool, f". {{ Remove-Item Alias:Get-PSDrive; {forget} }}")
    assert is_clean(pool, "'x'")


def test_what_ends_with_a_check_is_not(pool: RunspacePool) -> None:
    for command in GONE:
        assert is_clean(pool, "'x'", command), command


def programs(mark: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if mark in str(process.info["cmdline"])]


@pytest.fixture
def mark() -> Iterator[str]:
    """A word in the command of programs that would go on for ever."""
    mark = f"hc-left-{os.getpid()}"
    yield mark
    for process in programs(mark):
        process.kill()


def endless(mark: str) -> str:
    return f"'/c', 'for /L %i in (1,0,2) do @rem {mark}'"


def test_programs_that_a_check_leaves_are_ended(pool: RunspacePool, mark: str) -> None:
    """A hundred polls leave none; nor may another poll have the shell, for who knows what else was left."""
    for arguments in (endless(mark), f"'/c', '{CMD}', {endless(mark)}"):
        assert not is_clean(pool, f"Start-Process {CMD} -ArgumentList {arguments}; Start-Sleep 1")
        wait_for(lambda: not programs(mark))
        assert is_clean(pool, "'x'")


def test_however_many_polls_start_a_program_one_is_left(
    engine: Engine, mark: str, often: Callable[[int, int], int]
) -> None:
    with WSManServer("https", "negotiate", open_shell=engine.opener()) as server:
        polled = Polled(server, timeout=TIMEOUT)
        for _ in range(often(2, 100)):
            good, text = polled.ask(starts=f"Start-Process {CMD} -ArgumentList {endless(mark)}")["starts"]
            assert good, text
            assert len(server.shells) <= 1
            wait_for(lambda: len(programs(mark)) <= 1)
        polled.connection.close()
        wait_for(lambda: not programs(mark))


def test_a_program_whose_starter_has_ended_is_seen(pool: RunspacePool, mark: str) -> None:
    """It goes with the shell: WinRM ends all that was started in one."""
    if run_script(pool, "$ExecutionContext.SessionState.LanguageMode") != "FullLanguage":
        pytest.skip("PowerShell 7 says nothing of it in constrained language")
    start = f"Start-Process {CMD} -PassThru -ArgumentList '/c', 'start', '/b', '{CMD}', {endless(mark)}"
    wait = "while (-not $_.HasExited) { Start-Sleep -Milliseconds 50 }"
    assert not is_clean(pool, f"{start} | ForEach-Object {{ {wait} }}; Start-Sleep 1")
    assert programs(mark)
    assert is_clean(pool, "'x'")


def test_programs_of_others_are_not_ended(pool: RunspacePool, mark: str) -> None:
    """Numbers are used again: what an older process with this number started is not the shell's. Here it is older, for
    the shell says that it starts tomorrow."""
    young = "@{ n = 'StartTime'; e = { if ($_.Id -eq $PID) { (Get-Date).AddDays(1) } else { $_.StartTime } } }"
    told = f"Select-Object Id, Name, Parent, SessionId, WorkingSet64, {young}"
    real = "Microsoft.PowerShell.Management\\Get-Process @args"
    run_script(pool, f". {{ function global:Get-Process {{ {real} | {told} }} }}")
    is_clean(pool, f"Start-Process {CMD} -ArgumentList {endless(mark)}; Start-Sleep 1")
    assert programs(mark)
    for process in programs(mark):
        process.kill()
    run_script(pool, ". { Remove-Item Function:Get-Process }")
    assert is_clean(pool, "'x'")


def test_a_process_that_hangs_costs_a_second_try(engine: Engine) -> None:
    with WSManServer("https", "negotiate", open_shell=engine.opener()) as server:
        with open_pool(server):
            kept = Kept(server, timeout=TIMEOUT)
            kept.good()
        (shell,) = server.shells.values()  # and a process waits
        assert isinstance(shell, EngineShell)
        psutil.Process(shell.process.pid).suspend()
        kept.target = target(server, timeout=45)
        kept.good()
        assert kept.connection.record.second_tries == 1
        assert shell.process.poll() is not None  # the shell was deleted
        kept.connection.close()
        wait_for(lambda: not server.shells)


def test_a_process_that_is_killed_costs_a_second_try(engine: Engine) -> None:
    """Between two polls, and while one runs: its check waits for a file to go, and the file goes with the process."""
    flag = engine.folder / "flag"
    waits = f"while (Test-Path '{engine.path(flag)}') {{ Start-Sleep -Milliseconds 50 }}; 'x'"
    with WSManServer("https", "negotiate", open_shell=engine.opener()) as server:
        polled = Polled(server, timeout=TIMEOUT)

        def kill() -> None:
            psutil.Process(polled.process).kill()
            flag.unlink(missing_ok=True)

        def kill_later(asked: int) -> None:
            wait_for(lambda: server.requests["Receive"] > asked)
            kill()

        polled.ask(waits=waits)
        kill()
        assert polled.ask(waits=waits) == {"waits": (True, "x")}
        flag.touch()
        killer = threading.Thread(target=kill_later, args=(server.requests["Receive"],))
        killer.start()
        assert polled.ask(waits=waits) == {"waits": (True, "x")}
        killer.join()
        assert polled.connection.record.second_tries == 2
        assert polled.connection.record.outcomes == {"accepted": 3}
        polled.connection.close()
