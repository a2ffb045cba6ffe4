"""SSH servers on loopback for the tests: OpenSSH's own sshd, and one of paramiko's where there is none."""

from __future__ import annotations

import base64
import contextlib
import getpass
import hashlib
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import paramiko
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from paramiko import common
from rights import ROOT
from typing_extensions import Self  # typing has it from Python 3.11 on

T = TypeVar("T")
PrivateKey = ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
# Serves one exec request; gives the exit status to send, or None to close the channel without one.
Answer = Callable[[paramiko.Channel, str], "int | None"]

SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])
SSHD = shutil.which("sshd", path=SYSTEM_PATH) if sys.platform != "win32" else None
OPENSSH = pytest.mark.skipif(not SSHD, reason="no sshd here")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="the commands are for /bin/sh")
MARK = "HEALTHCHECKER_SSHD"  # in the environment of every command, so that orphans are found too
CONFIG = """\
Port {port}
ListenAddress {address}
AllowUsers {username}
AuthorizedKeysFile {folder}/authorized_keys
SetEnv {mark}={folder}
StrictModes no
UsePAM no
PasswordAuthentication yes
KbdInteractiveAuthentication no
PermitRootLogin yes
UseDNS no
PidFile none
LogLevel VERBOSE
LoginGraceTime 0
MaxStartups 1000
MaxSessions 1000
PrintMotd no
PrintLastLog no
"""


def wait_for(condition: Callable[[], T], deadline: float = 60.0) -> T:
    """The first true value of `condition()`; AssertionError after `deadline` seconds.

    What lasts is asked for less often: to ask takes a processor that what is waited for needs."""
    end, pause = time.monotonic() + deadline, 0.005
    while not (value := condition()):
        assert time.monotonic() < end, f"still not so after {deadline} s"
        threading.Event().wait(pause)
        pause = min(0.1, pause * 1.1)
    return value


# === Keys ====================================================================


def make_key(kind: str) -> PrivateKey:
    """A new private key: ed25519, rsa or ecdsa."""
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())


def public_line(key: PrivateKey) -> str:
    """`ssh-ed25519 AAAA...`, as in authorized_keys and known_hosts."""
    encoding, layout = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(encoding, layout).decode("ascii")


def write_private(path: Path, key: PrivateKey, passphrase: str = "") -> None:
    """Write `key` in OpenSSH's format, readable by its owner only."""
    seal: Any = serialization.NoEncryption()
    if passphrase:
        seal = serialization.BestAvailableEncryption(passphrase.encode())
    path.touch(0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, seal))


# === What both servers share =================================================


def certified_key(folder: Path, server: Sshd) -> Callable[[str, str], None]:
    """A `key` in the folder, and what certifies it: with an identity, for a time. The authority is one of those in the
    server's `authorities` (TrustedUserCAKeys)."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "authority"], check=True)
    shutil.copy(folder / "authority.pub", server.folder / "authorities")
    write_private(folder / "key", made := make_key("ed25519"))
    (folder / "key.pub").write_text(public_line(made) + "\n", encoding="ascii")

    def certify(identity: str, validity: str) -> None:
        how = f"-q -s authority -I {identity} -n {server.username} -V {validity} key.pub"
        subprocess.run(["ssh-keygen", *how.split()], cwd=folder, check=True)
        os.utime(folder / "key-cert.pub", ns=(0, time.monotonic_ns()))

    return certify


class SshServer:
    """A running server: its address, its keys and one account; `password` is empty where none can work."""

    address: str
    port: int
    username: str
    password: str

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="healthchecker-sshd-"))
        self.folder.chmod(0o711)  # the account reads its authorized_keys with its own rights
        self._authorized = self.folder / "authorized_keys"
        self._authorized.touch(0o644)
        self._user_keys: dict[tuple[str, str], Path] = {}
        self._make_host_keys(kinds)

    def _make_host_keys(self, kinds: tuple[str, ...]) -> None:
        self.host_keys = {kind: make_key(kind) for kind in kinds}
        for kind, key in self.host_keys.items():
            write_private(self.folder / f"host_{kind}", key)

    def fingerprint(self, kind: str = "ed25519") -> str:
        """`SHA256:...` of a host key, as ssh-keygen -l shows it."""
        blob = base64.b64decode(public_line(self.host_keys[kind]).split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode("ascii").rstrip("=")

    def known_hosts(self, kind: str = "ed25519") -> str:
        """The line of a known_hosts file for this server."""
        return f"[{self.address}]:{self.port} {public_line(self.host_keys[kind])}\n"

    def user_key(self, kind: str = "ed25519", passphrase: str = "") -> Path:
        """The file of a private key that may log in; the same one for the same arguments."""
        if (kind, passphrase) not in self._user_keys:
            key = make_key(kind)
            path = self.folder / f"user_{kind}_{len(self._user_keys)}"
            write_private(path, key, passphrase)
            with self._authorized.open("a", encoding="ascii", newline="\n") as authorized:
                authorized.write(public_line(key) + "\n")
            self._user_keys[kind, passphrase] = path
        return self._user_keys[kind, passphrase]

    def log(self) -> str:
        """All that the server has logged, such as `Failed password for ...`."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")


