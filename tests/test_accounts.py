"""Who may log in, for how long, and how often they may try."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import service
from conftest import EACH_DATABASE, folder_with_database, wait_for
from console import DOCUMENTED, NAME, PASSWORD, TABLES, Client, Clock, Local, Reply, console, local_console
from service import Service, few_rounds, write_inventory

import healthchecker
from healthchecker import (
    ADDRESS_FAILURES,
    ASSETS,
    HASH_QUEUE,
    HASH_WAIT,
    LOGIN_FAILURES,
    LOGIN_WINDOW,
    NAMED_COUNT,
    NAMED_LIFE,
    NAMED_MAX,
    SEEN_INTERVAL,
    SESSION_IDLE,
    SESSION_LIFE,
    TOKEN_LIFE,
    ApiError,
    Event,
    LoginSession,
    LoginThrottle,
    NewToken,
    Principal,
    Retention,
    User,
    find_user,
    issue_token,
    open_session,
    prune_events,
    record_event,
    sign_in,
    sqlalchemy,
)

SIMULATED = "  - {name: simulated, platform: simulated, interval: 1, mean_healthy: 100000}"
OPERATORS = '  operators: [127.0.0.0/8, "::1", 192.0.2.0/24]'
FAR = "192.0.2.10"
WRONG = "not the right one"


@pytest.fixture
def tmp_path(database_folder: Path) -> Path:
    """What has a folder of its own runs on both kinds of database, and so does what shares a console."""
    return database_folder


@pytest.fixture(scope="module", params=EACH_DATABASE)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with local_console(folder_with_database(request, tmp_path_factory), SIMULATED, OPERATORS) as made:
        yield made.keep()


@pytest.fixture
def local(shared: Local) -> Iterator[Local]:
    """The first user's password was changed to PASSWORD."""
    with few_rounds():
        yield shared.restore()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Local]:
    """The first user's password is the documented one."""
    with few_rounds(), local_console(tmp_path, SIMULATED, OPERATORS, DOCUMENTED) as made:
        yield made


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Client]]:
    with console(tmp_path_factory.mktemp("accounts"), SIMULATED) as made:
        yield made


def sessions(local: Local) -> list[LoginSession]:
    with local.store.reading() as session:
        return list(session.scalars(sqlalchemy.select(LoginSession)))


def everything_stored(local: Local) -> str:
    """Every value of every table."""
    with local.store.reading() as session:
        return str([session.execute(sqlalchemy.select(table)).all() for table in TABLES])


def logged_in(local: Local, **more: Any) -> bool:
    return local.ask("GET", "/-/", **more).status == 200


# --- sessions ---
def test_cookie(local: Local) -> None:
    """For this service alone, out of reach of scripts and of other sites, encrypted where the login was."""
    fields = {"username": NAME, "password": PASSWORD}
    reply = local.form("/-/login", fields)
    attributes = {part.strip().lower() for part in reply.headers["set-cookie"].split(";")[1:]}
    assert attributes == {"httponly", "samesite=strict", "path=/-/"}
    headers = {"Origin": "https://localhost"}
    reply = local.form("/-/login", fields, headers=headers, **{"wsgi.url_scheme": "https"})
    assert reply.status == 303 and "; Secure" in reply.headers["set-cookie"]


def test_session_ends_after_half_an_hour_without_a_request(local: Local) -> None:
    local.open_session()
    local.clock.now += SESSION_IDLE - 1
    assert logged_in(local, headers={"X-Refresh": "1"})
    local.clock.now += 1
    reply = local.ask("GET", "/-/")
    assert (reply.status, reply.headers["location"]) == (303, "/-/login?next=/-/")


@pytest.mark.parametrize("path", ["/-/resources/a%3Fb%23c%2541%2Bd%26e", "/-/resources/50%2525?range=day&x=%23"])
def test_the_way_back_after_a_login(path: str, local: Local) -> None:
    """Whatever the name of what was asked for."""
    location = local.ask("GET", path).headers["location"]
    login = {"username": NAME, "password": PASSWORD}
    assert local.form(location, login).headers["location"] == path


@pytest.mark.long
def test_session_goes_on_with_requests_but_no_longer_than_eight_hours(local: Local) -> None:
    local.open_session()
    begun = local.clock.now
    while local.clock.now + SESSION_IDLE / 2 < begun + SESSION_LIFE:
        local.clock.now += SESSION_IDLE / 2
        assert logged_in(local)
    local.clock.now = begun + SESSION_LIFE
    assert not logged_in(local)


def test_token_lives_for_twenty_minutes(local: Local) -> None:
    local.log_in()
    local.clock.now += TOKEN_LIFE - 1
    assert local.api("GET", "resources").status == 200
    local.clock.now += 1
    assert local.api("GET", "resources").status == 401


def test_requests_are_noted_once_a_minute(local: Local) -> None:
    """A page that refreshes itself is idle, and so is who is refused."""
    local.open_session()
    begun = local.clock.now
    for after, headers, seen in (
        (SEEN_INTERVAL, {}, 0.0),
        (SEEN_INTERVAL + 1, {"X-Refresh": "1"}, 0.0),
        (SEEN_INTERVAL + 2, {}, SEEN_INTERVAL + 2),
        (SEEN_INTERVAL + 50, {}, SEEN_INTERVAL + 2),
    ):
        local.clock.now = begun + after
        reply = local.ask("GET", "/-/", headers=headers)
        assert reply.status == 200 and "set-cookie" not in reply.headers
        assert [row.seen_at - begun for row in sessions(local)] == [seen], after


@pytest.mark.long
def test_while_nothing_can_be_written_one_request_a_minute_waits_for_that(local: Local) -> None:
    """Of many at once it is one, and those after it do not wait either."""
    local.open_session()
    begun = local.clock.now
    local.clock.now += SEEN_INTERVAL + 1

    def seconds(_: object) -> float:
        begun_mono = time.monotonic()
        assert logged_in(local)
        return time.monotonic() - begun_mono

    with local.store.writing(), ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(seconds, range(4)))[1] < 4
        assert seconds(local) < 4
    assert logged_in(local) and [row.seen_at for row in sessions(local)] == [begun]
    local.clock.now += SEEN_INTERVAL
    assert logged_in(local) and [row.seen_at for row in sessions(local)] == [local.clock.now]


