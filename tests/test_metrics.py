"""/-/metrics: the counters in shared memory, the text, who sees what; and a real service that counts what it does."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import wait_for
from console import local_console
from postgres import refusing
from prometheus_client.parser import text_string_to_metric_families
from service import Service, fresh_processes, prepared_keys, run_cheaply, store_in, write_inventory
from test_transport import access

import healthchecker
from healthchecker import (
    ACCEPTED,
    LABELS,
    LATENCIES,
    METRICS_AGE,
    OUTCOMES,
    QUEUED,
    RESOURCE_METRICS,
    ROW,
    ROWS,
    ApiError,
    Counters,
    Lease,
    Limits,
    LoginRecord,
    Maintenance,
    Metrics,
    RequestCounters,
    Resource,
    ServingMetrics,
    Status,
    Store,
    UsageError,
    build_console,
    read_token,
)

TOKEN = "0123456789abcdef-not-a-secret"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
Series = dict[tuple[str, ...], float]  # name, then label values in the order of their names


def series(text: str) -> Series:
    """Every sample of a text; none may come twice, and each belongs to a family with a help text."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type != "unknown", family
        for sample in family.samples:
            key = (sample.name, *(value for _, value in sorted(sample.labels.items())))
            assert key not in found, key
            found[key] = sample.value
    return found


def count(cells: list[float], outcome: str) -> list[int]:
    """How many requests had each latency."""
    return [int(cell) for cell in cells[ROWS[outcome] : ROWS[outcome] + ROW - 1]]


# === Counters ================================================================


# seconds that a request took, the bound under which it is counted
@pytest.mark.parametrize(
    ("seconds", "bound"), [(0.0, 0.001), (0.001, 0.001), (0.0011, 0.0025), (9.99, 10.0), (10.0, 10.0), (11.0, None)]
)
def test_latency_is_counted_at_the_bound_above_it(seconds: float, bound: float | None) -> None:
    counters = Counters(1)
    RequestCounters(counters, 0).request("2xx", seconds)
    where = count(counters.totals(), "2xx").index(1)
    assert ([*LATENCIES, None][where]) == bound
    assert sum(counters.totals()) == 1 + seconds


def test_slots_are_summed() -> None:
    counters = Counters(3)
    for slot in range(3):
        tally = RequestCounters(counters, slot)
        for outcome in OUTCOMES:
            tally.request(outcome, 0.002)
        tally.accepted()
        tally.hold(slot)
        tally.turn(10)
    assert [*counters.held] == [0, 1, 2]
    totals = counters.totals()
    assert all(count(totals, outcome) == [0, 3, *[0] * (len(LATENCIES) - 1)] for outcome in OUTCOMES)
    assert totals[ACCEPTED] == 3.0 and totals[QUEUED] == 30.0
    counters.vacate(1)
    assert [*counters.held] == [0, -1, 2]
    assert counters.totals() == [*totals[:QUEUED], 20.0, *totals[QUEUED + 1 :]], "what was counted stays"


def test_threads_of_a_pool_lose_nothing() -> None:
    counters = Counters(1)
    tally = RequestCounters(counters, 0)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a switch between any two steps
    try:
        together = threading.Barrier(8, timeout=30)

        def work() -> None:
            together.wait()
            for _ in range(20_000):
                tally.request("2xx", 0.5)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(before)
    assert sum(counters.totals()) == 160_000 * 1.5


def count_and_wait(counters: Counters, slot: int, requests: int, done: Any) -> None:
    """What a worker process does."""
    tally = RequestCounters(counters, slot)
    for _ in range(requests):
        tally.request("2xx", 0.0)
    tally.hold(7)
    done.close()
    threading.Event().wait(60)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX's")
