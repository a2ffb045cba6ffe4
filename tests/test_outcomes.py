"""Outcomes: what an exit status and an output say of a check."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from healthchecker import JUDGES, KEPT_BYTES, LABELS_MAX, Outcome, by_nagios, printed

# what a plug-in prints: its numbers
PERFORMANCE = {
    "OK": {},
    "OK | a=1": {"a": 1},
    "OK|a=1;2;3;4;5 b=-2.5ms;@1:2;~:5 c=.5s d=5.": {"a": 1, "b": -2.5, "c": 0.5, "d": 5},
    "OK | us=1us ms=2ms s=3s %=4% B=5B KB=6KB MB=7MB GB=8GB TB=9TB c=10c":
        {"us": 1, "ms": 2, "s": 3, "%": 4, "B": 5, "KB": 6, "MB": 7, "GB": 8, "TB": 9, "c": 10},
    "OK | /=5MB;;;0;9 'C:\\ %'=7%": {"/": 5, "C:\\ %": 7},
    "OK | 'it''s = so'=1 plain=2": {"it's = so": 1, "plain": 2},
    "OK | ''=1 =2 a==3": {},
    "OK | 'a b=5 c=6": {},
    "OK | 'a b'c=5 d=1": {"d": 1},
    "OK\n | 'a b=5\nc'=6 d=1": {"d": 1},
    "OK | a=U b=nan c=inf d=1e5x-1 e=0x10 f=1,5 g=1.2.3 h=- i=+1 j=": {},
    "OK | size=1e+06B;2e6;3e6 b=1.5E-2s c=-1e3 d=1e e=1e+ f=1eB g=1e015": {
        "size": 1e6, "b": 0.015, "c": -1e3, "d": 1, "f": 1, "g": 1e15},
    "OK | a=1e99 b=999999999999999999e9 c=1e-99 d=1e999": {"c": 1e-99},
    "OK | a=1 a=2": {"a": 1},
    "OK | a =1 b= 2 c=3": {"c": 3},
    "OK | a=1\nlong text x=9\nmore | b=2\nc=3 d=4\n": {"a": 1, "b": 2, "c": 3, "d": 4},
    "OK\nlong text x=9": {},
    "OK | a=1 | b=2": {"a": 1, "b": 2},
    "OK | " + "x" * 101 + "=1 y=2": {"y": 2},
    "OK | '" + "x" * 101 + "'=1 y=2": {"y": 2},
    "OK | a=" + "9" * 19: {},
    "OK | temp=45°C;50 rate=1.5Mb/s a=5B/s;;;0 n=7/min h=41%RH m=2m²": {
        "temp": 45, "rate": 1.5, "a": 5, "n": 7, "h": 41, "m": 2},
}  # fmt: skip


@pytest.mark.parametrize("text", PERFORMANCE)
def test_performance_data(text: str) -> None:
    assert by_nagios(0, text).metrics == PERFORMANCE[text]


@pytest.mark.parametrize(("status", "good", "degraded"), [
    (0, True, False), (1, True, True), (2, False, False), (3, True, True), (4, False, False), (-1, False, False),
    (124, False, False), (126, False, False), (127, False, False), (137, False, False), (255, False, False),
])  # fmt: skip
def test_exit_codes(status: int, good: bool, degraded: bool) -> None:
    outcome = by_nagios(status, "SAID | a=1")
    assert outcome == Outcome(good, "SAID", degraded, {"a": 1.0} if 0 <= status <= 3 else {})
    assert by_nagios(status, "").text, "never without words"
    assert JUDGES["plain"](status, "SAID | a=1") == Outcome(status == 0, "SAID | a=1")


def test_the_text_is_without_numbers() -> None:
    assert by_nagios(0, "OK | a=1\nline\nlast | b=2").text == "OK\nline\nlast"


@pytest.mark.parametrize("tail", ["a=123456789", "a=123456789\r\n", "\x07\x07 a=123456789"])
def test_a_number_that_was_cut_is_none(tail: str) -> None:
    """A host keeps the first KEPT_BYTES bytes; control characters go before anybody looks."""
    for at in range(1, len(tail)):
        text = f"OK | whole=1 {'x' * KEPT_BYTES}"[: KEPT_BYTES - at - 1] + " " + tail[:at]
        assert len(text.encode()) == KEPT_BYTES
        assert by_nagios(0, printed(text)).metrics == {"whole": 1.0}


# Of a label that has a limit, why there is no number
WHY = {
    "OK | disk=50,5GB": "no number: 50,5GB",
    "OK | disk=U;1;2": "no number: U;1;2",
    "OK | 'disk'=5/7": "no number: 5/7",
    "OK | disk=": "no number: ",
    "OK | disk=1e99B": "too large: 1e99",
    "OK | disk=" + "x" * 99: "no number: " + "x" * 40,
    "OK | disks=5": None,
    "OK | " + "x" * KEPT_BYTES + " disk=5": "not in the first 4,096 bytes of its output",
    ("OK | " + "x" * KEPT_BYTES)[: KEPT_BYTES - 8] + " disk=123": "no number: 12…",
}


@pytest.mark.parametrize("text", WHY)
def test_a_limited_number_that_is_none_says_why(text: str) -> None:
    outcome = by_nagios(0, printed(text[:KEPT_BYTES])).kept_for(["disk"])
    assert (outcome.metrics.get("disk"), outcome.problems.get("disk")) == (None, WHY[text])
    assert by_nagios(0, printed(text[:KEPT_BYTES])).kept_for([]).problems == {}, "nobody asked for it"


def test_what_has_a_limit_is_kept_before_all_else() -> None:
    """As check_nwc_health prints them of a switch with 48 ports."""
    labels = [f"Gi1/0/{port}_usage_{way}" for port in range(1, 49) for way in ("in", "out")]
    text = f"OK | {' '.join(f'{label}=1%' for label in labels)}"
    outcome = by_nagios(0, text).kept_for([labels[95], "other", labels[3]])
    assert list(outcome.metrics) == [*labels[: LABELS_MAX - 1], labels[95]]


@given(st.integers(0, 3), st.text(), st.text() | st.text("'|= \n;%-.,0123456789abeE+\xb5U", max_size=300))
@example(0, "", "".join(f"l{n}=1 " for n in range(300)))
def test_any_text_gives_numbers_within_bounds_or_none(status: int, text: str, data: str) -> None:
    found = by_nagios(status, printed(f"{text}|{data}")).kept_for({}).metrics
    assert len(found) <= LABELS_MAX
    for label, value in found.items():
        assert math.isfinite(value) and abs(value) < 1e18
        assert 1 <= len(label) <= 100 and "\n" not in label
        assert label.replace("'", "''") in printed(f"{text}|{data}"), "nobody printed that"


@pytest.mark.parametrize("text", ["'a " * 1500, "'" * 4096, "a=" * 2048, "'a''" * 1024, "a=1;" * 1024, "' " * 2048])
def test_no_text_takes_long(text: str) -> None:
    begun = time.process_time()
    by_nagios(0, f"OK | {text}")
    assert time.process_time() - begun < 0.5    # 3 ms
