"""Starts healthchecker.py as a process of its own, as a service or for one command, and collects what it prints.

`Program` is the service as a service manager starts it: for tests of what a start imports, inherits and reads.
`Service` has the modules already, so that it costs a seventh of the processor time: for tests of what a running service
does. `Team` starts worker processes alone: what the main process does with them, the test does itself."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import http.client
import importlib
import itertools
import logging
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
from postgres import URL_FILE, database_in, settings_of
from rights import without_root_rights
from typing_extensions import Self  # typing has it from Python 3.11 on

import healthchecker
from healthchecker import HealthAggregator, Store, Supervisor, Vault, listen, load_inventory

FEW = 1000  # rounds of PBKDF2: what the real number costs is not what most tests show
PROGRAM = Path(__file__).resolve().parent.parent / "healthchecker.py"
SERVING = re.compile(r"serving on http://(\S+):(\d+), console (?:off|on http://(\S+):(\d+)/-/)")
OWN_CONSOLE = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # so that Ctrl-C reaches the service and its workers only
_spawn = multiprocessing.util.spawnv_passfds
CTRL_C = """
import ctypes, sys
kernel = ctypes.WinDLL("kernel32", use_last_error=True)
kernel.FreeConsole()
joined = kernel.AttachConsole(int(sys.argv[1]))
kernel.SetConsoleCtrlHandler(None, True)    # it reaches this process too
sent = joined and kernel.GenerateConsoleCtrlEvent(0, 0)
sys.exit(0 if sent else ctypes.get_last_error() or 1)
"""


class Answer(NamedTuple):
    """An HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with `extra`; the output of a child is UTF-8 and comes line by line."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **(extra or {})}


def command(inventory: Path, *arguments: str, program: Path = PROGRAM) -> list[str]:
    return [sys.executable, str(program), "--inventory", str(inventory), *arguments]


def write_inventory(folder: Path, resources: str = "", service: str = "", name: str = "inventory.yaml") -> Path:
    """An inventory on free loopback ports; `resources` and `service` are YAML, each line indented by two spaces.

    It has one worker unless `service` names more: a process costs a second of CPU."""
    path = folder / name
    for setting, value in (("workers", "1"), ("console", "127.0.0.1:0"), ("listen", "127.0.0.1:0")):
        if f"  {setting}:" not in service:
            service = f"  {setting}: {value}\n{service}"
    service = settings_of(folder) + service
    head = f"service:\n{service.rstrip()}\n".replace("\n\n", "\n")
    body = f"resources:\n{resources.rstrip()}\n" if resources.strip() else "resources: []\n"
    path.write_text(head + body, encoding="utf-8", newline="\n")
    return path


@functools.cache
def fresh_processes() -> Any:
    """Processes of their own that cost little: forked from one that has the modules already, where there is fork."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    forkserver = importlib.import_module("multiprocessing.forkserver")  # POSIX only
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["healthchecker", "service", "test_vault", "test_storage", "warm"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server of Python 3.11 and before looks nowhere else
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({"PYTHONPATH": before} if before is not None else {})
    return context


def _main(arguments: list[str], folder: str, environ: dict[str, str], outputs: list[str], unprivileged: bool) -> None:
    """The life of a command of `run`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    for number, path in zip((1, 2), outputs, strict=True):
        with open(path, "a", encoding="utf-8") as sink:
            os.dup2(sink.fileno(), number)
    with quick_workers(), few_rounds(), without_root_rights() if unprivileged else contextlib.nullcontext():
        sys.exit(healthchecker.main(arguments))


def _run(
    arguments: tuple[str, ...], outputs: list[Path], *,
    env: Mapping[str, str] | None = None, timeout: float = 120, unprivileged: bool = False
) -> int:
    """Exit code of a command in a process of `fresh_processes`; it never prints a traceback."""
    for path in outputs:
        path.touch()
    given = (list(arguments), os.getcwd(), environment(env), [str(path) for path in outputs], unprivileged)
    process = fresh_processes().Process(target=_main, args=given)
    process.start()
    process.join(timeout)
    code = process.exitcode
    process.kill()
    process.join()
    said = "".join(path.read_text(encoding="utf-8") for path in outputs)
    assert code is not None, f"it did not end within {timeout} s: {said}"
    assert "Traceback" not in said, said
    return int(code)


