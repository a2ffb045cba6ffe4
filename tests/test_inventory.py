"""The strict reader and the validation of inventory.yaml: every fault has its place, none quotes the file."""

from __future__ import annotations

import difflib
import json
import os
import re
import string
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import healthchecker
from healthchecker import Inventory, InventoryError, Platform, ResourceSettings, ServiceSettings, load_inventory

CANARY = "C4N4RY"
FAULT = re.compile(r"inventory\.yaml(:[1-9]\d*:[1-9]\d*)?: \S.*")
HOST = "hostname: a, username: u, password: p"


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "inventory.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def load(folder: Path, content: str | bytes) -> Inventory:
    return load_inventory(write(folder, content))


def faults(folder: Path, content: str | bytes) -> list[str]:
    """The lines of the InventoryError that `content` gives; empty when it is valid."""
    try:
        load(folder, content)
    except InventoryError as error:
        lines = str(error).split("\n")
        assert all(FAULT.fullmatch(line) for line in lines), lines
        return lines
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inventory")


# --- faults and their places: ¦ stands before the place that must be named -----------------------------------
def one(text: str) -> str:
    """An inventory of one SSH resource with further settings."""
    return "resources:\n  - hostname: a\n    username: u\n    " + text + "\n"


def more(text: str) -> str:
    return one("password: p\n    " + text)


def windows(text: str) -> str:
    """An inventory of one Windows resource with further settings."""
    return "resources:\n  - ¦hostname: a\n    platform: windows\n    username: u\n    password: p\n    " + text + "\n"


def marked(text: str) -> str:
    """The same where `text` marks the place."""
    return windows(text).replace("¦", "", 1)


def http(text: str, *, url: bool = True, value: bool = False) -> str:
    """An inventory of one URL with further settings; with `value` the mark before a setting is that of its value."""
    text = re.sub(r"¦(\w+: )", r"\1¦", text) if value else text
    return "resources:\n  - {platform: http" + (", url: 'https://a/'" if url else "") + ", " + text + "}\n"


def tcp(text: str) -> str:
    return "resources:\n  - {platform: tcp, hostname: a, port: 1, " + text + "}\n"


def dns(text: str) -> str:
    return "resources:\n  - {platform: dns, hostname: a, " + text + "}\n"


