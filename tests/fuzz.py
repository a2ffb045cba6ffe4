"""Fuzzing with a budget: what comes from outside, damaged by chance, is read or refused as it is documented.

    python tests/fuzz.py [NAME ...] [--seconds 1200] [--seed 1]      all targets, or those named, for so long in all
    python tests/fuzz.py NAME --seed 1 --number 4711                 one input again: a fault names these

`TARGETS` says what is fed with which seeds, and which errors are documented for it. An input depends on target, seed
and number alone, but for tokens, which are other ones each time: what is damaged is the same place of them. Each has
SECONDS_EACH of CPU, and all inputs of a target together MEMORY. Part of `make soak`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import importlib
import logging
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hosts
import psutil
from conftest import wait_for
from console import local_console, prepared_vault
from test_endpoints import CHECKS, SERVICES
from test_endpoints import RECORDED as ENDPOINTS
from test_hostile_clients import REFUSED, cut, outcome, whole
from test_inventory import CANARY, FAULT, FAULTS, FULL
from test_powershell import poll, target
from test_probes import NONCE, RECORDED, assert_sound, output
from test_vault import ROW
from waitress.adjustments import Adjustments
from wsman_server import WSManServer

from healthchecker import (
    COOKIE,
    HEADER_BYTES,
    SURROGATE,
    ConsoleParser,
    Deadline,
    Document,
    InventoryError,
    InventoryLoader,
    Output,
    Platform,
    ProbeError,
    ResourceSettings,
    Sample,
    SecretError,
    collect,
    end_mark,
    evaluate,
)

LONGEST = 1 << 15  # bytes of an input
SECONDS_EACH = 5.0  # of CPU
MEMORY = 256 << 20  # bytes more than before
HANG = 300.0  # seconds without an end of the next hundred inputs, after which all stacks are shown
FEW = 1 << 12  # bytes of most inputs

# === Inputs ==================================================================
NUMBERS = [b"0", b"-1", b"1", b"007", b"1.5", b"-0", b".5", b"1e999", b"nan", b"inf", b"0x10", b"1_0", b"+5", b"100",
           b"101", b"255", b"65535", b"65536", b"2147483648", b"9223372036854775808", b"9" * 19, b"9" * 400,
           "\u0663".encode(), "\xb2".encode(), b"1,5", b"true", b"null", b"[]", b"{}", b'""']  # fmt: skip
ODD = [b"\0", b"\r", b"\n", b"\r\n", b"\t", b"\x0b", b"\x1b[1m", b"\x7f", b"\x80", b"\xff", b"\xed\xa0\x80", b" ",
       b",", b":", b"=", b";", b"'", b'"', b"\\", b"\\u0000", b"\\ud800", b"%00", b"%", b"&", b"*", b"!", b"#", b"<",
       b">", b"[", b"]", b"{", b"}", b"- ", b": ", b"|", b"..", b"/", b"~", b"@", b"\xef\xbb\xbf", *map(str.encode, (
           "\x85", "\u2028", "ü", "\U0001f600", "\u200f", "\u017f", "\u0130"))]  # fmt: skip


class Chance(random.Random):
    """All that is left to chance in one input."""

    def size(self, most: int) -> int:
        """From 1 to `most`, rather small."""
        return int(2 ** self.uniform(0, math.log2(most + 0.99))) if most > 1 else 1

    def part(self, data: bytes) -> tuple[int, int]:
        """Begin and end of a part of `data`."""
        begin = self.randrange(len(data) + 1)
        return begin, min(len(data), begin + self.size(max(1, len(data))))


Edit = Callable[[Chance, bytes, Sequence[bytes]], bytes]


def flip(chance: Chance, data: bytes, seeds: Sequence[bytes]) -> bytes:
    del seeds
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def put(chance: Chance, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Something odd, or a part of another seed, between two bytes or in place of some."""
    other = chance.choice(seeds)
    begin, end = chance.part(other)
    new = chance.choice((chance.choice(ODD), other[begin:end], chance.randbytes(chance.size(8))))
    at = chance.randrange(len(data) + 1)
    return data[:at] + new + data[at + chance.choice((0, 1, len(new))) :]


