"""The files of a service: who can read and write them, whoever made them, by whatever name they are called."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import wait_for
from console import Client, prepared_database
from rights import NOBODY, ROOT
from service import (
    PROGRAM,
    Program,
    Service,
    command,
    environment,
    prepared_keys,
    run_cheaply,
    write_inventory,
)
from test_crashes import assert_all_is_told, flagged
from test_vault import all_open, installation

import healthchecker
from healthchecker import InventoryError, load_inventory

CALM = "  - {name: calm, platform: simulated, mean_healthy: 100000}\n"
HOST = "  - {hostname: 127.0.0.1, name: a, username: u, password: p, port: 9}\n"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes of this kind")
AS_ROOT = pytest.mark.skipif(not ROOT, reason="only root can give a file away")


def modes(folder: Path) -> dict[str, int]:
    """Of all files, by their paths."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in found}


# --- modes ---------------------------------------------------------------------------------------------------
@pytest.mark.long
@POSIX
def test_nothing_is_writable_for_others(tmp_path: Path) -> None:
    """Whatever umask a service manager or a shell leaves."""
    before = os.umask(0)
    try:
        shutil.copy(PROGRAM, tmp_path)
        service = "{listen: 127.0.0.1:0, console: 127.0.0.1:0, log_file: log, workers: 1}"
        text = f"service: {service}\nresources:\n{CALM}"
        (tmp_path / "inventory.example.yaml").write_text(text, encoding="utf-8")
        given = modes(tmp_path)
        with Program(tmp_path / "inventory.yaml", program=tmp_path / PROGRAM.name) as service:
            service.wait_status("/-/readyz", 200)
            found = {name: mode for name, mode in modes(tmp_path).items() if name not in given}
    finally:
        os.umask(before)
    private = {name for name in found if name.startswith("healthchecker.db")} | {
        "inventory.yaml", "keys/private.pem", "keys/started"}  # fmt: skip
    assert found.keys() == private | {"log", "keys/public.pem"} and {"healthchecker.db-wal"} < private
    assert {name: oct(mode) for name, mode in found.items() if mode & 0o022} == {}
    assert {name: oct(found[name]) for name in private} == dict.fromkeys(private, "0o600")


@POSIX
def test_a_lock_of_an_earlier_version_is_closed(tmp_path: Path) -> None:
    """Who can read it can hold it, and stop a start."""
    lock = tmp_path / "x.db.lock"
    lock.write_bytes(b"")
    lock.chmod(0o644)
    with healthchecker.SqliteFile(tmp_path / "x.db").lock():
        pass
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600


def strangers(folder: Path) -> set[str]:
    """Files and folders that are not NOBODY's."""
    found = {path.name: path.stat() for path in folder.rglob("*")}
    return {name for name, stated in found.items() if (stated.st_uid, stated.st_gid) != (NOBODY, NOBODY)}


COMMANDS: dict[str, list[list[str]]] = {      # with a service, and without one
    "beside": [["backup", "saved.tgz"], ["gate", "close", "--for", "1h"], ["gate", "auto"],
               ["maintenance", "start", "--all", "--for", "1h", "--reason", "disks"], ["maintenance", "end", "--all"],
               ["reload"]],
    "alone": [["database", "copy", "sqlite:///healthchecker.db", "sqlite:///copied.db"], ["gate", "close"],
              ["backup", "later.tgz"], ["maintenance", "start", "--all", "--for", "1h", "--reason", "disks"]],
}  # fmt: skip


@pytest.mark.long
@POSIX
@pytest.mark.parametrize(("when", "made"), [
    ("beside", {"healthchecker.db", "saved.tgz", "keys/private.pem"}), ("alone", {"later.tgz", "copied.db"})])
