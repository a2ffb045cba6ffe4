"""Uplink: is it this machine that is cut off? Real sockets that answer or fall silent, and machines that do not."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import wait_for
from console import Client, console
from service import Service, write_inventory
from test_groups import Clock
from test_poll import House, Machines, good, house, machines, maintain, refused, unreachable, vault

import healthchecker
from healthchecker import (
    Deadline,
    Doubt,
    Found,
    HealthAggregator,
    InventoryError,
    News,
    Outage,
    Platform,
    ProbeError,
    Report,
    Resolver,
    ResourceSettings,
    Standing,
    Target,
    Uplink,
    Verdict,
    lease_clock,
    load_inventory,
    settle,
    take_picture,
)

__all__ = ["house", "machines", "vault"]  # fixtures
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a full queue refuses nobody on Linux alone")
NAMES = ["m0", "m1", "m2"]


# --- what the inventory may say ---
@pytest.mark.parametrize(("lines", "words"), [
    ("  uplink: [gateway.example.com]", "5:12: service.uplink[0]: must be address:port or [address]:port"),
    ("  uplink: [gateway.example.com:70000]", "5:12: service.uplink[0]: the port must be at most 65535"),
    ("  uplink: gateway.example.com:22", "5:11: service.uplink: must be a list"),
    ("  hold: 30", "2:3: service: hold needs uplink: what answers unless this machine is cut off"),
    ("  uplink: ['[2001:db8::1]:22']\n  hold: 3601", "6:9: service.hold: must be less than or equal to 3600"),
])  # fmt: skip
def test_fault(tmp_path: Path, lines: str, words: str) -> None:
    with pytest.raises(InventoryError) as caught:
        load_inventory(write_inventory(tmp_path, service=lines))
    assert str(caught.value).partition(":")[2] == words


# --- gateways ---
class Gateway:
    """Listens; with a queue that is full it is silent, as if it were not there."""

    def __init__(self) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.sock.getsockname()[1]}"
        self._waiting: list[socket.socket] = []

    def fall_silent(self) -> None:
        self.answer()
        self.sock.listen(0)
        for _ in range(8):
            waiting = socket.socket()
            waiting.setblocking(False)
            waiting.connect_ex(self.sock.getsockname())
            self._waiting.append(waiting)

    def answer(self) -> None:
        while self._waiting:
            self._waiting.pop().close()
        self.sock.listen(128)
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.sock.accept()[0].close()

    def close(self) -> None:
        self.answer()
        self.sock.close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with contextlib.closing(Gateway()) as made:
        yield made


def texts(house: House, kind: str) -> list[str]:
    """Events, oldest first."""
    house.monitor._context.recorder.flush()
    with house.store.reading() as session:
        rows = session.scalars(sqlalchemy.select(healthchecker.Event).order_by(healthchecker.Event.id))
        return [f"{row.resource}: {row.text}".partition(" after ")[0] for row in rows if row.kind == kind]


@contextlib.contextmanager
def healthy(house: House, gateway: Gateway, hold: float, *more: str) -> Iterator[None]:
    """Three machines are watched, and all is well, also for `more`. After a cut they have a minute to recover."""
    house.write(*(f"name: {name}, retry_interval: 2, timeout: 60" for name in NAMES), *more)
    with house.watching(uplink=Uplink([gateway.address], hold)):
        wait_for(lambda: all(house.state(name) == ("healthy", "") for name in NAMES))
        wait_for(house.aggregator.is_healthy)
        wait_for(lambda: len(texts(house, "state")) == len(NAMES) + len(more))
        yield


def fail(house: House, machines: Machines, *names: str) -> None:
    """What is polled from now on does not answer; the first one is polled."""
    machines.behaviours |= dict.fromkeys(names, unreachable)
    house.poller(names[0]).poll_now().result(60)


def recover(house: House, machines: Machines, *names: str, polls: int = 2) -> None:
    machines.behaviours |= dict.fromkeys(names, good)
    for name in names * polls:
        house.poller(name).poll_now().result(60)


def uplink_of(house: House) -> Uplink:
    return house.monitor.uplink


def all_fallen(house: House) -> bool:
    return all(house.state(name) == ("unhealthy", "unreachable") for name in NAMES)


@contextlib.contextmanager
def cut_off(house: House, machines: Machines, gateway: Gateway, hold: float, *more: str) -> Iterator[None]:
    """All was well, and then neither an uplink nor any of the three machines answers, and that is known."""
    with healthy(house, gateway, hold, *more):
        gateway.fall_silent()
        fail(house, machines, *NAMES)
        wait_for(lambda: uplink_of(house).cut and all_fallen(house))
        yield


@LINUX
def test_the_gate_holds_while_this_machine_is_cut_off(house: House, machines: Machines, gateway: Gateway) -> None:
    """One event for all; and when an uplink answers again, they have time to recover."""
    with cut_off(house, machines, gateway, 3600):
        assert house.aggregator.is_healthy() and not [text for text in texts(house, "gate") if "open -> closed" in text]
        usual = house.poller("m0").target.settings.ttl
        assert house.aggregator.lease.until.value <= lease_clock() + usual, "whoever dies closes it as soon as ever"
        standing = house.monitor.behind("m1")
        assert standing and (standing.state, standing.cause) == ("degraded", "cut_off")
        why = f"no connection to {gateway.address.replace(':', ' port ')} within 3 s"
        begun = f": cut off: {{}} of 3 machines do not answer, nor does an uplink: {why}; what was healthy counts on"
        wait_for(lambda: texts(house, "service"))
        assert texts(house, "service")[0] in [f"{begun.format(count)} for 3600 s" for count in (2, 3)]
        assert len(texts(house, "state")) == len(NAMES), "nobody tells of a machine"
        gateway.answer()
        wait_for(lambda: uplink_of(house).cut is None)
        assert house.monitor.behind("m1") is None
        house.poller("m1").poll_now().result(60)
        assert house.aggregator.is_healthy() and house.state("m1") == ("unhealthy", "unreachable")
        recover(house, machines, *NAMES)
        assert house.aggregator.is_healthy() and not any(house.poller(name).held for name in NAMES)
        assert len(texts(house, "state")) == len(NAMES)
        wait_for(lambda: texts(house, "service")[1:] == [": not cut off any more"])


@pytest.mark.long
@LINUX
@pytest.mark.parametrize("hold", [0, 3600])
def test_nobody_is_told_of_a_machine_while_this_one_is_cut_off(
    house: House, machines: Machines, gateway: Gateway, hold: float
) -> None:
    """Whether or not it is held, and though each is unhealthy by its row."""
    with cut_off(house, machines, gateway, hold):
        house.monitor.flush()
        with house.store.reading() as session:
            picture = take_picture(session, [], {}, time.time(), house.monitor)
        assert picture.unhealthy.keys() == {*NAMES} and all(one.blame == "this" for one in picture.unhealthy.values())
        gateway.answer()
        recover(house, machines, *NAMES, polls=1)
        wait_for(lambda: uplink_of(house).cut is None)
        assert [house.monitor.blames(name) for name in NAMES] == ["untold"] * 3, "their next results decide"


@pytest.mark.long
@LINUX
def test_a_machine_that_answers_again_closes_nothing(house: House, machines: Machines, gateway: Gateway) -> None:
    """Though fewer than half do not: what is held is held, and after that nobody is cut off any more."""
    with cut_off(house, machines, gateway, 3600):
        wait_for(house.aggregator.is_healthy)
        closed = [text for text in texts(house, "gate") if "open -> closed" in text]
        for name in NAMES[:2]:
            recover(house, machines, name, polls=1)
            assert house.aggregator.is_healthy() and house.poller("m2").held > 0
        recover(house, machines, "m2", polls=1)
        assert house.aggregator.is_healthy()
        wait_for(lambda: uplink_of(house).cut is None)
        recover(house, machines, *NAMES)
        assert house.aggregator.is_healthy()
        assert [text for text in texts(house, "gate") if "open -> closed" in text] == closed


@pytest.mark.long
@LINUX
def test_a_hold_ends(house: House, machines: Machines, gateway: Gateway) -> None:
    with cut_off(house, machines, gateway, 1):
        wait_for(lambda: not house.aggregator.is_healthy())
        standing = house.monitor.behind("m1")
        assert standing and (standing.state, standing.cause) == ("unhealthy", "cut_off")
        wait_for(lambda: ": cut_off: this machine is, for no" in house.aggregator.groups(site=True)[0].why)


@pytest.mark.long
@LINUX
def test_without_a_hold_the_gate_closes(house: House, machines: Machines, gateway: Gateway) -> None:
    with cut_off(house, machines, gateway, 0):
        assert not house.aggregator.is_healthy()
        assert len(texts(house, "state")) == len(NAMES)


@pytest.mark.long
def test_while_an_uplink_answers_nothing_is_held(house: House, machines: Machines, gateway: Gateway) -> None:
    """And each machine tells of itself, once that is known."""
    with healthy(house, gateway, 3600):
        for name in NAMES:
            fail(house, machines, name)
        wait_for(lambda: all_fallen(house))
        assert not house.aggregator.is_healthy()
        wait_for(lambda: len(texts(house, "state")) == 2 * len(NAMES), 120)
        assert uplink_of(house).cut is None and not texts(house, "service")


def test_who_refuses_is_there() -> None:
    with contextlib.closing(Gateway()) as gateway:
        pass
    heard, silent = Uplink([gateway.address, "gateway.invalid:22"]).ask()
    assert not heard and silent.startswith("gateway.invalid")
    assert Uplink().ask() == []


def test_a_slip_in_the_name_of_an_uplink_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By `check --probe` and at the start, before anything falls; and by a cut that is due to it."""
    path = write_inventory(tmp_path, "", "  uplink: ['gateway.invalid:22']\n")
    assert healthchecker.main(["--inventory", str(path), "check", "--probe"]) == 0
    assert "service.uplink: gateway.invalid" in capsys.readouterr().out
    uplink = Uplink(["gateway.invalid:22"])
    uplink.begin(lambda names: None, lambda: None, lambda kind, text, at: None)
    wait_for(lambda: "service.uplink: gateway.invalid" in caplog.text)
    uplink.close()
    assert len(caplog.records) == 1 and uplink.cut is None
    site = Site()
    site.cut()
    assert site.uplink.cut and site.uplink.cut.text == (
        "cut off: 3 of 3 machines do not answer, nor does an uplink: no way")


