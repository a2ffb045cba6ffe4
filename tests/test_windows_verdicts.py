"""What a check says, in a real PowerShell: the table of verdicts, in full and in constrained language.

The host is tests/wsman_server.py with tests/pwsh.py behind it; the poll is the product's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from pwsh import CONSTRAINED, FULL, Engine, open_engine
from test_powershell import Polled, poll, target
from wsman_server import WSManServer

TIMEOUT = 120.0  # seconds; wine may be slow, and the first poll of a run starts PowerShell for the first time
CMD = "C:\\windows\\system32\\cmd.exe"  # PowerShell in wine finds no program without its path


class Case(NamedTuple):
    """A check: its command, and what it has to say."""

    name: str
    command: str
    good: bool
    text: str


CASES = (
    Case("exit code", "CMD /c exit 3", False, "exit code 3"),
    Case("exit code, output", "CMD /c exit 3; 'done'", False, "exit code 3\ndone"),
    Case("forgiven", "CMD /c exit 3; 'done'; $global:LASTEXITCODE = 0", True, "done"),
    Case("script file", "& PLUGIN", False, "exit code 3\nsome output"),
    Case("after it", "'still here'", True, "still here"),
    Case("stderr", 'CMD /c "echo warn>&2"', True, "warn"),
    Case("stderr, exit code", 'CMD /c "echo bad>&2& exit 2"', False, "exit code 2\nbad"),
    Case("Write-Error", "Write-Error e; 'after'", False, "e\nafter"),
    Case("Get-Item", "Get-Item C:\\nope; 'after'", False, "Cannot find path"),
    Case("silenced", "Get-Item C:\\nope -ErrorAction SilentlyContinue; 'fine'", True, "fine"),
    Case("caught", "try { throw 'no' } catch { 'caught' }", True, "caught"),
    Case("throw", "throw 'thrown'", False, "thrown"),
    Case("syntax", "if (", False, "Missing"),
    Case("unknown command", "No-Such-Command", False, "No-Such-Command"),
    Case("Read-Host", "Read-Host", False, "does not support user interaction"),
    Case("credential", "Get-Credential", False, "does not support user interaction"),
    Case("confirm", "Remove-Item Env:\\TEMP -Confirm", False, "does not support user interaction"),
    Case("break", "'a'; break; 'never'", True, "a"),
    Case("return", "return 4; 'never'", True, "4"),
    Case("false", "'x'; $false", False, "False"),
    Case("exit", "'said'; exit 3", False, "exit code 3\nsaid"),
    Case("exit 0", "'said'; exit 0", True, "said"),
    Case("exit inside", "& { Invoke-Expression 'exit 4' }", False, "exit code 4"),
    Case("leaves", "$zz = 1; $ErrorActionPreference = 'Stop'; $true", True, "True"),
    Case("finds", '"zz=$zz $ErrorActionPreference $r"', True, "zz= Continue"),
    Case("lines", "1..1000", True, "1\n2\n3"),
    Case("long", "'x' * 100000", True, "x" * 200),
    Case("host", "Write-Host shown; Write-Warning w", True, "shown"),
    Case("table", "Get-Service Eventlog", True, "Running"),
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine() as engine:
        yield engine


@pytest.fixture(scope="module", params=(FULL, CONSTRAINED), ids=("full", "constrained"))
def host(engine: Engine, request: pytest.FixtureRequest) -> Iterator[WSManServer]:
    with WSManServer("https", "negotiate", open_shell=engine.opener(request.param), shell_limit=4) as server:
        yield server
        assert server.shells == {}


def ask(host: WSManServer, checks: dict[str, str], *, seconds: float = 30.0, timeout: float = TIMEOUT) -> Polled:
    """One poll with these checks."""
    rows = [{"name": name, "command": command, "timeout": seconds} for name, command in checks.items()]
    polled = poll(target(host, checks=rows, services=["Eventlog"], timeout=timeout))
    assert polled.sample, polled.verdict
    assert polled.sample.services["Eventlog"].good
    assert polled.sample.metrics["disk_percent C:"] == pytest.approx(40.16, abs=0.01)
    return polled


def outcomes(polled: Polled) -> dict[str, tuple[bool, str]]:
    assert polled.sample
    return {name: (outcome.good, outcome.text) for name, outcome in polled.sample.checks.items()}


@pytest.fixture(scope="module")
def polled(host: WSManServer, engine: Engine) -> Polled:
    """All cases as the checks of one poll."""
    plugin = engine.write("plugin.ps1", "'some output'\nexit 3\n")
    return ask(host, {case.name: case.command.replace("PLUGIN", plugin).replace("CMD", CMD) for case in CASES})


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_verdict(case: Case, polled: Polled) -> None:
    good, text = outcomes(polled)[case.name]
    assert (good, case.text in text) == (case.good, True), text


def test_each_bad_check_is_a_reason(polled: Polled) -> None:
    assert (polled.verdict.state, polled.cause) == ("unhealthy", "check")
    assert polled.reason.startswith("check exit code: exit code 3; check exit code, output: exit code 3 done; ")


def test_a_stuck_check_delays_no_other_and_not_the_next_poll(host: WSManServer) -> None:
    """Nor does one that ends its own shell: the lines that came count."""
    checks = {"first": "$true", "sleeps": "Start-Sleep 600", "kills": "Stop-Process -Id $PID -Force", "last": "'x'"}
    for _ in range(2):
        said = outcomes(ask(host, checks, seconds=5))
        assert said["sleeps"] == (False, "no end in 5 s")
        assert said["kills"][0] is False and "closed the shell" in said["kills"][1]
        assert (said["first"], said["last"]) == ((True, "True"), (True, "x"))
