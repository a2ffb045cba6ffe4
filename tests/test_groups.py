"""Groups and routes: what is wrong in the inventory, the algebra of leases against brute force, and a real service."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import queue
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import wait_for
from console import console, local_console
from hypothesis import example, given
from hypothesis import strategies as st
from service import Service, run, write_inventory
from sshd import POSIX, open_sshd

from healthchecker import (
    Counters,
    Gate,
    Gates,
    GroupTree,
    HealthAggregator,
    InventoryError,
    Lease,
    Metrics,
    ResourceSettings,
    ServingMetrics,
    closed_groups,
    generate_latest,
    load_inventory,
    quorum_of,
    usable_parents,
)

QUORUMS = {
    ("all", 0): 0, ("all", 3): 3, ("any", 0): 0, ("any", 3): 1, ("2", 3): 2, ("2", 1): 1, ("2", 0): 0,
    ("50%", 3): 2, ("50%", 4): 2, ("1%", 3): 1, ("100%", 3): 3, ("34%", 3): 2, ("33%", 3): 1, ("50%", 0): 0,
}  # fmt: skip


@pytest.mark.parametrize(("asked", "needed"), QUORUMS.items())
def test_quorum(asked: tuple[str, int], needed: int) -> None:
    assert quorum_of(*asked) == needed


# --- what the inventory may say ---
ROWS = "".join(f"  - {{name: {name}, platform: simulated, tags: [{tag}]}}\n" for name, tag in (
    ("db1", "db"), ("db2", "db"), ("db3", "db"), ("web1", "web"), ("warehouse", "")))  # fmt: skip
ROWS += "  - {name: shown, platform: simulated, critical: false, tags: [idle]}\n"
FINE = {
    "all": "groups: [{name: g, members: [db1, db2]}]",
    "a number": "groups: [{name: g, members: [db1, db2], healthy: 2}]",
    "a percentage by tag": "groups: [{name: g, tags: [db], healthy: 50%, warn: 80%}]",
    "tags and members": "groups: [{name: g, members: [web1, db1], tags: [db], healthy: 4}]",
    "a group of groups": "groups: [{name: g, members: [h, web1]}, {name: h, tags: [db], healthy: any}]",
    "routes": "routes: {/reports: [warehouse], /static: [], /a/b: [db1, web1], /größe: []}",
    "a route to a group": "groups: [{name: g, tags: [db]}]\nroutes: {/reports: [g]}",
    "a path with a space": "routes: {/a b: []}",
    "a route's mode": "routes: {/a: {needs: [db1], mode: observe}, /b: {mode: observe}, /c: {needs: []}, /d: {}}",
    "a warning of one host": "groups: [{name: g, tags: [web], healthy: 50%, warn: 80%}]",
    "a resource in two groups": "groups: [{name: g, members: [db1, db2]}, {name: h, members: [db1, web1]}]",
}


def gates_of(folder: Path, text: str) -> Gates:
    return load_inventory(write_inventory(folder, f"{ROWS}{text}\n")).gates


@pytest.mark.parametrize("text", FINE.values(), ids=FINE)
def test_fine(tmp_path: Path, text: str) -> None:
    gates = gates_of(tmp_path, text)
    assert Gates.model_validate_json(gates.model_dump_json()) == gates


# groups or routes with a mark at the fault, and what is said of it
FAULTS = {
    "nobody": ("groups:\n  - {name: ^g}", "groups[0].name: has no members"),
    "a tag of nobody": ("groups:\n  - {name: ^g, tags: [dbs]}", "groups[0].name: has no members"),
    "a tag of what does not count": ("groups:\n  - {name: ^g, tags: [idle]}", "groups[0].name: has no members"),
    "a member that is unknown": ("groups:\n  - {name: g, members: [db1, ^dp2]}",
                                 "groups[0].members[1]: no resource or group has this name; did you mean db2?"),
    "a member that does not count": ("groups:\n  - {name: g, members: [db1, ^shown]}",
                                     "groups[0].members[1]: shown is not critical, so it counts for nothing"),
    "more than there are": ("groups:\n  - {name: g, members: [db1, db2], healthy: ^3}",
                            "groups[0].healthy: must be at most 2"),
    "a warning that never comes": ("groups:\n  - {name: g, tags: [db], healthy: 3, warn: ^50%}",
                                   "groups[0].warn: must ask for more members than `healthy`"),
    "no quorum": ("groups:\n  - {name: g, tags: [db], healthy: ^most}", "groups[0].healthy: must be all, any"),
    "none": ("groups:\n  - {name: g, tags: [db], healthy: ^0}", "groups[0].healthy: must be all, any"),
    "more than all": ("groups:\n  - {name: g, tags: [db], healthy: ^101%}", "groups[0].healthy: must be all, any"),
    "a warning like the rest": ("groups:\n  - {name: g, tags: [db], healthy: 2, warn: ^2}",
                                "groups[0].warn: must ask for more members than `healthy`"),
    "a resource's name": ("groups:\n  - {name: ^db1, members: [db2]}", "groups[0].name: a resource, group or route"),
    "a route's name": ("groups:\n  - {name: ^reports, members: [db2]}\nroutes: {/reports: []}",
                       "groups[0].name: a resource, group or route has this name, too"),
    "a name twice": ("groups:\n  - {name: g, tags: [db]}\n  - {name: ^g, tags: [web]}",
                     "groups[1].name: a resource, group or route has this name, too"),
    "too deep": ("groups:\n  - {name: g0, members: ^[g1]}\n  - {name: g9, tags: [db]}\n" + "".join(
        f"  - {{name: g{number}, members: [g{number + 1}]}}\n" for number in range(1, 9)),
        "groups[0].members: groups may be 8 deep"),
    "in itself": ("groups:\n  - {name: g, members: ^[g, db1]}", "groups[0].members: g would be a member of its own"),
    "a circle": ("groups:\n  - {name: g, members: ^[h]}\n  - {name: h, members: [db1, g]}",
                 "groups[0].members: g would be a member of its own"),
    "a setting that is unknown": ("groups:\n  - {name: g, ^member: [db1]}",
                                  "groups[0]: unknown setting; did you mean members?"),
    "a route to nobody": ("routes:\n  /reports: [^warehose]",
                          "routes./reports[0]: no resource or group has this name; did you mean warehouse?"),
    "a route to what does not count": ("routes:\n  /a: [^shown]", "routes./a[0]: shown is not critical"),
    "a route to a route": ("routes:\n  /a: [db1]\n  /b: [^/a]", "routes./b[0]: must be 1 to 253 characters"),
    **{path: (f"routes:\n  {path}: ^[]", f"routes.{path}: must be a path such as /reports") for path in (
        "/", "/-", "/-/gate", "reports", "/reports/", "/a//b", "/a/../b", "/a/..", "/./a", "/a%20b", "/a?b=1", "/a;b",
        "/a\\b", "//a", "/a/*", "/a/**", "/a/<id>", "/a/{id}", "/a/:id", "/a(/|$)",
        "/a$")},
    "a route that is a name": ("routes:\n  /a: ^db1", "routes./a: must be a list"),
    "a long route to nobody": ("routes:\n  /a: {needs: [db1, ^warehose]}",
                               "routes./a.needs[1]: no resource or group has this name; did you mean warehouse?"),
    "a long route to a path": ("routes:\n  /a: {needs: [^/b]}", "routes./a.needs[0]: must be 1 to 253 characters"),
    "a route's unknown mode": ("routes:\n  /a: {mode: ^watch}", "routes./a.mode: must be 'enforce' or 'observe'"),
    "a route's unknown setting": ("routes:\n  /a: {^need: [db1]}", "routes./a: unknown setting; did you mean needs?"),
    "a list": ("routes: ^[/a]", "routes: must be a mapping"),
    "the same route twice": ("routes:\n  /a: []\n  ^/a: [db1]", "this key stands here twice"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), FAULTS.values(), ids=FAULTS)
def test_fault(tmp_path: Path, text: str, words: str) -> None:
    """A line for each, with the place in the file."""
    marked = write_inventory(tmp_path, f"{ROWS}{text}\n").read_text(encoding="utf-8").partition("^")[0]
    place = f"{marked.count(chr(10)) + 1}:{len(marked) - marked.rfind(chr(10))}"
    with pytest.raises(InventoryError) as caught:
        gates_of(tmp_path, text.replace("^", ""))
    first, *more = str(caught.value).splitlines()
    assert first.startswith(f"inventory.yaml:{place}: {words}"), first
    assert len(more) == (words.endswith("own") and "name: h" in text) + 0, more


def test_check_prints_what_each_route_needs(tmp_path: Path) -> None:
    text = (
        "groups:\n  - {name: replicas, tags: [db], healthy: 2}\n  - {name: all-of-it, members: [replicas, web1]}\n"
        "routes: {/reports: [warehouse, replicas], /static: [], /new: {mode: observe}}\n"
    )
    done = run(write_inventory(tmp_path, ROWS + text), "check")
    assert done.returncode == 0, done
    wanted = """the whole site needs
  all-of-it: all of
    replicas: 2 of
      db1
      db2
      db3
    web1
