"""The leases in a file, and the printed gate that reads it: in every server, whatever happens to the file."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import wait_for
from hypothesis import given
from hypothesis import strategies as st
from service import PROGRAM, Service, environment, run, run_cheaply, write_inventory
from sshd import SYSTEM_PATH
from test_groups import GROUPS, PATH_TABLE, PATHS, STEPS, TREES, Clock, gates_with

from healthchecker import (
    Gate,
    HealthAggregator,
    Lease,
    LeaseFile,
    UsageError,
    lease_clock,
    lease_identity,
    middleware_text,
    strictest,
)

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="of POSIX: owners, modes, links")
CALM = "platform: simulated, mean_healthy: 1000000, interval: 30"
BRIEF = "platform: simulated, mean_healthy: 1000000, interval: 1, timeout: 1"  # a lease of 5 s
BAD = "platform: simulated, mean_healthy: 0.000001, mean_unhealthy: 1000000, interval: 1, timeout: 1, fall: 1"
SITE, GENERATION = 17, 15  # cells
NOWHERE = Path("nowhere")


@functools.cache
def printed_text() -> str:
    """The middleware of NOWHERE. Finding the text of a class in a file of a megabyte takes half a second."""
    return middleware_text(NOWHERE)


def printed(folder: Path, path: Path | None = None) -> ModuleType:
    """The middleware as it is printed, imported from a file."""
    place = folder / "hc_gate.py"
    text = printed_text().replace(ascii(str(NOWHERE)), ascii(str(path or folder / "lease")))
    place.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("hc_gate", place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["hc_gate"] = module
    spec.loader.exec_module(module)
    return module


def change(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


# --- the file ---
def test_layout(tmp_path: Path) -> None:
    """As the section's comment has it."""
    path = tmp_path / "lease"
    file = LeaseFile(path, ["replicas", "/größe", "/a"])
    file.put("", 1234.5, 7.0)
    file.put("/a", 0.0, 99.5)
    content = path.read_bytes()
    assert content[: 8 * GENERATION].rstrip(b"\0").decode() == lease_identity()
    generation, count, *slots = struct.unpack("6d", content[8 * GENERATION : 8 * (GENERATION + 6)])
    assert generation and count == 4 and len(content) % 8 == 0
    assert json.loads(content[8 * (GENERATION + 6) :]) == ["", "/a", "/größe", "replicas"]
    assert slots == [1234.5, -99.5, 0.0, 0.0]
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o777 == 0o644
    file.close()
    file.put("", 1e9, 0.0)
    assert struct.unpack_from("d", path.read_bytes(), 8 * GENERATION) == (0.0,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["lease"]


NO_FILE, ANOTHER = "is a folder, a link or a device", "is another file, which would be lost"
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda path: path.mkdir(), NO_FILE),
    "a link": (lambda path: path.symlink_to(path.with_name("inventory.yaml")), NO_FILE),
    "a link to nothing": (lambda path: path.symlink_to("gone"), NO_FILE),
    "a pipe": (lambda path: os.mkfifo(path), NO_FILE),
    "another file": (lambda path: path.write_text("notes" * 99, encoding="utf-8"), ANOTHER),
    "a disk's image": (lambda path: path.write_bytes(bytes(1024) + b"ext4"), ANOTHER),
    "a disk's image, larger": (lambda path: path.write_bytes(bytes(1 << 20) + b"ext4"), ANOTHER),
    "a folder for everybody": (lambda path: path.parent.chmod(0o777), "others can write to its folder"),
    "a folder like /tmp": (lambda path: path.parent.chmod(0o1777), "others can write to its folder"),
    "no folder": (lambda path: path.parent.rename(path.parent.with_name("moved")), "cannot be used: No such file"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), PLACES.values(), ids=PLACES)
def test_place_that_is_not_the_service_s(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    if sys.platform == "win32" and message != ANOTHER:
        pytest.skip("of POSIX: owners, modes, links")
    path = tmp_path / "folder" / "lease"
    path.parent.mkdir()
    (path.parent / "inventory.yaml").touch()
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError) as caught:
        LeaseFile(path, [])
    assert str(caught.value).startswith(f"service.lease_file {path}: {message}")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="gives a file away, which only root can")
