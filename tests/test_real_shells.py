"""Real shells: what the script's text may hold, and the script under each shell with tools that are not GNU's.

No bash 3.2 (/bin/sh of every Mac), ksh88 or BusyBox 1.01 can be had. In their place stand a model of how bash 3.2
finds the end of `$(`, which only counts parentheses, a list of what none of the three can parse, and posh, a shell of
the same descent as the clones of ksh88, which trips over the same text.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from test_probes import SHELLS, assert_sound, run_script, wanting
from test_real_hosts import resource

from healthchecker import (
    PROBES,
    Check,
    CpuTicks,
    Deadline,
    LocalConnection,
    Output,
    Platform,
    build_script,
    collect,
    evaluate,
    parse_output,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs sh; run on UNIX")
NONCE = "5eed5eed5eed5eed"
MARK = "HEALTHCHECKER_REAL_SHELLS"  # in the environment of all that a test starts, so that what is left over is found
ODD = [Check(name="odd", command="case $x in a) echo 'it''s)';; esac # it's )", timeout=5)]
SCRIPTS = {platform.value: build_script(wanting(platform, ["a b", "it's (x)", "$y"], ODD), NONCE)
           for platform in (*PROBES, Platform.UNIX, Platform.LOCAL)}  # fmt: skip


# --- The script's text -------------------------------------------------------
def closing(text: str, at: int) -> int:
    """Where bash 3.2 sees the end of what opens before `at` with a parenthesis: it counts them, and knows quotes."""
    depth = 1
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
        elif char == "'":
            at = text.index("'", at + 1)
        elif char == '"':
            at = quoted(text, at + 1)
        elif char in "()":
            depth += 1 if char == "(" else -1
            if not depth:
                return at
        at += 1
    raise ValueError("no end")


def quoted(text: str, at: int) -> int:
    """The end of a double quotation."""
    while text[at] != '"':
        if text[at] == "\\":
            at += 1
        elif text.startswith("$(", at):
            at = closing(text, at + 2)
        at += 1
    return at


def substitutions(text: str, in_quotes: bool = False) -> list[str]:
    """What stands in each `$(`, also in those within another, as bash 3.2 sees it."""
    found, at = [], 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 1
        elif char == "'" and not in_quotes:
            at = text.index("'", at + 1)
        elif char == '"':
            end = quoted(text, at + 1)
            found += substitutions(text[at + 1 : end], in_quotes=True)
            at = end
        elif char == "#" and not in_quotes and (at == 0 or text[at - 1] in " \t\n;"):
            at = text.find("\n", at) if "\n" in text[at:] else len(text)
        elif text.startswith("$((", at):
            at += 2
        elif text.startswith("$(", at):
            inside = text[at + 2 : closing(text, at + 2)]
            found += [inside, *substitutions(inside)]
            at += 2 + len(inside)
        at += 1
    return found


def parses(text: str, shell: str = "dash") -> bool:
    return subprocess.run([shutil.which(shell) or "sh", "-n"], input=text.encode(), capture_output=True,
                          check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("echo $(date; echo ')') $(a \"$(b ')')\")", ["date; echo ')'", "a \"$(b ')')\"", "b ')'"]),
        ("x=$(case y in (y) echo 1;; esac)", ["case y in (y) echo 1;; esac"]),
        ("x=$(case y in y) echo 1;; esac)", ["case y in y"]),
        ("# it's $(\necho '$(' \\$\\( $((1 + (2))) # $(", []),
        ("echo $(( $(date +%s) - t ))", ["date +%s"]),
        ('"${new%.}" "$(a "b)" c)"', ['a "b)" c']),
    ],
)
def test_the_model_of_bash_3_2(text: str, expected: list[str]) -> None:
    assert substitutions(text) == expected


@pytest.mark.parametrize("platform", SCRIPTS)
def test_each_substitution_is_whole_in_the_eyes_of_bash_3_2(platform: str) -> None:
    script = SCRIPTS[platform]
    assert parses(script)
    found = substitutions(script)
    assert len(found) >= len(PROBES[Platform.POSIX].probes)
    assert [text for text in found if not parses(text)] == []
    assert not [text for text in found if re.search(r"(^|\s)#", text)], "a quote in a comment would not end there"


@pytest.mark.parametrize("platform", SCRIPTS)
def test_posh_parses_the_script(platform: str) -> None:
    if not shutil.which("posh"):
        pytest.skip("posh is not installed (apt-get install posh)")
    assert parses(SCRIPTS[platform], "posh")


UNKNOWN = {  # what bash 3.2, Solaris' and AIX' ksh88 and BusyBox 1.01's ash (or one of them) cannot parse
    r";;?&": "a case that falls through",
    r"\|&": "pipe of both streams",
    r"(?<![0-9>])&>": "redirection of both streams",
    r"<<<": "here-string",
    r"[<>]\(": "process substitution",
    r"\{[0-9a-z]+\.\.": "sequence",
    r"\[\[|\]\]": "[[",
    r"(?<!\$)\(\(": "arithmetic command",
    r"\$\{!": "indirection",
    r"\$\{\w+(/|:[^-+=?]|,,|\^\^)": "replacement, slice or case of a parameter",
    r"\$\{\w+@": "transformation of a parameter",
    r"\$'": "ANSI quotation",
    r'\$"': "translated quotation",
    r"\bfunction\s": "function",
    r"(^|[;&|({]|\bdo|\bthen|\belse)\s*(local|declare|typeset|let|select|source|coproc|shopt|mapfile)\b": "no POSIX",
    r"\w\+=": "+=",
    r"\w+=\(": "array",
    r"\$\(<": "$(<file)",
    r"\bread\s+-": "options of read",
    r"\bprintf\s+-v": "printf -v",
    r"\btest\s.*==|\[\s.*\s==\s": "== of test",
    r"\bwait\s+-n": "wait -n",
    r"<>": "read and write",
    r">\|": "clobber",
    r"\btrap\b.*\b(ERR|DEBUG|RETURN)\b": "trap of bash",
    r"\$\(\([^)]*(\*\*|\+\+|--|\?|,)": "operators of arithmetic",
    r"\becho\s+-[neE]": "options of echo",
}


def code_of(script: str) -> str:
    """Without comments, and without what stands in single quotes."""
    return re.sub(r"'[^']*'", "''", re.sub(r"(?m)(^|\s)#.*", "", script))


@pytest.mark.parametrize("platform", SCRIPTS)
@pytest.mark.parametrize("pattern", UNKNOWN, ids=list(UNKNOWN.values()))
def test_nothing_that_an_old_shell_cannot_parse(platform: str, pattern: str) -> None:
    found = re.search(pattern, code_of(SCRIPTS[platform]), re.MULTILINE)
    assert not found, found


@pytest.mark.parametrize(("text", "known"), [
    ("a ;;& b", False), ("x=(1 2)", False), ("[[ x ]]", False), ("x=${y:0:1}", False), ("x=${y:-1}", True),
    ("$((1 + 2))", True), ("((x))", False), ("cat <<< x", False), ("a 2>&1", True), ("a &>b", False), ("x+=1", False),
    ("echo -n x", False), ("${x#*y}", True), ("f() { :; }", True), ("local x", False), ("x=$'a'", False),
])  # fmt: skip
def test_the_list_finds_what_it_should(text: str, known: bool) -> None:
    assert known != any(re.search(pattern, code_of(text), re.MULTILINE) for pattern in UNKNOWN)


def test_services_and_checks_are_quoted_out_of_the_shells_sight() -> None:
    """However they read, the script stays whole, under every shell here."""
    names = ["MSSQL$PAYROLL", "a (b)", "it's", "x[1]", "c#", "a & b", '"', "`x`", "$(x)", "*"]
    script = build_script(wanting(Platform.POSIX, names, ODD), NONCE)
    for shell in ("dash", "bash", "mksh", "ksh", "yash", "zsh", "posh"):
        assert not shutil.which(shell) or parses(script, shell), shell
    text, _ = run_script(["sh", "-s"], script)
    assert list(parse_output(text, NONCE, None).services) == names


# --- The script with other tools ---------------------------------------------
TOOLS = """awk cat cut date dd df echo egrep expr getconf grep head id kill ls ps sed sleep sort tail timeout tr uname
    uptime"""


@pytest.fixture
def toolbox(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder, open to all, with the tools of one program, besides printf, true, test and [."""
    program = shutil.which(request.param)
    if not program:
        pytest.skip(f"{request.param} is not installed (apt-get install {request.param})")
    listed = subprocess.run([program, *(["--list"] if request.param == "busybox" else [])], capture_output=True,
                            encoding="ascii", check=True).stdout.split()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        for name in {*TOOLS.split()} & {*listed}:
            (folder / name).symlink_to(program)
        for name in ("printf", "true", "test", "["):
            (folder / name).symlink_to(shutil.which(name) or pytest.fail(name))
        service = folder / "service"
        service.write_text('#!/bin/sh\necho "$1 is stopped"\n', encoding="ascii")
        service.chmod(0o755)
        yield folder


