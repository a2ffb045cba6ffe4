"""Disks: real filesystems in a mount namespace of their own, read by real polls with the tools of GNU and BusyBox."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from service import Program, run, write_inventory
from test_probes import run_script
from test_real_hosts import readings, resource
from test_real_shells import toolbox, without_path

from healthchecker import Deadline, Output, Sample, Verdict, collect, evaluate

__all__ = ["toolbox"]  # a fixture
# disk PLACE [megabytes in it [device]]: an ext4 of 30 MB. hung PLACE [name]: a FUSE whose daemon never answers.
FUNCTIONS = """
set -e; cd /srv
disk() {
  n=/srv/.images/$(ls .images | wc -l); truncate -s 30M "$n"; mkfs.ext4 -qF -m 0 "$n"
  l=$(losetup -f --show "$n"); mkdir -p "$1"
  [ ! "$3" ] || { rm -f "$3"; mknod "$3" b $(stat -c '%Hr %Lr' $l); }
  mount "${3:-$l}" "$1"; losetup -d $l
  [ ! "$2" ] || dd if=/dev/zero of="$1/fill" bs=4k count=$(($2 * 256)) 2>/dev/null || :
}
hung() {
  exec 9<>/dev/fuse; mkdir -p "$1"
  mount -i -t fuse.s3fs -o fd=9,rootmode=40000,user_id=0,group_id=0,allow_other "${2:-s3fs}" "$PWD/$1"
}
turn() { mount -o "remount,$1" "$2"; }
"""
SHUT_DOWN = f"{shlex.quote(sys.executable)} -c 'import fcntl, os, struct\n" \
    'fcntl.ioctl(os.open("data", 0), 0x8004587D, struct.pack("I", 2))\''


class Machine:
    """This one, with mounts of its own below /srv, and a connection to it."""

    def __init__(self) -> None:
        self.path, self.plain = "", False       # of its commands, and whether as a plain account
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ready = self._stays([shutil.which("unshare") or "", "--mount"],
                                 "mount -t tmpfs tmpfs /srv && mkdir /srv/.images && echo ready; exec cat")

    def _stays(self, command: list[str], text: str) -> bool:
        process = subprocess.Popen([*command, "/bin/sh", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes.append(process)
        assert process.stdout
        return process.stdout.readline() == b"ready\n"

    def inside(self) -> list[str]:
        return [shutil.which("nsenter") or "", f"--mount=/proc/{self.processes[0].pid}/ns/mnt"]

    def do(self, text: str) -> None:
        """What it opens stays open."""
        assert self._stays(self.inside(), f"{FUNCTIONS}\n{text}\necho ready; exec cat"), text

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        plain = [shutil.which("setpriv") or "", "--reuid=65534", "--regid=65534", "--clear-groups"]
        command = [*self.inside(), *(plain if self.plain else []), "/bin/sh", "-s"]
        text, _ = (run_script(command, without_path(script), deadline.seconds, PATH=self.path) if self.path
                   else run_script(command, script, deadline.seconds))
        assert output.mark.decode() in text, text[-500:]
        return output.take(text.encode())

    def poll(self, disk_percent: Any, before: Sample | None = None) -> tuple[Sample, Verdict]:
        asked = resource(platform="linux", limits={"disk_percent": disk_percent})
        sample = collect(asked, self, before)  # type: ignore[arg-type]  # all that is used of a connection
        return sample, evaluate(sample, asked)

    def end(self) -> None:
        for process in self.processes:
            assert process.stdin
            process.communicate(timeout=20)


@pytest.fixture
def machine() -> Iterator[Machine]:
    if not sys.platform.startswith("linux") or os.getuid():
        pytest.skip("only root can mount disks; run as root on Linux")
    for tool in ("unshare", "nsenter", "setpriv", "mkfs.ext4"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    made = Machine()
    if not made.ready:
        made.end()
        pytest.skip("nothing can be mounted here")
    yield made
    made.end()


OWN = {"fail": 98, "mounts": {"/srv/data": 90}}
FULL = "disk_percent /srv/data at 100.0, fail above 98"
# What is mounted, the limit; the state and what is said, "" where nothing is.
MOUNTED: dict[str, tuple[str, Any, str, str]] = {
    "a FUSE that hangs beside a full disk": ("disk data 40; hung bucket", 98, "unhealthy", FULL),
    "one that is covered, and seen elsewhere": (
        "disk data 40; mkdir x; mount --bind data x; mount -t tmpfs tmpfs data", 98, "unhealthy",
        "disk_percent /srv/x at 100.0, fail above 98"),
    "one that is covered at itself, and seen elsewhere": (
        "disk data 40; mount --bind data data; mkdir x; mount --bind data x; mount -t tmpfs tmpfs data", 98,
        "unhealthy", "disk_percent /srv/x at 100.0, fail above 98"),
    "one of a server's name": ("disk data 40; hung bucket alice@nas:/share", 98, "unhealthy", FULL),
    "a dead FUSE": ("disk data 1; hung dead; exec 9>&-", 98, "healthy", ""),
    "a FUSE whose name is a row of df": ("hung dead 'x 100 99 0 99% /etc'; exec 9>&-", 98, "healthy", ""),
    "a disk that the kernel shut down": (f"disk data; {SHUT_DOWN}", 98, "degraded", "became read-only: /srv/data"),
    "a limit, and a bind mount with a shorter path": (
        "disk data 25; mkdir w; mount --bind data w", OWN, "unhealthy", "disk_percent /srv/data at 9"),
    "of a part of it": (
        "disk data 25; mkdir w data/www; mount --bind data/www w", OWN, "unhealthy", "disk_percent /srv/data at 9"),
    "a limit with a slash": (
        "disk data 25", {"fail": 98, "mounts": {"/srv/data/": 90}}, "unhealthy", "disk_percent /srv/data at 9"),
    "a limit of what is not there": (
        "disk data", {"fail": 98, "mounts": {"/srv/dta": 90, "/srv/*": 90, "/x": "off"}}, "degraded",
        "disk_percent cannot be read: no disk there: /srv/dta"),
    "two disks of one name": (
        "disk a 1 .images/sdb1; disk b 40 .images/sdb1", 98, "unhealthy", "disk_percent /srv/b at 100.0"),
    "a disk that is read-only for a service, but is not": (
        "disk data; echo '/dev/x /srv/data ext4 defaults 0 2' >fstab; mount --bind fstab /etc/fstab;"
        " mount -o remount,bind,ro data", {"fail": 98, "mounts": {"/srv/data": 90}}, "healthy", ""),
    "a disk below another": ("disk a/b; disk a", 98, "degraded", "/srv/a/b No such file or directory"),
}
ODD = ["Foo, Bar", "tab\tx", "new\nline", "\u00fcn\u00ef", "back\\slash", "100% x 1 2 3 4% /etc",
       "  two  blanks ", "a#b"]


@pytest.mark.parametrize("case", MOUNTED.values(), ids=MOUNTED)
def test_what_is_mounted(case: tuple[str, Any, str, str], machine: Machine) -> None:
    done, limit, state, said = case
    machine.do(done)
    sample, verdict = machine.poll(limit)
    assert verdict.state == state and said in verdict.reason, (verdict, sample)


@pytest.mark.parametrize("toolbox", ["busybox"], indirect=True)
@pytest.mark.parametrize("tools", ["the machine's", "BusyBox's"])
def test_odd_names(tools: str, machine: Machine, toolbox: Path) -> None:
    """Each is read and, once it turns read-only, told; BusyBox' df writes a newline as it is."""
    names = [name for name in ODD if tools == "the machine's" or "\n" not in name]
    machine.path = "" if tools == "the machine's" else str(toolbox)
    machine.do("\n".join(f"disk {shlex.quote(name)} 40" for name in names))
    shown = {"/srv/" + name.replace("\t", "?").replace("\n", "?") for name in names}
    before, _ = machine.poll(98)
    assert {name for name, value in readings(before, "disk_percent").items() if value > 99} == shown
    machine.do("\n".join(f"turn ro {shlex.quote(name)}" for name in names))
    after, verdict = machine.poll(98, before)
    assert after.writable == before.writable and verdict.state == "unhealthy", "still full"
    assert {name for name in after.problems if name.startswith("filesystems")} == {"filesystems"}
    machine.do("\n".join(f"turn rw {shlex.quote(name)}; rm {shlex.quote(name + '/fill')}" for name in names[1:]))
    sample, verdict = machine.poll({"fail": 100}, after)
    assert (verdict.state, verdict.reason) == ("degraded", f"filesystems: became read-only: /srv/{names[0]}"), sample


