"""Transport: real logins and real host keys, and every way in which a host can keep a poll waiting."""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import gc
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import hostile
import paramiko
import pytest
from conftest import late_logins, no_leaks, open_descriptors, wait_for
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from hostile import RawServer
from rights import without_root_rights
from service import Service, run_cheaply, write_inventory
from sshd import (
    MARK,
    OPENSSH,
    POSIX,
    ROOT,
    SSHD,
    SYSTEM_PATH,
    Login,
    ParamikoSshd,
    Sshd,
    SshServer,
    certified_key,
    make_key,
    marked,
    public_line,
    send,
    write_private,
)

import healthchecker
from healthchecker import (
    CONNECTIONS,
    Connection,
    ConnectionContext,
    Deadline,
    Guards,
    HostSocket,
    KnownHosts,
    LocalConnection,
    LoginGuard,
    LoginRecord,
    Output,
    ProbeError,
    Resolver,
    ResourceSettings,
    Sample,
    SimulatedConnection,
    SshConnection,
    SshTransport,
    Target,
    Verdict,
    connect_tcp,
    poll_once,
)

if sys.platform != "win32":
    import resource

Server = Sshd | ParamikoSshd
DEADLINE = 2.0  # seconds of a poll that nothing answers
AMPLE = 120.0  # seconds of a poll that has an outcome before its deadline, on a busy machine, too
GRACE = 10  # seconds after its deadline in which a poll has ended on a busy machine; what hangs here does so for 60
NOWHERE = Path("no such file")
ACCOUNTS = pytest.mark.skipif(not ROOT or not SSHD, reason="needs root, and sshd")


class Answer(NamedTuple):
    """What poll_once gave, a host key that was new, and how long it took."""

    verdict: Verdict
    sample: Sample | None
    host_key: str | None
    seconds: float

    @property
    def cause(self) -> str:
        return self.verdict.cause

    @property
    def reason(self) -> str:
        return self.verdict.reason


def good_login(server: SshServer) -> dict[str, Any]:
    """The account's password, or its key where no password can work."""
    return {"password": server.password} if server.password else {"key_file": server.user_key()}


def resource_of(settings: Mapping[str, Any], **known: Any) -> Target:
    """A row as it comes from the database; what a connection does not look at is empty."""
    values = {"id": 1, "settings": ResourceSettings.model_validate(settings), **known}
    values.setdefault("host_key", None)
    return Target(**{field.name: values.get(field.name, "") for field in fields(Target)})


def target(
    server: Any, *, password: str = "", passphrase: str = "", trusted: str | None = None, **settings: Any
) -> Target:
    """A resource on `server`."""
    where = {"hostname": server.address, "port": server.port, "username": getattr(server, "username", "monitor")}
    opened = {"password": password, "key_passphrase": passphrase}
    given = {"name": "host", **where, **settings, **{kind: secret for kind, secret in opened.items() if secret}}
    return resource_of(given, host_key=trusted)


def access(known_hosts: Path = NOWHERE, resolver: Resolver | None = None) -> ConnectionContext:
    return ConnectionContext(KnownHosts(known_hosts), resolver or Resolver())


def connect(target: Target, known_hosts: Path = NOWHERE, guard: LoginGuard | None = None) -> Connection:
    return CONNECTIONS[target.settings.platform](target, guard or LoginGuard(), access(known_hosts))


def poll(target: Target, connection: Connection | None = None) -> Answer:
    """One poll; whatever comes of it, it is in time, in one line, and without a secret."""
    connection = connection or connect(target)
    known, begin = connection.host_key, time.monotonic()
    verdict, sample = poll_once(target, connection, None)
    learned = None if connection.host_key == known else connection.host_key
    answer = Answer(verdict, sample, learned, time.monotonic() - begin)
    assert answer.seconds <= target.settings.timeout + GRACE, answer
    assert answer.verdict.reason.isprintable()
    assert len(answer.verdict.reason) <= 500
    assert "unforeseen" not in answer.verdict.reason
    for secret in target.settings.secrets.values():
        assert secret not in answer.verdict.reason
    return answer


def healthy(answer: Answer) -> bool:
    """Polled in full: the sample says so too, so that nothing is healthy by accident."""
    assert answer.verdict.state == "healthy", answer
    assert answer.sample is not None
    assert answer.sample.details["hostname"]
    return True


@contextlib.contextmanager
def meeting_place() -> Iterator[Path]:
    """A folder in which every account may write."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def restart(server: Sshd) -> None:
    """Let sshd read its configuration anew, once it serves: before, the signal would end it."""
    before = server.log().count("Server listening")
    with socket.create_connection((server.address, server.port), 60) as connection:
        assert connection.recv(4) == b"SSH-"
    server._listener.send_signal(signal.Signals["SIGHUP"])
    wait_for(lambda: server.log().count("Server listening") > before)


@contextlib.contextmanager
def settings_digest(server: Sshd, settings: str) -> Iterator[None]:
    """`settings` instead of the server's own."""
    config = server.folder / "config"
    before = config.read_text(encoding="ascii")
    names = tuple(f"{line.split()[0]} " for line in settings.splitlines())
    own = "".join(line for line in before.splitlines(keepends=True) if not line.startswith(names))
    config.write_text(f"{settings}\n{own}", encoding="ascii")
    restart(server)
    try:
        yield
    finally:
        server.kill_sessions()
        config.write_text(before, encoding="ascii")
        restart(server)


def no_attempt(server: SshServer) -> bool:
    """Whether nobody has tried to log in: sshd names the account from the first attempt on."""
    return server.username not in server.log()


# === Ways to log in ==========================================================


@POSIX
def test_password(sshd: Server, password: str) -> None:
    with no_leaks():
        assert healthy(poll(target(sshd, password=password)))
    assert f"Accepted password for {sshd.username}" in sshd.log()


@pytest.mark.long
@POSIX
@pytest.mark.parametrize("passphrase", ["", "a phrase"])
@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_key_file(sshd: Server, kind: str, passphrase: str) -> None:
    key = sshd.user_key(kind, passphrase)
    assert healthy(poll(target(sshd, key_file=key, passphrase=passphrase)))
    if not passphrase:  # that of the defaults may be for other keys
        assert healthy(poll(target(sshd, key_file=key, passphrase="of other keys")))
    assert f"Accepted publickey for {sshd.username}" in sshd.log()


@POSIX
@pytest.mark.parametrize("passphrase", ["", "a phrase"])
def test_older_key_format(sshd: Server, tmp_path: Path, passphrase: str) -> None:
    kept = serialization.load_ssh_private_key(sshd.user_key("rsa").read_bytes(), None)
    seal: Any = serialization.NoEncryption()
    if passphrase:
        seal = serialization.BestAvailableEncryption(passphrase.encode())
    form = serialization.PrivateFormat.TraditionalOpenSSL
    key = tmp_path / "key.pem"
    key.write_bytes(kept.private_bytes(serialization.Encoding.PEM, form, seal))
    assert healthy(poll(target(sshd, key_file=key, passphrase=passphrase)))
    if not passphrase:
        assert healthy(poll(target(sshd, key_file=key, passphrase="of other keys")))


@POSIX
def test_wrong_password(sshd: Server, password: str) -> None:
    with no_leaks():
        answer = poll(target(sshd, password=password + "x"))
    assert answer.cause == "auth"
    assert sshd.username in answer.reason
    wait_for(lambda: f"Failed password for {sshd.username}" in sshd.log())  # sshd answers first


@pytest.mark.parametrize("secret", ["x" * 1023, "häßlich 密码 \U0001f511", " blank ", "'\"\\$(id)`id`\n\t"])
def test_odd_passwords(secret: str) -> None:
    with ParamikoSshd() as server:
        server.password = secret
        assert poll(target(server, password=secret, timeout=AMPLE)).cause not in ("auth", "credential")
        assert "Accepted password" in server.log()
        assert poll(target(server, password=secret + "x", timeout=AMPLE)).cause == "auth"


def test_unknown_user(sshd: Server) -> None:
    answer = poll(target(sshd, username="nobody-of-that-name", **(good_login(sshd))))
    assert answer.cause == "auth"
    assert "nobody-of-that-name" in answer.reason


def test_key_that_nobody_authorised(sshd: Server, tmp_path: Path) -> None:
    write_private(tmp_path / "key", make_key("ed25519"))
    answer = poll(target(sshd, key_file=tmp_path / "key"))
    assert answer.cause == "auth"
    assert "key_file" in answer.reason


