"""The API over HTTP: what each operation does, what it refuses, and that its description agrees with its answers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import functools
import importlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import hypothesis
import pytest
import sqlalchemy
from conftest import folder_with_database, wait_for
from console import NAME, PASSWORD, Client, console, local_console, resource_path
from postgres import database_in, execute
from service import Service, write_inventory
from sshd import ParamikoSshd, Sshd

import healthchecker
from healthchecker import (
    INVENTORY_ONLY,
    OPERATIONS,
    SELECTABLE,
    Resource,
    ResourceSettings,
    Store,
    Vault,
    binding,
    find_resource,
    revise,
    update_row,
)

INVENTORY = """\
  - {name: stated, platform: simulated, interval: 1, mean_healthy: 100000}
  - {name: shaky, platform: simulated, interval: 1, mean_healthy: 100000, critical: false}
  - {name: local, platform: local, critical: false}
"""
SIMULATED = {"platform": "simulated", "interval": 1, "mean_healthy": 100_000}


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Client]]:
    with console(folder_with_database(request, tmp_path_factory), INVENTORY) as made:
        yield made


@pytest.fixture
def service(running: tuple[Service, Client]) -> Service:
    return running[0]


@pytest.fixture
def client(running: tuple[Service, Client]) -> Iterator[Client]:
    """A client with a fresh token; what a test adds is gone afterwards."""
    client = Client(*running[0].console).log_in()
    yield client
    for resource in client.api("GET", "resources").json:
        if resource["origin"] == "api":
            assert client.api("DELETE", resource_path(resource["name"])).status == 204
    for user in client.api("GET", "users").json:
        if user["name"] != NAME:
            assert client.api("DELETE", f"users/{quote(user['name'], safe='')}").status == 204


def everything(client: Client) -> Any:
    """What a request that is refused must not change."""
    fields = {*ResourceSettings.model_fields, "maintenance", "trusted_key"} - {"password", "key_passphrase", "was"}
    kept = [{name: resource[name] for name in fields} for resource in client.api("GET", "resources").json]
    return kept, client.api("GET", "users").json, client.api("GET", "events?limit=1&kind=change").json


def last_change(client: Client, kind: str = "change") -> tuple[str, str, str, str]:
    [event] = client.api("GET", f"events?kind={kind}&limit=1").json
    return event["resource"], event["text"], event["actor"], event["address"]


# --- resources ---
NAMES = ["plain", "with space", "ünïcödé ☃", "per%cent", "a?b=c&d#e", "<script>", "it's", "-", "x" * 253]


@pytest.mark.parametrize("name", NAMES)
def test_life_of_a_resource(client: Client, name: str) -> None:
    """Added, shown, changed, removed; each is an event with who and from where."""
    added = client.api("POST", "resources", {"name": name, "tags": ["a"], **SIMULATED})
    assert (added.status, added.json["name"], added.json["origin"], added.json["place"]) == (201, name, "api", None)
    assert last_change(client) == (name, "added", NAME, "127.0.0.1")
    assert client.api("GET", resource_path(name)).json["tags"] == ["a"]
    assert name in [resource["name"] for resource in client.api("GET", "resources").json]
    changed = client.api("PATCH", resource_path(name), {"interval": 2.5, "limits": {"cpu_percent": 90}})
    assert (changed.status, changed.json["interval"]) == (200, 2.5)
    assert changed.json["limits"]["cpu_percent"] == {"warn": None, "fail": 90.0} and changed.json["tags"] == ["a"]
    assert last_change(client) == (name, "changed: interval, limits", NAME, "127.0.0.1")
    assert client.api("DELETE", resource_path(name)).status == 204
    assert last_change(client) == (name, "removed", NAME, "127.0.0.1")
    for method in ("GET", "DELETE"):
        assert client.api(method, resource_path(name)).status == 404


UNREACHABLE = {"hostname": "127.0.0.1", "port": 1, "username": "u", "password": "p", "interval": 1, "fall": 1}


def test_changes_take_effect_at_once(service: Service, client: Client) -> None:
    """Added, it is polled and closes the gate; changed, it does not; removed, it is gone. Without a restart."""
    service.wait_status("/-/readyz", 200)
    client.api("POST", "resources", {"name": "one", **UNREACHABLE})
    reply = client.api("POST", "resources/one/check")
    assert (reply.status, reply.json["state"], reply.json["cause"]) == (200, "unhealthy", "unreachable")
    service.wait_status("/-/readyz", 503)
    client.api("PATCH", "resources/one", {"platform": "simulated", "mean_healthy": 100_000, "hostname": None,
                                          "username": None, "port": None})  # fmt: skip
    reply = client.api("POST", "resources/one/check")
    assert (reply.status, reply.json["state"]) == (200, "healthy")
    service.wait_status("/-/readyz", 200)
    shown = client.api("GET", "resources/one").json
    assert shown["state"] == "healthy" and shown["polled"]
    client.api("PATCH", "resources/one", {"platform": "unix", **UNREACHABLE})
    client.api("POST", "resources/one/check")
    service.wait_status("/-/readyz", 503)
    client.api("DELETE", "resources/one")
    service.wait_status("/-/readyz", 200)


@pytest.mark.long
def test_who_waits_for_hosts_that_hang_holds_up_nothing_else(service: Service, client: Client) -> None:
    """Pages, health and pushes, which close the gate where they come late, share the console's threads with them."""
    names = [f"hung{number}" for number in range(8)]
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(8) as pool:
        about = {"platform": "http", "url": f"https://127.0.0.1:{silent.getsockname()[1]}/", "critical": False,
                 "timeout": 5, "interval": 300}  # fmt: skip
        assert {client.api("POST", "resources", {"name": name, **about}).status for name in names} == {201}
        checks = [pool.submit(client.api, "POST", f"resources/{name}/check") for name in names]
        done, hanging = concurrent.futures.wait(checks, 4)
        assert client.api("GET", "resources/hung0").status == 200
        assert len(hanging) == healthchecker.HOSTS_ASKED, "each waits for the five seconds of its host"
        assert {(check.result().status, check.result().headers["retry-after"]) for check in done} == {(429, "2")}
        assert {check.result().status for check in hanging} == {200}
    for name in names:
        client.api("DELETE", f"resources/{name}")


