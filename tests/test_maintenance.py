"""Planned work: schedules, what begins and ends when, by whatever clock; what has been seen; pages, API, commands."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import re
import time
import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import wait_for
from console import NAME, Local, local_console, make_user, prepared_database
from postgres import database_in, execute, refusing, settings_of
from service import Service, run, store_in, write_inventory
from test_poll import vault

import healthchecker
from healthchecker import (
    Acknowledgement,
    Event,
    InventoryError,
    Maintenance,
    MaintenanceKeeper,
    Plan,
    Resource,
    Status,
    Vault,
    end_acknowledgements,
    finish_work,
    import_inventory,
    load_inventory,
    move_times,
    revise,
    timetable,
)

__all__ = ["vault"]  # a fixture
BERLIN, SYDNEY = "Europe/Berlin", "Australia/Sydney"
HALF = "Australia/Lord_Howe"    # which puts its clocks by half an hour
HOUR, DAY = 3600.0, 86_400.0


def moment(text: str, zone: str = "UTC", fold: int = 0) -> float:
    """Unix time of a time there; of 2026, unless it says more."""
    text = text if text[2] != "-" else f"2026-{text}"
    return datetime.datetime.fromisoformat(text).replace(tzinfo=zoneinfo.ZoneInfo(zone), fold=fold).timestamp()


def plan(schedule: str, length: str = "1h", zone: str = "UTC", **more: Any) -> Plan:
    fields = {"schedule": schedule, "zone": zone, "for": length, "reason": "patches"}
    return Plan.model_validate(fields | (more or {"all": True}))


# === Schedules ===============================================================
# Schedule, zone; at that time there, of two equal hours the first (0) or second (1): when it began last, begins next.
AROUND = {
    "before": ("0 2 * * sun", BERLIN, "11-28 12:00", 0, ("11-22 02:00", 0), ("11-29 02:00", 0)),
    "as it begins": ("0 2 * * sun", BERLIN, "11-29 02:00", 0, ("11-29 02:00", 0), ("12-06 02:00", 0)),
    "within": ("0 2 * * sun", BERLIN, "11-29 02:30", 0, ("11-29 02:00", 0), ("12-06 02:00", 0)),
    # Berlin skips 02:00 to 03:00 on 29 March 2026, and shows it twice on 25 October
    "before a skipped hour": ("30 2 * * *", BERLIN, "03-29 01:59", 0, ("03-28 02:30", 0), ("03-29 03:00", 0)),
    "after a skipped hour": ("30 2 * * *", BERLIN, "03-29 03:00", 0, ("03-29 03:00", 0), ("03-30 02:30", 0)),
    "in the first of two": ("30 2 * * *", BERLIN, "10-25 02:10", 0, ("10-24 02:30", 0), ("10-25 02:30", 0)),
    "in the second of two": ("30 2 * * *", BERLIN, "10-25 02:10", 1, ("10-25 02:30", 0), ("10-26 02:30", 0)),
    "late in the second": ("30 2 * * *", BERLIN, "10-25 02:40", 1, ("10-25 02:30", 0), ("10-26 02:30", 0)),
    "each half hour, twice": ("*/30 2 * * *", BERLIN, "10-25 02:10", 1, ("10-25 02:00", 1), ("10-25 02:30", 1)),
    "each half hour, skipped": ("*/30 2 * * *", BERLIN, "03-29 03:10", 0, ("03-28 02:30", 0), ("03-30 02:00", 0)),
    # Sydney shows 02:00 to 03:00 twice on 5 April 2026, and skips it on 4 October
    "south, skipped": ("15 2 * * *", SYDNEY, "10-04 03:30", 0, ("10-04 03:00", 0), ("10-05 02:15", 0)),
    "south, before it": ("15 2 * * *", SYDNEY, "10-04 01:59", 0, ("10-03 02:15", 0), ("10-04 03:00", 0)),
    "south, first of two": ("15 2 * * *", SYDNEY, "04-05 02:20", 0, ("04-05 02:15", 0), ("04-06 02:15", 0)),
    "south, second of two": ("15 2 * * *", SYDNEY, "04-05 02:10", 1, ("04-05 02:15", 0), ("04-06 02:15", 0)),
    # Lord Howe shows 01:30 to 02:00 twice on 5 April 2026, and skips 02:00 to 02:30 on 4 October
    "half an hour, skipped": ("15 2 * * *", HALF, "10-04 02:40", 0, ("10-04 02:30", 0), ("10-05 02:15", 0)),
    "half an hour, first of two": ("40 1 * * *", HALF, "04-05 01:35", 1, ("04-05 01:40", 0), ("04-06 01:40", 0)),
    "half an hour, before both": ("30 */2 * * *", HALF, "04-05 00:31", 0, ("04-05 00:30", 0), ("04-05 02:30", 0)),
    "a leap day": ("0 0 29 2 *", "UTC", "2026-01-01 00:00", 0, ("2024-02-29 00:00", 0), ("2028-02-29 00:00", 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", AROUND.values(), ids=AROUND)
def test_around(case: tuple[str, str, str, int, tuple[str, int], tuple[str, int]]) -> None:
    schedule, zone, now, fold, last, following = case
    expected = tuple(moment(text, zone, which) for text, which in (last, following))
    assert plan(schedule, "10m", zone).around(moment(now, zone, fold)) == expected


@pytest.mark.long
@pytest.mark.parametrize("zone", [BERLIN, SYDNEY, HALF, "America/New_York"])
@pytest.mark.parametrize("schedule", ["30 2 * * *", "30 */2 * * *", "0 * * * *", "*/20 1-3 * * *", "15 2,3 * * sun"])
def test_what_is_next_was_last_then(zone: str, schedule: str) -> None:
    """Through both ends of summer time: no beginning is passed over, and none comes twice."""
    made, seen, there = plan(schedule, "10m", zone), 0, zoneinfo.ZoneInfo(zone)
    noons = [datetime.datetime(2026, 1, 1, 12, tzinfo=there) + datetime.timedelta(day) for day in range(365)]
    changes = [after for before, after in itertools.pairwise(noons) if before.utcoffset() != after.utcoffset()]
    assert len(changes) == 2
    around = datetime.timedelta(16 if schedule.endswith("sun") else 3)
    for change in changes:
        at, end = (change - around).timestamp(), (change + around).timestamp()
        while at < end:
            _, following = made.around(at)
            assert at < following < at + 9 * DAY
            assert made.around(following)[0] == following
            assert made.around(following - 1)[0] <= at, "or there was one in between"
            at, seen = following, seen + 1
    assert seen >= 10


CALM = "platform: simulated, mean_healthy: 1000000, interval: 1"
SICK = "platform: simulated, mean_healthy: 0.000001, mean_unhealthy: 1000000, fall: 1, interval: 1"
ROWS = (f"  - {{name: a, {CALM}, tags: [db]}}\n  - {{name: b, {CALM}}}\n"
        f"  - {{name: c, {CALM}, critical: false, tags: [db]}}\n")  # fmt: skip
GROUPS = "groups: [{name: pair, members: [a, b]}]\n"
USUAL = {"schedule": "0 2 * * sun", "zone": BERLIN, "for": "1h", "tags": "[db]", "reason": "patches"}


def inventory(folder: Path, *plans: dict[str, str], rows: str = ROWS + GROUPS) -> Path:
    """One setting a line."""
    texts = ["  - " + "\n    ".join(f"{name}: {text}" for name, text in (USUAL | each).items() if text)
             for each in plans]  # fmt: skip
    return write_inventory(folder, rows + "maintenance:\n" + "\n".join(texts) if texts else rows)


FAULTS = {  # what is written, what is wrong with it, and which character of it is pointed to
    "never": ({"schedule": "0 0 30 2 *"}, "must be minute, hour, day of the month", 0),
    "words": ({"schedule": "now and then"}, "must be minute, hour", 0),
    "with seconds": ({"schedule": "0 0 2 * * sun"}, "must be minute, hour", 0),
    "too large": ({"schedule": "99 2 * * *"}, "(Bad minute)", 0),
    "very long": ({"schedule": f"{'1' * 9000} 2 * * *"}, "must be minute, hour", 0),
    "unknown zone": ({"zone": "Europe/Berln"}, "no time zone has this name; did you mean Europe/Berlin?", 0),
    "a folder of zones": ({"zone": "Europe"}, "no time zone has this name", 0),
    "a way out": ({"zone": "../../etc/passwd"}, "no time zone has this name", 0),
    "no duration": ({"for": "1x"}, "must be such as 90s, 30m or 2h", 0),
    "no unit": ({"for": "3600"}, "must be such as 90s, 30m or 2h", 0),
    "too short": ({"for": "1s"}, "must be greater than or equal to 60", 0),
    "too long": ({"for": "900d"}, "must be at most 366d", 0),
    "always": ({"for": "7d"}, "each turn would meet the next one", 0),
    "unknown tag": ({"tags": "[d]"}, "no tag has this name; did you mean db?", 1),
    "unknown group": ({"groups": "[pare]"}, "no group has this name; did you mean pair?", 1),
    "unknown name": ({"resources": "[b, bb]"}, "no resource has this name; did you mean b?", 4),
    "unknown setting": ({"shedule": "1"}, "unknown setting; did you mean schedule?", -9),
    "no reason": ({"reason": '""'}, "must be one line of text", 0),
    "everything and more": ({"all": "true"}, "needs tags, groups or resources, or else all: true", None),
    "nothing": ({"tags": "[]"}, "needs tags, groups or resources, or else all: true", None),
}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_faults_have_their_place(tmp_path: Path, case: tuple[dict[str, str], str, int | None]) -> None:
    [(name, text)], message, at = case[0].items(), case[1], case[2]
    path = inventory(tmp_path, case[0])
    lines = path.read_text(encoding="utf-8").splitlines()
    number = next(number for number, line in enumerate(lines, 1) if f" {name}: {text}" in line)
    column = lines[number - 1].index(f"{name}: ") + len(name) + 3 + (at or 0)
    if at is None:
        number, column = lines.index("maintenance:") + 2, 5
    with pytest.raises(InventoryError) as failure:
        load_inventory(path)
    [fault] = str(failure.value).splitlines()
    assert fault.startswith(f"inventory.yaml:{number}:{column}: maintenance[0]"), fault
    assert message in fault


def test_what_meets_itself_now_and_then_is_none(tmp_path: Path) -> None:
    """Saturday's turn is still on when Sunday's begins; then there is a pause."""
    [made] = load_inventory(inventory(tmp_path, {"schedule": "0 2 * * sat,sun", "for": "30h"})).plans
    assert made.seconds == 30 * HOUR


@pytest.fixture
def tmp_path(database_folder: Path) -> Path:
    """What has a folder here runs on both kinds of database."""
    return database_folder


# === Turns ===================================================================
class Diary:
    """A database, and what the monitor does to it at the times that a test says."""

    def __init__(self, folder: Path, vault: Vault) -> None:
        self.folder, self.vault = folder, vault
        self.store = store_in(folder)
        self.keeper = MaintenanceKeeper(self.store)

    def write(self, *plans: dict[str, str], rows: str = ROWS + GROUPS) -> Diary:
        with self.store.writing() as session:
            import_inventory(session, load_inventory(inventory(self.folder, *plans, rows=rows)), self.vault)
        return self

    def add(self, start: float, until: float, state: str = "planned", **scope: Any) -> None:
        with self.store.writing() as session:
            session.add(Maintenance(state=state, start_at=start, until_at=until, scope=json.dumps(scope),
                                    reason="disks"))  # fmt: skip

    def look(self, now: float, *, follow: bool = True) -> str:
        """Who does not count then; as after a change of rows, or just as time goes by."""
        if follow:
            self.keeper.follow(now)
        return "".join(sorted(self.keeper.covered(now)))

    def restart(self) -> None:
        self.keeper = MaintenanceKeeper(self.store)

    @property
    def events(self) -> list[tuple[str, str, str, str]]:
        """State, resource or group, text; the oldest first."""
        with self.store.reading() as session:
            found = session.scalars(sqlalchemy.select(Event).filter_by(kind="maintenance").order_by(Event.id))
            return [(one.state, one.resource, one.group, one.text) for one in found]

    @property
    def states(self) -> str:
        return " ".join(state for state, *_ in self.events)


@pytest.fixture
def diary(tmp_path: Path, vault: Vault) -> Iterator[Diary]:
    made = Diary(tmp_path, vault)
    yield made
    made.store.close()


SUNDAY = moment("2026-11-29 02:00", BERLIN)


def test_what_cannot_be_read_ends_all_the_same(diary: Diary) -> None:
    """Nothing else of the monitor waits for it, and afterwards all is as it was."""
    diary.write()
    diary.add(SUNDAY, SUNDAY + HOUR, "begun", resources=["a"])
    assert diary.look(SUNDAY + 1) == "a"
    execute(diary.store.database, "ALTER TABLE maintenance RENAME TO away")
    assert diary.look(SUNDAY + 2) == "a"
    assert diary.look(SUNDAY + HOUR, follow=False) == ""
    execute(diary.store.database, "ALTER TABLE away RENAME TO maintenance")
    diary.look(SUNDAY + HOUR + 11, follow=False)
    assert diary.states == "over"


def test_a_turn_of_a_plan(diary: Diary) -> None:
    """Just as time goes by: it begins and ends at its time, is told twice, and comes back a week later."""
    diary.write({})
    for at, covered in ((-1, ""), (0, "ac"), (HOUR - 1, "ac"), (HOUR, ""), (DAY, ""), (7 * DAY, "ac"),
                        (7 * DAY + HOUR, "")):  # fmt: skip
        assert diary.look(SUNDAY + at, follow=at < 0) == covered, at
    assert diary.states == "begun over begun over"
    until = datetime.datetime.fromtimestamp(SUNDAY + HOUR).astimezone().isoformat(" ", "seconds")
    assert diary.events[:2] == [("begun", "", "", f"tag db: in maintenance until {until}: patches"),
                                ("over", "", "", "tag db: maintenance is over")]  # fmt: skip


def test_the_next_turn_of_a_plan_is_shown(diary: Diary) -> None:
    """However far ahead it is."""
    diary.write({"schedule": "0 2 14 * *"}, {"schedule": "0 2 29 2 *", "tags": "", "all": "true"})
    with diary.store.reading() as session:
        starts = [turn.start for turn in timetable(session, SUNDAY)]
    assert starts == [moment("2026-12-14 02:00", BERLIN), moment("2028-02-29 02:00", BERLIN)]


def test_a_start_in_the_middle_of_a_turn(diary: Diary) -> None:
    diary.write({})
    assert diary.look(SUNDAY + 600) == "ac"
    diary.restart()
    assert diary.look(SUNDAY + 1200) == "ac" and diary.states == "begun"
    diary.restart()     # which takes until after its end
    assert diary.look(SUNDAY + 2 * HOUR) == ""
    diary.restart()
    assert diary.look(SUNDAY + 2 * HOUR) == "" and diary.states == "begun over"


def test_what_is_planned_by_hand(diary: Diary) -> None:
    """Begins and ends in time, each told once, at its own time also where no service ran."""
    diary.write().add(SUNDAY, SUNDAY + HOUR, groups=["pair"])
    diary.add(SUNDAY, SUNDAY + HOUR, resources=["b"])
    assert [diary.look(SUNDAY + at, follow=at < 0) for at in (-1, 0, HOUR - 1, HOUR)] == ["", "ab", "ab", ""]
    assert [event[:3] for event in diary.events] == [
        ("begun", "", "pair"), ("begun", "b", ""), ("over", "", "pair"), ("over", "b", "")]  # fmt: skip
    diary.add(SUNDAY, SUNDAY + HOUR, all=True)
    assert diary.look(SUNDAY + DAY) == "" and diary.states.endswith(" begun over")
    diary.look(SUNDAY + 3 * DAY)    # a day later they are gone
    with diary.store.reading() as session:
        assert session.scalars(sqlalchemy.select(Maintenance)).all() == []
        last = session.scalars(sqlalchemy.select(Event.at).order_by(Event.id.desc()).limit(2)).all()
        assert last == [SUNDAY + HOUR, SUNDAY]


TURNS = {  # plans, and who does not count at which minute of that Sunday after two
    "they overlap": ([{}, {"schedule": "30 2 * * sun", "tags": "", "resources": "[a, b]"}],
                     {0: "ac", 29: "ac", 30: "abc", 59: "abc", 60: "ab", 89: "ab", 90: ""}, "begun begun over over"),
    "they touch": ([{}, {"schedule": "0 3 * * sun"}], {0: "ac", 59: "ac", 60: "ac", 119: "ac", 120: ""},
                   "begun over begun over"),
    "it meets itself": ([{"schedule": "0,30 2 * * sun", "for": "45m"}],
                        {0: "ac", 30: "ac", 45: "ac", 74: "ac", 75: ""}, "begun over"),
    "it touches itself": ([{"schedule": "0,30 2 * * sun", "for": "30m"}], {0: "ac", 30: "ac", 59: "ac", 60: ""},
                          "begun over begun over"),
    "everything": ([{"tags": "", "all": "true"}], {0: "abc", 60: ""}, "begun over"),
    "a group": ([{"tags": "", "groups": "[pair]"}], {0: "ab", 60: ""}, "begun over"),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", TURNS.values(), ids=TURNS)
def test_turns_that_meet(diary: Diary, case: tuple[list[dict[str, str]], dict[int, str], str]) -> None:
    plans, minutes, states = case
    diary.write(*plans).look(SUNDAY - 60)
    for minute, covered in minutes.items():
        assert diary.look(SUNDAY + 60 * minute, follow=False) == covered, minute
    assert diary.states == states


RELOADS = {  # the plan in the middle of its turn, who does not count then, and half an hour and an hour later
    "the same": ({}, ("ac", "ac", ""), "begun over"),
    "gone": (None, ("", "", ""), "begun over"),
    "shorter": ({"for": "20m"}, ("", "", ""), "begun over"),
    "longer": ({"for": "2h"}, ("ac", "ac", "ac"), "begun over begun"),
    "of others": ({"tags": "", "resources": "[b]"}, ("b", "b", ""), "begun over begun over"),
    "another reason": ({"reason": "disks"}, ("ac", "ac", ""), "begun over begun over"),
    "at another time": ({"schedule": "0 4 * * sun"}, ("", "", ""), "begun over"),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", RELOADS.values(), ids=RELOADS)
def test_a_plan_that_changes(diary: Diary, case: tuple[dict[str, str] | None, tuple[str, ...], str]) -> None:
    after, covered, states = case
    diary.write({}).look(SUNDAY)
    diary.write(*([] if after is None else [after]))
    looks = [diary.look(SUNDAY + at, follow=at < 3590) for at in (1800, 3590, HOUR)]
    assert (*looks,) == covered and diary.states == states


ENDED = {  # reloads after somebody ended the turn, and who does not count then, and a week later
    "another reason": ([{"reason": "disks"}], "", "ac"),
    "longer": ([{"for": "2h"}], "", "ac"),
    "of more": ([{"tags": "", "resources": "[a, b]"}], "", "ab"),
    "again and again": ([{"reason": "disks"}, {"for": "2h"}, {}], "", "ac"),
    "gone and back": ([None, {}], "", "ac"),
    "gone and another reason": ([None, {"reason": "disks"}], "", "ac"),
    "of others": ([{"tags": "", "resources": "[b]"}], "b", "b"),
    "at another time": ([{"schedule": "20 2 * * sun"}], "ac", "ac"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDED.values(), ids=ENDED)
def test_a_plan_that_changes_after_its_turn_was_ended(
    diary: Diary, case: tuple[list[dict[str, str] | None], str, str]
) -> None:
    """The gate must not open again over what somebody wants to count. The next turn is one like any other."""
    reloads, covered, next_week = case
    assert diary.write({}).look(SUNDAY) == "ac"
    with diary.store.writing() as session:
        finish_work(session, session.scalars(sqlalchemy.select(Maintenance)).one(), "ended", SUNDAY)
    for number, after in enumerate(reloads):
        diary.write(*([] if after is None else [after])).look(SUNDAY + 1500 + number)
    assert diary.look(SUNDAY + 1800) == covered
    assert diary.look(SUNDAY + HOUR + 1300) == ""
    assert diary.look(SUNDAY + 7 * DAY + 1200) == next_week


def test_a_clock_that_is_set(diary: Diary) -> None:
    """What was begun by hand goes on for as long as it had left. A turn of a plan never does so for longer, is over
    where the clock says so, and is held once."""
    diary.write({}).add(SUNDAY, SUNDAY + HOUR, "begun", resources=["b"])
    assert diary.look(SUNDAY + 1800) == "abc"

    def put(seconds: float, now: float) -> None:
        with diary.store.writing() as session:
            move_times(session, seconds, now)

    put(-DAY, SUNDAY + 1800)
    assert diary.look(SUNDAY + 1800 - DAY) == diary.look(SUNDAY + 3590 - DAY) == "abc"
    assert diary.look(SUNDAY + HOUR - DAY) == "" and diary.states == "begun over over"
    assert diary.look(SUNDAY) == diary.look(SUNDAY + HOUR) == "", "that turn has been held"
    assert diary.look(SUNDAY + 7 * DAY) == "ac"
    diary.add(SUNDAY + 7 * DAY, SUNDAY + 7 * DAY + HOUR, resources=["b"])
    assert diary.look(SUNDAY + 7 * DAY) == "abc"
    put(DAY, SUNDAY + 7 * DAY)
    assert diary.look(SUNDAY + 8 * DAY) == "b" == diary.look(SUNDAY + 8 * DAY + 3590)
    assert diary.look(SUNDAY + 8 * DAY + HOUR) == ""
    assert diary.states.split().count("begun") + 1 == diary.states.split().count("over") == 4


def test_a_clock_that_is_ahead_for_a_moment(diary: Diary) -> None:
    """Planned work is when it was planned: it neither ends earlier by that, nor begins for good."""
    diary.write({}).add(SUNDAY + 1800, SUNDAY + 2 * HOUR, resources=["b"])
    assert diary.look(SUNDAY + 600) == "ac"
    for at, ahead, right in (600, "abc", "ac"), (1900, "b", "b"):
        diary.look(SUNDAY + at)
        for seconds, now, covered in (1800, at, ahead), (-1800, at + 1801, right):
            with diary.store.writing() as session:
                move_times(session, seconds, SUNDAY + now)
            assert diary.look(SUNDAY + now + seconds) == covered
        if at == 600:
            assert diary.look(SUNDAY + 1799) == "ac"
            assert diary.look(SUNDAY + 1800) == "abc"
    looks = [diary.look(SUNDAY + at, follow=at > HOUR) for at in (HOUR, 2 * HOUR - 1, 2 * HOUR)]
    assert looks == ["b", "b", ""]


def test_a_turn_goes_on_as_planned_after_a_clock_was_ahead(diary: Diary) -> None:
    assert diary.write({}).look(SUNDAY + 600) == "ac"
    for seconds, now in (1800, 600), (-1800, 2401):
        with diary.store.writing() as session:
            move_times(session, seconds, SUNDAY + now)
        assert diary.look(SUNDAY + now + seconds) == "ac"
    assert (diary.look(SUNDAY + HOUR - 1), diary.look(SUNDAY + HOUR)) == ("ac", "")


def test_a_turn_that_somebody_ended_stays_so_when_the_clock_is_set_back(diary: Diary) -> None:
    assert diary.write({}).look(SUNDAY + 600) == "ac"
    with diary.store.writing() as session:
        finish_work(session, session.scalars(sqlalchemy.select(Maintenance)).one(), "ended", SUNDAY + 600)
    assert diary.look(SUNDAY + 600) == ""
    with diary.store.writing() as session:
        move_times(session, -120, SUNDAY + 600)
    assert diary.look(SUNDAY + 480) == diary.look(SUNDAY + 600) == "" and diary.states == "begun over"


def test_a_start_with_a_clock_that_is_ahead(diary: Diary) -> None:
    """And that is put right some minutes later, as without a battery: what it took for over goes on, or begins in time.
    What somebody ended stays so."""
    diary.write()
    for name, at in ("b", 0), ("a", DAY), ("c", 0):
        diary.add(SUNDAY + at, SUNDAY + at + HOUR, resources=[name])
    assert diary.look(SUNDAY) == "bc"
    with diary.store.writing() as session:
        last = sqlalchemy.select(Maintenance).order_by(Maintenance.id.desc()).limit(1)
        finish_work(session, session.scalars(last).one(), "ended", SUNDAY)
    ahead = SUNDAY + 120 * DAY
    assert diary.look(ahead) == diary.look(ahead + 60) == ""
    with diary.store.writing() as session:
        move_times(session, -120 * DAY, ahead + 90)
    looks = [diary.look(SUNDAY + at, follow=at < 100) for at in (90, HOUR - 1, HOUR, DAY, DAY + HOUR)]
    assert looks == ["b", "b", "", "a", ""]


def test_who_has_the_tag_then(diary: Diary) -> None:
    diary.write({}).look(SUNDAY)
    rows = f"  - {{name: a, {CALM}}}\n  - {{name: d, {CALM}, tags: [db]}}\n"
    diary.write({}, rows=rows)
    assert diary.look(SUNDAY + 60) == "d" and diary.states == "begun"


def test_a_group_of_a_tag(diary: Diary) -> None:
    """It has the members that count, in maintenance, too."""
    diary.write(rows=f"{ROWS}groups: [{{name: pair, tags: [db]}}]\n").add(SUNDAY, SUNDAY + HOUR, groups=["pair"])
    assert diary.look(SUNDAY) == "a"


def test_names_that_go_and_change(diary: Diary) -> None:
    """What is planned for one by its name ends with it, and follows a new name."""
    diary.write().add(SUNDAY, SUNDAY + HOUR, resources=["a"])
    diary.add(SUNDAY, SUNDAY + HOUR, resources=["b"])
    diary.add(SUNDAY + DAY, SUNDAY + DAY + HOUR, resources=["b"])
    assert diary.look(SUNDAY) == "ab"
    diary.write(rows=f"  - {{name: one, was: a, {CALM}}}\n")
    assert diary.look(SUNDAY + 1) == "one"
    assert [event[:2] for event in diary.events[2:]] == [("over", "b"), ("over", "b")]
    diary.write()
    assert "b" not in diary.look(SUNDAY + 2)


def test_a_group_with_another_name(diary: Diary) -> None:
    """What was planned for the one before ends, for nobody said that this is the same: what is bad counts."""
    diary.write().add(SUNDAY, SUNDAY + HOUR, groups=["pair"])
    assert diary.look(SUNDAY) == "ab"
    diary.write(rows=ROWS + GROUPS.replace("pair", "both"))
    assert diary.look(SUNDAY + 1) == ""
    assert diary.events[-1] == ("over", "", "pair", "group pair: maintenance is over: that is gone")


def test_a_plan_and_what_is_planned_by_hand(diary: Diary) -> None:
    """Of the same resource: it counts when both are over, whichever goes first, and each is told once."""
    diary.write({}).add(SUNDAY + 1800, SUNDAY + 2 * HOUR, resources=["a"])
    diary.add(SUNDAY - HOUR, SUNDAY + 1800, tags=["db"])
    looks = [diary.look(SUNDAY + at, follow=at < 0) for at in (-60, 0, 1800, 3590, HOUR, 2 * HOUR)]
    assert looks == ["ac", "ac", "ac", "ac", "a", ""]
    assert diary.states.split().count("begun") == diary.states.split().count("over") == 3
    diary.add(SUNDAY + 7 * DAY, SUNDAY + 7 * DAY + 2 * HOUR, resources=["a"])
    assert diary.look(SUNDAY + 7 * DAY) == "ac"
    diary.write()       # the plan goes from the inventory while both run
    assert diary.look(SUNDAY + 7 * DAY + 60) == "a"


def test_ends_hold_where_nothing_can_be_written(diary: Diary) -> None:
    """And what is to begin counts until it can be."""
    diary.write({"schedule": "0 4 * * sun"}).add(SUNDAY, SUNDAY + HOUR, resources=["b"])
    assert diary.look(SUNDAY) == "b"
    with refusing(diary.store.database, "INSERT ON event", "NEW.kind = 'maintenance'"):
        assert diary.look(SUNDAY + HOUR, follow=False) == "" == diary.look(SUNDAY + 2 * HOUR, follow=False)
    assert diary.states == "begun"
    assert diary.look(SUNDAY + 2 * HOUR + 9.5, follow=False) == "" and diary.states == "begun"     # not with each look
    assert diary.look(SUNDAY + 2 * HOUR + 10, follow=False) == "ac" and diary.states == "begun over begun"


DAMAGES = ["until_at = 'soon'", "until_at = 9e999", "scope = '{'", "scope = x'ff'", "scope = '{}'", "state = 'odd'"]


@pytest.mark.of_files  # others refuse what is no number
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_no_maintenance(diary: Diary, damage: str) -> None:
    diary.write().add(SUNDAY, SUNDAY + HOUR, "begun", resources=["b"])
    with diary.store.writing() as session:
        session.execute(sqlalchemy.text(f"UPDATE maintenance SET {damage}"))
    assert diary.look(SUNDAY + 1) == "" == diary.look(SUNDAY + 2)
    with diary.store.writing() as session:
        move_times(session, -DAY, SUNDAY + 2)
    assert diary.look(SUNDAY + 2 - DAY) == ""


def test_damaged_plans_are_none(diary: Diary) -> None:
    diary.write({})
    with diary.store.writing() as session:
        session.execute(sqlalchemy.text("UPDATE setting SET text = '[{' WHERE name = 'plans'"))
    assert diary.look(SUNDAY) == ""


def test_damaged_groups_end_no_maintenance_of_one(diary: Diary) -> None:
    """Nobody knows then that it is gone."""
    diary.write().add(SUNDAY, SUNDAY + HOUR, "begun", groups=["pair"])
    known = diary.look(SUNDAY + 1)
    with diary.store.writing() as session:
        session.execute(sqlalchemy.text("UPDATE setting SET text = '[{' WHERE name = 'gates'"))
    assert known == diary.look(SUNDAY + 2) and diary.states == ""
    assert diary.look(SUNDAY + HOUR, follow=False) == ""


# === Pages, API ==============================================================
SERVED = f"  - {{name: a, {SICK}, tags: [db]}}\n  - {{name: b, {CALM}, tags: [db, web]}}\n" + GROUPS


def clock_at(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(time.time() + seconds, datetime.timezone.utc).isoformat()


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with local_console(tmp_path_factory.mktemp("console"), SERVED, clock=time.time) as made:
        wait_for(lambda: stored_state(made, "a") == "unhealthy" and stored_state(made, "b") == "healthy")
        with made.store.writing() as session:
            session.add(make_user("viewer", role="viewer"))
            session.add(make_user("colleague"))
        made.log_in()
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "console" in request.fixturenames:
        local = request.getfixturevalue("console").log_in_as(NAME, "token")
        for work in local.api("GET", "maintenance").json:
            assert local.api("DELETE", f"maintenance/{work['id']}").status == 204
        local.api("DELETE", "resources/a/acknowledgement")


def stored_state(local: Local, name: str) -> str:
    with local.store.reading() as session:
        row = session.scalar(sqlalchemy.select(Status).join(Resource).where(Resource.name == name))
        return row.state if row else ""


def told(local: Local, kind: str = "maintenance", limit: int = 1) -> list[tuple[str, ...]]:
    found = local.api("GET", f"events?kind={kind}&limit={limit}").json
    return [tuple(one[name] for name in ("state", "resource", "group", "text", "actor")) for one in found]


def covered(local: Local) -> list[str]:
    """As the API and the aggregator have it."""
    def both() -> tuple[list[str]] | None:
        shown = [one["name"] for one in local.api("GET", "resources").json if one["maintenance"]]
        counted = [name for name in "ab" if local.context.monitor.pollers[name].counted is False]
        return (shown,) if shown == counted else None   # or it begins or ends just then

    return wait_for(both)[0]


CHOICES = [({"tags": ["db"]}, "ab", ("", "")), ({"tags": ["web"]}, "b", ("", "")), ({"all": True}, "ab", ("", "")),
           ({"groups": ["pair"]}, "ab", ("", "pair")), ({"resources": ["b"]}, "b", ("b", "")),
           ({"resources": ["a", "b"]}, "ab", ("", ""))]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("scope", "names", "about"), CHOICES)
def test_maintenance_by_choice(console: Local, scope: dict[str, Any], names: str, about: tuple[str, str]) -> None:
    reply = console.api("POST", "maintenance", {**scope, "for": "2h", "reason": "disks"})
    made = reply.json
    assert (reply.status, made["state"], made["reason"], made["actor"]) == (201, "begun", "disks", NAME)
    assert {name: value for name, value in made["scope"].items() if value} == scope
    assert covered(console) == list(names) and console.api("GET", "maintenance").json == [made]
    [event] = told(console)
    assert (event[0], *event[1:3], event[4]) == ("begun", *about, NAME)
    assert console.api("DELETE", f"maintenance/{made['id']}").status == 204
    assert covered(console) == [] and told(console)[0][:3] == ("over", *about)
    assert console.api("DELETE", f"maintenance/{made['id']}").status == 404


def test_a_later_start(console: Local) -> None:
    """Planned, shown ahead, begun and ended by the monitor, each told once."""
    start, until = clock_at(600), clock_at(3600)
    made = console.api("POST", "resources/b/maintenance", {"start": start, "until": until, "reason": "x"}).json
    assert made["maintenance"] is None and told(console)[0][:2] == ("planned", "b")
    [shown] = console.api("GET", "maintenance").json
    assert shown["state"] == "planned" and covered(console) == []
    with console.store.writing() as session:    # its time comes
        session.execute(sqlalchemy.update(Maintenance).values(start_at=time.time()))
        revise(session)
    wait_for(lambda: covered(console) == ["b"])
    assert [event[0] for event in told(console, limit=2)] == ["begun", "planned"]
    order = {"tags": ["db"], "start": clock_at(DAY), "for": "1h", "reason": "y"}
    later = console.api("POST", "maintenance", order).json
    assert console.api("DELETE", f"maintenance/{later['id']}").status == 204
    assert told(console)[0][0] == "over" and "cancelled" in told(console)[0][3]
    assert console.api("DELETE", "resources/b/maintenance").status == 204
    assert covered(console) == []


def test_the_end_of_what_others_have_cancels_nothing_that_is_planned(console: Local) -> None:
    """It ended nothing, and later work was lost."""
    console.api("POST", "maintenance", {"tags": ["db"], "for": "2h", "reason": "disks"})
    console.api("POST", "resources/b/maintenance", {"start": clock_at(DAY), "for": "1h", "reason": "kernel"})
    assert console.api("DELETE", "resources/b/maintenance").status == 409
    assert {work["reason"] for work in console.api("GET", "maintenance").json} == {"disks", "kernel"}


def test_the_end_of_what_holds_cancels_nothing_that_is_planned(console: Local) -> None:
    """Next week's was lost with it, without a word; without any that holds, it is what one means."""
    console.api("POST", "resources/b/maintenance", {"for": "1h", "reason": "disks"})
    console.api("POST", "resources/b/maintenance", {"start": clock_at(7 * DAY), "for": "1h", "reason": "kernel"})
    assert console.api("DELETE", "resources/b/maintenance").status == 204
    assert [work["reason"] for work in console.api("GET", "maintenance").json] == ["kernel"]
    assert console.api("DELETE", "resources/b/maintenance").status == 204
    assert console.api("GET", "maintenance").json == []