def run(
    inventory: Path, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """One command, run to its end."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        code = _run(("--inventory", str(inventory), *arguments), outputs, env=env, timeout=timeout)
        said = (path.read_text(encoding="utf-8") for path in outputs)
        return subprocess.CompletedProcess(list(arguments), code, *said)


def run_cheaply(*arguments: str, unprivileged: bool = False) -> tuple[int, str]:
    """Exit code and output, both streams, of a command whose arguments are given whole.

    `unprivileged`: without root's rights over files."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        code = _run(arguments, [output, output], unprivileged=unprivileged)
        return code, output.read_text(encoding="utf-8")


@functools.cache
def _key_pair() -> dict[str, bytes]:
    """Files of a key pair, made once in a test run: making one takes up to a second."""
    with tempfile.TemporaryDirectory() as folder:
        vault = Vault(Path(folder) / "keys")
        vault.create()
        vault.publish()
        return {path.name: path.read_bytes() for path in (Path(folder) / "keys").iterdir()}


def prepared_keys(folder: Path) -> Path:
    """Puts a key pair into `folder`/keys, as a first start would have made it."""
    keys = folder / "keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    for name, content in _key_pair().items():
        (keys / name).write_bytes(content)
        (keys / name).chmod(0o600)
    return keys


@functools.cache
def _tables() -> bytes:
    """A file with the tables, made once in a test run: making them takes more time than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "healthchecker.db"
        Store(path).close()
        return path.read_bytes()


def prepared_tables(folder: Path) -> None:
    """Puts a database with nothing but its tables into `folder`, as a first start would have made it, unless there is
    one. One of PostgreSQL has them already, see Postgres.prepared."""
    path = folder / "healthchecker.db"
    if not path.exists() and not (folder / URL_FILE).exists():
        path.write_bytes(_tables())
        path.chmod(0o600)


def store_in(folder: Path, machine: str = "") -> Store:
    """The database of a test in its folder."""
    prepared_tables(folder)
    return Store(database_in(folder), machine=machine)


def ask_to_end(process: subprocess.Popen[str]) -> None:
    """SIGTERM; on Windows, where that kills, a Ctrl-C sent by a process that joins its console for it."""
    if sys.platform == "win32":
        sender = [sys.executable, "-c", CTRL_C, str(process.pid)]
        subprocess.run(sender, stdin=subprocess.DEVNULL, check=True, timeout=60)
    else:
        process.terminate()


def _run_worker(path: bytes, arguments: list[Any], kept: list[int]) -> int:
    """In place of `multiprocessing.util.spawnv_passfds`: the same, but with the modules of the process that calls."""
    spawn = importlib.import_module("multiprocessing.spawn")
    given = re.search(r"tracker_fd=(\d+), pipe_handle=(\d+)", " ".join(map(str, arguments)))
    if not given:
        return _spawn(path, arguments, kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which hold no lock that a worker needs
        pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # what is shared stays as it is
    code, _kept = 1, logging.root.handlers  # one that ended here would close what has its number by then
    try:
        logging.root.handlers = []
        bounds = [2, *sorted(kept), 1 << 20]
        for low, high in itertools.pairwise(bounds):
            os.closerange(low + 1, high)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        sys.argv[1:] = ["--multiprocessing-fork"]
        spawn.spawn_main(tracker_fd=int(given[1]), pipe_handle=int(given[2]))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001  # as an interpreter's outermost level
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


@contextlib.contextmanager
def quick_workers() -> Iterator[None]:
    """Worker processes that are started meanwhile have the modules already (POSIX)."""
    if sys.platform != "win32":
        multiprocessing.util.spawnv_passfds = _run_worker
    try:
        yield
    finally:
        multiprocessing.util.spawnv_passfds = _spawn


@contextlib.contextmanager
def few_rounds() -> Iterator[None]:
    """In this process every new password is hashed with few rounds, and the one of a user that does not exist, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(healthchecker, "PBKDF2_ROUNDS", FEW)
        patch.setattr(healthchecker.hash_password, "__defaults__", (FEW,))
        patch.setattr(healthchecker.NOBODY, "rounds", FEW)
        yield


def _serve(arguments: list[str], folder: str, environ: dict[str, str], output: Any) -> None:
    """The life of a `QuickProcess`."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    lines: dict[str, Any] = {"mode": "w", "buffering": 1, "encoding": "utf-8", "closefd": False}
    sys.stdout, sys.stderr = open(1, **lines), open(2, **lines)  # noqa: SIM115
    sys.argv[:] = [str(PROGRAM), *arguments]
    with quick_workers(), few_rounds():
        try:
            sys.exit(healthchecker.main(arguments))
        finally:
            atexit._run_exitfuncs()  # which what was forked by multiprocessing leaves out: the log's end is one


class QuickProcess:
    """A process of `fresh_processes` that serves, with what `Service` uses of Popen."""

    def __init__(self, inventory: Path, environ: dict[str, str]) -> None:
        reader, writer = fresh_processes().Pipe(duplex=False)
        with reader, writer:
            given = (["--inventory", str(inventory)], os.getcwd(), environ, writer)
            self._process = fresh_processes().Process(target=_serve, args=given)
            self._process.start()
            self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
        self.pid = self._process.pid
        self.kill, self.terminate = self._process.kill, self._process.terminate

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("healthchecker", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Program:
    """`healthchecker.py --inventory FILE` as a process; the inventory listens on port 0.

    with Program(inventory) as service:
        assert service.get("/-/livez").status == 200

    At the end of the block it is stopped and its exit code is compared with `code`; however the block ends,
    the process is gone.
    """

    def __init__(
        self,
        inventory: Path,
        *,
        env: Mapping[str, str] | None = None,
        code: int = 0,
        deadline: float = 120,
        program: Path = PROGRAM,
        as_module: bool = False,
    ) -> None:
        self.inventory, self.code, self.deadline = inventory, code, deadline
        self._environment, self.command = environment(env), command(inventory, program=program)
        if as_module:  # as README's unit does, and `make run`
            self.command[1:2] = ["-m", program.stem]
            self._environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(program.parent), self._environment.get("PYTHONPATH"))))
        self._lines: list[str] = []
        self._news = threading.Condition()  # guards _lines and _ended; notified with each line and at the end
        self._ended = False
        self.host, self.port = "127.0.0.1", 0
        self.console = ("127.0.0.1", 0)

    def launch(self) -> Any:
        """The process, for which nobody waits until it serves; its output goes to a pipe."""
        return subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            env=self._environment,
            creationflags=OWN_CONSOLE,
            start_new_session=True,  # a group of its own: Ctrl-C at the tests is not Ctrl-C at the service
        )

    def begin(self) -> None:
        """Has it run, and does not wait until it serves; `kill` is for who called."""
        self.process = self.launch()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        self.begin()
        try:
            found = SERVING.search(self.wait_line("serving on http://"))
            assert found, self.output
            self.host, self.port = found[1].strip("[]"), int(found[2])
            if found[3]:
                self.console = (found[3].strip("[]"), int(found[4]))
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                code = self.stop()
                assert code == self.code, f"exit code {code}, not {self.code}:\n{self.output}"
                killed = code < 0 or (sys.platform == "win32" and code == signal.SIGTERM)
                assert killed or "Traceback" not in self.output, self.output  # of a worker whose start nobody awaits
                assert self._ended, "a process was left behind: something still holds the output"
        finally:
            self.kill()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        """Everything printed so far, both streams."""
        with self._news:
            return "".join(self._lines)

    def wait_line(self, text: str, deadline: float | None = None) -> str:
        """The first line with `text` in it; fails at the deadline, or when the process ends without it."""
        with self._news:
            self._news.wait_for(
                lambda: self._ended or any(text in line for line in self._lines), deadline or self.deadline
            )
            line = next((line for line in self._lines if text in line), None)
        assert line is not None, f"no line with {text!r} in:\n{self.output}"
        return line

    def get(self, path: str = "/", headers: Mapping[str, str] | None = None, method: str = "GET") -> Answer:
        """From the application's door."""
        return self._get((self.host, self.port), path, headers, method)

    def get_console(self, path: str = "/", headers: Mapping[str, str] | None = None, method: str = "GET") -> Answer:
        """From the operators' door."""
        return self._get(self.console, path, headers, method)

    @staticmethod
    def _get(address: tuple[str, int], path: str, headers: Mapping[str, str] | None, method: str) -> Answer:
        connection = http.client.HTTPConnection(*address, timeout=30)
        try:
            connection.request(method, path, headers=dict(headers or {}))
            answer = connection.getresponse()
            body = answer.read().decode("utf-8", "replace")
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, body)
        finally:
            connection.close()

    def wait_status(self, path: str, status: int, deadline: float | None = None) -> Answer:
        """Asks until `path` answers with `status`."""
        ends, pause = time.monotonic() + (deadline or self.deadline), 0.02
        while (answer := self.get(path)).status != status:
            assert time.monotonic() < ends, f"{path}: {answer.status}, not {status}:\n{self.output}"
            with self._news:
                self._news.wait(pause)
            pause = min(0.1, pause * 1.1)
        return answer

    def stop(self, deadline: float = 60) -> int:
        """Asks it to end, as a service manager does, and gives its exit code."""
        if self.process.poll() is None:
            ask_to_end(self.process)
        code = self.process.wait(deadline)
        self._reader.join(deadline)
        return code

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.process.wait()
        self._reader.join(30)
        if self.process.stdout and self._ended:  # a process that was left behind would make this wait
            self.process.stdout.close()