def take(chance: Chance, data: bytes, seeds: Sequence[bytes]) -> bytes:
    del seeds
    begin, end = chance.part(data)
    return chance.choice((data[:begin] + data[end:], data[:begin], data[end:]))


def repeat(chance: Chance, data: bytes, seeds: Sequence[bytes]) -> bytes:
    del seeds
    begin, end = chance.part(data)
    end = min(end, begin + chance.choice((1, 8, 200, LONGEST)))
    most = chance.choice((FEW, FEW, LONGEST)) // max(1, end - begin)
    return data[:begin] + data[begin:end] * (1 + chance.size(max(1, most))) + data[end:]


def splice(chance: Chance, data: bytes, seeds: Sequence[bytes]) -> bytes:
    other = chance.choice(seeds)
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]


def number(chance: Chance, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """Another number, or a length that is a little or much wrong."""
    found = list(re.finditer(rb"[0-9]{1,18}", data))
    if not found:
        return put(chance, data, seeds)
    one = chance.choice(found)
    near = int(one[0]) + chance.choice((-1, 1, int(one[0]), 1 << 32))
    return data[: one.start()] + chance.choice((b"%d" % near, chance.choice(NUMBERS))) + data[one.end() :]


def line(chance: Chance, data: bytes, seeds: Sequence[bytes]) -> bytes:
    """A line twice, elsewhere, or of another seed."""
    lines = data.splitlines(keepends=True)
    new = chance.choice(chance.choice(seeds).splitlines(keepends=True) or [b"\n"])
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines) + 1)
    lines.insert(other, chance.choice((lines[at], new)))
    if chance.random() < 0.5:
        del lines[at]
    return b"".join(lines)


EDITS: tuple[Edit, ...] = (flip, put, put, take, repeat, splice, number, number, line)


def damaged(chance: Chance, data: bytes, seeds: Sequence[bytes]) -> bytes:
    for _ in range(chance.choice((1, 1, 1, 2, 3, 5, 9))):
        data = chance.choice(EDITS)(chance, data or b"0", seeds)[:LONGEST]
    return data


# === Targets =================================================================
Feed = Callable[[Chance, bytes], bool]  # whether it was read; a documented error says that it was not


class Opened(NamedTuple):
    """What is damaged, what else parts of are put into it, and what it is fed to."""

    seeds: Sequence[bytes]
    more: Sequence[bytes]
    feed: Feed


class Target(NamedTuple):
    open: Callable[[], AbstractContextManager[Opened]]
    documented: tuple[type[Exception], ...]
    inputs: int  # in a test of the suite


@contextlib.contextmanager
def requests() -> Iterator[Opened]:
    """The parser of both doors: served, refused or waited for, however the bytes are cut, one behind another."""
    seeds, refused = ([request for request, _ in table.values() if len(request) < FEW] for table in (whole(), REFUSED))

    def feed(chance: Chance, data: bytes) -> bool:
        served = False
        for _ in range(5):
            status, length = outcome([data])
            assert status in ("served", "waits") or int(status[:3]) in (400, 413, 431)
            other, as_long = outcome(cut(data, chance.randint(1, 50 if len(data) < FEW else 1000)))
            assert as_long == length
            assert other == status or (len(data) > HEADER_BYTES and {other[:3], status[:3]} == {"400", "431"})
            if status != "served" or not length:
                break
            served, data = True, data[length:]
        return served

    yield Opened(seeds, refused, feed)


@contextlib.contextmanager
def documents() -> Iterator[Opened]:
    """YAML: nested dicts, lists and texts whose places are known, or lines with a place that quote nothing."""

    def feed(chance: Chance, data: bytes) -> bool:
        del chance
        try:
            document = Document("inventory.yaml", data)
        except InventoryError as error:
            assert CANARY not in str(error)
            raise
        for path in document.nodes:
            assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", document.position(path))
        return document.value is not None

    yield Opened([*sound_yaml(), *faulty_yaml()], [], feed)


