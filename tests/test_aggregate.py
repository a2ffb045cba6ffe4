"""Aggregate: the health lease, by hand, against a naive model, and under threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from conftest import wait_for
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from healthchecker import Gate, HealthAggregator, Lease, ResourceSettings, lease_clock

START = 1000.0  # seconds, where the clock of a test begins
POLLER = object()  # reports for a resource that is not registered, since it does not count


class Clock:
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def transitions(aggregator: HealthAggregator) -> list[tuple[bool, str]]:
    """What the aggregator announced since the last call: open or not, and why."""
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(aggregator.transitions.get_nowait()[1:3])
    return found


@dataclass
class Bench:
    """An aggregator with a clock of its own, and a script of one-line steps for it."""

    clock: Clock
    aggregator: HealthAggregator
    owner: dict[str, object] = field(default_factory=dict)  # of the reports

    def step(self, line: str) -> None:
        """`+a`, `+a optional`, `start`, `a up`, `a up 5`, `a down`, `-a`, `wait 3`, `sweep`."""
        first, *rest = line.split()
        if first == "start":
            self.aggregator.start()
        elif first == "sweep":
            self.aggregator.note_expiry()
        elif first == "wait":
            self.clock.now += float(rest[0])
        elif first[0] == "+":
            self.owner[first[1:]] = POLLER if "optional" in rest else None
            (self.aggregator.deregister if "optional" in rest else self.aggregator.register)(first[1:])
        elif first[0] == "-":
            self.aggregator.deregister(first[1:])
        else:
            ttl = {"ttl": float(rest[1])} if len(rest) > 1 else {}
            owner = self.owner.get(first)
            self.aggregator.set_resource(first, rest[0] == "up", f"{first} is {rest[0]}", owner=owner, **ttl)

    def run(self, script: str) -> list[str]:
        """Runs `step; step = open; …` and gives the claims after `=` that are not so."""
        wrong, done = [], ""
        for part in script.split(";"):
            line, _, claim = map(str.strip, part.partition("="))
            if line:
                self.step(line)
            done += f"{part};"
            if claim and self.aggregator.is_healthy() != (claim == "open"):
                wrong.append(done)
        return wrong


@pytest.fixture
def bench() -> Bench:
    clock = Clock()
    return Bench(clock, HealthAggregator(clock=clock))


SCRIPTS = {
    # the start
    "nothing said, nothing open": "= shut",
    "an empty inventory": "start = open; wait 1e9 = open",
    "only resources that do not count": "+a optional; +b optional; start = open; a down = open; wait 1e9 = open",
    "no result yet": "+a; start = shut; wait 1e6 = shut",
    "the first result opens": "+a; start; a up = open",
    "a bad first result": "+a; start; a down = shut; a up = open",
    "every counted resource": "+a; +b; +c; start; a up = shut; c up = shut; b up = open",
    "the optional one is not waited for": "+a; +b optional; start; a up = open",
    "a bad one of several": "+a; +b; start; a up; b down = shut; b up = open; a down = shut",
    "results before the end of registration": "+a; +b; a up = shut; b up; start = open",
    "a result between two registrations": "+a; a up; +b; start = shut; b up = open",
    "a stored state does not stand for the next resource": "+a; +b optional; a up; b up; +c; start = shut; c up = open",
    "registered again before its first result": "+a; +a; start = shut; a up = open",
    # added later
    "an added one never closes": "+a; start; a up; +b = open; wait 1 = open",
    "an added one counts from its first result": "+a; start; a up; +b; b down = shut; b up = open",
    "added to nothing": "start = open; +a = open; a down = shut; a up = open",
    "added while shut": "+a; start; a down; +b = shut; a up = open; b down = shut",
    "added with a first result, then silent": "+a; start; a up 100; +b; b up 10 = open; wait 11 = shut",
    # removed
    "removing the bad one opens": "+a; +b; start; a up; b down = shut; -b = open",
    "removing a good one changes nothing": "+a; +b; start; a up; b up; -b = open; a down = shut",
    "removing the last one opens": "+a; start; a down = shut; -a = open; wait 1e9 = open",
    "removing an expired one opens": "+a; +b; start; a up 100; b up 5; wait 6 = shut; -b = open",
    "removing one that is unknown": "+a; start; a up; -x = open",
    "removing the one that was waited for": "+a; +b; start; a up = shut; -b = open",
    "removing all that was waited for": "+a; start = shut; -a = open",
    "removing all, then adding": "+a; start; -a; +b = open; b down = shut",
    "removing before the start": "+a; +b; -b; start; a up = open",
    "back again after removal": "+a; start; a down; -a = open; +a = open; a down = shut",
    # maintenance and critical
    "a bad one goes into maintenance": "+a; +b; start; a up; b down = shut; +b optional = open; b down = open",
    "the one waited for goes into maintenance": "+a; +b; start; a up = shut; +b optional = open",
    "maintenance does not expire": "+a; +b; start; a up 100; b up 5; +b optional; wait 50 = open",
    "and ends": "+a; start; a up; +a optional; a down = open; +a = open; a down = shut; a up = open",
    "still the same registration": "+a; start; a down; +a = shut; a up; +a = open",
    # the lease
    "expiry": "+a; start; a up 5 = open; wait 4.9 = open; wait 0.2 = shut; wait 1e6 = shut",
    "expiry at the very moment": "+a; start; a up 5; wait 5 = shut",
    "renewal": "+a; start; a up 5; wait 4; a up 5; wait 4 = open; wait 2 = shut",
    "the earliest lease decides": "+a; +b; start; a up 100; b up 5; wait 6 = shut; a up 100 = shut; b up 5 = open",
    "a shorter lease replaces a longer one": "+a; start; a up 100; a up 5; wait 6 = shut",
    "recovery from expiry": "+a; start; a up 5; wait 6 = shut; a up 5 = open",
    "an unhealthy one does not expire into health": "+a; start; a down 5; wait 1e6 = shut",
    "optional ones hold no lease": "+a; +b optional; start; a up 100; b up 1; wait 50 = open",
    "many renewals of a far lease": "+a; +b; start; b up 1000"
    + "; a up 900" * 500
    + "; wait 901 = shut; a up = open",
    # names without registration
    "a plain name": "a up = open; a down = shut; a up = open",
    "plain names": "a up; b down = shut; b up = open; wait 133 = shut",
    "a plain name's default lease": "a up; wait 131 = open; wait 2 = shut",
    "a plain name beside registered ones": "+a; start; x up = shut; a up = open; x down = shut; -x = open",
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_script(bench: Bench, script: str) -> None:
    assert not bench.run(script)


def test_default_ttl_is_that_of_default_settings() -> None:
    lease = Lease()
    HealthAggregator(lease, clock=lambda: START).set_resource("a", True)
    defaults = ResourceSettings.model_validate({"name": "a", "hostname": "a", "platform": "local"})
    assert lease.until.value - START == defaults.ttl == 2 * 60 + 10 + 2


def test_names_of_the_specification(bench: Bench) -> None:
    bench.aggregator.SetResource("db1", False, "limit: disk")
    assert bench.aggregator.IsHealthy() is False
    bench.aggregator.SetResource("db1", True)
    assert bench.aggregator.IsHealthy() is True


def test_the_lease_is_all_that_a_gate_needs(bench: Bench) -> None:
    gate = Gate(lambda environ, start_response: [], bench.aggregator.lease, bench.clock)
    bench.run("+a; start; a up 5")
    assert gate.is_healthy()
    bench.clock.now += 5
    assert not gate.is_healthy()


def test_no_lock_to_ask() -> None:
    """A reporter that is stuck inside `set_resource`, the lock in its hand, delays nobody who asks."""
    inside, leave = threading.Event(), threading.Event()

    def clock() -> float:
        if threading.current_thread() is reporter:
            inside.set()
            leave.wait(10)
        return START

    aggregator = HealthAggregator(clock=clock)
    reporter = threading.Thread(target=aggregator.set_resource, args=("a", False))
    aggregator.set_resource("a", True)
    reporter.start()
    try:
        assert inside.wait(5)
        second = threading.Thread(target=aggregator.set_resource, args=("b", True))
        second.start()
        second.join(0.1)
        assert second.is_alive(), "the reporter holds no lock: this test proves nothing"
        assert aggregator.is_healthy()
    finally:
        leave.set()
        reporter.join(5)
        second.join(5)
    assert not aggregator.is_healthy()


# --- owners ---
def test_late_reports_of_an_old_owner(bench: Bench) -> None:
    aggregator, old, new = bench.aggregator, object(), object()
    aggregator.register("a", owner=old)
    aggregator.start()
    aggregator.set_resource("a", True, owner=old)
    aggregator.register("a", owner=new)
    assert aggregator.is_healthy(), "a new owner takes over what was known"
    aggregator.set_resource("a", False, owner=old)
    assert aggregator.is_healthy()
    aggregator.set_resource("a", False, owner=new)
    aggregator.set_resource("a", True, owner=old)
    assert not aggregator.is_healthy()
    aggregator.deregister("a")
    aggregator.set_resource("a", False, owner=new)
    assert aggregator.is_healthy()
    aggregator.note_expiry()
    assert transitions(aggregator) == [(True, ""), (False, "a: "), (True, "")]


def test_old_owner_does_not_end_the_wait_for_the_first_result(bench: Bench) -> None:
    aggregator, old, new = bench.aggregator, object(), object()
    aggregator.register("a", owner=old)
    aggregator.register("a", owner=new)
    aggregator.start()
    aggregator.set_resource("a", True, owner=old)
    assert not aggregator.is_healthy()
    aggregator.set_resource("a", True, owner=new)
    assert aggregator.is_healthy()


def test_owner_of_a_name_that_was_never_registered(bench: Bench) -> None:
    bench.run("start")
    bench.aggregator.set_resource("a", False, owner=object())
    assert bench.aggregator.is_healthy()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the monotonic clock is that clock")
def test_the_clock_of_the_lease_counts_the_time_of_a_suspended_machine() -> None:
    """CLOCK_MONOTONIC stands still then, and a gate would stay open on answers that are hours old."""
    assert isinstance(lease_clock, functools.partial)
    assert (lease_clock.func, lease_clock.args) == (time.clock_gettime, (time.CLOCK_BOOTTIME,))
    assert HealthAggregator()._clock is Gate(lambda *_: [], Lease())._clock is lease_clock


# --- when it can open again ---
# script with `opens` of each bad report in order, and the second, from the start of the clock, at which it can open
OPENS = {
    "one": ("+a; start; a down", [30], 30),
    "the last of two": ("+a; +b; start; a down; b down", [30, 10], 30),
    "the last of two, other order": ("+a; +b; start; a down; b down", [10, 30], 30),
    "a later report replaces": ("+a; start; a down; wait 5; a down", [30, 7], 12),
    "not of the optional": ("+a; +b optional; start; a down; b down", [10, 30], 10),
    "not of the removed": ("+a; +b; start; a down; b down; -b", [10, 30], 10),
    "not of the recovered": ("+a; +b; start; a down; b down; b up", [10, 30], 10),
}


@pytest.mark.parametrize(("script", "seconds", "moment"), OPENS.values(), ids=OPENS)
def test_opens(bench: Bench, script: str, seconds: list[float], moment: float) -> None:
    left = iter(seconds)
    for line in map(str.strip, script.split(";")):
        name, _, what = line.partition(" ")
        if what == "down":
            bench.aggregator.set_resource(name, False, opens=next(left), owner=bench.owner.get(name))
        else:
            bench.step(line)
    assert bench.aggregator.lease.opens.value == START + moment


@pytest.mark.parametrize("script", ["+a; start", "+a; start; a up 5; wait 6; sweep", "+a; start; a down; -a"])
def test_opens_any_moment(bench: Bench, script: str) -> None:
    bench.run(script)
    assert bench.aggregator.lease.opens.value <= bench.clock.now


# --- transitions ---
# script, and what it announces: open or shut, and a word of why
TRANSITIONS = {
    "nothing": ("+a; start", []),
    "opening": ("+a; start; a up", ["open"]),
    "a bad start is none": ("+a; start; a down; a down", []),
    "renewals are none": ("+a; start; a up; a up; wait 1; a up; sweep", ["open"]),
    "closing names the resource": ("+a; start; a up; a down", ["open", "shut a is down"]),
    "a second bad one is none": ("+a; +b; start; a up; b up; a down; b down", ["open", "shut a is down"]),
    "half way up is none": ("+a; +b; start; a up; b up; a down; b down; a up", ["open", "shut a is down"]),
    "all the way up": ("+a; +b; start; a up; b up; a down; b down; a up; b up", ["open", "shut a is down", "open"]),
    "expiry": ("+a; start; a up 5; wait 6; sweep", ["open", "shut a"]),
    "expiry is told once": ("+a; start; a up 5; wait 6; sweep; wait 1; sweep; sweep", ["open", "shut a"]),
    "expiry, then recovery": ("+a; start; a up 5; wait 6; sweep; a up 5", ["open", "shut a", "open"]),
    "expiry seen by another one's report": ("+a; +b; start; a up 5; b up 100; wait 6; b up 100; sweep",
                                            ["open", "shut a"]),
    "expiry that nobody noted": ("+a; start; a up 5; wait 6; a up 5", ["open", "shut nothing was heard", "open"]),
    "expiry and a bad report": ("+a; +b; start; a up 5; b up 100; wait 6; b down; sweep", ["open", "shut"]),
    "removal opens": ("+a; +b; start; a up; b up; b down; -b", ["open", "shut b is down", "open"]),
    "removal of the last opens": ("+a; start; a down; -a", ["open"]),
    "maintenance opens": ("+a; start; a down; +a optional", ["open"]),
    "an empty inventory": ("start", ["open"]),
    "adding is none": ("start; +a; +b", ["open"]),
}  # fmt: skip


@pytest.mark.parametrize(("script", "announced"), TRANSITIONS.values(), ids=TRANSITIONS)
def test_transitions(bench: Bench, script: str, announced: list[str]) -> None:
    bench.run(script)
    found = transitions(bench.aggregator)
    assert [is_open for is_open, _ in found] == [text.startswith("open") for text in announced], found
    for (_, why), text in zip(found, announced, strict=True):
        for word in text.split()[1:]:
            assert word in why.replace(",", " ").split(), (why, text)


@pytest.mark.parametrize(("script", "turns"), {
    "a hung process": ("wait 55; sweep; a up", [(5.0, False), (55.0, True)]),
    "a report comes first": ("wait 55; a up", [(5.0, False), (55.0, True)]),
    "it is bad": ("wait 55; a down", [(5.0, False)]),
    "bad in time": ("wait 4; a down; wait 55; a up", [(4.0, False), (59.0, True)]),
}.values())  # fmt: skip
def test_what_closed_is_dated_when_clients_were_refused(
        bench: Bench, script: str, turns: list[tuple[float, bool]]) -> None:
    """Also where this process was hung then: it said later that the site had been closed for a moment."""
    bench.aggregator._wall = lambda: bench.clock.now - START
    bench.run("+a; start; a up 5")
    bench.aggregator.transitions.get_nowait()
    bench.run(script)
    found = [bench.aggregator.transitions.get_nowait()[:2] for _ in turns]
    assert found == turns and bench.aggregator.transitions.empty()


def test_expired_names_the_silent(bench: Bench) -> None:
    bench.run("+a; +b; +c; +d optional; start; a up 5; b up 6; c up 100; d up 5; sweep")
    assert transitions(bench.aggregator) == [(True, "")]
    bench.run("wait 6; sweep")
    assert transitions(bench.aggregator) == [(False, "no result of a, b")]
    bench.run("a down; sweep; b up")
    assert not transitions(bench.aggregator)


# --- against a model ---
NAMES = st.sampled_from("abcd")
SPANS = st.sampled_from([0.5, 1.0, 2.0, 5.0, 30.0])


class Model(RuleBasedStateMachine):
    """Random operations on an aggregator and on a model that recomputes everything from scratch."""

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.real = HealthAggregator(clock=self.clock)
        self.owners: dict[str, object] = {}
        self.until: dict[str, float] = {}  # of those that were reported healthy
        self.opens: dict[str, float] = {}  # of those that were reported unhealthy
        self.waiting: set[str] = set()
        self.begun = self.decided = False
        self.announced = False  # what the transitions said last

    def expect_open(self) -> bool:
        return (
            self.decided and not self.opens and all(until > self.clock.now for until in self.until.values())
        )

    def settle(self) -> None:
        self.decided = self.decided or (self.begun and not self.waiting)

    def forget(self, name: str) -> None:
        self.until.pop(name, None)
        self.opens.pop(name, None)
        self.waiting.discard(name)

    @rule(name=NAMES)
    def register(self, name: str) -> None:
        self.owners[name] = object()
        if not self.decided:
            self.waiting.add(name)
        self.real.register(name, self.owners[name])
        self.settle()

    @precondition(lambda self: not self.begun)
    @rule()
    def start(self) -> None:
        self.begun = True
        self.settle()
        self.real.start()

    @rule(name=NAMES)
    def deregister(self, name: str) -> None:
        self.forget(name)
        self.owners.pop(name, None)
        self.real.deregister(name)
        self.settle()

    @rule(name=NAMES, healthy=st.booleans(), span=SPANS, late=st.booleans())
    def report(self, name: str, healthy: bool, span: float, late: bool) -> None:
        owner = object() if late else self.owners.get(name, object())
        if owner is self.owners.get(name):
            self.forget(name)
            (self.until if healthy else self.opens)[name] = self.clock.now + span
            self.settle()
        self.real.set_resource(name, healthy, f"{name} is down", ttl=span, opens=span, owner=owner)

    @rule(span=SPANS)
    def wait(self, span: float) -> None:
        self.clock.now += span

    @rule()
    def sweep(self) -> None:
        self.real.note_expiry()
        self.compare_transitions()
        assert self.announced == self.expect_open()

    @invariant()
    def same_answer(self) -> None:
        assert self.real.is_healthy() == self.expect_open()

    @invariant()
    def same_moment(self) -> None:
        opens = self.real.lease.opens.value
        assert opens == max(self.opens.values()) if self.opens else opens <= self.clock.now

    @invariant()
    def compare_transitions(self) -> None:
        """Open and shut by turns; a closing names one of those to blame."""
        silent = {name for name, until in self.until.items() if until <= self.clock.now}
        for is_open, why in transitions(self.real):
            assert is_open is not self.announced
            assert is_open or any(name in why.replace(":", " ").replace(",", " ").split()
                                  for name in {*silent, *self.opens}), why  # fmt: skip
            self.announced = is_open


TestModel = Model.TestCase
TestModel.settings = hypothesis_settings(stateful_step_count=30, derandomize=True, database=None)


# --- threads ---
def hammer(work: Callable[[int], None], threads: int = 6) -> None:
    """`work(number)` in several threads at once; the first error of any of them is raised."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, number) for number in range(threads)]:
            done.result(30)


