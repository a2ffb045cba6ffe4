"""What `make test` does first, and what it says last: the packages that it needs, and those that were missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import not_tested

SCRIPT = Path(__file__).with_name("packages.sh")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Debian's packages are for Debian")
# Stand-ins for Debian's programs in a folder that is first on PATH: they note their calls, and what is installed.
PROGRAMS = {
    "dpkg-query": """shift 2; for p; do ! grep -qx "$p" $D/there || printf '%s:installed ' "$p"; done""",
    "apt-get": """echo "$@" >>$D/calls; [ ! -e $D/offline ] || { echo 'E: no network'; exit 100; }
case $* in *install*) for p; do case $p in -* | *=*) ;; *) echo "$p" >>$D/there ;; esac; done ;; esac""",
    "id": "cat $D/uid",
    "sudo": """[ -e $D/may_sudo ] || exit 1; shift; "$@" """,
}


class Debian:
    """A machine with all packages but `wrk` and `hey`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in PROGRAMS.items():
            (folder / name).write_text(f"#!/bin/sh\nD={folder}\n{text}\n", encoding="ascii")
            (folder / name).chmod(0o755)
        lines = SCRIPT.with_name("packages.txt").read_text(encoding="utf-8").splitlines()
        self.names = [line.split()[0] for line in lines if line[:1] != "#"]
        self.put("there", "\n".join(name for name in self.names if name not in ("wrk", "hey")) + "\n")
        self.put("uid", "0")
        self.put("calls", "")

    def put(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="ascii")

    def run(self) -> list[str]:
        """The lines that it says."""
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        command = ["/bin/sh", str(SCRIPT), str(self.folder / "new" / "stamp")]
        done = subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, encoding="utf-8", check=True, timeout=120
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    def calls(self) -> list[str]:
        """The names of apt-get's commands so far."""
        lines = (self.folder / "calls").read_text(encoding="ascii").splitlines()
        return [next(word for word in line.split() if word in ("update", "install")) for line in lines]


@pytest.fixture
def debian(tmp_path: Path) -> Debian:
    return Debian(tmp_path)


@pytest.mark.parametrize("root", [True, False])
def test_what_is_missing_is_installed_once(debian: Debian, root: bool) -> None:
    if not root:
        debian.put("uid", "1000")
        debian.put("may_sudo", "")
    assert debian.run() == ["apt-get installs what the tests use: wrk hey "]
    assert debian.calls() == ["update", "install"]
    assert debian.run() == []
    assert debian.calls() == ["update", "install"]


def test_without_the_right_it_goes_on(debian: Debian) -> None:
    debian.put("uid", "1000")
    assert debian.run() == ["not installed, for that needs root: wrk hey "]
    assert debian.calls() == []


def test_offline_it_goes_on_and_does_not_try_again(debian: Debian) -> None:
    debian.put("offline", "")
    assert debian.run()[1:] == ["could not be installed: wrk hey (E: no network)"]
    calls = debian.calls()
    assert debian.run() == [] and debian.calls() == calls
    debian.put("there", "")  # something else is missing: worth another try
    assert len(debian.run()) == 2


def test_a_line_for_each_missing_part() -> None:
    reasons = {"the pages need chromium": 30, "chromium here": 1, "needs root, and sshd": 6, "no IPv6": 2}
    assert not_tested(reasons, {"chromium": "chromium", "ssh": "openssh-client"}) == {
        "chromium is missing (apt-get install chromium)": 31,
        "needs root, and sshd": 6,
        "no IPv6": 2,
    }
