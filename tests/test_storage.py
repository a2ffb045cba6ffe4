"""The database: its tables, the import that follows the file, and every state in which it may be found."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import platform
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import pytest
import sqlalchemy
from conftest import wait_for
from postgres import database_in, execute, settings_of
from rights import without_root_rights
from service import (
    Program,
    Service,
    environment,
    fresh_processes,
    prepared_keys,
    prepared_tables,
    run_cheaply,
    write_inventory,
)
from sqlalchemy.orm import Session

import healthchecker
from healthchecker import (
    Changes,
    Database,
    InventoryError,
    LoginSession,
    Maintenance,
    Resource,
    SecretError,
    Setting,
    SqliteFile,
    StorageError,
    Store,
    User,
    Vault,
)

FIRST = """\
  - {hostname: a.example.com, username: u, password: pa}
  - {hostname: b.example.com, username: u, password: pb, interval: 30}
  - {name: c, platform: simulated, seed: 1}
"""


@functools.cache
def loaded_vault() -> Vault:
    """The prepared keys, read once: to check such a key takes 0.2 s."""
    with tempfile.TemporaryDirectory() as folder:
        return Vault(prepared_keys(Path(folder)))


def rows_of(database: Database) -> dict[str, dict[str, Any]]:
    """What is watched, but for the lines where it is stated."""
    rows = [dict(row._mapping) for row in execute(database, "SELECT * FROM resource WHERE origin != 'removed'")]
    return {row["name"]: {name: row[name] for name in row if name != "place"} for row in rows}


class Bench:
    """A folder with an inventory, keys and a database, and an import of the inventory into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vault = copy.copy(loaded_vault())
        self.vault.folder = prepared_keys(folder)
        self.database, self.place = folder / "healthchecker.db", database_in(folder)

    def load(self, resources: str) -> Changes:
        setup = healthchecker.Installation(write_inventory(self.folder, resources))
        prepared_tables(self.folder)
        with closing(Store(setup.database)) as store, store.writing() as session:
            return healthchecker.import_inventory(session, setup.inventory, self.vault)

    def rows(self) -> dict[str, dict[str, Any]]:
        return rows_of(self.place)

    def password(self, name: str) -> str:
        row = self.rows()[name]
        bound = "password", name, row["hostname"], row["username"] or "", str(row["port"])
        return self.vault.open(row["password"], *bound)

    def execute(self, statement: str, **values: object) -> None:
        execute(self.place, statement, **values)

    def line(self, number: int) -> int:
        """Of the inventory, which names a database first that is no file."""
        return number + settings_of(self.folder).count("\n")

    def dump(self) -> list[str]:
        """Everything that is in it."""
        return sorted(f"{table} {row}" for table in healthchecker.Base.metadata.tables
                      for row in execute(self.place, f'SELECT * FROM "{table}"') if table != "machine")  # fmt: skip


@pytest.fixture
def bench(database_folder: Path) -> Bench:
    """What works on it runs on both kinds of database."""
    return Bench(database_folder)


def dump(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return "\n".join(connection.iterdump())


# --- schema --------------------------------------------------------------------------------------------------
@pytest.mark.of_files
def test_schema(bench: Bench) -> None:
    """The specification's two tables and their columns, as another program sees them."""
    bench.load(FIRST)
    with closing(sqlite3.connect(bench.database)) as connection:
        columns = {
            table: {row[1]: row[2].upper() for row in connection.execute(f"PRAGMA table_info({table})")}
            for table in ("user", "resource")
        }
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA user_version").fetchone() == (healthchecker.SCHEMA,)
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute(
                "INSERT INTO resource SELECT NULL, * FROM (SELECT name, hostname, platform, port, username,"
                "password, key_passphrase, interval, settings, origin, place, host_key "
                "FROM resource LIMIT 1)"
            )
    assert {"hostname", "username", "password", "interval"} <= columns["resource"].keys()
    assert {"username", "password", "salt"} <= columns["user"].keys()
    assert "BLOB" in columns["user"]["password"] and "BLOB" in columns["user"]["salt"]
    assert (bench.rows()["a.example.com"]["interval"], bench.rows()["b.example.com"]["interval"]) == (60, 30)


SCHEMA_1 = """
CREATE TABLE user (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR NOT NULL UNIQUE, password_hash BLOB NOT NULL,
    salt BLOB NOT NULL, rounds INTEGER NOT NULL);
CREATE TABLE resource (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR NOT NULL UNIQUE, hostname VARCHAR NOT NULL,
    platform VARCHAR NOT NULL, port INTEGER NOT NULL, username VARCHAR, password VARCHAR, key_passphrase VARCHAR,
    interval FLOAT NOT NULL, settings VARCHAR NOT NULL, origin VARCHAR NOT NULL, host_key VARCHAR);
CREATE TABLE setting (name VARCHAR NOT NULL PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE status (resource_id INTEGER NOT NULL PRIMARY KEY REFERENCES resource (id) ON DELETE CASCADE,
    configured VARCHAR NOT NULL, credential VARCHAR NOT NULL, state VARCHAR NOT NULL, cause VARCHAR NOT NULL,
    reason VARCHAR NOT NULL, since FLOAT NOT NULL, polled FLOAT NOT NULL, good INTEGER NOT NULL, bad INTEGER NOT NULL);
INSERT INTO user VALUES (1, 'SpiceWorks', x'00', x'01', 1);
INSERT INTO resource VALUES (1, 'a', 'a.example.com', 'linux', 22, 'm', 't', NULL, 60, '{}', 'inventory', 'k');
INSERT INTO status VALUES (1, 'c', 'd', 'healthy', '', '', 5, 6, 1, 0);
PRAGMA application_id = 1212369713;
PRAGMA user_version = 1;
"""


def test_database_of_the_first_version(tmp_path: Path) -> None:
    """Its tables get the columns of this version, what is in them stays, and the second start changes nothing."""
    path = tmp_path / "healthchecker.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1)
    for _ in range(2):
        with closing(Store(path)) as store, store.reading() as session:
            [user] = session.scalars(sqlalchemy.select(healthchecker.User))
            assert (user.username, user.role, user.initial) == ("SpiceWorks", "admin", True)
            [status] = session.scalars(sqlalchemy.select(healthchecker.Status))
            assert (status.state, status.since_at, status.sample, status.seconds) == ("healthy", 5, "null", 0)
            [row] = session.scalars(sqlalchemy.select(healthchecker.Resource))
            assert (row.name, row.host_key) == ("a", "k")
    with closing(sqlite3.connect(path)) as connection:
        migrated = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert connection.execute("PRAGMA user_version").fetchone() == (healthchecker.SCHEMA,)
    assert migrated >= set(healthchecker.Base.metadata.tables)


def test_a_login_that_the_first_version_was_refused_waits(tmp_path: Path) -> None:
    """An upgrade is no reason to try it again at once."""
    path, vault = tmp_path / "healthchecker.db", loaded_vault()
    token = vault.seal("p", "password", "a", "a.example.com", "m", "22")
    digest = healthchecker.Resource(hostname="a.example.com", username="m", password=token).credential_digest
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1)
        connection.execute("UPDATE resource SET password = ?", [token])
        connection.execute("UPDATE status SET state = 'unhealthy', cause = 'auth', credential = ?", [digest])
        connection.commit()
    with closing(Store(path)) as store, store.reading() as session:
        [status] = session.scalars(sqlalchemy.select(healthchecker.Status))
        target, guard = healthchecker.load_targets(session, vault)["a"], healthchecker.LoginGuard()
        assert healthchecker.restore_login(guard, target, status, 5.0) and guard.has_refused("a")


RECORDED = Path(__file__).parent / "recorded" / "schema2"
EXPECTED = json.loads((RECORDED / "expected.json").read_text(encoding="utf-8"))


def database_of_schema_2(folder: Path, more: str = "") -> Path:
    """What the version before left behind: inventory, key and database."""
    shutil.copy(RECORDED / "inventory.yaml", folder)
    (folder / "keys").mkdir(mode=0o700)
    shutil.copy(RECORDED / "private.pem", folder / "keys")
    (folder / "keys" / "private.pem").chmod(0o600)
    with closing(sqlite3.connect(folder / "healthchecker.db")) as connection:
        connection.executescript((RECORDED / "healthchecker.sql").read_text(encoding="utf-8") + more)
    return folder / "healthchecker.db"


def answers(session: Session, vault: Vault) -> dict[str, Any]:
    """What was recorded of the version before, asked of this one."""
    now, found = EXPECTED["now"], {}
    work = {row.chosen.resources: [row.until_at, row.reason] for row in session.scalars(sqlalchemy.select(Maintenance))}
    for name, target in healthchecker.load_targets(session, vault).items():
        row, status = session.get(Resource, target.id), session.get(healthchecker.Status, target.id)
        assert row
        polls = healthchecker.samples(session, target.id, math.inf, limit=1000)
        found[name] = {
            "samples": [list(poll) for poll in polls],
            "availability": healthchecker.availability(session, target.id, now),
            "charts": {
                shown: [list(point) for point in healthchecker.chart(session, target.id, *shown.split(), now)]
                for shown in EXPECTED["resources"][name]["charts"]
            },
            "status": status and [
                *(status.state, status.cause, status.reason, status.since_at, status.polled_at, status.good),
                *(status.bad, status.seconds, json.loads(status.sample), status.strip),
            ],
            "current": status and status.settings_digest == row.settings_digest,
            "host_key": row.host_key,
            "origin": row.origin,
            "maintenance": work.get((name,), [0, ""]),
            "secrets": [target.settings.secrets.get(kind) for kind in ("password", "key_passphrase")],
        }
    events = healthchecker.events(session, limit=1000)
    return {
        "now": now,
        "resources": found,
        "events": [[one.at, one.kind, one.resource, one.text, one.actor, one.address] for one in events],
        "users": {
            user.username: [user.password.hex(), user.salt.hex(), user.rounds, user.role, user.initial]
            for user in session.scalars(sqlalchemy.select(User))
        },
        "revision": healthchecker.revision(session),
    }