NO_VALUE = "no value stands here; write one (a text in quotes), or remove the line"
FAULTS: dict[str, tuple[str, str]] = {
    "dependency behind a range": (
        "resources:\n  - {hostname: 'h[1:3]', platform: dns}\n  - {hostname: a, platform: dns, depends_on: [¦h4]}\n",
        "resources[1].depends_on[0]: no resource or group has this name"),
    "range of one default": (
        "defaults: {name: ¦'x[1:3]'}\nresources: [{hostname: 'h[1:3]', platform: dns}]", "names are unique"),
    "range counts down": (dns("x").replace("a, x", "¦'h[3:1]'"), "hostname: [3:1] must count up"),
    "range of two kinds": (dns("x").replace("a, x", "¦'h[a:3]'"), "[a:3] must count up"),
    "range of two cases": (dns("x").replace("a, x", "¦'h[a:F]'"), "[a:F] must count up"),
    "range of two widths": (dns("x").replace("a, x", "¦'h[01:100]'"), "[01:100] must have as many digits"),
    "range without end": (dns("x").replace("a, x", "¦'h[0:999999999]'"), "more than 20000 hosts"),
    "ranges without end": (dns("x").replace("a, x", "¦'h[0:9999][0:9999]'"), "more than 20000 hosts"),
    "range that is none": (dns("x").replace("a, x", "¦'h[1-9]'"), "must be a host name"),
    "range of one name": (dns("name: ¦b").replace(": a", ": 'h[1:2]'"), "name: must have a range of 2"),
    "range of other names": (dns("name: ¦'b[1:3]'").replace(": a", ": 'h[1:2]'"), "name: must have a range of 2"),
    "sealed for a range": (more("").replace(": a", ": 'h[1:2]'").replace(" p\n", " ¦HC2.a\n"), "use password_file"),
    "empty file": ("¦", "resources is missing"),
    "comments only": ("# nothing\n", "resources is missing"),
    "a text": ("¦hello", "mapping"),
    "a list": ("¦- a\n- b\n", "mapping"),
    "no resources": ("¦service: {threads: 1}\n", "resources is missing"),
    "resources is a text": ("resources: ¦many\n", "resources: must be a list"),
    "resources is a mapping": ("resources: ¦{a: {hostname: a}}\n", "resources: must be a list"),
    "a resource is a text": ("resources:\n  - ¦a.example.com\n", "resources[0]: must be a mapping"),
    "a resource is null": ("resources:\n  -¦\n", NO_VALUE),
    "a password is null": (one("password: ¦null"), NO_VALUE),
    "a password is a tilde": (one("password: ¦~  # none"), NO_VALUE),
    "a file is NULL": ("service: {log_file: ¦NULL}\nresources: []\n", NO_VALUE),
    "a number is Null": ("service: {threads: ¦Null}\nresources: []\n", NO_VALUE),
    "a name is nothing": ("service:\n  machine:¦\nresources: []\n", NO_VALUE),
    "a tag is null": (more("tags: [a, ¦null]"), NO_VALUE),
    "a route is nothing": ("routes:\n  /a:¦\nresources: []\n", NO_VALUE),
    "a limit of a mount is null": (more("limits: {disk_percent: {fail: 5, mounts: {/boot: ¦null}}}"), NO_VALUE),
    "a default is null": ("defaults: {username: ¦null}\nresources: []\n", NO_VALUE),
    "no keys": ("service: {keys: ¦''}\nresources: []\n", "service.keys: must be a path and not empty"),
    "no known_hosts": ("service: {known_hosts: ¦\"\"}\nresources: []\n", "must be a path and not empty"),
    "no key_file": (one("key_file: ¦''"), "key_file: must be a path and not empty"),
    "no password_file": (one("password_file: ¦''"), "password_file: must be a path and not empty"),
    "no ssh_config": (more("ssh_config: ¦''"), "ssh_config: must be a path and not empty"),
    "service is a list": ("service: ¦[a]\nresources: []\n", "service: must be a mapping"),
    "defaults is a text": ("defaults: ¦none\nresources: []\n", "defaults: must be a mapping"),
    "unknown part": ("resources: []\n¦servcie: {}\n", "unknown setting; did you mean service?"),
    "unknown key": (one("¦pasword: p"), "resources[0]: unknown setting; did you mean password?"),
    "key of an earlier version": (
        "service: {¦access_log: access.log}\nresources: []\n",
        "service: access_log is gone, for such a log is the proxy's to keep; remove the line",
    ),
    "unknown key, nothing near": (more("¦zzzzzz: p"), "resources[0]: unknown setting"),
    "unknown key in service": (
        "service: {¦thread: 1}\nresources: []",
        "service: unknown setting; did you mean threads?",
    ),
    "proxies are a text": ("service: {trusted_proxy: ¦192.0.2.1}\nresources: []", "trusted_proxy: must be a list"),
    "log is a list": ("service: {log_file: ¦[a]}\nresources: []", "service.log_file: must be a path"),
    "retention is a number": ("service: {retention: ¦5}\nresources: []", "retention: must be a mapping (key: value)"),
    "log into the inventory": (
        "service: {log_file: ¦inventory.yaml}\nresources: []",
        "service.log_file: is the inventory, too; name another file",
    ),
    "log into the database": (
        "service: {log_file: ¦health.db, database: 'sqlite:///health.db'}\nresources: []",
        "service.log_file: is service.database, too",
    ),
    "log into the token": (
        "service: {log_file: ¦token, metrics_token_file: token}\nresources: []",
        "service.log_file: is service.metrics_token_file, too",
    ),
    "known hosts in the inventory": (
        "service: {known_hosts: ¦sub/../inventory.yaml}\nresources: []",
        "service.known_hosts: is the inventory, too; name another file",
    ),
    "known hosts in a key": (
        "service: {keys: mine, known_hosts: ¦mine/private.pem}\nresources: []",
        "service.known_hosts: is mine/private.pem, too",
    ),
    "known hosts in the program": (
        f"service: {{known_hosts: ¦{json.dumps(healthchecker.__file__)}}}\nresources: []",
        "service.known_hosts: is the program, too",
    ),
    "known hosts in the database": (
        "service: {database: 'sqlite:///health.db', known_hosts: ¦health.db}\nresources: []",
        "service.known_hosts: is service.database, too",
    ),
    "log into the known hosts": (
        "service: {log_file: ¦known, known_hosts: known}\nresources: []",
        "service.log_file: is service.known_hosts, too",
    ),
    "keys in the inventory": (
        "service: {keys: ¦inventory.yaml}\nresources: []",
        "service.keys: is the inventory, too; name another file",
    ),
    "keys in the database": (
        "service: {keys: ¦health.db, database: 'sqlite:///health.db'}\nresources: []",
        "service.keys: is service.database, too",
    ),
    "drain that never ends": ("service: {drain: ¦.inf}\nresources: []", "service.drain: must be a valid number"),
    "drain inf": ("service: {drain: ¦inf}\nresources: []", "service.drain: must be"),
    "drain nan": ("service: {drain: ¦nan}\nresources: []", "service.drain: must be"),
    "unknown key in defaults": (
        "defaults: {¦intervall: 9}\nresources: []",
        "defaults: unknown setting; did you mean interval?",
    ),
    "unknown key in limits": (
        more("limits: {¦cpu_percents: 90}"),
        "limits: unknown setting; did you mean cpu_percent?",
    ),
    "unknown key in a limit": (more("limits: {cpu_percent: {¦wran: 9, fail: 20}}"), "did you mean warn?"),
    "unknown key in a check": (more("checks: [{name: a, command: b, ¦timeuot: 3}]"), "did you mean timeout?"),
    "exit of a check": (more("checks: [{name: a, command: b, exit: ¦nagois}]"), "resources[0].checks[0].exit"),
    "limit of a check that reads no numbers": (
        more("checks: [¦{name: a, command: b, limits: {load1: 5}}]"), "limits of a check need `exit: nagios`",
    ),
    "infinite limit of a check": (
        more("checks: [{name: a, command: b, exit: nagios, limits: {load1: ¦inf}}]"), "checks[0].limits.load1",
    ),
    "unknown key in a limit of a check": (
        more("checks: [{name: a, command: b, exit: nagios, limits: {load1: {¦wran: 9, fail: 20}}}]"),
        "did you mean warn?",
    ),
    "percent over 100": (more("limits: {cpu_percent: ¦101}"), "resources[0].limits.cpu_percent"),
    "percent over 100, nested": (more("limits:\n      disk_percent: {warn: 5, fail: ¦100.1}"), "disk_percent.fail"),
    "percent over 100 of a mount point": (
        more("limits:\n      disk_percent: {fail: 90, mounts: {/srv: 5, /boot: {fail: ¦101}}}"),
        "resources[0].limits.disk_percent.mounts./boot.fail",
    ),
    "neither a number nor off": (
        more("limits: {inode_percent: {fail: 90, mounts: {/boot: ¦on}}}"), "inode_percent.mounts./boot",
    ),
    "mounts of a metric without": (more("limits: {cpu_percent: {fail: 90, ¦mounts: {/: off}}}"), "unknown setting"),
    "percent 0": (more("limits: {swap_percent: ¦0}"), "swap_percent"),
    "percent inf": (more("limits: {cpu_percent: ¦inf}"), "resources[0].limits.cpu_percent"),
    "percent nan": (more("limits: {cpu_percent: ¦nan}"), "resources[0].limits.cpu_percent"),
    "percent -inf": (more("limits: {cpu_percent: ¦-inf}"), "resources[0].limits.cpu_percent"),
    "warn above fail": (more("limits: {cpu_percent: ¦{warn: 90, fail: 80}}"), "warn must be below fail"),
    "empty limit": (more("limits: {cpu_percent: ¦{}}"), "cpu_percent"),
    "interval inf": (more("interval: ¦inf"), "resources[0].interval"),
    "interval 0": (more("interval: ¦0"), "resources[0].interval: must be greater than or equal to 1"),
    "interval 0 in defaults": (f"defaults: {{interval: ¦0}}\nresources: [{{{HOST}}}]", "defaults.interval"),
    "interval 0 in defaults of nobody": ("defaults: {interval: ¦0}\nresources: []", "defaults.interval"),
    "interval is a list": (more("interval: ¦[60]"), "resources[0].interval"),
    "timeout below 1": (more("timeout: ¦0.5"), "resources[0].timeout"),
    "retry_interval nan": (more("retry_interval: ¦nan"), "resources[0].retry_interval"),
    "rise 0": (more("rise: ¦0"), "resources[0].rise"),
    "fall 1.5": (more("fall: ¦1.5"), "resources[0].fall"),
    "port 0": (more("port: ¦0"), "resources[0].port: must be greater than or equal to 1"),
    "port 65536": (more("port: ¦65536"), "resources[0].port: must be less than or equal to 65535"),
    "port is a word": (more("port: ¦ssh"), "resources[0].port: must be a valid integer"),
    "port of the third": (
        "resources:\n" + "".join(f"  - {{{HOST}, name: r{n}, port: {port}}}\n" for n, port in enumerate([1, 2, "¦x"])),
        "resources[2].port: must be a valid integer",
    ),
    "critical maybe": (more("critical: ¦maybe"), "resources[0].critical"),
    "platform": (more("platform: ¦solaris"), "resources[0].platform: must be one of unix"),
    "platform, misspelt": (more("platform: ¦linxu"), "push; did you mean linux?"),
    "platform, misspelt, which needs no host": ("resources: [{platform: ¦simulate}]", "; did you mean simulated?"),
    "platform is a list": (more("platform: ¦[linux]"), "resources[0].platform: must be one of unix"),
    "platform is a mapping": (more("platform: ¦{a: linux}"), "resources[0].platform"),
    "platform wrong, with seed": (more("platform: ¦simulatd\n    seed: 1"), "resources[0].platform"),
    "platform in defaults": (f"defaults: {{platform: ¦[a]}}\nresources: [{{{HOST}}}]", "defaults.platform"),
    "hostname missing": ("resources:\n  - ¦username: u\n    password: p\n", "resources[0].hostname: is missing"),
    "hostname is an option": ("resources: [{hostname: ¦-oProxy, username: u, password: p}]", "resources[0].hostname"),
    "hostname of two readings": (dns("x").replace("a, x", "¦straße.example"), "write its xn-- form"),
    "hostname empty": ("resources: [{hostname: ¦'', username: u, password: p}]", "resources[0].hostname"),
    "username missing": ("resources:\n  - ¦hostname: a\n    password: p\n", "resources[0]: username is missing"),
    "username of two lines": ('resources: [{hostname: a, username: ¦"u\\nv", password: p}]', "resources[0].username"),
    "name with a slash": (more("name: ¦a/b"), "resources[0].name"),
    "name ..": (more("name: ¦.."), "resources[0].name"),
    "same name": (
        f"resources:\n  - {{{HOST}, name: x}}\n  - {{hostname: b, username: u, password: p, name: ¦x}}\n",
        "resources[1].name: the resource at inventory.yaml:2:5 has this name",
    ),
    "two that are unnamed": (
        "resources:\n  - {platform: simulated}\n  - ¦{platform: simulated}\n",
        "resources[1].hostname: the resource at inventory.yaml:2:5 has this name",
    ),
    "name in defaults": (
        "defaults: {name: ¦x}\nresources:\n  - {platform: simulated}\n  - {platform: simulated}\n",
        "defaults.name: the resource at inventory.yaml:3:5 has this name",
    ),
    "was a resource that there is": (
        "resources:\n  - {platform: simulated, name: x}\n  - {platform: simulated, name: y, was: ¦x}\n",
        "resources[1].was: a resource has this name, or had it, too",
    ),
    "was another one, too": (
        "resources:\n  - {platform: simulated, name: x, was: z}\n  - {platform: simulated, name: y, was: ¦z}\n",
        "resources[1].was: a resource has this name, or had it, too",
    ),
    "same hostname": (
        f"resources:\n  - {{{HOST}}}\n  - {{hostname: ¦a, username: u, password: p}}\n",
        "resources[1].hostname: the resource at inventory.yaml:2:5",
    ),
    "password and password_env": (
        "resources:\n  - ¦hostname: a\n    username: u\n    password: p\n    password_env: PATH\n",
        "resources[0]: use one of password, password_env",
    ),
    "password empty": (one("password: ¦''"), "resources[0].password"),
    "password too long": (one(f"password: ¦{'p' * 1025}"), "resources[0].password"),
    "password is a mapping": (one("password: ¦{a: b}"), "resources[0].password"),
    "unset variable": (
        one("password_env: ¦HEALTHCHECKER_UNSET"),
        "resources[0].password_env: this environment variable is not",
    ),
    "empty variable": (one("password_env: ¦HEALTHCHECKER_EMPTY"), "resources[0].password_env"),
    "unset variable of defaults": (
        "defaults: {password_env: ¦HEALTHCHECKER_UNSET}\nresources: [{hostname: a, username: u}]",
        "defaults.password_env",
    ),
    "missing key file": (one("key_file: ¦nowhere/id_ed25519"), "resources[0].key_file: there is no such file"),
    "key file is a folder": (one("key_file: ¦."), "resources[0].key_file"),
    "key file of nobody": (one("key_file: ¦~no-such-user/id_ed25519"), "resources[0].key_file"),
    "missing password file": (one("password_file: ¦nowhere"), "resources[0].password_file: this file cannot be read"),
    "password file is binary": (one("password_file: ¦binary"), "resources[0].password_file"),
    "password file is empty": (one("password_file: ¦empty"), "resources[0].password_file"),
    "password file of nobody": (one("password_file: ¦~no-such-user/password"), "resources[0].password_file"),
    "password file with NUL": (one('password_file: ¦"a\\0b"'), "resources[0].password_file"),
    "password is half a character": (one('password: "\\u¦d800"'), ""),
    "a tag is half a character": (more('tags: ["\\u¦d800"]'), ""),
    "password file is half a character": (one('password_file: "\\u¦d800"'), ""),
    "passphrase without key": (more("key_passphrase: x").replace("- h", "- ¦h"), "key_passphrase needs key_file"),
    "host_key": (more("host_key: ¦md5:00"), "resources[0].host_key"),
    "two checks of one name": (
        more("checks: [{name: a, command: b}, {name: a, command: c}]").replace("- h", "- ¦h"),
        "two checks have the same name",
    ),
    "check without command": (more("checks:\n      - ¦name: a"), "resources[0].checks[0].command: is missing"),
    "service with a slash": (more("services: [¦a/b]"), "resources[0].services[0]"),
    "service of two lines": (more('services: [¦"a\\nb"]'), "resources[0].services[0]"),
    "service with a long name": (more(f"services: [¦{'a' * 257}]"), "resources[0].services[0]"),
    "service with a blank start": (more("services: [¦'-rf']"), "resources[0].services[0]"),
    "setting of another platform": (more("¦seed: 1"), "has no meaning with platform"),
    "password for local": (
        "resources: [{platform: local, name: a, ¦password: p}]",
        "has no meaning with platform local",
    ),
    "listen without port": ("service: {listen: ¦localhost}\nresources: []", "service.listen: must be address:port"),
    "listen port": ("service: {listen: ¦'127.0.0.1:65536'}\nresources: []", "65535"),
    "database url": ("service: {database: ¦'postgres://x/y'}\nresources: []", "service.database"),
    "database of nobody": ("service: {database: ¦'sqlite:///~no-such-user/x'}\nresources: []", "service.database"),
    "keys of nobody": ("service: {keys: ¦~no-such-user/keys}\nresources: []", "service.keys"),
    "app": ("service: {app: ¦mysite}\nresources: []", "service.app: must be module:callable"),
    "workers -1": ("service: {workers: ¦-1}\nresources: []", "service.workers"),
    "same key": ("resources: []\n¦resources: []\n", "this key stands here twice"),
    "same key in a resource": (more("¦password: q"), "this key stands here twice"),
    "anchor": (one("password: ¦&p x"), "anchors and aliases are not allowed"),
    "alias": (one("password: ¦*x"), "anchors and aliases are not allowed"),
    "tag": (one("password: ¦!secret x"), "tags are not allowed"),
    "python tag": ("resources: ¦!!python/object/apply:os.system [id]\n", "tags are not allowed"),
    "merge": (one("¦<<: {port: 1}"), "merge keys are not allowed"),
    "key is a list": (more("? ¦[a]\n    : b"), "a key must be plain text"),
    "second document": ("resources: []\n¦---\nresources: []\n", "not valid YAML"),
    "tab": (one("password: p\n¦\tport: 22"), "not valid YAML"),
    "open quote": (one("password: 'p") + "¦", "not valid YAML"),
    "open bracket": ("resources: [\n¦", "not valid YAML"),
    "colon in a value": (one("password: p¦: q"), "not valid YAML"),
    "percent sign": (one("password: ¦%p"), "not valid YAML"),
    "reserved sign": (one("password: ¦`p"), "not valid YAML"),
    "control character": ("resources: []\n# ¦\x07\n", "not allowed in YAML"),
    "control character behind others": (f"# {'ä' * 50}\nresources: []\n# ¦\x07\n# ä\n", "not allowed in YAML"),
    "basic in the clear": (windows("auth: basic\n    tls: no"), "would show the password to the network"),
    "basic in the clear, by defaults": (
        "defaults: {tls: 'off'}\n"
        "resources:\n  - ¦{hostname: a, platform: windows, auth: basic, username: u, password: p}",
        "would show the password to the network",
    ),
    "certificate auth without files": (windows("auth: certificate"), "needs certificate_file, key_file and tls"),
    "certificate without its auth": (windows("certificate_file: empty"), "need `auth: certificate`"),
    "unknown auth": (marked("auth: ¦digest"), "auth"),
    "SSH's host key for Windows": (marked("¦host_key: strict"), "host_key"),
    "Windows' pin for SSH": (more(f"¦certificate_fingerprint: {64 * '0'}"), "certificate_fingerprint"),
    "fingerprint that is too short": (marked("certificate_fingerprint: ¦ab:cd"), "64 hexadecimal digits"),
    "a URL is missing": (http("name: b", url=False).replace("- {", "- ¦{"), "resources[0]: url is missing"),
    "a port is missing": ("resources:\n  - ¦{hostname: a, platform: tcp}", "resources[0]: port is missing"),
    "a URL of FTP": (http("¦url: 'ftp://a/'", url=False, value=True), "url: must be http://"),
    "a URL with a password": (http("¦url: 'http://u:p@a/'", url=False, value=True), "url: must be http://"),
    "a URL with a fragment": (http("¦url: 'http://a/#b'", url=False, value=True), "url: must be http://"),
    "a URL with a line break": (http('¦url: "http://a/\\n"', url=False, value=True), "url: must be http://"),
    "a URL of no port": (http("¦url: 'http://a:65536/'", url=False, value=True), "url: must be http://"),
    "a URL of no IPv6": (http("¦url: 'http://[::g]/'", url=False, value=True), "url: must be http://"),
    "a machine's services": (http("¦services: [a]"), "services has no meaning with platform http"),
    "a machine's limits": (tcp("¦limits: {cpu_percent: 9}"), "limits has no meaning with platform tcp"),
    "a machine's checks": (dns("¦checks: []"), "checks has no meaning with platform dns"),
    "a port beside a URL": (http("¦port: 80"), "port has no meaning with platform http"),
    "a host beside a URL": (http("¦hostname: b"), "hostname has no meaning with platform http"),
    "a URL of a machine": (more("¦url: 'http://a/'"), "url has no meaning with platform unix"),
    "a secret for a name": (dns("¦password: p"), "password has no meaning with platform dns"),
    "unknown expectation": (http("expect: {¦stauts: [200]}"), "expect: unknown setting; did you mean status?"),
    "unknown expectation of JSON": (http("expect: {¦jsno: {a: b}}"), "expect: unknown setting; did you mean json?"),
    "an expectation of another": (tcp("expect: ¦{status: [200]}"), "expect: status has no meaning with platform tcp"),
    "an address of HTTP": (http("expect: ¦[192.0.2.1]"), "expect: addresses has no meaning with platform http"),
    "a status or a text": (http("expect: ¦200"), 'expect: 200 is a status or a text: write {status: ["200"]} or'),
    "a range or a text": (http("expect: ¦'200-299'"), "expect: 200-299 is a status or a text: write {status: "),
    "no address": (dns("expect: ¦[192.0.2.1, b]"), "expect.addresses[1]: must be an IP address"),
    "no status": (http("expect: {status: [¦600]}"), "expect.status[0]: must be a status such as 204"),
    "a range from behind": (http("expect: {status: [¦299-200]}"), "expect.status[0]: must be a status"),
    "no statuses": (http("expect: {status: ¦[]}"), "expect.status: "),
    "later than any answer": (http("expect: ¦{within: 11 s}"), "expect: within must be at most timeout"),
    "within nothing": (http("expect: {within: ¦0}"), "expect.within: must be greater than 0"),
    "within a text": (http("expect: {within: ¦2 min}"), "expect.within: must be a valid number"),
    "days of a certificate": (http("expect: {certificate_days: ¦0}"), "expect.certificate_days: must be greater"),
    "too many days": (tcp("certificate_days: ¦3651"), "certificate_days: must be less than or equal to 3650"),
    "days without TLS": (tcp("certificate_days: 9").replace("- {", "- ¦{"), "certificate_days needs TLS"),
    "a header of two lines": (http('headers: {a: ¦"b\\r\\nc: d"}'), "headers.a: must be one line of ASCII"),
    "no header's name": (http("headers: {'a b': ¦c}"), "must be the name of a header"),
    "our own header": (http("headers: {Content-Length: ¦'9'}"), "must be the name of a header"),
    "a secret as a header": (http("headers: {Authorization: ¦x}"), "a secret is `password`"),
    "headers without end": (
        http(f"headers: ¦{{{', '.join(f'h{number}: x' for number in range(33))}}}"), "headers: "),
    "redirects without end": (http("redirects: ¦11"), "redirects: must be less than or equal to 10"),
    "a method": (http("method: ¦TRACE"), "method: must be"),
    "HEAD with a text": (
        http("method: HEAD, expect: {contains: a}").replace("- {", "- ¦{"), "HEAD has no answer to look into"),
    "a secret in the clear": (
        http("url: 'http://a/', password: p", url=False).replace("- {", "- ¦{"), "a password needs https"),
    "a key without its certificate": (
        http("key_file: empty").replace("- {", "- ¦{"), "key_file needs certificate_file"),
    "BOM counts no column": ("\ufeff¦resourcess: []\n", "did you mean resources?"),
    "CRLF": (
        "service:\r\n  threads: 1\r\nresources:\r\n  - {hostname: a,\r\n     username: u, port: ¦x, password: p}\r\n",
        "resources[0].port",
    ),
    "wide characters before": (
        "resources: [{name: '日本 😀', hostname: a, username: u, password: p, port: ¦x}]",
        "port",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_fault(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32" and case in ("database of nobody", "keys of nobody"):
        pytest.skip("Windows looks for no user: it takes the folder beside one's own")
    monkeypatch.delenv("HEALTHCHECKER_UNSET", raising=False)
    monkeypatch.setenv("HEALTHCHECKER_EMPTY", "")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "empty").write_bytes(b"\n")
    marked, message = FAULTS[case]
    before = (marked if "¦" in marked else "¦").partition("¦")[0].removeprefix("\ufeff")
    row, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
    [line] = faults(folder, marked.replace("¦", ""))
    assert line.startswith(f"inventory.yaml:{row}:{column}: ")
    assert message in line


def test_every_fault_at_once(folder: Path) -> None:
    """One line each, in the form that editors and people can follow."""
    got = faults(
        folder,
        "service: {listen: nowhere, thread: 1}\ndefaults: {intervall: 5}\nresources:\n"
        "  - {hostname: a, username: u, password: p, port: x}\n"
        "  - hostname: b\n    username: u\n    password: p\n    interval: 0\n    limits: {cpu_percent: inf}\n"
        "  - hostname: c\n    username: u\n    port: 70000\n    name: ..\n",
    )
    places = [line.split(": ")[0] for line in got]
    assert sorted(places) == sorted(
        f"inventory.yaml:{place}" for place in ("1:19", "1:28", "2:12", "4:51", "8:15", "9:27", "12:11", "13:11")
    )
    assert "inventory.yaml:12:11: resources[2].port: " in "\n".join(got)


@pytest.mark.parametrize(
    ("content", "places"),
    [
        ("resources:\n  - {hostname: a, hostname: a, username: u, password: p, port: x}\n", {"2:19", "2:64"}),
        (
            "resources:\n  - {hostname: a, username: u, password: &p x}\n  - {hostname: b, password: !p x}\n",
            {"2:42", "3:29"},
        ),
        ("resources:\n  - {hostname: a, username: u, key_file: nowhere, port: 0}\n", {"2:42", "2:57"}),
        ("resources:\n  - {hostname: a, username: u, password: p, seed: 1, port: 0}\n", {"2:45", "2:60"}),
        (
            "resources: [{hostname: a, username: u, port: 0, password: p}, {hostname: a, username: u, password: q}]\n",
            {"1:46", "1:74"},
        ),
    ],
    ids=[
        "double key and port",
        "anchor and tag",
        "key file and port",
        "foreign setting and port",
        "port and same name",
    ],
)
def test_faults_of_different_kinds_come_together(content: str, places: set[str], folder: Path) -> None:
    assert {line.split(": ")[0].partition(":")[2] for line in faults(folder, content)} == places


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (lambda path: path.mkdir(), "is a directory"),
    "missing": (lambda path: None, "cannot be read"),
    "over 4 MiB": (lambda path: path.write_bytes(b"resources: []\n" + b"#" * (4 << 20)), "larger than 4194304 bytes"),
    "not UTF-8": (lambda path: path.write_bytes(b"resources: []\n# \xe4\n"), "not UTF-8"),
    "UTF-16": (lambda path: path.write_bytes("resources: []\n".encode("utf-16")), "not UTF-8"),
    "cut within a character": (lambda path: path.write_bytes("resources: []\n# ä".encode()[:-1]), "not UTF-8"),
    "NUL bytes": (lambda path: path.write_bytes(bytes(4096)), "not allowed in YAML"),
}


@pytest.mark.parametrize("case", FILES)
def test_unreadable_file(case: str, tmp_path: Path) -> None:
    if sys.platform == "win32" and case == "directory":
        pytest.skip("Windows says of a folder only that permission is denied")
    make, message = FILES[case]
    path = tmp_path / "inventory.yaml"
    make(path)
    with pytest.raises(InventoryError, match=message) as caught:
        load_inventory(path)
    assert FAULT.fullmatch(str(caught.value))
    assert caught.value.exit_code == 2
    if case == "not UTF-8":
        assert str(caught.value).startswith("inventory.yaml:2:3: ")


@pytest.mark.parametrize("loader", [healthchecker.YAML_LOADER, yaml.SafeLoader])
@pytest.mark.parametrize("escaped", ["\\UFFFFFFFF", "\\U00110000"])
def test_a_character_that_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch, loader: Any, escaped: str) -> None:
    """Also where PyYAML was built without its parser in C."""
    monkeypatch.setattr(healthchecker, "YAML_LOADER", loader)
    (fault,) = faults(folder, f'resources: []\nservice: {{app: "{escaped}"}}\n')
    assert fault.startswith("inventory.yaml:2:") and "not valid YAML" in fault


