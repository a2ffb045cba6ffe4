"""A Windows host with a real PowerShell: a shell of tests/wsman_server.py that is a process `pwsh.exe -s`.

PowerShell's own remoting server speaks PSRP over its standard streams, an XML element a line: fragments are passed on
as they come, and nothing here knows what they say. Anything but Windows needs wine64 and PowerShell's archive (see
tests/windows_python.py); HEALTHCHECKER_PWSH names another pwsh.exe, or Windows' own powershell.exe.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from windows_python import (
    FOLDER,
    Unavailable,
    Wine,
    as_windows,
    build_prefix,
    end_unless_used,
    locked,
    unpack_powershell,
)
from wsman_server import CHUNK_SIZE, FAULTS, Shell, WSManServer

MODULES = Path(__file__).with_name("modules")  # a stand-in for CIM, which wine has not
ROWS: dict[str, Any] = json.loads((MODULES / "CimCmdlets" / "cim.json").read_text(encoding="utf-8"))
NOBODY = "00000000-0000-0000-0000-000000000000"  # the shell itself, in place of a command
ELEMENT = re.compile(r"<(\w+)(?: Stream='\w+')? PSGuid='([^']+)'\s*(?:/>|>([^<]*)<)")
ANSWER_TIME = 120.0  # seconds in which the engine acknowledges a command, at its first start, too
CLOSING_TIME = 2.0  # seconds in which it closes a shell
LAST_WORDS = 500  # characters of what a process says that ends by itself
FRAGMENT = struct.Struct(">QQBI")  # PSRP's: which message, which part of it, first or last, bytes that follow
PIPELINE_STATE = (0x00041006).to_bytes(4, "little")  # the type of a command's last message, behind its destination
SESSION = "@{ SchemaVersion = '2.0.0.0'; GUID = '6f3a2a0e-5c7e-4f6c-9b3e-0d1c2b3a4f5e'; "
FULL = ""
CONSTRAINED = f"{SESSION}SessionType = 'Default'; LanguageMode = 'ConstrainedLanguage' }}"
RESTRICTED = f"{SESSION}SessionType = 'Default'; LanguageMode = 'RestrictedLanguage' }}"
NO_LANGUAGE = f"{SESSION}SessionType = 'RestrictedRemoteServer' }}"
# How many of a poll's scripts PowerShell 7 has compiled, of those that it finds again by their text.
COMPILED = """@([scriptblock].GetField('s_cachedScripts', 'NonPublic, Static').GetValue($null).Keys |
    Where-Object Item2 -like '*function Judge*').Count"""

# === The engine ==============================================================


class EngineProcess(NamedTuple):
    """A process, the file that holds the session configuration of its next shell, if it has one, and that of what it
    says beside its answers."""

    process: subprocess.Popen[bytes]
    file: str
    errors: Path


class Engine:
    """How to start PowerShell. A process whose shell was closed waits for the next one: to start it costs seconds of
    CPU time, and to compile what it runs. Nothing that a session can change outlasts its runspace but the process's
    own: assemblies, environment, priority. The file with a session configuration is read for each shell, so that one
    process serves them all. `folder` is where a test puts what the engine shall see."""

    def __init__(self, folder: Path, program: Path, wine: Wine | None) -> None:
        self.folder, self.wine = folder, wine
        self.command = [wine.program, str(program)] if wine else [str(program)]
        self.five = program.name.lower() == "powershell.exe"  # which has no -ConfigurationFile
        self.environment = dict(os.environ)
        if wine:
            self.environment = {**wine.environment, "PSModulePath": as_windows(MODULES)}
            self.environment["HC_CIM"] = as_windows(folder / "cim.json")
            self.environment["WINEDLLOVERRIDES"] += ";explorer.exe=d"  # a desktop, which whoever is first would begin
            self.set_rows()
        self.deaths: list[str] = []  # of processes that ended by themselves, with their code and last words
        self._lock = threading.Lock()  # guards _idle
        self._idle: list[EngineProcess] = []
        self._numbers = itertools.count()
        # Wine's own services end with its last process, which would be any shell's.
        self._services = self._popen(folder / "cmd.txt", wine.program, "cmd") if wine else None

    def set_rows(self, **changes: Any) -> None:
        """What CIM answers from now on: a class with its rows, "denied", or None where there is no such class."""
        rows = {name: value for name, value in (ROWS | changes).items() if value is not None}
        (self.folder / "cim.json").write_text(json.dumps(rows), encoding="utf-8")

    def path(self, file: Path) -> str:
        """How the engine calls a file."""
        return as_windows(file) if self.wine else str(file)

    def write(self, name: str, text: str) -> str:
        """Put a file there; how the engine calls it."""
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.path(self.folder / name)

    def opener(
        self, session: str = FULL, kind: type[EngineShell] | None = None, *, fresh: bool = False
    ) -> Callable[[WSManServer, str, str], Shell]:
        """For WSManServer's `open_shell`: shells with a session configuration, the text of a .pssc file; each a `fresh`
        process, as on a host."""
        if session and self.five:
            pytest.skip("Windows PowerShell takes session configurations from Register-PSSessionConfiguration only")
        return functools.partial(kind or EngineShell, self, session, fresh)

    def take(self, session: str, *, fresh: bool = False) -> EngineProcess:
        """A process that has no shell, and whose next one has this session configuration."""
        with self._lock:
            waiting = [one for one in self._idle if bool(one.file) == bool(session) and one.process.poll() is None]
            found = waiting[0] if waiting and not fresh else None
            if found:
                self._idle.remove(found)
            file = found.file if found else f"{next(self._numbers)}.pssc" if session else ""
        arguments = ("-ConfigurationFile", self.write(file, session)) if session else ()
        if found:
            return found
        errors = self.folder / f"{next(self._numbers)}.txt"
        process = self._popen(errors, *self.command, "-s", "-NoProfile", "-NoLogo", *arguments)
        return EngineProcess(process, file, errors)

    def give_back(self, process: EngineProcess) -> None:
        """Its shell is closed, and it waits for the next one."""
        with self._lock:
            self._idle.append(process)

    def close(self) -> None:
        """End the processes that wait."""
        for process in (*(one.process for one in self._idle), *filter(None, [self._services])):
            process.kill()
            process.communicate()

    def bury(self, dead: EngineProcess) -> None:
        """Note a process that ended although nobody had ended it."""
        code = dead.process.wait(ANSWER_TIME)
        words = dead.errors.read_text("utf-8", "replace").split()
        self.deaths.append(f"PowerShell ended by itself, with {code}: {' '.join(words)[-LAST_WORDS:] or 'no word'}")

    def _popen(self, errors: Path, *command: str) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        with errors.open("wb") as file:
            return subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, stderr=file)


@contextlib.contextmanager
def open_engine() -> Iterator[Engine]:
    """The engine for a run of tests; skips them where it cannot be had."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        try:
            wine = stack.enter_context(_prefix()) if sys.platform != "win32" else None
            engine = Engine(folder, unpack_powershell(FOLDER), wine)
        except Unavailable as missing:
            pytest.skip(str(missing))
        stack.callback(engine.close)
        yield engine