def test_a_check_waits_for_the_settings_or_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has just changed them is not told what came of those before."""
    go, load = threading.Event(), healthchecker.load_targets
    with local_console(tmp_path, "  - {name: one, platform: simulated, mean_healthy: 100000}") as local:
        local.log_in()
        assert local.api("POST", "resources/one/check").status == 200
        monkeypatch.setattr(healthchecker, "load_targets", lambda *arguments: go.wait(120) and load(*arguments))
        monkeypatch.setattr(healthchecker, "MONITOR_INTERVAL", 0.01)
        try:
            assert local.api("POST", "resources", {"name": "two", **SIMULATED}).status == 201
            for name in ("one", "two"):
                reply = local.api("POST", f"resources/{name}/check")
                assert (reply.status, "not watched yet" in reply.body) == (504, True), reply
        finally:
            go.set()
        local.follow()
        assert local.api("POST", "resources/two/check").status == 200


def test_defaults_come_back(client: Client) -> None:
    """null stands for the default, in a new resource and in a change."""
    added = client.api("POST", "resources", {"name": "one", "port": None, "rise": 5, "fall": None, **SIMULATED})
    assert (added.status, added.json["rise"], added.json["fall"]) == (201, 5, 2)
    client.api("PATCH", "resources/one", {"limits": {"cpu_percent": {"warn": 50, "fail": 60}, "disk_percent": 70}})
    changed = client.api("PATCH", "resources/one", {"rise": None, "limits": {"cpu_percent": None}}).json
    assert changed["rise"] == 2 and changed["limits"]["cpu_percent"] is None
    assert changed["limits"]["disk_percent"] == {"warn": None, "fail": 70.0, "mounts": None}
    assert client.api("PATCH", "resources/one", {"limits": None}).json["limits"]["disk_percent"] is None


def test_change_that_changes_nothing_is_none(client: Client) -> None:
    client.api("POST", "resources", {"name": "one", **SIMULATED})
    before = everything(client)
    assert client.api("PATCH", "resources/one", {"interval": 1, "name": "one"}).status == 200
    assert client.api("PATCH", "resources/one", {}).status == 200
    assert everything(client) == before


def test_platform_that_changes_takes_what_has_no_meaning_there_along(client: Client) -> None:
    body = {"name": "one", "platform": "windows", "hostname": "host.example.com", "username": "u", "password": "p"}
    added = client.api("POST", "resources", {**body, "tls": False, "maintenance": None}).status
    assert added == 422     # maintenance is none of the settings
    assert client.api("POST", "resources", {**body, "tls": False, "critical": False}).json["port"] == 5985
    changed = client.api("PATCH", "resources/one", {"platform": "linux", "password": "p"})  # another port
    assert (changed.status, changed.json["tls"], changed.json["port"]) == (200, True, 22)


STATED = [
    ("PATCH", "resources/stated", {"interval": 5}),
    ("PATCH", "resources/stated", {}),
    ("DELETE", "resources/stated", None),
    ("POST", "resources/stated/test", {"interval": 5}),
]


@pytest.mark.parametrize(("method", "path", "body"), STATED)
def test_rows_of_the_inventory_are_read_only(
    service: Service, client: Client, method: str, path: str, body: Any
) -> None:
    before = everything(client)
    reply = client.api(method, path, body)
    text = service.inventory.read_text(encoding="utf-8")
    line = text[: text.index("name: stated")].count("\n") + 1
    assert (reply.status, reply.json["detail"]) == (409, f"stated stands at inventory.yaml:{line}:5; change it there")
    assert everything(client) == before
    assert client.api("GET", "resources/stated").json["place"] == f"inventory.yaml:{line}:5"


def test_names_are_unique(client: Client) -> None:
    reply = client.api("POST", "resources", {"name": "stated", **SIMULATED})
    assert (reply.status, reply.fields) == (409, {"name": "is taken"})
    bodies = [{"name": "one", "tags": [str(number)], **SIMULATED} for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(lambda body: client.api("POST", "resources", body).status, bodies))
    assert statuses == [201] + [409] * 7


def test_changes_at_the_same_time_are_all_kept(client: Client) -> None:
    client.api("POST", "resources", {"name": "one", **SIMULATED})
    bodies = [{"rise": 7}, {"fall": 8}, {"timeout": 9}, {"tags": ["t"]}, {"seed": 1}, {"retry_interval": 11}]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert set(pool.map(lambda body: client.api("PATCH", "resources/one", body).status, bodies)) == {200}
    shown = client.api("GET", "resources/one").json
    assert all(shown[name] == value for body in bodies for name, value in body.items())


# --- secrets ---
def stored(service: Service) -> list[str]:
    """Every sealed secret of the database, opened."""
    folder = service.inventory.parent
    store, vault = Store(database_in(folder)), Vault(folder / "keys")
    try:
        with store.reading() as session:
            rows = session.scalars(healthchecker.sqlalchemy.select(healthchecker.Resource)).all()
            return [vault.open(row.password, *binding("password", row)) for row in rows if row.password]
    finally:
        store.close()


def test_passwords_go_in_and_never_come_out(service: Service, client: Client) -> None:
    secret, body = "s3cret-<&>-ünï", {"name": "one", "hostname": "127.0.0.1", "port": 1, "critical": False}
    reply = client.api("POST", "resources", {**body, "username": "u", "password": secret})
    assert reply.status == 201 and reply.json["has_secret"] is True and stored(service) == [secret]
    bodies = [reply.body]
    for method, path, change in (
        ("GET", "resources", None),
        ("GET", "resources/one", None),
        ("PATCH", "resources/one", {"password": secret, "interval": 30}),
        ("PATCH", "resources/one", {"hostname": "127.0.0.2"}),
        ("PATCH", "resources/one", {"password": secret * 100}),
        ("POST", "resources/one/test", {"password": secret, "port": 2}),
        ("POST", "resources/one/check", None),
        ("GET", "events?limit=1000", None),
        ("GET", "openapi.json", None),
    ):
        bodies.append(client.api(method, path, change).body)
    assert not [text for text in [*bodies, service.output] if secret in text or "HC2." in text]
    assert not any("password" in view for view in client.api("GET", "resources").json)
    folder = service.inventory.parent
    raw = b"".join(path.read_bytes() for path in folder.glob("healthchecker.db*"))
    assert secret.encode() not in raw + str(execute(database_in(folder), "SELECT * FROM resource")).encode()


def test_secret_stays_with_hostname_and_username(service: Service, client: Client) -> None:
    body = {"name": "one", "hostname": "127.0.0.1", "port": 1, "username": "u", "password": "p", "critical": False}
    client.api("POST", "resources", body)
    message = {"password": "hostname, port or username changed: write the password again"}
    for change in ({"hostname": "127.0.0.2"}, {"username": "v"}, {"port": 2}):
        for method, path in (("PATCH", "resources/one"), ("POST", "resources/one/test")):
            reply = client.api(method, path, change)
            assert (reply.status, reply.fields) == (422, message)
    assert client.api("PATCH", "resources/one", {"hostname": "127.0.0.2", "password": "q"}).status == 200
    assert client.api("PATCH", "resources/one", {"interval": 30}).status == 200
    assert stored(service) == ["q"]
    change = {"platform": "simulated", "hostname": None, "username": None, "port": None}
    assert client.api("PATCH", "resources/one", change).status == 200
    assert stored(service) == []


def test_what_an_earlier_version_took_is_named_and_can_be_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A row whose hostname this version refuses: what is wrong is said, by check too, and what is given replaces it."""
    why = ("its row in the database cannot be read (hostname: with ß or ς is another host by IDNA 2003 and by 2008: "
           "write its xn-- form); change that, remove it, or restore the database")  # fmt: skip
    with local_console(tmp_path) as local:
        local.log_in_as(NAME, "token")
        added = {"name": "street", "platform": "tcp", "hostname": "192.0.2.1", "port": 9, "interval": 7}
        assert local.api("POST", "resources", added).status == 201
        with local.store.writing() as session:
            session.execute(Resource.__table__.update().values(hostname="stra\xdfe.example"))
            revise(session)
        assert local.api("GET", "resources/street").json["reason"] == why
        target = local.follow().context.monitor.pollers["street"].target
        assert target.fault == ("protocol", f"street: {why}")
        assert healthchecker.main(["--inventory", str(tmp_path / "inventory.yaml"), "check"]) == 0
        assert f"street: {why}" in caplog.messages
        assert local.ask("GET", "/-/resources/street/edit").status == 200
        refused = local.api("PATCH", "resources/street", {"interval": 8})
        assert refused.status == 422 and [one["field"] for one in refused.json["errors"]] == ["hostname"]
        changed = local.api("PATCH", "resources/street", {"hostname": "192.0.2.2"})
        assert changed.status == 200
        assert [changed.json[name] for name in added] == ["street", "tcp", "192.0.2.2", 9, 7]


