"""Overview: what pages say of resources, of what the pollers know and not only of what could be written."""

from __future__ import annotations

import contextlib
import gzip
import html
import http.server
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from conftest import folder_with_database, wait_for
from console import NAME, PASSWORD, Local, local_console
from service import few_rounds

import healthchecker
from healthchecker import COOKIE, Resource, Status

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its machines are asked by a POSIX shell")


def text_of(local: Local, path: str = "/-/") -> str:
    """A page's text, one blank between words."""
    reply = local.ask("GET", path)
    assert reply.status == 200, reply
    return " ".join(html.unescape(re.sub(r"<(title|script).*?</\1>|<[^>]*>", " ", reply.body)).split())


def written(local: Local) -> str:
    """The state that is in the database."""
    with local.store.reading() as session:
        return session.scalar(sqlalchemy.select(Status.state)) or ""


def written_sample(folder: Path) -> str | None:
    """What the last poll that was written down read."""
    with contextlib.closing(sqlite3.connect(folder / "healthchecker.db")) as database:
        return next((text for (text,) in database.execute("SELECT sample FROM status")), "null")


@contextlib.contextmanager
def machine(folder: Path, more: str) -> Iterator[tuple[Local, Path]]:
    """A console with a machine that is well until a file is there, and which is polled when a test wants it."""
    flag = folder / "broken"
    row = (
        f"  - {{name: one, platform: local, interval: 600, retry_interval: 600, {more},"
        f" checks: [{{name: flag, command: 'test ! -e {flag} || {{ echo it is there; exit 1; }}'}}]}}\n"
    )
    with local_console(folder, row, clock=time.time) as local:
        wait_for(lambda: written(local) == "healthy")
        local.log_in_as(NAME)
        yield local, flag


def test_each_turn_has_a_row_of_its_own(tmp_path: Path) -> None:
    """Also of plans that begin at once with the same tags: a refresh keeps one element for each id."""
    plan = '  - {schedule: "0 2 29 2 *", for: %s, tags: [db], reason: %s%s}\n'      # none of them runs now
    plans = [("1h", "patches", ""), ("3h", "patches", ""), ("1h", "backup", ""), ("1h", "patches", ", zone: Etc/UTC")]
    rows = "  - {name: one, platform: simulated, tags: [db]}\nmaintenance:\n" + "".join(plan % each for each in plans)
    with local_console(tmp_path, rows, clock=time.time) as local:
        local.log_in_as(NAME)
        now = {"tags": ["db"], "for": "1h", "reason": "now"}
        assert local.api("POST", "maintenance", now, headers={"Origin": "http://localhost"}).status == 201
        ids = re.findall(r'<tr id="(turn-.*?)">', local.ask("GET", "/-/").body)
        assert len(ids) == len({*ids}) == 1 + len(plans)


@pytest.mark.long
def test_between_confirmations(tmp_path: Path) -> None:
    """What does not count yet is said all the same, with its cause, and so is the way back."""
    with machine(tmp_path, "rise: 2, fall: 2") as (local, flag):
        flag.touch()
        assert local.form("/-/resources/one/check", {}).status == 303
        for path in ("/-/", "/-/resources/one"):
            assert re.search("failing 1 of 2 .*check flag: it is there", text_of(local, path))
        assert local.form("/-/resources/one/check", {}).status == 303
        assert "failing" not in text_of(local) and "unhealthy" in text_of(local)
        flag.unlink()
        assert local.form("/-/resources/one/check", {}).status == 303
        for path in ("/-/", "/-/resources/one"):
            assert "1 of 2 good" in text_of(local, path)
        assert local.form("/-/resources/one/check", {}).status == 303
        assert "1 of 2 good" not in text_of(local)


