"""Reload: a running service takes an edited inventory over, and what it does is told in its events."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from console import Client, Local, local_console, prepared_database, prepared_keys
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from service import Program, Service, command, environment, run, run_cheaply, store_in, write_inventory
from sqlalchemy.orm import Session
from sshd import wait_for

import healthchecker
from healthchecker import (
    Changes,
    Installation,
    InventoryError,
    ResourceSettings,
    Standing,
    Store,
    Vault,
    events,
    load_targets,
    main,
    take_over_again,
)

CALM = "platform: simulated, mean_healthy: 100000, interval: 1"
HOSTS = [f"  - {{name: h{number}, {CALM}}}\n" for number in range(9)]
STORMY = "  - {name: stormy, platform: simulated, mean_healthy: 0.000001, mean_unhealthy: 1000000, interval: 1}\n"
HANGUP = pytest.param(
    "SIGHUP", marks=pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
)
WAYS = ["reload", HANGUP]


def told(folder: Path, *kinds: str) -> list[tuple[str, str]]:
    """What the events of these kinds say, oldest first, and who did it."""
    with contextlib.closing(store_in(folder)) as store, store.reading() as session:
        found = [event for event in events(session, limit=1000) if event.kind in kinds]
    return [(event.text, event.actor) for event in reversed(found)]


def said_by(inventory: Path, *arguments: str, code: int = 0) -> str:
    """What a command prints that ends with this exit code: of an error to standard error, and else to the output."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        assert main(["--inventory", str(inventory), *arguments]) == code
    return (errors if code else output).getvalue()


def reload(service: Service, way: str, line: str, code: int = 0) -> None:
    """Has the inventory taken over, and waits for what is said of it: `line`."""
    if way == "SIGHUP":
        os.kill(service.pid, signal.Signals["SIGHUP"])
        service.wait_line(line)
        return
    assert line in said_by(service.inventory, "reload", code=code)


@pytest.mark.parametrize("way", WAYS)
def test_a_running_service_takes_the_inventory_over(way: str, tmp_path: Path) -> None:
    """The pollers follow, the console too, and a setting of the service itself is named and waits."""
    prepared_database(tmp_path)
    path = write_inventory(tmp_path, "".join(HOSTS[:4]))
    with Service(path) as service:
        service.wait_status("/-/readyz", 200)
        client = Client(*service.console).log_in()
        assert [one["name"] for one in client.api("GET", "resources").json] == ["h0", "h1", "h2", "h3"]
        defaults = "  drain: 5\ndefaults: {rise: 3, limits: {disk_percent: 91}}\n"
        write_inventory(tmp_path, "".join(HOSTS[1:4]) + STORMY, defaults)
        reload(service, way, "inventory: 1 added, 3 changed, 1 removed, 0 kept")
        service.wait_status("/-/readyz", 503)
        shown = {one["name"]: one for one in client.api("GET", "resources").json}
        assert shown.keys() == {"h1", "h2", "h3", "stormy"} and shown["h1"]["rise"] == 3
        assert re.fullmatch(r"inventory\.yaml:\d+:5", shown["stormy"]["place"])
        body = {"name": "added", "hostname": "192.0.2.1", "platform": "simulated", "mean_healthy": 100000}
        added = client.api("POST", "resources", body)
        assert added.json["limits"]["disk_percent"]["fail"] == 91 and added.json["rise"] == 3
        reload(service, way, "service.drain changed: that needs a restart")
        write_inventory(tmp_path, "".join(HOSTS[1:4]))
        reload(service, way, "inventory: 0 added, 3 changed, 1 removed, 0 kept")
        service.wait_status("/-/readyz", 200)
    who = "" if way == "SIGHUP" else "command line"
    assert [one for one in told(tmp_path, "change") if one[0].startswith("inventory: ")][1:] == [
        ("inventory: 1 added, 3 changed, 1 removed, 0 kept; added: stormy; changed: h1, h2, h3; removed: h0", who),
        ("inventory: 0 added, 3 changed, 1 removed, 0 kept; changed: h1, h2, h3; removed: stormy", who),
    ]


def garbled(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "  - {name: x, platform: simulatd}\n", encoding="utf-8")


