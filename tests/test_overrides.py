"""The gate opened and closed by hand, and a gate that only observes: leases, clocks, console, command line, service."""

from __future__ import annotations

import contextlib
import html
import http.client
import math
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from browser import PATIENCE, chromium, visit
from conftest import wait_for
from console import PASSWORD, Client, Local, local_console, make_user, prepared_database, served
from hypothesis import given
from hypothesis import strategies as st
from service import Program, Service, run, run_cheaply, write_inventory
from test_groups import Clock, gates_with, is_open, make, told

import healthchecker
from healthchecker import (
    OVERRIDE_TTL,
    Counters,
    Event,
    HealthAggregator,
    Metrics,
    Override,
    Principal,
    RequestCounters,
    ServingMetrics,
    Setting,
    boot_number,
    change_gate,
    end_of_override,
    generate_latest,
    lease_clock,
    remembered,
    revise,
    sqlalchemy,
)

CALM = "platform: simulated, mean_healthy: 1000000, interval: 1"
SICK = "platform: simulated, mean_healthy: 0.000001, mean_unhealthy: 1000000, fall: 1, interval: 1"
GOOD, BAD = f"  - {{name: a, {CALM}}}\n", f"  - {{name: a, {CALM}}}\n  - {{name: b, {SICK}}}\n"


def word(action: str, seconds: float | None = 60.0, **more: Any) -> Override:
    return Override.model_validate(
        {"action": action, "at": 0.0, "seconds": seconds, "reason": "the move", "actor": "adam"} | more
    )


# === Leases ==================================================================
def site() -> tuple[HealthAggregator, Clock]:
    """With a group, a route that needs it, one that needs no more than the site, and one that needs nothing."""
    gates = gates_with(
        [{"name": "g", "members": ["a"]}], {"/g": ["b"], "/n": cast(Any, {"mode": "observe"}), "/s": []}
    )
    aggregator, clock = make(gates)
    for name in "abc":
        aggregator.register(name)
    aggregator.start()
    return aggregator, clock


def report(aggregator: HealthAggregator, *, ttl: float = 132.0, **states: bool) -> None:
    for name, healthy in states.items():
        aggregator.set_resource(name, healthy, f"{name} is bad", ttl=ttl)


def opened(aggregator: HealthAggregator) -> list[str]:
    return [name for name in ("", "/g", "/n", "/s", "g") if is_open(aggregator, name)]


def test_close_and_auto() -> None:
    aggregator, clock = site()
    report(aggregator, a=True, b=True, c=True)
    told(aggregator)
    aggregator.overrule(word("close", None), math.inf)
    assert opened(aggregator) == ["/s", "g"] and not aggregator.is_healthy()
    assert set(told(aggregator)) == {(name, False, "closed by adam: the move") for name in ("", "/g", "/n")}
    assert aggregator.lease.until.value == 0.0
    assert aggregator.lease.opens.value == clock.now + OVERRIDE_TTL, "nobody knows when; ask again"
    assert aggregator.lease.by_hand.value == aggregator.lease.parts["/g"].by_hand.value == -1
    assert aggregator.lease.parts["/s"].by_hand.value == aggregator.lease.parts["g"].by_hand.value == 0
    why = {group.name: (group.state, group.why) for group in (*aggregator.groups(), *aggregator.groups(site=True))}
    assert why == {
        **dict.fromkeys(("", "/g", "/n"), ("unhealthy", "closed by adam: the move")),
        **dict.fromkeys(("/s", "g"), ("healthy", "")),
    }
    clock.now += 1000
    report(aggregator, a=True, b=True, c=True)
    assert opened(aggregator) == ["/s", "g"], "a dead monitor opens nothing"
    aggregator.overrule(None, 0.0)
    assert opened(aggregator) == ["", "/g", "/n", "/s", "g"]
    late = {("g", False, "nothing was heard in time")}  # for most of those 1000 s, which nobody noted
    assert set(told(aggregator)) == {(name, True, "") for name in ("", "/g", "/n", "g")} | late
    assert aggregator.lease.by_hand.value == 0