def test_maintenance_again_is_in_place_of_the_first(console: Local) -> None:
    for reason in ("x", "y"):
        reply = console.api("POST", "resources/b/maintenance", {"for": "1h", "reason": reason})
        assert (reply.status, reply.json["maintenance"]["reason"]) == (200, reason)
    assert [work["reason"] for work in console.api("GET", "maintenance").json] == ["y"]
    assert [event[0] for event in told(console, limit=3)] == ["begun", "over", "begun"]


def test_nobody_cuts_the_time_that_another_needs(console: Local) -> None:
    """Not unawares: the resource would count while that one works on it."""
    def begin(hours: int) -> Any:
        return console.api("POST", "resources/b/maintenance", {"for": f"{hours}h", "reason": str(hours)})

    begin(3)
    console.log_in_as("colleague", "token")
    reply = begin(1)
    assert reply.status == 409 and f"{NAME} needs it until 2" in reply.json["detail"] and "(3)" in reply.json["detail"]
    assert [work["reason"] for work in console.api("GET", "maintenance").json] == ["3"]
    assert begin(4).status == 200       # who worked first has at least as long
    assert begin(2).status == 200       # one's own
    assert [work["reason"] for work in console.api("GET", "maintenance").json] == ["2"]


def test_one_resource_does_not_end_what_is_of_others_too(console: Local) -> None:
    made = console.api("POST", "maintenance", {"tags": ["db"], "for": "2h", "reason": "disks"}).json
    reply = console.api("DELETE", "resources/b/maintenance")
    assert (reply.status, f"(tag db); end that, number {made['id']}" in reply.json["detail"]) == (409, True)
    assert covered(console) == ["a", "b"]


