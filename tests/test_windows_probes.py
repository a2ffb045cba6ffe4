"""Probes of Windows: the script under two PowerShell grammars, and its answer through the parser.

No Windows machine and no PowerShell was there: nothing here ran COLLECT. Every file in tests/recorded/windows is
constructed, in the form in which ConvertTo-Json prints (powershell-7 as PowerShell 7, the others as 5.1: it
escapes ' < > &), with numbers and names of our own. A test holds them to the names that the script uses.
"""

from __future__ import annotations

import bisect
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tree_sitter_powershell
import tree_sitter_pwsh
from hypothesis import given
from hypothesis import strategies as st
from test_probes import wanting
from tree_sitter import Language, Node, Parser

from healthchecker import (
    COLLECT,
    KEPT_BYTES,
    NOT_KNOWN,
    Check,
    Connection,
    CpuTicks,
    Deadline,
    LocalSession,
    Outcome,
    Output,
    Platform,
    ProbeError,
    ResourceSettings,
    Sample,
    SessionKeeper,
    WindowsOutput,
    build_windows_script,
    collect,
    complete,
    evaluate,
    parse_windows,
)

NONCE = "5eed5eed5eed5eed"
RECORDED = Path(__file__).parent / "recorded" / "windows"
GRAMMARS = {
    "powershell": Parser(Language(tree_sitter_powershell.language())),
    "pwsh": Parser(Language(tree_sitter_pwsh.language())),
}
HOSTILE = [
    "'; Remove-Item C:\\ -Recurse #",
    "\u2018; calc \u2019; calc \u201a; calc \u201b",  # PowerShell takes these four for single quotes, too
    "\u201c$(calc)\u201d \u201e`$x`\u201e",
    '"$(calc)" $env:TEMP ${x} @(calc) `n',
    "@'\ncalc\n'@\n@\"\n$(calc)\n\"@",
    "a\r\nb\n#>\n<#\n}}}) | calc; exit",
    "--% %PATH% ; & { calc }",
    "\\u0027; calc; \\",
    "Prüfung 😀 \x00\x1b\x7f\u2028",
    "WANTED",
]
CONSTRAINED = "Access denied (Constrained Language Mode)"
LACKS = {"load_per_cpu": NOT_KNOWN, "inode_percent": NOT_KNOWN}  # nobody hears of it who set no limit
READ = {"cpu_percent", "memory_percent", "commit_percent", "disk_percent"}
NO_MANAGER = (
    "cannot be read: the account lacks SC_MANAGER_CONNECT or SC_MANAGER_ENUMERATE_SERVICE (README: sc.exe sdset). "
    "Cannot open Service Control Manager on computer '.'. "
    "This operation might require other privileges."
)

about: Any = pytest.approx  # it compares with a float, which its type does not say
EXPECTED = {
    "administrator": Sample(
        details={
            "hostname": "DB1",
            "os": "Windows Server 2022 Datacenter",
            "kernel": "10.0 (build 20348.2227)",
            "uptime_seconds": 864000.0,
            "cpu_count": 4.0,
        },
        metrics={
            "memory_percent": about(40.0),
            "swap_percent": about(21.0526, abs=1e-4),
            "disk_percent C:": about(60.0),
            "disk_percent D:": about(10.0),
            "commit_percent": about(20.0, abs=1e-4),
        },
        ticks=CpuTicks(busy=864000000000.0, total=8640000000000.0),
        services={"Spooler": Outcome(True, "Running"), "MSSQL$PAYROLL": Outcome(True, "Running")},
        checks={"replication": Outcome(True, "12 jobs, the oldest is Monday's")},
        problems=LACKS,
    ),
    "plain-user": Sample(
        details={
            "hostname": "WS7",
            "os": "Windows 11 Pro",
            "kernel": "10.0 (build 22631.4317)",
            "uptime_seconds": 432000.0,
            "cpu_count": 8.0,
        },
        metrics={"memory_percent": about(50.0), "commit_percent": about(50.0), "disk_percent C:": about(90.0)},
        ticks=CpuTicks(busy=3456000000000.0, total=34560000000000.0),
        services={"Spooler": Outcome(False, NO_MANAGER)},
        checks={"backup": Outcome(False, "False"), "slow": Outcome(False, "no end in 2.5 s")},
        problems=LACKS | {"swap_percent": "only an administrator may read the page file"},
    ),
    "constrained-language": Sample(
        details={
            "hostname": "KIOSK3",
            "os": "Windows 10 Enterprise LTSC 2021",
            "kernel": "10.0 (build 19044.5131)",
            "cpu_count": 2.0,
        },
        metrics={},
        ticks=None,
        services={"Spooler": Outcome(False, NO_MANAGER)},
        checks={
            "port": Outcome(
                False,
                "Cannot invoke method. Method invocation is supported only on core types in this language mode.",
            )
        },
        problems=LACKS
        | dict.fromkeys(
            ["uptime_seconds", "memory_percent", "swap_percent", "disk_percent", "cpu_percent", "commit_percent"],
            CONSTRAINED,
        ),
    ),
    "german": Sample(
        details={
            "hostname": "ANMELDUNG",
            "os": "Windows Server 2019 Standard",
            "kernel": "10.0 (build 17763.6532)",
            "uptime_seconds": 1234567.0,
            "cpu_count": 4.0,
        },
        metrics={"memory_percent": about(75.0), "commit_percent": about(25.0), "disk_percent C:": about(75.0)},
        ticks=None,
        services={"Spooler": Outcome(False, "Stopped"), "Zeitgeber für Übergaben": Outcome(True, "Running")},
        checks={
            "Ablage": Outcome(
                False, 'Der Pfad "D:\\Ablage" kann nicht gefunden werden, da er nicht vorhanden ist.'
            ),
            "Prüfungen": Outcome(True, "3,14 Prüfungen <offen> 😀"),
        },
        problems=LACKS
        | {
            "cpu_percent": "Ungültige Klasse",
            "disk_percent": "E: has no size: locked by BitLocker; F: has no size: access denied",
        },
    ),
    "powershell-7": Sample(
        details={
            "hostname": "APP2",
            "os": "Windows Server 2025 Standard",
            "kernel": "10.0 (build 26100.2033)",
            "uptime_seconds": 60.0,
            "cpu_count": 16.0,
        },
        metrics={
            "memory_percent": about(10.0, abs=1e-4),
            "commit_percent": about(25.0, abs=1e-4),
            "disk_percent C:": about(50.0),
        },
        ticks=CpuTicks(busy=300000000.0, total=600000000.0),
        services={"W3SVC": Outcome(True, "Running"), "Nonesuch": Outcome(False, "no such service")},
        checks={
            "queue": Outcome(False, "Attempted to divide by zero."),
            "site": Outcome(True, "it's <up> & 'fine'"),
        },
        problems=LACKS,
    ),
}


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.json").read_text(encoding="utf-8")


