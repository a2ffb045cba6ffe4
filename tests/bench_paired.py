"""This tree beside another checkout, in the same minute: `python tests/bench_paired.py DIR [--rounds N] [FIGURE ...]`.

Each figure is measured in turn (A B A B ...) with services of both; printed is the ratio of the medians, this tree to
the other one. `DIR` may be an older version (`git worktree add DIR COMMIT`): its healthchecker.py runs under this
Python, with settings that both know. Load comes from wrk and hey.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import psutil
from bench import APP, HEY, SIMULATED, WRK, Rounds, cpu_seconds, in_turn, raise_limit, shown, slowest_percent
from bench_serving import (
    CROWD,
    IDLE,
    REFUSING,
    Loaded,
    crowd_apart,
    full_load,
    idle_connections,
    megabytes,
    status_of,
    workers,
)
from service import PROGRAM, environment
from sshd import SSHD, Sshd, wait_for

ALLOWED = 1.05  # so many times slower, larger or fewer may be noise
OPEN = SIMULATED.format(0)  # an inventory whose gate is open
HOSTS = 8  # resources of the poll over SSH, each polled every second
KNOWS_CONSOLE = "import healthchecker as h; print('console' in h.ServiceSettings.model_fields)"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@dataclass
class Checkout:
    """A folder with a healthchecker.py, and whether that has a listener for its console."""

    folder: Path
    console: bool = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-c", KNOWS_CONSOLE]
        said = subprocess.run(command, cwd=self.folder, env=environment(), capture_output=True, check=True).stdout
        self.console = said.strip() == b"True"

    def settings(self, port: int, count: int, threads: int) -> str:
        console = f"  console: 127.0.0.1:{free_port()}\n" if self.console else ""
        return (
            f"service:\n  listen: 127.0.0.1:{port}\n{console}  workers: {count}\n  threads: {threads}\n"
            "  app: 'oneline:app'\n  known_hosts: known_hosts\nresources:\n"
        )


@dataclass
class Served:
    """A running service: where it listens, and its process."""

    port: int
    pid: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/"


@contextlib.contextmanager
def serving(
    checkout: Checkout, count: int, threads: int, resources: str = OPEN, status: int = 200
) -> Iterator[Served]:
    """The service of a checkout, in front of the one-line application, once that answers with `status`.

    What is asked is its port, not its log: versions say differently where they serve."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log"
        program, path = checkout.folder / "healthchecker.py", folder / "inventory.yaml"
        (folder / "oneline.py").write_text(APP, encoding="utf-8")
        path.write_text(checkout.settings(port, count, threads) + resources, encoding="utf-8")
        command = [sys.executable, str(program), "--inventory", str(path)]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, env=environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
            )
        served = Served(port, process.pid)
        try:
            wait_for(lambda: status_of(served.url) == status or process.poll() is not None, 90)
            if process.poll() is not None:
                raise RuntimeError(f"{checkout.folder}: {log.read_text(encoding='utf-8')}")
            yield served
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):  # whatever is left of its group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# === Figures =================================================================


@dataclass
class Plan:
    """Both checkouts, rounds, whole seconds of one load; what was found is printed as it comes."""

    ours: Checkout
    other: Checkout
    rounds: int
    seconds: int

    def compare(self, figure: str, rounds: Rounds, unit: str, more_is_better: bool = False, digits: int = 0) -> None:
        ratio = median(rounds["ours"]) / median(rounds["other"])
        worse = 1 / ratio if more_is_better else ratio
        measured = f"{shown(rounds['ours'], digits)} to {shown(rounds['other'], digits)} {unit}"
        print(f"| {figure} | {ratio:.2f} | {measured} | {'ok' if worse <= ALLOWED else 'WORSE'} |", flush=True)

    @contextlib.contextmanager
    def both(self, count: int, threads: int, resources: str = OPEN, status: int = 200) -> Iterator[dict[str, Served]]:
        with contextlib.ExitStack() as stack:
            yield {
                name: stack.enter_context(serving(checkout, count, threads, resources, status))
                for name, checkout in (("ours", self.ours), ("other", self.other))
            }

    def in_turn(self, services: dict[str, Served], measure: Callable[[Served], float]) -> Rounds:
        return in_turn(self.rounds, {name: partial(measure, service) for name, service in services.items()})

    def load(self, services: dict[str, Served], figure: str, idle: int = 0, status: str = "2xx") -> Rounds:
        """The requests per second, and their p99."""
        found: dict[int, list[Loaded]] = {service.port: [] for service in services.values()}

        def measure(service: Served) -> float:
            with idle_connections(service.host, service.port, idle):
                found[service.port].append(full_load(service.url, self.seconds, status=status))
            return found[service.port][-1].rate

        rounds = self.in_turn(services, measure)
        self.compare(figure, rounds, "requests/s", more_is_better=True)
        slowest = {name: [one.slowest for one in found[service.port][1:]] for name, service in services.items()}
        self.compare("... p99", slowest, "ms", digits=1)
        return rounds