WRONG = [
    ({"for": "2h", "reason": "x"}, ""),
    ({"for": "1x", "reason": "x", "all": True}, "for"),
    ({"for": "0s", "reason": "x", "all": True}, "for"),
    ({"for": "2h", "all": True}, "reason"),
    ({"reason": "x", "all": True}, "until"),
    ({"for": "2h", "until": "2099-01-01T00:00:00Z", "reason": "x", "all": True}, "until"),
    ({"for": "2h", "start": "2020-01-01T00:00:00Z", "reason": "x", "all": True}, "start"),
    ({"for": "2h", "start": "2099-01-01T00:00:00Z", "reason": "x", "all": True}, "start"),
    ({"for": "900d", "reason": "x", "all": True}, "for"),
    ({"for": "2h", "reason": "x", "tags": ["nobody"]}, "tags"),
    ({"for": "2h", "reason": "x", "groups": ["nobody"]}, "groups"),
    ({"for": "2h", "reason": "x", "resources": ["nobody"]}, "resources"),
    ({"for": "2h", "reason": "x", "all": True, "tags": ["db"]}, ""),
    ({"for": "2h", "reason": "x", "tags": ["db"] * 1001}, "tags"),
]


@pytest.mark.parametrize(("body", "field"), WRONG)
def test_bad_orders(console: Local, body: dict[str, Any], field: str) -> None:
    reply = console.api("POST", "maintenance", body)
    assert (reply.status, list(reply.fields)) == (422, [field])
    assert reply.json["detail"][:1].isalpha()
    assert console.api("GET", "maintenance").json == []
    for number in ("0", "x", "9" * 30, "-1"):
        assert console.api("DELETE", f"maintenance/{number}").status == 404