@pytest.mark.parametrize("last", ["up", "down"])
def test_threads_that_report_and_leave(last: str) -> None:
    aggregator, rounds = HealthAggregator(), 400
    aggregator.register("steady")
    aggregator.start()
    aggregator.set_resource("steady", True)

    def work(number: int) -> None:
        choice = random.Random(number)
        for _ in range(rounds):
            name = f"r{choice.randrange(8)}"
            what = choice.randrange(4)
            if what == 0:
                aggregator.register(name)
            elif what == 1:
                aggregator.deregister(name)
            else:
                aggregator.set_resource(
                    name, choice.random() < 0.9, "shaky", ttl=choice.choice([0.0, 0.001, 60])
                )
            aggregator.is_healthy()
            aggregator.note_expiry()

    hammer(work)
    for number in range(8):
        aggregator.deregister(f"r{number}")
    aggregator.set_resource("steady", last == "up", "down")
    assert aggregator.is_healthy() is (last == "up")
    found = [is_open for is_open, _ in transitions(aggregator)]
    assert len(found) > 2, "nothing happened"
    assert found == [number % 2 == 0 for number in range(len(found))]
    assert found[-1] is (last == "up")


def test_a_bad_one_is_never_overlooked_between_threads() -> None:
    """While one resource stays down, no renewal of the others opens the gate for a moment."""
    aggregator, stop = HealthAggregator(), threading.Event()
    aggregator.set_resource("down", False)
    seen: list[bool] = []

    def work(number: int) -> None:
        if number == 0:
            for _ in range(20_000):
                if aggregator.is_healthy():
                    seen.append(True)
            stop.set()
        while not stop.is_set():
            aggregator.set_resource(f"r{number}", True)

    hammer(work, 4)
    assert not seen
    aggregator.set_resource("down", True)
    assert wait_for(aggregator.is_healthy)
    assert aggregator.lease.until.value < math.inf


def test_no_resource_has_the_lease_of_who_watches() -> None:
    now = [1000.0]
    aggregator = HealthAggregator(clock=lambda: now[0])
    aggregator.start()
    for name in ("monitor", "the monitor"):
        aggregator.SetResource(name, True)
    now[0] += 131
    aggregator.beat("the monitor")
    aggregator.beat("monitor")
    now[0] += 100
    assert not aggregator.IsHealthy(), "their own leases are over"
