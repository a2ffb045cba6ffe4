"""Real hosts: whole polls on what real machines print, from tests/recorded/<system>/*.transcript (see hosts.py).

The script that we would send runs under a shell that finds the machine's own commands, so that both what we ask and
how the answer is read are tested. A test marked with `fault` names what is not true yet.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import math
import re
import shutil
import sys
import time
from dataclasses import replace
from typing import Any

import hosts
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_probes import assert_sound, wanting

from healthchecker import (
    CONTROL,
    NOT_KNOWN,
    OUTPUT_BYTES,
    PROBES,
    CpuTicks,
    Deadline,
    Limits,
    Output,
    Platform,
    ProbeError,
    ResourceSettings,
    Sample,
    build_script,
    collect,
    end_mark,
    evaluate,
    parse_output,
    since,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs sh; run on UNIX")
NONCE = "5eed5eed5eed5eed"
HOSTS = hosts.host_names()


def fault(reason: str) -> pytest.MarkDecorator:
    """What today's code does wrongly, in one line."""
    return pytest.mark.xfail(strict=True, reason=reason)


def rows(table: dict[str, Any], faults: dict[str, str]) -> list[Any]:
    """A table as parameters; what is in `faults` is not read rightly yet."""
    assert faults.keys() <= table.keys()
    return [pytest.param(key, value, id=key, marks=[fault(faults[key])] if key in faults else [])
            for key, value in table.items()]


@functools.cache
def output_of(name: str) -> str:
    host = hosts.host(name)
    return hosts.play(host, build_script(wanting(Platform.UNIX, host.services), NONCE))


@functools.cache
def sample_of(name: str) -> Sample:
    return parse_output(output_of(name).removesuffix(end_mark(NONCE)), NONCE, None)


def readings(sample: Sample, metric: str) -> dict[str, float]:
    return {key.removeprefix(f"{metric} "): value for key, value in sample.readings(metric)}


class Played:
    """A connection to a machine that is played."""

    def __init__(self, host: hosts.Host) -> None:
        self.host = host

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        del deadline
        text = hosts.play(self.host, script)
        assert output.mark.decode() in text, text[-500:]
        return output.take(text.encode())


def resource(**changed: Any) -> ResourceSettings:
    return ResourceSettings.model_validate({"name": "db1", "hostname": "localhost", "username": "monitor"} | changed)


# --- The transcripts themselves ----------------------------------------------
@pytest.mark.parametrize("name", HOSTS)
def test_a_transcript_says_whose_it_is_and_names_nobody(name: str) -> None:
    host = hosts.host(name)
    assert re.match("## .*[0-9]", host.comment), "the first line names system and version"
    assert "Shape" in host.comment, "and where the shape was found"
    assert "uname -snr" in host.answers
    text = (hosts.RECORDED / f"{name}.transcript").read_text(encoding="utf-8")
    documented = [ipaddress.ip_network(network) for network in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")]
    for address in re.findall(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])", text):
        if not re.search(rf"^Linux \S+ {re.escape(address)}", text, re.MULTILINE):  # a kernel of four numbers
            assert any(ipaddress.ip_address(address) in network for network in documented), address
    for domain in re.findall(r"[\w-]+\.(?:com|net|org|de)\b", text):
        assert domain in ("example.com", "com.example") or domain.startswith("com."), domain


@pytest.mark.parametrize("name", HOSTS)
def test_every_row_is_answered_or_named(name: str) -> None:
    sample = sample_of(name)
    assert_sound(sample)
    table = next(table for key, table in PROBES.items() if f" begin platform {key.value}\n" in output_of(name))
    answered = {*sample.details, *sample.problems, *(key.partition(" ")[0] for key in sample.metrics)}
    assert {probe.name for probe in table.probes} - answered <= {"swap_percent", "cpu_percent"}
    assert "not recorded" not in str(sample)


# --- Disks -------------------------------------------------------------------
def pool(free: float, *used: float) -> float:
    return 100 * sum(used) / (sum(used) + free)


PROXMOX = pool(600000000, 100000000, 100000064, 128, 7200000)
APFS = 100 * 280 / 480      # sizes are of the container, whose other volumes are not mounted
DISKS: dict[str, dict[str, float]] = {
    "aix/7": {"/": 25, "/usr": 75, "/var": 50, "/tmp": 10, "/home": 10, "/opt": 50, "/var/adm/ras/livedump": 0.14},
    "aix/7-wpar": {"/": 25, "/home": 10, "/tmp": 10, "/var": 90},
    "alpine/3.20": {"/": 50, "/boot": 25},
    "android/14": {"/data": 25},
    "balena/2": {"/mnt/data": 10, "/mnt/boot": 55, "/mnt/state": 1},
    "bcachefs/6": {"/": 25, "/srv/store": 90},
    "busybox/1.01": {"/etc": 25},
    "container/docker-cgroup1": {"/etc/hosts": 40},
    "container/docker-cgroup2": {"/data": 40},
    "container/gvisor": {},
    "debian/12-inodes": {"/": 25, "/var/spool": 50, "/srv/old": 40, "/srv/xfs": 50},
    "debian/12-remounted": {"/": 25, "/srv/data": 50},
    "debian/13-emergency": {"/": 25, "/srv/data": 50},
    "fedora/42": {"/": 25, "/boot": 50, "/boot/efi": 3},
    "flatcar/3975": {"/": 25, "/oem": 10, "/boot": 50},
    "freebsd/13-ufs": {"/": 100, "/var": 25, "/boot/efi": 10},
    "freebsd/14-zfs": {"/": pool(40000000, 10000000, 100, 29999900, 900000), "/var/log": 90, "/tank": 75,
                       "/boot/efi": 10},
    "illumos/omnios": {"/": 50, "/tank/vm": 90},
    "illumos/smartos-zone": {"/": 25},
    "macos/12-intel": {"/System/Volumes/Data": APFS},
    "macos/13-apple-silicon": {"/System/Volumes/Data": APFS},
    "macos/15-apple-silicon": {"/System/Volumes/Data": APFS, "/Volumes/USB Stick": 25},
    "netbsd/10": {"/": 25, "/home": 75, "/srv": 90},
    "openbsd/7": {"/": 40, "/home": 25, "/tmp": 25, "/usr": 100},
    "openwrt/23": {"/overlay": 25, "/srv/data": 90},
    "proxmox/8": {"/": PROXMOX, "/rpool/data/subvol-101-disk-0": 90},
    "proxmox/lxc": {"/": 25},
    "qnap/5": {"/mnt/boot_config": 0.5, "/share/CACHEDEV1_DATA": 75, "/mnt/HDA_ROOT": 50, "/mnt/ext": 98},
    "raspberry/12": {"/": 50, "/boot/firmware": 20},
    "rhel/6": {"/": 50, "/boot": 25, "/srv/data": 90},
    "rhel/7": {"/": 50, "/boot": 20, "/var": 75},
    "rhel/9": {"/": 25, "/boot": 40, "/boot/efi": 1},
    "sles/15": {"/": 75, "/boot/efi": 1, "/hana/data": 60},
    "solaris/11": {"/": 50},
    "synology/7": {"/": 20, "/tmp/SynologyAuthService": 3.04, "/volume1": 90, "/volume2": 50},
    "ubuntu/14.04": {"/": 40},
    "ubuntu/24.04": {"/": 75, "/boot": 25, "/boot/efi": 1, "/media/anna/USB STICK": 25},
    "wsl/1": {"/": 75},
    "wsl/2": {"/": 25},
}
# Windows' own drives: a disk or a view of another machine's, as one sees it; if not shown, they are listed.
WINDOWS_DRIVES = {"/mnt/c", "/mnt/d"}