def test_file_of_somebody_else(tmp_path: Path) -> None:
    LeaseFile(tmp_path / "lease", []).close()
    os.chown(tmp_path / "lease", 12345, 12345)
    with pytest.raises(UsageError, match="belongs to another account"):
        LeaseFile(tmp_path / "lease", [])


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="becomes another account, as only root can")
def test_file_of_a_start_by_root() -> None:
    """Somebody ran it by hand: the service goes on in its own folder, and root then with the service's file."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 12345, 12345)
        path = Path(folder) / "lease"
        for account, owner in ((0, 0), (12345, 12345), (0, 0)):
            os.seteuid(account)
            try:
                with contextlib.closing(LeaseFile(path, [])) as file:
                    file.put("", math.inf, 0.0)
                    assert path.stat().st_uid == owner
            finally:
                os.seteuid(0)


@pytest.mark.parametrize("command", [[], ["check"]], ids=["a start", "check"])
def test_a_start_with_a_wrong_place(command: list[str], tmp_path: Path) -> None:
    """One line, exit code 2, and no database."""
    (tmp_path / "lease").mkdir()
    inventory = write_inventory(tmp_path, f"  - {{name: a, {CALM}}}", "  lease_file: lease")
    code, output = run_cheaply("--inventory", str(inventory), *command)
    assert code == 2
    assert output.splitlines()[0] == f"service.lease_file {tmp_path / 'lease'}: {NO_FILE}"
    assert not (tmp_path / "healthchecker.db").exists()


def test_no_file_of_ours(tmp_path: Path) -> None:
    inventory = write_inventory(tmp_path, "", "  lease_file: inventory.yaml")
    code, output = run_cheaply("--inventory", str(inventory))
    assert (code, len(output.splitlines())) == (2, 1)
    assert output.startswith("inventory.yaml:5:15: service.lease_file: is the inventory, too; name another file")


@given(TREES, STEPS)
def test_the_file_says_what_the_leases_say(tmp_path_factory: Any, tree: tuple[Any, ...], steps: Any) -> None:
    """Of any tree of groups at any moment; only that without who watches nothing is open for ever."""
    shapes, needs = tree[: len(GROUPS)], tree[len(GROUPS) :]
    groups = [{"name": name, "healthy": quorum, "members": sorted(members)}
              for name, (quorum, members) in zip(GROUPS, shapes, strict=True)]  # fmt: skip
    gates, clock = gates_with(groups, dict(zip(PATHS, map(sorted, needs), strict=True))), Clock()
    folder = tmp_path_factory.mktemp("leases")
    file, reader = LeaseFile(folder / "lease", gates.members({})), printed(folder)
    aggregator = HealthAggregator(Lease(gates.members({})), clock, file.put)
    aggregator.arrange(gates, {})
    aggregator.start()
    table = reader.read(str(folder / "lease"))
    for what, leaf, seconds in steps:
        if what in ("up", "down"):
            aggregator.set_resource(leaf, what == "up", ttl=seconds, opens=seconds)
        elif what == "wait":
            clock.now += seconds
        elif what == "beat":
            aggregator.beat("recorder", seconds)
        aggregator.note_expiry()
        for name in ("", *GROUPS, *PATHS):
            lease, end = aggregator.lease.parts[name] if name else aggregator.lease, table.cells[table.gates[name]]
            assert end <= lease.until.value or end <= 0
            assert lease.until.value == math.inf or (end > clock.now) == (lease.until.value > clock.now)
            assert end < math.inf
            if lease.until.value <= 0:
                assert end == -lease.opens.value
    file.close()


# --- the reader: what is closed ---
@contextlib.contextmanager
def opened(folder: Path, *names: str) -> Iterator[tuple[LeaseFile, Any]]:
    """A file in which everything is open, and a reader that has seen it."""
    file, module = LeaseFile(folder / "lease", names), printed(folder)
    for name in ("", *names):
        file.put(name, lease_clock() + 1000, 0.0)
    leases = module.Leases(str(folder / "lease"))
    assert leases.wait("/") == 0
    yield file, leases
    file.close()


def test_a_lease_that_ends_is_closed(tmp_path: Path) -> None:
    with opened(tmp_path, "/r") as (file, leases):
        file.put("", lease_clock() - 1, 0.0)
        assert leases.wait("/") == 1
        assert leases.wait("/r/x") == 0
        file.put("", 0.0, lease_clock() + 1000)
        assert 900 < leases.wait("/") <= 1001  # a sum may be rounded up
        file.put("", 0.0, math.inf)
        assert leases.wait("/") == 3600
        file.put("", math.nan, 0.0)
        assert leases.wait("/") >= 1


def test_nobody_is_refused_while_another_one_looks(tmp_path: Path) -> None:
    """From the first request on."""
    with opened(tmp_path) as (_, leases):
        new = type(leases)(str(tmp_path / "lease"))
        new._look = math.inf  # as it is for the others while one thread reads the file
        assert new.wait("/") == 0


def test_the_end_of_the_service_closes_at_once(tmp_path: Path) -> None:
    with opened(tmp_path, "/r", "g") as (file, leases):
        assert leases.is_healthy() and leases.is_healthy("g") and leases.is_healthy("/r")
        with pytest.raises(LookupError):
            leases.is_healthy("unknown")
        file.close()
        file.put("", lease_clock() + 1000, 0.0)  # of a poll that was under way
        assert [leases.wait(path) for path in ("/", "/r")] == [1, 1]
        assert not any(map(leases.is_healthy, ("", "g", "/r")))


@pytest.mark.long
@pytest.mark.windows
def test_another_start_closes_what_was_mapped(tmp_path: Path) -> None:
    """After a kill -9, too: at once; then the new file counts."""
    with opened(tmp_path, "/r") as (_, leases):
        new = LeaseFile(tmp_path / "lease", ["/new", "/r"])
        assert leases.wait("/") == 1
        new.put("/new", lease_clock() + 1000, 0.0)
        wait_for(lambda: leases.wait("/new/x") == 0)
        assert (leases.wait("/"), leases.wait("/r")) == (1, 1)
        new.close()


def test_another_file_is_followed_within_a_second(tmp_path: Path) -> None:
    """By the reader's clock, which stands still here but for that second."""
    with opened(tmp_path, "/r") as (_, leases):
        clock = Clock()
        clock.now = lease_clock() + 10
        sys.modules["hc_gate"].clock = clock    # type: ignore[attr-defined]
        assert leases.wait("/") == 0
        new = LeaseFile(tmp_path / "lease", ["/new", "/r"])
        new.put("", clock.now + 1000, 0.0)
        assert leases.wait("/") == 1
        clock.now += 1
        assert leases.wait("/") == 0
        new.close()