def test_open_over_what_is_sick() -> None:
    aggregator, clock = site()
    assert opened(aggregator) == ["/s"], "no result yet"
    aggregator.overrule(word("open"), clock.now + 60)
    assert opened(aggregator) == ["", "/g", "/n", "/s"], "a group's own state is what it is"
    report(aggregator, a=False, b=False, c=True)
    assert opened(aggregator) == ["", "/g", "/n", "/s"]
    assert ("", True, "opened by adam: the move") in told(aggregator)
    assert aggregator.lease.by_hand.value == 1
    states = {group.name: (group.state, group.why) for group in aggregator.groups()}
    assert states["/g"] == ("degraded", "opened by adam: the move")
    assert states["g"] == ("unhealthy", "a: a is bad")
    report(aggregator, c=False)
    clock.now += 60
    aggregator.note_expiry()
    assert opened(aggregator) == ["/s"]
    assert ("", False, "g: a: a is bad and 1 more") in told(aggregator)


def test_open_lasts_no_longer_than_it_is_said() -> None:
    """However long it was asked for: who dies closes the gate. And never beyond its end, or beyond the other beats."""
    aggregator, clock = site()
    report(aggregator, a=False, b=True, c=True)
    for left, until in ((3600.0, OVERRIDE_TTL), (math.inf, OVERRIDE_TTL), (7.0, 7.0), (0.0, 0.0)):
        aggregator.overrule(word("open"), clock.now + left)
        report(aggregator, a=False)
        assert aggregator.lease.until.value == clock.now + until
        assert aggregator.lease.parts["/n"].until.value == clock.now + until
    aggregator.overrule(word("open"), clock.now + 3600)
    ends = clock.now + OVERRIDE_TTL
    clock.now += 10
    report(aggregator, a=False, b=True, c=True)
    aggregator.beat("recorder")
    assert aggregator.lease.until.value == ends, "reports of pollers do not renew it"
    aggregator.beat("recorder", 5)
    assert aggregator.lease.until.value == clock.now + 5
    aggregator.beat("recorder")
    report(aggregator, a=True, ttl=300)
    assert aggregator.lease.until.value == clock.now + 132, "health may be known for longer"


# what is said, and how many seconds of it are left; whether a, b and c are healthy; whether the recorder lives
WORDS = st.tuples(st.sampled_from(["open", "close"]), st.integers(-5, 100))
SITUATIONS = st.tuples(st.one_of(st.none(), WORDS), st.tuples(*[st.booleans()] * 3), st.booleans())


@given(st.lists(SITUATIONS, min_size=1, max_size=6))
def test_any_word_in_any_situation(situations: list[Any]) -> None:
    """As brute force says, now and at the end."""
    aggregator, clock = site()
    for said, health, lives in situations:
        report(aggregator, ttl=1000, **dict(zip("abc", health, strict=True)))
        aggregator.overrule(*((word(said[0]), clock.now + said[1]) if said else (None, 0.0)))
        aggregator.beat("recorder", 500 if lives else 0)
        a, b, c = health
        for later in (0, 1, 99, 100, OVERRIDE_TTL):
            natural = {"": a and c, "/g": a and b and c, "/n": a and c, "/s": True, "g": a}
            forced = natural | {"": said[0] == "open", "/g": said[0] == "open", "/n": said[0] == "open"} if said else {}
            wanted = dict(natural)
            if said and said[0] == "close":
                wanted = forced
            elif said and later < min(said[1], OVERRIDE_TTL):
                wanted = {name: forced[name] or natural[name] for name in natural}
            for name, expected in wanted.items():
                lease = aggregator.lease.part(name)
                assert lease
                assert (clock.now + later < lease.until.value) is (expected and (lives or name == "/s")), (name, later)
        clock.now += 10


# --- clocks ---
def test_end_whatever_became_of_the_clock() -> None:
    """Never later than was asked, from now on; where a clock was set back, an open gate closes."""
    now = lease_clock()
    for action, begun, seconds, left in (
        ("open", -10, 60, 50),
        ("close", -10, 60, 50),
        ("open", -100, 60, -40),
        ("open", 0.2, 60, 60),
        ("open", 3600, 60, -now),
        ("close", 3600, 60, 60),
        ("close", -1e9, None, math.inf),
        ("close", 1e9, None, math.inf),
    ):
        zero_at = 1_800_000_000.0
        end = end_of_override(word(action, seconds, at=zero_at + now + begun), zero_at)
        assert end == left + now or abs(end - now - left) < 30, (action, begun)
        assert end <= lease_clock() + (math.inf if seconds is None else seconds)


