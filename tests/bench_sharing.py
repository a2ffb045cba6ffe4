"""Figures of several machines on one PostgreSQL: what each polls of many resources, and what that costs."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
from postgres import URL_FILE, Postgres, database_in, execute, missing_postgres, open_postgres
from service import Program, prepared_keys, write_inventory
from sshd import wait_for

Figure = tuple[str, str, str, bool | None]
COUNT, INTERVAL, MACHINES = 5000, 60, "abc"
ROWS = (f'  - {{name: "r[0001:{COUNT}]", hostname: "r[0001:{COUNT}]", platform: simulated, interval: {INTERVAL}, '
        "mean_healthy: 1000000}\n")  # fmt: skip


def cpu_of(*roots: int) -> float:
    """Seconds of CPU of processes and all below them."""
    found = [process for root in roots for process in (psutil.Process(root),
                                                       *psutil.Process(root).children(recursive=True))]  # fmt: skip
    return sum(sum(process.cpu_times()[:4]) for process in found)


@contextlib.contextmanager
def machines(folder: Path, postgres: Postgres, count: int) -> Iterator[tuple[list[Program], Path]]:
    url = postgres.url(postgres.database())
    with contextlib.ExitStack() as stack:
        running = []
        for name in MACHINES[:count]:
            own = folder / f"{count}{name}"
            own.mkdir()
            (own / URL_FILE).write_text(url, encoding="utf-8")
            prepared_keys(own)
            path = write_inventory(own, ROWS, f"  machine: {name}\n")
            running.append(stack.enter_context(Program(path, deadline=900, as_module=True)))
        yield running, own


def shares(database: object) -> Counter[str]:
    return Counter(dict(execute(database, "SELECT resource_id, machine FROM result")).values())  # type: ignore[arg-type]


def rows() -> Iterator[Figure]:
    """The figures, by the number of machines."""
    wait = threading.Event().wait
    if why := missing_postgres():
        yield f"{COUNT} resources over several machines", f"skipped: {why}", "", None
        return
    with open_postgres() as postgres, tempfile.TemporaryDirectory() as name:
        for count in range(1, len(MACHINES) + 1):
            with machines(Path(name), postgres, count) as (running, own):
                database = database_in(own)
                wait_for(lambda: sum(shares(database).values()) == COUNT and len(shares(database)) == count, 600)  # noqa: B023
                wait(INTERVAL)
                both = [each.process.pid for each in running], [postgres.process.pid]
                before, begun = [cpu_of(*pids) for pids in both], time.monotonic()
                wait(INTERVAL)
                seconds = time.monotonic() - begun
                ours, theirs = ((cpu_of(*pids) - old) / seconds for pids, old in zip(both, before, strict=True))
                found = shares(database)
                largest = max(abs(part / (COUNT / count) - 1) for part in found.values())
                assert all(each.get("/").status == 200 for each in running)
            shutil.rmtree(own)
            figure = f"{COUNT} simulated resources at {INTERVAL} s, PostgreSQL, machines: {count}"
            yield f"{figure}: share of each", f"{'/'.join(map(str, found.values()))}", "± 15 %", largest <= 0.15
            yield "... CPU of the database", f"{theirs:.2f} of a core", "≤ 0.5", theirs <= 0.5
            yield "... CPU of each machine", f"{ours / count:.2f} of a core", "", None


if __name__ == "__main__":
    for found in rows():
        print(*found, sep=" | ")
