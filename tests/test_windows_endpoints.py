"""Endpoints of Windows hosts: the session configuration that `endpoint NAME` prints, in a real PowerShell.

The test registers it by starting the engine with it, less the lines that only Register-PSSessionConfiguration reads.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from pwsh import ANSWER_TIME, NO_LANGUAGE, RESTRICTED, ROWS, Engine
from pypsrp.powershell import PowerShell, RunspacePool
from pypsrp.wsman import WSMan
from service import write_inventory
from test_powershell import Polled, connection_to, poll, target
from test_windows_kept import Kept
from test_windows_probes import GRAMMARS, nodes, tree
from test_windows_shells import RUNS, SERVICE
from test_wsman_server import settings_for
from wsman_server import Script, WSManServer

from healthchecker import (
    ResourceSettings,
    Sample,
    collect,
    installed,
    judge_endpoint,
    main,
    parse_windows,
    windows_endpoint,
)

NONCE = "5eed5eed5eed5eed"
TIMEOUT = 120.0  # seconds; wine may be slow, and the first poll of a run starts PowerShell for the first time
OUTDATED = "not answered by the endpoint: install it again"
REGISTERED_ONLY = re.compile("^(RunAs|GroupManaged).*\n", re.MULTILINE)
RECORDED = Path(__file__).parent / "recorded" / "endpoint"
SERVICES = ["Eventlog", "it's (x)"]


def resource(**changed: Any) -> ResourceSettings:
    common = {"name": "win", "platform": "windows", "hostname": "files.example.com", "username": "EXAMPLE\\monitor"}
    return ResourceSettings.model_validate({**common, "endpoint": True, **changed})


def configuration(**changed: Any) -> str:
    return REGISTERED_ONLY.sub("", windows_endpoint(resource(**changed)))


# === What is printed =========================================================


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_both_grammars_take_it(grammar: str) -> None:
    checks = [{"name": "Zürich", "command": "'it''s'; \"$(1)\" # }", "timeout": 5}]
    text = windows_endpoint(resource(name="TITLE COLLECT HOLDS", services=SERVICES, checks=checks))
    assert text.isascii() and "\r" not in text
    wrong = [node for node in nodes(tree(grammar, text)) if node.type == "ERROR" or node.is_missing]
    assert [(node.type, node.start_point, node.text) for node in wrong] == []


def test_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = "{name: win, platform: windows, hostname: files.example.com, username: EXAMPLE\\monitor, password: x, "
    path = write_inventory(tmp_path, f"  - {row}endpoint: true, services: [Eventlog]}}\n")
    assert main(["--inventory", str(path), "endpoint", "win"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == "" and printed == windows_endpoint(resource(services=["Eventlog"]))
    for line in (
        r"#   \$sid = \(\[Security.Principal.NTAccount\]\('EXAMPLE\\monitor'\)\)\.Translate\(.*\)",
        r"#   Register-PSSessionConfiguration -Name \('HealthChecker'\) -Path HealthChecker.pssc .* -Force `",
        "# .*restarts WinRM.*",
        "# .*domain controller.*",
        r"RunAsVirtualAccount = \$true",
        "# RunAsVirtualAccountGroups = .*",
        "# GroupManagedServiceAccount = .*",
    ):
        assert re.search(f"^{line}$", printed, re.MULTILINE), line


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "HealthChecker"),
        ({"configuration_name": "Health.JEA"}, "Health.JEA"),
        ({"endpoint": False}, "Microsoft.PowerShell"),
    ],
)
def test_where_it_is_polled_and_with_what(changed: dict[str, Any], name: str) -> None:
    seen: list[Script] = []

    def answer(script: Script) -> str:
        seen.append(script)
        return ""

    with WSManServer("https", "negotiate", answer=answer) as server:
        polled = poll(target(server, **{"endpoint": True, "services": ["x"], **changed}))
    assert polled.cause == "protocol"
    assert [script.configuration_name for script in seen] == [name]
    if changed.get("endpoint", True):
        assert "not restricted: " in polled.reason
        assert "COLLECT" not in seen[0] and "Get-Service" not in seen[0]


# === In the engine ===========================================================


def serving(engine: Engine, session: str) -> WSManServer:
    return WSManServer("https", "negotiate", open_shell=engine.opener(session), shell_limit=4)


def ask(server: WSManServer, **changed: Any) -> Polled:
    return poll(target(server, **{"endpoint": True, "timeout": TIMEOUT, **changed}))


CHECKS: list[dict[str, Any]] = [
    {"name": "first", "command": "(1..5 | Select-Object -First 2) -join ','", "timeout": 60},
    {"name": "last", "command": "1..5 | Select-Object -Last 1", "timeout": 60},
    {"name": "sum", "command": "(1..5 | Measure-Object -Sum).Sum", "timeout": 60},
    {"name": "all", "command": "@(Get-Command Get-Process -All)[0].Name", "timeout": 60},
    {"name": "it's Zürich", "command": "'it''s Zürich 東京 😀'; $env:PATH.Length -gt 0", "timeout": 60},
    {"name": "state", "command": "Test-Path '{state}'", "timeout": 60},
    {"name": "program", "command": "C:\\windows\\system32\\cmd.exe /c exit 3", "timeout": 60},
    {"name": "error", "command": "Write-Error oops", "timeout": 60},
]  # fmt: skip


def fields(sample: Sample) -> dict[str, Any]:
    """All fields but what moves by itself between two polls: the clock and what is no CIM class."""
    shown = json.loads(sample.to_json())
    shown["details"].pop("uptime_seconds")
    shown["metrics"].pop("commit_percent", None)
    return shown


@pytest.fixture(scope="module")
def checks(engine: Engine) -> list[dict[str, Any]]:
    state = engine.path(engine.folder / "state")
    return [check | {"command": check["command"].replace("{state}", state)} for check in CHECKS]


@pytest.mark.long
def test_the_numbers_are_those_of_a_script_before_and_after_a_change(
    engine: Engine, checks: list[dict[str, Any]]
) -> None:
    asked: dict[str, Any] = {"services": SERVICES, "checks": checks, "timeout": TIMEOUT}
    with serving(engine, "") as sent, serving(engine, configuration(services=SERVICES, checks=checks)) as kept:
        ways = [target(sent, **asked), target(kept, endpoint=True, **asked)]
        opened = [connection_to(way) for way in ways]
        samples: list[Sample | None] = [None, None]
        seen = []
        for moment in range(2):
            samples = [collect(way.settings, through, sample and replace(sample, counted_mono=-math.inf))  # long ago
                       for way, through, sample in zip(ways, opened, samples, strict=True)]  # fmt: skip
            assert samples[0] and samples[1]
            assert fields(samples[0]) == fields(samples[1]), moment
            seen.append(samples[1])
            engine.set_rows(**changed_rows())
            (engine.folder / "state").touch()
        engine.set_rows()
        (engine.folder / "state").unlink()
    before, after = seen
    assert before.services["Eventlog"].good and not before.services["it's (x)"].good
    said = {name: (outcome.good, outcome.text) for name, outcome in before.checks.items()}
    assert said["first"] == (True, "1,2") and said["last"] == (True, "5") and said["sum"] == (True, "15")
    assert said["all"] == (True, "Get-Process")
    assert said["it's Zürich"] == (True, "it's Zürich 東京 😀\nTrue")
    assert said["state"] == (False, "False") and after.checks["state"].good
    assert [good for good, _ in map(said.get, ("program", "error"))] == [False, False]
    assert before.metrics["disk_percent C:"] != after.metrics["disk_percent C:"]
    assert after.metrics["cpu_percent"] == pytest.approx(75)


def changed_rows() -> dict[str, Any]:
    """CIM's classes some time later, in which the CPU was busy for three quarters."""
    rows = json.loads(json.dumps(ROWS))
    later = {"FreeSpace": -1 << 30, "PercentProcessorTime": 10**8, "Timestamp_Sys100NS": 4 * 10**8,
             "FreePhysicalMemory": -1 << 20, "CurrentUsage": 100}  # fmt: skip
    for row in (row for found in rows.values() if isinstance(found, list) for row in found):
        row.update({name: int(row[name]) + more for name, more in later.items() if row.get(name)})
        if row.get("Frequency_PerfTime"):
            row["Timestamp_PerfTime"] = int(row["Timestamp_PerfTime"]) + 40 * int(row["Frequency_PerfTime"])
    return rows


