"""The blocks of the README that make a service of HealthChecker: each can be pasted, and what it starts serves."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from conftest import wait_for
from service import PROGRAM, SERVING, write_inventory
from test_windows_probes import GRAMMARS, nodes, tree

from healthchecker import ServiceSettings

README = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
POWERSHELL = re.findall(r"^```powershell\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="a unit of systemd is for Linux")
SYSTEMD = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze, of package systemd")
# Says what would have been done by root, and what would have been written.
SUDO = 'set -eu; sudo() { printf "+ %s\\n" "$*"; [ "$1" != tee ] || cat; }\n'
FOLDER = "/opt/healthchecker"


def pasted() -> dict[str, str]:
    """What root would run, and the text that would go into each command."""
    (block,) = SHELL
    options: dict[str, Any] = {"encoding": "utf-8", "capture_output": True, "timeout": 60}
    done = subprocess.run(["/bin/sh"], input=SUDO + block, check=True, **options)
    assert done.stderr == ""
    return dict(re.findall(r"^\+ (.*)\n((?:(?!\+ ).*\n)*)", done.stdout, re.MULTILINE))


def unit(kind: str = "service") -> str:
    return pasted()[f"tee /etc/systemd/system/healthchecker.{kind}"]


@POSIX
def test_what_the_shell_makes_of_its_block() -> None:
    assert [command.split()[0] for command in pasted()] == ["useradd", "chown", "tee", "tee", "systemctl"]
    user = re.search(r"^User=(\w+)$", unit(), re.MULTILINE)
    assert user
    assert [command.split()[-1] for command in pasted()][::4] == [user[1], "healthchecker"]
    assert f"chown -R {user[1]} {FOLDER}" in pasted()


@POSIX
def test_the_service_may_do_no_more_than_it_has_to() -> None:
    """Nor is it started again where that cannot help."""
    lines = {"NoNewPrivileges=true", "ProtectSystem=full", "RestartPreventExitStatus=2 3 4"}
    assert lines <= set(unit().splitlines())


OURS = f"{sys.version_info[0]}.{sys.version_info[1]}"


def stamp(folder: Path, python: str = OURS) -> str:
    """What says that the packages are installed."""
    return f"{python}\n{(folder / 'requirements.txt').read_text(encoding='utf-8')}"


PYTHON = """#!/bin/sh
[ "$1" = -c ] && exec "{real}" "$@"
echo "$@" >> {log}
mkdir -p .venv/bin && printf '#!/bin/sh\necho pip "$1" >> {log}\n' > .venv/bin/pip && chmod +x .venv/bin/pip
"""


@POSIX
@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_packages_are_installed_where_they_are_not_those_wanted(tmp_path: Path) -> None:
    """Whatever date the list of them has (tar and rsync keep it), and in an environment of another Python never."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(PROGRAM.parent / name, tmp_path)
    python, log, wanted = tmp_path / "python", tmp_path / "log", tmp_path / "requirements.txt"
    python.write_text(PYTHON.format(real=sys.executable, log=log), encoding="utf-8")
    python.chmod(0o755)
    kept = tmp_path / ".venv" / "run.stamp"

    def install() -> list[str]:
        log.write_text("", encoding="utf-8")
        command = ["make", "--no-print-directory", "install", f"PYTHON={python}"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return log.read_text(encoding="utf-8").splitlines()

    assert install() == ["-m venv --clear .venv", "pip install"] and kept.read_text(encoding="utf-8") == stamp(tmp_path)
    library = tmp_path / ".venv" / "lib" / f"python{OURS}"
    library.mkdir(parents=True)
    assert install() == []
    wanted.write_text("flask>=99\n", encoding="utf-8")
    os.utime(wanted, (1, 1))
    assert install() == ["-m venv .venv", "pip install"] and install() == []    # what somebody added stays
    kept.write_text(stamp(tmp_path, "3.9"), encoding="utf-8")
    library.rename(library.with_name("python3.9"))
    assert install() == ["-m venv --clear .venv", "pip install"]


@POSIX
@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_what_is_installed_is_for_the_service_s_account(tmp_path: Path) -> None:
    """Whatever umask who installs it has; and nothing is started."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(PROGRAM.parent / name, tmp_path)
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    for name in ("bin/python", "pyvenv.cfg", "run.stamp"):      # as if pip had done its part
        (environment / name).touch(mode=0o700 if name.startswith("bin") else 0o600)
    (environment / "run.stamp").write_text(stamp(tmp_path), encoding="utf-8")
    found = [environment, *environment.rglob("*")]
    for path in (environment, environment / "bin"):
        path.chmod(0o700)
    command = ["make", "--no-print-directory", "install"]   # this may run below a make
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, encoding="utf-8")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["chmod"]
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in found}
    assert modes == {".venv": "0o755", "bin": "0o755", "python": "0o755", "pyvenv.cfg": "0o644", "run.stamp": "0o644"}


@POSIX
def test_the_socket_is_the_service_s() -> None:
    """By its name, its address and at the start of the machine: another address would end the service."""
    assert f"\nListenStream={ServiceSettings().listen}\n" in unit("socket")
    assert "systemctl enable --now healthchecker.socket healthchecker" in pasted()


def complaints(text: str, folder: Path, kind: str = "service") -> list[str]:
    """What systemd has to say about a unit, but not about those of this machine."""
    path = folder / f"healthchecker.{kind}"
    path.write_text(text.replace(FOLDER, str(folder)), encoding="utf-8")
    command = ["systemd-analyze", "--man=no", "verify", str(path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=60)
    return [line for line in done.stderr.splitlines() if path.name in line]


@POSIX
@SYSTEMD
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    assert complaints(unit(), tmp_path) == []
    for right, wrong in {"Restart=always": "Restart=forever", "User=": "Users=", "/bin/python": "/bin/pyhton"}.items():
        assert right in unit()
        assert complaints(unit().replace(right, wrong), tmp_path) != [], wrong
    assert complaints(unit(), tmp_path) == []  # of which the socket is
    assert complaints(unit("socket"), tmp_path, "socket") == []
    for right, wrong in {"127.0.0.1:8080": "x:y", "[Socket]": "[Sockets]"}.items():
        assert complaints(unit("socket").replace(right, wrong), tmp_path, "socket") != [], wrong


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_powershell_takes_its_block(grammar: str) -> None:
    (block,) = POWERSHELL
    wrong = [node for node in nodes(tree(grammar, block)) if node.type == "ERROR" or node.is_missing]
    assert [(node.type, node.start_point, node.text) for node in wrong] == []
    assert tree(grammar, block.replace(")\n", "\n", 1)).has_error
    assert block.isascii()
    assert not re.search(r"`[ \t]+$", block, re.MULTILINE)  # it would continue no line


def test_windows_lets_nobody_else_write_there() -> None:
    """What a folder below C: gives to everybody is gone before the account of the service gets its right."""
    (block,) = POWERSHELL
    first, second = re.findall(r"^icacls C:\\healthchecker (.*?)(?: *#.*)?$", block, re.MULTILINE)
    assert first.split() == ["/inheritance:r", "/grant:r", '"*S-1-5-18:(OI)(CI)F"', '"*S-1-5-32-544:(OI)(CI)F"']
    assert second.split() == ["/grant", '"${account}:(OI)(CI)M"', "/T"]


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_powershell_takes_its_line(grammar: str) -> None:
    (line,) = re.findall(r"`(Invoke-RestMethod .+?)`", README)
    assert not tree(grammar, line).has_error and tree(grammar, line.replace("}", "", 1)).has_error


def shown(pattern: str, block: str) -> str:
    found = re.search(pattern, block, re.MULTILINE)
    assert found, f"no {pattern} in:\n{block}"
    return found[1]


def as_shown() -> list[str]:
    """The command of the unit, on Windows that of the task, with this Python in the place of the environment's."""
    if sys.platform == "win32":
        (block,) = POWERSHELL
        program = PureWindowsPath(shown(r"-Execute (\S+)", block))
        assert program.parent == PureWindowsPath(shown(r"-WorkingDirectory (\S+)", block)) / ".venv" / "Scripts"
        return [str(Path(sys.executable).with_name(program.name)), *shlex.split(shown(r'-Argument "(.+?)"', block))]
    program, *arguments = shlex.split(shown("^ExecStart=(.*)$", unit()))
    assert program == shown("^WorkingDirectory=(.*)$", unit()) + "/.venv/bin/python"
    return [sys.executable, *arguments]


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends it as its service manager does: by a SIGTERM that it answers in time, on Windows at once."""
    process.terminate()
    if sys.platform == "win32":
        process.wait(60)
    else:
        assert shown("^KillMode=(.*)$", unit()) == "mixed"      # or it goes to the shell of a check, too
        assert process.wait(15) == 0


def reader(path: Path) -> Callable[[], str]:
    return lambda: path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.long
@pytest.mark.windows
def test_the_service_starts_as_shown(tmp_path: Path) -> None:
    """In its folder and without a console; all that it has to say is in its log, in UTF-8."""
    shutil.copyfile(PROGRAM, tmp_path / PROGRAM.name)
    write_inventory(tmp_path, "  - {name: Zürich-東京, platform: simulated, seed: 1}", "  log_file: service.log")
    log = reader(tmp_path / "service.log")
    streams = {} if sys.platform == "win32" else dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(
        as_shown(), cwd=tmp_path, creationflags=getattr(subprocess, "DETACHED_PROCESS", 0), **streams
    )
    try:
        wait_for(lambda: "Zürich-東京: unknown -> healthy" in log(), 180)
        found = wait_for(lambda: SERVING.search(log()))
        connection = http.client.HTTPConnection(found[1], int(found[2]), timeout=10)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        end(process)
        assert "Traceback" not in log()
    finally:
        process.kill()
        process.wait()