@pytest.mark.long
@LINUX
def test_half_of_the_machines_is_not_enough(house: House, machines: Machines, gateway: Gateway) -> None:
    with healthy(house, gateway, 3600, "name: m3, retry_interval: 2"):
        gateway.fall_silent()
        fail(house, machines, "m0", "m1")
        wait_for(lambda: not house.aggregator.is_healthy())
        wait_for(lambda: len(machines.moments("m3")) > 1)  # for it was asked
        house.poller("m1").poll_now().result(60)
        assert uplink_of(house).cut is None


@LINUX
def test_what_another_machine_polls_says_nothing_here(house: House, machines: Machines, gateway: Gateway) -> None:
    """Or most that this one polls could fall silent, and be fewer than half."""
    with healthy(house, gateway, 3600):
        poller, rest = house.poller("m1"), {*NAMES} - {"m1"}
        poller.rest()
        assert uplink_of(house)._machines == rest
        poller.poll_now().result(60)    # as one that was on its way, or that somebody asked for
        wait_for(lambda: uplink_of(house)._machines == rest)
        poller._alone = True    # for nothing is heard of the others
        poller._report(Verdict("healthy"), 0.0)
        assert uplink_of(house)._machines == {*NAMES}
        poller.adopt(Found(1, "", poller.standing, lease_clock(), 60.0, 0.0))
        assert uplink_of(house)._machines == rest