def test_four_mebibytes_are_read(folder: Path) -> None:
    content = b"resources: []\n#"
    assert load(folder, content + b"-" * ((4 << 20) - len(content))).resources == []


# --- what is valid -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "scalar",
    [
        "007",
        "no",
        "22:22",
        "'~'",
        "'null'",
        "nil",
        "0x1F",
        "1e3",
        "1_000",
        "2001-01-01",
        "yes",
        "=",
        ".inf",
        "a#b",
        "ä€😀",
        "HC2.x",
    ],
)
def test_scalars_are_texts(scalar: str, folder: Path) -> None:
    assert load(folder, one(f"password: {scalar}")).resources[0].secrets == {"password": scalar.strip("'")}


def test_what_is_expected_may_be_null(folder: Path) -> None:
    asked = "{url: 'http://a/', platform: http, expect: {json: {a: null, b: ~, c: 'null'}}}"
    assert load(folder, f"resources: [{asked}]\n").resources[0].expect.values == {"a": "null", "b": "~", "c": "null"}


def test_no_representation_shows_a_secret(folder: Path) -> None:
    inventory = load(folder, one(f"password: {CANARY}") + f"  - {{hostname: b, username: u, password: {CANARY}}}\n")
    assert CANARY not in f"{inventory} {inventory.resources!r} {inventory.resources[0].model_dump_json()}"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("'it''s'", "it's"),
        ('"a\\tb\\x41"', "a\tbA"),
        ("|-\n      two\n      lines", "two\nlines"),
        (">-\n      folded\n      text", "folded text"),
        ("plain over\n      two lines", "plain over two lines"),
        ("p # comment", "p"),
        ("'p # none'", "p # none"),
    ],
)
def test_styles_of_text(text: str, secret: str, folder: Path) -> None:
    assert load(folder, one(f"password: {text}")).resources[0].secrets == {"password": secret}


