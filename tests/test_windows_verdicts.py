"""What a check says, in a real PowerShell: the table of verdicts, in full and in constrained language.

The host is tests/wsman_server.py with tests/pwsh.py behind it; the poll is the product's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pwsh import CONSTRAINED, FULL, Engine, open_engine
from test_powershell import poll, target
from wsman_server import WSManServer

TIMEOUT = 120.0  # seconds; wine may be slow, and the first poll of a run starts PowerShell for the first time


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with open_engine() as engine:
        yield engine


@pytest.fixture(scope="module", params=(FULL, CONSTRAINED), ids=("full", "constrained"))
def host(engine: Engine, request: pytest.FixtureRequest) -> Iterator[WSManServer]:
    with WSManServer("https", "negotiate", open_shell=engine.opener(request.param), shell_limit=4) as server:
        yield server
        assert server.shells == {}


def test_first(host: WSManServer) -> None:
    polled = poll(target(host, services=["Eventlog"], timeout=TIMEOUT))
    assert polled.sample, polled.verdict
    assert polled.sample.services["Eventlog"].good
    assert polled.sample.metrics["disk_percent C:"] == pytest.approx(40.16, abs=0.01)