def test_no_command_makes_what_others_can_write(when: str, made: set[str], tmp_path: Path) -> None:
    """Whatever umask an administrator's shell has; what root makes in the service's folder belongs to the service."""
    path = write_inventory(tmp_path, CALM, "  lease_file: lease\n  log_file: log")
    if when == "alone":
        prepared_keys(tmp_path)
        prepared_database(tmp_path)

    def run(arguments: list[str]) -> None:
        done = subprocess.run(command(path, *arguments), cwd=tmp_path, env=environment(), check=False, timeout=120,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")  # fmt: skip
        assert done.returncode == 0, done.stdout

    for place in (tmp_path, *tmp_path.rglob("*")) if ROOT else ():
        os.chown(place, NOBODY, NOBODY)
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0))
        if when == "beside":
            stack.enter_context(Program(path)).wait_status("/-/readyz", 200)
        for arguments in COMMANDS[when]:
            run(arguments)
        assert not ROOT or strangers(tmp_path) <= {"lease"}     # which the service's account replaces
    found = modes(tmp_path)
    assert {name: oct(found[name]) for name in made} == dict.fromkeys(made, "0o600")
    assert when == "alone" or found["lease"] == 0o644
    assert {name: oct(mode) for name, mode in found.items() if mode & 0o022} == {}
    assert not ROOT or strangers(tmp_path) <= {"lease"}


# --- owners --------------------------------------------------------------------------------------------------
@pytest.mark.long
@AS_ROOT
@pytest.mark.parametrize("arguments", [[], ["check"], ["seal"], ["user", "list"], ["keys", "rotate"]], ids=" ".join)
def test_what_root_makes_belongs_to_the_service(arguments: list[str], tmp_path: Path) -> None:
    """An administrator types a command; the service's account must be able to read all that it left."""
    os.chown(tmp_path, NOBODY, NOBODY)
    path = write_inventory(tmp_path, HOST, "  log_file: log")
    os.chown(path, NOBODY, NOBODY)
    if arguments:
        code, output = run_cheaply("--inventory", str(path), *arguments)
        assert code == 0, output
    else:
        with Program(path) as service:
            service.wait_line("serving on")
            assert {"log", "keys/public.pem", "healthchecker.db-wal"} <= modes(tmp_path).keys()
            assert strangers(tmp_path) == set()
    assert strangers(tmp_path) == set()


@AS_ROOT
def test_what_root_brings_back_belongs_to_the_service(tmp_path: Path) -> None:
    path = installation(tmp_path)
    assert run_cheaply("--inventory", str(path), "backup", str(tmp_path / "saved.tgz"))[0] == 0
    new = tmp_path / "new"
    new.mkdir()
    os.chown(new, NOBODY, NOBODY)
    assert run_cheaply("--inventory", str(new / path.name), "restore", str(tmp_path / "saved.tgz"))[0] == 0
    assert {"private.pem", "keys", "inventory.yaml", "healthchecker.db"} <= {found.name for found in new.rglob("*")}
    assert strangers(new) == set()


@AS_ROOT
def test_what_root_replaces_keeps_its_owner(tmp_path: Path) -> None:
    """Also where the folder is somebody else's."""
    path = write_inventory(tmp_path, HOST)
    assert run_cheaply("--inventory", str(path), "seal")[0] == 0
    files = [path, tmp_path / "keys" / "private.pem", tmp_path / "keys" / "public.pem"]
    for file in files:
        os.chown(file, NOBODY, NOBODY)
        file.chmod(0o640)
    before = [file.read_bytes() for file in files]
    assert run_cheaply("--inventory", str(path), "keys", "rotate")[0] == 0
    assert [(file.stat().st_uid, file.stat().st_gid, stat.S_IMODE(file.stat().st_mode)) for file in files] == [
        (NOBODY, NOBODY, 0o640)] * 3
    assert all(file.read_bytes() != content for file, content in zip(files, before, strict=True))


@AS_ROOT
@pytest.mark.skipif(sys.platform != "linux", reason="needs the capabilities of Linux")
def test_what_cannot_be_given_away_is_not_replaced(tmp_path: Path) -> None:
    """Sealed by a colleague who may write into the folder, it would be one that the service cannot read."""
    path = write_inventory(tmp_path, HOST)
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o666)
    before = path.read_bytes()
    code, output = run_cheaply("--inventory", str(path), "seal", unprivileged=True)
    assert (code, path.read_bytes()) == (2, before)
    assert re.fullmatch(r"inventory\.yaml: cannot be replaced: .*another account's\?\n", output)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@POSIX