def test_what_cannot_be_written_is_shown(tmp_path: Path) -> None:
    """While another program holds the database, the rows say what was, and the pages what is."""
    with machine(tmp_path, "rise: 1, fall: 1") as (local, flag), contextlib.closing(
        sqlite3.connect(tmp_path / "healthchecker.db", timeout=60, isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        flag.touch()
        poller = local.context.monitor.pollers["one"]
        poller.poll_now().result(60)
        assert written(local) == "healthy"
        for path in ("/-/", "/-/resources/one"):
            assert "check flag: it is there" in text_of(local, path)
        assert local.api("GET", "resources/one").json["state"] == "unhealthy"
        other.execute("ROLLBACK")


def test_a_clock_that_was_set_is_shown(tmp_path: Path) -> None:
    """For a day; and by which version it all is shown."""
    ahead = [0.0]
    with local_console(tmp_path, "  - {name: one, platform: simulated}\n", clock=time.time) as local:
        local.context.monitor._wall = lambda: time.time() + ahead[-1]
        local.log_in_as(NAME)
        text = text_of(local)
        assert "the clock was set" not in text and f"HealthChecker {healthchecker.VERSION}." in text
        ahead.append(3600.0)
        wait_for(lambda: "the clock was set forward by 3,600 s: times before and after do not" in text_of(local))


def test_what_is_shown_can_be_acknowledged(tmp_path: Path) -> None:
    """Although its row still says what was before; and not what is shown as well, whatever its row says."""
    with machine(tmp_path, "rise: 1, fall: 1") as (local, flag):
        monitor, shown = local.context.monitor, '"/-/resources/one/acknowledgement"'
        for state, before, status in (("unhealthy", "healthy", 303), ("healthy", "unhealthy", 409)):
            (flag.touch if state == "unhealthy" else flag.unlink)()
            monitor.pollers["one"].poll_now().result(60)
            assert monitor.flush()
            with local.store.writing() as session:  # as before the recorder's turn
                session.execute(Status.__table__.update().values(state=before, polled_at=Status.polled_at - 1))
            assert (shown in local.ask("GET", "/-/resources/one").body) is (state == "unhealthy")
            assert local.form("/-/resources/one/acknowledgement", {"comment": "on my way"}).status == status
            assert local.api("GET", "resources/one").json["state"] == state


def test_what_is_behind_another_cannot(tmp_path: Path) -> None:
    """Its own results may be good; each of them would end what is said of it."""
    rows = (
        "  - {name: parent, platform: http, url: 'http://127.0.0.1:1/', interval: 600, rise: 1, fall: 1}\n"
        "  - {name: child, platform: simulated, mean_healthy: 1000000, interval: 600, depends_on: [parent]}\n"
    )
    with local_console(tmp_path, rows, clock=time.time) as local:
        local.log_in_as(NAME)
        wait_for(lambda: local.api("GET", "resources/child").json["cause"] == "parent")
        for name, status in (("child", 409), ("parent", 303)):
            shown = f"/-/resources/{name}/acknowledgement"
            assert (f'"{shown}"' in local.ask("GET", f"/-/resources/{name}").body) is (status == 303)
            assert local.form(shown, {"comment": "on my way"}).status == status


@pytest.mark.long
@pytest.mark.parametrize("polled", [True, False])
def test_what_has_no_fresh_result_is_not_green(polled: bool, tmp_path: Path) -> None:
    """Whether its poller has found anything yet, and whether or not anybody has noted that time is up."""
    with machine(tmp_path, "rise: 1, fall: 1") as (local, _):
        monitor, poller = local.context.monitor, local.context.monitor.pollers["one"]
        if polled:
            monitor._ending.set()  # nobody looks any more
            monitor.join()
            poller.expires_mono = 0.0
        else:
            with local.store.writing() as session:
                session.execute(Status.__table__.update().values(polled_at=time.time() - 3600))
            poller.news.last, poller.standing = None, type(poller.standing)()
        for path in ("/-/", "/-/resources/one"):
            assert re.search(r"unhealthy.* stale: no result for 12\d\d s", text_of(local, path))
        assert local.api("GET", "resources/one").json["cause"] == "stale"


def test_what_was_known_stays_while_a_machine_is_away(tmp_path: Path) -> None:
    """Details and readings are still there, and say of when they are."""
    with machine(tmp_path, "rise: 1, fall: 1") as (local, _):
        before = local.ask("GET", "/-/resources/one").body
        assert "<dt>System</dt>" in before and "as of" not in before
        poller = local.context.monitor.pollers["one"]
        verdict = type(poller.news.last.verdict)("unhealthy", "unreachable", "no route to host")  # type: ignore[union-attr]
        poller._report(verdict, 0.1)
        body = local.ask("GET", "/-/resources/one").body
        assert "<dt>System</dt>" in body and 'class="columns old"' in body and "as of <time" in body
        assert re.search(r"<tr[^>]*>.*?class=\"old\".*?Memory", local.ask("GET", "/-/").body, re.DOTALL)
        with local.store.writing() as session:
            session.execute(Resource.__table__.update().values(platform="linux"))
        assert "<dt>System</dt>" not in local.ask("GET", "/-/resources/one").body, "that was another machine"


@pytest.mark.of_files
def test_what_was_known_outlives_a_restart(tmp_path: Path) -> None:
    """Nothing is read after it, and after several polls that read nothing; of other settings it would be wrong."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_port}/"
    row = f"  - {{name: one, platform: http, url: '{url}', interval: 600, retry_interval: 600, rise: 1, fall: 1%s}}\n"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with local_console(tmp_path, row % "", clock=time.time):
        wait_for(lambda: written_sample(tmp_path) != "null", 60)
    server.shutdown()
    server.server_close()
    thread.join()
    for _ in range(2):
        with local_console(tmp_path, row % "", clock=time.time) as local:
            local.log_in_as(NAME)
            for _ in range(2):
                assert local.form("/-/resources/one/check", {}).status == 303
                wait_for(lambda: written_sample(tmp_path) == "null")
            body = local.ask("GET", "/-/resources/one").body
            assert "Response time" in body and "as of <time" in body and "unreachable: " in body
    with local_console(tmp_path, row % ", redirects: 1", clock=time.time) as local:
        local.log_in_as(NAME)
        assert local.form("/-/resources/one/check", {}).status == 303
        assert "as of <time" not in local.ask("GET", "/-/resources/one").body


def test_times_in_words_are_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all other times of the pages, also where a sentence names one."""
    monkeypatch.setenv("TZ", "XYZ-9")
    time.tzset()
    try:
        with few_rounds(), local_console(tmp_path, f"  - {{name: one, {CALM}}}\n", clock=time.time) as local:
            local.log_in_as(NAME)
            later = time.strftime("%Y-%m-%dT%H:%M", time.localtime(time.time() + 86_400))
            for path, form in (
                ("/-/resources/one/maintenance", {"minutes": "60", "reason": "x"}),
                ("/-/maintenance", {"scope": "all", "minutes": "60", "reason": "x", "start": later}),
                ("/-/override", {"action": "open", "for": "8h", "reason": "x"}),
                ("/-/tokens", {"name": "nightly", "role": "viewer", "password": PASSWORD}),
            ):
                assert local.form(path, form).status in (200, 303), path
            texts = " ".join(event["text"] for event in local.api("GET", "events").json)
        told = re.findall(r"(?:until|from) (\d{4}-\d\d-\d\d.{0,15})", texts)
        assert len(told) == 5 and all(re.match(r"\S+ [\d:]{8}\+09:00", text) for text in told), texts
    finally:
        monkeypatch.undo()
        time.tzset()


# === Many ====================================================================
MANY = 200
CALM = "platform: simulated, mean_healthy: 1000000, interval: 600, retry_interval: 600"


@pytest.fixture(scope="module")
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A console with many machines that are well, of two tags and a group; two are away."""
    groups = "\ngroups: [{name: front, members: [m0, m1, away1]}]\n"
    tags = ("even", "odd")
    rows = "".join(f"  - {{name: m{n}, {CALM}, seed: {n}, tags: [{tags[n % 2]}]}}\n" for n in range(MANY))
    away = "platform: http, url: 'http://127.0.0.1:1/', interval: 600, retry_interval: 600, rise: 1, fall: 1"
    rows += f"  - {{name: away1, {away}, tags: [odd]}}\n  - {{name: away2, {away}, critical: false}}\n"
    with local_console(folder_with_database(request, tmp_path_factory), rows, groups, clock=time.time) as local:
        local.log_in_as(NAME)
        wait_for(lambda: f"All 2 unhealthy {MANY} healthy" in text_of(local, "/-/?by=none"), 60)
        yield local


def rows_of(local: Local, query: str) -> list[str]:
    """Names of the resources that are shown, in order."""
    body = local.ask("GET", f"/-/{query}").body
    return re.findall(r'<th scope="row"><a href="/-/resources/(\w+)"', body)


@pytest.mark.long
def test_what_is_well_is_folded(many: Local) -> None:
    """By tag and by group, with counts; a link unfolds it."""
    text = text_of(many)
    assert "even 100 healthy show 100 more of even odd 1 unhealthy 100 healthy show 100 more" in text.replace("  ", " ")
    assert "Without a tag 1 unhealthy" in text
    assert rows_of(many, "") == ["away2", "away1"]
    assert len(rows_of(many, "?unfold=odd")) == 102
    assert "front 1 unhealthy 2 healthy" in text_of(many, "/-/?by=group")
    client, login = many.app.test_client(use_cookies=False), {"Cookie": f"{COOKIE}={many.cookie}"}
    packed = client.get("/-/", headers={**login, "Accept-Encoding": "gzip"})
    assert packed.headers["Content-Encoding"] == "gzip" and len(packed.data) < 5000
    assert "away1" in gzip.decompress(packed.data).decode()


@pytest.mark.long
def test_what_the_gate_depends_on_is_not_folded_behind_what_it_does_not(
    many: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts were filled in the order of their titles."""
    monkeypatch.setattr(healthchecker, "ROWS_SHOWN", 1)
    assert rows_of(many, "") == ["away1"]
    assert rows_of(many, "?by=group&sort=-name") == ["away1"]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("?state=unhealthy&sort=name", ["away1", "away2"]),
        ("?state=unhealthy&sort=-name", ["away2", "away1"]),
        ("?cause=unreachable&gate=yes", ["away1"]),
        ("?cause=unreachable&gate=no", ["away2"]),
        ("?cause=auth", []),
        ("?q=m19&sort=-name&tag=odd", ["m199", "m197", "m195", "m193", "m191", "m19"]),
        ("?q=m1&sort=unknown&by=unknown&tag=none", []),
    ],
)
def test_filters_that_can_be_linked(many: Local, query: str, names: list[str]) -> None:
    assert rows_of(many, query) == names