def rounded(found: Any) -> Any:
    """To what an average may differ by: it is kept in tenths of seconds and in hundredths."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return round(found, 4) if isinstance(found, float) else found


def test_database_of_the_version_before(tmp_path: Path) -> None:
    """It answers as that version did, its secrets open, and a resource of the file counts as unchanged."""
    path = database_of_schema_2(tmp_path)
    setup = healthchecker.Installation(tmp_path / "inventory.yaml")
    for turn in range(2):
        with closing(Store(path)) as store, store.writing() as session:
            vault = setup.open_vault(session)
            if turn:    # the first time, the old tokens are still there
                assert healthchecker.import_inventory(session, setup.inventory, vault)[:3] == ([], [], [])
            found = answers(session, vault)
        for name, expected in EXPECTED["resources"].items():
            for what, value in expected.items():
                assert rounded(found["resources"][name][what]) == rounded(value), f"{what} of {name}"
        in_time = sorted(EXPECTED["events"], key=lambda event: event[0], reverse=True)
        assert {**found, "resources": {}} == {**EXPECTED, "resources": {}, "events": in_time}
    tokens = [token for row in rows_of(SqliteFile(path)).values() for token in (row["password"], row["key_passphrase"])]
    assert [token[:4] for token in tokens if token] == ["HC2."] * 3
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert not connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'packed%'").fetchall()


def test_an_id_is_never_used_again(tmp_path: Path) -> None:
    """Or what is queued for a resource that was removed, a host key say, would meet another one."""
    for path in (tmp_path / "new.db", database_of_schema_2(tmp_path)):
        with closing(Store(path)) as store:
            ids = []
            for name in ("first", "second"):
                with store.writing() as session:
                    session.add(Resource(name=name, hostname="h", platform="local", port=1, settings="{}"))
                with store.writing() as session:
                    row = session.scalars(sqlalchemy.select(Resource).where(Resource.name == name)).one()
                    ids.append(row.id)
                    session.delete(row)
            assert ids[1] > ids[0]
            with store.reading() as session:    # a migration turns it off
                assert session.scalar(sqlalchemy.text("PRAGMA foreign_keys")) == 1


@pytest.mark.of_files
def test_a_database_is_read_through_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each command that is given for once; whatever opens it then relies on that. Lists are asked for often."""
    bench.load(FIRST)
    seen: list[str] = []

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = genuine(*arguments, **options)
        connection.set_trace_callback(seen.append)
        return connection

    genuine = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    path = write_inventory(bench.folder, FIRST)
    for command, times in (["check"], 1), (["keys", "rotate"], 1), (["user", "list"], 0):
        seen.clear()
        assert healthchecker.main(["--inventory", str(path), *command]) == 0
        assert sum("quick_check" in statement for statement in seen) == times, command


@pytest.mark.of_files
def test_a_database_that_another_program_holds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked for once, and is not at fault: nothing is to be restored."""
    bench.load(FIRST)
    asked: list[str] = []

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        asked.append(str(arguments[0]))
        return genuine(*arguments, **{**options, "timeout": 0})

    genuine = sqlite3.connect
    with contextlib.closing(genuine(bench.database, isolation_level=None)) as holder:
        for statement in "PRAGMA locking_mode = EXCLUSIVE", "BEGIN EXCLUSIVE", "DELETE FROM notice", "COMMIT":
            holder.execute(statement)
        monkeypatch.setattr(sqlite3, "connect", connect)
        assert healthchecker.main(["--inventory", str(write_inventory(bench.folder, FIRST)), "user", "list"]) == 4
    assert capsys.readouterr().err == f"database {bench.database}: another program has it for itself; try again\n"
    assert len(asked) == 1


@pytest.mark.long
@pytest.mark.of_files
@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_start_waits_for_who_holds_the_database(bench: Bench, lock: str) -> None:
    """A shell of SQLite, or what copies the file: nobody starts the service again that has said that it has none."""
    bench.load(FIRST)
    service = Service(write_inventory(bench.folder, FIRST))
    with contextlib.closing(sqlite3.connect(bench.database, isolation_level=None)) as holder:
        if lock == "EXCLUSIVE":
            holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        for statement in f"BEGIN {lock}", "DELETE FROM notice":
            holder.execute(statement)
        service.begin()
        try:
            service.wait_line("the gate stays closed until the database can be used: ")
            holder.close()
            service.wait_line("serving on http://")
            assert service.stop() == 0
        finally:
            service.kill()


TRACE = """
import os, sqlite3
def connect(*given, genuine=sqlite3.connect, **options):
    connection = genuine(*given, **options)
    connection.set_trace_callback(note)
    return connection
def note(statement):
    if "quick_check" in statement:
        os.write(sink, f"{os.getpid()}\\n".encode())