def test_totals_outlive_the_process_that_counted_them() -> None:
    """Two processes with a slot each; one is killed and replaced."""
    context = fresh_processes()
    counters = Counters(2)
    running: list[Any] = []

    def start(slot: int, requests: int) -> Any:
        reading, writing = context.Pipe(duplex=False)
        process = context.Process(target=count_and_wait, args=(counters, slot, requests, writing), daemon=True)
        process.start()
        running.append(process)
        writing.close()
        with closing(reading), contextlib.suppress(EOFError):
            assert reading.poll(120)
            reading.recv()
        return process

    try:
        first = start(0, 300)
        start(1, 20)
        assert (sum(counters.totals()), [*counters.held]) == (320, [7, 7])
        os.kill(first.pid, signal.SIGKILL)
        first.join(10)
        counters.vacate(0)
        assert (sum(counters.totals()), [*counters.held]) == (320, [-1, 7])
        start(0, 1)
        assert (sum(counters.totals()), [*counters.held]) == (321, [7, 7])
    finally:
        for process in running:
            process.kill()
            process.join(10)


# === The text ================================================================


SAMPLE: dict[str, Any] = {
    "details": {"hostname": "secret-host", "os": "Linux", "uptime_seconds": 86400.0, "cpu_count": 4.0},
    "metrics": {"cpu_percent": 1.5, "memory_percent": 20.0, "commit_percent": 30.0,
                "disk_percent /": 40.0, "disk_percent /var/my data": 50.0,
                "load_per_cpu": 0.25},
    "services": {"nginx": {"good": True, "text": "active"}},
    "checks": {"replication": {"good": False, "text": "secret output"}},
    "problems": {"swap_percent": "not known"},
}  # fmt: skip


def test_every_metric_that_may_have_a_limit_is_shown() -> None:
    assert Limits.model_fields.keys() <= RESOURCE_METRICS.keys() & LABELS.keys()


def add(store: Store, name: str, state: str = "", sample: object = None, cause: str = "", until: float = 0.0) -> None:
    """A row, polled at 1000.0 in 0.3 s if it has a state."""
    with store.writing() as session:
        row = Resource(name=name, hostname="h.example.com", platform="linux", port=22, settings="{}")
        session.add(row)
        if until:
            scope = json.dumps({"resources": [name]})
            session.add(Maintenance(state="begun", start_at=0.0, until_at=until, scope=scope, reason="disks"))
        session.flush()
        if state:
            session.add(Status(resource_id=row.id, settings_digest="", credential_digest="", state=state, cause=cause,
                               reason="secret reason", since_at=900.0, polled_at=1000.0, good=1, bad=0, seconds=0.3,
                               sample=json.dumps(sample)))  # fmt: skip


@pytest.fixture
def tmp_path(database_folder: Path) -> Path:
    """What has a folder here runs on both kinds of database."""
    return database_folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(store_in(tmp_path)) as store:
        yield store


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    (tmp_path / "metrics.token").write_text(TOKEN + "\n", encoding="ascii")
    return tmp_path / "metrics.token"


@pytest.fixture
def metrics(store: Store, token_file: Path) -> Metrics:
    return Metrics(ServingMetrics(Lease(), Counters(2), lambda: 100.0), store, token_file, access())