def gone(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    write_inventory(path.parent, HOSTS[0])


def unsealed(path: Path) -> None:
    write_inventory(path.parent, "".join(HOSTS) + "  - {hostname: 192.0.2.1, username: u, password: HC2.damaged}\n")


def moved(path: Path) -> None:
    write_inventory(path.parent, "".join(HOSTS[1:]), "  keys: elsewhere\n")


FAULTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a fault": (garbled, 2, "resources[9].platform: must be one of"),
    "no file": (gone, 2, "inventory.yaml: cannot be read"),
    "too little left": (cut, 2, "8 resources are not in it any more"),
    "a damaged secret": (unsealed, 3, "a sealed secret is damaged"),
    "other keys": (moved, 2, "service.keys changed: restart the service"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_faulty_inventory_changes_nothing(way: str, tmp_path: Path) -> None:
    """Each fault is said, with its exit code, and the service goes on as before."""
    prepared_keys(tmp_path)
    with Service(write_inventory(tmp_path, "".join(HOSTS))) as service:
        service.wait_status("/-/readyz", 200)
        before = told(tmp_path, "change")
        for spoil, code, message in FAULTS.values():
            write_inventory(tmp_path, "".join(HOSTS))
            spoil(service.inventory)
            reload(service, way, message, code)
        write_inventory(tmp_path, "".join(HOSTS))
        reload(service, way, "0 added, 0 changed, 0 removed, 9 kept")
        assert service.get("/-/readyz").status == 200
        if way == "SIGHUP":
            assert all("not taken over: " in service.wait_line(message) for _, _, message in FAULTS.values())
    assert told(tmp_path, "change") == before
    assert not (tmp_path / "elsewhere").exists()


def test_removals_are_accepted_where_they_are_meant(tmp_path: Path) -> None:
    with Service(write_inventory(tmp_path, "".join(HOSTS))) as service:
        write_inventory(tmp_path, HOSTS[0])
        done = run(service.inventory, "reload", "--accept-removals")
        assert done.returncode == 0 and "8 removed, 1 kept" in done.stdout


@pytest.mark.of_files
def test_reload_before_the_first_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_inventory(tmp_path, HOSTS[0])
    assert main(["--inventory", str(path), "reload"]) == 2
    assert "start the service first" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["inventory.yaml"]


def test_reload_of_a_service_that_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its next start finds it done."""
    path = write_inventory(tmp_path, HOSTS[0])
    with Service(path):
        pass
    write_inventory(tmp_path, "".join(HOSTS[:2]))
    assert main(["--inventory", str(path), "reload"]) == 0
    assert capsys.readouterr().out == "inventory: 1 added, 0 changed, 0 removed, 1 kept; added: h1\n"
    with Service(path) as service:
        service.wait_line("inventory: 0 added, 0 changed, 0 removed, 2 kept")


RELOADING = """
import os, subprocess

folder = os.path.dirname(__file__)
if os.path.exists(folder + "/next.yaml"):
    os.replace(folder + "/next.yaml", folder + "/inventory.yaml")
    subprocess.run({}, check=True)

def app(environ, start_response):
    start_response("204 No Content", [])
    return []
"""
OWN_FILE = "  - {name: h0, hostname: 192.0.2.1, username: u, password_file: h0.password}\n"


def password_edited(path: Path) -> None:
    (path.parent / "h0.password").write_text("after", encoding="utf-8")


def rows_edited(path: Path) -> None:
    write_inventory(path.parent, OWN_FILE + HOSTS[3])


@pytest.mark.of_files
@pytest.mark.parametrize(
    ("edit", "names", "password"),
    [(rows_edited, {"h0", "h3"}, "before"), (password_edited, {"h0", "h1", "h2"}, "after")])
def test_a_reload_that_another_one_overtook(
    edit: Callable[[Path], None], names: set[str], password: str, tmp_path: Path
) -> None:
    """Of two at once the one that read the files first writes last: it reads them again, or what the other one took
    over, and nobody edits any more, would be watched no longer."""
    prepared_database(tmp_path)
    (tmp_path / "h0.password").write_text("before", encoding="utf-8")
    path = write_inventory(tmp_path, OWN_FILE + "".join(HOSTS[1:3]))
    earlier = Installation(path)
    edit(path)
    assert f"{len(names)} added" in said_by(path, "reload")
    with earlier.store(needed=True) as store:
        assert [*take_over_again(earlier, store)] == [
            f"inventory: 0 added, 0 changed, 0 removed, {len(names)} kept"]
        with store.reading() as session:
            targets = load_targets(session, earlier.open_vault(session))
    assert {*targets} == names and targets["h0"].settings.secrets["password"] == password


class Blind(Installation):
    """It can neither read files, also those of keys, nor use its key from the moment on in which nobody else may write.
    """

    def taken(self, session: Session) -> tuple[int, str]:
        if session.connection().get_execution_options().get("immediate"):
            for path in (self.path, self.service.keys / "private.pem"):
                path.unlink(missing_ok=True)
        return super().taken(session)

    def take_over(self, session: Session, vault: Vault, actor: str = "") -> Changes:
        vault._keys = dict.fromkeys(vault._keys, cast(RSAPrivateKey, None))
        return super().take_over(session, vault, actor)


@pytest.mark.of_files
def test_nobody_waits_while_a_reload_reads_files_and_opens_secrets(tmp_path: Path) -> None:
    """Of some thousand passwords that takes seconds, in which the service could write nothing."""
    prepared_database(tmp_path)
    (tmp_path / "h0.password").write_text("secret", encoding="utf-8")
    path = write_inventory(tmp_path, OWN_FILE + "  - {name: h1, hostname: 192.0.2.1, username: u, password: secret}\n")
    assert "2 added" in said_by(path, "reload")
    assert main(["--inventory", str(path), "seal"]) == 0 and "HC2." in path.read_text("utf-8")
    write_inventory(tmp_path, path.read_text("utf-8").partition("resources:\n")[2] + HOSTS[3])
    reloading = Blind(path)
    with reloading.store(needed=True) as store:
        assert [*take_over_again(reloading, store)] == [
            "inventory: 1 added, 0 changed, 0 removed, 2 kept; added: h3"]
    assert not path.exists()


@pytest.mark.of_files
@pytest.mark.parametrize(("change", "told"), [
    ("rotate", "1 changed, 0 removed, 0 kept; changed: h0"), ("replace", "0 changed, 0 removed, 1 kept")])
def test_a_reload_that_another_key_overtook(change: str, told: str, tmp_path: Path) -> None:
    """Nothing is sealed with the one that went."""
    class Overtaken(Store):
        said = ""

        def writing(self, **how: bool) -> contextlib.AbstractContextManager[Session]:
            if change == "replace" and not self.said:
                (tmp_path / "keys" / "private.pem").unlink()
            self.said = self.said or said_by(path, "keys", change)
            return super().writing(**how)

    prepared_database(tmp_path)
    path = write_inventory(tmp_path, OWN_FILE.replace("password_file: h0.password", "password: p"))
    said_by(path, "reload")
    write_inventory(tmp_path, OWN_FILE.replace("password_file: h0.password", "password: q"))
    reloading = Installation(path)
    with contextlib.closing(Overtaken(reloading.database)) as store:
        assert [*take_over_again(reloading, store)] == [f"inventory: 0 added, {told}"]
        with store.reading() as session:
            [target] = load_targets(session, Vault(reloading.service.keys)).values()
    assert re.search("sealed with key|key .* in place of", store.said) and target.settings.secrets == {"password": "q"}


@pytest.mark.of_files
def test_a_reload_that_another_one_overtakes_again_and_again(tmp_path: Path) -> None:
    """It gives up, for it does not know any more what is meant."""
    class Slow(Installation):
        def read_again(self) -> healthchecker.Document:
            document = super().read_again()
            said_by(self.path, "reload")
            return document

    prepared_database(tmp_path)
    slow = Slow(write_inventory(tmp_path, HOSTS[0]))
    with slow.store(needed=True) as store, pytest.raises(healthchecker.UsageError, match="try again"):
        list(take_over_again(slow, store))


@pytest.mark.of_files
def test_a_reload_that_a_faulty_edit_overtook(tmp_path: Path) -> None:
    """It says so, and takes over nothing."""
    prepared_database(tmp_path)
    path = write_inventory(tmp_path, HOSTS[0])
    earlier = Installation(path)
    garbled(path)
    with earlier.store(needed=True) as store:
        with pytest.raises(InventoryError, match="platform: must be one of"):
            list(take_over_again(earlier, store))
        with store.reading() as session:
            assert not load_targets(session, earlier.open_vault(session))


@pytest.mark.of_files
def test_a_start_that_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As on a full disk: it still knows with what it was begun, and an edit that is not done does not end it."""
    prepared_database(tmp_path)
    path = write_inventory(tmp_path, HOSTS[0])
    started = Installation(path)
    write_inventory(tmp_path, "".join(HOSTS[:2]), "  drain: 5\n")
    with started.store(needed=True) as store:
        with store.writing() as session:
            started.keep_service(session)
            session.rollback()
        write_inventory(tmp_path, "".join(HOSTS[:3]), "  drain: 5\n")
        whole = path.read_text("utf-8")
        path.write_text(f"{whole}groups: [", encoding="utf-8")
        with store.writing() as session:
            started.keep_service(session)
            assert started.changed_service(session) == ["service.drain"]
    assert len(started.inventory.resources) == 2 and "the inventory was not taken over: inventory.yaml:" in caplog.text


def test_a_reload_during_a_start(tmp_path: Path) -> None:
    """What it took over is watched: the start, which is importing the application, read the file before."""
    prepared_database(tmp_path)
    app = RELOADING.format(command(tmp_path / "inventory.yaml", "reload"))
    (tmp_path / "slow.py").write_text(app, encoding="utf-8")
    write_inventory(tmp_path, "".join(HOSTS[:2]), "  app: slow:app\n  drain: 5\n", name="next.yaml")
    with Service(write_inventory(tmp_path, HOSTS[0], "  app: slow:app\n")) as service:
        service.wait_line("inventory: 0 added, 0 changed, 0 removed, 2 kept")
        service.wait_line("service.drain changed: that needs a restart")
        service.wait_status("/-/readyz", 200)


EARLY = """
import importlib.abc, os, signal, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "paramiko":
            os.kill(os.getpid(), signal.SIGHUP)

signal.signal(signal.SIGHUP, signal.SIG_DFL)    # under nohup it is ignored
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_a_hangup_during_the_imports_of_a_start(tmp_path: Path) -> None:
    """`systemctl reload` right after a start: it is a reload, as soon as there is something to reload. What is no
    service ends by it, as by the end of a terminal."""
    prepared_database(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(EARLY, encoding="utf-8")
    early = {"PYTHONPATH": str(tmp_path)}
    with Program(write_inventory(tmp_path, HOSTS[0]), env=early) as service:
        service.wait_line("inventory: 1 added")
        service.wait_line("inventory: 0 added, 0 changed, 0 removed, 1 kept")
        service.wait_status("/-/readyz", 200)
    told = subprocess.run(command(service.inventory, "gate"), env=environment(early), capture_output=True, check=False)
    assert told.returncode == -signal.Signals["SIGHUP"] and not told.stdout


def test_start_and_stop_are_events(tmp_path: Path) -> None:
    """With the version; all in the order of time, and nothing of a start that failed."""
    path = write_inventory(tmp_path, HOSTS[0])
    with Service(path) as service:
        service.wait_status("/-/readyz", 200)
        wait_for(lambda: any(text.startswith("closed -> open") for text, _ in told(tmp_path, "gate")))
    kinds = "service", "change", "gate"

    def said() -> list[str]:
        return [re.split(" after|, on ", text)[0] for text, _ in told(tmp_path, *kinds)]

    lines = said()
    assert lines == [
        f"started, version {healthchecker.VERSION}",
        "inventory: 1 added, 0 changed, 0 removed, 0 kept; added: h0",
        "closed (the service starts)",
        "closed -> open",
        "stopped",
    ]
    for resources, service_settings in (
        ("  - {hostname: 192.0.2.1, username: u, password: HC2.damaged}\n", ""),
        (HOSTS[0], "  app: missing:app\n"),
        ("  - {hostname: 192.0.2.1, username: u}\n", ""),
    ):
        write_inventory(tmp_path, resources, service_settings)
        assert run_cheaply("--inventory", str(path))[0] in (2, 3)
    assert said() == lines
    with contextlib.closing(store_in(tmp_path)) as store, store.reading() as session:
        times = [event.at for event in events(session)]
    assert times == sorted(times, reverse=True)


def test_a_renamed_resource_goes_on(tmp_path: Path) -> None:
    """In a running service: the gate does not close, and its page shows what was before."""
    prepared_database(tmp_path)
    with Service(write_inventory(tmp_path, f"  - {{name: old, {CALM}}}\n")) as service:
        service.wait_status("/-/readyz", 200)
        client = Client(*service.console).log_in()
        wait_for(lambda: client.api("GET", "resources/old/samples").json)
        write_inventory(tmp_path, f"  - {{name: new, was: old, {CALM}}}\n")
        reload(service, "reload", "0 added, 1 changed, 0 removed, 0 kept; changed: new")
        assert client.api("GET", "resources/old").status == 404
        assert len(client.api("GET", "resources/new/samples").json) >= 1
        wait_for(lambda: client.api("GET", "resources/new").json["state"] == "healthy")
        assert service.get("/-/readyz").status == 200
        assert client.api("GET", "events?resource=new&kind=state").json[-1]["text"] == "unknown -> healthy"
    gate = [text.partition(" after")[0] for text, _ in told(tmp_path, "gate")]
    assert gate == ["closed (the service starts)", "closed -> open"]


def test_a_renamed_resource_that_is_down_keeps_the_gate_closed(tmp_path: Path) -> None:
    """Also where another setting changes at the same time, by which its stored state does not count."""
    prepared_database(tmp_path)
    down = "hostname: 127.0.0.1, port: 9, username: u, password: p, fall: 1, interval: 600"
    with Service(write_inventory(tmp_path, f"  - {{name: old, {down}}}\n")) as service:
        client = Client(*service.console).log_in()
        wait_for(lambda: client.api("GET", "resources/old").json["state"] == "unhealthy")
        write_inventory(tmp_path, f"  - {{name: new, was: old, {down}, timeout: 29}}\n")
        reload(service, "reload", "0 added, 1 changed, 0 removed, 0 kept; changed: new")
        wait_for(lambda: client.api("GET", "resources/new").json["state"] == "unhealthy")
    assert [text.partition(":")[0] for text, _ in told(tmp_path, "gate")] == [
        "closed (the service starts)", "closed (old"], "the reason, once it is known"


def test_a_default_that_is_stated_or_not_is_no_change(tmp_path: Path) -> None:
    prepared_database(tmp_path)
    with Service(write_inventory(tmp_path, HOSTS[0], "  drain: 7.5\n  queue: 90")) as service:
        service.wait_status("/-/readyz", 200)
        text = service.inventory.read_text(encoding="utf-8")
        service.inventory.write_text(text.replace("  drain: 7.5\n  queue: 90", "  body_limit: 1"), encoding="utf-8")
        lines = said_by(service.inventory, "reload").splitlines()
    waiting = [line for line in lines if "needs a restart" in line]
    assert waiting == ["service.body_limit, service.queue changed: that needs a restart"]


def test_another_way_to_the_same_inventory_is_no_change(tmp_path: Path) -> None:
    """By a link to its folder, and from an account with another home folder."""
    folder, home = tmp_path / "real", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    prepared_database(folder)
    path, ways = write_inventory(folder, HOSTS[0]), [tmp_path / "real"]
    if sys.platform != "win32":     # which lets nobody but administrators make one
        ways.append(tmp_path / "link")
        ways[1].symlink_to(folder)
    with Service(path) as service:
        service.wait_status("/-/readyz", 200)
        for way in ways:
            done = run(way / path.name, "reload", env={"HOME": str(home), "USERPROFILE": str(home)})
            said = "inventory: 0 added, 0 changed, 0 removed, 1 kept\n"
            assert (done.returncode, done.stdout, done.stderr) == (0, said, ""), way
        for other in ("known", "~/.ssh/known_hosts"):   # the latter is whose account it is
            write_inventory(folder, HOSTS[0], f"  known_hosts: {other}\n")
            done = run(path, "reload", env={"HOME": str(home), "USERPROFILE": str(home)})
            assert "service.known_hosts changed: that needs a restart" in done.stdout + done.stderr


# --- what is known goes on ---
OTHER = f"  - {{name: other, {CALM}}}\n"


@contextlib.contextmanager
def port() -> Iterator[tuple[int, socket.socket]]:
    """One that answers until its socket is closed, and then refuses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1], server


def standing(local: Local) -> Standing:
    poller = local.context.monitor.pollers.get("one")
    return poller.standing if poller else Standing()


UNASKED: dict[str, Any] = {
    "interval": 2, "timeout": 9, "retry_interval": 2, "rise": 3, "fall": 900, "critical": False, "tags": ["t"],
    "public_name": "Shop", "depends_on": ["other"], "keep": None, "relogin": None}  # fmt: skip


def test_what_was_found_out_goes_on(tmp_path: Path) -> None:
    """With bad results in a row whatever is changed of which no host is told, and over a restart; anew where it is
    asked something else."""
    assert UNASKED.keys() == {*healthchecker.UNASKED} <= ResourceSettings.model_fields.keys()
    with port() as (number, server):
        row = f"  - {{name: one, platform: tcp, hostname: 127.0.0.1, port: {number}, fall: 1000, interval: 1"
        with local_console(tmp_path, f"{OTHER}{row}}}\n") as local:
            wait_for(lambda: local.context.is_healthy and standing(local).state == "healthy", 20)
            server.close()
            bad = wait_for(lambda: standing(local).bad, 20)
        with local_console(tmp_path, f"{OTHER}{row}, tags: [t], rise: 3}}\n") as local:
            assert local.context.is_healthy and standing(local).bad >= bad
            wait_for(lambda: standing(local).bad > bad, 20)
            assert local.context.is_healthy
        with local_console(tmp_path, f"{OTHER}{row}, tags: [t], send: x}}\n") as local:
            wait_for(lambda: standing(local).state == "unhealthy", 20)


@pytest.mark.parametrize("name", [name for name in UNASKED if UNASKED[name] is not None])
def test_what_was_found_out_goes_on_after_a_change(name: str, tmp_path: Path) -> None:
    with port() as (number, server), local_console(tmp_path, OTHER) as local:
        body = {"name": "one", "platform": "tcp", "hostname": "127.0.0.1", "port": number, "fall": 1000, "interval": 1}
        assert local.log_in().api("POST", "resources", body).status == 201
        wait_for(lambda: local.context.is_healthy and standing(local).state == "healthy", 20)
        server.close()
        bad = wait_for(lambda: standing(local).bad, 20)
        before = local.context.monitor.pollers["one"]
        assert local.api("PATCH", "resources/one", {name: UNASKED[name]}).status == 200
        wait_for(lambda: local.context.monitor.pollers["one"] is not before, 20)
        wait_for(lambda: standing(local).bad > bad, 20)
        assert standing(local).state == "healthy" and local.context.is_healthy
        assert local.api("PATCH", "resources/one", {"send": "x"}).status == 200
        wait_for(lambda: standing(local).state == "unhealthy", 20)


def test_another_row_with_the_same_name_is_new(tmp_path: Path) -> None:
    """However soon it comes after the one before it."""
    with port() as (number, server), local_console(tmp_path, OTHER) as local:
        body = {"name": "one", "platform": "tcp", "hostname": "127.0.0.1", "port": number, "fall": 1000, "interval": 1}
        assert local.log_in().api("POST", "resources", body).status == 201
        wait_for(lambda: standing(local).state == "healthy", 20)
        server.close()
        with local.context.store.reading() as session:
            row = healthchecker.find_resource(session, "one")
            known = healthchecker.load_targets(session, local.context.vault)["one"]
        assert row.id == known.id and healthchecker.counts_on(known, known)
        assert local.api("DELETE", "resources/one").status == 204
        assert local.api("POST", "resources", body).status == 201
        wait_for(lambda: standing(local).state == "unhealthy", 20)
        assert not healthchecker.counts_on(known, local.context.monitor.pollers["one"].target)