@pytest.mark.skipif(not boot_number(), reason="the system tells of no starts")
def test_end_in_the_same_start_of_the_machine() -> None:
    """What the clock says is nothing then."""
    begun = lease_clock() - 20
    for action, at in (("open", 0.0), ("open", 1e12), ("close", 1e12)):
        override = word(action, at=at, boot=boot_number(), begun_mono=begun)
        assert end_of_override(override, 1_800_000_000.0) == begun + 60
    assert end_of_override(word("open", at=1e12, boot=1, begun_mono=begun), 0.0) == 0.0


def test_what_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    with local_console(tmp_path, GOOD, clock=time.time) as local:
        for text in ("{", '{"action": "ajar"}', '{"action": "open"}'):
            with local.store.writing() as session:
                session.merge(Setting(name="override", value=0, text=text))
                revise(session)
            local.follow()
            assert local.log_in().api("GET", "gate").json["override"] is None
        assert local.api("POST", "gate", {"action": "close"}).json["state"] == "closed"


# === The console =============================================================
@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    with local_console(tmp_path, BAD, clock=time.time) as made:
        yield made.log_in()


def changes(local: Local) -> list[str]:
    with local.store.reading() as session:
        rows = session.scalars(sqlalchemy.select(Event).where(Event.kind == "change").order_by(Event.id.desc()))
        return [f"{row.actor}: {row.text}" for row in rows if row.text.startswith("gate ")]


def test_api(local: Local) -> None:
    found = local.api("GET", "gate").json
    assert (found["mode"], found["would_refuse"], found["override"]) == ("enforce", 0, None)
    wait_for(lambda: local.api("GET", "gate").json["why"].startswith("b: check simulation"))
    reply = local.api("POST", "gate", {"action": "open", "for": "2h", "reason": "the board is watching"})
    assert reply.status == 200
    given = reply.json["override"]
    assert (given["action"], given["reason"], given["actor"]) == ("open", "the board is watching", "SpiceWorks")
    assert reply.json["state"] == "open" and local.context.is_healthy
    assert reply.json["why"] == "opened by SpiceWorks: the board is watching"
    checks = local.ask("GET", "/-/health").json["checks"]
    assert checks["gate:override"][0]["output"] == "opened by SpiceWorks: the board is watching"
    wait_for(lambda: local.ask("GET", "/-/health").json["checks"]["b:state"][0]["status"] == "fail")
    metrics = local.ask("GET", "/-/metrics", headers={"Authorization": ""}).body
    assert 'healthchecker_gate_override{action="open"} 1.0' in metrics
    assert 'healthchecker_gate_override{action="close"} 0.0' in metrics
    assert local.api("POST", "gate", {"action": "auto", "reason": "they went home"}).json["override"] is None
    wait_for(lambda: local.api("GET", "gate").json["state"] == "closed")
    last, first = changes(local)
    assert last == "SpiceWorks: gate left to the resources again: they went home"
    assert first.startswith("SpiceWorks: gate opened by SpiceWorks: the board is watching, until 20")
    assert local.api("POST", "gate", {"action": "auto"}).status == 200
    assert len(changes(local)) == 2, "there was nothing to end"


@pytest.mark.long
def test_default_and_bounds(local: Local) -> None:
    def seconds() -> Any:
        with local.store.reading() as session:
            return Override.model_validate_json(remembered(session, "override").text).seconds

    for body, expected in (
        ({"action": "open"}, 1800.0),
        ({"action": "close"}, None),
        ({"action": "close", "for": "3d"}, 259_200.0),
        ({"action": "open", "for": 86_400}, 86_400.0),
        ({"action": "open", "for": "1.5 h"}, 5400.0),
        ({"action": "open", "for": "90s"}, 90.0),
    ):
        assert local.api("POST", "gate", body).status == 200, body
        assert seconds() == expected
    before = len(changes(local))
    for body, fields in (
        ({"action": "open", "for": "25h"}, {"for": "must be at most 24h for an open gate"}),
        ({"action": "open", "for": "1e3d"}, {"for": "must be such as 90s, 30m or 2h"}),
        ({"action": "open", "for": "30"}, {"for": "must be such as 90s, 30m or 2h"}),
        ({"action": "close", "for": "400d"}, {"for": "must be at most 366d"}),
        ({"action": "close", "for": 0}, {"for": "must be greater than 0"}),
        ({"action": "close", "for": -5}, {"for": "must be greater than 0"}),
        ({"action": "close", "reason": "two\nlines"}, {"reason": "must be one line of text and not empty"}),
        ({"action": "close", "reason": "x" * 201}, {"reason": "must have at most 200 characters"}),
        ({"action": "auto", "for": "5m"}, {"for": "has no meaning with auto"}),
        ({"action": "ajar"}, {"action": "must be 'open', 'close' or 'auto'"}),
        ({}, {"action": "is missing"}),
        ({"action": "open", "until": "noon"}, {"until": "is unknown"}),
    ):
        reply = local.api("POST", "gate", body)
        assert (reply.status, reply.fields) == (422, fields), body
    assert len(changes(local)) == before and seconds() == 90.0