/reports needs that and
  warehouse
  replicas (above)
/static needs nothing
/new needs that (mode observe)
"""
    assert wanted in done.stdout
    assert "needs" not in run(write_inventory(tmp_path, ROWS), "check").stdout


# --- leases of groups ---
class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(gates: Gates, tagged: Mapping[str, Sequence[str]] | None = None) -> tuple[HealthAggregator, Clock]:
    clock = Clock()
    aggregator = HealthAggregator(Lease(gates.members({})), clock)
    aggregator.arrange(gates, tagged or {})
    return aggregator, clock


@pytest.mark.parametrize("path", ["/odata/$batch", "/wiki/Foo_(bar)", "/a|b", "/größe", "/a:b", "/.well-known"])
def test_a_route_may_be_any_real_path(path: str) -> None:
    assert gates_with([], {path: []}).routes[path].needs == ()


def begin(aggregator: HealthAggregator, names: str) -> None:
    """The start, with resources of one letter each, which are all healthy."""
    for name in names:
        aggregator.register(name)
    aggregator.start()
    for name in names:
        aggregator.set_resource(name, True)


def gates_with(groups: Sequence[Mapping[str, Any]], routes: Mapping[str, Sequence[str]] | None = None) -> Gates:
    return Gates.model_validate({"groups": groups, "routes": routes or {}})


def told(aggregator: HealthAggregator) -> list[tuple[str, bool, str]]:
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            _, is_open, why, name = aggregator.transitions.get_nowait()
            found.append((name, is_open, why))
    return found


def is_open(aggregator: HealthAggregator, name: str = "") -> bool:
    return Gate(lambda environ, start_response: [], aggregator.lease, aggregator._clock).is_healthy(name)


def test_what_is_closed_from_the_start_is_told() -> None:
    """It may have been open when the service before this one ended; the site's own start is an event already."""
    aggregator, _ = make(gates_with([{"name": "g", "members": ["a"]}, {"name": "h", "members": ["b"]}]))
    for name in "ab":
        aggregator.register(name)
    aggregator.start()
    aggregator.set_resource("a", False, "on fire")
    aggregator.set_resource("b", True, ttl=10)
    assert told(aggregator) == [("g", False, "a: on fire"), ("h", True, "")]
    aggregator.note_expiry()
    assert not told(aggregator)


def test_two_of_three() -> None:
    aggregator, clock = make(gates_with([{"name": "g", "members": ["a", "b", "c"], "healthy": "2", "warn": "3"}]))
    for name in "abc":
        aggregator.register(name)
    aggregator.start()
    for name, ttl in (("a", 10), ("b", 20), ("c", 30)):
        aggregator.set_resource(name, True, ttl=ttl)
    assert told(aggregator) == [("", True, ""), ("g", True, "")]
    assert [group.state for group in aggregator.groups()] == ["healthy"]
    assert aggregator.lease.until.value == aggregator.lease.parts["g"].until.value == 1020
    aggregator.set_resource("c", False, "on fire", opens=50)
    (group,) = aggregator.groups()
    assert (group.state, group.needed, group.members) == ("degraded", 2, {"a": True, "b": True, "c": False})
    assert aggregator.is_healthy() and aggregator.lease.until.value == 1010
    clock.now += 10
    aggregator.note_expiry()
    assert not aggregator.is_healthy()
    why = "1 of 3 healthy: c: on fire"
    assert told(aggregator) == [("", False, f"g: {why}"), ("g", False, why)]
    (group,) = aggregator.groups()
    assert (group.state, group.why, group.members) == ("unhealthy", why, {"a": False, "b": True, "c": False})
    assert aggregator.lease.opens.value <= clock.now, "a report of the silent one opens it at any moment"
    aggregator.set_resource("a", False, "off", opens=5)
    assert aggregator.lease.opens.value == clock.now + 5, "the soonest of those of which one is needed"
    aggregator.set_resource("a", True)
    assert told(aggregator) == [("", True, ""), ("g", True, "")]


def test_a_group_of_nobody_who_counts_is_no_healthy_member() -> None:
    """Neither while its own members are in maintenance, nor before the first result of new ones."""
    parts = [{"name": "x", "members": ["a", "b"]}, {"name": "y", "members": ["c"]}]
    aggregator, _ = make(gates_with([{"name": "main", "members": ["x", "y"], "healthy": "any"}, *parts]))
    begin(aggregator, "abc")
    for name in "ab":
        aggregator.deregister(name)
    assert aggregator.is_healthy()
    aggregator.set_resource("c", False, "down")
    assert not aggregator.is_healthy() and not is_open(aggregator, "main")
    for name in "ab":
        aggregator.register(name)
    assert not aggregator.is_healthy(), "they have no result yet"
    for name in "ab":
        aggregator.set_resource(name, True)
    assert aggregator.is_healthy()


