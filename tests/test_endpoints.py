"""Endpoints: logins that can do nothing else, on a real sshd with the forced command that `endpoint NAME` prints."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hosts
import paramiko
import pytest
from conftest import NO_PASSWORD_LOGIN
from console import prepared_vault
from rights import ROOT
from service import run, write_inventory
from sshd import OPENSSH, POSIX, Sshd, SshServer, make_key, public_line, write_private
from test_probes import SHELLS
from test_real_hosts import HOSTS, resource
from test_sshd import login
from test_sshd import run as execute
from test_transport import connect, poll, restart, target

from healthchecker import (
    NOT_KNOWN,
    SUSPECT,
    Connection,
    ProbeError,
    ResourceSettings,
    Sample,
    Verdict,
    build_script,
    collect,
    digests,
    end_mark,
    evaluate,
    installed,
    judge_endpoint,
    main,
    parse_output,
    unix_endpoint,
)

RECORDED = Path(__file__).parent / "recorded" / "endpoint"
NONCE = "5eed5eed5eed5eed"
OUTDATED = "not answered by the endpoint: install it again"
REFUSED = "this login answers HealthChecker's polls (endpoint: true) and nothing else\n"
OFTEN = {"interval": 1, "timeout": 60}
SERVICES = ["nginx", "it's (x)"]
CHECKS: list[dict[str, Any]] = [
    {"name": "replication", "command": "cat /var/lag; test ! -e /var/broken", "timeout": 5},
    {"name": "Zürich", "command": "echo 'TITLE KEY HOLDS $n $N' \"it's\"; env | grep -c 5eed", "timeout": 6},
]


# === What is printed =========================================================


def printed(settings: ResourceSettings, key: Path | None = None) -> str:
    return unix_endpoint(settings, paramiko.PKey.from_path(key) if key else paramiko.ECDSAKey.generate())


def script_file(folder: Path, settings: ResourceSettings) -> Path:
    path = folder / "endpoint"
    path.write_text(printed(settings), encoding="utf-8", newline="\n")
    path.chmod(0o555)
    return path


@POSIX
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("nonce", "good"),
    [
        (NONCE, True),
        ("0123456789abcdef" * 4, True),
        (NONCE[1:], False),
        ("0123456789abcdef" * 4 + "0", False),
        (NONCE.upper(), False),
        ("", False),
        ("$(touch made)eeed", False),
        ("`touch made`eeeed", False),
        (f"{NONCE}; touch made", False),
        (f"{NONCE}\ntouch made", False),
        (f"\n{NONCE}", False),
        ("16:" + NONCE, False),
        ("5éèd5eed5eed5eed", False),
        ("????????????????", False),
        ("exec /bin/sh -s", False),
        (f"{NONCE} 4711", True),  # the number of a df that still hung
        (f"{NONCE} 4711 4712", False),
        (f"{NONCE} -1", False),
        (f"{NONCE} 1234567890", False),
    ],
)
def test_a_nonce_is_checked_before_anything_uses_it(shell: str, nonce: str, good: bool, tmp_path: Path) -> None:
    """In the host's own locale, in which [a-f] may be more than six characters."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed (apt-get install {shell})")
    path = script_file(tmp_path, resource(endpoint=True, platform="linux"))
    command = [*(word for word in SHELLS[shell] if word != "-s"), str(path)]
    env = {"PATH": "/usr/bin:/bin", "SSH_ORIGINAL_COMMAND": nonce, "LC_ALL": "C.UTF-8", "n": NONCE, "N": "x"}
    done = subprocess.run(command, cwd=tmp_path, env=env, input=b"touch made\n", capture_output=True, timeout=60,
                          check=False)  # fmt: skip
    assert not (tmp_path / "made").exists()
    if good:
        nonce = nonce.partition(" ")[0]
        assert done.stdout.decode().startswith(f"\n@{nonce} begin endpoint\n")
        assert done.stdout.decode().endswith(end_mark(nonce))
    else:
        assert (done.stdout, done.stderr.decode(), done.returncode) == (b"", REFUSED, 1)