def rows(name: str) -> list[dict[str, Any]]:
    """Of a recording: that of the script, and one for each check."""
    return [json.loads(line) for line in recorded(name).splitlines()[1:]]


def nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from nodes(child)


def tree(grammar: str, script: str) -> Node:
    return GRAMMARS[grammar].parse(script.encode()).root_node


def text(node: Node) -> bytes:
    return node.text or b""


def shape(root: Node) -> list[tuple[str, bytes]]:
    """Kinds of all nodes and texts of the leaves, but for the literal that holds what the operator wrote."""
    return [
        (node.type, b"" if node.children or text(node).startswith(b"'{\"services\"") else text(node))
        for node in nodes(root)
    ]


def hostile_script() -> str:
    checks = [Check(name=f"check {n}", command=text, timeout=2.5) for n, text in enumerate(HOSTILE)]
    return build_windows_script(wanting(Platform.WINDOWS, HOSTILE, checks))


# --- the script ---
@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("hostile", [False, True])
def test_grammar(grammar: str, hostile: bool) -> None:
    script = hostile_script() if hostile else build_windows_script(wanting(Platform.WINDOWS))
    wrong = [node for node in nodes(tree(grammar, script)) if node.type == "ERROR" or node.is_missing]
    assert [(node.type, node.start_point, node.text) for node in wrong] == []


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_grammar_of_what_reads_scripts_on_this_machine(grammar: str) -> None:
    """It is an argument: without quotes that a command line would need to protect."""
    script = LocalSession.SCRIPT.format(NONCE, build_windows_script(wanting(Platform.WINDOWS)))
    assert not tree(grammar, LocalSession.READER).has_error and not tree(grammar, script).has_error
    assert tree(grammar, LocalSession.READER[:-1]).has_error
    assert not re.search(r'["\\\n]', LocalSession.READER)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_grammar_sees_faults(grammar: str) -> None:
    """A cut-off or unbalanced script is an error to the grammar, so the test above can fail."""
    assert tree(grammar, COLLECT[: len(COLLECT) // 2]).has_error
    assert tree(grammar, COLLECT.replace("} else {", "} else", 1)).has_error
    assert tree(grammar, COLLECT.replace("'WANTED'", "'it's'")).has_error


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_names_and_commands_are_one_literal(grammar: str) -> None:
    """The syntax tree is that of a script that was asked for nothing; only the text of one literal differs."""
    plain_script = build_windows_script(wanting(Platform.WINDOWS))
    empty, hostile = (tree(grammar, text) for text in (plain_script, hostile_script()))
    assert shape(empty) == shape(hostile)
    literals = [node for node in nodes(hostile) if text(node).startswith(b"'{\"services\"") and not node.children]
    assert len(literals) == 1
    assert "string" in literals[0].type
    inside = text(literals[0])[1:-1]
    assert b"'" not in inside and inside.isascii() and not re.search(rb"[\x00-\x1f]", inside)
    wanted = json.loads(inside)
    assert [re.sub("(?s)`(.)", r"\1", name) for name in wanted["services"]] == HOSTILE
    assert [check["command"] for check in wanted["checks"]] == HOSTILE


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_unprotected_text_would_show(grammar: str) -> None:
    """Pasted in as it is, the same text changes the tree; so the test above can fail. The typographic quotes are
    unknown to both grammars: against those it is the test for ASCII that counts."""
    naive = COLLECT.replace("WANTED", '{"services"\'; calc #')
    assert shape(tree(grammar, naive)) != shape(tree(grammar, build_windows_script(wanting(Platform.WINDOWS))))


def test_script_is_plain() -> None:
    """ASCII, so that no code page matters; nothing that PowerShell 5.1 lacks."""
    script = hostile_script()
    assert script.isascii()
    assert not re.search(r"\?\?|\?\.|&&|\|\||-AsHashtable|-EscapeHandling|`u\{", COLLECT)


def test_the_comment_names_all_that_an_endpoint_has_to_allow() -> None:
    """Who makes one of their own goes by it."""
    source = (Path(__file__).parents[1] / "healthchecker.py").read_text(encoding="utf-8")
    named = source.partition("# What an endpoint (JEA) has to allow")[2].partition("\nCOLLECT = ")[0]
    code = re.sub(r"'[^'\n]*'|#.*", "", COLLECT)
    cmdlets = {name for name in re.findall(r"\b[A-Z]\w+-[A-Z]\w+", code) if not name.endswith("-Object")}
    wanted = cmdlets | set(re.findall(r"Win32_[A-Za-z]+(?=[ \"'])", COLLECT))
    assert len(wanted) > 20 and not [name for name in sorted(wanted) if not re.search(rf"\b{name}\b", named)]


def test_recordings_use_the_names_of_the_script() -> None:
    details = set(re.findall(r"\$r\.details\.(\w+)", COLLECT)) | {"hostname"}
    assert set(rows("administrator")[0]["details"]) == details
    amounts = {name.partition(" ")[0] for name in rows("administrator")[0]["amounts"]}
    assert amounts == set(re.findall(r"Put ['\"](\w+)", COLLECT))
    for name in EXPECTED:
        answer, *checks = rows(name)
        assert set(answer) == {"details", "amounts", "problems", "services", "number"}
        assert set(answer) == {*re.findall(r"\$r\.(\w+)", COLLECT), "number"}
        assert {key for row in answer["services"] for key in row} == {"name", "good", "text"}
        assert all(set(row) == {"name", "good", "text", "code", "then", "number"} for row in checks)
        assert [row["number"] for row in checks] == list(range(1, 1 + len(checks)))
        assert set(answer["problems"]) <= set(re.findall(r"Part '(\w+)'", COLLECT))
        assert recorded(name).isascii() and recorded(name).startswith("# Recorded of ")  # and why
    metrics = {"cpu_percent", "memory_percent", "swap_percent", "commit_percent", "disk_percent"}
    assert set(re.findall(r"Part '(\w+)'", COLLECT)) == metrics | {"os", "role", "uptime_seconds"}
    assert set(EXPECTED) == {path.stem for path in RECORDED.iterdir()}


# --- the answer ---
@pytest.mark.parametrize("name", EXPECTED)
def test_recorded(name: str) -> None:
    assert parse_windows(recorded(name), None) == EXPECTED[name]


def test_the_same_reading_twice() -> None:
    """CPU stays unknown and is no problem; nothing else is missing."""
    first = parse_windows(recorded("administrator"), None)
    assert parse_windows(recorded("administrator"), first.ticks) == first
    assert first.problems == LACKS


def test_output_around_the_answer() -> None:
    """What a check printed past its output, and the line ends of Windows."""
    noise = '#< CLIXML\r\n{"details":{}}\r\nWARNING: {}\r\n{"number":7}\r\n{\r\n'
    text = noise + recorded("administrator").replace("\n", f"\r\n{noise}")
    _, sample = collected("administrator", text, checks=[{"name": "replication", "command": "x"}])
    assert sample.checks == EXPECTED["administrator"].checks and sample.metrics == EXPECTED["administrator"].metrics


def answer(**parts: object) -> str:
    """What COLLECT prints, with other parts."""
    first, *recorded_checks = rows("administrator")
    checks: Any = parts.pop("checks", recorded_checks)
    return "\n".join(map(json.dumps, [first | parts, *({"number": n, **row} for n, row in enumerate(checks, 1))]))


def test_a_long_path_is_a_path() -> None:
    """A name of over 200 characters voided the whole answer."""
    name = "disk_percent C:\\mnt\\" + "x" * 250
    assert parse_windows(answer(amounts={name: [1, 2]}), None).metrics == {name: 50.0}


@pytest.mark.parametrize("judge", ["plain", "nagios"])
def test_a_text_is_of_a_length_to_be_kept(judge: str) -> None:
    """Whatever a host sends: it is stored and shown at each poll."""
    row = {"name": "long", "good": True, "text": "é" * KEPT_BYTES, "exit": judge}
    outcome = parse_windows(answer(checks=[row]), None).checks["long"]
    assert outcome.kept_for([]) == Outcome(True, "é" * (KEPT_BYTES // 2))


def test_only_known_details() -> None:
    sample = parse_windows(answer(details={"os": "Windows", "colour": "blue", "cpu_count": 2}), None)
    assert sample.details == {"os": "Windows", "cpu_count": 2.0}


def cpu(used: int, total: int, previous: tuple[float, float] | None) -> Sample:
    amounts = {"cpu_percent": [used, total], "memory_percent": [1, 2], "commit_percent": [1, 2]}
    amounts |= {"disk_percent C:": [1, 2]}
    return parse_windows(answer(amounts=amounts), previous and CpuTicks(*previous))


@pytest.mark.parametrize(
    ("used", "total", "percent"),
    [
        pytest.param(1_250_000, 11_000_000, 25.0, id="a quarter of a second"),
        pytest.param(1_000_000, 11_000_000, 0.0, id="idle"),
        pytest.param(995_000, 11_000_000, 0.0, id="idle by a clock that is ahead"),
        pytest.param(2_000_000, 11_000_000, 100.0, id="busy"),
        pytest.param(2_000_001, 11_000_000, None, id="restarted: idle time began again"),
        pytest.param(500_000, 11_000_000, None, id="counters went back"),
        pytest.param(1_000_000, 10_000_000, None, id="the same reading"),
        pytest.param(900_000, 9_000_000, None, id="the clock was set back"),
    ],
)
def test_cpu_between_two_polls(used: int, total: int, percent: float | None) -> None:
    """1 s after the first reading, in units of 100 ns / 10; unknown is no problem."""
    sample = cpu(used, total, (1_000_000, 10_000_000))
    assert sample.metrics.get("cpu_percent") == percent
    assert sample.problems == LACKS


def test_cpu_between_polls_of_a_host_that_is_up_for_days() -> None:
    """The counters as Windows gives them: 60 s later, 45 s of them idle."""
    now = rows("administrator")[0]["amounts"]["cpu_percent"]
    later = cpu(now[0] + 15 * 10**7, now[1] + 60 * 10**7, (float(now[0]), float(now[1])))
    assert later.metrics["cpu_percent"] == pytest.approx(25.0, abs=1e-3)


def test_no_page_file_is_no_problem() -> None:
    amounts = {name: [1, 2] for name in ("cpu_percent", "memory_percent", "commit_percent", "disk_percent C:")}
    sample = parse_windows(answer(amounts=amounts), None)
    assert sample.readings("swap_percent") == [] and sample.problems == LACKS


class Recording(Connection):
    """A connection whose host answers with a recording."""

    def __init__(self, text: str) -> None:  # a recording has no target, and shows no key
        self._output = text.encode()
        self.keeper = SessionKeeper(0)

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        self.script = script
        output.take(self._output)
        output.rest(None, None)  # or what was asked for and is missing would be waited for
        return True


def collected(name: str, text: str = "", **asked: object) -> tuple[ResourceSettings, Sample]:
    """What a poll of a resource gives that asks for more than its host answers, or for less."""
    resource = {"name": "a", "hostname": "a", "platform": "windows", "username": "u", **asked}
    wanted = ResourceSettings.model_validate(resource)
    return wanted, collect(wanted, Recording(text or recorded(name)), None)


def test_what_the_poll_has_no_time_for_is_bad_and_says_so() -> None:
    checks = [{"name": name, "command": name, "timeout": 600} for name in ("replication", "sleeps", "last")]
    resource = {"name": "a", "hostname": "a", "platform": "windows", "username": "u", "timeout": 20, "checks": checks}
    over = Deadline(0)
    over.seconds = 20
    output = WindowsOutput(ResourceSettings.model_validate(resource), "@mark", over)
    assert not output.take(recorded("administrator").encode())
    assert output.rest(None, ProbeError("timeout", "late")) == ""
    said = parse_windows(output.printed.decode().removesuffix("@mark"), None).checks
    assert list(said.values()) == [
        EXPECTED["administrator"].checks["replication"],
        Outcome(False, "no end when the poll's time was over"),
        Outcome(False, "not run: the poll's 20 s were over"),
    ]


def test_load_is_missed_only_where_it_has_a_limit() -> None:
    limits = {"load_per_cpu": "4", "cpu_percent": "90"}
    wanted, sample = collected("administrator", limits=limits)
    assert sample.problems == {"load_per_cpu": NOT_KNOWN}
    verdict = evaluate(sample, wanted)
    assert (verdict.state, verdict.reason) == ("degraded", f"load_per_cpu cannot be read: {NOT_KNOWN}")
    wanted, sample = collected("administrator", limits={"cpu_percent": "90"})
    assert (sample.problems, evaluate(sample, wanted).state) == ({}, "healthy")


def test_paths_that_a_limit_names_are_asked_for() -> None:
    """Drives are found anyway, patterns name no path, and where there is no limit nobody has to know the size."""
    mounts = {"D:": "9", "E:\\": "9", "C:\\mnt\\it's": "9", "c:\\Clusterstorage\\*": "9", "C:\\off": "off", "/x": "9"}
    resource = {"name": "a", "hostname": "a", "platform": "windows", "username": "u"}
    limits = {"disk_percent": {"fail": "95", "mounts": mounts}}
    connection = Recording(recorded("administrator"))
    collect(ResourceSettings.model_validate({**resource, "limits": limits}), connection, None)
    asked = re.search(r"\$wanted = '(.*)' \|", connection.script)
    assert asked and json.loads(asked[1])["mounts"] == ["C:\\mnt\\it's"]


def test_the_text_that_is_sent_is_the_same_at_each_poll() -> None:
    """Windows logs suspicious words with the text around them: an event of each text that there is."""
    limits = {"disk_percent": {"fail": "95", "mounts": {"C:\\x": "9"}}}
    asked = {"services": ["a"], "checks": [{"name": "b", "command": "c"}], "limits": limits}
    resource = {"name": "a", "hostname": "a", "platform": "windows", "username": "u", **asked}
    connection, sent = Recording(recorded("administrator")), set()
    for _ in range(2):
        collect(ResourceSettings.model_validate(resource), connection, None)
        sent.add(connection.script)
    assert len(sent) == 1


def test_a_mount_point_that_a_limit_names_and_nobody_read() -> None:
    """It is not there, or an endpoint was made before the limit; nor is a drive."""
    named = ["C:\\mnt\\data", "c:\\clusterstorage\\Volume1", "e:", "F:\\", "C:\\mnt\\*", "D:", "d:\\", "[XY]:", "/srv"]
    mounts: dict[str, object] = dict.fromkeys(named, "100") | {"G:": "off"}
    settings, sample = collected("administrator", limits={"disk_percent": {"fail": "100", "mounts": mounts}})
    here = [name.partition(" ")[2].casefold() for name in sample.metrics if name.startswith("disk_percent ")]
    lost = [mount for mount in named[:4] if mount.casefold() not in here]
    assert lost[-2:] == ["e:", "F:\\"] and sample.problems["disk_percent"] == f"no disk there: {', '.join(lost)}"
    assert evaluate(sample, settings).state == "degraded"
    linux = settings.model_copy(update={"platform": Platform.LINUX})  # with the same `defaults`
    assert complete(EXPECTED["administrator"], linux).problems["disk_percent"] == "no disk there: /srv"


LOCKED = {"disk_percent D:": "has no size: locked", "disk_percent E:\\mnt": "has no size: not\nformatted"}


@pytest.mark.parametrize(("mounts", "problem"), [
    ({"d:": "off", "E:\\*": "off"}, None), ({"D:": "off"}, "E:\\mnt has no size: not formatted"),
    ({}, "D: has no size: locked; E:\\mnt has no size: not formatted"),
    ({"D:": "9", "E:\\mnt": "off", "F:": "9"}, "D: has no size: locked; no disk there: F:"),
])  # fmt: skip
def test_a_filesystem_that_is_off_may_be_locked(mounts: dict[str, str], problem: str | None) -> None:
    """It degraded its host for good. What nobody may read is not gone; and a hash table has no order that lasts."""
    read = {"disk_percent C:": [1, 2], "memory_percent": [1, 2], "commit_percent": [1, 2], "cpu_percent": [1, 2]}
    locked = dict(reversed(LOCKED.items()))
    for amounts in (read, {name: amount for name, amount in read.items() if "disk" not in name}):
        limits = {"disk_percent": {"fail": "95", "mounts": mounts}}
        settings, sample = collected("", answer(amounts=amounts, problems=locked) + "\n", limits=limits)
        assert sample.problems == ({"disk_percent": problem} if problem else {})
        assert evaluate(sample, settings).state == ("degraded" if problem else "healthy")
    assert "disk_percent" in collected("", answer(amounts=read, problems=LOCKED) + "\n")[1].problems


@pytest.mark.parametrize(("limit", "problem"), [("off", None), ("9", "D: 3 of 2 is no share")])
def test_a_filesystem_that_is_off_may_be_odd(limit: str, problem: str | None) -> None:
    """More free than there is, for instance."""
    amounts = {"memory_percent": [1, 2], "commit_percent": [1, 2], "cpu_percent": [1, 2], "disk_percent D:": [3, 2]}
    limits = {"disk_percent": {"fail": "95", "mounts": {"D:": limit}}}
    _, sample = collected("", answer(amounts=amounts) + "\n", limits=limits)
    assert sample.problems.get("disk_percent") == problem


def test_a_host_names_no_problem_that_is_ours() -> None:
    """A service or check that is missing would count as one that an endpoint does not know."""
    problems = {"service S": NOT_KNOWN, "check a": NOT_KNOWN, "endpoint": "x"}
    text = answer(problems=problems, services=[], checks=[])
    settings, sample = collected("", text + "\n", services=["S"], checks=[{"name": "a", "command": "c"}])
    assert not sample.services["S"].good and not sample.checks["a"].good and "endpoint" not in sample.problems
    assert evaluate(sample, settings).state == "unhealthy"


@pytest.mark.parametrize("asked", [{"platform": "local"}, {"platform": "windows", "username": "u", "endpoint": True}])
def test_rows_without_the_nonce_of_the_poll_are_not_heard(asked: dict[str, object]) -> None:
    """On this machine, where what an earlier check has started prints, too; and of an endpoint, which has nothing else
    to prove that it is no old answer."""
    wanted = {"name": "a", "hostname": "localhost", "checks": [{"name": "b", "command": "c"}], **asked}
    output = WindowsOutput(ResourceSettings.model_validate(wanted), f"\n@{NONCE} done\n", Deadline(60))
    lines = [
        {"number": number, "name": "b", "good": number == 1, "text": str(nonce), "then": ""} | nonce
        for number in (0, 1)
        for nonce in ({}, {"nonce": NONCE[::-1]}, {"nonce": NONCE})
    ]
    assert [output.take(f"{json.dumps(line)}\n".encode()) for line in lines] == [False] * 5 + [True]
    assert output.printed.decode().count(NONCE) == 5 and NONCE[::-1] not in output.printed.decode()


def watched(*lines: str, checks: str = "ab") -> WindowsOutput:
    """An output that got these lines, of a resource with checks of these names."""
    wanted = {"name": "a", "hostname": "a", "platform": "windows", "username": "u",
              "checks": [{"name": name, "command": "c"} for name in checks]}  # fmt: skip
    output = WindowsOutput(ResourceSettings.model_validate(wanted), "mark", Deadline(60))
    output.take("".join(f"{line}\n" for line in [json.dumps({"number": 0}), *lines]).encode())
    return output


def good_checks(output: WindowsOutput) -> dict[str, bool]:
    shown = [json.loads(line) for line in output.printed.removesuffix(b"mark").decode().split("\n")]
    return {row["name"]: row["good"] and not row.get("code") for row in shown if row["number"]}


RAN = json.dumps({"number": 1, "name": "a", "good": True, "text": "", "code": None, "then": ""})


def test_a_check_is_late_at_the_very_tick_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of Windows stands for 16 ms, and who waits until a tick wakes at it."""
    output = watched(RAN)
    now_mono = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_mono)
    output.due_mono = now_mono
    assert output.rest(None, None) == "" and good_checks(output) == {"a": True, "b": False}
    assert json.loads(output.printed.removesuffix(b"mark").splitlines()[2])["text"] == "no end in 5 s"


def test_a_check_that_nobody_saw_end_is_never_good() -> None:
    """Whatever exit code is known: it is that of the shell, or of a check before it."""
    lost = watched(f"x{RAN}", checks="a")
    assert lost.rest(0, None) == "" and good_checks(lost) == {"a": False}
    late = watched(RAN)
    assert late.rest(0, ProbeError("timeout", "no end in 5 s")) == "" and good_checks(late) == {"a": True, "b": False}
    never = watched(checks="abc")
    for number in range(4):  # with a second try
        assert bool(never.rest(0, None)) is (number < 3)
    assert good_checks(never) == {"a": False, "b": False, "c": False}


def test_a_powershell_that_ends_before_its_first_word_says_nothing_of_the_check() -> None:
    """One of wine's does so once in some thousands: the check behind an `exit` was bad, though nobody had run it. It
    is tried again once in a poll."""
    output = watched(RAN.replace('"then": ""', '"then": "exit"'))
    assert [output.rest(0, None).partition("\n")[0] for _ in range(2)] == ["$first = 2"] * 2
    for row in ('{"number": 1}', RAN.replace('"number": 1, "name": "a"', '"number": 2, "name": "b"')):
        output.take(f"{row}\n".encode())
    assert output.whole and good_checks(output) == {"a": True, "b": True}
    again = watched(RAN.replace('"then": ""', '"then": "exit"'), checks="abc")
    assert [again.rest(0, None).partition("\n")[0] for _ in range(4)] == [*["$first = 2"] * 2, "$first = 3", ""]
    assert good_checks(again) == {"a": True, "b": False, "c": False}


def test_a_check_that_ended_by_exit_is_bad_where_its_code_cannot_be_had() -> None:
    """And those behind it run."""
    output = watched(RAN.replace('"then": ""', '"then": "exit"'))
    assert output.rest(None, None).startswith("$first = 2\n")
    for row in ('{"number": 1}', RAN.replace('"number": 1, "name": "a"', '"number": 2, "name": "b"')):
        output.take(f"{row}\n".encode())
    assert output.whole and good_checks(output) == {"a": False, "b": True}
    assert b"ended by exit, whose code cannot be had" in output.printed


def test_rows_that_are_none() -> None:
    """What a check prints past its output, or a host makes up."""
    made_up = ['{"number": 1.0}', '{"number": true}', '{"number": 1e999}', '{"number": null}', "{}", '{"number": 2}']
    output = watched(*made_up, RAN, checks="a")
    assert output.whole and good_checks(output) == {"a": True}


@pytest.mark.parametrize("word", ["begin", "x", 5, None])
def test_what_no_script_does_then_is_nothing(word: object) -> None:
    """A host that made one up behind the last row had us look for a check that is not there."""
    output = watched(RAN.replace('"then": ""', f'"then": {json.dumps(word)}'), checks="a")
    assert output.rest(0, None) == "" and output.whole and good_checks(output) == {"a": True}


def test_what_a_script_leaves_is_said_behind_the_last_row() -> None:
    """So that no check waits for it. What comes earlier is a check's own word."""
    clean = '{"number": 1, "clean": true}'
    output = watched(clean, RAN, checks="a")
    assert output.whole and not output.clean
    printed = bytes(output.printed)
    output.take(f"{clean}\n{RAN}\n".encode())
    assert output.clean and output.printed == printed
    ended = watched(RAN.replace('"then": ""', '"then": "exit"'), clean, checks="a")
    assert ended.rest(0, None) == "" and ended.whole and ended.clean


def test_names_of_services_are_no_patterns() -> None:
    """Get-Service takes wildcards; a service is asked for by its name alone, and answered under it."""
    name = "a`*[b]?$(1)"
    asked = re.search(r"\$wanted = '(.*)' \|", build_windows_script(wanting(Platform.WINDOWS, [name])))
    assert asked
    escaped = json.loads(asked[1])["services"]
    assert escaped == ["a```*`[b`]`?$(1)"]
    reported = answer(services=[{"name": escaped[0], "good": True, "text": "Running"}], details={"cpu_count": 1})
    assert parse_windows(reported, None).services == {name: Outcome(True, "Running")}


def test_nothing_readable_is_no_sample() -> None:
    nothing: dict[str, object] = {"details": {}, "amounts": {}, "services": [], "checks": []}
    with pytest.raises(ProbeError, match=r"nothing can be read: .*no rights") as error:
        parse_windows(answer(**nothing, problems={"os": "no rights"}), None)
    assert error.value.cause == "protocol"


def test_what_was_asked_for_and_not_answered_is_bad() -> None:
    checks = [{"name": "replication", "command": "x"}, {"name": "other", "command": "x"}]
    _, sample = collected("administrator", services=["Spooler", "W3SVC"], checks=checks)
    assert sample.services == {"Spooler": Outcome(True, "Running"), "W3SVC": Outcome(False, "no answer")}
    assert sample.checks["other"] == Outcome(False, "ended the script")
    assert sample.checks["replication"].good


def test_what_a_plain_user_may_not_read_degrades_only_where_it_has_a_limit() -> None:
    wanted, sample = collected("plain-user", limits={"swap_percent": "90"})
    sample = replace(sample, checks={}, services={})
    assert evaluate(sample, wanted).state == "degraded"
    assert evaluate(sample, collected("plain-user")[0]).state == "healthy"


@pytest.mark.parametrize(
    ("amounts", "problems"),
    [
        pytest.param({}, READ, id="nothing"),
        pytest.param({"memory_percent": [3, 2]}, READ, id="too much"),
        pytest.param({"cpu_percent": [-1, 2], "memory_percent": [0, 0], "disk_percent C:": [-1, -1]}, READ,
                     id="negative and of nothing"),
        pytest.param({**{f"{name}{' C:' * (name[0] == 'd')}": [1, 2] for name in READ},
                      "disk_percent D:": [1, 0]}, {"disk_percent"}, id="one drive of two"),
        pytest.param({**{f"{name}{' C:' * (name[0] == 'd')}": [1, 2] for name in READ},
                      "disk_percent " + "x" * 5000: [1, 2]}, {"disk_percent"}, id="a name of 5,000 characters"),
    ],
)  # fmt: skip
def test_amounts_that_are_none(amounts: object, problems: set[str]) -> None:
    sample = parse_windows(answer(amounts=amounts), None)
    assert {name.partition(" ")[0] for name in sample.problems} - LACKS.keys() == problems
    assert all(0 < value <= 100 for value in sample.metrics.values())


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("{", id="cut off"),
        pytest.param(recorded("administrator")[:-40], id="cut off later"),
        pytest.param(recorded("administrator").partition("\n{")[0], id="no first row"),
        pytest.param("[]", id="a list"),
        pytest.param("{}", id="empty"),
        pytest.param("x" * (1 << 20), id="1 MiB of nonsense"),
        pytest.param("{" * (1 << 20), id="1 MiB of braces"),
        pytest.param('{"details":' * 90_000, id="1 MiB of depth"),
        pytest.param('{"details":' + "[" * 50_000 + "]" * 50_000 + "}", id="lists in lists"),
        pytest.param("#< CLIXML\n<Objs>Zugriff verweigert</Objs>", id="CLIXML"),
        pytest.param(answer(details={"uptime_seconds": float("nan")}), id="NaN"),
        pytest.param(answer(amounts={"memory_percent": [float("inf"), 2]}), id="infinity"),
        pytest.param(answer(amounts={"memory_percent": [1e3, 2e3]}), id="floats"),
        pytest.param(answer(amounts={"memory_percent": ["1", "2"]}), id="numbers as texts"),
        pytest.param(answer(amounts={"memory_percent": [True, True]}), id="truth as numbers"),
        pytest.param(answer(amounts={"memory_percent": [1]}), id="half an amount"),
        pytest.param(answer(amounts={"memory_percent": [1, 1 << 64]}), id="65 bits"),
        pytest.param(answer().replace("864000", "9" * 4000), id="4,000 digits"),
        pytest.param(answer().replace("864000", "9" * 100_000), id="100,000 digits"),
        pytest.param(answer(amounts={"hostname": [1, 2]}), id="no metric"),
        pytest.param(answer(services=None), id="no services"),
        pytest.param(answer(services={}), id="services as a mapping"),
        pytest.param(answer(checks=[{"name": "a", "good": 1, "text": ""}]), id="a number as truth"),
        pytest.param(answer(checks=[{"name": "a", "text": ""}]), id="a check without judgement"),
        pytest.param(answer(checks=[{"name": None, "good": True, "text": ""}]), id="a check without name"),
        pytest.param(answer(problems=[]), id="problems as a list"),
        pytest.param(answer(problems={"cpu_percent": None}), id="a problem without text"),
    ],
)
def test_not_an_answer(text: str) -> None:
    with pytest.raises(ProbeError, match="the script was not run") as error:
        parse_windows(text, None)
    assert error.value.cause == "protocol"
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_texts_are_kept_short_and_clean() -> None:
    checks = [{"name": "long", "good": True, "text": "ä" * 9000},
              {"name": "odd", "good": True, "text": "\x1b[1ma\ud83d\x00\n\tb\r"}]  # fmt: skip
    sample = parse_windows(answer(checks=checks, problems={"role": "a\nb" * 999}), None)
    assert len(sample.checks["long"].text.encode()) == KEPT_BYTES
    assert sample.checks["odd"].text == "[1ma?\n\tb"
    assert sample.problems["role"].startswith("a ba b") and len(sample.problems["role"]) <= 200


# --- whatever comes ---
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from([
    "hostname", "os", "uptime_seconds", "cpu_percent", "memory_percent", "swap_percent", "commit_percent",
    "disk_percent C:", "",
])  # fmt: skip
ROWS = st.lists(st.fixed_dictionaries({"name": st.text(), "good": st.booleans(), "text": st.text()}), max_size=3)
NUMBERS = st.integers(min_value=-(1 << 65), max_value=1 << 65)
ANSWERS = st.fixed_dictionaries({
    "details": st.dictionaries(NAMES, NUMBERS | st.text()) | VALUES,
    "amounts": st.dictionaries(NAMES, st.lists(NUMBERS, min_size=2, max_size=2)) | VALUES,
    "problems": st.dictionaries(NAMES, st.text()) | VALUES,
    "services": ROWS | VALUES,
    "number": st.just(0) | VALUES,
})  # fmt: skip


def check_sample(text: str) -> None:
    """A sample of sane values, or the one error."""
    try:
        sample = parse_windows(text, CpuTicks(0.0, 0.0))
    except ProbeError as error:
        assert error.cause == "protocol"
        return
    assert all(0 <= value <= 100 for value in sample.metrics.values())
    repr(sample).encode()  # no halves of surrogate pairs
    told = {name.partition(" ")[0] for name in sample.problems}     # of one mount, too
    for metric in ("memory_percent", "commit_percent", "disk_percent"):
        assert sample.readings(metric) or metric in told


@given(ANSWERS, ROWS | st.lists(st.dictionaries(st.text(), VALUES), max_size=2))
def test_any_answer(said: dict[str, object], checks: list[dict[str, object]]) -> None:
    numbered = [{"number": number, **row} for number, row in enumerate(checks, 1)]
    check_sample("\n".join(map(json.dumps, [said, *numbered])))


@given(st.integers(0, 2000), st.integers(0, 40), st.text(max_size=10))
def test_damaged_answer(at: int, length: int, put: str) -> None:
    text = recorded("administrator").partition("\n")[2]
    check_sample(text[:at] + put + text[at + length :])


@given(st.text() | st.binary().map(lambda raw: raw.decode(errors="replace")))
def test_any_text(text: str) -> None:
    check_sample(text)
    check_sample("{" + text)


def readable(depth: int) -> bool:
    """Whether Python reads JSON of such a depth."""
    try:
        json.loads("[" * depth + "]" * depth)
    except RecursionError:
        return False
    return True


def test_an_answer_that_can_just_be_read_is_none() -> None:
    """A little less deep, it is read and cannot be written any more."""
    deepest = bisect.bisect_left(range(200_000), 1, key=lambda depth: not readable(depth))
    for depth in range(deepest - 60, deepest + 10):
        with pytest.raises(ProbeError, match="the script was not run; output: "):
            collected("", f'{{"number": 0, "details": {{}}, "x": {"[" * depth}{"]" * depth}}}\n')
