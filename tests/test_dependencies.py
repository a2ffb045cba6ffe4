"""`depends_on`: what is wrong in the inventory, what stands behind what, and what pages, API and metrics show of it."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import wait_for
from console import Local, console, local_console
from service import run, write_inventory
from test_groups import Clock, gates_with, told

from healthchecker import (
    Counters,
    Gates,
    HealthAggregator,
    InventoryError,
    Lease,
    Metrics,
    ResourceSettings,
    ServingMetrics,
    Setting,
    counting_on,
    generate_latest,
    load_inventory,
    usable_parents,
)

# --- what the inventory may say ---
ROWS = "".join(f"  - {{name: {name}, platform: simulated}}\n" for name in ("switch1", "switch2", "spare"))
GROUPS = "groups: [{name: paths, members: [switch1, switch2], healthy: any}]\n"
DEEP = "".join(f"  - {{name: h{number}, platform: simulated, depends_on: [h{number + 1}]}}\n" for number in range(32))
FAULTS = {  # rows with a mark at the fault, what stands behind them, and what is said
    "unknown": ("  - {name: a, platform: simulated, depends_on: [^swtich1]}\n", "", "resources[3].depends_on[0]: no "
                "resource or group has this name; did you mean switch1?"),
    "itself": ("  - {name: a, platform: simulated, depends_on: ^[a]}\n", "", "resources[3].depends_on: a would depend "
               "on itself"),
    "twice": ("  - {name: a, platform: simulated, depends_on: [spare, paths, ^spare]}\n", GROUPS,
              "resources[3].depends_on[2]: spare stands here twice"),
    "through a group": ("  - {name: a, platform: simulated, depends_on: ^[g]}\n",
                        "groups: [{name: g, members: [h]}, {name: h, members: [a, spare]}]\n",
                        "resources[3].depends_on: a would depend on itself, through "),
    "too many": (DEEP.replace("[h1]", "^[h1]") + "  - {name: h32, platform: simulated}\n", "",
                 "resources[3].depends_on: no more than 32 may depend on each other in a row"),
    "a name that is none": ("  - {name: a, platform: simulated, depends_on: [^/a]}\n", "",
                            "resources[3].depends_on[0]: must be 1 to 253 characters"),
    "no list": ("  - {name: a, platform: simulated, depends_on: ^spare}\n", "",
                "resources[3].depends_on: must be a list"),
    "for all": ("  - {name: a, platform: simulated}\n", "defaults: {depends_on: ^[spare]}\n",
                "defaults.depends_on: must stand at each resource, for none depends on itself"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "more", "words"), FAULTS.values(), ids=FAULTS)
def test_fault(tmp_path: Path, rows: str, more: str, words: str) -> None:
    """A line for it, with the place in the file."""
    marked = write_inventory(tmp_path, f"{ROWS}{rows}{more}").read_text(encoding="utf-8").partition("^")[0]
    place = f"{marked.count(chr(10)) + 1}:{len(marked) - marked.rfind(chr(10))}"
    with pytest.raises(InventoryError) as caught:
        load_inventory(write_inventory(tmp_path, f"{ROWS}{rows}{more}".replace("^", "")))
    first, *more_lines = str(caught.value).splitlines()
    assert first.startswith(f"inventory.yaml:{place}: {words}"), first
    assert not more_lines


def test_a_circle_is_told_at_each_that_is_in_it(tmp_path: Path) -> None:
    rows = "".join(f"  - {{name: {name}, platform: simulated, depends_on: [{parent}]}}\n" for name, parent in (
        ("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")))  # fmt: skip
    with pytest.raises(InventoryError) as caught:
        load_inventory(write_inventory(tmp_path, rows))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"resources[{index}].depends_on" for index in range(3)]
    assert "a would depend on itself, through" in lines[0]


def settings(parents: Mapping[str, Sequence[str]], tags: Sequence[str] = ()) -> list[ResourceSettings]:
    return [ResourceSettings.model_construct(name=name, depends_on=tuple(names), tags=[*tags], critical=True)
            for name, names in parents.items()]  # fmt: skip


def test_a_circle_that_came_later_leaves_the_others() -> None:
    """By tags of what the console added, for instance: nobody is told, and whoever is in none depends as before."""
    gates = gates_with([{"name": "g", "tags": ["t"]}])
    assert usable_parents(gates, settings({"a": ["g"], "b": ["x"]}, ["t"])) == {"b": ("x",)}
    assert usable_parents(gates, settings({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a"], "e": ["e"]})) == {
        "a": ("b",), "d": ("a",)}  # fmt: skip
    assert usable_parents(Gates(), settings({"a": [], "b": []})) == {}


def test_check_prints_what_is_behind_what(tmp_path: Path) -> None:
    rows = ROWS + "".join(f"  - {{name: {name}, platform: simulated, depends_on: [{parents}]}}\n" for name, parents in (
        ("db1", "paths"), ("db2", "paths, spare")))  # fmt: skip
    done = run(write_inventory(tmp_path, rows + GROUPS), "check")
    assert done.returncode == 0, done
    assert "\nbehind paths: db1, db2\nbehind spare: db2\n" in done.stdout
    done = run(write_inventory(tmp_path, rows.replace("paths, spare", "switch1").replace("paths", "switch1")), "check")
    assert "\nbehind switch1: db1, db2\n" in done.stdout and "needs" not in done.stdout


# --- leases of what depends on others ---
def make(parents: Mapping[str, Sequence[str]], gates: Gates | None = None, aside: str = "") -> tuple[
    HealthAggregator, Clock
]:
    """All of one letter each, and known, but for those that are a resource's."""
    clock, gates = Clock(), gates or Gates()
    aggregator = HealthAggregator(Lease(gates.members({})), clock)
    aggregator.arrange(gates, {}, parents)
    for name in aside:
        aggregator.register(name, critical=False)
    return aggregator, clock


