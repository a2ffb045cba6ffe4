"""Makes overview.png for the README: the service watches real hosts for a minute, two of which get into trouble.

`screenshot.py FOLDER` writes every page there instead, at 390 and 1,440 pixels, dark and light, to be looked at.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from browser import DOCUMENTED, change_password, chromium, log_in, visit  # noqa: E402  # after the path
from service import Service, prepared_keys, write_inventory  # noqa: E402
from sshd import ParamikoSshd, open_sshd, wait_for  # noqa: E402
from wsman_server import Script, WSManServer  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

RECORDED = (HERE / "recorded" / "windows" / "administrator.json").read_text(encoding="utf-8")
POLLS = 60  # that fill a strip
OFTEN = "interval: 1, retry_interval: 1, rise: 1, fall: 1"
SIZES = {390: 844, 1440: 900}  # pixels


class Trouble:
    """What happens to the hosts: a disk of the Windows host that is as full as it is, and a file on the Linux host."""

    def __init__(self, flag: Path) -> None:
        self.full, self.flag = 61, flag  # percent

    def __call__(self, script: Script) -> str:
        answer = json.loads(next(line for line in RECORDED.splitlines() if line.startswith("{")))
        answer["amounts"]["disk_percent D:"] = [self.full << 30, 100 << 30]
        return json.dumps(answer)


def inventory(folder: Path, linux: ParamikoSshd, flag: Path, windows: WSManServer) -> Path:
    ssh = f"hostname: {linux.address}, port: {linux.port}, username: {linux.username}, key_file: '{linux.user_key()}'"
    limits = "limits: {memory_percent: {warn: 80, fail: 95}, disk_percent: {warn: 80, fail: 90}}"
    return write_inventory(folder, (
        f"  - {{name: web1, platform: linux, {ssh}, {OFTEN}, {limits}, tags: [web],"
        f" checks: [{{name: queue, command: 'test ! -e {flag} || {{ echo 1204 jobs wait; exit 2; }}'}}]}}\n"
        f"  - {{name: web2, platform: linux, {ssh}, {OFTEN}, limits: {{memory_percent: {{warn: 5}}}}, tags: [web]}}\n"
        f"  - {{name: files, platform: windows, hostname: 127.0.0.1, port: {windows.port}, username: monitor,"
        f" password: correct horse, ca_file: '{windows.ca_file}', {OFTEN}, {limits}, tags: [storage, nightly]}}\n"
        f"  - {{name: this-machine, platform: local, {OFTEN}, {limits}}}\n"
        f"  - {{name: dice, platform: simulated, mean_healthy: 20, mean_unhealthy: 6, seed: 7,"
        f" critical: false, {OFTEN}}}\n"
    ))  # fmt: skip


def tell_a_story(page: Page, trouble: Trouble) -> None:
    """A minute in which the queue of web1 stalls for a while, and the disk of files fills in the end."""
    page.goto("/-/resources/web1")
    strip = page.locator(".strip")

    def polled() -> int:
        return sum(int(word) for word in (strip.get_attribute("aria-label") or "").split() if word.isdigit())

    for polls, full, flag in ((18, 61, True), (24, 74, False), (40, 83, False), (52, 93, False), (POLLS, 97, False)):
        wait_for(lambda polls=polls: polled() >= polls, 120)
        trouble.full = full
        trouble.flag.touch() if flag else trouble.flag.unlink(missing_ok=True)


def every_page(browser: Browser, service: Service, folder: Path) -> None:
    paths = ["/-/login", "/-/", "/-/resources/files", "/-/resources/web1", "/-/events", "/-/incidents", "/-/users",
             "/-/tokens", "/-/add", "/-/password", "/-/?q=none"]  # fmt: skip
    for scheme in ("light", "dark"):
        for width, height in SIZES.items():
            options = {"color_scheme": scheme, "viewport": {"width": width, "height": height}}
            context, page, _ = visit(browser, service, **options)
            log_in(page)
            for path in paths:
                page.goto(path)
                name = quote(path.strip("/-"), safe="").replace("%2F", "-") or "overview"
                page.screenshot(path=folder / f"{name}-{scheme}-{width}.png", full_page=True)
            context.close()


def main() -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepared_keys(folder)
        browser = stack.enter_context(chromium())
        linux = stack.enter_context(open_sshd())
        trouble = Trouble(linux.folder / "queue-stalls")
        windows = stack.enter_context(WSManServer("https", "negotiate", answer=trouble))
        service = stack.enter_context(Service(inventory(folder, linux, trouble.flag, windows)))
        context, page, _ = visit(browser, service, viewport={"width": 1280, "height": 440}, device_scale_factor=1.5)
        log_in(page, password=DOCUMENTED)
        change_password(page)
        tell_a_story(page, trouble)
        page.goto("/-/")
        page.get_by_text("at 97.0, fail above 90").first.wait_for()
        if len(sys.argv) > 1:
            every_page(browser, service, Path(sys.argv[1]))
        else:
            page.screenshot(path=HERE / "overview.png")
        context.close()


if __name__ == "__main__":
    main()