def test_of_many_unknown_names_the_first_is_told(console: Local) -> None:
    """To look for names near to 10,000 of them would lock the database for minutes."""
    reply = console.api("POST", "maintenance", {"for": "1h", "reason": "x", "resources": ["bb", "cc", "nobody"]})
    assert reply.fields == {"resources": "no resource has this name; did you mean b?"}


def test_no_more_than_can_be_looked_through(console: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthchecker, "PLANNED_COUNT", 2)
    order = {"tags": ["web"], "start": clock_at(DAY), "for": "1h", "reason": "x"}
    assert [console.api("POST", "maintenance", order).status for _ in range(3)] == [201, 201, 409]
    reply = console.api("POST", "resources/b/maintenance", {"for": "1h", "reason": "x"})
    assert (reply.status, reply.json["detail"]) == (409, "2 are planned already; end one first")
    assert len(console.api("GET", "maintenance").json) == 2
    with console.store.writing() as session:
        session.execute(sqlalchemy.update(Maintenance).values(state="over", turn_at=time.time()))
    assert console.api("POST", "maintenance", order).status == 201, "what is over does not count"


def test_what_is_removed_is_seen_no_more(console: Local) -> None:
    """And an event says so."""
    made = console.api("POST", "resources", {"name": "d", "platform": "simulated", "mean_healthy": 0.000001,
                                             "mean_unhealthy": 1000000, "interval": 1, "critical": False})
    assert made.status == 201
    wait_for(lambda: stored_state(console, "d") == "unhealthy")
    assert console.api("POST", "resources/d/acknowledgement", {"comment": "x"}).status == 200
    assert console.api("DELETE", "resources/d").status == 204
    assert told(console, "acknowledgement") == [("over", "d", "", "removed", NAME)]