def sound_yaml() -> list[bytes]:
    example = Path(__file__).resolve().parent.parent / "inventory.example.yaml"
    one = "resources: [{hostname: a.example.com, username: u, password: p, checks: [{name: c, command: x}]}]\n"
    return [text.encode() for text in (example.read_text(encoding="utf-8"), FULL, one)]


def faulty_yaml() -> list[bytes]:
    texts = [f"{CANARY}: {{&a {CANARY}: *{CANARY}, ? !t {CANARY}}}\n", *(text for text, _ in FAULTS.values())]
    return [text.replace("¦", "").encode("utf-8", "surrogatepass") for text in texts]


@contextlib.contextmanager
def inventories() -> Iterator[Opened]:
    """What a document says: an inventory, or lines that begin with a place."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inventory.yaml"

        def feed(chance: Chance, data: bytes) -> bool:
            del chance
            try:
                found = InventoryLoader(path, Document(path.name, data)).load()
            except InventoryError as error:
                lines = str(error).split("\n")
                assert all(FAULT.fullmatch(one) and not SURROGATE.search(one) for one in lines), lines
                raise
            return bool(found.resources)

        yield Opened(sound_yaml(), faulty_yaml(), feed)


@contextlib.contextmanager
def tokens() -> Iterator[Opened]:
    """Sealed secrets: one that was sealed for this row, or an error that does not quote the token."""
    secrets = ["", "p", "S3cret-ü-😀", "x" * 1000]
    with tempfile.TemporaryDirectory() as folder:
        vault = prepared_vault(Path(folder))

        def feed(chance: Chance, data: bytes) -> bool:
            del chance
            token = data.decode(errors="replace")
            try:
                assert vault.open(token, *ROW) in secrets
            except SecretError as error:
                assert all(part not in str(error) for part in token.split(".")[2:] if len(part) > 16)  # no id of a key
                raise
            return True

        yield Opened([vault.seal(secret, *ROW).encode() for secret in secrets], [], feed)


class Replay:
    """A connection to a host that answers `data` in pieces, whatever is asked."""

    def __init__(self, chance: Chance, data: bytes) -> None:
        self._chance, self._data = chance, data

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        del deadline
        nonce = re.findall(rb"[0-9a-f]{16}", output.mark)[0]
        while script:
            size = self._chance.randint(1, 1 + len(self._data))
            for piece in cut(self._data.replace(NONCE.encode(), nonce), size):
                if output.take(piece):
                    return True
            fault = ProbeError(self._chance.choice(("timeout", "protocol")), "x")
            script = output.rest(self._chance.choice((None, 0, 3)), self._chance.choice((None, fault)))
        return True

    def begins_again(self, error: ProbeError, deadline: Deadline) -> bool:
        del error, deadline
        return False


LIMITS = {**dict.fromkeys(("cpu_percent", "memory_percent", "swap_percent", "commit_percent", "inode_percent"), 90),
          "disk_percent": {"fail": 90, "mounts": {"/boot*": "off", "C:\\mnt": 5}}, "load_per_cpu": 4}  # fmt: skip
NAGIOS = {"name": "load", "command": "x", "exit": "nagios", "limits": {"load1": 8, "'a b'": {"warn": -1}}}


def posix_seeds(platform: Platform) -> list[bytes]:
    """Whole answers of what was recorded by rows, as far as the rows go round, and with the disks of each machine."""
    rows: dict[str, list[str]] = {}
    for path in sorted((RECORDED / platform.value).glob("*.txt")):
        rows.setdefault(path.name.partition(".")[0], []).append(path.read_text(encoding="utf-8"))
    more = {"service nginx": "LoadState=loaded\nActiveState=active\nSubState=running", "check replication 5": "fine",
            "check load 5 nagios": "OK|load1=1.5;2;3 'a b'=4%\nmore|x=.5ms"}  # fmt: skip
    disks = [{}, {}, {}, *map(disks_of, map(hosts.host, hosts.host_names()))]
    whole = [output(platform, {**{name: texts[at % len(texts)] for name, texts in rows.items()}, **more, **its})
             for at, its in enumerate(disks)]  # fmt: skip
    hangs = output(platform, {"disk_percent": f"@{NONCE} df 4711 26 Nov 19:05"})
    return [text.encode() for text in (*whole, hangs.replace(f"\n@{NONCE} end 0\n\n@{NONCE} done\n", ""))]


def disks_of(host: hosts.Host) -> dict[str, str]:
    """The row of the disks, and of what else there is a file."""
    tables = [answer.text for command, answer in host.answers.items() if command.startswith("df -")]
    mounts = next((host.files[name] for name in ("proc/mounts", "etc/mnttab") if name in host.files),
                  host.answers.get("mount", hosts.Answer("")).text)  # fmt: skip
    fstab = host.files.get("etc/fstab", "")
    said = f"{mounts}\n@fstab\n{fstab}\n@space\n" + "\n@inodes\n".join(tables[-2:])
    files = {row: text for name, row in (("proc/meminfo", "memory_percent"), ("proc/stat", "cpu_percent"))
             if (text := host.files.get(name))}  # fmt: skip
    return {"disk_percent": said, **files}


def polled(settings: dict[str, Any], seeds: Callable[[], Sequence[bytes]]) -> Callable[[], Any]:
    """The whole way of an answer: to a sample of sound readings and a verdict, or to one error of a line."""
    given = {"name": "db1", "hostname": "localhost", "username": "monitor", "limits": LIMITS, **settings}
    made = ResourceSettings.model_validate(given)

    @contextlib.contextmanager
    def opened() -> Iterator[Opened]:
        before: list[Sample] = []

        def feed(chance: Chance, data: bytes) -> bool:
            try:
                sample = collect(made, Replay(chance, data), chance.choice([None, *before]))  # type: ignore[arg-type]
            except ProbeError as error:
                assert "\n" not in str(error) and not SURROGATE.search(str(error))
                raise
            assert_sound(sample)
            verdict = evaluate(sample, made)
            assert verdict.healthy or verdict.reason
            assert "\n" not in verdict.reason
            (sample.to_json() + verdict.reason).encode()
            return True

        for data in seeds():
            with contextlib.suppress(ProbeError):
                before.append(collect(made, Replay(Chance(1), data), None))  # type: ignore[arg-type]
        yield Opened(seeds(), [], feed)

    return opened


def posix(platform: Platform) -> Callable[[], Any]:
    checks = [{"name": "replication", "command": "x"}, NAGIOS]
    asked = {"platform": platform.value, "services": ["nginx"], "checks": checks}
    if platform is Platform.POSIX:  # is not to be chosen: `unix` asks which it is
        asked["platform"] = "unix"
    return polled(asked, functools.partial(posix_seeds, platform))


def windows_seeds() -> list[bytes]:
    found = [path.read_bytes().partition(b"\n")[2] for path in sorted((RECORDED / "windows").glob("*.json"))]
    ended = b'{"name":"replication","good":false,"text":"","code":null,"then":"%b","number":1}\n'
    return [*found, *(found[0] + ended % then for then in (b"exit", b"stop", b""))]


WINDOWS = {"platform": "windows", "services": ["Spooler", "MSSQL$PAYROLL"],
           "checks": [{"name": "replication", "command": "x"}, NAGIOS]}  # fmt: skip
UNIX_ENDPOINT = {"platform": "unix", "endpoint": True, "services": SERVICES, "checks": CHECKS}
WINDOWS_ENDPOINT = {"platform": "windows", "endpoint": True, "services": ["Eventlog", "it's (x)"],
                    "checks": [{"name": "first", "command": "x"}, {"name": "last", "command": "x"}]}  # fmt: skip


def endpoint_seeds(end: str) -> list[bytes]:
    return [path.read_bytes() + end_mark(NONCE).encode() for path in sorted(ENDPOINTS.glob(f"*{end}"))]


class Spoiler:
    """Damages one of the things that a server sends: a fragment of PSRP, an envelope or a whole response."""

    def __init__(self) -> None:
        self.chance, self.left = Chance(), 0

    def __call__(self, sent: bytes) -> bytes:
        self.left -= 1
        return sent if self.left else damaged(self.chance, sent, [sent])


@contextlib.contextmanager
def wsman() -> Iterator[Opened]:
    """A login and a poll over a real socket: a verdict, within the time of a poll. (Both sides make random numbers of
    their own, so what is damaged is the same place at another time.)"""
    spoiler = Spoiler()
    with (
        WSManServer("https", "basic", spoil=spoiler) as encrypted,
        WSManServer("http", "negotiate", spoil=spoiler) as sealed,
    ):
        made = {id(server): target(server, timeout=3, services=["Spooler"]) for server in (encrypted, sealed)}
        good = windows_seeds()[0]

        def feed(chance: Chance, data: bytes) -> bool:
            server = chance.choice((encrypted, encrypted, sealed))
            server.answer = chance.choice((good, good, good, data)).decode(errors="replace")
            spoiler.chance, spoiler.left = chance, chance.randint(1, 30)
            verdict = poll(made[id(server)]).verdict
            assert "unforeseen" not in verdict.reason
            wait_for(lambda: not server._listener.sockets, 60)
            server.shells.clear()
            return verdict.healthy

        yield Opened(windows_seeds(), [], feed)


@contextlib.contextmanager
def logins() -> Iterator[Opened]:
    """Requests to the console: who shows no login that is one sees nothing, and nobody an error of ours."""
    with (
        tempfile.TemporaryDirectory() as folder,
        local_console(Path(folder), f"  - {{name: {CANARY}, platform: simulated}}",
                      "  trusted_proxy: [127.0.0.1]\n  console_url: http://localhost/-/") as local,
    ):  # fmt: skip
        cookie, token = local.log_in_as("SpiceWorks").cookie, local.log_in_as("SpiceWorks", "token").token
        local.app.config["PROPAGATE_EXCEPTIONS"] = True

        def feed(chance: Chance, data: bytes) -> bool:
            del chance
            parser = ConsoleParser(Adjustments(max_request_body_size=FEW))
            parser.received(data)
            if parser.error or not parser.completed or parser.command not in ("GET", "HEAD"):
                return False
            statuses: list[str] = []
            body = b"".join(local.app.wsgi_app(environ_of(parser), lambda status, *_: statuses.append(status)))
            assert "500" <= statuses[-1] < "503 " or statuses[-1] < "5", statuses
            said = " ".join(parser.headers.values())
            shown = CANARY.encode() in body and CANARY not in parser.request_uri
            assert not shown or cookie in said or token in said, "somebody who is not logged in sees a resource"
            return shown

        proofs = [f"Cookie: {COOKIE}={cookie}", f"Authorization: Bearer {token}",
                  f'Cookie: a="b\\"c"; {COOKIE}="{cookie}"',
                  f"Authorization: Basic dTpw\r\nCookie: {COOKIE}={cookie}", "Authorization: Digest a=b, c=\"d\"",
                  f"X-Forwarded-For: 192.0.2.1, [::1]:5\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: a\r\n"
                  f"Authorization: bearer {token}", f"Cookie: {COOKIE}={cookie}; {COOKIE}={token}"]  # fmt: skip
        yield Opened([f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{proof}\r\n\r\n".encode() for proof in proofs
                      for path in ("/-/api/resources", "/-/", f"/-/api/resources/{CANARY}")], [], feed)  # fmt: skip


def environ_of(parser: ConsoleParser) -> dict[str, Any]:
    """As waitress has it."""
    headers = {name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}": value
               for name, value in parser.headers.items()}  # fmt: skip
    return {
        "REQUEST_METHOD": parser.command, "SCRIPT_NAME": "", "PATH_INFO": parser.path, "QUERY_STRING": parser.query,
        "SERVER_NAME": "localhost", "SERVER_PORT": "8081", "SERVER_PROTOCOL": f"HTTP/{parser.version}",
        "REMOTE_ADDR": "127.0.0.1", "REMOTE_HOST": "127.0.0.1", "wsgi.version": (1, 0), "wsgi.url_scheme": "http",
        "wsgi.input": parser.get_body_stream(), "wsgi.errors": sys.stderr, "wsgi.multithread": True,
        "wsgi.multiprocess": False, "wsgi.run_once": False, **headers,
    }  # fmt: skip


TARGETS: dict[str, Target] = {
    "requests": Target(requests, (), 1000),
    "documents": Target(documents, (InventoryError,), 400),
    "inventories": Target(inventories, (InventoryError,), 150),
    "tokens": Target(tokens, (SecretError,), 400),
    **{name: Target(posix(Platform(name)), (ProbeError,), 200) for name in ("linux", "macos", "freebsd", "posix")},
    "windows": Target(polled(WINDOWS, windows_seeds), (ProbeError,), 500),
    "endpoint": Target(polled(UNIX_ENDPOINT, lambda: endpoint_seeds(".txt")), (ProbeError,), 300),
    "windows endpoint": Target(polled(WINDOWS_ENDPOINT, lambda: endpoint_seeds(".json")), (ProbeError,), 300),
    "wsman": Target(wsman, (), 20),
    "logins": Target(logins, (), 300),
}


# === The run =================================================================
class Wrong(AssertionError):
    """An input that was not read as it is documented; says how to try it again."""


class Count(NamedTuple):
    inputs: int
    read: int
    slowest: float  # seconds of CPU


def peak() -> int:
    """Bytes that this process had at most."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    resource = importlib.import_module("resource")  # POSIX only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def feed_one(name: str, opened: Opened, seed: int, at: int) -> tuple[bool, float]:
    """Whether input `at` was read, and its seconds of CPU. Raises Wrong."""
    chance = Chance(f"{name} {seed} {at}")
    first = chance.choice(opened.more if opened.more and chance.random() < 0.3 else opened.seeds)
    data = damaged(chance, first, [*opened.seeds, *opened.more])
    again = f"{name!r}, seed {seed}, number {at} ({len(data)} bytes: {data[:300]!r})"
    begin, read = time.process_time(), False
    try:
        read = opened.feed(chance, data)
    except TARGETS[name].documented:
        pass
    except Exception as error:
        raise Wrong(again) from error
    if (seconds := time.process_time() - begin) > SECONDS_EACH:
        raise Wrong(f"{seconds:.1f} s of CPU: {again}")
    return read, seconds


