"""Servers on loopback that misbehave as no real sshd can be made to."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable

import paramiko
from paramiko import common
from sshd import Connection, Listener, Login, ParamikoSshd
from typing_extensions import Self  # typing has it from Python 3.11 on

Behaviour = Callable[[socket.socket, threading.Event], None]
BANNER = b"SSH-2.0-OpenSSH_9.2\r\n"


def swallow(connection: socket.socket) -> None:
    """Read until the client leaves."""
    connection.settimeout(None)
    while connection.recv(65536):
        pass


# === Before the handshake: RawServer(silent), RawServer(garbage), ... ========


def silent(connection: socket.socket, closing: threading.Event) -> None:
    """Never says anything."""
    swallow(connection)


def dripping_banner(connection: socket.socket, closing: threading.Event) -> None:
    """Ten bytes a second of a banner without end."""
    connection.sendall(b"SSH-2.0-")
    while not closing.wait(0.1):
        connection.sendall(b"x")


def banner_then_silence(connection: socket.socket, closing: threading.Event) -> None:
    connection.sendall(BANNER)
    swallow(connection)


def garbage(connection: socket.socket, closing: threading.Event) -> None:
    """4 KiB of noise (the same each time), then silence."""
    connection.sendall(random.Random(1).randbytes(4096))
    swallow(connection)


def garbage_after_banner(connection: socket.socket, closing: threading.Event) -> None:
    connection.sendall(BANNER)
    garbage(connection, closing)


def endless_lines(connection: socket.socket, closing: threading.Event) -> None:
    """Lines before the banner are allowed by the protocol; the banner never comes."""
    while not closing.is_set():
        connection.sendall(b"Welcome\r\n" * 100)


def close_at_once(connection: socket.socket, closing: threading.Event) -> None:
    """Leaves without a word."""


class RawServer(Listener):
    """Treats each client with `behaviour`, one of the functions above."""

    def __init__(self, behaviour: Behaviour, address: str = "127.0.0.1") -> None:
        super().__init__(address)
        self.behaviour = behaviour

    def serve(self, connection: Connection) -> None:
        self.behaviour(connection, self.closing)


class ClosedPort:
    """A port that refuses connections: bound, so that nobody else takes it, but not listening."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self._socket.bind((address, 0))
        self.address, self.port = self._socket.getsockname()[:2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


# === Answers to exec: ParamikoSshd(answer=endless_stdout), ... ===============


def endless_stdout(channel: paramiko.Channel, command: str) -> None:
    while True:
        channel.sendall(b"y\n" * 16384)


def endless_stderr(channel: paramiko.Channel, command: str) -> None:
    while True:
        channel.sendall_stderr(b"y\n" * 16384)


def line_per_second(channel: paramiko.Channel, command: str) -> None:
    """One line a second for ever, so that no timeout between two of them ever fires."""
    while True:
        channel.sendall(b"tick\n")
        channel.get_transport().join(1)


def never_ends(channel: paramiko.Channel, command: str) -> None:
    """Some output, and then neither end of file nor an exit status."""
    channel.sendall(b"some output\n")
    channel.get_transport().join()


def status_only(channel: paramiko.Channel, command: str) -> int:
    """An exit status without output."""
    return 0


def no_status(channel: paramiko.Channel, command: str) -> None:
    """Output, and then the channel closes without an exit status."""
    channel.sendall(b"some output\n")


def huge_text(channel: paramiko.Channel, command: str) -> int:
    """Half a MiB in a single line, and a failure."""
    channel.sendall(b"x" * (1 << 19))
    return 1


def exit_signal(channel: paramiko.Channel, command: str) -> None:
    """Killed by a signal, with as long a message as one packet takes."""
    message = paramiko.Message()
    message.add_byte(common.cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("exit-signal")
    message.add_boolean(False)
    message.add_string("KILL")
    message.add_boolean(False)
    message.add_string("x" * 30000)
    message.add_string("")
    channel.get_transport()._send_user_message(message)  # type: ignore[attr-defined]  # no public call sends this


def cut(channel: paramiko.Channel, command: str) -> None:
    """The whole connection goes in the middle of the output."""
    channel.sendall(b"some outp")
    channel.get_transport().close()


# === Before exec =============================================================


class _StalledLogin(Login):
    def check_auth_password(self, username: str, password: str) -> int:
        swallow(self.connection)
        return common.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return self.check_auth_password(username, "")


class StalledLogin(ParamikoSshd):
    """Never answers an attempt to log in."""

    login = _StalledLogin


class _FrozenExec(Login):
    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        swallow(self.connection)
        return False


class FrozenExec(ParamikoSshd):
    """Lets the client in and opens the channel, then never answers exec."""

    login = _FrozenExec


class _NoPassword(Login):
    def get_allowed_auths(self, username: str) -> str:
        return "keyboard-interactive,publickey"

    def check_auth_password(self, username: str, password: str) -> int:
        return self._judge("password", username, False)


class NoPassword(ParamikoSshd):
    """Offers keyboard-interactive and public keys only."""

    login = _NoPassword


class WeakAlgorithms(ParamikoSshd):
    """Offers only CBC ciphers and HMAC-SHA1 or -MD5."""

    def prepare(self, transport: paramiko.Transport) -> None:
        options = transport.get_security_options()
        options.ciphers = ["aes128-cbc", "3des-cbc"]
        options.digests = ["hmac-sha1", "hmac-md5"]