@pytest.mark.long
@LINUX
def test_what_was_down_before_is_not_held(house: House, machines: Machines, gateway: Gateway) -> None:
    with healthy(house, gateway, 3600):
        fail(house, machines, "m0")
        wait_for(lambda: house.state("m0") == ("unhealthy", "unreachable"))
        wait_for(lambda: len(texts(house, "state")) == len(NAMES) + 1)  # an uplink has answered
        gateway.fall_silent()
        fail(house, machines, "m1", "m2")
        wait_for(lambda: uplink_of(house).cut and all_fallen(house), 120)
        assert house.poller("m1").held > 0 and not house.poller("m0").held
        assert not house.aggregator.is_healthy()


@pytest.mark.long
@LINUX
def test_another_fault_is_not_held(house: House, machines: Machines, gateway: Gateway) -> None:
    with cut_off(house, machines, gateway, 3600, "name: m3, fall: 1, retry_interval: 2"):
        wait_for(house.aggregator.is_healthy)
        machines.behaviours["m3"] = refused
        house.poller("m3").poll_now().result(60)
        assert not house.aggregator.is_healthy()


@pytest.mark.long
@LINUX
def test_a_second_cut_holds_nothing_anew(house: House, machines: Machines, gateway: Gateway) -> None:
    """Of those that have not been healthy since the first one."""
    with cut_off(house, machines, gateway, 3600):
        wait_for(house.aggregator.is_healthy)
        gateway.answer()
        wait_for(lambda: uplink_of(house).cut is None)
        gateway.fall_silent()
        wait_for(lambda: house.poller("m0").poll_now().result(60) and uplink_of(house).cut)
        assert not any(house.poller(name).held for name in NAMES)
        wait_for(lambda: not house.aggregator.is_healthy())


# --- step by step, by a clock that a test sets ---
DOWN, LIMIT, FINE = Verdict("unhealthy", "timeout", "x"), Verdict("unhealthy", "limit", "x"), Verdict("healthy")


class Names(Resolver):
    """The way to an uplink that refuses, which is an answer, as long as there is no fault."""

    fault: Exception | None = None
    clock, seconds = Clock(), 0.0   # which it takes

    def resolve(self, host: str, port: int, deadline: Deadline) -> list[Any]:
        self.clock.now += self.seconds
        if self.fault:
            raise self.fault
        return super().resolve(host, port, deadline)


def settings_of(name: str, **more: Any) -> ResourceSettings:
    return ResourceSettings.model_construct(name=name, **{"platform": Platform.UNIX, **more})