def fuzz(name: str, seed: int, first: int = 0, inputs: float = math.inf, seconds: float = math.inf) -> Count:
    """Feeds inputs from number `first` on until so many were fed or the time is over. Raises Wrong."""
    before, found = 0, Count(0, 0, 0.0)
    with TARGETS[name].open() as opened:
        ends = time.monotonic() + seconds
        while found.inputs < inputs and (seconds == math.inf or time.monotonic() < ends):
            if found.inputs % 100 == 0 and seconds < math.inf:
                faulthandler.dump_traceback_later(HANG, exit=True)
                print(f"\r{name}, seed {seed}: number {first + found.inputs:,}", end=" ", flush=True)
            read, used = feed_one(name, opened, seed, first + found.inputs)
            found = Count(found.inputs + 1, found.read + read, max(found.slowest, used))
            before = before or peak()
    faulthandler.cancel_dump_traceback_later()
    if (grown := peak() - before) > MEMORY:
        raise Wrong(f"{grown >> 20} MiB more after {found.inputs} inputs of {name!r}, seed {seed}")
    return found


def fuzz_all(names: Sequence[str], seconds: float, seed: int) -> int:
    """Feeds the targets for so long in all; says how many inputs there were."""
    total = 0
    for name in ("urllib3", "spnego", "pypsrp"):  # as the service has it
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in names:
        found = fuzz(name, seed, seconds=seconds / len(names))
        total += found.inputs
        print(f"\r{name}: {found.inputs:,} inputs, {found.read:,} of them read, the slowest took {found.slowest:.2f} s "
              f"of CPU (seed {seed})", flush=True)  # fmt: skip
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged inputs, by chance.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=1200, help="in all; default: %(default)s")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="default: another one each time")
    parser.add_argument("--number", type=int, help="this input alone")
    options = parser.parse_args()
    names = options.names or list(TARGETS)
    if options.number is not None:
        print(fuzz(names[0], options.seed, options.number, 1))
    else:
        print(f"{fuzz_all(names, options.seconds, options.seed):,} inputs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
