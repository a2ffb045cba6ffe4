"""Hosts polled over connections that are kept, by SSH and WinRM, while those die: `python tests/soak_sessions.py`.

No resource may become unhealthy that was healthy; meanwhile some turn bad and good by a file that their check reads,
and each turn is seen within two intervals and the timeout. At the end nothing is left: neither threads nor descriptors
here, nor sessions of the sshds. Prints what was done; exit code 1 if something was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import no_leaks, wait_for
from console import Local, local_console
from sshd import Sshd, send
from test_sessions import Proxy
from test_windows_kept import CLEAN
from wsman_server import WSManServer

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
WINDOWS_FAULTS = {
    "shell gone": lambda server: server.shells.clear(),
    "hung up": WSManServer.end_connections,
    "another login": lambda server: server.misbehave.update(Command="once 401"),
    "no answer": lambda server: server.misbehave.update(Receive="once drop"),
    "silent": lambda server: server.misbehave.update(Command="once silent"),
}
FAULTS = ("kill", "stop", "reset", "half_close", "silence", "nothing")


def strike(fault: str, server: Sshd, proxy: Proxy) -> None:
    """One fault, of which the sessions that are open now die."""
    pairs, proxy.open = proxy.open, []
    if fault == "kill":
        send(server._sessions(), "SIGKILL")
    elif fault == "stop":       # for good: what hangs is ended at the end
        send(server._sessions(), "SIGSTOP")
    elif fault == "silence":
        proxy.silent.set()
        threading.Event().wait(1)
        proxy.silent.clear()
    elif fault != "nothing":
        newer, proxy.open = proxy.open, pairs
        getattr(proxy, fault)()
        proxy.open = newer


def rows(options: argparse.Namespace, proxies: list[Proxy], windows: list[WSManServer], folder: Path) -> str:
    """The inventory: as many hosts as are wanted on these servers, and those by WinRM."""
    common = {name: getattr(options, name) for name in ("interval", "timeout", "relogin")}
    return "".join(WINDOWS_ROW.format(number=number, port=server.port, **common)
                   for number, server in enumerate(windows)) + "".join(ROW.format(
        number=number, address=proxy.address, port=proxy.port, username=proxy.username, key=proxy.user_key(),
        path=folder / str(number), **common)
        for number in range(options.hosts) for proxy in [proxies[number % len(proxies)]])


def turn(local: Local, path: Path, options: argparse.Namespace) -> list[str]:
    """One resource turns bad and good; what was wrong."""
    pollers, wrong, pause = local.context.monitor.pollers, list[str](), threading.Event()
    turned, most = f"host{path.name}", 2 * options.interval * 1.1 + options.timeout
    for wanted, change in (("unhealthy", path.touch), ("healthy", path.unlink)):
        change()
        begun_mono = time.monotonic()
        while pollers[turned].standing.state != wanted and time.monotonic() < begun_mono + most:
            pause.wait(0.05)
        if pollers[turned].standing.state != wanted:
            wrong.append(f"{turned} was not seen {wanted} within {most:.0f} s")
        wrong += [f"{name} is {poller.standing.state}: {poller.standing.reason}"
                  for name, poller in pollers.items() if name != turned and poller.standing.state != "healthy"]
    return wrong


def soak(options: argparse.Namespace) -> list[str]:
    """What was wrong."""
    chance, wrong, done = random.Random(options.seed), list[str](), dict.fromkeys((*FAULTS, *WINDOWS_FAULTS), 0)
    with contextlib.ExitStack() as stack:
        folder, shared = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        shared.chmod(0o755)
        servers = [stack.enter_context(Sshd()) for _ in range(4)]
        stack.enter_context(no_leaks())
        windows = [stack.enter_context(WSManServer("http", "ntlm", answer=CLEAN)) for _ in range(4)]
        struck = [0.0] * len(windows)       # when; a second fault before the next poll would be one too many
        proxies = [stack.enter_context(Proxy(server)) for server in servers]
        with local_console(folder, rows(options, proxies, windows, shared), keeps=True) as local:
            pollers, ends_mono = local.context.monitor.pollers, time.monotonic() + options.seconds
            wait_for(lambda: {poller.standing.state for poller in pollers.values()} == {"healthy"}, 120)
            while time.monotonic() < ends_mono and not wrong:
                number, fault = chance.randrange(len(servers)), chance.choice(FAULTS)
                strike(fault, servers[number], proxies[number])
                done[fault] += 1
                if time.monotonic() > struck[other := chance.randrange(len(windows))] + 2 * options.interval:
                    struck[other], worse = time.monotonic(), chance.choice(list(WINDOWS_FAULTS))
                    WINDOWS_FAULTS[worse](windows[other])
                    done[worse] += 1
                found = turn(local, shared / str(chance.randrange(min(10, options.hosts))), options)
                wrong += [f"after {fault} of {number}: {why}" for why in found]
            records = local.context.connections.records.values()
            print(f"{done}; {sum(record.outcomes['accepted'] for record in records)} logins, "
                  f"{sum(record.second_tries for record in records)} second tries")
        wait_for(lambda: not any(server.shells for server in windows))
        for server in servers:
            server.thaw()
            wait_for(lambda: not server._sessions())    # noqa: B023  # used before it changes
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Kept connections that die in every way.")
    parser.add_argument("--seconds", type=float, default=600, help="default: %(default)s")
    parser.add_argument("--hosts", type=int, default=46, help="default: %(default)s")
    parser.add_argument("--interval", type=float, default=15, help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=12, help="default: %(default)s")
    parser.add_argument("--relogin", type=float, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    wrong = soak(parser.parse_args())
    print("\n".join(wrong) or "nothing was wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