@POSIX
def test_a_file_that_is_gone_is_closed_and_may_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Within a second, and the log says it once."""
    caplog.set_level(logging.WARNING)
    with opened(tmp_path) as (_, leases):
        (tmp_path / "lease").rename(tmp_path / "moved")
        wait_for(lambda: leases.wait("/") == 1)
        assert "closed" in caplog.text and "No such file" in caplog.text
        (tmp_path / "moved").rename(tmp_path / "lease")
        wait_for(lambda: leases.wait("/") == 0)
        assert len(caplog.records) == 2


@pytest.mark.long
@pytest.mark.windows
def test_two_services_with_one_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The later one has it, and the other says so; it has it again once that one has ended."""
    with opened(tmp_path, "/r") as (file, leases):
        file.begin()
        later = LeaseFile(tmp_path / "lease", ["/a", "/r"])
        for name in ("", "/r"):
            file.put(name, lease_clock() + 1000, 0.0)
        later.put("/r", lease_clock() + 1000, 0.0)
        wait_for(lambda: leases.wait("/r") == 0)
        assert leases.wait("/") and leases.wait("/a")
        wait_for(lambda: "another service writes to this path" in caplog.text)
        later.close()
        wait_for(lambda: leases.wait("/") == leases.wait("/r") == 0)
        file.close()
        assert leases.wait("/r")


@pytest.mark.long
@pytest.mark.windows
def test_the_end_of_an_earlier_one_closes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, "/r") as (file, leases):
        later = LeaseFile(tmp_path / "lease", ["/r"])
        later.put("/r", lease_clock() + 1000, 0.0)
        wait_for(lambda: leases.wait("/r") == 0)
        file.close()
        assert leases.wait("/r") == 0
        later.close()
        assert leases.wait("/r")


@pytest.mark.long
@POSIX
def test_a_file_that_somebody_removes_comes_back(tmp_path: Path) -> None:
    """With what it said; and not any more once the service has ended."""
    path = tmp_path / "lease"
    with opened(tmp_path, "/r") as (file, leases):
        file.put("/r", 0.0, 0.0)
        file.begin()
        for _ in range(2):
            path.unlink()
            # Or who has the old one mapped would go by it for half a second.
            wait_for(lambda old=leases._table.cells: old[GENERATION] == 0.0)
            wait_for(lambda: leases.wait("/") == 0)
            assert leases.wait("/r/x")
            file.put("", 0.0, 0.0)
            assert leases.wait("/")
            file.put("", lease_clock() + 1000, 0.0)
            assert leases.wait("/") == 0
        file.close()
        path.unlink()
        assert leases.wait("/")
    assert not path.exists()


