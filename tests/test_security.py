"""The console as an attacker sees it: who gets where, and what a browser or a host can be made to do."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import itertools
import json
import logging
import os
import random
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from conftest import folder_with_database, no_leaks, wait_for
from console import (
    FORM,
    JSON,
    NAME,
    PASSWORD,
    Client,
    Local,
    Reply,
    console,
    local_console,
    make_user,
    served,
)
from service import Service, few_rounds

import healthchecker
from healthchecker import (
    ACCEPT_PAUSE,
    API,
    API_ROUTES,
    ASSETS,
    BOARDS,
    CONSOLE_CONNECTIONS,
    CONSOLE_IDLE,
    CONSOLE_SENT,
    COOKIE,
    PAGES,
    SAMPLES,
    STALL_TIMEOUT,
    Acknowledgement,
    ConnectionContext,
    ConsoleServer,
    Event,
    LoginSession,
    Maintenance,
    NewToken,
    Principal,
    Resource,
    ResourceSettings,
    ServiceSettings,
    Status,
    Target,
    User,
    find_user,
    issue_token,
    main,
    revise,
    sqlalchemy,
    token_hash,
)

OPERATORS = '  operators: [127.0.0.0/8, "::1", 192.0.2.0/24]'
FAR, FOREIGN = "192.0.2.10", "198.51.100.1"
STATED = "  - {name: stated, platform: simulated, mean_healthy: 100000}"
VIEWER, ADMIN = ("viola", PASSWORD), ("adam", PASSWORD)
ROUTES = {f"{route.method} {route.path}": route for route in (*API_ROUTES, *PAGES, *BOARDS)}

# Who may use what, written down once more and by hand: a new route has to be put here.
PUBLIC = {"GET /-/health", "GET /-/livez", "GET /-/status"}
BEFORE_LOGIN = {"POST /-/api/login", "POST /-/api/push/<name>", "GET /-/login", "POST /-/login", "GET /-/static/<name>"}
VIEWERS = {
    "GET /-/",
    "GET /-/events",
    "GET /-/incidents",
    "GET /-/password",
    "GET /-/resources/<name>",
    "POST /-/logout",
    "POST /-/password",
    "GET /-/api/openapi.json",
    "POST /-/api/password",
    "GET /-/api/gate",
    "GET /-/api/groups",
    "GET /-/api/maintenance",
    "GET /-/api/resources",
    "GET /-/api/resources/<name>",
    "GET /-/api/resources/<name>/samples",
    "GET /-/api/events",
    "GET /-/api/incidents",
    "GET /-/api/uptime",
    "GET /-/api/sessions",
    "DELETE /-/api/sessions/<id>",
    "GET /-/api/tokens",
    "POST /-/api/tokens",
    "DELETE /-/api/tokens/<id>",
    "GET /-/tokens",
    "POST /-/tokens",
    "POST /-/tokens/<number>/revoke",
}
ADMINS = {
    "GET /-/add",
    "POST /-/add",
    "POST /-/override",
    "POST /-/maintenance",
    "POST /-/maintenance/<number>/end",
    "POST /-/resources/<name>/acknowledgement",
    "POST /-/resources/<name>/acknowledgement/end",
    "POST /-/api/maintenance",
    "DELETE /-/api/maintenance/<number>",
    "POST /-/api/resources/<name>/acknowledgement",
    "DELETE /-/api/resources/<name>/acknowledgement",
    "POST /-/api/gate",
    "GET /-/resources/<name>/edit",
    "POST /-/resources/<name>/edit",
    "POST /-/resources/<name>/check",
    "POST /-/resources/<name>/maintenance",
    "POST /-/resources/<name>/maintenance/end",
    "POST /-/resources/<name>/trust",
    "POST /-/resources/<name>/remove",
    "GET /-/users",
    "POST /-/users",
    "POST /-/users/<name>",
    "POST /-/users/<name>/remove",
    "POST /-/sessions/<number>/end",
    "POST /-/api/resources",
    "PATCH /-/api/resources/<name>",
    "DELETE /-/api/resources/<name>",
    "POST /-/api/test",
    "POST /-/api/resources/<name>/test",
    "POST /-/api/resources/<name>/check",
    "POST /-/api/resources/<name>/maintenance",
    "DELETE /-/api/resources/<name>/maintenance",
    "POST /-/api/resources/<name>/trust",
    "GET /-/api/users",
    "POST /-/api/users",
    "PATCH /-/api/users/<name>",
    "DELETE /-/api/users/<name>",
}
# Not with an API token that has a name, whosever: what it could prolong itself with. Nor any page.
BY_LOGIN = {
    "POST /-/api/password",
    "POST /-/api/tokens",
    "DELETE /-/api/tokens/<id>",
    "DELETE /-/api/sessions/<id>",
    "POST /-/api/users",
    "PATCH /-/api/users/<name>",
    "DELETE /-/api/users/<name>",
}
ALL = sorted(PUBLIC | BEFORE_LOGIN | VIEWERS | ADMINS)
WRITES = [key for key in ALL if not key.startswith("GET") and key not in BEFORE_LOGIN]


@contextlib.contextmanager
def filled(folder: Path, service: str = OPERATORS) -> Iterator[Local]:
    """A console with a viewer, an admin, and a resource that was added through it."""
    with local_console(folder, STATED, service) as made:
        with made.store.writing() as session:
            session.add(make_user(*VIEWER, "viewer"))
            session.add(make_user(*ADMIN))
        made.log_in(*ADMIN)
        one = {"name": "one", "platform": "simulated", "mean_healthy": 100_000}
        assert made.api("POST", "resources", one).status == 201
        for name in ("stated", "one"):  # the first polls must not come in between
            assert made.api("POST", f"resources/{name}/check").status == 200
        yield made.keep()


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with filled(folder_with_database(request, tmp_path_factory)) as made:
        yield made


@pytest.fixture
def local(shared: Local) -> Iterator[Local]:
    with few_rounds():
        yield shared.restore()


def target(key: str, name: str = "one") -> tuple[str, str]:
    """Method and path of a route."""
    method, path = key.split()
    name = "nobody" if "/users/" in path else next(iter(ASSETS)) if "/static/" in path else name
    return method, path.replace("<name>", quote(name, safe="")).replace("<id>", "0" * 64)


def send(local: Local, key: str, headers: dict[str, str] | None = None, **more: Any) -> Reply:
    """A request to a route, with an empty body."""
    method, path = target(key)
    is_api = path.startswith(API)
    body = "{}" if is_api and method != "GET" else ""
    return local.ask(method, path, body, {"Content-Type": JSON if is_api else FORM, **(headers or {})}, **more)


def state(local: Local) -> Any:
    """What a refused request must not change."""
    tables = Resource, User, Maintenance, Acknowledgement
    queries = (*map(sqlalchemy.select, tables), sqlalchemy.select(Event).where(Event.kind == "change"))
    with local.store.reading() as session:
        return [[vars(row) | {"_sa_instance_state": None} for row in session.scalars(query)] for query in queries]


# --- who gets where ---
def test_every_route_is_in_the_table() -> None:
    assert sorted(ROUTES) == ALL


@pytest.mark.parametrize("key", ALL)
def test_who_may_use_a_route(local: Local, key: str) -> None:
    """Anonymous, viewer and admin; from a foreign network nobody, whatever they show."""
    is_api = API in key
    anonymous = send(local, key)
    assert send(local, key, address=FOREIGN).status == (403 if key not in PUBLIC else anonymous.status)
    if key in PUBLIC | BEFORE_LOGIN:
        assert anonymous.status != 403 and "log in first" not in anonymous.body
        return
    assert anonymous.status == (401 if is_api or not key.startswith("GET") else 303)
    if is_api:
        assert anonymous.headers["www-authenticate"] == "Bearer"
    for account, allowed in ((VIEWER, VIEWERS), (ADMIN, ADMINS | VIEWERS)):
        for kind in ("session", "token"):
            local.log_in_as(account[0], kind)
            assert send(local, key, {"Origin": "http://localhost"}, address=FOREIGN).status == 403
            reply = send(local, key, {"Origin": "http://localhost"})
            assert (reply.status in (401, 403)) == (key not in allowed), (account, key, reply)
            assert reply.status < 500 or reply.status == 504


@pytest.mark.parametrize("login", [{"Authorization": "Bearer x"}, {"Cookie": f"{COOKIE}=x"}], ids=["token", "cookie"])
def test_nothing_is_looked_up_for_who_is_no_operator(local: Local, login: dict[str, str]) -> None:
    """Whatever they show: where the database is away, each of them would wait for it. The status page is anybody's."""
    asked, here = list[str](), threading.get_ident()

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if threading.get_ident() == here:
            asked.append(statement)

    sqlalchemy.event.listen(local.store.engine, "before_cursor_execute", note)
    try:
        for key in {*ALL, "GET /-/metrics", "GET /-/nothing", "POST /-/nothing"} - {"GET /-/status"}:
            assert send(local, key, login, address=FOREIGN).status < 500
        assert not asked
        assert send(local, "GET /-/api/gate", login).status in (401, 303) and asked
    finally:
        sqlalchemy.event.remove(local.store.engine, "before_cursor_execute", note)


