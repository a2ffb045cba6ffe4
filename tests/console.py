"""Clients of the console: over HTTP to a service of its own, and in this process with a clock that a test sets."""

from __future__ import annotations

import contextlib
import copy
import functools
import http.client
import json
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import flask
from service import FEW, Service, prepared_keys, store_in, write_inventory
from sshd import wait_for

from healthchecker import (
    COOKIE,
    FIRST_USER,
    ConnectionContext,
    ConsoleContext,
    ConsoleServer,
    Counters,
    HealthAggregator,
    KnownHosts,
    LoginThrottle,
    Metrics,
    Monitor,
    PollContext,
    Principal,
    Recorder,
    Resolver,
    Retention,
    ServingMetrics,
    Setting,
    User,
    Vault,
    build_console,
    db,
    find_user,
    hash_password,
    import_inventory,
    load_inventory,
    open_session,
    revise,
    revision,
    sqlalchemy,
)

NAME, DOCUMENTED = FIRST_USER
PASSWORD = "correct horse battery"
TABLES = db.metadata.sorted_tables
JSON, PROBLEM, FORM = "application/json", "application/problem+json", "application/x-www-form-urlencoded"


class Reply(NamedTuple):
    """An answer; header names in lower case, `json` None when the body is none."""

    status: int
    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body) if "json" in self.headers.get("content-type", "") else None

    @property
    def fields(self) -> dict[str, str]:
        """The fields of a problem, with what is wrong with each."""
        return {fault["field"]: fault["message"] for fault in self.json.get("errors", [])}

    @property
    def cookie(self) -> str:
        """The session that it sets, empty for none."""
        for part in self.headers.get("set-cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name.startswith(COOKIE):
                return value
        return ""


class Client:
    """Speaks to a service as a program (with `token`) or as a browser (with `cookie`)."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.token = self.cookie = ""

    @property
    def origin(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, method: str, path: str, body: str | bytes = "", headers: Mapping[str, str] | None = None) -> Reply:
        """One request with just these headers and, where there is one, the login."""
        login = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        login |= {"Cookie": f"{COOKIE}_{self.port}={self.cookie}"} if self.cookie else {}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=70)
        try:
            connection.request(method, path, body or None, {**login, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, text)
        finally:
            connection.close()

    def api(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """A request to the API; what comes back is JSON, a problem, or nothing."""
        content = "" if body is None else json.dumps(body)
        reply = self.ask(method, f"/-/api/{path}", content, {"Content-Type": JSON, **headers} if content else headers)
        expected = "" if reply.status == 204 else JSON if reply.status < 400 else PROBLEM
        assert reply.headers.get("content-type", "") == expected, reply
        return reply

    def form(self, path: str, fields: Mapping[str, str], **headers: str) -> Reply:
        """A form sent by a page of the service."""
        return self.ask("POST", path, urlencode(fields), {"Content-Type": FORM, "Origin": self.origin, **headers})

    def log_in(self, name: str = NAME, password: str = PASSWORD) -> Client:
        """This client with a bearer token."""
        reply = self.api("POST", "login", {"username": name, "password": password})
        assert reply.status == 200, reply
        self.token = reply.json["token"]
        return self

    def open_session(self, name: str = NAME, password: str = PASSWORD) -> Client:
        """This client with a session."""
        reply = self.form("/-/login", {"username": name, "password": password})
        assert reply.status == 303 and reply.cookie, reply
        self.cookie = reply.cookie
        return self


def resource_path(name: str) -> str:
    return f"resources/{quote(name, safe='')}"


def make_user(name: str = NAME, password: str = PASSWORD, role: str = "admin") -> User:
    """As User.create makes it, but hashed with few rounds: each login of it is cheap.

    `initial` where the password is the documented one."""
    salt = os.urandom(16)
    hashed = hash_password(password, salt, FEW)
    return User(username=name, salt=salt, rounds=FEW, password=hashed, role=role, initial=password == DOCUMENTED)


def prepared_database(folder: Path, *users: User) -> None:
    """Puts keys and a database with these users, or with NAME whose password is PASSWORD, into `folder`."""
    prepared_keys(folder)
    with contextlib.closing(store_in(folder)) as store, store.writing() as session:
        session.add_all(users or [make_user()])


@contextlib.contextmanager
def console(folder: Path, resources: str = "", service: str = "") -> Iterator[tuple[Service, Client]]:
    """A service whose first user has the password PASSWORD, and a client with its token."""
    prepared_database(folder)
    with Service(write_inventory(folder, resources, service), deadline=60) as running:
        yield running, Client(*running.console).log_in()


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Local:
    """The console in this process, its main process's side included; asked through WSGI, from any address."""

    console = ("", 0)  # where it is served

    def __init__(self, context: ConsoleContext, clock: Clock) -> None:
        self.context, self.store, self.clock = context, context.store, clock
        metrics = Metrics(ServingMetrics(context.lease, Counters(1)), context.store, None, context.connections)
        self.app: flask.Flask = build_console(context, metrics)
        self.token = self.cookie = ""

    def keep(self) -> Local:
        """From now on `restore` leads back to here."""
        with self.store.reading() as session:
            self._kept = {table: session.execute(table.select()).mappings().all() for table in TABLES}
            self._revision = revision(session)
        return self

    def restore(self) -> Local:
        """As it was when it was kept, whatever a test has done since; nobody is logged in."""
        self.token = self.cookie = ""
        self.context.throttle = LoginThrottle(Clock())
        self.clock.now = Clock().now
        with self.store.writing() as session:
            before = revision(session)
            for table in reversed(TABLES):
                session.execute(table.delete())
            for table in TABLES:
                if self._kept[table]:
                    session.execute(table.insert(), [dict(row) for row in self._kept[table]])
            session.flush()
            session.merge(Setting(name="revision", value=before))  # it never falls, or `follow` would wait for nothing
            if before != self._revision:
                revise(session)
                self._revision = before + 1
        return self.follow()

    def follow(self) -> Local:
        """Waits, longer than a request does, until the pollers follow the rows."""
        with self.store.reading() as session:
            wanted = revision(session)
        wait_for(lambda: self.context.monitor._revision >= wanted, 60)
        return self

    def ask(
        self,
        method: str,
        path: str,
        body: str = "",
        headers: Mapping[str, str] | None = None,
        address: str = "127.0.0.1",
        **environ: Any,
    ) -> Reply:
        login = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        login |= {"Cookie": f"{COOKIE}={self.cookie}"} if self.cookie else {}
        answer = self.app.test_client(use_cookies=False).open(
            path,
            method=method,
            data=body,
            headers={**login, **(headers or {})},
            environ_overrides={"REMOTE_ADDR": address, **environ},
        )
        return Reply(answer.status_code, {name.lower(): value for name, value in answer.headers}, answer.text)

    def api(self, method: str, path: str, body: Any = None, **more: Any) -> Reply:
        headers = {"Content-Type": JSON, **more.pop("headers", {})}
        return self.ask(method, f"/-/api/{path}", "" if body is None else json.dumps(body), headers, **more)

    def form(self, path: str, fields: Mapping[str, str], **more: Any) -> Reply:
        headers = {"Content-Type": FORM, "Origin": "http://localhost", **more.pop("headers", {})}
        return self.ask("POST", path, urlencode(fields), headers, **more)

    def log_in_as(self, name: str, kind: str = "session") -> Local:
        """What a login gives, without the time that it takes."""
        with self.store.reading() as session:
            user = find_user(session, name)
        token = open_session(Principal(self.context, "127.0.0.1"), kind, user)
        self.token, self.cookie = (token, "") if kind == "token" else ("", token)
        return self

    def log_in(self, name: str = NAME, password: str = PASSWORD, **more: Any) -> Local:
        reply = self.api("POST", "login", {"username": name, "password": password}, **more)
        assert reply.status == 200, reply
        self.token, self.cookie = reply.json["token"], ""
        return self

    def open_session(self, name: str = NAME, password: str = PASSWORD, **more: Any) -> Local:
        reply = self.form("/-/login", {"username": name, "password": password}, **more)
        assert reply.status == 303 and reply.cookie, reply
        self.token, self.cookie = "", reply.cookie
        return self


@functools.cache
def _loaded_vault() -> Vault:
    """Of the prepared keys: to load them takes longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        return Vault(prepared_keys(Path(folder)))


def prepared_vault(folder: Path) -> Vault:
    """A vault with the prepared keys, which are put into `folder`/keys."""
    vault = copy.copy(_loaded_vault())
    vault.folder = prepared_keys(folder)
    return vault


@contextlib.contextmanager
def local_console(
    folder: Path,
    resources: str = "",
    service: str = "",
    password: str = PASSWORD,
    clock: Callable[[], float] | None = None,
    *,
    keeps: bool = False,
) -> Iterator[Local]:
    """A console with everything that is behind it, pollers too; only the gate is not served.

    Where there is no user yet, the first one has `password`, which was changed if it is not the documented one.
    Time goes by as `clock` says, and otherwise as the test says."""
    inventory = load_inventory(write_inventory(folder, resources, service))
    store, vault = store_in(folder), prepared_vault(folder)
    with store.writing() as session:
        if session.scalar(sqlalchemy.select(User).limit(1)) is None:
            session.add(make_user(NAME, password))
        import_inventory(session, inventory, vault)
    aggregator = HealthAggregator()
    access = ConnectionContext(KnownHosts(folder / "known_hosts"), Resolver(), keeps=keeps)
    watch = PollContext(aggregator, Recorder(store, aggregator, Retention()), access, random.Random(1))
    monitor = Monitor(store, vault, watch)
    clock = clock or Clock()
    context = ConsoleContext(store, inventory, aggregator.lease, vault, monitor, access, clock)
    context.throttle = LoginThrottle(Clock())
    monitor.begin()
    monitor.start()
    try:
        yield Local(context, clock)
    finally:
        monitor.close()
        store.close()


@contextlib.contextmanager
def served(local: Local) -> Iterator[Local]:
    """`local` on a socket, as in the service."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = ConsoleServer(local.app, [sock], local.context.inventory.service)
    server.start()
    local.console = sock.getsockname()
    try:
        yield local
    finally:
        server.close()