@pytest.mark.long
@POSIX
@pytest.mark.parametrize("name", HOSTS)
def test_every_recorded_host_answers_an_endpoint_as_it_answers_a_script(name: str) -> None:
    """Field by field."""
    host = hosts.host(name)
    services = [name for name in host.services if "/" not in name]
    settings = resource(services=services, checks=CHECKS[1:], endpoint=True)
    sent = hosts.play(host, build_script(settings, NONCE))
    kept = hosts.play(host, f"SSH_ORIGINAL_COMMAND={NONCE}\n" + printed(settings).replace('-w "$0"', "-w none"))
    before, after = (parse_output(text.removesuffix(end_mark(NONCE)), NONCE, None) for text in (sent, kept))
    if "uptime_seconds" in before.details:  # of a boot time and this machine's clock
        assert float(after.details["uptime_seconds"]) - float(before.details["uptime_seconds"]) < 60
    without = {**before.details, "uptime_seconds": after.details.get("uptime_seconds", 0)}
    assert {**after.details, "uptime_seconds": without["uptime_seconds"]} == without
    assert (after.metrics, after.ticks, after.services, after.checks, after.problems) == (
        before.metrics, before.ticks, before.services, before.checks, before.problems)  # fmt: skip
    judged = judge_endpoint(after, settings)
    assert judged.problems == before.problems
    assert (judged.services, judged.checks) == (before.services, before.checks)


@pytest.mark.parametrize("platform", ["unix", "linux", "macos", "freebsd"])
def test_names_of_the_placeholders_are_names(platform: str) -> None:
    settings = resource(name="TITLE KEY HOLDS", platform=platform, services=["KEY", "TITLE"], checks=CHECKS)
    text = printed(settings)
    assert text.count("TITLE KEY HOLDS") == 2  # in the heading and in a check
    assert shlex.quote(installed(settings)) in text
    assert "\nunset LANGUAGE N; N=$n\n" in text.replace("export LC_ALL; ", "\n")
    assert "\r" not in text


# === What of it counts =======================================================


def reported(settings: ResourceSettings, good: bool = True, number: int = 1) -> str:
    """The answer of an endpoint that was made of `settings`."""
    held = [number, digests(settings)]
    text = f"\n@{NONCE} begin endpoint\n{json.dumps(held)}\n@{NONCE} end 0\n"
    rows = {"platform linux": "", "hostname": "db1"}
    rows |= {f"service {name}": "LoadState=loaded\nActiveState=active\nSubState=running" for name in settings.services}
    for title, row in rows.items():
        text += f"\n@{NONCE} begin {title}\n{row}\n@{NONCE} end 0\n"
    for check in settings.checks:
        text += f"\n@{NONCE} begin check {check.name} 5\nsaid\n@{NONCE} end {int(not good)} 0\n"
    return text


class Canned:
    """A connection that was sent a nonce alone, to a host that answers `text`, and with the nonce that it has ended."""

    def __init__(self, text: str, end: str = end_mark(NONCE)) -> None:
        self.text = text + end

    def begins_again(self, error: Exception, deadline: object) -> bool:
        """Nothing is open between polls."""
        return False

    def run(self, script: str, output: Any, deadline: Any) -> bool:
        del deadline
        assert re.fullmatch("[0-9a-f]{16}", script)
        output.take(self.text.replace(NONCE, script).encode())
        return True


@POSIX
def test_beside_a_df_that_hangs_an_endpoint_starts_no_other(tmp_path: Path) -> None:
    """It is told by number, as it is told nothing else; `df` is a stand-in that sleeps."""
    (tmp_path / "df").symlink_to(shutil.which("sleep") or "")
    path = script_file(tmp_path, resource(endpoint=True, platform="linux"))
    with subprocess.Popen(["df", "600"], executable=tmp_path / "df") as hung:
        try:
            env = {"PATH": os.environ["PATH"], "SSH_ORIGINAL_COMMAND": f"{NONCE} {hung.pid}"}
            done = subprocess.run(["sh", path], env=env, capture_output=True, timeout=60, check=True)
        finally:
            hung.kill()
    sample = parse_output(done.stdout.decode(), NONCE, None)
    assert sample.problems["disk_percent"] == f"df from an earlier poll still hangs (process {hung.pid})"
    assert sample.stuck[0] == str(hung.pid)


def judged(text: str, settings: ResourceSettings) -> tuple[Sample, Verdict]:
    sample = collect(settings, Canned(text), None)  # type: ignore[arg-type]
    return sample, evaluate(sample, settings)


def of_the_endpoint(sample: Sample) -> dict[str, str]:
    """The problems that are not of a metric."""
    return {name: why for name, why in sample.problems.items() if name.split()[0] in ("endpoint", "service", "check")}