def words(at: int, text: str) -> Callable[[bytes], bytes]:
    """Another word in the identity."""
    def replaced(content: bytes) -> bytes:
        identity = content[: 8 * GENERATION].rstrip(b"\0").decode().split(" ")
        identity[at] = text
        return " ".join(identity).encode().ljust(8 * GENERATION, b"\0") + content[8 * GENERATION :]
    return replaced


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "another program": words(0, "HealthChekker"),
    "another version": words(2, "2"),
    "another clock": words(3, "CLOCK_MONOTONIC"),
    "another resolution": words(4, "0.25"),
    "another boot": words(5, "0b3a1c5e-0000-4000-8000-000000000000"),
    "nothing": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "no whole cell": lambda content: content[:-1],
    "no names": lambda content: content[: 8 * (SITE + 2)],
    "names that are none": lambda content: content[: 8 * (SITE + 2)] + b"{[[[[[[[",
    "names that are numbers": lambda content: content[: 8 * (SITE + 2)] + b"[1,2]   ",
    "more gates than there are": lambda content: content[: 8 * 16] + struct.pack("d", 1e9) + content[8 * SITE :],
    "endless gates": lambda content: content[: 8 * 16] + struct.pack("d", math.inf) + content[8 * SITE :],
    "no number of gates": lambda content: content[: 8 * 16] + struct.pack("d", math.nan) + content[8 * SITE :],
    "closed": lambda content: content[: 8 * 15] + bytes(8) + content[8 * 16 :],
}
if sys.platform == "linux":
    DAMAGE["another namespace of time"] = words(6, "4026531000")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_as_it_has_to_be_is_closed(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "lease"
    file = LeaseFile(path, ["/r"])
    for name in ("", "/r"):
        file.put(name, lease_clock() + 1000, 0.0)
    content = path.read_bytes()
    (tmp_path / "copy").write_bytes(content)
    leases = printed(tmp_path).Leases
    assert leases(str(tmp_path / "copy")).wait("/r") == 0
    damaged = damage(content)
    assert damaged != content
    (tmp_path / "damaged").write_bytes(damaged)
    assert leases(str(tmp_path / "damaged")).wait("/r") == 1
    assert leases(str(tmp_path)).wait("/r") == 1
    file.close()


@given(st.data())
def test_any_damage_to_what_says_what_it_is(tmp_path_factory: Any, data: st.DataObject) -> None:
    """One bit of the identity is enough."""
    folder = tmp_path_factory.mktemp("damage")
    with opened(folder) as (_, leases):
        content = bytearray((folder / "lease").read_bytes())
        content[data.draw(st.integers(0, len(lease_identity()) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        (folder / "damaged").write_bytes(content)
        assert type(leases)(str(folder / "damaged")).wait("/") == 1


# --- the reader: routes ---
def both(folder: Path, parts: list[str], opens: set[str]) -> tuple[Gate, Any, LeaseFile]:
    """The gate of our own workers and the printed one, of the same leases."""
    lease, file = Lease(parts), LeaseFile(folder / "lease", parts)
    for name in opens:
        (lease.parts[name] if name else lease).until.value = math.inf
        file.put(name, math.inf, 0.0)
    gate = Gate(lambda environ, start_response: [], lease)
    return gate, printed(folder).Leases(str(folder / "lease")), file


@pytest.mark.long
def test_routes_are_those_of_the_gate(tmp_path: Path) -> None:
    gate, leases, file = both(tmp_path, ["/reports", "/reports/deep", "/größe"], {"", "/reports/deep"})
    for path, admitted in PATH_TABLE.items():
        assert (gate.route(path)[0] == gate.admit) is admitted, path
        assert (leases.wait(path) == 0) is admitted, path
    file.close()


NAMES = ["", "/a", "/a/b", "/a/b/c", "/größe", "/static"]
PIECES = "/ / a b c static gr\xc3\xb6\xc3\x9fe . .. ; ;x=1 % %2 %2e %2f %61 %25 \\ x // /a /a/b".split()


@pytest.mark.long
@pytest.mark.windows
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), min_size=20, max_size=20),
       st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES[1:])))  # fmt: skip
def test_any_path_is_sorted_alike(tmp_path_factory: Any, paths: list[str], opens: set[str], parts: set[str]) -> None:
    gate, leases, file = both(tmp_path_factory.mktemp("paths"), sorted(parts), opens & {"", *parts})
    for path in [*paths, *("/" + path for path in paths)]:
        assert (leases.wait(path) == 0) == (strictest(gate.leases_of(path)).until.value > 0), path
    file.close()


# --- beside a writer ---
NEVER, ALWAYS = "/never", "/always"
VALUES = struct.unpack("2d", bytes.fromhex("1111111111111141" "eeeeeeeeeeeeee41"))


def write_without_end(path: str) -> None:
    """The site flips between two values, of whose halves no other is made; every second another file comes, in which
    each gate has another place."""
    for number in itertools.count():
        names = [f"/a{extra}" for extra in range(number % 5)]
        file = LeaseFile(Path(path), [NEVER, ALWAYS, *names])
        for name in (ALWAYS, *names):
            file.put(name, math.inf, 0.0)
        ends = lease_clock() + 1
        while lease_clock() < ends:
            for value in VALUES * 1000:
                file.put("", value, 0.0)


@pytest.mark.long
@pytest.mark.windows
def test_no_read_is_torn_or_false_beside_a_writer(tmp_path: Path, often: Callable[[int, int], int]) -> None:
    """Nor one of a place that another gate has in the next file: 400,000 reads, with --soak 10 million."""
    module, path, reads = printed(tmp_path), tmp_path / "lease", 50_000
    writer = multiprocessing.get_context("spawn").Process(target=write_without_end, args=(str(path),), daemon=True)
    writer.start()
    try:
        leases, seen, files = module.Leases(str(path)), set(), set()

        def look() -> bool:
            wait_for(lambda: leases.wait(ALWAYS) == 0, 120)  # it follows the newest file
            assert all(map(leases.wait, itertools.repeat(NEVER, reads)))
            cells = leases._table.cells
            files.add(leases._table.generation)
            seen.update(cells[SITE] for _ in range(reads))
            assert seen <= {0.0, *VALUES}
            return seen >= set(VALUES) and len(files - {0.0}) > 2

        for _ in range(often(4, 100)):
            look()
        wait_for(look)
    finally:
        writer.kill()
        writer.join()