@pytest.mark.parametrize("key", [key for key in ALL if key.startswith("GET")])
def test_head_is_like_get(local: Local, key: str) -> None:
    _, path = target(key)
    assert local.ask("HEAD", path).status == local.ask("GET", path).status
    local.log_in_as(VIEWER[0])
    reply = local.ask("HEAD", path)
    assert (reply.status, reply.body) == (local.ask("GET", path).status, "")


def test_viewer_changes_nothing(local: Local) -> None:
    local.log_in_as(VIEWER[0], "token")
    before = state(local)
    for key in sorted(ADMINS):
        assert send(local, key).status == 403
    assert local.api("PATCH", f"users/{VIEWER[0]}", {"role": "admin"}).status == 403
    assert local.api("POST", "password", {"current": PASSWORD, "new": PASSWORD + "!", "role": "admin"}).status == 422
    assert state(local) == before


@pytest.mark.parametrize("path", ["/-/nothing", "/-/api/nothing", "/-/api", "/-/api/", "/-/resources/", "/-/users/a/b"])
def test_anonymous_do_not_learn_what_is_there(local: Local, path: str) -> None:
    """An unknown path and a resource that is not there look like all others."""
    known = "/-/api/resources/one" if path.startswith(API) else "/-/resources/one"
    assert local.ask("GET", path).status == local.ask("GET", known).status
    assert local.ask("GET", path, address=FOREIGN).body == local.ask("GET", known, address=FOREIGN).body
    local.log_in_as(VIEWER[0])
    assert local.ask("GET", path).status == 404


def test_what_an_operator_wrote_is_not_for_the_anonymous(local: Local) -> None:
    """Neither that nor who it was; and it has to be an admin."""
    local.clock.now = time.time()  # by which the override ends
    local.log_in_as(ADMIN[0], "token")
    order = {"action": "close", "for": "1h", "reason": "the reason"}
    assert local.api("POST", "gate", order).json["override"]["actor"] == ADMIN[0]
    local.token = ""
    for path in ("/-/health", "/-/metrics", "/-/login", "/-/"):
        reply = local.ask("GET", path)
        assert "the reason" not in reply.body and ADMIN[0] not in reply.body, path
    local.log_in_as(VIEWER[0], "token")
    assert local.api("POST", "gate", {"action": "auto"}).status == 403
    assert local.api("GET", "gate").json["override"]["reason"] == "the reason"
    local.log_in_as(ADMIN[0], "token")
    assert local.api("POST", "gate", {"action": "auto"}).json["override"] is None


def test_anonymous_health_names_nothing(local: Local) -> None:
    """Also to somebody who shows a login that is none, or one that may not enter from there."""
    wait_for(lambda: local.context.is_healthy)
    assert local.ask("GET", "/-/health").json == {"status": "pass"}
    for token in ("x", "", "a.b.c"):
        assert local.ask("GET", "/-/health", headers={"Authorization": f"Bearer {token}"}).json == {"status": "pass"}
    local.log_in_as(VIEWER[0], "token")
    assert "one:state" in local.ask("GET", "/-/health").json["checks"]
    assert local.ask("GET", "/-/health", address=FOREIGN).json == {"status": "pass"}


# --- logins that are none ---
def test_login_that_is_none(local: Local) -> None:
    """The genuine one is taken, so that the others fail for what is wrong with them."""
    token = local.log_in_as(ADMIN[0]).cookie
    assert local.ask("GET", "/-/").status == 200
    with local.store.reading() as session:
        rows = session.scalars(sqlalchemy.select(LoginSession)).all()
    assert token_hash(token) in [row.token_hash for row in rows]
    assert not any(token in str(vars(row)) for row in rows), "only a hash is stored"
    wrong = [token + "x", token[:-1], token.swapcase(), token_hash(token), f"{token} {token}", "x" * 10_000]
    for cookie in wrong:
        local.cookie = cookie
        assert local.ask("GET", "/-/").status == 303, cookie[:100]
        assert local.ask("GET", "/-/api/resources", headers={"Authorization": f"Bearer {cookie}"}).status == 401


@pytest.mark.parametrize(
    "change",
    [{"begun_at": -8 * 3600.0}, {"seen_at": -1800.0}, {"kind": "token"}, {"kind": "other"}, {"user_id": 1}],
    ids=str,
)
def test_row_that_is_no_login_any_more(local: Local, change: dict[str, Any]) -> None:
    token = local.log_in_as(ADMIN[0]).cookie
    change = {key: value + local.clock.now if key.endswith("_at") else value for key, value in change.items()}
    with local.store.writing() as session:
        session.execute(sqlalchemy.update(LoginSession).values(change).where(
            LoginSession.token_hash == token_hash(token)))  # fmt: skip
    assert local.ask("GET", "/-/").status == (200 if "user_id" in change else 303)


def test_cookie_is_no_token_and_token_no_cookie(local: Local) -> None:
    cookie, token = local.log_in_as(ADMIN[0]).cookie, local.log_in_as(ADMIN[0], "token").token
    local.token, local.cookie = cookie, ""
    assert local.api("GET", "resources").status == 401
    local.token, local.cookie = "", token
    assert local.ask("GET", "/-/").status == 303


@pytest.mark.parametrize("authorization", ["Bearer", "Bearer ", "Bearer a b", "bearer x", "Bearer \x00"])
def test_wrong_bearer(local: Local, authorization: str) -> None:
    """It is refused, and a cookie beside it does not help."""
    local.log_in_as(ADMIN[0])
    assert local.ask("GET", "/-/api/resources", headers={"Authorization": authorization}).status == 401


@pytest.mark.parametrize("authorization", ["Basic YWRhbTpjb3JyZWN0", "Basic é", "Digest x", "Negotiate x", "x", " "])
def test_authorization_of_a_proxy(local: Local, authorization: str) -> None:
    """It is not ours: it neither logs in nor out."""
    headers = {"Authorization": authorization}
    assert local.ask("GET", "/-/api/resources", headers=headers).status == 401
    local.log_in_as(ADMIN[0])
    assert local.ask("GET", "/-/api/resources", headers=headers).status == 200
    assert local.ask("GET", "/-/", headers=headers).status == 200