@pytest.mark.parametrize("change", [
    {"certificate_fingerprint": "AB" * 32}, {"certificate_fingerprint": None}, {"tls": False},
])  # fmt: skip
def test_a_secret_stays_with_what_the_host_is_known_by(tmp_path: Path, change: dict[str, Any]) -> None:
    """Or whoever may change a pin would be shown a password that he was never told; a test alone would do."""
    with local_console(tmp_path) as local:
        local.log_in()
        body = {"name": "one", "platform": "windows", "hostname": "127.0.0.1", "port": 1, "username": "u",
                "password": "p", "critical": False, "certificate_fingerprint": "CD" * 32}  # fmt: skip
        assert local.api("POST", "resources", body).status == 201
        message = {"password": "the way to the host, or its key, changed: write the password again"}
        if "tls" in change:
            change |= {"certificate_fingerprint": None}
        for method, path in (("PATCH", "resources/one"), ("POST", "resources/one/test")):
            reply = local.api(method, path, change)
            assert (reply.status, reply.fields) == (422, message), reply.body
        again = {"certificate_fingerprint": "cd:" * 31 + "cd"}     # the same
        assert local.api("PATCH", "resources/one", again).status == 200
        assert local.api("PATCH", "resources/one", {**change, "password": "q"}).status == 200


def test_a_secret_stays_with_how_the_host_proves_itself(tmp_path: Path) -> None:
    """A certificate is verified, while the first key that is shown over SSH is taken for the host's."""
    with local_console(tmp_path) as local:
        local.log_in()
        body = {"name": "one", "platform": "windows", "hostname": "127.0.0.1", "port": 1, "username": "u",
                "password": "p", "critical": False}  # fmt: skip
        assert local.api("POST", "resources", body).status == 201
        change: dict[str, Any] = {"platform": "linux", "port": 1}
        for method, path in (("PATCH", "resources/one"), ("POST", "resources/one/test")):
            reply = local.api(method, path, change)
            assert (reply.status, list(reply.fields)) == (422, ["password"]), reply.body
        assert local.api("PATCH", "resources/one", {**change, "password": "q"}).status == 200
        assert local.api("PATCH", "resources/one", {"platform": "freebsd", "port": 1}).status == 200


def test_a_test_under_another_name(tmp_path: Path) -> None:
    """The secret is sealed for the name as it is; a save seals it anew."""
    with local_console(tmp_path) as local:
        local.log_in()
        body = {"name": "one", "hostname": "127.0.0.1", "port": 1, "username": "u", "password": "p", "critical": False}
        local.api("POST", "resources", body)
        reply = local.api("POST", "resources/one/test", {"name": "two"})
        assert (reply.status, reply.json["cause"]) == (200, "unreachable")


DEFAULTS = """
defaults: {interval: 7, rise: 3, tags: [all], limits: {cpu_percent: 80}, username: u, password: of the inventory}
"""


def test_defaults_of_the_inventory_count_here_too(tmp_path: Path) -> None:
    """All but its secrets, which would go to whatever host is named here; and null stands for them."""
    with local_console(tmp_path, "", DEFAULTS) as local:
        local.log_in_as(NAME, "token")

        def shown(method: str, path: str, body: dict[str, Any]) -> list[Any]:
            reply = local.api(method, path, body)
            assert reply.status < 300, reply
            limits = {name: limit["fail"] for name, limit in reply.json["limits"].items() if limit}
            return [*(reply.json[name] for name in ("interval", "rise", "tags", "username")), limits]

        body = {"name": "one", "hostname": "127.0.0.1", "port": 1, "critical": False}
        refused = local.api("POST", "resources", body)
        assert (refused.status, list(refused.fields)) == (422, ["password"])
        added = shown("POST", "resources", {**body, "password": "p", "rise": 1})
        assert added == [7, 1, ["all"], "u", {"cpu_percent": 80}]
        changed = shown("PATCH", "resources/one", {"interval": 60, "tags": [], "limits": {"memory_percent": 90}})
        assert changed == [60, 1, [], "u", {"cpu_percent": 80, "memory_percent": 90}]
        assert shown("PATCH", "resources/one", {"rise": 2}) == [60, 2, [], *changed[3:]], "what was stated stays"
        assert 'name="interval" value="60"' in local.ask("GET", "/-/resources/one/edit").body
        asked = dict.fromkeys(("interval", "rise", "tags", "limits"))
        assert shown("PATCH", "resources/one", asked) == [7, 3, *added[2:]]