# === OpenSSH =================================================================


def processes() -> dict[int, tuple[int, str]]:
    """The living processes of this machine: id -> (parent's id, state, where T is stopped)."""
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, check=True, timeout=60)
        rows = [line.split() for line in listing.stdout.decode("ascii").splitlines()]
    else:
        rows = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                rows.append([path.parent.name, fields[1], fields[0]])
    return {int(pid): (int(parent), state[0]) for pid, parent, state in rows if state[0] != "Z"}


def marked(mark: str) -> set[int]:
    """The processes with `mark` in their environment (Linux), however they came to be."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return found


def send(pids: set[int], name: str) -> None:
    """Send the signal called `name` to each process that still lives; none of them sees the end of another."""
    for number in [signal.SIGSTOP, signal.SIGKILL] if name == "SIGKILL" else [signal.Signals[name]]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def throwaway_account(home: Path) -> Iterator[tuple[str, str]]:
    """A system user with a password, removed at the end: without PAM, sshd knows no other passwords."""
    name, password = f"hctest-{secrets.token_hex(4)}", secrets.token_urlsafe(12)
    useradd = ["useradd", "--system", "--no-create-home", "--home-dir", str(home), "--shell", "/bin/sh", name]
    environ = {**os.environ, "PATH": SYSTEM_PATH}
    options: dict[str, Any] = {"env": environ, "check": True, "capture_output": True, "timeout": 60}
    subprocess.run(useradd, **options)
    try:
        chpasswd, line = ["chpasswd", "-c", "SHA512"], f"{name}:{password}\n".encode()
        subprocess.run(chpasswd, input=line, **options)
        yield name, password
    finally:
        subprocess.run(["userdel", "--force", name], **options)


class Sshd(SshServer):
    """OpenSSH's sshd as the current user. As root it has a throw-away account with password and keys;
    otherwise one logs in as oneself, by key only. `Sshd("rsa", "ecdsa", address="::1")` is possible too."""

    def __init__(self, *kinds: str, address: str = "127.0.0.1") -> None:
        super().__init__(kinds or ("ed25519",))
        self.address, self.username, self.password = address, getpass.getuser(), ""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, self.folder)
            if ROOT:
                Path("/run/sshd").mkdir(0o755, exist_ok=True)  # stays: another sshd may be using it
            if ROOT and shutil.which("useradd", path=SYSTEM_PATH):
                self.username, self.password = cleanup.enter_context(throwaway_account(self.folder))
            cleanup.callback(self.kill)
            for _ in range(20):
                # Below the ranges that systems draw from for port 0, so that rekey() finds it free again.
                self.port = random.randint(20000, 32000)
                if self._start():
                    break
            else:
                raise RuntimeError(self.log())
            self.stop = cleanup.pop_all().close
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> bool:
        """Start the listener; false when it ended at once (the port is taken)."""
        settings = {"port": self.port, "address": self.address, "username": self.username, "mark": MARK}
        config = CONFIG.format(**settings, folder=self.folder)
        config += "".join(f"HostKey {self.folder}/host_{kind}\n" for kind in self.host_keys)
        if _version() >= (9, 8):
            config += "PerSourcePenalties no\n"
        (self.folder / "config").write_text(config, encoding="ascii")
        command = [str(SSHD), "-D", "-e", "-f", str(self.folder / "config")]
        with (self.folder / "log").open("wb") as log:
            self._listener = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(lambda: "Server listening" in self.log() or self._listener.poll() is not None)
        return self._listener.poll() is None

    def _sessions(self) -> set[int]:
        """The processes below the listener, and commands whose session has ended."""
        found = marked(f"{MARK}={self.folder}")
        parents, below = processes(), {self._listener.pid}
        while below:
            below = {pid for pid, (parent, _) in parents.items() if parent in below}
            found |= below
        return found & parents.keys()

    def rekey(self) -> None:
        """New host keys and an empty log, on the same port; open sessions end."""
        self.kill()
        self._make_host_keys(tuple(self.host_keys))
        self.revive()

    def revive(self) -> None:
        """After a kill: the same host again, with an empty log."""
        wait_for(self._start)

    def freeze(self) -> None:
        """Stop the listener and all sessions: from here on nothing is answered."""

        def frozen() -> bool:
            states = processes()
            ours = {self._listener.pid} | self._sessions()
            running = {pid for pid in ours & states.keys() if states[pid][1] != "T"}
            send(running, "SIGSTOP")
            return not running

        wait_for(frozen)

    def thaw(self) -> None:
        """Undo freeze(); harmless without it."""
        send({self._listener.pid} | self._sessions(), "SIGCONT")

    def kill_sessions(self) -> None:
        """kill -9 for every session and its commands; the listener stays."""

        def killed() -> bool:
            sessions = self._sessions()
            for pid in sorted(sessions):  # parents first: a shell whose command was killed would go on
                send({pid}, "SIGKILL")
            return not sessions

        wait_for(killed)

    def kill(self) -> None:
        """kill -9 for the listener and all sessions."""
        self.thaw()
        self.kill_sessions()  # while the listener runs and so collects them
        send({self._listener.pid}, "SIGSTOP")
        self.kill_sessions()  # those that it took on meanwhile
        self._listener.kill()
        self._listener.wait()


def _version() -> tuple[int, ...]:
    """OpenSSH's version; sshd has no option for it that old ones know, but its usage tells."""
    usage = subprocess.run([str(SSHD), "-?"], capture_output=True, check=False, timeout=60).stderr
    found = re.search(rb"OpenSSH_(\d+)\.(\d+)", usage)
    return tuple(map(int, found.groups())) if found else (0,)