@pytest.fixture(scope="module")
def endpoint(engine: Engine, checks: list[dict[str, Any]]) -> Iterator[RunspacePool]:
    """A login at the endpoint, by a client that may send what it likes."""
    seconds = int(ANSWER_TIME)
    with (
        serving(engine, configuration(services=SERVICES, checks=checks)) as server,
        WSMan("127.0.0.1", **settings_for(server, operation_timeout=seconds, read_timeout=seconds + 30)) as wsman,
        RunspacePool(wsman, idle_timeout=60) as pool,
    ):
        yield pool


def said_to(pool: RunspacePool, script: str = "", **command: Any) -> tuple[list[str], list[str]]:
    shell = PowerShell(pool)
    if script:
        shell.add_script(script)
    for name, parameters in command.items():
        shell.add_cmdlet(name.replace("__", "\\").replace("_", "-")).add_parameters(parameters)
    shell.invoke()
    shell.close()
    return list(map(str, shell.output)), [str(error.fq_error) for error in shell.streams.error]


@pytest.mark.parametrize(
    "script", ["1+1", "Get-Health", f"Get-Health -Nonce {NONCE}", "& { 1 }", "$env:PATH", "Get-Process", "exit"]
)
def test_no_script_runs(endpoint: RunspacePool, script: str) -> None:
    assert said_to(endpoint, script) == ([], ["ScriptsNotAllowed"])


