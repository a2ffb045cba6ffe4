"""Overview: what pages say of resources, of what the pollers know and not only of what could be written."""

from __future__ import annotations

import contextlib
import html
import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from conftest import wait_for
from console import NAME, Local, local_console

from healthchecker import Resource, Status

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its machines are asked by a POSIX shell")


def text_of(local: Local, path: str = "/-/") -> str:
    """A page's text, one blank between words."""
    reply = local.ask("GET", path)
    assert reply.status == 200, reply
    return " ".join(html.unescape(re.sub(r"<(title|script).*?</\1>|<[^>]*>", " ", reply.body)).split())


def written(local: Local) -> str:
    """The state that is in the database."""
    with local.store.reading() as session:
        return session.scalar(sqlalchemy.select(Status.state)) or ""


@contextlib.contextmanager
def machine(folder: Path, more: str) -> Iterator[tuple[Local, Path]]:
    """A console with a machine that is well until a file is there, and which is polled when a test wants it."""
    flag = folder / "broken"
    row = (
        f"  - {{name: one, platform: local, interval: 600, retry_interval: 600, {more},"
        f" checks: [{{name: flag, command: 'test ! -e {flag} || {{ echo it is there; exit 1; }}'}}]}}\n"
    )
    with local_console(folder, row, clock=time.time) as local:
        local.log_in_as(NAME)
        wait_for(lambda: written(local) == "healthy")
        yield local, flag


def test_between_confirmations(tmp_path: Path) -> None:
    """What does not count yet is said all the same, with its cause, and so is the way back."""
    with machine(tmp_path, "rise: 2, fall: 2") as (local, flag):
        flag.touch()
        assert local.form("/-/resources/one/check", {}).status == 303
        for path in ("/-/", "/-/resources/one"):
            assert re.search("failing 1 of 2 .*check flag: it is there", text_of(local, path))
        assert local.form("/-/resources/one/check", {}).status == 303
        assert "failing" not in text_of(local) and "unhealthy" in text_of(local)
        flag.unlink()
        assert local.form("/-/resources/one/check", {}).status == 303
        for path in ("/-/", "/-/resources/one"):
            assert "1 of 2 good" in text_of(local, path)
        assert local.form("/-/resources/one/check", {}).status == 303
        assert "1 of 2 good" not in text_of(local)


def test_what_cannot_be_written_is_shown(tmp_path: Path) -> None:
    """While another program holds the database, the rows say what was, and the pages what is."""
    with machine(tmp_path, "rise: 1, fall: 1") as (local, flag), contextlib.closing(
        sqlite3.connect(tmp_path / "healthchecker.db", isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        flag.touch()
        poller = local.context.monitor.pollers["one"]
        poller.poll_now().result(60)
        assert written(local) == "healthy"
        for path in ("/-/", "/-/resources/one"):
            assert "check flag: it is there" in text_of(local, path)
        assert local.api("GET", "resources/one").json["state"] == "unhealthy"
        other.execute("ROLLBACK")


@pytest.mark.parametrize("polled", [True, False])
def test_what_has_no_fresh_result_is_not_green(polled: bool, tmp_path: Path) -> None:
    """Whether its poller has found anything yet, and whether or not anybody has noted that time is up."""
    with machine(tmp_path, "rise: 1, fall: 1") as (local, _):
        monitor, poller = local.context.monitor, local.context.monitor.pollers["one"]
        if polled:
            monitor._ending.set()  # nobody looks any more
            monitor.join()
            poller.expires_mono = 0.0
        else:
            with local.store.writing() as session:
                session.execute(Status.__table__.update().values(polled_at=time.time() - 3600))
            poller.news.last, poller.standing = None, type(poller.standing)()
        for path in ("/-/", "/-/resources/one"):
            assert re.search(r"unhealthy.* stale: no result for 12\d\d s", text_of(local, path))
        assert local.api("GET", "resources/one").json["cause"] == "stale"


def test_what_was_known_stays_while_a_machine_is_away(tmp_path: Path) -> None:
    """Details and readings are still there, and say of when they are."""
    with machine(tmp_path, "rise: 1, fall: 1") as (local, _):
        before = local.ask("GET", "/-/resources/one").body
        assert "<dt>System</dt>" in before and "as of" not in before
        poller = local.context.monitor.pollers["one"]
        verdict = type(poller.news.last.verdict)("unhealthy", "unreachable", "no route to host")  # type: ignore[union-attr]
        poller._report(verdict, 0.1)
        body = local.ask("GET", "/-/resources/one").body
        assert "<dt>System</dt>" in body and 'class="columns old"' in body and "as of <time" in body
        assert re.search(r"<tr[^>]*>.*?class=\"old\".*?Memory", local.ask("GET", "/-/").body, re.DOTALL)
        with local.store.writing() as session:
            session.execute(Resource.__table__.update().values(platform="linux"))
        assert "<dt>System</dt>" not in local.ask("GET", "/-/resources/one").body, "that was another machine"