def test_what_was_planned_for_a_resource_goes_with_it(console: Local) -> None:
    """Another one of its name is another machine: the gate was open over it, whatever state that was in."""
    new = {"name": "d", "platform": "simulated", "mean_healthy": 1000000, "interval": 1}
    assert console.api("POST", "resources", new).status == 201
    for start in ({}, {"start": clock_at(DAY)}):
        order = {"for": "7d", "reason": "scrapped", **start}
        assert console.api("POST", "resources/d/maintenance", order).status == 200
    console.api("POST", "resources/b/maintenance", {"for": "1h", "reason": "of another"})
    console.api("POST", "maintenance", {"for": "1h", "reason": "of both", "resources": ["b", "d"]})
    assert console.api("DELETE", "resources/d").status == 204
    ends = {("over", "d", "", text, NAME) for text in ("maintenance ended", "maintenance cancelled")}
    assert set(told(console, limit=3)) > ends, "and by nobody later, whose name could be another's by then"
    assert console.api("POST", "resources", new).json["maintenance"] is None
    works = {work["reason"]: work["scope"]["resources"] for work in console.api("GET", "maintenance").json}
    assert works == {"of another": ["b"], "of both": ["b"]}
    assert console.api("DELETE", "resources/d").status == 204


def test_what_leaves_the_inventory_is_seen_no_more(diary: Diary) -> None:
    diary.write()
    with diary.store.writing() as session:
        for row in session.scalars(sqlalchemy.select(Resource)):
            session.add(Acknowledgement(resource_id=row.id, at=SUNDAY, actor="me", comment="on my way"))
    diary.write(rows=f"  - {{name: a, {CALM}, tags: [db]}}\n  - {{name: b, {CALM}}}\n" + GROUPS)
    with diary.store.writing() as session:
        end_acknowledgements(session, [], SUNDAY)
    with diary.store.reading() as session:
        found = session.scalars(sqlalchemy.select(Event).filter_by(kind="acknowledgement")).all()
        assert [(one.resource, one.state, one.text) for one in found] == [("c", "over", "removed")]
        assert len(session.scalars(sqlalchemy.select(Acknowledgement)).all()) == 2