def asked(*names: str, services: tuple[str, ...] = (), **changed: Any) -> ResourceSettings:
    checks = [{"name": name, "command": f"check {name}", "timeout": 5} | changed for name in names]
    return resource(checks=checks, services=list(services), endpoint=True)


def test_the_same_is_judged_as_ever() -> None:
    settings = asked("a", "b", services=("nginx",))
    sample, verdict = judged(reported(settings), settings)
    assert verdict.state == "healthy"
    assert (sample.checks.keys(), sample.services.keys()) == ({"a", "b"}, {"nginx"})
    sample, verdict = judged(reported(settings, good=False), settings)
    assert (verdict.state, verdict.cause) == ("unhealthy", "check")


@pytest.mark.parametrize("changed", [{"command": "other"}, {"timeout": 6}, {"exit": "nagios"}])
def test_what_differs_is_a_problem_and_no_verdict(changed: dict[str, Any]) -> None:
    """The host's check is bad, but it is not the one of the inventory."""
    wanted = asked("a", **changed)
    sample, verdict = judged(reported(asked("a"), good=False), wanted)
    assert (sample.checks, of_the_endpoint(sample)) == ({}, {"check a": OUTDATED})
    assert verdict == Verdict("degraded", "check", f"check a: {OUTDATED}")


def test_what_is_missing_is_a_problem() -> None:
    wanted = asked("a", "b", services=("nginx", "cron"))
    sample, verdict = judged(reported(asked("a", services=("nginx",))), wanted)
    assert verdict.state == "degraded"
    assert of_the_endpoint(sample) == {"check b": OUTDATED, "service cron": OUTDATED}
    assert (sample.checks.keys(), sample.services.keys()) == ({"a"}, {"nginx"})
    assert f"service cron: {OUTDATED}" in verdict.reason and f"check b: {OUTDATED}" in verdict.reason


def test_beside_it_everything_counts() -> None:
    _, verdict = judged(reported(asked("a"), good=False), asked("a", "b"))
    assert (verdict.state, verdict.cause, verdict.reason) == ("unhealthy", "check", "check a: said")


def test_what_the_inventory_dropped_is_no_verdict() -> None:
    sample, verdict = judged(reported(asked("a", "old"), good=False), asked())
    assert (sample.checks, of_the_endpoint(sample), verdict.state) == ({}, {}, "healthy")


def test_what_it_holds_and_does_not_answer_is_bad_as_ever() -> None:
    settings = asked("a", "b")
    text = reported(settings).replace(f"@{NONCE} begin check b", f"@{NONCE} begin lost b")
    _, verdict = judged(text, settings)
    assert (verdict.state, verdict.reason) == ("unhealthy", "check b: no answer")


@pytest.mark.parametrize("number", [0, 2])
def test_another_format_is_read_and_degraded(number: int) -> None:
    settings = asked("a")
    sample, verdict = judged(reported(settings, number=number), settings)
    assert verdict == Verdict("degraded", "check", f"endpoint: it has format {number}, not 1: install it again")
    assert sample.checks["a"].good
    _, verdict = judged(reported(settings, good=False, number=number), settings)
    assert verdict.state == "unhealthy"


@pytest.mark.parametrize("held", [
    "", "x", "[]", "[1]", '["x", {}]', "[1, {}, 2]", '[1, {"service x": 1}]', "null", f"[{'1' * 600}, {{}}]",
])  # fmt: skip
def test_an_answer_without_its_head_is_none(held: str) -> None:
    settings = asked("a")
    text = reported(settings).replace(installed(settings), held)
    with pytest.raises(ProbeError, match="not restricted: ") as caught:
        collect(settings, Canned(text), None)  # type: ignore[arg-type]
    assert caught.value.cause == "protocol"


def test_an_answer_with_the_nonce_of_another_poll_is_none() -> None:
    """Whatever it says: it may be an old one."""
    settings = asked("a")
    old = NONCE[::-1]
    text = reported(settings).replace(NONCE, old) + end_mark(old)
    with pytest.raises(ProbeError, match="not restricted: ") as caught:
        collect(settings, Canned(text, ""), None)  # type: ignore[arg-type]
    assert caught.value.cause == "protocol"