sink = os.open(os.environ["SEEN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sqlite3.connect = sqlite3.dbapi2.connect = connect
"""


@pytest.mark.long
@pytest.mark.of_files
def test_a_start_reads_the_database_through_once(bench: Bench) -> None:
    """The main process, and no worker."""
    bench.load(FIRST)
    (bench.folder / "sitecustomize.py").write_text(TRACE, encoding="utf-8")
    seen = bench.folder / "seen"
    env = {"PYTHONPATH": os.pathsep.join([str(bench.folder), os.environ.get("PYTHONPATH", "")]), "SEEN": str(seen)}
    with Program(write_inventory(bench.folder, FIRST, "  workers: 2\n"), env=env) as service:
        service.wait_status("/-/livez", 200)
        assert seen.read_text(encoding="ascii").split() == [str(service.pid)]


def test_a_migrated_database_is_as_a_new_one(tmp_path: Path) -> None:
    """The same tables with the same columns, types and keys."""
    def described(path: Path) -> dict[str, list[tuple[Any, ...]]]:
        with closing(Store(path)), closing(sqlite3.connect(path)) as connection:
            return {table: sorted(row[1:4] + row[5:] for row in connection.execute(f"PRAGMA table_info({table})"))
                    for table in healthchecker.Base.metadata.tables}  # fmt: skip

    assert described(database_of_schema_2(tmp_path)) == described(tmp_path / "new.db")


SCHEMA_5 = ("ALTER TABLE status DROP COLUMN read", "ALTER TABLE status DROP COLUMN read_at", "DROP TABLE maintenance",
            "ALTER TABLE resource ADD COLUMN maintenance FLOAT NOT NULL DEFAULT 0",
            "ALTER TABLE resource ADD COLUMN maintenance_reason VARCHAR NOT NULL DEFAULT ''",
            "DROP TABLE machine", "DROP TABLE result", "PRAGMA user_version = 5")  # fmt: skip
SCHEMA_4 = (*SCHEMA_5, 'ALTER TABLE event DROP COLUMN "group"', "ALTER TABLE event DROP COLUMN state",
            "PRAGMA user_version = 4")  # fmt: skip


@pytest.mark.of_files
@pytest.mark.parametrize("schema", [SCHEMA_4, SCHEMA_5], ids=["4", "5"])
def test_maintenance_of_earlier_schemas_goes_on(bench: Bench, schema: tuple[str, ...]) -> None:
    """Also of a name with a quotation mark; damaged ones are none."""
    bench.load(FIRST)
    bench.execute("""UPDATE resource SET name = 'a"b' WHERE name = 'a.example.com'""")
    executed(bench.database, *schema, "UPDATE resource SET maintenance = 9e9, maintenance_reason = 'it''s'",
             "UPDATE resource SET maintenance = 'soon' WHERE name = 'b.example.com'",
             "UPDATE resource SET maintenance = 9e999 WHERE name = 'c'")  # fmt: skip
    with closing(Store(bench.place)) as store, store.reading() as session:
        [row] = session.scalars(sqlalchemy.select(Maintenance))
    assert (row.chosen.resources, row.state, row.until_at, row.reason) == (('a"b',), "begun", 9e9, "it's")
    assert row.start_at < 9e9


@pytest.mark.of_files
def test_events_of_schema_4_are_given_their_states(bench: Bench) -> None:
    """Of the gate, as its texts tell; the others stay without."""
    bench.load(FIRST)
    texts = ("closed (the service starts)", "closed -> open after 2 s", "open -> closed (a: cpu) after 3 s")
    rows = ", ".join(f"({number}, {number}, 'gate', '', '{text}', '', '')" for number, text in enumerate(texts, 100))
    executed(bench.database, *SCHEMA_4, f"INSERT INTO event VALUES {rows}, (200, 9, 'state', 'a', 'x -> y', '', '')")
    with closing(Store(bench.place)) as store, store.reading() as session:
        found = {event.id: event.state for event in session.scalars(sqlalchemy.select(healthchecker.Event))}
    assert {number: found[number] for number in (100, 101, 102, 200)} == {
        100: "closed", 101: "open", 102: "closed", 200: ""}  # fmt: skip


@pytest.mark.of_files
def test_database_of_schema_3(bench: Bench) -> None:
    """It lacks two columns, and nothing else changes."""
    bench.load(FIRST)
    before = bench.rows()
    executed(bench.database, "ALTER TABLE setting DROP COLUMN text", "ALTER TABLE resource DROP COLUMN place",
             *SCHEMA_4)  # fmt: skip
    executed(bench.database, "PRAGMA user_version = 3")
    Store(bench.place).close()
    assert bench.rows() == before and bench.load(FIRST)[:3] == ([], [], [])


def test_database_of_schema_4(tmp_path: Path) -> None:
    """Logins end, for they had no role, name or end of their own; users stay."""
    path = tmp_path / "healthchecker.db"
    with closing(Store(path)) as store, store.writing() as session:
        session.add(User.create("alice", "x" * 12))
    executed(path, "DROP TABLE login_session", "CREATE TABLE login_session (token_hash VARCHAR NOT NULL PRIMARY KEY, "
             "kind VARCHAR NOT NULL, user_id INTEGER NOT NULL REFERENCES user (id) ON DELETE CASCADE, begun_at DOUBLE "
             "NOT NULL, seen_at DOUBLE NOT NULL, address VARCHAR NOT NULL)",
             "INSERT INTO login_session VALUES ('00', 'session', 1, 2e9, 2e9, '')",
             *SCHEMA_4)  # fmt: skip
    with closing(Store(path)) as store, store.writing() as session:
        assert session.scalars(sqlalchemy.select(LoginSession)).all() == []
        session.add(LoginSession(token_hash="1", kind="named", user_id=1, begun_at=1, seen_at=0, address=""))
        assert session.scalars(sqlalchemy.select(User.username)).all() == ["alice"]


def test_database_of_schema_6(tmp_path: Path) -> None:
    """It lacks two tables."""
    path = tmp_path / "healthchecker.db"
    Store(path).close()
    before = dump(path)
    executed(path, "DROP TABLE machine", "DROP TABLE result", "PRAGMA user_version = 6")
    Store(path).close()
    assert sorted(dump(path).splitlines()) == sorted(before.splitlines())
    assert SqliteFile(path).inspect() == healthchecker.SCHEMA


# As all versions of schema 6 made it, and as some of schema 5 made maintenance already.
MACHINE_6 = ("DROP TABLE machine", "CREATE TABLE machine (instance VARCHAR NOT NULL PRIMARY KEY, name VARCHAR NOT NULL,"
             " version VARCHAR NOT NULL, started_at DOUBLE NOT NULL, seen_at DOUBLE NOT NULL)",
             "INSERT INTO machine VALUES ('0', '', '1', 0, 0)", "PRAGMA user_version = 6")  # fmt: skip
MAINTAINED_5 = ("ALTER TABLE status DROP COLUMN read", "ALTER TABLE status DROP COLUMN read_at", "DROP TABLE machine",
                "DROP TABLE result", "PRAGMA user_version = 5")  # fmt: skip


UNREAD_6 = ("ALTER TABLE status DROP COLUMN read", "ALTER TABLE status DROP COLUMN read_at", *MACHINE_6)
NAMELESS_5 = ("DROP TABLE login_session", "CREATE TABLE login_session (token_hash VARCHAR NOT NULL PRIMARY KEY)",
              *MAINTAINED_5)  # fmt: skip


@pytest.mark.parametrize("schema", [MACHINE_6, UNREAD_6, MAINTAINED_5, NAMELESS_5])
def test_what_came_within_a_schema(tmp_path: Path, schema: tuple[str, ...]) -> None:
    """A table or a column: everything stays, and the tables are those of a new database."""
    path, new = tmp_path / "healthchecker.db", tmp_path / "new.db"
    for each in (path, new):
        with closing(Store(each)) as store, store.writing() as session:
            session.add(Maintenance(id=7, state="begun", start_at=1, until_at=9e9, scope='{"all": true}', reason="x"))
    executed(path, *schema)
    Store(path).close()
    with closing(sqlite3.connect(path)) as one, closing(sqlite3.connect(new)) as other:
        for table in healthchecker.Base.metadata.tables:
            columns, rows = f"PRAGMA table_info({table})", f'SELECT * FROM "{table}"'
            found, wanted = ({row[1:] for row in each.execute(columns)} for each in (one, other))
            assert {row[:2] for row in found} == {row[:2] for row in wanted}, table
            assert one.execute(rows).fetchall() == other.execute(rows).fetchall(), table


@pytest.mark.parametrize(("change", "why"), [
    ("ALTER TABLE resource DROP COLUMN place", "columns are missing then"),
    ("PRAGMA user_version = 3", "duplicate column name: text"),
], ids=["lacking", "known"])
def test_what_no_migration_brings_stays_as_it_was(tmp_path: Path, change: str, why: str) -> None:
    """Such as a column that a version between two releases had not: the version that wrote it can go on with it, so
    nobody is told to throw it away."""
    path = tmp_path / "healthchecker.db"
    Store(path).close()
    executed(path, "PRAGMA user_version = 6", change)
    before, version = dump(path), SqliteFile(path).inspect()
    for _ in range(2):
        with pytest.raises(StorageError, match=f"cannot bring to {healthchecker.SCHEMA} ") as refused:
            Store(path)
        assert f"({why}); nothing was changed" in str(refused.value) and "move it away" not in str(refused.value)
    assert dump(path) == before and SqliteFile(path).inspect() == version


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_migration_that_a_quota_ends(tmp_path: Path) -> None:
    """Another start can do it: nobody has to go back to the version before."""
    path, resource = database_of_schema_2(tmp_path), cast("Any", importlib.import_module("resource"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be opened: disk I/O error$"):
            Store(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    Store(path).close()


def test_damaged_rows_of_history_do_not_stop_the_migration(tmp_path: Path) -> None:
    path = database_of_schema_2(tmp_path, "UPDATE sample SET packed = x'00' WHERE at = (SELECT min(at) FROM sample);")
    with closing(Store(path)) as store, store.reading() as session:
        count = session.scalar(sqlalchemy.text("SELECT count(*) FROM sample"))
    assert count == sum(len(one["samples"]) for one in EXPECTED["resources"].values()) - 1


def test_no_migration_under_a_running_service(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A service of the version before would fail from then on. What a migration does is said before it, too."""
    caplog.set_level("INFO")
    path = database_of_schema_2(tmp_path)
    before = dump(path)
    why = f"{re.escape(path.name)}, of schema 2 as yet: if it is of an earlier version, use its own command line"
    with healthchecker.SqliteFile(path).lock(), pytest.raises(StorageError, match=f"another HealthChecker is .*{why}"):
        Store(path)
    assert dump(path) == before and not caplog.messages
    with healthchecker.SqliteFile(path).lock():
        Store(path, locked=True).close()
        with pytest.raises(StorageError, match=r"; stop that one first$"):
            healthchecker.SqliteFile(path).lock()
    before_it, after_it = (each for each in caplog.messages if "from schema 2 to " in each)
    assert "is brought" in before_it and "migrated" in after_it


LOOKING = (["check"], ["seal"], ["gate"], ["maintenance", "list"], ["user", "list"], ["user", "token", "list"],
           ["status"])  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("command", LOOKING, ids=" ".join)
def test_who_only_looks_leaves_an_older_database_to_its_version(
    command: list[str], bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beside its service: of a file a copy is looked at, of PostgreSQL the tables that are read."""
    bench.load(FIRST)
    is_file = isinstance(bench.place, SqliteFile)
    execute(bench.place, *(["DROP TABLE machine", "DROP TABLE result", "PRAGMA user_version = 6"] if is_file else
                           ["UPDATE setting SET value = 6 WHERE name = 'schema'"]))  # fmt: skip
    with bench.place.lock() if is_file else contextlib.nullcontext():
        code = healthchecker.main(["--inventory", str(bench.folder / "inventory.yaml"), *command])
    assert code == (3 if command == ["status"] else 0)
    assert bench.place.inspect() == 6
    said = capsys.readouterr()
    if command == ["status"]:
        assert ("the service has not said yet" if is_file else "the service was not heard of") in said.out
    elif command == ["check"]:
        assert "; a start would make: 0 added, 0 changed, 0 removed, 3 kept\n" in said.out
        assert "a start would bring the database from schema 6 to 7, and no earlier version opens it then" in said.out


@pytest.mark.of_files
@pytest.mark.parametrize("command", [command for command in LOOKING if "user" in command], ids=" ".join)
def test_a_list_makes_no_database(command: list[str], bench: Bench) -> None:
    path = write_inventory(bench.folder, FIRST)
    assert healthchecker.main(["--inventory", str(path), *command]) == 0
    assert not bench.database.exists()


def open_store(path: str, started: Any) -> None:
    """For a process of its own."""
    logging.disable()
    started.send(None)
    with healthchecker.SqliteFile(Path(path)).lock():
        Store(Path(path), locked=True).close()


MULTIPLIED = """
INSERT INTO average WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 3000)
SELECT resource_id, at - 900 * n, packed FROM number, (SELECT * FROM average WHERE at = 1700000100);
"""


def test_kill_during_the_migration(tmp_path: Path, often: Callable[[int, int], int]) -> None:
    """All old or all new, at every moment, and the next start makes it new."""
    moments = random.Random(42)
    folders = {name: tmp_path / name for name in ("old", "new", "killed")}
    for folder in folders.values():
        folder.mkdir()
    old = database_of_schema_2(folders["old"], MULTIPLIED)
    whole = killed(open_store, Path(shutil.copy(old, folders["new"])), 60)
    states = {dump(old): "old", dump(folders["new"] / old.name): "new"}
    outcomes = []
    for part in (0.0, *(moments.uniform(0, 1.1) for _ in range(often(3, 24)))):
        for leftover in folders["killed"].iterdir():
            leftover.unlink()
        path = Path(shutil.copy(old, folders["killed"]))
        killed(open_store, path, part * whole)
        outcomes.append(states[dump(path)])
        Store(path).close()
        assert states[dump(path)] == "new"
    assert outcomes[0] == "old", outcomes


def test_passwords_are_sealed_for_their_rows(bench: Bench) -> None:
    bench.load(FIRST)
    assert (bench.password("a.example.com"), bench.password("b.example.com")) == ("pa", "pb")
    bench.execute(
        "UPDATE resource SET password = (SELECT password FROM resource WHERE name LIKE 'b%') WHERE name LIKE 'a%'"
    )
    with pytest.raises(SecretError, match="belongs to another"):
        bench.password("a.example.com")


def test_first_user(bench: Bench) -> None:
    """SpiceWorks / HealthChecker, PBKDF2-HMAC-SHA512, 220,000 iterations, the salt in its own column."""
    bench.load("")
    with closing(Store(bench.place)) as store:
        for _ in range(2):
            with store.writing() as session:
                healthchecker.ensure_first_user(session)
    [(name, stored, salt, rounds)] = execute(bench.place, 'SELECT username, password, salt, rounds FROM "user"')
    assert (name, rounds, len(salt), len(stored)) == ("SpiceWorks", 220_000, 16, 64)
    assert stored == hashlib.pbkdf2_hmac("sha512", b"HealthChecker", salt, 220_000)


def test_users_with_the_same_password() -> None:
    first, second = User.create("a", "same"), User.create("b", "same")
    assert first.salt != second.salt and first.password != second.password
    assert first.verify("same") and not first.verify("Same")
    assert not first.verify("") and not first.verify("x" * 1_000_000)


def test_an_existing_account_is_left_alone(bench: Bench) -> None:
    bench.load("")
    with closing(Store(bench.place)) as store:
        with store.writing() as session:
            session.add(User.create("operator", "own"))
        with store.writing() as session:
            healthchecker.ensure_first_user(session)
        with store.reading() as session:
            assert session.scalars(sqlalchemy.select(User.username)).all() == ["operator"]


# --- import --------------------------------------------------------------------------------------------------
A, B, C = FIRST.splitlines(keepends=True)
FOLLOWED: dict[str, tuple[str, tuple[str, str, str, str]]] = {
    "nothing": (FIRST, ("", "", "", "abc")),
    "added": (FIRST + "  - {name: d, platform: local}\n", ("d", "", "", "abc")),
    "removed": (B + C, ("", "", "a", "bc")),
    "all removed": ("", ("", "", "abc", "")),
    "order": (C + B + A, ("", "", "", "abc")),
    "interval": (FIRST.replace("interval: 30", "interval: 31"), ("", "b", "", "ac")),
    "default written out": (FIRST.replace("password: pa", "password: pa, interval: 60"), ("", "", "", "abc")),
    "limit": (A.replace("pa}", "pa, limits: {cpu_percent: 9}}") + B + C, ("", "a", "", "bc")),
    "password": (A.replace("pa}", "px}") + B + C, ("", "a", "", "bc")),
    "password left out": (A.replace(", password: pa", "") + B + C, ("", "", "", "abc")),
    "host and password": (
        A.replace("a.example.com", "a2.example.com, name: a.example.com") + B + C,
        ("", "a", "", "bc"),
    ),
    "platform to local": (A.split("{")[0] + "{name: a.example.com, platform: local}\n" + B + C, ("", "a", "", "bc")),
    "all kinds": (B.replace("30", "31") + C + "  - {name: d, platform: local}\n", ("d", "b", "a", "c")),
}


@pytest.mark.long
@pytest.mark.parametrize("case", FOLLOWED)
def test_rows_follow_the_file(case: str, bench: Bench) -> None:
    text, expected = FOLLOWED[case]
    assert bench.load(FIRST) == (["a.example.com", "b.example.com", "c"], [], [], [])
    before = bench.rows()
    changes = bench.load(text)
    assert tuple("".join(sorted(name[0] for name in names)) for names in changes) == expected
    after = bench.rows()
    assert {name[0] for name in after} == set("".join(expected[index] for index in (0, 1, 3)))
    assert all(after[name] == before[name] for name in changes.kept), "a kept row was written to"
    assert all(after[name]["id"] == before[name]["id"] for name in changes.changed)
    assert tuple(bench.load(text)[:3]) == ([], [], [])


def test_password_left_out_keeps_the_stored_one(bench: Bench) -> None:
    bench.load(FIRST)
    bench.load(FIRST.replace(", password: pa", ", interval: 5"))
    assert bench.password("a.example.com") == "pa"
    bench.load(FIRST.replace(": pa", ": p2"))
    assert bench.password("a.example.com") == "p2"


@pytest.mark.long
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "{hostname: b.example.com, username: u, password: pb,",
            "{hostname: b2.example.com, name: b.example.com, username: u,",
        ),
        ("username: u, password: pb,", "username: v,"),
        ("username: u, password: pb,", "username: u, port: 23,"),
        ("username: u, password: pb,", "username: u, platform: windows,"),
        ("username: u, password: pb,", "username: U,"),
        (
            "{hostname: b.example.com, username: u, password: pb,",
            "{hostname: B.example.com, name: b.example.com, username: u,",
        ),
    ],
    ids=["hostname", "username", "port", "port by platform", "case of username", "case of hostname"],
)
def test_moved_without_its_password(old: str, new: str, bench: Bench) -> None:
    """A password never goes to another host or account by itself: exit 3 with line and column, nothing changed."""
    bench.load(FIRST)
    before = bench.dump()
    fault = rf"^inventory\.yaml:{bench.line(7)}:5: .*write the password again$"
    with pytest.raises(SecretError, match=fault) as caught:
        bench.load(FIRST.replace(old, new))
    assert caught.value.exit_code == 3
    assert bench.dump() == before
    bench.load(FIRST.replace(old, new + " password: again,"))
    assert bench.password("b.example.com") == "again"


def test_every_fault_of_an_import_comes_at_once(bench: Bench) -> None:
    """Two new resources without any credential: a line for each."""
    with pytest.raises(InventoryError) as caught:
        bench.load("  - {hostname: a, username: u}\n  - {hostname: b, username: u}\n")
    places = [f"{bench.line(number)}:5" for number in (6, 7)]
    assert re.findall(r"^inventory\.yaml:(\d+:\d+): ", str(caught.value), re.MULTILINE) == places


def test_sealed_for_another_resource(bench: Bench) -> None:
    """A token copied from one resource of the file to another is refused, with line and column."""
    token = bench.vault.seal("pa", "password", "a.example.com", "a.example.com", "u", "22")
    bench.load(FIRST.replace(": pa", f": {token}"))
    assert bench.password("a.example.com") == "pa"
    before = bench.dump()
    with pytest.raises(SecretError, match=rf"^inventory\.yaml:{bench.line(7)}:5: ") as caught:
        bench.load(FIRST.replace(": pa", f": {token}").replace(": pb", f": {token}"))
    assert token not in str(caught.value) and bench.dump() == before


def test_rows_of_the_api_are_left_alone(bench: Bench) -> None:
    bench.load(FIRST)
    bench.execute("UPDATE resource SET origin = 'api' WHERE name = 'a.example.com'")
    before = bench.rows()["a.example.com"]
    changes = bench.load(B)
    assert changes == ([], [], ["c"], ["b.example.com"])
    assert bench.rows()["a.example.com"] == before
    with pytest.raises(InventoryError, match=rf"^inventory\.yaml:{bench.line(6)}:5: .*through the API"):
        bench.load(FIRST)
    assert bench.rows().keys() == {"a.example.com", "b.example.com"}


def test_trusted_host_key_is_kept_until_the_address_changes(bench: Bench) -> None:
    bench.load(FIRST)
    bench.execute("UPDATE resource SET host_key = 'ssh-ed25519 SHA256:x'")
    bench.load(FIRST.replace(": 30", ": 31"))
    assert bench.rows()["b.example.com"]["host_key"] == "ssh-ed25519 SHA256:x"
    for moved in (
        B.replace("30", "30, port: 23"),
        B.replace(": u,", ": v,"),
        B.replace("b.example.com", "c.example.com, name: b.example.com"),
    ):
        bench.load(A + moved + C)
        keys = [bench.rows()[name]["host_key"] for name in ("a.example.com", "b.example.com")]
        assert keys == ["ssh-ed25519 SHA256:x", None], moved
        bench.load(FIRST)
        bench.execute("UPDATE resource SET host_key = 'ssh-ed25519 SHA256:x'")


def test_mounts_keep_their_order(bench: Bench) -> None:
    """The first pattern that matches decides, in the database as in the file; no other order is a setting."""
    text = """\
  - {name: a, platform: local, limits: {disk_percent: {warn: 9, mounts: {"/srv/db*": 80, "/srv/*": off, /a: 9}}}}
  - {platform: http, url: "http://b/", headers: {X-B: b, X-A: a}}
"""
    bench.load(text)
    with closing(Store(bench.place)) as store, store.reading() as session:
        limit = healthchecker.load_targets(session, bench.vault)["a"].settings.limits.disk_percent
    assert limit and (limit.at("/srv/db1"), limit.at("/srv/x")) == (healthchecker.Limit(fail=80), None)
    assert bench.load(text.replace("X-B: b, X-A: a", "X-A: a, X-B: b")).changed == []
    assert bench.load(text.replace('"/srv/*": off, /a: 9', '/a: 9, "/srv/*": off')).changed == []
    text = text.replace('"/srv/db*": 80, "/srv/*": off', '"/srv/*": off, "/srv/db*": 80')
    assert bench.load(text).changed == ["a"] and bench.load(text).changed == []


# --- what is removed, and what has another name ---------------------------------------------------------------
POLLED = 1_800_000_000  # when each resource was polled once
DAY = 86_400


def polled(bench: Bench) -> None:
    """Each row has a status of its settings, history, an event and a trusted key."""
    with closing(Store(bench.place)) as store, store.writing() as session:
        for row in session.scalars(sqlalchemy.select(Resource)):
            row.host_key = f"ssh-ed25519 SHA256:{row.name}"
            session.add(healthchecker.Status(
                resource_id=row.id, settings_digest=row.settings_digest, credential_digest=row.credential_digest,
                state="healthy", cause="", reason="", since_at=POLLED, polled_at=POLLED, good=1, bad=0, seconds=0,
                sample="null"))  # fmt: skip
            session.execute(healthchecker.SAMPLES.insert().values(
                resource_id=row.id, at=POLLED, reason=row.name, poll="h", standing="h", counts=60))  # fmt: skip
            healthchecker.record_event(session, "state", f"of {row.name}", resource=row.name, at=POLLED)


class Past(NamedTuple):
    """What is known of a resource."""

    id: int
    host_key: str | None
    history: list[str]
    events: list[str]
    is_current: bool  # the stored state is one of these settings


def past(bench: Bench) -> dict[str, Past]:
    """Of what is watched, by name."""
    with closing(Store(bench.place)) as store, store.reading() as session:
        return {row.name: Past(
            row.id, row.host_key, [poll.reason for poll in healthchecker.samples(session, row.id, math.inf)],
            [event.text for event in healthchecker.events(session, resource=row.name)],
            healthchecker.status_of(row, status).state == "healthy")
            for row, status in session.execute(healthchecker.RESOURCES)}  # fmt: skip


def test_what_was_removed_comes_back_with_its_past(bench: Bench) -> None:
    """With the same name and host; meanwhile nothing shows it, and its secret has gone."""
    bench.load(FIRST)
    polled(bench)
    before = past(bench)
    assert bench.load(B + C).removed == ["a.example.com"]
    assert past(bench).keys() == {"b.example.com", "c"}
    with closing(Store(bench.place)) as store, store.reading() as session:
        assert healthchecker.load_targets(session, bench.vault).keys() == {"b.example.com", "c"}
        assert session.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(Resource)) == 2
        assert "a.example.com" not in [name for name, *_ in session.execute(healthchecker.METRIC_ROWS)]
    assert bench.load(B + C) == ([], [], [], ["b.example.com", "c"])
    [row] = execute(bench.place, "SELECT password, place FROM resource WHERE name = 'a.example.com'")
    assert tuple(row) == (None, "")
    with pytest.raises(InventoryError, match=rf"^inventory\.yaml:{bench.line(6)}:5: .*password.* is missing"):
        bench.load(A.replace(", password: pa", "") + B + C)
    assert bench.load(FIRST) == (["a.example.com"], [], [], ["b.example.com", "c"])
    assert past(bench)["a.example.com"] == before["a.example.com"]._replace(is_current=False)
    assert bench.password("a.example.com") == "pa"


def test_another_host_of_the_same_name_begins_anew(bench: Bench) -> None:
    bench.load(FIRST)
    polled(bench)
    bench.load(B + C)
    bench.load("  - {hostname: other.example.com, name: a.example.com, username: u, password: p}\n" + B + C)
    found = past(bench)["a.example.com"]
    assert (found.host_key, found.history, found.is_current) == (None, [], False)


def test_what_was_removed_goes_with_its_history(bench: Bench) -> None:
    """When retention has taken its last poll and its last average; what is watched stays."""
    bench.load(FIRST)
    polled(bench)
    ids = {one.id: name for name, one in past(bench).items()}
    bench.load(B + C)
    with closing(Store(bench.place)) as store, store.writing() as session:
        everything = sqlalchemy.select(Resource.name).execution_options(removed=True)
        for days in (1, 3, 80, 91):
            now = POLLED + days * DAY
            for number in ids:
                healthchecker.roll_up(session, number, POLLED + 900 * (days > 1))
                healthchecker.prune(session, number, healthchecker.Retention(), now)
            left = session.scalars(everything).all()
            assert ("a.example.com" in left) is (days < 90), days
    assert sorted(left) == ["b.example.com", "c"] and len(past(bench)) == 2


def renamed(line: str, name: str, was: str) -> str:
    return line.replace("- {", f"- {{name: {name}, was: {was}, ")


@pytest.mark.long
@pytest.mark.parametrize(
    ("source", "removed_before"),
    [("plain", False), ("sealed", False), ("left out", False), ("plain", True), ("sealed", True)],
)
def test_renamed(source: str, removed_before: bool, bench: Bench) -> None:
    """History, trust, events and password follow, and the stored state counts on: the gate sees nothing of it."""
    bench.load(FIRST)
    polled(bench)
    before = past(bench)["a.example.com"]
    if removed_before:
        bench.load(B + C)
    token = bench.vault.seal("pa", "password", "a.example.com", "a.example.com", "u", "22")
    stated = {"sealed": f", password: {token}", "left out": ""}.get(source, ", password: pa")
    text = renamed(A, "new", "a.example.com").replace(", password: pa", stated) + B + C
    changes = bench.load(text)
    assert (changes.added, changes.changed)[not removed_before] == ["new"] and changes.removed == []
    found = past(bench)
    assert found.keys() == {"new", "b.example.com", "c"} and bench.password("new") == "pa"
    assert found["new"] == before._replace(is_current=not removed_before)
    assert bench.load(text)[:3] == ([], [], []), "it can stay in the file"
    assert bench.load(text.replace(", was: a.example.com", "").replace(token, "pa"))[:3] == ([], [], [])


def test_many_renamed_at_once(bench: Bench) -> None:
    """One statement reads all events, of which there may be very many, however many have another name; so does one each
    what is planned, what is told, and what the API put behind them."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(statement)

    entry = "  - {hostname: 'h[01:40].example.com', name: NAME, platform: tcp, port: 80}\n"
    bench.load(entry.replace("NAME", "'old[01:40]'") + C)
    polled(bench)
    with closing(Store(bench.place)) as store, store.writing() as session:
        behind = Resource(origin="api")
        behind.take_settings(healthchecker.ResourceSettings(
            name="behind", hostname="h", username="u", key_file="k", depends_on=("old03", "c"), proxy_jump="old04,x:22",
        ))  # fmt: skip
        receiver = healthchecker.Receiver(name="ops")
        session.add_all([behind, receiver, Maintenance(
            state="planned", start_at=0, until_at=1, reason="r",
            scope=healthchecker.Scope(resources=("c", "old01", "old02")).scope_json)])  # fmt: skip
        session.flush()
        session.add(healthchecker.Notice(
            receiver_id=receiver.id, kind="state", name="old05", text="", ending="", times=1, since_at=0, taken_at=0,
            over_at=0, told_at=0))  # fmt: skip
    settings = execute(bench.place, "SELECT name FROM setting")
    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
    try:
        changes = bench.load(entry.replace("NAME", "'new[01:40]', was: 'old[01:40]'") + C)
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", note)
    assert (len(changes.changed), changes.kept) == (40, ["c"])
    for table, count in {"event": 1, "FROM maintenance": 1, "FROM notice": 1, "FROM resource": 4}.items():
        assert len([statement for statement in seen if table in statement.split("WHERE")[0]]) == count, table
    found = {name: one.events for name, one in past(bench).items()}
    assert found == {f"new{number:02}": [f"of old{number:02}"] for number in range(1, 41)} | {
        "c": ["of c"], "behind": []}  # fmt: skip
    [work] = execute(bench.place, "SELECT scope FROM maintenance")
    assert json.loads(work[0]) == {"resources": ["c", "new01", "new02"]}
    assert [name for (name,) in execute(bench.place, "SELECT name FROM notice")] == ["new05"]
    with closing(Store(bench.place)) as store, store.reading() as session:
        [behind] = session.scalars(sqlalchemy.select(Resource).where(Resource.origin == "api"))
    assert (behind.parsed_settings.depends_on, behind.parsed_settings.proxy_jump) == (("new03", "c"), "new04,x:22")
    assert sorted(execute(bench.place, "SELECT name FROM setting")) == sorted(settings)


def test_many_faults(bench: Bench) -> None:
    """The first are shown."""
    entry = "  - {hostname: 'h[01:51].example.com', name: 'h[01:51]', username: u, password: p}\n"
    bench.load(entry)
    with pytest.raises(SecretError) as raised:
        bench.load(entry.replace("hostname: 'h", "hostname: 'other").replace(", password: p", ""))
    *first, last = str(raised.value).split("\n")
    assert len(first) == 50 and all(": write the password again" in line for line in first)
    assert last == "inventory.yaml: these are the first 50 faults; there are more"


def add_behind(bench: Bench, **more: Any) -> None:
    """What the console adds."""
    given = {"name": "x", "hostname": "x.example.com", "username": "u", "password": "px", **more}
    with closing(Store(bench.place)) as store, store.writing() as session:
        row = Resource(origin="api")
        healthchecker.update_row(row, healthchecker.ResourceSettings.model_validate(given), bench.vault)
        session.add(row)


@pytest.mark.parametrize("moved", [False, True])
def test_renamed_with_something_behind_it(bench: Bench, moved: bool) -> None:
    """What the console added follows, its state counts on; its password goes to no other host under a new name."""
    bench.load(FIRST)
    add_behind(bench, proxy_jump="me@a.example.com,a.example.com", depends_on=("a.example.com", "c"))
    polled(bench)
    before = past(bench)["x"]
    new = renamed(A, "new", "a.example.com")
    bench.load((new.replace("hostname: a.", "hostname: other.") if moved else new) + B + C)
    with closing(Store(bench.place)) as store, store.reading() as session:
        found = healthchecker.load_targets(session, bench.vault)["x"]
        named = [healthchecker.named_by(session, name) for name in ("me@a.example.com", "new")]
    assert named == ["", "stays while it is named by x"], "an address names no resource"
    assert (found.settings.hops, found.settings.depends_on) == (["me@a.example.com", "new"], ("new", "c"))
    assert past(bench)["x"] == before._replace(is_current=not moved)
    assert (found.settings.secrets, bool(found.fault)) == (({}, True) if moved else ({"password": "px"}, False))


@pytest.mark.parametrize("name", ["none", "ops@gw", "a,b"])
def test_renamed_to_what_means_something_else_in_a_way(bench: Bench, name: str) -> None:
    """What was behind is behind nothing that there is, until who added it says what is meant."""
    bench.load(FIRST)
    add_behind(bench, proxy_jump="a.example.com")
    bench.load(renamed(A, f"'{name}'", "a.example.com") + B + C)
    with closing(Store(bench.place)) as store, store.reading() as session:
        assert healthchecker.load_targets(session, bench.vault)["x"].settings.hops == ["a.example.com"]


def test_renamed_to_what_was_removed(bench: Bench) -> None:
    """The past of the one that is watched stays; and a name that nobody had changes nothing."""
    bench.load(FIRST)
    polled(bench)
    before = past(bench)["b.example.com"]
    bench.load(B + C)
    bench.load(renamed(B, "a.example.com", "b.example.com") + C)
    assert past(bench)["a.example.com"] == before._replace(events=[*before.events, "of a.example.com"])
    assert bench.load(renamed(B, "a.example.com", "nobody") + C)[:3] == ([], [], [])


def test_renamed_with_a_damaged_secret(bench: Bench) -> None:
    """The password of the file takes its place, and without one it is said to be missing."""
    bench.load(FIRST)
    bench.execute("UPDATE resource SET password = 'HC2.damaged' WHERE name = 'a.example.com'")
    text = renamed(A, "new", "a.example.com") + B + C
    with pytest.raises(InventoryError, match=rf"^inventory\.yaml:{bench.line(6)}:5: new: password, .* is missing"):
        bench.load(text.replace(", password: pa", ""))
    assert bench.load(text).changed == ["new"] and bench.password("new") == "pa"


def test_renamed_without_its_key(bench: Bench) -> None:
    """What is sealed for another host does not open by a rename."""
    bench.load(FIRST)
    token = bench.vault.seal("pb", "password", "b.example.com", "b.example.com", "u", "22")
    before = bench.dump()
    with pytest.raises(SecretError, match=rf"^inventory\.yaml:{bench.line(6)}:5: new: .*belongs to another name"):
        bench.load(renamed(A, "new", "b.example.com").replace(": pa", f": {token}") + C)
    assert bench.dump() == before


def test_revision_rises_with_a_change_only(bench: Bench) -> None:
    def revision() -> int:
        with closing(Store(bench.place)) as store, store.reading() as session:
            return healthchecker.revision(session)

    seen = []
    for text in (FIRST, FIRST, FIRST.replace("30", "31"), B):
        bench.load(text)
        seen.append(revision())
    assert seen[0] == seen[1] < seen[2] < seen[3]


def test_names_that_look_like_sql(bench: Bench) -> None:
    names = ["'; DROP TABLE resource; --", '"', "%", "a b", "ä€😀", "a" * 200]
    quoted = ["'" + name.replace("'", "''") + "'" for name in names]
    bench.load("".join(f"  - {{name: {name}, platform: local}}\n" for name in quoted))
    assert bench.rows().keys() == set(names)


# --- one process, many threads -------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.windows
def test_fifty_writers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, then write, in one transaction each: nobody is turned away and nothing is lost."""
    monkeypatch.setattr(healthchecker, "BUSY_TIMEOUT", 60.0)  # SQLite has who waits sleep, and keeps no order
    bench.load("")
    with closing(Store(bench.place)) as store:

        def write(number: int) -> None:
            for turn in range(4):
                with store.writing() as session:
                    count = session.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(Resource))
                    healthchecker.revise(session)
                    session.add(
                        Resource(name=f"{number}.{turn}", hostname="h", platform="local", port=count, settings="{}")
                    )

        with ThreadPoolExecutor(50) as pool:
            for future in [pool.submit(write, number) for number in range(50)]:
                future.result(120)
        with store.reading() as session:
            assert healthchecker.revision(session) == 200
            ports = session.scalars(sqlalchemy.select(Resource.port)).all()
    assert sorted(ports) == list(range(200)), "two transactions saw the same state"


def test_a_failed_transaction_leaves_nothing(bench: Bench) -> None:
    bench.load(FIRST)
    before = bench.dump()
    with closing(Store(bench.place)) as store:
        with pytest.raises(ZeroDivisionError), store.writing() as session:
            session.execute(sqlalchemy.delete(Resource))
            raise ZeroDivisionError
        with store.writing() as session:  # and the lock is free again
            assert session.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(Resource)) == 3
    assert bench.dump() == before


@pytest.mark.long
@pytest.mark.windows
def test_check_while_others_write(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A rehearsal of the import beside a service that writes all the time: neither is turned away."""
    hosts = "".join(f"  - {{hostname: h{n}.example.com, username: u, password: p}}\n" for n in range(120))
    bench.load(hosts)
    path = write_inventory(bench.folder, hosts.replace("p}", "q}"))
    ended, written, faults = threading.Event(), [0], []

    def write() -> None:
        with closing(Store(bench.place)) as store:
            while not ended.wait(0.002):
                try:
                    with store.writing() as session:
                        session.merge(Setting(name="other", value=written[0]))
                    written[0] += 1
                except sqlalchemy.exc.SQLAlchemyError as error:
                    faults.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3):
            assert healthchecker.main(["--inventory", str(path), "check"]) == 0
        wait_for(lambda: written[0] > 10)
    finally:
        ended.set()
        thread.join(60)
    assert not faults
    assert "120 changed" in capsys.readouterr().out
    assert bench.password("h7.example.com") == "p"


def test_check_waits_for_nobody(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor could it, then, have others wait: what is written meanwhile it does not see."""
    bench.load(FIRST)
    path = write_inventory(bench.folder, renamed(A, "new", "a.example.com") + B)
    with closing(Store(bench.place)) as store, store.writing() as session:
        session.execute(sqlalchemy.delete(Resource))
        begin = time.monotonic()
        assert healthchecker.main(["--inventory", str(path), "check"]) == 0
        assert time.monotonic() - begin < healthchecker.BUSY_TIMEOUT
        session.rollback()
    assert "0 added, 1 changed, 1 removed, 1 kept; changed: new; removed: c" in capsys.readouterr().out
    assert bench.rows().keys() == {"a.example.com", "b.example.com", "c"}


# --- kill -9 during the import -------------------------------------------------------------------------------
MANY = 45


def hosts(interval: int) -> str:
    """MANY resources; a third of them is only in the version of this interval."""
    names = [f"{interval if n % 3 == 0 else 'h'}x{n}" for n in range(MANY)]
    return "".join(
        f"  - {{hostname: {name}, username: u, password: {interval}, interval: {interval}}}\n" for name in names
    )


def import_file(path: str, started: Any) -> None:
    """For a process of its own: what a start does with the inventory."""
    logging.disable()
    setup = healthchecker.Installation(Path(path))
    vault = setup.open_vault(None)
    started.send(None)
    with closing(Store(setup.database)) as store, store.writing() as session:
        healthchecker.ensure_first_user(session)
        healthchecker.import_inventory(session, setup.inventory, vault)


def killed(action: Callable[[str, Any], None], path: Path, seconds: float) -> float:
    """Runs `action` in another process and kills that after `seconds`; the time for which it ran."""
    receiver, sender = fresh_processes().Pipe(duplex=False)
    process = fresh_processes().Process(target=action, args=(str(path), sender))
    process.start()
    with receiver, sender:
        assert receiver.poll(120)  # the fork server's first process loads all of this first
        begin = time.monotonic()
        process.join(seconds)
        ran = time.monotonic() - begin
        process.kill()
        process.join()
        process.close()
    return ran


@pytest.mark.long
def test_kill_during_import(bench: Bench, often: Callable[[int, int], int]) -> None:
    """All old or all new, at every moment, and every row complete."""
    moments = random.Random(4711)
    texts = {interval: hosts(interval) for interval in (10, 20)}
    bench.load(texts[10])
    path = write_inventory(bench.folder, texts[20])
    whole = killed(import_file, path, 30)
    current, outcomes = 20, list[str]()
    for part in (0.0, 60.0, *(moments.uniform(0, 1.1) for _ in range(often(4, 48)))):  # at once, and never
        wanted = 30 - current
        write_inventory(bench.folder, texts[wanted])
        killed(import_file, path, part * whole)
        assert bench.place.inspect()
        rows = bench.rows()
        assert len(rows) == MANY
        [interval] = {row["interval"] for row in rows.values()}
        assert {name for name in rows if name[0] != "h"} == {f"{interval:.0f}x{n}" for n in range(0, MANY, 3)}
        assert {bench.password(name) for name in random.Random(0).sample(sorted(rows), 8)} == {f"{interval:.0f}"}
        outcomes.append("old" if interval == current else "new")
        current = int(interval)
    assert outcomes[:2] == ["old", "new"], outcomes


def test_kill_during_the_first_start(bench: Bench, often: Callable[[int, int], int]) -> None:
    """The database is absent, empty or whole, and the next start makes it whole."""
    moments = random.Random(1147)
    path = write_inventory(bench.folder, hosts(10))

    def first_start(seconds: float) -> float:
        for leftover in bench.folder.glob("healthchecker.db*"):
            leftover.unlink()
        if not isinstance(bench.place, SqliteFile):
            execute(bench.place, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        return killed(import_file, path, seconds)

    whole = first_start(30)
    for _ in range(often(2, 16)):
        first_start(moments.uniform(0, whole))
        if bench.place.inspect():
            assert len(bench.rows()) in (0, MANY)
        bench.load(hosts(10))
        assert len(bench.rows()) == MANY


# --- databases as they are found -----------------------------------------------------------------------------
@functools.cache
def good_content() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "healthchecker.db"
        with closing(Store(path)) as store, store.writing() as session:
            for number in range(300):
                session.add(Resource(name=f"n{number}", hostname="h" * 200, platform="local", port=1, settings="{}"))
        return path.read_bytes()


def good(path: Path) -> None:
    path.write_bytes(good_content())


def overwritten(path: Path, begin: int, count: int, byte: bytes = b"\xa5") -> None:
    raw = bytearray(path.read_bytes())
    raw[begin : begin + count] = byte * len(raw[begin : begin + count])
    path.write_bytes(raw)


def executed(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def then(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        for step in steps:
            step(path)

    return make


DATABASES: dict[str, Callable[[Path], object]] = {
    "damaged page": then(good, lambda path: overwritten(path, 3 * 4096, 4096)),
    "damaged header": then(good, lambda path: overwritten(path, 0, 100)),
    "damaged schema": then(good, lambda path: overwritten(path, 100, 3000)),
    "truncated": then(good, lambda path: os.truncate(path, 5 * 4096)),
    "truncated within a page": then(good, lambda path: os.truncate(path, 6000)),
    "truncated within the header": then(good, lambda path: os.truncate(path, 50)),
    "text file": lambda path: path.write_text(
        "my notes, which are of more than a hundred letters " * 20, encoding="utf-8"
    ),
    "short text": lambda path: path.write_text("x", encoding="utf-8"),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40),
    "zeros": lambda path: path.write_bytes(bytes(8192)),
    "another program's": lambda path: executed(path, "CREATE TABLE song (title TEXT)", "INSERT INTO song VALUES ('x')"),
    "another program's with a version": lambda path: executed(
        path, "CREATE TABLE song (title TEXT)", "PRAGMA user_version = 1"
    ),
    "another program's resource table": lambda path: executed(
        path, "CREATE TABLE resource (id INTEGER, title TEXT)", "PRAGMA user_version = 1"
    ),
    "newer schema": then(good, lambda path: executed(path, f"PRAGMA user_version = {healthchecker.SCHEMA + 1}")),
    "a column lost": then(good, lambda path: executed(path, "ALTER TABLE resource DROP COLUMN settings")),
    "directory": lambda path: path.mkdir(),
}


def crashed(path: Path, *statements: str) -> None:
    """What a kill leaves behind: the last transactions stand in the log beside the file alone."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in ("PRAGMA journal_mode = WAL", *statements):
            connection.execute(statement)
        files = {found: found.read_bytes() for found in (path, path.with_name(path.name + "-wal"))}
    for found, content in files.items():
        found.write_bytes(content)


DATABASES |= {
    "newer schema, crashed": then(
        good, lambda path: crashed(path, f"PRAGMA user_version = {healthchecker.SCHEMA + 1}")
    ),
    "another program's, crashed": lambda path: crashed(path, "CREATE TABLE song (title TEXT)"),
}


def picture(path: Path) -> object:
    """What must not change."""
    log = path.with_name(path.name + "-wal")
    return sorted(path.iterdir()) if path.is_dir() else (path.read_bytes(), log.read_bytes() if log.exists() else b"")


@pytest.mark.long
@pytest.mark.of_files
@pytest.mark.parametrize("command", [["check"], ["seal"], ["keys", "rotate"], ["trust", "c"]], ids=" ".join)
@pytest.mark.parametrize("case", DATABASES)
def test_found_database(case: str, command: list[str], bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 4, one line, the file untouched byte for byte, with no journal beside it."""
    path = write_inventory(bench.folder, C)
    DATABASES[case](bench.database)
    before = picture(bench.database)
    assert healthchecker.main(["--inventory", str(path), *command]) == 4
    assert picture(bench.database) == before
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1 and "healthchecker.db" in output.err
    assert not (bench.folder / "keys" / "next.pem").exists()


@pytest.mark.of_files
def test_a_valid_but_empty_file_becomes_the_database(bench: Bench) -> None:
    bench.database.write_bytes(b"")
    assert len(bench.load(FIRST).added) == 3


@pytest.mark.of_files
@pytest.mark.parametrize(("url", "code"), [("nowhere/x.db", 4), ("inventory.yaml/x.db", 4), ("folder", 4), ("keys", 2)])
def test_database_in_an_impossible_place(
    url: str, code: int, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_inventory(bench.folder, C, service=f"  database: sqlite:///{url}")
    (bench.folder / "folder").mkdir()
    for command in (["keys", "rotate"], ["check"]):
        assert healthchecker.main(["--inventory", str(path), *command]) == code
        assert len(capsys.readouterr().err.splitlines()) <= 1
    assert not (bench.folder / "nowhere").exists()


@pytest.mark.of_files
def test_open_from_elsewhere(
    bench: Bench, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is relative to the inventory; spaces, % and # in it mean themselves."""
    folder = bench.folder / "a b%20#c?d" if sys.platform != "win32" else bench.folder / "a b%20#c"
    folder.mkdir()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    inner = Bench(folder)
    inner.load(FIRST)
    assert len(inner.rows()) == 3 and len(inner.load(FIRST).kept) == 3


# --- starts that must fail, each a process of its own --------------------------------------------------------
def start_corrupt(folder: Path) -> Path:
    DATABASES["damaged page"](folder / "healthchecker.db")
    return write_inventory(folder, C)


def start_foreign(folder: Path) -> Path:
    DATABASES["another program's"](folder / "healthchecker.db")
    return write_inventory(folder, C)


def start_without_keys(folder: Path) -> Path:
    Bench(folder).load(FIRST)
    shutil.rmtree(folder / "keys")
    return write_inventory(folder, FIRST)


def start_without_keys_and_passwords(folder: Path) -> Path:
    start_without_keys(folder)
    return write_inventory(folder, re.sub(", password: p.", "", FIRST))


def start_with_other_keys(folder: Path) -> Path:
    path = start_without_keys(folder)
    Vault(folder / "keys").create()
    return path


def start_moved(folder: Path) -> Path:
    Bench(folder).load(FIRST)
    return write_inventory(folder, FIRST.replace("username: u, password: pb", "username: v"))


def start_nowhere(folder: Path) -> Path:
    return write_inventory(folder, C, service="  database: sqlite:///nowhere/x.db")


STARTS: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "corrupt database": (start_corrupt, 4, r"healthchecker\.db"),
    "another program's database": (start_foreign, 4, "belongs to another program"),
    "keys missing": (start_without_keys, 3, "KEY"),
    "keys and passwords missing": (start_without_keys_and_passwords, 3, "KEY"),
    "other keys": (start_with_other_keys, 3, "KEY"),
    "username changed without password": (start_moved, 3, r"^inventory\.yaml:7:5: .*write the password again"),
    "database folder missing": (start_nowhere, 4, r"x\.db"),
}


def snapshot(folder: Path) -> dict[str, object]:
    """All files; a database by its content, since opening one in WAL mode may move bytes between its files."""
    shown: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith((".lock", "-wal", "-shm", "-journal")):
            try:
                shown[path.name] = dump(path) if path.suffix == ".db" else path.read_bytes()
            except sqlite3.Error:
                shown[path.name] = path.read_bytes()
    return shown


@pytest.mark.parametrize(("make", "code", "message"), STARTS.values(), ids=STARTS)
def test_failed_start(make: Callable[[Path], Path], code: int, message: str, tmp_path: Path) -> None:
    """One line, the right exit code, and no file changed or added."""
    path = make(tmp_path)
    before = snapshot(tmp_path)
    exit_code, output = run_cheaply("--inventory", str(path))
    assert exit_code == code, output
    told = [line for line in output.splitlines() if " INFO " not in line]  # of a start that takes its time
    assert len(told) == 1
    assert re.search(message.replace("KEY", loaded_vault().key_id), told[0])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("case", ["missing", "empty"])
def test_the_database_of_an_earlier_start_is_gone(
    case: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its mount is missing, or a crash left nothing in it: no start takes that for the first one, which would open the
    gate without what was added in the console, and to the documented password."""
    path, mark = write_inventory(bench.folder, C), bench.folder / "keys" / "started"
    assert healthchecker.main(["--inventory", str(path), "seal"]) == 0 and not mark.exists()
    with Service(path):
        pass
    if isinstance(bench.place, SqliteFile):
        for left in bench.folder.glob("healthchecker.db*"):
            left.unlink()
        if case == "empty":
            bench.database.touch()
    else:
        execute(bench.place, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    before = snapshot(bench.folder)
    for command in [], ["check"], ["user", "list"]:
        code, said = run_cheaply("--inventory", str(path), *command)
        assert code == 4 and len(said.splitlines()) == 1, said
        assert "of an earlier start is not there: mount it; or move " in said
        assert f"or remove {mark} to begin anew" in said
        assert snapshot(bench.folder) == before
    mark.unlink()
    with Service(path):
        assert mark.exists()


def test_check_names_what_was_added_in_the_console_and_does_not_open(bench: Bench) -> None:
    """As in a database of before a rotation, beside the keys of today: a start would not poll it."""
    bench.load(FIRST)
    (bench.folder / "before").mkdir()
    other = Vault(bench.folder / "before")
    other.create()
    bound = "password", "b.example.com", "b.example.com", "u", str(bench.rows()["b.example.com"]["port"])
    token = other.seal("pb", *bound)
    bench.execute("UPDATE resource SET origin = 'api', password = :token WHERE name = 'b.example.com'", token=token)
    path = write_inventory(bench.folder, "".join(line for line in FIRST.splitlines(True) if "b.example" not in line))
    code, said = run_cheaply("--inventory", str(path), "check")
    assert code == 0 and f"b.example.com: secrets are sealed with key {other.key_id}" in said, said


@pytest.mark.of_files
@pytest.mark.parametrize("case", ["without its log", "another folder", "another folder, without its log"])
def test_a_database_that_was_not_carried_along_begins_nothing(case: str, bench: Bench) -> None:
    """Its console would be open to the documented password, and its gate without what was added there."""
    path, main = write_inventory(bench.folder, C), b""
    with Service(path):
        main = bench.database.read_bytes()      # tables, whose rows are all in the log
    bench.database.unlink()
    if case.startswith("another folder"):
        moved = bench.folder / "moved"
        moved.mkdir()
        for name in "inventory.yaml", "keys":
            (bench.folder / name).rename(moved / name)
        path = moved / "inventory.yaml"
    if case.endswith("without its log"):
        (path.parent / "healthchecker.db").write_bytes(main)
    assert run_cheaply("--inventory", str(path), "status")[0] == 3
    for words in [], ["check"], ["user", "list"]:
        code, said = run_cheaply("--inventory", str(path), *words)
        assert code == 4, said
        assert f"database {path.parent / 'healthchecker.db'} of an earlier start " in said
        assert f"or remove {path.parent / 'keys' / 'started'} to begin anew" in said


@pytest.mark.of_files
def test_another_database_begins_anew(bench: Bench) -> None:
    """Whoever names it says so; and the one before is known still."""
    for name in "one", "other", "one":
        with Service(write_inventory(bench.folder, C, service=f"  database: sqlite:///{name}.db")):
            assert (bench.folder / f"{name}.db").exists()


@pytest.mark.of_files
@pytest.mark.skipif(sys.platform == "win32", reason="there an open file cannot be replaced")
@pytest.mark.parametrize("way", ["replaced", "removed"])
def test_a_database_that_is_replaced_under_the_service(way: str, bench: Bench) -> None:
    """What is said then would stand in another file than the service reads, and what that writes would be lost: it ends
    and says so, and no command mixes the new file with the log of the one before."""
    path = write_inventory(bench.folder, "  - {name: c, platform: tcp, hostname: 127.0.0.1, port: 9}\n")
    with Service(path, code=4) as service:
        with closing(Store(bench.database)) as store:       # as a service that has stopped leaves it
            copy = bench.folder / "good.db"
            cast("SqliteFile", store.database).copy(copy)
        os.kill(service.pid, signal.SIGSTOP)    # that it does not see it first
        if way == "replaced":
            copy.replace(bench.database)
        else:
            bench.database.unlink()
        def files() -> dict[str, bytes]:
            return {each.name: each.read_bytes() for each in bench.folder.glob("healthchecker.db*")}

        before = files()
        for words in ["gate", "close"], ["status"], ["user", "list"], ["backup", str(bench.folder / "b.tgz")]:
            code, said = run_cheaply("--inventory", str(path), *words)
            assert code == (3 if words == ["status"] else 4), said
            assert "its file was replaced or moved away under the running service" in said
            assert files() == before
        os.kill(service.pid, signal.SIGCONT)
        line = service.wait_line("its file was replaced or moved away under the running service")
        assert str(bench.database) in line
        assert service.process.wait(30) == 4
        assert "no critical resource is watched" not in service.output
    [log] = [each for each in bench.folder.glob("healthchecker.db-wal")]
    assert log.stat().st_size == 0, "it would be played into the new file"
    if way == "replaced":
        with Service(path) as service:
            assert "1 kept" in service.output


def test_rows_that_are_gone_are_not_taken_for_an_empty_inventory(bench: Bench) -> None:
    """Whoever has emptied the tables: what was watched is watched on."""
    path = write_inventory(bench.folder, "  - {name: c, platform: tcp, hostname: 127.0.0.1, port: 9}\n")
    with Service(path) as service:
        bench.execute("DELETE FROM setting WHERE name = 'revision'")
        bench.execute("DELETE FROM resource")
        service.wait_line("the configuration cannot be taken over: StorageError: the rows are gone")
        assert service.get("/-/readyz").status == 503


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_a_database_in_a_folder_that_nobody_may_enter(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o000)
    path = write_inventory(tmp_path, C, f"  database: sqlite:///{tmp_path / 'shut' / 'x.db'}\n")
    for words in ["check"], ["status"], ["gate"], []:
        code, said = run_cheaply("--inventory", str(path), *words, unprivileged=True)
        assert code == (3 if words == ["status"] else 4), said
        assert "shut" in said


@pytest.mark.of_files
@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_a_second_name_of_a_database(bench: Bench) -> None:
    """Two services on it would not see each other, and each have a log of its own."""
    shared, release = bench.folder / "shared", bench.folder / "release"
    for folder in shared, release:
        folder.mkdir()
    (release / "healthchecker.db").symlink_to(shared / "healthchecker.db")
    (release / "keys").symlink_to(prepared_keys(bench.folder))
    linked = write_inventory(release, C)
    path = write_inventory(bench.folder, C, f"  database: sqlite:///{shared / 'healthchecker.db'}\n")
    with Service(linked):
        code, said = run_cheaply("--inventory", str(path))
        assert code == 4 and "another HealthChecker is using" in said
        assert run_cheaply("--inventory", str(path), "status")[0] in (0, 3)
    assert {each.name for each in release.iterdir()} == {"healthchecker.db", "inventory.yaml", "keys"}
    with Service(path):
        pass
    os.link(shared / "healthchecker.db", bench.folder / "other.db")
    code, said = run_cheaply("--inventory", str(path), "check")
    assert code == 4 and "has 2 names (hard links)" in said
    with Service(path) as service:  # it may be a backup's, for a moment: what ended with 4 stays down
        assert "has 2 names (hard links)" in service.output


@pytest.mark.of_files
@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be moved there")
def test_a_database_that_is_away_for_a_moment_ends_nothing(bench: Bench) -> None:
    """A link that is switched, or a share that is mounted again."""
    bench.load("")
    lost, away = threading.Event(), bench.folder / "away.db"
    database = SqliteFile(bench.database)
    with database.lock(lost.set), closing(Store(database, locked=True)) as store:
        bench.database.rename(away)
        back = threading.Timer(0.3, away.rename, [bench.database])
        back.start()
        with store.writing() as session:
            healthchecker.revise(session)
        back.join()
        assert not lost.is_set()
        bench.database.rename(away)
        with pytest.raises(StorageError, match="replaced or moved away"), store.writing():
            pass
        assert lost.is_set()


def test_second_service_on_one_database(bench: Bench) -> None:
    """It ends with one line; the first goes on."""
    path = write_inventory(bench.folder, C)
    with Service(path) as service:
        code, said = run_cheaply("--inventory", str(path))
        assert code == 4 and len(said.splitlines()) == 1
        assert "another HealthChecker" in said
        write_inventory(bench.folder, C, f"  listen: 127.0.0.1:{service.port}")  # as it is in life
        code, said = run_cheaply("--inventory", str(path))
        assert code == 2 and len(said.splitlines()) == 1
        assert "the service of inventory.yaml runs already: `reload` has it take the inventory over" in said
        assert service.get("/-/livez").status == 200
        log = re.findall("inventory: .*", service.output)
    assert log == ["inventory: 1 added, 0 changed, 0 removed, 0 kept; added: c"]


@pytest.mark.skipif(
    sys.platform == "win32", reason="kill -9 is a POSIX word; a Windows process is always ended like that"
)
def test_start_after_kill(bench: Bench) -> None:
    """A killed service leaves no lock behind."""
    path = write_inventory(bench.folder, C)
    with contextlib.suppress(AssertionError), Service(path) as service:
        service.kill()
    with Service(path) as service:
        assert "1 kept" in service.output


@pytest.mark.long
@pytest.mark.windows
@pytest.mark.of_files
def test_a_lock_that_is_no_file_of_ours_is_left_closed(tmp_path: Path) -> None:
    lock = tmp_path / "x.db.lock"
    lock.write_text("no database, but as long as one" * 100, encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be used: file is not a database") as refused:
        healthchecker.SqliteFile(tmp_path / "x.db").lock()
    assert str(lock) not in {file.path for file in psutil.Process().open_files()}, refused


@pytest.mark.long
@pytest.mark.windows
def test_locked_by_a_dead_process(bench: Bench) -> None:
    """The lock ends with its process, whatever the way."""
    code = (
        "import sys, healthchecker, pathlib; lock = healthchecker.SqliteFile(pathlib.Path(sys.argv[1])).lock(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(bench.database)],
        cwd=Path(healthchecker.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        try:
            assert holder.stdout and holder.stdout.readline().strip() == b"held"
            with pytest.raises(StorageError, match="another HealthChecker"):
                healthchecker.SqliteFile(bench.database).lock()
        finally:
            holder.kill()
            holder.communicate()
    with healthchecker.SqliteFile(bench.database).lock():
        pass


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
@pytest.mark.parametrize("mode", [0o700, 0o500])
def test_what_is_behind_a_link_is_written_beside_its_target(mode: int, tmp_path: Path) -> None:
    """Or a start would wait for ever."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/hc.db").touch()
    (tmp_path / "hc.db").symlink_to(tmp_path / "disk/hc.db")
    (tmp_path / "disk").chmod(mode)
    try:
        with without_root_rights():
            assert healthchecker.is_writable(tmp_path / "hc.db") is (mode == 0o700)
    finally:
        (tmp_path / "disk").chmod(0o700)


# Has the kernel answer as NFS without lockd does, through seccomp.
NO_LOCKS = """
import ctypes, platform, struct
number = {"x86_64": 72, "aarch64": 25}[platform.machine()]  # of fcntl
steps = [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 24), (0x15, 0, 1, 6),  # its second argument is F_SETLK
         (0x06, 0, 0, 0x50000 | 37), (0x06, 0, 0, 0x7fff0000)]  # then ENOLCK
filter = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(filter)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    raise SystemExit(f"seccomp: {ctypes.get_errno()}")
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="no seccomp")
def test_a_folder_that_locks_no_files(tmp_path: Path) -> None:
    """Nobody else is using the database, which is what SQLite takes it for."""
    path = write_inventory(tmp_path, "  - {name: one, platform: simulated}\n")
    (tmp_path / "sitecustomize.py").write_text(NO_LOCKS, encoding="utf-8")
    for words in ((), ("check",)):
        ended = subprocess.run([*Program(path).command, *words], env=environment({"PYTHONPATH": str(tmp_path)}),
                               check=False, capture_output=True, encoding="utf-8", timeout=120)  # fmt: skip
        assert ended.returncode == 4 and "another HealthChecker" not in ended.stderr, ended
        assert f"database {tmp_path / 'healthchecker.db'}: its folder locks no files" in ended.stderr, ended
