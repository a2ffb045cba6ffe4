"""A real PostgreSQL, and PgBouncer before it, for the tests of what several machines share."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import sqlalchemy
from pydantic import SecretStr
from sshd import SYSTEM_PATH, wait_for

if TYPE_CHECKING:  # conftest.py, which finds it, imports this module first
    from healthchecker import Database

# Debian keeps a version's programs out of PATH; PgBouncer refuses root as PostgreSQL does.
BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))
PGBOUNCER = shutil.which("pgbouncer", path=SYSTEM_PATH)
PASSWORD = "s3cret word"
URL_FILE = "postgres.url"   # in a test's folder, whose database is there then


def account() -> dict[str, Any]:
    """Whose processes they are: root's they cannot be."""
    return {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd="/", **account())
    assert done.returncode == 0, done.stdout + done.stderr


def is_answered(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Program:
    """A server at a port of its own, begun again at the next one where that was taken meanwhile."""

    def __init__(self, folder: Path, command: Callable[[int], list[object]], port: int = 0) -> None:
        self.folder, self._command = folder, command
        for _ in range(10):
            self.port = port or free_port()
            self.begin()
            if self.process.poll() is None:
                return
        raise AssertionError((folder / "log").read_text(encoding="utf-8", errors="replace"))

    def begin(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [*map(str, self._command(self.port))], stdout=log, stderr=log, cwd="/", **account())  # fmt: skip
        wait_for(lambda: self.process.poll() is not None or is_answered(self.port), 60)

    def end(self, number: int = signal.SIGINT) -> None:
        """Both end at once by SIGINT, and close what is open."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        self.process.wait(60)


class Postgres(Program):
    """A cluster of databases, with an account that may make some; nothing of it outlasts the test."""

    def __init__(self, folder: Path) -> None:
        self._count, self._model = 0, ""
        assert BINARIES
        (folder / "password").write_text(PASSWORD, encoding="utf-8")
        if os.geteuid() == 0:
            for path in (folder, folder / "password"):
                shutil.chown(path, "nobody", "nogroup")
        run(BINARIES / "initdb", "-D", folder / "data", "-U", "owner", "--auth=scram-sha-256", "-E", "UTF8",
            "--locale=C", f"--pwfile={folder / 'password'}", "--no-sync")  # fmt: skip
        settings = {"fsync": "off", "unix_socket_directories": "", "listen_addresses": "127.0.0.1",
                    "max_connections": 60, "shared_buffers": "16MB", "autovacuum": "off"}  # fmt: skip
        self._options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        super().__init__(folder, lambda port: self.command(folder / "data", port))
        wait_for(self._is_ready, 60)

    def command(self, data: Path, port: int) -> list[object]:
        """What serves the cluster in a folder."""
        assert BINARIES
        return [BINARIES / "postgres", "-D", data, "-p", port, *self._options]

    def _is_ready(self) -> bool:
        import psycopg  # noqa: PLC0415

        with contextlib.suppress(psycopg.OperationalError):
            self.execute("SELECT 1")
            return True
        return False

    def begin(self) -> None:
        super().begin()
        if self._count:     # else it is not known yet whether the port is ours
            wait_for(self._is_ready, 60)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Within, it answers nobody, and closes nothing."""
        stopped = [self.process.pid]
        os.kill(self.process.pid, signal.SIGSTOP)   # first, or it would begin others
        try:
            stopped += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
            for pid in stopped[1:]:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def standby(self) -> Iterator[Program]:
        """A server that follows it, at a port of its own."""
        assert BINARIES
        data, place = self.folder / "standby", f"host=127.0.0.1 port={self.port} user=owner password='{PASSWORD}'"
        run(BINARIES / "pg_basebackup", "-d", place, "-D", data, "-R", "-c", "fast", "--no-sync")
        made = Program(self.folder, lambda port: self.command(data, port))
        try:
            yield made
        finally:
            made.end()

    def execute(self, statement: str, database: str = "postgres", port: int = 0) -> list[Any]:
        """As somebody else would; at its port, or at that of its standby."""
        import psycopg  # noqa: PLC0415

        with psycopg.connect(host="127.0.0.1", port=port or self.port, user="owner", password=PASSWORD, dbname=database,
                             autocommit=True) as connection:  # fmt: skip
            found = connection.execute(statement)
            return found.fetchall() if found.description else []

    def url(self, name: str, port: int = 0) -> str:
        return f"postgresql+psycopg://owner@127.0.0.1:{port or self.port}/{name}"

    def url_of(self, name: str, *ports: int) -> str:
        """That of one of several servers."""
        return f"postgresql+psycopg://owner@/{name}?{'&'.join(f'host=127.0.0.1:{port}' for port in ports)}"

    def database(self, more: str = "") -> str:
        """The name of a new, empty one."""
        self._count += 1
        name = f"test{self._count}"
        self.execute(f"CREATE DATABASE {name} {more}")
        return name

    def prepared(self) -> str:
        """The name of a new one with nothing but our tables, as a first start would have made it."""
        from healthchecker import PostgresServer, Store  # noqa: PLC0415

        if not self._model:
            self._model = self.database()
            Store(PostgresServer(self.url(self._model), SecretStr(PASSWORD))).close()
        return self.database(f"TEMPLATE {self._model}")


@functools.cache
def missing_postgres() -> str:
    """Why there is none."""
    if not BINARIES or os.name != "posix":
        return "no postgres"
    with contextlib.suppress(ImportError):
        import psycopg  # noqa: F401, PLC0415

        return ""
    return "no psycopg (pip install -r tests/requirements.txt)"


@contextlib.contextmanager
def open_postgres() -> Iterator[Postgres]:
    if why := missing_postgres():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = Postgres(Path(folder))
        try:
            yield server
        finally:
            server.end()


@contextlib.contextmanager
def open_pgbouncer(postgres: Postgres, address: str = "127.0.0.1") -> Iterator[Program]:
    """A pooler that gives a client another connection for each transaction; at `address`, too."""
    if not PGBOUNCER:
        pytest.skip("no pgbouncer")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        users = Path(folder) / "users"
        users.write_text(f'"owner" "{PASSWORD}"\n', encoding="utf-8")
        places = ",".join({"127.0.0.1": "", address: ""})

        def command(port: int) -> list[object]:
            text = (f"[databases]\n* = host=127.0.0.1 port={postgres.port}\n[pgbouncer]\nlisten_addr = {places}\n"
                    f"listen_port = {port}\nauth_type = scram-sha-256\nauth_file = {users}\npool_mode = transaction\n"
                    "unix_socket_dir =\ndefault_pool_size = 3\nserver_round_robin = 1\n")  # fmt: skip
            (Path(folder) / "ini").write_text(text, encoding="utf-8")
            return [PGBOUNCER, Path(folder) / "ini"]

        server = Program(Path(folder), command)
        try:
            yield server
        finally:
            server.end()


def database_in(folder: Path, name: str = "healthchecker.db") -> Database:
    """The database of a test in its folder."""
    from healthchecker import PostgresServer, SqliteFile  # noqa: PLC0415

    if (folder / URL_FILE).exists():
        return PostgresServer((folder / URL_FILE).read_text(encoding="utf-8"), SecretStr(PASSWORD))
    return SqliteFile(folder / name)


def settings_of(folder: Path) -> str:
    """What an inventory has to say of it."""
    path = folder / URL_FILE
    return (f"  database: '{path.read_text(encoding='utf-8')}'\n  database_password: '{PASSWORD}'\n"
            if path.exists() else "")  # fmt: skip


@contextlib.contextmanager
def refusing(database: Database, what: str, when: str = "true") -> Iterator[None]:
    """Has a database refuse to write, such as INSERT ON event."""
    function = ("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$BEGIN RAISE EXCEPTION 'as the test wants'; END$$")  # fmt: skip
    is_file = hasattr(database, "path")
    if is_file:
        execute(database, f"CREATE TRIGGER refuse BEFORE {what} WHEN {when} "
                          "BEGIN SELECT RAISE(ABORT, 'as the test wants'); END")  # fmt: skip
    else:
        execute(database, function, f"CREATE TRIGGER refuse BEFORE {what} FOR EACH ROW WHEN ({when}) "
                                    "EXECUTE FUNCTION refuse()")  # fmt: skip
    yield
    execute(database, "DROP TRIGGER refuse" if is_file else "DROP FUNCTION refuse CASCADE")


def execute(database: Database, *statements: str, **values: object) -> list[Any]:
    """What another program does to a database; the rows of the last statement."""
    rows: list[Any] = []
    options = database.engine_options()
    engine = sqlalchemy.create_engine(options.pop("url"), poolclass=sqlalchemy.NullPool,
                                      **{name: options[name] for name in options if "pool" not in name})  # fmt: skip
    with engine.connect() as connection:
        for statement in statements:
            found = connection.execute(sqlalchemy.text(statement), values)
            rows = [*found] if found.returns_rows else []
        connection.commit()
    return rows