def test_a_bad_first_result_waits_for_who_may_make_up_for_it() -> None:
    """A group that is added closes nothing while its members' first results could still make it healthy."""
    second = {"name": "h", "members": ["d", "e"]}
    gates = gates_with([{"name": "g", "members": ["a", "b", "c"], "healthy": "2"}, second])
    aggregator, _ = make(gates)
    aggregator.register("old")
    aggregator.start()
    aggregator.set_resource("old", True)
    for name in "abcde":
        aggregator.register(name)
    told(aggregator)
    aggregator.set_resource("a", False, "dead")
    assert aggregator.is_healthy() and is_open(aggregator, "g"), "b and c may be healthy"
    assert [group.members for group in aggregator.groups()] == [{}, {}]
    aggregator.set_resource("b", True)
    aggregator.set_resource("c", True)
    assert aggregator.is_healthy() and not told(aggregator)
    assert [group.members for group in aggregator.groups()] == [{"a": False, "b": True, "c": True}, {}]
    aggregator.set_resource("d", False, "dead")
    assert not aggregator.is_healthy(), "nobody can make up for a member of `all`"


def test_a_bad_first_result_is_forgotten_with_its_resource() -> None:
    """Or one that was removed, or is in maintenance, would close the gate as soon as nobody can make up for it."""
    gates = gates_with([{"name": "g", "members": ["p", "q"], "healthy": "any"}])
    aggregator, _ = make(gates)
    aggregator.start()
    for name in "pq":
        aggregator.register(name)
    aggregator.set_resource("p", False, "dead")
    assert aggregator.is_healthy(), "q may be healthy"
    aggregator.deregister("p")
    aggregator.set_resource("q", True)
    aggregator.deregister("q")
    assert aggregator.is_healthy() and [group.members for group in aggregator.groups()] == [{}]


def test_a_bad_first_result_waits_for_who_may_make_up_for_its_group() -> None:
    """Also where that stands further up: of two sites of which one is enough, the one that answers first is bad."""
    inner = [{"name": "p", "members": ["a", "b"]}, {"name": "q", "members": ["c"]}]
    aggregator, _ = make(gates_with([{"name": "g", "members": ["p", "q"], "healthy": "any"}, *inner], {"/r": ["g"]}))
    aggregator.start()
    for name in "abc":
        aggregator.register(name)
    told(aggregator)
    aggregator.set_resource("b", True)
    aggregator.set_resource("a", False, "dead")
    assert is_open(aggregator, "g") and is_open(aggregator, "/r"), "c may be healthy"
    aggregator.set_resource("c", True)
    assert is_open(aggregator, "g") and is_open(aggregator, "/r") and not is_open(aggregator, "p")
    assert [name for name, *_ in told(aggregator)] == ["p"]
    aggregator.set_resource("c", False, "dead")
    assert not is_open(aggregator, "g") and not is_open(aggregator, "/r")


@pytest.mark.parametrize("end", ["again", "other", "gone", "arranged"])
def test_a_bad_first_result_waits_no_longer(end: str) -> None:
    """Than until the other's result, which may be bad, or its own next one, whatever becomes of the other."""
    gates = gates_with([{"name": "g", "members": ["a", "b"], "healthy": "any"}])
    aggregator, _ = make(gates)
    aggregator.start()
    aggregator.register("a")
    aggregator.register("b")
    aggregator.set_resource("a", False, "dead")
    assert aggregator.is_healthy()
    if end == "arranged":
        aggregator.arrange(gates_with([]), {})
    elif end == "gone":
        aggregator.deregister("b")
    else:
        aggregator.set_resource("a" if end == "again" else "b", False, "dead")
    assert not aggregator.is_healthy()
    aggregator.register("b")
    aggregator.set_resource("b", True)
    assert aggregator.is_healthy() is (end != "arranged")


def test_who_never_reports_by_itself_is_not_waited_for() -> None:
    aggregator, _ = make(gates_with([{"name": "g", "members": ["a", "p"], "healthy": "any"}]))
    aggregator.start()
    aggregator.register("a")
    aggregator.register("p", asked=False)
    aggregator.set_resource("a", False, "dead")
    assert not aggregator.is_healthy()


def test_a_member_that_is_known_to_be_bad_waits_for_nobody() -> None:
    """Another one that is added opens nothing before it is healthy."""
    gates = gates_with([{"name": "g", "members": ["a", "b"], "healthy": "any"}])
    aggregator, _ = make(gates)
    aggregator.register("a")
    aggregator.start()
    aggregator.set_resource("a", True)
    aggregator.register("b")
    aggregator.set_resource("a", False, "dead")
    assert not aggregator.is_healthy()
    aggregator.arrange(gates_with([{"name": "g", "members": ["a", "b", "c"], "healthy": "any"}]), {})
    aggregator.register("c")
    assert not aggregator.is_healthy()


def test_nothing_opens_or_closes_in_between() -> None:
    """A member that is removed, and one that has another name, change nothing where the group goes on as it was."""
    aggregator, _ = make(gates_with([{"name": "g", "members": ["a", "b"], "healthy": "any"}]))
    for name in "abc":
        aggregator.register(name)
    aggregator.start()
    for name, healthy in (("a", False), ("b", True), ("c", True)):
        aggregator.set_resource(name, healthy, "dead")
    told(aggregator)
    before, seen = aggregator.lease.until.value, []
    with aggregator.at_once():
        aggregator.arrange(gates_with([{"name": "g", "members": ["new"], "healthy": "any"}]), {})
        seen.append(aggregator.lease.until.value)
        aggregator.register("new")
        aggregator.set_resource("new", True)
        seen.append(aggregator.lease.until.value)
        aggregator.deregister("a")
        aggregator.deregister("b")
        seen.append(aggregator.lease.until.value)
    assert seen == [before] * 3
    assert aggregator.is_healthy() and is_open(aggregator, "g") and not told(aggregator)
    with pytest.raises(ZeroDivisionError), aggregator.at_once():
        aggregator.set_resource("new", False, "down")
        raise ZeroDivisionError
    assert not aggregator.is_healthy(), "whatever happened within"


def test_a_route_of_any_name() -> None:
    """None is taken for what the aggregator keeps beside the resources."""
    names = ("/start", "/recorder", "/monitor")
    aggregator, _ = make(gates_with([], dict.fromkeys(names, ())))
    aggregator.register("a")
    assert not aggregator.is_healthy()
    aggregator.start()
    assert not aggregator.is_healthy()
    aggregator.set_resource("a", True)
    aggregator.beat("recorder")
    assert aggregator.is_healthy() and all(is_open(aggregator, name) for name in names)


def test_nothing_opens_before_the_first_results() -> None:
    """Nor is anything told of it; a route that needs nothing is open all the time."""
    aggregator, _ = make(gates_with([{"name": "g", "members": ["a", "b"], "healthy": "any"}], {"/r": ["c"], "/s": []}))
    for name in "abcd":
        aggregator.register(name)
    for name in "ac":
        aggregator.set_resource(name, True)
    aggregator.start()
    assert not told(aggregator)
    assert [is_open(aggregator, name) for name in ("", "/r", "/s", "g")] == [False, False, True, True]
    aggregator.set_resource("b", False, "gone")
    assert not is_open(aggregator)
    aggregator.set_resource("d", True)
    assert told(aggregator) == [("", True, ""), ("/r", True, ""), ("/s", True, ""), ("g", True, "")]