@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="needs the access lists of Linux")
def test_an_access_list_stays(tmp_path: Path) -> None:
    path = write_inventory(tmp_path, HOST)
    entries = ((1, 6, 0xFFFFFFFF), (2, 4, 65534), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
    listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", listed)
    except OSError:
        pytest.skip("this filesystem has no access lists")
    assert run_cheaply("--inventory", str(path), "seal")[0] == 0
    assert b"HC2." in path.read_bytes()
    assert os.getxattr(path, "system.posix_acl_access") == listed


# --- names ---------------------------------------------------------------------------------------------------
def hard(name: str, of: str) -> Callable[[Path], None]:
    return lambda folder: os.link(folder / of, folder / name)


def soft(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: os.symlink(to, folder / name)


def nothing(folder: Path) -> None:
    del folder


SAME: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "log is the private key": ("log_file: keys/private.pem", nothing, "service.log_file: is keys/private.pem"),
    "log is a new key": ("log_file: keys/next.pem", nothing, "service.log_file: is keys/next.pem"),
    "a way around": ("log_file: sub/../inventory.yaml", nothing, "service.log_file: is the inventory"),
    "log is the lock": ("log_file: healthchecker.db.lock", nothing, "service.log_file: is healthchecker.db.lock"),
    "log is a companion": ("log_file: healthchecker.db-wal", nothing, "service.log_file: is healthchecker.db-wal"),
    "a link": ("log_file: link", soft("link", "inventory.yaml"), "service.log_file: is the inventory"),
    "a link to what is not there": (
        "log_file: link", soft("link", "healthchecker.db"), "service.log_file: is service.database"),
    "a linked folder": ("log_file: other/private.pem", soft("other", "keys"), "service.log_file: is keys/private.pem"),
    "a hard link": ("log_file: link", hard("link", "inventory.yaml"), "service.log_file: is the inventory"),
    "the program": (f"log_file: '{PROGRAM}'", nothing, "service.log_file: is the program"),
    "a rotated log": ("log_file: log\n  metrics_token_file: log.1", nothing, "service.log_file: is"),
    "database is the inventory": (
        "database: sqlite:///./inventory.yaml", nothing, "service.database: is the inventory"),
    "database is a key": ("database: sqlite:///keys/private.pem", nothing, "service.database: is keys/private.pem"),
    "token is a key": (
        "metrics_token_file: keys/private.pem", nothing, "service.metrics_token_file: is keys/private.pem"),
}


@pytest.mark.parametrize("case", SAME)
def test_no_file_has_two_names(case: str, tmp_path: Path) -> None:
    setting, make, message = SAME[case]
    (tmp_path / "sub").mkdir()
    (tmp_path / "keys").mkdir()
    path = write_inventory(tmp_path, CALM, f"  {setting}")
    try:
        make(tmp_path)
    except OSError as error:
        pytest.skip(f"links cannot be made here: {error.strerror}")
    with pytest.raises(InventoryError, match=re.escape(message)) as caught:
        load_inventory(path)
    line = path.read_text(encoding="utf-8").splitlines().index(f"  {setting}".splitlines()[0]) + 1
    assert str(caught.value).startswith(f"inventory.yaml:{line}:") and str(caught.value).count("\n") == 0


@pytest.mark.parametrize("name", ["key_file", "password_file"])
def test_no_resource_names_a_file_of_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"")
    path = write_inventory(tmp_path, f"  - {{hostname: a, username: u, {name}: ./sub/../log}}", "  log_file: log")
    (tmp_path / "sub").mkdir()
    (tmp_path / "log").write_text("x", encoding="utf-8")
    with pytest.raises(InventoryError, match=rf"yaml:7:\d+: resources\[0\]\.{name}: is service\.log_file, too"):
        load_inventory(path)


# --- names that are taken ------------------------------------------------------------------------------------
WITHOUT_LINKS = """
import ctypes, pathlib, struct, sys
sys.path.insert(0, sys.argv[2])
import healthchecker
# a filter of seccomp: of the system calls, link and linkat fail with EPERM, as they do on FAT
calls = {"x86_64": (86, 265), "aarch64": (37, 37)}[sys.argv[3]]
rules = [(0x20, 0, 0, 0), (0x15, 1, 0, calls[0]), (0x15, 0, 1, calls[1]), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
program = struct.pack("@HP", len(rules), ctypes.addressof(code))
prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.c_char_p(program), 0, 0):
    sys.exit(77)
path = pathlib.Path(sys.argv[1])
try:
    path.with_name("x").hardlink_to(__file__)
except PermissionError:
    pass
healthchecker.create_private(path, b"one")
try:
    healthchecker.create_private(path, b"two")
except FileExistsError:
    print("kept")
"""