def test_a_cause_says_since_when_and_why_once(many: Local) -> None:
    body = many.ask("GET", "/-/").body
    gate = body[body.index('class="gate') : body.index("</section>")]
    assert "front" in gate and re.search(r'since <time datetime="[\d-]+T[\d:]+[+-]\d\d:\d\d"', gate)
    assert body.count("unreachable: ") == 3  # of the group at the gate, and of the two in their rows


def test_the_state_shows_in_icon_and_title(many: Local) -> None:
    icons, named, origin = {}, {"name": "closed-beta", "platform": "simulated"}, {"Origin": "http://localhost"}
    assert many.api("POST", "resources", {**named, "critical": False}, headers=origin).status == 201
    for path in ("/-/", "/-/events", "/-/login", "/-/resources/closed-beta"):
        body = many.ask("GET", path).body
        icons[path] = re.findall(r'rel="icon" href="(.*?)"', body)
        title = re.findall("<title>(.*?)</title>", body, re.DOTALL)[0]
        assert "gate closed" in title.lower(), title
    assert many.api("DELETE", "resources/closed-beta", headers=origin).status == 204
    assert len({icon for (icon,) in icons.values()}) == 1
    assert "#b91f29" in many.ask("GET", icons["/-/"][0]).body


# === Forms ===================================================================
@pytest.fixture
def forms(tmp_path: Path) -> Iterator[Local]:
    """A console with one resource of the inventory and one, `full`, that was added there."""
    with few_rounds(), local_console(tmp_path, f"  - {{name: one, {CALM}, seed: 1}}\n", clock=time.time) as local:
        local.log_in_as(NAME)
        full = {"name": "full", "platform": "linux", "hostname": "192.0.2.1", "username": "u", "password": "a word",
                "interval": 600, "tags": ["db"]}  # fmt: skip
        assert local.api("POST", "resources", full, headers={"Origin": "http://localhost"}).status == 201
        yield local