def without_path(script: str) -> str:
    return re.sub(r"^PATH=.*$", ":", script, flags=re.MULTILINE)


def disks() -> dict[str, float]:
    """What the machine's own df says, read by this test alone."""
    table = subprocess.run(["df", "-PkTl"], capture_output=True, encoding="utf-8", check=False).stdout
    rows = [line.split() for line in table.splitlines()[1:]]
    real = [row for row in rows if row[0].startswith("/dev/") and row[1] in ("ext4", "xfs", "btrfs")]
    found: dict[str, list[str]] = {}
    for row in sorted(real, key=lambda row: len(row[6])):
        found.setdefault(row[0], row)
    return {row[6]: 100 * int(row[3]) / (int(row[3]) + int(row[4])) for row in found.values()}


def command_of(shell: str) -> list[str]:
    program, *options = SHELLS[shell]
    return [shutil.which(program) or pytest.skip(f"{shell} is not installed (apt-get install {shell})"), *options]


def as_nobody(command: list[str]) -> list[str]:
    setpriv = shutil.which("setpriv")
    if os.getuid() != 0 or not setpriv:
        pytest.skip("only root can become a plain account; run as root")
    return [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", *command]


@pytest.mark.parametrize("plain", [False, True], ids=["as this account", "as a plain one"])
@pytest.mark.parametrize(
    "toolbox",
    ["busybox", "toybox"],
    indirect=True,
)
@pytest.mark.parametrize("shell", ["dash", "busybox"])
def test_the_script_with_other_tools(toolbox: Path, shell: str, plain: bool) -> None:
    expected = disks()
    if not sys.platform.startswith("linux") or not expected:
        pytest.skip("compares with the disks of a Linux machine; there are none")
    command = command_of(shell)
    if plain:
        command = as_nobody(command)
    text, _ = run_script(command, without_path(build_script(wanting(Platform.UNIX), NONCE)), PATH=str(toolbox))
    sample = parse_output(text, NONCE, CpuTicks(busy=0.0, total=0.0))
    assert_sound(sample)
    found = {name.partition(" ")[2]: value for name, value in sample.readings("disk_percent")}
    if (toolbox / "df").resolve().name == "toybox" and not plain:  # it counts root's reserve as available to root
        assert found.keys() == expected.keys()
    else:
        assert found == {mount: pytest.approx(value, abs=2) for mount, value in expected.items()}
    assert {"memory_percent", "load_per_cpu"} <= sample.metrics.keys() and "cpu_count" in sample.details


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("platform", [Platform.UNIX, Platform.POSIX])
def test_a_plain_account_reads_what_root_does(shell: str, platform: Platform) -> None:
    """With the machine's own tools, but for mounts that it may not see."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the tables of Linux and POSIX; run on Linux")
    script = build_script(wanting(platform, ["cron"], ODD), NONCE)
    root, plain = (parse_output(run_script(command, script)[0], NONCE, CpuTicks(busy=0.0, total=0.0))
                   for command in (command_of(shell), as_nobody(command_of(shell))))
    assert_sound(plain)
    kinds, kinds_of_root = ({name.partition(" ")[0] for name in sample.metrics} for sample in (plain, root))
    assert {"load_per_cpu"} <= kinds == kinds_of_root
    assert plain.checks == root.checks and plain.services.keys() == root.services.keys()
    assert plain.problems == root.problems


@pytest.mark.parametrize("shell", SHELLS)
def test_a_login_without_the_usual_path(shell: str) -> None:
    """`PATH=/home/x/bin` in a .bashrc: the system's own commands are found all the same."""
    command, script = command_of(shell), build_script(wanting(Platform.UNIX), NONCE)
    usual, bare = (parse_output(run_script(command, script, PATH=path)[0], NONCE, CpuTicks(busy=0.0, total=0.0))
                   for path in (os.environ["PATH"], "/nowhere"))
    assert bare.metrics.keys() == usual.metrics.keys() and bare.problems == usual.problems


@pytest.mark.parametrize("shell", SHELLS)
def test_a_library_that_is_to_be_loaded_and_is_missing(shell: str) -> None:
    """Of a package that is gone: glibc complains for each command, on stderr, and all of them do what they should."""
    command, checks = command_of(shell), [Check(name="plug-in", command="cat /etc/hostname", exit="nagios")]
    script = build_script(wanting(Platform.UNIX, ["cron"], checks), NONCE)
    usual, odd = (parse_output(run_script(command, script, **environ)[0], NONCE, CpuTicks(busy=0.0, total=0.0))
                  for environ in ({"A": "b"}, {"LD_PRELOAD": "/nowhere/lib.so"}))
    assert {**odd.details, "uptime_seconds": 0} == {**usual.details, "uptime_seconds": 0}
    assert odd.metrics.keys() == usual.metrics.keys() and odd.problems == usual.problems
    assert odd.checks == usual.checks and odd.services == usual.services


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("toolbox", ["busybox"], indirect=True)
def test_a_command_that_is_missing_is_what_is_told(toolbox: Path, shell: str) -> None:
    """And no df that hangs, and no total of the memory."""
    (toolbox / "df").unlink()
    (toolbox / "grep").unlink()
    script = without_path(build_script(wanting(Platform.UNIX), NONCE))
    problems = parse_output(run_script(command_of(shell), script, PATH=str(toolbox))[0], NONCE, None).problems
    assert "df: exit status 127" in problems["disk_percent"] and "no end" not in problems["disk_percent"]
    assert "grep" in problems["memory_percent"] and "MemTotal" not in problems["memory_percent"]


@pytest.mark.parametrize("shell", SHELLS)
def test_where_proc_is_missing_that_is_what_is_told(shell: str) -> None:
    """As in a chroot: real shells, and the files in a place that is none."""
    script = build_script(wanting(Platform.LINUX), NONCE).replace("/proc/", "/nowhere/proc/")
    problems = parse_output(run_script(command_of(shell), script)[0], NONCE, None).problems
    for metric, path in (("memory_percent", "meminfo"), ("load_per_cpu", "loadavg"), ("swap_percent", "meminfo")):
        assert f"/nowhere/proc/{path}" in problems[metric] and "exit status" in problems[metric]


@pytest.mark.parametrize("toolbox", ["busybox", "toybox"], indirect=True)
def test_a_service_that_says_that_it_is_stopped(toolbox: Path) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("asks service(8) in a folder of its own; run where systemd is not the init")
    text, _ = run_script([shutil.which("dash") or "sh", "-s"],
                         without_path(build_script(wanting(Platform.LINUX, ["app"]), NONCE)), PATH=str(toolbox))
    assert not parse_output(text, NONCE, None).services["app"].good


# --- Slow things, and what is left over --------------------------------------
def left_over(mark: str) -> list[str]:
    """Command lines of live processes that have the mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environ = (entry / "environ").read_bytes() + b"\0"
            if f"{MARK}={mark}\0".encode() in environ and int(entry.name) != os.getpid():
                found.append(f"{entry.name} " + (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


STARTED: list[subprocess.Popen[bytes]] = []  # by the test that runs, and not waited for yet


@pytest.fixture
def mark(request: pytest.FixtureRequest) -> Iterator[str]:
    name = re.sub(r"\W", "_", f"{request.node.name}_{os.getpid()}")  # others may run the same test
    yield name
    for line in left_over(name):
        with contextlib.suppress(OSError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    while STARTED:
        STARTED.pop().wait(10)


def in_folder(folder: Path, **scripts: str) -> str:
    """A PATH whose commands are these scripts first."""
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="ascii")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


HANGS = "trap '' TERM\ncase $* in *--help*) echo 'Usage: df --local'; exit;; esac\nexec sleep 60"


def partial(command: list[str], script: str, seconds: float, environ: dict[str, str], seen: str = "\0") -> str:
    """What a poll reads until its deadline, or has `seen` this; then it goes away, as a closed channel does."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, **environ}, start_new_session=True)
    STARTED.append(process)
    assert process.stdin and process.stdout
    process.stdin.write(script.encode())
    process.stdin.close()
    os.set_blocking(process.stdout.fileno(), False)
    received, until = b"", time.monotonic() + seconds
    while time.monotonic() < until and not any(mark in received for mark in (b" done\n", seen.encode())):
        received += process.stdout.read() or b""
        time.sleep(0.02)
    process.stdout.close()
    return received.decode(errors="replace")


@pytest.mark.long
@pytest.mark.parametrize("shell", ["dash", "bash", "busybox", "ksh"])
def test_a_hanging_df_costs_no_service_and_no_check_its_answer(shell: str, tmp_path: Path, mark: str) -> None:
    path = in_folder(tmp_path, df=HANGS, service="echo $1 is running")
    check = Check(name="good", command="echo fine", timeout=5)
    script = build_script(wanting(Platform.LINUX, ["nginx"], [check]), NONCE)
    text = partial(command_of(shell), script, 9, {"PATH": path, MARK: mark})
    sample = parse_output(text, NONCE, None)
    assert sample.checks["good"].text == "fine" and sample.services["nginx"].text
    assert "memory_percent" in sample.metrics and sample.problems["disk_percent"]


@pytest.mark.long
def test_hanging_dfs_do_not_pile_up(tmp_path: Path, mark: str) -> None:
    path = in_folder(tmp_path, df=HANGS)
    script = build_script(wanting(Platform.LINUX), NONCE)
    for _ in range(3):
        partial([shutil.which("dash") or "sh", "-s"], script, 2, {"PATH": path, MARK: mark})
    until = time.monotonic() + 10  # for what ends by itself
    while len(stuck := [line for line in left_over(mark) if "sleep 60" in line]) > 1 and time.monotonic() < until:
        time.sleep(0.2)
    assert len(stuck) <= 1


@pytest.mark.long
@pytest.mark.parametrize(("shell", "timeout"), [("dash", ""), ("bash", "exit 1")], ids=["timeout(1)", "none"])
def test_hanging_services_do_not_pile_up(shell: str, timeout: str, tmp_path: Path, mark: str) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("asks service(8) in a folder of its own; run where systemd is not the init")
    path = in_folder(tmp_path, service="exec sleep 600", **({"timeout": timeout} if timeout else {}))
    script = build_script(wanting(Platform.LINUX, ["nginx"], timeout=2.0), NONCE)
    for _ in range(3):
        partial(command_of(shell), script, 60, {"PATH": path, MARK: mark}, "begin service nginx")
    wait_for(lambda: not left_over(mark), 30)


class Leaving:
    """A connection to this machine that leaves a df behind as soon as it runs, or stays to the end."""

    def __init__(self, place: str, after: str = "", **environ: str) -> None:
        self.place, self.after, self.environ = place, after, environ

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        shell = [shutil.which("dash") or "sh", "-s"]
        without = script.replace("/proc/$2/", "/nowhere/") if self.place != "proc" else script
        nonce = output.mark.decode().split("@")[1].split()[0]
        text = partial(shell, without, 60, self.environ, seen=f"{self.after}@{nonce} df ")
        while output.mark.decode() not in text and not deadline.over:
            time.sleep(0.02)
        return output.take(text.encode())


@pytest.mark.parametrize("place", ["proc", "ps", "neither"])
def test_beside_a_df_that_cannot_be_ended_no_other_is_started(place: str, tmp_path: Path, mark: str) -> None:
    """A stand-in for one that waits for a dead disk in the kernel: a timeout(1) whose signals have no effect."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "df").symlink_to(shutil.which("sleep") or "")
    commands = {
        "timeout": 'shift 3; exec "$@"', "service": "echo Id=zfs-zed.service: $1 is running",
        "zfs": f"echo >>{tmp_path}/started",
        **({"ps": "exit 1"} if place == "neither" else {}),
        "df": f"case $* in *--help*) echo 'Usage: df --local'; exit;; esac\necho >>{tmp_path}/started\n"
              f"exec {tmp_path}/real/df 60",
    }  # fmt: skip
    path = in_folder(tmp_path, **commands)
    settings = resource(timeout="1", limits={"disk_percent": "90"}, services=["nginx"], platform="linux",
                        checks=[{"name": "good", "command": "echo fine"}])
    connection, sample = Leaving(place, PATH=path, **{MARK: mark}), None
    stuck = set()
    for _ in range(3):
        sample = collect(settings, connection, sample)
        assert sample.checks["good"].good and sample.services["nginx"].text and "memory_percent" in sample.metrics
        verdict = evaluate(sample, settings)
        assert verdict.state == ("degraded" if sample.services["nginx"].good else "unhealthy")
        problem = sample.problems["disk_percent"]
        found = re.fullmatch(r"df from \d\d \w{3} \d\d:\d\d still hangs \(process (\d+)\)", problem)
        assert found, problem
        stuck.add(int(found[1]))
        assert len(stuck) == 1
    assert len((tmp_path / "started").read_text(encoding="ascii").splitlines()) == 1
    os.kill(stuck.pop(), signal.SIGKILL)    # the disk is back
    wait_for(lambda: not any(line.endswith("/real/df 60 ") for line in left_over(mark)))
    (tmp_path / "df").unlink()
    assert collect(resource(timeout="60", platform="linux"), Shell(), sample).readings("disk_percent")


@pytest.mark.long
@pytest.mark.parametrize("place", ["proc", "ps", "illumos"])
def test_a_zfs_that_cannot_be_ended_costs_no_disk_its_reading(place: str, tmp_path: Path, mark: str) -> None:
    """Nor is a second one started beside it. The same stand-in; what a suspended pool may do."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "zfs").symlink_to(shutil.which("sleep") or "")
    if place == "illumos":      # its ps knows s, but no stat
        in_folder(tmp_path, ps=f'case $* in *stat*) exit 2;; esac\nexec {shutil.which("ps")} "$@"')
    path = in_folder(tmp_path, timeout='shift 3; exec "$@"', mount="echo 'tank on / (zfs, local)'",
                     df="echo 'tank 100 40 60 40% 1 9 10% /'",
                     zfs=f"echo >>{tmp_path}/started\nexec {tmp_path}/real/zfs 60")
    settings = resource(timeout="2", platform="freebsd")
    connection = Leaving(place, " begin pools\n\n", PATH=path, **{MARK: mark})
    sample, stuck = None, set()
    for _ in range(3):
        sample = collect(settings, connection, sample)
        assert sample.metrics["disk_percent /"] == 40.0
        assert re.fullmatch(r"zfs from \d\d .* still hangs \(process \d+\)", sample.problems["disk_percent"])
        stuck.add(int(sample.stuck[0]))
    assert len(stuck) == 1 and len((tmp_path / "started").read_text(encoding="ascii").splitlines()) == 1
    os.kill(stuck.pop(), signal.SIGKILL)


def test_a_number_that_is_no_df_any_more_hangs_nowhere(mark: str) -> None:
    """Another process with its number, and one that has ended and that nobody waits for."""
    other = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: mark})
    STARTED.append(other)
    ended = subprocess.Popen(["true"], env={**os.environ, MARK: mark})
    STARTED.append(ended)
    for number in (other.pid, ended.pid, 2 ** 30):
        for place in ("/proc/$2/", "/nowhere/"):
            script = build_script(wanting(Platform.LINUX), NONCE, (str(number), "26 Nov 12:00"))
            script = script.replace("/proc/$2/", place)
            text, _ = run_script(["sh", "-s"], script)
            assert parse_output(text, NONCE, None).readings("disk_percent")


