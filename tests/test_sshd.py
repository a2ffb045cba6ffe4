"""The servers of the tests themselves, asked by plain clients."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import paramiko
import pytest
from conftest import NO_PASSWORD_LOGIN, no_leaks, wait_for
from sshd import OPENSSH, POSIX, ROOT, SSHD, ParamikoSshd, Sshd, SshServer, processes

Server = Sshd | ParamikoSshd
SLEEP = "sleep 1000 & echo $!; wait"
SERVERS = [pytest.param(Sshd, marks=OPENSSH), pytest.param(ParamikoSshd, marks=POSIX)]


@contextlib.contextmanager
def login(server: SshServer, **how: Any) -> Iterator[paramiko.SSHClient]:
    """A plain client, logged in with the account's key or as `how` says."""
    limits = {
        "timeout": 60,
        "banner_timeout": 60,
        "auth_timeout": 60,
        "allow_agent": False,
        "look_for_keys": False,
    }
    how = {"username": server.username, **limits, **(how or {"key_filename": str(server.user_key())})}
    with paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        try:
            client.connect(server.address, server.port, **how)
            yield client
        finally:
            if transport := client.get_transport():
                transport.packetizer.complete_handshake()  # after a failed one, its timer lives on for 15 s


def run(client: paramiko.SSHClient, command: str, stdin: str = "") -> tuple[str, str, int]:
    """What a command gives: standard output, standard error, exit status."""
    writer, out, err = client.exec_command(command, timeout=60)
    writer.write(stdin)
    writer.channel.shutdown_write()
    return out.read().decode(), err.read().decode(), out.channel.recv_exit_status()


def presented(server: SshServer) -> str:
    """The fingerprint of the host key that a client gets to see."""
    with paramiko.Transport((server.address, server.port)) as transport:
        transport.start_client(timeout=60)
        return str(transport.get_remote_server_key().fingerprint)


def heard(server: hostile.RawServer | Server, seconds: float) -> bytes | None:
    """The first bytes a server says, b"" when it leaves instead, None when it is silent for `seconds`."""
    with socket.create_connection((server.address, server.port), seconds) as connection:
        try:
            return connection.recv(1024)
        except TimeoutError:
            return None


@pytest.mark.parametrize("kind", SERVERS)
def test_nothing_is_left_behind(kind: type[Server]) -> None:
    with no_leaks(), kind() as server:
        with login(server) as client:
            assert run(client, "cat; echo oops >&2; exit 3", "hello") == ("hello", "oops\n", 3)
            orphan = int(client.exec_command(SLEEP, timeout=30)[1].readline())
            assert orphan in processes()
        with login(server) as client:
            victim = int(client.exec_command(SLEEP, timeout=30)[1].readline())
            server.kill_sessions()
            wait_for(lambda: victim not in processes())
    wait_for(lambda: orphan not in processes())
    assert not server.folder.exists()
    with pytest.raises(ConnectionRefusedError):
        heard(server, 60)


@pytest.mark.skipif(not ROOT or not SSHD, reason="needs root, and sshd")
def test_the_account_goes_with_the_server() -> None:
    def accounts() -> str:
        return Path("/etc/passwd").read_text(encoding="utf-8") + Path("/etc/group").read_text(
            encoding="utf-8"
        )

    with Sshd() as server:
        assert server.username in accounts()
    assert server.username not in accounts()


@pytest.mark.parametrize("kind", SERVERS)
def test_password(kind: type[Server]) -> None:
    with no_leaks(), kind() as server:
        if not server.password:
            pytest.skip(NO_PASSWORD_LOGIN)
        with login(server, password=server.password):
            assert f"Accepted password for {server.username}" in server.log()
        with pytest.raises(paramiko.AuthenticationException), login(server, password=server.password + "x"):
            pass
        wait_for(lambda: f"Failed password for {server.username}" in server.log())  # sshd answers first


def test_fixtures(sshd: Server, password: str) -> None:
    with login(sshd, password=password):
        sshd.freeze()  # and the fixture thaws it