def test_seen(console: Local) -> None:
    """Said of what is unhealthy, by who may, shown everywhere, and taken back."""
    assert console.api("POST", "resources/b/acknowledgement", {"comment": "x"}).status == 409
    assert console.api("POST", "resources/a/acknowledgement", {}).fields.keys() == {"comment"}
    seen = console.api("POST", "resources/a/acknowledgement", {"comment": "on my way"}).json["acknowledgement"]
    assert (seen["actor"], seen["comment"]) == (NAME, "on my way")
    assert told(console, "acknowledgement") == [("begun", "a", "", "seen: on my way", NAME)]
    console.log_in_as(NAME)
    for path in ("/-/", "/-/resources/a"):
        assert "on my way" in console.ask("GET", path).body
    assert console.form("/-/resources/a/acknowledgement/end", {}).status == 303
    assert "Take back" not in console.ask("GET", "/-/resources/a").body
    assert console.form("/-/resources/a/acknowledgement", {"comment": ""}).status == 422
    console.log_in_as("viewer")
    for path in ("resources/a/acknowledgement", "maintenance"):
        assert console.api("POST", path, {}, headers={"Origin": "http://localhost"}).status == 403


def test_forms(console: Local) -> None:
    """The overview shows what is chosen and what was typed; its button ends it."""
    console.log_in_as(NAME)
    page = console.ask("GET", "/-/").body
    for option in ("all", "tags:db", "tags:web", "groups:pair"):
        assert f'<option value="{option}"' in page
    fields = {"scope": "tags:web", "minutes": "60", "reason": "new cables", "start": ""}
    for wrong in ({"minutes": "x"}, {"start": "soon"}, {"scope": "tags:none"}, {"scope": ""}, {"reason": ""}):
        reply = console.form("/-/maintenance", fields | wrong)
        assert (reply.status == 422 and 'value="new cables"' in reply.body) or wrong == {"reason": ""}
    assert console.form("/-/maintenance", fields).status == 303
    [made] = console.api("GET", "maintenance").json
    assert made["scope"]["tags"] == ["web"]
    for path in ("/-/", "/-/resources/b"):
        shown = console.ask("GET", path).body
        assert "new cables" in shown and "tag web" in shown
    assert "new cables" not in console.ask("GET", "/-/resources/a").body
    assert console.form(f"/-/maintenance/{made['id']}/end", {}).status == 303
    tomorrow = (datetime.datetime.now() + datetime.timedelta(days=1)).isoformat(timespec="minutes")
    assert console.form("/-/resources/b/maintenance", fields | {"start": tomorrow}).status == 303
    assert "Next maintenance" in console.ask("GET", "/-/resources/b").body
    [made] = console.api("GET", "maintenance").json
    assert made["state"] == "planned"
    start = datetime.datetime.fromisoformat(made["start"].replace("Z", "+00:00"))
    assert start.timestamp() == datetime.datetime.fromisoformat(tomorrow).timestamp()