def test_a_local_shell_may_end_after_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no connection that was lost."""
    monkeypatch.setattr(LocalConnection, "SHELL", ["/bin/sh", "-c", "exec >&- 2>&-; sleep 0.05; exit 3"])
    assert LocalConnection.__new__(LocalConnection).run("x", Output("mark"), Deadline(60))


def test_the_local_connection_ends_everything_where_there_is_no_ps(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleep").symlink_to(shutil.which("sleep") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(MARK, mark)
    connection = LocalConnection.__new__(LocalConnection)  # run() looks at nothing of it
    connection.run("sleep 61; echo\n", Output("never"), Deadline(1.0))
    wait_for(lambda: not left_over(mark), 30)


# No timeout(1). yash wants even what it has built in to be found there, as POSIX says.
BARE_TOOLS = "uname date dd sleep getconf df uptime printf cat echo test [ true kill".split()


@pytest.mark.long
@pytest.mark.parametrize("shell", SHELLS)
def test_a_check_leaves_nothing_behind_without_timeout_1(shell: str, tmp_path: Path, mark: str) -> None:
    for name in BARE_TOOLS:
        (tmp_path / name).symlink_to(shutil.which(name) or pytest.fail(name))
    command = command_of(shell)
    check = Check(name="good", command="echo 1", timeout=77)
    script = without_path(build_script(wanting(Platform.POSIX, [], [check]), NONCE))
    text, _ = run_script(command, script, **{"PATH": str(tmp_path), MARK: mark})
    assert parse_output(text, NONCE, None).checks["good"].good
    wait_for(lambda: not left_over(mark), 30)  # a watcher may sleep a second more


@pytest.mark.long
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("timeout", ["", 'exec busybox timeout "$@"', "exit 127"], ids=["GNU", "BusyBox", "none"])
def test_a_check_that_ends_well_when_it_is_ended_is_bad(timeout: str, shell: str, tmp_path: Path, mark: str) -> None:
    """As tcpdump -c 1 and mosquitto_sub -C 1 do, which never got what they wait for."""
    path = in_folder(tmp_path, **({"timeout": timeout} if timeout else {}))
    checks = [Check(name="waits", command="trap 'exit 0' TERM; while :; do sleep 0.1; done", timeout=1),
              Check(name="good", command="echo 1", timeout=9)]
    script = build_script(wanting(Platform.POSIX, [], checks), NONCE)
    text, _ = run_script(command_of(shell), script, PATH=path, **{MARK: mark})
    outcomes = parse_output(text, NONCE, None).checks
    assert not outcomes["waits"].good and outcomes["waits"].text.startswith("no end in 1 s")
    assert (outcomes["good"].good, outcomes["good"].text) == (True, "1")
    wait_for(lambda: not left_over(mark), 30)


# --- Checks with the exit codes of Nagios ------------------------------------
class Shell:
    """This machine's sh as a connection, with a PATH of its own."""

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        text, _ = run_script(["sh", "-s"], script, deadline.seconds)
        assert output.mark.decode() in text
        return output.take(text.encode())


