"""This machine as a resource, where it is Windows: polls through a powershell.exe that is kept, and its verdicts.

In wine PowerShell's own pwsh.exe stands for it (tests/windows_python.py); the poll is the product's own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from conftest import no_leaks, wait_for
from pwsh import COMPILED
from test_powershell import ACCESS
from test_windows_verdicts import CASES, CMD, TIMEOUT, Case, commands, rows
from windows_python import FOLDER, Unavailable, unpack_powershell

import healthchecker
from healthchecker import (
    LocalPowerShell,
    LocalSession,
    LoginGuard,
    LoginRecord,
    ResourceSettings,
    Sample,
    Target,
    connection_view,
    poll_once,
)

pytestmark = pytest.mark.skipif(sys.platform != "win32", reason="powershell.exe is Windows' own")
ASKED = "in NonInteractive mode"  # as those who ask are told there
OTHERWISE = {"Read-Host": ASKED, "credential": ASKED, "confirm": ASKED}
PYTHON = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
from test_windows_local import Local
Local().ask(starts={command!r})
"""
ENDLESS = "for /L %i in (1,0,2) do @rem"


class Local:
    """This machine with its connection, as a poller has them."""

    def __init__(self, **settings: Any) -> None:
        given = {"name": "here", "hostname": "localhost", "platform": "local", "timeout": TIMEOUT} | settings
        known: dict[str, Any] = {field.name: "" for field in fields(Target)}
        self.target = Target(**known | {"settings": ResourceSettings.model_validate(given), "host_key": None})
        self.access = replace(ACCESS, keeps=True, records={}, watched={})
        self.connection = self.access.watched["here"] = LocalPowerShell(self.target, LoginGuard(), self.access)

    def poll(self, **settings: Any) -> Sample:
        """With settings that change from poll to poll, as they do not in life."""
        given = self.target.settings.model_dump(exclude_unset=True) | settings
        self.target = replace(self.target, settings=ResourceSettings.model_validate(given))
        verdict, sample = poll_once(self.target, self.connection, None)
        assert sample, verdict
        assert "disk_percent C:" in sample.metrics
        return sample

    def ask(self, timeout: float = 60, within: float = TIMEOUT, **checks: str) -> dict[str, tuple[bool, str]]:
        asked = rows(checks, **dict.fromkeys(checks, timeout))
        sample = self.poll(checks=asked, services=["Eventlog"], timeout=within)
        assert sample.services["Eventlog"].good
        return {name: (outcome.good, outcome.text) for name, outcome in sample.checks.items()}

    @property
    def session(self) -> LocalSession:
        session = self.connection.keeper.session
        assert isinstance(session, LocalSession)
        return session

    @property
    def process(self) -> psutil.Process:
        assert self.session._process
        return psutil.Process(self.session._process.pid)

    @property
    def keeps(self) -> bool:
        return self.connection.keeper.session is not None

    @staticmethod
    def processes() -> list[int]:
        """What this process has started, and what those have."""
        return [process.pid for process in psutil.Process().children(recursive=True)]


@pytest.fixture(scope="module", autouse=True)
def _powershell() -> Iterator[None]:
    """That of wine does nothing, so there PowerShell 7 has its name."""
    try:
        engine = unpack_powershell(FOLDER)
    except Unavailable as missing:
        pytest.skip(str(missing))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(healthchecker, "CLEANUP_TIME", 60.0)  # for a busy machine
        if engine.name.lower() != "powershell.exe":
            named, fresh = engine.with_name("powershell.exe"), engine.with_name(f"powershell.{os.getpid()}")
            if not named.exists():
                shutil.copy(engine, fresh)
                fresh.replace(named)
            modules = Path(__file__).with_name("modules")
            patch.setenv("PATH", str(engine.parent), prepend=os.pathsep)
            patch.setenv("PSModulePath", str(modules))
            patch.setenv("HC_CIM", str(modules / "CimCmdlets" / "cim.json"))
        first = Local()
        first.ask(check="$true")  # with the programs that wine starts once
        first.connection.close()
        yield


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with no_leaks():
        yield
    wait_for(lambda: not Local.processes())


@pytest.fixture
def local() -> Iterator[Local]:
    local = Local()
    yield local
    local.connection.close()


# === Verdicts ================================================================
ENDED = [case.name for case in CASES if re.search(r"(?<!/c )\bexit \d'?", case.command)]  # each costs a process
LOWER = "$ExecutionContext.SessionState.LanguageMode = 'ConstrainedLanguage'; "