class Site:
    """Healthy machines with default settings and an uplink, which is asked when a test says so."""

    def __init__(self, hold: float = 600.0, *names: str, **more: Any) -> None:
        with contextlib.closing(Gateway()) as gateway:
            self.clock, self.names = Clock(), Names()
            self.uplink = Uplink([gateway.address], hold, self.names, self.clock)
        self.clock.now += 100
        self.names.clock = self.clock
        self.settings = {name: settings_of(name, **more) for name in names or NAMES}
        self.outages = {name: Outage(settings, self.uplink) for name, settings in self.settings.items()}
        self.standings = dict.fromkeys(self.settings, Standing("healthy", good=2))
        self.poll(FINE, *self.settings)

    def poll(self, verdict: Verdict, *names: str) -> None:
        for name in names:
            before = self.standings[name]
            self.standings[name] = settle(before, verdict, self.settings[name], 0.0)
            self.outages[name].take(before, verdict, self.standings[name])

    def ask(self, fault: Exception | None = None, seconds: float = 0.0) -> list[str]:
        self.names.fault, self.names.seconds = fault, seconds
        return self.uplink._ask()

    def cut(self) -> None:
        """All of them have fallen, and no uplink answers."""
        for _ in range(2):
            self.poll(DOWN, *self.settings)
            self.clock.now += 1
        self.ask(ProbeError("timeout", "no way"))
        assert self.uplink.cut

    def held(self) -> list[float]:
        return [outage.held for outage in self.outages.values()]


def test_the_first_good_result_ends_no_hold() -> None:
    """With `rise: 2` the standing is unhealthy until the second one; another fault ends it at once."""
    site = Site()
    site.cut()
    assert site.held() == [600.0] * 3
    site.poll(FINE, "m0")
    assert not site.standings["m0"].healthy and site.held() == [600.0] * 3
    site.poll(DOWN, "m0")
    site.poll(Verdict("unhealthy", "stale", "x"), "m0")
    assert site.held() == [600.0] * 3
    site.poll(LIMIT, "m0")
    assert site.held() == [0.0, 600.0, 600.0]
    for _ in range(2):
        site.poll(FINE, "m1")
    assert site.standings["m1"].healthy and site.held() == [0.0, 0.0, 600.0]


@pytest.mark.parametrize(("hold", "held"), [(600, 29), (10, 9), (0, 0)])
def test_what_falls_before_the_uplink_is_known_to_be_silent_is_held(hold: float, held: float) -> None:
    """Until it is known whether this machine is cut off, for half a minute at most; nothing that was down before."""
    site = Site(hold)
    site.poll(DOWN, "m0")
    site.clock.now += 1
    site.poll(DOWN, "m0")
    assert not site.standings["m0"].healthy and site.held() == [held, 0, 0]
    site.ask(ProbeError("timeout", "x"))
    assert site.uplink.cut is None and site.held() == [held, 0, 0]
    site.poll(DOWN, "m1")
    assert site.uplink.cut and site.held()[0] == hold, "by the cut"


def test_what_falls_is_not_held_once_an_uplink_answers_or_when_that_takes_long() -> None:
    site = Site(600)
    site.poll(DOWN, "m0")
    site.clock.now += 1
    site.ask()
    assert site.held() == [0.0] * 3
    site.clock.now += 1
    site.poll(DOWN, "m1")
    assert site.held() == [0.0, 30.0, 0.0]
    site.clock.now += 30
    assert site.held() == [0.0] * 3, "whatever became of who asks"


@pytest.mark.parametrize(("hold", "held"), [(600, 20), (25, 15)])
def test_what_was_held_has_time_to_recover(hold: float, held: float) -> None:
    """Two polls after a bad one and one that hangs, but never beyond the hold; nothing that fails then is held."""
    site = Site(hold)
    site.cut()
    site.clock.now += 10
    site.ask()
    assert site.uplink.cut is None and site.held() == [held] * 3
    assert site.outages["m0"].is_doubtful, "nobody tells of it as long as it is held"
    site.poll(FINE, *NAMES)
    assert site.held() == [held] * 3
    site.poll(FINE, "m0")
    site.poll(DOWN, "m0", "m1")
    assert site.held() == [0.0, held, held]
    site.clock.now += held
    assert site.held() == [0.0] * 3
    site.ask()
    assert not any(outage.is_doubtful for outage in site.outages.values())


def test_all_that_answer_once_have_time_to_recover() -> None:
    """Nobody asks the uplink any more."""
    site = Site()
    site.cut()
    site.poll(FINE, *NAMES)
    assert site.uplink.cut is None and site.held() == [20.0] * 3


