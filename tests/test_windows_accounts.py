"""What accounts may read of a Windows host, in a real PowerShell: metrics and services, with rights and without.

The host is tests/wsman_server.py with tests/pwsh.py behind it. Its account is an administrator; a plain one differs
in what IsInRole says, which `as_plain` changes in the script. CIM's answers are a stand-in's (tests/modules).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from console import NAME, local_console
from pwsh import CONSTRAINED, ROWS, Engine
from test_powershell import PASSWORD, poll, send, target, windows
from test_probes import wanting
from wsman_server import WSManServer

from healthchecker import (
    COLLECT,
    CpuTicks,
    Limits,
    Outcome,
    Platform,
    Sample,
    build_windows_script,
    parse_windows,
)

TIMEOUT = 120.0  # seconds; wine may be slow, and the first poll of a run starts PowerShell for the first time
PROCESSORS = "Win32_PerfRawData_Counters_ProcessorInformation"
OLD_PROCESSORS = "Win32_PerfRawData_PerfOS_Processor"
ROLE = "$wmi.use = $me.IsInRole("
FORGET = "[AppDomain]::CurrentDomain.SetData('HealthChecker.Native', $null)"
COUNT = "@([AppDomain]::CurrentDomain.GetAssemblies() | Where-Object { $_.GetName().Name -eq 'HealthChecker' }).Count"
REFUSED = "(New-Object InvalidOperationException 'Kein Zugriff', (New-Object ComponentModel.Win32Exception 5))"


@pytest.fixture(autouse=True)
def rows(engine: Engine) -> Iterator[None]:
    yield
    engine.set_rows()


@pytest.fixture(scope="module")
def host(engine: Engine) -> Iterator[WSManServer]:
    with WSManServer("https", "negotiate", open_shell=engine.opener()) as server:
        yield server
        assert server.shells == {}


@pytest.fixture(scope="module")
def constrained(engine: Engine) -> Iterator[WSManServer]:
    with WSManServer("https", "negotiate", open_shell=engine.opener(CONSTRAINED)) as server:
        yield server


def as_plain(script: str) -> str:
    """The script, to whom no account is an administrator."""
    assert script.count(ROLE) == 1
    return script.replace(ROLE, "$wmi.use = $false -and $me.IsInRole(")


def lines(server: WSManServer, script: str) -> list[str]:
    """What a script prints, without the empty lines that a row begins with, and what a poll says of the shell."""
    said = send(server, script, TIMEOUT, timeout=TIMEOUT).splitlines()
    return [line for line in said if line and '"clean":' not in line]


def sample_of(server: WSManServer, **settings: Any) -> Sample:
    polled = poll(target(server, timeout=TIMEOUT, **settings))
    assert polled.sample, polled.verdict
    return polled.sample


def disks(sample: Sample) -> dict[str, float]:
    return {name.partition(" ")[2]: round(value, 2) for name, value in sample.readings("disk_percent")}


# --- administrators ---
def test_volumes_have_letters_or_paths_and_processors_their_own_clock(engine: Engine, host: WSManServer) -> None:
    total = {"Name": "_Total", "PercentProcessorTime": 90_000_000, "Timestamp_Sys100NS": 134085787645000000,
             "Timestamp_PerfTime": 30_000_000, "Frequency_PerfTime": 3_000_000}  # fmt: skip
    engine.set_rows(**{PROCESSORS: [total, {**total, "Name": "0,_Total"}], OLD_PROCESSORS: "denied"})
    sample = sample_of(host)
    assert disks(sample) == {"C:": 40.16, "C:\\mnt\\sqldata": 97.0, "C:\\ClusterStorage\\Volume1": 45.0}
    assert sample.ticks == CpuTicks(busy=10_000_000.0, total=100_000_000.0)  # 1 of 10 s
    assert 0 < sample.metrics["commit_percent"] < 100
    assert sample.problems == {}


def test_processors_of_an_older_windows_and_volumes_without_size(engine: Engine, host: WSManServer) -> None:
    lost = [{**ROWS["Win32_Volume"][0], "Name": "Q:\\", "Capacity": None}, {**ROWS["Win32_Volume"][0], "Name": "R:\\",
                                                                          "Capacity": None}]  # fmt: skip
    engine.set_rows(**{PROCESSORS: None, "Win32_Volume": [*ROWS["Win32_Volume"], *lost]})
    sample = sample_of(host)
    assert sample.ticks and sample.ticks.total == 4989310221187.0
    assert disks(sample)["C:"] == 40.16
    assert re.fullmatch(r"Q: has no size: .*Q:\\.*; R: has no size: .*R:\\.*", sample.problems["disk_percent"])


MISSING = {
    "memory_percent": ("Win32_OperatingSystem", "FreePhysicalMemory"),
    "commit_percent": ("Win32_OperatingSystem", "TotalVirtualMemorySize"),
    "swap_percent": ("Win32_PageFileUsage", "CurrentUsage"),
    "cpu_percent": (PROCESSORS, "PercentProcessorTime"),
}


@pytest.mark.parametrize("metric", MISSING)
def test_a_value_that_is_missing_is_not_zero(engine: Engine, constrained: WSManServer, metric: str) -> None:
    """Or memory without a figure would be full, and a page file empty."""
    name, key = MISSING[metric]
    rows = {one: [dict(row) for row in ROWS[one]] for one, _ in MISSING.values()}
    rows["Win32_OperatingSystem"][0] |= {"TotalVirtualMemorySize": 20_000_000, "FreeVirtualMemory": 5_000_000}
    rows[name][0][key] = None
    engine.set_rows(**rows)
    sample = sample_of(constrained)
    assert sample.problems == {metric: "a value is missing (Constrained Language Mode)"}
    assert metric not in sample.metrics and (sample.ticks is None) is (metric == "cpu_percent")


def test_a_volume_without_free_space_is_not_full(engine: Engine, host: WSManServer) -> None:
    """And it costs the others nothing."""
    lost = {**ROWS["Win32_Volume"][0], "Name": "Q:\\", "FreeSpace": None}
    engine.set_rows(Win32_Volume=[lost, *ROWS["Win32_Volume"]])
    sample = sample_of(host)
    assert disks(sample) == {"C:": 40.16, "C:\\mnt\\sqldata": 97.0, "C:\\ClusterStorage\\Volume1": 45.0}
    assert sample.problems["disk_percent"].startswith("Q: has no size: ")


def test_a_locked_volume_that_is_off_is_no_problem(engine: Engine, host: WSManServer) -> None:
    lost = {**ROWS["Win32_Volume"][0], "Name": "Q:\\", "Capacity": None, "FreeSpace": None}
    engine.set_rows(Win32_Volume=[lost, *ROWS["Win32_Volume"]])
    assert sample_of(host, limits={"disk_percent": {"fail": "99", "mounts": {"q:": "off"}}}).problems == {}
    assert sample_of(host, limits={"disk_percent": "99"}).problems.keys() == {"disk_percent"}


def test_denied_processors_are_asked_for_once(engine: Engine, host: WSManServer) -> None:
    engine.set_rows(**{PROCESSORS: "denied"})
    sample = sample_of(host)
    assert sample.ticks is None and sample.problems == {"cpu_percent": "Access denied"}


@pytest.mark.parametrize("mode", ["host", "constrained"])
def test_each_class_may_be_missing_or_denied(engine: Engine, mode: str, request: pytest.FixtureRequest) -> None:
    """What is no class costs its own metric; whoever is denied one asks for none behind it."""
    server, note = request.getfixturevalue(mode), " (Constrained Language Mode)" if mode == "constrained" else ""
    engine.set_rows(**dict.fromkeys(("Win32_Volume", "Win32_PageFileUsage", PROCESSORS, OLD_PROCESSORS)))
    sample = sample_of(server)
    names = ("disk_percent", "swap_percent", "cpu_percent")
    assert [sample.problems.get(name) for name in names] == [f"Invalid class{note}"] * 3
    assert 0 < sample.metrics["memory_percent"] < 100
    engine.set_rows(Win32_Volume="denied")
    sample = sample_of(server)
    assert [sample.problems.get(name) for name in names] == [f"Access denied{note}", None, f"Access denied{note}"]
    assert 0 < sample.metrics["swap_percent"] < 100


def test_constrained_language_reads_cim(engine: Engine, constrained: WSManServer) -> None:
    volume = {**ROWS["Win32_Volume"][0], "Name": "Q:\\", "Capacity": None}
    system = {**ROWS["Win32_OperatingSystem"][0], "TotalVirtualMemorySize": 20_000_000, "FreeVirtualMemory": 5_000_000}
    engine.set_rows(Win32_OperatingSystem=[system], Win32_Volume=[*ROWS["Win32_Volume"], volume])
    sample = sample_of(constrained, limits={"commit_percent": "70"})
    assert sample.metrics["commit_percent"] == 75.0
    assert disks(sample) == {"C:": 40.16, "C:\\mnt\\sqldata": 97.0, "C:\\ClusterStorage\\Volume1": 45.0}
    why = "Q: has no size: locked, not formatted, or access denied (Constrained Language Mode)"
    assert sample.problems == {"disk_percent": why}


def test_commit_charge_is_shown_like_the_others(engine: Engine, constrained: WSManServer, tmp_path: Path) -> None:
    system = {**ROWS["Win32_OperatingSystem"][0], "TotalVirtualMemorySize": 20_000_000, "FreeVirtualMemory": 5_000_000}
    engine.set_rows(Win32_OperatingSystem=[system])
    asked = windows(constrained, timeout=TIMEOUT, interval=600, limits={"commit_percent": "70"})
    row = json.dumps(asked | {"password": PASSWORD}, default=str)
    with local_console(tmp_path, f"  - {row}\n") as local:
        local.log_in_as(NAME, "token")
        wait_for(lambda: local.api("GET", "resources/win").json["state"] != "unknown", TIMEOUT)
        shown = local.api("GET", "resources/win").json
        assert (shown["state"], shown["reason"]) == ("unhealthy", "commit_percent at 75.0, fail above 70")
        assert shown["sample"]["metrics"]["commit_percent"] == 75.0
        page = local.ask("GET", "/-/resources/win").body
    assert re.search(r"Commit charge </th>\s*<td>.*75\.0 %</td>\s*<td></td>\s*<td>70</td>", page)


def test_commit_charge_that_cannot_be_read(constrained: WSManServer) -> None:
    polled = poll(target(constrained, timeout=TIMEOUT, limits={"commit_percent": "70"}))
    assert polled.verdict.state == "degraded"
    assert polled.reason == "commit_percent cannot be read: a value is missing (Constrained Language Mode)"


# --- plain accounts ---
@pytest.fixture
def mount_point(engine: Engine) -> Iterator[str]:
    """A folder that leads to another volume, as Windows calls it: on Windows itself one that leads to a folder."""
    if not engine.wine:
        yield "C:\\Documents and Settings"
        return
    link = engine.wine.prefix / "drive_c" / "mnt of a test"
    link.symlink_to("windows")
    yield "C:\\mnt of a test"
    link.unlink()


def test_plain_accounts_ask_kernel32(engine: Engine, host: WSManServer, mount_point: str) -> None:
    engine.set_rows(**dict.fromkeys(ROWS, "denied"))  # WMI would take 5 s to refuse
    mounts = dict.fromkeys([mount_point, "C:\\windows\\temp", "C:\\no\\such"], "95")
    limits = Limits.model_validate({"disk_percent": {"fail": "95", "mounts": mounts}})
    script = as_plain(build_windows_script(wanting(Platform.WINDOWS, limits=limits)))
    sample = parse_windows(lines(host, script)[-1], None)
    found = disks(sample)
    assert found[mount_point] == pytest.approx(found["C:"], abs=1)
    assert "C:\\windows\\temp" not in found  # no volume is there, and its drive's size is not its own
    assert 0 < sample.metrics["memory_percent"] < 100 and 0 < sample.metrics["commit_percent"] < 100
    assert sample.ticks and 0 < sample.ticks.busy < sample.ticks.total
    assert float(sample.details["uptime_seconds"]) > 0
    problems = {name: why for name, why in sample.problems.items() if re.match("disk_percent|swap_percent", name)}
    assert re.fullmatch(r"has no size: .*'C:\\no\\such'\.", problems.pop("disk_percent C:\\no\\such"))
    assert problems == {"swap_percent": "only an administrator may read the page file"}
    assert "Add-Type" not in script


def test_functions_are_defined_once_a_process(host: WSManServer) -> None:
    script = as_plain(build_windows_script(wanting(Platform.WINDOWS)))
    first, before, second, after = lines(host, f"& {{ {script} }}; {COUNT}; & {{ {script} }}; {COUNT}")
    for text in (first, second):
        assert parse_windows(text, None).problems.keys() == {"swap_percent", "load_per_cpu", "inode_percent"}
    assert int(before) == int(after) > 0


def test_functions_that_cannot_be_defined_are_not_tried_again(host: WSManServer) -> None:
    script = as_plain(build_windows_script(wanting(Platform.WINDOWS)))
    broken = script.replace(".CreateType()", ".NoSuchMethod()")
    assert broken != script
    first, second = lines(host, f"{FORGET}; & {{ {broken} }}; & {{ {script} }}; {FORGET}")
    for text in (first, second):
        sample = parse_windows(text, None)
        why = sample.problems["memory_percent"]
        assert why.startswith("kernel32 cannot be called: ") and "NoSuchMethod" in why
        assert sample.problems["commit_percent"] == why
        assert disks(sample)  # for which it takes nothing of that


def test_sizes_are_missed_by_number(host: WSManServer) -> None:
    """What Windows says of a drive, as the exceptions that .NET makes of it: of .NET Framework and of today's."""
    function = re.search(r"function Reason.*?\n}\n", COLLECT, re.DOTALL)
    assert function
    codes = {0x80070005: "access denied", 0x800703ED: "not formatted", 0x80310000: "locked by BitLocker",
             0x80370000: "locked by BitLocker", 0x80070015: "Das Gerät"}  # fmt: skip
    text = "$full = $true\n" + function[0] + "".join(
        f"Reason (New-Object IO.IOException 'Das Ger\u00e4t', {code - (1 << 32)})\n" for code in codes)
    assert lines(host, text) == list(codes.values())


