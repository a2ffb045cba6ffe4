"""Every command as a user calls it: what it prints, what it changes, and that it never ends in a traceback."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from conftest import wait_for
from console import prepared_database, prepared_vault
from rights import ROOT
from service import PROGRAM, Program, Service, command, environment, prepared_keys, run_cheaply, write_inventory
from sshd import ParamikoSshd, make_key, write_private

import healthchecker
from healthchecker import FIRST_USER, UsageError, Vault, binding, load_inventory, main

LOCAL = "  - {name: here, platform: local}\n"
CALM = "  - {name: calm, platform: simulated, mean_healthy: 100000}\n"
STORMY = "  - {name: stormy, platform: simulated, mean_healthy: 0.000001, mean_unhealthy: 1000000}\n"
NOBODY = 65534
POSIX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes of this kind")
NO_LOCAL = pytest.mark.skipif(sys.platform == "win32", reason="platform local runs /bin/sh")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A loopback port that refuses: bound and never listening."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored(path: Path) -> None:
    """Makes keys and database follow the inventory, as a start does."""
    vault = prepared_vault(path.parent) if not (path.parent / "keys").exists() else Vault(path.parent / "keys")
    setup = healthchecker.Installation(path)
    with closing(healthchecker.Store(setup.database)) as store, store.writing() as session:
        healthchecker.import_inventory(session, setup.inventory, vault)


# --- usage ---------------------------------------------------------------------------------------------------
@pytest.mark.long
def test_help_of_the_program() -> None:
    program = [sys.executable, str(PROGRAM), "--help"]
    done = subprocess.run(
        program, capture_output=True, encoding="utf-8", env=environment(), check=True, timeout=60
    )
    for word in ("check", "seal", "trust", "keys", "--inventory"):
        assert word in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["check", "--help"], 0),
        (["chek"], 2),
        (["keys"], 2),
        (["keys", "rotat"], 2),
        (["trust"], 2),
        (["--inventory"], 2),
        (["check", "--pprobe", "x"], 2),
        (["user", "remove", "not UTF-8: \udcff"], 2),
        (["maintenance", "end", "--tag", "a", "--tag", "\udcff"], 2),
        (["status", "\udcff"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == code
    output = capsys.readouterr()
    assert output.out.startswith("usage: ") if code == 0 else output.err.startswith("usage: ")


@pytest.mark.parametrize(("before", "package"), [
    ("sys.modules['waitress'] = None", "waitress"),
    ("import cronsim; del cronsim.CronSimError", "cronsim"),
    # Before 2.32.2 it asks no adapter for its connection: the password would go over one that nobody verified.
    ("import requests; del requests.adapters.HTTPAdapter.get_connection_with_tls_context", "requests"),
])  # fmt: skip
def test_a_package_that_is_missing_or_too_old(before: str, package: str) -> None:
    code = f"import sys; {before}; import healthchecker"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROGRAM.parent)
    told = f"healthchecker: the package {package} is missing or too old; run `make run`, or "
    assert done.returncode == 1 and done.stderr.splitlines() == [told + "`pip install -r requirements.txt`"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"HealthChecker {healthchecker.VERSION}\n"


@pytest.mark.parametrize("arguments", [["check"], ["seal"], ["trust", "x"], ["keys", "rotate"]], ids=" ".join)
def test_command_without_inventory(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only a start makes one."""
    assert main(["--inventory", str(tmp_path / "inventory.yaml"), *arguments]) == 2
    assert re.fullmatch(r"inventory\.yaml: cannot be read: .*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


# --- first start ---------------------------------------------------------------------------------------------
@pytest.mark.long
def test_first_start_copies_the_example(tmp_path: Path) -> None:
    example = tmp_path / "inventory.example.yaml"
    service = "{listen: 127.0.0.1:0, console: 127.0.0.1:0, workers: 1}"
    example.write_text(f"# an example\nservice: {service}\nresources:\n{CALM}", encoding="utf-8")
    program = Path(shutil.copy(PROGRAM, tmp_path))
    with Program(tmp_path / "inventory.yaml", program=program) as service:
        service.wait_status("/-/readyz", 200)
        service.wait_line("copied from inventory.example.yaml")
    assert (tmp_path / "inventory.yaml").read_bytes() == example.read_bytes()
    assert {"healthchecker.db", "keys/private.pem", "keys/public.pem"} <= {
        name.replace(os.sep, "/") for name in files(tmp_path)
    }
    if sys.platform != "win32":
        assert stat.S_IMODE((tmp_path / "keys" / "private.pem").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "healthchecker.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("also", [[], ["groups and routes", "planned maintenance", "who is told"]])
def test_what_is_no_resource_does_not_stay(also: list[str]) -> None:
    """A file that is cut off loses the groups of its hosts, too."""
    names = [f"h{number}" for number in range(9)]
    assert healthchecker.Changes([], [*also, "h8"], names[:4], names[4:8]).alarming
    assert not healthchecker.Changes([], [*also, "h8"], names[:3], names[3:8]).alarming


def test_many_removals_are_said_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cut or a merge gone wrong would forget most machines, and open the gate on the rest."""
    hosts = [f"  - {{name: h{number}, platform: simulated}}\n" for number in range(9)]
    with Service(write_inventory(tmp_path, "".join(hosts))):
        pass
    path = write_inventory(tmp_path, "".join(hosts[:5]))
    refusal = "inventory.yaml: 4 resources are not in it any more (h5, h6, h7, h8); if that is meant: --accept-removals"
    assert main(["--inventory", str(path), "check"]) == 2
    out, err = capsys.readouterr()
    assert "0 added, 0 changed, 4 removed, 5 kept" in out and err == refusal + "\n"
    for words in (["--accept-removals", "check"], ["check", "--accept-removals"]):
        assert main(["--inventory", str(path), *words]) == 0
    code, output = run_cheaply("--inventory", str(path))
    assert code == 2 and refusal in output
    with closing(healthchecker.Store(tmp_path / "healthchecker.db")) as store, store.reading() as session:
        assert session.query(healthchecker.Resource).count() == 9
    write_inventory(tmp_path, "".join(hosts[:6]))   # a third may go
    with Service(path) as service:
        service.wait_line("3 removed, 6 kept")
    for left, code in ((4, 0), (3, 2)):     # and two, whatever part that is
        write_inventory(tmp_path, "".join(hosts[:left]))
        assert main(["--inventory", str(path), "check"]) == code
    stored(write_inventory(tmp_path, "".join(hosts[:2])))
    write_inventory(tmp_path)
    assert main(["--inventory", str(path), "check"]) == 0


@pytest.mark.parametrize("left", ["healthchecker.db", "keys/private.pem"])
def test_an_inventory_that_has_gone_is_not_replaced(left: str, tmp_path: Path) -> None:
    """The example would forget every resource, serve the built-in page and open the gate."""
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_bytes(b"")
    before = files(tmp_path)
    with pytest.raises(healthchecker.InventoryError, match=r"not there, but .* of an earlier start is"):
        healthchecker.ensure_inventory(tmp_path / "inventory.yaml")
    assert files(tmp_path) == before


@pytest.mark.long
def test_an_inventory_that_has_gone_is_not_replaced_wherever_database_and_keys_are(tmp_path: Path) -> None:
    """A start leaves a note beside it, of this inventory alone."""
    folder, elsewhere = tmp_path / "opt", tmp_path / "var"
    folder.mkdir()
    elsewhere.mkdir()
    prepared_keys(elsewhere)
    places = f"  database: sqlite:///{(elsewhere / 'hc.db').as_posix()}\n  keys: {json.dumps(str(elsewhere / 'keys'))}"
    path, mark = write_inventory(folder, CALM, places), folder / "inventory.yaml.started"
    with Program(path):
        assert files(folder).keys() == {path.name, mark.name}
    path.rename(tmp_path / "moved.yaml")
    with pytest.raises(healthchecker.InventoryError, match=r"but inventory\.yaml\.started of an earlier start is"):
        healthchecker.ensure_inventory(path)
    assert files(folder).keys() == {mark.name}
    healthchecker.ensure_inventory(folder / "other.yaml")
    mark.unlink()       # whoever means it
    healthchecker.ensure_inventory(path)
    assert [one.name for one in load_inventory(path).resources] == ["this-machine"]


def test_a_named_inventory_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A typo in a unit file: it must not watch this machine alone instead."""
    (tmp_path / "inventory.example.yaml").write_text(f"resources:\n{CALM}", encoding="utf-8")
    assert main(["--inventory", str(tmp_path / "invent0ry.yaml")]) == 2
    assert re.fullmatch(r"invent0ry\.yaml: cannot be read: .*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["inventory.example.yaml"]


def test_without_example_this_machine_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "inventory.yaml"
    healthchecker.ensure_inventory(path)
    assert [resource.platform.value for resource in load_inventory(path).resources] == ["local"]
    path.write_text("resources: []\n", encoding="utf-8")
    healthchecker.ensure_inventory(path)
    assert path.read_text(encoding="utf-8") == "resources: []\n"
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_example_as_shipped() -> None:
    """It is valid, watches this machine and asks for no credentials; every setting is in it, if only as a comment."""
    path = PROGRAM.with_name("inventory.example.yaml")
    inventory = load_inventory(path)
    assert [resource.platform.value for resource in inventory.resources] == ["local"]
    text = path.read_text(encoding="utf-8")
    missing = {
        name
        for model in (healthchecker.ServiceSettings, healthchecker.ResourceSettings, healthchecker.Limits)
        for name in model.model_fields
        if f"{name}:" not in text
    }
    assert not missing


@pytest.mark.parametrize("part", ["service", "defaults"])
def test_the_settings_of_the_example_are_valid(tmp_path: Path, part: str) -> None:
    """All at once, without their comment signs."""
    text = PROGRAM.with_name("inventory.example.yaml").read_text(encoding="utf-8")
    begin = text.index(f"\n{part}:")
    end = text.index("\n\n", begin)
    whole = text[:begin] + text[begin:end].replace("\n  # ", "\n  ") + text[end:]
    path = tmp_path / "inventory.yaml"
    path.write_text(whole, encoding="utf-8")
    read = yaml.safe_load(whole)[part]
    assert read.keys() > yaml.safe_load(text)[part].keys()
    load_inventory(path)
    if part == "service":
        # in place of those without an ending
        secrets = ("heartbeat", "status_token", "database_password")
        others = {f"{name}_{end}" for name in secrets for end in ("env", "file")}
        others |= {"database_password", "machine", "inventory"}     # of another `database`
        assert read.keys() == healthchecker.ServiceSettings.model_fields.keys() - others


# --- check ---------------------------------------------------------------------------------------------------
def test_check_says_what_would_change_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_inventory(tmp_path, "  - {hostname: a, username: u, password: p}\n" + CALM)
    before = files(tmp_path)
    assert main(["--inventory", str(path), "check"]) == 0
    assert files(tmp_path) == before, "no database and no keys are made"
    assert "2 added, 0 changed, 0 removed, 0 kept; added: a, calm" in capsys.readouterr().out
    stored(path)
    with closing(sqlite3.connect(tmp_path / "healthchecker.db")) as connection:
        dump = "\n".join(connection.iterdump())
        path = write_inventory(tmp_path, "  - {hostname: a, username: u, password: q}\n" + LOCAL)
        assert main(["--inventory", str(path), "check"]) == 0
        assert "\n".join(connection.iterdump()) == dump
    assert "1 added, 1 changed, 1 removed, 0 kept; added: here; changed: a; removed: calm" in capsys.readouterr().out


class Busy(io.StringIO):
    """A reader of what is printed, while others write into a database."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def write(self, text: str) -> int:
        with closing(sqlite3.connect(self.path, timeout=0, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
        return super().write(text)


def test_nobody_waits_for_what_check_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads that may stop, as a pager does."""
    path = write_inventory(tmp_path, CALM)
    prepared_keys(tmp_path)
    stored(path)
    monkeypatch.setattr(sys, "stdout", said := Busy(tmp_path / "healthchecker.db"))
    assert main(["--inventory", str(path), "check"]) == 0
    assert "is valid" in said.getvalue()


def test_check_of_a_bad_inventory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per fault, exit 2, and no database and no keys."""
    path = write_inventory(
        tmp_path,
        "  - {hostname: a, username: u, password: p, port: 0}\n"
        "  - {hostname: b, usernam: u, password: p, interval: 0}\n",
    )
    assert main(["--inventory", str(path), "check"]) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert output.out == ""
    assert all(re.match(r"inventory\.yaml:\d+:\d+: resources\[\d\]", line) for line in lines)
    assert {"6:51", "7:19", "7:54"} <= {line.split(": ")[0].partition(":")[2] for line in lines}
    assert [path.name for path in tmp_path.iterdir()] == ["inventory.yaml"]


BROKEN = """
import threading
print("loaded")
def begin():
    raise LookupError("their own words")
begin()
"""
HANGS = """
import threading
threading.Thread(target=threading.Event().wait).start()
def app(environ, start_response): ...
"""


@pytest.mark.long
def test_check_loads_the_application(tmp_path: Path) -> None:
    """In a process of its own, with the traceback of what went wrong in theirs and nothing of ours."""
    (tmp_path / "shop.py").write_text(BROKEN, encoding="utf-8")
    path = write_inventory(tmp_path, CALM, "  app: shop:app")
    done = subprocess.run(
        command(path, "check"), capture_output=True, encoding="utf-8", env=environment(), check=False, timeout=120
    )
    assert done.returncode == 2
    assert "service.app shop:app cannot be imported: LookupError: their own words" in done.stderr.splitlines()
    assert "in begin\n" in done.stderr and "healthchecker.py" not in done.stderr and "importlib" not in done.stderr
    assert "inventory.yaml is valid" in done.stdout, "the rest is said, too"
    assert not (tmp_path / "healthchecker.db").exists()


@pytest.mark.parametrize(("text", "code"), [(HANGS, 0), ("def app(): ...", 2), ("import os; os._exit(9)", 2)])
def test_check_of_an_application(text: str, code: int, tmp_path: Path) -> None:
    """Threads that it leaves running keep nobody; what it may not be is said as at a start."""
    (tmp_path / "shop.py").write_text(text, encoding="utf-8")
    assert run_cheaply("--inventory", str(write_inventory(tmp_path, CALM, "  app: shop:app")), "check")[0] == code


@pytest.mark.long
def test_check_of_an_application_that_never_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(healthchecker, "APP_WAIT", 3)
    (tmp_path / "shop.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    assert main(["--inventory", str(write_inventory(tmp_path, CALM, "  app: shop:app")), "check"]) == 2
    assert "is not loaded after 3 s" in capsys.readouterr().err


@pytest.mark.parametrize(("defaults", "is_said"), [
    ("{username: u, password: p}", True), ("{password: p}", True), ("{password_file: token}", True),
    ("{interval: 9}", False),
])  # fmt: skip
def test_what_has_no_login_is_named(
    defaults: str, is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of what logged in by `defaults` once, which are for machines: by check, start and reload."""
    rows = "".join(f"  - {{name: {name}, platform: http, url: 'http://127.0.0.1:9/'{more}}}\n" for name, more in (
        ("shop", ""), ("api", ", password: the-token-of-it")))
    (tmp_path / "token").write_text("the-token-of-all", encoding="utf-8")
    path = write_inventory(tmp_path, rows, f"defaults: {defaults}\n")
    line = "the login in defaults does not count for shop: write it there if it is meant"
    with Service(path) as service:
        service.wait_line("serving on")
        assert (line in service.output) == is_said
        for command in ("check", "reload"):
            caplog.clear()
            assert main(["--inventory", str(path), command]) == 0
            assert caplog.messages.count(line) == is_said


def test_check_goes_on_without_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_inventory(tmp_path, "  - {hostname: a, username: u, password: p}\n", "  metrics_token_file: gone")
    path.chmod(0o644)
    assert main(["--inventory", str(path), "check"]) == 2
    output = capsys.readouterr()
    assert "gone" in output.err and "inventory.yaml is valid" in output.out
    assert "Traceback" not in output.err and "Errno" not in output.err


@pytest.mark.long
@pytest.mark.parametrize("door", ["listen", "console"])
def test_check_looks_at_the_ports(door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = write_inventory(tmp_path, CALM, f"  {door}: 127.0.0.1:{taken.getsockname()[1]}")
        assert main(["--inventory", str(path), "check"]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(rf"cannot listen on 127.*another program uses that port.*service\.{door}\n", output.err)
    assert main(["--inventory", str(path), "check"]) == 0, "it holds no port afterwards"
    capsys.readouterr()


def test_check_beside_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ports are in use, and that is right."""
    with Service(write_inventory(tmp_path, CALM)) as service:
        path = write_inventory(tmp_path, CALM, f"  listen: 127.0.0.1:{service.port}")
        assert main(["--inventory", str(path), "check"]) == 0
        assert f"127.0.0.1:{service.port} is in use: by the service that runs" in capsys.readouterr().out


CIRCLES = {     # where it listens, the row, more of the inventory; whether the gate closes itself
    "itself": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/'", "", True),
    "a name": ("127.0.0.1", "url: 'http://localhost:PORT/a?b=/-/', expect: {status: [200]}", "", True),
    "on all addresses": ("0.0.0.0", "url: 'http://127.0.0.1:PORT/'", "", True),
    "another port": ("127.0.0.1", "url: 'http://127.0.0.1:1/'", "", False),
    "another host": ("127.0.0.1", "url: 'http://127.0.0.2:PORT/'", "", False),
    "does not count": ("127.0.0.1", "critical: false, url: 'http://127.0.0.1:PORT/'", "", False),
    "ours": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/-/livez'", "", False),
    "our readiness": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/-/readyz'", "", True),
    "our health": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/-/health'", "", True),
    "a refusal is good": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/', expect: {status: [200-599]}", "", False),
    "a path that is free": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/ping/a'", "routes: {/ping: []}", False),
    "a path that is not": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/pings'", "routes: {/ping: []}", True),
    "observed": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/'", "observe", False),
    "for a route alone": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/'", "routes: {/ping: [shop]}", False),
    "a route of its own": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/ping/a?b'", "routes: {/ping: [shop]}", True),
    "the route in another": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/p/q'", "routes: {/p: [shop], /p/q: []}", False),
    "a group": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/'", "groups: [{name: g, members: [shop]}]", True),
    "one of two": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/'",
                   "groups: [{name: g, members: [shop, other], healthy: any}]", False),
    "the group's health": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/-/readyz/g'",
                           "groups: [{name: g, members: [shop, other]}]\nroutes: {/x: [g]}", True),
    "the route's health": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/-/gate/x'", "routes: {/x: [shop]}", True),
    "another's health": ("127.0.0.1", "url: 'http://127.0.0.1:PORT/-/gate/y'",
                         "routes: {/x: [shop], /y: [other]}", False),
}


@pytest.mark.parametrize("case", CIRCLES)
def test_check_looks_for_a_gate_that_closes_itself(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once it refused what it depends on, it would for ever."""
    host, row, more, is_circle = CIRCLES[case]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    mode = "  mode: observe\n" if more == "observe" else ""
    rows = f"  - {{name: shop, platform: http, {row.replace('PORT', port)}}}\n  - {{name: other, platform: local}}\n"
    path = write_inventory(tmp_path, rows, f"{mode}  listen: {host}:{port}")
    path.write_text(path.read_text(encoding="utf-8") + ("" if mode else more), encoding="utf-8")
    assert main(["--inventory", str(path), "check"]) == 0
    said = [line for line in caplog.messages if "shop is asked through the gate that it closes" in line]
    assert len(said) == is_circle and all("/-/livez" in line for line in said)


@pytest.mark.long
@POSIX_ONLY
def test_a_start_tells_of_a_gate_that_closes_itself(tmp_path: Path) -> None:
    """Each of the ways that it names does open the gate."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        origin = f"127.0.0.1:{free.getsockname()[1]}"
    row = f"  - {{{{name: shop, platform: http, url: 'http://{origin}/{{}}', interval: 1, rise: 1{{}}}}}}\n"

    def inventory(path: str, more: str = "", routes: str = "") -> Path:
        made = write_inventory(tmp_path, CALM + row.format(path, more), f"  listen: {origin}")
        made.write_text(made.read_text(encoding="utf-8") + routes, encoding="utf-8")
        return made

    with Service(inventory("")) as service:
        service.wait_line("shop is asked through the gate that it closes")
        service.wait_line("expected status 200-299, came 503")
        for path, more in (("", ", critical: false"), ("-/livez", "")):
            assert main(["--inventory", str(inventory(path, more)), "reload"]) == 0
            wait_for(lambda: service.get("/").status == 200)
    only_page = ", expect: {status: [404]}"     # the built-in application has no other
    with Service(inventory("ping", only_page, "routes: {/ping: []}\n")) as service:
        wait_for(lambda: service.get("/").status == 200)


@pytest.mark.long
@POSIX_ONLY
def test_check_looks_at_who_can_read_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("word", "key", "token", "inventory.yaml")
    for name in names[:3]:
        (tmp_path / name).write_text("0123456789abcdef" * 2, encoding="utf-8")
    path = write_inventory(
        tmp_path,
        "  - {hostname: a, username: u, password_file: word}\n"
        "  - {hostname: b, username: u, key_file: key}\n  - {hostname: c, username: u, password: p}\n",
        "  metrics_token_file: token",
    )
    for mode, warned in ((0o644, True), (0o640, False), (0o604, True), (0o600, False)):
        for name in names:
            (tmp_path / name).chmod(mode)
        assert main(["--inventory", str(path), "check"]) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if "other users" in line]
        assert len(told) == (len(names) if warned else 0), told
        assert all(f"chmod o= {tmp_path / name}" in "\n".join(told) for name in names) or not warned


@POSIX_ONLY
@pytest.mark.parametrize(("row", "service", "holds"), [
    ("password_file: word", "", False),
    ("key_file: key, key_passphrase_file: word", "", False),
    ("key_file: key, key_passphrase: p", "", True),
    ("password_file: word", "  heartbeat: https://example.com/ping/4d3f", True),
    ("password_file: word", "  heartbeat_file: url", False),
    ("password: sealed", "", False),
    ("password: sealed", "  heartbeat: https://example.com/ping/4d3f", True),
])
def test_check_tells_which_inventory_holds_secrets(
    row: str, service: str, holds: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("word", "0123456789abcdef"), ("key", "key"), ("url", "https://example.com/ping/4d3f")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o600)
    path = write_inventory(tmp_path, f"  - {{hostname: a, username: u, {row}}}\n", service)
    if "sealed" in row:
        assert main(["--inventory", str(path), "seal"]) == 0
        capsys.readouterr()
    if holds:       # again: `seal` has sealed it, too
        path.write_text(re.sub("heartbeat: .*", service.strip(), path.read_text("utf-8")), encoding="utf-8")
    path.chmod(0o644)
    assert main(["--inventory", str(path), "check"]) == 0
    assert (f"{path} holds secrets" in capsys.readouterr().out) == holds


def test_a_probe_of_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_inventory(tmp_path, CALM + STORMY)
    assert main(["--inventory", str(path), "check", "--probe", "calm"]) == 0
    assert "stormy" not in capsys.readouterr().out.partition("NAME")[2]
    assert main(["--inventory", str(path), "check", "--probe", "clam"]) == 2
    assert "clam: no resource has this name; did you mean calm?" in capsys.readouterr().err


def rows(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in output.splitlines() if line.split()}


@NO_LOCAL
def test_probe(tmp_path: Path, closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of real figures; exit 1, since a critical resource is unhealthy."""
    dead = f"  - {{hostname: 127.0.0.1, name: dead, username: u, password: p, port: {closed_port}}}\n"
    path = write_inventory(tmp_path, LOCAL + CALM + dead)
    assert main(["--inventory", str(path), "check", "--probe"]) == 1
    output = capsys.readouterr()
    table = rows(output.out)
    assert (table["here"][1], table["calm"][1], table["dead"][1]) == ("healthy", "healthy", "unhealthy")
    assert "unreachable: 127.0.0.1 port" in " ".join(table["dead"])
    assert 0 < float(table["here"][4]) <= 100, "memory in percent"
    assert not output.err, "no progress bar into a file"
    assert not (tmp_path / "healthchecker.db").exists()


@pytest.mark.parametrize(
    ("resources", "code"),
    [("", 0), (CALM, 0), (STORMY, 1), (STORMY.replace("}", ", critical: false}"), 0)],
    ids=["none", "calm", "stormy", "not critical"],
)
def test_exit_code_of_probe(resources: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inventory", str(write_inventory(tmp_path, resources)), "check", "--probe"]) == code
    capsys.readouterr()


def test_probes_run_at_the_same_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """40 hosts that say nothing cost one time-out, not forty."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as silent:
        port = silent.getsockname()[1]
        many = "".join(
            f"  - {{hostname: 127.0.0.1, name: n{n}, username: u, password: p, port: {port}, timeout: 1}}\n"
            for n in range(40)
        )
        assert main(["--inventory", str(write_inventory(tmp_path, many)), "check", "--probe"]) == 1
    table = rows(capsys.readouterr().out)
    assert len(table) >= 41 and max(float(table[f"n{n}"][2]) for n in range(40)) < 20


@pytest.mark.long
def test_a_probe_counts_with_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who looks again and again what is wrong with a password, before the start and beside it, locks no account."""
    def inventory(password: str) -> list[str]:
        path = write_inventory(tmp_path, "".join(
            f"  - {{name: h{number}, hostname: 127.0.0.1, port: {host.port}, username: u, password: {password}}}\n"
            for number, host in enumerate(hosts)))  # fmt: skip
        return ["--inventory", str(path)]

    def tried() -> int:
        return sum((host.folder / "log").read_text("utf-8").count("Failed") for host in hosts)

    def probed(password: str) -> int:
        assert main([*inventory(password), "check", "--probe"]) == 1
        said = capsys.readouterr().out
        assert said.count("auth: ") == len(hosts) and "refused before" in said
        is_kept = (tmp_path / "healthchecker.db").exists()
        assert ("each probe shows wrong passwords again, and so will the start" in said) is not is_kept
        return tried()

    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(ParamikoSshd()) for _ in range(3)]
        assert probed("wrong") == 1, "neither the next one nor the start will know of it"
        with Service(Path(inventory("wrong")[1])):
            wait_for(lambda: tried() == 4)
            with closing(sqlite3.connect(tmp_path / "healthchecker.db")) as database:
                wait_for(lambda: sum(len(json.loads(text)["refused"]) for (text,) in database.execute(
                    "SELECT text FROM setting WHERE name LIKE 'logins/%'")) == 3)  # fmt: skip
            for _ in range(2):
                assert probed("wrong") == 4
            assert [probed("new") for _ in range(2)] == [5, 5], "a new one is tried once"
            assert main([*inventory("new"), "reload"]) == 0
            with closing(sqlite3.connect(tmp_path / "healthchecker.db")) as database:
                begun_at = database.execute("SELECT max(at) FROM event WHERE kind = 'change'").fetchone()
                wait_for(lambda: database.execute("SELECT count(*) FROM status WHERE polled_at > ?", begun_at)
                         .fetchone() == (3,))  # fmt: skip
        assert [probed("newest") for _ in range(2)] == [5, 5], "nor while it does not run"


def test_a_probe_counts_whatever_the_resource_is_called(tmp_path: Path) -> None:
    """A name, or a hostname, that is corrected in between: the account is the same."""
    prepared_database(tmp_path)
    with ParamikoSshd() as host:
        for name in "abcde":
            line = f"hostname: 127.0.0.1, port: {host.port}, username: u, password: wrong"
            path = write_inventory(tmp_path, f"  - {{name: {name}, {line}}}\n")
            assert main(["--inventory", str(path), "check", "--probe"]) == 1
        assert (host.folder / "log").read_text("utf-8").count("Failed") == 3


@pytest.mark.long
def test_a_probe_beside_who_writes_for_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No login waits for the database, and what cannot be written down is said once."""
    prepared_database(tmp_path)
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(ParamikoSshd(answer=lambda *_: 0)) for _ in range(2)]
        for host in hosts:
            host.password = "0123456789abcdef"
        path = write_inventory(tmp_path, "".join(
            f"  - {{name: h{number}, hostname: 127.0.0.1, port: {host.port}, username: monitor, timeout: 8,"
            " password: 0123456789abcdef}\n" for number, host in enumerate(hosts)))  # fmt: skip
        database = stack.enter_context(closing(sqlite3.connect(tmp_path / "healthchecker.db", isolation_level=None)))
        database.execute("BEGIN IMMEDIATE")
        main(["--inventory", str(path), "check", "--probe"])
    said = capsys.readouterr()
    assert "auth" not in said.out and "timeout" not in said.out, said.out
    assert (said.out + said.err).count("logins are not written down") <= 1


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal is a POSIX thing")
def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    path = write_inventory(tmp_path, CALM + CALM.replace("calm", "quiet"))
    terminal, side = os.openpty()
    try:
        subprocess.run(
            command(path, "check", "--probe"),
            stdout=subprocess.DEVNULL,
            stderr=side,
            check=True,
            env=environment(),
            timeout=120,
        )
        shown = ""
        while not shown.rstrip().endswith("] 2/2"):
            assert select.select([terminal], [], [], 60)[0], f"no end of {shown!r}"
            shown += os.read(terminal, 4096).decode()
    finally:
        os.close(side)
        os.close(terminal)
    assert shown.startswith("\r[")


# --- seal ----------------------------------------------------------------------------------------------------
def host(text: str) -> str:
    return f"resources:\n  - hostname: a\n    username: u\n    {text}"


SEALS: dict[str, tuple[str, str]] = {
    "plain": (host("password: p w  # why\n    port: 22\n"), host("password: TOKEN  # why\n    port: 22\n")),
    "single quotes": (host("password:   'p w'\n"), host("password:   TOKEN\n")),
    "double quotes": (host('password: "p w"   # why\n'), host("password: TOKEN   # why\n")),
    "quoted key": (host("\"password\" : 'p w'\n"), host('"password" : TOKEN\n')),
    "no newline at the end": (host("password: p w"), host("password: TOKEN")),
    "flow mapping": (
        "resources: [ {hostname: a, username: u, password: p w, port: 22} ]\n",
        "resources: [ {hostname: a, username: u, password: TOKEN, port: 22} ]\n",
    ),
    "flow, last": (
        "resources: [{hostname: a, username: u, password: 'p w'}]  # x\n",
        "resources: [{hostname: a, username: u, password: TOKEN}]  # x\n",
    ),
    "flow over lines": (
        "resources:\n- {hostname: a, # host\n   password: p\n     w, username: u}\n",
        "resources:\n- {hostname: a, # host\n   password: TOKEN, username: u}\n",
    ),
    "JSON": (
        '{"resources":[{"hostname":"a","username":"u","password":"p w"}]}',
        '{"resources":[{"hostname":"a","username":"u","password":TOKEN}]}',
    ),
    "literal block": (host("password: |-\n      p w\n    port: 22\n"), host("password: TOKEN\n    port: 22\n")),
    "folded block": (host("password: >-\n      p\n      w\n    port: 22\n"), host("password: TOKEN\n    port: 22\n")),
    "block at the end": (host("password: |-\n      p w\n"), host("password: TOKEN\n")),
    "block without newline": (host("password: |-\n      p w"), host("password: TOKEN")),
    "block and a comment below": (
        host("password: |-\n      p w\n\n    # the port\n    port: 22\n"),
        host("password: TOKEN\n\n    # the port\n    port: 22\n"),
    ),
    "block with a comment": (
        host("password: |-  # why\n      p w\n    port: 22\n"),
        host("password: TOKEN  # why\n    port: 22\n"),
    ),
    "over two lines": (host("password: p\n      w\n    port: 22\n"), host("password: TOKEN\n    port: 22\n")),
    "explicit key": (host("? password\n    : p w\n"), host("? password\n    : TOKEN\n")),
    "CRLF": (
        host("password: p w # x\n    port: 22\n").replace("\n", "\r\n"),
        host("password: TOKEN # x\n    port: 22\n").replace("\n", "\r\n"),
    ),
    "CRLF and block": (
        host("password: |-\n      p w\n    port: 22\n").replace("\n", "\r\n"),
        host("password: TOKEN\n    port: 22\n").replace("\n", "\r\n"),
    ),
    "BOM": ("\ufeff" + host("password: p w\n"), "\ufeff" + host("password: TOKEN\n")),
    "wide characters": (
        "# ä€😀\n" + host("name: 日本😀\n    password: p w # 😀\n"),
        "# ä€😀\n" + host("name: 日本😀\n    password: TOKEN # 😀\n"),
    ),
    "document marks": (
        "%YAML 1.1\n---\n" + host("password: p w\n...\n# end\n"),
        "%YAML 1.1\n---\n" + host("password: TOKEN\n...\n# end\n"),
    ),
    "the same text elsewhere": (
        host("name: p w\n    tags: [p w]\n    password: p w\n"),
        host("name: p w\n    tags: [p w]\n    password: TOKEN\n"),
    ),
    "passphrase": (
        host("key_file: key\n    key_passphrase: p w # x\n"),
        host("key_file: key\n    key_passphrase: TOKEN # x\n"),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("case", SEALS)
def test_seal_keeps_the_layout(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vault = prepared_vault(tmp_path)
    path = tmp_path / "inventory.yaml"
    (tmp_path / "key").write_bytes(b"")
    before, after = SEALS[case]
    path.write_bytes(before.encode())
    assert main(["--inventory", str(path), "seal"]) == 0
    text = path.read_bytes().decode()
    assert re.sub(r"(['\"]?)HC2\.[\w.-]+\1", "TOKEN", text) == after
    [resource] = load_inventory(path).resources
    [(kind, secret)] = resource.secrets.items()
    assert vault.open(secret, *binding(kind, resource)) == "p w"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["inventory.yaml", "key", "keys"]
    capsys.readouterr()


def test_seal_twice_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared_keys(tmp_path)
    path = write_inventory(
        tmp_path,
        "  - {hostname: a, username: u, password: p}\n  - {hostname: b, username: u, password_env: SEAL}\n" + CALM,
    )
    monkeypatch.setenv("SEAL", "word")
    assert main(["--inventory", str(path), "seal"]) == 0
    once = path.read_bytes()
    assert main(["--inventory", str(path), "seal"]) == 0
    assert path.read_bytes() == once and once.count(b"HC2.") == 1
    assert capsys.readouterr().out.splitlines() == [
        "inventory.yaml: 1 secrets sealed",
        "inventory.yaml: 0 secrets sealed",
    ]


@pytest.mark.long
@POSIX_ONLY
def test_commands_that_need_no_secret_need_no_variables_of_the_service(tmp_path: Path, closed_port: int) -> None:
    """They stand in the unit's environment alone, and not in that of the shell of who looks, or closes the gate."""
    prepared_keys(tmp_path)
    write_private(tmp_path / "key", make_key("ed25519"))
    variables = {"ONE": "http://127.0.0.1:9/heart", "TWO": "a-token-of-20-letters", "THREE": "json://127.0.0.1:9/x",
                 "FOUR": "s3cret"}
    host = f"hostname: 127.0.0.1, port: {closed_port}, username: u, critical: false, fall: 1"
    rows = (f"{CALM}  - {{{host}, name: a, password_env: FOUR}}\n"
            f"  - {{{host}, name: b, key_file: key, key_passphrase_env: FOUR, endpoint: true}}\n"
            "notify: [{name: ops, url_env: THREE}]\n")
    path = write_inventory(tmp_path, rows, "  heartbeat_env: ONE\n  status_token_env: TWO\n  lease_file: lease\n")
    with Service(path, env=variables) as service:
        service.wait_status("/-/readyz", 200)
        wait_for(lambda: "has not said yet" not in run_cheaply("--inventory", str(path), "status")[1])
        for words, code, told in (
            ("status calm", 0, "OPEN: calm healthy"), ("gate close --reason x", 0, "closed by command line: x"),
            ("gate auto", 0, "runs"), ("maintenance list", 0, "NUMBER"), ("trust a", 1, "connection refused"),
            ("user list", 0, "SpiceWorks"), ("seal", 0, "0 secrets sealed"), ("endpoint b", 0, "/bin/sh"),
            ("middleware", 0, "def "), ("reload", 2, "check and reload need it, too, as the service does"),
            ("check", 2, "resources[1].password_env: this environment variable is not set here"),
        ):
            assert (answer := run_cheaply("--inventory", str(path), *words.split()))[0] == code and told in answer[1], (
                words, answer)
        os.kill(service.pid, signal.Signals["SIGHUP"])      # the service knows them
        service.wait_line("inventory: 0 added, 0 changed, 0 removed, 3 kept")


def test_seal_says_what_it_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A password in `defaults` belongs to many and cannot be sealed, nor one of a range of hosts."""
    prepared_keys(tmp_path)
    path = tmp_path / "inventory.yaml"
    one, several = "{hostname: a, username: u, password: p}", "{hostname: 'b[1:2]', username: u, password: p}"
    path.write_text(f"defaults: {{password: p}}\nresources:\n- {several}\n- {one}\n", encoding="utf-8")
    assert main(["--inventory", str(path), "seal"]) != 0
    told = capsys.readouterr()
    assert [line.partition(",")[0] for line in told.err.splitlines()] == [
        "password in line 1 stays plain",
        "password in line 3 stays plain",
    ]
    assert "1 secrets sealed" in told.out and path.read_text("utf-8").count("HC2.") == 1
    assert load_inventory(path).resources[-1].secrets["password"].startswith("HC2.")


def test_check_names_what_everybody_can_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a secret in it, too: whoever writes there has a command run by the service's account."""
    prepared_keys(tmp_path)
    path = write_inventory(tmp_path, CALM)
    for access, mode, said in (("D:P(A;;FA;;;BA)(A;;FR;;;WD)", 0o604, 0), ("D:P(A;;FA;;;BA)(A;;FW;;;WD)", 0o606, 1)):
        if sys.platform == "win32":
            healthchecker.set_access(path, access)
        else:
            path.chmod(mode)
        assert main(["--inventory", str(path), "check"]) == 0
        assert capsys.readouterr().out.count(f"{path} can be changed by all other users") == said


@POSIX_ONLY
def test_seal_keeps_link_and_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = tmp_path / "real"
    real.mkdir()
    prepared_keys(tmp_path)
    target = write_inventory(real, "  - {hostname: a, username: u, password: p}\n")
    target.chmod(0o640)
    link = tmp_path / "inventory.yaml"
    link.symlink_to("real/inventory.yaml")
    assert main(["--inventory", str(link), "seal"]) == 0
    assert link.is_symlink() and b"HC2." in target.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert [path.name for path in real.iterdir()] == ["inventory.yaml"]
    capsys.readouterr()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can give a file away")
def test_seal_as_root_keeps_the_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or the service, which runs as somebody else, cannot read its inventory any more."""
    prepared_keys(tmp_path)
    path = write_inventory(tmp_path, "  - {hostname: a, username: u, password: p}\n")
    os.chown(path, NOBODY, NOBODY)
    assert main(["--inventory", str(path), "seal"]) == 0
    assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY)
    capsys.readouterr()


def stored_password(path: Path, name: str) -> str:
    with closing(sqlite3.connect(path.parent / "healthchecker.db")) as connection:
        query = "SELECT password, name, hostname, username, CAST(port AS TEXT) FROM resource WHERE name = ?"
        token, *row = connection.execute(query, (name,)).fetchone()
    return Vault(path.parent / "keys").open(token, "password", *row)


@pytest.mark.long
def test_seal_start_rotate_start(tmp_path: Path, closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole life of a password; it still opens in the end."""
    prepared_keys(tmp_path)
    path = write_inventory(
        tmp_path, f"  - {{hostname: 127.0.0.1, name: a, username: u, password: 'p w', port: {closed_port}}}\n" + CALM
    )
    assert main(["--inventory", str(path), "seal"]) == 0
    assert capsys.readouterr().out == "inventory.yaml: 1 secrets sealed\n"
    stored(path)
    assert stored_password(path, "a") == "p w"
    old = path.read_bytes()
    assert main(["--inventory", str(path), "keys", "rotate"]) == 0
    assert re.fullmatch(r"secrets are sealed with key [0-9a-f]{16} now\n", capsys.readouterr().out)
    assert path.read_bytes() != old and stored_password(path, "a") == "p w"
    with Service(path) as service:
        service.wait_line("inventory: 0 added, 0 changed, 0 removed, 2 kept")
        assert main(["--inventory", str(path), "keys", "rotate"]) == 4, "the service runs"


def test_every_secret_that_a_lost_key_has_sealed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of whatever is one; by its place in the inventory, as long as any is left."""
    prepared_keys(tmp_path)
    rows = "".join(f"  - {{name: a{number}, platform: push, password: {'p' * 16}}}\n" for number in range(60))
    more = "notify:\n  - name: ops\n    url: 'json://127.0.0.1:9'\n"
    path = write_inventory(
        tmp_path, rows + more, f"  heartbeat: http://127.0.0.1:9/\n  status_token: {'t' * 16}\n"
    )
    plain = path.read_text(encoding="utf-8")
    assert main(["--inventory", str(path), "seal"]) == 0
    (tmp_path / "keys" / "private.pem").unlink()
    sealed = path.read_text(encoding="utf-8").splitlines()
    places = [f"{path.name}:{number}" for number, line in enumerate(sealed, 1) if "HC2." in line]
    assert len(places) == 63 and main(["--inventory", str(path), "check"]) == 3
    told = f"write every secret in the inventory again ({', '.join(places[:50])} and 13 more) and run `keys replace`"
    assert told in capsys.readouterr().err
    left = [here if "heartbeat" in here else there for here, there in zip(sealed, plain.splitlines(), strict=True)]
    path.write_text("\n".join(left), encoding="utf-8")
    assert main(["--inventory", str(path), "check"]) == 3
    assert f"again ({places[0]}) and run `keys replace`" in capsys.readouterr().err
    path.write_text(plain, encoding="utf-8")
    assert main(["--inventory", str(path), "check"]) == 0


@pytest.mark.long
@pytest.mark.parametrize("sealed", [False, True])
def test_a_lost_key(
    sealed: bool, tmp_path: Path, closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way back, with every secret of the inventory plain again: accounts and history stay."""
    prepared_keys(tmp_path)
    host = f"hostname: 127.0.0.1, username: u, port: {closed_port}"
    path = write_inventory(tmp_path, f"  - {{name: a, {host}, password: 'p w'}}\n" + CALM)
    plain = path.read_bytes()
    stored(path)
    with closing(healthchecker.Store(tmp_path / "healthchecker.db")) as store, store.writing() as session:
        session.add(healthchecker.User.create("operator", "a good password"))
        vault, row = Vault(tmp_path / "keys"), healthchecker.Resource(origin="api")
        settings = {"name": "added", "hostname": "127.0.0.1", "username": "u", "password": "p", "port": closed_port}
        healthchecker.update_row(row, healthchecker.ResourceSettings.model_validate(settings), vault)
        session.add(row)
        healthchecker.record_event(session, "change", "before", resource="a")
    if sealed:
        assert main(["--inventory", str(path), "seal"]) == 0
    assert main(["--inventory", str(path), "keys", "replace"]) == 2, "no key is lost"
    (tmp_path / "keys" / "private.pem").unlink()
    assert main(["--inventory", str(path), "check"]) == 3
    line = 1 + plain.partition(b"name: a,")[0].count(b"\n")
    where = f" (inventory.yaml:{line})" if sealed else ""
    hint = f"write every secret in the inventory again{where} and run `keys replace`"
    assert hint in capsys.readouterr().err
    if sealed:
        assert main(["--inventory", str(path), "keys", "replace"]) == 3
        assert hint in capsys.readouterr().err
        assert not (tmp_path / "keys" / "private.pem").exists()
        path.write_bytes(plain)
    assert main(["--inventory", str(path), "keys", "replace"]) == 0
    assert re.fullmatch(r"added: write its password again, in the console\nsecrets are sealed with key [0-9a-f]{16} "
                        r"now\n", capsys.readouterr().out)
    assert stored_password(path, "a") == "p w" and main(["--inventory", str(path), "keys", "rotate"]) == 0
    with closing(healthchecker.Store(tmp_path / "healthchecker.db")) as store, store.reading() as session:
        assert healthchecker.find_user(session, "operator").verify("a good password")
        texts = [event.text.partition(" sealed")[0] for event in healthchecker.events(session)]
        assert texts[0] == "secrets are" and "in place of a lost one" in texts[1] and texts[-1] == "before"
    with Service(path) as service:
        service.wait_line("added: unknown -> unhealthy (credential: added: its password is gone, with a lost key")


# --- trust ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("dead", 1, "127.0.0.1 port"),
        ("ded", 2, "did you mean dead?"),
        ("zzz", 2, "zzz: no resource has this name"),
        ("calm", 2, "calm has no host key"),
        ("pinned", 2, "the settings of pinned pin its key; change it in the inventory"),
    ],
)
def test_trust(
    name: str, code: int, message: str, tmp_path: Path, closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ssh = f"hostname: 127.0.0.1, username: u, password: p, port: {closed_port}"
    path = write_inventory(
        tmp_path, f"  - {{{ssh}, name: dead}}\n  - {{{ssh}, name: pinned, host_key: 'SHA256:{'a' * 43}'}}\n" + CALM
    )
    prepared_keys(tmp_path)
    assert main(["--inventory", str(path), "trust", name]) == 2
    assert capsys.readouterr().err == "there is no database yet; start the service first\n"
    stored(path)
    assert main(["--inventory", str(path), "trust", name]) == code
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


OFFERED = "ssh-ed25519 SHA256:" + "k" * 43


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("given", "typed", "refusal"),
    [
        (["--key", OFFERED.split()[1]], None, ""),
        (["--key", OFFERED], None, ""),
        (["--key", "SHA256:" + "x" * 43], "y", "another key"),
        (["--key", ""], None, "no terminal"),
        (["--yes"], None, ""),
        ([], None, "no terminal"),
        ([], "yes\n", ""),
        ([], "\n", "nothing was changed"),
        ([], "n\n", "nothing was changed"),
    ],
)
def test_trust_asks(given: list[str], typed: str | None, refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO() if typed is None else Terminal(typed))
    arguments = healthchecker.command_line().parse_args(["trust", "x", *given])
    with pytest.raises(UsageError, match=refusal) if refusal else contextlib.nullcontext():
        healthchecker.confirm(OFFERED, arguments)


def one_line(output: str) -> str:
    """The one line that a start says that cannot be; a slow one says how far it is before."""
    [line] = [line for line in output.splitlines() if "worker processes are ready" not in line]
    return line


# --- starts that cannot be -----------------------------------------------------------------------------------
def test_app_that_cannot_be_imported(tmp_path: Path) -> None:
    """One line, and nothing is written."""
    (tmp_path / "mysite.py").write_text("def create_app(): ...", encoding="utf-8")
    path = write_inventory(tmp_path, CALM, service="  app: mysite:create_app")
    code, output = run_cheaply("--inventory", str(path))
    assert code == 2 and "for a factory write `module:factory()`" in one_line(output)
    assert not (tmp_path / "healthchecker.db").exists() and not (tmp_path / "keys").exists()


APP = """\
import json
import healthchecker

def app(environ, start_response):
    same = type(environ["healthchecker.is_healthy"].__self__) is healthchecker.Gate
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps([same, environ["healthchecker.is_healthy"](), environ["PATH_INFO"]]).encode()]
"""


def test_app_behind_the_gate(tmp_path: Path) -> None:
    """It comes from the inventory's folder, may ask for the health, and imports the running program. (Run as a script:
    test_workers.py.)"""
    (tmp_path / "mysite.py").write_text(APP, encoding="utf-8")
    with Service(write_inventory(tmp_path, CALM, service="  app: mysite:app")) as service:
        service.wait_status("/-/readyz", 200)
        assert service.get("/a/b").body == '[true, true, "/a/b"]'


@pytest.mark.parametrize("door", ["listen", "console"])
def test_port_in_use(tmp_path: Path, door: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = write_inventory(tmp_path, CALM, f"  {door}: 127.0.0.1:{taken.getsockname()[1]}")
        code, output = run_cheaply("--inventory", str(path))
    assert code == 2
    advice = f"another program uses that port; stop it, or write another port at service.{door}"
    assert re.fullmatch(rf"cannot listen on 127\.0\.0\.1:\d+: {advice}\n", output)
    assert not (tmp_path / "healthchecker.db").exists()


BAD_STARTS: dict[str, tuple[str, int, str]] = {
    "address of another machine": ("listen: 192.0.2.1:0", 2, "192.0.2.1:0: this machine has no such address"),
    "console of another machine": ("console: 192.0.2.1:0", 2, "or 0.0.0.0 at service.console"),
    "one door": ("listen: 127.0.0.1:8081\n  console: 127.0.0.1:8081", 2, "is the address of service.listen"),
    "serving in the main process": ("workers: 0", 2, "is gone: write 1"),
    "name that does not resolve": ("listen: no-such-name.invalid:0", 2, "cannot listen on"),
    "name that is too long": (f"listen: {'a' * 70}.invalid:0", 2, "cannot listen on"),
    "name with an empty label": ("listen: a..b:0", 2, "cannot listen on"),
    "log file in a missing folder": ("log_file: nowhere/log", 2, "service.log_file"),
    "log file is a folder": ("log_file: .", 2, "service.log_file"),
    "keys is a file": ("keys: file", 3, "file"),
    "database is a folder": ("database: sqlite:///folder", 4, "folder"),
    "database in a missing folder": ("database: sqlite:///nowhere/x.db", 4, "nowhere/x.db"),
}


@pytest.mark.parametrize("command", [["check"], []], ids=["check", "start"])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.1"])
def test_equal_doors(tmp_path: Path, command: list[str], host: str) -> None:
    """However they are written, a check says what a start does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = write_inventory(tmp_path, "", f"  listen: 127.0.0.1:{port}\n  console: {host}:{port}")
    code, output = run_cheaply("--inventory", str(path), *command)
    assert code == 2
    assert f"service.console {host}:{port} is the address of service.listen; write another port, or off" in output


def bad_start(case: str, folder: Path) -> tuple[Path, int, str]:
    """An inventory, and the exit code and words with which its start ends."""
    setting, code, message = BAD_STARTS[case]
    if not setting.startswith("keys"):
        prepared_keys(folder)
    (folder / "file").touch()
    (folder / "folder").mkdir()
    return write_inventory(folder, CALM, service=f"  {setting}"), code, message


WITHOUT_STREAMS = "import sys; sys.stdout = sys.stderr = None; import healthchecker; sys.exit(healthchecker.main())"


@pytest.mark.parametrize(("text", "log_file", "code", "words"), [
    ("service: {log_file: logs/hc.log}\nresources: [{name: a, platform: no}, {name: b, platform: no}]",
     "logs/hc.log", 2, ["inventory.yaml:2:33: ", "inventory.yaml:2:58: "]),
    ("service: {listen: '127.0.0.1:0', console: off, log_file: logs/hc.log, keys: file}\nresources: []",
     "logs/hc.log", 3, ["file"]),
    ("service: {log_file: no/hc.log}\nresources: []", "healthchecker.log", 2, ["service.log_file"]),
    ("service: {listen: '192.0.2.1:0'}\nresources: []", "healthchecker.log", 2, ["this machine has no such address"]),
    ("service: [", "healthchecker.log", 2, ["not valid YAML"]), ("", "healthchecker.log", 2, ["cannot be read"]),
])  # fmt: skip
def test_a_start_without_streams_says_in_the_log_why_it_ends(
        text: str, log_file: str, code: int, words: list[str], tmp_path: Path) -> None:
    """As under pythonw, where nobody sees anything else."""
    prepared_keys(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / "inventory.yaml"
    if text:
        path.write_text(text, encoding="utf-8")
    program = [sys.executable, "-c", WITHOUT_STREAMS, "--inventory", str(path)]
    done = subprocess.run(program, cwd=PROGRAM.parent, env=environment(), capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")
    lines = [line for line in (tmp_path / log_file).read_text(encoding="utf-8").splitlines() if " ERROR " in line]
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True)), lines


@pytest.mark.parametrize("case", BAD_STARTS)
def test_check_of_a_start_that_cannot_be(case: str, tmp_path: Path) -> None:
    """It says what the start would say, and leaves nothing behind."""
    path, code, message = bad_start(case, tmp_path)
    before = files(tmp_path)
    got, output = run_cheaply("--inventory", str(path), "check")
    assert got == code and message in output and files(tmp_path) == before


@pytest.mark.parametrize("case", BAD_STARTS)
def test_start_that_cannot_be(case: str, tmp_path: Path) -> None:
    path, code, message = bad_start(case, tmp_path)
    got, output = run_cheaply("--inventory", str(path))
    assert got == code and message in one_line(output)


def contents(folder: Path) -> dict[str, object]:
    """All files; the database by its rows, since opening it may move bytes between its files."""
    with closing(sqlite3.connect(folder / "healthchecker.db")) as connection:
        rows = list(connection.iterdump())
    return {"rows": rows, **{name: content for name, content in files(folder).items() if ".db" not in name}}


def locked(name: str, mode: int) -> Callable[[Path], None]:
    def lock(folder: Path) -> None:
        (folder / name).chmod(mode)

    return lock


UNREADABLE: dict[str, tuple[list[str], Callable[[Path], None], set[int]]] = {
    "inventory": (["check"], locked("inventory.yaml", 0), {2}),
    "folder": (["check"], locked(".", 0), {2}),
    "keys": (["check"], locked("keys", 0), {3}),
    "keys, start": ([], locked("keys", 0), {3}),
    "private key": (["check"], locked("keys/private.pem", 0), {3}),
    "database": (["check"], locked("healthchecker.db", 0), {4}),
    "database, start": ([], locked("healthchecker.db", 0o400), {4}),
    "folder not writable, start": ([], locked(".", 0o500), {4}),
    "folder not writable, seal": (["seal"], locked(".", 0o500), {2, 3, 4}),
    "folder not writable, rotate": (["keys", "rotate"], locked(".", 0o500), {2, 3, 4}),
    "keys not writable, rotate": (["keys", "rotate"], locked("keys", 0o500), {3}),
}


@POSIX_ONLY
@pytest.mark.parametrize("case", UNREADABLE)
def test_without_the_right_to(case: str, tmp_path: Path) -> None:
    """One line with a fitting exit code; root's tests run it without root's rights."""
    arguments, lock, codes = UNREADABLE[case]
    path = write_inventory(tmp_path, "  - {hostname: a, username: u, password: p}\n")
    stored(path)
    before = contents(tmp_path)
    modes = {each: each.stat().st_mode for each in (tmp_path, *sorted(tmp_path.rglob("*")))}
    lock(tmp_path)
    changed = {each for each, mode in modes.items() if os.path.exists(each) and each.stat().st_mode != mode}
    try:
        code, output = run_cheaply("--inventory", str(path), *arguments, unprivileged=True)
    finally:
        for each, mode in modes.items():
            each.chmod(mode)
    said = output.replace("\n", "", case == "keys" and not ROOT)    # nor may it be written
    assert code in codes and one_line(said), output
    assert "backup" not in output and "the right one" not in output     # for nothing is damaged
    assert "chmod" not in output or any(f"chmod u+{right} {name}\n" in output for right in ("r", "w", "x", "wx")
                                        for name in changed), output  # fmt: skip
    assert contents(tmp_path) == before


# --- secrets -------------------------------------------------------------------------------------------------
CANARIES = {name: f"C4N4RY-{name}-7f3a" for name in ("plain", "env", "file", "phrase", "slip")}


def test_no_secret_anywhere(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logs, database, keys, answers and the output of every command, while logins fail and keys change hands."""
    ssh = f"hostname: 127.0.0.1, username: u, port: {closed_port}, interval: 1, fall: 1"
    (tmp_path / "password.txt").write_text(CANARIES["file"], encoding="utf-8")
    (tmp_path / "id").write_text(f"no key, {CANARIES['phrase']}", encoding="utf-8")
    monkeypatch.setenv("HEALTHCHECKER_CANARY", CANARIES["env"])
    prepared_keys(tmp_path)
    path = write_inventory(
        tmp_path,
        f"  - {{{ssh}, name: plain, password: {CANARIES['plain']}}}\n"
        f"  - {{{ssh}, name: env, password_env: HEALTHCHECKER_CANARY}}\n"
        f"  - {{{ssh}, name: file, password_file: password.txt}}\n"
        f"  - {{{ssh}, name: phrase, key_file: id, key_passphrase: {CANARIES['phrase']}}}\n",
        service="  log_file: log.txt",
    )
    arguments = ["--inventory", str(path)]
    assert main([*arguments, "check", "--probe"]) == 1
    with Service(path, env={"HEALTHCHECKER_CANARY": CANARIES["env"]}) as service:
        service.wait_line("plain: unknown -> unhealthy")
        service.wait_line("phrase: unknown -> unhealthy")
        answers = [service.get(target) for target in ("/", "/-/health", "/-/readyz", "/-/gate", "/-/nothing")]
    logged = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert sorted(logged.splitlines()) == sorted(service.output.splitlines())  # of two threads either may be first
    for command_line in (["seal"], ["trust", "plain"], ["keys", "rotate"], ["check"]):
        main([*arguments, *command_line])
    sealed = path.read_bytes()
    for slip in ("password: &a ", "pasword: ", "password: !", "port: ", ""):
        path.write_bytes(sealed + f"  - {{hostname: x, username: u, {slip}{CANARIES['slip']}}}\n".encode())
        assert main([*arguments, "check"]) == 2
    path.write_bytes(sealed)
    output = capsys.readouterr()
    assert "127.0.0.1 port" in output.out and "anchors" in output.err
    for secret_file in ("password.txt", "id"):
        (tmp_path / secret_file).unlink()
    found = {"output": f"{output}{service.output}{answers}".encode(), **files(tmp_path)}
    assert {"healthchecker.db", "log.txt", "inventory.yaml"} <= found.keys()
    for canary in CANARIES.values():
        forms = (canary.encode(), base64.b64encode(canary.encode())[:-4], canary.encode("utf-16-le"))
        assert not [name for name, content in found.items() if any(form in content for form in forms)], canary


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to another process there")
def test_interrupt_during_a_command(tmp_path: Path) -> None:
    """Ctrl-C in a long probe: exit 130 and no traceback."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; a child would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(90)
        port = silent.getsockname()[1]
        path = write_inventory(
            tmp_path, f"  - {{hostname: 127.0.0.1, username: u, password: p, port: {port}, timeout: 8}}\n"
        )
        process = subprocess.Popen(
            command(path, "check", "--probe"),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment(),
            encoding="utf-8",
        )
        with process, contextlib.closing(silent.accept()[0]):
            process.send_signal(2)
            try:
                _, error = process.communicate(timeout=60)
            finally:
                process.kill()
    assert (process.returncode, error) == (130, "")


INTERRUPTED = """
import os, sys
class Finder:
    def find_spec(name, *_):
        if name == "sqlalchemy":
            os.kill(os.getpid(), 2)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to another process there")
def test_interrupt_of_a_start(tmp_path: Path) -> None:
    """Ctrl-C while modules are imported ends a command as it ends `cat`, without a word."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED, encoding="utf-8")
    done = subprocess.run(
        command(write_inventory(tmp_path, CALM), "check"), capture_output=True, encoding="utf-8", timeout=120,
        check=False, env=environment({"PYTHONPATH": str(tmp_path)}),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip  # not as a shell's background job
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="there a pipe without a reader is no EPIPE")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("word", "code"), [("check", 1), ("--help", 1), ("reload", 2)])
def test_output_that_nobody_reads(tmp_path: Path, word: str, code: int, both: bool, unbuffered: str) -> None:
    """As in `check | head -1`: nothing is wrong with the inventory, and nobody is told of anything else either."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(write_inventory(tmp_path, CALM), word), stdout=writer, stderr=writer if both else subprocess.PIPE,
        encoding="utf-8", env=environment({"PYTHONUNBUFFERED": unbuffered}), check=False, timeout=120)  # fmt: skip
    os.close(writer)
    said = done.stderr or ""
    assert "Errno" not in said and "Exception" not in said and bool(said) is (word == "reload" and not both), done
    assert done.returncode == (1 if both else code) or (word, unbuffered) == ("--help", "1"), "argparse passes it over"


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is of Linux")
def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            command(write_inventory(tmp_path, CALM), "--help"), stdout=full, stderr=subprocess.PIPE, encoding="utf-8",
            env=environment({"PYTHONUNBUFFERED": ""}), check=False, timeout=120)  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "cannot be written" in done.stderr, done


@POSIX_ONLY
def test_who_may_not_see_whether_the_service_runs_is_told_so(tmp_path: Path) -> None:
    """And not that another program has its port, which one would stop."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"  listen: 127.0.0.1:{taken.getsockname()[1]}"
        path, lock = write_inventory(tmp_path, LOCAL, listen), tmp_path / "healthchecker.db.lock"
        stored(path)
        lock.touch(0)
        code, output = run_cheaply("--inventory", str(path), "check", unprivileged=True)
    assert code == 4 and "may not read it; run" in output and "uses that port" not in output


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is of Linux")
def test_a_token_that_nobody_could_read_is_none(tmp_path: Path) -> None:
    prepared_database(tmp_path)
    path = write_inventory(tmp_path, CALM)
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            command(path, "user", "token", "add", FIRST_USER[0], "nightly"), stdout=full, stderr=subprocess.PIPE,
            encoding="utf-8", env=environment(), check=False, timeout=120)  # fmt: skip
    assert done.returncode == 2 and "no token is made" in done.stderr and done.stderr.count("\n") == 1, done
    code, output = run_cheaply("--inventory", str(path), "user", "token", "list")
    assert code == 0 and "nightly" not in output
