"""No secret shows: not in logs, files, answers or tracebacks, after logins that worked, that failed and that broke."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from service import Service, prepared_keys, write_inventory
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