def test_a_setting_of_a_later_version_changes_no_digest() -> None:
    """Else an upgrade would have every endpoint installed again; one that is used does change it."""
    plain, other = asked("a"), asked("a", timeout=7)
    assert digests(plain)["check a"] == digests(asked("a", "b"))["check a"] != digests(other)["check a"]
    assert digests(resource(services=["a", "b"])).keys() == {"service a", "service b"}
    assert digests(plain) == {"check a": "f57ec464f7928aba"}, "what is installed would be outdated"


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.txt")), ids=lambda path: path.stem)
def test_every_format_ever_printed_is_read(path: Path) -> None:
    """`format-1.txt` is what a machine of the tests answered to the endpoint of that format."""
    settings = resource(services=SERVICES, checks=CHECKS, endpoint=True)
    sample = judge_endpoint(parse_output(path.read_text(encoding="utf-8"), NONCE, None), settings)
    assert {name for name, why in sample.problems.items() if why != NOT_KNOWN} <= {"endpoint"}
    assert (sample.details["hostname"], sample.details["cpu_count"]) == ("mail1.example.com", 4)
    assert sample.metrics["memory_percent"] == 25 and sample.metrics["disk_percent /var/spool"] == 50
    assert {name: outcome.good for name, outcome in sample.services.items()} == {"nginx": True, "it's (x)": False}
    assert {name: outcome.good for name, outcome in sample.checks.items()} == {"replication": True, "Zürich": False}


# === On a real sshd ==========================================================


def authorize(server: SshServer, folder: Path, line: str) -> Path:
    """The file of a new key that may log in as `line` says, in which KEY stands for it."""
    key = make_key("ed25519")
    path = folder / f"key{len(list(folder.glob('key*')))}"
    write_private(path, key)
    with server._authorized.open("a", encoding="utf-8", newline="\n") as authorized:
        authorized.write(line.replace("KEY", public_line(key)) + "\n")
    return path


def install(server: SshServer, folder: Path, settings: ResourceSettings) -> Path:
    """What is printed, where the account may read it, and the line that is printed; its key."""
    text = printed(settings)
    path = server.folder / f"endpoint-{settings.name}"
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    path.chmod(0o555)
    line = re.findall(r"^#     (command=.*)$", text, re.MULTILINE)[0]
    line = line.replace("/usr/local/sbin/healthchecker-endpoint", str(path)).replace("192.0.2.1", server.address)
    return authorize(server, folder, line.rpartition("ecdsa-sha2")[0] + "KEY")


REAL = {"services": ["no such service"], "checks": [
    {"name": "good", "command": "echo fine; echo \"$SSH_ORIGINAL_COMMAND\"", "timeout": 5},
    {"name": "bad", "command": "echo 'it''s bad'; exit 3", "timeout": 5},
]}  # fmt: skip