@pytest.mark.long
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="needs seccomp of Linux"
)
def test_where_there_are_no_links(tmp_path: Path) -> None:
    """FAT has none, some network filesystems neither."""
    script, path = tmp_path / "script.py", tmp_path / "private.pem"
    script.write_text(WITHOUT_LINKS, encoding="utf-8")
    given = [sys.executable, str(script), str(path), str(PROGRAM.parent), platform.machine()]
    done = subprocess.run(given, capture_output=True, encoding="utf-8", check=False, timeout=60)
    if done.returncode == 77:
        pytest.skip("seccomp cannot be used here")
    assert (done.returncode, done.stdout, done.stderr) == (0, "kept\n", "")
    assert path.read_bytes() == b"one" and sorted(item.name for item in tmp_path.iterdir()) == [path.name, script.name]


@pytest.mark.long
def test_two_first_starts_at_the_same_moment(tmp_path: Path) -> None:
    """One serves; the other one says who is there."""
    shutil.copy(PROGRAM, tmp_path)
    text = f"service: {{listen: 127.0.0.1:0, console: 'off', workers: 1}}\nresources:\n{CALM}"
    (tmp_path / "inventory.example.yaml").write_text(text, encoding="utf-8")
    path = tmp_path / "inventory.yaml"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "env": environment()}
    both = [subprocess.Popen(command(path, program=tmp_path / PROGRAM.name), **options) for _ in range(2)]
    try:
        ended = wait_for(lambda: next((process for process in both if process.poll() is not None), None), 120)
        said = ended.communicate(timeout=60)[0]
        other = both[1 - both.index(ended)]
        line = ""
        while "serving on" not in line:
            line = other.stdout.readline()
            assert line, "neither serves"
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert ended.returncode == 4 and "another HealthChecker is using database" in said, said
    assert "Traceback" not in said and path.read_text(encoding="utf-8") == text