def test_it_ends_by_itself(local: Local) -> None:
    assert local.api("POST", "gate", {"action": "open", "for": "1s"}).status == 200
    wait_for(lambda: len(changes(local)) == 2)
    assert changes(local)[0] == ": gate opened by SpiceWorks; that is over"
    assert local.api("GET", "gate").json["override"] is None
    assert not local.context.is_healthy
    with local.store.reading() as session:
        assert not remembered(session, "override").text


@pytest.mark.long
def test_another_one_in_its_place(local: Local) -> None:
    """The end of the first is not that of the second."""
    local.api("POST", "gate", {"action": "open", "for": "1s"})
    reply = local.api("POST", "gate", {"action": "close", "reason": "no, wait"})
    assert (reply.json["state"], reply.json["why"]) == ("closed", "closed by SpiceWorks: no, wait")
    end_of_first = time.time() + 1.5
    wait_for(lambda: time.time() > end_of_first)
    assert local.api("GET", "gate").json["override"]["action"] == "close"


def test_page(local: Local) -> None:
    local.open_session()
    page = local.ask("GET", "/-/").body
    assert 'action="/-/override"' in page and "by hand" not in page
    reply = local.form("/-/override", {"action": "close", "for": "", "reason": "<b>moving</b>"})
    assert (reply.status, reply.headers["location"]) == (303, "/-/")
    for path in ("/-/", "/-/events", "/-/resources/a", "/-/users", "/-/add", "/-/password"):
        page = local.ask("GET", path).body
        assert "Gate closed by SpiceWorks: &lt;b&gt;moving" in page, path
        assert "until that is ended" in page and "Leave the gate to the resources" in page
    cookie, local.cookie = local.cookie, ""
    reply = local.form("/-/override", {"action": "open", "for": "2h", "reason": "typed before"})
    assert reply.status == 401 and "typed before" in reply.body, "the login leads back to it"
    local.cookie = cookie
    typed = {f"typed.{name}": text for name, text in {"action": "open", "for": "2h", "reason": "typed"}.items()}
    reply = local.form("/-/override", typed)
    assert reply.status == 200 and 'value="typed"' in reply.body and "Nothing has been" in reply.body
    reply = local.form("/-/override", {"action": "open", "for": "48h", "reason": "x"})
    assert reply.status == 422 and "must be at most 24h" in reply.body and 'data-refresh="/-/"' in reply.body
    origin, shown = "http://localhost", "/-/?q=a&state=healthy"
    here = {"Referer": origin + shown}
    reply = local.form("/-/override", {"action": "open", "for": "48h"}, headers=here)
    assert f'data-refresh="{html.escape(shown)}"' in reply.body and 'name="q" value="a"' in reply.body
    reply = local.form("/-/override", {"action": "close", "reason": "<b>moving</b>"}, headers=here)
    assert (reply.status, reply.headers["location"]) == (303, shown), "the filter of the page stays"
    for foreign in (f"{origin}/-/events?q=a", f"{origin}/-/?q=\u00e9", "/-/?q=a", ""):
        reply = local.form("/-/override", {"action": "close", "reason": "<b>moving</b>"}, headers={"Referer": foreign})
        assert (reply.status, reply.headers["location"]) == (303, "/-/"), foreign
    day = "/-/resources/a?span=day"
    reply = local.form("/-/resources/a/check", {}, headers={"Referer": origin + day})
    assert (reply.status, reply.headers["location"]) == (303, day), "the span of its charts, too"
    with local.store.writing() as session:
        session.add(make_user("viola", PASSWORD, "viewer"))
    local.log_in_as("viola")
    page = local.ask("GET", "/-/").body
    assert "Gate closed by SpiceWorks" in page and "/-/override" not in page


# === Observed ================================================================
def shown_overrides(local: Local) -> list[str]:
    """What the forms of the overview say of the override that it shows: the one that ends it, and the panel."""
    return re.findall(r'name="shown"[^>]* value="(.*?)"', local.ask("GET", "/-/").body)