@contextlib.contextmanager
def _prefix() -> Iterator[Wine]:
    """The wine prefix, with all that is in it, beside others who use it."""
    wine = Wine(FOLDER / "prefix")
    unpacked = "HEALTHCHECKER_PWSH" in os.environ or (FOLDER / "pwsh").exists()
    if not (unpacked and (wine.prefix / "whole").exists()):
        with locked(FOLDER, alone=True):
            unpack_powershell(FOLDER)
            build_prefix(wine)
    try:
        with locked(FOLDER, alone=False):
            yield wine
    finally:
        end_unless_used(wine, FOLDER)


# === A shell =================================================================


def ends(fragments: bytes) -> bool:
    """Whether the last message of a command begins in them."""
    while fragments:
        size = FRAGMENT.unpack_from(fragments)[3]
        message, fragments = fragments[FRAGMENT.size :][:size], fragments[FRAGMENT.size + size :]
        if message[4:8] == PIPELINE_STATE:
            return True
    return False


class EngineShell(Shell):
    """A shell that has a process. `changed` guards what came of it and what is written to it."""

    def __init__(
        self, engine: Engine, session: str, fresh: bool, owner: WSManServer, uri: str, idle: str
    ) -> None:
        super().__init__(owner, uri, idle)
        taken = engine.take(session, fresh=fresh)
        self.process = taken.process
        self._give_back = None if fresh else functools.partial(engine.give_back, taken)
        self._bury = functools.partial(engine.bury, taken)
        self.alive, self._closed, self._killed = True, False, False
        self._fragments: dict[str, collections.deque[bytes]] = collections.defaultdict(collections.deque)
        self._begun: set[str] = set()  # and not closed since their end
        self._ended: set[str] = set()
        self._acknowledged: set[str] = set()
        self._reader = threading.Thread(target=self._read, name="pwsh", daemon=True)
        self._reader.start()

    def create(self, fragments: bytes) -> None:
        self.send("", NOBODY, fragments)

    def send(self, user: str, command_id: str, fragments: bytes) -> None:
        command_id = command_id or NOBODY  # what is for the pool itself has none
        with self.changed:
            if not self.alive:
                raise FAULTS["shell gone"]
            if command_id not in self._begun | {NOBODY}:
                self._begun.add(command_id)
                self._write(f"<Command PSGuid='{command_id.lower()}' />")
                self.changed.wait_for(lambda: not self.alive or command_id in self._acknowledged, ANSWER_TIME)
            text = base64.b64encode(fragments).decode()
            self._write(f"<Data Stream='Default' PSGuid='{command_id.lower()}'>{text}</Data>")

    def receive(self, command_id: str, ends: float) -> tuple[list[bytes], bool]:
        with self.changed:
            waiting, taken = self._fragments[command_id or NOBODY], list[bytes]()
            while not waiting:
                if not self.alive:
                    raise FAULTS["shell gone"]
                self.may_wait(time.monotonic(), ends)
                self.changed.wait(max(0, ends - time.monotonic()))
            while waiting and sum(map(len, taken)) + len(waiting[0]) <= CHUNK_SIZE:
                taken.append(waiting.popleft())
            return taken, False  # pypsrp reads the end from the fragments

    def signal(self, command_id: str, terminate: bool) -> None:
        with self.changed:
            if terminate and command_id in self._ended:
                self._begun.discard(command_id)
            self._write(f"<{'Close' if terminate else 'Signal'} PSGuid='{command_id.lower()}' />")

    def close(self) -> None:
        with self.changed:
            for command_id in (*self._begun, NOBODY):  # it waits for the end of those that were begun
                self._write(f"<Close PSGuid='{command_id.lower()}' />")
            self.changed.notify_all()
        self._reader.join(CLOSING_TIME)
        if self._closed and self._give_back and self._begun <= self._ended:  # what is cut off may go on for a while
            self._give_back()
            return
        self._killed = True
        self.process.kill()
        self.process.wait()
        self._reader.join(CLOSING_TIME)  # a program that outlives the shell holds its streams
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        if not self._reader.is_alive():
            self.process.stdout.close()

    def _write(self, element: str) -> None:
        assert self.process.stdin
        with contextlib.suppress(OSError, ValueError):  # a process that died or was closed is seen by whoever receives
            self.process.stdin.write(element.encode() + b"\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        """Until the shell is closed or the process ends."""
        assert self.process.stdout
        for element in filter(None, (ELEMENT.match(line.decode()) for line in self.process.stdout)):
            kind, who = element[1], element[2].upper()
            with self.changed:
                if kind == "Data":
                    self._fragments[who].append(fragments := base64.b64decode(element[3]))
                    if ends(fragments):
                        self._ended.add(who)
                elif kind == "CommandAck":
                    self._acknowledged.add(who)
                self._closed = kind == "CloseAck" and who == NOBODY
                self.changed.notify_all()
            if self._closed:
                break
        else:
            self.process.stdout.close()
            if not self._killed:
                self._bury()
        with self.changed:
            self.alive = False
            self.changed.notify_all()