# --- what is printed ---
@pytest.mark.long
def test_the_printed_module_stands_alone(tmp_path: Path) -> None:
    """It needs no package, passes the checks that this repository has to pass, and is what the command prints."""
    inventory = write_inventory(tmp_path, "", "  lease_file: lease")
    done = run(inventory, "middleware")
    place = tmp_path / "hc_gate.py"
    place.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == middleware_text(tmp_path / "lease")
    alone = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import hc_gate"]
    subprocess.run(alone, check=True, timeout=120, cwd=tmp_path)
    if importlib.util.find_spec("mypy"):
        rules = ["--config", str(PROGRAM.with_name(".ruff.toml")), "--ignore", "S108"]  # of a folder of tests in /tmp
        for tool in (["mypy", "--strict", "--no-incremental"], ["ruff", "check", "--no-cache", *rules]):
            command = [sys.executable, "-m", *tool, str(place)]
            checked = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path, check=False)
            assert checked.returncode == 0, checked.stdout + checked.stderr


def test_nothing_to_read(tmp_path: Path) -> None:
    code, output = run_cheaply("--inventory", str(write_inventory(tmp_path)), "middleware")
    assert (code, output) == (2, "inventory.yaml names no service.lease_file, which it would read\n")


def wsgi(gate: Any, path: str, method: str = "GET") -> tuple[str, dict[str, str], bytes]:
    found: list[Any] = []
    environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": path[:2], "PATH_INFO": path[2:]}
    body = gate(environ, lambda status, headers, exc_info=None: found.extend((status, headers)))
    return found[0], dict(found[1]), b"".join(body)


def test_wsgi(tmp_path: Path) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [str(environ["healthchecker.is_healthy"]("/r")).encode()]

    file, module = LeaseFile(tmp_path / "lease", ["/r"]), printed(tmp_path)
    file.put("", lease_clock() + 1000, 0.0)
    file.put("/r", 0.0, math.inf)
    gate = module.Gate(app)
    assert wsgi(gate, "/x") == ("200 OK", {}, b"False")
    status, headers, body = wsgi(gate, "/r/x")
    assert (status, headers["Retry-After"], headers["Cache-Control"]) == ("503 Service Unavailable", "3600", "no-store")
    assert int(headers["Content-Length"]) == len(body)
    assert wsgi(gate, "/r/x", "HEAD") == (status, headers, b"")
    file.close()