@pytest.mark.long
def test_a_page_of_before_ends_no_other_override(local: Local) -> None:
    """Somebody closed the gate to work behind it; the button was for what its page showed."""
    with local.store.writing() as session:
        session.add(make_user("adam"))
    nothing = shown_overrides(local.log_in_as("SpiceWorks"))
    assert local.form("/-/override", {"action": "open", "for": "30m", "reason": "a known flap"}).status == 303
    mine = shown_overrides(local)
    assert (len(nothing), len(mine)) == (1, 2)
    local.log_in_as("adam", "token").api("POST", "gate", {"action": "close", "reason": "restoring the database"})
    local.log_in_as("SpiceWorks")
    for fields in (
        {"action": "auto", "shown": mine[0]},
        {"action": "open", "for": "10m", "reason": "flap", "shown": mine[1]},
        {"action": "open", "for": "10m", "reason": "flap", "shown": nothing[0]},
    ):
        reply = local.form("/-/override", fields)
        assert reply.status == 409 and "eanwhile the gate was closed by adam: restoring the" in reply.body
        assert changes(local)[0].startswith("adam: gate closed by adam")
    assert "Gate closed by adam: restoring the database" in reply.body and 'value="flap"' in reply.body
    assert local.form("/-/override", {"action": "auto", "shown": shown_overrides(local)[0]}).status == 303
    fields = {"action": "open", "for": "10m", "reason": "flap", "shown": mine[0]}
    assert local.form("/-/override", fields).status == 303, "that one is over, and there is no other"


def test_observe_is_shown(tmp_path: Path) -> None:
    with local_console(tmp_path, BAD, "  mode: observe", clock=time.time) as local:
        lease, counters = local.context.lease, Counters(1, ["/r"])
        local.context.counters = counters
        lease.observes.value = True
        RequestCounters(counters, 0).passed("/r")
        local.log_in()
        found = local.api("GET", "gate").json
        assert (found["mode"], found["would_refuse"]) == ("observe", 1)
        assert local.ask("GET", "/-/health").json["checks"]["gate:mode"][0]["output"] == "nothing is refused"
        page = local.open_session().ask("GET", "/-/").body
        assert ">observe</b>: nothing is refused;\n1 request would have been" in page
        serving, context = ServingMetrics(lease, counters), local.context
        text = generate_latest(cast(Any, serving)).decode()
        assert "healthchecker_gate_observes 1.0" in text and "healthchecker_would_refuse_total 1.0" in text
        text = generate_latest(cast(Any, Metrics(serving, context.store, None, context.connections))).decode()
        assert 'healthchecker_route_would_refuse_total{route="/r"} 1.0' in text


@pytest.mark.long
def test_observing_service(tmp_path: Path) -> None:
    """Nothing is refused but on the route that enforces; the mode of a route follows a reload, that of all a start."""
    routes = "routes: {{/r: {{needs: [a], mode: {}}}, /s: []}}\n"
    service_part = "  mode: {}\n  metrics_token_file: token\n"
    (tmp_path / "token").write_text("word", encoding="utf-8")
    prepared_database(tmp_path)
    inventory = write_inventory(tmp_path, BAD + routes.format("enforce"), service_part.format("observe"))
    with Service(inventory) as service:
        service.wait_line("service.mode is observe: nothing is refused")
        client = Client(*service.console).log_in()
        wait_for(lambda: client.api("GET", "gate").json["why"].startswith("b: "))
        found = [service.get(path) for path in ("/", "/r", "/s", "/-/readyz", "/-/gate", "/-/readyz/r", "/-/health")]
        marks = [(answer.status, answer.headers.get("x-healthchecker")) for answer in found]
        would = "would-refuse"
        assert marks[:2] == [(200, would), (503, None)]
        assert marks[2:] == [(404, None), (200, would), (204, would), (503, None), (503, None)]
        assert client.api("GET", "gate").json["would_refuse"] == 1
        assert [group["mode"] for group in client.api("GET", "groups").json] == ["enforce", "observe"]
        client.api("POST", "gate", {"action": "open", "for": "1h"})
        wait_for(lambda: "x-healthchecker" not in service.get("/").headers)
        client.api("POST", "gate", {"action": "close"})
        service.wait_line("closed by SpiceWorks) after")
        assert "; observe: nothing is refused" in service.wait_line("gate: open -> closed")
        wait_for(lambda: service.get("/").headers.get("x-healthchecker") == would)
        client.api("POST", "gate", {"action": "auto"})
        write_inventory(tmp_path, BAD + routes.format("observe"), service_part.format("enforce"))
        done = run(inventory, "reload")
        assert "service.mode changed: that needs a restart" in done.stdout, done
        assert shown(inventory)["MODE"] == "observe: nothing is refused", "until then"
        wait_for(lambda: service.get("/r").status == 404)
        text = client.ask("GET", "/-/metrics", headers={"Authorization": "Bearer word"}).body
        assert 'healthchecker_route_would_refuse_total{route="/r"}' in text
        assert "healthchecker_gate_observes 1.0" in text
    with Service(inventory) as service:
        assert service.get("/").status == 503
        assert (service.get("/r").status, service.get("/r").headers["x-healthchecker"]) == (404, would)