def test_what_fails_long_after_the_begin_is_not_held() -> None:
    """The uplink itself is dead and most machines are back: only what has not answered since is cut off."""
    site = Site(600, *NAMES, "m3")
    site.cut()
    for _ in range(2):
        site.poll(FINE, "m0", "m1", "m2")
    site.clock.now += 300
    site.poll(DOWN, "m0")
    assert site.uplink.cut and site.held() == [0.0, 0.0, 0.0, 300.0]
    assert [outage.is_cut_off for outage in site.outages.values()] == [False, False, False, True]
    site.poll(DOWN, "m1")
    assert [outage.is_cut_off for outage in site.outages.values()] == [True, True, False, True], "most do not answer"
    assert site.held() == [0.0, 0.0, 0.0, 300.0]


def test_an_outage() -> None:
    """It begins with the first result without an answer; and who had a bad one before that was not healthy."""
    for before, verdict in ((FINE, LIMIT), (LIMIT, FINE), (LIMIT, LIMIT)):
        site = Site()
        site.poll(before, "m0")
        site.poll(verdict, "m0")
        site.cut()
        assert (site.outages["m0"].held > 0) is verdict.healthy and site.outages["m1"].held > 0


OFTEN: dict[str, Any] = {"interval": 2.0, "timeout": 1.0, "retry_interval": 1.0, "fall": 1, "rise": 1}


@pytest.mark.parametrize("waits", [0.0, 4.9])
def test_what_is_polled_often_is_held(waits: float) -> None:
    """It fails as long before the cut as the question took, which came after the one before it was answered."""
    site = Site(600, *NAMES, "dead", **OFTEN)
    site.poll(DOWN, "dead")
    site.clock.now += 1
    site.ask()
    site.clock.now += 5 - waits
    site.poll(DOWN, *NAMES)
    assert site.held() == [30.0, 30.0, 30.0, 0.0]
    site.clock.now += waits
    site.ask(ProbeError("timeout", "x"), 3.1)
    assert site.uplink.cut and site.held() == [600.0, 600.0, 600.0, 0.0]
    assert [outage.is_cut_off for outage in site.outages.values()] == [True] * 4


@pytest.mark.parametrize(("seconds", "held"), [(3.0, 600.0), (3.1, 0.0)])
def test_what_fails_by_itself_before_a_cut_is_not_held(seconds: float, held: float) -> None:
    """The uplink is dead since long: no question is waited for, and a cut shows within a round of polls."""
    site, silence = Site(600, *NAMES, "dead", **OFTEN), ProbeError("timeout", "x")
    site.poll(DOWN, "dead")
    site.ask(silence, 3.1)
    site.poll(FINE, *NAMES)
    site.clock.now += 60
    site.poll(DOWN, "m0")
    site.ask(silence)
    site.clock.now += seconds
    assert site.uplink.cut is None
    site.poll(DOWN, "m1", "m2")
    assert site.uplink.cut and site.held() == [held, 600.0, 600.0, 0.0]


