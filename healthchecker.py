"""HealthChecker: a web application answers only while the machines it depends on are healthy.

One thread per machine polls it over SSH and reports to the `HealthAggregator`; the gate in front of
the application asks `IsHealthy()` on every request: 2XX while every resource is healthy, 503 otherwise.

Sections, in file order; a definition refers only to what stands above it:

    Errors       one root, an exit code each
    Inventory    strict YAML -> validated settings, every fault with line and column
    Vault        AES-256-GCM data keys under RSA-OAEP, bound to the row they belong to
    Storage      SQLite through Flask-SQLAlchemy; the rows follow the inventory
    Connections  deadlines, byte caps, name look-up, TCP: what every connection needs
    Logins       the guard that keeps a wrong password from locking an account
    SSH          a fresh connection per poll, host keys verified before any secret is sent
    PowerShell   PowerShell Remoting over one watched socket
    Local        this machine's own shell, and simulated resources
    Probes       the command sets of the platforms, as tables
    Evaluate     sample + limits -> verdict -> standing; pure
    Aggregate    the lease: is everything healthy, now
    History      what polls found, packed: rows, averages, availability, events
    Poll         a thread per resource, one writer, one overseer
    Counters     what a worker counts, in shared memory; the access log
    Gate         the application's door: the WSGI application in front of the application
    HTTP         requests read strictly, clients with deadlines
    Serve        waitress on the loop, and its pools
    Workers      processes that serve on one socket
    Accounts     users, logins and what proves them, the brake on guessing
    Actions      what can be done; pages, API and command line call these
    API          the JSON API, and what every request to the console must pass
    Metrics      what Prometheus reads
    Pages        what a person sees: charts, forms, templates
    Style        style and script of the pages
    Views        the pages
    Console      the operators' door: pages and API under waitress, in the main process
    Commands     the command line: serve, check, seal, trust, keys
"""

from __future__ import annotations

import argparse
import base64
import binascii
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import datetime
import difflib
import errno
import fnmatch
import functools
import gc
import getpass
import gzip
import hashlib
import heapq
import hmac
import http
import importlib
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import multiprocessing
import os
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
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, cast, get_args
from urllib.parse import quote, unquote, unquote_to_bytes, urlencode

gc.disable()    # what is imported stays; to look through it again and again is a sixth of the start
try:
    import flask
    import itsdangerous
    import jinja2
    import paramiko
    import requests
    import sqlalchemy
    import urllib3
    import waitress
    import yaml
    from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from flask_sqlalchemy import SQLAlchemy
    from markupsafe import Markup
    from prometheus_client import CollectorRegistry, generate_latest
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
        model_validator,
    )
    from pydantic_core import from_json
    from pypsrp.complex_objects import PSInvocationState
    from pypsrp.exceptions import AuthenticationError, WSManFaultError
    from pypsrp.powershell import PowerShell, RunspacePool
    from pypsrp.wsman import WSMan
    from sqlalchemy import ForeignKey, event, func
    from sqlalchemy.dialects import sqlite
    from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
    from waitress import wasyncore
    from waitress.adjustments import Adjustments
    from waitress.buffers import OverflowableBuffer
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser
    from waitress.receiver import ChunkedReceiver, FixedStreamReceiver
    from waitress.server import TcpWSGIServer
    from waitress.task import ErrorTask, WSGITask
    from waitress.utilities import InternalServerError
    from werkzeug.exceptions import HTTPException
    from werkzeug.wrappers import Response
except ModuleNotFoundError as missing:
    raise SystemExit(f"healthchecker: the package {missing.name} is missing; "
                     "run `make run`, or `pip install -r requirements.txt`") from None
finally:
    gc.enable()

# Run as a script, an application that imports healthchecker still gets this module and no second copy.
sys.modules.setdefault("healthchecker", sys.modules[__name__])

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    if sys.platform == "win32":
        from multiprocessing.connection import PipeConnection
    else:
        from multiprocessing.connection import Connection as PipeConnection

log = logging.getLogger("healthchecker")

SECRET_LENGTH = 1024            # characters of a password at most: a longer one only costs time
LAST_PORT = 65535
NAME_CHARS = 253                # characters, the length of the longest host name
WINRM_PORTS = {True: 5986, False: 5985}  # with TLS and without
SSH_PORT = 22                   # the registered port (RFC 4251)
TOKEN_PARTS = 5                 # of a sealed secret, between dots
PBKDF2_ROUNDS = 220_000         # OWASP's figure for PBKDF2-HMAC-SHA512
AUTH_BACKOFF = 300.0            # seconds between attempts with a refused credential
MONITOR_INTERVAL = 0.5          # seconds between two looks of the monitor
STRIP = 60                      # polls of a resource that the overview shows
QUARTER = 900                   # seconds of which an average is kept
TOKEN_PREFIX = "HC1."           # noqa: S105  # of a sealed secret
LOG_BYTES = 10 << 20            # bytes of a log file before it rotates
LOG_FILES = 5                   # rotated log files that are kept
COMPLAINT_INTERVAL = 60.0       # seconds between two complaints about the same trouble
POOL_END = 0.5                  # seconds for idle pool threads to end
SESSION_LIFE = 8 * 3600.0       # seconds from the login to the end of a session
TOKEN_LIFE = 1200.0             # seconds of a bearer token


# === Errors ==================================================================
REASON_CHARS = 500              # characters of a reason that are kept


class HealthCheckerError(Exception):
    """Root of what HealthChecker raises on purpose; its text is one line that a user can act on."""

    exit_code: ClassVar[int] = 1


class InventoryError(HealthCheckerError):
    """The inventory cannot be used; the text has a line for each fault."""

    exit_code = 2


class UsageError(HealthCheckerError):
    """The command line, the address to listen on or `service.app` cannot be used."""

    exit_code = 2


class SecretError(HealthCheckerError):
    """Keys are missing or wrong, or a sealed secret does not open for the resource that it stands at."""

    exit_code = 3


class StorageError(HealthCheckerError):
    """The database is damaged, newer than this program, in use, or not ours."""

    exit_code = 4


class ApiError(HealthCheckerError):
    """A request is refused: why, its HTTP status, the fields at fault with what is wrong with each, seconds to wait.

    It can be pickled, so that it reaches a worker process."""

    exit_code = 2

    def __init__(self, detail: str, status: int = 400, fields: Mapping[str, str] | None = None,
                 retry: float = 0.0) -> None:
        super().__init__(detail)
        self.status, self.fields, self.retry = status, dict(fields or {}), retry


Cause = Literal["", "limit", "check", "unreachable", "timeout", "auth", "host_key", "credential", "protocol", "stale"]


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, cut to REASON_CHARS: fit for a log line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * REASON_CHARS]).split())
    return line if len(line) <= REASON_CHARS else line[: REASON_CHARS - 1] + "…"


class ProbeError(HealthCheckerError):
    """A poll gave no sample; `cause` is one of DESIGN's causes, the text says what to do."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(one_line(message))
        self.cause: Cause = cause
        self.host_key: str | None = None    # trusted on first use before the poll failed


# === Inventory ===============================================================
INVENTORY_BYTES = 1 << 20       # bytes; a larger inventory is refused
INVENTORY_DEPTH = 8             # levels of nesting
INVENTORY_NODES = 200_000       # YAML events
LEASE_GRACE = 2.0               # seconds added to a lease for a busy machine
WORKERS_MAX = 8                 # worker processes that `auto` starts at most


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


SELECTABLE = ("unix", "linux", "macos", "freebsd", "windows", "local", "simulated")
SSH_PLATFORMS = frozenset({Platform.UNIX, Platform.LINUX, Platform.MACOS, Platform.FREEBSD})
REMOTE_PLATFORMS = SSH_PLATFORMS | {Platform.WINDOWS}
NodePath = tuple[str | int, ...]


class Mark(NamedTuple):
    """A place in a file as PyYAML counts: from 0."""

    line: int
    column: int


def offset_mark(source: str | bytes, offset: int) -> Mark:
    """The place of an offset."""
    before = source[:offset] if isinstance(source, str) else source[:offset].decode("utf-8", "replace")
    lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", before)      # what YAML takes for a line break
    return Mark(len(lines) - 1, len(lines[-1]))


def place(mark: Any) -> str:
    """`line:column` of a mark in a YAML file, counted from 1."""
    return f"{mark.line + 1}:{mark.column + 1}"


class Document(NamedTuple):
    """A strictly read YAML file: nested dicts, lists and texts, with the node of every path and of every key."""

    value: Any
    nodes: dict[NodePath, yaml.Node]
    keys: dict[NodePath, yaml.Node]
    faults: list[str]       # what is wrong with keys and values that could be read all the same

    def position(self, path: NodePath, *, key: bool = False) -> str:
        """`line:column`, counted from 1, of the key `path` or of the nearest value at or above it."""
        node = self.keys.get(path) if key else None
        while node is None and path:
            node, path = self.nodes.get(path), path[:-1]
        return place(node.start_mark) if node else "1:1"


SURROGATE = re.compile("[\ud800-\udfff]")


class StrictReader:
    """Reads YAML as text scalars: no tags, anchors, aliases, merges or duplicate keys; never quotes the source."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.faults: list[str] = []

    def fault(self, mark: Any, message: str) -> None:
        self.faults.append(f"{self.name}:{place(mark)}: {message}")

    def read(self, source: bytes) -> Document:
        """Raises InventoryError for what is no YAML that we allow."""
        document = Document(None, {}, {}, self.faults)
        text = self._decode(source)
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader) if not self.faults and self._allowed(text) else None
        except yaml.MarkedYAMLError as error:
            self.fault(error.problem_mark or error.context_mark,
                       "not valid YAML here (is a value with special characters unquoted?)")
        except yaml.reader.ReaderError as error:
            self.fault(offset_mark(text, error.position), "this character is not allowed in YAML")
        if self.faults:
            raise InventoryError("\n".join(self.faults))
        return document._replace(value=self._convert(root, (), document)) if root else document

    def _decode(self, source: bytes) -> str:
        if len(source) > INVENTORY_BYTES:
            self.faults.append(f"{self.name}: the file is larger than {INVENTORY_BYTES} bytes")
            return ""
        try:
            return source.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.fault(offset_mark(source, error.start), "this byte is not UTF-8; save the file as UTF-8")
            return ""

    def _allowed(self, text: str) -> bool:
        """Looks at the events before anything is built, so that nothing hostile is."""
        depth = 0
        for count, node in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
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

    def _convert(self, node: yaml.Node, path: NodePath, document: Document) -> Any:
        document.nodes[path] = node
        if isinstance(node, yaml.ScalarNode):
            return node.value
        if isinstance(node, yaml.SequenceNode):
            return [self._convert(item, (*path, index), document) for index, item in enumerate(node.value)]
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                self.fault(key.start_mark, "a key must be plain text; merge keys are not allowed")
            elif key.value in mapping:
                self.fault(key.start_mark, "this key stands here twice")
            else:
                where = (*path, key.value)
                document.keys[where] = key
                mapping[key.value] = self._convert(value, where, document)
        return mapping


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
    def check(text: str) -> str:
        if len(text) > longest or not re.fullmatch(pattern, text):
            raise ValueError(message)
        return text
    return AfterValidator(check)


def port_of(listen: str) -> str:
    """`listen` itself, when its port is one; raises ValueError."""
    if listen != "off" and int(listen.rpartition(":")[2]) > LAST_PORT:
        raise ValueError(f"the port must be at most {LAST_PORT}")
    return listen


def expanded(path: str | Path) -> Path:
    """The path with ~ replaced by the home folder; raises ValueError."""
    try:
        if "\0" not in str(path):
            return Path(path).expanduser()
    except RuntimeError:
        pass
    raise ValueError("must be a path; its home folder must exist")


def scalar_limit(value: object) -> object:
    """`90` is short for `{fail: 90}`."""
    return {"fail": value} if isinstance(value, (str, int, float)) else value


Seconds = Annotated[float, Field(ge=1, le=604_800, allow_inf_nan=False)]
Days = Annotated[float, Field(ge=0.1, le=3660, allow_inf_nan=False)]
Percent = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)]
Times = Annotated[int, Field(ge=1, le=1000)]
Secret = Annotated[SecretStr, Field(min_length=1, max_length=8 * SECRET_LENGTH)]
TextLine = Annotated[str, matching(r"[^\x00-\x1f\x7f]+", "must be one line of text and not empty")]
Name = Annotated[str, matching(r"(?!\.\.?$)[^\s/\\\x00-\x1f\x7f]+( [^\s/\\\x00-\x1f\x7f]+)*",
                               f"must be 1 to {NAME_CHARS} characters without slashes", NAME_CHARS)]
HOSTNAME = re.compile(r"(?!-|\.\.?$)[\w.:%-]{1,253}")
Hostname = Annotated[str, matching(HOSTNAME.pattern, "must be a host name or an IP address")]
ServiceName = Annotated[str, matching(r"(?!-)[\w@.:+\\ -]+", "must be the name of a service", 200)]
Fingerprint = Annotated[str, matching(r"(SHA256:)?[0-9A-Fa-f]{2}(:?[0-9A-Fa-f]{2}){31}",
                                      "must be a SHA-256 fingerprint: 64 hexadecimal digits")]
HostKey = Annotated[str, matching(r"strict|(([a-z0-9-]+) )?SHA256:[A-Za-z0-9+/]{43}=?",
                                  "must be `strict` or a fingerprint such as SHA256:… (43 characters)")]
SQLITE = "sqlite:///"
Listen = Annotated[str, matching(r"(\[[\w:.%]+\]|[\w.-]+):[0-9]{1,5}", "must be address:port or [address]:port"),
                   AfterValidator(port_of)]
FilePath = Annotated[Path, AfterValidator(expanded)]
Networks = tuple[Annotated[str, AfterValidator(network_of)], ...]
Workers = Annotated[str, matching(r"auto|[1-9]|[1-5][0-9]|6[0-4]", "must be auto or a number from 1 to 64 "
                                  "(serving in the main process, 0, is gone: write 1)")]
ConsoleListen = Annotated[str, matching(r"off|(\[[\w:.%]+\]|[\w.-]+):[0-9]{1,5}",
                                        "must be address:port, [address]:port or off"), AfterValidator(port_of)]
AppName = Annotated[str, matching(r"[\w.]+:[\w.]+", "must be module:callable")]
SqliteUrl = Annotated[str, matching(r"sqlite:///[^?]+", "must be sqlite:///path"),
                      AfterValidator(lambda url: SQLITE + str(expanded(url.removeprefix(SQLITE))))]


class Limit(Settings):
    """A reading above `warn` makes a resource degraded, above `fail` unhealthy."""

    warn: Percent | None = None
    fail: Percent | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Limit:
        if self.warn is None and self.fail is None:
            raise ValueError("needs warn, fail or both")
        if self.warn is not None and self.fail is not None and self.warn >= self.fail:
            raise ValueError("warn must be below fail")
        return self


def sqlite_path(url: str, folder: Path) -> Path:
    """The file of a sqlite:/// URL; a relative one is relative to `folder`."""
    return folder / Path(url.removeprefix(SQLITE)).expanduser()


class LoadLimit(Limit):
    """A limit that is no percentage: processes waiting per CPU."""

    warn: Positive | None = None
    fail: Positive | None = None


PercentLimit = Annotated[Limit, BeforeValidator(scalar_limit, json_schema_input_type=Limit | Percent)]


class Limits(Settings):
    """Limits by metric; a metric without one is shown and never decides."""

    cpu_percent: PercentLimit | None = None
    memory_percent: PercentLimit | None = None
    swap_percent: PercentLimit | None = None
    disk_percent: PercentLimit | None = None
    load_per_cpu: Annotated[
        LoadLimit, BeforeValidator(scalar_limit, json_schema_input_type=LoadLimit | Positive)] | None = None

    def by_metric(self) -> dict[str, Limit]:
        return {name: limit for name, limit in self if limit is not None}


class Check(Settings):
    """A command of the user's own: exit status 0 is good."""

    name: Name
    command: Annotated[str, Field(min_length=1, max_length=4096)]
    timeout: Seconds = 5.0      # seconds


class Retention(Settings):
    """How long history is kept."""

    raw: Days = 2.0         # days of a row per poll
    averages: Days = 90.0   # days of 15-minute averages, minima and maxima
    events: Days = 365.0    # days of transitions and changes


class ServiceSettings(Settings):
    """The `service` part of the inventory."""

    listen: Listen = "127.0.0.1:8080"                   # of the application
    console: ConsoleListen = "127.0.0.1:8081"                 # of pages, API and metrics; off: there are none
    operators: Networks = ("127.0.0.0/8", "::1/128")    # networks that the console answers
    trusted_proxy: Networks = ()                        # networks whose X-Forwarded-* headers are believed
    workers: Workers = "auto"                           # serving processes
    app: AppName | None = None                          # None = the built-in page
    threads: Annotated[int, Field(ge=0, le=1000)] = 8   # pool threads for `app`; 0 = on the loop
    queue: Annotated[int, Field(ge=1, le=10_000)] = 64  # requests that wait for a pool thread of a worker
    body_limit: Annotated[int, Field(ge=0, le=1 << 40)] = 1 << 20   # bytes of a request's body
    send_buffer: Annotated[int, Field(ge=1 << 20, le=1 << 40)] = 64 << 20   # bytes of answers that wait in a worker
    drain: Annotated[float, Field(ge=0, le=3600)] = 7.5     # seconds that an end waits for requests in flight
    access_log: FilePath | None = None                  # a line per request
    metrics_token_file: FilePath | None = None          # its bearer sees resources in /-/metrics
    retention: Retention = Retention()
    database: SqliteUrl = "sqlite:///healthchecker.db"
    keys: FilePath = Path("keys")
    known_hosts: FilePath = Path("~/.ssh/known_hosts")
    log_file: FilePath | None = None

    @property
    def app_threads(self) -> int:
        """Pool threads for the application; the built-in page needs none."""
        return self.threads if self.app else 0

    @property
    def worker_count(self) -> int:
        """Worker processes: as many as told, or one per usable CPU, WORKERS_MAX at most."""
        if self.workers != "auto":
            return int(self.workers)
        usable = os.cpu_count() or 1
        if sys.platform == "linux":
            usable = len(os.sched_getaffinity(0))
        return min(usable, WORKERS_MAX)


SECRETS = ("password", "key_passphrase")  # what is sealed
FILES = ("key_file", "ca_file", "certificate_file")  # read at each poll
CREDENTIALS = ("password", "password_env", "password_file", "key_file")
PASSPHRASES = ("key_passphrase", "key_passphrase_env", "key_passphrase_file")
ONLY_REMOTE = frozenset({"port", "username", "host_key", *CREDENTIALS, *PASSPHRASES})
ONLY_WINDOWS = frozenset({
    "tls", "auth", "ca_file", "certificate_file", "certificate_fingerprint", "configuration_name"})
ONLY_SIMULATED = frozenset({"mean_healthy", "mean_unhealthy", "seed"})
HOSTLESS = (Platform.LOCAL, Platform.SIMULATED)
FOREIGN = {Platform.LOCAL: ONLY_REMOTE | ONLY_WINDOWS | ONLY_SIMULATED, Platform.SIMULATED: ONLY_REMOTE | ONLY_WINDOWS,
           Platform.WINDOWS: ONLY_SIMULATED | {"host_key"}}


def foreign_fields(platform: str) -> frozenset[str]:
    """Settings that have no meaning on a platform."""
    return FOREIGN.get(cast(Platform, platform), ONLY_SIMULATED | ONLY_WINDOWS)


PLACEHOLDERS = {"name": "any", "hostname": "any", "username": "any"}     # to look at the defaults alone


def conflicts(given: Container[str], platform: object) -> list[str]:
    """What is wrong with a set of settings by their mere presence."""
    faults = []
    for group in (CREDENTIALS, PASSPHRASES):
        if sum(name in given for name in group) > 1:
            faults.append(f"use one of {', '.join(group)}")
    if any(name in given for name in PASSPHRASES) and "key_file" not in given:
        faults.append("key_passphrase needs key_file")
    if platform in SSH_PLATFORMS and "username" not in given:
        faults.append("username is missing")
    return faults


class ResourceSettings(Settings):
    """One resource; every default and bound of the inventory stands here."""

    name: Name
    hostname: Hostname
    platform: Annotated[Platform, BeforeValidator(
        lambda v: v if v in SELECTABLE else "", json_schema_input_type=Literal[SELECTABLE])] = Platform.UNIX
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
    tls: bool = True                    # windows only, like the next five
    auth: Literal["negotiate", "ntlm", "kerberos", "basic", "certificate", "credssp"] = "negotiate"
    ca_file: FilePath | None = None
    certificate_file: FilePath | None = None
    certificate_fingerprint: Fingerprint | None = None
    configuration_name: TextLine = "Microsoft.PowerShell"
    interval: Seconds = 60.0            # seconds
    timeout: Seconds = 10.0             # seconds, the whole poll
    retry_interval: Seconds = 5.0       # seconds, while undecided
    rise: Times = 2
    fall: Times = 2
    critical: bool = True               # False: shown, never closes the gate
    tags: list[TextLine] = []
    limits: Limits = Limits()
    services: list[ServiceName] = []
    checks: list[Check] = []
    mean_healthy: Positive = 300.0          # seconds, simulated only
    mean_unhealthy: Positive = 30.0         # seconds, simulated only
    seed: int | None = None             # simulated only

    @model_validator(mode="after")
    def _consistent(self) -> ResourceSettings:
        names = [check.name for check in self.checks]
        faults = conflicts({name for name, value in self if value is not None}, self.platform)
        if self.platform is Platform.WINDOWS:
            faults += self._windows_faults()
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

    @property
    def connect_port(self) -> int:
        """`port`, or the registered one of the protocol."""
        return self.port or (WINRM_PORTS[self.tls] if self.platform is Platform.WINDOWS else SSH_PORT)

    @property
    def ttl(self) -> float:
        """Seconds for which a report counts: two intervals, a poll and some grace."""
        return 2 * self.interval + self.timeout + LEASE_GRACE


@dataclass(frozen=True)
class Entry:
    """A resource of the inventory; `password` and `passphrase` are plain or sealed, None keeps the stored one."""

    settings: ResourceSettings
    password: SecretStr | None
    passphrase: SecretStr | None
    where: str      # inventory.yaml:line:column


@dataclass(frozen=True)
class Inventory:
    """What a valid inventory.yaml says."""

    path: Path
    service: ServiceSettings
    entries: list[Entry]

    def without_secrets(self) -> Inventory:
        """For processes that talk to strangers."""
        return replace(self, entries=[Entry(entry.settings.model_copy(update=dict.fromkeys(SECRETS)), None, None,
                                            entry.where) for entry in self.entries])


def model_at(model: type[Settings], loc: Sequence[str | int]) -> type[Settings]:
    """The model whose field an `extra_forbidden` error names: follows the fields along `loc`."""
    named: dict[str, type[Settings]] = {"limits": Limits, "checks": Check, "load_per_cpu": LoadLimit}
    for part in loc[:-1]:
        if isinstance(part, str):
            model = named.get(part, Limit)
    return model


WORDING = {"missing": "is missing", "extra_forbidden": "is unknown", "path_type": "must be a path",
           "tuple_type": "must be a list", "model_type": "must be a mapping (key: value)"}


def message_of(item: dict[str, Any]) -> str:
    """pydantic's text without values and in our wording."""
    if item["loc"] and item["loc"][-1] == "platform":
        return f"must be one of {', '.join(SELECTABLE)}"
    if item["type"] in WORDING:
        return WORDING[item["type"]]
    text = re.sub(r"^Value should have (.*) items? after validation.*", r"must have \1 characters", str(item["msg"]))
    return re.sub(r"^(Value error, |Input should be |String should )", lambda m: "" if m[1][0] == "V" else "must be "
                  if m[1][0] == "I" else "must ", text).replace("SecretStr", "text")


class InventoryLoader:
    """Turns a Document into an Inventory and gathers all faults on the way."""

    def __init__(self, path: Path, document: Document) -> None:
        self.path, self.document = path, document
        self.faults = dict.fromkeys(document.faults)    # a dict keeps the order and drops repetitions

    def load(self) -> Inventory:
        top = {} if self.document.value is None else self.document.value
        if not self._is_mapping((), top, ("service", "defaults", "resources")):
            raise InventoryError("\n".join(self.faults))
        if "resources" not in top and not self.faults:
            self.fault((), "resources is missing; write `resources: []` to watch nothing")
        service = self._validate(ServiceSettings, top.get("service", {}), lambda loc: ("service", *loc))
        if isinstance(service, ServiceSettings):
            self._tell_apart(service)
        defaults = top.get("defaults", {})
        if not self._is_mapping(("defaults",), defaults, ResourceSettings.model_fields):
            defaults = {}
        self._validate(ResourceSettings, PLACEHOLDERS | defaults, lambda loc: ("defaults", *loc))
        items = top.get("resources", [])
        if not isinstance(items, list):
            self.fault(("resources",), "must be a list")
            items = []
        entries = [self._entry(index, own, defaults) for index, own in enumerate(items)]
        self._unique(items, defaults)
        if self.faults or not isinstance(service, ServiceSettings):
            raise InventoryError("\n".join(self.faults))
        return Inventory(self.path, service, [entry for entry in entries if entry])

    def _tell_apart(self, service: ServiceSettings) -> None:
        """A log that is written into another file of the service would destroy it."""
        files = {self.path: "the inventory", sqlite_path(service.database, self.path.parent): "service.database"}
        for name in ("metrics_token_file", "log_file", "access_log"):
            if getattr(service, name):
                path = self.resolve(getattr(service, name))
                if path in files:
                    self.fault(("service", name), f"is {files[path]}, too; name another file")
                files[path] = f"service.{name}"

    def parse(self, model: type[Settings], raw: Mapping[str, Any]) -> Settings:
        """Raises ValidationError."""
        return model.model_validate(raw)

    def fault(self, path: NodePath, message: str, *, key: bool = False) -> None:
        parts = path[:-1] if key else path      # an unknown key may be a slipped password: it is not shown
        shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
        position = self.document.position(path, key=key)
        self.faults[f"{self.path.name}:{position}: {shown or 'inventory'}: {message}"] = None

    def resolve(self, path: str | Path) -> Path:
        """Relative paths are relative to the inventory's folder. Raises ValueError."""
        return self.path.parent / expanded(path)

    def _is_mapping(self, path: NodePath, value: object, known: Iterable[str] | None = None) -> bool:
        """Whether `value` is one; with `known`, other keys are faults."""
        if not isinstance(value, dict):
            self.fault(path, "must be a mapping (key: value)")
            return False
        for key in value if known is not None else ():
            if key not in (known or ()):
                self._unknown((*path, key), known or ())
        return True

    def _unknown(self, path: NodePath, known: Iterable[str]) -> None:
        near = difflib.get_close_matches(str(path[-1]), list(known), 1)
        self.fault(path, f"unknown setting; did you mean {near[0]}?" if near
                   else f"unknown setting; known are {', '.join(known)}", key=True)

    def _validate(self, model: type[Settings], raw: object, locate: Callable[[NodePath], NodePath]) -> Settings | None:
        if not self._is_mapping(locate(()), raw):
            return None
        try:
            return self.parse(model, cast("dict[str, Any]", raw))
        except ValidationError as error:
            for item in error.errors(include_url=False, include_input=False):
                path = locate(tuple(item["loc"]))
                if item["type"] == "extra_forbidden":
                    self._unknown(path, model_at(model, item["loc"]).model_fields)
                else:
                    self.fault(path, message_of(cast("dict[str, Any]", item)))
            return None

    def _entry(self, index: int, own: Any, defaults: dict[str, Any]) -> Entry | None:
        here: NodePath = ("resources", index)
        if not self._is_mapping(here, own):
            return None
        raw = self._merged(here, own, defaults)

        def locate(loc: NodePath) -> NodePath:
            inherited = bool(loc) and loc[0] not in own and loc[0] in defaults
            return (("defaults",) if inherited else here) + loc

        secrets_ = [self._secret(raw, kind, locate) for kind in SECRETS]
        for name in FILES:
            with contextlib.suppress(ValueError):       # the model reports that
                if isinstance(raw.get(name), str) and not os.path.isfile(self.resolve(raw[name])):
                    self.fault(locate((name,)), "there is no such file")
        settings = self._validate(ResourceSettings, raw, locate)
        if not isinstance(settings, ResourceSettings):
            for message in conflicts(raw, str(raw.get("platform", Platform.UNIX.value))):
                self.fault(here, message)
            return None
        settings = settings.model_copy(update={
            name: self.resolve(value) for name in ("password_file", "key_passphrase_file", *FILES)
            if (value := getattr(settings, name)) is not None})
        return Entry(settings, secrets_[0], secrets_[1], f"{self.path.name}:{self.document.position(here)}")

    def _merged(self, here: NodePath, own: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        """`own` over `defaults`; what has no meaning on the platform is a fault in `own` and skipped in `defaults`."""
        platform = str(own.get("platform", defaults.get("platform", Platform.UNIX.value)))
        foreign = foreign_fields(platform)
        for key in foreign & own.keys() if platform in SELECTABLE else ():
            self.fault((*here, key), f"{key} has no meaning with platform {platform}", key=True)
        skipped = set(foreign)
        for group in (CREDENTIALS, PASSPHRASES):
            if own.keys() & group:
                skipped |= set(group)
        raw = {key: value for key, value in defaults.items() if key not in skipped} | own
        if isinstance(own.get("limits"), dict) and isinstance(defaults.get("limits"), dict):
            raw["limits"] = defaults["limits"] | own["limits"]
        if platform in HOSTLESS:
            raw.setdefault("hostname", "localhost")
        hostname = raw.get("hostname")
        raw.setdefault("name", hostname if isinstance(hostname, str) and HOSTNAME.fullmatch(hostname) else "unnamed")
        return raw

    def _secret(self, raw: dict[str, Any], kind: str, locate: Callable[[NodePath], NodePath]) -> SecretStr | None:
        """The secret from the file itself, the environment or another file; what the model reports is passed over."""
        source = next((name for name in (kind, f"{kind}_env", f"{kind}_file") if name in raw), kind)
        if not isinstance(raw.get(source), str):
            return None
        try:
            text = self._fetch(source, raw[source])
        except ValueError:
            return None
        if text is None:
            self.fault(locate((source,)), "this file cannot be read as text")
        elif not text and source != kind:
            missing = "this environment variable is not set" if source.endswith("_env") else "this file is empty"
            self.fault(locate((source,)), missing)
        elif len(text) > SECRET_LENGTH and not text.startswith(TOKEN_PREFIX):
            self.fault(locate((source,)), f"must be at most {SECRET_LENGTH} characters")
        return SecretStr(text or "")

    def _fetch(self, source: str, text: str) -> str | None:
        """The secret that `source` stands for, None when it is no text; raises ValueError for an impossible path."""
        if source.endswith("_env"):
            text = os.environ.get(text, "")
        path = self.resolve(text) if source.endswith("_file") else None
        try:
            if path:
                if not os.path.isfile(path):
                    return None     # a pipe would be waited for
                text = path.read_text("utf-8-sig").rstrip("\r\n")
            text.encode()
        except (OSError, UnicodeError):
            return None
        return text

    def _unique(self, items: list[Any], defaults: dict[str, Any]) -> None:
        seen: dict[str, str] = {}
        for index, own in enumerate(items):
            here: NodePath = ("resources", index)
            key = "name" if isinstance(own, dict) and "name" in own else "hostname"
            name = own.get(key, defaults.get(key)) if isinstance(own, dict) else None
            first = seen.setdefault(name, self.document.position(here)) if isinstance(name, str) else ""
            if first not in ("", self.document.position(here)):
                self.fault((*here, key), f"the resource at {self.path.name}:{first} has this name; names are unique")


def read_document(path: Path) -> Document:
    """The strictly read file; raises InventoryError."""
    try:
        with open(path, "rb") as file:
            source = file.read(INVENTORY_BYTES + 1)
    except IsADirectoryError:
        raise InventoryError(f"{path.name}: is a directory, not a file") from None
    except OSError as error:
        raise InventoryError(f"{path.name}: cannot be read: {error.strerror}") from error
    return StrictReader(path.name).read(source)


def load_inventory(path: Path) -> Inventory:
    """Reads and validates; raises InventoryError, a line per fault: `inventory.yaml:12:7: resources[2].port: …`."""
    return InventoryLoader(path, read_document(path)).load()


# === Vault ===================================================================
RSA_BITS = 3072                 # bits, equal in strength to AES-128 (NIST SP 800-57)
OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"HealthChecker/HC1")
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def length_prefixed(*parts: str) -> bytes:
    """The parts in one byte string that no other parts give."""
    return b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)


def restrict(path: Path) -> None:
    """Windows knows no file mode: its owner, SYSTEM and the administrators keep access, inherited rights go."""
    if sys.platform == "win32":
        done = subprocess.run(["icacls", str(path), "/inheritance:r", "/grant:r", "*S-1-3-4:F", "*S-1-5-18:F",
                               "*S-1-5-32-544:F"], capture_output=True, check=False)
        if done.returncode:
            raise OSError(errno.EACCES, "icacls failed to restrict it")


def create_private(path: Path, content: bytes) -> None:
    """Creates a file that only its owner can read; the whole file or none, and never over another one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            restrict(temporary)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Vault:
    """Seals secrets: AES-256-GCM with a fresh key per secret, that key under RSA-OAEP, bound to its row.

    A token reads `HC1.<key id>.<wrapped key>.<nonce>.<ciphertext>`. `private.pem` seals and opens; `next.pem`
    exists only during `keys rotate` and then seals, while the old key still opens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keys: dict[str, rsa.RSAPrivateKey] = {}
        self.key_id = ""    # first 16 hex digits of the SHA-256 of the public key (DER) that seals; empty without keys
        for path in (folder / "private.pem", folder / "next.pem"):
            try:
                path.stat()
                self.key_id = self._load(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise SecretError(f"{path} cannot be read: {error.strerror}") from error

    def _load(self, path: Path) -> str:
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SecretError(f"{path} cannot be read as a private key; put the right one back") from error
        if not isinstance(key, rsa.RSAPrivateKey):
            raise SecretError(f"{path} is not an RSA key; put the right one back")
        if sys.platform != "win32" and path.stat().st_mode & 0o077:
            log.warning("%s can be read by other users; run: chmod 600 %s", path, path)
        name = hashlib.sha256(key.public_key().public_bytes(serialization.Encoding.DER, SPKI)).hexdigest()[:16]
        self._keys[name] = key
        return name

    def create(self, name: str = "private.pem") -> None:
        """Makes an RSA key pair; an existing private key is never overwritten. Raises SecretError."""
        key = rsa.generate_private_key(65537, RSA_BITS)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            create_private(self.folder / name, key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        except OSError as error:
            raise SecretError(f"keys cannot be written to {self.folder}: {error.strerror}") from error
        self.key_id = self._load(self.folder / name)
        self.publish()

    def publish(self) -> None:
        """Makes public.pem follow private.pem."""
        path = self.folder / "public.pem"
        public = self._keys[next(iter(self._keys))].public_key().public_bytes(serialization.Encoding.PEM, SPKI)
        try:
            if not path.exists() or path.read_bytes() != public:
                path.write_bytes(public)
        except OSError as error:
            raise SecretError(f"{path} cannot be written: {error.strerror}") from error

    def retire(self) -> None:
        """Ends a rotation: `next.pem` becomes `private.pem`."""
        try:
            os.replace(self.folder / "next.pem", self.folder / "private.pem")
        except OSError as error:
            raise SecretError(f"{self.folder} cannot be changed: {error.strerror}; run it again") from error
        self._keys = {self.key_id: self._keys[self.key_id]}
        self.publish()

    def seal(self, secret: str, *row: str) -> str:
        """The token for `secret`, which opens only with the same `row` (what it is, name, hostname, username)."""
        key, nonce = os.urandom(32), os.urandom(12)
        wrapped = self._keys[self.key_id].public_key().encrypt(key, OAEP)
        bound = length_prefixed("HC1", self.key_id, *row)
        sealed = AESGCM(key).encrypt(nonce, secret.encode(), bound)
        return ".".join(("HC1", self.key_id, b64(wrapped), b64(nonce), b64(sealed)))

    def open(self, token: str, *row: str) -> str:
        """The secret of a token; raises SecretError, which never quotes it."""
        parts = token.split(".")
        if len(parts) != TOKEN_PARTS or parts[0] != "HC1":
            raise SecretError("a sealed secret is damaged; write the password again")
        self.require(parts[1])
        try:
            key = self._keys[parts[1]].decrypt(unb64(parts[2]), OAEP)
            bound = length_prefixed("HC1", parts[1], *row)
            return AESGCM(key).decrypt(unb64(parts[3]), unb64(parts[4]), bound).decode()
        except (ValueError, InvalidTag, binascii.Error) as error:
            raise SecretError("a sealed secret belongs to another name, hostname or username, or was altered; "
                              "write the password again") from error

    def require(self, key_id: str) -> None:
        """Raises SecretError unless the private key `key_id` is here; shows the id only when it is one."""
        if not re.fullmatch("[0-9a-f]{16}", key_id):
            raise SecretError("a sealed secret is damaged; write the password again")
        if key_id not in self._keys:
            raise SecretError(f"secrets are sealed with key {key_id}, but {self.folder} holds "
                              f"{', '.join(self._keys) or 'no private key'}; put private.pem back")


def hash_password(password: str, salt: bytes, rounds: int = PBKDF2_ROUNDS) -> bytes:
    """PBKDF2-HMAC-SHA512 (RFC 8018), 64 bytes."""
    return hashlib.pbkdf2_hmac("sha512", password.encode(), salt, rounds)


# === Storage =================================================================
SALT_BYTES = 16                 # bytes, NIST SP 800-132
BUSY_TIMEOUT = 5.0              # seconds a writer waits for another one


class Base(DeclarativeBase):
    """Typed declarative base of all tables."""


db = SQLAlchemy(model_class=Base, session_options={"expire_on_commit": False})
SCHEMA = 2                      # PRAGMA user_version of a database that this program writes
APPLICATION = 0x48434B31        # PRAGMA application_id: "HCK1"


class User(Base):
    """An account of HealthChecker's own pages."""

    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    password_hash: Mapped[bytes]
    salt: Mapped[bytes]
    rounds: Mapped[int] = mapped_column(default=PBKDF2_ROUNDS)
    role: Mapped[str] = mapped_column(default="admin")      # admin: everything; viewer: looks
    initial: Mapped[bool] = mapped_column(default=False)    # the password is the documented one still

    @classmethod
    def create(cls, name: str, password: str, role: str = "admin", *, initial: bool = False) -> User:
        salt = secrets.token_bytes(SALT_BYTES)
        return cls(name=name, salt=salt, rounds=PBKDF2_ROUNDS, password_hash=hash_password(password, salt),
                   role=role, initial=initial)

    def verify(self, password: str) -> bool:
        """Constant-time comparison; an overlong password is wrong without being hashed."""
        return len(password) <= SECRET_LENGTH and hmac.compare_digest(
            self.password_hash, hash_password(password, self.salt, self.rounds))

    def take_password(self, other: User) -> None:
        """Takes over what stands for the password of `other`, which was chosen and is not the documented one."""
        self.salt, self.rounds, self.password_hash, self.initial = other.salt, other.rounds, other.password_hash, False

    @property
    def stamp(self) -> str:
        """Changes with password and role: what proved a login before does not any more."""
        return hashlib.sha256(self.password_hash + self.salt + self.role.encode()).hexdigest()


class Resource(Base):
    """A machine that is watched. Secrets are sealed tokens; `settings` is JSON of everything without its own column."""

    __tablename__ = "resource"
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
    origin: Mapped[str] = mapped_column(default="inventory")
    host_key: Mapped[str | None]    # trusted on first use or by `trust`: "ssh-ed25519 SHA256:…"
    maintenance: Mapped[float] = mapped_column(default=0.0)         # Unix time until which it does not count
    maintenance_reason: Mapped[str] = mapped_column(default="")

    COLUMNS: ClassVar = ("name", "hostname", "platform", "port", "username", "interval")

    @property
    def parsed_settings(self) -> ResourceSettings:
        """The settings as the inventory states them, without secrets; raises StorageError."""
        try:
            columns = {name: getattr(self, name) for name in self.COLUMNS}
            return ResourceSettings.model_validate(json.loads(self.settings) | columns)
        except (ValueError, TypeError) as error:
            raise StorageError(f"the row of resource {self.name} cannot be read; restore the database") from error

    def take_settings(self, settings: ResourceSettings) -> bool:
        """Takes the settings over; says whether anything changed."""
        values = settings.model_dump(mode="json", exclude={"password", "key_passphrase"})
        columns = {name: values.pop(name) for name in self.COLUMNS} | {"port": settings.connect_port}
        columns["settings"] = json.dumps(values, sort_keys=True)
        changed = any(getattr(self, name) != value for name, value in columns.items())
        if (self.hostname, self.port) != (columns["hostname"], columns["port"]):
            self.host_key = None
        for name, value in columns.items():
            setattr(self, name, value)
        return changed

    def digest(self, *columns: str) -> str:
        """Changes with the columns' values: what was stored for others does not count."""
        return hashlib.sha256(length_prefixed(*(str(getattr(self, name)) for name in columns))).hexdigest()

    @property
    def settings_digest(self) -> str:
        """A digest of every setting and secret."""
        return self.digest(*self.COLUMNS, "settings", "password", "key_passphrase")

    @property
    def credential(self) -> str:
        """A digest of the account and its sealed secret."""
        return self.digest("hostname", "username", "password", "key_passphrase")


def binding(kind: str, row: Resource | ResourceSettings) -> tuple[str, str, str, str]:
    """What a secret belongs to: moved anywhere else, it does not open."""
    return kind, row.name, row.hostname, row.username or ""


class Status(Base):
    """The last standing of a resource, kept for the next start."""

    __tablename__ = "status"
    resource_id: Mapped[int] = mapped_column(ForeignKey("resource.id", ondelete="CASCADE"), primary_key=True)
    settings_digest: Mapped[str] = mapped_column("configured")     # of that time; so is the next
    credential: Mapped[str]
    state: Mapped[str]
    cause: Mapped[str]
    reason: Mapped[str]
    since: Mapped[float]        # Unix time of the last transition
    polled: Mapped[float]       # Unix time of the last result
    good: Mapped[int]           # good results in a row
    bad: Mapped[int]            # bad results in a row
    seconds: Mapped[float]      # duration of the last poll
    sample: Mapped[str]         # JSON of what the last poll read, `null` when it read nothing
    packed: Mapped[bytes] = mapped_column(default=b"")      # the same as in SampleRow: see `readings`
    strip: Mapped[str] = mapped_column(default="")      # the last STRIP polls, oldest first: a character of POLLS each


class Event(Base):
    """A transition or a change of configuration: who, what, when, from where."""

    __tablename__ = "event"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float] = mapped_column(index=True)       # Unix time
    kind: Mapped[str]           # gate | state | change | login
    resource: Mapped[str]       # its name, empty for none; outlives the resource
    text: Mapped[str]           # one line
    actor: Mapped[str]          # name of the user, empty for the service itself
    address: Mapped[str]        # the client's, empty for the service itself


class Ended(Base):
    """A session that was logged out before its time."""

    __tablename__ = "ended"
    ticket: Mapped[str] = mapped_column(primary_key=True)
    until: Mapped[float]        # Unix time at which it would have ended anyway


class Setting(Base):
    """What the service remembers about itself; `revision` rises with every change of configuration."""

    __tablename__ = "setting"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]


# What brings a database of schema 1, 2, … to the next; the tables that are missing are made afterwards.
MIGRATIONS = (("ALTER TABLE user ADD COLUMN role VARCHAR NOT NULL DEFAULT 'admin'",
               "ALTER TABLE user ADD COLUMN initial BOOLEAN NOT NULL DEFAULT 0",
               "UPDATE user SET initial = 1",      # there was no way to change a password
               "ALTER TABLE resource ADD COLUMN maintenance FLOAT NOT NULL DEFAULT 0",
               "ALTER TABLE resource ADD COLUMN maintenance_reason VARCHAR NOT NULL DEFAULT ''",
               "ALTER TABLE status ADD COLUMN seconds FLOAT NOT NULL DEFAULT 0",
               "ALTER TABLE status ADD COLUMN sample VARCHAR NOT NULL DEFAULT 'null'",
               "ALTER TABLE status ADD COLUMN packed BLOB NOT NULL DEFAULT x''",
               "ALTER TABLE status ADD COLUMN strip VARCHAR NOT NULL DEFAULT ''"),)


def migrate(session: Session) -> None:
    """Brings the tables to SCHEMA, within the caller's transaction."""
    version = session.scalar(sqlalchemy.text("PRAGMA user_version")) or SCHEMA
    for statements in MIGRATIONS[version - 1:]:
        for statement in statements:
            session.execute(sqlalchemy.text(statement))
    Base.metadata.create_all(session.connection())
    session.execute(sqlalchemy.text(f"PRAGMA user_version = {SCHEMA}"))
    session.execute(sqlalchemy.text(f"PRAGMA application_id = {APPLICATION}"))


EMPTY = "is empty"


def database_fault(connection: sqlite3.Connection) -> str:
    """What keeps a SQLite database from being ours and sound; empty for nothing, EMPTY before its first transaction."""
    def pragma(name: str) -> Any:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]

    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return EMPTY
    if pragma("application_id") != APPLICATION:
        return "belongs to another program; set service.database"
    if pragma("user_version") > SCHEMA:
        return "was written by a newer HealthChecker; update this one"
    lost = pragma("user_version") == SCHEMA and [
        table.name for table in Base.metadata.sorted_tables if {column.name for column in table.columns}
        - {row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")}]
    if lost or pragma("quick_check(1)") != "ok":
        return "is damaged; restore it from a backup or move it away"
    return ""


def examine(path: Path, mode: str) -> str:
    """`database_fault` of a file; a transaction that a crash cut short is rolled back first, which needs to write."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as connection:
            return database_fault(connection)
    except sqlite3.OperationalError as error:
        if mode == "rw" or "readonly" not in str(error):
            raise
        return examine(path, "rw")


def inspect_database(path: Path) -> bool:
    """Whether a usable database of ours is there; reads only. Raises StorageError for anything else at `path`."""
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "its folder is a file")
        if not path.exists() or (path.is_file() and path.stat().st_size == 0):
            return False
        with open(path, "rb") as file:
            known = file.read(16) == b"SQLite format 3\0"
        fault = examine(path, "ro") if known else "is no SQLite database; set service.database"
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"database {path}: {error}; restore it from a backup or set service.database") from error
    if fault not in ("", EMPTY):
        raise StorageError(f"database {path} {fault}")
    return not fault


def prepare_connection(connection: Any, _record: object) -> None:
    connection.isolation_level = None       # SQLAlchemy's BEGIN is ours, see begin_transaction
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def begin_transaction(connection: sqlalchemy.Connection) -> None:
    immediate = connection.get_execution_options().get("immediate")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


class Store:
    """The database: one way in for the service, its workers and the command line."""

    def __init__(self, path: Path) -> None:
        """Opens the database at `path`, creating it when absent. Raises StorageError."""
        self.path = path
        self.created = not inspect_database(path)
        self.app = flask.Flask("healthchecker")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = sqlalchemy.URL.create("sqlite", database=str(path.absolute()))
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
            "connect_args": {"timeout": BUSY_TIMEOUT}, "hide_parameters": True}
        db.init_app(self.app)
        try:
            if self.created:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with self.app.app_context():
                event.listen(db.engine, "connect", prepare_connection)
                event.listen(db.engine, "begin", begin_transaction)
            with self.reading() as session:
                outdated = session.scalar(sqlalchemy.text("PRAGMA user_version")) != SCHEMA
            if outdated:
                with self.writing() as session:
                    migrate(session)
        except (OSError, sqlalchemy.exc.SQLAlchemyError) as error:
            reason = one_line(str(getattr(error, "orig", error)))
            raise StorageError(f"database {path} cannot be opened: {reason}") from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A session for reading; it sees one state of the database."""
        with self.app.app_context():
            yield cast(Session, db.session())

    @contextlib.contextmanager
    def writing(self) -> Iterator[Session]:
        """A session in BEGIN IMMEDIATE (a deferred one that reads first fails when another writes); all or nothing."""
        with self.app.app_context():
            session = cast(Session, db.session())
            session.connection(execution_options={"immediate": True})
            yield session
            session.commit()

    def close(self) -> None:
        with self.app.app_context():
            db.engine.dispose()


def lock_database(path: Path) -> sqlite3.Connection:
    """Makes this process the only service on the database until it ends, however it ends. Raises StorageError.

    SQLite's own lock on a file beside the database: the same on Windows and UNIX, and the system drops it.
    """
    connection = None
    try:
        connection = sqlite3.connect(path.with_name(path.name + ".lock"), timeout=0, check_same_thread=False,
                                     isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        if connection is None or "locked" not in str(error):
            raise StorageError(f"database {path} cannot be used: {error}; set service.database") from error
        connection.close()
        raise StorageError(f"another HealthChecker is using database {path}; stop that one first") from error
    return connection


def revision(session: Session) -> int:
    row = session.get(Setting, "revision")
    return row.value if row else 0


def revise(session: Session) -> None:
    """Raises the revision, so that a serving process takes the change up within a second."""
    session.merge(Setting(name="revision", value=revision(session) + 1))


class Changes(NamedTuple):
    """Names of resources by what an import does to them."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    kept: list[str]

    def __str__(self) -> str:
        counts = ", ".join(f"{len(names)} {what}" for what, names in zip(self._fields, self, strict=True))
        named = [f"{what}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
                 for what, names in zip(self._fields[:3], self[:3], strict=True) if names]
        return "; ".join([counts, *named])


def store_secret(row: Resource, kind: str, secret: str, vault: Vault) -> bool:
    """Keeps the stored token while it holds the same secret; says whether it was replaced."""
    stored = getattr(row, kind)
    bound = binding(kind, row)
    plain = vault.open(secret, *bound) if secret.startswith(TOKEN_PREFIX) else secret
    if stored is not None:
        with contextlib.suppress(SecretError):
            if hmac.compare_digest(vault.open(stored, *bound).encode(), plain.encode()):
                return False
    setattr(row, kind, secret if secret != plain else vault.seal(plain, *bound))
    return True


def update_row(row: Resource, entry: Entry, vault: Vault) -> bool:
    """Brings one row to what its entry says; says whether anything changed."""
    settings = entry.settings
    moved = (row.hostname, row.username) != (settings.hostname, settings.username)
    changed = row.take_settings(settings)
    wanted = {"password": entry.password, "key_passphrase": entry.passphrase}
    if settings.platform not in REMOTE_PLATFORMS or settings.key_file is not None:
        row.password = None
    if settings.key_file is None:
        row.key_passphrase = None
    for kind, secret in wanted.items():
        stored = getattr(row, kind)
        if secret is None and stored is not None and moved:
            raise SecretError("hostname or username changed: write the password again")
        if secret is not None:
            changed |= store_secret(row, kind, secret.get_secret_value(), vault)
    if settings.platform in REMOTE_PLATFORMS and settings.key_file is None and row.password is None:
        raise InventoryError("password, password_env, password_file or key_file is missing")
    return changed


def import_entry(session: Session, row: Resource | None, entry: Entry, vault: Vault) -> str:
    """Adds or updates the row of one entry; says which field of Changes it belongs to."""
    if row is None:
        row = Resource(name=entry.settings.name, origin="inventory")
        update_row(row, entry, vault)
        session.add(row)
        return "added"
    if row.origin != "inventory":
        raise InventoryError("was added through the API already; choose another name")
    return "changed" if update_row(row, entry, vault) else "kept"


def import_inventory(session: Session, inventory: Inventory, vault: Vault) -> Changes:
    """Makes the inventory's rows follow the file, within the caller's transaction.

    Raises SecretError, a line per fault, where a password has to be written again, and InventoryError for a name
    that was added through the API or a new resource without a password.
    """
    rows = {row.name: row for row in session.scalars(sqlalchemy.select(Resource))}
    changes = Changes([], [], [], [])
    faults: list[HealthCheckerError] = []
    for entry in inventory.entries:
        row = rows.pop(entry.settings.name, None)
        try:
            getattr(changes, import_entry(session, row, entry, vault)).append(entry.settings.name)
        except HealthCheckerError as error:
            faults.append(type(error)(f"{entry.where}: {entry.settings.name}: {error}"))
    if faults:
        raise type(faults[0])("\n".join(map(str, faults)))
    for name, row in rows.items():
        if row.origin == "inventory":
            session.delete(row)
            changes.removed.append(name)
    if changes.added or changes.changed or changes.removed:
        revise(session)
    return changes


def require_keys(vault: Vault, sealed: Iterable[str]) -> None:
    """Raises SecretError when a token names a key that is not there."""
    for key_id in dict.fromkeys(token.split(".")[1] for token in sealed if token.count(".") == TOKEN_PARTS - 1):
        vault.require(key_id)


def open_vault(folder: Path, sealed: Iterable[str]) -> Vault:
    """The keys in `folder`, made on first start; never while secrets are sealed with keys that are missing."""
    vault = Vault(folder)
    require_keys(vault, sealed)
    if not vault.key_id:
        vault.create()
    vault.publish()
    return vault


def sealed_tokens(session: Session | None, inventory: Inventory) -> Iterator[str]:
    """Every sealed secret of the database, if there is one, and of the file."""
    for row in session.scalars(sqlalchemy.select(Resource)) if session else ():
        yield from filter(None, (row.password, row.key_passphrase))
    for entry in inventory.entries:
        for secret in (entry.password, entry.passphrase):
            if secret is not None and secret.get_secret_value().startswith(TOKEN_PREFIX):
                yield secret.get_secret_value()


@dataclass(frozen=True)
class Target:
    """A resource as a poller needs it, secrets opened."""

    id: int
    settings: ResourceSettings
    password: SecretStr | None
    passphrase: SecretStr | None
    host_key: str | None
    settings_digest: str
    credential: str

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def key_stamp(self) -> int:
        """When key_file was changed, in nanoseconds; 0 without one. A new key is a new credential."""
        with contextlib.suppress(OSError):
            return self.settings.key_file.stat().st_mtime_ns if self.settings.key_file else 0
        return 0


def target_of(row: Resource, vault: Vault) -> Target:
    """A row with its secrets opened. Raises SecretError."""
    def opened(kind: str) -> SecretStr | None:
        try:
            return SecretStr(vault.open(getattr(row, kind), *binding(kind, row))) if getattr(row, kind) else None
        except SecretError as error:
            raise SecretError(f"{row.name}: {error}") from error

    return Target(row.id, row.parsed_settings, opened("password"), opened("key_passphrase"), row.host_key,
                  row.settings_digest, row.credential)


def load_targets(session: Session, vault: Vault) -> dict[str, Target]:
    """All resources by name."""
    return {row.name: target_of(row, vault)
            for row in session.scalars(sqlalchemy.select(Resource).order_by(Resource.id))}


# === Connections =============================================================
OUTPUT_BYTES = 1 << 20          # bytes over stdout and stderr; a poll that prints more is ended
HANDSHAKE_BYTES = 1 << 16       # bytes off the wire until the host has shown its key
READ_BYTES = 1 << 16            # bytes taken from a host at once


@dataclass(frozen=True)
class CommandResult:
    """What a script printed, stdout and stderr in one; `host_key` is a key trusted on first use in this poll."""

    output: bytes
    exit_status: int | None = None      # None: no end was seen
    expired: bool = False               # the deadline ended it
    host_key: str | None = None


class Deadline:
    """The point of the monotonic clock at which a poll ends, whatever the host does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends = time.monotonic() + seconds
        self.expired = False

    def left(self) -> float:
        """Seconds left; raises ProbeError when there are none."""
        if self.over:
            raise ProbeError("timeout", f"no answer within {self.seconds:g} s")
        return self._ends - time.monotonic()

    @property
    def over(self) -> bool:
        return self.expired or time.monotonic() >= self._ends

    @contextlib.contextmanager
    def watch(self, abort: Callable[[], object]) -> Iterator[None]:
        """Calls `abort` at the deadline while the block runs: what blocks in a library has no other way out."""
        def expire() -> None:
            self.expired = True
            abort()

        timer = threading.Timer(self.left(), expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class Connection(Protocol):
    """The way to one resource; each `run` opens a fresh connection and closes everything it opened."""

    def run(self, script: str, done: bytes, deadline: Deadline) -> CommandResult:
        """Runs `script` until it prints `done`, ends, or the deadline is there. Raises ProbeError."""


class OutputBuffer:
    """Output so far, capped at OUTPUT_BYTES; knows whether the end mark is in it."""

    def __init__(self, done: bytes) -> None:
        self.output = bytearray()
        self._done = done

    def take(self, chunk: bytes) -> bool:
        """Adds a chunk; True once the end mark was seen. Raises ProbeError above the cap."""
        start = max(0, len(self.output) - len(self._done))
        self.output += chunk
        if len(self.output) > OUTPUT_BYTES:
            raise ProbeError("protocol", f"the host sent more than {OUTPUT_BYTES} bytes")
        return self.output.find(self._done, start) >= 0


class Resolver:
    """Looks names up beside the poll, since the system's resolver has no deadline; one look-up per name at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()   # guards _pending
        self._pending: dict[tuple[str, int], concurrent.futures.Future[list[Any]]] = {}

    def resolve(self, host: str, port: int, deadline: Deadline) -> list[Any]:
        """getaddrinfo's answers; raises ProbeError."""
        try:
            if ":" in host or host.replace(".", "").isdigit():
                return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
            return self._lookup(host, port).result(deadline.left())
        except concurrent.futures.TimeoutError as error:
            raise ProbeError("timeout", f"the name {host} was not resolved within {deadline.seconds:g} s") from error
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "not a valid name"
            raise ProbeError("unreachable", f"{host} does not resolve ({reason}); check hostname and DNS") from error

    def _lookup(self, host: str, port: int) -> concurrent.futures.Future[list[Any]]:
        with self._lock:
            future = self._pending.get((host, port))
            if future is None:
                future = concurrent.futures.Future()
                threading.Thread(target=self._work, args=(host, port, future), daemon=True).start()
                self._pending[host, port] = future      # only now: without a thread nobody would take it out again
            return future

    def _work(self, host: str, port: int, future: concurrent.futures.Future[list[Any]]) -> None:
        try:
            future.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            future.set_exception(error)
        finally:
            with self._lock:
                del self._pending[host, port]


class CappedSocket(socket.socket):
    """A socket that a hostile host cannot use to fill the memory: paramiko stores a packet of any announced size."""

    received = 0
    limit = HANDSHAKE_BYTES
    first = b""     # what came first

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        chunk = super().recv(min(size, READ_BYTES), flags)
        self.first = self.first or chunk
        self.received += len(chunk)
        if self.received > self.limit:
            raise OSError(errno.EMSGSIZE, f"the host sent more than {self.limit} bytes")
        return chunk


def connect_tcp(resolver: Resolver, host: str, port: int, deadline: Deadline) -> CappedSocket:
    """A TCP connection without Nagle's delay to the first address that answers. Raises ProbeError."""
    addresses = resolver.resolve(host, port, deadline)
    fault: OSError = OSError("no address")
    for index, (family, kind, protocol, _, address) in enumerate(addresses):
        with contextlib.ExitStack() as stack:
            try:
                sock = stack.enter_context(CappedSocket(family, kind, protocol))
                sock.settimeout(deadline.left() / (len(addresses) - index))     # a dead one leaves the others a share
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address)
                stack.pop_all()
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
UNANSWERED = 3                  # logins without an outcome that count as refused
AUTH_TURN = 1.0                 # seconds between attempts with an unproven credential while one has no outcome
NOT_TRIED = "not tried: the same credential was refused before; check username and password"


class LoginGuard:
    """Keeps a wrong password from locking an account; the resources with the same credential share one guard.

    A resource that was refused waits AUTH_BACKOFF. While nobody was accepted, or since somebody was refused, logins
    go one after the other; two refused resources without an accepted one between them stop all of them, then one
    attempt per AUTH_BACKOFF is made. An accepted login shows that the credential is good and frees the others, so
    that one odd host never blinds its siblings.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turn = threading.Condition()          # guards all below, reentrant; notified when an attempt ends
        self._running = 0
        self._proven = False
        self._refused: dict[str, tuple[float, int]] = {}    # resource -> time of its last refusal, stamp of its key
        self._accepted: set[str] = set()            # resources that were let in
        self._unanswered: dict[str, int] = {}       # logins without an outcome in a row, of those that never were
        self._suspects: set[str] = set()            # refused for the first time since the last accepted login
        self._last = -math.inf                      # time of the last attempt, by the clock
        self._began = -math.inf                     # the same, monotonic: it spaces attempts without an outcome

    def wait(self, name: str, stamp: int = 0) -> float:
        """Seconds until `name` may try; 0 = now. `stamp` tells a key file from the one that was refused."""
        with self._turn:
            last, refused = self._refused.get(name, (-math.inf, stamp))
            last = last if refused == stamp else -math.inf
            if len(self._suspects) > 1:
                last = max(last, self._last)
            return max(0.0, last + AUTH_BACKOFF - self._clock())

    def _rest(self) -> float:
        return self._began + AUTH_TURN - time.monotonic()

    @contextlib.contextmanager
    def attempt(self, name: str, deadline: Deadline, stamp: int = 0) -> Iterator[None]:
        """Around one login: an error of cause `auth` counts as refused, the end of the block as accepted."""
        with self._turn:
            while self._running and (self._suspects or not self._proven) and (rest := self._rest()) > 0:
                self._turn.wait(min(rest, deadline.left()))
            if self.wait(name, stamp) > 0:
                raise ProbeError("auth", NOT_TRIED)
            self._running += 1
            self._began, self._last = time.monotonic(), self._clock()
        try:
            yield
        except ProbeError as error:
            if error.cause == "auth" or self._lost(name):
                self.refuse(name, stamp=stamp)
            raise
        else:
            self._accept(name)
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    def _lost(self, name: str) -> bool:
        """Whether a login without an outcome counts as refused: a host may refuse more slowly than we wait."""
        with self._turn:
            self._unanswered[name] = 0 if name in self._accepted else self._unanswered.get(name, 0) + 1
            return self._unanswered[name] >= UNANSWERED

    def refuse(self, name: str, ago: float = 0.0, stamp: int = 0) -> None:
        """Notes a refusal `ago` seconds ago (before a restart)."""
        with self._turn:
            if name not in self._refused:
                self._suspects.add(name)
            self._last = max(self._last, self._clock() - ago)
            self._refused[name] = self._clock() - ago, stamp

    def _accept(self, name: str) -> None:
        with self._turn:
            self._proven = True
            self._accepted.add(name)
            self._suspects.clear()
            self._refused.pop(name, None)

    def clear(self, name: str) -> None:
        """Lets `name` try at once, whatever it is that stops the others."""
        with self._turn:
            self._refused.pop(name, None)
            self._suspects.discard(name)
            self._last = -math.inf


class Guards:
    """A guard per credential."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)
        self._guards: dict[bytes, LoginGuard] = {}

    def _key(self, target: Target) -> bytes:
        """Equal for resources that log in as the same user with the same secret; does not give the secret away."""
        secret = target.password.get_secret_value() if target.password else str(target.settings.key_file)
        user = target.settings.username or str(target.settings.certificate_file or target.name)
        parts = length_prefixed(user, secret)
        return hashlib.blake2b(parts, key=self._salt).digest()

    def of(self, target: Target) -> LoginGuard:
        return self._guards.setdefault(self._key(target), LoginGuard())

    def keep(self, targets: Iterable[Target]) -> None:
        """Forgets the credentials of all others."""
        self._guards = {key: self._guards.get(key) or LoginGuard() for key in map(self._key, targets)}


# === SSH =====================================================================
RECEIVED_BYTES = 2 << 20        # bytes off the wire in a poll: the output and its wrapping
ITEMS = 64                      # things that one SSH packet may announce
PACKET_PATIENCE = 1.0           # seconds without a packet after which paramiko looks whether it was closed
WINDOW_BYTES = 1 << 18          # bytes that an SSH host may send ahead of what was read


def identity(kind: str, blob: bytes) -> str:
    """`ssh-ed25519 SHA256:…` of a public key, the fingerprint as `ssh-keygen -l` shows it."""
    return f"{kind} SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"


def same_key(accepted: str, offered: str) -> bool:
    """`accepted` may leave out the type of the key."""
    return accepted.rstrip("=").rpartition(" ")[2] == offered.rpartition(" ")[2]


def names_host(patterns: str, name: str) -> bool:
    """Whether the host field of a known_hosts line (sshd(8)) names a host: hashed, or patterns with * ? and !."""
    if patterns.startswith("|1|"):
        with contextlib.suppress(ValueError):
            salt, digest = (base64.b64decode(part, validate=True) for part in patterns[3:].split("|"))
            return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)
        return False
    matched = [pattern for pattern in patterns.lower().split(",")
               if fnmatch.fnmatchcase(name.lower(), pattern.lstrip("!").replace("[", "[[]"))]
    return bool(matched) and not any(pattern.startswith("!") for pattern in matched)


class KnownHosts:
    """OpenSSH's known_hosts, read again when it changes; @cert-authority lines are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()       # guards all below
        self._stamp: tuple[int, int] | None = None
        self._lines: list[tuple[str, str, str]] = []                        # marker, hosts, identity
        self._found: dict[str, tuple[frozenset[str], frozenset[str]]] = {}    # by name: accepted, revoked

    def lookup(self, host: str, port: int) -> tuple[frozenset[str], frozenset[str]]:
        """The keys of a host that are accepted and those that are revoked. Raises ProbeError."""
        name = host if port == SSH_PORT else f"[{host}]:{port}"
        try:
            stat = self._path.stat()
            with self._lock:
                if (stat.st_mtime_ns, stat.st_size) != self._stamp:
                    self._lines, self._stamp = list(self._read()), (stat.st_mtime_ns, stat.st_size)
                    self._found = {}
                if name not in self._found:
                    keys = [(marker, key) for marker, hosts, key in self._lines if names_host(hosts, name)]
                    self._found[name] = (frozenset(key for marker, key in keys if not marker),
                                         frozenset(key for marker, key in keys if marker == "@revoked"))
                return self._found[name]
        except FileNotFoundError:
            return frozenset(), frozenset()
        except OSError as error:
            raise ProbeError("host_key", f"known_hosts {self._path} cannot be read: {error.strerror}") from error

    def _read(self) -> Iterator[tuple[str, str, str]]:
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            words = line.split()
            marker = words.pop(0) if words and words[0].startswith("@") else ""
            with contextlib.suppress(ValueError, IndexError):
                if not words[0].startswith("#"):
                    yield marker, words[0], identity(words[1], base64.b64decode(words[2], validate=True))


def remote_identity(transport: paramiko.Transport) -> str:
    """The key that a host showed."""
    key = transport.get_remote_server_key()
    return identity(key.get_name(), key.asbytes())


class BoundedPacketizer(paramiko.packet.Packetizer):
    """Refuses packets that announce more items than anybody sends: paramiko would go through all of them."""

    COUNTED: ClassVar = {7: 0, 60: 3}       # EXT_INFO and INFO_REQUEST: texts before the number of items

    def read_message(self) -> tuple[int, paramiko.Message]:
        kind, message = super().read_message()
        if kind in self.COUNTED:
            look = paramiko.Message(message.asbytes())
            for _ in range(self.COUNTED[kind]):
                look.get_binary()
            if look.get_int() > ITEMS:
                raise paramiko.SSHException("a packet with too many items")
        return kind, message


class SshTransport(paramiko.Transport):
    """Knows whether the host said goodbye: after a password that means refused, where a lost connection does not."""

    dismissed = False

    def _parse_disconnect(self, message: paramiko.Message) -> None:
        self.dismissed = True


def ssh_fault(error: Exception, first: bytes) -> ProbeError:
    """Our error for what paramiko raises around the key exchange; `first` is what the host said first."""
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return ProbeError("protocol", f"no algorithm in common with the host: {error}")
    if isinstance(error, paramiko.ChannelException):
        return ProbeError("unreachable", "the host refuses a session; are too many open (MaxSessions)?")
    if not first or first.startswith(b"Exceeded MaxStartups") or isinstance(error, (EOFError, ConnectionError)):
        return ProbeError("unreachable", "the host closed the connection; is it an SSH server with free sessions?")
    return ProbeError("protocol", f"no SSH server there: {error or type(error).__name__}")


@dataclass(frozen=True)
class ConnectionContext:
    """What the connections of all resources share."""

    known_hosts: KnownHosts
    resolver: Resolver


class SshConnection:
    """One resource over SSH (paramiko), a fresh connection per run."""

    WEAK: ClassVar = {
        "ciphers": ["aes128-cbc", "aes192-cbc", "aes256-cbc", "3des-cbc"],
        "kex": ["diffie-hellman-group-exchange-sha256"],
        "macs": ["hmac-sha1", "hmac-sha1-96", "hmac-md5", "hmac-md5-96"]}
    NEVER: ClassVar = 10 ** 6           # seconds; paramiko's own timers follow the wall clock, ours decides

    def __init__(self, target: Target, guard: LoginGuard, access: ConnectionContext) -> None:
        self._target, self._guard, self._access = target, guard, access
        self._settings = target.settings
        self._trusted = target.host_key
        self._learned: str | None = None    # trusted on first use and not reported yet
        self._tried: list[str] = []         # types of key that the host showed and that a pin without type is not
        self._key: tuple[int, paramiko.PKey] | None = None      # mtime of the key file and what it held

    def run(self, script: str, done: bytes, deadline: Deadline) -> CommandResult:
        try:
            while True:
                with self._connected(deadline) as transport:
                    if not self._verified(transport):
                        continue
                    with self._guard.attempt(self._settings.name, deadline, self._target.key_stamp):
                        self._login(transport, deadline)
                    buffer = OutputBuffer(done)
                    status = self._execute(transport, script, buffer, deadline)
                    return CommandResult(bytes(buffer.output), status, deadline.over, self._learned)
        except ProbeError as error:
            error.host_key = self._learned
            raise
        finally:
            self._learned = None

    def offered_key(self, deadline: Deadline) -> str:
        """The key that the host shows; nothing else is done."""
        with self._connected(deadline) as transport:
            return remote_identity(transport)

    @contextlib.contextmanager
    def _connected(self, deadline: Deadline) -> Iterator[SshTransport]:
        """A transport after the key exchange; socket, transport and thread are gone afterwards."""
        sock = connect_tcp(self._access.resolver, self._settings.hostname, self._settings.connect_port, deadline)
        transport: SshTransport | None = None

        def abort() -> None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
            if transport is not None:
                transport.close()

        with contextlib.closing(sock), deadline.watch(abort):
            try:
                transport = SshTransport(sock, disabled_algorithms=self.WEAK, packetizer_class=BoundedPacketizer)
                transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = self.NEVER
                self._prefer_known_types(transport)
                transport.start_client()
                sock.limit = RECEIVED_BYTES
                sock.settimeout(PACKET_PATIENCE)      # paramiko's own 0.1 s would wake its thread all the time
                yield transport
            except ProbeError:
                raise
            except Exception as error:      # paramiko lets through whatever its parsers raise
                deadline.left()
                raise ssh_fault(error, sock.first) from error
            finally:
                if transport is not None:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)     # wakes the thread that reads
                    transport.close()
                    transport.packetizer.complete_handshake()   # ends a timer of paramiko's that close() leaves
                    if transport.is_alive():
                        transport.join(1)

    def _accepted(self) -> frozenset[str]:
        """The keys that the host may show; empty before the first contact."""
        pinned = self._settings.host_key
        if pinned and pinned != "strict":
            return frozenset({pinned})
        known, _ = self._access.known_hosts.lookup(self._settings.hostname, self._settings.connect_port)
        return known | ({self._trusted} if self._trusted else frozenset())

    def _prefer_known_types(self, transport: SshTransport) -> None:
        """A host has keys of several types; ask for one that we can compare, and for an untried one at last."""
        wanted = tuple(key.split()[0].replace("ssh-rsa", "rsa-sha2") for key in self._accepted() if " " in key)
        tried = tuple(kind.replace("ssh-rsa", "rsa-sha2") for kind in self._tried)
        options = transport.get_security_options()
        # With GCM paramiko's packets need no HMAC, which it compares byte by byte in Python.
        options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
        options.key_types = sorted(options.key_types, key=lambda name: (
            bool(tried) and name.startswith(tried), not name.startswith(wanted)))

    def _verified(self, transport: SshTransport) -> bool:
        """Compares the host's key before any secret is sent; False asks for a connection with another type of key."""
        offered, accepted, name = remote_identity(transport), self._accepted(), self._settings.name
        _, revoked = self._access.known_hosts.lookup(self._settings.hostname, self._settings.connect_port)
        if offered in revoked:
            raise ProbeError("host_key", f"host key revoked by known_hosts: offered {offered}")
        if any(same_key(key, offered) for key in accepted):
            return True
        kind = offered.split()[0]
        if any(" " not in key for key in accepted) and kind not in self._tried:
            self._tried.append(kind)    # a pin without a type may be that of another key of the host
            return False
        self._tried.clear()
        if accepted:
            raise ProbeError("host_key", f"host key changed: expected {' or '.join(sorted(accepted))}, "
                             f"offered {offered}; no password was sent; if the change is right: trust {name}")
        if self._settings.host_key == "strict":
            raise ProbeError("host_key", f"host key unknown: offered {offered}; to accept it: trust {name}")
        self._trusted = self._learned = offered
        return True

    def _login(self, transport: SshTransport, deadline: Deadline) -> None:
        settings, password = self._settings, self._target.password
        try:
            if settings.key_file is not None:
                missing = transport.auth_publickey(settings.username or "", self._load_key(settings.key_file))
            else:
                plain = password.get_secret_value() if password else ""
                missing = transport.auth_password(settings.username or "", plain)
        except paramiko.BadAuthenticationType as error:
            allowed = ", ".join(error.allowed_types)
            raise ProbeError("auth", f"the host allows only {allowed} for {settings.username}") from error
        except paramiko.AuthenticationException as error:
            deadline.left()
            if not transport.is_active() and not transport.dismissed:
                raise ProbeError("unreachable", "connection lost while logging in") from error
            raise ProbeError("auth", f"login as {settings.username} refused; check username and "
                             + ("key_file" if settings.key_file else "password")) from error
        if missing:
            raise ProbeError("auth", f"the host asks for more than one proof: {', '.join(missing)}")

    def _load_key(self, path: Path) -> paramiko.PKey:
        """The private key, read again when the file changes (unlocking an encrypted one takes 0.1 s)."""
        phrase = self._target.passphrase
        try:
            stamp = path.stat().st_mtime_ns
            if self._key is None or self._key[0] != stamp:
                secret = cast(Any, phrase and phrase.get_secret_value().encode())
                self._key = stamp, paramiko.PKey.from_path(path, secret)
        except OSError as error:
            raise ProbeError("credential", f"key_file {path} cannot be read: {error.strerror}") from error
        except Exception as error:  # paramiko lets through whatever its parsers and cryptography raise
            raise ProbeError("credential", f"key_file {path} does not open; check format and key_passphrase") from error
        return self._key[1]

    def _execute(self, transport: SshTransport, script: str, buffer: OutputBuffer, deadline: Deadline) -> int | None:
        """Feeds the script to a POSIX shell, whatever the account's login shell is; returns its exit status."""
        channel = transport.open_session(window_size=WINDOW_BYTES, timeout=self.NEVER)
        try:
            channel.set_combine_stderr(True)
            channel.exec_command("exec /bin/sh -s")
            with contextlib.suppress(OSError):      # a shell that ended before may have said why
                channel.sendall(script.encode())
                channel.shutdown_write()
            while chunk := channel.recv(READ_BYTES):
                if buffer.take(chunk):
                    return 0
            channel.status_event.wait(deadline.left())
            return channel.exit_status if channel.exit_status >= 0 else None
        except (paramiko.SSHException, OSError, EOFError) as error:
            if not deadline.over:
                raise ProbeError("unreachable", "connection lost while the commands ran") from error
        except ProbeError:
            if not deadline.over:
                raise
        return None


# === PowerShell ==============================================================
SHELL_IDLE = 60                 # seconds after which a Windows host drops a forgotten shell; it takes no less
ANSWER_MARGIN = 0.3             # seconds before the deadline at which a Windows host is to answer "not yet"
CLOSE_TIMEOUT = 0.8             # seconds to stop the script and delete the shell, also after the deadline
WINRM_ANSWERS = frozenset({200, 400, 401, 500})  # 400 and 500 carry faults
HTTP_CAUSES: dict[int, Cause] = {403: "auth", 502: "unreachable", 503: "unreachable", 504: "unreachable"}
START_WINRM = "run `winrm quickconfig` there and check port and tls"
UNMAPPED = "the host refuses the client certificate; map it to an account there"
WINRM_FAULTS: dict[int, tuple[Cause, str]] = {
    5: ("auth", "access denied: add the account to Remote Management Users, or correct configuration_name"),
    2150858793: ("timeout", "the script did not end in time; raise timeout"),
    2150859173: ("protocol", "the account has too many shells open there; close them or raise MaxShellsPerUser"),
    2150858843: ("protocol", "the host closed the shell during the poll; see the event log of WinRM there"),
}


def bare_fingerprint(text: str) -> str:
    """Lower-case hexadecimal digits, whichever way a SHA-256 fingerprint is written."""
    return text.rpartition("SHA256:")[2].replace(":", "").lower()


def certificate_identity(connection: ssl.SSLSocket) -> str:
    """`certificate SHA256:…`, hexadecimal as Windows and openssl show it."""
    return f"certificate SHA256:{hashlib.sha256(connection.getpeercert(True) or b'').hexdigest()}"


@functools.cache
def system_authorities() -> ssl.SSLContext:
    """TLS that trusts the system's authorities; reading all of them takes 20 ms of CPU, hence once."""
    return ssl.create_default_context()


def tls_fault(error: OSError) -> ProbeError:
    """Our error for a broken connection or TLS handshake."""
    reason = str(getattr(error, "reason", "") or "")
    if isinstance(error, TimeoutError):
        return ProbeError("timeout", "no answer in time")
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return ProbeError("auth", UNMAPPED)
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return ProbeError("protocol", f"no TLS there ({reason}); check port and tls")
    return ProbeError("unreachable", f"the host closed the connection; {START_WINRM}")


class DeadlineSocket(io.RawIOBase):
    """The one TCP connection of a poll, with its deadline and byte cap.

    urllib3 takes it for a socket and http.client for the file to read from, so nothing waits for the host but here.
    There is no second one in a poll: NTLM and the encryption belong to the first.
    """

    def __init__(self, target: Target, access: ConnectionContext, deadline: Deadline) -> None:
        self.target, self._access, self.deadline = target, access, deadline
        self.in_step = True     # False: an answer is lost or still to come, so nothing more can be asked
        self._received = 0
        self._taken = False
        self._sock: socket.socket | None = None     # pypsrp looks here for the certificate that NTLM is bound to

    def connect(self) -> None:
        """Opens the connection, with TLS where the target says so. Raises ProbeError."""
        with self._guarded():
            plain = self._open()
            self._sock = self._secured(plain) if self.target.settings.tls else plain

    def take(self) -> DeadlineSocket:
        """Gives the connection to urllib3, once."""
        if self._taken:
            raise ProbeError("unreachable", "the host closed the connection during the poll")
        self._taken = True
        return self

    def offered(self) -> str:
        """The certificate that the host shows, unchecked."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with self._guarded(), self._open() as plain:
            plain.settimeout(self.deadline.left())
            with context.wrap_socket(plain, server_hostname=self.target.settings.hostname) as secured:
                return certificate_identity(secured)

    def hang_up(self) -> None:
        if self._sock:
            self._sock.close()

    def _open(self) -> socket.socket:
        settings = self.target.settings
        try:
            return connect_tcp(self._access.resolver, settings.hostname, settings.connect_port, self.deadline)
        except ProbeError as error:
            hint = f"; {START_WINRM}" if "port" in str(error) else ""
            raise ProbeError(error.cause, f"{error}{hint}") from error

    def _secured(self, plain: socket.socket) -> ssl.SSLSocket:
        """The connection after the handshake and the check of the certificate."""
        settings, name = self.target.settings, self.target.name
        pin = settings.certificate_fingerprint or self.target.host_key
        plain.settimeout(self.deadline.left())
        try:
            secured = self._context(bool(pin)).wrap_socket(plain, server_hostname=settings.hostname)
        except ssl.SSLCertVerificationError as error:
            raise ProbeError("host_key", f"certificate not trusted ({error.verify_message}): offered {self.offered()}; "
                             f"to accept it: trust {name}, or name its ca_file") from error
        finally:
            plain.close()       # after a good handshake it is detached, and this closes nothing
        shown = certificate_identity(secured)
        if pin and bare_fingerprint(shown) != bare_fingerprint(pin):
            secured.close()
            raise ProbeError("host_key", f"certificate changed: expected SHA256:{bare_fingerprint(pin)}, "
                             f"offered {shown}; no password was sent; if the change is right: trust {name}")
        return secured

    def _context(self, pinned: bool) -> ssl.SSLContext:
        """How the host's certificate is checked and ours shown. Raises ProbeError `credential` for unusable files."""
        settings, phrase = self.target.settings, self.target.passphrase
        if not (pinned or settings.ca_file or settings.certificate_file):
            return system_authorities()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if pinned:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            elif settings.ca_file:
                context.load_verify_locations(settings.ca_file)
            else:
                context.load_default_certs()
            if settings.certificate_file:
                secret = phrase.get_secret_value() if phrase else ""
                context.load_cert_chain(settings.certificate_file, settings.key_file, secret)
        except (OSError, ValueError) as error:
            raise ProbeError("credential", f"ca_file, certificate_file or key_file cannot be used: {error}") from error
        return context

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[Any]:
        """Turns a socket's errors into ProbeError here already: pypsrp would wait and try again."""
        try:
            if self._sock:
                self._sock.settimeout(self.deadline.left())
            yield self._sock
        except (OSError, ProbeError) as error:
            self.in_step = False
            raise (error if isinstance(error, ProbeError) else tls_fault(error)) from error

    # what a file has

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._guarded() as connection:
            count: int = connection.recv_into(buffer)
            self._received += count
            if self._received > OUTPUT_BYTES:
                raise ProbeError("protocol", f"the host sent more than {OUTPUT_BYTES} bytes")
        return count

    def close(self) -> None:
        """The end of a response is not the end of the line: hang_up is."""

    # what a socket has

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def sendall(self, octets: bytes) -> None:
        with self._guarded() as connection:
            connection.sendall(octets)

    def settimeout(self, seconds: float | None) -> None:
        """The deadline alone counts."""

    def fileno(self) -> int:
        return self._sock.fileno() if self._sock else -1


class LineConnection(urllib3.connection.HTTPConnection):
    """urllib3's connection, over a Line."""

    def __init__(self, line: DeadlineSocket, **settings: Any) -> None:
        super().__init__(**settings)
        self._line = line

    def connect(self) -> None:
        self.sock = self._line.take()


class LineAdapter(requests.adapters.HTTPAdapter):
    """Sends a session's requests over one Line and refuses what WinRM never answers."""

    def __init__(self, line: DeadlineSocket) -> None:
        super().__init__()
        settings = line.target.settings
        self._pool = urllib3.HTTPConnectionPool(settings.hostname, settings.connect_port, maxsize=1)
        self._pool.ConnectionCls = functools.partial(LineConnection, line)  # type: ignore[assignment]  # a factory

    def get_connection_with_tls_context(self, *args: Any, **settings: Any) -> urllib3.HTTPConnectionPool:
        return self._pool

    def cert_verify(self, *args: Any) -> None:
        """The Line did that."""

    def send(self, request: Any, *args: Any, **settings: Any) -> requests.Response:
        response = super().send(request, *args, **settings)
        if response.status_code not in WINRM_ANSWERS:
            cause = HTTP_CAUSES.get(response.status_code, "protocol")
            raise ProbeError(cause, f"HTTP {response.status_code}, which WinRM never answers; {START_WINRM}")
        if "Content-Encoding" in response.headers:  # 64 KB can unpack to 64 MB
            raise ProbeError("protocol", "the answer is compressed, which WinRM never does; check port and proxies")
        return response


class PowerShellConnection:
    """One resource over PowerShell Remoting (pypsrp), a fresh runspace per run."""

    # Each new WSMan rewrites ElementTree's table of prefixes, and what other polls send just then is no XML: copied.
    WSMAN: ClassVar = WSMan("localhost")

    def __init__(self, target: Target, guard: LoginGuard, access: ConnectionContext) -> None:
        self._target, self._guard, self._access = target, guard, access

    def run(self, script: str, done: bytes, deadline: Deadline) -> CommandResult:
        line = DeadlineSocket(self._target, self._access, deadline)
        try:
            with self._explained():
                return CommandResult(self._run(script, line).encode() + done, 0)
        finally:
            line.hang_up()

    def offered_key(self, deadline: Deadline) -> str:
        """The certificate that the host shows; nothing else is done."""
        if not self._target.settings.tls:
            raise UsageError(f"{self._target.name} has no certificate: tls is off")
        return DeadlineSocket(self._target, self._access, deadline).offered()

    def _run(self, script: str, line: DeadlineSocket) -> str:
        line.connect()      # before the guard: a host that does not answer is no login
        wsman = self._wsman(line)
        endpoint = self._target.settings.configuration_name
        pool = RunspacePool(wsman, configuration_name=endpoint, idle_timeout=SHELL_IDLE)
        shell = PowerShell(pool)
        try:
            with self._guard.attempt(self._target.name, line.deadline, self._target.key_stamp), self._explained():
                pool.open()
            shell.add_script(script).begin_invoke()
            while shell.state == PSInvocationState.RUNNING:
                wait = round(line.deadline.left() - ANSWER_MARGIN, 3)
                if wait <= 0:
                    raise ProbeError(*WINRM_FAULTS[2150858793])
                shell.poll_invoke(timeout=cast(int, wait))      # sent as PT9.7S, a valid duration
            if shell.state != PSInvocationState.COMPLETED:
                errors = [str(error) for error in shell.streams.error]
                raise ProbeError("protocol", f"the script failed: {errors[-1] if errors else 'no reason given'}")
            return "\n".join(map(str, shell.output))
        finally:
            line.deadline = Deadline(CLOSE_TIMEOUT)
            with contextlib.suppress(Exception):    # the poll's own result must not give way to this one's error
                if line.in_step and shell.state == PSInvocationState.RUNNING:
                    shell.stop()
                if line.in_step:
                    pool.close()
            wsman.close()

    def _wsman(self, line: DeadlineSocket) -> WSMan:
        settings, password = self._target.settings, self._target.password
        wsman = copy.copy(self.WSMAN)
        wsman.session_id, wsman.operation_timeout = str(uuid.uuid4()), max(1, int(settings.timeout))
        wsman.transport = type(self.WSMAN.transport)(
            settings.hostname, settings.connect_port, settings.username,
            password.get_secret_value() if password else None, settings.tls, auth=settings.auth, no_proxy=True,
            certificate_pem=settings.certificate_file and str(settings.certificate_file),
            certificate_key_pem=settings.key_file and str(settings.key_file))
        session = wsman.transport._build_session()
        session.trust_env = False       # a .netrc would replace the Authorization header
        for scheme in ("http://", "https://"):
            session.mount(scheme, LineAdapter(line))
        wsman.transport.session = session
        return wsman

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Our error for whatever the host's bytes make pypsrp raise: struct.error, KeyError and many more."""
        settings = self._target.settings
        try:
            yield
        except ProbeError:
            raise
        except ImportError as error:
            extra = f"pypsrp[{settings.auth}]"
            raise ProbeError("credential", f"auth {settings.auth} needs a package: pip install {extra}") from error
        except AuthenticationError as error:
            refused = f"login as {settings.username} refused; check username, password and auth"
            raise ProbeError("auth", UNMAPPED if settings.auth == "certificate" else refused) from error
        except WSManFaultError as error:
            unknown: tuple[Cause, str] = ("protocol", f"WinRM fault {error.code}: {error.reason}")
            raise ProbeError(*WINRM_FAULTS.get(error.code or 0, unknown)) from error
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise ProbeError("unreachable", "the host closed the connection during the poll") from error
        except Exception as error:      # pypsrp lets through whatever its parsers raise
            kind = type(error).__name__
            raise ProbeError("protocol", f"the answer is not WinRM's; check port and proxies ({kind})") from error


# === Local ===================================================================
FLIPS = 10_000                  # state changes of a simulated resource between two polls at most


def read_until(pipe: IO[bytes], deadline: Deadline, take: Callable[[bytes], bool]) -> bool:
    """Gives what a pipe holds to `take` until that is content or the pipe ends; False at the deadline."""
    if sys.platform == "win32":     # select knows no pipes there; the thread ends with the process
        chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def pump() -> None:
            for chunk in iter(functools.partial(os.read, pipe.fileno(), READ_BYTES), b""):
                chunks.put(chunk)
            chunks.put(b"")

        threading.Thread(target=pump, daemon=True).start()
        with contextlib.suppress(queue.Empty):
            while not deadline.over:
                if not (chunk := chunks.get(timeout=deadline.left())) or take(chunk):
                    return True
        return False
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not deadline.over and selector.select(deadline.left()):
            chunk = os.read(pipe.fileno(), READ_BYTES)
            if not chunk or take(chunk):
                return True
    return False


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started: `timeout` and background jobs have process groups of their own."""
    process.kill()
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)
        return
    with contextlib.suppress(OSError):
        listed = subprocess.run(["ps", "-A", "-o", "pid="], capture_output=True, encoding="ascii", check=False)
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(OSError):
                if os.getsid(pid) == process.pid:
                    os.kill(pid, signal.SIGKILL)


class LocalConnection:
    """This machine, through its own shell."""

    SHELL: ClassVar = ["/bin/sh", "-s"]
    if sys.platform == "win32":     # a script on stdin meets no execution policy and no limit of the command line
        SHELL = ["powershell.exe", "-NoLogo", "-NoProfile", "-NonInteractive", "-Command",
                 "Invoke-Expression (@($input) -join [char]10)"]

    def __init__(self, _target: Target, _guard: LoginGuard, _access: ConnectionContext) -> None:
        """A shell of our own needs none of them."""

    def run(self, script: str, done: bytes, deadline: Deadline) -> CommandResult:
        buffer = OutputBuffer(done)
        try:
            with tempfile.TemporaryFile() as feed:      # a pipe could block on a shell that does not read
                feed.write(script.encode())
                feed.seek(0)
                process = subprocess.Popen(self.SHELL, stdin=feed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                           start_new_session=True)
        except OSError as error:
            raise ProbeError("protocol", f"{self.SHELL[0]} does not start: {error.strerror}") from error
        assert process.stdout
        with process.stdout as output:
            try:
                ended = read_until(output, deadline, buffer.take)
                mark = done if ended and sys.platform == "win32" else b""       # the script there prints none
                return CommandResult(bytes(buffer.output) + mark, 0 if ended else None, expired=not ended)
            finally:
                end_session(process)
                process.wait()


class SimulatedConnection:
    """A resource that is healthy and unhealthy for exponentially distributed times, as the specification assumes."""

    def __init__(self, target: Target, _guard: LoginGuard, _access: ConnectionContext) -> None:
        self._means = {True: target.settings.mean_healthy, False: target.settings.mean_unhealthy}
        self._random = random.Random(target.settings.seed)
        self._healthy = True
        self._flips = time.monotonic() + self._duration()

    def _duration(self) -> float:
        return self._random.expovariate(1 / self._means[self._healthy])

    def run(self, script: str, done: bytes, deadline: Deadline) -> CommandResult:
        for _ in range(FLIPS):
            if self._flips > time.monotonic():
                break
            self._healthy = not self._healthy
            self._flips += self._duration()
        return CommandResult((b"healthy" if self._healthy else b"outage") + done, 0)


CONNECTIONS: dict[Platform, Callable[[Target, LoginGuard, ConnectionContext], Connection]] = {
    **{platform: SshConnection for platform in SSH_PLATFORMS},
    Platform.WINDOWS: PowerShellConnection,
    Platform.LOCAL: LocalConnection,
    Platform.SIMULATED: SimulatedConnection,
}


# === Probes ==================================================================
# A platform is a table of rows: name, command, parser. One script runs a whole table, so that a poll is one
# round trip. Parsers are pure and raise ValueError, which becomes the problem shown in the metric's place.

NOT_KNOWN = "not known on this platform"
KEPT_BYTES = 4096               # bytes of text kept of a service or check; the script has this number, too
PROBLEM_CHARS = 200             # characters of a problem's one line
LINE_CHARS = 4096               # characters of a line of df; a longer one is nobody's mount point
QUOTA_RATIO = 0.98              # a volume with less than this part of its pool's free space has a quota
TIMED_OUT = frozenset({124, 137, 143})  # exit statuses: of timeout(1), after SIGKILL, after SIGTERM
DETAILS = frozenset({"hostname", "os", "kernel", "uptime_seconds", "cpu_count"})
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
# No disks, though they may sit on a path: images that are always full, and views of another filesystem.
NO_DISK = re.compile(
    r"squashfs|erofs|cramfs|romfs|iso9660|udf|cd9660|(dev)?tmpfs|ramfs|overlay|(au|union|null|ecrypt|auto)fs"
    r"|fuse(fs|\..*)?|9p|virtiofs|vboxsf|nfs4?|cifs|smb3"
)
# Parts of macOS itself: they count in their pool but are not shown.
MACOS_PARTS = re.compile(r"/System/Volumes/(?!Data$)|/private/var/vm$")


@dataclass(frozen=True)
class CpuTicks:
    """Counters since the start of the machine; cpu_percent needs the difference of two."""

    busy: float
    total: float


# None: this machine has no such thing. In a mapping of metrics a text is a problem.
Reading = str | float | None | CpuTicks | Mapping[str, float | str]


@dataclass(frozen=True)
class Outcome:
    """A service or check: good or not, and its state or output (KEPT_BYTES at most)."""

    good: bool
    text: str


Judge = Callable[[int, str], Outcome]  # of an exit status and output


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

    def readings(self, metric: str) -> list[tuple[str, float]]:
        """Every reading of a metric, such as `disk_percent /` and `disk_percent /var` of disk_percent."""
        return [(name, value) for name, value in self.metrics.items() if name.partition(" ")[0] == metric]

    def to_json(self) -> str:
        """All but the ticks, for the pages: an object with the names of the fields."""
        return json.dumps({field: getattr(self, field) for field in self.__dataclass_fields__ if field != "ticks"},
                          default=vars)


@dataclass(frozen=True)
class Probe:
    """A row of a table."""

    name: str
    command: str
    parse: Callable[[str], Reading]


@dataclass(frozen=True)
class CommandSet:
    """A platform's table: its `uname -s` (a pattern of sh), its rows, and how to ask for a service: {} is the
    quoted name, `state` judges exit status and output."""

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


def _percent(part: float, whole: float) -> float:
    if not 0 <= part <= whole or not whole:
        raise ValueError(f"{part:g} of {whole:g} is no share")
    return 100 * part / whole


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


def _load_per_cpu(text: str) -> float:
    """A line with the load of 1, 5 and 15 minutes, bare or of uptime(1), then the number of CPUs."""
    lines = text.splitlines() or [""]
    load = lines[0].rpartition("average")[2].lstrip("s:{ ").partition(" ")[0]
    return _number(load.rstrip(",")) / _count(lines[-1])


def _linux_memory(text: str) -> float:
    named = _named(text)
    total = _sum(named, "MemTotal")
    if "MemAvailable" in named:
        return _percent(total - _sum(named, "MemAvailable"), total)
    shared = _sum(named, "Shmem") if "Shmem" in named else 0  # in Cached, yet nothing can drop it
    return _percent(total - _sum(named, "MemFree", "Buffers", "Cached") + shared, total)


def _macos_memory(text: str) -> float:
    """What Activity Monitor calls used: memory of applications, wired and compressed."""
    named, page = _named(text), text.partition("page size of")[2]
    pages = _sum(named, "Anonymous pages", "Pages wired down", "Pages occupied by compressor")
    return _percent((pages - _sum(named, "Pages purgeable")) * _number(page), _sum(named, "hw.memsize"))


def _freebsd_memory(text: str) -> float:
    """Free and inactive pages and the ARC above its floor are available; laundry has to be written first."""
    named, pages, arc = _named(text), "vm.stats.vm.v_", "kstat.zfs.misc.arcstats."
    page, total = _sum(named, "hw.pagesize"), _sum(named, pages + "page_count")
    available = _sum(named, pages + "free_count", pages + "inactive_count")
    if arc + "size" in named:
        available += max(0.0, _sum(named, arc + "size") - _sum(named, arc + "c_min")) / max(page, 1)
    return _percent(total - available, total)


def _linux_swap(text: str) -> float | None:
    named = _named(text)
    total = _sum(named, "SwapTotal")
    return _percent(total - _sum(named, "SwapFree"), total) if total else None


def _macos_swap(text: str) -> float | None:
    found = re.match(r"total = (\S+)M +used = (\S+)M ", text)
    if not found:
        raise ValueError("no swap usage")
    total, used = map(_number, found.groups())
    return _percent(used, total) if total else None


def _freebsd_swap(text: str) -> float | None:
    header, *lines = text.splitlines() or [""]
    if not header.startswith("Device"):
        raise ValueError("no table of swap devices")
    rows = [line.split()[-4:-2] for line in lines if not line.startswith("Total")]
    total, used = (sum(map(_number, sizes)) for sizes in zip(*rows, strict=True)) if rows else (0, 0)
    return _percent(used, total) if total else None


class Volume(NamedTuple):
    """A row of df with sizes in KiB; on macOS mount(8) adds flags, of which the first is the type."""

    device: str
    kind: str
    used: float
    available: float
    mount: str
    flags: Container[str]

    @property
    def on_disk(self) -> bool:
        """By what it sits on: a list of good types would silently miss the next filesystem there is."""
        device = self.kind == "zfs" or re.match("/(?!/)", self.device)
        return bool(device and not NO_DISK.fullmatch(self.kind))

    @property
    def shown(self) -> bool:
        return not ("read-only" in self.flags or "quarantine" in self.flags or MACOS_PARTS.match(self.mount))

    @property
    def pool(self) -> str:
        """Volumes of ZFS and APFS share the free space of a pool; any other is a pool of its own."""
        pattern = {"zfs": r"[^/]+", "apfs": r"/dev/disk[0-9]+"}.get(self.kind, ".+")
        found = re.match(pattern, self.device)
        return found[0] if found else self.device


def _volumes(text: str, typed: bool) -> Iterator[Volume]:
    """The rows of `df -Pk` (typed: with -T) that have sizes, recognised by three numbers and a percent sign,
    for devices and mount points may hold blanks. Lines of mount(8) read `device on /mount (apfs, local)`."""
    mounts = (line[:-1].rpartition(" (") for line in text.splitlines() if line.endswith(")"))
    flags = {left.partition(" on ")[2]: right.split(", ") for left, _, right in mounts}
    for line in text.splitlines():
        if len(line) > LINE_CHARS:
            raise ValueError(f"a line of {len(line)} characters")
        words = [(word[0], word.start()) for word in re.finditer(r"\S+", line)]
        for at in range(4 + typed, len(words) - 1):
            sizes = [word for word, _ in words[at - 3 : at]]
            if words[at][0].endswith("%") and all(re.fullmatch("-?[0-9]{1,18}", size) for size in sizes):
                mount = line[words[at + 1][1] :].replace("\\040", " ")
                kind = words[at - 4][0] if typed else flags.get(mount, [""])[0]
                available = max(0.0, float(sizes[2]))  # below 0 where the reserve of UFS is in use
                device = line[: words[at - 3 - typed][1]].strip()
                yield Volume(device, kind, float(sizes[1]), available, mount, flags.get(mount, ()))
                break


def _disk_percent(text: str, typed: bool) -> dict[str, float | str]:
    """used / (used + available) of each pool under its shortest mount point, and of volumes with a quota."""
    pools: dict[str, dict[str, Volume]] = {}
    for volume in sorted(_volumes(text, typed), key=lambda volume: len(volume.mount)):
        if volume.on_disk and volume.used + volume.available > 0:
            pools.setdefault(volume.pool, {}).setdefault(volume.device, volume)  # no bind mounts
    shares: dict[str, float | str] = {}
    for pool in pools.values():
        volumes = list(pool.values())
        used, free = sum(volume.used for volume in volumes), max(volume.available for volume in volumes)
        for index, volume in enumerate(volume for volume in volumes if volume.shown):
            if index == 0:
                shares[f"disk_percent {volume.mount}"] = _percent(used, used + free)
            elif volume.available < free * QUOTA_RATIO:
                shares[f"disk_percent {volume.mount}"] = _percent(volume.used, volume.used + volume.available)
    # An account without rights to somebody's private mount is no fault; a disk that answers with an error is.
    private = re.compile("[Pp]ermission denied|not permitted")
    errors = [line for line in text.splitlines() if line.startswith("df: ") and not private.search(line)]
    if not shares:
        raise ValueError(f"no local filesystem {' '.join(errors)}")
    return shares | ({"disk_percent": errors[0]} if errors else {})


def _by_status(status: int, text: str) -> Outcome:
    return Outcome(status == 0, text or (f"exit status {status}" if status >= 0 else "no exit status"))


def _systemd(status: int, text: str) -> Outcome:
    fields = {key: value for key, _, value in (line.partition("=") for line in text.splitlines())}
    active = fields.get("ActiveState", "")
    if not active:  # another init, or a systemd that does not answer
        return _by_status(status, text)
    if fields.get("LoadState") == "not-found":
        return Outcome(False, "no such unit")
    return Outcome(active in ("active", "reloading"), f"{active} ({fields.get('SubState', '')})")


def _launchd(status: int, text: str) -> Outcome:
    """The first state is the job's own; those further down belong to its sockets and endpoints."""
    state = re.search(r"^[ \t]*state = (.*)$", text, re.MULTILINE)
    if status == 0 and state:
        return Outcome(state[1] == "running", state[1])
    return Outcome(False, "no such service" if status == 113 else _by_status(status, text).text)


_ANY = (Probe("hostname", "uname -n", _line), Probe("kernel", "uname -sr", _line))
_BSD = (                        # and macOS
    Probe("uptime_seconds", "sysctl -n kern.boottime; date +%s", _since_boot),
    Probe("cpu_count", "sysctl -n hw.ncpu", _count),
    Probe("load_per_cpu", "sysctl -n vm.loadavg hw.ncpu", _load_per_cpu),
)
_CPUS = "getconf _NPROCESSORS_ONLN"
_LINUX_CPUS = f"{_CPUS} 2>/dev/null || grep -c '^cpu[0-9]' /proc/stat"
PROBES: dict[Platform, CommandSet] = {
    Platform.LINUX: CommandSet("Linux", (
        *_ANY,
        Probe("os", '(. /etc/os-release; echo "${PRETTY_NAME:?}") 2>/dev/null || cat /etc/redhat-release',
              _line),
        Probe("uptime_seconds", "cat /proc/uptime", _number),
        Probe("cpu_count", _LINUX_CPUS, _count),
        Probe("cpu_percent", "grep '^cpu ' /proc/stat", _linux_ticks),
        Probe("memory_percent", "grep -E '^(Mem|Buffers|Cached|Shmem:)' /proc/meminfo", _linux_memory),
        Probe("swap_percent", "grep ^Swap /proc/meminfo", _linux_swap),
        Probe("load_per_cpu", f"cat /proc/loadavg; {_LINUX_CPUS}", _load_per_cpu),
        # Without -l a dead NFS server holds df up for ever; busybox has no -l.
        Probe("disk_percent", "case $(df --help 2>&1) in *--local*) df -PklT;; *) df -PkT;; esac; :",
              functools.partial(_disk_percent, typed=True)),
    ), "if [ -d /run/systemd/system ]; then systemctl show -p LoadState -p ActiveState -p SubState -- {};"
       " else service {} status; fi", _systemd),
    Platform.MACOS: CommandSet("Darwin", (
        *_ANY, *_BSD,
        Probe("os", 'echo "$(sw_vers -productName) $(sw_vers -productVersion)"', _line),
        Probe("cpu_percent", "sysctl -n hw.ncpu; ps -A -o %cpu=", _ps_cpu),
        Probe("memory_percent", "vm_stat; sysctl hw.memsize", _macos_memory),
        Probe("swap_percent", "sysctl -n vm.swapusage", _macos_swap),
        Probe("disk_percent", "df -Pkl; mount", functools.partial(_disk_percent, typed=False)),
    ), "launchctl print system/{}", _launchd),
    Platform.FREEBSD: CommandSet("FreeBSD", (
        *_ANY, *_BSD,
        Probe("os", 'echo "FreeBSD $(freebsd-version -u 2>/dev/null || uname -r)"', _line),
        Probe("cpu_percent", "sysctl -n kern.cp_time", lambda text: _ticks(text.split()[:5], slice(4, 5))),
        Probe("memory_percent", "sysctl -i hw.pagesize vm.stats.vm.v_page_count vm.stats.vm.v_free_count"
              " vm.stats.vm.v_inactive_count kstat.zfs.misc.arcstats.size kstat.zfs.misc.arcstats.c_min",
              _freebsd_memory),
        Probe("swap_percent", "swapinfo -k", _freebsd_swap),
        Probe("disk_percent", "df -PklT; :", functools.partial(_disk_percent, typed=True)),
    ), "service {} onestatus", _by_status),
    Platform.POSIX: CommandSet("*", (
        *_ANY,
        Probe("os", "uname -sr", _line),
        Probe("cpu_count", _CPUS, _count),
        Probe("load_per_cpu", f"uptime; {_CPUS}", _load_per_cpu),
        Probe("disk_percent", "df -Pk; :", functools.partial(_disk_percent, typed=False)),
    ), ":", lambda status, text: Outcome(False, "services are not supported on this platform")),
}  # fmt: skip

# The script goes to `sh -s` on stdin: one group, read whole before a command could eat the rest.
# A check's output ends at its own status line and not at end of file, which a daemon it leaves behind would
# hold off for ever; what is beyond KEPT_BYTES is read and dropped, so that nothing dies of SIGPIPE.
SCRIPT = r"""{
LC_ALL=C; export LC_ALL; unset LANGUAGE
PATH=$PATH:/usr/sbin:/sbin:/usr/local/sbin:/usr/local/bin; export PATH
E=
b() { E="$E
@NONCE begin $1
"; }
e() { E="$E$O
@NONCE end $?"; }
f() { printf '%s' "$E"; E=; }
limit() {
  if [ "$T" ]; then timeout -k 1 "$1" /bin/sh -c "$2" 2>&1; return; fi
  command set -m || :
  /bin/sh -c "$2" 2>&1 & p=$!
  { sleep "$1"; kill -TERM -$p || kill -TERM $p; sleep 1; kill -KILL -$p || kill -KILL $p
  } >/dev/null & w=$!
  wait $p; s=$?
  kill -TERM -$w || kill -TERM $w
  return $s
}
run() {
  { t=$(date +%s); limit "$1" "$2"; s=$?; [ $s -le 255 ] || s=$((128 + s % 128))
    printf '\n@NONCE status %s %s .\n' $s $(($(date +%s) - t)); } 2>/dev/null | keep
}
keep() {
  kept= last= s=lost
  while :; do
    new=$(dd bs=4096 count=1 2>/dev/null; echo .); new=${new%.}
    [ "$new" ] || break
    [ ${#kept} -gt 4300 ] || kept=$kept$new
    last=$last$new
    case $last in *'@NONCE status '*' .'*) s=${last#*'@NONCE status '}; s=${s%% .*}; break;; esac
    last=$new
  done 2>/dev/null
  printf '%.4096s\n@NONCE end %s\n' "${kept%%'@NONCE status '*}" "$s"
}
case $(uname -s) in
BRANCHESesac
T=; timeout -k 1 1 true >/dev/null 2>&1 && T=y
CHECKSf; printf '\n@NONCE done\n'
exit 0
} </dev/null 2>&1
"""


def build_script(platform: Platform, services: Sequence[str], checks: Sequence[Check], nonce: str) -> str:
    """The whole poll for `/bin/sh -s`; `unix` and `local` ask uname which table to run. The nonce (hex, new
    for every poll) marks the sections, so that no output can pass for a mark."""
    chosen = {platform: PROBES[platform]} if platform in PROBES else PROBES
    branches = ""
    for key, table in chosen.items():
        rows = [(f"platform {key.value}", ":"), *((probe.name, probe.command) for probe in table.probes)]
        for name in services:
            rows.append((f"service {quote(name, '')}", table.service.replace("{}", shlex.quote(name))))
        # Each write is a packet that costs us 0.2 ms: they are gathered until a command comes that may hang.
        sections = "".join(
            f"b {shlex.quote(title)}; {'f; ' if title.startswith(('disk', 'service ')) else ''}O=$(\n{command}\n); e\n"
            for title, command in rows)
        branches += f"{table.uname if len(chosen) > 1 else '*'})\n{sections};;\n"
    limited = ""
    for check in checks:
        seconds = math.ceil(check.timeout)
        title = shlex.quote(f"check {quote(check.name, '')} {seconds}")
        limited += f"b {title}; f; run {seconds} {shlex.quote(check.command)}\n"
    head, middle, tail = re.split("BRANCHES|CHECKS", SCRIPT.replace("NONCE", nonce))
    return head + branches + middle + limited + tail


class Section(NamedTuple):
    """What stands between the marks of one command. The end has exit status and, of a check, seconds; it is
    empty when the output was cut off."""

    title: tuple[str, ...]
    text: str
    end: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        return int(self.end[0]) if self.end and re.fullmatch("[0-9]{1,3}", self.end[0]) else -1

    def outcome(self, state: Judge) -> Outcome:
        """A service's or check's, as `state` sees it, of a length to be kept."""
        judged = state(self.status, self.text)
        text, seconds = judged.text, [word for word in self.title[2:3] + self.end[1:2] if word.isdecimal()]
        if self.status in TIMED_OUT and len(seconds) == 2 and float(seconds[1]) >= float(seconds[0]):
            text = f"no end in {seconds[0]} s: {self.text}".rstrip(": \n")
        return Outcome(judged.good, text.encode(errors="replace")[:KEPT_BYTES].decode(errors="ignore"))


def _sections(text: str, nonce: str) -> list[Section]:
    found: list[Section] = []
    for part in ("\n" + text).split(f"\n@{nonce} ")[1:]:
        header, _, body = part.partition("\n")
        word, *words = header.split(" ")
        if word == "begin" and words:
            found.append(Section(tuple(words), body.translate(CONTROL).strip()))
        elif word == "end" and found:
            found[-1] = found[-1]._replace(end=tuple(words))
    return found


def is_complete(output: bytes | str, nonce: str) -> bool:
    """Whether the script came to its end; what still holds the stream open need not be waited for."""
    mark = f"\n@{nonce} done\n"
    return mark in output if isinstance(output, str) else mark.encode() in output


def last_section(text: str, nonce: str) -> str:
    """What ran when the output stopped, such as "disk_percent" or "check replication"; "" for nothing."""
    *_, last = [Section((), "", ("0",)), *_sections(text, nonce)]
    return "" if last.end else " ".join(map(unquote, last.title[:2]))


def _readings(probe: Probe, section: Section | None, previous: CpuTicks | None) -> Mapping[str, Reading]:
    """What a row read, by name; ticks under ""."""
    if section is None or not section.end:
        raise ValueError("no answer")
    if section.status:
        raise ValueError(f"exit status {section.status}: {section.text.partition(chr(10))[0]}")
    value = probe.parse(section.text)
    if not isinstance(value, CpuTicks):
        return value if isinstance(value, Mapping) else {probe.name: value}
    busy, total = (value.busy - previous.busy, value.total - previous.total) if previous else (0.0, 0.0)
    sane = 0 <= busy <= total and total  # the counters went on
    return {"": value, "cpu_percent": _percent(busy, total) if sane else None}


def _outcomes(sections: Iterable[Section], kind: str, state: Judge) -> dict[str, Outcome]:
    chosen = (section for section in sections if section.title[0] == kind and len(section.title) > 1)
    return {unquote(section.title[1]): section.outcome(state) for section in chosen}


def parse_output(text: str, nonce: str, previous: CpuTicks | None) -> Sample:
    """The sample in the script's output; raises ProbeError (`protocol`) when nothing in it can be read."""
    sections = {section.title[:2]: section for section in _sections(text, nonce)}
    table = next((table for key, table in PROBES.items() if ("platform", key.value) in sections), None)
    readings: dict[str, Reading] = {}
    rows = table.probes if table else ()
    problems = dict.fromkeys(Limits.model_fields.keys() - {probe.name for probe in rows}, NOT_KNOWN)
    for probe in rows:
        try:
            readings.update(_readings(probe, sections.get((probe.name,)), previous))
        except ValueError as error:
            problems[probe.name] = " ".join(str(error).split())[:PROBLEM_CHARS]
    ticks = readings.pop("", None)
    details = {name: readings.pop(name) for name in [*readings] if name in DETAILS}
    sample = Sample(
        {name: value for name, value in details.items() if isinstance(value, (str, float))},
        {name: value for name, value in readings.items() if isinstance(value, float)},
        ticks if isinstance(ticks, CpuTicks) else None,
        _outcomes(sections.values(), "service", table.state if table else _by_status),
        _outcomes(sections.values(), "check", _by_status),
        problems | {name: value[:PROBLEM_CHARS] for name, value in readings.items() if isinstance(value, str)},
    )
    if not (sample.details or sample.metrics or sample.ticks or sample.services or sample.checks):
        said = " ".join(text.translate(CONTROL).split())[:PROBLEM_CHARS]
        raise ProbeError("protocol", f"the script was not run; output: {said or 'none'}")
    return sample


# --- Windows ---
# For Windows PowerShell 5.1 and PowerShell 7. Prints one line of JSON, ASCII and whole numbers only, which no
# code page or language changes. WMI takes about 5 s to refuse a plain account's network logon, so such a one
# reads from kernel32, and nobody asks again after a refusal. In Constrained Language Mode only cmdlets work:
# WMI for everyone, and checks that nothing ends but the poll's own deadline.
COLLECT = r"""
$ErrorActionPreference = 'Stop'
$ProgressPreference = $WarningPreference = 'SilentlyContinue'
$wanted = 'WANTED' | ConvertFrom-Json
$full = [string]$ExecutionContext.SessionState.LanguageMode -eq 'FullLanguage'
$note = if ($full) { '' } else { ' (Constrained Language Mode)' }
$wmi = @{ use = $true; refused = '' }
$r = @{ details = @{ hostname = [string]$env:COMPUTERNAME }; amounts = @{}; problems = @{} }
function Part($Name, $Body) { try { $null = & $Body } catch { $r.problems[$Name] = "$_$note" } }
function Put($Name, $Total, $Free) { $r.amounts[$Name] = @(([int64]$Total - [int64]$Free), [int64]$Total) }
function Disk($Name, $Total, $Free) {
    if ($Total) { Put "disk_percent $Name" $Total $Free }
    else { $r.problems.disk_percent = "$Name has no size: locked or not formatted" }
}
function Rows($Query) {
    if ($wmi.refused) { throw $wmi.refused }
    try { Get-CimInstance -Query $Query -OperationTimeoutSec 4 -ErrorAction Stop } catch {
        if ($_.CategoryInfo.Category -match 'PermissionDenied|OperationTimeout') { $wmi.refused = "$_" }
        throw
    }
}
function Native {
    if (-not $wmi.api) { $wmi.api = Add-Type -Namespace Health -Name Native -PassThru -MemberDefinition '
    [DllImport("kernel32")] public static extern ulong GetTickCount64();
    [DllImport("kernel32")] public static extern bool GlobalMemoryStatusEx(byte[] status);
    [DllImport("kernel32")] public static extern bool GetSystemTimes(out long i, out long k, out long u);
    ' }
    $wmi.api
}
function Inline($Command) {
    $ErrorActionPreference = 'Continue'
    foreach ($once in 1) { Invoke-Expression $Command 2>&1 }    # a stray `break` ends this, no loop of ours
}
function Bounded($Command, $Milliseconds) {
    $shell = [powershell]::Create()
    $run = $shell.AddScript($Command).BeginInvoke()
    $watch = [Diagnostics.Stopwatch]::StartNew()
    while (-not $run.IsCompleted -and $watch.ElapsedMilliseconds -lt $Milliseconds) {
        $null = $run.AsyncWaitHandle.WaitOne(100)    # short: only in between can the poll itself be stopped
    }
    if (-not $run.IsCompleted) {
        $null = $shell.BeginStop($null, $null).AsyncWaitHandle.WaitOne(500)    # Stop() may never return
        throw "no end in $($Milliseconds / 1000) s"
    }
    if ($shell.InvocationStateInfo.Reason) { throw $shell.InvocationStateInfo.Reason.Message }
    $shell.EndInvoke($run)
    $shell.Streams.Error
}
function Judge($Check) {
    try {
        $said = @(if ($full) { Bounded $Check.command $Check.milliseconds } else { Inline $Check.command })
        $last = $said | Select-Object -Last 1
        $failed = { $_.PSTypeNames -contains 'System.Management.Automation.ErrorRecord' }
        $text = @($said | ForEach-Object { if (& $failed) { "$_" } else { $_ } } |
            Out-String -Stream -Width 200 | Select-Object -First 200) -join "`n"
        $good = -not @($said | Where-Object $failed) -and -not ($last -is [bool] -and -not $last)
    } catch { $good = $false; $text = "$_" }
    if ($text.Length -gt 4096) { $text = $text.Substring(0, 4096) }
    @{ name = [string]$Check.name; good = $good; text = $text }
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
    Part 'disk_percent' {
        Rows 'SELECT DeviceID, Size, FreeSpace FROM Win32_LogicalDisk WHERE DriveType = 3' |
            ForEach-Object { Disk $_.DeviceID $_.Size $_.FreeSpace }
    }
    Part 'cpu_percent' {    # an inverse counter: in spite of its name it counts idle time
        $class = 'Win32_PerfRawData_PerfOS_Processor'
        $cpu = Rows "SELECT PercentProcessorTime, Timestamp_Sys100NS FROM $class WHERE Name = '_Total'"
        Put 'cpu_percent' $cpu.Timestamp_Sys100NS $cpu.PercentProcessorTime
    }
} else {
    Part 'uptime_seconds' { $r.details.uptime_seconds = [int64]((Native)::GetTickCount64() / 1000) }
    Part 'memory_percent' {
        [byte[]]$status = @(64) + @(0) * 63    # MEMORYSTATUSEX, which begins with its own size
        if (-not (Native)::GlobalMemoryStatusEx($status)) { throw 'GlobalMemoryStatusEx failed' }
        Put 'memory_percent' ([BitConverter]::ToInt64($status, 8)) ([BitConverter]::ToInt64($status, 16))
    }
    Part 'swap_percent' { throw 'only an administrator may read the page file' }
    Part 'disk_percent' {
        [IO.DriveInfo]::GetDrives() | Where-Object { [string]$_.DriveType -eq 'Fixed' } |
            ForEach-Object { Disk $_.Name.TrimEnd('\') $_.TotalSize $_.TotalFreeSpace }
    }
    Part 'cpu_percent' {
        $idle = $kernel = $user = [int64]0    # kernel time contains idle time
        if (-not (Native)::GetSystemTimes([ref]$idle, [ref]$kernel, [ref]$user)) { throw 'no system times' }
        Put 'cpu_percent' ($kernel + $user) $idle
    }
}
$r.services = @(foreach ($name in $wanted.services) {
    try { $state = [string](Get-Service -Name $name -ErrorAction Stop).Status } catch {
        $state = "cannot be read: $_"
        if ($_.FullyQualifiedErrorId -like 'NoServiceFound*') { $state = 'no such service' }
    }
    @{ name = [string]$name; good = $state -eq 'Running'; text = $state }
})
$r.checks = @(foreach ($check in $wanted.checks) { Judge $check })
$json = ConvertTo-Json -InputObject $r -Depth 5 -Compress
while ($json -cmatch '[^\x00-\x7f]') {
    $json = $json.Replace($Matches[0], ('\u{0:x4}' -f [int][char]$Matches[0]))
}
$json
"""


def build_windows_script(services: Sequence[str], checks: Sequence[Check], _nonce: str) -> str:
    """The whole poll, ASCII only. What the operator wrote goes in as JSON inside one literal in single quotes
    and without any of those: it cannot end the literal, and nothing in it is expanded. One line needs no marks."""
    commands = [{"name": check.name, "command": check.command, "milliseconds": round(1000 * check.timeout)}
                for check in checks]
    wanted = json.dumps({"services": list(services), "checks": commands})
    return COLLECT.replace("WANTED", wanted.replace("'", r"\u0027"), 1)


Whole = Annotated[int, Field(gt=-1 << 64, lt=1 << 64)]
AmountName = Annotated[str, Field(pattern="^(cpu|memory|swap)_percent$|^disk_percent .{1,200}$")]


class Judged(BaseModel, strict=True):
    """A service or check in what COLLECT prints."""

    name: str
    good: bool
    text: str

    def outcome(self) -> Outcome:
        text = self.text.translate(CONTROL).strip().encode()[:KEPT_BYTES].decode(errors="ignore")
        return Outcome(self.good, text)


class WindowsAnswer(BaseModel, strict=True):
    """What COLLECT prints. `amounts` are so much of so much, of cpu_percent since the start of the machine. A
    metric is there or in `problems`; where there is no page file, swap_percent is in neither."""

    details: dict[str, Whole | str]
    amounts: dict[AmountName, tuple[Whole, Whole]]
    problems: dict[str, str]
    services: list[Judged]
    checks: list[Judged]


def _windows_cpu(previous: CpuTicks | None, now: CpuTicks) -> dict[str, float]:
    """Idle time and time have two clocks: an idle machine may seem busy for a little less than nothing."""
    busy, total = (now.busy - previous.busy, now.total - previous.total) if previous else (0.0, 0.0)
    return {"cpu_percent": _percent(max(busy, 0.0), total)} if -total / 100 <= busy <= total != 0 else {}


def _windows_sample(answer: WindowsAnswer, previous: CpuTicks | None) -> Sample:
    metrics: dict[str, float] = {}
    ticks = None
    problems = {name: "no answer" for name in ("cpu_percent", "memory_percent", "disk_percent")
                if not any(key.startswith(name) for key in answer.amounts)}
    problems |= {name: one_line(why)[:PROBLEM_CHARS] for name, why in answer.problems.items()}
    for name, (used, total) in answer.amounts.items():
        try:
            metrics[name] = _percent(used, total)
        except ValueError as error:
            problems[name.partition(" ")[0]] = str(error)
    if metrics.pop("cpu_percent", None) is not None:
        ticks = CpuTicks(*map(float, answer.amounts["cpu_percent"]))
        metrics |= _windows_cpu(previous, ticks)
    details = {name: one_line(value) if isinstance(value, str) else float(value)
               for name, value in answer.details.items() if name in DETAILS}
    services, checks = ({row.name: row.outcome() for row in rows}
                        for rows in (answer.services, answer.checks))
    return Sample(details, metrics, ticks, services, checks, problems)


def parse_windows(text: str, _nonce: str, previous: CpuTicks | None) -> Sample:
    """The sample in COLLECT's output. Raises ProbeError (`protocol`)
    when it is anything else: half an answer could lack the one check that is bad."""
    try:    # the last line: a check may print past its output. Bytes drop halves of surrogate pairs.
        last = [line for line in text.split("\n") if line.startswith("{")][-1:]
        plain = json.dumps(json.loads("".join(last)), ensure_ascii=False).encode(errors="replace")
        answer = WindowsAnswer.model_validate_json(plain)
    except (ValueError, RecursionError):
        said = " ".join(text[:KEPT_BYTES].translate(CONTROL).split())[:PROBLEM_CHARS]
        raise ProbeError("protocol", f"the script was not run; output: {said or 'none'}") from None
    sample = _windows_sample(answer, previous)
    if not (sample.details or sample.metrics or sample.ticks or sample.services or sample.checks):
        raise ProbeError("protocol", f"nothing can be read: {'; '.join(sample.problems.values())}")
    return sample


def simulated_sample(text: str, _nonce: str, _previous: CpuTicks | None) -> Sample:
    """What SimulatedConnection answers, as a check."""
    good = text.startswith("healthy")
    return Sample({}, {}, None, {}, {"simulation": Outcome(good, "" if good else "simulated outage")}, {})


class Language(NamedTuple):
    """How a poll is asked for and read; `lacks` are metrics that the platform does not have."""

    build: Callable[[Sequence[str], Sequence[Check], str], str]
    parse: Callable[[str, str, CpuTicks | None], Sample]
    lacks: tuple[str, ...] = ()


POWERSHELL = Language(build_windows_script, parse_windows, ("load_per_cpu",))
LANGUAGES = {platform: Language(functools.partial(build_script, platform), parse_output) for platform in Platform}
LANGUAGES |= {Platform.WINDOWS: POWERSHELL,
              Platform.SIMULATED: Language(lambda *_: "", simulated_sample)}     # it answers without being asked
if sys.platform == "win32":
    LANGUAGES[Platform.LOCAL] = POWERSHELL


def complete(sample: Sample, settings: ResourceSettings, lacks: Iterable[str]) -> Sample:
    """What was asked for and not answered is bad, too; what nobody asked for is no problem."""
    silent = Outcome(False, "no answer")
    services = {name: sample.services.get(name, silent) for name in settings.services}
    checks = {check.name: sample.checks.get(check.name, silent) for check in settings.checks}
    limited = settings.limits.by_metric()
    problems = {**dict.fromkeys(lacks, NOT_KNOWN), **sample.problems}
    return replace(sample, services=services, checks={**sample.checks, **checks},
                   problems={name: why for name, why in problems.items() if why != NOT_KNOWN or name in limited})


def incomplete(result: CommandResult, running: str, timeout: float) -> ProbeError:
    """Why a script's output has no end."""
    during = f" while {running} ran" if running else ""
    if result.expired:
        return ProbeError("timeout", f"no end within {timeout:g} s{during}")
    if result.exit_status is None:
        return ProbeError("unreachable", f"connection lost{during}")
    said = result.output[:PROBLEM_CHARS].decode(errors="replace")
    return ProbeError("protocol", f"the account's shell did not run the commands; it said: {said}")


def collect(settings: ResourceSettings, connection: Connection, previous: CpuTicks | None) -> tuple[Sample, str | None]:
    """One poll in one round trip: the sample, and a host key trusted on first use. Raises ProbeError."""
    nonce = secrets.token_hex(8)
    language = LANGUAGES[settings.platform]
    script = language.build(settings.services, settings.checks, nonce)
    done = f"\n@{nonce} done\n"
    result = connection.run(script, done.encode(), Deadline(settings.timeout))
    text = result.output.decode(errors="replace")
    if not is_complete(text, nonce):
        error = incomplete(result, last_section(text, nonce), settings.timeout)
        error.host_key = result.host_key
        raise error
    return complete(language.parse(text.removesuffix(done), nonce, previous), settings, language.lacks), result.host_key


# === Evaluate ================================================================
State = Literal["unknown", "healthy", "degraded", "unhealthy"]
AT_ONCE = frozenset({"auth", "host_key", "credential", "stale"})     # causes that do not wait for `fall`


@dataclass(frozen=True)
class Verdict:
    """What one poll says."""

    state: State
    cause: Cause = ""
    reason: str = ""

    @property
    def good(self) -> bool:
        return self.state in ("healthy", "degraded")


def judge_limits(sample: Sample, limits: Mapping[str, Limit]) -> tuple[list[str], list[str]]:
    """Readings above `fail` and, in the second list, above `warn` or not readable."""
    failed, warned = [], []
    for metric, limit in limits.items():
        for name, value in sample.readings(metric):
            if limit.fail is not None and value > limit.fail:
                failed.append(f"{name} {value:.1f} > {limit.fail:g}")
            elif limit.warn is not None and value > limit.warn:
                warned.append(f"{name} {value:.1f} > {limit.warn:g}")
        if metric in sample.problems:
            warned.append(f"{metric} cannot be read: {sample.problems[metric]}")
    return failed, warned


def evaluate(sample: Sample, settings: ResourceSettings) -> Verdict:
    """A sample against the limits, services and checks of its resource."""
    failed, warned = judge_limits(sample, settings.limits.by_metric())
    bad = [f"{kind} {name}: {outcome.text.strip() or 'failed'}"
           for kind, outcomes in (("service", sample.services), ("check", sample.checks))
           for name, outcome in outcomes.items() if not outcome.good]
    if failed or bad:
        return Verdict("unhealthy", "limit" if failed else "check", one_line("; ".join(failed + bad)))
    if warned:
        return Verdict("degraded", "limit", one_line("; ".join(warned)))
    return Verdict("healthy")


@dataclass(frozen=True)
class Standing:
    """The state of a resource after rise and fall; `since` is Unix time."""

    state: State = "unknown"
    cause: Cause = ""
    reason: str = ""
    since: float = 0.0
    good: int = 0
    bad: int = 0

    @property
    def healthy(self) -> bool:
        return self.state in ("healthy", "degraded")

    @property
    def why(self) -> str:
        return f"{self.cause}: {self.reason}" if self.cause else ""

    @property
    def decided(self) -> bool:
        """Whether the last result agrees with the state; if not, the next poll comes soon."""
        return self.state == "unknown" or (self.good > 0) == self.healthy


def settle(standing: Standing, verdict: Verdict, settings: ResourceSettings, now: float) -> Standing:
    """The standing after one more verdict: a first result counts at once, then `rise` and `fall` in a row."""
    good = standing.good + 1 if verdict.good else 0
    bad = 0 if verdict.good else standing.bad + 1
    counts = (standing.state == "unknown" or verdict.good == standing.healthy or verdict.cause in AT_ONCE
              or good >= settings.rise or bad >= settings.fall)
    if not counts:
        return replace(standing, good=good, bad=bad)
    since = standing.since if verdict.state == standing.state else now
    return Standing(verdict.state, verdict.cause, verdict.reason, since, good, bad)


# === Aggregate ===============================================================
DEFAULT_TTL = 132.0             # seconds; the lease of a resource with default settings


class LeaseHeap:
    """The earliest of many named times: a heap whose outdated items are dropped when they come up."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._times)

    def put(self, name: str, moment: float) -> None:
        self._times[name] = moment
        heapq.heappush(self._heap, (moment, name))
        if len(self._heap) > 2 * len(self._times) + 64:     # renewals of far times pile up below the top
            self._heap = [(moment, name) for name, moment in self._times.items()]
            heapq.heapify(self._heap)

    def drop(self, name: str) -> None:
        self._times.pop(name, None)

    def first(self) -> float:
        """The earliest time, infinity when there is none."""
        while self._heap and self._times.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def first_name(self) -> str:
        return self._heap[0][1] if self.first() < math.inf else ""

    def before(self, moment: float) -> list[str]:
        """The names whose time is not after `moment`."""
        return [name for name, time_ in self._times.items() if time_ <= moment] if self.first() <= moment else []


class Lease:
    """Two floats in shared memory: until when the application is healthy, and when it can be healthy again."""

    def __init__(self) -> None:
        self.until: ctypes.c_double = multiprocessing.RawValue(ctypes.c_double, 0.0)
        self.opens: ctypes.c_double = multiprocessing.RawValue(ctypes.c_double, 0.0)


class HealthAggregator:
    """One answer for all resources: `SetResource` reports, `IsHealthy` asks.

    The answer is a lease: the monotonic time until which everything is known to be healthy. A report renews its
    resource's part for `ttl` seconds, the earliest part is the lease, and it is 0 while a resource is unhealthy or,
    at the start, without a result. So nobody who stops reporting is taken for healthy.
    """

    def __init__(self, lease: Lease | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.lease = lease or Lease()
        self.transitions: queue.SimpleQueue[tuple[float, bool, str]] = queue.SimpleQueue()  # Unix time, open, why
        self._clock = clock
        self._until = self.lease.until
        self._lock = threading.Lock()               # guards all below and the writing of the lease
        self._owners: dict[str, object] = {}        # registered resources
        self._counted: dict[str, bool] = {}         # critical and not in maintenance
        self._parts = LeaseHeap()                    # leases of healthy, counted resources
        self._blockers = LeaseHeap()                 # minus the soonest recovery of unhealthy, counted resources
        self._reasons: dict[str, str] = {}
        self._pending: set[str] = set()             # no result yet, since the start
        self._announced = False                     # the registration of the start is over
        self._started = False                       # every resource of the start has had a result
        self._open = False

    def register(self, name: str, *, counted: bool = True, owner: object = None) -> None:
        """Announces a resource. Before the first decision it blocks until its first result, later it does not.

        Reports of another `owner` are dropped from now on."""
        with self._lock:
            self._owners[name] = owner
            if self._counted.get(name) != counted:
                self._forget(name)
            self._counted[name] = counted
            if not self._started and counted:
                self._pending.add(name)
            self._renew()

    def deregister(self, name: str) -> None:
        """The resource does not count any more."""
        with self._lock:
            self._forget(name)
            self._owners.pop(name, None)
            self._counted.pop(name, None)
            self._renew()

    def start(self) -> None:
        """Ends the registration of the start: with nothing to wait for, the gate opens."""
        with self._lock:
            self._announced = True
            self._renew()

    # The specification's three arguments, and ours by keyword.
    def set_resource(self, name: str, healthy: bool, reason: str = "", *,   # noqa: PLR0913
                     ttl: float = DEFAULT_TTL, opens: float = 0.0, owner: object = None) -> None:
        """Reports a resource; the report counts for `ttl` seconds. `opens`: seconds until it can be healthy again.

        A name that was never registered is registered as counted, unless the report names an owner."""
        with self._lock:
            if owner is not None and self._owners.get(name) is not owner:
                return      # a late report of a poller that was stopped
            self._announced = self._announced or name not in self._owners
            self._owners.setdefault(name, owner)
            self._pending.discard(name)
            if self._counted.setdefault(name, True):
                now = self._clock()
                self._reasons[name] = reason
                if healthy:
                    self._blockers.drop(name)
                    self._parts.put(name, now + ttl)
                else:
                    self._parts.drop(name)
                    self._blockers.put(name, -(now + opens))
            self._renew()

    def is_healthy(self) -> bool:
        """Whether every counted resource is healthy now; one comparison, without a lock."""
        return self._clock() < self._until.value

    def expired(self) -> list[str]:
        """Resources whose lease ran out: nobody reported them in time."""
        with self._lock:
            now = self._clock()
            names = self._parts.before(now)
            self._note(now)
            return names

    def _forget(self, name: str) -> None:
        self._parts.drop(name)
        self._blockers.drop(name)
        self._reasons.pop(name, None)
        self._pending.discard(name)

    def _renew(self) -> None:
        """Writes the lease; the caller holds the lock."""
        self._started = self._started or (self._announced and not self._pending)
        now, blocked = self._clock(), len(self._blockers) > 0
        until = self._parts.first() if self._started and not self._pending and not blocked else 0.0
        self.lease.opens.value = -self._blockers.first() if blocked else now
        self._until.value = until
        self._note(now)

    def _note(self, now: float) -> None:
        """Announces that the gate has changed, and why."""
        is_open = bool(now < self._until.value)
        if is_open == self._open:
            return
        self._open, why = is_open, ""
        if not is_open and len(self._blockers):
            name, more = self._blockers.first_name(), len(self._blockers) - 1
            why = f"{name}: {self._reasons[name]}" + (f" and {more} more" if more else "")
        elif not is_open:
            why = f"no result of {', '.join(self._parts.before(now)[:5])}"
        self.transitions.put((time.time(), is_open, why))

    SetResource = set_resource
    IsHealthy = is_healthy


# === History =================================================================
# A poll is a packed row, and so is a quarter of an hour; a row per metric would be five times as large. 100 resources
# at 60 s: 288,000 polls (2 days) of 40 bytes and 864,000 averages (90 days) of 58 bytes are 62 MB, as measured by
# tests/bench_history.py. 100,000 events add 20 MB, and 144 MB the longest reasons, if everything failed for 2 days.

DAY = 86_400                    # seconds
PRUNE_ROWS = 10_000             # rows of a resource, or events, that are dropped at once
EVENTS = 100_000                # events that are kept at most: a resource may flap for a year
METRICS = ("cpu_percent", "memory_percent", "swap_percent", "disk_percent", "load_per_cpu", "seconds")
MISSING = 0xFFFF                # what was not read; readings are kept in hundredths
SAMPLE = struct.Struct("<2sI6H")  # POLLS: of the poll and of the state after it; seconds for which it counts; METRICS
AVERAGE = struct.Struct("<2H18H")  # tenths of seconds known and healthy; averages, minima and maxima of METRICS
POLLS: dict[str, tuple[State, Cause]] = {
    "h": ("healthy", ""), "d": ("degraded", "limit"), "l": ("unhealthy", "limit"), "c": ("unhealthy", "check"),
    "u": ("unhealthy", "unreachable"), "t": ("unhealthy", "timeout"), "a": ("unhealthy", "auth"),
    "k": ("unhealthy", "host_key"), "r": ("unhealthy", "credential"), "p": ("unhealthy", "protocol"),
    "s": ("unhealthy", "stale")}
POLL_CHARACTERS = {meaning: character for character, meaning in POLLS.items()}
SPANS = {"hour": (3600, 10), "day": (86_400, 300), "week": (604_800, 1800), "month": (2_592_000, 7200)}
# seconds that a chart shows, and of a point: 360 points at most


class SampleRow(Base):
    """A poll, or that there was none in time."""

    __tablename__ = "sample"
    __table_args__ = {"sqlite_with_rowid": False}   # noqa: RUF012  # so the base class wants it
    resource_id: Mapped[int] = mapped_column(ForeignKey("resource.id", ondelete="CASCADE"), primary_key=True)
    at: Mapped[float] = mapped_column(primary_key=True)     # Unix time
    packed: Mapped[bytes]       # SAMPLE
    reason: Mapped[str]


class AverageRow(Base):
    """A quarter of an hour of which something is known."""

    __tablename__ = "average"
    __table_args__ = {"sqlite_with_rowid": False}   # noqa: RUF012  # so the base class wants it
    resource_id: Mapped[int] = mapped_column(ForeignKey("resource.id", ondelete="CASCADE"), primary_key=True)
    at: Mapped[int] = mapped_column(primary_key=True)       # Unix time of its begin, a multiple of QUARTER
    packed: Mapped[bytes]       # AVERAGE


Raw = tuple[float, bytes]       # `at` and `packed` of a SampleRow


@dataclass(frozen=True)
class Report:
    """What a poller tells the recorder after a poll; times are Unix times, `seconds` the duration of the poll."""

    target: Target
    before: Standing
    standing: Standing
    verdict: Verdict
    at: float
    seconds: float
    sample: Sample | None = None
    host_key: str | None = None

    @property
    def transition(self) -> str:
        """What has changed, and after how long; empty for nothing."""
        before, after = self.before, self.standing
        if (before.state, before.cause) == (after.state, after.cause):
            return ""
        lasted = f" after {self.at - before.since:.0f} s" if before.since else ""
        return f"{before.state} -> {after.state}{f' ({after.why})' if after.why else ''}{lasted}"

    @functools.cached_property
    def packed(self) -> bytes:
        """SAMPLE; of several disks the fullest one."""
        highest: dict[str, float] = {"seconds": self.seconds} if self.seconds else {}
        for name, value in self.sample.metrics.items() if self.sample else ():
            metric = name.partition(" ")[0]
            highest[metric] = max(value, highest.get(metric, 0.0))
        after, counts = self.standing, self.target.settings.ttl
        counts += AUTH_BACKOFF if after.cause == "auth" else 0.0
        polls = POLL_CHARACTERS[self.verdict.state, self.verdict.cause] + POLL_CHARACTERS[after.state, after.cause]
        return SAMPLE.pack(polls.encode(), int(counts), *(
            min(round(highest[metric] * 100), MISSING - 1) if metric in highest else MISSING for metric in METRICS))

    @functools.cached_property
    def status(self) -> dict[str, Any]:
        """The row of Status, without its strip."""
        target = self.target
        return {"resource_id": target.id, "configured": target.settings_digest, "credential": target.credential,
                **vars(self.standing), "polled": self.at, "seconds": self.seconds,
                "sample": self.sample.to_json() if self.sample else "null", "packed": self.packed}


def readings(packed: bytes) -> dict[str, float]:
    """What a poll read, by METRICS, of the `packed` of a SampleRow or Status; what it did not read is left out."""
    values = SAMPLE.unpack(packed)[2:] if packed else ()
    return {metric: value / 100 for metric, value in zip(METRICS, values, strict=False) if value != MISSING}


def record_event(session: Session, kind: str, text: str, *, resource: str = "", actor: str = "",   # noqa: PLR0913
                 address: str = "", at: float | None = None) -> None:
    """Adds an event within the caller's transaction; its arguments are the columns. `at` is Unix time, default now."""
    session.add(Event(at=time.time() if at is None else at, kind=kind, resource=resource, text=one_line(text),
                      actor=one_line(actor), address=one_line(address)))


def events(session: Session, *, resource: str | None = None, kind: str | None = None, before: int | None = None,
           limit: int = 100) -> list[Event]:
    """The newest events first, `limit` of them, or of those before the event of the id `before`."""
    query = sqlalchemy.select(Event).order_by(Event.id.desc()).limit(limit)
    for column, value in ((Event.resource, resource), (Event.kind, kind)):
        query = query if value is None else query.where(column == value)
    return list(session.scalars(query if before is None else query.where(Event.id < before)))


class PastPoll(NamedTuple):
    """What is known of a poll; `standing` is the state of the resource after it."""

    at: float
    state: State
    cause: Cause
    reason: str
    standing: State
    readings: dict[str, float]


def samples(session: Session, resource_id: int, *, since: float = 0.0, limit: int = STRIP) -> list[PastPoll]:
    """The last polls of a resource, oldest first, `limit` of them, none before `since` (Unix time)."""
    rows = session.execute(sqlalchemy.select(SampleRow.at, SampleRow.packed, SampleRow.reason)
                           .where(SampleRow.resource_id == resource_id, SampleRow.at >= since)
                           .order_by(SampleRow.at.desc()).limit(limit)).all()
    return [PastPoll(at, *POLLS[chr(packed[0])], reason, POLLS[chr(packed[1])][0], readings(packed))
            for at, packed, reason in reversed(rows)]


class Quarter:
    """What is known of a quarter of an hour."""

    def __init__(self) -> None:
        self.known = self.healthy = 0.0     # seconds
        self._values: list[list[int]] = [[] for _ in METRICS]

    def add(self, values: Iterable[int]) -> None:
        for kept, value in zip(self._values, values, strict=True):
            if value != MISSING:
                kept.append(value)

    def cover(self, seconds: float, state: State) -> None:
        self.known += seconds
        self.healthy += seconds if state != "unhealthy" else 0.0

    @property
    def packed(self) -> bytes:
        """AVERAGE."""
        found = [values or [MISSING] for values in self._values]
        return AVERAGE.pack(round(self.known * 10), round(self.healthy * 10),
                            *(round(sum(values) / len(values)) for values in found), *map(min, found), *map(max, found))


def raw_rows(session: Session, resource_id: int, begin: float, end: float) -> list[Raw]:
    """Polls from `begin` to `end` (Unix times), and the one before them, whose state may last into that time."""
    query = sqlalchemy.select(SampleRow.at, SampleRow.packed).where(SampleRow.resource_id == resource_id)
    earlier = session.execute(query.where(SampleRow.at < begin).order_by(SampleRow.at.desc()).limit(1))
    rows = session.execute(query.where(SampleRow.at >= begin, SampleRow.at < end).order_by(SampleRow.at))
    return [(at, packed) for result in (earlier, rows) for at, packed in result]


def quarters(rows: Sequence[Raw], begin: float, end: float) -> dict[int, Quarter]:
    """By the Unix time of their begin, what `rows` say of the quarters from `begin` to `end`: a poll's state lasts
    until the next poll, but no longer than the poll counts."""
    found: dict[int, Quarter] = collections.defaultdict(Quarter)
    for index, (at, packed) in enumerate(rows):
        marks, counts, *values = SAMPLE.unpack(packed)
        if at >= begin:
            found[int(at // QUARTER) * QUARTER].add(values)
        state = POLLS[chr(marks[1])][0]
        moment, last = max(at, begin), min(at + counts, rows[index + 1][0] if index + 1 < len(rows) else end, end)
        while moment < last:
            quarter = int(moment // QUARTER) * QUARTER
            found[quarter].cover(min(last, quarter + QUARTER) - moment, state)
            moment = quarter + QUARTER
    return found


def rolled_until(session: Session, resource_id: int) -> int:
    """Unix time until which averages are made; 0 when there is none."""
    last = session.scalar(sqlalchemy.select(func.max(AverageRow.at)).where(AverageRow.resource_id == resource_id))
    return 0 if last is None else last + QUARTER


def roll_up(session: Session, resource_id: int, end: int) -> None:
    """Makes the averages that are missing until `end`, a multiple of QUARTER."""
    begin = rolled_until(session, resource_id)
    made = quarters(raw_rows(session, resource_id, begin, end), begin, end)
    rows = [{"resource_id": resource_id, "at": at, "packed": quarter.packed} for at, quarter in sorted(made.items())]
    if rows:
        session.execute(sqlalchemy.insert(AverageRow), rows)


# Two for each table: both ends in one would be no range. Written out, for they run every second.
PRUNE = tuple(sqlalchemy.text(
    f"DELETE FROM {table} WHERE resource_id = :id AND at IN (SELECT at FROM {table} "   # noqa: S608  # nobody's words
    f"WHERE resource_id = :id AND {outside} LIMIT {PRUNE_ROWS})")
    for table in ("sample", "average") for outside in (f"at < :{table}", "at > :future"))


def prune(session: Session, resource_id: int, retention: Retention, now: float) -> None:
    """Drops what is older than `retention`, PRUNED rows at most, and what is of a future that a clock once showed."""
    for statement in PRUNE:
        session.execute(statement, {"id": resource_id, "sample": now - retention.raw * DAY,
                                    "average": now - retention.averages * DAY, "future": now + QUARTER})


def prune_events(session: Session, retention: Retention, now: float) -> None:
    """Drops what is older than `retention`, and what is more than EVENTS."""
    last = session.scalar(sqlalchemy.select(func.max(Event.id))) or 0
    doomed = sqlalchemy.select(Event.id).where(sqlalchemy.or_(
        Event.at < now - retention.events * DAY, Event.id <= last - EVENTS)).limit(PRUNE_ROWS)
    session.execute(sqlalchemy.delete(Event).where(Event.id.in_(doomed)))


def availability(session: Session, resource_id: int, now: float) -> dict[str, float | None]:
    """Percent of the last day, week and month in which the resource was healthy or degraded; time of which nothing is
    known does not count, None: nothing is known at all."""
    rows = session.execute(sqlalchemy.select(AverageRow.at, AverageRow.packed).where(
        AverageRow.resource_id == resource_id, AverageRow.at >= now - SPANS["month"][0]))
    known = [(at, *AVERAGE.unpack_from(packed)[:2]) for at, packed in rows]
    begin = rolled_until(session, resource_id)
    known += [(at, quarter.known * 10, quarter.healthy * 10) for at, quarter
              in quarters(raw_rows(session, resource_id, begin, now), begin, now).items()]
    found: dict[str, float | None] = {}
    for span in ("day", "week", "month"):
        inside = [row for row in known if row[0] >= now - SPANS[span][0]]
        total = sum(row[1] for row in inside)
        found[span] = 100 * sum(row[2] for row in inside) / total if total else None
    return found


class Point(NamedTuple):
    """A point of a chart, from `at` (Unix time) on for the seconds of SPANS."""

    at: int
    average: float
    minimum: float
    maximum: float


def chart(session: Session, resource_id: int, metric: str, span: str, now: float) -> list[Point]:
    """A metric of METRICS over a span of SPANS; a point is left out when nothing was read in its time."""
    (seconds, step), place = SPANS[span], METRICS.index(metric)
    raw_from = session.scalar(sqlalchemy.select(func.min(SampleRow.at)).where(SampleRow.resource_id == resource_id))
    begin = now if raw_from is None else raw_from   # of the polls; there are averages of the time before
    if span in ("week", "month"):
        begin = max(begin, rolled_until(session, resource_id))
    averages = session.execute(sqlalchemy.select(AverageRow.at, AverageRow.packed).where(
        AverageRow.resource_id == resource_id, AverageRow.at >= now - seconds, AverageRow.at < begin))
    points: dict[int, list[tuple[int, int, int]]] = collections.defaultdict(list)
    for at, packed in averages:
        points[at // step * step].append(AVERAGE.unpack(packed)[2 + place::len(METRICS)])
    begin = max(now - seconds, begin)
    for moment, packed in raw_rows(session, resource_id, begin, now):
        if moment >= begin:
            points[int(moment // step) * step].append((SAMPLE.unpack(packed)[2 + place],) * 3)
    return [Point(at, sum(row[0] for row in rows) / len(rows) / 100, min(row[1] for row in rows) / 100,
                  max(row[2] for row in rows) / 100)
            for at, all_rows in sorted(points.items()) if (rows := [row for row in all_rows if row[0] != MISSING])]


# === Poll ====================================================================
FIRST_POLLS = 50.0              # first polls per second
JITTER = 0.1                    # part of the interval by which polls are spread
FLUSH_INTERVAL = 1.0            # seconds for which the recorder gathers what it writes
PENDING_ROWS = 100_000          # rows that wait for a database that cannot be written; older ones are lost
QUARTER_GRACE = 5.0             # seconds for the last reports of a quarter to be written
TIDY_FLUSHES = 600              # flushes over which the averages of a quarter are spread
LAST_FLUSH = 1.5                # seconds for the last reports to be written when the service ends
TABLES = Base.metadata.tables   # an insert of a table costs half of what one of its class does


def upsert_status() -> Any:
    """Replaces a resource's last standing; `strip` is added to the one that is there."""
    insert = sqlite.insert(TABLES["status"])
    values: dict[str, Any] = {column.name: column for column in insert.excluded}
    values["strip"] = func.substr(Status.strip + insert.excluded["strip"], -STRIP)
    return insert.on_conflict_do_update(set_=values)


UPSERT_STATUS = upsert_status()
INSERT_SAMPLE = sqlalchemy.insert(TABLES["sample"]).prefix_with("OR REPLACE")
INSERT_EVENT = sqlalchemy.insert(TABLES["event"])


class Batch:
    """What is not written yet."""

    def __init__(self) -> None:
        self.latest: dict[int, Report] = {}     # by the resource's id
        self.keys: dict[int, str] = {}          # host keys trusted on first use
        self.samples: collections.deque[dict[str, Any]] = collections.deque(maxlen=PENDING_ROWS)
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=PENDING_ROWS)

    def add(self, report: Report) -> None:
        resource_id = report.target.id
        self.latest[resource_id] = report
        if report.host_key:
            self.keys[resource_id] = report.host_key
        self.samples.append({"resource_id": resource_id, "at": report.at, "packed": report.packed,
                             "reason": report.verdict.reason})

    def note(self, kind: str, text: str, at: float, resource: str = "") -> None:
        self.events.append({"kind": kind, "text": one_line(text), "at": at, "resource": resource, "actor": "",
                            "address": ""})

    def write(self, session: Session) -> None:
        """Within the caller's transaction; nothing of resources that were removed."""
        alive = set(session.scalars(sqlalchemy.select(Resource.id).where(Resource.id.in_(list(self.latest)))))
        samples = [row for row in self.samples if row["resource_id"] in alive]
        strips: dict[int, str] = collections.defaultdict(str)
        for row in samples:
            strips[row["resource_id"]] += chr(row["packed"][0])
        statuses = [report.status | {"strip": strips[number][-STRIP:]}
                    for number, report in self.latest.items() if number in alive]
        for statement, rows in ((UPSERT_STATUS, statuses), (INSERT_SAMPLE, samples), (INSERT_EVENT, list(self.events))):
            if rows:
                session.execute(statement, rows)
        for resource_id, key in self.keys.items():
            session.execute(sqlalchemy.update(Resource).values(host_key=key)
                            .where(Resource.id == resource_id, Resource.host_key.is_(None)))


class Recorder(threading.Thread):
    """The one writer of what polls found; gathers reports for FLUSH seconds and writes them in one transaction."""

    def __init__(self, store: Store, aggregator: HealthAggregator, retention: Retention | None = None) -> None:
        super().__init__(name="recorder", daemon=True)
        self._store, self._aggregator, self._retention = store, aggregator, retention or Retention()
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._rolled = 0                        # Unix time until which averages are made or in the making
        self._untidy: list[int] = []            # ids of resources whose averages are to be made
        self._share = 0                         # how many of them at a time
        self._flushing = threading.Lock()       # guards all below, and the order of what is written
        self._gate_since = time.time()
        self._batch = Batch()
        self._batch.note("gate", "closed (the service starts)", self._gate_since)

    def put(self, report: Report) -> None:
        """Takes a report; transitions are logged at once, in the caller's thread."""
        if report.transition:
            log.log(logging.INFO if report.standing.healthy else logging.WARNING, "%s: %s", report.target.name,
                    report.transition)
        _ = report.status   # made here, one at a time: a hundred at once, in flush, would hold up requests
        self._reports.put(report)

    def run(self) -> None:
        while not self._ending.wait(FLUSH_INTERVAL):
            self.flush()
            self.tidy(time.time())
        self.flush()

    def flush(self) -> None:
        """Writes what was gathered; what cannot be written is kept."""
        with self._flushing:
            try:
                self._gather()
                if not self._batch.latest and not self._batch.events:
                    return
                with self._store.writing() as session:
                    self._batch.write(session)
                self._batch = Batch()
            except Exception as error:  # noqa: BLE001  # a thread's outermost step; the next one tries again
                log.error("the database cannot be written: %s", one_line(str(getattr(error, "orig", error))))

    def tidy(self, now: float) -> bool:
        """Makes averages of the quarters that are over and drops what is too old, for a few resources at a time, since
        it takes a millisecond each; says whether there is more to do."""
        end = int((now - QUARTER_GRACE) // QUARTER) * QUARTER
        if not self._untidy and end == self._rolled:
            return False
        try:
            if not self._untidy:
                with self._store.writing() as session:
                    prune_events(session, self._retention, now)
                    self._untidy, self._rolled = list(session.scalars(sqlalchemy.select(Resource.id))), end
                self._share = len(self._untidy) // TIDY_FLUSHES + 1
            for _ in range(min(self._share, len(self._untidy))):
                resource_id = self._untidy.pop()
                with self._store.writing() as session:
                    roll_up(session, resource_id, self._rolled)
                    prune(session, resource_id, self._retention, now)
        except Exception as error:  # noqa: BLE001  # a thread's outermost step; the next resource follows
            log.error("history cannot be summed up: %s", one_line(str(getattr(error, "orig", error))))
        return bool(self._untidy)

    def _gather(self) -> None:
        transitions = self._aggregator.transitions
        for at, is_open, why in (transitions.get() for _ in range(transitions.qsize())):
            text = (f"{'closed' if is_open else 'open'} -> {'open' if is_open else 'closed'}"
                    f"{f' ({why})' if why else ''} after {at - self._gate_since:.0f} s")
            log.warning("gate: %s", text)
            self._batch.note("gate", text, at)
            self._gate_since = at
        for report in (self._reports.get() for _ in range(self._reports.qsize())):
            self._batch.add(report)
            if report.transition:
                self._batch.note("state", report.transition, report.at, report.target.name)

    def close(self) -> None:
        """Writes the rest and ends the thread."""
        self._ending.set()
        if self.is_alive():
            self.join(LAST_FLUSH)   # not for ever: another program may hold the database
        else:
            self.flush()


@dataclass(frozen=True)
class PollContext:
    """What all pollers share."""

    aggregator: HealthAggregator
    recorder: Recorder
    access: ConnectionContext
    random: random.Random


def poll_once(target: Target, connection: Connection,
              ticks: CpuTicks | None) -> tuple[Verdict, Sample | None, str | None]:
    """One poll of one resource: its verdict, what was read, and a host key trusted on first use."""
    try:
        sample, host_key = collect(target.settings, connection, ticks)
    except ProbeError as error:
        return Verdict("unhealthy", error.cause, str(error)), None, error.host_key
    except Exception:   # a thread's outermost step: whatever a host makes a library raise must not end its watch
        log.exception("%s: the poll failed in an unforeseen way", target.name)
        return Verdict("unhealthy", "protocol", "the poll failed in an unforeseen way; see the log"), None, None
    return evaluate(sample, target.settings), sample, host_key


class Poller(threading.Thread):
    """Polls one resource at its own interval; a thread that waits, connects and reports."""

    def __init__(self, target: Target, watch: PollContext, guard: LoginGuard, standing: Standing, delay: float) -> None:
        super().__init__(name=f"poll {target.name}", daemon=True)
        self.target, self._watch, self._guard = target, watch, guard
        self._connection = CONNECTIONS[target.settings.platform](target, guard, watch.access)
        self._ticks: CpuTicks | None = None
        self._due = time.monotonic() + delay
        self.expires = self._due + target.settings.ttl      # without a report until then it is stale
        self._woken = threading.Event()
        self._asked: queue.SimpleQueue[concurrent.futures.Future[Report | None]] = queue.SimpleQueue()   # see check_now
        self._stopped = False
        self._lock = threading.Lock()       # guards standing and the order of reports: the monitor sets stale
        self.standing = standing

    def run(self) -> None:
        while True:
            woken = self._woken.wait(max(0.0, self._due - time.monotonic()))
            self._woken.clear()     # before the look at _stopped, so that a stop in between is not lost
            if self._stopped:
                return
            if woken:
                self._guard.clear(self.target.name)
            waiting = [self._asked.get() for _ in range(self._asked.qsize())]
            begin = time.monotonic()
            pause, report = self._poll()
            self._due = begin + pause
            for answer in waiting:
                answer.set_result(report)

    def check_now(self) -> concurrent.futures.Future[Report | None]:
        """Polls at once, whatever the back-off; gives the report of that poll."""
        answer: concurrent.futures.Future[Report | None] = concurrent.futures.Future()
        self._asked.put(answer)
        self._woken.set()
        return answer

    def stop(self) -> None:
        """Ends the thread after the poll that runs; its report is dropped when the resource is deregistered."""
        self._stopped = True
        self._woken.set()

    def count(self) -> None:
        """Tells the aggregator the standing once more, for the rest of its time."""
        with self._lock:
            if self.standing.state != "unknown":
                self._watch.aggregator.set_resource(self.target.name, self.standing.healthy, self.standing.why,
                                                    ttl=self.expires - time.monotonic(), owner=self)

    def expire(self) -> None:
        """Makes the resource unhealthy, cause `stale`, when there was no result in time."""
        with self._lock:
            waits = self.standing.cause == "auth" and self._guard.wait(self.target.name, self.target.key_stamp) > 0
            late = time.monotonic() >= self.expires and not waits
        if late:
            self._report(Verdict("unhealthy", "stale", f"no result for {self.target.settings.ttl:.0f} s"), 0.0)

    def _poll(self) -> tuple[float, Report | None]:
        """One poll and its report; returns the seconds from its start to the next, too."""
        settings, begin = self.target.settings, time.monotonic()
        wait = self._guard.wait(settings.name, self.target.key_stamp)
        sample, host_key = None, None
        if wait > 0 and self.standing.cause == "auth":
            return min(wait, settings.interval), None   # a sibling's success may free this one sooner
        if wait > 0:
            verdict = Verdict("unhealthy", "auth", NOT_TRIED)
        else:
            verdict, sample, host_key = poll_once(self.target, self._connection, self._ticks)
        self._ticks = sample.ticks if sample else self._ticks
        if host_key:
            self.target = replace(self.target, host_key=host_key)
        report = self._report(verdict, time.monotonic() - begin, sample, host_key)
        pause = settings.interval if self.standing.decided else min(settings.interval, settings.retry_interval)
        return pause * self._watch.random.uniform(1 - JITTER, 1 + JITTER), report

    def _report(self, verdict: Verdict, seconds: float, sample: Sample | None = None,
                host_key: str | None = None) -> Report | None:
        settings, now = self.target.settings, time.time()
        retry = min(settings.interval, settings.retry_interval)
        with self._lock:
            if verdict.cause == "stale" and time.monotonic() < self.expires:
                return None     # a result came in after all
            stopped, before = self._stopped, self.standing
            after = self.standing = settle(before, verdict, settings, now)
            wait = retry if after.good else settings.interval
            wait = self._guard.wait(settings.name, self.target.key_stamp) if verdict.cause == "auth" else wait
            self.expires = time.monotonic() + settings.ttl + (wait if verdict.cause == "auth" else 0.0)
            self._watch.aggregator.set_resource(
                settings.name, after.healthy, after.why, ttl=settings.ttl, owner=self,
                opens=wait + retry * max(0, settings.rise - after.good - 1))
        report = Report(self.target, before, after, verdict, now, seconds, sample, host_key)
        if not stopped:
            self._watch.recorder.put(report)
        return report


class Monitor(threading.Thread):
    """Starts, stops and reconciles the pollers; restarts dead ones; sees leases expire."""

    def __init__(self, store: Store, vault: Vault, watch: PollContext) -> None:
        super().__init__(name="monitor", daemon=True)
        self._store, self._vault, self._watch = store, vault, watch
        self._pollers: dict[str, Poller] = {}
        self._guards = Guards()
        self._counted: dict[str, bool] = {}         # as the aggregator was told
        self._maintenance: dict[str, float] = {}    # Unix times until which resources do not count
        self._revision = -1
        self._followed = threading.Condition()      # guards _revision; notified when the rows were followed
        self._ending = threading.Event()

    def begin(self) -> None:
        """Registers every resource, takes over fresh stored states and starts everything."""
        self._reconcile()
        self._watch.aggregator.start()
        self._watch.recorder.start()
        self.start()

    def run(self) -> None:
        while not self._ending.wait(MONITOR_INTERVAL):
            try:
                self._sweep()
            except Exception as error:  # noqa: BLE001  # a thread's outermost loop: nothing may end the watch
                log.error("the configuration cannot be taken over: %s: %s", type(error).__name__, one_line(str(error)))

    def close(self) -> None:
        """Ends all threads; polls that still run are left to their deadline."""
        self._ending.set()
        if self.is_alive():
            self.join(1)    # or it would take stopped pollers for dead ones
        for poller in list(self._pollers.values()):
            poller.stop()
        self._watch.recorder.close()

    def poller(self, name: str) -> Poller | None:
        return self._pollers.get(name)

    def catch_up(self) -> None:
        """Waits until the pollers follow the rows as they are now. For any thread."""
        with self._store.reading() as session:
            wanted = revision(session)
        with self._followed:
            self._followed.wait_for(lambda: self._revision >= wanted, 4 * MONITOR_INTERVAL)

    def check_now(self, name: str, timeout: float) -> Report | None:
        """Polls a resource at once and waits until its report is written; None when there was none in `timeout`
        seconds, or there is no such resource. For any thread."""
        poller = self._pollers.get(name)
        try:
            report = poller.check_now().result(timeout) if poller else None
        except concurrent.futures.TimeoutError:
            return None
        self._watch.recorder.flush()
        return report

    def _sweep(self) -> None:
        for name, poller in list(self._pollers.items()):
            if not poller.is_alive() and not self._ending.is_set():
                log.error("%s: its poller died; starting another", name)
                self._launch(poller.target, poller.standing, 0.0, expires=poller.expires)
            poller.expire()
        self._recount()
        self._watch.aggregator.expired()
        with self._store.reading() as session:
            current = revision(session)
        if current != self._revision:
            self._reconcile()
        if any(0 < until <= time.time() for until in self._maintenance.values()):
            self._end_maintenance(time.time())

    def _counts(self, target: Target) -> bool:
        return target.settings.critical and self._maintenance[target.name] <= time.time()

    def _recount(self) -> None:
        """Takes up that maintenance has begun or is over."""
        for name, poller in self._pollers.items():
            if self._counts(poller.target) != self._counted[name]:
                self._register(poller)

    def _register(self, poller: Poller) -> None:
        """Tells the aggregator whether a resource counts; one whose maintenance is over counts as it stands."""
        name, counted = poller.target.name, self._counts(poller.target)
        returns = counted and self._counted.get(name) is False
        self._counted[name] = counted
        self._watch.aggregator.register(name, counted=counted, owner=poller)
        if returns:
            poller.count()

    def _end_maintenance(self, now: float) -> None:
        """Notes that maintenance is over, also when it ended while no service ran."""
        with self._store.writing() as session:
            over = (Resource.maintenance > 0, Resource.maintenance <= now)
            for row in session.scalars(sqlalchemy.select(Resource).where(*over)):
                record_event(session, "change", "maintenance is over", resource=row.name, at=row.maintenance)
                log.info("%s: maintenance is over", row.name)
                row.maintenance, row.maintenance_reason = 0.0, ""
                self._maintenance[row.name] = 0.0

    def _reconcile(self) -> None:
        """Makes the pollers follow the rows."""
        with self._store.reading() as session:
            current, targets = revision(session), load_targets(session, self._vault)
            stored = {row.resource_id: row for row in session.scalars(sqlalchemy.select(Status))}
            ends = session.execute(sqlalchemy.select(Resource.name, Resource.maintenance))
            self._maintenance = {name: until for name, until in ends}
        self._guards.keep(targets.values())
        for name in self._pollers.keys() - targets.keys():
            self._pollers[name].stop()
            self._watch.aggregator.deregister(name)
            del self._pollers[name], self._counted[name]
        self._recount()
        delay = 0.0
        for name, target in targets.items():
            poller = self._pollers.get(name)
            if poller is not None and poller.target == target:
                continue
            standing = Standing()
            known = poller is not None and poller.target.settings_digest == target.settings_digest
            if poller is not None:
                poller.stop()
                standing = poller.standing if known else standing
            if known and poller is not None and target.host_key is None:
                target = replace(target, host_key=poller.target.host_key)   # learned and not written yet
            self._launch(target, standing, delay, None if known else stored.get(target.id))
            delay += 1 / FIRST_POLLS
        with self._followed:
            self._revision = current
            self._followed.notify_all()
        if not any(target.settings.critical for target in targets.values()):
            log.warning("no critical resource is watched: the gate is open whatever happens")

    def _launch(self, target: Target, standing: Standing, delay: float, stored: Status | None = None,
                expires: float = 0.0) -> None:
        """A poller for `target`; a stored state counts on when it is of this configuration and fresh.

        `expires` is that of a poller which died: dying again and again is no result."""
        guard = self._guards.of(target)
        age = time.time() - stored.polled if stored else math.inf
        same = stored is not None and stored.settings_digest == target.settings_digest
        left = target.settings.ttl - age if same and age >= 0 else 0.0
        if stored and (stored.credential, stored.cause) == (target.credential, "auth") and 0 <= age < AUTH_BACKOFF:
            left = target.settings.ttl      # the state stays during the back-off
            if stored.reason != NOT_TRIED:
                guard.refuse(target.name, age, target.key_stamp)
        if stored and left > 0:
            standing = Standing(cast(State, stored.state), cast(Cause, stored.cause), stored.reason, stored.since,
                                stored.good, stored.bad)
        poller = self._pollers[target.name] = Poller(target, self._watch, guard, standing, delay)
        self._register(poller)
        poller.expires = expires or poller.expires
        if left > 0:
            poller.expires = time.monotonic() + left
            poller.count()
        poller.start()


# === Counters ================================================================
# What the workers count, in memory shared with the main process: a slot each, which its worker alone writes, so that
# no lock is shared whose holder may be killed. In a worker, the loop's and the pool's threads take turns at the slot.
# The main process sums the slots up for /-/metrics, and hands the slot of a worker that died on to the next.
# The access log: requests are noted where they were answered, a thread of the worker makes lines of them, and the main
# process writes these into one file.
# Gives: Counters, RequestCounters, AccessLog, AccessFile, LATENCIES, ROWS, ROW, ACCEPTED, QUEUED, OUTCOME
LEAD = 4                        # connections that a worker may hold more than another and still take a crowd
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
TURNS = QUEUED + 1              # the cell of the turns of the loop: one that makes none hangs
SLOT = TURNS + 1


class Counters:
    """What the serving processes count, a slot each. No total ever falls: a slot outlives the process that has it."""

    def __init__(self, slots: int) -> None:
        self.held = multiprocessing.RawArray(ctypes.c_long, [-1] * slots)   # connections; -1: nobody serves there
        self._cells = multiprocessing.RawArray(ctypes.c_double, slots * SLOT)

    def slot(self, index: int) -> memoryview[float]:
        """The cells of a slot, as floats; half the price of asking ctypes."""
        return memoryview(self._cells).cast("B").cast("d")[index * SLOT: (index + 1) * SLOT]

    def vacate(self, index: int) -> None:
        """Says that nobody serves in a slot; its totals stay."""
        self.held[index] = -1
        self.slot(index)[QUEUED] = 0.0

    def turns(self, index: int) -> float:
        """Turns of its loop that the process in a slot has made, and those before it."""
        return self.slot(index)[TURNS]

    def totals(self) -> list[float]:
        """Every cell, summed over the slots."""
        cells = memoryview(self._cells).cast("B").cast("d")
        return [sum(cells[cell::SLOT]) for cell in range(SLOT)]


# --- the access log ---
ACCESS_LINES = 100              # requests that are sent to the main process at once
ACCESS_CHARS, AGENT_CHARS = 1000, 200   # characters that are logged of a request line; of Referer and User-Agent
UNPRINTABLE = re.compile(r'[^ !#-\[\]-~]')  # and what would end a quoted text or begin an escape
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()      # strftime would ask the locale
AccessNote = tuple[float, int, float, str, str, str, str, str, str]     # see access_line


def access_line(note: AccessNote) -> str:
    r"""The combined log format with its query, then milliseconds and outcome; what could end a line becomes \xHH."""
    at, size, seconds, *texts = note
    address, line, status, referer, agent, outcome = (
        UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", text) for text in texts)
    when = datetime.datetime.fromtimestamp(int(at)).astimezone()
    return (f'{address.replace(" ", "_")} - - [{when.day:02}/{MONTHS[when.month - 1]}/{when:%Y:%H:%M:%S %z}] "{line}" '
            f'{status} {size} "{referer}" "{agent}" {seconds * 1e3:.3f} {outcome}\n')


class AccessLog:
    """Notes the requests of a worker, and hands them on to `sink`; while that raises OSError, they are dropped."""

    def __init__(self, sink: Callable[[Sequence[AccessNote]], None]) -> None:
        self._sink, self._lock = sink, threading.Lock()     # guards _notes
        self._notes: list[AccessNote] = []

    def note(self, task: Any, outcome: str, seconds: float) -> None:
        channel, (request, *_) = task.channel, task.channel.requests[:1] or [task.request]
        address, line = (task.environ or {}).get("REMOTE_ADDR", channel.addr[0]), getattr(request, "first_line", b"")
        texts = (request.headers.get(name, "-")[:AGENT_CHARS] for name in ("REFERER", "USER_AGENT"))
        note = (time.time(), channel.body_bytes, seconds, address, line[:ACCESS_CHARS].decode("latin-1"),
                task.status[:3], *texts, outcome)
        with self._lock:
            self._notes.append(note)
        if len(self._notes) >= ACCESS_LINES:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            notes, self._notes = self._notes, []
        if notes:
            with contextlib.suppress(OSError):
                self._sink(notes)


class AccessFile(logging.handlers.WatchedFileHandler):
    """The file, for its owner and group alone (UNIX); opened anew when it was moved away. Raises UsageError."""

    def __init__(self, path: Path) -> None:
        self._quiet_until = 0.0     # no complaint before
        try:
            super().__init__(path, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"service.access_log {path} cannot be written: {error.strerror}") from error

    def _open(self) -> io.TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o640))

    def write(self, notes: Sequence[AccessNote]) -> None:
        """Appends a line each; of a file that cannot be written any more it only complains."""
        try:
            with cast(threading.RLock, self.lock):
                self.reopenIfNeeded()
                self.stream = self.stream or self._open()
                self.stream.writelines(map(access_line, notes))
                self.flush()
        except OSError as error:
            if time.monotonic() >= self._quiet_until:
                log.error("service.access_log %s cannot be written: %s", self.baseFilename, error.strerror)
                self._quiet_until = time.monotonic() + COMPLAINT_INTERVAL


class RequestCounters:
    """What this process counts, in its slot, and its access log."""

    def __init__(self, counters: Counters, slot: int = 0, access_log: AccessLog | None = None) -> None:
        self._counters, self._slot, self.access_log = counters, slot, access_log
        self._cells = counters.slot(slot)
        self._lock = threading.Lock()   # guards _cells against the other threads of the pool

    def request(self, outcome: str, seconds: float) -> None:
        row = ROWS[outcome]
        with self._lock:
            self._cells[row + bisect.bisect_left(LATENCIES, seconds)] += 1
            self._cells[row + ROW - 1] += seconds

    def accepted(self) -> None:
        self._cells[ACCEPTED] += 1      # by the loop's thread alone

    def turn(self, queued: int) -> None:
        """The loop turns, while `queued` requests wait for a pool thread."""
        self._cells[QUEUED] = queued
        self._cells[TURNS] += 1

    def hold(self, connections: int) -> None:
        """Tells the others how many connections this worker holds."""
        self._counters.held[self._slot] = connections

    @property
    def ahead(self) -> bool:
        """Whether this worker holds more connections than its share."""
        least, *others = sorted(held for held in self._counters.held if held >= 0)
        return bool(others) and self._counters.held[self._slot] > least + LEAD

    def flush(self) -> None:
        """Hands on what the access log has noted; about once in a second."""
        if self.access_log is not None:
            self.access_log.flush()

    def close(self) -> None:
        """This process serves no more."""
        self._counters.vacate(self._slot)
        self.flush()


# === Gate ====================================================================
# The application's door, as WSGI: asks the lease on every request, and answers 503 before the application runs unless
# it holds. `route` sorts a request by its path, without blocking; the server runs on its loop what never blocks, and
# `admit`, the application, in the pool, where the lease is asked once more. `load_app` finds the application, in the
# worker that is to run it.
# Gives: Gate, build_gate, respond, Reply, Headers, NO_STORE, PREFIX, HEALTH, METRICS_PATH, HANDLER
RETRY_AFTER_MAX = 3600          # seconds
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><body style="font:1.1rem system-ui;margin:15vh auto;max-width:32rem;padding:1rem">
<h1>{title}</h1><p>{text}</p></body></html>
"""
CLOSED_PAGE = PAGE.format(title="Temporarily unavailable", text="A system that this service depends on is not healthy. "
                      "Please try again in a moment.").encode()
WELCOME = PAGE.format(title="The gate is open", text="HealthChecker's built-in page: put an application of your "
                      "own here with <code>service.app</code> in inventory.yaml. While a resource is unhealthy, it "
                      "answers 503.{console}")
NO_STORE = ("Cache-Control", "no-store")
HTML = ("Content-Type", "text/html; charset=utf-8")
PREFIX = "/-/"                  # everything below is HealthChecker's own
HEALTH = "/-/health"
METRICS_PATH = "/-/metrics"
HANDLER = "healthchecker.handler"   # key of the environ for what `Gate.route` has found
Headers = list[tuple[str, str]]
Reply = tuple[str, Headers, bytes]     # status line, headers, body


def respond(environ: WSGIEnvironment, start_response: StartResponse, answer: Reply) -> Iterable[bytes]:
    """Sends an answer of HealthChecker's own; text/plain unless its headers say otherwise, never cached."""
    status, headers, body = answer
    if not status.startswith("204"):
        if not any(name == "Content-Type" for name, _ in headers):
            headers = [*headers, ("Content-Type", "text/plain; charset=utf-8")]
        headers = [*headers, ("Content-Length", str(len(body)))]
    start_response(status, [*headers, NO_STORE])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


class Gate:
    """WSGI: the application answers while the lease holds; otherwise 503."""

    def __init__(self, app: WSGIApplication, lease: Lease, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._lease, self._clock = app, lease, clock
        self._until = lease.until
        self.draining = False       # the service ends: readyz says so
        self._routes: dict[str, Callable[[], Reply]] = {
            "/-/livez": lambda: ("200 OK", [], b"ok\n"),
            "/-/readyz": self._readyz,
            "/-/gate": lambda: ("204 No Content", [], b"") if self.is_healthy() else ("403 Forbidden", [], b""),
            HEALTH: self._health,
        }

    def is_healthy(self) -> bool:
        """The gate's answer, also for the application: environ["healthchecker.is_healthy"]()."""
        return self._clock() < self._until.value

    def route(self, path: str) -> WSGIApplication:
        """What answers a request for `path`: `admit`, which may block, or what never does."""
        if path.startswith(PREFIX):
            return self._own
        return self.admit if self._clock() < self._until.value else self._refuse

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        handler: WSGIApplication = environ.pop(HANDLER, None) or self.route(environ["PATH_INFO"])
        return handler(environ, start_response)

    def admit(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The application's answer, unless the gate has closed while the request waited for a thread."""
        if not self.is_healthy():
            return self._refuse(environ, start_response)
        if environ.get("HTTP_UPGRADE", "").lower() == "websocket":
            return respond(environ, start_response, ("501 Not Implemented", [], b"no websockets are served here\n"))
        environ["healthchecker.is_healthy"] = self.is_healthy
        return self._app(environ, start_response)

    def shed(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """For a request that no thread has time for."""
        return self._refuse(environ, start_response, "shed")

    def _own(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ[OUTCOME] = "own"
        route = self._routes.get(environ["PATH_INFO"])
        if route is None:
            return respond(environ, start_response, ("404 Not Found", [], b"not found\n"))
        if route == self._health and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return respond(environ, start_response, ("405 Method Not Allowed", [("Allow", "GET, HEAD")], b""))
        return respond(environ, start_response, route())

    def _readyz(self) -> Reply:
        if self.draining:
            return "503 Service Unavailable", [], b"ending\n"
        if self.is_healthy():
            return "200 OK", [], b"open\n"
        return "503 Service Unavailable", [self._retry_after()], b"closed\n"

    def _health(self) -> Reply:
        healthy = self.is_healthy()
        body = json.dumps({"status": "pass" if healthy else "fail"}).encode()
        kind = ("Content-Type", "application/health+json")
        return "200 OK" if healthy else "503 Service Unavailable", [kind], body

    def _retry_after(self) -> tuple[str, str]:
        """Seconds to the soonest moment at which the gate can open; 1 when it is open, and the pool full."""
        wait = math.ceil(self._lease.opens.value - self._clock())
        return "Retry-After", str(min(max(wait, 1), RETRY_AFTER_MAX))

    def _refuse(self, environ: WSGIEnvironment, start_response: StartResponse,
                outcome: str = "refused") -> Iterable[bytes]:
        environ[OUTCOME] = outcome
        retry = self._retry_after()
        kind, body = HTML, CLOSED_PAGE
        if "text/html" not in environ.get("HTTP_ACCEPT", ""):
            kind = ("Content-Type", "application/json")
            body = b'{"status": 503, "title": "Service Unavailable", "retry_after": %s}\n' % retry[1].encode()
        return respond(environ, start_response, ("503 Service Unavailable", [kind, retry], body))


def builtin_app(service: ServiceSettings) -> WSGIApplication:
    """The page shown behind the gate until `service.app` names an application."""
    app = flask.Flask("healthchecker.builtin")
    console = "" if service.console == "off" else (
        f' Operators: the <a href="http://{service.console}/-/">console</a>.')
    app.add_url_rule("/", "welcome", lambda: WELCOME.format(console=console))
    return app


def load_app(name: str, folder: Path) -> WSGIApplication:
    """Imports `module:callable` with `folder` first on the path; raises UsageError."""
    module, _, attribute = name.partition(":")
    if str(folder) not in sys.path[:1]:
        sys.path.insert(0, str(folder))
    try:
        app: Any = importlib.import_module(module)
        for part in attribute.split("."):
            app = getattr(app, part)
    except (Exception, SystemExit) as error:    # the user's own code may raise anything
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise UsageError(f"service.app {name} cannot be imported: {reason}") from error
    if not callable(app):
        raise UsageError(f"service.app {name} is not callable")
    return cast("WSGIApplication", app)


def build_gate(service: ServiceSettings, folder: Path, lease: Lease) -> Gate:
    """The gate in front of the application of the inventory in `folder`. Raises UsageError."""
    return Gate(load_app(service.app, folder) if service.app else builtin_app(service), lease)


# === HTTP ====================================================================
# Requests, read more strictly than by waitress, whose own parser lets pass what hides one request in another: what two
# programs could understand in two ways is refused, and what is too large. The loop's thread feeds the parser what has
# come. And who asks, behind a proxy: a WSGI middleware, for the application's door and for the console's.
# Gives: GateParser, BadRequest, ForwardedHeaders, plain_address, HEADER_BYTES
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
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;%b+(?:=(?:%b+|%b))?)*\r\n" % (TOKEN, TOKEN, QUOTED))
FORWARDED_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::[0-9]{1,5})?|([0-9A-Fa-f:.]+)")
FORWARDED = re.compile("HTTP_(?:X_FORWARDED.*|FORWARDED)")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


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
                if said and self._is_proxy(plain_address(environ["REMOTE_ADDR"].partition("%")[0])):
                    self._believe(environ, said)
            except ValueError:
                environ[OUTCOME] = "bad"
                return respond(environ, start_response, ("400 Bad Request", [], b"400 Bad Request\n"))
        return self._app(environ, start_response)

    def _is_proxy(self, address: Address) -> bool:
        return any(address in network for network in self._networks)

    def _believe(self, environ: WSGIEnvironment, said: Mapping[str, str]) -> None:
        """Raises ValueError for what is malformed."""
        if "HTTP_X_FORWARDED_FOR" in said:
            for element in reversed(said["HTTP_X_FORWARDED_FOR"].split(",")):
                match = FORWARDED_ADDRESS.fullmatch(element.strip(" \t"))
                client = plain_address(match[1] or match[2] or match[3] if match else "")
                if not self._is_proxy(client):
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
        self._line = b""
        self._chunk_over = False    # the next line is the empty one that ends a chunk
        self._last = False          # it is the last chunk, the one of no bytes

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
        self._line += part
        self._framing += len(part)
        if self._framing > HEADER_BYTES + len(self):
            raise BadRequest
        if self._chunk_over:
            if not b"\r\n".startswith(self._line):
                raise BadRequest
            if len(self._line) == 2:
                self._line, self._chunk_over, self.completed = b"", False, self._last
        elif self._line.endswith(b"\n"):
            self._begin(self._line)
            self._line = b""

    def _begin(self, line: bytes) -> None:
        match = CHUNK_LINE.fullmatch(line)
        if not match:
            raise BadRequest
        self._left = int(match[1], 16)
        if len(self) + self._left > self._limit:
            raise too_large(self._limit)
        self._chunk_over, self._last = True, not self._left


class GateParser(HTTPRequestParser):    # type: ignore[misc]  # waitress carries no types
    """One request, read strictly: what two programs could understand in two ways is refused, and what is too large.

    waitress's own parser lets pass much of what hides one request in another (RFC 9112, section 11.2).
    """

    version = "1.1"     # of the answer to a request that does not tell its own
    command = path = query = request_uri = ""
    headers: dict[str, str]
    header_plus: bytes      # of the headers what has come so far
    handler: WSGIApplication | None = None      # what answers it

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
        self.first_line = header_plus.partition(b"\r\n")[0]     # also of what is refused, for the access log
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
# Gives: GateServer, connection_limit, listen, bound_address, BACKLOG
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
ACCEPT_PAUSE = 0.5              # seconds without accepting when the system has no descriptor left
CONNECTIONS_MAX = 100_000       # client connections, where the system knows no limit
BACKLOG = 1024                  # connections that wait to be accepted
POOL_BUFFER = 16 << 20          # bytes of a response that wait for a slow client before its pool thread does
SEND_BYTES = 1 << 16            # bytes of a response that are gathered before they are sent
SHORT_TURN = 0.01               # seconds that the loop waits at most while something is to be looked at again
LAST_ASK = 0.25                 # seconds in which clients that were answered just before may still ask then


class Pool:
    """Threads that answer requests, with a bound on those that wait for one."""

    def __init__(self, threads: int, bound: int) -> None:
        self._bound, self._unfinished, self._lock = bound, 0, threading.Lock()  # guards _unfinished
        self._tasks: queue.SimpleQueue[HTTPChannel | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests that no thread is free for."""
        return max(0, self._unfinished - len(self._threads))

    @property
    def full(self) -> bool:
        return self._unfinished >= len(self._threads) + self._bound

    def add_task(self, task: HTTPChannel) -> None:
        with self._lock:
            self._unfinished += 1
        self._tasks.put(task)

    def shutdown(self, timeout: float) -> None:
        """Ends the threads, within `timeout` seconds; what no thread has begun is not answered."""
        with contextlib.suppress(queue.Empty):
            while task := self._tasks.get_nowait():
                task.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        ends = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))

    def _work(self) -> None:
        while task := self._tasks.get():
            task.service()
            with self._lock:
                self._unfinished -= 1


class GateTask(WSGITask):    # type: ignore[misc]  # waitress carries no types
    """One request; an application cannot end the service, and a service that ends says so to its clients."""

    def get_environment(self) -> WSGIEnvironment:
        environ: WSGIEnvironment = super().get_environment()
        environ.update(self.channel.server.environment)
        environ[HANDLER] = self.request.handler
        return environ

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
                self.channel.served(self, outcome)

    def build_response_header(self) -> bytes:
        if self.channel.server.gate.draining and self.channel.asks_no_more:
            self.request.headers["CONNECTION"] = "close"
        self.channel.holds = True
        return cast(bytes, super().build_response_header())


class HeadTask(GateTask):
    """A request by HEAD, whose answer has no body, whatever the application makes."""

    def get_environment(self) -> WSGIEnvironment:
        environ = super().get_environment()
        del environ["wsgi.file_wrapper"]    # such a file would not go through `write`
        return environ

    def write(self, _data: bytes) -> None:
        super().write(b"")

    def finish(self) -> None:
        self.chunked_response = False       # what is not sent does not end either
        super().finish()


class GateErrorTask(ErrorTask):    # type: ignore[misc]  # waitress carries no types
    """The last answer on a connection: to a request that the parser refused, or whose application failed."""

    environ = None

    def service(self) -> None:
        error, server = self.request.error, self.channel.server
        try:
            super().service()
        finally:
            self.channel.body_bytes = self.content_length or 0
            self.channel.served(self, "5xx" if isinstance(error, InternalServerError) else "bad")
        if str(error).startswith("service."):
            server.complain(f"a request was refused, for {error}")

    def finish(self) -> None:
        super().finish()
        self.channel.lingers = True


class GateChannel(HTTPChannel):    # type: ignore[misc]  # waitress carries no types
    """A client's connection: it ends when the client is too slow in asking, or in taking its answer."""

    error_task_class, parser_class = GateErrorTask, GateParser
    will_close: bool
    close_when_flushed: bool
    began = 0.0             # when the request was complete
    body_bytes = 0          # of the answer, so far; with the framing of chunks
    holds = False           # what comes next is a head, and waits for the first of its body
    held = False            # its next request waits until enough of the answers before it is taken
    watched = 0             # what the loop waits for on it, selectors' events
    touched = False         # the loop is to look at it
    taken_at = 0.0          # when the client last took something, or was first to
    lingers = False         # the answer is the last; what still comes is thrown away
    _discarded = 0          # bytes of that
    _lingers_until = math.inf

    def __init__(self, server: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(server, *arguments, **named)
        self._seen, self._since = self.last_activity, server.clock()    # the wall clock only as a mark: it may jump

    @staticmethod
    def task_class(channel: GateChannel, request: GateParser) -> GateTask:
        return (HeadTask if request.command == "HEAD" else GateTask)(channel, request)

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

    def write_soon(self, data: Any) -> int:
        holds, self.holds = self.holds, False
        taken = int(super().write_soon(data))
        if not holds:
            self.body_bytes += taken
            self.server.loop.touch(self)
        return taken

    def send(self, data: bytes, do_close: bool = True) -> int:
        if not data:
            raise BrokenPipeError("a file that is sent was cut")
        sent = int(super().send(data, do_close))
        if sent:
            self.taken_at = self.server.clock()
        return sent

    def handle_write(self) -> None:
        """As waitress, but what a task has written so far is sent, however little it is."""
        self._flush_exception(self._flush_some_if_lockable if self.requests else self._flush_some)
        if self.close_when_flushed and not self.total_outbufs_len and self.connected:
            self.close_when_flushed = False
            self._take_leave()
        if self.will_close:
            self.handle_close()

    def _take_leave(self) -> None:
        """Of a refused client it waits for the end: closing on unread bytes would destroy the answer."""
        self.will_close = not self.lingers
        if self.lingers:
            self._lingers_until = self.server.clock() + LINGER_TIME
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:
                self.will_close = True

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

    def _flush_some(self, do_close: bool = True) -> bool:
        if self.request is None:
            return bool(super()._flush_some(do_close))
        with self.outbuf_lock:      # a thread may send a 100 Continue for it while the loop sends what is left
            return bool(super()._flush_some(do_close))

    @property
    def asks_no_more(self) -> bool:
        """Whether nothing has come behind the request that is answered now."""
        with self.requests_lock:
            return len(self.requests) == 1 and self.request is None

    def served(self, task: Any, outcome: str) -> None:
        """A request is answered: counts it and takes a note of it."""
        seconds, tally = time.perf_counter() - self.began, self.server.tally
        tally.request(outcome, seconds)
        if tally.access_log is not None:
            tally.access_log.note(task, outcome, seconds)

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
            patience = FIRST_BYTE if self._seen == self.creation_time else KEEP_ALIVE
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
        except OSError:     # the system lacks memory: one connection ends, not all
            channel.watched = 0
            if isinstance(channel, GateChannel):
                channel.will_close = True
                self.touch(channel)
        if channel.watched & selectors.EVENT_WRITE and isinstance(channel, GateChannel):
            channel.taken_at = channel.server.clock()
            self.sending.add(channel)
        else:
            self.sending.discard(channel)

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

    def close(self) -> None:
        self._selector.close()


def on_one_line(record: logging.LogRecord) -> bool:
    """For waitress's log, in whose lines the path of a request may have line breaks."""
    record.msg, record.args = one_line(record.getMessage()), ()
    return True


class GateServer(TcpWSGIServer):    # type: ignore[misc]  # waitress carries no types
    """waitress on a socket that is bound already, with our loop: serves until `stop`, then drains.

    It watches its clients' time, and lives on when there is no room for another one.
    """

    channel_class = GateChannel
    selector_class: type[selectors.BaseSelector] = selectors.DefaultSelector
    clock: Callable[[], float] = staticmethod(time.monotonic)
    accepting: bool
    watched = 0         # what the loop waits for on the listening socket
    _next_sweep = _accepts_at = _next_complaint = 0.0   # by the clock
    _pressed = False    # since the last sweep there was no room

    def __init__(self, gate: Gate, sock: socket.socket, service: ServiceSettings, connections: int,
                 tally: RequestCounters | None = None) -> None:
        threads = service.app_threads
        adjustments = Adjustments(
            threads=max(1, threads), connection_limit=connections, ident=None, backlog=BACKLOG,
            clear_untrusted_proxy_headers=False, max_request_body_size=service.body_limit,
            outbuf_high_watermark=min(POOL_BUFFER, service.send_buffer // 2))
        adjustments.send_bytes = SEND_BYTES
        self.gate, self._service, self._ready = gate, service, collections.deque[GateChannel]()
        self.environment = {"SERVER_SOFTWARE": "HealthChecker", "wsgi.multithread": threads > 1,
                            "wsgi.multiprocess": service.worker_count > 1}
        self.tally = tally or RequestCounters(Counters(1))
        self.tally.hold(0)      # it is there for the others, who would take all before its first turn
        self.waited_for: set[GateChannel] = set()       # by a thread each
        self._ends = self._idle_end = math.inf
        self.pool = Pool(threads, service.queue)
        self.sockets: Sequence[socket.socket] = [sock]      # more where its name has several addresses
        logging.getLogger("waitress").addFilter(on_one_line)
        sockinfo = (sock.family, sock.type, sock.proto, sock.getsockname())
        super().__init__(ForwardedHeaders(gate, service.trusted_proxy), {}, True, sock, dispatcher=self.pool,
                         adj=adjustments, sockinfo=sockinfo, bind_socket=False)
        self.loop = Loop(self.selector_class(), self.trigger)

    def set_reuse_addr(self) -> None:
        """Nothing: the socket is bound, and on Windows the option would let another server share its port."""

    def pull_trigger(self) -> None:
        """Nothing: waitress wakes its loop after each answer; ours is told by `touch` of what it is needed for."""

    def add_task(self, channel: GateChannel) -> None:
        """Leaves what cannot block, or has no room to wait, to the loop's own thread, and the rest to a pool: the
        hand-over of the interpreter lock costs more than most answers. Called with the channel's lock held."""
        request, gate = channel.requests[0], self.gate
        channel.began, channel.body_bytes = time.perf_counter(), 0
        if request.error is None:
            path = request.path     # of several slashes before it waitress makes one
            request.handler = gate.route("/" + path.lstrip("/") if path.startswith("//") else path)
            if request.handler == gate.admit and self._service.app_threads:
                if not self.pool.full:
                    self.pool.add_task(channel)
                    return
                request.handler = gate.shed
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
            self.tally.flush()
        if len(self._map) >= self.adj.connection_limit:
            self._pressed = True
            self.complain("as many connections as allowed are open; idle ones are closed sooner")
            return False
        return bool(self.accepting) and now >= self._accepts_at

    def handle_accept(self) -> None:
        """Takes a crowd, for one per turn starves it; but one alone while others have less to do."""
        for _ in range(ACCEPTS_PER_TURN if self.accepting else BACKLOG):
            held = len(self.active_channels)
            super().handle_accept()
            self.tally.hold(len(self.active_channels))
            if len(self.active_channels) == held or (self.accepting and self.tally.ahead):
                return

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
        with contextlib.closing(self.loop):
            while not self._drained():      # asked right after all that has come was read
                self._turn()
            self._note_cut()
            self.tally.close()
            self.pool.shutdown(POOL_END)
            wasyncore.close_all(self._map)

    def _turn(self) -> None:
        """Answers what has come, sends what is to be sent, and waits."""
        for _ in range(len(self._ready)):       # who has sent ahead takes turns with the others
            self._ready.popleft().service()
        self.loop.attend()
        self.tally.hold(len(self.active_channels))
        self.tally.turn(self.pool.waiting)
        self.loop.watch(self, selectors.EVENT_READ if self.readable() else 0)
        hurried = self.gate.draining or (self.loop.sending and self._cut_slow_readers(self.clock()))
        self.loop.wait(0 if self._ready else SHORT_TURN if hurried else self.adj.asyncore_loop_timeout)

    def _cut_slow_readers(self, now: float) -> bool:
        """Where more than `service.send_buffer` waits to be sent, or half of the pool waits for clients while requests
        wait for it, cuts those who have not taken anything for longest; whether to look again soon."""
        sending, limit = self.loop.sending, self._service.send_buffer
        waits, blocked = sum(channel.total_outbufs_len for channel in sending), list(self.waited_for)
        starved = bool(self.pool.waiting) and 2 * len(blocked) >= self.adj.threads
        if waits <= limit and not starved:
            return False
        readers = sorted(blocked if starved else sending, key=lambda channel: channel.taken_at)
        spared = (self.adj.threads - 1) // 2 if starved else 1      # so that a lone reader gets all of its answer
        for channel in readers[:max(0, len(readers) - spared)]:
            if now - channel.taken_at < READER_PAUSE * min(1.0, limit / waits) or not (starved or waits > limit):
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
        cut = [(channel, request) for channel in self.active_channels.values() for request in channel.requests[:1]]
        for channel, request in cut:
            task = GateTask(channel, request)
            task.status = "000"     # it is not known whether its head was sent
            channel.served(task, "cut")
        if cut:
            drain = self._service.drain
            log.warning("requests cut, for they took longer than service.drain, %g s: %d", drain, len(cut))


def listen(setting: str, value: str) -> socket.socket:
    """Binds the address:port that `setting` of the inventory names; raises UsageError."""
    host, _, port = value.rpartition(":")
    try:
        answers = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = answers[0]
        sock = socket.socket(family, kind, protocol)
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        strerror = getattr(error, "strerror", None) or "not a host name"
        raise UsageError(f"cannot listen on {value}: {one_line(strerror)}; "
                         f"is another program using it? Set {setting}") from error
    return sock


def bound_address(sock: socket.socket) -> str:
    """address:port of a socket, as a URL has it."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connection_limit(resources: int) -> int:
    """Connections that may be served at once; on UNIX after raising the limit of open files as far as allowed."""
    if sys.platform == "win32":
        return 400      # select takes 512 sockets there
    import resource  # noqa: PLC0415  # POSIX only
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    files = CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else soft
    return max(100, min(CONNECTIONS_MAX, files - 4 * resources - 100))      # polls and the database need some


# === Workers =================================================================
ORPHAN_DRAIN = 2.0              # seconds for requests in flight of a worker whose main process died
PIPE_WAITING = 100              # messages to the main process, beyond which no lines of the access log are added
LAST_WORDS = 0.2                # seconds in which what a dead worker said is read
SUPERVISOR_INTERVAL = 0.05      # seconds between two looks at the worker processes
START_NEWS = 5.0                # seconds between two lines about a start that takes long
WORKER_LIFE = 10.0              # seconds after which a worker's end is no sign that it can never run
WORKER_PAUSES = (0.0, 0.5, 1, 2, 5, 10, 30)  # seconds before the 1st, 2nd, … replacement of short-lived workers
WORKER_END = 2.0                # seconds between the end of draining and the end of the process


class MessagePipe:
    """One end of the pipe between the main process and a worker; who puts never waits for the other side.

    One thread sends what was put, another gives what comes to `receive`, and None when the other side has ended.
    """

    def __init__(self, pipe: PipeConnection, receive: Callable[[Any], None]) -> None:
        self._pipe, self._receive = pipe, receive
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = itertools.count()     # of both threads
        self._threads = [threading.Thread(target=run, name="pipe", daemon=True) for run in (self._send, self._listen)]

    def open(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Messages that were put and not sent yet."""
        return self._out.qsize()

    def put(self, *message: Any) -> None:
        self._out.put(message)

    def close(self, wait: float) -> None:
        """Ends the sending thread after what was put."""
        self._out.put(None)
        self._threads[0].join(wait)

    def join(self, wait: float) -> None:
        """Waits until everything that the other side sent before its end was received."""
        self._threads[1].join(wait)

    def _send(self) -> None:
        with contextlib.suppress(OSError):      # the other side has ended; the listener tells
            while (message := self._out.get()) is not None:
                self._pipe.send(message)
        self._end()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._receive(self._pipe.recv())
        self._receive(None)
        self._end()

    def _end(self) -> None:
        """The second thread to end closes the pipe: nobody uses it then."""
        if next(self._ended):
            self._pipe.close()


class PipeLogHandler(logging.Handler):
    """Logs through the main process: one process writes the log."""

    def __init__(self, pipe: MessagePipe) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._pipe.put("log", record.levelno, self.format(record))
        except Exception:       # noqa: BLE001  # as every handler: a faulty call must not fail whoever logs
            self.handleError(record)


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker process is given."""

    number: int
    service: ServiceSettings
    folder: Path        # of the inventory, where the application is looked for
    sock: socket.socket
    lease: Lease
    counters: Counters
    pipe: PipeConnection

    def keep(self) -> None:
        """Lets no process that the application starts have port and pipe: it may outlive the service."""
        if sys.platform != "win32":     # where it inherits nothing by itself
            self.sock.set_inheritable(False)
            os.set_inheritable(self.pipe.fileno(), False)
            os.register_at_fork(after_in_child=self.close)

    def close(self) -> None:
        self.sock.close()
        self.pipe.close()


def keep_out_of_collections() -> None:
    """What was made until now stays; a look of the collector through these 100,000 objects holds all up for 60 ms."""
    gc.collect()
    gc.freeze()


class Worker:
    """In a worker process: serves from the main process's word on until it says stop, or dies."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._pipe = MessagePipe(config.pipe, self._receive)
        self._told = threading.Event()      # what to do: serve, or end
        self._ending = False
        self._server: GateServer | None = None

    def run(self) -> None:
        config, service = self._config, self._config.service
        self._pipe.open()
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[PipeLogHandler(self._pipe)], force=True)
        try:
            gate = build_gate(service, config.folder, config.lease)
            self._server = GateServer(gate, config.sock, service, connection_limit(0),
                                      RequestCounters(config.counters, config.number, self._access_log(service)))
        except HealthCheckerError as error:
            self._pipe.put("failed", str(error))
            return
        keep_out_of_collections()
        self._pipe.put("ready")
        self._told.wait()
        if not self._ending:
            self._server.serve()

    def _access_log(self, service: ServiceSettings) -> AccessLog | None:
        """The main process writes the file."""
        if not service.access_log:
            return None
        return AccessLog(self._send_lines)

    def _send_lines(self, lines: Sequence[AccessNote]) -> None:
        if self._pipe.waiting > PIPE_WAITING:
            raise BlockingIOError(errno.EAGAIN, "the main process does not read")
        self._pipe.put("lines", lines)

    def close(self) -> None:
        """What the application left running does not keep the process."""
        self._pipe.close(WORKER_END / 2)
        self._end_after(0.0)

    @staticmethod
    def _end_after(seconds: float) -> None:
        """Ends the process a little later, whatever it is at by then."""
        ending = threading.Timer(seconds + WORKER_END / 2, os._exit, (0,))
        ending.daemon = True
        ending.start()

    def _receive(self, message: Any) -> None:
        """In the pipe's thread: None, the main process died."""
        if message != ("serve",):
            self._ending, drain = True, min(self._config.service.drain, math.inf if message else ORPHAN_DRAIN)
            if self._server:
                self._server.stop(drain)
            self._end_after(drain if self._server else 0.0)
        self._told.set()


def quiet_libraries() -> None:
    """They repeat what we report."""
    for name in ("paramiko", "pypsrp", "urllib3", "spnego"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Signals that end the service wait meanwhile; a process started here is born with them held (POSIX)."""
    if sys.platform != "win32":
        resource_tracker.ensure_running()   # started below, it would let the signals pass
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)


def run_worker(config: WorkerConfig) -> None:
    """The main function of a worker process."""
    for number in ENDINGS:      # it ends through its pipe; SIG_IGN would be inherited by what the application starts
        signal.signal(number, lambda *_: None)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    config.keep()
    quiet_libraries()
    worker = Worker(config)
    try:
        worker.run()
    finally:
        worker.close()


class WorkerProcess:
    """In the main process: one worker process, from its start to its end."""

    def __init__(self, number: int, process: multiprocessing.process.BaseProcess, pipe: PipeConnection,
                 access_file: AccessFile | None) -> None:
        self.number, self.process, self.born = number, process, time.monotonic()
        self._access_file = access_file
        self.pipe = MessagePipe(pipe, self._receive)
        self.ready = threading.Event()
        self.failure = ""

    @property
    def alive(self) -> bool:
        """Whether the process runs; when not, everything it said was heard."""
        if self.process.is_alive():
            return True
        self.pipe.join(LAST_WORDS)      # a child process of the application may hold the pipe open
        return False

    @property
    def why(self) -> str:
        return self.failure or f"worker {self.number} ended with exit code {self.process.exitcode}"

    def _receive(self, message: Any) -> None:
        """In the pipe's thread."""
        if message is None:
            self.pipe.close(0)
        elif message[0] == "ready":
            self.ready.set()
        elif message[0] == "failed":
            self.failure = message[1]
        elif message[0] == "log":
            log.log(message[1], "worker %d: %s", self.number, message[2])
        elif message[0] == "lines" and self._access_file:
            self._access_file.write(message[1])


class Supervisor:
    """The worker processes on one listening socket: starts them, replaces those that die, ends them."""

    def __init__(self, service: ServiceSettings, folder: Path, sock: socket.socket, lease: Lease,
                 access_file: AccessFile | None = None) -> None:
        """`folder` is the inventory's, where `service.app` is looked for."""
        self._service, self._folder, self._sock, self._lease = service, folder, sock, lease
        self._access_file = access_file
        sock.setblocking(False)     # on Windows each start of a worker sets this process's mode in all of them
        self._count = service.worker_count
        self.counters = Counters(self._count)
        self._workers: list[WorkerProcess] = []
        self._short = [0] * self._count             # short lives in a row, by worker
        self._due: dict[int, float] = {}            # when to replace those that died or could not be started
        self._stopping = False

    def start(self) -> None:
        """Starts all and waits until they can serve. Raises UsageError where the application cannot be loaded."""
        for number in range(self._count):
            if not self._stopping:
                self._workers.append(self._launch(number))    # known at once: the next one may fail
        news = time.monotonic() + START_NEWS
        while not self._stopping and not all(worker.ready.is_set() for worker in self._workers):
            for worker in self._workers:
                if not worker.alive:
                    raise UsageError(worker.why)
            time.sleep(SUPERVISOR_INTERVAL)
            if time.monotonic() > news:
                news += START_NEWS
                ready = sum(worker.ready.is_set() for worker in self._workers)
                log.info("%d of %d worker processes are ready", ready, self._count)

    def stop(self) -> None:
        """Ends `serve`. Safe in a signal handler."""
        self._stopping = True

    def serve(self) -> None:
        """Lets the workers serve until `stop`."""
        for worker in self._workers:
            worker.pipe.put("serve")
        while not self._stopping:
            self._replace(time.monotonic())
            time.sleep(SUPERVISOR_INTERVAL)

    def close(self) -> None:
        """Lets the workers answer what they are at, `service.drain` seconds at most, and ends them."""
        self._sock.close()
        for worker in self._workers:
            worker.pipe.put("stop")
            if not worker.ready.is_set():     # it serves nobody, and would be at its imports for long
                worker.process.kill()
        ends = time.monotonic() + self._service.drain + WORKER_END
        for worker in self._workers:
            while worker.alive and time.monotonic() < ends:   # join would wait for what the application forked, too
                time.sleep(SUPERVISOR_INTERVAL)
            if worker.alive:
                log.warning("worker %d does not end and is killed", worker.number)
                worker.process.kill()
                worker.process.join()

    def _launch(self, number: int) -> WorkerProcess:
        context = multiprocessing.get_context("spawn")      # the same on every system
        ours, theirs = context.Pipe()
        config = WorkerConfig(number, self._service, self._folder, self._sock, self._lease, self.counters, theirs)
        process = context.Process(target=run_worker, args=(config,), name=f"worker {number}")
        with signals_held():
            process.start()
        theirs.close()      # or the worker's end would not be seen
        worker = WorkerProcess(number, process, ours, self._access_file)
        worker.pipe.open()
        return worker

    def _replace(self, now: float) -> None:
        for worker in self._workers:
            number = worker.number
            if number not in self._due and not worker.alive:
                self.counters.vacate(number)
                if worker.ready.is_set() and now - worker.born >= WORKER_LIFE:
                    self._short[number] = 0
                self._put_off(number, now, f"{worker.why}; starting another")
        for number in [number for number, due in self._due.items() if due <= now]:
            try:
                worker = self._launch(number)
            except OSError as error:    # no descriptors, memory or processes are left: that may pass
                self._put_off(number, now, f"worker {number} cannot be started: {error.strerror}; trying again")
                continue
            worker.pipe.put("serve")
            self._workers[number].process.close()
            self._workers[number] = worker
            del self._due[number]

    def _put_off(self, number: int, now: float, why: str) -> None:
        """Plans the next start of a worker; each in a row comes later."""
        self._due[number] = now + WORKER_PAUSES[min(self._short[number], len(WORKER_PAUSES) - 1)]
        self._short[number] += 1
        log.error("%s", why)


# === Accounts ================================================================
PASSWORD_LENGTH = 12            # characters of a user's password at least
SESSION_KEY_BYTES = 32          # bytes of keys/session.key
SESSION_IDLE = 1800.0           # seconds without a request until it ends
LOGIN_FAILURES = 5              # of an account from an address, after which the next login waits
LOGIN_WINDOW = 300.0            # seconds for which a failed login counts
LOGINS_KEPT = 10_000            # accounts and addresses with failures that are remembered
POLL_NOW_TIMEOUT = 60.0         # seconds that a request waits for a poll
TRIAL_TIMEOUT = 30.0            # seconds of a poll with settings that are not stored
FIRST_USER = ("SpiceWorks", "HealthChecker")  # of the specification; its password is to be changed
LIVES = {"session": (SESSION_LIFE, SESSION_IDLE), "token": (TOKEN_LIFE, TOKEN_LIFE)}    # seconds: in all, idle


def not_documented(password: SecretStr) -> SecretStr:
    if password.get_secret_value() == FIRST_USER[1]:
        raise ValueError("must not be the documented one")
    return password


Role = Literal["admin", "viewer"]
Password = Annotated[SecretStr, Field(min_length=PASSWORD_LENGTH, max_length=SECRET_LENGTH),
                     AfterValidator(not_documented)]
Claimed = Annotated[SecretStr, Field(max_length=SECRET_LENGTH)]     # a password that is to be verified


class Credentials(Settings):
    """What a login takes."""

    username: Annotated[str, Field(max_length=NAME_CHARS)]
    password: Claimed


class PasswordChange(Settings):
    """A user's own new password."""

    current: Claimed
    new: Password


class NewUser(Settings):
    """A user to add."""

    name: Name
    password: Password
    role: Role = "viewer"


class UserChange(Settings):
    """What an admin changes of a user; what is left out stays."""

    password: Password | None = None
    role: Role | None = None


def field_errors(fields: Mapping[str, str]) -> ApiError:
    """Bad input, with what is wrong with each field."""
    return ApiError("; ".join(f"{name}: {text}" for name, text in fields.items()), 422, fields)


M = TypeVar("M", bound=Settings)


def validated(model: type[M], body: Mapping[str, Any], *, text: bool = False) -> M:
    """`body` as a model; with `text` its values may be texts, as those of the inventory are. Raises Refusal."""
    try:
        return model.model_validate(body) if text else model.model_validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        raise field_errors({".".join(map(str, item["loc"])): message_of(cast("dict[str, Any]", item))
                          for item in error.errors(include_url=False, include_input=False)}) from None


class SettingsReader(InventoryLoader):
    """Reads one resource from a request, by the rules of the inventory; `fields` gathers what is wrong with which."""

    def __init__(self, inventory: Path, *, text: bool) -> None:
        super().__init__(inventory, Document(None, {}, {}, []))
        self.text = text
        self.fields: dict[str, str] = {}

    def read(self, given: Mapping[str, Any], stored: Mapping[str, Any]) -> Entry:
        """`given` over `stored`; null stands for the default. Raises Refusal."""
        defaults = {name for name in ResourceSettings.model_fields if given.get(name, "") is None}
        entry = self._entry(0, {name: value for name, value in given.items() if name not in defaults},
                            {name: value for name, value in stored.items() if name not in defaults})
        if entry is None or self.fields:
            raise field_errors(self.fields)
        return entry

    def fault(self, path: NodePath, message: str, *, key: bool = False) -> None:
        name = ".".join(map(str, path[1:] if path[0] == "defaults" else path[2:])) or "resource"
        self.fields[name] = f"{self.fields[name]}; {message}" if name in self.fields else message

    def parse(self, model: type[Settings], raw: Mapping[str, Any]) -> Settings:
        return super().parse(model, raw) if self.text else model.model_validate_json(json.dumps(raw), strict=True)


def stated(row: Resource) -> dict[str, Any]:
    """What a row states beside the defaults, in the inventory's names; no secrets."""
    settings = row.parsed_settings
    if settings.port == settings.model_copy(update={"port": None}).connect_port:
        settings = settings.model_copy(update={"port": None})
    return settings.model_dump(mode="json", exclude_defaults=True, exclude=set(SECRETS))


def apply_entry(row: Resource, entry: Entry, vault: Vault) -> bool:
    """`update_row` for a request; says whether anything changed. Raises Refusal."""
    try:
        return update_row(row, entry, vault)
    except (SecretError, InventoryError) as error:
        raise field_errors({"password": str(error)}) from error


def ensure_first_user(session: Session) -> None:
    """The specification's first account, while there is none at all."""
    if session.scalar(sqlalchemy.select(User).limit(1)) is None:
        session.add(User.create(*FIRST_USER, initial=True))


def initial_user(session: Session) -> str | None:
    """The name of an account that still has the documented password."""
    return session.scalar(sqlalchemy.select(User.name).where(User.initial).limit(1))


def find_resource(session: Session, name: str) -> Resource:
    row = session.scalar(sqlalchemy.select(Resource).where(Resource.name == name))
    if row is None:
        raise ApiError("there is no such resource", 404)
    return row


def find_user(session: Session, name: str) -> User:
    user = session.scalar(sqlalchemy.select(User).where(User.name == name))
    if user is None:
        raise ApiError("there is no such user", 404)
    return user


def require_admin(session: Session, without: User) -> None:
    """Raises Refusal when `without` is the last admin."""
    if session.scalar(sqlalchemy.select(User).where(User.role == "admin", User.id != without.id).limit(1)) is None:
        raise ApiError(f"{without.name} is the last admin; make another one first", 409)


def session_key(folder: Path) -> bytes:
    """What signs sessions and bearer tokens: `session.key` in `folder`, made on first start. Raises SecretError."""
    path = folder / "session.key"
    try:
        with contextlib.suppress(FileExistsError):
            if not path.exists():
                create_private(path, secrets.token_bytes(SESSION_KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise SecretError(f"{path} cannot be read or made: {error.strerror}") from error
    if len(key) < SESSION_KEY_BYTES:
        raise SecretError(f"{path} is no session key; remove it, and the next start makes another")
    return key


class Ticket(NamedTuple):
    """What a session's cookie or a bearer token says; times are Unix times."""

    kind: str       # session | token
    name: str       # its own, unguessable
    user: int       # User.id
    stamp: str      # User.stamp of the login
    begun: float
    seen: float     # the last request, give or take SESSION_STEP

    @property
    def ends(self) -> float:
        life, idle = LIVES[self.kind]
        return min(self.begun + life, self.seen + idle)


class Tickets:
    """Signs tickets and reads them; the same in every process that has the key, and after a restart."""

    def __init__(self, key: bytes) -> None:
        self._serializer = itsdangerous.URLSafeSerializer(
            key, "healthchecker.ticket", signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256})

    def write(self, ticket: Ticket) -> str:
        return str(self._serializer.dumps(ticket))

    def read(self, text: str, kind: str, now: float) -> Ticket | None:
        """The ticket, None when it is not ours, of another kind, or over."""
        try:
            ticket = Ticket(*self._serializer.loads(text))
        except itsdangerous.BadData:
            return None
        return ticket if ticket.kind == kind and now < ticket.ends else None


def holder(session: Session, ticket: Ticket) -> User | None:
    """The user of a ticket; None once password or role changed, the user is gone, or the session was logged out."""
    user = session.get(User, ticket.user)
    valid = user is not None and hmac.compare_digest(user.stamp, ticket.stamp) and not session.get(Ended, ticket.name)
    return user if valid else None


class Throttle:
    """Failed logins by account and address; LOGIN_FAILURES of them within LOGIN_WINDOW make the next one wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[tuple[str, str], list[float]] = {}     # who failed last stands last

    def wait(self, name: str, address: str) -> float:
        """Seconds until the next attempt; 0 when it may be made now."""
        failures = self._failures.get((name, address), [])
        return max(0.0, failures[0] + LOGIN_WINDOW - self._clock()) if len(failures) >= LOGIN_FAILURES else 0.0

    def fail(self, name: str, address: str) -> int:
        """Takes a failure down; says how many count now. Names are the attacker's choice: the oldest ones go."""
        now = self._clock()
        failures = [at for at in self._failures.pop((name, address), []) if now - at < LOGIN_WINDOW]
        self._failures[name, address] = [*failures, now][-LOGIN_FAILURES:]
        if len(self._failures) > LOGINS_KEPT:
            del self._failures[next(iter(self._failures))]
        return len(self._failures[name, address])

    def clear(self, name: str, address: str) -> None:
        self._failures.pop((name, address), None)


def offered_key(target: Target, access: ConnectionContext) -> str:
    """The key that a host shows now. Raises UsageError for a resource without one, or with one that is pinned."""
    connection = CONNECTIONS[target.settings.platform](target, LoginGuard(), access)
    if not isinstance(connection, (SshConnection, PowerShellConnection)):
        raise UsageError(f"{target.name} has no host key")
    if target.settings.host_key not in (None, "strict") or target.settings.certificate_fingerprint:
        raise UsageError(f"the inventory pins the key of {target.name}; change it there")
    return connection.offered_key(Deadline(min(target.settings.timeout, TRIAL_TIMEOUT)))


# === Actions =================================================================
MAINTENANCE = 366 * 86_400.0    # seconds of maintenance at most
API = "/-/api/"
SAFE_METHODS = ("GET", "HEAD")


NOBODY = User(salt=b"", rounds=PBKDF2_ROUNDS, password_hash=b"")    # takes as long as a user that exists


@dataclass
class ConsoleContext:
    """What pages, API and the user commands work on, in the main process."""

    store: Store
    inventory: Inventory
    lease: Lease
    session_key: bytes
    vault: Vault
    monitor: Monitor
    connections: ConnectionContext
    clock: Callable[[], float] = time.time      # Unix time

    def __post_init__(self) -> None:
        self.hashing = threading.Lock()     # one password hash at a time, for it takes a CPU 0.15 s; guards throttle
        self.throttle = Throttle()

    @functools.cached_property
    def tickets(self) -> Tickets:
        return Tickets(self.session_key)

    @functools.cached_property
    def places(self) -> dict[str, str]:
        """file:line:column of the resources that the inventory states."""
        return {entry.settings.name: entry.where for entry in self.inventory.entries}

    @property
    def is_healthy(self) -> bool:
        """The gate's answer."""
        return time.monotonic() < self.lease.until.value

    def login(self, name: str, password: str, address: str) -> int:
        """The id of the user with this password. Raises Refusal: 401, or 429 with the seconds to wait."""
        if not self.hashing.acquire(blocking=False):
            raise ApiError("another password is being checked; try again in a second", 429, retry=1)
        try:
            wait = self.throttle.wait(name, address)
            if wait:
                raise ApiError("too many failed logins; wait before the next", 429, retry=wait)
            with self.store.reading() as session:
                user = session.scalar(sqlalchemy.select(User).where(User.name == name))
            if (user or NOBODY).verify(password) and user is not None:
                self.throttle.clear(name, address)
                return user.id
            failures = self.throttle.fail(name, address)
        finally:
            self.hashing.release()
        log.warning("login of %s from %s failed", one_line(name), address)
        if failures == LOGIN_FAILURES:      # once, or an attacker would fill the database
            with self.store.writing() as session:
                record_event(session, "login", f"{failures} failed logins", actor=name, address=address)
        raise ApiError("user name or password is wrong", 401)

    def poll_now(self, name: str) -> dict[str, Any]:
        """Polls a resource and waits for the result."""
        self.monitor.catch_up()
        report = self.monitor.check_now(name, POLL_NOW_TIMEOUT)
        if report is None:
            raise ApiError(f"there is no result after {POLL_NOW_TIMEOUT:.0f} s; the poll goes on", 504)
        return vars(report.verdict) | {"seconds": report.seconds}

    def test(self, settings: Mapping[str, Any], name: str = "", *, text: bool = False) -> dict[str, Any]:
        """Polls once with settings that are not stored, or with changes to the stored ones of `name`, its secret
        included; `host_key` is what would be trusted on first use."""
        with self.store.reading() as session:
            row = session.scalar(sqlalchemy.select(Resource).where(Resource.name == name)) if name else None
        entry = SettingsReader(self.inventory.path, text=text).read(settings, stated(row) if row else {})
        trial = Resource(**{column.name: getattr(row, column.name) for column in Resource.__table__.columns}
                         if row else {"id": 0, "name": entry.settings.name})
        apply_entry(trial, entry, self.vault)
        target = target_of(trial, self.vault)
        target = replace(target, settings=target.settings.model_copy(
            update={"timeout": min(target.settings.timeout, TRIAL_TIMEOUT)}))
        begin = time.monotonic()
        connection = CONNECTIONS[target.settings.platform](target, LoginGuard(), self.connections)
        verdict, _, host_key = poll_once(target, connection, None)
        return vars(verdict) | {"seconds": time.monotonic() - begin, "host_key": host_key}

    def offered_key(self, name: str) -> str:
        """The key that the host of a resource shows now."""
        with self.store.reading() as session:
            row = find_resource(session, name)
        try:
            return offered_key(target_of(row, self.vault), self.connections)
        except (UsageError, ProbeError) as error:
            raise ApiError(str(error), 409) from error


@dataclass(frozen=True)
class Principal:
    """Who asks, from where, and by what it is known."""

    site: ConsoleContext
    address: str = ""               # empty on the command line
    local: bool = True              # on the server's own machine
    ticket: Ticket | None = None
    user: User | None = None

    @property
    def name(self) -> str:
        return self.user.name if self.user else "command line"

    @property
    def operator(self) -> bool:
        """Whether the address may log in at all."""
        address = ipaddress.ip_address(self.address)
        networks = map(ipaddress.ip_network, self.site.inventory.service.operators)
        return (self.local or not address.is_loopback) and any(address in network for network in networks)

    @property
    def restricted(self) -> bool:
        """The documented password still holds, and this is another machine: it can only be changed."""
        return self.user is not None and self.user.initial and not self.local

    def may(self, role: str) -> bool:
        return self.user is not None and self.user.role in (role, "admin")

    def note(self, session: Session, text: str, resource: str = "") -> None:
        """Records a change."""
        record_event(session, "change", text, resource=resource, actor=self.name, address=self.address,
                     at=self.site.clock())


def moment(at: float) -> datetime.datetime | None:
    """A Unix time, None for 0."""
    return datetime.datetime.fromtimestamp(at, datetime.timezone.utc) if at else None


class Maintenance(Settings):
    """Until when a resource does not count, and why."""

    until: AwareDatetime
    reason: TextLine


class Trust(Settings):
    """The key to trust; without one it is the one that the host shows now."""

    host_key: TextLine | None = None


class OutcomeView(Settings):
    """A service or check."""

    good: bool
    text: str


class SampleView(Settings):
    """What the last poll read."""

    details: dict[str, float | str]
    metrics: dict[str, float]
    services: dict[str, OutcomeView]
    checks: dict[str, OutcomeView]
    problems: dict[str, str]    # what could not be read, and why


class ResourceView(ResourceSettings):
    """A resource: its settings without secrets, and its state."""

    password: None = Field(default=None, exclude=True)
    key_passphrase: None = Field(default=None, exclude=True)
    origin: Literal["inventory", "api"]
    place: str | None           # where the inventory states it: file:line:column
    has_secret: bool
    trusted_key: str | None     # trusted on first use or by `trust`
    maintenance: Maintenance | None
    state: State
    cause: Cause
    reason: str
    since: datetime.datetime | None
    polled: datetime.datetime | None
    seconds: float              # that the last poll took
    sample: SampleView | None


class PollView(Settings):
    """What one poll found."""

    state: State
    cause: Cause
    reason: str
    seconds: float


class TrialView(PollView):
    """What a poll with settings that are not stored found."""

    host_key: str | None        # would be trusted on first use


RESOURCES = sqlalchemy.select(Resource, Status).outerjoin(Status, Status.resource_id == Resource.id)


def status_of(row: Resource, status: Status | None) -> Status:
    """The status, an empty one when it is of another configuration: nothing is known of this one yet."""
    if status and status.settings_digest == row.settings_digest:
        return status
    return Status(state="unknown", cause="", reason="", since=0.0, polled=0.0, seconds=0.0, sample="null", packed=b"")


def resource_view(row: Resource, status: Status | None, site: ConsoleContext) -> ResourceView:
    known = status_of(row, status)
    columns = {name: getattr(row, name) for name in Resource.COLUMNS}
    state = {name: getattr(known, name) for name in ("state", "cause", "reason", "seconds")}
    maintenance = {"until": moment(row.maintenance), "reason": row.maintenance_reason}
    return ResourceView.model_validate({
        **json.loads(row.settings), **columns, **state, "since": moment(known.since), "polled": moment(known.polled),
        "sample": json.loads(known.sample), "origin": row.origin,
        "place": site.places.get(row.name) if row.origin == "inventory" else None,
        "has_secret": row.password is not None or row.key_passphrase is not None, "trusted_key": row.host_key,
        "maintenance": maintenance if row.maintenance > site.clock() else None})


def changeable(who: Principal, session: Session, name: str) -> Resource:
    """A resource that was added here; those of the inventory change there."""
    row = find_resource(session, name)
    if row.origin == "inventory":
        place = who.site.places.get(name, who.site.inventory.path.name)
        raise ApiError(f"{name} stands at {place}; change it there", 409)
    return row


def list_resources(who: Principal) -> list[ResourceView]:
    """All resources, by name."""
    with who.site.store.reading() as session:
        rows = session.execute(RESOURCES.order_by(Resource.name))
        return [resource_view(row, status, who.site) for row, status in rows]


def show_resource(who: Principal, name: str) -> ResourceView:
    """One resource."""
    with who.site.store.reading() as session:
        row = find_resource(session, name)
        return resource_view(row, session.get(Status, row.id), who.site)


def add_resource(who: Principal, body: Mapping[str, Any], *, text: bool = False) -> ResourceView:
    """Adds a resource; it is watched at once."""
    vault = who.site.vault      # before the database is locked
    entry = SettingsReader(who.site.inventory.path, text=text).read(body, {})
    name = entry.settings.name
    with who.site.store.writing() as session:
        if session.scalar(sqlalchemy.select(Resource.id).where(Resource.name == name)) is not None:
            raise ApiError("there is a resource of this name already", 409, {"name": "is taken"})
        row = Resource(name=name, origin="api")
        apply_entry(row, entry, vault)
        session.add(row)
        who.note(session, "added", name)
        revise(session)
    return show_resource(who, name)


def change_resource(who: Principal, name: str, body: Mapping[str, Any], *, text: bool = False) -> ResourceView:
    """Changes what is given; null stands for the default. Another hostname or username needs the password again."""
    vault = who.site.vault
    with who.site.store.writing() as session:
        row = changeable(who, session, name)
        if body.get("name", name) != name:
            raise field_errors({"name": "cannot be changed; add another resource and remove this one"})
        entry = SettingsReader(who.site.inventory.path, text=text).read(body, stated(row))
        before = stated(row)
        if apply_entry(row, entry, vault):
            after = stated(row)
            changed = {field for field in before.keys() | after.keys() if before.get(field) != after.get(field)}
            who.note(session, f"changed: {', '.join(sorted(changed | (body.keys() & set(SECRETS))))}", name)
            revise(session)
    return show_resource(who, name)


def remove_resource(who: Principal, name: str) -> None:
    """Removes a resource and its history."""
    with who.site.store.writing() as session:
        session.delete(changeable(who, session, name))
        who.note(session, "removed", name)
        revise(session)


def test_settings(who: Principal, body: Mapping[str, Any], *, text: bool = False) -> TrialView:
    """Polls a resource once that is not added yet."""
    return TrialView(**who.site.test(dict(body), text=text))


def test_changes(who: Principal, name: str, body: Mapping[str, Any], *, text: bool = False) -> TrialView:
    """Polls a resource once with changed settings that are not stored."""
    with who.site.store.reading() as session:
        changeable(who, session, name)
    return TrialView(**who.site.test(dict(body), name, text=text))


def poll_now(who: Principal, name: str) -> PollView:
    """Polls a resource now and waits for the result."""
    with who.site.store.reading() as session:
        find_resource(session, name)
    return PollView(**who.site.poll_now(name))


def begin_maintenance(who: Principal, name: str, body: Mapping[str, Any]) -> ResourceView:
    """Lets a resource not count until a time: it is polled and shown and closes nothing."""
    maintenance = validated(Maintenance, body)
    until = maintenance.until.timestamp()
    if not 0 < until - who.site.clock() <= MAINTENANCE:
        raise field_errors({"until": f"must be in the future, and by no more than {MAINTENANCE / 86_400:.0f} days"})
    with who.site.store.writing() as session:
        row = find_resource(session, name)
        row.maintenance, row.maintenance_reason = until, maintenance.reason
        who.note(session, f"in maintenance until {maintenance.until.isoformat()}: {maintenance.reason}", name)
        revise(session)
    return show_resource(who, name)


def end_maintenance(who: Principal, name: str) -> None:
    """Lets a resource count again."""
    with who.site.store.writing() as session:
        row = find_resource(session, name)
        if row.maintenance:
            row.maintenance, row.maintenance_reason = 0.0, ""
            who.note(session, "maintenance ended", name)
            revise(session)


def trust_resource(who: Principal, name: str, body: Mapping[str, Any]) -> ResourceView:
    """Trusts the key that the host shows now; with `host_key` only that one."""
    wanted = validated(Trust, body).host_key
    with who.site.store.reading() as session:
        find_resource(session, name)
    offered = who.site.offered_key(name)
    if wanted not in (None, offered):
        raise ApiError(f"the host shows another key: {offered}", 409,
                       {"host_key": "is not the one that the host shows"})
    with who.site.store.writing() as session:
        row = find_resource(session, name)
        who.note(session, f"trusted {offered}, before {row.host_key or 'no key'}", name)
        row.host_key = offered
        revise(session)
    return show_resource(who, name)


class SamplesQuery(Settings):
    """Which polls to list."""

    since: AwareDatetime | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 60


class PastPollView(Settings):
    """A poll: what it found, the state of the resource after it, what it read."""

    at: datetime.datetime
    state: State
    cause: Cause
    reason: str
    standing: State
    readings: dict[str, float]


def list_samples(who: Principal, name: str, query: Mapping[str, Any]) -> list[PastPoll]:
    """The last polls of a resource, oldest first."""
    asked = validated(SamplesQuery, query, text=True)
    with who.site.store.reading() as session:
        return samples(session, find_resource(session, name).id, limit=asked.limit,
                       since=asked.since.timestamp() if asked.since else 0.0)


class EventsQuery(Settings):
    """Which events to list."""

    resource: str | None = None
    kind: str | None = None
    before: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None      # the id of an event
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class EventView(Settings):
    """A transition or a change: when, what, who, from where."""

    id: int
    at: datetime.datetime
    kind: str
    resource: str
    text: str
    actor: str
    address: str


def list_events(who: Principal, query: Mapping[str, Any]) -> list[Event]:
    """Transitions and changes, newest first."""
    with who.site.store.reading() as session:
        return events(session, **dict(validated(EventsQuery, query, text=True)))


class UserView(Settings):
    """A user."""

    name: str
    role: Role
    initial: bool       # the password is the documented one still


def list_users(who: Principal) -> list[User]:
    """All users, by name."""
    with who.site.store.reading() as session:
        return list(session.scalars(sqlalchemy.select(User).order_by(User.name)))


def add_user(who: Principal, body: Mapping[str, Any]) -> User:
    """Adds a user."""
    new = validated(NewUser, body)
    user = User.create(new.name, new.password.get_secret_value(), new.role)     # before the database is locked
    with who.site.store.writing() as session:
        if session.scalar(sqlalchemy.select(User.id).where(User.name == new.name)) is not None:
            raise ApiError("there is a user of this name already", 409, {"name": "is taken"})
        session.add(user)
        who.note(session, f"user {new.name} added as {new.role}")
    return user


def change_user(who: Principal, name: str, body: Mapping[str, Any]) -> User:
    """Changes password or role of a user and ends the user's sessions; one's own password changes elsewhere."""
    change = validated(UserChange, body)
    if change.password and who.user and who.user.name == name:
        raise field_errors({"password": "change your own with the current one, at /-/api/password"})
    fresh = User.create(name, change.password.get_secret_value()) if change.password else None
    with who.site.store.writing() as session:
        user = find_user(session, name)
        if fresh:
            user.take_password(fresh)
            who.note(session, f"user {name}: new password")
        if change.role and change.role != user.role:
            require_admin(session, without=user)
            user.role = change.role
            who.note(session, f"user {name}: {change.role} now")
    return user


def remove_user(who: Principal, name: str) -> None:
    """Removes a user and ends the user's sessions; the last admin stays."""
    with who.site.store.writing() as session:
        user = find_user(session, name)
        require_admin(session, without=user)
        session.delete(user)
        who.note(session, f"user {name} removed")


def change_password(who: Principal, body: Mapping[str, Any]) -> User:
    """Changes one's own password; every session and token of before ends."""
    change = validated(PasswordChange, body)
    assert who.user
    name, current, new = who.user.name, change.current.get_secret_value(), change.new.get_secret_value()
    if current == new:
        raise field_errors({"new": "must not be the current one"})
    try:
        who.site.login(name, current, who.address)
    except ApiError as error:
        raise field_errors({"current": "is wrong"}) if error.status == 401 else error from None
    fresh = User.create(name, new)
    with who.site.store.writing() as session:
        user = find_user(session, name)
        user.take_password(fresh)
        who.note(session, f"user {name}: new password")
    return user


def sign_in(who: Principal, body: Mapping[str, Any]) -> User:
    """The user with these Credentials. Raises Refusal: 401, or 429 with the seconds to wait."""
    given = validated(Credentials, body)
    user_id = who.site.login(given.username, given.password.get_secret_value(), who.address)
    with who.site.store.writing() as session:
        user = session.get(User, user_id)
        if user is None:
            raise ApiError("user name or password is wrong", 401)
        record_event(session, "login", "logged in", actor=user.name, address=who.address, at=who.site.clock())
    return user


def open_ticket(site: ConsoleContext, kind: str, user: User) -> str:
    """What proves a login from now on, signed."""
    now = site.clock()
    return site.tickets.write(Ticket(kind, secrets.token_urlsafe(16), user.id, user.stamp, now, now))


def sign_out(who: Principal) -> None:
    """Ends the visitor's session, also for whoever else has its cookie."""
    if who.ticket:
        with who.site.store.writing() as session:
            session.execute(sqlalchemy.delete(Ended).where(Ended.until < who.site.clock()))
            session.merge(Ended(ticket=who.ticket.name, until=who.ticket.begun + SESSION_LIFE))


class TokenView(Settings):
    """A bearer token."""

    token: str
    expires_in: float       # seconds


def log_in(who: Principal, body: Mapping[str, Any]) -> TokenView:
    """Gives a bearer token for user name and password."""
    return TokenView(token=open_ticket(who.site, "token", sign_in(who, body)), expires_in=TOKEN_LIFE)


def health_view(who: Principal) -> dict[str, Any]:
    """application/health+json; the resources only for those who are logged in."""
    answer: dict[str, Any] = {"status": "pass" if who.site.is_healthy else "fail"}
    if who.operator and who.may("viewer") and not who.restricted:
        answer["checks"] = {f"{view.name}:state": [{
            "componentType": "system", "observedValue": view.state, "time": view.polled and view.polled.isoformat(),
            "status": {"healthy": "pass", "unhealthy": "fail"}.get(view.state, "warn"),
            "output": f"{view.cause}: {view.reason}" if view.cause else ""}] for view in list_resources(who)}
    return answer


# === API =====================================================================
SESSION_STEP = 60.0             # seconds after which a request renews the cookie
COOKIE = "healthchecker_session"
CONTENT_SECURITY_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                           "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")


@dataclass(frozen=True)
class Operation:
    """A row of the API. `run` takes who asks, the names in the path and, where `body` says what it must be, the
    body of the request or, with GET, its query."""

    method: str
    path: str                               # below API
    run: Callable[..., Any]
    answer: Any = None                      # the model of what comes back, read by attributes; None: nothing, with 204
    body: type[Settings] | None = None
    status: int = 200
    needs: Literal["", "viewer", "admin"] = "admin"

    @property
    def key(self) -> str:
        return f"{self.method} {API}{self.path}"

    @functools.cached_property
    def adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.answer)


OPERATIONS = (
    Operation("POST", "login", log_in, TokenView, Credentials, needs=""),
    Operation("POST", "password", change_password, None, PasswordChange, needs="viewer"),
    Operation("GET", "resources", list_resources, list[ResourceView], needs="viewer"),
    Operation("POST", "resources", add_resource, ResourceView, ResourceSettings, status=201),
    Operation("GET", "resources/<name>", show_resource, ResourceView, needs="viewer"),
    Operation("PATCH", "resources/<name>", change_resource, ResourceView, ResourceSettings),
    Operation("DELETE", "resources/<name>", remove_resource),
    Operation("POST", "test", test_settings, TrialView, ResourceSettings),
    Operation("POST", "resources/<name>/test", test_changes, TrialView, ResourceSettings),
    Operation("POST", "resources/<name>/check", poll_now, PollView),
    Operation("POST", "resources/<name>/maintenance", begin_maintenance, ResourceView, Maintenance),
    Operation("DELETE", "resources/<name>/maintenance", end_maintenance),
    Operation("POST", "resources/<name>/trust", trust_resource, ResourceView, Trust),
    Operation("GET", "resources/<name>/samples", list_samples, list[PastPollView], SamplesQuery, needs="viewer"),
    Operation("GET", "events", list_events, list[EventView], EventsQuery, needs="viewer"),
    Operation("GET", "users", list_users, list[UserView]),
    Operation("POST", "users", add_user, UserView, NewUser, status=201),
    Operation("PATCH", "users/<name>", change_user, UserView, UserChange),
    Operation("DELETE", "users/<name>", remove_user),
)


class FieldFault(Settings):
    """What is wrong with a field."""

    field: str
    message: str


class Problem(Settings):
    """RFC 9457."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    errors: list[FieldFault] = []


SCHEMAS = "#/components/schemas/"


def resource_schema(schema: dict[str, Any]) -> None:
    """Nothing is required where the inventory has defaults, and null stands for the default."""
    del schema["required"]
    for name, field in schema["properties"].items():
        if {"type": "null"} not in field.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


def describe(operation: Operation, schemas: Mapping[Any, Any]) -> dict[str, Any]:
    """One operation in OpenAPI."""
    where = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
             for name in re.findall("<(.+?)>", operation.path)]
    body = schemas.get((f"{operation.key} body", "validation"))
    wrong = {"description": "Refused", "content": {
        "application/problem+json": {"schema": schemas["problem", "serialization"]}}}
    right: dict[str, Any] = {"description": "Done"}
    if operation.answer:
        right["content"] = {"application/json": {"schema": schemas[operation.key, "serialization"]}}
    described: dict[str, Any] = {
        "summary": (operation.run.__doc__ or "").partition("\n")[0], "parameters": where,
        "responses": {str(operation.status if operation.answer else 204): right, "default": wrong}}
    if operation.method == "GET" and operation.body:
        fields = operation.body.model_json_schema()["properties"]
        described["parameters"] += [{"name": name, "in": "query", "schema": field} for name, field in fields.items()]
    elif body:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if not operation.needs:
        described["security"] = []
    return described


@functools.cache
def openapi() -> dict[str, Any]:
    """The description of the API, made from its models."""
    adapters: list[tuple[str, Literal["validation", "serialization"], TypeAdapter[Any]]] = [
        ("problem", "serialization", TypeAdapter(Problem))]
    for operation in OPERATIONS:
        if operation.answer:
            adapters.append((operation.key, "serialization", operation.adapter))
        if operation.body:
            adapters.append((f"{operation.key} body", "validation", TypeAdapter(operation.body)))
    schemas, components = TypeAdapter.json_schemas(adapters, ref_template=SCHEMAS + "{model}")
    resource_schema(components["$defs"]["ResourceSettings"])
    paths: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for operation in OPERATIONS:
        path = API + re.sub("<(.+?)>", r"{\1}", operation.path)
        paths[path][operation.method.lower()] = describe(operation, schemas)
    return {"openapi": "3.1.0", "info": {"title": "HealthChecker", "version": "1"}, "paths": paths,
            "security": [{"bearer": []}, {"session": []}],
            "components": {"schemas": components["$defs"], "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": COOKIE}}}}


# --- requests ---
class Route(NamedTuple):
    """One method of one path, who may use it, and what answers."""

    method: str
    path: str
    needs: Literal["public", "", "viewer", "admin"]     # "": who may log in
    run: Callable[..., flask.typing.ResponseReturnValue]
    restricted: bool = False    # also while the documented password is to be changed first


def current_principal() -> Principal:
    """Who sent the request that is being answered."""
    return cast(Principal, flask.g.principal)


def client_address(environ: WSGIEnvironment) -> str:
    """The client's address; 0.0.0.0 is nobody's."""
    with contextlib.suppress(ValueError):
        return str(plain_address(environ.get("REMOTE_ADDR", "")))
    return "0.0.0.0"    # noqa: S104  # is not listened on


def is_local(environ: WSGIEnvironment, address: str) -> bool:
    """Whether a request comes from this machine itself: not through a proxy, and under a name of its own: a page of
    anybody's site can have its name stand for 127.0.0.1, and a browser here then takes this service for that site."""
    host = re.sub(r":\d*$", "", environ.get("HTTP_HOST", "localhost")).strip("[]").lower()
    named = host in ("localhost", socket.gethostname().lower())
    if not named:
        with contextlib.suppress(ValueError):
            named = bool(ipaddress.ip_address(host))
    return named and ipaddress.ip_address(address).is_loopback and not environ.get("healthchecker.forwarded")


def identify(site: ConsoleContext, request: flask.Request) -> Principal:
    """Who it is; an Authorization header counts before a cookie."""
    address = client_address(request.environ)
    stranger = Principal(site, address, is_local(request.environ, address))
    kind, text = "session", request.cookies.get(COOKIE, "")
    if authorization := request.headers.get("Authorization"):
        scheme, _, token = authorization.partition(" ")
        kind, text = "token", token.strip() if scheme.lower() == "bearer" else ""
    ticket = site.tickets.read(text, kind, site.clock())
    if ticket is None:
        return stranger
    with site.store.reading() as session:
        user = holder(session, ticket)
    return replace(stranger, ticket=ticket, user=user) if user else stranger


def same_origin(request: flask.Request) -> bool | None:
    """Whether a page of this service sent the request; None when its sender does not say."""
    fetch_site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if fetch_site:
        return fetch_site == "same-origin"
    return origin == f"{request.scheme}://{request.host}" if origin else None


def authorize(site: ConsoleContext, routes: Mapping[str, Route]) -> None:
    """Stands before every request. Raises Refusal for those who may not."""
    request = flask.request
    who = flask.g.principal = identify(site, request)
    route = routes.get(request.endpoint or "")
    needs = route.needs if route else "viewer"
    if needs == "public":
        return
    if not who.operator:
        raise ApiError("this address may not log in; see service.operators", 403)
    if needs and who.user is None:
        raise ApiError("log in first", 401)
    if request.method not in SAFE_METHODS:
        same = same_origin(request)
        if same is False or (same is None and needs and who.ticket and who.ticket.kind == "session"):
            raise ApiError("this request does not come from a page of this service", 403)
    if who.restricted and not (route and route.restricted):
        raise ApiError("change the documented password first", 403)
    if needs and not who.may(needs):
        raise ApiError("only an admin may do this", 403)


def give_cookie(response: Response, ticket: str) -> Response:
    """Sets the session's cookie, or takes it away; the application behind the gate never sees it."""
    response.set_cookie(COOKIE, ticket, max_age=None if ticket else 0, path=PREFIX, secure=flask.request.is_secure,
                        httponly=True, samesite="Strict")
    return response


def finish(response: Response) -> Response:
    """Stands behind every request: headers, and a session that goes on."""
    who: Principal | None = flask.g.get("principal")
    kept = response.headers.setdefault("Cache-Control", "no-store") != "no-store"
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"     # with no-referrer, forms would send `Origin: null`
    if who and who.ticket and who.ticket.kind == "session" and "Set-Cookie" not in response.headers and not kept:
        now = who.site.clock()
        if now - who.ticket.seen > SESSION_STEP and "X-Refresh" not in flask.request.headers:
            give_cookie(response, who.site.tickets.write(who.ticket._replace(seen=now)))    # a refresh is no activity
    return response


def json_body() -> dict[str, Any]:
    """The body of the request, an object. Raises Refusal."""
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


def perform(operation: Operation, **names: str) -> flask.typing.ResponseReturnValue:
    """Answers a request to the API."""
    taken: list[Mapping[str, Any]] = []
    if operation.body:
        taken = [flask.request.args.to_dict() if operation.method == "GET" else json_body()]
    found = operation.run(current_principal(), *names.values(), *taken)
    if operation.answer is None:
        return flask.Response(status=204, content_type="")
    answer = operation.adapter.validate_python(found, from_attributes=True)
    return flask.Response(operation.adapter.dump_json(answer), operation.status, mimetype="application/json")


def json_answer(content: Mapping[str, Any], status: int = 200, kind: str = "application/json") -> flask.Response:
    return flask.Response(json.dumps(content), status, mimetype=kind)


def health() -> flask.Response:
    who = current_principal()
    return json_answer(health_view(who), 200 if who.site.is_healthy else 503, "application/health+json")


def problem(error: ApiError) -> flask.Response:
    body: dict[str, Any] = {"type": "about:blank", "title": http.HTTPStatus(error.status).phrase,
                            "status": error.status, "detail": str(error)}
    if error.fields:
        body["errors"] = [{"field": name, "message": text} for name, text in error.fields.items()]
    return json_answer(body, error.status, "application/problem+json")


API_ROUTES = (
    Route("GET", "/-/livez", "public", lambda: flask.Response("ok\n", mimetype="text/plain")),
    Route("GET", HEALTH, "public", health),
    Route("GET", f"{API}openapi.json", "viewer", lambda: json_answer(openapi())),
    *(Route(operation.method, API + operation.path, operation.needs, functools.partial(perform, operation),
            restricted=operation.path in ("login", "password")) for operation in OPERATIONS),
)


# === Metrics =================================================================
METRICS_AGE = 1.0               # seconds for which the resources' part of /-/metrics is not made again

def gauge(name: str, text: str, value: float | None = None, *labels: str) -> GaugeMetricFamily:
    """A gauge of ours; with labels its values are added later."""
    return GaugeMetricFamily(f"healthchecker_{name}", text, value, labels or None)


class ServingMetrics:
    """What anyone may see: the gate and totals of all workers; nothing about a resource, not even how many there are.

    prometheus-client calls this a collector.
    """

    def __init__(self, lease: Lease, counters: Counters, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease, self._counters, self._clock = lease, counters, clock

    def collect(self) -> Iterator[Metric]:
        left = max(0.0, self._lease.until.value - self._clock())
        cells, open_connections = self._counters.totals(), [n for n in self._counters.held if n >= 0]
        yield gauge("gate_open", "1 while requests reach the application.", float(left > 0))
        yield gauge("lease_seconds", "Seconds until the gate closes unless a poll renews the lease.", left)
        yield gauge("workers", "Processes that serve.", len(open_connections))
        yield gauge("connections", "Open client connections.", sum(open_connections))
        yield gauge("queue_requests", "Requests that wait for a pool thread.", cells[QUEUED])
        yield CounterMetricFamily("healthchecker_connections_accepted", "Client connections ever.", cells[ACCEPTED])
        requests_ = CounterMetricFamily("healthchecker_requests", "Requests by outcome.", labels=["outcome"])
        seconds = HistogramMetricFamily("healthchecker_request_duration_seconds", labels=["outcome"], documentation=(
            "From a request that is complete to its answer in the send buffer, the wait for a thread included."))
        for outcome, begin in ROWS.items():
            counts = list(itertools.accumulate(cells[begin: begin + ROW - 1]))
            requests_.add_metric([outcome], counts[-1])
            seconds.add_metric([outcome], [*zip(map(str, (*LATENCIES, "+Inf")), counts, strict=True)],
                               cells[begin + ROW - 1])
        yield requests_
        yield seconds


# What a resource shows: text and labels besides its name.
RESOURCE_METRICS: Mapping[str, tuple[str, ...]] = {
    "state": ("1 for the state that the resource is in, 0 for the others.", "state"),
    "cause": ("1 for the cause of its state, where there is one.", "cause"),
    "maintenance": ("1 while the resource does not count.",),
    "poll_duration_seconds": ("How long the last poll took.",),
    "last_poll_timestamp_seconds": ("Unix time of the last result.",),
    "cpu_percent": ("Busy share of the CPUs between the last two polls.",),
    "memory_percent": ("Used share of the memory.",),
    "swap_percent": ("Used share of the swap space.",),
    "disk_percent": ("Used share of a filesystem.", "mount"),
    "load_per_cpu": ("Load average per CPU.",),
    "uptime_seconds": ("Seconds since the machine started.",),
    "service_good": ("1 for a service that runs.", "service"),
    "check_good": ("1 for a check that passed.", "check"),
}
MetricValue = tuple[str, tuple[str, ...], float]     # a key of RESOURCE_METRICS, values of its labels, value


def sample_metrics(sample: Mapping[str, Any]) -> Iterator[MetricValue]:
    """What the last poll read, from Sample.to_json; a host may send words where a number belongs."""
    for key, value in (*sample["details"].items(), *sample["metrics"].items()):
        name, *part = key.split(" ", 1)
        if len(part) == len(RESOURCE_METRICS.get(name, ())) - 1 and isinstance(value, float):
            yield name, tuple(part), value
    for kind in ("service", "check"):
        for name, outcome in sample[f"{kind}s"].items():
            yield f"{kind}_good", (name,), outcome["good"]


def resource_metrics(row: Any, now: float) -> Iterator[MetricValue]:
    """All of one resource; a row of ResourceMetrics.ROWS. What was not read is left out and never 0."""
    for state in get_args(State):
        yield "state", (state,), state == (row.state or "unknown")
    yield "maintenance", (), row.maintenance > now
    if row.cause:
        yield "cause", (row.cause,), 1.0
    if row.polled:
        yield "poll_duration_seconds", (), row.seconds
        yield "last_poll_timestamp_seconds", (), row.polled
        if sample := json.loads(row.sample):
            yield from sample_metrics(sample)


class ResourceMetrics:
    """What the bearer of the token sees besides: every resource, from the rows that the recorder writes."""

    ROWS: ClassVar = sqlalchemy.select(
        Resource.name, Resource.maintenance, Status.state, Status.cause, Status.polled, Status.seconds, Status.sample,
    ).outerjoin(Status, Status.resource_id == Resource.id).order_by(Resource.name)

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        with self._store.reading() as session:
            rows = session.execute(self.ROWS).all()
        states = collections.Counter(row.state or "unknown" for row in rows)
        total = gauge("resources", "Resources by state.", None, "state")
        for state in get_args(State):
            total.add_metric([state], states[state])
        yield total
        families = {name: gauge(f"resource_{name}", text, None, "resource", *labels)
                    for name, (text, *labels) in RESOURCE_METRICS.items()}
        now = time.time()
        for row in rows:
            for name, labels, value in resource_metrics(row, now):
                families[name].add_metric((row.name, *labels), value)
        yield from families.values()


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
    """The answer of /-/metrics. What it says of the resources serves for METRICS_AGE seconds, so that scrapes cannot
    load the machine; totals are read each time, or they would fall whenever another worker answers."""

    def __init__(self, serving: ServingMetrics, store: Store, token_file: Path | None) -> None:
        self._token_file = token_file
        self._complaint = ""        # the last one about the token file
        self._serving, self._resources = CollectorRegistry(), CollectorRegistry()
        self._serving.register(serving)
        self._resources.register(ResourceMetrics(store))
        self._lock = threading.Lock()       # guards these two, so that who asks meanwhile waits for the same text
        self._made, self._text = -math.inf, b""

    def answer(self) -> flask.Response:
        """The whole answer to the request; takes 0.1 s for 1,000 resources."""
        status, headers, body = self._answer(flask.request.headers.get("Authorization", ""))
        return flask.Response(body, status, headers)

    def _answer(self, authorization: str) -> Reply:
        scheme, _, token = authorization.partition(" ")
        bearer = scheme.lower() == "bearer"
        if bearer and not self._admits(token.strip()):
            return "401 Unauthorized", [("WWW-Authenticate", 'Bearer realm="metrics"')], b"wrong token\n"
        try:
            body = generate_latest(self._serving) + (self._resource_text() if bearer else b"")
            return "200 OK", [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")], body
        except sqlalchemy.exc.SQLAlchemyError as error:
            log.error("/-/metrics: the database cannot be read: %s", one_line(str(getattr(error, "orig", error))))
            return "503 Service Unavailable", [("Retry-After", "1")], b"the database cannot be read\n"

    def _admits(self, token: str) -> bool:
        """Reads the file each time, so that a new token counts at once; one that cannot be read admits nobody."""
        try:
            wanted = read_token(self._token_file) if self._token_file else b""
            complaint = ""
        except UsageError as error:
            wanted, complaint = b"", str(error)
        if complaint not in ("", self._complaint):
            log.error("%s", complaint)
        self._complaint = complaint
        return hmac.compare_digest(wanted, token.encode("utf-8", "replace")) and bool(wanted)

    def _resource_text(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._made > METRICS_AGE:
                self._text = generate_latest(self._resources)
                self._made = time.monotonic()
            return self._text


# === Pages ===================================================================
LABELS = {"cpu_percent": "CPU", "memory_percent": "Memory", "disk_percent": "Disk", "swap_percent": "Swap",
          "load_per_cpu": "Load per CPU", "seconds": "Duration of a poll"}
Marks = Mapping[str, Any]       # `warn` and `fail` of a limit, as JSON has them


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: `45 s`, `12 min`, `3 h 20 min`, `4 d 2 h`."""
    minutes, hours, days = (int(seconds // size) for size in (60, 3600, 86_400))
    if days > 0:
        return f"{days} d {hours % 24} h"
    if hours > 0:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes > 0 else f"{max(0, int(seconds))} s"


def clock(at: float) -> str:
    """A Unix time as the log writes it, in the server's own time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def crossed(value: float, limit: Marks) -> str:
    """Which state a reading makes by its limit."""
    for state, kind in (("unhealthy", "fail"), ("degraded", "warn")):
        if limit.get(kind) is not None and value > limit[kind]:
            return state
    return "healthy"


def limit_marks(limit: Marks, top: float, line: str) -> str:
    """The limits drawn across a picture of 100 by 100; `line` is a path with {} for the place."""
    return "".join(f'<path class="{kind}" d="{line.format(round(100 * limit[kind] / top, 1))}"/>'
                   for kind in ("warn", "fail") if limit.get(kind) is not None)


def svg(kind: str, size: str, content: str, label: str = "") -> Markup:
    """A picture that stretches, `size` in its own units; without a label it is hidden from screen readers."""
    role = f'role="img" aria-label="{label}"' if label else 'aria-hidden="true"'
    return Markup(f'<svg class="{kind}" viewBox="0 0 {size}" preserveAspectRatio="none" {role}>'   # noqa: S704
                  f"{content}</svg>")   # made of numbers and of our own words


def bar_svg(value: float, limit: Marks, top: float = 100.0) -> Markup:
    """A reading as a bar from 0 to `top` with its limits marked; the colour says which of them it crossed."""
    width = round(100 * min(value / top, 1), 1)
    return svg("bar", "100 8", f'<path d="M0 4h100"/><path class="{crossed(value, limit)}" d="M0 4h{width}"/>'
               + limit_marks(limit, top, "M{} 0v8"))


@functools.lru_cache(1024)      # most are the same
def strip_svg(strip: str) -> Markup:
    """The last polls as ticks, the newest at the right; one path a state, so that thousands of ticks stay small."""
    paths: dict[str, str] = collections.defaultdict(str)
    for run in re.finditer(r"(.)\1*", strip):
        start, state = STRIP - len(strip) + run.start(), POLLS[run[1]][0]
        paths[state] += f"M{start} 10h{len(run[0])}"
    counts = collections.Counter(POLLS[mark][0] for mark in strip)
    label = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none yet"
    drawn = "".join(f'<path class="{state}" d="{path}"/>' for state, path in paths.items())
    return svg("strip", f"{STRIP} 20", f'<path d="M0 10h{STRIP}"/>{drawn}', f"Last polls: {label}")


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


def chart_svg(points: Sequence[Point], limit: Marks, begin: float, end: float, top: float) -> Markup:
    """Averages as a line in the band from minimum to maximum, over a picture of 100 by 100, with the limits."""
    def path(at: float, value: float) -> str:
        return f"{100 * (at - begin) / (end - begin):.2f} {100 - 100 * min(value / top, 1):.1f}"

    line, band = "", ""
    for stretch in unbroken(points):
        line += "M" + "L".join(path(point[0], point[1]) for point in stretch) + ("h.4" if len(stretch) == 1 else "")
        upper = [path(point[0], point[3]) for point in stretch]
        band += "M" + "L".join(upper + [path(point[0], point[2]) for point in reversed(stretch)]) + "z"
    marks = limit_marks({kind: top - mark for kind, mark in limit.items() if mark is not None and mark <= top},
                        top, "M0 {}h100")       # from the top down
    return svg("graph", "100 100", '<path d="M0 0h100M0 50h100M0 100h100M25 0v100M50 0v100M75 0v100"/>'
               f'<path class="band" d="{band}"/><path class="line" d="{line}"/>{marks}')


class Input(NamedTuple):
    """An input of the form of a resource; its name is the setting's, with dots."""

    name: str
    label: str
    kind: str = "text"      # text | number | password | select | checkbox | textarea
    hint: str = ""


class Group(NamedTuple):
    """Inputs that stand together; `only` is their class, which the style hides on platforms without a use for them."""

    title: str
    only: str
    inputs: tuple[Input, ...]
    text: str = ""


FORM = (
    Group("Resource", "all", (
        Input("platform", "Platform", "select", "unix asks the host which one it is"),
        Input("name", "Name", hint="unique; default: the host name"),
        Input("tags", "Tags", hint="separated by commas"),
        Input("critical", "Critical: while it is unhealthy, the gate is closed", "checkbox"))),
    Group("Connection", "remote", (
        Input("hostname", "Host name or address"), Input("port", "Port", "number"),
        Input("username", "User name"), Input("password", "Password", "password", "sealed, and never shown again"),
        Input("key_file", "Key file", hint="a private key on the server, instead of a password"),
        Input("key_passphrase", "Passphrase of the key", "password"),
        Input("host_key", "Host key", hint="SSH: SHA256:… or strict; default: trusted on first use"))),
    Group("Windows", "windows", (
        Input("tls", "TLS", "checkbox"), Input("auth", "Authentication", "select"),
        Input("ca_file", "CA file", hint="who signed the host's certificate"),
        Input("certificate_fingerprint", "Certificate's fingerprint", hint="SHA-256"),
        Input("certificate_file", "Client certificate file", hint="for authentication by certificate"),
        Input("configuration_name", "Endpoint"))),
    Group("Simulation", "simulated", (
        Input("mean_healthy", "Healthy for, seconds", "number"), Input("seed", "Seed", "number"),
        Input("mean_unhealthy", "Unhealthy for, seconds", "number"))),
    Group("Polling", "all", (
        Input("interval", "Interval, seconds", "number"),
        Input("timeout", "Timeout, seconds", "number", "the whole poll"),
        Input("retry_interval", "Retry interval, seconds", "number", "while a change is not confirmed"),
        Input("rise", "Rise", "number", "good results in a row until healthy"),
        Input("fall", "Fall", "number", "bad results in a row until unhealthy"))),
    Group("Limits", "all", tuple(
        Input(f"limits.{metric}.{kind}", f"{LABELS[metric]}: {what}", "number")
        for metric in Limits.model_fields for kind, what in (("warn", "warning above"), ("fail", "unhealthy above"))),
        "In percent of the machine; load in waiting processes per CPU."),
    Group("Services", "all", (Input("services", "Services that have to run", "textarea", "one a line"),)),
)


TEMPLATES = {"layout.html": """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% block title %}{% endblock %} · HealthChecker</title>
<link rel="icon" href="{{ assets.svg }}" type="image/svg+xml">
<link rel="stylesheet" href="{{ assets.css }}">
<script src="{{ assets.js }}" defer></script>
</head>
<body>
<a class="skip hidden" href="#main">Skip to the content</a>
<header class="top">
<a class="brand" href="/-/">HealthChecker</a>
{% if user %}
<nav aria-label="Pages">
{% for href, label in [("/-/", "Overview"), ("/-/events", "Events"), ("/-/users", "Users")] %}
{% if label != "Users" or user.role == "admin" %}
<a href="{{ href }}"{% if request.path == href %} aria-current="page"{% endif %}>{{ label }}</a>
{% endif %}
{% endfor %}
</nav>
<div class="who"><a href="/-/password">{{ user.name }}<span class="hidden">: change the password</span></a>
<small>{{ user.role }}</small>
<form method="post" action="/-/logout"><button class="quiet">Log out</button></form></div>
{% endif %}
</header>
{% if initial %}
<p class="notice"><b>The first account still has its documented password.</b>
<a href="/-/password">Change it now</a>: anyone who can reach this page can log in with it.</p>
{% endif %}
<p class="notice lost" id="lost" role="alert" hidden></p>
<main id="main" tabindex="-1"{% if refresh %} data-refresh{% endif %}>
{% block main %}{% endblock %}
</main>
{% if user %}<footer class="soft">Times are the server's own, {{ zone }}.</footer>{% endif %}
<div class="tip" id="tip" hidden></div>
</body>
</html>
""", "macros.html": """
{% macro state(name, what="") %}<b class="state {{ name }}">{{ what or name }}</b>{% endmacro %}
{% macro heads() %}
<thead><tr>{% for name in varargs %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
{% endmacro %}
{% macro trouble() %}
<div id="trouble" role="alert" data-keep>{% if problem %}<p class="message unhealthy">{{ problem }}</p>{% endif %}</div>
{% endmacro %}
{% macro options(values, chosen) %}
{% for value in values %}
<option value="{{ value }}"{% if value == chosen %} selected{% endif %}>{{ value }}</option>
{% endfor %}
{% endmacro %}
{% macro invalid(name) %}
{% if errors[name] %} aria-invalid="true" aria-describedby="e-{{ name }}"{% endif %}
{% endmacro %}
{% macro fault(name) %}
{% if errors[name] %}<span class="error" id="e-{{ name }}">{{ errors[name] }}</span>{% endif %}
{% endmacro %}
{% macro password(label, name, fresh=false, hint="") %}
<label>{{ label }} <input type="password" name="{{ name }}" required maxlength="1024"
 autocomplete="{{ 'new' if fresh else 'current' }}-password"{% if fresh %} minlength="12"{% endif %}{{ invalid(name) }}>
{% if hint %}<span class="hint">{{ hint }}</span>{% endif %}
{{ fault(name) }}</label>
{% endmacro %}
{% macro event_rows(events, own=false) %}
{% for event in events %}
<tr><td><time>{{ event.at|clock }}</time></td><td>{{ event.kind }}</td>
{% if not own %}
<td>{% if event.resource %}<a href="{{ event.resource|page }}">{{ event.resource }}</a>{% endif %}</td>
{% endif %}
<td>{{ event.text }}</td><td>{{ event.actor }} <small>{{ event.address }}</small></td></tr>
{% else %}
<tr><td colspan="5" class="soft">None.</td></tr>
{% endfor %}
{% endmacro %}
""", "overview.html": """{% extends "layout.html" %}
{% from "macros.html" import state, heads, options with context %}
{% set word = "open" if gate.open else "closed" %}
{% block title %}{% if counts.unhealthy %}{{ counts.unhealthy }} unhealthy, {% endif %}gate {{ word }}{% endblock %}
{% block main %}
<h1 class="hidden">Overview</h1>
<section class="gate {{ 'healthy' if gate.open else 'unhealthy' }}" aria-label="Gate">
<h2 aria-live="polite">{{ state("healthy" if gate.open else "unhealthy", "Gate " ~ word) }}</h2>
{% if gate.since %}
<p>for <b>{{ (now - gate.since)|duration_text }}</b>, since <time>{{ gate.since|clock }}</time></p>
{% endif %}
{% if gate.causes %}
<ul>
{% for cause in gate.causes[:5] %}
<li><a href="{{ cause.href }}">{{ cause.name }}</a> {{ cause.why or "no result yet" }}</li>
{% endfor %}
{% if gate.causes|length > 5 %}<li><a href="?state=unhealthy">and {{ gate.causes|length - 5 }} more</a></li>{% endif %}
</ul>
{% elif gate.why %}<p>{{ gate.why }}</p>{% endif %}
</section>
<div class="tools">
<nav class="chips" aria-label="Filter by state">
<a href="{{ filtered('') }}"{% if not filter.state %} aria-current="true"{% endif %}>
All <b>{{ counts.values()|sum }}</b></a>
{% for name, count in counts.items() if count or filter.state == name %}
<a class="{{ name }}" href="{{ filtered(name) }}"{% if filter.state == name %} aria-current="true"{% endif %}>
{{ name|capitalize }} <b>{{ count }}</b></a>
{% endfor %}
</nav>
<form class="filter" role="search" data-live data-keep>
{% if filter.state %}<input type="hidden" name="state" value="{{ filter.state }}">{% endif %}
<input type="search" name="q" value="{{ filter.q }}" placeholder="Name, host or reason" aria-label="Search">
{% if tags %}
<select name="tag" aria-label="Tag">
<option value="">Every tag</option>
{{ options(tags, filter.tag) }}
</select>
{% endif %}
<noscript><button>Filter</button></noscript>
</form>
{% if user.role == "admin" %}<a class="button" href="/-/add">Add resource</a>{% endif %}
</div>
{% if rows %}
<table class="overview">
<caption class="hidden">Resources, worst first</caption>
{{ heads("State", "Resource", "For", "Last poll", "CPU", "Memory", "Fullest disk", "Last 60 polls") }}
<tbody>
{% for row in rows %}
<tr id="r{{ row.row.id }}" class="{{ row.group }}">
<td><b class="state {{ row.state }}">{{ row.state }}</b></td>
<th scope="row"><a href="{{ row.href }}">{{ row.name }}</a> <small>{{ row.place }}</small>
{%- for tag in row.tags %} <i>{{ tag }}</i>{% endfor %}
{%- if not row.critical %} <i>not critical</i>{% endif %}
{%- if row.maintenance %} <i class="maintenance">maintenance until {{ row.maintenance }}</i>{% endif %}
{%- if row.why %}<p>{{ row.why }}</p>{% endif %}</th>
<td title="{{ row.since_at }}">{{ row.since }}</td>
<td>{{ row.polled }}{% if row.seconds %} <small>in {{ row.seconds }}</small>{% endif %}</td>
{% for bar in row.bars %}<td>{{ bar }}</td>{% endfor %}
<td data-polls="{{ row.href }}/polls">{{ row.strip }}</td>
</tr>
{% endfor %}
</tbody>
</table>
{% elif not empty %}
<p class="empty">No resource matches. <a href="/-/">Show all</a></p>
{% else %}
<p class="empty">No resource is watched: the gate is open whatever happens.
{% if user.role == "admin" %}<a href="/-/add">Add the first one</a>{% endif %}</p>
{% endif %}
{% endblock %}
""", "resource.html": """{% extends "layout.html" %}
{% from "macros.html" import state, heads, trouble, event_rows with context %}
{% block title %}{{ shown.name }}: {{ shown.state }}{% endblock %}
{% block main %}
<header class="title">
<div><h1>{{ shown.name }}</h1>
<p class="soft">{{ shown.place }}
{%- for tag in shown.tags %} <i>{{ tag }}</i>{% endfor %}
{%- if not shown.critical %} <i>not critical</i>{% endif %}
 · {{ "from " ~ origin ~ ", read-only here" if origin else "added here" }}</p></div>
{% if user.role == "admin" %}
<div class="actions" data-keep>
<form method="post" action="{{ shown.href }}/check" data-inline><button>Check now</button></form>
<details name="action"><summary class="button">Maintenance</summary>
<form method="post" action="{{ shown.href }}/maintenance" data-inline class="panel">
<p><label>For <select name="minutes">
{% for minutes, label in [(30, "30 minutes"), (60, "1 hour"), (240, "4 hours"), (1440, "1 day"), (10080, "1 week")] %}
<option value="{{ minutes }}">{{ label }}</option>
{% endfor %}
</select></label></p>
<p><label>Reason <input name="reason" maxlength="200" required></label></p>
<p class="soft">Meanwhile it is polled and shown, and does not close the gate.</p>
<button class="primary">Begin maintenance</button>
</form></details>
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
{{ trouble() }}
{% if shown.maintenance %}
<section class="message maintenance" aria-label="Maintenance">
<p>{{ state("maintenance", "Maintenance") }} until {{ shown.maintenance }}
{%- if shown.row.maintenance_reason %}: {{ shown.row.maintenance_reason }}{% endif %}</p>
{% if user.role == "admin" %}
<form method="post" action="{{ shown.href }}/maintenance" data-inline>
<button name="minutes" value="0">End maintenance</button></form>
{% endif %}
</section>
{% endif %}
<section class="message now {{ shown.state }}" aria-label="State">
<p><span aria-live="polite">{{ state(shown.state) }}</span>
{% if shown.since %}for <b>{{ shown.since }}</b>, since <time>{{ shown.since_at }}</time>
{% else %}no result yet{% endif %}</p>
{% if shown.why %}<p class="why">{{ shown.why }}</p>{% endif %}
<p class="soft">{% if shown.polled %}Last poll {{ shown.polled }}, in {{ shown.seconds }}. {% endif %}
Polled every {{ shown.row.interval|duration_text }}. Availability:
{% for span, percent in availability.items() %}
{{ span }} <b>{{ "%.2f %%"|format(percent) if percent is number else "unknown" }}</b>{{ "." if loop.last else "," }}
{% endfor %}</p>
<div data-polls="{{ shown.href }}/polls">{{ shown.strip }}</div>
<details id="polls"><summary>Last polls</summary>
<table>
<caption class="hidden">Last polls, newest first</caption>
{{ heads("Time", "State", "Seconds", "Reason") }}
<tbody>
{% for poll in polls|reverse %}
<tr><td><time>{{ poll.at|clock }}</time></td><td>{{ state(poll.state) }}</td>
<td>{{ "%.2f"|format(poll.readings.seconds) if poll.readings.seconds }}</td>
<td>{{ poll.cause }}{% if poll.reason %}: {{ poll.reason }}{% endif %}</td></tr>
{% endfor %}
</tbody>
</table></details>
{% if shown.cause == "host_key" and user.role == "admin" %}
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
<div class="columns">
<section>
<h2 id="readings">Readings</h2>
<table aria-labelledby="readings">
{{ heads("Metric", "Now", "Warning", "Limit") }}
<tbody>
{% for reading in readings %}
<tr><th scope="row">{{ reading.label }}</th>
<td>{{ reading.bar }}{{ reading.text }}
{%- if reading.problem %}<span class="error">{{ reading.problem }}</span>{% endif %}</td>
{% for kind in ("warn", "fail") %}
<td>{{ "%g"|format(reading.limit[kind]) if reading.limit[kind] is number }}</td>
{% endfor %}
</tr>
{% else %}
<tr><td colspan="4" class="soft">The last poll read nothing.</td></tr>
{% endfor %}
</tbody>
</table>
</section>
{% if outcomes %}
<section>
<h2 id="outcomes">Services and checks</h2>
<table aria-labelledby="outcomes">
{{ heads("Result", "Service or check") }}
<tbody>
{% for kind, name, outcome in outcomes %}
<tr><td>{{ state("healthy", "good") if outcome.good else state("unhealthy", "bad") }}</td>
<td>{{ name }} <small>{{ kind }}</small>
{% if outcome.text|length > 80 or "\\n" in outcome.text.strip() %}
<details id="{{ kind }}-{{ name|urlencode }}"{% if not outcome.good %} open{% endif %}>
<summary>Output</summary><pre tabindex="0">{{ outcome.text }}</pre></details>
{% else %}
<p>{{ outcome.text }}</p>
{% endif %}
</td></tr>
{% endfor %}
</tbody>
</table>
</section>
{% endif %}
<section>
<h2>Machine</h2>
<dl>
{% for label, text in machine %}
<dt>{{ label }}</dt><dd>{{ text }}</dd>
{% else %}
<dt>Nothing is known yet.</dt><dd></dd>
{% endfor %}
</dl>
</section>
</div>
<section>
<div class="tools"><h2>History</h2>
<nav class="chips" aria-label="Time span">
{% for name in spans %}
<a href="?span={{ name }}"{% if name == span %} aria-current="true"{% endif %}>Last {{ name }}</a>
{% endfor %}
</nav></div>
<div class="charts">
{% for chart in charts %}
<figure>
<figcaption><b>{{ chart.label }}</b> average {{ chart.average }}, highest {{ chart.highest }}</figcaption>
<div class="plot"><ol class="scale" aria-hidden="true">
{% for text in chart.scale %}<li>{{ text }}</li>{% endfor %}
</ol>{{ chart.svg }}</div>
<ol class="times" aria-hidden="true">{% for text in chart.times %}<li>{{ text }}</li>{% endfor %}</ol>
</figure>
{% else %}
<p class="soft">Nothing was read in this time.</p>
{% endfor %}
</div>
</section>
<section>
<h2 id="events">Events</h2>
<table aria-labelledby="events" class="events">
{{ heads("Time", "Kind", "What", "Who") }}
<tbody>{{ event_rows(events, own=true) }}</tbody>
</table>
<p><a href="/-/events?resource={{ shown.name|urlencode }}">All events of {{ shown.name }}</a></p>
</section>
{% endblock %}
""", "events.html": """{% extends "layout.html" %}
{% from "macros.html" import heads, options, event_rows with context %}
{% block title %}Events{% endblock %}
{% block main %}
<div class="tools">
<h1>Events</h1>
<form class="filter" role="search" data-live data-keep>
<select name="kind" aria-label="Kind">
<option value="">Every kind</option>
{% for name, label in kinds.items() %}
<option value="{{ name }}"{% if name == filter.kind %} selected{% endif %}>{{ label }}</option>
{% endfor %}
</select>
<select name="resource" aria-label="Resource">
<option value="">Every resource</option>
{{ options(names, filter.resource) }}
</select>
<noscript><button>Filter</button></noscript>
</form>
</div>
<table class="events">
<caption class="hidden">Events, newest first</caption>
{{ heads("Time", "Kind", "Resource", "What", "Who") }}
<tbody>{{ event_rows(events) }}</tbody>
</table>
{% if older %}<p><a href="{{ older }}" rel="next">Older</a></p>{% endif %}
{% endblock %}
""", "users.html": """{% extends "layout.html" %}
{% from "macros.html" import heads, trouble, options, invalid, fault, password with context %}
{% block title %}Users{% endblock %}
{% block main %}
<div class="tools"><h1>Users</h1></div>
{{ trouble() }}
<table>
<caption class="hidden">Users</caption>
{{ heads("Name", "Role", "Change") }}
<tbody>
{% for account in users %}
<tr><th scope="row">{{ account.name }}{% if account.name == user.name %} <small>you</small>{% endif %}
{% if account.initial %} <i class="degraded">documented password</i>{% endif %}</th>
<td>{{ account.role }}</td>
<td><details name="user"><summary>Change<span class="hidden"> {{ account.name }}</span></summary>
<form method="post" class="row" action="/-/users/{{ account.name|urlencode }}">
<label>Role <select name="role">{{ options(roles, account.role) }}</select></label>
<label>New password <input type="password" name="password" minlength="12" maxlength="1024" autocomplete="new-password"
 placeholder="unchanged"></label>
<button>Change {{ account.name }}</button></form>
<form method="post" action="/-/users/{{ account.name|urlencode }}/remove">
<button class="danger">Remove {{ account.name }}</button></form></details></td></tr>
{% endfor %}
</tbody>
</table>
<form method="post" class="panel" aria-labelledby="new">
<h2 id="new">Add a user</h2>
<div class="inputs">
<label>Name <input name="name" value="{{ given.name }}" required autocomplete="off"{{ invalid("name") }}>
{{ fault("name") }}</label>
<label>Role <select name="role">{{ options(roles|reverse, given.role) }}</select>
<span class="hint">admin: everything; viewer: looks</span></label>
{{ password("Password", "password", true, "12 characters or more") }}
</div>
<button class="primary">Add user</button>
</form>
{% endblock %}
""", "login.html": """{% extends "layout.html" %}
{% from "macros.html" import trouble, invalid, fault, password with context %}
{% block title %}Log in{% endblock %}
{% block main %}
<form method="post" class="panel narrow">
<h1>Log in</h1>
{{ trouble() }}
<label>Name <input name="username" value="{{ given.username }}" required autofocus autocomplete="username"></label>
{{ password("Password", "password") }}
<button class="primary">Log in</button>
</form>
{% endblock %}
""", "password.html": """{% extends "layout.html" %}
{% from "macros.html" import trouble, invalid, fault, password with context %}
{% block title %}Change the password{% endblock %}
{% block main %}
<form method="post" class="panel narrow">
<h1>Change the password</h1>
{{ trouble() }}
<input class="hidden" value="{{ user.name }}" autocomplete="username" tabindex="-1" aria-hidden="true" readonly>
{{ password("Password until now", "current") }}
{{ password("New password", "new", true, "12 characters or more; your other sessions end") }}
{{ password("New password again", "again", true) }}
<button class="primary">Change the password</button>
</form>
{% endblock %}
""", "form.html": """{% extends "layout.html" %}
{% from "macros.html" import options, invalid, fault with context %}
{% block title %}{{ heading }}{% endblock %}
{% block main %}
<form method="post" class="resource" autocomplete="off">
<div class="tools"><h1>{{ heading }}</h1></div>
{% for group in groups %}
<fieldset class="panel {{ group.only }}">
<legend>{{ group.title }}</legend>
{% if group.text %}<p class="soft">{{ group.text }}</p>{% endif %}
<div class="inputs">
{% for input in group.inputs %}
{% set name = input.name %}
{% set value = given.get(name, defaults.get(name, "")) %}
<label class="{{ input.kind }}">
{% if input.kind == "checkbox" %}
<input type="checkbox" name="{{ name }}" value="true"{% if value == "true" %} checked{% endif %}> {{ input.label }}
{% elif input.kind == "select" %}
{{ input.label }} <select name="{{ name }}"{{ invalid(name) }}>{{ options(choices[name], value) }}</select>
{% elif input.kind == "textarea" %}
{{ input.label }} <textarea name="{{ name }}" rows="3"{{ invalid(name) }}>
{{ given[name] }}</textarea>
{% elif input.kind == "password" %}
{{ input.label }} <input type="password" name="{{ name }}" autocomplete="new-password"
{%- if name in kept %} placeholder="unchanged"{% endif %}{{ invalid(name) }}>
{% else %}
{{ input.label }} <input name="{{ name }}" value="{{ given[name] }}" placeholder="{{ defaults[name] }}"
{%- if input.kind == "number" %} inputmode="decimal"{% endif %}
{%- if fixed and name == "name" %} readonly{% endif %}{{ invalid(name) }}>
{% endif %}
{% if input.hint %}<span class="hint">{{ input.hint }}</span>{% endif %}
{{ fault(name) }}</label>
{% endfor %}
</div>
</fieldset>
{% endfor %}
<div class="finish">
<button name="do" value="test" data-inline>Test connection</button>
<button name="do" value="save" class="primary">Save</button>
<a href="{{ back }}">Cancel</a>
<div id="result" aria-live="polite">
{% if problem %}<p class="message {{ outcome or 'unhealthy' }}">{{ problem }}</p>{% endif %}
</div>
</div>
</form>
{% endblock %}
""", "error.html": """{% extends "layout.html" %}
{% block title %}{{ title }}{% endblock %}
{% block main %}
<section class="panel narrow"><h1>{{ title }}</h1><p>{{ problem }}</p><p><a href="/-/">Overview</a></p></section>
{% endblock %}
"""}


# === Style ===================================================================
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect width="32" height="32" rx="7" fill="#18713a"/>
<path d="M4 17h6l3-8 6 15 3-7h6" fill="none" stroke="#fff" stroke-width="3" stroke-linejoin="round"/></svg>
"""
STYLE = r"""
:root {
  color-scheme: light dark;
  --page: light-dark(#f4f5f7, #0f141a); --surface: light-dark(#fff, #171d25); --sunken: light-dark(#eef0f3, #11161d);
  --text: light-dark(#19212c, #dee5ed); --soft: light-dark(#566070, #98a5b5); --line: light-dark(#dadfe6, #2b3440);
  --link: light-dark(#0a58a8, #74b5f7); --track: light-dark(#e1e5ea, #2b3440); --fill: light-dark(#6f8096, #7e90a5);
  --healthy: light-dark(#18713a, #55c57c); --degraded: light-dark(#855400, #e3b04b);
  --unhealthy: light-dark(#b91f29, #ff8078); --maintenance: light-dark(#5443c2, #b0a4ff); --unknown: var(--soft);
  font: 14px/1.45 Inter, system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; background: var(--page); color: var(--text);
}
* { box-sizing: border-box; } body, h1, h2, p, ul, ol, dl, dd, figure, fieldset { margin: 0; padding: 0; }
body { overflow-wrap: anywhere; }
.top, .notice, main, footer { padding: 0 max(1rem, 50vw - 52rem); }
main { outline: none; } footer { padding-block: 1.5rem; font-size: .8125rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1rem; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: .15em; }
nav a, th a, .brand, .who a, .button { text-decoration: none; }
th a:hover, nav a:hover, .who a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 3px; }
small, .soft, th, dt, figcaption { color: var(--soft); font-weight: 400; }
small { font-size: .8125rem; } b { font-weight: 600; } time { white-space: nowrap; }
[hidden] { display: none !important; }
.hidden:not(:focus) { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.skip:focus { position: fixed; inset: .5rem auto auto .5rem; z-index: 3; padding: .5rem; background: var(--surface); }
.healthy { --state: var(--healthy); } .degraded { --state: var(--degraded); } .unhealthy { --state: var(--unhealthy); }
.unknown { --state: var(--unknown); } .maintenance { --state: var(--maintenance); }

.top { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 1.5rem; min-height: 3rem;
  padding-block: .375rem; background: var(--surface); border-bottom: 1px solid var(--line); }
.brand { color: inherit; font-weight: 650; }
.top nav { display: flex; gap: 1.25rem; flex: 1; } .top nav a { color: var(--soft); padding: .25rem 0; }
.top nav a[aria-current] { color: var(--text); box-shadow: 0 2px var(--link); }
.who { display: flex; align-items: center; gap: .5rem; }
.notice { padding-block: .625rem; background: color-mix(in srgb, var(--degraded) 16%, var(--page)); }
.lost { position: sticky; top: 0; z-index: 2; background: var(--unhealthy); color: var(--surface); }

.state { display: inline-block; white-space: nowrap; color: var(--state); }
.state::before { display: inline-block; width: 1.375em; font-weight: 700; content: "?" / ""; }
.state.healthy::before { content: "\2713" / ""; } .state.unhealthy::before { content: "\2715" / ""; }
.state.degraded::before { content: "\25B2" / ""; } .state.maintenance::before { content: "\2016" / ""; }
.gate, .message { padding: .75rem 1rem; border: 1px solid color-mix(in srgb, var(--state) 35%, var(--line));
  border-left: 4px solid var(--state); border-radius: 6px;
  background: color-mix(in srgb, var(--state) 7%, var(--surface)); }
.gate { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; margin-top: 1rem; }
.gate h2 { font-size: 1.375rem; } .gate ul { flex-basis: 100%; list-style: none; } .gate li { padding-top: .25rem; }
.message { margin-top: .75rem; } .message > * + *, .panel > * + * { margin-top: .5rem; }
.now > p .state { font-size: 1.25rem; margin-right: .5rem; }
#trouble:not(:has(p)) { display: none; } .why { font-size: 1.0625rem; }

.tools { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; margin: 1rem 0 .625rem; }
.chips { display: flex; flex-wrap: wrap; gap: .375rem; flex: 1 1 auto; }
.chips a { padding: .1875rem .625rem; border: 1px solid var(--line); border-radius: 1rem; background: var(--surface);
  color: var(--state, var(--text)); white-space: nowrap; }
.chips a[aria-current] { border-color: currentColor; box-shadow: inset 0 0 0 1px currentColor; }
.filter { display: flex; gap: .5rem; min-width: 0; } .filter select { max-width: 14rem; }
input, select, textarea, button, .button { font: inherit; color: inherit; padding: .3125rem .625rem; max-width: 100%;
  border: 1px solid light-dark(#8b96a5, #5d6b7c); border-radius: 5px; background: var(--surface); }
button, .button { cursor: pointer; white-space: nowrap; color: var(--link); font-weight: 500; }
button:hover, .button:hover { background: var(--sunken); }
.quiet { border-color: transparent; background: none; color: var(--soft); font-weight: 400; padding-inline: .375rem; }
.primary { background: var(--link); border-color: var(--link); color: var(--surface); }
.primary:hover { background: color-mix(in srgb, var(--link) 85%, var(--text)); }
.danger { color: var(--unhealthy); border-color: var(--unhealthy); }
[aria-busy] button { opacity: .6; cursor: progress; }

table { width: 100%; border-collapse: collapse; background: var(--surface); border: 1px solid var(--line); }
th, td { padding: .375rem .625rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
tbody th { min-width: 5rem; } thead th { border: 0; white-space: nowrap; font-size: .8125rem; }
i { display: inline-block; padding: 0 .375rem; border: 1px solid var(--line); border-radius: 3px; font-style: normal;
  font-size: .75rem; line-height: 1.3; background: var(--sunken); color: var(--soft); }
i.maintenance, i.degraded { color: var(--state); }
.overview td { white-space: nowrap; }
.overview thead th { position: sticky; top: 0; z-index: 1; background: var(--surface);
  box-shadow: inset 0 -1px var(--line); }
.overview tbody th { color: inherit; width: 100%; min-width: 14rem; }
.overview tbody th a { font-weight: 600; margin-right: .25rem; }
.overview tbody th p { color: var(--state); font-size: .875rem; }
.overview tr.unhealthy { box-shadow: inset 3px 0 var(--unhealthy); }
.empty { padding: 3rem 1rem; text-align: center; background: var(--surface); border: 1px solid var(--line); }
.bar { width: 6rem; max-width: 40%; height: .5rem; margin-right: .5rem; vertical-align: baseline; }
.overview .bar { width: 4rem; max-width: none; }
.bar path { stroke: var(--fill); stroke-width: 8; fill: none; } .bar path:first-child { stroke: var(--track); }
.bar .degraded, .bar .unhealthy { stroke: var(--state); }
.bar .warn, .bar .fail { stroke: var(--degraded); stroke-width: 2; vector-effect: non-scaling-stroke; }
.bar .fail { stroke: var(--unhealthy); }
.strip { display: block; width: 15rem; height: 1.25rem; }
.strip path { stroke: var(--state); stroke-width: 20; stroke-dasharray: .72 .28; fill: none; }
.strip path:first-child { stroke: var(--track); stroke-width: 2; transform: translateY(9px); }
.strip .healthy { stroke-width: 9; transform: translateY(5.5px); }
.strip .degraded { stroke-width: 14; transform: translateY(3px); }
.message .strip { width: 100%; max-width: 60rem; height: 1.5rem; }
.tip { position: fixed; z-index: 3; max-width: min(32rem, 100vw - 1rem); padding: .25rem .625rem; border-radius: 4px;
  background: var(--text); color: var(--page); font-size: .8125rem; pointer-events: none; }

.title { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .75rem 1rem; margin-top: 1rem; }
.actions { position: relative; display: flex; flex-wrap: wrap; align-items: start; gap: .5rem; }
.actions summary { list-style: none; } summary { cursor: pointer; color: var(--link); }
.panel { margin-top: 1rem; padding: 1rem; background: var(--surface); border: 1px solid var(--line);
  border-radius: 6px; }
.actions .panel { position: absolute; right: 0; z-index: 2; width: 30rem; max-width: calc(100vw - 2rem);
  margin-top: .375rem; box-shadow: 0 6px 24px #0004; }
.narrow { display: grid; gap: .75rem; max-width: 24rem; margin: 8vh auto 0; } .narrow > * { margin: 0 !important; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0 1.5rem; }
.columns h2, h2#events { margin: 1.25rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .375rem 1rem; padding: .625rem;
  background: var(--surface); border: 1px solid var(--line); }
code, pre { font: .8125rem/1.45 ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: .25rem 0 0; padding: .5rem .625rem; max-height: 20rem; overflow: auto; white-space: pre-wrap;
  background: var(--sunken); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(27rem, 100%), 1fr)); gap: 1rem; }
figure { padding: .625rem .75rem; background: var(--surface); border: 1px solid var(--line); }
figcaption b { color: var(--text); margin-right: .375rem; }
.plot { display: flex; gap: .375rem; height: 8rem; margin-top: .75rem; }
.scale, .times { display: flex; justify-content: space-between; list-style: none; color: var(--soft);
  font-size: .75rem; }
.scale { flex-direction: column; min-width: 2rem; margin-block: -.375rem; text-align: right; line-height: 1; }
.times { margin: .375rem 0 0 2.375rem; } .graph { flex: 1; width: 100%; min-width: 0; height: 100%; overflow: visible; }
.graph path { fill: none; stroke: var(--track); vector-effect: non-scaling-stroke; }
.graph .band { fill: color-mix(in srgb, var(--link) 22%, transparent); stroke: none; }
.graph .line { stroke: var(--link); stroke-width: 1.5; stroke-linejoin: round; stroke-linecap: round; }
.graph .warn, .graph .fail { stroke: var(--degraded); stroke-dasharray: 5 4; }
.graph .fail { stroke: var(--unhealthy); }

form.resource, form:has(> .inputs) { max-width: 68rem; }
.inputs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: .75rem 1rem; }
.row { display: flex; flex-wrap: wrap; align-items: end; gap: .5rem; padding: .5rem 0; }
.checks .inputs { grid-template-columns: minmax(0, 1fr) minmax(0, 2fr) 9rem; }
label { display: block; }
label > input:not([type=checkbox]), label > select, label > textarea { display: block; width: 100%;
  margin-top: .125rem; }
label.checkbox { align-self: center; } label.textarea { grid-column: 1 / -1; }
.hint, .error { display: block; margin-top: .125rem; font-size: .8125rem; color: var(--soft); }
.error { color: var(--unhealthy); }
[aria-invalid] { border-color: var(--unhealthy); box-shadow: 0 0 0 1px var(--unhealthy); }
::placeholder { color: var(--soft); opacity: 1; } fieldset { min-width: 0; }
legend { float: left; width: 100%; padding: 0 0 .5rem; font-weight: 600; } legend + * { clear: both; }
.finish { position: sticky; bottom: 0; display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem;
  margin-top: 1rem; padding: .75rem 0; background: var(--page); border-top: 1px solid var(--line); }
#result { flex: 1 1 20rem; } #result .message { margin: 0; padding: .375rem .75rem; }
form:has([value=local]:checked, [value=simulated]:checked) .remote,
form:not(:has([value=windows]:checked)) .windows,
form:not(:has([value=simulated]:checked)) .simulated { display: none; }

@media (max-width: 60rem) {
  .overview thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .overview, .overview tbody { display: block; }
  .overview tr { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .125rem .75rem;
    padding: .5rem .75rem; border-top: 1px solid var(--line); }
  .overview td, .overview tbody th { border: 0; padding: 0; min-width: 0; width: auto; }
  .overview tbody th { grid-column: 1 / -1; order: -1; } .overview td:nth-child(3)::before { content: "for "; }
  .overview td:nth-child(n+5):nth-child(-n+7)::before { display: block; font-size: .75rem; color: var(--soft); }
  .overview td:nth-child(5)::before { content: "CPU"; } .overview td:nth-child(6)::before { content: "Memory"; }
  .overview td:nth-child(7)::before { content: "Disk"; }
  .overview td:empty::before { content: none !important; } .overview td:last-child { grid-column: 1 / -1; }
  .overview .strip { width: 100%; } .overview .bar { width: calc(100% - 3.25rem); }
  .overview td small { display: none; } .checks .inputs { grid-template-columns: 1fr; }
  .filter { flex: 1 1 100%; } .filter input, .filter select { flex: 1; min-width: 0; }
  .actions .panel { left: 0; right: auto; } .events thead { display: none; }
  .events tr { display: block; padding: .5rem .75rem; border-top: 1px solid var(--line); }
  .events td { display: inline; border: 0; padding: 0 .5rem 0 0; }
}
"""
PAGE_SCRIPT = r"""
"use strict";
const PERIOD = 2000, PATIENCE = 10000, SENDING = 90000;      // milliseconds
const [main, lost, tip] = ["main", "lost", "tip"].map(id => document.getElementById(id));
let attended = true;    // somebody is here: only that keeps a session alive
let turn = 0;           // counts questions; the answer to an earlier one than the last is dropped
let sending = 0;        // forms under way

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
  morph(main, page.querySelector("main"), sent);
  if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });     // it moved
}

async function refresh() {
  const begin = performance.now();
  try {
    const { answer, page, late } = await ask(location.href);
    if (answer.redirected || [401, 403, 404].includes(answer.status)) { location.reload(); return 0; }
    if (!answer.ok) throw new Error(answer.statusText);
    if (!late) show(page);
    lost.hidden = true;
  } catch {
    if (lost.hidden) lost.textContent = `No answer since ${new Date().toLocaleTimeString()}. What is shown is old.`;
    lost.hidden = false;
  }
  return performance.now() - begin;
}

// A busy server is asked less often: the pause is ten times as long as the answer took.
async function watch() {
  const idle = document.hidden || sending || !("refresh" in main.dataset);
  const took = idle ? 0 : await refresh();
  setTimeout(watch, Math.max(PERIOD, 10 * took));
}

// Sends a form without leaving the page, which stays as it was but for what the answer changes.
async function send(form, button) {
  const body = new URLSearchParams(new FormData(form, button));
  attended = true;
  sending++;
  button.disabled = true;
  form.setAttribute("aria-busy", "true");
  try {
    const url = form.getAttribute("action") || location.href;
    let { answer, page } = await ask(url, { method: "POST", body, signal: AbortSignal.timeout(SENDING) });
    const elsewhere = answer.redirected && new URL(answer.url).pathname !== location.pathname;
    if (elsewhere) { location.assign(answer.url); return; }
    if (answer.redirected) page = (await ask(location.href)).page;
    if (answer.ok) form.closest("details")?.removeAttribute("open");
    show(page, true);
  } catch {
    lost.textContent = "No answer: it may not have been done.";
    lost.hidden = false;
  } finally {
    sending--;
    button.disabled = false;
    form.removeAttribute("aria-busy");
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

// Over a strip: when that poll was, and what it found.
let polls = { at: 0 };
addEventListener("pointermove", async event => {
  attended = true;
  const strip = event.target.closest?.("[data-polls]")?.querySelector(".strip");
  if (!strip) { tip.hidden = true; return; }
  const url = strip.parentElement.dataset.polls, { clientX, clientY } = event;
  if (polls.url !== url || performance.now() - polls.at > PATIENCE)
    polls = { url, at: performance.now(),
      list: fetch(url, { headers: { "X-Refresh": "1" } }).then(answer => answer.json()) };
  const list = await polls.list.catch(() => []), area = strip.getBoundingClientRect();
  const poll = list[list.length - 1 - Math.floor((area.right - clientX) / area.width * strip.viewBox.baseVal.width)];
  tip.hidden = !poll;
  if (!poll) return;
  tip.textContent = poll.join("  ");
  tip.style.left = `${Math.max(8, Math.min(clientX + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${clientY + 18 + tip.offsetHeight < innerHeight ? clientY + 18 : clientY - tip.offsetHeight - 8}px`;
}, { passive: true });

for (const kind of ["keydown", "pointerdown", "wheel"])
  addEventListener(kind, () => { attended = true; }, { passive: true });
addEventListener("visibilitychange", () => { if (!document.hidden && "refresh" in main.dataset) refresh(); });
setTimeout(watch, PERIOD);
"""


# === Views ===================================================================
STATES = ("unhealthy", "unknown", "degraded", "maintenance", "healthy")     # worst first, as pages sort and filter
BARS = ("cpu_percent", "memory_percent", "disk_percent")  # of the overview
CHECK_INPUTS = ("name", "Name"), ("command", "Command"), ("timeout", "Timeout, seconds")
EVENTS_SHOWN = 100              # of a page
OWN_EVENTS = 20                 # on the page of a resource
EMPTY_CHECKS = 2                # rows of its form for further checks
SQUEEZED = 1 << 14              # bytes of a page from which on it is sent compressed
ASSETS = {f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.{suffix}": (kind, text) for suffix, kind, text in (
    ("css", "text/css", STYLE), ("js", "text/javascript", PAGE_SCRIPT), ("svg", "image/svg+xml", ICON))}
KINDS = {"gate": "Gate", "state": "States", "change": "Changes", "login": "Logins"}
Answer = flask.typing.ResponseReturnValue


def resource_path(name: str) -> str:
    return f"{PREFIX}resources/{quote(name, safe='')}"


def add_template_globals(app: flask.Flask) -> None:
    """Gives the application its templates and what they use."""
    app.jinja_options = {"loader": jinja2.DictLoader(TEMPLATES), "trim_blocks": True, "lstrip_blocks": True}
    app.jinja_env.filters.update(duration_text=duration_text, clock=clock, page=resource_path)
    app.jinja_env.globals.update(assets={name.rpartition(".")[2]: f"{PREFIX}static/{name}" for name in ASSETS})


def asset(name: str) -> Answer:
    """Style, script or icon; its name changes with it, so that a browser may keep it."""
    if name not in ASSETS:
        raise ApiError("there is no such file", 404)
    kind, text = ASSETS[name]
    return flask.Response(text, mimetype=kind, headers={"Cache-Control": "public, max-age=31536000, immutable"})


def page(template: str, status: int = 200, **shown: Any) -> flask.Response:
    """A page; `shown` is what its template needs beside what all of them do."""
    who: Principal | None = flask.g.get("principal")
    common: dict[str, Any] = {"user": who.user if who else None, "errors": {}, "given": {}}
    if who and who.operator:
        common |= {"now": who.site.clock(), "zone": time.strftime("%Z")}
        with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError), who.site.store.reading() as session:
            common["initial"] = initial_user(session) is not None   # the page may be to say that this fails
    text = flask.render_template(template, **(common | shown)).encode()
    response = flask.Response(text, status, mimetype="text/html")
    if len(text) > SQUEEZED and flask.request.accept_encodings.quality("gzip"):
        response.data = gzip.compress(text, 1)
        response.headers["Content-Encoding"] = "gzip"
    response.headers["Vary"] = "Accept-Encoding"
    return response


class ResourceRow:
    """A resource as a person reads it; texts are empty where there is nothing to say."""

    def __init__(self, row: Resource, status: Status | None, now: float) -> None:
        self.row, self.name, self.href = row, row.name, resource_path(row.name)
        self.settings: dict[str, Any] = json.loads(row.settings)    # unchecked: 1,000 of them would take too long
        self.tags: list[str] = self.settings["tags"]
        self.critical: bool = self.settings["critical"]
        self.status = known = status_of(row, status)
        self.state, self.cause, self.begun = known.state, known.cause, known.since
        self.why = f"{known.cause}: {known.reason}" if known.cause else ""
        self.since, self.since_at = (duration_text(now - known.since), clock(known.since)) if known.since else ("", "")
        self.polled = f"{duration_text(now - known.polled)} ago" if known.polled else ""
        self.seconds = f"{known.seconds:.2f} s" if known.polled else ""
        self.maintenance = clock(row.maintenance)[:-3] if row.maintenance > now else ""
        self.group = "maintenance" if self.maintenance else self.state
        self.strip = strip_svg(status.strip if status else "")

    @property
    def counts(self) -> bool:
        """Whether the gate depends on it now."""
        return self.critical and not self.maintenance

    @property
    def place(self) -> str:
        port = "" if self.row.port in (SSH_PORT, *WINRM_PORTS.values()) else f":{self.row.port}"
        return self.row.platform if self.row.platform in HOSTLESS else (
            f"{self.row.hostname}{port} · {self.row.platform}")

    def origin(self, site: ConsoleContext) -> str:
        """Where the inventory states it; empty when it was added here."""
        return site.places.get(self.name, site.inventory.path.name) if self.row.origin == "inventory" else ""

    def limit(self, metric: str) -> Marks:
        return self.settings["limits"].get(metric) or {}

    @property
    def bars(self) -> list[Markup]:
        found = readings(self.status.packed)
        return [bar_svg(found[metric], self.limit(metric)) + f"{found[metric]:.0f} %" if metric in found else Markup()
                for metric in BARS]

    @property
    def order(self) -> tuple[int, bool, float, str]:
        """Worst first; among those not healthy, what the gate depends on, and what happened last."""
        since = 0.0 if self.group == "healthy" else -self.begun
        return STATES.index(self.group), not self.critical, since, self.name

    def matches(self, text: str, tag: str) -> bool:
        words = (self.name, self.row.hostname, self.row.platform, self.why, *self.tags)
        return (not tag or tag in self.tags) and text.casefold() in "\n".join(words).casefold()


def gate_shown(session: Session, is_open: bool, resources: Iterable[ResourceRow]) -> dict[str, Any]:
    """The gate, since when, and which resources close it: the first to fail stands first."""
    last = next(iter(events(session, kind="gate", limit=1)), None)
    blockers = [] if is_open else [one for one in resources if one.counts and one.state in ("unhealthy", "unknown")]
    return {"open": is_open, "since": last.at if last else 0.0, "why": last.text if last and not is_open else "",
            "causes": sorted(blockers, key=lambda one: one.begun)}


def overview() -> Answer:
    """Every resource, worst first, and the gate."""
    site = current_principal().site
    now = site.clock()
    wanted = {name: flask.request.args.get(name, "") for name in ("state", "q", "tag")}
    with site.store.reading() as session:
        everything = [ResourceRow(row, status, now) for row, status in session.execute(RESOURCES)]
        gate = gate_shown(session, site.is_healthy, everything)
    found = [one for one in everything if one.matches(wanted["q"], wanted["tag"])]
    counted = collections.Counter(one.group for one in found)
    rows = sorted((one for one in found if wanted["state"] in ("", one.group)), key=lambda one: one.order)

    def filtered(state: str) -> str:
        return "?" + urlencode({name: value for name, value in (wanted | {"state": state}).items() if value})

    return page("overview.html", gate=gate, rows=rows, counts={state: counted[state] for state in STATES},
                tags=sorted({tag for one in everything for tag in one.tags}), filter=wanted, filtered=filtered,
                empty=not everything, refresh=True)


def amount(metric: str, value: float) -> str:
    """A reading with its unit."""
    if metric.endswith("_percent"):
        return f"{value:.1f} %"
    return f"{value:.2f} s" if metric == "seconds" else f"{value:.2f}"


def reading_rows(sample: Mapping[str, Any], one: ResourceRow) -> list[dict[str, Any]]:
    """Each metric that was read, has a limit, or could not be read."""
    rows = []
    for metric in Limits.model_fields:
        limit, problem = one.limit(metric), sample["problems"].get(metric, "")
        top = 100.0 if metric.endswith("_percent") else 1.25 * max(filter(None, limit.values()), default=0.0)
        found = [(name, value) for name, value in sample["metrics"].items() if name.partition(" ")[0] == metric]
        rows += [{"label": f"{LABELS[metric]} {name.partition(' ')[2]}", "limit": limit, "text": amount(metric, value),
                  "bar": bar_svg(value, limit, top) if top else ""} for name, value in found]
        if problem or (limit and not found):
            rows.append({"label": LABELS[metric], "limit": limit, "problem": problem or "not read"})
    return rows


def machine_rows(sample: Mapping[str, Any], host_key: str | None) -> list[tuple[str, str]]:
    """What is known of the machine itself."""
    details = sample["details"]
    rows = [(label, details.get(name)) for name, label in
            (("hostname", "Host name"), ("os", "System"), ("kernel", "Kernel"), ("cpu_count", "CPUs"))]
    rows.append(("Up for", duration_text(details["uptime_seconds"]) if "uptime_seconds" in details else None))
    return [(label, f"{text:g}" if isinstance(text, float) else str(text))
            for label, text in (*rows, ("Host key", host_key)) if text is not None]


def charts(session: Session, one: ResourceRow, span: str, now: float) -> list[dict[str, Any]]:
    """A chart for each metric of which there is something."""
    begin, drawn = now - SPANS[span][0], []
    times = [time.strftime({"hour": "%H:%M", "day": "%H:%M"}.get(span, "%d %b"),
                           time.localtime(begin + part * SPANS[span][0] / 4)) for part in range(5)]
    for metric, label in LABELS.items():
        points, limit = chart(session, one.row.id, metric, span, now), one.limit(metric)
        if points:
            highest = max(point.maximum for point in points)
            top = 100.0 if metric.endswith("_percent") else scale_top([highest, *filter(None, limit.values())])
            average = sum(point.average for point in points) / len(points)
            drawn.append({"label": label, "average": amount(metric, average), "times": times,
                          "highest": amount(metric, highest), "svg": chart_svg(points, limit, begin, now, top),
                          "scale": [f"{part * top:g}" for part in (1, 0.5, 0)]})
    return drawn


NO_SAMPLE: dict[str, Any] = {"details": {}, "metrics": {}, "services": {}, "checks": {}, "problems": {}}


def resource_page(name: str, status: int = 200, **more: Any) -> flask.Response:
    """Everything about one resource."""
    site = current_principal().site
    now = site.clock()
    span = flask.request.args.get("span", "")
    span = span if span in SPANS else "hour"
    with site.store.reading() as session:
        row = find_resource(session, name)
        one = ResourceRow(row, session.get(Status, row.id), now)
        more |= {"charts": charts(session, one, span, now), "availability": availability(session, one.row.id, now),
                 "polls": samples(session, one.row.id),
                 "events": events(session, resource=name, limit=OWN_EVENTS)}
    sample = json.loads(one.status.sample) or NO_SAMPLE
    outcomes = [(kind, called, outcome) for kind in ("service", "check")
                for called, outcome in sample[f"{kind}s"].items()]
    return page("resource.html", status, shown=one, span=span, spans=SPANS, readings=reading_rows(sample, one),
                machine=machine_rows(sample, one.row.host_key), origin=one.origin(site), refresh=True,
                outcomes=sorted(outcomes, key=lambda outcome: bool(outcome[2]["good"])), **more)


def polls(name: str) -> Answer:
    """For the script: time, state and reason of the polls in the strip, oldest first."""
    with current_principal().site.store.reading() as session:
        number = session.scalar(sqlalchemy.select(Resource.id).where(Resource.name == name))
        found = samples(session, number) if number is not None else []
    return flask.Response(json.dumps([[clock(poll.at), poll.state, f"{poll.cause}: {poll.reason}" if poll.cause else ""]
                                      for poll in found]), mimetype="application/json")


def event_page() -> Answer:
    """What happened, newest first."""
    args = flask.request.args
    wanted = {name: args.get(name, "") for name in ("kind", "resource")}
    before = int(args["before"]) if re.fullmatch("[0-9]{1,18}", args.get("before", "")) else None
    with current_principal().site.store.reading() as session:
        found = events(session, resource=wanted["resource"] or None, kind=wanted["kind"] or None, before=before,
                       limit=EVENTS_SHOWN)
        names = sorted(session.scalars(sqlalchemy.select(Resource.name)))
    older = {**wanted, "before": str(found[-1].id)} if len(found) == EVENTS_SHOWN else {}
    return page("events.html", events=found, kinds=KINDS, filter=wanted, names=names, refresh=before is None,
                older="?" + urlencode({name: value for name, value in older.items() if value}) if older else "")


# --- forms ---
def every_input(checks: int) -> tuple[Group, ...]:
    """The form of a resource, with room for `checks` checks."""
    return (*FORM, Group("Checks", "checks", tuple(
        Input(f"checks.{number}.{name}", label, "number" if name == "timeout" else "text")
        for number in range(checks) for name, label in CHECK_INPUTS), "Commands of your own: exit status 0 is good."))


def flatten(stated: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings as the texts that the form shows, by names with dots."""
    texts: dict[str, str] = {}
    for name, value in stated.items():
        where = prefix + name
        if isinstance(value, dict):
            texts |= flatten(value, f"{where}.")
        elif name == "checks":
            texts |= flatten({str(number): check for number, check in enumerate(value)}, f"{where}.")
        elif isinstance(value, list):
            texts[where] = (", " if name == "tags" else "\n").join(value)
        elif value is not None:
            texts[where] = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(
                value, float) else str(value)
    return texts


DEFAULTS = flatten({name: field.default for name, field in ResourceSettings.model_fields.items()
                    if isinstance(field.default, (bool, int, float, str))} | {"platform": Platform.UNIX.value})
CHOICES = {"platform": SELECTABLE, "auth": get_args(ResourceSettings.model_fields["auth"].annotation)}


def nested(texts: Mapping[str, str]) -> dict[str, Any]:
    """The reverse of flatten, all values texts; what is empty is None, and stands for the default."""
    tree: dict[str, Any] = {}
    for name, text in texts.items():
        *above, last = name.split(".")
        branch = tree
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = text.strip() or None
    return tree


def stated_by(texts: Mapping[str, str]) -> dict[str, Any]:
    """The settings that a form states, in the inventory's names; None stands for the default."""
    body = nested(texts)
    platform = body.get("platform") or Platform.UNIX.value
    body["tags"] = [tag.strip() for tag in texts.get("tags", "").split(",") if tag.strip()]
    body["services"] = [name.strip() for name in texts.get("services", "").splitlines() if name.strip()]
    given = [{name: value for name, value in check.items() if value is not None}
             for _, check in sorted(body.pop("checks", {}).items(), key=lambda item: int(item[0]))]
    body["checks"] = [check for check in given if check]
    body["limits"] = {metric: {kind: value for kind, value in limit.items() if value is not None} or None
                      for metric, limit in body.get("limits", {}).items()}
    return body | dict.fromkeys(foreign_fields(platform) & body.keys())


def posted(form: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The texts of a resource's form as they can be shown again, and its secrets, which never are."""
    numbers = [int(name.split(".")[1]) for name in form if re.fullmatch(r"checks\.\d{1,3}\.\w+", name)]
    texts: dict[str, str] = {}
    secrets_: dict[str, str] = {}
    for given in (given for group in every_input(1 + max(numbers, default=0)) for given in group.inputs):
        text = form.get(given.name, "")
        if given.kind != "password":
            texts[given.name] = text or ("false" if given.kind == "checkbox" else "")
        elif text:
            secrets_[given.name] = text
    return texts, secrets_


def form_page(name: str, given: Mapping[str, str], status: int = 200, **more: Any) -> flask.Response:
    """The form to add a resource, or to change the one called `name`."""
    checks = sum(key.endswith(".command") for key in given) + EMPTY_CHECKS
    return page("form.html", status, heading=f"Edit {name}" if name else "Add a resource", groups=every_input(checks),
                given=given, defaults=DEFAULTS, choices=CHOICES, fixed=bool(name), checks=checks,
                back=resource_path(name) if name else PREFIX, **more)


def stored_settings(name: str) -> tuple[dict[str, str], list[str]]:
    """The texts of the form for a resource that was added here, and which secrets of it are stored."""
    who = current_principal()
    with who.site.store.reading() as session:
        row = changeable(who, session, name)
        return flatten(stated(row)), [kind for kind in SECRETS if getattr(row, kind)]


def edit_form(name: str) -> Answer:
    given, kept = stored_settings(name)
    return form_page(name, given, kept=kept)


def trial_text(trial: TrialView) -> str:
    """What *test connection* found, in a line."""
    why = f": {trial.reason}" if trial.reason else ""
    key = f"; it would trust {trial.host_key}" if trial.host_key else ""
    return f"{trial.state} in {trial.seconds:.2f} s{why}{key}"


def resource_form(name: str = "") -> Answer:
    """Tests or saves what the form states."""
    who, form = current_principal(), flask.request.form
    kept = stored_settings(name)[1] if name else []
    texts, secrets_ = posted(form)
    body = stated_by(texts) | secrets_
    given = {key: text for key, text in texts.items() if not key.startswith("checks.")} | flatten(
        {"checks": body["checks"]})
    try:
        if form.get("do") == "test":
            trial = test_changes(who, name, body, text=True) if name else test_settings(who, body, text=True)
            return form_page(name, given, kept=kept, outcome=trial.state, problem=trial_text(trial))
        saved = change_resource(who, name, body, text=True) if name else add_resource(who, body, text=True)
    except ApiError as error:
        return form_page(name, given, error.status, kept=kept, errors=error.fields, problem=str(error))
    return flask.redirect(resource_path(saved.name), 303)


def act(name: str, action: Callable[..., object], *given: Mapping[str, Any]) -> Answer:
    """Does something with a resource and shows it again, with what was wrong."""
    try:
        action(current_principal(), name, *given)
    except ApiError as error:
        return resource_page(name, error.status, problem=str(error))
    return flask.redirect(resource_path(name), 303)


def maintenance_form(name: str) -> Answer:
    """Begins maintenance for a number of minutes, or ends it."""
    form = flask.request.form
    minutes = int(form["minutes"]) if re.fullmatch("[0-9]{1,6}", form.get("minutes", "")) else 0
    if not minutes:
        return act(name, end_maintenance)
    until = datetime.datetime.fromtimestamp(current_principal().site.clock() + 60 * minutes, datetime.timezone.utc)
    return act(name, begin_maintenance, {"until": until.isoformat(), "reason": form.get("reason", "")})


def trust_form(name: str) -> Answer:
    """Shows the key that the host offers now, or trusts the one that was shown."""
    if key := flask.request.form.get("key"):
        return act(name, trust_resource, {"host_key": key})
    try:
        return resource_page(name, offered=current_principal().site.offered_key(name))
    except ApiError as error:
        return resource_page(name, error.status, problem=str(error))


def remove_form(name: str) -> Answer:
    remove_resource(current_principal(), name)
    return flask.redirect(PREFIX, 303)


def user_page(status: int = 200, **more: Any) -> flask.Response:
    return page("users.html", status, users=list_users(current_principal()), roles=get_args(Role), **more)


def change_users(action: Callable[..., object], *given: str | Mapping[str, str]) -> Answer:
    """Changes users and shows them again, with what was wrong."""
    try:
        action(current_principal(), *given)
    except ApiError as error:
        return user_page(error.status, problem=str(error), errors=error.fields, given=flask.request.form)
    return flask.redirect("/-/users", 303)


def user_form(name: str) -> Answer:
    """Changes what is not empty."""
    change = {key: text for key, text in flask.request.form.items() if text}
    return change_users(change_user, name, change)


def password_form() -> Answer:
    """Changes one's own password, and goes on with a new session."""
    who, form = current_principal(), flask.request.form.to_dict()
    try:
        if form.pop("again", "") != form.get("new"):
            raise field_errors({"again": "is not the same"})
        user = change_password(who, {name: form.get(name, "") for name in ("current", "new")})
    except ApiError as error:
        return page("password.html", error.status, errors=error.fields, problem="" if error.fields else str(error))
    return give_cookie(flask.redirect(PREFIX, 303), open_ticket(who.site, "session", user))


def own_path(text: str) -> str:
    """`text` when it is a path of the console, or its first page: after a login nobody is sent elsewhere."""
    return text if text.startswith(PREFIX) and text.isprintable() and "\\" not in text else PREFIX


def login_form() -> Answer:
    """Begins a session: a new one, whatever cookie came with the request."""
    who, form = current_principal(), flask.request.form
    try:
        user = sign_in(who, {name: form.get(name, "") for name in Credentials.model_fields})
    except ApiError as refusal:
        return page("login.html", refusal.status, problem=str(refusal), given=form)
    response = flask.redirect(own_path(flask.request.args.get("next", "")), 303)
    return give_cookie(response, open_ticket(who.site, "session", user))


def logout_form() -> Answer:
    sign_out(current_principal())
    return give_cookie(flask.redirect("/-/login", 303), "")


def error_page(error: ApiError) -> Answer:
    """What a browser gets instead of the page; those who have to log in are led there and back."""
    if error.status == 401 and flask.request.method in SAFE_METHODS:
        return flask.redirect(f"/-/login?next={quote(flask.request.full_path.rstrip('?'))}", 303)
    who: Principal | None = flask.g.get("principal")
    if who and who.operator and who.restricted and error.status == 403 and flask.request.method in SAFE_METHODS:
        return flask.redirect("/-/password", 303)
    return page("error.html", error.status, title=http.HTTPStatus(error.status).phrase, problem=str(error))


def refuse(error: ApiError) -> Answer:
    """The answer to a request that is refused, for programs or for people."""
    is_api = flask.request.path.startswith(API)
    response = flask.make_response(problem(error) if is_api else error_page(error))
    if error.status == 401 and is_api:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.retry:
        response.headers["Retry-After"] = str(math.ceil(error.retry))
    return response


def answer_http_error(error: HTTPException) -> Answer:
    """What Flask refuses by itself: unknown paths, methods, large or broken requests, failures."""
    response = flask.make_response(refuse(ApiError(error.description or "", error.code or 500)))
    if allowed := getattr(error, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


def answer_database_error(error: sqlalchemy.exc.SQLAlchemyError) -> Answer:
    log.error("the database cannot be used: %s", one_line(str(getattr(error, "orig", error))))
    return refuse(ApiError("the database cannot be used now; see the log", 503, retry=1))


PAGES = (
    Route("GET", "/-/", "viewer", overview),
    Route("GET", "/-/resources/<name>", "viewer", resource_page),
    Route("GET", "/-/resources/<name>/polls", "viewer", polls),
    Route("GET", "/-/add", "admin", lambda: form_page("", {})),
    Route("POST", "/-/add", "admin", resource_form),
    Route("GET", "/-/resources/<name>/edit", "admin", edit_form),
    Route("POST", "/-/resources/<name>/edit", "admin", resource_form),
    Route("POST", "/-/resources/<name>/check", "admin", lambda name: act(name, poll_now)),
    Route("POST", "/-/resources/<name>/maintenance", "admin", maintenance_form),
    Route("POST", "/-/resources/<name>/trust", "admin", trust_form),
    Route("POST", "/-/resources/<name>/remove", "admin", remove_form),
    Route("GET", "/-/events", "viewer", event_page),
    Route("GET", "/-/users", "admin", user_page),
    Route("POST", "/-/users", "admin", lambda: change_users(add_user, flask.request.form.to_dict())),
    Route("POST", "/-/users/<name>", "admin", user_form),
    Route("POST", "/-/users/<name>/remove", "admin", lambda name: change_users(remove_user, name)),
    Route("GET", "/-/static/<name>", "", asset, restricted=True),
    Route("GET", "/-/login", "", lambda: page("login.html"), restricted=True),
    Route("POST", "/-/login", "", login_form, restricted=True),
    Route("POST", "/-/logout", "viewer", logout_form, restricted=True),
    Route("GET", "/-/password", "viewer", lambda: page("password.html"), restricted=True),
    Route("POST", "/-/password", "viewer", password_form, restricted=True),
)


# === Console =================================================================
CONSOLE_THREADS = 4             # pool threads of the console
CONSOLE_BODY = 1 << 18          # bytes of a request to the pages and the API


def build_console(site: ConsoleContext, metrics: Metrics) -> flask.Flask:
    """The Flask application of the operators' door."""
    app = flask.Flask("healthchecker.console", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=CONSOLE_BODY, PROVIDE_AUTOMATIC_OPTIONS=False)
    app.url_map.merge_slashes = False       # it would redirect
    add_template_globals(app)
    routes = {f"{route.method} {route.path}": route for route in (
        *API_ROUTES, *PAGES, Route("GET", METRICS_PATH, "public", metrics.answer))}
    for endpoint, route in routes.items():
        app.add_url_rule(route.path, endpoint, route.run, methods=[route.method])
    app.before_request(functools.partial(authorize, site, routes))
    app.after_request(finish)
    app.register_error_handler(ApiError, refuse)
    app.register_error_handler(HTTPException, answer_http_error)
    app.register_error_handler(sqlalchemy.exc.SQLAlchemyError, answer_database_error)
    return app


class ConsoleServer(threading.Thread):
    """The operators' door: plain waitress on a socket that is bound already, with a small pool of its own."""

    def __init__(self, app: flask.Flask, sock: socket.socket) -> None:
        super().__init__(name="console", daemon=True)
        self._server = waitress.create_server(app, sockets=[sock], threads=CONSOLE_THREADS, ident=None,
                                              max_request_body_size=CONSOLE_BODY)

    def run(self) -> None:
        self._server.run()

    def close(self) -> None:
        self._server.close()


# === Commands ================================================================
PROBES_AT_ONCE = 64             # resources that `check --probe` polls at the same time
MINIMAL_INVENTORY = """resources:
  - {name: this-machine, platform: local}
"""


def ensure_inventory(path: Path) -> None:
    """On first start: copies inventory.example.yaml, or writes an inventory that watches this machine."""
    example = path.with_name("inventory.example.yaml")
    try:
        if path.exists():
            return
        if example.is_file():
            shutil.copyfile(example, path)
            print(f"{path.name} was not there: copied from {example.name}; it watches this machine. "
                  "Edit it and restart.")
        else:
            path.write_text(MINIMAL_INVENTORY, encoding="utf-8")
            print(f"{path.name} was not there: written one that watches this machine. Edit it and restart.")
    except OSError as error:
        raise InventoryError(f"{path.name}: cannot be written: {error.strerror}") from error


def set_up_logging(log_file: Path | None) -> None:
    """One line an event to the console, and to a rotating file where the inventory names one."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_file is not None:
        try:
            handlers.append(logging.handlers.RotatingFileHandler(
                log_file, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"service.log_file {log_file} cannot be written: {error.strerror}") from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers,
                        force=True)


class Installation:
    """What every command works on: the inventory, its folder, the database and the keys."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.inventory = load_inventory(self.path)
        self.service = self.inventory.service
        self.database = sqlite_path(self.service.database, self.path.parent)

    def resolve(self, path: Path) -> Path:
        return self.path.parent / path.expanduser()

    def open_vault(self, session: Session | None) -> Vault:
        """The keys; made when there are none and nothing is sealed yet."""
        return open_vault(self.resolve(self.service.keys), sealed_tokens(session, self.inventory))

    def access(self) -> ConnectionContext:
        try:
            known_hosts = self.resolve(self.service.known_hosts)
        except RuntimeError:        # an account without a home folder has none
            known_hosts = Path(os.devnull)
        return ConnectionContext(KnownHosts(known_hosts), Resolver())


class Doors(NamedTuple):
    """What is bound and opened before anything is written."""

    application: socket.socket
    console: socket.socket | None
    access_file: AccessFile | None


def end_by(stop: Callable[[], None]) -> None:
    """Lets the signals that end the service do so by `stop`."""
    for number in ENDINGS:
        signal.signal(number, lambda *_: stop())


def start_workers(supervisor: Supervisor) -> None:
    """Starts them; whatever ends the start ends them. Raises UsageError for a bad `service.app`."""
    end_by(supervisor.stop)     # from now on: an interrupt between two steps would leave a worker that nobody knows
    try:
        supervisor.start()
    except BaseException:       # an interrupt, too
        supervisor.close()
        raise


def prepare(installation: Installation, store: Store) -> tuple[Vault, list[tuple[int, str]]]:
    """Brings database and keys to what the inventory says, all or nothing; and what the log is to say once it runs."""
    with store.writing() as session:
        vault = installation.open_vault(session)
        ensure_first_user(session)
        changes = import_inventory(session, installation.inventory, vault)
        initial = initial_user(session)
    lines = [(logging.INFO, f"inventory: {changes}")]
    if initial:
        lines.append((logging.WARNING, f"the password of {initial} is the documented one: change it at /-/password "
                                       "or by `user passwd`"))
    return vault, lines


def watch_and_serve(installation: Installation, doors: Doors, store: Store) -> None:
    """Takes the inventory over, starts the watch and serves until a signal comes."""
    inventory, aggregator = installation.inventory, HealthAggregator()
    (vault, lines), access = prepare(installation, store), installation.access()
    recorder = Recorder(store, aggregator, inventory.service.retention)
    monitor = Monitor(store, vault, PollContext(aggregator, recorder, access, random.Random()))
    key = session_key(installation.resolve(inventory.service.keys))
    service = inventory.service.model_copy(
        update={"console": bound_address(doors.console) if doors.console else "off"})
    supervisor = Supervisor(service, installation.path.parent, doors.application, aggregator.lease, doors.access_file)
    with contextlib.closing(monitor):
        start_workers(supervisor)
        with contextlib.closing(supervisor), contextlib.ExitStack() as stack:
            for level, line in lines:
                log.log(level, "%s", line)
            if doors.console:
                context = ConsoleContext(store, inventory.without_secrets(), aggregator.lease, key, vault, monitor,
                                         access)
                token_file = service.metrics_token_file and installation.resolve(service.metrics_token_file)
                metrics = Metrics(ServingMetrics(aggregator.lease, supervisor.counters), store, token_file)
                console = stack.enter_context(contextlib.closing(
                    ConsoleServer(build_console(context, metrics), doors.console)))
                console.start()
            keep_out_of_collections()
            monitor.begin()
            log.info("serving on http://%s, console %s", bound_address(doors.application),
                     f"on http://{service.console}/-/" if doors.console else "off")
            supervisor.serve()


def serve(arguments: argparse.Namespace) -> int:
    """Runs the service until a signal ends it."""
    ensure_inventory(arguments.inventory)
    installation = Installation(arguments.inventory)
    service = installation.service
    set_up_logging(installation.resolve(service.log_file) if service.log_file else None)
    if service.metrics_token_file:
        read_token(installation.resolve(service.metrics_token_file))    # what cannot be used ends the start
    access_file = AccessFile(installation.resolve(service.access_log)) if service.access_log else None
    doors = Doors(listen("service.listen", service.listen),
                  None if service.console == "off" else listen("service.console", service.console), access_file)
    inspect_database(installation.database)
    with contextlib.closing(lock_database(installation.database)), \
            contextlib.closing(Store(installation.database)) as store:
        watch_and_serve(installation, doors, store)
    log.info("ended")
    return 0


@contextlib.contextmanager
def rehearsal(installation: Installation) -> Iterator[tuple[Session, Vault, Changes]]:
    """The import as a start would do it, rolled back at the end; without a database or keys on scratch ones."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        store = Store(installation.database if inspect_database(installation.database) else scratch / "database")
        try:
            with store.writing() as session:
                vault = Vault(installation.resolve(installation.service.keys))
                require_keys(vault, sealed_tokens(session, installation.inventory))
                if not vault.key_id:
                    vault = Vault(scratch)
                    vault.create()
                yield session, vault, import_inventory(session, installation.inventory, vault)
                session.rollback()
        finally:
            store.close()


def figure(sample: Sample | None, metric: str) -> str:
    """The highest reading of a metric, a dash where there is none (the CPU needs two polls)."""
    values = [value for _, value in sample.readings(metric)] if sample else []
    return f"{max(values):.0f}" if values else "-"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


Probed = tuple[Verdict, "Sample | None", float]      # with the seconds that it took


def next_item(items: queue.SimpleQueue[tuple[str, Probed]]) -> tuple[str, Probed]:
    """The next item; a main thread that waits without a timeout may never see Ctrl-C."""
    while True:
        with contextlib.suppress(queue.Empty):
            return items.get(timeout=MONITOR_INTERVAL)


def progress(total: int) -> Iterator[None]:
    """Yields `total` times and shows a bar on a terminal."""
    for count in range(1, total + 1):
        yield
        if sys.stderr.isatty():
            bar, end = "#" * (count * 40 // total), "\n" if count == total else ""
            print(f"\r[{bar:.<40}] {count}/{total}", end=end, file=sys.stderr, flush=True)


def probe(targets: Sequence[Target], access: ConnectionContext) -> int:
    """Polls every resource once, PROBES_AT_ONCE at a time, and prints a table; 1 when a critical one is unhealthy."""
    guards = Guards()
    waiting: queue.SimpleQueue[Target] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, Probed]] = queue.SimpleQueue()

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                target, begin = waiting.get_nowait(), time.monotonic()
                connection = CONNECTIONS[target.settings.platform](target, guards.of(target), access)
                verdict, sample, _ = poll_once(target, connection, None)
                done.put((target.name, (verdict, sample, time.monotonic() - begin)))

    for target in targets:
        waiting.put(target)
    for _ in targets[:PROBES_AT_ONCE]:
        threading.Thread(target=work, daemon=True).start()      # daemons, so that Ctrl-C need not wait for them
    results = dict(next_item(done) for _ in progress(len(targets)))
    rows = [["NAME", "STATE", "SECONDS", "CPU %", "MEMORY %", "DISK %", "WHY"]]
    for target in targets:
        verdict, sample, seconds = results[target.name]
        rows.append([target.name, verdict.state, f"{seconds:.2f}", *(
            figure(sample, metric) for metric in ("cpu_percent", "memory_percent", "disk_percent")),
            f"{verdict.cause}: {verdict.reason}" if verdict.cause else ""])
    print_table(rows)
    return int(any(t.settings.critical and not results[t.name][0].good for t in targets))


def check(arguments: argparse.Namespace) -> int:
    """Validates the inventory and says what a start would change; changes nothing."""
    installation = Installation(arguments.inventory)
    with rehearsal(installation) as (session, vault, changes):
        print(f"{installation.path.name} is valid; a start would make: {changes}")
        targets = list(load_targets(session, vault).values()) if arguments.probe else []
    return probe(targets, installation.access()) if arguments.probe else 0


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
    if scalars(StrictReader(path.name).read(content)) != {**scalars(document), **replacements}:
        raise InventoryError(f"{path.name}: its layout is too unusual to be rewritten; nothing was changed")
    real = path.resolve()       # a symbolic link stays one
    temporary = real.with_name(f".{real.name}.{secrets.token_hex(4)}")
    try:
        create_private(temporary, content)
        shutil.copymode(real, temporary)
        if sys.platform != "win32":
            with contextlib.suppress(PermissionError):      # only root can give a file away
                os.chown(temporary, real.stat().st_uid, real.stat().st_gid)
        os.replace(temporary, real)
    except OSError as error:
        raise InventoryError(f"{path.name}: cannot be replaced: {error.strerror}; is it open elsewhere?") from error
    finally:
        temporary.unlink(missing_ok=True)


def secret_nodes(installation: Installation, document: Document, *,
                 sealed: bool) -> Iterator[tuple[NodePath, str, ResourceSettings]]:
    """Paths and values of the secrets that stand in the file, sealed or plain ones, with their resource."""
    for index, entry in enumerate(installation.inventory.entries):
        for kind in SECRETS:
            node = document.nodes.get(("resources", index, kind))
            if node is not None and node.value.startswith(TOKEN_PREFIX) is sealed:
                yield ("resources", index, kind), node.value, entry.settings


@contextlib.contextmanager
def existing_session(installation: Installation) -> Iterator[Session | None]:
    """A session on the database, None when there is none yet."""
    if not inspect_database(installation.database):
        yield None
        return
    store = Store(installation.database)
    try:
        with store.reading() as session:
            yield session
    finally:
        store.close()


def seal(arguments: argparse.Namespace) -> int:
    """Replaces the plain secrets in the file by sealed ones."""
    installation = Installation(arguments.inventory)
    document = read_document(installation.path)
    with existing_session(installation) as session:
        vault = installation.open_vault(session)
    tokens = {where: vault.seal(value, *binding(str(where[-1]), settings))
              for where, value, settings in secret_nodes(installation, document, sealed=False)}
    if tokens:
        rewrite(installation.path, document, tokens)
    print(f"{installation.path.name}: {len(tokens)} secrets sealed")
    shared = [kind for kind in SECRETS if ("defaults", kind) in document.nodes]
    if shared:
        print(f"defaults.{shared[0]} stays plain, for a sealed secret belongs to one resource; "
              f"use {shared[0]}_file, or write it at each resource", file=sys.stderr)
    return int(bool(shared))


def trust(arguments: argparse.Namespace) -> int:
    """Accepts the key that a host shows now."""
    installation = Installation(arguments.inventory)
    if not inspect_database(installation.database):
        raise UsageError("there is no database yet; start the service first")
    store = Store(installation.database)
    try:
        with store.reading() as session:
            targets = load_targets(session, installation.open_vault(session))
        target = targets.get(arguments.name)
        if target is None:
            near = difflib.get_close_matches(arguments.name, targets, 1)
            raise UsageError(f"no such resource{f'; did you mean {near[0]}?' if near else ''}")
        offered = offered_key(target, installation.access())
        with store.writing() as session:
            session.execute(sqlalchemy.update(Resource).values(host_key=offered).where(Resource.id == target.id))
            revise(session)
    finally:
        store.close()
    print(f"{target.name}: trusted was {target.host_key or 'no key'}, trusted is {offered}")
    return 0


def reseal(vault: Vault, token: str, row: tuple[str, ...]) -> str:
    return vault.seal(vault.open(token, *row), *row)


def rotate_keys(arguments: argparse.Namespace) -> int:
    """Seals every secret with a new key. Interrupted, it leaves both keys; it is run again then."""
    installation = Installation(arguments.inventory)
    inspect_database(installation.database)
    document = read_document(installation.path)
    document_tokens = list(secret_nodes(installation, document, sealed=True))
    if len(list(sealed_tokens(None, installation.inventory))) > len(document_tokens):
        raise UsageError("a sealed secret stands in defaults, a password_file or a variable; "
                         "write the password at its resource first")
    with contextlib.closing(lock_database(installation.database)), \
            contextlib.closing(Store(installation.database)) as store:
        with store.writing() as session:
            vault = installation.open_vault(session)
            if not (vault.folder / "next.pem").exists():
                vault.create("next.pem")
            tokens = {where: reseal(vault, value, binding(str(where[-1]), settings))
                      for where, value, settings in document_tokens}
            for row in session.scalars(sqlalchemy.select(Resource)):
                for kind in SECRETS:
                    if token := getattr(row, kind):
                        setattr(row, kind, reseal(vault, token, binding(kind, row.parsed_settings)))
            revise(session)
        if tokens:
            rewrite(installation.path, document, tokens)
        vault.retire()
    print(f"secrets are sealed with key {vault.key_id} now")
    return 0


def typed_password() -> str:
    """A password from the terminal, without an echo and twice, or the first line of what is piped in."""
    if not sys.stdin.isatty():
        return sys.stdin.buffer.readline().decode("utf-8-sig", "replace").rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Once more: ") != password:
        raise UsageError("the two are not the same")
    return password


@contextlib.contextmanager
def accounts(arguments: argparse.Namespace) -> Iterator[Principal]:
    """Who works on the users from the command line, also while the service runs or before it ever did."""
    installation = Installation(arguments.inventory)
    with contextlib.closing(Store(installation.database)) as store:
        with store.writing() as session:
            ensure_first_user(session)
        nothing: Any = None     # these commands need neither keys nor pollers
        yield Principal(ConsoleContext(store, installation.inventory, Lease(), b"", nothing, nothing, nothing))


def user_add(arguments: argparse.Namespace) -> int:
    """Adds a user."""
    with accounts(arguments) as who:
        add_user(who, {"name": arguments.name, "password": typed_password(), "role": arguments.role})
    print(f"{arguments.name} can log in now, as {arguments.role}")
    return 0


def user_passwd(arguments: argparse.Namespace) -> int:
    """Changes a password."""
    with accounts(arguments) as who:
        change_user(who, arguments.name, {"password": typed_password()})
    print(f"{arguments.name} has a new password; earlier sessions have ended")
    return 0


def user_remove(arguments: argparse.Namespace) -> int:
    """Removes a user."""
    with accounts(arguments) as who:
        remove_user(who, arguments.name)
    print(f"{arguments.name} cannot log in any more")
    return 0


def user_list(arguments: argparse.Namespace) -> int:
    """Prints the users."""
    with accounts(arguments) as who:
        print_table([["NAME", "ROLE", "PASSWORD"], *(
            [user.name, user.role, "the documented one" if user.initial else "own"] for user in list_users(who))])
    return 0


def add_user_commands(users: Any) -> None:
    for name, run in (("add", user_add), ("passwd", user_passwd), ("remove", user_remove), ("list", user_list)):
        command = users.add_parser(name, help=(run.__doc__ or "").lower().rstrip("."))
        command.set_defaults(run=run)
        if name != "list":
            command.add_argument("name", metavar="NAME")
        if name == "add":
            command.add_argument("--role", choices=get_args(Role), default="viewer", help="default: viewer, who looks")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="healthchecker.py", description=(
        "A web application answers only while the machines it depends on are healthy. Without a command: serve."))
    parser.add_argument("--inventory", type=Path, default=Path(__file__).absolute().with_name("inventory.yaml"),
                        metavar="FILE", help="default: inventory.yaml beside healthchecker.py")
    parser.set_defaults(run=serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    command = commands.add_parser("check", help="validate the inventory and say what a start would change")
    command.add_argument("--probe", action="store_true", help="also poll every resource once and print a table")
    command.set_defaults(run=check)
    commands.add_parser("seal", help="replace plain passwords in the inventory by sealed ones").set_defaults(run=seal)
    command = commands.add_parser("trust", help="accept the changed host key of a resource")
    command.add_argument("name", metavar="NAME")
    command.set_defaults(run=trust)
    users = commands.add_parser("user", help="`user add|passwd|remove|list`: who can log in")
    add_user_commands(users.add_subparsers(metavar="add|passwd|remove|list", required=True))
    keys = commands.add_parser("keys", help="`keys rotate`: seal every secret with a new key; stop the service first")
    keys.add_subparsers(metavar="rotate", required=True).add_parser("rotate").set_defaults(run=rotate_keys)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 a check failed, 2 inventory or usage, 3 keys, 4 database."""
    for stream in (sys.stdout, sys.stderr):     # a pipe has the code page of the machine; pythonw has no stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    arguments = command_line().parse_args(argv)
    quiet_libraries()
    try:
        return int(arguments.run(arguments))
    except HealthCheckerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except sqlalchemy.exc.SQLAlchemyError as error:
        print(f"the database cannot be used: {one_line(str(getattr(error, 'orig', error)))}", file=sys.stderr)
        return StorageError.exit_code
    except OSError as error:
        print(f"{arguments.inventory.name}: {one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