# --- services ---
def test_a_service_with_a_dollar_in_its_name(host: WSManServer, constrained: WSManServer) -> None:
    """As each instance of SQL Server has it; one of a like name, which a pattern or a variable would make of it, is no
    answer."""
    name = "HealthChecker$Test"
    path = "C:\\windows\\system32\\services.exe"
    lines(host, f"$null = New-Service -Name '{name}' -BinaryPathName {path} -StartupType Manual")
    try:
        for server in (host, constrained):
            services = sample_of(server, services=[name, "HealthChecker", "Event*", "Eventlog"]).services
            said = [(outcome.good, outcome.text) for outcome in services.values()]
            none = (False, "no such service")
            assert said == [(False, "Stopped"), none, none, (True, "Running")]
    finally:
        lines(host, f"Get-Service -Name '{name}' | Remove-Service")


def test_a_hidden_service_is_told_from_none(host: WSManServer) -> None:
    """One that the account may not query is left out of the list of services; the registry shows it to everyone."""
    key = "'HKLM:\\SYSTEM\\CurrentControlSet\\Services\\HealthChecker$Hidden'"
    put = f"$null = New-Item -Force {key}; $null = New-ItemProperty {key} -Name Type -PropertyType DWord -Value "
    script = build_windows_script(wanting(Platform.WINDOWS, ["Eventlog", "HealthChecker$Hidden", "No$Such"]))
    remove = f"Remove-Item -LiteralPath {key}"
    told = lines(host, f"{put}16; & {{ {script} }}; {put}1; & {{ {script} }}; {remove}")
    hidden, driver = (parse_windows(line, None).services for line in told)
    right = "cannot be read: the account lacks its SERVICE_QUERY_STATUS (README: sc.exe sdset)"
    assert [outcome.text for outcome in hidden.values()] == ["Running", right, "no such service"]
    assert [outcome.text for outcome in driver.values()] == ["Running", "no such service", "no such service"]