@POSIX
@OPENSSH
class TestSshd:
    def test_polls_are_answered_as_by_a_script(self, sshd: Sshd, tmp_path: Path) -> None:
        key = install(sshd, tmp_path, resource(**REAL, endpoint=True))
        kept = poll(target(sshd, key_file=key, endpoint=True, **REAL, **OFTEN))
        sent = poll(target(sshd, key_file=sshd.user_key(), **REAL, **OFTEN))
        assert kept.verdict == sent.verdict
        assert kept.cause == "check" and "bad: it" in kept.reason and "exit" not in kept.reason
        assert kept.sample and sent.sample
        assert kept.sample.checks == sent.sample.checks and kept.sample.services == sent.sample.services
        assert kept.sample.metrics.keys() == sent.sample.metrics.keys()
        assert kept.sample.problems == sent.sample.problems
        assert {**kept.sample.details, "uptime_seconds": 0} == {**sent.sample.details, "uptime_seconds": 0}

    @pytest.mark.parametrize("command", ["id", "sh", NONCE[1:], f"{NONCE}; id", f"{NONCE}\nid", "exec /bin/sh -s"])
    def test_any_other_command_is_refused(self, sshd: Sshd, tmp_path: Path, command: str) -> None:
        key = install(sshd, tmp_path, resource(endpoint=True))
        with login(sshd, key_filename=str(key)) as client:
            assert execute(client, command) == ("", REFUSED, 1)

    def test_what_no_command_is_is_refused(self, sshd: Sshd, tmp_path: Path) -> None:
        """A shell, a terminal, a subsystem, forwardings of ports and of X11."""
        key = install(sshd, tmp_path, resource(endpoint=True))
        with login(sshd, key_filename=str(key)) as client:
            transport = client.get_transport()
            assert transport
            with transport.open_session() as shell:
                shell.invoke_shell()
                assert shell.makefile_stderr().read().decode() == REFUSED
                assert shell.recv_exit_status() == 1
            for ask in ("get_pty", "request_x11"):
                with transport.open_session() as channel, pytest.raises(paramiko.SSHException):
                    getattr(channel, ask)()
            with pytest.raises((paramiko.SSHException, EOFError)):
                client.open_sftp()
            with pytest.raises(paramiko.ChannelException, match="prohibited"):
                transport.open_channel("direct-tcpip", (sshd.address, sshd.port), ("127.0.0.1", 1))
            with pytest.raises(paramiko.SSHException):
                transport.request_port_forward("127.0.0.1", 0)

    def test_what_readme_has_for_an_account_with_a_password(self) -> None:
        """That login runs nothing else either, and gets neither terminal nor forwarding."""
        readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
        lines = re.search(r"if the account has a password, too: (`.*?) at the end of sshd_config", readme)
        assert lines
        with Sshd() as server:
            if not server.password:
                pytest.skip(NO_PASSWORD_LOGIN)
            path = script_file(server.folder, resource(endpoint=True, platform="linux"))
            words = {"/usr/local/sbin/healthchecker-endpoint": str(path), "User monitor": f"User {server.username}"}
            options = re.sub("|".join(words), lambda word: words[word[0]], "\n".join(re.findall("`(.*?)`", lines[1])))
            with (server.folder / "config").open("a", encoding="ascii") as config:
                config.write(f"\n{options}\n")
            restart(server)
            with login(server, password=server.password) as client:
                assert execute(client, "id") == ("", REFUSED, 1)
                assert f"@{NONCE} begin endpoint" in execute(client, NONCE)[0]
                transport = client.get_transport()
                assert transport
                with transport.open_session() as channel, pytest.raises(paramiko.SSHException):
                    channel.get_pty()
                with pytest.raises(paramiko.ChannelException, match="prohibited"):
                    transport.open_channel("direct-tcpip", (server.address, server.port), ("127.0.0.1", 1))
                with pytest.raises(paramiko.SSHException):
                    transport.request_port_forward("127.0.0.1", 0)

    def test_a_plain_key_may_do_all_that(self, sshd: Sshd) -> None:
        """So that the test above proves something."""
        with login(sshd) as client:
            transport = client.get_transport()
            assert transport and "uid=" in execute(client, "id")[0]
            with transport.open_session() as channel:
                if ROOT:        # another account's sshd can give none to anybody
                    channel.get_pty()
            transport.open_channel("direct-tcpip", (sshd.address, sshd.port), ("127.0.0.1", 1)).close()
            assert transport.request_port_forward("127.0.0.1", 0)

    def test_no_other_address_logs_in(self, sshd: Sshd, tmp_path: Path) -> None:
        key = authorize(sshd, tmp_path, 'command="/bin/true",restrict,from="192.0.2.1" KEY')
        assert poll(target(sshd, key_file=key, endpoint=True, **OFTEN)).cause == "auth"

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ("", "output: .*sh: .*not found"),
            ('command="exec /bin/sh -s" ', "output: none"),
            ('command="echo healthy" ', "output: healthy"),
            ('command="/bin/false",restrict ', "output: none"),
        ],
    )
    def test_what_runs_something_else_is_not_restricted(
        self, sshd: Sshd, tmp_path: Path, options: str, said: str
    ) -> None:
        key = authorize(sshd, tmp_path, f"{options}KEY")
        answer = poll(target(sshd, key_file=key, endpoint=True, name="db1", **OFTEN))
        assert (answer.verdict.state, answer.cause) == ("unhealthy", "protocol")
        assert answer.reason.startswith("not restricted: the login runs something else than what `endpoint db1` prints")
        assert re.search(said, answer.reason), answer.reason

    def test_a_script_of_the_account_itself_is_not_restricted(self, sshd: Sshd, tmp_path: Path) -> None:
        key = install(sshd, tmp_path, resource(endpoint=True))
        path = sshd.folder / "endpoint-db1"
        path.chmod(0o777)
        try:
            answer = poll(target(sshd, key_file=key, endpoint=True, **OFTEN))
        finally:
            path.chmod(0o555)
        assert answer.reason.startswith("not restricted") and f"may write to {path}" in answer.reason

    def test_who_sends_a_script_hears_what_it_is(self, sshd: Sshd, tmp_path: Path) -> None:
        key = install(sshd, tmp_path, resource(endpoint=True))
        answer = poll(target(sshd, key_file=key, **OFTEN))
        assert answer.cause == "protocol" and REFUSED.strip() in answer.reason


