"""Backup and restore: one archive of database, keys and inventory, made while the service runs."""

from __future__ import annotations

import errno
import gzip
import itertools
import os
import shutil
import sqlite3
import stat
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from conftest import wait_for
from service import Service, prepared_keys, run_cheaply, write_inventory
from test_crashes import prepare
from test_storage import dump
from test_vault import all_open, installation

import healthchecker
from healthchecker import Vault, main

RESOURCES = """\
  - {hostname: 127.0.0.1, name: a, username: u, password: 'p w', port: 9, critical: false}
  - {hostname: 127.0.0.1, name: b, username: u, password_file: word, port: 9, critical: false}
  - {name: calm, platform: simulated, mean_healthy: 100000, interval: 1}
"""


def passwords(folder: Path) -> dict[str, str]:
    """What the keys of a folder open of its database."""
    setup = healthchecker.Installation(folder / "inventory.yaml")
    with closing(healthchecker.Store(setup.database)) as store, store.reading() as session:
        targets = healthchecker.load_targets(session, Vault(setup.service.keys))
        return {name: target.settings.secrets.get("password", "") for name, target in targets.items()}


def count(folder: Path, table: str) -> int:
    with closing(sqlite3.connect(folder / "healthchecker.db")) as connection:
        return int(connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In old/ is what a service that has run leaves; while it did, it was saved to saved.tgz."""
    made = tmp_path_factory.mktemp("ran")
    (made / "old").mkdir()
    (made / "old" / "word").write_text("from a file", encoding="utf-8")
    path = write_inventory(made / "old", RESOURCES)
    with Service(path) as service:
        service.wait_status("/-/readyz", 200)
        wait_for(lambda: count(path.parent, "event"))
        assert main(["--inventory", str(path), "backup", str(made / "saved.tgz")]) == 0
    return made


@pytest.fixture
def served(ran: Path, tmp_path: Path) -> Path:
    """The folder of a service that has run, and beside it saved.tgz, for one test."""
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)
    return tmp_path / "old"


def test_there_and_back(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was saved while serving starts in another folder: accounts, trust, history and secrets."""
    saved, folder = tmp_path / "saved.tgz", tmp_path / "new"
    if sys.platform != "win32":
        assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    folder.mkdir()
    path = folder / "inventory.yaml"
    assert main(["--inventory", str(path), "restore", str(saved)]) == 0
    assert "where a password was refused since, start it 31 minutes after that" in capsys.readouterr().out
    assert path.read_bytes() == (served / "inventory.yaml").read_bytes()
    files = {"inventory.yaml", "healthchecker.db", "private.pem", "public.pem"}
    found = {file.name for file in folder.rglob("*") if file.is_file()}
    assert files <= found <= files | {"healthchecker.db-wal", "healthchecker.db-shm"}
    if sys.platform != "win32":
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()} == {0o600}
    (folder / "word").write_text("from a file", encoding="utf-8")   # not in it: README says so
    assert passwords(folder) == {"a": "p w", "b": "from a file", "calm": ""}
    assert count(folder, "user") == 1 and count(folder, "event") > 0
    with Service(path) as service:
        service.wait_line("inventory: 0 added, 1 changed, 0 removed, 2 kept; changed: b")  # its file is here now
        service.wait_status("/-/readyz", 200)


@pytest.mark.parametrize("first", [True, False])
def test_a_rotation_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """Before the database is read, or after it: what is saved opens with the keys that are saved with it."""
    (tmp_path / "old").mkdir()
    path, turns, copy = installation(tmp_path / "old"), ["keys", "rotate"], healthchecker.SqliteFile.copy

    def copy_and_rotate(database: healthchecker.SqliteFile, target: Path) -> None:
        for step in (True, False):
            if step is not first:
                copy(database, target)
            elif turns:
                assert run_cheaply("--inventory", str(path), *turns)[0] == 0
                turns.clear()

    before = all_open(path)
    with monkeypatch.context() as patch:
        patch.setattr(healthchecker.SqliteFile, "copy", copy_and_rotate)
        assert main(["--inventory", str(path), "backup", str(tmp_path / "saved.tgz")]) == 0
    (tmp_path / "new").mkdir()
    assert main(["--inventory", str(tmp_path / "new" / path.name), "restore", str(tmp_path / "saved.tgz")]) == 0
    assert all_open(tmp_path / "new" / path.name) == all_open(path) != before