def test_many_bad_first_results_cost_a_report_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would go through all members of its group with every report of anybody, under the lock of all: a
    fleet of 3,000 with a wrong password took a second a report, and the leases of those that were well ran out."""
    fleet = [f"new{number}" for number in range(400)]
    aggregator, clock = make(gates_with([]))
    aggregator.register("old")
    aggregator.start()
    aggregator.set_resource("old", True, ttl=50)
    aggregator.arrange(gates_with([{"name": "g", "members": fleet, "healthy": "any"}]), {})
    for name in fleet:
        aggregator.register(name)
    looked, is_pending = [0], GroupTree._is_pending

    def count(tree: GroupTree, name: str, pending: Collection[str]) -> bool:
        looked[0] += 1
        return is_pending(tree, name, pending)

    monkeypatch.setattr(GroupTree, "_is_pending", count)
    for number, name in enumerate(fleet[:-1]):
        aggregator.set_resource(name, False, "auth")
        aggregator.set_resource("old", True, ttl=50)
        assert aggregator.is_healthy(), number
    assert looked[0] < 5 * len(fleet) ** 2  # twice, each time the members, is enough
    clock.now += 1
    aggregator.set_resource(fleet[-1], False, "auth")
    assert not aggregator.is_healthy()


@pytest.mark.parametrize("look", [
    lambda aggregator: {group.name: group.why for group in aggregator.groups()},
    lambda aggregator: {name: why for name, why in closed_groups(aggregator, "").items() if name},
])  # fmt: skip
def test_who_looks_at_all_groups_holds_up_no_report(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10,000 resources in 400 groups of 10,000 that took seconds, under the lock of all."""
    aggregator, _ = make(gates_with([{"name": "g", "members": ["a", "b"]}, {"name": "h", "members": ["g", "c"]}]))
    for name in "abc":
        aggregator.set_resource(name, name != "b", "on fire")
    counted = GroupTree.counted

    def report(tree: GroupTree, name: str) -> dict[str, Any]:
        assert not aggregator._lock.locked()
        aggregator.set_resource("b", True)
        return counted(tree, name)

    monkeypatch.setattr(GroupTree, "counted", report)
    assert look(aggregator) == {"g": "b: on fire", "h": "g: b: on fire"}, "as it was then"
    assert look(aggregator) in ({"g": "", "h": ""}, {})


def test_who_is_not_asked_blocks_only_what_it_counts_for() -> None:
    gates = gates_with([{"name": "g", "members": ["a", "p"], "healthy": "any"}], {"/r": ["q"], "/s": []})
    aggregator, _ = make(gates)
    for name in "apq":
        aggregator.register(name, asked=name == "a")
    aggregator.start()
    assert not is_open(aggregator)
    aggregator.set_resource("a", True)
    assert [is_open(aggregator, name) for name in ("", "g", "/r", "/s")] == [True, True, False, True]
    assert {group.name: group.why for group in aggregator.groups()}["/r"] == "no result of q"
    aggregator.set_resource("q", True)
    assert is_open(aggregator, "/r")


def test_routes() -> None:
    """What a route names counts for it and not for the site; the site counts for it, too."""
    aggregator, _ = make(gates_with([{"name": "g", "members": ["a"]}], {"/g": ["g"], "/b": ["b"], "/s": []}))
    for name in "abcd":
        aggregator.register(name)
    aggregator.start()

    def report(**states: bool) -> list[str]:
        for name, healthy in states.items():
            aggregator.set_resource(name, healthy, f"{name} is bad")
        return [name for name in ("", "/g", "/b", "/s", "g") if is_open(aggregator, name)]

    everything = ["", "/g", "/b", "/s", "g"]
    assert report(a=True, b=True, c=True, d=True) == everything
    assert report(b=False) == ["", "/g", "/s", "g"]
    assert report(b=True, a=False) == ["", "/b", "/s"]
    assert report(b=False, d=False) == ["/s"]
    why = {group.name: group.why for group in aggregator.groups()}
    assert why["g"] == "a: a is bad" and not why["/s"]
    assert why["/b"] in ("b: b is bad and 1 more", "the whole site: d: d is bad and 1 more")
    assert {group.name: (group.needed, [*group.members]) for group in aggregator.groups()} == {
        "g": (1, ["a"]), "/g": (1, ["g"]), "/b": (1, ["b"]), "/s": (0, [])}  # fmt: skip
    assert report(a=True, b=True, d=True) == everything


def test_what_the_workers_cannot_know_waits() -> None:
    """A route that was added counts as if it were not there; one that is gone is like the site; a group is closed."""
    before = gates_with([{"name": "old", "members": ["a"]}], {"/old": ["b"], "/s": []})
    aggregator, _ = make(before)
    begin(aggregator, "abc")
    assert all(is_open(aggregator, name) for name in ("", "old", "/old", "/s"))
    aggregator.arrange(gates_with([{"name": "new", "members": ["b"]}], {"/new": ["c"], "/free": []}), {})
    assert [is_open(aggregator, name) for name in ("", "old", "/old", "/s")] == [True, False, True, True]
    aggregator.set_resource("c", False, "down")
    assert not any(is_open(aggregator, name) for name in ("", "/old", "/s"))
    aggregator.set_resource("c", True)
    aggregator.set_resource("b", False, "down")
    assert not is_open(aggregator), "through the new group"
    aggregator.arrange(before, {})
    assert [is_open(aggregator, name) for name in ("", "old", "/old", "/s")] == [True, True, False, True]


def test_what_is_new_for_a_route_that_waits_closes_nothing() -> None:
    """A trial, as README recommends it, closed the whole site until the restart that it demands."""
    before = gates_with([], {"/old": ["b"]})
    aggregator, _ = make(before)
    begin(aggregator, "ab")
    for after in ({"/old": ["b"], "/try": ["new"]}, {"/old": ["b"], "/try": ["new", "a"]}):
        aggregator.arrange(gates_with([], after), {})
        aggregator.register("new")
        aggregator.set_resource("new", False, "down")
        assert is_open(aggregator) and is_open(aggregator, "/old")
    aggregator.set_resource("a", False, "down")
    assert not is_open(aggregator), "what the site needed before it does still"
    aggregator.set_resource("a", True)
    aggregator.arrange(before, {})
    assert not is_open(aggregator), "in no route it is the site's"