def test_the_login_of_machines_is_none_of_a_url(tmp_path: Path) -> None:
    """A token would be the password of their user; what is stated here stays, also where it is the same."""
    with local_console(tmp_path, "", DEFAULTS) as local:
        local.log_in_as(NAME, "token")

        def username(method: str, path: str, **body: Any) -> Any:
            reply = local.api(method, path, body)
            assert reply.status < 300, reply
            return reply.json["username"]

        url = {"platform": "http", "url": "http://127.0.0.1:1/", "critical": False}
        assert username("POST", "resources", name="one", **url, password="token") is None
        assert username("PATCH", "resources/one", rise=2) is None
        assert username("PATCH", "resources/one", username="u", password="p") == "u"
        assert username("PATCH", "resources/one", rise=1) == "u"
        machine = {"platform": "linux", "hostname": "127.0.0.1", "port": 1, "critical": False}
        assert username("POST", "resources", name="two", **machine, password="p") == "u"
        assert username("PATCH", "resources/two", port=None, hostname=None, **url, password="token") is None


def test_headers_of_the_inventory_stay_there(tmp_path: Path) -> None:
    """Who names a URL here is sent none of its keys."""
    stated = "  - {name: shop, platform: http, url: 'http://127.0.0.1:1/'}\n"
    with local_console(tmp_path, stated, "\ndefaults: {headers: {x-api-key: of the inventory}}\n") as local:
        local.log_in_as(NAME, "token")
        assert local.api("GET", "resources/shop").json["headers"] == {"x-api-key": "of the inventory"}
        body = {"name": "one", "platform": "http", "url": "http://127.0.0.1:1/", "critical": False}
        assert local.api("POST", "resources", body).json["headers"] == {}
        assert local.api("PATCH", "resources/one", {"headers": {"a": "b"}}).json["headers"] == {"a": "b"}
        assert local.api("PATCH", "resources/one", {"headers": None}).json["headers"] == {}


def test_defaults_that_were_taken_over_later(tmp_path: Path) -> None:
    """By whichever process: they count for what is added from then on, and for nothing that was stored before."""
    with local_console(tmp_path, "", "\ndefaults: {interval: 7}\n") as local:
        local.log_in_as(NAME, "token")
        origin = {"headers": {"Origin": "http://localhost"}}
        body = {"hostname": "192.0.2.1", "platform": "simulated"}
        assert local.api("POST", "resources", {"name": "one", **body}).status == 201
        before = local.api("GET", "resources/one").json
        later = "\ndefaults: {interval: 9, limits: {disk_percent: 90}}\n"
        inventory = healthchecker.load_inventory(write_inventory(tmp_path, "", later))
        with local.store.writing() as session:
            healthchecker.import_inventory(session, inventory, local.context.vault)
        assert local.api("POST", "resources", {"name": "two", **body}).status == 201
        two = local.api("GET", "resources/two").json
        assert (two["interval"], two["limits"]["disk_percent"]["fail"]) == (9, 90)
        reply = local.api("PATCH", "resources/one", {"rise": 3})
        kept = {name: before[name] for name in ("interval", "limits", "timeout")}
        assert {name: reply.json[name] for name in kept} == kept and reply.json["rise"] == 3
        assert local.api("PATCH", "resources/one", {"rise": None, "interval": None}, **origin).json["interval"] == 9


@pytest.mark.parametrize("host", ["same", "other"])
def test_what_the_inventory_had_can_be_added_here(tmp_path: Path, host: str) -> None:
    """The same host comes back with its history, another one of that name begins anew."""
    with local_console(tmp_path, "  - {name: one, hostname: same, platform: simulated}\n") as local:
        local.log_in_as(NAME, "token")
        with local.store.writing() as session:
            row = find_resource(session, "one")
            row.host_key, poll = "a key", {"reason": "long ago", "poll": "h", "standing": "h", "counts": 1}
            at = time.time() - 60  # what is older than `retention` goes with the recorder's first tidying
            session.execute(healthchecker.SAMPLES.insert().values(resource_id=row.id, at=at, **poll))
            inventory = healthchecker.load_inventory(write_inventory(tmp_path))
            healthchecker.import_inventory(session, inventory, local.context.vault)
        assert local.api("GET", "resources/one").status == 404
        body = {"name": "one", "hostname": host, "platform": "simulated"}
        assert local.api("POST", "resources", body).status == 201
        assert local.api("POST", "resources", body).status == 409
        shown = local.api("GET", "resources/one").json
        assert (shown["origin"], shown["trusted_key"]) == ("api", "a key" if host == "same" else None)
        with local.store.reading() as session:
            past = healthchecker.samples(session, find_resource(session, "one").id, local.clock.now)
        assert ("long ago" in [poll.reason for poll in past]) is (host == "same")


def test_secret_of_another_row_is_none(client: Client, service: Service) -> None:
    """A sealed secret that stood elsewhere does not open here."""
    row = ("password", "other", "127.0.0.1", "u", "1")
    token = Vault(service.inventory.parent / "keys").seal("p", *row)
    body = {"hostname": "127.0.0.1", "port": 1, "username": "u", "password": token, "critical": False}
    reply = client.api("POST", "resources", {"name": "one", **body})
    assert reply.status == 422 and reply.fields.keys() == {"password"} and token not in reply.body
    assert client.api("POST", "resources", {"name": "other", **body}).status == 201


# --- a real host ---
@pytest.fixture
def host(sshd: Sshd | ParamikoSshd, password: str) -> dict[str, Any]:
    """The settings of the SSH server of this run."""
    return {"name": "host", "hostname": sshd.address, "port": sshd.port, "platform": "unix",
            "username": sshd.username, "password": password, "retry_interval": 1}  # fmt: skip


def test_connection_is_tested_before_it_is_saved(client: Client, host: dict[str, Any]) -> None:
    before = everything(client)
    found = client.api("POST", "test", host)
    assert found.status == 200, found
    assert found.json["state"] == "healthy" and found.json["host_key"].startswith("ssh-")
    for number in range(6):  # a new password each time, of the same user: the account is not locked by it
        tried = client.api("POST", "test", {**host, "password": f"wrong{number}"}).json
        assert (tried["cause"], "not tried" in tried["reason"]) == ("auth", number > 3), (number, tried)
    assert client.api("POST", "test", {**host, "port": 1}).json["cause"] == "unreachable"
    assert everything(client) == before
    assert client.api("POST", "resources", host).status == 201
    assert client.api("POST", "resources/host/check").json["state"] == "healthy"
    changed = client.api("POST", "resources/host/test", {"checks": [{"name": "never", "command": "exit 1"}]})
    assert changed.json["cause"] == "check"     # with the stored password
    assert client.api("GET", "resources/host").json["checks"] == []


