"""Fixtures for all tests: SSH servers, a watch over threads and descriptors; at the end, what was not tested.

What is random, or shows only when it is repeated, runs a few times, and with `--soak` (make soak) alone and in full."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import shutil
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest
from postgres import URL_FILE, Postgres, Program, missing_postgres, open_pgbouncer, open_postgres
from pwsh import Engine, open_engine
from sshd import SSHD, SYSTEM_PATH, ParamikoSshd, Sshd, open_sshd, wait_for  # wait_for: for tests to import

# So that `import healthchecker` works from whatever folder pytest is started in.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

collect_ignore = [] if sys.platform == "win32" else ["test_windows_local.py"]  # powershell.exe is Windows' own
__all__ = ["EACH_DATABASE", "NO_PASSWORD_LOGIN", "folder_with_database", "no_leaks", "open_descriptors", "wait_for"]
# The files that take longest are begun first: one of them would be left alone at the end.
BEGUN_FIRST = (
    "windows_verdicts poll transport sharing recorder postgres pages windows_local windows_shells windows_endpoints "
    "windows_accounts sessions powershell uplink storage notify workers command_line accounts overrides protocols "
    "serve end_to_end middleware history security real_shells soak overview bastions api status real_hosts crashes "
    "windows_kept files hostile_clients reload gate groups incidents metrics sshd windows_service vault maintenance "
    "push wsman_server night endpoints proxy windows_python probes overload readme"
).split()
# These wait more than they compute, and their tests share nothing: several workers run one of them. Not in wine, where
# they compute.
SHARES = {} if sys.platform == "win32" else {
    "test_poll.py": 4, "test_sharing.py": 3, "test_transport.py": 3, "test_recorder.py": 3, "test_uplink.py": 2,
    "test_sessions.py": 2, "test_overrides.py": 2, "test_postgres.py": 2, "test_powershell.py": 2}
# These share PowerShell's processes, so one worker runs them all.
WITH_ENGINE = {f"test_windows_{name}.py" for name in ("verdicts", "shells", "endpoints", "accounts")}
# .NET compiles nothing twice: a process that serves for minutes does not gain by it.
SHORT_LIVED = {"DOTNET_TieredPGO": "0", "DOTNET_TC_CallCounting": "0"}
DATABASES = ["SQLite", "PostgreSQL"][:1 if sys.platform == "win32" else 2]
# What both hold is told apart by few tests: in the short run SQLite is enough, and what only PostgreSQL has.
EACH_DATABASE = [pytest.param(kind, marks=[pytest.mark.long] * (kind != "SQLite")) for kind in DATABASES]
NO_PASSWORD_LOGIN = "password login needs root, to create a throw-away account"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="only tests that repeat something, in full")
    parser.addoption("--postgresql", action="store_true", help="on PostgreSQL also what else runs on SQLite alone")


def pytest_configure(config: pytest.Config) -> None:
    examples = 400 if config.getoption("soak") else 50
    hypothesis.settings.register_profile("healthchecker", max_examples=examples, deadline=None)
    hypothesis.settings.load_profile("healthchecker")
    config.addinivalue_line("markers", "of_files: of what only a database in a file has")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What has the folder of a database runs once for each kind; what is of files, or on Windows, for SQLite alone."""
    if "database_folder" in metafunc.fixturenames:
        alone = metafunc.definition.get_closest_marker("of_files")
        metafunc.parametrize("database_folder", EACH_DATABASE[:1] if alone else EACH_DATABASE, indirect=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(BEGUN_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if config.getoption("postgresql"):
        items[:] = [item for item in items if not item.get_closest_marker("of_files")]
    if config.getoption("soak"):
        items[:] = [item for item in items if "often" in item.fixturenames or item.get_closest_marker("hypothesis")]


def pytest_collection_finish() -> None:
    """What was imported and collected stays; each full collection would look through it for 0.2 s."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """As --dist loadfile has it, but for those with the engine."""
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415  # whoever runs without xdist needs none

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            share = zlib.crc32(nodeid.encode()) % SHARES.get(Path(file).name, 1)
            return "engine" if Path(file).name in WITH_ENGINE else f"{file} {share}"

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def often(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """The first number in the suite, the second one with `--soak`."""
    return lambda few, many: many if request.config.getoption("soak") else few


def pytest_report_header() -> str:
    return f"sshd: {SSHD or 'not found, a server made with paramiko takes its place'}"


def missing_parts() -> dict[str, str]:
    """What of packages.txt is not here: how a skipped test names it, and its package."""
    text = Path(__file__).with_name("packages.txt").read_text(encoding="utf-8")
    packages = re.findall(r"^([\w.-]+) +(\S+)", text, re.MULTILINE)
    return {part: package for package, part in packages if not shutil.which(part, path=SYSTEM_PATH)}


def not_tested(reasons: Mapping[str, int], missing: Mapping[str, str]) -> Counter[str]:
    """Lines for the reasons of skipped tests, one for each missing part, with the number of tests."""
    lines: Counter[str] = Counter()
    for reason, number in reasons.items():
        part = next((word for word in re.findall(r"[\w-]+", reason) if word in missing), "")
        lines[f"{part} is missing (apt-get install {missing[part]})" if part else reason] += number
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    for line, number in sorted(not_tested(reasons, missing_parts()).items()):
        terminalreporter.write_line(f"not tested: {line}: {number} test{'s' if number > 1 else ''}")


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """PowerShell, for all tests of this process: what one has started is there for the next one."""
    with open_engine() as engine:
        engine.environment.update(SHORT_LIVED)
        yield engine


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with open_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def pgbouncer(postgres: Postgres) -> Iterator[Program]:
    with open_pgbouncer(postgres) as server:
        yield server


@pytest.fixture
def database_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with_database(request, tmp_path_factory)


def folder_with_database(request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> Path:
    """A folder whose database, as tests/postgres.py finds it, is of the kind that a fixture's parameter says, or the
    command line."""
    folder = factory.mktemp("database")
    if getattr(request, "param", DATABASES[request.config.getoption("postgresql")]) == "PostgreSQL":
        prepare_postgresql(request, folder)
    return folder


def prepare_postgresql(request: pytest.FixtureRequest, folder: Path) -> None:
    if why := missing_postgres():
        pytest.skip(why)
    server = request.getfixturevalue("postgres")
    (folder / URL_FILE).write_text(server.url(server.prepared()), encoding="utf-8")


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """By the command line it has a database of PostgreSQL, as folder_with_database's."""
    if request.config.getoption("postgresql"):
        prepare_postgresql(request, tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def _session_sshd() -> Iterator[Sshd | ParamikoSshd]:
    with open_sshd() as server:
        yield server


@pytest.fixture
def sshd(_session_sshd: Sshd | ParamikoSshd) -> Iterator[Sshd | ParamikoSshd]:
    """The SSH server of this run; sessions and a freeze that a test leaves behind end with it."""
    yield _session_sshd
    _session_sshd.thaw()
    _session_sshd.kill_sessions()


@pytest.fixture
def password(sshd: Sshd | ParamikoSshd) -> str:
    """The password of the account on `sshd`."""
    if not sshd.password:
        pytest.skip(NO_PASSWORD_LOGIN)
    return sshd.password


def open_descriptors() -> int:
    """Open descriptors of this process; on Windows its handles, of which a few come and go by themselves.

    Those of the memory that it shares do not count: multiprocessing takes it in blocks, and never gives one back.
    """
    if sys.platform == "win32":
        count = ctypes.c_ulong()
        ctypes.windll.kernel32.GetProcessHandleCount(ctypes.c_void_p(-1), ctypes.byref(count))
        return count.value
    found = 0
    for link in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them is closed by now
            found += "/pym-" not in (os.readlink(link) if link.is_symlink() else "")
    return found


def late_logins() -> int:
    """How many logins wait for what the host says after the poll."""
    return sum(thread.name == "login" for thread in threading.enumerate())


@contextlib.contextmanager
def no_leaks(deadline: float = 60.0, slack: int = 20 if sys.platform == "win32" else 0) -> Iterator[None]:
    """Fail if there are more threads or descriptors `deadline` seconds after the block than before it."""
    threads, descriptors = threading.active_count(), open_descriptors()
    yield
    with contextlib.suppress(AssertionError):  # the assertion below names the figures
        wait_for(
            lambda: threading.active_count() <= threads and open_descriptors() <= descriptors + slack,
            deadline,
        )
    left = [thread.name for thread in threading.enumerate()]
    assert len(left) <= threads, f"{threads} threads before, now {left}"
    assert open_descriptors() <= descriptors + slack, (
        f"{descriptors} descriptors before, now {open_descriptors()}"
    )
