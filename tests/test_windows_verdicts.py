"""What a check says, in a real PowerShell: the table of verdicts, in full and in constrained language.

The host is tests/wsman_server.py with tests/pwsh.py behind it; the poll is the product's own, and for the table the
inventory before it and the API behind it, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from conftest import wait_for
from console import NAME, console, local_console
from pwsh import CONSTRAINED, FULL, NOBODY, Engine, EngineShell
from test_powershell import PASSWORD, Polled, poll, target, windows
from wsman_server import WSManServer

TIMEOUT = 120.0  # seconds; wine may be slow, and the first poll of a run starts PowerShell for the first time
CMD = "C:\\windows\\system32\\cmd.exe"  # PowerShell in wine finds no program without its path
README = Path(__file__).parent.parent / "README.md"
WATCHED = pytest.mark.skipif(sys.platform == "win32", reason="/proc is read")


class Case(NamedTuple):
    """A check: its command, and what it has to say. Plugins of Nagios are called so."""

    name: str
    command: str
    good: bool
    text: str
    degraded: bool = False


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
    Case("nagios script", "& WARNING", True, "slow", degraded=True),
    Case("nagios program", "CMD /c exit 2", False, "exit status 2"),
    Case("nagios exit", "'lost'; exit 3", True, "lost", degraded=True),
    Case("nagios script 3", "& PLUGIN", True, "some output", degraded=True),
    Case("nagios good", "'fine | load=1'", True, "fine"),
    Case("nagios error", "Write-Error 'no plugin'; exit 1", False, "no plugin"),
)


@pytest.fixture(scope="module", params=(FULL, CONSTRAINED), ids=("full", "constrained"))
def host(engine: Engine, request: pytest.FixtureRequest) -> Iterator[WSManServer]:
    with WSManServer("https", "negotiate", open_shell=engine.opener(request.param), shell_limit=4) as server:
        yield server
        assert server.shells == {}


def rows(checks: dict[str, str], **seconds: float) -> list[dict[str, Any]]:
    """Checks as the inventory has them; some with a timeout of their own."""
    return [
        {
            "name": name,
            "command": command,
            "timeout": seconds.get(name, 60.0),
            "exit": "nagios" if "nagios" in name else "plain",
        }
        for name, command in checks.items()
    ]


def commands(write: Callable[[str, str], str]) -> dict[str, str]:
    """Those of the cases, whose scripts are written first."""
    paths = {
        "PLUGIN": write("plugin.ps1", "'some output'\nexit 3\n"),
        "WARNING": write("warning.ps1", "'slow|time=3s'\nexit 1\n"),
        "CMD": CMD,
    }
    return {case.name: re.sub("|".join(paths), lambda found: paths[found[0]], case.command) for case in CASES}


def ask(host: WSManServer, checks: dict[str, str], **seconds: float) -> Polled:
    """One poll with these checks."""
    polled = poll(target(host, checks=rows(checks, **seconds), services=["Eventlog"], timeout=TIMEOUT))
    assert polled.sample, polled.verdict
    assert polled.sample.services["Eventlog"].good
    assert polled.sample.metrics["disk_percent C:"] == pytest.approx(40.16, abs=0.01)
    return polled


def outcomes(polled: Polled) -> dict[str, tuple[bool, str]]:
    assert polled.sample
    return {name: (outcome.good, outcome.text) for name, outcome in polled.sample.checks.items()}


@pytest.fixture(scope="module")
def shown(host: WSManServer, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the console's API says of a resource of an inventory that has all cases as its checks."""
    asked = windows(host, checks=rows(commands(engine.write)), services=["Eventlog"], timeout=TIMEOUT, interval=600)
    row = json.dumps(asked | {"password": PASSWORD}, default=str)
    with local_console(tmp_path_factory.mktemp("console"), f"  - {row}\n") as local:
        local.log_in_as(NAME, "token")
        wait_for(lambda: local.api("GET", "resources/win").json["state"] != "unknown", TIMEOUT)
        return local.api("GET", "resources/win").json


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_verdict(case: Case, shown: Any) -> None:
    outcome = shown["sample"]["checks"][case.name]
    found = (outcome["good"], outcome["degraded"], case.text in outcome["text"])
    assert found == (case.good, case.degraded, True), outcome


def test_the_line_for_a_push(engine: Engine, tmp_path: Path) -> None:
    """Of the README, in PowerShell: here as the check of a poll."""
    [line] = re.findall(r"`(Invoke-RestMethod .+?/push/.+?)`", README.read_text(encoding="utf-8"))
    token = "0123456789abcdef"
    row = f"  - {{name: backup, platform: push, password: {token}, interval: 3600}}"
    opener = engine.opener()
    with WSManServer("https", "negotiate", open_shell=opener) as server, console(tmp_path, row) as (service, client):
        service.wait_status("/-/readyz", 503)
        told = line.replace("127.0.0.1:8081", f"{client.host}:{client.port}").replace("$token", token)
        assert outcomes(ask(server, {"push": told}))["push"][0]
        service.wait_status("/-/readyz", 200)
        assert client.api("GET", "resources/backup").json["state"] == "healthy"


def test_each_bad_check_is_a_reason(shown: Any) -> None:
    assert (shown["state"], shown["cause"]) == ("unhealthy", "check")
    assert shown["reason"].startswith("check exit code: exit code 3; check exit code, output: exit code 3 done; ")


def test_plugins_have_performance_data(shown: Any) -> None:
    assert shown["sample"]["checks"]["nagios script"]["metrics"] == {"time": 3.0}
    assert shown["sample"]["checks"]["nagios good"]["metrics"] == {"load": 1.0}