# === In this process =========================================================


class Connection(socket.socket):
    """An accepted connection that stands still while its server is frozen."""

    running: threading.Event
    answers: list[threading.Thread]  # started on the next read: by then the reply to exec has been sent

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        for answer in self.answers:
            if answer.ident is None:
                answer.start()
        self.running.wait()
        received = super().recv(size, flags)
        self.running.wait()
        return received

    def send(self, content: Any, flags: int = 0, /) -> int:
        self.running.wait()
        return super().send(content, flags)


class Listener:
    """A TCP server on loopback; `serve(connection)` runs in a thread of its own for each client."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listening = socket.create_server((address, 0), family=family)
        self.address, self.port = self._listening.getsockname()[:2]
        self.closing, self._running = threading.Event(), threading.Event()
        self._running.set()
        self._clients: dict[threading.Thread, Connection] = {}
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def serve(self, connection: Connection) -> None:
        """Speak with one client until it leaves."""
        raise NotImplementedError

    def _accept(self) -> None:
        while not self.closing.is_set():
            connection = Connection(fileno=self._listening.accept()[0].detach())
            connection.running, connection.answers = self._running, []
            self._running.wait()
            thread = threading.Thread(target=self._attend, args=(connection,), daemon=True)
            self._clients[thread] = connection
            thread.start()

    def _attend(self, connection: Connection) -> None:
        try:
            with connection, contextlib.suppress(OSError, EOFError):
                self.serve(connection)
        finally:
            del self._clients[threading.current_thread()]

    def freeze(self) -> None:
        """From here on nothing is answered, though connections are taken."""
        self._running.clear()

    def thaw(self) -> None:
        """Undo freeze(); harmless without it."""
        self._running.set()

    def kill_sessions(self) -> None:
        """Cut every connection (a frozen server thaws by it); others may come meanwhile, one after the other."""
        cut = dict(self._clients)
        for connection in cut.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.thaw()
        wait_for(lambda: not cut.keys() & self._clients.keys())

    def stop(self) -> None:
        """Cut every connection and close the port; returns when all threads have ended."""
        self.closing.set()
        self.thaw()

        def ended() -> bool:
            with contextlib.suppress(OSError):  # a busy machine may reset it
                socket.create_connection((self.address, self.port), 30).close()  # wakes accept() on every system
            self._thread.join(1)
            return not self._thread.is_alive()

        wait_for(ended)
        self._listening.close()
        self.kill_sessions()

    def revive(self) -> None:
        """After that: the same port again."""
        self.closing.clear()
        self._listening = socket.create_server((self.address, self.port), family=self._listening.family)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()


def run_shell(channel: paramiko.Channel, command: str) -> int | None:
    """Run `command` by the system's shell with its three streams on the channel, until either side ends."""
    pipe = subprocess.PIPE
    options: dict[str, Any] = {"shell": True, "bufsize": 0, "start_new_session": True}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, **options) as process:
        assert process.stdin and process.stdout and process.stderr
        stdin = threading.Thread(
            target=_pump, args=(channel.recv, process.stdin.write, process.stdin), daemon=True
        )
        out = threading.Thread(target=_pump, args=(process.stdout.read, channel.sendall), daemon=True)
        err = threading.Thread(target=_pump, args=(process.stderr.read, channel.sendall_stderr), daemon=True)
        for thread in (stdin, out, err):
            thread.start()
        wait_for(
            lambda: channel.closed or not (process.poll() is None or out.is_alive() or err.is_alive()), 300
        )
        if sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        out.join()
        err.join()
        status = process.wait()
        return None if status < 0 else status  # below 0: ended by a signal