def test_nothing_is_let_go_while_a_cut_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor while its end is: whoever looks as soon as anything was noted finds a doubt, a cut, or that it is over."""
    site, seen, looks = Site(), list[float](), list[threading.Thread]()
    site.poll(DOWN, *NAMES)
    site.clock.now += 1

    def note(uplink: Uplink, name: str, value: object) -> None:
        object.__setattr__(uplink, name, value)
        looks.append(threading.Thread(target=lambda: seen.extend(site.held())))
        looks[-1].start()
        looks[-1].join(0.1)     # unless it waits for the rest

    monkeypatch.setattr(Uplink, "__setattr__", note)
    for answer in (ProbeError("timeout", "x"), None):
        site.ask(answer)
        for look in looks:
            look.join(60)
        assert seen and min(seen) > 0
    assert site.uplink.last and site.uplink.cut is None


def test_who_is_no_machine_any_more() -> None:
    """Its name is not among those that do not answer, whatever has it now; nor is one in maintenance."""
    site = Site()
    site.poll(DOWN, "m0", "m1")
    Outage(settings_of("m0", platform=Platform.PUSH), site.uplink).take(Standing("healthy"), DOWN, Standing("healthy"))
    assert (site.uplink._machines, site.uplink.failing) == ({"m1", "m2"}, {"m1"})
    site.outages["m1"].forget()
    assert (site.uplink._machines, site.uplink.failing) == ({"m2"}, set())
    site.clock.now += 3600
    site.standings = dict.fromkeys(NAMES, Standing("healthy", good=2))
    site.cut()
    assert site.outages["m1"].held > 0, "it recovered while it did not count"


def test_an_uplink_that_cannot_be_asked(caplog: pytest.LogCaptureFixture) -> None:
    """Is asked again no sooner than any; that is no silence, and keeps no event back."""
    site = Site()
    site.poll(DOWN, "m0")
    site.ask(ProbeError("timeout", "x"))
    site.clock.now += 5
    with pytest.raises(RuntimeError):
        site.ask(RuntimeError("can't start new thread"))
    assert site.uplink._pause() is None and not site.outages["m0"].is_doubtful
    site.clock.now += 1
    site.poll(DOWN, *NAMES)
    assert site.uplink.cut is None and site.uplink._pause() == 4
    site.names.fault = RuntimeError("can't start new thread")
    site.clock.now += 4
    site.uplink.begin(lambda names: None, lambda: None, lambda kind, text, at: None)
    site.uplink._woken.set()
    wait_for(lambda: site.uplink._asked_mono == site.clock.now)
    wait_for(lambda: "what the uplinks say is not known: RuntimeError: can't start new thread" in caplog.text)
    site.uplink.close()
    assert len(caplog.records) == 1


def test_what_has_failed_for_long_keeps_no_event_back() -> None:
    """An event waits for an answer to a question that came after its own outage, whoever fails then."""
    site = Site()
    site.poll(DOWN, "m0")
    site.clock.now += 1
    site.ask()
    assert not site.outages["m0"].is_doubtful
    site.clock.now += 1
    site.poll(DOWN, "m0", "m1")
    assert [outage.is_doubtful for outage in site.outages.values()] == [False, True, False]
    site.clock.now += 1
    site.ask()
    site.clock.now += 1
    site.poll(DOWN, "m0")
    assert not site.outages["m1"].is_doubtful


def test_one_that_fails_behind_a_dead_uplink() -> None:
    """It is known once the others have answered, and not half a minute later; what fails then is doubtful again."""
    site, silence = Site(), ProbeError("timeout", "x")
    site.poll(DOWN, "m0")
    site.clock.now += 1
    site.ask(silence)
    site.poll(DOWN, "m0")
    assert site.outages["m0"].is_doubtful
    site.poll(FINE, "m1", "m2")
    assert not site.outages["m0"].is_doubtful
    site.clock.now += 60
    site.poll(DOWN, "m1")
    site.clock.now += 1
    site.ask(silence)
    assert site.outages["m1"].is_doubtful and site.uplink.cut, "now they are two of three"


def test_the_only_machine_there_is() -> None:
    """It is more than half of all; behind an uplink that answers it is down."""
    site = Site(600, "m0")
    site.cut()
    assert site.held() == [600.0] and site.outages["m0"].is_cut_off
    site.ask()
    assert site.uplink.cut is None
    site.poll(FINE, "m0")
    site.poll(FINE, "m0")
    site.clock.now += 60
    site.poll(DOWN, "m0")
    site.clock.now += 1
    site.ask()
    assert site.uplink.cut is None and site.held() == [0.0]


def test_what_other_machines_poll_shows_whether_this_one_gets_through() -> None:
    """While no uplink answers: who polls one alone would never know, and would hold nothing of the others'."""
    site = Site()
    for name in ("m1", "m2"):
        site.outages[name].leave()
    assert site.uplink._machines == {"m0"}
    site.poll(DOWN, "m0")
    site.clock.now += 1
    urged = site.ask(ProbeError("timeout", "x"))
    assert sorted(urged) == ["m1", "m2"] and site.uplink.cut is None and site.outages["m0"].is_doubtful
    for name in urged:
        assert site.uplink.cut is None or name == urged[1], "one of the others may be down as well"
        site.poll(DOWN, name)
        site.outages[name].leave()  # as who does not poll it else
    assert site.uplink.cut and all(held > 0 for held in site.held())
    assert sorted(site.ask()) == NAMES, "each of them is polled to recover"
    assert site.uplink._machines == site.uplink.failing == {"m0"}


def test_what_other_machines_poll_is_not_waited_for() -> None:
    """Or it would take another timeout until what most do not answer is held; nor is what is left to them then."""
    site = Site(600, *NAMES, *(f"o{number}" for number in range(7)))
    for name in site.settings.keys() - {*NAMES}:
        site.outages[name].leave()
    for _ in range(2):
        site.poll(DOWN, "m0", "m1")
        site.clock.now += 1
    site.ask(ProbeError("timeout", "x"))
    assert site.uplink.cut and site.outages["m0"].held > 0
    site.outages["m0"].leave()
    site.uplink._judge()
    assert site.uplink.is_cut


def news_of(site: Site, name: str, doubts: dict[str, Doubt]) -> News:
    aggregator = HealthAggregator()
    aggregator.arrange(healthchecker.Gates(), {}, {name: ("parent",)})
    for each in (name, "parent"):
        aggregator.register(each)
    return News(site.settings[name], aggregator, doubts, site.outages[name])


def test_a_change_that_waits_keeps_its_time() -> None:
    site, doubts = Site(), {"parent": Doubt(asked=True)}
    news = news_of(site, "m0", doubts)
    news.told = site.standings["m0"]
    target, down = Target(1, site.settings["m0"], None, "", ""), Standing("unhealthy", "limit", "x", bad=2)
    for at in (100.0, 160.0):
        assert not news.weigh(Report(target, down, down, LIMIT, at, 1.0)).transition
    assert news.late(is_last=False) is None
    doubts["parent"].settle(decided=True)
    report = news.late(is_last=False)
    assert report and (report.at, report.transition) == (100.0, "healthy -> unhealthy (limit: x)")