def test_every_host_is_in_the_table() -> None:
    assert DISKS.keys() == set(HOSTS)


@pytest.mark.parametrize(("name", "expected"), rows(DISKS, {}))
def test_disks(name: str, expected: dict[str, float]) -> None:
    found = readings(sample_of(name), "disk_percent")
    found = {mount: value for mount, value in found.items() if mount in expected or mount not in WINDOWS_DRIVES}
    assert found == {mount: pytest.approx(value, abs=0.01) for mount, value in expected.items()}


ROW = re.compile(r"(.*?\S) +(?:([0-9]*[a-z]\S*) +)?([1-9][0-9]*) +(-?[0-9]+) +(-?[0-9]+) +[0-9]+%"
                 r"(?: +[0-9]+ +[0-9]+ +(?:[0-9]+%|-))? +(/.*)")


def mounted(host: hosts.Host) -> dict[str, tuple[str, str]]:
    """Device and type of all that df shows without -l, by mount point; the type as the machine's own table has it."""
    tables = [answer.text for command, answer in host.answers.items()
              if re.fullmatch("df -[PkT]+", command) and answer.text.startswith(("Filesystem", "df:"))]
    kinds = {}
    for path in ("proc/mounts", "etc/mnttab"):
        for words in (line.split() for line in host.files.get(path, "").splitlines()):
            kinds[words[1].replace("\\040", " ")] = words[2]
    for line in host.answers.get("mount", hosts.Answer("")).text.splitlines():
        for pattern in (r".* on (/.*) \(([^,)]+)", r".* on (/.*) type (\S+)", r".* (/\S*) +([a-z]\w+) +[A-Z]\w\w \d"):
            if found := re.match(pattern, line):
                kinds.setdefault(found[1], found[2])
    found_rows = [match for table in tables for line in table.splitlines() if (match := ROW.fullmatch(line))]
    return {row[6]: (row[1], kinds.get(row[6], row[2] or "")) for row in found_rows}


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_vanishes(name: str) -> None:
    """Each row of df is shown, shares the space of one that is shown, is named as a problem, or is listed by its type
    or mount point among the details."""
    sample, table = sample_of(name), mounted(hosts.host(name))
    assert table and all(kind for _, kind in table.values()), "df shows what is not mounted"
    shown = readings(sample, "disk_percent").keys()
    told = " ".join(map(str, [*sample.details.values(), *sample.problems.values()]))
    spaces = {re.sub(r"/.*" if kind == "zfs" else r"(?<=[0-9])s[0-9].*" if kind == "apfs" else "$^", "", device)
              for mount, (device, kind) in table.items() if mount in shown}
    for mount, (device, kind) in table.items():
        space = re.sub(r"/.*" if kind == "zfs" else r"(?<=[0-9])s[0-9].*" if kind == "apfs" else "$^", "", device)
        listed = [word for word in (mount, kind) if word and re.search(rf"(?<![\w/]){re.escape(word)}(?![\w/])", told)]
        assert mount in shown or listed or (space in spaces and kind != "tmpfs"), f"{mount} ({device}, {kind})"


def test_a_node_with_thousands_of_pods_stays_below_what_is_read() -> None:
    """Each pod has a root and volumes; their lines in /proc/mounts are long, and most are no disk."""
    host = hosts.host("debian/12-inodes")
    mounts, table = host.files["proc/mounts"], host.said("df -PkT")
    for number in range(3000):
        pod = f"/var/lib/kubelet/pods/0b0b0b0b-0000-4000-8000-{number:012}/volumes"
        root = f"/run/containerd/io.containerd.runtime.v2.task/k8s.io/{number:064}/rootfs"
        layers = ":".join(f"/var/lib/containerd/snapshots/{number + layer}/fs" for layer in range(12))
        mounts += f"overlay {root} overlay rw,relatime,lowerdir={layers} 0 0\n"
        mounts += f"tmpfs {pod}/kubernetes.io~projected/token tmpfs rw,relatime,size=4000000k,inode64 0 0\n"
        table += f"overlay overlay 40000000 10000000 30000000 25% {root}\n"
        table += f"tmpfs tmpfs 4000000 12 3999988 1% {pod}/kubernetes.io~projected/token\n"
    played = host._replace(files={**host.files, "proc/mounts": mounts},
                           answers={**host.answers, "df -PkT": hosts.Answer(table)})  # fmt: skip
    text = hosts.play(played, build_script(wanting(Platform.UNIX), NONCE))
    assert len(text) < OUTPUT_BYTES / 4
    assert readings(parse_output(text, NONCE, None), "disk_percent").keys() == DISKS["debian/12-inodes"].keys()


def changed(name: str, files: dict[str, str], row: str = "", *, local: bool = True, shell: str = "dash") -> Sample:
    """What is read of a machine with other files, and with one more row of df; not `local`: df -l leaves it out."""
    host = hosts.host(name)
    table = host.answers["df -PkT"]
    answers = {**host.answers, "df -PkT": table._replace(text=table.text + row)}
    played = host._replace(files={**host.files, **files}, answers=answers if local else {**answers, "df -PklT": table})
    text = hosts.play(played, build_script(wanting(Platform.UNIX), NONCE), shell)
    return parse_output(text.removesuffix(end_mark(NONCE)), NONCE, None)


