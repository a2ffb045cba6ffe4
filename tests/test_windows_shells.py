"""Polls in one shell of a real PowerShell: what its checks leave there, and what becomes of its process.

The host is tests/wsman_server.py with tests/pwsh.py behind it; the poll is the product's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import psutil
import pytest
from conftest import wait_for
from pwsh import COMPILED, CONSTRAINED, FULL, Engine, EngineShell
from pypsrp.powershell import PowerShell, RunspacePool
from pypsrp.wsman import WSMan
from test_powershell import target
from test_probes import wanting
from test_windows_kept import (
    Kept,
    drop_answer,
    lose_step,
    shells_of_others,
    want_login,
    want_login_later,
)
from test_wsman_server import settings_for
from wsman_server import SHELL_LIMIT, WSManServer

import healthchecker
from healthchecker import CHECK_BYTES, Platform, build_windows_script

TIMEOUT = 120.0  # seconds; wine may be slow, and the first poll of a run starts PowerShell for the first time
CMD = "C:\\windows\\system32\\cmd.exe"  # PowerShell in wine finds no program without its path


@pytest.fixture(autouse=True)
def _ample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine has time to delete a shell, and to look at what is left in one."""
    monkeypatch.setattr(healthchecker, "SHELL_END", 60.0)
    monkeypatch.setattr(healthchecker, "CLEANUP_TIME", 60.0)