@pytest.mark.parametrize(
    "name",
    ["Get_Process", "Invoke_Expression", "Get_Content", "Get_CimInstance", "Set_Alias", "Import_Module", "Part", "Rows",
     "Judge", "Start_Process", "New_Object", "Add_Type", "cmd.exe", "Microsoft.PowerShell.Management__Get_Process"],
)  # fmt: skip
def test_no_other_command_runs(endpoint: RunspacePool, name: str) -> None:
    assert said_to(endpoint, **{name: {}}) == ([], ["CommandNotFoundException"])


def test_what_is_visible(endpoint: RunspacePool) -> None:
    names, _ = said_to(endpoint, Get_Command={})
    assert set(names) == {"Get-Health", "Clear-Host", "Exit-PSSession", "Get-Command", "Get-FormatData", "Get-Help",
                          "Measure-Object", "Out-Default", "Select-Object"}  # fmt: skip


@pytest.mark.parametrize(
    "nonce", ["", "x", NONCE[1:], NONCE.upper(), NONCE * 5, f"{NONCE}\n", f"{NONCE};1+1", "$(1+1)eeeeeeeeeeeeee"]
)
def test_a_nonce_is_checked_before_anything_uses_it(endpoint: RunspacePool, nonce: str) -> None:
    output, errors = said_to(endpoint, Get_Health={"Nonce": nonce})
    assert output == [] and len(errors) == 1
    assert re.match("ParameterArgumentValidationError", errors[0]), errors


def test_it_answers_with_the_nonce(endpoint: RunspacePool) -> None:
    """And is as it was for the next one."""
    for nonce in (NONCE, "0123456789abcdef" * 4):
        said, errors = said_to(endpoint, Get_Health={"Nonce": nonce, "First": len(CHECKS) + 1})
        assert errors == [] and [json.loads(line)["nonce"] for line in said] == [nonce, nonce]


@pytest.mark.long
def test_polls_share_its_session(engine: Engine, checks: list[dict[str, Any]]) -> None:
    """As long as no check leaves anything."""
    asked: dict[str, Any] = {"services": SERVICES, "checks": checks}
    with serving(engine, configuration(**asked)) as server:
        kept = Kept(server, endpoint=True, timeout=TIMEOUT, **asked)
        for number in range(2):
            assert kept.poll()[1] and kept.connection.keeper.reused is (number > 0)
        assert (server.requests["Create"], kept.connection.record.outcomes) == (1, {"accepted": 1})
        kept.connection.close()
        wait_for(lambda: not server.shells)