# === On a machine whose state is ours ========================================
MACHINE = "debian/12-inodes"
FILTER = r"s,(^|[^A-Za-z0-9_./$}-])/((proc|sys|etc|run|var)/),\1%s/\2,g"  # as hosts.PLACES does


def host_of(lag: int, idle: int, broken: bool, state: str) -> hosts.Host:
    host = hosts.read_host(MACHINE)
    show = f"LoadState=loaded\nActiveState={state}\nSubState={state}\n"
    dead = "LoadState=loaded\nActiveState=failed\nSubState=failed\n"
    answers = {"systemctl show nginx": hosts.Answer(show), "systemctl show it's (x)": hosts.Answer(dead)}
    files = {**host.files, "var/lag": f"{lag} s\n", "proc/stat": f"cpu  {40000 + 4 * lag} 0 0 {idle} 0 0 0 0\n"}
    files["proc/meminfo"] = files["proc/meminfo"].replace(" 6000000 kB", f" {6000 - lag}000 kB")
    return host._replace(answers={**host.answers, **answers}, files=files | ({"var/broken": ""} if broken else {}))


FIRST, SECOND = host_of(0, 900000, False, "active"), host_of(60, 900060, True, "failed")


class Machine:
    """Played behind an sshd by two keys: one is sent scripts, the other keeps what was printed."""

    def __init__(self, server: Sshd, folder: Path, settings: ResourceSettings) -> None:
        self.server, self.place = server, server.folder / "machine"
        self.place.mkdir()
        root, path = self.place / "tree", f"PATH={self.place}/tree/bin"
        (self.place / "sent").write_text(
            f"sed -E -e {shlex.quote(FILTER % root)} -e 's/^PATH=.*$/:/' | {path} /bin/sh -s\n", encoding="utf-8")
        script = re.sub(r"^PATH=.*$", ":", printed(settings), flags=re.MULTILINE)
        (self.place / "kept").write_text(hosts.PLACES.sub(f"{root}/", script), encoding="utf-8")
        (self.place / "kept").chmod(0o555)
        self.sent = authorize(server, folder, f'command="/bin/sh {self.place}/sent" KEY')
        self.kept = authorize(server, folder, f'command="{path} exec /bin/sh {self.place}/kept",restrict KEY')

    def become(self, host: hosts.Host) -> None:
        shutil.rmtree(self.place / "tree", ignore_errors=True)
        (self.place / "tree").mkdir(0o755)
        hosts.install(host, self.place / "tree")


