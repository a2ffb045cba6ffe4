"""Night: what an operator opens, fills in wrongly and sends at three in the morning, in a real browser."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy
from browser import PASSWORD, Scheme, chromium, enter, visit
from conftest import wait_for
from console import NAME, Local, local_console, served
from service import few_rounds

from healthchecker import Receiver, Status

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the pages are the same there, but no chromium is")
OFTEN = "interval: 600, retry_interval: 600, rise: 1, fall: 1"
LONG = "word " * 39 + "words"
ROWS = f"""  - {{name: db1, platform: simulated, mean_healthy: 1000000, seed: 1, tags: [database], {OFTEN}}}
  - {{name: db2.replica.eu-central.example.com, platform: http, url: 'http://127.0.0.1:1/', tags: [replica], {OFTEN}}}
  - {{name: web, platform: http, url: 'http://127.0.0.1:1/', critical: false, {OFTEN}}}
"""
MORE = """
groups: [{name: replicas, members: [db1, db2.replica.eu-central.example.com], healthy: any}]
routes: {/reports: [db2.replica.eu-central.example.com]}
maintenance: [{schedule: "0 2 * * *", zone: Europe/Berlin, for: 1h, tags: [replica], reason: patches}]
"""
SICK = "/-/resources/db2.replica.eu-central.example.com"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def sick(local: Local) -> int:
    """How many are unhealthy by their rows."""
    with local.store.reading() as session:
        return len(session.scalars(sqlalchemy.select(Status).filter_by(state="unhealthy")).all())


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """A console with everything at once: groups, planned work, an overridden gate, what is seen, and nobody to tell."""
    folder = tmp_path_factory.mktemp("night")
    with few_rounds(), local_console(folder, ROWS, MORE, PASSWORD, time.time) as local, served(local):
        local.log_in_as(NAME)
        wait_for(lambda: sick(local) == 2, 60)
        term = {"minutes": "60", "reason": LONG}
        later = time.strftime("%Y-%m-%dT12:00", time.localtime(time.time() + 10 * 86_400))
        for path, form in (
            ("/-/override", {"action": "open", "for": "8h", "reason": LONG}),
            ("/-/maintenance", {"scope": "tags:database", **term}),
            ("/-/maintenance", {"scope": "groups:replicas", "start": later, **term}),
            ("/-/resources/web/acknowledgement", {"comment": LONG}),
        ):
            reply = local.form(path, form)
            assert reply.status == 303, reply
        added = {"name": "added", "platform": "simulated", "seed": 2, "interval": 600, "critical": False}
        assert local.api("POST", "resources", added, headers={"Origin": "http://localhost"}).status == 201
        assert local.form("/-/tokens", {"name": "nightly", "role": "viewer", "password": PASSWORD}).status == 200
        with local.store.writing() as session:
            session.add(Receiver(name="ops", settings='{"name": "ops"}', trouble="no answer (ConnectionError)"))
        yield local.keep()


# Words of up to 20 letters that go on in the next line; what is longer, such as the name of a host, may have to.
BROKEN = """() => {
    const found = [], range = document.createRange();
    const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
    for (let text; (text = texts.nextNode());) {
        if (!text.parentElement.checkVisibility() || text.parentElement.closest(".hidden, code, pre, select")) continue;
        for (const { 0: word, index } of text.data.matchAll(/(?<![^\\s(])\\p{L}{2,20}(?![^\\s.,:;)])/gu)) {
            range.setStart(text, index);
            range.setEnd(text, index + word.length);
            if (new Set([...range.getClientRects()].map(part => Math.round(part.top))).size > 1) found.push(word);
        }
    }
    return found;
}"""


def assert_fits(page: Page, where: str) -> None:
    """axe-core finds nothing, nothing is beyond the window's edges, and no word is broken."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert not [(one["id"], [node["html"] for node in one["nodes"]]) for one in found], where
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), where
    outside = """[...document.querySelectorAll("main :is(label, button, input, .state, time)")].filter(one =>
        one.checkVisibility() && one.getBoundingClientRect().left < 0).map(one => one.outerHTML)"""
    assert page.evaluate(outside) == [], where
    assert page.evaluate(BROKEN) == [], where


