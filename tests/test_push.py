"""Resources that report by themselves: what their reports do, whose count, and what their silence does."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import wait_for
from console import Client, Local, Reply, console, local_console, served

import healthchecker
from healthchecker import InventoryError, Platform, PushConnection, Resource, SecretError, load_inventory, revise

TOKEN = "0123456789abcdef"
INVENTORY = f"""\
  - {{name: backup, platform: push, password: {TOKEN}, interval: 3600}}
  - {{name: twice, platform: push, password: {TOKEN[::-1]}, interval: 3600, rise: 2, fall: 2}}
  - {{name: stated, platform: simulated, mean_healthy: 100000}}
"""
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    with local_console(tmp_path, INVENTORY) as made:
        yield made


def push(local: Local, name: str = "backup", token: str = TOKEN, **body: Any) -> Reply:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    return local.ask("POST", f"/-/api/push/{name}", json.dumps(body), headers)


@pytest.fixture(autouse=True)
def _any_pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.function not in (test_who_says_too_much, test_two_reports_at_once):
        monkeypatch.setattr(healthchecker, "PUSH_PAUSE", 0.0)


def shown(local: Local, name: str = "backup") -> tuple[str, str, str]:
    """What counts, as the pages have it once it is written."""
    local.context.monitor._context.recorder.flush()
    view = local.log_in().api("GET", f"resources/{name}").json
    return view["state"], view["cause"], view["reason"]


def test_a_report_counts_at_once(local: Local) -> None:
    assert shown(local) == ("unknown", "", "")
    assert push(local, healthy=True, reason="12 GB in 4 min").status == 204
    assert shown(local) == ("healthy", "", "")
    assert local.api("GET", "resources/backup").json["sample"]["checks"]["report"]["text"] == "12 GB in 4 min"
    assert push(local, healthy=False, reason="disk\nfull\x1b[31m").status == 204
    assert shown(local) == ("unhealthy", "check", "check report: disk full [31m")
    assert push(local, healthy=False).status == 204
    assert shown(local) == ("unhealthy", "check", "check report: failed")
    states = [event["text"] for event in local.api("GET", "events?kind=state&resource=backup").json]
    assert [text.partition(" (")[0] for text in states[::-1]] == ["unknown -> healthy", "healthy -> unhealthy"]


def test_a_report_that_holds_its_token(local: Local) -> None:
    """As one does that is the command line of what sent it."""
    assert push(local, healthy=False, reason=f"curl -H 'Authorization: Bearer {TOKEN}' failed").status == 204
    assert shown(local)[2] == "check report: curl -H 'Authorization: Bearer ***' failed"


def test_rise_and_fall_are_one_where_nothing_else_is_said(local: Local) -> None:
    for healthy, state in ((True, "healthy"), (False, "healthy"), (False, "unhealthy"), (True, "unhealthy")):
        assert push(local, "twice", TOKEN[::-1], healthy=healthy).status == 204
        assert shown(local, "twice")[0] == state


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "token"),
    [("backup", ""), ("backup", TOKEN[:-1]), ("backup", TOKEN[::-1]), ("backup", f"{TOKEN}é"), ("nobody", TOKEN),
     ("stated", ""), ("stated", TOKEN), ("twice", TOKEN)],
)  # fmt: skip
def test_nobody_else_reports(local: Local, name: str, token: str) -> None:
    """And who tries learns nothing, not even of a name."""
    reply = push(local, name, token.encode().decode("latin-1"), healthy=True)
    assert (reply.status, reply.json["detail"]) == (401, "no resource that pushes has this name and token")
    assert shown(local, "backup")[0] == shown(local, "twice")[0] == "unknown"


def test_nobody_reports_where_the_token_cannot_be_opened(local: Local) -> None:
    """Also not who shows an empty one, which is all that is known of it."""
    with local.store.writing() as session:
        session.execute(sqlalchemy.update(Resource).filter_by(name="backup").values(password="damaged"))
        revise(session)
    local.follow()
    wait_for(lambda: shown(local)[:2] == ("unhealthy", "credential"), 10)
    body, kind = json.dumps({"healthy": True}), {"Content-Type": "application/json"}
    with served(local):
        for login in ({"Authorization": "Bearer "}, {"Authorization": "Bearer"}, {}):
            reply = Client(*local.console).ask("POST", "/-/api/push/backup", body, {**kind, **login})
            assert reply.status == 401, login
    assert shown(local)[:2] == ("unhealthy", "credential")


def test_a_login_is_no_token_and_a_token_no_login(local: Local) -> None:
    assert push(local, token=local.log_in().token, healthy=True).status == 401
    local.token = TOKEN
    assert local.api("GET", "resources").status == 401


@pytest.mark.long
@pytest.mark.parametrize(
    "body",
    [{}, {"healthy": "yes"}, {"healthy": 1}, {"healthy": None}, {"healthy": True, "reason": "x" * 201},
     {"healthy": True, "reason": 1}, {"healthy": True, "until": "x"}],
)  # fmt: skip
def test_what_is_no_report_changes_nothing(local: Local, body: dict[str, Any]) -> None:
    assert push(local, **body).status == 422
    assert shown(local)[0] == "unknown"


def test_who_never_reported_blocks_what_it_counts_for(tmp_path: Path) -> None:
    """A start asks everybody else at once; what may speak tomorrow holds up no more than what it is needed for."""
    groups = "groups: [{name: g, members: [backup, twice, stated], healthy: any}]\n"
    (alone := tmp_path / "alone").mkdir()
    with local_console(tmp_path, INVENTORY + groups) as local:
        wait_for(lambda: local.context.is_healthy)
    with local_console(alone, INVENTORY) as local:
        wait_for(lambda: shown(local, "stated")[0] == "healthy")
        assert not local.context.is_healthy
        assert push(local, healthy=True).status == push(local, "twice", TOKEN[::-1], healthy=True).status == 204
        assert local.context.is_healthy


def test_who_says_too_much(local: Local) -> None:
    """The same again within a second is no report more, nor is a good one behind a bad one; a bad one always counts."""
    connection = local.context.connections.watched["backup"]
    assert isinstance(connection, PushConnection)
    connection.heard, connection.heard_mono = True, math.inf  # for good just now
    assert push(local, healthy=True).status == 204
    assert shown(local)[0] == "unknown"
    assert push(local, healthy=False, reason="first").status == 204
    assert connection.heard is False
    connection.heard_mono = math.inf
    assert push(local, healthy=False, reason="second").status == 204
    reply = push(local, healthy=True)
    assert (reply.status, reply.headers["retry-after"]) == (429, "1")
    assert shown(local) == ("unhealthy", "check", "check report: first")
    connection.heard_mono = -math.inf
    assert push(local, healthy=True).status == 204
    assert shown(local)[0] == "healthy"


def test_two_reports_at_once(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """The good one that comes while a bad one is taken is behind that, and what is said after both is compared with
    the one that counts."""
    poller, found = local.context.monitor.pollers["backup"], list[int]()
    take, good = poller.take, threading.Thread(target=lambda: found.append(push(local, healthy=True).status))
    monkeypatch.setattr(healthchecker, "PUSH_PAUSE", 60.0)

    def take_late(sample: Any) -> bool:
        monkeypatch.setattr(poller, "take", take)
        taken = take(sample)
        good.start()
        good.join(1)    # unless it waits for this one
        return taken

    monkeypatch.setattr(poller, "take", take_late)
    assert push(local, healthy=False, reason="first").status == 204
    good.join(60)
    assert found == [429]
    assert push(local, healthy=False).status == 204
    assert shown(local) == ("unhealthy", "check", "check report: first")


def test_a_report_meets_new_settings(local: Local) -> None:
    """Those of before and those behind it count, and the token of before does not."""
    local.log_in()
    new = {"name": "job", "platform": "push", "password": TOKEN, "interval": 3600}
    assert local.api("POST", "resources", new).json["has_secret"]
    wait_for(lambda: push(local, "job", healthy=True).status == 204)
    assert local.api("PATCH", "resources/job", {"password": "f" * 16, "tags": ["t"]}).status == 200
    wait_for(lambda: push(local, "job", "f" * 16, healthy=False).status == 204)
    assert push(local, "job", healthy=True).status == 401
    assert shown(local, "job")[0] == "unhealthy"
    assert local.api("DELETE", "resources/job").status == 204
    wait_for(lambda: push(local, "job", "f" * 16, healthy=True).status == 401)


def test_a_token_that_is_made_is_shown_once(local: Local) -> None:
    """By the API and on the page; sealed in the database, and in no other answer."""
    local.log_in()
    new = {"name": "job", "platform": "push", "interval": 3600}
    added = local.api("POST", "resources", new)
    token = added.json["password"]
    assert added.status == 201 and len(token) == 43 and added.json["has_secret"]
    wait_for(lambda: push(local, "job", token, healthy=True).status == 204)
    fields = {"name": "page", "platform": "push", "interval": "3600"}
    assert "not tried" in local.ask("POST", "/-/add", fields | {"do": "test"}).body, "and needs none for that"
    page = local.ask("POST", "/-/add", fields)
    found = re.search(r"Its token, which is not shown again: (\S{43})\n?<", page.body)
    assert page.status == 200 and found and found[1] != token
    wait_for(lambda: push(local, "page", found[1], healthy=True).status == 204)
    for path in ("/-/resources/job", "/-/resources/page", "/-/api/resources/page", "/-/api/events", "/-/add?copy=job"):
        shown_there = local.ask("GET", path)
        assert shown_there.status == 200 and token not in shown_there.body and found[1] not in shown_there.body
    with local.context.store.reading() as session:
        rows = session.scalars(sqlalchemy.select(healthchecker.Resource.password).filter_by(origin="api"))
        assert all(row and token not in str(row) for row in rows)
    given = local.api("POST", "resources", {**new, "name": "given", "password": TOKEN})
    assert (given.status, given.json["password"]) == (201, None)
    assert local.api("PATCH", "resources/job", {"password": TOKEN}).json.get("password") is None
    assert local.api("POST", "resources", {**new, "name": "x", "platform": "unix", "hostname": "h"}).status == 422


def test_the_newest_word_holds_whatever_is_changed(local: Local) -> None:
    """Also the one that is not written yet."""
    local.log_in()
    new = {"name": "job", "platform": "push", "password": TOKEN, "interval": 3600}
    assert local.api("POST", "resources", new).status == 201
    wait_for(lambda: push(local, "job", healthy=True).status == 204)
    assert shown(local, "job")[0] == "healthy"
    poller = local.context.monitor.pollers["job"]
    assert push(local, "job", healthy=False).status == 204
    assert local.api("PATCH", "resources/job", {"tags": ["t"]}).status == 200
    wait_for(lambda: local.context.monitor.pollers["job"] is not poller)
    assert local.context.monitor.pollers["job"].standing.state == "unhealthy"


def test_a_report_that_is_not_written_yet_outlives_a_change(local: Local) -> None:
    """Of a job that reports once a day: a restart would close the gate until the next one."""
    local.log_in()
    new = {"name": "job", "platform": "push", "password": TOKEN, "interval": 86400}
    assert local.api("POST", "resources", new).status == 201
    wait_for(lambda: push(local, "job", healthy=True).status == 204)
    assert local.api("PATCH", "resources/job", {"tags": ["t"]}).status == 200
    assert shown(local, "job")[0] == "healthy"
    with local.context.store.reading() as session:
        row = session.scalars(sqlalchemy.select(healthchecker.Resource).filter_by(name="job")).one()
        assert session.get_one(healthchecker.Status, row.id).settings_digest == row.settings_digest


def test_a_check_asks_nothing_and_changes_nothing(local: Local) -> None:
    push(local, healthy=True)
    found = local.log_in().api("POST", "resources/backup/check").json
    assert found["reason"] == "not tried: it reports by itself"
    assert shown(local)[0] == "healthy"


def test_a_report_counts_on_after_a_restart(tmp_path: Path) -> None:
    with local_console(tmp_path, INVENTORY) as local:
        push(local, healthy=True)
        assert shown(local)[0] == "healthy"
    with local_console(tmp_path, INVENTORY.replace("interval: 3600", "interval: 4000, tags: [t]", 1)) as local:
        assert shown(local)[0] == "healthy"
    with local_console(tmp_path, INVENTORY.replace(TOKEN, "f" * 16, 1)) as local:
        assert shown(local)[0] == "unknown"


def test_a_report_counts_for_the_interval(tmp_path: Path) -> None:
    """However short it is; two seconds more are for the way."""
    with local_console(tmp_path, INVENTORY.replace("interval: 3600", "interval: 1", 1)) as local:
        assert push(local, healthy=True).status == 204
        assert local.context.monitor.pollers["backup"].expires_mono - healthchecker.lease_clock() <= 3


def left(local: Local, name: str) -> float:
    """Seconds for which its last word counts."""
    return local.context.monitor.pollers[name].expires_mono - healthchecker.lease_clock()


@pytest.fixture
def job(local: Local) -> Local:
    """With one that may be changed; all have said that they are all right."""
    body = {"name": "job", "platform": "push", "password": TOKEN, "interval": 3600}
    assert local.log_in().api("POST", "resources", body).status == 201
    wait_for(lambda: push(local, "job", healthy=True).status == 204, 10)
    assert push(local, healthy=True).status == push(local, "twice", TOKEN[::-1], healthy=True).status == 204
    wait_for(lambda: local.context.is_healthy, 10)
    return local


@pytest.mark.long
@pytest.mark.windows
def test_another_interval_holds_at_once(job: Local) -> None:
    """From the last word on, longer or shorter."""
    said_mono = healthchecker.lease_clock()
    assert job.api("PATCH", "resources/job", {"interval": 86400}).status == 200
    wait_for(lambda: left(job, "job") > 80_000, 10)
    assert job.context.is_healthy
    assert left(job, "job") <= 86402 - healthchecker.lease_clock() + said_mono, "it has said nothing since"
    assert job.api("PATCH", "resources/job", {"interval": 1}).status == 200
    wait_for(lambda: not job.context.is_healthy, 20)
    wait_for(lambda: shown(job, "job")[1:] == ("stale", "no result for 3 s"))


def test_another_interval_holds_for_machines_that_begin_later(job: Local) -> None:
    """They have nothing but what is written for them."""
    job.context.monitor._context.recorder.flush()
    with job.context.store.writing() as session:
        number = healthchecker.find_resource(session, "job").id
        session.add(healthchecker.Result(resource_id=number, serial=1, machine="a", found_at=1, counts=3602, opens=0))
    assert job.api("PATCH", "resources/job", {"interval": 60}).status == 200
    with job.context.store.reading() as session:
        assert session.get_one(healthchecker.Result, number).counts == 62


@pytest.mark.parametrize(("interval", "is_known"), [(5, True), (600, False)])
def test_what_has_run_out_is_not_taken_up_for_a_longer_interval(interval: int, is_known: bool, job: Local) -> None:
    """A start goes by the interval of now: what was healthy an hour ago opened the gate over what is dead since."""
    new = {"name": "asked", "platform": "simulated", "mean_healthy": 1000000, "interval": 60}
    assert job.api("POST", "resources", new).status == 201
    wait_for(lambda: job.api("GET", "resources/asked").json["state"] == "healthy")
    job.context.monitor._context.recorder.flush()
    with job.context.store.writing() as session:
        row = healthchecker.find_resource(session, "asked")
        with healthchecker.keeping_word(session, row):
            settings = json.loads(row.settings) | {"interval": interval}
            row.settings, row.interval = json.dumps(settings), interval
        status = session.get_one(healthchecker.Status, row.id)
        assert (status.settings_digest == row.settings_digest) is is_known
        session.rollback()


SHORT = "  - {name: backup, platform: push, password_env: PUSHED, interval: 1}"


@pytest.mark.long
@pytest.mark.windows
@pytest.mark.skipif(not shutil.which("curl"), reason="no curl (apt-get install curl)")
def test_silence_closes_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent as the README says."""
    monkeypatch.setenv("PUSHED", TOKEN)
    [line] = re.findall(r"`(curl .+?/push/.+?)`", README.read_text(encoding="utf-8"))
    with console(tmp_path, SHORT) as (service, client):
        told = line.replace("127.0.0.1:8081", f"{client.host}:{client.port}").replace("$TOKEN", TOKEN)
        service.wait_status("/-/readyz", 503)

        def pushed() -> bool:
            subprocess.run(["sh", "-c", told], check=True, capture_output=True)
            return service.get("/-/readyz").status == 200

        wait_for(pushed)
        service.wait_status("/-/readyz", 503)
        wait_for(lambda: client.log_in().api("GET", "resources/backup").json["cause"] == "stale")
        assert TOKEN not in service.output


FAULTS = {
    "password, password_env or password_file is missing": "",
    "must have 16 characters": "password: 0123456789abcde",
    "of ASCII or more, without blanks": "password: 0123456789 abcdef",
    "hostname has no meaning with platform push": f"password: {TOKEN}, hostname: a",
    "username has no meaning": f"password: {TOKEN}, username: a",
    "key_file has no meaning": "key_file: a",
    "timeout has no meaning": f"password: {TOKEN}, timeout: 9",
    "checks has no meaning": f"password: {TOKEN}, checks: []",
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults(tmp_path: Path, message: str) -> None:
    resource = f"  - {{name: a, platform: push{', ' if FAULTS[message] else ''}{FAULTS[message]}}}"
    with pytest.raises((InventoryError, SecretError), match=message), local_console(tmp_path, resource):
        pass


def test_defaults_of_machines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yaml"
    path.write_text(
        "defaults: {timeout: 9, limits: {cpu_percent: 90}, username: u}\n"
        f"resources: [{{name: a, platform: push, password: {TOKEN}}}]\n",
        encoding="utf-8",
    )
    [settings] = load_inventory(path).resources
    assert (settings.platform, settings.username, settings.ttl) == (Platform.PUSH, None, 62)