PLUGINS = Path("/usr/lib/nagios/plugins")
NAGIOS = {  # a check of `exit: nagios`: the state it makes, what the reason names, metrics by their label
    "good": ("echo 'OK - fine | load1=0.500;1;2;0 time=12ms;;;0'", "healthy", "", {"load1": 0.5, "time": 12.0}),
    "warning": ("echo 'WARNING - so so'; exit 1", "degraded", "so so", {}),
    "critical": ("echo 'CRITICAL - gone | used=97%;80;95;0;100'; exit 2", "unhealthy", "gone", {"used": 97.0}),
    "unknown": ("echo 'UNKNOWN - cannot say'; exit 3", "degraded", "cannot say", {}),
    "no such plug-in": ("/usr/lib/nagios/plugins/check_nothing", "unhealthy", "", {}),
    "not its codes": ("echo huh; exit 42", "unhealthy", "", {}),
    "a quoted label": ("echo \"OK | '/var log (inodes)'=5;;;0;9\"", "healthy", "", {"/var log (inodes)": 5.0}),
    "no data": ("echo 'OK | nothing to see; a=b c='", "healthy", "", {}),
    "an unknown value": ("echo 'OK | t=U'", "healthy", "", {}),
}
PACKAGED = {
    "check_dummy 0": f"{PLUGINS}/check_dummy 0 fine",
    "check_dummy 1": f"{PLUGINS}/check_dummy 1 so",
    "check_dummy 2": f"{PLUGINS}/check_dummy 2 gone",
    "check_dummy 3": f"{PLUGINS}/check_dummy 3 who",
    "check_load": f"{PLUGINS}/check_load -w 900,900,900 -c 1000,1000,1000",
    "check_disk": f"{PLUGINS}/check_disk -w 0 -c 0 -p /",
    "check_procs": f"{PLUGINS}/check_procs -w 1:100000 -c 1:200000",
    "check_swap": f"{PLUGINS}/check_swap -w 0 -c 0 -n ok",
    "check_time of nobody": f"{PLUGINS}/check_tcp -H 127.0.0.1 -p 1",
}
STATES = {0: "healthy", 1: "degraded", 2: "unhealthy", 3: "degraded"}