class Service(Program):
    """The same of modules that are there already (POSIX), with keys and tables that were made before. Its processes
    have no other difference but that they share the memory of what was imported, and hash new passwords with few
    rounds."""

    def __enter__(self) -> Self:
        folder = self.inventory.parent
        if sys.platform != "win32" and not any((folder / name).exists() for name in ("keys", "healthchecker.db")):
            prepared_keys(folder)
            prepared_tables(folder)
        return super().__enter__()

    def launch(self) -> Any:
        return super().launch() if sys.platform == "win32" else QuickProcess(self.inventory, self._environment)


class Team:
    """Worker processes on a free port; this process is their main process.

    with Team(tmp_path, 2, "  app: shop:app") as team:
        team.aggregator.SetResource("db1", False)
    """

    def __init__(self, folder: Path, workers: int, service: str = "", *, quick: bool = True) -> None:
        """Not `quick`: they share no memory with this process."""
        self._quick = quick
        inventory = load_inventory(write_inventory(folder, "", f"  workers: {workers}\n{service}"))
        socks = listen("service.listen", inventory.service.listen)
        self.address = ("127.0.0.1", int(socks[0].getsockname()[1]))
        self.aggregator = HealthAggregator()
        self.supervisor = Supervisor(inventory.service, folder, socks, self.aggregator.lease)
        self._thread = threading.Thread(target=self.supervisor.serve)

    def __enter__(self) -> Self:
        """With an open gate. Raises UsageError where the application cannot be loaded."""
        try:
            with quick_workers() if self._quick else contextlib.nullcontext():
                self.supervisor.start()
        except BaseException:
            self.supervisor.close()
            raise
        self.aggregator.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.supervisor.stop()
        self._thread.join(120)
        self.supervisor.close()
        assert not self._thread.is_alive(), "the supervisor does not end"