def test_what_counted_for_the_site_does_so_beside_a_new_route() -> None:
    """Behind a group that is new, in maintenance, or with another name: a reload opened a gate that was closed."""
    aggregator, _ = make(gates_with([]))
    begin(aggregator, "abc")
    aggregator.set_resource("a", False, "down")
    groups = [{"name": "g", "members": ["a"]}, {"name": "h", "members": ["b"]}]
    aggregator.arrange(gates_with(groups, {"/try": ["g", "h", "new"]}), {})
    assert not is_open(aggregator)
    aggregator.deregister("a")      # maintenance begins
    assert is_open(aggregator)
    aggregator.arrange(gates_with([], {"/try": ["a", "b", "renamed", "new"]}), {}, {}, {"a", "b", "renamed"})
    for name in ("a", "renamed", "b", "new"):
        aggregator.register(name)
        aggregator.set_resource(name, True)
        aggregator.set_resource(name, False, "down")
        assert is_open(aggregator) is (name == "new"), name
        aggregator.set_resource(name, True)


def test_a_group_that_comes_back_begins_anew() -> None:
    """It had been closed since it was gone, in incidents and uptime."""
    group = gates_with([{"name": "g", "members": ["a"]}])
    aggregator, clock = make(group)
    aggregator.register("a")
    aggregator.start()
    aggregator.set_resource("a", True)
    aggregator.arrange(gates_with([]), {})
    clock.now += 300
    aggregator.set_resource("a", True)
    told(aggregator)
    aggregator.arrange(group, {})
    assert [(name, is_open) for name, is_open, _ in told(aggregator)] == [("g", True)]


def test_a_route_that_is_gone_is_as_what_is_around_it() -> None:
    aggregator, _ = make(gates_with([], {"/a": ["w"], "/a/b": [], "/a/b/c": ["v"], "/static": [], "/static/x": ["v"]}))
    begin(aggregator, "wv")
    aggregator.arrange(gates_with([], {"/a": ["w"], "/static": []}), {})
    aggregator.set_resource("w", False, "down")
    names = ("", "/a", "/a/b", "/a/b/c", "/static", "/static/x")
    assert [is_open(aggregator, name) for name in names] == [True, False, False, False, True, True]


def test_who_watches_holds_every_lease() -> None:
    """A group of which nobody counts, in maintenance for instance, does not stay open for ever."""
    aggregator, clock = make(gates_with([{"name": "g", "members": ["a"]}], {"/s": []}))
    aggregator.start()
    aggregator.beat("recorder", 5)
    assert is_open(aggregator, "g")
    clock.now += 6
    aggregator.note_expiry()
    assert [is_open(aggregator, name) for name in ("", "g", "/s")] == [False, False, True]
    assert {group.name: (group.state, group.why) for group in aggregator.groups()} == {
        "g": ("unhealthy", "no sign of life of recorder"), "/s": ("healthy", "")}  # fmt: skip
    assert ("", False, "no sign of life of recorder") in told(aggregator)
    aggregator.beat("recorder", 5)
    assert all(is_open(aggregator, name) for name in ("", "g", "/s"))


LEAVES, GROUPS, PATHS = "abcde", "uvw", ("/x", "/y")
TREES = st.tuples(
    *(st.tuples(st.sampled_from(("all", "any", "1", "2", "3", "50%", "67%")),
                st.sets(st.sampled_from([*LEAVES, *GROUPS[place + 1:]]), min_size=1)) for place in range(len(GROUPS))),
    *(st.sets(st.sampled_from([*LEAVES, *GROUPS])) for _ in PATHS),
)  # fmt: skip
NAMES = st.lists(st.sampled_from([*LEAVES, *GROUPS]), max_size=3, unique=True)
PARENTS = st.fixed_dictionaries({}, optional=dict.fromkeys(LEAVES, NAMES))
STEPS = st.lists(st.tuples(st.sampled_from(("up", "up", "down", "leave", "join", "aside", "wait", "beat", "arrange")),
                           st.sampled_from(LEAVES), st.integers(1, 20)), max_size=40)  # fmt: skip