def report(aggregator: HealthAggregator, names: str, healthy: bool = True, ttl: float = 100.0) -> None:
    for name in names:
        aggregator.set_resource(name, healthy, "" if healthy else f"unreachable: {name}", ttl=ttl)


def test_a_child_falls_and_rises_with_its_parent() -> None:
    aggregator, clock = make({"h": "s", "g": "h"})
    report(aggregator, "shgx")
    report(aggregator, "s", healthy=False)
    assert [aggregator.blocker(name) for name in "shgx"] == ["", "s", "s", ""]
    assert (aggregator.behind("s"), aggregator.behind("h"), aggregator.behind("g")) == (2, 1, 0)
    assert told(aggregator) == [("", True, ""), ("", False, "s: unreachable: s")]
    report(aggregator, "h", healthy=False)
    report(aggregator, "s")
    assert [aggregator.blocker(name) for name in "shg"] == ["", "", "h"], "each stands as its own last result says"
    assert told(aggregator) == []
    report(aggregator, "h")
    assert aggregator.is_healthy() and told(aggregator) == [("", True, "")]
    report(aggregator, "hgx", ttl=500)
    clock.now += 100
    assert not aggregator.is_healthy(), "the parent's lease is over"
    assert aggregator.blocker("g") == "s"
    aggregator.note_expiry()
    assert told(aggregator) == [("", False, "no result of s")]


def test_what_a_resource_closes() -> None:
    """The groups it is in, those above them, the routes that need these or the whole site, and so of what is behind
    it, while that counts; of one that is not critical nothing else."""
    gates = gates_with([{"name": "shop", "members": ["h", "x"]}, {"name": "stock", "members": ["y"]},
                        {"name": "lone", "members": ["z"]}], {"/r": ["lone"], "/free": []})
    aggregator, _ = make({"h": "s"}, gates, aside="s")
    report(aggregator, "shxyz")
    found = {name: {*counting_on(aggregator, name)} for name in "shxyza"}
    assert found["s"] == found["h"] == found["x"] == {"shop", "", "/r"}
    assert (found["y"], found["z"], found["a"]) == ({"stock", "", "/r"}, {"lone", "/r"}, {"", "/r"})
    aggregator.deregister("h")
    assert not counting_on(aggregator, "s")


def test_what_is_well_without_a_resource_is_not_closed_by_it() -> None:
    gates = gates_with([{"name": "shop", "members": ["h", "x"], "healthy": "any"}], {"/r": ["y"], "/free": []})
    aggregator, clock = make({"h": "s"}, gates, aside="s")
    report(aggregator, "hxyz")
    report(aggregator, "sz", healthy=False)
    found = {name: {*counting_on(aggregator, name, closed=True)} for name in "sz"}
    assert found == {"s": set(), "z": {"", "/r"}}
    report(aggregator, "x", healthy=False)
    assert counting_on(aggregator, "s", closed=True) == counting_on(aggregator, "x", closed=True) == {"shop", "", "/r"}
    report(aggregator, "x", ttl=50)
    report(aggregator, "z")
    assert counting_on(aggregator, "s", closed=True) == frozenset()
    clock.now += 60
    assert counting_on(aggregator, "s", closed=True) == {"shop", "", "/r"}, "the other one's lease is over"


