"""Windows Python in wine: where it cannot be had, and what is downloaded for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import windows_python
from conftest import wait_for
from windows_python import (
    EMBEDDED,
    EMBEDDED_SHA256,
    INSTALL,
    NO_POWERSHELL,
    REQUIREMENTS,
    SERVER_GONE,
    SKIPPED,
    Unavailable,
    Wine,
    end_unless_used,
    locked,
    unpack_powershell,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="wine is for UNIX")
SCRIPT = REQUIREMENTS.with_name("windows_python.py")


def test_without_wine_or_compiler_it_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path), "--", "-c", "print('not reached')"]
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=60)
    assert (done.returncode, done.stderr) == (SKIPPED, "")
    assert re.fullmatch(rf"skipped: \S+ was not found; {re.escape(INSTALL)}\n", done.stdout)


def test_whatever_is_downloaded_is_pinned_by_hash() -> None:
    comment, *lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    assert comment.startswith("#")
    assert len(lines) > 40
    pinned = re.compile(r"[\w.-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}")
    assert [line for line in lines if not pinned.fullmatch(line)] == []
    assert re.fullmatch(r"[\w-]+==[\d.]+", EMBEDDED)
    assert re.fullmatch("[0-9a-f]{64}", EMBEDDED_SHA256)


def test_powershell_is_what_is_named_or_an_archive_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEALTHCHECKER_PWSH", raising=False)
    with pytest.raises(Unavailable, match=NO_POWERSHELL):
        unpack_powershell(tmp_path, tmp_path)
    (tmp_path / "pwsh.exe").write_bytes(b"MZ")
    with tarfile.open(tmp_path / "pwsh-7.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "pwsh.exe", "pwsh.exe")
    program = unpack_powershell(tmp_path, tmp_path)
    assert program == tmp_path / "pwsh" / "pwsh.exe" and program.read_bytes() == b"MZ"
    (tmp_path / "pwsh-7.tar.xz").unlink()
    assert unpack_powershell(tmp_path, tmp_path) == program
    monkeypatch.setenv("HEALTHCHECKER_PWSH", str(tmp_path / "other.exe"))
    assert unpack_powershell(tmp_path, tmp_path) == tmp_path / "other.exe"


def test_the_end_of_the_server_is_not_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs hangs without it. Here a script says whether it runs: once that it does."""
    monkeypatch.setattr(windows_python, "SERVER_SECONDS", 1)
    wine, runs, server = Wine.__new__(Wine), tmp_path / "runs", tmp_path / "server"
    server.write_text(f"#!/bin/sh\nrm '{runs}'\n", encoding="ascii")
    server.chmod(0o755)
    wine.server, wine.environment = str(server), dict(os.environ)
    runs.touch()
    with subprocess.Popen(["sleep", "300"]) as process:
        assert wine.wait(process, 200) == SERVER_GONE
        process.kill()
    with subprocess.Popen(["/bin/sh", "-c", "exit 3"]) as process:
        assert wine.wait(process, 200) == 3


WITHOUT_MAIN = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("begun", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_program_whose_first_thread_has_ended_is_ended(tmp_path: Path) -> None:
    """As wine's do when their server ends; it holds our pipes, and its process tells nothing of itself any more."""
    program = shutil.copy(os.path.realpath(sys.executable), tmp_path / "wine-program")
    wine = Wine.__new__(Wine)
    wine.prefix = tmp_path
    environment = os.environ | {"PYTHONHOME": sys.base_prefix, "WINEPREFIX": str(tmp_path)}
    with subprocess.Popen([program, "-c", WITHOUT_MAIN], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"begun\n"
        wait_for(lambda: "Z (zombie)" in Path(f"/proc/{process.pid}/status").read_text(encoding="ascii"))
        try:
            assert [*wine.processes()] == [process.pid]
        finally:
            process.kill()


def test_who_is_the_last_in_a_prefix_ends_what_runs_there(tmp_path: Path) -> None:
    """Here a script says that it was asked to."""
    wine, ended, server = Wine.__new__(Wine), tmp_path / "ended", tmp_path / "server"
    server.write_text(f"#!/bin/sh\ntouch '{ended}'\n", encoding="ascii")
    server.chmod(0o755)
    wine.server, wine.environment, wine.prefix = str(server), dict(os.environ), tmp_path
    with locked(tmp_path, alone=False):
        end_unless_used(wine, tmp_path)
        assert not ended.exists()
    end_unless_used(wine, tmp_path)
    assert ended.exists()