def test_answer_that_others_may_keep_sets_no_cookie(local: Local) -> None:
    """A cache on the way would hand the session on."""
    local.open_session()
    reply = local.ask("GET", f"/-/static/{next(iter(ASSETS))}")
    assert "public" in reply.headers["cache-control"] and "set-cookie" not in reply.headers


def test_logins_that_are_over_are_dropped(local: Local) -> None:
    for kind in ("session", "token"):
        local.log_in_as(NAME, kind)
    local.clock.now += TOKEN_LIFE
    assert [row["kind"] for row in local.log_in_as(NAME).ask("GET", "/-/api/sessions").json] == ["session"] * 2
    assert sorted(row.kind for row in sessions(local)) == ["session"] * 2
    local.clock.now += SESSION_LIFE
    local.log_in_as(NAME, "token")
    assert [row.kind for row in sessions(local)] == ["token"]


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
    reply = local.form("/-/login", {"username": NAME, "password": PASSWORD})
    assert reply.cookie not in ("", planted) and len(sessions(local)) == 2


def test_sessions_are_listed_and_ended(local: Local) -> None:
    """One's own by everybody, all of them by admins; each end is noted."""
    with local.store.writing() as session:
        session.add(User.create("viola", PASSWORD, "viewer"))
    admin = local.log_in_as(NAME, "token").token
    local.clock.now += 1
    viola = local.log_in_as("viola").cookie
    listed = local.ask("GET", "/-/api/sessions").json
    assert [(row["user"], row["kind"], row["address"], row["current"]) for row in listed] == [
        ("viola", "session", "127.0.0.1", True)
    ]
    local.token, local.cookie = admin, ""
    found = {row["user"]: row for row in local.api("GET", "sessions").json}
    assert {name: row["current"] for name, row in found.items()} == {NAME: True, "viola": False}
    assert found["viola"]["begun_at"].startswith("2027-01-15T08:00:01")
    local.token, local.cookie = "", viola
    origin = {"Origin": "http://localhost"}
    assert local.api("DELETE", f"sessions/{found[NAME]['id']}", headers=origin).status == 404, "not hers"
    local.token, local.cookie = admin, ""
    assert local.api("DELETE", f"sessions/{found['viola']['id']}").status == 204
    assert local.api("DELETE", f"sessions/{found['viola']['id']}").status == 404
    [event] = local.api("GET", "events?kind=change&limit=1").json
    assert (event["text"], event["actor"]) == ("a session from 127.0.0.1 of viola ended", NAME)
    local.token, local.cookie = "", viola
    assert not logged_in(local)
    assert local.log_in_as("viola").api("GET", "sessions").status == 200
    own = local.ask("GET", "/-/api/sessions").json[0]["id"]
    assert local.api("DELETE", f"sessions/{own}", headers=origin).status == 204 and not logged_in(local)


def test_password_that_changes_during_a_login(local: Local) -> None:
    """What was verified is not the password any more: no session begins."""
    user = sign_in(Principal(local.context, "127.0.0.1"), {"username": NAME, "password": PASSWORD})
    local.log_in()
    assert local.api("POST", "password", {"current": PASSWORD, "new": PASSWORD + "!"}).status == 204
    with pytest.raises(ApiError) as caught:
        open_session(Principal(local.context, "127.0.0.1"), "session", user)
    assert caught.value.status == 401 and sessions(local) == []