def truth(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [str(environ["healthchecker.is_healthy"]()).encode()]


@pytest.mark.long
def test_a_mount_opens_nothing(tmp_path: Path) -> None:
    """SCRIPT_NAME may be a client's header (gunicorn believes it from this machine)."""
    file, module = LeaseFile(tmp_path / "lease", ["/static"]), printed(tmp_path)
    file.put("/static", math.inf, 0.0)
    gate, found = module.Gate(truth), list[str]()
    for mount, path in (("/static", "/admin"), ("", "/static/admin")):
        environ = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": mount, "PATH_INFO": path}
        gate(environ, lambda status, _headers: found.append(status))
    assert found == ["503 Service Unavailable", "200 OK"]
    file.close()


def test_a_gate_that_observes_refuses_nothing(tmp_path: Path) -> None:
    """It marks what it would have refused, tells the truth, and opens no route that is not observed."""
    file, module = LeaseFile(tmp_path / "lease", ["/r"]), printed(tmp_path)
    file.put("/r", 0.0, 0.0)
    file.put("", 0.0, lease_clock() + 7, observes=True)
    gate = module.Gate(truth)
    assert wsgi(gate, "/x") == ("200 OK", {"X-HealthChecker": "would-refuse"}, b"False")
    for path in ("/r/x", "/r/%2e", "/x;/../r"):
        assert wsgi(gate, path)[0] == "503 Service Unavailable"
    file.put("", lease_clock() + 1000, 0.0)
    assert wsgi(gate, "/x") == ("200 OK", {}, b"True")
    file.close()


def test_what_runs_out_while_it_only_observes_refuses_nothing(tmp_path: Path) -> None:
    """Between two looks of the monitor a result gets stale; after a kill all is closed within the lease, for ever."""
    clock, lease = Clock(), Lease((), observes=True)
    file, module = LeaseFile(tmp_path / "lease", lease.parts), printed(tmp_path)
    aggregator = HealthAggregator(lease, clock, copy=file.put)
    module.clock, clock.now = clock, lease_clock()
    aggregator.register("a")
    aggregator.start()
    aggregator.beat("monitor")
    gate = module.Gate(truth)
    aggregator.set_resource("a", True, ttl=0.6)
    assert wsgi(gate, "/x")[0] == "200 OK"
    clock.now += 0.7
    assert wsgi(gate, "/x")[0] == "200 OK"
    aggregator.beat("monitor")
    assert wsgi(gate, "/x")[:2] == ("200 OK", {"X-HealthChecker": "would-refuse"})
    for later in (3600.0, 365 * 86_400.0):
        clock.now += later
        status, headers, _ = wsgi(gate, "/x")
        assert (status, headers["Retry-After"]) == ("503 Service Unavailable", "1")
    file.close()


@POSIX
def test_a_file_that_is_cut_ends_no_service_and_comes_back(tmp_path: Path) -> None:
    """By `: > gate.lease`; who has it mapped ends by SIGBUS, and finds the new one when it begins anew."""
    path = tmp_path / "lease"
    with opened(tmp_path, "/r") as (file, leases):
        assert leases.wait("/") == 0
        os.truncate(path, 0)
        file.put("/r", 0.0, 0.0)
        file.begin()
        wait_for(lambda: path.stat().st_size)
        leases = printed(tmp_path, path).Leases(str(path))
        assert (leases.wait("/"), leases.wait("/r")) == (0, 1)
        os.truncate(path, 0)


@pytest.mark.parametrize("content", [b"", bytes(208), lease_identity().encode(), bytes(5)])
def test_a_start_makes_a_file_that_was_cut_anew(content: bytes, tmp_path: Path) -> None:
    """Nobody would lose anything, and the unit does not try again what says that somebody would."""
    (tmp_path / "lease").write_bytes(content)
    with opened(tmp_path) as (_, leases):
        assert leases.is_healthy()


@POSIX
def test_a_copy_in_its_place_is_replaced(tmp_path: Path) -> None:
    """As of a backup that is put back, or of rsync: readers would follow a file that nobody writes to."""
    with opened(tmp_path) as (file, leases):
        file.begin()
        shutil.copy2(tmp_path / "lease", tmp_path / "copy")
        os.replace(tmp_path / "copy", tmp_path / "lease")
        file.put("", 0.0, lease_clock() + 60)
        wait_for(lambda: leases.wait("/") > 0)
        file.put("", lease_clock() + 1000, 0.0)
        wait_for(lambda: leases.wait("/") == 0)


@pytest.mark.long
@pytest.mark.windows
@pytest.mark.parametrize("name", ["Zürich", "\U00020bb7野家", "\U0001f680", "q'u'o te"])
def test_any_name_of_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    file = LeaseFile(path, [])
    file.put("", lease_clock() + 1000, 0.0)
    module = printed(tmp_path, path)
    assert str(path) == module.LEASE_FILE
    assert module.Leases(module.LEASE_FILE).wait("/") == 0
    namespace: dict[str, Any] = {}
    exec(re.search("^LEASE_FILE = .*$", middleware_text(path), re.M)[0], namespace)  # type: ignore[index]
    assert namespace["LEASE_FILE"] == str(path)
    file.close()


def asgi(gate: Any, **scope: Any) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        raise AssertionError("nobody asks for more")

    asyncio.run(gate(scope, receive, send))
    return sent


def test_asgi(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "app"})

    file, module = LeaseFile(tmp_path / "lease", ["/größe"]), printed(tmp_path)
    file.put("/größe", math.inf, 0.0)
    file.put("", 0.0, math.inf)
    gate, passed = module.AsgiGate(app), [{"type": "app"}]
    assert asgi(gate, type="lifespan") == passed
    assert asgi(gate, type="http", path="/größe/x", method="GET") == passed
    assert asgi(gate, type="websocket", path="/größe") == passed
    file.put("", math.inf, 0.0)
    file.put("/größe", 0.0, math.inf)
    mounted = {"path": "/x", "root_path": "/größe"}
    for scope in ({"path": "/größe/x"}, mounted, mounted | {"path": "/größe/x"}):
        assert asgi(gate, type="http", method="GET", **scope)[0]["status"] == 503, scope
    # Granian and Hypercorn leave root_path out of the path: /größe/größer it is; uvicorn and Starlette do not.
    begins_alike = {"path": "/größer/x", "root_path": "/größe"}
    for scope in (begins_alike, {"path": "/größe", "root_path": "/größe"}, {"path": "/größe/x", "root_path": "/y"}):
        assert asgi(gate, type="http", method="GET", **scope)[0]["status"] == 503, scope
    for scope in ({"path": "/x"}, {"path": "/x", "root_path": "/y"}):
        assert asgi(gate, type="http", method="GET", **scope) == passed, scope
    file.put("/größe", math.inf, 0.0)
    file.put("", 0.0, math.inf)
    start, body = asgi(gate, type="http", path="/x", method="GET")
    headers = dict(start["headers"])
    assert (start["type"], start["status"], headers[b"retry-after"]) == ("http.response.start", 503, b"3600")
    assert (body["type"], len(body["body"])) == ("http.response.body", int(headers[b"content-length"]))
    assert asgi(gate, type="http", path="/x", method="HEAD")[1]["body"] == b""
    (closed,) = asgi(gate, type="websocket", path="/x")
    assert (closed["type"], closed["code"]) == ("websocket.close", 1013)
    denial = asgi(gate, type="websocket", path="/x", extensions={"websocket.http.response": {}})
    assert [message["type"] for message in denial] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert denial[0]["status"] == 503
    assert asgi(gate, type="something new")[0]["status"] == 503
    file.close()