def test_changed_host_key_is_trusted(client: Client, service: Service, host: dict[str, Any]) -> None:
    client.api("POST", "resources", {**host, "critical": False})
    assert client.api("POST", "resources/host/check").json["state"] == "healthy"
    key = client.api("GET", "resources/host").json["trusted_key"]
    other = f"{key.split()[0]} SHA256:{'A' * 43}"
    store = Store(database_in(service.inventory.parent))
    with store.writing() as session:
        find_resource(session, "host").host_key = other
        revise(session)
    store.close()
    assert client.api("POST", "resources/host/check").json["cause"] == "host_key"
    refused = client.api("POST", "resources/host/trust", {"host_key": other})
    assert (refused.status, refused.fields) == (409, {"host_key": "is not the one that the host shows"})
    assert key in refused.json["detail"]
    assert client.api("GET", "resources/host").json["trusted_key"] == other
    trusted = client.api("POST", "resources/host/trust", {"host_key": key})
    assert (trusted.status, trusted.json["trusted_key"]) == (200, key)
    assert last_change(client) == ("host", f"trusted {key}, before {other}", NAME, "127.0.0.1")
    assert client.api("POST", "resources/host/check").json["state"] == "healthy"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (SIMULATED, "one has no host key"),
        ({"hostname": "127.0.0.1", "port": 1, "username": "u", "password": "p"}, "127.0.0.1 port 1: "),
    ],
)
def test_host_without_a_key_to_trust(client: Client, body: dict[str, Any], detail: str) -> None:
    client.api("POST", "resources", {"name": "one", "critical": False, **body})
    reply = client.api("POST", "resources/one/trust", {})
    assert reply.status == 409 and reply.json["detail"].startswith(detail)


# --- maintenance ---
def at(seconds: float) -> str:
    return (datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)).isoformat()


def test_maintenance_opens_the_gate(service: Service, client: Client) -> None:
    client.api("POST", "resources", {"name": "down", **UNREACHABLE})
    client.api("POST", "resources/down/check")
    service.wait_status("/-/readyz", 503)
    until = at(3600)[:19] + "+00:00"
    reply = client.api("POST", "resources/down/maintenance", {"until": until, "reason": "new disk"})
    assert (reply.status, reply.json["maintenance"]["reason"]) == (200, "new disk")
    shown = datetime.datetime.fromisoformat(until).astimezone().isoformat(" ")
    told = "down", f"in maintenance until {shown}: new disk", NAME, "127.0.0.1"
    assert last_change(client, "maintenance") == told
    service.wait_status("/-/readyz", 200)
    assert client.api("GET", "resources/down").json["state"] == "unhealthy"
    assert client.api("DELETE", "resources/down/maintenance").status == 204
    assert last_change(client, "maintenance")[:2] == ("down", "maintenance ended")
    service.wait_status("/-/readyz", 503)
    assert client.api("DELETE", "resources/down/maintenance").status == 204


def test_maintenance_of_a_row_of_the_inventory(client: Client) -> None:
    assert client.api("POST", "resources/stated/maintenance", {"until": at(60), "reason": "x"}).status == 200
    assert client.api("GET", "resources/stated").json["maintenance"]["reason"] == "x"
    assert client.api("DELETE", "resources/stated/maintenance").status == 204
    assert client.api("GET", "resources/stated").json["maintenance"] is None


# --- what is listed ---
def test_events_are_listed_newest_first_and_by_pages(client: Client) -> None:
    for number in range(5):
        client.api("POST", "resources", {"name": f"one {number}", **SIMULATED})
    found = client.api("GET", "events?kind=change&limit=3").json
    assert [event["resource"] for event in found] == ["one 4", "one 3", "one 2"]
    found = client.api("GET", f"events?kind=change&limit=2&before={found[-1]['id']}").json
    assert [event["resource"] for event in found] == ["one 1", "one 0"]
    assert [event["text"] for event in client.api("GET", "events?resource=one+3&kind=change").json] == ["added"]
    assert client.api("GET", "events?resource=nothing").json == []
    wait_for(lambda: client.api("GET", "events?resource=one+1&kind=state").json)


def test_samples_are_the_last_polls(client: Client) -> None:
    for _ in range(3):
        assert client.api("POST", "resources/local/check").status == 200
    found = client.api("GET", "resources/local/samples").json
    assert len(found) >= 3 and sorted(poll["at"] for poll in found) == [poll["at"] for poll in found]
    assert {(poll["state"], poll["standing"]) for poll in found} == {("healthy", "healthy")}
    assert 0 < found[-1]["readings"]["memory_percent"] <= 100
    assert [poll["at"] for poll in client.api("GET", "resources/local/samples?limit=1").json] == [found[-1]["at"]]
    assert client.api("GET", f"resources/local/samples?since={at(60).replace('+', '%2B')}").json == []


def test_health_for_users_names_the_resources(service: Service, client: Client) -> None:
    wait_for(lambda: client.api("GET", "resources/shaky").json["state"] == "healthy")
    reply = client.ask("GET", "/-/health")
    assert reply.headers["content-type"] == "application/health+json"
    assert reply.json["checks"]["shaky:state"][0]["status"] == "pass"
    assert reply.json["releaseId"] == healthchecker.VERSION
    assert service.wait_line(f"HealthChecker {healthchecker.VERSION}").endswith(f" {healthchecker.VERSION}\n")
    anonymous = service.get("/-/health")
    assert "checks" not in anonymous.body and anonymous.headers["content-type"] == "application/health+json"
    stranger = Client(*service.console)
    stranger.token = "expired"
    assert "checks" not in stranger.ask("GET", "/-/health").json


# --- users ---
def test_life_of_a_user(client: Client, service: Service) -> None:
    added = client.api("POST", "users", {"name": "alice", "password": PASSWORD})
    assert (added.status, added.json) == (201, {"name": "alice", "role": "viewer", "initial": False})
    assert last_change(client) == ("", "user alice added as viewer", NAME, "127.0.0.1")
    assert client.api("POST", "users", {"name": "alice", "password": PASSWORD}).status == 409
    alice = Client(*service.console).log_in("alice")
    assert alice.api("GET", "users").status == 403
    assert client.api("PATCH", "users/alice", {"role": "admin"}).json["role"] == "admin"
    alice.token = ""
    assert alice.log_in("alice").api("GET", "users").status == 200
    assert client.api("PATCH", "users/alice", {"password": "another fine password"}).status == 200
    assert alice.api("GET", "users").status == 401
    assert client.api("DELETE", "users/alice").status == 204
    assert client.api("DELETE", "users/alice").status == client.api("PATCH", "users/alice", {}).status == 404


def test_last_admin_stays(client: Client) -> None:
    client.api("POST", "users", {"name": "bob", "password": PASSWORD, "role": "viewer"})
    for method, body in (("DELETE", None), ("PATCH", {"role": "viewer"})):
        reply = client.api(method, f"users/{NAME}", body)
        assert (reply.status, reply.json["detail"]) == (409, f"{NAME} is the last admin; make another one first")
    assert [user["role"] for user in client.api("GET", "users").json if user["name"] == NAME] == ["admin"]


