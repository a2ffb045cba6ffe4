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


@given(st.integers(0, 3), st.text(), st.text() | st.text("'|= \n;%-.,0123456789abeE+\xb5U", max_size=300))
@example(0, "", "".join(f"l{n}=1 " for n in range(300)))
def test_any_text_gives_numbers_within_bounds_or_none(status: int, text: str, data: str) -> None:
    found = by_nagios(status, printed(f"{text}|{data}")).metrics
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
