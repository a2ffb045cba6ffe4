"""History, measured: the size of a database at the end of the whole retention, and a month of 1,000 resources.

`rows(short, pages)` gives (figure, measured, wanted, good) for the table of `make bench`; run as a script, it prints
them. `pages` makes calls to be timed of such a database, with the milliseconds that they may take.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import healthchecker as hc

NOW = 1_750_000_000 // hc.QUARTER * hc.QUARTER + 600.0  # Unix time: within a quarter
INTERVAL = 60  # seconds
CHUNK = 100_000  # rows of a transaction
LOOKED_AT = 50  # id of the resource whose history is read
Figure = tuple[str, str, str, bool]


def sample_row(noise: random.Random) -> tuple[object, ...]:
    """All but resource and time."""
    return "", "h", "h", 132, *(noise.randrange(10_000) for _ in hc.METRICS)


def average_row(noise: random.Random) -> tuple[object, ...]:
    known = hc.QUARTER * 10
    return known, known - 3, *(noise.randrange(10_000) for _ in range(3 * len(hc.METRICS)))


def resources(folder: Path, count: int) -> hc.Store:
    """A database with `count` resources that were polled a moment ago."""
    store = hc.Store(folder / "healthchecker.db")
    sample = hc.Sample({"hostname": "db", "os": "Debian GNU/Linux 12"}, {"cpu_percent": 12.5, "memory_percent": 40.0,
                       "disk_percent /": 61.0, "disk_percent /var": 33.0, "load_per_cpu": 0.4}, None, {}, {}, {})
    with store.writing() as session:
        for number in range(1, count + 1):
            settings = hc.ResourceSettings(name=f"db{number}", hostname=f"db{number}.example.com", username="monitor",
                                           tags=["database"], limits={"cpu_percent": {"warn": 80, "fail": 95}})
            row = hc.Resource(id=number, origin="inventory")
            row.take_settings(settings)
            session.add(row)
            session.add(hc.Status(resource_id=number, settings_digest=row.settings_digest, credential_digest="",
                                  state="healthy", cause="", reason="", since_at=NOW - 86_400, polled_at=NOW, good=9,
                                  bad=0, seconds=0.1, sample=sample.to_json(), strip="h" * hc.STRIP))
    return store


def chunks(rows: Iterator[tuple[object, ...]]) -> Iterator[list[tuple[object, ...]]]:
    chunk: list[tuple[object, ...]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    yield chunk


def fill(path: Path, count: int, raw: float, averages: float) -> None:
    """History of `count` resources, in the order in which a service writes it; `raw` and `averages` are days."""
    noise = random.Random(2)
    pool = [average_row(noise) for _ in range(997)], [sample_row(noise) for _ in range(997)]
    last = int(NOW // hc.QUARTER) * hc.QUARTER - hc.QUARTER
    quarters = ((number, at, *pool[0][(at // 900 + number) % 997])
                for at in range(int(last - averages * 86_400) + hc.QUARTER, last + 1, hc.QUARTER)
                for number in range(1, count + 1))
    polls = ((number, at + number / count, *pool[1][(at + number) % 997])
             for at in range(int(NOW - raw * 86_400), int(NOW), INTERVAL) for number in range(1, count + 1))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -500000")  # KiB: every resource has a page that is written to
        for table, rows in ((hc.AVERAGES, quarters), (hc.SAMPLES, polls)):
            statement = f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.columns))})"
            for chunk in chunks(rows):
                with connection:
                    connection.executemany(statement, chunk)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def milliseconds(action: Callable[[], object], rounds: int = 9,
                 clock: Callable[[], float] = time.perf_counter) -> float:
    """The median of `rounds` after a first one."""
    taken = []
    for _ in range(rounds + 1):
        begin = clock()
        action()
        taken.append((clock() - begin) * 1e3)
    return median(taken[1:])


Pages = Callable[[hc.Store], Mapping[str, tuple[Callable[[], object], float]]]


def charts(store: hc.Store) -> Mapping[str, tuple[Callable[[], object], float]]:
    """What a resource's page reads of a month."""
    def chart() -> None:
        with store.reading() as session:
            assert len(hc.chart(session, LOOKED_AT, "cpu_percent", "month", NOW)) >= 360

    def availability() -> None:
        with store.reading() as session:
            assert hc.availability(session, LOOKED_AT, NOW)["month"] is not None

    return {"chart of a month, read": (chart, 150), "availability of a month": (availability, 150)}


def site(store: hc.Store) -> Mapping[str, tuple[Callable[[], object], float]]:
    """The pages as they are sent, and what one of them reads."""
    with store.writing() as session:
        session.add(hc.User.create("monitor", "correct horse battery"))
    inventory = hc.Inventory(store.database.path.with_name("inventory.yaml"), hc.ServiceSettings(), [], {}, {})
    nothing: Any = None  # these pages need no keys, and the monitor has no poller
    access = hc.ConnectionContext(hc.KnownHosts(store.database.path.with_name("known_hosts")), hc.Resolver())
    aggregator = hc.HealthAggregator()
    watch = hc.PollContext(aggregator, hc.Recorder(store, aggregator), access, random.Random(1))
    monitor = hc.Monitor(store, nothing, watch)
    context = hc.ConsoleContext(store, inventory, aggregator.lease, nothing, monitor, access, lambda: NOW)
    metrics = hc.Metrics(hc.ServingMetrics(context.lease, hc.Counters(1)), store, None, access)
    client = hc.build_console(context, metrics).test_client()
    with store.reading() as session:
        user = session.scalars(sqlalchemy.select(hc.User)).one()
    client.set_cookie(hc.COOKIE, hc.open_session(hc.Principal(context), "session", user), path=hc.PREFIX)

    def ask(path: str, found: bytes) -> None:
        answer = client.get(hc.PREFIX + path, environ_base={"REMOTE_ADDR": "127.0.0.1"})
        assert answer.status_code == 200 and found in answer.data, answer.status

    return {"overview, all well": (lambda: ask("", b"1000 healthy"), 250),
            "overview, all that are healthy": (lambda: ask("?state=healthy", b"/-/resources/db"), 250),
            "page of one with the charts of a month": (lambda: ask(f"resources/db{LOOKED_AT}?span=month", b"CPU"), 250),
            **charts(store)}


def rows(short: bool = False, pages: Pages = site) -> Iterator[Figure]:
    """The figures; a `short` run fills a tenth and counts the size of the rest from that."""
    share = 10 if short else 1
    retention = hc.Retention()
    with tempfile.TemporaryDirectory() as folder:
        store = resources(Path(folder), 100 // share)
        fill(store.database.path, 100 // share, retention.raw, retention.averages)
        store.close()
        size = share * store.database.path.stat().st_size / 1e6
    figure = "Database: 100 resources at 60 s over the whole retention" + (", a tenth of it measured" if short else "")
    yield figure, f"{size:.0f} MB", "≤ 250 MB", size <= 250
    with tempfile.TemporaryDirectory() as folder:
        store = resources(Path(folder), 1000)
        fill(store.database.path, 1000 // share, retention.raw, 30)
        for name, (call, limit) in pages(store).items():
            taken = milliseconds(call, 3 if short else 9)
            yield f"1,000 resources, a month: {name}", f"{taken:.0f} ms", f"≤ {limit:g} ms", taken <= limit
        store.close()


if __name__ == "__main__":
    for found in rows("--short" in sys.argv):
        print(*found, sep=" | ")
