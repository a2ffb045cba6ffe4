"""Who may log in, for how long, and how often they may try."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import service
from console import DOCUMENTED, NAME, PASSWORD, Clock, Local, Reply, console, local_console
from service import Service, write_inventory

from healthchecker import (
    ASSETS,
    LOGIN_FAILURES,
    LOGIN_WINDOW,
    LOGINS_KEPT,
    SESSION_IDLE,
    SESSION_LIFE,
    SESSION_STEP,
    TOKEN_LIFE,
    HealthCheckerError,
    SecretError,
    Throttle,
    Ticket,
    Tickets,
    User,
    session_key,
)

SIMULATED = "  - {name: simulated, platform: simulated, interval: 1, mean_healthy: 100000}"
OPERATORS = '  operators: [127.0.0.0/8, "::1", 192.0.2.0/24]'
FAR = "192.0.2.10"
WRONG = "not the right one"


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    with local_console(tmp_path, SIMULATED, OPERATORS) as made:
        yield made


def logged_in(local: Local, **more: Any) -> bool:
    return local.ask("GET", "/-/", **more).status == 200


# --- the session key ---
def test_session_key_is_made_once_and_private(tmp_path: Path) -> None:
    key = session_key(tmp_path)
    assert len(key) == 32 and session_key(tmp_path) == key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["session.key"]
    if sys.platform != "win32":
        assert stat.S_IMODE((tmp_path / "session.key").stat().st_mode) == 0o600


def test_session_key_that_several_make_at_once_is_one(tmp_path: Path) -> None:
    keys: list[bytes] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        keys.append(session_key(tmp_path))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1


@pytest.mark.parametrize("content", [b"", b"short", None])
def test_session_key_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "session.key"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(SecretError, match=r"session\.key"):
        session_key(tmp_path)


# --- tickets ---
def ticket(kind: str = "session", begun: float = 1000.0, seen: float = 1000.0) -> Ticket:
    return Ticket(kind, "name", 1, "stamp", begun, seen)


def test_ticket_comes_back_as_it_was() -> None:
    tickets = Tickets(b"k" * 32)
    assert tickets.read(tickets.write(ticket()), "session", 1001) == ticket()


def test_altered_ticket_is_none() -> None:
    tickets = Tickets(b"k" * 32)
    text = tickets.write(ticket())
    for index, character in enumerate(text[:-1]):   # of the last one some bits are padding
        altered = text[:index] + ("A" if character != "A" else "B") + text[index + 1 :]
        assert tickets.read(altered, "session", 1001) is None, index
    assert tickets.read(text, "token", 1001) is None
    assert Tickets(b"K" * 32).read(text, "session", 1001) is None
    for other in ("", ".", "a.b", "....", "é", "\x00", text * 2, text.partition(".")[0]):
        assert tickets.read(other, "session", 1001) is None


@pytest.mark.parametrize(
    ("kind", "begun", "seen", "now", "valid"),
    [
        ("session", 0, 0, SESSION_IDLE - 1, True),
        ("session", 0, 0, SESSION_IDLE, False),
        ("session", 0, SESSION_IDLE - 1, 2 * SESSION_IDLE - 2, True),
        ("session", 0, SESSION_LIFE - 1, SESSION_LIFE - 1, True),
        ("session", 0, SESSION_LIFE - 1, SESSION_LIFE, False),
        ("token", 0, 0, TOKEN_LIFE - 1, True),
        ("token", 0, 0, TOKEN_LIFE, False),
    ],
)
def test_life_of_a_ticket(kind: str, begun: float, seen: float, now: float, valid: bool) -> None:
    tickets = Tickets(b"k" * 32)
    assert (tickets.read(tickets.write(ticket(kind, begun, seen)), kind, now) is not None) == valid


# --- sessions ---
def test_cookie(local: Local) -> None:
    """For this service alone, out of reach of scripts and of other sites, encrypted where the login was."""
    fields = {"username": NAME, "password": DOCUMENTED}
    reply = local.form("/-/login", fields)
    attributes = {part.strip().lower() for part in reply.headers["set-cookie"].split(";")[1:]}
    assert attributes == {"httponly", "samesite=strict", "path=/-/"}
    headers = {"Origin": "https://localhost"}
    reply = local.form("/-/login", fields, headers=headers, **{"wsgi.url_scheme": "https"})
    assert reply.status == 303 and "; Secure" in reply.headers["set-cookie"]


def test_session_ends_after_half_an_hour_without_a_request(local: Local) -> None:
    local.open_session()
    local.clock.now += SESSION_IDLE - 1
    assert logged_in(local)
    local.clock.now += 1
    reply = local.ask("GET", "/-/")
    assert (reply.status, reply.headers["location"]) == (303, "/-/login?next=/-/")


def test_session_goes_on_with_requests_but_no_longer_than_eight_hours(local: Local) -> None:
    local.open_session()
    begun = local.clock.now
    while local.clock.now + SESSION_IDLE / 2 < begun + SESSION_LIFE:
        local.clock.now += SESSION_IDLE / 2
        reply = local.ask("GET", "/-/")
        assert reply.status == 200 and reply.cookie
        local.cookie = reply.cookie
    local.clock.now = begun + SESSION_LIFE
    assert not logged_in(local)


def test_page_that_refreshes_itself_is_idle(local: Local) -> None:
    local.open_session()
    local.clock.now += SESSION_STEP + 1
    assert local.ask("GET", "/-/", headers={"X-Refresh": "1"}).cookie == ""
    assert local.ask("GET", "/-/").cookie != ""


def test_answer_that_others_may_keep_sets_no_cookie(local: Local) -> None:
    """A cache on the way would hand the session on."""
    local.open_session()
    local.clock.now += SESSION_STEP + 1
    reply = local.ask("GET", f"/-/static/{next(iter(ASSETS))}")
    assert "public" in reply.headers["cache-control"] and "set-cookie" not in reply.headers


def test_logged_out_session_is_over_for_whoever_has_its_cookie(local: Local) -> None:
    cookie = local.open_session().cookie
    other = local.open_session().cookie
    local.cookie = cookie
    reply = local.form("/-/logout", {})
    assert reply.status == 303 and "Max-Age=0" in reply.headers["set-cookie"]
    assert not logged_in(local)
    local.cookie = other
    assert logged_in(local)


def test_login_begins_a_new_session(local: Local) -> None:
    """Whatever cookie came with it: nobody can have another one log in to a session that they know."""
    planted = local.open_session().cookie
    reply = local.form("/-/login", {"username": NAME, "password": DOCUMENTED})
    assert reply.cookie not in ("", planted)
    name = local.site.tickets.read(planted, "session", local.clock.now)
    fresh = local.site.tickets.read(reply.cookie, "session", local.clock.now)
    assert name and fresh and name.name != fresh.name


def changed_password(local: Local, name: str) -> None:
    local.log_in(name)
    assert local.api("POST", "password", {"current": DOCUMENTED, "new": PASSWORD}).status == 204


def by_admin(method: str, body: Any) -> Any:
    def act(local: Local, name: str) -> None:
        with local.store.writing() as session:
            session.add(User.create("root", PASSWORD))
        local.log_in("root", PASSWORD)
        assert local.api(method, f"users/{name}", body).status in (200, 204)

    return act


@pytest.mark.parametrize(
    "act",
    [
        changed_password,
        by_admin("PATCH", {"password": "another fine password"}),
        by_admin("PATCH", {"role": "viewer"}),
        by_admin("DELETE", None),
    ],
    ids=["own password", "password", "role", "removed"],
)
def test_what_ends_all_sessions_and_tokens_of_a_user(local: Local, act: Any) -> None:
    cookie, token = local.open_session().cookie, local.log_in().token
    act(local, NAME)
    local.token, local.cookie = "", cookie
    assert not logged_in(local)
    local.token, local.cookie = token, ""
    assert local.api("GET", "resources").status == 401


def test_password_page_gives_a_new_session(local: Local) -> None:
    local.open_session()
    reply = local.form("/-/password", {"current": DOCUMENTED, "new": PASSWORD, "again": PASSWORD})
    assert reply.status == 303 and reply.cookie
    assert not logged_in(local)
    local.cookie = reply.cookie
    assert logged_in(local)


def test_login_holds_over_a_restart_and_in_other_processes(tmp_path: Path) -> None:
    with local_console(tmp_path) as first:
        cookie, token = first.open_session().cookie, first.log_in().token
    with local_console(tmp_path) as second:
        second.cookie = cookie
        assert logged_in(second)
        second.cookie, second.token = "", token
        assert second.api("GET", "resources").status == 200


# --- passwords ---
@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("short 1 2 3", "must have at least 12 characters"),
        ("x" * 1025, "must have at most 1024 characters"),
        (DOCUMENTED, "must not be the documented one"),
        (None, "must be a valid string"),
        (123456789012, "must be a valid string"),
    ],
)
def test_bad_new_password(local: Local, new: Any, message: str) -> None:
    reply = local.log_in().api("POST", "password", {"current": DOCUMENTED, "new": new})
    assert (reply.status, reply.fields) == (422, {"new": message})
    assert reply.body.count(str(new)) == 0 or new is None
    for method, path, field in (("POST", "users", "password"), ("PATCH", "users/somebody", "password")):
        body = {"name": "somebody", "password": new} if method == "POST" else {"password": new}
        if new is not None or method == "POST":
            reply = local.api(method, path, body)
            assert (reply.status, reply.fields) == (422, {field: message})


@pytest.mark.parametrize("new", ["twelve chars", "x" * 1024, "ünïcödé ☃ passwörd", " leading and trailing "])
def test_new_password(local: Local, new: str) -> None:
    assert local.log_in().api("POST", "password", {"current": DOCUMENTED, "new": new}).status == 204
    assert local.api("POST", "login", {"username": NAME, "password": DOCUMENTED}).status == 401
    local.log_in(NAME, new)


def test_wrong_current_password_changes_nothing(local: Local) -> None:
    reply = local.log_in().api("POST", "password", {"current": WRONG, "new": PASSWORD})
    assert (reply.status, reply.fields) == (422, {"current": "is wrong"})
    reply = local.api("POST", "password", {"current": PASSWORD, "new": PASSWORD})
    assert (reply.status, reply.fields) == (422, {"new": "must not be the current one"})
    local.log_in()


def test_own_password_needs_the_current_one(local: Local) -> None:
    reply = local.log_in().api("PATCH", f"users/{NAME}", {"password": PASSWORD})
    assert reply.status == 422 and reply.fields.keys() == {"password"}


# --- guessing ---
def attempt(local: Local, name: str = NAME, password: str = WRONG, address: str = "127.0.0.1") -> Reply:
    return local.api("POST", "login", {"username": name, "password": password}, address=address)


def test_five_failures_make_the_next_wait(local: Local) -> None:
    """Per account and address; the right password does not pass either, and nothing is hashed for it."""
    clock = local.desk.clock
    assert isinstance(clock, Clock)
    assert [attempt(local).status for _ in range(LOGIN_FAILURES)] == [401] * LOGIN_FAILURES
    clock.now += 100
    reply = attempt(local, password=DOCUMENTED)
    assert (reply.status, reply.headers["retry-after"]) == (429, str(int(LOGIN_WINDOW - 100)))
    assert local.form("/-/login", {"username": NAME, "password": DOCUMENTED}).status == 429
    assert attempt(local, name="somebody").status == 401
    assert attempt(local, password=DOCUMENTED, address=FAR).status == 200
    clock.now += LOGIN_WINDOW - 101
    assert attempt(local, password=DOCUMENTED).status == 429
    clock.now += 1
    assert attempt(local, password=DOCUMENTED).status == 200


def test_unknown_users_wait_like_known_ones(local: Local) -> None:
    statuses = [attempt(local, name="nobody").status for _ in range(LOGIN_FAILURES + 1)]
    assert statuses == [401] * LOGIN_FAILURES + [429]


def test_success_forgives_failures(local: Local) -> None:
    for _ in range(2):
        assert [attempt(local).status for _ in range(LOGIN_FAILURES - 1)] == [401] * (LOGIN_FAILURES - 1)
        assert attempt(local, password=DOCUMENTED).status == 200


def test_guesses_at_the_current_password_count(local: Local) -> None:
    """Who has found an open session cannot guess its password faster than at the login."""
    local.log_in()
    body = {"current": WRONG, "new": PASSWORD}
    statuses = [local.api("POST", "password", body).status for _ in range(LOGIN_FAILURES + 1)]
    assert statuses == [422] * LOGIN_FAILURES + [429]


def test_lockout_is_an_event_and_each_failure_a_line_of_the_log(local: Local, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(LOGIN_FAILURES + 2):
        attempt(local, name="mal\nlory\x1b[31m")
    lines = [record.getMessage() for record in caplog.records if "mal" in record.getMessage()]
    assert lines == ["login of mal lory [31m from 127.0.0.1 failed"] * LOGIN_FAILURES
    found = [event for event in local.log_in().api("GET", "events?kind=login").json if event["actor"] != NAME]
    assert [(event["text"], event["actor"], event["address"]) for event in found] == [
        (f"{LOGIN_FAILURES} failed logins", "mal lory [31m", "127.0.0.1")
    ]


def test_throttle_forgets_the_oldest_when_names_are_made_up() -> None:
    throttle = Throttle(Clock())
    for number in range(LOGINS_KEPT + 10):
        for _ in range(LOGIN_FAILURES):
            throttle.fail(f"name {number}", FAR)
    assert throttle.wait("name 0", FAR) == 0
    assert throttle.wait(f"name {LOGINS_KEPT + 9}", FAR) == LOGIN_WINDOW
    assert len(throttle._failures) == LOGINS_KEPT


def test_throttle_window_slides() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    for _ in range(LOGIN_FAILURES):
        throttle.fail(NAME, FAR)
        clock.now += 10
    assert throttle.wait(NAME, FAR) == LOGIN_WINDOW - 10 * LOGIN_FAILURES
    clock.now += LOGIN_WINDOW - 10 * LOGIN_FAILURES
    assert throttle.wait(NAME, FAR) == 0
    assert throttle.fail(NAME, FAR) == LOGIN_FAILURES
    assert throttle.wait(NAME, FAR) == 10


def test_one_password_at_a_time(local: Local) -> None:
    """Who comes meanwhile is told to come again, at once."""
    start, statuses, waits = threading.Barrier(16), [], []

    def work(number: int) -> None:
        start.wait()
        begin = time.monotonic()
        with contextlib.suppress(HealthCheckerError):
            local.desk.login(f"user {number}", WRONG, FAR)
        waits.append(time.monotonic() - begin)

    def count(number: int) -> None:
        start.wait()
        statuses.append(attempt(local, name=f"user {number}").status)

    threads = [threading.Thread(target=count, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {401, 429}
    assert statuses.count(429) >= 8


def seconds_of(local: Local, name: str) -> float:
    begin = time.thread_time()
    assert attempt(local, name=name).status == 401
    return time.thread_time() - begin


def test_unknown_users_take_as_long_as_known_ones(local: Local) -> None:
    known = min(seconds_of(local, NAME) for _ in range(3))
    unknown = min(seconds_of(local, "nobody") for _ in range(3))
    assert 0.5 < unknown / known < 2 and unknown > 0.02


def test_answers_to_unknown_and_known_users_are_the_same(local: Local) -> None:
    known, unknown = attempt(local), attempt(local, name="nobody")
    assert known.body == unknown.body and known.headers == unknown.headers


# --- where from ---
@pytest.mark.parametrize(
    ("address", "environ", "enters"),
    [
        ("127.0.0.1", {}, True),
        ("127.8.8.8", {}, True),
        ("::1", {}, True),
        ("::ffff:127.0.0.1", {}, True),
        (FAR, {}, True),
        (f"::ffff:{FAR}", {}, True),
        (FAR, {"healthchecker.forwarded": True}, True),
        ("127.0.0.1", {"healthchecker.forwarded": True}, False),
        ("192.0.3.1", {}, False),
        ("2001:db8::1", {}, False),
        ("", {}, False),
        ("not an address", {}, False),
        ("127.0.0.1", {"HTTP_HOST": "localhost:8080"}, True),
        ("127.0.0.1", {"HTTP_HOST": "[::1]:8080"}, True),
        ("127.0.0.1", {"HTTP_HOST": "127.0.0.1"}, True),
        ("127.0.0.1", {"HTTP_HOST": "evil.example.com:8080"}, False),
        ("127.0.0.1", {"HTTP_HOST": "127.0.0.1.evil.example.com"}, False),
        (FAR, {"HTTP_HOST": "health.example.com"}, True),
    ],
)
def test_networks_of_the_operators(local: Local, address: str, environ: dict[str, Any], enters: bool) -> None:
    for method, path, status in (("GET", "/-/login", 200), ("GET", "/-/", 303), ("GET", "/-/api/resources", 401)):
        assert local.ask(method, path, address=address, **environ).status == (status if enters else 403)
    reply = local.api("POST", "login", {"username": NAME, "password": DOCUMENTED}, address=address, **environ)
    assert reply.status == (200 if enters else 403)


def test_session_is_of_no_use_from_elsewhere(local: Local) -> None:
    local.open_session()
    assert logged_in(local) and local.ask("GET", "/-/", address="192.0.3.1").status == 403


RESTRICTED = [
    ("GET", "/-/", 303),
    ("GET", "/-/password", 200),
    ("POST", "/-/add", 403),
    ("GET", "/-/login", 200),
    ("GET", "/-/api/resources", 403),
    ("POST", "/-/api/resources", 403),
    ("GET", "/-/api/events", 403),
    ("GET", "/-/api/openapi.json", 403),
    ("GET", "/-/api/nothing", 403),
    ("POST", "/-/api/password", 422),
    ("POST", "/-/api/login", 422),
]


@pytest.mark.parametrize(
    ("address", "environ"), [(FAR, {}), (FAR, {"HTTP_HOST": "127.0.0.1"}), (FAR, {"healthchecker.forwarded": True})]
)
def test_documented_password_from_another_machine(local: Local, address: str, environ: dict[str, Any]) -> None:
    """It can only be changed; from this machine, and after that, everything can be done."""
    local.log_in(address=address, **environ)
    for method, path, status in RESTRICTED:
        reply = local.ask(method, path, "{}" if method == "POST" else "", {"Content-Type": "application/json"},
                          address=address, **environ)
        assert reply.status == status, (method, path, reply)
        assert status != 303 or reply.headers["location"] == "/-/password"
    health = local.ask("GET", "/-/health", address=address, **environ)
    assert "checks" not in health.json
    assert local.api("GET", "resources").status == 200
    change = {"current": DOCUMENTED, "new": PASSWORD}
    assert local.api("POST", "password", change, address=address, **environ).status == 204
    local.log_in(NAME, PASSWORD, address=address, **environ)
    assert local.api("GET", "resources", address=address, **environ).status == 200


# --- the service and its command line ---
def test_banner_in_the_log_until_the_password_is_changed(tmp_path: Path) -> None:
    banner = f"the password of {NAME} is the documented one"
    with console(tmp_path) as (running, _):
        assert banner in running.output
    with Service(tmp_path / "inventory.yaml") as running:
        assert banner not in running.output
    assert oct((tmp_path / "keys" / "session.key").stat().st_mode & 0o777) == "0o600" or sys.platform == "win32"


def user(inventory: Path, *arguments: str, password: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        service.command(inventory, "user", *arguments),
        input=f"{password}\n",
        capture_output=True,
        encoding="utf-8",
        env=service.environment(),
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done
    return done


def test_users_on_the_command_line(tmp_path: Path) -> None:
    """Before the first start and while the service runs."""
    inventory = write_inventory(tmp_path)
    service.prepared_keys(tmp_path)
    done = user(inventory, "add", "alice", "--role", "admin", password=PASSWORD)
    assert (done.returncode, done.stdout) == (0, "alice can log in now, as admin\n")
    with console(tmp_path) as (running, client):
        alice = client.__class__(running.host, running.port).log_in("alice")
        assert user(inventory, "add", "bob", password=PASSWORD).returncode == 0
        listed = [line.split(None, 2) for line in user(inventory, "list").stdout.splitlines()]
        assert listed[1:] == [[NAME, "admin", "own"], ["alice", "admin", "own"], ["bob", "viewer", "own"]]
        assert user(inventory, "passwd", "alice", password="another fine password").returncode == 0
        assert alice.api("GET", "resources").status == 401
        alice.token = ""
        alice.log_in("alice", "another fine password")
        assert user(inventory, "remove", "alice").returncode == 0
        assert alice.api("GET", "resources").status == 401
        found = client.api("GET", "events?kind=change&limit=4").json
        assert [(event["text"], event["actor"]) for event in found] == [
            ("user alice removed", "command line"),
            ("user alice: new password", "command line"),
            ("user bob added as viewer", "command line"),
            (f"user {NAME}: new password", NAME),
        ]


@pytest.mark.parametrize(
    ("arguments", "password", "message"),
    [
        (["add", "alice"], "short", "password: must have at least 12 characters"),
        (["add", "alice"], "", "password: must have at least 12 characters"),
        (["add", "alice"], DOCUMENTED, "password: must not be the documented one"),
        (["add", "a/b"], PASSWORD, "name: must be 1 to 253 characters without slashes"),
        (["add", NAME], PASSWORD, "there is a user of this name already"),
        (["passwd", "nobody"], PASSWORD, "there is no such user"),
        (["passwd", NAME], "short", "password: must have at least 12 characters"),
        (["remove", "nobody"], "", "there is no such user"),
        (["remove", NAME], "", f"{NAME} is the last admin; make another one first"),
    ],
)
def test_faults_on_the_command_line(tmp_path: Path, arguments: list[str], password: str, message: str) -> None:
    inventory = write_inventory(tmp_path)
    done = user(inventory, *arguments, password=password)
    assert (done.returncode, done.stderr.strip()) == (2, message)
    assert user(inventory, "list").stdout.split("\n")[1].split() == [NAME, "admin", "the", "documented", "one"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_password_at_a_terminal_is_not_shown(tmp_path: Path) -> None:
    import pty  # noqa: PLC0415  # UNIX only

    inventory = write_inventory(tmp_path)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, service.command(inventory, "user", "add", "alice"), service.environment())
    output = b""
    with contextlib.suppress(OSError):      # the end of the terminal
        for answer in (PASSWORD, PASSWORD):
            while not re.search(rb"(Password|Once more): \Z", output):
                output += os.read(terminal, 1000)
            os.write(terminal, answer.encode() + b"\n")
            output += b"\n"
        while chunk := os.read(terminal, 1000):
            output += chunk
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert PASSWORD.encode() not in output and b"alice can log in now" in output


def test_login_flood_leaves_the_gate_alone(tmp_path: Path) -> None:
    """16 clients at the login; the gate's requests beside them are answered as if nobody were there."""
    with console(tmp_path, SIMULATED) as (running, client):
        running.wait_status("/", 200)
        ending, statuses = threading.Event(), []

        def flood(number: int) -> None:
            body = json.dumps({"username": f"user {number}", "password": WRONG})
            while not ending.is_set():
                reply = client.__class__(running.host, running.port).ask(
                    "POST", "/-/api/login", body, {"Content-Type": "application/json"}
                )
                statuses.append(reply.status)

        threads = [threading.Thread(target=flood, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        taken = []
        for _ in range(100):
            begin = time.monotonic()
            assert running.get("/").status == 200
            taken.append(time.monotonic() - begin)
        ending.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {401, 429} and statuses.count(429) > statuses.count(401)
        taken.sort()
        assert taken[50] < 0.1, f"median {taken[50] * 1e3:.0f} ms, p99 {taken[98] * 1e3:.0f} ms"
        print(f"median {taken[50] * 1e3:.1f} ms, p99 {taken[98] * 1e3:.1f} ms, {len(statuses)} logins")