# --- in servers ---
SHOP = """
from hc_gate import AsgiGate, Gate

def hello(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]

app = Gate(hello)
"""
STARLETTE = """
import contextlib
from hc_gate import AsgiGate
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

begun = []

@contextlib.asynccontextmanager
async def lifespan(app):
    begun.append(True)
    yield

async def hello(request):
    return PlainTextResponse("hello" if begun else "the lifespan did not begin", 200 if begun else 500)

async def talk(socket):
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()

routes = [WebSocketRoute("/ws", talk), Route("/{path:path}", hello)]
app = AsgiGate(Starlette(routes=routes, lifespan=lifespan))
"""
WAITRESS = "import sys, waitress, shop; waitress.serve(shop.app, listen=f'127.0.0.1:{sys.argv[1]}')"
UWSGI = ("--http-socket 127.0.0.1:{port} --wsgi shop:app --master --processes 2 --threads 2 --die-on-term --need-app "
         "--no-orphans --disable-logging").split()  # fmt: skip
GUNICORN = "--no-control-socket --preload -k gthread --threads 4 -w 2 shop:app".split()
SERVERS: dict[str, list[str]] = {"waitress": ["-c", WAITRESS, "{port}"]}
if sys.platform != "win32":
    SERVERS |= {
        "gunicorn": ["-m", "gunicorn", "-b", "127.0.0.1:{port}", *GUNICORN],
        "uWSGI": ["-c", "import pyuwsgi; pyuwsgi.run()", *UWSGI],
        "Granian": "-m granian --interface wsgi --port {port} --workers 2 shop:app".split(),
        "Granian, ASGI": "-m granian --interface asgi --port {port} star:app".split(),
        "uvicorn": "-m uvicorn --port {port} --log-level warning star:app".split(),
    }
MODULES = Path("/usr/lib/apache2/modules")  # Debian's
APACHE = shutil.which("apache2", path=SYSTEM_PATH) if (MODULES / "mod_wsgi.so").exists() else None
# Of one process without threads: with them, mod_wsgi lets no SIGTERM end it.
APACHE_CONFIG = f"""
LoadModule mpm_prefork_module {MODULES}/mod_mpm_prefork.so
LoadModule authz_core_module {MODULES}/mod_authz_core.so
LoadModule wsgi_module {MODULES}/mod_wsgi.so
ServerName gate.example.com
PidFile ${{FOLDER}}/pid
DefaultRuntimeDir ${{FOLDER}}
ErrorLog /dev/stderr
WSGIPythonPath ${{FOLDER}}
WSGICallableObject app
WSGIScriptAlias / ${{FOLDER}}/shop.py
"""
IN_ITS_FOLDER = """import os, sys
os.execv(sys.argv[1], [*sys.argv[1:], '-C', f'Define FOLDER {os.getcwd()}', '-f', f'{os.getcwd()}/apache.conf'])"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def status(port: int, path: str) -> int:
    """What a server answers; 0 while it does not."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return 200 if answer.read() == b"hello" else 500
    except urllib.error.HTTPError as refusal:
        refusal.close()
        assert refusal.code != 503 or int(refusal.headers["Retry-After"]) >= 1
        return refusal.code
    except OSError:
        return 0


def shake_hands(port: int, path: str) -> str:
    """The status line for who asks for a websocket."""
    with socket.create_connection(("127.0.0.1", port), 30) as client:
        headers = {"Host": "x", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                   "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}  # fmt: skip
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        return client.makefile("r", encoding="latin-1").readline().strip()


@contextlib.contextmanager
def serving(folder: Path, arguments: list[str]) -> Iterator[int]:
    """A server with the printed gate, and its workers; gives its port."""
    for _ in range(3):  # somebody else may have the port before the server has it
        port, log = free_port(), folder / f"log{len(list(folder.glob('log*')))}"
        command = [sys.executable, *(argument.replace("{port}", str(port)) for argument in arguments)]
        with log.open("wb") as sink:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": sink}
            server = subprocess.Popen(command, cwd=folder, env=environment(), start_new_session=True, **streams)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: status(port, "/") or server.poll() is not None, 120)  # noqa: B023
        if server.poll() is None:
            break
    try:
        assert server.poll() is None and status(port, "/"), log.read_text("utf-8")
        yield port
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        if sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):  # its workers may have ended with it
                os.killpg(server.pid, signal.SIGKILL)
        server.kill()
        server.wait()