def test_two_admins_cannot_remove_each_other_at_once(client: Client, service: Service) -> None:
    client.api("POST", "users", {"name": "carol", "password": PASSWORD, "role": "admin"})
    carol = Client(*service.console).log_in("carol")
    start, statuses = threading.Barrier(2, timeout=60), []

    def remove(by: Client, name: str) -> None:
        start.wait()
        statuses.append(by.api("PATCH", f"users/{name}", {"role": "viewer"}).status)

    threads = [threading.Thread(target=remove, args=pair) for pair in ((client, "carol"), (carol, NAME))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(statuses) in ([200, 401], [200, 403], [200, 409])
    left = client if client.api("GET", "users").status == 200 else carol
    assert left.api("PATCH", f"users/{NAME}", {"role": "admin"}).status == 200
    client.log_in()


# --- bad input ---
HOST = {"hostname": "127.0.0.1", "username": "u", "password": "p"}
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name"),
    ({"name": "a/b"}, "name"),
    ({"name": ".."}, "name"),
    ({"name": "x" * 254}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"name": " a"}, "name"),
    ({"name": 5}, "name"),
    ({"name": ["a"]}, "name"),
    ({"hostname": "-oProxyCommand=x"}, "hostname"),
    ({"hostname": "a b"}, "hostname"),
    ({"hostname": "a;b"}, "hostname"),
    ({"hostname": 1}, "hostname"),
    ({"hostname": None}, "hostname"),
    ({"platform": "amiga"}, "platform"),
    ({"platform": "posix"}, "platform"),
    ({"platform": []}, "platform"),
    ({"port": 0}, "port"),
    ({"port": 65536}, "port"),
    ({"port": "22"}, "port"),
    ({"port": 22.5}, "port"),
    ({"port": True}, "port"),
    ({"username": ""}, "username"),
    ({"username": "a\x00b"}, "username"),
    ({"username": None}, "resource"),
    ({"password": ""}, "password"),
    ({"password": "x" * 1025}, "password"),
    ({"password": 5}, "password"),
    ({"password": None}, "password"),
    ({"password_env": "PATH", "password": None}, "password_env"),
    ({"password_file": "no-such-file", "password": None}, "password_file"),
    ({"password_file": "inventory.yaml"}, "password_file"),
    ({"key_file": "inventory.yaml", "password": None}, "key_file"),
    ({"key_file": "a\x00b", "password": None}, "key_file"),
    ({"key_file": "~no-such-user/key", "password": None}, "key_file"),
    ({"key_file": 5, "password": None}, "key_file"),
    ({"key_passphrase": "p"}, "key_passphrase"),
    ({"key_passphrase_env": "PATH"}, "key_passphrase_env"),
    ({"key_passphrase_file": "inventory.yaml"}, "key_passphrase_file"),
    ({"ca_file": "inventory.yaml", "platform": "windows"}, "ca_file"),
    ({"certificate_file": "inventory.yaml", "platform": "windows"}, "certificate_file"),
    ({"platform": "local"}, "platform"),
    ({"host_key": "SHA256:x"}, "host_key"),
    ({"tls": False}, "tls"),
    ({"tls": "yes", "platform": "windows"}, "tls"),
    ({"auth": "magic", "platform": "windows"}, "auth"),
    ({"auth": "basic", "tls": False, "platform": "windows"}, "resource"),
    ({"certificate_fingerprint": "00", "platform": "windows"}, "certificate_fingerprint"),
    ({"interval": 0.5}, "interval"),
    ({"interval": 604_801}, "interval"),
    ({"interval": "5"}, "interval"),
    ({"interval": True}, "interval"),
    ({"interval": 10**400}, "interval"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": -1}, "timeout"),
    ({"retry_interval": []}, "retry_interval"),
    ({"rise": 0}, "rise"),
    ({"rise": 1.5}, "rise"),
    ({"fall": 1001}, "fall"),
    ({"critical": "no"}, "critical"),
    ({"critical": 0}, "critical"),
    ({"tags": "a"}, "tags"),
    ({"tags": [""]}, "tags.0"),
    ({"tags": ["a", 5]}, "tags.1"),
    ({"tags": {"a": 1}}, "tags"),
    ({"limits": []}, "limits"),
    ({"limits": {"cpu": 5}}, "limits.cpu"),
    ({"limits": {"cpu_percent": 101}}, "limits.cpu_percent.fail"),
    ({"limits": {"cpu_percent": "90"}}, "limits.cpu_percent.fail"),
    ({"limits": {"cpu_percent": {"warn": 90, "fail": 80}}}, "limits.cpu_percent"),
    ({"limits": {"cpu_percent": {}}}, "limits.cpu_percent"),
    ({"limits": {"load_per_cpu": 0}}, "limits.load_per_cpu.fail"),
    ({"services": ["-x"]}, "services.0"),
    ({"services": ["a/b"]}, "services.0"),
    ({"checks": [{"name": "a"}]}, "checks.0.command"),
    ({"checks": [{"name": "a", "command": ""}]}, "checks.0.command"),
    ({"checks": [{"name": "a", "command": "x", "timeout": 0}]}, "checks.0.timeout"),
    ({"checks": [{"name": "a", "command": "x"}] * 2}, "resource"),
    ({"checks": [{"name": "a", "command": "x", "shell": "sh"}]}, "checks.0.shell"),
    ({"checks": [5]}, "checks.0"),
    ({"mean_healthy": 5}, "mean_healthy"),
    ({"seed": "x", "platform": "simulated", "username": None, "password": None}, "seed"),
    ({"origin": "inventory"}, "origin"),
    ({"id": 1}, "id"),
]


@pytest.mark.parametrize(("bad", "field"), BAD_SETTINGS, ids=[str(list(bad.items()))[:60] for bad, _ in BAD_SETTINGS])
def test_bad_settings(client: Client, bad: dict[str, Any], field: str) -> None:
    """422 with the field's name, alike where a resource is added and tested; nothing is changed."""
    before = everything(client)
    body = {"name": "one", **HOST, **bad}
    for path in ("resources", "test"):
        reply = client.api("POST", path, body)
        assert reply.status == 422 and field in reply.fields, (path, reply)
    assert everything(client) == before


def test_bad_changes(client: Client) -> None:
    """The same where a resource is changed."""
    client.api("POST", "resources", {"name": "one", "critical": False, "port": 1, **HOST})
    before = everything(client)
    for bad, field in BAD_SETTINGS:
        if field not in ("name", "password") and None not in bad.values() and "password_file" not in bad:
            reply = client.api("PATCH", "resources/one", bad)
            assert reply.status == 422 and field in reply.fields, (bad, reply)
            assert everything(client) == before, bad


