"""Fuzzing: a small budget for each target, the same in each run (others, for minutes: make soak); and the fuzzer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import fuzz
import pytest
from fuzz import TARGETS, Chance, Opened, Target, Wrong, damaged, feed_one

SEED = 13


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_only_documented_errors(name: str) -> None:
    """Some inputs are read and some are not, or it would be chance that nothing was found."""
    found = fuzz.fuzz(name, SEED, inputs=TARGETS[name].inputs)
    assert found.inputs == TARGETS[name].inputs and 0 < found.read < found.inputs


def test_an_input_is_made_of_its_number_alone() -> None:
    seeds = [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"{x: [1, 2]}\n", b""]
    made = [damaged(Chance(f"x 1 {at}"), seeds[at % 3], seeds) for at in range(300)]
    assert made[50:] == [damaged(Chance(f"x 1 {at}"), seeds[at % 3], seeds) for at in range(50, 300)]
    assert len(set(made)) > 200 and max(map(len, made)) <= fuzz.LONGEST


def test_what_is_wrong_names_how_to_try_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def feed(chance: Chance, data: bytes) -> bool:
        if chance.random() < 0.5:
            raise LookupError(data)
        raise ValueError(data)

    @contextlib.contextmanager
    def opened() -> Iterator[Opened]:
        yield Opened([b"abc"], [], feed)

    monkeypatch.setitem(TARGETS, "made", Target(opened, (ValueError,), 0))
    with pytest.raises(Wrong, match=r"'made', seed 7, number 1?[0-9] ") as first:
        fuzz.fuzz("made", 7, inputs=20)
    number = int(str(first.value).partition("number ")[2].split()[0])
    with opened() as again, pytest.raises(Wrong) as second:
        feed_one("made", again, 7, number)
    assert str(second.value) == str(first.value)
    monkeypatch.setattr(fuzz, "SECONDS_EACH", -1.0)
    monkeypatch.setitem(TARGETS, "made", Target(opened, (LookupError, ValueError), 0))
    with pytest.raises(Wrong, match="s of CPU: 'made', seed 7, number 0"):
        fuzz.fuzz("made", 7, inputs=1)