# === The command line, while it serves =======================================
def gate(inventory: Path, *arguments: str, code: int = 0) -> str:
    """What a `gate` command says."""
    found, text = run_cheaply("--inventory", str(inventory), "gate", *arguments)
    assert found == code, text
    return text


def shown(inventory: Path, *arguments: str) -> dict[str, str]:
    """Its table."""
    lines = gate(inventory, *arguments).splitlines()
    return {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in lines}


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="no signal stops a process there")
def test_a_service_that_does_not_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped: what is written stays without effect until it goes on, and how it stands nobody knows."""
    inventory, mute = write_inventory(tmp_path, GOOD), "does not answer: the service has written nothing for"

    def said(*words: str) -> tuple[int, str, str]:
        code, shown = healthchecker.main(["--inventory", str(inventory), *words]), capsys.readouterr()
        return code, shown.out, shown.err

    def is_stopped() -> bool:
        """Not while it writes, or nobody else could."""
        os.kill(service.pid, signal.SIGSTOP)
        wait_for(lambda: psutil.Process(service.pid).status() == psutil.STATUS_STOPPED)
        try:
            with contextlib.closing(sqlite3.connect(tmp_path / "healthchecker.db", timeout=0)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            os.kill(service.pid, signal.SIGCONT)
            return False
        return True

    with Service(inventory) as service:
        service.wait_status("/", 200)
        wait_for(lambda: said("status")[0] == 0)
        monkeypatch.setattr(healthchecker, "STANDING_AGE", 3.0)
        wait_for(is_stopped)
        try:
            wait_for(lambda: said("status")[0] == 3)
            code, table, error = said("gate")
            assert code == 3 and f"SERVICE   {mute}" in table and f"the service {mute}" in error
            for words in (["gate", "close", "--reason", "x"], ["reload"]):
                code, _, error = said(*words)
                assert code == 0 and f"the service {mute}" in error
        finally:
            os.kill(service.pid, signal.SIGCONT)
        monkeypatch.undo()
        wait_for(lambda: said("gate")[0] == 0)
    assert "the service does not run" in said("reload")[2]


FAULTS = {     # what somebody is at in the inventory, with a service that runs by the one before
    "a value": ("interval: 1", "interval: soon", ""),
    "no YAML": ("resources:", "resources: [}{", ""),
    "another setting": ("workers: 1", "workers: 1\n  drain: soon", ""),
    "what may be the database": ("workers: 1", "workers: 1\n  databse: sqlite:///x.db", "unknown setting"),
    "what may be the service": ("service:", "servise:", "unknown setting"),
    "no YAML in the service": ("workers: 1", "workers: 1\n  [", "not valid YAML"),
    "no settings": ("service:", "service: x #", "not valid YAML"),
    "two of them": ("resources:", "service: {database: 'sqlite:///x.db'}\nresources:", "this key stands here twice"),
}


@pytest.mark.long
@pytest.mark.of_files
def test_the_gate_is_closed_by_command_while_the_inventory_is_edited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its faults are said; where they may be about which database it is, nothing is changed, nor where nobody hears."""
    inventory = write_inventory(tmp_path, GOOD, "  workers: 1\n  database: sqlite:///other.db")
    valid = inventory.read_text(encoding="utf-8")

    def close() -> tuple[int, str]:
        capsys.readouterr()
        code = healthchecker.main(["--inventory", str(inventory), "gate", "close"])
        return code, capsys.readouterr().err

    with Service(inventory) as service:
        service.wait_status("/", 200)
        for name, (before, after, fault) in FAULTS.items():
            assert before in valid
            inventory.write_text(valid.replace(before, after, 1), encoding="utf-8")
            code, said = close()
            assert (code, "faulty" in said, f"{inventory.name}:" in said) == (2 if fault else 0, not fault, True), name
            assert fault in said, said
            if not fault:
                assert len(said.splitlines()) == 1
                service.wait_status("/", 503)
                assert healthchecker.main(["--inventory", str(inventory), "gate", "auto"]) == 0
                service.wait_status("/", 200)
    inventory.write_text(valid.replace("interval: 1", "interval: soon"), encoding="utf-8")
    code, said = close()
    assert code == 2 and "interval" in said and "faulty" not in said


