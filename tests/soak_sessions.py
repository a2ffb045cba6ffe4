"""Hosts polled over connections that are kept, by SSH and WinRM, while those die: a part of tests/soak.py.

No resource may become unhealthy that was healthy; meanwhile some turn bad and good by a file that their check reads,
or a host comes back with other keys for a while, and each turn is seen within two intervals and the timeout. One host
asks each second who is still there, one takes one session at a time, and at one others have all shells but one. At the
end nothing is left: neither threads nor descriptors here, nor sessions of the sshds, nor shells. And a shell that is
polled again and again may not grow.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
from conftest import no_leaks, wait_for
from console import Local, local_console
from pwsh import Engine, EngineShell, open_engine
from sshd import Sshd, send
from test_sessions import Proxy
from test_transport import settings_digest
from test_windows_kept import CLEAN, Kept, shells_of_others
from wsman_server import SHELL_LIMIT, WSManServer

ROW = """  - {{name: host{number}, hostname: {address}, port: {port}, username: {username}, key_file: {key},
     platform: linux, interval: {interval}, timeout: {timeout}, retry_interval: {interval}, relogin: {relogin},
     fall: 1, rise: 1,
     checks: [{{name: file, command: "test ! -e {path}"}}]}}
"""
WINDOWS_ROW = """  - {{name: windows{number}, hostname: 127.0.0.1, port: {port}, platform: windows,
     username: monitor, password: correct horse, tls: false, auth: ntlm,
     interval: {interval}, timeout: {timeout}, retry_interval: {interval},
     relogin: {relogin}, fall: 1, rise: 1}}