def test_rename(forms: Local) -> None:
    """Its password still opens, and its events come along; not while something names it, nor to a name of another."""
    fields = {"platform": "linux", "hostname": "192.0.2.1", "username": "u", "interval": "600", "critical": "true"}
    for name, why in (("one", "is taken"), ("a\tb", "name")):
        reply = forms.form("/-/resources/full/edit", fields | {"name": name})
        assert reply.status in (409, 422) and why in reply.body, reply
    child = {"name": "child", "platform": "simulated", "seed": 2, "depends_on": ["full"]}
    assert forms.api("POST", "resources", child, headers={"Origin": "http://localhost"}).status == 201
    reply = forms.form("/-/resources/full/edit", fields | {"name": "fuller"})
    assert reply.status == 409 and "stays while it is named by child" in reply.body
    assert forms.form("/-/resources/child/remove", {}).status == 303
    reply = forms.form("/-/resources/full/edit", fields | {"name": "fuller", "settings": "tags: [db, two]"})
    assert (reply.status, reply.headers.get("location")) == (303, "/-/resources/fuller"), reply.body
    assert forms.ask("GET", "/-/resources/full").status == 404
    after = forms.api("GET", "resources/fuller").json
    assert after["has_secret"] and after["tags"] == ["db", "two"]
    told = [event["text"] for event in forms.api("GET", "events?resource=fuller").json]
    assert "renamed, before full" in told and "added" in told
    forms.follow()
    assert forms.context.monitor.targets["fuller"].fault is None


