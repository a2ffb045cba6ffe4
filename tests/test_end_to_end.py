"""End to end: the real service watches a Linux host, a Windows host and this machine, and a disk fills."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import wait_for
from service import PROGRAM, Program, Service, environment, write_inventory
from sshd import ParamikoSshd, Sshd
from wsman_server import Answer, Script, WSManServer

from healthchecker import VERSION

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the commands of two of the hosts are for /bin/sh")
RECORDED = (Path(__file__).parent / "recorded" / "windows" / "administrator.json").read_text(encoding="utf-8")


class WindowsHost:
    """What the Windows host answers: the recording, with drive D: as full as it is."""

    def __init__(self) -> None:
        self.full = 10  # percent

    def __call__(self, script: Script) -> str:
        answer = json.loads(next(line for line in RECORDED.splitlines() if line.startswith("{")))
        answer["amounts"]["disk_percent D:"] = [self.full << 30, 100 << 30]
        return json.dumps(answer)


@pytest.mark.long
def test_a_full_disk_closes_the_gate_until_it_is_empty(sshd: Sshd | ParamikoSshd, tmp_path: Path) -> None:
    disk = WindowsHost()
    (tmp_path / "known_hosts").write_text(sshd.known_hosts(), encoding="ascii")
    with WSManServer("https", "negotiate", answer=disk) as windows:
        often = "interval: 1, retry_interval: 1, timeout: 10, fall: 1, rise: 1"
        rows = (
            f"  - {{name: linux1, platform: linux, hostname: {sshd.address}, port: {sshd.port},"
            f" username: {sshd.username}, key_file: '{sshd.user_key()}', {often}}}\n"
            f"  - {{name: win1, platform: windows, hostname: 127.0.0.1, port: {windows.port},"
            f" username: monitor, password: correct horse, ca_file: '{windows.ca_file}',"
            f" services: [Spooler], limits: {{disk_percent: 95}}, {often}}}\n"
            f"  - {{name: here, platform: local, {often}}}\n"
        )
        inventory = write_inventory(tmp_path, rows, "  known_hosts: known_hosts\n")
        with Service(inventory) as service:
            service.wait_status("/", 200)
            for name in ("linux1", "win1", "here"):
                service.wait_line(f"{name}: unknown -> healthy")
            disk.full = 97
            service.wait_status("/", 503)
            line = service.wait_line("healthy -> unhealthy")
            assert "win1: healthy -> unhealthy (limit" in line
            assert "disk_percent D: at 97.0, fail above 95" in line
            assert service.get("/-/livez").status == 200
            disk.full = 20
            service.wait_status("/", 200)
            service.wait_line("win1: unhealthy -> healthy")
            for name in ("linux1", "here"):
                assert f"{name}: healthy ->" not in service.output
            assert "correct horse" not in service.output


@pytest.mark.long
@pytest.mark.parametrize(("delay", "drain", "left"), [(2.5, 7.5, 0), (60.0, 1.5, 1)])
def test_a_poll_has_the_drain_to_delete_its_shell_at_a_stop(
    tmp_path: Path, delay: float, drain: float, left: int
) -> None:
    """A host keeps the shell of whoever is gone until its idle time is over; what hangs holds up no stop for longer."""
    disk = WindowsHost()
    with WSManServer("http", "ntlm", answer=disk) as windows:
        row = (
            f"  - {{name: win1, platform: windows, hostname: 127.0.0.1, port: {windows.port}, tls: false, auth: ntlm,"
            f" username: monitor, password: correct horse, interval: 1, timeout: 90}}\n"
        )
        with Service(write_inventory(tmp_path, row, f"  drain: {drain}\n")) as service:
            service.wait_status("/", 200)
            windows.answer = lambda script: Answer((disk(script),), delay=delay)
            polls = windows.polls
            wait_for(lambda: windows.polls > polls)
            service.stop(20)
            assert len(windows.shells) == left


@pytest.mark.parametrize(("delay", "left"), [(3.0, 0), (60.0, 1)])
def test_polls_and_requests_have_the_same_drain(tmp_path: Path, delay: float, left: int) -> None:
    """No poll has another one once the requests have used theirs up, and none begins that would not have it."""
    disk = WindowsHost()
    app = "import pathlib, time\ndef app(environ, start_response):\n    pathlib.Path({}).touch()\n    time.sleep(60)\n"
    (tmp_path / "slow.py").write_text(app.format(repr(str(tmp_path / "came"))), encoding="utf-8")
    with WSManServer("http", "ntlm", answer=disk) as windows, socket.socket() as client:
        row = (
            f"  - {{name: win1, platform: windows, hostname: 127.0.0.1, port: {windows.port}, tls: false, auth: ntlm,"
            f" username: monitor, password: correct horse, interval: 1, timeout: 90}}\n"
        )
        with Service(write_inventory(tmp_path, row, "  drain: 8\n  app: slow:app\n")) as service:
            service.wait_status("/-/readyz", 200)
            client.connect((service.host, service.port))
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_for((tmp_path / "came").exists)
            windows.answer = lambda script: Answer((disk(script),), delay=delay)
            polls = windows.polls
            wait_for(lambda: windows.polls > polls)
            begun_mono = time.monotonic()
            service.stop(30)
            assert 8 < time.monotonic() - begun_mono < 15    # twice the drain is 16, and a busy machine needs some
            assert len(windows.shells) == left


@pytest.mark.long
def test_a_limit_of_open_files_that_is_too_low_is_told(tmp_path: Path) -> None:
    """And raised as far as that is allowed, also for those that are added later; simulated resources need none."""
    program = tmp_path / "limited.py"
    program.write_text(
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 120))\n"
        f"os.execv(sys.executable, [sys.executable, {str(PROGRAM)!r}, *sys.argv[1:]])\n",
        encoding="utf-8",
    )
    rows = "".join(f"  - {{name: host{number}, platform: local, interval: 600}}\n" for number in range(11))
    rows += "  - {name: other, platform: simulated}\n"
    with Program(write_inventory(tmp_path, rows), program=program) as service:
        line = service.wait_line("files may be open")
        write_inventory(tmp_path, rows + "  - {name: added, platform: local, interval: 600}\n")
        os.kill(service.pid, signal.Signals["SIGHUP"])
        service.wait_line("which is too few for 12 hosts: set LimitNOFILE (ulimit -n) to 124")
        assert "120 files may be open, which is too few for 11 hosts: set LimitNOFILE (ulimit -n) to 122" in line


@pytest.mark.long
def test_open_files_are_allowed_as_far_as_they_are_needed() -> None:
    """What the service starts has that limit, too: some programs close each file that there could be."""
    asked = "import healthchecker, resource as r; r.setrlimit(r.RLIMIT_NOFILE, (64, 300))\n"
    asked += "for wanted in 32, 200, 400: print(healthchecker.allow_files(wanted), r.getrlimit(r.RLIMIT_NOFILE))\n"
    told = subprocess.run([sys.executable, "-c", asked], cwd=PROGRAM.parent, capture_output=True, text=True, check=True)
    assert told.stdout == "64 (64, 300)\n200 (200, 300)\n300 (300, 300)\n"


APP = """
import json, os