def test_what_another_machine_found_is_told_where_nothing_else_is_to_blame() -> None:
    """It told nobody of what is behind another, or may turn out to be."""
    site, doubts = Site(), {"parent": Doubt(asked=True)}
    news, down = news_of(site, "m0", doubts), Standing("unhealthy", "timeout", "x", bad=2)
    for state, is_decided, told in (
            (False, True, "healthy"), (True, False, "healthy"), (True, True, "unhealthy")):  # fmt: skip
        news._aggregator.set_resource("parent", state, "x")
        doubts["parent"].settle(decided=is_decided)
        news.hear(down, lease_clock())
        assert news.told.state == told
    doubts["parent"].settle(decided=True, healthy=False)
    before = lease_clock()
    doubts["parent"].settle(decided=True)
    news.hear(down, before - 1)
    assert news.told.state == "healthy", "it is of before the parent's recovery"
    doubts["parent"].settle(decided=False)
    news.hear(Standing("degraded", "limit", "x", good=1), lease_clock())
    assert news.told.state == "degraded"


class Forgetful(dict[str, Doubt]):
    """What is looked for goes just then, as when another thread removes it."""

    def __contains__(self, name: object) -> bool:
        return self.pop(str(name), None) is not None


def test_a_parent_that_is_removed_just_then() -> None:
    site = Site()
    news = news_of(site, "m0", Forgetful(parent=Doubt(asked=True)))
    assert news._is_doubtful(FINE)


def test_nobody_waits_for_who_reports_by_itself() -> None:
    doubt = Doubt(asked=False)
    doubt.settle(decided=False)
    assert doubt.decided and not Doubt(asked=True).decided


def test_a_poll_that_ends_too_late_counts_for_nothing(house: House, machines: Machines) -> None:
    """Its resource was removed: no ghost makes a majority."""
    house.write("name: m0", "name: m1, timeout: 60")
    machines.behaviours["m1"] = machines.hang
    with house.watching(uplink=Uplink(["127.0.0.1:9"], 600)):
        wait_for(lambda: machines.moments("m1") and house.state("m0") == ("healthy", ""))
        gone = house.poller("m1")
        house.write("name: m0")
        wait_for(lambda: "m1" not in house.monitor.pollers)
        wait_for(house.monitor.catch_up)
        machines.ended.set()
        gone.join(60)
        assert not gone.is_alive() and uplink_of(house)._machines == {"m0"}


def test_maintenance_ends_an_outage(house: House, machines: Machines) -> None:
    """What is polled in it shows nothing of the uplink."""
    house.write("name: m0")
    with house.watching(uplink=Uplink(["127.0.0.1:9"], 600)):
        wait_for(house.aggregator.is_healthy)
        poller = house.poller("m0")
        fail(house, machines, "m0")
        assert poller.outage._since_mono < math.inf and uplink_of(house).failing == {"m0"}
        maintain(house, "m0", 3600)
        wait_for(lambda: poller.counted is False)
        poller.poll_now().result(60)
        assert poller.outage._since_mono == math.inf and uplink_of(house)._machines == set()


def test_who_is_told_again_opens_when_it_would(house: House, machines: Machines) -> None:
    """At the begin and end of a cut, for instance; clients come again no sooner."""
    house.write("name: m0, fall: 1, retry_interval: 60")
    machines.behaviours["m0"] = unreachable
    with house.watching():
        wait_for(lambda: house.state("m0") == ("unhealthy", "unreachable"))
        house.poller("m0").report_again()
        assert house.aggregator.lease.opens.value >= house.poller("m0")._opens_mono > 0