@pytest.mark.long
def test_a_stuck_check_delays_no_other_and_not_the_next_poll(
    host: WSManServer, often: Callable[[int, int], int]
) -> None:
    """Nor does one that ends its own shell: the lines that came count."""
    checks = {"first": "$true", "sleeps": "Start-Sleep 600", "kills": "Stop-Process -Id $PID -Force", "last": "'x'"}
    for _ in range(often(1, 3)):
        said = outcomes(ask(host, checks, sleeps=2))
        assert said["sleeps"] == (False, "no end in 2 s")
        assert said["kills"][0] is False and "closed the shell" in said["kills"][1]
        assert (said["first"], said["last"]) == ((True, "True"), (True, "x"))
        assert outcomes(ask(host, {"next": "'y'"})) == {"next": (True, "y")}


class Cost(NamedTuple):
    """What the process of a poll's shell took by its end: bytes of memory at most, seconds of CPU time in the poll."""

    memory: int
    cpu: float


def watch_shells(host: WSManServer, done: threading.Event) -> Cost:
    """Look at the host's one shell again and again; where it is replaced, the one that took most counts."""
    cost, begun = Cost(0, 0), dict[int, float]()
    while not done.wait(0.02):
        for shell in list(host.shells.values()):
            assert isinstance(shell, EngineShell)
            with contextlib.suppress(OSError, IndexError):  # it has just ended
                folder = Path(f"/proc/{shell.process.pid}")
                peak = (folder / "status").read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]
                ticks = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
                cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
                cpu -= begun.setdefault(shell.process.pid, cpu)
                cost = Cost(max(cost.memory, int(peak) << 10), max(cost.cpu, cpu))
    return cost


def cost_of(host: WSManServer, checks: dict[str, str], **seconds: float) -> tuple[Polled, Cost]:
    """A poll with these checks, and what it took."""
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watch_shells, host, done)
        try:
            polled = ask(host, checks, **seconds)
        finally:
            done.set()
        return polled, watched.result()


MARK = f"hc-endless-{os.getpid()}"
ENDLESS = {
    "lines": "while ($true) { 'x' * 1000 }",
    "long": "while ($true) { 'x' * 100KB }",
    "objects": "while ($true) { Get-Item C:\\windows }",
    "program": f'{CMD} /c "for /L %i in (1,0,2) do @echo {MARK}"',
}
SILENT = f'{CMD} /c "for /L %i in (1,0,2) do @rem {MARK}"'


@pytest.mark.long
@WATCHED
def test_what_many_checks_and_endless_ones_cost(
    host: WSManServer, often: Callable[[int, int], int], request: pytest.FixtureRequest
) -> None:
    """CPU time: a limit of seconds would not hold while other tests run. In the suite each mode has half of what never
    ends, for each costs a shell."""
    kinds = list(ENDLESS.items())
    endless_ones = dict(kinds[often("constrained" in request.node.name, 0) :: often(2, 1)])
    ask(host, {"check": "$true"})  # so that the process has compiled all of it
    _, one = cost_of(host, {"check": "$true"})
    polled, forty = cost_of(host, {f"check {number}": "$true" for number in range(40)})
    assert list(outcomes(polled).values()) == [(True, "True")] * 40
    assert forty.cpu - one.cpu < 1.2
    try:
        polled, endless = cost_of(host, {**endless_ones, "silent": SILENT, "last": "'x'"}, silent=2)
        cut = (False, "prints more than 1,000 lines")
        late = (False, "no end in 2 s")
        assert outcomes(polled) == {**dict.fromkeys(endless_ones, cut), "silent": late, "last": (True, "x")}
        assert (endless.memory - forty.memory) >> 20 < 50
        wait_for(lambda: not programs(), TIMEOUT)
    finally:
        for process in programs():
            process.kill()


def programs() -> list[psutil.Process]:
    """Those that never end."""
    return [process for process in psutil.process_iter(["cmdline"]) if MARK in str(process.info["cmdline"])]


# === Hosts that are worse off ================================================


class DyingShell(EngineShell):
    """One that is killed when a script arrives."""

    def send(self, user: str, command_id: str, fragments: bytes) -> None:
        if command_id not in ("", NOBODY):
            self.process.kill()
        super().send(user, command_id, fragments)


class FrozenShell(EngineShell):
    """One that takes a script, never answers and never ends."""

    def send(self, user: str, command_id: str, fragments: bytes) -> None:
        if command_id not in ("", NOBODY):
            psutil.Process(self.process.pid).suspend()
        super().send(user, command_id, fragments)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "seconds", "cause", "reason"),
    [
        (DyingShell, TIMEOUT, "protocol", "the host closed the shell during the poll"),
        (FrozenShell, 5.0, "timeout", ""),
    ],
)
def test_a_shell_that_dies_or_never_ends(
    engine: Engine, kind: type[EngineShell], seconds: float, cause: str, reason: str
) -> None:
    """And the next poll of the same host is as ever. What dies has compiled nothing yet, and is told of."""
    deaths = len(engine.deaths)
    with WSManServer("https", "negotiate", open_shell=engine.opener(FULL, kind, fresh=True)) as server:
        polled = poll(target(server, timeout=seconds))
        assert (polled.verdict.state, polled.cause) == ("unhealthy", cause)
        assert polled.reason.startswith(reason)
        assert len(engine.deaths) == deaths + (kind is DyingShell)
        server.open_shell = engine.opener()
        assert outcomes(ask(server, {"check": "$true"})) == {"check": (True, "True")}
