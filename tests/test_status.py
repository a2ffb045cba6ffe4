"""What the service says of itself: the command `status`, and the status page for a wall or for anybody."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PATIENCE, Faults, chromium
from conftest import wait_for
from console import Client, Local, Reply, console, local_console, make_user
from service import Service, prepared_keys, run, write_inventory

import healthchecker
from healthchecker import (
    CONTENT_SECURITY_POLICY,
    STANDING,
    InventoryError,
    Setting,
    SqliteFile,
    load_inventory,
    sqlalchemy,
)

TOKEN = "a-word-for-the-wall"
OFTEN = "interval: 1, retry_interval: 1, fall: 1, rise: 1"
WELL = f"  - {{name: well, platform: simulated, mean_healthy: 1000000, seed: 1, public_name: Engine room, {OFTEN}}}\n"
ASIDE = (
    f"  - {{name: aside.example.com, platform: tcp, hostname: 127.0.0.1, port: 9, {OFTEN}}}\n"
)
SICK = f"  - {{name: 'sick|=1', platform: tcp, hostname: 127.0.0.1, port: 9, {OFTEN}}}\n"
GROUPS = "groups: [{name: shop, members: [well]}]\nroutes: {/reports: [aside.example.com]}\n"


def status(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and the line."""
    capsys.readouterr()
    code = healthchecker.main(["--inventory", str(folder / "inventory.yaml"), "status", *words])
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.count("\n") == 1
    return code, shown.out.strip()


@pytest.mark.of_files
def test_little_of_the_database_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it may be gigabytes, and a plug-in asks every few seconds."""
    wholes, read = list[bool](), healthchecker.read_schema

    def noted(path: Path, *, whole: bool, mode: str = "ro") -> tuple[set[tuple[str, str]], int, int, bool]:
        wholes.append(whole)
        return read(path, whole=whole, mode=mode)

    with Service(write_inventory(tmp_path, WELL)) as service:
        service.wait_status("/-/readyz", 200)
        monkeypatch.setattr(healthchecker, "read_schema", noted)
        wait_for(lambda: status(tmp_path, capsys)[0] == 0)
        for words in (["gate"], ["maintenance", "list"], ["user", "list"], ["user", "token", "list"]):
            assert healthchecker.main(["--inventory", str(tmp_path / "inventory.yaml"), *words]) == 0, words
    assert wholes and not any(wholes)


def numbers(line: str) -> dict[str, int]:
    """Performance data, as Nagios reads them."""
    _, bar, text = line.partition(" | ")
    assert bar and "|" not in text
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)(?: |$)", text)}


def has_found(folder: Path, capsys: pytest.CaptureFixture[str], code: int, **found: int) -> bool:
    """Whether the service says so: what it wrote between two first results has the same code."""
    now, line = status(folder, capsys)
    return now == code and numbers(line).items() >= found.items()


# --- the command
@pytest.mark.of_files
def test_open_closed_and_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_inventory(tmp_path, WELL)
    why = f"there is no database {tmp_path / 'healthchecker.db'}, so whether a service runs is not known"
    assert status(tmp_path, capsys) == (3, f"UNKNOWN: {why}")     # the setting may name another one by now
    prepared_keys(tmp_path)
    with Service(tmp_path / "inventory.yaml") as service:
        service.wait_status("/-/readyz", 200)
        wait_for(lambda: status(tmp_path, capsys)[0] == 0)
        line = status(tmp_path, capsys)[1]
        assert line.startswith("OPEN: all is well | ") and numbers(line) == {
            "gate": 1, "groups_closed": 0, "healthy": 1, "degraded": 0, "unhealthy": 0, "unknown": 0, "maintenance": 0}
        wait_for(lambda: status(tmp_path, capsys, "well")[0] == 0)     # by its row, which may be written after that
        code, line = status(tmp_path, capsys, "wall")
        assert code == 3
        assert line == "UNKNOWN: wall: no group, route or resource has this name; did you mean well?"
        for action, code, word in (("close", 2, "CLOSED"), ("open", 1, "DEGRADED")):
            run(tmp_path / "inventory.yaml", "gate", action, "--reason", "a|b")
            wait_for(lambda code=code: status(tmp_path, capsys)[0] == code)
            assert f"{word}: gate" in status(tmp_path, capsys)[1] and "a/b" in status(tmp_path, capsys)[1]
    assert status(tmp_path, capsys)[0] == 3, "it ended"


def test_degraded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Open, but a resource that does not count is unhealthy, and a route is closed."""
    path = write_inventory(tmp_path, WELL + ASIDE + GROUPS)
    prepared_keys(tmp_path)
    with Service(path) as service:
        service.wait_status("/-/readyz/reports", 503)
        service.wait_status("/-/readyz", 200)
        wait_for(lambda: has_found(tmp_path, capsys, 1, healthy=1, unhealthy=1))
        code, text = status(tmp_path, capsys, "--json")
        told = json.loads(text)
        assert (code, told["state"], told["resources"]["unhealthy"]) == (1, "degraded", 1)
        assert [(gate["name"], gate["state"]) for gate in told["gates"]] == [
            ("", "healthy"), ("shop", "healthy"), ("/reports", "unhealthy")]
        wait_for(lambda: status(tmp_path, capsys, "well")[0] == 0)
        for name, expected in (("/reports", 2), ("shop", 0), ("well", 0), ("aside.example.com", 2)):
            assert status(tmp_path, capsys, name)[0] == expected, name
        assert status(tmp_path, capsys, "well", "/reports")[0] == 2
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("simulated", "simul", 1), encoding="utf-8")  # while it is edited
        assert healthchecker.main(["--inventory", str(path), "status"]) == 1
        shown = capsys.readouterr()
        assert shown.out.startswith("DEGRADED: ") and shown.err.startswith("the inventory is faulty, ")
        path.write_text(text, encoding="utf-8")
        assert numbers(status(tmp_path, capsys)[1])["groups_closed"] == 1