def assert_follow(tmp_path: Path, servers: Mapping[str, list[str]]) -> None:
    """Closed before there is one; by route while it runs; closed by its end, opened by the next; and closed when the
    main process is killed, within the lease."""
    (tmp_path / "hc_gate.py").write_text(middleware_text(tmp_path / "lease"), encoding="utf-8")
    (tmp_path / "shop.py").write_text(SHOP, encoding="utf-8")
    (tmp_path / "star.py").write_text(STARLETTE, encoding="utf-8")
    rows = f"  - {{name: warehouse, {BAD}}}\nroutes: {{/reports: [warehouse], /static: []}}\n"
    inventory = write_inventory(tmp_path, f"  - {{name: a, {CALM}}}\n{rows}", "  lease_file: lease")
    with contextlib.ExitStack() as stack:
        ports = {name: stack.enter_context(serving(tmp_path, given)) for name, given in servers.items()}

        def everywhere(path: str) -> dict[str, int]:
            return {name: status(port, path) for name, port in ports.items()}

        def wait_everywhere(path: str, wanted: int) -> None:
            seen: dict[str, int] = {}  # of one look: of several workers another one may look again later

            def look() -> bool:
                seen.update(everywhere(path))
                return set(seen.values()) == {wanted}

            with contextlib.suppress(AssertionError):  # of which the next line tells
                wait_for(look, 120)
            assert seen == dict.fromkeys(ports, wanted)

        assert set(everywhere("/").values()) == {503}
        with Service(inventory) as service:
            service.wait_status("/", 200)
            wait_everywhere("/", 200)
            assert set(everywhere("/reports/q3").values()) == {503}
            wait_everywhere("/static/a.css", 200)
            assert set(everywhere("/static/%2e%2e/reports").values()) == {503}
            if "uvicorn" in ports:
                assert " 101 " in shake_hands(ports["uvicorn"], "/ws")
                assert " 101 " in shake_hands(ports["Granian, ASGI"], "/ws")
        assert set(everywhere("/").values()) == set(everywhere("/static/x").values()) == {503}
        if "uvicorn" in ports:
            assert " 503 " in shake_hands(ports["uvicorn"], "/ws")
            assert " 503 " in shake_hands(ports["Granian, ASGI"], "/ws")
        write_inventory(tmp_path, f"  - {{name: a, {BRIEF}}}\n{rows}", "  lease_file: lease")
        with Service(inventory, code=1 if sys.platform == "win32" else -9) as service:
            wait_everywhere("/", 200)
            service.kill()
            (end,) = struct.unpack_from("d", (tmp_path / "lease").read_bytes(), 8 * SITE)
            assert end < lease_clock() + 5

            def is_closed() -> bool:
                is_over = lease_clock() > end   # before anybody is asked
                seen = everywhere("/")
                assert not is_over or 200 not in seen.values(), seen
                return is_over

            wait_for(is_closed)
            wait_everywhere("/", 503)


@pytest.mark.long
@pytest.mark.windows
def test_every_server_follows_the_service(tmp_path: Path) -> None:
    assert_follow(tmp_path, SERVERS)


@pytest.mark.long
@POSIX
@pytest.mark.parametrize("server", [
    "-m granian --interface asgi --port {port} --url-path-prefix /admin star:app",  # leaves it out of the path
    "-m uvicorn --port {port} --log-level warning --root-path /admin star:app",  # has it there
])  # fmt: skip
def test_a_root_path_opens_no_route(server: str, tmp_path: Path) -> None:
    """Also one whose name begins like it."""
    (tmp_path / "star.py").write_text(STARLETTE, encoding="utf-8")
    with opened(tmp_path, "/admin/administrators", "/admin/x") as (file, _), serving(tmp_path, server.split()) as port:
        assert {status(port, path) for path in ("/administrators", "/x", "/other")} == {200}
        file.put("/admin/administrators", 0.0, 0.0)
        assert [status(port, path) for path in ("/administrators", "/x", "/other")] == [503, 200, 200]


@pytest.mark.skipif(not APACHE, reason="needs mod_wsgi")
def test_apache_follows_the_service(tmp_path: Path) -> None:
    (tmp_path / "apache.conf").write_text(APACHE_CONFIG, encoding="utf-8")
    assert_follow(tmp_path, {"mod_wsgi": ["-c", IN_ITS_FOLDER, str(APACHE), "-X", "-c", "Listen 127.0.0.1:{port}"]})


@pytest.mark.long
def test_a_route_that_a_reload_adds(tmp_path: Path) -> None:
    """It counts from the next start on, as for our own workers; the same reader sees it then."""
    rows = f"  - {{name: a, {CALM}}}\n  - {{name: bad, {BAD}}}\n"
    inventory = write_inventory(tmp_path, f"{rows}routes: {{/r: [bad]}}\n", "  lease_file: lease")
    leases = printed(tmp_path).Leases(str(tmp_path / "lease"))
    with Service(inventory) as service:
        wait_for(lambda: leases.wait("/new/x") == 0)
        assert leases.wait("/r/x")
        write_inventory(tmp_path, f"{rows}routes: {{/new: [bad], /r: [a]}}\n", "  lease_file: lease")
        assert "that needs a restart" in run(inventory, "reload").stdout
        wait_for(lambda: leases.wait("/"))  # what is in no route that counts is the whole site's
        assert leases.wait("/new/x") and service.get("/new/x").status == 503
    assert leases.wait("/r/x")
    with Service(inventory):
        wait_for(lambda: leases.wait("/r/x") == 0)
        assert leases.wait("/new/x")
        assert leases.wait("/") == 0