def test_defaults_of_the_issue(folder: Path) -> None:
    inventory = load(folder, "resources: [{hostname: db1.example.com, username: u, password: p}]")
    resource = inventory.resources[0]
    assert (resource.name, resource.platform, resource.connect_port, resource.critical) == (
        "db1.example.com",
        Platform.UNIX,
        22,
        True,
    )
    assert (resource.interval, resource.timeout, resource.retry_interval, resource.rise, resource.fall) == (
        60,
        10,
        5,
        2,
        2,
    )
    assert inventory.service == ServiceSettings.model_validate({}, context=folder)
    assert inventory.service.listen == "127.0.0.1:8080"


MERGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "taken over": ("interval: 30, fall: 3", HOST, {"interval": 30, "fall": 3, "rise": 2}),
    "own value wins": ("interval: 30", HOST + ", interval: 5", {"interval": 5}),
    "limits merge by metric": (
        "limits: {cpu_percent: 90, disk_percent: 80}",
        HOST + ", limits: {disk_percent: 70}",
        {"limits": {"cpu_percent": {"fail": 90}, "disk_percent": {"fail": 70}}},
    ),
    "lists are replaced": ("tags: [a, b]", HOST + ", tags: [c]", {"tags": ["c"]}),
    "username": ("username: monitor", "hostname: a, password: p", {"username": "monitor"}),
    "own credential replaces another kind": (
        "password: d",
        "hostname: a, username: u, password_env: PATH",
        {"password": "**********", "password_env": "PATH"},
    ),
    "what local does not know": (
        "username: u, password: p, port: 23",
        "name: a, platform: local",
        {"username": None, "password": None, "port": None},
    ),
    "simulated settings": ("mean_healthy: 9", "name: a, platform: simulated", {"mean_healthy": 9}),
    "simulated settings elsewhere": ("mean_healthy: 9", HOST, {"mean_healthy": 300}),
    "platform": ("platform: freebsd", HOST, {"platform": "freebsd"}),
    "key file replaces a password": ("password: d", "hostname: a, username: u, key_file: key", {"password": None}),
    "a password replaces a key and its passphrase": (
        "key_file: key, key_passphrase: d",
        "hostname: a, username: u, password: p",
        {"password": "**********", "key_file": None, "key_passphrase": None},
    ),
    "a passphrase of several keys": (
        "key_passphrase: d",
        "hostname: a, username: u, key_file: key",
        {"key_passphrase": "**********"},
    ),
    "no login of machines for a URL": (
        "username: monitor, password_env: PATH",
        "name: a, platform: http, url: 'https://vendor.example.com'",
        {"username": None, "password": None, "password_env": None},
    ),
    "nor the certificate of one": (
        "certificate_file: key, key_file: key, key_passphrase: d",
        "name: a, platform: http, url: 'https://vendor.example.com'",
        {"certificate_file": None, "key_file": None, "key_passphrase": None},
    ),
    "a token of a URL is no password of a machine's user": (
        "username: monitor, key_file: key",
        "name: a, platform: http, url: 'https://vendor.example.com', password: d",
        {"username": None, "password": "**********", "key_file": None},
    ),
    "what a URL states itself": (
        "username: monitor, password: d",
        "name: a, platform: http, url: 'https://a', username: b, password_env: PATH",
        {"username": "b", "password_env": "PATH"},
    ),
    "no login of machines for who reports": (
        "platform: push, username: monitor, password: of-every-machine",
        "name: a",
        {"platform": "push", "username": None, "password": None},
    ),
    "auth certificate without its files": (
        "platform: windows, auth: certificate",
        "hostname: a, certificate_file: key, key_file: key",
        {"auth": "certificate"},
    ),
}


