"""Some seconds of what `make soak` does for ten minutes: connections that are kept die in every way."""

from __future__ import annotations

import pytest
from soak_sessions import Plan, soak
from sshd import OPENSSH, POSIX

pytestmark = [OPENSSH, POSIX]
FEW = Plan(
    seconds=20, hosts=4, servers=1, windows=1, interval=100, timeout=20, relogin=8, busy=120, asks=True
)


@pytest.mark.long
def test_no_connection_that_dies_is_taken_for_its_host(capfd: pytest.CaptureFixture[str]) -> None:
    assert soak(FEW) == []
    assert "second tries" in capfd.readouterr().out