@pytest.fixture(scope="module", params=(False, True), ids=("full", "constrained"))
def constrained(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def host(engine: Engine, constrained: bool) -> Iterator[WSManServer]:
    with WSManServer(
        "https", "negotiate", open_shell=engine.opener(CONSTRAINED if constrained else FULL)
    ) as server:
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
    """Nor does a last check that ends the script cost it."""
    checks = {"one": "$zz = 1; Get-Service Eventlog | Out-Null; '1'", "two": f"{CMD} /c echo 2", "three": '"3$zz"',
              "last": "'4'; exit 3"}  # fmt: skip
    polled.ask(**checks)
    first = polled.process
    for _ in range(2):
        said = polled.ask(**checks)
        assert polled.keeps
        assert said.pop("last") == (False, "exit code 3\n4")
        assert [text.strip() for _, text in said.values()] == ["1", "2", "3"]
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


PROGRESS = "1..6000 | ForEach-Object { Write-Progress -Activity ('x' * 300) -PercentComplete 1 }"


def test_progress_of_a_check_costs_no_other(polled: Polled, engine: Engine) -> None:
    """It goes past what the check prints. Functions of a module do not see the preference of who calls them."""
    module = engine.write("progress.psm1", f"function Show-Progress {{ {PROGRESS} }}")
    floods = {"before": "'1'", "floods": f"$ProgressPreference = 'Continue'; {PROGRESS}", "after": "'2'"}
    flood = (False, f"sends more than {CHECK_BYTES >> 10} KiB")
    for _ in range(2):
        assert polled.ask(module=f"Import-Module '{module}'; Show-Progress; 'x'") == {"module": (True, "x")}
        assert polled.keeps
        assert polled.ask(**floods, again=floods["floods"]) == {
            "before": (True, "1"), "floods": flood, "after": (True, "2"), "again": flood}  # fmt: skip
        assert not polled.keeps
    assert polled.connection.record.second_tries == 0


def test_a_script_is_compiled_once(polled: Polled, engine: Engine, constrained: bool) -> None:
    """PowerShell 7 shows which texts it knows; there is no looking at it in constrained language."""
    if constrained or engine.five:
        return
    polled.ask(check="'x'")
    known = run_script(polled.session.pool, COMPILED)
    for _ in range(2):
        polled.ask(check="'x'")
        assert run_script(polled.session.pool, COMPILED) == known != "0"
    assert polled.connection.record.outcomes == {"accepted": 1}


TAMPERING = {  # with what a poll is made of
    "functions": "Remove-Item Function:Row, Function:Line, Function:Unchanged",
    "asked": """$wanted.checks[0].command = "'mine'"; $wanted.services = @()""",
    "block": "(Get-Item Function:Row).ScriptBlock.DebuggerHidden = $true; (Get-Item Function:Row).Options = 'ReadOnly'",
    "caller": "1..9 | ForEach-Object { Set-Variable args \"'mine'\" -Scope $_ -ErrorAction SilentlyContinue }",
    "runs it": "Set-Alias Invoke-Expression Write-Output -Scope Global -Force",
    "names it": "function global:Invoke-Expression { }",
}


@pytest.mark.long
@pytest.mark.parametrize("tampering", TAMPERING)
def test_what_a_check_does_to_its_poll_changes_no_later_one(polled: Polled, tampering: str) -> None:
    """Whatever is said of that poll itself. The engine keeps what it has compiled under the whole text."""
    polled.ask(check="'as it was'")
    for check in (TAMPERING[tampering], f"{TAMPERING[tampering]}; exit 0"):
        polled.ask(check=check)
        assert polled.ask(check="'as it was'") == {"check": (True, "as it was")}


# All services run from here on, where this type is a service's or one that it comes from.
RUNS = "Update-TypeData -TypeName {} -MemberType ScriptProperty -MemberName Status -Value {{ 'Running' }} -Force"
COMPONENT, SERVICE = "System.ComponentModel.Component", "System.ServiceProcess.ServiceController"
LEFT = {  # what a check leaves, and how it goes
    "function": ("function global:Get-Service { 'mine' }", "Remove-Item Function:Get-Service"),
    "alias": ("Set-Alias Get-Service Get-Date -Scope Global", "Remove-Item Alias:Get-Service"),
    "environment": ("$env:LEFT = 1", "Remove-Item Env:LEFT"),
    "folder": ("Push-Location C:\\windows", "Pop-Location"),
    "drive": ("$null = New-PSDrive left FileSystem C:\\ -Scope Global", "Remove-PSDrive left"),
    "job": ("$null = Start-Job { 1 } | Wait-Job", "Get-Job | Remove-Job"),
    "variable": ("$global:OFS = 1", "Remove-Variable OFS -Scope Global"),
    "preference": ("$global:ErrorActionPreference = 'Stop'", "$global:ErrorActionPreference = 'Continue'"),
    "type": (RUNS.format(COMPONENT), f"Remove-TypeData -TypeName {COMPONENT}"),
    "default": ("$PSDefaultParameterValues['Get-Date:Year'] = 1", "$PSDefaultParameterValues.Clear()"),
}
PROCESS = {  # the same of what belongs to all of the process, in full language
    "certificates": (
        "[Net.ServicePointManager]::ServerCertificateValidationCallback = { $true }",
        "[Net.ServicePointManager]::ServerCertificateValidationCallback = $null",
    ),
    "proxy": (
        "[Net.WebRequest]::DefaultWebProxy = New-Object Net.WebProxy",
        "[Net.WebRequest]::DefaultWebProxy = [Net.WebRequest]::GetSystemWebProxy()",
    ),
    "directory": ("[Environment]::CurrentDirectory = 'C:\\windows'", "[Environment]::CurrentDirectory = $before"),
    "subscriber": (
        "Register-ObjectEvent (New-Object Timers.Timer) Elapsed mine",
        "Get-EventSubscriber | Unregister-Event",
    ),
    "encoding": (
        "$global:OutputEncoding = [Text.Encoding]::Unicode",
        "$global:OutputEncoding = [Text.Encoding]::Default",
    ),
    "console": ("[Console]::OutputEncoding = [Text.Encoding]::Unicode", "$console.SetValue($null, $shown)"),
    **{
        action: (f"$ExecutionContext.InvokeCommand.{action}Action = {{ }}",
                 f"$ExecutionContext.InvokeCommand.{action}Action = $null")
        for action in ("PreCommandLookup", "PostCommandLookup", "CommandNotFound")
    },
}
# Where .NET keeps what the console's encoding is: not even asked for by who polls, for that settles it.
CONSOLE = """$console = [Console].GetFields('NonPublic, Static') | Where-Object Name -like '*outputEncoding'
    $shown = $console.GetValue($null)"""
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


def test_no_check_speaks_for_the_services_of_the_next_poll(polled: Polled) -> None:
    """In the shell that the check ran in, every service would run until the next login."""
    for command in ("'x'", RUNS.format(SERVICE), "'x'"):
        check = {"name": "check", "command": command, "timeout": 60}
        polled.target = target(polled.server, checks=[check], services=["BITS"], timeout=TIMEOUT)
        verdict, sample = polled.poll()
        assert sample and sample.checks["check"].good, verdict
        assert sample.services["BITS"].text == "Stopped"
        assert polled.keeps == (command == "'x'")


@pytest.mark.long
def test_what_checks_change_ends_with_the_poll(engine: Engine) -> None:
    """The first shell has a process of its own, which ends with it, as on a host."""
    change = {name: make for name, (make, _) in LEFT.items() if name in FOUND}
    change |= {"job": "$null = Register-EngineEvent mine -Action { 1 }", "strict": GONE[0]}
    with WSManServer("https", "negotiate", open_shell=engine.opener(fresh=True)) as server:
        polled = Polled(server, timeout=TIMEOUT)
        before = polled.ask(**FOUND)
        server.open_shell = engine.opener()
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


def run_script(pool: RunspacePool, script: str) -> str:
    shell = PowerShell(pool).add_script(script, use_local_scope=True)
    shell.invoke()
    assert not shell.streams.error
    shell.close()
    return "\n".join(map(str, shell.output))


def after(pool: RunspacePool, *steps: str | Sequence[str]) -> list[bool]:
    """What polls say of the shell at their ends. A step is the checks of one, or what is run between two. The script is
    a poll's behind its first row, compiled once for all of them."""
    nothing = json.dumps({"services": [], "checks": [], "mounts": []})
    script = build_windows_script(wanting(Platform.WINDOWS), first=1)
    assert script.count(f"'{nothing}'") == 1
    lines = ["$poll = {", script.replace(f"'{nothing}'", "$args[0]"), "}"]
    for step in steps:
        if isinstance(step, str):
            lines.append(f". {{ {step} }}")
        else:
            wanted = json.dumps({"checks": [{"name": name, "command": name} for name in step]})
            lines.append("& $poll '{}'".format(wanted.replace("'", "''")))
    said = run_script(pool, "\n".join(lines)).split("\n")
    return [bool(json.loads(line)["clean"]) for line in said if '"clean":' in line]


def is_clean(pool: RunspacePool, *commands: str) -> bool:
    """What a poll with these checks says of the shell."""
    (clean,) = after(pool, commands)
    return clean


@pytest.fixture(scope="module")
def pool(host: WSManServer) -> Iterator[RunspacePool]:
    """A shell that goes on whatever is left in it."""
    with open_pool(host) as pool:
        assert is_clean(pool, "'x'")
        yield pool


HARMLESS = {"job", *PROCESS} - {"encoding"}  # what changes nothing in constrained language


@pytest.fixture(scope="module")
def changed(host: WSManServer, constrained: bool) -> dict[str, list[bool]]:
    """What is said of a shell behind each change, and once that is taken back. The last one cannot be taken back in
    constrained language."""
    steps, number = list[str | Sequence[str]](), dict[str, int]()
    for name, (make, mend) in (PROCESS | LEFT).items():
        steps.append([make, "'x'"])
        number[name] = 1
        if not (constrained and name in HARMLESS | {"default"}):
            steps += [mend, ["'x'"]]
            number[name] = 2
    with open_pool(host) as pool:
        mode = run_script(pool, "$ExecutionContext.SessionState.LanguageMode")
        assert mode == ("ConstrainedLanguage" if constrained else "FullLanguage")
        before = "$before = '{}'".format(run_script(pool, "[Environment]::CurrentDirectory"))
        said = iter(after(pool, before if constrained else f"{before}; {CONSOLE}", *steps))
        return {name: [next(said) for _ in range(count)] for name, count in number.items()}


@pytest.mark.long
@pytest.mark.parametrize("left", [*LEFT, *PROCESS])
def test_what_a_check_leaves_is_seen(changed: dict[str, list[bool]], constrained: bool, left: str) -> None:
    if constrained and left in HARMLESS:
        assert changed[left] == [True]
    else:
        assert changed[left] == [False, True][: 1 if constrained and left == "default" else 2]


def test_what_ends_with_a_check_is_not(pool: RunspacePool) -> None:
    assert after(pool, *(["'x'", command] for command in GONE)) == [True] * len(GONE)


def test_protocols_of_tls_are_put_back(pool: RunspacePool, constrained: bool) -> None:
    """Scripts for 5.1 set them again and again: each poll would want a shell of its own."""
    net = "[Net.ServicePointManager]::SecurityProtocol"
    before = "" if constrained else run_script(pool, f'"{{$({net})}}"')
    for _ in range(2):
        assert is_clean(pool, f"{net} = 'Tls12'; {net}")
        assert constrained or run_script(pool, f'"{{$({net})}}"') == before


def test_a_session_that_lacks_a_cmdlet_is_polled_and_not_kept(pool: RunspacePool) -> None:
    """A configuration of the host's own may have no more than what a poll used to need."""
    forget, check = "Remove-Variable HealthChecker -Scope Global", ["'x'"]
    lacks = f"Set-Alias Get-Job No-Such-Command -Scope Global; {forget}"
    assert after(pool, lacks, check, f"Remove-Item Alias:Get-Job; {forget}", check) == [False, True]


def test_a_shell_that_has_grown_by_much_is_not_used_again(pool: RunspacePool) -> None:
    """As if it had been so much smaller when its first poll ended; what a check allocates no other test would lose."""
    for grown, clean in (("40MB", True), ("110MB", False)):
        run_script(pool, f"$HealthChecker.size -= {grown}")
        assert is_clean(pool, "'x'") is clean
        run_script(pool, f"$HealthChecker.size += {grown}")
    assert is_clean(pool, "'x'")


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
    for arguments, wait in ((endless(mark), ""), (f"'/c', '{CMD}', {endless(mark)}", "; Start-Sleep 1")):
        assert not is_clean(pool, f"Start-Process {CMD} -ArgumentList {arguments}{wait}")
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


def test_a_program_whose_starter_has_ended_is_seen(pool: RunspacePool, mark: str, constrained: bool) -> None:
    """It goes with the shell: WinRM ends all that was started in one. PowerShell 7 says nothing of it in constrained
    language."""
    start = f"Start-Process {CMD} -PassThru -ArgumentList '/c', 'start', '/b', '{CMD}', {endless(mark)}"
    wait = "while (-not $_.HasExited) { Start-Sleep -Milliseconds 50 }"
    assert is_clean(pool, f"{start} | ForEach-Object {{ {wait} }}") == constrained
    assert programs(mark)
    assert is_clean(pool, "'x'")


def test_programs_of_others_are_not_ended(pool: RunspacePool, mark: str) -> None:
    """Numbers are used again: what an older process with this number started is not the shell's. Here it is older, for
    the shell says that it starts tomorrow."""
    young = "@{ n = 'StartTime'; e = { if ($_.Id -eq $PID) { (Get-Date).AddDays(1) } else { $_.StartTime } } }"
    told = f"Select-Object Id, Name, Parent, SessionId, WorkingSet64, {young}"
    real = "Microsoft.PowerShell.Management\\Get-Process @args"
    run_script(pool, f". {{ function global:Get-Process {{ {real} | {told} }} }}")
    is_clean(pool, f"Start-Process {CMD} -ArgumentList {endless(mark)}")
    assert programs(mark)
    for process in programs(mark):
        process.kill()
    run_script(pool, ". { Remove-Item Function:Get-Process }")
    assert is_clean(pool, "'x'")


@pytest.mark.long
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


def delete_shells(polled: Kept) -> None:
    """As the host does whose shells have been idle for too long."""
    for shell in list(polled.server.shells.values()):
        if isinstance(shell, EngineShell):
            polled.server.shells.pop(shell.id).close()


@pytest.mark.long
def test_no_fault_of_the_way_to_a_shell_is_one_of_the_host(engine: Engine) -> None:
    """Those of tests/test_windows_kept.py that take no time, while others have all shells but one."""
    with WSManServer("http", "ntlm", open_shell=engine.opener()) as server:
        polled, good = Polled(server, timeout=TIMEOUT), {"check": (True, "x")}
        assert polled.ask(check="'x'") == good
        for number, fault in enumerate((delete_shells, want_login, want_login_later, lose_step, drop_answer), 1):
            with shells_of_others(server, SHELL_LIMIT - 1):
                fault(polled)
                assert polled.ask(check="'x'") == polled.ask(check="'x'") == good
                assert (polled.connection.record.second_tries, polled.keeps) == (number, True), fault
                assert len(server.shells) == SHELL_LIMIT
        polled.connection.close()
        wait_for(lambda: not server.shells)