def test_a_disk_behind_fuse_is_a_disk() -> None:
    """NTFS by ntfs-3g is `fuseblk`, on a device of this machine; what other types of FUSE show may be anything."""
    mounts = hosts.host("raspberry/12").files["proc/mounts"]
    mounts += "/dev/sda1 /mnt/backup fuseblk rw,nosuid,nodev,relatime,user_id=0,group_id=0,allow_other 0 0\n"
    row = "/dev/sda1      fuseblk  100000000 97000000   3000000      97% /mnt/backup\n"
    found = readings(changed("raspberry/12", {"proc/mounts": mounts}, row), "disk_percent")
    assert found == {**readings(sample_of("raspberry/12"), "disk_percent"), "/mnt/backup": 97}


def test_a_dataset_with_a_colon_in_its_name_is_no_server_s() -> None:
    """ZFS allows it, and GNU's df -l takes it for one."""
    mounts = hosts.host("proxmox/8").files["proc/mounts"]
    mounts += "tank/old:2024 /srv/old zfs rw,relatime,xattr,noacl,casesensitive 0 0\n"
    row = "tank/old:2024                zfs        100000000  90000000   10000000      90% /srv/old\n"
    found = readings(changed("proxmox/8", {"proc/mounts": mounts}, row, local=False), "disk_percent")
    assert found == {**readings(sample_of("proxmox/8"), "disk_percent"), "/srv/old": 90}


@pytest.mark.parametrize("shell", ["dash", "bash", "ksh", "mksh", "yash"])
def test_a_backslash_in_a_place_is_no_escape_of_echo(shell: str) -> None:
    r"""The kernel writes a space as \040 in its table, and a backslash as \134; df writes both as they are."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed (apt-get install {shell})")
    mounts = hosts.host("debian/12-inodes").files["proc/mounts"]
    mounts += r"/dev/sr0 /media/My\040Disk iso9660 ro,relatime 0 0" "\n" r"/dev/sdx1 /srv/a\134cb ext4 rw 0 0" "\n"
    rows_ = "/dev/sr0 iso9660 100 100 0 100% /media/My Disk\n/dev/sdx1 ext4 100 90 10 90% /srv/a\\cb\n"
    sample = changed("debian/12-inodes", {"proc/mounts": mounts}, rows_, shell=shell)
    before = sample_of("debian/12-inodes")
    assert readings(sample, "disk_percent") == {**readings(before, "disk_percent"), "/srv/a\\cb": 90}
    assert readings(sample, "inode_percent") == readings(before, "inode_percent")


@pytest.mark.parametrize(("said", "share"), [
    ("rpool\t1843200000000\t614400000000\n", 75.0), ("cannot open 'rpool': Permission denied\n", PROXMOX)])
def test_what_zfs_says_of_a_pool_counts(said: str, share: float) -> None:
    """Volumes of machines and snapshots, which are not mounted, take space, and clones do not. Shape: zfs-list(8)."""
    host = hosts.host("proxmox/8")
    answers = {**host.answers, "zfs list -Hpo name,used,avail -d 0": hosts.Answer(said, 0 if "\t" in said else 1)}
    text = hosts.play(host._replace(answers=answers), build_script(wanting(Platform.UNIX), NONCE))
    found = readings(parse_output(text.removesuffix(end_mark(NONCE)), NONCE, None), "disk_percent")
    assert found == {**readings(sample_of("proxmox/8"), "disk_percent"), "/": pytest.approx(share)}


@pytest.mark.parametrize("name", ["aix/7", "illumos/omnios", "netbsd/10", "openbsd/7", "solaris/11"])
def test_a_dead_server_hides_no_disk(name: str) -> None:
    """df that asks it has no end; AIX' has no -l, and is given what is there."""
    host = hosts.host(name)
    files = {path: f"{text}nas:/x\t/net/x\tnfs\trw,xattr,dev=94c0009\t1718000000\n"
             for path, text in host.files.items()}
    answers = {**host.answers, "mount": hosts.Answer(host.answers.get("mount", hosts.Answer("")).text
                                                     + "nas:/x on /net/x type nfs (nodev, v3, tcp)\n")}
    if name != "aix/7":
        answers |= {"df -Pkl": host.answers.get("df -Pkl", host.answers["df -Pk"]), "df -Pk": hosts.Answer("", 124)}
    text = hosts.play(host._replace(files=files, answers=answers), build_script(wanting(Platform.UNIX), NONCE))
    assert " 900000000 " not in text, "the server was asked"
    assert readings(parse_output(text, NONCE, None), "disk_percent") == {
        mount: pytest.approx(value, abs=0.01) for mount, value in DISKS[name].items()}


# --- Read-only filesystems ---------------------------------------------------
@pytest.mark.parametrize(
    ("name", "bad", "meant"),
    [
        ("debian/12-remounted", ["/", "/srv/data"], ["/srv/www"]),
        ("debian/13-emergency", ["/srv/data"], ["/"]),
        ("balena/2", [], ["/mnt/sysroot/active", "/mnt/sysroot/inactive"]),
        ("flatcar/3975", [], ["/usr"]),
        ("wsl/2", [], ["/usr/lib/wsl/drivers"]),
        ("android/14", [], ["/vendor"]),
    ],
)  # fmt: skip
def test_what_became_read_only_is_a_problem_and_what_was_meant_so_is_none(
    name: str, bad: list[str], meant: list[str]
) -> None:
    said = [where for where, why in sample_of(name).problems.items() if "read-only" in why]
    named = {mount for mount in [*bad, *meant] if re.search(rf"(?<![\w/]){re.escape(mount)}(?![\w/])", " ".join(said))}
    assert named == set(bad)


READ_ONLY_LIMITS: dict[str, tuple[dict[str, Any], bool]] = {
    "none": ({}, True),
    "of memory": ({"memory_percent": "100"}, True),
    "of disks": ({"disk_percent": "100"}, True),
    "of another disk": ({"disk_percent": {"warn": 100, "mounts": {"/": "off"}}}, True),
    "off": ({"disk_percent": {"warn": 100, "mounts": {"/var/spool": "off"}}}, False),
    "off by a pattern": ({"disk_percent": {"warn": 100, "mounts": {"/var/*": "off", "/": 100}}}, False),
}