def test_a_parent_that_is_not_critical() -> None:
    """It closes nothing, but what depends on it does; nothing waits for its first result."""
    aggregator, _ = make({"h": "s"}, aside="s")
    for name in "hx":
        aggregator.register(name)
    aggregator.start()
    report(aggregator, "hx")
    assert aggregator.is_healthy() and told(aggregator) == [("", True, "")]
    report(aggregator, "s", healthy=False)
    assert told(aggregator) == [("", False, "h: parent: behind s")]
    aggregator.deregister("h")
    assert aggregator.is_healthy()
    aggregator.register("h")
    report(aggregator, "h")
    assert not aggregator.is_healthy()
    aggregator.register("s", critical=True)
    assert not aggregator.is_healthy()
    aggregator.deregister("s")  # maintenance
    assert aggregator.is_healthy() and not aggregator.blocker("h")


def test_alternatives_are_a_group() -> None:
    aggregator, _ = make({"h": ["g"], "i": ["g"]}, gates_with([{"name": "g", "members": ["s", "t"], "healthy": "any"}]))
    report(aggregator, "sthi")
    report(aggregator, "s", healthy=False)
    assert aggregator.is_healthy() and not aggregator.blocker("h")
    assert aggregator.sources("h") == {"s", "t"}
    told(aggregator)
    report(aggregator, "t", healthy=False)
    assert aggregator.blocker("h") == "g" and aggregator.behind("g") == 2 and aggregator.behind("t") == 0
    why = "0 of 2 healthy: s: unreachable: s and 1 more"
    assert told(aggregator) == [("", False, f"g: {why}"), ("g", False, f"{why}; 2 behind it")]


def test_who_has_no_result_makes_nobody_unhealthy() -> None:
    gates = gates_with([{"name": "g", "members": ["s", "t"]}, {"name": "one", "members": ["s", "t"], "healthy": "any"}])
    aggregator, _ = make({"h": ["s"], "i": ["g"], "j": ["one"]}, gates)
    for name in "sthij":
        aggregator.register(name)
    aggregator.start()
    report(aggregator, "hij")
    assert not any(map(aggregator.blocker, "hij"))
    report(aggregator, "t", healthy=False)
    assert [aggregator.blocker(name) for name in "hij"] == ["", "g", ""], "the other one of any may be healthy"
    assert not aggregator.is_healthy()
    report(aggregator, "s")
    assert [aggregator.blocker(name) for name in "hij"] == ["", "g", ""]


def test_a_renewed_parent_costs_what_depends_on_it() -> None:
    """A lattice, of which each level has two of the next: the ways through it are a billion."""
    parents = {f"{side}{level}": [f"l{level - 1}", f"r{level - 1}"] for level in range(1, 31) for side in "lr"}
    aggregator, clock = make(parents)
    names = ["l0", "r0", *parents]
    for name in names:
        aggregator.set_resource(name, True, ttl=100)
    for ttl, healthy in ((200, True), (0, False), (50, True)):
        aggregator.set_resource("l0", healthy, ttl=ttl)
        assert aggregator.is_healthy() is healthy
        assert aggregator.behind("l0") == 60
    assert aggregator.lease.until.value == clock.now + 50


def test_dependencies_that_come_and_go() -> None:
    """In a reload: known results count on, whatever depends on what now."""
    aggregator, _ = make({})
    report(aggregator, "shx")
    report(aggregator, "s", healthy=False)
    aggregator.deregister("s")
    aggregator.register("s", critical=False)
    report(aggregator, "s", healthy=False)
    assert aggregator.is_healthy()
    aggregator.arrange(Gates(), {}, {"h": ("s",)})
    assert not aggregator.is_healthy() and aggregator.blocker("h") == "s"
    aggregator.arrange(Gates(), {}, {"x": ("h",), "h": ("s",)})
    assert aggregator.blocker("x") == "s"
    aggregator.arrange(Gates(), {}, {"x": ("h",)})
    assert aggregator.is_healthy() and aggregator.lease.until.value < math.inf