def test_copy(forms: Local) -> None:
    body = forms.ask("GET", "/-/add?copy=full").body
    assert 'value="192.0.2.1"' in body and "tags: [db]" in body
    assert 'name="name" value=""' in body and 'placeholder="not copied"' in body
    assert forms.ask("GET", "/-/add?copy=gone").status == 404
    assert forms.ask("GET", "/-/add?copy=one").status == 200, "also what the inventory states"
    assert "/-/add?copy=one" in forms.ask("GET", "/-/resources/one").body
    assert forms.ask("GET", "/-/resources/one/edit").status == 409


@pytest.mark.long
def test_a_password_that_is_not_kept_says_so(forms: Local) -> None:
    fields = {"platform": "linux", "hostname": "192.0.2.1", "username": "u", "name": "full", "password": "typed it",
              "interval": "soon"}  # fmt: skip
    for path in ("/-/add", "/-/resources/full/edit"):
        body = forms.form(path, fields).body
        assert 'placeholder="not kept: type it again"' in body and "typed it" not in body


def test_what_was_typed_for_a_user_stays(forms: Local) -> None:
    user = {"name": "late", "password": "correct horse battery", "role": "viewer"}
    assert forms.form("/-/users", user).status == 303
    body = forms.form("/-/users/late", {"password": "short", "role": "admin"}).body
    own = next(row for row in body.split("<tr>") if 'action="/-/users/late"' in row)
    assert re.search(r'<details name="user" open>.*?<option value="admin" selected>', own, re.DOTALL)
    assert "not kept: type it again" in own


@pytest.mark.long
@pytest.mark.of_files
def test_a_database_that_is_held_loses_nothing_typed(forms: Local, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "healthchecker.db", timeout=60, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        body = forms.form("/-/resources/one/maintenance", {"minutes": "240", "reason": "half a night"}).body
        other.execute("ROLLBACK")
    assert "the database cannot be used now" in body and 'value="half a night"' in body
    assert '<option value="240" selected>' in body


def test_who_is_to_wait_is_told_how_long(forms: Local) -> None:
    for _ in range(40):
        reply = forms.form("/-/login", {"username": "nobody", "password": "wrong"})
        if reply.status == 429:
            break
    assert reply.status == 429 and re.search(r"Next attempt in \d+ (s|min)", reply.body)


def test_events_of_what_was_removed(forms: Local) -> None:
    assert forms.form("/-/resources/full/remove", {}).status == 303
    body = forms.ask("GET", "/-/events").body
    assert '<option value="full">full (removed)</option>' in body and 'href="?resource=full"' in body
    assert '<option value="full" selected>' in forms.ask("GET", "/-/events?resource=full&kind=change").body


def test_availability_only_over_what_there_is(forms: Local) -> None:
    wait_for(lambda: "100.00 %" in text_of(forms, "/-/resources/one"))
    assert re.search(r"Availability: since \d{4}-\d\d-\d\d [\d:]+ 100.00 % \.", text_of(forms, "/-/resources/one"))