def gate(plan: Plan) -> None:
    """One worker and the application on its loop: open, at half rate, beside idle connections; its memory first."""
    with plan.both(1, 0) as services:
        rounds = plan.load(services, "open gate, `threads: 0`")
        half = min(median(values) for values in rounds.values()) / 2
        if HEY:
            late = plan.in_turn(services, lambda service: slowest_percent(service.url, 2 * plan.seconds, 16, half))
            plan.compare(f"... p99 at {half:,.0f} requests/s, half of the slower one's", late, "ms", digits=1)
        plan.load(services, f"{IDLE:,} idle keep-alive connections beside 32 busy ones", IDLE)


def pool(plan: Plan) -> None:
    with plan.both(1, 8) as services:
        plan.load(services, "open gate, `threads: 8`")


def refusals(plan: Plan) -> None:
    with plan.both(1, 0, REFUSING, 503) as services:
        plan.load(services, "refusals", status="5xx")


def two_workers(plan: Plan) -> None:
    """Two workers, a crowd, and their memory once both have served."""
    with plan.both(2, 0) as services:
        plan.load(services, "2 workers")
        crowd = plan.in_turn(services, crowd_apart)
        plan.compare(f"{CROWD} keep-alive clients at once: slowest first answer", crowd, "s", digits=2)
        memory = {name: [megabytes(psutil.Process(service.pid))] for name, service in services.items()}
        plan.compare("memory (PSS) of the main process", memory, "MB")
        memory = {name: [max(map(megabytes, workers(service)))] for name, service in services.items()}
        plan.compare("memory (PSS) of a worker", memory, "MB")


def killed(plan: Plan) -> None:
    """From kill -9 of the only worker to the next answer; a new service each time, for a second death takes longer."""

    def measure(checkout: Checkout) -> float:
        with serving(checkout, 1, 0) as service:
            (worker,) = workers(service)
            begin = time.monotonic()
            worker.send_signal(signal.SIGKILL)
            worker.wait(10)
            wait_for(lambda: status_of(service.url) == 200, 60)
            return time.monotonic() - begin

    checkouts = {"ours": plan.ours, "other": plan.other}
    rounds = in_turn(min(plan.rounds, 3), {name: partial(measure, one) for name, one in checkouts.items()})
    plan.compare("a worker killed: until the next one answers", rounds, "s", digits=2)


def ssh(plan: Plan) -> None:
    """CPU of the main process for each command, as the server's log counts them."""
    if not SSHD:
        print("| a poll over SSH | skipped: sshd is not installed | | |")
        return
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(Sshd()) for name in ("ours", "other")}
        services = {
            name: stack.enter_context(serving(checkout, 1, 0, hosts(servers[name])))
            for name, checkout in (("ours", plan.ours), ("other", plan.other))
        }

        def polls(name: str) -> int:
            return servers[name].log().count("Starting session: command")

        def measure(name: str) -> float:
            begin, before = cpu_seconds(services[name].pid), polls(name)
            wait_for(lambda: polls(name) >= before + 3 * HOSTS * plan.seconds, 600)
            return (cpu_seconds(services[name].pid) - begin) / (polls(name) - before) * 1e3

        rounds = in_turn(plan.rounds, {name: partial(measure, name) for name in services})
        plan.compare("a poll over SSH: CPU of the main process", rounds, "ms", digits=1)


def hosts(server: Sshd) -> str:
    host = f"hostname: {server.address}, port: {server.port}, platform: linux, username: {server.username}"
    host += f", key_file: '{server.user_key()}', host_key: '{server.fingerprint()}', interval: 1, timeout: 20"
    return "".join(f"  - {{name: r{number}, {host}}}\n" for number in range(HOSTS))


FIGURES: dict[str, Callable[[Plan], None]] = {
    "gate": gate,
    "pool": pool,
    "refusals": refusals,
    "workers": two_workers,
    "killed": killed,
    "ssh": ssh,
}


def main() -> int:
    """Measures and prints; wrong answers end it."""
    parser = argparse.ArgumentParser(description="Compare this tree with another checkout.")
    parser.add_argument("other", type=Path, metavar="DIR", help="a folder with another healthchecker.py")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)}; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=2, help="of one load; default: %(default)s")
    arguments = parser.parse_intermixed_args()
    if unknown := set(arguments.figures) - FIGURES.keys():
        parser.error(f"no such figure: {', '.join(unknown)}")
    if not WRK:
        parser.error("wrk is not installed")
    raise_limit()
    ours, other = Checkout(PROGRAM.parent), Checkout(arguments.other.resolve())
    plan = Plan(ours, other, arguments.rounds, arguments.seconds)
    print(f"| figure | {ours.folder.name} / {other.folder.name} | medians (lowest to highest round) | |")
    print("|---|---|---|---|")
    for name in arguments.figures or FIGURES:
        FIGURES[name](plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