# Of each form: its page, the button that opens it, what is typed, the button that sends it, and what is refused.
PAST = {"reason": LONG, "start": "2020-01-01T02:00"}
FORMS: list[tuple[str, str, dict[str, str], str, str]] = [
    ("/-/", "Override the gate", {"reason": LONG}, "Override the gate", ""),
    ("/-/", "Maintenance", PAST, "Begin maintenance", "must not be past"),
    (SICK, "Maintenance", PAST, "Begin maintenance", "must not be past"),
    (SICK, "Acknowledge", {"comment": LONG}, "Say that it is seen", ""),
    ("/-/users", "", {"name": NAME, "password": "correct horse battery"}, "Add user", "of this name already"),
    ("/-/tokens", "", {"name": "late", "expires": "1x", "password": PASSWORD}, "Make token", "must be like 90d"),
    ("/-/add", "", {"name": "x", "interval": "soon", "password": "secret", "settings": "x: 1\nlimits: {y: 2}"}, "Save",
     "unknown setting"),
    ("/-/resources/added/edit", "", {"name": "db1", "settings": "tags: [one, two]\n"}, "Save", "cannot be called"),
    ("/-/password", "", {"current": PASSWORD, "new": "a long enough one", "again": "not the same one"},
     "Change the password", "is not the same"),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 390), ("light", 1000)])
def test_every_form(browser: Browser, night: Local, scheme: Scheme, width: int) -> None:
    """Before and after a refusal: readable, inside of the window, and what was typed is there or said to be gone."""
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    context, page, faults = visit(browser, night, **options)
    enter(page, night)
    for path, opener, fields, button, refusal in FORMS:
        page.goto(path)
        if opener:
            page.locator("summary", has_text=opener).click()
        scope = page.locator("details[open] form" if opener else "main form").filter(
            has=page.get_by_role("button", name=button, exact=True))  # fmt: skip
        for name, text in fields.items():
            scope.locator(f"[name={name}]").fill(text)
        assert_fits(page, f"{path} {opener} open")
        if not refusal:
            continue
        scope.get_by_role("button", name=button, exact=True).click()
        page.get_by_role("alert").get_by_text(refusal).wait_for()
        for name, text in fields.items():
            field = scope.locator(f"[name={name}]")
            lost = field.get_attribute("placeholder") == "not kept: type it again" and not field.input_value()
            assert lost or field.input_value() == text, (path, name)
        assert_fits(page, f"{path} {opener} refused")
    page.goto(SICK)
    page.locator("summary", has_text="Last polls").click()
    assert_fits(page, "last polls")
    for path in ("/-/events", "/-/incidents", "/-/incidents?group=replicas", "/-/add?copy=added"):
        page.goto(path)
        assert_fits(page, path)
    context.close()
    assert not faults


def test_a_refused_form_leaves_the_others_alone(night: Local) -> None:
    """Two forms of the overview have a reason: only the one that was sent shows it, with what is wrong with it."""
    body = night.form("/-/override", {"action": "open", "for": "8h", "reason": "x" * 300}).body
    assert body.count('id="e-reason"') == 1
    body = night.form("/-/maintenance", {"scope": "all", "minutes": "60", "reason": "x" * 300}).body
    assert body.count('id="e-reason"') == 1 and body.count("x" * 300) == 1


def test_what_was_done_is_over(browser: Browser, night: Local) -> None:
    """A form that was accepted is closed and empty, and who sent it by keyboard is where it was opened."""
    context, page, faults = visit(browser, night)
    enter(page, night)
    page.goto("/-/resources/web")
    page.locator("summary", has_text="Maintenance").press("Enter")
    reason = page.locator("details[open] [name=reason]")
    reason.fill("on it")
    page.get_by_role("button", name="Begin maintenance").press("Enter")
    page.locator("section.maintenance", has_text="on it").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Maintenance"
    assert page.locator("[name=reason]").input_value() == ""
    page.get_by_role("button", name="End maintenance").press("Enter")
    page.locator("section.maintenance").wait_for(state="detached")
    context.close()
    assert not faults