@pytest.mark.long
def test_beside_rotations(tmp_path: Path) -> None:
    """The same at any moment, again and again."""
    (tmp_path / "old").mkdir()
    path, over, codes, keys = installation(tmp_path / "old"), threading.Event(), list[int](), set[str]()

    def rotate() -> None:
        while not over.is_set():
            codes.append(run_cheaply("--inventory", str(path), "keys", "rotate")[0])

    with ThreadPoolExecutor(1) as pool, ExitStack() as ending:
        rotating = pool.submit(rotate)
        ending.callback(over.set)
        for number in itertools.count():
            if number >= 12 and len(keys) > 2:
                break
            assert not rotating.done()
            saved, folder = tmp_path / f"{number}.tgz", tmp_path / f"new{number}"
            assert main(["--inventory", str(path), "backup", str(saved)]) == 0
            folder.mkdir()
            assert main(["--inventory", str(folder / path.name), "restore", str(saved)]) == 0
            keys |= all_open(folder / path.name)
    assert {*codes} == {0}


def test_api_tokens_come_back(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they were: also what was revoked since, and the command says so."""
    old = ["--inventory", str(served / "inventory.yaml")]
    with closing(healthchecker.Store(served / "healthchecker.db")) as store, store.writing() as session:
        session.add(healthchecker.User.create("robot", "x" * 12, "viewer"))
    assert main([*old, "user", "token", "add", "robot", "nightly"]) == 0
    token = capsys.readouterr().out.strip()
    assert main([*old, "backup", str(tmp_path / "later.tgz")]) == 0
    assert main([*old, "user", "token", "revoke", "robot", "nightly"]) == 0
    (tmp_path / "new").mkdir()
    new = ["--inventory", str(tmp_path / "new" / "inventory.yaml")]
    capsys.readouterr()
    assert main([*new, "restore", str(tmp_path / "later.tgz")]) == 0
    assert "users and API tokens are as they were then" in capsys.readouterr().out
    with closing(sqlite3.connect(tmp_path / "new" / "healthchecker.db")) as connection:
        [stored] = connection.execute("SELECT token_hash FROM login_session WHERE name = 'nightly'").fetchone()
    assert stored == healthchecker.token_hash(token)


def test_nothing_is_overwritten(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved.tgz"
    before = saved.read_bytes()
    inventory = ["--inventory", str(served / "inventory.yaml")]
    assert main([*inventory, "backup", str(saved)]) == 2 and saved.read_bytes() == before
    assert "saved.tgz is there already; name another file" in capsys.readouterr().err
    files = {path: path.read_bytes() for path in served.rglob("*") if path.is_file()}
    assert main([*inventory, "restore", str(saved)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in served.rglob("*") if path.is_file()} == files


def test_a_place_that_is_none(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "none" / "b.tgz"
    assert main(["--inventory", str(served / "inventory.yaml"), "backup", str(place)]) == 1
    assert capsys.readouterr().err == f"{place}: {os.strerror(errno.ENOENT)}\n"


def test_nothing_is_played_into_what_is_restored(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a crash left beside a database that was moved away, SQLite would take for the restored one's."""
    for name in ("healthchecker.db", "inventory.yaml", "keys/private.pem", "keys/public.pem"):
        (served / name).rename(tmp_path / Path(name).name)
    log = served / "healthchecker.db-wal"
    log.write_bytes(b"left by a crash")
    arguments = ["--inventory", str(served / "inventory.yaml"), "restore", str(tmp_path / "saved.tgz")]
    assert main(arguments) == 2
    assert f"{log} is there already" in capsys.readouterr().err
    log.write_bytes(b"")
    assert main(arguments) == 0


@pytest.mark.parametrize("part", ["", "cut", "one bit", "no archive", "other", "no database", "gone"])
def test_a_damaged_backup(part: str, served: Path, tmp_path: Path) -> None:
    """Half of one brings nothing back."""
    saved, folder = tmp_path / "saved.tgz", tmp_path / "new"
    content = saved.read_bytes()
    if part == "one bit":  # of 'interval: 1', where it stands as it is
        saved.write_bytes(gzip.compress(gzip.decompress(content), 0).replace(b"interval: 1", b"interval: 3", 1))
    elif part == "no database":
        with tarfile.open(saved, "w:gz") as archive:
            archive.add(served / "inventory.yaml", "inventory.yaml")
    elif part == "other":
        saved.unlink()
        with tarfile.open(saved, "w:gz") as archive:
            archive.add(__file__, "../evil")
    else:
        saved.write_bytes({"cut": content[: len(content) // 2], "no archive": b"x" * 5000}.get(part, b""))
    if part == "gone":
        saved.unlink()
    folder.mkdir()
    code, output = run_cheaply("--inventory", str(folder / "inventory.yaml"), "restore", str(saved))
    assert code == 2 and len(output.splitlines()) == 1 and "saved.tgz" in output
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "evil").exists()


def test_a_backup_needs_a_database_and_no_passwords(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared_keys(tmp_path)
    text = "  - {hostname: a, username: u, password_env: HEALTHCHECKER_UNSET}\n"
    arguments = ["--inventory", str(write_inventory(tmp_path, text)), "backup", str(tmp_path / "x")]
    assert main(arguments) == 2 and "no database yet" in capsys.readouterr().err
    with closing(healthchecker.Store(tmp_path / "healthchecker.db")):
        assert main(arguments) == 0
    assert os.path.getsize(tmp_path / "x") > 0


def test_a_key_that_stands_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Either of two parts could be meant, and so either database."""
    prepared_keys(tmp_path)
    path = write_inventory(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + "service: {drain: 5}\n", encoding="utf-8")
    with closing(healthchecker.Store(tmp_path / "healthchecker.db")):
        assert main(["--inventory", str(path), "backup", str(tmp_path / "x")]) == 2
    assert "this key stands here twice" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_restore_under_a_service(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would go on with the files that are gone, and hear no command."""
    path = served / "inventory.yaml"
    assert main(["--inventory", str(path), "backup", str(tmp_path / "x")]) == 0
    with healthchecker.SqliteFile(served / "healthchecker.db").lock():
        shutil.rmtree(served / "keys")
        for gone in ("healthchecker.db", "inventory.yaml"):
            (served / gone).unlink()
        assert main(["--inventory", str(path), "restore", str(tmp_path / "x")]) == 2
    assert "a service runs on" in capsys.readouterr().err and not path.exists()


def test_a_backup_without_keys(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are lost, and all the more the rest is to be saved."""
    for path in (served / "keys").iterdir():
        path.unlink()
    assert main(["--inventory", str(served / "inventory.yaml"), "backup", str(tmp_path / "rest.tgz")]) == 0
    with tarfile.open(tmp_path / "rest.tgz") as archive:
        assert sorted(archive.getnames()) == ["healthchecker.db", "inventory.yaml"]
    path = tmp_path / "back" / "inventory.yaml"
    path.parent.mkdir()
    assert main(["--inventory", str(path), "restore", str(tmp_path / "rest.tgz")]) == 0
    said = capsys.readouterr().out
    assert "rest.tgz holds no private key, for there is none\n" in said
    assert "inventory.yaml, healthchecker.db but no keys, which were not in it: put private.pem there;" in said


# --- upgrade and move, as README says ---
def test_an_upgrade_and_the_way_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what an earlier version left: everything is there, and what was saved before is that version's."""
    for name in ("old", "back"):
        (tmp_path / name).mkdir()
    path, saved = prepare(tmp_path / "old", "migrate", 60), tmp_path / "saved.tgz"
    before = dump(tmp_path / "old" / "healthchecker.db")
    counts = {table: count(path.parent, table) for table in ("user", "resource", "event", "sample", "average")}
    assert main(["--inventory", str(path), "check"]) == 0
    assert "from schema 2 to" in capsys.readouterr().out
    assert main(["--inventory", str(path), "backup", str(saved)]) == 0
    assert dump(tmp_path / "old" / "healthchecker.db") == before
    with Service(path) as service:
        service.wait_line("database: migrated from schema 2 to ")
        service.wait_line("inventory: 0 added, 0 changed, 0 removed, 3 kept")
        assert service.get("/-/livez").status == 200
        assert all(count(path.parent, table) >= number for table, number in counts.items())
    assert main(["--inventory", str(tmp_path / "back" / "inventory.yaml"), "restore", str(saved)]) == 0
    assert dump(tmp_path / "back" / "healthchecker.db") == before


def test_moved_by_hand(served: Path, tmp_path: Path) -> None:
    """What the service has left when it ended is all there is to carry, with what the inventory names."""
    carried = {"inventory.yaml", "healthchecker.db", "keys", "word"}
    assert {found.name for found in served.iterdir()} - carried <= {"healthchecker.db.lock"}
    counts = {table: count(served, table) for table in ("user", "event", "sample")}
    new = tmp_path / "new"
    new.mkdir()
    for name in carried:
        (served / name).rename(new / name)
    with Service(new / "inventory.yaml") as service:
        service.wait_line("inventory: 0 added, 1 changed, 0 removed, 2 kept; changed: b")   # its file is here now
        service.wait_status("/-/readyz", 200)
        assert all(count(new, table) >= number for table, number in counts.items())
    assert passwords(new) == {"a": "p w", "b": "from a file", "calm": ""}