OLD = [{"platform": "local"}, {"platform": "unix", "username": "u", "key_file": "key"}]


@pytest.mark.parametrize("old", OLD, ids=str)
def test_row_of_an_older_version_that_reads_files_here(service: Service, client: Client, old: dict[str, Any]) -> None:
    """It keeps working; a change must take away what is of the inventory alone."""
    settings = ResourceSettings.model_validate({"name": "old", "hostname": "127.0.0.1", "critical": False, **old})
    with contextlib.closing(Store(database_in(service.inventory.parent))) as store, store.writing() as session:
        row = Resource(name="old", origin="api")
        update_row(row, settings, Vault(service.inventory.parent / "keys"))
        session.add(row)
        revise(session)
    field = "key_file" if "key_file" in old else "platform"
    assert client.api("POST", "resources/old/check").status == 200
    for method, path in (("PATCH", "resources/old"), ("POST", "resources/old/test")):
        reply = client.api(method, path, {"interval": 30})
        assert (reply.status, reply.fields.keys()) == (422, {field})
    change = {"platform": "unix", "key_file": None, "username": "u", "password": "p", "port": 1}
    assert client.api("PATCH", "resources/old", change).status == 200


def test_an_endpoint_is_no_setting_of_the_inventory_alone(client: Client) -> None:
    """On UNIX it is by what it needs: a key, which is a file here."""
    login = {"hostname": "127.0.0.1", "port": 1, "username": "u", "password": "p", "critical": False, "endpoint": True}
    reply = client.api("POST", "resources", {"name": "jea", "platform": "linux", **login})
    assert (reply.status, reply.fields.keys()) == (422, {"password"}) and "endpoint needs key_file" in reply.body
    assert client.api("POST", "resources", {"name": "jea", "platform": "windows", **login}).status == 201
    assert client.api("GET", "resources/jea").json["endpoint"] is True


def test_name_can_be_changed(client: Client) -> None:
    """With the rest or not at all."""
    client.api("POST", "resources", {"name": "one", **SIMULATED})
    client.api("POST", "resources", {"name": "taken", **SIMULATED})
    reply = client.api("PATCH", "resources/one", {"name": "taken", "rise": 3})
    assert reply.status == 409 and reply.fields.keys() == {"name"}
    assert client.api("PATCH", "resources/one", {"name": "two", "rise": -3}).status == 422
    assert client.api("GET", "resources/one").json["rise"] == 2
    assert client.api("PATCH", "resources/one", {"name": "two", "rise": 3}).json["name"] == "two"
    assert client.api("GET", "resources/one").status == 404 and client.api("GET", "resources/two").json["rise"] == 3


BAD_BODIES: list[tuple[str, str, Any, str]] = [
    ("POST", "login", {}, "password"),
    ("POST", "login", {"username": NAME, "password": 5}, "password"),
    ("POST", "login", {"username": NAME, "password": "x" * 1025}, "password"),
    ("POST", "login", {"username": "x" * 254, "password": "x"}, "username"),
    ("POST", "login", {"username": None, "password": "x"}, "username"),
    ("POST", "login", {"username": NAME, "password": "x", "next": "/"}, "next"),
    ("POST", "password", {"new": "another fine password"}, "current"),
    ("POST", "users", {"name": "a"}, "password"),
    ("POST", "users", {"password": PASSWORD}, "name"),
    ("POST", "users", {"name": "a/b", "password": PASSWORD}, "name"),
    ("POST", "users", {"name": "a", "password": PASSWORD, "role": "root"}, "role"),
    ("POST", "users", {"name": "a", "password": PASSWORD, "initial": True}, "initial"),
    ("PATCH", f"users/{NAME}", {"role": "root"}, "role"),
    ("PATCH", f"users/{NAME}", {"name": "a"}, "name"),
    ("PATCH", f"users/{NAME}", {"password_hash": "x"}, "password_hash"),
    ("POST", "resources/stated/maintenance", {"reason": "x"}, "until"),
    ("POST", "resources/stated/maintenance", {"until": "2020-01-01T00:00:00Z", "reason": "x"}, "until"),
    ("POST", "resources/stated/maintenance", {"until": "2099-12-31T23:59:60Z", "reason": "x"}, "until"),
    ("POST", "resources/stated/maintenance", {"until": "9999-12-31T23:59:59-14:00", "reason": "x"}, "until"),
    ("POST", "resources/stated/maintenance", {"until": "0001-01-01T00:00:00+14:00", "reason": "x"}, "until"),
    ("POST", "resources/stated/maintenance", {"until": "2099-01-01T00:00:00", "reason": "x"}, "until"),
    ("POST", "resources/stated/maintenance", {"until": "tomorrow", "reason": "x"}, "until"),
    ("POST", "resources/stated/maintenance", {"until": 4_000_000_000, "reason": "x"}, "until"),
    ("POST", "resources/stated/maintenance", {"until": "2099-01-01T00:00:00Z", "reason": ""}, "reason"),
    ("POST", "resources/stated/maintenance", {"until": "2099-01-01T00:00:00Z", "reason": "a\nb"}, "reason"),
    ("POST", "resources/stated/trust", {"host_key": 5}, "host_key"),
    ("POST", "resources/stated/trust", {"key": "x"}, "key"),
]


@pytest.mark.parametrize(("method", "path", "body", "field"), BAD_BODIES)
def test_bad_body(client: Client, method: str, path: str, body: Any, field: str) -> None:
    before = everything(client)
    reply = client.api(method, path, body)
    assert reply.status == 422 and field in reply.fields, reply
    assert everything(client) == before


BAD_QUERIES = [
    ("events?limit=0", "limit"),
    ("events?limit=1001", "limit"),
    ("events?limit=x", "limit"),
    ("events?before=-1", "before"),
    ("events?before=9223372036854775808", "before"),
    ("events?after=1", "after"),
    ("resources/stated/samples?limit=-1", "limit"),
    ("resources/stated/samples?since=yesterday", "since"),
    ("resources/stated/samples?since=2026-01-01T00:00:00", "since"),
]


@pytest.mark.parametrize(("path", "field"), BAD_QUERIES)
def test_bad_query(client: Client, path: str, field: str) -> None:
    reply = client.api("GET", path)
    assert reply.status == 422 and reply.fields.keys() == {field}


RAW = [
    b"{",
    b"[]",
    b'"text"',
    b"null",
    b"5",
    b'{"rise": NaN}',
    b'{"rise": Infinity}',
    b'{"name": "\xff"}',
    b'{"name": "\\ud800"}',
    b"\xef\xbb\xbf{}",
    b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    b'{"rise": 1} trailing',
    b"\x00",
]


@pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if one.body and one.method != "GET"], ids=lambda one: one.key
)
def test_body_that_is_no_json_object(client: Client, operation: Any) -> None:
    before = everything(client)
    path = operation.path.replace("resources/<name>", "resources/stated").replace("<name>", NAME)
    for raw in RAW:
        reply = client.ask(operation.method, path, raw, {"Content-Type": "application/json"})
        assert (reply.status, reply.headers["content-type"]) == (400, "application/problem+json"), raw
    assert everything(client) == before


def test_bodies_that_are_not_read(client: Client) -> None:
    before = everything(client)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        body = '{"name": "a", "password": "long enough for it"}'
        reply = client.ask("POST", "/-/api/users", body, {"Content-Type": kind})
        assert reply.status == 415
    large = '{"name": "a", "password": "' + "x" * (1 << 18) + '"}'
    assert client.ask("POST", "/-/api/users", large, {"Content-Type": "application/json"}).status == 413
    assert everything(client) == before


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "nothing", 404, None),
        ("GET", "", 404, None),
        ("GET", "resources/none", 404, None),
        ("PATCH", "resources/none", 404, None),
        ("DELETE", "resources/none", 404, None),
        ("GET", "resources/none/samples", 404, None),
        ("POST", "resources/none/check", 404, None),
        ("POST", "resources/none/trust", 404, None),
        ("DELETE", "resources/none/maintenance", 404, None),
        ("PUT", "resources/stated", 405, "DELETE, GET, HEAD, PATCH"),
        ("OPTIONS", "resources", 405, "GET, HEAD, POST"),
        ("TRACE", "resources", 405, "GET, HEAD, POST"),
        ("GET", "login", 405, "POST"),
        ("DELETE", "resources", 405, "GET, HEAD, POST"),
    ],
)
def test_what_is_not_there(client: Client, method: str, path: str, status: int, allow: str | None) -> None:
    reply = client.api(method, path)
    assert (reply.status, reply.headers.get("allow")) == (status, allow)
    assert reply.json["status"] == status and reply.json["title"] and reply.json["type"] == "about:blank"


# --- the description ---
def test_description_names_every_operation(client: Client) -> None:
    described = client.api("GET", "openapi.json").json
    named = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert named == {(one.method, one.path.replace("<", "{").replace(">", "}")) for one in OPERATIONS}
    settings = described["components"]["schemas"]["ResourceSettings"]["properties"]
    assert settings.keys() == ResourceSettings.model_fields.keys() - INVENTORY_ONLY
    assert "password" not in described["components"]["schemas"]["ResourceView"]["properties"]


@functools.cache
def described() -> Any:
    """What schemathesis makes of the description. Imported here: each process of a test run reads this file."""
    return importlib.import_module("schemathesis").openapi.from_dict(healthchecker.openapi())


def checks_of(mode: str) -> list[Any]:
    """What schemathesis looks for in an answer."""
    schemathesis = importlib.import_module("schemathesis")
    names = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    names += ["negative_data_rejection"] if mode == "NEGATIVE" else []
    conformance = [getattr(schemathesis.specs.openapi.checks, name) for name in names]
    return [schemathesis.checks.not_a_server_error, *conformance]


def tamed(case: Any) -> Any:
    """The case, as far as it can be sent here: no commands of chance are run and no hosts of chance are asked."""
    if isinstance(case.body, dict) and case.path.split("/")[-1] != "users" and "until" not in case.body:
        platform = case.body.get("platform", None)
        if platform is None or platform in SELECTABLE:
            case.body["platform"] = "simulated"
    return case


@pytest.mark.long
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"], ids=["as described", "otherwise"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=[operation.key for operation in OPERATIONS])
def test_answers_agree_with_the_description(client: Client, operation: Any, mode: str) -> None:
    """Right or wrong, whatever is sent gets an answer that the description knows; what it does not allow is refused."""
    client.api("POST", "resources", {"name": "one", **SIMULATED})
    path = operation.path.replace("<", "{").replace(">", "}")
    generation = importlib.import_module("schemathesis").GenerationMode[mode]
    cases = described()[path][operation.method].as_strategy(generation_mode=generation)
    checks = checks_of(mode)

    @hypothesis.settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases, known=hypothesis.strategies.booleans())
    def ask(case: Any, known: bool) -> None:
        if known and "name" in (case.path_parameters or {}) and operation.method != "DELETE":
            case.path_parameters["name"] = "one" if "resources" in path else "nobody"
        headers = {"Authorization": f"Bearer {client.token}"} if operation.needs else {}
        response = tamed(case).call(base_url=client.origin, headers=headers)
        case.validate_response(response, checks=checks)

    ask()


def test_command_line_and_api_work_together(
    service: Service, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resource of the API is left alone by the next start, and its name in the file is a fault."""
    client.api("POST", "resources", {"name": "one", **SIMULATED})
    assert healthchecker.main(["--inventory", str(service.inventory), "check"]) == 0
    assert "0 added, 0 changed, 0 removed" in capsys.readouterr().out
    clash = service.inventory.with_name("clash.yaml")
    text = service.inventory.read_text(encoding="utf-8")
    clash.write_text(f"{text}  - {{name: one, platform: simulated}}\n", encoding="utf-8")
    assert healthchecker.main(["--inventory", str(clash), "check"]) == 2
    place = f"clash.yaml:{len(text.splitlines()) + 1}:5"
    assert f"{place}: one: was added through the API already" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(("name", "change"), [
    ("db1", {"proxy_jump": "hop"}), ("db1", {"host_key": "SHA256:" + "A" * 43}), ("win", {"tls": False, "port": 5986}),
    ("win", {"certificate_fingerprint": ":".join(["AA"] * 32)}),
], ids=["bastion", "host key", "no TLS", "certificate"])  # fmt: skip
def test_no_stored_password_goes_another_way(tmp_path: Path, name: str, change: dict[str, Any], damaged: bool) -> None:
    """Nor that of a row which this version cannot read: what way it had is not known."""
    login = {"username": "u", "password": "0123456789abcdef"}
    with local_console(tmp_path) as local:
        local.log_in_as(NAME, "token")
        for each, platform in (("hop", "linux"), ("db1", "linux"), ("win", "windows")):
            made = {"name": each, "platform": platform, "hostname": "192.0.2.1", **login}
            assert local.api("POST", "resources", made).status == 201
        if damaged:
            with local.store.writing() as session:
                session.execute(sqlalchemy.update(Resource).values(interval=0).where(Resource.name == name))
        answer = local.api("PATCH", f"resources/{name}", {"interval": 8, **change})
        assert answer.status == 422 and "write the password again" in str(answer.json)
        assert local.api("PATCH", f"resources/{name}", {"interval": 8, **change, **login}).status == 200
