"""Crashes: whatever is killed, stopped or locked, and whenever: nothing is half, and the gate is right or closed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import wait_for
from load import Clients
from service import QuickProcess, Service, environment, fresh_processes, write_inventory
from test_storage import database_of_schema_2
from test_vault import rotate
from test_workers import ORPHANED, left_after, workers

import healthchecker

pytestmark = pytest.mark.skipif(
    sys.platform == "win32",
    reason="signals and forks are POSIX's; test_storage and test_vault kill import, rotation and migration",
)
HOSTS, SAVED = 12, "saved.tgz"
PLACES = {"serve": "current", "first start": "new", "rotate": "current", "migrate": "old",
          "backup": "current"}  # where each is killed  # fmt: skip


# --- kill -9 -------------------------------------------------------------------------------------------------
def inventory(folder: Path, interval: int) -> Path:
    """Hosts that nobody reaches and nobody waits for."""
    lines = (
        f"  - {{name: h{number}, hostname: 127.0.0.1, port: 1, username: u, password: p{number}, platform: linux,"
        f" interval: {interval}, critical: false}}\n"
        for number in range(HOSTS)
    )
    return write_inventory(folder, "".join(lines))


def prepare(folder: Path, action: str, interval: int) -> Path:
    """What `action` finds; gives the inventory."""
    if action == "migrate":
        shutil.rmtree(folder)
        folder.mkdir()
        database_of_schema_2(folder)
        path = folder / "inventory.yaml"
        path.write_text(
            path.read_text(encoding="utf-8").replace("service:", "service:\n  console: 127.0.0.1:0\n  workers: 1"),
            encoding="utf-8",
        )
        return path
    if action == "first start":
        shutil.rmtree(folder)
        folder.mkdir()
    return inventory(folder, interval)


def back_up(path: str) -> None:
    """For a process of its own."""
    with open(os.devnull, "w", encoding="utf-8") as sink:
        os.dup2(sink.fileno(), 1)
    tempfile.tempdir = str(Path(path).parent)
    sys.exit(healthchecker.main(["--inventory", path, "backup", str(Path(path).with_name(SAVED))]))


COMMANDS = {"rotate": rotate, "backup": back_up}


def killed_at(action: str, path: Path, seconds: float, orphaned: float) -> list[psutil.Process]:
    """Runs `action` and kills it after `seconds`; what is left of it."""
    process: Any
    if action in COMMANDS:
        process = fresh_processes().Process(target=COMMANDS[action], args=(str(path),))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return []
    process = QuickProcess(path, environment())
    threading.Event().wait(seconds)
    assert process.poll() is None, process.stdout.read()
    main = psutil.Process(process.pid)
    main.suspend()  # so that it starts no other one meanwhile
    family = main.children(recursive=True)
    process.kill()
    process.wait()
    left = left_after(family, orphaned)
    for one in left:
        one.kill()
    process.stdout.close()
    return left


def assert_usable(folder: Path, scratch: Path) -> None:
    """A start finds all rows of one version or none, every secret opens, and nothing is damaged."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder, scratch)
    database = scratch / "healthchecker.db"
    if database.exists():
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert not connection.execute("PRAGMA foreign_key_check").fetchall()
    setup = healthchecker.Installation(scratch / "inventory.yaml")
    with setup.store() as store, store.writing() as session:
        vault = setup.open_vault(session)
        for turn in range(2):
            targets = healthchecker.load_targets(session, vault)
            assert not any(target.fault for target in targets.values())
            hosts = [target for target in targets.values() if target.name.startswith("h")]
            assert len(hosts) in (0, HOSTS) and len({host.settings.interval for host in hosts}) <= 1
            assert all(host.settings.secrets["password"] == f"p{host.name[1:]}" for host in hosts)
            if turn == 0:
                healthchecker.import_inventory(session, setup.inventory, vault)
        assert targets.keys() >= {resource.name for resource in setup.inventory.resources}


