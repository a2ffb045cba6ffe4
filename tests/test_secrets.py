"""No secret shows: not in logs, files, answers or tracebacks, after logins that worked, that failed and that broke."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path

import pytest
from service import Program, Service, prepared_keys, write_inventory
from sshd import Sshd

import healthchecker
from healthchecker import (
    Connection,
    ConnectionContext,
    Deadline,
    KnownHosts,
    LoginGuard,
    Output,
    Resolver,
    ResourceSettings,
    Target,
    poll_once,
)

WRONG = "cAn4ry-wr0ng-p4ssw0rd"


def test_service_with_real_logins(sshd: Sshd, password: str, tmp_path: Path) -> None:
    """One host takes the password, one refuses another; then everything that the service wrote or said is searched."""
    host = f"hostname: {sshd.address}, port: {sshd.port}, username: {sshd.username}, platform: unix, interval: 1"
    path = write_inventory(
        tmp_path,
        f"  - {{name: right, {host}, password: '{password}'}}\n  - {{name: wrong, {host}, password: '{WRONG}'}}\n",
    )
    prepared_keys(tmp_path)
    assert healthchecker.main(["--inventory", str(path), "seal"]) == 0
    with Service(path) as service:
        service.wait_line("right: unknown -> healthy")
        service.wait_line("wrong: unknown -> unhealthy (auth")
        answers = [service.get(url) for url in ("/", "/-/health", "/-/readyz", "/-/gate", "/-/livez", "/-/nothing")]
    said = service.output + "".join(f"{answer.headers}{answer.body!r}" for answer in answers)
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    for secret in (password, WRONG):
        assert secret not in said
        assert secret.encode() not in written
    assert written.count(b"HC2.") >= 2, "they are there, sealed"


class Broken(Connection):
    """A connection that fails as no one foresaw, with the secret in reach of the traceback."""

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        del script, output, deadline
        raise KeyError(self._target)


def test_traceback(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    secrets = {"password": WRONG, "key_passphrase": WRONG}
    settings = ResourceSettings.model_validate({"name": "a", "hostname": "a", "username": "u", **secrets})
    target = Target(1, settings, None, "", "")
    context = ConnectionContext(KnownHosts(tmp_path), Resolver())
    with caplog.at_level(logging.DEBUG):
        verdict, _ = poll_once(target, Broken(target, LoginGuard(), context), None)
    assert (verdict.state, verdict.cause) == ("unhealthy", "protocol")
    assert "Traceback" in caplog.text
    assert WRONG not in caplog.text + repr(target) + str(settings) + repr(LoginGuard().__dict__)
    assert WRONG not in repr(context)


SPY = """
import gc, json, os, subprocess, sys
CODE = "import json, os; print(json.dumps([dict(os.environ), os.listdir('/proc/self/fd')]))"

def app(environ, start_response):
    started = subprocess.run([sys.executable, "-c", CODE], close_fds=False, capture_output=True, text=True)
    told = {"worker": dict(os.environ), "child": json.loads(started.stdout)}
    gc.unfreeze()
    settings = [each for each in gc.get_objects() if type(each).__name__ == "ServiceSettings"]
    values = [value for each in settings for value in vars(each).values()]
    told["secrets"] = [value.get_secret_value() for value in values if hasattr(value, "get_secret_value")]
    told["settings"] = len(settings)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(told).encode()]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_the_application_starts_inherits_nothing(tmp_path: Path) -> None:
    """No secret of the environment, neither in that of the main process; no socket and no shared memory; no core."""
    (tmp_path / "spy.py").write_text(SPY, encoding="utf-8")
    prepared_keys(tmp_path)
    path = write_inventory(
        tmp_path,
        "  - {name: calm, platform: simulated, mean_healthy: 100000}\n"
        "  - {hostname: 127.0.0.1, username: u, port: 9, password_env: CANARY, critical: false}\n"
        "  - {name: twice, hostname: 127.0.0.1, username: u, port: 9, password_env: CANARY, critical: false}\n",
        "  app: spy:app\n  heartbeat: http://127.0.0.1:9/\n  status_token_env: CANARY",
    )
    with Program(path, env={"CANARY": WRONG, "KEPT": "kept"}) as service:
        service.wait_status("/-/readyz", 200)
        body = service.get("/").body
        told = json.loads(body)
        assert WRONG not in body and "CANARY" not in body and told["worker"]["KEPT"] == "kept"
        assert told["settings"] and told["secrets"] == []
        descriptors = told["child"][1]
        assert len(descriptors) == 4, descriptors   # three streams, and the folder that it lists
        children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text(encoding="ascii")
        family = [service.pid, *map(int, children.split())]
        assert len(family) > 1
        for pid in family:
            seen = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
            assert WRONG.encode() not in seen and b"KEPT=kept" in seen
        limits = Path(f"/proc/{service.pid}/limits").read_text(encoding="ascii")
        assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core")] == ["0"]


def test_local_variables(tmp_path: Path) -> None:
    """What shows the variables of each frame of a failed poll shows no secret."""
    settings = ResourceSettings.model_validate({"name": "a", "hostname": "a", "username": "u", "password": WRONG})
    target = Target(1, settings, None, "", "")
    connection = Broken(target, LoginGuard(), ConnectionContext(KnownHosts(tmp_path), Resolver()))
    with pytest.raises(KeyError) as caught:
        connection.run("", Output("mark"), Deadline(1.0))
    trace = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert "target" in "".join(trace.format()) and WRONG not in "".join(trace.format())