@pytest.mark.of_files
def test_commands(tmp_path: Path) -> None:
    inventory = write_inventory(tmp_path, GOOD)
    assert gate(inventory, code=2) == "there is no database yet; start the service first\n"
    with Service(inventory) as service:
        service.wait_status("/", 200)
        wait_for(lambda: shown(inventory)["GATE"].startswith("closed -> open after"))
        found = shown(inventory)
        assert (found["OVERRIDE"], found["MODE"], found["SERVICE"]) == ("none", "enforce", "runs")
        found = shown(inventory, "close", "--reason", "new disks")
        assert found["OVERRIDE"] == "closed by command line: new disks, until that is ended"
        answer = service.wait_status("/", 503)
        assert '"detail": "closed by an operator"' in answer.body and "disks" not in answer.body
        assert 1 <= int(answer.headers["retry-after"]) <= OVERRIDE_TTL
        answer = service.get("/-/readyz")
        assert (answer.status, answer.body) == (503, "closed by an operator\n")
        service.wait_line("gate: open -> closed (closed by command line: new disks) after")
        wait_for(lambda: "new disks" in shown(inventory)["GATE"])
        assert shown(inventory, "auto")["OVERRIDE"] == "none"
        service.wait_status("/", 200)
    assert shown(inventory)["SERVICE"] == "does not run: the gate is closed"
    for arguments, words in (
        (("open", "--for", "2d"), "for: must be at most 24h for an open gate"),
        (("open", "--for", "soon"), "for: must be such as 90s, 30m or 2h"),
        (("--for", "2h"), "action: is missing"),
        (("auto", "--for", "2h"), "for: has no meaning with auto"),
        (("ajar",), "invalid choice: 'ajar'"),
    ):
        assert words in gate(inventory, *arguments, code=2)


@pytest.mark.long
def test_it_is_kept_over_a_restart_and_expires(tmp_path: Path) -> None:
    """Open from the first request on, and closed at its end, in the next service, too; said before the first start."""
    inventory = write_inventory(tmp_path, BAD)
    with Service(inventory) as service:
        service.wait_line("b: unknown -> unhealthy")
        assert service.get("/").status == 503
        gate(inventory, "open", "--for", "1h")
        service.wait_status("/", 200)
    with Service(inventory) as service:
        assert service.get("/").status == 200
        assert shown(inventory)["OVERRIDE"].startswith("opened by command line, until 20")
    gate(inventory, "open", "--for", "1s")
    with Service(inventory) as service:
        service.wait_status("/", 503)
        service.wait_line("gate: opened by command line; that is over")
        gate(inventory, "open", "--for", "3s")  # within which a machine that is busy may not even hear of it
        wait_for(lambda: service.output.count("gate: opened by command line; that is over") == 2, 60)
        service.wait_status("/", 503)
        assert shown(inventory)["OVERRIDE"] == "none"


def ask(service: Program) -> int:
    """The status of an answer; 0 for none."""
    try:
        return service.get("/").status
    except (OSError, http.client.HTTPException):
        return 0


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_who_dies_closes_the_gate(tmp_path: Path) -> None:
    """The main process is killed while the gate is open by hand; another one that is only stopped renews nothing."""
    inventory = write_inventory(tmp_path, BAD)
    with Service(inventory, code=-signal.SIGKILL) as service:
        gate(inventory, "open", "--for", "1h")
        service.wait_status("/", 200)
        os.kill(service.pid, signal.SIGKILL)
        wait_for(lambda: ask(service) != 200, OVERRIDE_TTL + 30)
    with Service(inventory) as service:
        assert service.get("/").status == 200, "it was asked for an hour"
        os.kill(service.pid, signal.SIGSTOP)
        try:
            wait_for(lambda: ask(service) == 503, OVERRIDE_TTL + 60)
        finally:
            os.kill(service.pid, signal.SIGCONT)
        service.wait_status("/", 200)


