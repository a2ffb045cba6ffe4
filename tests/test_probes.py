"""Probes: every row of every table on recorded output, and the script itself under real shells.

Recordings are tests/recorded/<platform>/<row>.<what>.txt. Those named `recorded*` were taken on a real
Debian 12 machine (its name and kernel release replaced). All others, so everything of macOS and FreeBSD, are
constructed in the format of the commands, with numbers of our own; no such machine has confirmed them yet.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import healthchecker
from healthchecker import (
    KEPT_BYTES,
    PROBES,
    REASON_CHARS,
    Check,
    CpuTicks,
    Limits,
    Platform,
    Probe,
    ProbeError,
    ResourceSettings,
    Sample,
    build_script,
    complete,
    end_mark,
    last_section,
    parse_output,
    since,
)

NONCE = "5eed5eed5eed5eed"
RECORDED = Path(__file__).parent / "recorded"
on_unix = pytest.mark.skipif(sys.platform == "win32", reason="needs sh; run on UNIX")


def wanting(platform: Platform, services: Sequence[str] = (), checks: Sequence[Check] = (),
            **more: Any) -> ResourceSettings:  # fmt: skip
    """Of a resource that wants this to be asked, whatever the names."""
    return ResourceSettings.model_construct(
        name="a", hostname="a", platform=platform, services=[*services], checks=[*checks], **more)


def disks(**mounts: float) -> dict[str, float]:
    """Mount points as names, `root` for / and `__` for the other slashes."""
    return {
        f"disk_percent /{name.replace('root', '').replace('__', '/')}": value
        for name, value in mounts.items()
    }


EXPECTED: dict[str, object] = {
    "linux/hostname.recorded": "db1.example.com",
    "linux/kernel.recorded": "Linux 6.1.0-28-amd64",
    "linux/os.recorded": "Debian GNU/Linux 12 (bookworm)",
    "linux/os.centos-6": "CentOS release 6.10 (Final)",
    "linux/uptime_seconds.recorded": 1795.36,
    "linux/cpu_count.recorded": 2.0,
    "linux/cpu_percent.recorded": CpuTicks(busy=35844.0, total=357214.0),
    "linux/cpu_percent.virtual-machine": CpuTicks(busy=554000.0, total=9614000.0),
    "linux/memory_percent.recorded": 100 * (24684084 - 24157092) / 24684084,
    "linux/memory_percent.rhel-7-old-kernel": 55.0,
    "linux/swap_percent.recorded-none": None,
    "linux/swap_percent.rhel-7": 25.0,
    "linux/load_per_cpu.recorded": 0.47,
    "linux/disk_percent.recorded": disks(root=100 * 25456148 / (25456148 + 80934764)),
    "linux/disk_percent.recorded-busybox": disks(root=100 * 25456152 / (25456152 + 80934760)),
    "linux/disk_percent.debian-lvm-bind-mounts": disks(root=300 / 7, var__log=90.0, boot=25.0, boot__efi=1.0)
    | {"disk_percent /srv/backup of Monday": 50.0, "disk_percent /mnt/old style": 10.0},
    "linux/disk_percent.zfs-quota": disks(root=100 * 50.95 / 90.95, home__anna=95.0),
    "linux/disk_percent.one-disk-fails": disks(root=25.0)
    | {"disk_percent": "df: /srv/old: Input/output error"},
    "linux/disk_percent.container": {"disk_percent": "no local filesystem (skipped: overlay, tmpfs)"},
    "macos/hostname.macos-14": "build1.example.com",
    "macos/kernel.macos-14": "Darwin 23.5.0",
    "macos/os.macos-14": "macOS 14.5",
    "macos/uptime_seconds.macos-14": 86400.0,
    "macos/cpu_count.macos-14": 8.0,
    "macos/cpu_percent.macos-14": 15.0,
    "macos/cpu_percent.busy": 100.0,
    "macos/memory_percent.apple-silicon": 50.0,
    "macos/load_per_cpu.macos-14": 0.3,
    "macos/disk_percent.apple-silicon": {
        "disk_percent /System/Volumes/Data": 100 * 280 / 480,
        "disk_percent /Volumes/USB Stick": 25.0,
    },
    "macos/disk_percent.mojave": disks(root=100 * 190 / 240),
    "freebsd/hostname.freebsd-14": "fw1.example.com",
    "freebsd/kernel.freebsd-14": "FreeBSD 14.1-RELEASE-p3",
    "freebsd/os.freebsd-14": "FreeBSD 14.1-RELEASE-p4",
    "freebsd/uptime_seconds.freebsd-14": 3600.0,
    "freebsd/cpu_count.freebsd-14": 4.0,
    "freebsd/cpu_percent.freebsd-14": CpuTicks(busy=160000.0, total=1000000.0),
    "freebsd/memory_percent.ufs": 25.0,
    "freebsd/memory_percent.zfs": 60.0,
    "freebsd/swap_percent.two-devices": 25.0,
    "freebsd/swap_percent.none": None,
    "freebsd/load_per_cpu.freebsd-14": 0.125,
    "freebsd/disk_percent.ufs": disks(root=100.0, boot__efi=100 * 660 / 266136),
    "freebsd/disk_percent.zfs": disks(root=50.0, tank=75.0),
    "posix/hostname.recorded": "db1.example.com",
    "posix/kernel.recorded": "Linux 6.1.0-28-amd64",
    "posix/os.recorded": "Linux 6.1.0-28-amd64",
    "posix/cpu_count.recorded": 2.0,
    "posix/load_per_cpu.recorded": 0.47,
    "posix/load_per_cpu.openbsd": 0.6,
    "posix/disk_percent.recorded": disks(root=100 * 25456176 / (25456176 + 80934736)),
    "posix/disk_percent.openbsd": disks(root=40.0, home=25.0),
}
# A figure that another locale wrote, or that is not there, is a problem and never a wrong number.
PROBLEMS = {
    "linux/load_per_cpu.decimal-comma": "'0,81' is not a number",
    "linux/uptime_seconds.decimal-comma": "'858,19' is not a number",
    "posix/load_per_cpu.decimal-comma": "'0,81' is not a number",
}


def recording(name: str) -> tuple[Probe, str]:
    platform, _, rest = name.partition("/")
    probe = next(probe for probe in PROBES[Platform(platform)].probes if probe.name == rest.partition(".")[0])
    return probe, (RECORDED / f"{name}.txt").read_text(encoding="utf-8").strip()  # as parse_output does


@pytest.mark.parametrize("name", EXPECTED)
def test_recording(name: str) -> None:
    probe, text = recording(name)
    value, expected = probe.parse(text), EXPECTED[name]
    if isinstance(value, dict) and isinstance(expected, dict):
        assert {key: share for key, share in value.items() if key.startswith("disk")} == {
            key: pytest.approx(share) if isinstance(share, float) else share
            for key, share in expected.items()
        }
    else:
        assert value == (pytest.approx(expected) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("name", PROBLEMS)
def test_recording_that_is_a_problem(name: str) -> None:
    probe, text = recording(name)
    with pytest.raises(ValueError, match=PROBLEMS[name]):
        probe.parse(text)


def test_every_row_has_a_recording_and_every_recording_a_test() -> None:
    files = {path.relative_to(RECORDED).with_suffix("").as_posix() for path in RECORDED.glob("*/*.txt")
             if path.parent.name != "endpoint"}  # which tests/test_endpoints.py reads
    rows = {f"{platform.value}/{probe.name}" for platform, table in PROBES.items() for probe in table.probes}
    assert files == EXPECTED.keys() | PROBLEMS.keys()
    assert rows == {name.partition(".")[0] for name in EXPECTED}


HOSTILE = [
    "",
    "\n",
    "nan",
    "inf",
    "1e999",
    "-5",
    "9" * 400,
    "9" * 5000,
    "x" * (1 << 20),
    " " * (1 << 20),
    "1 " * (1 << 19),
    "1%\n" * 100_000,
    "0 0 0 0 0 0 0\n0",
    "cpu  nan 0 0 0 0",
    "cpu ",
    "MemTotal: 0 kB\nMemAvailable: 0 kB",
    "{ nan 0 0 }\n4",
    "MemTotal: 5 kB\nMemAvailable: 9 kB\nSwapTotal: 5 kB\nSwapFree: 9 kB",
    "0.5\n0",
    "\u0661 \u0662\n\u0663",
    "/dev/a x 1 99999999999999999999 1 5% /",
    "/dev/a ext4 1 -1 1 5% /",
    "/dev/a 1 -1 1 5% /",
    "Device 1\na b",
    "::::",
    "=====",
    f"/dev/a ext4 2 1 1 50% /{'x' * 100_000}\n/dev/a 2 1 1 50% /{'x' * 100_000}",
]


@pytest.mark.long
@pytest.mark.parametrize("name", sorted({name.partition(".")[0] for name in EXPECTED} - {"posix/os"}))
def test_hostile_output_is_a_value_in_range_or_a_problem(name: str) -> None:
    platform, _, row = name.partition("/")
    began = time.process_time()
    for text in HOSTILE:
        sample = parsed(Platform(platform), {row: text})
        assert_sound(sample)
        answered = {*sample.problems, *sample.details, *(key.partition(" ")[0] for key in sample.metrics)}
        assert row in answered or (row == "cpu_percent" and sample.ticks), text[:40]
    assert time.process_time() - began < 20


def output(platform: Platform, sections: dict[str, str], status: int | str = 0) -> str:
    """What the script would print, with these sections answered."""
    parts = {f"platform {platform.value}": "", **sections}
    body = "".join(
        f"\n@{NONCE} begin {name}\n{text}\n@{NONCE} end {status}\n" for name, text in parts.items()
    )
    return f"{body}\n@{NONCE} done\n"


def parsed(platform: Platform, sections: dict[str, str], previous: CpuTicks | None = None) -> Sample:
    return parse_output(output(platform, {"hostname": "db1", "check any 5": "", **sections}), NONCE, previous)


def assert_sound(sample: Sample) -> None:
    """What every consumer relies on, whatever a host sends."""
    for name, value in sample.metrics.items():
        assert math.isfinite(value) and value >= 0 and len(name) < 5000, name
        assert "percent" not in name or value <= 100, name
    for problem in sample.problems.values():
        assert problem and len(problem) <= REASON_CHARS and "\n" not in problem
    for outcome in [*sample.services.values(), *sample.checks.values()]:
        assert len(outcome.text.encode()) <= KEPT_BYTES
        assert not any(ord(char) < 32 and char not in "\n\t" for char in outcome.text)
    for detail in sample.details.values():
        assert not isinstance(detail, float) or math.isfinite(detail)


# --- CPU ticks ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("previous", "expected"),
    [
        (None, None),
        (CpuTicks(busy=50.0, total=900.0), 50.0),
        (CpuTicks(busy=100.0, total=900.0), 0.0),
        (CpuTicks(busy=0.0, total=900.0), 100.0),
        (CpuTicks(busy=100.0, total=1000.0), None),  # the same counters again
        (CpuTicks(busy=5000.0, total=90000.0), None),  # restarted since
        (CpuTicks(busy=101.0, total=900.0), 0.0),  # of a clock that is a little ahead
        (CpuTicks(busy=101.1, total=900.0), None),
        (CpuTicks(busy=0.0, total=950.0), None),  # more busy than time
    ],
)
def test_cpu_percent_needs_two_readings_and_is_no_problem_without(
    previous: CpuTicks | None, expected: float | None
) -> None:
    sample = parsed(Platform.FREEBSD, {"cpu_percent": "60 0 40 0 900"}, previous)
    assert sample.ticks == CpuTicks(busy=100.0, total=1000.0)
    assert sample.metrics.get("cpu_percent") == expected
    assert "cpu_percent" not in sample.problems


# --- Output as a whole -------------------------------------------------------
def test_a_row_without_answer_is_a_problem_under_its_name() -> None:
    sample = parsed(Platform.LINUX, {"memory_percent": "MemTotal: 100 kB\nMemAvailable: 25 kB"})
    assert sample.metrics == {"memory_percent": 75.0}
    assert sample.problems["swap_percent"] == "no answer"
    assert sample.details == {"hostname": "db1"}


def test_a_failed_command_is_a_problem_with_its_words() -> None:
    text = output(Platform.LINUX, {"cpu_percent": "head: cannot open '/proc/stat'\nmore"}, status=1)
    ok = output(Platform.LINUX, {"hostname": "db1"})
    sample = parse_output(ok.partition(f"\n@{NONCE} done")[0] + text, NONCE, None)
    assert sample.problems["cpu_percent"] == "exit status 1: head: cannot open '/proc/stat'"


def test_a_disk_that_fails_leaves_the_others() -> None:
    _, text = recording("linux/disk_percent.one-disk-fails")
    sample = parsed(Platform.LINUX, {"disk_percent": text})
    assert sample.metrics == {"disk_percent /": 25.0}
    assert sample.problems["disk_percent"] == "df: /srv/old: Input/output error"


# What is mounted, fstab, rows of df; the readings. Shapes: a loop disk with `mount --bind root /pb; mount -o
# remount,bind,ro /pb`, by GNU's df and BusyBox'; fstab of Debian's installer; ZFS with `canmount=off` at the pool.
ROOT = "/dev/sda1 / ext4 rw,relatime 0 0\n"
TABLES: dict[str, tuple[str, str, list[str], dict[str, float]]] = {
    "a disk whose place with the shorter name is read-only": (
        ROOT + "/dev/loop0 /srv/root ext4 rw 7:0\n/dev/loop0 /pb ext4 rw 7:0\n", "",
        ["/dev/sda1 100 10 90 10% /", "/dev/loop0 100 99 1 99% /srv/root"], {"/": 10.0, "/pb": 99.0}),
    "as a kernel without numbers or an endpoint of before says it, listed twice": (
        ROOT + "/dev/loop0 /srv/root ext4 rw,relatime 0 0\n/dev/loop0 /pb ext4 ro,relatime 0 0\n", "",
        ["/dev/sda1 100 10 90 10% /", "/dev/loop0 100 99 1 99% /srv/root", "/dev/loop0 100 99 1 99% /pb"],
        {"/": 10.0, "/srv/root": 99.0}),
    "all of it at a shorter place": (
        ROOT + "/dev/loop0 /srv/root ext4 rw 7:0/\n/dev/loop0 /pb ext4 rw 7:0/\n", "",
        ["/dev/sda1 100 10 90 10% /", "/dev/loop0 100 99 1 99% /srv/root"], {"/": 10.0, "/pb": 99.0}),
    "a part of it at a shorter place, as OpenMediaVault does": (
        ROOT + "/dev/sdb1 /srv/dev-disk-by-uuid-1234 ext4 rw 8:17/\n/dev/sdb1 /srv/Media ext4 rw 8:17/Media\n", "",
        ["/dev/sda1 100 10 90 10% /", "/dev/sdb1 100 99 1 99% /srv/Media"],
        {"/": 10.0, "/srv/dev-disk-by-uuid-1234": 99.0}),
    "what is no disk and called by a path, in CentOS 6 and a chroot": (
        ROOT + "/proc/bus/usb /proc/bus/usb usbfs rw,relatime 0 0\n/sys /srv/sys sysfs rw 0:21/\n", "",
        ["/dev/sda1 100 10 90 10% /", "sysfs 0 0 0 - /srv/sys"], {"/": 10.0}),
    "one whose name looks like a flag": (
        ROOT + "/dev/loop0 /x ext4 rw 7:0/a,ro,b\n", "",
        ["/dev/sda1 100 10 90 10% /", "/dev/loop0 100 99 1 99% /x"], {"/": 10.0, "/x": 99.0}),
    "directories of a subvolume, of Fedora Silverblue": (
        "/dev/vda3 /sysroot btrfs rw,subvolid=256,subvol=/fedora 0:31/fedora\n"
        "/dev/vda3 / btrfs rw,subvolid=256,subvol=/fedora 0:31/fedora/ostree/deploy/fedora/deploy/1.0\n"
        "/dev/vda3 /var btrfs rw,subvolid=258,subvol=/var 0:31/var\n", "",
        ["/dev/vda3 100 10 90 10% /sysroot", "/dev/vda3 100 10 90 10% /var"], {"/var": 10.0}),
    "one that fstab says is read-only": (
        ROOT + "/dev/loop0 /x ext4 ro 7:0/\n", "/dev/loop0 /x ext4 ro 0 2\n",
        ["/dev/sda1 100 10 90 10% /", "/dev/loop0 100 99 1 99% /x"], {"/": 10.0}),
    "no table of mounts that may be read": (
        "bash: /sbin/mount: Permission denied\n", "", ["/dev/hd0 100 99 1 99% /"], {"/": 99.0}),
    "no table of mounts": (
        "sh: mount: not found\n", "", ["/dev/hd0 100 99 1 99% /", "tmpfs 100 100 0 100% /run"], {"/": 99.0}),
    "two disks of one name": (
        "/dev/sdb1 /old ext4 rw 8:17\n/dev/sdb1 /new ext4 rw 8:33\n", "",
        ["/dev/sdb1 100 10 90 10% /old", "/dev/sdb1 100 99 1 99% /new"], {"/old": 10.0, "/new": 99.0}),
    "one that is read-only everywhere": (
        ROOT + "/dev/loop0 /pb squashfs2 ro 0 0\n/dev/loop0 /p ext4 ro,relatime 0 0\n", "",
        ["/dev/sda1 100 10 90 10% /", "/dev/loop0 100 100 0 100% /p"], {"/": 10.0}),
    "comments of an installer": (
        ROOT + "/dev/sda2 /boot ext4 ro,relatime 0 0\n",
        "# /boot was on /dev/sda2 during installation\n  #/dev/sda2 /boot ext4 defaults 0 2\n"
        "UUID=2 /boot           ext4    defaults,ro        0       2\n",
        ["/dev/sda1 100 10 90 10% /", "/dev/sda2 100 93 7 93% /boot"], {"/": 10.0}),
    "a quota of the dataset with the shortest name": (
        "tank/a /a zfs rw,xattr 0 0\ntank/bulk /bulk zfs rw,xattr 0 0\n", "",
        ["tank/a 1000 990 10 99% /a", "tank/bulk 1000000 1000 999000 1% /bulk"],
        {"/a": 99.0, "/bulk": 100 * 1990 / 1000990}),
    "an image that fstab does not call read-only": (
        ROOT + "/dev/loop0 /srv/centos iso9660 ro,relatime,nojoliet,check=s,map=n,blocksize=2048 0 0\n",
        "/var/lib/images/centos.iso /srv/centos iso9660 loop 0 0\n",
        ["/dev/sda1 100 10 90 10% /", "/dev/loop0 100 100 0 100% /srv/centos"], {"/": 10.0}),
    "images with a backslash and a # in their places": (
        ROOT + r"/dev/loop3 /mnt/a\134b iso9660 ro,relatime 0 0" "\n" r"/dev/loop4 /mnt/x\043y squashfs ro 0 0" "\n",
        "",
        ["/dev/sda1 100 10 90 10% /", r"/dev/loop3 100 100 0 100% /mnt/a\b", "/dev/loop4 100 100 0 100% /mnt/x#y"],
        {"/": 10.0}),
    "huge pages with a size": (
        ROOT + "nodev /mnt/huge hugetlbfs rw,relatime,pagesize=1024M,size=4G 0 0\n", "",
        ["/dev/sda1 100 10 90 10% /", "nodev 4194304 4194304 0 100% /mnt/huge"], {"/": 10.0}),
}


@pytest.mark.parametrize("case", TABLES.values(), ids=TABLES)
def test_tables_of_disks(case: tuple[str, str, list[str], dict[str, float]]) -> None:
    mounted, fstab, rows, readings = case
    space = "\n".join(["Filesystem 1024-blocks Used Available Capacity Mounted on", *rows])
    sample = parsed(Platform.LINUX, {"disk_percent": f"{mounted}@fstab\n{fstab}@space\n{space}\n@inodes\n"})
    assert sample.metrics == {f"disk_percent {point}": share for point, share in readings.items()}
    assert not [name for name in sample.problems if name.startswith("disk_percent")]
    assert not {"disk_percent", "filesystem"} & {
        name.partition(" ")[0] for name in since(sample, since(sample, None)).problems}, "nothing turned"


# What mount says, rows of df, `mounts` of the limit; the readings of disks, then of inodes. Shapes: macOS 14 with a
# volume of its own beside Data; iocage; FreeBSD's statfs of msdosfs before D38987 and of mqueuefs; df of GNU and of
# macOS 14; a dataset of ZFS with a quota and children.
MAC = """/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
/dev/disk3s1 on /System/Volumes/Update/mnt1 (apfs, sealed, local, journaled, nobrowse)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse, protect, root data)
/dev/disk3s7 on /Volumes/Builds (apfs, local, nodev, nosuid, journaled)
/dev/disk3s8 on /nix (apfs, local, journaled, nobrowse)"""
MAC_ROWS = [
    "/dev/disk3s1s1 500 10 2 84% /", "/dev/disk3s1 500 10 2 84% /System/Volumes/Update/mnt1",
    "/dev/disk3s5 500 400 2 100% /System/Volumes/Data", "/dev/disk3s7 500 8 2 80% /Volumes/Builds",
    "/dev/disk3s8 500 1 2 34% /nix"]
JAILS = "\n".join([f"tank/{name} on /{name} (zfs, local, nfsv4acls)" for name in ("jails", "scratch", "postgres")])
JAILS_ROWS = [
    "tank/jails 600 100 500 17% 10 900 1% /jails", "tank/scratch 601 101 500 17% 10 900 1% /scratch",
    "tank/postgres 10299 9799 500 95% 10 900 1% /postgres"]
TANK = "\n".join(f"tank{name} on /tank{name} (zfs, local)" for name in ("", "/a", "/bb"))
TANK_ROWS = ["tank 1000 100 900 10% /tank"]
UFS = "/dev/gpt/rootfs on / (ufs, local, soft-updates)\n"
UFS_ROW = "/dev/gpt/rootfs 100 10 90 10% 25 75 25% /"
POOLS: dict[str, tuple[str, list[str], dict[str, Any], dict[str, float], dict[str, float]]] = {
    "a container": (MAC, MAC_ROWS, {}, {"/nix": 99.6}, {}),
    "the volume that names a container is off": (MAC, MAC_ROWS, {"/nix": "off"}, {"/Volumes/Builds": 99.6}, {}),
    "by a pattern, and the next": (
        MAC, MAC_ROWS, {"/Volumes/*": "off", "/nix": "off"}, {"/System/Volumes/Data": 99.6}, {}),
    "all of them are": (MAC, MAC_ROWS, {"/*": "off"}, {"/nix": 99.6}, {}),
    "a pattern has a limit for another": (
        MAC, MAC_ROWS, {"/System/Volumes/*": 95}, {"/nix": 99.6, "/System/Volumes/Data": 99.6}, {}),
    "a volume with a quota": (
        MAC, ["/dev/disk3s5 500 400 80 84% /System/Volumes/Data", "/dev/disk3s7 20 19 1 95% /Volumes/Builds"], {},
        {"/System/Volumes/Data": 84.0, "/Volumes/Builds": 95.0}, {}),
    "as GNU's df says it": (
        MAC, ["/dev/disk3s5 972 757 216 78% /System/Volumes/Data", "/dev/disk3s7 972 757 216 78% /Volumes/Builds"], {},
        {"/Volumes/Builds": 100 * 756 / 972}, {}),
    "the dataset that names a pool is off": (JAILS, JAILS_ROWS, {"/jails": "off"}, {"/scratch": 100 * 100 / 105}, {}),
    "datasets under one quota": (
        "\n".join(["tank on /tank (zfs, local)",
                   *(f"tank/u/{used} on /u/{used} (zfs, local)" for used in (200, 100, 150, 500))]),
        ["tank 500 1 499 1% 1 8 0% /tank",
         *(f"tank/u/{used} {50 + used} {used} 50 0% 1 8 0% /u/{used}" for used in (200, 100, 150, 500))],
        {}, {"/tank": 100 * 951 / 1450, **{f"/u/{used}": 95.0 for used in (200, 100, 150, 500)}}, {}),
    "two full ones, one of which has a limit of its own": (
        TANK, [*TANK_ROWS, "tank/a 100 100 0 100% /tank/a", "tank/bb 50 50 0 100% /tank/bb"], {"/tank/a": 100},
        {"/tank": 100 * 250 / 1150, "/tank/a": 100.0, "/tank/bb": 100.0}, {}),
    "a dataset and a copy of it, of the same size": (
        TANK, ["tank 200 0 200 0% /tank", *(f"tank/{name} 600 400 200 67% /tank/{name}" for name in ("a", "bb"))], {},
        {"/tank": 80.0}, {}),
    "containers of one size, with a quota each": (
        TANK, [*TANK_ROWS, *(f"tank/{name} 80 10 70 13% /tank/{name}" for name in ("a", "bb"))], {},
        {"/tank": 100 * 120 / 1020, "/tank/a": 12.5, "/tank/bb": 12.5}, {}),
    "the name of a pool has a limit of its own, which holds for it": (
        JAILS, JAILS_ROWS, {"/jails": 99}, {"/jails": 100 * 10000 / 10500}, {}),
    "snapshots": (
        JAILS + "\ntank/jails@a on /jails/.zfs/snapshot/a (zfs, local)\n",
        [*JAILS_ROWS, "tank/jails@a 900 900 0 100% 1 8 0% /jails/.zfs/snapshot/a"],
        {}, {"/jails": 100 * 10000 / 10500}, {}),
    "a FAT that says it has no inodes left": (
        UFS + "/dev/nvd0p1 on /boot/efi (msdosfs, local)",
        [UFS_ROW, "/dev/nvd0p1 100 1 99 1% 512 0 100% /boot/efi"], {}, {"/": 10.0, "/boot/efi": 1.0}, {"/": 25.0}),
    "what FreeBSD says is full": (
        UFS + "\n".join(f"{kind} on /{kind} ({kind}, local)" for kind in ("mqueuefs", "lindebugfs", "p9fs", "bootfs")),
        [UFS_ROW, *(f"{kind} 4 4 0 100% 1 0 100% /{kind}" for kind in ("mqueuefs", "lindebugfs", "p9fs", "bootfs"))],
        {}, {"/": 10.0}, {"/": 25.0}),
    "inodes without end": (
        "/dev/da0 on /x (hammer2, local)", ["/dev/da0 100 10 90 10% 5 9223372036854775807 0% /x"], {},
        {"/x": 10.0}, {"/x": 0.0}),
}


@pytest.mark.parametrize("case", POOLS.values(), ids=POOLS)
def test_what_shares_its_space(
    case: tuple[str, list[str], dict[str, Any], dict[str, float], dict[str, float]]
) -> None:
    mounted, rows, mounts, full, inodes = case
    text = output(Platform.FREEBSD, {"disk_percent": "\n".join([mounted, "@space", *rows, "@inodes"])})
    limits = Limits.model_validate({"disk_percent": {"fail": 98, "mounts": mounts}})
    named = wanting(Platform.FREEBSD, limits=limits).mount_limits.items()
    sample = parse_output(text, NONCE, None, named)
    assert sample.metrics == {f"disk_percent {point}": pytest.approx(share) for point, share in full.items()} | {
        f"inode_percent {point}": pytest.approx(share) for point, share in inodes.items()}
    assert "disk_percent" not in sample.problems


def test_a_pool_that_zfs_says_is_nothing_costs_no_disk_its_reading() -> None:
    text = output(Platform.FREEBSD, {"disk_percent": "\n".join([TANK, "@space", *TANK_ROWS]), "pools": "tank\t0\t0"})
    assert parse_output(text, NONCE, None).metrics == {"disk_percent /tank": 10.0}


# fstab(5): the fields after the third may be left out
@pytest.mark.parametrize("line", ["/dev/sdb1 /data/ ext4 defaults 0 2", "/dev/sdb1 /data ext4"])
def test_a_disk_turned_read_only_however_fstab_writes_it(line: str) -> None:
    sample = parsed(Platform.LINUX, {"disk_percent": (
        f"{ROOT}/dev/sdb1 /data ext4 ro,relatime 0 0\n@fstab\n/dev/sda2 none swap\nproc /proc\n{line}\n@space\n"
        "/dev/sda1 100 10 90 10% /\n/dev/sdb1 100 99 1 99% /data\n@inodes\n")})
    assert sample.problems["filesystem /data"] == "became read-only" and "disk_percent" not in sample.problems
    assert sample.metrics["disk_percent /data"] == 99.0


def test_the_only_disk_turned_read_only() -> None:
    before, after = (output(Platform.FREEBSD, {"disk_percent": (
        f"/dev/ada0p2 on / (ufs, local, {flag})\n@space\n/dev/ada0p2 100 10 90 10% 1 9 10% /\n@inodes\n")})
        for flag in ("journaled soft-updates", "read-only"))
    assert parse_output(after, NONCE, None).problems["disk_percent"] == "no local filesystem (skipped: nothing)"
    writable = since(parse_output(before, NONCE, None), None).writable
    assert parse_output(after, NONCE, None, (), writable).problems["filesystem /"] == "became read-only"


def test_a_df_without_an_end_is_not_taken_for_no_disks() -> None:
    sample = parsed(Platform.POSIX, {"disk_percent": (
        "/dev/sd0a on / type ffs (local)\nnas:/x on /net/x type nfs (v3)\n@space\ndf: no end in 5 s")})
    assert sample.problems["disk_percent"] == "df: no end in 5 s"


@pytest.mark.parametrize("said", [  # of BusyBox without FEATURE_DF_FANCY, and of our own
    "df: invalid option -- 'i'\nBusyBox v1.30.1 (2019-02-14) multi-call binary.", "df: no end in 5 s"])
def test_inodes_that_cannot_be_read_are_a_problem_for_whoever_limits_them(said: str) -> None:
    sample = parsed(Platform.LINUX, {"disk_percent": (
        f"{ROOT}@fstab\n@space\n/dev/sda1 100 10 90 10% /\n@inodes\n{said}")})
    limits = Limits.model_validate({"inode_percent": "95"})
    assert said.partition("\n")[0] in complete(sample, wanting(Platform.LINUX, limits=limits)).problems["inode_percent"]
    assert "inode_percent" not in complete(sample, wanting(Platform.LINUX, limits=Limits())).problems


@pytest.mark.parametrize(
    "text",
    [
        "",
        "This account is currently not available.\n",
        f"\n@{NONCE} done\n",
        f"\n@{NONCE} begin platform windows\n\n@{NONCE} end 0\n",
        f"\n@{NONCE} begin platform linux\n\n@{NONCE} end 0\n\n@{NONCE} done\n",
    ],
)
def test_nothing_readable_is_a_protocol_error(text: str) -> None:
    with pytest.raises(ProbeError) as caught:
        parse_output(text, NONCE, None)
    assert caught.value.cause == "protocol"
    assert len(str(caught.value)) < REASON_CHARS + 100


def test_what_ran_when_the_output_stopped() -> None:
    text = output(Platform.LINUX, {"hostname": "db1", "service nginx": "x", "check two%20words 5": "y"})
    assert last_section(text, NONCE) == ""
    assert last_section(text.rpartition(f"\n@{NONCE} end")[0], NONCE) == "check two words"
    assert last_section(text[: text.index("nginx\n") + 6], NONCE) == "service nginx"
    assert last_section("", NONCE) == ""
    assert end_mark(NONCE) in text
    assert end_mark(NONCE) not in text[:-1] and end_mark("0" * 16) not in text


@pytest.mark.parametrize(
    ("platform", "status", "text", "good", "shown"),
    [
        (
            Platform.LINUX,
            0,
            "LoadState=loaded\nActiveState=active\nSubState=running",
            True,
            "active (running)",
        ),
        (
            Platform.LINUX,
            0,
            "LoadState=loaded\nActiveState=reloading\nSubState=reload",
            True,
            "reloading (reload)",
        ),
        (
            Platform.LINUX,
            0,
            "LoadState=loaded\nActiveState=failed\nSubState=failed",
            False,
            "failed (failed)",
        ),
        (
            Platform.LINUX,
            0,
            "LoadState=loaded\nActiveState=activating\nSubState=auto-restart",
            False,
            "activating (auto-restart)",
        ),
        (
            Platform.LINUX,
            0,
            "LoadState=not-found\nActiveState=inactive\nSubState=dead",
            False,
            "no such unit",
        ),
        (
            Platform.LINUX,
            1,
            "Failed to connect to bus: Connection refused",
            False,
            "Failed to connect to bus: Connection refused",
        ),
        (Platform.LINUX, 0, " * status: started", True, "* status: started"),
        (Platform.LINUX, 3, "", False, "exit status 3"),
        (
            Platform.MACOS,
            0,
            "system/org.nginx = {\n\tactive count = 1\n\tstate = running\n\t\tstate = active\n}",
            True,
            "running",
        ),
        (
            Platform.MACOS,
            0,
            "system/org.nginx = {\n\tstate = not running\n\t\tstate = active\n}",
            False,
            "not running",
        ),
        (Platform.MACOS, 113, 'Could not find service "x" in domain for system', False, "no such service"),
        (Platform.FREEBSD, 0, "nginx is running as pid 815.", True, "nginx is running as pid 815."),
        (Platform.FREEBSD, 1, "nginx is not running.", False, "nginx is not running."),
        (Platform.POSIX, 0, "", False, "services are not supported on this platform"),
    ],
)
def test_service_states(platform: Platform, status: int, text: str, good: bool, shown: str) -> None:
    ok = output(platform, {"hostname": "db1"})
    sample = parse_output(ok + output(platform, {"service my%20app": text}, status), NONCE, None)
    assert (sample.services["my app"].good, sample.services["my app"].text) == (good, shown)


def test_texts_are_cut_in_bytes() -> None:
    assert_sound(parsed(Platform.FREEBSD, {"service x": "\u00e9" * 5000, "check y 5": "\ufffd" * 5000}))


WORDS = st.sampled_from(
    [
        "begin",
        "end",
        "done",
        "platform",
        "linux",
        "macos",
        "0",
        "1",
        "-1",
        "124",
        "lost",
        "service",
        "check",
        "check x",
        "a%20b",
        "hostname",
        "disk_percent",
        "cpu_percent",
        "",
        "5",
        "%ff",
        "\u0663",
    ]
)
HEADERS = st.lists(WORDS, max_size=4).map(lambda words: f"\n@{NONCE} {' '.join(words)}\n")
BODIES = (
    st.sampled_from([path.read_text(encoding="utf-8") for path in sorted(RECORDED.glob("*/*.txt"))])
    | st.text()
)


@pytest.mark.long
@given(st.sampled_from(list(PROBES)), st.lists(HEADERS | BODIES, max_size=12), st.booleans())
def test_any_output_gives_a_sound_sample_or_a_protocol_error(
    platform: Platform, parts: list[str], known: bool
) -> None:
    text = (output(platform, {"hostname": "db1"}) if known else "") + "".join(parts)
    last_section(text, NONCE)
    try:
        assert_sound(parse_output(text, NONCE, CpuTicks(busy=1.0, total=2.0)))
    except ProbeError as error:
        assert error.cause == "protocol"


@given(
    st.sampled_from([(platform, probe.name) for platform, table in PROBES.items() for probe in table.probes]),
    BODIES,
    st.integers(0, 400),
    st.text(max_size=8),
)
def test_any_answer_to_a_row(row: tuple[Platform, str], body: str, cut: int, insert: str) -> None:
    platform, name = row
    assert_sound(parsed(platform, {name: body[:cut] + insert + body[cut:]}, CpuTicks(busy=1.0, total=2.0)))


# --- The script under real shells --------------------------------------------
SHELLS = {
    "dash": ("dash", "-s"),
    "bash": ("bash", "--posix", "-s"),
    "busybox": ("busybox", "sh", "-s"),
    "ksh": ("ksh", "-s"),
    "mksh": ("mksh", "-s"),
    "zsh": ("zsh", "--emulate", "sh", "-s"),
    "yash": ("yash", "-o", "posixly-correct", "-s"),
}
CHECKS = [
    Check(name="good", command="echo fine", timeout=20),
    Check(name="warning", command="echo 'it is; $HOME'; exit 1", timeout=20),
    Check(name="silent", command="exit 3", timeout=20),
    Check(name="chatty", command="head -c 5000 /dev/zero | tr '\\0' x", timeout=20),
    Check(name="slow", command="echo begun; sleep 30; echo x", timeout=1),
    Check(name="endless", command="yes", timeout=1),
    Check(name="reads stdin", command="cat; echo end of file", timeout=20),
    Check(name="unended", command="printf 'no newline'", timeout=20),
    Check(name="marker", command="printf '@abcd end 0\\n@abcd done\\n'; exit 1", timeout=20),
    Check(name="syntax", command="if (", timeout=20),
    Check(name="it's", command="exit 0", timeout=20),
    Check(name="bytes", command="printf 'a\\033[1m\\377\\tb'", timeout=20),
    Check(name="missing", command="/nonexistent/command", timeout=20),
    Check(name="leaves", command="exit; }", timeout=20),
    Check(name="locale", command='echo "$LC_ALL:$LANGUAGE"', timeout=20),
    Check(name="killed", command="kill -KILL $$", timeout=20),
]


def shell_command(name: str) -> list[str]:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed (apt-get install {name})")
    return list(SHELLS[name])


def run_script(command: list[str], script: str, seconds: float = 30.0, **environ: str) -> tuple[str, float]:
    """Feeds the script as a connection does, and reads up to the end marker only."""
    began, received = time.monotonic(), b""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environ},
    ) as process:
        assert process.stdin and process.stdout
        overdue = threading.Timer(seconds, process.kill)
        overdue.start()
        try:
            process.stdin.write(script.encode() + b"left over\n")  # nothing may read on
            process.stdin.close()
            while end_mark(NONCE).encode() not in received and (chunk := os.read(process.stdout.fileno(), 65536)):
                received += chunk
            took = time.monotonic() - began
            process.stdout.close()
            assert process.wait(60) == 0
        finally:
            overdue.cancel()
            process.kill()
    return received.decode(errors="replace"), took


@on_unix
@pytest.mark.parametrize("shell", SHELLS)
def test_one_round_trip_reads_this_machine(shell: str) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the tables of Linux and POSIX; run on Linux")
    for platform in (Platform.UNIX, Platform.LOCAL, Platform.LINUX, Platform.POSIX):
        text, _ = run_script(
            shell_command(shell), build_script(wanting(platform), NONCE), LC_ALL="de_DE.UTF-8"
        )
        assert end_mark(NONCE) in text
        sample = parse_output(text, NONCE, CpuTicks(busy=0.0, total=0.0))
        table = PROBES[Platform.POSIX if platform is Platform.POSIX else Platform.LINUX]
        assert sample.details["hostname"] == os.uname().nodename
        assert sample.details["cpu_count"] == os.sysconf("SC_NPROCESSORS_ONLN")
        assert "load_per_cpu" in sample.metrics
        answered = {*sample.details, *sample.problems, *(name.partition(" ")[0] for name in sample.metrics)}
        assert {probe.name for probe in table.probes} - {"swap_percent"} <= answered
        unknown = Limits.model_fields.keys() - {probe.name for probe in table.probes}
        assert sample.problems.keys() <= {"disk_percent", *unknown}  # a container has no disk of its own
        assert_sound(sample)


@pytest.mark.long
@on_unix
@pytest.mark.parametrize("shell", SHELLS)
def test_checks(shell: str) -> None:
    text, took = run_script(
        shell_command(shell),
        build_script(wanting(Platform.POSIX, [], CHECKS), NONCE),
        LC_ALL="de_DE.UTF-8",
        LANGUAGE="de",
    )
    checks = parse_output(text, NONCE, None).checks
    assert list(checks) == [check.name for check in CHECKS]
    good = {name for name, outcome in checks.items() if outcome.good}
    assert good == {"good", "chatty", "reads stdin", "unended", "it's", "bytes", "locale"}
    assert checks["locale"].text == "C:"
    assert not checks["killed"].text.startswith("no end")
    assert checks["good"].text == "fine"
    assert checks["warning"].text == "it is; $HOME"
    assert checks["silent"].text == "exit status 3"
    assert checks["chatty"].text == "x" * KEPT_BYTES
    assert checks["slow"].text == "no end in 1 s: begun"
    assert checks["endless"].text.startswith("no end in 1 s: y\ny\n")
    assert checks["reads stdin"].text == "end of file"
    assert checks["unended"].text == "no newline"
    assert checks["marker"].text == "@abcd end 0\n@abcd done"
    assert checks["bytes"].text.startswith("a[1m")
    assert "not found" in checks["missing"].text
    assert len(text.partition(" begin disk_percent\n")[0]) < 11_000, "kept on the remote side"
    assert took < 25


@on_unix
@pytest.mark.parametrize("shell", SHELLS)
def test_bytes_that_are_no_characters_hide_no_status(shell: str, tmp_path: Path) -> None:
    """Where both come in one piece; yash drops what is behind them."""
    keep = re.search(r"^(piece\(\) .*?)?^keep\(\) .*?^}$", healthchecker.SCRIPT, re.MULTILINE | re.DOTALL)
    assert keep
    said = tmp_path / "said"
    said.write_bytes(b"a\xffb\n@abcd status 7 1 .\n")
    text, _ = run_script(shell_command(shell), f"LC_ALL=C N=abcd\n{keep[0]}\nkeep <{said}\nexit 0\n")
    assert text.startswith("a") and "@abcd end 7 1" in text


@on_unix
@pytest.mark.parametrize("shell", SHELLS)
def test_a_daemon_left_behind_delays_nobody(shell: str, tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    check = Check(name="starts", command=f"sleep 60 & echo $! >{noted}; echo started", timeout=5)
    try:
        text, took = run_script(
            shell_command(shell),
            build_script(wanting(Platform.POSIX, [], [check, Check(name="next", command="echo 2", timeout=5)]), NONCE),
        )
    finally:
        if noted.exists():
            os.kill(int(noted.read_text(encoding="ascii")), 15)
    checks = parse_output(text, NONCE, None).checks
    assert [(outcome.good, outcome.text) for outcome in checks.values()] == [(True, "started"), (True, "2")]
    assert took < 25


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[Path]:
    """A folder with what the script calls, but no timeout(1), as on macOS."""
    for name in ("uname", "date", "dd", "sleep", "getconf", "df", "uptime", "printf", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name) or pytest.fail(name))
    yield tmp_path


@pytest.mark.long
@on_unix
@pytest.mark.parametrize("shell", ["dash", "bash", "busybox", "ksh"])
def test_checks_end_without_timeout_1(shell: str, tools: Path) -> None:
    command = shell_command(shell)
    command[0] = shutil.which(command[0]) or ""
    checks = [
        Check(name="slow", command="echo begun; exec sleep 30", timeout=1),
        Check(name="deaf", command="trap '' TERM; exec sleep 30", timeout=1),
        Check(name="good", command="echo 1", timeout=9),
    ]
    script = build_script(wanting(Platform.POSIX, [], checks), NONCE)
    script = "".join(line for line in script.splitlines(True) if not line.startswith("PATH="))
    text, took = run_script(command, script, PATH=str(tools))
    outcomes = parse_output(text, NONCE, None).checks
    assert outcomes["slow"].text == "no end in 1 s: begun"
    assert outcomes["deaf"].text == "no end in 1 s"
    assert outcomes["good"].good
    assert took < 25


@on_unix
def test_services_ask_with_the_name_quoted(tmp_path: Path) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("runs service(8) in a folder of its own; run where systemd is not the init")
    asked = tmp_path / "service"
    asked.write_text('#!/bin/sh\necho "$1:$2"\ntest "$1" = good\n', encoding="ascii")
    asked.chmod(0o755)
    script = build_script(wanting(Platform.LINUX, ["good", "no; 'such'"]), NONCE)
    text, _ = run_script(shell_command("dash"), script, PATH=f"{tmp_path}:{os.environ['PATH']}")
    services = parse_output(text, NONCE, None).services
    assert (services["good"].good, services["good"].text) == (True, "good:status")
    assert (services["no; 'such'"].good, services["no; 'such'"].text) == (False, "no; 'such':status")


@on_unix
def test_a_poll_that_is_cut_says_where(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    check = Check(name="replication", command=f"touch {begun}; sleep 30", timeout=20)
    cut = f"exec 3<&0; timeout 60 sh -s <&3 & until test -e {begun}; do sleep 0.05; done; kill $!; wait; exit 0"
    text, _ = run_script(["sh", "-c", cut], build_script(wanting(Platform.POSIX, [], [check]), NONCE))
    assert end_mark(NONCE) not in text
    assert last_section(text, NONCE) == "check replication"


def test_a_fixed_platform_carries_its_own_table_only() -> None:
    script = build_script(wanting(Platform.FREEBSD), NONCE)
    assert "kern.cp_time" in script and "/proc/stat" not in script
    both = build_script(wanting(Platform.UNIX), NONCE)
    assert "kern.cp_time" in both and "/proc/stat" in both and "vm_stat" in both
