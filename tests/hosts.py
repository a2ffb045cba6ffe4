"""Machines that we do not have, played from what they print: tests/recorded/<system>/<host>.transcript.

A transcript is what a terminal would show: lines `$ command`, what it prints (on standard error where a line begins
with its name and a colon, or with "Failed to"), and `[3]` where its exit status is not 0. Lines that begin with `##`
are comments; the first ones say which system and version it is and where the shape was found. Names and numbers are our
own, made so that shares are round. Besides,

    $ cat /proc/mounts      makes that file and its mountinfo; `$ ls -d /run/systemd/system` that folder
    $ sysctl -a             answers any `sysctl` of these variables
    $ systemctl show UNIT   answers whatever properties are asked for
    $ df --options          the letters this df knows, then what it says to any other (X)

`play` runs a script under a shell that finds these commands first, the files in the place of its own, and of this
machine only the tools that every system has.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

RECORDED = Path(__file__).parent / "recorded"
GNU_DF = "BHTPahiklmtx"
TOOLS = """[ awk cat cut date dd echo egrep env expr false fgrep grep head id kill ls mkdir nl od printf rm rmdir sed sh
    sleep sort tail tee test timeout touch tr true uniq wc""".split()
PLACES = re.compile(r"(?<![\w./$}-])/(?=(?:proc|sys|etc|run|var)/)")  # what a script may read of a machine
END = re.compile(r"\[([0-9]{1,3})\]")


class Answer(NamedTuple):
    text: str
    status: int = 0


class Host(NamedTuple):
    """What a transcript holds."""

    name: str
    comment: str
    answers: dict[str, Answer]
    files: dict[str, str]
    folders: list[str]

    @property
    def services(self) -> list[str]:
        """Those that are asked for, in any way of asking."""
        asked = [re.fullmatch(SERVICE, command) for command in self.answers]
        return list(dict.fromkeys(found[1] or found[2] for found in asked if found))

    def said(self, command: str) -> str:
        return self.answers[command].text


SERVICE = r"(?:systemctl show|service|svcs -H -o state|lssrc -s|rcctl check|launchctl print) (?:system/)?" \
    r"(?:(\S+) (?:status|onestatus)|(\S+))"


def read_host(name: str) -> Host:
    text = (RECORDED / f"{name}.transcript").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("##")]
    comment = "\n".join(line for line in text.splitlines() if line.startswith("##"))
    host = Host(name, comment, {}, {}, [])
    for part in ("\n" + "\n".join(lines)).split("\n$ ")[1:]:
        command, _, printed = part.partition("\n")
        body, _, last = ("\n" + printed.rstrip("\n")).rpartition("\n")
        ended = END.fullmatch(last)
        output = body.removeprefix("\n") if ended else printed.rstrip("\n")
        answer = Answer(output + "\n" if output else "", int(ended[1]) if ended else 0)
        if command.startswith("cat /"):
            host.files[command.removeprefix("cat /")] = answer.text
        elif command.startswith("ls -d /"):
            host.folders.append(command.removeprefix("ls -d /"))
        else:
            host.answers[command] = answer
    return host


def host_names() -> list[str]:
    return sorted(path.relative_to(RECORDED).with_suffix("").as_posix() for path in RECORDED.glob("*/*.transcript"))


# --- the machine's commands ---
def untyped(table: str) -> str:
    """What df prints without -T: the same rows, less the second column."""
    row = re.compile(r"^(.*?\S)( +\S+)((?: +[\d-]+){3,4} +(?:[\d-]+%|-) .*)$")
    lines = [re.sub("^Filesystem +Type", "Filesystem", row.sub(r"\1\3", line)) for line in table.splitlines()]
    return "\n".join([*lines, ""])


def df_answers(answers: dict[str, Answer]) -> dict[str, Answer]:
    """By sorted letters. Where the same was recorded with -T it is known without; -l makes a difference only where
    tables with and without it were recorded."""
    found = {}
    for command, answer in answers.items():
        if re.fullmatch("df( -[A-Za-z]+)?", command):
            found["".join(sorted(command[4:]))] = answer
    for letters, answer in list(found.items()):
        if re.search("^Filesystem +Type", answer.text, re.MULTILINE):
            found.setdefault(letters.replace("T", ""), Answer(untyped(answer.text), answer.status))
    for letters, answer in list(found.items()):
        other = letters.replace("l", "") if "l" in letters else "".join(sorted(letters + "l"))
        found.setdefault(other, answer)     # of the same places
    return found


# All of a table of df or, where mount points are given, their rows.
ROWS = """awk -v "wanted=$rest" '
BEGIN { for (n = split(wanted, list, "\\n"); n > 0; n--) if (list[n] != "") only[list[n]] = ++some }
{ mount = $0; sub(/^.*([0-9]%|-) +/, "", mount) } /^Filesystem/ || !some || mount in only'"""
COMPLAINTS = """awk -v "wanted=$rest" '
BEGIN { for (n = split(wanted, list, "\\n"); n > 0; n--) if (list[n] != "") only[list[n]] = ++some }
{ for (place in only) if (match($0, place "[^/]?[^/]?[^/]?:")) { print; next } } !some'"""
KEY = {
    # Letters in any order and number of words, sorted; what is no option is left alone.
    "df": r"""
known='%s' complaint=%s letters= rest=
for word; do
    case $word in
    --help) rest="$rest --help" ;;
    --) ;;
    -[A-Za-z]*) letters=$letters${word#-} ;;
    *) rest="$rest
$word" ;;
    esac
done
sorted=
for letter in B H I P T Y a b c g h i k l m n t x; do
    case $letters in *$letter*)
        case $known in *$letter*) sorted=$sorted$letter ;; *)
            case $complaint in *X*) complaint=${complaint%%X*}$letter${complaint#*X} ;; esac
            echo "$complaint" >&2; exit 1 ;;
        esac ;;
    esac
done
key=$sorted
[ "${rest#" --help"}" != "$rest" ] && key=--help rest=
""",
    "systemctl": r"""
key=
for word; do
    case $word in -*|*State|Result|Type|*PID|*Status|*Monotonic|show) ;; *) key="show $word" ;; esac
done
""",
}
SYSCTL = r"""
value= quiet= missing=0
for word; do
    case $word in
    -*) case $word in *n*) value=y ;; esac; case $word in *i*) quiet=y ;; esac ;;
    *)  line=$(grep "^$word: " '%s')
        if [ "$line" ]; then
            if [ "$value" ]; then printf '%%s\n' "${line#*: }"; else printf '%%s\n' "$line"; fi
        elif [ ! "$quiet" ]; then echo "sysctl: unknown oid '$word'" >&2; missing=1
        fi ;;
    esac
done
exit $missing
"""


def stub(name: str, answers: dict[str, Answer], folder: Path) -> str:
    """The text of a command that prints what was recorded."""
    if name == "sysctl":
        (folder / "sysctl").write_text(answers["sysctl -a"].text, encoding="utf-8")
        return "#!/bin/sh" + SYSCTL % (folder / "sysctl")
    choices = ""
    keys = {command.partition(" ")[2]: answer for command, answer in answers.items()}
    before = KEY.get(name, '\nkey="$*"\n')
    if name == "df":
        known, _, complaint = answers.get("df --options", Answer(GNU_DF)).text.strip().partition("\n")
        before = before % (known, shlex.quote(complaint))
        keys = df_answers(answers) | {"--help": answers.get("df --help", Answer("Usage: df [-PTahiklm] [--local]\n"))}
    if name == "systemctl":     # what a pattern matches nothing of says nothing
        keys = {f"{key}@*": Answer("") for key in keys} | keys
    for number, (key, answer) in enumerate(keys.items()):
        stored, complaints = folder / f"{name}.{number}", folder / f"{name}.{number}.stderr"
        lines = answer.text.splitlines(keepends=True)
        begins = (f"{name}: ", "Failed to ")
        complaints.write_text("".join(line for line in lines if line.startswith(begins)), encoding="utf-8")
        stored.write_text("".join(line for line in lines if not line.startswith(begins)), encoding="utf-8")
        show = ROWS if name == "df" else "cat"
        told = COMPLAINTS if name == "df" else "cat"
        said = f"{told} {shlex.quote(str(complaints))} >&2; {show} {shlex.quote(str(stored))}"
        choices += f"{shlex.quote(key)}) {said}; exit {answer.status};;\n"
    real = shutil.which(name) if name in TOOLS else None
    other = f'exec {real} "$@"' if real else f'echo "{name}: not recorded: $*" >&2; exit 64'
    return f"#!/bin/sh{before}case $key in\n{choices}esac\n{other}\n"


def mountinfo(mounts: str) -> str:
    """What the kernel shows of the same in /proc/self/mountinfo: a device has one number wherever it is mounted, and
    is itself read-only where no place of it is writable."""
    lines, devices = [line.split(" ") for line in mounts.splitlines()], dict[str, int]()
    written = {device for device, _, _, flags, *_ in lines if "ro" not in flags.split(",")}
    found = ""
    for at, (device, point, kind, flags, *_) in enumerate(lines):
        number = devices.setdefault(device if device.startswith("/") else str(at), len(devices))
        own = ("rw" if device in written else "ro") + "".join(f",{flag}" for flag in flags.split(",")[1:])
        found += f"{at + 20} 1 8:{number} / {point} {flags} shared:{at} - {kind} {device} {own}\n"
    return found


def install(host: Host, root: Path) -> None:
    commands: dict[str, dict[str, Answer]] = {}
    for command, answer in host.answers.items():
        commands.setdefault(command.partition(" ")[0], {})[command] = answer
    system, node, release = host.answers["uname -snr"].text.split()
    commands["uname"] = {f"uname {option}": Answer(text + "\n") for option, text in (
        ("-s", system), ("-n", node), ("-r", release), ("-sr", f"{system} {release}"), ("", system))}
    answers = root / "answers"
    answers.mkdir()
    (root / "bin").mkdir()
    for name, recorded in commands.items():
        path = root / "bin" / name
        path.write_text(stub(name, recorded, answers), encoding="utf-8")
        path.chmod(0o755)
    for name in TOOLS:
        if name not in commands and (real := shutil.which(name)):
            (root / "bin" / name).symlink_to(real)
    for folder in ("proc", "sys", "etc", "run", "var", *host.folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for path_name, text in host.files.items():
        path = root / path_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if "proc/mounts" in host.files:
        (root / "proc" / "self").mkdir(exist_ok=True)
        (root / "proc" / "self" / "mountinfo").write_text(mountinfo(host.files["proc/mounts"]), encoding="utf-8")


def play(host: Host, script: str, shell: str = "dash") -> str:
    """What the script prints there."""
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        install(host, root)
        text = PLACES.sub(f"{root}/", re.sub(r"^PATH=.*$", ":", script, flags=re.MULTILINE))
        done = subprocess.run([shutil.which(shell) or "/bin/sh", "-s"], input=text.encode(), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, env={"PATH": str(root / "bin")}, timeout=60, check=False)
        return done.stdout.decode(errors="replace").replace(f"{root}/", "/")


@functools.cache
def host(name: str) -> Host:
    return read_host(name)


def exists() -> bool:
    """Whether hosts can be played here."""
    return os.name == "posix"