@pytest.fixture(scope="module", params=("FullLanguage", "ConstrainedLanguage"))
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those of the cases, as the checks of one poll. In constrained language no process stays for another one."""

    def write(name: str, text: str) -> str:
        (folder / name).write_text(text, encoding="utf-8")
        return str(folder / name)

    folder = tmp_path_factory.mktemp("plugins")
    asked = commands(write)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ConstrainedLanguage":
            patch.setattr(LocalSession, "READER", LOWER + LocalSession.READER)
            asked = {name: command for name, command in asked.items() if name not in ENDED[1:]}
        local = Local()
        said = local.poll(checks=rows({**asked, "language": "[string]$ExecutionContext.SessionState.LanguageMode"}))
        assert said.checks["language"].text == request.param
        assert local.keeps == (request.param == "FullLanguage")
        assert (local.connection.record.second_tries, local.connection._deaths) == (0, 0)
        local.connection.close()
    return said.checks  # the language is every other test's own again


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_verdict(case: Case, outcomes: Any) -> None:
    if case.name in ENDED[1:] and case.name not in outcomes:
        return  # asked in full language alone
    outcome = outcomes[case.name]
    text = OTHERWISE.get(case.name, case.text)
    assert (outcome.good, outcome.degraded, text in outcome.text) == (case.good, case.degraded, True), outcome


# === One process =============================================================


def test_one_process_serves_poll_after_poll(local: Local, often: Callable[[int, int], int]) -> None:
    """Each script in a scope of its own, and what a check starts finds the end on stdin, as in a new process."""
    reads = f"{CMD} /c 'set /p x=& echo read'"
    asked = {"one": "$zz = 1; $nonce = 1; '1'", "two": reads, "three": '"3$zz"'}
    local.ask(**asked)
    first, started = local.process.pid, local.processes()
    assert len(started) <= 2  # with its console
    for _ in range(often(3, 100)):
        assert [text.strip() for _, text in local.ask(**asked).values()] == ["1", "read", "3"]
        assert local.process.pid == first and local.processes() == started
        assert local.connection.keeper.reused
    assert local.connection.record == LoginRecord()
    shown = connection_view(cast(Any, SimpleNamespace(connections=local.access)), "here")
    assert shown and shown.opened and shown.kept and shown.logins == 0
    assert local.session._process
    assert "Get-Service" not in str(local.session._process.args)


def test_a_script_is_compiled_once(local: Local) -> None:
    """It is the same at each poll: the nonce is no part of it. Only PowerShell 7 can be asked so."""
    before = local.ask(known=COMPILED)
    assert local.ask(known=COMPILED) == before or "null" in before["known"][1]
    assert local.keeps


def test_without_keep_each_poll_has_its_own() -> None:
    local = Local(keep=False)
    local.ask(check="$true")
    assert not local.keeps and not local.processes()


def test_what_a_check_leaves_is_found_by_no_poll(local: Local) -> None:
    """Functions, and programs."""
    mine = "function global:Get-Service { [pscustomobject]@{ Status = 'Running' } }"
    local.ask(mine=mine, starts=f"Start-Process {CMD} -ArgumentList '/c', '{ENDLESS}'; Start-Sleep 1")
    assert not local.keeps
    wait_for(lambda: not local.processes())
    assert local.ask(finds="Test-Path Function:Get-Service")["finds"] == (False, "False")
    assert local.connection.record.second_tries == 0


def test_checks_that_take_the_process_along(local: Local) -> None:
    """Also one that was there before: those behind them run in another one."""
    local.ask(exits="'a'", sleeps="'b'", last="'c'")
    first = local.process.pid
    said = local.ask(exits="'said'; exit 3", sleeps=f"{CMD} /c '{ENDLESS}'", last="'x'", timeout=10)
    assert said == {"exits": (False, "exit code 3\nsaid"), "sleeps": (False, "no end in 10 s"), "last": (True, "x")}
    assert local.connection.record.second_tries == 0
    assert local.process.pid != first
    wait_for(lambda: len(local.processes()) <= 2)


def test_what_else_prints_is_not_heard(local: Local) -> None:
    """Rows without the poll's nonce in a poll; between two polls whatever it is, and then the process goes."""
    forged = '{"number": 1, "name": "check", "good": true, "text": "forged"}'
    assert local.ask(check=f"[Console]::Out.WriteLine('{forged}'); $false") == {"check": (False, "False")}
    first = local.process.pid
    assert local.session._pipe
    local.session._send(local.session._pipe, f"'{forged}'")
    wait_for(lambda: local.session.stale)
    assert local.ask(check="$false") == {"check": (False, "False")}
    assert local.process.pid != first
    assert local.connection.record.second_tries == 0


def test_a_process_that_fails_costs_a_second_try(local: Local, tmp_path: Path) -> None:
    """Killed between two polls it costs none; killed in a poll, or where it hangs, one within the same deadline."""
    flag, begun = tmp_path / "flag", tmp_path / "begun"
    waits = f"$null > '{begun}'; while (Test-Path '{flag}') {{ Start-Sleep -Milliseconds 50 }}; 'x'"

    def kill_later(process: psutil.Process) -> None:
        wait_for(begun.exists, TIMEOUT)
        process.kill()
        flag.unlink()

    local.ask(waits=waits)
    local.process.kill()
    wait_for(lambda: not local.session.alive)
    assert local.ask(waits=waits) == {"waits": (True, "x")}
    assert local.connection.record.second_tries == 0
    begun.unlink()
    flag.touch()
    killer = threading.Thread(target=kill_later, args=(local.process,))
    killer.start()
    assert local.ask(waits=waits) == {"waits": (True, "x")}
    killer.join()
    assert local.connection.record.second_tries == 1
    local.process.suspend()
    assert local.ask(waits=waits, within=60) == {"waits": (True, "x")}
    assert local.connection.record.second_tries == 2


def test_a_poll_that_is_late_leaves_nothing(local: Local) -> None:
    local.ask(check="'x'")
    said = local.ask(check=f"{CMD} /c '{ENDLESS}'", within=20)
    assert said == {"check": (False, "no end when the poll's time was over")}
    assert not local.keeps
    wait_for(lambda: not local.processes())


def test_all_of_it_ends_when_this_process_is_killed() -> None:
    """Which it cannot see to itself."""
    script = PYTHON.format(tests=str(Path(__file__).parent), command=f"{CMD} /c '{ENDLESS}'")
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        wait_for(lambda: len(psutil.Process(other.pid).children(recursive=True)) > 2, TIMEOUT)
        left = psutil.Process(other.pid).children(recursive=True)
        other.kill()
        psutil.wait_procs(left, 60)
        assert not [process for process in left if process.is_running()]