@pytest.mark.parametrize("fstab", ["", "/dev/sdb1 /var/spool ext4 defaults 0 2\n"], ids=["turned", "by fstab"])
@pytest.mark.parametrize(("limits", "degraded"), READ_ONLY_LIMITS.values(), ids=READ_ONLY_LIMITS)
def test_a_filesystem_that_turns_read_only_degrades_unless_it_is_off(
    limits: dict[str, Any], degraded: bool, fstab: str
) -> None:
    """Whatever has a limit. Without a line in fstab the first sight is what was meant."""
    before = hosts.host("debian/12-inodes")
    mounts = before.files["proc/mounts"].replace("/dev/sdb1 /var/spool ext4 rw,", "/dev/sdb1 /var/spool ext4 ro,")
    after = before._replace(files={**before.files, "proc/mounts": mounts, "etc/fstab": fstab})
    settings_, kept = resource(limits=limits), None
    for host in (before, after, after) if not fstab else (after,):
        sample = kept = collect(settings_, Played(host), kept)
        if host is before:  # a poll that reads no disk forgets none
            assert evaluate(sample, settings_).state == "healthy"
            kept = since(replace(sample, metrics={}), sample)
    verdict = evaluate(sample, settings_)
    assert (verdict.state, verdict.cause) == (("degraded", "check") if degraded else ("healthy", ""))
    assert verdict.reason == ("filesystems: became read-only: /var/spool" if degraded else "")


# --- Inodes ------------------------------------------------------------------
INODES = {
    "alpine/3.20": {"/": 50, "/boot": 10},
    "android/14": {"/data": 10},
    "balena/2": {"/mnt/data": 1, "/mnt/state": 1},
    "debian/12-inodes": {"/": 10, "/var/spool": 100, "/srv/xfs": 1},
    "fedora/42": {"/boot": 10},
    "freebsd/13-ufs": {"/": 20, "/var": 100},
    "rhel/6": {"/": 25, "/boot": 1, "/srv/data": 99},
    "sles/15": {"/hana/data": 1},
    "ubuntu/24.04": {"/": 25, "/boot": 0.25},
    "wsl/2": {"/": 1},
}


@pytest.mark.parametrize(("name", "expected"), rows(INODES, {}))
def test_inodes(name: str, expected: dict[str, float]) -> None:
    """Of the disks that have any: what makes them as it needs them (btrfs) or has none (vfat) cannot run out."""
    found = readings(sample_of(name), "inode_percent")
    assert found == {mount: pytest.approx(value, abs=0.01) for mount, value in expected.items()}
    assert "inode_percent" not in sample_of(name).problems


def test_a_disk_without_inodes_left_is_unhealthy() -> None:
    verdict = evaluate(sample_of("debian/12-inodes"), resource(limits={"inode_percent": {"warn": "90", "fail": "98"}}))
    assert verdict.state == "unhealthy" and "inode_percent /var/spool" in verdict.reason


# --- Memory ------------------------------------------------------------------
MEMORY = {
    "alpine/3.20": 25, "container/docker-cgroup1": 68.75, "container/docker-cgroup2": 37.3137,
    "container/gvisor": 25, "freebsd/13-ufs": 30, "freebsd/14-zfs": 60, "macos/12-intel": 50,
    "macos/15-apple-silicon": 50, "macos/13-apple-silicon": 50, "proxmox/8": 100 * 33 / 64, "proxmox/lxc": 25,
    "raspberry/12": 25, "rhel/6": 50, "rhel/7": 25, "rhel/9": 25, "ubuntu/14.04": 50, "busybox/1.01": 25,
    "qnap/5": 25, "openwrt/23": 25,
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), rows(MEMORY, {}))
def test_memory(name: str, expected: float) -> None:
    """A container of Proxmox sees the host's ARC, and a host of cgroup v1 a limit that is none: neither counts."""
    assert sample_of(name).metrics["memory_percent"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["container/docker-cgroup1", "container/docker-cgroup2"])
def test_the_details_say_that_a_limit_is_meant(name: str) -> None:
    assert re.search("limit of [0-9]+", str(sample_of(name).details))


def test_files_that_were_read_again_and_again_fill_no_container() -> None:
    """Recorded of Linux 6.18, cgroup v1, with a limit of 300 MiB: no process in it, a file of 297 MB read three times;
    one of 250 MB then found room there."""
    stat = "cache 311427072\nrss 0\ninactive_file 0\nactive_file 311427072\ntotal_cache 311427072\ntotal_rss 0\n" \
        "total_inactive_anon 4096\ntotal_inactive_file 0\ntotal_active_file 311427072\n"
    group = "sys/fs/cgroup/memory/memory"
    sample = changed("container/docker-cgroup1", {
        f"{group}.limit_in_bytes": "314572800\n", f"{group}.usage_in_bytes": "311721984\n", f"{group}.stat": stat})
    assert sample.metrics["memory_percent"] == pytest.approx(0.09, abs=0.01)


def test_an_endpoint_of_before_tells_less_of_the_cache() -> None:
    """None of what was read again, and that is no problem."""
    stat = "sys/fs/cgroup/memory.stat"
    said = re.sub("(?m)^(active_file|slab_reclaimable) .*\n", "", hosts.host("container/docker-cgroup2").files[stat])
    assert changed("container/docker-cgroup2", {stat: said}).metrics["memory_percent"] == 50


def test_the_cache_of_the_host_is_none_of_a_container_s() -> None:
    """However small it is beside the memory of the container, of which lxcfs tells."""
    arc = "proc/spl/kstat/zfs/arcstats"
    cached = hosts.host("proxmox/lxc").files[arc].replace("24576000000", "600000000").replace("2048000000", "64000000")
    assert changed("proxmox/lxc", {arc: cached}).metrics["memory_percent"] == 25


SWAP = {"alpine/3.20": 10, "rhel/6": 50, "rhel/7": 25, "raspberry/12": 25, "freebsd/13-ufs": 25,
        "container/gvisor": None, "openwrt/23": None}


@pytest.mark.parametrize(("name", "expected"), rows(SWAP, {}))
def test_swap(name: str, expected: float | None) -> None:
    assert sample_of(name).metrics.get("swap_percent") == expected
    assert "swap_percent" not in sample_of(name).problems


def test_macos_has_no_share_of_its_swap() -> None:
    """It makes swap files as they are needed: total = 2048.00M  used = 1902.81M is a healthy machine."""
    assert sample_of("macos/12-intel").problems["swap_percent"] == NOT_KNOWN
    assert polls("macos/12-intel", 1, {"swap_percent": "80"}) == [
        f"degraded swap_percent cannot be read: {NOT_KNOWN}"]