class Model:
    """Who counts and how, and what follows, computed from scratch each time."""

    def __init__(self, gates: Gates, parents: Mapping[str, Sequence[str]]) -> None:
        resources = [ResourceSettings.model_construct(name=leaf, depends_on=tuple(parents.get(leaf, ())), tags=[])
                     for leaf in LEAVES]  # fmt: skip
        self.gates, self.real = gates, make(gates)
        self.parents = usable_parents(gates, resources)
        self.counted: dict[str, float] = dict.fromkeys(LEAVES, 0.0)  # until when each is healthy
        self.openings: dict[str, float] = {}  # when each that is not can be healthy, by its last result
        self.unknown = set(LEAVES)  # without a result
        self.asides: set[str] = set()
        self.pending, self.beats = set(LEAVES), math.inf
        self.fresh, self.early = set[str](), set[str]()  # without a result since they joined; with one that waits
        self.arrange("", 0)
        for name in LEAVES:
            self.real[0].register(name)
        self.real[0].start()

    def report(self, leaf: str, until: float) -> None:
        waits = until == 0.0 and not self.counted.keys() & {leaf} and leaf not in self.early
        self.fresh.discard(leaf)
        self.early.discard(leaf)
        if waits and leaf not in self.asides and self.is_awaited(leaf):
            self.early.add(leaf)
        else:
            self.counted[leaf] = until
        self.pending.discard(leaf)
        self.unknown.discard(leaf)
        self.look_again()

    def look_again(self) -> None:
        for leaf in sorted(self.early):
            if not self.is_awaited(leaf):
                self.early.discard(leaf)
                self.counted[leaf] = 0.0

    def is_awaited(self, bad: str) -> bool:
        """Whether in all that it is in, or above, there are some who have no result yet and could make up for it."""
        if any(bad in (route.needs or ()) for route in self.gates.routes.values()):
            return False
        groups = [group for group in self.gates.groups if bad in group.members]
        for group in groups:
            others = {name for name in group.members if name != bad and self.counts(name)}
            good = sum(self.is_healthy(name, self.real[1].now) for name in others)
            fresh = sum(self.is_fresh(name) for name in {*group.members} - {bad})
            possible = fresh and good + fresh >= quorum_of(group.healthy, len(others) + fresh + 1)
            if not possible and not self.is_awaited(group.name):
                return False
        return bool(groups)

    def is_fresh(self, name: str) -> bool:
        """Without any result, which is to come: of a group, when nobody in it counts yet."""
        groups = {group.name: group.members for group in self.gates.groups}
        return name in self.fresh if name not in groups else (
            not self.counts(name) and any(map(self.is_fresh, groups[name])))

    def up(self, leaf: str, seconds: int) -> None:
        self.openings[leaf] = 0.0
        self.real[0].set_resource(leaf, True, ttl=seconds)
        self.report(leaf, self.real[1].now + seconds)

    def down(self, leaf: str, seconds: int) -> None:
        self.openings[leaf] = self.real[1].now + seconds
        self.real[0].set_resource(leaf, False, "bad", opens=seconds)
        self.report(leaf, 0.0)

    def leave(self, leaf: str, _: int) -> None:
        self.real[0].deregister(leaf)
        self.counted.pop(leaf, None)
        for names in (self.pending, self.unknown, self.asides, self.fresh, self.early):
            names.discard(leaf)
        self.look_again()

    def join(self, leaf: str, _: int) -> None:
        self.real[0].register(leaf)
        self.asides.discard(leaf)
        if self.pending:
            self.unknown |= {leaf} - self.counted.keys()
            self.counted.setdefault(leaf, 0.0)
            self.pending.add(leaf)
        elif leaf not in self.counted:
            self.fresh.add(leaf)

    def aside(self, leaf: str, _: int) -> None:
        self.real[0].register(leaf, critical=False)
        if leaf not in self.asides:
            self.pending.discard(leaf)
            self.fresh.discard(leaf)
            self.asides.add(leaf)
            if leaf in self.unknown:
                self.counted.pop(leaf, None)
                self.unknown.discard(leaf)

    def wait(self, _: str, seconds: int) -> None:
        """While some have no result yet, what has expired is only bad for those behind it once that is noted."""
        self.real[1].now += seconds
        for leaf, until in self.counted.copy().items() if self.unknown else ():
            if 0.0 < until <= self.real[1].now:
                self.down(leaf, 0)

    def arrange(self, _: str, __: int) -> None:
        self.real[0].arrange(self.gates, {}, self.parents)

    def beat(self, _: str, seconds: int) -> None:
        self.real[0].beat("recorder", seconds)
        self.beats = self.real[1].now + seconds

    def state(self, name: str, now: float) -> bool | None:
        """None: it does not count, or it has no result that could decide."""
        if name not in self.counted or name in self.unknown:
            return None
        return self.counted[name] > now and not any(self.is_bad(parent, now) for parent in self.parents.get(name, ()))

    def is_bad(self, name: str, now: float) -> bool:
        """Whether it is unhealthy whatever those without a result will say."""
        if name not in GROUPS:
            return self.state(name, now) is False
        group = next(each for each in self.gates.groups if each.name == name)
        members = [member for member in group.members if self.counts(member)]
        return sum(not self.is_bad(each, now) for each in members) < quorum_of(group.healthy, len(members))

    def counts(self, name: str) -> bool:
        """Whether it counts, or in a group anybody does."""
        groups = {group.name: group.members for group in self.gates.groups}
        return any(map(self.counts, groups[name])) if name in groups else name in self.counted.keys() - self.asides

    def is_healthy(self, name: str, now: float) -> bool:
        groups = {group.name: group for group in self.gates.groups}
        if name in groups:
            members = [member for member in groups[name].members if self.counts(member)]
            good = sum(self.is_healthy(member, now) for member in members)
            return good >= quorum_of(groups[name].healthy, len(members))
        if name in [*LEAVES]:
            return self.state(name, now) is True
        if name:
            stated = self.gates.routes[name].needs
            needs = [need for need in stated or () if self.counts(need)]
            return stated == () or all(self.is_healthy(need, now) for need in ("", *needs))
        inside = {member for members in self.gates.members({}).values() for member in members}
        tops = [top for top in (*groups, *LEAVES) if top not in inside and self.counts(top)]
        return not self.pending and all(self.is_healthy(top, now) for top in tops)

    def opens(self, name: str) -> float:
        """When it can be healthy, the soonest; 0 where nothing keeps it from that, or there is no result yet."""
        groups = {group.name: group for group in self.gates.groups}
        if name in groups:
            members = [member for member in groups[name].members if self.counts(member)]
            needed = quorum_of(groups[name].healthy, len(members))
            return min((max(map(self.opens, some)) for some in itertools.combinations(members, needed) if some),
                       default=0.0)  # fmt: skip
        if name in self.unknown:
            return 0.0
        if name in [*LEAVES]:
            parents = (parent for parent in self.parents.get(name, ()) if parent in self.counted or (
                parent in groups and self.counts(parent)))
            return max([self.openings[name], *map(self.opens, parents)])
        if name:
            stated = self.gates.routes[name].needs
            needs = [need for need in stated or () if self.counts(need)]
            return 0.0 if stated == () else max(map(self.opens, ("", *needs)))
        inside = {member for members in self.gates.members({}).values() for member in members}
        tops = [top for top in (*groups, *LEAVES) if top not in inside and self.counts(top)]
        return max(map(self.opens, tops), default=0.0)

    def is_open(self, name: str, now: float) -> bool:
        needs_nothing = name.startswith("/") and self.gates.routes[name].needs == ()
        return needs_nothing or (self.beats > now and self.is_healthy(name, now))


@example((("all", {"a"}), ("all", {"a"}), ("any", {*LEAVES}), set(), set()), {"a": ["d"]},
         [("up", "a", 1), ("leave", "d", 1), ("down", "d", 1)])  # nothing is decided: no bad result waits for others
@given(TREES, PARENTS, STEPS)
def test_any_tree_at_any_moment(tree: tuple[Any, ...], parents: Mapping[str, Sequence[str]],
                                steps: list[tuple[str, str, int]]) -> None:  # fmt: skip
    """As brute force says, and so when each can open again; and one more healthy member never closes anything."""
    shapes, needs = tree[: len(GROUPS)], tree[len(GROUPS) :]
    groups = [
        {"name": name, "healthy": quorum, "members": sorted(members)}
        for name, (quorum, members) in zip(GROUPS, shapes, strict=True)
    ]
    model = Model(gates_with(groups, dict(zip(PATHS, map(sorted, needs), strict=True))), parents)
    aggregator, names = model.real[0], ("", *GROUPS, *PATHS)
    for what, leaf, seconds in steps:
        before = {name for name in names if is_open(aggregator, name)}
        getattr(model, what)(leaf, seconds)
        now, after = model.real[1].now, {name for name in names if is_open(aggregator, name)}
        assert after == {name for name in names if model.is_open(name, now)}
        assert what != "up" or not model.state(leaf, now) or before <= after
        for name in names:
            until = (aggregator.lease.parts[name] if name else aggregator.lease).until.value
            for moment in {now, *model.counted.values(), model.beats} - {0.0, math.inf}:
                for later in (moment, moment + 0.5) if not model.unknown else ():
                    assert later < now or (later < until) == model.is_open(name, later), (name, later)
            assert (aggregator.lease.parts[name] if name else aggregator.lease).opens.value == model.opens(name), name
        assert {group.name for group in aggregator.groups() if group.state != "unhealthy"} == after - {""}
        behind = {leaf for leaf in LEAVES if any(model.is_bad(parent, now) for parent in model.parents.get(leaf, ()))}
        assert {leaf for leaf in LEAVES if aggregator.blocker(leaf)} == behind


# --- the gate ---
def gate_of(*open_parts: str, parts: Sequence[str]) -> Gate:
    lease = Lease(parts)
    for name in open_parts:
        (lease.parts[name] if name else lease).until.value = math.inf
    return Gate(lambda environ, start_response: [], lease, Clock())