@pytest.mark.parametrize(
    ("kind", "passphrase"), [("ed25519", ""), ("ed25519", "a phrase"), ("rsa", "a phrase")]
)
def test_user_keys(sshd: Server, kind: str, passphrase: str) -> None:
    key = str(sshd.user_key(kind, passphrase))
    with login(sshd, key_filename=key, passphrase=passphrase or None):
        assert "Accepted publickey for" in sshd.log()
    if passphrase:
        with pytest.raises(paramiko.SSHException), login(sshd, key_filename=key):
            pass


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh here")
@pytest.mark.parametrize("kind", SERVERS)
def test_ssh_command(kind: type[Server]) -> None:
    with kind("rsa", "ed25519") as server:
        known = server.folder / "known_hosts"
        known.write_text(server.known_hosts(), encoding="ascii")
        files = [f"-oUserKnownHostsFile={known}", f"-oIdentityFile={server.user_key()}"]
        command = ["ssh", "-F", "none", "-oBatchMode=yes", "-oStrictHostKeyChecking=yes", *files]
        command += ["-p", str(server.port), f"{server.username}@{server.address}", "cat; exit 4"]
        done = subprocess.run(command, input=b"hello", capture_output=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == (b"hello", 4), done.stderr


@pytest.mark.parametrize("kind", SERVERS)
def test_freeze(kind: type[Server]) -> None:
    with no_leaks(), kind() as server, login(server) as client:
        writer, out, _ = client.exec_command("cat", timeout=30)
        writer.write("before\n")
        assert out.readline() == "before\n"
        server.freeze()
        writer.write("after\n")
        out.channel.settimeout(0.3)
        with pytest.raises(TimeoutError):
            out.readline()
        assert heard(server, 0.3) is None
        server.thaw()
        out.channel.settimeout(5)
        assert out.readline() == "after\n"
        assert (heard(server, 60) or b"").startswith(b"SSH-2.0-")


@pytest.mark.parametrize("kind", SERVERS)
def test_rekey(kind: type[Server]) -> None:
    with kind() as server:
        port, old = server.port, server.fingerprint()
        assert presented(server) == old
        server.rekey()
        assert server.port == port
        assert presented(server) == server.fingerprint() != old


@pytest.mark.parametrize("kind", SERVERS)
def test_ipv6_and_other_host_keys(kind: type[Server]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with kind("ecdsa", "rsa", address="::1") as server:
        assert presented(server) in {server.fingerprint("rsa"), server.fingerprint("ecdsa")}


# === hostile.py ==============================================================


@pytest.mark.parametrize(
    ("behaviour", "start"),
    [
        (hostile.silent, None),
        (hostile.dripping_banner, b"SSH-2.0-"),
        (hostile.banner_then_silence, hostile.BANNER),
        (hostile.garbage, b"\xf5\xb1"),
        (hostile.garbage_after_banner, hostile.BANNER),
        (hostile.endless_lines, b"Welcome\r\nWelcome\r\n"),
        (hostile.close_at_once, b""),
    ],
)
def test_raw(behaviour: hostile.Behaviour, start: bytes | None) -> None:
    with no_leaks(), hostile.RawServer(behaviour) as server:
        first = heard(server, 0.3 if start is None else 60)
        assert first[: len(start)] == start if first and start else first == start


def test_closed_port() -> None:
    with hostile.ClosedPort() as closed, pytest.raises(ConnectionRefusedError):
        socket.create_connection((closed.address, closed.port), 60)


# A file of paramiko's raises when it is collected after the host has cut the connection.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("answer", "output", "status"),
    [
        (hostile.status_only, b"", 0),
        (hostile.no_status, b"some output\n", -1),
        (hostile.huge_text, b"x" * (1 << 19), 1),
        (hostile.exit_signal, b"", -1),
        (hostile.cut, b"some outp", -1),
    ],
)
def test_answers_that_end(answer: Any, output: bytes, status: int) -> None:
    with no_leaks(), ParamikoSshd(answer=answer) as server, login(server, password=server.password) as client:
        _, out, _ = client.exec_command("anything", timeout=60)
        assert out.read() == output
        assert out.channel.recv_exit_status() == status


@pytest.mark.parametrize(
    ("answer", "stream"),
    [
        (hostile.endless_stdout, "recv"),
        (hostile.endless_stderr, "recv_stderr"),
        (hostile.line_per_second, "recv"),
        (hostile.never_ends, "recv"),
    ],
)
def test_answers_without_end(answer: Any, stream: str) -> None:
    with no_leaks(), ParamikoSshd(answer=answer) as server, login(server, password=server.password) as client:
        _, out, _ = client.exec_command("anything", timeout=60)
        assert getattr(out.channel, stream)(4)
        assert not out.channel.exit_status_ready()
        assert not out.channel.eof_received


def test_stalled_login() -> None:
    stalled = pytest.raises(paramiko.AuthenticationException, match="timeout")
    with no_leaks(), hostile.StalledLogin() as server:
        how: dict[str, Any] = {"password": server.password, "auth_timeout": 0.5}
        with stalled, login(server, **how):
            pass


def run_quietly(client: paramiko.SSHClient) -> None:
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        run(client, "anything")


def test_frozen_exec() -> None:
    with no_leaks(), hostile.FrozenExec() as server, login(server, password=server.password) as client:
        asked = threading.Thread(target=run_quietly, args=(client,))
        asked.start()
        asked.join(0.5)
        assert asked.is_alive()
        client.close()
        asked.join(5)
        assert not asked.is_alive()


def test_no_password() -> None:
    with no_leaks(), hostile.NoPassword() as server:
        how = {"password": server.password}
        with pytest.raises(paramiko.BadAuthenticationType) as refused, login(server, **how):
            pass
        assert refused.value.allowed_types == ["keyboard-interactive", "publickey"]


def test_weak_algorithms() -> None:
    strong = {"ciphers": ["aes128-cbc", "aes192-cbc", "aes256-cbc", "3des-cbc"]}
    with no_leaks(), hostile.WeakAlgorithms() as server:
        how: dict[str, Any] = {"password": server.password}
        with login(server, **how):
            assert "Accepted password" in server.log()
        with pytest.raises(paramiko.SSHException), login(server, disabled_algorithms=strong, **how):
            pass