# --- what is shown ---
CALM = "platform: simulated, mean_healthy: 1000000, interval: 1"
DOWN = "platform: simulated, mean_healthy: 0.000001, mean_unhealthy: 1000000, interval: 1"


def text_of(local: Local, path: str) -> str:
    return local.ask("GET", path).body


def test_what_is_shown(tmp_path: Path) -> None:
    rows = (
        f"  - {{name: switch1, {DOWN}, critical: false}}\n  - {{name: db1, {CALM}, depends_on: [switch1]}}\n"
        f"  - {{name: db2, {CALM}, depends_on: [db1]}}\n  - {{name: alone, {CALM}}}\n"
    )
    with local_console(tmp_path, rows) as local:
        local.log_in()

        def view(name: str) -> dict[str, Any]:
            return cast(dict[str, Any], local.api("GET", f"resources/{name}").json)

        wait_for(lambda: [view(name)["state"] for name in ("db1", "db2", "alone")] == [
            "unhealthy", "unhealthy", "healthy"])  # fmt: skip
        wait_for(lambda: view("switch1")["state"] == "unhealthy")
        local.context.monitor.poll_now("db2", 60)  # and all is written
        db2 = view("db2")
        assert (db2["cause"], db2["reason"], db2["depends_on"]) == ("parent", "behind switch1", ["db1"])
        assert db2["since"] == view("switch1")["since"] and db2["polled"]
        for page in ("/-/", "/-/resources/db2"):
            assert "parent: behind switch1" in text_of(local, page)
        assert "Depends on" in text_of(local, "/-/resources/db2")
        health = local.ask("GET", "/-/health").json["checks"]["db2:state"][0]
        assert (health["status"], health["output"]) == ("fail", "parent: behind switch1")
        context = local.context
        metrics = Metrics(ServingMetrics(context.lease, Counters(1)), context.store, None, context.connections,
                          context.monitor)  # fmt: skip
        text = generate_latest(cast(Any, metrics)).decode()
        assert 'healthchecker_resource_cause{cause="parent",resource="db2"} 1.0' in text
        assert 'healthchecker_resources{state="unhealthy"} 3.0' in text
        polls = "resources/db1/samples"
        wait_for(lambda: any(poll["standing"] == "unhealthy" for poll in local.api("GET", polls).json))
        states = [event for event in local.api("GET", "events?kind=state").json if event["resource"] != "switch1"]
        assert not [event for event in states if "unhealthy" in event["text"]]


@pytest.mark.long
def test_what_the_console_adds_depends_on_what_there_is(tmp_path: Path) -> None:
    rows = f"  - {{name: switch1, {DOWN}, tags: [t]}}\n  - {{name: db1, {CALM}, depends_on: [g]}}\n"
    with local_console(tmp_path, f"{rows}groups: [{{name: g, tags: [t]}}]\n") as local:
        local.log_in()
        added: dict[str, Any] = {"name": "a", "platform": "simulated", "interval": 1}

        def fault(**more: Any) -> Any:
            reply = local.api("POST", "resources", added | more)
            return reply.status, reply.json["errors"]

        for parents, message in {
            "swtich1": "no resource or group has this name; did you mean switch1?",
            "a": "a would depend on itself",
        }.items():
            assert fault(depends_on=[parents]) == (422, [{"field": "depends_on", "message": message}])
        status, errors = fault(depends_on=["g"], tags=["t"])
        assert status == 422 and "would depend on itself" in errors[0]["message"]
        assert local.api("POST", "resources", added | {"depends_on": ["g"]}).status == 201
        wait_for(lambda: local.api("GET", "resources/a").json["cause"] == "parent")
        assert local.api("PATCH", "resources/a", {"depends_on": None}).json["depends_on"] == []
        wait_for(lambda: local.api("GET", "resources/a").json["state"] == "healthy")


