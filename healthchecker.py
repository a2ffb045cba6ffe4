# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "flask>=3.1,<4",
#     "flask-sqlalchemy>=3.1,<4",
#     "sqlalchemy>=2.0.40,<3",
#     "paramiko>=5.1,<6",
#     "pypsrp>=0.9,<1",
#     "cryptography>=45",
#     "pyyaml>=6.0,<7",
#     "waitress~=3.0.2",
#     "pydantic>=2.11,<3",
#     "prometheus-client>=0.22,<1",
#     "urllib3>=2.0.2,<3",
#     "cronsim>=2.6,<3",
#     "tzdata;sys_platform=='win32'",
# ]
# ///
"""HealthChecker: a web application answers only while the machines it depends on are healthy.

One thread per machine polls it over SSH and reports to the `HealthAggregator`; the gate in front of
the application asks `IsHealthy()` on every request: 2XX while every resource is healthy, 503 otherwise.

Sections, in file order; a definition refers only to what stands above it:

    Errors       one root, an exit code each
    Bastions     hosts behind others, and what ~/.ssh/config says of a host
    Documents    YAML read strictly, every value with its place
    Values       what a value of the inventory may be: types with bounds, limits, checks, expectations
    Settings     what can be set of the service and of a resource, with defaults
    Groups       what counts together, and which paths need what
    Schedules    planned work: what of, and when
    Inventory    texts -> validated settings, every fault with line and column
    Vault        AES-256-GCM data keys under RSA-OAEP, bound to the row they belong to
    Storage      the tables
    Databases    SQLite and PostgreSQL through Flask-SQLAlchemy
    Import       the rows follow the inventory; what a poller needs of one
    Connections  deadlines, byte caps, name look-up, TCP: what every connection needs
    Logins       the guard that keeps a wrong password from locking an account
    Sessions     what stays open between polls, and when it is made anew
    SSH          host keys verified before any secret is sent, a channel per poll
    PowerShell   PowerShell Remoting over one watched socket
    Local        this machine's own shell
    Outcomes     what an exit status and an output say of a service or check
    Probes       a sample, and the command sets of the POSIX platforms, as tables
    Windows      the PowerShell script of a poll, and what it prints
    Endpoints    what a host keeps that is sent no code, and what its answer counts for
    Protocols    what is no machine: an answer of HTTP, a port, a name, a simulation, who reports by itself
    Collect      script, connection and parser of a platform: one poll in one round trip
    Evaluate     sample + limits -> verdict -> standing; pure
    Aggregate    the lease: is everything healthy, now
    History      what polls found: rows, averages, availability, events
    Uplink       whether it is this machine that is cut off
    Blame        what is told of resources that are behind others
    Override     what an operator says of the gate
    Maintenance  what does not count now and next, and whose trouble has been seen
    Incidents    when the gate was closed, and how long it was open
    Sharing      which of several machines does what, and what the others found
    Recorder     the thread that writes what polls found
    Poll         a thread per resource
    Monitor      the thread that oversees them
    Counters     what a worker counts, in shared memory
    Gate         the application's door: the WSGI application in front of the application
    Leases       the leases in a file, for gates in other servers
    HTTP         requests read strictly, clients with deadlines
    Serve        waitress on the loop, and its pools
    Workers      processes that serve on one socket
    Accounts     users, logins and what proves them, the brake on guessing
    Principals   who asks, and what it is asked of
    Planning     what operators plan, and say that they have seen
    Users        what can be done with users and their logins
    Actions      what can be done; pages, API and command line call these
    API          the JSON API, and what every request to the console must pass
    Metrics      what Prometheus reads
    Charts       what a person sees drawn: bars, strips, lines
    Words        what readings, times and causes are called
    Pages        what a person sees: forms, templates
    Style        style and script of the pages
    Views        the pages
    Boards       what the gate did, and how it stands, to be looked at
    Console      the operators' door: pages and API under waitress, in the main process
    Announce     what a receiver is told, and when
    Notify       messages on their way, and the heartbeat
    Backup       database, keys and inventory in one archive
    Service      serve: from the start to the end
    Status       what the running service says, for the command line and Nagios
    Sealing      secrets sealed in the file and in the rows, also with another key
    Commands     the command line: check, seal, endpoint, trust, user, gate, maintenance, keys
"""

from __future__ import annotations

import contextlib
import os
import sys

# glibc gives each of hundreds of pollers an arena and a cache of what it freed, so that memory grows for hours: with
# 100 hosts by 10 MB an hour, by none like this, which takes no more time. It can be said only before a process begins,
# and what this one starts is not told. It is said once: whoever has capabilities of a file is never told of tunables.
if __name__ == "__main__" and sys.platform == "linux":
    if (tunables := os.environ.pop("HEALTHCHECKER_TUNABLES", None)) is None:
        tunables = os.environ.get("GLIBC_TUNABLES", "")
        ours = ":".join((*filter(None, [tunables]), "glibc.malloc.arena_max=2:glibc.malloc.tcache_count=0"))
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]],     # noqa: S606  # a shell is not wanted
                      os.environ | {"HEALTHCHECKER_TUNABLES": tunables, "GLIBC_TUNABLES": ours})
    os.environ["GLIBC_TUNABLES"] = tunables
    if not tunables:
        del os.environ["GLIBC_TUNABLES"]

import argparse
import base64
import binascii
import bisect
import codecs
import collections
import concurrent.futures
import contextvars
import copy
import csv
import ctypes
import datetime
import difflib
import errno
import fnmatch
import functools
import gc
import getpass
import graphlib
import gzip
import hashlib
import hmac
import http.client
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import mmap
import multiprocessing
import queue
import random
import re
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import tarfile
import tempfile
import threading
import time
import traceback
import uuid
import zlib
import zoneinfo
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from enum import Enum
from multiprocessing import resource_tracker
from pathlib import Path
from types import GenericAlias, MappingProxyType
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, cast, get_args
from typing import get_type_hints as type_hints
from urllib.parse import quote, unquote, unquote_to_bytes, urlencode, urljoin

gc.disable()    # what is imported stays: to look through it again and again is a sixth of the start, even once a tenth
# Of paramiko `Match exec` alone needs it, which SshConfig refuses: 7 MB of each process, and a tenth of the start.
without_invoke = sys.modules.setdefault("invoke", None) is None     # type: ignore[arg-type]  # that is how one says so
try:
    import flask
    import jinja2
    import paramiko
    import requests
    import sqlalchemy
    import urllib3
    import waitress
    import yaml
    from cronsim import CronSim, CronSimError
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from flask_sqlalchemy import SQLAlchemy
    from markupsafe import Markup
    from prometheus_client import generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from pydantic import (
        AfterValidator,
        AwareDatetime,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        SecretStr,
        TypeAdapter,
        ValidationError,
        ValidationInfo,
        WrapSerializer,
        create_model,
        model_validator,
    )
    from pydantic_core import from_json
    from pypsrp.complex_objects import PSInvocationState, RunspacePoolState
    from pypsrp.exceptions import AuthenticationError, WSManFaultError
    from pypsrp.powershell import PowerShell, RunspacePool
    from pypsrp.shell import WinRS
    from pypsrp.wsman import WSMan
    from spnego.exceptions import SpnegoError
    from sqlalchemy import ForeignKey, event, func
    from sqlalchemy.dialects import sqlite
    from sqlalchemy.ext.hybrid import hybrid_property
    from sqlalchemy.orm import DeclarativeBase, Mapped, ORMExecuteState, Session, mapped_column, with_loader_criteria
    from sqlalchemy.schema import CreateTable
    from waitress import wasyncore
    from waitress.adjustments import Adjustments
    from waitress.buffers import OverflowableBuffer
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser
    from waitress.receiver import ChunkedReceiver, FixedStreamReceiver
    from waitress.server import TcpWSGIServer
    from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
    from waitress.utilities import InternalServerError
    from werkzeug.exceptions import HTTPException
    from werkzeug.wrappers import Response
except ModuleNotFoundError as missing:
    raise SystemExit(f"healthchecker: the package {missing.name} is missing; "
                     "run `make run`, or `pip install -r requirements.txt`") from None
finally:
    if without_invoke:
        del sys.modules["invoke"]
    gc.freeze()
    gc.enable()

# Run as a script, an application that imports healthchecker still gets this module and no second copy. Worker processes
# begin with the same script: by its name as a module they find it compiled, which is a sixth of their start.
if __name__ == "__main__" and __spec__ is None:
    found = importlib.util.find_spec("healthchecker")
    __spec__ = found if found and os.path.realpath(found.origin or "") == os.path.realpath(__file__) else None
sys.modules.setdefault("healthchecker", sys.modules[__name__])

if sys.platform == "win32":
    import _winapi
    import msvcrt

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    if sys.platform == "win32":
        from multiprocessing.connection import PipeConnection
    else:
        from multiprocessing.connection import Connection as PipeConnection

log = logging.getLogger("healthchecker")

# The clock of the lease counts the time of a suspended machine, or its gate would be open on answers that are hours
# old: so do CLOCK_BOOTTIME of Linux, CLOCK_MONOTONIC of macOS and what Windows has.
lease_clock: Callable[[], float] = time.monotonic
if sys.platform != "win32":
    lease_clock = functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))

VERSION = "1.0.0"
INVENTORY = Path(__file__).absolute().with_name("inventory.yaml")
SECRET_LENGTH = 1024            # characters of a password at most: a longer one only costs time
LAST_PORT = 65535
NAME_CHARS = 253                # characters, the length of the longest host name
WINRM_PORTS = {True: 5986, False: 5985}  # with TLS and without
SSH_PORT = 22                   # the registered port (RFC 4251)
PBKDF2_ROUNDS = 220_000         # OWASP's figure for PBKDF2-HMAC-SHA512
MONITOR_INTERVAL = 0.5          # seconds between two looks of the monitor
STRIP = 60                      # polls of a resource that the overview shows
QUARTER = 900                   # seconds of which an average is kept
TOKEN_PREFIXES = ("HC2.", "HC1.")   # of sealed secrets; HC1 did not bind the port
LOG_BYTES = 10 << 20            # bytes of a log file before it rotates
LOG_FILES = 5                   # rotated log files that are kept
COMPLAINT_INTERVAL = 60.0       # seconds between two complaints about the same trouble
POOL_END = 0.5                  # seconds for idle pool threads to end


def allow_files(wanted: float = math.inf) -> float:
    """How many files may be open, after raising the limit to as many as are wanted, as far as that is allowed."""
    if sys.platform == "win32":
        return math.inf     # sockets are none there
    import resource  # noqa: PLC0415  # POSIX only
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    raised = max(soft, min(wanted, hard))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] if raised == hard else int(raised), limits[1]))
        soft = raised
    return soft


# === Errors ==================================================================
# One root for what is raised on purpose; the command line turns each class into its exit code, pages and API into a
# status. An error's text is one line that a user can act on, and never holds a secret.
# Gives: HealthCheckerError, InventoryError, UsageError, SecretError, StorageError, ApiError, Cause, one_line,
#   did_you_mean, ProbeError, AnswerError, NotAllowed, Trouble
REASON_CHARS = 500              # characters of a reason that are kept


class HealthCheckerError(Exception):
    """Root of what HealthChecker raises on purpose; its text is one line that a user can act on."""

    exit_code: ClassVar[int] = 2


class InventoryError(HealthCheckerError):
    """The inventory cannot be used; the text has a line for each fault."""


class UsageError(HealthCheckerError):
    """The command line, the address to listen on or `service.app` cannot be used."""


class SecretError(HealthCheckerError):
    """Keys are missing or wrong, or a sealed secret does not open for the resource that it stands at."""

    exit_code = 3


class StorageError(HealthCheckerError):
    """The database is damaged, newer than this program, in use, or not ours."""

    exit_code = 4


class ApiError(HealthCheckerError):
    """A request is refused: why, its HTTP status, the fields at fault with what is wrong with each, seconds to wait."""

    def __init__(self, detail: str, status: int = 400, fields: Mapping[str, str] | None = None,
                 retry: float = 0.0) -> None:
        super().__init__(detail)
        self.status, self.fields, self.retry = status, dict(fields or {}), retry


Cause = Literal["", "limit", "check", "unreachable", "timeout", "auth", "host_key", "credential", "protocol", "stale",
                "parent", "cut_off"]


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, cut to REASON_CHARS: fit for a log line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * REASON_CHARS]).split())
    return line if len(line) <= REASON_CHARS else line[: REASON_CHARS - 1] + "…"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a text about a name that is not among the `known`: the nearest of them; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


class ProbeError(HealthCheckerError):
    """A poll gave no sample; the text says what to do."""

    exit_code = 1

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(one_line(message))
        self.cause: Cause = cause


class AnswerError(ProbeError):
    """The host's answer cannot be used; over another connection it would be the same."""


class NotAllowed(ProbeError):
    """An `auth` that says nothing of the password: the host asks for none, or it was right and does not suffice."""


class Trouble:
    """Tells of a step that fails again and again: once in COMPLAINT_INTERVAL, and when that is over."""

    def __init__(self, what: str) -> None:
        self._what, self._count, self._is_told, self._told_mono = what, 0, False, -math.inf
        self.why = ""       # the last failure; empty while there is none

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Around a thread's outermost step: the next one is taken whatever happens."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001  # a thread that nobody joins would end in silence
            self._count += 1
            self.why = one_line(str(getattr(error, "orig", None) or f"{type(error).__name__}: {error}"))
            if time.monotonic() - self._told_mono >= COMPLAINT_INTERVAL:
                self._is_told, self._told_mono = True, time.monotonic()
                log.error("%s: %s", self._what, self.why)
        else:
            if self._is_told:
                log.info("%s: that is over, after %d failures", self._what, self._count)
            self._count, self._is_told, self.why = 0, False, ""


# === Bastions ================================================================
# How hosts behind others are named: in come words of the inventory and OpenSSH's configuration of its client, out go
# bastions as resources' names or addresses, and what that file says of a host. Pure but for reading it, at a start.
# Gives: hop_address, jump_fault, SshConfig, ssh_config_path, stated_hops, with_ssh_config
HOP = re.compile(r"(?:([^\s/]+)@)?(?:\[([\w.:%]+)\]|([\w.%-]+))(?::([0-9]{1,5}))?")     # user, address, name, port
HOPS = 8                        # bastions on the way to a resource


def hop_address(hop: str) -> tuple[str | None, str, int] | None:
    """User, host and port of a bastion that is an address; a word alone is a resource's name."""
    found = HOP.fullmatch(hop)
    return (found[1], found[2] or found[3], int(found[4] or SSH_PORT)) if found and (found[1] or found[4]) else None


def stated_hops(text: str) -> str | None:
    """Bastions without blanks; `none` alone is none of them, also where the defaults name one. Raises ValueError."""
    hops = [hop.strip() for hop in text.split(",")]
    ports = [address[2] for address in map(hop_address, hops) if address]
    if len(hops) > HOPS or not all(hops) or not all(0 < port <= LAST_PORT for port in ports):
        raise ValueError(f"must be a resource's name or [user@]host:port, or up to {HOPS} of them with commas between")
    return ",".join(hops)


def jump_fault(name: str, ways: Mapping[str, Sequence[str] | None]) -> str | None:
    """What is wrong with the bastions of a resource; `ways` has those of all, None for what is no SSH host."""
    for hop in ways[name] or ():
        if hop in ways and ways[hop] is None:
            return f"{hop} is no SSH host"
        if hop not in ways and not hop_address(hop):
            hint = did_you_mean(hop, ways) or "; write an address as user@host or host:port"
            return f"no resource has this name{hint}"
    seen, hops = {name}, ways[name]
    while hops:
        if again := seen.intersection(hops):
            return f"the way leads through {min(again)} twice; write `proxy_jump: none` at the first bastion"
        seen.update(hops)
        hops = ways.get(hops[0])
    return None


def ssh_config_path(value: object) -> object:
    """`true` is the file of the account that runs this."""
    return "~/.ssh/config" if value == "true" else None if value == "false" else value


class SshConfig(paramiko.SSHConfig):
    """OpenSSH's configuration of its client; it runs nothing, whatever the file says."""

    MATCHED: ClassVar = {"all", "canonical", "final", "host", "originalhost", "user", "localuser"}
    SAID: ClassVar = {"hostname": "hostname", "port": "port", "username": "user", "proxy_jump": "proxyjump",
                      "host_key_alias": "hostkeyalias"}

    def __init__(self, path: Path, user: object = None) -> None:
        """Reads the file, whose User gives way to `user`. Raises ValueError."""
        super().__init__()
        try:
            text = path.read_text(encoding="utf-8-sig")
            seed = f"User {user}\n" if re.fullmatch(r"[^\s\"]+", str(user or "")) else ""
            self.parse(io.StringIO(seed + text))
        except OSError as error:
            raise ValueError(f"this file cannot be read: {error.strerror}") from None
        except (UnicodeError, paramiko.SSHException):
            raise ValueError("this is no configuration of OpenSSH's client") from None
        if re.search(r"^\s*include\b", text, re.IGNORECASE | re.MULTILINE):
            raise ValueError("Include is not followed; name the file that it includes, or write its lines there")

    def _get_matches(self, match: str) -> Any:
        found = super()._get_matches(match)     # type: ignore[misc]  # the stubs lack it
        if {one["type"] for one in found} - self.MATCHED:
            raise ValueError("Match is by host, originalhost, user and localuser alone; `exec` would run a command")
        return found

    def of(self, host: str) -> tuple[dict[str, str], str | None, bool]:
        """What the file says of a host, in our names; its first IdentityFile that is there; whether ProxyCommand leads
        there. Raises ValueError."""
        try:
            said = self.lookup(host)
        except Exception as error:  # paramiko lets through whatever its look-ups raise
            raise ValueError(f"this file says nothing clear of the host ({type(error).__name__})") from error
        jump = said.get("proxyjump") or "none"
        return ({ours: said[theirs] for ours, theirs in self.SAID.items() if said.get(theirs) not in (None, "none")},
                next(filter(os.path.isfile, said.get("identityfile", [])), None),
                jump == "none" and said.get("proxycommand") is not None)

    def hop(self, hop: str, user: str, key: str | None) -> str:
        """A bastion as an address, for a login as `user` with this key. Raises ValueError."""
        found = HOP.fullmatch(hop)
        if not found:
            return hop
        said, own_key, command = self.of(found[2] or found[3])
        if command or {"proxy_jump", "host_key_alias"} & said.keys() or own_key not in (None, key):
            raise ValueError("a bastion has a key, an alias or a way of its own in this file: add it as a resource")
        host = f"[{said['hostname']}]" if ":" in said["hostname"] else said["hostname"]
        return f"{found[1] or said.get('username', user)}@{host}:{found[4] or said.get('port', SSH_PORT)}"


def with_ssh_config(raw: dict[str, Any], path: Path, names: Collection[str], *, keyless: bool) -> dict[str, Any]:
    """A resource with what the file says and `raw` does not; `keyless`: a key, too. Raises ValueError."""
    said, key, command = SshConfig(path, raw.get("username")).of(raw["hostname"])
    if command and "proxy_jump" not in raw:
        raise ValueError("ProxyCommand is not run; write ProxyJump, or proxy_jump here")
    found = {"key_file": key} if key and keyless else {}
    stated = {**found, **said, **raw, "hostname": said.get("hostname", raw["hostname"])}
    if hops := stated.get("proxy_jump"):
        user, config = str(stated.get("username", "")), SshConfig(path)
        key = os.path.expanduser(stated["key_file"]) if "key_file" in stated else None
        stated["proxy_jump"] = ",".join(hop if hop == "none" or hop in names else config.hop(hop, user, key)
                                        for hop in map(str.strip, str(hops).split(",")))
    return stated


# === Documents ===============================================================
# The inventory's text, read more strictly than YAML: every scalar stays the text that was written, no key comes twice,
# aliases, tags and merges are refused, and each value has its place. In comes a file or what was typed into a form, out
# goes a Document, or an InventoryError with line and column. Pure but for reading files; for any thread.
# Gives: Document, INVENTORY_BYTES, NodePath, read_document
INVENTORY_BYTES = 4 << 20       # bytes; a larger inventory is refused
INVENTORY_DEPTH = 8             # levels of nesting
INVENTORY_NODES = 600_000       # YAML events
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)     # in C, where PyYAML was built so: four times as fast
NodePath = tuple[str | int, ...]


def line_column(mark: Any) -> str:
    """`line:column`, counted from 1."""
    return f"{mark.line + 1}:{mark.column + 1}"


def mark_after(before: str) -> yaml.Mark:
    """The mark behind a text."""
    lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", before)      # what YAML takes for a line break
    return yaml.Mark("", len(before), len(lines) - 1, len(lines[-1]), None, 0)


SURROGATE = re.compile("[\ud800-\udfff]")


class Document:
    """A YAML file, read as nested dicts, lists and texts, with the node of every path and of every key: no tags,
    anchors, aliases, merges or duplicate keys. Never quotes the source."""

    def __init__(self, name: str = "", source: bytes = b"") -> None:
        """Raises InventoryError for what is no YAML that we allow."""
        self.name = name
        self.nodes: dict[NodePath, yaml.Node] = {}
        self.keys: dict[NodePath, yaml.Node] = {}
        self.faults: list[str] = []     # what is wrong with keys and values that could be read all the same
        root, text = None, self._decode(source)
        try:
            if not self.faults and self._allowed(text):
                root = yaml.compose(text, Loader=YAML_LOADER)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.fault(mark_after(text) if mark is None or mark.index >= len(text) else mark,   # in C a line further
                       "not valid YAML here (is a value with special characters unquoted?)")
        except yaml.reader.ReaderError as error:
            self.fault(mark_after(text[:error.position]), "this character is not allowed in YAML")
        if self.faults:
            raise InventoryError("\n".join(self.faults))
        self.value = self._convert(root, ()) if root else None

    def fault(self, mark: Any, message: str) -> None:
        self.faults.append(f"{self.name}:{line_column(mark)}: {message}")

    def position(self, path: NodePath, *, key: bool = False) -> str:
        """`line:column`, counted from 1, of the key `path` or of the nearest value at or above it."""
        node = self.keys.get(path) if key else None
        while node is None and path:
            node, path = self.nodes.get(path), path[:-1]
        return line_column(node.start_mark) if node else "1:1"

    def _decode(self, source: bytes) -> str:
        try:
            if len(source) <= INVENTORY_BYTES:
                return source.decode("utf-8-sig")
            self.faults.append(f"{self.name}: the file is larger than {INVENTORY_BYTES} bytes")
        except UnicodeDecodeError as error:
            self.fault(mark_after(source[:error.start].decode("utf-8", "replace")),
                       "this byte is not UTF-8; save the file as UTF-8")
        return ""

    def _allowed(self, text: str) -> bool:
        """Looks at the events before anything is built, so that nothing hostile is."""
        depth = 0
        for count, node in enumerate(yaml.parse(text, Loader=YAML_LOADER)):
            if isinstance(node, yaml.AliasEvent) or getattr(node, "anchor", None):
                self.fault(node.start_mark, "anchors and aliases are not allowed; quote what starts with & or *")
            elif getattr(node, "tag", None):
                self.fault(node.start_mark, "tags are not allowed; quote what starts with !")
            elif SURROGATE.search(getattr(node, "value", "")):
                self.fault(node.start_mark, "half a character (a surrogate) is not allowed")
            if isinstance(node, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(node, yaml.CollectionEndEvent):
                depth -= 1
            if depth > INVENTORY_DEPTH or count > INVENTORY_NODES:
                self.fault(node.start_mark, f"nested deeper than {INVENTORY_DEPTH} levels"
                           if depth > INVENTORY_DEPTH else "too many values")
                return False
        return not self.faults

    def _convert(self, node: yaml.Node, path: NodePath) -> Any:
        self.nodes[path] = node
        if isinstance(node, yaml.ScalarNode):
            return node.value
        if isinstance(node, yaml.SequenceNode):
            return [self._convert(item, (*path, index)) for index, item in enumerate(node.value)]
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                self.fault(key.start_mark, "a key must be plain text; merge keys are not allowed")
            elif key.value in mapping:
                self.fault(key.start_mark, "this key stands here twice")
            else:
                where = (*path, key.value)
                self.keys[where] = key
                mapping[key.value] = self._convert(value, where)
        return mapping


def read_document(path: Path) -> Document:
    """The strictly read file; raises InventoryError."""
    try:
        with open(path, "rb") as file:
            source = file.read(INVENTORY_BYTES + 1)
    except IsADirectoryError:
        raise InventoryError(f"{path.name}: is a directory, not a file") from None
    except OSError as error:
        raise InventoryError(f"{path.name}: cannot be read: {error.strerror}") from error
    return Document(path.name, source)


# === Values ==================================================================
# What a value of the inventory may be: types with their bounds, and the parts of a resource that have parts of their
# own: limits, checks, expectations. Texts come in, values go out, or a ValueError that says what is wanted. Pure.
# Gives: absolute, AppName, CertificateDays, Check, ConsoleListen, DatabaseUrl, Days, Duration, Expect, FilePath,
# Fingerprint, fits_platform, HeaderName, HeaderValue, HostKey, Hostname, HOSTNAME, if_plain, known_hosts_file, Limit,
# Limits, Listen, literal_address, LONGEST, LongText, matching, matching_key, Mode, Name, Networks, plain_seconds,
# Platform, Positive, POSTGRES, PROTOCOLS, RANGE, ranged, read_url, Relogin, REMOTE_PLATFORMS, Seconds, Secret, SECURED,
# SELECTABLE, selectable, ServiceName, Settings, short_expect, SQLITE, SSH_PLATFORMS, TextLine, Times, Url, WEB_PORTS,
# Workers
class Platform(str, Enum):
    """What a resource runs; decides its connection and its command set. `posix` is what `unix` falls back to."""

    UNIX = "unix"
    LINUX = "linux"
    MACOS = "macos"
    FREEBSD = "freebsd"
    POSIX = "posix"
    WINDOWS = "windows"
    LOCAL = "local"
    SIMULATED = "simulated"
    HTTP = "http"
    TCP = "tcp"
    DNS = "dns"
    PUSH = "push"


SELECTABLE = ("unix", "linux", "macos", "freebsd", "windows", "local", "simulated", "http", "tcp", "dns", "push")
SSH_PLATFORMS = frozenset({Platform.UNIX, Platform.LINUX, Platform.MACOS, Platform.FREEBSD})
REMOTE_PLATFORMS = SSH_PLATFORMS | {Platform.WINDOWS}
SECURED = REMOTE_PLATFORMS | {Platform.PUSH}    # these need a secret
PROTOCOLS = frozenset({Platform.HTTP, Platform.TCP, Platform.DNS})      # no machines


class Settings(BaseModel):
    """Base of all settings: unknown keys are faults, values never show in an error, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def network_of(text: str) -> str:
    """An address or a network, in its canonical form."""
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        raise ValueError("must be an address or a network such as 192.0.2.0/24") from None


def matching(pattern: str, message: str, longest: int = 4096) -> AfterValidator:
    """A validator for a text that matches `pattern` as a whole; `message` says what is wanted."""
    def validate(text: str) -> str:
        if len(text) > longest or not re.fullmatch(pattern, text):
            raise ValueError(message)
        return text
    return AfterValidator(validate)


def port_of(listen: str) -> str:
    """`listen` itself, when its port is one; raises ValueError."""
    if listen != "off" and int(listen.rpartition(":")[2]) > LAST_PORT:
        raise ValueError(f"the port must be at most {LAST_PORT}")
    return listen


def absolute(path: str | Path, folder: Path | None) -> Path:
    """~ is the home folder, and what is relative is so to `folder`, the inventory's. Raises ValueError."""
    expanded = os.path.expanduser(path)
    if "\0" in expanded or expanded.startswith("~"):
        raise ValueError("must be a path; its home folder must exist")
    return Path(folder or "", expanded)


def known_hosts_file() -> Path:
    """OpenSSH's own; an account without a home folder has none."""
    path = os.path.expanduser("~/.ssh/known_hosts")
    return Path(os.devnull if path.startswith("~") else path)


def scalar_limit(value: object) -> object:
    """`90` is short for `{fail: 90}`."""
    return {"fail": value} if isinstance(value, (str, int, float)) else value


def limit_or_off(value: object) -> object:
    return None if value == "off" else scalar_limit(value)


def matching_key(patterns: Iterable[str], mount: str) -> str | None:
    """Which pattern holds for a mount point: itself, or else the first that it matches. On Windows, which has a colon
    in each, case is nothing, and neither is a last backslash."""
    plain = (lambda name: name.rstrip("\\").casefold()) if mount[1:2] == ":" else str
    found = [pattern for pattern in patterns if plain(pattern) == plain(mount)
             or fnmatch.fnmatchcase(plain(mount), plain(pattern))]
    return next((key for key in found if plain(key) == plain(mount)), next(iter(found), None))


def if_plain(test: Callable[[str], object]) -> AfterValidator:
    """A validator for a secret that is sealed, or that `test` has nothing against."""
    def validate(secret: SecretStr) -> SecretStr:
        if not secret.get_secret_value().startswith(TOKEN_PREFIXES):
            test(secret.get_secret_value())
        return secret
    return AfterValidator(validate)


def not_too_long(text: str) -> None:
    """Of a plain secret; a sealed one is longer than what it holds."""
    if len(text) > SECRET_LENGTH:
        raise ValueError(f"must be at most {SECRET_LENGTH} characters")


def selectable(platform: object) -> object:
    if platform not in SELECTABLE:
        raise ValueError(f"must be one of {', '.join(SELECTABLE)}{did_you_mean(str(platform), SELECTABLE)}")
    return platform


Seconds = Annotated[float, Field(ge=1, le=604_800, allow_inf_nan=False)]
Relogin = Annotated[float, Field(ge=0, le=604_800, allow_inf_nan=False)]
Days = Annotated[float, Field(ge=0.1, le=3660, allow_inf_nan=False)]
Percent = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=-1e18, le=1e18, allow_inf_nan=False)]
Times = Annotated[int, Field(ge=1, le=1000)]
Secret = Annotated[SecretStr, Field(min_length=1, max_length=8 * SECRET_LENGTH), if_plain(not_too_long)]
TextLine = Annotated[str, matching(r"[^\x00-\x1f\x7f]+", "must be one line of text and not empty")]
Name = Annotated[str, matching(r"(?!\.\.?$)[^\s/\\\x00-\x1f\x7f]+( [^\s/\\\x00-\x1f\x7f]+)*",
                               f"must be 1 to {NAME_CHARS} characters without slashes", NAME_CHARS)]
HOSTNAME = re.compile(r"(?!-|\.\.?$)[\w.:%-]{1,253}")
Hostname = Annotated[str, matching(HOSTNAME.pattern, "must be a host name or an IP address (or web[01:40], a range)")]
ServiceName = Annotated[str, matching(r"(?!-)[^/\x00-\x1f\x7f]+", "must be the name of a service", 256)]
Fingerprint = Annotated[str, matching(r"(SHA256:)?[0-9A-Fa-f]{2}(:?[0-9A-Fa-f]{2}){31}",
                                      "must be a SHA-256 fingerprint: 64 hexadecimal digits")]
HostKey = Annotated[str, matching(r"strict|(([a-z0-9-]+) )?SHA256:[A-Za-z0-9+/]{43}=?",
                                  "must be `strict` or a fingerprint such as SHA256:… (43 characters)")]
SQLITE, POSTGRES = "sqlite:///", "postgresql+psycopg://"
DATABASE_FORMS = f"must be {SQLITE}path or {POSTGRES}user@host/name"
LIBPQ_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
LIBPQ = ("host", "port", "sslmode", *LIBPQ_FILES, "ssl_min_protocol_version", "channel_binding", "require_auth",
         "gssencmode", "krbsrvname", "target_session_attrs", "load_balance_hosts")      # options of a URL of PostgreSQL
ADDRESS = r"(\[[\w:.%]+\]|[\w.-]+):[0-9]{1,5}"
Listen = Annotated[str, matching(ADDRESS, "must be address:port or [address]:port"), AfterValidator(port_of)]
ConsoleListen = Annotated[str, matching("off|" + ADDRESS, "must be address:port, [address]:port or off"),
                          AfterValidator(port_of)]
# A validation's context is the inventory's folder.
FilePath = Annotated[Path, AfterValidator(lambda path, info: absolute(path, info.context))]
Networks = tuple[Annotated[str, AfterValidator(network_of)], ...]
Workers = Annotated[str, matching(r"auto|[1-9]|[1-5][0-9]|6[0-4]", "must be auto or a number from 1 to 64 "
                                  "(serving in the main process, 0, is gone: write 1)")]
AppName = Annotated[str, matching(r"[\w.]+:[\w.]+(\(\))?", "must be module:callable or module:factory()")]
Mode = Literal["enforce", "observe"]    # observe: nothing is refused, but what would have been is marked


def postgres_url(text: str, folder: Path | None) -> str:
    """A URL of PostgreSQL whose files have absolute paths. Raises ValueError, which never shows it."""
    try:
        url = sqlalchemy.make_url(text)
    except (ValueError, sqlalchemy.exc.ArgumentError):
        raise ValueError(DATABASE_FORMS) from None
    if url.password is not None or "password" in url.query:
        raise ValueError("holds a password; write it as database_password, database_password_env or "
                         "database_password_file")
    for name in url.query.keys() - set(LIBPQ):
        hint = did_you_mean(name, LIBPQ) or f"; known are {', '.join(LIBPQ)}"
        raise ValueError(f"has an option that is unknown{hint}")
    if not (url.username and url.database and (url.host or url.query.get("host"))):
        raise ValueError(DATABASE_FORMS)
    files = {name: str(absolute(str(path), folder)) for name, path in url.query.items()
             if name in LIBPQ_FILES and path != "system"}
    return url.update_query_dict(files).render_as_string()


def database_url(text: str, info: ValidationInfo) -> str:
    """A URL of a database whose paths are absolute. Raises ValueError."""
    if text.startswith(POSTGRES):
        return postgres_url(text, info.context)
    if not re.fullmatch(SQLITE + "[^?]+", text):
        raise ValueError(DATABASE_FORMS)
    return SQLITE + str(absolute(text.removeprefix(SQLITE), info.context))


DatabaseUrl = Annotated[str, AfterValidator(database_url)]


class Limit(Settings):
    """A reading above `warn` makes a resource degraded, above `fail` unhealthy."""

    shown: ClassVar[str] = ".1f"    # how a reason writes a reading
    warn: Percent | None = None
    fail: Percent | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Limit:
        if self.warn is None and self.fail is None:
            raise ValueError("needs warn, fail or both")
        if self.warn is not None and self.fail is not None and self.warn >= self.fail:
            raise ValueError("warn must be below fail")
        return self

    def at(self, mount: str) -> Limit | None:
        """The limit of a reading of this mount point; "" where a metric has none."""
        del mount
        return self


class LoadLimit(Limit):
    """A limit that is no percentage: processes waiting per CPU."""

    warn: Positive | None = None
    fail: Positive | None = None


class AmountLimit(Limit):
    """A limit of a number of a check's performance data, in the plug-in's own unit."""

    shown = "g"
    warn: Amount | None = None
    fail: Amount | None = None


PercentLimit = Annotated[Limit, BeforeValidator(scalar_limit, json_schema_input_type=Limit | Percent)]
LimitOrOff = Annotated[
    Limit | None, BeforeValidator(limit_or_off, json_schema_input_type=Limit | Percent | Literal["off"]),
    WrapSerializer(lambda limit, plain: plain(limit) if limit else "off", return_type=Any)]
MountPattern = Annotated[str, Field(min_length=1, max_length=4096)]


class MountLimit(Limit):
    """A limit of filesystems; some, by mount point or pattern, have their own or none."""

    mounts: Annotated[dict[MountPattern, LimitOrOff], Field(max_length=100)] | None = None

    def at(self, mount: str) -> Limit | None:
        mounts = self.mounts or {}
        key = matching_key(mounts, mount)
        return self if key is None else mounts[key]


DiskLimit = Annotated[MountLimit, BeforeValidator(scalar_limit, json_schema_input_type=MountLimit | Percent)]


class Limits(Settings):
    """Limits by metric; a metric without one is shown and never decides."""

    cpu_percent: PercentLimit | None = None
    memory_percent: PercentLimit | None = None
    swap_percent: PercentLimit | None = None
    commit_percent: PercentLimit | None = None
    disk_percent: DiskLimit | None = None
    inode_percent: DiskLimit | None = None
    load_per_cpu: Annotated[
        LoadLimit, BeforeValidator(scalar_limit, json_schema_input_type=LoadLimit | Positive)] | None = None

    def by_metric(self) -> dict[str, Limit]:
        return {name: limit for name, limit in self if limit is not None}


class Check(Settings):
    """A command of the user's own: exit status 0 is good."""

    name: Name
    command: Annotated[str, Field(min_length=1, max_length=4096)]
    timeout: Seconds = 5.0      # seconds
    exit: Literal["plain", "nagios"] = "plain"      # nagios: 1 is degraded, 3 too, other numbers are bad
    # By label of its performance data, which only `exit: nagios` reads.
    limits: Annotated[dict[Annotated[str, Field(min_length=1, max_length=100)], Annotated[
        AmountLimit, BeforeValidator(scalar_limit, json_schema_input_type=AmountLimit | Amount)]],
        Field(max_length=64)] = {}

    @model_validator(mode="after")
    def _labelled(self) -> Check:
        if self.limits and self.exit != "nagios":
            raise ValueError("limits of a check need `exit: nagios`")
        return self


RANGE = re.compile(r"\[([0-9]{1,9}|[a-z]|[A-Z]):([0-9]{1,9}|[a-z]|[A-Z])(?::([1-9][0-9]{0,5}))?\]")
RANGE_MAX = 20_000      # hosts of one entry


def ranged(text: str) -> list[str]:
    """What a text with ranges stands for, such as web[01:40], db[a:c] or rack[0:90:10], the last one counting fastest;
    by itself without one. Raises ValueError."""
    begin, *rest = RANGE.split(text)
    texts = [begin]
    for first, last, step, after in zip(*[iter(rest)] * 4, strict=True):
        begins, ends = (int(end) if end.isdecimal() else ord(end) for end in (first, last))
        width = len(first) if first.startswith("0") and first != "0" else 0
        if first.isdecimal() is not last.isdecimal() or first.isupper() is not last.isupper() or begins > ends:
            raise ValueError(f"[{first}:{last}] must count up, from a number to a number or from a letter to a letter")
        if width and len(last) != width:
            raise ValueError(f"[{first}:{last}] must have as many digits at its end as at its beginning")
        counted = range(begins, ends + 1, int(step or 1))
        if len(texts) * len(counted) > RANGE_MAX:
            raise ValueError(f"stands for more than {RANGE_MAX} hosts")
        texts = [f"{text}{number:0{width}d}{after}" if first.isdecimal() else f"{text}{chr(number)}{after}"
                 for text in texts for number in counted]
    return texts


class Url(NamedTuple):
    """What a URL of HTTP says."""

    scheme: str
    host: str
    port: int
    target: str     # path and query


# Of printable ASCII, without user, fragment and what a URL has to write otherwise.
URL = re.compile(r"(https?)://(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::([0-9]{1,5}))?([/?][!$-;=?-\[\]-~]*)?",
                 re.ASCII | re.IGNORECASE)
WEB_PORTS = {"http": 80, "https": 443}


def read_url(text: str) -> Url:
    """The one reading of a URL, of the inventory and of redirects. Raises ValueError."""
    if len(text) <= 2048 and (found := URL.fullmatch(text)):
        scheme, host, target = found[1].lower(), (found[2] or found[3]).lower(), found[5] or "/"
        port = int(found[4] or WEB_PORTS[scheme])
        with contextlib.suppress(ValueError):
            if 0 < port <= LAST_PORT and (ipaddress.IPv6Address(host) if found[2] else HOSTNAME.fullmatch(host)):
                return Url(scheme, host, port, target if target[0] == "/" else f"/{target}")
    raise ValueError("must be http:// or https://, a host and a path, in ASCII, without user, password or fragment")


def status_range(text: str) -> str:
    first, _, last = text.partition("-")
    if not re.fullmatch("[1-5][0-9][0-9](-[1-5][0-9][0-9])?", text) or first > (last or first):
        raise ValueError("must be a status such as 204, or a range such as 200-299")
    return text


def literal_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("must be an IP address") from None


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}      # seconds
LONGEST = 366 * 86_400.0        # seconds of what is planned or done by hand, at most


def plain_seconds(value: object) -> object:
    """`2 s` is 2, `30m` is 1800."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([smhd])", value) if isinstance(value, str) else None
    return float(found[1]) * UNITS[found[2]] if found else value


def duration(value: object) -> object:
    """The same, with its unit. Raises ValueError."""
    found = plain_seconds(value)
    if isinstance(found, str):
        raise ValueError("must be such as 90s, 30m or 2h")
    if isinstance(found, (int, float)) and found > LONGEST:
        raise ValueError(f"must be at most {LONGEST / UNITS['d']:.0f}d")
    return found


def json_text(value: object) -> object:
    """A scalar of JSON as one writes it in YAML; a text is itself."""
    return json.dumps(value) if value is None or isinstance(value, (bool, int, float)) else value


def short_expect(value: object) -> object:
    """A text is short for `{contains: text}`, a list for `{addresses: list}`."""
    return {"contains": value} if isinstance(value, str) else {"addresses": value} if isinstance(value, list) else value


Duration = Annotated[float, Field(gt=0, le=LONGEST, allow_inf_nan=False), BeforeValidator(
    duration, json_schema_input_type=float | str)]
StatusRange = Annotated[str, BeforeValidator(
    lambda value: str(value) if isinstance(value, int) else value, json_schema_input_type=str | int),
    AfterValidator(status_range)]
LongText = Annotated[str, Field(min_length=1, max_length=4096)]
CertificateDays = Annotated[float, Field(ge=1, le=3650)]
HeaderName = Annotated[str, matching(
    r"(?i)(?!(accept-encoding|(proxy-)?authorization|connection|content-length|expect|te|trailer|transfer-encoding"
    r"|upgrade)$)[a-z0-9!#$%&'*+.^_`|~-]+", "must be the name of a header, and none that the request itself decides "
    "on; a secret is `password`", 100)]
HeaderValue = Annotated[str, matching(r"[\t -~]*", "must be one line of ASCII")]


class Expect(Settings):
    """What is expected of a resource that is no machine."""

    model_config = ConfigDict(serialize_by_alias=True)
    status: Annotated[list[StatusRange], Field(min_length=1, max_length=32)] | None = None      # None: 200-299
    contains: LongText | None = None
    # By path, such as `checks.0.state`; BaseModel has a method `json`.
    values: Annotated[dict[Annotated[str, Field(min_length=1, max_length=256)], Annotated[str, Field(max_length=1024),
        BeforeValidator(json_text, json_schema_input_type=str | float | bool | None)]],
        Field(max_length=32)] = Field(default={}, alias="json")
    within: Annotated[float, Field(gt=0, le=604_800, allow_inf_nan=False), BeforeValidator(
        plain_seconds, json_schema_input_type=float | str)] | None = None     # seconds, `timeout` at most
    certificate_days: CertificateDays | None = None     # less: degraded
    addresses: Annotated[list[Annotated[str, AfterValidator(literal_address)]],
                         Field(min_length=1, max_length=64)] | None = None      # these and no others


EXPECTED = {Platform.HTTP: ("status", "contains", "json", "within", "certificate_days"),
            Platform.TCP: ("contains", "within"), Platform.DNS: ("addresses", "within")}


def fits_platform(expect: Expect, info: Any) -> Expect:
    """Raises ValueError for what has no meaning on the platform, or comes later than any answer."""
    platform = info.data.get("platform")
    for name in expect.model_dump(exclude_defaults=True) if platform in EXPECTED else ():   # or it stands in defaults
        if name not in EXPECTED[platform]:
            raise ValueError(f"{name} has no meaning with platform {platform.value}")
    if (expect.within or 0) > info.data.get("timeout", math.inf):
        raise ValueError("within must be at most timeout")
    return expect


# === Settings ================================================================
# What can be set of the service and of a resource: frozen models with default, unit and bounds. In come nested texts,
# out go settings in which every path is absolute, or a ValidationError. A validation's context is the inventory's
# folder. Pure.
# Gives: COMPANIONS, conflicts, CREDENTIALS, FILES, foreign_fields, HOSTLESS, KEY_FILES, LEASE_GRACE, LOCAL_SERVICES,
# of_url, PASSPHRASES, ReceiverSettings, ResourceSettings, Retention, SECRETS, ServiceSettings, USUAL
LEASE_GRACE = 2.0               # seconds added to a lease for a busy machine
KEY_FILES = ("private.pem", "public.pem", "next.pem")
COMPANIONS = ("-wal", "-shm", "-journal", ".lock")      # files beside the database
TOKEN_CHARS = 16                # of a password that has to be shown by whoever reports, or looks
WORKERS_MAX = 8                 # worker processes that `auto` starts at most
Told = Literal["gate", "group", "state", "problem", "maintenance"]
# Services of Apprise that are this machine itself or keep files on it, and what of a URL names a file of it.
LOCAL_SERVICES = frozenset({"blink1", "dbus", "glib", "gio", "gnome", "kde", "macosx", "qt", "syslog", "windows",
                            "deltachat", "deltachats", "vapid"})
LOCAL_FILES = re.compile("[?&](keyfile|subfile|pgppub|pgpprv)=|=file:", re.IGNORECASE)


def web_url(text: str) -> str:
    """A URL of HTTP. Raises ValueError."""
    read_url(text)
    return text


def long_token(text: str) -> None:
    """Raises ValueError for one that somebody may guess."""
    if not re.fullmatch(f"[!-~]{{{TOKEN_CHARS},}}", text):
        raise ValueError(f"must have {TOKEN_CHARS} characters of ASCII or more, without blanks")


def receiver_url(text: str) -> None:
    """Raises ValueError, without it, for what can be no URL of Apprise."""
    scheme = re.match(r"([A-Za-z][\w.+-]*)://[!-~]", text, re.ASCII)
    if not scheme or not re.fullmatch("[!-~]+", text):
        raise ValueError("must be a URL of Apprise, such as mailto://…, slack://… or json://…, in ASCII without blanks")
    if scheme[1].lower() in LOCAL_SERVICES:
        raise ValueError(f"{scheme[1].lower()}:// is this machine itself, which nobody hears of when it is down")
    if LOCAL_FILES.search(unquote(text)):
        raise ValueError("names a file of this machine, which is never read for a notification")


class Retention(Settings):
    """How long history is kept."""

    raw: Days = 2.0         # days of a row per poll
    averages: Days = 90.0   # days of 15-minute averages, minima and maxima
    events: Days = 365.0    # days of transitions and changes


class ServiceSettings(Settings):
    """The `service` part of the inventory."""

    model_config = ConfigDict(validate_default=True)    # default paths become absolute, too
    listen: Listen = "127.0.0.1:8080"                   # of the application
    console: ConsoleListen = "127.0.0.1:8081"           # of pages, API and metrics; off: there are none
    mode: Mode = "enforce"                              # of the gate, where a route has none of its own
    operators: Networks = ("127.0.0.0/8", "::1/128")    # networks that the console answers
    trusted_proxy: Networks = ()                        # networks whose X-Forwarded-* headers are believed
    workers: Workers = "auto"                           # serving processes
    app: AppName | None = None                          # None = the built-in page
    threads: Annotated[int, Field(ge=0, le=1000)] = 8   # pool threads for `app`; 0 = on the loop
    queue: Annotated[int, Field(ge=1, le=10_000)] = 64  # requests that wait for a pool thread of a worker
    body_limit: Annotated[int, Field(ge=0, le=1 << 40)] = 1 << 20   # bytes of a request's body
    send_buffer: Annotated[int, Field(ge=1 << 20, le=1 << 40)] = 64 << 20   # bytes of answers that wait in a worker
    drain: Annotated[float, Field(ge=0, le=3600)] = 7.5     # seconds that an end waits for requests in flight
    metrics_token_file: FilePath | None = None          # its bearer sees resources in /-/metrics
    uplink: Annotated[tuple[Listen, ...], Field(max_length=8)] = ()     # what answers unless this machine is cut off
    hold: Annotated[float, Field(ge=0, le=3600)] = 0.0      # seconds for which the gate's answer outlasts that
    heartbeat: Annotated[Secret, if_plain(read_url)] | None = None      # a URL, asked every minute
    heartbeat_env: TextLine | None = None
    heartbeat_file: FilePath | None = None
    console_url: Annotated[str, AfterValidator(web_url)] | None = None      # in notifications, and behind a proxy
    status_page: bool = False                           # /-/status of the console's listener, for anyone
    status_token: Annotated[Secret, if_plain(long_token)] | None = None   # for its bearer alone
    status_token_env: TextLine | None = None
    status_token_file: FilePath | None = None
    retention: Retention = Retention()
    database: DatabaseUrl = "sqlite:///healthchecker.db"
    database_password: Secret | None = None             # of PostgreSQL; without one as libpq finds it
    database_password_env: TextLine | None = None
    database_password_file: FilePath | None = None
    machine: Annotated[TextLine, Field(max_length=100)] | None = None   # of several; None: see machine_name
    inventory: Literal["own", "follow"] = "own"         # follow: another machine's is imported
    keys: FilePath = Path("keys")
    known_hosts: FilePath = Field(default_factory=known_hosts_file)
    log_file: FilePath | None = None
    lease_file: FilePath | None = None  # the leases, for gates in other servers

    @model_validator(mode="after")
    def _consistent(self) -> ServiceSettings:
        if self.hold and not self.uplink:
            raise ValueError("hold needs uplink: what answers unless this machine is cut off")
        if self.database_path and (self.machine or self.inventory == "follow"):
            raise ValueError(f"several machines need a database of PostgreSQL: {POSTGRES}user@host/name")
        if self.database_password and self.database_path:
            raise ValueError(f"database_password needs a database of PostgreSQL: {POSTGRES}user@host/name")
        if self.status_page and self.status_token:
            raise ValueError("use one of status_page, which anyone sees, and status_token")
        return self

    @property
    def database_path(self) -> Path | None:
        """Of SQLite's file; None where the database is none."""
        return Path(self.database.removeprefix(SQLITE)) if self.database.startswith(SQLITE) else None

    @property
    def database_binding(self) -> tuple[str, ...]:
        """What the password of the database belongs to: a sealed one opens nowhere else."""
        url = sqlalchemy.make_url(self.database)
        hosts = (str(url.query.get(name, "")) for name in ("host", "port"))
        return "database", url.username or "", url.host or "", str(url.port or ""), url.database or "", *hosts

    @property
    def app_threads(self) -> int:
        """Pool threads for the application; the built-in page needs none."""
        return self.threads if self.app else 0

    @property
    def machine_name(self) -> str:
        """Of several on one database; empty where there is one alone."""
        return "" if self.database_path else self.machine or socket.gethostname()

    @property
    def worker_count(self) -> int:
        """Worker processes: as many as told, or one per usable CPU, WORKERS_MAX at most."""
        if self.workers != "auto":
            return int(self.workers)
        usable = os.cpu_count() or 1
        if sys.platform == "linux":
            usable = len(os.sched_getaffinity(0))
        return min(usable, WORKERS_MAX)


class ReceiverSettings(Settings):
    """Who is told, of what: an entry of the inventory's `notify`."""

    name: Name
    url: Annotated[Secret, if_plain(receiver_url)]    # a service of Apprise, with its secrets
    url_env: TextLine | None = None
    url_file: FilePath | None = None
    on: Annotated[tuple[Told, ...], Field(min_length=1)] = ("gate",)
    tags: tuple[TextLine, ...] = ()     # only of resources with one of these; of the gate while one is unhealthy
    wait: Annotated[float, Field(ge=0, le=3600)] = 20.0     # seconds that gather what fails together
    remind: Annotated[float, Field(ge=0, le=8760)] = 0.0    # hours until it is said again; 0: never
    after: Annotated[float, Field(ge=0, le=10_080)] = 0.0   # minutes that it must have lasted


KEPT_INTERVAL = 300.0       # seconds; with longer ones each poll opens anew
SECRETS = ("password", "key_passphrase")  # what is sealed
FILES = ("key_file", "ca_file", "certificate_file")  # read at each poll
CREDENTIALS = ("password", "password_env", "password_file", "key_file")
PASSPHRASES = ("key_passphrase", "key_passphrase_env", "key_passphrase_file")
HOSTLESS = (Platform.LOCAL, Platform.SIMULATED, Platform.PUSH)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ONLY = (    # settings that have a meaning on these platforms alone
    (REMOTE_PLATFORMS, ("endpoint",)),
    ((*REMOTE_PLATFORMS, Platform.TCP), ("port",)),
    ((*REMOTE_PLATFORMS, Platform.HTTP), ("username", "key_file", *PASSPHRASES)),
    ((*REMOTE_PLATFORMS, Platform.HTTP, Platform.PUSH), CREDENTIALS[:3]),
    (SSH_PLATFORMS, ("host_key", "host_key_alias", "proxy_jump", "ssh_config")),
    ((Platform.WINDOWS,), ("auth", "configuration_name")),
    ((Platform.WINDOWS, Platform.TCP), ("tls",)),
    ((Platform.WINDOWS, Platform.HTTP), ("certificate_file",)),
    ((Platform.WINDOWS, Platform.HTTP, Platform.TCP), ("ca_file", "certificate_fingerprint")),
    ((*REMOTE_PLATFORMS, Platform.LOCAL), ("keep", "relogin")),
    ((Platform.SIMULATED,), ("mean_healthy", "mean_unhealthy", "seed")),
    (frozenset(Platform) - PROTOCOLS - {Platform.PUSH}, ("limits", "services", "checks")),
    (frozenset(Platform) - {Platform.HTTP, Platform.PUSH}, ("hostname",)),
    (frozenset(Platform) - {Platform.PUSH}, ("timeout", "retry_interval")),
    (PROTOCOLS, ("expect",)),
    ((Platform.HTTP,), ("url", "method", "headers", "redirects")),
    ((Platform.TCP,), ("send", "certificate_days")))
NEEDED = {**dict.fromkeys(SSH_PLATFORMS, "username"), Platform.HTTP: "url", Platform.TCP: "port"}
USUAL: Mapping[str, dict[str, Any]] = {      # what a platform has by itself
    **{key: {"tls": False} for key in PROTOCOLS},
    **{key: {"hostname": "localhost"} for key in (*HOSTLESS, Platform.HTTP)},
    Platform.PUSH: {"hostname": "localhost", "rise": 1, "fall": 1}}     # who reports has decided


def foreign_fields(platform: str) -> frozenset[str]:
    """Settings that have no meaning on a platform."""
    return frozenset(name for platforms, names in ONLY if platform not in platforms for name in names)


def conflicts(given: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the mere presence of settings."""
    for group in (CREDENTIALS, PASSPHRASES):
        if sum(name in given for name in group) > 1:
            yield f"use one of {', '.join(group)}"
    if any(name in given for name in PASSPHRASES) and "key_file" not in given:
        yield "key_passphrase needs key_file"
    needed = NEEDED.get(cast(Platform, str(given.get("platform", Platform.UNIX.value))), "name")
    if needed not in given:
        yield f"{needed} is missing"


def of_url(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a URL says of where a resource is."""
    with contextlib.suppress(ValueError):
        url = read_url(str(raw.get("url")))
        return {"hostname": url.host, "port": url.port, "tls": url.scheme == "https"}
    return {}


class ResourceSettings(Settings):
    """One resource; every default and bound of the inventory stands here."""

    name: Name
    was: Name | None = None             # its name before: history and trust are its own then
    hostname: Hostname
    platform: Annotated[Platform, BeforeValidator(
        selectable, json_schema_input_type=Literal[SELECTABLE])] = Platform.UNIX
    port: Annotated[int, Field(ge=1, le=LAST_PORT)] | None = None      # None: see connect_port
    username: TextLine | None = None
    password: Secret | None = None
    password_env: TextLine | None = None
    password_file: FilePath | None = None
    key_file: FilePath | None = None
    key_passphrase: Secret | None = None
    key_passphrase_env: TextLine | None = None
    key_passphrase_file: FilePath | None = None
    host_key: HostKey | None = None
    host_key_alias: Hostname | None = None      # the name in known_hosts and in certificates
    proxy_jump: Annotated[TextLine, AfterValidator(stated_hops)] | None = None      # see hops
    ssh_config: Annotated[FilePath | None, BeforeValidator(ssh_config_path)] = None     # what it said stands above
    endpoint: bool = False              # True: no code is sent; the host keeps what `endpoint NAME` printed
    tls: bool = True                    # windows, tcp; see USUAL
    auth: Literal["negotiate", "ntlm", "kerberos", "basic", "certificate", "credssp"] = "negotiate"
    ca_file: FilePath | None = None
    certificate_file: FilePath | None = None
    certificate_fingerprint: Fingerprint | None = None
    configuration_name: TextLine = "Microsoft.PowerShell"      # see session_configuration
    interval: Seconds = 60.0            # seconds
    timeout: Seconds = 10.0             # seconds, the whole poll
    retry_interval: Seconds = 5.0       # seconds, while undecided
    keep: bool = True                   # what a poll opened stays open for the next; see keeps
    relogin: Relogin = 900.0            # seconds until a kept connection is made anew; 0 = never
    rise: Times = 2
    fall: Times = 2
    critical: bool = True               # False: shown, never closes the gate
    depends_on: tuple[Name, ...] = ()   # resources or groups: unhealthy while one of them is
    tags: list[TextLine] = []
    public_name: Name | None = None     # by which the status page shows it; None: not at all
    limits: Limits = Limits()
    services: list[ServiceName] = []
    checks: list[Check] = []
    # http only, like the next three; hostname and tls are its own
    url: Annotated[str, AfterValidator(web_url)] | None = None
    method: Literal["GET", "HEAD", "OPTIONS", "POST", "PUT"] = "GET"
    headers: Annotated[dict[HeaderName, HeaderValue], Field(max_length=32)] = {}    # to no other origin
    redirects: Annotated[int, Field(ge=0, le=10)] = 0       # that are followed
    send: LongText | None = None            # tcp only, like the next
    certificate_days: CertificateDays | None = None         # less: degraded
    expect: Annotated[Expect, BeforeValidator(short_expect, json_schema_input_type=Expect | str | list[str]),
                      AfterValidator(fits_platform)] = Expect()
    mean_healthy: Positive = 300.0          # seconds, simulated only
    mean_unhealthy: Positive = 30.0         # seconds, simulated only
    seed: int | None = None             # simulated only

    @model_validator(mode="after")
    def _consistent(self) -> ResourceSettings:
        names = [check.name for check in self.checks]
        faults = self._windows_faults() if self.platform is Platform.WINDOWS else []
        faults += self._protocol_faults() if self.platform in PROTOCOLS else []
        token = self.secrets.get("password")
        if token and not self.is_asked and not re.fullmatch(f"[!-~]{{{TOKEN_CHARS},}}", token):
            faults.append(f"a password of push must have {TOKEN_CHARS} characters of ASCII or more, without blanks")
        if len(set(names)) < len(names):
            faults.append("two checks have the same name")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _windows_faults(self) -> list[str]:
        if self.auth == "certificate":
            known = self.certificate_file and self.key_file and self.tls
            return [] if known else ["auth certificate needs certificate_file, key_file and tls"]
        faults = [] if self.username else ["username is missing"]
        if self.certificate_file or self.key_file:
            faults.append("certificate_file and key_file need `auth: certificate`")
        if self.auth == "basic" and not self.tls:
            faults.append("auth basic without tls would show the password to the network")
        return faults

    def _protocol_faults(self) -> list[str]:
        expect, shown = self.expect, self.url and self.password and not self.tls and self.hostname not in LOOPBACK
        faults = {
            "url says another hostname, port or tls": of_url({"url": self.url}) not in (
                {}, {"hostname": self.hostname, "port": self.port, "tls": self.tls}),
            "a password needs https, or it would be shown to the network": shown,
            "certificate_file needs https": self.certificate_file and not self.tls,
            "key_file needs certificate_file": self.key_file and not self.certificate_file,
            "certificate_days needs TLS": (self.certificate_days or expect.certificate_days) and not self.tls,
            "HEAD has no answer to look into": self.method == "HEAD" and (expect.contains or expect.values)}
        return [fault for fault, is_there in faults.items() if is_there]

    @property
    def is_asked(self) -> bool:
        """Whether it is polled; or it reports by itself."""
        return self.platform is not Platform.PUSH

    @property
    def scheme(self) -> str:
        """Of `url`; empty without one."""
        return read_url(self.url).scheme if self.url else ""

    @property
    def locks_nothing(self) -> bool:
        """Whether nobody counts logins that are refused: those of a key, a certificate, a token."""
        return bool(self.key_file or (not self.username if self.url else self.certificate_file))

    @property
    def connect_port(self) -> int:
        """`port`, or the registered one of the protocol."""
        return self.port or (WINRM_PORTS[self.tls] if self.platform is Platform.WINDOWS else SSH_PORT)

    @property
    def hops(self) -> list[str]:
        """The bastions on the way, the first one first: names of resources, or addresses with a user or a port."""
        return [] if self.proxy_jump in (None, "none") else self.proxy_jump.split(",")

    @property
    def way(self) -> list[str] | None:
        """The same; None where nothing can be behind it."""
        return self.hops if self.platform in SSH_PLATFORMS else None

    @property
    def session_configuration(self) -> str:
        """`configuration_name`; an endpoint is never at the one that every host has."""
        usual = self.configuration_name == "Microsoft.PowerShell"
        return "HealthChecker" if self.endpoint and usual else self.configuration_name

    @property
    def limited_mounts(self) -> list[str]:
        """Mount points and patterns that have a limit of their own."""
        disk = self.limits.disk_percent
        return [mount for mount, limit in ((disk and disk.mounts) or {}).items() if limit]

    @property
    def secrets(self) -> dict[str, str]:
        """What is known of SECRETS, plain or sealed."""
        return {kind: secret.get_secret_value() for kind in SECRETS if (secret := getattr(self, kind))}

    @property
    def keeps(self) -> bool:
        """`keep`, unless a poll comes so rarely that a login costs nothing."""
        return self.keep and self.interval <= KEPT_INTERVAL

    @property
    def ttl(self) -> float:
        """Seconds for which a report counts: two intervals, a poll and some grace; what is not asked has one."""
        return (2 * self.interval + self.timeout if self.is_asked else self.interval) + LEASE_GRACE

    @property
    def retry(self) -> float:
        """Seconds until the next poll where the last one does not agree with the state."""
        return min(self.interval, self.retry_interval)


# === Groups ==================================================================
# What counts together, what depends on what, and which paths of the application need what: models of the inventory's
# `groups` and `routes`, and what can be wrong between them. Pure; the aggregator counts by them, the gate of each
# worker sorts paths by them.
# Gives: by_tag, dependency_faults, gate_lines, Gates, group_faults, GroupSettings, inverse, Quorum, quorum_of,
# Routes, RouteSettings, unknown_name, usable_parents
DEPTH = 8                       # groups in groups in groups
CHAIN = 32                      # resources and groups of which each depends on the next
Quorum = Annotated[str, matching(r"all|any|[1-9][0-9]{0,5}|(100|[1-9][0-9]?)%",
                                 "must be all, any, a number or a percentage such as 50%")]


def quorum_of(wanted: str, count: int) -> int:
    """How many of `count` these are: all, any, a number, or a percentage rounded up; at most all."""
    if wanted == "any":
        return min(1, count)
    if wanted.endswith("%"):
        return -(-count * int(wanted[:-1]) // 100)
    return count if wanted == "all" else min(int(wanted), count)


class RouteSettings(Settings):
    """What holds for a path of the application and all below it."""

    needs: tuple[Name, ...] | None = None   # besides what the whole site needs; (): nothing; None: no more than that
    mode: Mode | None = None                # None: the service's


def short_route(value: object) -> object:
    """A list is short for `{needs: list}`."""
    return value if isinstance(value, (dict, RouteSettings)) else {"needs": value}


Routes = dict[Annotated[str, matching(
    r"(?!/-(/|$))(/(?!\.\.?(/|$))[^/?#;%\\\x00-\x1f\x7f]+)+",
    "must be a path such as /reports, not below /-/, without a last slash or what could be read in two ways: "
    "// . .. % ; \\ ? #", 1024)], Annotated[RouteSettings, BeforeValidator(short_route)]]


class GroupSettings(Settings):
    """Resources and other groups of which so many must be healthy; they count through it, and no longer alone."""

    name: Name
    members: tuple[Name, ...] = ()
    tags: tuple[TextLine, ...] = ()     # whatever has one of these, too
    healthy: Quorum = "all"             # all, any, how many, or a percentage
    warn: Quorum | None = None          # the group is degraded where fewer are healthy

    def all_members(self, tagged: Mapping[str, Iterable[str]]) -> Iterable[str]:
        """Names, once each; `tagged`: those of resources by tag."""
        return dict.fromkeys((*self.members, *(name for tag in self.tags for name in tagged.get(tag, ()))))


class Gates(Settings):
    """What counts together, and which paths of the application need what."""

    groups: tuple[GroupSettings, ...] = ()
    routes: Routes = {}

    def in_groups(self, tagged: Mapping[str, Iterable[str]]) -> dict[str, Iterable[str]]:
        """What stands in each group, by its name."""
        return {group.name: group.all_members(tagged) for group in self.groups}

    def members(self, tagged: Mapping[str, Iterable[str]]) -> dict[str, Iterable[str]]:
        """The same, and what stands in each route, by its path."""
        return self.in_groups(tagged) | {path: route.needs or () for path, route in self.routes.items()}

    def route(self, path: str, known: Collection[str]) -> RouteSettings:
        """What holds for a route, or for one that is gone: what holds for the route around it, of those `known`."""
        if path in self.routes:
            return self.routes[path]
        around = [other for other in self.routes if other in known and path.startswith(f"{other}/")]
        return self.routes[max(around, key=len)] if around else RouteSettings()


def by_tag(resources: Iterable[ResourceSettings]) -> dict[str, list[str]]:
    """Names of the resources that count, by their tags."""
    tagged: dict[str, list[str]] = collections.defaultdict(list)
    for settings in resources:
        for tag in settings.tags if settings.critical else ():
            tagged[tag].append(settings.name)
    return tagged


def inverse(inside: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """In which ones each stands."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name, members in inside.items():
        for member in members:
            found[member].append(name)
    return {member: tuple(names) for member, names in found.items()}


def unknown_name(name: str, known: Iterable[str], kind: str = "resource or group") -> str:
    """What is wrong with a name that none of a `kind` has; the `known` are all of them."""
    return f"no {kind} has this name{did_you_mean(name, known)}"


def nesting_fault(name: str, members: Mapping[str, Iterable[str]]) -> str | None:
    """What is wrong with the groups in a group."""
    level, levels = {name}, 0
    while level := {each for group in level for each in members.get(group, ()) if each in members}:
        levels += 1
        if name in level or levels > DEPTH:
            return f"{name} would be a member of its own" if name in level else f"groups may be {DEPTH} deep"
    return None


def group_fault(group: GroupSettings, members: Mapping[str, Iterable[str]]) -> tuple[str, str] | None:
    """What is wrong with one, and with which setting of it; `members` of all groups."""
    count = len([*members[group.name]])
    if not count:
        return "name", "has no members: name some, or a tag of resources that count"
    if group.healthy.isdecimal() and int(group.healthy) > count:
        return "healthy", f"must be at most {count}, for so many members count"
    if group.warn == group.healthy or (group.warn and quorum_of(group.warn, count) < quorum_of(group.healthy, count)):
        return "warn", "must ask for more members than `healthy`"
    fault = nesting_fault(group.name, members)
    return ("members", fault) if fault else None


def group_faults(gates: Gates, resources: Iterable[ResourceSettings]) -> Iterator[tuple[NodePath, str]]:
    """What is wrong with groups and routes, and where."""
    critical = {settings.name: settings.critical for settings in resources}
    members = gates.members(by_tag(resources))
    places: dict[NodePath, str] = {("routes", path, "needs", number): name for path, route in gates.routes.items()
                                   for number, name in enumerate(route.needs or ())}
    taken = {*critical, *(path[1:] for path in gates.routes)}
    for index, group in enumerate(gates.groups):
        places |= {("groups", index, "members", number): name for number, name in enumerate(group.members)}
        if group.name in taken:
            yield ("groups", index, "name"), "a resource, group or route has this name, too"
        taken.add(group.name)
        if fault := group_fault(group, members):
            yield ("groups", index, fault[0]), fault[1]
    known = {*critical, *(group.name for group in gates.groups)}
    for place, name in places.items():
        if name not in known:
            yield place, unknown_name(name, known)
        elif not critical.get(name, True):
            yield place, f"{name} is not critical, so it counts for nothing"


def knots(needs: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str]]:
    """Names that need themselves, or too many behind each other, and what is wrong with each."""
    try:
        order = [*graphlib.TopologicalSorter(needs).static_order()]
    except graphlib.CycleError as error:
        circle = error.args[1][:-1]
        for name in circle:
            others = ", ".join(each for each in circle if each != name)
            yield name, f"{name} would depend on itself" + (f", through {one_line(others)}" if others else "")
        return
    depths: dict[str, int] = {}
    for name in order:
        depths[name] = 1 + max((depths[need] for need in needs.get(name, ())), default=0)
        if depths[name] > CHAIN:
            yield name, f"no more than {CHAIN} may depend on each other in a row"


def dependency_faults(gates: Gates, resources: Sequence[ResourceSettings]) -> Iterator[tuple[int, NodePath, str]]:
    """What is wrong with what resources depend on: at which one, where in its settings, and why."""
    groups = gates.in_groups(by_tag(resources))
    known, clean = {*groups, *(settings.name for settings in resources)}, True
    for index, settings in enumerate(resources):
        for number, name in enumerate(settings.depends_on):
            again = name in settings.depends_on[:number] and f"{name} stands here twice"
            if fault := again or (name not in known and unknown_name(name, known)):
                clean = False
                yield index, ("depends_on", number), fault
    tangled = dict(knots(groups | {settings.name: settings.depends_on for settings in resources})) if clean else {}
    for index, settings in enumerate(resources) if tangled else ():
        if settings.name in tangled and settings.depends_on:
            yield index, ("depends_on",), tangled[settings.name]


def usable_parents(gates: Gates, resources: Sequence[ResourceSettings]) -> dict[str, tuple[str, ...]]:
    """On what resources depend, by their names. What the console added can make a circle with an inventory that came
    later: of its resources each stands alone."""
    parents = {settings.name: settings.depends_on for settings in resources if settings.depends_on}
    groups = gates.in_groups(by_tag(resources)) if parents else {}
    while tangled := parents.keys() & dict(knots(groups | parents)):
        for name in tangled:
            del parents[name]
    return parents


def gate_lines(gates: Gates, resources: Sequence[ResourceSettings]) -> Iterator[str]:
    """What the site and each route need, down to the resources, and what depends on what; nothing where each resource
    counts alone."""
    members, quorums = gates.members(by_tag(resources)), {group.name: group.healthy for group in gates.groups}
    inside, shown = {name for names in members.values() for name in names}, set[str]()
    counted = (*quorums, *(settings.name for settings in resources if settings.critical))

    def below(name: str, depth: int) -> Iterator[str]:
        again = name in shown
        shown.update({name} & quorums.keys())
        yield f"{'  ' * depth}{name}{' (above)' if again else f': {quorums[name]} of' if name in quorums else ''}"
        for member in members[name] if name in quorums and not again else ():
            yield from below(member, depth + 1)

    if members:
        yield "the whole site needs"
        for name in (name for name in counted if name not in inside):
            yield from below(name, 1)
    for path, route in gates.routes.items():
        needed = "nothing" if route.needs == () else "that and" if route.needs else "that"
        yield f"{path} needs {needed}{f' (mode {route.mode})' if route.mode else ''}"
        for name in route.needs or ():
            yield from below(name, 1)
    for parent, names in inverse({settings.name: settings.depends_on for settings in resources}).items():
        yield f"behind {parent}: {', '.join(names)}"


# === Schedules ===============================================================
# Planned work: what does not count meanwhile, and when that recurs, models of the inventory's `maintenance`. A Unix
# time comes in, the beginnings around it come out. What would begin in an hour that clocks skip begins right after it;
# of an hour that they show twice, in the first; with * as minute or hour, whenever they say so. How long it takes is
# time that passes, whatever clocks show. Pure.
# Gives: choice_faults, Plan, Scope
A_MONDAY = datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)     # from which schedules are tried out
PUT_BACK = 3 * 3600.0           # seconds by which a clock is put back or forward at most
TURNS = 2000                    # of a schedule without a pause, after which there is none


def schedule_of(text: str) -> str:
    """Raises ValueError for what is no schedule, or never comes."""
    try:
        if len(text) > 100 or len(text.split()) != 5:
            raise CronSimError("five fields")
        if next(CronSim(text, A_MONDAY), None):
            return text
    except CronSimError as error:
        raise ValueError("must be minute, hour, day of the month, month and day of the week as cron has them, such as "
                         f"0 2 * * sun ({error})") from None
    raise ValueError("never comes")


def zone_of(name: str) -> datetime.tzinfo:
    """A time zone. Raises ValueError."""
    with contextlib.suppress(KeyError, ValueError, OSError):     # or a folder of them
        return datetime.timezone.utc if name == "UTC" else zoneinfo.ZoneInfo(name)
    raise ValueError(unknown_name(name, sorted(zoneinfo.available_timezones()), "time zone"))


def zone_name(name: str) -> str:
    zone_of(name)
    return name


def with_pauses(seconds: float, info: Any) -> float:
    """Raises ValueError where one turn meets the next, on and on: that is no maintenance any more."""
    if not (schedule := info.data.get("schedule")):
        return seconds
    begun = next(CronSim(schedule, A_MONDAY))
    for _ in range(TURNS):
        end = begun + datetime.timedelta(seconds=math.floor(seconds) + 1)
        last = next(CronSim(schedule, end, reverse=True))
        if last == begun:
            return seconds
        begun = last
    raise ValueError("each turn would meet the next one, so that this never counts; say `critical: false` there")


Chosen = Field(max_length=1000)     # each name is looked up again and again


class Scope(Settings):
    """What does not count: everything, or what has one of these tags, is in one of these groups, or has such a name."""

    tags: Annotated[tuple[TextLine, ...], Chosen] = ()
    groups: Annotated[tuple[Name, ...], Chosen] = ()
    resources: Annotated[tuple[Name, ...], Chosen] = ()
    all: bool = False

    @model_validator(mode="after")
    def _chosen(self) -> Scope:
        if self.all == bool(self.tags or self.groups or self.resources):
            raise ValueError("needs tags, groups or resources, or else all: true")
        return self

    def __str__(self) -> str:
        return "everything" if self.all else ", ".join([
            *(f"tag {tag}" for tag in self.tags), *(f"group {group}" for group in self.groups), *self.resources])

    @property
    def scope_json(self) -> str:
        return self.model_dump_json(include=set(Scope.model_fields), exclude_defaults=True)


class Plan(Scope):
    """Work that recurs."""

    model_config = ConfigDict(serialize_by_alias=True)
    schedule: Annotated[str, AfterValidator(schedule_of)]
    zone: Annotated[str, AfterValidator(zone_name)] = "UTC"
    seconds: Annotated[Duration, Field(ge=60), AfterValidator(with_pauses)] = Field(alias="for")
    reason: Annotated[TextLine, Field(max_length=200)]

    def around(self, at: float) -> tuple[float, float]:
        """When it began last, at that time at the latest, and when it begins next; infinity for never."""
        def starts(shift: float) -> Iterator[float]:    # cron's own reckoning knows one of two hours alone
            then = datetime.datetime.fromtimestamp(math.floor(at) + shift, zone_of(self.zone))
            return (start.timestamp() for start in CronSim(self.schedule, then, reverse=shift > 0))

        return (next((start for start in starts(PUT_BACK) if start <= at), -math.inf),
                next((start for start in starts(-PUT_BACK) if start > at), math.inf))


def choice_faults(plans: Sequence[Plan], receivers: Sequence[ReceiverSettings], gates: Gates,
                  resources: Sequence[ResourceSettings]) -> Iterator[tuple[NodePath, str]]:
    """Which names nobody has, and where."""
    parts: dict[str, Sequence[Settings]] = {"maintenance": plans, "notify": receivers}
    known = {"resources": {settings.name for settings in resources}, "groups": {group.name for group in gates.groups},
             "tags": {tag for settings in resources for tag in settings.tags}}
    for part, index, entry in ((part, *each) for part, entries in parts.items() for each in enumerate(entries)):
        for field, names in known.items():
            for number, name in enumerate(getattr(entry, field, ())):
                if name not in names:
                    yield (part, index, field, number), unknown_name(name, names, field[:-1])


# === Inventory ===============================================================
# In comes inventory.yaml (or one resource of a request), out come settings, or an InventoryError with a line for each
# fault. Three steps: Document makes nested texts with a place each, the models check them, InventoryLoader merges
# defaults and gathers the faults. Pure but for reading files and environment; called by commands, and by threads that
# serve the console.
# Gives: HEARTBEAT, Inventory, InventoryFile, InventoryLoader, load_inventory, M, message_of, OWN_SECRETS,
# plain_faults, STATUS_TOKEN, take_variable, url_binding
HEARTBEAT, STATUS_TOKEN = "", "/-/status"   # as names of receivers: no receiver has them
OWN_SECRETS = {HEARTBEAT: "service.heartbeat", STATUS_TOKEN: "service.status_token"}


def url_binding(name: str) -> tuple[str, ...]:
    """What the URL of a receiver belongs to."""
    return "notify", name


@dataclass(frozen=True)
class Inventory:
    """What a valid inventory.yaml says."""

    path: Path
    service: ServiceSettings
    resources: list[ResourceSettings]
    places: Mapping[str, str]       # of the resources: file:line:column
    defaults: Mapping[str, Any]     # without secrets
    gates: Gates = dataclass_field(default_factory=Gates)
    plans: tuple[Plan, ...] = ()
    entries: Sequence[int] = ()     # of the file, one for each resource; one with a range stands for many
    receivers: tuple[ReceiverSettings, ...] = ()

    def urls(self) -> Iterator[tuple[NodePath, str, str]]:
        """The URLs that are secrets, plain or sealed: path in the file, name of the receiver, URL; among them what
        OWN_SECRETS names."""
        for name, secret in ((HEARTBEAT, self.service.heartbeat), (STATUS_TOKEN, self.service.status_token)):
            if secret:
                yield tuple(OWN_SECRETS[name].split(".")), name, secret.get_secret_value()
        for number, receiver in enumerate(self.receivers):
            yield ("notify", number, "url"), receiver.name, receiver.url.get_secret_value()

    def secrets(self) -> Iterator[tuple[NodePath, str, tuple[str, ...]]]:
        """The secrets that are no resource's, plain or sealed: path in the file, value, what it belongs to."""
        if self.service.database_password:
            yield (("service", "database_password"), self.service.database_password.get_secret_value(),
                   self.service.database_binding)
        yield from ((where, url, url_binding(name)) for where, name, url in self.urls())

    @property
    def digest(self) -> str:
        """Of what several machines have to say alike: all but `service`, secrets and where files are."""
        private = {name for name in ResourceSettings.model_fields if name.endswith("_file") or name in SECRETS}
        said = [[settings.model_dump_json(exclude=private | {"ssh_config"}) for settings in self.resources],
                self.gates.model_dump_json(), [plan.model_dump_json() for plan in self.plans],
                [receiver.model_dump_json(exclude={"url", "url_file"}) for receiver in self.receivers]]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @property
    def secret_variables(self) -> set[str]:
        """Environment variables that hold secrets."""
        entries = (self.service, *self.receivers, *self.resources)
        stated = {getattr(entry, name) for entry in entries for name in entry.model_fields_set if name.endswith("_env")}
        return stated - {None}


class InventoryFile(Settings):
    """The parts of the file; a resource is looked at together with the defaults."""

    service: ServiceSettings = Field(default=cast(Any, {}), validate_default=True)
    defaults: dict[str, Any] = {}
    resources: list[dict[str, Any]] = []
    groups: tuple[GroupSettings, ...] = ()
    routes: Routes = {}
    maintenance: tuple[Plan, ...] = ()
    notify: tuple[ReceiverSettings, ...] = ()


M = TypeVar("M", bound=Settings)
RANGED = {"hostname", "url", "name", "was"}     # settings that may have a range each
NESTED: dict[str, type[Settings]] = {
    "service": ServiceSettings, "limits": Limits, "checks": Check, "retention": Retention, "expect": Expect,
    "groups": GroupSettings, "routes": RouteSettings, "maintenance": Plan, "notify": ReceiverSettings}


def known_fields(model: type[Settings], loc: NodePath) -> Iterable[str]:
    """What could stand where an `extra_forbidden` error of `model` points to."""
    *_, parent = ["", *(part for part in loc[:-1] if isinstance(part, str) and part[:1] != "/")]    # no paths
    nearest = NESTED.get(parent, Limit) if parent else model
    return [field.alias or name for name, field in nearest.model_fields.items()]


WORDING = {     # pydantic's, as patterns, and ours
    "Field required": "is missing", "Extra inputs are not permitted": "is unknown",
    "Input is not a valid path.*": "must be a path", "Input should be a valid (tuple|list)": "must be a list",
    "Input should be a valid dictionary.*": "must be a mapping (key: value)",
    "Value should have (.*) items? after validation.*": r"must have \1 characters",
    "(Tuple|List|Dictionary) should have at least 1 item.*": "must have at least one entry",
    "Input should": "must", "String should": "must", "Value error, ": ""}


def message_of(error: Mapping[str, Any]) -> str:
    """pydantic's text without values and in our wording."""
    text = str(error["msg"]).replace("SecretStr", "text")
    for theirs, ours in WORDING.items():
        text = re.sub(f"^(?:{theirs})", ours, text)
    return text


def plain_faults(error: ValidationError) -> Iterator[Mapping[str, Any]]:
    """pydantic's, without a second one that a list is too short, for it does not count what is wrong in it."""
    items = error.errors(include_url=False, include_input=False)
    inside = {item["loc"][:-1] for item in items if item["loc"]}
    return (item for item in items if item["type"] != "too_short" or item["loc"] not in inside)


@functools.cache
def taken_variables() -> dict[str, str]:
    """Secrets that stood in the environment, by their variables: the inventory may be read again."""
    return {}


def take_variable(name: str) -> str:
    """Takes a secret out of the environment, of what is started here and of what /proc shows of this process."""
    value = os.environ.get(name)
    if value is None:
        return taken_variables().get(name, "")
    taken_variables()[name] = value
    if sys.platform != "win32":
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_void_p
        if place := getenv(os.fsencode(name)):
            ctypes.memset(place, 0, len(os.fsencode(value)))
    del os.environ[name]
    return value


def identities(path: Path) -> tuple[object, ...]:
    """What two names of one file have in common: where links lead, and the file itself where there is one."""
    real = os.path.normcase(os.path.realpath(path))
    try:
        found = os.stat(real)
    except OSError:
        return (real,)
    return (real, (found.st_dev, found.st_ino)) if found.st_ino else (real,)


def fetch_secret(source: str, text: str, folder: Path) -> str:
    """The secret of an environment variable or a file. Raises ValueError."""
    try:
        if source.endswith("_env"):
            found = (os.environ.get(text) or taken_variables().get(text, "")).rstrip("\r\n")
        else:
            path = absolute(text, folder)
            if not os.path.isfile(path):
                raise FileNotFoundError(path)       # a pipe would be waited for
            found = path.read_text("utf-8-sig").rstrip("\r\n")
        found.encode()
    except (OSError, UnicodeError):
        raise ValueError("this file cannot be read as text") from None
    if not found:
        what = "environment variable is not set" if source.endswith("_env") else "file is empty"
        raise ValueError(f"this {what}")
    return found


def secret_entries(top: Mapping[str, Any]) -> Iterator[tuple[NodePath, dict[str, Any], str, list[str]]]:
    """Entries of the file that hold a secret and are no resource: path, entry, the key of it, which keys state it."""
    receivers = top["notify"] if isinstance(top.get("notify"), list) else []
    entries: list[tuple[NodePath, Any, str]] = [
        (("service",), top.get("service"), name)
        for name in ("database_password", *(name.partition(".")[2] for name in OWN_SECRETS.values()))]
    entries += [(("notify", number), own, "url") for number, own in enumerate(receivers)]
    for here, own, name in entries:
        if isinstance(own, dict):
            keys = (name, f"{name}_env", f"{name}_file")
            yield here, own, name, [key for key in keys if isinstance(own.get(key), str)]


class InventoryLoader:
    """Turns a Document into an Inventory and gathers all faults on the way."""

    def __init__(self, path: Path, document: Document) -> None:
        self.path, self.document = path, document
        self.folder = path.absolute().parent            # where relative paths begin
        self.faults = dict.fromkeys(document.faults)    # a dict keeps the order and drops repetitions
        self.places: dict[str, str] = {}                # of the resources so far, by name
        self.names: set[str] = set()                    # of all resources

    def load(self) -> Inventory:
        top = {} if self.document.value is None else self.document.value
        parts = top if isinstance(top, dict) else {}
        self._fetch_secrets(parts)
        file = self._validate(InventoryFile, top, lambda loc: loc)
        defaults = parts["defaults"] if isinstance(parts.get("defaults"), dict) else {}
        items = parts["resources"] if isinstance(parts.get("resources"), list) else []
        if "depends_on" in defaults:
            self.fault(("defaults", "depends_on"), "must stand at each resource, for none depends on itself")
        if file and "resources" not in file.model_fields_set:
            self.fault((), "resources is missing; write `resources: []` to watch nothing")
        missing = dict.fromkeys(("name", "hostname", "username"), "any")     # to look at the defaults alone
        usual = self._validate(ResourceSettings, missing | defaults | of_url(defaults), lambda loc: ("defaults", *loc))
        entries = [(index, one) for index, own in enumerate(items) if isinstance(own, dict)
                   for one in self._hosts(index, own)]
        self.names = {str(own.get("name", own.get("hostname"))) for _, own in entries}
        found = [(index, resource) for index, own in entries if (resource := self._resource(index, own, defaults))]
        resources = [resource for _, resource in found]
        self._fault_former_names(found)
        if file:
            self._fault_shared_files(file.service, found)
            self._fault_names(file.notify)
        ways = {name: list[str]() for name in self.names} | {resource.name: resource.way for resource in resources}
        for index, resource in found:
            if (why := jump_fault(resource.name, ways)):
                self.fault(("resources", index, "proxy_jump"), why)
        gates = Gates(groups=file.groups, routes=file.routes) if file else Gates()
        if file and not self.faults:
            self._fault_gates(file, gates, found)
        if self.faults or not file or not usual:
            raise InventoryError("\n".join(self.faults))
        usual_values = usual.model_dump(mode="json", include=set(defaults), exclude=set(SECRETS), exclude_none=True)
        return Inventory(self.path, file.service, resources, self.places, usual_values, gates, file.maintenance,
                         [index for index, _ in found], file.notify)

    def _fetch_secrets(self, parts: Mapping[str, Any]) -> None:
        """Puts the secrets that a variable or a file holds in their places."""
        for here, own, name, stated in secret_entries(parts):
            try:
                own.update((name, fetch_secret(key, own[key], self.folder)) for key in stated[:1] if key != name)
            except ValueError as error:
                self.fault((*here, stated[-1]), str(error))
                own.setdefault(name, "http://unknown.invalid")
            if len(stated) > 1:
                self.fault((*here, stated[1]), f"use one of {', '.join(stated)}")

    def _hosts(self, index: int, own: dict[str, Any]) -> list[dict[str, Any]]:
        """An entry by itself, or one for each host of its range."""
        if not any(RANGE.search(str(own.get(key))) for key in ("hostname", "url")):
            return [own]
        found: dict[str, list[str]] = {}
        for key in RANGED & own.keys():
            try:
                found[key] = ranged(str(own[key]))
            except ValueError as error:
                self.fault(("resources", index, key), str(error))
                return []
        count = len(found.get("url") or found["hostname"])
        for key in [key for key, texts in found.items() if len(texts) != count]:
            self.fault(("resources", index, key), f"must have a range of {count}, for so many are meant")
        for kind in SECRETS if count > 1 else ():
            if str(own.get(kind, "")).startswith(TOKEN_PREFIXES):
                self.fault(("resources", index, kind), f"a sealed secret belongs to one resource; use {kind}_file")
        return [own | dict(zip(found, texts, strict=True)) for texts in zip(*found.values(), strict=False)]

    def _fault_gates(self, file: InventoryFile, gates: Gates, found: Sequence[tuple[int, ResourceSettings]]) -> None:
        """What is wrong with groups, routes and what chooses resources; if nothing is, with what these depend on."""
        resources = [resource for _, resource in found]
        chosen = choice_faults(file.maintenance, file.notify, gates, resources)
        for place, why in (*group_faults(gates, resources), *chosen):
            self.fault(place, why)
        for number, place, why in () if self.faults else dependency_faults(gates, resources):
            self.fault(("resources", found[number][0], *place), why)

    def _fault_names(self, receivers: Sequence[ReceiverSettings]) -> None:
        for number, name in enumerate(f"notify/{receiver.name}" for receiver in receivers):
            if name in self.places:
                self.fault(("notify", number, "name"), "another receiver has this name; names are unique")
            self.places[name] = f"{self.path.name}:{self.document.position(('notify', number, 'url'))}"

    def _fault_former_names(self, found: Iterable[tuple[int, ResourceSettings]]) -> None:
        """What was one resource became one other."""
        taken = set(self.names)
        for index, resource in found:
            if resource.was:
                if resource.was in taken:
                    self.fault(("resources", index, "was"), "a resource has this name, or had it, too")
                taken.add(resource.was)

    def _fault_shared_files(self, service: ServiceSettings, resources: Iterable[tuple[int, ResourceSettings]]) -> None:
        """A log that is written into another file of the service would destroy it, by whatever name it is called."""
        database, log_file = service.database_path, service.log_file
        ours = [("", "the inventory", self.path), ("", "the program", Path(__file__)),
                *(("", f"{service.keys.name}/{name}", service.keys / name) for name in KEY_FILES),
                *([("database", "service.database", database)] if database else ()),
                *(("", database.name + end, Path(f"{database}{end}")) for end in COMPANIONS if database)]
        ours += [(name, f"service.{name}", path) for name, path in service
                 if path and name.endswith("_file") and name != "log_file"]
        for number in range(LOG_FILES + 1) if log_file else ():
            ours.append(("log_file", "service.log_file", Path(f"{log_file}{f'.{number}' if number else ''}")))
        known: dict[object, str] = {}
        for setting, what, path in ours:
            found = {known.setdefault(identity, what) for identity in identities(path)} - {what}
            if found and setting:
                self.fault(("service", setting), f"is {min(found)}, too; name another file")
        looked_up = functools.cache(identities)     # many may share one
        for index, resource in resources:
            for name, value in resource:
                if isinstance(value, Path) and (which := [*filter(None, map(known.get, looked_up(value)))]):
                    self.fault(("resources", index, name), f"is {which[0]}, too; name another file")

    def parse(self, model: type[M], raw: object) -> M:
        """Raises ValidationError."""
        return model.model_validate(raw, context=self.folder)

    def fault(self, path: NodePath, message: str, *, key: bool = False) -> None:
        if path[2:3] == ("needs",) and path[:3] not in self.document.nodes:     # a route in its short form
            path = path[:2] + path[3:]
        parts = path[:-1] if key else path      # an unknown key may be a slipped password: it is not shown
        shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
        position = self.document.position(path, key=key)
        self.faults[f"{self.path.name}:{position}: {shown or 'inventory'}: {message}"] = None

    def _validate(self, model: type[M], raw: object, locate: Callable[[NodePath], NodePath]) -> M | None:
        try:
            return self.parse(model, raw)
        except ValidationError as error:
            for item in plain_faults(error):
                path = locate(tuple(part for part in item["loc"] if part != "[key]"))
                if item["type"] == "extra_forbidden":
                    known = known_fields(model, item["loc"])
                    hint = did_you_mean(str(path[-1]), known) or f"; known are {', '.join(known)}"
                    self.fault(path, f"unknown setting{hint}", key=True)
                else:
                    self.fault(path, message_of(item))
            return None

    def _resource(self, index: int, own: dict[str, Any], defaults: dict[str, Any]) -> ResourceSettings | None:
        raw = self._merged(here := ("resources", index), own, defaults)
        sources = {kind: source for kind in SECRETS for source in (f"{kind}_env", f"{kind}_file")
                   if isinstance(raw.get(source), str)}

        def locate(loc: NodePath) -> NodePath:
            loc = (*(sources.get(str(part), part) for part in loc[:1]), *loc[1:])
            inherited = bool(loc) and loc[0] not in own and loc[0] in defaults
            return (("defaults",) if inherited else here) + loc

        if (first := self.places.get(str(raw["name"]))) is not None:
            source = "name" if "name" in own or "name" in defaults else "hostname"
            self.fault(locate((source,)), f"the resource at {first} has this name; names are unique")
        self.places.setdefault(str(raw["name"]), f"{self.path.name}:{self.document.position(here)}")
        for name in FILES:
            with contextlib.suppress(ValueError):       # the model reports that
                if isinstance(raw.get(name), str) and not os.path.isfile(absolute(raw[name], self.folder)):
                    self.fault(locate((name,)), "there is no such file")
        for kind, source in sources.items():
            try:
                raw[kind] = fetch_secret(source, raw[source], self.folder)
            except ValueError as error:
                self.fault(locate((source,)), str(error))
        return self._validate(ResourceSettings, raw, locate)

    def _merged(self, here: NodePath, own: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        """`own` over `defaults`; what has no meaning on the platform is a fault in `own` and skipped in `defaults`."""
        platform = str(own.get("platform", defaults.get("platform", Platform.UNIX.value)))
        foreign = foreign_fields(platform)
        for key in foreign & own.keys() if platform in SELECTABLE else ():
            self.fault((*here, key), f"{key} has no meaning with platform {platform}", key=True)
        skipped = foreign.union(*(group for group in (CREDENTIALS, PASSPHRASES) if own.keys() & group))
        raw = USUAL.get(platform, {}) | {key: value for key, value in defaults.items() if key not in skipped} | own
        if isinstance(own.get("limits"), dict) and isinstance(defaults.get("limits"), dict):
            raw["limits"] = defaults["limits"] | own["limits"]
        raw |= of_url(raw)
        usable = isinstance(hostname := raw.get("hostname"), str) and HOSTNAME.fullmatch(hostname)
        raw.setdefault("name", hostname if usable else f"unnamed {here[1]}")
        raw = ({} if platform in SELECTABLE else {"hostname": "localhost"}) | raw   # which is meant may need none
        path = ssh_config_path(raw.get("ssh_config"))
        if usable and isinstance(path, str):
            keyless = not raw.keys() & {*CREDENTIALS}
            try:
                raw = with_ssh_config(raw, absolute(path, self.folder), self.names, keyless=keyless)
            except ValueError as error:
                self.fault((*here, "ssh_config"), str(error))
        for message in conflicts(raw):
            self.fault(here, message)
        return raw


def load_inventory(path: Path) -> Inventory:
    """Reads and validates; raises InventoryError, a line per fault: `inventory.yaml:12:7: resources[2].port: …`."""
    return InventoryLoader(path, read_document(path)).load()


# === Vault ===================================================================
# Secrets at rest: in come passwords and what they belong to, out go tokens, and the other way round. Called in any
# thread of the main process; only the start and `keys rotate` write key files. A secret never shows in an error.
# Gives: length_prefixed, create_private, ensure_private, give, let_read, make_folder, private_file, take_place, Vault,
#   hash_password
RSA_BITS = 3072                 # bits, equal in strength to AES-128 (NIST SP 800-57)
OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"HealthChecker/HC1")
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
# Windows' access lists as SDDL writes them ([MS-DTYP] 2.5.1): an entry, and those whose entries restricted puts away
ACCESS = re.compile(r"\((A|D);[^;()]*;([^;()]*;[^;()]*;[^;()]*;([^;()]*))\)")
EVERYBODY = frozenset(("WD", "AN", "AU", "IU", "NU", "BU", "BG", "CO"))
OWNERS = ("S-1-3-4", "SY", "BA")      # the file's owner ("OW"), the system, the administrators
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
SEALED = re.compile(r"HC[12]\.([0-9a-f]{16})(?:\.[^.]*){3}")    # of a sealed secret, with the id of its key


def length_prefixed(*parts: str) -> bytes:
    """The parts in one byte string that no other parts give."""
    return b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)


def restricted(access: str) -> str:
    """An access list for the owner, SYSTEM, the administrators and the accounts that `access` names: whom the folder
    was given for. Everybody else loses what they had; nothing of the folder's comes back."""
    kept = [f"({kind};;{rest})" for kind, rest, who in ACCESS.findall(access)
            if kind == "D" or who not in EVERYBODY.union(OWNERS, ["OW"])]
    kept.sort(key=lambda entry: entry[1] != "D")    # denials come first
    return "D:P" + "".join([*kept, *(f"(A;;FA;;;{who})" for who in OWNERS)])


def change_access(path: Path, change: Callable[[str], str]) -> None:
    """Windows: a file's access list becomes what `change` makes of it, in SDDL. By the system itself: a program that
    does it could be another one of its name. Raises OSError."""
    advapi32, kernel32 = (cast(Any, ctypes).WinDLL(name, use_last_error=True) for name in ("advapi32", "kernel32"))
    old, new, text = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_wchar_p()

    def ask(done: int) -> None:
        if not done:
            raise cast(Any, ctypes).WinError(cast(Any, ctypes).get_last_error())

    try:    # SE_FILE_OBJECT is 1, DACL_SECURITY_INFORMATION 4, SDDL_REVISION_1 is 1
        if code := advapi32.GetNamedSecurityInfoW(str(path), 1, 4, None, None, None, None, ctypes.byref(old)):
            raise cast(Any, ctypes).WinError(code)
        ask(advapi32.ConvertSecurityDescriptorToStringSecurityDescriptorW(old, 1, 4, ctypes.byref(text), None))
        ask(advapi32.ConvertStringSecurityDescriptorToSecurityDescriptorW(change(text.value or ""), 1,
                                                                          ctypes.byref(new), None))
        ask(advapi32.SetFileSecurityW(str(path), 4, new))   # as it is: SetNamedSecurityInfo adds what the folder has
    finally:
        for made in (old, new, text):
            kernel32.LocalFree(made)


def restrict(path: Path) -> None:
    """Windows knows no file mode: a file keeps the accounts that its folder was given for, and loses everybody else."""
    if sys.platform == "win32":
        change_access(path, restricted)


def let_read(path: Path) -> None:
    """Every account of this machine may read a file."""
    if sys.platform == "win32":
        change_access(path, lambda access: f"{access}(A;;FR;;;BU)")
    else:
        path.chmod(0o644)


def give(path: Path | int, like: Path) -> None:
    """What root makes becomes that of the owner of `like`, its folder: or the service's account could not read it."""
    if sys.platform != "win32" and os.geteuid() == 0:
        with contextlib.suppress(OSError):      # a root without that right, or in a namespace without that owner
            os.chown(path, like.stat().st_uid, like.stat().st_gid)


def put_name(temporary: Path, path: Path) -> None:
    """Gives a file its name, unless that is taken: FileExistsError. By a link where there are such, not on FAT."""
    if sys.platform == "win32":
        os.rename(temporary, path)      # never over another one there
        return
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def make_folder(path: Path) -> None:
    """A folder for its owner alone, unless it is there."""
    if not path.exists():
        path.mkdir(mode=0o700, parents=True)
        give(path, path.parent)


@contextlib.contextmanager
def private_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written that only its owner can read; the whole file or none, and never over another one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, 0o600), "w+b") as file:
            restrict(temporary)
            give(file.fileno(), path.parent)
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_name(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None   # which is what a user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def create_private(path: Path, content: bytes = b"") -> None:
    with private_file(path) as file:
        file.write(content)


def ensure_private(path: Path) -> None:
    """Makes an empty file where there is none."""
    if not path.exists():
        with contextlib.suppress(FileExistsError):      # of another process, just now
            create_private(path)


def take_place(new: Path, old: Path) -> None:
    """Puts one file in the place of another, whose owner, group, mode and access list it takes. Raises OSError, and
    changes nothing, where this account cannot give it away: the service could not read it then."""
    if sys.platform == "win32":
        if not ctypes.windll.kernel32.ReplaceFileW(str(old), str(new), None, 0, None, None):
            raise ctypes.WinError()
        return
    found = old.stat()
    os.chown(new, found.st_uid, found.st_gid)
    shutil.copystat(old, new)
    os.utime(new)
    os.replace(new, old)


@contextlib.contextmanager
def key_files_written() -> Iterator[None]:
    """Around what writes key files: raises SecretError."""
    try:
        yield
    except OSError as error:
        raise SecretError(f"{error.filename or 'a file in keys'} cannot be written: {error.strerror}") from error


def belong_together(key: rsa.RSAPrivateNumbers) -> bool:
    """Whether each number of a key is what the others make of it; OpenSSL looks for primes, too, which takes 0.2 s."""
    e, n = key.public_numbers.e, key.public_numbers.n
    return (min(key.p, key.q) > 1 and key.p * key.q == n and key.iqmp * key.q % key.p == 1
            and all(part == key.d % (prime - 1) and part * e % (prime - 1) == 1
                    for prime, part in ((key.p, key.dmp1), (key.q, key.dmq1))))


class Vault:
    """Seals secrets: AES-256-GCM with a fresh key per secret, that key under RSA-OAEP, bound to its row.

    A token reads `HC2.<key id>.<wrapped key>.<nonce>.<ciphertext>`. `private.pem` seals and opens; `next.pem`
    exists only during `keys rotate` and then seals, while the old key still opens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keys: dict[str, rsa.RSAPrivateKey] = {}
        self.key_id = ""    # first 16 hex digits of the SHA-256 of the public key (DER) that seals; empty without keys
        for name in ("private.pem", "next.pem"):
            self._load(folder / name)

    def _load(self, path: Path) -> None:
        """Seals with a private key from now on; one that is not there is passed over."""
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None, unsafe_skip_rsa_key_validation=True)
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SecretError(f"{path} cannot be read as a private key; put the right one back") from error
        if not isinstance(key, rsa.RSAPrivateKey):
            raise SecretError(f"{path} is not an RSA key; put the right one back")
        if not belong_together(key.private_numbers()):
            raise SecretError(f"{path} is damaged; put the right one back")
        if sys.platform != "win32" and path.stat().st_mode & 0o077:
            log.warning("%s can be read by other users; run: chmod 600 %s", path, path)
        public = key.public_key().public_bytes(serialization.Encoding.DER, SPKI)
        self.key_id = hashlib.sha256(public).hexdigest()[:16]
        self._keys[self.key_id] = key

    def holds(self, key_id: str) -> bool:
        return key_id in self._keys

    def lacks(self, token: str | None) -> bool:
        """Whether a token names a private key that is not here; a damaged one names none."""
        found = SEALED.fullmatch(token or "")
        return found is not None and found[1] not in self._keys

    @key_files_written()
    def create(self, name: str = "private.pem") -> None:
        """Makes an RSA key; an existing one is never overwritten. Raises SecretError."""
        key = rsa.generate_private_key(65537, RSA_BITS)
        make_folder(self.folder)
        create_private(self.folder / name, key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        self._load(self.folder / name)

    @key_files_written()
    def publish(self) -> None:
        """Makes public.pem follow private.pem."""
        path, key = self.folder / "public.pem", next(iter(self._keys.values()))
        public = key.public_key().public_bytes(serialization.Encoding.PEM, SPKI)
        if not path.exists():
            path.write_bytes(public)
            give(path, self.folder)
        elif path.read_bytes() != public:
            path.write_bytes(public)

    @key_files_written()
    def retire(self) -> None:
        """Ends a rotation: `next.pem` becomes `private.pem`."""
        take_place(self.folder / "next.pem", self.folder / "private.pem")
        self._keys = {self.key_id: self._keys[self.key_id]}
        self.publish()

    def seal(self, secret: str, *row: str) -> str:
        """The token for `secret`, which opens only with the same `row`: see `binding`."""
        key, nonce = os.urandom(32), os.urandom(12)
        wrapped = self._keys[self.key_id].public_key().encrypt(key, OAEP)
        bound = length_prefixed("HC2", self.key_id, *row)
        sealed = AESGCM(key).encrypt(nonce, secret.encode(), bound)
        parts = (base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (wrapped, nonce, sealed))
        return ".".join(("HC2", self.key_id, *parts))

    def open(self, token: str, *row: str) -> str:
        """The secret of a token; raises SecretError, which never quotes it."""
        if not SEALED.fullmatch(token):
            raise SecretError("a sealed secret is damaged; write the password again")
        self.require([token])
        version, key_id, *parts = token.split(".")
        bound = length_prefixed(version, key_id, *(row[:-1] if version == "HC1" else row))      # the port stands last
        try:
            wrapped, nonce, sealed = (
                base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True) for part in parts)
            key = self._keys[key_id].decrypt(wrapped, OAEP)
            return AESGCM(key).decrypt(nonce, sealed, bound).decode()
        except (ValueError, InvalidTag, binascii.Error) as error:
            raise SecretError("a sealed secret belongs to another name, hostname, port or username, or was altered; "
                              "write the password again") from error

    def require(self, tokens: Iterable[str]) -> None:
        """Raises SecretError when tokens name private keys, none of which is here; a damaged one names none."""
        named = {found[1] for token in tokens if (found := SEALED.fullmatch(token))}
        if named and not named & self._keys.keys():
            raise SecretError(f"secrets are sealed with key {', '.join(sorted(named))}, but {self.folder} holds "
                              f"{', '.join(self._keys) or 'no private key'}; put private.pem back, or if it is "
                              "lost, write every password in the inventory again and run `keys replace`")


def hash_password(password: str, salt: bytes, rounds: int = PBKDF2_ROUNDS) -> bytes:
    """PBKDF2-HMAC-SHA512 (RFC 8018), 64 bytes."""
    return hashlib.pbkdf2_hmac("sha512", password.encode(), salt, rounds)


# === Storage =================================================================
# The tables, and how those of an older version are migrated. Secrets are stored sealed only. Here as everywhere else
# stands SQL that both SQLite and PostgreSQL have, but for migrations before schema 6, the first one on PostgreSQL.
# In any thread of the main process, within the transaction of whoever calls.
# Gives: Acknowledgement, APPLICATION, Base, BIG_INTEGER, binding, db, Event, LoginSession, LOOKED_AT, Machine,
# Maintenance, migrate, Notice, own_name, Receiver, remembered, REMOVED, Resource, Result, revise, revision, SCHEMA,
# Setting, Status, User, YEAR_3000
SALT_BYTES = 16                 # bytes, NIST SP 800-132
YEAR_3000 = 32_503_680_000      # Unix time, the last one that Windows can show


# In the order of its characters, as in SQLite, whatever language a database is set to.
ORDERED_TEXT = sqlalchemy.String().with_variant(sqlalchemy.String(collation="C"), "postgresql")


class StoredText(sqlalchemy.TypeDecorator[str]):
    """Reads what is no text, which SQLite lets anybody write into the column, as one."""

    impl, cache_ok = ORDERED_TEXT, True

    def process_result_value(self, value: Any, _dialect: object) -> Any:
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


class StoredNumber(sqlalchemy.TypeDecorator[float]):
    """Reads what is no number, or no time in any calendar, as 0: no setting can be that."""

    impl, cache_ok = sqlalchemy.Double, True

    def process_result_value(self, value: Any, _dialect: object) -> Any:
        return value if isinstance(value, (int, float)) and abs(value) < YEAR_3000 else 0.0


# Of eight bytes; SQLite, whose numbers all are, counts rows only where it is called INTEGER.
BIG_INTEGER = sqlalchemy.Integer().with_variant(sqlalchemy.BigInteger(), "postgresql")


class StoredInteger(sqlalchemy.TypeDecorator[int]):
    """The same of a whole number."""

    impl, cache_ok = BIG_INTEGER, True

    def process_result_value(self, value: Any, _dialect: object) -> Any:
        return value if isinstance(value, int) or value is None else 0


class Base(DeclarativeBase):
    """Typed declarative base of all tables."""


Base.registry.update_type_annotation_map({str: StoredText, float: StoredNumber, int: StoredInteger})

db = SQLAlchemy(model_class=Base, session_options={"expire_on_commit": False})
SCHEMA = 7                      # of a database that this program writes
APPLICATION = 0x48434B31        # "HCK1": whose database it is
LOOKED_AT = 1.0                 # seconds for which a start waits for those who look whether a service runs
REMOVED = "removed"             # origin of what the inventory had: it is kept while there is history of it


class User(Base):
    """An account of HealthChecker's own pages."""

    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    username: Mapped[str] = mapped_column(unique=True)
    password: Mapped[bytes]     # its hash
    salt: Mapped[bytes]
    rounds: Mapped[int] = mapped_column(default=PBKDF2_ROUNDS)
    role: Mapped[str] = mapped_column(default="admin")      # admin: everything; viewer: looks
    initial: Mapped[bool] = mapped_column(default=False)    # the password is the documented one still

    @classmethod
    def create(cls, username: str, password: str, role: str = "admin", *, initial: bool = False) -> User:
        salt = secrets.token_bytes(SALT_BYTES)
        return cls(username=username, salt=salt, rounds=PBKDF2_ROUNDS, password=hash_password(password, salt),
                   role=role, initial=initial)

    def verify(self, password: str) -> bool:
        """Constant-time comparison; an overlong password is wrong without being hashed."""
        return len(password) <= SECRET_LENGTH and hmac.compare_digest(
            self.password, hash_password(password, self.salt, self.rounds))

    def take_password(self, other: User) -> None:
        """Takes over what stands for the password of `other`, which was chosen and is not the documented one."""
        self.salt, self.rounds, self.password, self.initial = other.salt, other.rounds, other.password, False


class Resource(Base):
    """A machine that is watched. Secrets are sealed tokens; `settings` is JSON of everything without its own column."""

    __tablename__ = "resource"
    __table_args__ = ({"sqlite_autoincrement": True},)      # or what is queued for one that was removed met another
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    hostname: Mapped[str]
    platform: Mapped[str]
    port: Mapped[int]
    username: Mapped[str | None]
    password: Mapped[str | None]
    key_passphrase: Mapped[str | None]
    interval: Mapped[float] = mapped_column(default=60.0)
    settings: Mapped[str]
    origin: Mapped[str] = mapped_column(default="inventory")        # inventory | api | REMOVED
    place: Mapped[str] = mapped_column(default="")  # where the inventory states it: file:line:column
    host_key: Mapped[str | None]    # trusted on first use or by `trust`: "ssh-ed25519 SHA256:…"

    COLUMNS: ClassVar = ("name", "hostname", "platform", "port", "username", "interval")

    @property
    def parsed_settings(self) -> ResourceSettings:
        """The settings as the inventory states them, without secrets; raises StorageError."""
        try:
            columns = {name: getattr(self, name) for name in self.COLUMNS}
            return ResourceSettings.model_validate(from_json(self.settings) | columns)
        except (ValueError, TypeError) as error:
            raise StorageError(f"the row of resource {self.name} cannot be read; restore the database") from error

    def take_settings(self, settings: ResourceSettings) -> bool:
        """Takes the settings over; says whether anything changed: a version with a setting more changes no row."""
        wanted = settings.model_copy(update={"port": settings.connect_port, **dict.fromkeys(("was", *SECRETS))})
        with contextlib.suppress(StorageError):     # what cannot be read is written anew
            if self.parsed_settings == wanted:
                return False
        values = wanted.model_dump(mode="json", exclude=set(SECRETS))
        for name in self.COLUMNS:
            setattr(self, name, values.pop(name))
        self.settings = json.dumps(values, sort_keys=True)
        return True

    @property
    def way(self) -> tuple[str | None, ...] | None:
        """What decides which machine is shown the password, besides the address; None where nothing is known of it."""
        with contextlib.suppress(StorageError):
            settings = self.parsed_settings
            return settings.proxy_jump, settings.host_key_alias, settings.host_key, settings.scheme
        return None

    @property
    def scheme(self) -> str:
        return (self.way or ("",))[-1] or ""

    def digest(self, *columns: str) -> str:
        """Changes with the columns' values: what was stored for others does not count."""
        return hashlib.sha256(length_prefixed(*(str(getattr(self, name)) for name in columns))).hexdigest()

    @property
    def settings_digest(self) -> str:
        """A digest of every setting and secret."""
        return self.digest(*self.COLUMNS, "settings", "password", "key_passphrase")

    @property
    def credential_digest(self) -> str:
        """A digest of the account and its sealed secret."""
        return self.digest("hostname", "username", "password", "key_passphrase")


WATCHED = with_loader_criteria(Resource, Resource.origin != REMOVED)


def hide_removed(state: ORMExecuteState) -> None:
    """Who asks for resources is given those that are watched; with the option `removed` all."""
    if state.is_select and not state.is_column_load and not state.execution_options.get("removed"):
        state.statement = state.statement.options(WATCHED)


event.listen(Session, "do_orm_execute", hide_removed)


def binding(kind: str, row: Resource | ResourceSettings) -> tuple[str, ...]:
    """What a secret belongs to: moved anywhere else, it does not open."""
    port = row.port if isinstance(row, Resource) else row.connect_port
    return kind, row.name, row.hostname, row.username or "", str(port), *filter(None, [row.scheme])


class Status(Base):
    """The last standing of a resource, kept for the next start."""

    __tablename__ = "status"
    resource_id: Mapped[int] = mapped_column(ForeignKey("resource.id", ondelete="CASCADE"), primary_key=True)
    settings_digest: Mapped[str]    # of that time; so is the next
    credential_digest: Mapped[str]
    state: Mapped[str]
    cause: Mapped[str]
    reason: Mapped[str]
    since_at: Mapped[float]     # Unix time of the last transition
    polled_at: Mapped[float]    # Unix time of the last result
    good: Mapped[int]           # good results in a row
    bad: Mapped[int]            # bad results in a row
    seconds: Mapped[float]      # duration of the last poll
    sample: Mapped[str]         # JSON of what the last poll read, `null` when it read nothing
    read: Mapped[str] = mapped_column(default="null")   # then that of the last one that read anything,
    read_at: Mapped[float] = mapped_column(default=0.0)     # and when
    strip: Mapped[str] = mapped_column(default="")      # the last STRIP polls, oldest first: a character of POLLS each


class Result(Base):
    """What other machines on the database have to know of a Status: for how long it counts."""

    __tablename__ = "result"
    resource_id: Mapped[int] = mapped_column(ForeignKey("resource.id", ondelete="CASCADE"), primary_key=True)
    serial: Mapped[int] = mapped_column(index=True)     # rises with every transaction that writes some
    machine: Mapped[str]        # that found it
    found_at: Mapped[float]     # Unix time of the database's clock
    counts: Mapped[float]       # seconds for which it counts from then on
    opens: Mapped[float]        # seconds from then on until it can be healthy again


class Event(Base):
    """A transition or a change of configuration: who, what, when, from where."""

    __tablename__ = "event"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float] = mapped_column(index=True)       # Unix time
    kind: Mapped[str]           # service | gate | state | change | login | attempt | clock
    resource: Mapped[str] = mapped_column(default="")   # its name, empty for none; outlives the resource
    group: Mapped[str] = mapped_column(default="")      # the name of a group or route, empty for none
    state: Mapped[str] = mapped_column(default="")      # from now on: open | closed, or that of the resource
    text: Mapped[str]           # one line
    actor: Mapped[str]          # name of the user, empty for the service itself
    address: Mapped[str]        # the client's, empty for the service itself


class Maintenance(Base):
    """Planned work: what does not count for a while. One that was planned here goes a day after it is over; of each
    plan of the inventory that has begun there is one, which stays."""

    __tablename__ = "maintenance"
    __table_args__ = ({"sqlite_autoincrement": True},)      # or who ends what is over already ended another one
    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str]          # planned | begun | over
    start_at: Mapped[float]     # Unix time, as is the next
    until_at: Mapped[float]
    scope: Mapped[str]          # JSON of a Scope
    reason: Mapped[str]
    actor: Mapped[str] = mapped_column(default="")      # name of the user, empty for a plan
    plan: Mapped[str] = mapped_column(default="")       # JSON of the inventory's, empty for none
    # When the last turn of its plan was to begin; of what has no plan when it was over. No clock moves that.
    turn_at: Mapped[float] = mapped_column(default=0.0)

    @property
    def chosen(self) -> Scope:
        """What it is of; nothing where that cannot be read."""
        try:
            return Scope.model_validate_json(self.scope)
        except ValidationError:
            return Scope.model_construct()


class Acknowledgement(Base):
    """Somebody has seen that a resource is unhealthy; ends with that."""

    __tablename__ = "acknowledgement"
    resource_id: Mapped[int] = mapped_column(ForeignKey("resource.id", ondelete="CASCADE"), primary_key=True)
    at: Mapped[float]           # Unix time
    actor: Mapped[str]          # name of the user
    comment: Mapped[str]


class LoginSession(Base):
    """A login to the console that is not over, or an API token with a name, which stays until it is revoked."""

    __tablename__ = "login_session"
    token_hash: Mapped[str] = mapped_column(primary_key=True)   # hex SHA-256 of the token
    kind: Mapped[str]           # session | token | named
    user_id: Mapped[int] = mapped_column(ForeignKey("user.id", ondelete="CASCADE"))
    begun_at: Mapped[float]     # Unix time, as is the next
    seen_at: Mapped[float]      # 0: a named one that was not used yet
    address: Mapped[str]        # the client's: at the login; of a named one when it was seen
    name: Mapped[str] = mapped_column(default="")           # of a named one, as are the next
    role: Mapped[str] = mapped_column(default="admin")      # the most that it may, whatever its user may
    expires_at: Mapped[float] = mapped_column(default=0.0)


class Setting(Base):
    """What the service remembers about itself: `revision` rises with every change of configuration; in JSON are
    `defaults`, `gates`, `plans` and `service` of the inventory as imported last, the service's as it was started with,
    `override`, what an operator says of the gate, and `standing`, what the service said last of everything."""

    __tablename__ = "setting"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(default=0)
    text: Mapped[str] = mapped_column(default="")


class Receiver(Base):
    """Who is told, of the inventory's `notify`, and what it is being sent; OWN_SECRETS of each machine are here, too,
    by their own_name, which is no receiver's."""

    __tablename__ = "receiver"
    __table_args__ = ({"sqlite_autoincrement": True},)      # or a new one is taken for one whose message is on its way
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    url: Mapped[str] = mapped_column(default="")        # sealed
    settings: Mapped[str] = mapped_column(default="{}")     # JSON of ReceiverSettings without `url`; see is_told
    joined_at: Mapped[float] = mapped_column(default=0.0)   # Unix time
    cursor: Mapped[int] = mapped_column(default=0)      # id of the last event that was considered
    message: Mapped[str] = mapped_column(default="")    # JSON of title and text on their way; empty: none
    made_at: Mapped[float] = mapped_column(default=0.0)     # Unix time of that message, or the one before
    tries: Mapped[int] = mapped_column(default=0)       # of that message
    next_at: Mapped[float] = mapped_column(default=0.0)     # Unix time before which nothing is sent
    trouble: Mapped[str] = mapped_column(default="")    # why the last try failed; empty: it did not
    delivered: Mapped[int] = mapped_column(default=0)   # messages, as is the next
    failed: Mapped[int] = mapped_column(default=0)      # given up

    @hybrid_property
    def is_told(self) -> bool:
        """Whether it is a receiver; one of OWN_SECRETS is none, and has no settings."""
        return self.settings != "{}"

    @property
    def bound(self) -> tuple[str, ...]:
        """What its URL belongs to."""
        return url_binding(self.name)


class Notice(Base):
    """What a receiver is to be told, or was and has not heard the end of."""

    __tablename__ = "notice"
    receiver_id: Mapped[int] = mapped_column(ForeignKey("receiver.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)     # gate | group | state | problem | maintenance
    name: Mapped[str] = mapped_column(primary_key=True)     # of the resource, group or problem; empty for the gate
    text: Mapped[str]           # one line
    ending: Mapped[str]         # how it ended; empty while it lasts
    times: Mapped[int]          # how often it began since it was told
    since_at: Mapped[float]     # Unix times: when it began,
    taken_at: Mapped[float]     # from when on `wait` and `after` count,
    over_at: Mapped[float]      # when it ended, 0 while it lasts,
    told_at: Mapped[float]      # when it was told the last time, 0 before


class Machine(Base):
    """A HealthChecker that runs on a database which several machines reach."""

    __tablename__ = "machine"
    instance: Mapped[str] = mapped_column(primary_key=True)     # of the process
    name: Mapped[str]
    version: Mapped[str]
    started_at: Mapped[float]   # Unix time of the database's clock, as is the next
    seen_at: Mapped[float]
    able: Mapped[bool]          # to poll: it is not cut off from all of what is polled


# What brings a database of schema 1, 2, … to the next; the tables that are missing are made afterwards.
MIGRATIONS = (("ALTER TABLE user ADD COLUMN role VARCHAR NOT NULL DEFAULT 'admin'",
               "ALTER TABLE user ADD COLUMN initial BOOLEAN NOT NULL DEFAULT 0",
               "UPDATE user SET initial = 1",      # there was no way to change a password
               "ALTER TABLE resource ADD COLUMN maintenance FLOAT NOT NULL DEFAULT 0",
               "ALTER TABLE resource ADD COLUMN maintenance_reason VARCHAR NOT NULL DEFAULT ''",
               "ALTER TABLE status ADD COLUMN seconds FLOAT NOT NULL DEFAULT 0",
               "ALTER TABLE status ADD COLUMN sample VARCHAR NOT NULL DEFAULT 'null'",
               "ALTER TABLE status ADD COLUMN packed BLOB NOT NULL DEFAULT x''",
               "ALTER TABLE status ADD COLUMN strip VARCHAR NOT NULL DEFAULT ''",
               "CREATE TABLE event (id INTEGER PRIMARY KEY, at DOUBLE NOT NULL, kind VARCHAR NOT NULL, "
               "resource VARCHAR NOT NULL, text VARCHAR NOT NULL, actor VARCHAR NOT NULL, address VARCHAR NOT NULL)",
               "CREATE INDEX ix_event_at ON event (at)",
               "CREATE TABLE sample (resource_id, at, packed, reason)",
               "CREATE TABLE average (resource_id, at, packed)"),
              ("ALTER TABLE user RENAME COLUMN name TO username",
               "ALTER TABLE user RENAME COLUMN password_hash TO password",
               "ALTER TABLE status RENAME COLUMN configured TO settings_digest",
               "ALTER TABLE status RENAME COLUMN credential TO credential_digest",
               "ALTER TABLE status RENAME COLUMN since TO since_at",
               "ALTER TABLE status RENAME COLUMN polled TO polled_at",
               "ALTER TABLE status DROP COLUMN packed",
               "ALTER TABLE sample RENAME TO packed_sample",
               "ALTER TABLE average RENAME TO packed_average"),
              ("ALTER TABLE setting ADD COLUMN text VARCHAR NOT NULL DEFAULT ''",
               "ALTER TABLE resource ADD COLUMN place VARCHAR NOT NULL DEFAULT ''"),
              ("DROP TABLE IF EXISTS login_session",      # who was logged in logs in once more
               'ALTER TABLE event ADD COLUMN "group" VARCHAR NOT NULL DEFAULT \'\'',
               "ALTER TABLE event ADD COLUMN state VARCHAR NOT NULL DEFAULT ''",
               "UPDATE event SET state = 'closed' WHERE kind = 'gate'",
               "UPDATE event SET state = 'open' WHERE kind = 'gate' AND text LIKE 'closed -> open%'"),
              ("ALTER TABLE status ADD COLUMN read VARCHAR NOT NULL DEFAULT 'null'",
               "ALTER TABLE status ADD COLUMN read_at DOUBLE NOT NULL DEFAULT 0",
               "CREATE TABLE maintenance (id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, state VARCHAR NOT NULL, "
               "start_at DOUBLE NOT NULL, until_at DOUBLE NOT NULL, scope VARCHAR NOT NULL, reason VARCHAR NOT NULL, "
               "actor VARCHAR NOT NULL, plan VARCHAR NOT NULL, turn_at DOUBLE NOT NULL)",
               "INSERT INTO maintenance (state, start_at, until_at, scope, reason, actor, plan, turn_at) "
               "SELECT 'begun', min(maintenance, strftime('%s', 'now') + 0.0), maintenance, '{\"resources\": [\"' || "
               "replace(name, '\"', '\\\"') || '\"]}', maintenance_reason, '', '', 0 FROM resource "
               "WHERE maintenance > 0 AND maintenance < 1e11",
               "ALTER TABLE resource DROP COLUMN maintenance",
               "ALTER TABLE resource DROP COLUMN maintenance_reason"),
              ())
# Schema 2 packed the numbers of a row, 65535 for a reading that is missing: what is selected, with them last.
PACKED = {"sample": ("resource_id, at, reason, CAST(substr(packed, 1, 1) AS TEXT), CAST(substr(packed, 2, 1) AS TEXT), "
                     "substr(packed, 3)", struct.Struct("<I6H")),
          "average": ("resource_id, at, packed", struct.Struct("<20H"))}


def unpack_history(connection: sqlite3.Connection) -> None:
    """Fills the tables of schema 3 from those of schema 2, row by row, for they may be millions."""
    for table, (columns, layout) in PACKED.items():
        places = ["NULLIF(?, 65535)" if column.nullable else "?" for column in Base.metadata.tables[table].columns]
        rows = connection.execute(f"SELECT {columns} FROM packed_{table} ORDER BY resource_id, at")     # noqa: S608
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join(places)})", (                   # noqa: S608
            (*kept, *layout.unpack(packed)) for *kept, packed in rows if len(packed) == layout.size))
        connection.execute(f"DROP TABLE packed_{table}")


def number_anew(connection: sqlalchemy.Connection) -> None:
    """Makes the table of resources once more, as it is today: AUTOINCREMENT cannot be added to one."""
    old = Base.metadata.tables["resource"]
    new, columns = old.to_metadata(sqlalchemy.MetaData(), name="new_resource"), ", ".join(old.columns.keys())
    new.create(connection)
    for statement in (f"INSERT INTO new_resource ({columns}) SELECT {columns} FROM resource",   # noqa: S608
                      "DROP TABLE resource", "ALTER TABLE new_resource RENAME TO resource"):
        connection.execute(sqlalchemy.text(statement))


def migrate(session: Session, version: int) -> None:
    """Brings the tables from schema `version`, 0 for none, to SCHEMA, within the caller's transaction, which checks no
    foreign keys."""
    begin, version = time.monotonic(), version or SCHEMA
    for statements in MIGRATIONS[version - 1:]:
        for statement in statements:
            session.execute(sqlalchemy.text(statement))
    connection = session.connection()
    Base.metadata.create_all(connection)
    if version < 3:
        unpack_history(cast(sqlite3.Connection, connection.connection.driver_connection))
    if version < 4:
        number_anew(connection)
    if version < SCHEMA:
        log.info("database: migrated from schema %d to %d in %.1f s", version, SCHEMA, time.monotonic() - begin)


def remembered(session: Session, name: str) -> Setting:
    return session.get(Setting, name) or Setting(name=name, value=0, text="")


def own_name(name: str, machine: str) -> str:
    """Of a Setting, or a secret of the service, that each machine has for itself."""
    return f"{name}/{machine}" if machine else name


def revision(session: Session) -> int:
    return remembered(session, "revision").value


def revise(session: Session) -> None:
    """Raises the revision, so that a serving process takes the change up within a second."""
    session.merge(Setting(name="revision", value=revision(session) + 1))


# === Databases ===============================================================
# What holds the tables: a file of SQLite, or a database of PostgreSQL that several machines reach. What the two do
# differently is in their classes, and nowhere else. The main process alone opens it, in any thread: reads see one
# state, writes wait for each other.
# Gives: Claim, CLAIM_INTERVAL, Database, CLAIM_LIFE, DATABASE_CLOCK, IMPATIENCE, IS_LIVING, PATIENCE,
# PostgresServer, SqliteFile, Store
MIN_ROOM = 1 << 17              # bytes of a disk that is as good as full: what SQLite needs to open a database
BUSY_TIMEOUT = 5.0              # seconds a writer waits for another one, and whoever connects for a server
# PostgreSQL gives a statement up, and we a connection without a byte of it, after so many seconds: two of these and one
# try to connect take less time than an open gate outlasts a monitor that waits.
STATEMENT_TIMEOUT, ANSWER_TIMEOUT = 10.0, 12.0
# The latter in this thread: who has others to look after waits for less, and asks again.
PATIENCE, IMPATIENCE = contextvars.ContextVar("PATIENCE", default=ANSWER_TIMEOUT), 3.0
ABANDONED = 60.0                # seconds after which it ends a transaction in which nothing is asked, CLAIM_LIFE where
                                # others wait for it
WRITE_LOCK = APPLICATION        # number of its lock that whoever writes holds
CLAIM_INTERVAL = 2.0            # seconds between two signs of life of a service
CLAIM_LIFE = 6.0                # seconds after which one of them does not count
OLDEST_POSTGRES = 14
REQUIRED = ("; have the server ask for the password by scram-sha-256, or write sslmode=verify-full or what it may ask "
            "by, such as require_auth=md5, into service.database (with libpq 16 or newer)")
NO_PSYCOPG = ("service.database needs psycopg 3: run `pip install \"psycopg[binary]>=3.3\"` in the environment of the "
              "service")


def fault_of_schema(found: Collection[tuple[str, str]], version: int, *, ours: bool, sound: bool = True) -> str:
    """What is wrong with a database of these tables' columns; empty for nothing."""
    if not ours:
        return "belongs to another program; set service.database"
    if version > SCHEMA:
        return "was written by a newer HealthChecker; update this one"
    wanted = {(table.name, column.name) for table in Base.metadata.sorted_tables for column in table.columns}
    if not sound or (version == SCHEMA and not wanted <= {*found}):
        return "is damaged; restore it from a backup or move it away"
    return ""


def read_schema(path: Path, *, whole: bool, mode: str = "ro") -> tuple[set[tuple[str, str]], int, int, bool]:
    """Its tables' columns, whose it is (application_id), its version, and whether it is sound; `whole`: all of it."""
    with open(path, "rb") as file:
        if file.read(16) not in (b"", b"SQLite format 3\0"):    # SQLite takes a short text for an empty database
            raise sqlite3.DatabaseError("it is no SQLite database")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as connection:
            columns = set(connection.execute("SELECT tables.name, columns.name FROM sqlite_master AS tables, "
                                             "pragma_table_info(tables.name) AS columns WHERE tables.type = 'table'"))
            [ours] = connection.execute("SELECT * FROM pragma_application_id, pragma_user_version")
            return columns, *ours, not whole or connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.OperationalError:
        if mode == "rw":
            raise
        return read_schema(path, mode="rw", whole=whole)    # which rolls back what a crash cut short


def reason_of(error: Exception, path: Path) -> str:
    """Why a file cannot be used, and what to do."""
    no_room = isinstance(error, sqlite3.OperationalError) and shutil.disk_usage(path.parent).free < MIN_ROOM
    if no_room or getattr(error, "errno", 0) == errno.ENOSPC:
        return "the disk is full; make room on it"
    remedy = ("restore it from a backup or " if path.exists() else "") + "set service.database"
    return f"{getattr(error, 'strerror', None) or error}; {remedy}"


class SqliteFile:
    """A database in a file, of which there is one service. Its methods are those of PostgresServer."""

    insert = staticmethod(sqlite.insert)
    wall = staticmethod(time.time)
    end_of = staticmethod(lambda text, count: func.substr(text, -count))
    may_pass = staticmethod(lambda _: False)    # a file is there, or it is not

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def inspect(self, *, whole: bool = True) -> int:
        """The schema of the database, 0 while there is none. Raises StorageError for what is not ours and sound; not
        `whole`: that was looked at already, which takes a second for 200 MB. Nothing changes, but that what a crash cut
        short is rolled back."""
        path = self.path
        try:
            found, application, version, sound = read_schema(path, whole=whole)
        except FileNotFoundError:
            if path.parent.is_file():       # to Windows it is the same
                raise StorageError(f"database {path}: its folder is a file; set service.database") from None
            return 0
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"database {path}: {reason_of(error, path)}") from error
        if not found:
            return 0
        if fault := fault_of_schema(found, version, ours=application == APPLICATION, sound=sound):
            raise StorageError(f"database {path} {fault}")
        return int(version)

    def lock(self, lost: Callable[[], None] | None = None, machine: str = "") -> contextlib.AbstractContextManager[
            object]:
        """Makes this process the only service on the database until it ends, however it ends, or the block does;
        `lost`: nobody takes it away, `machine`: there is no other. Raises StorageError.

        SQLite's own lock on a file beside the database: the same on Windows and UNIX, and the system drops it. Who only
        looks whether a service runs, such as a monitoring system every few seconds, must not keep one from its start.
        """
        del lost, machine
        connection, path = None, self.path
        try:
            lock = Path(f"{path}.lock")
            ensure_private(lock)
            with contextlib.suppress(PermissionError):
                lock.chmod(0o600)       # an earlier version's; whoever could read it could hold a lock, too
            connection = sqlite3.connect(lock, timeout=LOOKED_AT, check_same_thread=False, isolation_level=None)
            connection.execute("BEGIN EXCLUSIVE")
        except (OSError, sqlite3.Error) as error:
            if connection is None or "locked" not in str(error):
                raise StorageError(f"database {path} cannot be used: {reason_of(error, path)}") from error
            connection.close()
            raise StorageError(f"another HealthChecker is using database {path}; stop that one first") from error
        return contextlib.closing(connection)

    def is_running(self, machine: str = "") -> bool:
        """Whether a service is on the database, as far as can be told without a change; `machine`: there is no other.
        Any number may ask."""
        del machine
        lock = Path(f"{self.path}.lock").absolute()
        if not lock.exists():
            return False
        try:
            with contextlib.closing(sqlite3.connect(f"{lock.as_uri()}?mode=ro", 0, uri=True)) as connection:
                connection.execute("SELECT * FROM sqlite_master").fetchall()
        except sqlite3.Error as error:
            return "locked" in str(error)
        return False

    def copy(self, place: Path) -> None:
        """Copies it as of one moment, also under a service."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT)) as source, \
                contextlib.closing(sqlite3.connect(place)) as target:
            source.backup(target)

    def engine_options(self) -> dict[str, Any]:
        """What SQLAlchemy is to open it with."""
        return {"url": sqlalchemy.URL.create("sqlite", database=str(self.path.absolute())),
                "connect_args": {"timeout": BUSY_TIMEOUT}}

    def ensure(self, *, new: bool = False) -> None:
        """Makes the files that SQLite would make with their folder's rights."""
        if new:
            ensure_private(self.path)
        for end in COMPANIONS[:2] if sys.platform == "win32" else ():
            ensure_private(Path(f"{self.path}{end}"))

    def attach(self, engine: sqlalchemy.Engine) -> None:
        """Has connections and transactions begin as they have to."""
        event.listen(engine, "connect", self._prepare)
        event.listen(engine, "begin", self._begin)

    def _prepare(self, connection: Any, _record: object) -> None:
        connection.isolation_level = None       # SQLAlchemy's BEGIN is ours, see _begin
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "cache_size = -256"):  # KiB
            connection.execute(f"PRAGMA {pragma}")
        for name, count, function in (("floor", 1, math.floor), ("least", 2, min), ("greatest", 2, max)):
            connection.create_function(name, count, function, deterministic=True)   # as others call them

    def _begin(self, connection: sqlalchemy.Connection) -> None:
        options = connection.get_execution_options()
        if options.get("migrates"):     # it cannot be said later; a table made anew would take its children along
            connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("immediate") else "BEGIN")

    def version(self, session: Session) -> int:
        """Its schema, within the transaction that migrates it."""
        return session.scalar(sqlalchemy.text("PRAGMA user_version")) or 0

    def mark(self, session: Session) -> None:
        """Notes down that it is ours, and of SCHEMA."""
        session.execute(sqlalchemy.text(f"PRAGMA user_version = {SCHEMA}"))
        session.execute(sqlalchemy.text(f"PRAGMA application_id = {APPLICATION}"))

    def last_number(self, session: Session, column: sqlalchemy.Column[Any]) -> int:
        """The last number that was given to a row, which may be gone; 0 where that is not known."""
        return session.scalar(sqlalchemy.text("SELECT seq FROM sqlite_sequence WHERE name = :name"),
                              {"name": column.table.name}) or 0

    def number_after(self, session: Session, column: sqlalchemy.Column[Any], last: int) -> None:
        """Has the next row be given a later one."""
        values = {"name": column.table.name, "last": last}
        session.execute(sqlalchemy.text("DELETE FROM sqlite_sequence WHERE name = :name"), values)
        session.execute(sqlalchemy.text("INSERT INTO sqlite_sequence VALUES (:name, :last)"), values)

    def checkpoint(self, connection: sqlalchemy.Connection) -> None:
        """Brings to the disk what was committed, the last of which a loss of power might take. Raises StorageError."""
        connection.exec_driver_sql("COMMIT")
        if connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar():
            raise StorageError(f"database {self.path} is being read by another program; try again")


def until_silent(waiting: Generator[Any, Any, Any], seconds: float) -> Generator[Any, Any, Any]:
    """What psycopg waits for, which is told every 0.1 s that nothing came: raises TimeoutError after so many seconds
    without a byte. So a connection ends by itself on every system, whatever its peer does."""
    try:
        wanted, heard_mono = next(waiting), time.monotonic()
        while True:
            ready = yield wanted
            if ready:
                heard_mono = time.monotonic()
            elif time.monotonic() - heard_mono > seconds:
                raise TimeoutError
            wanted = waiting.send(ready)
    except StopIteration as end:
        return end.value


BOUNDS = f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT:.0f}s'; SET LOCAL idle_in_transaction_session_timeout = "
# A reader sees one state; a writer sees what the one before has written.
READING = f"BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; {BOUNDS}'{ABANDONED:.0f}s'"
WRITING = (f"BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE; {BOUNDS}'{CLAIM_LIFE:.0f}s'; "
           f"SET LOCAL lock_timeout = '{BUSY_TIMEOUT:.0f}s'; SELECT pg_advisory_xact_lock({WRITE_LOCK})")
WRITING_LONG = f"{WRITING}; {BOUNDS}'{ABANDONED:.0f}s'"
POSTGRES_COLUMNS = """SELECT relname, attname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = current_schema() AND relkind IN ('r', 'p') AND attnum > 0 AND NOT attisdropped"""
# No connection has an SQLSTATE when it fails, and these words are the only sign of what stays as it is.
LASTING = re.compile("password|authentication|pg_hba|certificate|does not exist|no such (?:database|user)|not support")
DATABASE_CLOCK = "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
# Nor does what was seen in a future, which a clock once showed.
IS_LIVING = f"abs(seen_at - {DATABASE_CLOCK}) < {CLAIM_LIFE}"
LIVING = f"SELECT name, instance, seen_at, able FROM machine WHERE {IS_LIVING}"     # noqa: S608  # nobody's words
FORGET_DEAD = f"DELETE FROM machine WHERE NOT {IS_LIVING}"                          # noqa: S608
BEGIN_LIFE = ("INSERT INTO machine (instance, name, version, able, started_at, seen_at) "   # noqa: S608
              f"VALUES (%s, %s, %s, %s, {DATABASE_CLOCK}, {DATABASE_CLOCK})")
END_LIFE = "DELETE FROM machine WHERE instance = %s"
STAMP = "SELECT name, value, text FROM setting WHERE name IN ('schema', 'key') ORDER BY name"
GO_ON = f"UPDATE machine SET seen_at = {DATABASE_CLOCK}, able = %s WHERE instance = %s AND {IS_LIVING}"     # noqa: S608


@functools.cache
def load_psycopg() -> tuple[Callable[..., Any], type[Exception], type[Exception]]:
    """psycopg's connect, of connections that no silence holds up and that write what PostgreSQL can keep; the class of
    its errors, and that of those which are not the statement's fault. Raises UsageError."""
    try:
        import psycopg.types.string  # noqa: PLC0415  # a package that only who has PostgreSQL needs
    except ImportError:     # also of its library
        raise UsageError(NO_PSYCOPG) from None

    class Connection(psycopg.Connection[Any]):
        def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
            try:
                return super().wait(until_silent(gen, PATIENCE.get()), *arguments, **options)
            except TimeoutError:
                self.close()
                raise psycopg.OperationalError(f"the database has not answered for {PATIENCE.get():.0f} s") from None

    class Dumper(psycopg.types.string.StrDumperUnknown):
        def dump(self, obj: str) -> Any:
            return super().dump(obj.replace("\0", "\ufffd"))     # or one word of a host would block all writing

    def connect(**options: Any) -> Any:
        connection = Connection.connect(autocommit=True, prepare_threshold=None, **options)
        connection.adapters.register_dumper(str, Dumper)
        return connection

    return connect, psycopg.Error, psycopg.OperationalError


class Company(NamedTuple):
    """Who lives on a database, as was heard last."""

    epoch: str              # of this machine's life, which ends where nothing was heard of it for CLAIM_LIFE
    names: frozenset[str]   # of the machines that can poll
    everybody: frozenset[str]
    heard_mono: float       # when that was asked


class Claim(threading.Thread):
    """A place on a database of PostgreSQL: a row of Machine, which the thread brings up to date every CLAIM_INTERVAL
    seconds, and which counts for CLAIM_LIFE seconds of the database's clock. There is one of each `machine`; without a
    name it is the only one."""

    def __init__(self, connect: Callable[[], Any], lost: Callable[[], None], machine: str = "",
                 take_clock: Callable[[Any], None] = lambda _: None) -> None:
        """`take_clock` is given a connection, to read the database's clock."""
        super().__init__(name="claim", daemon=True)
        self._connect, self._lost, self.machine, self._connection = connect, lost, machine, connect()
        self._take_clock = take_clock
        self._instance, self._ending = "", threading.Event()
        self._trouble = Trouble("the database does not hear that this service lives")
        self.company = Company("", frozenset(), frozenset(), -math.inf)
        self.is_able: Callable[[], bool] = lambda: False    # to poll; set by who does
        self._stamp: object = None      # the schema and the key that hold, as was heard last

    def take(self) -> str:
        """Takes the place of a service that is dead, which is waited for; else the name of who lives there."""
        living, wait = self._try(), 0.0
        first = dict(living)
        while living and wait < CLAIM_LIFE + CLAIM_INTERVAL and first.items() >= living.items():
            time.sleep(MONITOR_INTERVAL)
            wait += MONITOR_INTERVAL
            living = self._try()
        return next((name or "a command" for name, _ in living), "")

    def require_alone_for(self, version: int) -> None:
        """Raises StorageError where others live on a schema that this program would bring to the next one."""
        if 0 < version < SCHEMA and (others := self.company.everybody - {self.machine}):
            raise StorageError(f"an earlier version uses this database on {', '.join(sorted(others))}, and this one "
                               "changes it: stop that first, start this one, then update it")

    def _try(self) -> dict[tuple[str, str], float]:
        """Has a new row where nobody lives in this place; else when they were seen, by name and instance."""
        asked_mono, connection, create = lease_clock(), self._connection, CreateTable(Base.metadata.tables["machine"])
        try:
            connection.execute(WRITING)
            if connection.execute("SELECT to_regclass('machine')").fetchone() == (None,):
                connection.execute(str(create.compile(dialect=sqlalchemy.make_url(POSTGRES).get_dialect()())))
            living = {(name, instance): seen for name, instance, seen, _ in connection.execute(LIVING)
                      if instance != self._instance and (not self.machine or name in ("", self.machine))}
            if not living:
                connection.execute(FORGET_DEAD)
                connection.execute(END_LIFE, [self._instance])  # whose COMMIT came after we had given it up
                self._instance = uuid.uuid4().hex
                connection.execute(BEGIN_LIFE, [self._instance, self.machine, VERSION, self.is_able()])
                self._hear(asked_mono)
            connection.commit()
        except BaseException:       # also an interrupt: the transaction must not outlast it
            connection.close()
            raise
        return living

    def _hear(self, asked_mono: float) -> None:
        rows = self._connection.execute(LIVING).fetchall()
        everybody = frozenset(name for name, *_ in rows)
        names = frozenset(name for name, _, _, able in rows if able) or everybody
        if self.machine and names != self.company.names:
            log.info("machines that poll: %s", ", ".join(sorted(names)))
        self.company = Company(self._instance, names, everybody, asked_mono)

    def run(self) -> None:
        PATIENCE.set(IMPATIENCE)
        while not self._ending.wait(CLAIM_INTERVAL):
            with self._trouble.caught():
                if not self._go_on():
                    return self._lost()

    def _go_on(self) -> bool:
        """Says that it lives; False where another one has its place, or what holds is another schema or key."""
        if self._connection.closed:
            self._connection = self._connect()
        try:
            asked_mono, before = lease_clock(), self._stamp
            lives = self._connection.execute(GO_ON, [self.is_able(), self._instance]).rowcount
            if self._connection.execute("SELECT to_regclass('setting')").fetchone() != (None,):
                self._stamp = self._connection.execute(STAMP).fetchall()
            if lives:
                self._hear(asked_mono)
                self._take_clock(self._connection)
            return bool(lives) or (before in (None, self._stamp) and not self._try())
        except BaseException:       # it may be one to a server that others have left
            self._connection.close()
            raise

    def close(self) -> None:
        """Lets another service begin at once."""
        self._ending.set()
        if self.is_alive():
            self.join(CLAIM_INTERVAL)
        if not self.is_alive():     # or it waits for a database that is silent, which finds out after CLAIM_LIFE
            with contextlib.suppress(Exception):
                self._connection.execute(END_LIFE, [self._instance])
            self._connection.close()


def plain_reason(error: BaseException) -> str:
    """What psycopg says, without the row and the statement that a server quotes: these stay out of every log."""
    reason = one_line(getattr(getattr(error, "diag", None), "message_primary", None) or str(error))
    return reason + (REQUIRED if re.search("require_auth|authentication method requirement", reason) else "")


class PostgresServer:
    """A database of PostgreSQL, perhaps behind a pooler that has a connection for a transaction: so nothing is kept in
    a session, and every lock is a transaction's. Its methods are those of SqliteFile."""

    end_of = staticmethod(func.right)

    @staticmethod
    def insert(table: Any) -> Any:
        """SQLAlchemy's, which knows of conflicts."""
        from sqlalchemy.dialects.postgresql import insert  # noqa: PLC0415  # 2 MB of each process, also of workers

        return insert(table)

    def __init__(self, url: str, password: SecretStr | None = None) -> None:
        """Raises UsageError where psycopg is missing."""
        self._psycopg_connect, self._error, self._operational_error = load_psycopg()
        self._url, self._password = sqlalchemy.make_url(url), password
        self._zero_at = time.time() - lease_clock()     # the Unix time of lease_clock's 0 by the database's clock
        self._late: collections.deque[concurrent.futures.Future[Any]] = collections.deque()     # see connect

    def wall(self) -> float:
        """Unix time by the database's clock, which several machines have in common; this one's may be set meanwhile."""
        return lease_clock() + self._zero_at

    def take_clock(self, connection: Any) -> None:
        """Compares the clocks; a slow answer says little."""
        asked_mono = lease_clock()
        [(told,)] = connection.execute(f"SELECT {DATABASE_CLOCK}").fetchall()
        if (took := lease_clock() - asked_mono) < MONITOR_INTERVAL:
            self._zero_at = float(told) - asked_mono - took / 2

    def __str__(self) -> str:
        return self._url.set(query={}).render_as_string()

    def connect(self) -> Any:
        """A connection of psycopg; what it is told holds for any pooler. A thread of its own makes it, for no deadline
        ends the look-up of a name, and hosts are tried one after the other: what comes when nobody waits for it any
        more is the next one's. Raises psycopg.Error."""
        options: dict[str, Any] = {
            "target_session_attrs": "primary",      # or a standby that answered once would be asked to write for ever
            **self._url.get_dialect()().create_connect_args(self._url)[1],
            "fallback_application_name": "healthchecker", "connect_timeout": int(min(BUSY_TIMEOUT, PATIENCE.get())),
            "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
            "tcp_user_timeout": int(ANSWER_TIMEOUT * 1000)}
        if self._password:
            options["password"] = self._password.get_secret_value()
        if not str(options.get("sslmode")).startswith("verify-"):   # or anyone at its port could ask for the plain one
            options.setdefault("require_auth", "scram-sha-256" if self._password else "!password,!md5")
        seconds = PATIENCE.get() if PATIENCE.get() < ANSWER_TIMEOUT else ABANDONED     # who looks after nobody has time
        ends_mono = time.monotonic() + seconds
        while True:
            try:
                making, is_late = self._late.popleft(), True
            except IndexError:
                making, is_late = concurrent.futures.Future(), False
                threading.Thread(None, self._make, "connect", (making, options), daemon=True).start()
            try:
                return making.result(max(0.0, ends_mono - time.monotonic()))
            except concurrent.futures.TimeoutError:
                self._late.append(making)
                raise self._operational_error(f"no connection within {seconds:.0f} s: timeout") from None
            except self._error:
                if not is_late:     # or it is no news, perhaps
                    raise

    def _make(self, making: concurrent.futures.Future[Any], options: Mapping[str, Any]) -> None:
        try:
            making.set_result(self._psycopg_connect(**options))
        except Exception as error:  # noqa: BLE001  # who waits is told
            making.set_exception(error)
        time.sleep(CLAIM_LIFE)
        with contextlib.suppress(Exception):    # it is somebody's, or it is none
            self._late.remove(making)
            making.result().close()

    def may_pass(self, error: BaseException | None) -> bool:
        """Whether it is a failure that ends by itself, as far as words tell: the server is away, starts, or is busy."""
        while error:
            if isinstance(error, self._operational_error):
                return not LASTING.search(str(error))
            error = getattr(error, "orig", None) or error.__cause__
        return False

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """Around a connection of its own. Raises StorageError."""
        try:
            with contextlib.closing(self.connect()) as connection:
                yield connection
        except self._error as error:
            raise StorageError(f"database {self} cannot be used: {plain_reason(error)}") from error

    def inspect(self, *, whole: bool = True) -> int:
        """The schema of the database, 0 while it is empty. Raises StorageError for what is not ours."""
        del whole
        with self._connected() as connection:
            self.take_clock(connection)
            encoding = connection.info.parameter_status("server_encoding")
            if encoding != "UTF8":
                raise StorageError(f"database {self} is of encoding {encoding}; make one of UTF8")
            if connection.info.server_version < OLDEST_POSTGRES * 10_000:
                raise StorageError(f"database {self} is older than PostgreSQL {OLDEST_POSTGRES}")
            found = set(connection.execute(POSTGRES_COLUMNS))
            if {table for table, _ in found} <= {Machine.__tablename__}:    # it is made before the others
                return 0
            rows: list[tuple[int, str]] = []
            if {("setting", name) for name in ("name", "value", "text")} <= found:
                rows = connection.execute("SELECT value, text FROM setting WHERE name = 'schema'").fetchall()
        version, owner = rows[0] if rows else (0, "")
        if fault := fault_of_schema(found, version, ours=owner == f"{APPLICATION:x}"):
            raise StorageError(f"database {self} {fault}")
        return version

    def lock(self, lost: Callable[[], None] = lambda: None, machine: str = "") -> contextlib.AbstractContextManager[
            Claim]:
        """Makes this process the only one on the database until the block ends, or with a name the only one of that
        `machine`; `lost` is called, in another thread, where it was not heard of for so long that another one has
        begun there. Raises StorageError."""
        try:
            claim = Claim(self.connect, lost, machine, self.take_clock)
            other = claim.take()
        except self._error as error:
            raise StorageError(f"database {self} cannot be used: {plain_reason(error)}") from error
        if other:
            claim.close()
            raise StorageError(f"another HealthChecker ({other}) is using database {self}; stop that one first")
        claim.start()
        return contextlib.closing(claim)

    def is_running(self, machine: str = "") -> bool:
        """Whether a service is on the database, that of a `machine` or any, as far as can be told without a change."""
        try:
            with self._connected() as connection:
                return any(machine in ("", name) for name, *_ in connection.execute(LIVING).fetchall())
        except StorageError:    # or there is no such table yet
            return False

    def copy(self, place: Path) -> None:
        """Raises StorageError."""
        raise StorageError(f"database {self} is of schema {self.inspect()}; a start would bring it to {SCHEMA}")

    def engine_options(self) -> dict[str, Any]:
        """What SQLAlchemy is to open it with; a connection that was lost meanwhile is replaced."""
        return {"url": sqlalchemy.URL.create("postgresql+psycopg"), "creator": self.connect, "pool_pre_ping": True}

    def ensure(self, *, new: bool = False) -> None:
        """There is nothing to make before the tables."""

    def attach(self, engine: sqlalchemy.Engine) -> None:
        """Has transactions begin as they have to."""
        def begin(connection: sqlalchemy.Connection) -> None:
            options = connection.get_execution_options()
            writing = WRITING_LONG if options.get("long") else WRITING
            connection.exec_driver_sql(writing if options.get("immediate") else READING)

        event.listen(engine, "begin", begin)
        event.listen(engine, "handle_error", self._shorten)

    @staticmethod
    def _shorten(context: sqlalchemy.engine.ExceptionContext) -> None:
        context.original_exception.args = (plain_reason(context.original_exception),)

    def version(self, session: Session) -> int:
        """Its schema, within the transaction that migrates it."""
        exists = session.scalar(sqlalchemy.text("SELECT to_regclass('setting') IS NOT NULL"))
        return remembered(session, "schema").value if exists else 0

    def mark(self, session: Session) -> None:
        """Notes down that it is ours, and of SCHEMA."""
        session.merge(Setting(name="schema", value=SCHEMA, text=f"{APPLICATION:x}"))

    def last_number(self, session: Session, column: sqlalchemy.Column[Any]) -> int:
        """The last number that was given to a row, which may be gone; 0 for none."""
        return session.scalar(sqlalchemy.text("SELECT last_value FROM pg_sequences WHERE schemaname = current_schema() "
                                              "AND sequencename = :name"), {"name": self._sequence(column)}) or 0

    def number_after(self, session: Session, column: sqlalchemy.Column[Any], last: int) -> None:
        """Has the next row be given a later one."""
        session.execute(sqlalchemy.text("SELECT setval(CAST(:name AS regclass), greatest(:last, 1), :last > 0)"),
                        {"name": self._sequence(column), "last": last})

    def _sequence(self, column: sqlalchemy.Column[Any]) -> str:
        return f"{column.table.name}_{column.name}_seq"

    def checkpoint(self, connection: sqlalchemy.Connection) -> None:
        """What was committed is on the disk."""


Database = SqliteFile | PostgresServer


class Store:
    """The database: one way in for the service, its workers and the command line."""

    def __init__(self, database: Database | Path, *, locked: bool = False, machine: str = "") -> None:
        """Opens it, a path is SQLite's, creating it when absent and migrating an older one; `locked`: within its lock;
        `machine`: this one, of several. Raises StorageError."""
        self.machine = machine
        self.database = database = SqliteFile(database) if isinstance(database, Path) else database
        version, options = database.inspect(whole=False), database.engine_options()
        self.app = flask.Flask("healthchecker")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = options.pop("url")
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options | {"hide_parameters": True}
        db.init_app(self.app)
        with self.app.app_context():
            database.attach(db.engine)
        database.ensure()
        if version == SCHEMA:
            return
        try:
            database.ensure(new=True)
            # never under a service of an older version, which would fail from then on
            with contextlib.nullcontext() if locked or not version else database.lock(), \
                    self.writing(migrates=True, long=True) as session:
                migrate(session, database.version(session))
                tables = sqlalchemy.inspect(session.connection()).get_multi_columns()
                found = {(table, column["name"]) for (_, table), columns in tables.items() for column in columns}
                if fault := fault_of_schema(found, SCHEMA, ours=True):      # it stays as it was, for the version before
                    raise sqlalchemy.exc.SQLAlchemyError(f"it {fault}")
                database.mark(session)
            self.close()        # from the next connection on foreign keys are checked
            database.ensure()       # the files that went with the last connection
        except (OSError, sqlite3.Error, sqlalchemy.exc.SQLAlchemyError) as error:
            self.close()
            reason = one_line(str(getattr(error, "orig", error)))
            raise StorageError(f"database {database} cannot be opened: {reason}") from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A session for reading; it sees one state of the database."""
        with self.app.app_context():
            yield self._session()

    @contextlib.contextmanager
    def writing(self, *, migrates: bool = False, long: bool = False) -> Iterator[Session]:
        """A session that no other writes beside; all or nothing. In SQLite that is BEGIN IMMEDIATE: a deferred one that
        reads first fails when another writes. `long`: it asks nothing for more than CLAIM_LIFE, perhaps."""
        with self.app.app_context():
            session = self._session()
            session.connection(execution_options={"immediate": True, "migrates": migrates, "long": long})
            yield session
            session.commit()

    def _session(self) -> Session:
        session = cast(Session, db.session())
        session.info["wall"] = self.wall
        return session

    def wall(self) -> float:
        """Unix time, by the one clock that all on the database have in common."""
        return self.database.wall()

    def own(self, name: str) -> str:
        """See own_name."""
        return own_name(name, self.machine)

    def checkpoint(self) -> None:
        """Brings to the disk what was committed, the last of which a loss of power might take. Raises StorageError."""
        with self.app.app_context(), db.engine.connect() as connection:
            self.database.checkpoint(connection)

    def close(self) -> None:
        with self.app.app_context():
            db.engine.dispose()


# === Import ==================================================================
# The rows follow the inventory. In come an Inventory and a Vault, out go rows and, for pollers, Targets with their
# secrets opened. Within the transaction of whoever calls: a start, a reload, a change by the console.
# Gives: Changes, forget_behind, import_inventory, import_receivers, keeping_word, load_targets, named_by, open_sealed,
# open_stated, open_url, open_vault, rename_row, reseal, sealed_tokens, Target, target_of, update_row
class Changes(NamedTuple):
    """Names of resources by what an import does to them."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    kept: list[str]

    @property
    def alarming(self) -> bool:
        """More than two and more than a third of the resources go: a slip of the editor, more likely than meant."""
        return len(self.removed) > max(2, (len(self.changed) + len(self.removed) + len(self.kept)) / 3)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(names)} {what}" for what, names in zip(self._fields, self, strict=True))
        named = [f"{what}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
                 for what, names in zip(self._fields[:3], self[:3], strict=True) if names]
        return "; ".join([counts, *named])


def open_stated(settings: ResourceSettings, kind: str, vault: Vault) -> str:
    """The secret that settings state; sealed for the name before, it opens as well. Raises SecretError."""
    secret = settings.secrets[kind]
    if not secret.startswith(TOKEN_PREFIXES):
        return secret
    with contextlib.suppress(SecretError):
        if settings.was:
            return vault.open(secret, *binding(kind, settings.model_copy(update={"name": settings.was})))
    return vault.open(secret, *binding(kind, settings))


def open_sealed(secret: str, bound: Sequence[str], vault: Vault) -> str:
    """A secret that is sealed or not. Raises SecretError."""
    return vault.open(secret, *bound) if secret.startswith(TOKEN_PREFIXES) else secret


def open_url(url: str, name: str, vault: Vault) -> str:
    """The URL of a receiver, sealed or not. Raises SecretError."""
    return open_sealed(url, url_binding(name), vault)


def holds(token: str, plain: str, bound: Sequence[str], vault: Vault) -> bool:
    """Whether a token holds a secret."""
    with contextlib.suppress(SecretError):
        return hmac.compare_digest(vault.open(token, *bound).encode(), plain.encode())
    return False


def store_secret(row: Resource, kind: str, plain: str, vault: Vault) -> bool:
    """Keeps the stored token while it holds the same secret; says whether it was replaced."""
    stored, bound = getattr(row, kind), binding(kind, row)
    if stored and holds(stored, plain, bound, vault):
        return False
    setattr(row, kind, vault.seal(plain, *bound))
    return True


def reseal(session: Session, rows: Iterable[Resource], vault: Vault, name: str | None = None) -> None:
    """Seals the secrets of rows anew, for what they are bound to today, a new `name` if there is one; the stored status
    of a row stays that of its settings. Raises SecretError."""
    for row in rows:
        status, before = session.get(Status, row.id), (row.settings_digest, row.credential_digest)
        plain = {}
        for kind in SECRETS:
            try:
                if token := getattr(row, kind):
                    plain[kind] = vault.open(token, *binding(kind, row))
            except SecretError as error:
                if name is None:
                    raise SecretError(f"{row.name}: {error}, or remove it") from error
                setattr(row, kind, None)    # the inventory states it again, or says that it is missing
        row.name = name or row.name
        for kind, secret in plain.items():
            setattr(row, kind, vault.seal(secret, *binding(kind, row)))
        if status and (status.settings_digest, status.credential_digest) == before:
            status.settings_digest, status.credential_digest = row.settings_digest, row.credential_digest


def bind_ports(session: Session, rows: Iterable[Resource], vault: Vault) -> None:
    """Seals anew what is bound to no port yet; a damaged secret is a matter of its own resource."""
    for row in rows:
        if any(str(getattr(row, kind)).startswith("HC1.") for kind in SECRETS):
            with contextlib.suppress(SecretError):
                reseal(session, [row], vault)


def lacks_password(row: Resource, settings: ResourceSettings) -> bool:
    """Whether there is nothing to log in with; a keytab, the service's own, is for nobody but the inventory."""
    has_keytab = settings.auth == "kerberos" and row.origin == "inventory"
    return settings.platform in SECURED and not settings.key_file and row.password is None and not has_keytab


def update_row(row: Resource, settings: ResourceSettings, vault: Vault) -> bool:
    """Brings one row to what its settings say; a secret that they leave out stays. Says whether anything changed."""
    address, way = (row.hostname, row.port, row.username), row.way
    changed = row.take_settings(settings)
    moved = address != (row.hostname, row.port, row.username)
    rerouted = moved or (way is not None and way != row.way)
    row.host_key = None if moved else row.host_key
    has_key, given = settings.key_file is not None, settings.secrets
    stays = settings.platform in SECURED or row.origin == "api"    # else none is meant where none is given
    has_password = ("password" not in foreign_fields(settings.platform) and not has_key
                    and (stays or "password" in given))
    if settings.endpoint and has_password and settings.platform in SSH_PLATFORMS:
        raise InventoryError("endpoint needs key_file: sshd binds a forced command to a key")
    for kind, used in (("password", has_password), ("key_passphrase", has_key)):
        if not used:
            changed |= getattr(row, kind) is not None
            setattr(row, kind, None)
        elif kind in given:
            changed |= store_secret(row, kind, open_stated(settings, kind, vault), vault)
        elif rerouted and getattr(row, kind) is not None:
            what = "hostname, port or username" if moved else "the way to the host, or its key,"
            raise SecretError(f"{what} changed: write the password again")
    if lacks_password(row, settings):
        known = [name for name in CREDENTIALS if name not in foreign_fields(settings.platform)]
        raise InventoryError(f"{', '.join(known[:-1])} or {known[-1]} is missing")
    return changed


@contextlib.contextmanager
def keeping_word(session: Session, row: Resource) -> Iterator[None]:
    """What is not asked may speak tomorrow: what it said counts on whatever is changed of it but its token."""
    status = session.get(Status, row.id) if row.id and row.platform == Platform.PUSH.value else None
    before = (row.settings_digest, row.credential_digest) if status else None
    yield
    if status and before == (status.settings_digest, row.credential_digest) and row.platform == Platform.PUSH.value:
        status.settings_digest = row.settings_digest


def named_by(session: Session, name: str) -> str:
    """Why a resource has to keep its name: what names it, empty for nothing."""
    gates = Gates.model_validate_json(remembered(session, "gates").text or "{}")
    names = {group for group, members in gates.members({}).items() if name in members}
    for row in session.scalars(sqlalchemy.select(Resource)):
        with contextlib.suppress(StorageError):     # what cannot be read names nothing
            settings = row.parsed_settings
            names |= {row.name} if name in (*settings.depends_on, *settings.hops) else set()
    return f"stays while it is named by {', '.join(sorted(names))}" if names else ""


def forget_behind(session: Session, name: str) -> Iterator[str]:
    """Drops the passwords of what was added through the API and leads through a resource that became another one, for
    they were not meant for where that leads; gives their names. Those of the inventory lead through its own alone."""
    rows = list(session.scalars(sqlalchemy.select(Resource).where(Resource.origin == "api")))
    ways = {row.name: ((row.way or ("",))[0] or "").split(",") for row in rows}
    behind, before = {name}, set[str]()
    while behind != before:
        before = {*behind}
        behind |= {one for one, hops in ways.items() if name in hops or hops[0] in before}
    for row in rows:
        if row.name in behind - {name} and row.password:
            row.password = None
            yield row.name


def rename_row(session: Session, row: Resource, vault: Vault, name: str) -> None:
    """Gives a row another name: its secrets are sealed for that, its events and what is planned for it follow."""
    # plans of the inventory say it themselves
    for work in session.scalars(sqlalchemy.select(Maintenance).where(Maintenance.plan == "")):
        if row.name in (scope := work.chosen).resources:
            names = tuple(name if each == row.name else each for each in scope.resources)
            work.scope = scope.model_copy(update={"resources": names}).scope_json
    session.execute(sqlalchemy.update(Event).values(resource=name).where(Event.resource == row.name))
    session.execute(sqlalchemy.update(Notice).values(name=name).where(
        Notice.kind.in_(("state", "maintenance")), Notice.name == row.name))
    reseal(session, [row], vault, name)


def claim_row(session: Session, rows: dict[str, Resource], settings: ResourceSettings) -> Resource:
    """Takes out of `rows` what belongs to a resource of the inventory: the row of its name, of its name before, or one
    that was removed while its host was the same; else it is a new one. Raises InventoryError."""
    row, before = rows.pop(settings.name, None), rows.get(settings.was or "")
    if row and row.origin == "api":
        raise InventoryError("was added through the API already; choose another name")
    if row and row.origin == REMOVED and ((before and before.origin != "api") or row.hostname != settings.hostname):
        session.delete(row)
        session.flush()     # before another row has its name
        row = None
    if row is None and before and before.origin != "api":
        return rows.pop(before.name)
    return row or Resource(name=settings.name, origin=REMOVED)


def retire_row(row: Resource) -> None:
    """What is not in the inventory any more is not watched, and its secrets go; the rest stays as long as history."""
    row.origin, row.place = REMOVED, ""
    row.password = row.key_passphrase = None


def store_rest(session: Session, inventory: Inventory, changes: Changes) -> None:
    """What else the inventory says than resources; raises the revision where anything has changed."""
    gates = inventory.gates.model_dump_json()
    if gates != (remembered(session, "gates").text or Gates().model_dump_json()):
        changes.changed.append("groups and routes")
    plans = json.dumps([plan.model_dump(mode="json") for plan in inventory.plans])
    if plans != (remembered(session, "plans").text or "[]"):
        changes.changed.append("planned maintenance")
    for name, text in (("defaults", json.dumps(dict(inventory.defaults))), ("gates", gates), ("plans", plans)):
        session.merge(Setting(name=name, text=text))
    if changes.added or changes.changed or changes.removed:
        revise(session)


def claim_receiver(rows: dict[str, Receiver], name: str, plain: str, vault: Vault, named: Collection[str]
                   ) -> Receiver | None:
    """Takes out of `rows` that of its name, or of its name before: it has the same URL, and is not `named` any more.
    What was told under that name gets its end."""
    before = [row for old, row in rows.items() if name in named and old not in named and row.is_told
              and holds(row.url, plain, row.bound, vault)]
    if name in rows or not before:
        return rows.pop(name, None)
    row = rows.pop(before[0].name)
    row.name = name
    row.url = vault.seal(plain, *row.bound)
    return row


def import_receivers(session: Session, inventory: Inventory, vault: Vault, *, secrets_only: bool = False) -> bool:
    """Makes the rows of receivers, unless `secrets_only`, and of this machine's OWN_SECRETS follow the file; says
    whether anything changed. A new one hears nothing of the past. Raises SecretError."""
    own, changed = {name: own_name(name, inventory.service.machine_name) for name in OWN_SECRETS}, False
    rows = {row.name: row for row in session.scalars(sqlalchemy.select(Receiver)) if row.name in own.values() or not (
        secrets_only or not (row.is_told or row.name in OWN_SECRETS))}
    settings = {receiver.name: receiver.model_dump_json(exclude={"url", "url_env", "url_file"})
                for receiver in inventory.receivers}
    for _, name, secret in inventory.urls():
        if secrets_only and name not in own:
            continue
        try:
            plain = open_url(secret, name, vault)
        except SecretError as error:
            place = inventory.places.get(f"notify/{name}", inventory.path.name)
            raise SecretError(f"{place}: {OWN_SECRETS.get(name, name)}: {error}") from error
        row = claim_receiver(rows, own.get(name, name), plain, vault, settings) or Receiver(
            name=own.get(name, name), url="", settings="{}", joined_at=session.info["wall"](),
            cursor=session.scalar(sqlalchemy.select(func.max(Event.id))) or 0)
        if row.url and holds(row.url, plain, row.bound, vault) and row.settings == settings.get(name, "{}"):
            continue
        row.url, row.settings, changed = vault.seal(plain, *row.bound), settings.get(name, "{}"), True
        session.add(row)
    for row in rows.values():
        session.delete(row)
    return changed or bool(rows)


def import_inventory(session: Session, inventory: Inventory, vault: Vault) -> Changes:
    """Makes the inventory's rows follow the file, within the caller's transaction.

    Raises SecretError, a line per fault, where a password has to be written again, and InventoryError for a name
    that was added through the API or a new resource without a password.
    """
    every = sqlalchemy.select(Resource).execution_options(removed=True)
    rows = {row.name: row for row in session.scalars(every)}
    bind_ports(session, rows.values(), vault)
    changes = Changes([], [], [], [])
    shared = [name for name in inventory.gates.members({}) if name in rows and rows[name].origin == "api"]
    faults: list[HealthCheckerError] = [InventoryError(f"{name} is a group, and a row of the API") for name in shared]
    for settings in inventory.resources:
        name = settings.name
        try:
            row = claim_row(session, rows, settings)
            is_new, old = row.origin == REMOVED, row.name
            if old != name:
                rename_row(session, row, vault, name)
            row.origin, row.place = "inventory", inventory.places[name]
            with keeping_word(session, row):
                changed = update_row(row, settings, vault) or old != name
            (changes.added if is_new else changes.changed if changed else changes.kept).append(name)
            session.add(row)
        except HealthCheckerError as error:
            faults.append(type(error)(f"{inventory.places[name]}: {name}: {error}"))
    if faults:
        raise type(faults[0])("\n".join(map(str, faults)))
    for name, row in rows.items():
        if row.origin == "inventory":
            retire_row(row)
            changes.removed.append(name)
    if import_receivers(session, inventory, vault):
        changes.changed.append("who is told")
    store_rest(session, inventory, changes)
    return changes


def open_vault(folder: Path, sealed: Iterable[str]) -> Vault:
    """The keys in `folder`, made on first start; never while secrets are sealed with keys that are missing."""
    vault = Vault(folder)
    vault.require(sealed)
    if not vault.key_id:
        vault.create()
    vault.publish()
    return vault


def sealed_tokens(session: Session | None, inventory: Inventory) -> Iterator[str]:
    """Every sealed secret of the database, if there is one, and of the file."""
    for row in session.scalars(sqlalchemy.select(Resource)) if session else ():
        yield from filter(None, (row.password, row.key_passphrase))
    yield from session.scalars(sqlalchemy.select(Receiver.url)) if session else ()
    yield from (secret for _, secret, _ in inventory.secrets() if secret.startswith(TOKEN_PREFIXES))
    for settings in inventory.resources:
        yield from (secret for secret in settings.secrets.values() if secret.startswith(TOKEN_PREFIXES))


@dataclass(frozen=True)
class Target:
    """A resource as a poller needs it, secrets opened."""

    id: int
    settings: ResourceSettings
    host_key: str | None
    settings_digest: str
    credential_digest: str
    fault: tuple[Cause, str] | None = None      # what keeps it from being polled
    is_added: bool = False      # by who may not edit the inventory

    @property
    def name(self) -> str:
        return self.settings.name

    def bastions(self) -> list[Target]:
        """Those of its bastions that are addresses: where its own credential is shown, and whose keys are not learned,
        for there is no row to keep them in."""
        places = {hop: address for hop in self.settings.hops if (address := hop_address(hop))}
        return [replace(self, host_key=None, settings=self.settings.model_copy(update={
            "name": hop, "hostname": host, "port": port, "username": user or self.settings.username,
            "proxy_jump": None, "host_key": "strict", "host_key_alias": None}))
            for hop, (user, host, port) in places.items()]


def target_of(row: Resource, vault: Vault, known: Target | None = None) -> Target:
    """A row with its secrets opened, if it is not as `known`: that takes 2 ms each. One that is damaged has a fault,
    and settings that say no more than they can."""
    if known and (known.id, known.settings_digest) == (row.id, row.settings_digest):
        return replace(known, host_key=row.host_key, is_added=row.origin != "inventory")
    settings = ResourceSettings.model_construct(name=row.name, hostname=row.hostname, platform=Platform.LOCAL)
    fault: tuple[Cause, str] | None = None
    try:
        settings = row.parsed_settings
        settings = settings.model_copy(update={
            kind: SecretStr(vault.open(token, *binding(kind, row)))
            for kind in SECRETS if (token := getattr(row, kind))})
        if lacks_password(row, settings):
            fault = "credential", f"{row.name}: its password is gone, with a lost key or a bastion; write it again"
    except SecretError as error:
        fault = "credential", f"{row.name}: {error}"
    except StorageError as error:
        fault = "protocol", str(error)
    return Target(row.id, settings, row.host_key, row.settings_digest, row.credential_digest, fault,
                  row.origin != "inventory")


def load_targets(session: Session, vault: Vault, known: Mapping[str, Target] = MappingProxyType({})
                 ) -> dict[str, Target]:
    """All resources by name; those that are as in `known` are taken from there."""
    rows = session.scalars(sqlalchemy.select(Resource).order_by(Resource.id))
    return {row.name: target_of(row, vault, known.get(row.name)) for row in rows}


# === Connections =============================================================
# What every way to a host is built from: a deadline on the monotonic clock for the whole poll, a cap of what a host
# may send, look-up of names, TCP. What fails raises ProbeError with a cause. Runs in the threads of the pollers;
# the resolver has a thread for each look-up that is under way.
# Gives: OUTPUT_BYTES, READ_BYTES, Deadline, Output, Resolver, Wire, HostSocket, connect_tcp
OUTPUT_BYTES = 1 << 20          # bytes over stdout and stderr; a poll that prints more is ended
READ_BYTES = 1 << 16            # bytes taken from a host at once
FIRST_BYTES = 1 << 11           # bytes that are kept of what a host says first
LOOKUP_SECONDS = 0.2            # for the look-up of a host that is connected: a late one changes nothing
IDLE = 1e6                      # seconds, for ever: what is open and serves no poll
# What answers this machine alone: the local link, and where clouds give their machines credentials (of AWS, Google,
# Alibaba, Azure and Oracle, as far as those are no addresses of the link).
OWN_NETWORKS = tuple(map(ipaddress.ip_network, (
    "169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))
SEND_TURN = 0.5                 # seconds for a host to take something, then one looks whether anybody waits in vain


class Deadline:
    """The point of the monotonic clock at which a poll ends, whatever the host does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends_mono = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left; raises ProbeError when there are none."""
        left = self.remaining   # one look at the clock: a socket takes 0 for "do not wait", and less for an error
        if left <= 0:
            raise ProbeError("timeout", f"no answer within {self.seconds:g} s")
        return left

    @property
    def remaining(self) -> float:
        """Seconds left, 0 or less when there are none."""
        return self._ends_mono - time.monotonic()

    @property
    def over(self) -> bool:
        return self.remaining <= 0


class Output:
    """What a script printed so far on both streams, OUTPUT_BYTES at most; `mark` ends it."""

    whole = False
    clean = True            # what ran left nothing that the next script could see
    due_mono = math.inf     # until when the script has to say more, or it is stopped
    exits = False           # a check of the script ends it

    def __init__(self, mark: str) -> None:
        self.mark = mark.encode()
        self.printed = bytearray()

    def take(self, chunk: bytes) -> bool:
        """Adds a chunk; True once the script need not say more. Raises ProbeError above the cap."""
        start = max(0, len(self.printed) - len(self.mark))
        self.printed += chunk
        if len(self.printed) > OUTPUT_BYTES:
            raise AnswerError("protocol", f"the host sent more than {OUTPUT_BYTES} bytes")
        self.whole = self.printed.find(self.mark, start) >= 0
        return self.whole

    def rest(self, code: int | None, fault: ProbeError | None) -> str:
        """What to run after a script that ended (with an exit code, where that is known) or was stopped."""
        if fault:
            raise fault
        return ""


class Resolver:
    """Looks names up beside the poll, since the system's resolver has no deadline; each name once at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()   # guards _pending
        self._pending: dict[tuple[str, int], concurrent.futures.Future[list[Any]]] = {}

    def resolve(self, host: str, port: int, deadline: Deadline) -> list[Any]:
        """getaddrinfo's answers; raises ProbeError."""
        try:
            if ":" in host or host.replace(".", "").isdigit():
                return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
            with self._lock:
                if (host, port) not in self._pending:
                    future: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
                    threading.Thread(target=self._work, args=(host, port, future), daemon=True).start()
                    self._pending[host, port] = future      # only now that a thread will take it out
                future = self._pending[host, port]
            return future.result(deadline.left())
        except concurrent.futures.TimeoutError as error:
            raise ProbeError("timeout", f"the name {host} was not resolved within {deadline.seconds:g} s") from error
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "not a valid name"
            raise ProbeError("unreachable", f"{host} does not resolve ({reason}); check hostname and DNS") from error

    def moved(self, host: str, port: int, address: str) -> bool:
        """Whether an address is not the host's any more; False where none is known, or not soon."""
        with contextlib.suppress(ProbeError):
            return bool(address) and all(
                address != found[4][0] for found in self.resolve(host, port, Deadline(LOOKUP_SECONDS)))
        return False

    def _work(self, host: str, port: int, future: concurrent.futures.Future[list[Any]]) -> None:
        try:
            future.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            future.set_exception(error)
        finally:
            with self._lock:
                del self._pending[host, port]


class Wire:
    """Bytes from a host, for one poll after the other. Nothing waits beyond the deadline, and no host can fill the
    memory: libraries store what it announces."""

    deadline: Deadline
    address = ""    # of the host, where it is known
    received = 0
    limit: float = 1 << 16      # bytes off the wire until the host has shown its key, then in a poll
    first = b""     # what came first, FIRST_BYTES at most

    def begin(self, deadline: Deadline) -> None:
        """From here on it serves a poll."""
        self.deadline, self.received = deadline, 0

    def pause(self) -> None:
        """From here on it serves none; what comes until the next one counts with the last."""
        self.deadline = Deadline(IDLE)

    def note(self, chunk: bytes) -> bytes:
        if len(self.first) < FIRST_BYTES:
            self.first += chunk[:FIRST_BYTES]
        self.count(len(chunk))
        return chunk

    def count(self, octets: int) -> None:
        self.received += octets
        if self.received > self.limit:
            raise ProbeError("protocol", f"the host sent more than {self.limit} bytes")

    @property
    def waiting(self) -> list[Callable[[], bool]]:
        """Of those who wait until it has sent something: whether one may not any longer. One list for all threads."""
        return cast("list[Callable[[], bool]]", vars(self).setdefault("_waiting", []))

    @contextlib.contextmanager
    def awaited(self, too_late: Callable[[], bool]) -> Iterator[None]:
        """While somebody waits, perhaps behind others, until it has sent something."""
        self.waiting.append(too_late)
        try:
            yield
        finally:
            self.waiting.remove(too_late)

    def too_late(self) -> bool:
        return self.deadline.over or any(too_late() for too_late in list(self.waiting))

    def give(self, settimeout: Callable[[float], object], send: Callable[[], int]) -> int:
        """Sends what the host takes; after a TimeoutError paramiko tries again. It ends where nothing is taken until
        the first of those who wait may not any longer."""
        paused = self.deadline.seconds >= IDLE
        settimeout(SEND_TURN if paused else self.deadline.left())
        try:
            return send()
        except TimeoutError as error:
            if not (paused and self.too_late()):
                raise
            cast(Any, self).shutdown(socket.SHUT_RDWR)  # half a packet may have been sent
            raise ConnectionError("the host takes nothing") from error


class HostSocket(Wire, socket.socket):
    """A connection by TCP. Who waits in recv() when a poll begins learns of its deadline with the first byte."""

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self.settimeout(self.deadline.left())
        return self.note(super().recv(min(size, READ_BYTES), flags))

    def send(self, octets: Any, flags: int = 0, /) -> int:
        return self.give(self.settimeout, lambda: socket.socket.send(self, octets, flags))


def is_own(text: str) -> bool:
    """Whether an address, however it is written, is one of OWN_NETWORKS."""
    address = ipaddress.ip_address(text)
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in OWN_NETWORKS)


def connect_tcp(resolver: Resolver, host: str, port: int, deadline: Deadline, *, is_added: bool = False) -> HostSocket:
    """A TCP connection without Nagle's delay to the first address that answers; for what `is_added`, none of
    OWN_NETWORKS. Raises ProbeError."""
    addresses = [found for found in resolver.resolve(host, port, deadline) if not (is_added and is_own(found[4][0]))]
    if not addresses:
        raise ProbeError("unreachable", f"{host} is an address that only this machine reaches: write the resource into "
                         "the inventory")
    fault: OSError = OSError("no address")
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        with contextlib.ExitStack() as stack:
            try:
                sock = stack.enter_context(HostSocket(family, kind, protocol))
                sock.deadline = deadline
                sock.settimeout(deadline.left() / (len(addresses) - index))     # the others have a share, too
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address)
                stack.pop_all()
                sock.address = address[0]
                return sock
            except OSError as error:
                fault = error
    if isinstance(fault, TimeoutError):
        raise ProbeError("timeout", f"no connection to {host} port {port} within {deadline.seconds:g} s") from fault
    said = fault.strerror or str(fault)
    if isinstance(fault, ConnectionRefusedError):
        said = "connection refused; is the service running, is the port right?"
    elif isinstance(fault, ConnectionResetError):
        said = "the host closed the connection"
    raise ProbeError("unreachable", f"{host} port {port}: {said}") from fault


# === Logins ==================================================================
# Asked before every login with a password and told what came of it; answers with permission, a wait, or ProbeError
# `auth`. The threads of the pollers share a guard for each credential; what happened before a restart is told again.
# Gives: AUTH_BACKOFF, LOCKOUT_WINDOW, NOT_TRIED, LoginGuard, LoginRecord, Guards
AUTH_BACKOFF = 300.0            # seconds between attempts with a refused credential
SAME_REFUSAL = 30.0             # seconds between two times that may be told of one refusal
AUTH_RETRY = 60.0               # seconds until the second attempt where the credential was accepted lately
ACCEPTED_LATELY = 3600.0        # seconds for which an accepted login proves the credential
REFUSALS = 3                    # of a host or a credential, after which nothing is tried for LOCKOUT_WINDOW ...
REFUSALS_ASKED = 4              # ... and by somebody who asks for it: the common policy locks at the fifth
LOCKOUT_WINDOW = 31 * 60.0      # seconds without a wrong password after which directories count anew, and a bit
NOT_TRIED = "not tried: "       # begins the reason of what was no login


@dataclass
class LoginRecord:
    """How often a resource was logged in to; outlives the connection, which each change of the resource replaces."""

    outcomes: collections.Counter[str] = dataclass_field(default_factory=collections.Counter)   # accepted, refused
    second_tries: int = 0
    _hours: collections.Counter[int] = dataclass_field(default_factory=collections.Counter)

    def count(self, outcome: str) -> None:
        hour = int(time.monotonic() // 3600)
        self.outcomes[outcome] += 1
        self._hours[hour] += 1
        for past in [past for past in self._hours if past <= hour - 24]:
            del self._hours[past]

    @property
    def last_day(self) -> int:
        """Logins of the last 24 hours, refused ones too."""
        first = int(time.monotonic() // 3600) - 24
        return sum(count for hour, count in list(self._hours.items()) if hour > first)


class LoginGuard:
    """Keeps a wrong password from locking an account; the resources with the same credential share one guard.

    Only what a host says to a login counts. After its first refusal a host waits AUTH_RETRY where the credential was
    accepted lately, else AUTH_BACKOFF, then always AUTH_BACKOFF. An accepted login proves the credential: what others
    were refused before it concerns them alone. REFUSALS in a row, of one host or without an accepted one between,
    stop the host or all; the last of them is left to one that was accepted, which is asked for it. As many logins may
    be without outcome as could be refused; one where nothing is proven.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, locks: bool = True) -> None:
        self._clock, self._locks = clock, locks     # nothing counts a key that is refused
        self._turn = threading.Condition()          # guards all below, reentrant; notified when an attempt ends
        self._running = 0
        self._refused: dict[str, list[float]] = {}  # resource -> times of its refusals since it was accepted
        self._wrong: list[float] = []               # times of the refusals since the credential was accepted
        self._accepted_mono = -math.inf             # the last accepted login
        self._asked: set[str] = set()               # resources that somebody wants to be tried now
        self._good: set[str] = set()                # whose last login was accepted: the last attempt is one of theirs

    @property
    def refusals(self) -> int:
        """How many are in a directory's count."""
        with self._turn:
            return len(self._counted(self._wrong))

    @property
    def is_used(self) -> bool:
        """Whether it knows, or is about to be told, what must not be forgotten."""
        with self._turn:
            return bool(self._asked or self._running or self.refusals)

    def _counted(self, times: list[float]) -> list[float]:
        """Those that still count; the others are dropped."""
        if times and self._clock() - times[-1] >= LOCKOUT_WINDOW:
            times.clear()
        return times

    def wait(self, name: str) -> float:
        """Seconds until `name` may try; 0 = now."""
        with self._turn:
            own, wrong = self._counted(self._refused.get(name, [])), self._counted(self._wrong)
            most = REFUSALS_ASKED if name in self._asked else REFUSALS
            shared = most - (name not in self._good and bool(self._good) and name not in self._asked)
            ends_mono = [times[-1] + LOCKOUT_WINDOW for times, limit in ((own, most), (wrong, shared))
                         if len(times) >= limit]
            if own and name not in self._asked:
                lately = len(own) == 1 and own[0] - self._accepted_mono < ACCEPTED_LATELY
                ends_mono.append(own[-1] + (AUTH_RETRY if lately else AUTH_BACKOFF))
            return max(0.0, max(ends_mono, default=-math.inf) - self._clock())

    def doubts(self, name: str) -> bool:
        """Whether the next login of `name` shall say if it is the credential that others are refused with."""
        with self._turn:
            return name in self._good and len(self._counted(self._wrong)) == REFUSALS - 1

    def why(self, name: str) -> str:
        """Why `name` has to wait."""
        return (f"{NOT_TRIED}the same credential was refused before; check username and password; "
                f"next attempt in {math.ceil(self.wait(name))} s")

    def require_no_wait(self, name: str) -> None:
        """Raises ProbeError while `name` has to wait."""
        if self.wait(name) > 0:
            raise ProbeError("auth", self.why(name))

    def ask(self, name: str) -> None:
        """Lets `name` try now, as far as that cannot lock the account."""
        with self._turn:
            self._asked.add(name)

    def count_with(self, other: LoginGuard) -> None:
        """Counts the refusals of `other`, too: they are of the same user."""
        with other._turn:
            wrong = [*other._counted(other._wrong)]
        with self._turn:
            self._wrong = sorted({*self._counted(self._wrong), *wrong})

    def _has_room(self) -> bool:
        proven = not self._wrong and self._clock() - self._accepted_mono < ACCEPTED_LATELY
        return not self._locks or self._running < (REFUSALS if proven else 1)

    @contextlib.contextmanager
    def attempt(self, name: str, deadline: Deadline, record: LoginRecord) -> Iterator[None]:
        """Around one login: a ProbeError `auth` counts as refused, the end of the block as accepted."""
        with self._turn:
            # what is left must do for the login: one that comes too late for an answer could be refused, too
            if not self._turn.wait_for(self._has_room, deadline.left() - deadline.seconds / 2):
                raise ProbeError("auth", f"{NOT_TRIED}others log in with the same credential, and wait for an answer")
            self.require_no_wait(name)
            self._asked.discard(name)
            self._running += 1
        try:
            yield
        except ProbeError as error:
            if error.cause == "auth":
                self.refuse(name, alone=isinstance(error, NotAllowed))
                record.count("refused")
            raise
        else:
            self.accept(name)
            record.count("accepted")
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    def accept(self, name: str, ago: float = 0.0) -> None:
        """Notes that the credential was accepted `ago` seconds ago (before a restart, or by another machine)."""
        with self._turn:
            self._accepted_mono = max(self._accepted_mono, self._clock() - ago)
            self._wrong = [at for at in self._wrong if at > self._accepted_mono]
            self._refused[name] = later = [at for at in self._refused.get(name, ()) if at > self._clock() - ago]
            if not later:
                self._good.add(name)

    def hear(self, name: str, ago: float, times: int = 1, *, is_new: bool = False) -> None:
        """Notes that a host refused several `times` in a row and last `ago` seconds ago, but for what is known; what
        one that never accepted (`is_new`) says is its own affair where others did lately."""
        with self._turn:
            at, known = self._clock() - ago, self._counted(self._refused.get(name, []))
            if not any(abs(at - each) < SAME_REFUSAL for each in known):
                alone = is_new and self._clock() - self._accepted_mono < ACCEPTED_LATELY
                self.refuse(name, ago, max(1, times - len(known)), alone=alone)

    def refuse(self, name: str, ago: float = 0.0, times: int = 1, *, alone: bool = False) -> None:
        """Notes a refusal, or several `times` in a row of which the last was `ago` seconds ago; `alone`: by a host for
        which the credential does not stand."""
        if not self._locks:
            return
        with self._turn:
            at, own = self._clock() - ago, self._counted(self._refused.setdefault(name, []))
            is_odd = bool(own) and own[-1] <= self._accepted_mono    # others were accepted since
            own += [at] * times
            self._good.discard(name)
            if not (is_odd or alone) and at >= self._accepted_mono:
                self._wrong = sorted(self._counted(self._wrong) + [at] * times)


class Guards:
    """A guard per credential, of the resources that are watched and of what somebody tries."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)
        self._guards: dict[tuple[str, bytes], LoginGuard] = {}      # by user and credential
        self._typed: dict[str, LoginGuard] = {}     # by user: whoever guesses has a new password each time
        self._lock = threading.Lock()               # guards which ones there are

    def _key(self, target: Target) -> tuple[str, bytes]:
        """Equal for the same user with the same secret; does not give the secret away."""
        user = target.settings.username or ""
        secret = length_prefixed(target.settings.secrets.get("password", ""))
        return user, hashlib.blake2b(secret, key=self._salt).digest()

    def of(self, target: Target) -> LoginGuard:
        if target.settings.locks_nothing:
            return LoginGuard(locks=False)
        return self._guards.setdefault(self._key(target), LoginGuard())

    def trial(self, target: Target) -> LoginGuard:
        """The guard of what somebody tries now: that of the credential if it is watched, else of all tries of its
        user, which count together with what is watched."""
        user, _ = key = self._key(target)
        with self._lock:
            if target.settings.locks_nothing or key in self._guards:
                guard = self.of(target)
            else:
                guard = self._typed.setdefault(user, LoginGuard())
                for (watched, _), other in list(self._guards.items()):
                    if watched == user:
                        guard.count_with(other)
            guard.ask(target.name)
        return guard

    def keep(self, targets: Iterable[Target]) -> None:
        """Forgets the credentials of all others."""
        shown = [one for target in targets for one in (target, *target.bastions())]
        with self._lock:
            self._guards = {key: self._guards.get(key) or LoginGuard() for key in map(self._key, shown)}
            self._typed = {user: guard for user, guard in self._typed.items() if guard.is_used}


# === Sessions ================================================================
# What is open to a host after a login stays open between polls, and a poll over it is no login: it neither proves a
# credential nor clears a refusal. After `relogin` seconds a new one is logged in first, then the old one ends; after
# anything unexpected it ends at once. Here are also the keys that hosts are known by, and what all connections share.
# In the threads of the pollers; a keeper serves one at a time.
# Gives: identity, KnownHosts, HostSession, SessionKeeper, ConnectionContext, Connection


def identity(kind: str, blob: bytes) -> str:
    """`ssh-ed25519 SHA256:…` of a public key, the fingerprint as `ssh-keygen -l` shows it."""
    return f"{kind} SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"


def names_host(patterns: str, name: str) -> bool:
    """Whether the host field of a line of known_hosts, hashed or patterns (sshd(8)), names a host."""
    name = name.lower()     # as OpenSSH hashes it
    if patterns.startswith("|1|"):
        with contextlib.suppress(ValueError):
            salt, digest = (base64.b64decode(part, validate=True) for part in patterns[3:].split("|"))
            return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)
        return False
    matched = [pattern for pattern in patterns.lower().split(",")
               if fnmatch.fnmatchcase(name, pattern.lstrip("!").replace("[", "[[]"))]
    return bool(matched) and not any(pattern.startswith("!") for pattern in matched)


class KnownHosts:
    """OpenSSH's known_hosts, read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = functools.lru_cache(1 << 14)(self._read)   # hashed names cost an HMAC for each line

    def lookup(self, host: str, port: int) -> tuple[set[str], set[str], set[str]]:
        """The keys of a host that are accepted, those that are revoked, and those of authorities that may certify it.
        Raises ProbeError."""
        try:
            stat = self._path.stat()
            return self._keys(host if port == SSH_PORT else f"[{host}]:{port}", stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            return set(), set(), set()
        except OSError as error:
            raise ProbeError("host_key", f"known_hosts {self._path} cannot be read: {error.strerror}") from error

    def _read(self, name: str, *_stamp: int) -> tuple[set[str], set[str], set[str]]:
        keys: dict[str, set[str]] = collections.defaultdict(set)    # by marker
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            words = line.split()
            marker = words.pop(0) if words and words[0].startswith("@") else ""
            with contextlib.suppress(ValueError, IndexError):
                if not words[0].startswith("#") and names_host(words[0], name):
                    keys[marker].add(identity(words[1], base64.b64decode(words[2], validate=True)))
        return keys[""], keys["@revoked"], keys["@cert-authority"]


class HostSession:
    """What a login opened; polls run over it one after the other."""

    fit = True      # False: a poll left something in it, and no other may use it
    resumed = False     # whether it goes on with something that was open before its login

    @property
    def alive(self) -> bool:
        """False once it is seen to be dead."""
        raise NotImplementedError

    @property
    def stale(self) -> bool:
        """Whether anything came that nobody asked for, or what it was made from is not the same any more; then no
        poll uses it. Raises ProbeError where that cannot be found out."""
        raise NotImplementedError

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        """As Connection.run. Where it is silent for a third of the deadline from the start on, it is dead."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends it, also a dead one, and raises nothing."""
        raise NotImplementedError


class SessionKeeper:
    """The session that is open, if there is one, and when it is made anew."""

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, relogin: float) -> None:
        self._relogin = relogin
        self.session: HostSession | None = None
        self.reused = False         # whether the last one that was given is of a poll before
        self.resumed = False        # or a part of it is
        self.opened_at = 0.0        # Unix time; and monotonic
        self.opened_mono = 0.0
        self.complaint = ""         # of the login that should have replaced it
        self._due_mono = self._ends_mono = math.inf

    @property
    def lives(self) -> bool:
        """Whether a poll can do without a login."""
        return self.session is not None and self.session.alive and self.clock() < self._ends_mono

    def get(self, open_session: Callable[[Deadline], HostSession], deadline: Deadline, *,
            doubted: bool = False) -> HostSession:
        """The session that is open, or a new one, also where its credential is `doubted`. Raises ProbeError where there
        is neither."""
        old = self.session
        usable = old is not None and self.lives and not old.stale
        self.reused = usable and not doubted and self.clock() < self._due_mono
        if old and self.reused:
            return old
        first = usable and not self.complaint   # has half the time, for the old one may need the rest
        try:
            new = open_session(Deadline(round(deadline.left() / 2, 1)) if first else deadline)
        except ProbeError as error:
            if not (old and usable and old.alive) or deadline.over or not self._goes_on(error):
                raise
            self.reused = True
            return old
        self.opened_at, self.opened_mono = time.time(), self.clock()
        if self._relogin:
            self._due_mono = self.opened_mono + self._relogin * random.uniform(0.5, 1)
            self._ends_mono = self.opened_mono + 2 * self._relogin
        self.resumed = new.resumed
        self.drop(new)
        return new

    def _goes_on(self, error: ProbeError) -> bool:
        """Whether the old one serves on: while the guard says no, and until a refusal is confirmed."""
        if str(error).startswith(NOT_TRIED):
            return True
        first = not self.complaint and error.cause not in ("host_key", "credential")
        self.complaint = str(error)
        return first

    def drop(self, successor: HostSession | None = None) -> None:
        """Ends what is open, where there is another one now in favour of that."""
        old, self.session, self.complaint = self.session, successor, ""
        if old:
            old.close()


@dataclass(frozen=True)
class ConnectionContext:
    """What the connections of all resources share."""

    known_hosts: KnownHosts
    resolver: Resolver
    guards: Guards = dataclass_field(default_factory=Guards)
    watched: dict[str, Any] = dataclass_field(default_factory=dict)     # connections by resource, for bastions
    records: dict[str, LoginRecord] = dataclass_field(default_factory=dict)     # by resource
    is_trial: bool = False      # somebody tries settings
    keeps: bool = False         # sessions stay open between polls
    drain: float = 0.0          # seconds for polls of Windows at the end: a host keeps for long what nobody deletes

    def guard_of(self, target: Target) -> LoginGuard:
        return (self.guards.trial if self.is_trial else self.guards.of)(target)


class Connection:
    """The way to one resource. What it opens stays open for the next poll where that is wanted, else `run` ends it."""

    DEAD_IN_A_ROW = 3       # kept sessions found dead, after which each poll opens anew ...
    FRESH = 86_400.0        # ... for so many seconds: something between here and there ends what is idle

    def __init__(self, target: Target, guard: LoginGuard, context: ConnectionContext) -> None:
        self._target, self._guard, self._context = target, guard, context
        self._settings = target.settings
        self.host_key = target.host_key     # what the host is known by; SSH learns it at the first contact
        self.keeper = SessionKeeper(target.settings.relogin)
        self.record = context.records.setdefault(target.name, LoginRecord())
        self.second_try = ""                # why the last poll needed one
        self._failure = ""                  # what is tried once more
        self._deaths = 0                    # kept sessions in a row
        self._fresh_until_mono = -math.inf

    @property
    def keeps(self) -> bool:
        """Whether what is open stays open."""
        return self._context.keeps and self._settings.keeps and not self.found_dead

    @property
    def found_dead(self) -> bool:
        """Whether each poll opens anew, for what was kept was found dead again and again."""
        return time.monotonic() < self._fresh_until_mono

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        """Runs `script` until `output` is whole, it ends, or the deadline is there; says whether it was seen to end.
        Raises ProbeError."""
        self.second_try, self._failure = self._failure, ""
        self.keeper.reused = self.keeper.resumed = False
        if self.keeper.session and not self.keeper.session.alive:
            self._note_dead()
        keeps = self.keeps
        try:
            session = self.keeper.get(self._admitted, deadline, doubted=self._guard.doubts(self._target.name))
            ended = session.run(script, output, deadline)
            if self.keeper.reused and output.whole:
                self._deaths = 0
            return ended
        finally:
            if not (keeps and output.whole and self.keeper.session and self.keeper.session.fit):
                self.drop()

    def _admitted(self, deadline: Deadline) -> HostSession:
        """A new session; where there is one that can serve on, not while the guard says no to its login."""
        if self.keeper.lives:
            self._guard.require_no_wait(self._target.name)
        return self.open_session(deadline)

    def _made_from(self) -> list[Any]:
        """What a login depends on. Raises ProbeError."""
        raise NotImplementedError

    def _changes(self, wire: Wire) -> Callable[[], bool]:
        """Tells whether a new login would be another one."""
        before, place = self._made_from(), (self._settings.hostname, self._settings.connect_port)
        return lambda: self._made_from() != before or self._context.resolver.moved(*place, wire.address)

    def open_session(self, deadline: Deadline) -> HostSession:
        """Logs in, in an attempt of the guard; the one before is still open as `keeper.session`. Raises ProbeError."""
        raise NotImplementedError

    def drop(self) -> None:
        """Ends what is open between polls."""
        self.keeper.drop()

    def begins_again(self, error: ProbeError, deadline: Deadline) -> bool:
        """Ends what is open after a poll that failed; says whether that poll may try once more: where what failed is
        a connection that was open before it, and there is time."""
        reused, self.keeper.reused = self.keeper.reused or self.keeper.resumed, False
        self.drop()
        if not reused or deadline.over or isinstance(error, AnswerError):
            return False
        self._note_dead()
        self.record.second_tries += 1
        self._failure = str(error)
        return True

    def _note_dead(self) -> None:
        self._deaths += 1
        if self._deaths >= self.DEAD_IN_A_ROW:
            self._deaths, self._fresh_until_mono = 0, time.monotonic() + self.FRESH

    def close(self) -> None:
        """Ends all that is open; for the thread of the poller, at its end."""
        self.drop()


# === SSH =====================================================================
# A script goes to `/bin/sh -s` of a POSIX host over paramiko, its output comes back: a channel for each poll of a
# transport. TCP, key exchange, the host's key against pin and known_hosts, only then the login. In the poller's thread,
# with paramiko's own beside it, which ends at the socket's deadline and wakes whoever waits.
# Gives: SshConnection
CLOSE_SECONDS = 1.0             # for a bastion to hear that nobody needs a connection any more


def certifier(blob: bytes, host: str) -> str | None:
    """Who certified a host's key, when that holds for `host` now; None for anything else."""
    kind = paramiko.Message(blob).get_text()
    with contextlib.suppress(ValueError, UnsupportedAlgorithm, InvalidSignature):
        found = serialization.load_ssh_public_identity(f"{kind} {base64.b64encode(blob).decode()}".encode())
        if not isinstance(found, serialization.SSHCertificate):
            return None
        found.verify_cert_signature()
        names = [pattern.decode().lower() for pattern in found.valid_principals]
        if (found.type is serialization.SSHCertificateType.HOST and not found.critical_options
                and found.valid_after <= time.time() < found.valid_before
                and any(fnmatch.fnmatchcase(host.lower(), name) for name in names)):
            kind, key = found.signature_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode().split()
            return identity(kind, base64.b64decode(key))
    return None


class BoundedPacketizer(paramiko.packet.Packetizer):
    """Refuses packets with more items than anybody sends: paramiko would go through all of them."""

    COUNTED: ClassVar = {7: 0, 60: 3}       # EXT_INFO and INFO_REQUEST: texts before the number of items
    # Between polls: what says nothing, key exchange, `are you there`, and how the last command ends.
    ROUTINE: ClassVar = {2, 3, 4, 20, 21, *range(30, 50), 80, 81, 82, *range(93, 101)}
    resting = uninvited = False     # no poll runs; something else came then
    replies = 0             # to questions, which are answered in their order

    def start_handshake(self, timeout: float) -> None:
        """No thread with a timer, for the socket knows the deadline."""

    def read_message(self) -> tuple[int, paramiko.Message]:
        kind, message = super().read_message()
        self.uninvited |= self.resting and kind not in self.ROUTINE
        self.replies += kind in (81, 82)    # SSH_MSG_REQUEST_SUCCESS, SSH_MSG_REQUEST_FAILURE
        if kind in self.COUNTED:
            look = paramiko.Message(message.asbytes())
            for _ in range(self.COUNTED[kind]):
                look.get_binary()
            if look.get_int() > 64:
                raise paramiko.SSHException("a packet with too many items")
        return kind, message


def ssh_fault(error: Exception, first: bytes, mismatches: Sequence[str]) -> ProbeError:
    """Our error for what paramiko raises around the key exchange; `first` is what the host said first."""
    before = one_line(re.split(r"^SSH-", first.decode(errors="replace"), maxsplit=1, flags=re.MULTILINE)[0])
    said = f"; it said: {before}" if before else ""
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return ProbeError("protocol", f"no algorithm in common: {'; '.join(mismatches) or error}")
    if isinstance(error, paramiko.ChannelException):
        return ProbeError("unreachable", "the host refuses a session; are too many open (MaxSessions)?")
    if not first or first.startswith(b"Exceeded MaxStartups") or isinstance(error, (EOFError, ConnectionError)):
        why = "the host closed the connection; is it an SSH server with free sessions?"
        return ProbeError("unreachable", f"{why}{said}")
    return ProbeError("protocol", f"no SSH server there: {error or type(error).__name__}{said}")


@dataclass(frozen=True)
class Patience:
    """How long paramiko waits: it adds seconds to the time of the wall clock, which may be set meanwhile, and compares;
    by this something else counts."""

    is_over: Callable[[], bool]

    def __radd__(self, _begun: float) -> Patience:
        return self

    def __lt__(self, _now: float) -> bool:
        return self.is_over()


class SeenChannels(dict[int, bool]):
    """The numbers of all channels, for what comes late: they ascend, and paramiko would keep one for each poll."""

    last = -1

    def __setitem__(self, number: int, _seen: bool) -> None:
        self.last = max(self.last, number)

    def __contains__(self, number: object) -> bool:
        return cast(int, number) <= self.last


class SshTransport(paramiko.Transport):
    """Knows whether the host said goodbye: after a password that means refused, a lost connection does not."""

    WEAK: ClassVar = {
        "ciphers": ["aes128-cbc", "aes192-cbc", "aes256-cbc", "3des-cbc"],
        "kex": ["diffie-hellman-group-exchange-sha256"],
        "macs": ["hmac-sha1", "hmac-sha1-96", "hmac-md5", "hmac-md5-96"]}
    NEVER: ClassVar = 10 ** 6           # seconds; paramiko's own timers follow the wall clock, ours decides
    packetizer: BoundedPacketizer
    dismissed = False
    is_old = False      # it has served
    ended = False       # by us; its thread may not know yet
    theirs: Mapping[str, Sequence[str]] = dict[str, Sequence[str]]()      # the algorithms that the host names, by kind

    def __init__(self, wire: Wire) -> None:
        super().__init__(cast(Any, wire), disabled_algorithms=self.WEAK, packetizer_class=BoundedPacketizer)
        self.wire, self._questions = wire, itertools.count(1)
        self.channels_seen = SeenChannels()
        self.banner_timeout = self.auth_timeout = self.NEVER
        self.clear_to_send_timeout = cast(Any, Patience(wire.too_late))     # while keys are exchanged anew

    def _really_parse_kex_init(self, *message: Any, **how: Any) -> Any:
        found = super()._really_parse_kex_init(*message, **how)     # type: ignore[misc]  # the stubs lack it
        self.theirs = {kind: tuple(names) for kind, names in found.items() if kind.endswith("_list")}
        return found

    def mismatches(self) -> list[str]:
        """What both sides have of each kind of which they have none in common."""
        kinds = {"kex_algo_list": self.preferred_kex, "server_key_algo_list": self.preferred_keys,
                 "server_encrypt_algo_list": self.preferred_ciphers, "server_mac_algo_list": self.preferred_macs}
        return [f"the host has {', '.join(theirs)}, here are {', '.join(ours)}" for kind, ours in kinds.items()
                if (theirs := self.theirs.get(kind, ())) and not set(theirs) & set(ours)]

    def _parse_disconnect(self, message: paramiko.Message) -> None:
        self.dismissed = True

    def _parse_channel_open_success(self, message: paramiko.Message) -> None:
        """A channel that nobody waits for any more is closed: behind a bastion it holds a connection."""
        ours, theirs = message.get_int(), message.get_int()
        if self._channels.get(ours) is None:    # type: ignore[attr-defined]  # the stubs lack it
            close = paramiko.Message()
            close.add_byte(b"a")    # SSH_MSG_CHANNEL_CLOSE
            close.add_int(theirs)
            self._send_message(close)   # type: ignore[attr-defined]  # the stubs lack it
        else:
            message.rewind()
            super()._parse_channel_open_success(message)    # type: ignore[misc]  # the stubs lack it

    def open_in_time(self, place: tuple[str, int] | None, deadline: Deadline) -> paramiko.Channel:
        """A channel to a place behind the host, or for a session. Raises ProbeError once the deadline is over; an old
        transport that is silent for a third of it is dead, and ends."""
        was_old, self.is_old = self.is_old, True
        wire, patience = self.wire, deadline.left() / (3 if was_old else 1)
        received, silence, question = wire.received, Deadline(patience), math.inf

        def is_over() -> bool:
            """Any byte begins the silence anew, for it may have been on its way when the host died; the answer to the
            question ends it."""
            nonlocal received, silence
            if wire.received != received:
                received, silence = wire.received, Deadline(patience)
            return deadline.over or (silence.over and self.packetizer.replies < question)

        try:
            with wire.awaited(is_over):
                if was_old and place:   # which may be long in coming
                    question = self._are_you_there()
                return self.open_channel("direct-tcpip" if place else "session", place, ("127.0.0.1", 0), 1 << 18,
                                         timeout=cast(Any, Patience(is_over)))
        except (paramiko.SSHException, EOFError, OSError) as error:
            if isinstance(error, paramiko.ChannelException):
                raise
            silent = is_over()
            deadline.left()
            self.end()
            if not silent:
                raise
            raise ProbeError("unreachable", "no sign of life on the open connection") from error

    def _are_you_there(self) -> int:
        """Makes a living host say something, if only that it does not know this; how many it was asked until now."""
        number = next(self._questions)
        ask = paramiko.Message()
        ask.add_byte(b"P")      # SSH_MSG_GLOBAL_REQUEST
        ask.add_string("keepalive@openssh.com")
        ask.add_boolean(True)
        self._send_user_message(ask)    # type: ignore[attr-defined]  # the stubs lack it
        return number

    def is_active(self) -> bool:
        return not self.ended and super().is_active()

    def end(self) -> None:
        """At once, whatever is under way."""
        self.ended = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)     # wakes the thread that reads

    def forget(self) -> None:
        """Once it has ended it does not refer to itself any more: else all of it would wait for the collector."""
        if not self.is_alive():
            self._handler_table.clear()     # type: ignore[attr-defined]  # the stubs lack it
            self.saved_exception = self.kex_engine = cast(Any, None)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Our error for whatever the host's bytes make paramiko raise."""
        try:
            yield
        except ProbeError:
            raise
        except Exception as error:      # paramiko lets through whatever its parsers raise
            self.wire.deadline.left()
            raise ssh_fault(error, self.wire.first, self.mismatches()) from error


class HostChannel(Wire):
    """A connection that a bastion made, as paramiko's transport wants one."""

    _closed = False

    def __init__(self, channel: paramiko.Channel, deadline: Deadline) -> None:
        self._channel, self.deadline = channel, deadline
        self._below = cast(SshTransport, channel.get_transport()).wire

    def settimeout(self, _seconds: float) -> None:
        """What counts is the deadline."""

    def recv(self, size: int) -> bytes:
        self._channel.settimeout(self.deadline.left())
        return self.note(self._channel.recv(size))

    def send(self, octets: bytes) -> int:
        with self._below.awaited(self.too_late):
            return self.give(self._channel.settimeout, lambda: self._channel.send(octets))

    def shutdown(self, _how: int) -> None:
        self.close()

    def close(self) -> None:
        limit = Deadline(CLOSE_SECONDS)
        with contextlib.suppress(OSError, EOFError), self._below.awaited(lambda: limit.over):   # it may be gone
            self._channel.close()


def bastion_fault(name: str, error: ProbeError) -> ProbeError:
    """The error of a bastion as that of a host behind it, whose own login it is not."""
    said = str(error)
    if said.removeprefix(NOT_TRIED).startswith("bastion "):
        return error
    note = NOT_TRIED if said.startswith(NOT_TRIED) else ""
    cause: Cause = "unreachable" if error.cause == "auth" else error.cause
    return ProbeError(cause, f"{note}bastion {name}: {said.removeprefix(NOT_TRIED)}")


class SshLogin(Connection):
    """How SSH checks the key of one host and logs in to it, by key or password."""

    _keys: tuple[list[int], list[paramiko.PKey]] | None = None      # times of change of the files and what they held

    def __init__(self, target: Target, guard: LoginGuard, context: ConnectionContext) -> None:
        super().__init__(target, guard, context)
        self._advice = f"trust {target.name}"
        self._learning = threading.Lock()   # guards host_key: those behind a bastion may be the first that see it

    def _known(self) -> tuple[set[str], set[str], set[str]]:
        """The keys that the host may show, none before the first contact, those that are revoked, and those of
        authorities."""
        settings = self._settings
        alias = settings.host_key_alias
        place = (alias, SSH_PORT) if alias else (settings.hostname, settings.connect_port)
        known, revoked, authorities = self._context.known_hosts.lookup(*place)
        if settings.host_key and settings.host_key != "strict":
            return {settings.host_key}, revoked, set()
        return known | ({self.host_key} if self.host_key else set()), revoked, authorities

    def _prefer_known_types(self, transport: SshTransport, already: Sequence[str]) -> None:
        """A host has keys of several types: asks for one that we can compare, at last for an untried one."""
        accepted, _, authorities = self._known()
        wanted = tuple(key.split()[0].replace("ssh-rsa", "rsa-sha2") for key in accepted if " " in key)
        tried = tuple(kind.replace("ssh-rsa", "rsa-sha2") for kind in already)
        options = transport.get_security_options()
        # With GCM paramiko's packets need no HMAC, which it compares byte by byte in Python.
        options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
        options.key_types = sorted(options.key_types, key=lambda name: (
            bool(tried) and name.startswith(tried), not name.startswith(wanted)))
        if authorities:
            options.key_types = [*(f"{name}-cert-v01@openssh.com" for name in options.key_types), *options.key_types]

    def _verified(self, offered: str, transport: SshTransport, tried: list[str]) -> bool:
        """Compares the host's key before any secret is sent; False: connect again, for another type of key."""
        (accepted, revoked, authorities), settings = self._known(), self._settings
        certificate = transport.get_remote_server_key().public_blob
        authority = certificate and certifier(certificate.key_blob, settings.host_key_alias or settings.hostname)
        if offered in revoked or authority in revoked:
            raise ProbeError("host_key", f"host key revoked by known_hosts: offered {offered}")
        if authority in authorities:
            return True
        kind, fingerprint = offered.split()
        if any(key.rstrip("=").endswith(fingerprint) for key in accepted):
            return True
        if any(" " not in key for key in accepted) and kind not in tried:
            tried.append(kind)  # a pin without a type may be that of another key of the host
            return False
        if accepted:
            raise ProbeError("host_key", f"host key changed: expected {' or '.join(sorted(accepted))}, "
                             f"offered {offered}; no password was sent; if the change is right: {self._advice}")
        if settings.host_key == "strict":
            raise ProbeError("host_key", f"host key unknown: offered {offered}; to accept it: {self._advice}")
        with self._learning:
            self.host_key = self.host_key or offered
        return self.host_key == offered or self._verified(offered, transport, tried)

    def _login(self, transport: SshTransport, deadline: Deadline) -> None:
        settings = self._settings
        user, kind = settings.username or "", "key_file" if settings.key_file else "password"
        try:
            if settings.key_file is not None:
                missing = self._show_keys(transport, self.load_keys(settings.key_file))
            else:
                missing = self._give_password(transport, settings.secrets.get("password", ""))
        except paramiko.BadAuthenticationType as error:
            raise NotAllowed("auth", f"the host allows only {', '.join(error.allowed_types)} for {user}") from error
        except paramiko.AuthenticationException as error:
            deadline.left()
            if not transport.is_active() and not transport.dismissed:
                raise ProbeError("unreachable", "connection lost while logging in") from error
            raise ProbeError("auth", f"login as {user} refused; check username and {kind}") from error
        except paramiko.SSHException as error:
            if "info request" not in str(error):    # message 60: after a password it asks for another one
                raise
            raise ProbeError("auth", f"the password of {user} has expired; the host wants a new one") from error
        if missing:
            raise NotAllowed("auth", f"the host asks for more than one proof: {', '.join(missing)}")

    def _show_keys(self, transport: SshTransport, keys: Sequence[paramiko.PKey]) -> list[str]:
        """Tries the certificate first, then the plain key, as OpenSSH does."""
        for key in keys[:-1]:
            with contextlib.suppress(paramiko.AuthenticationException):
                return transport.auth_publickey(self._settings.username or "", key)
        return transport.auth_publickey(self._settings.username or "", keys[-1])

    def _give_password(self, transport: SshTransport, password: str) -> list[str]:
        """Logs in by password, or by a dialogue that asks for nothing else."""
        user, asked = self._settings.username or "", list[tuple[str, bool]]()

        def answer(title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
            texts = one_line(" ".join([title, instructions, *(text for text, _ in prompts)]))
            if prompts and re.search("new password|expired|change", texts, re.IGNORECASE):
                raise ProbeError("auth", f"the password of {user} has expired; the host says: {texts}")
            if len(prompts) > 1 or (prompts and asked):
                raise ProbeError("auth", f"login as {user} refused; the host asks for more than a password: {texts}")
            asked.extend(prompts)
            return [password for _ in prompts]

        try:
            return transport.auth_password(user, password, fallback=False)
        except paramiko.BadAuthenticationType as error:
            try:
                if "keyboard-interactive" in error.allowed_types:
                    return transport.auth_interactive(user, answer)
            except paramiko.AuthenticationException as refusal:
                if asked or not transport.is_active():
                    raise paramiko.AuthenticationException from refusal
            raise       # it asked nothing: no password was given

    def load_keys(self, path: Path) -> list[paramiko.PKey]:
        """The private key, before it the one with a certificate that is beside it, read again when a file changes
        (unlocking an encrypted one takes 0.1 s). Raises ProbeError."""
        try:
            certificate = f"{path}-cert.pub"    # a new Path would leave its name in Python's table of names, each poll
            stamp = [os.stat(file).st_mtime_ns for file in (path, certificate) if file == path or os.path.exists(file)]
            if self._keys is None or self._keys[0] != stamp:
                plain = self._open_key(path)
                keys = [plain]
                if len(stamp) > 1:
                    keys.insert(0, copy.copy(plain))
                    keys[0].load_certificate(certificate)
                self._keys = stamp, keys
        except OSError as error:
            raise ProbeError("credential", f"key_file {path} cannot be read: {error.strerror}") from error
        except Exception as error:  # paramiko lets through whatever its parsers and cryptography raise
            raise ProbeError("credential", f"key_file {path} does not open; check format and key_passphrase") from error
        return self._keys[1]

    def _open_key(self, path: Path) -> paramiko.PKey:
        """A private key in any format that `ssh` reads: cryptography knows more of them than paramiko."""
        phrase, raw = self._settings.key_passphrase, path.read_bytes()
        secret = phrase.get_secret_value().encode() if phrase else None
        load = (serialization.load_ssh_private_key if b"BEGIN OPENSSH PRIVATE KEY" in raw
                else serialization.load_pem_private_key)
        key: Any = load(raw, secret)
        kind = (paramiko.RSAKey if isinstance(key, rsa.RSAPrivateKey) else
                paramiko.ECDSAKey if isinstance(key, ec.EllipticCurvePrivateKey) else paramiko.Ed25519Key)
        text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
                                 serialization.NoEncryption()).decode()
        return kind.from_private_key(io.StringIO(text))


class SshSession(HostSession):
    """A transport after the login, with a channel for each script."""

    def __init__(self, transport: SshTransport, changed: Callable[[], bool], endpoint: bool,
                 stack: contextlib.ExitStack) -> None:
        self._transport, self._changed, self._endpoint, self._stack = transport, changed, endpoint, stack
        transport.wire.pause()      # the login's deadline ends here

    @property
    def alive(self) -> bool:
        return self._transport.is_active()

    @property
    def stale(self) -> bool:
        return self._transport.packetizer.uninvited or self._changed()

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        transport = self._transport
        transport.wire.begin(deadline)
        transport.packetizer.resting = False
        try:
            with transport.explained():
                return self._execute(transport.open_in_time(None, deadline), script, output)
        finally:
            transport.packetizer.resting = True
            transport.wire.pause()

    def _execute(self, channel: paramiko.Channel, script: str, output: Output) -> bool:
        """Feeds the script to a POSIX shell, whatever the login shell is; False when the connection ended first."""
        command, fed = (script, "") if self._endpoint else ("exec /bin/sh -s", script)
        with contextlib.suppress(paramiko.SSHException, OSError, EOFError), contextlib.closing(channel):
            channel.set_combine_stderr(True)
            channel.exec_command(command)
            with contextlib.suppress(OSError):      # a shell that ended before may have said why
                channel.sendall(fed.encode())
                channel.shutdown_write()
            while chunk := channel.recv(READ_BYTES):
                if output.take(chunk):
                    return True
            channel.status_event.wait()
            return channel.exit_status >= 0
        return False

    def close(self) -> None:
        self._stack.close()


class Relay(SshSession):
    """The session of a bastion on which those behind it stand; it ends with the last of them."""

    def __init__(self, *made: Any) -> None:
        super().__init__(*made)
        self._users, self._counting = 0, threading.Lock()   # guards _users: -1 once it has ended
        self._transport.wire.limit = math.inf       # each of them has a cap of its own

    @property
    def alive(self) -> bool:
        return self._users >= 0 and super().alive

    def take(self) -> bool:
        """Adds a user; False where it has ended just now."""
        with self._counting:
            self._users += self._users >= 0
            return self._users > 0

    @contextlib.contextmanager
    def taken(self) -> Iterator[SshTransport]:
        """Until the end of the block for the user that was added."""
        try:
            yield self._transport
        finally:
            with self._counting:
                self._users = self._users - 1 or -1
            if self._users < 0:
                super().close()

    def close(self) -> None:
        """It is not used for anyone else; there is always one who does, and then ends it."""


class SshConnection(SshLogin):
    """One resource over SSH (paramiko)."""

    def __init__(self, target: Target, guard: LoginGuard, context: ConnectionContext) -> None:
        super().__init__(target, guard, context)
        self._relay = SessionKeeper(target.settings.relogin)
        self._turn = threading.Lock()       # guards these two: those behind it wait while one of them logs in for all
        self._failed: tuple[float, ProbeError] = -math.inf, ProbeError("unreachable", "")     # when, and how
        self._bastions = {hop.name: SshConnection(hop, context.guard_of(hop), context) for hop in target.bastions()}
        for bastion in self._bastions.values():
            bastion._advice = "add the bastion as a resource, or its key to known_hosts"

    @property
    def keeps(self) -> bool:
        return super().keeps and all(bastion._settings.keep for bastion in self._chain())

    def open_session(self, deadline: Deadline) -> SshSession:
        return self._opened(SshSession, deadline, self._chain())

    def _opened(self, kind: type[SshSession], deadline: Deadline, chain: Sequence[SshConnection]) -> SshSession:
        with contextlib.ExitStack() as stack:
            transport = stack.enter_context(self._logged_in(deadline, chain))
            return kind(transport, self._changes(transport.wire), self._settings.endpoint, stack.pop_all())

    def _made_from(self) -> list[Any]:
        """The bastions', too. Keys go by the times of their files: a renewed certificate is of the same key."""
        return [(hop, hop._known(), (key_file := hop._settings.key_file) and hop.load_keys(key_file) and hop._keys)
                for hop in (*self._chain(), self)]

    def close(self) -> None:
        super().close()
        if isinstance(relay := self._relay.session, Relay):
            relay._transport.end()      # those behind it begin again, with what this is replaced by

    @contextlib.contextmanager
    def _lent(self, deadline: Deadline, chain: Sequence[SshConnection]) -> Iterator[SshTransport]:
        """The transport for all behind it. Raises ProbeError, for all who waited for the login that failed; one that
        only was too late for who tried it says nothing of the others."""
        def log_in(limit: Deadline) -> HostSession:
            self._guard.require_no_wait(self._target.name)
            return self._opened(Relay, limit, chain)

        begun_mono = time.monotonic()
        while not self._turn.acquire(timeout=deadline.left()):
            pass
        try:
            if self._failed[0] > begun_mono:
                raise self._failed[1]
            while not (relay := cast(Relay, self._relay.get(log_in, deadline))).take():
                pass
        except ProbeError as error:
            if not deadline.over:
                self._failed = time.monotonic(), error
            raise
        finally:
            self._turn.release()
        with relay.taken() as transport:
            yield transport

    def offered_key(self, deadline: Deadline) -> str:
        """The key that the host shows; nothing else is done."""
        with self._connected(deadline, self._chain()) as (_, offered):
            return offered

    def _chain(self, behind: Sequence[str] = ()) -> list[SshConnection]:
        """The bastions on the way, as they are now. Raises ProbeError."""
        chain: list[SshConnection] = []
        for hop in self._settings.hops:
            bastion = self._bastions.get(hop) or self._context.watched.get(hop)     # an address is no resource's name
            if not isinstance(bastion, SshConnection) or hop in behind:
                if hop not in behind:       # perhaps not yet, or not any more
                    raise ProbeError("unreachable", f"bastion {hop}: there is no such resource; correct proxy_jump")
                raise ProbeError("credential", f"bastion {hop}: the way to it leads through itself; correct proxy_jump")
            chain += [bastion] if chain else [*bastion._chain((*behind, hop)), bastion]
        return chain

    def _reach(self, stack: contextlib.ExitStack, deadline: Deadline, chain: Sequence[SshConnection],
               ) -> HostSocket | HostChannel:
        """TCP to the host; or a channel of the last bastion, which stays logged in as long as `stack`."""
        host, port = self._settings.hostname, self._settings.connect_port
        if not chain:
            return connect_tcp(self._context.resolver, host, port, deadline, is_added=self._target.is_added)
        bastion, name = chain[-1], chain[-1]._settings.name
        try:
            if bastion._target.fault:
                raise ProbeError(*bastion._target.fault)
            return HostChannel(self._channel(stack, bastion, deadline, chain[:-1]), deadline)
        except ProbeError as error:
            raise bastion_fault(name, error) from error
        except Exception as error:      # paramiko lets through whatever its parsers raise
            deadline.left()
            refused = isinstance(error, paramiko.ChannelException)
            said = (f"it refuses a connection to {host} port {port}: {one_line(error.args[1])}" if refused
                    else "it closed the connection")
            raise ProbeError("unreachable", f"bastion {name}: {said}") from error

    def _channel(self, stack: contextlib.ExitStack, bastion: SshConnection, deadline: Deadline,
                 chain: Sequence[SshConnection]) -> paramiko.Channel:
        """To the host; where the bastion's transport turns out to be dead, once more over a new one."""
        place, keeps = (self._settings.hostname, self._settings.connect_port), self.keeps
        if not keeps:
            bastion._guard.require_no_wait(bastion._target.name)
        transport = stack.enter_context((bastion._lent if keeps else bastion._logged_in)(deadline, chain))
        was_old = transport.is_old
        try:
            return transport.open_in_time(place, deadline)
        except (ProbeError, paramiko.SSHException, EOFError, OSError) as error:
            if not was_old or deadline.over or isinstance(error, paramiko.ChannelException):
                raise
        return stack.enter_context(bastion._lent(deadline, chain)).open_in_time(place, deadline)

    @contextlib.contextmanager
    def _logged_in(self, deadline: Deadline, chain: Sequence[SshConnection]) -> Iterator[SshTransport]:
        """A transport after key check and login."""
        tried: list[str] = []   # types of key that the host showed and that a pin without type is not
        while True:
            with self._connected(deadline, chain, tried) as (transport, offered):
                if self._verified(offered, transport, tried):
                    with self._guard.attempt(self._target.name, deadline, self.record):
                        self._login(transport, deadline)
                    yield transport
                    return

    @contextlib.contextmanager
    def _connected(self, deadline: Deadline, chain: Sequence[SshConnection], tried: Sequence[str] = (),
                   ) -> Iterator[tuple[SshTransport, str]]:
        """A transport and the key that the host showed; thread and socket end with the block."""
        with contextlib.ExitStack() as stack:
            sock = self._reach(stack, deadline, chain)
            transport = SshTransport(sock)
            try:
                with transport.explained():
                    self._prefer_known_types(transport, tried)
                    transport.start_client()
                    sock.limit = 2 << 20    # the output and its wrapping
                    key = transport.get_remote_server_key()
                    yield transport, identity(key.get_name(), key.asbytes())
            finally:
                transport.end()
                if transport.is_alive():
                    transport.join(1)       # before its descriptor is another connection's
                transport.close()
                sock.close()
                transport.forget()


# === PowerShell ==============================================================
# A script goes to a Windows host over pypsrp, text comes back. pypsrp sends by requests, which is given one socket
# that is open, secured and verified: certificate before password, deadline and cap on every read, and no second
# connection, whatever requests or urllib3 make of an answer. In the poller's thread.
# Gives: CLEANUP_TIME, GuardedSocket, missing_package, PowerShellConnection, TlsConnection
HTTP_CAUSES: dict[int, Cause] = {403: "auth", 502: "unreachable", 503: "unreachable", 504: "unreachable"}
SHELL_END = 5.0                 # seconds for a shell to be deleted; a tenth of it behind the deadline of a poll
CLEANUP_TIME = 5.0              # seconds for a script that has answered to say what it leaves
GATHER_TIME = 0.02              # seconds; rows that come faster are asked for together, for each request costs CPU
START_WINRM = "run `winrm quickconfig` there and check port and tls"
UNMAPPED = "the host refuses the client certificate, or wants one; for WinRM, map it to an account there"
EXTRAS = {"credssp": ["requests_credssp"], "kerberos": [] if sys.platform == "win32" else ["gssapi", "krb5"]}
TOO_MANY_SHELLS = 2150859173
WINRM_FAULTS: dict[int, tuple[Cause, str]] = {
    5: ("auth", "access denied: add the account to Remote Management Users, or correct configuration_name"),
    2150858793: ("timeout", "the script did not end in time; raise timeout"),
    TOO_MANY_SHELLS: ("protocol", "the account has too many shells open there; close them or raise MaxShellsPerUser"),
    2150858843: ("protocol", "the host closed the shell during the poll; see the event log of WinRM there"),
}


def script_fault(errors: Sequence[Any], settings: ResourceSettings) -> ProbeError:
    """Our error for what failed before it answered; `errors` are pypsrp's."""
    said, ids = str(errors[-1]) if errors else "no reason given", " ".join(str(error.fq_error) for error in errors)
    where, how = settings.session_configuration, f"register what `endpoint {settings.name}` prints"
    if settings.endpoint and "CommandNotFoundException" in ids:
        said = f"not restricted, or to something else (JEA): the endpoint {where} has no Get-Health; {how} there"
    elif "ScriptsNotAllowed" in ids or "InDataSection" in ids:
        said = f"the endpoint {where} is restricted (JEA); {how}, and write `endpoint: true`; it said: {said}"
    return ProbeError("protocol", said if how in said else f"the script failed: {said}")


def certificate_identity(connection: ssl.SSLSocket) -> str:
    """`certificate SHA256:…`, hexadecimal as Windows and openssl show it."""
    return f"certificate SHA256:{hashlib.sha256(connection.getpeercert(True) or b'').hexdigest()}"


def guessed_binding(opened: object) -> str:
    """That a login was bound to its TLS connection by a guess, which a host that insists on it refuses (RFC 5929)."""
    with contextlib.suppress(UnsupportedAlgorithm, AttributeError, OSError, ValueError):
        shown = opened.getpeercert(True) if isinstance(opened, ssl.SSLSocket) else None     # raises if closed meanwhile
        if shown and not x509.load_der_x509_certificate(shown).signature_hash_algorithm:
            return "; the channel binding was a guess, for the signature of the host's certificate names no hash"
    return ""


def missing_package(auth: str) -> str | None:
    """What to do where the package of a way to log in is missing."""
    absent = any(importlib.util.find_spec(name) is None for name in EXTRAS.get(auth, ()))
    return f"auth {auth} needs a package: pip install pypsrp[{auth}]" if absent else None


def tls_fault(error: OSError, hint: str) -> ProbeError:
    """Our error for a broken connection or TLS handshake; `hint` says what may be wrong where nothing answers."""
    reason = str(getattr(error, "reason", "") or "")
    if isinstance(error, TimeoutError | ssl.SSLWantReadError | ssl.SSLWantWriteError):
        # Python takes a socket whose time ends at this very tick of the clock for one that never waits.
        return ProbeError("timeout", "no answer in time")
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return ProbeError("auth", UNMAPPED)
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return ProbeError("protocol", f"no TLS there ({reason}); check port and tls")
    return ProbeError("unreachable", f"the host closed the connection{hint}")


class GuardedSocket(HostSocket):
    """Turns a socket's errors into ProbeError here already: pypsrp would wait and try again."""

    limit = OUTPUT_BYTES
    hint = ""
    in_step = True      # False: an answer is lost or still to come, so nothing more can be asked
    logged_in = False

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            self.settimeout(self.deadline.left())
            yield
        except (OSError, ProbeError) as error:
            self.in_step = False
            raise (error if isinstance(error, ProbeError) else tls_fault(error, self.hint)) from error

    def end(self) -> None:
        """At once, also while a response that is still open holds it."""
        with contextlib.suppress(OSError):
            socket.close(self.detach())

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        with self.guarded():
            count = super().recv_into(buffer, nbytes or 0, flags)
            self.count(count)
            self.in_step = self.in_step and count > 0
        return count

    def sendall(self, octets: Any, flags: int = 0) -> None:
        with self.guarded():
            super().sendall(octets, flags)


class GuardedTlsSocket(GuardedSocket, ssl.SSLSocket):
    """The same with TLS, which calls these before there is a deadline."""

    recv, send = ssl.SSLSocket.recv, ssl.SSLSocket.send


@functools.cache
def system_authorities() -> ssl.SSLContext:
    """TLS that trusts the system's authorities; reading all of them takes 20 ms of CPU, hence once."""
    context = ssl.create_default_context()
    context.sslsocket_class = GuardedTlsSocket
    return context


class WinrmAdapter(requests.adapters.HTTPAdapter):
    """Sends a session's requests over one open connection, for NTLM and the encryption belong to it, and refuses
    what WinRM never answers."""

    def __init__(self, host: str, port: int, opened: GuardedSocket) -> None:
        super().__init__()
        self._opened = opened
        connection = urllib3.connection.HTTPConnection(host, port)
        connection.sock, connection.auto_open = opened, 0
        self._pool = urllib3.HTTPConnectionPool(host, port)
        self._pool.ConnectionCls = lambda **_: connection  # type: ignore[assignment]  # a factory

    def get_connection_with_tls_context(self, *args: Any, **settings: Any) -> urllib3.HTTPConnectionPool:
        return self._pool

    def send(self, request: Any, *args: Any, **settings: Any) -> requests.Response:
        response = super().send(request, *args, **settings)
        if response.status_code == 401 and self._opened.logged_in:      # or it would be done unasked
            self._opened.in_step = False
            raise AuthenticationError("the host wants another login")
        if response.status_code not in (200, 400, 401, 500):    # 400 and 500 carry faults
            cause = HTTP_CAUSES.get(response.status_code, "protocol")
            error = NotAllowed if cause == "auth" else ProbeError
            raise error(cause, f"HTTP {response.status_code}, which WinRM never answers; {START_WINRM}")
        if "Content-Encoding" in response.headers:  # 64 KB can unpack to 64 MB
            raise ProbeError("protocol", "the answer is compressed, which WinRM never does; check port and proxies")
        return response


class Pipeline(PowerShell):
    """A script in a runspace pool, which is read while it runs."""

    exit_code: int | None = None    # what `exit` in it said: that is told the session's host, which is us

    def begin(self, script: str, settings: ResourceSettings) -> None:
        """Until the host has the script. Raises what pypsrp raises."""
        if settings.endpoint:
            nonce, _, first = script.partition(" ")
            self.add_cmdlet("Get-Health").add_parameters({"Nonce": nonce, "First": int(first or 0)})
        else:
            # In a scope of its own, or the next one in its runspace saw it all. PowerShell compiles each script that it
            # gets, but what this cmdlet runs it knows by its whole text from the poll before.
            self.add_script("Invoke-Expression $args[0]", use_local_scope=True).add_argument(script)
        self.begin_invoke()

    def follow(self, output: Output, deadline: Deadline, settings: ResourceSettings) -> None:
        """Until the script ends, or need not say more, or is late; then it is stopped. Raises ProbeError, and what
        pypsrp raises."""
        enough, wait, quick = False, 1.0, False
        while wait > 0 and not enough and (self.output or self.state == PSInvocationState.RUNNING):
            if self.output:
                enough = self._pass(output)
                continue
            wait = round(min(output.due_mono - time.monotonic(), deadline.left() - 0.3), 3)   # then to answer "not yet"
            if wait > 0:
                time.sleep(GATHER_TIME if quick else 0)
                asked_mono = time.monotonic()
                self.poll_invoke(timeout=cast(int, wait))   # sent as PT9.7S, a valid duration
                quick = time.monotonic() - asked_mono < GATHER_TIME
        if self.state == PSInvocationState.RUNNING and not output.whole:
            wsman = self.runspace_pool.connection
            seconds, wsman.operation_timeout = wsman.operation_timeout, 1   # what cannot be stopped is left alone
            with contextlib.suppress(Exception):    # that it is late is what counts
                self.stop()
            wsman.operation_timeout = seconds
        if wait <= 0:
            raise ProbeError(*WINRM_FAULTS[2150858793])
        if self.state == PSInvocationState.FAILED:
            raise script_fault(self.streams.error, settings)

    def ends(self, output: Output) -> bool:
        """Whether it ends by itself, now that it has said all but what it leaves; the host forgets it. Raises what
        pypsrp raises."""
        until = Deadline(CLEANUP_TIME)
        while self.state == PSInvocationState.RUNNING and not until.over:
            self.poll_invoke(timeout=1)
        while self.output:
            self._pass(output)
        self.close()
        return bool(self.state == PSInvocationState.COMPLETED)

    def _pass(self, output: Output) -> bool:
        return output.take(f"{self.output.pop(0)}\n".encode())

    def _process_pipeline_host_call(self, message: Any) -> Any:
        if str(message.data.mi) == "SetShouldExit":
            self.exit_code = message.data.mp[0]
        return super()._process_pipeline_host_call(message)


class TlsConnection(Connection):
    """The way to a host whose certificate is checked before anything is sent: by its authority, or a pin."""

    HINT = ""       # what may be wrong where nothing answers

    def offered_key(self, deadline: Deadline) -> str:
        """The certificate that the host shows, unchecked; nothing else is done."""
        if not self._settings.tls:
            raise UsageError(f"{self._target.name} has no certificate: tls is off")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with self._open(context, deadline) as secured:
            return certificate_identity(secured)

    def _open(self, context: ssl.SSLContext | None, deadline: Deadline) -> Any:
        """A connection after the TLS handshake. Raises SSLCertVerificationError and ProbeError."""
        settings = self._settings
        try:
            plain = connect_tcp(self._context.resolver, settings.hostname, settings.connect_port, deadline,
                                is_added=self._target.is_added)
        except ProbeError as error:
            hint = self.HINT if "port" in str(error) else ""
            raise ProbeError(error.cause, f"{error}{hint}") from error
        with plain:     # after a good handshake it is detached, and this closes nothing
            try:
                plain.settimeout(deadline.left())
                secured: Any = context.wrap_socket(plain, server_hostname=settings.hostname) if context else \
                    GuardedSocket(fileno=plain.detach())
                secured.address, secured.hint = plain.address, self.HINT
                return secured
            except ssl.SSLCertVerificationError:
                raise
            except OSError as error:
                raise tls_fault(error, self.HINT) from error

    def _verified(self, deadline: Deadline) -> GuardedSocket:
        """A connection whose certificate is checked before any secret is sent. Raises ProbeError."""
        name, pin = self._target.name, self._settings.certificate_fingerprint or self._target.host_key or ""
        pin = pin.rpartition("SHA256:")[2].replace(":", "").lower()     # whichever way it is written
        try:
            opened: Any = self._open(self._tls_context(bool(pin)) if self._settings.tls else None, deadline)
        except ssl.SSLCertVerificationError as error:
            offered = self.offered_key(deadline)
            raise ProbeError("host_key", f"certificate not trusted ({error.verify_message}): offered {offered}; "
                             f"to accept it: trust {name}, or name its ca_file") from error
        opened.deadline = deadline
        if self._settings.tls and pin and (shown := certificate_identity(opened)) != f"certificate SHA256:{pin}":
            opened.close()
            raise ProbeError("host_key", f"certificate changed: expected SHA256:{pin}, offered {shown}; "
                             f"no password was sent; if the change is right: trust {name}")
        return cast(GuardedSocket, opened)

    def _tls_context(self, pinned: bool) -> ssl.SSLContext:
        """How the host's certificate is checked and ours shown. Raises ProbeError."""
        settings, phrase = self._settings, self._settings.key_passphrase
        if not (pinned or settings.ca_file or settings.certificate_file):
            return system_authorities()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.sslsocket_class = GuardedTlsSocket
        try:
            if pinned:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            elif settings.ca_file:
                context.load_verify_locations(settings.ca_file)
            else:
                context.load_default_certs()
            if settings.certificate_file:
                context.post_handshake_auth = True      # WinRM asks for it once it has the request
                secret = phrase.get_secret_value() if phrase else ""
                context.load_cert_chain(settings.certificate_file, settings.key_file, secret)
        except (OSError, ValueError) as error:
            raise ProbeError("credential", f"ca_file, certificate_file or key_file cannot be used: {error}") from error
        return context


@contextlib.contextmanager
def explained(settings: ResourceSettings, opened: GuardedSocket | None = None) -> Iterator[None]:
    """Our error for whatever the host's bytes make pypsrp raise."""
    try:
        yield
    except ProbeError:
        raise
    except ImportError as error:
        raise ProbeError("credential", missing_package(settings.auth) or one_line(str(error))) from error
    except AuthenticationError as error:
        bound = guessed_binding(opened) if settings.auth in ("negotiate", "ntlm", "kerberos") else ""
        refused = f"login as {settings.username} refused; check username, password and auth{bound}"
        raise ProbeError("auth", UNMAPPED if settings.auth == "certificate" else refused) from error
    except SpnegoError as error:    # of Kerberos: no ticket, or a password that the KDC refuses
        raise ProbeError("auth", f"no login as {settings.username}: {one_line(str(error))}") from error
    except WSManFaultError as error:
        unknown: tuple[Cause, str] = ("protocol", f"WinRM fault {error.code}: {error.reason}")
        fault = NotAllowed if error.code == 5 else ProbeError
        raise fault(*WINRM_FAULTS.get(error.code or 0, unknown)) from error
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
        raise ProbeError("unreachable", "the host closed the connection during the poll") from error
    except Exception as error:      # pypsrp lets through whatever its parsers raise
        kind = type(error).__name__
        raise ProbeError("protocol", f"the answer is not WinRM's; check port and proxies ({kind})") from error


def new_pool(wsman: WSMan, settings: ResourceSettings, keeps: bool) -> RunspacePool:
    """Room for a script behind each check that cannot be stopped. A host drops a forgotten shell after the idle time,
    and takes no less than 60 seconds."""
    idle = settings.interval + settings.timeout + 30 if keeps else 0
    return RunspacePool(wsman, configuration_name=settings.session_configuration,
                        idle_timeout=math.ceil(max(60, idle)), max_runspaces=1 + len(settings.checks))


def delete_shells(shells: list[WinRS], wsman: WSMan) -> None:
    """Each is tried once; the host ends it after its idle time. Raises what pypsrp raises, except faults."""
    while shells:
        shell = shells.pop()
        shell.wsman = wsman
        with contextlib.suppress(WSManFaultError):
            shell.close()


class WinrmSession(HostSession):
    """A login, and the shell that its scripts run in. Those die apart: a shell goes on with the next login."""

    alive = True        # the next login finds out what became of the shell

    def __init__(self, opened: GuardedSocket, pool: RunspacePool, changed: Callable[[], bool],
                 settings: ResourceSettings, keeps: bool) -> None:
        self.opened, self.pool, self.changed, self._settings, self._keeps = opened, pool, changed, settings, keeps
        self._wsman, self._used = pool.connection, False
        self.old: list[WinRS] = []      # shells of dead connections, which go after the first poll
        self.deadline = Deadline(SHELL_END)     # of whoever waits for its end: a poll, or nobody

    @property
    def stale(self) -> bool:
        return self.hung_up or self.changed()

    @property
    def hung_up(self) -> bool:
        """Nothing comes unasked but the end: a host hangs up after two minutes, or says so with its last answer."""
        opened = self.opened
        return not opened.in_step or opened.fileno() < 0 or urllib3.util.wait_for_read(opened, 0)

    def open_shell(self) -> None:
        """Raises what pypsrp raises."""
        try:
            self.pool.open()
        except WSManFaultError as error:
            if error.code != TOO_MANY_SHELLS or not self.old:
                raise
            delete_shells(self.old, self._wsman)    # one may have been the last that the account can have
            self.pool = new_pool(self._wsman, self._settings, self._keeps)
            self.pool.open()

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        """One shell for all scripts; a new one's is replaced where a script takes it along."""
        used, self._used, pipelines = self._used or self.resumed, True, list[Pipeline]()
        self.deadline = deadline
        self.opened.begin(Deadline(deadline.left() / 3) if used else deadline)
        try:
            while script:
                pipelines.append(Pipeline(self.pool))
                fault = self._run(pipelines[-1], script, output, deadline)
                if fault and (not self.opened.in_step or (used and fault.cause != "timeout")):
                    raise fault
                script = output.rest(pipelines[-1].exit_code, fault)
                if script and fault and fault.cause != "timeout":
                    with contextlib.suppress(WSManFaultError):
                        self.pool.close()
                    self.pool = new_pool(self._wsman, self._settings, self._keeps)
            if self._keeps:
                with contextlib.suppress(Exception):    # what was answered counts
                    self.fit = all(pipeline.ends(output) for pipeline in pipelines) and output.clean
            return True
        finally:
            self.pool.user_events.clear()
            self._delete_old()
            self.opened.pause()

    def _run(self, pipeline: Pipeline, script: str, output: Output, deadline: Deadline) -> ProbeError | None:
        settings = self._settings
        try:
            with explained(settings):
                if self.pool.state != RunspacePoolState.OPENED:
                    self.pool.open()
                self.fit = False    # whether the host has it is not known from here on
                try:
                    pipeline.begin(script, settings)
                except AuthenticationError:     # it has not
                    self.fit = pipeline.state == PSInvocationState.NOT_STARTED
                    raise
                self.opened.deadline = deadline
                pipeline.follow(output, deadline, settings)
        except ProbeError as error:
            return error
        return None

    def _delete_old(self) -> None:
        if self.old and self.opened.in_step:
            self._begin_end()
            with contextlib.suppress(Exception):    # the poll's own result does not give way to this error
                delete_shells(self.old, self._wsman)

    def _begin_end(self) -> None:
        self.opened.begin(Deadline(min(SHELL_END, max(SHELL_END / 10, self.deadline.remaining))))

    def close(self) -> None:
        self._delete_old()
        self._begin_end()
        with contextlib.suppress(Exception):
            if self.opened.in_step and self.pool.connection is self._wsman:     # no other login has it
                self.pool.close()
        self._wsman.close()
        self.opened.end()


class PowerShellConnection(TlsConnection):
    """One resource over PowerShell Remoting (pypsrp)."""

    HINT = f"; {START_WINRM}"
    # Copied, for each new one rewrites ElementTree's table of prefixes: what others send just then is no XML.
    WSMAN: ClassVar = WSMan("localhost")
    _left: WinrmSession | None = None   # whose connection died before its shell was deleted

    def drop(self) -> None:
        session = self.keeper.session
        super().drop()
        if isinstance(session, WinrmSession) and session.pool.state == RunspacePoolState.OPENED:
            self._left = session

    def close(self) -> None:
        if isinstance(self.keeper.session, WinrmSession):
            self.keeper.session.deadline = Deadline(SHELL_END)
        self.drop()
        left, self._left = self._left, None
        if left:
            with contextlib.suppress(ProbeError), self._login(Deadline(2 * SHELL_END), left) as (opened, wsman):
                delete_shells([*left.old, left.pool.shell], wsman)
                opened.end()

    def open_session(self, deadline: Deadline) -> WinrmSession:
        before = cast("WinrmSession | None", self.keeper.session) or self._left
        settings = self._settings
        if before:
            before.deadline = deadline
        with self._login(deadline, before) as (opened, wsman), contextlib.ExitStack() as stack:
            resumed = self._resumed(before, wsman) if before else None
            session = WinrmSession(opened, resumed or new_pool(wsman, settings, self.keeps), self._changes(opened),
                                   settings, self.keeps)
            session.resumed = bool(resumed)
            if before and before.hung_up:   # else it can delete its shell itself
                session.old = [*before.old, *([] if resumed else [before.pool.shell])]
            if not resumed:
                wsman.session_id, wsman.operation_timeout = str(uuid.uuid4()), max(1, int(settings.timeout))
                stack.callback(session.close)
                session.open_shell()
            stack.pop_all()
        self._left = None
        return session

    @contextlib.contextmanager
    def _login(self, deadline: Deadline, before: WinrmSession | None) -> Iterator[tuple[GuardedSocket, WSMan]]:
        """A connection whose first request logs in; what fails inside ends it. Raises ProbeError."""
        opened = self._verified(deadline)   # before the guard: a host that does not answer is no login
        with contextlib.ExitStack() as stack:
            stack.callback(opened.end)
            wsman = copy.copy(before.pool.connection if before else self.WSMAN)
            with self._guard.attempt(self._target.name, deadline, self.record), explained(self._settings, opened):
                wsman.transport = self._transport(opened)
                yield opened, wsman
            stack.pop_all()
            opened.logged_in = True

    def _made_from(self) -> list[Any]:
        times = []
        for file in filter(None, (getattr(self._settings, name) for name in FILES)):
            try:
                times.append(file.stat().st_mtime_ns)
            except FileNotFoundError:
                times.append(0)
            except OSError as error:
                raise ProbeError("credential", f"{file} cannot be read: {error.strerror}") from error
        return times

    def _resumed(self, before: WinrmSession, wsman: WSMan) -> RunspacePool | None:
        """The shell of the last login, if it is still there and fit."""
        pool, shell = before.pool, copy.copy(before.pool.shell)
        shell.wsman = wsman
        if not before.fit or before.changed():
            return None
        try:
            shell._get_shell()      # until it answers the one before goes on with it
        except WSManFaultError:
            return None
        except (ProbeError, requests.RequestException):     # nor will it be asked again
            before.fit = False
            raise
        pool.connection = pool.shell.wsman = wsman
        return pool

    def _transport(self, opened: GuardedSocket) -> Any:
        settings = self._settings
        transport = type(self.WSMAN.transport)(
            settings.hostname, settings.connect_port, settings.username,
            settings.secrets.get("password"), settings.tls, auth=settings.auth, no_proxy=True,
            certificate_pem=settings.certificate_file and str(settings.certificate_file),
            certificate_key_pem=settings.key_file and str(settings.key_file))
        session = transport._build_session()
        session.trust_env = False       # a .netrc would replace the Authorization header
        session.verify = False          # the connection is verified
        session.adapters.clear()
        session.mount("http", WinrmAdapter(settings.hostname, settings.connect_port, opened))
        transport.session = session
        return transport


# === Local ===================================================================
# A script goes to a shell of this machine, and what it started ends with it. A shell of UNIX is new for each poll; a
# powershell.exe takes seconds of CPU time to start, so one serves poll after poll. In the poller's thread.
# Gives: enclose, end_process_group, LocalConnection, LocalPowerShell
LOOK_AGAIN = 0.01               # seconds between two looks into a pipe of Windows, where nothing waits for one


def start_shell(command: Sequence[str], script: str, **options: Any) -> subprocess.Popen[bytes]:
    """A shell of this machine with its script on stdin, where it finds the end. Raises ProbeError."""
    try:
        with tempfile.TemporaryFile() as feed:      # a pipe could block on a shell that does not read
            feed.write(script.encode())
            feed.seek(0)
            return subprocess.Popen(command, stdin=feed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    except OSError as error:
        raise ProbeError("protocol", f"{command[0]} does not start: {error.strerror}") from error


def read_into(output: Output, process: subprocess.Popen[bytes], deadline: Deadline) -> bool:
    """Reads what a process prints until it ends or enough was said; False where that is late."""
    assert process.stdout
    with selectors.DefaultSelector() as selector, contextlib.suppress(subprocess.TimeoutExpired):
        selector.register(process.stdout, selectors.EVENT_READ)
        while (seconds := deadline.remaining) > 0 and selector.select(seconds):
            chunk = os.read(process.stdout.fileno(), READ_BYTES)
            if output.take(chunk):
                return True
            if not chunk:
                process.wait(0.5)   # the output ends before the process does
                return True
    return False


def end_process_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all of its session: `timeout` and background jobs have groups of their own."""
    process.kill()
    with contextlib.suppress(OSError):
        if os.path.isdir("/proc/self"):     # an image may have no ps
            listed = os.listdir("/proc")
        else:
            listed = subprocess.run(["ps", "-A", "-o", "pid="], capture_output=True, encoding="ascii",
                                    check=False).stdout.split()
        for pid in map(int, filter(str.isdecimal, listed)):
            with contextlib.suppress(OSError):
                if sys.platform != "win32" and os.getsid(pid) == process.pid:
                    os.kill(pid, signal.SIGKILL)


class LocalConnection(Connection):
    """This machine, through its own shell."""

    SHELL: ClassVar = ["/bin/sh", "-s"]

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        with start_shell(self.SHELL, script, start_new_session=True) as process:
            try:
                return read_into(output, process, deadline)
            finally:
                end_process_group(process)


def enclose(process: subprocess.Popen[bytes], memory: int = 0) -> Callable[[], object]:
    """Puts a process, with all that it will start, into a job: its only handle ends all of it when it is closed, by
    what is given here or because this process was killed. `memory`: bytes that all of it may have, or no limit."""
    kernel32 = cast(Any, ctypes).WinDLL("kernel32")     # our own, for its types are ours
    kernel32.CreateJobObjectW.restype = ctypes.c_void_p
    job = ctypes.c_void_p(kernel32.CreateJobObjectW(None, None))
    # JOBOBJECT_EXTENDED_LIMIT_INFORMATION, aligned for this process, with KILL_ON_JOB_CLOSE and perhaps JOB_MEMORY.
    limits = struct.pack("@2qL2PLP2L6Q4P", 0, 0, 0x2200 if memory else 0x2000, *[0] * 13, memory, 0, 0)
    kernel32.SetInformationJobObject(job, 9, limits, len(limits))
    kernel32.AssignProcessToJobObject(job, ctypes.c_void_p(int(cast(Any, process)._handle)))
    return functools.partial(kernel32.CloseHandle, job)


class LocalSession(HostSession):
    """A powershell.exe that runs one script after another, each in a scope of its own."""

    # No command line shows a script. The first one is stdin, where what a check starts finds the end. Those behind it
    # have a pipe of their own, a line each: without full language there is none, and the process ends.
    SHELL: ClassVar = ["powershell.exe", "-NoLogo", "-NoProfile", "-NonInteractive", "-Command"]
    READER = ("& { $args[0]; $in = New-Object IO.Pipes.AnonymousPipeClientStream 'In', 'PIPE'; "
              "$in = New-Object IO.StreamReader $in; "
              "while ($null -ne ($line = $in.ReadLine())) { $line -replace [char]31, [char]10 } } "
              "(@($input) -join [char]10) | & { process { & { "
              "$nonce, $script = $args[0] -split [char]10, 2; '@{0} taken' -f $nonce; Invoke-Expression $script; "
              "if ($full) { '@{0} ready' -f $nonce } } $_ } }")
    # The rows of the answer have the nonce, too. Whatever else is printed counts for nothing. It is no part of the
    # script, which is the same at each poll, so that PowerShell need not compile it again.
    SCRIPT = "{0}\n{1}"

    def __init__(self, keeps: bool) -> None:
        self._keeps, self._said = keeps, b""    # what it said last, enough for a mark
        self._process: subprocess.Popen[bytes] | None = None
        self._end_all: Callable[[], object] = bool
        self._pipe: IO[bytes] | None = None     # for the scripts

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def stale(self) -> bool:
        return self._waiting > 0

    def run(self, script: str, output: Output, deadline: Deadline) -> bool:
        """One process for all scripts; another one where a check takes it along."""
        nonce, used, code = output.mark.decode().split()[0].lstrip("@"), self.alive, None
        self.fit = False
        while script:
            script = self.SCRIPT.format(nonce, script.rstrip())     # stdin has no other end of its last line
            if used:
                threading.Thread(target=self._send, args=(self._pipe, script), daemon=True).start()
            else:
                self._start(script)
            code = self._follow(output, deadline, f"@{nonce} taken".encode() if used else b"")
            script = output.rest(code, None)
            if script:
                self.close()
                used = False
        if self._keeps and output.whole and code == 0:
            sign, until_mono = f"@{nonce} ready\r\n".encode(), time.monotonic() + CLEANUP_TIME
            while not self._said.endswith(sign) and (chunk := self._read(until_mono)):
                output.take(chunk)
            self.fit = output.clean and self._said.endswith(sign)
        return code is not None

    def close(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            self._end_all()
            process.wait()
            cast("IO[bytes]", process.stdout).close()
        if self._pipe:
            with contextlib.suppress(OSError):      # it may hold what could not be sent
                self._pipe.close()

    def _start(self, script: str) -> None:
        read, write = os.pipe()
        self._pipe = os.fdopen(write, "wb")
        with os.fdopen(read, "rb") as end:
            if sys.platform == "win32":
                handle = msvcrt.get_osfhandle(end.fileno())
                os.set_handle_inheritable(handle, True)
                self._process = start_shell(
                    [*self.SHELL, self.READER.replace("PIPE", str(handle))], script,
                    startupinfo=subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]}),
                    creationflags=subprocess.CREATE_NO_WINDOW)      # a console of its own, which nobody sees
                self._end_all = enclose(self._process)

    @staticmethod
    def _send(pipe: IO[bytes], script: str) -> None:
        """Beside the poll, for who does not read would hold it up."""
        with contextlib.suppress(OSError, ValueError):      # it has ended
            pipe.write(script.replace("\n", "\x1f").encode() + b"\n")
            pipe.flush()

    @property
    def _waiting(self) -> int:
        """Bytes that it has printed."""
        if sys.platform == "win32" and self._process and self._process.stdout:
            with contextlib.suppress(OSError):      # nobody has the other end any more
                return int(_winapi.PeekNamedPipe(msvcrt.get_osfhandle(self._process.stdout.fileno()), 0)[0])
        return 0

    def _read(self, until_mono: float) -> bytes:
        """What it prints; nothing where it ended, or that is late."""
        assert self._process and self._process.stdout
        ended = False
        while not (waiting := self._waiting) and not ended and time.monotonic() < until_mono:
            ended = not self.alive      # and may have printed until then
            time.sleep(0 if ended else LOOK_AGAIN)
        chunk = os.read(self._process.stdout.fileno(), READ_BYTES) if waiting else b""
        self._said = self._said[-100:] + chunk
        return chunk

    def _follow(self, output: Output, deadline: Deadline, sign: bytes) -> int | None:
        """Until the script ends, or need not say more: the exit code, None where it did not end by itself in time.
        Raises ProbeError where one that served a poll before gives no sign, or ends otherwise than by a check."""
        ends_mono = time.monotonic() + deadline.left()
        silent_mono = time.monotonic() + deadline.left() / 3 if sign else math.inf
        while chunk := self._read(min(output.due_mono, ends_mono, silent_mono)):
            if sign in self._said:
                silent_mono = math.inf
            if output.take(chunk):
                return 0 if output.whole else None
        code = self._process.poll() if self._process else None
        if silent_mono < math.inf or (sign and code is not None and not output.exits):
            raise ProbeError("unreachable", "the powershell.exe that was kept hangs or was ended")
        return code


class LocalPowerShell(Connection):
    """This machine, where it is Windows."""

    def __init__(self, target: Target, guard: LoginGuard, context: ConnectionContext) -> None:
        super().__init__(target, guard, context)
        self.keeper = SessionKeeper(0)      # what is not logged in need not be again

    def open_session(self, deadline: Deadline) -> HostSession:
        return LocalSession(self.keeps)


# === Outcomes ================================================================
# How a service or a check turned out: an exit status and what was printed go in, an Outcome comes out. Pure, and the
# same for every platform.
# Gives: kept, KEPT_BYTES, CONTROL, Outcome, Judge, printed, by_status, by_nagios, JUDGES
KEPT_BYTES = 4096               # bytes of text kept of a service or check; the script has this number, too
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
LABELS_MAX = 64                 # labels of a check that are kept, of 100 characters each at most
# A word of performance data, 'label'=value[UOM];warn;crit;min;max, else anything up to the next word. Each part has a
# longest length, or a long line would take a second.
PERFORMANCE = re.compile(
    r"(?:'((?:[^'\n]|''){1,100})'|([^\s=']{1,100}))=(-?(?:[0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})"
    r"(?:[eE][+-]?[0-9]{1,3})?)[^\W\d_]{0,9}%?(?:;\S*)?(?!\S)|'(?:[^'\n]|'')*(?:'\S*|(?=\n)|\Z)|\S+")


@dataclass(frozen=True)
class Outcome:
    """A service or check: good or not, its state or output (KEPT_BYTES at most), whether it is good with a warning,
    and the numbers of its performance data by label: a name space of its own, so that none passes for another."""

    good: bool
    text: str
    degraded: bool = False
    metrics: Mapping[str, float] = dataclass_field(default_factory=dict)


Judge = Callable[[int, str], Outcome]  # of an exit status and output


def printed(text: str) -> str:
    """Without control characters; what was cut at KEPT_BYTES says so, for a number at its end is half a number."""
    return text.translate(CONTROL).strip() + ("…" if len(text.encode(errors="replace")) >= KEPT_BYTES else "")


def kept(text: str) -> str:
    return text.encode(errors="replace")[:KEPT_BYTES].decode(errors="ignore")


def by_status(status: int, text: str) -> Outcome:
    return Outcome(status == 0, text or (f"exit status {status}" if status >= 0 else "no exit status"))


def by_nagios(status: int, text: str) -> Outcome:
    """As the Monitoring Plugins guidelines have it: 0 good, 1 and 3 (it cannot tell) degraded, all else bad. What
    follows a `|` in the first line, and a further one in those after it, is performance data."""
    first, _, after = text.partition("\n")
    shown, _, data = first.partition("|")
    more, _, rest = after.partition("|")
    found: dict[str, float] = {}
    for quoted, plain, value in PERFORMANCE.findall(f"{data}\n{rest}") if 0 <= status <= 3 else ():
        if value and abs(float(value)) < 1e18 and len(found) < LABELS_MAX:
            found.setdefault(quoted.replace("''", "'") or plain, float(value))
    told = by_status(status, f"{shown.strip()}\n{more}".strip())
    return Outcome(status in (0, 1, 3), told.text, status in (1, 3), found)


JUDGES: Mapping[str, Judge] = {"plain": by_status, "nagios": by_nagios}    # of checks, by their `exit`


# === Probes ==================================================================
# A platform is a table of rows: name, command, parser. One script of sh runs a whole table, so that a poll is one
# round trip; its output goes in, a sample comes out. Parsers are pure and raise ValueError, which becomes the
# problem shown in the metric's place.
# Gives: INSTALLED, NOT_KNOWN, PROBLEM_CHARS, DETAILS, CpuTicks, Reading, Sample, percent, make_sample, build_script,
# end_mark, last_section, not_run, parse_output

NOT_KNOWN = "not known on this platform"
PROBLEM_CHARS = 200             # characters of a problem's one line
DETAILS = frozenset({"hostname", "os", "kernel", "uptime_seconds", "cpu_count", "skipped_filesystems",
                     "hidden_filesystems", "memory_limit"})
# No disks: what lies in memory, images that are always full, views of another filesystem, and other machines'.
NO_DISK = re.compile(
    r"squashfs|erofs|cramfs|romfs|iso9660|udf|cd9660|(dev)?tmpfs|ramfs|rootfs|mfs|efivarfs|overlay(fs)?|fuse(?!blk$).*"
    r"|(au|union|null|ecrypt|auto|lo|name|mnt|ct|obj|share|kern|pty|dev|fdesc|lin?sys)fs|map|dev|fd|none|(lin)?procfs?"
    r"|9p|virtiofs|vboxsf|drvfs|nfs[0-9]*|cifs|smb3|smbfs|afpfs|ceph|lustre|gpfs"
)
# A row of df: device, used, available, used and free inodes, mount point. Word by word, or a long line would take
# a second.
DF_ROW = re.compile(r"\s*(\S+(?:\s+\S+)*?)\s+[0-9]{1,18}\s+(-?[0-9]{1,18})\s+(-?[0-9]{1,18})\s+[0-9]+%"
                    r"(?:\s+([0-9]{1,18})\s+([0-9]{1,18})\s+[0-9-]+%?)?\s+(/.*)")
# They count in their pool but are not shown: volumes with one of these flags, and parts of macOS itself.
READ_ONLY = frozenset({"ro", "read-only"})
MACOS_PARTS = re.compile(r"/System/Volumes/(?!Data$)|/private/var/vm$")


class CpuTicks(NamedTuple):
    """Counters since the start of the machine; cpu_percent needs the difference of two."""

    busy: float
    total: float


# None: this machine has no such thing. In a mapping of metrics a text is a problem.
Reading = str | float | None | CpuTicks | Mapping[str, float | str]


# What an endpoint says of itself: its format and a digest of each `service NAME` and `check NAME`, in their order.
INSTALLED: TypeAdapter[tuple[int, dict[str, str]]] = TypeAdapter(
    tuple[Annotated[int, Field(ge=0, le=1000)], dict[str, str]])


@dataclass(frozen=True)
class Sample:
    """What one poll read. A metric that could not be read is in `problems` (one line why) and never zero;
    cpu_percent is in neither at the first poll and after a restart of the machine."""

    details: Mapping[str, str | float]
    metrics: Mapping[str, float]
    ticks: CpuTicks | None
    services: Mapping[str, Outcome]
    checks: Mapping[str, Outcome]
    problems: Mapping[str, str]
    # For the next poll: polls in a row whose CPU counters gave no cpu_percent, mount points that were writable, and
    # number and begin of a df that had not ended.
    still: int = dataclass_field(default=0, compare=False)
    writable: frozenset[str] = dataclass_field(default=frozenset(), compare=False)
    stuck: tuple[str, ...] = dataclass_field(default=(), compare=False)
    endpoint: str = dataclass_field(default="", compare=False)      # what an endpoint says of itself

    @property
    def empty(self) -> bool:
        return not (self.details or self.metrics or self.ticks or self.services or self.checks)

    def readings(self, metric: str) -> list[tuple[str, float]]:
        """Every reading of a metric, such as `disk_percent /` and `disk_percent /var` of disk_percent."""
        return [(name, value) for name, value in self.metrics.items() if name.partition(" ")[0] == metric]

    def to_json(self) -> str:
        """For the pages: an object with the names of the fields; without what only a poll needs."""
        fields = self.__dataclass_fields__.keys() - {"ticks", "still", "writable", "stuck", "endpoint"}
        return json.dumps({field: getattr(self, field) for field in fields}, default=vars)


class Probe(NamedTuple):
    """A row of a table."""

    name: str
    command: str
    parse: Callable[[str], Reading]


class CommandSet(NamedTuple):
    """A platform's table: its `uname -s` (a pattern of sh), its rows, how to ask for a service (the quoted name is
    {}) and how to judge exit status and output."""

    uname: str
    probes: tuple[Probe, ...]
    service: str
    state: Judge


def _number(text: str) -> float:
    """The first word, a plain decimal: no sign, exponent, nan or decimal comma."""
    word = next(iter(text.split(None, 1)), "")
    if not re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,18})?", word):
        raise ValueError(f"{word[:40]!r} is not a number")
    return float(word)


def _count(text: str) -> float:
    count = _number(text)
    if not 1 <= count <= 1e6:
        raise ValueError(f"{count:g} is no count of CPUs")
    return count


def percent(part: float, whole: float) -> float:
    if not 0 <= part <= whole or not whole:
        raise ValueError(f"{part:g} of {whole:g} is no share")
    return 100 * part / whole


def cpu_percent(before: CpuTicks | None, now: CpuTicks) -> float | None:
    """None without an earlier count and where the counters began anew. Idle time may have a clock of its own: up to
    a hundredth less than idle is idle."""
    busy, total = (now.busy - before.busy, now.total - before.total) if before else (0.0, 0.0)
    return percent(max(busy, 0.0), total) if -0.01 * total <= busy <= total != 0 else None


def make_sample(rows: Mapping[str, Callable[[], Reading]], problems: dict[str, str], previous: CpuTicks | None,
                services: Mapping[str, Outcome], checks: Mapping[str, Outcome]) -> Sample:
    """A sample of what `rows` give, details and metrics; a ValueError is one more of the problems."""
    readings: dict[str, Reading] = {}
    ticks = None
    for name, read in rows.items():
        try:
            value = read()
        except ValueError as error:
            problems[name.partition(" ")[0]] = " ".join(str(error).split())[:PROBLEM_CHARS]
            continue
        if isinstance(value, CpuTicks):
            ticks, value = value, cpu_percent(previous, value)
        readings.update(value if isinstance(value, Mapping) else {name: value})
    details = {name: readings.pop(name) for name in [*readings] if name in DETAILS}
    problems |= {name: value[:PROBLEM_CHARS] for name, value in readings.items() if isinstance(value, str)}
    return Sample(
        {name: value for name, value in details.items() if isinstance(value, (str, float))},
        {name: value for name, value in readings.items() if isinstance(value, float)},
        ticks, services, checks, problems)


def _line(text: str) -> str:
    """One line of at most PROBLEM_CHARS."""
    line = " ".join(text.split())[:PROBLEM_CHARS]
    if not line:
        raise ValueError("no output")
    return line


def _named(text: str) -> dict[str, str]:
    """Lines such as `MemTotal: 16 kB`, `Pages free: 5.` or `hw.ncpu: 4`."""
    lines = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.rstrip(". ") for key, _, value in lines}


def _sum(named: Mapping[str, str], *names: str) -> float:
    missing = [name for name in names if name not in named]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    return sum(_number(named[name]) for name in names)


def _since_boot(text: str) -> float:
    """kern.boottime, then the machine's own time of day: the seconds between."""
    boot, now = re.search(r"sec = ([0-9]{1,12})\b", text), _number(text.rpartition("\n")[2])
    if not boot or float(boot[1]) > now:
        raise ValueError("no boot time before now")
    return now - float(boot[1])


def _ticks(counters: Sequence[str], idle: slice) -> CpuTicks:
    times = [_number(counter) for counter in counters]
    if len(times) < idle.stop:
        raise ValueError("too few CPU counters")
    return CpuTicks(busy=sum(times) - sum(times[idle]), total=sum(times))


def _linux_ticks(text: str) -> CpuTicks:
    """user nice system idle iowait irq softirq steal: waiting for a disk is idle; what the hypervisor stole
    is busy, for no work got it. The guest columns after that are already in user."""
    return _ticks(text.partition("\n")[0].split()[1:9], slice(3, 5))


def _ps_cpu(text: str) -> float:
    """The number of CPUs, then each process's decaying average: no command of macOS tells its counters."""
    count, *shares = text.split() or [""]
    if not shares:
        raise ValueError("no processes")
    return min(100.0, sum(map(_number, shares)) / _count(count))


CGROUPS = (     # limit, used, and what of it is cache: version 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _load_per_cpu(text: str) -> float:
    """The number of CPUs, then a line with the load of 1, 5 and 15 minutes, bare or of uptime(1)."""
    lines = text.splitlines() or [""]
    load = lines[-1].rpartition("average")[2].lstrip("s:{ ").partition(" ")[0]
    return _number(load.rstrip(",")) / _count(lines[0])


def _linux_memory(text: str) -> Reading:
    """Of the container (what docker and podman call used) where it has a limit below the machine's memory, else of
    the machine. The ARC of ZFS above its floor is available; in a container it is the host's."""
    named = {}
    for line in text.splitlines():      # such as `/proc/meminfo:MemTotal: 16 kB` and `…/arcstats:size 4 123`
        words = line.removesuffix(" kB").rpartition("/")[2].replace(":", " ").split()
        if len(words) > 1:
            named[words[len(words) > 2]] = words[-1]
    total = _sum(named, "MemTotal")
    for limit, used, cache in CGROUPS:
        # "no limit" is a word, or more than _number() takes
        if re.fullmatch("[0-9]{1,18}", named.get(limit, "")) and _number(named[limit]) < total * 1024:
            most = _number(named[limit])
            share = percent(min(most, max(0.0, _sum(named, used) - _sum(named, cache))), most)
            return {"memory_percent": share, "memory_limit": f"the container's limit of {most / (1 << 20):.0f} MiB"}
    if "MemAvailable" in named:
        available = _sum(named, "MemAvailable")
    else:       # Shmem is in Cached, yet nothing can drop it
        available = _sum(named, "MemFree", "Buffers", "Cached") - (_sum(named, "Shmem") if "Shmem" in named else 0)
    if "size" in named and "fuse.lxcfs" not in named and _sum(named, "size") < total * 1024:
        available = min(total, available + max(0.0, _sum(named, "size") - _sum(named, "c_min")) / 1024)
    return percent(total - available, total)


def _macos_memory(text: str) -> float:
    """What Activity Monitor calls used: memory of applications, wired and compressed."""
    named, page = _named(text), text.partition("page size of")[2]
    pages = _sum(named, "Anonymous pages", "Pages wired down", "Pages occupied by compressor")
    return percent((pages - _sum(named, "Pages purgeable")) * _number(page), _sum(named, "hw.memsize"))


def _freebsd_memory(text: str) -> float:
    """Free and inactive pages and the ARC above its floor are available; laundry must be written first."""
    named, pages, arc = _named(text), "vm.stats.vm.v_", "kstat.zfs.misc.arcstats."
    page, total = _sum(named, "hw.pagesize"), _sum(named, pages + "page_count")
    available = _sum(named, pages + "free_count", pages + "inactive_count")
    if arc + "size" in named:
        available += max(0.0, _sum(named, arc + "size") - _sum(named, arc + "c_min")) / max(page, 1)
    return percent(total - available, total)


def _linux_swap(text: str) -> float | None:
    named = _named(text)
    total = _sum(named, "SwapTotal")
    return percent(total - _sum(named, "SwapFree"), total) if total else None


def _macos_swap(text: str) -> float | None:
    found = re.match(r"total = (\S+)M +used = (\S+)M ", text)
    if not found:
        raise ValueError("no swap usage")
    total, used = map(_number, found.groups())
    return percent(used, total) if total else None


def _freebsd_swap(text: str) -> float | None:
    header, *lines = text.splitlines() or [""]
    if not header.startswith("Device"):
        raise ValueError("no table of swap devices")
    rows = [line.split()[-4:-2] for line in lines if not line.startswith("Total")]
    total, used = (sum(map(_number, sizes)) for sizes in zip(*rows, strict=True)) if rows else (0, 0)
    return percent(used, total) if total else None


class Mount(NamedTuple):
    """A line of a machine's table of what is mounted."""

    point: str
    kind: str           # the filesystem's type
    flags: frozenset[str]

    @property
    def hidden(self) -> bool:
        return bool({*READ_ONLY, "quarantine"} & self.flags or MACOS_PARTS.match(self.point))


class Volume(NamedTuple):
    """A row of df with sizes in KiB."""

    device: str
    pool: str           # volumes of ZFS and APFS share the free space of one; any other is its own
    used: float
    available: float
    mount: Mount
    inodes: tuple[float, float]     # used and free


def _mounts(text: str) -> list[Mount]:
    """/proc/mounts, /etc/mnttab, fstab and AIX' mount(8) have columns, of which the second is the mount point; BSDs
    print `device on /mount type ffs (local)` or `device on /mount (ufs, local)`."""
    found = []
    for line in text.splitlines():
        words = line.split()
        left, _, right = line.rstrip(" )").rpartition(" (")
        if " on " in left and line.endswith(")"):
            point, _, kind = left.partition(" on ")[2].partition(" type ")
            flags = right.split(", ")
            found.append(Mount(point, kind or flags[0], frozenset(flags)))
        elif len(words) > 3:
            point, kind, *rest = words[2:] if words[2].startswith("/") else words[1:]   # AIX names a server first
            found.append(Mount(point.replace("\\040", " "), kind, frozenset(",".join(rest).split(","))))
    return found


def _volumes(text: str, mounts: Mapping[str, Mount], inodes: Mapping[str, tuple[float, float]]) -> Iterator[Volume]:
    """The rows of `df -Pk` that have sizes; a long device may stand on a line of its own. `inodes` by mount point
    are those of another table, where the rows have none."""
    for line in re.sub(r"(?m)^(\S+)\n +", r"\1 ", text).splitlines():
        if len(line) > 4096:    # nobody's mount point
            raise ValueError(f"a line of {len(line)} characters")
        if not (row := DF_ROW.fullmatch(line)):
            continue
        device, used, free, taken, left, point = row.groups()
        point = point.replace("\\040", " ")
        mount = mounts.get(point, Mount(point, device, frozenset()))    # a device called tmpfs is one
        # By what it is: a list of good types would silently miss the next filesystem there is.
        if not NO_DISK.fullmatch(mount.kind):
            # What is no path may be the same word in every row, such as AIX' Global.
            device = device if device.startswith("/") or mount.kind == "zfs" else point
            pool = re.sub({"zfs": "/.*", "apfs": "(?<=[0-9])s.*"}.get(mount.kind, "$^"), "", device)
            available = max(0.0, float(free))   # below 0 where the reserve of UFS is in use
            counts = (float(taken), float(left)) if left else inodes.get(point, (0.0, 0.0))
            yield Volume(device, pool, float(used), available, mount, counts)


def _pools(volumes: Iterable[Volume]) -> list[list[Volume]]:
    """Those that share their space, that with the shortest mount point first, and none twice (a bind mount)."""
    pools: dict[str, dict[str, Volume]] = {}
    for volume in sorted(volumes, key=lambda volume: len(volume.mount.point)):
        if volume.used + volume.available > 0:
            pools.setdefault(volume.pool, {}).setdefault(volume.device, volume)
    return [list(pool.values()) for pool in pools.values()]


def _told(shares: dict[str, float | str], mounts: Iterable[Mount], broken: Collection[str],
          text: str) -> dict[str, float | str]:
    """The shares, what is not among them, and what is wrong."""
    kinds = collections.Counter(mount.kind for mount in mounts if NO_DISK.fullmatch(mount.kind))
    skipped = ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in sorted(kinds.items()))
    hidden = ", ".join(sorted(
        mount.point for mount in mounts
        if mount.hidden and mount.point not in broken and not NO_DISK.fullmatch(mount.kind)))
    # An account without rights to somebody's private mount is no fault; a disk that answers with an error is.
    private = re.compile("[Pp]ermission denied|not permitted")
    errors = [line for line in text.splitlines() if line.startswith("df: ") and not private.search(line)]
    if not shares:
        raise ValueError(" ".join(["no local filesystem", f"(skipped: {skipped or 'nothing'})", *errors]))
    if broken:
        errors.insert(0, f"became read-only: {', '.join(sorted(broken))}")
    told = {"disk_percent": "".join(errors[:1]), "skipped_filesystems": skipped, "hidden_filesystems": hidden}
    return shares | {name: what for name, what in told.items() if what}


def _disk_percent(text: str) -> dict[str, float | str]:
    """used / (used + available) of each pool under its shortest mount point, and of volumes with a quota. In comes
    the table of mounts and, after a line with its name, what each further command printed."""
    mounted, *rest = re.split(r"(?m)^@(?=fstab$|space$|inodes$)", text)
    parts = dict(part.partition("\n")[::2] for part in rest)
    listed = _mounts(mounted)
    mounts = {mount.point: mount for mount in listed}
    meant = {mount.point for mount in _mounts(parts.get("fstab", "")) if not mount.flags & {"ro", "noauto"}}
    broken = {point for point, mount in mounts.items()
              if "emergency_ro" in mount.flags or ("ro" in mount.flags and point in meant)}
    mounts |= {point: mounts[point]._replace(flags=frozenset()) for point in broken}
    shares: dict[str, float | str] = {}
    inodes = {volume.mount.point: (volume.used, volume.available)
              for volume in _volumes(parts.get("inodes", ""), mounts, {})}
    for volumes in _pools(_volumes(parts.get("space", ""), mounts, inodes)):
        used, free = sum(volume.used for volume in volumes), max(volume.available for volume in volumes)
        for index, volume in enumerate(volume for volume in volumes if not volume.mount.hidden):
            if index == 0:
                shares[f"disk_percent {volume.mount.point}"] = percent(used, used + free)
                if sum(volume.inodes) and volume.mount.kind not in ("apfs", "zfs"):     # they make what they need
                    shares[f"inode_percent {volume.mount.point}"] = percent(volume.inodes[0], sum(volume.inodes))
            elif volume.available < free * 0.98:    # it has a quota
                shares[f"disk_percent {volume.mount.point}"] = percent(volume.used, volume.used + volume.available)
    told = _told(shares, listed, broken, parts.get("space", ""))
    return told if "inodes" in parts else {"inode_percent": NOT_KNOWN, **told}


# A service that has ended, in the words of Upstart, Red Hat's and Debian's scripts, OpenRC, runit and procd: their
# exit status is 0 all the same. Not the bare word "stopped", which may be in a name or of something else.
NOT_RUNNING = re.compile(
    r"\b(start|stop)/(?!running)\S+|\b(is|are) (stopped|dead)|\bnot running|\bdead but"
    r"|\bstatus: (stopped|crashed|inactive)|^(down:|inactive)|\bfailed!", re.IGNORECASE | re.MULTILINE)


def _service(status: int, text: str) -> Outcome:
    ended = status == 0 and NOT_RUNNING.search(text)
    return Outcome(False, text) if ended else by_status(status, text)


def _systemd(status: int, text: str) -> Outcome:
    fields = {key: value for key, _, value in (line.partition("=") for line in text.splitlines())}
    active = fields.get("ActiveState", "")
    if not active:  # another init, or a systemd that does not answer
        return _service(status, text)
    if fields.get("LoadState") == "not-found":
        return Outcome(False, "no such unit")
    return Outcome(active in ("active", "reloading", "refreshing"), f"{active} ({fields.get('SubState', '')})")


def _launchd(status: int, text: str) -> Outcome:
    """The first state is the job's own; those further down belong to its sockets and endpoints. A job on demand
    that ended well waits for the next demand."""
    state = re.search(r"^[ \t]*state = (.*)$", text, re.MULTILINE)
    if status == 0 and state:
        ended_well = re.search(r"^[ \t]*last exit code = (0|\(never exited\))$", text, re.MULTILINE)
        kept_alive = re.search(r"^[ \t]*properties = .*keepalive", text, re.MULTILINE)
        if state[1] == "not running" and ended_well and not kept_alive:
            return Outcome(True, "not running (on demand)")
        return Outcome(state[1] == "running", state[1])
    return Outcome(False, "no such service" if status == 113 else by_status(status, text).text)


_ANY = (Probe("hostname", "uname -n", _line), Probe("kernel", "uname -sr", _line))
_BSD = (                        # and macOS
    Probe("uptime_seconds", "sysctl -n kern.boottime; date +%s", _since_boot),
    Probe("cpu_count", "sysctl -n hw.ncpu", _count),
    Probe("load_per_cpu", "sysctl -n hw.ncpu vm.loadavg", _load_per_cpu),
)
# What may fail comes first, so that a problem shows its words.
_CPUS = "{ getconf NPROCESSORS_ONLN 2>/dev/null || getconf _NPROCESSORS_ONLN; }"
_LINUX_CPUS = "{ getconf _NPROCESSORS_ONLN 2>/dev/null || grep -c '^cpu[0-9]' /proc/stat; }"
# Lines whose device is called as its type (thousands of overlays and tmpfs on a node of Kubernetes) are sent as the
# type alone. Without -l a dead NFS server holds df up for ever; BusyBox has no -l, its oldest no -P. A name with a
# colon is a server's for GNU's -l, so what else has one is asked for by its mount point.
LINUX_DISKS = r"""
M=$(sed 's,^\([^ ]*\) [^ ]* \1 .*,\1 - \1 -,' /proc/mounts); echo "$M"; echo @fstab; cat /etc/fstab 2>/dev/null
echo @space; h=$(df --help 2>&1); l=; [ "${h#*--local}" = "$h" ] || l=l
r=$(d -Pk$l); s=$?
[ "${r#*%}" != "$r" ] || [ $s -ge 124 ] || r=$(d -k)
echo "$r"; [ $s -lt 124 ] || exit 0
set -f; a= b= m=
for c in $M; do
  case "$a $c" in (/dev/*:*' '*|*:*' 'ubifs|*:*' 'zfs) m="$m $b";; esac
  a=$b b=$c
done
[ ! "$l" ] || [ ! "$m" ] || d -Pk $m
echo @inodes; d -Pi$l
:"""
# One command for all that may be there.
LINUX_MEMORY = r"""
c=/sys/fs/cgroup
grep -sE '^(Mem|Buffers|Cached|Shmem:|[0-9]+$|(total_)?inactive_file |(size|c_min) |lxcfs .proc.meminfo )' \
  /proc/meminfo $c/memory.max $c/memory.current $c/memory.stat $c/memory/memory.limit_in_bytes \
  $c/memory/memory.usage_in_bytes $c/memory/memory.stat /proc/spl/kstat/zfs/arcstats /proc/mounts
:"""
PROBES: dict[Platform, CommandSet] = {
    Platform.LINUX: CommandSet("Linux", (
        *_ANY,
        Probe("os", '{ (. /etc/os-release; echo "${PRETTY_NAME:?}") || cat /etc/redhat-release; } 2>/dev/null'
              " || uname -sr", _line),
        Probe("uptime_seconds", "cat /proc/uptime", _number),
        Probe("cpu_count", _LINUX_CPUS, _count),
        Probe("cpu_percent", "grep '^cpu ' /proc/stat", _linux_ticks),
        Probe("memory_percent", LINUX_MEMORY, _linux_memory),
        Probe("swap_percent", "grep ^Swap /proc/meminfo", _linux_swap),
        Probe("load_per_cpu", f"{_LINUX_CPUS} && cat /proc/loadavg", _load_per_cpu),
        Probe("disk_percent", LINUX_DISKS, _disk_percent),
    ), "if [ -d /run/systemd/system ]; then systemctl show -p LoadState -p ActiveState -p SubState -- {};"
       " else service {} status; fi", _systemd),
    Platform.MACOS: CommandSet("Darwin", (
        *_ANY, *_BSD,
        Probe("os", 'echo "$(sw_vers -productName) $(sw_vers -productVersion)"', _line),
        Probe("cpu_percent", "sysctl -n hw.ncpu; ps -A -o %cpu=", _ps_cpu),
        Probe("memory_percent", "vm_stat; sysctl hw.memsize", _macos_memory),
        Probe("swap_percent", "sysctl -n vm.swapusage", _macos_swap),
        Probe("disk_percent", "mount; echo @space; d -Pkl; :", _disk_percent),
    ), "launchctl print system/{}", _launchd),
    Platform.FREEBSD: CommandSet("FreeBSD", (
        *_ANY, *_BSD,
        Probe("os", 'echo "FreeBSD $(freebsd-version -u 2>/dev/null || uname -r)"', _line),
        Probe("cpu_percent", "sysctl -n kern.cp_time", lambda text: _ticks(text.split()[:5], slice(4, 5))),
        Probe("memory_percent", "sysctl -i hw.pagesize vm.stats.vm.v_page_count vm.stats.vm.v_free_count"
              " vm.stats.vm.v_inactive_count kstat.zfs.misc.arcstats.size kstat.zfs.misc.arcstats.c_min",
              _freebsd_memory),
        Probe("swap_percent", "swapinfo -k", _freebsd_swap),
        Probe("disk_percent", "mount; echo @space; d -Pkli; echo @inodes", _disk_percent),
    ), 'service {} onestatus || { s=$?; [ "$(id -u)" = 0 ] || [ "$(sysctl -n security.bsd.see_other_uids)" = 1 ] ||'
       ' echo "this account may not see the processes of others: security.bsd.see_other_uids is 0"; (exit $s); }',
       _service),
    Platform.POSIX: CommandSet("*", (
        *_ANY,
        Probe("os", "uname -sr", _line),
        Probe("cpu_count", _CPUS, _count),
        Probe("load_per_cpu", f"{_CPUS} && uptime", _load_per_cpu),
        Probe("disk_percent", "cat /etc/mnttab 2>/dev/null || mount; echo @space; d -Pk; :", _disk_percent),
    ), ":", lambda status, text: Outcome(False, "services are not supported on this platform")),
}  # fmt: skip

# The script goes to `sh -s` on stdin: one group, read whole before a command could eat the rest.
# A check's output ends at its own status line and not at end of file, which a daemon it leaves behind would
# hold off for ever; what is beyond KEPT_BYTES is read and dropped, so that nothing dies of SIGPIPE. yash drops what is
# behind a byte that is no character, its status line too, and is given none. Nothing ends a df
# that waits for a dead disk: it says who it is past what gathers its output, and where `hangs` still finds it, the
# poll starts no other.
SCRIPT = r"""{
LC_ALL=C; export LC_ALL; unset LANGUAGE N; N=NONCE
PATH=$PATH:/usr/sbin:/sbin:/usr/local/sbin:/usr/local/bin; export PATH
E=
b() { E="$E
@$N begin $1
"; }
e() { E="$E$O
@$N end $?"; }
f() { printf '%s' "$E"; E=; }
limit() {
  n=$1; shift
  if [ "$T" ]; then timeout -k 1 $n "$@" 2>&1; return; fi
  command set -m || :
  "$@" 2>&1 & p=$!
  { while [ $n -gt 0 ] && kill -0 $p; do sleep 1; n=$((n - 1)); done
    if kill -0 $p; then kill -TERM -$p || kill -TERM $p; sleep 1; kill -KILL -$p || kill -KILL $p; fi
  } >/dev/null 2>&1 & w=$!
  wait $p; s=$?
  kill -TERM -$w || kill -TERM $w
  return $s
}
d() {
  limit 5 /bin/sh -c 'printf "\n@%s df %s %s\n" "$0" $$ "$(date "+%d %b %H:%M")" >&3; exec df "$@" 3>&-' "$N" "$@"; s=$?
  [ $s -lt 124 ] || echo "df: no end in 5 s"
  return $s
}
hangs() {
  [ "$1" ] && kill -0 $1 2>/dev/null || return 1
  case $({ cat /proc/$1/stat || ps -o stat= -o comm= -p $1; } 2>/dev/null) in
  (''|*'(df) '[!Z]*|[!Z]*df) printf '\n@%s df %s %s\n' $N $1 "$2";;
  (*) return 1;;
  esac
}
run() {
  { t=$(date +%s); limit "$1" /bin/sh -c "$2"; s=$?; [ $s -le 255 ] || s=$((128 + s % 128))
    printf '\n@%s status %s %s .\n' $N $s $(($(date +%s) - t)); } 2>/dev/null | keep
}
piece() { dd bs=4096 count=1 2>/dev/null; }
[ -z "$YASH_VERSION" ] || ! tr a b </dev/null 2>/dev/null ||
  piece() { dd bs=4096 count=1 2>/dev/null | tr '\200-\377' '?'; }
keep() {
  kept= last= s=lost m="@$N status "
  while :; do
    new=$(piece; echo .); new=${new%.}
    [ "$new" ] || break
    [ ${#kept} -gt 4300 ] || kept=$kept$new
    last=$last$new
    case $last in *"$m"*' .'*) s=${last#*$m}; s=${s%% .*}; break;; esac
    last=$new
  done 2>/dev/null
  printf '%.4096s\n@%s end %s\n' "${kept%%$m*}" $N "$s"
}
T=; timeout -k 1 1 true >/dev/null 2>&1 && T=y
case $(uname -s) in
BRANCHESesac
CHECKScase $(uname -s) in
DISKSesac
f; printf '\n@%s done\n' $N
exit 0
} </dev/null 2>&1
"""


def build_script(settings: ResourceSettings, nonce: str, stuck: Sequence[str] = ()) -> str:
    """The whole poll for `/bin/sh -s`; `unix` and `local` ask uname which table to run. The nonce (hex, new
    for every poll) marks the sections, so that no output can pass for a mark. `stuck` is Sample's."""
    platform = settings.platform
    chosen = {platform: PROBES[platform]} if platform in PROBES else PROBES
    first = last = ""
    for key, table in chosen.items():
        rows = [(f"platform {key.value}", ":"), *((probe.name, probe.command) for probe in table.probes)]
        for name in settings.services:
            asked = shlex.quote(table.service.replace("{}", shlex.quote(name)))     # or it stayed there
            asked = f"limit {math.ceil(settings.timeout)} /bin/sh -c {asked} 2>/dev/null"
            rows.append((f"service {quote(name, '')}", asked))
        # Each write is a packet that costs us 0.2 ms: they are gathered until a command comes that may hang.
        sections = {title: f"b {shlex.quote(title)}; {'f; ' if title.startswith(('disk', 'service ')) else ''}"
                           f"O=$(\nexec 2>&1\n{command}\n); e\n" for title, command in rows}
        pattern = table.uname if len(chosen) > 1 else "*"
        begin, ask = sections.pop("disk_percent").split("; f; ")    # a df that hangs costs nothing else its answer
        last += f"{pattern})\n{begin}; f; hangs {shlex.join(stuck)} || {{ {ask}}} 3>&1;;\n"
        first += f"{pattern})\n{''.join(sections.values())};;\n"
    limited = ""
    for check in settings.checks:
        seconds = math.ceil(check.timeout)
        title = shlex.quote(f"check {quote(check.name, '')} {seconds} {check.exit}".removesuffix(" plain"))
        limited += f"b {title}; f; run {seconds} {shlex.quote(check.command)}\n"
    words = {"NONCE": nonce, "BRANCHES": first, "CHECKS": limited, "DISKS": last}
    return re.sub("|".join(words), lambda found: words[found[0]], SCRIPT)


class Section(NamedTuple):
    """What stands between the marks of one command. The end has exit status and, of a check, seconds; it is
    empty when the output was cut off. `df` has number and begin of the last one."""

    title: tuple[str, ...]
    text: str
    end: tuple[str, ...] = ()
    df: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        return int(self.end[0]) if self.end and re.fullmatch("[0-9]{1,3}", self.end[0]) else -1

    def outcome(self, state: Judge) -> Outcome:
        """A service's as `state` sees it, or a check's by its `exit`, of a length to be kept."""
        judged = JUDGES.get("".join(self.title[3:4]), state)(self.status, self.text)
        text, seconds = judged.text, [word for word in self.title[2:3] + self.end[1:2] if word.isdecimal()]
        timed_out = self.status in (124, 137, 143)      # of timeout(1), after SIGKILL, after SIGTERM
        if timed_out and len(seconds) == 2 and float(seconds[1]) >= float(seconds[0]):
            text = f"no end in {seconds[0]} s: {self.text}".rstrip(": \n")
        return replace(judged, text=kept(text))


def _sections(output: str, nonce: str) -> list[Section]:
    found: list[Section] = []
    for part in ("\n" + output).split(f"\n@{nonce} ")[1:]:
        header, _, body = part.partition("\n")
        word, *words = header.split(" ")
        if word == "begin" and words:
            text = printed(body) if words[0] == "check" else body.translate(CONTROL).strip()
            found.append(Section(tuple(words), text))
        elif word == "df" and found and re.fullmatch("[0-9]{1,9} [0-9A-Za-z: ]{1,20}", " ".join(words)):
            found[-1] = found[-1]._replace(text=body.translate(CONTROL).strip(), df=(words[0], " ".join(words[1:])))
        elif word == "end" and found:
            found[-1] = found[-1]._replace(end=tuple(words))
    return found


def end_mark(nonce: str) -> str:
    """What the script prints last; what still holds the stream open then need not be waited for."""
    return f"\n@{nonce} done\n"


def last_section(text: str, nonce: str) -> str:
    """What ran when the output stopped, such as "disk_percent" or "check replication"; "" for nothing."""
    *_, last = [Section((), "", ("0",)), *_sections(text, nonce)]
    return "" if last.end else " ".join(map(unquote, last.title[:2]))


def not_run(text: str, settings: ResourceSettings | None = None) -> AnswerError:
    """For output in which nothing can be read."""
    said = " ".join(text[:KEPT_BYTES].translate(CONTROL).split())[:PROBLEM_CHARS] or "none"
    if settings and settings.endpoint:
        return AnswerError("protocol", "not restricted: the login runs something else than what "
                          f"`endpoint {settings.name}` prints; output: {said}")
    return AnswerError("protocol", f"the script was not run; output: {said}")


def _reading(probe: Probe, section: Section | None) -> Reading:
    if section is None or not section.end:
        raise ValueError("df from {1} still hangs (process {0})".format(*section.df) if section and section.df
                         else "no answer")
    if section.status:
        raise ValueError(f"exit status {section.status}: {section.text.partition(chr(10))[0]}")
    return probe.parse(section.text)


def _outcomes(sections: Iterable[Section], kind: str, state: Judge) -> dict[str, Outcome]:
    chosen = (section for section in sections if section.title[0] == kind and len(section.title) > 1)
    return {unquote(section.title[1]): section.outcome(state) for section in chosen}


def parse_output(text: str, nonce: str, previous: CpuTicks | None) -> Sample:
    """The sample in the script's output; raises ProbeError (`protocol`) when nothing in it can be read."""
    sections = {section.title[:2]: section for section in _sections(text, nonce)}
    table = next((table for key, table in PROBES.items() if ("platform", key.value) in sections), None)
    rows = {probe.name: functools.partial(_reading, probe, sections.get((probe.name,)))
            for probe in (table.probes if table else ())}
    problems = dict.fromkeys(Limits.model_fields.keys() - rows.keys() - {"inode_percent"}, NOT_KNOWN)
    sample = make_sample(
        rows, problems, previous,
        _outcomes(sections.values(), "service", table.state if table else by_status),
        _outcomes(sections.values(), "check", by_status))
    if sample.empty:
        raise not_run(text)
    if not sample.readings("disk_percent"):     # they come with the disks
        problems["inode_percent"] = problems.get("disk_percent", NOT_KNOWN)
    disks, endpoint = sections.get(("disk_percent",)), sections.get(("endpoint",))
    return replace(sample, stuck=disks.df if disks and not disks.end else (),
                   endpoint=endpoint.text if endpoint else "")


# === Windows =================================================================
# The same for Windows: one script, COLLECT, with services and checks written into it, and its answer as a sample.
# Pure. A metric that could not be read is a problem; an answer that is not whole is none.
# Gives: build_windows_script, WINDOWS_PATH, WindowsOutput, parse_windows

# For Windows PowerShell 5.1 and PowerShell 7. Prints a line of JSON for itself and one for each check from number
# $first on, ASCII and whole numbers only, which no code page or language changes. A check that does not end, or ends
# all, is seen where its line is missed. WMI takes about 5 s to refuse a plain account's network logon, so such a one
# reads from kernel32, and nobody asks again after a refusal. In Constrained Language Mode only cmdlets work: WMI for
# everyone.
# What an endpoint (JEA) has to allow, beside *-Object, ConvertFrom-Json, ConvertTo-Json, Get-Date and Out-String:
#   os: Get-ItemProperty, of HKLM:\SOFTWARE\Microsoft\Windows NT\CurrentVersion
#   uptime, memory, swap, disk, cpu: Get-CimInstance, as administrator, of root/cimv2's Win32_OperatingSystem (for the
#     commit charge, too, where language is constrained), Win32_PageFileUsage, Win32_Volume and Win32_PerfRawData_…:
#     Counters_ProcessorInformation, PerfOS_Processor. Else, and for the commit charge: full language, and no right
#   services: Get-Service, with SC_MANAGER_CONNECT, SC_MANAGER_ENUMERATE_SERVICE and, of each, SERVICE_QUERY_STATUS (and
#     in PowerShell 7 SERVICE_QUERY_CONFIG); Get-ItemProperty of HKLM:\SYSTEM\CurrentControlSet\Services for hidden ones
#   checks: Invoke-Expression, Start-Sleep, and whatever they call. So that the next poll can have the shell, too:
#     Get-Process; with checks Get-ChildItem, Get-Job, Get-PSDrive, Get-Variable, Stop-Process; in full language
#     Get-CimSession, Get-EventSubscriber, Get-Module, Get-PSSession; where constrained, in 5.1, Win32_Process
COLLECT = r"""
$ErrorActionPreference = 'Stop'
$ProgressPreference = $WarningPreference = 'SilentlyContinue'
$wanted = 'WANTED' | ConvertFrom-Json
$wmi = @{ use = $true; refused = '' }
function Line($Number, $Answer) {
    $Answer.number = $Number
    if ($nonce) { $Answer.nonce = $nonce }    # in an endpoint, and on this machine
    $json = ConvertTo-Json -InputObject $Answer -Depth 5 -Compress
    while ($json -cmatch '[^\x00-\x7f]') {
        $json = $json.Replace($Matches[0], ('\u{0:x4}' -f [int][char]$Matches[0]))
    }
    "`n$json"    # behind whatever a check left there
}
function Row($Number, $Answer) {
    if ($endpoint -and -not $Number) { $Answer.endpoint = $endpoint }
    Line $Number $Answer
    if ($Number -eq $wanted.checks.Count) {    # nobody's time counts any more
        $clean = try { Unchanged } catch { $false }
        Line $Number @{ clean = $clean }
    }
}
function Native {    # kernel32 without a compiler: once a process, which remembers a failure, too
    $found = [AppDomain]::CurrentDomain.GetData('HealthChecker.Native')
    if (-not $found) {
        try {
            $builder = [Reflection.Emit.AssemblyBuilder]::DefineDynamicAssembly('HealthChecker', 'Run')
            $type = $builder.DefineDynamicModule('HealthChecker').DefineType('HealthChecker.Native', 'Public')
            $out = [int64].MakeByRefType()
            $takes = @{ GetTickCount64 = @(); GetSystemTimes = $out, $out, $out
                GetDiskFreeSpaceExW = [string], $out, $out, $out; K32GetPerformanceInfo = [IntPtr[]], [uint32]
                CreateToolhelp32Snapshot = [uint32], [uint32]; CloseHandle = , [IntPtr]
                Process32FirstW = [IntPtr], [byte[]]; Process32NextW = [IntPtr], [byte[]] }
            $gives = @{ GetTickCount64 = [uint64]; CreateToolhelp32Snapshot = [IntPtr] }
            foreach ($name in $takes.Keys) {
                $returns = if ($gives[$name]) { $gives[$name] } else { [bool] }
                $type.DefinePInvokeMethod($name, 'kernel32', 'Public, Static, PinvokeImpl', 'Standard', $returns,
                    [type[]]$takes[$name], 'Winapi', 'Unicode').SetImplementationFlags('PreserveSig')
            }
            $found = $type.CreateType()
        } catch { $found = "kernel32 cannot be called: $_" }
        [AppDomain]::CurrentDomain.SetData('HealthChecker.Native', $found)
    }
    if ($found -is [string]) { throw $found }
    $found
}
$begun = [datetime]::Now
$orphans = @{ seen = $false }
function Young($Ids, $Since) {    # those of them that began since then; whose start cannot be read did not
    if (-not $Ids) { return }
    Get-Process -Id $Ids -ErrorAction SilentlyContinue | Where-Object {
        try { $_.StartTime -ge $Since -and $_.Name -ne 'conhost' } catch { $false }
    }
}
function Children {    # all that was started here. Numbers are used again: what is older than this process is not ours
    $parents = @{}
    if ($full) {    # kernel32 says it to everyone
        $entry = [byte[]](@(0) * (544 + 3 * [IntPtr]::Size))    # PROCESSENTRY32W, which begins with its size
        [BitConverter]::GetBytes($entry.Length).CopyTo($entry, 0)
        $list = (Native)::CreateToolhelp32Snapshot(2, 0)
        if (-not (Native)::Process32FirstW($list, $entry)) { throw 'no list of processes' }
        do {
            $parents[[BitConverter]::ToInt32($entry, 8)] = [BitConverter]::ToInt32($entry, 16 + 2 * [IntPtr]::Size)
        } while ((Native)::Process32NextW($list, $entry))
        $null = (Native)::CloseHandle($list)
    } elseif ($PSVersionTable.PSVersion.Major -ge 6) {
        foreach ($one in Get-Process) { $parents[$one.Id] = [int]$one.Parent.Id }
    } else {
        if ($wmi.refused) { throw $wmi.refused }
        Get-CimInstance -Query 'SELECT ProcessId, ParentProcessId FROM Win32_Process' -OperationTimeoutSec 4 |
            ForEach-Object { $parents[[int]$_.ProcessId] = [int]$_.ParentProcessId }
    }
    $parents[0] = $parents[$PID] = 0
    $me = Get-Process -Id $PID
    $next = @($PID)
    while ($next) {
        $found = @(foreach ($id in $parents.Keys) { if ($next -contains $parents[$id]) { $id } })
        $found = @(Young $found $me.StartTime)
        $found
        $next = @(foreach ($one in $found) { $one.Id })
    }
    $lost = @(foreach ($id in $parents.Keys) { if ($null -eq $parents[$parents[$id]]) { $id } })    # perhaps a check's
    foreach ($one in Young $lost $begun) { if ($one.SessionId -eq $me.SessionId) { $orphans.seen = $true } }
}
function State {    # a number for all that a check can leave; what modules bring counts where COLLECT uses it
    $used = '^(Get-(ChildItem|Cim(Instance|Session)|Date|EventSubscriber|ItemProperty|Job|Module|Process|PSDrive|' +
        'PSSession|Service|Variable)|Stop-Process|Invoke-Expression|.+-Object|Out-String|Convert(To|From)-Json)$'
    $own = '^([?^$]|Error|HealthChecker|LASTEXITCODE|StackTrace)$'
    $seen = @("$PWD", @(Get-Job).Count, ($PSDefaultParameterValues | Out-String), $(try { $none } catch { 'strict' }))
    foreach ($one in Get-ChildItem 'Function:', 'Alias:') {
        if (-not $one.Source -or $one.Name -match $used) { $seen += "$($one.Name) $($one.Definition)" }
    }
    if ($full) {    # the cmdlets that list these took half of a poll's time
        $drives = $ExecutionContext.SessionState.Drive.GetAll()
        $variables = [Environment]::GetEnvironmentVariables().GetEnumerator()
    } else { $drives = Get-PSDrive; $variables = Get-ChildItem 'Env:' }
    foreach ($one in $variables) { $seen += "$($one.Name) $($one.Value)" }
    foreach ($one in $drives) {
        if ([string]$one.Provider.ModuleName -like 'Microsoft.*') { $seen += "$($one.Name) $($one.Root)" }
    }
    foreach ($one in Get-Variable -Scope Global) {
        if ($one.Name -notmatch $own) { $seen += "$($one.Name) $($one.Value)" }    # of objects the type
    }
    if ($full) {
        $net = [Net.ServicePointManager]
        $proxy = [Net.WebRequest]::DefaultWebProxy
        $seen += "$([Environment]::CurrentDirectory) $proxy $($proxy.Credentials) $($net::SecurityProtocol)"
        $seen += "$($net::CertificatePolicy) $($net::ServerCertificateValidationCallback)"
        $seen += @(if (Get-Module CimCmdlets) { Get-CimSession }).Count, @(Get-PSSession).Count
        $seen += @(Get-EventSubscriber).Count
    }
    ($seen -join "`n").GetHashCode()
}
function Unchanged {    # whether another poll may have this shell; what the checks started ends before it, or with it
    if ($wanted.checks.Count) {
        $left = @(Children)
        if ($left) { $left | Stop-Process -Force -ErrorAction SilentlyContinue; return $false }
        if ($orphans.seen -or (State) -ne $HealthChecker.state) { return $false }
    }
    $size = (Get-Process -Id $PID).WorkingSet64
    if (-not $HealthChecker.size) { $HealthChecker.size = $HealthChecker.swept = $size }    # with what checks load
    if ($full -and $size - $HealthChecker.swept -gt 1.2e7) {    # .NET keeps what it was given once
        try { [GC]::Collect(2, 'Aggressive', $true, $true) } catch { [GC]::Collect() }    # before .NET 7
        $size = $HealthChecker.swept = (Get-Process -Id $PID).WorkingSet64
    }
    $size - $HealthChecker.size -lt 1e8
}
function Judge($Number, $Check) {
    $global:LASTEXITCODE = $null
    $OFS = ' '
    $seen = @{ name = [string]$Check.name; good = $true; text = ''; code = $null; then = 'exit' }
    $kept = @{ last = $null; lines = 0 }
    try {    # a stray `break` ends the loop; behind Invoke-Expression alone nothing is merged in constrained language
        $ErrorActionPreference = 'Continue'
        foreach ($once in 1) {
            & { Invoke-Expression $args[0] } $Check.command *>&1 | ForEach-Object {
                $types = "$($_.PSTypeNames)"
                if ($types -like '*.Automation.*Record *') {    # a program's stderr is no error
                    if ($types -like '*.ErrorRecord *' -and $_.FullyQualifiedErrorId -notlike 'NativeCommandError*') {
                        $seen.good = $false
                    }
                    $item = "$_"
                } else { $item = $kept.last = $_ }
                if ($item -is [string] -and $item.Length -gt 4096) { $item.Substring(0, 4096) } else { $item }
            } | Out-String -Stream -Width 200 | ForEach-Object {
                $kept.lines++
                if ($seen.text.Length -lt 4096) { $seen.text += "$_`n" }
                if ($kept.lines -gt 1000) {    # who is stopped here leaves the program that prints (seen in 7)
                    Children | Stop-Process -Force
                    $seen.good = $false; $seen.text = 'prints more than 1,000 lines'; $seen.then = 'stop'
                    Row $Number $seen
                    Start-Sleep -Seconds 86400
                }
            }
        }
        if ($null -ne $global:LASTEXITCODE) { $seen.code = [int]$global:LASTEXITCODE }
        $seen.then = ''
    } catch { $seen.good = $false; $seen.text += "$_"; $seen.then = '' } finally {
        if ($kept.last -is [bool] -and -not $kept.last) { $seen.good = $false }
        if ($seen.text.Length -gt 4096) { $seen.text = $seen.text.Substring(0, 4096) }
        Row $Number $seen
    }
}
$full = [string]$ExecutionContext.SessionState.LanguageMode -eq 'FullLanguage'
$answer = if ($first) { @{} } else { & {
$note = if ($full) { '' } else { ' (Constrained Language Mode)' }
$r = @{ details = @{ hostname = [string]$env:COMPUTERNAME }; amounts = @{}; problems = @{} }
function Fault($Name, $Why) { $r.problems[$Name] = (@($r.problems[$Name]) + $Why -ne $null) -join '; ' }
function Part($Name, $Body) { try { $null = & $Body } catch { Fault $Name "$_$note" } }
function Put($Name, $Total, $Free) { $r.amounts[$Name] = @(([int64]$Total - [int64]$Free), [int64]$Total) }
function Disk($Path, $Total, $Free) {
    $name = $Path.TrimEnd('\')
    if ($Total) { Put "disk_percent $name" $Total $Free; return }
    $why = 'locked or not formatted'    # a list of its names needs the right that its size needs
    try { $null = [IO.Directory]::GetFileSystemEntries("$name\") } catch { $why = Reason $_.Exception.InnerException }
    Fault 'disk_percent' "$name has no size: $why"
}
function Reason($Exception) {    # by number: texts are in the language of Windows
    $known = @{ '80070005' = 'access denied'; '800703ed' = 'not formatted' }
    $known['80310000'] = $known['80370000'] = 'locked by BitLocker'    # the second in .NET Framework
    $why = $known['{0:x8}' -f $Exception.HResult]
    if ($why) { return $why }
    if ($full) { $Exception.Message } else { "locked, not formatted, or access denied$note" }
}
function Rows($Query) {
    if ($wmi.refused) { throw $wmi.refused }
    try { Get-CimInstance -Query $Query -OperationTimeoutSec 4 -ErrorAction Stop } catch {
        if ($_.CategoryInfo.Category -match 'PermissionDenied|OperationTimeout') { $wmi.refused = "$_" }
        throw
    }
}
function Pages {    # PERFORMANCE_INFORMATION, which has numbers as wide as a pointer, in pages
    $info = [IntPtr[]](@(0) * 14)
    if (-not (Native)::K32GetPerformanceInfo($info, 14 * [IntPtr]::Size)) { throw 'K32GetPerformanceInfo failed' }
    $info | ForEach-Object { $_.ToInt64() }
}
Part 'os' {
    $r.details.cpu_count = [int]$env:NUMBER_OF_PROCESSORS
    $key = Get-ItemProperty -LiteralPath 'HKLM:\SOFTWARE\Microsoft\Windows NT\CurrentVersion'
    $build = [int]$key.CurrentBuildNumber
    $version = if ($key.CurrentMajorVersionNumber) { '10.0' } else { $key.CurrentVersion }
    $r.details.kernel = "$version (build $build.$([int]$key.UBR))"
    $r.details.os = [string]$key.ProductName
    if ($build -ge 22000) { $r.details.os = $r.details.os -replace 'Windows 10', 'Windows 11' }
}
if ($full) { Part 'role' {
    $me = [Security.Principal.WindowsPrincipal][Security.Principal.WindowsIdentity]::GetCurrent()
    $wmi.use = $me.IsInRole([Security.Principal.WindowsBuiltInRole]::Administrator)
} }
if ($wmi.use) {
    Part 'uptime_seconds' {
        $os = Rows 'SELECT LastBootUpTime FROM Win32_OperatingSystem'
        $since = (Get-Date).ToUniversalTime() - $os.LastBootUpTime.ToUniversalTime()
        $r.details.uptime_seconds = [int64]$since.TotalSeconds
    }
    Part 'memory_percent' {
        $os = Rows 'SELECT TotalVisibleMemorySize, FreePhysicalMemory FROM Win32_OperatingSystem'
        Put 'memory_percent' $os.TotalVisibleMemorySize $os.FreePhysicalMemory
    }
    Part 'swap_percent' {
        $size = $used = [int64]0
        Rows 'SELECT AllocatedBaseSize, CurrentUsage FROM Win32_PageFileUsage' |
            ForEach-Object { $size += $_.AllocatedBaseSize; $used += $_.CurrentUsage }
        if ($size) { Put 'swap_percent' $size ($size - $used) }
    }
    Part 'disk_percent' {    # what has neither letter nor path is the system's own
        Rows 'SELECT Name, Capacity, FreeSpace FROM Win32_Volume WHERE DriveType = 3' |
            Where-Object { $_.Name -notlike '\\?\*' } | ForEach-Object { Disk $_.Name $_.Capacity $_.FreeSpace }
    }
    Part 'cpu_percent' {    # an inverse counter: in spite of its name it counts idle time, in 100 ns
        $query = 'SELECT PercentProcessorTime, Timestamp_PerfTime, Frequency_PerfTime FROM Win32_PerfRawData_{0}' +
            " WHERE Name = '_Total'"
        $cpu = $null
        try { $cpu = Rows ($query -f 'Counters_ProcessorInformation') } catch {
            if ($_.CategoryInfo.Category -ne 'MetadataError') { throw }    # there is no such class
        }
        if (-not $cpu) { $cpu = Rows ($query -f 'PerfOS_Processor') }    # which sees no more than 64 CPUs
        if (-not $cpu.Frequency_PerfTime) { throw 'the performance counters have no _Total' }
        Put 'cpu_percent' ([int64](1e7 * $cpu.Timestamp_PerfTime / $cpu.Frequency_PerfTime)) $cpu.PercentProcessorTime
    }
} else {
    Part 'uptime_seconds' { $r.details.uptime_seconds = [int64]((Native)::GetTickCount64() / 1000) }
    Part 'memory_percent' { $pages = Pages; Put 'memory_percent' $pages[4] $pages[5] }
    Part 'swap_percent' { throw 'only an administrator may read the page file' }
    Part 'disk_percent' {
        [IO.DriveInfo]::GetDrives() | Where-Object { [string]$_.DriveType -eq 'Fixed' } |
            ForEach-Object { Disk $_.Name $_.TotalSize $_.TotalFreeSpace }
        foreach ($path in $wanted.mounts) {
            $mine = $size = $free = [int64]0
            $null = (Native)::GetDiskFreeSpaceExW("$path\", [ref]$mine, [ref]$size, [ref]$free)
            Disk $path $size $free
        }
    }
    Part 'cpu_percent' {
        $idle = $kernel = $user = [int64]0    # kernel time contains idle time
        if (-not (Native)::GetSystemTimes([ref]$idle, [ref]$kernel, [ref]$user)) { throw 'no system times' }
        Put 'cpu_percent' ($kernel + $user) $idle
    }
}
Part 'commit_percent' {
    if ($full) { $pages = Pages; Put 'commit_percent' $pages[2] ($pages[2] - $pages[1]) } else {
        $os = Rows 'SELECT TotalVirtualMemorySize, FreeVirtualMemory FROM Win32_OperatingSystem'
        Put 'commit_percent' $os.TotalVirtualMemorySize $os.FreeVirtualMemory
    }
}
$sdset = 'README: sc.exe sdset'
$r.services = @(foreach ($name in $wanted.services) {
    try { $state = [string](Get-Service -Name $name -ErrorAction Stop).Status } catch {
        $id = [string]$_.FullyQualifiedErrorId
        $state = "cannot be read: $_"
        if ($id -like 'NoServiceFound*') {
            $state = 'no such service'    # or hidden from this account; what has a type below 16 is a driver
            $key = "HKLM:\SYSTEM\CurrentControlSet\Services\$($name -replace '`(.)', '$1')"
            if ((Get-ItemProperty -LiteralPath $key -ErrorAction SilentlyContinue).Type -ge 16) { $state = '' }
        } elseif ($_.Exception.InnerException.NativeErrorCode -eq 5) {
            $right = 'SC_MANAGER_CONNECT or SC_MANAGER_ENUMERATE_SERVICE'
            if ($id -like 'CouldNotGetServiceInfo*') { $right = 'its SERVICE_QUERY_CONFIG' }    # PowerShell 7
            $state = "cannot be read: the account lacks $right ($sdset). $_"
        }
    }
    if (-not $state) { $state = "cannot be read: the account lacks its SERVICE_QUERY_STATUS ($sdset)" }
    @{ name = [string]$name; good = $state -eq 'Running'; text = $state }
})
$r
} }
if (-not $HealthChecker) {    # as it was before the first check
    $global:HealthChecker = try { @{ state = $(if ($wanted.checks.Count) { State }) } } catch { @{ state = 'unknown' } }
}
if (-not $first) { $first = 1 }
Row ($first - 1) $answer
for ($number = $first; $number -le $wanted.checks.Count; $number++) { Judge $number $wanted.checks[$number - 1] }
"""


WINDOWS_PATH = re.compile(r"[A-Za-z]:\\[^*?[]+")      # no drive, which is found anyway, and no pattern


def build_windows_script(settings: ResourceSettings, first: int = 0) -> str:
    """The whole poll, or the checks from a number on. ASCII only. What the operator wrote goes in as JSON in one
    literal in single quotes and has none of those: it cannot end the literal, nothing in it is expanded."""
    commands = [{"name": check.name, "command": check.command} for check in settings.checks]
    names = [re.sub(r"([][*?`])", r"`\1", name) for name in settings.services]     # Get-Service takes patterns
    wanted = json.dumps({"services": names, "checks": commands,
                         "mounts": [path for path in settings.limited_mounts if WINDOWS_PATH.fullmatch(path)]})
    return f"$first = {first}" + COLLECT.replace("WANTED", wanted.replace("'", r"\u0027"), 1)


class WindowsOutput(Output):
    """What COLLECT prints. Here is seen which check does not end, or ends the script: that gets a line all the same,
    and those behind it another script."""

    clean = False       # as the script says behind its last row, also when all rows are there

    def __init__(self, settings: ResourceSettings, mark: str, deadline: Deadline) -> None:
        super().__init__(mark)
        self._settings, self._deadline = settings, deadline
        self._rows: dict[int, dict[str, Any]] = {}      # by number
        self._next = 0      # number of the row that is expected
        self._then = "begin"    # what the script does: it begins, runs checks (""), ends by "exit", or waits for "stop"
        self._line = b""        # that is not whole
        has_nonce = settings.endpoint or settings.platform is Platform.LOCAL    # else a pipeline's output is its own
        self._nonce = mark.split(None, 1)[0][1:] if has_nonce else ""

    def take(self, chunk: bytes) -> bool:
        if not self.whole:
            super().take(chunk)
        *lines, self._line = (self._line + chunk).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):   # a check may print past its output
                row = json.loads(line) if line.startswith(b"{") else {}
                if type(row.get("number")) is not int or row.get("nonce", "") != self._nonce:
                    continue
                expected = self._next - (self._then == "begin" and bool(self._rows))
                if "clean" in row:
                    self.clean = row["number"] == len(self._settings.checks) < self._next and row["clean"] is True
                elif expected == row["number"] <= len(self._settings.checks):
                    self._add(row)
        return self._end()

    def rest(self, code: int | None, fault: ProbeError | None) -> str:
        """Raises ProbeError where not even the first row came."""
        if self.whole:
            return ""
        late = fault.cause == "timeout" if fault else code is None and (self._over or time.monotonic() >= self.due_mono)
        if not self._rows:
            slow = ProbeError("timeout", f"no end within {self._deadline.seconds:g} s")
            raise fault or (slow if late else not_run(self.printed.decode(errors="replace"), self._settings))
        if self._then == "exit":
            unknown = {"good": False, "text": "ended by exit, whose code cannot be had"}
            self._add({"number": self._next - 1, **(unknown if code is None else {"code": code})})
        elif self._then != "stop" and not (self._then == "begin" and self._over):
            timeout = self._settings.checks[self._next - 1].timeout
            why = "no end when the poll's time was over" if self._over else f"no end in {timeout:g} s"
            self._miss(why if late else str(fault or "ended the script"))
        self._then = ""
        while self._over and self._next <= len(self._settings.checks):
            self._miss(f"not run: the poll's {self._deadline.seconds:g} s were over")
        if self._end():
            return ""
        self._then, self.due_mono = "begin", math.inf
        endpoint, first = self._settings.endpoint, self._next
        return f"{self._nonce} {first}" if endpoint else build_windows_script(self._settings, first)

    @property
    def _over(self) -> bool:
        return self._deadline.remaining < 0.5   # nothing can begin now

    def _add(self, row: dict[str, Any]) -> None:
        held = row.get("endpoint") if self._settings.endpoint and not row["number"] else None
        if held:    # the host runs the checks that it holds, not those of the inventory
            known = {check.name: check for check in self._settings.checks}
            titles = [title.partition(" ") for title in INSTALLED.validate_json(held)[1]]
            checks = [known.get(name) or Check(name=name, command="unknown")
                      for kind, _, name in titles if kind == "check"]
            self._settings = self._settings.model_copy(update={"checks": checks})
        checks = self._settings.checks
        if row["number"]:
            row["exit"] = checks[row["number"] - 1].exit
        self._rows.setdefault(row["number"], {}).update(row)    # what is seen from outside adds to what a check said
        then = row.get("then")
        self._then, self._next = then if then in ("exit", "stop") else "", row["number"] + 1
        self.exits = self._then == "exit"
        if checks:
            self.due_mono = time.monotonic() + checks[min(self._next, len(checks)) - 1].timeout

    def _miss(self, why: str) -> None:
        """A row for a check that printed none; an exit code would be that of another one."""
        name = self._settings.checks[self._next - 1].name
        self._add({"number": self._next, "name": name, "good": False, "text": why})

    def _end(self) -> bool:
        """Whether the script need not say more."""
        if self._rows and not self._then and self._next > len(self._settings.checks):
            try:
                self.printed[:] = "\n".join(map(json.dumps, self._rows.values())).encode() + self.mark
            except RecursionError:      # as deep as can just be read
                raise not_run(self.printed.decode(errors="replace"), self._settings) from None
            self.whole = True
        return self.whole or self._then == "stop"


Whole = Annotated[int, Field(gt=-1 << 64, lt=1 << 64)]
AmountName = Annotated[str, Field(pattern="^(cpu|memory|swap|commit)_percent$|^disk_percent .+$")]


class ReportedOutcome(BaseModel, strict=True):
    """A service or check in what COLLECT prints."""

    name: str
    good: bool
    text: str
    code: int | None = None     # of the last program, or of `exit`
    exit: str = "plain"         # as the check has it

    @property
    def outcome(self) -> Outcome:
        if self.good and self.exit == "nagios":
            judged = by_nagios(self.code or 0, printed(self.text))
            return replace(judged, text=kept(judged.text))
        text = (f"exit code {self.code}\n" if self.code else "") + self.text.translate(CONTROL)
        return Outcome(self.good and not self.code, kept(text.strip()))


class WindowsAnswer(BaseModel, strict=True):
    """What COLLECT prints. `amounts` are so much of so much, of cpu_percent since the start of the machine. A
    metric is there or in `problems`; where there is no page file, swap_percent is in neither."""

    details: dict[str, Whole | str]
    amounts: dict[AmountName, tuple[Whole, Whole]]
    problems: dict[str, str]
    services: list[ReportedOutcome]
    checks: list[ReportedOutcome]
    endpoint: str = ""          # what it says of itself


def _windows_reading(name: str, reported: str | int | tuple[int, int]) -> Reading:
    if len(name) > 4096:    # nobody's mount point
        raise ValueError(f"a name of {len(name)} characters")
    if isinstance(reported, tuple):
        share = percent(*reported)
        return CpuTicks(*map(float, reported)) if name == "cpu_percent" else share
    return one_line(reported) if isinstance(reported, str) else float(reported)


def parse_windows(text: str, previous: CpuTicks | None) -> Sample:
    """The sample in COLLECT's output. Raises ProbeError (`protocol`) when it is anything else: half an answer could
    lack the one check that is bad."""
    try:    # bytes drop halves of surrogate pairs
        first, *checks = (json.loads(line) for line in text.split("\n") if line.startswith("{"))
        plain = json.dumps({**first, "checks": checks}, ensure_ascii=False).encode(errors="replace")
        answer = WindowsAnswer.model_validate_json(plain)
    except (ValueError, RecursionError):
        raise not_run(text) from None
    details = {name: value for name, value in answer.details.items() if name in DETAILS}
    rows = {name: functools.partial(_windows_reading, name, reported)
            for name, reported in {**details, **answer.amounts}.items()}
    wanted = {"cpu_percent", "memory_percent", "commit_percent", "disk_percent"}
    silent = wanted - {name.partition(" ")[0] for name in rows}
    problems = dict.fromkeys(("load_per_cpu", "inode_percent"), NOT_KNOWN) | dict.fromkeys(silent, "no answer")
    problems |= {name: one_line(why)[:PROBLEM_CHARS] for name, why in answer.problems.items()
                 if name.partition(" ")[0] not in ("endpoint", "service", "check")}     # which are ours to say
    services = {re.sub("`(.)", r"\1", row.name): row.outcome for row in answer.services}
    sample = make_sample(rows, problems, previous, services, {row.name: row.outcome for row in answer.checks})
    if sample.empty:
        raise AnswerError("protocol", f"nothing can be read: {'; '.join(sample.problems.values())}")
    return replace(sample, endpoint=answer.endpoint)


# === Endpoints ===============================================================
# A host with an endpoint keeps its script, with services and checks in it, and is sent a nonce alone: a login that can
# do nothing else. In go settings, out comes the text to install there; and of its answer, in the poller's thread, what
# the inventory still says so. An answer begins with its format and a digest for each service and check.
# Gives: judge_endpoint, SUSPECT, unix_endpoint, windows_endpoint
ENDPOINT_FORMAT = 1             # of the answers; those of every format ever printed are read
OUTDATED = "not answered by the endpoint: install it again"
# A check that may hold a secret, which whoever reads the installed text reads.
SUSPECT = re.compile(r"passw|passphrase|pwd=|secret|token|api.?key|bearer|://[^/\s:@]+:[^/\s@]+@"
                     r"|\b(?=[a-z]*[0-9])(?=[0-9]*[a-z])\w{24,}\b", re.IGNORECASE)
UNIX_ENDPOINT = r"""#!/bin/sh
# HealthChecker's endpoint of TITLE: answers polls and nothing else. As root, on that host:
#  1. Keep this as /usr/local/sbin/healthchecker-endpoint, owned by root and written by nobody else (chmod 755).
#  2. Let the account's authorized_keys hold this line alone, with HealthChecker's own address:
#     command="/bin/sh /usr/local/sbin/healthchecker-endpoint",restrict,from="192.0.2.1" KEY
# Print and install it again when services or checks change, or HealthChecker says so.
LC_ALL=C; unset n P; n=$SSH_ORIGINAL_COMMAND; unset SSH_ORIGINAL_COMMAND
P=${n#* }; [ "$P" != "$n" ] || P=; n=${n%% *}    # the number of a df that hung, if there was one
case $P in *[!0123456789]*|??????????*) n= ;; esac
case ${#n}:$n in *:*[!0123456789abcdef]*) n= ;; 1[6-9]:*|[2-5][0-9]:*|6[0-4]:*) ;; *) n= ;; esac
why="this login answers HealthChecker's polls (endpoint: true) and nothing else"
[ ! -w "$0" ] || [ "$(id -u)" = 0 ] || { n=; why="this account may write to $0"; }
[ "$n" ] || { echo "$why" >&2; exit 1; }
printf '\n@%s begin endpoint\n%s\n@%s end 0\n' $n HOLDS $n
"""


# RunAs... is read by Register-PSSessionConfiguration alone. Some cmdlets are lesser ones in a restricted session.
WINDOWS_ENDPOINT = r"""# HealthChecker's endpoint of TITLE: answers polls and nothing else. On that host, keep this
# as HealthChecker.pssc in a folder of the administrators, and register it in an administrator's PowerShell:
#   $sid = ([Security.Principal.NTAccount](ACCOUNT)).Translate([Security.Principal.SecurityIdentifier])
#   Register-PSSessionConfiguration -Name (CONFIGURATION) -Path HealthChecker.pssc -AccessMode Remote -Force `
#       -SecurityDescriptorSddl "O:NSG:BAD:P(A;;GXGR;;;$sid)(A;;GA;;;BA)S:P(AU;FA;GA;;;WD)(AU;SA;GXGW;;;WD)"
# That is for this account and administrators; it restarts WinRM, which ends the sessions that others have there.
# Print it, unregister the old one and register it again when services or checks change, or HealthChecker says so.
@{
SchemaVersion = '2.0.0.0'
GUID = 'IDENTITY'
SessionType = 'RestrictedRemoteServer'
# What polls run as: a local administrator that lives as long as the session. On a domain controller that is an
# administrator of the DOMAIN: name groups there, or a group managed service account in its place.
RunAsVirtualAccount = $true
# RunAsVirtualAccountGroups = 'Performance Monitor Users', 'Event Log Readers'
# GroupManagedServiceAccount = 'EXAMPLE\health$'
ModulesToImport = 'CimCmdlets', 'Microsoft.PowerShell.Management', 'Microsoft.PowerShell.Utility'
VisibleFunctions = 'Get-Health'
FunctionDefinitions = @{ Name = 'Get-Health'; ScriptBlock = {
param([Parameter(Mandatory)][ValidatePattern('^[0-9a-f]{16,64}\z', Options = 'None')][string]$Nonce, [int]$First)
$endpoint = 'HOLDS'
$language = [string][runspace]::DefaultRunspace.InitialSessionState.LanguageMode
if ($language -ne 'NoLanguage') { throw "not restricted: a session here speaks $language" }
foreach ($name in 'Select-Object', 'Measure-Object') { Set-Alias $name "Microsoft.PowerShell.Utility\$name" }
foreach ($name in 'Get-Command', 'Get-Help') { Set-Alias $name "Microsoft.PowerShell.Core\$name" }
COLLECT} }
}
"""


def digests(settings: ResourceSettings) -> dict[str, str]:
    """For each service and check what changes with it; a setting that a later version adds changes none."""
    asked: dict[str, Any] = {f"service {name}": name for name in settings.services}
    asked |= {f"check {check.name}": check.model_dump(mode="json", exclude={"name", "limits"}, exclude_defaults=True)
              for check in settings.checks}
    return {name: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
            for name, said in asked.items()}


def installed(settings: ResourceSettings) -> str:
    """What an endpoint made of these settings says of itself: JSON, ASCII."""
    return json.dumps([ENDPOINT_FORMAT, digests(settings)])


def judge_endpoint(sample: Sample, settings: ResourceSettings) -> Sample:
    """The sample that an endpoint answered: what it holds otherwise than the inventory is a problem and no verdict.
    Raises ProbeError."""
    try:
        number, held = INSTALLED.validate_json(sample.endpoint)
    except ValueError:
        raise not_run("another answer", settings) from None
    wanted, problems = digests(settings), dict(sample.problems)
    if number != ENDPOINT_FORMAT:
        problems["endpoint"] = f"it has format {number}, not {ENDPOINT_FORMAT}: install it again"
    same = {name for name in wanted if held.get(name) == wanted[name]}
    problems |= dict.fromkeys(wanted.keys() - same, OUTDATED)
    services, checks = ({name: outcome for name, outcome in outcomes.items() if f"{kind} {name}" in same}
                        for kind, outcomes in (("service", sample.services), ("check", sample.checks)))
    return replace(sample, services=services, checks=checks, problems=problems)


def unix_endpoint(settings: ResourceSettings, key: paramiko.PKey) -> str:
    """The script to install, and in its comments how."""
    words = {"TITLE": settings.name, "KEY": f"{key.get_name()} {key.get_base64()}",
             "HOLDS": shlex.quote(installed(settings))}
    head = re.sub("TITLE|KEY|HOLDS", lambda found: words[found[0]], UNIX_ENDPOINT)
    script = build_script(settings, "$n", ("$P", "an earlier poll"))
    return head + script.replace("hangs '$P'", 'hangs "$P"')


def literal(text: str) -> str:
    """An expression of PowerShell that is this text; ASCII, for other quotes than ours end a literal there, too."""
    return "'" + re.sub(r"[^ -~]", lambda found: f"'+[char]::ConvertFromUtf32({ord(found[0])})+'",
                        text.replace("'", "''")) + "'"


def windows_endpoint(settings: ResourceSettings) -> str:
    """The session configuration to register, ASCII, and in its comments how."""
    _, _, script = build_windows_script(settings).partition("\n")     # without its $first
    words = {"TITLE": settings.name, "ACCOUNT": literal(settings.username or "the account of the certificate"),
             "CONFIGURATION": literal(settings.session_configuration),
             "HOLDS": installed(settings).replace("'", r"\u0027"), "COLLECT": script,
             "IDENTITY": str(uuid.uuid5(uuid.NAMESPACE_DNS, settings.hostname))}
    text = re.sub("|".join(words), lambda found: words[found[0]], WINDOWS_ENDPOINT)
    return text.encode("ascii", "backslashreplace").decode()


# === Protocols ===============================================================
# Resources that are no machines: an answer of HTTP, a TCP port, a name, a simulation. Each poll asks anew, for the
# handshake is a part of what is asked, and a secret is sent to the origin alone that it is sealed for. In go settings,
# out comes a sample with a check for each expectation; what is no answer raises ProbeError. In the poller's thread.
# Gives: HttpConnection, NameConnection, PortConnection, ProtocolConnection, PushConnection, SimulatedConnection
BODY_BYTES = 1 << 19            # bytes of an answer that are looked at
QUOTED_CHARS = 80               # characters of what was sent that a reason shows
INTERIM_ANSWERS = 32            # that may come before the one that counts
REDIRECTS = (301, 302, 303, 307, 308)
# What only the origin of the inventory is sent or known by.
OWN: Mapping[str, Any] = {"username": None, "password": None, "headers": {}, "certificate_file": None, "key_file": None,
                          "certificate_fingerprint": None}


def quoted(said: str | bytes) -> str:
    """What a host sent, or should, as a word that cannot pass for ours."""
    text = (said if isinstance(said, str) else said[:4 * QUOTED_CHARS].decode("utf-8", "replace"))[:QUOTED_CHARS]
    return json.dumps(text, ensure_ascii=not text.isprintable()) + "…" * (len(said) > QUOTED_CHARS)


def value_at(body: bytes, path: str) -> str | None:
    """The value of a JSON text at a path of names and indices, as YAML would write it; None where there is none."""
    try:
        value = from_json(body.removeprefix(codecs.BOM_UTF8))
        for part in path.split("."):
            value = value[int(part)] if isinstance(value, list) and part.isdecimal() else value[part]
        return value if isinstance(value, str) else json.dumps(value)
    except (LookupError, TypeError, ValueError):
        return None


def expected(wanted: str, came: str, good: bool) -> Outcome:
    return Outcome(good, came if good else f"expected {wanted}, came {came}")


class PushConnection(Connection):
    """A resource that reports by itself, to its poller's `take`."""

    heard: bool | None = None       # what the last report said
    heard_mono = -math.inf

    def sample(self, deadline: Deadline) -> Sample:
        raise ProbeError("protocol", f"{NOT_TRIED}it reports by itself")


class SimulatedConnection(Connection):
    """A resource that is healthy and unhealthy for exponentially distributed times."""

    def __init__(self, target: Target, guard: LoginGuard, context: ConnectionContext) -> None:
        super().__init__(target, guard, context)
        self._random = random.Random(target.settings.seed)
        self._healthy = False       # it turns healthy at the first poll
        self._flips_mono = time.monotonic()

    def sample(self, deadline: Deadline) -> Sample:
        for _ in range(10_000):     # state changes between two polls at most
            if self._flips_mono > time.monotonic():
                break
            self._healthy = not self._healthy
            mean = self._settings.mean_healthy if self._healthy else self._settings.mean_unhealthy
            self._flips_mono += self._random.expovariate(1 / mean)
        outcome = Outcome(self._healthy, "" if self._healthy else "simulated outage")
        return Sample({}, {}, None, {}, {"simulation": outcome}, {})


class ProtocolConnection(TlsConnection):
    """Asks a resource that is no machine."""

    def find(self, deadline: Deadline, metrics: dict[str, float]) -> dict[str, Outcome]:
        """A check for each expectation of what is answered; adds to the readings. Raises ProbeError."""
        raise NotImplementedError

    def sample(self, deadline: Deadline) -> Sample:
        begun_mono, settings, metrics = time.monotonic(), self._settings, dict[str, float]()
        checks = self.find(deadline, metrics)
        seconds = metrics["response_seconds"] = time.monotonic() - begun_mono
        if within := settings.expect.within:
            checks["within"] = expected(f"{within:g} s", f"{seconds:.2f} s", seconds <= within)
        if wanted := settings.certificate_days or settings.expect.certificate_days:
            days = metrics.get("certificate_days", 0.0)     # of a certificate that cannot be read
            found = expected(f"{wanted:g} days", f"{days:.1f}", days >= wanted)
            checks["certificate"] = replace(found, good=True, degraded=not found.good)      # it is valid still
        return Sample({}, metrics, None, {}, checks, {})

    @contextlib.contextmanager
    def _opened(self, deadline: Deadline, metrics: dict[str, float]) -> Iterator[GuardedSocket]:
        """A connection for one question; notes for how many days its certificate is valid. Raises ProbeError."""
        opened = self._verified(deadline)
        try:
            if isinstance(opened, ssl.SSLSocket):
                with contextlib.suppress(ValueError):
                    shown = x509.load_der_x509_certificate(opened.getpeercert(True) or b"")
                    left = shown.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
                    metrics["certificate_days"] = left.total_seconds() / 86_400
            yield opened
        finally:
            opened.end()


class HttpAnswer(NamedTuple):
    """What came of a request."""

    status: int
    location: str
    encoding: str
    body: bytes     # BODY_BYTES at least, where there are more


class FinalResponse(http.client.HTTPResponse):
    """Reads away what comes before the answer itself, not only a 100 (RFC 9110, 15.2)."""

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(INTERIM_ANSWERS):
            found = super()._read_status()      # type: ignore[misc]  # the stubs lack it
            if found[1] >= 200 or found[1] == http.HTTPStatus.SWITCHING_PROTOCOLS:
                return cast("tuple[str, int, str]", found)
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException(f"more than {INTERIM_ANSWERS} answers came before the last one")


class HttpConnection(ProtocolConnection):
    """A URL; redirects are followed as far as the inventory says, and no proxy is ever asked."""

    def find(self, deadline: Deadline, metrics: dict[str, float]) -> dict[str, Outcome]:
        expect = self._settings.expect
        with contextlib.ExitStack() as stack:   # first the connection: a host that does not answer is no login
            opened = stack.enter_context(self._opened(deadline, metrics))
            if self._settings.password:
                stack.enter_context(self._guard.attempt(self._target.name, deadline, self.record))
            answer = self._answer(opened, deadline)
        if (expect.contains or expect.values) and answer.encoding not in ("", "identity"):
            raise AnswerError("protocol", f"the answer is packed as {quoted(answer.encoding)}, which nobody asked for")
        checks = {"status": Outcome(True, str(answer.status))}
        if wanted := expect.contains:
            checks["contains"] = expected(quoted(wanted), quoted(answer.body), wanted.encode() in answer.body)
        for path, value in expect.values.items():
            came = value_at(answer.body, path)
            checks[f"json {path}"] = expected(
                quoted(value), "no such value" if came is None else quoted(came), came == value)
        return checks

    def _answer(self, opened: GuardedSocket, deadline: Deadline) -> HttpAnswer:
        """The last one, of an expected status. Raises ProbeError."""
        here, method, wanted = self, self._settings.method, self._settings.expect.status or ["200-299"]
        answer = self._ask(opened, method)
        for _ in range(self._settings.redirects):
            if answer.status not in REDIRECTS or not answer.location:
                break
            here = here._redirected(answer.location)
            method = method if answer.status in (307, 308) or method == "HEAD" else "GET"
            with here._opened(deadline, {}) as opened:
                answer = here._ask(opened, method)
        if any(first <= str(answer.status) <= (last or first) for first, _, last in (
                span.partition("-") for span in wanted)):
            return answer
        if answer.status == 401 and here._settings.password:
            raise ProbeError("auth", "status 401: the secret is refused; check username and password")
        led = f", which leads to {quoted(answer.location)}" if answer.location else ""
        raise ProbeError("check", f"expected status {', '.join(wanted)}, came {answer.status}{led}")

    def _redirected(self, location: str) -> HttpConnection:
        """The connection for where an answer leads; at another origin it has nothing to lose. Raises ProbeError."""
        settings, there = self._settings, copy.copy(self)
        try:
            target = urljoin(settings.url or "", location.partition("#")[0])
            url = read_url(target)
        except ValueError:
            raise AnswerError("protocol", f"redirected to {quoted(location)}, which is no URL of HTTP") from None
        is_own = (settings.scheme, settings.hostname, settings.connect_port) == url[:3]
        there._settings = settings.model_copy(update={
            **({} if is_own else OWN), **of_url({"url": target}), "url": target})
        there._target = self._target if is_own else replace(self._target, host_key=None)
        return there

    def _ask(self, opened: GuardedSocket, method: str) -> HttpAnswer:
        """One request over an open connection. Raises ProbeError."""
        url = read_url(self._settings.url or "")
        connection = urllib3.connection.HTTPConnection(url.host, url.port)
        connection.sock, connection.auto_open, connection.response_class = opened, 0, FinalResponse
        headers = self._headers(url)
        try:
            connection.request(method, url.target, headers=headers, preload_content=False, decode_content=False)
            answer, body = connection.getresponse(), b""
            while len(body) < BODY_BYTES and (chunk := answer.read(READ_BYTES)):
                body += chunk
            location, encoding = (answer.headers.get(name, "") for name in ("Location", "Content-Encoding"))
            location = re.sub(r"[ \x80-\xff]", lambda raw: f"%{ord(raw[0]):02X}", location)     # as browsers send it
            return HttpAnswer(answer.status, location, encoding.lower(), body)
        except ProbeError:
            raise
        except ConnectionError as error:
            raise ProbeError("unreachable", "the host closed the connection before it answered") from error
        except Exception as error:      # whatever a host's bytes make urllib3 and http.client raise
            is_clear = type(error) in (http.client.HTTPException, http.client.LineTooLong)  # no word of the host's
            raise AnswerError("protocol", f"the answer cannot be read: {error}" if is_clear else
                              f"the answer is not whole, or not HTTP ({type(error).__name__})") from error

    def _headers(self, url: Url) -> dict[str, str]:
        """Raises ProbeError."""
        settings, secret = self._settings, self._settings.secrets.get("password", "")
        host = f"[{url.host}]" if ":" in url.host else url.host
        headers = {"Host": host if url.port == WEB_PORTS[url.scheme] else f"{host}:{url.port}", "Accept": "*/*",
                   "Accept-Encoding": "identity", "Connection": "close", "User-Agent": f"HealthChecker/{VERSION}"}
        if secret and settings.username:
            login = base64.b64encode(f"{settings.username}:{secret}".encode()).decode()
            headers["Authorization"] = f"Basic {login}"
        elif secret:
            if not re.fullmatch("[!-~]+", secret):
                raise ProbeError("credential", "a bearer token is one word of ASCII; with a username it is a password")
            headers["Authorization"] = f"Bearer {secret}"
        return headers | {name.title(): value for name, value in settings.headers.items()}


class PortConnection(ProtocolConnection):
    """A TCP port."""

    def find(self, deadline: Deadline, metrics: dict[str, float]) -> dict[str, Outcome]:
        wanted, buffer = self._settings.expect.contains, bytearray(READ_BYTES)
        answer = Output(wanted or "")
        with self._opened(deadline, metrics) as opened:
            if self._settings.send:
                opened.sendall(self._settings.send.encode())
            try:
                while wanted and (count := opened.recv_into(buffer)) and not answer.take(bytes(buffer[:count])):
                    pass
            except ProbeError:      # something else may have come, and nothing more
                if not answer.printed:
                    raise
        came = quoted(bytes(answer.printed)) if wanted else "connected"
        return {"answer": expected(quoted(wanted or ""), came, answer.whole or not wanted)}


class NameConnection(ProtocolConnection):
    """A name, as the system's resolver knows it."""

    def find(self, deadline: Deadline, metrics: dict[str, float]) -> dict[str, Outcome]:
        settings = self._settings
        found = self._context.resolver.resolve(settings.hostname, settings.connect_port, deadline)
        came, wanted = {literal_address(one[4][0]) for one in found}, settings.expect.addresses
        return {"addresses": expected(", ".join(wanted or ()), one_line(", ".join(sorted(came))),
                                      wanted is None or came == set(wanted))}


# === Collect =================================================================
# One poll of a resource, in the poller's thread: build the platform's script, run it over the connection, parse
# what came back, and see to it that all that was asked for is answered: a sample or ProbeError.
# Gives: collect, CONNECTIONS
CONNECTIONS: dict[Platform, type[Connection]] = {
    **{platform: SshConnection for platform in SSH_PLATFORMS},
    Platform.WINDOWS: PowerShellConnection,
    Platform.LOCAL: LocalPowerShell if sys.platform == "win32" else LocalConnection,
    Platform.SIMULATED: SimulatedConnection,
    Platform.HTTP: HttpConnection,
    Platform.TCP: PortConnection,
    Platform.DNS: NameConnection,
    Platform.PUSH: PushConnection,
}
POWERSHELL = {Platform.WINDOWS, Platform.LOCAL} if sys.platform == "win32" else {Platform.WINDOWS}  # they know no sh
STILL_POLLS = 3                 # without a reading, of counters that should move


def since(sample: Sample, previous: Sample | None) -> Sample:
    """What shows only from poll to poll is a problem, too: counters that stand still, and a filesystem that was
    writable and is no longer."""
    problems, writable = dict(sample.problems), previous.writable if previous else ()
    turned = sorted(set(writable).intersection(str(sample.details.get("hidden_filesystems", "")).split(", ")))
    if turned:
        problems["disk_percent"] = f"became read-only: {', '.join(turned)}"[:PROBLEM_CHARS]
    still = 0
    if sample.ticks and "cpu_percent" not in sample.metrics:
        still = previous.still + 1 if previous else 1
        if still >= STILL_POLLS:
            problems.setdefault("cpu_percent", f"no reading in {still} polls: its counters stand still")
    shown = frozenset(name.partition(" ")[2] for name, _ in sample.readings("disk_percent"))
    return replace(sample, problems=problems, still=still, writable=(shown or frozenset(writable)).union(turned))


def complete(sample: Sample, settings: ResourceSettings) -> Sample:
    """What was asked for and not answered is bad, too; what nobody asked for is no problem."""
    silent = Outcome(False, "no answer")
    services = {name: sample.services.get(name, silent) for name in settings.services
                if f"service {name}" not in sample.problems}
    checks = {check.name: sample.checks.get(check.name, silent) for check in settings.checks
              if f"check {check.name}" not in sample.problems}
    problems = {name: why for name, why in sample.problems.items()
                if why != NOT_KNOWN or name in settings.limits.by_metric()}
    read = [name.partition(" ")[2] for name, _ in sample.readings("disk_percent")]
    if lost := [path for path in settings.limited_mounts
                if WINDOWS_PATH.fullmatch(path) and not any(matching_key([path], mount) for mount in read)]:
        problems.setdefault("disk_percent", f"not there: {', '.join(lost)}"[:PROBLEM_CHARS])
    return replace(sample, services=services, checks={**sample.checks, **checks}, problems=problems)


def ask(settings: ResourceSettings, connection: Connection, previous: Sample | None, deadline: Deadline) -> Sample:
    """One round trip. Raises ProbeError."""
    if isinstance(connection, ProtocolConnection | PushConnection | SimulatedConnection):
        return complete(connection.sample(deadline), settings)
    nonce, in_powershell = secrets.token_hex(8), settings.platform in POWERSHELL
    mark, stuck, ticks = end_mark(nonce), previous.stuck if previous else (), previous.ticks if previous else None
    output = WindowsOutput(settings, mark, deadline) if in_powershell else Output(mark)
    if settings.endpoint:
        script = " ".join([nonce, *stuck[:1]])
    else:
        script = build_windows_script(settings) if in_powershell else build_script(settings, nonce, stuck)
    ended = connection.run(script, output, deadline)
    text, done, _ = output.printed.decode(errors="replace").partition(mark)
    # What comes last hangs where a disk does: all else was answered.
    running = last_section(text, nonce)
    if done or (deadline.over and running == "disk_percent"):
        sample = parse_windows(text, ticks) if in_powershell else parse_output(text, nonce, ticks)
        sample = since(sample, previous)
        return complete(judge_endpoint(sample, settings) if settings.endpoint else sample, settings)
    during = f" while {running} ran" if running else ""
    if deadline.over:
        raise ProbeError("timeout", f"no end within {deadline.seconds:g} s{during}")
    if not ended:
        raise ProbeError("unreachable", f"connection lost{during}")
    if settings.endpoint:
        raise not_run(text, settings)
    raise AnswerError("protocol", f"the account's shell did not run the commands; it said: {text[:PROBLEM_CHARS]}")


def collect(settings: ResourceSettings, connection: Connection, previous: Sample | None) -> Sample:
    """One poll after the one before it. Where what was open since then fails, it begins again, once and within the
    same deadline. Raises ProbeError."""
    deadline = Deadline(settings.timeout)
    try:
        return ask(settings, connection, previous, deadline)
    except ProbeError as error:
        if not connection.begins_again(error, deadline):
            raise
    except Exception:   # whatever a host made a library raise, what it came over is not used again
        connection.drop()
        raise
    return ask(settings, connection, previous, deadline)


# === Evaluate ================================================================
# What a sample says (a verdict) and what becomes of the resource by it (a standing). Pure.
#
#     unknown --first verdict--> healthy | degraded | unhealthy
#     healthy, degraded --`fall` bad verdicts in a row, or one of a cause AT_ONCE--> unhealthy
#     unhealthy --`rise` good verdicts in a row--> healthy | degraded
#     healthy <--any good verdict--> degraded
# Gives: caused, State, Verdict, evaluate, Standing, settle
State = Literal["unknown", "healthy", "degraded", "unhealthy"]
AT_ONCE = frozenset({"host_key", "credential", "stale"})     # causes that do not wait for `fall`


@dataclass(frozen=True)
class Verdict:
    """What one poll says."""

    state: State
    cause: Cause = ""
    reason: str = ""

    @property
    def healthy(self) -> bool:
        return self.state in ("healthy", "degraded")


def limited(sample: Sample, settings: ResourceSettings) -> Iterator[tuple[str, float | str, Limit | None]]:
    """What has limits: its name, the reading or why there is none, and the limit."""
    for metric, common in settings.limits.by_metric().items():
        for name, value in sample.readings(metric):
            yield name, value, common.at(name.partition(" ")[2])
        if metric in sample.problems:
            yield metric, sample.problems[metric], common
    for check in settings.checks:
        found = sample.checks[check.name].metrics if check.name in sample.checks else {}
        for label, limit in check.limits.items():
            yield f"{check.name}/{label}", found.get(label, "no such performance data"), limit


def judge_limits(sample: Sample, settings: ResourceSettings) -> tuple[list[str], list[str]]:
    """Readings above `fail` and, in the second list, above `warn` or not readable."""
    failed, warned = [], []
    for name, value, limit in limited(sample, settings):
        if isinstance(value, str):
            warned.append(f"{name} cannot be read: {value}")
        elif limit and limit.fail is not None and value > limit.fail:
            failed.append(f"{name} at {value:{limit.shown}}, fail above {limit.fail:g}")
        elif limit and limit.warn is not None and value > limit.warn:
            warned.append(f"{name} at {value:{limit.shown}}, warn above {limit.warn:g}")
    return failed, warned


def evaluate(sample: Sample, settings: ResourceSettings) -> Verdict:
    """A sample against the limits, services and checks of its resource."""
    failed, warned = judge_limits(sample, settings)
    bad, doubtful = ([f"{kind} {name}: {outcome.text.strip() or 'failed'}"
                      for kind, outcomes in (("service", sample.services), ("check", sample.checks))
                      for name, outcome in outcomes.items() if (outcome.good, outcome.degraded) == wanted]
                     for wanted in ((False, False), (True, True)))
    doubtful += [f"{name}: {why}" for name, why in sample.problems.items()
                 if name.partition(" ")[0] in ("endpoint", "service", "check")]
    if failed or bad:
        return Verdict("unhealthy", "limit" if failed else "check", one_line("; ".join(failed + bad)))
    if warned or doubtful:
        return Verdict("degraded", "limit" if warned else "check", one_line("; ".join(warned + doubtful)))
    return Verdict("healthy")


def caused(cause: str, reason: str) -> str:
    """Why something is as it is; the cause once, where the reason begins with it."""
    return reason if not cause or reason.startswith(cause) else f"{cause}: {reason}"


@dataclass(frozen=True)
class Standing(Verdict):
    """The verdict that counts, since a Unix time; `good` or `bad` ones came in a row."""

    state: State = "unknown"
    since_at: float = 0.0
    good: int = 0
    bad: int = 0

    @property
    def why(self) -> str:
        return caused(self.cause, self.reason)

    @property
    def decided(self) -> bool:
        """Whether the last result agrees with the state; if not, the next poll comes soon."""
        return self.state == "unknown" or (self.good > 0) == self.healthy


def settle(standing: Standing, verdict: Verdict, settings: ResourceSettings, at: float) -> Standing:
    """The standing after one more verdict: the first counts at once, then `rise` and `fall` in a row."""
    good = standing.good + 1 if verdict.healthy else 0
    bad = 0 if verdict.healthy else standing.bad + 1
    counts = (standing.state == "unknown" or verdict.healthy == standing.healthy or verdict.cause in AT_ONCE
              or good >= settings.rise or bad >= settings.fall)
    if not counts:
        return replace(standing, good=good, bad=bad)
    since_at = standing.since_at if verdict.state == standing.state else at
    return Standing(verdict.state, verdict.cause, verdict.reason, since_at, good, bad)


# === Aggregate ===============================================================
# Every poller's standing comes in by set_resource; out go leases in shared memory, which gates of all processes compare
# with the clock: of the whole site, of each route and of each group. Reports come from any thread; under one lock a
# changed one goes up the groups it is in and down to what depends on it, as far as it changes them, and then the leases
# of groups are written. What opens or closes is announced in `transitions`, which the recorder empties.
# Gives: closed_groups, gates_of, GroupState, HealthAggregator, Lease, Override, SITE
DEFAULT_TTL = 132.0             # seconds; the lease of a resource with default settings
OVERRIDE_TTL = 30.0             # seconds for which the gate is opened by hand, unless that is said again
Span = tuple[float, float]      # monotonic times: until when something is healthy, and when it can be so again
WAITED_FOR: Span = (0.0, 0.0)   # of what has no result yet, at the start
SITE = ""                       # the whole site among groups and routes
# The site waits for it until all have a result. No resource has a slash in its name, no route two of them.
START = "//start"
TOP = (SITE,)


class Lease:
    """Two times of lease_clock in shared memory: until when the site is healthy, and when it can be so again; in
    `parts`, the same of groups by name and of routes by path."""

    def __init__(self, parts: Iterable[str] = (), *, name: str = SITE, observes: bool = False) -> None:
        self.name = name
        self.until: ctypes.c_double = multiprocessing.RawValue(ctypes.c_double, 0.0)
        self.opens: ctypes.c_double = multiprocessing.RawValue(ctypes.c_double, 0.0)
        self.by_hand: ctypes.c_byte = multiprocessing.RawValue(ctypes.c_byte, 0)    # 1: opened, -1: closed
        self.observes: ctypes.c_bool = multiprocessing.RawValue(ctypes.c_bool, observes)    # the mode; see Mode
        self.parts = {part: Lease(name=part, observes=observes) for part in parts}

    @property
    def mode(self) -> Mode:
        return "observe" if self.observes.value else "enforce"

    def part(self, name: str) -> Lease | None:
        """That of a group, a route or the site; None where the workers do not know it yet."""
        return self.parts.get(name) if name else self

    def take_modes(self, gates: Gates) -> None:
        """Those of the routes; one without has the site's."""
        for name, lease in self.parts.items():
            lease.observes.value = (gates.route(name, self.parts).mode or self.mode) == "observe"


class Override(Settings):
    """What an operator says of the site's gate, whatever the resources say. `close` closes all but the paths that need
    nothing, `open` opens all; groups stay as they are."""

    action: Literal["open", "close"]
    at: float                   # Unix time of its begin
    seconds: float | None       # for which it holds; None: until it is ended
    reason: str
    actor: str
    boot: int = 0               # the start of the machine, see boot_number
    begun_mono: float = 0.0     # by lease_clock, which counts while that start lasts

    @property
    def until(self) -> float | None:
        """Unix time of its end."""
        return None if self.seconds is None else self.at + self.seconds

    @property
    def why(self) -> str:
        verb = "opened" if self.action == "open" else "closed"
        return f"{verb} by {self.actor}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True)
class GroupState:
    """How a group or route stands, and why."""

    name: str                       # of a route its path
    state: Literal["healthy", "degraded", "unhealthy"]
    needed: int                     # so many of its members
    members: Mapping[str, bool]     # those that count: whether they are healthy
    why: str
    mode: Mode


class Group:
    """So many of its members as are needed: the N-th latest end, the N-th soonest opening. Nobody needs nothing.

    Two sorted lists: to look through 10,000 members at each report would cost a hundred times as much."""

    def __init__(self, quorum: Quorum = "all", warn: Quorum | None = None) -> None:
        self._quorum, self._warn = quorum, warn
        self._ends: list[float] = []        # of the healthy ones
        self._openings: list[float] = []    # of the others
        self.needed = 0     # how many of those that count now, at most all of them
        self.span: Span | None = None   # of who counts; None while nobody does

    def exchange(self, before: Span | None, after: Span | None) -> None:
        """A member's span changes; it is None while the member does not count."""
        ends, openings = self._ends, self._openings
        if before:
            end, opening = before
            values, old = (ends, end) if opening == -math.inf else (openings, opening)
            del values[bisect.bisect_left(values, old)]
        if after:
            end, opening = after
            values, new = (ends, end) if opening == -math.inf else (openings, opening)
            bisect.insort(values, new)
        if not before or not after:
            self.needed = quorum_of(self._quorum, len(ends) + len(openings))
        if not self.needed:
            self.span = None
        elif self.needed <= len(ends):
            self.span = ends[-self.needed], -math.inf
        else:
            self.span = 0.0, openings[self.needed - len(ends) - 1]

    def state(self, now: float) -> Literal["healthy", "degraded", "unhealthy"]:
        """At a moment of the lease's clock."""
        good = len(self._ends) - bisect.bisect_right(self._ends, now)
        short = self._warn and good < quorum_of(self._warn, len(self._ends) + len(self._openings))
        return "degraded" if short else "healthy"

    def may_yet(self, member: Span | None, more: int, now: float) -> bool:
        """Whether it can be healthy with a member, as known until now, gone bad, by so many more that have no result
        yet."""
        hoped = len(self._ends) - bisect.bisect_right(self._ends, now) - bool(member and member[0] > now) + more
        total = len(self._ends) + len(self._openings) + (member is None) + more
        return bool(more) and hoped >= quorum_of(self._quorum, total)


class GroupTree:
    """What resources make of the groups and routes that they are in, of those above these, and of what depends on them.

    A resource is healthy until its own result ends or the first of those that it depends on does, its parents. One
    that counts nowhere, or without a result, makes nobody unhealthy; nor does a group by what has none."""

    def __init__(self) -> None:
        self.spans: dict[str, Span] = {}                    # of resources, with what they depend on
        self.reasons: dict[str, str] = {}                   # of the unhealthy ones, by their own results
        self.aside: set[str] = set()                        # resources that count for nothing but their children
        self.groups: dict[str, Group] = {SITE: Group()}     # routes, too
        self.members: dict[str, tuple[str, ...]] = {}       # of each but the site, also those that do not count now
        self.parents: Mapping[str, Sequence[str]] = {}      # of resources that depend on others
        self.changed: set[str] = set()                      # groups whose span is another one
        self.override: Override | None = None               # what an operator says, and until when that opens
        self.overridden_until = 0.0
        self._own: dict[str, Span] = {}                     # of resources, by their own results
        self._above: dict[str, tuple[str, ...]] = {SITE: ()}    # where each is a member; else of the site
        self._children: dict[str, tuple[str, ...]] = {}           # what depends on each resource and group

    def arrange(self, gates: Gates, tagged: Mapping[str, Sequence[str]], known: Collection[str],
                parents: Mapping[str, Sequence[str]]) -> None:
        """Groups and routes from now on. Of routes only those that are `known` to the workers: one that was not there
        when they began counts for nothing yet, and one that is gone is as what is around it. No circle in `parents`."""
        routes = {path: gates.route(path, known).needs for path in known if path.startswith("/")}
        members = {group: tuple(inside) for group, inside in gates.in_groups(tagged).items()}
        order = [*graphlib.TopologicalSorter({**members, **parents}).static_order()]
        members |= {path: () if needs == () else tuple(dict.fromkeys((*(needs or ()), SITE)))
                    for path, needs in routes.items()}
        self.groups = {SITE: Group(), **{group.name: Group(group.healthy, group.warn) for group in gates.groups},
                       **{path: Group() for path in routes}}
        self._above = {name: () for name in (SITE, *routes)} | inverse(members)
        self.members, self.parents, self._children, self.spans = members, parents, {}, {}
        for name in dict.fromkeys((*order, *self._own)):    # each after what it depends on: so each goes up once
            self._settle(name)
        self._children = inverse(parents)
        self.changed |= {*self.groups, *known}

    def put(self, name: str, span: Span | None, reason: str | None = None) -> None:
        """What its own results say of a resource, None: it does not count; and why, where it is unhealthy."""
        self._own.pop(name, None)
        self.reasons.pop(name, None)
        if span:
            self._own[name] = span
        if reason is not None:
            self.reasons[name] = reason
        self._settle(name)

    def set_aside(self, name: str, aside: bool) -> None:
        """Lets a resource count for nothing but its children, or for everything again."""
        span, reason = self._own.get(name), self.reasons.get(name)
        self.put(name, None)
        (self.aside.add if aside else self.aside.discard)(name)
        self.put(name, None if aside and span == WAITED_FOR else span, reason)

    def awaits(self, name: str, pending: Collection[str], now: float) -> bool:
        """Whether those `pending` could make up for a bad resource or group in all that it is in, or further up."""
        places = self._places(name) if pending else ()
        for place in places:
            more = sum(self._is_pending(each, pending) for each in self.members.get(place, ()) if each != name)
            if not (self.groups[place].may_yet(self._span(name), more, now) or self.awaits(place, pending, now)):
                return False
        return bool(places)

    def _is_pending(self, name: str, pending: Collection[str]) -> bool:
        """Whether a first result is to come: of a group, of the first that counts in it."""
        if name not in self.groups:
            return name in pending
        inside = self.members.get(name, ())
        return self.groups[name].span is None and any(self._is_pending(each, pending) for each in inside)

    def counted(self, group: str) -> dict[str, Span]:
        """Its members that count now."""
        names = self.members[group] if group != SITE else (*self.groups, *self.spans)
        spans = ((name, self._span(name)) for name in names if group in self._places(name))
        return {name: span for name, span in spans if span}

    def blocker(self, name: str, now: float) -> str:
        """The unhealthy resource or group that a resource is behind, the farthest one; empty: there is none."""
        for parent in self.parents.get(name, ()):
            span = self._span(parent)
            if span and span != WAITED_FOR and span[0] <= now:
                return self.blocker(parent, now) or parent
        return ""

    def behind(self, name: str) -> int:
        """How many resources with a result depend on it, or on one that does."""
        found: set[str] = set()
        level = {name}
        while level := {child for each in level for child in self._children.get(each, ())
                        if child in self.spans} - found:
            found |= level
        return len(found)

    def gates(self, name: str) -> set[str]:
        """The routes and the site that count on a group, or are what is named."""
        found, level = {name}, {name}
        while level := {above for each in level for above in self._above.get(each, TOP)} - found:
            found |= level
        return {each for each in found if each == SITE or each.startswith("/")}

    def sources(self, name: str) -> set[str]:
        """The resources on whose results it depends whether this one is behind another."""
        found, level = set[str](), {*self.parents.get(name, ())}
        while level:
            found |= level
            level = {member for each in level for member in self.members.get(each, ())} - found
        return found - self.groups.keys()

    def why(self, name: str, now: float) -> str:
        """What keeps a group from being healthy: of several, the one that takes longest; empty: nothing does."""
        spans, needed = self.counted(name), self.groups[name].needed
        bad = [each for each, (until, _) in spans.items() if until <= now]
        if len(spans) - len(bad) >= needed:
            return ""
        good = f"{len(spans) - len(bad)} of {len(spans)} healthy: " if needed < len(spans) else ""
        behind = {each: blocker for each in bad if (blocker := self.blocker(each, now))}
        own = [each for each in bad if each not in behind]      # others are told of where these are not
        told = [each for each in own if each in self.groups or each in self.reasons] if own else bad
        if not told:
            return f"{good}no result of {', '.join(each.lstrip('/') for each in own[:5])}"
        worst = max(told, key=lambda each: spans[each][1])
        why = (self.why(worst, now) if worst in self.groups else self.reasons[worst] if worst not in behind
               else f"parent: behind {behind[worst]}")
        return f"{good}{worst or 'the whole site'}: {why}" + (f" and {len(told) - 1} more" if len(told) > 1 else "")

    def end_of(self, name: str, beats: Collection[float]) -> float:
        """The end of a lease; without who watches, until `beats`, only what needs nothing is open."""
        if name not in self.groups:
            return 0.0      # a group that is gone, and of which a worker still knows
        if name.startswith("/") and not self.members[name]:
            return math.inf
        span, override = self.groups[name].span, self.override_of(name)
        if override and override.action == "close":
            return 0.0
        end = span[0] if span else math.inf
        return min([max(end, self.overridden_until) if override else end, *beats])

    def override_of(self, name: str) -> Override | None:
        """What an operator says of it; of groups, and of paths that need nothing, nobody does."""
        return self.override if not name or (name.startswith("/") and self.members[name]) else None

    def _places(self, name: str) -> tuple[str, ...]:
        """The groups and routes in which it counts."""
        return () if name in self.aside else self._above.get(name, TOP)

    def _span(self, name: str) -> Span | None:
        return self.groups[name].span if name in self.groups else self.spans.get(name)

    def _settle(self, name: str) -> None:
        """Takes up what its own results and its parents make of a resource."""
        before, span = self.spans.pop(name, None), self._own.get(name)
        for parent in self.parents.get(name, ()) if span and span != WAITED_FOR else ():
            other = self._span(parent)
            if span and other and other != WAITED_FOR:
                span = min(span[0], other[0]), max(span[1], other[1])
        if span:
            self.spans[name] = span
        if span != before:
            self._climb(name, before, span)

    def _climb(self, name: str, before: Span | None, after: Span | None) -> None:
        for above in self._places(name):
            group = self.groups[above]
            was = group.span
            group.exchange(before, after)
            if group.span != was:
                self.changed.add(above)
                self._climb(above, was, group.span)
        for child in self._children.get(name, ()):
            self._settle(child)


class FirstResults:
    """Who has no result yet, and the bad first results that wait for theirs; the aggregator's lock guards both.

    Where those who have none could still make up for a bad one, in all groups that it is in, it counts for nothing
    until they have one, or until the next one of its own: a group that is added closes nothing by who answers first."""

    def __init__(self, tree: GroupTree, clock: Callable[[], float]) -> None:
        self._tree, self._clock = tree, clock
        self.pending: set[str] = set()
        self._early: dict[str, tuple[Span, str | None]] = {}

    def forget(self, name: str) -> None:
        """The resource does not count any more."""
        self._early.pop(name, None)
        self.await_no_more(name)

    def await_no_more(self, name: str) -> None:
        self.pending.discard(name)
        self.look_again()

    def take(self, name: str, span: Span, reason: str | None) -> None:
        """A result, and why where it is a bad one."""
        self.pending.discard(name)
        is_early = span[0] == 0.0 and not {name, START} & self._tree.spans.keys() and name not in self._early
        self._early.pop(name, None)
        if is_early:
            self._early[name] = span, reason
        else:
            self._tree.put(name, span, reason)
        self.look_again()

    def look_again(self) -> None:
        """Lets those count for which nothing is waited any more."""
        for name, (span, reason) in [*self._early.items()]:
            if not self._tree.awaits(name, self.pending, self._clock()):
                del self._early[name]
                self._tree.put(name, span, reason)


class HealthAggregator:
    """One answer for all resources: `SetResource` reports, `IsHealthy` asks.

    The answer is a lease: the time of lease_clock until which everything is known to be healthy. A report renews its
    resource's part for `ttl` seconds, the earliest part is the lease, and it is 0 while a resource is unhealthy or,
    at the start, without a result. So nobody who stops reporting is taken for healthy. A member of a group counts
    through it, and what a route names for that route.
    """

    def __init__(self, lease: Lease | None = None, clock: Callable[[], float] = lease_clock,
                 copy: Callable[..., None] | None = None, wall: Callable[[], float] = time.time) -> None:
        """`copy` is told, too, what becomes of a lease, as LeaseFile.put is; `wall` gives Unix time."""
        self.lease, self._copy = lease or Lease(), copy
        # Unix time, open, why, and which group or route
        self.transitions: queue.SimpleQueue[tuple[float, bool, str, str]] = queue.SimpleQueue()
        self._clock, self._wall = clock, wall
        self._until = self.lease.until
        self._lock = threading.Lock()               # guards all below and the writing of the leases
        self._owners: dict[str, object] = {}        # of the resources that count: critical and not in maintenance
        self._tree = GroupTree()
        self._arranged: object = None               # what it was arranged by
        self._holds_back = False                    # leases that have changed are written later
        self._open: dict[str, bool] = {}            # as it was announced
        self._first = FirstResults(self._tree, clock)
        self._announced = False                     # the registration of the start is over
        self.beats: dict[str, float] = {}          # until when those live who watch
        self._tree.put(START, WAITED_FOR)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is changed within takes effect as a whole: nothing opens or closes in between."""
        with self._lock:
            self._holds_back = True
        try:
            yield
        finally:
            with self._lock:
                self._holds_back = False
                self._publish()

    def arrange(self, gates: Gates, tagged: Mapping[str, Sequence[str]],
                parents: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
        """Groups and routes from now on, as far as the workers know them; `tagged`: names of resources by tag,
        `parents`: what resources depend on, without a circle."""
        with self._lock:
            if self._arranged != (gates, tagged, parents):
                self._arranged = gates, tagged, parents
                self._tree.arrange(gates, tagged, self.lease.parts, parents)
                self._first.look_again()
                self.lease.take_modes(gates)
                self._publish()

    def overrule(self, override: Override | None, until: float) -> None:
        """What an operator says of the gate holds from now on, until a time of the clock. To be said again and again:
        nothing is open by it for longer than OVERRIDE_TTL without that."""
        if override or self._tree.override:
            with self._lock:
                self._tree.override, self._tree.overridden_until = override, min(until, self._clock() + OVERRIDE_TTL)
            self.note_expiry()

    def register(self, name: str, owner: object = None, *, critical: bool = True, asked: bool = True) -> None:
        """The resource counts, one that is not `critical` for what depends on it alone. Before the first decision a
        critical one blocks everything until its first result, one that is not `asked` what it counts for; later none.

        Reports of another `owner` are dropped from now on."""
        with self._lock:
            self._owners[name] = owner
            if critical is (name in self._tree.aside):
                self._tree.set_aside(name, not critical)
                self._first.await_no_more(name)
            is_start, is_new = START in self._tree.spans, name not in self._tree.spans
            if critical and asked and (is_start or is_new):
                self._first.pending.add(name)
            if critical and is_start and is_new:
                self._tree.put(name, WAITED_FOR)
            self._publish()

    def deregister(self, name: str) -> None:
        """The resource does not count any more."""
        with self._lock:
            self._tree.put(name, None)
            self._tree.aside.discard(name)
            self._owners.pop(name, None)
            self._first.forget(name)
            self._publish()

    def start(self) -> None:
        """Ends the registration of the start: with nothing to wait for, the gate opens."""
        with self._lock:
            self._announced = True
            self._publish()

    # The specification's three arguments, and ours by keyword.
    def set_resource(self, name: str, healthy: bool, reason: str = "", *,   # noqa: PLR0913
                     ttl: float = DEFAULT_TTL, opens: float = 0.0, owner: object = None) -> None:
        """Reports a resource; the report counts for `ttl` seconds. `opens`: seconds until it can be healthy again.

        A name that is not registered is registered by a report without an owner."""
        with self._lock:
            if owner is not None and self._owners.get(name) is not owner:
                return      # it does not count, or its poller was stopped
            self._announced = self._announced or name not in self._owners
            self._owners.setdefault(name, owner)
            now = self._clock()
            span: Span = (now + ttl, -math.inf) if healthy else (0.0, now + opens)
            self._first.take(name, span, None if healthy else reason)
            self._publish()

    def is_healthy(self) -> bool:
        """Whether every counted resource is healthy now; one comparison, without a lock."""
        return self._clock() < self._until.value

    def beat(self, name: str, ttl: float = DEFAULT_TTL) -> None:
        """Notes that one lives who watches the others: nothing is open for longer than `ttl` without that."""
        with self._lock:
            self.beats[name] = self._clock() + ttl
        self.note_expiry()

    def note_expiry(self) -> None:
        """Looks at everything again, and announces what has closed by a lease that ran out."""
        with self._lock:
            self._tree.changed |= self._tree.groups.keys()
            self._publish()

    def blocker(self, name: str) -> str:
        """The unhealthy resource or group that a resource is behind; empty: there is none."""
        if name not in self._tree.parents:      # asked for each of 10,000
            return ""
        with self._lock:
            return self._tree.blocker(name, self._clock())

    def behind(self, name: str) -> int:
        """How many resources with a result depend on a resource or group, or on one that does."""
        with self._lock:
            return self._tree.behind(name)

    def sources(self, name: str) -> set[str]:
        """The resources that count by whose results it is decided whether this one is behind another."""
        if name not in self._tree.parents:
            return set()
        with self._lock:
            return self._tree.sources(name) & self._owners.keys()

    def groups(self, *, site: bool = False) -> list[GroupState]:
        """Groups and routes, as they stand; or the whole site alone."""
        with self._lock:
            return [self._state(name, group) for name, group in self._tree.groups.items() if (name == SITE) is site]

    def _state(self, name: str, group: Group) -> GroupState:
        now = self._clock()
        members = {each: span[0] > now for each, span in self._tree.counted(name).items() if each != SITE}
        is_open = self._tree.end_of(name, self.beats.values()) > now
        why = self._told(name, is_open)
        state = "unhealthy" if not is_open else "degraded" if why else group.state(now)
        mode = (self.lease.part(name) or self.lease).mode
        return GroupState(name, state, min(group.needed, len(members)), members, why, mode)

    def _publish(self) -> None:
        """Writes the leases that have changed, then tells what has opened or closed; the caller holds the lock."""
        if self._holds_back:
            return
        if START in self._tree.spans and self._announced and not self._first.pending:
            self._tree.put(START, None)
            self._tree.changed |= self._tree.groups.keys()
        changed, self._tree.changed = sorted(self._tree.changed), set()
        ends = {name: self._tree.end_of(name, self.beats.values()) for name in changed}
        for name, until in ends.items():
            if lease := self.lease.part(name):
                span = self._tree.groups[name].span if name in self._tree.groups else None
                override, opens = self._tree.override_of(name), max(span[1], 0.0) if span else 0.0
                lease.by_hand.value = 0 if not override else 1 if override.action == "open" else -1
                lease.opens.value = max(opens, self._tree.overridden_until) if lease.by_hand.value < 0 else opens
                lease.until.value = until
                if self._copy:      # elsewhere what needs nothing ends with us, too, as it does in our own workers
                    end = min([until, *(self.beats.values() or (self._clock() + DEFAULT_TTL,))])
                    observes = lease.observes.value and end <= self._clock()
                    self._copy(name, end, lease.opens.value, observes=observes)
        for name, until in ends.items():
            is_open = self._clock() < until
            decided = name in self._tree.groups and START not in self._tree.spans
            if decided and is_open is not self._open.get(name, None if name else False):    # the site's start is told
                count = 0 if is_open else self._tree.behind(name)
                why = self._told(name, is_open) + (f"; {count} behind it" if count else "")
                self.transitions.put((self._wall(), is_open, why, name))
                self._open[name] = is_open

    def _told(self, name: str, is_open: bool) -> str:
        """Why it is open or closed; nothing where it is open because all is well."""
        override = self._tree.override_of(name)
        if override and is_open is (override.action == "open"):
            return override.why
        if is_open:
            return ""
        dead = ", ".join(each for each, until in self.beats.items() if until <= self._clock())
        return self._tree.why(name, self._clock()) or f"no sign of life of {dead}"

    SetResource = set_resource
    IsHealthy = is_healthy


def closed_groups(aggregator: HealthAggregator, known: Collection[str]) -> dict[str, str] | None:
    """The groups, routes and the site that are closed, and why unless that is `known`; None: nothing is decided yet."""
    with aggregator._lock:
        now, beats, tree = aggregator._clock(), aggregator.beats.values(), aggregator._tree
        return None if START in tree.spans else {name: "" if name in known else aggregator._told(name, False)
                                                 for name in tree.groups if tree.end_of(name, beats) <= now}


def gates_of(aggregator: HealthAggregator, name: str) -> set[str]:
    """The routes and the site that count on a group, or are what is named."""
    with aggregator._lock:
        return aggregator._tree.gates(name)


# === History =================================================================
# What polls found: in come Reports, out go rows, averages of quarters of an hour, charts and availability. Readings are
# whole hundredths, NULL where nothing was read. The recorder's thread writes, any thread reads.
# 100 resources at 60 s: 288,000 polls and 864,000 averages are 82 MB; 100,000 events add 20 MB.
# Gives: DAY, EVENTS, filesystem_charts, FILESYSTEMS, known_since, METRICS, POLLS, POLL_MARKS, PRUNE_PART,
# PRUNE_ROWS, SPANS, SAMPLES, highest_readings, Report, record_event, events, PastPoll, samples, roll_up, prune,
# prune_events, availability, Point, chart
DAY = 86_400                    # seconds
PRUNE_ROWS = 10, 10_000         # rows of a resource, or events, that are dropped at once, at least and at most
PRUNE_PART = 50                 # of how many rows one is dropped at once: a clock that is wrong takes half a day to
                                # drop half of them, and of 12 hours or more an ordinary quarter drops fewer
EVENTS = 100_000                # events of a kind that are kept at most: a resource may flap for a year
METRICS = ("cpu_percent", "memory_percent", "swap_percent", "disk_percent", "load_per_cpu", "seconds")
HOUR = 3600                     # seconds between two readings of every filesystem: they fill slowly
MOUNT_PERCENTS = TypeAdapter(dict[str, int])     # in hundredths
MOUNTS, MOUNT_CHARS = 20, 200   # filesystems of a resource that are kept, and characters of a mount point, at most
READING_MAX = 2 ** 31 - 1       # hundredths, what an INTEGER holds
POLLS: dict[str, tuple[State, Cause]] = {
    "h": ("healthy", ""), "d": ("degraded", "limit"), "w": ("degraded", "check"),     # all that are good: PARTS
    **{mark: ("unhealthy", cause) for mark, cause in zip("lcutakrpsbo", get_args(Cause)[1:], strict=True)}}
POLL_MARKS = {meaning: mark for mark, meaning in POLLS.items()}
SPANS = {"hour": (3600, 10), "day": (86_400, 300), "week": (604_800, 1800), "month": (2_592_000, 7200)}
# seconds that a chart shows, and of a point: 360 points at most


def history_table(name: str, at: Any, columns: Mapping[str, Any]) -> sqlalchemy.Table:
    """A table of what was with a resource at a Unix time; readings in hundredths, NULL where there are none."""
    key = ForeignKey("resource.id", ondelete="CASCADE")
    return sqlalchemy.Table(
        name, Base.metadata, sqlalchemy.Column("resource_id", key, primary_key=True),
        sqlalchemy.Column("at", at, primary_key=True),
        *(sqlalchemy.Column(column, kind, nullable=column.startswith(METRICS)) for column, kind in columns.items()),
        sqlite_with_rowid=False)


# A poll, or that there was none in time: POLLS of it and of the state after it, and the seconds for which it counts
SAMPLES = history_table("sample", sqlalchemy.Double, dict.fromkeys(("reason", "poll", "standing"), sqlalchemy.String)
                        | dict.fromkeys(("counts", *METRICS), sqlalchemy.Integer))
# A quarter of an hour, by its begin, of which something is known: for tenths of seconds, and healthy for how many
AVERAGES = history_table("average", BIG_INTEGER, dict.fromkeys(
    ("known", "healthy", *(metric + end for end in ("", "_minimum", "_maximum") for metric in METRICS)),
    sqlalchemy.Integer))
# The first reading of an hour, by its begin: JSON of how full each filesystem is
FILESYSTEMS = history_table("filesystem", BIG_INTEGER, {"percents": sqlalchemy.String})


def highest_readings(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a Sample, of several disks the fullest one."""
    highest: dict[str, float] = {}
    for name, value in metrics.items():
        metric = name.partition(" ")[0]
        highest[metric] = max(value, highest.get(metric, 0.0))
    return highest


@dataclass(frozen=True)
class Report:
    """What a poller tells the recorder after a poll; times are Unix times, `seconds` the duration of the poll. `before`
    is the standing that was told last, or `standing` itself where nothing is to be told."""

    target: Target
    before: Standing
    standing: Standing
    verdict: Verdict
    at: float
    seconds: float
    sample: Sample | None = None
    host_key: str | None = None
    waits: float = 0.0              # seconds until the next login
    kept: bool = False              # it came over what was open
    epoch: str = ""                 # of this machine's life, when the poll began
    is_doubtful: bool = False       # it may be this machine that is cut off
    counts: float = 0.0             # seconds for which it counts
    opens: float = 0.0              # seconds until it can be healthy again
    blocker: str = ""               # the unhealthy resource or group that it is behind
    behind: int = 0                 # how many are behind it, while it is unhealthy
    owned: bool = True              # this machine tells of it, whoever polls it by then
    made_mono: float = dataclass_field(default_factory=lease_clock)

    @property
    def transition(self) -> str:
        """What has changed, and after how long; empty for nothing."""
        before, after = self.before, self.standing
        if (before.state, before.cause) == (after.state, after.cause):
            return ""
        lasted = f" after {self.at - before.since_at:.0f} s" if before.since_at else ""
        why = after.why + (f"; {self.behind} behind it" if self.behind else "")
        return f"{before.state} -> {after.state}{f' ({why})' if why else ''}{lasted}"

    @functools.cached_property
    def sample_row(self) -> dict[str, Any]:
        """The row of SAMPLES."""
        found = highest_readings(self.sample.metrics if self.sample else {})
        found |= {"seconds": self.seconds} if self.seconds else {}
        verdict, counts = self.verdict, self.target.settings.ttl + self.waits
        after = Standing("unhealthy", "parent") if self.blocker else self.standing
        return {"resource_id": self.target.id, "at": self.at, "reason": verdict.reason, "counts": int(counts),
                "poll": POLL_MARKS[verdict.state, verdict.cause], "standing": POLL_MARKS[after.state, after.cause],
                **{metric: min(round(found[metric] * 100), READING_MAX) if metric in found else None
                   for metric in METRICS}}

    @property
    def filesystem_row(self) -> dict[str, Any] | None:
        """The row of FILESYSTEMS; None where there are not several: then the polls say it."""
        named = ((name.partition(" "), value) for name, value in (self.sample.metrics if self.sample else {}).items())
        found = [(mount, round(100 * value)) for (metric, _, mount), value in named
                 if metric == "disk_percent" and len(mount) <= MOUNT_CHARS]
        return {"resource_id": self.target.id, "at": int(self.at // HOUR) * HOUR,
                "percents": json.dumps(dict(found[:MOUNTS]))} if len(found) > 1 else None

    @functools.cached_property
    def status(self) -> dict[str, Any]:
        """The row of Status, without its strip."""
        target = self.target
        return {"resource_id": target.id, "settings_digest": target.settings_digest,
                "credential_digest": target.credential_digest, **vars(self.standing), "polled_at": self.at,
                "seconds": self.seconds, "sample": self.sample.to_json() if self.sample else "null"}


def record_event(session: Session, kind: str, text: str, *, actor: str = "", address: str = "",    # noqa: PLR0913
                 at: float | None = None, **about: str) -> None:
    """Adds an event within the caller's transaction; its arguments are the columns. `at` is Unix time, default now;
    `about`: which resource or group, and its state."""
    at = session.info["wall"]() if at is None else at
    session.add(Event(at=at, kind=kind, text=one_line(text), actor=one_line(actor), address=one_line(address), **about))


def events(session: Session, *, resource: str | None = None, kind: str | None = None, before: int | None = None,
           limit: int = 100) -> list[Event]:
    """The newest events first, `limit` of them, or of those before the event of the id `before`: in the order of their
    times, for some are written a second late, but for those from before the clock was set, which stand last."""
    query = sqlalchemy.select(Event).order_by(Event.at.desc(), Event.id.desc())
    for column, value in ((Event.resource, resource), (Event.kind, kind)):
        query = query if value is None else query.where(column == value)
    set_clock = sqlalchemy.select(Event.id).where(Event.kind == "clock").order_by(Event.id.desc()).limit(1)
    last, found = session.scalar(set_clock) or 0, list[Event]()
    for era in (Event.id >= last, Event.id < last)[before is not None and before < last:]:
        part = query.where(era)
        if before is not None:
            at = sqlalchemy.select(Event.at).where(Event.id == before).scalar_subquery()
            part = part.where(sqlalchemy.tuple_(Event.at, Event.id) < sqlalchemy.tuple_(at, before))
            before = None       # the other era stands before it as a whole
        found += session.scalars(part.limit(limit - len(found)))
    return found


class PastPoll(NamedTuple):
    """What is known of a poll; `standing` is the state of the resource after it."""

    at: float
    state: State
    cause: Cause
    reason: str
    standing: State
    readings: dict[str, float]


def samples(session: Session, resource_id: int, now: float, *, since: float = 0.0,
            limit: int = STRIP) -> list[PastPoll]:
    """The last polls of a resource until `now`, oldest first, `limit` of them, none before `since` (Unix times)."""
    rows = session.execute(sqlalchemy.select(SAMPLES).where(
        SAMPLES.c.resource_id == resource_id, SAMPLES.c.at.between(since, now)
    ).order_by(SAMPLES.c.at.desc()).limit(limit)).mappings().all()
    return [PastPoll(row["at"], *POLLS[row["poll"]], row["reason"], POLLS[row["standing"]][0],
                     {metric: row[metric] / 100 for metric in METRICS if row[metric] is not None})
            for row in reversed(rows)]


# From :begin to :end, a poll's state lasts until the next poll, but no longer than the poll counts; that of the one
# before :begin may last into this time. It has a part in each quarter of an hour that it lasts into.
PARTS = f"""WITH RECURSIVE poll AS (
    SELECT at, CASE WHEN standing IN ('h', 'd', 'w') THEN 1 ELSE 0 END AS good,
        LEAST(at + counts, LEAD(at, 1, :end) OVER (ORDER BY at)) AS until
    FROM sample WHERE resource_id = :id AND at < :end AND at >= COALESCE(
        (SELECT MAX(at) FROM sample WHERE resource_id = :id AND at < :begin), :begin)
), part AS (
    SELECT GREATEST(at, :begin) AS at, floor(GREATEST(at, :begin) / {QUARTER}) * {QUARTER} AS quarter, until, good
    FROM poll WHERE until > :begin
    UNION ALL
    SELECT quarter + {QUARTER}, quarter + {QUARTER}, until, good FROM part WHERE quarter + {QUARTER} < until
), known AS (
    SELECT at, quarter, LEAST(until, quarter + {QUARTER}) - at AS seconds, good FROM part
)"""    # noqa: S608  # nobody's words
# The part that begins with a poll is joined to its readings.
ROLL_UP = sqlalchemy.text(f"""INSERT INTO average {PARTS}
    SELECT :id, CAST(quarter AS BIGINT), CAST(ROUND(10 * SUM(known.seconds)) AS INTEGER),
        CAST(ROUND(10 * SUM(good * known.seconds)) AS INTEGER),
        {", ".join(f"CAST(ROUND(AVG(sample.{metric})) AS INTEGER)" for metric in METRICS)},
        {", ".join(f"{end}(sample.{metric})" for end in ("MIN", "MAX") for metric in METRICS)}
    FROM known LEFT JOIN sample ON sample.resource_id = :id AND sample.at = known.at GROUP BY quarter""")  # noqa: S608
AVAILABLE = sqlalchemy.text(f"""{PARTS} SELECT SUM(seconds), SUM(good) FROM (
    SELECT seconds, good * seconds AS good FROM known WHERE at >= :first UNION ALL
    SELECT known / 10.0, healthy / 10.0 FROM average WHERE resource_id = :id AND at >= :first) AS times
    """)    # noqa: S608  # nobody's words
CHARTS = {metric: sqlalchemy.text(f"""
    SELECT floor(at / :step) * :step, AVG(average), MIN(lowest), MAX(highest) FROM (
        SELECT at, {metric} AS average, {metric}_minimum AS lowest, {metric}_maximum AS highest
        FROM average WHERE resource_id = :id AND at >= :first AND at < :polls
        UNION ALL SELECT at, {metric}, {metric}, {metric}
        FROM sample WHERE resource_id = :id AND at >= :first AND at >= :polls AND at < :now) AS points
    WHERE average IS NOT NULL GROUP BY 1 ORDER BY 1""") for metric in METRICS}   # noqa: S608  # nobody's words


def rolled_until(session: Session, resource_id: int) -> int:
    """Unix time until which averages are made; 0 when there is none."""
    last = session.scalar(sqlalchemy.select(func.max(AVERAGES.c.at)).where(AVERAGES.c.resource_id == resource_id))
    return 0 if last is None else last + QUARTER


def roll_up(session: Session, resource_id: int, end: int) -> None:
    """Makes the averages that are missing until `end`, a multiple of QUARTER."""
    session.execute(ROLL_UP, {"id": resource_id, "begin": rolled_until(session, resource_id), "end": end})


# Two for each table: both ends in one would be no range. Written out, for they run every second.
PRUNE = tuple(sqlalchemy.text(
    f"DELETE FROM {table} WHERE resource_id = :id AND at IN (SELECT at FROM {table} "   # noqa: S608  # nobody's words
    f"WHERE resource_id = :id AND {outside} LIMIT GREATEST({PRUNE_ROWS[0]}, LEAST({PRUNE_ROWS[1]}, "
    f"(SELECT COUNT(*) / {PRUNE_PART} FROM {table} WHERE resource_id = :id))))")
    for table in ("sample", "average", "filesystem") for outside in (f"at < :{table}", "at > :future"))
# What was removed goes when nothing is left of its history.
DROP = sqlalchemy.text(f"DELETE FROM resource WHERE id = :id AND origin = '{REMOVED}' AND NOT EXISTS "  # noqa: S608
                       "(SELECT 1 FROM sample WHERE resource_id = :id UNION ALL "
                       "SELECT 1 FROM average WHERE resource_id = :id)")


def prune(session: Session, resource_id: int, retention: Retention, now: float) -> None:
    """Drops what is older than `retention`, a part at most, and what is of a future that a clock once showed."""
    for statement in (*PRUNE, DROP):
        session.execute(statement, {"id": resource_id, "sample": now - retention.raw * DAY,
                                    **dict.fromkeys(("average", "filesystem"), now - retention.averages * DAY),
                                    "future": now + QUARTER})


def prune_events(session: Session, retention: Retention, now: float) -> None:
    """Drops what is older than `retention`, and of each kind what is more than EVENTS: logins evict no change."""
    for kind, count in session.execute(sqlalchemy.select(Event.kind, func.count()).group_by(Event.kind)).all():
        of_kind = sqlalchemy.select(Event.id).where(Event.kind == kind).order_by(Event.id)
        old = of_kind.where(Event.at < now - retention.events * DAY)
        for doomed in (of_kind.limit(min(max(0, count - EVENTS), PRUNE_ROWS[1])),
                       old.limit(max(PRUNE_ROWS[0], count // PRUNE_PART))):
            session.execute(sqlalchemy.delete(Event).where(Event.id.in_(doomed)))


def known_since(session: Session, resource_id: int) -> float | None:
    """Unix time of the first of what is known of a resource."""
    first = [session.scalar(sqlalchemy.select(func.min(table.c.at)).where(table.c.resource_id == resource_id))
             for table in (SAMPLES, AVERAGES)]
    return min((at for at in first if at is not None), default=None)


def availability(session: Session, resource_id: int, now: float) -> dict[str, float | None]:
    """Percent of the last day, week and month in which the resource was healthy or degraded; time of which nothing is
    known does not count, None: nothing is known at all."""
    begin, found = rolled_until(session, resource_id), {}
    for span in ("day", "week", "month"):
        known, healthy = session.execute(AVAILABLE, {
            "id": resource_id, "begin": begin, "end": now, "first": now - SPANS[span][0]}).one()
        found[span] = 100 * healthy / known if known else None
    return found


class Point(NamedTuple):
    """A point of a chart, from `at` (Unix time) on for the seconds of SPANS."""

    at: int
    average: float
    minimum: float
    maximum: float


def chart(session: Session, resource_id: int, metric: str, span: str, now: float) -> list[Point]:
    """A metric of METRICS over a span of SPANS; a point is left out when nothing was read in its time."""
    seconds, step = SPANS[span]
    first = session.scalar(sqlalchemy.select(func.min(SAMPLES.c.at)).where(SAMPLES.c.resource_id == resource_id))
    polls = now if first is None else first     # from then on; there are averages of the time before
    if span in ("week", "month"):
        polls = max(polls, rolled_until(session, resource_id))
    rows = session.execute(CHARTS[metric], {"id": resource_id, "step": step, "first": now - seconds, "polls": polls,
                                            "now": now})
    return [Point(int(at), float(average) / 100, lowest / 100, highest / 100) for at, average, lowest, highest in rows]


def filesystem_charts(session: Session, resource_id: int, span: str, now: float) -> dict[str, list[Point]]:
    """How full the filesystems of today were over a span of SPANS, by their mount points."""
    at, percents, first = FILESYSTEMS.c.at, FILESYSTEMS.c.percents, now - SPANS[span][0]
    rows: list[tuple[int, dict[str, int]]] = []
    for then, text in session.execute(sqlalchemy.select(at, percents).where(
            FILESYSTEMS.c.resource_id == resource_id, at.between(first, now)).order_by(at)):
        with contextlib.suppress(ValidationError):      # of a damaged row
            rows.append((then, MOUNT_PERCENTS.validate_json(text)))
    return {mount: [Point(at, *[found[mount] / 100] * 3) for at, found in rows if mount in found]
            for mount in (rows[-1][1] if len(rows) > 1 else ())}


# === Uplink ==================================================================
# Whether it is this machine that is cut off. In come what polls found and, once one found no answer, what the addresses
# of service.uplink say, asked in a thread of its own; out goes a Cut, by which the pollers report for a while what was
# healthy before it. All times in `_mono` are of lease_clock.
# Gives: CUT_OFF, NO_ANSWER, Outage, Uplink
NO_ANSWER = ("unreachable", "timeout")      # causes that a cut can have
UPLINK_TIMEOUT = 3.0            # seconds for an uplink to answer
UPLINK_INTERVAL = 5.0           # seconds between two questions
UPLINK_FRESH = 15.0             # seconds for which the answer to one counts
UPLINK_DOUBT = 30.0             # seconds for which nobody is told of what does not answer, as long as most may not
URGED_MAX = 200                 # machines that are polled at once, to see whether they answer
CUT_OFF = Standing("unhealthy", "cut_off", "this machine is, for no uplink answers")


class Cut(NamedTuple):
    """This machine is cut off. Of what did not answer before `calm_mono` nothing is held: an uplink answered then, or
    an earlier cut was over."""

    begun_mono: float
    begun_at: float         # Unix time
    ends_mono: float        # of the hold
    calm_mono: float
    text: str
    over_mono: float = math.inf     # when it was over


class Uplink:
    """Finds out whether this machine is cut off: no uplink answers, nor do more than half of the machines."""

    def __init__(self, addresses: Sequence[str] = (), hold: float = 0.0, resolver: Resolver | None = None,
                 clock: Callable[[], float] = lease_clock, wall: Callable[[], float] = time.time) -> None:
        self._addresses, self._hold, self._resolver, self.clock = addresses, hold, resolver or Resolver(), clock
        self._wall = wall
        self._lock = threading.Lock()               # guards the next fourteen
        self.cut: Cut | None = None
        self._last: Cut | None = None               # this one, or the one before
        self._is_cut = False                        # also while most machines do not answer
        self._machines: set[str] = set()            # that count: with a result, or asked for no uplink answers
        self._failing: set[str] = set()             # those of them that did not answer the last time
        self._unsure: set[str] = set()              # and those that were asked, of which nothing is known yet
        self._extra: set[str] = set()               # and those that were asked though another machine polls them
        self._others: set[str] = set()              # what other machines poll
        self._failed_mono = -math.inf               # the last result without an answer
        self._fell_mono = -math.inf                 # and the last one of what had answered before
        self._urged_mono = -math.inf                # when those unsure were asked
        self._asked_mono = -math.inf                # begin of the last question that is over
        self._silent_mono = math.inf                # since when no uplink answers
        self._calm_mono = clock()                   # see Cut
        self._woken, self._is_ending = threading.Event(), False
        self._trouble = Trouble("what the uplinks say is not known")
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)

    def begin(self, urge: Callable[[Iterable[str]], None], changed: Callable[[], None],
              note: Callable[[str, str, float], None]) -> None:
        """Starts, where there is an uplink. `urge` has machines polled, `changed` is called when another standing
        counts, `note` with an event."""
        self._urge, self._changed, self._note = urge, changed, note
        if self._addresses:
            self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._is_ending = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(UPLINK_TIMEOUT)

    def take(self, name: str, verdict: Verdict) -> None:
        """What the last poll of a machine found, before its standing is reported."""
        failed = verdict.cause in NO_ANSWER
        if not self._addresses:
            return
        with self._lock:
            self._machines.add(name)
            self._others.discard(name)
            self._unsure.discard(name)
            if failed:
                self._failed_mono = self.clock()
                self._fell_mono = self._fell_mono if name in self._failing else self._failed_mono
            (self._failing.add if failed else self._failing.discard)(name)
            before = self.cut
            self._judge()
        if failed or self.cut is not before:
            self._woken.set()

    def forget(self, name: str) -> None:
        """It is not watched any more, or in maintenance."""
        with self._lock:
            for names in (self._machines, self._failing, self._unsure, self._others, self._extra):
                names.discard(name)
            self._judge()

    def leave(self, name: str) -> None:
        """Another machine polls it: that it answers here or not shows something as long as no uplink answers, alone."""
        with self._lock:
            self._others.add(name)
            if self._silent_mono == math.inf:
                self._machines.discard(name)
                self._failing.discard(name)

    def covers(self, name: str, since_mono: float, round_seconds: float) -> bool:
        """Whether a machine does not answer because this one is cut off. A cut lasts on for what it holds, when most
        machines answer again: then for that alone."""
        cut = self.cut
        is_of_it = cut is not None and (self._is_cut or abs(cut.begun_mono - since_mono) <= round_seconds)
        return is_of_it and name in self._failing

    def held(self, since_mono: float, round_seconds: float, recovery_seconds: float) -> float:
        """Seconds for which what was before an outage counts on; 0: it does not. Only for one that began in the round
        of polls before the cut or after its begin, and when that is over for as long as it takes to recover; and until
        it is known whether there is one: polls may fail sooner than an uplink is known to be silent, and most do."""
        cut = self._last
        if self._calm_mono < since_mono and self.is_doubtful(since_mono):
            return max(0.0, since_mono + min(self._hold, UPLINK_DOUBT) - self.clock())
        if (cut is None or not cut.calm_mono < since_mono < cut.over_mono
                or abs(cut.begun_mono - since_mono) > round_seconds):
            return 0.0
        return max(0.0, min(cut.ends_mono, cut.over_mono + recovery_seconds) - self.clock())

    def is_doubtful(self, since_mono: float) -> bool:
        """Whether it may soon turn out that this machine is cut off, and an outage due to that."""
        if self.cut or not self._addresses or since_mono == math.inf:
            return False
        may_be = self._silent_mono < math.inf and self.clock() - self._urged_mono < UPLINK_DOUBT
        most = may_be and 2 * (len(self._failing) + len(self._unsure)) > len(self._machines)
        return most or since_mono > self._asked_mono

    def _judge(self) -> None:
        """Takes up whether this machine is cut off; the caller holds the lock."""
        if not self._failing and self._silent_mono < math.inf:
            self._end_silence()     # nobody asks any more
        now, count, total = self.clock(), len(self._failing), len(self._machines)
        own, own_total = count - len(self._extra & self._failing), total - len(self._extra)
        if 2 * own > own_total > 1:     # most of its own, or of all: what does not answer yet is none of them
            count, total = own, own_total
        self._is_cut = is_cut = self._silent_mono <= now and 2 * count > total > 1
        if is_cut and self.cut is None and now - self._asked_mono < UPLINK_FRESH:
            text = f"cut off: {count} of {total} machines do not answer, nor does an uplink"
            self.cut = self._last = Cut(now, self._wall(), now + self._hold, self._calm_mono, text)
        elif self.cut and (self._silent_mono == math.inf or (not is_cut and now >= self.cut.ends_mono)):
            self._last, self.cut = self.cut._replace(over_mono=now), None
            self._calm_mono = now       # not before, or a machine that answers again would close the gate

    def _end_silence(self) -> None:
        """The caller holds the lock."""
        self._silent_mono = math.inf
        self._machines -= self._others
        self._failing -= self._others
        self._unsure, self._extra = set(), set()

    def _run(self) -> None:
        told = self.cut
        while not self._is_ending:
            self._woken.wait(self._pause())
            self._woken.clear()
            with self._trouble.caught():
                if self._pause() == 0 and not self._is_ending:
                    self._urge(self._ask())
                if (cut := self.cut) is not told:
                    self._changed()
                    self._tell(told, cut)
                    told = cut

    def _pause(self) -> float | None:
        """Seconds until an uplink is to be asked; None: not before a machine does not answer."""
        has_question = self.cut is not None or bool(self._failing and (
            self._failed_mono > self._asked_mono or self._silent_mono < math.inf))
        return max(0.0, self._asked_mono + UPLINK_INTERVAL - self.clock()) if has_question else None

    def _ask(self) -> list[str]:
        """Asks the uplinks, all at once. Gives who is to be polled then: when they fall silent, or a machine does so
        meanwhile, the others, whoever polls them, and when one is heard again, those that did not answer."""
        before_mono, begun_mono, urged = self._asked_mono, self.clock(), list[str]()
        answered = self._is_answered(begun_mono)
        with self._lock:
            was_calm = self._silent_mono == math.inf
            if answered:
                urged = [] if was_calm else [*self._failing]
                self._end_silence()
                self._calm_mono = self.clock()
            elif was_calm or self._fell_mono > before_mono:
                urged = [*self._machines - self._failing, *self._others - self._machines]
                self._extra |= {*urged[:URGED_MAX]} - self._machines
                self._machines |= self._extra
                self._unsure, self._urged_mono = self._machines - self._failing, self.clock()
            self._silent_mono = math.inf if answered else min(self._silent_mono, begun_mono)
            self._judge()
        return urged[:URGED_MAX]

    def _is_answered(self, begun_mono: float) -> bool:
        """Whether any uplink does. Where they cannot be asked, nobody knows: that is no silence, and the next question
        comes no sooner."""
        asked = False
        try:
            with concurrent.futures.ThreadPoolExecutor(len(self._addresses)) as pool:
                answered = any(pool.map(self._answers, self._addresses))
            asked = True
            return answered
        finally:
            with self._lock:
                self._asked_mono = begun_mono
                if not (asked or self.cut):
                    self._end_silence()

    def _answers(self, address: str) -> bool:
        """Whether an uplink does; who refuses is there, too."""
        host, _, port = address.rpartition(":")
        try:
            connect_tcp(self._resolver, host.strip("[]"), int(port), Deadline(UPLINK_TIMEOUT)).close()
        except ProbeError as error:
            return isinstance(error.__cause__, ConnectionRefusedError)
        return True

    def _tell(self, told: Cut | None, cut: Cut | None) -> None:
        now = self._wall()
        texts = [(f"not cut off any more after {now - told.begun_at:.0f} s", now)] if told else []
        if cut:
            hold = f"; what was healthy counts on for {self._hold:g} s" if self._hold else ""
            texts.append((cut.text + hold, cut.begun_at))
        for text, at in texts:
            log.warning("%s", text)
            self._note("service", text, at)


class Outage:
    """What the polls of one resource show of whether this machine gets through: since when there is no answer, and
    whether it was healthy until then, which may count on. Under the poller's lock."""

    def __init__(self, settings: ResourceSettings, uplink: Uplink) -> None:
        self._settings, self._uplink = settings, uplink
        self._round = settings.interval + settings.timeout
        self._since_mono, self._was_healthy = math.inf, False
        if settings.platform in HOSTLESS:
            self.forget()       # what had this name before may have been a machine

    def take(self, before: Standing, verdict: Verdict, after: Standing) -> None:
        """One more result, and the standings before and after it. An outage is over once the standing is healthy, or it
        is something else that is wrong."""
        if verdict.cause == "stale" or self._settings.platform in HOSTLESS:
            return
        if verdict.cause not in NO_ANSWER and (after.healthy or not verdict.healthy):
            self._since_mono = math.inf
        elif verdict.cause in NO_ANSWER and self._since_mono == math.inf:
            self._since_mono, self._was_healthy = self._uplink.clock(), before.healthy and not before.bad
        self._uplink.take(self._settings.name, verdict)

    def forget(self) -> None:
        """The resource is in maintenance, or no machine any more."""
        self._since_mono = math.inf
        self._uplink.forget(self._settings.name)

    def leave(self) -> None:
        """Another machine polls the resource."""
        if self._settings.platform not in HOSTLESS:
            self._uplink.leave(self._settings.name)

    def disregard(self) -> None:
        """Another machine gets through: that this one does not says nothing of the resource."""
        self._since_mono = math.inf

    def go_on_from(self, before: Outage) -> None:
        """Goes on from what the poller before found."""
        if self._settings.platform not in HOSTLESS:
            self._since_mono, self._was_healthy = before._since_mono, before._was_healthy

    @property
    def lasts(self) -> bool:
        """Whether there is one."""
        return self._since_mono < math.inf

    @property
    def held(self) -> float:
        """Seconds for which the resource counts as healthy, though it is not."""
        settings = self._settings
        recovery = settings.rise * settings.retry + settings.timeout
        return self._uplink.held(self._since_mono, self._round, recovery) if self._was_healthy else 0.0

    @property
    def is_cut_off(self) -> bool:
        """Whether it is this machine that is, and not the resource that is down."""
        return self._uplink.covers(self._settings.name, self._since_mono, self._round)

    @property
    def is_doubtful(self) -> bool:
        """Whether that may soon turn out, or it has time to recover."""
        return self.held > 0 or self._uplink.is_doubtful(self._since_mono)


# === Blame ===================================================================
# What is told of resources that depend on others, or are cut off: of what is behind an unhealthy one, that one alone is
# told, and a change for which something else may be to blame waits until that has turned out. In come the reports of a
# poller, out go the same with what was told last; in pollers' threads and the monitor's, under the poller's lock.
# Gives: Doubt, News
class Doubt:
    """Whether the state of a resource may soon be another one; those that depend on it urge its poll when they fail."""

    def __init__(self, *, asked: bool) -> None:
        self.woken = threading.Event()      # ends the wait of the poller
        self._asked = asked                 # or it reports by itself, tomorrow perhaps: nobody waits for that
        self.decided = not asked            # the last result agrees with the state; before the first one nobody knows
        self._urged_mono, self.polled_mono = -math.inf, 0.0     # and when the last poll that is over began
        self.risen_mono = -math.inf         # since when it is healthy, if it was not; inf: it is not

    @property
    def is_urged(self) -> bool:
        """Whether somebody waits for a poll that begins now or later."""
        return self._urged_mono >= self.polled_mono

    def urge(self) -> None:
        """Has the resource polled soon. For any thread."""
        was_urged, self._urged_mono = self.is_urged, time.monotonic()
        if not was_urged:
            self.woken.set()

    def settle(self, *, decided: bool, healthy: bool = True) -> None:
        """Notes whether the last result agrees with the state, and which that is."""
        self.decided = decided or not self._asked
        self.risen_mono = min(self.risen_mono, lease_clock()) if healthy else math.inf


class News:
    """What is told of one resource: each change once, and none for which another one is to blame."""

    def __init__(self, settings: ResourceSettings, aggregator: HealthAggregator, doubts: dict[str, Doubt],
                 outage: Outage) -> None:
        self._name, self._aggregator, self._doubts, self._outage = settings.name, aggregator, doubts, outage
        self.doubt = doubts[settings.name] = Doubt(asked=settings.is_asked)
        self.told = Standing()              # the last one that was told
        self.waits: Report | None = None    # until it is known whether others are to blame
        self._is_restored = False           # what was told was told before the start
        self.last: Report | None = None     # whether or not it could be written

    def restore(self, standing: Standing) -> None:
        """Goes on from a standing of before the start."""
        self.told, self._is_restored = standing, True
        self.doubt.settle(decided=standing.decided, healthy=standing.healthy)

    def hear(self, standing: Standing, found_mono: float) -> None:
        """Goes on from what another machine found, which has told nobody of it where another may be to blame."""
        self.restore(standing)
        is_old = any(found_mono < doubt.risen_mono < math.inf for doubt in self._before())
        if not standing.healthy and (is_old or self._aggregator.blocker(self._name) or self._is_doubtful(standing)):
            self.told = replace(standing, state="healthy", cause="")

    def go_on_from(self, before: News) -> None:
        """Goes on from what the poller before told."""
        self.told, self._is_restored, self.last = before.told, before._is_restored, before.last
        self.doubt.settle(decided=before.doubt.decided)

    def weigh(self, report: Report) -> Report:
        """The report with the standing that was told last, where there is something to tell: not while the resource is
        behind another or may turn out to be, nor before its own results agree again."""
        after, self.last = report.standing, report
        if after.bad == 1 and not self._aggregator.blocker(self._name):
            for doubt in self._before():
                doubt.urge()
        self.doubt.settle(decided=after.decided, healthy=after.healthy)
        is_doubtful = self._is_doubtful(report.verdict)     # first: such a doubt is over once the other has fallen
        blocker = self._aggregator.blocker(self._name)
        behind = 0 if after.healthy else self._aggregator.behind(self._name)
        report = replace(report, blocker=blocker, behind=behind)
        if blocker and self._is_restored and not self.told.healthy:
            self.told = replace(self.told, state="healthy", cause="")   # what was told then was that of the other one
        changed, self._is_restored, waited, self.waits = replace(report, before=self.told), False, self.waits, None
        if blocker or not after.decided or self._outage.is_cut_off:
            return report
        if is_doubtful and changed.transition:
            self.waits = replace(changed, at=waited.at) if waited else changed
            return report
        self.told = after
        return changed

    def late(self, *, is_last: bool) -> Report | None:
        """The report of a change that waited, once nobody else is to blame for it; `is_last`: as far as is known."""
        report = self.waits
        if report is None or (not is_last and self._is_doubtful(report.verdict)):
            return None
        self.waits = None
        if self._aggregator.blocker(self._name) or self._outage.is_cut_off:
            return None
        self.told = report.standing
        return report

    def _before(self) -> Iterator[Doubt]:
        """Those of the resources on which it depends."""
        return filter(None, map(self._doubts.get, self._aggregator.sources(self._name)))     # one may go just now

    def _is_doubtful(self, verdict: Verdict) -> bool:
        """Whether it may turn out that the resource is behind an unhealthy one, or cut off."""
        is_cut_off = verdict.cause in NO_ANSWER and self._outage.is_doubtful
        return is_cut_off or any(doubt.is_urged or not doubt.decided for doubt in self._before())


# === Override ================================================================
# What an operator says of the gate, whatever the resources say: a row, which outlives the service, in terms of clocks
# that do not. In the monitor's thread, which has the aggregator hear it again and again; shown by any.
# Gives: boot_number, CLOCK_DRIFT, OverrideKeeper, stored_override
CLOCK_DRIFT = 0.5               # seconds by which a clock may differ from what is written down of it


def boot_number() -> int:
    """Another one after each start of the machine; 0 where the system tells none."""
    try:
        return int(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").replace("-", "")[:15], 16)
    except (OSError, ValueError):
        return 0


def stored_override(session: Session) -> Override | None:
    """What an operator says of the gate; one that cannot be read says nothing."""
    text = remembered(session, "override").text
    with contextlib.suppress(ValidationError):
        return Override.model_validate_json(text) if text else None
    return None


def end_of_override(override: Override, zero_at: float) -> float:
    """By lease_clock, whose 0 was at that Unix time; no later than was asked, whatever became of the clock. Where it
    was set back with another start of the machine, nobody knows for how long an open gate was open, and it closes."""
    now = lease_clock()
    begun = override.begun_mono if override.boot == boot_number() != 0 else override.at - zero_at
    if override.seconds is None or (override.action == "open" and begun > now + CLOCK_DRIFT):
        return math.inf if override.action == "close" else 0.0
    return min(begun, now) + override.seconds


class OverrideKeeper:
    """What an operator says of the gate: read from its row, said to the aggregator again and again, and ended. All but
    `now` is the monitor's."""

    def __init__(self, store: Store, aggregator: HealthAggregator, wall: Callable[[], float]) -> None:
        self._store, self._aggregator, self._wall = store, aggregator, wall
        self._stored: Override | None = None
        self._ends_mono = 0.0

    @property
    def now(self) -> Override | None:
        """What holds now. For any thread."""
        return self._stored if lease_clock() < self._ends_mono else None

    def follow(self, zero_at: float) -> None:
        """What the row says holds; `zero_at` as in end_of_override."""
        with self._store.reading() as session:
            override = stored_override(session)
        if override != self._stored:
            self._ends_mono = end_of_override(override, zero_at) if override else 0.0
            self._stored = override
            if self.now or not override:    # or it ended before this start
                log.warning("gate: %s", override.why if override else "left to the resources again")
        self.say()

    def say(self) -> None:
        """It holds on, or it is over."""
        self._aggregator.overrule(self.now, self._ends_mono)

    def end(self) -> None:
        """Notes that it is over, if it is, also when it ended while no service ran."""
        override = self._stored
        if override is None or self.now:
            return
        with self._store.writing() as session:
            if stored_override(session) == override:    # or there is another one
                session.merge(Setting(name="override", value=0, text=""))
                at = min(self._wall(), override.until or math.inf)
                record_event(session, "change", f"gate {override.why}; that is over", at=at)
        log.warning("gate: %s; that is over", override.why)
        self._stored = None


# === Maintenance =============================================================
# What does not count now and next, and whose trouble somebody has seen. In come rows and the inventory's plans; the
# monitor's thread begins and ends what is due, each once and as an event, also what was due while no service ran. Turns
# of a plan that meet are one, and each is held once, however the clock is set. Pages, API, metrics and command line
# read the same rows.
# Gives: begin_work, Choices, choices, end_acknowledgements, finish_work, MaintenanceKeeper, move_times, remarks,
# Remarks, tell_work, timetable, Turn, written
AHEAD = 7 * 86_400.0            # seconds for which plans are shown ahead
KEPT_OVER = 86_400.0            # seconds for which a clock that is put back can take back that something is over
MAINTENANCE_RETRY = 10.0        # seconds after which rows are looked at again that could not be read


class Choices(NamedTuple):
    """What a scope can name, and the names of the resources in it."""

    resources: Mapping[str, set[str]]
    tags: Mapping[str, set[str]]
    groups: Mapping[str, set[str]]

    def of(self, scope: Scope) -> set[str]:
        """Names of the resources that it is of now."""
        found = set(self.resources) if scope.all else set[str]()
        for field, known in self._asdict().items():
            found.update(*(known.get(name, ()) for name in getattr(scope, field)))
        return found

    def faults(self, scope: Scope) -> dict[str, str]:
        """What is wrong with it, by field, of each the first: to look for near names takes its time."""
        return {field: unknown_name(name, known, field[:-1]) for field, known in
                self._asdict().items() for name in [name for name in getattr(scope, field) if name not in known][:1]}


def choices(session: Session) -> Choices:
    """What there is now; what cannot be read has no tags."""
    names, tagged, counted = list[str](), collections.defaultdict(set), collections.defaultdict(set)
    for name, text in session.execute(sqlalchemy.select(Resource.name, Resource.settings)):
        names.append(name)
        with contextlib.suppress(ValueError, LookupError, TypeError):
            settings = from_json(text)
            for tag in settings["tags"]:
                tagged[tag].add(name)
                if settings["critical"]:
                    counted[tag].add(name)
    members = Gates.model_validate_json(remembered(session, "gates").text or "{}").in_groups(counted)

    def inside(name: str) -> set[str]:
        return set().union(*map(inside, members[name])) if name in members else {name}

    return Choices({name: {name} for name in names}, tagged, {group: inside(group) for group in members})


def stored_plans(session: Session) -> dict[str, Plan]:
    """The inventory's, as imported last, by their JSON; those that cannot be read are none."""
    with contextlib.suppress(ValidationError):
        found = TypeAdapter(tuple[Plan, ...]).validate_json(remembered(session, "plans").text or "[]")
        return {plan.model_dump_json(): plan for plan in found}
    return {}


class Turn(NamedTuple):
    """Planned work that runs, or is ahead."""

    id: int | None      # of its row; None for a plan's that is ahead
    state: str          # planned | begun
    start: float        # Unix time, as is the next
    until: float
    scope: Scope
    reason: str
    actor: str
    schedule: str       # of its plan, empty for none


def timetable(session: Session, now: float) -> list[Turn]:
    """What runs and what is ahead, of each plan what begins next within AHEAD, by their beginnings."""
    plans = stored_plans(session)
    found = [Turn(row.id, row.state, row.start_at, row.until_at, row.chosen, row.reason, row.actor,
                  plans[row.plan].schedule if row.plan in plans else "")
             for row in session.scalars(sqlalchemy.select(Maintenance)) if row.state != "over" and row.until_at > now]
    for plan in plans.values():
        _, start = plan.around(now)
        if start <= now + AHEAD:
            found.append(Turn(None, "planned", start, start + plan.seconds, plan, plan.reason, "", plan.schedule))
    return sorted(found, key=lambda turn: (turn.start, turn.until))


class Remarks(NamedTuple):
    """What there is to be known of resources besides their states, by their names."""

    maintenance: Mapping[str, Maintenance]      # of those that do not count now, what ends last
    seen: Mapping[str, Acknowledgement]


def remarks(session: Session, now: float) -> Remarks:
    begun = sqlalchemy.select(Maintenance).filter_by(state="begun").order_by(Maintenance.until_at)
    rows = [row for row in session.scalars(begun) if row.until_at > now]
    known = choices(session) if rows else None
    seen = session.execute(sqlalchemy.select(Acknowledgement, Resource.name).join(Resource))
    return Remarks({name: row for row in rows for name in known.of(row.chosen)} if known else {},
                   {name: row for row, name in seen})


def end_acknowledgements(session: Session, recovered: Collection[int], at: float) -> None:
    """Those of resources that are well again or are removed end, within the caller's transaction."""
    every = sqlalchemy.select(Acknowledgement, Resource).join(Resource).execution_options(removed=True)
    for row, of in session.execute(every):
        if row.resource_id in recovered or of.origin == REMOVED:
            session.delete(row)
            text = "removed" if of.origin == REMOVED else "recovered"
            record_event(session, "acknowledgement", text, resource=of.name, state="over", at=at)


def written(at: float) -> str:
    """A Unix time in the server's own zone, which is named."""
    return datetime.datetime.fromtimestamp(max(0.0, at), datetime.timezone.utc).astimezone().isoformat(" ", "seconds")


def tell_work(session: Session, row: Maintenance, text: str, at: float, **who: str) -> None:
    """An event of planned work: of its resource or group, if it is of one alone."""
    scope = row.chosen
    about = {"group": scope.groups, "resource": scope.resources}
    alone = {field: names[0] for field, names in about.items() if names} if len(
        scope.tags + scope.groups + scope.resources) == 1 else {}
    text = text if "resource" in alone else f"{scope}: {text}"
    record_event(session, "maintenance", text, at=at, state=row.state, **alone, **who)
    log.info("%s%s", f"{alone['resource']}: " if "resource" in alone else "", text)


def begin_work(session: Session, row: Maintenance, at: float, **who: str) -> None:
    row.state = "begun"
    tell_work(session, row, f"in maintenance until {written(row.until_at)}: {row.reason}", at, **who)


def tell_over(session: Session, row: Maintenance, text: str, at: float, **who: str) -> None:
    row.state = "over"
    tell_work(session, row, text, at, **who)


def finish_work(session: Session, row: Maintenance, text: str, at: float, **who: str) -> None:
    """It is over; of a plan the row stays, so that this turn does not begin again."""
    tell_over(session, row, text, at, **who)
    if not row.plan:
        session.delete(row)


def take_turn(session: Session, row: Maintenance, now: float, *, gone: bool) -> None:
    if row.state == "planned" and row.start_at <= now and not gone:
        begin_work(session, row, row.start_at)
    if row.state == "begun" and row.until_at <= now:
        tell_over(session, row, "maintenance is over", row.until_at)
        row.turn_at = row.turn_at if row.plan else now
    elif gone and row.state != "over":
        finish_work(session, row, f"maintenance is over: {'the plan has changed' if row.plan else 'that is gone'}", now)


def begin_turn(session: Session, plan: Plan, row: Maintenance | None, now: float) -> None:
    """Begins the turn of a plan in which it is now, if that was not begun before."""
    start, _ = plan.around(now)
    if start + plan.seconds <= now or (row and row.turn_at == start):
        return
    row = row or Maintenance(plan=plan.model_dump_json(), scope=plan.scope_json, reason=plan.reason, state="over")
    session.add(row)
    row.turn_at, row.until_at = start, start + plan.seconds
    if row.state == "over":
        row.start_at = start
        begin_work(session, row, now)


def take_turns(session: Session, now: float) -> None:
    """Begins and ends what is due, within the caller's transaction."""
    plans, known, rows = stored_plans(session), choices(session), session.scalars(sqlalchemy.select(Maintenance)).all()
    for row in rows:
        scope = row.chosen
        there = scope.all or scope.tags or known.groups.keys() & {*scope.groups} or known.of(scope)
        lasting = row.plan in plans if row.plan else there
        take_turn(session, row, now, gone=not lasting)
        if not lasting if row.plan else row.state == "over" and abs(now - row.turn_at) > KEPT_OVER:
            session.delete(row)
    turns = {row.plan: row for row in rows}
    for text, plan in plans.items():
        begin_turn(session, plan, turns.get(text), now)


def move_times(session: Session, seconds: float, now: float) -> None:
    """After the clock, which said `now`, was set by so much: what was begun by hand goes on for the time that it had
    left, and no turn of a plan for longer than that; a clock that was put forward ends it as it says. What began later
    than `now` was begun by a clock that was right, before a start with one that was behind. What a start with one that
    was ahead took for over begins when it should."""
    for row in session.scalars(sqlalchemy.select(Maintenance).where(Maintenance.state != "planned")):
        if row.state == "over":
            row.state = "over" if row.plan or row.until_at <= now + seconds else "planned"
        elif row.start_at <= now and (seconds < 0 or not row.plan):
            row.start_at += seconds
            row.until_at += seconds


class MaintenanceKeeper:
    """What does not count: read from rows and plans, begun and ended in time. All of it is the monitor's; its times are
    Unix times as the monitor reckons them, which no clock that is set makes jump."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._running: list[tuple[float, set[str]]] = []    # until when, and who
        self._due_at = -math.inf                            # when something is to begin or to end
        self._trouble = Trouble("maintenance cannot be written down")
        self._unread = Trouble("maintenance cannot be read")

    def follow(self, now: float) -> None:
        """Takes up rows and plans as they are. What cannot be written down, or read, does not begin, and ends all the
        same."""
        self._due_at = now + MAINTENANCE_RETRY
        with self._trouble.caught(), self._store.writing() as session:
            take_turns(session, now)
        with self._unread.caught(), self._store.reading() as session:
            known, rows = choices(session), session.scalars(sqlalchemy.select(Maintenance)).all()
            begun = [row for row in rows if row.state == "begun"]
            self._running = [(row.until_at, known.of(row.chosen)) for row in begun]
            self._due_at = min([*(until_at for until_at, _ in self._running),
                                *(row.start_at for row in rows if row.state == "planned"),
                                *(plan.around(now)[1] for plan in stored_plans(session).values())], default=math.inf)

    def covered(self, now: float) -> set[str]:
        """Who does not count now."""
        if now >= self._due_at:
            self.follow(now)
        return set().union(*(names for until_at, names in self._running if now < until_at))


# === Incidents ===============================================================
# What the gate did: a row for each time for which the site, a group or a route was closed, and one for each time of
# which anything is known, for a service that does not run is neither open nor closed. Events cannot tell that for 90
# days: one resource that flaps pushes the others out. In come transitions and what the workers count; rows go out. In
# the recorder's thread; any thread reads. The start waits for first results and is no incident if the gate opens then.
# Gives: gate_strip, Incident, IncidentLog, incidents, IncidentsQuery, IncidentView, PartView, prune_incidents,
# refusals, ServiceView, STANDING, told_by_service, UptimeQuery, UPTIMES, uptime, UptimeView
WATCH_INTERVAL = 5.0            # seconds after which what lasts is written again
WATCH_GAP = 60.0                # seconds without a look, of a suspended machine: of those nothing is known
START_PATIENCE = 60.0           # seconds for which a start may wait for first results
CAUSES = 900.0, 3               # seconds before an incident in which changes may have led to it; how many are told
HISTORY_DAYS = 90               # for which incidents are kept at least
UPTIMES = {"day": 1, "week": 7, "month": 30, "90 days": HISTORY_DAYS}
STANDING = "standing"           # the Setting that says how everything stands, for command line and status page
STANDING_AGE = 3 * WATCH_INTERVAL   # seconds after which it is not believed any more
Counted = Mapping[str, tuple[int, int]]     # see Counters.refusals


class Incident(Base):
    """A time for which the site, a group or a route was closed."""

    __tablename__ = "incident"
    id: Mapped[int] = mapped_column(primary_key=True)
    group: Mapped[str] = mapped_column(index=True)  # its name, empty for the whole site
    from_at: Mapped[float]      # Unix time
    to_at: Mapped[float]        # Unix time of the end or, while it lasts, until when it was seen
    end: Mapped[str]            # empty: it lasts | opened | unseen: the service ended before it did
    why: Mapped[str]
    actor: Mapped[str]          # who closed it by hand, empty for nobody
    opened_by: Mapped[str]      # why it opened, where that was by hand
    before: Mapped[str]         # what had been changed just before
    mode: Mapped[str]           # observe: nothing was refused
    refused: Mapped[int]        # requests meanwhile
    would_refuse: Mapped[int]   # those that mode observe let pass
    written = (0, 0, 0)         # no columns: number and both counts, as they were written last from this object


class WatchedTime(Base):
    """A time from which it is known whether the gate was open."""

    __tablename__ = "watched_time"
    id: Mapped[int] = mapped_column(primary_key=True)
    from_at: Mapped[float] = mapped_column(index=True)      # Unix times
    to_at: Mapped[float]


class IncidentsQuery(Settings):
    group: str | None = None    # of a group or route; empty: the whole site
    since: AwareDatetime | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    format: Literal["json", "csv"] = "json"


class IncidentView(Settings):
    """A time for which the site, a group or a route was closed."""

    group: str                  # empty: the whole site
    from_at: datetime.datetime
    to_at: datetime.datetime    # while it lasts, and where the end was not seen: until when it was seen
    end: Literal["", "opened", "unseen"]    # empty: it lasts
    why: str
    actor: str                  # who closed it by hand
    opened_by: str              # why it opened, where that was by hand
    before: str                 # what had been changed just before
    mode: Mode                  # observe: nothing was refused
    refused: int                # requests meanwhile
    would_refuse: int


class PartView(Settings):
    """How the site (without a name), a group, a route or a resource stands."""

    name: str
    state: Literal["healthy", "degraded", "unhealthy", "unknown", "maintenance"]
    why: str
    since: datetime.datetime | None     # None: it has not been polled yet


class ServiceView(Settings):
    """What the service says of everything."""

    mono: float                 # of lease_clock, when it said so
    mode: Mode                  # of the site
    gates: Annotated[list[PartView], Field(min_length=1)]   # the site, then groups and routes
    resources: dict[str, int]   # how many by state
    others: list[PartView]      # resources that are not healthy, or do not count

    @property
    def state(self) -> Literal["open", "degraded", "closed"]:
        """Of everything: degraded is an open gate by hand, or beside trouble that closes nothing now."""
        site, *rest = (part.state for part in (*self.gates, *self.others))
        is_troubled = {"degraded", "unhealthy", "unknown"} & {site, *rest}
        return "closed" if site == "unhealthy" else "degraded" if is_troubled else "open"


def told_by_service(store: Store, session: Session) -> ServiceView:
    """What the service said a moment ago. Raises StorageError where it has not, for it hangs, starts or ends."""
    try:
        found = ServiceView.model_validate_json(remembered(session, store.own(STANDING)).text)
    except ValidationError:
        raise StorageError("the service has not said yet how everything stands") from None
    age = lease_clock() - found.mono
    if not 0 <= age <= STANDING_AGE:
        raise StorageError(f"the service has written nothing for {max(0.0, age):.0f} s")
    return found


class UptimeQuery(Settings):
    group: str = SITE           # of a group or route; empty: the whole site
    format: Literal["json", "csv"] = "json"


class UptimeView(Settings):
    span: str
    percent: float | None       # of the time of which anything is known; None: of none
    incidents: int
    refused: int                # requests in those incidents
    would_refuse: int


def changes_before(session: Session, at: float) -> str:
    """What was changed in the time in which that may have led to an incident, the last change first."""
    seconds, count = CAUSES
    found = session.scalars(sqlalchemy.select(Event).where(
        Event.kind.in_(("change", "clock", "maintenance", "service")), Event.at.between(at - seconds, at + 1.0)
    ).order_by(Event.at.desc(), Event.id.desc()).limit(count))
    return "; ".join(f"{f'{one.actor}: ' if one.actor else ''}{f'{one.resource} ' if one.resource else ''}{one.text}"
                     for one in found)


class IncidentLog:
    """What lasts and what is over. What was not written yet is kept, and written whole: all is repeatable."""

    def __init__(self, aggregator: HealthAggregator, counted: Callable[[], Counted] = dict,
                 clock: Callable[[], float] = lease_clock, wall: Callable[[], float] = time.time) -> None:
        self._aggregator, self._counted, self._clock, self._wall = aggregator, counted, clock, wall
        self._begun_at, self._looked_mono = wall(), clock()
        self._zero_at = self._begun_at - self._looked_mono      # the Unix time of the clock's 0
        self._begun_mono, self._written_mono, self._said_mono = self._looked_mono, -math.inf, -math.inf
        self._lasting: dict[str, Incident] = {}
        self._over: collections.deque[Incident | WatchedTime] = collections.deque(maxlen=2 * PRUNE_ROWS[1])
        self._watched: WatchedTime | None = None
        self._numbered: list[Incident | WatchedTime] = []       # since what was written last is safe
        self._before = self._now = counted()
        self._ends, self._takes_over, self._speaks, self._begun = False, False, True, False
        # how each resource stands, and whether it counts; set by who knows
        self.standings: Callable[[], Iterable[tuple[str, Standing, bool]]] = tuple

    @property
    def due(self) -> bool:
        """Whether there is something to write."""
        is_new = bool(self._over) or any(one.id is None for one in self._lasting.values())
        return self._ends or self._clock() - self._written_mono >= WATCH_INTERVAL or (is_new and self._speaks)

    def leave(self) -> None:
        """The service ends: the next thing that is written says so."""
        self._ends = True

    def look(self, transitions: Iterable[tuple[float, bool, str, str]]) -> None:
        """Takes up what has closed or opened, one by one and then as it stands: what opens or closes with the first
        decision is no transition."""
        now_mono, now_at = self._clock(), self._wall()
        self._before, self._now = self._now, self._counted()
        self._follow_clock(now_at - now_mono)
        self._note_gap(now_mono)
        for at, is_open, why, name in transitions:
            if is_open:
                self._complete(name, at, why)
            elif name not in self._lasting:
                self._begin(name, at, why)
        closed = closed_groups(self._aggregator, self._lasting)
        if closed is None and now_mono - self._begun_mono >= START_PATIENCE:
            closed = {SITE: self._aggregator.groups(site=True)[0].why}
        if closed is not None:
            self._compare(closed, now_at)

    def _compare(self, closed: Mapping[str, str], now_at: float) -> None:
        """Takes up how everything stands now."""
        known_from = now_at if self._watched or not closed else self._begun_at
        self._watched = self._watched or WatchedTime(from_at=known_from, to_at=now_at)
        for name in closed - self._lasting.keys():
            self._begin(name, known_from, closed[name])
        for name in self._lasting.keys() - closed.keys():      # also of a group that is gone
            self._complete(name, now_at, "")
        self._watched.to_at = now_at
        for incident in self._lasting.values():
            self._count(incident)
            incident.to_at = now_at

    def begin_anew(self) -> None:
        """Others may have written meanwhile: what they have written of what lasts is gone on with."""
        self._begun, self._takes_over = False, True
        for one in self._lasting.values():
            one.id = cast("Any", None)      # as of one that was not written yet

    def speak(self, *, speaks: bool) -> None:
        """Whether it is this machine that writes what the gate did."""
        self._speaks = speaks
        if not speaks:
            self._over.clear()
            self._watched = None
            self.begin_anew()

    def _begin_to_write(self, session: Session) -> None:
        """Goes on with what another machine has written of what lasts; the rest is over."""
        open_rows = sqlalchemy.select(Incident).filter_by(end="")
        for row in session.scalars(open_rows) if self._takes_over else ():
            if one := self._lasting.get(row.group):
                number, refused, passed = one.written if one.written[0] == row.id else (row.id, 0, 0)
                one.id, one.from_at = number, min(row.from_at, one.from_at)
                one.why, one.actor, one.before = row.why, row.actor, row.before
                one.refused += max(0, row.refused - refused)    # what others have counted
                one.would_refuse += max(0, row.would_refuse - passed)
        known = [one.id for one in self._lasting.values() if one.id]
        session.execute(sqlalchemy.update(Incident).where(
            Incident.end == "", Incident.id.not_in(known)).values(end="unseen"))
        self._begun = True

    def tell(self, session: Session, since: Callable[[str], float], name: str, *, changed: bool = True) -> None:
        """Writes how everything stands to the Setting `name`, within the caller's transaction; `since`: when a group
        last opened or closed; not `changed`: only after a while."""
        if changed or self._ends or self._clock() - self._said_mono >= WATCH_INTERVAL:
            session.merge(Setting(name=name, value=0, text="" if self._ends else self._standing(since)))
            self._said_mono = self._clock()

    def write(self, session: Session) -> None:
        """Within the caller's transaction."""
        if not self._speaks:
            return
        if not self._begun:
            self._begin_to_write(session)
        for one in self._numbered:      # by what was not written in the end: others may have the numbers
            one.id = cast("Any", None)
        self._numbered.clear()
        for one in (*self._over, *self._lasting.values(), *filter(None, [self._watched])):
            if one.id is None:
                self._numbered.append(one)
                if isinstance(one, Incident):
                    override = stored_override(session)
                    by_hand = override and override.action == "close" and one.why.startswith(override.why)
                    one.actor = override.actor if override and by_hand else ""
                    one.before = changes_before(session, one.from_at)
                one.id = 1 + (session.scalar(sqlalchemy.select(func.max(type(one).id))) or 0)
            session.merge(one)
            session.flush()

    def written(self) -> None:
        """What write() was given is safe."""
        for one in self._lasting.values():
            one.written = (one.id, one.refused, one.would_refuse) if one.id else one.written
        self._over.clear()
        self._numbered.clear()
        self._written_mono = self._clock()

    def _standing(self, since: Callable[[str], float]) -> str:
        gates = [{"name": each.name, "state": each.state, "why": each.why, "since": since(each.name)}
                 for each in (*self._aggregator.groups(site=True), *self._aggregator.groups())]
        counts, others = collections.Counter(dict.fromkeys((*get_args(State), "maintenance"), 0)), []
        for name, standing, counted in self.standings():
            state = standing.state if counted else "maintenance"
            counts[state] += 1
            if state != "healthy":
                others.append({"name": name, "state": state, "why": standing.why, "since": standing.since_at or None})
        return json.dumps({"mono": self._clock(), "mode": self._aggregator.lease.mode, "gates": gates,
                           "resources": counts, "others": others})

    def _follow_clock(self, zero_at: float) -> None:
        """A clock that was set makes nothing longer or shorter that lasts."""
        moved = zero_at - self._zero_at
        if abs(moved) > CLOCK_DRIFT:
            self._zero_at, self._begun_at = zero_at, self._begun_at + moved
            lasting: list[Any] = [*self._lasting.values(), *filter(None, [self._watched])]
            for one in lasting:
                one.from_at, one.to_at = one.from_at + moved, one.to_at + moved

    def _note_gap(self, now_mono: float) -> None:
        """Of the time of a suspended machine nothing is known."""
        if now_mono - self._looked_mono > WATCH_GAP and self._watched:
            self._over.append(self._watched)
            for name in list(self._lasting):
                self._complete(name, self._lasting[name].to_at, "", "unseen")
            self._watched = WatchedTime(from_at=now_mono + self._zero_at, to_at=now_mono + self._zero_at)
        self._looked_mono = now_mono

    def _begin(self, name: str, at: float, why: str) -> None:
        lease = self._aggregator.lease.part(name) or self._aggregator.lease
        self._lasting[name] = Incident(group=name, from_at=at, to_at=at, end="", why=one_line(why), actor="",
                                       opened_by="", before="", mode=lease.mode, refused=0, would_refuse=0)

    def _complete(self, name: str, at: float, why: str, end: str = "opened") -> None:
        if incident := self._lasting.pop(name, None):
            self._count(incident)
            incident.to_at, incident.end, incident.opened_by = max(at, incident.from_at), end, one_line(why)
            self._over.append(incident)

    def _count(self, incident: Incident) -> None:
        """What came since the last look: which gates depend on it may change."""
        for gate in gates_of(self._aggregator, incident.group) & self._now.keys():
            refused, passed = self._now[gate]
            incident.refused += refused - self._before.get(gate, (0, 0))[0]
            incident.would_refuse += passed - self._before.get(gate, (0, 0))[1]


def incidents(session: Session, *, group: str | None = None, since: float = 0.0, limit: int = 100) -> list[Incident]:
    """The newest first, of all groups or of one, none that was over before `since` (Unix time)."""
    query = sqlalchemy.select(Incident).where(Incident.to_at >= since)
    query = query if group is None else query.where(Incident.group == group)
    return list(session.scalars(query.order_by(Incident.from_at.desc(), Incident.id.desc()).limit(limit)))


def times_within(session: Session, group: str | None, begin: float, end: float) -> list[tuple[float, float]]:
    """From when until when a group was closed, or (None) from when until when anything is known."""
    kind: Any = WatchedTime if group is None else Incident
    query = sqlalchemy.select(func.greatest(kind.from_at, begin), func.least(kind.to_at, end)).where(
        kind.to_at > begin, kind.from_at < end)
    query = query if group is None else query.where(Incident.group == group)
    return [(first, last) for first, last in session.execute(query)]


def uptime(session: Session, group: str, now: float) -> dict[str, float | None]:
    """Percent of each of UPTIMES for which the site (empty), a group or a route was open, of the time of which anything
    is known; None where that is none."""
    found: dict[str, float | None] = {}
    for span, days in UPTIMES.items():
        known, closed = (sum(last - first for first, last in times_within(session, which, now - days * DAY, now))
                         for which in (None, group))
        found[span] = max(0.0, 100 * (1 - closed / known)) if known > 0 else None
    return found


def refusals(session: Session, group: str, since: float) -> Sequence[int]:
    """How many incidents of the site (empty), a group or a route were not over before, and the requests meanwhile that
    were refused, and that would have been."""
    query = sqlalchemy.select(func.count(), *(sqlalchemy.cast(func.coalesce(func.sum(column), 0), BIG_INTEGER)
                                              for column in (Incident.refused, Incident.would_refuse)))
    return [int(number) for number in session.execute(
        query.where(Incident.group == group, Incident.to_at >= since)).one()]


def gate_strip(session: Session, group: str, span: str, now: float) -> str:
    """STRIP parts of one of UPTIMES, as characters of POLLS: open, closed for less than half, closed, or not known."""
    begin, step = now - UPTIMES[span] * DAY, UPTIMES[span] * DAY / STRIP
    seconds = [[0.0] * STRIP, [0.0] * STRIP]
    for row, which in zip(seconds, (None, group), strict=True):
        for first, last in times_within(session, which, begin, now):
            for part in range(int((first - begin) / step), min(STRIP, math.ceil((last - begin) / step))):
                row[part] += min(last, begin + (part + 1) * step) - max(first, begin + part * step)
    return "".join(" " if known <= 0 else "h" if closed <= 0 else "d" if closed < known / 2 else "l"
                   for known, closed in zip(*seconds, strict=True))


def prune_incidents(session: Session, retention: Retention, now: float) -> None:
    """Drops what is older than `retention`, a part at most, what is of a future that a clock once showed, and of each
    group what is more than EVENTS."""
    begin = now - max(retention.events, HISTORY_DAYS) * DAY
    kinds: tuple[Any, ...] = Incident, WatchedTime
    for kind in kinds:
        count = session.scalar(sqlalchemy.select(func.count()).select_from(kind)) or 0
        for outside in (kind.to_at < begin, kind.from_at > now + QUARTER):
            doomed = sqlalchemy.select(kind.id).where(outside).limit(max(PRUNE_ROWS[0], count // PRUNE_PART))
            session.execute(sqlalchemy.delete(kind).where(kind.id.in_(doomed)))
    for group, count in session.execute(sqlalchemy.select(Incident.group, func.count()).group_by(Incident.group)).all():
        if count > EVENTS:
            doomed = sqlalchemy.select(Incident.id).where(Incident.group == group).order_by(Incident.id)
            session.execute(sqlalchemy.delete(Incident).where(Incident.id.in_(doomed.limit(count - EVENTS))))


# === Sharing =================================================================
# Several machines on one database: which of them polls what, and what the others found. In come the places that a Claim
# heard of and rows of Result, out go standings for the pollers that rest. Nobody locks anything: two that poll the same
# for a moment are harmless, and what a machine wrote that was taken for dead does not count.
# Gives: Found, Membership, Origin, PLACE, TAKE_OVER
TAKE_OVER = CLAIM_LIFE + 2 * CLAIM_INTERVAL + 2.0   # seconds for which what another found counts longer than it does
                                # there: so long it takes to know that it is dead, and to poll in its place
RESULTS = sqlalchemy.text(f"""SELECT resource_id, {DATABASE_CLOCK} - found_at AS age, counts, opens,
    settings_digest, state, cause, reason, since_at, good, bad, credential_digest, strip, sample
    FROM result JOIN status USING (resource_id)
    WHERE serial > :serial AND (machine <> :machine OR :serial < 0) ORDER BY serial""")     # noqa: S608  # our words
NEWS = sqlalchemy.text(f"SELECT resource_id, {DATABASE_CLOCK} - found_at FROM result "      # noqa: S608
                       "WHERE machine <> :machine AND resource_id = ANY(:numbers)")
WELL = sqlalchemy.text("SELECT resource_id, found_at + counts FROM result JOIN status USING (resource_id) "
                       "WHERE machine <> :machine AND state <> 'unhealthy' AND resource_id = ANY(:numbers)")
WRITE_RESULT = sqlalchemy.text("""INSERT INTO result (resource_id, serial, machine, found_at, counts, opens)
    VALUES (:resource_id, :serial, :machine, :found_at, :counts, :opens)
    ON CONFLICT (resource_id) DO UPDATE SET serial = excluded.serial, machine = excluded.machine,
    found_at = excluded.found_at, counts = excluded.counts, opens = excluded.opens""")
PLACE = sqlalchemy.text(f"SELECT count(*) FROM machine WHERE name = :name AND {IS_LIVING}")     # noqa: S608
LIFE = sqlalchemy.text(f"SELECT count(*) FROM machine WHERE instance = :epoch AND {IS_LIVING}")     # noqa: S608


class Origin(NamedTuple):
    """Where a report comes from that may only show that this machine was cut off, or slept."""

    epoch: str              # of the life of this machine
    resource_id: int
    at: float               # Unix time


class Found(NamedTuple):
    """What a machine found."""

    resource_id: int
    settings_digest: str
    standing: Standing
    found_mono: float       # when, by our clock; never later than that
    counts: float           # seconds for which it counts from then on
    opens: float            # seconds from then on until it can be healthy again
    stored: Any = None      # what of its Status tells of logins


@functools.lru_cache(1 << 15)
def owner_of(name: str, machines: frozenset[str]) -> str:
    """The machine to which a name belongs: that of the highest weight (rendezvous hashing; Thaler and Ravishankar,
    1998), so that where one comes or goes only its own names change hands."""
    return max(machines, key=lambda machine: hashlib.sha256(length_prefixed(machine, name)).digest(), default="")


class Membership:
    """What this machine does of what several could do; without a Claim it is the only one and does all. For any
    thread."""

    def __init__(self, claim: Claim | None = None, clock: Callable[[], float] = lease_clock) -> None:
        self._claim, self._clock = claim, clock
        # of the results that were read, and in which life; before the first ones this machine's are read, too
        self._serial, self._read_epoch = -1, ""

    @property
    def is_shared(self) -> bool:
        return self._claim is not None

    def heed(self, is_able: Callable[[], bool]) -> None:
        """While it is not able to poll, the others do."""
        if self._claim:
            self._claim.is_able = is_able

    @property
    def epoch(self) -> str:
        """Of what is found from now on."""
        return self._claim.company.epoch if self._claim else ""

    @property
    def names(self) -> frozenset[str]:
        """Those that poll, as was heard last."""
        return self._claim.company.names if self._claim else frozenset()

    @property
    def is_cut_off(self) -> bool:
        """Whether the others take this machine for dead: it does not reach the database."""
        return self._claim is not None and self._clock() - self._claim.company.heard_mono >= CLAIM_LIFE

    def owns(self, name: str) -> bool:
        """Whether a name is this machine's, as was heard last; SITE is that of what one of them says for all."""
        return self._claim is None or owner_of(name, self.names) == self._claim.machine

    def polls(self, name: str) -> bool:
        """Whether a resource is this machine's to poll: one that is cut off polls all."""
        return self.is_cut_off or self.owns(name)

    @property
    def speaks(self) -> bool:
        """Whether it is this machine that writes and sends what all of them could."""
        return self.owns(SITE)

    def lives(self, session: Session) -> bool:
        """Whether the others know that it does, by what the session sees."""
        return not self.is_shared or bool(session.scalar(LIFE, {"epoch": self.epoch}))

    def counting(self, session: Session, reports: Mapping[int, Report]) -> Mapping[int, Report]:
        """Those that count for other machines, within the caller's transaction: of a life that was not interrupted, not
        of one that may be cut off, and of others nothing newer is there. What a resource said by itself counts in any
        case: it will not say it again."""
        if not self._claim:
            return reports
        epoch, lives = self.epoch, self.lives(session)
        fresh = {number: report for number, report in reports.items() if (
            (lives and report.epoch == epoch and not (report.is_doubtful and report.verdict.cause in NO_ANSWER))
            or (report.verdict.cause != "stale" and not report.target.settings.is_asked))}
        now_mono, known = self._clock(), session.execute(
            NEWS, {"machine": self._claim.machine, "numbers": [*fresh]}).all()
        newer = {number for number, age in known if -CLOCK_DRIFT < age < now_mono - fresh[number].made_mono}
        return {number: report for number, report in fresh.items() if number not in newer}

    def refuted(self, session: Session, found: Collection[Origin]) -> set[Origin]:
        """Of what was found in a life that is over, what another machine knew better: it was this one that was cut off
        or slept."""
        if not self._claim or not found:
            return set()
        epoch = self.epoch if self.lives(session) else ""
        lost = {origin for origin in found if origin.epoch != epoch}
        values = {"machine": self._claim.machine, "numbers": [*{origin.resource_id for origin in lost}]}
        until = {number: until_at for number, until_at in session.execute(WELL, values)} if lost else {}
        return {origin for origin in lost if origin.at < until.get(origin.resource_id, 0.0)}

    def write(self, session: Session, reports: Collection[Report]) -> None:
        """Tells the others of results, within the caller's transaction, of which there is one at a time."""
        if not self._claim or not reports:
            return
        serial = remembered(session, "serial").value + 1
        session.merge(Setting(name="serial", value=serial))
        asked_at = session.scalar(sqlalchemy.text(f"SELECT {DATABASE_CLOCK}"))
        zero_at = asked_at - self._clock()      # which is looked at later: nothing seems newer than it is
        session.execute(WRITE_RESULT, [{
            "resource_id": report.target.id, "serial": serial, "machine": self._claim.machine, "counts": report.counts,
            "found_at": zero_at + report.made_mono, "opens": report.opens} for report in reports])

    def read(self, session: Session) -> list[Found]:
        """What others have found since this was asked last, and at first also what this machine had."""
        asked_mono, found, machine = self._clock(), list[Found](), self._claim.machine if self._claim else ""
        current, epoch = remembered(session, "serial").value, self.epoch
        # a standby may lack the last ones and give their numbers again
        serial = self._serial if epoch == self._read_epoch and self._serial <= current else -1
        self._serial = -1       # where it cannot be read
        for row in session.execute(RESULTS, {"serial": serial, "machine": machine}).all():
            if row.age < -CLOCK_DRIFT:
                continue        # of before the database's clock was set back: nobody knows how old it is
            standing = Standing(row.state, row.cause, row.reason, row.since_at, row.good, row.bad)
            found.append(Found(row.resource_id, row.settings_digest, standing, asked_mono - max(0.0, row.age),
                               row.counts + TAKE_OVER, row.opens, row))
        self._serial, self._read_epoch = current, epoch
        return found


# === Recorder ================================================================
# The one thread that writes what polls found and what the gate did: reports and transitions come from any thread,
# rows go out, many in one transaction. A database that cannot be written is waited for, within a bounded memory.
# Gives: Recorder
FLUSH_INTERVAL = 1.0            # seconds for which the recorder gathers what it writes
PENDING_ROWS = 100_000          # rows that wait for a database that cannot be written; older ones are lost
QUARTER_GRACE = 5.0             # seconds for the last reports of a quarter to be written
TIDY_AT_ONCE = 15               # resources whose averages are made after a flush: 10,000 take less than a quarter
UNSURE = (*NO_ANSWER, "stale")  # causes that are this machine's, perhaps
LAST_FLUSH = 1.5                # seconds for the last reports to be written when the service ends


def origin_of(report: Report) -> Origin | None:
    return Origin(report.epoch, report.target.id, report.at) if report.verdict.cause in UNSURE else None


def unsaid(session: Session, events: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Without that something is open, closed or healthy where the last event says so already: another machine's, or
    that before those which were refuted."""
    if not events:
        return      # most times; it takes longer the more events there are
    keys = Event.kind, Event.group, Event.resource
    last = sqlalchemy.select(func.max(Event.id)).where(Event.kind.in_(("gate", "group", "state"))).group_by(*keys)
    said = {(*key,): state for *key, state in session.execute(
        sqlalchemy.select(*keys, Event.state).where(Event.id.in_(last)))}
    for event in events:
        key, state = (event["kind"], event.get("group", ""), event.get("resource", "")), event.get("state", "")
        if state not in ("open", "closed", "healthy") or said.get(key) != state:
            yield event
        said[key] = state


def upserts(database: Database) -> tuple[Any, ...]:
    """What writes statuses, samples and filesystems: by tables, an insert of which costs half of what one of its class
    does."""
    status: Any = database.insert(Base.metadata.tables["status"])
    new = status.excluded
    # What was read is moved aside by a poll that reads nothing, and stays there while none of these settings does.
    nothing_old = sqlalchemy.or_(new["sample"] != "null", new["settings_digest"] != Status.settings_digest)
    values = {column.name: column for column in new} | {
        kept.key: sqlalchemy.case((nothing_old, new[kept.key]), (Status.sample != "null", before), else_=kept)
        for kept, before in ((Status.read, Status.sample), (Status.read_at, Status.polled_at))
    } | {"strip": database.end_of(Status.strip + new["strip"], STRIP)}
    return (status.on_conflict_do_update(index_elements=["resource_id"], set_=values),
            *(database.insert(table).on_conflict_do_nothing() for table in (SAMPLES, FILESYSTEMS)))


class Recorder(threading.Thread):
    """The one writer of what polls found: gathers reports for FLUSH_INTERVAL, writes them in one transaction."""

    def __init__(self, store: Store, aggregator: HealthAggregator, retention: Retention | None = None,
                 incident_log: IncidentLog | None = None, members: Membership | None = None) -> None:
        super().__init__(name="recorder", daemon=True)
        self._members, self._epoch = members or Membership(), ""
        self.wall = store.wall
        self.incidents = incident_log or IncidentLog(aggregator)
        self._store, self._aggregator, self._retention = store, aggregator, retention or Retention()
        self._upserts = upserts(store.database)
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._trouble = Trouble("the recorder stopped and goes on")
        self._unwritten = Trouble("the database cannot be written")
        self._unsummed = Trouble("history cannot be summed up")
        self._drops_mono = lease_clock() + QUARTER      # before that a wrong clock may be put right
        self._rolled = 0                        # Unix time until which averages are made or in the making
        self._untidy: list[int] = []            # ids of resources whose averages are to be made
        self._flushing = threading.RLock()      # guards all below, which is not written yet, and the order of writing
        self._latest: dict[int, Report] = {}    # by the resource's id
        self._samples: collections.deque[tuple[Origin | None, dict[str, Any]]] = collections.deque(maxlen=PENDING_ROWS)
        self._events: collections.deque[tuple[Origin | None, dict[str, Any]]] = collections.deque(maxlen=PENDING_ROWS)
        self._keys: dict[int, Report] = {}      # those with a host key that was trusted on first use
        self._told: queue.SimpleQueue[Report] = queue.SimpleQueue()     # those of transitions
        self._changed_at = {SITE: self.wall()}      # when it, a group or a route last opened or closed
        self._is_heard = not self._members.is_shared    # all that stands otherwise than was told last is told
        if self._members.speaks and not self._members.names - {store.machine}:
            self.note("gate", "closed (the service starts)", self._changed_at[SITE], group=SITE, state="closed")

    def put(self, report: Report) -> None:
        """Takes a report; transitions are logged at once, in the caller's thread."""
        if report.transition:
            self.tell(report)
        _ = report.status, report.sample_row    # made here, one at a time: a hundred in flush would hold up requests
        self._reports.put(report)

    def tell(self, report: Report) -> None:
        """Logs and notes a transition."""
        log.log(logging.INFO if report.standing.healthy else logging.WARNING, "%s: %s", report.target.name,
                report.transition)
        self._told.put(report)

    @property
    def unwritten(self) -> str:
        """Why the database cannot be written; empty while it can be."""
        return self._unwritten.why

    @property
    def is_well(self) -> bool:
        return self.is_alive() and not self.unwritten

    def changed_at(self, group: str) -> float:
        """Unix time when a group last opened or closed, or of the start."""
        return self._changed_at.get(group, self._changed_at[SITE])

    def run(self) -> None:
        while not self._ending.wait(FLUSH_INTERVAL):
            with self._trouble.caught():
                self._aggregator.beat("recorder")
                if self.flush():        # or what is kept would come too late for its average
                    self.tidy(self.wall(), drops=lease_clock() > self._drops_mono)
        self.flush()

    def flush(self) -> bool:
        """Writes what was gathered; what cannot be written is kept. Says whether all is written."""
        with self._flushing, self._unwritten.caught():
            speaks = self._members.speaks
            if self._epoch != (epoch := self._members.epoch):    # others may have written meanwhile
                self._epoch, self._is_heard = epoch, False
                self.incidents.begin_anew()
            self._is_heard = self._is_heard and speaks
            self.incidents.speak(speaks=speaks)
            self._gather(speaks=speaks)
            if self._latest or self._events or self.incidents.due:
                with self._store.writing() as session:
                    self._write(session)
                    self.incidents.write(session)
                    self.incidents.tell(session, self.changed_at, self._store.own(STANDING), changed=bool(self._events))
                self.incidents.written()
                for written in (self._latest, self._samples, self._events, self._keys):
                    written.clear()
            return True
        return False

    def tidy(self, now: float, *, drops: bool = True) -> bool:
        """Makes averages of the quarters that are over and drops what is too old, for a few resources at a time, since
        it takes a millisecond each; says whether there is more to do."""
        end = int((now - QUARTER_GRACE) // QUARTER) * QUARTER
        if not self._untidy and end == self._rolled:
            return False
        with self._unsummed.caught():
            if not self._untidy:
                with self._store.writing() as session:
                    if drops and self._members.speaks:
                        prune_events(session, self._retention, now)
                        prune_incidents(session, self._retention, now)
                    every = sqlalchemy.select(Resource.id, Resource.name).execution_options(removed=True)
                    self._untidy = [number for number, name in session.execute(every) if self._members.polls(name)]
                    self._rolled = end
            for _ in range(min(TIDY_AT_ONCE, len(self._untidy))):
                self._aggregator.beat("recorder")       # each may take seconds where the database is slow
                resource_id = self._untidy.pop()
                with self._store.writing() as session:
                    roll_up(session, resource_id, self._rolled)
                    if drops:
                        prune(session, resource_id, self._retention, now)
        return bool(self._untidy)

    def note(self, kind: str, text: str, at: float, **about: str) -> None:
        """Adds an event to what is written next; the arguments are those of record_event."""
        with self._flushing:
            self._events.append((None, {"kind": kind, "text": text, "at": at} | about))

    def _turn(self, at: float, is_open: bool, why: str, name: str) -> dict[str, Any]:
        """The event of what has opened or closed."""
        since, mode = self._changed_at.get(name, at), (self._aggregator.lease.part(name) or self._aggregator.lease).mode
        before = f"{'closed' if is_open else 'open'} -> " if name in self._changed_at else ""   # else its first state
        text = (f"{f'{name}: ' if name else ''}{before}{'open' if is_open else 'closed'}{f' ({why})' if why else ''}"
                f"{f' after {at - since:.0f} s' if since != at else ''}"
                f"{'' if is_open or mode == 'enforce' else '; observe: nothing is refused'}")
        return {"kind": "group" if name else "gate", "text": text, "at": at, "group": name,
                "state": "open" if is_open else "closed"}

    def _gather(self, *, speaks: bool) -> None:
        waiting = self._aggregator.transitions
        transitions = [waiting.get() for _ in range(waiting.qsize())]
        for at, is_open, why, name in transitions:
            turn = self._turn(at, is_open, why, name)
            log.warning("%s: %s", turn["kind"], turn["text"])
            self._events += [(None, turn)] * speaks
            self._changed_at[name] = at
        if speaks and not self._is_heard and closed_groups(self._aggregator, ()) is not None:
            self._is_heard = True       # who spoke before may have died before it told how everything stands
            for each in (*self._aggregator.groups(site=True), *self._aggregator.groups()):
                is_open = each.state != "unhealthy"
                at, why = self.changed_at(each.name), "" if is_open else each.why
                self._events.append((None, self._turn(at, is_open, why, each.name)))
        self.incidents.look(transitions)
        for report in (self._reports.get() for _ in range(self._reports.qsize())):
            resource_id = report.target.id
            self._latest[resource_id] = report
            self._samples.append((origin_of(report), report.sample_row))
            if report.host_key:
                self._keys[resource_id] = report
        for report in (self._told.get() for _ in range(self._told.qsize())):
            if report.owned:
                self._events.append((origin_of(report), {
                    "kind": "state", "text": report.transition, "at": report.at, "resource": report.target.name,
                    "state": report.standing.state}))

    def _write(self, session: Session) -> None:
        """Within the caller's transaction; nothing of resources that were removed."""
        numbers = [*self._latest, *[0] * (-len(self._latest) % 100)]    # of few lengths: each statement is kept
        alive = set(session.scalars(sqlalchemy.select(Resource.id).where(Resource.id.in_(numbers))))
        pending = (*self._samples, *self._events)
        refuted = self._members.refuted(session, [origin for origin, _ in pending if origin])
        samples = [row for origin, row in self._samples if row["resource_id"] in alive and origin not in refuted]
        events = [event for origin, event in self._events if origin not in refuted]
        strips: dict[int, str] = collections.defaultdict(str)
        for row in samples:
            strips[row["resource_id"]] += row["poll"]
        latest = {number: report for number, report in self._latest.items() if number in alive}
        counting = self._members.counting(session, latest)
        statuses = [report.status | {"strip": strips[number][-STRIP:]} for number, report in counting.items()]
        filesystems = list(filter(None, (report.filesystem_row for report in latest.values())))
        for statement, rows in zip(self._upserts, (statuses, samples, filesystems), strict=True):
            if rows:
                session.execute(statement, rows)
        self._members.write(session, counting.values())
        for event in unsaid(session, events) if self._members.is_shared else events:
            record_event(session, **event)
        well = {number for number, report in counting.items() if report.standing.healthy}
        end_acknowledgements(session, well, self.wall())
        for resource_id, report in self._keys.items():
            polled = report.target.settings     # its address may be another one by now
            session.execute(sqlalchemy.update(Resource).values(host_key=report.host_key).where(
                Resource.id == resource_id, Resource.host_key.is_(None), Resource.hostname == polled.hostname,
                Resource.port == polled.connect_port, Resource.username == polled.username))

    def close(self) -> None:
        """Writes the rest and ends the thread."""
        self.incidents.leave()
        self._ending.set()
        if self.is_alive():
            self.join(LAST_FLUSH)   # not for ever: another program may hold the database
        else:
            self.flush()


# === Poll ====================================================================
# A thread for each resource polls it: in comes a Target, reports go out, to the aggregator at once, to the database
# through the recorder. Where another machine polls it, the thread rests and what that found is told to the aggregator.
# Gives: first_polls, LAST_SESSIONS, Poller, PollContext, poll_once, REFUSED_MARK, restore_logins
FIRST_POLLS = 50.0              # first polls per second
POLLER_LIFE = 3600.0            # seconds after which the death of a poller is a new one
JITTER = 0.1                    # part of the interval by which polls are spread
LOGGED_IN_MARKS = tuple(mark for mark, (_, cause) in POLLS.items() if cause in ("", "limit", "check"))
REFUSED_MARK = POLL_MARKS["unhealthy", "auth"]
LAST_SESSIONS = 1.0             # seconds for what is open to hosts to end with the service


def first_polls(left: Sequence[float], settings: Sequence[ResourceSettings]) -> list[float]:
    """Seconds until the first poll of each, of whose lease so many are `left`, 0 where nothing is known: the shortest
    one first, and so fast that each is polled while it lasts, but by no more than twice the usual pace."""
    order = sorted(range(len(left)), key=left.__getitem__)
    due = max((rank / max(1.0, left[number] - settings[number].timeout)
               for rank, number in enumerate(order) if left[number] > 0), default=0.0)
    pace = max(FIRST_POLLS, min(due, 2 * sum(1 / one.interval for one in settings)))
    return [rank / pace for _, rank in sorted((number, rank) for rank, number in enumerate(order))]


@dataclass(frozen=True)
class PollContext:
    """What all pollers share."""

    aggregator: HealthAggregator
    recorder: Recorder
    access: ConnectionContext
    random: random.Random
    uplink: Uplink = dataclass_field(default_factory=Uplink)
    members: Membership = dataclass_field(default_factory=Membership)
    doubts: dict[str, Doubt] = dataclass_field(default_factory=dict)    # of each resource

    def urge(self, names: Iterable[str]) -> None:
        """Has these polled soon."""
        for doubt in filter(None, map(self.doubts.get, names)):
            doubt.urge()

    def forget(self, name: str) -> None:
        """What is not watched any more."""
        self.access.watched.pop(name, None)
        self.doubts.pop(name, None)
        self.uplink.forget(name)


def poll_once(target: Target, connection: Connection, previous: Sample | None) -> tuple[Verdict, Sample | None]:
    """One poll of one resource: its verdict, and what was read."""
    try:
        if target.fault:
            raise ProbeError(*target.fault)
        sample = collect(target.settings, connection, previous)
    except ProbeError as error:
        why, way = str(error), ", ".join(target.settings.hops)
        if way and error.cause in NO_ANSWER and "bastion " not in why:
            why += f" (through bastion {way})"
        faults: list[BaseException] = [error]
        for fault in faults:    # and frames refer to each other: what they hold would wait for the garbage collector
            fault.__traceback__ = None
            faults += [other for other in (fault.__cause__, fault.__context__) if other and other not in faults]
        return Verdict("unhealthy", error.cause, why), None
    except Exception:   # a thread's outermost step: whatever a host makes a library raise must not end its watch
        log.exception("%s: the poll failed in an unforeseen way", target.name)
        return Verdict("unhealthy", "protocol", "the poll failed in an unforeseen way; see the log"), None
    return evaluate(sample, target.settings), sample


def restore_logins(guard: LoginGuard, target: Target, stored: Status, age: float) -> bool:
    """Tells the guard what the last polls say of the credential, if it is this one and they count still."""
    if stored.credential_digest != target.credential_digest or not 0 <= age < LOCKOUT_WINDOW:
        return False
    before, settings = stored.strip.rstrip(REFUSED_MARK), target.settings
    try:
        since = float(json.loads(stored.sample)["details"].get("session_seconds", 0.0))
    except (ValueError, LookupError, TypeError, AttributeError):    # a refused one has none
        since = settings.interval + (2 * (settings.relogin or math.inf) if settings.keeps else 0.0)
    is_new = not before.endswith(LOGGED_IN_MARKS)
    if not is_new:      # of the refusals after it only the last one's time is known
        guard.accept(target.name, age + since)
    if stored.strip != before and not stored.reason.startswith(NOT_TRIED):
        guard.hear(target.name, age, len(stored.strip) - len(before), is_new=is_new)
    return True


class ResourceLease:
    """How one resource stands, and until when that counts: what the aggregator is told of it, from any thread."""

    def __init__(self, target: Target, context: PollContext, delay: float) -> None:
        self.counted: bool | None = None    # as the aggregator was told by the monitor
        self.target, self._context = target, context
        self.outage = Outage(target.settings, context.uplink)
        self.news = News(target.settings, context.aggregator, context.doubts, self.outage)
        self.doubt = self.news.doubt
        self.expires_mono = lease_clock() + delay + target.settings.ttl     # without a report until then it is stale
        self.lease_mono = 0.0       # until when what was known before it counts
        self.rests = context.members.is_shared      # another machine polls it, until this one is said to
        self._found_mono, self._spare = -math.inf, 0.0      # when the standing was found, and how much longer it counts
        self._alone = False     # it polls although it rests, for nothing is heard of the others
        self._lock = threading.Lock()       # guards the next four and the order of reports: the monitor sets stale
        self.standing, self._stopped, self._is_held, self._opens_mono = Standing(), False, False, 0.0

    def report_again(self) -> None:
        """Tells the aggregator the standing once more, for the rest of its time."""
        with self._lock:
            if self.standing.state != "unknown":
                self._set_resource(self.expires_mono - lease_clock())

    @property
    def held(self) -> float:
        """Seconds for which it counts as healthy though it is not, for this machine is cut off or was just now."""
        return 0.0 if self.standing.healthy else self.outage.held

    def _set_resource(self, ttl: float) -> None:
        held, standing = self.held, self.standing
        self._is_held = held > 0
        why = (CUT_OFF if self.outage.is_cut_off else standing).why
        self._context.aggregator.set_resource(
            self.target.name, standing.healthy or held > 0, why, ttl=min(ttl, held) if held else ttl, owner=self,
            opens=max(0.0, self._opens_mono - lease_clock()))

    def count(self, *, counted: bool) -> None:
        """Lets it count from now on, or not: then it shows nothing of the uplink."""
        with self._lock:
            self.counted = counted
            if not counted:
                self.outage.forget()
            elif self.rests:
                self._leave_to_others()

    def _leave_to_others(self) -> None:
        self._alone = False
        if self.counted:
            self.outage.leave()

    def rest(self) -> None:
        """Leaves it to another machine from now on, whose results take their time."""
        with self._lock:
            self.rests = True
            if report := self.news.late(is_last=True):      # or nobody does
                self._context.recorder.tell(report)
            self._leave_to_others()
            if self.standing.state != "unknown" and lease_clock() < self.expires_mono:
                self.expires_mono += TAKE_OVER - self._spare
                self._spare = TAKE_OVER
                self._set_resource(self.expires_mono - lease_clock())
        self.doubt.woken.set()

    def adopt(self, found: Found) -> None:
        """Takes over what another machine found, whoever is to poll it, unless its own result is newer."""
        with self._lock:
            left, standing = found.found_mono + found.counts - lease_clock(), found.standing
            if self._alone and left > 0:
                self._leave_to_others()
            if self._stopped or left <= 0 or found.found_mono <= self._found_mono:
                return
            lasts, counts = lease_clock() < self.expires_mono, self.standing.healthy or self.held > 0
            # it lacks what we have; of what is not asked nobody has more, and nobody takes over
            is_late = standing.cause == "stale" and lasts and (
                self.target.settings.is_asked or lease_clock() < self.expires_mono - self._spare)
            if is_late or (lasts and counts and standing.good and not standing.healthy):
                return      # a good result closes nothing: only for that machine it was unhealthy until then
            self.outage.disregard()
            self.standing, self._found_mono, self._spare = standing, found.found_mono, TAKE_OVER
            self.expires_mono = lease_clock() + left
            self._opens_mono = found.found_mono + found.opens
            if self.rests:      # or it tells of that itself, by its next result
                self.news.hear(standing, found.found_mono)
            elif not standing.decided:
                self.doubt.urge()
            self._set_resource(left)

    def go_on_from(self, before: ResourceLease) -> None:
        """Takes over the standing of the one before it."""
        self.standing, self.expires_mono, self._opens_mono = before.standing, before.expires_mono, before._opens_mono
        self.outage.go_on_from(before.outage)
        self.news.go_on_from(before.news)
        self._found_mono, self._spare, self.rests = before._found_mono, before._spare, before.rests


class Poller(ResourceLease, threading.Thread):
    """Polls one resource at its own interval; a thread that waits, connects and reports."""

    def __init__(self, target: Target, context: PollContext, guard: LoginGuard, delay: float) -> None:
        threading.Thread.__init__(self, name=f"poll {target.name}", daemon=True)
        super().__init__(target, context, delay)
        self._guard = guard
        self._connection = CONNECTIONS[target.settings.platform](target, guard, context.access)
        context.access.watched[target.name] = self._connection
        self._previous: Sample | None = None
        self._due_mono = time.monotonic() + delay
        self._begun_mono, self._died, self.deaths = lease_clock(), "", 0    # of what; in a row, with those before it
        self._asked: queue.SimpleQueue[concurrent.futures.Future[Report]] = queue.SimpleQueue()     # see poll_now
        self._polled_mono, self._epoch = -math.inf, ""      # when the last poll began, and in which of our lives

    def run(self) -> None:
        try:
            self._poll_until_stopped()
        except BaseException as error:  # noqa: BLE001  # the monitor tells of it, once, and starts another
            self._died = one_line(f"{type(error).__name__} {error}")
        finally:
            self._connection.close()

    def put_off(self, delay: float) -> None:
        """Lets the first poll wait; before the thread is started."""
        self._due_mono += delay
        if self.standing.state == "unknown":
            self.expires_mono += delay

    def bury(self) -> float:
        """Tells that it died; where that happens again and again, once. Seconds until another one is to poll."""
        self.deaths = 1 if lease_clock() - self._begun_mono > POLLER_LIFE else self.deaths + 1
        if self.deaths == 1:
            log.error("%s: its poller died (%s); starting another", self.target.name, self._died)
        return self.target.settings.interval if self.deaths > 1 else 0.0

    def _poll_until_stopped(self) -> None:
        while True:
            self.doubt.woken.wait(max(0.0, self._next_mono() - time.monotonic()))
            self.doubt.woken.clear()     # before the look at _stopped, so that a stop in between is not lost
            if self._stopped:
                return
            asked = self._asked.qsize()
            if self.rests and self._connection.keeper.session:
                self._connection.drop()
            if not asked and time.monotonic() < self._next_mono():
                continue
            if asked and not self._connection.keeper.lives:
                self._guard.ask(self.target.name)
            begun_mono = self._polled_mono = time.monotonic()
            self._alone = self.rests and not asked and not self.doubt.is_urged
            pause, report = self._poll()
            self._due_mono = begun_mono + pause
            self.doubt.polled_mono = begun_mono
            with contextlib.suppress(queue.Empty):      # whom a stop has sent away meanwhile
                for _ in range(0 if self._stopped else asked):
                    self._asked.get_nowait().set_result(report)

    def _next_mono(self) -> float:
        """When it polls; one that is urged as soon as after a bad result of its own, one that rests when nothing is
        heard of others, whatever became of them or of the database, and not so often that theirs could not be heard."""
        settings, soon = self.target.settings, self._polled_mono + self.target.settings.retry
        if self.doubt.is_urged:
            return min(self._due_mono, soon)
        if not self.rests or (self._alone and not self.standing.decided):
            return self._due_mono
        ahead = self._spare / 2 or max(LEASE_GRACE, settings.ttl - 2 * settings.interval)   # of the end of what counts
        return max(soon, time.monotonic() + self.expires_mono - ahead - lease_clock())

    def poll_now(self) -> concurrent.futures.Future[Report]:
        """Polls at once, as far as no account can be locked by it; gives the report of that poll, or is cancelled."""
        answer: concurrent.futures.Future[Report] = concurrent.futures.Future()
        self._asked.put(answer)
        self.doubt.woken.set()
        if self._stopped:       # the thread may have looked for the last time
            self._drop_asked()
        return answer

    def _drop_asked(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._asked.get_nowait().cancel()

    def go_on(self, delay: float) -> None:
        """Polls from now on, the first time after so many seconds, or when it would anyhow."""
        due_mono = time.monotonic() + delay
        self._due_mono = due_mono if self.rests else min(due_mono, self._due_mono)
        self.rests = False
        self.doubt.woken.set()

    def stop(self) -> None:
        """Ends the thread after the poll that runs; its report is dropped when the resource is deregistered."""
        with self._lock:
            self._stopped = True
        self._drop_asked()      # who waits for this one or the next
        self.doubt.woken.set()

    def take(self, sample: Sample) -> bool:     # of a resource that is not asked; whether it counts
        self._epoch = self._context.members.epoch
        self._report(evaluate(sample, self.target.settings), 0.0, sample)
        return not self._stopped

    def expire(self) -> None:
        """Makes the resource unhealthy, cause `stale`, when there was no result in time, or when a hold is over."""
        if self._is_held and not self.held:
            self.report_again()
        if lease_clock() < self.expires_mono:   # asked twice a second; _report looks again under the lock
            return
        name, ttl, waits = self.target.name, self.target.settings.ttl, self._guard.wait(self.target.name) > 0
        if not (waits and self.standing.cause == "auth"):
            why = f"; {self._guard.why(name)}" if waits else ""
            self._report(Verdict("unhealthy", "stale", f"no result for {ttl:.0f} s{why}"), 0.0)
            self._due_mono = 0.0    # as it may be since long: what waits stood still with a suspended machine
            self.doubt.woken.set()

    def _poll(self) -> tuple[float, Report]:
        """One poll and its report; returns the seconds from its start to the next, too."""
        settings, begun_mono, self._epoch = self.target.settings, lease_clock(), self._context.members.epoch
        sample, host_key, wait = None, self.target.host_key, self._guard.wait(settings.name)
        if wait > 0 and not self._connection.keeper.lives:
            verdict = Verdict("unhealthy", "auth", self._guard.why(settings.name))
        else:
            verdict, sample = poll_once(self.target, self._connection, self._previous)
        if sample and self._connection.keeper.session:     # a poll over it is no login: for the next start
            age = time.monotonic() - self._connection.keeper.opened_mono
            sample = replace(sample, details={**sample.details, "session_seconds": round(age, 1)})
        self._previous = sample or self._previous
        seconds, not_tried = lease_clock() - begun_mono, verdict.reason.startswith(NOT_TRIED)
        if self._epoch != self._context.members.epoch or (not_tried and not (
                wait > 0 and self.standing.state == "unknown")):
            # no result, or one of a life that is over: the standing holds, and a sibling's success may free this one
            report = Report(self.target, self.standing, self.standing, verdict, self._context.recorder.wall(), seconds)
            return min(wait or settings.retry, settings.interval), report
        self.target = replace(self.target, host_key=self._connection.host_key)
        learned = None if self.target.host_key == host_key else self.target.host_key
        report = self._report(verdict, seconds, sample, learned)
        wait = self._guard.wait(settings.name) if verdict.cause == "auth" else 0.0
        is_told = (self.standing.decided and not (self._context.members.is_shared and report.is_doubtful)
                   and (self.counted is not False or self.standing.healthy))    # or maintenance ends on an old result
        pause = settings.interval if is_told else min(settings.interval, max(settings.retry, wait))
        return pause * self._context.random.uniform(1 - JITTER, 1 + JITTER), report

    def _report(self, verdict: Verdict, seconds: float, sample: Sample | None = None,
                host_key: str | None = None) -> Report:
        settings, at, ttl = self.target.settings, self._context.recorder.wall(), self.target.settings.ttl
        with self._lock:
            stopped, before = self._stopped, self.standing
            if verdict.cause == "stale" and lease_clock() < self.expires_mono:
                return Report(self.target, before, before, verdict, at, seconds)
            after = settle(before, verdict, settings, at)
            if self.counted and not stopped:
                is_fresh = lease_clock() < self.expires_mono    # or it was not healthy, though nobody has noted it yet
                self.outage.take(before if is_fresh else Standing(), verdict, after)
            self.standing = after
            waits = self._guard.wait(settings.name) if verdict.cause == "auth" else 0.0
            if waits <= AUTH_BACKOFF:       # until the next attempt has an outcome
                ttl = max(ttl, waits + settings.timeout + 2)
            ttl -= max(0.0, seconds - settings.timeout)     # this machine may have been suspended after it was read
            self.expires_mono = lease_clock() + ttl + (waits if after.cause == "auth" else 0.0)
            wait = waits or (settings.retry if after.good or not settings.is_asked else settings.interval)
            self._opens_mono = lease_clock() + wait + settings.retry * max(0, settings.rise - after.good - 1)
            self._set_resource(ttl)
            kept = sample is not None and self._connection.keeper.reused
            report = Report(self.target, after, after, verdict, at, seconds, sample, host_key, waits, kept, self._epoch,
                            self.outage.is_cut_off or self.outage.is_doubtful, self.expires_mono - lease_clock(),
                            max(0.0, self._opens_mono - lease_clock()),
                            owned=self._context.members.owns(settings.name))
            if verdict.cause != "stale":
                self._found_mono, self._spare = report.made_mono, 0.0
            report = self.news.weigh(report)
            if self.rests and not self._alone:
                self._leave_to_others()
                if after.good and not after.healthy:    # for this machine alone, perhaps: nobody else polls again soon
                    self.doubt.urge()
        if not stopped and not (self.rests and verdict.cause == "stale"):   # that another one writes, or lives no more
            self._context.recorder.put(report)
        return report

    def tell_late(self, *, is_last: bool = False) -> None:
        """Tells of a change that waited, once nobody else is to blame for it, or at the end; for the monitor."""
        if self.news.waits:
            with self._lock:
                if report := self.news.late(is_last=is_last):
                    self._context.recorder.tell(report)

    def restore(self, stored: Status, age: float) -> None:
        """Goes on from what is stored: it must be of these settings and fresh, a refused login counts during its
        back-off. Where machines share the work, it is told of that with its time."""
        settings, left = self.target.settings, 0.0
        if age >= 0 and stored.settings_digest == self.target.settings_digest:
            left = settings.ttl - age
        if (is_same := restore_logins(self._guard, self.target, stored, age)) and stored.cause == "auth":
            left = settings.ttl
        if is_same and stored.strip.endswith(LOGGED_IN_MARKS) and not self._context.members.is_shared:
            self._guard.ask(settings.name)      # what was open vouches for the credential no longer
        if left > 0 and (stored.state, stored.cause) in POLL_MARKS and not self._context.members.is_shared:
            self.standing = Standing(cast(State, stored.state), cast(Cause, stored.cause), stored.reason,
                                     stored.since_at, stored.good, stored.bad)
            self.expires_mono = self.lease_mono = lease_clock() + left
            self.news.restore(self.standing)


# === Monitor =================================================================
# One thread makes the pollers follow the rows and share the work with other machines, replaces dead ones and sees
# leases and maintenance end. Names in `_mono` are monotonic times, in `_at` Unix times.
# Gives: Monitor
FOLLOW_INTERVAL = 50.0          # seconds after which the rows are looked at in any case: they may be changed by hand
CLOCK_STEP = 60.0               # seconds by which a clock that was set differs from one that is only adjusted
OWN_FILES, HOST_FILES = 100, 2  # that are open: database, console, workers; for a host, whose connection is made anew


def spread(pollers: Sequence[Poller]) -> None:
    """Puts off the first polls of those that are not started yet."""
    left = [max(0.0, poller.lease_mono - lease_clock()) for poller in pollers]
    for poller, delay in zip(pollers, first_polls(left, [one.target.settings for one in pollers]), strict=True):
        poller.put_off(delay)


def start_new(pollers: Iterable[Poller]) -> None:
    """Starts those that are not started yet."""
    for poller in pollers:
        if poller.ident is None:
            poller.start()


def counts_on(before: Target, target: Target) -> bool:
    """Whether a standing is of these settings; of what is not asked, and may speak tomorrow, whether of its token."""
    if not (before.settings.is_asked or target.settings.is_asked):
        return before.credential_digest == target.credential_digest
    return before.settings_digest == target.settings_digest


def follows(poller: Poller, target: Target) -> bool:
    """Whether it polls what the row says; a host key that it has learned may not be written yet."""
    return poller.target in (target, replace(target, host_key=target.host_key or poller.target.host_key))


def require_files(before: Mapping[str, Target], targets: Mapping[str, Target]) -> None:
    """Where there are more hosts than before, says so if not as many files may be open as are needed."""
    known, hosts = (sum(target.settings.platform is not Platform.SIMULATED for target in watched.values())
                    for watched in (before, targets))
    wanted = OWN_FILES + HOST_FILES * hosts
    if hosts > known and (allowed := allow_files(wanted)) < wanted:
        log.warning("%.0f files may be open, which is too few for %d hosts: set LimitNOFILE (ulimit -n) to %d",
                    allowed, hosts, wanted)


def overruled(name: str, pollers: Mapping[str, Poller], context: PollContext) -> Standing | None:
    """How a resource stands whatever its own results are: cut off, or behind an unhealthy resource or group."""
    poller, cut = pollers.get(name), context.uplink.cut
    if cut and poller and poller.outage.is_cut_off:
        state: State = "degraded" if poller.held or poller.standing.healthy else "unhealthy"
        return replace(CUT_OFF, state=state, since_at=cut.begun_at)
    if not (blocker := context.aggregator.blocker(name)):
        return None
    parent = pollers.get(blocker)
    since_at = parent.standing.since_at if parent else context.recorder.changed_at(blocker)
    return Standing("unhealthy", "parent", f"behind {blocker}", since_at)


def blamed(name: str, pollers: Mapping[str, Poller], context: PollContext) -> str | None:
    """What is told instead of a resource: another one or a group that it is behind; empty: this machine is cut off, or
    nothing was told yet. None: nothing. For any thread."""
    if (blocker := context.aggregator.blocker(name)) or not (poller := pollers.get(name)):
        return blocker or None
    return "" if poller.outage.is_cut_off or poller.news.told.state != "unhealthy" else None


class Exchange:
    """Which pollers work and which rest, where several machines share the work, and what the others found."""

    def __init__(self, store: Store, context: PollContext) -> None:
        self._store, self._members, self._guards = store, context.members, context.access.guards
        self._found: dict[int, Found] = {}      # by others, of settings that are not followed yet
        self._epoch = ""        # in which the resources were shared

    def look(self, pollers: Mapping[str, Poller]) -> None:
        """Takes up what other machines found, and which resources are this one's to poll."""
        if not self._members.is_shared:
            return
        try:        # first: this machine may have been cut off, and others know better
            if not self._members.is_cut_off:
                self._take_found(pollers.values())
        finally:        # what nobody else polls does not wait for what cannot be read
            self._share(pollers)

    def _share(self, pollers: Mapping[str, Poller]) -> None:
        """Has polled what is this machine's, and nothing else; in a new life all of it, for what was found in the last
        one may be lost, and what did not answer then, whoever's it is: it was perhaps this machine that was cut off."""
        is_new, self._epoch = self._epoch != self._members.epoch, self._members.epoch
        gained = list[Poller]()
        for name, poller in pollers.items():
            if self._members.polls(name):
                gained += [poller] if poller.rests or (is_new and poller.target.settings.is_asked) else []
                continue
            if not poller.rests:
                poller.rest()
            if is_new and poller.outage.lasts:
                poller.doubt.urge()
        left = [0.0 if poller.standing.state == "unknown" else max(0.0, poller.expires_mono - lease_clock())
                for poller in gained]
        for poller, delay in zip(gained, first_polls(left, [one.target.settings for one in gained]), strict=True):
            poller.go_on(delay)

    def _take_found(self, pollers: Iterable[Poller]) -> None:
        with self._store.reading() as session:
            fresh = {found.resource_id: found for found in self._members.read(session)}
        self._found |= fresh
        for poller in pollers if self._found else ():
            if found := fresh.get(poller.target.id):
                self._take_logins(poller, found)
            found = self._found.get(poller.target.id)
            if found and found.settings_digest == poller.target.settings_digest:
                poller.adopt(self._found.pop(poller.target.id))
        self._found = {number: found for number, found in self._found.items()
                       if found.found_mono + found.counts > lease_clock()}

    def _take_logins(self, poller: Poller, found: Found) -> None:
        """Or each machine would try a password that is refused, and none again what another one was accepted with."""
        guard, name = self._guards.of(poller.target), poller.target.name
        has_waited = guard.wait(name) > 0
        restore_logins(guard, poller.target, found.stored, lease_clock() - found.found_mono)
        if has_waited and not poller.rests and not guard.wait(name):
            poller.doubt.urge()


class Monitor(threading.Thread):
    """Starts, stops and reconciles the pollers; restarts dead ones; sees leases expire, and that a clock was set."""

    def __init__(self, store: Store, vault: Vault, context: PollContext,
                 wall: Callable[[], float] | None = None) -> None:
        super().__init__(name="monitor", daemon=True)
        wall = wall or store.wall
        self._store, self._vault, self._context, self._wall = store, vault, context, wall
        self.pollers: dict[str, Poller] = {}
        self.targets: dict[str, Target] = {}    # as the rows were when they were followed
        self.guards, self.groups, self.uplink = context.access.guards, context.aggregator.groups, context.uplink
        self.members, self.blames = context.members, functools.partial(blamed, pollers=self.pollers, context=context)
        self.changed_at, self.flush = context.recorder.changed_at, context.recorder.flush
        self.override = OverrideKeeper(store, context.aggregator, wall)
        self._zero_at = wall() - lease_clock()  # the Unix time of lease_clock's 0, by which stored times are read
        self.clock_step = 0.0, ""   # when the clock was set the last time, and how
        self.maintenance = MaintenanceKeeper(store)
        context.recorder.incidents.standings = self.standings
        self._revision, self._looked_mono = -1, -math.inf   # of the rows that were followed, and when
        self._exchange = Exchange(store, context)
        self._followed = threading.Condition()      # guards _revision; notified when the rows were followed
        self._ending, self._trouble = threading.Event(), Trouble("the configuration cannot be taken over")

    def begin(self) -> None:
        """Registers every resource, takes over fresh stored states and starts everything."""
        now_at = self._zero_at
        with self._store.reading() as session:
            own = self._store.own
            if remembered(session, own("boot")).value == boot_number() != 0:     # whatever became of the clock since
                self._zero_at = remembered(session, own("clock")).value / 1000
        self._reconcile()
        self._take_clock(now_at)
        self._context.aggregator.start()
        self._context.uplink.begin(self._context.urge, self._report_again, self._context.recorder.note)
        self._context.recorder.start()
        self.start()

    def run(self) -> None:
        PATIENCE.set(IMPATIENCE)
        while not self._ending.wait(MONITOR_INTERVAL):
            with self._trouble.caught():
                self._sweep()

    def close(self) -> None:
        """Ends all threads; polls that still run then are left to their deadline."""
        self._ending.set()
        self._context.uplink.close()
        if self.is_alive():
            self.join(1)    # or it would take stopped pollers for dead ones
        pollers, begun_mono, drain = list(self.pollers.values()), time.monotonic(), self._context.access.drain
        for poller in pollers:
            poller.stop()
        for poller in filter(threading.Thread.is_alive, pollers):
            seconds = max(LAST_SESSIONS, drain if poller.target.settings.platform == Platform.WINDOWS else 0.0)
            poller.join(max(0.0, begun_mono + seconds - time.monotonic()))
        for poller in pollers:
            poller.tell_late(is_last=True)      # or never: the next start takes what is stored for told
        self._context.recorder.close()

    def catch_up(self) -> bool:
        """Waits until the pollers follow the rows as they are now; whether they do in time. For any thread."""
        with self._store.reading() as session:
            wanted = revision(session)
        with self._followed:
            return self._followed.wait_for(lambda: self._revision >= wanted, 20 * MONITOR_INTERVAL)

    def poll_now(self, name: str, timeout: float) -> Report | None:
        """Polls a resource at once and waits until its report is written; None where none came in time. Any thread."""
        ends_mono, report = time.monotonic() + timeout, None
        while report is None and (left := ends_mono - time.monotonic()) > 0 and (poller := self.pollers.get(name)):
            with contextlib.suppress(concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
                report = poller.poll_now().result(left)
                self._context.recorder.flush()
            if report is None and self._ending.wait(MONITOR_INTERVAL / 10):     # else it was replaced just then
                break
        return report

    def _report_again(self) -> None:
        for poller in list(self.pollers.values()):
            poller.report_again()

    def behind(self, name: str) -> Standing | None:
        """How a resource stands that is cut off or behind an unhealthy one; None for any other. For any thread."""
        return overruled(name, self.pollers, self._context)

    def standings(self) -> Iterator[tuple[str, Standing, bool]]:
        """Every resource, how it stands now, and whether it counts. For any thread."""
        for name, poller in list(self.pollers.items()):
            yield name, self.behind(name) or poller.standing, poller.counted is not False

    def login_wait(self, name: str) -> float:
        """Seconds until a resource that was refused may log in again; 0 for any other. For any thread."""
        poller = self.pollers.get(name)
        return self.guards.of(poller.target).wait(name) if poller else 0.0

    def _sweep(self) -> None:
        for poller in list(self.pollers.values()):
            poller.expire()
            poller.tell_late()
            if not poller.is_alive() and not self._ending.is_set():
                self._launch(poller.target, poller.bury(), poller)
        covered = self.maintenance.covered(lease_clock() + self._zero_at)   # first: nothing else waits for a database
        with self._context.aggregator.at_once():    # alternatives whose maintenance ends together close nothing
            self._recount(covered)
        start_new(self.pollers.values())
        self.override.say()
        self._context.aggregator.beat("monitor")
        self._exchange.look(self.pollers)
        with self._store.reading() as session:
            current = revision(session)
        if current != self._revision or lease_clock() - self._looked_mono > FOLLOW_INTERVAL:
            self._reconcile()
        zero_at = self._wall() - lease_clock()
        if abs(zero_at - self._zero_at) > CLOCK_DRIFT:
            self._take_clock(zero_at)
        self.override.end()

    def _take_clock(self, zero_at: float) -> None:
        """Takes down how the clock stands, for the next start, and notes that it was set."""
        moved = zero_at - self._zero_at
        with self._store.writing() as session:
            for name, value in (("boot", boot_number()), ("clock", round(1000 * zero_at))):
                session.merge(Setting(name=self._store.own(name), value=value))
            if abs(moved) > CLOCK_STEP and not self._context.members.is_shared:     # else the rows have the database's
                move_times(session, moved, lease_clock() + self._zero_at)
                how = f"the clock was set {'forward' if moved > 0 else 'back'} by {abs(moved):,.0f} s"
                self.clock_step = self._wall(), how
                log.warning("%s", how)
                record_event(session, "clock", how, at=self._wall())
        self._zero_at = zero_at     # now that it is written
        self.maintenance.follow(lease_clock() + zero_at)

    def _recount(self, covered: Collection[str]) -> None:
        """Takes up that maintenance has begun or is over: the state that is known counts."""
        for name, poller in self.pollers.items():
            if (counted := name not in covered) is not poller.counted:
                poller.count(counted=counted)
                if counted:
                    self._context.aggregator.register(name, poller, critical=poller.target.settings.critical,
                                                      asked=poller.target.settings.is_asked)
                else:
                    self._context.aggregator.deregister(name)
                poller.report_again()

    def _reconcile(self) -> None:
        """Makes the pollers follow the rows."""
        self.override.follow(self._zero_at)     # first: it holds whatever is wrong with the rest
        with self._store.reading() as session:
            current, targets = revision(session), load_targets(session, self._vault, self.targets)
            gates = Gates.model_validate_json(remembered(session, "gates").text or "{}")
            is_known = current == self._revision and targets == self.targets
            stored = {} if is_known else {row.resource_id: row for row in session.scalars(sqlalchemy.select(Status))}
        self.maintenance.follow(lease_clock() + self._zero_at)
        require_files(self.targets, targets)
        self.guards.keep(targets.values())
        gone = {name: self.pollers.pop(name) for name in self.pollers.keys() - targets.keys()}
        for name, poller in gone.items():
            poller.stop()
            self._context.forget(name)
        former = {poller.target.id: poller for poller in gone.values()}
        found = {name: self.pollers.get(name) or former.get(target.id) for name, target in targets.items()}
        fresh = [name for name, before in found.items() if before is None or not follows(before, targets[name])]
        for before in filter(None, map(found.get, fresh)):
            before.stop()       # all of them first: what leads through a new bastion may need another password
        refused = {row.resource_id for row in stored.values() if row.strip.endswith(REFUSED_MARK)}
        for name in sorted(fresh, key=lambda name: targets[name].id in refused):    # those that were accepted first
            self._launch(targets[name], 0.0, found[name], stored.get(targets[name].id))
        spread([self.pollers[name] for name in fresh])
        everything = [target.settings for target in targets.values()]
        covered = self.maintenance.covered(lease_clock() + self._zero_at)
        with self._context.aggregator.at_once():    # what has another name neither opens nor closes in between
            self._context.aggregator.arrange(gates, by_tag(everything), usable_parents(gates, everything))
            self._recount(covered)
            for name in gone:
                self._context.aggregator.deregister(name)
        start_new(self.pollers.values())
        with self._followed:
            self._revision, self._looked_mono, self.targets = current, lease_clock(), targets
            self._followed.notify_all()
        if not is_known and not any(target.settings.critical for target in targets.values()):
            log.warning("no critical resource is watched: the gate is open whatever happens")

    def _launch(self, target: Target, delay: float, before: Poller | None, stored: Status | None = None) -> None:
        """A poller for `target`; it goes on as the one `before` it with these settings, or from the stored state."""
        if before:
            before.stop()
        if before and counts_on(before.target, target):
            key = target.host_key or before.target.host_key     # learned and not written yet
            poller = Poller(replace(target, host_key=key), self._context, self.guards.of(target), delay)
            poller.go_on_from(before)
        else:
            poller = Poller(target, self._context, self.guards.of(target), delay)
            if stored:
                poller.restore(stored, lease_clock() + self._zero_at - stored.polled_at)
            if before and before.target.name != target.name and poller.standing.state == "unknown":     # renamed
                poller.go_on_from(before)
        if before:
            poller.lease_mono, poller.deaths, poller.rests = before.expires_mono, before.deaths, before.rests
        self.pollers[target.name] = poller


# === Counters ================================================================
# What the workers count, in memory shared with the main process: a slot each, which its worker alone writes, so that
# no lock is shared whose holder may be killed. In a worker, the loop's and the pool's threads take turns at the slot.
# The main process sums the slots up for /-/metrics, and hands the slot of a worker that died on to the next.
# Gives: BEAT, Counters, RequestCounters, LATENCIES, STATUS_OUTCOMES, ROWS, ROW, ACCEPTED, QUEUED, OUTCOME
LEAD, SHARE = 4, 1.5            # a worker may hold LEAD + SHARE * N connections, where another has N, and take more
# Seconds, the upper bounds of the latency histogram: close together up to where a gate is to answer (10 ms), and on
# to what an application in the pool may take; a bound more costs a line for every outcome.
LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# How a request ended: by the application's status, refused by the closed gate, shed for overload, one of
# HealthChecker's own paths, refused by the parser, or cut short by a failure or a client that left.
OUTCOMES = ("1xx", "2xx", "3xx", "4xx", "5xx", "refused", "shed", "own", "bad", "cut")
OUTCOME = "healthchecker.outcome"  # key of the environ for an outcome that is not the application's status
STATUS_OUTCOMES = {outcome[0]: outcome for outcome in OUTCOMES[:5]}
ROW = len(LATENCIES) + 2        # cells of an outcome: a count for each latency, one for more, their sum
ROWS = {outcome: number * ROW for number, outcome in enumerate(OUTCOMES)}
ACCEPTED = len(OUTCOMES) * ROW  # the cell of the connections ever accepted
QUEUED = ACCEPTED + 1           # the cell of the requests that wait for a pool thread
BEAT = QUEUED + 1               # the cell of the last turn of the loop, its monotonic time
PASSED = BEAT + 1               # the cell of the requests of no route that would have been refused, and the next one of
                                # those that were, by the gate; two such cells of each route come after them


class Counters:
    """All slots. No total ever falls: a slot outlives the process that has it."""

    def __init__(self, slots: int, routes: Iterable[str] = ()) -> None:
        self.held = multiprocessing.RawArray(ctypes.c_long, [-1] * slots)   # connections; -1: nobody serves there
        self.routes = {path: PASSED + 2 * number for number, path in enumerate((SITE, *routes))}    # cells like PASSED
        self._size = PASSED + 2 * len(self.routes)
        self._cells = multiprocessing.RawArray(ctypes.c_double, slots * self._size)

    def slot(self, index: int) -> memoryview[float]:
        """The cells of a slot, as floats; half the price of asking ctypes."""
        return memoryview(self._cells).cast("B").cast("d")[index * self._size: (index + 1) * self._size]

    def vacate(self, index: int) -> None:
        """Says that nobody serves in a slot; its totals stay."""
        self.held[index] = -1
        self.slot(index)[QUEUED] = 0.0

    def total(self, cell: int) -> float:
        """A cell, summed over the slots."""
        return sum(memoryview(self._cells).cast("B").cast("d")[cell::self._size])

    def totals(self) -> list[float]:
        """Every cell, summed over the slots."""
        cells = memoryview(self._cells).cast("B").cast("d")
        return [sum(cells[cell::self._size]) for cell in range(self._size)]

    def refusals(self) -> dict[str, tuple[int, int]]:
        """Requests of each route and, as SITE, of no route: those that were refused, and that would have been."""
        cells = self.totals()
        return {path: (int(cells[cell + 1]), int(cells[cell])) for path, cell in self.routes.items()}


class RequestCounters:
    """What this process counts, in its slot."""

    def __init__(self, counters: Counters, slot: int) -> None:
        self._counters, self._slot = counters, slot
        self._cells = counters.slot(slot)
        self._lock = threading.Lock()   # guards _cells against the other threads of the pool

    def request(self, outcome: str, seconds: float) -> None:
        row = ROWS[outcome]
        with self._lock:
            self._cells[row + bisect.bisect_left(LATENCIES, seconds)] += 1
            self._cells[row + ROW - 1] += seconds

    def passed(self, route: str, *, refused: bool = False) -> None:
        """A request that was `refused` or would have been, for the sake of a route or of the whole site (empty)."""
        with self._lock:
            self._cells[self._counters.routes[route] + refused] += 1

    def accepted(self) -> None:
        self._cells[ACCEPTED] += 1      # by the loop's thread alone

    def turn(self, queued: int) -> None:
        """The loop turns, while `queued` requests wait for a pool thread."""
        self._cells[QUEUED] = queued
        self._cells[BEAT] = time.monotonic()

    def hold(self, connections: int) -> None:
        """Tells the others how many connections this worker holds."""
        self._counters.held[self._slot] = connections

    @property
    def ahead(self) -> bool:
        """Whether this worker holds more connections than its share."""
        held = self._counters.held
        return held[self._slot] > LEAD + SHARE * min(count for count in held if count >= 0)


# === Gate ====================================================================
# The application's door, as WSGI: asks the lease on every request, and answers 503 before the application runs unless
# it holds, or the mode is observe. `route` sorts a request by its path, without blocking; the server runs on its loop
# what never blocks, and `admit`, the application, in the pool, where the lease is asked once more.
# Gives: Gate, marked, PathGates, respond, Reply, NO_STORE, PREFIX, HEALTH, METRICS_PATH, HANDLER, Way, WELCOME
RETRY_AFTER_MAX = 3600          # seconds
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><body style="font:1.1rem system-ui;margin:15vh auto;max-width:32rem;padding:1rem">
<h1>{title}</h1><p>{text}</p></body></html>
"""
DRAINED_PAGE = PAGE.format(title="Temporarily unavailable", text="This service is taken out of use for a while. "
                           "Please try again later.").encode()
CLOSED_PAGE = PAGE.format(title="Temporarily unavailable", text="A system that this service depends on is not healthy. "
                      "Please try again in a moment.").encode()
WELCOME = PAGE.format(title="The gate is open", text="HealthChecker's built-in page: put an application of your "
                      "own here with <code>service.app</code> in inventory.yaml. While a resource is unhealthy, it "
                      "answers 503.{console}")
NO_STORE = ("Cache-Control", "no-store")
PREFIX = "/-/"                  # everything below is HealthChecker's own
HEALTH = "/-/health"
METRICS_PATH = "/-/metrics"
HANDLER = "healthchecker.handler"   # key of the environ for what `Gate.route` has found
WOULD_REFUSE = ("X-HealthChecker", "would-refuse")
Headers = list[tuple[str, str]]
Reply = tuple[str, Headers, bytes]     # status line, headers, body
# What answers a request, and the leases that its path may be under.
Way = tuple[Callable[["WSGIEnvironment", "StartResponse", Sequence[Lease]], Iterable[bytes]], Sequence[Lease]]
UNAVAILABLE = "503 Service Unavailable"
DOTS = re.compile(r"/\.\.?([/;]|$)")


def respond(environ: WSGIEnvironment, start_response: StartResponse, answer: Reply) -> Iterable[bytes]:
    """Sends an answer of HealthChecker's own; text/plain unless its headers say otherwise, never cached."""
    status, headers, body = answer
    if not status.startswith("204"):
        if not any(name == "Content-Type" for name, _ in headers):
            headers = [*headers, ("Content-Type", "text/plain; charset=utf-8")]
        headers = [*headers, ("Content-Length", str(len(body)))]
    start_response(status, [*headers, NO_STORE])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def marked(start_response: StartResponse) -> StartResponse:
    """Says in an answer that it would have been a refusal; `middleware` prints this, too."""

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        others = [header for header in headers if header[0].lower() != "x-healthchecker"]
        return start_response(status, [*others, WOULD_REFUSE], exc_info)

    return start


class PathGates:
    """Which gates the path of a request is under, whatever stands for a gate; `middleware` prints this class, too."""

    def __init__(self, site: Any, routes: Mapping[str, Any]) -> None:
        self._site, self._routes, self._all = (site,), routes, (site, *routes.values())
        self._depth = 1 + max((path.count("/") for path in routes), default=0)

    def of(self, path: str) -> Sequence[Any]:
        """That of the longest route that a path is in, else the site's; where it can be read in two ways, of both:
        which is the strictest may be another one a moment later."""
        if not self._routes:
            return self._site
        if "\\" in path or "%" in path or ("/." in path and DOTS.search(path)):  # it may lead anywhere
            return self._all
        if "//" in path or ";" in path:
            plain = re.sub("//+", "/", re.sub(";[^/]*", "", path))
            return self._longest(path), self._longest(plain)
        return (self._longest(path),)

    def _longest(self, path: str) -> Any:
        parts = path.split("/", self._depth)[: self._depth]
        for count in range(len(parts), 1, -1):
            if found := self._routes.get("/".join(parts[:count])):
                return found
        return self._site[0]


def strictest(leases: Sequence[Lease]) -> Lease:
    """Of several, the one that refuses first, as they are now."""
    if len(leases) == 1:
        return leases[0]
    return min(leases, key=lambda lease: (lease.observes.value, lease.until.value))


class Gate:
    """WSGI: the application answers while the lease holds, or the mode is observe; otherwise 503."""

    def __init__(self, app: WSGIApplication, lease: Lease, clock: Callable[[], float] = lease_clock,
                 passed: Callable[..., object] = lambda *_, **__: None) -> None:
        """`passed` is told of which route is a request that would have been refused, or was."""
        self._app, self._lease, self._clock, self._passed = app, lease, clock, passed
        self.draining = False       # the service ends: readyz says so
        self.leases_of: Callable[[str], Sequence[Lease]] = PathGates(lease, {
            path.encode().decode("latin-1"): part for path, part in lease.parts.items() if "/" in path}).of
        self._answers: dict[str, Callable[[Lease], Reply]] = {
            "/-/livez": lambda _: ("200 OK", [], b"ok\n"),
            "/-/readyz": self._readyz,
            "/-/gate": self._permit,
            HEALTH: self._health,
        }

    def is_healthy(self, name: str = SITE) -> bool:
        """The gate's answer, also for the application: environ["healthchecker.is_healthy"](); of a group by its name,
        of a route by its path. Raises LookupError."""
        return self._holds(self._lease.parts[name] if name else self._lease)

    def route(self, path: str) -> Way:
        """What answers a request for `path`: `admit`, which may block, or what never does."""
        if path.startswith(PREFIX):
            return self._own, (self._lease,)
        leases = self.leases_of(path)
        lease = strictest(leases)
        return self.admit if self._clock() < lease.until.value or lease.observes.value else self.refuse, leases

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        handler, leases = environ.pop(HANDLER, None) or self.route(environ["PATH_INFO"])
        return handler(environ, start_response, leases)

    def admit(self, environ: WSGIEnvironment, start_response: StartResponse,
              leases: Sequence[Lease]) -> Iterable[bytes]:
        """The application's answer, unless the gate has closed while the request waited for a thread."""
        lease = strictest(leases)
        if not self._holds(lease):
            if not lease.observes.value:
                return self.refuse(environ, start_response, leases)
            self._passed(lease.name)
            start_response = marked(start_response)
        if "HTTP_UPGRADE" in environ and environ["HTTP_UPGRADE"].lower() == "websocket":
            return respond(environ, start_response, ("501 Not Implemented", [], b"no websockets are served here\n"))
        environ["healthchecker.is_healthy"] = self.is_healthy
        return self._app(environ, start_response)

    def refuse(self, environ: WSGIEnvironment, start_response: StartResponse, leases: Sequence[Lease],
               outcome: str = "refused") -> Iterable[bytes]:
        """For a closed gate; "shed" is a request that no thread has time for."""
        environ[OUTCOME] = outcome
        lease = strictest(leases)
        if outcome == "refused":
            self._passed(lease.name, refused=True)
        retry, drained = self._retry_after(lease), lease.by_hand.value < 0
        kind, body = "text/html; charset=utf-8", DRAINED_PAGE if drained else CLOSED_PAGE
        if "text/html" not in environ.get("HTTP_ACCEPT", ""):
            kind, why = "application/json", ', "detail": "closed by an operator"' if drained else ""
            body = f'{{"status": 503, "title": "Service Unavailable"{why}, "retry_after": {retry[1]}}}\n'.encode()
        return respond(environ, start_response, (UNAVAILABLE, [("Content-Type", kind), retry], body))

    def _own(self, environ: WSGIEnvironment, start_response: StartResponse,
             leases: Sequence[Lease]) -> Iterable[bytes]:
        environ[OUTCOME] = "own"
        path, lease = environ["PATH_INFO"], leases[0]
        if path.startswith(("/-/readyz/", "/-/gate/")):     # of one group or route
            end = path.index("/", len(PREFIX))
            name = path[end + 1:].encode("latin-1").decode("utf-8", "replace")
            found = lease.parts.get(name) or lease.parts.get(f"/{name}")
            path, lease = (path[:end], found) if found else ("", lease)
        answer: Reply = "404 Not Found", [], b"not found\n"
        if path == HEALTH and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            answer = "405 Method Not Allowed", [("Allow", "GET, HEAD")], b""
        elif path in self._answers:
            answer = self._answers[path](lease)
        return respond(environ, start_response, answer)

    def _holds(self, lease: Lease) -> bool:
        return self._clock() < lease.until.value

    def _readyz(self, lease: Lease) -> Reply:
        if self.draining:
            return UNAVAILABLE, [], b"ending\n"
        if self._holds(lease):
            return "200 OK", [], b"open\n"
        body = b"closed by an operator\n" if lease.by_hand.value < 0 else b"closed\n"
        if lease.observes.value:    # the load balancer would take the site away
            return "200 OK", [WOULD_REFUSE], body
        return UNAVAILABLE, [self._retry_after(lease)], body

    def _permit(self, lease: Lease) -> Reply:
        if self._holds(lease):
            return "204 No Content", [], b""
        return ("204 No Content", [WOULD_REFUSE], b"") if lease.observes.value else ("403 Forbidden", [], b"")

    def _health(self, lease: Lease) -> Reply:
        kind = ("Content-Type", "application/health+json")
        if self._holds(lease):
            return "200 OK", [kind], b'{"status": "pass"}'
        return UNAVAILABLE, [kind], b'{"status": "fail"}'

    def _retry_after(self, lease: Lease) -> tuple[str, str]:
        """Seconds to the soonest moment at which the gate can open; 1 when it is open, and the pool full."""
        wait = math.ceil(lease.opens.value - self._clock())
        return "Retry-After", str(min(max(wait, 1), RETRY_AFTER_MAX))


# === Leases ==================================================================
# The leases in a file, `service.lease_file`, for gates in other servers of this machine: the aggregator puts what
# changes there, in the main process, and `middleware` prints READER, which maps it. The file is made of 8-byte cells in
# the machine's byte order. First ASCII, padded with zeros: what the rest is good for (IDENTITY, clock, boot, namespace
# of time). At GENERATION a number, another one at each start; 0: all is closed. At COUNT the number of gates; from
# SLOTS on a double for each; last their names in this order, as JSON, "" for the site, padded with blanks. A gate's
# double is the time of lease_clock until which it is open, or, at most 0, minus the time when it can open again, and
# minus OBSERVED, where it refuses nothing.
# Gives: LeaseFile, middleware_text, require_lease_place
IDENTITY = "HealthChecker lease 1"      # and the version of this layout
GENERATION, COUNT, SLOTS = 15, 16, 17   # cells
CELL = 8                        # bytes
OBSERVED = 1e12                 # seconds that are added where a gate is closed and refuses nothing
KEEP_INTERVAL = 1.0             # seconds between two looks whether the file is still there


def lease_identity() -> str:
    """What a file of leases is good for: a layout, a clock, a boot, a namespace of time. Raises OSError."""
    if sys.platform == "win32":
        clock, told = time.get_clock_info("monotonic"), (ctypes.c_int64 * 6)()     # SYSTEM_TIMEOFDAY_INFORMATION
        if ctypes.windll.ntdll.NtQuerySystemInformation(3, told, ctypes.sizeof(told), None):
            raise OSError("Windows does not tell its boot time")
        boot = told[0] - told[4]        # who sets the clock moves both
        return f"{IDENTITY} {clock.implementation} {clock.resolution:g} {boot}"
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id, space = file.read().strip(), "/proc/self/ns/time"
    name = f"CLOCK_BOOTTIME {time.clock_getres(time.CLOCK_BOOTTIME):g}"
    return f"{IDENTITY} {name} {boot_id} {os.stat(space).st_ino if os.path.exists(space) else 0}"


READER = '''"""HealthChecker's gate for any server: `app = Gate(app)` in WSGI, `app = AsgiGate(app)` in ASGI.

Printed by `healthchecker.py middleware`, to be put beside an application; it needs nothing but Python 3.8 or later
and the right to read LEASE_FILE on the machine that writes it (Linux or Windows). While the gate of a path is closed,
requests get 503. Closed is also what is missing, damaged, of another boot, clock or version, and what a service has
left that ended; the log "healthchecker" says so. On Windows it takes the same clock as the service has, that of
Python up to 3.12 or from 3.13 on. A container mounts the folder, read-only, not the file, which each start replaces;
one that has a boot id or a clock of its own (gVisor, systemd-nspawn, a namespace of time) stays closed. A route is of
the whole path, with SCRIPT_NAME or root_path, and a request that SCRIPT_NAME leads to must be open without it, too.
Where the service only observes, a closed gate refuses nothing here either, and WSGI answers are marked. What has
begun, such as a websocket, is not ended. A WSGI application may ask environ["healthchecker.is_healthy"](), also with
the name of a group or a route.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import math
import mmap
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LEASE_FILE = @PATH@
IDENTITY = @IDENTITY@
GENERATION, COUNT, SLOTS = @CELLS@  # cells of 8 bytes
OBSERVED = @OBSERVED@
LOOK_INTERVAL = 0.5  # seconds until another file is seen
WOULD_REFUSE = ("X-HealthChecker", "would-refuse")
BODY = b"temporarily unavailable\\n"
DOTS = re.compile(r"/\\.\\.?([/;]|$)")
log = logging.getLogger("healthchecker")
clock = time.monotonic
if sys.platform != "win32":
    clock = functools.partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@SHARED@

def is_observed(end: float) -> bool:
    """Of a gate that is closed, and refuses nothing."""
    return -2 * OBSERVED < end <= -OBSERVED


class Table(NamedTuple):
    """A file as it was mapped; the cells change."""

    cells: Sequence[float]
    generation: float
    gates: dict[str, int]  # cells of groups and routes; of the whole site: ""
    cells_of: Callable[[str], Sequence[int]]  # of a path, see PathGates
    place: Any


CLOSED = Table([0.0] * (SLOTS + 1), 0.0, {"": SLOTS}, PathGates(SLOTS, {}).of, None)


def read(path: str) -> Table:
    with open(path, "rb") as file:
        memory, status = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), os.fstat(file.fileno())
    cells = memoryview(memory).cast("d")
    generation, told = cells[GENERATION], memory[: 8 * GENERATION].rstrip(b"\\0").decode()
    if told != lease_identity():
        raise ValueError(f"it is of another boot, clock or version: {told!r}, here {lease_identity()!r}")
    names = json.loads(memory[8 * (SLOTS + int(cells[COUNT])) :])
    if not generation or cells[GENERATION] != generation:
        raise ValueError("no service is running")
    gates = {name.encode().decode("latin-1"): SLOTS + number for number, name in enumerate(names)}
    routes = {name: cell for name, cell in gates.items() if "/" in name}
    return Table(cells, generation, gates, PathGates(SLOTS, routes).of, (status.st_dev, status.st_ino))


class Leases:
    """What the file says; whatever is not as it has to be is closed."""

    def __init__(self, path: str) -> None:
        self._path, self._table, self._look, self._why = path, CLOSED, -math.inf, ""
        self._looked(clock())  # or of several first requests only one would see an open gate

    def is_healthy(self, name: str = "") -> bool:
        """Of the whole site, or of a group or a route; raises LookupError."""
        table = self._looked(clock())
        cell = table.gates[name.encode().decode("latin-1")] if name and table is not CLOSED else SLOTS
        end = table.cells[cell]
        return clock() < end and table.cells[GENERATION] == table.generation

    def wait(self, path: str) -> int:
        """0 while a path is open, else the seconds of its Retry-After; -1 where it is closed and refuses nothing."""
        now = clock()
        table = self._table if now < self._look else self._looked(now)
        cells, found = table.cells, table.cells_of(path)
        end = cells[found[0]]
        if len(found) > 1:  # it can be read in several ways: the strictest counts
            end = min([cells[cell] for cell in found], key=lambda end: (is_observed(end), end))
        if cells[GENERATION] != table.generation:  # seen after `end`: another file's by now
            end = 0.0
        if is_observed(end):
            return -1
        return 0 if now < end else math.ceil(min(max(1.0, -end - now), 3600.0))

    def _looked(self, now: float) -> Table:
        if now < self._look:
            return self._table
        self._look, table, why = now + LOOK_INTERVAL, self._table, ""
        try:
            status = os.stat(self._path)
            if (status.st_dev, status.st_ino) != table.place or table.cells[GENERATION] != table.generation:
                table = read(self._path)
        except Exception as error:  # noqa: BLE001  # whatever is wrong with it
            table, why = CLOSED, f"{self._path}: {error}"
        if why != self._why:
            log.warning("the gate is closed: %s" if why else "the gate follows its lease again%s", why)
        self._table, self._why = table, why
        return table


class Gate:
    """WSGI: the application answers while the gate of a request's path is open, otherwise 503."""

    def __init__(self, app: WSGIApplication, path: str = LEASE_FILE) -> None:
        self._app, self._leases = app, Leases(path)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        mount, path = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO", "")
        wait = self._leases.wait(mount + path)
        if mount and wait <= 0:  # which a client may have sent
            wait = self._leases.wait(path) or wait
        if wait <= 0:
            environ["healthchecker.is_healthy"] = self._leases.is_healthy
            return self._app(environ, marked(start_response) if wait else start_response)
        headers = [("Retry-After", str(wait)), ("Cache-Control", "no-store"), ("Content-Type", "text/plain")]
        start_response("503 Service Unavailable", [*headers, ("Content-Length", str(len(BODY)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [BODY]


class AsgiGate:
    """ASGI: the same; a lifespan passes, a websocket is refused by a denial, or by 1013 where there is none."""

    def __init__(self, app: Callable[..., Any], path: str = LEASE_FILE) -> None:
        self._app, self._leases = app, Leases(path)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "").encode("utf-8", "replace").decode("latin-1")
        if scope["type"] == "lifespan" or (wait := self._leases.wait(path)) <= 0:
            await self._app(scope, receive, send)
            return
        kind = "http.response"
        if scope["type"] == "websocket":
            kind = "websocket.http.response"
            if kind not in (scope.get("extensions") or {}):
                await send({"type": "websocket.close", "code": 1013, "reason": "temporarily unavailable"})
                return
        headers = [(b"retry-after", b"%d" % wait), (b"cache-control", b"no-store")]
        headers += [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY))]
        await send({"type": f"{kind}.start", "status": 503, "headers": headers})
        await send({"type": f"{kind}.body", "body": b"" if scope.get("method") == "HEAD" else BODY})
'''


def middleware_text(path: Path) -> str:
    """The module that reads a file of leases, in any server."""
    parts = {"PATH": json.dumps(str(path)), "IDENTITY": json.dumps(IDENTITY),
             "CELLS": f"{GENERATION}, {COUNT}, {SLOTS}", "OBSERVED": str(OBSERVED),
             "SHARED": "\n\n".join(inspect.getsource(each) for each in (lease_identity, PathGates, marked))}
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], READER)


def place_fault(path: Path) -> str:
    """Why no file of leases can be there; empty where it can."""
    folder, account = path.parent.stat(), 0
    if sys.platform != "win32":
        account = os.geteuid()
        if folder.st_mode & stat.S_IWOTH or (folder.st_mode & stat.S_IWGRP and folder.st_gid != os.getegid()):
            return "others can write to its folder, and would open gates there"
    if not os.access(path.parent, os.W_OK):
        return "its folder cannot be written"
    if not os.path.lexists(path):
        return ""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return "is a folder, a link or a device"
    if found.st_uid not in (account, *([] if account else [folder.st_uid])):
        return "belongs to another account"
    with path.open("rb") as file:
        head = file.read(SLOTS * CELL)
    ours = len(head) == SLOTS * CELL and head.startswith(IDENTITY.rpartition(" ")[0].encode())
    return "" if ours else "is another file, which would be lost"


def require_lease_place(path: Path) -> None:
    """Raises UsageError unless the leases can be in a file there."""
    try:
        _ = lease_identity()
        fault = place_fault(path)
    except OSError as error:
        fault = f"cannot be used: {error.strerror}"
    if fault:
        raise UsageError(f"service.lease_file {path}: {fault}")


def cells_of(path: Path, size: int = 0) -> memoryview[float]:
    """The cells of a file, in memory."""
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), size)).cast("d")


class LeaseFile:
    """The leases of the site, groups and routes in a file, all closed at first and after `close`. Raises UsageError."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        require_lease_place(path)
        self._path, self._lock = path, threading.Lock()     # guards _ends, and that _cells have them
        self._places = {name: SLOTS + number for number, name in enumerate(sorted({SITE, *names}))}
        self._ends = dict.fromkeys(self._places.values(), 0.0)
        self._cells: memoryview[float] = memoryview(bytearray(SLOTS * CELL)).cast("d")
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="leases", daemon=True)
        try:
            self._open()
        except OSError as error:
            raise UsageError(f"service.lease_file {path} cannot be written: {error.strerror or error}") from error

    def begin(self) -> None:
        """Has the file come back from now on when somebody has removed it, as who cleans up old ones does."""
        self._thread.start()

    def put(self, name: str, until: float, opens: float, *, observes: bool = False) -> None:
        """One store: until when a gate is open, else when it can open again; `observes`: it is closed, and refuses
        nothing."""
        place, closed = self._places[name], -min(opens, OBSERVED / 2)
        end = closed - OBSERVED if observes else until if until > 0.0 else closed
        with self._lock:
            self._ends[place] = end
            if self._cells[GENERATION] == self._generation:     # on Windows another service's may be in the same file
                self._cells[place] = end

    def close(self) -> None:
        """Says that all is closed, whatever is put later."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            if self._cells[GENERATION] == self._generation:
                self._cells[GENERATION] = 0.0

    def _keep(self) -> None:
        trouble = Trouble(f"service.lease_file {self._path} is gone")
        while not self._ending.wait(KEEP_INTERVAL):
            with trouble.caught():
                is_there, is_lost = os.path.lexists(self._path), self._cells[GENERATION] != self._generation
                if is_lost and is_there and cells_of(self._path, SLOTS * CELL)[GENERATION]:
                    raise UsageError("another service writes to this path; give each its own")
                if is_lost or not is_there:
                    self._open()

    def _open(self) -> None:
        content = self._content()
        if self._path.exists():     # who has it mapped sees at once that it holds no longer
            cells_of(self._path, SLOTS * CELL)[GENERATION] = 0.0
        self._publish(self._path, content)
        cells = cells_of(self._path)
        with self._lock:
            self._cells[GENERATION] = 0.0       # of one that was removed, too; on Windows it is the same file
            for place, end in self._ends.items():
                cells[place] = end
            self._cells, self._generation = cells, float(secrets.randbits(52) | 1)
            cells[GENERATION] = self._generation

    def _content(self) -> bytes:
        names = json.dumps([*self._places]).encode()
        head = lease_identity().encode().ljust(GENERATION * CELL, b"\0")
        cells = [0.0, float(len(self._places)), *([0.0] * len(self._places))]   # the generation comes last of all
        return head + struct.pack(f"{len(cells)}d", *cells) + names.ljust(-(-len(names) // CELL) * CELL)

    @staticmethod
    def _publish(path: Path, content: bytes) -> None:
        """The whole file under its name, or none."""
        if sys.platform == "win32" and path.exists():   # there nobody can replace or cut what somebody has mapped
            with path.open("r+b") as file:
                file.truncate(max(len(content), os.path.getsize(path)))
                file.write(content.ljust(os.path.getsize(path)))
            return
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            create_private(temporary, content)
            if sys.platform != "win32" and not os.geteuid():
                os.chown(temporary, 0, 0)       # who could cut it would end us
            let_read(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


# === HTTP ====================================================================
# Requests, read more strictly than by waitress, whose own parser lets pass what hides one request in another: what two
# programs could understand in two ways is refused, and what is too large. The loop's thread feeds the parser what has
# come. And who asks, behind a proxy: a WSGI middleware, for the application's door and for the console's.
# Gives: Address, BadRequest, ForwardedHeaders, GateParser, is_within, plain_address
HEADER_BYTES = 16 << 10         # bytes of a request's line and headers, or of what surrounds the chunks of its body
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Z-]{1,32}) ([!\"$-~\x80-\xff]+) HTTP/(1\.[01])")
FIELD_NAME = re.compile(TOKEN + rb"{1,128}")
TEXT = bytes([9, *range(32, 127), *range(128, 256)])  # what may stand in a line
BLANK_LINES = re.compile(rb"\A(?:\r\n)+")
ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)")
HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,255}|\[([0-9A-Fa-f:.]{2,45})\])(?::([0-9]{0,5}))?")
DIGITS = re.compile("[0-9]+")
QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
CHUNK_LINE = rb"([0-9A-Fa-f]{1,16})(?:;%b+(?:=(?:%b+|%b))?)*\r\n" % (TOKEN, TOKEN, QUOTED)
FRAMING = re.compile(rb"\r\n(?:%b(\r\n)?)?" % CHUNK_LINE)  # the end of a chunk, the size of the next, the end of all
FORWARDED_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::[0-9]{1,5})?|([0-9A-Fa-f:.]+)")
FORWARDED = re.compile("HTTP_(?:X_FORWARDED.*|FORWARDED)")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def plain_address(text: str) -> Address:
    """An IP address; an IPv4 address written as an IPv6 one is the IPv4 address. Raises ValueError."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


class BadRequest(HealthCheckerError):
    """A request that is answered with `status` and nothing of its own text, and whose connection then ends."""

    def __init__(self, status: str = "400 Bad Request", why: str = "") -> None:
        super().__init__(why)
        self.status, self.body = status, (f"{status}: {why}\n" if why else f"{status}\n").encode()

    def to_response(self, _ident: str | None = None) -> Reply:
        """Status, headers and body, as waitress asks its own errors for them."""
        return self.status, [("Content-Type", "text/plain; charset=utf-8"), NO_STORE], self.body


@functools.lru_cache(1024)
def header_key(name: bytes) -> str:
    """A header's name as WSGI has it; "" for one with an underscore, which could pass for another."""
    if not FIELD_NAME.fullmatch(name):
        raise BadRequest
    return "" if b"_" in name else name.upper().replace(b"-", b"_").decode("ascii")


@functools.lru_cache(256)
def is_host(text: str) -> bool:
    """Whether a text may stand in a Host header: a name or an address, perhaps with a port."""
    match = HOST.fullmatch(text)
    if not match or int(match[2] or 0) > LAST_PORT:
        return False
    with contextlib.suppress(ValueError):
        return not match[1] or bool(ipaddress.IPv6Address(match[1]))
    return False


def nearest(words: str) -> str:
    """Of several values the last: the proxy has added it to what the client may have sent."""
    return words.rpartition(",")[2].strip(" \t")


def is_within(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


class ForwardedHeaders:
    """WSGI: what a proxy in `networks` says of its client counts, what anybody else says of it is dropped.

    The client is the last address in X-Forwarded-For that is not itself one of the proxies: what stands before it came
    from the client and may be anything. Of `Forwarded` nobody looks at, so it may be the client's own.
    """

    def __init__(self, app: WSGIApplication, networks: Iterable[str]) -> None:
        self._app, self._networks = app, tuple(map(ipaddress.ip_network, networks))

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if "FORWARDED" in "".join(environ):     # cheaper than to look at each
            said = {key: environ.pop(key) for key in list(environ) if FORWARDED.fullmatch(key)}
            try:
                if said and is_within(plain_address(environ["REMOTE_ADDR"].partition("%")[0]), self._networks):
                    self._believe(environ, said)
            except ValueError:
                environ[OUTCOME] = "bad"
                return respond(environ, start_response, ("400 Bad Request", [], b"400 Bad Request\n"))
        return self._app(environ, start_response)

    def _believe(self, environ: WSGIEnvironment, said: Mapping[str, str]) -> None:
        """Raises ValueError for what is malformed."""
        if "HTTP_X_FORWARDED_FOR" in said:
            for element in reversed(said["HTTP_X_FORWARDED_FOR"].split(",")):
                match = FORWARDED_ADDRESS.fullmatch(element.strip(" \t"))
                client = plain_address(match[1] or match[2] or match[3] if match else "")
                if not is_within(client, self._networks):
                    break
            environ["REMOTE_ADDR"] = environ["REMOTE_HOST"] = str(client)
        scheme = nearest(said.get("HTTP_X_FORWARDED_PROTO", environ["wsgi.url_scheme"])).lower()
        host = nearest(said.get("HTTP_X_FORWARDED_HOST", environ.get("HTTP_HOST", "localhost")))
        if scheme not in ("http", "https") or not is_host(host):
            raise ValueError("a proxy's word that is none")
        environ["wsgi.url_scheme"] = scheme
        if "HTTP_X_FORWARDED_HOST" in said:
            environ["HTTP_HOST"] = host


def too_large(limit: int) -> BadRequest:
    return BadRequest("413 Content Too Large", f"service.body_limit is {limit} bytes")


class ChunkedBody(ChunkedReceiver):    # type: ignore[misc]  # waitress carries no types
    """A chunked body, read strictly: no line ends but CR LF, no trailers, not much around the chunks."""

    def __init__(self, buf: OverflowableBuffer, limit: int) -> None:
        super().__init__(buf)
        self._limit, self._framing = limit, 0
        self._left = 0              # bytes of the chunk that are to come
        self._between = b"\r\n"     # what has come since the last chunk; the first one stands as behind another

    def received(self, data: bytes) -> int:
        """Takes what belongs to the body, and returns how many bytes that were; raises BadRequest."""
        at = 0
        while at < len(data) and not self.completed:
            if self._left:
                chunk = data[at:at + self._left]
                self.buf.append(chunk)
                self._left -= len(chunk)
                at += len(chunk)
            else:
                stop = data.find(b"\n", at) + 1 or len(data)
                self._control(data[at:stop])
                at = stop
        return at

    def _control(self, part: bytes) -> None:
        """A line, or a part of one, that is not the body's own."""
        self._between += part
        self._framing += len(part)
        if self._framing > HEADER_BYTES + len(self):
            raise BadRequest
        if not part.endswith(b"\n"):
            return
        match = FRAMING.fullmatch(self._between)
        if not match:
            raise BadRequest
        self._left = int(match[1] or b"0", 16)
        if len(self) + self._left > self._limit:
            raise too_large(self._limit)
        if self._left:
            self._between = b""
        self.completed = match[2] is not None


class GateParser(HTTPRequestParser):    # type: ignore[misc]  # waitress carries no types
    """One request, read strictly (RFC 9112, section 11.2)."""

    version = "1.1"     # of the answer to a request that does not tell its own
    command = path = query = request_uri = ""
    headers: dict[str, str]
    header_plus: bytes      # of the headers what has come so far
    handler: Way | None = None      # what answers it

    def __init__(self, adj: Adjustments) -> None:
        super().__init__(adj)
        self.url_scheme = adj.url_scheme
        self.begun = time.monotonic()       # the headers, later the body

    def received(self, data: bytes) -> int:
        """Takes what belongs to this request, and returns how many bytes that were."""
        if self.completed:
            return 0
        try:
            return self._more_body(data) if self.headers_finished else self._more_head(data)
        except BadRequest as refused:
            self.refuse(refused)
        except OSError:     # there is no room for the temporary file of a large body
            self.refuse(BadRequest("503 Service Unavailable"))
        return len(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):      # a full disk does not take the rest of the temporary file
            super().close()

    def refuse(self, error: BadRequest) -> None:
        self.error, self.completed, self.expect_continue = error, True, False
        self.headers = {}

    def _more_head(self, data: bytes) -> int:
        head = self.header_plus + data
        if head.startswith(b"\r"):      # blank lines before a request are an old client's
            head = BLANK_LINES.sub(b"", head)
        end = head.find(b"\r\n\r\n")
        if (end if end >= 0 else len(head) - 3) > HEADER_BYTES:     # three bytes of the end may be there already
            raise BadRequest("431 Request Header Fields Too Large")
        if end < 0:
            self._lines(head.removesuffix(b"\r"))
            self.header_plus = head
            return len(data)
        self.header_plus, self.headers_finished = b"", True
        self.parse_header(head[:end])
        self.completed = self.body_rcv is None
        if not self.completed:
            self.begun = time.monotonic()
            self.expect_continue = self.headers.get("EXPECT", "").lower() == "100-continue" and self.version == "1.1"
        return len(data) - (len(head) - end - 4)

    def _more_body(self, data: bytes) -> int:
        consumed: int = self.body_rcv.received(data)
        self.completed = self.body_rcv.completed
        if self.completed and self.chunked:
            self.headers["CONTENT_LENGTH"] = str(len(self.body_rcv))
        return consumed

    @staticmethod
    def _lines(head: bytes) -> list[bytes]:
        """Raises BadRequest where a control character or half of a line's end is in them."""
        lines = head.split(b"\r\n")
        if head.translate(None, TEXT) != b"\r\n" * (len(lines) - 1):
            raise BadRequest
        return lines

    def parse_header(self, header_plus: bytes) -> None:
        """The request line and the headers, without the empty line after them; raises BadRequest."""
        first, *fields = self._lines(header_plus)
        request = REQUEST_LINE.fullmatch(first)
        if not request:
            raise BadRequest
        self.command, self.version = request[1].decode(), request[3].decode()
        headers = self.headers
        for field in fields:
            name, colon, value = field.partition(b":")
            key = header_key(name)
            if not colon:
                raise BadRequest
            text = value.strip(b" \t").decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        headers.pop("", None)
        self._read_host()
        self._read_target(request[2])
        self._read_framing()

    def _read_host(self) -> None:
        """A second Host header stands in the first one's value by now, after a comma."""
        host = self.headers.get("HOST")
        if self.version == "1.1" if host is None else not is_host(host):
            raise BadRequest
        connection = self.headers.get("CONNECTION", "")
        if "," in connection:       # waitress knows one option only
            options = {option.strip().lower() for option in connection.split(",")}
            self.headers["CONNECTION"] = next((known for known in ("close", "keep-alive") if known in options), "")

    def _read_target(self, target: bytes) -> None:
        """The path and the query; the host of an absolute target counts, not that of the header (RFC 9112, 3.2.2)."""
        self.request_uri = target.decode("latin-1")
        if not target.startswith(b"/") and (target, self.command) != (b"*", "OPTIONS"):
            absolute = ABSOLUTE.fullmatch(target)
            if not absolute or not is_host(absolute[1].decode("latin-1")):
                raise BadRequest
            self.headers["HOST"] = absolute[1].decode("ascii")
            target = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
        path, _, query = target.partition(b"?")
        self.path, self.query = unquote_to_bytes(path).decode("latin-1"), query.decode("latin-1")

    def _read_framing(self) -> None:
        """How the body ends; two ways of telling it, or one told twice, are refused."""
        limit, headers = self.adj.max_request_body_size, self.headers
        coding, length = headers.pop("TRANSFER_ENCODING", None), headers.get("CONTENT_LENGTH")
        if coding is not None:
            if coding.lower() != "chunked" or length is not None or self.version == "1.0":
                raise BadRequest
            self.chunked = True
            self.body_rcv = ChunkedBody(OverflowableBuffer(self.adj.inbuf_overflow), limit)
        elif length is not None:
            if not DIGITS.fullmatch(length):
                raise BadRequest
            if len(length) > 16 or int(length) > limit:
                raise too_large(limit)
            if int(length):
                self.body_rcv = FixedStreamReceiver(int(length), OverflowableBuffer(self.adj.inbuf_overflow))


# === Serve ===================================================================
# waitress on our loop, in a worker: what cannot block runs on the loop, the application in a pool (with `threads: 0` on
# the loop, too), and what a turn has made is sent together. Which thread may touch what:
#   the loop's  sockets, selector, active_channels, sending, the request that is being read; it alone closes a channel
#   the pool's  the task of requests[0] and what it writes, under outbuf_lock; of the loop only `touch`
#   both        requests under requests_lock, waited_for and touched in single steps, counters under their lock
# Another waitress fails first in tests/test_gate.py, which names every internal of it that is used here.
# Gives: GateServer, BACKLOG, BODY_TIME, CONNECTIONS_MAX, HEADER_TIME
HEADER_TIME = 5.0               # seconds from the first byte of a request to the end of its headers
BODY_TIME = 30.0                # seconds from there to the end of its body
FIRST_BYTE = 15.0               # seconds until a new connection sends something
KEEP_ALIVE = 75.0               # seconds a connection is kept for another request; proxies keep theirs for 60
IDLE_PRESSED = 2.0              # seconds instead of both while no further connection can be accepted
STALL_TIMEOUT = 60.0            # seconds in which a client has to take some of its answer
READER_PAUSE = 0.5              # seconds instead of that while too much waits to be sent; the more, the less
LINGER_TIME = 3.0               # seconds for a refused client to take its answer
LINGER_BYTES = 16 << 20         # bytes of a refused request that are read and thrown away meanwhile
CONNECTION_SWEEP = 1.0          # seconds between two looks at all connections
ACCEPTS_PER_TURN = 64           # connections accepted in one turn of the loop
HEAD_START = 0.1                # seconds in which less busy workers may take a connection before a busier one does
ACCEPT_PAUSE = 0.5              # seconds without accepting when the system has no descriptor left
CONNECTIONS_MAX = 100_000       # client connections, where the system knows no limit
BACKLOG = 1024                  # connections that wait to be accepted
POOL_BUFFER = 16 << 20          # bytes of a response that wait for a slow client before its pool thread does
SEND_BYTES = 1 << 16            # bytes of a response that are gathered before they are sent
SHORT_TURN = 0.01               # seconds that the loop waits at most while something is to be looked at again
LAST_ASK = 0.25                 # seconds in which clients that were answered just before may still ask then


class Pool(ThreadedTaskDispatcher):     # type: ignore[misc]  # waitress carries no types
    """Threads that answer requests."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.set_thread_count(threads)
        while self.active_count:        # until they are idle, or the first burst would be refused
            time.sleep(0.001)

    @property
    def waiting(self) -> int:
        """Requests that no thread is free for."""
        with self.lock:
            return max(0, len(self.queue) + int(self.active_count) - len(self.threads))

    def add_task(self, task: HTTPChannel) -> None:
        with self.lock:     # as waitress, without a line in the log for each request that waits
            self.queue.append(task)
            self.queue_cv.notify()


class GateTask(WSGITask):    # type: ignore[misc]  # waitress carries no types
    """One request; an application cannot end the service, and a service that ends says so to its clients."""

    def get_environment(self) -> WSGIEnvironment:
        environ: WSGIEnvironment = super().get_environment()
        environ.update(self.channel.server.environment)
        environ[HANDLER] = self.request.handler
        if self.is_head:
            del environ["wsgi.file_wrapper"]    # such a file would not go through `write`
        return environ

    @property
    def is_head(self) -> bool:
        """Whether the answer has no body, whatever the application makes."""
        return cast(bool, self.request.command == "HEAD")

    def write(self, data: bytes) -> None:
        super().write(b"" if self.is_head else data)
        if data:
            self.channel.server.loop.touch(self.channel)

    def finish(self) -> None:
        if self.is_head:
            self.chunked_response = False   # what is not sent does not end either
        super().finish()

    def set_close_on_finish(self) -> None:
        """waitress takes a 204 without Content-Length for one of unknown length."""
        wanted = self.request.headers.get("CONNECTION", "").lower() == "close"
        if wanted or self.has_body or self.wrote_header or self.version == "1.0":
            super().set_close_on_finish()

    def service(self) -> None:
        outcome = "cut"
        try:
            super().service()
            outcome = self.environ.get(OUTCOME)
            if outcome not in ROWS:
                outcome = STATUS_OUTCOMES.get(self.status[:1], "5xx")
        except BaseException as error:      # SystemExit and the like would end the loop or leave the client waiting
            if not self.wrote_header:
                outcome = ""        # waitress answers 500 by a GateErrorTask
            elif isinstance(error, OSError):    # perhaps of a temporary file: how much waits to be sent is not known
                self.channel.will_close = True
            if isinstance(error, Exception):
                raise
            raise RuntimeError(f"the application raised {type(error).__name__}") from error
        finally:
            if outcome:
                self.channel.served(outcome)

    def build_response_header(self) -> bytes:
        channel = self.channel
        if channel.server.gate.draining:
            with channel.requests_lock:
                if len(channel.requests) == 1 and channel.request is None:  # nothing has come behind it
                    self.request.headers["CONNECTION"] = "close"
        return cast(bytes, super().build_response_header())


class GateErrorTask(ErrorTask):    # type: ignore[misc]  # waitress carries no types
    """The last answer on a connection: to a request that the parser refused, or whose application failed."""

    def service(self) -> None:
        error, channel = self.request.error, self.channel
        channel.lingers = True
        try:
            super().service()
        finally:
            channel.served("5xx" if isinstance(error, InternalServerError) else "bad")
        if str(error).startswith("service."):
            channel.server.complain(f"a request was refused, for {error}")


class GateChannel(HTTPChannel):    # type: ignore[misc]  # waitress carries no types
    """A client's connection: it ends when the client is too slow in asking, or in taking its answer."""

    task_class, error_task_class, parser_class = GateTask, GateErrorTask, GateParser
    will_close: bool
    close_when_flushed: bool
    began = 0.0             # when the request was complete
    held = False            # its next request waits until enough of the answers before it is taken
    watched = 0             # what the loop waits for on it, selectors' events
    touched = False         # the loop is to look at it
    taken_at = 0.0          # when the client last took something, or was first to
    lingers = False         # the answer is the last; what still comes is thrown away
    _discarded = 0          # bytes of that
    _lingers_until = math.inf

    def __init__(self, server: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(server, *arguments, **named)
        self.sendbuf_len = SEND_BYTES       # of what waits in a file, that much is read for each try to send
        self._seen, self._since = self.last_activity, server.clock()    # the wall clock only as a mark: it may jump

    def add_channel(self, map: Any = None) -> None:     # waitress's name
        super().add_channel(map)
        self.sockets = [self.socket]
        self.server.loop.watch(self, selectors.EVENT_READ)
        self.server.tally.accepted()

    def del_channel(self, map: Any = None) -> None:     # waitress's name
        self.server.loop.watch(self, 0)
        super().del_channel(map)

    def received(self, data: bytes) -> bool:
        if not self.lingers:
            return bool(super().received(data))
        self._discarded += len(data)
        self.will_close = self.will_close or self._discarded > LINGER_BYTES
        return False

    def service(self) -> None:
        try:
            super().service()
        except Exception:   # what waitress did not foresee ends neither thread nor loop, and lets no client wait
            log.exception("a request could not be answered")
            self.cancel()
        request = self.request
        if request is not None:
            request.begun = self.server.clock()     # it was not read meanwhile
        if self.writable() or self.requests or not self.watched & selectors.EVENT_READ:
            self.server.loop.touch(self)

    def send(self, data: bytes, do_close: bool = True) -> int:
        if not data:
            raise BrokenPipeError("a file that is sent was cut")
        sent = int(super().send(data, do_close))
        if sent:
            self.taken_at = self.server.clock()
        return sent

    def handle_write(self) -> None:
        """As waitress, but what a task has written so far is sent, however little it is, and never by two at once."""
        self._flush_exception(self._flush_some_if_lockable)
        if self.close_when_flushed and not self.total_outbufs_len and self.connected:
            self.close_when_flushed, self.will_close = False, not self.lingers
            if self.lingers:    # a refused client: closing on bytes that it still sends would destroy the answer
                self._lingers_until = self.server.clock() + LINGER_TIME
                try:
                    self.socket.shutdown(socket.SHUT_WR)
                except OSError:
                    self.will_close = True
        if self.will_close:
            self.handle_close()

    def handle_close(self) -> None:
        if self.server.loop.is_here:
            super().handle_close()
            if self.request is not None:
                self.request.close()
        else:       # the loop may be at it
            self.will_close = True
            self.server.loop.touch(self)

    def _flush_outbufs_below_high_watermark(self) -> None:
        """Waits for a slow client, but never on the loop: nobody else would send what it waits for."""
        if self.total_outbufs_len > self.adj.outbuf_high_watermark and not self.server.loop.is_here:
            self.server.loop.touch(self)
            self.server.waited_for.add(self)
            super()._flush_outbufs_below_high_watermark()
            self.server.waited_for.discard(self)

    def served(self, outcome: str) -> None:
        """A request is answered."""
        self.server.tally.request(outcome, time.perf_counter() - self.began)

    def attend(self, events: int) -> None:
        """Does what the client is ready for, then has the loop wait for what is wanted now; on the loop.

        While an answer is made, it goes on waiting for the client: it hardly ever sends anything, and no thread has
        to wake the loop after an answer.
        """
        loop = self.server.loop
        if events & selectors.EVENT_READ:
            if self.readable():
                wasyncore.read(self)
            else:       # it sends ahead, and has to wait
                loop.watch(self, self.watched & ~selectors.EVENT_READ)
        if events & selectors.EVENT_WRITE and self.socket and self.writable():
            wasyncore.write(self)
        if self.held and self.socket and self.total_outbufs_len <= self.adj.outbuf_high_watermark:
            self.held = False
            self.server.add_task(self)
        if self.socket:
            reading = selectors.EVENT_READ if self.readable() else self.watched & selectors.EVENT_READ
            loop.watch(self, selectors.EVENT_WRITE if self.writable() else reading)

    def sweep(self, now: float, pressed: bool) -> None:
        """Ends the connection if something takes too long; on the loop, about once in CONNECTION_SWEEP."""
        if self.last_activity != self._seen:
            self._seen, self._since = self.last_activity, now
        request = self.request
        if self.requests or self.total_outbufs_len:
            if request is not None:
                request.begun = now     # it is not read meanwhile
            if self.total_outbufs_len and now - self._since > STALL_TIMEOUT:
                self.handle_close()
        elif request is not None and not self.lingers and (request.header_plus or request.headers_finished):
            if now - request.begun > (BODY_TIME if request.headers_finished else HEADER_TIME):
                self._give_up(request)
        else:
            patience = KEEP_ALIVE if self.began or request else FIRST_BYTE
            idle = now - (request.begun if request else self._since)
            if now > self._lingers_until or idle > (IDLE_PRESSED if pressed else patience):
                self.handle_close()

    def _give_up(self, request: GateParser) -> None:
        with self.requests_lock:
            self.request = None
            request.refuse(BadRequest("408 Request Timeout"))
            self.requests.append(request)
        self.began = time.perf_counter()
        self.service()


class Loop:
    """What the loop waits for on each connection: remembered, for waitress asks each in every turn."""

    def __init__(self, selector: selectors.BaseSelector, trigger: Any) -> None:
        self._selector, self._trigger = selector, trigger
        selector.register(trigger._fileno, selectors.EVENT_READ, trigger)
        self.sending: set[GateChannel] = set()      # what waits for clients to take more
        self._touched: collections.deque[GateChannel] = collections.deque()
        self._awake = False     # the loop looks at what is touched before it waits
        self.thread = threading.get_ident()

    @property
    def is_here(self) -> bool:
        """Whether it is the loop's thread that asks."""
        return threading.get_ident() == self.thread

    def touch(self, channel: GateChannel) -> None:
        """Has the loop look at a channel: it has something to send, or to be read again."""
        if not channel.touched:
            channel.touched = True
            self._touched.append(channel)
            if not self._awake and not self.is_here:
                self._awake = True
                self._trigger.pull_trigger()

    def watch(self, channel: Any, events: int) -> None:
        """Has the loop wait for `events` on a channel; 0 for none."""
        if events == channel.watched:
            return
        before, channel.watched = channel.watched, events
        try:
            for sock in channel.sockets:
                if not before:
                    self._selector.register(sock, events, channel)
                elif events:
                    self._selector.modify(sock, events, channel)
                else:
                    self._selector.unregister(sock)
        except OSError:
            self._forget(channel)
        if channel.watched & selectors.EVENT_WRITE:
            channel.taken_at = channel.server.clock()
            self.sending.add(channel)
        else:
            self.sending.discard(channel)

    def _forget(self, channel: Any) -> None:
        """The system lacks memory: this connection ends, not all; a door is tried again."""
        channel.watched = 0
        for sock in channel.sockets:
            with contextlib.suppress(KeyError):     # that one was not registered
                self._selector.unregister(sock)
        if isinstance(channel, GateChannel):
            channel.will_close = True
            self.touch(channel)

    def attend(self) -> None:
        """Looks at what was touched."""
        while self._touched:
            channel = self._touched.popleft()
            channel.touched = False     # first: what comes now touches it again
            channel.attend(selectors.EVENT_WRITE)

    def wait(self, seconds: float) -> None:
        """Until something is ready or touched, and does what it is ready for."""
        self._awake = False     # from here on the turn may miss what another thread leaves to it
        found = self._selector.select(0 if self._touched else seconds)
        self._awake = True
        for key, events in found:
            if isinstance(key.data, GateChannel):
                key.data.attend(events)
            else:
                wasyncore.read(key.data)


class GateServer(TcpWSGIServer):    # type: ignore[misc]  # waitress carries no types
    """waitress on bound sockets, with our loop: serves until `stop`, then drains."""

    channel_class = GateChannel
    selector_class: type[selectors.BaseSelector] = selectors.DefaultSelector
    clock: Callable[[], float] = staticmethod(time.monotonic)
    accepting: bool
    watched = 0         # what the loop waits for on the listening socket
    _next_sweep = _accepts_at = _yields_until = _next_complaint = 0.0   # by the clock
    _pressed = False    # since the last sweep there was no room
    _alone = False      # in this turn the others do not come before it
    _left = False       # a whole crowd was taken: more may wait

    def __init__(self, gate: Gate, socks: Sequence[socket.socket], service: ServiceSettings, connections: int,
                 tally: RequestCounters) -> None:
        threads = service.app_threads
        adjustments = Adjustments(
            threads=max(1, threads), connection_limit=connections, ident=None, backlog=BACKLOG,
            clear_untrusted_proxy_headers=False, max_request_body_size=service.body_limit,
            outbuf_high_watermark=min(POOL_BUFFER, service.send_buffer // 2))
        adjustments.send_bytes = SEND_BYTES
        self.gate, self._service, self._ready = gate, service, collections.deque[GateChannel]()
        self.environment = {"SERVER_SOFTWARE": "HealthChecker", "wsgi.multithread": threads > 1,
                            "wsgi.multiprocess": service.worker_count > 1}
        self.tally = tally
        self.tally.hold(0)      # it is there for the others, who would take all before its first turn
        self.waited_for: set[GateChannel] = set()       # by a thread each
        self._ends = self._idle_end = math.inf
        self.pool = Pool(threads)
        self.sockets, sock = socks, socks[0]    # several where its name has several addresses
        sockinfo = (sock.family, sock.type, sock.proto, sock.getsockname())
        super().__init__(ForwardedHeaders(gate, service.trusted_proxy), {}, True, sock, dispatcher=self.pool,
                         adj=adjustments, sockinfo=sockinfo, bind_socket=False)
        self._selector = self.selector_class()
        self.loop = Loop(self._selector, self.trigger)

    def set_reuse_addr(self) -> None:
        """Nothing: the socket is bound, and on Windows the option would let another server share its port."""

    def pull_trigger(self) -> None:
        """Nothing: waitress wakes its loop after each answer; ours is told by `touch` of what it is needed for."""

    def add_task(self, channel: GateChannel) -> None:
        """Leaves what cannot block, or has no room to wait, to the loop's own thread, and the rest to a pool: the
        hand-over of the interpreter lock costs more than most answers. Called with the channel's lock held."""
        request, gate = channel.requests[0], self.gate
        channel.began = time.perf_counter()
        if request.error is None:
            path = request.path     # of several slashes before it waitress makes one
            request.handler = gate.route("/" + path.lstrip("/") if path.startswith("//") else path)
            handler, leases = request.handler
            if handler == gate.admit and self._service.app_threads:
                if self.pool.waiting < self._service.queue:
                    self.pool.add_task(channel)
                    return
                request.handler = functools.partial(gate.refuse, outcome="shed"), leases
        channel.held = channel.total_outbufs_len > self.adj.outbuf_high_watermark   # what nobody takes is not made
        if not channel.held:
            self._ready.append(channel)

    def readable(self) -> bool:
        """Whether to look for new connections; asked in every turn of the loop."""
        now = self.clock()
        if now >= self._next_sweep:
            self._next_sweep = now + CONNECTION_SWEEP
            pressed, self._pressed = self._pressed, False
            for channel in list(self.active_channels.values()):
                channel.sweep(now, pressed)
        if len(self._map) >= self.adj.connection_limit:
            self._pressed = True
            self.complain("as many connections as allowed are open; idle ones are closed sooner")
            return False
        yields = now < self._yields_until and self.tally.ahead
        return bool(self.accepting) and now >= self._accepts_at and not yields

    def handle_accept(self) -> None:
        """Takes a crowd, for one per turn starves it; while it is ahead of the others, they have HEAD_START to come."""
        for _ in range(ACCEPTS_PER_TURN if self.accepting else BACKLOG):
            if self.accepting and self.tally.ahead and not self._alone:
                self._yields_until = self.clock() + HEAD_START
                return
            held = len(self.active_channels)
            super().handle_accept()
            self.tally.hold(len(self.active_channels))
            if len(self.active_channels) == held:
                return
        self._left = True

    def accept(self) -> tuple[socket.socket, Any] | None:
        """None when nobody waits, when there is no room, and when the system refuses: then it has a moment of peace."""
        if len(self._map) >= self.adj.connection_limit:
            return None
        try:
            for sock in self.sockets:
                self.socket = sock
                if (found := super().accept()) is not None:
                    return cast("tuple[socket.socket, Any]", found)
        except ConnectionResetError:    # on Windows: this client has gone already
            pass
        except OSError as error:
            self._accepts_at, self._pressed = self.clock() + ACCEPT_PAUSE, True
            self.complain(f"a connection cannot be accepted: {error.strerror}; idle ones are closed sooner")
        return None

    def complain(self, reason: str) -> None:
        """Of trouble that clients make, once in COMPLAINT_INTERVAL."""
        if self.clock() >= self._next_complaint:
            self._next_complaint = self.clock() + COMPLAINT_INTERVAL
            log.warning("%s (%d connections)", reason, len(self.active_channels))

    def stop(self, drain: float = math.inf) -> None:
        """Ends `serve` once the requests in flight are answered, within `drain` and `service.drain` seconds; safe in a
        signal handler."""
        if not self.gate.draining:
            self.gate.draining = True
            self._ends = time.monotonic() + min(drain, self._service.drain)
            with contextlib.suppress(OSError):      # the loop may have ended meanwhile
                self.trigger.pull_trigger()

    def serve(self) -> None:
        """The loop."""
        self.loop.thread = threading.get_ident()
        with contextlib.closing(self._selector):
            while not self._drained():      # asked right after all that has come was read
                self._turn()
            self._note_cut()
            self.pool.shutdown(timeout=POOL_END)
            wasyncore.close_all(self._map)

    def _turn(self) -> None:
        """Answers what has come, sends what is to be sent, and waits."""
        for _ in range(len(self._ready)):       # who has sent ahead takes turns with the others
            self._ready.popleft().service()
        self.loop.attend()
        self.tally.hold(len(self.active_channels))
        self.tally.turn(self.pool.waiting)
        now = self.clock()      # before it is asked whether to accept: a pause that ends in between ends no turn later
        waited, self._left = not self.watched or (self._left and self._alone), False
        self.loop.watch(self, selectors.EVENT_READ if self.readable() else 0)
        self._alone = bool(self.watched) and waited and self.tally.ahead    # who waits now, waited for others in vain
        slow = self.loop.sending and self._cut_slow_readers(now)
        hurried = slow or self.gate.draining or now < max(self._accepts_at, self._yields_until)
        self.loop.wait(0 if self._ready or self._alone else SHORT_TURN if hurried else self.adj.asyncore_loop_timeout)

    def _cut_slow_readers(self, now: float) -> bool:
        """Where more than `service.send_buffer` waits to be sent, or half of the pool waits for clients while requests
        wait for it, cuts those who have not taken anything for longest; whether to look again soon."""
        sending, limit = self.loop.sending, self._service.send_buffer
        waits, blocked = sum(channel.total_outbufs_len for channel in sending), list(self.waited_for)
        queued, threads = self.pool.waiting, self.adj.threads
        starved = queued > 0 and 2 * len(blocked) >= threads
        if waits <= limit and not starved:
            return False
        readers = sorted(blocked if starved else sending, key=lambda channel: channel.taken_at)
        spared = (threads - 1) // 2 if starved else 1       # so that a lone reader gets all of its answer
        for channel in readers[:max(0, len(readers) - spared)]:
            pause = READER_PAUSE / max(1.0, waits / limit, queued / threads)
            if now - channel.taken_at < pause or not (starved or waits > limit):
                break
            waits -= channel.total_outbufs_len
            channel.handle_close()
            self.complain("answers that their clients hardly take are cut, see service.send_buffer")
        return True

    def _drained(self) -> bool:
        """Once stopping: accepts nobody, soon closes idle connections; True when none is left."""
        if not self.gate.draining:
            return False
        if self.accepting:      # who waits to be accepted has perhaps sent a request already
            self.accepting = False
            self.loop.watch(self, 0)
            self.del_channel()
            self.handle_accept()
            for sock in self.sockets:
                sock.close()
            self._idle_end = time.monotonic() + LAST_ASK
            return False
        now = time.monotonic()
        for channel in list(self.active_channels.values()) if now > self._idle_end else ():
            if not (channel.requests or channel.request or channel.total_outbufs_len or channel.lingers):
                channel.handle_close()
        return not self.active_channels or now > self._ends

    def _note_cut(self) -> None:
        """Tells whose requests the end does not wait for."""
        cut = [channel for channel in self.active_channels.values() if channel.requests]
        for channel in cut:
            channel.served("cut")
        if cut:
            drain = self._service.drain
            log.warning("requests cut, for they took longer than service.drain, %g s: %d", drain, len(cut))


# === Workers =================================================================
# The serving processes. The main process binds the doors, starts, watches, replaces and ends the workers (Supervisor,
# with a WorkerProcess each); in each of them a Worker serves. It runs the customer's code: it is given sockets, lease,
# counters, settings and a pipe, and no database, key, inventory or session. On the pipe it says `ready` or `failed` and
# what is to be logged, in JSON; it hears stop, or end of file when the main process died.
# That they may serve is a flag in shared memory, set once the start can no longer fail; a replacement finds it set: if
# each served as soon as it is ready, a start that fails would have served somebody.
# Gives: ENDINGS, HANGUPS, LogFile, Supervisor, bound_address, handed_over, keep_out_of_collections, listen,
#   set_up_logging, try_app
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)      # this machine does not have the address, or its family
LISTEN_FAULTS = {
    errno.EADDRINUSE: "another program uses that port; stop it, or write another port at",
    errno.EADDRNOTAVAIL: "this machine has no such address; write one that it has, such as 127.0.0.1, or 0.0.0.0 at",
    errno.EACCES: "the port needs rights that this account does not have; write one above 1023 at"}
BIND_OPTION = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)   # the former on Windows
PORT_WAIT = 5.0                 # seconds for a port to become free: workers of a killed service hold theirs a moment
READY_INTERVAL = 0.02           # seconds between two looks whether to serve
ORPHAN_DRAIN = 0.5              # seconds for requests in flight of a worker whose main process died
LAST_WORDS = 0.2                # seconds in which what a dead worker said is read
SUPERVISOR_INTERVAL = 0.05      # seconds between two looks at the worker processes
STANDSTILL = 1.0                # seconds between two looks that mean that this process, or the machine, stood still
HANG_TIME = 10.0                # seconds without a turn of its loop after which a worker is replaced
HANG_SPACING = 2.0              # seconds between two such replacements, so that never all are gone at once
START_NEWS = 5.0                # seconds between two lines about a start that takes long
WORKER_LIFE = 10.0              # seconds of serving after which a worker's end is no sign that it can never run
WORKER_PAUSES = (0.0, 0.5, 1, 2, 5, 10, 30)  # seconds before the 1st, 2nd, … replacement of short-lived workers
WORKER_END = 2.0                # seconds between the end of draining and the end of the process
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]
HANGUPS = [getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name)]      # Windows has none


# --- the doors ---
@functools.cache
def handed_over() -> list[socket.socket]:
    """The listening sockets that systemd has for this process (sd_listen_fds(3)). They outlive it: clients of a restart
    wait, and nobody is refused."""
    count = int(os.environ["LISTEN_FDS"]) if os.environ.get("LISTEN_PID") == str(os.getpid()) else 0
    socks = [socket.socket(fileno=number) for number in range(3, 3 + count)]
    for sock in socks:
        sock.set_inheritable(False)
        sock.listen(BACKLOG)
    return socks


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on each address of `host` that this machine has, on one port, or those that systemd has bound
    to any of them. Raises OSError, UnicodeError."""
    answers: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = sorted({(family, address) for family, _, _, _, address in answers})     # IPv4 first
    wanted = {address[:2] for _, address in addresses}
    if given := [sock for sock in handed_over() if sock.getsockname()[:2] in wanted]:
        return given
    socks, absent = [], OSError()
    with contextlib.ExitStack() as bound:
        for family, (name, _, *rest) in addresses:
            try:
                with contextlib.ExitStack() as stack:
                    sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    sock.setsockopt(socket.SOL_SOCKET, BIND_OPTION, 1)
                    if family == socket.AF_INET6 and len(addresses) > 1:    # IPv4 has a socket of its own
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    sock.bind((name, port, *rest))
                    sock.listen(BACKLOG)
                    bound.push(stack.pop_all())
                socks.append(sock)
                port = sock.getsockname()[1]    # for 0 the system has chosen one
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                absent = error
        if not socks:
            raise absent
        bound.pop_all()
    return socks


def listen(setting: str, value: str, wait: float = PORT_WAIT) -> list[socket.socket]:
    """Binds the address:port that `setting` of the inventory names, a name on all its addresses, or takes what systemd
    has bound; one in use may become free for `wait` seconds. Raises UsageError."""
    host, _, port = value.rpartition(":")
    ends = time.monotonic() + wait
    while True:
        try:
            return bind(host.strip("[]"), int(port))
        except (OSError, UnicodeError) as error:
            number = getattr(error, "errno", 0)
            if number != errno.EADDRINUSE or time.monotonic() > ends:
                reason = f"{one_line(getattr(error, 'strerror', '') or 'not a host name')}; write another at"
                raise UsageError(f"cannot listen on {value}: {LISTEN_FAULTS.get(number, reason)} {setting}") from error
        time.sleep(SUPERVISOR_INTERVAL)


def bound_address(value: str, socks: Sequence[socket.socket]) -> str:
    """address:port as the inventory has it, with the port that the system chose for 0."""
    return f"{value.rpartition(':')[0]}:{socks[0].getsockname()[1]}" if socks else value


def connection_limit() -> int:
    """Connections that may be served at once."""
    if sys.platform == "win32":
        return 400      # select takes 512 sockets there
    return int(max(100, min(CONNECTIONS_MAX, allow_files() - 100)))     # the application needs some


# --- the application ---
def builtin_app(service: ServiceSettings) -> WSGIApplication:
    """The page shown behind the gate until `service.app` names an application."""
    app = flask.Flask("healthchecker.builtin")
    console = "" if service.console == "off" else (
        f' Operators: the <a href="http://{service.console}/-/">console</a>.')
    app.add_url_rule("/", "welcome", lambda: WELCOME.format(console=console))
    return app


def application_fault(app: Any) -> str:
    """Why something cannot be the WSGI application; empty where it can, as far as its signature tells."""
    if not callable(app):
        return "is not callable"
    if inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(getattr(app, "__call__", None)):  # noqa: B004
        return "is an ASGI application, and the gate serves WSGI: wrap it, for example with a2wsgi.ASGIMiddleware"
    try:
        parameters = inspect.signature(app).parameters.values()
    except (TypeError, ValueError):     # written in C
        return ""
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    needed = [each for each in places if each.default is each.empty]
    if any(each.kind is each.VAR_POSITIONAL for each in parameters) or 0 < len(needed) <= 2 <= len(places):
        return ""
    return "does not take (environ, start_response)" + ("" if needed else ": for a factory write `module:factory()`")


def load_app(name: str, folder: Path) -> WSGIApplication:
    """Imports `module:callable`, or calls `module:factory()`, with `folder` first on the path; raises UsageError."""
    module, _, attribute = name.partition(":")
    if str(folder) not in sys.path[:1]:
        sys.path.insert(0, str(folder))
    try:
        app: Any = importlib.import_module(module)
        for part in attribute.removesuffix("()").split("."):
            app = getattr(app, part)
        if attribute.endswith("()"):
            app = app()
        fault = application_fault(app)
    except (Exception, SystemExit) as error:    # the user's own code may raise anything
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise UsageError(f"service.app {name} cannot be imported: {reason}") from error
    if fault:
        raise UsageError(f"service.app {name} {fault}")
    return cast("WSGIApplication", app)


def try_app(name: str, folder: Path) -> None:
    """Loads the application and ends the process; of what goes wrong in it, the frames that are its own."""
    code = 0
    try:
        load_app(name, folder)
    except UsageError as error:
        if cause := error.__cause__:
            trace = cause.__traceback__
            while trace and trace.tb_frame.f_code.co_filename.startswith((__file__, "<frozen", os.path.dirname(
                    importlib.__file__))):
                trace = trace.tb_next
            traceback.print_exception(cause.with_traceback(trace))
        print(error, file=sys.stderr)
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)      # whatever the application left running


# --- the log ---
def printable(text: str) -> str:
    """`text` with a backslash sequence for what could end or hide a line."""
    return text if text.isprintable() else "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class LineFormatter(logging.Formatter):
    """A record is one line, whatever a client sent; of a traceback each line is indented, so that it is no record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        first, *trace = super().format(record).split("\n")
        return "\n".join([first, *(f"    {printable(line)}" for line in trace)])


class LogFile(logging.handlers.RotatingFileHandler):
    """The log file; it rotates by size. Raises UsageError."""

    _complains_mono = 0.0
    stale = False       # set from a signal handler, which may interrupt a write: somebody has moved the file away

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"service.log_file {path} cannot be written: {error.strerror}") from error

    def _open(self) -> io.TextIOWrapper:
        is_new = not os.path.exists(self.baseFilename)
        stream = super()._open()
        if is_new:
            give(stream.fileno(), Path(self.baseFilename).parent)
        return stream

    def handleError(self, record: logging.LogRecord) -> None:
        """The console has the line already; that the file has not is said once in COMPLAINT_INTERVAL."""
        del record
        if time.monotonic() >= self._complains_mono:
            self._complains_mono = time.monotonic() + COMPLAINT_INTERVAL
            print(f"{self.baseFilename} cannot be written: {one_line(str(sys.exc_info()[1]))}", file=sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        if self.stale:
            self.stale = False
            self.close()    # and it is opened again
        super().emit(record)


def set_up_logging(log_file: Path | None) -> None:
    """One line an event to the console, and to a rotating file where the inventory names one."""
    handlers: list[logging.Handler] = [logging.StreamHandler(), *([LogFile(log_file)] if log_file else [])]
    for handler in handlers:
        handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


class MessagePipe(logging.handlers.QueueHandler):
    """What a worker says and logs. A thread sends, so that nobody waits for the main process."""

    queue: queue.SimpleQueue[bytes]

    def __init__(self, pipe: PipeConnection) -> None:
        super().__init__(queue.SimpleQueue())
        self.setFormatter(logging.Formatter("%(message)s"))     # what follows the message is the traceback
        self._pipe = pipe
        self._thread = threading.Thread(target=self._send, name="pipe", daemon=True)
        self._thread.start()

    def prepare(self, record: logging.LogRecord) -> bytes:
        trace = self.format(record)[len(record.message) + 1:]
        return json.dumps(["log", record.levelno, record.message, trace]).encode()

    def finish(self, wait: float) -> None:
        """Ends the thread after what was put."""
        self.queue.put(b"")
        self._thread.join(wait)

    def _send(self) -> None:
        with contextlib.suppress(OSError):      # the other side has ended; Worker hears it
            while message := self.queue.get():
                self._pipe.send_bytes(message)


# --- in a worker process ---
def keep_out_of_collections() -> None:
    """What was made until now stays; a look of the collector through these 100,000 objects holds all up for 60 ms."""
    gc.collect()
    gc.freeze()


def end_after(seconds: float) -> None:
    """Ends this process a little later, whatever it is at by then."""
    time.sleep(seconds)
    os._exit(0)


@dataclass
class Worker:
    """What a worker process is given; `run` serves there, until the main process says stop, or dies."""

    number: int
    service: ServiceSettings
    folder: Path        # of the inventory, where the application is looked for
    socks: Sequence[socket.socket]
    lease: Lease
    counters: Counters
    serving: ctypes.c_bool      # in shared memory: whether those that are ready may serve
    pipe: PipeConnection
    server: GateServer | None = None    # once it serves

    def run(self) -> None:
        for number in (*ENDINGS, *HANGUPS):     # it ends through its pipe; SIG_IGN would be inherited by what it starts
            signal.signal(number, lambda *_: None)
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ENDINGS, *HANGUPS))
            numbers = [self.pipe.fileno(), *(sock.fileno() for sock in self.socks)]
            with contextlib.suppress(OSError):      # where there is such a folder: the lease's shared memory, too
                numbers += [number for number in map(int, os.listdir("/dev/fd")) if number > 2]
            for number in numbers:
                with contextlib.suppress(OSError):      # what has listed them is closed
                    os.set_inheritable(number, False)   # what the application starts may outlive the service
            os.register_at_fork(after_in_child=self._close)
        messages = MessagePipe(self.pipe)
        logging.basicConfig(level=logging.INFO, handlers=[messages], force=True)
        threading.Thread(target=self._listen, name="stop", daemon=True).start()
        try:
            self._serve(messages)
        except HealthCheckerError as error:
            messages.queue.put(json.dumps(["failed", str(error)]).encode())
        finally:    # what the application left running does not keep the process
            messages.finish(WORKER_END / 2)
            threading.Thread(target=end_after, args=(WORKER_END / 2,), daemon=True).start()

    def _serve(self, messages: MessagePipe) -> None:
        service = self.service
        app = load_app(service.app, self.folder) if service.app else builtin_app(service)
        tally = RequestCounters(self.counters, self.number)
        gate = Gate(app, self.lease, passed=tally.passed)
        server = GateServer(gate, self.socks, service, connection_limit(), tally)
        keep_out_of_collections()
        tally.turn(0)       # the first beat; it is no hang to wait from here
        messages.queue.put(b'["ready"]')
        while not self.serving.value:
            time.sleep(READY_INTERVAL)
        self.server = server
        server.serve()

    def _listen(self) -> None:
        """In a thread: hears stop, or end of file."""
        drain = self.service.drain
        try:
            self.pipe.recv_bytes()
        except (OSError, EOFError):     # the main process died: another one may wait for the port
            drain = min(drain, ORPHAN_DRAIN)
        if self.server is None:
            os._exit(0)
        self.server.stop(drain)
        end_after(drain + WORKER_END / 2)

    def _close(self) -> None:
        self.pipe.close()
        for sock in self.socks:
            sock.close()


# --- in the main process ---
@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Signals to the service wait meanwhile; a process started here is born with them held (POSIX)."""
    if sys.platform != "win32":
        resource_tracker.ensure_running()   # started below, it would let the signals pass
        signal.pthread_sigmask(signal.SIG_BLOCK, (*ENDINGS, *HANGUPS))
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ENDINGS, *HANGUPS))


class WorkerProcess:
    """One worker process, from its start to its end."""

    def __init__(self, number: int, process: multiprocessing.process.BaseProcess, pipe: PipeConnection,
                 short: int = 0) -> None:
        self.number, self.process = number, process
        self.ready, self.ready_mono = threading.Event(), math.inf
        self.failure = ""
        self.short = short          # short lives in a row before its own
        self.due_mono = math.inf    # when to start another one in its place
        self._pipe = pipe
        self._lock = threading.Lock()   # guards the end of _pipe, whose descriptor is another file's afterwards
        self._thread = threading.Thread(target=self._listen, name=f"worker {number}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> str:
        """Why the process has ended, everything that it said was heard then; empty while it runs."""
        if self.process.is_alive():
            return ""
        self._thread.join(LAST_WORDS)      # a child process of the application may hold the pipe open
        return self.failure or f"worker {self.number} ended with exit code {self.process.exitcode}"

    def stop(self) -> None:
        """Lets it end; one that serves nobody yet, and would be at its imports for long, at once."""
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send_bytes(b"stop")
        if not self.ready.is_set():
            self.process.kill()

    def put_off(self, why: str) -> None:
        """Plans the start of the next one; each in a row comes later."""
        self.due_mono = time.monotonic() + WORKER_PAUSES[min(self.short, len(WORKER_PAUSES) - 1)]
        self.short += 1
        log.error("%s", why)

    def _listen(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                message = self._pipe.recv_bytes()
                try:
                    self._receive(*json.loads(message))
                except Exception as error:  # noqa: BLE001  # a thread's outermost loop: the customer's code can send
                    log.error("worker %d: a message cannot be read: %s", self.number, error)
        with self._lock:
            self._pipe.close()

    def _receive(self, kind: str, *message: Any) -> None:
        if kind == "ready":
            self.ready_mono = time.monotonic()
            self.ready.set()
        elif kind == "failed":
            self.failure = message[0]
        elif kind == "log":
            level, text, trace = message
            log.handle(logging.makeLogRecord({
                "name": log.name, "levelno": level, "levelname": logging.getLevelName(level),
                "msg": f"worker {self.number}: {text}", "exc_text": trace}))


class Supervisor:
    """The worker processes behind one door: starts them, replaces those that die or hang, ends them."""

    def __init__(self, service: ServiceSettings, folder: Path, socks: Sequence[socket.socket], lease: Lease) -> None:
        """`folder` is the inventory's, where `service.app` is looked for."""
        self.service, self._folder, self._socks, self.lease = service, folder, socks, lease
        for sock in socks:
            sock.setblocking(False)     # on Windows each start of a worker sets this process's mode in all of them
        self._count = service.worker_count
        self.counters = Counters(self._count, (part for part in lease.parts if part.startswith("/")))
        self._serving = multiprocessing.RawValue(ctypes.c_bool, False)
        self._workers: list[WorkerProcess] = []
        self._looked_mono, self._judges_mono = -math.inf, 0.0   # the last look; from when on one that hangs is killed
        self.stopping = False

    def start(self) -> None:
        """Starts all and waits until they can serve, or `stop`. Raises UsageError where the application cannot be
        loaded. A second time does nothing."""
        if self._workers:
            return
        for number in range(self._count):
            if not self.stopping:
                self._workers.append(self._launch(number))    # known at once: the next one may fail
        news = time.monotonic() + START_NEWS
        while not self.stopping and not all(worker.ready.is_set() for worker in self._workers):
            for worker in self._workers:
                if fault := worker.failure or worker.ended:
                    raise UsageError(fault)
            time.sleep(SUPERVISOR_INTERVAL)
            if time.monotonic() > news:
                news += START_NEWS
                ready = sum(worker.ready.is_set() for worker in self._workers)
                log.info("%d of %d worker processes are ready", ready, self._count)

    def stop(self) -> None:
        """Ends `start` and `serve`. Safe in a signal handler."""
        self.stopping = True

    def serve(self) -> None:
        """Lets the workers serve until `stop`, and then end."""
        self.serve_for(math.inf)
        self.close()

    def serve_for(self, seconds: float) -> None:
        """Lets the workers serve for so long, or until `stop`."""
        self._serving.value, ends_mono = True, time.monotonic() + seconds
        while not self.stopping and time.monotonic() < ends_mono:
            self.look(time.monotonic())
            time.sleep(SUPERVISOR_INTERVAL)

    def look(self, now: float) -> None:
        """Kills one that hangs, and replaces those that died."""
        if now - self._looked_mono > STANDSTILL:    # a suspended machine: nobody is judged by that time
            self._judges_mono = now + HANG_TIME
        self._looked_mono = now
        for number, worker in enumerate(self._workers):
            serves = worker.ready.is_set() and not worker.failure and worker.due_mono == math.inf
            if serves and now > self._judges_mono and self.counters.slot(number)[BEAT] < now - HANG_TIME:
                worker.failure = f"worker {number} hung"
                log.error("worker %d hangs: no turn of its loop for %g s; it is killed", number, HANG_TIME)
                worker.process.kill()
                self._judges_mono = now + HANG_SPACING
            self._replace(worker, now)

    def close(self) -> None:
        """Lets the workers answer what they are at, `service.drain` seconds at most, and ends them."""
        for sock in self._socks:
            sock.close()
        for worker in self._workers:
            worker.stop()
        ends = time.monotonic() + self.service.drain + WORKER_END
        while self._workers:
            worker = self._workers[-1]
            while not worker.ended and time.monotonic() < ends:     # join would wait for what it has forked, too
                time.sleep(SUPERVISOR_INTERVAL)
            if not worker.ended:
                log.warning("worker %d does not end and is killed", worker.number)
                worker.process.kill()
                worker.process.join()
            self._workers.pop()

    def _launch(self, number: int, short: int = 0) -> WorkerProcess:
        context = multiprocessing.get_context("spawn")      # the same on every system
        ours, theirs = context.Pipe()
        worker = Worker(number, self.service, self._folder, self._socks, self.lease, self.counters, self._serving,
                        theirs)
        process = context.Process(target=worker.run, name=f"worker {number}")
        with theirs, signals_held():    # closed here, or the worker's end would not be seen
            process.start()
        return WorkerProcess(number, process, ours, short)

    def _replace(self, worker: WorkerProcess, now: float) -> None:
        """Starts another one in the place of a worker that has ended, when that is due."""
        number = worker.number
        if worker.due_mono == math.inf and worker.ended:
            self.counters.vacate(number)
            if now - worker.ready_mono >= WORKER_LIFE:
                worker.short = 0
            worker.put_off(f"{worker.ended}; starting another")
        if worker.due_mono <= now:
            try:
                self._workers[number] = self._launch(number, worker.short)
                worker.process.close()
            except OSError as error:    # no descriptors, memory or processes are left: that may pass
                worker.put_off(f"worker {number} cannot be started: {error.strerror}; trying again")


# === Accounts ================================================================
# Users and their logins, what requests say of users and resources, and the brake on guessing. A login is a row: the
# browser's cookie or a program's bearer token is a random text of which only a hash is stored, so that a login can be
# listed and ended. Runs in the console's threads and in the user commands.
# Gives: Credentials, ensure_first_user, field_errors, find_resource, find_user, initial_user, INVENTORY_ONLY,
# live_sessions, LoginThrottle, NAMED_COUNT, NAMED_LIFE, NEVER, NewToken, NewUser, OwnToken, PasswordChange,
# require_admin, Role, SettingsReader, shared_defaults, stated, token_hash, TOKEN_LIFE, UserChange, validated
SESSION_LIFE = 8 * 3600.0       # seconds from the login to the end of a session
SESSION_IDLE = 1800.0           # seconds without a request until it ends
TOKEN_LIFE = 1200.0             # seconds of a bearer token that a login gave
NAMED_LIFE = 90 * 86_400.0      # seconds of one with a name, where nothing is said
NAMED_MAX = 366 * 86_400.0      # seconds of it at most; longer is only `never`
NAMED_COUNT = 50                # of a user, those that are over included
NEVER = YEAR_3000 - 1.0         # Unix time
LOGIN_FAILURES = 5              # of an account from an address, after which the next login waits
ADDRESS_FAILURES = 20           # of an address, whatever the accounts
LOGIN_WINDOW = 300.0            # seconds for which a failed login counts
LOGINS_KEPT = 10_000            # accounts and addresses with failures that are remembered
HASH_WAIT = 2.0                 # seconds that a login waits for its turn
FIRST_USER = ("SpiceWorks", "HealthChecker")  # of the specification; its password is to be changed
LIVES = {"session": (SESSION_LIFE, SESSION_IDLE), "token": (TOKEN_LIFE, TOKEN_LIFE)}    # seconds: in all, idle
# What reads the server's own files or environment, as `platform: local` does, which runs commands there; and renames.
INVENTORY_ONLY = frozenset({"was", "password_env", "password_file", "ssh_config", *PASSPHRASES, *FILES})


def not_documented(password: SecretStr) -> SecretStr:
    if password.get_secret_value() == FIRST_USER[1]:
        raise ValueError("must not be the documented one")
    return password


Role = Literal["admin", "viewer"]
Password = Annotated[SecretStr, Field(min_length=12, max_length=SECRET_LENGTH), AfterValidator(not_documented)]
Claimed = Annotated[SecretStr, Field(max_length=SECRET_LENGTH)]     # a password that is to be verified


class Credentials(Settings):
    username: Annotated[str, Field(max_length=NAME_CHARS)]
    password: Claimed


class PasswordChange(Settings):
    current: Claimed
    new: Password


class NewUser(Settings):
    name: Name
    password: Password
    role: Role = "viewer"


class UserChange(Settings):
    """What an admin changes of a user; what is left out stays."""

    password: Password | None = None
    role: Role | None = None


def field_errors(fields: Mapping[str, str]) -> ApiError:
    """Bad input, with what is wrong with each field; the names may be the client's, so they are cut."""
    told = {one_line(name): "\n".join(map(one_line, text.split("\n", 50)[:50]))
            for name, text in itertools.islice(fields.items(), 50)}
    return ApiError("; ".join((f"{name}: " if name else "") + one_line(text) for name, text in told.items()), 422, told)


def token_end(value: object) -> object:
    """`90d` is 7776000.0 seconds from now; `2027-01-31`, when that day begins here, or a time of ISO 8601 is a
    datetime; `never` is None."""
    if value == "never":
        return None
    seconds = plain_seconds(value)
    with contextlib.suppress(ValueError, OverflowError, OSError):   # the last two of what no clock shows
        if isinstance(seconds, (int, float)) and not isinstance(seconds, bool):
            return float(seconds)
        if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value):
            return TypeAdapter(datetime.datetime).validate_python(value).astimezone()
    raise ValueError("must be like 90d, a date like 2027-01-31, or never")


class NewToken(Settings):
    """An API token that is to be made: for what and for how long."""

    name: Name
    role: Role = "viewer"
    expires: Annotated[Any, BeforeValidator(token_end, json_schema_input_type=str | float)] = NAMED_LIFE

    def end(self, now: float) -> float:
        """The Unix time at which it is over. Raises ApiError."""
        at = self.expires.timestamp() if isinstance(self.expires, datetime.datetime) else now + (self.expires or 0.0)
        if self.expires is not None and not 0 < at - now <= NAMED_MAX:
            raise field_errors({"expires": f"must be in the future, by {NAMED_MAX / 86_400:.0f}d at most, or never"})
        return NEVER if self.expires is None else at


class OwnToken(NewToken):
    password: Claimed       # a session or token that leaked cannot make one that lives longer


def validated(model: type[M], body: Mapping[str, Any], *, text: bool = False) -> M:
    """`body` as a model; with `text` its values may be texts, as those of the inventory are. Raises ApiError."""
    try:
        return model.model_validate(body) if text else model.model_validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        faults = {".".join(map(str, item["loc"])): message_of(item) for item in plain_faults(error)}
        raise field_errors(faults) from None


def shared_defaults(inventory: Inventory) -> dict[str, Any]:
    """The defaults of the inventory for what is added here: its secrets, which headers may be, go to no other hosts
    than its own."""
    return {name: value for name, value in inventory.defaults.items() if name not in {*INVENTORY_ONLY, "headers"}}


class SettingsReader(InventoryLoader):
    """Reads one resource of a request by the rules of the inventory: of JSON, or of a form with a `document`, the YAML
    in it. `fields` gathers what is wrong with which; what stands in the document is wrong with `settings`."""

    def __init__(self, inventory: Inventory, document: Document | None) -> None:
        super().__init__(inventory.path, document or Document())
        self.defaults, self.is_form = shared_defaults(inventory), document is not None
        self.fields: dict[str, list[str]] = collections.defaultdict(list)

    def read(self, given: Mapping[str, Any], stored: Mapping[str, Any]) -> ResourceSettings:
        """`given` over `stored`; null stands for the default. Raises ApiError."""
        nulls = {name for name in ResourceSettings.model_fields if given.get(name, "") is None}
        given, stored = ({name: value for name, value in part.items() if name not in nulls}
                         for part in (given, stored))
        stored = self.defaults | stored
        for name in INVENTORY_ONLY & given.keys():
            self.fault(("defaults", name), "can be set in the inventory alone")
        if given.get("platform", stored.get("platform")) == Platform.LOCAL.value:
            self.fault(("defaults", "platform"), "local can be set in the inventory alone")
        settings = None if self.fields else self._resource(0, given, stored)    # which looks at files
        if settings is None or self.fields:
            raise field_errors({name: "\n".join(texts) for name, texts in self.fields.items()})
        return settings

    def fault(self, path: NodePath, message: str, *, key: bool = False) -> None:
        path = path[1:] if path[0] == "defaults" else path[2:]
        name = ".".join(map(str, path)) or "resource"
        if path[:1] in self.document.keys:
            position = self.document.position(path, key=True)
            name, message = "settings", f"{self.document.name}:{position}: {name}: {message}"
        self.fields[name].append(message)

    def parse(self, model: type[M], raw: object) -> M:
        if self.is_form:
            return super().parse(model, raw)
        return model.model_validate_json(json.dumps(raw), strict=True, context=self.folder)


def stated(row: Resource, inventory: Inventory) -> dict[str, Any]:
    """What a row states beside the defaults, in the inventory's names; no secrets."""
    settings, defaults = row.parsed_settings, shared_defaults(inventory)
    without = settings.model_copy(update={"port": None})
    if settings.port == without.connect_port and "port" not in defaults:
        settings = without
    hidden = {*SECRETS, *foreign_fields(settings.platform)}
    values, plain = (settings.model_dump(mode="json", exclude=hidden, exclude_none=True, exclude_defaults=short)
                     for short in (False, True))
    return {name: plain.get(name, value) for name, value in values.items()
            if (value != defaults[name] if name in defaults else name in plain)}


def ensure_first_user(session: Session) -> None:
    """The specification's first account, while there is none at all."""
    if session.scalar(sqlalchemy.select(User).limit(1)) is None:
        session.add(User.create(*FIRST_USER, initial=True))


def initial_user(session: Session) -> str | None:
    """The name of an account that still has the documented password."""
    return session.scalar(sqlalchemy.select(User.username).where(User.initial).limit(1))


def find_resource(session: Session, name: str) -> Resource:
    row = session.scalar(sqlalchemy.select(Resource).where(Resource.name == name))
    if row is None:
        raise ApiError("there is no such resource", 404)
    return row


def find_user(session: Session, name: str) -> User:
    user = session.scalar(sqlalchemy.select(User).where(User.username == name))
    if user is None:
        raise ApiError("there is no such user", 404)
    return user


def require_admin(session: Session, without: User) -> None:
    """Raises ApiError when `without` is the last admin."""
    if session.scalar(sqlalchemy.select(User).where(User.role == "admin", User.id != without.id).limit(1)) is None:
        raise ApiError(f"{without.username} is the last admin; make another one first", 409)


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def live_sessions(now: float) -> sqlalchemy.ColumnElement[bool]:
    """The logins that are not over."""
    return sqlalchemy.or_(*(sqlalchemy.and_(
        LoginSession.kind == kind, LoginSession.begun_at > now - life, LoginSession.seen_at > now - idle)
        for kind, (life, idle) in LIVES.items()),
        sqlalchemy.and_(LoginSession.kind == "named", LoginSession.expires_at > now))


def throttled_address(address: str) -> str:
    """What counts as one client: an address, or the /64 from which an IPv6 host takes its addresses as it likes."""
    ip = ipaddress.ip_address(address)
    return address if ip.version == 4 else str(ipaddress.IPv6Network((int(ip), 64), strict=False))


class LoginThrottle:
    """Who may have a password checked now, and whose turn it is. Names are the attacker's choice, so an account is
    only ever kept waiting at the address where it failed; this machine's own is everybody's who comes by `ssh -L`, and
    keeps nobody else waiting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._hashing = threading.Lock()    # one password hash at a time, for it takes a CPU 0.15 s
        self._lock = threading.Lock()       # guards the next two
        self._waiting: set[str] = set()     # addresses with a login that waits for its turn
        self._failures: dict[tuple[str | None, str], collections.deque[float]] = {}     # of an account, of all (None)

    def wait(self, name: str, address: str) -> float:
        """Seconds until the next attempt; 0 when it may be made now."""
        where = throttled_address(address)
        names = (name,) if ipaddress.ip_address(address).is_loopback else (name, None)
        found = [self._failures.get((key, where)) for key in names]
        oldest = [times[0] for times in found if times and len(times) == times.maxlen]
        return max(0.0, max(oldest, default=-math.inf) + LOGIN_WINDOW - self._clock())

    @contextlib.contextmanager
    def turn(self, name: str, address: str) -> Iterator[None]:
        """Holds the one hash at a time. An address has one login at most that waits for it, and none while others wait
        if logins from there failed: a flood does not stand before who comes rarely. Raises ApiError: 429."""
        where = throttled_address(address)
        with self._lock:
            if wait := self.wait(name, address):
                raise ApiError("too many failed logins; wait before the next", 429, retry=wait)
            if where in self._waiting or (self._waiting and (None, where) in self._failures):
                raise ApiError("another login waits; try again in a second", 429, retry=1)
            self._waiting.add(where)
        try:
            mine = self._hashing.acquire(timeout=HASH_WAIT)
        finally:
            self._waiting.discard(where)
        if not mine:
            raise ApiError("other passwords are being checked; try again in a second", 429, retry=1)
        try:
            yield
        finally:
            self._hashing.release()

    def fail(self, name: str, address: str) -> int:
        """Takes a failure down; says how many of this account count now. The oldest ones are forgotten."""
        now, where = self._clock(), throttled_address(address)
        with self._lock:
            for key, kept in ((name, LOGIN_FAILURES), (None, ADDRESS_FAILURES)):
                times = self._failures.pop((key, where), ())    # who failed last is last
                self._failures[key, where] = collections.deque((*times, now), kept)
            while len(self._failures) > LOGINS_KEPT:
                del self._failures[next(iter(self._failures))]
            return sum(now - at < LOGIN_WINDOW for at in self._failures[name, where])

    def clear(self, name: str, address: str) -> None:
        """Forgives an account at an address; what the address tried with others stays."""
        with self._lock:
            self._failures.pop((name, throttled_address(address)), None)


# === Principals ==============================================================
# Who asks, and what it is asked of: what pages, API and the user and gate commands work on, and by whom, from where and
# by which login. Each change is noted with who made it. Any thread of the console, and the command line.
# Gives: ConsoleContext, offered_key, Principal, TRIAL_TIMEOUT, utc_time
TRIAL_TIMEOUT = 30.0            # seconds of a poll with settings that are not stored


def offered_key(target: Target, access: ConnectionContext) -> str:
    """The key that a host shows now. Raises UsageError for a resource without one, or with one that is pinned."""
    if target.fault:
        raise UsageError(target.fault[1])
    connection = CONNECTIONS[target.settings.platform](target, LoginGuard(), replace(access, keeps=False))
    if not isinstance(connection, (SshConnection, TlsConnection)):
        raise UsageError(f"{target.name} has no host key")
    if target.settings.host_key not in (None, "strict") or target.settings.certificate_fingerprint:
        raise UsageError(f"the inventory pins the key of {target.name}; change it there")
    return connection.offered_key(Deadline(min(target.settings.timeout, TRIAL_TIMEOUT)))


@dataclass
class ConsoleContext:
    """What pages, API and the user commands work on, in the main process."""

    store: Store
    inventory: Inventory
    lease: Lease
    vault: Vault
    monitor: Monitor
    connections: ConnectionContext
    clock: Callable[[], float] = time.time      # Unix time
    throttle: LoginThrottle = dataclass_field(default_factory=LoginThrottle)
    counters: Counters = dataclass_field(default_factory=lambda: Counters(1))   # of the workers

    @property
    def imported(self) -> Inventory:
        """The inventory with the defaults that were taken over last, maybe by another process."""
        with self.store.reading() as session:
            text = remembered(session, "defaults").text
        return replace(self.inventory, defaults=json.loads(text)) if text else self.inventory

    @property
    def is_healthy(self) -> bool:
        return lease_clock() < self.lease.until.value

    @property
    def passed(self) -> int:
        """Requests that would have been refused."""
        return int(sum(map(self.counters.total, self.counters.routes.values())))

    def offered_key(self, name: str) -> str:
        with self.store.reading() as session:
            target = target_of(find_resource(session, name), self.vault)
        return offered_key(target, self.connections)


@dataclass(frozen=True)
class Principal:
    """Who asks, from where, and by which login."""

    context: ConsoleContext
    address: str = ""               # empty on the command line
    session: LoginSession | None = None
    user: User | None = None
    bearer: str = dataclass_field(default="", repr=False)   # the token that was shown, whosever

    @property
    def name(self) -> str:
        return self.user.username if self.user else "command line"

    @property
    def operator(self) -> bool:
        """Whether the console answers this address at all."""
        networks = tuple(map(ipaddress.ip_network, self.context.inventory.service.operators))
        return is_within(ipaddress.ip_address(self.address), networks)

    @property
    def restricted(self) -> bool:
        """The documented password still holds: it can only be changed."""
        return self.user is not None and self.user.initial

    def may(self, role: str) -> bool:
        """Whether user and token may do what is for this role."""
        roles = [holder.role for holder in (self.user, self.session) if holder]
        return self.user is not None and all(held in (role, "admin") for held in roles)

    def may_see(self, user_id: int) -> bool:
        """Whether the logins of this user are one's own, or anybody's business who is an admin or on the machine."""
        return not self.address or self.may("admin") or (self.user is not None and self.user.id == user_id)

    @property
    def signature(self) -> dict[str, str]:
        """Of what was done, in its event."""
        return {"actor": self.name, "address": self.address}

    def note(self, session: Session, text: str, resource: str = "") -> None:
        """Records a change; one of a resource is told to the pollers."""
        record_event(session, "change", text, resource=resource, at=self.context.clock(), **self.signature)
        if resource:
            revise(session)


def utc_time(at: float) -> datetime.datetime | None:
    """A Unix time, None for 0."""
    return datetime.datetime.fromtimestamp(at, datetime.timezone.utc) if at else None


# === Planning ================================================================
# What operators plan, and say that they have seen, in the console's threads and in the maintenance commands. Bodies of
# requests come in, rows and events go out; the monitor follows within a second. What a tag or a group chooses is looked
# at again whenever resources change: it holds for who has the tag then.
# Gives: cancel_work, chosen_moment, end_acknowledgement, end_works, forget_seen, list_work, MaintenanceView, Order,
# plan_work, Seen, start_work, Term
LATE = 60.0                     # seconds by which a beginning may be past
PLANNED_COUNT = 200             # that run or are ahead, planned here; each is looked at again and again


class Term(Settings):
    """From when and for how long something does not count, and why."""

    start: AwareDatetime | None = None      # None: now
    until: AwareDatetime | None = None      # or else:
    seconds: Duration | None = Field(default=None, alias="for")
    reason: Annotated[TextLine, Field(max_length=200)]

    def times(self, now: float) -> tuple[float, float]:
        """Unix times of its beginning and end. Raises ApiError."""
        start = self.start.timestamp() if self.start else now
        until = self.until.timestamp() if self.until else start + (self.seconds or 0.0)
        if (self.until is None) is (self.seconds is None):
            raise field_errors({"until": "this or `for` must be given"})
        if not -LATE < start - now <= LONGEST:
            raise field_errors({"start": f"must not be past, and in no more than {LONGEST / 86_400:.0f} days"})
        if until <= now or not 0 < until - start <= LONGEST:
            raise field_errors({"until": "must be in the future and after the beginning, and by no more than "
                                         f"{LONGEST / 86_400:.0f} days"})
        return max(start, now), until


class Order(Term, Scope):
    """The same of what it chooses."""


class MaintenanceView(Settings):
    """Planned work that runs, or is ahead."""

    id: int | None              # None for a plan's that is ahead
    state: Literal["planned", "begun"]
    start: datetime.datetime
    until: datetime.datetime
    scope: Scope
    reason: str
    actor: str
    schedule: str               # of the inventory's plan


class Seen(Settings):
    """What is said of a resource that is unhealthy."""

    comment: Annotated[TextLine, Field(max_length=200)]


def chosen_moment(text: str) -> str:
    """A time as one types it, the server's where it names no zone, in ISO 8601 with one. Raises ApiError."""
    try:
        return datetime.datetime.fromisoformat(text.strip()).astimezone().isoformat()
    except (ValueError, OverflowError, OSError):
        raise field_errors({"start": "must be such as 2026-11-28 02:00"}) from None


def list_work(who: Principal) -> list[Turn]:
    """Planned work that runs, and what is ahead: what was planned here, and of each plan of the inventory what begins
    within a week."""
    with who.context.store.reading() as session:
        return timetable(session, who.context.clock())


def plan_work(who: Principal, session: Session, scope: Scope, term: Term) -> Turn:
    """Lets something not count for a while, now or later: it is polled and shown, and closes nothing."""
    start, until = term.times(now := who.context.clock())
    if faults := choices(session).faults(scope):
        raise field_errors(faults)
    if (session.scalar(sqlalchemy.select(func.count()).where(Maintenance.plan == "")) or 0) >= PLANNED_COUNT:
        raise ApiError(f"{PLANNED_COUNT} are planned already; end one first", 409)
    row = Maintenance(state="planned", start_at=start, until_at=until, scope=scope.scope_json, reason=term.reason,
                      actor=who.name)
    session.add(row)
    if start > now:
        tell_work(session, row, f"maintenance planned from {written(start)} until {written(until)}: {term.reason}", now,
             **who.signature)
    else:
        begin_work(session, row, now, **who.signature)
    revise(session)
    session.flush()     # which gives the id
    return Turn(row.id, row.state, start, until, scope, term.reason, who.name, "")


def start_work(who: Principal, body: Mapping[str, Any]) -> Turn:
    """Lets what has a tag, is in a group or has a name, or everything, not count for a while, now or later."""
    order = validated(Order, body)
    with who.context.store.writing() as session:
        return plan_work(who, session, order, order)


def end_work(who: Principal, session: Session, row: Maintenance) -> None:
    text = "maintenance ended" if row.state == "begun" else "maintenance cancelled"
    finish_work(session, row, text, who.context.clock(), **who.signature)
    revise(session)


def end_works(who: Principal, session: Session, scope: Scope, *states: str) -> bool:
    """Ends what was planned here for exactly this; says whether there was any."""
    rows = [row for row in session.scalars(sqlalchemy.select(Maintenance).filter_by(plan=""))
            if row.state in states and row.scope == scope.scope_json]
    for row in rows:
        end_work(who, session, row)
    return bool(rows)


def cancel_work(who: Principal, number: str) -> None:
    """Ends planned work, or what is planned; of a plan this turn."""
    with who.context.store.writing() as session:
        row = session.get(Maintenance, int(number)) if re.fullmatch("[0-9]{1,18}", number) else None
        if row is None or row.state == "over":
            raise ApiError("there is no such maintenance, or it is over", 404)
        end_work(who, session, row)


def forget_seen(who: Principal, session: Session, row: Resource, text: str) -> None:
    """Ends what was said of a resource, if anything was."""
    if seen := session.get(Acknowledgement, row.id):
        session.delete(seen)
        record_event(session, "acknowledgement", text, resource=row.name, state="over", at=who.context.clock(),
                     **who.signature)


def end_acknowledgement(who: Principal, name: str) -> None:
    """Takes back that an unhealthy resource has been seen."""
    with who.context.store.writing() as session:
        forget_seen(who, session, find_resource(session, name), "taken back")


# === Users ===================================================================
# What can be done with users and their logins: added, changed, logged in, ended. Each operation takes who does it,
# checks what is given, changes rows and notes it within one transaction. What is refused is an ApiError. Runs in the
# console's threads and in the user commands.
# Gives: add_user, change_password, change_user, end_session, issue_token, list_sessions, list_tokens, list_users,
# log_in, make_token, NamedTokenView, open_session, remove_user, revoke_token, SessionView, sign_in, sign_out,
# TokenView, UserView
class UserView(Settings):
    name: str = Field(validation_alias="username")
    role: Role
    initial: bool       # the password is the documented one still


def list_users(who: Principal) -> list[User]:
    """All users, by name."""
    with who.context.store.reading() as session:
        return list(session.scalars(sqlalchemy.select(User).order_by(User.username)))


def add_user(who: Principal, body: Mapping[str, Any]) -> User:
    """Adds a user."""
    new = validated(NewUser, body)
    user = User.create(new.name, new.password.get_secret_value(), new.role)     # before the database is locked
    with who.context.store.writing() as session:
        if session.scalar(sqlalchemy.select(User.id).where(User.username == new.name)) is not None:
            raise ApiError("there is a user of this name already", 409, {"name": "is taken"})
        session.add(user)
        who.note(session, f"user {new.name} added as {new.role}")
    return user


def renew(who: Principal, session: Session, user: User, fresh: User) -> User:
    """Gives a user the password of `fresh`; every session and token of before ends, named ones too: who knew the old
    password may have made them."""
    user.take_password(fresh)
    session.execute(sqlalchemy.delete(LoginSession).filter_by(user_id=user.id))
    who.note(session, f"user {user.username}: new password")
    return user


def change_user(who: Principal, name: str, body: Mapping[str, Any]) -> User:
    """Changes password or role of a user and ends the user's sessions; one's own password changes elsewhere.

    With another role API tokens stay, and none of them keeps a right that the user has lost."""
    change = validated(UserChange, body)
    if change.password and who.user and who.user.username == name:
        raise field_errors({"password": "change your own with the current one, at /-/api/password"})
    fresh = User.create(name, change.password.get_secret_value()) if change.password else None
    with who.context.store.writing() as session:
        user = find_user(session, name)
        if fresh:
            renew(who, session, user, fresh)
        if change.role and change.role != user.role:
            require_admin(session, without=user)
            user.role = change.role
            logins = LoginSession.user_id == user.id
            session.execute(sqlalchemy.delete(LoginSession).where(logins, LoginSession.kind != "named"))
            if change.role != "admin":      # for good: an admin once more makes new ones
                session.execute(sqlalchemy.update(LoginSession).where(logins).values(role=change.role))
            who.note(session, f"user {name}: {change.role} now")
    return user


def remove_user(who: Principal, name: str) -> None:
    """Removes a user and ends the user's sessions; the last admin stays."""
    with who.context.store.writing() as session:
        user = find_user(session, name)
        require_admin(session, without=user)
        session.delete(user)
        who.note(session, f"user {name} removed")


NOBODY = User(salt=b"", rounds=PBKDF2_ROUNDS, password=b"")    # takes as long as a user that exists


def sign_in(who: Principal, body: Mapping[str, Any]) -> User:
    """The user with these Credentials. Raises ApiError: 401, or 429 with the seconds to wait."""
    given = validated(Credentials, body)
    name, context = given.username, who.context
    with context.throttle.turn(name, who.address):
        with context.store.reading() as session:
            user = session.scalar(sqlalchemy.select(User).where(User.username == name))
        if (user or NOBODY).verify(given.password.get_secret_value()) and user is not None:
            context.throttle.clear(name, who.address)
            return user
        failures = context.throttle.fail(name, who.address)
    log.warning("login of %s from %s failed", one_line(name), who.address)
    with context.store.writing() as session:    # as many as the throttle lets through, and they evict no other kind
        record_event(session, "attempt", f"failed login, {failures} in a row", actor=name, address=who.address,
                     at=context.clock())
    raise ApiError("user name or password is wrong", 401)


def sign_in_again(who: Principal, field: str, password: str) -> User:
    """Who asks, having proved it with the password in `field`. Raises ApiError."""
    assert who.user
    try:
        return sign_in(who, {"username": who.user.username, "password": password})
    except ApiError as error:
        raise field_errors({field: "is wrong"}) if error.status == 401 else error from None


def change_password(who: Principal, body: Mapping[str, Any]) -> User:
    """Changes one's own password; every session and token of before ends."""
    change = validated(PasswordChange, body)
    current, new = change.current.get_secret_value(), change.new.get_secret_value()
    if current == new:
        raise field_errors({"new": "must not be the current one"})
    name = sign_in_again(who, "current", current).username
    fresh = User.create(name, new)
    with who.context.store.writing() as session:
        return renew(who, session, find_user(session, name), fresh)


def unchanged(session: Session, user: User) -> User:
    """The user's row. Raises ApiError where it was removed or has another password since that was verified."""
    current = session.get(User, user.id)
    if current is None or current.salt != user.salt:
        raise ApiError("user name or password is wrong", 401)
    return current


def open_session(who: Principal, kind: str, user: User) -> str:
    """The token that proves a login of `user` from now on. Raises ApiError."""
    token, now = secrets.token_urlsafe(32), who.context.clock()
    with who.context.store.writing() as session:
        unchanged(session, user)
        session.execute(sqlalchemy.delete(LoginSession).where(LoginSession.kind != "named", ~live_sessions(now)))
        session.add(LoginSession(token_hash=token_hash(token), kind=kind, user_id=user.id, begun_at=now, seen_at=now,
                                 address=who.address))
        record_event(session, "login", "logged in", actor=user.username, address=who.address, at=now)
    return token


class TokenView(Settings):
    token: str                  # this once
    expires_in: float | None    # seconds; None: never


def log_in(who: Principal, body: Mapping[str, Any]) -> TokenView:
    """Gives a bearer token for user name and password."""
    return TokenView(token=open_session(who, "token", sign_in(who, body)), expires_in=TOKEN_LIFE)


class SessionView(Settings):
    """A login that is not over."""

    id: str
    kind: Literal["session", "token", "named"]
    user: str
    begun_at: datetime.datetime
    seen_at: Annotated[datetime.datetime | None, BeforeValidator(utc_time)]     # last request, give or take a minute
    address: str
    current: bool                   # the one that asks


def logins(who: Principal, *which: sqlalchemy.ColumnElement[bool]) -> list[Any]:
    """One's own logins, for an admin everybody's; who was seen last stands first."""
    own = who.session.token_hash if who.session else ""
    query = sqlalchemy.select(
        *LoginSession.__table__.columns, LoginSession.token_hash.label("id"), User.username.label("user"),
        (LoginSession.token_hash == own).label("current"),
    ).join(User).where(*which).order_by(LoginSession.seen_at.desc(), LoginSession.begun_at.desc())
    with who.context.store.reading() as session:
        return [row for row in session.execute(query) if who.may_see(row.user_id)]


def list_sessions(who: Principal) -> list[Any]:
    """One's own logins, for an admin everybody's; API tokens with a name are listed elsewhere."""
    return logins(who, LoginSession.kind != "named", live_sessions(who.context.clock()))


def drop_login(who: Principal, number: str, *, named: bool) -> None:
    """Ends a login or a named token: one's own, or as an admin anybody's."""
    with who.context.store.writing() as session:
        row = session.get(LoginSession, number)
        user = session.get(User, row.user_id) if row and (row.kind == "named") is named else None
        if row is None or user is None or not who.may_see(user.id):
            raise ApiError(f"there is no such {'token' if named else 'session'}", 404)
        session.delete(row)
        who.note(session, f"API token {row.name} of {user.username} revoked" if named else
                 f"a {row.kind} from {row.address} of {user.username} ended")


def end_session(who: Principal, number: str) -> None:
    """Ends a login: one's own, or as an admin anybody's."""
    drop_login(who, number, named=False)


def sign_out(who: Principal) -> None:
    """Ends the session that asks, also for whoever else has its cookie."""
    if who.session:
        with who.context.store.writing() as session:
            session.execute(sqlalchemy.delete(LoginSession).filter_by(token_hash=who.session.token_hash))


# --- API tokens with a name ---
class NamedTokenView(SessionView):
    """An API token with a name; what it opens is never shown again. `seen_at` is None before its first use."""

    name: str
    role: Role                  # at most; never more than the user's
    expires_at: Annotated[datetime.datetime | None, BeforeValidator(lambda at: None if at >= NEVER else utc_time(at))]


def list_tokens(who: Principal) -> list[Any]:
    """One's own API tokens, for an admin everybody's; what is over stays until it is revoked or made anew."""
    return logins(who, LoginSession.kind == "named")


def issue_token(who: Principal, user: User, given: NewToken) -> TokenView:
    """Makes a token for `user`, in place of one of that name that is over. Raises ApiError."""
    token, now = secrets.token_urlsafe(32), who.context.clock()
    expires_at, name = given.end(now), given.name
    with who.context.store.writing() as session:
        user = unchanged(session, user)
        if user.initial:
            raise ApiError("change the documented password first: it opens nothing else", 403)
        if user.role not in (given.role, "admin"):
            raise field_errors({"role": f"must not be more than that of {user.username}, {user.role}"})
        held = sqlalchemy.select(LoginSession).filter_by(user_id=user.id, kind="named")
        names = {row.name: row for row in session.scalars(held)}
        if name in names and names[name].expires_at > now:
            raise ApiError("there is a token of this name already", 409, {"name": "is taken"})
        if name in names:
            session.delete(names[name])
        elif len(names) >= NAMED_COUNT:
            raise ApiError(f"{user.username} has {NAMED_COUNT} tokens; revoke one first", 409)
        session.add(LoginSession(token_hash=token_hash(token), kind="named", user_id=user.id, begun_at=now, seen_at=0.0,
                                 address="", name=name, role=given.role, expires_at=expires_at))
        until = "for ever" if expires_at == NEVER else f"until {written(expires_at)}"
        who.note(session, f"API token {name} of {user.username} made: {given.role}, {until}")
    return TokenView(token=token, expires_in=None if expires_at == NEVER else expires_at - now)


def make_token(who: Principal, body: Mapping[str, Any]) -> TokenView:
    """Makes an API token of one's own, which is shown this once; needs the password."""
    given = validated(OwnToken, body)
    return issue_token(who, sign_in_again(who, "password", given.password.get_secret_value()), given)


def revoke_token(who: Principal, number: str) -> None:
    """Revokes an API token: one's own, or as an admin anybody's."""
    drop_login(who, number, named=True)


# === Actions =================================================================
# What can be done, in the console's threads and in the user and gate commands, and the table of it that the API
# serves. Each operation takes who does it, checks what is given, changes rows and notes it within one transaction, and
# gives rows or views. What is refused is an ApiError.
# Gives: acknowledge_resource, add_resource, API, begin_maintenance, change_gate, change_resource, changeable,
# connection_view, current_status, DAMAGED, end_maintenance, is_sick, last_sample, list_events, list_groups,
# list_resources, NO_SAMPLE, OPERATIONS, override_gate, poll_now, remove_resource, RESOURCES, Route, SAFE_METHODS,
# status_of, test_changes, test_settings, trust_resource
POLL_NOW_TIMEOUT = 60.0         # seconds that a request waits for a poll
TAKE_TIME, TAKE_AGAIN = 2.0, 0.05   # seconds that a report waits for its resource's new poller, and between two looks
PUSH_PAUSE = 1.0                # seconds for which a report that says the same, or that all is well again, is not taken
OPEN_MAX = 86_400.0             # seconds for which the gate is opened by hand at most
OPEN_USUALLY = 1800.0           # seconds, where nothing is said
API = "/-/api/"
SAFE_METHODS = ("GET", "HEAD")
DAMAGED = "its row in the database cannot be read; remove it, or restore the database"


class UntilView(Settings):
    """Until when a resource does not count, and why."""

    until: datetime.datetime
    reason: str


class SeenView(Settings):
    """Who has seen that a resource is unhealthy."""

    at: datetime.datetime
    actor: str
    comment: str


class Trust(Settings):
    """The key to trust; without one it is the one that the host shows now."""

    host_key: TextLine | None = None


class SampleView(Settings):
    """What the last poll read."""

    details: dict[str, float | str]
    metrics: dict[str, float]
    services: dict[str, Outcome]
    checks: dict[str, Outcome]
    problems: dict[str, str]    # what could not be read, and why


class PollView(Settings):
    """What one poll found."""

    state: State
    cause: Cause
    reason: str
    seconds: float              # that it took


class CheckView(PollView):
    """What a poll that somebody asked for found."""

    kept: bool                  # without a login, over the connection that was open


class ConnectionView(Settings):
    """What is open to a host between polls."""

    opened: datetime.datetime | None    # None: nothing is
    kept: bool                  # the last poll came over it without a login
    logins: int                 # in the last 24 hours, refused ones too
    second_try: str             # why the last poll began again
    complaint: str              # why the last login did not replace it
    found_dead: bool            # three in a row were, so for a day each poll opens anew


class TrialView(PollView):
    """What a poll with settings that are not stored found."""

    host_key: str | None        # would be trusted on first use


class ResourceView(ResourceSettings, PollView):
    """A resource: its settings without secrets, and its state."""

    password: None = Field(default=None, exclude=True)
    key_passphrase: None = Field(default=None, exclude=True)
    was: None = Field(default=None, exclude=True)
    origin: Literal["inventory", "api"]
    place: str | None           # where the inventory states it: file:line:column
    has_secret: bool
    trusted_key: str | None     # trusted on first use or by `trust`
    maintenance: UntilView | None
    acknowledgement: SeenView | None
    since: datetime.datetime | None
    polled: datetime.datetime | None
    sample: SampleView | None
    connection: ConnectionView | None   # None: nothing was open yet


NO_SAMPLE: dict[str, Any] = {"details": {}, "metrics": {}, "services": {}, "checks": {}, "problems": {}}
RESOURCES = sqlalchemy.select(Resource, Status).outerjoin(Status, Status.resource_id == Resource.id)


def overdue(row: Resource, status: Status, poller: Poller | None, now: float) -> Standing | None:
    """What a state is worth that is good and for which no result came in time, whether or not that is noted yet."""
    ttl = poller.target.settings.ttl if poller else 2 * row.interval
    counts = poller and poller.standing.state != "unknown"      # then the clock may have been set since
    is_late = lease_clock() >= poller.expires_mono if poller and counts else now - status.polled_at > ttl
    is_good = status.state in ("healthy", "degraded")
    return Standing("unhealthy", "stale", f"no result for {ttl:.0f} s", status.polled_at + ttl) if (
        is_good and is_late) else None


def status_of(row: Resource, status: Status | None) -> Status:
    """The status, an empty one when it is of another configuration: nothing is known of this one yet."""
    if status and status.settings_digest == row.settings_digest:
        return status
    return Status(state="unknown", cause="", reason="", since_at=0.0, polled_at=0.0, seconds=0.0, sample="null",
                  good=0, bad=0)


def current_status(row: Resource, status: Status | None, context: ConsoleContext) -> Status:
    """The status as its poller knows it, which may not be written yet, or cannot be. One that is cut off or behind
    another stands like this, whatever its own results are; without a result in time none is good."""
    known, poller = status_of(row, status), context.monitor.pollers.get(row.name)
    last = poller.news.last if poller else None
    if last and last.at != known.polled_at and last.target.settings_digest == row.settings_digest:
        known = Status(**last.status)
    standing = context.monitor.behind(row.name) if known.polled_at else None
    if standing := standing or overdue(row, known, poller, context.clock()):
        return Status(**vars(standing), polled_at=known.polled_at, seconds=known.seconds, sample=known.sample)
    return known


def is_sick(known: Status) -> bool:
    """Whether it is unhealthy by itself: then somebody can say that this is seen."""
    return known.state == "unhealthy" and known.cause != "parent"


def last_sample(row: Resource, status: Status | None, known: Status) -> tuple[str, float]:
    """What was read last, as JSON, and the Unix time of it if it is old, or 0."""
    if known.sample != "null":
        return known.sample, known.polled_at if known.cause == "stale" else 0.0
    if status is None or status.settings_digest != row.settings_digest:
        return "null", 0.0
    return (status.read, status.read_at) if status.sample == "null" else (status.sample, status.polled_at)


def connection_view(context: ConsoleContext, name: str) -> ConnectionView | None:
    """What is open to a resource, if anything ever was."""
    connection = context.connections.watched.get(name)
    if connection is None or not (connection.record.outcomes or connection.keeper.session):
        return None
    keeper, record = connection.keeper, connection.record
    return ConnectionView(opened=utc_time(keeper.opened_at if keeper.session else 0.0), kept=keeper.reused,
                          logins=record.last_day, second_try=connection.second_try, complaint=keeper.complaint,
                          found_dead=connection.found_dead)


def resource_view(row: Resource, status: Status | None, who: Principal, more: Remarks) -> ResourceView:
    """A resource as the API shows it; of a row that cannot be read as much as there is, and that it is damaged."""
    context = who.context
    work, seen = more.maintenance.get(row.name), more.seen.get(row.name)
    known = current_status(row, status, context)
    shown: dict[str, Any] = {
        **{name: getattr(row, name) for name in Resource.COLUMNS}, "origin": row.origin,
        "place": row.place or None,
        "has_secret": row.password is not None or row.key_passphrase is not None, "trusted_key": row.host_key,
        "since": utc_time(known.since_at), "polled": utc_time(known.polled_at),
        "connection": connection_view(context, row.name),
        "maintenance": UntilView.model_validate({"until": work.until_at, "reason": work.reason}) if work else None,
        "acknowledgement": SeenView.model_validate(seen, from_attributes=True) if seen else None,
        **{name: getattr(known, name) for name in ("state", "cause", "reason", "seconds")}}
    try:
        settings = from_json(row.settings)
        if not who.may("admin"):    # some are keys
            settings["headers"] = dict.fromkeys(settings.get("headers", ()), "***")
        return ResourceView.model_validate(settings | shown | {"sample": from_json(known.sample)})
    except (ValueError, TypeError):
        return ResourceView.model_construct(
            **shown | {"state": "unhealthy", "cause": "protocol", "reason": DAMAGED, "sample": None})


def changeable(who: Principal, session: Session, name: str) -> Resource:
    """A resource that was added here; those of the inventory change there."""
    row = find_resource(session, name)
    if row.origin == "inventory":
        raise ApiError(f"{name} stands at {row.place or who.context.inventory.path.name}; change it there", 409)
    return row


def list_resources(who: Principal) -> list[ResourceView]:
    """All resources, by name."""
    with who.context.store.reading() as session:
        rows, more = session.execute(RESOURCES.order_by(Resource.name)), remarks(session, who.context.clock())
        return [resource_view(row, status, who, more) for row, status in rows]


def list_groups(who: Principal) -> list[GroupState]:
    """Groups by name and routes by path, with their members, and why they stand as they do."""
    return who.context.monitor.groups()


class OverrideView(Settings):
    """What an operator says of the gate."""

    action: Literal["open", "close"]
    at: datetime.datetime
    until: datetime.datetime | None     # None: until it is ended
    reason: str
    actor: str


class GateView(Settings):
    """How the whole site's gate stands."""

    state: Literal["open", "closed"]
    why: str
    mode: Mode                  # observe: nothing is refused
    would_refuse: int           # requests that mode observe let pass
    override: OverrideView | None


def show_gate(who: Principal) -> GateView:
    """The gate, who opened or closed it by hand, and whether it refuses at all."""
    context, [site] = who.context, who.context.monitor.groups(site=True)
    return GateView.model_validate({
        "state": "closed" if site.state == "unhealthy" else "open", "why": site.why, "mode": site.mode,
        "would_refuse": context.passed, "override": context.monitor.override.now}, from_attributes=True)


class GateChange(Settings):
    """What is to hold of the gate, and for how long."""

    action: Literal["open", "close", "auto"]    # auto: what the resources say
    seconds: Duration | None = Field(default=None, alias="for")
    reason: Annotated[TextLine, Field(max_length=200)] | None = None


def change_gate(who: Principal, body: Mapping[str, Any]) -> None:
    """Has the gate opened or closed by hand, or ends that; a service follows within a second.

    An open gate over sick resources ends by itself. A site that was closed on purpose may stay so until that is ended:
    it must not come back in the middle of the work."""
    given = validated(GateChange, body)
    seconds, context = given.seconds, who.context
    if given.action == "open":
        seconds = seconds or OPEN_USUALLY
        if seconds > OPEN_MAX:
            raise field_errors({"for": f"must be at most {OPEN_MAX / 3600:.0f}h for an open gate"})
    elif given.action == "auto" and seconds:
        raise field_errors({"for": "has no meaning with auto"})
    reason = given.reason or ""
    with context.store.writing() as session:
        text, said = "", f"gate left to the resources again{f': {reason}' if reason else ''}"
        if given.action != "auto":
            override = Override(action=given.action, at=context.clock(), seconds=seconds, reason=reason, actor=who.name,
                                boot=boot_number(), begun_mono=lease_clock())
            text, end = override.model_dump_json(), written(override.until) if override.until else "that is ended"
            said = f"gate {override.why}, until {end}"
        if text or remembered(session, "override").text:
            session.merge(Setting(name="override", value=0, text=text))
            who.note(session, said)
            revise(session)


def override_gate(who: Principal, body: Mapping[str, Any]) -> GateView:
    """Opens or closes the gate by hand for a while, or leaves it to the resources again."""
    change_gate(who, body)
    who.context.monitor.catch_up()
    return show_gate(who)


def show_resource(who: Principal, name: str) -> ResourceView:
    """One resource."""
    with who.context.store.reading() as session:
        row = find_resource(session, name)
        return resource_view(row, session.get(Status, row.id), who, remarks(session, who.context.clock()))


def apply_settings(context: ConsoleContext, row: Resource, body: Mapping[str, Any], form: Document | None) -> bool:
    """Brings a row to what `body` says, over what it states if it is not new; says whether it changed."""
    inventory = context.imported
    stored = stated(row, inventory) if row.name else {}
    settings = SettingsReader(inventory, form).read(body, stored)
    if settings.hops or settings.depends_on:
        with context.store.reading() as session:
            known = {name: target.settings for name, target in load_targets(
                session, context.vault, context.monitor.targets).items()}
            gates = Gates.model_validate_json(remembered(session, "gates").text or "{}")
        ways = {name: each.way for name, each in known.items()}
        if settings.hops and (why := jump_fault(settings.name, ways | {settings.name: settings.hops})):
            raise field_errors({"proxy_jump": why})
        others = [each for name, each in known.items() if name != settings.name]
        faults = dependency_faults(gates, [*others, settings])
        if why := next((why for index, _, why in faults if index == len(others)), None):
            raise field_errors({"depends_on": why})
    try:
        return update_row(row, settings, context.vault)
    except (SecretError, InventoryError) as error:
        raise field_errors({"password": str(error)}) from error


def note_other_way(who: Principal, session: Session, name: str) -> None:
    """A resource is new, or somewhere else: who typed the passwords of what it leads to did not mean that."""
    for other in forget_behind(session, name):
        who.note(session, f"its password has to be written again: the way leads through {name}, which is another now",
                 other)


def add_resource(who: Principal, body: Mapping[str, Any], form: Document | None = None) -> ResourceView:
    """Adds a resource; it is watched at once."""
    row = Resource(origin="api")
    apply_settings(who.context, row, body, form)
    with who.context.store.writing() as session:
        before = session.scalar(
            sqlalchemy.select(Resource).where(Resource.name == row.name).execution_options(removed=True))
        groups = {group.name for group in who.context.monitor.groups()}
        if (before and before.origin != REMOVED) or row.name in groups:
            raise ApiError("there is a resource or group of this name already", 409, {"name": "is taken"})
        if before and before.hostname == row.hostname:      # it comes back, with its history
            address = "port", "username"
            row.id = before.id
            row.host_key = before.host_key if before.digest(*address) == row.digest(*address) else None
        elif before:
            session.delete(before)
            session.flush()
        session.merge(row)
        who.note(session, "added", row.name)
        note_other_way(who, session, row.name)
    return show_resource(who, row.name)


def names_taken(who: Principal, session: Session) -> set[str]:
    """Names of resources, of those whose history is kept, too, and of groups."""
    every = session.scalars(sqlalchemy.select(Resource.name).execution_options(removed=True))
    return {*every, *(group.name for group in who.context.monitor.groups())}


def change_resource(who: Principal, name: str, body: Mapping[str, Any], form: Document | None = None) -> ResourceView:
    """Changes what is given; null stands for the default. Another host, port or username needs the password again; so
    do others that lead through it."""
    with who.context.store.writing() as session:
        row, inventory = changeable(who, session, name), who.context.imported
        before, place = stated(row, inventory), (row.name, row.hostname, row.port, row.way)
        if body.get("name", name) != name and (new := SettingsReader(inventory, form).read(body, before).name) != name:
            if why := "is taken" if new in names_taken(who, session) else named_by(session, name):
                raise ApiError(f"{name} cannot be called {new}", 409, {"name": why})
            rename_row(session, row, who.context.vault, new)
            who.note(session, f"renamed, before {name}", new)
            name, before = new, {**before, "name": new}
        with keeping_word(session, row):
            changed = apply_settings(who.context, row, body, form)
        if place != (row.name, row.hostname, row.port, row.way):
            note_other_way(who, session, name)
        if changed:
            after = stated(row, inventory)
            fields = {field for field in before.keys() | after.keys() if before.get(field) != after.get(field)}
            who.note(session, f"changed: {', '.join(sorted(fields | (body.keys() & set(SECRETS))))}", name)
    return show_resource(who, name)


def remove_resource(who: Principal, name: str) -> None:
    """Removes a resource and its history."""
    with who.context.store.writing() as session:
        row = changeable(who, session, name)
        forget_seen(who, session, row, "removed")
        session.delete(row)
        who.note(session, "removed", name)


def test_settings(who: Principal, body: Mapping[str, Any], form: Document | None = None,
                  row: Resource | None = None) -> TrialView:
    """Polls a resource once that is not added yet."""
    row = row or Resource(id=0)
    apply_settings(who.context, row, body, form)
    target = target_of(row, who.context.vault)
    if target.fault:
        raise UsageError(target.fault[1])
    timeout = min(target.settings.timeout, TRIAL_TIMEOUT)
    target = replace(target, settings=target.settings.model_copy(update={"timeout": timeout}))
    begun_mono = time.monotonic()
    trial = replace(who.context.connections, is_trial=True, keeps=False, records={})
    connection = CONNECTIONS[target.settings.platform](target, trial.guard_of(target), trial)
    verdict, _ = poll_once(target, connection, None)
    learned = None if connection.host_key == target.host_key else connection.host_key
    return TrialView(**vars(verdict), seconds=time.monotonic() - begun_mono, host_key=learned)


def test_changes(who: Principal, name: str, body: Mapping[str, Any], form: Document | None = None) -> TrialView:
    """Polls a resource once with changed settings that are not stored."""
    with who.context.store.reading() as session:
        row = changeable(who, session, name)
    return test_settings(who, body, form, row)      # which changes no more than this copy of it


def poll_now(who: Principal, name: str) -> CheckView:
    """Polls a resource now and waits for the result."""
    with who.context.store.reading() as session:
        find_resource(session, name)
    if not who.context.monitor.catch_up():
        raise ApiError("the settings as they are now are not watched yet; try again", 504)
    report = who.context.monitor.poll_now(name, POLL_NOW_TIMEOUT)
    if report is None:
        raise ApiError(f"there is no result after {POLL_NOW_TIMEOUT:.0f} s; the poll goes on", 504)
    return CheckView(**vars(report.verdict), seconds=report.seconds, kept=report.kept)


class Push(Settings):
    """What a resource says of itself."""

    healthy: bool
    reason: Annotated[str, Field(max_length=PROBLEM_CHARS)] = ""


def push(who: Principal, name: str, body: Mapping[str, Any]) -> None:
    """Takes what a resource of `platform: push` says of itself; its password is the bearer token."""
    given = validated(Push, body)
    sample = Sample({}, {}, None, {}, {"report": Outcome(given.healthy, one_line(given.reason))}, {})
    ends_mono = time.monotonic() + TAKE_TIME
    while (poller := who.context.monitor.pollers.get(name)) and time.monotonic() < ends_mono:
        known = poller.target.settings.secrets.get("password", "").encode()
        connection = who.context.connections.watched.get(name)
        if not isinstance(connection, PushConnection) or not known or not hmac.compare_digest(
                known, who.bearer.encode()):
            break
        if time.monotonic() - connection.heard_mono < PUSH_PAUSE and (given.healthy or not connection.heard):
            if given.healthy is connection.heard:
                return
            raise ApiError("it was unhealthy a moment ago; say that again in a second", 429, retry=PUSH_PAUSE)
        if poller.take(sample):
            connection.heard, connection.heard_mono = given.healthy, time.monotonic()
            return
        time.sleep(TAKE_AGAIN)      # it was replaced just then
    raise ApiError("no resource that pushes has this name and token", 401)


def begin_maintenance(who: Principal, name: str, body: Mapping[str, Any]) -> ResourceView:
    """Lets a resource not count for a while, now or later: it is polled and shown and closes nothing."""
    term, scope = validated(Term, body), Scope(resources=(name,))
    with who.context.store.writing() as session:
        find_resource(session, name)
        if term.times(now := who.context.clock())[0] <= now:    # in place of what holds now
            end_works(who, session, scope, "begun")
        plan_work(who, session, scope, term)
    return show_resource(who, name)


def end_maintenance(who: Principal, name: str) -> None:
    """Lets a resource count again, and cancels what is planned for it by its name."""
    with who.context.store.writing() as session:
        find_resource(session, name)
        ended = end_works(who, session, Scope(resources=(name,)), "begun", "planned")
        other = None if ended else remarks(session, who.context.clock()).maintenance.get(name)
        if other:
            raise ApiError(f"{name} is in maintenance with others ({other.chosen}); end that, number {other.id}", 409)


def acknowledge_resource(who: Principal, name: str, body: Mapping[str, Any]) -> ResourceView:
    """Says that an unhealthy resource has been seen, until it recovers: reminders stop."""
    comment, now = validated(Seen, body).comment, who.context.clock()
    who.context.monitor.flush()     # or a good result of before, written later, would end it
    with who.context.store.writing() as session:
        row = find_resource(session, name)
        known = current_status(row, session.get(Status, row.id), who.context)
        if not is_sick(known):
            raise ApiError(f"{name} is not unhealthy by itself", 409)
        session.merge(Acknowledgement(resource_id=row.id, at=now, actor=who.name, comment=comment))
        record_event(session, "acknowledgement", f"seen: {comment}", resource=name, state="begun", at=now,
                     **who.signature)
    return show_resource(who, name)


def trust_resource(who: Principal, name: str, body: Mapping[str, Any]) -> ResourceView:
    """Trusts the key that the host shows now; with `host_key` only that one."""
    wanted = validated(Trust, body).host_key
    offered = who.context.offered_key(name)
    if wanted not in (None, offered):
        raise ApiError(f"the host shows another key: {offered}", 409,
                       {"host_key": "is not the one that the host shows"})
    with who.context.store.writing() as session:
        row = find_resource(session, name)
        who.note(session, f"trusted {offered}, before {row.host_key or 'no key'}", name)
        row.host_key = offered
    return show_resource(who, name)


class SamplesQuery(Settings):
    since: AwareDatetime | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 60


def list_of(name: str, fields: Mapping[str, Any]) -> Any:
    """The type of a list of what has these fields, as the API gives it; `at` is a time then."""
    given = {field: (datetime.datetime if field == "at" else kind, ...) for field, kind in fields.items()}
    return GenericAlias(list, (create_model(name, __base__=Settings, **cast(Any, given)),))


PAST_POLLS = list_of("PastPollView", type_hints(PastPoll))
PAST_EVENTS = list_of("EventView", {"id": int, "at": float, **dict.fromkeys((
    "kind", "resource", "group", "state", "text", "actor", "address"), str)})


def list_samples(who: Principal, name: str, query: Mapping[str, Any]) -> list[PastPoll]:
    """The last polls of a resource, oldest first."""
    asked = validated(SamplesQuery, query, text=True)
    with who.context.store.reading() as session:
        return samples(session, find_resource(session, name).id, who.context.clock(), limit=asked.limit,
                       since=asked.since.timestamp() if asked.since else 0.0)


class EventsQuery(Settings):
    resource: str | None = None
    kind: str | None = None
    before: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None      # the id of an event
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


def list_events(who: Principal, query: Mapping[str, Any]) -> list[Event]:
    """Transitions and changes, newest first."""
    with who.context.store.reading() as session:
        return events(session, **dict(validated(EventsQuery, query, text=True)))


def list_incidents(who: Principal, query: Mapping[str, Any]) -> list[Incident]:
    """When the site, groups and routes were closed, newest first; also as CSV."""
    asked = validated(IncidentsQuery, query, text=True)
    with who.context.store.reading() as session:
        return incidents(session, group=asked.group, since=asked.since.timestamp() if asked.since else 0.0,
                         limit=asked.limit)


def show_uptime(who: Principal, query: Mapping[str, Any]) -> list[UptimeView]:
    """For how much of day, week, month and 90 days the site, a group or a route was open; also as CSV."""
    asked, now = validated(UptimeQuery, query, text=True), who.context.clock()
    with who.context.store.reading() as session:
        return [UptimeView.model_validate(dict(zip(UptimeView.model_fields, (
            span, percent, *refusals(session, asked.group, now - UPTIMES[span] * DAY)), strict=True)))
            for span, percent in uptime(session, asked.group, now).items()]


@dataclass(frozen=True)
class Route:
    """One method of one path, who may use it, and what answers. An operation of the API has more: its `run` takes who
    asks, the names in the path and, where `body` says what it must be, the body of the request or, with GET, its
    query."""

    method: str
    path: str
    needs: Literal["public", "", "viewer", "admin"]     # "": every operator, logged in or not
    run: Callable[..., Any]
    answer: Any = None                      # the model of what comes back, read by attributes; None: nothing, with 204
    body: type[Settings] | None = None
    status: int = 200
    restricted: bool = False    # also while the documented password is to be changed first
    by_login: bool = False      # not with a named token, which could prolong itself, or its bearer's stay, with this

    @property
    def key(self) -> str:
        return f"{self.method} {self.path}"

    @functools.cached_property
    def adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.answer)


RESOURCE = API + "resources/<name>"
OPERATIONS = (
    Route("POST", API + "login", "", log_in, TokenView, Credentials),
    Route("POST", API + "password", "viewer", change_password, None, PasswordChange, restricted=True,
          by_login=True),
    Route("GET", API + "sessions", "viewer", list_sessions, list[SessionView]),
    Route("DELETE", API + "sessions/<id>", "viewer", end_session, by_login=True),
    Route("GET", API + "tokens", "viewer", list_tokens, list[NamedTokenView]),
    Route("POST", API + "tokens", "viewer", make_token, TokenView, OwnToken, status=201, by_login=True),
    Route("DELETE", API + "tokens/<id>", "viewer", revoke_token, by_login=True),
    Route("GET", API + "gate", "viewer", show_gate, GateView),
    Route("POST", API + "gate", "admin", override_gate, GateView, GateChange),
    Route("GET", API + "groups", "viewer", list_groups, list[GroupState]),
    Route("GET", API + "resources", "viewer", list_resources, list[ResourceView]),
    Route("POST", API + "resources", "admin", add_resource, ResourceView, ResourceSettings, status=201),
    Route("GET", RESOURCE, "viewer", show_resource, ResourceView),
    Route("PATCH", RESOURCE, "admin", change_resource, ResourceView, ResourceSettings),
    Route("DELETE", RESOURCE, "admin", remove_resource),
    Route("POST", API + "test", "admin", test_settings, TrialView, ResourceSettings),
    Route("POST", RESOURCE + "/test", "admin", test_changes, TrialView, ResourceSettings),
    Route("POST", RESOURCE + "/check", "admin", poll_now, CheckView),
    Route("POST", API + "push/<name>", "", push, None, Push),
    Route("POST", RESOURCE + "/maintenance", "admin", begin_maintenance, ResourceView, Term),
    Route("DELETE", RESOURCE + "/maintenance", "admin", end_maintenance),
    Route("GET", API + "maintenance", "viewer", list_work, list[MaintenanceView]),
    Route("POST", API + "maintenance", "admin", start_work, MaintenanceView, Order, status=201),
    Route("DELETE", API + "maintenance/<number>", "admin", cancel_work),
    Route("POST", RESOURCE + "/acknowledgement", "admin", acknowledge_resource, ResourceView, Seen),
    Route("DELETE", RESOURCE + "/acknowledgement", "admin", end_acknowledgement),
    Route("POST", RESOURCE + "/trust", "admin", trust_resource, ResourceView, Trust),
    Route("GET", RESOURCE + "/samples", "viewer", list_samples, PAST_POLLS, SamplesQuery),
    Route("GET", API + "events", "viewer", list_events, PAST_EVENTS, EventsQuery),
    Route("GET", API + "incidents", "viewer", list_incidents, list[IncidentView], IncidentsQuery),
    Route("GET", API + "uptime", "viewer", show_uptime, list[UptimeView], UptimeQuery),
    Route("GET", API + "users", "admin", list_users, list[UserView]),
    Route("POST", API + "users", "admin", add_user, UserView, NewUser, status=201, by_login=True),
    Route("PATCH", API + "users/<name>", "admin", change_user, UserView, UserChange, by_login=True),
    Route("DELETE", API + "users/<name>", "admin", remove_user, by_login=True),
)


# === API =====================================================================
# The JSON API: what serves an operation, the description in OpenAPI, made of the same table, and what each request to
# the console must pass: an address of the operators, a login, a page of ours as its sender, a role. Runs in the
# console's threads. What is refused leaves as application/problem+json.
# Gives: add_security_headers, API_ROUTES, authorize, client_address, current_principal, give_cookie, is_same_origin,
# problem
SEEN_INTERVAL = 60.0            # seconds after which a request is noted as a session's last one
COOKIE = "healthchecker_session"
CONTENT_SECURITY_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                           "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
FORMULA = re.compile(r"(^|;)(?=\s*[=+@\uff1d\uff0b\uff0d\uff20-])")   # in a spreadsheet; some end a cell at ;


class Problem(Settings):
    """RFC 9457."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    errors: list[dict[Literal["field", "message"], str]] = []


def content(kind: str, schema: Any) -> dict[str, Any]:
    """A body in OpenAPI; nothing where there is none."""
    return {"content": {kind: {"schema": schema}}} if schema else {}


def serves_csv(operation: Route) -> bool:
    return operation.body is not None and "format" in operation.body.model_fields


def describe(operation: Route, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    answer, body = (schemas.get((operation.key, mode)) for mode in ("serialization", "validation"))
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                  for name in re.findall("<(.+?)>", operation.path)]
    described: dict[str, Any] = {} if operation.needs else {"security": []}
    if operation.method == "GET" and operation.body:
        fields = operation.body.model_json_schema()["properties"]
        parameters += [{"name": name, "in": "query", "schema": field} for name, field in fields.items()]
    elif body:
        described["requestBody"] = {"required": True, **content("application/json", body)}
    right = {"description": "Done", **content("application/json", answer)}
    if serves_csv(operation):
        right["content"] |= content("text/csv", {"type": "string"})["content"]
    wrong = {"description": "Refused", **content("application/problem+json", schemas["problem", "serialization"])}
    return described | {"summary": (operation.run.__doc__ or "").partition("\n")[0], "parameters": parameters,
                        "responses": {str(operation.status if answer else 204): right, "default": wrong}}


@functools.cache
def openapi() -> dict[str, Any]:
    adapters: list[Any] = [("problem", "serialization", TypeAdapter(Problem))]
    for operation in OPERATIONS:
        adapters += [(operation.key, mode, TypeAdapter(model)) for mode, model in (
            ("serialization", operation.answer), ("validation", operation.body)) if model]
    schemas, components = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")
    sent = components["$defs"]["ResourceSettings"]
    del sent["required"]        # nothing is where the inventory has defaults, and null stands for the default
    for name, field in list(sent["properties"].items()):
        if name in INVENTORY_ONLY:
            del sent["properties"][name]
        elif {"type": "null"} not in field.get("anyOf", ()):
            sent["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    paths: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for operation in OPERATIONS:
        path = re.sub("<(.+?)>", r"{\1}", operation.path)
        paths[path][operation.method.lower()] = describe(operation, schemas)
    return {"openapi": "3.1.0", "info": {"title": "HealthChecker", "version": "1"}, "paths": paths,
            "security": [{"bearer": []}, {"session": []}],
            "components": {"schemas": components["$defs"], "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": COOKIE}}}}


# --- requests ---
def current_principal() -> Principal:
    return cast(Principal, flask.g.principal)


def client_address(environ: WSGIEnvironment) -> Address:
    """The client's address; 0.0.0.0 is nobody's."""
    with contextlib.suppress(ValueError):
        return plain_address(environ.get("REMOTE_ADDR", ""))
    return ipaddress.IPv4Address(0)


def identify(context: ConsoleContext, request: flask.Request, *, by_login: bool = True) -> Principal:
    """Who it is, `by_login` or by the address alone, which no database has to be there for. A bearer token counts
    before a cookie, other schemes are somebody else's: of a proxy, for instance. Nobody looks into those: what cannot
    be read there makes werkzeug's own parser raise."""
    stranger = Principal(context, str(client_address(request.environ)))
    by_cookie, token = True, request.cookies.get(COOKIE)
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        by_cookie, token = False, bearer.strip()
        stranger = replace(stranger, bearer=token)
    if not token or not by_login:
        return stranger
    query = sqlalchemy.select(LoginSession, User).join(User).where(
        LoginSession.token_hash == token_hash(token), (LoginSession.kind == "session") == by_cookie,
        live_sessions(context.clock()))
    with context.store.reading() as session:
        found = session.execute(query).first()
    return replace(stranger, session=found[0], user=found[1]) if found else stranger


def note_seen(who: Principal) -> None:
    """A page that refreshes itself is no activity; of a named token each request is, with where it came from."""
    now, login = who.context.clock(), who.session
    named = login is not None and login.kind == "named"
    if login and now - login.seen_at > SEEN_INTERVAL and (named or "X-Refresh" not in flask.request.headers):
        seen = {"seen_at": now, "address": who.address if named else login.address}
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError), who.context.store.writing() as session:
            # a full disk can still be read
            session.execute(sqlalchemy.update(LoginSession).values(seen).where(
                LoginSession.token_hash == login.token_hash, LoginSession.seen_at == login.seen_at))


def is_same_origin(request: flask.Request) -> bool | None:
    """Whether a page of this service sent the request; None when its sender does not say."""
    fetch_site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if fetch_site:
        return fetch_site == "same-origin"
    return origin == f"{request.scheme}://{request.host}" if origin else None


def authorize(context: ConsoleContext, routes: Mapping[str, Route]) -> None:
    """Stands before every request. Raises ApiError for those who may not."""
    request = flask.request
    route = routes.get(request.endpoint or "")
    needs = route.needs if route else "viewer"
    who = flask.g.principal = identify(context, request, by_login=needs in ("viewer", "admin"))
    if needs == "public":
        return
    if not who.operator:
        raise ApiError("the console does not answer this address", 403)
    if needs and who.user is None:
        raise ApiError("this token is not known, or over: log in first" if who.bearer else "log in first", 401)
    by_cookie = bool(who.session and who.session.kind == "session")     # another site's page may send it, too
    if request.method not in SAFE_METHODS and is_same_origin(request) in ((False, None) if by_cookie else (False,)):
        raise ApiError("this request does not come from a page of this service", 403)
    if who.restricted and not (route and route.restricted):
        raise ApiError("change the documented password first: it opens nothing else", 403)
    if needs and not who.may(needs):
        raise ApiError("only an admin may do this", 403)
    if who.session and who.session.kind == "named" and (
            (route and route.by_login) or not request.path.startswith(API)):
        raise ApiError("not with an API token: log in with the password", 403)
    note_seen(who)


def give_cookie(response: Response, token: str) -> Response:
    """Sets the session's cookie, or takes it away; the application behind the gate never sees it."""
    response.set_cookie(COOKIE, token, max_age=None if token else 0, path=PREFIX, secure=flask.request.is_secure,
                        httponly=True, samesite="Strict")
    return response


def add_security_headers(response: Response) -> Response:
    """Stands behind every request."""
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"     # with no-referrer, forms would send `Origin: null`
    return response


def json_body() -> dict[str, Any]:
    """The body of the request, an object. Raises ApiError."""
    raw = flask.request.get_data(cache=False)
    if raw and flask.request.mimetype != "application/json":
        raise ApiError("the body must be application/json", 415)
    try:
        body = from_json(raw or b"{}", allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError("the body must be an object")
    return body


def csv_text(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> str:
    """RFC 4180; what a spreadsheet would take for a formula is text there, too: hosts have written some of it."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*names])
    writer.writeheader()
    writer.writerows({name: FORMULA.sub(r"\1'", value) if isinstance(value, str) else value
                      for name, value in row.items()} for row in rows)
    return file.getvalue()


def perform(operation: Route, **names: str) -> flask.typing.ResponseReturnValue:
    taken = [flask.request.args.to_dict() if operation.method == "GET" else json_body()] if operation.body else []
    found = operation.run(current_principal(), *names.values(), *taken)
    if operation.answer is None:
        return flask.Response(status=204, content_type="")
    answer = operation.adapter.validate_python(found, from_attributes=True)
    if serves_csv(operation) and flask.request.args.get("format", flask.request.accept_mimetypes.best_match(
            ["application/json", "text/csv"], "json")) in ("csv", "text/csv"):
        text = csv_text(operation.adapter.dump_python(answer, mode="json"), get_args(operation.answer)[0].model_fields)
        name = {"Content-Disposition": f"attachment; filename={operation.path.rpartition('/')[2]}.csv"}
        return flask.Response(text, operation.status, name, mimetype="text/csv")
    content = operation.adapter.dump_json(answer, warnings=False)   # they are of damaged rows
    return flask.Response(content, operation.status, mimetype="application/json")


HEALTH_STATUS = {"healthy": "pass", "unhealthy": "fail"}    # anything else: warn


def observed(kind: str, value: str, output: str, **more: Any) -> list[dict[str, Any]]:
    return [{"componentType": kind, "observedValue": value, "output": output,
             "status": HEALTH_STATUS.get(value, "warn"), **more}]


def health() -> flask.typing.ResponseReturnValue:
    """application/health+json; the resources only for those who are logged in."""
    who = identify(current_principal().context, flask.request)
    answer: dict[str, Any] = {"status": "pass" if who.context.is_healthy else "fail"}
    if who.operator and who.may("viewer") and not who.restricted:
        answer["releaseId"] = VERSION
        checks = answer["checks"] = {f"{view.name}:state": observed(
            "system", view.state, caused(view.cause, view.reason), time=view.polled and view.polled.isoformat())
            for view in list_resources(who)}
        checks |= {f"{group.name}:state": observed("component", group.state, group.why) for group in list_groups(who)}
        if override := who.context.monitor.override.now:
            checks["gate:override"] = observed("component", override.action, override.why)
        if who.context.lease.observes.value:
            checks["gate:mode"] = observed("component", "observe", "nothing is refused")
    return answer, 200 if who.context.is_healthy else 503, {"Content-Type": "application/health+json"}


def problem(error: ApiError) -> flask.typing.ResponseReturnValue:
    errors = [{"field": name, "message": text} for name, text in error.fields.items()]
    return {"type": "about:blank", "title": http.HTTPStatus(error.status).phrase, "status": error.status,
            "detail": str(error), "errors": errors}, error.status, {"Content-Type": "application/problem+json"}


API_ROUTES = (
    Route("GET", "/-/livez", "public", lambda: flask.Response("ok\n", mimetype="text/plain")),
    Route("GET", HEALTH, "public", health),
    Route("GET", API + "openapi.json", "viewer", openapi),
    *(replace(operation, run=functools.partial(perform, operation)) for operation in OPERATIONS),
)


# === Metrics =================================================================
# What Prometheus reads: the gate and the totals of all workers for the operators' networks; with the bearer token of
# service.metrics_token_file, from anywhere, every resource too. In come the lease, the workers' counters in shared
# memory and the rows that the recorder writes; out goes a text. Runs in the console's threads.
# Gives: Metrics, read_token, ServingMetrics
METRICS_AGE = 1.0               # seconds for which the resources' part of /-/metrics is not made again


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"healthchecker_{name}", text, value)


def labelled(kind: Callable[..., Metric], name: str, text: str, labels: str, found: Iterable[Sequence[Any]]) -> Metric:
    """A metric of ours; each of what was found is a word for each label, and a value."""
    family: Any = kind(f"healthchecker_{name}", text, labels=labels.split())
    for *words, value in found:
        family.add_metric(words, value)
    return cast(Metric, family)


@dataclass(frozen=True)
class ServingMetrics:
    """What anyone may see: the gate and totals of all workers; nothing about a resource, not even how many there are.
    prometheus-client calls this a collector."""

    lease: Lease
    counters: Counters
    clock: Callable[[], float] = lease_clock

    def collect(self) -> Iterator[Metric]:
        left = max(0.0, self.lease.until.value - self.clock())
        cells, open_connections = self.counters.totals(), [n for n in self.counters.held if n >= 0]
        yield gauge("gate_open", "1 while the gate is open: requests reach the application.", float(left > 0))
        yield gauge("gate_observes", "1 in mode observe: a closed gate refuses nothing.", self.lease.observes.value)
        yield labelled(GaugeMetricFamily, "gate_override", "1 while an operator has opened or closed the gate.",
                       "action", ((action, self.lease.by_hand.value == value)
                                  for action, value in (("open", 1), ("close", -1))))
        yield gauge("lease_seconds", "Seconds until the gate closes unless a poll renews the lease.", left)
        yield gauge("workers", "Processes that serve.", len(open_connections))
        yield gauge("connections", "Open client connections.", sum(open_connections))
        yield gauge("queue_requests", "Requests that wait for a pool thread.", cells[QUEUED])
        yield CounterMetricFamily("healthchecker_connections_accepted", "Client connections ever.", cells[ACCEPTED])
        yield CounterMetricFamily("healthchecker_would_refuse", "Requests that mode observe let pass.",
                                  sum(cells[cell] for cell in self.counters.routes.values()))
        yield labelled(CounterMetricFamily, "requests", "Requests by outcome.", "outcome", (
            (outcome, sum(cells[begin: begin + ROW - 1])) for outcome, begin in ROWS.items()))
        seconds = HistogramMetricFamily("healthchecker_request_duration_seconds", labels=["outcome"], documentation=(
            "From a request that is complete to its answer in the send buffer, the wait for a thread included."))
        for outcome, begin in ROWS.items():
            counts = itertools.accumulate(cells[begin: begin + ROW - 1])
            seconds.add_metric([outcome], [*zip(map(str, (*LATENCIES, "+Inf")), counts, strict=True)],
                               cells[begin + ROW - 1])
        yield seconds


# What a resource shows: text and labels besides its name.
RESOURCE_METRICS: Mapping[str, tuple[str, ...]] = {
    "state": ("1 for the state that the resource is in, 0 for the others.", "state"),
    "cause": ("1 for the cause of its state, where there is one.", "cause"),
    "maintenance": ("1 while the resource does not count.",),
    "acknowledged": ("1 while somebody has seen that it is unhealthy.",),
    "poll_duration_seconds": ("How long the last poll took.",),
    "last_poll_timestamp_seconds": ("Unix time of the last result.",),
    "cpu_percent": ("Busy share of the CPUs between the last two polls.",),
    "memory_percent": ("Used share of the memory.",),
    "swap_percent": ("Used share of the swap space.",),
    "commit_percent": ("Promised share of what Windows can promise of memory and page files.",),
    "disk_percent": ("Used share of a filesystem.", "mount"),
    "inode_percent": ("Used share of a filesystem's inodes.", "mount"),
    "load_per_cpu": ("Load average per CPU.",),
    "response_seconds": ("Seconds from the look-up of the name to the end of the answer.",),
    "certificate_days": ("Days for which the certificate is valid.",),
    "uptime_seconds": ("Seconds since the machine started.",),
    "service_good": ("1 for a service that runs.", "service"),
    "check_good": ("1 for a check that passed.", "check"),
}


def resource_metrics(row: Any, standing: Any, more: Remarks) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """All of one resource, a row of METRIC_ROWS, and how it stands: keys of RESOURCE_METRICS, with values of the
    labels. What was not read is left out and never 0; a host may send words where a number belongs."""
    for state in get_args(State):
        yield "state", (state,), state == (standing.state or "unknown")
    yield "maintenance", (), row.name in more.maintenance
    yield "acknowledged", (), row.name in more.seen
    if standing.cause:
        yield "cause", (standing.cause,), 1.0
    if row.polled_at:
        yield "poll_duration_seconds", (), row.seconds
        yield "last_poll_timestamp_seconds", (), row.polled_at
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):   # of a damaged row
            sample = from_json(row.sample) or NO_SAMPLE
            for key, value in (*sample["details"].items(), *sample["metrics"].items()):
                name, *part = key.split(" ", 1)
                if len(part) == len(RESOURCE_METRICS.get(name, ())) - 1 and isinstance(value, float):
                    yield name, tuple(part), value
            for kind in ("service", "check"):
                for name, outcome in sample[f"{kind}s"].items():
                    yield f"{kind}_good", (name,), outcome["good"]


METRIC_ROWS = RESOURCES.with_only_columns(Resource.name, Status.state, Status.cause, Status.polled_at, Status.seconds,
                                          Status.sample).order_by(Resource.name)
TOKEN_ROWS = sqlalchemy.select(User.username, LoginSession.name, LoginSession.expires_at).where(
    LoginSession.user_id == User.id, LoginSession.kind == "named", LoginSession.expires_at < NEVER)


def read_token(path: Path) -> bytes:
    """The bearer token in `service.metrics_token_file`; raises UsageError."""
    try:
        with open(path, "rb") as file:
            token = file.read(SECRET_LENGTH + 1).removeprefix(b"\xef\xbb\xbf").strip()
    except OSError as error:
        raise UsageError(f"service.metrics_token_file {path} cannot be read: {error.strerror}") from error
    if not re.fullmatch(rb"[!-~]{1,%d}" % SECRET_LENGTH, token):
        raise UsageError(f"service.metrics_token_file {path} is empty or not one word of ASCII; "
                         "put a long random word into it")
    return token


class Metrics:
    """The answer of /-/metrics, and the collector of what the bearer of the token sees besides: every resource, from
    the rows that the recorder writes. That part serves for METRICS_AGE seconds: scrapes cannot load the machine."""

    def __init__(self, serving: ServingMetrics, store: Store, token_file: Path | None,
                 connections: ConnectionContext, monitor: Monitor | None = None) -> None:
        self._serving, self._store, self._token_file, self._connections = serving, store, token_file, connections
        self._monitor = monitor
        self._complaint = ""        # the last one about the token file
        self._lock = threading.Lock()       # guards these two, so that who asks meanwhile waits for the same text
        self._made, self._text = -math.inf, b""

    def answer(self, authorization: str, *, operator: bool) -> flask.Response:
        """The whole answer; takes 0.1 s for 1,000 resources. Raises ApiError."""
        scheme, _, token = authorization.partition(" ")
        bearer = scheme.lower() == "bearer"
        if bearer and not self._admits(token.strip()):
            return flask.Response("wrong token\n", 401, {"WWW-Authenticate": 'Bearer realm="metrics"'},
                                  mimetype="text/plain")
        if not bearer and not operator:
            raise ApiError("the console does not answer this address", 403)
        text = generate_latest(self._serving) + (self._resource_text() if bearer else b"")
        return flask.Response(text, content_type="text/plain; version=0.0.4; charset=utf-8")

    def _admits(self, token: str) -> bool:
        """Reads the file each time, so that a new token counts at once; one that cannot be read admits nobody."""
        wanted, complaint = b"", ""
        try:
            wanted = read_token(self._token_file) if self._token_file else b""
        except UsageError as error:
            complaint = str(error)
        if complaint not in ("", self._complaint):
            log.error("%s", complaint)
        self._complaint = complaint
        return hmac.compare_digest(wanted, token.encode("utf-8", "replace")) and bool(wanted)

    def _resource_text(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._made > METRICS_AGE:
                self._text = generate_latest(self)
                self._made = time.monotonic()
            return self._text

    def collect(self) -> Iterator[Metric]:
        with self._store.reading() as session:
            rows, more = session.execute(METRIC_ROWS).all(), remarks(session, self._store.wall())
            tokens = session.execute(TOKEN_ROWS).all()
            receivers = session.scalars(sqlalchemy.select(Receiver).where(Receiver.is_told)).all()
        standings = [(row.state and self._monitor and self._monitor.behind(row.name)) or row for row in rows]
        states = collections.Counter(standing.state or "unknown" for standing in standings)
        yield labelled(GaugeMetricFamily, "resources", "Resources by state.", "state", (
            (state, states[state]) for state in get_args(State)))
        families = {name: GaugeMetricFamily(f"healthchecker_resource_{name}", text, labels=("resource", *labels))
                    for name, (text, *labels) in RESOURCE_METRICS.items()}
        for row, standing in zip(rows, standings, strict=True):
            for name, labels, value in resource_metrics(row, standing, more):
                families[name].add_metric((row.name, *labels), value)
        yield from families.values()
        groups = self._monitor.groups() if self._monitor else []
        yield labelled(GaugeMetricFamily, "group_healthy", "1 while a group or a route is healthy.", "group", (
            (group.name, group.state != "unhealthy") for group in groups))
        yield labelled(GaugeMetricFamily, "group_healthy_members", "Members of a group or a route that are healthy.",
                       "group", ((group.name, sum(group.members.values())) for group in groups))
        counters = self._serving.counters
        yield labelled(CounterMetricFamily, "route_would_refuse", "Requests of a route that mode observe let pass.",
                       "route", ((path, counters.total(cell)) for path, cell in counters.routes.items() if path))
        is_cut = bool(self._monitor and self._monitor.uplink.cut)
        yield gauge("cut_off", "1 while no uplink answers, nor do more than half of the machines.", float(is_cut))
        watched = dict(self._connections.watched)
        yield labelled(CounterMetricFamily, "logins", "Logins by outcome.", "resource outcome", (
            (name, outcome, count) for name, connection in watched.items()
            for outcome, count in sorted(connection.record.outcomes.items())))
        held = sum(connection.keeper.session is not None for connection in watched.values())
        yield labelled(GaugeMetricFamily, "host_connections", "Resources by whether a connection stays open between "
                       "polls.", "kept", (("true", held), ("false", len(watched) - held)))
        yield CounterMetricFamily("healthchecker_second_tries", "Polls that began again on a new connection.",
                                  sum(record.second_tries for record in list(self._connections.records.values())))
        yield labelled(GaugeMetricFamily, "api_token_expires_timestamp_seconds", "Unix time of an API token's end.",
                       "user token", tokens)
        yield labelled(CounterMetricFamily, "notifications", "Messages that were delivered, or given up after an hour "
                       "of tries.", "receiver result", ((row.name, result, getattr(row, result)) for row in receivers
                                                        for result in ("delivered", "failed")))


# === Charts ==================================================================
# Drawings of the console: readings, polls, limits and events come in, markup goes out, of numbers, our own words and
# escaped ones; nothing here asks the database or the request. Runs in the console's threads.
# Gives: bar_svg, chart_svg, LimitValues, marks_of, scale_top, strip_svg, table_rows
LimitValues = Mapping[str, Any]     # `warn` and `fail` of a limit, as JSON has them
TABLE_ROWS = 12                 # of the table beside a chart
CROSSED = {"fail": "unhealthy", "warn": "degraded"}     # which state a reading makes that is above a limit


def limit_marks(limit: LimitValues, top: float, line: str) -> str:
    """The limits drawn across a picture of 100 by 100; `line` is a path with {} for where."""
    return "".join(f'<path class="limit {state}" d="{line.format(round(100 * limit[kind] / top, 1))}"/>'
                   for kind, state in CROSSED.items() if limit.get(kind) is not None)


def table_rows(points: Sequence[Point], begin: float, end: float) -> list[Point]:
    """What a chart shows, in TABLE_ROWS parts at most, for those who read it as a table."""
    parts = itertools.groupby(points, lambda point: int(TABLE_ROWS * (point.at - begin) / (end - begin)))
    return [Point(part[0].at, sum(point.average for point in part) / len(part), min(point.minimum for point in part),
                  max(point.maximum for point in part)) for part in (list(part) for _, part in parts)]


def svg(kind: str, size: str, content: str, label: str = "") -> Markup:
    """A picture that stretches, `size` in its own units; without a label it is hidden from screen readers."""
    role = f'role="img" aria-label="{label}"' if label else 'aria-hidden="true"'
    return Markup(f'<svg class="{kind}" viewBox="0 0 {size}" preserveAspectRatio="none" {role}>'   # noqa: S704
                  f"{content}</svg>")   # made of numbers and of our own words


def bar_svg(value: float, limit: LimitValues, top: float = 100.0) -> Markup:
    """A reading as a bar from 0 to `top` with its limits marked; the colour says which of them it crossed."""
    width = round(100 * min(value / top, 1), 1)
    crossed = [state for kind, state in CROSSED.items() if limit.get(kind) is not None and value > limit[kind]]
    return svg("bar", "100 8", f'<path d="M0 4h100"/><path class="{[*crossed, "healthy"][0]}" d="M0 4h{width}"/>'
               + limit_marks(limit, top, "M{} 0v8"))


@functools.lru_cache(1024)      # most are the same
def strip_svg(strip: str, what: str = "Last polls") -> Markup:
    """The last polls, or what else has their marks, as ticks, the newest at the right; one path a state, so that
    thousands of ticks stay small."""
    states = [POLLS.get(mark, ("unknown", ""))[0] for mark in strip]
    paths: dict[str, str] = collections.defaultdict(str)
    at = STRIP - len(states)
    for state, run in itertools.groupby(states):
        length = len(list(run))
        paths[state] += f"M{at} 10h{length}"
        at += length
    label = ", ".join(f"{count} {state}" for state, count in collections.Counter(states).items()) or "none yet"
    drawn = "".join(f'<path class="{state}" d="{path}"/>' for state, path in paths.items())
    return svg("strip", f"{STRIP} 20", f'<path d="M0 10h{STRIP}"/>{drawn}', f"{what}: {label}")


def scale_top(values: Iterable[float]) -> float:
    """The upper end of an axis that holds all values: 1, 2 or 5 times a power of ten."""
    highest = max(values, default=1.0) or 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= highest)


def unbroken(points: Sequence[Point]) -> Iterator[Sequence[Point]]:
    """The stretches without a hole: time without samples is left blank and never drawn over."""
    steps = sorted(after.at - before.at for before, after in itertools.pairwise(points))
    longest = 3 * steps[len(steps) // 2] if steps else 0.0
    begin = 0
    for index in range(1, len(points) + 1):
        if index == len(points) or points[index].at - points[index - 1].at > longest:
            yield points[begin:index]
            begin = index


class Mark(NamedTuple):
    """Something that happened to a resource: a moment or, of maintenance, a time; both ends are Unix times."""

    state: str
    at: float
    until: float
    text: str


def marks_of(found: Iterable[Event], begin: float, end: float) -> Iterator[Mark]:
    """What events, the newest first, say of the time from `begin` to `end`: changes of state, and maintenance."""
    until = end
    for event in found:
        if event.kind == "state" and event.at >= begin:
            yield Mark(event.text.partition(" -> ")[2].partition(" ")[0], event.at, event.at, event.text)
        elif (event.kind, event.state) == ("maintenance", "over"):
            until = event.at
        elif (event.kind, event.state) == ("maintenance", "begun") and until > begin:
            yield Mark("maintenance", max(event.at, begin), until, event.text)
            until = event.at


def mark_paths(marks: Iterable[Mark], begin: float, end: float) -> Markup:
    """Marks in a picture of 100 by 100."""
    drawn = Markup()
    for mark in marks:
        at, width = (100 * part / (end - begin) for part in (mark.at - begin, mark.until - mark.at))
        shape = Markup('<path class="mark {}" d="M{:.2f} 0v100h{:.2f}v-100z" data-at="{:.2f}" data-text="{}"/>')
        drawn += shape.format(mark.state, at, width, at, mark.text)
    return drawn


def chart_svg(points: Sequence[Point], limit: LimitValues, span: tuple[float, float], top: float,
              marks: Iterable[Mark] = ()) -> Markup:
    """Averages as a line in the band from minimum to maximum, over a picture of 100 by 100, with the limits and with
    what happened; `span` are the Unix times of its ends."""
    begin, end = span

    def path(at: float, value: float) -> str:
        return f"{100 * (at - begin) / (end - begin):.2f} {100 * min(value / top, 1):.1f}"

    line, band = "", ""
    for stretch in unbroken(points):
        line += "M" + "L".join(path(point[0], point[1]) for point in stretch) + ("h.4" if len(stretch) == 1 else "")
        upper = [path(point[0], point[3]) for point in stretch]
        band += "M" + "L".join(upper + [path(point[0], point[2]) for point in reversed(stretch)]) + "z"
    # From below upwards: the style sheet turns it over.
    return svg("graph", "100 100", '<path d="M0 0h100M0 50h100M0 100h100M25 0v100M50 0v100M75 0v100"/>'
               f'{mark_paths(marks, begin, end)}'
               f'<path class="band" d="{band}"/><path class="line" d="{line}"/>' + limit_marks(limit, top, "M0 {}h100"))


# === Words ===================================================================
# What readings, times and causes are called where people read: values come in, short texts go out, and markup for
# times, which browsers and scripts can read as well.
# Gives: amount, cause_text, duration_text, LABELS, local_time, time_tag, unit_of
LABELS = {"cpu_percent": "CPU", "memory_percent": "Memory", "disk_percent": "Disk", "swap_percent": "Swap",
          "commit_percent": "Commit charge", "inode_percent": "Inodes", "load_per_cpu": "Load per CPU",
          "response_seconds": "Response time", "certificate_days": "Certificate, days", "seconds": "Duration of a poll"}


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: `45 s`, `12 min`, `3 h 20 min`, `4 d 2 h`."""
    minutes, hours, days = (int(seconds // size) for size in (60, 3600, 86_400))
    if days > 0:
        return f"{days} d {hours % 24} h"
    if hours > 0:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes > 0 else f"{max(0, int(seconds))} s"


def amount(metric: str, value: float) -> str:
    if metric.endswith("_percent"):
        return f"{value:.1f} %"
    if metric == "response_seconds":
        return f"{1000 * value:.0f} ms"
    return f"{value:.2f} s" if metric == "seconds" else f"{value:.2f}"


def unit_of(metric: str) -> str:
    return " %" if metric.endswith("_percent") else " s" if metric == "seconds" else ""


def local_time(at: float) -> str:
    """A Unix time as the log writes it, in the server's own time zone, which is named where it is not that of now."""
    then = time.localtime(at)
    zone = "" if then.tm_gmtoff == time.localtime().tm_gmtoff else f" {then.tm_zone}"
    return time.strftime("%Y-%m-%d %H:%M:%S", then) + zone


def time_tag(at: float, text: str = "") -> Markup:
    """A Unix time for people, in the server's time zone or as `text`, and for programs."""
    then = datetime.datetime.fromtimestamp(int(at), datetime.timezone.utc).astimezone()
    told = local_time(at)
    return Markup('<time datetime="{}" title="{} {}">{}</time>').format(
        then.isoformat(), told, then.tzname(), text or told)


def cause_text(cause: str, reason: str) -> str:
    """Why something is as it is, the cause only where the reason does not say it."""
    return reason if cause in ("limit", "check") else caused(cause, reason)


# === Pages ===================================================================
# Templates of the console: settings and rows come in, markup goes out; nothing here asks the database or the request.
# Runs in the console's threads. What hosts and people wrote is escaped by the templates (their keys end in .html).
# Gives: TEMPLATES
TEMPLATES = {"layout.html": """{% macro table(label, heads, class="", without="None.") %}
{% set rows = caller()|trim %}
<table aria-label="{{ label }}" class="{{ class }}">
<thead><tr>{% for name in heads %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{{ rows }}
{%- if not rows %}<tr><td colspan="{{ heads|length }}" class="soft">{{ without }}</td></tr>{% endif %}</tbody>
</table>
{% endmacro %}
{% macro state(name, what="") %}<b class="state {{ name }}">{{ what or name }}</b>{% endmacro %}
{% macro message(id) %}
<div id="{{ id }}" role="alert" data-keep>{% if problem %}<p class="message {{ outcome or 'unhealthy' }}">
{{- problem }}</p>{% endif %}</div>
{% endmacro %}
{% macro chips(label, links, chosen) %}
<nav class="chips" aria-label="{{ label }}">
{% for name, href, text, count in links %}
<a class="{{ name }}" href="{{ href }}"{% if name == chosen %} aria-current="true"{% endif %}>{{ text }}
{% if count is not none %}<b>{{ count }}</b>{% endif %}</a>
{% endfor %}
</nav>
{% endmacro %}
{% macro options(values, chosen) %}
{% for value in values %}
<option value="{{ value }}"{% if value == chosen %} selected{% endif %}>
{{- values[value] if values is mapping else value }}</option>
{% endfor %}
{% endmacro %}
{% macro input(name, label, hint="", type="text", form="") %}
{% set sent = not form or form in given %}{# what another form of the page sent is not this one's #}
{% set error = errors[name] if sent %}
{% set invalid = {"aria-invalid": "true", "aria-describedby": "e-" ~ name} if error else {} %}
<label class="{{ type }}">{{ label }}
{% if type == "textarea" %}
<textarea name="{{ name }}"{{ dict(kwargs, **invalid)|xmlattr }}>
{{ given[name] if sent }}</textarea>
{% else %}
<input type="{{ type }}" name="{{ name }}"{% if type != "password" %} value="{{ given[name] if sent }}"
{%- elif given[name] %} placeholder="not kept: type it again"{% endif %}
{{- dict(kwargs, **invalid)|xmlattr }}>
{% endif %}
{% if hint %}<span class="hint">{{ hint }}</span>{% endif %}
{% if error %}<span class="error" id="e-{{ name }}">{{ error }}</span>{% endif %}
</label>
{% endmacro %}
{% macro password(name, label, hint="") %}
{{ input(name, label, hint, "password", required="", maxlength="1024", minlength="12" if hint,
         autocomplete="new-password" if hint else "current-password") }}
{% endmacro %}
{% macro event_rows(events, own=false, known=()) %}
{% for event in events %}
<tr><td>{{ event.at|time_tag }}</td><td>{{ event.kind }}</td>
{% if not own %}
<td>{% if event.resource %}<a href="{{ event.resource|resource_path if event.resource in known
else "?resource=" ~ event.resource|urlencode }}">{{ event.resource }}</a>{% endif %}</td>
{% endif %}
<td>{{ event.text }}</td><td>{{ event.actor }} <small>{{ event.address }}</small></td></tr>
{% endfor %}
{% endmacro %}
{% macro work_form(action, chosen={}) %}
<details name="action"{% if given.minutes %} open{% endif %}><summary class="button">Maintenance</summary>
<form method="post" action="{{ action }}" data-inline class="panel">
{% if chosen %}
<p>Of <select name="scope" aria-label="Of what">{{ options(chosen, given.scope) }}</select></p>
{% endif %}
<p><label>For <select name="minutes">{{ options({"30": "30 minutes", "60": "1 hour", "240": "4 hours",
"1440": "1 day", "10080": "1 week"}, given.minutes) }}</select></label></p>
{{ input("start", "Beginning", "now, unless said; server time, " ~ zone, "datetime-local") }}
{{ input("reason", "Reason", form="minutes", maxlength="200", required="") }}
<p class="soft">Meanwhile it is polled and shown, and does not close the gate.</p>
<button class="primary">Begin maintenance</button>
</form></details>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% if icon == "unhealthy" and "closed" not in title %}gate closed · {% endif %}
{{- title }} · HealthChecker</title>
<link rel="icon" href="{{ assets[icon ~ ".svg"] }}" type="image/svg+xml">
<link rel="stylesheet" href="{{ assets.css }}">
<script src="{{ assets.js }}" defer></script>
{% if wall %}<noscript><meta http-equiv="refresh" content="5"></noscript>{% endif %}
</head>
<body data-now="{{ now }}" data-offset="{{ offset }}" data-zone="{{ zone }}">
{% if not wall %}
<a class="skip hidden" href="#main">Skip to the content</a>
<header class="top">
<a class="brand" href="/-/">HealthChecker</a>
{% if user %}
<nav aria-label="Pages">
{% for label, href in {"Overview": "/-/", "Incidents": "/-/incidents", "Events": "/-/events",
                       "Users": "/-/users"}.items() if admin or label != "Users" %}
<a href="{{ href }}"{% if request.path == href %} aria-current="page"{% endif %}>{{ label }}</a>
{% endfor %}
</nav>
<div class="who"><a href="/-/password">{{ user.username }}<span class="hidden">: change the password</span></a>
<small>{{ user.role }}</small>
<form method="post" action="/-/logout"><button>Log out</button></form></div>
{% endif %}
</header>
{% endif %}
{% if user.initial %}
<p class="notice"><b>This account still has its documented password</b>, which opens nothing but its own change.</p>
{% endif %}
<p class="notice lost" id="lost" role="alert" data-icon="{{ assets["unknown.svg"] }}" hidden></p>
<main id="main" tabindex="-1"{% if wall %} class="wall {{ icon }}"{% endif %}
{%- if refresh is string %} data-refresh="{{ refresh }}"{% endif %}>
{% if override %}
<section class="message degraded" aria-label="Override">
<p>{{ state("degraded", "Gate " ~ override.why) }}</p>
<p class="soft">since {{ override.at|time_tag }},
{{ "until " ~ override.until|time_tag if override.until else "until that is ended" }}, whatever the resources say</p>
{% if admin %}
<form method="post" action="/-/override" data-inline>
<button name="action" value="auto">Leave the gate to the resources</button></form>
{% endif %}
</section>
{% endif %}
{% if observes %}
<section class="message degraded" aria-label="Mode">
<p>{{ state("degraded", "observe") }}: nothing is refused;
{{ passed }} request{{ "s" if passed != 1 }} would have been</p>
</section>
{% endif %}
{% include page ~ ".html" %}
</main>
{% if user %}<footer class="soft">Times are the server's, {{ zone }}. HealthChecker {{ version }}.</footer>{% endif %}
</body>
</html>
""", "overview.html": """{% set word, colour = ("open", "healthy") if is_open else ("closed", "unhealthy") %}
<h1 class="hidden">Overview</h1>
<section class="gate {{ colour }}" aria-label="Gate">
<h2 aria-live="polite">{{ state(colour, "Gate " ~ word) }}</h2>
{% if last %}
<p>for <b>{{ (now - last.at)|duration_text }}</b>, since {{ last.at|time_tag }}</p>
{% endif %}
{% if blockers %}
<ul>
{% for blocker in blockers[:5] %}
<li>{% if blocker.href %}<a href="{{ blocker.href }}">{{ blocker.name }}</a>
{%- else %}<b>{{ blocker.name }}</b>{% endif %}
 {{ blocker.reason or "no result yet" }}
{%- if blocker.at %} <small>since {{ blocker.at|time_tag }}, for {{ (now - blocker.at)|duration_text }}</small>
{%- endif %}</li>
{% endfor %}
{% if blockers|length > 5 %}
<li><a href="?state=unhealthy">and {{ blockers|length - 5 }} more</a></li>
{% endif %}
</ul>
{% elif last and not is_open %}<p>{{ last.text }}</p>{% endif %}
</section>
{% if groups %}
{% call table("Groups and routes", ("State", "Group or route", "Healthy", "Needed", "Members"), "overview") %}
{% for group in groups %}
<tr class="{{ group.state }}">
<td>{{ state(group.state) }}</td>
<th scope="row">{{ group.name }}{% if group.mode == "observe" %} <i>observe</i>{% endif %}
{%- if group.why and group.name not in said %}<p>{{ group.why }}</p>{% endif %}</th>
<td data-label="Healthy">{{ group.members.values()|sum }} of {{ group.members|length }}</td>
<td data-label="Needed">{{ group.needed }}</td>
<td>{% for name in (group.members|list)[:20] %}<i>{{ name }}</i> {% endfor %}
{%- if group.members|length > 20 %}and {{ group.members|length - 20 }} more{% endif %}</td>
</tr>
{% endfor %}
{% endcall %}
{% endif %}
<div id="work">{% if turns %}
{% call table("Planned maintenance", ("State", "Begins", "For", "What", "Why", "End"), "events") %}
{% for turn in turns[:20] %}
<tr><td>{{ state("maintenance", "runs") if turn.state == "begun" else "ahead" }}</td>
<td>{{ turn.start|time_tag }}</td><td>{{ (turn.until - turn.start)|duration_text }}</td>
<td>{{ turn.scope }}</td><td>{{ turn.reason }} <small>{{ turn.actor or turn.schedule }}</small></td>
<td>{% if admin and turn.id %}<form method="post" action="/-/maintenance" data-inline>
<button name="end" value="{{ turn.id }}">{{ "End" if turn.state == "begun" else "Cancel" }}
<span class="hidden">maintenance of {{ turn.scope }}</span></button></form>{% endif %}</td></tr>
{% endfor %}
{% if turns|length > 20 %}<tr><td colspan="6" class="soft">and {{ turns|length - 20 }} more</td></tr>{% endif %}
{% endcall %}
{% endif %}</div>
{% if cut %}
<p class="notice">Since {{ cut.begun_at|time_tag }} {{ cut.text }}.</p>
{% endif %}
{% for name, why in untold %}
<p class="notice">{{ name if name[:1] not in "/" else "service.heartbeat" }} cannot be told: {{ why }}.</p>
{% endfor %}
{% if now - clock_step[0] < 86400 %}
<p class="notice">At {{ clock_step[0]|time_tag }} {{ clock_step[1] }}: times before and after do not fit together.</p>
{% endif %}
<div class="tools">
{{ chips("Filter by state", state_links, filter.state) }}
<form class="filter" role="search" data-live data-keep>
{% for name in ("state", "sort", "unfold") if filter[name] %}
<input type="hidden" name="{{ name }}" value="{{ filter[name] }}">
{% endfor %}
<input type="search" name="q" value="{{ filter.q }}" placeholder="Name, host or reason" aria-label="Search">
{% if tags %}
<select name="tag" aria-label="Tag"><option value="">Every tag</option>{{ options(tags, filter.tag) }}</select>
{% endif %}
{% if causes %}
<select name="cause" aria-label="Cause"><option value="">Every cause</option>
{{- options(causes, filter.cause) }}</select>
{% endif %}
<select name="gate" aria-label="Gate"><option value="">Counts or not</option>
{{- options({"yes": "Counts for the gate", "no": "Does not count"}, filter.gate) }}</select>
<select name="by" aria-label="Grouped by"><option value="">Grouped</option>
{{- options({"tag": "By tag", "group": "By group", "none": "In one list"}, filter.by) }}</select>
<noscript><button>Filter</button></noscript>
</form>
{% if admin %}
<div class="actions" data-keep>
<details name="action"{% if given.action %} open{% endif %}><summary class="button">Override the gate</summary>
<form method="post" action="/-/override" data-inline class="panel">
<p><label>Gate <select name="action">{{ options({"close": "closed", "open": "open"}, given.action) }}</select></label>
</p>
<p><label>For <select name="for">{{ options({"10m": "10 minutes", "30m": "30 minutes", "2h": "2 hours", "8h": "8 hours",
"1d": "1 day", "": "as long as it is not ended (closed)"}, given["for"] if "for" in given else "30m") }}
</select></label></p>
{{ input("reason", "Reason", form="action", maxlength="200", required="") }}
<p class="soft">Whatever the resources say. Paths that need nothing stay open.</p>
<button class="danger">Override the gate</button>
</form></details>
{{ work_form("/-/maintenance", scopes) }}
<a class="button" href="/-/add">Add resource</a>
</div>
{% endif %}
</div>
{{ message("trouble") }}
{% if rows %}
<table aria-label="Resources" class="overview">
<thead><tr>{% for column in columns %}
<th scope="col"{% if column.order %} aria-sort="{{ column.order }}"{% endif %}>
{%- if column.href %}<a href="{{ column.href }}">{{ column.label }}</a>{% else %}{{ column.label }}{% endif %}</th>
{% endfor %}</tr></thead>
{% for section in sections %}
<tbody id="in-{{ section.title|urlencode }}">
{% if section.title %}
<tr class="roll"><th scope="rowgroup" colspan="8"><b>{{ section.title }}</b>
{% for name, count in section.counts %} {{ state(name, count ~ " " ~ name) }}{% endfor %}
{% if section.href %} <a href="{{ section.href }}">
{{- "show " ~ section.hidden ~ " more" if section.hidden else "fold" }}
<span class="hidden"> of {{ section.title }}</span></a>{% endif %}</th></tr>
{% endif %}
{% for row in section.rows %}
<tr id="r{{ row.row.id }}-{{ section.title|urlencode }}" class="{{ row.shown_state }}">
<td>{{ state(row.status.state) }}</td>
<th scope="row"><a href="{{ row.href }}">{{ row.name }}</a> <small>{{ row.address }}</small>
{%- for label in row.labels %} <i>{{ label }}</i>{% endfor %}
{%- if row.maintenance %}
 <i class="maintenance">maintenance until {{ row.maintenance.until_at|time_tag }}</i>{% endif %}
{%- if row.failing %} <i class="degraded">{{ row.failing }}</i>{% endif %}
{%- if row.recovering %} <i>{{ row.recovering }}</i>{% endif %}
{%- if row.reason and row.name not in said %}<p>{{ row.reason }}</p>{% endif %}
{%- if row.seen %}<p class="soft">seen by {{ row.seen.actor }}: {{ row.seen.comment }}</p>{% endif %}</th>
<td>{% if row.status.since_at %}
{{- row.status.since_at|time_tag((now - row.status.since_at)|duration_text) }}{% endif %}</td>
<td>{% if row.status.polled_at %}{{ (now - row.status.polled_at)|duration_text }} ago
<small>in {{ "%.2f s"|format(row.status.seconds) }}</small>{% endif %}</td>
{{ row.bars }}
<td>{{ row.strip }}</td>
</tr>
{% endfor %}
</tbody>
{% endfor %}
</table>
{% elif not empty %}
<p class="empty">No resource matches. <a href="/-/">Show all</a></p>
{% else %}
<p class="empty">No resource is watched: the gate is open whatever happens.
{% if admin %}<a href="/-/add">Add the first one</a>{% endif %}</p>
{% endif %}
""", "resource.html": """<header class="title">
<div><h1>{{ shown.name }}</h1>
<p class="soft">{{ shown.address }}{% for label in shown.labels %} <i>{{ label }}</i>{% endfor %}
 · {{ "from " ~ origin ~ ", read-only here" if origin else "added here" }}</p></div>
{% if admin %}
<div class="actions" data-keep>
<form method="post" action="{{ shown.href }}/check" data-inline><button>Check now</button></form>
{{ work_form(shown.href ~ "/maintenance") }}
{% if shown.row.platform != "local" %}
<a class="button" href="/-/add?copy={{ shown.name|urlencode }}">Copy</a>
{% endif %}
{% if not origin %}
<a class="button" href="{{ shown.href }}/edit">Edit</a>
<details name="action"><summary class="button">Remove</summary>
<form method="post" action="{{ shown.href }}/remove" class="panel">
<p>{{ shown.name }} is no longer watched, and its history goes with it.</p>
<button class="danger">Remove {{ shown.name }}</button>
</form></details>
{% endif %}
</div>
{% endif %}
</header>
{{ message("trouble") }}
<div id="work">
{% for turn in turns if turn.state == "begun" %}
<section class="message maintenance" aria-label="Maintenance">
<p>{{ state("maintenance", "Maintenance") }} until {{ turn.until|time_tag }}: {{ turn.reason }}</p>
{% if turn.scope|string != shown.name %}
<p class="soft">With others: {{ turn.scope }}. <a href="/-/">All maintenance</a></p>
{% elif admin %}
<form method="post" action="{{ shown.href }}/maintenance" data-inline>
<button name="minutes" value="0">End maintenance</button></form>
{% endif %}
</section>
{% endfor %}
{% for turn in turns if turn.state == "planned" %}{% if loop.first %}
<p class="notice">Next maintenance: {{ turn.start|time_tag }}, for {{ (turn.until - turn.start)|duration_text }}:
{{ turn.reason }} ({{ turn.scope }})</p>
{% endif %}{% endfor %}
</div>
<div id="seen">
{% if shown.seen %}
<section class="message degraded" aria-label="Acknowledgement">
<p>Seen by <b>{{ shown.seen.actor }}</b> at {{ shown.seen.at|time_tag }}: {{ shown.seen.comment }}</p>
{% if admin %}
<form method="post" action="{{ shown.href }}/acknowledgement" data-inline>
<button name="end" value="1">Take back</button></form>
{% endif %}
</section>
{% elif admin and shown.is_sick %}
<details name="action" data-keep{% if given.comment %} open{% endif %}><summary class="button">Acknowledge</summary>
<form method="post" action="{{ shown.href }}/acknowledgement" data-inline class="panel">
{{ input("comment", "Comment", maxlength="200", required="") }}
<p class="soft">Until it recovers: you have seen it, and reminders stop.</p>
<button class="primary">Say that it is seen</button>
</form></details>
{% endif %}
</div>
<section class="message now {{ shown.status.state }}" aria-label="State">
<p><span aria-live="polite">{{ state(shown.status.state) }}</span>
{% if shown.failing %}<i class="degraded">{{ shown.failing }}</i>{% endif %}
{% if shown.recovering %}<i>{{ shown.recovering }}</i>{% endif %}
{% if shown.status.since_at %}
for <b>{{ (now - shown.status.since_at)|duration_text }}</b>, since {{ shown.status.since_at|time_tag }}
{% else %}no result yet{% endif %}</p>
{% if shown.reason %}<p class="why">{{ shown.reason }}</p>{% endif %}
<p class="soft">{% if shown.status.polled_at %}
Last poll {{ (now - shown.status.polled_at)|duration_text }} ago, in {{ "%.2f s"|format(shown.status.seconds) }}.
{% endif %}
Polled every {{ shown.row.interval|duration_text }}.
{% if shown.settings.depends_on %}Depends on {{ shown.settings.depends_on|join(", ") }}.{% endif %}
{% if connection %}{{ connection.logins }} login{{ "s" if connection.logins != 1 }} in 24 h{% if connection.opened %};
connected since {{ connection.opened.timestamp()|time_tag }}{{ ", and so was the last poll" if connection.kept }}
{%- endif %}.
{% if connection.second_try %}The last poll began again, for what was open had failed: {{ connection.second_try }}.
{% endif %}{% if connection.complaint %}It is not made anew, for the login failed: {{ connection.complaint }}.
{% endif %}{% if connection.found_dead %}Three that were open in a row were found dead: for a day each poll opens anew.
{% endif %}{% endif %}
{% if login_wait %}Next login in {{ login_wait|duration_text }}, at {{ (now + login_wait)|time_tag }}.
{% endif %}
Availability:
{% for span, percent in availability %}
{{ span }} <b>{{ "%.2f %%"|format(percent) if percent is number else "unknown" }}</b>{{ "." if loop.last else "," }}
{% endfor %}</p>
{{ shown.strip }}
<details id="polls"><summary>Last polls</summary>
{% call table("Last polls, newest first", ("Time", "State", "Seconds", "Reason"), "events") %}
{% for poll in polls|reverse %}
<tr><td>{{ poll.at|time_tag }}</td><td>{{ state(poll.state) }}</td>
<td>{{ "%.2f"|format(poll.readings.seconds) if poll.readings.seconds }}</td>
<td>{{ cause_text(poll.cause, poll.reason) }}</td></tr>
{% endfor %}
{% endcall %}</details>
{% if shown.status.cause == "host_key" and admin %}
<form method="post" action="{{ shown.href }}/trust" id="trust" data-inline data-keep>
{% if offered %}
<p>Trusted: <code>{{ shown.row.host_key }}</code><br>Offered: <code>{{ offered }}</code></p>
<p>Compare it on the machine itself before you trust it: somebody in between has another key, too.</p>
<button name="key" value="{{ offered }}" class="danger">Trust the offered key</button>
{% else %}
<button>Show the key that it offers now</button>
{% endif %}
</form>
{% endif %}
</section>
<div class="columns{% if shown.read_at %} old{% endif %}">
<section>
<h2>Readings{% if shown.read_at %} <small>as of {{ shown.read_at|time_tag }}</small>{% endif %}</h2>
{% call table("Readings", ("Metric", "Now", "Warning", "Limit"), without="The last poll read nothing.") %}
{% for reading in readings %}
<tr><th scope="row">{{ reading.label }}</th>
<td>{{ reading.bar }}{{ reading.text }}
{%- if reading.problem %}<span class="error">{{ reading.problem }}</span>{% endif %}</td>
{% for kind in ("warn", "fail") %}
<td>{{ "%g"|format(reading.limit[kind]) if reading.limit[kind] is number }}</td>
{% endfor %}
</tr>
{% endfor %}
{% endcall %}
</section>
{% if outcomes %}
<section>
<h2>Services and checks{% if shown.read_at %} <small>as of {{ shown.read_at|time_tag }}</small>{% endif %}</h2>
{% call table("Services and checks", ("Result", "Service or check")) %}
{% for kind, name, outcome in outcomes %}
<tr><td>{{ state("unhealthy", "bad") if not outcome.good else state("degraded", "warning") if outcome.degraded
else state("healthy", "good") }}</td>
<td>{{ name }} <small>{{ kind }}</small>
{% if outcome.text|length > 80 or "\\n" in outcome.text.strip() %}
<details id="{{ kind }}-{{ name|urlencode }}"{% if outcome.degraded or not outcome.good %} open{% endif %}>
<summary>Output</summary><pre tabindex="0">{{ outcome.text }}</pre></details>
{% else %}
<p>{{ outcome.text }}</p>
{% endif %}
</td></tr>
{% endfor %}
{% endcall %}
</section>
{% endif %}
<section>
<h2>Machine{% if shown.read_at %} <small>as of {{ shown.read_at|time_tag }}</small>{% endif %}</h2>
<dl>
{% for name, label in machine.items() if details.get(name) is not none %}
<dt>{{ label }}</dt><dd>{{ details[name]|duration_text if name == "uptime_seconds"
else "%g"|format(details[name]) if details[name] is number else details[name] }}</dd>
{% else %}
<dt>Nothing is known yet.</dt><dd></dd>
{% endfor %}
</dl>
</section>
</div>
<section>
<div class="tools"><h2>History</h2>{{ chips("Time span", span_links, span) }}</div>
<div class="charts">
{% for chart in charts %}
<figure data-begin="{{ chart.begin }}" data-end="{{ chart.end }}" data-top="{{ chart.top }}"
 data-unit="{{ chart.unit }}">
<figcaption><b>{{ chart.label }}</b> average {{ chart.average }}, highest {{ chart.highest }}</figcaption>
<div class="plot"><ol class="scale" aria-hidden="true">
{% for text in chart.scale %}<li>{{ text }}</li>{% endfor %}
</ol>{{ chart.svg }}</div>
<ol class="times" aria-hidden="true">{% for text in chart.times %}<li>{{ text }}</li>{% endfor %}</ol>
<div class="scan" data-keep><input type="range" max="{{ chart.last }}" value="{{ chart.last }}"
 aria-label="{{ chart.label }}: point in time"><p class="soft" aria-hidden="true"></p></div>
<details id="t-{{ chart.label|urlencode }}"><summary>{{ chart.label }} as a table</summary>
{% call table(chart.label, ("From", "Average", "Lowest", "Highest")) %}
{% for at, average, lowest, highest in chart.table %}
<tr><td>{{ at|time_tag }}</td><td>{{ average }}</td><td>{{ lowest }}</td><td>{{ highest }}</td></tr>
{% endfor %}
{% endcall %}</details>
</figure>
{% else %}
<p class="soft">Nothing was read in this time.</p>
{% endfor %}
</div>
</section>
<section>
<h2 id="events">Events</h2>
{% call table("Events", ("Time", "Kind", "What", "Who"), "events") %}{{ event_rows(events, own=true) }}{% endcall %}
<p><a href="/-/events?resource={{ shown.name|urlencode }}">All events of {{ shown.name }}</a></p>
</section>
""", "events.html": """<div class="tools">
<h1>{{ title }}</h1>
<form class="filter" role="search" data-live data-keep>
<select name="kind" aria-label="Kind"><option value="">Every kind</option>{{ options(kinds, filter.kind) }}</select>
<select name="resource" aria-label="Resource">
<option value="">Every resource</option>{{ options(names, filter.resource) }}</select>
<noscript><button>Filter</button></noscript>
</form>
</div>
{% call table("Events, newest first", ("Time", "Kind", "Resource", "What", "Who"), "events") %}
{{ event_rows(events, known=known) }}
{% endcall %}
{% if older %}<p><a href="{{ older }}" rel="next">Older</a></p>{% endif %}
""", "incidents.html": """<div class="tools"><h1>{{ title }}</h1>
{{ chips("Time span", span_links, span) }}</div>
{% call table("For how much of the time it was open", ("Of", "Day", "Week", "Month", "90 days", "Last " ~ span,
              "Refused then"), "uptime") %}
{% for row in rows %}
<tr><th scope="row"><a href="{{ row.href }}"{% if row.name == group %} aria-current="true"{% endif %}>
{{- row.name or "The whole site" }}</a></th>
{% for label, percent in row.uptime.items() %}
<td data-label="{{ label }}">{{ "%.3f %%"|format(percent) if percent is number else "not known" }}</td>
{% endfor %}
<td>{{ row.strip }}</td><td data-label="Refused">{{ row.refusals[1] }}
{%- if row.refusals[2] %} <small>{{ row.refusals[2] }} would have been</small>{% endif %}</td></tr>
{% endfor %}
{% endcall %}
<p class="soft">Of the time in which the service ran. <a href="/-/api/uptime?format=csv&amp;group={{ group|urlencode
}}">CSV</a>, <a href="/-/api/uptime?group={{ group|urlencode }}">JSON</a></p>
<div class="tools"><h2>{{ group or "The whole site" }}: {{ found|length or "none" }} in the last {{ span }}</h2>
<a class="button" href="/-/api/incidents?format=csv&amp;{{ asked }}">CSV</a>
<a class="button" href="/-/api/incidents?{{ asked }}">JSON</a></div>
{% call table("Incidents, newest first", ("From", "To", "Why", "Closed by", "Refused", "Changed before"),
              "incidents") %}
{% for one in found %}
<tr><td>{{ one.from_at|time_tag }}</td>
<td>{% if not one.end %}<b class="unhealthy">lasts</b>{% else %}{{ one.to_at|time_tag }}
{%- if one.end == "unseen" %}<p class="soft">seen last; then the service was away</p>{% endif %}{% endif %}
<p class="soft">{{ (one.to_at - one.from_at)|duration_text }}</p></td>
<td>{{ one.why }}{% if one.mode == "observe" %} <i>observe: nothing was refused</i>{% endif %}
{%- if one.opened_by %}<p class="soft">{{ one.opened_by }}</p>{% endif %}</td>
<td data-label="Closed by">{{ one.actor }}</td>
<td data-label="Refused">{{ one.refused }}
{%- if one.would_refuse %} <small>{{ one.would_refuse }} would have been</small>{% endif %}</td>
<td class="soft" data-label="Changed before">{{ one.before }}</td></tr>
{% endfor %}
{% endcall %}
""", "status.html": """<h1 aria-live="polite"><span class="state {{ icon }}">
{{- {"degraded": "open"}.get(title, title)|capitalize }}</span></h1>
{% if since %}
<p>for {{ (now - since.timestamp())|duration_text }}, since {{ since.timestamp()|time_tag }}</p>{% endif %}
<p>{{ remark }}</p>
<ul>
{% for name, colour, at in parts %}
<li>{{ state(colour, name) }} {% if not at %}{{ colour }}{% else %}{{ "closed" if colour == "unhealthy" else "open" }}
 <small>for {{ (now - at.timestamp())|duration_text }}</small>{% endif %}</li>
{% endfor %}
</ul>
{% if turns %}<ul aria-label="Planned work">{% for turn in turns %}
<li><span class="state maintenance">Planned work</span>: {{ turn.what }},
{{ "until" if turn.begun else "from" }} {{ (turn.until if turn.begun else turn.start)|time_tag }}
{%- if not turn.begun %} for {{ (turn.until - turn.start)|duration_text }}{% endif %}</li>
{% endfor %}</ul>{% endif %}
<p><small>Times are the server's, {{ zone }}; this is of {{ now|time_tag }}.</small></p>
""", "users.html": """<div class="tools"><h1>{{ title }}</h1></div>
{{ message("trouble") }}
{% call table("Users", ("Name", "Role", "Change")) %}
{% for account in users %}
<tr><th scope="row">{{ account.username }}{% if account.username == user.username %} <small>you</small>{% endif %}
{% if account.initial %} <i class="degraded">documented password</i>{% endif %}</th>
<td>{{ account.role }}</td>
{% set typed = (changed or {}).get(account.username, {}) %}
<td><details name="user"{% if typed %} open{% endif %}>
<summary>Change<span class="hidden"> {{ account.username }}</span></summary>
<form method="post" class="row" action="/-/users/{{ account.username|urlencode }}">
<label>Role <select name="role">{{ options(roles, typed.role or account.role) }}</select></label>
<label>New password <input type="password" name="password" minlength="12" maxlength="1024" autocomplete="new-password"
 placeholder="{{ "not kept: type it again" if typed.password else "unchanged" }}"></label>
<button>Change {{ account.username }}</button></form>
<form method="post" action="/-/users/{{ account.username|urlencode }}/remove">
<button class="danger">Remove {{ account.username }}</button></form></details></td></tr>
{% endfor %}
{% endcall %}
<form method="post" class="panel" action="/-/users" aria-labelledby="new">
<h2 id="new">Add a user</h2>
<div class="inputs">
{{ input("name", "Name", required="", autocomplete="off") }}
<label>Role <select name="role">{{ options(roles|reverse, given.role) }}</select>
<span class="hint">admin: everything; viewer: looks</span></label>
{{ password("password", "Password", "12 characters or more") }}
</div>
<button class="primary">Add user</button>
</form>
<div class="tools"><h2>Sessions</h2><a href="/-/tokens">API tokens</a></div>
{% call table("Sessions", ("User", "Kind", "From", "Since", "Last seen", "End"), "events") %}
{% for login in sessions %}
<tr><td>{{ login.user }}{% if login.current %} <small>this one</small>{% endif %}</td>
<td>{{ login.kind }}</td><td>{{ login.address }}</td>
<td>{{ login.begun_at|time_tag }}</td><td>{{ login.seen_at|time_tag }}</td>
<td><form method="post" action="/-/sessions/{{ login.id }}/end">
<button>End<span class="hidden"> this {{ login.kind }} of {{ login.user }}</span></button></form></td></tr>
{% endfor %}
{% endcall %}
""", "tokens.html": """<div class="tools"><h1>{{ title }}</h1></div>
{{ message("trouble") }}
{% if made %}
<section class="message healthy" role="status" aria-label="New token">
<p>The new token, which is not shown again: <code>{{ made.token }}</code></p></section>
{% endif %}
{% call table("API tokens", ("User", "Token", "May", "Until", "Last used", "End"), "events") %}
{% for token in tokens %}
<tr><td>{{ token.user }}</td><th scope="row">{{ token.name }}</th><td>{{ token.role }}</td>
<td>{% if token.expires_at >= never %}for ever{% else %}{{ token.expires_at|time_tag }}
{% if token.expires_at <= now %} <b class="state unhealthy">over</b>{% endif %}{% endif %}</td>
<td>{% if token.seen_at %}{{ token.seen_at|time_tag }} <small>{{ token.address }}</small>
{% else %}never{% endif %}</td>
<td><form method="post" action="/-/tokens/{{ token.id }}/revoke">
<button class="danger">Revoke<span class="hidden"> {{ token.name }} of {{ token.user }}</span></button></form></td></tr>
{% endfor %}
{% endcall %}
<form method="post" class="panel" action="/-/tokens" aria-labelledby="new">
<h2 id="new">Make a token of your own</h2>
<p class="soft">For a script: <code>Authorization: Bearer …</code> at /-/api/. It ends with your account, and when your
password changes. It makes and revokes no tokens, changes no users, and ends no sessions.</p>
<div class="inputs">
{{ input("name", "Name", required="", autocomplete="off") }}
<label>Role <select name="role">{{ options(roles, given.role) }}</select></label>
{{ input("expires", "Until", "90d, 2027-01-31 or never", placeholder="90d") }}
{{ password("password", "Your password") }}
</div>
<button class="primary">Make token</button>
</form>
""", "log in.html": """<form method="post" class="panel narrow" action="{{ action }}">
<h1>{{ title }}</h1>
{{ message("trouble") }}
{{ input("username", "Name", required="", autofocus="", autocomplete="username") }}
{{ password("password", "Password") }}
{% for name, text in (typed or {}).items() %}<input type="hidden" name="{{ name }}" value="{{ text }}">{% endfor %}
<button class="primary">Log in</button>
</form>
""", "change the password.html": """<form method="post" class="panel narrow">
<h1>{{ title }}</h1>
{{ message("trouble") }}
<input class="hidden" value="{{ user.username }}" autocomplete="username" tabindex="-1" aria-hidden="true" readonly>
{{ password("current", "Password until now") }}
{{ password("new", "New password", "12 characters or more; your other sessions and tokens end") }}
{{ password("again", "New password again", "the same") }}
<button class="primary">Change the password</button>
</form>
{% if not user.initial %}<p class="soft"><a href="/-/tokens">API tokens</a> for scripts</p>{% endif %}
""", "form.html": """<form method="post" class="resource" autocomplete="off">
<div class="tools"><h1>{{ title }}</h1></div>
<fieldset class="panel"><legend>Resource</legend>
<div class="inputs">
<label>Platform <select name="platform">{{ options(platforms, given.platform) }}</select>
<span class="hint">unix asks the host which one it is</span></label>
{{ input("name", "Name", "unique; default: the host name") }}
{{ input("interval", "Interval, seconds", "between two polls", inputmode="decimal", placeholder="60") }}
<label class="checkbox">
<input type="checkbox" name="critical" value="true"{% if given.critical %} checked{% endif %}>
Critical: while it is unhealthy, the gate is closed</label>
</div></fieldset>
<fieldset class="panel remote"><legend>Connection</legend>
<div class="inputs">
{{ input("hostname", "Host name or address") }}
{{ input("url", "URL", "for http alone", inputmode="url") }}
{{ input("port", "Port", inputmode="numeric", placeholder=ports) }}
{{ input("username", "User name") }}
{{ input("password", "Password", "sealed, and never shown again", "password", autocomplete="new-password",
         placeholder=none if given.password else "not copied" if copied else "unchanged" if name) }}
</div></fieldset>
<fieldset class="panel"><legend>Everything else</legend>
{{ input("settings", "Limits, services, checks and other settings: none is needed", "YAML as in the inventory: "
         ~ others|join(", "), "textarea", rows="9", spellcheck="false", placeholder=example) }}
</fieldset>
<div class="buttons">
<button name="do" value="save" class="primary" data-inline>Save</button>
<button name="do" value="test" data-inline>Test connection</button>
<a href="{{ name|resource_path if name else "/-/" }}">Cancel</a>
{{ message("result") }}
</div>
</form>
""", "error.html": """
<section class="panel narrow"><h1>{{ title }}</h1><p>{{ problem }}</p><p><a href="/-/">Overview</a></p></section>
"""}


# === Style ===================================================================
# What a browser gets beside the pages: icon, style sheet and script, each a constant and never made of what anybody
# wrote. The script refreshes pages in place and sends forms without leaving the page; all pages work without it.
# Gives: ICONS, PAGE_SCRIPT, STYLE
ICONS = {state: f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="7" fill="{colour}"/>
<path d="{path}" fill="none" stroke="#fff" stroke-width="3" stroke-linejoin="round"/></svg>
""" for state, colour, path in (
    ("healthy", "#18713a", "M4 17h6l3-8 6 15 3-7h6"), ("unhealthy", "#b91f29", "M9 9l14 14M23 9L9 23"),
    ("degraded", "#855400", "M16 7L26 25H6z"), ("unknown", "#566070", "M11 12q0-5 5-5t5 5q0 4-5 6v2m0 3v2"))}
STYLE = r"""
:root {
  color-scheme: light dark;
  --page: light-dark(#f4f5f7, #0f141a); --surface: light-dark(#fff, #171d25); --sunken: light-dark(#eef0f3, #11161d);
  --text: light-dark(#19212c, #dee5ed); --soft: light-dark(#566070, #98a5b5); --line: light-dark(#dadfe6, #2b3440);
  --link: light-dark(#0a58a8, #74b5f7); --track: light-dark(#e1e5ea, #2b3440); --fill: light-dark(#6f8096, #7e90a5);
  --healthy: light-dark(#18713a, #55c57c); --degraded: light-dark(#855400, #e3b04b);
  --unhealthy: light-dark(#b91f29, #ff8078); --maintenance: light-dark(#5443c2, #b0a4ff);
  font: 14px/1.45 Inter, system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; background: var(--page); color: var(--text);
}
* { box-sizing: border-box; } body, h1, h2, p, ul, ol, dl, dd, figure, fieldset { margin: 0; padding: 0; }
body { overflow-wrap: anywhere; }
.top, .notice, main, footer { padding: 0 max(1rem, 50vw - 52rem); }
main { outline: none; } footer { padding-block: 1.5rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1rem; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: .15em; }
:is(nav, th, .who) a:not(:hover), .brand, .button { text-decoration: none; }
small, .soft, th, dt, figcaption { color: var(--soft); font-weight: 400; }
small, footer, thead th, .hint, .error { font-size: .8125rem; } b { font-weight: 600; } time { white-space: nowrap; }
.hidden:not(:focus) { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.skip:focus { position: fixed; inset: .5rem auto auto .5rem; z-index: 3; padding: .5rem; background: var(--surface); }
.healthy { --state: var(--healthy); } .degraded { --state: var(--degraded); } .unhealthy { --state: var(--unhealthy); }
.unknown { --state: var(--soft); } .maintenance { --state: var(--maintenance); }

.top, .who, .gate, .tools, .chips, .filter, .title, .actions, .row, .buttons { display: flex; flex-wrap: wrap;
  align-items: center; gap: .5rem 1rem; }
table, dl, figure, .empty, .panel { background: var(--surface); border: 1px solid var(--line); }
.top { min-height: 3rem; padding-block: .375rem; background: var(--surface); border-bottom: 1px solid var(--line); }
.brand { color: inherit; font-weight: 650; }
.top nav { display: flex; flex-wrap: wrap; gap: 0 1.25rem; flex: 1; }
.top nav a { color: var(--soft); padding: .25rem 0; white-space: nowrap; }
.top nav a[aria-current] { color: var(--text); box-shadow: 0 2px var(--link); }
.who, .chips, .filter, .actions, .row { gap: .5rem; }
.notice { padding-block: .625rem; background: color-mix(in srgb, var(--degraded) 16%, var(--page)); }
.lost { position: sticky; top: 0; z-index: 2; background: var(--unhealthy); color: var(--surface); }

.state { display: inline-block; white-space: nowrap; color: var(--state); }
.state::before { display: inline-block; width: 1.375em; font-weight: 700; content: "?" / ""; }
.state.healthy::before { content: "\2713" / ""; } .state.unhealthy::before { content: "\2715" / ""; }
.state.degraded::before { content: "\25B2" / ""; } .state.maintenance::before { content: "\2016" / ""; }
.gate, .message { padding: .75rem 1rem; border: 1px solid color-mix(in srgb, var(--state) 35%, var(--line));
  border-left: 4px solid var(--state); border-radius: 6px;
  background: color-mix(in srgb, var(--state) 7%, var(--surface)); }
.gate { align-items: baseline; margin-top: 1rem; row-gap: .25rem; }
.gate h2 { font-size: 1.375rem; } .gate ul { flex-basis: 100%; list-style: none; } .gate li { padding-top: .25rem; }
.message { margin-top: .75rem; } .message > * + *, .panel > * + * { margin-top: .5rem; }
.now > p .state { font-size: 1.25rem; margin-right: .5rem; }
.message .state { white-space: normal; }
[role=alert]:not(.lost, :has(p)) { display: none; } .why { font-size: 1.0625rem; }

.tools { margin: 1rem 0 .625rem; } .chips { flex: 1 1 auto; }
.filter { min-width: 0; } .filter select { max-width: 9.5rem; }
input, select, textarea, button, .button, .chips a { padding: .3125rem .625rem; max-width: 100%;
  font: inherit; color: inherit; background: var(--surface); border-radius: 5px;
  border: 1px solid light-dark(#8b96a5, #5d6b7c); }
button, .button { cursor: pointer; white-space: nowrap; color: var(--link); font-weight: 500; }
.chips a { color: var(--state, var(--text)); } .chips [aria-current] { box-shadow: inset 0 0 0 1px currentColor; }
button:hover, .button:hover { background: var(--sunken); }
.primary { background: var(--link); border-color: var(--link); color: var(--surface); }
.primary:hover { background: color-mix(in srgb, var(--link) 85%, var(--text)); }
.danger { color: var(--unhealthy); border-color: var(--unhealthy); }
button:disabled { opacity: .6; cursor: progress; }

table { width: 100%; border-collapse: collapse; }
th, td { padding: .375rem .625rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
tbody th { min-width: 5rem; } thead th { border: 0; white-space: nowrap; }
i { display: inline-block; padding: 0 .375rem; border: 1px solid var(--line); border-radius: 3px; font-style: normal;
  font-size: .75rem; line-height: 1.3; background: var(--sunken); color: var(--soft); }
i.maintenance, i.degraded { color: var(--state); }
.overview td, .uptime td { white-space: nowrap; }
.overview thead th { position: sticky; top: 0; z-index: 1; background: var(--surface);
  box-shadow: inset 0 -1px var(--line); }
.overview tbody th { color: inherit; width: 100%; min-width: 14rem; }
.overview tbody th a { font-weight: 600; margin-right: .25rem; }
.overview tbody th p { font-size: .875rem; } .overview tbody th p:not(.soft) { color: var(--state); }
.overview tr.unhealthy { box-shadow: inset 3px 0 var(--unhealthy); }
.roll th { background: var(--sunken); } .roll b { margin-right: .75rem; } thead a { color: inherit; }
[aria-sort=ascending] a::after { content: " \25B4" / ""; } [aria-sort=descending] a::after { content: " \25BE" / ""; }
.old :is(td, dd, th, .state), td.old { color: var(--soft); } .old :is(svg, .state::before), td.old svg { opacity: .5; }
.events :is(td:last-child, td:has(> a), #work td:nth-child(4)) { min-width: 9rem; }
td > :is(.state, time), .events td:nth-child(2) { white-space: nowrap; } td:has(time) + td { overflow-wrap: normal; }
main > :is(table, .notice), #work > *, #seen > details, [role=alert] + table { margin-top: .75rem; }
.empty { padding: 3rem 1rem; text-align: center; }
.bar { width: 6rem; max-width: 40%; height: .5rem; margin-right: .5rem; }
.overview .bar { width: 4rem; max-width: none; }
.bar path { stroke: var(--fill); stroke-width: 8; fill: none; } .bar path:first-child { stroke: var(--track); }
.bar .degraded, .bar .unhealthy, .graph .limit { stroke: var(--state); }
.bar .limit { stroke-width: 2; vector-effect: non-scaling-stroke; } .graph .limit { stroke-dasharray: 5 4; }
.strip { display: block; width: 15rem; height: 1.25rem; }
.strip path { stroke: var(--state); stroke-width: 20; stroke-dasharray: .72 .28; fill: none; }
.strip path:first-child { stroke: var(--track); stroke-width: 2; transform: translateY(9px); }
.strip .healthy { stroke-width: 9; transform: translateY(5.5px); }
.strip .degraded { stroke-width: 14; transform: translateY(3px); }
.uptime .strip .unknown { stroke: none; }

.title { align-items: start; justify-content: space-between; margin-top: 1rem; }
.actions { align-items: start; position: relative; margin-left: auto; }
summary { cursor: pointer; color: var(--link); } summary.button { display: inline-block; }
.panel { margin-top: 1rem; padding: 1rem; border-radius: 6px; }
.actions .panel { position: absolute; right: 0; z-index: 2; width: 30rem; max-width: calc(100vw - 2rem);
  margin-top: .375rem; box-shadow: 0 6px 24px #0004; }
.narrow { display: grid; gap: .75rem; max-width: 24rem; margin: 8vh auto 0; } .narrow > * { margin: 0 !important; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0 1.5rem; }
.charts, .inputs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(var(--width), 100%), 1fr));
  gap: .75rem 1rem; }
.columns h2, h2#events { margin: 1.25rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .375rem 1rem; padding: .625rem; }
code, pre, textarea { font: .8125rem/1.45 ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: .25rem 0 0; padding: .5rem .625rem; max-height: 20rem; overflow: auto; white-space: pre-wrap;
  background: var(--sunken); }
.charts { --width: 27rem; row-gap: 1rem; } figure { padding: .625rem .75rem; }
figcaption b { color: var(--text); margin-right: .375rem; }
.plot { display: flex; gap: .375rem; height: 8rem; margin-top: .75rem; }
.scale, .times { display: flex; justify-content: space-between; list-style: none; color: var(--soft);
  font-size: .75rem; }
.scale { flex-direction: column; min-width: 2rem; margin-block: -.375rem; text-align: right; line-height: 1; }
.times { margin: .375rem 0 0 2.375rem; }
.graph { flex: 1; min-width: 0; overflow: visible; transform: scaleY(-1); }
.graph path { fill: none; stroke: var(--track); vector-effect: non-scaling-stroke; }
.graph .band { fill: color-mix(in srgb, var(--link) 22%, transparent); stroke: none; }
.graph .mark { stroke: var(--state, var(--soft)); stroke-dasharray: 2 3; }
.graph .mark.maintenance { fill: color-mix(in srgb, var(--state) 14%, transparent); stroke: none; }
.scan { margin-left: 2.375rem; } .scan input { width: 100%; margin: 0; padding: 0; accent-color: var(--fill); }
.scan p { min-height: 1.45em; }
@media (scripting: none) { .scan { display: none; } }
.graph .line { stroke: var(--link); stroke-width: 1.5; stroke-linejoin: round; stroke-linecap: round; }

form.resource, form:has(> .inputs) { max-width: 68rem; }
.inputs { --width: 15rem; } .row { align-items: end; padding: .5rem 0; }
label { display: block; }
label > input:not([type=checkbox]), label > select, label > textarea { display: block; width: 100%;
  margin-top: .125rem; }
label.checkbox { align-self: center; }
.hint, .error { display: block; margin-top: .125rem; color: var(--soft); }
.error { color: var(--unhealthy); white-space: pre-line; }
[aria-invalid] { border-color: var(--unhealthy); box-shadow: 0 0 0 1px var(--unhealthy); }
::placeholder { color: var(--soft); opacity: 1; } fieldset { min-width: 0; }
legend { float: left; width: 100%; padding: 0 0 .5rem; font-weight: 600; } legend + * { clear: both; }
.buttons { position: sticky; bottom: 0; margin-top: 1rem; padding: .75rem 0; background: var(--page);
  border-top: 1px solid var(--line); }
#result { flex: 1 1 20rem; } #result .message { margin: 0; padding: .375rem .75rem; }
form:has([value=simulated]:checked) .remote { display: none; }

.wall { min-height: 100vh; padding-block: 3vh; text-align: center; background: var(--state); color: var(--page);
  font-size: clamp(1.25rem, 3.5vw, 3.5rem); line-height: 1.25; }
.wall h1 { font-size: clamp(4rem, 18vw, 40vh); } .wall * { color: inherit; }
.wall ul { list-style: none; margin-top: 3vh; } .wall small { font-size: .6em; }
body:has(#lost:not([hidden])) .wall { --state: var(--soft); }

@media (max-width: 60rem) {
  :is(.overview thead:not(:has(a)), .uptime thead, .incidents thead) { position: absolute; width: 1px; height: 1px;
    overflow: hidden;
    clip-path: inset(50%); }
  .overview, .overview tbody { display: block; }
  .overview tr { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .125rem .75rem;
    padding: .5rem .75rem; border-top: 1px solid var(--line); }
  .overview thead tr { display: flex; flex-wrap: wrap; } .overview thead tr::before { content: "Sort by"; }
  .overview thead th { position: static; padding: 0; box-shadow: none; }
  .overview thead th:not(:has(a)) { display: none; }
  .overview td, .overview tbody th { border: 0; padding: 0; min-width: 0; width: auto; }
  .overview tbody th { grid-column: 1 / -1; order: -1; } .overview .roll, .overview .roll th { display: block; }
  .overview td:nth-child(3):not([data-label])::before { content: "for "; }
  [data-label]:not(:empty)::before { content: attr(data-label); display: block; font-size: .75rem;
    color: var(--soft); }
  .overview td:empty::before { content: none; } .overview td:last-child { grid-column: 1 / -1; }
  .overview .strip { width: 100%; } .overview .bar { width: calc(100% - 3.25rem); }
  .overview td small { display: none; }
  .filter { flex: 1 1 100%; } .filter input, .filter select { flex: 1 1 8rem; min-width: 0; max-width: none; }
  .actions { margin-left: 0; } .actions .panel { left: 0; right: auto; } .buttons { position: static; }
  .events thead { display: none; } .events form { display: inline; }
  .events tr { display: block; padding: .5rem .75rem; border-top: 1px solid var(--line); }
  .events :is(td, th) { display: inline; border: 0; padding: 0 .5rem 0 0; }
  :is(.uptime, .incidents) :is(tr, th, td) { display: block; border: 0; } .uptime .strip { width: 100%; }
  :is(.uptime, .incidents) tr { border-top: 1px solid var(--line); }
  .uptime td[data-label] { display: inline-block; } .incidents td:empty { display: none; }
}
"""
PAGE_SCRIPT = r"""
"use strict";
const PERIOD = 2000, PATIENCE = 10000, SENDING = 90000;      // milliseconds
const [main, lost] = ["main", "lost"].map(id => document.getElementById(id));
let attended = true;    // somebody is here: only that keeps a session alive
let turn = 0;           // counts questions; the answer to an earlier one than the last is dropped

const warn = text => Object.assign(lost, { textContent: text, hidden: false });

// Makes `old` like `next` in place: focus, selection, scrolling, typed text and opened details stay as they are,
// and what is marked data-keep, unless a form was sent.
function morph(old, next, sent) {
  if (old.isEqualNode(next)) return;
  if (old.nodeName !== next.nodeName) { old.replaceWith(next); return; }
  if (old.nodeType !== Node.ELEMENT_NODE) { old.nodeValue = next.nodeValue; return; }
  if ("keep" in old.dataset && !sent) return;
  for (const { name } of [...old.attributes])
    if (!next.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  for (const { name, value } of next.attributes)
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  const named = new Map([...old.children].filter(child => child.id).map(child => [child.id, child]));
  let at = old.firstChild;
  for (const child of [...next.childNodes]) {
    const same = child.id ? named.get(child.id) : at && !at.id ? at : null;
    if (same && same === at) at = at.nextSibling;
    else old.insertBefore(same || child, at);
    if (same) morph(same, child, sent);
  }
  while (at) { const gone = at; at = at.nextSibling; gone.remove(); }
}

const skew = document.body.dataset.now - Date.now() / 1000;     // the server's clock, and its time zone
const serverTime = at => new Date((at + +document.body.dataset.offset) * 1000).toISOString().slice(0, 19)
  .replace("T", " ") + " " + document.body.dataset.zone;

// What a chart shows: of each point its place, average, lowest and highest, in hundredths of the picture.
function pointsOf(figure) {
  const [line, band] = ["line", "band"].map(name => figure.querySelector("." + name).getAttribute("d").split("M")
    .slice(1).map(part => part.split("L").map(pair => pair.split(" ").map(parseFloat))));
  return line.flatMap((part, run) => part.map(([x, average], at) =>
    ({ x, average, high: band[run][at][1], low: band[run][2 * part.length - 1 - at][1] })));
}

// Says a point of a chart, and what happened then; `choose` says which.
function tell(figure, choose) {
  const { begin, end, top, unit } = figure.dataset, points = pointsOf(figure), at = choose(points), point = points[at];
  const [slider, text] = figure.querySelector(".scan").children;
  const value = part => +(part / 100 * top).toPrecision(3) + unit;
  const marks = [...figure.querySelectorAll(".mark")].filter(mark => Math.abs(mark.dataset.at - point.x) < 1);
  text.textContent = [`${serverTime(+begin + point.x / 100 * (end - begin))}: average ${value(point.average)}, ` +
    `${value(point.low)} to ${value(point.high)}`, ...marks.map(mark => mark.dataset.text)].join("; ");
  Object.assign(slider, { max: points.length - 1, value: at }).setAttribute("aria-valuetext", text.textContent);
}

addEventListener("input", event => {
  const figure = event.target.closest("figure");
  if (figure) tell(figure, points => Math.min(event.target.value, points.length - 1));
});
addEventListener("pointermove", event => {
  const graph = event.target.closest(".plot")?.querySelector(".graph");
  if (!graph) return;
  const box = graph.getBoundingClientRect(), x = 100 * (event.clientX - box.left) / box.width;
  const nearer = (points, one, other) => Math.abs(points[other].x - x) < Math.abs(points[one].x - x) ? other : one;
  tell(graph.closest("figure"), points => points.reduce((best, _, at) => nearer(points, best, at), 0));
});

async function ask(url, options) {
  const mine = ++turn, headers = attended ? {} : { "X-Refresh": "1" };
  attended = false;
  const answer = await fetch(url, { headers, signal: AbortSignal.timeout(PATIENCE), ...options });
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  return { answer, page, late: mine !== turn };
}

function show(page, sent) {
  const focused = document.activeElement;
  document.title = page.title;
  const icon = head => head.querySelector("link[rel=icon]");
  if (icon(document).href !== icon(page).href) icon(document).href = icon(page).href;
  morph(main, page.querySelector("main"), sent);
  if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });     // it moved
}

// To the login, as a rule; where something was typed, the form that is sent leads there, and it is kept.
function leave() {
  if ([...main.querySelectorAll("[data-keep] input")].every(input => input.value === input.defaultValue))
    location.reload();
  warn("Your session is over. Send the form, and log in again.");
}

// Nor do title and icon show a state that may be over.
function age(why) {
  warn(`${why} What is shown is old.`);
  document.title = "not known · HealthChecker";
  document.querySelector("link[rel=icon]").href = lost.dataset.icon;
}

async function refresh() {
  try {
    const { answer, page, late } = await ask(location.href);
    if (answer.redirected || [401, 403, 404].includes(answer.status)) return leave();
    if (!answer.ok) return age(page.querySelector("main p")?.textContent || answer.status);
    if (!late) show(page);
    lost.hidden = true;
  } catch {
    if (lost.hidden) age(`No answer since ${serverTime(Date.now() / 1000 + skew)}.`);
  }
}

// A busy server is asked less often: the pause is ten times as long as the answer took.
async function watch() {
  const begin = performance.now();
  if (!document.hidden && !main.querySelector("button:disabled") && "refresh" in main.dataset) await refresh();
  setTimeout(watch, Math.max(PERIOD, 10 * (performance.now() - begin)));
}

// Sends a form without leaving the page, which stays as it was but for what the answer changes.
async function send(form, button) {
  const body = new URLSearchParams(new FormData(form, button));
  const to = form.getAttribute("action") || location.href;      // form.action may be an input of that name
  attended = true;
  button.disabled = true;
  try {
    const { answer, page } = await ask(to, { method: "POST", body, signal: AbortSignal.timeout(SENDING) });
    if (answer.redirected && new URL(answer.url).pathname !== location.pathname) return location.assign(answer.url);
    if (answer.status === 401) return form.submit();     // the login, which brings what was typed back
    const panel = answer.ok && form.closest("details");
    if (panel) {
      panel.open = false;
      form.reset();
      panel.firstElementChild.focus();
    }
    show(page, true);
  } catch {
    warn("No answer: it may not have been done.");
  } finally {
    button.disabled = false;    // which took the focus away
    if (document.activeElement === document.body) (button.isConnected ? button : main).focus({ preventScroll: true });
  }
}

addEventListener("submit", event => {
  if (!event.target.matches("[data-inline]") && !event.submitter?.matches("[data-inline]")) return;
  event.preventDefault();
  send(event.target, event.submitter);
});

// A filter works as one types.
addEventListener("input", event => {
  const form = event.target.closest("form[data-live]");
  if (!form) return;
  const wanted = [...new FormData(form)].filter(([, text]) => text);
  history.replaceState(null, "", "?" + new URLSearchParams(wanted));
  refresh();
});

for (const kind of ["keydown", "pointerdown", "pointermove", "wheel"])
  addEventListener(kind, () => { attended = true; }, { passive: true });
if (main.dataset.refresh) history.replaceState(null, "", main.dataset.refresh);     // a form was sent to elsewhere
setTimeout(watch, PERIOD);
"""


# === Views ===================================================================
# The pages: a request that `authorize` let through comes in, a page or a redirect goes out. Rows are read in one
# session, what is to be done is asked of Actions, and templates draw it. Runs in the console's threads; nothing is
# kept between requests. A form that fails shows again what was typed, whatever was wrong; secrets never come back.
# Gives: Answer, EVENTS_SHOWN, PAGES, add_template_globals, query_of, refuse, render_page, STATES
STATES = ("unhealthy", "unknown", "degraded", "maintenance", "healthy")     # worst first, as pages sort and filter
TROUBLE = frozenset({"unhealthy", "unknown", "degraded"})
EVENT_NAMES = 10_000            # events that are looked through for names of what was removed
EVENTS_SHOWN = 100              # of a page
MARKS = 200                     # events of a resource that its charts look through
ASSETS = {f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.{suffix}": (kind, text) for suffix, kind, text in (
    ("css", "text/css", STYLE), ("js", "text/javascript", PAGE_SCRIPT),
    *((f"{state}.svg", "image/svg+xml", text) for state, text in ICONS.items()))}
KINDS = {"service": "Service", "gate": "Gate", "group": "Groups", "state": "States", "change": "Changes",
         "maintenance": "Maintenance", "acknowledgement": "Acknowledgements",
         "login": "Logins", "attempt": "Failed logins", "clock": "Clock"}
Answer = flask.typing.ResponseReturnValue


def resource_path(name: str) -> str:
    return f"{PREFIX}resources/{quote(name, safe='')}"


def add_template_globals(app: flask.Flask) -> None:
    app.jinja_options = {"loader": jinja2.DictLoader(TEMPLATES), "trim_blocks": True, "lstrip_blocks": True}
    env = app.jinja_env
    env.filters.update(duration_text=duration_text, time_tag=time_tag, resource_path=resource_path)
    env.globals.update(cause_text=cause_text,
                       assets={name.partition(".")[2]: f"{PREFIX}static/{name}" for name in ASSETS})


def asset(name: str) -> Answer:
    """Style, script or icon; its name changes with it, so that a browser may keep it."""
    kind, text = ASSETS.get(name) or flask.abort(404)
    return flask.Response(text, mimetype=kind, headers={"Cache-Control": "public, max-age=31536000, immutable"})


def render_page(page: str, status: int = 200, **shown: Any) -> flask.Response:
    """A page, `shown` in its template; its form shows `given`, and `errors` at the fields."""
    who: Principal | None = flask.g.get("principal")
    user = who.user if who else None
    common: dict[str, Any] = {
        "page": page, "title": page.capitalize(), "zone": time.strftime("%Z"), "version": VERSION, "user": user,
        "admin": user and user.role == "admin", "now": who.context.clock() if who else 0.0, "given": {}, "errors": {},
        "offset": time.localtime().tm_gmtoff,
        "icon": "healthy" if who is None or who.context.is_healthy else "unhealthy"}
    if who and user and not who.restricted:
        common |= {"override": who.context.monitor.override.now, "passed": who.context.passed,
                   "observes": who.context.lease.observes.value}
    response = flask.Response(flask.render_template("layout.html", **(common | shown)), status, mimetype="text/html")
    if flask.request.accept_encodings["gzip"]:      # no page holds a secret whose length could tell what it is
        response.set_data(gzip.compress(response.get_data(), 3))
        response.headers.update({"Content-Encoding": "gzip", "Vary": "Accept-Encoding"})
    return response


NO_SETTINGS: dict[str, Any] = {"tags": [], "critical": True, "limits": {}}


def stored_mapping(text: str, empty: Mapping[str, Any]) -> dict[str, Any] | None:
    """A mapping of the database with at least what `empty` has; None when it is damaged."""
    try:
        found = from_json(text)
        return found if all(type(found[name]) is type(value) for name, value in empty.items()) else None
    except (ValueError, TypeError, KeyError):
        return None


class ResourceRow:
    """A resource as a person reads it; texts are empty where there is nothing to say."""

    def __init__(self, row: Resource, status: Status | None, context: ConsoleContext, more: Remarks) -> None:
        self.row, self.name, self.href = row, row.name, resource_path(row.name)
        self.status = known = current_status(row, status, context)
        settings = stored_mapping(row.settings, NO_SETTINGS)    # unchecked: 1,000 of them would take too long
        self.settings = settings or NO_SETTINGS
        fall, rise = (self.settings.get(name) for name in ("fall", "rise"))     # how far it is from another state
        self.failing = f"failing {known.bad} of {fall}" if known.bad and known.state in ("healthy", "degraded") else ""
        self.recovering = f"{known.good} of {rise} good" if known.good and known.state == "unhealthy" else ""
        poller = context.monitor.pollers.get(row.name)
        last = poller.news.last.verdict if poller and poller.news.last and self.failing else known
        self.reason = DAMAGED if settings is None else cause_text(last.cause, last.reason)
        self.maintenance, self.seen = more.maintenance.get(row.name), more.seen.get(row.name)
        self.shown_state = "maintenance" if self.maintenance else known.state
        self.is_sick = is_sick(known)
        self.strip = strip_svg(status.strip if status else "")
        self._sample, self.read_at = last_sample(row, status, known)

    @functools.cached_property
    def sample(self) -> dict[str, Any] | None:
        """What the last poll read, or the last one that read anything; None when it is damaged."""
        return NO_SAMPLE if self._sample == "null" else stored_mapping(self._sample, NO_SAMPLE)

    @property
    def address(self) -> str:
        port = "" if self.row.port in (SSH_PORT, *WINRM_PORTS.values()) else f":{self.row.port}"
        return self.row.platform if self.row.platform in HOSTLESS else (
            f"{self.row.hostname}{port} · {self.row.platform}")

    @property
    def labels(self) -> list[str]:
        tags: list[str] = self.settings["tags"]
        return tags if self.settings["critical"] else [*tags, "not critical"]

    def limit(self, metric: str, mount: str = "") -> LimitValues:
        limit = self.settings["limits"].get(metric) or {}
        key = matching_key(limit.get("mounts") or (), mount)
        own = limit if key is None else limit["mounts"][key]
        return own if isinstance(own, dict) else {}     # or off

    @functools.cached_property
    def found(self) -> dict[str, float]:
        return highest_readings((self.sample or NO_SAMPLE)["metrics"])

    @property
    def bars(self) -> Markup:
        """The cells of the overview's readings, in one piece: three for 1,000 rows each would be escaped once more."""
        cells, found, old = "", self.found, ' class="old"' if self.read_at else ""
        for metric in ("cpu_percent", "memory_percent", "disk_percent"):
            value = found.get(metric)
            bar = "" if value is None else f"{bar_svg(value, self.limit(metric))}{value:.0f} %"
            cells += f'<td{old} data-label="{LABELS[metric]}">{bar}</td>'
        return Markup(cells)    # noqa: S704  # numbers and our own words

    @property
    def counts(self) -> bool:
        """Whether the gate depends on it now, be it through a group."""
        return self.settings["critical"] and not self.maintenance

    @property
    def sort_key(self) -> tuple[int, bool, float, str]:
        """Worst first; among those not healthy, what the gate depends on, and what happened last."""
        newest_first = 0.0 if self.shown_state == "healthy" else -self.status.since_at
        return STATES.index(self.shown_state), not self.settings["critical"], newest_first, self.name

    def matches(self, wanted: Mapping[str, str]) -> bool:
        """Whether it passes every filter but that of its state."""
        tags = self.settings["tags"]
        words = (self.name, self.row.hostname, self.row.platform, self.reason, *tags)
        return (wanted["tag"] in ("", *tags) and wanted["cause"] in ("", self.status.cause)
                and wanted["gate"] in ("", "yes" if self.counts else "no")
                and wanted["q"].casefold() in "\n".join(words).casefold())


def query_of(parts: Mapping[str, str]) -> str:
    """The query of a link, without what is empty."""
    return "?" + urlencode({name: value for name, value in parts.items() if value})


# --- the overview ---
FILTERS = ("state", "q", "tag", "cause", "gate", "by", "sort", "unfold")      # of its query
ROWS_SHOWN = 60         # resources that are shown at once; of more, those that are well are folded
COLUMNS: dict[str, tuple[str, Callable[[ResourceRow], Any] | None]] = {   # by the word of the query: how it sorts
    "": ("State", lambda row: row.sort_key), "name": ("Resource", lambda row: row.name),
    "since": ("For", lambda row: row.status.since_at), "polled": ("Last poll", lambda row: row.status.polled_at),
    "cpu": ("CPU", lambda row: row.found.get("cpu_percent", -1.0)),
    "memory": ("Memory", lambda row: row.found.get("memory_percent", -1.0)),
    "disk": ("Fullest disk", lambda row: row.found.get("disk_percent", -1.0)),
    "strip": ("Last 60 polls", None)}
NO_TITLE = {"tag": "Without a tag", "group": "In no group"}


class RowSection(NamedTuple):
    """Rows under a heading; without a title there is none."""

    title: str
    rows: list[ResourceRow]
    counts: list[tuple[str, int]]
    hidden: int                 # so many are not shown
    href: str                   # shows or folds them


def blockers_of(rows: Iterable[ResourceRow], groups: Collection[GroupState]) -> list[dict[str, Any]]:
    """What keeps the gate closed, since a Unix time: groups that count, and resources that count by themselves."""
    monitor = current_principal().context.monitor
    through = {name for group in groups for name in group.members}      # these count for the site through a group
    found: list[dict[str, Any]] = [
        {"name": group.name, "reason": group.why, "at": monitor.changed_at(group.name)} for group in groups
        if group.state == "unhealthy" and group.name not in through and not group.name.startswith("/")]
    return found + [
        {"name": row.name, "href": row.href, "reason": row.reason, "at": row.status.since_at}
        for row in sorted(rows, key=lambda each: (each.status.cause == "parent", each.status.since_at))
        if row.counts and row.name not in through and row.shown_state in ("unhealthy", "unknown")]


def column_heads(wanted: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The heads of the columns: a link that sorts by it or, where it does already, turns the order."""
    sort = wanted["sort"]
    for word, (label, key) in COLUMNS.items():
        is_it, turned = sort.removeprefix("-") == word, sort.startswith("-")
        href = query_of({**wanted, "sort": f"-{word}" if is_it and not turned else word}) if key else ""
        yield {"label": label, "href": href, "order": ("descending" if turned else "ascending") if is_it else ""}


def members_of(rows: Iterable[ResourceRow], by: str, groups: Iterable[GroupState]) -> dict[str, list[ResourceRow]]:
    """Rows by the title of what they are in: tags, groups, or all of them together."""
    named: dict[str, list[str]] = collections.defaultdict(list)
    for group in groups if by == "group" else ():
        for name in group.members:
            named[name].append(group.name)
    found: dict[str, list[ResourceRow]] = collections.defaultdict(list)
    for row in rows:
        for title in (row.settings["tags"] if by == "tag" else named[row.name]) or [NO_TITLE.get(by, "All")]:
            found[title].append(row)
    return found


def sections_of(rows: list[ResourceRow], wanted: Mapping[str, str], groups: Iterable[GroupState]) -> list[RowSection]:
    """Rows as they are shown: where there are many, what is well is folded away, and of the rest a part is shown."""
    is_many, left = len(rows) > ROWS_SHOWN, ROWS_SHOWN
    by = wanted["by"] or ("tag" if is_many else "none")
    key = COLUMNS.get(wanted["sort"].removeprefix("-"), COLUMNS[""])[1]
    rows = sorted(rows, key=key, reverse=wanted["sort"].startswith("-")) if key else rows
    if by == "none" and not is_many:
        return [RowSection("", rows, [], 0, "")]
    made = []
    for title, members in sorted(members_of(rows, by, groups).items()):
        is_whole = not is_many or wanted["unfold"] == title
        troubled = [row for row in members if row.shown_state in TROUBLE]
        shown = members if is_whole else (members if wanted["state"] else troubled)[:left]
        left -= 0 if is_whole else len(shown)
        counts = collections.Counter(row.shown_state for row in members)
        href = query_of({**wanted, "unfold": "" if is_whole else title})
        hidden = len(members) - len(shown)
        made.append(RowSection(title, shown, [(state, counts[state]) for state in STATES if counts[state]], hidden,
                               href if is_many and (hidden or is_whole) else ""))
    return made


def overview_choices(rows: Sequence[ResourceRow], found: Sequence[ResourceRow], wanted: dict[str, str],
                     groups: Iterable[GroupState]) -> dict[str, Any]:
    """What the overview offers to choose from: states of what was `found`, tags and causes of all rows; and what
    maintenance can be chosen for, as a form gives it and as one reads it."""
    tags = sorted({tag for row in rows for tag in row.settings["tags"]})
    scopes = {"all": "everything"} | {f"tags:{tag}": f"tag {tag}" for tag in tags} | {
        f"groups:{group.name}": f"group {group.name}" for group in groups if not group.name.startswith("/")}
    counts = collections.Counter(row.shown_state for row in found)
    links = [(state, query_of({**wanted, "state": state}), state.capitalize() or "All", counts[state] or len(found))
             for state in ("", *STATES) if counts[state] or state in ("", wanted["state"])]
    return {"state_links": links, "filter": wanted, "columns": list(column_heads(wanted)), "empty": not rows,
            "tags": tags, "causes": sorted({row.status.cause for row in rows} - {""}), "scopes": scopes}


def overview(**more: Any) -> flask.Response:
    """Every resource, worst first, and the gate."""
    context = current_principal().context
    now = context.clock()
    wanted = {name: flask.request.args.get(name, "") for name in FILTERS}
    with context.store.reading() as session:
        more_known, turns = remarks(session, now), timetable(session, now)
        everything = [ResourceRow(row, status, context, more_known) for row, status in session.execute(RESOURCES)]
        is_open, last = context.is_healthy, next(iter(events(session, kind="gate", limit=1)), None)
        ours = sqlalchemy.or_(Receiver.is_told, Receiver.name == context.store.own(HEARTBEAT))
        untold = session.execute(sqlalchemy.select(Receiver.name, Receiver.trouble).where(
            Receiver.trouble != "", ours)).all()
    groups = list_groups(current_principal())
    blockers = [] if is_open else blockers_of(everything, groups)
    found = [row for row in everything if row.matches(wanted)]
    rows = [row for row in found if wanted["state"] in ("", row.shown_state)]
    states = collections.Counter(row.shown_state for row in everything)
    title = f"{states['unhealthy']} unhealthy, gate " if states["unhealthy"] else "gate "
    troubled = states.keys() & TROUBLE
    return render_page("overview", title=title + ("open" if is_open else "closed"), is_open=is_open, last=last,
                       icon="unhealthy" if not is_open else "degraded" if troubled else "healthy", blockers=blockers,
                       said={blocker["name"] for blocker in blockers[:5]}, groups=groups, rows=rows,
                       sections=sections_of(rows, wanted, groups), cut=context.monitor.uplink.cut,
                       clock_step=context.monitor.clock_step, turns=turns, untold=untold,
                       refresh="" if flask.request.method == "GET" else PREFIX,
                       **overview_choices(everything, found, wanted, groups), **more)


def reading_rows(sample: Mapping[str, Any], resource: ResourceRow, damage: str) -> list[dict[str, Any]]:
    """Each metric that was read, has a limit, or could not be read."""
    rows: list[dict[str, Any]] = [{"label": "All of them", "limit": {}, "problem": damage}] if damage else []
    for metric, label in LABELS.items():
        limit, problem = resource.limit(metric), sample["problems"].get(metric, "")
        top = 100.0 if metric.endswith("_percent") else 1.25 * max(filter(None, limit.values()), default=0.0)
        found = [(name, value) for name, value in sample["metrics"].items() if name.partition(" ")[0] == metric]
        for name, value in found:
            mount = name.partition(" ")[2]
            own = resource.limit(metric, mount)
            rows.append({"label": f"{label} {mount}", "limit": own, "text": amount(metric, value),
                         "bar": bar_svg(value, own, top) if top else ""})
        if problem or (limit and not found and not damage):
            rows.append({"label": label, "limit": limit, "problem": problem or "not read"})
    limits_of = {check["name"]: check.get("limits", {}) for check in resource.settings.get("checks", ())}
    for check, outcome in sample["checks"].items():
        numbers, limits = outcome.get("metrics", {}), limits_of.get(check, {})
        rows += [{"label": f"{check}/{label}", "limit": limits.get(label, {}),
                  **({"text": f"{numbers[label]:g}"} if label in numbers else {"problem": "not read"})}
                 for label in {**numbers, **limits}]
    return rows


MACHINE = {"hostname": "Host name", "os": "System", "kernel": "Kernel", "cpu_count": "CPUs",
           "uptime_seconds": "Up for", "host_key": "Host key", "memory_limit": "Memory is that of",
           "skipped_filesystems": "Filesystems skipped", "hidden_filesystems": "Filesystems hidden"}


def chart_points(session: Session, resource: ResourceRow, span: str, now: float) -> Iterator[
        tuple[str, str, LimitValues, list[Point]]]:
    """Label, metric, limit and points of each chart, of disks the fullest one and then all."""
    for metric, label in LABELS.items():
        if metric in METRICS:
            yield label, metric, resource.limit(metric), chart(session, resource.row.id, metric, span, now)
        if metric == "disk_percent":
            for mount, points in filesystem_charts(session, resource.row.id, span, now).items():
                yield f"{label} {mount}", metric, resource.limit(metric, mount), points


def charts(session: Session, resource: ResourceRow, span: str, now: float) -> list[dict[str, Any]]:
    """What was read over a span of SPANS: a drawing with what happened meanwhile, and the same as a table."""
    begin, drawn = now - SPANS[span][0], []
    written = "%H:%M" if span in ("hour", "day") else "%d %b"
    times = [time.strftime(written, time.localtime(begin + part * SPANS[span][0] / 4)) for part in range(5)]
    marks = list(marks_of(events(session, resource=resource.name, limit=MARKS), begin, now))
    for label, metric, limit, points in chart_points(session, resource, span, now):
        if points:
            highest = max(point.maximum for point in points)
            top = 100.0 if metric.endswith("_percent") else scale_top([highest, *filter(None, limit.values())])
            average = sum(point.average for point in points) / len(points)
            drawn.append({"label": label, "average": amount(metric, average), "times": times, "begin": begin,
                          "end": now, "top": top, "unit": unit_of(metric), "last": len(points) - 1,
                          "highest": amount(metric, highest),
                          "svg": chart_svg(points, limit, (begin, now), top, marks),
                          "table": [(part.at, *(amount(metric, value) for value in part[1:]))
                                    for part in table_rows(points, begin, now)],
                          "scale": [f"{part * top:g}" for part in (1, 0.5, 0)]})
    return drawn


def availability_rows(session: Session, resource_id: int, now: float) -> list[tuple[str, float | None]]:
    """Spans with their availability, as far as there is anything: what is longer says the same."""
    found, since = availability(session, resource_id, now), known_since(session, resource_id)
    whole = [(span, percent) for span, percent in found.items() if since and since <= now - SPANS[span][0]]
    longer = list(found.values())[len(whole):]
    return [*whole, (f"since {local_time(since)}", longer[0])] if since and longer else whole or [("", None)]


def resource_page(name: str, **more: Any) -> flask.Response:
    context, request = current_principal().context, flask.request
    now = context.clock()
    span = request.args.get("span", "")
    span = span if span in SPANS else "hour"
    with context.store.reading() as session:
        row = find_resource(session, name)
        resource = ResourceRow(row, session.get(Status, row.id), context, remarks(session, now))
        known = choices(session)
        more["turns"] = [turn for turn in timetable(session, now) if name in known.of(turn.scope)]
        more |= {"charts": charts(session, resource, span, now),
                 "availability": availability_rows(session, row.id, now),
                 "polls": samples(session, row.id, now), "events": events(session, resource=name, limit=20)}
    sample = resource.sample or NO_SAMPLE
    damage = "damaged in the database; the next poll writes them again" if resource.sample is None else ""
    outcomes = sorted(((kind, called, outcome) for kind in ("service", "check")
                       for called, outcome in sample[f"{kind}s"].items()),
                      key=lambda row: (bool(row[2]["good"]), not row[2].get("degraded")))     # worst first
    return render_page("resource", title=f"{name}: {resource.status.state}", shown=resource, span=span,
                       readings=reading_rows(sample, resource, damage),
                       span_links=[(name, f"?span={name}", f"Last {name}", None) for name in SPANS],
                       machine=MACHINE, details={**sample["details"], "host_key": row.host_key},
                       login_wait=context.monitor.login_wait(name), connection=connection_view(context, name),
                       origin=row.origin == "inventory" and (row.place or context.inventory.path.name),
                       refresh="" if request.method == "GET" else resource.href,
                       outcomes=outcomes, **more)


def event_page() -> Answer:
    who, args = current_principal(), flask.request.args
    wanted = {name: args.get(name, "") for name in ("kind", "resource", "before")}
    found = list_events(who, {"limit": EVENTS_SHOWN} | {name: text for name, text in wanted.items() if text})
    newest = sqlalchemy.select(Event.resource).order_by(Event.id.desc()).limit(EVENT_NAMES).subquery()
    with who.context.store.reading() as session:
        known = set(session.scalars(sqlalchemy.select(Resource.name)))
        gone = {*session.scalars(sqlalchemy.select(newest.c.resource).distinct()), wanted["resource"]} - known - {""}
    names = {name: name if name in known else f"{name} (removed)" for name in sorted(known | gone)}
    older = query_of({**wanted, "before": str(found[-1].id)}) if len(found) == EVENTS_SHOWN else ""
    return render_page("events", events=found, kinds=KINDS, filter=wanted, names=names, known=known, older=older,
                       refresh=None if wanted["before"] else "")


# --- forms ---
TYPED = "typed."                # begins the names of what was typed into a form before the login
RETYPABLE = re.compile(     # forms that show it again
    r"/-/(add|override|maintenance|tokens|users(/[^/]+)?|resources/[^/]+/(edit|maintenance|acknowledgement))")
NEVER_SHOWN = ("password", "current", "new", "again")   # secrets of the forms
INPUTS = ("platform", "name", "interval", "critical", "hostname", "url", "port", "username", "password")
OTHERS = [name for name in ResourceSettings.model_fields if name not in {*INPUTS, *INVENTORY_ONLY}]
EXAMPLE = """limits: {memory_percent: {warn: 80, fail: 95}, disk_percent: 90}
services: [postgresql, cron]
checks: [{name: queue, command: test ! -e /var/spool/stalled}]
tags: [database]"""


def api_error(error: Exception) -> ApiError:
    """A failure as a refusal; keys, secrets and rows that cannot be read are said to the operator in so many words."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):    # Flask's: unknown paths, methods, large or broken requests, failures
        return ApiError(error.description or "", error.code or 500)
    if isinstance(error, sqlalchemy.exc.SQLAlchemyError):
        log.error("the database cannot be used: %s", one_line(str(getattr(error, "orig", error))))
        return ApiError("the database cannot be used now; see the log", 503, retry=1)
    return ApiError(str(error), 409)


def told(error: ApiError) -> str:
    """What a person is told of a refusal; how long it is to wait, too."""
    wait = math.ceil(error.retry)
    return f"{error}. Next attempt in {duration_text(wait)}." if error.status == 429 and wait > 1 else str(error)


def form_texts(row: Resource | None, inventory: Inventory) -> dict[str, str]:
    """What the form shows of a resource: the inputs, and as YAML what it states besides; of a new one the defaults."""
    values = stated(row, inventory) if row else {
        field: value for field, value in shared_defaults(inventory).items()
        if field in INPUTS or field not in foreign_fields(Platform.SIMULATED.value)}    # what all machines have
    values = json.loads(json.dumps(values),     # 90 and not 90.0
                        parse_float=lambda text: float(text) if float(text) % 1 else int(float(text)))
    texts = {name: str(values[name]) for name in INPUTS if values.get(name) is not None}
    other = {name: value for name, value in values.items() if name in OTHERS}
    texts["settings"] = yaml.safe_dump(other, sort_keys=False, allow_unicode=True,
                                       default_flow_style=None) if other else ""
    return {"platform": Platform.UNIX.value, **texts, "critical": "true" if values.get("critical", True) else ""}


def form_page(name: str = "", given: Mapping[str, str] | None = None, **more: Any) -> flask.Response:
    """The form to add a resource, or to change the one called `name`."""
    who, copied = current_principal(), "" if name or given is not None else flask.request.args.get("copy", "")
    if given is None:
        with who.context.store.reading() as session:
            row = find_resource(session, copied) if copied else changeable(who, session, name) if name else None
        given = form_texts(row, who.context.imported) | ({"name": ""} if copied else {})
    return render_page("form", title=f"Edit {name}" if name else "Add a resource", name=name, given=given,
                       copied=copied, others=OTHERS, example=EXAMPLE,
                       platforms=[platform for platform in SELECTABLE if platform != "local"],
                       ports=f"{SSH_PORT}; Windows: {WINRM_PORTS[True]}", **more)


def form_settings(form: Mapping[str, str], document: Document, defaults: Collection[str] | None) -> dict[str, Any]:
    """The settings in the inventory's names, of the inputs and the text area; None stands for the default. Of a new
    one the form showed the `defaults`, with or without a meaning on its platform."""
    other = document.value or {}
    if not isinstance(other, dict):
        raise InventoryError(f"{document.name}:1:1: must be settings (name: value)")
    faults = [f"{document.name}:{document.position((name,), key=True)}: {name} has an input of its own"
              for name in INPUTS if name in other]
    if faults or document.faults:
        raise InventoryError("\n".join(document.faults + faults))
    inputs = {name: form.get(name, "").strip() or None for name in INPUTS} | {"critical": form.get("critical", "false")}
    if inputs["password"] is None:
        del inputs["password"]      # the stored one stays
    foreign = foreign_fields(inputs["platform"] or Platform.UNIX.value)     # what stands in hidden inputs
    other = {name: value for name, value in other.items() if name not in foreign.intersection(defaults or ())}
    if isinstance(other.get("limits"), dict) and defaults is None:
        other["limits"] = dict.fromkeys(Limits.model_fields) | other["limits"]     # what is not given goes
    return {**dict.fromkeys(OTHERS), **inputs, **dict.fromkeys(foreign & inputs.keys()), **other}


def resource_form(who: Principal, name: str = "") -> Answer:
    form = flask.request.form
    try:
        document = Document("YAML", form.get("settings", "").encode())
        body = form_settings(form, document, None if name else shared_defaults(who.context.imported))
    except InventoryError as error:
        raise field_errors({"settings": str(error)}) from None
    if form.get("do") == "test":
        trial = test_changes(who, name, body, document) if name else test_settings(who, body, document)
        found = f"{trial.state} in {trial.seconds:.2f} s"
        found += f": {trial.reason}" if trial.reason else ""
        found += f"; it would trust {trial.host_key}" if trial.host_key else ""
        return form_page(name, form, outcome=trial.state, problem=found)
    saved = change_resource(who, name, body, document) if name else add_resource(who, body, document)
    return flask.redirect(resource_path(saved.name), 303)


def typed_term(form: Mapping[str, str]) -> dict[str, Any]:
    start = form.get("start")
    return {"for": f"{form.get('minutes', '')}m", "reason": form.get("reason", "")} | (
        {"start": chosen_moment(start)} if start else {})


def maintenance_form(who: Principal, name: str) -> None:
    form = flask.request.form
    if form.get("minutes") == "0":
        return end_maintenance(who, name)
    begin_maintenance(who, name, typed_term(form))


def work_form(who: Principal) -> None:
    """The same of what is chosen in the overview."""
    form = flask.request.form
    if "end" in form:
        return cancel_work(who, form["end"])
    field, _, chosen = form.get("scope", "").partition(":")
    start_work(who, {field: [chosen] if chosen else True} | typed_term(form))


def acknowledgement_form(who: Principal, name: str) -> None:
    form = flask.request.form
    if "end" in form:
        return end_acknowledgement(who, name)
    acknowledge_resource(who, name, {"comment": form.get("comment", "")})


def trust_form(who: Principal, name: str) -> Answer | None:
    """Shows the key that the host offers now, or trusts the one that was shown."""
    if key := flask.request.form.get("key"):
        trust_resource(who, name, {"host_key": key})
        return None
    return resource_page(name, offered=who.context.offered_key(name))


def user_page(name: str = "", number: str = "", **more: Any) -> flask.Response:
    """Users and sessions; the form to add one shows what was wrong with it, and not what was with others."""
    who = current_principal()
    if name or number:
        more = {**more, "changed": {name: more.get("given", {})}, "given": {}, "errors": {}}
    return render_page("users", users=list_users(who), sessions=list_sessions(who), roles=get_args(Role), **more)


def token_page(number: str = "", **more: Any) -> flask.Response:
    """API tokens, and the form to make one."""
    who = current_principal()
    if number:
        more = {**more, "given": {}, "errors": {}}
    roles = [role for role in reversed(get_args(Role)) if who.may(role)]
    return render_page("tokens", title="API tokens", tokens=list_tokens(who), roles=roles, never=NEVER, **more)


def filled() -> dict[str, str]:
    """What the form says; what is left empty stays as it is."""
    return {name: text for name, text in flask.request.form.items() if text}


def password_form(who: Principal) -> Answer:
    """Changes one's own password, and goes on with a new session."""
    form = flask.request.form
    if form.get("again") != form.get("new"):
        raise field_errors({"again": "is not the same"})
    user = change_password(who, {name: form.get(name, "") for name in ("current", "new")})
    return give_cookie(flask.redirect(PREFIX, 303), open_session(who, "session", user))


def form_route(path: str, page: Callable[..., flask.Response], action: Callable[..., object],
               after: str = "") -> Route:
    """A form: `action` answers it, or it leads to `after` (the resource); `page` shows what was wrong with it, or
    what was typed into it before a login."""
    def answer(**names: str) -> Answer:
        form = flask.request.form
        if typed := {name.removeprefix(TYPED): text for name, text in form.items() if name.startswith(TYPED)}:
            return page(**names, given=typed, outcome="degraded", problem="You are logged in again. Nothing has been "
                        "done yet; passwords have to be typed again.")
        try:
            done = action(current_principal(), *names.values())
        except (HealthCheckerError, sqlalchemy.exc.SQLAlchemyError) as failure:
            error = api_error(failure)
            return page(**names, status=error.status, given=form, errors=error.fields,
                        problem=told(error))
        return done if isinstance(done, flask.Response) else flask.redirect(after or resource_path(**names), 303)

    return Route("POST", path, "admin", answer)


def login_again() -> flask.Response:
    """For a form that came without a session: the login, which leads back to it and to what was typed into it.

    A form that another site sent brings nothing: its texts would look as if they had been typed here."""
    request = flask.request
    kept = RETYPABLE.fullmatch(request.path) and is_same_origin(request)
    typed = {TYPED + name: text for name, text in request.form.items() if kept and name not in NEVER_SHOWN}
    shown = re.match(r"/-/(add|password|users|tokens|resources/[^/]+)?", request.path)
    after = quote(request.path if typed else shown[0] if shown else PREFIX)
    return render_page("log in", 401, typed=typed, outcome="degraded", action=f"/-/login?next={quote(after)}",
                       problem="Your session is over. Log in, and what was typed is there again, but for passwords.")


def login_form() -> Answer:
    """Begins a session: a new one, whatever cookie came with the request."""
    who, form = current_principal(), flask.request.form
    typed = {name: text for name, text in form.items() if name.startswith(TYPED)}
    try:
        user = sign_in(who, {name: form.get(name, "") for name in Credentials.model_fields})
    except ApiError as refusal:
        return render_page("log in", refusal.status, problem=told(refusal), given=form, typed=typed)
    after = flask.request.args.get("next", "")
    if not after.startswith(PREFIX) or not after.isprintable() or "\\" in after:
        after = PREFIX      # after a login nobody is sent elsewhere
    status = 307 if typed and RETYPABLE.fullmatch(after) else 303       # 307 sends what was typed along, to be shown
    return give_cookie(flask.redirect(after, status), open_session(who, "session", user))


def logout_form() -> Answer:
    sign_out(current_principal())
    return give_cookie(flask.redirect("/-/login", 303), "")


def error_page(error: ApiError) -> Answer:
    """What a browser gets instead of the page; those who have to log in are led there and back."""
    is_form = flask.request.method not in SAFE_METHODS
    if error.status == 401:
        after = quote(flask.request.full_path.rstrip("?"))
        return login_again() if is_form else flask.redirect(f"/-/login?next={after}", 303)
    who: Principal | None = flask.g.get("principal")
    if who and who.operator and who.restricted and error.status == 403 and not is_form:
        return flask.redirect("/-/password", 303)
    icon = {"icon": "unknown"} if error.status >= 500 else {}    # nothing is known to be well
    return render_page("error", error.status, **icon, title=http.HTTPStatus(error.status).phrase, problem=told(error))


def refuse(failure: Exception) -> Answer:
    """The answer to a request that is refused, for programs or for people."""
    error = api_error(failure)
    is_api = flask.request.path.startswith(API)
    response = flask.make_response(problem(error) if is_api else error_page(error))
    if error.status == 401 and is_api:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.retry:
        response.headers["Retry-After"] = str(math.ceil(error.retry))
    if allowed := getattr(failure, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


RESOURCE_PAGE, USERS, TOKENS = "/-/resources/<name>", "/-/users", "/-/tokens"
PAGES = (
    Route("GET", "/-/", "viewer", overview),
    form_route("/-/override", overview, lambda who: override_gate(who, filled()), PREFIX),
    Route("GET", RESOURCE_PAGE, "viewer", resource_page),
    Route("GET", "/-/add", "admin", form_page),
    form_route("/-/add", form_page, resource_form),
    Route("GET", RESOURCE_PAGE + "/edit", "admin", form_page),
    form_route(RESOURCE_PAGE + "/edit", form_page, resource_form),
    form_route(RESOURCE_PAGE + "/check", resource_page, poll_now),
    form_route(RESOURCE_PAGE + "/maintenance", resource_page, maintenance_form),
    form_route(RESOURCE_PAGE + "/acknowledgement", resource_page, acknowledgement_form),
    form_route("/-/maintenance", overview, work_form, PREFIX),
    form_route(RESOURCE_PAGE + "/trust", resource_page, trust_form),
    form_route(RESOURCE_PAGE + "/remove", resource_page, remove_resource, PREFIX),
    Route("GET", "/-/events", "viewer", event_page),
    Route("GET", USERS, "admin", user_page),
    form_route(USERS, user_page, lambda who: add_user(who, filled()), USERS),
    form_route(USERS + "/<name>", user_page, lambda who, name: change_user(who, name, filled()), USERS),
    form_route(USERS + "/<name>/remove", user_page, remove_user, USERS),
    form_route("/-/sessions/<number>/end", user_page, end_session, USERS),
    Route("GET", TOKENS, "viewer", token_page),
    replace(form_route(TOKENS, token_page, lambda who: token_page(made=make_token(who, filled()))), needs="viewer"),
    replace(form_route(TOKENS + "/<number>/revoke", token_page, revoke_token, TOKENS), needs="viewer"),
    Route("GET", "/-/static/<name>", "", asset),
    Route("GET", "/-/login", "", lambda: render_page("log in")),
    Route("POST", "/-/login", "", login_form),
    Route("POST", "/-/logout", "viewer", logout_form, restricted=True),
    Route("GET", "/-/password", "viewer", lambda: render_page("change the password"), restricted=True),
    replace(form_route("/-/password", functools.partial(render_page, "change the password"), password_form),
            needs="viewer", restricted=True),
)


# === Boards ==================================================================
# What the gate did, and how it stands, to be looked at: in come incidents and what the service says of itself, out go
# a page for who is logged in and, where service.status_page or a token says so, one for a wall or for anybody, which
# names no resource but by its public_name. Runs in the console's threads.
# Gives: BOARDS
TURNS_SHOWN = 5                 # of planned work on the status page


def incident_page() -> Answer:
    """When the gate was closed, and for how much of the time site, groups and routes were open."""
    who, args = current_principal(), flask.request.args
    span, group, now = args.get("span", ""), args.get("group", SITE), who.context.clock()
    span = span if span in UPTIMES else "month"
    begin, names = now - UPTIMES[span] * DAY, [SITE, *(each.name for each in list_groups(who))]
    with who.context.store.reading() as session:
        found = incidents(session, group=group, since=begin, limit=EVENTS_SHOWN)
        rows = [{"name": name, "href": query_of({"span": span, "group": name}), "uptime": uptime(session, name, now),
                 "strip": strip_svg(gate_strip(session, name, span, now), f"Last {span}"),
                 "refusals": refusals(session, name, begin)} for name in names]
    links = [(name, query_of({"span": name, "group": group}), f"Last {name}", None) for name in UPTIMES]
    asked = urlencode({"group": group, "since": written(begin)})
    return render_page("incidents", title="Incidents", found=found, rows=rows, span=span, span_links=links,
                       group=group, asked=asked, refresh="")


def shown_token(header: str) -> bytes:
    """What an Authorization header bears: a token, or a password of the Basic scheme, which browsers can show."""
    scheme, _, text = header.partition(" ")
    with contextlib.suppress(ValueError):
        if scheme.lower() == "basic":
            return base64.b64decode(text.strip(), validate=True).partition(b":")[2]
    return text.strip().encode("utf-8", "replace") if scheme.lower() == "bearer" else b""


def may_see_status(context: ConsoleContext) -> bool:
    """Whether who asks now may see the status page. Raises HTTPException where there is none."""
    if context.inventory.service.status_page:
        return True
    with context.store.reading() as session:
        row = session.scalar(sqlalchemy.select(Receiver).where(Receiver.name == context.store.own(STATUS_TOKEN)))
    wanted = context.vault.open(row.url, *row.bound) if row else flask.abort(404)
    return hmac.compare_digest(wanted.encode(), shown_token(flask.request.headers.get("Authorization", "")))


def named_states(context: ConsoleContext) -> dict[str, str]:
    """The states of what has a public name, by that; of several the worst."""
    targets, found = context.monitor.targets, dict[str, str]()
    for name, standing, counted in context.monitor.standings():
        if name in targets and (public := targets[name].settings.public_name):
            states = {standing.state if counted else "maintenance", found.get(public, "healthy")}
            found[public] = min(states, key=STATES.index)
    return found


def public_turns(context: ConsoleContext, session: Session, now: float) -> Iterator[dict[str, Any]]:
    """What is planned. Reasons are for who is logged in, and tags may be called by a host."""
    turns, targets = timetable(session, now)[:TURNS_SHOWN], context.monitor.targets
    known = choices(session) if turns else None
    for turn in turns:
        within = {targets[name].settings.public_name for name in known.of(turn.scope) & targets.keys()} if known else {}
        named = [*turn.scope.groups, *sorted(filter(None, within))]
        yield {"what": "everything" if turn.scope.all else ", ".join(named) or "a part of it",
               "begun": turn.state == "begun", "start": turn.start, "until": turn.until}


def remark_of(view: ServiceView, override: Override | None) -> str:
    """What there is to say of the gate without a word of a resource."""
    if override:
        said = f"{'Opened' if override.action == 'open' else 'Closed'} by an operator."
    else:
        said = "Something is not well." if view.state == "degraded" else ""
    return f"{said} Nothing is refused." if view.mode == "observe" else said


def status_page() -> Answer:
    """How the gate stands; what is not known to be well is not shown as that."""
    context = current_principal().context
    if not may_see_status(context):
        return flask.Response("this page needs its token\n", 401, {
            "WWW-Authenticate": 'Basic realm="status", charset="UTF-8"'}, mimetype="text/plain")
    word, shown = "unknown", dict[str, Any](remark="The service says nothing new.")
    with contextlib.suppress(StorageError, sqlalchemy.exc.SQLAlchemyError), context.store.reading() as session:
        view, turns = told_by_service(context.store, session), [*public_turns(context, session, context.clock())]
        shown = {"remark": remark_of(view, context.monitor.override.now), "since": view.gates[0].since, "turns": turns,
                 "parts": [*((gate.name, gate.state, gate.since) for gate in view.gates[1:]),
                           *((name, state, None) for name, state in sorted(named_states(context).items()))]}
        word = view.state
    if not context.is_healthy and word != "closed":     # the lease is the truth; the rest is of a moment ago
        word, shown["since"] = "closed", None
    icon = {"open": "healthy", "closed": "unhealthy"}.get(word, word)
    return render_page("status", title=word, icon=icon, wall=True, refresh="", **shown)


BOARDS = (Route("GET", "/-/incidents", "viewer", incident_page), Route("GET", "/-/status", "public", status_page))


# === Console =================================================================
# The operators' door: pages, API and metrics as a Flask application under plain waitress, in threads of the main
# process with a pool of their own. It answers only under names that are its own, says nothing that a request held in
# its errors, and holds few connections and small bodies, so that its clients disturb neither gate nor pollers.
# Gives: build_console, ConsoleServer
CONSOLE_CONNECTIONS = 100       # at once
CONSOLE_BODY = 1 << 18          # bytes of a request to the pages and the API
CONSOLE_DRAIN = 2.0             # seconds for requests in flight when the service ends
ADDRESS_AS_HOST = re.compile(r"(\d+(\.\d+){3}|\[[\da-f:.]+\])(:\d{1,5})?")     # no name ends in a number


def check_host(app: WSGIApplication, service: ServiceSettings) -> WSGIApplication:
    """WSGI: refuses requests under a name that is not the console's: anybody's site can let its name stand for this
    address (DNS rebinding), and its pages, of one origin with us then, would log in with the documented password. An
    address, `localhost`, this machine's name, that of `service.console` and that of `service.console_url` are ours.
    Without the latter no proxy is meant to be here: what the application's says, anyone could say beside it."""
    proxies = () if service.console_url else tuple(map(ipaddress.ip_network, service.trusted_proxy))
    names = {"localhost", socket.gethostname().lower(), service.console.rpartition(":")[0].lower()}
    if service.console_url:
        names.add(read_url(service.console_url).host)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "localhost").lower()    # without one, it is no browser
        ours = re.sub(r":\d{1,5}$", "", host) in names or ADDRESS_AS_HOST.fullmatch(host)
        if ours and not ("FORWARDED" in "".join(environ) and is_within(client_address(environ), proxies)):
            return app(environ, start_response)
        return respond(environ, start_response, ("421 Misdirected Request", [], (
            b"The console does not answer to this name: use its address or localhost, or set service.console_url, "
            b"which a proxy of trusted_proxy needs.\n")))

    return answer


def build_console(context: ConsoleContext, metrics: Metrics) -> flask.Flask:
    app = flask.Flask("healthchecker.console", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=CONSOLE_BODY, PROVIDE_AUTOMATIC_OPTIONS=False)
    app.url_map.merge_slashes = False       # it would redirect
    add_template_globals(app)
    scrape = Route("GET", METRICS_PATH, "public", lambda: (
        metrics.answer(flask.request.headers.get("Authorization", ""), operator=current_principal().operator)))
    routes = {route.key: route for route in (*API_ROUTES, *PAGES, *BOARDS, scrape)}
    for endpoint, route in routes.items():
        app.add_url_rule(route.path, endpoint, route.run, methods=[route.method])
    app.before_request(functools.partial(authorize, context, routes))
    app.after_request(add_security_headers)
    for kind in (HealthCheckerError, HTTPException, sqlalchemy.exc.SQLAlchemyError):
        app.register_error_handler(kind, refuse)
    service = context.inventory.service
    forwarded = ForwardedHeaders(check_host(app.wsgi_app, service), service.trusted_proxy)
    app.wsgi_app = check_host(forwarded, service)   # type: ignore[assignment,method-assign]  # as Flask says
    return app


class ConsoleParser(GateParser):
    """A request, read strictly; what is wrong with it is no setting's fault."""

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if not self.request_uri.isascii():      # Flask would take it for UTF-8
            raise BadRequest

    def refuse(self, error: BadRequest) -> None:
        super().refuse(BadRequest(error.status))


class ConsoleChannel(HTTPChannel):    # type: ignore[misc]  # waitress carries no types
    """A client's connection: its requests have the times that the gate's have; of too many one that is not being
    answered ends, those of nobody that the console answers first, then the oldest."""

    parser_class = ConsoleParser
    will_close: bool

    def __init__(self, server: Any, sock: socket.socket, addr: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(server, sock, addr, *arguments, **named)
        self.is_known = is_within(client_address({"REMOTE_ADDR": addr[0]}), server.known)
        if len(self._map) > CONSOLE_CONNECTIONS:
            channels = [one for one in self._map.values() if isinstance(one, ConsoleChannel)]
            min((one for one in channels if not (one.requests or one.will_close)),
                key=lambda one: one.is_known).will_close = True

    def readable(self) -> bool:
        """Asked by waitress's loop before each wait, of a second at most."""
        request = self.request
        if request and not self.requests and time.monotonic() - request.begun > (
                BODY_TIME if request.headers_finished else HEADER_TIME):
            self.will_close = True
        return bool(super().readable())


class ConsoleServer(threading.Thread):
    """The operators' door: plain waitress on sockets that are bound already."""

    def __init__(self, app: WSGIApplication, sockets: Sequence[socket.socket], service: ServiceSettings) -> None:
        self._map: dict[int, Any] = {}      # waitress's: everything that its loop watches
        self._server = waitress.create_server(
            app, self._map, sockets=list(sockets), ident=None, clear_untrusted_proxy_headers=False,
            threads=8,      # some wait for polls or for their turn at the login
            connection_limit=2 * CONSOLE_CONNECTIONS,   # never reached
            channel_timeout=30, cleanup_interval=5,
            max_request_body_size=CONSOLE_BODY,
            asyncore_use_poll=hasattr(selectors, "PollSelector"))   # select takes 1,024 descriptors, all pollers' too
        self._doors = [one for one in self._map.values() if isinstance(one, TcpWSGIServer)]
        for door in self._doors:
            door.channel_class = ConsoleChannel
            door.known = tuple(map(ipaddress.ip_network, (*service.operators, *service.trusted_proxy)))
        super().__init__(target=self._server.run, name="console", daemon=True)

    def close(self) -> None:
        """Ends all threads and connections; requests in flight have CONSOLE_DRAIN seconds."""
        self._server.task_dispatcher.shutdown(timeout=CONSOLE_DRAIN)
        if not self.is_alive():
            wasyncore.close_all(self._map)
            return
        self._doors[0].trigger.pull_trigger(functools.partial(wasyncore.close_all, self._map))   # in its own thread
        self.join(CONSOLE_DRAIN)


# === Announce ================================================================
# What one receiver is told, and when: in come events and how everything is by the rows, out go messages. An Announcer
# holds what its receiver heard, and decides by rows and clock alone; touches nothing else. In the Notifier's thread.
# Gives: Announcer, as_mapping, Delivery, Message, Picture, RETRY_FIRST, Unhealthy, Work
NOTIFY_LINES = 10               # lines of a kind in a message
RETRY_FIRST, RETRY_LONGEST = 10.0, 600.0    # seconds until the second try, and between two at most
RETRY_TIME = 3600.0             # seconds after which a message is given up
# What a host says is to mention nobody (@everyone), to hide no link behind words, to be no tag.
MARKUP = str.maketrans({mark: f"{mark}\u200b" for mark in "@<]"})
STARTING = "(the service starts)"   # a gate that opens before it is told was never closed


class Unhealthy(NamedTuple):
    """An unhealthy resource."""

    since_at: float
    why: str
    tags: frozenset[str] = frozenset()
    critical: bool = True
    is_blamed: bool = False     # on what it depends on, or on this machine: that is told, and not this


class Work(NamedTuple):
    """Maintenance that runs."""

    text: str
    since_at: float
    tags: frozenset[str] = frozenset()      # of the resources that it is of


class Picture(NamedTuple):
    """How everything is, of the same moment as the events that are taken with it."""

    unhealthy: Mapping[str, Unhealthy] = MappingProxyType({})
    healthy: Mapping[str, float] = MappingProxyType({})     # Unix times of the last polls
    excused: Collection[str] = ()       # resources in maintenance
    groups: Collection[str] = ()        # and routes
    tags: Mapping[str, frozenset[str]] = MappingProxyType({})   # of the resources that events name
    problems: Mapping[str, str] = MappingProxyType({})      # of the service itself
    acknowledged: Collection[str] = ()
    works: Mapping[str, Work] = MappingProxyType({})        # by what they are of

    def keepers(self) -> dict[str, Unhealthy]:
        """What keeps the gate or a group closed."""
        return {name: one for name, one in self.unhealthy.items()
                if one.critical and not one.is_blamed and name not in self.excused}


class Message(NamedTuple):
    """What is sent; `kind` is a type of Apprise, which colours by it."""

    title: str
    body: str
    kind: str = "info"


class Delivery(NamedTuple):
    """What came of a try; seconds that the receiver wants to be left alone."""

    is_delivered: bool
    why: str = ""
    retry_after: float = 0.0


# What a notice is of, what it is while it lasts, and what the end of it is called.
WORDS = {"gate": ("the gate", "closed", "open again"), "group": ("{}", "closed", "open again"),
         "state": ("{}", "unhealthy", "healthy again"), "problem": ("HealthChecker's {}", "in trouble", "well again"),
         "maintenance": ("{}", "in maintenance", "no longer in maintenance")}


def words_of(notice: Notice) -> tuple[str, str, str]:
    """What a notice is of, what that is while it lasts, how it ended."""
    what, lasts, ended = WORDS[notice.kind]
    return what.format(notice.name), lasts, notice.ending or ended


def headline(notice: Notice) -> str:
    """What a notice says, in a few words."""
    what, lasts, ended = words_of(notice)
    if not notice.over_at:
        return f"{what} is {'still ' if notice.told_at else ''}{lasts}"
    return f"{what} is {ended}" if notice.told_at else f"{what} was {lasts}"


def line_of(notice: Notice) -> str:
    """What a notice says."""
    what, _, ended = words_of(notice)
    often = f", {notice.times} times" if notice.times > 1 else ""
    if not notice.over_at:
        return f"{what}: {notice.text}; since {written(notice.since_at)}{often}"
    lasted = duration_text(notice.over_at - notice.since_at)
    if notice.told_at:
        return f"{what}: {ended}, {written(notice.over_at)}, after {lasted}"
    return (f"{what}: {notice.text}; from {written(notice.since_at)} to {written(notice.over_at)}, {lasted}{often}"
            f"{notice.ending and '; '}{notice.ending}")


def first_lines(lines: Sequence[str]) -> list[str]:
    more = len(lines) - NOTIFY_LINES
    return [*(one_line(line).translate(MARKUP) for line in lines[:NOTIFY_LINES]),
            *([f"and {more} more"] if more > 0 else [])]


def as_mapping(row: Notice | Receiver, *names: str) -> dict[str, Any]:
    """Columns of a row, those named or all, by name."""
    return {name: getattr(row, name) for name in names or row.__table__.columns.keys()}


def write_message(chosen: Sequence[Notice], picture: Picture, is_mine: Callable[[Collection[str]], bool],
                  console: str) -> Message:
    """What is chosen in words: lasting things first; with the gate and groups the resources that keep them closed."""
    order = [*WORDS]
    chosen = sorted(chosen, key=lambda notice: (order.index(notice.kind), notice.over_at > 0, notice.since_at))
    lasting, named = [each for each in chosen if not each.over_at], {each.name for each in chosen}
    sick = sorted((one.since_at, name, one.why) for name, one in picture.keepers().items() if is_mine(one.tags))
    sick = sick if any(each.kind in ("gate", "group") for each in lasting) else []
    lines = [*first_lines([line_of(each) for each in chosen if each.kind != "state"]),
             *first_lines([line_of(each) for each in chosen if each.kind == "state"]),
             *first_lines([f"{name}: {why}; since {written(at)}" for at, name, why in sick if name not in named])]
    title = (f"HealthChecker: {headline(chosen[0])}{f', {len(sick)} unhealthy' if sick else ''}"
             f"{f', and {len(chosen) - 1} more' if len(chosen) > 1 else ''}")
    bad = {not each.over_at for each in chosen if each.kind != "maintenance" and not each.ending}   # no recovery
    return Message(one_line(title), "\n".join(filter(None, [*lines, console])),
                   "failure" if True in bad else "success" if bad else "info")


LETTER = TypeAdapter(tuple[str, str, str, list[dict[str, Any]]])    # a Message in a row, with the ends that it tells
NO_LETTER = '["", "", "", []]'
BAD_STATES = ("closed", "unhealthy")        # of events that begin something
BY_HAND = re.compile(r"-> open \((opened by .*)\)(?: after \d+ s)?$")      # who has opened what may be as bad as before


def is_seen_to(notice: Notice, picture: Picture) -> bool:
    """Whether somebody has said so, of a resource or of everything that can keep the gate or a group closed."""
    if notice.kind not in ("gate", "group"):
        return notice.kind == "state" and notice.name in picture.acknowledged
    return bool(keepers := picture.keepers()) and keepers.keys() <= {*picture.acknowledged}


class Announcer:
    """What one receiver is told, and when. Touches nothing but its own rows; times are Unix times, and one of the
    future, of a clock that was set back since, is now."""

    def __init__(self, row: Receiver, notices: Iterable[Notice] = (), console: str = "") -> None:
        self.row, self._console = row, console
        given = {"name": row.name, "url": TOKEN_PREFIXES[0]}
        self.settings = ReceiverSettings.model_validate(given)
        with contextlib.suppress(ValueError, TypeError):    # of a damaged row, which must silence nobody
            self.settings = ReceiverSettings.model_validate({**given, **json.loads(row.settings)})
        self.notices = {(notice.kind, notice.name): notice for notice in notices if notice.kind in WORDS}
        try:
            LETTER.validate_json(row.message or NO_LETTER)
        except ValidationError:
            row.message = NO_LETTER
            self._give_up()

    def take(self, happened: Event, picture: Picture, now: float) -> None:
        """Takes an event up, once; those of maintenance only have the rows looked at."""
        is_clock, name, at = happened.kind == "clock", happened.resource or happened.group, min(happened.at, now)
        kind, name = ("problem", "clock") if is_clock else (happened.kind, name)
        self.row.cursor = max(self.row.cursor, happened.id)
        if kind == "maintenance" or kind not in self.settings.on:
            return
        if happened.resource and not self._is_mine(picture.tags.get(name, ())):
            return
        if (happened.state in BAD_STATES or is_clock) and not (kind == "state" and name in picture.excused):
            self._begin(kind, name, happened.text, at, times=int(STARTING not in happened.text))
        if happened.state not in BAD_STATES:
            self._end(kind, name, at, "".join(BY_HAND.findall(happened.text)))

    def settle(self, picture: Picture, now: float) -> None:
        """Ends what the rows say is over, whatever became of its event, and begins what they say is bad."""
        row = self.row
        row.made_at, row.next_at, row.joined_at = (
            min(row.made_at, now), min(row.next_at, now + RETRY_TIME), min(row.joined_at, now))
        for key, notice in [*self.notices.items()]:
            for column in ("since_at", "taken_at", "over_at", "told_at"):
                setattr(notice, column, min(now, getattr(notice, column)))
            if (ending := self._ending(notice, picture)) is not None:
                self._end(*key, now, ending)
            if not notice.told_at and self._is_nothing(notice, picture):
                del self.notices[key]
        self._begin_new("state", {name: (one.why, one.since_at) for name, one in picture.unhealthy.items()
                                  if one.since_at >= row.joined_at and not one.is_blamed
                                  and name not in picture.excused and self._is_mine(one.tags)}, now)
        self._begin_new("problem", {name: (why, now) for name, why in picture.problems.items()
                                    if name != f"receiver {row.name}"}, now)
        self._begin_new("maintenance", {name: (one.text, one.since_at) for name, one in picture.works.items()
                                        if one.since_at >= row.joined_at and self._is_mine(one.tags)}, now)

    def compose(self, picture: Picture, now: float) -> None:
        """Makes what is to be said now, if anything is, the row's message; it counts as told, and what is over is
        forgotten."""
        chosen = self._due(picture, now)
        if self.row.message or not chosen or now < max(self.row.next_at, self.row.made_at + self.settings.wait):
            return
        message, ends = write_message(chosen, picture, self._is_mine, self._console), []
        for notice in chosen:
            if notice.over_at:
                ends += [as_mapping(notice)] if notice.told_at else []
                del self.notices[notice.kind, notice.name]
            notice.told_at, notice.times = now, 0
        self.row.message = json.dumps([*message, ends])
        self.row.made_at = self.row.next_at = now
        self.row.tries = 0

    def take_result(self, came: Delivery, now: float) -> bool:
        """Takes what became of a try; False where the message is given up."""
        row, is_late = self.row, now - self.row.made_at >= RETRY_TIME
        row.tries, row.trouble = row.tries + 1, "" if came.is_delivered else came.why
        if came.is_delivered:
            row.message, row.delivered = "", row.delivered + 1
            return True
        pause = min(RETRY_LONGEST, RETRY_FIRST * 2 ** min(row.tries - 1, 10))
        row.next_at = now + max(pause, min(came.retry_after, RETRY_TIME))
        if is_late:
            self._give_up()
        return not is_late

    def _give_up(self) -> None:
        """What the message said and still holds is untold, and goes into the next one; ends go there, too."""
        ends = json.loads(self.row.message)[-1]
        self.row.message, self.row.failed = "", self.row.failed + 1
        for notice in self.notices.values():
            if notice.told_at == self.row.made_at:
                notice.told_at, notice.times = 0.0, max(1, notice.times)
        for end in ends:
            if known := self.notices.get((end["kind"], end["name"])):
                known.told_at = end["told_at"]      # it began again, and the receiver knows nothing else
            else:
                self.notices[end["kind"], end["name"]] = Notice(**end)

    def _is_mine(self, tags: Collection[str]) -> bool:
        return not self.settings.tags or not {*self.settings.tags}.isdisjoint(tags)

    def _begin(self, kind: str, name: str, text: str, since_at: float, *, times: int = 1) -> None:
        if known := self.notices.get((kind, name)):       # it came back before its end was told
            known.over_at, known.ending, known.times, known.text = 0.0, "", known.times + times, one_line(text)
            return
        self.notices[kind, name] = Notice(
            receiver_id=self.row.id, kind=kind, name=name, text=one_line(text), ending="", times=times,
            since_at=since_at, taken_at=since_at, over_at=0.0, told_at=0.0)

    def _begin_new(self, kind: str, found: Mapping[str, tuple[str, float]], now: float) -> None:
        """Of things that are known by no event: text and since when; they wait from now on."""
        for name, (text, since_at) in found.items() if kind in self.settings.on else ():
            if (kind, name) not in self.notices:
                self._begin(kind, name, text, since_at)
                self.notices[kind, name].taken_at = now

    def _end(self, kind: str, name: str, at: float, ending: str = "") -> None:
        known = self.notices.get((kind, name))
        if known and not known.over_at:
            known.over_at, known.ending = max(at, known.since_at), ending

    def _ending(self, notice: Notice, picture: Picture) -> str | None:
        """How something ended by the rows, None while it lasts; empty: as usual."""
        kind, name, polled_at = notice.kind, notice.name, picture.healthy.get(notice.name)
        is_there = polled_at is not None or name in picture.unhealthy
        if kind not in self.settings.on:
            return "no longer told of"
        if kind == "group" and name not in picture.groups:
            return "removed"
        if kind == "state" and (name in picture.excused or not is_there):
            return "in maintenance now" if is_there else "removed"
        is_well = polled_at is not None and polled_at > notice.since_at
        lasting = {"problem": picture.problems, "maintenance": picture.works}.get(kind)
        return "" if (kind == "state" and is_well) or (lasting is not None and name not in lasting) else None

    def _is_nothing(self, notice: Notice, picture: Picture) -> bool:
        """Whether what was not told yet need not be: too short, in maintenance, or another's fault."""
        if notice.kind == "state" and notice.name in picture.excused:
            return True
        known = picture.unhealthy.get(notice.name) if notice.kind == "state" else None
        too_short = notice.over_at - notice.since_at < 60 * self.settings.after or not notice.times
        is_over = notice.over_at > 0 and (too_short or not self._concerns(notice, picture))
        return is_over or (known is not None and known.is_blamed)

    def _concerns(self, notice: Notice, picture: Picture) -> bool:
        """Whether the gate or a group, if it is that, closes while something that counts and has the receiver's tags is
        unhealthy, or behind what is."""
        return (not self.settings.tags or notice.kind not in ("gate", "group")
                or any(self._is_mine(one.tags) for name, one in picture.unhealthy.items()
                       if one.critical and name not in picture.excused))

    def _due(self, picture: Picture, now: float) -> list[Notice]:
        """What a message would say now: ends at once, and troubles together once the first of them has waited."""
        after, remind = 60 * self.settings.after, 3600 * self.settings.remind or math.inf
        ends, begun = [], []
        for notice in self.notices.values():
            may_remind = now - notice.told_at >= remind and not is_seen_to(notice, picture)
            if notice.told_at and (notice.over_at or may_remind):
                ends.append(notice)
            elif not notice.told_at and (notice.over_at or now - notice.taken_at >= after):
                begun += [notice] if self._concerns(notice, picture) else []
        is_ripe = any(now - notice.taken_at >= after + self.settings.wait for notice in begun)
        return ends + (begun if is_ripe else [])


# === Notify ==================================================================
# Tells the receivers. The source is the table of events; all of it is kept in rows before anything is sent, so that a
# message is delivered at least once, and once where nobody is killed. The Notifier's thread looks every second and
# waits for nobody: each message is on its way in a thread and a child process of its own, which alone imports apprise.
# Gives: check_receivers, ChildProcess, deliver, has_apprise, Heartbeat, is_service_well, NO_APPRISE, Notifier,
# service_problems
NOTIFY_INTERVAL = 1.0           # seconds between two looks at the events
NOTIFY_IDLE = 30.0              # seconds between two looks at all resources while there is nothing to be said
NOTIFY_END = 1.0                # seconds that the end of the service leaves to messages on their way
DELIVERY_TIMEOUT = 30.0         # seconds, a message from the start of its process to the end of it
ANSWER_BYTES = 1 << 20          # of what a receiver answers
CHILD_BYTES = 1 << 28           # of memory for a process that sends; apprise alone takes 55 MB
HEARTBEAT_INTERVAL = 60.0       # seconds
HEARTBEAT_TIMEOUT = 10.0        # seconds
NO_APPRISE = "notify needs the package apprise: run `pip install \"apprise>=2.3\"` in the environment of the service"
# What a child process is given of the environment; nothing that could be a secret of ours.
CHILD_VARIABLES = ("PATH PYTHONPATH SYSTEMROOT WINDIR TEMP TMP TMPDIR LANG LC_ALL TZ SSL_CERT_FILE SSL_CERT_DIR "
          "REQUESTS_CA_BUNDLE HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy").split()
# Says nothing but the answer: what apprise logs may name the URL.
CHILD = r"""
import sys
sys.path[:] = [path for path in sys.path if path]       # first: the folder it is started in may be anybody's
import json, logging, os, threading
logging.disable()
asked, out = json.load(sys.stdin.buffer), os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
end = threading.Timer(asked["seconds"], os._exit, [1])      # where nobody is left who would kill it
end.daemon = True
end.start()
if os.name == "posix":      # not all libraries bound what they read
    import resource
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (asked["memory"] if most < 0 else min(most, asked["memory"]), most))
import apprise, requests
from apprise.manager_attachment import AttachmentManager
from apprise.manager_plugins import NotificationManager
AttachmentManager().remove("file")      # who names one then raises KeyError
NotificationManager().disable(*asked["refused"])
apprise.NotifyBase.overflow_mode = apprise.OverflowMode.TRUNCATE    # or a service refuses what is too long for it
asset = apprise.AppriseAsset(
    storage_mode="memory", plugin_paths=[], http_redirects=False, allow_templates=False, pgp_autogen=False,
    pem_autogen=False, async_mode=False, app_id="HealthChecker", app_desc="HealthChecker", app_url="")
send, seen = requests.Session.send, {}
def noted(session, request, **more):
    seen.update(status=0, error="", after="")
    try:
        came, body = send(session, request, **more | {"stream": True}), b""
        for part in came.iter_content(1 << 16):     # of an answer without an end the beginning
            body += part
            if len(body) > asked["bytes"]:
                break
        came._content, came._content_consumed = body, True
        came.close()
    except Exception as error:      # it goes on
        seen["error"] = type(error).__name__
        raise
    seen.update(status=came.status_code, after=came.headers.get("Retry-After", ""))
    return came
requests.Session.send = noted
services = [apprise.Apprise.instantiate(url, asset=asset) for url in asked["urls"]]
targets = [len(service) // (service.retry + 1) if service else 0 for service in services]   # else of tries
answer = {"targets": targets, "delivered": False, "seen": seen}
if asked["message"] and all(services):
    sender, message = apprise.Apprise(asset=asset), asked["message"]
    sender.add(services)
    answer["delivered"] = bool(sender.notify(
        title=message["title"], body=message["body"], notify_type=message["kind"], body_format="text"))
os.write(out, json.dumps(answer).encode())
"""


def seconds_of(text: str) -> float:
    """Of a Retry-After, where that is a number."""
    return float(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0.0


class ChildProcess:
    """A Python of its own that asks apprise, killed at its deadline with all that it started."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in CHILD_VARIABLES if name in os.environ}
        options: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NO_WINDOW}
        self._process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, env=environment, **options)
        self._end_all = enclose(self._process, CHILD_BYTES) if sys.platform == "win32" else functools.partial(
            end_process_group, self._process)

    def ask(self, urls: Sequence[str], message: Message | None = None) -> dict[str, Any] | None:
        """The answer, None without one within DELIVERY_TIMEOUT. Ends the process."""
        asked = json.dumps({"urls": urls, "refused": sorted(LOCAL_SERVICES), "seconds": DELIVERY_TIMEOUT,
                            "bytes": ANSWER_BYTES, "memory": CHILD_BYTES, "message": message and message._asdict()})
        try:
            said = self._process.communicate(asked.encode(), DELIVERY_TIMEOUT)[0]
            return cast("dict[str, Any]", json.loads(said))
        except (subprocess.TimeoutExpired, OSError, ValueError):
            return None
        finally:
            self.end()
            self._process.communicate()

    def end(self) -> None:
        """From any thread."""
        self._process.kill()
        self._end_all()


def has_apprise() -> bool:
    return importlib.util.find_spec("apprise") is not None


def deliver(url: str, message: Message, child: ChildProcess) -> Delivery:
    """One try; nothing of what is said of it holds the URL."""
    answer = child.ask([url], message)
    if answer is None:
        return Delivery(False, f"apprise gave no answer within {DELIVERY_TIMEOUT:g} s" if has_apprise() else NO_APPRISE)
    if not all(answer["targets"]):
        return Delivery(False, "its url is that of no service that apprise knows, or lacks a part")
    seen = answer["seen"]
    status, error = seen.get("status"), seen.get("error")
    why = f"the answer was {status}" if status else f"no answer ({error})" if error else "it was not accepted"
    return Delivery(True) if answer["delivered"] else Delivery(False, why, seconds_of(seen.get("after", "")))


def check_receivers(inventory: Inventory, vault: Vault) -> Iterator[HealthCheckerError]:
    """What is wrong with those who are to be told, as far as apprise knows."""
    named = [(where, name, url) for where, name, url in inventory.urls() if name not in OWN_SECRETS]
    if not named:
        return
    if not has_apprise():
        yield UsageError(NO_APPRISE)
        return
    answer = ChildProcess().ask([open_url(url, name, vault) for _, name, url in named])
    if answer is None:
        yield UsageError("apprise, of which notify is made, cannot be imported: install it anew")
    for (where, name, _), count in zip(named, answer["targets"] if answer else (), strict=False):
        if count != 1:      # one that fails would have all of them told again
            yield InventoryError(f"{inventory.places[f'notify/{name}']}: notify[{where[1]}].url: " + (
                f"names {count} who are told, of which a receiver has one: write as many receivers" if count else
                "is that of no service that apprise knows, or lacks a part"))


def service_problems(recorder: Recorder) -> dict[str, str]:
    """What is wrong with the service itself, by a word for it."""
    return {"database": f"the database cannot be written: {recorder.unwritten}"} if recorder.unwritten else {}


def is_service_well(aggregator: HealthAggregator, recorder: Recorder) -> bool:
    """Whether those live who watch, what they find can be written, and the gate is open."""
    is_watched = min([*aggregator.beats.values()], default=0.0) > lease_clock()
    return is_watched and recorder.is_well and aggregator.is_healthy()


def running_works(session: Session, now: float) -> dict[str, Work]:
    """Maintenance that runs; of two of the same the one that began first."""
    begun = sqlalchemy.select(Maintenance).filter_by(state="begun").order_by(Maintenance.start_at.desc())
    rows = [row for row in session.scalars(begun) if row.until_at > now]
    known, found = choices(session) if rows else Choices({}, {}, {}), {}
    for row in rows:
        names = known.of(row.chosen)
        found[str(row.chosen)] = Work(f"in maintenance until {written(row.until_at)}: {row.reason}", row.start_at,
                                      frozenset(tag for tag, tagged in known.tags.items() if tagged & names))
    return found


def tags_of(text: str) -> tuple[frozenset[str], bool]:
    """The tags in a resource's settings, and whether it is critical; of a damaged row none, and yes."""
    with contextlib.suppress(ValueError, TypeError):
        settings: Any = {} | json.loads(text)
        return frozenset(settings.get("tags", ())), settings.get("critical", True)
    return frozenset(), True


def take_picture(session: Session, names: Iterable[str], problems: Mapping[str, str], now: float,
                 blames: Callable[[str], str | None]) -> Picture:
    """How everything is by the rows, and by what `blames` says as `blamed` does; with the tags of resources of these
    names."""
    unhealthy, healthy, tags, wanted, others = {}, {}, dict[str, frozenset[str]](), {*names}, set[str]()
    more = remarks(session, now)
    rows = session.execute(sqlalchemy.select(
        Resource.name, Resource.settings, Status.state, Status.cause, Status.reason,
        Status.since_at, Status.polled_at).outerjoin(Status, Status.resource_id == Resource.id)).all()
    for name, text, state, cause, reason, since_at, polled_at in rows:
        other = blames(name)
        is_bad = state == "unhealthy" or bool(other)
        if is_bad or name in wanted:
            tags[name], critical = tags_of(text)
        if is_bad:
            unhealthy[name] = Unhealthy(since_at or now, caused(cause or "", reason or ""), tags[name], critical,
                                        other is not None)
            others |= {other} if other and critical and name not in more.maintenance else set()
        else:
            healthy[name] = polled_at or 0.0
    for name in others & unhealthy.keys():      # which need not be critical by itself
        unhealthy[name] = unhealthy[name]._replace(critical=True)
    gates = Gates.model_validate_json(remembered(session, "gates").text or "{}")
    groups = frozenset(gates.members({}))
    return Picture(unhealthy, healthy, {*more.maintenance}, groups, tags, problems, frozenset(more.seen),
                   running_works(session, now))


class Notifier(threading.Thread):
    """Tells the receivers of the rows. A message is written down before it is sent and again when it was: who is killed
    in between sends it once more, for one that comes twice is better than one that never comes."""

    def __init__(self, store: Store, vault: Vault, problems: Callable[[], Mapping[str, str]], console: str,
                 monitor: Monitor) -> None:
        super().__init__(name="notifier", daemon=True)
        self._members, self._blames, self._epoch = monitor.members, monitor.blames, ""
        self._store, self._vault, self._problems, self._console = store, vault, problems, console
        self._ending, self._trouble = threading.Event(), Trouble("nobody can be told")
        self._unread, self._unkept = Trouble("what to tell cannot be read"), Trouble("what was told cannot be kept")
        self._announcers: dict[int, Announcer] = {}     # by the receiver's id; the rows are a copy of them
        self._saved: dict[int, object] = {}
        self._lost: list[str] = []          # texts of events to be written
        self._revision, self._looked_at = -1, 0.0
        self._results: queue.SimpleQueue[tuple[int, Delivery]] = queue.SimpleQueue()
        self._threads: dict[int, threading.Thread] = {}         # those that send, by the receiver's id
        self._lock = threading.Lock()       # guards the next, and that none begins after the end
        self._running: dict[int, ChildProcess] = {}

    def run(self) -> None:
        ended = False
        while not ended:
            with self._trouble.caught():
                self.look(self._store.wall())
            ended = self._ending.wait(NOTIFY_INTERVAL * (1 if self._announcers else 5))    # a reload may name some

    def look(self, now: float) -> None:
        """Takes up what happened since the last look, and sends what is to be said, if it is this machine that does."""
        if self._epoch != (epoch := self._members.epoch) or not self._members.speaks:
            self._epoch, self._announcers, self._saved, self._revision = epoch, {}, {}, -1
        if not self._members.speaks:
            return self._take_results(now)
        with self._unread.caught():         # what cannot be read is no reason to keep what is known to oneself
            with self._store.reading() as session:
                self._follow(session)
                self._take_results(now)     # after that, or what came would be forgotten, and be sent again
                found, picture = self._see(session, now)
            if picture:
                self._announce(found, picture, now)
        self._take_results(now)
        if self._save():
            self._dispatch(now)

    def close(self) -> None:
        """Ends the thread; messages on their way have NOTIFY_END seconds, and are sent again after the next start."""
        self._ending.set()
        deadline = Deadline(NOTIFY_END)
        for thread in (self, *self._threads.values()):
            if thread.is_alive():
                thread.join(max(0.0, deadline.remaining))
        with self._lock:
            for child in self._running.values():
                child.end()
        for thread in self._threads.values():
            thread.join(NOTIFY_END)
        if not self.is_alive():
            self._take_results(self._store.wall())
            self._save()

    def _follow(self, session: Session) -> None:
        """Takes the rows up where the inventory may have changed them."""
        if (current := revision(session)) == self._revision or self._unkept.why:    # the rows are behind
            return
        notices: dict[int, list[Notice]] = collections.defaultdict(list)
        for notice in session.scalars(sqlalchemy.select(Notice)):
            notices[notice.receiver_id].append(notice)
        rows = session.scalars(sqlalchemy.select(Receiver).where(Receiver.is_told)).all()
        session.expunge_all()       # plain objects from now on
        self._announcers = {row.id: Announcer(row, notices[row.id], self._console) for row in rows}
        self._saved = {number: self._state_of(announcer) for number, announcer in self._announcers.items()}
        self._revision, self._looked_at = current, 0.0
        if self._announcers and not has_apprise():
            log.error(NO_APPRISE)

    def _see(self, session: Session, now: float) -> tuple[list[Event], Picture | None]:
        """The events that are new to anybody, and how everything is; no picture while nothing can have changed."""
        rows = [announcer.row for announcer in self._announcers.values()]
        if not rows:
            return [], None
        problems = {**self._problems()}
        problems |= {f"receiver {row.name}": f"{row.name} cannot be told: {row.trouble}" for row in rows if row.trouble}
        newest = session.scalar(sqlalchemy.select(func.max(Event.id))) or 0
        for row in rows:        # ids come again where the last events were dropped
            row.cursor = min(row.cursor, newest)
        cursor = min(row.cursor for row in rows)
        idle = not problems and cursor == newest and not any(each.notices for each in self._announcers.values())
        if idle and abs(now - self._looked_at) < NOTIFY_IDLE:
            return [], None
        found = [*session.scalars(sqlalchemy.select(Event).where(Event.id > cursor).order_by(Event.id))]
        session.expunge_all()
        self._looked_at = now
        return found, take_picture(session, (each.resource for each in found), problems, now, self._blames)

    def _announce(self, found: Sequence[Event], picture: Picture, now: float) -> None:
        for announcer in self._announcers.values():
            for happened in found:
                if happened.id > announcer.row.cursor:
                    announcer.take(happened, picture, now)
            announcer.settle(picture, now)
            announcer.compose(picture, now)

    @staticmethod
    def _state_of(announcer: Announcer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What is kept of a receiver: columns of its row, and its notices."""
        return as_mapping(announcer.row, "cursor", "message", "made_at", "tries", "next_at", "trouble", "delivered",
                          "failed"), [*map(as_mapping, announcer.notices.values())]

    def _save(self) -> bool:
        """Keeps what has changed; what cannot be kept is told none the less, for that may be what there is to tell.
        False where another machine tells by now."""
        states = {number: self._state_of(announcer) for number, announcer in self._announcers.items()}
        changed = {number: state for number, state in states.items() if state != self._saved.get(number)}
        with self._unkept.caught():
            if not changed and not self._lost:
                return True
            with self._store.writing() as session:
                if not self._members.lives(session):
                    return False
                there = {*session.scalars(sqlalchemy.select(Receiver.id))}      # else it was removed just now
                for number, (row, notices) in changed.items():
                    session.execute(sqlalchemy.update(Receiver).where(Receiver.id == number).values(**row))
                    session.execute(sqlalchemy.delete(Notice).where(Notice.receiver_id == number))
                    if notices and number in there:
                        session.execute(sqlalchemy.insert(Notice), notices)
                for text in self._lost:
                    record_event(session, "service", text)
            self._saved |= changed
            self._lost.clear()
        return True

    def _take_results(self, now: float) -> None:
        for number, came in (self._results.get() for _ in range(self._results.qsize())):
            del self._threads[number]
            if not (announcer := self._announcers.get(number)):
                continue
            name = announcer.row.name
            if not announcer.take_result(came, now):
                self._lost.append(f"a notification to {name} was given up: {came.why}")
            if came.is_delivered:
                log.info("%s was told", name)
            else:
                log.warning("%s was not told: %s", name, came.why)

    def _dispatch(self, now: float) -> None:
        """Sends what is to be sent, each in a thread of its own."""
        for number, announcer in self._announcers.items():
            row = announcer.row
            if row.message and number not in self._threads and now >= row.next_at:
                title, body, kind, _ = json.loads(row.message)
                if now - row.made_at > RETRY_FIRST:
                    body += f"\nThis is of {written(row.made_at)} and could not be delivered before."
                thread = threading.Thread(None, self._send, f"notify {row.name}", (
                    row.id, row.url, row.bound, Message(title, body, kind)), daemon=True)
                thread.start()      # which may be refused, and is tried again then
                self._threads[number] = thread

    def _send(self, number: int, token: str, bound: Sequence[str], message: Message) -> None:
        came = Delivery(False, "the service ended")
        try:
            url = self._vault.open(token, *bound)
            with self._lock:
                if not self._ending.is_set():
                    self._running[number] = ChildProcess()
            if child := self._running.get(number):
                came = deliver(url, message, child)
        except (HealthCheckerError, OSError) as error:
            came = Delivery(False, one_line(str(error)))
        finally:
            with self._lock:
                self._running.pop(number, None)
            self._results.put((number, came))


class Heartbeat(threading.Thread):
    """Asks the URL of service.heartbeat every minute while all is well: with the service itself, and the gate open."""

    def __init__(self, store: Store, vault: Vault, access: ConnectionContext, is_well: Callable[[], bool]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._store, self._vault, self._access, self._is_well = store, vault, access, is_well
        self._ending, self._trouble = threading.Event(), Trouble("the heartbeat is not told")

    def run(self) -> None:
        wait = NOTIFY_INTERVAL
        while not self._ending.wait(wait):
            with self._trouble.caught():
                self.beat(self._store.wall())
            wait = HEARTBEAT_INTERVAL

    def beat(self, now: float) -> None:
        """Asks once, after it was seen that the database can be written. Raises ProbeError where nobody answers."""
        with self._store.reading() as session:
            row = session.scalar(sqlalchemy.select(Receiver).where(Receiver.name == self._store.own(HEARTBEAT)))
        if not row or not self._is_well():
            return
        with self._store.writing() as session:
            session.merge(Setting(name="heartbeat", value=int(now)))
        url = self._vault.open(row.url, *row.bound)
        settings = ResourceSettings.model_validate({
            "name": "service.heartbeat", "platform": "http", "url": url, "timeout": HEARTBEAT_TIMEOUT,
            **of_url({"url": url})})
        target = Target(0, settings, None, "", "")
        verdict, _ = poll_once(target, CONNECTIONS[settings.platform](target, self._access.guard_of(target),
                                                                      self._access), None)
        why = "" if verdict.healthy else verdict.reason.partition(", which leads")[0]    # as the URL, it may be secret
        if why != row.trouble:
            with self._store.writing() as session:
                session.execute(sqlalchemy.update(Receiver).where(Receiver.id == row.id).values(trouble=why))
        if why:
            raise ProbeError(verdict.cause, why)

    def close(self) -> None:
        """Ends the thread, which is not waited for: it holds nothing."""
        self._ending.set()


# === Backup ==================================================================
# Database, keys and inventory in one archive, while the service runs, and back where there are none; and a database as
# one of the other kind. In the process of the command; what it reads fits each other, and what it writes is its owner's
# alone.
# Gives: backup, copy_rows, DATABASE, restore
DATABASE = "healthchecker.db"   # in a backup, wherever it stands
COPIED_AT_ONCE = 1000           # rows


def stated_service(path: Path, document: Document) -> ServiceSettings:
    """The `service` part alone: neither backup nor restore needs passwords, or the files that the rest names."""
    value = document.value or {}
    value = {key: part for key, part in value.items() if key != "notify"} if isinstance(value, dict) else value
    try:
        return InventoryLoader(path, document).parse(InventoryFile, value).service
    except ValidationError as error:
        raise InventoryError(f"{path.name}: it is not valid; see `check`") from error


def file_of(service: ServiceSettings) -> Path:
    """Raises UsageError where the database is none."""
    if not service.database_path:
        raise UsageError("service.database is PostgreSQL's: back it up by pg_dump, and keys and inventory beside it")
    return service.database_path


def key_contents(folder: Path) -> dict[str, bytes]:
    return {f"keys/{name}": path.read_bytes() for name in KEY_FILES if (path := folder / name).exists()}


def backup(arguments: argparse.Namespace) -> int:
    """Writes database, keys and inventory into one archive, each as of one moment and fitting each other."""
    path = arguments.inventory.absolute()
    if arguments.file.exists():
        raise UsageError(f"{arguments.file} is there already; name another file")
    service = stated_service(path, read_document(path))
    database = SqliteFile(file_of(service))
    if not database.inspect():
        raise UsageError("there is no database yet; start the service first")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        copied = folder / DATABASE
        kept: dict[str, bytes] | None = None
        while kept != (kept := key_contents(service.keys)):     # a rotation that begins or ends just now
            database.copy(copied)
            kept_inventory = path.read_bytes()
        with private_file(arguments.file.absolute()) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, content in {INVENTORY.name: kept_inventory, **(kept or {})}.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime = len(content), 0o600, time.time()
                archive.addfile(member, io.BytesIO(content))
            archive.add(copied, DATABASE)
    print(f"{arguments.file.name} holds the private key, too: keep it as secret as keys")
    return 0


def everything(table: sqlalchemy.Table) -> sqlalchemy.Select[Any]:
    """All that is to be copied of a table, in the order of its keys; not the schema, which is the database's own."""
    query = sqlalchemy.select(table).order_by(*table.primary_key)
    return query.where(table.c.name != "schema") if table.name == "setting" else query


def count_rows(session: Session, table: sqlalchemy.Table) -> int:
    return session.scalar(sqlalchemy.select(func.count()).select_from(everything(table).subquery())) or 0


def rows_in(session: Session, table: sqlalchemy.Table) -> Iterator[list[dict[str, Any]]]:
    """The same, COPIED_AT_ONCE rows at a time, without zero characters, which PostgreSQL cannot keep."""
    for part in session.execute(everything(table), execution_options={"yield_per": COPIED_AT_ONCE}).partitions():
        yield [{name: value.replace("\0", "\ufffd") if isinstance(value, str) else value
                for name, value in row._mapping.items()} for row in part]


@contextlib.contextmanager
def transaction(store: Store, **options: bool) -> Iterator[Session]:
    """A session beside that of another store: Flask-SQLAlchemy has one at a time."""
    with store.app.app_context():
        engine = db.engine
    with Session(engine) as session:
        session.connection(execution_options=options)
        yield session
        session.commit()


def copy_rows(source: Store, target: Store, show: Callable[[int, int], None]) -> int:
    """Copies everything into an empty database and compares what is there then, all or nothing; how many rows. `show`
    is told how many are done, of how many. Raises UsageError and StorageError."""
    of_now = (Machine.__tablename__, Result.__tablename__)
    tables = [table for table in Base.metadata.sorted_tables if table.name not in of_now]
    with transaction(source) as old, transaction(target, immediate=True, long=True) as new:
        if any(count_rows(new, table) for table in tables):
            raise UsageError(f"database {target.database} is not empty; name another one")
        total, done = sum(count_rows(old, table) for table in tables), 0
        for table in tables:
            for rows in rows_in(old, table):
                new.execute(sqlalchemy.insert(table), rows)
                show(done := done + len(rows), 2 * total)
            if (column := table.autoincrement_column) is not None:
                last = old.scalar(sqlalchemy.select(func.max(column))) or 0
                target.database.number_after(new, column, max(last, source.database.last_number(old, column)))
        for table in tables:
            for before, after in itertools.zip_longest(rows_in(old, table), rows_in(new, table)):
                if before != after:
                    raise StorageError(f"table {table.name} is not the same there; nothing was copied")
                show(done := done + len(before), 2 * total)
    target.checkpoint()
    return total


def restore(arguments: argparse.Namespace) -> int:
    """Brings database, keys and inventory back where there are none; all or nothing."""
    path = arguments.inventory.absolute()
    try:
        with tarfile.open(arguments.file, "r:gz") as archive, contextlib.ExitStack() as undo:
            members = {member.name: member for member in archive if member.isfile()}
            content = cast(IO[bytes], archive.extractfile(members[INVENTORY.name])).read(INVENTORY_BYTES + 1)
            service = stated_service(path, Document(path.name, content))
            database = file_of(service)
            places = {DATABASE: database,
                      **{f"keys/{name}": service.keys / name for name in KEY_FILES}, INVENTORY.name: path}
            stale = [Path(f"{database}{end}") for end in ("-wal", "-journal")]     # it would be played in
            if left := [*(place for place in places.values() if place.exists()),
                        *(place for place in stale if place.exists() and place.stat().st_size)]:
                raise UsageError(f"{left[0]} is there already; restore into a folder without one")
            make_folder(service.keys)
            for name, place in places.items():      # the inventory last: without it nothing starts
                if name in members:
                    with private_file(place) as file:
                        shutil.copyfileobj(cast(IO[bytes], archive.extractfile(members[name])), file)
                    undo.callback(place.unlink, missing_ok=True)
            SqliteFile(database).inspect()
            undo.pop_all()
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename}: there is no such file") from error
    except (tarfile.TarError, EOFError, KeyError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{arguments.file.name} is no backup, or a damaged one") from error
    print(f"restored: {path.name}, {database.name} and {service.keys.name}; files that the inventory "
          "names, and variables, are not in a backup; users and API tokens are as they were then")
    return 0


# === Service =================================================================
# The service from its start to its end. `serve` reads what is written down, binds both doors, looks at the database and
# locks it, and has the workers load the application: up to here a fault ends the start, and nothing was written. Then
# it takes the inventory over, stored states open the gate, the console answers, the workers may serve. It ends the
# other way round: the workers drain while the pollers go on, then console, pollers and database close.
# Gives: check_files, database_at, Installation, reload, serve
RELOAD_END = 2.0                # seconds that the end of the service waits for one


def ensure_inventory(path: Path) -> None:
    """On first start: copies inventory.example.yaml, or writes an inventory that watches this machine. Never where a
    service has run before: that would forget what it watched, and open its gate."""
    example = path.with_name("inventory.example.yaml")
    content, origin = b"resources:\n  - {name: this-machine, platform: local}\n", "written one that"
    try:
        if path.exists():
            return
        if left := [*path.parent.glob("healthchecker.db"), *path.parent.glob("keys/private.pem")]:
            raise InventoryError(f"{path.name} is not there, but {left[0].name} of an earlier start is: "
                                 "bring it back, or name another one by --inventory")
        if example.is_file():
            content, origin = example.read_bytes(), f"copied from {example.name}; it"
        create_private(path, content)
    except FileExistsError:
        return      # another start was faster
    except OSError as error:
        raise InventoryError(f"{path.name}: cannot be written: {error.strerror}") from error
    print(f"{path.name} was not there: {origin} watches this machine. Edit it and restart.")


def handle_signals(stop: Callable[[], None], hangups: queue.SimpleQueue[bool]) -> None:
    """Lets the signals that end the service do so by `stop`; SIGHUP has the log file opened anew, and is told."""
    def reopen(*_: object) -> None:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, LogFile):
                handler.stale = True
        hangups.put(True)   # which a handler may that interrupts another one

    for number in ENDINGS:
        signal.signal(number, lambda *_: stop())
    for number in HANGUPS:
        signal.signal(number, reopen)


def database_of(service: ServiceSettings) -> Database:
    """What service.database names. Raises SecretError, and UsageError where a package is missing."""
    if path := service.database_path:
        return SqliteFile(path)
    password = service.database_password
    if password and password.get_secret_value().startswith(TOKEN_PREFIXES):
        password = SecretStr(Vault(service.keys).open(password.get_secret_value(), *service.database_binding))
    elif not password:      # libpq would leave it to the application
        password = SecretStr(take_variable("PGPASSWORD"))
    return PostgresServer(service.database, password)


class Installation:
    """What every command works on: the inventory, its folder, the database and the keys."""

    def __init__(self, path: Path, *, accepts_removals: bool = False, listen_on: str | None = None) -> None:
        """`listen_on` is --listen, in place of service.listen."""
        self.path, self._accepts_removals = path.absolute(), accepts_removals
        self.inventory, self.listen_on = load_inventory(self.path), listen_on
        for name in self.inventory.secret_variables:
            take_variable(name)
        self.service = self.inventory.service
        self.listen_name = "--listen" if listen_on else "service.listen"    # what to write another address at
        if listen_on:
            self.service = self.service.model_copy(update={"listen": listen_on})
        self.database, self.members = database_of(self.service), Membership()
        if self.service.listen == (console := self.service.console) and not console.endswith(":0"):
            raise UsageError(f"service.console {console} is the address of {self.listen_name}; write another port, or "
                             "off")

    @contextlib.contextmanager
    def store(self, *, scratch: bool = False, locked: bool = False) -> Iterator[Store]:
        """The database, made when there is none, an older one migrated; `scratch`: that only for this once, in a file
        of its own; `locked`: see Store."""
        with contextlib.ExitStack() as stack:
            database = self.database
            if (version := database.inspect(whole=not locked)) != SCHEMA and scratch:
                folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                database = SqliteFile(Path(folder) / DATABASE)
                if version:
                    self.database.copy(database.path)
            machine = self.service.machine_name
            yield stack.enter_context(contextlib.closing(Store(database, locked=locked, machine=machine)))

    def require_database(self) -> None:
        """Raises UsageError where there is none."""
        if not self.database.inspect(whole=False):
            raise UsageError("there is no database yet; start the service first")

    @property
    def runs(self) -> bool:
        """Whether its service does, here."""
        return self.database.is_running(self.service.machine_name)

    @property
    def place(self) -> str:
        """Where it is, as the end of a text."""
        return f", on {self.service.machine_name}" if self.service.machine_name else ""

    @contextlib.contextmanager
    def serving(self, lost: Callable[[], None]) -> Iterator[None]:
        """Within, this is the only service on the database, or the only one of its machine; see PostgresServer.lock.
        Raises StorageError."""
        with self.database.lock(lost, self.service.machine_name) as place:
            if isinstance(place, Claim):
                place.require_alone_for(self.database.inspect())
                self.members = Membership(place)
            yield

    def open_vault(self, session: Session | None) -> Vault:
        """The keys; made when there are none and nothing is sealed yet. Of several machines all need the same."""
        known = remembered(session, "key").text if self.service.machine_name and session else ""
        if known and not (vault := Vault(self.service.keys)).holds(known):
            raise SecretError(f"{self.service.keys.name}/private.pem is key {vault.key_id or 'none'}, and that of the "
                              f"other machines is {known}: copy private.pem and public.pem of one of them")
        return open_vault(self.service.keys, sealed_tokens(session, self.inventory))

    def rows_owner(self, session: Session, *, again: bool = False) -> str:
        """The other machine whose inventory is watched; empty: this one's is. At a start, not `again`, it takes the
        place of that of a machine that is gone only where it says the same. Raises StorageError."""
        machine, follows = self.service.machine_name, self.service.inventory == "follow"
        owner, digest = (remembered(session, name).text for name in ("inventory", "digest"))
        is_gone = machine and (again or digest == self.inventory.digest) and not session.scalar(PLACE, {"name": owner})
        if not machine or (not follows and (owner in ("", machine) or is_gone)):
            return ""
        if not owner:
            raise StorageError("no machine has taken an inventory over yet; first start one with `inventory: own`")
        return owner

    def access(self, *, keeps: bool = False) -> ConnectionContext:
        known_hosts = KnownHosts(self.service.known_hosts)
        return ConnectionContext(known_hosts, Resolver(), keeps=keeps, drain=self.service.drain)

    def review(self, changes: Changes) -> None:
        """Raises InventoryError where so much would go that it has to be said twice."""
        if changes.alarming and not self._accepts_removals:
            raise InventoryError(f"{self.path.name}: {len(changes.removed)} resources are not in it any more "
                                 f"({', '.join(changes.removed[:10])}); if that is meant: --accept-removals")

    def take_over(self, session: Session, vault: Vault, actor: str = "") -> Changes:
        """Has the rows follow the inventory, within the caller's transaction, and notes what changed."""
        changes = import_inventory(session, self.inventory, vault)
        self.review(changes)
        if machine := self.service.machine_name:
            for name, text in (("inventory", machine), ("digest", self.inventory.digest), ("key", vault.key_id)):
                session.merge(Setting(name=name, text=text))
        if changes.added or changes.changed or changes.removed:
            record_event(session, "change", f"inventory: {changes}", actor=actor)
        return changes

    def _started_with(self) -> dict[str, Any]:
        """What holds until the next start: the service's settings, and which groups and routes there are."""
        service, gates = self.inventory.service, self.inventory.gates
        kept = service.model_dump(mode="json", exclude={
            name for name in ServiceSettings.model_fields
            if name.startswith(("heartbeat", "status_token")) or name == "database_password"})
        return kept | {"gates": sorted(gates.members({})) or None}

    def keep_service(self, session: Session) -> None:
        """Takes down with which settings of its own the service runs."""
        own = functools.partial(own_name, machine=self.service.machine_name)
        session.merge(Setting(name=own("service"), text=json.dumps(self._started_with())))
        session.merge(Setting(name=own(STANDING), text=""))     # the one before may have been killed a moment ago

    def changed_service(self, session: Session) -> list[str]:
        """Names of the service's own settings that are not those with which it was started."""
        now = self._started_with()
        text = remembered(session, own_name("service", self.service.machine_name)).text
        before = json.loads(text) if text else now
        return ["the names of groups and routes" if name == "gates" else f"service.{name}"
                for name in sorted(before.keys() | now) if before.get(name) != now.get(name)]


def database_at(text: str, installation: Installation) -> Database:
    """The one of a URL, with the password that the inventory states for it, if it does. Raises UsageError."""
    try:
        url = TypeAdapter(DatabaseUrl).validate_python(text, context=installation.path.parent)
    except ValidationError as error:
        raise UsageError(f"the URL of a database {message_of(error.errors()[0])}") from None
    stated = installation.service
    named = stated.model_copy(update={"database": url})
    if named.database_path or stated.database_path or named.database_binding != stated.database_binding:
        named = named.model_copy(update={"database_password": None})
    return database_of(named)


def prepare(installation: Installation, store: Store) -> Vault:
    """Brings database and keys to what the inventory says, all or nothing, and says what is to be known."""
    with store.writing(long=True) as session:
        vault = installation.open_vault(session)
        ensure_first_user(session)
        record_event(session, "service", f"started, version {VERSION}{installation.place}")
        installation.keep_service(session)
        owner, initial = installation.rows_owner(session), initial_user(session)
        differs = owner and remembered(session, "digest").text != installation.inventory.digest
        changes = "" if owner else installation.take_over(session, vault)
        if owner:
            import_receivers(session, installation.inventory, vault, secrets_only=True)
    log.log(logging.ERROR if differs else logging.INFO, "inventory: %s", changes or (
        f"that of {owner} is watched" + (f", and {installation.path.name} here differs from it: `reload` here takes it "
                                         "over once that machine is gone" if differs else "")))
    if initial:
        log.warning("the password of %s is the documented one: change it at /-/password or by `user passwd`", initial)
    return vault


def take_over_again(installation: Installation, store: Store, actor: str = "") -> Iterator[str]:
    """Has the rows follow an edited inventory while the service runs, all or nothing, and gives what is to be known;
    the service itself follows the rows. Raises HealthCheckerError."""
    with store.reading() as session:
        waiting = installation.changed_service(session)
        if fixed := [name for name in waiting if name in ("service.database", "service.keys")]:
            raise UsageError(f"{installation.path.name}: {', '.join(fixed)} changed: restart the service")
        vault = installation.open_vault(session)
    for fault in check_receivers(installation.inventory, vault):
        if isinstance(fault, InventoryError):
            raise fault
        yield str(fault)
    with store.writing(long=True) as session:
        if owner := installation.rows_owner(session, again=True):
            raise UsageError(f"the inventory of {owner} is watched; `reload` there")
        changes = installation.take_over(session, vault, actor)
    yield f"inventory: {changes}"
    if waiting:
        yield f"{', '.join(waiting)} changed: that needs a restart"


def follow_hangups(installation: Installation, store: Store, hangups: queue.SimpleQueue[bool]) -> None:
    """A thread: takes the inventory over again at each SIGHUP, until there is False."""
    while hangups.get():
        try:
            for line in take_over_again(Installation(installation.path, listen_on=installation.listen_on), store):
                log.info("%s", line)
        except Exception as error:  # noqa: BLE001  # a thread's outermost loop: the next one may be better
            for line in str(getattr(error, "orig", error)).splitlines():
                log.error("the inventory was not taken over: %s", one_line(line))


def reload(arguments: argparse.Namespace) -> int:
    """Has a running service take an edited inventory over."""
    installation = Installation(arguments.inventory, accepts_removals=arguments.accept_removals,
                                listen_on=arguments.listen)
    installation.require_database()
    with installation.store() as store:
        for line in take_over_again(installation, store, "command line"):
            print(line)
    return 0


def check_files(service: ServiceSettings) -> Iterator[UsageError]:
    """Which files a start needs and cannot use."""
    tests: dict[Callable[[Path], object], Path | None] = {
        read_token: service.metrics_token_file, require_lease_place: service.lease_file}
    for test, path in tests.items():
        try:
            _ = path and test(path)
        except UsageError as error:
            yield error


def console_url(service: ServiceSettings) -> str:
    """Where the console is, for who is told; empty where there is none."""
    return service.console_url or ("" if service.console == "off" else f"http://{service.console}{PREFIX}")


def watch(installation: Installation, store: Store, console: Sequence[socket.socket], supervisor: Supervisor,
          hangups: queue.SimpleQueue[bool]) -> None:
    """Takes the inventory over, watches it and lets the workers serve until a signal comes."""
    inventory, service, members = installation.inventory, supervisor.service, installation.members
    access = installation.access(keeps=True)
    with contextlib.ExitStack() as stack:
        file = service.lease_file and LeaseFile(service.lease_file, supervisor.lease.parts)
        if file:
            stack.enter_context(contextlib.closing(file)).begin()
        aggregator = HealthAggregator(supervisor.lease, copy=file.put if file else None, wall=store.wall)
        vault = prepare(installation, store)
        recorder = Recorder(store, aggregator, service.retention, IncidentLog(
            aggregator, supervisor.counters.refusals, wall=store.wall), members)
        uplink = Uplink(service.uplink, service.hold, access.resolver, wall=store.wall)
        monitor = Monitor(store, vault, PollContext(aggregator, recorder, access, random.Random(), uplink, members))
        stack.enter_context(contextlib.closing(monitor)).begin()
        members.heed(lambda: not uplink.cut and recorder.is_well and monitor.is_alive())
        if console:
            context = ConsoleContext(store, inventory, aggregator.lease, vault, monitor, access, store.wall,
                                     counters=supervisor.counters)
            metrics = Metrics(ServingMetrics(aggregator.lease, supervisor.counters), store, service.metrics_token_file,
                              access, monitor)
            server = ConsoleServer(build_console(context, metrics), console, service)
            stack.enter_context(contextlib.closing(server)).start()
        notifier = Notifier(store, vault, functools.partial(service_problems, recorder), console_url(service), monitor)
        stack.enter_context(contextlib.closing(notifier)).start()
        heart = Heartbeat(store, vault, installation.access(), functools.partial(is_service_well, aggregator, recorder))
        stack.enter_context(contextlib.closing(heart)).start()
        reloads = threading.Thread(None, follow_hangups, "reloads", (installation, store, hangups), daemon=True)
        reloads.start()
        stack.callback(reloads.join, RELOAD_END)        # after this, for they come the other way round
        stack.callback(hangups.put, False)
        stack.callback(lambda: recorder.note("service", f"stopped{installation.place}", store.wall()))
        keep_out_of_collections()
        log.info("HealthChecker %s", VERSION)
        log.info("serving on http://%s, console %s", service.listen,
                 f"on http://{service.console}/-/" if console else "off")
        if service.mode == "observe":
            log.warning("service.mode is observe: nothing is refused")
        supervisor.serve()


def serve_with(installation: Installation, console: Sequence[socket.socket], supervisor: Supervisor) -> None:
    """Serves as soon as the database can be used: what may pass is waited for behind a closed gate, for nobody starts
    a service again that has said that it has no database. Raises StorageError."""
    taken, hangups, database = threading.Event(), queue.SimpleQueue[bool](), installation.database
    trouble = Trouble("the gate stays closed until the database can be used")

    def leave() -> None:
        taken.set()
        supervisor.stop()

    handle_signals(supervisor.stop, hangups)    # from here on: an interrupt would leave a worker that nobody knows
    while not supervisor.stopping:
        try:
            database.inspect()
            with installation.serving(leave):
                supervisor.start()
                if not supervisor.stopping:
                    with installation.store(locked=True) as store:
                        watch(installation, store, console, supervisor, hangups)
        except (StorageError, sqlalchemy.exc.SQLAlchemyError) as error:
            if not database.may_pass(error):
                raise
            with trouble.caught():
                raise
            supervisor.start()
            supervisor.serve_for(CLAIM_INTERVAL)
    if taken.is_set():
        raise StorageError(f"another HealthChecker has begun on database {database}, for which this one was not to be "
                           f"heard of for {CLAIM_LIFE:.0f} s")


def serve(arguments: argparse.Namespace) -> int:
    """Runs the service until a signal ends it."""
    if arguments.inventory == INVENTORY:
        ensure_inventory(INVENTORY)
    installation = Installation(arguments.inventory, accepts_removals=arguments.accept_removals,
                                listen_on=arguments.listen)
    service = installation.service
    set_up_logging(service.log_file)
    for fault in check_files(service):      # what cannot be used ends the start
        raise fault
    doors = listen(installation.listen_name, service.listen)
    console = [] if service.console == "off" else listen("service.console", service.console)
    for sock in handed_over():
        if sock not in (*doors, *console):      # whose clients nobody would answer
            raise UsageError(f"systemd listens on {sock.getsockname()}, which is neither service.listen nor "
                             "service.console; correct its ListenStream")
    service = service.model_copy(update={
        "listen": bound_address(service.listen, doors), "console": bound_address(service.console, console),
        "heartbeat": None, "database_password": None})      # workers are given these settings
    lease = Lease(installation.inventory.gates.members({}), observes=service.mode == "observe")
    with contextlib.closing(Supervisor(service, installation.path.parent, doors, lease)) as supervisor:
        serve_with(installation, console, supervisor)
    log.info("ended")
    return 0


# === Status ==================================================================
# The command `status`, for people and for Nagios: what the running service wrote of itself a moment ago comes in, a
# line and an exit code go out. Nothing is judged a second time, and nothing is said that the service did not say.
# Gives: add_status_command, parsed
NAGIOS = {"open": 0, "degraded": 1, "closed": 2, "unknown": 3}      # exit codes of `status`
ALIKE = {"unhealthy": "closed", "unknown": "unknown", "degraded": "degraded"}   # the same of states, worst first


def parts_told(installation: Installation, names: Sequence[str]) -> tuple[ServiceView, list[PartView]]:
    """What the running service says of everything, and of what has these names. Raises HealthCheckerError."""
    if not installation.database.inspect(whole=False) or not installation.runs:
        raise UsageError(f"the service does not run{installation.place}: the gate is closed")
    with installation.store(scratch=True) as store, store.reading() as session:
        view = told_by_service(store, session)
        rows = session.execute(RESOURCES).all() if names else ()
    known = {part.name: part for part in view.gates[1:]} | {row.name: PartView.model_validate({
        "name": row.name, "state": known.state, "why": "", "since": known.since_at or None})
        for row, status in rows for known in [status_of(row, status)]}
    known |= {part.name: part for part in view.others if part.name in known}
    for name in names:
        if name not in known:
            raise UsageError(f"{name}: {unknown_name(name, known, 'group, route or resource')}")
    return view, [known[name] for name in names]


def status_line(state: str, parts: Sequence[PartView], numbers: Mapping[str, int]) -> str:
    """As a plug-in of Nagios says it: one line, performance data behind a bar."""
    said = [f"{part.name or 'gate'} {part.state}{f' ({part.why})' if part.why else ''}" for part in parts]
    more = f" and {len(said) - 5} more" if len(said) > 5 else ""
    told = one_line(f"{state.upper()}: {'; '.join(said[:5]) or 'all is well'}{more}").replace("|", "/")
    return f"{told} | {' '.join(f'{name}={number}' for name, number in numbers.items())}"


def told_status(installation: Installation, names: Sequence[str]) -> dict[str, Any]:
    """The answer of `status`. Raises HealthCheckerError."""
    view, named = parts_told(installation, names)
    states = [part.state for part in named]
    state = next((word for each, word in ALIKE.items() if each in states), "open") if names else view.state
    shown = named or [part for part in (*view.gates, *view.others) if part.state in ALIKE]
    numbers = {"gate": int(view.gates[0].state != "unhealthy"), "groups_closed": sum(
        part.state == "unhealthy" for part in view.gates[1:]), **view.resources}
    line = status_line(state, shown, numbers) + (" observe=1" if view.mode == "observe" else "")
    return {"state": state, "text": line, "mode": view.mode, "resources": view.resources,
            **{key: [part.model_dump(mode="json") for part in parts] for key, parts in (
                ("gates", view.gates), ("others", view.others), ("named", named))}}


def status(arguments: argparse.Namespace) -> int:
    """Says what the running service says of everything, or of some, with exit codes of Nagios."""
    try:
        answer = told_status(Installation(arguments.inventory), arguments.names)
    except (HealthCheckerError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError, ValueError) as error:
        why = one_line(str(getattr(error, "orig", None) or error).replace("\n", "; "))
        answer = {"state": "unknown", "text": f"UNKNOWN: {why}"}
    print(json.dumps(answer) if arguments.json else answer["text"])
    return NAGIOS[answer["state"]]


def add_status_command(commands: Any) -> None:
    command = commands.add_parser("status", help=(
        "what the running service says, as a plug-in of Nagios: exit 0 open, 1 degraded, 2 closed, 3 not known"))
    command.add_argument("--json", action="store_true")
    command.add_argument("names", nargs="*", metavar="NAME", help="of groups, routes and resources: only of these")
    command.set_defaults(run=status)


def parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The arguments. Raises SystemExit; a `status` that is wrong is no closed gate, which has the usual code."""
    try:
        return parser.parse_args(words)
    except SystemExit as end:
        command = next((word for before, word in zip(["", *words], words, strict=False)     # no value of an option
                        if word[:1] != "-" and not re.fullmatch("--[il][^=]*", before)), "")
        raise SystemExit(NAGIOS["unknown"] if end.code and command == "status" else end.code) from None


# === Sealing =================================================================
# The commands that seal secrets: those that stand plain in the file, or all of them with another key. In come rows and
# the file, out go both, all or nothing; comments and layout of the file stay.
# Gives: replace_keys, rotate_keys, seal
def scalars(document: Document) -> dict[NodePath, str]:
    """Every text of the file by its path."""
    return {where: node.value for where, node in document.nodes.items() if isinstance(node, yaml.ScalarNode)}


def rewrite(path: Path, document: Document, replacements: Mapping[NodePath, str]) -> None:
    """Replaces the texts at some paths of the file, all or nothing; comments and layout stay."""
    raw = path.read_bytes()
    text = raw.decode("utf-8-sig")
    for where in sorted(replacements, key=lambda where: document.nodes[where].start_mark.index, reverse=True):
        begin, end = document.nodes[where].start_mark.index, document.nodes[where].end_mark.index
        kept = ""
        if text[begin] in "|>":     # a block: its first line may hold a comment, its end holds line breaks
            block = text[begin:end]
            head, tail = re.match(r"[|>][^\s#]*(\s+#[^\r\n]*)?", block), re.search(r"(\r?\n[ \t]*)*\Z", block)
            kept = (head[1] or "" if head else "") + (tail[0] if tail else "")
        text = text[:begin] + replacements[where] + kept + text[end:]
    content = (b"\xef\xbb\xbf" if raw.startswith(b"\xef\xbb\xbf") else b"") + text.encode()
    if scalars(Document(path.name, content)) != {**scalars(document), **replacements}:
        raise InventoryError(f"{path.name}: its layout is too unusual to be rewritten; nothing was changed")
    real = path.resolve()       # a symbolic link stays one
    temporary = real.with_name(f".{real.name}.{secrets.token_hex(4)}")
    try:
        create_private(temporary, content)
        take_place(temporary, real)
    except OSError as error:
        raise InventoryError(f"{path.name}: cannot be replaced: {error.strerror}; is it open elsewhere, or another "
                             "account's?") from error
    finally:
        temporary.unlink(missing_ok=True)


def secret_nodes(inventory: Inventory, document: Document, *, sealed: bool) -> list[
        tuple[NodePath, tuple[str, ...], Callable[[Vault], str]]]:
    """Paths of the secrets that stand in the file, sealed or plain ones, what each belongs to, and what opens it."""
    found: list[tuple[NodePath, tuple[str, ...], Callable[[Vault], str]]] = [
        (where, bound, functools.partial(open_sealed, secret, bound)) for where, secret, bound in inventory.secrets()]
    hosts = collections.Counter(inventory.entries)
    for index, settings in zip(inventory.entries, inventory.resources, strict=True):
        found += [(("resources", index, kind), binding(kind, settings), functools.partial(open_stated, settings, kind))
                  for kind in settings.secrets if hosts[index] == 1]
    return [node for node in found if node[0] in document.nodes
            and document.nodes[node[0]].value.startswith(TOKEN_PREFIXES) is sealed]


def seal(arguments: argparse.Namespace) -> int:
    """Replaces the plain secrets in the file by sealed ones."""
    installation = Installation(arguments.inventory)
    document = read_document(installation.path)
    with installation.store(scratch=True) as store, store.reading() as session:
        vault = installation.open_vault(session)
    tokens = {where: vault.seal(opened(vault), *bound)
              for where, bound, opened in secret_nodes(installation.inventory, document, sealed=False)}
    if tokens:
        rewrite(installation.path, document, tokens)
    print(f"{installation.path.name}: {len(tokens)} secrets sealed")
    left = [where for where, text in scalars(read_document(installation.path)).items()
            if where and where[-1] in SECRETS and not text.startswith(TOKEN_PREFIXES)
            and len(where) == {"defaults": 2, "resources": 3}.get(str(where[0]))]
    for where in left:
        print(f"{where[-1]} in line {document.position(where).partition(':')[0]} stays plain, for a sealed secret "
              f"belongs to one resource; use {where[-1]}_file, or write it at each resource", file=sys.stderr)
    return int(bool(left))


def rotate_keys(arguments: argparse.Namespace) -> int:
    """Seals every secret with a new key. Interrupted, it leaves both keys; it is run again then."""
    installation = Installation(arguments.inventory)
    document = read_document(installation.path)
    nodes = secret_nodes(installation.inventory, document, sealed=True)
    if len(list(sealed_tokens(None, installation.inventory))) > len(nodes):
        raise UsageError("a sealed secret stands in defaults, a password_file or a variable; "
                         "write the password at its resource first")
    installation.database.inspect()
    with installation.database.lock(), installation.store(locked=True) as store:
        with store.writing(long=True) as session:
            vault = installation.open_vault(session)
            if not (vault.folder / "next.pem").exists():
                vault.create("next.pem")
            tokens = {where: vault.seal(opened(vault), *bound) for where, bound, opened in nodes}
            reseal(session, session.scalars(sqlalchemy.select(Resource)), vault)
            for receiver in session.scalars(sqlalchemy.select(Receiver).where(Receiver.url != "")):
                receiver.url = vault.seal(vault.open(receiver.url, *receiver.bound), *receiver.bound)
            session.merge(Setting(name="key", text=vault.key_id))
            record_event(session, "change", f"secrets are sealed with key {vault.key_id} now", actor="command line")
            revise(session)
        if tokens:
            rewrite(installation.path, document, tokens)
        store.checkpoint()
        vault.retire()
    print(f"secrets are sealed with key {vault.key_id} now")
    return 0


def replace_keys(arguments: argparse.Namespace) -> int:
    """Makes a key in place of a lost one: what only that one opens is forgotten, and the inventory states it again."""
    installation = Installation(arguments.inventory, accepts_removals=arguments.accept_removals)
    with installation.database.lock(), installation.store(locked=True) as store, \
            store.writing(long=True) as session:
        vault = Vault(installation.service.keys)
        vault.require(sealed_tokens(None, installation.inventory))
        forgotten = [(row, kind) for row in session.scalars(sqlalchemy.select(Resource))
                     for kind in SECRETS if vault.lacks(getattr(row, kind))]
        for row, kind in forgotten:
            setattr(row, kind, None)
        lost = [receiver for receiver in session.scalars(sqlalchemy.select(Receiver)) if vault.lacks(receiver.url)]
        for receiver in lost:
            receiver.url = ""
        if not forgotten and not lost:
            raise UsageError("no secret is sealed with a key that is lost; `keys rotate` makes a new key")
        session.merge(Setting(name="key", text=""))
        vault = installation.open_vault(session)
        installation.take_over(session, vault, "command line")
        record_event(session, "change", f"key {vault.key_id} in place of a lost one", actor="command line")
        revise(session)
    for name in sorted({row.name for row, _ in forgotten if row.origin == "api"}):
        print(f"{name}: write its password again, in the console")
    print(f"secrets are sealed with key {vault.key_id} now")
    return 0


# === Commands ================================================================
# The command line: each command is a function of the arguments, works on an Installation and gives the exit code. What
# it changes in the database a running service takes up within a second.
# Gives: nothing
TAKEN_UP = 2.0                  # seconds after which a running service has followed a row, and written what came of it
APP_WAIT = 120.0                # seconds for the application to be loaded by `check`
PROBES_AT_ONCE = 64             # resources that `check --probe` polls at the same time
PROGRESS_INTERVAL = 0.1         # seconds between two looks at them; a wait without an end may never see Ctrl-C


@contextlib.contextmanager
def rehearsal(installation: Installation) -> Iterator[tuple[Session, Vault, Changes]]:
    """The import as a start would do it, rolled back at the end; without a database or keys on scratch ones."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, installation.store(scratch=True) as store, \
            store.writing(long=True) as session:
        vault = Vault(installation.service.keys)
        vault.require(sealed_tokens(session, installation.inventory))
        if not vault.key_id:
            vault = Vault(Path(folder))
            vault.create()
        yield session, vault, import_inventory(session, installation.inventory, vault)
        session.rollback()


def peak(sample: Sample | None, metric: str) -> str:
    """The highest reading of a metric, a dash where there is none (the CPU needs two polls)."""
    values = [value for _, value in sample.readings(metric)] if sample else []
    return f"{max(values):.0f}" if values else "-"


def print_table(cells: Iterable[Iterable[str]]) -> None:
    rows = [[*map(one_line, row)] for row in cells]     # a reason that somebody typed is no order to a terminal
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_progress(count: int, total: int) -> None:
    """A bar on a terminal."""
    if total and sys.stderr.isatty():
        bar, end = "#" * (count * 40 // total), "\n" if count == total else ""
        print(f"\r[{bar:.<40}] {count}/{total}", end=end, file=sys.stderr, flush=True)


def make_connections(targets: Iterable[Target], access: ConnectionContext) -> None:
    """The connections to all resources, some of which are bastions of others."""
    for target in targets:
        access.watched[target.name] = CONNECTIONS[target.settings.platform](target, access.guard_of(target), access)


def probe(targets: Mapping[str, Target], chosen: Sequence[Target], access: ConnectionContext) -> int:
    """Polls each once, PROBES_AT_ONCE at a time, and prints a table; 1 when a critical one is unhealthy."""
    room = threading.Semaphore(PROBES_AT_ONCE)
    make_connections(targets.values(), access)
    rows: dict[str, list[str]] = {}     # by name; each thread adds one
    bad: list[str] = []

    def run(target: Target) -> None:
        with room:
            began = time.monotonic()
            verdict, sample = poll_once(target, access.watched[target.name], None)
        if target.settings.critical and not verdict.healthy:
            bad.append(target.name)
        rows[target.name] = [
            target.name, verdict.state, f"{time.monotonic() - began:.2f}",
            *(peak(sample, metric) for metric in ("cpu_percent", "memory_percent", "disk_percent")),
            caused(verdict.cause, verdict.reason)]

    # daemons, so that Ctrl-C need not wait for them
    threads = [threading.Thread(target=run, args=(target,), daemon=True) for target in chosen]
    for thread in threads:
        thread.start()
    while running := [thread for thread in threads if thread.is_alive()]:
        show_progress(len(threads) - len(running), len(threads))
        running[0].join(PROGRESS_INTERVAL)
    show_progress(len(threads), len(threads))
    heading = ["NAME", "STATE", "SECONDS", "CPU %", "MEMORY %", "DISK %", "WHY"]
    print_table([heading, *(rows[target.name] for target in chosen)])
    return int(bool(bad))


def find_target(targets: Mapping[str, Target], name: str) -> Target:
    """Raises UsageError."""
    if name not in targets:
        raise UsageError(f"no such resource{did_you_mean(name, targets)}")
    return targets[name]


def check_doors(installation: Installation) -> Iterator[HealthCheckerError]:
    """What a start would say of its ports, its log and the word of the metrics."""
    service = installation.service
    for setting, value in ((installation.listen_name, service.listen), ("service.console", service.console)):
        try:
            for sock in listen(setting, value, 0.0) if value != "off" else ():
                sock.close()
        except UsageError as error:
            in_use = getattr(error.__cause__, "errno", 0) == errno.EADDRINUSE
            if in_use and installation.runs:
                print(f"{setting} {value} is in use: by the service that runs, if it is not new there")
            else:
                yield error
    path = service.log_file
    if path and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        yield UsageError(f"service.log_file {path} cannot be written")
    yield from check_files(service)


def check_app(installation: Installation) -> int:
    """Loads the application in a process of its own, as a worker does; gives an exit code."""
    if not (name := installation.service.app):
        return 0
    process = multiprocessing.get_context("spawn").Process(target=try_app, args=(name, installation.path.parent))
    process.start()
    process.join(APP_WAIT)
    if process.exitcode not in (0, UsageError.exit_code):
        print(f"service.app {name} ended its process with exit code {process.exitcode}" if not process.is_alive()
              else f"service.app {name} is not loaded after {APP_WAIT:.0f} s", file=sys.stderr)
    process.kill()
    process.join()      # before that it has no exit code
    return UsageError.exit_code if process.exitcode else 0


def show_readable(installation: Installation) -> None:
    """Names the files with secrets that every account of this machine can read (POSIX)."""
    inventory, service = installation.inventory, installation.service
    files = {service.metrics_token_file, *(receiver.url_file for receiver in inventory.receivers),
             service.heartbeat_file, service.status_token_file, service.database_password_file, service.database_path}
    elsewhere = [each.url_file or each.url_env for each in inventory.receivers]
    elsewhere += [service.status_token_file or service.status_token_env] if service.status_token else []
    elsewhere += [service.database_password_file or service.database_password_env] if service.database_password else []
    files |= set() if all(elsewhere) else {installation.path}
    for each in inventory.resources:
        files |= {each.password_file, each.key_passphrase_file, each.key_file}
        files |= {each.certificate_file} if each.url and not each.key_file else set()
        files |= {installation.path} if each.secrets and not (each.password_file or each.password_env) else set()
    for path in sorted(filter(None, files)) if sys.platform != "win32" else ():
        if path.exists() and path.stat().st_mode & 0o007:
            print(f"{path} holds secrets, and is open to other users; run: chmod o= {path}")


def check(arguments: argparse.Namespace) -> int:
    """Says what a start would say, and what it would change; changes nothing."""
    installation = Installation(arguments.inventory, accepts_removals=arguments.accept_removals,
                                listen_on=arguments.listen)
    code = 0
    for fault in check_doors(installation):
        print(fault, file=sys.stderr)
        code = fault.exit_code
    code = check_app(installation) or code
    with rehearsal(installation) as (session, vault, changes):
        print(f"{installation.path.name} is valid; a start would make: {changes}")
        if 0 < (version := installation.database.inspect(whole=False)) < SCHEMA:
            print(f"a start would bring the database from schema {version} to {SCHEMA}, and no earlier version opens it"
                  " then: make a `backup` first")
        for line in gate_lines(installation.inventory.gates, installation.inventory.resources):
            print(line)
        show_readable(installation)
        for fault in check_receivers(installation.inventory, vault):
            print(fault, file=sys.stderr)
            code = fault.exit_code
        installation.review(changes)
        for settings in installation.inventory.resources:
            if settings.ssh_config:
                said = {name: getattr(settings, name) for name in (*SshConfig.SAID, "key_file")}
                told = (f"{name} {value}" for name, value in said.items() if value is not None)
                print(f"{settings.name}, with {settings.ssh_config.name}: {', '.join(told)}")
            if settings.platform is Platform.WINDOWS and (missing := missing_package(settings.auth)):
                print(f"{settings.name}: {missing}")
        targets = {} if arguments.probe is None else load_targets(session, vault)
    polled = [name for name, target in targets.items() if target.settings.is_asked]
    chosen = [find_target(targets, name) for name in arguments.probe or polled]
    return code or (0 if arguments.probe is None else probe(targets, chosen, installation.access()))


def notify_test(arguments: argparse.Namespace) -> int:
    """Sends one receiver a message, now."""
    installation = Installation(arguments.inventory)
    urls = {name: url for _, name, url in installation.inventory.urls() if name not in OWN_SECRETS}
    if not urls:
        raise UsageError(f"{arguments.inventory.name} names nobody to notify")
    if arguments.name not in urls:
        raise UsageError(f"notify names no {arguments.name}{did_you_mean(arguments.name, urls)}")
    if not has_apprise():
        raise UsageError(NO_APPRISE)
    with installation.store(scratch=True) as store, store.reading() as session:
        url = open_url(urls[arguments.name], arguments.name, installation.open_vault(session))
    message = Message("HealthChecker: a test", f"{arguments.name} hears from HealthChecker.")
    came = deliver(url, message, ChildProcess())
    print(f"{arguments.name}: {'delivered' if came.is_delivered else f'not delivered: {came.why}'}")
    return int(not came.is_delivered)


def middleware(arguments: argparse.Namespace) -> int:
    """Prints the gate for other servers."""
    path = Installation(arguments.inventory).service.lease_file
    if not path:
        raise UsageError(f"{arguments.inventory.name} names no service.lease_file, which it would read")
    print(middleware_text(path), end="")
    return 0


def endpoint(arguments: argparse.Namespace) -> int:
    """Prints what a host needs that shall answer polls and nothing else."""
    installation = Installation(arguments.inventory)
    with rehearsal(installation) as (session, vault, _):
        target = find_target(load_targets(session, vault), arguments.name)
    settings = target.settings
    if not settings.endpoint:
        raise UsageError(f"{target.name} has no `endpoint: true`; write it there first")
    for check in settings.checks:
        if SUSPECT.search(check.command):
            print(f"{target.name}: check {check.name} seems to hold a secret, which whoever reads the endpoint there "
                  "can read; have the command read it from a file of its own", file=sys.stderr)
    if settings.platform is Platform.WINDOWS:
        print(windows_endpoint(settings), end="")
    else:
        connection = SshConnection(target, LoginGuard(), installation.access())
        print(unix_endpoint(settings, connection.load_keys(cast(Path, settings.key_file))[-1]), end="")
    return 0


def confirm(offered: str, arguments: argparse.Namespace) -> None:
    """Asks whether the key is the right one, unless an option says so. Raises UsageError."""
    if arguments.key:
        if arguments.key.partition("SHA256:")[2] != offered.partition("SHA256:")[2]:
            raise UsageError(f"the host shows another key: {offered}; nothing was changed")
    elif not arguments.yes:
        if not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask at; compare the key and name it: --key SHA256:..., or --yes")
        if input("Is that what the machine itself shows? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UsageError("nothing was changed")


def trust(arguments: argparse.Namespace) -> int:
    """Shows the key that a host was known by and the one that it shows now, and accepts that one when told so."""
    installation = Installation(arguments.inventory)
    installation.require_database()
    with installation.store() as store:
        with store.reading() as session:
            targets = load_targets(session, installation.open_vault(session))
        target, access = find_target(targets, arguments.name), installation.access()
        make_connections(targets.values(), access)
        offered = offered_key(target, access)
        print(f"{target.name}: trusted was {target.host_key or 'no key'}, offered is {offered}", flush=True)
        confirm(offered, arguments)
        with store.writing() as session:
            session.execute(sqlalchemy.update(Resource).values(host_key=offered).where(Resource.id == target.id))
            record_event(session, "change", f"trusted {offered}, before {target.host_key or 'no key'}",
                         resource=target.name, actor="command line")
            revise(session)
    print(f"{target.name}: trusted is {offered}")
    return 0


def copy_database(arguments: argparse.Namespace) -> int:
    """Copies a database into an empty one, of the same kind or the other, while no service runs on either."""
    installation = Installation(arguments.inventory)
    source, target = (database_at(url, installation) for url in (arguments.source, arguments.target))
    if str(source) == str(target):
        raise UsageError(f"FROM and TO are both {source}; name another one")
    try:
        if not source.inspect():
            raise UsageError(f"there is no database {source}")
        target.inspect()
        with source.lock(), target.lock(), contextlib.closing(Store(source, locked=True)) as old, \
                contextlib.closing(Store(target, locked=True)) as new:
            count = copy_rows(old, new, show_progress)
    except StorageError as error:       # no setting is at fault
        raise StorageError(str(error).replace("set service.database", "name another one")) from error
    print(f"{count} rows were copied and compared; keys and inventory stay: name the database in service.database")
    return 0


def typed_password() -> str:
    """A password from the terminal, without an echo and twice, or the first line of what is piped in."""
    if not sys.stdin.isatty():
        return sys.stdin.buffer.readline().decode("utf-8-sig", "replace").rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Once more: ") != password:
        raise UsageError("the two are not the same")
    return password


def make_token_of(who: Principal, given: argparse.Namespace) -> None:
    """Prints a new token, and nothing else where a script reads it."""
    new = validated(NewToken, {"name": given.token, "role": given.role, "expires": given.expires})
    with who.context.store.reading() as session:
        user = find_user(session, given.name)
    print(issue_token(who, user, new).token)


def revoke_token_of(who: Principal, given: argparse.Namespace) -> None:
    found = [row.id for row in list_tokens(who) if (row.user, row.name) == (given.name, given.token)]
    revoke_token(who, found[0] if found else "")


def token_rows(who: Principal) -> Iterator[list[str]]:
    for row in list_tokens(who):
        yield [row.user, row.name, row.role, "never" if row.expires_at >= NEVER else local_time(row.expires_at),
               local_time(row.seen_at) if row.seen_at else "not used", row.address]


# what a `user` command does; how, given its arguments; what it says then
USER_COMMANDS: dict[str, tuple[str, Callable[[Principal, argparse.Namespace], object], str]] = {
    "add": ("add a user",
            lambda who, given: add_user(who, {"name": given.name, "password": typed_password(), "role": given.role}),
            "{name} can log in now, as {role}"),
    "passwd": ("change a password", lambda who, given: change_user(who, given.name, {"password": typed_password()}),
               "{name} has a new password; earlier sessions have ended"),
    "remove": ("remove a user", lambda who, given: remove_user(who, given.name), "{name} cannot log in any more"),
    "list": ("print the users", lambda who, _: print_table([["NAME", "ROLE", "PASSWORD"], *(
        [user.username, user.role, "the documented one" if user.initial else "own"] for user in list_users(who))]), ""),
    "token add": ("make an API token of a user, and print it", make_token_of, ""),
    "token revoke": ("revoke an API token", revoke_token_of, "{token} of {name} opens nothing any more"),
    "token list": ("print the API tokens", lambda who, _: print_table(
        [["USER", "TOKEN", "ROLE", "ENDS", "LAST USED", "FROM"], *token_rows(who)]), ""),
}


def console_of(installation: Installation, store: Store) -> Principal:
    """Who is at the command line; what commands do with it needs neither keys nor pollers."""
    nothing: Any = None
    return Principal(ConsoleContext(store, installation.inventory, Lease(), nothing, nothing, nothing, store.wall))


def manage_users(arguments: argparse.Namespace) -> int:
    """A `user` command, also while the service runs or before it ever did."""
    installation = Installation(arguments.inventory)
    _, run, said = USER_COMMANDS[arguments.action]
    with installation.store(scratch=arguments.action.endswith("list")) as store:
        with store.writing() as session:
            ensure_first_user(session)
        run(console_of(installation, store), arguments)
    if said:
        print(said.format_map(vars(arguments)))
    return 0


def add_user_commands(users: Any) -> None:
    tokens = users.add_parser("token", help="`user token add|revoke|list`: API tokens for scripts")
    tokens = tokens.add_subparsers(metavar="add|revoke|list", required=True)
    for action, (what, _, _) in USER_COMMANDS.items():
        word, of_token = action.removeprefix("token "), action.startswith("token ")
        command = (tokens if of_token else users).add_parser(word, help=what)
        command.set_defaults(run=manage_users, action=action)
        for name in () if word == "list" else ("name", "token") if of_token else ("name",):
            command.add_argument(name, metavar=name.upper())
        if word == "add":
            command.add_argument("--role", choices=get_args(Role), default="viewer", help="default: viewer, who looks")
        if action == "token add":
            command.add_argument("--expires", default=NAMED_LIFE, help="like 90d (the default), 2027-01-31, or never")


def gate_rows(installation: Installation, session: Session) -> Iterator[list[str]]:
    """How the gate stands as far as it is written down, which takes a service a second."""
    last = next(iter(events(session, kind="gate", limit=1)), None)
    override = stored_override(session)
    if override and (override.until or math.inf) < installation.database.wall():
        override = None
    end = f"until {local_time(override.until)}" if override and override.until else "until that is ended"
    yield ["GATE", f"{last.text}, at {local_time(last.at)}" if last else "never open yet"]
    yield ["OVERRIDE", f"{override.why}, {end}" if override else "none"]
    started = remembered(session, own_name("service", installation.service.machine_name)).text
    mode = json.loads(started or "{}").get("mode", "enforce")   # as it was started with
    yield ["MODE", "observe: nothing is refused" if mode == "observe" else mode]
    yield ["SERVICE", "runs" if installation.runs else f"does not run{installation.place}: the gate is closed"]


def change_and_show(arguments: argparse.Namespace, change: Callable[[Principal], object] | None,
                    rows: Callable[[Installation, Session], Iterable[list[str]]]) -> int:
    """Makes a change, if there is one, also while the service runs; then prints how it stands."""
    installation = Installation(arguments.inventory)
    installation.require_database()
    with installation.store(scratch=change is None) as store:
        if change:
            change(console_of(installation, store))
            time.sleep(TAKEN_UP if installation.database.is_running() else 0.0)
        with store.reading() as session:
            print_table(rows(installation, session))
    return 0


def gate(arguments: argparse.Namespace) -> int:
    """Opens or closes the gate by hand, or ends that; then says how it stands."""
    given = {"action": arguments.action, "for": arguments.seconds, "reason": arguments.reason}
    given = {name: value for name, value in given.items() if value is not None}
    return change_and_show(arguments, (lambda who: change_gate(who, given)) if given else None, gate_rows)


def work_rows(installation: Installation, session: Session) -> Iterator[list[str]]:
    yield ["NUMBER", "STATE", "FROM", "UNTIL", "WHAT", "REASON"]
    for turn in timetable(session, installation.database.wall()):
        yield [str(turn.id or "-"), turn.state, local_time(turn.start), local_time(turn.until), str(turn.scope),
               turn.reason]


def end_by_command(who: Principal, arguments: argparse.Namespace, scope: Mapping[str, Any]) -> None:
    """Ends what has a number, or what was planned for exactly this. Raises HealthCheckerError."""
    if arguments.number and scope:
        raise UsageError("say NUMBER or what it is of, not both")
    if arguments.number:
        return cancel_work(who, arguments.number)
    with who.context.store.writing() as session:
        if not end_works(who, session, validated(Scope, scope), "begun", "planned"):
            raise UsageError("nothing was planned here for exactly that; `maintenance list` shows numbers to end")


def maintenance(arguments: argparse.Namespace) -> int:
    """Begins, plans or ends maintenance; then says what runs and what is ahead."""
    given = vars(arguments)
    scope = {field: given[field] for field in Scope.model_fields if given.get(field)}
    if arguments.action != "list" and not given.get("number") and bool(given["all"]) == bool({*scope} - {"all"}):
        raise UsageError("say what: --tag, --group or --resource NAME, or else --all")

    def change(who: Principal) -> None:
        if arguments.action == "end":
            return end_by_command(who, arguments, scope)
        start = {"start": chosen_moment(arguments.start)} if arguments.start else {}
        start_work(who, {"for": arguments.seconds, "reason": arguments.reason} | start | scope)

    return change_and_show(arguments, None if arguments.action == "list" else change, work_rows)


def add_maintenance_commands(commands: Any) -> None:
    work = commands.add_parser("maintenance", help="`maintenance start|end|list`: what does not count for a while")
    work = work.add_subparsers(metavar="start|end|list", required=True)
    for action, what in (("start", "let something not count for a while, now or later"),
                         ("end", "end it, or cancel what is planned"), ("list", "print what runs and what is ahead")):
        command = work.add_parser(action, help=what)
        command.set_defaults(run=maintenance, action=action)
        for field in ("tag", "group", "resource") if action != "list" else ():
            command.add_argument(f"--{field}", dest=f"{field}s", action="append", metavar="NAME",
                                 help="may be said again" if field == "tag" else None)
        if action != "list":
            command.add_argument("--all", action="store_true", help="everything")
        if action == "end":
            command.add_argument("number", nargs="?", metavar="NUMBER", help="of `maintenance list`")
        if action == "start":
            command.add_argument("--for", dest="seconds", required=True, metavar="2h", help="90s, 30m, 2h, 1d")
            command.add_argument("--at", dest="start", metavar="TIME", help="such as '2026-11-28 02:00'; default: now")
            command.add_argument("--reason", required=True, help="shown to who is logged in, and kept as an event")


def address_to_listen_on(text: str) -> str:
    """The value of --listen. Raises ArgumentTypeError."""
    try:
        return TypeAdapter(Listen).validate_python(text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(message_of(error.errors()[0])) from None


def add_gate_command(commands: Any) -> None:
    command = commands.add_parser("gate", help="open or close the gate by hand, or leave it to the resources again; "
                                               "without an argument: how it stands")
    command.add_argument("action", nargs="?", choices=("open", "close", "auto"))
    command.add_argument("--for", dest="seconds", metavar="30m", help="90s, 30m, 2h, 1d; open: 30m unless said, 1d at "
                                                                      "most; close: until `auto` unless said")
    command.add_argument("--reason", help="shown to who is logged in, and kept as an event")
    command.set_defaults(run=gate)


def add_resource_commands(commands: Any) -> None:
    command = commands.add_parser("check", help="validate the inventory and say what a start would change")
    command.add_argument("--probe", nargs="*", metavar="NAME",
                         help="also poll every resource, or those named, once and print a table")
    command.set_defaults(run=check)
    command = commands.add_parser("endpoint", help="print what a host needs that shall answer polls and nothing else")
    command.add_argument("name", metavar="NAME")
    command.set_defaults(run=endpoint)
    command = commands.add_parser("trust", help="accept the changed host key of a resource")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--key", metavar="SHA256:...", help="accept this key only, without a question")
    command.add_argument("--yes", action="store_true", help="accept whatever key it shows, without a question")
    command.set_defaults(run=trust)


def add_database_commands(commands: Any) -> None:
    for run, what in ((backup, "write database, keys and inventory into one archive, also while the service runs"),
                      (restore, "bring them back, where there are none")):
        command = commands.add_parser(run.__name__, help=what)
        command.add_argument("file", type=Path, metavar="FILE")
        command.set_defaults(run=run)
    command = commands.add_parser("database", help="`database copy FROM TO`: everything into an empty one; each is "
                                                   "sqlite:///path or postgresql+psycopg://user@host/name")
    command.add_argument("action", choices=("copy",))
    command.add_argument("source", metavar="FROM")
    command.add_argument("target", metavar="TO")
    command.set_defaults(run=copy_database)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="healthchecker.py", description=(
        "A web application answers only while the machines it depends on are healthy. Without a command: serve."))
    parser.add_argument("--version", action="version", version=f"HealthChecker {VERSION}")
    parser.add_argument("--inventory", type=Path, default=INVENTORY, metavar="FILE",
                        help="default: inventory.yaml beside healthchecker.py, which a first start makes")
    parser.add_argument("--accept-removals", action="store_true", help=(
        "start (or check) although more than a third of the resources are not in the inventory any more"))
    parser.add_argument("--listen", type=address_to_listen_on, metavar="ADDRESS:PORT", help=(
        "serve (or check) there, whatever service.listen says"))
    parser.set_defaults(run=serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    add_resource_commands(commands)
    for run, what in ((seal, "replace plain passwords in the inventory by sealed ones"),
                      (middleware, "print the gate for other servers, which reads service.lease_file"),
                      (reload, "have a running service take an edited inventory over")):
        commands.add_parser(run.__name__, help=what).set_defaults(run=run)
    add_database_commands(commands)
    users = commands.add_parser("user", help="`user add|passwd|remove|list|token`: who can log in")
    add_user_commands(users.add_subparsers(metavar="add|passwd|remove|list|token", required=True))
    add_gate_command(commands)
    add_status_command(commands)
    add_maintenance_commands(commands)
    command = commands.add_parser("notify", help="`notify test NAME`: send a receiver of `notify` a message, now")
    command.add_argument("action", choices=("test",))
    command.add_argument("name", metavar="NAME")
    command.set_defaults(run=notify_test)
    keys = commands.add_parser("keys", help="seal every secret with a new key: `keys rotate`, or `keys replace` where "
                                            "the old one is lost; stop the service first")
    changes = keys.add_subparsers(metavar="rotate|replace", required=True)
    changes.add_parser("rotate").set_defaults(run=rotate_keys)
    changes.add_parser("replace").set_defaults(run=replace_keys)
    return parser


def be_discreet() -> None:
    """Nothing that this process makes is for others to write, and none of its secrets goes into a core dump."""
    os.umask(os.umask(0o077) | 0o022)
    if sys.platform != "win32":
        import resource  # noqa: PLC0415  # POSIX only
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def run_command(argv: Sequence[str] | None) -> int:
    arguments = parsed(command_line(), sys.argv[1:] if argv is None else argv)
    for name in ("paramiko", "pypsrp", "urllib3", "spnego", "psycopg"):    # they repeat what we report
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return int(arguments.run(arguments))
    except HealthCheckerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error) as error:
        print(f"the database cannot be used: {one_line(str(getattr(error, 'orig', error)))}", file=sys.stderr)
        return StorageError.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        print(one_line(f"{error.filename}: {error.strerror}" if error.filename else str(error)), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 a check failed, 2 inventory or usage, 3 keys, 4 database."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]   # pythonw: none
    for stream in streams:      # a pipe has the code page of the machine
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")     # /bin/sh knows no \r
    be_discreet()
    try:
        try:
            return run_command(argv)
        finally:
            for stream in streams:
                stream.flush()
    except OSError as error:    # of the output; who read it, `head` for instance, has enough
        if not isinstance(error, BrokenPipeError):
            print(f"the output cannot be written: {one_line(str(error))}", file=sys.stderr)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:    # or Python would complain at its end
            for stream in streams:
                os.dup2(nowhere.fileno(), stream.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