def nagios(command: str, **limits: Any) -> Any:
    checks = [{"name": "x", "command": command, "exit": "nagios", "timeout": "20", "limits": limits}]
    settings_ = resource(checks=checks, timeout="30")
    sample = collect(settings_, Shell(), None)
    return sample, evaluate(sample, settings_)


@pytest.mark.parametrize("title", NAGIOS)
def test_checks_of_nagios(title: str) -> None:
    command, state, reason, metrics = NAGIOS[title]
    sample, verdict = nagios(command)
    assert verdict.state == state and reason in verdict.reason
    assert sample.checks["x"].metrics == metrics
    assert not any("x" in name.split() for name in sample.metrics), "they are the check's, and none of the machine's"


def test_the_packaged_plug_ins_work_as_they_are() -> None:
    if not PLUGINS.is_dir():
        pytest.skip("check_by_ssh is missing")  # as packages.txt names monitoring-plugins-basic
    for title, command in PACKAGED.items():
        status = subprocess.run(["sh", "-c", command], capture_output=True, check=False).returncode
        sample, verdict = nagios(command)
        assert verdict.state == STATES[status], title
        if "check_load" in title:
            assert sample.checks["x"].metrics.keys() == {"load1", "load5", "load15"}


@pytest.mark.parametrize(("output", "state", "named"), [
    ("OK | queue=120;;;0", "unhealthy", "x/queue at 120, fail above 100"),
    ("OK | queue=90;;;0", "degraded", "x/queue at 90, warn above 50"),
    ("OK | queue=50", "healthy", ""),
    ("OK | queue=U", "degraded", "x/queue cannot be read"),
    ("OK | queue=120,5", "degraded", "x/queue cannot be read"),
    ("OK", "degraded", "x/queue cannot be read"),
])  # fmt: skip
def test_performance_data_may_be_limited(output: str, state: str, named: str) -> None:
    _, verdict = nagios(f"echo '{output}'", queue={"warn": "50", "fail": "100"})
    assert verdict.state == state and named in verdict.reason