def test_no_check_speaks_for_the_services_of_the_next_poll(engine: Engine) -> None:
    """By a type that it changes: what restricts the login does not restrict the checks."""
    runs = {"name": "runs", "command": RUNS.format(SERVICE), "timeout": 60}
    asked: dict[str, Any] = {"services": ["BITS"], "checks": [runs]}
    with serving(engine, configuration(**asked)) as server:
        kept = Kept(server, endpoint=True, timeout=TIMEOUT, **asked)
        for _ in range(2):
            verdict, sample = kept.poll()
            assert sample and sample.checks["runs"].good, verdict
            assert sample.services["BITS"].text == "Stopped"
        kept.connection.close()


@pytest.mark.long
def test_a_check_that_does_not_end_costs_no_other(engine: Engine) -> None:
    """Nor one that ends its shell. The endpoint has one that the inventory does not know; it is told where to go on."""
    checks = [{"name": name, "command": f"'{name}'", "timeout": 60} for name in ("a", "b", "c")]
    stuck = {"name": "stuck", "command": "while ($true) { Start-Sleep 1 }", "timeout": 1}
    old = {"name": "old", "command": "while ($true) { Start-Sleep 1 }", "timeout": 1}
    ends = {"name": "exit", "command": "exit 4", "timeout": 60}
    with serving(engine, configuration(checks=[checks[0], stuck, old, ends, checks[2]])) as server:
        begun = time.monotonic()
        polled = ask(server, checks=[checks[1], checks[0], stuck, ends, checks[2]])
        assert time.monotonic() - begun < TIMEOUT
    assert polled.sample
    found = {name: (outcome.good, outcome.text) for name, outcome in polled.sample.checks.items()}
    said = {"stuck": (False, "no end in 1 s"), "exit": (False, "exit code 4")}
    assert found == {"a": (True, "a"), **said, "c": (True, "c")}
    assert polled.sample.problems["check b"] == OUTDATED
    assert (polled.verdict.state, polled.cause) == ("unhealthy", "check")


def test_a_session_that_runs_any_program_is_not_restricted(engine: Engine) -> None:
    open_to_all = configuration().replace("'RestrictedRemoteServer'", "'Default'")
    with serving(engine, open_to_all) as server:
        polled = ask(server)
    assert (polled.verdict.state, polled.cause) == ("unhealthy", "protocol")
    assert "not restricted: " in polled.reason


@pytest.mark.parametrize("session", ["", NO_LANGUAGE], ids=("full", "another endpoint"))
def test_a_session_without_our_function_is_named(engine: Engine, session: str) -> None:
    with serving(engine, session) as server:
        polled = ask(server)
    assert polled.cause == "protocol"
    assert polled.reason.startswith("not restricted, or to something else (JEA): the endpoint HealthChecker has no ")
    assert polled.reason.endswith("Get-Health; register what `endpoint win` prints there")


@pytest.mark.parametrize("session", [NO_LANGUAGE, RESTRICTED], ids=("no language", "restricted language"))
def test_a_restricted_session_that_is_sent_a_script_is_named(engine: Engine, session: str) -> None:
    with serving(engine, session) as server:
        polled = ask(server, endpoint=False, configuration_name="Other.JEA")
    assert polled.cause == "protocol"
    assert polled.reason.startswith(
        "the endpoint Other.JEA is restricted (JEA); register what `endpoint win` prints, and write `endpoint: true`; ")


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_every_format_ever_printed_is_read(path: Path) -> None:
    """`format-1.json` is what the engine answered to the endpoint of that format, on a host of another name."""
    settings = resource(services=SERVICES, checks=CHECKS[:2])
    sample = judge_endpoint(parse_windows(path.read_text(encoding="utf-8"), None), settings)
    assert not [name for name in sample.problems if name.startswith(("service", "check"))]
    assert sample.details["hostname"] == "FILES"
    assert sample.metrics["disk_percent C:"] == pytest.approx(40.16, abs=0.01)
    assert {name: outcome.good for name, outcome in sample.services.items()} == {"Eventlog": True, "it's (x)": False}
    assert {name: outcome.text for name, outcome in sample.checks.items()} == {"first": "1,2", "last": "5"}


def test_a_name_in_the_settings_cannot_end_the_text() -> None:
    hostile = ["'; 1+1; '", "} }", "'@", "$(1)", '"', "# ", "`'"]
    plain = configuration(services=["x"])
    text = configuration(services=hostile)
    assert text.count("'") == plain.count("'")
    assert installed(resource(services=hostile)).replace("'", "\\u0027") in text