@pytest.mark.parametrize("case", MERGES)
def test_merge_of_defaults(case: str, folder: Path) -> None:
    defaults, own, expected = MERGES[case]
    (folder / "key").write_bytes(b"")
    settings = load(folder, f"defaults: {{{defaults}}}\nresources:\n  - {{{own}}}\n").resources[0]
    dumped = settings.model_dump(mode="json", exclude_none=True)
    dumped["limits"] = {
        name: settings.limits.by_metric()[name].model_dump(exclude_none=True) for name in settings.limits.by_metric()
    }
    assert {name: dumped.get(name) for name in expected} == expected


def test_secrets_from_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """password_env, password_file and key_passphrase_file; paths are relative to the inventory's folder."""
    monkeypatch.setenv("HEALTHCHECKER_PASSWORD", " from the environment ")
    monkeypatch.chdir(folder.parent)
    (folder / "plain").write_text("from a file\n", encoding="utf-8")
    (folder / "windows").write_bytes(b"from Windows\r\n")
    (folder / "key").write_bytes(b"")
    inventory = load(
        folder,
        "resources:\n  - {hostname: a, username: u, password_env: HEALTHCHECKER_PASSWORD}\n"
        "  - {hostname: b, username: u, password_file: plain}\n  - {hostname: c, username: u, password_file: windows}\n"
        "  - {hostname: d, username: u, key_file: key, key_passphrase_file: plain}\n",
    )
    assert [resource.secrets for resource in inventory.resources] == [
        {"password": " from the environment "},
        {"password": "from a file"},
        {"password": "from Windows"},
        {"key_passphrase": "from a file"},
    ]
    assert inventory.resources[3].key_file == folder / "key"


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_password_env_with_a_line_end(folder: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv("HEALTHCHECKER_LINE", " secret " + end)
    assert load(folder, one("password_env: HEALTHCHECKER_LINE")).resources[0].secrets == {"password": " secret "}


def test_password_file_saved_by_notepad(folder: Path) -> None:
    """Its byte order mark is no part of the password, as it is none of the inventory."""
    (folder / "bom").write_bytes(b"\xef\xbb\xbfsecret\r\n")
    assert load(folder, one("password_file: bom")).resources[0].secrets == {"password": "secret"}


@pytest.mark.parametrize(
    "host", ["192.0.2.7", "2001:db8::7", "fe80::1%eth0", "db1.example.com", "localhost", "under_score"]
)
def test_hostnames(host: str, folder: Path) -> None:
    assert (
        load(folder, f"resources: [{{hostname: '{host}', username: u, password: p}}]").resources[0].hostname
        == host
    )


# --- hostile files -------------------------------------------------------------------------------------------
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
MERGE_BOMB = "m0: &m0 {k: v}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{','.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 9)
)