def ask(metrics: Metrics, authorization: str = "") -> str:
    answer = metrics.answer(authorization, operator=True)
    assert (answer.status_code, answer.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return answer.get_data(as_text=True)


def test_every_resource_for_the_bearer(store: Store, metrics: Metrics) -> None:
    add(store, "db1", "healthy", SAMPLE)
    add(store, "db2", "unhealthy", None, "unreachable", until=time.time() + 60)
    add(store, "db3")
    found = series(ask(metrics, BEARER["Authorization"]))
    of = {key[1:]: value for key, value in found.items() if key[0] == "healthchecker_resources"}
    assert of == {("unknown",): 1, ("healthy",): 1, ("degraded",): 0, ("unhealthy",): 1}
    mine = {(key[0].removeprefix("healthchecker_resource_"), *key[1:]): value for key, value in found.items()
            if key[0].startswith("healthchecker_resource_")}  # fmt: skip
    states = {key: value for key, value in mine.items() if key[0] == "state"}
    assert states == {("state", name, state): state == now for name, now in
                      (("db1", "healthy"), ("db2", "unhealthy"), ("db3", "unknown"))
                      for state in ("unknown", "healthy", "degraded", "unhealthy")}  # fmt: skip
    assert {key: value for key, value in mine.items() if key not in states} == {
        ("maintenance", "db1"): 0, ("maintenance", "db2"): 1, ("maintenance", "db3"): 0,
        ("acknowledged", "db1"): 0, ("acknowledged", "db2"): 0, ("acknowledged", "db3"): 0,
        ("cause", "unreachable", "db2"): 1,
        ("poll_duration_seconds", "db1"): 0.3, ("poll_duration_seconds", "db2"): 0.3,
        ("last_poll_timestamp_seconds", "db1"): 1000, ("last_poll_timestamp_seconds", "db2"): 1000,
        ("cpu_percent", "db1"): 1.5, ("memory_percent", "db1"): 20, ("commit_percent", "db1"): 30,
        ("load_per_cpu", "db1"): 0.25,
        ("disk_percent", "/", "db1"): 40, ("disk_percent", "/var/my data", "db1"): 50,
        ("uptime_seconds", "db1"): 86400,
        ("service_good", "db1", "nginx"): 1, ("check_good", "replication", "db1"): 0,
    }, "what was not read is not there, and never zero"  # fmt: skip
    assert not any("secret" in part for key in found for part in key)


def test_states_are_those_that_count_where_they_cannot_be_written(tmp_path: Path, token_file: Path) -> None:
    """Or a full disk would have all be well for hours."""
    row = f"  - {{name: p, platform: push, fall: 1, rise: 1, password: {'a' * 20}}}\n"
    with local_console(tmp_path, row, clock=time.time) as local:
        context = local.context
        metrics = Metrics(ServingMetrics(context.lease, Counters(1)), local.store, token_file, context.connections,
                          context.monitor)  # fmt: skip

        def states() -> dict[str, float]:
            metrics._made = -math.inf
            found = series(ask(metrics, BEARER["Authorization"]))
            return {key[2]: value for key, value in found.items() if key[0] == "healthchecker_resource_state"}

        def push(*, healthy: bool) -> None:
            local.token = "a" * 20
            assert local.api("POST", "push/p", {"healthy": healthy}).status < 300

        push(healthy=True)
        wait_for(lambda: states()["healthy"] == 1)
        with refusing(local.store.database, "UPDATE ON status"):
            push(healthy=False)
            wait_for(lambda: not context.is_healthy)
            assert states()["unhealthy"] == 1


def test_ends_of_api_tokens(store: Store, metrics: Metrics) -> None:
    """Names are for the bearer of the token alone; what has no end is left out."""
    with store.writing() as session:
        session.add(healthchecker.User.create("robot", "x" * 12))
        session.flush()
        for name, expires_at in (("nightly", 2e9), ("ever", healthchecker.NEVER)):
            session.add(healthchecker.LoginSession(token_hash=name, kind="named", user_id=1, begun_at=1, seen_at=0,
                                                   address="", name=name, expires_at=expires_at))
        session.add(healthchecker.LoginSession(token_hash="a", kind="token", user_id=1, begun_at=1, seen_at=1,
                                               address=""))
    found = [each for each in series(ask(metrics, BEARER["Authorization"])).items() if "api_token" in each[0][0]]
    assert found == [(("healthchecker_api_token_expires_timestamp_seconds", "nightly", "robot"), 2e9)]
    assert "robot" not in ask(metrics)


def test_totals_for_anyone(store: Store, metrics: Metrics) -> None:
    add(store, "db1", "healthy", SAMPLE)
    text = ask(metrics)
    assert not [word for word in ("db1", "resource", "example.com", "cpu", "nginx", "secret") if word in text]
    full = series(ask(metrics, BEARER["Authorization"]))
    assert {key: full[key] for key in series(text)} == series(text)
    assert {key[0] for key in full.keys() - series(text)} > {"healthchecker_resources", "healthchecker_resource_state"}


def test_slots_are_summed_once_a_scrape(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """All routes of all slots, at each scrape; for a route or a page its own cell is enough."""
    summed, totals = [], Counters.totals
    monkeypatch.setattr(Counters, "totals", lambda counters: summed.append(1) or totals(counters))
    assert "route_would_refuse" in ask(metrics, BEARER["Authorization"]) and len(summed) == 1


def test_totals_never_fall(store: Store, token_file: Path) -> None:
    """Whichever worker answers: a total that falls is taken for a restart."""
    counters, lease = Counters(2), Lease()
    workers = [Metrics(ServingMetrics(lease, counters), store, token_file, access()) for _ in range(2)]
    key = ("healthchecker_requests_total", "2xx")
    for number in range(6):
        found = {kind: series(ask(workers[number % 2], kind))[key] for kind in ("", BEARER["Authorization"])}
        assert set(found.values()) == {number}
        RequestCounters(counters, number % 2).request("2xx", 0.1)


def test_second_tries_of_what_was_removed_count_on(store: Store, token_file: Path) -> None:
    """Or the total would fall."""
    context = access()
    context.records.update(here=LoginRecord(second_tries=1), removed=LoginRecord(second_tries=2))
    text = ask(Metrics(ServingMetrics(Lease(), Counters(1)), store, token_file, context), BEARER["Authorization"])
    assert series(text)["healthchecker_second_tries_total",] == 3


def test_gate_and_requests(store: Store) -> None:
    lease, counters = Lease(), Counters(2)
    for slot in range(2):
        tally = RequestCounters(counters, slot)
        for seconds in (0.0005, 0.003, 99.0):
            tally.request("2xx", seconds)
        tally.request("shed", 0.0)
        tally.accepted()
    RequestCounters(counters, 1).hold(5)
    RequestCounters(counters, 1).turn(3)
    lease.until.value = 107.5
    serving = ServingMetrics(lease, counters, lambda: 100.0)
    found = series(ask(Metrics(serving, store, None, access())))
    assert found["healthchecker_gate_open",] == 1
    assert found["healthchecker_lease_seconds",] == 7.5
    assert found["healthchecker_workers",] == 1
    assert found["healthchecker_connections",] == 5
    assert found["healthchecker_queue_requests",] == 3
    assert found["healthchecker_connections_accepted_total",] == 2
    requests = {key[1]: value for key, value in found.items() if key[0] == "healthchecker_requests_total"}
    assert requests == {**dict.fromkeys(OUTCOMES, 0), "2xx": 6, "shed": 2}
    name = "healthchecker_request_duration_seconds"
    below = {key[1]: value for key, value in found.items() if key[0] == f"{name}_bucket" and key[2] == "2xx"}
    assert [float(bound) for bound in below] == [*LATENCIES, float("inf")]
    assert [*below.values()] == [2, 2, *[4] * (len(LATENCIES) - 2), 6]
    assert (found[f"{name}_count", "2xx"], found[f"{name}_sum", "2xx"]) == (6, pytest.approx(2 * 99.0035))
    lease.until.value = 100.0  # over since now
    closed = series(ask(Metrics(serving, store, None, access())))
    assert (closed["healthchecker_gate_open",], closed["healthchecker_lease_seconds",]) == (0, 0)


def test_a_gate_behind_which_nobody_answers_is_not_open(store: Store) -> None:
    lease = Lease()
    lease.until.value = 107.5
    serving = ServingMetrics(lease, Counters(1), lambda: 100.0, lambda: "no worker process is ready")
    assert series(ask(Metrics(serving, store, None, access())))["healthchecker_gate_open",] == 0


HOSTILE = 'a"b\\n\\\\c{d="e"}é☃ # 1'


def test_names_are_escaped(store: Store, metrics: Metrics) -> None:
    """In the name of a resource, and in what its host sends."""
    mount = "/x\ny\rz"
    add(store, HOSTILE, "healthy", SAMPLE | {"metrics": {f"disk_percent {mount}": 1.0}, "services": {}, "checks": {
        HOSTILE: {"good": True, "text": ""}}})  # fmt: skip
    text = ask(metrics, BEARER["Authorization"])
    found = series(text)
    assert found["healthchecker_resource_disk_percent", mount, HOSTILE] == 1
    assert found["healthchecker_resource_check_good", HOSTILE, HOSTILE] == 1
    assert all(line.startswith(("# HELP healthchecker_", "# TYPE healthchecker_", "healthchecker_"))
               for line in text.split("\n")[:-1])  # fmt: skip


@pytest.mark.parametrize(
    "part",
    [
        {"details": {"uptime_seconds": "a word", "hostname": 1.0}},
        {"metrics": {"no_such_metric": 1.0, "disk_percent": 1.0, "cpu_percent /": 1.0, "": 1.0, " ": 1.0}},
        {"metrics": {"state": 1.0, "state x": 1.0, "cause y": 1.0}},
        {"details": {"maintenance x": 1.0, "service_good": 1.0}},
    ],
)
def test_odd_samples_spoil_nothing(store: Store, metrics: Metrics, part: dict[str, Any]) -> None:
    """A host may send anything for a detail; the others are still shown."""
    add(store, "odd", "healthy", SAMPLE | {"details": {}, "metrics": {}} | part)
    add(store, "sound", "healthy", SAMPLE)
    found = series(ask(metrics, BEARER["Authorization"]))
    assert found["healthchecker_resource_uptime_seconds", "sound"] == 86400
    odd = {key[0].removeprefix("healthchecker_resource_") for key in found if key[-1] == "odd"}
    assert not [name for name in odd if name.endswith(("_percent", "uptime_seconds", "hostname", "metric"))]


# === Who may see it ==========================================================


# the header, the status that answers it; `full`: with resources
ADMISSION = {
    "nothing": ("", "200"),
    "the token": (f"Bearer {TOKEN}", "full"),
    "spaces around it": (f"Bearer   {TOKEN} ", "full"),
    "another case of Bearer": (f"bEARER {TOKEN}", "full"),
    "another token": ("Bearer 0123456789abcdef", "401"),
    "the token and more": (f"Bearer {TOKEN}0", "401"),
    "another case of the token": (f"Bearer {TOKEN.upper()}", "401"),
    "none": ("Bearer", "401"),
    "an empty one": ("Bearer ", "401"),
    "no ASCII": ("Bearer é\udce9\u2603", "401"),
    "another scheme": (f"Basic {TOKEN}", "200"),
    "no scheme": (TOKEN, "200"),
}


@pytest.mark.parametrize("operator", [True, False])
@pytest.mark.parametrize(("header", "wanted"), ADMISSION.values(), ids=ADMISSION)
def test_admission(store: Store, metrics: Metrics, header: str, wanted: str, operator: bool) -> None:
    """The token from anywhere; without one the totals, for the operators' networks."""
    add(store, "db1", "healthy", SAMPLE)
    if wanted == "200" and not operator:
        with pytest.raises(ApiError) as caught:
            metrics.answer(header, operator=False)
        assert caught.value.status == 403
        return
    answer = metrics.answer(header, operator=operator)
    assert answer.status_code == int(wanted.replace("full", "200"))
    assert ("db1" in answer.get_data(as_text=True)) is (wanted == "full")
    if wanted == "401":
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="metrics"'
        assert TOKEN not in answer.get_data(as_text=True)


@pytest.mark.parametrize("header", ["Bearer ", "Bearer x", f"Bearer {TOKEN}"])
def test_without_a_token_nobody_is_admitted(store: Store, header: str) -> None:
    metrics = Metrics(ServingMetrics(Lease(), Counters(1)), store, None, access())
    assert metrics.answer(header, operator=True).status_code == 401
    assert metrics.answer("", operator=True).status_code == 200


def test_a_new_token_counts_at_once(metrics: Metrics, token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And one that was taken away or spoilt counts no more, which is told once."""

    def status(token: str) -> str:
        return str(metrics.answer(f"Bearer {token}", operator=False).status_code)

    assert (status(TOKEN), status("new")) == ("200", "401")
    token_file.write_bytes(b"\xef\xbb\xbfnew\r\n")
    assert (status(TOKEN), status("new")) == ("401", "200")
    with caplog.at_level(logging.ERROR, "healthchecker"):
        for content in (b"", b"two words"):
            token_file.write_bytes(content)
            assert [status(token) for token in ("new", "", content.decode())] == ["401"] * 3
        assert len(caplog.messages) == 1 and "metrics_token_file" in caplog.messages[0]
        token_file.unlink()
        assert (status("new"), len(caplog.messages)) == ("401", 2)
        token_file.write_text("newer", encoding="ascii")
        assert status("newer") == "200"
        assert not any(word in message for message in caplog.messages for word in ("newer", "two words"))


# what the file holds, None: it is not there; part of the message
UNUSABLE = {
    "not there": (None, "cannot be read: "),
    "empty": (b"", "is empty"),
    "blank": (b" \r\n\t", "is empty"),
    "two words": (b"two words", "not one word"),
    "two lines": (b"two\nwords", "not one word"),
    "UTF-16": ("word".encode("utf-16"), "not one word"),
    "not ASCII": ("wörd".encode(), "not one word"),
    "a control character": (b"wo\x00rd", "not one word"),
    "overlong": (b"x" * 1025, "not one word"),
}


@pytest.mark.parametrize(("content", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_token_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "metrics.token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"metrics_token_file .*metrics.token.*{message}") as caught:
        read_token(path)
    assert "word\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("content", [None, b"\n"], ids=["not there", "empty"])
def test_the_start_tells(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "metrics.token").write_bytes(content)
    path = write_inventory(tmp_path, "", "  metrics_token_file: metrics.token")
    code, output = run_cheaply("--inventory", str(path))
    assert code == 2
    assert "service.metrics_token_file" in output and len(output.splitlines()) == 1, output
    assert not (tmp_path / "healthchecker.db").exists(), "nothing was touched"


# === How often ===============================================================


def test_a_text_is_made_once_a_second(store: Store, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask at once; each kind of reader has its own."""
    monkeypatch.setattr("healthchecker.METRICS_AGE", 600.0)  # the second is not over until the test says so
    add(store, "db1", "healthy", SAMPLE)
    selects: list[str] = []
    sqlalchemy.event.listen(
        store.engine, "before_cursor_execute", lambda conn, cursor, statement, *rest: selects.append(statement)
    )
    bodies: list[str] = []

    def scrape() -> None:
        bodies.append(ask(metrics, BEARER["Authorization"]))

    threads = [threading.Thread(target=scrape) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asked = len([statement for statement in selects if "FROM resource" in statement])
    assert asked == 1
    assert len(bodies) == 20 and len(set(bodies)) == 1
    add(store, "db2", "healthy", SAMPLE)
    assert "db2" not in ask(metrics)
    assert "db2" not in ask(metrics, BEARER["Authorization"])
    monkeypatch.setattr("healthchecker.METRICS_AGE", METRICS_AGE)
    assert wait_for(lambda: "db2" in ask(metrics, BEARER["Authorization"]))


def test_a_database_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Or the series of the gate ended with it, and no alarm could tell that it is closed; how a resource stands is
    known without it. Health says to who is logged in what it says to others."""
    (tmp_path / "metrics.token").write_text(TOKEN, encoding="ascii")
    with local_console(tmp_path, "  - {name: r, platform: simulated, mean_healthy: 1000000}\n") as local:
        metrics = Metrics(ServingMetrics(local.context.lease, Counters(1)), local.store, tmp_path / "metrics.token",
                          access(), local.context.monitor)  # fmt: skip
        local.app = build_console(local.context, metrics)
        wait_for(lambda: local.context.is_healthy)
        assert series(local.ask("GET", "/-/metrics", headers=BEARER).body)["healthchecker_database_up",] == 1
        local.log_in()
        metrics._made = -math.inf
        with local.store.writing() as session:
            session.execute(sqlalchemy.text("DROP TABLE status"))
            session.execute(sqlalchemy.text("DROP TABLE maintenance"))
        found = series(local.ask("GET", "/-/metrics", headers=BEARER).body)
        assert (found["healthchecker_database_up",], found["healthchecker_gate_open",]) == (0, 1)
        assert found["healthchecker_resource_state", "r", "healthy"] == 1
        assert not {key[0] for key in found} & {f"healthchecker_resource_{name}" for name in (
            "maintenance", "acknowledged", "last_poll_timestamp_seconds")}, "what is not known is left out"
        assert re.search("no such table|does not exist", caplog.text)
        assert "database_up" not in local.ask("GET", "/-/metrics").body
        assert (local.ask("GET", "/-/health").status, local.ask("GET", "/-/health").json) == (200, {"status": "pass"})
        local.context.unserved = lambda: "no worker is ready"
        assert local.ask("GET", "/-/health").status == 503


def test_a_database_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """Prometheus gives up after ten seconds, and who asks next may wait behind it."""
    (tmp_path / "metrics.token").write_text(TOKEN, encoding="ascii")
    with local_console(tmp_path) as local:
        metrics = Metrics(ServingMetrics(Lease(), Counters(1)), local.store, tmp_path / "metrics.token", access())
        local.app = build_console(local.context, metrics)
        local.log_in()
        waits, here = list[float](), threading.get_ident()
        sqlalchemy.event.listen(local.store.engine, "before_cursor_execute", lambda *_: waits.extend(
            [healthchecker.PATIENCE.get()] if threading.get_ident() == here else []))
        for headers, path in ((BEARER, "/-/metrics"), ({}, "/-/health")):
            assert local.ask("GET", path, headers=headers).status in (200, 503)
            assert set(waits) == {healthchecker.IMPATIENCE}
            waits.clear()
        assert healthchecker.PATIENCE.get() == healthchecker.ANSWER_TIMEOUT


def test_damaged_sample_spoils_nothing(store: Store, metrics: Metrics) -> None:
    for number, sample in enumerate(["[", "5", "{}", '{"details": 5}']):
        add(store, f"odd{number}", "healthy", SAMPLE)
        with store.writing() as session:
            session.execute(sqlalchemy.text("UPDATE status SET sample = :sample WHERE resource_id = :id"),
                            {"sample": sample, "id": number + 1})  # fmt: skip
    add(store, "sound", "healthy", SAMPLE)
    found = series(ask(metrics, BEARER["Authorization"]))
    assert found["healthchecker_resource_uptime_seconds", "sound"] == 86400
    assert found["healthchecker_resource_state", "odd0", "healthy"] == 1


# === The service =============================================================
APP = """
import logging, threading

logging.getLogger("waitress").disabled = True   # Service takes a traceback for a fault of ours

def app(environ, start_response):
    path = environ["PATH_INFO"]
    environ["healthchecker.outcome"] = "whatever"
    if path == "/boom":
        raise ValueError("boom")
    if path == "/wait":
        threading.Event().wait(0.3)
    status = {"/moved": "302 Found", "/lost": "404 Not Found", "/odd": "odd"}.get(path, "200 OK")
    if path == "/stream":
        start_response(status, [("Content-Type", "text/plain")])
        return (b"x" * 65536 for _ in range(1600))      # 100 MiB
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", "4")])
    if path == "/late":
        def body():
            yield b"la"
            raise ValueError("late")
        return body()
    return [b"done"]
"""
HERE = "  - {name: flag, platform: local, interval: 1, rise: 1, fall: 1, checks: [{name: up, command: test ! -e FLAG}]}"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="platform local's checks here are sh's")


def raw(service: Service, request: bytes) -> bytes:
    with socket.create_connection((service.host, service.port), timeout=60) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            return b"".join(iter(lambda: sock.recv(65536), b""))
    return b""


def scraped(service: Service, headers: dict[str, str] | None = None) -> Series:
    answer = service.get_console("/-/metrics", headers)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.headers["cache-control"] == "no-store"
    return series(answer.body)


def requests_of(found: Series) -> dict[str, int]:
    return {key[1]: int(value) for key, value in found.items() if key[0] == "healthchecker_requests_total" and value}


@pytest.mark.long
@POSIX
@pytest.mark.parametrize("threads", [0, 2], ids=["loop", "pool"])
def test_a_service_counts_what_it_does(tmp_path: Path, threads: int) -> None:
    (tmp_path / "shop.py").write_text(APP, encoding="utf-8")
    (tmp_path / "metrics.token").write_text(TOKEN, encoding="ascii")
    flag = tmp_path / "flag"
    settings = f"  app: shop:app\n  threads: {threads}\n  metrics_token_file: metrics.token"
    prepared_keys(tmp_path)
    inventory = write_inventory(tmp_path, HERE.replace("FLAG", str(flag)), settings)
    with Service(inventory) as service:
        service.wait_status("/-/readyz", 200)
        wait_for(lambda: scraped(service)["healthchecker_gate_open",] == 1)
        before = requests_of(scraped(service))
        assert before.keys() == {"own"}
        statuses = [service.get(path).status for path in ("/", "/a", "/moved", "/lost", "/boom", "/wait")]
        assert statuses == [200, 200, 302, 404, 500, 200]
        assert raw(service, b"GET /late HTTP/1.1\r\nHost: x\r\n\r\n").endswith(b"la")
        raw(service, b"GET /odd HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 400 " in raw(service, b"nonsense\r\n\r\n")
        two = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2
        assert raw(service, two).count(b"200 OK") == 2
        with socket.create_connection((service.host, service.port), timeout=60) as sock:
            sock.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(100)
        wait_for(lambda: requests_of(scraped(service)).get("cut") == 1 + bool(threads))
        flag.touch()
        service.wait_status("/-/gate", 403)
        assert [service.get("/").status for _ in range(3)] == [503] * 3
        wanted = {"3xx": 1, "4xx": 1, "5xx": 2, "bad": 1, "refused": 3}
        # The loop takes an answer whole; from the pool a client that left is noticed.
        wanted |= {"2xx": 5, "cut": 2} if threads else {"2xx": 6, "cut": 1}
        wait_for(lambda: requests_of(scraped(service)).get("refused") == 3)
        found = scraped(service)
        now = requests_of(found)
        assert now.pop("own") > before["own"]
        assert now == wanted
        name = "healthchecker_request_duration_seconds"
        assert found[f"{name}_count", "2xx"] == wanted["2xx"]
        assert found[f"{name}_bucket", "0.25", "2xx"] < wanted["2xx"], "one waited for 0.3 s"
        assert found[f"{name}_sum", "2xx"] >= 0.3
        assert found["healthchecker_connections_accepted_total",] >= 13
        assert (found["healthchecker_gate_open",], found["healthchecker_workers",]) == (0, 1)
        wait_for(lambda: scraped(service)["healthchecker_connections",] == 0)
        # the state is as it counts, what was read as it is written a moment later
        wait_for(lambda: scraped(service, BEARER).get(("healthchecker_resource_check_good", "up", "flag")) == 0)
        full = scraped(service, BEARER)
        assert full["healthchecker_resource_state", "flag", "unhealthy"] == 1
        assert 0 < full["healthchecker_resource_memory_percent", "flag"] < 100
        assert time.time() - full["healthchecker_resource_last_poll_timestamp_seconds", "flag"] < 60
        assert service.get_console("/-/metrics", {"Authorization": "Bearer wrong"}).status == 401
        assert service.get_console("/-/metrics", method="POST").status == 401  # like all that is not there
        head = service.get_console("/-/metrics", method="HEAD")
        assert (head.status, head.body) == (200, "") and int(head.headers["content-length"]) > 1000