# --- CPUs --------------------------------------------------------------------
CPUS = {"aix/7": 4, "alpine/3.20": 4, "android/14": 4, "busybox/1.01": 1, "illumos/omnios": 4,
        "illumos/smartos-zone": 4, "netbsd/10": 4, "openbsd/7": 4, "openwrt/23": 4, "qnap/5": 4, "solaris/11": 4,
        "macos/12-intel": 8, "freebsd/14-zfs": 4, "container/docker-cgroup2": 8}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), rows(CPUS, {}))
def test_cpus_and_load(name: str, expected: int) -> None:
    assert sample_of(name).details["cpu_count"] == expected
    assert sample_of(name).metrics["load_per_cpu"] == pytest.approx(0.2 if name.startswith("container") else 0.1)


def test_a_problem_shows_what_failed() -> None:
    host = hosts.host("netbsd/10")
    unknown = hosts.Answer("getconf: NPROCESSORS_ONLN: unknown variable\n", 1)
    text = hosts.play(host._replace(answers={**host.answers, "getconf NPROCESSORS_ONLN": unknown}),
                      build_script(wanting(Platform.UNIX), NONCE))
    why = parse_output(text, NONCE, None).problems["load_per_cpu"]
    assert "unknown variable" in why and "10 days" not in why


def polls(name: str, count: int, limits: dict[str, Any]) -> list[str]:
    """States of as many polls in a row of a machine whose figures stand still."""
    settings_, kept, states = resource(limits=limits), None, []
    for _ in range(count):
        sample = collect(settings_, Played(hosts.host(name)), kept)
        kept = sample
        verdict = evaluate(sample, settings_)
        states.append(f"{verdict.state} {verdict.reason}")
    return states


@pytest.mark.parametrize("name", ["container/gvisor", "debian/12-inodes"])
def test_counters_that_stand_still_are_a_problem_at_the_third_poll(name: str) -> None:
    """All zeros in gVisor; the second machine's are no zeros, but do not move either."""
    *first, third, fourth = polls(name, 4, {"cpu_percent": "90"})
    assert all(state.startswith("healthy") for state in first)
    assert third.startswith("degraded") and "cpu_percent" in third
    assert fourth.startswith("degraded")