RIGHTS = {
    f"throw {REFUSED}": "the account lacks SC_MANAGER_CONNECT or SC_MANAGER_ENUMERATE_SERVICE (README: sc.exe sdset). "
    "Kein Zugriff",
    "@{ Status = $null }": "the account lacks its SERVICE_QUERY_STATUS (README: sc.exe sdset)",
    f"Write-Error -Exception {REFUSED} -ErrorId CouldNotGetServiceInfo -ErrorAction Stop":
    "the account lacks its SERVICE_QUERY_CONFIG (README: sc.exe sdset). Kein Zugriff",
    "throw 'the RPC server is unavailable'": "the RPC server is unavailable",
}  # fmt: skip


def test_missing_rights_are_named(host: WSManServer) -> None:
    """wine grants every right: a function takes the place of Get-Service, and fails as it does without."""
    script = build_windows_script(wanting(Platform.WINDOWS, ["Spooler"]))
    told = lines(host, ";".join(f"& {{ function Get-Service {{ {body} }}\n{script} }}" for body in RIGHTS))
    said = [parse_windows(line, None).services["Spooler"] for line in told]
    assert said == [Outcome(False, f"cannot be read: {why}") for why in RIGHTS.values()]


def test_readme_gives_the_rights(host: WSManServer) -> None:
    """Its line as PowerShell understands it; sc.exe prints an empty line first, and would refuse a bad descriptor."""
    readme = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")
    line = re.search(r"`(sc\.exe sdset X .*?)`", readme)
    assert line
    put = line[1].replace(" X", " scmanager")
    tool = "if ($args[0] -eq 'sdshow') { ''; 'D:(A;;CC;;;AU)(A;;KA;;;BA)S:(AU;FA;KA;;;WD)' } else { $args -join ' ' }"
    assert lines(host, f"$sid = 'S-1-5-21-1-2-3-1001'; function sc.exe {{ {tool} }}; {put}") == [
        "sdset scmanager D:(A;;CCLC;;;S-1-5-21-1-2-3-1001)(A;;CC;;;AU)(A;;KA;;;BA)S:(AU;FA;KA;;;WD)"]  # fmt: skip