# routes, those that are open besides, and by path whether the gate is
PATH_TABLE = {
    "/reports": False, "/reports/": False, "/reports/q3": False, "/reports/deep/below": True, "/reportsx": True,
    "/Reports": True, "/": True, "/other": True, "//reports": False, "/./reports": False, "/x/../reports": False,
    "/%72eports": False, "/reports/deep": True, "/reports/deeper": False, "/reports//deep": False,
    "/reports/deep/../q3": False, "/reports/deep/%2e%2e/q3": False, "\\reports": False, "/x\\..\\reports": False,
    "/gr\xc3\xb6\xc3\x9fe": False, "/gr\xc3\xb6\xc3\x9fe/a": False, "": True, "*": True, "/x//../reports": False,
    "/x/../reports/%2e%2e/": False, "/reports;x=1/q3": False, "/reports;/q": False, "/x/..;/reports": False,
    "/.well-known/x": True, "/x;jsessionid=1": True, "/x//y": True, "/..": False, "/x/.": False,
    "/sale/50%-off": True, "/100%": True, "/%2572eports": False, "/%252572eports": False, "/%252561": False,
    "/reports%2fdeep": True, "/x%5creports": False, "/x;%2freports": True, "/reports;%2fdeep": False,
    "/a%20b%3fc": True, "/%2freports": False,
    "/reports/deep/50%": True, "/reports/deep%2f%2e%2e": False, "/%u0072eports": False, "/gr%c3%b6%c3%9fe": False,
    "/%ff%": True,
}  # fmt: skip


@pytest.mark.parametrize(("path", "admitted"), PATH_TABLE.items())
def test_longest_route(path: str, admitted: bool) -> None:
    """And where a path can be read in two ways, the strictest that it could lead to."""
    gate = gate_of("", "/reports/deep", parts=["/reports", "/reports/deep", "/größe"])
    assert (gate.route(path)[0] == gate.admit) is admitted


@pytest.mark.parametrize(("path", "admitted"), {
    "/static": True, "/static/a.css": True, "/static/../x": False, "/static/%2e%2e/x": False, "/static/..%2fx": False,
    "/static//a.css": True, "/static/./a.css": False, "/x/../static": False, "/static/100%": True, "/": False,
    "/static/.hidden": True, "/static;v=1/a.css": False, "/static/a.css;v=1": True, "//static/a": False,
}.items())  # fmt: skip
def test_what_needs_nothing_while_the_site_is_closed(path: str, admitted: bool) -> None:
    gate = gate_of("/static", parts=["/static"])
    assert (gate.route(path)[0] == gate.admit) is admitted


def ask(gate: Gate, path: str) -> tuple[str, dict[str, str]]:
    found: list[Any] = []
    environ = {"PATH_INFO": path, "REQUEST_METHOD": "GET"}
    gate(environ, lambda status, headers, exc_info=None: found.extend((status, headers)) or (lambda data: None))
    return found[0].split()[0], dict(found[1])


def test_a_load_balancer_asks_for_one_group_or_route() -> None:
    gate = gate_of("g", "/r/s", parts=["g", "h", "/r/s", "/größe"])
    for path, status in {
        "/-/readyz/g": "200", "/-/readyz/h": "503", "/-/readyz/r/s": "200", "/-/readyz": "503", "/-/gate/g": "204",
        "/-/gate/h": "403", "/-/gate/r/s": "204", "/-/gate/r": "404", "/-/gate/": "404", "/-/readyz/x": "404",
        "/-/readyz//r/s": "200", "/-/gate/gr\xc3\xb6\xc3\x9fe": "403", "/-/gate/\xff": "404", "/-/livez/g": "404",
    }.items():  # fmt: skip
        assert ask(gate, path)[0] == status, path
    gate.draining = True
    assert ask(gate, "/-/readyz/g")[0] == "503"


def test_retry_after_is_that_of_the_route() -> None:
    gate = gate_of(parts=["/r"])
    gate._lease.opens.value, gate._lease.parts["/r"].opens.value = 1007, 1042
    assert ask(gate, "/x")[1]["Retry-After"] == "7"
    assert ask(gate, "/r/x")[1]["Retry-After"] == "42"


def test_the_application_asks_for_a_group(tmp_path: Path) -> None:
    gate = gate_of("", "g", parts=["g", "/r"])
    assert gate.is_healthy() and gate.is_healthy("g") and not gate.is_healthy("/r")
    with pytest.raises(LookupError):
        gate.is_healthy("unknown")


# --- the service ---
def test_a_resource_cannot_have_the_name_of_a_group(tmp_path: Path) -> None:
    groups = "groups: [{name: g, tags: [db], healthy: any}]\nroutes: {/r: [g, web1]}\n"
    with local_console(tmp_path, ROWS + groups) as local:
        local.log_in()
        reply = local.api("POST", "resources", {"name": "g", "platform": "simulated"})
        assert (reply.status, reply.json["errors"]) == (409, [{"field": "name", "message": "is taken"}])