# === In a browser ============================================================
@pytest.mark.long
def test_in_a_browser(tmp_path: Path) -> None:
    """Closed, shown on the page that is open elsewhere, and left to the resources again, without a new page."""
    with local_console(tmp_path, GOOD, clock=time.time) as local, served(local), chromium() as browser:
        wait_for(lambda: local.context.is_healthy)
        context, page, faults = visit(browser, cast(Any, local))
        local.log_in_as("SpiceWorks")
        name, url = f"healthchecker_session_{local.console[1]}", "http://{}:{}/-/".format(*local.console)
        cookie = {"name": name, "value": local.cookie, "url": url}
        context.add_cookies([cast(Any, cookie)])
        page.goto("/-/?q=A")
        other = context.new_page()
        other.goto("/-/")
        page.get_by_text("Override the gate").first.click()
        page.locator("form[action='/-/override']").get_by_label("Reason").fill("moving house")
        page.get_by_role("button", name="Override the gate").click()
        for shown in (page, other):
            shown.get_by_text("Gate closed by SpiceWorks: moving house").wait_for(timeout=PATIENCE)
            shown.get_by_text("Gate closed", exact=True).wait_for(timeout=PATIENCE)
        other.get_by_text("Override the gate").first.click()     # what is overruled stands there, since a moment
        other.locator("#override").get_by_label("Reason").fill("still moving")
        other.get_by_role("button", name="Override the gate").click()
        for shown in (page, other):
            shown.get_by_text("Gate closed by SpiceWorks: still moving").wait_for(timeout=PATIENCE)
        assert page.get_by_label("Search").input_value() == "A" and page.url.endswith("?q=A")
        page.get_by_role("button", name="Leave the gate to the resources").click()
        for shown in (page, other):
            shown.get_by_text("Gate open", exact=True).wait_for(timeout=PATIENCE)
            shown.get_by_text("Gate closed by").wait_for(state="detached", timeout=PATIENCE)
        assert not faults
        context.close()


# === --listen ================================================================
def started(inventory: Path, *arguments: str) -> Program:
    """The service with more arguments."""
    program = Program(inventory)
    program.command += arguments
    return program


@pytest.mark.long
def test_listen_overrides_the_inventory(tmp_path: Path) -> None:
    """And a reload of the unchanged inventory finds nothing that needs a restart."""
    inventory = write_inventory(tmp_path, GOOD, "  listen: 192.0.2.1:8080")
    with started(inventory, "--listen", "127.0.0.1:0") as service:
        service.wait_status("/", 200)
        done = run(inventory, "reload")
        assert done.returncode == 0 and "restart" not in done.stdout, done
        taken = f"127.0.0.1:{service.port}"
        done = run(write_inventory(tmp_path, GOOD, name="other.yaml"), "--listen", taken, "check")
        assert done.returncode in (0, 2) and f"--listen {taken}" in done.stdout + done.stderr, done


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "127.0.0.1:%HTTP_PLATFORM_PORT%": "argument --listen: must be address:port or [address]:port",
        "8080": "argument --listen: must be address:port or [address]:port",
        "127.0.0.1:99999": "argument --listen: the port must be at most 65535",
        "127.0.0.1:8099": "service.console 127.0.0.1:8099 is the address of --listen; write another port, or off",
        "192.0.2.1:8080": "write one that it has, such as 127.0.0.1, or 0.0.0.0 at --listen",
    }.items(),
)
def test_listen_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    inventory = write_inventory(tmp_path, GOOD, "  console: 127.0.0.1:8099")
    done = run(inventory, "--listen", text)
    assert done.returncode == 2 and words in done.stderr, done


def test_a_word_beside_another_change_holds_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said after the monitor has looked at the row, and before it has seen how far the changes are: it was missed for
    50 s, while the answer said that it holds."""
    with local_console(tmp_path, clock=time.time) as local:
        monitor, said = local.context.monitor, list[str]()
        follow = monitor.override.follow

        def follow_and_say(zero_at: float) -> None:
            follow(zero_at)
            if not said:
                change_gate(Principal(local.context), {"action": "close", "reason": "emergency"})
                said.append("close")

        monkeypatch.setattr(monitor.override, "follow", follow_and_say)
        with local.store.writing() as session:
            revise(session)
        wait_for(lambda: said)
        assert monitor.catch_up()
        assert monitor.override.now and monitor.override.now.reason == "emergency"