def _pump(
    read: Callable[[int], bytes], write: Callable[[bytes], object], then: IO[bytes] | None = None
) -> None:
    # Either end was closed meanwhile; of a connection that the client has reset, paramiko says EOFError.
    with contextlib.suppress(OSError, ValueError, EOFError):
        while chunk := read(32768):
            write(chunk)
    if then:
        then.close()


class Login(paramiko.ServerInterface):
    """Who may log in to a ParamikoSshd, and what becomes of an exec request."""

    def __init__(self, server: ParamikoSshd, connection: Connection) -> None:
        self.server, self.connection = server, connection

    def get_allowed_auths(self, username: str) -> str:
        return "password,publickey"

    def _judge(self, method: str, username: str, good: bool) -> int:
        good = good and username == self.server.username
        with (self.server.folder / "log").open("a", encoding="utf-8") as log:
            log.write(f"{'Accepted' if good else 'Failed'} {method} for {username}\n")
        return common.AUTH_SUCCESSFUL if good else common.AUTH_FAILED

    def check_auth_password(self, username: str, password: str) -> int:
        return self._judge("password", username, password == self.server.password)

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        authorized = (self.server.folder / "authorized_keys").read_text(encoding="ascii").splitlines()
        return self._judge("publickey", username, f"{key.get_name()} {key.get_base64()}" in authorized)

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return common.OPEN_SUCCEEDED if kind == "session" else common.OPEN_FAILED_UNKNOWN_CHANNEL_TYPE

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        arguments = (channel, command.decode("utf-8", "replace"))
        self.connection.answers.append(threading.Thread(target=self._answer, args=arguments, daemon=True))
        return True

    def _answer(self, channel: paramiko.Channel, command: str) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException), channel:
            status = self.server.answer(channel, command)
            if status is not None:
                channel.send_exit_status(status)


class ParamikoSshd(Listener, SshServer):
    """The same interface without OpenSSH, on Windows too; `answer` serves exec requests."""

    login: type[Login] = Login

    def __init__(self, *kinds: str, address: str = "127.0.0.1", answer: Answer = run_shell) -> None:
        SshServer.__init__(self, kinds or ("ed25519",))
        Listener.__init__(self, address)
        self.username, self.password, self.answer = "monitor", secrets.token_urlsafe(12), answer
        (self.folder / "log").touch()

    def serve(self, connection: Connection) -> None:
        transport = paramiko.Transport(connection)
        for kind in self.host_keys:
            transport.add_server_key(paramiko.PKey.from_path(self.folder / f"host_{kind}"))
        self.prepare(transport)
        transport.start_server(event=threading.Event(), server=self.login(self, connection))
        transport.join()
        transport.packetizer.complete_handshake()  # after a failed one, its timer lived on for 15 s
        for answer in connection.answers:
            if answer.ident is not None:  # cut before the next read, it was never begun
                answer.join()

    def prepare(self, transport: paramiko.Transport) -> None:
        """Change what is offered to the client."""

    def rekey(self) -> None:
        """New host keys and an empty log, on the same port; open sessions end."""
        self.kill_sessions()
        self._make_host_keys(tuple(self.host_keys))
        self.kill_sessions()  # those that came meanwhile
        (self.folder / "log").write_text("", encoding="utf-8")

    def kill(self) -> None:
        """End every session and close the port."""
        super().stop()

    def stop(self) -> None:
        """And remove the keys."""
        super().stop()
        shutil.rmtree(self.folder)


def open_sshd(*kinds: str, address: str = "127.0.0.1") -> Sshd | ParamikoSshd:
    """OpenSSH's sshd where there is one, else paramiko's."""
    return Sshd(*kinds, address=address) if SSHD else ParamikoSshd(*kinds, address=address)