ASKING = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [repr(environ["healthchecker.is_healthy"]("/reports")).encode()]
"""


@contextlib.contextmanager
def three_hosts(folder: Path) -> Iterator[tuple[list[Any], str]]:
    """Three sshd, each a host of its own, and their resources."""
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(open_sshd()) for _ in range(3)]
        (folder / "known_hosts").write_text("".join(host.known_hosts() for host in hosts), encoding="ascii")
        yield hosts, "".join(
            f"  - {{name: db{number}, platform: linux, hostname: {host.address}, port: {host.port}, tags: [db],"
            f" username: {host.username}, key_file: '{host.user_key()}', interval: 1, retry_interval: 1, fall: 1,"
            f" rise: 1, timeout: 10}}\n" for number, host in enumerate(hosts))  # fmt: skip


@POSIX
def test_two_of_three_hosts_carry_the_site(tmp_path: Path) -> None:
    """One of them dies and the site goes on; a second one that fails closes it; routes and groups go their own way.
    What was killed counts again when it is back."""
    with three_hosts(tmp_path) as (hosts, rows), tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o755)  # the accounts of the hosts look into it
        down = {name: Path(shared) / f"{name}.down" for name in ("db1", "warehouse")}
        check = "checks: [{{name: up, command: 'test ! -e {}'}}], interval: 1, retry_interval: 1, fall: 1, rise: 1}}\n"
        first, second, third = rows.splitlines(keepends=True)
        second = second.replace("interval: 1, retry_interval: 1, fall: 1, rise: 1, timeout: 10}\n",
                                "timeout: 10, " + check.format(down["db1"]))  # fmt: skip
        rows = first + second + third + "  - {name: warehouse, platform: local, " + check.format(down["warehouse"])
        rows += (
            "groups: [{name: replicas, tags: [db], healthy: 2, warn: all}]\n"
            "routes: {/reports: [warehouse], /static: []}\n"
        )
        (tmp_path / "asking.py").write_text(ASKING, encoding="utf-8")
        with console(tmp_path, rows, "  known_hosts: known_hosts\n  app: asking:app\n") as (service, client):
            everything = ("/", "/reports/q3", "/static/a.css", "/-/readyz/replicas", "/-/readyz/reports")

            def wait_open(*paths: str) -> None:
                for path in everything:
                    service.wait_status(path, 200 if path in paths else 503)

            def group(name: str) -> dict[str, Any]:
                return next(group for group in client.api("GET", "groups").json if group["name"] == name)

            wait_open(*everything)
            down["warehouse"].touch()
            wait_open("/", "/static/a.css", "/-/readyz/replicas")
            assert group("/reports")["why"].startswith("warehouse: check up: exit status 1")
            hosts[2].kill()
            wait_for(lambda: group("replicas")["state"] == "degraded", 60)
            assert group("replicas")["members"] == {"db0": True, "db1": True, "db2": False}
            answer = service.get("/")
            assert (answer.status, answer.body) == (200, "False"), "the application knows that its reports will fail"
            down["db1"].touch()
            wait_open("/static/a.css")
            line = service.wait_line("gate: open -> closed")
            assert "(replicas: 1 of 3 healthy: db" in line
            page = client.ask("GET", "/-/").body
            assert "replicas" in page and "1 of 3" in page
            check = client.ask("GET", "/-/health").json["checks"]["replicas:state"][0]
            assert check["status"] == "fail" and check["output"].startswith("1 of 3 healthy: db")
            down["db1"].unlink()
            wait_open("/", "/static/a.css", "/-/readyz/replicas")
            down["warehouse"].unlink()
            wait_open(*everything)
            assert group("replicas")["members"] == {"db0": True, "db1": True, "db2": False}
            hosts[2].revive()
            wait_for(lambda: group("replicas")["state"] == "healthy", 60)
            down["db1"].touch()
            wait_for(lambda: group("replicas")["members"] == {"db0": True, "db1": False, "db2": True}, 60)
            assert service.get("/").status == 200
            assert service.get("/-/readyz/unknown").status == 404

            def events(kind: str) -> list[str]:
                return [event["text"] for event in client.api("GET", f"events?kind={kind}").json]

            wait_for(lambda: events("gate")[0].startswith("closed -> open after "))  # written within a second
            assert {"replicas", "/reports", "/static"} <= {text.split(":")[0] for text in events("group")}


@pytest.mark.long
@pytest.mark.windows
def test_groups_follow_a_reload(tmp_path: Path) -> None:
    """How many are needed, and of whom, at once; a new route with the next start, and that is said."""
    calm = "platform: simulated, mean_healthy: 1000000, interval: 1"
    rows = f"  - {{name: a, {calm}}}\n  - {{name: b, {calm}, tags: [t]}}\n"
    bad = f"  - {{name: c, {calm.replace('1000000', '0.000001')}, mean_unhealthy: 1000000, fall: 1, tags: [t]}}\n"
    groups = "groups: [{{name: g, tags: [t], healthy: {}}}]\n"
    inventory = write_inventory(tmp_path, rows + groups.format("all"))
    with Service(inventory) as service:
        service.wait_status("/", 200)
        assert service.wait_line("group: g: ").endswith("group: g: open\n"), "its first state is no change"
        write_inventory(tmp_path, rows + bad + groups.format("all"))
        assert run(inventory, "reload").returncode == 0
        service.wait_line("group: g: open -> closed")
        service.wait_status("/", 503)
        write_inventory(tmp_path, rows + bad + groups.format("any") + "routes: {/r: [b], /s: []}\n")
        done = run(inventory, "reload")
        assert "the names of groups and routes changed: that needs a restart" in done.stdout
        assert "changed: groups and routes" in done.stdout
        service.wait_status("/", 200)
        assert service.get("/-/gate/g").status == 204
        assert service.get("/-/gate/s").status == 404
        service.wait_line("group: g: closed -> open")
        begin = len(service.output)
        renamed = f"  - {{name: new, was: b, {calm}, tags: [t]}}\n"
        write_inventory(tmp_path, rows.splitlines(keepends=True)[0] + renamed + bad + groups.format("any"))
        done = run(inventory, "reload")
        assert "0 added, 2 changed, 0 removed" in done.stdout, done
        wait_for(lambda: service.get("/-/readyz/g").status == 200)
        write_inventory(tmp_path, rows.splitlines(keepends=True)[0] + renamed + groups.format("all"))
        assert run(inventory, "reload").returncode == 0
        wait_for(lambda: service.get("/-/readyz/g").status == 200)
        assert "open ->" not in service.output[begin:], "who is renamed or removed is not missed for a moment"


def test_maintenance_and_tags_while_serving(tmp_path: Path) -> None:
    """Who is in maintenance does not count, not for how many are there either; tags that change change the members."""
    calm = "platform: simulated, mean_healthy: 1000000, interval: 1"
    bad = calm.replace("1000000", "0.000001") + ", mean_unhealthy: 1000000, fall: 1"
    rows = f"  - {{name: a, {calm}, tags: [t]}}\n  - {{name: b, {bad}, tags: [t]}}\n"
    with console(tmp_path, rows + "groups: [{name: g, tags: [t], healthy: any}]\n") as (service, client):
        client.log_in()
        service.wait_status("/", 200)
        until = (datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)).isoformat()
        begin = client.api("POST", "resources/a/maintenance", {"until": until, "reason": "patches"})
        assert begin.status == 200
        service.wait_status("/", 503)
        assert client.api("GET", "groups").json[0]["members"] == {"b": False}
        added = {"name": "c", "platform": "simulated", "mean_healthy": 1_000_000, "interval": 1, "tags": ["t"]}
        assert client.api("POST", "resources", added).status == 201
        service.wait_status("/", 200)
        assert client.api("PATCH", "resources/c", {"tags": ["other"]}).status == 200
        service.wait_status("/", 503)
        assert client.api("DELETE", "resources/a/maintenance").status == 204
        service.wait_status("/", 200)
        assert client.api("GET", "groups").json[0]["members"] == {"a": True, "b": False}


def test_metrics_and_the_page(tmp_path: Path) -> None:
    """How groups stand; and since when the gate is open is not since when a group is."""
    calm = "platform: simulated, mean_healthy: 1000000, interval: 1"
    rows = f"  - {{name: a, {calm}}}\n  - {{name: b, {calm.replace('1000000', '0.000001')}, mean_unhealthy: 1e6}}\n"
    groups = "groups: [{name: g, members: [a, b], healthy: any, warn: all}, {name: h, members: [b]}]\n"
    with local_console(tmp_path, rows + groups) as local:
        local.log_in()
        wait_for(lambda: [group["state"] for group in local.api("GET", "groups").json] == ["degraded", "unhealthy"])
        wait_for(lambda: local.api("GET", "events?kind=group").json)
        page = local.ask("GET", "/-/").body
        assert "1 of 2" in page and "check simulation" in page
        assert "no result yet" not in page
        context = local.context
        serving = ServingMetrics(context.lease, Counters(1))
        metrics = Metrics(serving, context.store, None, context.connections, context.monitor)
        text = generate_latest(cast(Any, metrics)).decode()
        assert 'healthchecker_group_healthy{group="g"} 1.0' in text
        assert 'healthchecker_group_healthy{group="h"} 0.0' in text
        assert 'healthchecker_group_healthy_members{group="g"} 1.0' in text