def test_a_disk_that_always_was_read_only(machine: Machine) -> None:
    """A limit that names it has it read, and nothing turned."""
    machine.do("disk data 1; turn ro /srv/data")
    first, verdict = machine.poll(OWN)
    assert first.metrics["disk_percent /srv/data"] < 50
    assert verdict.state == machine.poll(OWN, first)[1].state == "healthy"


def test_a_disk_that_turns_read_only_is_no_less_full(machine: Machine) -> None:
    machine.do("disk data 40")
    before, _ = machine.poll(98)
    machine.do("turn ro data")
    for _ in range(2):
        before, verdict = machine.poll(98, before)
        assert (verdict.state, verdict.reason) == ("unhealthy", FULL)
        assert before.problems["filesystems"] == "became read-only: /srv/data"
    machine.do("turn rw data; rm data/fill")
    assert machine.poll(98, before)[1].state == "healthy"


@pytest.mark.parametrize("toolbox", ["busybox"], indirect=True)
@pytest.mark.parametrize("tools", ["the machine's", "BusyBox's"])
def test_a_disk_that_the_account_may_not_look_at(tools: str, machine: Machine, toolbox: Path) -> None:
    machine.path, machine.plain = "" if tools == "the machine's" else str(toolbox), True
    machine.do("mkdir -m 700 pgsql; disk pgsql/data 40; disk seen 1")
    sample, verdict = machine.poll({"fail": 98, "mounts": {"/srv/pgsql/data": 90}})
    assert verdict.state == "degraded" and "/srv/pgsql/data" in verdict.reason
    assert "/srv/seen" in readings(sample, "disk_percent")
    assert machine.poll({"fail": 98, "mounts": {"/srv/pgsql/*": "off"}})[1].state == "healthy"


