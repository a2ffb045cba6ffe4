"""Evaluate: a sample against the limits of its resource, and the rise and fall of a standing."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

import healthchecker
from healthchecker import Outcome, ResourceSettings, Sample, Standing, Verdict, evaluate, near_limits, settle

BOTH = {"warn": 80, "fail": 95}
WORST_LINE = 500  # characters of a reason


def settings(**changed: Any) -> ResourceSettings:
    return ResourceSettings.model_validate(
        {"name": "db1", "hostname": "localhost", "platform": "local"} | changed
    )


def sample(
    metrics: dict[str, float] | None = None,
    problems: dict[str, str] | None = None,
    services: dict[str, Outcome] | None = None,
    checks: dict[str, Outcome] | None = None,
) -> Sample:
    return Sample({"hostname": "db1"}, metrics or {}, None, services or {}, checks or {}, problems or {})


def outcomes(**texts: str) -> dict[str, Outcome]:
    """good=... is a good one, every other word a bad one with this text."""
    return {name: Outcome(name.startswith("good"), text) for name, text in texts.items()}


# name: limits, what was read, the state (with its cause), and what the reason names ("!": must not name)
VERDICTS: dict[str, tuple[dict[str, Any], Sample, str, list[str]]] = {
    "no limit, nothing decides": ({}, sample({"cpu_percent": 100.0}), "healthy", []),
    "a problem without a limit": ({}, sample({}, {"cpu_percent": "exit status 1"}), "healthy", []),
    "below both": ({"cpu_percent": BOTH}, sample({"cpu_percent": 79.9}), "healthy", []),
    "zero is a reading": ({"cpu_percent": BOTH}, sample({"cpu_percent": 0.0}), "healthy", []),
    "warn is not crossed when equal": ({"cpu_percent": BOTH}, sample({"cpu_percent": 80.0}), "healthy", []),
    "above warn": ({"cpu_percent": BOTH}, sample({"cpu_percent": 80.1}), "degraded: limit", ["cpu_percent", "80"]),
    "fail is not crossed when equal": (
        {"cpu_percent": BOTH},
        sample({"cpu_percent": 95.0}),
        "degraded: limit",
        ["80"],
    ),
    "a hair above fail": (
        {"cpu_percent": BOTH},
        sample({"cpu_percent": 95.0 + 1e-9}),
        "unhealthy: limit",
        ["cpu_percent"],
    ),
    "above fail": (
        {"cpu_percent": BOTH},
        sample({"cpu_percent": 99.0}),
        "unhealthy: limit",
        ["cpu_percent", "99", "95"],
    ),
    "a scalar means fail": (
        {"disk_percent": "90"},
        sample({"disk_percent /": 90.1}),
        "unhealthy: limit",
        ["/", "90"],
    ),
    "a scalar, equal": ({"disk_percent": "90"}, sample({"disk_percent /": 90.0}), "healthy", []),
    "100 cannot be crossed": ({"memory_percent": "100"}, sample({"memory_percent": 100.0}), "healthy", []),
    "warn alone never fails": (
        {"swap_percent": {"warn": 1}},
        sample({"swap_percent": 100.0}),
        "degraded: limit",
        ["swap"],
    ),
    "fail alone never warns": ({"swap_percent": {"fail": 99}}, sample({"swap_percent": 98.0}), "healthy", []),
    "on Windows case is nothing": (
        {"disk_percent": {"fail": "90", "mounts": {"c:\\Mnt\\*": "off", "c:\\MNT\\data\\": "80", "d:": "off"}}},
        sample({"disk_percent C:\\mnt\\data": 85.0, "disk_percent C:\\mnt\\b": 99.0, "disk_percent D:": 99.0}),
        "unhealthy: limit",
        ["disk_percent C:\\mnt\\data at 85.0, fail above 80"],
    ),
    "load is no percentage": (
        {"load_per_cpu": "250"},
        sample({"load_per_cpu": 251.0}),
        "unhealthy: limit",
        ["load_per_cpu"],
    ),
    "one filesystem of several": (
        {"disk_percent": "90"},
        sample({"disk_percent /": 10.0, "disk_percent /var": 97.0, "disk_percent /srv": 90.0}),
        "unhealthy: limit",
        ["/var", "!/srv"],
    ),
    "the limit of another metric": ({"memory_percent": "90"}, sample({"cpu_percent": 99.0}), "healthy", []),
    "two crossed limits are both named": (
        {"cpu_percent": "90", "memory_percent": "90"},
        sample({"cpu_percent": 91.0, "memory_percent": 92.0}),
        "unhealthy: limit",
        ["cpu_percent", "memory_percent"],
    ),
    "failing outweighs warning": (
        {"cpu_percent": BOTH, "memory_percent": BOTH},
        sample({"cpu_percent": 85.0, "memory_percent": 96.0}),
        "unhealthy: limit",
        ["memory_percent"],
    ),
    "a limit that cannot be read": (
        {"memory_percent": "90"},
        sample({"cpu_percent": 1.0}, {"memory_percent": "no MemAvailable"}),
        "degraded: limit",
        ["memory_percent", "no MemAvailable"],
    ),
    "one filesystem that cannot be read": (
        {"disk_percent": "90"},
        sample({"disk_percent /": 10.0}, {"disk_percent": "df: /data: Input/output error"}),
        "degraded: limit",
        ["/data", "Input/output error"],
    ),
    "the CPU at the first poll": ({"cpu_percent": "90"}, sample({"memory_percent": 5.0}), "healthy", []),
    "a machine without swap": ({"swap_percent": "90"}, sample({"memory_percent": 5.0}), "healthy", []),
    "a good service": ({}, sample(services=outcomes(good="active")), "healthy", []),
    "a failed service": (
        {},
        sample(services=outcomes(sql="inactive")),
        "unhealthy: check",
        ["service", "sql", "inactive"],
    ),
    "a good check": ({}, sample(checks=outcomes(good="all fine")), "healthy", ["!all fine"]),
    "a failed check": (
        {},
        sample(checks=outcomes(lag="42 s behind")),
        "unhealthy: check",
        ["check", "lag", "42 s behind"],
    ),
    "a failed check that is silent": ({}, sample(checks=outcomes(lag="")), "unhealthy: check", ["lag"]),
    "a service and a check": (
        {},
        sample(services=outcomes(sql="dead", good="active"), checks=outcomes(lag="late")),
        "unhealthy: check",
        ["sql", "lag", "!good"],
    ),
    "a crossed limit and a failed check": (
        {"cpu_percent": "90"},
        sample({"cpu_percent": 91.0}, checks=outcomes(lag="late")),
        "unhealthy: limit",
        ["cpu_percent", "lag"],
    ),
    "a warning beside a check that warns": (
        {"cpu_percent": BOTH},
        sample({"cpu_percent": 85.0}, checks={"lag": Outcome(True, "late", degraded=True)}),
        "degraded: limit",
        ["cpu_percent", "lag"],
    ),
    "a warning beside a failed check": (
        {"cpu_percent": BOTH},
        sample({"cpu_percent": 85.0}, checks=outcomes(lag="late")),
        "unhealthy: check",
        ["lag"],
    ),
}


@pytest.mark.parametrize(("limits", "read", "state", "named"), VERDICTS.values(), ids=VERDICTS)
def test_verdict(limits: dict[str, Any], read: Sample, state: str, named: list[str]) -> None:
    verdict = evaluate(read, settings(limits=limits))
    assert ": ".join(filter(None, (verdict.state, verdict.cause))) == state
    assert verdict.healthy is not state.startswith("unhealthy")
    assert bool(verdict.reason) == (state != "healthy")
    for word in named:
        assert (word.lstrip("!") in verdict.reason) is not word.startswith("!"), verdict.reason


@pytest.mark.parametrize("text", ["two\nlines\r\n\x1b[31mred\x00", "x" * 10_000, "\N{SNOWMAN}" * 5000])
def test_reason_is_one_short_line(text: str) -> None:
    reason = evaluate(sample(checks=outcomes(noisy=text)), settings()).reason
    assert reason.isprintable()
    assert len(reason) <= WORST_LINE
    assert "noisy" in reason


@pytest.mark.parametrize("metric", ["cpu_percent", "memory_percent"])
def test_limit_on_what_the_platform_cannot_tell(metric: str) -> None:
    """The POSIX fallback reads neither: a limit there must not pass for kept, as if the reading were zero."""
    sections = {"platform posix": "", "hostname": "box", "load_per_cpu": "0.5"}
    text = "".join(f"\n@N begin {title}\n{text}\n@N end 0\n" for title, text in sections.items())
    verdict = evaluate(
        healthchecker.parse_output(text, "N", None),
        settings(platform="unix", username="u", limits={metric: "90"}),
    )
    assert verdict.state == "degraded"
    assert metric in verdict.reason


# --- rise and fall ---
LETTERS = {
    "G": Verdict("healthy"),
    "D": Verdict("degraded", "limit", "disk_percent / at 85.0, warn above 80"),
    "B": Verdict("unhealthy", "limit", "disk_percent / at 96.0, fail above 95"),
    "C": Verdict("unhealthy", "check", "check lag: late"),
    "T": Verdict("unhealthy", "timeout", "no answer within 10 s"),
    "U": Verdict("unhealthy", "unreachable", "connection refused"),
    "P": Verdict("unhealthy", "protocol", "no SSH server"),
    "A": Verdict("unhealthy", "auth", "login refused"),
    "K": Verdict("unhealthy", "host_key", "host key changed"),
    "S": Verdict("unhealthy", "credential", "the password does not open"),
    "Z": Verdict("unhealthy", "stale", "no result for 132 s"),
}
SHORT = {"unknown": "?", "healthy": "h", "degraded": "d", "unhealthy": "u"}


def standings(letters: str, rise: int = 2, fall: int = 2) -> list[Standing]:
    """What a standing goes through, a verdict every 100 s from second 100 on."""
    limits, found = settings(rise=rise, fall=fall), [Standing()]
    for count, letter in enumerate(letters, 1):
        found.append(settle(found[-1], LETTERS[letter], limits, 100.0 * count))
    return found[1:]


# name: rise, fall, verdicts, states
SEQUENCES = {
    "a first good result counts at once": (2, 2, "G", "h"),
    "a first bad result counts at once": (2, 2, "B", "u"),
    "a first result, slow to rise and fall": (9, 9, "T", "u"),
    "a first warning": (2, 2, "D", "d"),
    "one bad result is forgiven": (2, 2, "GBG", "hhh"),
    "two in a row are not": (2, 2, "GBB", "hhu"),
    "not in a row": (2, 2, "GBGBGBG", "hhhhhhh"),
    "down and up": (2, 2, "GBBGBGG", "hhuuuuh"),
    "one good result is not enough": (2, 2, "BGBG", "uuuu"),
    "up again": (2, 2, "BGG", "uuh"),
    "rise 1, fall 1": (1, 1, "GBGB", "huhu"),
    "rise 3, fall 1": (3, 1, "GBGGBGGG", "huuuuuuh"),
    "rise 1, fall 3": (1, 3, "GBBGBBBG", "hhhhhhuh"),
    "bad results of several causes add up": (2, 3, "GBTU", "hhhu"),
    "a warning is good": (2, 2, "GDGBD", "hdhhd"),
    "a warning helps to rise": (2, 2, "BDG", "uuh"),
    "risen to a warning": (2, 2, "BGD", "uud"),
    "a warning stays while undecided": (2, 2, "DBD", "ddd"),
    "a limit waits for fall": (2, 2, "GB", "hh"),
    "a check waits for fall": (2, 2, "GC", "hh"),
    "a timeout waits for fall": (2, 2, "GT", "hh"),
    "unreachable waits for fall": (2, 2, "GU", "hh"),
    "protocol waits for fall": (2, 2, "GP", "hh"),
    "auth counts by fall": (2, 2, "GAA", "hhu"),
    "host_key counts at once": (2, 9, "GK", "hu"),
    "credential counts at once": (2, 9, "GS", "hu"),
    "stale counts at once": (2, 9, "GZ", "hu"),
    "auth, and up again": (2, 2, "GAAGG", "hhuuh"),
    "auth from a warning": (2, 1, "DA", "du"),
}


@pytest.mark.parametrize(("rise", "fall", "letters", "states"), SEQUENCES.values(), ids=SEQUENCES)
def test_sequence(rise: int, fall: int, letters: str, states: str) -> None:
    found = standings(letters, rise, fall)
    assert "".join(SHORT[standing.state] for standing in found) == states
    for standing in found:
        assert standing.healthy == (standing.state != "unhealthy")


@pytest.mark.parametrize(("rise", "fall"), [*product((1, 2, 3), repeat=2)])
def test_every_short_sequence(rise: int, fall: int) -> None:
    """A state changes exactly when the last `rise` or `fall` results, all of them, speak against it."""
    for length in range(1, 9):
        for letters in map("".join, product("GB", repeat=length)):
            state = letters[0]
            for end in range(2, length + 1):
                if letters[:end].endswith(("B" * fall) if state == "G" else ("G" * rise)):
                    state = "B" if state == "G" else "G"
            assert standings(letters, rise, fall)[-1].healthy == (state == "G"), letters


# verdicts, and cause and "since" after each
HISTORIES = {
    "nothing new": ("GGG", [("", 100), ("", 100), ("", 100)]),
    "down": ("GBB", [("", 100), ("", 100), ("limit", 300)]),
    "since is kept while it stays down": ("BBBG", [("limit", 100)] * 4),
    "a forgiven result": ("GBG", [("", 100)] * 3),
    "up": ("BGG", [("limit", 100), ("limit", 100), ("", 300)]),
    "to a warning": ("GD", [("", 100), ("limit", 200)]),
}


@pytest.mark.parametrize(("letters", "history"), HISTORIES.values(), ids=HISTORIES)
def test_cause_and_since(letters: str, history: list[tuple[str, int]]) -> None:
    assert [(standing.cause, standing.since_at) for standing in standings(letters)] == history


@pytest.mark.parametrize("letters", ["BT", "TA", "AB", "KU", "ZT", "UC", "BGT", "BGA"])
def test_cause_changes_at_once_while_unhealthy(letters: str) -> None:
    last = standings(letters, rise=3, fall=3)[-1]
    assert Verdict(last.state, last.cause, last.reason) == LETTERS[letters[-1]]


def test_cause_of_the_last_bad_result_counts() -> None:
    assert standings("GBT")[-1].cause == "timeout"


def test_reason_is_renewed() -> None:
    limits = settings()
    first = settle(Standing(), Verdict("unhealthy", "limit", "disk 96"), limits, 100.0)
    second = settle(first, Verdict("unhealthy", "limit", "disk 97"), limits, 200.0)
    assert (second.reason, second.since_at) == ("disk 97", 100.0)


# verdicts: whether the last one needs a soon second look
@pytest.mark.parametrize(
    ("letters", "decided"),
    [("G", True), ("B", True), ("GB", False), ("GBB", True), ("BG", False), ("BGG", True), ("GBG", True), ("GA", False),
     ("D", True), ("DB", False), ("BD", False), ("BGB", True)],
)  # fmt: skip
def test_decided(letters: str, decided: bool) -> None:
    assert standings(letters)[-1].decided is decided


@pytest.mark.parametrize(("outcome", "state", "named"), [
    (Outcome(True, "WARNING - so so", degraded=True), "degraded: check", "so so"),
    (Outcome(False, "CRITICAL", degraded=False), "unhealthy: check", "CRITICAL"),
    (Outcome(True, "OK"), "healthy", ""),
])  # fmt: skip
def test_a_check_that_warns_is_degraded(outcome: Outcome, state: str, named: str) -> None:
    verdict = evaluate(sample(checks={"x": outcome}), settings())
    assert ": ".join(filter(None, (verdict.state, verdict.cause))) == state and named in verdict.reason


def test_a_warning_of_a_check_is_not_named_beside_what_is_bad() -> None:
    verdict = evaluate(sample(checks={"x": Outcome(True, "so so", degraded=True), **outcomes(bad="gone")}), settings())
    assert verdict.state == "unhealthy" and verdict.reason == "check bad: gone"


# --- what is kept ---
def test_of_many_filesystems_those_nearest_to_their_limits_are_kept() -> None:
    """And how many more there are; what decides is all of them. Nothing else of the machine is lost."""
    many = {f"{metric} /data/{number}": number / 1000 for number in range(30_000)
            for metric in ("disk_percent", "inode_percent")}
    read = sample({"cpu_percent": 5.0, **many, "disk_percent /off": 99.0, "disk_percent /own": 60.0,
                   "inode_percent /files": 93.0, "load_per_cpu": 1.0})
    limits = {"disk_percent": {"fail": 90, "mounts": {"/off": "off", "/own": {"warn": 61, "fail": 99}}},
              "inode_percent": 95}
    kept = near_limits(replace(read, details={"hidden_filesystems": "/mnt, " * 30_000}), settings(limits=limits))
    assert [*kept.metrics][:5] == [
        "cpu_percent", "load_per_cpu", "disk_percent /own", "inode_percent /files", "disk_percent /data/29999"]
    assert "disk_percent /off" not in kept.metrics
    assert len({name.partition(" ")[2] for name in kept.metrics}) == 1 + healthchecker.FILESYSTEMS_SHOWN
    assert kept.metrics.items() <= read.metrics.items()
    assert kept.details["more_filesystems"] == f"{30_003 - healthchecker.FILESYSTEMS_SHOWN} more"
    assert len(str(kept.details["hidden_filesystems"])) < 3000


def test_all_of_few_filesystems_are_kept() -> None:
    few = {f"disk_percent /{number}": 1.0 for number in range(healthchecker.FILESYSTEMS_SHOWN)}
    assert near_limits(sample(few | {"cpu_percent": 1.0}), settings()) == sample(few | {"cpu_percent": 1.0})