def test_polls_in_quick_succession_are_not_what_keeps_the_cpus_busy() -> None:
    """As of two clicks on *Check now*, on a machine with one CPU: what a poll needs itself is all that it did between
    the two, and 100 %. The reading before stays, where there is one, and the counters to compare with."""
    host, wanted, kept, found = hosts.host("alpine/3.20"), resource(limits={"cpu_percent": "90"}), None, []
    for later, busy, idle in ((0, 100, 900), (0, 102, 900), (0, 104, 900), (1, 1100, 3900), (0, 1110, 3900),
                              (1, 1160, 3950), (1, 4160, 3950)):  # fmt: skip
        stat = {**host.files, "proc/stat": f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\n"}
        if kept:
            kept = replace(kept, counted_mono=-math.inf if later else math.inf)
        kept = collect(wanted, Played(host._replace(files=stat)), kept)
        found.append((kept.metrics.get("cpu_percent"), evaluate(kept, wanted).state))
    assert found == [(None, "healthy")] * 3 + [(25.0, "healthy")] * 2 + [(pytest.approx(100 * 60 / 110), "healthy"),
                                                                         (100.0, "unhealthy")]  # fmt: skip


def test_what_a_machine_does_not_have_is_no_missing_reading() -> None:
    """A limit of swap_percent on a machine without swap stays good, at the fourth poll, too."""
    assert polls("openwrt/23", 4, {"swap_percent": "90"}) == ["healthy "] * 4


class Stuck(Played):
    """The same, whose df nothing can end."""

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        text = hosts.play(self.host, script)
        output.take(text[: re.search("begin disk_percent\n", text).end()].encode())  # type: ignore[union-attr]
        with contextlib.suppress(ProbeError):  # on a busy machine it is over by now
            time.sleep(deadline.left())
        return False


def test_a_disk_that_answers_never_costs_no_other_answer() -> None:
    asked = resource(services=["cron"], limits={"disk_percent": "90", "inode_percent": "90"}, timeout="1")
    sample = collect(asked, Stuck(hosts.host("ubuntu/14.04")), None)
    assert sample.services["cron"].good and "memory_percent" in sample.metrics
    assert sample.problems == {"disk_percent": "no answer", "inode_percent": "no answer"}
    assert evaluate(sample, asked).state == "degraded"


# --- Services ----------------------------------------------------------------
SERVICES = {
    "alpine/3.20 nginx": True,
    "alpine/3.20 postgresql": False,
    "alpine/3.20 chronyd": False,
    "alpine/3.20 nothere": False,
    "fedora/42 portal": True,
    "freebsd/13-ufs nginx": True,
    "freebsd/13-ufs mysql-server": False,
    "freebsd/13-ufs nothere": False,
    "macos/12-intel com.example.web": True,
    "macos/12-intel com.openssh.sshd": True,
    "macos/12-intel com.example.nightly": True,
    "macos/12-intel com.example.crashes": False,
    "macos/12-intel com.example.failed": False,
    "macos/12-intel com.example.nothere": False,
    "rhel/6 crond": True,
    "rhel/6 httpd": False,
    "rhel/6 mysqld": False,
    "rhel/6 cups": False,
    "rhel/6 erp-agent": False,
    "rhel/6 backupd": False,
    "rhel/6 nothere": False,
    "rhel/7 postgresql": True,
    "rhel/7 httpd": False,
    "rhel/7 firewalld": False,
    "rhel/7 network-once": True,
    "rhel/7 nothere": False,
    "rhel/9 nginx": True,
    "rhel/9 worker@1": False,
    "rhel/9 guarded": False,
    "sles/15 sapinit": True,
    "ubuntu/14.04 cron": True,
    "ubuntu/14.04 mysql": False,
    "ubuntu/14.04 app": False,
    "ubuntu/14.04 worker": True,
    "ubuntu/14.04 apache2": True,
    "ubuntu/14.04 nothere": False,
}


@pytest.mark.parametrize(("asked", "good"), rows(SERVICES, {}))
def test_services(asked: str, good: bool) -> None:
    name, _, service = asked.partition(" ")
    outcome = sample_of(name).services[service]
    assert outcome.good is good
    assert outcome.text


# what `service NAME status` prints, its exit status, and whether that is good; None: degraded
SAID: dict[str, tuple[str, int, bool | None]] = {
    "Upstart runs": ("cron start/running, process 1082", 0, True),
    "Upstart is starting": ("web start/pre-start, process 12", 0, False),
    "Upstart has stopped": ("mysql stop/waiting", 0, False),
    "Upstart is stopping": ("mysql stop/killed, process 12", 0, False),
    "Upstart without a process": ("network-interface (eth0) start/running", 0, True),
    "SysV of Red Hat": ("httpd is stopped", 0, False),
    "SysV of Debian": (" * nginx is not running", 0, False),
    "SysV of Debian, with the word failed": ("[FAIL] nginx is not running ... failed!", 0, False),
    "SysV that lists": ("Redirecting to nothing\nsyslogd is stopped", 0, False),
    "SysV dead": ("mysqld dead but subsys locked", 0, False),
    "a name that sounds like it": ("stopped-clock is running...", 0, True),
    "a service that runs and speaks of what stopped": ("app (pid 7) is running; 3 workers stopped", 0, True),
    "a path that sounds like Upstart": ("java (pid 7) is running: /opt/start/app.jar", 0, True),
    "OpenRC": (" * status: started", 0, True),
    "OpenRC stopped": (" * status: stopped", 0, False),
    "OpenRC crashed": (" * status: crashed", 0, False),
    "OpenWrt's procd": ("running", 0, True),
    "OpenWrt's procd, stopped": ("inactive", 0, False),
    "OpenWrt's procd, all of two": ("running (2/2)", 0, True),
    "OpenWrt's procd, one of two": ("running (1/2)", 0, False),
    "OpenWrt's procd, one of ten": ("running (1/10)", 0, False),
    "OpenWrt's procd, a firewall or what is not enabled": ("active with no instances", 0, None),
    "runit": ("run: app: (pid 308) 259s; run: log: (pid 309) 259s", 0, True),
    "runit, down": ("down: app: 2s, normally up; run: log: (pid 309) 1990s", 0, False),
    "s6": ("up (pid 308) 259 seconds", 0, True),
    "nothing": ("", 0, True),
    "nothing, and a status": ("", 3, False),
    "good words, bad status": ("app is running", 1, False),
}


@pytest.mark.long
@pytest.mark.parametrize(("title", "said"), rows(SAID, {}))
def test_what_a_service_says_counts_where_the_status_does_not(title: str, said: tuple[str, int, bool | None]) -> None:
    text, status, good = said
    host = hosts.host("ubuntu/14.04")
    played = host._replace(answers={**host.answers, "service x status": hosts.Answer(text + "\n", status)})
    sample = parse_output(hosts.play(played, build_script(wanting(Platform.UNIX, ["x"]), NONCE)), NONCE, None)
    assert (sample.services["x"].good, sample.services["x"].degraded) == (good is not False, good is None), title


def job(state: str, ended: str, *more: str) -> str:
    lines = ["active count = 0", "type = LaunchDaemon", f"state = {state}", "", "runs = 1", f"last {ended}", *more]
    return "system/com.example.web = {\n\t" + "\n\t".join(lines) + "\n}"


# As `launchctl print` writes them: empty blocks and properties over many lines up to macOS 10.14 (wazuh-packages issue
# 2206), `run interval` of a job with StartInterval, a trigger for each StartCalendarInterval.
OLD = ["event triggers = {", "}", "endpoints = {", "}", "sockets = {", "}"]
LATER = ["properties = runatload | inferred program"]
TRIGGER = ["event triggers = {", "\tcom.apple.launchd.calendarinterval => {", "\t\tkeepalive = 0", "\t}", "}"]
ENDPOINT = ["endpoints = {", '\t"com.example.web" = {', "\t\tport = 0x1", "\t}", "}"]
JOBS: dict[str, tuple[str, bool | None, str]] = {      # None: degraded
    "a daemon that ended": (job("not running", "exit code = 0", *LATER), None, "not running and nothing demands it"),
    "one that ended, up to Mojave": (job("waiting", "exit code = 0", *OLD, "properties = {", "\tkeepalive = 0", "}"),
                                     None, "waiting and nothing demands it"),
    "one that shall run": (job("not running", "exit code = 0", "properties = keepalive | runatload"), False,
                           "not running"),
    "one that shall run, up to Mojave": (job("waiting", "exit code = 0", *ENDPOINT, "properties = {",
                                             "\tpartial import = 0", "\tkeepalive = 1", "}"), False, "waiting"),
    "a timer": (job("not running", "exit code = 0", "run interval = 300 seconds", *LATER), True,
                "not running (on demand)"),
    "a calendar": (job("not running", "exit code = (never exited)", *TRIGGER, *LATER), True, "not running (on demand)"),
    "a calendar, up to Mojave": (job("waiting", "exit code = 0", *TRIGGER, *OLD, "properties = {", "\tkeepalive = 0",
                                     "}"), True, "waiting (on demand)"),
    "an endpoint": (job("not running", "exit code = 0", *ENDPOINT, *LATER), True, "not running (on demand)"),
    "ended as it was idle": (job("not running", "terminating signal = Killed: 9", *ENDPOINT, *LATER), True,
                             "not running (on demand)"),
    "killed and not demanded": (job("not running", "terminating signal = Killed: 9", *LATER), False, "not running"),
    "crashed": (job("not running", "terminating signal = Segmentation fault: 11", *ENDPOINT, *LATER), False,
                "not running"),
    "a timer that failed": (job("not running", "exit code = 1", "run interval = 300 seconds"), False, "not running"),
}


@pytest.mark.parametrize(("title", "case"), rows(JOBS, {}))
def test_jobs_of_launchd(title: str, case: tuple[str, bool | None, str]) -> None:
    printed, good, text = case
    outcome = PROBES[Platform.MACOS].state(0, printed)
    assert (outcome.good, outcome.degraded, outcome.text) == (good is not False, good is None, text), title


# `systemctl show -a -p Id -p Type … -- 'w@*'` of systemd 252 prints a block for each unit that is loaded, stopped ones
# with -a, Type first however they are asked for, and none is no failure. Recorded of Debian's own units (postgresql
# with a cluster that failed, was stopped, or runs), of one that systemd-sysv-generator 252 made, whose daemon died
# after 3 s or never was in its control group, of instances of which some are enabled, and of one whose file is gone.
BLOCK = """Type={}
Id={}.service
LoadState={}
ActiveState={}
SubState={}
UnitFileState={}
StateChangeTimestampMonotonic={}
ActiveEnterTimestampMonotonic=15814328755
CanReload={}
"""
RUNS, STOPPED = "loaded active running enabled", "loaded inactive dead enabled"
USUAL = [*RUNS.split(), "simple", "15814328755", "no"]
UNITS: dict[str, tuple[str, dict[str, str], bool | None, str]] = {     # good, None: degraded
    "all run": ("w@*", {"w@1": RUNS, "w@2": RUNS}, True, "active (running)"),
    "one failed": ("w@*", {"w@1": RUNS, "w@2": "loaded failed failed static", "w@3": RUNS}, False,
                   "w@2.service is failed (failed)"),
    "one that starts at boot is stopped": ("w@*", {"w@1": STOPPED, "w@2": RUNS}, False,
                                           "w@1.service is inactive (dead)"),
    "one that a timer starts waits": ("w@*", {"w@1": STOPPED + " oneshot", "w@2": RUNS}, True, "active (running)"),
    "one that a socket starts waits": ("w@*", {"w@1": "loaded inactive dead static", "w@2": RUNS}, True,
                                       "active (running)"),
    "one is only named by another unit": ("w@*", {"w@1": "not-found inactive dead ", "w@2": RUNS}, True,
                                          "active (running)"),
    "one would not come back": ("w@*", {"w@1": RUNS, "w@2": "not-found active running "}, None,
                                "w@2.service is active (running), its unit file is not found"),
    "none runs": ("w@*", {"w@1": "loaded inactive dead static"}, False, "inactive (dead)"),
    "none is there": ("v@*", {}, False, "no unit matches"),
    "a failed cluster": ("postgresql", {"postgresql": "loaded active exited disabled oneshot",
                                        "postgresql@15-main": "loaded failed failed enabled forking"}, False,
                         "postgresql@15-main.service is failed (failed)"),
    "a stopped cluster": ("postgresql.service", {"postgresql": "loaded active exited disabled oneshot",
                                                 "postgresql@15-main": STOPPED + " forking"}, False,
                          "postgresql@15-main.service is inactive (dead)"),
    "a cluster that runs": ("postgresql", {"postgresql": "loaded active exited disabled oneshot",
                                           "postgresql@15-main": RUNS + " forking"}, True, "active (exited)"),
    "a oneshot": ("network-once", {"network-once": "loaded active exited enabled oneshot"}, True, "active (exited)"),
    "instances of what runs are others' business": ("ssh", {"ssh": RUNS, "ssh@7": "loaded failed failed static"}, True,
                                                    "active (running)"),
    "a daemon of SysV that died": ("lsb", {"lsb": "loaded active exited generated forking 15817324716"}, False,
                                   "active (exited): its processes have ended"),
    "a script of SysV without a process": ("sud", {"sud": "loaded active exited generated forking"}, None,
                                           "active (exited): no process that systemd knows of"),
    "one of SysV that was reloaded": ("lsb", {"lsb": "loaded active exited generated forking 15817324716 yes"}, None,
                                      "active (exited): no process that systemd knows of"),
    "one that is to remain after its exit": ("nat", {"nat": "loaded active exited enabled simple 15817324716"}, True,
                                             "active (exited)"),
    "a condition that is not met": ("snapd*", {"snapd": RUNS, "snapd.recovery-chooser-trigger": STOPPED}, True,
                                    "active (running)"),
    "its file is gone": ("gone", {"gone": "not-found active running "}, None,
                         "active (running), its unit file is not found"),
    "masked": ("masked", {"masked": "masked inactive dead masked"}, False,
               "inactive (dead), its unit file is masked"),
    "not there": ("nothere", {"nothere": "not-found inactive dead "}, False, "no such unit"),
}


@pytest.mark.parametrize(("title", "case"), rows(UNITS, {}))
def test_units_of_systemd(title: str, case: tuple[str, dict[str, str], bool | None, str]) -> None:
    name, units, good, text = case
    host, said = hosts.host("rhel/9"), dict[str, str]()
    for unit, words in units.items():
        load, active, sub, state, kind, *rest = words.split(" ") + USUAL[len(words.split(" ")):]
        said[unit] = BLOCK.format(kind, unit, load, active, sub, state, *rest)
    plain = name.removesuffix(".service")
    answers = {f"systemctl show {name}": "\n".join(
        block for unit, block in said.items() if unit == plain or "*" in name)}
    answers[f"systemctl show {plain}@*"] = "\n".join(
        block for unit, block in said.items() if unit.startswith(f"{plain}@"))
    played = host._replace(answers=host.answers | {asked: hosts.Answer(block) for asked, block in answers.items()})
    sample = parse_output(hosts.play(played, build_script(wanting(Platform.UNIX, [name]), NONCE)), NONCE, None)
    outcome = sample.services[name]
    assert (outcome.good, outcome.degraded, outcome.text) == (good is not False, good is None, text), title


@pytest.mark.parametrize(("states", "good", "text"), [
    (["active running", "active running"], True, "active (running)"),
    (["active running", "failed failed", "active running"], False, "w@1.service is failed (failed)"),
    (["active exited"], True, "active (exited)"),
    (["active exited\nUnitFileState=generated\nActiveEnterTimestampMonotonic=7\nType=forking"], None,     # systemd 219
     "active (exited): no process that systemd knows of"),
])  # fmt: skip
def test_units_of_which_less_is_said(states: list[str], good: bool | None, text: str) -> None:
    """By an endpoint of an earlier version, or an old systemd."""
    said = "\n".join("Id=w@{}.service\nLoadState=loaded\nActiveState={}\nSubState={}\n".format(
        number, *state.split(" ")) for number, state in enumerate(states))
    outcome = PROBES[Platform.LINUX].state(0, said.strip())
    assert (outcome.good, outcome.degraded, outcome.text) == (good is not False, good is None, text)


@pytest.mark.parametrize("service", ["sshd", "nginx"])
def test_a_service_that_cannot_be_seen_says_so(service: str) -> None:
    assert "see_other_uids" in sample_of("freebsd/14-zfs").services[service].text


@pytest.mark.parametrize("name", ["MSSQL$PAYROLL", "SQLAgent$A(1)", "a & b", "it's", "x[1]", "c#", "100%", "a;b"])
def test_names_of_services(name: str) -> None:
    assert resource(services=[name]).services == [name]
    assert resource(services=[name], platform="windows").services == [name]


# --- Limits by mount point, checks of Nagios ---------------------------------
BY_MOUNT = {"warn": "80", "fail": "95",
            "mounts": {"/boot": "off", "/backup": "100", "D:": {"fail": "98"}, "/srv/*": {"warn": "50"}}}  # fmt: skip
MOUNTS = {
    "the common limit": ({"disk_percent /": 96.0}, "unhealthy"),
    "the common warning": ({"disk_percent /": 90.0}, "degraded"),
    "off": ({"disk_percent /boot": 100.0}, "healthy"),
    "off is for that one only": ({"disk_percent /boot/efi": 100.0}, "unhealthy"),
    "a number of its own": ({"disk_percent /backup": 99.9}, "healthy"),
    "a limit of its own": ({"disk_percent D:": 97.0}, "healthy"),
    "a limit of its own, crossed": ({"disk_percent D:": 98.5}, "unhealthy"),
    "a pattern": ({"disk_percent /srv/data": 60.0}, "degraded"),
}


@pytest.mark.parametrize("metric", ["disk_percent", "inode_percent"])
@pytest.mark.parametrize(("title", "case"), rows(MOUNTS, {}))
def test_limits_by_mount_point(title: str, case: tuple[dict[str, float], str], metric: str) -> None:
    read, state = case
    metrics = {name.replace("disk_percent", metric): value for name, value in read.items()}
    settings_ = resource(limits={metric: BY_MOUNT})
    assert evaluate(Sample({}, metrics, None, {}, {}, {}), settings_).state == state, title


@pytest.mark.parametrize("mounts", [{"/": "101"}, {"/": {"warn": "90", "fail": "80"}}, {"/": "on"}, {"": "off"}])
def test_limits_by_mount_point_have_bounds(mounts: dict[str, Any]) -> None:
    assert Limits.model_validate({"disk_percent": {"fail": "90", "mounts": {"/": "off"}}})
    with pytest.raises(ValueError, match="mounts"):
        Limits.model_validate({"disk_percent": {"fail": "90", "mounts": mounts}})


PORTS = " ".join(f"Gi1/0/{port}=1%" for port in range(1, 97))
PLUGIN = {  # what a check with a limit of `mem` prints, and why it is not healthy
    "mem=1;2;3": ("healthy", ""),
    f"{PORTS} mem=1073741825B": ("unhealthy", "plug/mem at 1073741825, fail above 1073741824"),
    "$(printf %5000d 0) mem=1073741825B": (
        "degraded", "plug/mem cannot be read: not in the first 4,096 bytes of its output"),
    "mem=50,5GB": ("degraded", "plug/mem cannot be read: no number: 50,5GB"),
    "memory=1": ("degraded", "plug/mem cannot be read: no such performance data"),
}


@pytest.mark.parametrize(("text", "wanted"), rows(PLUGIN, {}))
def test_a_limit_of_performance_data(text: str, wanted: tuple[str, str]) -> None:
    """A real shell runs the check."""
    check = {"name": "plug", "command": f'echo "OK | {text}"', "exit": "nagios", "limits": {"mem": "1073741824"}}
    asked = resource(checks=[check], timeout="10")
    verdict = evaluate(collect(asked, Played(hosts.host("ubuntu/24.04")), None), asked)
    assert (verdict.state, verdict.reason) == wanted


# --- Any output at all -------------------------------------------------------
SOUND = [name for name in HOSTS if name != "macos/15-apple-silicon"]


def assert_nothing_made_up(text: str) -> None:
    """Numbers within bounds or a named problem for each row; no disk that was not in the text."""
    try:
        sample = parse_output(text, NONCE, CpuTicks(busy=1.0, total=2.0))
    except ProbeError as error:
        assert error.cause == "protocol" and str(error)
        return
    assert_sound(sample)
    text = text.translate(CONTROL)  # as parse_output does
    for key in sample.metrics:
        metric, _, mount = key.partition(" ")
        assert f"begin {metric.replace('inode', 'disk')}" in text or f"begin {metric}" in text, key
        assert not mount or (mount.startswith("/") and mount in text), key
    for key in sample.details:
        if key in ("hostname", "kernel", "os", "uptime_seconds", "cpu_count"):  # others are told by a row
            assert f"begin {key}" in text, key
    answered = {*sample.details, *sample.problems, *(key.partition(" ")[0] for key in sample.metrics)}
    silent = {"swap_percent"} | ({"cpu_percent"} if sample.ticks else set())
    asked = re.findall(rf"(?:^|\n)@{NONCE} begin platform (\w+)(?=\n)", text)
    if len(asked) == 1 and asked[0] in [platform.value for platform in PROBES]:
        assert {probe.name for probe in PROBES[Platform(asked[0])].probes} - answered <= silent


EDITS = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 400), st.sampled_from(
    ["", "\n", " ", "-", "0", "9" * 20, "nan", "1e9", "%", "100%", "\x00\xff", "/", "Filesystem", f"\n@{NONCE} end 0\n",
     f"\n@{NONCE} begin disk_percent\n", "\u0663", "x" * 5000]) | st.text(max_size=8)), max_size=6)