# --- a full disk ---------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    if sys.platform != "linux" or not ROOT:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, room: int = 0) -> None:
    """Of which so many bytes are left."""
    with open(folder / "filler", "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(max(0, file.tell() - room))


@pytest.mark.parametrize("known", [False, True], ids=["first start", "database is there"])
def test_a_start_on_a_full_disk(small_disk: Path, known: bool) -> None:
    """It is no damaged database: nobody must bring back an old one for that, nor start the service again."""
    path = write_inventory(small_disk, CALM)
    prepared_keys(small_disk)
    if known:
        with closing(healthchecker.Store(small_disk / "healthchecker.db")):
            pass
    fill(small_disk)
    service = Service(path)
    service.begin()
    try:
        said = service.wait_line("the gate stays closed until the database can be used: ")
        assert "the disk is full" in said and "backup" not in said
        (small_disk / "filler").unlink()
        service.wait_line("serving on http://")
        assert service.stop() == 0
    finally:
        service.kill()


def test_a_disk_that_became_read_only(small_disk: Path, tmp_path: Path) -> None:
    """As a Linux does with one that fails: that is said, nothing is called damaged, and a backup can be made."""
    path, saved, new = write_inventory(small_disk, HOST), tmp_path / "saved.tgz", tmp_path / "new" / "inventory.yaml"
    new.parent.mkdir()
    with Service(path):
        pass
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for arguments in [], ["check"]:
        code, output = run_cheaply("--inventory", str(path), *arguments)
        assert code == 4 and "the file system is read-only" in output and "restore" not in output, output
    assert run_cheaply("--inventory", str(path), "backup", str(saved))[0] == 0
    assert run_cheaply("--inventory", str(new), "restore", str(saved))[0] == 0
    assert "0 added, 0 changed, 0 removed, 1 kept" in run_cheaply("--inventory", str(new), "check")[1]


def test_a_shell_needs_no_room_for_temporary_files(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or any account of this machine could close the gate."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    fill(small_disk)
    with healthchecker.start_shell(["/bin/sh"], "echo here") as shell:
        assert shell.communicate(timeout=60)[0] == b"here\n"


def test_a_copy_on_a_disk_that_has_no_room_for_all_of_it(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For its log there is, and for the file alone there would be."""
    path = installation(tmp_path)
    with closing(sqlite3.connect(tmp_path / "healthchecker.db")) as database, database:
        database.executemany(
            "INSERT INTO event (at, kind, resource, state, text, actor, address, \"group\") "
            "VALUES (?, 'state', 'h0', 'unhealthy', ?, '', '', '')", [(at, "x" * 500) for at in range(2000)])
    arguments = "database", "copy", "sqlite:///healthchecker.db", f"sqlite:///{small_disk / 'new.db'}"
    capsys.readouterr()
    assert healthchecker.main(["--inventory", str(path), *arguments]) == 4
    assert capsys.readouterr().err == "the database cannot be used: database or disk is full\n"


def test_a_backup_and_the_way_back_without_room(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said where there is none, and what to do."""
    old, saved, told = tmp_path / "old", tmp_path / "saved.tgz", "the disk is full; make room on it"
    old.mkdir()
    path = installation(old)
    assert healthchecker.main(["--inventory", str(path), "backup", str(saved)]) == 0
    fill(small_disk)
    capsys.readouterr()
    assert healthchecker.main(["--inventory", str(path), "backup", str(small_disk / "x.tgz")]) == 1
    assert capsys.readouterr().err == f"{small_disk / 'x.tgz'}: {told}\n"
    assert healthchecker.main(["--inventory", str(small_disk / "inventory.yaml"), "restore", str(saved)]) == 1
    assert capsys.readouterr().err == f"{small_disk / 'healthchecker.db'}: {told}\n"
    assert {found.name for found in small_disk.iterdir()} <= {"filler", "keys"}
    fill(small_disk, 16384)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    assert healthchecker.main(["--inventory", str(path), "backup", str(tmp_path / "x.tgz")]) == 4
    assert re.fullmatch(f"{small_disk}/.*: {told}, or set TMPDIR\n", capsys.readouterr().err)


@pytest.mark.long
def test_a_lease_file_that_no_room_is_for(small_disk: Path, tmp_path: Path) -> None:
    """As in a /run that is full: a service manager tries again, for nothing is wrong with the inventory."""
    prepared_keys(tmp_path)
    small_disk.chmod(0o755)
    path = write_inventory(tmp_path, CALM, f"  lease_file: {small_disk}/lease")
    fill(small_disk)
    service = Program(path)
    service.begin()
    try:
        assert service.process.wait(60) == 1, service.output
        service.wait_line(f"service.lease_file {small_disk}/lease cannot be written: the disk is full; make room on it")
    finally:
        service.kill()


def test_an_inventory_that_no_room_is_for(small_disk: Path, tmp_path: Path) -> None:
    """Nothing is asked that another fault would be."""
    places = f"  database: sqlite:///{tmp_path}/hc.db\n  keys: {prepared_keys(tmp_path)}"
    path = write_inventory(small_disk, HOST, places)
    before = path.read_bytes()
    fill(small_disk)
    code, output = run_cheaply("--inventory", str(path), "seal")
    assert (code, output) == (2, "inventory.yaml: cannot be replaced: the disk is full; make room on it\n")
    assert path.read_bytes() == before


UPLOADED = """
def app(environ, start_response):
    head = int(environ["QUERY_STRING"])
    body, forged = bytearray(b"z" * 1_300_000), b"HTTP/1.1 200 OK\\r\\nContent-Length: 4\\r\\n\\r\\nevil"
    for at in range((1 << 18) - head, len(body) - len(forged), 1 << 18):    # waitress copies in such blocks
        body[at : at + len(forged)] = forged
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [bytes(body)]
"""


@pytest.mark.long
def test_an_answer_without_room_is_cut_off(small_disk: Path, tmp_path: Path) -> None:
    """What comes from the middle of a file that a user uploaded is not taken for the answer."""
    (tmp_path / "shop.py").write_text(UPLOADED, encoding="utf-8")
    path = write_inventory(tmp_path, CALM, "  app: shop:app\n  threads: 2\n  workers: 1")

    def answer(head: int) -> bytes:
        with socket.create_connection((service.host, service.port), timeout=60) as sock:
            sock.sendall(f"GET /?{head} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
            with contextlib.suppress(ConnectionError):
                return b"".join(iter(lambda: sock.recv(1 << 16), b""))
        return b""

    with Program(path, env={"TMPDIR": str(small_disk)}) as service:
        service.wait_status("/-/readyz", 200)
        head = answer(0).index(b"\r\n\r\n") + 4
        fill(small_disk)
        assert b"evil" not in answer(head)[:1000]
        (small_disk / "filler").unlink()
        assert len(answer(head)) == head + 1_300_000
        service.wait_line("an answer was cut off: No space left on device, for temporary files")


def test_a_disk_that_becomes_full(small_disk: Path) -> None:
    """The gate goes on; the console says a line and no traceback of the log that cannot be written."""
    path = write_inventory(small_disk, CALM.replace("}", ", interval: 1}"), "  log_file: log")
    with Service(path) as service:
        service.wait_status("/-/readyz", 200)
        with open(small_disk / "log", "ab") as log:
            log.write(b"x" * (-log.tell() % 4096) + b"\n")
        fill(small_disk)
        service.wait_line("database cannot be written")
        assert service.get("/-/readyz").status == 200
    assert service.output.count(f"{small_disk / 'log'} cannot be written") <= 1


@pytest.mark.long
def test_a_full_disk_that_has_room_again(small_disk: Path, tmp_path: Path) -> None:
    """Meanwhile the gate follows the resources and the console says why it changes nothing; afterwards log and history
    go on by themselves, and what happened is told."""
    prepared_database(small_disk)
    path, flag = flagged(small_disk, 30, "  log_file: log", tmp_path)
    with Service(path) as service:
        service.wait_status("/", 200)
        client, begun = Client(*service.console).log_in(), time.monotonic()
        with open(small_disk / "log", "ab") as log:
            log.write(b"x" * (-log.tell() % 4096) + b"\n")
        fill(small_disk)
        service.wait_line("the database cannot be written: ")
        flag.touch()
        service.wait_status("/", 503)
        assert client.api("GET", "resources/db1").json["state"] == "unhealthy"
        refused = client.api("POST", "gate", {"action": "open", "reason": "in vain"})
        assert refused.status == 503 and "cannot be used now" in refused.body
        service.wait_line("a request to the console failed: database or disk is full")
        flag.unlink()
        service.wait_status("/", 200)
        (small_disk / "filler").unlink()
        service.wait_line("the database cannot be written: that is over")
        lasted = time.monotonic() - begun
        assert_all_is_told(small_disk, lasted)
        assert client.api("POST", "gate", {"action": "close"}).status == 200
    assert service.output.count("the database cannot be written: ") <= 2 + lasted // 60
    written = (small_disk / "log").read_text(encoding="utf-8")
    assert "serving on" in written and "that is over" in written and not (small_disk / "log.1").exists()


@pytest.mark.parametrize("command", ["seal", "keys rotate", "backup FILE", "gate close"])
def test_a_command_on_a_disk_that_is_nearly_full(
    command: str, small_disk: Path, tmp_path: Path, often: Callable[[int, int], int]
) -> None:
    """However much room there is: it is done, or it says that the disk is full; nothing is half, every secret opens."""
    path, saved, codes = installation(small_disk), small_disk / "saved.tgz", []
    names = {found.name for found in small_disk.rglob("*")}
    for room in range(0, 1 << 20, often(96, 8) << 10):
        fill(small_disk, room)
        code, output = run_cheaply("--inventory", str(path), *command.replace("FILE", str(saved)).split())
        (small_disk / "filler").unlink()
        all_open(path)
        codes.append(code)
        if code == 0:
            break
        assert re.fullmatch("[^\n]*(disk is full|No space left)[^\n]*\n", output), output
        left = {found.name for found in small_disk.rglob("*")} - names
        assert left <= {"healthchecker.db-wal", "healthchecker.db-shm", "healthchecker.db.lock", "next.pem"}, left
    assert codes[0] in (1, 2, 3, 4) and codes[-1] == 0
    if command == "backup FILE":
        (tmp_path / "new").mkdir()
        inventory = tmp_path / "new" / "inventory.yaml"
        assert healthchecker.main(["--inventory", str(inventory), "restore", str(saved)]) == 0
        all_open(inventory)