@pytest.mark.long
@LINUX
@pytest.mark.parametrize("count", [1, 3])
def test_a_service_that_is_cut_off(tmp_path: Path, gateway: Gateway, count: int) -> None:
    """Ports that are gone, and a gateway that is silent; the console says what it is."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    rows = "".join(
        f"  - {{name: m{number}, platform: tcp, hostname: 127.0.0.1, port: {server.getsockname()[1]}, interval: 1,"
        f" retry_interval: 1}}\n" for number, server in enumerate(servers))  # fmt: skip
    with console(tmp_path, rows, f"  uplink: ['{gateway.address}']\n  hold: 600\n") as (service, client):
        service.wait_status("/", 200)

        def view(name: str) -> dict[str, Any]:
            found: dict[str, Any] = client.api("GET", f"resources/{name}").json
            return found

        gateway.fall_silent()
        for server in servers:
            server.close()
        wait_for(lambda: view("m0")["cause"] == view(f"m{count - 1}")["cause"] == "cut_off")
        service.wait_status("/", 200)
        assert view("m0")["state"] == "degraded"
        assert "cut off" in client.ask("GET", "/-/").body
        gateway.answer()
        service.wait_status("/", 503)
        wait_for(lambda: view("m0")["cause"] == "unreachable")
        wait_for(lambda: "not cut off any more after" in str(client.api("GET", "events?kind=service").json))


@pytest.mark.long
@LINUX
def test_a_kill_during_a_hold(tmp_path: Path, gateway: Gateway) -> None:
    """After the restart nothing is open by what was healthy before the cut, nor held anew: not for a moment."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    addresses = [server.getsockname() for server in servers]
    rows = "".join(
        f"  - {{name: m{number}, platform: tcp, hostname: 127.0.0.1, port: {port}, interval: 1, retry_interval: 1,"
        f" rise: 1}}\n" for number, (_, port) in enumerate(addresses))  # fmt: skip

    def last(client: Client, name: str) -> Any:
        found = client.api("GET", f"resources/{name}/samples?limit=1").json
        return found[-1] if found else {"standing": "", "at": "2000-01-01T00:00:00Z"}

    with console(tmp_path, rows, f"  uplink: ['{gateway.address}']\n  hold: 3600\n") as (service, client):
        service.wait_status("/", 200)
        gateway.fall_silent()
        for server in servers:
            server.close()
        wait_for(lambda: all(last(client, name)["standing"] == "unhealthy" for name in NAMES), 60)  # which is stored
        service.wait_status("/", 200)
        service.kill()
        service.code = -signal.SIGKILL
    killed = time.time()
    with Service(service.inventory, deadline=60) as again:
        client = Client(*again.console).log_in()

        def polled_since() -> bool:
            assert again.get("/").status == 503
            polled = (last(client, name)["at"].replace("Z", "+00:00") for name in NAMES)
            return all(datetime.datetime.fromisoformat(at).timestamp() > killed for at in polled)

        wait_for(polled_since, 60)
        wait_for(lambda: client.api("GET", "resources/m0").json["cause"] == "cut_off", 60)
        assert again.get("/").status == 503, "it is known that this machine is cut off, and yet nothing is held"
        gateway.answer()
        servers = [socket.create_server(address) for address in addresses]
        again.wait_status("/", 200)
    for server in servers:
        server.close()


SERVERS = """
import select, socket, sys
servers = [socket.create_server((sys.argv[1], port)) for port in (5001, 5002, 5003)]
print("ready", flush=True)
while True:
    for server in select.select(servers, [], [])[0]:
        server.accept()[0].close()
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@contextlib.contextmanager
def other_network() -> Iterator[tuple[str, str, str]]:
    """A network namespace with servers, which a cable leads to: its name, the cable's end there, and their address, one
    of those for tests between networks (RFC 2544) that no other process has."""
    name, here, there = (f"hc{os.getpid()}{end}" for end in ("", "a", "b"))
    network = ipaddress.ip_address("198.18.0.0") + os.getpid() % 32768 * 4
    try:
        ip("netns", "add", name)
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
    except (OSError, subprocess.SubprocessError):
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip("ip cannot make a network namespace: that needs root, and ip")
    try:
        ip("addr", "add", f"{network + 1}/30", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", name, "addr", "add", f"{network + 2}/30", "dev", there)
        ip("-n", name, "link", "set", there, "up")
        command = ["ip", "netns", "exec", name, sys.executable, "-c", SERVERS, str(network + 2)]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout and process.stdout.readline() == "ready\n"
                yield name, there, str(network + 2)
            finally:
                process.kill()
    finally:
        ip("netns", "del", name)


@pytest.mark.long
@LINUX
def test_a_cable_that_is_pulled_out(tmp_path: Path) -> None:
    """And put in again: the site goes on while it is out."""
    with other_network() as (name, cable, host):
        rows = "".join(
            f"  - {{name: m{port}, platform: tcp, hostname: {host}, port: {port}, interval: 2, retry_interval: 2,"
            f" fall: 5}}\n" for port in (5001, 5002))  # fmt: skip
        with console(tmp_path, rows, f"  uplink: ['{host}:5003']\n  hold: 3600\n") as (service, client):

            def view(name: str) -> tuple[str, str]:
                found = client.api("GET", f"resources/{name}").json
                return found["state"], found["cause"]

            service.wait_status("/", 200)
            ip("-n", name, "link", "set", cable, "down")
            wait_for(lambda: view("m5001") == view("m5002") == ("degraded", "cut_off"))
            wait_for(lambda: client.api("GET", "resources/m5001/samples").json[-1]["standing"] == "unhealthy", 120)
            service.wait_status("/", 200)
            ip("-n", name, "link", "set", cable, "up")
            wait_for(lambda: view("m5001") == view("m5002") == ("healthy", ""))
            service.wait_status("/", 200)
