"""What is of PostgreSQL alone: its URL and password, whose database it is, one service at a time, lost connections,
poolers. What both kinds of database do is tested with the sections that use them."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy
from conftest import wait_for
from console import Client, local_console, prepared_database
from postgres import PASSWORD, URL_FILE, Postgres, Program, database_in, execute, free_port, open_postgres, refusing
from pydantic import SecretStr
from service import Service, prepared_keys, run, write_inventory
from test_history import Notebook
from wsman_server import Certificate, make_certificate

import healthchecker
from healthchecker import (
    PATIENCE,
    Claim,
    InventoryError,
    PostgresServer,
    ServiceSettings,
    Setting,
    SqliteFile,
    StorageError,
    Store,
    UsageError,
    User,
    database_of,
    load_inventory,
    revise,
    revision,
)

HERE = "  - {name: here, platform: simulated, interval: 1, mean_healthy: 1e6, mean_unhealthy: 0.001}"
URL = "postgresql+psycopg://hc@db.example.com/hc"


# --- the inventory ---
FAULTS = {
    "mysql://hc@db.example.com/hc": "must be sqlite:///path or postgresql+psycopg://user@host/name",
    "postgresql://hc@db.example.com/hc": "must be sqlite:///path or postgresql+psycopg://user@host/name",
    "postgresql+psycopg://db.example.com/hc": "must be sqlite:///path or postgresql+psycopg://user@host/name",
    "postgresql+psycopg://hc@db.example.com": "must be sqlite:///path or postgresql+psycopg://user@host/name",
    "postgresql+psycopg://hc@/hc": "must be sqlite:///path or postgresql+psycopg://user@host/name",
    "postgresql+psycopg://hc@db.example.com:s3cret/hc": "must be sqlite:///path or postgresql+psycopg://user@host/name",
    "postgresql+psycopg://hc:s3cret@db.example.com/hc": "holds a password; write it as database_password,",
    "postgresql+psycopg://hc@db.example.com/hc?password=s3cret": "holds a password; write it as database_password,",
    "postgresql+psycopg://hc@db.example.com/hc?sslmod=require": "has an option that is unknown; did you mean sslmode?",
    "postgresql+psycopg://hc@db.example.com/hc?xyz=s3cret": "has an option that is unknown; known are host, port,",
}


@pytest.mark.parametrize("url", FAULTS)
def test_urls_that_cannot_be(url: str, tmp_path: Path) -> None:
    """Named with their place, and never shown."""
    with pytest.raises(InventoryError) as caught:
        load_inventory(write_inventory(tmp_path, service=f"  database: '{url}'\n"))
    assert f"inventory.yaml:5:13: service.database: {FAULTS[url]}" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("url", "shown"), [
    (URL, URL),
    (f"{URL}?sslmode=verify-full&sslrootcert=ca.pem", f"{URL}?sslmode=verify-full&sslrootcert=%2Fca.pem"),
    (f"{URL}?sslrootcert=system", f"{URL}?sslrootcert=system"),
    (f"{URL}?require_auth=md5", f"{URL}?require_auth=md5"),
    ("postgresql+psycopg://hc@/hc?host=a:5432&host=b:5433", "postgresql+psycopg://hc@/hc?host=a%3A5432&host=b%3A5433"),
])  # fmt: skip
def test_urls_that_can_be(url: str, shown: str, tmp_path: Path) -> None:
    """Their files are beside the inventory."""
    service = load_inventory(write_inventory(tmp_path, service=f"  database: '{url}'\n")).service
    assert service.database.replace(str(tmp_path).replace("/", "%2F"), "") == shown
    assert service.database_path is None


@pytest.mark.parametrize(("lines", "fault"), [
    ("  database_password: s3cret\n", "service: database_password needs a database of PostgreSQL"),
    (f"  database: {URL}\n  database_password_env: HC_NOT_SET\n", "5:26: service.database_password_env: this environ"),
    (f"  database: {URL}\n  database_password_file: none\n", "5:27: service.database_password_file: this file cannot"),
    (f"  database: {URL}\n  database_password: s3cret\n  database_password_env: X\n", "use one of database_password, "),
])  # fmt: skip
def test_passwords_that_cannot_be(lines: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InventoryError) as caught:
        load_inventory(write_inventory(tmp_path, service=lines))
    assert fault.replace("5:", "6:") in str(caught.value) and "s3cret" not in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize(("change", "added"), [
    ("sys.modules['psycopg'] = None", ""),
    ("import psycopg; psycopg.__version__ = '3.1.18'", ", which has 3.1.18"),   # it hangs for good on a silent server
])
def test_missing_package(tmp_path: Path, change: str, added: str) -> None:
    """One line says what to install, at a check and at a start."""
    path = write_inventory(tmp_path, service=f"  database: {URL}\n")
    for command in (["check"], []):
        code = f"import sys, healthchecker; {change}; sys.exit(healthchecker.main({command}))"
        code = code.replace("main([", f"main(['--inventory', {str(path)!r}, ")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                              cwd=Path(healthchecker.__file__).parent)  # fmt: skip
        assert (done.returncode, done.stderr.strip()) == (UsageError.exit_code, healthchecker.NO_PSYCOPG + added)


# --- whoever has the server's port ---
ASKED = {"cleartext": struct.pack("!cII", b"R", 8, 3), "md5": struct.pack("!cII4s", b"R", 12, 5, b"salt"),
         "nothing": struct.pack("!cII", b"R", 8, 0)}  # fmt: skip


@contextlib.contextmanager
def impostor(asks: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server without TLS that asks for the password in some way; its URL, and what it was told."""
    pytest.importorskip("psycopg")
    told, sock = list[bytes](), socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError, struct.error), sock.accept()[0] as client, client.makefile("rb") as file:
                client.settimeout(10)
                while (head := file.read(8))[4:] in (b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30"):  # for TLS, or GSS
                    client.sendall(b"N")
                file.read(struct.unpack("!I", head[:4])[0] - 8)
                client.sendall(asks)
                client.shutdown(socket.SHUT_WR)
                told.append(file.read1())

    ended, thread = threading.Event(), threading.Thread(target=serve)
    thread.start()
    try:
        yield f"postgresql+psycopg://hc@127.0.0.1:{sock.getsockname()[1]}/hc", told
    finally:
        ended.set()
        socket.create_connection(sock.getsockname()).close()
        thread.join()
        sock.close()


@pytest.mark.parametrize("more", ["", "?sslmode=prefer"])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("found", ["stated", "file"])
def test_no_password_in_clear(asked: str, more: str, found: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Nor a server that is believed because it asks for none; the line says what to do."""
    path = tmp_path / "pgpass"
    path.write_text("*:*:*:*:s3cret", encoding="utf-8")
    path.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(path))
    with impostor(ASKED[asked]) as (url, told):
        server = PostgresServer(url + more, SecretStr("s3cret") if found == "stated" else None)
        with pytest.raises(StorageError) as caught:
            server.inspect()
        if (found, asked) != ("file", "nothing"):   # who has no password is known to the server otherwise
            assert "have the server ask for the password by scram-sha-256, or write" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not [word for word in told if word[:1] == b"p"]


def test_what_the_url_says_of_passwords_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of libpq's environment is taken out of it, and comes along."""
    monkeypatch.setenv("PGPASSWORD", "s3cret")
    with impostor(ASKED["cleartext"]) as (url, told):
        for _ in range(2):      # the inventory may be read again
            database = database_of(ServiceSettings(database=f"{url}?require_auth=password"))
            with pytest.raises(StorageError):
                database.inspect()
    assert told == [b"p\0\0\0\x0bs3cret\0"] * 2
    assert "PGPASSWORD" not in os.environ


ASKING = """
import time
from healthchecker import PATIENCE, PostgresServer, StorageError
server = PostgresServer("postgresql+psycopg://hc@/hc?host=db1.example.com:1&host=db2.example.com:1")
PATIENCE.set(2)
began_mono = time.monotonic()
try:
    server.inspect()
except StorageError as error:
    print(time.monotonic() - began_mono, error)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="no mount namespaces")
def test_a_name_server_that_is_silent_holds_nobody_up(tmp_path: Path) -> None:
    """It is asked for each host of several, and has ten seconds each time."""
    pytest.importorskip("psycopg")
    (tmp_path / "resolv.conf").write_text("nameserver 127.53.0.1\n", encoding="ascii")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as name_server:
        command = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && echo ready && exec "$@"',
                   str(tmp_path / "resolv.conf"), sys.executable, "-c", ASKING]  # fmt: skip
        said = ""
        with contextlib.suppress(OSError):      # a port of root's, and a program of Linux
            name_server.bind(("127.53.0.1", 53))
            said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120,
                                  cwd=Path(healthchecker.__file__).parent).stdout  # fmt: skip
        if "ready" not in said:
            pytest.skip("unshare cannot make a mount namespace: that needs root, and unshare")
        assert b"db1" in name_server.recv(512, socket.MSG_DONTWAIT)
    seconds, _, why = said.removeprefix("ready\n").partition(" ")
    assert float(seconds) < 5 and why.endswith("cannot be used: no connection within 2 s: timeout\n")


# --- from here on with a real server ---
@pytest.fixture
def server(postgres: Postgres) -> PostgresServer:
    return PostgresServer(postgres.url(postgres.database()), SecretStr(PASSWORD))


@pytest.fixture
def folder(tmp_path: Path, postgres: Postgres) -> Path:
    """The folder of an installation on an empty database."""
    (tmp_path / URL_FILE).write_text(postgres.url(postgres.database()), encoding="utf-8")
    prepared_keys(tmp_path)
    return tmp_path


@contextlib.contextmanager
def opened(server: PostgresServer) -> Iterator[Store]:
    with contextlib.closing(Store(server)) as store:
        yield store


def tables(server: PostgresServer) -> set[str]:
    return {name for (name,) in execute(server, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = "
                                                "current_schema()::regnamespace")}  # fmt: skip


DAMAGES = {
    "CREATE TABLE accounts (id integer)": "belongs to another program",
    "CREATE TABLE setting (name text, value integer)": "belongs to another program",
    "CREATE TABLE setting (name text, value integer, text text)": "belongs to another program",
    "newer": "was written by a newer HealthChecker",
    "DROP TABLE event": "is damaged",
    "ALTER TABLE event DROP COLUMN actor": "is damaged",
    "DELETE FROM setting": "belongs to another program",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_databases_that_are_refused(damage: str, server: PostgresServer) -> None:
    """With one line, and nothing is changed."""
    if not damage.startswith("CREATE"):
        Store(server).close()
    newer = f"UPDATE setting SET value = {healthchecker.SCHEMA + 1} WHERE name = 'schema'"
    execute(server, newer if damage == "newer" else damage)
    before = tables(server)
    for use in (Store, PostgresServer.inspect):
        with pytest.raises(StorageError) as caught:
            use(server)
        assert DAMAGES[damage] in str(caught.value) and str(server) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert tables(server) == before


def test_other_encodings_are_refused(postgres: Postgres) -> None:
    name = postgres.database("ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(StorageError, match="is of encoding LATIN1; make one of UTF8"):
        Store(PostgresServer(postgres.url(name), SecretStr(PASSWORD)))


def test_servers_that_cannot_be_reached(postgres: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    """The password is in no error and in no log, and the line says where it was tried."""
    name = postgres.database()
    cases = {"password authentication failed": PostgresServer(postgres.url(name), SecretStr("wr0ng")),
             "refused": PostgresServer(postgres.url(name, 1), SecretStr("wr0ng")),
             "does not exist": PostgresServer(postgres.url("nobody"), SecretStr(PASSWORD))}  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        for why, server in cases.items():
            for use in (Store, PostgresServer.lock, PostgresServer.inspect, PostgresServer.is_running):
                with pytest.raises(StorageError, match=why) as caught:
                    use(server)
                assert "\n" not in str(caught.value)
                assert not [word for word in ("wr0ng", PASSWORD) if word in str(caught.value) + caplog.text]
            assert "wr0ng" not in repr(server) + repr(vars(server))


@pytest.fixture
def certified(postgres: Postgres) -> Iterator[Certificate]:
    """The server has one meanwhile."""
    made = make_certificate(postgres.folder, "server")
    made.key_file.chmod(0o600)
    if os.geteuid() == 0:
        shutil.chown(made.key_file, "nobody", "nogroup")
    for name, value in (("ssl_cert_file", made.certificate_file), ("ssl_key_file", made.key_file), ("ssl", "on")):
        postgres.execute(f"ALTER SYSTEM SET {name} = '{value}'")
    postgres.execute("SELECT pg_reload_conf()")
    wait_for(lambda: postgres.execute("SHOW ssl") == [("on",)])
    yield made
    postgres.execute("ALTER SYSTEM RESET ALL")
    postgres.execute("SELECT pg_reload_conf()")
    wait_for(lambda: postgres.execute("SHOW ssl") == [("off",)])


def test_tls_as_the_url_says(folder: Path, certified: Certificate) -> None:
    """With the server that the authority of the URL has vouched for, and with no other one."""
    url = (folder / URL_FILE).read_text(encoding="utf-8")

    def named(more: str) -> Any:
        (folder / URL_FILE).write_text(url + more, encoding="utf-8")
        return database_of(load_inventory(write_inventory(folder)).service)

    shutil.copy(certified.certificate_file, folder / "ca.pem")
    for more in ("?sslmode=verify-full&sslrootcert=ca.pem", "?sslmode=require"):
        with contextlib.closing(named(more).connect()) as connection:
            found = connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchall()
            assert found == [(True,)]
    shutil.copy(make_certificate(folder, "other").certificate_file, folder / "ca.pem")
    with pytest.raises(StorageError, match="certificate verify failed"):
        named("?sslmode=verify-full&sslrootcert=ca.pem").inspect()


def test_many_make_the_tables_at_once(server: PostgresServer) -> None:
    """Each of them finds them, whoever was first."""
    others = [PostgresServer(str(server), SecretStr(PASSWORD)) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in pool.map(lambda one: Store(one).close(), others):
            pass
    assert execute(server, "SELECT value FROM setting WHERE name = 'schema'") == [(healthchecker.SCHEMA,)]
    assert tables(server) == set(healthchecker.Base.metadata.tables)


def test_two_installations_make_the_tables_at_once(server: PostgresServer) -> None:
    """Also those that look for another service first; one of them is it."""
    others = [PostgresServer(str(server), SecretStr(PASSWORD)) for _ in range(4)]
    ends, outcomes = threading.Event(), list[str]()

    def start(one: PostgresServer) -> None:
        try:
            with one.lock(), contextlib.closing(Store(one, locked=True)):
                outcomes.append("runs")
                ends.wait(60)
        except StorageError as error:
            outcomes.append(str(error))

    with ThreadPoolExecutor(4) as pool:
        for one in others:
            pool.submit(start, one)
        with contextlib.ExitStack() as stack:
            stack.callback(ends.set)
            wait_for(lambda: len(outcomes) == 4, 60)
    assert outcomes.count("runs") == 1 and sum("another HealthChecker" in text for text in outcomes) == 3


def test_a_reader_sees_one_state_and_writes_nothing(server: PostgresServer) -> None:
    with opened(server) as store:
        with store.reading() as session:
            assert revision(session) == 0
            with ThreadPoolExecutor(1) as pool:
                pool.submit(raise_revision, store).result()
            session.expire_all()
            assert revision(session) == 0
            with pytest.raises(sqlalchemy.exc.SQLAlchemyError, match="read-only"):
                session.execute(sqlalchemy.delete(User))
        with store.reading() as session:
            assert revision(session) == 1


def raise_revision(store: Store) -> None:
    with store.writing() as session:
        revise(session)


def test_a_writer_waits_for_another_one_but_not_for_ever(server: PostgresServer,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(healthchecker, "WRITING", healthchecker.WRITING.replace("'5s'", "'100ms'"))
    with opened(server) as store, ThreadPoolExecutor(1) as pool:
        with store.writing() as session:
            revise(session)
            with pytest.raises(sqlalchemy.exc.OperationalError, match="lock timeout"):
                pool.submit(raise_revision, store).result()
        pool.submit(raise_revision, store).result()
        with store.reading() as session:
            assert revision(session) == 2


@pytest.mark.long
def test_a_writer_that_is_stopped_holds_the_others_up_for_seconds(server: PostgresServer) -> None:
    """As a machine that sleeps within a write: it finds out when it wakes, and nobody waits for that."""
    def is_written() -> bool:
        with contextlib.suppress(sqlalchemy.exc.OperationalError):
            raise_revision(store)
            return True
        return False

    with opened(server) as store, ThreadPoolExecutor(1) as pool:
        with pytest.raises(sqlalchemy.exc.DBAPIError, match="idle-in-transaction"), store.writing() as session:
            revise(session)
            session.flush()
            wait_for(lambda: pool.submit(is_written).result(), 45)
        raise_revision(store)
        with store.reading() as session:
            assert revision(session) == 2


def settings_of(session: Any) -> list[Any]:
    return [session.execute(sqlalchemy.text(f"SHOW {name}")).scalar() for name in (
        "statement_timeout", "idle_in_transaction_session_timeout", "transaction_isolation", "transaction_read_only")]


def test_bounds_are_of_the_transaction(server: PostgresServer) -> None:
    """Nothing of it is left in a session, which a pooler gives to somebody else; nothing is prepared there."""
    with opened(server) as store:
        with store.reading() as session:
            assert settings_of(session) == ["10s", "1min", "repeatable read", "on"]
        with store.writing() as session:
            assert settings_of(session) == ["10s", "6s", "read committed", "off"]
        with store.writing(long=True) as session:
            assert settings_of(session) == ["10s", "1min", "read committed", "off"]
        for _ in range(20):
            with store.reading() as session:
                session.scalars(sqlalchemy.select(User)).all()
        connection = store.engine.raw_connection()
        found = [connection.driver_connection.execute(statement).fetchone()[0] for statement in (
            "SHOW statement_timeout", "SHOW default_transaction_read_only",
            "SELECT count(*) FROM pg_prepared_statements",
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")]  # fmt: skip
        connection.close()
        assert found == ["0", "off", 0, 0]


def test_what_only_sqlite_can_keep(server: PostgresServer) -> None:
    """A zero character would fail each try to write it, and all that is written with it."""
    with opened(server) as store:
        with store.writing() as session:
            session.add(Setting(name="odd", text="a\0b"))
        with store.reading() as session:
            assert healthchecker.remembered(session, "odd").text == "a\ufffdb"


# --- connections that are lost ---
def end_connections(postgres: Postgres) -> None:
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                     "AND backend_type = 'client backend'")  # fmt: skip


def test_a_connection_that_was_lost_is_replaced(server: PostgresServer, postgres: Postgres) -> None:
    with opened(server) as store:
        raise_revision(store)
        end_connections(postgres)
        raise_revision(store)
        with pytest.raises(sqlalchemy.exc.OperationalError), store.writing() as session:
            revise(session)
            session.flush()
            end_connections(postgres)
        with store.reading() as session:
            assert revision(session) == 2, "all or nothing"


@pytest.fixture
def own_postgres(postgres: Postgres) -> Iterator[Postgres]:
    """One that a test may stop; it runs again afterwards."""
    yield postgres
    if postgres.process.poll() is not None:
        postgres.begin()


def test_what_is_not_written_while_the_server_is_down(folder: Path, own_postgres: Postgres,
                                                      caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """It is kept, told once, and written when the server is back."""
    caplog.set_level(logging.INFO)
    notebook = Notebook(folder)
    notebook.polls("hh")
    own_postgres.end()
    for _ in range(3):
        notebook.polls("u", healthchecker.QUARTER * 2_000_000)
    assert caplog.text.count("the database cannot be written") == 1
    own_postgres.begin()
    assert notebook.recorder.flush() and notebook.strip() == "hhuuu"
    assert "the database cannot be written: that is over" in caplog.text
    notebook.store.close()


def test_a_clock_that_is_set_moves_nothing(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database's holds, also until it is asked again."""
    right = time.time
    with contextlib.closing(server.connect()) as connection:
        server.take_clock(connection)
    monkeypatch.setattr(time, "time", lambda: right() + 3600)
    assert abs(server.wall() - right()) < 5


def test_a_row_whose_commit_came_late_is_no_other_machine(server: PostgresServer) -> None:
    with opened(server):
        claim = Claim(server.connect, lambda: None, "a")
        assert claim.take() == ""
        before = claim.company.epoch
        assert claim._try() == {}, "as where the first one had been given up"
        assert execute(server, "SELECT instance FROM machine WHERE name = 'a'") == [(claim.company.epoch,)]
        assert claim.company.epoch != before
        claim.close()


@pytest.mark.long
def test_a_locked_table_gathers_no_connections(folder: Path, postgres: Postgres,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """The server gives up what waits for the lock as soon as we do; and no command says that no service runs."""
    path, server, seen = write_inventory(folder, service="  machine: a\n"), database_in(folder), list[Any]()
    assert isinstance(server, PostgresServer)
    with opened(server), server.lock(machine="a") as claim, contextlib.closing(server.connect()) as locker:
        locker.execute("BEGIN; LOCK TABLE machine IN ACCESS EXCLUSIVE MODE")

        def is_fourth() -> bool:
            seen.extend({claim._connection}.difference(seen))
            return len(seen) > 3

        wait_for(is_fourth, 60)
        assert len(postgres.execute("SELECT pid FROM pg_locks WHERE NOT granted AND relation IS NOT NULL")) <= 1
        for command, code, told in (("status", 3, "UNKNOWN: database"), ("gate", 0, "not known: database")):
            assert healthchecker.main(["--inventory", str(path), command]) == code
            assert told in (out := capsys.readouterr().out) and "does not run" not in out
        locker.execute("COMMIT")
        wait_for(lambda: server.is_running("a"), 60)


@contextlib.contextmanager
def impatience(seconds: float) -> Iterator[None]:
    """How long this thread waits for an answer."""
    token = PATIENCE.set(seconds)
    yield
    PATIENCE.reset(token)


@pytest.mark.long
def test_a_server_that_falls_silent_holds_nobody_up(server: PostgresServer, postgres: Postgres,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Neither who asks nor who connects, and afterwards all is well."""
    monkeypatch.setattr(healthchecker, "BUSY_TIMEOUT", 2.0)
    with opened(server) as store:
        with impatience(0.5), pytest.raises(sqlalchemy.exc.OperationalError, match="has not answered for"), \
                store.writing() as session:  # fmt: skip
            revise(session)
            with postgres.silent():
                session.flush()
        with postgres.silent(), impatience(2), pytest.raises(StorageError, match="timeout"):
            server.inspect()
        raise_revision(store)
        with store.reading() as session:
            assert revision(session) == 1


def connecting() -> int:
    return sum(thread.name == "connect" for thread in threading.enumerate())


def test_connections_that_are_refused_leave_no_threads() -> None:
    """However many are tried while the server is away."""
    psycopg = pytest.importorskip("psycopg")
    server = PostgresServer(f"postgresql+psycopg://owner@127.0.0.1:{free_port()}/test")
    with ThreadPoolExecutor(8) as pool:
        for tried in [pool.submit(server.connect) for _ in range(80)]:
            with pytest.raises(psycopg.OperationalError):
                tried.result(60)
    wait_for(lambda: not connecting(), healthchecker.CLAIM_LIFE / 2)


@pytest.mark.long
def test_a_connection_that_comes_too_late_waits_for_somebody(server: PostgresServer, postgres: Postgres,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The next one who asks has it; one that nobody wants is closed, and its thread ends."""
    def give_up() -> None:
        with postgres.silent(), impatience(0.2), pytest.raises(StorageError, match="timeout"):
            server.inspect()
        wait_for(lambda: server._late and server._late[0].done())

    give_up()
    (late,) = server._late
    with contextlib.closing(server.connect()) as connection:
        assert connection is late.result() and not server._late
    monkeypatch.setattr(healthchecker, "CLAIM_LIFE", 0.5)
    give_up()
    (late,) = server._late
    wait_for(lambda: not server._late)
    wait_for(lambda: late.result().closed)
    wait_for(lambda: not connecting(), 20)


@pytest.mark.long
def test_silent_hosts_hold_nobody_up(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of which has its time to answer; the one after them is reached none the less, also by who waits for it."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
        server = PostgresServer(postgres.url_of(postgres.database(), *silent, postgres.port), SecretStr(PASSWORD))

        def is_reached() -> bool:
            began_mono = time.monotonic()
            with contextlib.suppress(StorageError):
                return server.inspect() == 0
            assert time.monotonic() - began_mono < 5
            return False

        with impatience(2):
            assert not is_reached()
            wait_for(is_reached)
            monkeypatch.setattr(healthchecker, "ANSWER_TIMEOUT", 2.0)
            assert is_reached()


@pytest.mark.long
def test_what_only_reads_is_not_asked_to_write_for_ever() -> None:
    """Of two servers the second one answered while the first, which alone can write, was away."""
    with open_postgres() as primary:
        name = primary.database()
        with primary.standby() as standby, opened(PostgresServer(
                primary.url_of(name, primary.port, standby.port), SecretStr(PASSWORD))) as store:  # fmt: skip
            raise_revision(store)
            wait_for(lambda: primary.execute("SELECT to_regclass('setting')", name, standby.port) == [("setting",)])
            primary.end()
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError), store.reading() as session:
                revision(session)
            primary.begin()
            raise_revision(store)


def open_until(service: Service, condition: Callable[[], bool]) -> None:
    """Never is the gate closed meanwhile."""
    def look() -> bool:
        assert service.get("/").status == 200
        return condition()

    wait_for(look, 120)


@contextlib.contextmanager
def begun(path: Path) -> Iterator[Service]:
    """One that cannot serve yet."""
    service = Service(path, deadline=60)
    service.begin()
    try:
        yield service
    finally:
        service.kill()


@pytest.mark.long
@pytest.mark.parametrize("outage", ["stopped", pytest.param("silent", marks=pytest.mark.long)])
def test_a_start_waits_for_the_database(outage: str, folder: Path, own_postgres: Postgres) -> None:
    """Behind a closed gate that answers: both may begin together, and what ends with 4 is not started again by systemd.
    A signal ends it meanwhile."""
    prepared_database(folder)
    port = free_port()
    path = write_inventory(folder, HERE, f"  listen: 127.0.0.1:{port}\n  console: 'off'\n")
    with contextlib.ExitStack() as services, contextlib.ExitStack() as outages:
        if outage == "silent":
            outages.enter_context(own_postgres.silent())
        else:
            outages.callback(own_postgres.begin)
            own_postgres.end()
        for is_stopped in (True, False):
            service = services.enter_context(begun(path))
            service.port = port
            service.wait_line("the gate stays closed until the database can be used")
            assert service.wait_status("/", 503).status == 503
            assert service.output.count("can be used") == 1     # once a minute
            if is_stopped:
                assert service.stop() == 0
        outages.close()
        service.wait_line("serving on http://")
        service.wait_status("/", 200)
        assert service.stop() == 0


@pytest.mark.long
def test_a_start_waits_for_a_busy_database(folder: Path, postgres: Postgres) -> None:
    """Where another one has the lock of who writes for longer than a writer waits."""
    prepared_database(folder)
    server = database_in(folder)
    assert isinstance(server, PostgresServer)
    with contextlib.closing(server.connect()) as other:
        other.execute(f"BEGIN; SELECT pg_advisory_xact_lock({healthchecker.WRITE_LOCK})")
        with begun(write_inventory(folder, HERE)) as service:
            service.wait_line("the gate stays closed until the database can be used: ")
            other.rollback()
            service.wait_line("serving on http://")
            assert service.stop() == 0


@pytest.mark.parametrize(("url", "password", "why"), [
    ("{url}", "another", "password authentication failed"), ("{url}x", PASSWORD, "does not exist"),
    ("{url}?sslmode=require", PASSWORD, "server does not support SSL")])
def test_what_no_waiting_cures_ends_a_start(url: str, password: str, why: str, folder: Path) -> None:
    url = url.format(url=(folder / URL_FILE).read_text(encoding="utf-8"))
    (folder / URL_FILE).unlink()
    done = run(write_inventory(folder, HERE, f"  database: {url}\n  database_password: {password}\n"))
    assert done.returncode == StorageError.exit_code and why in done.stderr and "until" not in done.stderr


def test_what_is_called_like_a_refusal_is_waited_for(tmp_path: Path) -> None:
    """A server that is away, whatever the names of its host, its user and its database say."""
    pytest.importorskip("psycopg")
    url = f"postgresql+psycopg://certificate@/password?host={tmp_path}/authentication"
    for each in (url, "postgresql+psycopg://hc@password.invalid/hc", f"{url}&host=pg_hba.invalid"):
        server = PostgresServer(each)
        with pytest.raises(StorageError) as caught:
            server.inspect()
        assert server.may_pass(caught.value), str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("outage", ["stopped", "silent"])
def test_no_gate_closes_while_the_database_is_away(outage: str, folder: Path, own_postgres: Postgres) -> None:
    """What happens meanwhile is told when it is back; the console says what is wrong, without a word of SQL. What needs
    no login goes on at once: a resource reports, whatever token or cookie comes with a request."""
    prepared_database(folder)
    token = {"Authorization": "Bearer 0123456789abcdef", "Content-Type": "application/json"}
    pushes = "\n  - {name: pushes, platform: push, password: 0123456789abcdef, critical: false}"
    with Service(write_inventory(folder, HERE + pushes), deadline=60) as service:
        client, database = Client(*service.console).log_in(), database_in(folder)
        service.wait_status("/", 200)
        count = len(execute(database, "SELECT 1 FROM sample"))
        with own_postgres.silent() if outage == "silent" else contextlib.ExitStack() as stack:
            if outage == "stopped":
                stack.callback(own_postgres.begin)
                own_postgres.end()
            open_until(service, lambda: "the database cannot be written" in service.output)
            open_until(service, lambda: "the configuration cannot be taken over" in service.output)
            reply = client.api("GET", "resources")
            assert (reply.status, reply.json["detail"]) == (503, "the database cannot be used now; see the log")
            cookie = {"Authorization": "Basic eA==", "Cookie": f"{healthchecker.COOKIE}_{client.port}=x"}
            began_mono = time.monotonic()
            assert client.ask("POST", "/-/api/push/pushes", '{"healthy": true}', token).status == 204
            for path in ("/-/livez", "/-/metrics", "/-/login"):
                assert client.ask("GET", path, headers=cookie).status == 200, path
            assert time.monotonic() - began_mono < healthchecker.BUSY_TIMEOUT
        open_until(service, lambda: "the database cannot be written: that is over" in service.output)
        open_until(service, lambda: len(execute(database, "SELECT 1 FROM sample")) > count + 3)
        assert "SELECT" not in service.output and "another HealthChecker" not in service.output


@pytest.mark.parametrize("lacks", ["server", "threads"])
def test_requests_to_the_console_while_the_database_is_away(
    lacks: str, folder: Path, own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many there are, the log has a line."""
    start = threading.Thread.start

    def start_if(thread: threading.Thread) -> None:
        if thread.name == "connect":
            raise RuntimeError("can't start new thread")
        start(thread)

    with local_console(folder) as local:
        local.log_in_as("SpiceWorks")
        own_postgres.end()
        local.store.close()     # or a connection that was kept is tried first
        if lacks == "threads":
            monkeypatch.setattr(threading.Thread, "start", start_if)
        for _ in range(5):
            replies = [local.api("GET", "resources"), local.ask("GET", "/-/"), local.form("/-/resources/x/edit", {})]
            assert [reply.status for reply in replies] == [503] * 3
            what = "the database cannot be used" if lacks == "server" else "there are no more threads"
            assert replies[0].json["detail"] == f"{what} now; see the log"
        monkeypatch.undo()
        own_postgres.begin()
    # libpq's own words, which others may have had, are "before or while processing the request".
    told = [record for record in caplog.records if "a request" in record.getMessage() or record.exc_info]
    assert len(told) == 1 and told[0].getMessage().startswith("a request to the console failed: ")


def test_errors_quote_no_rows(server: PostgresServer) -> None:
    with opened(server) as store, pytest.raises(sqlalchemy.exc.IntegrityError) as caught, store.writing() as session:
        session.execute(sqlalchemy.text("INSERT INTO \"user\" (id, username, salt) VALUES (1, 's3cret', '')"))
    assert "violates not-null constraint" in str(caught.value.orig) and "s3cret" not in str(caught.value.orig)


# --- a pooler ---
@pytest.mark.long
def test_a_pooler_in_front(postgres: Postgres, pgbouncer: Program) -> None:
    """Each transaction on another connection of three, of as many threads as come."""
    server = PostgresServer(postgres.url(postgres.database(), pgbouncer.port), SecretStr(PASSWORD))
    with server.lock(), opened(server) as store, ThreadPoolExecutor(8) as pool:
        assert server.is_running()
        with pytest.raises(StorageError, match="another HealthChecker"):
            server.lock()

        def work(_: int) -> int:
            raise_revision(store)
            with store.reading() as session:
                return revision(session)

        assert max(pool.map(work, range(60))) == 60


def test_history_through_a_pooler(tmp_path: Path, postgres: Postgres, pgbouncer: Program) -> None:
    """What writes many rows at once does so there, too."""
    (tmp_path / URL_FILE).write_text(postgres.url(postgres.database(), pgbouncer.port), encoding="utf-8")
    notebook = Notebook(tmp_path)
    notebook.tidy(notebook.polls("hhuuh" * 20) + healthchecker.QUARTER)
    assert notebook.strip() == ("hhuuh" * 20)[-healthchecker.STRIP:] and notebook.count(healthchecker.AVERAGES) > 0
    notebook.store.close()


# --- one service at a time ---
def test_one_service_at_a_time(server: PostgresServer) -> None:
    """It is told by whom, and may begin when the other one has ended."""
    assert not server.is_running()
    with server.lock():
        assert server.is_running()
        with pytest.raises(StorageError, match=r"another HealthChecker \(.+\) is using database postgresql"):
            server.lock()
    assert not server.is_running()
    with server.lock():
        pass


def test_of_several_each_is_said_to_run_or_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another one's life is no life of this one; and who cannot write there may live."""
    path, server = write_inventory(folder, service="  machine: b\n"), database_in(folder)
    assert isinstance(server, PostgresServer)
    Store(server).close()
    with server.lock(machine="a"):
        assert server.is_running() and server.is_running("a") and not server.is_running("b")
        for command, code in (("gate", 0), ("status", 3)):
            assert healthchecker.main(["--inventory", str(path), command]) == code
            said = capsys.readouterr().out
            assert "was not heard of in the database for 6 s, on b: it does not run and the gate is closed, or" in said


def test_a_service_that_died_is_waited_for(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row counts until it is too old by the database's clock."""
    for name in ("LIVING", "PLACES", "FORGET_DEAD"):
        monkeypatch.setattr(healthchecker, name, getattr(healthchecker, name).replace("6.0", "1.0"))
    dead = Claim(server.connect, lambda: None)
    assert dead.take() == ""
    dead._connection.close()  # as its process would
    with server.lock():
        assert len(execute(server, "SELECT * FROM machine")) == 1


def test_a_service_of_the_future_is_none(server: PostgresServer) -> None:
    """The database's clock was set back since."""
    with server.lock():
        pass
    execute(server, "INSERT INTO machine VALUES ('another', 'b', '1', 1, extract(epoch FROM now()) + 3600, true)")
    assert not server.is_running()
    with server.lock():
        assert server.is_running()


@pytest.mark.long
def test_a_service_whose_place_was_taken_hears_of_it(server: PostgresServer) -> None:
    """It was cut off for too long; one whose row is gone takes its place again where that is free."""
    lost = threading.Event()
    with server.lock(lost.set):
        execute(server, "DELETE FROM machine")
        wait_for(lambda: server.is_running(), 60)
        assert not lost.is_set()
        execute(server, "UPDATE machine SET instance = 'another', seen_at = seen_at + 4")
        assert lost.wait(60)


def test_an_end_while_the_database_is_slow_leaves_no_place(server: PostgresServer,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """As soon as the database answers, and no connection is left."""
    monkeypatch.setattr(healthchecker, "CLAIM_INTERVAL", 0.1)
    with opened(server), contextlib.closing(server.connect()) as locker:
        with server.lock() as claim:
            locker.execute("BEGIN; LOCK TABLE machine")
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'machine'::regclass"
            wait_for(lambda: locker.execute(waiting).fetchone() == (1,))
        locker.execute("ROLLBACK")
        claim.join(60)
        assert locker.execute("SELECT count(*) FROM machine").fetchone() == (0,)
        assert claim._connection.closed


@pytest.mark.long
@pytest.mark.parametrize("what", ["schema", "key"])
def test_a_service_of_before_a_change_does_not_come_back(what: str, server: PostgresServer) -> None:
    """It was cut off while others brought the database to another schema, or replaced the keys: its place is free, and
    it ends none the less."""
    lost = threading.Event()
    with opened(server) as store, server.lock(lost.set, "a") as claim:
        with store.writing() as session:
            session.merge(Setting(name="key", text="one"))
        wait_for(lambda: claim._stamp and len(claim._stamp) == 2)
        execute(server, f"UPDATE setting SET value = value + 1, text = text || 'x' WHERE name = '{what}'",
                "DELETE FROM machine")  # fmt: skip
        assert lost.wait(60)
        assert execute(server, "SELECT * FROM machine") == []


def test_a_service_on_postgres(folder: Path, postgres: Postgres) -> None:
    """It opens its gate, keeps out another one, and goes on after it was killed; its password is shown nowhere."""
    path = write_inventory(folder, HERE)
    assert run(path, "check").returncode == 0
    assert "secrets sealed" in run(path, "seal").stdout and PASSWORD not in path.read_text(encoding="utf-8")
    with contextlib.suppress(AssertionError), Service(path) as service:
        service.wait_status("/", 200)
        refused = run(path)
        assert refused.returncode == StorageError.exit_code
        assert f"another HealthChecker ({socket.gethostname()}) is using" in refused.stderr
        assert "runs" in run(path, "gate").stdout
        shown = service.output + refused.stderr + "".join(psutil.Process(service.process.pid).cmdline())
        assert PASSWORD not in shown
        service.kill()
    with Service(path, deadline=60) as service:
        assert "1 kept" in service.output
        service.wait_status("/", 200)
    assert "does not run" in run(path, "gate").stdout
    assert PASSWORD not in str(execute(database_in(folder), "SELECT * FROM setting"))


def test_a_service_whose_place_was_taken_ends(folder: Path) -> None:
    with Service(write_inventory(folder, HERE), code=StorageError.exit_code) as service:
        service.wait_status("/", 200)
        execute(database_in(folder), "UPDATE machine SET instance = 'another', seen_at = seen_at + 4")
        service.process.wait(60)
    assert re.search(r"database postgresql\+psycopg://.*: another HealthChecker has begun there", service.output)
    assert [instance for instance, *_ in execute(database_in(folder), "SELECT * FROM machine")] == ["another"]


def test_an_account_without_the_right_to_make_tables(postgres: Postgres) -> None:
    """It is enough where they are there."""
    name = postgres.database()
    owner = PostgresServer(postgres.url(name), SecretStr(PASSWORD))
    postgres.execute(f"CREATE ROLE poor{name} LOGIN PASSWORD '{PASSWORD}'")
    poor = PostgresServer(postgres.url(name).replace("owner@", f"poor{name}@"), SecretStr(PASSWORD))
    for use in (Store, PostgresServer.lock):
        with pytest.raises(StorageError, match=r"permission denied for schema public$"):
            use(poor)
    with owner.lock():
        Store(owner, locked=True).close()
    execute(owner, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO poor{name}",
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO poor{name}")  # fmt: skip
    with poor.lock(), opened(poor) as store:
        raise_revision(store)


@pytest.mark.long
def test_another_password_needs_a_restart(tmp_path: Path, postgres: Postgres) -> None:
    """What is connected stays so, and nothing else would: whoever has the inventory taken over is told."""
    prepared_keys(tmp_path)
    url = postgres.url(postgres.prepared()).replace("owner@", "changing@")
    postgres.execute("CREATE ROLE changing SUPERUSER LOGIN PASSWORD 'the first'")

    def told(password: str) -> str:
        stated = f"  database: {url}\n  database_password{password}\n"
        done = run(write_inventory(tmp_path, HERE, stated), "reload")
        assert done.returncode == 0, done
        return done.stdout

    (tmp_path / "file").write_text("the first\n", encoding="utf-8")
    try:
        inventory = write_inventory(tmp_path, HERE, f"  database: {url}\n  database_password_file: file\n")
        with Service(inventory) as service:
            service.wait_status("/-/readyz", 200)
            assert "restart" not in told("_file: file")
            postgres.execute("ALTER ROLE changing PASSWORD 'the second'")
            (tmp_path / "file").write_text("the second\n", encoding="utf-8")
            waits = "service.database_password changed: that needs a restart"
            assert waits in told("_file: file") and "second" not in service.output
        with Service(inventory) as service:
            service.wait_status("/-/readyz", 200)
            assert "restart" not in told("_file: file")
            assert "service.database_password_file changed: that needs a restart" in told(": the second")
            assert "secrets sealed" in run(inventory, "seal").stdout
            assert waits not in run(inventory, "reload").stdout, "sealed it is the same"
    finally:
        postgres.execute("ALTER ROLE changing NOLOGIN")


def test_sealed_for_another_server(folder: Path) -> None:
    """A sealed password opens for its server alone."""
    path = write_inventory(folder)
    assert run(path, "seal").returncode == 0
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("@127.0.0.1:", "@127.0.0.2:"), encoding="utf-8")
    moved = run(path, "check")
    assert moved.returncode == 3 and "belongs to another name, hostname, port or username" in moved.stderr


def test_backup_is_the_servers_own(folder: Path) -> None:
    path = write_inventory(folder)
    done = run(path, "backup", str(folder / "b.tar.gz"))
    assert done.returncode == UsageError.exit_code and "pg_dump" in done.stderr


# What came with schema 7, and to the tables of schema 6 while it was the last one.
SCHEMA_6 = ("ALTER TABLE status DROP COLUMN read", "ALTER TABLE status DROP COLUMN read_at",
            "ALTER TABLE machine DROP COLUMN able", "ALTER TABLE login_session DROP COLUMN expires_at",
            "UPDATE setting SET value = 6 WHERE name = 'schema'")  # fmt: skip


@pytest.mark.long
def test_a_database_of_schema_6(folder: Path) -> None:
    """`check` says what a start will do and changes nothing; none begins under a living machine of the version before,
    and then one brings it to this schema, with all that is in it."""
    path, database = write_inventory(folder, HERE, "  machine: b\n"), database_in(folder)
    with Service(path) as service:
        service.wait_status("/", 200)
    kept = execute(database, "SELECT * FROM resource"), execute(database, "SELECT count(*) FROM event")
    execute(database, *SCHEMA_6)
    columns = execute(database, healthchecker.POSTGRES_COLUMNS)
    checked = run(path, "check")
    assert checked.returncode == 0 and "a start would make: 0 added, 0 changed, 0 removed, 1 kept" in checked.stdout
    assert "would bring the database from schema 6 to 7" in checked.stdout and "pg_dump first" in checked.stdout
    assert run(path, "status").returncode == 3
    assert execute(database, healthchecker.POSTGRES_COLUMNS) == columns
    execute(database, f"INSERT INTO machine VALUES ('x', 'a', '1', 0, {healthchecker.DATABASE_CLOCK})")
    refused = run(path)
    assert refused.returncode == 4 and "an earlier version uses this database on a, and this one" in refused.stderr
    execute(database, "DELETE FROM machine")
    with Service(path) as service:
        assert "migrated from schema 6 to 7" in service.output
        service.wait_status("/", 200)
    assert execute(database, "SELECT * FROM resource") == kept[0]
    assert execute(database, "SELECT count(*) FROM event") > kept[1]
    assert {("machine", "able"), ("status", "read")} <= {*execute(database, healthchecker.POSTGRES_COLUMNS)}


# --- a database of the other kind ---
def filled(folder: Path) -> Path:
    """An installation with rows in every table, some of which are odd, and one number given that is gone."""
    path = write_inventory(folder, HERE)
    notebook = Notebook(folder, 3)
    for number in range(3):
        notebook.write(*(notebook.report(healthchecker.QUARTER + 60.25 * index, "hdu"[index % 3], number=number,
                                         cpu_percent=index / 3) for index in range(900)))  # fmt: skip
    notebook.tidy(60.0 * 1000)
    with notebook.store.writing() as session:
        session.execute(healthchecker.FILESYSTEMS.insert().values(resource_id=1, at=2**40, percents='{"/ä": 100}'))
    rows: dict[str, dict[str, Any]] = {
        "user": {"username": "ä\u2028\U0001f600'\"\\", "password": bytes(range(256)), "salt": b"", "initial": True},
        "maintenance": {"state": "begun", "start_at": 0.1 + 0.2, "until_at": 2.0**40, "scope": "{}", "reason": ""},
        "acknowledgement": {"resource_id": 1, "at": 1e-300, "actor": "", "comment": "%s %(x)s :y"},
        "login_session": {"token_hash": "00", "kind": "named", "user_id": 1, "begun_at": 1.0, "seen_at": 0.0,
                          "address": "::1"},
        "receiver": {"name": "ops", "url": "HC2.x"},
        "notice": {"receiver_id": 1, "kind": "gate", "name": "", "text": "", "ending": "", "times": 3, "since_at": 1.0,
                   "taken_at": 1.0, "over_at": 0.0, "told_at": 0.0},
        "watched_time": {"from_at": 1.0, "to_at": 2.0},
        "incident": {"id": 2**40, "group": "", "from_at": 1.0, "to_at": 2.0, "end": "opened", "why": "", "actor": "",
                     "opened_by": "", "before": "", "mode": "enforce", "refused": 2**35, "would_refuse": 0},
    }  # fmt: skip
    known = healthchecker.Base.metadata.tables
    kinds = {mapper.local_table.name: mapper.class_ for mapper in healthchecker.Base.registry.mappers}
    with notebook.store.writing() as session:
        session.add(healthchecker.Resource(name="gone", hostname="h", platform="local", port=1, settings="{}"))
    with notebook.store.writing() as session:
        session.delete(session.scalars(sqlalchemy.select(healthchecker.Resource).filter_by(name="gone")).one())
        revise(session)
        for table in (name for name in known if name in rows):
            session.add(kinds[table](**rows[table]))
            session.flush()
    execute(notebook.store.database, "UPDATE resource SET origin = 'removed' WHERE name = 'r2'")
    empty = [name for name in known if not execute(notebook.store.database, f'SELECT 1 FROM "{name}" LIMIT 1')]
    notebook.store.close()
    assert set(empty) <= {"machine", "result"}, "a new table needs a row here"
    return path


def content(database: Any) -> dict[str, list[Any]]:
    with contextlib.closing(Store(database)) as store, store.reading() as session:
        return {table.name: [tuple(row) for row in session.execute(healthchecker.everything(table))]
                for table in healthchecker.Base.metadata.sorted_tables
                if table.name not in ("machine", "result")}  # fmt: skip


def next_number(database: Any) -> int:
    with contextlib.closing(Store(database)) as store, store.writing() as session:
        row = healthchecker.Resource(name="next", hostname="h", platform="local", port=1, settings="{}")
        session.add(row)
        session.flush()
        number = row.id
        session.rollback()
        return number


def test_copied_there_and_back(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every row of every table, after whose numbers come others; the source stays as it is."""
    files = tmp_path_factory.mktemp("files")
    filled(files)
    path, first, url = write_inventory(folder), SqliteFile(files / "healthchecker.db"), str(database_in(folder))
    before = content(first)
    done = run(path, "database", "copy", f"sqlite:///{first}", url)
    assert (done.returncode, done.stderr) == (0, "")
    count = sum(len(rows) for rows in before.values())
    assert done.stdout.startswith(f"{count} rows were copied and compared") and count > 2700
    assert content(database_in(folder)) == before == content(first)
    assert len(execute(database_in(folder), "SELECT name FROM resource")) == 3, "of one there is history alone"
    back = run(path, "database", "copy", url, "sqlite:///back.db")
    assert (back.returncode, back.stderr) == (0, "")
    second = SqliteFile(folder / "back.db")
    assert content(second) == before
    assert (next_number(first), next_number(database_in(folder)), next_number(second)) == (5, 4, 4)


def test_what_is_copied_goes_on(folder: Path) -> None:
    """A service that begins on it has all that the one before knew."""
    url = (folder / URL_FILE).rename(folder / "later")
    path = write_inventory(folder, HERE)
    with Service(path) as service:
        service.wait_status("/", 200)
    url.rename(folder / URL_FILE)
    path = write_inventory(folder, HERE)
    assert run(path, "database", "copy", "sqlite:///healthchecker.db", str(database_in(folder))).returncode == 0
    with Service(path) as service:
        assert "1 kept" in service.output
        service.wait_status("/", 200)


@pytest.mark.long
def test_copies_that_are_refused(folder: Path) -> None:
    """Over what is there, of nothing, from or to where a service runs, and of what cannot be named."""
    path, url = write_inventory(folder), str(database_in(folder))
    Store(SqliteFile(folder / "a.db")).close()
    with contextlib.closing(Store(SqliteFile(folder / "full.db"))) as store:
        raise_revision(store)
    refused = {
        ("sqlite:///none.db", url): (2, "there is no database"),
        (url, "sqlite:///new.db"): (2, "there is no database"),
        ("sqlite:///a.db", "sqlite:///full.db"): (2, "is not empty"),
        ("sqlite:///a.db", "postgresql+psycopg://hc:s3cret@127.0.0.1/x"): (2, "holds a password"),
        ("sqlite:///a.db", "mysql://x"): (2, "must be sqlite:///path or postgresql+psycopg://"),
        ("sqlite:///a.db", "sqlite:///a.db"): (2, f"FROM and TO are both {folder / 'a.db'}; name another one"),
        (url, url): (2, f"FROM and TO are both {url}; name another one"),
        ("sqlite:///a.db", f"sqlite:///{folder}/none/b.db"): (
            4, f"database {folder}/none/b.db cannot be used: No such file or directory; name another one"),
    }
    for (source, target), (code, why) in refused.items():
        done = run(path, "database", "copy", source, target)
        assert done.returncode == code and why in done.stderr and done.stderr.count("\n") == 1, (source, target)
        assert "s3cret" not in done.stderr
    with SqliteFile(folder / "a.db").lock():
        assert run(path, "database", "copy", "sqlite:///a.db", url).returncode == 4
    with database_in(folder).lock():
        done = run(path, "database", "copy", "sqlite:///a.db", url)
        assert done.returncode == 4 and "another HealthChecker (" in done.stderr
    assert run(path, "database", "copy", "sqlite:///full.db", url).returncode == 0
    assert run(path, "database", "copy", "sqlite:///full.db", url).returncode == 2


@pytest.mark.long
def test_a_copy_that_fails_leaves_nothing(folder: Path) -> None:
    """And it can be made again."""
    filled_folder = folder / "old"
    filled_folder.mkdir()
    filled(filled_folder)
    path, target = write_inventory(folder), database_in(folder)
    Store(target).close()
    command = ("database", "copy", f"sqlite:///{filled_folder / 'healthchecker.db'}", str(target))
    with refusing(target, "INSERT ON sample", "NEW.at > 50000"):
        done = run(path, *command)
        assert (done.returncode, done.stderr) == (4, "the database cannot be used: as the test wants\n")
        assert not any(content(target).values())
    execute(target, "CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN NEW.reason = NEW.reason || ' '; RETURN NEW; END$$",
            "CREATE TRIGGER change BEFORE INSERT ON sample FOR EACH ROW EXECUTE FUNCTION change()")  # fmt: skip
    done = run(path, *command)
    assert done.returncode == 4 and "table sample is not the same there; nothing was copied" in done.stderr
    assert not any(content(target).values())
    execute(target, "DROP FUNCTION change CASCADE")
    assert run(path, *command).returncode == 0
