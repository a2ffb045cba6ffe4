"""A headless Chromium for the tests of the pages, and what they do with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pytest
from console import Client, Local
from service import Service

from healthchecker import COOKIE

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

# The first one has no window around its pages: it draws them with three fifths of the processor time.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FIRST_USER, DOCUMENTED, PASSWORD = "SpiceWorks", "HealthChecker", "a long enough password"
PATIENCE = 45_000  # milliseconds: the machine may be busy
LIFETIME = 3600.0  # seconds of a browser: some calls of playwright wait without a deadline for one that hangs
Scheme = Literal["dark", "light"]


def children() -> set[int]:
    """Processes that this one has started."""
    files = Path("/proc/self/task").glob("*/children")
    return {int(number) for file in files for number in file.read_text(encoding="ascii").split()}


def end(processes: set[int]) -> None:
    for number in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's chromium under playwright; skips where one of them is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the pages need the package playwright")
    if CHROMIUM is None:
        pytest.skip("the pages need chromium-headless-shell")
    before = children()
    with playwright.sync_playwright() as running:
        deadline = threading.Timer(LIFETIME, end, [children() - before])
        deadline.daemon = True
        deadline.start()
        try:
            # Without a sandbox: a container's root has none, and every page is our own.
            browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            yield browser
            browser.close()
        finally:
            deadline.cancel()


class Faults(list[str]):
    """What the browser complained about: scripts that fail, policies that are broken."""

    def watch(self, page: Page) -> None:
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("console", self._note)
        page.on("dialog", lambda dialog: (self.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):  # a 4xx, wanted
            self.append(message.text)


def visit(browser: Browser, service: Service | Local, **options: Any) -> tuple[BrowserContext, Page, Faults]:
    """A fresh visitor's page; the context's base URL is the console."""
    context = browser.new_context(base_url="http://{}:{}".format(*service.console), **options)
    context.set_default_timeout(PATIENCE)
    page, faults = context.new_page(), Faults()
    faults.watch(page)
    return context, page, faults


def enter(page: Page, service: Service | Local, name: str = FIRST_USER) -> None:
    """A login without its form."""
    client = Client(*service.console).open_session(name, PASSWORD)
    cookie = {"name": f"{COOKIE}_{client.port}", "value": client.cookie, "url": f"{client.origin}/-/"}
    page.context.add_cookies([cast("Any", cookie)])


def log_in(page: Page, name: str = FIRST_USER, password: str = PASSWORD) -> None:
    page.goto("/-/login")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(lambda url: "/-/login" not in url)  # to the change of the password, with the documented one


def change_password(page: Page, before: str = DOCUMENTED, after: str = PASSWORD) -> None:
    page.goto("/-/password")
    page.get_by_label("Password until now").fill(before)
    page.get_by_label("New password").first.fill(after)
    page.get_by_label("New password again").fill(after)
    page.get_by_role("button", name="Change the password").click()
    page.wait_for_url("**/-/")
