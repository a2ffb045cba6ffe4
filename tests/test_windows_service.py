"""The service from its start to its end with means that every system has: what runs on Windows, too.

Here a resource is simulated, and the end is asked for as that system does it: SIGTERM, Ctrl-C on Windows.
"""

from __future__ import annotations

import ctypes
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
from conftest import wait_for
from service import Program, Service, prepared_keys, run, run_cheaply, write_inventory

import healthchecker

STEADY = "  - {name: steady, platform: simulated, mean_healthy: 1000000, seed: 1, interval: 20}"
# With this seed it is healthy and unhealthy in turns of 2.9 to 4 s: a poll in each second sees every turn.
FLIPS = (
    "  - {name: flips, platform: simulated, mean_healthy: 4, mean_unhealthy: 4, seed: 937,"
    " interval: 1, retry_interval: 1, rise: 1, fall: 1}"
)
OPEN = {"/": 200, "/-/readyz": 200, "/-/gate": 204, "/-/health": 200, "/-/livez": 200}
CLOSED = {"/": 503, "/-/readyz": 503, "/-/gate": 403, "/-/health": 503, "/-/livez": 200}
NOT_SHOWN = """\
not shown under wine:
  - access lists of keys and databases beyond that everybody loses theirs: it keeps a file's mode in their place
  - SSPI (Negotiate, NTLM and Kerberos of Windows itself): only the Python NTLM of pyspnego runs there
  - Ctrl-Break: it cannot be sent there; the service is ended by Ctrl-C
  - Windows PowerShell (the README's block that registers a scheduled task): powershell.exe does nothing there and
    says that it did; polls of `platform: local` have PowerShell 7 in its place"""


class NotShown:
    """Says at the end of the run, right before its counts, what was neither passed nor failed."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
        yield
        terminalreporter.write_line(NOT_SHOWN)


@pytest.fixture(scope="module", autouse=True)
def _tell_what_is_not_shown(request: pytest.FixtureRequest) -> None:
    if sys.platform == "win32" and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version"):
        request.config.pluginmanager.register(NotShown())


def statuses(service: Service) -> dict[str, int]:
    return {path: service.get(path).status for path in OPEN}


def stored_states(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "healthchecker.db", timeout=5)) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM status")]


def test_the_gate_follows_a_resource(tmp_path: Path) -> None:
    prepared_keys(tmp_path)
    with Service(write_inventory(tmp_path, f"{STEADY}\n{FLIPS}")) as service:
        for status in (200, 503, 200):
            answer = service.wait_status("/", status)
            wait_for(lambda expected=OPEN if status == 200 else CLOSED: statuses(service) == expected)
            assert ("retry-after" in answer.headers) == (status == 503)
        service.wait_line("flips: healthy -> unhealthy")
    assert "ended" in service.output.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["private.pem", "public.pem", "started"]


@pytest.mark.long
@pytest.mark.windows
def test_texts_are_utf8_whatever_the_code_page(tmp_path: Path) -> None:
    """On streams, in files and in the database: names, also those that no code page of one byte has."""
    narrow = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    name = "Zürich-東京"
    prepared_keys(tmp_path)
    path = write_inventory(tmp_path, STEADY.replace("steady", name), "  log_file: service.log")
    done = run(path, "check", "--probe", env=narrow)
    assert (done.returncode, f"added: {name}" in done.stdout, f"\n{name}  healthy" in done.stdout) == (0, True, True)
    with Program(path, env=narrow, deadline=60) as service:
        line = service.wait_line(f"{name}: unknown -> healthy")
        wait_for(lambda: stored_states(tmp_path) == ["healthy"])
    assert line in (tmp_path / "service.log").read_text(encoding="utf-8")
    with closing(sqlite3.connect(tmp_path / "healthchecker.db", timeout=5)) as connection:
        assert connection.execute("SELECT name FROM resource").fetchall() == [(name,)]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("steady")
    prepared_keys(folder)
    with Service(write_inventory(folder, STEADY)) as service:
        service.wait_status("/", 200)
        yield service


def test_more_clients_than_select_takes(steady: Service) -> None:
    """512 on Windows, where a server that watches more than that dies; the others wait their turn."""
    with ExitStack() as stack:
        address = (steady.host, steady.port)
        first = stack.enter_context(closing(HTTPConnection(*address, timeout=60)))

        def ask() -> None:
            first.request("GET", "/-/livez")
            assert first.getresponse().read()

        clients = []
        for number in range(560):   # each asks at once: where no room is left, who says nothing is soon sent away
            clients.append(stack.enter_context(socket.create_connection(address, timeout=60)))
            clients[-1].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if number % 10 == 0:
                ask()
        for client in clients[:300]:
            assert client.recv(12) == b"HTTP/1.1 200"
        for _ in range(300):  # the server accepts while it answers
            ask()
        for client in clients[:300]:
            client.close()
        assert {client.recv(12) for client in clients[300:]} == {b"HTTP/1.1 200"}


def test_a_second_one_is_refused(steady: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that only reads is not."""
    assert healthchecker.main(["--inventory", str(steady.inventory), "check"]) == 0
    assert "1 kept" in capsys.readouterr().out
    code, output = run_cheaply("--inventory", str(steady.inventory))
    assert code == 4
    assert "another HealthChecker is using database" in output
    assert steady.get("/").status == 200


def test_whoever_comes_after_one_that_was_killed_or_ended_serves_at_once(tmp_path: Path) -> None:
    """Nothing is in the way: neither its lock on the database nor workers that hold its address."""
    prepared_keys(tmp_path)
    path = write_inventory(tmp_path, STEADY)
    with Service(path) as service:
        service.wait_status("/", 200)
        wait_for(lambda: stored_states(tmp_path) == ["healthy"])
        service.kill()
        service.code = service.process.returncode
    text = path.read_text(encoding="utf-8").replace("listen: 127.0.0.1:0", f"listen: 127.0.0.1:{service.port}")
    path.write_text(text, encoding="utf-8")
    for _ in range(2):
        with Service(path) as service:
            assert statuses(service) == OPEN