def test_password_that_an_admin_changes_during_its_change(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """The admin's stays, or whoever knows the old one took it back."""
    user = local.log_in().context
    create = User.create

    def reset_meanwhile(name: str, password: str, role: str = "admin") -> User:
        with user.store.writing() as session:
            row = session.scalar(sqlalchemy.select(User).where(User.username == name))
            assert row
            row.password, row.salt = (fresh := create(name, "set by the admin")).password, fresh.salt
        return create(name, password, role)

    monkeypatch.setattr(User, "create", reset_meanwhile)
    assert local.api("POST", "password", {"current": PASSWORD, "new": PASSWORD + "!"}).status == 401
    monkeypatch.undo()
    assert attempt(local, password=PASSWORD + "!").status == 401
    assert attempt(local, password="set by the admin").status == 200


@pytest.mark.parametrize("kind", ["session", "token"])
def test_a_login_by_a_clock_that_was_ahead_ends_with_that(local: Local, kind: str) -> None:
    """Its 8 hours would begin a year later."""
    local.clock.now += 365 * 86_400.0
    local.log_in() if kind == "token" else local.open_session()
    assert logged_in(local)
    local.clock.now -= 365 * 86_400.0
    assert not logged_in(local)


def changed_password(local: Local, name: str) -> None:
    local.log_in(name)
    assert local.api("POST", "password", {"current": PASSWORD, "new": PASSWORD + "!"}).status == 204


def by_admin(method: str, body: Any) -> Any:
    def act(local: Local, name: str) -> None:
        with local.store.writing() as session:
            session.add(User.create("root", PASSWORD))
        local.log_in("root", PASSWORD)
        assert local.api(method, f"users/{name}", body).status in (200, 204)

    return act


@pytest.mark.long
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
    new = PASSWORD + "!"
    reply = local.form("/-/password", {"current": PASSWORD, "new": new, "again": new})
    assert reply.status == 303 and reply.cookie
    assert not logged_in(local)
    local.cookie = reply.cookie
    assert logged_in(local)


def test_login_holds_over_a_restart(tmp_path: Path) -> None:
    with local_console(tmp_path) as first:
        cookie, token = first.open_session().cookie, first.log_in().token
    with local_console(tmp_path) as second:
        second.cookie = cookie
        assert logged_in(second)
        second.cookie, second.token = "", token
        assert second.api("GET", "resources").status == 200


# --- API tokens with a name ---
def bearer(local: Local, token: str) -> Local:
    local.token, local.cookie = token, ""
    return local


def made(local: Local, *, name: str = "backup", user: str = NAME, password: str = PASSWORD, **more: Any) -> str:
    """A token, made by a user who is logged in afterwards."""
    reply = local.log_in_as(user, "token").api("POST", "tokens", {"name": name, "password": password, **more})
    assert reply.status == 201, reply
    return str(reply.json["token"])


def add_user(local: Local, name: str = "viola", role: str = "viewer") -> None:
    with local.store.writing() as session:
        session.add(User.create(name, PASSWORD, role))


def last_change(local: Local) -> str:
    with local.store.reading() as session:
        found = session.scalars(sqlalchemy.select(Event).filter_by(kind="change").order_by(Event.id.desc()))
        return next(found).text


def test_named_token_lives_for_ninety_days(local: Local) -> None:
    """Idle or not; then it stands in the list until its name is used again."""
    token = made(local)
    begun = local.clock.now
    until = datetime.datetime.fromtimestamp(begun + NAMED_LIFE).astimezone().isoformat(" ", "seconds")
    assert last_change(local) == f"API token backup of {NAME} made: viewer, until {until}"
    local.clock.now = begun + NAMED_LIFE - 1
    assert bearer(local, token).api("GET", "resources").status == 200
    local.clock.now += 1
    reply = bearer(local, token).api("GET", "resources")
    assert (reply.status, reply.json["detail"]) == (401, "this token is not known, or over: log in first")
    [listed] = local.log_in_as(NAME, "token").api("GET", "tokens").json
    assert listed["expires_at"].startswith("2027-04-15T08:00:00")
    assert bearer(local, made(local)).api("GET", "resources").status == 200
    assert len(local.log_in_as(NAME, "token").api("GET", "tokens").json) == 1


def test_named_token_is_stored_as_a_hash_and_shown_once(local: Local) -> None:
    token = made(local)
    bearer(local, token).api("GET", "resources")
    local.log_in_as(NAME)
    for path in ("/-/api/tokens", "/-/api/events", "/-/api/sessions", "/-/tokens", "/-/users", "/-/events"):
        assert token not in local.ask("GET", path).body, path
    assert token not in everything_stored(local)


def test_use_of_a_named_token_is_noted_once_a_minute(local: Local) -> None:
    """With where it came from, also where it says that it is a page that refreshes itself."""
    token = made(local, expires="never")
    begun = local.clock.now
    [before] = local.api("GET", "tokens").json
    assert (before["seen_at"], before["address"], before["expires_at"]) == (None, "", None)
    for after, address, headers, seen in (
        (5, FAR, {"X-Refresh": "1"}, (5.0, FAR)),
        (SEEN_INTERVAL + 5, "127.0.0.1", {}, (5.0, FAR)),
        (SEEN_INTERVAL + 6, "127.0.0.1", {}, (SEEN_INTERVAL + 6, "127.0.0.1")),
        (SESSION_LIFE * 100, FAR, {}, (SESSION_LIFE * 100, FAR)),
    ):
        local.clock.now = begun + after
        assert bearer(local, token).api("GET", "resources", address=address, headers=headers).status == 200
        [row] = [row for row in sessions(local) if row.kind == "named"]
        assert (row.seen_at - begun, row.address) == seen


@pytest.mark.long
@pytest.mark.parametrize(
    ("expires", "seconds"),
    [
        ("30d", 30 * 86_400.0),
        ("12h", 43_200.0),
        (60, 60.0),
        ("366d", NAMED_MAX),
        ("2027-01-16T08:00:00Z", 86_400.0),
        ("2027-01-16T09:00:00+01:00", 86_400.0),
        ("never", None),
        ("367d", "must be in the future, by 366d at most, or never"),
        ("2026-12-31", "must be in the future, by 366d at most, or never"),
        ("2029-01-01", "must be in the future, by 366d at most, or never"),
        (0, "must be in the future, by 366d at most, or never"),
        (-1, "must be in the future, by 366d at most, or never"),
        (10**400, "must be like 90d, a date like 2027-01-31, or never"),
        (1e300, "must be in the future, by 366d at most, or never"),
        ("9" * 400 + "d", "must be in the future, by 366d at most, or never"),
        ("0001-01-01", "must be "),
        ("9999-12-31T23:59:59-23:59", "must be "),
        *((bad, "must be like 90d, a date like 2027-01-31, or never")
          for bad in ("", "1x", "soon", "1800000000", "Never", "2027-13-01", True, None, [], {})),
    ],
)  # fmt: skip
def test_end_of_a_named_token(local: Local, expires: Any, seconds: float | str | None) -> None:
    reply = local.log_in_as(NAME, "token").api(
        "POST", "tokens", {"name": "a", "password": PASSWORD, "expires": expires})  # fmt: skip
    if isinstance(seconds, str):
        assert reply.status == 422 and reply.fields["expires"].startswith(seconds), reply
    else:
        assert (reply.status, reply.json["expires_in"]) == (201, seconds)


def test_a_date_is_that_of_the_server(local: Local) -> None:
    made(local, expires="2027-02-01")
    [row] = [row for row in sessions(local) if row.kind == "named"]
    assert time.localtime(row.expires_at)[:6] == (2027, 2, 1, 0, 0, 0)


def test_a_named_token_needs_the_password(local: Local) -> None:
    """A session or token that leaked makes none; guesses count as those of a login do."""
    local.log_in_as(NAME, "token")
    assert local.api("POST", "tokens", {"name": "a"}).fields.keys() == {"password"}
    for _ in range(LOGIN_FAILURES):
        reply = local.api("POST", "tokens", {"name": "a", "password": WRONG})
        assert (reply.status, reply.fields) == (422, {"password": "is wrong"})
    assert local.api("POST", "tokens", {"name": "a", "password": PASSWORD}).status == 429
    assert [row.kind for row in sessions(local)] == ["token"]


BY_LOGIN = [
    ("POST", "tokens", {"name": "b", "password": PASSWORD}),
    ("DELETE", "tokens/OWN", None),
    ("POST", "password", {"current": PASSWORD, "new": PASSWORD + "!"}),
    ("POST", "users", {"name": "b", "password": PASSWORD}),
    ("PATCH", "users/viola", {"password": PASSWORD + "!"}),
    ("PATCH", "users/viola", {"role": "admin"}),
    ("DELETE", "users/viola", None),
    ("DELETE", "sessions/OTHER", None),
]


@pytest.mark.long
@pytest.mark.parametrize(("method", "path", "body"), BY_LOGIN)
def test_a_named_token_cannot_prolong_itself(local: Local, method: str, path: str, body: Any) -> None:
    """Not even an admin's, by a token, a password or a user more."""
    add_user(local)
    token = made(local, role="admin")
    [own] = local.api("GET", "tokens").json
    other = next(row.token_hash for row in sessions(local) if row.kind == "token")
    reply = bearer(local, token).api(method, path.replace("OWN", own["id"]).replace("OTHER", other), body)
    assert (reply.status, reply.json["detail"]) == (403, "not with an API token: log in with the password")
    assert local.api("GET", "users").status == 200


def test_a_named_token_opens_the_api_alone(local: Local) -> None:
    bearer(local, made(local, role="admin"))
    for path in ("/-/", "/-/users", "/-/tokens", "/-/password", "/-/events"):
        assert local.ask("GET", path).status == 403, path
    assert local.form("/-/users", {"name": "b", "password": PASSWORD}).status == 403
    local.token, local.cookie = "", local.token
    assert not logged_in(local)


def test_a_named_token_may_no_more_than_its_user(local: Local) -> None:
    """A viewer makes none for admins; who becomes a viewer has none from then on, also as an admin again."""
    add_user(local)
    reply = local.log_in_as("viola", "token").api(
        "POST", "tokens", {"name": "a", "role": "admin", "password": PASSWORD}
    )
    assert (reply.status, reply.fields) == (422, {"role": "must not be more than that of viola, viewer"})
    viewers = made(local, user="viola")
    assert bearer(local, viewers).api("GET", "resources").status == 200
    assert local.api("GET", "users").status == 403
    local.log_in_as(NAME, "token").api("PATCH", "users/viola", {"role": "admin"})
    assert bearer(local, viewers).api("GET", "users").status == 403, "a viewer's still"
    admins = made(local, name="admin", user="viola", role="admin")
    assert bearer(local, admins).api("GET", "users").status == 200
    for role in ("viewer", "admin"):
        assert local.log_in_as(NAME, "token").api("PATCH", "users/viola", {"role": role}).status == 200
        assert bearer(local, admins).api("GET", "resources").status == 200
        assert local.api("GET", "users").status == 403, role
    assert {row["role"] for row in local.log_in_as("viola", "token").api("GET", "tokens").json} == {"viewer"}
    with local.store.writing() as session:  # whatever the row says
        session.execute(sqlalchemy.update(LoginSession).values(role="admin"))
        session.execute(sqlalchemy.update(User).filter_by(username="viola").values(role="viewer"))
    assert bearer(local, admins).api("GET", "users").status == 403


@pytest.mark.parametrize("act", [changed_password, by_admin("PATCH", {"password": PASSWORD + "!"}),
                                 by_admin("DELETE", None)], ids=["own password", "password", "removed"])  # fmt: skip
def test_what_ends_the_named_tokens_of_a_user(local: Local, act: Any) -> None:
    token = made(local, expires="never")
    act(local, NAME)
    assert bearer(local, token).api("GET", "resources").status == 401
    assert not [row for row in sessions(local) if row.kind == "named"]


def test_named_tokens_are_listed_and_revoked(local: Local) -> None:
    """One's own by everybody, all of them by admins, at once; each is noted."""
    add_user(local)
    mine, hers = made(local, name="mine"), made(local, name="hers", user="viola")
    assert [row["name"] for row in local.api("GET", "tokens").json] == ["hers"]
    assert [row["kind"] for row in local.api("GET", "sessions").json] == ["token"]
    found = {row["name"]: row["id"] for row in local.log_in_as(NAME, "token").api("GET", "tokens").json}
    assert found.keys() == {"mine", "hers"}
    local.log_in_as("viola", "token")
    assert local.api("DELETE", f"tokens/{found['mine']}").status == 404
    assert local.api("DELETE", f"sessions/{found['hers']}").status == 404, "it is none"
    local.log_in_as(NAME, "token")
    own = next(row["id"] for row in local.api("GET", "sessions").json if row["current"])
    assert local.api("DELETE", f"tokens/{own}").status == 404, "it is a login"
    assert local.api("DELETE", f"tokens/{found['hers']}").status == 204
    assert last_change(local) == "API token hers of viola revoked"
    assert local.api("DELETE", f"tokens/{found['hers']}").status == 404
    assert bearer(local, hers).api("GET", "resources").status == 401
    assert bearer(local, mine).api("GET", "resources").status == 200


@pytest.mark.long
def test_names_and_number_of_named_tokens(local: Local) -> None:
    add_user(local)
    made(local, name="same")
    made(local, name="same", user="viola")
    reply = local.api("POST", "tokens", {"name": "same", "password": PASSWORD})
    assert (reply.status, reply.fields) == (409, {"name": "is taken"})
    for number in range(NAMED_COUNT - 1):
        made(local, name=f"{number}", user="viola")
    reply = local.api("POST", "tokens", {"name": "more", "password": PASSWORD})
    assert (reply.status, reply.json["detail"]) == (409, f"viola has {NAMED_COUNT} tokens; revoke one first")
    local.clock.now += NAMED_LIFE
    made(local, name="same", user="viola")


def test_logins_drop_no_named_token(local: Local) -> None:
    made(local)
    local.clock.now += NAMED_LIFE
    local.log_in_as(NAME)
    assert sorted(row.kind for row in sessions(local)) == ["named", "session"]


def test_password_that_changes_while_a_token_is_made(local: Local) -> None:
    user = sign_in(Principal(local.context, "127.0.0.1"), {"username": NAME, "password": PASSWORD})
    changed_password(local, NAME)
    with pytest.raises(ApiError) as caught:
        issue_token(Principal(local.context, "127.0.0.1", user=user), user, NewToken(name="a"))
    assert caught.value.status == 401 and sessions(local) == []


def test_documented_password_makes_no_named_token(fresh: Local) -> None:
    fresh.log_in_as(NAME, "token")
    assert fresh.api("POST", "tokens", {"name": "a", "password": DOCUMENTED}).status == 403
    assert fresh.log_in_as(NAME).form("/-/tokens", {"name": "a", "password": DOCUMENTED}).status == 403
    assert user(fresh.context.inventory.path, "token", "add", NAME, "a") == (
        2, "", "change the documented password first: it opens nothing else\n")  # fmt: skip
    assert {row.kind for row in sessions(fresh)} == {"token", "session"}


def test_wrong_tokens_are_not_counted(local: Local) -> None:
    """Nobody guesses 256 bits, and a script with an old one must not keep people out."""
    for _ in range(2 * ADDRESS_FAILURES):
        assert bearer(local, WRONG).api("GET", "resources").status == 401
    assert local.log_in().api("GET", "resources").status == 200


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
    reply = local.log_in().api("POST", "password", {"current": PASSWORD, "new": new})
    assert (reply.status, reply.fields) == (422, {"new": message})
    assert reply.body.count(str(new)) == 0 or new is None
    for method, path, field in (("POST", "users", "password"), ("PATCH", "users/somebody", "password")):
        body = {"name": "somebody", "password": new} if method == "POST" else {"password": new}
        if new is not None or method == "POST":
            reply = local.api(method, path, body)
            assert (reply.status, reply.fields) == (422, {field: message})


@pytest.mark.parametrize("new", ["twelve chars", "x" * 1024, "ünïcödé ☃ passwörd", " leading and trailing "])
def test_new_password(local: Local, new: str) -> None:
    assert local.log_in().api("POST", "password", {"current": PASSWORD, "new": new}).status == 204
    assert local.api("POST", "login", {"username": NAME, "password": PASSWORD}).status == 401
    local.log_in(NAME, new)


def test_wrong_current_password_changes_nothing(local: Local) -> None:
    reply = local.log_in().api("POST", "password", {"current": WRONG, "new": PASSWORD + "!"})
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


def throttle_clock(local: Local) -> Clock:
    clock = local.context.throttle._clock
    assert isinstance(clock, Clock)
    return clock


def test_five_failures_make_the_next_wait(local: Local) -> None:
    """Per account and address; the right password does not pass either, and nothing is hashed for it."""
    clock = throttle_clock(local)
    assert [attempt(local).status for _ in range(LOGIN_FAILURES)] == [401] * LOGIN_FAILURES
    clock.now += 100
    reply = attempt(local, password=PASSWORD)
    assert (reply.status, reply.headers["retry-after"]) == (429, str(int(LOGIN_WINDOW - 100)))
    assert local.form("/-/login", {"username": NAME, "password": PASSWORD}).status == 429
    assert attempt(local, name="somebody").status == 401
    assert attempt(local, password=PASSWORD, address=FAR).status == 200
    clock.now += LOGIN_WINDOW - 101
    assert attempt(local, password=PASSWORD).status == 429
    clock.now += 1
    assert attempt(local, password=PASSWORD).status == 200


def test_address_that_tries_many_accounts_waits(local: Local) -> None:
    statuses = [attempt(local, name=f"user {number}", address=FAR).status for number in range(ADDRESS_FAILURES + 1)]
    assert statuses == [401] * ADDRESS_FAILURES + [429]
    assert attempt(local, password=PASSWORD, address=FAR).status == 429
    assert attempt(local, password=PASSWORD).status == 200


@pytest.mark.long
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_address_of_this_machine_is_everybody_s(local: Local, address: str) -> None:
    """Who comes by `ssh -L` is not kept waiting by what others of this machine try."""
    for number in range(2 * ADDRESS_FAILURES):
        assert attempt(local, name=f"user {number}", address=address).status == 401
    assert attempt(local, password=PASSWORD, address=address).status == 200


def test_hosts_of_an_ipv6_network_count_as_one() -> None:
    """A host takes its addresses from a /64 as it likes."""
    throttle = LoginThrottle(Clock())
    for number in range(LOGIN_FAILURES):
        throttle.fail(NAME, f"2001:db8::{number}")
    assert throttle.wait(NAME, "2001:db8::ffff:1") == LOGIN_WINDOW
    assert throttle.wait(NAME, "2001:db8:0:1::1") == throttle.wait(NAME, "::1") == 0


def test_addresses_of_this_machine_count_as_one(local: Local) -> None:
    """Any of its accounts takes them as it likes."""
    addresses = ["127.0.0.1", "::1", "127.1.2.3", "::ffff:127.4.5.6", "127.255.0.9", "127.7.0.1", "::ffff:127.0.0.1"]
    statuses = [attempt(local, address=address).status for address in addresses]
    assert statuses == [401] * LOGIN_FAILURES + [429] * 2


def test_unknown_users_wait_like_known_ones(local: Local) -> None:
    statuses = [attempt(local, name="nobody").status for _ in range(LOGIN_FAILURES + 1)]
    assert statuses == [401] * LOGIN_FAILURES + [429]


def test_success_forgives_failures(local: Local) -> None:
    for _ in range(2):
        assert [attempt(local).status for _ in range(LOGIN_FAILURES - 1)] == [401] * (LOGIN_FAILURES - 1)
        assert attempt(local, password=PASSWORD).status == 200


def test_guesses_at_the_current_password_count(local: Local) -> None:
    """Who has found an open session cannot guess its password faster than at the login."""
    local.log_in()
    body = {"current": WRONG, "new": PASSWORD}
    statuses = [local.api("POST", "password", body).status for _ in range(LOGIN_FAILURES + 1)]
    assert statuses == [422] * LOGIN_FAILURES + [429]


def test_each_failure_is_an_event_and_a_line_of_the_log(local: Local, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(LOGIN_FAILURES + 2):
        attempt(local, name="mal\nlory\x1b[31m")
    lines = [record.getMessage() for record in caplog.records if "mal" in record.getMessage()]
    assert lines == ["login of mal lory [31m from 127.0.0.1 failed"] * LOGIN_FAILURES
    found = [event for event in local.log_in().api("GET", "events?kind=attempt").json if event["actor"] != NAME]
    assert [(event["text"], event["actor"], event["address"]) for event in found] == [
        (f"failed login, {number} in a row", "mal lory [31m", "127.0.0.1")
        for number in range(LOGIN_FAILURES, 0, -1)]  # fmt: skip


def test_throttle_forgets_the_oldest_when_names_are_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthchecker, "LOGINS_KEPT", 100)
    throttle = LoginThrottle(Clock())
    for number in range(100):
        for _ in range(LOGIN_FAILURES):
            throttle.fail(f"name {number}", f"2001:db8:0:{number:x}::1")
    assert throttle.wait("name 0", "2001:db8::1") == 0
    assert throttle.wait("name 99", "2001:db8:0:63::1") == LOGIN_WINDOW
    assert len(throttle._failures) == 100


def test_throttle_window_slides() -> None:
    clock = Clock()
    throttle = LoginThrottle(clock)
    for _ in range(LOGIN_FAILURES):
        throttle.fail(NAME, FAR)
        clock.now += 10
    assert throttle.wait(NAME, FAR) == LOGIN_WINDOW - 10 * LOGIN_FAILURES
    clock.now += LOGIN_WINDOW - 10 * LOGIN_FAILURES
    assert throttle.wait(NAME, FAR) == 0
    assert throttle.fail(NAME, FAR) == LOGIN_FAILURES
    assert throttle.wait(NAME, FAR) == 10


def test_one_password_at_a_time(local: Local) -> None:
    """An address has one login that waits for it; more of its logins are told to come again, at once."""
    throttle = local.context.throttle
    waits, ended = threading.Event(), threading.Event()

    def wait() -> None:
        waits.set()
        with throttle.turn("another", FAR):
            ended.set()

    with throttle.turn(NAME, FAR):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waits.wait(10)
        wait_for(lambda: throttle._waiting == {FAR}, 10)
        reply = attempt(local, name="a third", address=FAR)
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert not ended.is_set()
    thread.join(10)
    assert ended.is_set() and throttle._waiting == set()


def test_turn_that_does_not_come(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthchecker, "HASH_WAIT", 0.01)
    with local.context.throttle.turn("another", FAR):
        reply = attempt(local, password=PASSWORD)
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
    assert attempt(local, password=PASSWORD).status == 200


def test_made_up_names_from_here_keep_nobody_out_who_logged_in_from_here() -> None:
    """Everybody who comes by `ssh -L` has this address, and any account of this machine."""
    throttle = LoginThrottle()
    for number in range(3):
        throttle.fail(f"made up {number}", "127.0.0.1")
    throttle.clear(NAME, "127.0.0.1")
    began, ended = threading.Event(), threading.Event()

    def login(name: str, done: threading.Event) -> None:
        with throttle.turn(name, "127.0.0.1"):
            done.set()

    threads = [threading.Thread(target=login, args=args) for args in (("made up", began), (NAME, ended))]
    with throttle.turn("another", "127.0.0.1"):
        for count, thread in enumerate(threads, 1):
            thread.start()
            wait_for(lambda count=count: len(throttle._waiting) == count, 10)
        with pytest.raises(healthchecker.ApiError, match="another login waits"), throttle.turn("new", "127.0.0.1"):
            pass
    for thread in threads:
        thread.join(10)
    assert began.is_set() and ended.is_set()


def test_flood_does_not_stand_before_others() -> None:
    """While a login waits, those of an address where some failed do not; one of another address does."""
    throttle, passed = LoginThrottle(), []
    for number in range(3):
        throttle.fail("made up", f"192.0.2.{number}")

    def login(address: str) -> None:
        with throttle.turn(NAME, address):
            passed.append(address)

    threads = [threading.Thread(target=login, args=(address,)) for address in ("192.0.2.1", FAR)]
    with throttle.turn("made up", "192.0.2.0"):
        for count, thread in enumerate(threads, 1):
            thread.start()
            wait_for(lambda count=count: len(throttle._waiting) == count, 10)
        with pytest.raises(ApiError) as caught, throttle.turn("made up", "192.0.2.2"):
            pass
        assert (caught.value.status, caught.value.retry) == (429, 1)
    for thread in threads:
        thread.join(30)
    assert sorted(passed) == ["192.0.2.1", FAR]


def test_logins_that_wait_leave_threads_to_others() -> None:
    """Wherever they come from; the last place is for who has logged in from here."""
    throttle = LoginThrottle()
    throttle.clear(NAME, "127.0.0.1")
    places = [*(("made up", f"192.0.2.{number}") for number in range(1, HASH_QUEUE)), (NAME, "127.0.0.1")]

    def login(name: str, address: str) -> None:
        with throttle.turn(name, address):
            pass

    threads = [threading.Thread(target=login, args=place) for place in places]
    with throttle.turn("made up", "192.0.2.0"):
        for count, thread in enumerate(threads, 1):
            if count == len(threads):
                with pytest.raises(ApiError, match="another login waits"):
                    login("made up", FAR)
            thread.start()
            wait_for(lambda count=count: len(throttle._waiting) == count, 10)
    for thread in threads:
        thread.join(30)
    assert len(threads) == HASH_QUEUE and not throttle._waiting


def test_successful_logins_evict_no_change(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of event has a cap of its own."""
    monkeypatch.setattr(healthchecker, "EVENTS", 100)
    with local.store.writing() as session:
        record_event(session, "change", "the oldest", at=local.clock.now)
        session.flush()
        session.execute(sqlalchemy.insert(Event), [
            {"at": local.clock.now, "kind": "login", "resource": "", "text": str(number), "actor": "", "address": ""}
            for number in range(110)])  # fmt: skip
        prune_events(session, Retention(), local.clock.now)
        kinds = sqlalchemy.select(Event.kind, sqlalchemy.func.count()).group_by(Event.kind)
        counts = {kind: count for kind, count in session.execute(kinds)}
        first = session.scalar(sqlalchemy.select(Event.text).where(Event.kind == "login").order_by(Event.id).limit(1))
    assert (counts["change"], counts["login"], first) == (1, 100, "10")


def seconds_of(local: Local, name: str) -> float:
    begin = time.thread_time()
    assert attempt(local, name=name).status == 401
    return time.thread_time() - begin


@pytest.mark.long
def test_unknown_users_take_as_long_as_known_ones(tmp_path: Path) -> None:
    """With as many rounds as a user's password really has."""
    with local_console(tmp_path) as local:
        with local.store.writing() as session:
            find_user(session, NAME).take_password(User.create(NAME, PASSWORD))
        known = min(seconds_of(local, NAME) for _ in range(3))
        unknown = min(seconds_of(local, "nobody") for _ in range(3))
    assert 0.5 < unknown / known < 2 and unknown > 0.02


def test_answers_to_unknown_and_known_users_are_the_same(local: Local) -> None:
    known, unknown = attempt(local), attempt(local, name="nobody")
    assert known.body == unknown.body and known.headers == unknown.headers


# --- where from ---
@pytest.mark.parametrize(
    ("address", "enters"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        (FAR, True),
        (f"::ffff:{FAR}", True),
        ("192.0.3.1", False),
        ("fe80::1%eth0", False),
        ("2001:db8::1", False),
    ],
)
def test_networks_of_the_operators(local: Local, address: str, enters: bool) -> None:
    """To others the console says nothing of use; how healthy it is, everybody may know."""
    for method, path, status in (("GET", "/-/login", 200), ("GET", "/-/", 303), ("GET", "/-/api/resources", 401)):
        assert local.ask(method, path, address=address).status == (status if enters else 403)
    reply = local.api("POST", "login", {"username": NAME, "password": PASSWORD}, address=address)
    assert reply.status == (200 if enters else 403)
    assert local.ask("GET", "/-/metrics", address=address).status == (200 if enters else 403)
    assert local.ask("GET", "/-/livez", address=address).body == "ok\n"
    assert local.ask("GET", "/-/health", address=address).json.keys() == {"status"}


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
    ("GET", "/-/api/sessions", 403),
    ("GET", "/-/api/openapi.json", 403),
    ("GET", "/-/api/nothing", 403),
    ("POST", "/-/api/password", 422),
    ("POST", "/-/api/login", 422),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("address", "headers"),
    [
        ("127.0.0.1", {}),
        ("::1", {"Host": "127.0.0.1"}),
        (FAR, {}),
    ],
    ids=str,
)
def test_documented_password_opens_its_change_alone(fresh: Local, address: str, headers: dict[str, str]) -> None:
    """From everywhere: nobody is local; after that, everything can be done."""
    fresh.log_in(NAME, DOCUMENTED, address=address, headers=headers)
    json_type = {"Content-Type": "application/json"}
    for method, path, status in RESTRICTED:
        reply = fresh.ask(method, path, "{}" if method == "POST" else "", {**json_type, **headers}, address=address)
        assert reply.status == status, (method, path, reply)
        assert status != 303 or reply.headers["location"] == "/-/password"
        if status == 403 and "/api/" in path:
            assert reply.json["detail"] == "change the documented password first: it opens nothing else"
    assert "checks" not in fresh.ask("GET", "/-/health", address=address, headers=headers).json
    change = {"current": DOCUMENTED, "new": PASSWORD}
    assert fresh.api("POST", "password", change, address=address, headers=headers).status == 204
    fresh.log_in(NAME, PASSWORD, address=address, headers=headers)
    assert fresh.api("GET", "resources", address=address, headers=headers).status == 200


# --- the service and its command line ---
def test_banner_in_the_log_until_the_password_is_changed(tmp_path: Path, running: tuple[Service, Client]) -> None:
    banner = f"the password of {NAME} is the documented one"
    service.prepared_keys(tmp_path)
    with Service(write_inventory(tmp_path)) as first:
        assert banner in first.output
    assert banner not in running[0].output
    assert not (running[0].inventory.parent / "keys" / "session.key").exists()


def user(inventory: Path, *arguments: str, password: str = "", encoding: str = "utf-8") -> tuple[int, str, str]:
    """Exit code and both outputs of a `user` command, with the password piped in."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{password}\n".encode(encoding)), encoding="utf-8"))
        output = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        error = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        code = healthchecker.main(["--inventory", str(inventory), "user", *arguments])
    return code, output.getvalue(), error.getvalue()


@pytest.mark.long
def test_users_before_the_first_start(tmp_path: Path) -> None:
    """As a process of its own."""
    inventory = write_inventory(tmp_path)
    done = subprocess.run(
        service.command(inventory, "user", "add", "alice", "--role", "admin"),
        input=f"{PASSWORD}\n",
        capture_output=True,
        encoding="utf-8",
        env=service.environment(),
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alice can log in now, as admin\n", "")
    with local_console(tmp_path) as local:
        assert local.log_in("alice").api("GET", "users").status == 200


@pytest.mark.long
def test_users_on_the_command_line(running: tuple[Service, Client]) -> None:
    """While the service runs."""
    inventory, console = running[0].inventory, running[0].console
    assert user(inventory, "add", "alice", "--role", "admin", password=PASSWORD)[0] == 0
    alice = Client(*console).log_in("alice")
    assert user(inventory, "add", "bob", password=PASSWORD)[0] == 0
    listed = [line.split(None, 2) for line in user(inventory, "list")[1].splitlines()]
    assert listed[1:] == [[NAME, "admin", "own"], ["alice", "admin", "own"], ["bob", "viewer", "own"]]
    assert user(inventory, "passwd", "alice", password="another fine password")[0] == 0
    assert alice.api("GET", "resources").status == 401
    alice.token = ""
    alice.log_in("alice", "another fine password")
    assert user(inventory, "remove", "alice")[0] == 0
    assert alice.api("GET", "resources").status == 401
    found = running[1].api("GET", "events?kind=change&limit=4").json
    assert [(event["text"], event["actor"]) for event in found] == [
        ("user alice removed", "command line"),
        ("user alice: new password", "command line"),
        ("user bob added as viewer", "command line"),
        ("user alice added as admin", "command line"),
    ]


def test_named_tokens_on_the_command_line(running: tuple[Service, Client]) -> None:
    """While the service runs; the token alone is printed, for a script to read."""
    inventory, client = running[0].inventory, Client(*running[0].console)
    assert user(inventory, "add", "robot", password=PASSWORD)[0] == 0
    code, output, error = user(inventory, "token", "add", "robot", "nightly", "--expires", "never")
    assert (code, error, len(output.split())) == (0, "", 1)
    client.token = output.strip()
    assert client.api("GET", "resources").status == 200
    user(inventory, "token", "add", "robot", "other", "--expires", "1d")
    rows = [line.split() for line in user(inventory, "token", "list")[1].splitlines()[1:]]
    assert (rows[0][:4], rows[0][-1]) == (["robot", "nightly", "viewer", "never"], "127.0.0.1")
    assert (rows[1][:3], rows[1][-2:]) == (["robot", "other", "viewer"], ["not", "used"])
    done = user(inventory, "token", "revoke", "robot", "nightly")
    assert done == (0, "nightly of robot opens nothing any more\n", "")
    assert client.api("GET", "resources").status == 401
    for arguments, message in (
        (["revoke", "robot", "nightly"], "there is no such token"),
        (["add", "nobody", "x"], "there is no such user"),
        (["add", "robot", "other"], "there is a token of this name already"),
        (["add", "robot", "x", "--role", "admin"], "role: must not be more than that of robot, viewer"),
        (["add", "robot", "x", "--expires", "1x"], "expires: must be like 90d, a date like 2027-01-31, or never"),
        (["add", "robot", "a/b"], "name: must be 1 to 253 characters without slashes"),
    ):
        assert user(inventory, "token", *arguments) == (2, "", f"{message}\n"), arguments


@pytest.mark.long
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
    with few_rounds():
        assert user(inventory, *arguments, password=password) == (2, "", f"{message}\n")
        code, output, _ = user(inventory, "list")
    assert (code, output.split("\n")[1].split()) == (0, [NAME, "admin", "the", "documented", "one"])


def test_a_password_in_another_encoding(tmp_path: Path) -> None:
    """It would be another password: the browser sends UTF-8."""
    with few_rounds():
        done = user(write_inventory(tmp_path), "passwd", NAME, password="Grüße aus Köln", encoding="cp850")
    assert done[0] == 2 and done[2].startswith("the password is not in UTF-8"), done


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("typed", "ends"), [((f"{PASSWORD}\n", f"{PASSWORD}\n"), 0), (("\x04",), 130)],
                         ids=["twice", "Ctrl-D"])
def test_password_at_a_terminal_is_not_shown(tmp_path: Path, typed: tuple[str, ...], ends: int) -> None:
    import pty  # noqa: PLC0415  # UNIX only

    inventory = write_inventory(tmp_path)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, service.command(inventory, "user", "add", "alice"), service.environment())
    deadline = threading.Timer(120, os.kill, (pid, signal.SIGKILL))  # ends every wait below
    deadline.start()
    output = b""
    try:
        with contextlib.suppress(OSError):  # the end of the terminal
            for answer in typed:
                while not re.search(rb"(Password|Once more): \Z", output):
                    output += os.read(terminal, 1000)
                os.write(terminal, answer.encode())
                output += b"\n"
            while chunk := os.read(terminal, 1000):
                output += chunk
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        deadline.cancel()
        os.close(terminal)
    assert code == ends and b"Traceback" not in output, output
    assert PASSWORD.encode() not in output and (b"alice can log in now" in output) is (ends == 0)


def test_login_flood_keeps_no_right_login_out(running: tuple[Service, Client]) -> None:
    """Made-up names from many other addresses; each right login waits up to 2 s for its turn, before which it is not
    sent away, and gets it, and the gate answers meanwhile."""
    assert HASH_WAIT == 2
    service, client = running[0], Client(*running[0].console)
    service.wait_status("/", 200)
    ending, statuses = threading.Event(), []

    def flood(number: int) -> None:
        tries = 0
        while not ending.is_set():
            tries += 1
            connection = http.client.HTTPConnection(
                *service.console, timeout=60, source_address=(f"127.0.0.{number + 10}", 0)
            )
            body = json.dumps({"username": f"user {number} {tries}", "password": WRONG})
            connection.request("POST", "/-/api/login", body, {"Content-Type": "application/json"})
            statuses.append(connection.getresponse().status)
            connection.close()

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: {401, 429} <= {*statuses}, 60)  # one is checked, others are sent away
        body = {"username": NAME, "password": PASSWORD}

        def let_in() -> bool:
            """On a busy machine a turn may take longer than that; but nobody is sent away before."""
            begin = time.monotonic()
            status = client.api("POST", "login", body).status
            assert status == 200 or (status == 429 and time.monotonic() - begin >= HASH_WAIT)
            return status == 200

        for _ in range(3):
            wait_for(let_in, 60)
            assert service.get("/").status == 200
    finally:
        ending.set()
        for thread in threads:
            thread.join(60)
    assert {*statuses} == {401, 429}