def was_polled(path: Path, since: float) -> bool:
    with contextlib.closing(sqlite3.connect(path.parent / "healthchecker.db", timeout=20)) as rows:
        return rows.execute("SELECT max(polled_at) FROM status").fetchone()[0] > since  # type: ignore[no-any-return]


@pytest.mark.long
def test_a_service_knows_what_was_writable_after_a_reload_and_a_restart(machine: Machine, tmp_path: Path) -> None:
    entry = "  - {name: me, platform: local, interval: 2, retry_interval: 1, limits: {disk_percent: 98}}\n"
    path = write_inventory(tmp_path, entry)
    machine.do("disk data")
    for old, new in (("interval: 2", "interval: 1"), ("98", "97")):
        service = Program(path)
        service.command[:0] = machine.inside()
        with service:
            if old == "interval: 2":
                wait_for(lambda: "me healthy" in run(path, "status", "me").stdout)
                machine.do("turn ro data")
            wait_for(lambda: "became read-only: /srv/data" in run(path, "status", "me").stdout)
            write_inventory(tmp_path, entry := entry.replace(old, new))
            assert "1 changed" in run(path, "reload").stdout
            wait_for(functools.partial(was_polled, path, time.time() + 1))
            assert "became read-only: /srv/data" in run(path, "status", "me").stdout