def test_what_others_are_behind_is_not_removed(tmp_path: Path) -> None:
    """Nor may a new name leave the old one in its own settings: nothing of them could be changed after that."""
    with local_console(tmp_path, "") as local:
        local.log_in()
        calm = {"platform": "simulated", "mean_healthy": 1_000_000}
        for row in ({"name": "sw"}, {"name": "web", "depends_on": ["sw"]}, {"name": "a"}):
            assert local.api("POST", "resources", calm | row).status == 201
        reply = local.api("DELETE", "resources/sw")
        assert (reply.status, reply.json["detail"]) == (409, "sw stays while it is named by web")
        reply = local.api("PATCH", "resources/a", {"name": "b", "depends_on": ["a"]})
        assert (reply.status, list(reply.fields)) == (422, ["depends_on"])
        assert local.api("PATCH", "resources/web", {"critical": False}).status == 200
        assert local.api("PATCH", "resources/a", {"name": "b", "depends_on": ["web"]}).json["depends_on"] == ["web"]
        host = {"platform": "linux", "hostname": "192.0.2.1", "username": "u", "password": "p", "interval": 600}
        for row in ({"name": "jump"}, {"name": "behind", "proxy_jump": "jump"}):
            assert local.api("POST", "resources", host | row).status == 201
        assert local.api("DELETE", "resources/jump").status == 409
        reply = local.api("PATCH", "resources/behind", {"name": "p", "proxy_jump": "behind", "password": "p"})
        assert (reply.status, list(reply.fields)) == (422, ["proxy_jump"])
        with local.store.writing() as session:  # groups that cannot be read name nobody
            session.merge(Setting(name="gates", value=0, text="{"))
        for name in ("behind", "jump", "b", "web", "sw"):
            assert local.api("DELETE", f"resources/{name}").status == 204


def test_dependencies_follow_a_reload(tmp_path: Path) -> None:
    """Added, renamed and removed while the service runs."""
    switch = f"{DOWN}, fall: 1, critical: false"
    inventory = tmp_path / "inventory.yaml"
    with console(tmp_path, f"  - {{name: old, {switch}}}\n  - {{name: db1, {CALM}}}\n") as (service, client):
        service.wait_status("/", 200)
        write_inventory(tmp_path, f"  - {{name: old, {switch}}}\n  - {{name: db1, {CALM}, depends_on: [old]}}\n")
        assert run(inventory, "reload").returncode == 0
        assert "(db1: parent: behind old)" in service.wait_line("gate: open -> closed")
        renamed = f"  - {{name: new, was: old, {switch}}}\n  - {{name: db1, {CALM}, depends_on: [new]}}\n"
        write_inventory(tmp_path, renamed)
        assert run(inventory, "reload").returncode == 0
        wait_for(lambda: client.api("GET", "resources/db1").json["reason"] == "behind new")
        begin = len(service.output)
        write_inventory(tmp_path, renamed.replace(", depends_on: [new]", ""))
        assert run(inventory, "reload").returncode == 0
        service.wait_status("/", 200)
        assert "db1: healthy -> unhealthy" not in service.output[begin:]


def test_a_parent_that_the_inventory_has_no_more(tmp_path: Path) -> None:
    """What the console put behind it counts by itself then, which is said."""
    switch, db1 = f"  - {{name: switch1, {DOWN}, fall: 1, critical: false}}\n", f"  - {{name: db1, {CALM}}}\n"
    inventory = tmp_path / "inventory.yaml"
    told = "switch1 is not in the inventory any more, but is named by db2, which was added in the console"
    with console(tmp_path, switch + db1) as (service, client):
        client.log_in()
        added = {"name": "db2", "platform": "simulated", "mean_healthy": 1_000_000, "interval": 1}
        assert client.api("POST", "resources", added | {"depends_on": ["switch1"]}).status == 201
        wait_for(lambda: client.api("GET", "resources/db2").json["cause"] == "parent")
        write_inventory(tmp_path, db1)
        assert told in run(inventory, "check").stderr
        done = run(inventory, "reload")
        assert done.returncode == 0 and told in done.stderr
        wait_for(lambda: client.api("GET", "resources/db2").json["state"] == "healthy")
        service.wait_status("/", 200)
        assert client.api("PATCH", "resources/db2", {"depends_on": None}).status == 200
        assert told not in run(inventory, "reload").stderr
        with closing(sqlite3.connect(tmp_path / "healthchecker.db")) as database, database:
            database.execute("UPDATE resource SET settings = '{\"depends_on\": [1]}' WHERE name = 'db2'")
        done = run(inventory, "reload")
        assert done.returncode == 0 and "1 is not in the inventory any more" in done.stderr
