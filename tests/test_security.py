"""The console as an attacker sees it: who gets where, and what a browser or a host can be made to do."""

from __future__ import annotations

import http.client
import json
import shlex
import shutil
import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from conftest import wait_for
from console import DOCUMENTED, FORM, JSON, NAME, PASSWORD, Client, Local, Reply, console, local_console
from service import Service

from healthchecker import (
    API,
    API_ROUTES,
    ASSETS,
    COOKIE,
    PAGES,
    SAMPLES,
    Event,
    Resource,
    ResourceSettings,
    Status,
    Ticket,
    Tickets,
    User,
    find_user,
    revise,
    sqlalchemy,
)

OPERATORS = '  operators: [127.0.0.0/8, "::1", 192.0.2.0/24]'
FAR, FOREIGN = "192.0.2.10", "198.51.100.1"
STATED = "  - {name: stated, platform: simulated, mean_healthy: 100000}"
VIEWER, ADMIN = ("viola", PASSWORD), ("adam", PASSWORD)
ROUTES = {f"{route.method} {route.path}": route for route in (*API_ROUTES, *PAGES)}

# Who may use what, written down once more and by hand: a new route has to be put here.
PUBLIC = {"GET /-/health"}
BEFORE_LOGIN = {"POST /-/api/login", "GET /-/login", "POST /-/login", "GET /-/static/<name>"}
VIEWERS = {
    "GET /-/",
    "GET /-/events",
    "GET /-/password",
    "GET /-/resources/<name>",
    "GET /-/resources/<name>/polls",
    "POST /-/logout",
    "POST /-/password",
    "GET /-/api/openapi.json",
    "POST /-/api/password",
    "GET /-/api/resources",
    "GET /-/api/resources/<name>",
    "GET /-/api/resources/<name>/samples",
    "GET /-/api/events",
}
ADMINS = {
    "GET /-/add",
    "POST /-/add",
    "GET /-/resources/<name>/edit",
    "POST /-/resources/<name>/edit",
    "POST /-/resources/<name>/check",
    "POST /-/resources/<name>/maintenance",
    "POST /-/resources/<name>/trust",
    "POST /-/resources/<name>/remove",
    "GET /-/users",
    "POST /-/users",
    "POST /-/users/<name>",
    "POST /-/users/<name>/remove",
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
ALL = sorted(PUBLIC | BEFORE_LOGIN | VIEWERS | ADMINS)
WRITES = [key for key in ALL if not key.startswith("GET") and key not in BEFORE_LOGIN]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a console with a viewer, an admin, and a resource that was added through it."""
    folder = tmp_path_factory.mktemp("filled")
    with local_console(folder, STATED, OPERATORS) as made:
        with made.store.writing() as session:
            session.add(User.create(*VIEWER, "viewer"))
            session.add(User.create(*ADMIN, "admin"))
        made.log_in(*ADMIN)
        assert made.api("POST", "resources", {"name": "one", "platform": "simulated"}).status == 201
    return folder


@pytest.fixture
def local(filled: Path, tmp_path: Path) -> Iterator[Local]:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    with local_console(tmp_path, STATED, OPERATORS) as made:
        yield made


def target(key: str, name: str = "one") -> tuple[str, str]:
    """Method and path of a route."""
    method, path = key.split()
    name = "nobody" if "/users/" in path else next(iter(ASSETS)) if "/static/" in path else name
    return method, path.replace("<name>", quote(name, safe=""))


def send(local: Local, key: str, headers: dict[str, str] | None = None, **more: Any) -> Reply:
    """A request to a route, with an empty body."""
    method, path = target(key)
    is_api = path.startswith(API)
    body = "{}" if is_api and method != "GET" else ""
    return local.ask(method, path, body, {"Content-Type": JSON if is_api else FORM, **(headers or {})}, **more)


def state(local: Local) -> Any:
    """What a refused request must not change."""
    queries = (*map(sqlalchemy.select, (Resource, User)), sqlalchemy.select(Event).where(Event.kind == "change"))
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


@pytest.mark.parametrize("key", [key for key in ALL if key.startswith("GET")])
def test_head_is_like_get(local: Local, key: str) -> None:
    _, path = target(key)
    wait_for(lambda: local.ask("GET", "/-/health").status == 200)  # the first polls must not come in between
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


def test_anonymous_health_names_nothing(local: Local) -> None:
    """Also to somebody who shows a login that is none, or one that may not enter from there."""
    wait_for(lambda: local.site.is_healthy, 5)
    assert local.ask("GET", "/-/health").json == {"status": "pass"}
    for token in ("x", "", "a.b.c"):
        assert local.ask("GET", "/-/health", headers={"Authorization": f"Bearer {token}"}).json == {"status": "pass"}
    local.log_in_as(VIEWER[0], "token")
    assert "one:state" in local.ask("GET", "/-/health").json["checks"]
    assert local.ask("GET", "/-/health", address=FOREIGN).json == {"status": "pass"}


# --- logins that are none ---
def forged(local: Local, key: bytes = b"", **changed: Any) -> str:
    """A session of the admin, as it is issued but for what is `changed`, signed with our key or another one."""
    with local.store.reading() as session:
        user = find_user(session, ADMIN[0])
    ticket = Ticket("session", "x", user.id, user.stamp, local.clock.now, local.clock.now)
    return Tickets(key or local.site.session_key).write(ticket._replace(**changed))


def test_forged_tickets(local: Local) -> None:
    """The genuine one is taken, so that the others fail for what is wrong with them."""
    now = local.clock.now
    local.cookie = forged(local)
    assert local.ask("GET", "/-/").status == 200
    wrong = [
        forged(local, key=b"k" * 32),
        forged(local, kind="token"),
        forged(local, user=999),
        forged(local, stamp=""),
        forged(local, begun=now - 8 * 3600),
        forged(local, seen=now - 1800),
        local.cookie + "x",
        "." + local.cookie,
        local.cookie.replace(".", ""),
        "x" * 100_000,
        '{"user": 1}',
    ]
    for cookie in wrong:
        local.cookie = cookie
        assert local.ask("GET", "/-/").status == 303, cookie[:100]


def test_cookie_is_no_token_and_token_no_cookie(local: Local) -> None:
    cookie, token = local.log_in_as(ADMIN[0]).cookie, local.log_in_as(ADMIN[0], "token").token
    local.token, local.cookie = cookie, ""
    assert local.api("GET", "resources").status == 401
    local.token, local.cookie = "", token
    assert local.ask("GET", "/-/").status == 303


@pytest.mark.parametrize(
    "authorization", ["Basic YWRhbTpjb3JyZWN0", "Bearer", "Bearer ", "Digest x", "Bearer a b", "x", "Bearer \x00"]
)
def test_other_authorization(local: Local, authorization: str) -> None:
    """It is refused, and a cookie beside it does not help."""
    local.log_in_as(ADMIN[0])
    assert local.ask("GET", "/-/api/resources", headers={"Authorization": authorization}).status == 401


def test_token_of_a_removed_user(local: Local) -> None:
    """It stays dead when another user gets the name, the number and the password."""
    token, cookie = local.log_in_as(VIEWER[0], "token").token, local.log_in_as(VIEWER[0]).cookie
    local.cookie = ""
    local.log_in_as(ADMIN[0], "token")
    with local.store.writing() as session:
        number = session.scalar(sqlalchemy.select(User.id).where(User.username == VIEWER[0]))
    assert local.api("DELETE", f"users/{VIEWER[0]}").status == 204
    with local.store.writing() as session:
        user = User.create(*VIEWER, "admin")
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
    reply = local.ask("GET", path, headers={"Host": "evil.example.com"}, address=FAR)
    location = urlsplit(reply.headers["location"])
    assert (reply.status, location.scheme, location.netloc, location.path) == (303, "", "", "/-/login")
    assert "\n" not in reply.headers["location"] and "evil.example.com" not in location.netloc


def raw(service: Service, request: bytes) -> bytes:
    """The answer to bytes as they are."""
    with socket.create_connection((service.host, service.port), timeout=10) as connection:
        connection.sendall(request)
        connection.settimeout(10)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def test_paths_that_mean_the_same(tmp_path: Path) -> None:
    """Over the wire, where nothing cleans them up before: none of them gets around the login."""
    with console(tmp_path, STATED) as (service, client):
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
EVIL = "\"'><x-evil onload=alert(1)>{{7*7}}</x-evil><!--"
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
        row = Resource(name=name, origin="api", maintenance=4e9, maintenance_reason=EVIL)
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
        for kind in ("state", "gate", "change", "login"):
            session.add(Event(at=local.clock.now, kind=kind, resource=name, text=EVIL, actor=EVIL, address=EVIL))
        session.add(User.create(name, PASSWORD))
        revise(session)
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
            assert "49" not in "".join(page.texts).split(), "a template was evaluated"
            seen += "".join(page.texts).count("{{7*7}}")
        else:
            assert kind in ("application/json", "application/health+json"), path
    assert seen > 20, "the pages show none of it"


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


def test_hostile_output_of_a_real_check(tmp_path: Path) -> None:
    """From a command's output, over poll and database, to the pages."""
    with console(tmp_path, STATED) as (service, client):
        body = {"name": "one", "platform": "local", "critical": False}
        checks = [{"name": "evil", "command": f"echo {shlex.quote(EVIL)}; exit 1"}]
        client.api("POST", "resources", {**body, "checks": checks})
        wait_for(lambda: client.api("POST", "resources/one/check").json.get("cause") == "check", 5)
        browser = Client(service.host, service.port).open_session(NAME, PASSWORD)
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


def test_unforeseen_failure_tells_nothing(local: Local, caplog: pytest.LogCaptureFixture) -> None:
    """A row that cannot be read: a plain sentence for the client, the rest for the log."""
    with local.store.writing() as session:
        session.execute(sqlalchemy.text("UPDATE resource SET settings = '{\"broken-on-purpose'"))
    local.log_in_as(ADMIN[0], "token")
    reply = local.api("GET", "resources")
    assert reply.status == 500 and reply.headers["content-type"] == "application/problem+json"
    assert "broken" not in reply.body and "Traceback" not in reply.body and ".py" not in reply.body
    assert [record for record in caplog.records if record.exc_info]


def test_documented_password_is_of_no_use_to_a_page_elsewhere(local: Local) -> None:
    """A site whose name stands for 127.0.0.1 makes a browser here ask for it: its origin is its own, and refused."""
    rebound = {"HTTP_HOST": "evil.example.com:8080"}
    headers = {"Origin": "http://evil.example.com:8080", "Sec-Fetch-Site": "same-origin", "Content-Type": JSON}
    body = json.dumps({"username": NAME, "password": DOCUMENTED})
    reply = local.ask("POST", "/-/api/login", body, headers, **rebound)
    assert reply.status == 403 and "token" not in reply.body


def test_session_does_not_reach_the_application(tmp_path: Path) -> None:
    """A browser sends the cookie below /-/ alone; the gate in front of the application needs none."""
    with console(tmp_path, STATED) as (service, _):
        connection = http.client.HTTPConnection(service.host, service.port, timeout=10)
        body = f"username={NAME}&password=correct+horse+battery"
        connection.request("POST", "/-/login", body, {"Content-Type": FORM})
        cookie = connection.getresponse().headers["Set-Cookie"]
        connection.close()
        assert cookie.startswith(f"{COOKIE}=") and "Path=/-/" in cookie and "Domain" not in cookie