def bad_key(kind: str, folder: Path, server: SshServer) -> Path:
    """A key file that cannot be used, for the reason that its kind says."""
    path = folder / "key"
    content = {
        "garbage": b"not a key at all\n",
        "noise": bytes(range(256)) * 8,
        "empty": b"",
        "public": (public_line(make_key("ed25519")) + "\n").encode(),
        "cut off": server.user_key().read_bytes()[:150],
        "certificate": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "encrypted":
        path = server.user_key("ed25519", "a phrase")
    elif kind in content:
        path.write_bytes(content[kind])
    return path


BAD_KEYS = ["missing", "folder", "garbage", "noise", "empty", "public", "cut off", "certificate", "encrypted"]


@pytest.mark.parametrize("passphrase", ["", "not the phrase"])
@pytest.mark.parametrize("kind", BAD_KEYS)
def test_bad_key_file(sshd: Server, tmp_path: Path, kind: str, passphrase: str) -> None:
    path = bad_key(kind, tmp_path, sshd)
    logins = sshd.log().count(f"for {sshd.username} from")
    answer = poll(target(sshd, key_file=path, passphrase=passphrase))
    assert answer.cause == "credential"
    assert str(path) in answer.reason
    assert sshd.log().count(f"for {sshd.username} from") == logins


@POSIX
def test_unreadable_key_file(sshd: Server, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(sshd.user_key().read_bytes())
    key.chmod(0)
    with without_root_rights():
        answer = poll(target(sshd, key_file=key))
    assert answer.cause == "credential"
    assert "ermission denied" in answer.reason


def put(path: Path, content: bytes) -> None:
    """Write as administrators' tools do: under another name first."""
    new = path.with_name("new")
    new.write_bytes(content)
    new.replace(path)


@POSIX
def test_key_file_changed_on_disk(sshd: Server, tmp_path: Path) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    write_private(other, make_key("ed25519"))
    watched = target(sshd, key_file=key)
    connection = connect(watched, guard=Guards().of(watched))  # a key that is refused locks nothing

    def after(content: bytes) -> Answer:
        put(key, content)
        return poll(watched, connection)

    assert healthy(after(sshd.user_key().read_bytes()))
    assert after(other.read_bytes()).cause == "auth"
    assert healthy(after(sshd.user_key("rsa").read_bytes()))
    assert healthy(after(b"garbage")), "it may be half of a key that is being written"
    os.utime(key, (0, 0))
    assert poll(watched, connection).cause == "credential"
    assert healthy(after(sshd.user_key().read_bytes()))
    key.unlink()
    assert poll(watched, connection).cause == "credential"


@POSIX
def test_neither_agent_nor_key_discovery(sshd: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    shutil.copy(sshd.user_key(), tmp_path / ".ssh" / "id_ed25519")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    with paramiko.SSHClient() as client:  # the same key, found by a client that does look for it
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect(sshd.address, sshd.port, sshd.username, allow_agent=False, timeout=60)
    attempts = sshd.log().count("publickey")
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(tmp_path / "agent"))
        agent.listen()
        agent.setblocking(False)
        write_private(tmp_path / "other", make_key("ed25519"))
        assert poll(target(sshd, password="wrong")).cause == "auth"
        assert poll(target(sshd)).cause == "auth"
        assert sshd.log().count("publickey") == attempts
        assert poll(target(sshd, key_file=tmp_path / "other")).cause == "auth"
        with pytest.raises(BlockingIOError):
            agent.accept()


# === Host keys ===============================================================


@pytest.fixture(scope="module")
def three_keys() -> Iterator[Server]:
    """A host with keys of several types, as most hosts have."""
    with Sshd("ed25519", "ecdsa", "rsa") if SSHD else ParamikoSshd("ed25519", "ecdsa", "rsa") as server:
        yield server


TYPES = {"ed25519": "ssh-ed25519", "ecdsa": "ecdsa-sha2-nistp256", "rsa": "ssh-rsa"}


def identities(server: SshServer) -> dict[str, str]:
    return {kind: f"{TYPES[kind]} {server.fingerprint(kind)}" for kind in server.host_keys}


@POSIX
def test_trust_on_first_use() -> None:
    with no_leaks(), Sshd() if SSHD else ParamikoSshd() as server:
        old = identities(server)["ed25519"]
        watched = target(server, **good_login(server))
        connection = connect(watched)
        first, second = poll(watched, connection), poll(watched, connection)
        assert healthy(first)
        assert healthy(second)
        assert (first.host_key, second.host_key) == (old, None)
        server.rekey()
        changed = poll(watched, connection)
        restarted = poll(target(server, trusted=old, **good_login(server)))
        for answer in (changed, restarted):
            assert answer.cause == "host_key"
            assert old in answer.reason
            assert identities(server)["ed25519"] in answer.reason
            assert "trust host" in answer.reason
            assert answer.host_key is None
        assert no_attempt(server)
        assert healthy(poll(target(server, trusted=identities(server)["ed25519"], **good_login(server))))
        assert not no_attempt(server)


@POSIX
@pytest.mark.parametrize("first", ["credential", "auth", "timeout"])
def test_key_trusted_in_a_failed_poll_is_reported(sshd: Server, tmp_path: Path, first: str) -> None:
    """What is not reported is not stored, and after a restart any key would be trusted again."""
    key = tmp_path / "key"
    if first == "auth":
        write_private(key, make_key("ed25519"))
    elif first == "timeout":
        key.write_bytes(sshd.user_key().read_bytes())
    with meeting_place() as folder:
        slow = {"name": "slow", "command": f"test -e {folder}/quick || sleep 30", "timeout": 30}
        patient = target(sshd, key_file=key, timeout=AMPLE, checks=[slow])
        watched = target(sshd, key_file=key, timeout=1.5, checks=[slow]) if first == "timeout" else patient
        connection = connect(watched, guard=Guards().of(watched))
        failed = poll(watched, connection)
        assert failed.cause == first
        (folder / "quick").touch()
        put(key, sshd.user_key().read_bytes())
        good = poll(patient, connection)
    assert healthy(good)
    assert identities(sshd)["ed25519"] in (failed.host_key, good.host_key)


@POSIX
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_pinned(three_keys: Server, kind: str, typed: bool) -> None:
    pin = identities(three_keys)[kind] if typed else three_keys.fingerprint(kind)
    answer = poll(target(three_keys, host_key=pin, **good_login(three_keys)))
    assert healthy(answer)
    assert answer.host_key is None


@pytest.mark.parametrize("typed", [True, False])
def test_pinned_wrong(three_keys: Server, tmp_path: Path, typed: bool) -> None:
    """Neither a stored key nor known_hosts helps against the inventory."""
    known = tmp_path / "known_hosts"
    known.write_text(three_keys.known_hosts(), encoding="ascii")
    pin = f"{'ssh-ed25519 ' if typed else ''}SHA256:{'A' * 43}"
    logins = three_keys.log().count(f"for {three_keys.username} from")
    watched = target(three_keys, host_key=pin, trusted=identities(three_keys)["ed25519"], **good_login(three_keys))
    answer = poll(watched, connect(watched, known))
    assert answer.cause == "host_key"
    assert pin in answer.reason
    assert "SHA256:" in answer.reason.replace(pin, "")
    assert three_keys.log().count(f"for {three_keys.username} from") == logins


@POSIX
def test_strict(three_keys: Server, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    strict = partial(target, three_keys, host_key="strict", **good_login(three_keys))
    logins = three_keys.log().count(f"for {three_keys.username} from")
    for _ in range(2):
        answer = poll(strict(), connect(strict(), known))
        assert (answer.cause, answer.host_key) == ("host_key", None)
        assert three_keys.fingerprint() in answer.reason
        assert "trust host" in answer.reason
    assert three_keys.log().count(f"for {three_keys.username} from") == logins
    assert healthy(poll(strict(trusted=identities(three_keys)["rsa"])))
    known.write_text(three_keys.known_hosts("rsa"), encoding="ascii")
    assert healthy(poll(strict(), connect(strict(), known)))


@POSIX
def test_stored_key_of_any_type(three_keys: Server) -> None:
    for identity in identities(three_keys).values():
        answer = poll(target(three_keys, trusted=identity, **good_login(three_keys)))
        assert healthy(answer)
        assert answer.host_key is None


def hashed(line: str) -> str:
    """A line of known_hosts with its host name hashed, as `HashKnownHosts yes` writes it."""
    name, rest = line.split(" ", 1)
    return f"{paramiko.HostKeys.hash_host(name)} {rest}"


def other_key(server: SshServer, kind: str = "ed25519") -> str:
    return f"[{server.address}]:{server.port} {public_line(make_key(kind))}\n"


def broken_keys(server: SshServer) -> str:
    """Keys that are damaged in the ways in which an editor, a full disk and a bad copy damage them."""
    ed25519 = "AAAAC3NzaC1lZDI1NTE5AAAA"
    texts = {
        "ssh-ed25519": [ed25519, ed25519[:-1], "é", "=", f"{ed25519}HwZovy8+P0WTtt+TdeaNw0/vMfGwahBLJgDS73enrNUF"],
        "ecdsa-sha2-nistp256": ["AAAAE2VjZHNhLXNoYTItbmlzdHAyNTaAAAAAbmlzdHAyNTYAAABBBKlEQx7+7g=="],
        "ssh-rsa": [
            public_line(server.host_keys["rsa"]).split()[1][:-200],
            "AAAAB3NzaC1yc2EAAAAhAQABAAABAQCMFF/kEtZs8Ye65HuZt9rBYKcl2wT9HxHzANEGFroW6m2PlkgjGYo1GKPlCTHxQRxzd73X",
        ],
        "ssh-dss": ["AAAAB3NzaC1kc3M="],
    }
    return "".join(f"elsewhere {kind} {text}\n" for kind, keys in texts.items() for text in keys)


def broken_names(server: SshServer) -> str:
    key = public_line(make_key("ed25519"))
    return "".join(f"{name} {key}\n" for name in ("|1|abc|def", "|1|", "|1|YWJj|YWJj", "|1|%|", "|2|a|b", "*,!", ","))


# name: the file for a server with keys of three types, and what becomes of it:
# "accepted" (nothing is learned), "learned" (unknown to the file) or "refused"
KNOWN_HOSTS: dict[str, tuple[Callable[[SshServer], str], str]] = {
    "empty": (lambda s: "", "learned"),
    "plain": (lambda s: s.known_hosts(), "accepted"),
    "of another type than the host prefers": (lambda s: s.known_hosts("rsa"), "accepted"),
    "ecdsa": (lambda s: s.known_hosts("ecdsa"), "accepted"),
    "of every type": (lambda s: "".join(map(s.known_hosts, TYPES)), "accepted"),
    "hashed": (lambda s: hashed(s.known_hosts()), "accepted"),
    "hashed, of another type": (lambda s: hashed(s.known_hosts("ecdsa")), "accepted"),
    "several names": (lambda s: "db1,db2," + s.known_hosts(), "accepted"),
    "with a comment": (lambda s: "# all\n\n" + s.known_hosts().strip() + " monitor@example.com\n", "accepted"),
    "line ends of Windows": (lambda s: s.known_hosts().replace("\n", "\r\n"), "accepted"),
    "without a last line end": (lambda s: s.known_hosts().strip(), "accepted"),
    "tabs": (lambda s: s.known_hosts().replace(" ", "\t"), "accepted"),
    "two blanks": (lambda s: s.known_hosts().replace(" ", "  "), "accepted"),
    "indented": (lambda s: "  " + s.known_hosts(), "accepted"),
    "the same host at another port": (lambda s: s.known_hosts().replace("]:", "]:1"), "learned"),
    "another host": (lambda s: f"192.0.2.1 {public_line(make_key('ed25519'))}\n", "learned"),
    "another host with this key": (lambda s: s.known_hosts().replace("127.0.0.1", "192.0.2.1"), "learned"),
    "another key": (other_key, "refused"),
    "another key, hashed": (lambda s: hashed(other_key(s)), "refused"),
    "another key of another type": (lambda s: other_key(s, "rsa"), "refused"),
    "another key, and the right one of another type": (lambda s: other_key(s) + s.known_hosts("rsa"), "refused"),
    "an old key before the right one": (lambda s: other_key(s) + s.known_hosts(), "accepted"),
    "an old key after the right one": (lambda s: s.known_hosts() + other_key(s), "accepted"),
    "an old key before the right one, hashed": (lambda s: hashed(other_key(s)) + hashed(s.known_hosts()), "accepted"),
    "the right key is revoked": (lambda s: "@revoked " + s.known_hosts(), "refused"),
    "an authority": (lambda s: "@cert-authority *.example.com " + public_line(make_key("rsa")) + "\n", "learned"),
    "a pattern": (lambda s: s.known_hosts().replace("127.0.0.1", "127.?.0.*"), "accepted"),
    "a pattern that leaves it out": (lambda s: "*,!" + other_key(s), "learned"),
    "garbage": (lambda s: "\x00\x01 garbage\na b\na b c\n" + "x" * 9999 + "\n", "learned"),
    "garbage around the right key": (lambda s: "a b c\n" + s.known_hosts() + "|1|\n", "accepted"),
    "broken keys": (lambda s: broken_keys(s) + s.known_hosts(), "accepted"),
    "broken hashes": (lambda s: broken_names(s) + s.known_hosts(), "accepted"),
    "broken hashes and another key": (lambda s: broken_names(s) + other_key(s), "refused"),
    "not UTF-8": (lambda s: "\udcff\udcfe h\udce4\n" + s.known_hosts(), "accepted"),
}


@POSIX
@pytest.mark.parametrize("name", KNOWN_HOSTS)
def test_known_hosts(three_keys: Server, tmp_path: Path, name: str) -> None:
    content, expected = KNOWN_HOSTS[name]
    known = tmp_path / "known_hosts"
    known.write_bytes(content(three_keys).encode("utf-8", "surrogateescape"))
    logins = three_keys.log().count(f"for {three_keys.username} from")
    watched = target(three_keys, **good_login(three_keys))
    answer = poll(watched, connect(watched, known))
    if expected == "refused":
        assert answer.cause == "host_key"
        assert three_keys.log().count(f"for {three_keys.username} from") == logins
    else:
        assert healthy(answer)
        assert answer.host_key == (identities(three_keys)["ed25519"] if expected == "learned" else None)


def test_known_hosts_that_is_written_in_place(tmp_path: Path) -> None:
    """As `rsync -t --inplace` does: it has its old time again in the end. What is revoked meanwhile stays so, and an
    authority is one."""
    known, stray, key = tmp_path / "known_hosts", public_line(make_key("ed25519")), public_line(make_key("ed25519"))
    marked = "".join(f"@{marker} a.example.com {stray}\n" for marker in ("revoked", "cert-authority"))
    hosts = KnownHosts(known)
    for text in ("", f"a.example.com {key}\n{marked}b.example.com {key}\n"):
        known.write_text(text, encoding="ascii")
        if text:
            os.utime(known, (0, 0))
        found = [hosts.lookup(f"{name}.example.com", 22) for name in "ab"]
        assert [bool(keys) for keys, _, _ in found] == [bool(text)] * 2
    known.write_text(f"a.example.com {key}\n", encoding="ascii")
    assert [hosts.lookup(f"{name}.example.com", 22) for name in "ab"] == found
    known.write_text("", encoding="ascii")
    os.utime(known, (0, 0))
    assert not any(hosts.lookup("a.example.com", 22))


@POSIX
def test_known_hosts_is_read_again(three_keys: Server, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    watched = target(three_keys, host_key="strict", **good_login(three_keys))
    connection = connect(watched, known)
    assert poll(watched, connection).cause == "host_key"
    known.write_text(three_keys.known_hosts("rsa"), encoding="ascii")
    assert healthy(poll(watched, connection))
    known.write_text(other_key(three_keys), encoding="ascii")
    assert poll(watched, connection).cause == "host_key"
    known.unlink()
    assert poll(watched, connection).cause == "host_key"


@POSIX
@pytest.mark.parametrize("kind", ["folder", "forbidden"])
def test_unreadable_known_hosts(three_keys: Server, tmp_path: Path, kind: str) -> None:
    known = tmp_path / "known_hosts"
    if kind == "folder":
        known.mkdir()
    else:
        known.write_text(three_keys.known_hosts(), encoding="ascii")
        known.chmod(0)
    strict = target(three_keys, host_key="strict", **good_login(three_keys))
    stored = target(three_keys, trusted=identities(three_keys)["rsa"], **good_login(three_keys))
    with without_root_rights():
        assert poll(strict, connect(strict, known)).cause == "host_key"
        assert poll(stored, connect(stored, known)).cause in ("", "host_key")


# === The way to the host =====================================================


def families(name: str) -> set[int]:
    """How a name of this machine can be reached."""
    with contextlib.suppress(OSError):
        return {family for family, *_ in socket.getaddrinfo(name, 22)}
    return set()


IPV6 = ["::1", "0:0:0:0:0:0:0:1", *(["localhost"] if socket.AF_INET6 in families("localhost") else [])]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_refused_port(address: str) -> None:
    with no_leaks(), hostile.ClosedPort(address) as closed:
        answer = poll(target(closed))
    assert answer.cause == "unreachable"
    assert "refused" in answer.reason
    assert f"{address} port {closed.port}" in answer.reason


@POSIX
@pytest.mark.parametrize("hostname", ["127.0.0.1", "localhost", "127.1", "LOCALHOST"])
def test_names_of_this_machine(sshd: Server, hostname: str) -> None:
    """localhost may be ::1 first, where nobody listens."""
    with no_leaks():
        assert healthy(poll(target(sshd, hostname=hostname, **good_login(sshd))))


@POSIX
@pytest.mark.parametrize("hostname", IPV6)
def test_ipv6(tmp_path: Path, hostname: str) -> None:
    known = tmp_path / "known_hosts"
    with Sshd(address="::1") if SSHD else ParamikoSshd(address="::1") as server:
        known.write_text(server.known_hosts(), encoding="ascii")
        watched = target(server, hostname=hostname, **good_login(server))
        answer = poll(watched, connect(watched, known))
    assert healthy(answer)
    assert (answer.host_key is None) == (hostname == "::1")


@pytest.mark.parametrize(
    "hostname", ["no-such-host.invalid", "x" * 64 + ".example", "a..example", "999.1.1.1", ":::", "1:2", "ü" * 70]
)
def test_names_that_do_not_resolve(hostname: str) -> None:
    with no_leaks(), hostile.ClosedPort() as closed:
        answer = poll(target(closed, hostname=hostname))
    assert answer.cause == "unreachable"
    assert hostname[:60] in answer.reason
    assert "resolve" in answer.reason


def test_a_connection_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens at a port that the system gives away, too, it may give it to who connects there; by chance,
    or as often as one likes where that port is asked for."""
    with hostile.ClosedPort() as closed:
        place = (closed.address, closed.port)

    def bound(sock: HostSocket, address: Any) -> None:
        sock.bind(place)
        socket.socket.connect(sock, address)

    monkeypatch.setattr(HostSocket, "connect", bound, raising=False)
    with no_leaks(), pytest.raises(ProbeError, match="connection refused") as raised:
        connect_tcp(Resolver(), *place, Deadline(AMPLE))
    assert raised.value.cause == "unreachable"


class HangingResolver(Resolver):
    """A name server that does not answer before `answered` is set, as getaddrinfo shows it: by blocking."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = threading.Event()
        self.asked = 0

    def _ask(self, host: str, port: int) -> list[Any]:
        self.asked += 1
        self.answered.wait()
        return super()._ask(host, port)


@POSIX
def test_name_server_that_hangs(sshd: Server) -> None:
    """A hundred polls wait for one look-up; numeric addresses do not wait; what comes late is of use."""
    resolver = HangingResolver()
    named = target(sshd, hostname="localhost", timeout=1, **good_login(sshd))
    numeric = target(sshd, timeout=AMPLE, **good_login(sshd))
    shared = access(resolver=resolver)

    def one(watched: Target) -> Answer:
        return poll(watched, SshConnection(watched, LoginGuard(), shared))

    with no_leaks():
        threads = threading.active_count()
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(one, [named] * 100))
        assert {answer.cause for answer in answers} == {"timeout"}
        assert all("localhost" in answer.reason for answer in answers)
        assert healthy(one(numeric))
        wait_for(lambda: threading.active_count() <= threads + 1)
        assert resolver.asked == 1
        resolver.answered.set()
        next_item = target(sshd, hostname="localhost", timeout=AMPLE, **good_login(sshd))
        assert healthy(one(next_item))


@POSIX
def test_nobody_reads_from_a_closed_connection(sshd: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor is that of the next connection at once, and what comes there would be taken from it."""
    early = 0

    class Watched(HostSocket):
        def __init__(self, *of: Any) -> None:
            super().__init__(*of)
            self.is_closed = threading.Event()

        def recv(self, size: int, flags: int = 0, /) -> bytes:
            nonlocal early
            chunk = b""
            try:
                chunk = super().recv(size, flags)
            finally:
                early += not chunk and self.is_closed.wait(0.05)  # this thread gets no processor for a moment
            return chunk

        def close(self) -> None:
            self.is_closed.set()
            super().close()

    monkeypatch.setattr(healthchecker, "HostSocket", Watched)
    assert healthy(poll(target(sshd, timeout=AMPLE, **good_login(sshd))))
    with RawServer(hostile.banner_then_silence) as server:
        assert poll(target(server, timeout=1)).cause == "timeout"
    assert early == 0


@pytest.mark.skipif(sys.platform != "linux", reason="how a full backlog behaves differs between systems")
def test_packets_are_dropped() -> None:
    """A listener whose backlog is full answers no further connection, as a firewall that drops."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = full.getsockname()
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(address)
        given = {"name": "host", "hostname": address[0], "port": address[1], "username": "monitor", "timeout": 1}
        with no_leaks():
            answer = poll(resource_of(given))
    assert answer.cause == "timeout"
    assert f"port {address[1]}" in answer.reason


@POSIX
@pytest.mark.parametrize("platform", ["linux", "local"])
def test_no_descriptor_left(sshd: Server, platform: str) -> None:
    """A full descriptor table is said in one line and leaves nothing behind."""
    local = resource_of({"name": "host", "hostname": "localhost", "platform": "local"})
    watched = target(sshd, **good_login(sshd)) if platform == "linux" else local
    connection = connect(watched)
    gc.collect()  # or what others left is closed in between
    descriptors = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        answer = poll(watched, connection)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert open_descriptors() == descriptors
    assert answer.verdict.state == "unhealthy"
    assert "Too many open files" in answer.reason


def sockets_to(port: int) -> Iterator[socket.socket]:
    """Copies of this process's connections to a port."""
    for name in os.listdir("/dev/fd"):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            copy = os.dup(int(name))
            stack.callback(os.close, copy)
            sock = stack.enter_context(socket.socket(fileno=os.dup(copy)))
            if sock.getpeername()[1] == port:
                yield sock


@POSIX
def test_nodelay() -> None:
    """Nagle's algorithm would hold back every second packet of a login for 40 ms."""
    with ThreadPoolExecutor(1) as pool:
        with RawServer(hostile.banner_then_silence) as server:
            answer = pool.submit(poll, target(server, timeout=AMPLE))
            options = wait_for(
                lambda: [s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for s in sockets_to(server.port)]
            )
        assert options == [1]
        assert answer.result(60).cause == "unreachable"


# === Hosts that keep a poll waiting ==========================================


class FreezeAtLogin(LoginGuard):
    """Stops the server between the key exchange and the login, or right after the login."""

    def __init__(self, server: Server, *, after: bool) -> None:
        super().__init__()
        self.server, self.after = server, after

    @contextlib.contextmanager
    def attempt(self, name: str, deadline: Deadline, record: LoginRecord) -> Iterator[None]:
        with super().attempt(name, deadline, record):
            if not self.after:
                self.server.freeze()
            yield
            if self.after:
                self.server.freeze()


def own_sshd() -> Server:
    return Sshd() if SSHD else ParamikoSshd()


def raw(behaviour: hostile.Behaviour, timeout: float) -> Answer:
    with RawServer(behaviour) as server:
        return poll(target(server, password="a secret of the test", timeout=timeout))


def answering(behaviour: Any, timeout: float) -> Answer:
    with ParamikoSshd(answer=behaviour) as server:
        return poll(target(server, password=server.password, timeout=timeout))


def serving(kind: type[ParamikoSshd], timeout: float) -> Answer:
    with kind() as server:
        return poll(target(server, password=server.password, timeout=timeout))


def frozen_before_the_banner(timeout: float) -> Answer:
    with own_sshd() as server:
        server.freeze()
        return poll(target(server, timeout=timeout, **good_login(server)))


def frozen_at_login(after: bool, timeout: float) -> Answer:
    with own_sshd() as server:
        watched = target(server, timeout=timeout, **good_login(server))
        return poll(watched, connect(watched, guard=FreezeAtLogin(server, after=after)))


def mid_command(action: Callable[[Server], None], timeout: float) -> Answer:
    """`action` befalls the server while a check runs."""
    with own_sshd() as server, meeting_place() as folder, ThreadPoolExecutor(1) as pool:
        begun = folder / "begun"
        slow = {"name": "slow", "command": f"touch {begun}; echo so far; sleep 60", "timeout": 60}
        while True:
            answer = pool.submit(poll, target(server, timeout=timeout, checks=[slow], **good_login(server)))
            wait_for(lambda answer=answer: begun.exists() or answer.done())
            if begun.exists() and not answer.done():
                break
            assert timeout < AMPLE, answer.result(60)
            begun.unlink(missing_ok=True)  # on a busy machine the poll was over before its check had begun
            timeout *= 2
        action(server)
        return answer.result(60)


def freeze(server: Server) -> None:
    server.freeze()


def kill(server: Server) -> None:
    server.kill_sessions()


def nothing(server: Server) -> None:
    """Nothing happens; the command is slow by itself."""


def end_of_file_only(channel: paramiko.Channel, command: str) -> None:
    """Ends the output, and then neither a status nor a close."""
    channel.sendall(b"some output\n")
    channel.shutdown_write()
    channel.get_transport().join()


def status_without_end(channel: paramiko.Channel, command: str) -> None:
    """An exit status, and then no end of the output."""
    channel.send_exit_status(0)
    channel.get_transport().join()


def both_streams(channel: paramiko.Channel, command: str) -> None:
    """Less than the cap on either stream, more over both, and no end."""
    for _ in range(12):
        channel.sendall(b"y\n" * 25_000)
        channel.sendall_stderr(b"n\n" * 25_000)
    channel.get_transport().join()


def just_below_the_cap(channel: paramiko.Channel, command: str) -> int:
    channel.sendall(b"y" * (1 << 20))
    return 0


def endless_banner(connection: socket.socket, closing: threading.Event) -> None:
    """A first line without end, as fast as it is taken."""
    connection.sendall(b"SSH-2.0-")
    while not closing.is_set():
        connection.sendall(b"x" * 65536)


def web_server(connection: socket.socket, closing: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def old_protocol(connection: socket.socket, closing: threading.Event) -> None:
    connection.sendall(b"SSH-1.5-ancient\r\n")
    hostile.swallow(connection)


def reset(connection: socket.socket, closing: threading.Event) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def too_many_startups(connection: socket.socket, closing: threading.Event) -> None:
    """What OpenSSH says beyond MaxStartups."""
    connection.sendall(b"Exceeded MaxStartups\r\n")


class Scenario(NamedTuple):
    run: Callable[[float], Answer]  # with the seconds of the poll's deadline
    cause: str  # or several, with a blank between, where the moment decides
    says: str  # in the reason


SCENARIOS = {
    "silent": Scenario(partial(raw, hostile.silent), "timeout", "2 s"),
    "dripping banner": Scenario(partial(raw, hostile.dripping_banner), "timeout", "2 s"),
    "endless banner": Scenario(partial(raw, endless_banner), "timeout protocol", ""),
    "banner, then silence": Scenario(partial(raw, hostile.banner_then_silence), "timeout", "2 s"),
    "garbage": Scenario(partial(raw, hostile.garbage), "protocol timeout", ""),
    "garbage after the banner": Scenario(partial(raw, hostile.garbage_after_banner), "protocol timeout", ""),
    "endless lines": Scenario(partial(raw, hostile.endless_lines), "protocol", "SSH"),
    "closes at once": Scenario(partial(raw, hostile.close_at_once), "unreachable", "closed the connection"),
    "resets the connection": Scenario(partial(raw, reset), "unreachable", "closed the connection"),
    "too many startups": Scenario(partial(raw, too_many_startups), "unreachable", "closed the connection"),
    "a web server": Scenario(partial(raw, web_server), "protocol", "SSH"),
    "SSH 1": Scenario(partial(raw, old_protocol), "protocol", "1.5"),
    "stalled login": Scenario(partial(serving, hostile.StalledLogin), "timeout", "2 s"),
    "frozen at exec": Scenario(partial(serving, hostile.FrozenExec), "timeout", "2 s"),
    "no password login": Scenario(partial(serving, hostile.NoPassword), "auth", "keyboard-interactive, publickey"),
    "weak algorithms": Scenario(partial(serving, hostile.WeakAlgorithms), "protocol", "algorithm"),
    "endless stdout": Scenario(partial(answering, hostile.endless_stdout), "protocol", "1048576 bytes"),
    "endless stderr": Scenario(partial(answering, hostile.endless_stderr), "protocol", "1048576 bytes"),
    "endless on both": Scenario(partial(answering, both_streams), "protocol", "1048576 bytes"),
    "just below the cap": Scenario(partial(answering, just_below_the_cap), "protocol", "yyy"),
    "a line per second": Scenario(partial(answering, hostile.line_per_second), "timeout", "2 s"),
    "never ends": Scenario(partial(answering, hostile.never_ends), "timeout", "2 s"),
    "end of file only": Scenario(partial(answering, end_of_file_only), "timeout", "2 s"),
    "status without end": Scenario(partial(answering, status_without_end), "timeout", "2 s"),
    "status only": Scenario(partial(answering, hostile.status_only), "protocol", "shell"),
    "no status": Scenario(partial(answering, hostile.no_status), "unreachable", "lost"),
    "huge text": Scenario(partial(answering, hostile.huge_text), "protocol", "xxx"),
    "exit by a signal": Scenario(partial(answering, hostile.exit_signal), "unreachable", "lost"),
    "cut": Scenario(partial(answering, hostile.cut), "unreachable", "lost"),
}
POSIX_SCENARIOS = {
    "frozen before the banner": Scenario(frozen_before_the_banner, "timeout", "2 s"),
    "frozen after the key exchange": Scenario(partial(frozen_at_login, False), "timeout", "2 s"),
    "frozen after the login": Scenario(partial(frozen_at_login, True), "timeout", "2 s"),
    "frozen mid-command": Scenario(partial(mid_command, freeze), "timeout", "check slow"),
    "slow command": Scenario(partial(mid_command, nothing), "timeout", "check slow"),
    "killed mid-command": Scenario(partial(mid_command, kill), "unreachable", "lost"),
}


@pytest.mark.long
def test_every_poll_ends_in_time() -> None:
    scenarios = SCENARIOS | (POSIX_SCENARIOS if sys.platform != "win32" else {})
    wrong = []
    with no_leaks(), ThreadPoolExecutor(len(scenarios)) as pool:
        answers = {
            name: pool.submit(scenario.run, DEADLINE if "timeout" in scenario.cause else AMPLE)
            for name, scenario in scenarios.items()
        }
        for name, (_, cause, says) in scenarios.items():
            try:
                answer = answers[name].result(2 * AMPLE)
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
                continue
            if answer.cause not in cause.split() or says not in answer.reason:
                wrong.append(f"{name}: {answer.cause}, not {cause}: {answer.reason!r} without {says!r}")
            if cause == "timeout" and answer.seconds < DEADLINE - 0.05:
                wrong.append(f"{name}: given up after {answer.seconds:.2f} s")
    assert not wrong, "\n".join(wrong)


@POSIX
def test_the_end_of_a_silent_connection_is_always_a_timeout() -> None:
    """At the deadline itself two clocks run; whichever is first, the host was silent and not lost."""
    with ParamikoSshd(answer=end_of_file_only) as server, ThreadPoolExecutor(10) as pool:
        watched = target(server, password=server.password, timeout=1)
        answers = [pool.submit(poll, watched) for _ in range(20)]
        assert {answer.result(60).cause for answer in answers} == {"timeout"}


def test_announced_packets_are_not_stored() -> None:
    """A packet of 2 GiB is no packet (35,000 bytes are the protocol's own limit, RFC 4253): no memory for it."""
    taken = 0

    def announce(connection: socket.socket, closing: threading.Event) -> None:
        nonlocal taken
        connection.sendall(hostile.BANNER + (0x7FFFFFFC).to_bytes(4, "big") + b"\5")
        while not closing.is_set():
            taken += connection.send(bytes(1 << 16))

    with RawServer(announce) as server:
        assert poll(target(server, timeout=1)).cause in ("protocol", "timeout")
    assert taken < 16 << 20, f"{taken >> 20} MiB"


@POSIX
def test_failed_polls_leave_nothing_behind(sshd: Server, often: Callable[[int, int], int]) -> None:
    """Many of them: refused, a wrong credential, a hostile banner, a frozen host."""
    with contextlib.ExitStack() as stack:
        closed = stack.enter_context(hostile.ClosedPort())
        rude = stack.enter_context(RawServer(hostile.endless_lines))
        frozen: Server = own_sshd()
        stack.enter_context(frozen)
        frozen.freeze()
        targets = {
            "unreachable": target(closed, password="x", timeout=AMPLE),
            "auth": target(sshd, password="not the password", timeout=AMPLE),
            "protocol": target(rude, password="x", timeout=AMPLE),
            "timeout": target(frozen, password="x", timeout=1),
        }
        poll(targets["auth"])  # what is imported at the first attempt is there before counting
        with no_leaks():
            with ThreadPoolExecutor(20) as pool:
                wanted = list(targets.items()) * often(10, 50)
                answers = [(cause, pool.submit(poll, one)) for cause, one in wanted]
                assert [(cause, answer.result(2 * AMPLE).cause) for cause, answer in answers] == [
                    (cause, cause) for cause, _ in answers
                ]
            assert len(answers) == often(40, 200)
            frozen.thaw()  # a server of this process holds the connection that it was about to take
            frozen.kill_sessions()


# what a poll ends with, and of what
ENDS: list[tuple[str, Callable[[Sshd, Path], Target]]] = [
    ("", lambda sshd, _: target(sshd, **good_login(sshd), timeout=AMPLE)),
    ("auth", lambda sshd, key: target(sshd, key_file=key, timeout=AMPLE)),
    ("unreachable", lambda sshd, _: target(sshd, port=1, password="x", timeout=AMPLE)),
]


@POSIX
@OPENSSH
@pytest.mark.parametrize(("cause", "make"), ENDS)
def test_a_poll_leaves_nothing_to_the_garbage_collector(
    own: Sshd, tmp_path: Path, cause: str, make: Callable[[Sshd, Path], Target]
) -> None:
    """It runs in any thread, and that one's part of malloc keeps what another one's connection was made of."""
    key = tmp_path / "key"
    write_private(key, make_key("ed25519"))
    connection = connect(watched := make(own, key))
    gc.collect()
    gc.disable()
    try:
        before = Counter(map(type, gc.get_objects()))
        assert poll(watched, connection).cause == cause
        left = Counter(map(type, gc.get_objects())) - before
        assert not left[SshTransport] and not left[HostSocket]
    finally:
        gc.enable()


# === How hosts are set up ====================================================

SHELLS = [shell for name in ("bash", "ksh", "zsh", "csh", "tcsh", "fish") if (shell := shutil.which(name))]


@contextlib.contextmanager
def login_shell(server: SshServer, shell: str) -> Iterator[None]:
    def change(to: str) -> None:
        command, environ = ["usermod", "--shell", to, server.username], {**os.environ, "PATH": SYSTEM_PATH}
        subprocess.run(command, env=environ, check=True, capture_output=True, timeout=60)

    change(shell)
    try:
        yield
    finally:
        change("/bin/sh")


@ACCOUNTS
@pytest.mark.parametrize("shell", SHELLS)
def test_login_shells(sshd: Server, shell: str) -> None:
    with login_shell(sshd, shell):
        checks = [{"name": "quotes", "command": "test \"$(echo 'a  b' | tr a c)\" = 'c  b' && set -e; exit 0"}]
        assert healthy(poll(target(sshd, checks=checks, **good_login(sshd))))


@pytest.mark.long
@ACCOUNTS
@pytest.mark.parametrize("loop", ["while :; do sleep 1; done", "trap '' HUP PIPE; while :; do sleep 1; done"])
def test_a_poll_that_is_late_leaves_nothing_on_the_host(own: Sshd, loop: str) -> None:
    """sshd leaves a command alone whose connection ended, until it prints: one more at each poll."""
    mark, rc = f"{MARK}={own.folder}", own.folder / ".bashrc"
    before = marked(mark)
    rc.write_text(loop, encoding="ascii")
    with login_shell(own, shutil.which("bash") or pytest.skip("bash is missing")):
        answer = poll(target(own, timeout=5, **good_login(own)))
    rc.unlink()
    assert answer.cause == "timeout" and answer.reason == "no end within 5 s"
    wait_for(lambda: marked(mark) <= before)


@OPENSSH
@pytest.mark.parametrize("step", [-86_400, 86_400])
def test_a_wall_clock_that_is_set_ends_no_poll(own: Sshd, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """paramiko measures by it how long it waited for output."""
    times = iter(range(0, 10**9, abs(step))[:: 1 if step > 0 else -1])
    monkeypatch.setattr(paramiko.buffered_pipe, "time", SimpleNamespace(time=lambda: next(times)))
    checks = [{"name": "slow", "command": "sleep 0.2; echo 1; sleep 0.2"}]
    assert healthy(poll(target(own, timeout=AMPLE, checks=checks, **good_login(own))))
    late = poll(target(own, timeout=DEADLINE, checks=[{"name": "slow", "command": "sleep 9", "timeout": 9}],
                       **good_login(own)))  # fmt: skip
    assert late.cause == "timeout" and "check slow" in late.reason


@ACCOUNTS
@pytest.mark.parametrize(
    ("shell", "says"),
    [("/usr/sbin/nologin", "This account is currently not available"), ("/bin/false", "shell"), ("/bin/cat", "shell")],
)
def test_accounts_without_a_shell(sshd: Server, shell: str, says: str) -> None:
    """Such a shell may end before the script has been sent; what it said counts all the same."""
    with login_shell(sshd, shell):
        watched = target(sshd, timeout=AMPLE, **good_login(sshd))
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(poll, [watched] * 16))
    assert {answer.cause for answer in answers} == {"protocol"}
    assert all(says in answer.reason for answer in answers)


class NarrowSshd(ParamikoSshd):
    """Takes no more than 32 KiB before its command reads."""

    def prepare(self, transport: paramiko.Transport) -> None:
        transport.default_window_size = 1 << 15


def closed_account(channel: paramiko.Channel, command: str) -> int:
    channel.sendall(b"This account is currently not available.\n")
    return 1


def test_a_shell_that_ends_before_the_script_was_sent() -> None:
    """What it said is the reason, and not that sending failed."""
    checks = [{"name": f"check {number}", "command": f": {'x' * 1000}"} for number in range(100)]
    with no_leaks(), NarrowSshd(answer=closed_account) as server:
        answer = poll(target(server, password=server.password, timeout=AMPLE, checks=checks))
    assert answer.cause == "protocol"
    assert "This account is currently not available" in answer.reason


@pytest.fixture(scope="module")
def own() -> Iterator[Sshd]:
    """An sshd that tests set up as they like."""
    with Sshd() as server:
        yield server


PAM = "UsePAM yes\nPasswordAuthentication no\nKbdInteractiveAuthentication yes"


@ACCOUNTS
@pytest.mark.parametrize("pam", [False, True])
def test_expired_password(own: Sshd, pam: bool) -> None:
    if pam and not Path("/etc/pam.d/sshd").exists():
        pytest.skip("needs PAM's file for sshd")

    def last_changed(day: str) -> None:
        environ = {**os.environ, "PATH": SYSTEM_PATH}
        subprocess.run(["chage", "-d", day, own.username], env=environ, check=True, capture_output=True, timeout=60)

    with settings_digest(own, PAM if pam else "PasswordAuthentication yes"):
        last_changed("0")
        answer = poll(target(own, timeout=AMPLE, **good_login(own)))
        last_changed("2020-01-01")
    assert answer.cause in ("protocol", "auth")
    assert "assword" in answer.reason
    if pam:
        assert answer.cause == "auth"
        assert f"the password of {own.username} has expired; the host says: " in answer.reason


@OPENSSH
@pytest.mark.parametrize(
    ("command", "cause", "says"),
    [
        ("echo Maintenance until noon", "protocol", "Maintenance until noon"),
        ("echo Keep out >&2; exit 1", "protocol", "Keep out"),
        ("cat", "protocol", "shell"),
        ("internal-sftp", "protocol timeout", ""),
        ("yes", "protocol", "1048576 bytes"),
        ("yes >&2", "protocol", "1048576 bytes"),
        ("while :; do date; sleep 1; done", "timeout", "1 s"),
        ("sleep 60", "timeout", "1 s"),
        ("kill -9 $$", "unreachable", "lost"),
        ("echo Welcome; echo notice >&2; exec /bin/sh -s", "", ""),
        ("printf 'no line end'; exec /bin/sh -s", "", ""),
    ],
)
def test_forced_commands(own: Sshd, tmp_path: Path, command: str, cause: str, says: str) -> None:
    key = make_key("ed25519")
    write_private(tmp_path / "key", key)
    with (own.folder / "authorized_keys").open("a", encoding="ascii") as authorized:
        authorized.write(f'command="{command}",no-pty {public_line(key)}\n')
    with no_leaks():
        timeout = 1 if "timeout" in cause.split() else AMPLE
        answer = poll(target(own, key_file=tmp_path / "key", timeout=timeout))
    own.kill_sessions()
    assert answer.cause in (cause.split() or [""])
    assert says in answer.reason


@OPENSSH
@pytest.mark.parametrize(
    ("settings", "login", "cause", "says"),
    [
        ("Ciphers aes128-cbc,aes256-cbc", "good", "protocol", "algorithm"),
        ("Ciphers aes128-ctr\nMACs hmac-sha1", "good", "protocol", "the host has hmac-sha1, here are hmac-sha2"),
        ("KexAlgorithms diffie-hellman-group14-sha1", "good", "protocol", "the host has diffie-hellman-group14-sha1"),
        ("Ciphers aes256-gcm@openssh.com", "good", "", ""),
        ("MACs hmac-sha2-512-etm@openssh.com", "good", "", ""),
        ("KexAlgorithms curve25519-sha256@libssh.org", "good", "", ""),
        ("PasswordAuthentication no", "password", "auth", "publickey"),
        ("PubkeyAuthentication no", "key", "auth", "password"),
        ("PasswordAuthentication no\nKbdInteractiveAuthentication yes", "password", "auth", "publickey"),
        ("AuthenticationMethods publickey,password", "key", "auth", "more than one proof: password"),
        ("AuthenticationMethods publickey,password", "password", "auth", "publickey"),
        ("MaxAuthTries 1", "good", "", ""),
        ("MaxAuthTries 1", "wrong", "auth", ""),
        ("MaxSessions 0", "good", "unreachable protocol", "session"),
        ("Banner /etc/os-release", "good", "", ""),
        ("PermitTTY no\nX11Forwarding yes\nCompression yes", "good", "", ""),
        ("DenyUsers *", "good", "auth", ""),
        ("VersionAddendum an example", "good", "", ""),
    ],
)
def test_configurations(own: Sshd, settings: str, login: str, cause: str, says: str) -> None:
    logins = {
        "good": good_login(own),
        "password": {"password": own.password or "x"},
        "wrong": {"password": "not the password"},
        "key": {"key_file": own.user_key()},
    }
    with no_leaks(), settings_digest(own, settings):
        answer = poll(target(own, timeout=AMPLE, **logins[login]))
    assert answer.cause in (cause.split() or [""]), answer
    assert says in answer.reason


@OPENSSH
def test_a_host_that_is_too_modern_is_not_called_weak(own: Sshd) -> None:
    with settings_digest(own, "Ciphers chacha20-poly1305@openssh.com"):
        answer = poll(target(own, **good_login(own)))
    assert answer.cause == "protocol"
    assert "weak" not in answer.reason


@ACCOUNTS
@pytest.mark.skipif(not Path("/etc/pam.d/sshd").exists(), reason="needs PAM's file for sshd")
@pytest.mark.parametrize("right", [True, False])
def test_keyboard_interactive_with_pam(own: Sshd, right: bool) -> None:
    """As many distributions ship it: the password is asked for in a dialogue."""
    with settings_digest(own, PAM):
        answer = poll(target(own, password=own.password + ("" if right else "x")))
    assert answer.cause == ("" if right else "auth"), answer
    assert ("check username and password" in answer.reason) is not right


# --- answers after the poll ---
class Tardy(Login):
    """Takes longer for a login than its poll has time, as pam_faildelay and sssd do."""

    may_answer: threading.Event
    asked: list[str]

    def check_auth_password(self, username: str, password: str) -> int:
        self.asked.append(password)
        self.may_answer.wait(30)
        return super().check_auth_password(username, password)


class TardySshd(ParamikoSshd):
    def __init__(self) -> None:
        self.may_answer, self.asked = threading.Event(), list[str]()
        self.login = type("Asked", (Tardy,), {"may_answer": self.may_answer, "asked": self.asked})
        super().__init__()

    def stop(self) -> None:
        self.may_answer.set()
        super().stop()


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_what_a_host_says_of_a_password_after_the_poll(right: bool) -> None:
    """A refusal counts, or each poll would send the wrong password again, until the account is locked."""
    with no_leaks(), TardySshd() as server:
        guard, own = LoginGuard(), target(server, password=server.password + "x" * (not right), timeout=2)
        connection = connect(own, guard=guard)
        answer = poll(own, connection)
        assert (answer.cause, answer.reason) == ("timeout", "no answer within 2 s")
        answer = poll(own, connection)
        assert answer.cause == "timeout"
        assert answer.reason == "not tried: the host has not answered to the login before"
        server.may_answer.set()
        wait_for(lambda: not late_logins())
        assert len(server.asked) == 1
        assert connection.record.outcomes == {"accepted" if right else "refused": 1}
        answer = poll(own, connection)
        assert (answer.cause == "auth") is not right, answer
        assert len(server.asked) == 1 + right
        assert connection.record.outcomes == ({"accepted": 2} if right else {"refused": 1})
        connection.close()


@pytest.mark.long
@pytest.mark.windows
def test_a_host_that_never_says_what_it_thinks_of_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be asked again, and nothing counts."""
    monkeypatch.setattr(healthchecker, "ANSWER_TIME", 0.5)
    with no_leaks(), TardySshd() as server:
        guard = LoginGuard()
        own = target(server, password=server.password, timeout=2)
        connection = connect(own, guard=guard)
        for number in range(1, 4):
            answer = poll(own, connection)
            assert (answer.cause, answer.reason) == ("timeout", "no answer within 2 s")
            wait_for(lambda: not late_logins())
            assert len(server.asked) == number
        assert not connection.record.outcomes
        assert guard.refusals == 0


@pytest.mark.long
def test_a_host_that_takes_long_to_say_what_it_thinks_of_a_password() -> None:
    """Directories that are overloaded do, and pam_faildelay: a refusal counts all the same."""
    with no_leaks(), TardySshd() as server:
        guard, own = LoginGuard(), target(server, password=server.password + "x", timeout=1)
        assert poll(own, connect(own, guard=guard)).cause == "timeout"
        timer = threading.Timer(12, server.may_answer.set)
        timer.start()
        wait_for(lambda: not late_logins())
        timer.join()
        assert (len(server.asked), guard.refusals) == (1, 1)


def test_a_host_that_dies_while_its_answer_is_waited_for() -> None:
    with no_leaks(), hostile.StalledLogin() as server:
        guard = LoginGuard()
        own = target(server, password="wrong", timeout=2)
        assert poll(own, connect(own, guard=guard)).cause == "timeout"
        server.kill_sessions()
        wait_for(lambda: not late_logins())
        assert guard.refusals == 0


def test_others_wait_for_a_late_answer() -> None:
    """Where nothing is proven: one login at a time, also when nobody polls any more."""
    with no_leaks(), TardySshd() as server:
        guard = LoginGuard()
        first, second = (target(server, name=name, password="wrong", timeout=2) for name in ("first", "second"))
        assert poll(first, connect(first, guard=guard)).cause == "timeout"
        answer = poll(second, connect(second, guard=guard))
        assert "others log in with the same credential" in answer.reason
        assert len(server.asked) == 1


def test_a_login_that_no_thread_begins_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "login":
            raise RuntimeError("can't start new thread")
        start(thread)

    with no_leaks(), TardySshd() as server:
        guard = LoginGuard()
        own = target(server, password="wrong", timeout=2)
        connection = connect(own, guard=guard)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        answer = poll(own, connection)
        assert (answer.cause, guard.refusals, server.asked) == ("protocol", 0, []), answer
        monkeypatch.undo()
        server.may_answer.set()
        assert poll(own, connection).cause == "auth"


# --- dialogues ---
class Dialogue(Login):
    """A server that allows nothing but keyboard-interactive, and asks one question after the other."""

    questions: list[list[str]]
    pause: float

    def get_allowed_auths(self, username: str) -> str:
        return "keyboard-interactive"

    def check_auth_password(self, username: str, password: str) -> int:
        return paramiko.AUTH_FAILED

    def _ask(self) -> Any:
        questions = self.left.pop(0)
        return paramiko.InteractiveQuery("", "", *((text, False) for text in questions))

    def check_auth_interactive(self, username: str, submethods: str) -> Any:
        threading.Event().wait(self.pause)
        self.left = list(self.questions)
        return self._ask()

    def check_auth_interactive_response(self, responses: list[str]) -> Any:
        if responses and responses != [self.server.password]:
            return paramiko.AUTH_FAILED
        return self._ask() if self.left else paramiko.AUTH_SUCCESSFUL


class DialogueSshd(ParamikoSshd):
    def __init__(self, questions: list[list[str]], pause: float) -> None:
        self.login = type("Asking", (Dialogue,), {"questions": questions, "pause": pause})
        super().__init__()


class TardyDialogue(Dialogue):
    """Asks for the password only after the poll."""

    late_in: str
    may_answer: threading.Event
    given: list[list[str]]

    def check_auth_password(self, username: str, password: str) -> int:
        if self.late_in == "refusing the method":
            self.may_answer.wait(30)
        return super().check_auth_password(username, password)

    def check_auth_interactive(self, username: str, submethods: str) -> Any:
        self.may_answer.wait(30)
        return super().check_auth_interactive(username, submethods)

    def check_auth_interactive_response(self, responses: list[str]) -> Any:
        self.given.append(responses)
        return super().check_auth_interactive_response(responses)


@pytest.mark.parametrize("late_in", ["refusing the method", "asking"])
def test_no_password_is_shown_after_the_poll(late_in: str) -> None:
    """The host's answer to that might come when nobody waits for it any more, and not count."""
    given, may_answer = list[list[str]](), threading.Event()
    with DialogueSshd([["Password: "]], 0) as server:
        more = {"late_in": late_in, "may_answer": may_answer, "given": given}
        server.login = type("Late", (TardyDialogue,), {"questions": [["Password: "]], "pause": 0, **more})
        guard, own = LoginGuard(), target(server, password="wrong", timeout=1)
        assert poll(own, connect(own, guard=guard)).cause == "timeout"
        may_answer.set()
        wait_for(lambda: not late_logins())
        assert (given, guard.refusals) == ([], 0)


# the questions of the host, the password that is given, what comes of it
DIALOGUES = {
    "one question": ([["Password: "]], "", ("", "")),
    "a wrong password": ([["Password: "]], "x", ("auth", "check username and password")),
    "a notice after it": ([["Password: "], []], "", ("", "")),
    # pam_unix's and pam_krb5's prompt of FreeBSD and Heimdal: the account and its host or realm
    "a name in it": ([["Password for monitor@exchange1.example.com:"]], "", ("", "")),
    "a realm in it": ([["monitor@CHANGE.EXAMPLE.COM's Password:"]], "", ("", "")),
    "a change in it": ([["You are required to change your password. Current password: "]], "", ("auth", "has expired")),
    "expired": ([["Password: "], ["New password: "]], "", ("auth", "has expired")),
    "a second factor": ([["Password: "], ["Verification code: "]], "", ("auth", "Verification code")),
    "both at once": ([["Password: ", "Token: "]], "", ("auth", "Token")),
}


@pytest.mark.parametrize(("questions", "more", "expected"), DIALOGUES.values(), ids=DIALOGUES)
def test_dialogues(questions: list[list[str]], more: str, expected: tuple[str, str]) -> None:
    cause, says = expected
    if sys.platform == "win32" and not cause:
        pytest.skip("the commands are for /bin/sh")
    with DialogueSshd(questions, 0.0) as server:
        answer = poll(target(server, password=server.password + more, timeout=AMPLE))
    assert (answer.cause, says in answer.reason) == (cause, True), answer


def test_a_dialogue_slower_than_the_deadline() -> None:
    with DialogueSshd([["Password: "]], 3.0) as server:
        assert poll(target(server, password=server.password, timeout=1)).cause == "timeout"


def test_a_dialogue_that_goes_on_after_the_poll() -> None:
    """That more is asked for, as pam_unix and then pam_ldap do, is a refusal, as it is one within the poll."""
    class Pausing(Dialogue):
        questions, pause = [["Password: "], ["LDAP Password: "]], 0.0

        def check_auth_interactive_response(self, responses: list[str]) -> Any:
            threading.Event().wait(3)
            return super().check_auth_interactive_response(responses)

    with no_leaks(), DialogueSshd([], 0.0) as server:
        server.login = Pausing
        own, guard = target(server, password=server.password, timeout=2), LoginGuard()
        connection = connect(own, guard=guard)
        assert poll(own, connection).cause == "timeout"
        wait_for(lambda: not late_logins())
        assert (guard.refusals, connection.record.outcomes) == (1, {"refused": 1})
        connection.close()


# --- what a host says first ---
@pytest.mark.parametrize("lines", [1, 500])
def test_what_a_host_says_before_its_banner_is_part_of_the_reason(lines: int) -> None:
    def refuse(connection: socket.socket, closing: threading.Event) -> None:
        connection.sendall(b"Not allowed at this time\r\n" * lines)

    with RawServer(refuse) as server:
        answer = poll(target(server, timeout=AMPLE))
    assert "it said: Not allowed at this time" in answer.reason and len(answer.reason) <= 500


@OPENSSH
def test_algorithms_of_both_sides(own: Sshd) -> None:
    with settings_digest(own, "Ciphers aes128-cbc"):
        answer = poll(target(own, **good_login(own)))
    assert answer.cause == "protocol"
    assert "the host has aes128-cbc, here are aes" in answer.reason


@OPENSSH
def test_a_host_whose_key_signs_by_sha_1_alone() -> None:
    """As that of RHEL 6: its name is the same, ssh-rsa."""
    with Sshd("rsa") as server, settings_digest(server, "HostKeyAlgorithms ssh-rsa"):
        answer = poll(target(server, **good_login(server)))
    assert answer.cause == "protocol"
    assert "the host has ssh-rsa, here are " in answer.reason and "rsa-sha2-512" in answer.reason


@ACCOUNTS
@pytest.mark.parametrize("settings", ["PasswordAuthentication no", "AuthenticationMethods password,publickey"])
def test_hosts_that_say_nothing_of_the_password_stop_no_other(own: Sshd, settings: str) -> None:
    """Three of them at the first contact, when nothing is proven: each waits for itself."""
    guard = LoginGuard()
    with settings_digest(own, settings):
        for name in ("a", "b", "c"):
            watched = target(own, name=name, password=own.password, timeout=AMPLE)
            assert poll(watched, connect(watched, guard=guard)).cause == "auth"
            assert guard.wait(name) > 0
    assert guard.wait("d") == guard.refusals == 0


# --- key files ---
COMMANDS = {
    "genpkey RSA": "openssl genpkey -algorithm RSA -out key",
    "genpkey RSA encrypted": "openssl genpkey -algorithm RSA -aes256 -pass pass:secret -out key",
    "genpkey EC": "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key",
    "genpkey Ed25519": "openssl genpkey -algorithm ED25519 -out key",
    "genpkey Ed25519 encrypted": "openssl genpkey -algorithm ED25519 -aes256 -pass pass:secret -out key",
    "genrsa": "openssl genrsa -out key 2048",
    "genrsa traditional": "openssl genrsa -traditional -aes256 -passout pass:secret -out key 2048",
    "ssh-keygen PKCS8": "ssh-keygen -q -t rsa -m PKCS8 -N secret -f key",
    "ssh-keygen PKCS8 ECDSA": "ssh-keygen -q -t ecdsa -b 521 -m PKCS8 -N '' -f key",
    "ssh-keygen PEM": "ssh-keygen -q -t ecdsa -m PEM -N secret -f key",
    "ssh-keygen": "ssh-keygen -q -t ed25519 -N secret -f key",
}


@pytest.mark.long
@OPENSSH
@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_format_of_a_key(sshd: Server, tmp_path: Path, command: str) -> None:
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    secret = "secret" if "secret" in command else ""
    loaded = (serialization.load_ssh_private_key if " ed25519 " in command else serialization.load_pem_private_key)(
        (tmp_path / "key").read_bytes(), secret.encode() or None)  # fmt: skip
    with (sshd.folder / "authorized_keys").open("a", encoding="ascii") as authorized:
        authorized.write(public_line(cast(Any, loaded)) + "\n")
    phrase = {"key_passphrase": secret} if secret else {}
    assert healthy(poll(target(sshd, key_file=tmp_path / "key", **phrase)))


@OPENSSH
def test_certificates_of_a_key(own: Sshd, tmp_path: Path) -> None:
    """A renewed one is read again; beside one that has expired the plain key is tried."""
    certify = certified_key(tmp_path, own)
    with settings_digest(own, f"TrustedUserCAKeys {own.folder}/authorities"):
        watched = target(own, key_file=tmp_path / "key")
        connection = connect(watched, guard=Guards().of(watched))
        assert poll(watched, connection).cause == "auth"
        for validity, cause in (("-2h:-1h", "auth"), ("-1h:+1h", ""), ("-2h:-1h", "auth")):
            certify("x", validity)
            assert poll(watched, connection).cause == cause, validity
        with (own.folder / "authorized_keys").open("a", encoding="ascii") as authorized:
            authorized.write((tmp_path / "key.pub").read_text(encoding="ascii"))
        assert healthy(poll(watched, connection))


class SlowLogin(Login):
    """Refuses the first key at once, and thinks about any other."""

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        refused = self.server.log().count("Failed publickey")
        if refused:
            self.server.closing.wait(60)
        return self._judge("publickey", username, False)


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")
def test_a_plain_key_behind_a_refused_certificate_has_no_time_of_its_own(tmp_path: Path) -> None:
    with ParamikoSshd() as server:
        server.login = SlowLogin
        certified_key(tmp_path, cast(Any, server))("x", "-1h:+1h")
        answer = poll(target(server, key_file=tmp_path / "key", timeout=DEADLINE))
        assert "Failed publickey" in server.log()
    assert (answer.cause, answer.reason) == ("timeout", "no answer within 2 s")


@OPENSSH
@pytest.mark.parametrize("named", ["DB1.Example.com", "db1.example.com"])
@pytest.mark.parametrize("port", [22, 2222])
def test_hashed_names_are_lower_case(tmp_path: Path, named: str, port: int) -> None:
    known = tmp_path / "known_hosts"
    name = "db1.example.com" if port == 22 else f"[db1.example.com]:{port}"
    known.write_text(f"{name} {public_line(make_key('ed25519'))}\n", encoding="ascii")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True, timeout=60)
    keys, revoked, authorities = KnownHosts(known).lookup(named, port)
    assert (len(keys), revoked, authorities) == (1, set(), set())


# how the host's key is certified, what known_hosts has more, the cause
CERTIFICATES = {
    "good": ("-h -n 127.0.0.1 -V -1h:+1h", "", ""),
    "by an authority of RSA": ("-h -n 127.0.0.1 -V -1h:+1h", "rsa", ""),
    "by an authority of RSA, with SHA-1": ("-t ssh-rsa -h -n 127.0.0.1 -V -1h:+1h", "rsa", "host_key"),
    "of no name": ("-h -V -1h:+1h", "", "host_key"),
    "one of several names": ("-h -n db1,127.0.0.* -V -1h:+1h", "", ""),
    "expired": ("-h -n 127.0.0.1 -V -2h:-1h", "", "host_key"),
    "not yet": ("-h -n 127.0.0.1 -V +1h:+2h", "", "host_key"),
    "of another host": ("-h -n 127.0.0.2 -V -1h:+1h", "", "host_key"),
    "of a user": ("-n 127.0.0.1 -V -1h:+1h", "", "host_key"),
    "the authority is revoked": ("-h -n 127.0.0.1 -V -1h:+1h", "@revoked * {authority}", "host_key"),
    "of another authority": ("-h -n 127.0.0.1 -V -1h:+1h", "another", "host_key"),
    "expired, and the plain key is known": ("-h -n 127.0.0.1 -V -2h:-1h", "{plain}", ""),
    "the plain key is revoked": ("-h -n 127.0.0.1 -V -1h:+1h", "@revoked * {key}", "host_key"),
}


def certify(own: Sshd, folder: Path, how: str, kind: str = "ecdsa") -> str:
    """Signs the host's key with that of a new authority, which is given."""
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", folder / "authority"], check=True)
    (own.folder / "host.pub").write_text(public_line(own.host_keys["ed25519"]) + "\n", encoding="ascii")
    sign = ["ssh-keygen", "-q", "-s", folder / "authority", "-I", "x", *how.split(), own.folder / "host.pub"]
    subprocess.run(sign, check=True)
    return " ".join((folder / "authority.pub").read_text(encoding="ascii").split()[:2])


# known_hosts as people write it, for a host at another port than 22 whose key is KEY; where it is about authorities, CA
# certified it. NAME is what OpenSSH calls the host, HASH: has a name hashed; what begins with "alias" is found as db1.
WRITTEN = {
    "its name": "NAME KEY",
    "its name, hashed": "HASH:NAME KEY",
    "its name, hashed, and line ends of Windows": "HASH:NAME KEY\r\n",
    "a comment behind": "NAME KEY # the database",
    "in quotes": '"NAME" KEY',
    "several patterns": "db?.example.com,[127.0.*]:* KEY",
    "a pattern and a negation of it": "[127.0.*]:*,!NAME KEY",
    "a pattern and a negation of another": "!db1,[127.0.*]:* KEY",
    "blanks behind a comma": "db1, NAME KEY",
    "another key": "NAME OTHER",
    "another key, then its own": "NAME OTHER\nNAME KEY",
    "without the port": "127.0.0.1 KEY",
    "without the port, hashed": "HASH:127.0.0.1 KEY",
    "without the port, a pattern": "127.0.0.* KEY",
    "without the port, several and a comment": "# all\n\ndb1,127.0.0.1 KEY me@here",
    "without the port, line ends of Windows": "db1 OTHER\r\n127.0.0.1 KEY\r\n",
    "without the port, left out": "*,!127.0.0.1,!NAME KEY",
    "without the port, another key": "127.0.0.1 OTHER",
    "without the port, another key first": "127.0.0.1 OTHER\n127.0.0.1 KEY",
    "without the port, but with the port another": "127.0.0.1 KEY\nNAME OTHER",
    "without the port, but with the port another, of another type": "127.0.0.1 KEY\nNAME RSA",
    "without the port another, with the port its own": "127.0.0.1 OTHER\nNAME KEY",
    "another port": "[127.0.0.1]:22 KEY",
    "every host": "* KEY",
    "revoked": "NAME KEY\n@revoked NAME KEY",
    "revoked without the port, known without it": "127.0.0.1 KEY\n@revoked 127.0.0.1 KEY",
    "revoked with the port, known without it": "127.0.0.1 KEY\n@revoked NAME KEY",
    "revoked without the port, known with it": "NAME KEY\n@revoked 127.0.0.1 KEY",
    "another is revoked": "NAME KEY\n@revoked * OTHER",
    "an authority": "@cert-authority NAME CA",
    "an authority without the port": "@cert-authority 127.0.0.1 CA",
    "an authority of a pattern without the port": "@cert-authority db1,127.0.0.* CA",
    "an authority of all": "@cert-authority * CA",
    "an authority of others": "@cert-authority *.example.com,[127.0.0.1]:1 CA",
    "another authority": "@cert-authority 127.0.0.1 OTHER",
    "another authority with the port": "@cert-authority NAME OTHER\n@cert-authority 127.0.0.1 CA",
    "another authority with the port, another key, too": "@cert-authority NAME OTHER\nNAME RSA\n127.0.0.1 KEY",
    "another authority, the key without the port": "@cert-authority NAME OTHER\n127.0.0.1 KEY",
    "an authority without the port, another key": "@cert-authority 127.0.0.1 CA\nNAME OTHER",
    "an authority that is revoked": "@cert-authority NAME CA\n@revoked NAME CA",
    "an authority that is revoked without the port": "@cert-authority 127.0.0.1 CA\n@revoked 127.0.0.1 CA",
    "an authority that is revoked with the port": "@cert-authority 127.0.0.1 CA\n@revoked NAME CA",
    "a marker that nobody knows": "@trusted NAME KEY",
    "alias": "db1 KEY",
    "alias with the port": "[db1]:PORT KEY",
    "alias that is another": "127.0.0.1 KEY\nNAME KEY",
    "alias of an authority": "@cert-authority db* CA",
}
# For ssh a key that is known with the port may be revoked without it, and who shows a certificate of anybody's is known
# without the port even where another key is known with it. Neither is shown a password here.
STRICTER = {"revoked without the port, known with it", "another authority with the port, another key, too"}


@OPENSSH
@pytest.mark.parametrize("case", WRITTEN)
def test_known_hosts_as_openssh_reads_it(own: Sshd, tmp_path: Path, case: str) -> None:
    ca = certify(own, tmp_path, "-h -n 127.0.0.1,db1 -V -1h:+1h")
    words = {"KEY": public_line(own.host_keys["ed25519"]), "OTHER": public_line(make_key("ed25519")), "CA": ca,
             "RSA": public_line(make_key("rsa")), "NAME": f"[127.0.0.1]:{own.port}", "PORT": str(own.port)}
    text = re.sub("KEY|OTHER|CA|RSA|NAME|PORT", lambda found: words[found[0]], WRITTEN[case]) + "\n"
    text = re.sub(r"HASH:(\S+)", lambda found: paramiko.HostKeys.hash_host(found[1]), text)
    (known := tmp_path / "known_hosts").write_bytes(text.encode())
    alias = {"host_key_alias": "db1"} if case.startswith("alias") else {}
    options = ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={known}", "GlobalKnownHostsFile=none", "BatchMode=yes",
               "IdentityAgent=none", *(f"HostKeyAlias={name}" for name in alias.values())]
    command = ["ssh", "-F", "none", "-i", own.user_key(), "-p", str(own.port), *(f"-o{option}" for option in options)]
    with settings_digest(own, f"HostCertificate {own.folder}/host-cert.pub" if "authority" in case else "UseDNS no"):
        theirs = subprocess.run([*command, f"{own.username}@127.0.0.1", "echo hello"], capture_output=True, timeout=60)
        watched = target(own, host_key="strict", key_file=own.user_key(), **alias)
        answer = poll(watched, connect(watched, known))
        learned = target(own, key_file=own.user_key(), **alias)
        first = poll(learned, connect(learned, known))
    assert answer.cause == ("" if theirs.stdout == b"hello\n" and case not in STRICTER else "host_key"), theirs.stderr
    assert (theirs.stdout == b"hello\n") or case not in STRICTER
    assert first.cause == "" or answer.cause, "what is known to be the host's is no less so where keys are learned"


@OPENSSH
@pytest.mark.parametrize("mode", ["strict", "learn"])
@pytest.mark.parametrize("part", ["nothing", "another host"])
def test_known_hosts_that_is_being_written(own: Sshd, tmp_path: Path, mode: str, part: str) -> None:
    """`ssh-keyscan … > known_hosts` empties it, then writes host after host: neither is the host unknown, nor is any
    key learned."""
    known, begun = tmp_path / "known_hosts", b""
    if part == "another host":
        begun = f"a.example.com {public_line(make_key('ed25519'))}\n".encode()
    known.write_text(own.known_hosts(), encoding="ascii")
    watched = target(own, host_key=mode if mode == "strict" else None, **good_login(own))
    connection = connect(watched, known)
    for is_old in (False, True):
        known.write_bytes(begun)
        os.utime(known, (0, 0) if is_old else None)
        if not is_old:
            known.write_text(own.known_hosts(), encoding="ascii")
            assert poll(watched, connection).cause == ""
            known.write_bytes(begun)
        answer = poll(watched, connection)
        assert (answer.cause, answer.host_key) == (
            ("", None) if not is_old else ("host_key", None) if mode == "strict" else ("", identities(own)["ed25519"]))


@OPENSSH
def test_a_host_that_was_certified_once_is_known_by_its_key(own: Sshd, tmp_path: Path) -> None:
    """Else whoever shows a key that nobody certified would be the first, and be given the password."""
    known = tmp_path / "known_hosts"
    known.write_text(f"@cert-authority [127.0.0.*]:* {certify(own, tmp_path, '-h -n 127.0.0.1 -V -1h:+1h')}\n",
                     encoding="ascii")
    with settings_digest(own, f"HostCertificate {own.folder}/host-cert.pub"):
        watched = target(own, **good_login(own))
        first = poll(watched, connect(watched, known))
    assert first.cause == "" and first.host_key == identities(own)["ed25519"]
    with ParamikoSshd() as other:
        login = target(other, password=other.password, trusted=first.host_key)
        answer = poll(login, connect(login, known))
        assert answer.cause == "host_key", answer
        assert " for " not in other.log(), "nobody tried to log in"


@OPENSSH
@pytest.mark.parametrize(("how", "more", "cause"), CERTIFICATES.values(), ids=CERTIFICATES)
def test_certified_host_keys(own: Sshd, tmp_path: Path, how: str, more: str, cause: str) -> None:
    key, kind = public_line(own.host_keys["ed25519"]), "rsa" if more == "rsa" else "ecdsa"
    authority, known = certify(own, tmp_path, how, kind), tmp_path / "known_hosts"
    trusted = public_line(make_key("ecdsa")) if more == "another" else authority
    rest = re.sub("another|rsa", "", more).format(authority=authority, key=key, plain=own.known_hosts())
    known.write_text(f"@cert-authority [127.0.0.*]:* {trusted}\n{rest}\n", encoding="ascii")
    with settings_digest(own, f"HostCertificate {own.folder}/host-cert.pub"):
        watched = target(own, host_key="strict", **good_login(own))
        answer = poll(watched, connect(watched, known))
    assert (answer.cause, answer.host_key) == (cause, None), answer


def test_patterns_of_a_certificate_are_not_kept() -> None:
    """Whoever answers can sign one, with other patterns each time."""
    authority, key = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    patterns = [b"x" + b"?a" * 400, *(b"%d.*.example.com" % number for number in range(100)), b"*.example.com"]
    made = (serialization.SSHCertificateBuilder().public_key(key.public_key()).serial(1).key_id(b"x")
            .type(serialization.SSHCertificateType.HOST).valid_principals(patterns).valid_after(0)
            .valid_before(2**63).sign(authority))  # fmt: skip
    kept: Any = fnmatch._compile_pattern  # type: ignore[attr-defined]
    before = kept.cache_info().currsize
    blob = base64.b64decode(made.public_bytes().split()[1])
    assert healthchecker.certifier(blob, "db1.Example.com") is not None
    assert healthchecker.certifier(blob, "example.com") is None
    assert kept.cache_info().currsize == before


def test_what_the_client_offers() -> None:
    """On the wire: nothing weak, and strict key exchange (against prefix truncation)."""
    heard: list[bytes] = []

    def listen(connection: socket.socket, closing: threading.Event) -> None:
        connection.sendall(hostile.BANNER)
        with connection.makefile("rb") as stream:
            stream.readline()
            size = int.from_bytes(stream.read(4), "big")
            heard.append(stream.read(size)[18:])  # after the padding's length, the message's number and the cookie

    with RawServer(listen) as server:
        poll(target(server, timeout=AMPLE))
    message = paramiko.Message(heard[0])
    lists = [message.get_list() for _ in range(6)]
    offered = {name for names in lists for name in names}
    assert {"aes256-ctr", "ssh-ed25519", "hmac-sha2-256"} <= offered
    assert "kex-strict-c-v00@openssh.com" in offered
    weak = re.compile(r"cbc|3des|arcfour|md5|sha1|sha1-96|dss|ssh-rsa$|none")
    assert not [name for name in offered if weak.search(name)]


# === This machine, and none ==================================================


def local(**settings: Any) -> Target:
    return resource_of({"name": "host", "hostname": "localhost", "platform": "local", **settings})


def run_local(script: str, seconds: float = 1.0) -> bytes:
    """What a script of the test's own printed."""
    watched = local()
    output = Output("\n@done\n")
    LocalConnection(watched, LoginGuard(), access()).run(script, output, Deadline(seconds))
    return bytes(output.printed)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Stands in the environment of every process started from here on; those that are left end with the test."""
    token = secrets.token_hex(8)
    monkeypatch.setenv("HEALTHCHECKER_TEST", token)
    yield f"HEALTHCHECKER_TEST={token}"
    send(marked(f"HEALTHCHECKER_TEST={token}"), "SIGKILL")


@POSIX
def test_local() -> None:
    with no_leaks():
        answer = poll(local(checks=[{"name": "one", "command": "echo fine"}]))
    assert healthy(answer)
    assert answer.sample
    assert answer.sample.checks["one"].text.strip() == "fine"
    assert "memory_percent" in answer.sample.metrics or sys.platform != "linux"


@POSIX
@pytest.mark.parametrize("stream", ["yes", "yes >&2", "yes & yes >&2"])
def test_local_endless_output(stream: str, mark: str) -> None:
    with no_leaks(), pytest.raises(ProbeError, match="1048576 bytes") as refused:
        run_local(stream, 30)
    assert refused.value.cause == "protocol"
    wait_for(lambda: not marked(mark))


ENDLESS_SCRIPTS = [
    "echo so far; sleep 60",
    "echo so far; exec sleep 60",
    "trap '' TERM HUP INT; echo so far; while :; do sleep 60; done",
    "echo so far; sleep 60 & sleep 60 & wait",
    "echo so far; (sleep 60 | cat) & exit 0",
    "echo so far; while :; do sleep 0.1; echo tick; done",
    "echo so far; exec >&- 2>&-; sleep 60",
]


@POSIX
def test_local_deadline(mark: str) -> None:
    def one(script: str, seconds: float = 1.0) -> float:
        begin = time.monotonic()
        try:
            printed = run_local(script, seconds)
        except ProbeError as error:  # the deadline was seen between two reads
            assert error.cause == "timeout", script
            printed = b"so far\n"
        late = time.monotonic() - begin - seconds
        if not printed and seconds < AMPLE:  # a busy machine needs longer to come to the first word
            return one(script, 4 * seconds)
        assert printed.startswith(b"so far\n"), script
        return late

    with no_leaks(), ThreadPoolExecutor(len(ENDLESS_SCRIPTS)) as pool:
        assert max(pool.map(one, ENDLESS_SCRIPTS)) <= GRACE
    wait_for(lambda: not marked(mark))


@POSIX
@pytest.mark.parametrize("timeout", [1, 30])
def test_local_check_beyond_the_deadline(timeout: float, mark: str) -> None:
    """A check's own processes end with the poll, and not at some later time of their own."""
    slow = [{"name": f"slow {number}", "command": "sleep 60 & sleep 60; :", "timeout": timeout} for number in range(40)]
    for seconds in (2, 8, 32):  # a busy machine needs longer to come to the checks
        with no_leaks():
            answer = poll(local(checks=slow, timeout=seconds))
        if "slow" in answer.reason:
            break
    assert (answer.cause, "slow" in answer.reason) == ("timeout", True)
    wait_for(lambda: not marked(mark))


@POSIX
def test_local_child_that_holds_the_output(mark: str) -> None:
    begin = time.monotonic()
    with no_leaks():
        assert run_local("sleep 60 & printf '\\n@done\\n'", 5) == b"\n@done\n"
        answer = poll(local(checks=[{"name": "daemon", "command": "sleep 60 & echo started"}]))
    assert time.monotonic() - begin < 30
    assert healthy(answer)
    wait_for(lambda: not marked(mark))


@POSIX
def test_local_large_script(mark: str) -> None:
    """A pipe holds 64 KiB: a shell that does not read must not hold up the poll."""
    begin = time.monotonic()
    with no_leaks(), contextlib.suppress(ProbeError):
        run_local("sleep 60\n" + "# nothing\n" * 100_000)
    assert time.monotonic() - begin <= 1 + GRACE
    wait_for(lambda: not marked(mark))


@POSIX
def test_local_many_checks() -> None:
    """All of a large script is run: 100 KiB of it."""
    checks = [{"name": f"check {number}", "command": f"echo {number} # {'x' * 2000}"} for number in range(50)]
    answer = poll(local(checks=checks, timeout=20))
    assert healthy(answer)
    assert answer.sample
    assert len(answer.sample.checks) == 50


def test_what_nobody_asked_for_is_not_shown() -> None:
    def answer(channel: paramiko.Channel, command: str) -> int:
        script = b"".join(iter(lambda: channel.recv(65536), b""))
        mark = "\n@" + re.search(rb"N=([0-9a-f]+)", script)[1].decode()  # type: ignore[index]
        titles = ("platform linux", "hostname", "check a 5", "check b 5")
        said = [f"{mark} begin {title}\nx{mark} end 0 0" for title in titles]
        channel.sendall(f"{''.join(said)}{mark} done\n".encode())
        return 0

    with ParamikoSshd(answer=answer) as server:
        watched = target(server, password=server.password, checks=[{"name": "a", "command": "x"}], timeout=AMPLE)
        answered = poll(watched)
    assert answered.sample and list(answered.sample.checks) == ["a"], answered


@pytest.mark.parametrize("answers", [True, False])
def test_a_password_that_a_host_says_again(answers: bool) -> None:
    """As what a check prints, and as a login shell that is something else does."""
    def answer(channel: paramiko.Channel, command: str) -> int:
        script, said = b"".join(iter(lambda: channel.recv(65536), b"")), f"it was {server.password}!"
        mark = "\n@" + re.search(rb"N=([0-9a-f]+)", script)[1].decode()  # type: ignore[index]
        parts = [f"{mark} begin {title}\n{said}{mark} end 1 0" for title in ("platform linux", "hostname", "check a 5")]
        channel.sendall(f"{''.join(parts)}{mark} done\n".encode() if answers else said.encode())
        return 0

    with ParamikoSshd(answer=answer) as server:
        watched = target(server, password=server.password, checks=[{"name": "a", "command": "x"}], timeout=AMPLE)
        answered = poll(watched)
    assert "it was ***!" in answered.reason
    assert not answered.sample or server.password not in answered.sample.to_json()


@POSIX
def test_many_checks_over_ssh(sshd: Server) -> None:
    checks = [{"name": f"check {number}", "command": f"echo {number} # {'x' * 2000}"} for number in range(50)]
    answer = poll(target(sshd, checks=checks, timeout=20, **good_login(sshd)))
    assert healthy(answer)
    assert answer.sample
    assert len(answer.sample.checks) == 50


@POSIX
@pytest.mark.parametrize("fake", ["", "exit 1", "yes"])
def test_local_without_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: str) -> None:
    """A machine on which nothing can be read is never healthy."""
    if fake:
        (tmp_path / "uname").write_text(f"#!/bin/sh\n{fake}\n", encoding="ascii")
        (tmp_path / "uname").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(healthchecker, "SCRIPT", re.sub("(?m)^PATH=.*$", ":", healthchecker.SCRIPT))
    assert poll(local(timeout=1)).cause in ("protocol", "timeout")


def simulated(**settings: Any) -> Target:
    return resource_of({"name": "host", "hostname": "localhost", "platform": "simulated", **settings})


def test_simulated_starts_healthy() -> None:
    for seed in range(200):
        answer = poll(simulated(seed=seed))
        assert (answer.verdict.state, answer.cause) == ("healthy", "")


def simulations(seeds: range, mean_healthy: float, mean_unhealthy: float) -> list[Callable[[], bool]]:
    """Resources that say whether they are healthy when called."""

    def one(seed: int) -> Callable[[], bool]:
        watched = simulated(seed=seed, mean_healthy=mean_healthy, mean_unhealthy=mean_unhealthy)
        connection = SimulatedConnection(watched, LoginGuard(), access())

        def look() -> bool:
            return connection.sample(Deadline(5)).checks["simulation"].good

        return look

    return [one(seed) for seed in seeds]


def passed(seconds: float) -> None:
    end = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() >= end)


def test_simulated_seed() -> None:
    pairs = [[one for _ in "ab" for one in simulations(range(seed, seed + 1), 0.1, 0.1)] for seed in range(300)]
    strangers = list(zip(*(simulations(range(start, start + 300), 0.1, 0.1) for start in (0, 1000)), strict=True))
    passed(0.5)
    assert sum(one() == other() for one, other in pairs) > 270
    assert 90 < sum(one() == other() for one, other in strangers) < 210


@pytest.mark.parametrize(("mean_healthy", "mean_unhealthy"), [(0.15, 0.05), (0.05, 0.15), (0.1, 0.1)])
def test_simulated_means(mean_healthy: float, mean_unhealthy: float) -> None:
    """After a while, as many are healthy as the two means say."""
    resources = simulations(range(2000), mean_healthy, mean_unhealthy)
    passed(0.3)
    share = sum(one() for one in resources) / len(resources)
    assert abs(share - mean_healthy / (mean_healthy + mean_unhealthy)) < 0.05


def test_simulated_times_are_exponential() -> None:
    begun = [(time.monotonic(), *simulations(range(seed, seed + 1), 0.5, 1000)) for seed in range(2000)]
    passed(0.3)
    found = [(one(), math.exp((begin - time.monotonic()) / 0.5)) for begin, one in begun]
    healthy, expected = (sum(column) / len(found) for column in zip(*found, strict=True))
    assert abs(healthy - expected) < 0.05


def test_simulated_unhealthy_names_its_cause() -> None:
    watched = simulated(seed=1, mean_healthy=0.001, mean_unhealthy=1000)
    connection = connect(watched)
    wait_for(lambda: poll(watched, connection).verdict.state == "unhealthy")
    answer = poll(watched, connection)
    assert (answer.cause, "simulated outage" in answer.reason) == ("check", True)


def test_simulated_tiny_means(tmp_path: Path) -> None:
    """However short the times are, a poll ends."""
    row = "  - {name: fast, platform: simulated, hostname: x, mean_healthy: 0.0000001, mean_unhealthy: 0.0000001}"
    code, output = run_cheaply("--inventory", str(write_inventory(tmp_path, row)), "check", "--probe")
    assert code in (0, 1) and "Traceback" not in output and "fast" in output


# === The whole service =======================================================


@pytest.mark.long
@ACCOUNTS
def test_host_keys_and_credentials_in_the_service(tmp_path: Path) -> None:
    """First use is remembered over a restart, a changed key closes the gate, `trust` opens it while serving."""
    row = "  - {{name: {name}, hostname: {s.address}, port: {s.port}, username: {s.username}, interval: 1, {more}}}\n"
    with Sshd() as server:
        wrong = "not-the-password-" + secrets.token_hex(4)
        rows = row.format(name="db1", s=server, more=f"password: {server.password}, rise: 1, timeout: 30, keep: false")
        rows += row.format(name="db2", s=server, more=f"password: {wrong}, critical: false")
        inventory = write_inventory(tmp_path, rows, "  known_hosts: none\n")
        with Service(inventory) as service:
            service.wait_status("/-/readyz", 200)
            service.wait_line("db2: unknown -> unhealthy (auth")
            wait_for(lambda: server.log().count("Accepted password") >= 4)
            assert server.log().count("Failed password") == 1  # an account is not to be locked out
        first = service.output
        old = identities(server)["ed25519"]
        server.rekey()
        new = identities(server)["ed25519"]
        with Service(inventory) as service:
            line = service.wait_line("db1: healthy -> unhealthy (host_key")
            assert old in line
            assert new in line
            service.wait_status("/-/readyz", 503)
            assert no_attempt(server)
            code, said = run_cheaply("--inventory", str(inventory), "trust", "db1")
            assert (code, old in said, new in said, "--key" in said) == (2, True, True, True)  # there is no terminal
            code, _ = run_cheaply("--inventory", str(inventory), "trust", "db1", "--key", old.split()[1])
            assert (code, service.get("/-/readyz").status) == (2, 503)
            code, said = run_cheaply("--inventory", str(inventory), "trust", "db1", "--key", new.split()[1])
            assert (code, old in said, new in said) == (0, True, True)
            service.wait_status("/-/readyz", 200)
            with contextlib.closing(sqlite3.connect(tmp_path / "healthchecker.db")) as database:
                [[text]] = database.execute("SELECT text FROM event WHERE actor = 'command line'").fetchall()
                assert old in text and new in text
        everything = first + service.output + said
        assert server.password not in everything
        assert wrong not in everything
        assert "Failed password" not in server.log()  # the back-off is kept over a restart


@ACCOUNTS
def test_first_use_is_remembered_though_the_first_poll_failed(tmp_path: Path) -> None:
    """The first poll meets a slow host; the key it trusted is still the one that counts after a restart."""
    with Sshd() as server, meeting_place() as folder:
        row = (
            f"  - {{name: db1, hostname: {server.address}, port: {server.port}, username: {server.username},"
            f" password: {server.password}, platform: linux, interval: 1, timeout: 3, rise: 1,"
            f" checks: [{{name: slow, command: 'test -e {folder}/quick || sleep 9', timeout: 9}}]}}"
        )
        inventory = write_inventory(tmp_path, row, "  known_hosts: none\n")
        with Service(inventory) as service:
            service.wait_line("db1: unknown -> unhealthy (timeout")
            (folder / "quick").touch()
            service.wait_status("/-/readyz", 200)
        old = identities(server)["ed25519"]
        server.rekey()
        with Service(inventory) as service:
            wait_for(lambda: "host_key" in service.output or not no_attempt(server))
            assert no_attempt(server)
            assert old in service.wait_line("host_key")


def test_a_deadline_has_seconds_left_or_is_over() -> None:
    """Never 0 or less, which a socket takes for another wish, whatever time passes in the middle of the question."""
    for _ in range(300):
        deadline = Deadline(1e-5)
        with pytest.raises(ProbeError, match="no answer within"):
            while deadline.left() > 0:
                pass