def test_what_was_never_polled_is_of_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_inventory(tmp_path, "  - {name: waits, platform: push, password: 0123456789abcdef}\n" + WELL)
    prepared_keys(tmp_path)
    with Service(tmp_path / "inventory.yaml"):
        wait_for(lambda: has_found(tmp_path, capsys, 2, healthy=1, unknown=1))
        for words in ((), ("waits",)):
            told = json.loads(status(tmp_path, capsys, "--json", *words)[1])
            assert [each["since"] for each in told["others"]] == [None]
            assert [each["since"] for each in told["named"]] == [None] * len(words)


@pytest.mark.long
def test_maintenance_is_no_trouble(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with console(tmp_path, WELL + SICK) as (service, _):
        service.wait_status("/-/readyz", 503)
        wait_for(lambda: has_found(tmp_path, capsys, 2, healthy=1, unhealthy=1))
        assert "sick/=1" in status(tmp_path, capsys)[1]
        run(service.inventory, "maintenance", "start", "--resource", "sick|=1", "--for", "1h", "--reason", "x")
        wait_for(lambda: status(tmp_path, capsys)[0] == 0)
        assert numbers(status(tmp_path, capsys)[1])["maintenance"] == 1
        assert status(tmp_path, capsys, "sick|=1")[0] == 0


@pytest.mark.of_files
def test_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its row is there still, and fresh; nobody runs. A start takes nothing of it for its own."""
    path = write_inventory(tmp_path, WELL)
    prepared_keys(tmp_path)
    with Service(path) as service:
        wait_for(lambda: status(tmp_path, capsys)[0] == 0)
        service.process.kill()
        service.code = service.process.wait(60)
        wait_for(lambda: not SqliteFile(tmp_path / "healthchecker.db").is_running())
        assert status(tmp_path, capsys) == (3, "UNKNOWN: the service does not run: the gate is closed")
    with contextlib.closing(healthchecker.Store(tmp_path / "healthchecker.db")) as store:
        with store.reading() as session:
            assert session.get(Setting, STANDING).text
        installation = healthchecker.Installation(path)
        with store.writing() as session:
            installation.keep_service(session)
        with store.reading() as session:
            assert not session.get(Setting, STANDING).text


@pytest.mark.skipif(sys.platform == "win32", reason="no signal stops a process there")
def test_a_service_that_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, and says nothing: what it said last is not believed for long."""
    prepared_keys(tmp_path)
    with Service(write_inventory(tmp_path, WELL)) as service:
        wait_for(lambda: status(tmp_path, capsys)[0] == 0)
        os.kill(service.pid, signal.SIGSTOP)
        try:
            monkeypatch.setattr(healthchecker, "STANDING_AGE", 1.0)
            wait_for(lambda: status(tmp_path, capsys)[0] == 3)
            assert "the service has written nothing for" in status(tmp_path, capsys)[1]
        finally:
            os.kill(service.pid, signal.SIGCONT)


@pytest.mark.of_files
@pytest.mark.parametrize("text", ["", "{}", "[", '{"mono": "x"}'])
def test_a_row_that_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    write_inventory(tmp_path)
    database = tmp_path / "healthchecker.db"
    with contextlib.closing(healthchecker.Store(database)) as store, store.writing() as session:
        session.merge(Setting(name=STANDING, text=text))
    with SqliteFile(database).lock():
        assert status(tmp_path, capsys) == (3, "UNKNOWN: the service has not said yet how everything stands")


def test_faults_are_no_closed_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Code 2 is one: usage, inventory and database have 3, on one line of standard output."""
    write_inventory(tmp_path, "  - {name: a, platform: nonsense}\n  - {name: b, platform: nonsense}")
    code, line = status(tmp_path, capsys)
    assert code == 3 and line.startswith("UNKNOWN: inventory.yaml:")
    write_inventory(tmp_path)
    (tmp_path / "healthchecker.db").write_bytes(b"no database" * 100)
    assert status(tmp_path, capsys, "--json")[0] == 3
    for words, wanted in ((["status", "--nonsense"], 3), (["status", "--json=x"], 3), (["gate", "--nonsense"], 2),
                          (["gate", "status"], 2), (["--inventory", "status", "gate", "x"], 2),
                          (["--inv", "x", "--listen=:1", "status", "--nonsense"], 3)):
        with pytest.raises(SystemExit) as end:
            healthchecker.main(words)
        assert end.value.code == wanted


def test_who_looks_keeps_no_service_from_its_start(tmp_path: Path) -> None:
    database = tmp_path / "healthchecker.db"
    SqliteFile(database).lock().__exit__(None, None, None)
    looking = sqlite3.connect(f"{database}.lock", check_same_thread=False, isolation_level=None)
    with contextlib.closing(looking):
        looking.execute("BEGIN")
        looking.execute("SELECT * FROM sqlite_master").fetchall()
        assert not SqliteFile(database).is_running(), "others may look as well"
        looking.execute("COMMIT")
    with SqliteFile(database).lock():
        assert SqliteFile(database).is_running()
    assert not SqliteFile(database).is_running()


# --- the page
@contextlib.contextmanager
def page(folder: Path, rows: str = WELL, service: str = "  status_page: true") -> Iterator[Local]:
    with local_console(folder, rows, service, clock=time.time) as made:
        yield made


def shown(local: Local | Client, **headers: str) -> Reply:
    return local.ask("GET", "/-/status", headers=headers)


def word(local: Local) -> str:
    found = re.search(r"<title>(\w+) · HealthChecker</title>", shown(local).body)
    assert found
    return found[1]


def test_there_is_none_unless_asked_for(tmp_path: Path) -> None:
    with page(tmp_path, service="") as local:
        assert shown(local).status == 404
        local.log_in()
        assert shown(local).status == 404


def test_states_and_icons(tmp_path: Path) -> None:
    with page(tmp_path) as local:
        wait_for(lambda: word(local) == "open")
        reply = shown(local)
        assert reply.status == 200 and 'class="wall healthy"' in reply.body and ".healthy.svg" in reply.body
        assert reply.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert "set-cookie" not in reply.headers and reply.headers["cache-control"] == "no-store"
        assert local.ask("GET", "/-/status", address="198.51.100.1").status == 200, "anyone"
        local.log_in()
        assert local.api("POST", "gate", {"action": "close", "reason": "a secret move"}).status == 200
        local.token = ""
        wait_for(lambda: word(local) == "closed")
        body = shown(local).body
        assert 'class="wall unhealthy"' in body and ".unhealthy.svg" in body and "Closed by an operator." in body
        assert "a secret move" not in body and "SpiceWorks" not in body


def test_nothing_names_a_host(tmp_path: Path) -> None:
    """But the names that are meant for it."""
    ahead = f"schedule: '0 {(time.gmtime().tm_hour + 12) % 24} * * *', for: 1h"
    more = (
        "maintenance:\n"
        f"  - {{{ahead}, tags: [x1], reason: disks of aside}}\n"
        f"  - {{{ahead}, groups: [shop], reason: patches of well}}\n"
    )
    rows = WELL + ASIDE + "  - {name: spare.example.com, platform: simulated, tags: [x1], critical: false}\n"
    with console(tmp_path, rows + GROUPS + more, "  status_page: true") as (_, client):
        client.token = ""
        body = wait_for(lambda: (text := shown(client).body) and "<title>degraded" in text and text)
        assert "Something is not well." in body and "Engine room" in body and "shop" in body and "/reports" in body
        assert "Planned work" in body and "a part of it" in body
        for hidden in ("aside", "spare", "x1", "well<", "127.0.0.1", "disks", "patches", "connect"):
            assert hidden not in body.replace("is not well", ""), hidden


def test_several_of_one_public_name_are_as_the_worst(tmp_path: Path) -> None:
    rows = WELL + SICK.replace("port: 9", "port: 9, critical: false, public_name: Engine room")
    with page(tmp_path, rows) as local:
        wait_for(lambda: "Engine room</b> unhealthy" in shown(local).body)
        wait_for(lambda: word(local) == "degraded")


def test_what_is_not_known_is_not_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is old, a database that cannot be read."""
    with page(tmp_path) as local:
        wait_for(lambda: word(local) == "open")
        with monkeypatch.context() as patched:
            patched.setattr(healthchecker, "STANDING_AGE", -1.0)
            reply = shown(local)
            assert word(local) == "unknown" and "healthy" not in reply.body.replace("unhealthy", "")
        with local.store.writing() as session:
            session.execute(sqlalchemy.text("DROP TABLE setting"))
        reply = shown(local)
        assert word(local) == "unknown" and ".unknown.svg" in reply.body and ".healthy.svg" not in reply.body


def test_where_no_worker_answers_nothing_says_open(tmp_path: Path) -> None:
    with page(tmp_path) as local:
        wait_for(lambda: word(local) == "open")
        why = "no worker process is ready"
        local.context.unserved = lambda: why
        assert word(local) == "closed" and "since" not in shown(local).body
        assert (local.ask("GET", "/-/health").status, local.ask("GET", "/-/health").json) == (503, {"status": "fail"})
        local.log_in()
        gate, health = local.api("GET", "gate").json, local.ask("GET", "/-/health").json
        assert (gate["state"], gate["why"], health["checks"]["gate:workers"][0]["output"]) == ("closed", why, why)
        local.open_session()
        assert "Gate closed" in (body := local.ask("GET", "/-/").body) and why in body


def basic(password: str) -> str:
    return f"Basic {base64.b64encode(f'wall:{password}'.encode()).decode()}"


@pytest.mark.of_files
def test_for_the_bearer_of_a_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bearer as programs say it, Basic as browsers do; nobody else, whoever is logged in."""
    with page(tmp_path, service=f"  status_token: {TOKEN}") as local:
        for header in ("", "Bearer", "Bearer x", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Token {TOKEN}",
                       basic(""), basic(TOKEN + "x"), "Basic !", "Basic 4pyT", "Bearer \xff"):  # fmt: skip
            reply = shown(local, **({"Authorization": header} if header else {}))
            assert reply.status == 401, header
            assert reply.headers["www-authenticate"].startswith("Basic ") and TOKEN not in reply.body
        for header in (f"Bearer {TOKEN}", f"bearer  {TOKEN} ", basic(TOKEN)):
            assert shown(local, Authorization=header).status == 200, header
            assert local.ask("GET", "/-/status", "", {"Authorization": header}, "198.51.100.1").status == 200
        local.log_in()
        assert shown(local).status == 401
        assert TOKEN not in json.dumps(local.api("GET", "resources").json)
        with local.store.writing() as session:
            session.execute(sqlalchemy.text("DROP TABLE receiver"))
        local.token = ""
        reply = shown(local, Authorization=f"Bearer {TOKEN}")
        assert reply.status == 503 and ".healthy.svg" not in reply.body
    assert TOKEN not in caplog.text
    written = b"".join(file.read_bytes() for file in tmp_path.glob("healthchecker.db*"))
    assert TOKEN.encode() not in written, "it is there, sealed"


@pytest.mark.parametrize("source", ["env", "file"])
def test_a_token_from_elsewhere_and_sealed(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_keys(tmp_path)
    monkeypatch.setenv("WALL", TOKEN)
    (tmp_path / "wall").write_text(f"{TOKEN}\n", encoding="utf-8")
    value = "WALL" if source == "env" else "wall"
    inventory = load_inventory(write_inventory(tmp_path, service=f"  status_token_{source}: {value}"))
    token = inventory.service.status_token
    assert token and token.get_secret_value() == TOKEN and TOKEN not in repr(inventory)


@pytest.mark.of_files
def test_seal_and_reload(tmp_path: Path) -> None:
    """A new token counts at the next reload; neither shows anywhere."""
    with console(tmp_path, WELL, f"  status_token: {TOKEN}") as (service, client):
        client.token = ""

        def answer(token: str) -> int:
            return client.ask("GET", "/-/status", headers={"Authorization": f"Bearer {token}"}).status

        assert (answer(TOKEN), answer(TOKEN[::-1])) == (200, 401)
        text = service.inventory.read_text(encoding="utf-8").replace(TOKEN, TOKEN[::-1])
        service.inventory.write_text(text, encoding="utf-8")
        said = run(service.inventory, "seal").stdout
        assert "1 secrets sealed" in said
        assert TOKEN[::-1] not in service.inventory.read_text(encoding="utf-8")
        said += run(service.inventory, "reload").stdout
        assert (answer(TOKEN), answer(TOKEN[::-1])) == (401, 200)
        assert "restart" not in said and TOKEN[::-1] not in said + service.output and TOKEN not in service.output


@pytest.mark.parametrize(
    ("service", "fault"),
    [
        ("  status_token: short", "status_token: must have 16 characters of ASCII or more, without blanks"),
        (f"  status_token: {TOKEN} with blanks", "status_token: must have 16 characters"),
        ("  status_token_file: nowhere", "status_token_file: this file cannot be read as text"),
        ("  status_pages: true", "unknown setting; did you mean status_page?"),
        (f"  status_page: true\n  status_token: {TOKEN}", "use one of status_page, which anyone sees, and"),
        (f"  status_token: {TOKEN}\n  status_token_env: X", "use one of status_token, status_token_env"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, service: str, fault: str) -> None:
    with pytest.raises(InventoryError) as error:
        load_inventory(write_inventory(tmp_path, service=service))
    assert fault in str(error.value) and re.match(r"inventory\.yaml:\d+:\d+: ", str(error.value))
    assert TOKEN not in str(error.value) and "short" not in str(error.value)


def test_a_viewer_is_shown_no_less(tmp_path: Path) -> None:
    """Nor more: the page is the same for everybody."""
    with page(tmp_path) as local:
        with local.store.writing() as session:
            session.add(make_user("viola", role="viewer"))
        wait_for(lambda: word(local) == "open")
        local.log_in_as("viola")
        assert "viola" not in shown(local).body and "well<" not in shown(local).body


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="the page is the same there, but no chromium is")
def test_a_wall_whose_service_dies(tmp_path: Path) -> None:
    """It follows the gate by itself, with the token in its address; without an answer nothing of it says open."""
    with chromium() as browser, console(tmp_path, WELL, f"  status_token: {TOKEN}") as (service, client):
        faults, page = Faults(), browser.new_page()
        page.set_default_timeout(PATIENCE)
        faults.watch(page)
        page.set_viewport_size({"width": 1920, "height": 1080})
        page.goto("http://wall:{}@{}:{}/-/status".format(TOKEN, *service.console))
        main = page.locator("main")
        size = main.locator("h1").evaluate("word => parseFloat(getComputedStyle(word).fontSize)")
        assert size >= 1080 / 5, "to be read from five metres"

        def look() -> tuple[str, str, str]:
            icon = page.locator("link[rel=icon]").get_attribute("href") or ""
            return page.title().split(" · ")[0], icon.split(".")[-2], main.evaluate(
                "each => getComputedStyle(each).backgroundColor")

        wait_for(lambda: look()[:2] == ("open", "healthy"), 45)
        green = look()[2]
        client.api("POST", "gate", {"action": "close"})
        wait_for(lambda: look()[:2] == ("closed", "unhealthy"), 45)
        red = look()[2]
        client.api("POST", "gate", {"action": "auto"})
        wait_for(lambda: look() == ("open", "healthy", green), 45)
        service.process.kill()
        service.code = service.process.wait(60)
        wait_for(lambda: look()[:2] == ("not known", "unknown"), 45)
        assert len({green, red, look()[2]}) == 3 and "What is shown is old." in page.locator("#lost").inner_text()
        assert not [fault for fault in faults if "ERR_CONNECTION" not in fault]
        page.close()