def test_the_focus_stays(browser: Browser, night: Local) -> None:
    """Who presses a button by keyboard is at that button when the answer is there, or where the button was."""
    context, page, faults = visit(browser, night)
    enter(page, night)
    page.goto(SICK)
    focused = "document.activeElement.textContent.trim()"
    with page.expect_response("**/check"):
        page.get_by_role("button", name="Check now").press("Enter")
    wait_for(lambda: page.evaluate(focused) == "Check now", 60)
    page.locator("summary", has_text="Acknowledge").press("Enter")
    page.get_by_label("Comment").fill("on it")
    page.get_by_label("Comment").press("Enter")
    page.get_by_role("button", name="Take back").wait_for()
    wait_for(lambda: page.evaluate("document.activeElement.id") == "main", 60)
    page.get_by_role("button", name="Take back").press("Enter")
    page.locator("summary", has_text="Acknowledge").wait_for()
    context.close()
    assert not faults


def test_sorting_on_a_phone(browser: Browser, night: Local) -> None:
    context, page, _ = visit(browser, night, viewport={"width": 390, "height": 800})
    enter(page, night)
    page.goto("/-/")
    page.get_by_role("link", name="Resource", exact=True).click()
    page.wait_for_url("**sort=name*")
    assert_fits(page, "sorted")
    context.close()


def test_rename_and_copy(browser: Browser, night: Local) -> None:
    """The form leads to where it is from then on; a copy has all but the name."""
    made = {"name": "spare", "platform": "simulated", "seed": 3, "interval": 600, "critical": False, "tags": ["t"]}
    assert night.api("POST", "resources", made, headers={"Origin": "http://localhost"}).status == 201
    context, page, faults = visit(browser, night)
    enter(page, night)
    page.goto("/-/resources/spare/edit")
    page.locator("main [name=name]").fill("renamed")
    page.get_by_role("button", name="Save").click()
    page.wait_for_url("**/resources/renamed")
    page.get_by_role("cell", name="renamed, before spare").wait_for()
    page.get_by_role("link", name="Copy").click()
    assert page.locator("main [name=name]").input_value() == ""
    assert "tags: [t]" in page.locator("main [name=settings]").input_value()
    page.locator("main [name=name]").fill("copied")
    page.get_by_role("button", name="Save").click()
    page.wait_for_url("**/resources/copied")
    for name in ("copied", "renamed"):
        assert night.form(f"/-/resources/{name}/remove", {}).status == 303
    page.goto("/-/events")
    page.get_by_label("Resource").select_option("copied (removed)")
    page.wait_for_url("**resource=copied*")
    assert "removed" in page.locator("table.events tbody tr").first.inner_text()
    context.close()
    assert not faults


def test_incidents_in_a_browser(browser: Browser, night: Local) -> None:
    """By time span and by group, and as a file."""
    context, page, faults = visit(browser, night)
    enter(page, night)
    page.goto("/-/incidents")
    page.get_by_role("link", name="Last week").click()
    page.wait_for_url("**span=week*")
    page.get_by_role("link", name="replicas", exact=True).click()
    page.get_by_role("heading", name=re.compile("^replicas: .* in the last week$")).wait_for()
    with page.expect_download() as waiting:
        page.locator("a.button", has_text="CSV").click()
    assert waiting.value.path().read_text(encoding="utf-8").startswith("group,")
    context.close()
    assert not faults


@pytest.mark.long
def test_a_fault_is_an_answer(browser: Browser, tmp_path: Path) -> None:
    """`No answer` is said only when there was none; whatever else it is, the page says that it is old."""
    with local_console(tmp_path, ROWS, MORE, PASSWORD, time.time) as local, served(local):
        context, page, _ = visit(browser, local)
        enter(page, local)
        page.goto("/-/")
        lost = page.locator("#lost")
        with local.store.writing() as session:
            session.execute(sqlalchemy.text("ALTER TABLE receiver RENAME TO gone"))
        lost.wait_for()
        assert "No answer" not in lost.inner_text() and "What is shown is old." in lost.inner_text()
        with local.store.writing() as session:
            session.execute(sqlalchemy.text("ALTER TABLE gone RENAME TO receiver"))
        lost.wait_for(state="hidden")
        context.close()


def test_who_is_not_told_is_named(night: Local) -> None:
    assert "ops cannot be told: no answer (ConnectionError)." in night.ask("GET", "/-/").body