def assert_whole(saved: Path, scratch: Path) -> None:
    """What there is of a backup brings everything back."""
    if saved.exists():
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "restored").mkdir(parents=True)
        path = scratch / "restored" / "inventory.yaml"
        assert healthchecker.main(["--inventory", str(path), "restore", str(saved)]) == 0
        assert_usable(path.parent, scratch / "copy")
        saved.unlink()
    for part in (*saved.parent.glob(f".{SAVED}.*"), *saved.parent.glob("tmp*")):    # which nobody takes for one
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def kill_anywhere(folder: Path, times: int, seed: int, orphaned: float) -> None:
    """Kills first starts, imports, service, migrations, rotations and backups, at any moment. Raises AssertionError."""
    chosen = random.Random(seed)
    for place in PLACES.values():
        (folder / place).mkdir(exist_ok=True)
    current, begun = inventory(folder / "current", 10), time.monotonic()
    with Service(current) as service:
        service.wait_status("/", 200)
        whole = time.monotonic() - begun  # with the making of keys
    spans = dict.fromkeys(PLACES, 1.2 * whole)
    for action in COMMANDS:
        begun = time.monotonic()
        killed_at(action, current, 60, orphaned)
        spans[action] = 1.2 * (time.monotonic() - begun)
    assert (folder / "current" / SAVED).exists()
    assert_whole(folder / "current" / SAVED, folder / "scratch")
    for number in range(times):
        action = list(PLACES)[number % len(PLACES)]
        place = folder / PLACES[action]
        path = prepare(place, action, 20 - 10 * (number // len(PLACES) % 2))
        moment = chosen.uniform(0, spans[action])
        where = f"seed {seed}, kill {number}: {action} after {moment:.3f} s"
        assert not killed_at(action, path, moment, orphaned), where
        try:
            assert_usable(place, folder / "scratch")
            assert_whole(place / SAVED, folder / "scratch")
        except Exception as error:
            raise AssertionError(where) from error
    with Service(current) as service:
        service.wait_status("/", 200)


@pytest.mark.long
def test_kills_leave_nothing_half(tmp_path: Path) -> None:
    """(A thousand of them: make soak.)"""
    kill_anywhere(tmp_path, 5, 13, ORPHANED)


# --- a database that is locked, processes that stand still ---------------------------------------------------
def flagged(folder: Path, timeout: int, service: str = "", place: Path | None = None) -> tuple[Path, Path]:
    """An inventory of this machine, which is unhealthy while a flag is there; and the flag, in `place`."""
    flag = (place or folder) / "trouble"
    check = f"checks: [{{name: flag, command: 'test ! -e {flag}'}}]"
    text = f"  - {{name: db1, platform: local, interval: 1, timeout: {timeout}, rise: 1, fall: 1, {check}}}"
    return write_inventory(folder, text, service), flag


def assert_all_is_told(folder: Path, seconds: float) -> None:
    """After a flag was there and went while nothing could be written: no change of state and hardly a poll is lost."""
    with closing(sqlite3.connect(folder / "healthchecker.db", timeout=20)) as database:

        def states() -> list[str]:
            found = database.execute("SELECT text FROM event WHERE kind = 'state' ORDER BY at")
            return [text.split(" (")[0].split(" after")[0] for (text,) in found]

        wait_for(lambda: states() == ["unknown -> healthy", "healthy -> unhealthy", "unhealthy -> healthy"])
        times = [at for (at,) in database.execute("SELECT at FROM sample ORDER BY at")]
        assert len(times) > seconds / 2, "polls went on meanwhile, and none was lost"


def lock_for(folder: Path, seconds: float) -> None:
    """The gate goes on, the log tells once, and afterwards history has no hole. Raises AssertionError."""
    path, flag = flagged(folder, 30)
    with Service(path) as service:
        service.wait_status("/", 200)
        with closing(sqlite3.connect(folder / "healthchecker.db", timeout=20, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            flag.touch()
            service.wait_status("/", 503)
            flag.unlink()
            service.wait_status("/", 200)
            threading.Event().wait(seconds)
            service.wait_line("the database cannot be written: database is locked")
            assert service.get("/").status == 200
            other.execute("ROLLBACK")
            service.wait_line("the database cannot be written: that is over")
            assert service.output.count("cannot be written: database is locked") <= 1 + seconds // 60
        assert_all_is_told(folder, seconds)


def test_a_database_that_is_locked(tmp_path: Path) -> None:
    """Longer than a writer waits for it. (A minute: make soak.)"""
    lock_for(tmp_path, 1)


def stand_still(folder: Path, seconds: float) -> None:
    """Main process, then a worker: closed or right meanwhile, and as before afterwards. Raises AssertionError."""
    path, flag = flagged(folder, 2, "  workers: 2")     # its lease is short
    with Service(path) as service:
        service.wait_status("/", 200)
        os.kill(service.pid, signal.SIGSTOP)
        flag.touch()
        service.wait_status("/", 503)  # by the lease: nobody looks at the flag
        threading.Event().wait(seconds)
        assert service.get("/").status == 503
        os.kill(service.pid, signal.SIGCONT)
        service.wait_line("db1: healthy -> unhealthy")
        flag.unlink()
        service.wait_status("/", 200)
        before = workers(service.pid)
        os.kill(next(iter(before)), signal.SIGSTOP)
        with Clients((service.host, service.port), 8, keep=False, pause=0.01) as clients:
            wait_for(lambda: len(clients.answers) > 20)
            flag.touch()
            wait_for(lambda: clients.answers[-1].status == 503)
            flag.unlink()
            wait_for(lambda: clients.answers[-1].status == 200)
        threading.Event().wait(seconds)
        with_one = [worker for worker in workers(service.pid).values() if worker.status() != psutil.STATUS_STOPPED]
        assert with_one, "the other one serves"
        if next(iter(before)) in workers(service.pid):
            os.kill(next(iter(before)), signal.SIGCONT)
        wait_for(lambda: len(workers(service.pid)) == 2)
        service.wait_status("/", 200)


@pytest.mark.long
def test_processes_that_stand_still(tmp_path: Path) -> None:
    """(20 seconds each: make soak.)"""
    stand_still(tmp_path, 0.5)


@pytest.mark.long
def test_a_hung_main_process_was_closed_as_long_as_clients_were_refused(tmp_path: Path) -> None:
    """Not for the moment between its wake and the next poll."""
    path = write_inventory(tmp_path, "  - {name: a, platform: simulated, mean_healthy: 1e6, interval: 1, timeout: 1}")

    def found() -> list[healthchecker.Incident]:
        with healthchecker.Installation(path).store() as store, store.reading() as session:
            return [one for one in healthchecker.incidents(session, group="") if one.end == "opened"]

    with Service(path) as service:
        service.wait_status("/", 200)
        known = len(found())
        main = psutil.Process(service.process.pid)
        main.suspend()
        try:
            service.wait_status("/", 503)
            refused_at = time.time()
            threading.Event().wait(6)
        finally:
            main.resume()
        service.wait_status("/", 200)
        opened_at = time.time()
        wait_for(lambda: len(found()) > known, 30)
        incident = found()[0]
        assert incident.from_at == pytest.approx(refused_at, abs=1.5)
        assert incident.to_at == pytest.approx(opened_at, abs=1.5)
        assert incident.refused > 0