ENTRY = "  - {{hostname: '{}.example.com', username: monitor, password: p, limits: {{cpu_percent: 95}}}}\n"


@pytest.mark.parametrize(
    "content",
    [
        *(BOMB, MERGE_BOMB, "a: &a [*a]\n", '"' + "\\" * 500_000, "x" * 1_000_000, "!" * 500_000, "&a " * 100_000),
        *(opening * 200_000 for opening in ("[", "{", "- ", "? ", "{a: ")),
    ],
    ids=lambda content: content[:8].strip(),
)
def test_bomb(content: str, folder: Path) -> None:
    begin = time.process_time()
    assert faults(folder, content)
    assert time.process_time() - begin < 8


@pytest.mark.parametrize("stated", ["proxy_jump: bastoin", "depends_on: [bastian]"])
def test_a_slip_of_many(stated: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is near is looked for once."""
    looked: list[str] = []
    near = difflib.get_close_matches
    monkeypatch.setattr("difflib.get_close_matches", lambda *given: [looked.append(given[0]), near(*given)][1])
    entries = f"{{hostname: 'h[1:50]', username: u, password: p, {stated}}}, {{name: bastion, platform: local}}"
    assert "did you mean bastion?" in faults(folder, f"resources: [{entries}]")[0]
    assert len(looked) == 1


NOBODY = [f"web{number:04}.example.net" for number in range(1, 1001)]


@pytest.mark.parametrize(
    "stated",
    [
        "groups: [{name: g, members: [MANY], healthy: any}]",
        "routes: {/x: [MANY]}",
        "maintenance: [{schedule: 0 2 * * sun, for: 1h, reason: r, resources: [MANY]}]",
        "  - {hostname: a, platform: simulated, depends_on: [MANY]}",
        "  - {hostname: a, platform: simulated, MANY}",
        "".join(f"  - {{hostname: h{number}, username: u, password: p, proxy_jump: {name}}}\n"
                for number, name in enumerate(NOBODY)),
    ],
    ids=["members", "needs", "planned work", "parents", "settings", "bastions"],
)
def test_a_thousand_names_that_nobody_has(stated: str, folder: Path) -> None:
    """The first are shown with what is near: to look for that took minutes, in which a start or reload said nothing."""
    known = "resources:\n  - {hostname: 'web[0001:1000].example.com', username: u, password: p}\n"
    begin = time.process_time()
    assert faults(folder, known) == []
    valid = time.process_time() - begin
    begin = time.process_time()
    lines = faults(folder, known + stated.replace("MANY", ", ".join(NOBODY)) + "\n")
    assert time.process_time() - begin < valid + 4
    assert lines[-1] == "inventory.yaml: these are the first 50 faults; there are more" and len(lines) == 51
    assert "MANY}" in stated or all(re.search(r"; did you mean web\d+\.example\.com\?$", line) for line in lines[:-1])


@pytest.mark.long
@pytest.mark.parametrize(
    "entries",
    [
        ENTRY.format("h[00001:10000]"),
        "".join(ENTRY.format(f"h{number:05}") for number in range(1, 10_001)),
    ],
    ids=["a range", "one by one"],
)
def test_ten_thousand_hosts_load(entries: str, folder: Path) -> None:
    """In about half a second and a second of CPU."""
    begin = time.process_time()
    names = [resource.name for resource in load(folder, "resources:\n" + entries).resources]
    assert names == [f"h{number:05}.example.com" for number in range(1, 10_001)]
    assert time.process_time() - begin < 12


LIMITED = ENTRY.replace("limits: {{cpu_percent: 95}}", "limits: {{disk_percent: 90, memory_percent: {{warn: 80, "
                        "fail: 95}}}}, checks: [{{name: c, command: c}}]")


def test_entries_cost_little_more_than_to_go_through_their_text(folder: Path) -> None:
    """Each is read once, and all of them by 8 to 10 times of what its parser needs alone."""
    entries = "".join(LIMITED.format(f"h{number:05}") for number in range(4000))

    def seconds(work: Callable[[], object]) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    path = write(folder, "resources:\n" + entries)
    text, loader = path.read_text(encoding="utf-8"), healthchecker.YAML_LOADER

    alone = whole = 0.0
    for _ in range(6):  # in turn, for a processor is half as quick at another moment
        alone += seconds(lambda: sum(1 for _ in yaml.parse(text, Loader=loader)))
        whole += seconds(lambda: load_inventory(path))
    assert whole / alone < 13


RANGES = {
    "h[08:10]": ["h08", "h09", "h10"],
    "h[8:10]x": ["h8x", "h9x", "h10x"],
    "[a:c]": ["a", "b", "c"],
    "r[0:90:30]": ["r0", "r30", "r60", "r90"],
    "[A:B]-[1:2].example.com": ["A-1.example.com", "A-2.example.com", "B-1.example.com", "B-2.example.com"],
    "h[5:5]": ["h5"],
}


@pytest.mark.parametrize("hostname", RANGES)
def test_a_range_of_hosts(hostname: str, folder: Path) -> None:
    """The names are those of the hosts, and so is what they have in common."""
    found = load(folder, f"resources: [{{hostname: '{hostname}', platform: dns, tags: [t], interval: 9}}]").resources
    assert [one.name for one in found] == [one.hostname for one in found] == RANGES[hostname]
    assert {(one.interval, *one.tags) for one in found} == {(9, "t")}


def test_names_and_urls_have_a_range_each(folder: Path) -> None:
    entry = "{platform: http, url: 'https://web[01:03]:8443/x', name: 'shop [a:c]', was: 'web[01:03]'}"
    inventory = load(folder, f"resources: [{entry}, {{hostname: z, platform: dns}}]")
    shown = [(one.name, one.url, one.hostname, one.was) for one in inventory.resources[:3]]
    assert shown == [(f"shop {letter}", f"https://web0{number}:8443/x", f"web0{number}", f"web0{number}")
                     for number, letter in enumerate("abc", 1)]  # fmt: skip
    assert inventory.entries == [0, 0, 0, 1]
    assert [inventory.places[name] for name in ("shop a", "shop c", "z")] == [
        "inventory.yaml:1:13", "inventory.yaml:1:13", f"inventory.yaml:1:{15 + len(entry)}"]  # fmt: skip
    plain = load(folder, "resources: [{hostname: '::1', name: 'a[1:2]', platform: dns}]").resources
    assert [one.name for one in plain] == ["a[1:2]"]


FULL = """\
service: {listen: 127.0.0.1:0, workers: 1, app: a:b, threads: 4,
  database: sqlite:///x.db, keys: keys, known_hosts: k, log_file: l}
defaults: {interval: 60, username: u}
resources:
  - {hostname: a, name: n, platform: linux, port: 22, username: u, password: p,
     host_key: strict, interval: 30, timeout: 9, tags: [t]}
  - {hostname: b, retry_interval: 5, rise: 2, fall: 2, critical: true,
     key_file: keyfile, key_passphrase: p, services: [s]}
  - {hostname: c, password_env: PATH, limits: {cpu_percent: 95, disk_percent: {warn: 1, fail: 9}, load_per_cpu: 3}}
  - {hostname: d, password_file: keyfile, checks: [{name: c, command: x, timeout: 5}]}
  - {name: e, platform: simulated, mean_healthy: 1, mean_unhealthy: 1, seed: 1}
"""
SLOTS = [match.span(1) for match in re.finditer(r"(?<=[\[{, ])([\w:./]+)(?=: |[,}\]])", FULL)]
HOSTILE = [
    CANARY,
    f"[{CANARY}]",
    f"{{{CANARY}: {CANARY}}}",
    f'"{CANARY}\\0\\ud800"',
    f"{CANARY}: {CANARY}: x",
    f"HC1.{CANARY}.a.b.c",
    f"~{CANARY}/x",
    f"-{CANARY}/../{CANARY}",
]


@pytest.mark.long
@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_fault_quotes_the_file(hostile: str, folder: Path) -> None:
    """The same odd text in the place of every key and of every value: refused or not, it is never shown."""
    (folder / "keyfile").write_text(CANARY, encoding="utf-8")
    assert len(SLOTS) > 90
    refused = 0
    for begin, end in SLOTS:
        lines = faults(folder, FULL[:begin] + hostile + FULL[end:])
        refused += bool(lines)
        assert CANARY not in "\n".join(lines)
    assert refused > 20


def test_full_inventory_is_valid(folder: Path) -> None:
    (folder / "keyfile").write_text("p", encoding="utf-8")
    assert faults(folder, FULL) == []


KNOWN = sorted({
    *ServiceSettings.model_fields,
    *ResourceSettings.model_fields,
    "service",
    "defaults",
    "resources",
    "warn",
    "fail",
    "command",
})
TEXTS = st.one_of(
    st.sampled_from([
        "local",
        "simulated",
        "unix",
        "strict",
        "inf",
        "0",
        "1",
        "-1",
        "true",
        "~/x",
        "~x/y",
        "a\x00b",
        "\ud800",
        "",
        "HC1.a.b.c.d",
    ]),
    st.text(max_size=12),
    st.text(string.printable, max_size=12),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    TEXTS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(KNOWN), TEXTS), inner, max_size=4)
    ),
    max_leaves=8,
)
RESOURCE = st.dictionaries(st.sampled_from(sorted(ResourceSettings.model_fields)), VALUES, max_size=8)
TREE = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {"resources": st.lists(RESOURCE, max_size=3)}, optional={"defaults": RESOURCE, "service": VALUES}
    ),
)
FAST = settings(suppress_health_check=list(HealthCheck), derandomize=True, database=None)


def only_our_error(folder: Path, content: bytes) -> None:
    """Each line names a place that exists in the file."""
    text = content.decode("utf-8", "replace").removeprefix("\ufeff")
    lines = re.split("\r\n|[\r\n\x85\u2028\u2029]", text)
    for line in faults(folder, content):
        if found := re.match(r"inventory\.yaml:(\d+):(\d+): ", line):
            row, column = int(found[1]), int(found[2])
            assert row <= len(lines) and column <= len(lines[row - 1]) + 1


@FAST
@given(tree=TREE)
def test_any_tree_gives_only_our_error(tree: Any, folder: Path) -> None:
    only_our_error(folder, json.dumps(tree).encode())


@FAST
@given(
    content=st.one_of(
        st.binary(max_size=60), st.text("[]{}:,-?&*!|>'\"%@`#\\ \t\n\r\ufeff\x85aü0<~", max_size=40).map(str.encode)
    )
)
def test_any_bytes_give_only_our_error(content: bytes, folder: Path) -> None:
    only_our_error(folder, content)


@pytest.mark.long
@pytest.mark.windows
@FAST
@given(
    begin=st.integers(0, len(FULL)),
    cut=st.integers(0, 30),
    insert=st.text("[]{}:,-&*!|>'\"#\\ \n\ta0~\x00\ud800", max_size=4),
)
def test_any_edit_gives_only_our_error(begin: int, cut: int, insert: str, folder: Path) -> None:
    only_our_error(folder, (FULL[:begin] + insert + FULL[begin + cut :]).encode("utf-8", "surrogatepass"))


@pytest.fixture(autouse=True)
def _same_folder(folder: Path) -> Iterator[None]:
    """Relative paths of the generated files must not reach into the project."""
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)