@given(st.sampled_from(SOUND), st.sampled_from(SOUND), EDITS, st.integers(0, 20000))
def test_any_output_gives_numbers_within_bounds_or_a_named_problem(
    name: str, other: str, edits: list[tuple[int, int, str]], cut: int
) -> None:
    """A poll that was damaged, cut off, or runs into another machine's."""
    text = output_of(name)
    for at, length, inserted in edits:
        text = text[:at] + inserted + text[at + length :]
    assert_nothing_made_up(text[:cut] + output_of(other)[cut:])
    assert_nothing_made_up(text[:cut])
    assert_nothing_made_up(text)


@settings(max_examples=20, deadline=None)
@given(st.just("macos/15-apple-silicon"), st.integers(0, 3000))
@example("macos/15-apple-silicon", 0)
def test_any_output_with_columns_of_inodes(name: str, cut: int) -> None:
    text = output_of(name)
    assert_nothing_made_up(text[:cut] + text[cut + 1 :])
    assert_nothing_made_up(text)


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("damage", ["nothing", "another poll's", "binary", "a mebibyte", "cut", "twice"])
def test_bad_output(name: str, damage: str) -> None:
    text = output_of(name)
    damaged = {
        "nothing": "",
        "another poll's": text.replace(NONCE, "0123456789abcdef"),
        "binary": bytes(range(256)).decode("latin-1") * 40,
        "a mebibyte": text.replace("\n/", "\n" + "x" * 40_000 + "/") + "y" * (1 << 20),
        "cut": text[: len(text) // 2],
        "twice": text + text,
    }[damage]
    assert_nothing_made_up(damaged)
    if damage in ("nothing", "another poll's", "binary"):
        with pytest.raises(ProbeError):
            parse_output(damaged, NONCE, None)