"""
# sshd's settings, server by server; the rest have none.
SETTINGS = ("ClientAliveInterval 1\nClientAliveCountMax 1", "MaxSessions 1")
FAULTS = ("kill", "stop", "reset", "half_close", "silent", "nothing")
TURNS = ("file", "file", "file", "host keys")
TURNING = 10  # hosts that turn bad and good, of those by SSH
GROWN = 20e6  # bytes that a shell may grow
THREE = ("$true", "(Get-Service Eventlog).Status -eq 'Running'", "(Get-ChildItem C:\\windows).Count -gt 0")


@dataclass(frozen=True)
class Plan:
    """How many hosts for how long; the seconds that a machine may add which does other things as well."""

    seconds: float = 600
    seed: int = 1
    engine: bool = False  # behind the hosts by WinRM
    hosts: int = 46  # by SSH
    servers: int = 4
    windows: int = 4  # by WinRM
    interval: float = 15
    timeout: float = 12
    relogin: float = 60
    busy: float = 0
    asks: bool = False  # for the polls in which a turn is to be seen, which come by themselves otherwise

    @property
    def times(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("interval", "timeout", "relogin")}


# === What happens to connections =============================================


def strike(fault: str, server: Sshd, proxy: Proxy) -> None:
    """One fault, of which the sessions that are open now die."""
    pairs, proxy.open = proxy.open, []
    if fault == "kill":
        send(server._sessions(), "SIGKILL")
    elif fault == "stop":  # for good: what hangs is ended at the end
        send(server._sessions(), "SIGSTOP")
    elif fault != "nothing":
        newer, proxy.open = proxy.open, pairs
        getattr(proxy, fault)()
        proxy.open = newer


def our_shells(server: WSManServer) -> list[str]:
    """Without those of others."""
    return [name for name, shell in list(server.shells.items()) if shell.resource_uri]


def end_shells(server: WSManServer) -> None:
    """As the host itself does."""
    for name in our_shells(server):
        with contextlib.suppress(KeyError):  # whose poll was over just now
            server.shells.pop(name).close()


def kill_shells(server: WSManServer) -> None:
    """Their processes, where they have some."""
    for shell in list(server.shells.values()):
        if isinstance(shell, EngineShell):
            shell.process.kill()


WINDOWS_FAULTS: dict[str, Callable[[WSManServer], None]] = {
    "shell gone": end_shells,
    "killed": kill_shells,
    "hung up": WSManServer.end_connections,
    "another login": lambda server: server.misbehave.update(Command="once 401"),
    "no answer": lambda server: server.misbehave.update(Receive="once drop"),
    "silent": lambda server: server.misbehave.update(Command="once silent"),
}


def in_turn(kinds: list[str], chance: random.Random) -> Iterator[str]:
    """Each of them as often as any other, at random."""
    while True:
        yield from chance.sample(kinds, len(kinds))


# === Hosts ===================================================================


def rows(plan: Plan, proxies: list[Proxy], windows: list[WSManServer], folder: Path) -> str:
    """The inventory: as many hosts as are wanted on these servers, and those by WinRM."""
    by_ssh = (
        ROW.format(number=number, address=proxy.address, port=proxy.port, username=proxy.username,
                   key=proxy.user_key(), path=folder / str(number), **plan.times)
        for number in range(plan.hosts) for proxy in [proxies[number % len(proxies)]]
    )  # fmt: skip
    by_winrm = (WINDOWS_ROW.format(number=number, port=server.port, **plan.times)
                for number, server in enumerate(windows))  # fmt: skip
    return "".join([*by_winrm, *by_ssh])


class Watch:
    """The pollers, and since when each of them is healthy."""

    def __init__(self, local: Local, plan: Plan) -> None:
        self.plan, self.pollers = plan, local.context.monitor.pollers
        for poller in self.pollers.values():  # else it is polled anew each time, and no fault finds anything open
            poller._connection.DEAD_IN_A_ROW = sys.maxsize
        wait_for(lambda: {poller.standing.state for poller in self.pollers.values()} == {"healthy"}, 120)
        self.since = {name: poller.standing.since_at for name, poller in self.pollers.items()}
        self.poll_all()

    def turn(self, path: Path) -> list[str]:
        """One resource turns bad and good; what was wrong."""
        name = f"host{path.name}"
        wrong = self.see([name], path.touch, "unhealthy", "check") + self.see([name], path.unlink, "healthy")
        return wrong + self.fallen()

    def rekey(self, number: int, server: Sshd) -> list[str]:
        """The hosts on a server have other keys for a while, which nobody learns; what was wrong."""
        names = [f"host{host}" for host in range(number, self.plan.hosts, self.plan.servers)]
        kinds = tuple(server.host_keys)
        kept = {kind: (server.folder / f"host_{kind}").read_bytes() for kind in kinds}, server.host_keys
        wrong = self.see(names, server.rekey, "unhealthy", "host_key")

        def restore() -> None:
            server.kill()
            for kind, content in kept[0].items():
                (server.folder / f"host_{kind}").write_bytes(content)
            server.host_keys = kept[1]
            server.revive()

        return wrong + self.see(names, restore, "healthy") + self.fallen()

    def see(self, names: list[str], change: Callable[[], object], wanted: str, cause: str = "") -> list[str]:
        """A change, after which these shall be found so in time; what was wrong."""
        wrong, pause, pollers = list[str](), threading.Event(), [self.pollers[name] for name in names]
        most = 2 * self.plan.interval * 1.1 + self.plan.timeout + self.plan.busy
        change()
        for poller in pollers if self.plan.asks else ():
            poller.poll_now()
        ends_mono = time.monotonic() + most
        while any(poller.standing.state != wanted for poller in pollers) and time.monotonic() < ends_mono:
            pause.wait(0.05)
        for name, poller in zip(names, pollers, strict=True):
            if poller.standing.state != wanted:
                wrong.append(f"{name} was not seen {wanted} within {most:.0f} s: {poller.standing.why}")
            elif cause and poller.standing.cause != cause:
                wrong.append(f"{name}: {poller.standing.why}")
            self.since[name] = poller.standing.since_at
        return wrong

    def poll_all(self) -> list[str]:
        """A poll of each from now on, and none is due then: what is struck next is open and idle. Who falls silent in
        the middle of a poll is late, and that is as it should be. Gives what was wrong."""
        while True:
            for asked in [poller.poll_now() for poller in self.pollers.values()]:
                asked.result(2 * self.plan.timeout + self.plan.busy)
            fallen, now_mono = self.fallen(), time.monotonic()
            if fallen or all(poller._due_mono > now_mono + 1 for poller in self.pollers.values()):
                return fallen

    def fallen(self) -> list[str]:
        """Those that are not healthy any more, or were not meanwhile."""
        return [f"{name} is {poller.standing.state} since {poller.standing.since_at}: {poller.standing.why}"
                for name, poller in self.pollers.items()
                if poller.standing.state != "healthy" or poller.standing.since_at != self.since[name]]  # fmt: skip


def soak(plan: Plan) -> list[str]:
    """What was wrong; prints what was done."""
    chance, wrong = random.Random(plan.seed), list[str]()
    kinds = [kind for kind in WINDOWS_FAULTS if plan.engine or kind != "killed"]
    ways, windows_ways, turns = (in_turn(list(some), chance) for some in (FAULTS, kinds, TURNS))
    done = dict.fromkeys((*FAULTS, *kinds, *TURNS), 0)
    with contextlib.ExitStack() as stack:
        folder, shared = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        shared.chmod(0o755)
        servers = [stack.enter_context(Sshd()) for _ in range(plan.servers)]
        for server, settings in zip(servers, SETTINGS, strict=False):
            stack.enter_context(settings_digest(server, settings))
        stack.enter_context(no_leaks())
        engine = stack.enter_context(open_engine()) if plan.engine else None
        windows = [stack.enter_context(windows_host(engine)) for _ in range(plan.windows)]
        stack.enter_context(shells_of_others(windows[0], SHELL_LIMIT - 1))
        proxies = [stack.enter_context(Proxy(server)) for server in servers]
        with local_console(folder, rows(plan, proxies, windows, shared), keeps=True) as local:
            ends_mono, watch = time.monotonic() + plan.seconds, Watch(local, plan)
            while time.monotonic() < ends_mono and not wrong:
                number, fault, worse, turn = chance.randrange(len(servers)), next(ways), next(windows_ways), next(turns)
                strike(fault, servers[number], proxies[number])
                WINDOWS_FAULTS[worse](chance.choice(windows))
                for name in (fault, worse, turn):
                    done[name] += 1
                file = shared / str(chance.randrange(min(TURNING, plan.hosts)))
                found = watch.turn(file) if turn == "file" else watch.rekey(number, servers[number])
                wrong += [f"after {fault} of {number}, {worse}, {turn}: {why}" for why in found or watch.poll_all()]
            records = local.context.connections.records.values()
            print(f"{done}; {sum(record.outcomes['accepted'] for record in records)} logins, "
                  f"{sum(record.second_tries for record in records)} second tries (seed {plan.seed})")  # fmt: skip
        wait_for(lambda: not any(our_shells(server) for server in windows))
        for server in servers:
            server.thaw()
            wait_for(lambda: not server._sessions())  # noqa: B023  # used before it changes
    return wrong


def windows_host(engine: Engine | None) -> WSManServer:
    if engine:
        return WSManServer("http", "ntlm", open_shell=engine.opener())
    return WSManServer("http", "ntlm", answer=CLEAN)


# === A shell that is polled again and again ==================================


def grow(polls: int) -> list[str]:
    """What was wrong; prints by how much a shell has grown since its first poll."""
    checks = [{"name": str(number), "command": command} for number, command in enumerate(THREE)]
    with open_engine() as engine, WSManServer("http", "ntlm", open_shell=engine.opener()) as server:
        kept = Kept(server, timeout=120, relogin=0, checks=checks, services=["Eventlog"])
        sizes = list[int]()
        for _ in range(polls):
            kept.good()
            (shell,) = server.shells.values()
            assert isinstance(shell, EngineShell)
            sizes.append(psutil.Process(shell.process.pid).memory_info().rss)
        kept.connection.close()
        logins = kept.connection.record.outcomes["accepted"]
        wait_for(lambda: not server.shells)
    grown = sizes[-1] - sizes[0]
    print(f"a shell of {sizes[0] / 1e6:.0f} MB has grown by {grown / 1e6:.1f} MB in {polls} polls")
    return [] if grown <= GROWN and logins == 1 else [f"it has grown too much, or was replaced ({logins} logins)"]