@pytest.mark.long
def test_a_plan_is_shown_ahead(tmp_path: Path) -> None:
    """In a service in the middle of a turn: it counts no one of them, and that can be ended."""
    schedule = f"{datetime.datetime.now(datetime.timezone.utc):%M %H} * * *"
    plans = f"maintenance: [{{schedule: '{schedule}', for: 1h, tags: [web], reason: patches}}]\n"
    with local_console(tmp_path, SERVED + plans, clock=time.time) as made:
        made.log_in()
        now, ahead = made.api("GET", "maintenance").json
        assert (now["state"], ahead["state"], ahead["id"]) == ("begun", "planned", None)
        assert now["schedule"] == ahead["schedule"] == schedule and covered(made) == ["b"]
        assert made.api("DELETE", f"maintenance/{now['id']}").status == 204
        assert covered(made) == [], "this turn is over"
        made.log_in_as(NAME)
        assert schedule in made.ask("GET", "/-/").body and "Next maintenance" in made.ask("GET", "/-/resources/b").body


# === Commands ================================================================
@pytest.mark.long
def test_commands(tmp_path: Path) -> None:
    """With no service, whose next start takes it up; and while it runs."""
    path = write_inventory(tmp_path, SERVED)
    if settings_of(tmp_path):
        execute(database_in(tmp_path), "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")    # as before any start
    assert "start the service first" in run(path, "maintenance", "list").stderr
    prepared_database(tmp_path)
    with Service(path):
        pass
    for wrong, why in (
        (["--all", "--for", "1x", "--reason", "x"], "for: must be such as 90s, 30m or 2h"),
        (["--all", "--for", "0s", "--reason", "x"], "for: must be"),
        (["--all", "--for", "1h", "--at", "soon", "--reason", "x"], "start: must be such as 2026-11-28 02:00"),
        (["--all", "--for", "1h", "--at", "2020-01-01 02:00", "--reason", "x"], "start: must not be past"),
        (["--for", "1h", "--reason", "x"], "say what: --tag, --group or --resource NAME, or else --all"),
        (["--all", "--tag", "db", "--for", "1h", "--reason", "x"], "say what: --tag"),
        (["--tag", "dbs", "--for", "1h", "--reason", "x"], "no tag has this name; did you mean db?"),
    ):
        done = run(path, "maintenance", "start", *wrong)
        assert (done.returncode, why in done.stderr) == (2, True), done
    done = run(path, "maintenance", "start", "--tag", "db", "--for", "2h", "--reason", "the\x9b\u202emove")
    assert done.returncode == 0 and "tag db  the move\n" in done.stdout     # a reason is no order to a terminal
    with Service(path, deadline=60) as service:
        service.wait_status("/-/readyz", 200)  # a is sick
        assert run(path, "maintenance", "end", "--tag", "db").returncode == 0
        service.wait_status("/-/readyz", 503)
        done = run(path, "maintenance", "start", "--resource", "a", "--resource", "b", "--for", "1d", "--reason", "x")
        number = done.stdout.splitlines()[-1].split()[0]
        service.wait_status("/-/readyz", 200)
        assert "a, b" in run(path, "maintenance", "list").stdout
        assert run(path, "maintenance", "end", number).returncode == 0
        service.wait_status("/-/readyz", 503)
        later = f"{datetime.date.today() + datetime.timedelta(days=1)} 02:00"
        done = run(path, "maintenance", "start", "--tag", "web", "--for", "1h", "--at", later, "--reason", "cables")
        assert done.returncode == 0 and re.search(rf"planned +{later}:00.* tag web +cables", done.stdout), done
    assert "nothing was planned here for exactly that" in run(path, "maintenance", "end", "--all").stderr
    assert "say what: --tag, --group or --resource NAME, or else --all" in run(path, "maintenance", "end").stderr
    assert "NUMBER or what it is of, not both" in run(path, "maintenance", "end", number, "--tag", "db").stderr
    assert run(path, "maintenance", "end", number).returncode == 2


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows takes no time zone from the environment")
def test_a_time_that_clocks_skip_is_right_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a schedule's is; of those that come twice, the first."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        chosen = [healthchecker.chosen_moment(text) for text in (
            "2026-03-29 01:59:30", "2026-03-29 02:30:10", "2026-03-29 03:00", "2026-10-25 02:30",
            "2026-03-29T02:30+00:00")]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert chosen == ["2026-03-29T01:59:30+01:00", "2026-03-29T03:00:00+02:00", "2026-03-29T03:00:00+02:00",
                      "2026-10-25T02:30:00+02:00", "2026-03-29T04:30:00+02:00"]


def test_what_cannot_be_written_is_tried_every_ten_seconds(tmp_path: Path) -> None:
    """On a full disk, say: the monitor would try with each look, and wait for a locked database each time."""
    store, now = store_in(tmp_path), 1_700_000_000.0
    with store.writing() as session:
        session.add(Maintenance(state="begun", start_at=now - 100, until_at=now - 1, scope='{"all":true}', reason="x",
                                actor="a"))  # fmt: skip
    keeper, tries = MaintenanceKeeper(store), list[float]()

    @contextlib.contextmanager
    def writing(**_how: Any) -> Iterator[Any]:
        tries.append(now)
        raise OSError("database or disk is full")
        yield

    with pytest.MonkeyPatch.context() as full:
        full.setattr(store, "writing", writing)
        for number in range(41):
            keeper.covered(now + 0.5 * number)
    assert len(tries) == 3
    assert not keeper.covered(now + 40)
    with store.reading() as session:
        assert session.scalar(sqlalchemy.select(Maintenance.state)) == "over"
    store.close()