def test_token_of_a_removed_user(local: Local) -> None:
    """It stays dead when another user gets the name, the number and the password."""
    token, cookie = local.log_in_as(VIEWER[0], "token").token, local.log_in_as(VIEWER[0]).cookie
    local.cookie = ""
    local.log_in_as(ADMIN[0], "token")
    with local.store.writing() as session:
        number = session.scalar(sqlalchemy.select(User.id).where(User.username == VIEWER[0]))
    assert local.api("DELETE", f"users/{VIEWER[0]}").status == 204
    with local.store.writing() as session:
        user = make_user(*VIEWER)
        user.id = number
        session.add(user)
    local.token = token
    assert local.api("GET", "resources").status == 401
    local.token, local.cookie = "", cookie
    assert local.ask("GET", "/-/").status == 303


def test_planted_session_is_not_kept(local: Local) -> None:
    """Whoever has planted a cookie in a browser gains nothing when its user logs in."""
    for planted in ("planted", local.log_in_as(VIEWER[0]).cookie):
        local.cookie = planted
        fresh = local.form("/-/login", {"username": ADMIN[0], "password": ADMIN[1]}).cookie
        assert fresh and fresh != planted
        reply = local.ask("GET", "/-/api/users")
        assert reply.status in (401, 403)


# --- requests that other sites make a browser send ---
CROSS = [
    {},
    {"Origin": "http://evil.example.com"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example.com"},
    {"Origin": "http://localhost:8081"},
    {"Origin": "https://localhost"},
    {"Origin": ""},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
    {"Sec-Fetch-Site": "cross-site", "X-Requested-With": "XMLHttpRequest"},
    {"Referer": "http://localhost/-/"},
]


@pytest.mark.long
@pytest.mark.parametrize("headers", CROSS, ids=str)
def test_other_sites_change_nothing(local: Local, headers: dict[str, str]) -> None:
    """With the session's cookie, which a browser might send along; every write there is."""
    local.log_in_as(ADMIN[0])
    before = state(local)
    for key in WRITES:
        assert send(local, key, headers).status == 403, key
    assert state(local) == before
    assert local.ask("GET", "/-/").status == 200, "and nobody was logged out"


@pytest.mark.parametrize("headers", [{"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}], ids=str)
def test_own_pages_change_things(local: Local, headers: dict[str, str]) -> None:
    local.log_in_as(ADMIN[0])
    for key in WRITES:
        local.log_in_as(ADMIN[0])
        assert send(local, key, headers).status != 403, key


TOLD = [headers for headers in CROSS if any(headers.get(name) for name in ("Origin", "Sec-Fetch-Site"))]


@pytest.mark.parametrize("headers", TOLD, ids=str)
def test_other_sites_cannot_log_a_browser_in(local: Local, headers: dict[str, str]) -> None:
    reply = local.form("/-/login", {"username": ADMIN[0], "password": ADMIN[1]}, headers={"Origin": "", **headers})
    assert (reply.status, reply.cookie) == (403, "")


def test_programs_need_no_origin(local: Local) -> None:
    fields = f"username={ADMIN[0]}&password=correct+horse+battery"
    assert local.ask("POST", "/-/login", fields, {"Content-Type": FORM}).cookie
    assert local.log_in_as(ADMIN[0], "token").api("DELETE", "resources/one").status == 204


def test_values_of_headers_are_for_admins(local: Local) -> None:
    """Some services take their keys there; the names are no secret."""
    shop = {"name": "shop", "platform": "http", "url": "http://127.0.0.1:1/", "headers": {"x-api-key": "a-key-of-it"}}
    assert local.log_in(*ADMIN).api("POST", "resources", shop).status == 201
    assert local.api("GET", "resources/shop").json["headers"] == shop["headers"]
    for account in (local.log_in(*VIEWER), with_script(local, ADMIN[0], "viewer")):
        assert account.api("GET", "resources/shop").json["headers"] == {"x-api-key": "***"}
        for path in ("/-/api/resources", "/-/resources/shop", "/-/api/health", "/-/health"):
            assert "a-key-of-it" not in account.ask("GET", path).body


def test_keys_of_a_url_and_of_what_is_sent_are_for_admins(local: Local) -> None:
    """Pages and logs blank the first as a secret."""
    shop = {"name": "shop", "platform": "http", "url": "http://127.0.0.1:1/h?api_key=a-key-of-it&v=1&sig=a=other/key&the-key"}
    store = {"name": "store", "platform": "tcp", "hostname": "127.0.0.1", "port": 1, "send": "AUTH a-key-of-it\r\n"}
    for row in (shop, store):
        assert local.log_in(*ADMIN).api("POST", "resources", row).status == 201
        key = "url" if row is shop else "send"
        assert local.api("GET", f"resources/{row['name']}").json[key] == row[key]
    for account in (local.log_in(*VIEWER), with_script(local, ADMIN[0], "viewer")):
        hidden = account.api("GET", "resources/shop").json
        assert (hidden["url"], hidden["send"]) == ("http://127.0.0.1:1/h?api_key=***&v=1&sig=***&***", None)
        assert not any("cannot be read" in row["reason"] for row in account.api("GET", "resources").json)
        assert account.api("GET", "resources/store").json["send"] == "***"
        for path in ("/-/api/resources", "/-/resources/shop", "/-/resources/store", "/-/api/health", "/-/health", "/-/",
                     "/-/events", "/-/api/events", "/-/incidents"):  # fmt: skip
            body = account.ask("GET", path).body
            assert not any(key in body for key in ("a-key-of-it", "other/key", "the-key")), path
    with local.store.writing() as session:
        session.execute(sqlalchemy.text("UPDATE resource SET settings = '[]' WHERE name = 'shop'"))
    assert "cannot be read" in local.log_in(*VIEWER).api("GET", "resources/shop").json["reason"]


def with_script(local: Local, name: str, role: str) -> Local:
    """With an API token of this user."""
    with local.store.reading() as session:
        user = find_user(session, name)
    made = issue_token(Principal(local.context, "127.0.0.1", user=user), user, NewToken(name="script", role=role))
    local.token, local.cookie = made.token, ""
    return local


@pytest.mark.parametrize("account", [ADMIN, VIEWER])
def test_what_a_named_token_opens(local: Local, account: tuple[str, str]) -> None:
    """As every bearer token: from the operators' networks, without an Origin, and not for a page of another site."""
    with_script(local, account[0], "admin" if account is ADMIN else "viewer")
    before = state(local)
    allowed = {key for key in (ADMINS | VIEWERS if account is ADMIN else VIEWERS) - BY_LOGIN if API in key}
    for key in sorted(ADMINS | VIEWERS):
        assert send(local, key, address=FOREIGN).status == 403, key
        if key in WRITES:
            assert send(local, key, {"Origin": "https://evil.example.com"}).status == 403, key
    assert state(local) == before
    for key in sorted(ADMINS | VIEWERS, key=lambda key: key.startswith("DELETE")):
        reply = send(local, key)
        assert (reply.status == 403) is (key not in allowed) and reply.status != 401, (key, reply)


# --- where a login leads ---
@pytest.mark.parametrize(
    "after",
    [
        "//evil.example.com",
        "https://evil.example.com/",
        "/\\evil.example.com",
        "\\\\evil.example.com",
        "/-/\\evil.example.com",
        "\t//evil.example.com",
        " //evil.example.com",
        "javascript:alert(1)",
        "/-/\r\nSet-Cookie: a=b",
        "/-/\nX: y",
        "/-/\x00",
        "/-/\x7f",
        "/elsewhere",
        "-/",
        "",
        "/-",
        "/-evil",
        "//-/",
        "http:/-/",
        "/-/\u2028",
    ],
)
def test_login_leads_nowhere_else(local: Local, after: str) -> None:
    fields = {"username": ADMIN[0], "password": ADMIN[1], "next": after}
    reply = local.form(f"/-/login?next={quote(after)}", fields)
    assert (reply.status, reply.headers["location"]) == (303, "/-/")


@pytest.mark.parametrize("after", ["/-/", "/-/events?kind=gate", "/-/resources/a%20b", "/-/..//evil.example.com/"])
def test_login_leads_back(local: Local, after: str) -> None:
    reply = local.form(f"/-/login?next={quote(after)}", {"username": ADMIN[0], "password": ADMIN[1]})
    location = urlsplit(reply.headers["location"])
    assert (reply.status, location.scheme, location.netloc) == (303, "", "")
    assert reply.headers["location"] == after


ODD_PATHS = ["resources/%0d%0aX:%20y", "resources/a%5c%5cevil", "/evil.example.com", "?a=%0d%0ab", "events?x=//e"]


@pytest.mark.parametrize("path", [f"/-/{path}" for path in ODD_PATHS])
def test_redirects_to_the_login_stay_here(local: Local, path: str) -> None:
    reply = local.ask("GET", path, headers={"Host": "192.0.2.1:8081"}, address=FAR)
    location = urlsplit(reply.headers["location"])
    assert (reply.status, location.scheme, location.netloc, location.path) == (303, "", "", "/-/login")
    assert "\n" not in reply.headers["location"] and "192.0.2.1" not in location.netloc


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Client]]:
    """A service, as it is reached over the wire, and an admin's client."""
    check = json.dumps([{"name": "evil", "command": f"echo {shlex.quote(EVIL)}; exit 1"}])
    stated = f"{STATED}\n  - {{name: one, platform: local, critical: false, checks: {check}}}"
    with console(folder_with_database(request, tmp_path_factory), stated) as made:
        yield made


def raw(service: Service, request: bytes) -> bytes:
    """The answer to bytes as they are."""
    with socket.create_connection(service.console, timeout=60) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def test_paths_that_mean_the_same(running: tuple[Service, Client]) -> None:
    """Over the wire, where nothing cleans them up before: none of them gets around the login."""
    service, client = running
    client.api("POST", "resources", {"name": "secret-name", "platform": "simulated"})
    for path in (
        "/-/api/resources",
        "//-/api/resources",
        "/-//api/resources",
        "/-/api//resources",
        "/-/./api/resources",
        "/x/../-/api/resources",
        "/-/%61pi/resources",
        "/%2d/api/resources",
        "/-%2fapi/resources",
        "/-/api/resources/",
        "/-/api/resources;a=b",
        "/-/api/resources%00",
        "/-/api/resources?token=x",
        "/-/api/resources#x",
        "/-/login/../api/resources",
        "/-/static/../api/resources",
        "/-/static/..%2fapi%2fresources",
        "/-/livez/../api/resources",
        "http://127.0.0.1/-/api/resources",
        "/-/API/resources",
    ):
        answer = raw(service, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        status = int(answer.split()[1])
        assert b"secret-name" not in answer
        assert status in (303, 400, 401, 404) or not path.lstrip("/").startswith("-"), (path, answer)
    tricks = "X-Original-URL: /-/api/resources\r\nX-Rewrite-URL: /-/api/resources\r\nConnection: close"
    answer = raw(service, f"GET /-/login HTTP/1.1\r\nHost: localhost\r\n{tricks}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200") and b"secret-name" not in answer


# --- what every answer says ---
@pytest.mark.parametrize("key", [*ALL, "GET /-/nothing", "GET /-/api/nothing", "PUT /-/", "PUT /-/api/resources"])
@pytest.mark.parametrize("account", [None, ADMIN])
def test_headers(local: Local, key: str, account: tuple[str, str] | None) -> None:
    if account:
        local.log_in_as(account[0])
    headers = send(local, key, {"Origin": "http://localhost"}).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"] and "*" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert not headers.keys() & {"server", "x-powered-by", "access-control-allow-origin"}
    if "/static/" in key:
        assert headers["cache-control"] == "public, max-age=31536000, immutable"
        assert local.ask("GET", "/-/static/nothing").headers["cache-control"] == "no-store"
    else:
        assert headers["cache-control"] == "no-store"


# --- what hosts and operators write ---
EVIL = "\"'><x-evil onload=alert(1)>{{911*613}}</x-evil><!--"
REFERENCES = ("href", "src", "action", "formaction", "xlink:href")


class Page(HTMLParser):
    """Notes what would act in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.wrong: list[Any] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            value = value or ""
            acts = name.startswith("on") or name in ("style", "srcdoc") or "evil" in name
            leads = name in REFERENCES and not value.startswith(("/-/", "?", "#")) and value != ""
            if acts or leads:
                self.wrong.append((tag, name, value))
        own = tag == "script" and dict(attributes).get("src", "").startswith("/-/static/")
        if tag in ("x-evil", "style", "iframe", "object", "embed", "base") or (tag == "script" and not own):
            self.wrong.append((tag, attributes))

    def handle_data(self, text: str) -> None:
        self.texts.append(text)

    def handle_comment(self, text: str) -> None:
        self.wrong.append(("comment", text))


def poison(local: Local) -> str:
    """Puts EVIL wherever a host or an operator can, as far as each field takes it; gives the resource's name."""
    name = EVIL.replace("/", "").replace("\\", "")
    with local.store.writing() as session:
        settings = ResourceSettings.model_validate({
            "name": name, "hostname": "localhost", "port": 1, "platform": "linux", "username": EVIL, "password": "p",
            "tags": [EVIL], "checks": [{"name": name, "command": EVIL}],
            "limits": {"disk_percent": {"fail": 50}, "cpu_percent": {"fail": 50}}})  # fmt: skip
        row = Resource(name=name, origin="api")
        row.take_settings(settings)
        row.host_key = f"{EVIL} SHA256:x"
        session.add(row)
        session.flush()
        sample = {
            "details": {"hostname": EVIL, "os": EVIL, "kernel": EVIL, EVIL: EVIL},
            "metrics": {f"disk_percent {EVIL}": 90.0, "cpu_percent": 99.0},
            "services": {EVIL: {"good": False, "text": EVIL}},
            "checks": {name: {"good": False, "text": EVIL}},
            "problems": {"memory_percent": EVIL},
        }
        session.add(Status(
            resource_id=row.id, settings_digest=row.settings_digest,
            credential_digest="", state="unhealthy", cause="limit", reason=EVIL,
            since_at=1.0, polled_at=2.0, good=0, bad=1, seconds=0.5, sample=json.dumps(sample),
            strip="hul"))  # fmt: skip
        session.execute(sqlalchemy.insert(SAMPLES).values(
            resource_id=row.id, at=local.clock.now, poll="l", standing="u", counts=0, reason=EVIL))
        session.add(Acknowledgement(resource_id=row.id, at=1.0, actor=EVIL, comment=EVIL))
        for scope in ({"resources": [name]}, {"tags": [EVIL]}):
            session.add(Maintenance(state="begun", start_at=1.0, until_at=4e9, scope=json.dumps(scope), reason=EVIL,
                                    actor=EVIL))  # fmt: skip
        for kind in ("state", "gate", "change", "login"):
            session.add(Event(at=local.clock.now, kind=kind, resource=name, text=EVIL, actor=EVIL, address=EVIL))
        session.add(make_user(name))
        revise(session)
    local.follow()
    return name


def test_nothing_that_others_write_acts_in_a_page(local: Local) -> None:
    """Every page of an admin, with a hostile resource, host, user and event on it."""
    name = poison(local)
    local.log_in_as(ADMIN[0])
    seen = 0
    paths = {target(key, name)[1] for key in ALL if key.startswith("GET") and API not in key and "/static/" not in key}
    evil, known = quote(EVIL), quote(name)
    paths |= {f"/-/?q={evil}&tag={evil}&state={evil}", f"/-/events?resource={evil}&kind={evil}"}
    paths |= {f"/-/resources/{known}?span={span}" for span in ("hour", "month", evil)}
    paths |= {f"/-/login?next={evil}", f"/-/{evil}", f"/-/resources/x{known}"}
    for path in sorted(paths):
        reply = local.ask("GET", path)
        kind = reply.headers["content-type"].partition(";")[0]
        assert reply.status in (200, 303, 404, 503), (path, reply)
        if kind == "text/html":
            page = Page(reply.body)
            assert not page.wrong, (path, page.wrong)
            assert "558443" not in "".join(page.texts), "a template was evaluated"
            seen += "".join(page.texts).count("{{911*613}}")
        else:
            assert kind in ("application/json", "application/health+json", "text/plain"), path
    assert seen > 20, "the pages show none of it"


def test_restored_twice(local: Local) -> None:
    """The harness itself: what a test adds after two restores is followed before it goes on."""
    poison(local.restore())
    local.restore().restore()
    assert poison(local) in local.context.monitor.pollers


def test_nothing_that_a_form_sends_acts_in_its_answer(local: Local) -> None:
    """Forms that are wrong are shown again with what was written into them, but no secrets."""
    name = poison(local)
    for key in ALL:
        method, path = target(key, name)
        if method != "POST" or API in path:
            continue
        local.log_in_as(ADMIN[0])
        fields = dict.fromkeys(
            ("name", "hostname", "username", "tags", "services", "checks.0.name", "checks.0.command", "interval", "key",
             "limits.cpu_percent.fail", "reason", "minutes", "role", "next", "platform", "do", EVIL), EVIL)  # fmt: skip
        secrets = dict.fromkeys(("password", "key_passphrase", "current", "new", "again"), "5ecret-of-somebody")
        reply = local.form(path, fields | secrets)
        assert reply.status < 500, (path, reply)
        if reply.body:
            assert not Page(reply.body).wrong, path
            assert "5ecret-of-somebody" not in reply.body, path


def test_hostile_output_of_a_real_check(running: tuple[Service, Client]) -> None:
    """From a command's output, over poll and database, to the pages."""
    service, client = running
    wait_for(lambda: client.api("POST", "resources/one/check").json.get("cause") == "check")
    browser = Client(*service.console).open_session(NAME, PASSWORD)
    shown = ""
    for path in ("/-/", "/-/resources/one", "/-/events"):
        reply = browser.ask("GET", path)
        assert not Page(reply.body).wrong
        shown += "".join(Page(reply.body).texts)
    assert "x-evil" in shown


# --- bad input to the pages' forms ---
GARBAGE = [
    "",
    "=",
    "&&&",
    "a=%ff%fe&name=%00&hostname=%0a",
    "checks.999.name=a&checks.-1.name=b&checks..=c&checks.0=d&limits=e&limits.x.y=f&limits.cpu_percent.fail.z=g",
    "minutes=99999999999999999999&reason=%00&until=x",
    "name=" + "x" * 10_000,
    "&".join(f"f{number}=x" for number in range(2000)),
    "platform[]=x&platform=&platform=linux&name=a&name=b",
]


@pytest.mark.long
@pytest.mark.parametrize("garbage", GARBAGE, ids=[text[:20] for text in GARBAGE])
@pytest.mark.parametrize("kind", [FORM, "multipart/form-data; boundary=x", "text/plain", JSON])
def test_garbage_in_forms(local: Local, garbage: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused; nothing is added, and nothing fails in an unforeseen way."""
    posts = [key for key in ALL if key.startswith("POST") and API not in key and not key.endswith(("remove", "logout"))]
    local.log_in_as(ADMIN[0])
    before = state(local)[:2]
    for key in posts:
        _, path = target(key)
        reply = local.ask("POST", path, garbage, {"Content-Type": kind, "Origin": "http://localhost"})
        assert reply.status < 500 or reply.status == 504, (path, reply)
    assert state(local)[:2] == before
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("way", ["moved", "another one", "by a command"])
def test_a_key_is_of_the_host_that_was_asked(local: Local, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not of what has its name when the answer comes."""
    row = {"name": "x", "platform": "linux", "hostname": "192.0.2.1", "username": "u", "password": "p", "interval": 600}
    key = f"ssh-ed25519 SHA256:{'A' * 43}"
    assert local.log_in().api("POST", "resources", row | {"critical": False}).status == 201

    def ask(_target: Target, _access: ConnectionContext) -> str:
        if way == "another one":
            assert local.api("DELETE", "resources/x").status == 204
            assert local.api("POST", "resources", row | {"critical": False}).status == 201
        else:
            assert local.api("PATCH", "resources/x", {"hostname": "192.0.2.9", "password": "q"}).status == 200
        return key

    monkeypatch.setattr(healthchecker, "offered_key", ask)
    if way == "by a command":
        assert main(["--inventory", str(local.context.inventory.path), "trust", "x", "--yes"]) == 2
    else:
        reply = local.api("POST", "resources/x/trust", {"host_key": key})
        assert (reply.status, reply.json["detail"]) == (409, "x was changed meanwhile; nothing is trusted: try again")
    assert local.api("GET", "resources/x").json["trusted_key"] is None


def test_damaged_row_shows_in_its_place(local: Local) -> None:
    """And spoils no list; what needs it is refused with the reason, and it can be removed."""
    with local.store.writing() as session:
        session.execute(sqlalchemy.text("UPDATE resource SET settings = '{\"broken-on-purpose' WHERE name = 'one'"))
        session.execute(sqlalchemy.text("UPDATE status SET sample = '[' WHERE resource_id = 1"))
    local.log_in_as(ADMIN[0], "token")
    reply = local.api("GET", "resources")
    assert reply.status == 200 and "broken" not in reply.body
    found = {view["name"]: view for view in reply.json}
    assert (found["one"]["state"], found["one"]["cause"]) == ("unhealthy", "protocol")
    assert "cannot be read" in found["one"]["reason"] and found["stated"]["origin"] == "inventory"
    assert local.api("GET", "resources/one").json == found["one"]
    assert "one:state" in local.ask("GET", "/-/health").json["checks"]
    for method, path in (("PATCH", "resources/one"), ("POST", "resources/one/test"), ("POST", "resources/one/trust")):
        reply = local.api(method, path, {})
        assert reply.status == 409 and "cannot be read" in reply.json["detail"], (path, reply)
    assert local.api("DELETE", "resources/one").status == 204


def test_secret_that_does_not_open_shows_in_its_place(local: Local) -> None:
    body = {"name": "two", "hostname": "127.0.0.1", "port": 1, "username": "u", "password": "p", "critical": False}
    local.log_in_as(ADMIN[0], "token")
    assert local.api("POST", "resources", body).status == 201
    with local.store.writing() as session:
        session.execute(sqlalchemy.text("UPDATE resource SET username = 'v' WHERE name = 'two'"))
    assert local.api("GET", "resources").status == local.api("GET", "resources/two").status == 200
    reply = local.api("POST", "resources/two/test", {})
    assert reply.status == 409 and "write the password again" in reply.json["detail"]
    assert local.api("POST", "resources/two/trust", {}).status == 409
    assert local.api("PATCH", "resources/two", {"password": "q"}).status == 200


@pytest.fixture(scope="module")
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A console that has a name, and a proxy in front of it."""
    service = f"{OPERATORS}\n  console: health.example.com:8081\n  trusted_proxy: [192.0.2.77]"
    with filled(folder_with_database(request, tmp_path_factory), service) as made:
        made.token = ""
        yield made


@pytest.mark.parametrize(
    ("host", "answers"),
    [
        ("evil.example.com", False),
        ("evil.example.com:8081", False),
        ("127.0.0.1.evil.example.com:8081", False),
        ("localhost.evil.example.com", False),
        ("localhost, evil.example.com", False),
        ("", False),
        ("localhost", True),
        ("LOCALHOST:8081", True),
        ("127.0.0.1:8081", True),
        ("192.0.2.7", True),
        ("[2001:db8::1]:8081", True),
        ("health.example.com", True),
        (socket.gethostname(), True),
    ],
)
def test_names_of_the_console(named: Local, host: str, answers: bool) -> None:
    """A site whose name stands for this address (DNS rebinding) is of one origin with itself, and gets nowhere: the
    documented password would open to it the change of itself."""
    headers = {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin", "Content-Type": JSON}
    body = json.dumps({"username": ADMIN[0], "password": ADMIN[1]})
    reply = named.ask("POST", "/-/api/login", body, headers, HTTP_HOST=host)
    assert (reply.status, "token" in reply.body) == ((200, True) if answers else (421, False))
    assert answers or (host or "-") not in reply.body
    reply = named.ask("GET", "/-/login", headers={"Host": host}, address="192.0.2.77")
    assert reply.status == (200 if answers else 421), "the application's proxy is nobody here"


@pytest.mark.long
@pytest.mark.parametrize(("url", "host", "said", "status"), [
    ("", "localhost", {}, 200),
    ("", "localhost", {"For": "192.0.2.1"}, 421),
    ("", "localhost", {"Host": "ops.example.com"}, 421),
    ("", "ops.example.com", {}, 421),
    ("https://ops.example.com/-/", "ops.example.com", {"For": "192.0.2.1", "Proto": "https"}, 200),
    ("https://ops.example.com/-/", "127.0.0.1:8081", {"Host": "ops.example.com"}, 200),
    ("https://ops.example.com/-/", "127.0.0.1:8081", {"For": FOREIGN}, 403),
    ("https://ops.example.com/-/", "127.0.0.1:8081", {"Host": "evil.example.com"}, 421),
    ("https://ops.example.com/-/", "evil.example.com", {"Host": "ops.example.com"}, 421),
    ("https://ops.example.com/-/", "ops.example.com", {"For": "192.0.2.1", "Prefix": "/x"}, 200),
    ("https://ops.example.com/-/", "ops.example.com", {"For": "unix:"}, 400),  # whoever it is, it is no operator
])  # fmt: skip
def test_proxy_of_the_console(url: str, host: str, said: dict[str, str], status: int, tmp_path: Path) -> None:
    """It is believed under the name that is said in the inventory; the application's has no say here."""
    service = f"{OPERATORS}\n  trusted_proxy: [127.0.0.1]\n" + (f"  console_url: {url}\n" if url else "")
    with local_console(tmp_path, STATED, service) as local:
        headers = {"Host": host} | {f"X-Forwarded-{name}": value for name, value in said.items()}
        assert local.ask("GET", "/-/login", headers=headers).status == status


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded"])
@pytest.mark.parametrize("named", ["", "console_url: https://ops.example.com/-/", "trusted_proxy: [192.0.2.9]"])
def test_a_proxy_that_nobody_named(named: str, header: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its clients do not pass for this machine; answer and log say what to set, the log once."""
    with local_console(tmp_path, STATED, f"  {named}\n" if named else "") as local:
        for path in ("/-/login", "/-/metrics", "/-/health") * 2:
            reply = local.ask("GET", path, headers={"Host": "127.0.0.1:8081", header: FOREIGN})
            assert reply.status == 421 and "service.trusted_proxy" in reply.body, path
    assert [one.getMessage() for one in caplog.records if "trusted_proxy" in one.getMessage()] == [
        "console: refused what came by a proxy at 127.0.0.1. A proxy before the console needs service.console_url, and "
        "its address in service.trusted_proxy."]  # fmt: skip


def test_page_of_the_application_cannot_act_in_the_console(running: tuple[Service, Client]) -> None:
    """Its port is another origin, though a browser sends the cookie along: cookies know no ports."""
    service, client = running
    browser = Client(*service.console).open_session(NAME, PASSWORD)
    origin = f"http://{service.host}:{service.port}"
    for headers in ({"Origin": origin, "Sec-Fetch-Site": "same-site"}, {"Origin": origin}, {}):
        for kind in (JSON, FORM, "text/plain"):
            body = json.dumps({"name": "planted", "platform": "simulated"})
            reply = browser.ask("POST", "/-/api/resources", body, {"Content-Type": kind, **headers})
            assert reply.status == 403
            fields = "name=planted&platform=simulated"
            reply = browser.ask("POST", "/-/add", fields, {"Content-Type": kind, **headers})
            assert reply.status == 403
    reply = browser.ask("OPTIONS", "/-/api/resources", headers={"Origin": origin, "Sec-Fetch-Site": "same-site"})
    assert reply.status in (403, 405)
    assert not [name for name in reply.headers if name.startswith("access-control")]
    reply = browser.ask("GET", "/-/api/resources", headers={"Origin": origin, "Sec-Fetch-Site": "same-site"})
    assert not [name for name in reply.headers if name.startswith("access-control")], "a script cannot read it"
    assert "planted" not in client.ask("GET", "/-/api/resources").body


def test_session_does_not_reach_the_application(running: tuple[Service, Client]) -> None:
    """A browser sends the cookie below /-/ alone; the gate in front of the application needs none."""
    service = running[0]
    connection = http.client.HTTPConnection(*service.console, timeout=60)
    body = f"username={NAME}&password=correct+horse+battery"
    connection.request("POST", "/-/login", body, {"Content-Type": FORM})
    cookie = connection.getresponse().headers["Set-Cookie"]
    connection.close()
    assert cookie.startswith(f"{COOKIE}_{service.console[1]}=") and "Path=/-/" in cookie and "Domain" not in cookie


def test_two_consoles_of_one_host(tmp_path: Path) -> None:
    """They do not log each other out, though a browser has the same cookies for both: by host, name and path."""
    fields, jar = f"username={NAME}&password={PASSWORD.replace(' ', '+')}", dict[str, str]()
    with contextlib.ExitStack() as stack:
        consoles = dict[str, Local]()
        for port in ("8081", "8082"):
            (tmp_path / port).mkdir()
            consoles[f"127.0.0.1:{port}"] = stack.enter_context(local_console(tmp_path / port, STATED))

        def ask(method: str, path: str, host: str, body: str = "") -> int:
            headers = {"Host": host, "Origin": f"http://{host}", "Content-Type": FORM,
                       "Cookie": "; ".join(f"{name}={value}" for name, value in jar.items())}  # fmt: skip
            reply = consoles[host].ask(method, path, body, headers)
            name, _, value = reply.headers.get("set-cookie", "").partition(";")[0].partition("=")
            jar.update({name: value} if name else {})
            return reply.status

        for host in consoles:
            assert ask("POST", "/-/login", host, fields) == 303
        assert [ask("GET", "/-/", host) for host in consoles] == [200, 200]
        assert ask("POST", "/-/logout", "127.0.0.1:8081") == 303
        assert [ask("GET", "/-/", host) for host in consoles] == [303, 200]


# --- over a raw socket ---
@pytest.fixture
def address(local: Local) -> Iterator[tuple[str, int]]:
    """Where the console is served."""
    with served(local):
        yield local.console


def exchange(address: tuple[str, int], request: bytes) -> bytes:
    """Everything that comes back."""
    with socket.create_connection(address, timeout=30) as sock:
        with contextlib.suppress(OSError):  # it may have been cut short
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            return b"".join(iter(lambda: sock.recv(65536), b""))
    return b""


MARK = b"mark-of-the-client"
METHODS = [b"GET", b"GET", b"POST", b"PATCH", b"HEAD", b"OPTIONS", b"TRACE", b"get", b"\xff", b"G\x00T", MARK, b""]
TARGETS = [
    b"/-/", b"/-/?\xff", b"/-/\xff", b"/-/?a=%ff&%00=%0d%0a", b"/-/login?next=\xff\xfe", b"/-/api/resources?\xff",
    b"/-/api/login", b"/-/login", b"/-/health?\xff", b"/-/metrics?\xff", b"/-/resources/\xff\x80", b"/-/api/\xff",
    b"/-/resources/%ff%00%2f", b"*", b"http://[::1", b"http://" + MARK + b"/-/", b"//", b"/" + MARK * 400, b"",
    b"/-/api/users/" + b"%" * 50, b"/-/static/..%2f..%2f" + MARK, b"/\x7f", b"/-/?" + b"&" * 2000, b"/-/ /-/",
]  # fmt: skip
NAMES = [
    b"Host", b"Cookie", b"Authorization", b"Content-Length", b"Transfer-Encoding", b"Content-Type", b"Accept-Encoding",
    b"Origin", b"Sec-Fetch-Site", b"Expect", b"Range", b"If-None-Match", b"X-Forwarded-For", b"Connection", b"X Y",
    b"\xff", b"", b"Accept", b"X-Refresh",
]  # fmt: skip
VALUES = [
    b"", b"\xff\xfe", b"localhost", b"[::1", b"a:b:c", b"healthchecker_session=\xff", b"=;;=;" * 100, b"Bearer \xff",
    b"Bearer " + b"x" * 9000, b"Basic \xff", b"-1", b"5", b"99999999999999999999", b"chunked", b"chunked, chunked",
    b"application/json", b"multipart/form-data; boundary=\xff", b"application/x-www-form-urlencoded; charset=\xff",
    b"gzip;q=\xff", b"null", b"same-origin", b"100-continue", MARK, b"a\x00b", b"a\rb", b"\t", b"x" * 40_000,
]  # fmt: skip
BODIES = [b"", b"{}", b"\xff", b'{"a": "\xff"}', b"a=%ff&b", b"5\r\nhello\r\n0\r\n\r\n", b"fffffff\r\n", b"--\xff\r\n"]


def made_request(chance: random.Random) -> bytes:
    version = chance.choice((b"HTTP/1.1", b"HTTP/1.0", b"", MARK))
    line = b" ".join((chance.choice(METHODS), chance.choice(TARGETS), version))
    heads = [b"Host: localhost"] * chance.randrange(2) + [
        chance.choice(NAMES) + chance.choice((b": ", b":", b" ", b"")) + chance.choice(VALUES)
        for _ in range(chance.randrange(4))]  # fmt: skip
    return b"\r\n".join((line, *heads, b"", chance.choice(BODIES)))


def check_answer(request: bytes, answer: bytes) -> None:
    """It is refused in bounded words that say nothing of the request, if it is not answered."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(answer.split(maxsplit=2)[1])
    assert status < 500, (request, answer[:1000])
    assert b"\nServer:" not in head and b"generated by waitress" not in body, (request, head)
    assert status < 400 or (len(head) < 2000 and len(body) < 4000), (request, answer[:1000])
    assert status < 400 or MARK not in answer, (request, answer[:1000])
    assert b"Traceback" not in answer and b".py" not in answer


def test_raw_byte_in_the_query(address: tuple[str, int]) -> None:
    for target in (b"/-/?\xff", b"/-/events?a=\xff", b"/-/api/resources?\xff", b"/-/nothing?\xff", b"/-/\xff?\xff"):
        answer = exchange(address, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert 300 <= int(answer.split()[1]) < 500, answer
        check_answer(target, answer)


def test_whatever_a_request_holds(address: tuple[str, int], caplog: pytest.LogCaptureFixture) -> None:
    """Requests of chance, the same in each run, over a raw socket."""
    chance = random.Random(11)
    answered = 0
    for _ in range(400):
        request = made_request(chance)
        if answer := exchange(address, request):
            check_answer(request, answer)
            answered += 1
    assert answered > 300
    assert not [record for record in caplog.records if record.exc_info or "uncaptured" in record.getMessage()]
    check_answer(b"", exchange(address, b"GET /-/livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))


def test_names_of_fields_are_cut(local: Local) -> None:
    reply = local.api("POST", "login", {f"{number}" + "x" * 2000: 1 for number in range(90)})
    assert reply.status == 422 and len(reply.body) < 100_000


def alive(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Length", "0")])
    return []


def test_console_ends_and_leaves_nothing_behind() -> None:
    """Also with several sockets, with clients that are silent, and when it was never started."""
    with no_leaks():
        for starts in (True, False):
            sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
            addresses = [sock.getsockname() for sock in sockets]
            server = ConsoleServer(alive, sockets, ServiceSettings())
            if starts:
                server.start()
                silent = [socket.create_connection(address, timeout=10) for address in addresses]
                for address in addresses:
                    assert b"200 OK" in exchange(address, b"GET /-/livez HTTP/1.0\r\n\r\n")
            server.close()
            wait_for(lambda server=server: not server.is_alive())  # close waits for it, though not for ever
            for address in addresses:
                with pytest.raises(OSError):
                    socket.create_connection(address, timeout=1).close()
        for sock in silent:
            sock.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_console_without_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    """It says so once, does not spin, and goes on when there are some."""
    resource: Any = importlib.import_module("resource")
    caplog.set_level(logging.INFO)
    sock = socket.create_server(("127.0.0.1", 0))
    server = ConsoleServer(alive, [sock], ServiceSettings())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.closing(server), socket.socket() as client:
        server.start()
        free = os.dup(client.fileno())
        os.close(free)      # the next descriptor to be had
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            client.settimeout(30)
            client.connect(sock.getsockname())
            client.sendall(b"GET /-/livez HTTP/1.0\r\n\r\n")
            begun_mono = time.monotonic()
            wait_for(lambda: time.monotonic() > begun_mono + 3 * ACCEPT_PAUSE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert b"200 OK" in client.recv(1000)
    told = [one.getMessage() for one in caplog.records]
    assert told[0] == "the console takes no connections: OSError: [Errno 24] Too many open files"
    failures = re.fullmatch("the console takes no connections: that is over, after ([0-9]+) failures", told[1])
    assert failures and 1 < int(failures[1]) <= 4 and told[2:] == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_console_whose_loop_breaks(caplog: pytest.LogCaptureFixture) -> None:
    """As poll(2) does that has no memory, or more descriptors than there may be: it is tried again, and said once."""
    resource: Any = importlib.import_module("resource")
    caplog.set_level(logging.ERROR, "waitress.queue")   # as in a service: a thread may be late
    caplog.set_level(logging.INFO)
    with no_leaks():
        sock = socket.create_server(("127.0.0.1", 0))
        server = ConsoleServer(alive, [sock], ServiceSettings())
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        server.start()
        with contextlib.closing(server):
            assert b"200 OK" in exchange(sock.getsockname(), b"GET /-/livez HTTP/1.0\r\n\r\n")
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
            try:
                wait_for(lambda: caplog.records or not server.is_alive())
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert b"200 OK" in exchange(sock.getsockname(), b"GET /-/livez HTTP/1.0\r\n\r\n")
    told = [one.getMessage() for one in caplog.records]
    assert told[0] == "the console does not answer: OSError: [Errno 22] Invalid argument"
    assert told[1].startswith("the console does not answer: that is over, after ") and told[2:] == []


def test_console_holds_few_connections() -> None:
    """Those of nobody that it answers make room, the oldest first, but one that is being answered; whoever sends bodies
    that are too large is cut short, and then all is as before."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=256)
    waits, asked = threading.Event(), threading.Event()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/wait":
            asked.set()
            waits.wait(30)
        return alive(environ, start_response)

    server = ConsoleServer(app, [sock], ServiceSettings(operators=("127.0.0.2/32",), trusted_proxy=("127.0.0.3/32",)))
    server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)

        def connect(source: str, request: bytes = b"") -> socket.socket:
            one = socket.create_connection(sock.getsockname(), timeout=30, source_address=(source, 0))
            one.sendall(request)
            return stack.enter_context(one)

        answered = connect("127.0.0.1", b"GET /wait HTTP/1.0\r\n\r\n")
        assert asked.wait(30)
        friends = [connect(source) for source in ("127.0.0.2", "127.0.0.3")]
        others = [connect("127.0.0.1", b"GET /-/livez HTTP/1.1\r\nX: ") for _ in range(CONSOLE_CONNECTIONS + 30)]
        assert [one.recv(1) for one in others[:30]] == [b""] * 30
        assert len(server._map) <= CONSOLE_CONNECTIONS + 2
        friends += [connect("127.0.0.2") for _ in range(CONSOLE_CONNECTIONS + 10)]
        assert [one.recv(1) for one in (*others, *friends[:10])] == [b""] * (len(others) + 10)
        waits.set()
        for one in (answered, friends[-1], connect("127.0.0.2")):
            one.sendall(b"GET /-/livez HTTP/1.0\r\n\r\n" if one is not answered else b"")
            assert b"200 OK" in one.recv(1000)
        for one in friends:
            one.close()
        wait_for(lambda: len(server._map) < CONSOLE_CONNECTIONS // 2)
        large = b"POST /-/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n" + b"x" * 999_999
        answer = exchange(sock.getsockname(), large)
        assert answer == b"" or b" 413 " in answer.split(b"\r\n")[0]
        assert b"200 OK" in exchange(sock.getsockname(), b"GET /-/livez HTTP/1.0\r\n\r\n")


PUSH = b"POST /-/api/push/backup HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"


def flood(address: tuple[str, int], ending: threading.Event) -> None:
    """Many connections at once, each with many requests."""
    while not ending.is_set():
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(address, 30)) for _ in range(60)]
            for one in clients:
                one.sendall((PUSH + b"{}") * 50)
            for one in clients:
                with contextlib.suppress(ConnectionResetError):     # not all that it sent was read
                    one.recv(1)


@pytest.mark.long
def test_console_answers_others_beside_a_flood_of_requests() -> None:
    """However many it answers at the time, and more than one on each connection: a new one waits for a place, and is
    not ended before its request has come."""
    sock = socket.create_server(("127.0.0.1", 0))
    ending, answered = threading.Event(), itertools.count()

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        next(answered)
        ending.wait(0.01)
        return alive(environ, start_response)

    server = ConsoleServer(app, [sock], ServiceSettings())
    server.start()
    threads = [threading.Thread(target=flood, args=(sock.getsockname(), ending)) for _ in range(3)]
    with contextlib.closing(server):
        for thread in threads:
            thread.start()
        try:
            for number in range(1, 6):
                wait_for(lambda number=number: next(answered) > 100 * number)
                with socket.create_connection(sock.getsockname(), timeout=20) as client:
                    client.sendall(PUSH)
                    time.sleep(0.01)    # its body is another packet
                    client.sendall(b"{}")
                    assert b"200 OK" in client.recv(1000)
        finally:
            ending.set()
            for thread in threads:
                thread.join(60)


def test_console_ends_in_a_turn_that_somebody_else_began() -> None:
    """Before the byte that is to begin one is written, its loop may have closed all, the trigger, too."""
    server = ConsoleServer(alive, [socket.create_server(("127.0.0.1", 0))], ServiceSettings())
    server.start()
    trigger = server._doors[0].trigger
    pull = trigger._physical_pull

    def pull_late() -> None:
        pull()
        server.join(60)
        pull()

    trigger._physical_pull = pull_late
    server.close()
    assert not server.is_alive()


def test_console_says_nothing_of_who_waits(running: tuple[Service, Client]) -> None:
    """A line for each request that comes while its threads are at others would fill the log."""
    service, _ = running
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(http.client.HTTPConnection(*service.console, timeout=60)))
                   for _ in range(60)]  # fmt: skip
        for _ in range(5):
            for one in clients:
                one.request("GET", "/-/login")
            for one in clients:
                assert one.getresponse().read()
    assert "queue depth" not in service.output


def test_console_waits_for_nobody_who_takes_no_answer() -> None:
    """Such clients make room like idle ones, hold no thread, and have a minute to take something."""
    sock = socket.create_server(("127.0.0.1", 0))
    body, ask = b"x" * (16 << 20), b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] != "/large":
            return alive(environ, start_response)
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body[:1], body[1:-1], body[-1:]]

    server = ConsoleServer(app, [sock], ServiceSettings())
    server.start()
    channels = server._doors[0].active_channels

    def waits(late: Collection[Any]) -> bool:
        """Whether one is still there for whom more than a minute passes now."""
        for one in late:
            one._since_mono -= STALL_TIMEOUT
        return not {*late}.isdisjoint([*channels.values()])

    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        silent = [stack.enter_context(socket.create_connection(sock.getsockname(), timeout=30)) for _ in range(10)]
        for number, one in enumerate(silent):
            one.sendall(ask * (9 if number < 8 else 1))
        wait_for(lambda: len(channels) == 10 and all(one.total_outbufs_len for one in [*channels.values()]))
        for door in server._doors:      # as who takes a little of it in that time
            door.maintenance(time.time() + CONSOLE_IDLE + 1)
        assert not any(one.will_close or one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > 2 * CONSOLE_SENT
                       for one in [*channels.values()])
        assert b"200 OK" in exchange(sock.getsockname(), b"GET /-/livez HTTP/1.0\r\n\r\n")
        answer = exchange(sock.getsockname(), ask * 2 + ask.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer.count(b"HTTP/1.1 200 OK") == 3 and answer.count(b"x") == 3 * len(body)
        wait_for(lambda: [one.held for one in channels.values()] == [True] * 8 + [False] * 2)
        late = [*channels.values()][6:]
        wait_for(lambda: not waits(late))
        assert len(channels) == 6 and all(one.held for one in channels.values())
        for _ in range(CONSOLE_CONNECTIONS):
            stack.enter_context(socket.create_connection(sock.getsockname(), timeout=30))
        assert b"200 OK" in exchange(sock.getsockname(), b"GET /-/livez HTTP/1.0\r\n\r\n")
        wait_for(lambda: not any(one.held for one in [*channels.values()]))


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\nX: "], ids=["nothing", "head"])
def test_console_ends_who_sends_an_urgent_byte(begin: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """At once and without a word: its loop would turn for it without a pause, and say so each time."""
    caplog.set_level(logging.ERROR, "waitress.queue")   # as in a service: a thread may be late
    caplog.set_level(logging.WARNING)
    sock = socket.create_server(("127.0.0.1", 0))
    server = ConsoleServer(alive, [sock], ServiceSettings())
    server.start()
    with contextlib.closing(server), socket.create_connection(sock.getsockname(), timeout=10) as client:
        client.sendall(begin)
        client.send(b"x", socket.MSG_OOB)
        with contextlib.suppress(ConnectionResetError):     # the byte is not read
            assert client.recv(1) == b""
        assert b"200 OK" in exchange(sock.getsockname(), b"GET /-/livez HTTP/1.0\r\n\r\n")
    assert not caplog.records


@pytest.mark.parametrize(("begin", "seconds"), [(b"GET / HTTP/1.1\r\nX: ", 5), (b"\r\n", 5), (
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n", 30)], ids=["head", "blank", "body"])
def test_console_waits_for_no_request_for_ever(begin: bytes, seconds: float) -> None:
    """However its bytes trickle in."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = ConsoleServer(alive, [sock], ServiceSettings())
    server.start()
    with contextlib.closing(server), socket.create_connection(sock.getsockname(), timeout=30) as client:
        client.sendall(begin)
        channels = server._doors[0].active_channels
        has_begun = lambda: [  # noqa: E731
            one for one in list(channels.values()) if one.request and one.request.headers_finished == (seconds > 5)
        ]
        (channel,) = wait_for(has_begun)
        channel.request.begun -= seconds - 2
        seen = channel.last_activity
        client.sendall(b"\r\n" if begin == b"\r\n" else b"a")
        wait_for(lambda: channel.last_activity > seen)
        assert not channel.will_close
        channel.request.begun -= 2
        assert client.recv(1) == b""