@pytest.fixture
def machine(sshd: Sshd, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(sshd, tmp_path, resource(platform="linux", services=SERVICES, checks=CHECKS, endpoint=True))
    yield made
    shutil.rmtree(made.place)


@POSIX
@OPENSSH
@pytest.mark.skipif(sys.platform != "linux", reason="plays a Linux machine with GNU tools")
def test_the_numbers_are_those_of_a_script_before_and_after_a_change(machine: Machine) -> None:
    common: dict[str, Any] = {"platform": "linux", "services": SERVICES, "checks": CHECKS, **OFTEN}
    ways = [target(machine.server, key_file=machine.sent, **common),
            target(machine.server, key_file=machine.kept, endpoint=True, **common)]  # fmt: skip
    connections: list[Connection] = [connect(way) for way in ways]
    machine.become(FIRST)
    before = [collect(way.settings, connection, None) for way, connection in zip(ways, connections, strict=True)]
    assert before[0] == before[1]
    assert before[0].checks["replication"].good and before[0].services["nginx"].good
    assert before[0].checks["Zürich"].text == "TITLE KEY HOLDS $n $N it's\n0", "a check never sees the nonce"
    assert not before[0].problems
    machine.become(SECOND)
    after = [collect(way.settings, connection, replace(sample, counted_mono=-math.inf))  # long ago
             for way, connection, sample in zip(ways, connections, before, strict=True)]  # fmt: skip
    assert after[0] == after[1]
    assert after[0].metrics["cpu_percent"] > 50
    assert not after[0].checks["replication"].good and not after[0].services["nginx"].good
    assert after[0].metrics["memory_percent"] != before[0].metrics["memory_percent"]
    verdicts = [evaluate(sample, way.settings) for sample, way in zip(after, ways, strict=True)]
    assert verdicts[0] == verdicts[1] and verdicts[0].state == "unhealthy"


# === The command =============================================================


@contextlib.contextmanager
def inventory(folder: Path, **changed: str) -> Iterator[Path]:
    key = folder / "monitor key"
    write_private(key, make_key("ed25519"))
    row = {"name": "db1", "hostname": "db1.example.com", "platform": "linux", "username": "monitor",
           "key_file": f"'{key}'", "endpoint": "true", **changed}  # fmt: skip
    text = ", ".join(f"{name}: {value}" for name, value in row.items() if value)
    prepared_vault(folder)
    yield write_inventory(folder, f"  - {{{text}}}\n")


def test_what_the_command_prints(tmp_path: Path) -> None:
    checks = '[{name: a, command: "echo \'Zürich\'"}]'
    with inventory(tmp_path, services="[cron]", checks=checks) as path:
        done = run(path, "endpoint", "db1")
    assert (done.returncode, done.stderr) == (0, "")
    key = paramiko.PKey.from_path(tmp_path / "monitor key")
    settings = resource(services=["cron"], checks=[{"name": "a", "command": "echo 'Zürich'"}], platform="linux")
    assert done.stdout == unix_endpoint(settings, key)
    line = '#     command="/bin/sh /usr/local/sbin/healthchecker-endpoint",restrict,from="192.0.2.1" '
    assert f"{line}ssh-ed25519 {key.get_base64()}\n" in done.stdout
    assert not (tmp_path / "healthchecker.db").exists()


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({"endpoint": ""}, 2, "db1 has no `endpoint: true`; write it there first\n"),
        ({"key_file": "", "password": "x"}, 2, r"inventory\.yaml:\d+:\d+: db1: endpoint needs key_file: .*\n"),
        ({"name": "db2"}, 2, r"db1: no resource has this name; did you mean db2\?\n"),
        ({"endpoint": "perhaps"}, 2, r"inventory\.yaml:\d+:\d+: resources\[0\]\.endpoint: must be a valid boolean.*\n"),
        ({"platform": "local", "hostname": "", "username": "", "key_file": ""}, 2,
         r"inventory\.yaml:\d+:\d+: resources\[0\]: endpoint has no meaning with platform local\n"),
    ],
)  # fmt: skip
def test_what_cannot_be_printed(
    changed: dict[str, str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with inventory(tmp_path, **changed) as path:
        assert main(["--inventory", str(path), "endpoint", "db1"]) == code
    printed, errors = capsys.readouterr()
    assert printed == "" and re.fullmatch(said, errors), errors


@pytest.mark.parametrize(
    ("command", "suspect"),
    [
        ("mysql --password=hunter2 -e 'select 1'", True),
        ("curl -H 'Authorization: Bearer abc' https://example.com", True),
        ("curl https://monitor:hunter2@example.com/", True),
        ("psql postgresql://monitor:hunter2@localhost/db", True),
        ("check_http -k X-Api-Key:abc", True),
        ("vault --TOKEN abc", True),
        ("export PGPASSWORD=x; psql", True),
        ("check 3f8a9c1b2d4e5f60718293a4", True),
        ("cd /srv && pwd", False),
        ("powershell -ExecutionPolicy Bypass -File C:\\check.ps1", False),
        ("test ! -e /var/spool/stalled", False),
        ("/usr/lib/nagios/plugins/check_disk -w 10% -c 5%", False),
        ("curl -fsS http://localhost:8080/health", False),
        ("check_replication_lag_of_all_the_replicas", False),
    ],
)
def test_a_check_that_may_hold_a_secret(command: str, suspect: bool) -> None:
    assert bool(SUSPECT.search(command)) is suspect


def test_a_secret_in_a_check_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = '[{name: a, command: "mysql --password=hunter2"}, {name: b, command: "true"}]'
    with inventory(tmp_path, checks=checks) as path:
        assert main(["--inventory", str(path), "endpoint", "db1"]) == 0
    printed, errors = capsys.readouterr()
    assert printed.startswith("#!/bin/sh\n")
    assert re.fullmatch("db1: check a seems to hold a secret, .*\n", errors) and "hunter2" not in errors