def app(environ, start_response):
    start_response("200 OK", [])
    return [json.dumps(dict(os.environ)).encode()]
"""
if sys.platform == "linux":

    @pytest.mark.parametrize("theirs", [{}, {"GLIBC_TUNABLES": "glibc.malloc.mxfast=64"}], ids=["none", "theirs"])
    def test_pollers_share_their_memory(theirs: dict[str, str], tmp_path: Path) -> None:
        """What each thread of its own arena and cache keeps grows for hours. The application has what it was given."""
        (tmp_path / "told.py").write_text(APP, encoding="utf-8")
        rows = "  - {name: calm, platform: simulated, mean_healthy: 100000}\n"
        with Program(write_inventory(tmp_path, rows, "  app: told:app"), env=theirs) as service:
            service.wait_status("/-/readyz", 200)
            told = json.loads(service.get("/").body)
            variables = Path(f"/proc/{service.pid}/environ").read_text(encoding="utf-8")
        tunables = ":".join([*theirs.values(), "glibc.malloc.arena_max=2", "glibc.malloc.tcache_count=0",
                             "glibc.malloc.mmap_threshold=131072"])  # fmt: skip
        assert f"GLIBC_TUNABLES={tunables}" in variables.replace("\0glibc", ":glibc")  # glibc writes into it
        assert {name: text for name, text in told.items() if "TUNABLES" in name} == theirs

    def test_a_process_that_is_told_of_no_tunables_begins_once_more_and_goes_on(tmp_path: Path) -> None:
        """As one with capabilities of its file: glibc takes the variable away each time."""
        told = "import os; os.environ.pop('GLIBC_TUNABLES', None); print('begun')\n"
        (tmp_path / "sitecustomize.py").write_text(told, encoding="utf-8")
        started = subprocess.run([sys.executable, PROGRAM, "--version"], env=environment({"PYTHONPATH": str(tmp_path)}),
                                 capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
        assert started.stdout.splitlines() == ["begun", "begun", f"HealthChecker {VERSION}"]
