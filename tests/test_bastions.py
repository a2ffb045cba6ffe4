"""Hosts behind others, over real sshds: key check, login guard and deadline of each hop, and whom a fault names."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import paramiko
import pytest
import sqlalchemy
from conftest import late_logins, no_leaks, wait_for
from console import Local, local_console
from hostile import ClosedPort, swallow
from paramiko import common
from rights import ROOT
from service import command, environment, run_cheaply, write_inventory
from sshd import MARK, OPENSSH, Login, ParamikoSshd, Sshd, SshServer, make_key, marked, public_line, write_private
from test_transport import (
    ACCOUNTS,
    AMPLE,
    DEADLINE,
    Answer,
    TardySshd,
    good_login,
    healthy,
    login_shell,
    no_attempt,
    poll,
    resource_of,
    settings_digest,
    target,
)

from healthchecker import (
    CONNECTIONS,
    Connection,
    ConnectionContext,
    Deadline,
    HostChannel,
    InventoryError,
    KnownHosts,
    Resolver,
    Resource,
    ResourceSettings,
    SshConfig,
    Target,
    Wire,
    find_resource,
    load_inventory,
    revise,
)


class Net:
    """Resources that know of each other, as the pollers of a service do."""

    def __init__(self, known_hosts: Path, *servers: SshServer) -> None:
        known_hosts.write_text("".join(server.known_hosts() for server in servers), encoding="ascii")
        self.context = ConnectionContext(KnownHosts(known_hosts), Resolver())

    def add(self, target: Target) -> Connection:
        made = CONNECTIONS[target.settings.platform](target, self.context.guard_of(target), self.context)
        self.context.watched[target.name] = made
        return made

    def poll(self, target: Target) -> Answer:
        return poll(target, self.add(target))


def hop(server: SshServer, user: str | None = None) -> str:
    return f"{user or server.username}@{server.address}:{server.port}"


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Sshd, Sshd, Sshd]]:
    """Three, of which each may be a bastion."""
    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(Sshd()) for _ in range(3))
        yield first, second, third


def behind(server: SshServer, jump: str, **more: Any) -> Target:
    return target(server, proxy_jump=jump, **{"timeout": AMPLE, **good_login(server), **more})


def came_through(server: SshServer, begun: int) -> bool:
    """Somebody logged in to a bastion since its log was `begun` characters long."""
    return "Accepted" in server.log()[begun:]


# --- the way ------------------------------------------------------------------


@OPENSSH
@pytest.mark.parametrize("way", ["a resource", "two resources", "a resource behind another one"])
def test_resources_as_bastions(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path, way: str) -> None:
    """Each hop with its own credential and pinned key."""
    first, second, last = servers
    net = Net(tmp_path / "known", last)
    net.add(target(first, name="b1", trusted=f"ssh-ed25519 {first.fingerprint()}", **good_login(first)))
    other = target(second, name="b2", trusted=f"ssh-ed25519 {second.fingerprint()}", **good_login(second))
    if "behind" in way:
        other = replace(other, settings=other.settings.model_copy(update={"proxy_jump": "b1"}))
    net.add(other)
    begun = [len(server.log()) for server in servers]
    jump = {"a resource": "b1", "two resources": "b1,b2"}.get(way, "b2")
    with no_leaks():
        assert healthy(net.poll(behind(last, jump)))
    assert came_through(first, begun[0])
    assert came_through(second, begun[1]) is (way != "a resource")


@pytest.mark.long
@ACCOUNTS
def test_a_poll_that_is_late_leaves_nothing_behind_bastions(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path) -> None:
    first, second, last = servers
    net = Net(tmp_path / "known", *servers)
    net.add(target(first, name="b1", **good_login(first)))
    net.add(target(second, name="b2", **good_login(second)))
    mark, rc = f"{MARK}={last.folder}", last.folder / ".bashrc"
    before = marked(mark)
    rc.write_text("while :; do sleep 1; done", encoding="ascii")
    with login_shell(last, shutil.which("bash") or pytest.skip("bash is missing")):
        answer = net.poll(behind(last, "b1,b2", timeout=8))
    rc.unlink()
    assert answer.cause == "timeout" and answer.reason.startswith("no end within 8 s")
    wait_for(lambda: marked(mark) <= before)


@OPENSSH
@pytest.mark.parametrize("hops", [1, 2])
def test_addresses_as_bastions(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path, hops: int) -> None:
    """The resource's own credential, another user's name; the key must be in known_hosts."""
    *bastions, last = servers
    net, key = Net(tmp_path / "known", *servers), make_key("ed25519")
    write_private(tmp_path / "key", key)
    for server in servers:
        with (server.folder / "authorized_keys").open("a", encoding="ascii") as authorized:
            authorized.write(public_line(key) + "\n")
    way = ",".join(map(hop, bastions[:hops]))
    with no_leaks():
        assert healthy(net.poll(target(last, key_file=tmp_path / "key", proxy_jump=way, timeout=AMPLE)))


@OPENSSH
def test_an_address_whose_key_is_not_known_gets_no_login(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path) -> None:
    """There is no row that would keep what is learned."""
    with Sshd() as bastion:
        for _ in range(2):
            answer = Net(tmp_path / "known").poll(behind(servers[2], hop(bastion), password="a secret of the test"))
            assert answer.cause == "host_key"
            assert answer.reason.startswith(f"bastion {hop(bastion)}: host key unknown: offered ssh-ed25519 ")
            assert bastion.fingerprint() in answer.reason
            assert answer.reason.endswith("add the bastion as a resource, or its key to known_hosts")
        assert no_attempt(bastion)


@OPENSSH
def test_those_behind_a_bastion_share_the_key_that_is_learned(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path) -> None:
    """Whoever is first trusts it, and what that one saw is what the bastion's own poll reports, to be stored."""
    with Sshd() as bastion:
        net = Net(tmp_path / "known")
        connection = net.add(target(bastion, name="b1", **good_login(bastion)))
        assert healthy(net.poll(behind(servers[2], "b1", name="one")))
        first = f"ssh-ed25519 {bastion.fingerprint()}"
        assert connection.host_key == first
        bastion.rekey()
        for watched in (behind(servers[2], "b1", name="one"), behind(servers[1], "b1", name="two")):
            answer = net.poll(watched)
            assert (answer.cause, answer.reason.startswith("bastion b1: host key changed: ")) == ("host_key", True)
            assert first in answer.reason and answer.reason.endswith("trust b1")
        assert no_attempt(bastion)


# --- what can go wrong on it ----------------------------------------------------


@OPENSSH
def test_a_refused_password_of_a_bastion_is_not_tried_again(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path) -> None:
    """By nobody behind it: they share its guard, and their own credential was refused nowhere."""
    with Sshd() as bastion:
        net = Net(tmp_path / "known", bastion, *servers)
        wrong = target(bastion, name="b1", password="not the password")
        net.add(wrong)
        answers = [net.poll(behind(servers[2], "b1", name=f"host{number}")) for number in range(5)]
        assert answers[0].cause == "unreachable"
        assert answers[0].reason.startswith(f"bastion b1: login as {bastion.username} refused")
        assert {answer.reason.split(": the")[0] for answer in answers[1:]} == {"not tried: bastion b1"}
        assert bastion.log().count("Failed password") == 1
        assert net.context.guard_of(wrong).refusals == 1
        assert net.context.guard_of(behind(servers[2], "b1")).refusals == 0


@OPENSSH
def test_addresses_are_guarded_by_user(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path) -> None:
    """Resources with other users and the same password, and one that is only tried, count together at the bastion."""
    with Sshd() as bastion:
        net = Net(tmp_path / "known", bastion)
        way = hop(bastion)
        for number in range(5):
            login = {"key_file": None, "password": "wrong", "username": f"user{number}"}
            watched = resource_of({"name": f"h{number}", "hostname": "192.0.2.1", "proxy_jump": way, "timeout": AMPLE,
                                   **login})
            assert net.poll(watched).cause == "unreachable"
            net.context.guards.keep([watched])  # as each change of configuration does
        assert 1 <= bastion.log().count("Failed password") <= 3
        before = bastion.log().count("Failed password")
        for number in range(9):
            trial = replace(net.context, is_trial=True)
            guess = resource_of({"name": "guess", "hostname": "192.0.2.1", "username": "me", "proxy_jump": way,
                                 "timeout": AMPLE, "password": f"guess {number}"})
            poll(guess, CONNECTIONS[guess.settings.platform](guess, trial.guard_of(guess), trial))
        assert bastion.log().count("Failed password") <= max(4, before)


@OPENSSH
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("AllowTcpForwarding no", "it refuses a connection to 127.0.0.1 port"),
        ("PermitOpen 192.0.2.1:22", "prohibited"),
        ("DenyUsers *", "login as"),
        ("KexAlgorithms diffie-hellman-group14-sha1", "no algorithm in common"),
    ],
)
def test_what_a_bastion_refuses(
    servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path, settings: str, says: str
) -> None:
    first, _, last = servers
    net = Net(tmp_path / "known", *servers)
    net.add(target(first, name="b1", **good_login(first)))
    with no_leaks(), settings_digest(first, settings):
        answer = net.poll(behind(last, "b1"))
    assert answer.reason.startswith("bastion b1: ") and says in answer.reason
    assert answer.cause in ("unreachable", "protocol")


@OPENSSH
def test_a_port_that_is_closed_behind_a_bastion(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path) -> None:
    net = Net(tmp_path / "known", *servers)
    net.add(target(servers[0], name="b1", **good_login(servers[0])))
    with ClosedPort() as closed:
        answer = net.poll(behind(servers[1], "b1", port=closed.port))
    assert (answer.cause, answer.reason) == (
        "unreachable", f"bastion b1: it refuses a connection to 127.0.0.1 port {closed.port}: Connect failed")


@pytest.mark.long
@OPENSSH
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_frozen_bastion(tmp_path: Path, when: str) -> None:
    with Sshd() as first, Sshd() as last, contextlib.ExitStack() as cleanup:
        net = Net(tmp_path / "known", first, last)
        net.add(target(first, name="b1", **good_login(first)))
        slow = {"name": "slow", "command": "sleep 60", "timeout": 60}
        watched = behind(last, "b1", timeout=5, checks=[slow])
        cleanup.callback(first.thaw)
        over, begun = threading.Event(), len(last.log())

        def freeze() -> None:
            wait_for(lambda: when == "before" or over.is_set() or came_through(last, begun))
            if not over.is_set():
                first.freeze()

        freezing = threading.Thread(target=freeze)
        with no_leaks():
            freezing.start()
            if when == "before":
                freezing.join()
            answer = net.poll(watched)
            over.set()
            freezing.join()
            first.thaw()
    assert answer.cause == "timeout" and "bastion b1" in answer.reason, answer


class Forwarder(Login):
    """Lets everybody open a way to anywhere, and does with it what its server does."""

    def check_channel_direct_tcpip_request(self, chanid: int, origin: Any, destination: Any) -> int:
        if self.server.refuses:  # type: ignore[attr-defined]
            swallow(self.connection)
        return common.OPEN_SUCCEEDED


class Bastion(ParamikoSshd):
    """Behaves in one of the ways below once a channel is asked for."""

    login = Forwarder
    kept: paramiko.Channel | None = None
    refuses = False
    sends = b""
    then = ""

    def prepare(self, transport: paramiko.Transport) -> None:
        threading.Thread(target=self._treat, args=(transport,), daemon=True).start()

    def _treat(self, transport: paramiko.Transport) -> None:
        while transport.is_active() or not transport.is_alive():
            if channel := transport.accept(0.1):
                self.kept = channel  # without a reference it would be closed
                channel.sendall(self.sends)
                if self.then == "closes":
                    transport.close()
                elif self.then == "closes the channel":
                    channel.close()
                elif self.then == "floods":
                    with contextlib.suppress(OSError, EOFError):
                        while True:
                            channel.sendall(b"Welcome\r\n" * 3000)
                return
            if self.closing.is_set():
                return


BANNER = b"SSH-2.0-OpenSSH_9.2\r\n"
HOSTILE: dict[str, tuple[dict[str, Any], str, str]] = {
    "never answers the channel": ({"refuses": True}, "timeout", "bastion b1: no answer within {}"),
    "silent after the channel": ({}, "timeout", "no answer within {} (through bastion b1)"),
    "a banner, then silence": ({"sends": BANNER}, "timeout", "(through bastion b1)"),
    "closes after the channel": ({"then": "closes"}, "unreachable", "bastion b1"),
    "closes the channel": ({"then": "closes the channel"}, "unreachable", "bastion b1"),
    "closes in the middle of the key exchange": ({"sends": BANNER, "then": "closes"}, "unreachable", "bastion b1"),
    "floods": ({"then": "floods"}, "protocol", "SSH"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_bastions(tmp_path: Path, how: str) -> None:
    """They end in time, and are named."""
    behaviour, cause, says = HOSTILE[how]
    timeout = DEADLINE if cause == "timeout" else AMPLE
    while True:
        with Bastion() as bastion, no_leaks():
            for name, value in behaviour.items():
                setattr(bastion, name, value)
            net = Net(tmp_path / "known", bastion)
            net.add(target(bastion, name="b1", password=bastion.password))
            answer = net.poll(target(bastion, hostname="192.0.2.1", port=22, proxy_jump="b1", password="a secret",
                                     timeout=timeout))  # fmt: skip
        if "through" not in says or bastion.kept or timeout >= AMPLE:
            break
        timeout *= 2  # on a busy machine the poll was over before its channel was open
    assert answer.cause == cause and says.format(f"{timeout:g} s") in answer.reason, answer


@OPENSSH
def test_a_bastion_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    with Sshd() as first, Sshd() as last:
        net = Net(tmp_path / "known", first, last)
        net.add(target(first, name="b1", **good_login(first)))
        slow = {"name": "slow", "command": "sleep 60", "timeout": 60}
        killer = threading.Thread(
            target=lambda: (wait_for(lambda: came_through(last, 0)), first.kill_sessions()), daemon=True)
        killer.start()
        with no_leaks():
            answer = net.poll(behind(last, "b1", checks=[slow]))
            killer.join()
        last.kill_sessions()
    assert answer.cause == "unreachable" and "bastion b1" in answer.reason, answer


def test_ways_that_cannot_be_gone(tmp_path: Path) -> None:
    """What the API can make of bastions one after the other is told at the poll."""
    net = Net(tmp_path / "known")
    given = {"username": "u", "password": "a secret", "hostname": "192.0.2.1"}
    net.add(resource_of({"name": "a", "proxy_jump": "b", **given}))
    net.add(resource_of({"name": "b", "proxy_jump": "a", **given}))
    answer = net.poll(resource_of({"name": "c", "proxy_jump": "b", **given}))
    assert answer.cause == "credential" and "leads through itself" in answer.reason
    net.add(resource_of({"name": "g", **given}))
    net.add(resource_of({"name": "h", "proxy_jump": "g", **given}))
    for hops in ("g,g", "h,g"):     # a login within its own would wait for itself
        answer = net.poll(resource_of({"name": "c", "proxy_jump": hops, **given}))
        assert answer.reason == "bastion g: the way leads through it twice; correct proxy_jump"
    answer = net.poll(resource_of({"name": "d", "proxy_jump": "gone", **given}))
    assert answer.reason == "bastion gone: there is no such resource; correct proxy_jump"
    damaged = replace(resource_of({"name": "e", **given}), fault=("credential", "e: does not open"))
    net.add(damaged)
    assert net.poll(resource_of({"name": "f", "proxy_jump": "e", **given})).reason == "bastion e: e: does not open"


@OPENSSH
def test_the_forced_command_of_the_readme(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path) -> None:
    """It polls, opens no way to another host, and yet runs what it is sent."""
    server, key = servers[0], make_key("ed25519")
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    forced = " ".join(readme.split()).partition("`command=")[2].partition(" ssh-ed25519 ")[0]
    write_private(tmp_path / "key", key)
    with (server.folder / "authorized_keys").open("a", encoding="ascii") as authorized:
        authorized.write(f"command={forced} {public_line(key)}\n")
    echo = {"name": "echo", "command": "echo $SSH_ORIGINAL_COMMAND"}
    login = {"key_file": tmp_path / "key", "timeout": AMPLE, "checks": [echo]}
    answer = poll(target(server, **login))
    assert healthy(answer) and answer.sample
    assert answer.sample.checks["echo"].text == "exec /bin/sh -s"
    net = Net(tmp_path / "known", *servers)
    net.add(target(server, name="b1", key_file=tmp_path / "key"))
    assert "bastion b1: it refuses a connection to" in net.poll(behind(servers[1], "b1")).reason


# --- in the service -------------------------------------------------------------


def drop(local: Local, name: str) -> None:
    """As a reload does, which asks nobody whether others lead through it."""
    with local.store.writing() as session:
        session.delete(find_resource(session, name))
        revise(session)


@pytest.mark.long
@OPENSSH
def test_those_behind_a_bastion_follow_its_changes(tmp_path: Path) -> None:
    """Another address, key and credential, and no bastion at all."""
    with contextlib.ExitStack() as stack:
        first, second, last = (stack.enter_context(Sshd()) for _ in range(3))
        if not last.password:
            pytest.skip("password login needs root, to create a throw-away account")

        def row(server: SshServer, **more: Any) -> dict[str, Any]:
            return {"hostname": server.address, "port": server.port, "username": server.username, "timeout": AMPLE,
                    "password": server.password, "platform": "linux", "interval": 1, **more}  # fmt: skip

        local = stack.enter_context(local_console(tmp_path)).log_in()
        assert local.api("POST", "resources", row(last, name="web", proxy_jump="b1")).status == 422
        assert local.api("POST", "resources", row(first, name="b1")).status == 201
        assert local.api("POST", "resources", row(last, name="web", proxy_jump="b1", rise=1, fall=1)).status == 201

        def shows(state: str, says: str = "") -> bool:
            found = local.api("GET", "resources/web").json
            return bool(found["state"] == state and says in found["reason"])

        wait_for(lambda: shows("healthy"))
        change = local.api("PATCH", "resources/b1", {"proxy_jump": "web"})
        assert (change.status, "twice" in change.fields["proxy_jump"]) == (422, True)
        begun = len(second.log())
        assert local.api("PATCH", "resources/b1", row(second)).status == 200  # another address and credential
        wait_for(lambda: shows("unhealthy", "write it again"))
        assert local.api("PATCH", "resources/web", {"password": last.password}).status == 200
        wait_for(lambda: came_through(second, begun) and shows("healthy"))
        wait_for(lambda: local.api("GET", "resources/b1").json["trusted_key"])
        second.rekey()
        wait_for(lambda: shows("unhealthy", "bastion b1: host key changed"))
        assert local.api("POST", "resources/b1/trust", {}).status == 200
        wait_for(lambda: shows("healthy"))
        drop(local, "b1")
        wait_for(lambda: shows("unhealthy", "bastion b1: there is no such resource"))


def test_rows_that_somebody_else_has_written(tmp_path: Path) -> None:
    """By SQL, say: other blanks, and no escapes. They are behind a bastion and depend on others as well."""
    host = {"platform": "linux", "username": "monitor", "hostname": "127.0.0.1", "port": 1, "critical": False}
    with local_console(tmp_path) as local:
        local.log_in()
        for more in ({"name": "schlüssel"}, {"name": "web", "proxy_jump": "schlüssel"}):
            assert local.api("POST", "resources", {**host, "password": "correct horse", **more}).status == 201
        with local.store.writing() as session:
            row = session.scalars(sqlalchemy.select(Resource).filter_by(name="web")).one()
            row.settings = json.dumps(json.loads(row.settings), ensure_ascii=False, separators=(",", ":"))
        assert local.api("PATCH", "resources/schlüssel", {"hostname": "127.0.0.9", "password": "x"}).status == 200
        with local.store.reading() as session:
            assert not session.scalar(sqlalchemy.select(Resource.password).filter_by(name="web"))
        renamed = local.api("PATCH", "resources/schlüssel", {"name": "key"})
        assert renamed.status == 409 and renamed.fields == {"name": "stays while it is named by web"}


class Collector(Login):
    """Lets everybody in, whatever is behind, and keeps what it is shown."""

    def check_auth_password(self, username: str, password: str) -> int:
        self.server.shown.append(password)  # type: ignore[attr-defined]
        return common.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_direct_tcpip_request(self, chanid: int, origin: Any, destination: Any) -> int:
        return common.OPEN_SUCCEEDED


class Trap(ParamikoSshd):
    """A bastion that is itself each host behind it."""

    login = Collector

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[str] = []

    def prepare(self, transport: paramiko.Transport) -> None:
        threading.Thread(target=self._stand_in, args=(transport,), daemon=True).start()

    def _stand_in(self, transport: paramiko.Transport) -> None:
        while transport.is_active() or not transport.is_alive():
            if channel := transport.accept(0.1):
                behind = paramiko.Transport(channel)  # type: ignore[arg-type]
                behind.add_server_key(paramiko.PKey.from_path(self.folder / "host_ed25519"))
                self.prepare(behind)
                behind.start_server(event=threading.Event(), server=self.login(self, None))  # type: ignore[arg-type]
            if self.closing.is_set():
                return


@pytest.mark.long
@pytest.mark.parametrize("how", ["moved", "removed", "renamed", "further on"])
def test_no_password_goes_through_a_bastion_that_became_another(tmp_path: Path, how: str) -> None:
    """Who typed it trusted the one before. Of those who lead elsewhere nothing is lost, nor by other changes."""
    with Trap() as trap, ClosedPort() as closed, local_console(tmp_path) as local:
        local.log_in()

        def add(name: str, port: int, password: str, **more: str) -> None:
            row = {"hostname": "127.0.0.1", "username": "monitor", "platform": "linux", "timeout": AMPLE}
            reply = local.api("POST", "resources", {"name": name, "port": port, "password": password, **row, **more})
            assert reply.status == 201, reply

        first = "b0" if how == "further on" else "b1"
        add(first, closed.port, "of a bastion")
        if first == "b0":
            add("b1", 22, "of the bastion behind", proxy_jump="b0")
        add("b2", closed.port, "of another bastion")
        add("db1", 22, "of the database", proxy_jump="b1")
        add("db2", 22, "of another database", proxy_jump="b2")
        assert local.api("PATCH", f"resources/{first}", {"interval": 30}).status == 200
        assert local.api("GET", "resources/db1").json["has_secret"]
        if how in ("removed", "renamed"):
            drop(local, "b1")
            add("b1" if how == "removed" else "new", trap.port, "x")
        change = {"name": "b1"} if how == "renamed" else {"port": trap.port, "password": "x"}
        assert local.api("PATCH", f"resources/{'new' if how == 'renamed' else first}", change).status == 200
        assert local.api("POST", f"resources/{first}/check").status == 200
        found = local.api("POST", "resources/db1/check").json
        assert set(trap.shown) == {"x"}
        assert (found["cause"], "write it again" in found["reason"]) == ("credential", True)
        kept = {row["name"]: row["has_secret"] for row in local.api("GET", "resources").json}
        assert kept == {first: True, "b1": first == "b1", "b2": True, "db1": False, "db2": True}
        said = [event["text"] for event in local.api("GET", "events?resource=db1&kind=change").json]
        assert said[0] == f"its password has to be written again: the way leads through {first}, which is another now"


def test_a_resource_that_is_called_like_an_address_on_the_way(tmp_path: Path) -> None:
    """Nothing leads through it, so nobody's password is lost by it."""
    with local_console(tmp_path) as local:
        local.log_in()
        way = "ops@gw.example.com"
        row = {"hostname": "db.example.com", "username": "u", "password": "p", "platform": "linux"}
        assert local.api("POST", "resources", {"name": "db", **row, "proxy_jump": way}).status == 201
        assert local.api("POST", "resources", {"name": way, **row}).status == 201
        assert local.api("PATCH", f"resources/{way}", {"port": 23, "password": "q"}).status == 200
        assert local.api("GET", "resources/db").json["has_secret"]


@OPENSSH
def test_an_address_on_the_way_is_no_resource(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path) -> None:
    """Or whoever gives a resource that name takes over the way of others."""
    first, _, last = servers
    with Trap() as trap:
        net = Net(tmp_path / "known", first, last)
        way = hop(first, "nobody")
        net.add(target(trap, name=way, password="x"))
        answer = net.poll(behind(last, way))
    assert answer.reason.startswith(f"bastion {way}: login as nobody refused")
    assert not trap.shown


@OPENSSH
def test_check_and_trust_through_a_bastion(tmp_path: Path) -> None:
    with Sshd() as first, Sshd() as last:
        rows = "".join(
            f"  - {{name: {name}, hostname: {server.address}, port: {server.port}, username: {server.username},"
            f" timeout: 30, key_file: {server.user_key()}{more}}}\n"
            for name, server, more in (("b1", first, ""), ("web", last, ", proxy_jump: b1")))
        inventory = write_inventory(tmp_path, rows, "  known_hosts: none\n")
        code, said = run_cheaply("--inventory", str(inventory), "check", "--probe")
        assert (code, said.count("healthy")) == (0, 2), said


# --- the inventory ----------------------------------------------------------------
ROW = "name: {name}, hostname: {name}, username: u, password: p"
FAULTS = {
    "no such name": ("{name: a, HOST, proxy_jump: ¦b1}", "no resource has this name; write an address as user@host"),
    "a slip": ("{name: a, HOST, proxy_jump: ¦bastoin}, {name: bastion, HOST}", "did you mean bastion?"),
    "itself": ("{name: a, HOST, proxy_jump: ¦a}", "the way leads through a twice"),
    "a loop": ("{name: a, HOST, proxy_jump: ¦b}, {name: b, HOST, proxy_jump: a}", "leads through a twice"),
    "a loop behind": ("{name: c, HOST, proxy_jump: ¦a}, {name: a, HOST, proxy_jump: b}, {name: b, HOST, proxy_jump: a}",
                      "leads through a twice"),
    "twice": ("{name: a, HOST, proxy_jump: ¦'b,c,b'}, {name: b, HOST}, {name: c, HOST}", "b stands there twice"),
    "an address twice": ("{name: a, HOST, proxy_jump: ¦'u@h,u@h:22'}", "u@h:22 stands there twice"),
    "a name like an address": ("{name: a, HOST, proxy_jump: ¦'gw:2222'}, {name: 'gw:2222', HOST}",
                               "gw:2222 is an address, and the name of a resource; call that otherwise"),
    "no host": ("{name: a, HOST, proxy_jump: ¦s}, {name: s, platform: simulated}", "s is no SSH host"),
    "no port": ("{name: a, HOST, proxy_jump: ¦u@h:65536}", "must be a resource's name or"),
    "port 0": ("{name: a, HOST, proxy_jump: ¦h:0}", "must be a resource's name or"),
    "an empty hop": ("{name: a, HOST, proxy_jump: ¦'h:22,,h:23'}", "must be a resource's name or"),
    "too many": ("{name: a, HOST, proxy_jump: ¦'" + ",".join(["h:22"] * 9) + "'}", "up to 8"),
    "none and another": ("{name: a, HOST, proxy_jump: ¦'none,h:22'}", "no resource has this name"),
    "a list": ("{name: a, HOST, proxy_jump: ¦[h]}", "must be"),
    "an alias that is none": ("{name: a, HOST, host_key_alias: ¦'a b'}", "must be a host name"),
    "Windows": ("{name: a, HOST, platform: windows, ¦proxy_jump: h:22}", "has no meaning with platform windows"),
    "no file": ("{name: a, HOST, ssh_config: ¦nowhere}", "this file cannot be read"),
    "not one": ("{name: a, HOST, ssh_config: ¦strange}", "this is no configuration of OpenSSH's client"),
    "Match exec": ("{name: a, HOST, ssh_config: ¦exec}", "`exec` would run a command"),
    "Match exec, in capitals": ("{name: a, HOST, ssh_config: ¦capitals}", "`exec` would run a command"),
    "Include of itself": ("{name: a, HOST, ssh_config: ¦include}", "does include include itself?"),
    "Include of what is none": ("{name: a, HOST, ssh_config: ¦includes}", "this is no configuration of OpenSSH's"),
    "ProxyCommand": ("{name: a, HOST, ssh_config: ¦command}", "ProxyCommand is not run"),
    "ProxyCommand before ProxyJump": ("{name: a, HOST, ssh_config: ¦both}", "ProxyCommand is not run"),
    "two words": ("{name: a, HOST, ssh_config: ¦two_words}", "OpenSSH does not take this line: User monitor read only"),
    "no word": ("{name: a, HOST, ssh_config: ¦no_word}", "OpenSSH does not take this line: User # nobody"),
    "a quote that is open": ("{name: a, HOST, ssh_config: ¦quote}", "No closing quotation"),
    "a key of what is not known": ("{name: a, HOST, ssh_config: ¦token}", "id_%C: %d, %h,"),
    "a key of its own": ("{name: a, hostname: own, username: u, ssh_config: ¦keys}", "add it as a resource"),
    "a list of keys": ("{hostname: h, username: u, key_file: ¦[x], proxy_jump: g, ssh_config: keys}", "key_file"),
    "a port that is none": ("{name: a, HOST, ssh_config: port}", "port"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_have_their_place(tmp_path: Path, fault: str) -> None:
    text, message = FAULTS[fault]
    ran = tmp_path / "ran"
    (tmp_path / "strange").write_text("Host\n\0\xff", encoding="latin-1")
    for name, criterion in (("exec", f"ex'e'c \"touch {ran}\""), ("capitals", f"host a !EXEC \"touch {ran}\"")):
        (tmp_path / name).write_text(f"Match {criterion}\n  User x\n", encoding="utf-8")
    (tmp_path / "include").write_text("Host b\n  include include\n", encoding="utf-8")
    (tmp_path / "includes").write_text("Include str*e\n", encoding="utf-8")
    both = "Host h\n  ProxyCommand nc %h %p\nHost * !gate\n  ProxyJump gate\n"
    for name, words in {"two_words": "User monitor read only", "no_word": "User # nobody", "quote": 'User "monitor',
                        "token": "IdentityFile ~/id_%C", "both": both}.items():
        (tmp_path / name).write_text(words, encoding="utf-8")
    (tmp_path / "command").write_text("Host h\n  ProxyCommand ssh b -W %h:%p\n", encoding="utf-8")
    (tmp_path / "port").write_text("Port 22x # the usual\n", encoding="utf-8")
    for name in ("one", "two"):
        (tmp_path / name).touch()
    (tmp_path / "keys").write_text(f"Host own\n  IdentityFile {tmp_path}/one\n  ProxyJump gate\n"
                                   f"Host gate\n  IdentityFile {tmp_path}/two\n", encoding="utf-8")
    line = f"resources: [{text}]\n".replace("HOST", "hostname: h, username: u, password: p")
    column = line.index("¦") + 1 if "¦" in line else None
    (tmp_path / "inventory.yaml").write_text(line.replace("¦", ""), encoding="utf-8")
    with pytest.raises(InventoryError) as caught:
        load_inventory(tmp_path / "inventory.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"inventory.yaml:1:{column}: " if column else "inventory.yaml:1:")
    assert not ran.exists()


def test_ways_of_writing_a_bastion(tmp_path: Path) -> None:
    """Names win, defaults hold for all but who says none, blanks go."""
    text = """\
defaults: {username: u, password: p, proxy_jump: bastion}
resources:
  - {hostname: bastion, proxy_jump: none}
  - {hostname: a}
  - {hostname: b, proxy_jump: 'me@gate.example.com , [2001:db8::1]:2222, a'}
  - {name: s, platform: simulated}
"""
    (tmp_path / "inventory.yaml").write_text(text, encoding="utf-8")
    ways = {one.name: one.hops for one in load_inventory(tmp_path / "inventory.yaml").resources}
    hops = ["me@gate.example.com", "[2001:db8::1]:2222", "a"]
    assert ways == {"bastion": [], "a": ["bastion"], "b": hops, "s": []}
    row = resource_of({"name": "b", "hostname": "h", "username": "u", "proxy_jump": ",".join(hops)})
    places = [(one.settings.username, one.settings.hostname, one.settings.connect_port) for one in row.bastions()]
    assert places == [("me", "gate.example.com", 22), ("u", "2001:db8::1", 2222)]


CONFIG = """\
# what an administrator has
Host web*.example.com !web9.example.com
    HostName %h.internal
    Port 2222
    User deploy
    IdentityFile {folder}/missing
    IdentityFile {folder}/id_%r
Host db
    HostName=192.0.2.7
    HostKeyAlias db.example.com
    ProxyJump jump@gate,far:2200
Host gate
    HostName gate.example.com
    Port 2022
Match user other
    Port 2255
Match host 192.0.2.*
    Port 2244
Match originalhost nas
    ProxyJump none
Host *
    User monitor
    ProxyJump gate
"""


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh here")
@pytest.mark.parametrize("host", ["web1.example.com", "web9.example.com", "db", "nas"])
def test_ssh_config_as_openssh_reads_it(tmp_path: Path, host: str) -> None:
    config = tmp_path / "config"
    config.write_text(CONFIG.format(folder=tmp_path), encoding="utf-8")
    (tmp_path / "id_deploy").touch()
    shown = subprocess.run(["ssh", "-G", "-F", str(config), host], capture_output=True, check=True, timeout=60)
    theirs = dict(line.split(" ", 1) for line in reversed(shown.stdout.decode().splitlines()) if " " in line)
    said, key, command = SshConfig(config).of(host)
    assert said == {name: theirs[word] for name, word in SshConfig.SAID.items() if theirs.get(word, "none") != "none"
                    and (name != "port" or theirs[word] != "22")}  # fmt: skip
    assert key == (str(tmp_path / "id_deploy") if host == "web1.example.com" else None)
    assert not command


# files as people write them; {folder} has hosts.conf, more.conf and keys
SSH_CONFIGS = {
    "comments": "Host db # the database\n  HostName 192.0.2.7 # there\n  User monitor # read only\n  Port 66\t# here\n"
                "  ProxyJump me@gate:22,far # both\n  HostKeyAlias real #\n",
    "a # within a word": "Host db\n  User a#b\n  HostKeyAlias db#1\n",
    "a # in quotes": 'Host db\n  User "a # b" # c\n',
    "a host called #": "Host # db\n  User a\n",
    "quotes": """Host "db" 'web1'\n  User "monitor"\n  Port "66"\n  HostName '192.0.2.7'\n""",
    "a quote in a comment": "Host db\n  User a # it's\n",
    "a quote in the midst": 'User mon"i"tor\n',
    "an open quote": 'User "monitor\n',
    "backslashes": "Host db\n  User EXAMPLE\\monitor\nHost *\n  User EXAMPLE\\\\monitor\n",
    "equals": "Host=db\nPort=77\nUser = bob\nHostName= 192.0.2.1 # x\nHostKeyAlias =x\n",
    "line ends of Windows": "Host db\r\n  User a\r\n  Port 66 # x\r\n\r\n# end\r\nHost *\r\n  User b\r\n",
    "two words": "User monitor read only\n",
    "a word and one behind it": "Port 66 x\n",
    "nothing": "User\n",
    "nothing but a comment": "User # x\n",
    "several patterns": "Host x d* !web*\n  Port 1\nHost !db *\n  Port 2\n",
    "patterns with a comma": "Host db,web1\n  Port 1\n",
    "patterns with brackets": "Host [dw]*\n  Port 1\nHost ?eb1\n  Port 2\n",
    "negations alone": "Host !db\n  Port 1\n",
    "the first one": "Host db\n  Port 1\nHost *\n  Port 2\n  User a\nHost db\n  User b\n",
    "capitals": "Host Web*\n  Port 55\n  HostName %h.Example\nMatch host WEB3,DB\n  Port 56\nHOST web1\n  uSER a\n",
    "Match": "Match host db,web* user root # x\n  Port 1\nMatch !host db\n  Port 2\nMatch all\n  User a\n",
    "Match of what stands behind it": "Match host 192.0.2.*\n  Port 1\nHost db\n  HostName 192.0.2.7\n",
    "Match final": "Match final host 192.0.2.*\n  Port 1\nHost db\n  HostName 192.0.2.7\nMatch final\n  User a\n",
    "Match of what it says": "Match host db\n  HostName 192.0.2.7\n  Port 1\n",
    "a command first": "Host db\n  ProxyCommand nc %h %p # x\nHost *\n  ProxyJump gate\n",
    "a command behind": "Host db\n  ProxyJump gate\nHost *\n  ProxyCommand nc %h %p\n",
    "both in one": "Host db\n  ProxyCommand nc\n  ProxyJump gate\nHost web1\n  ProxyJump gate\n  ProxyCommand nc\n",
    "no command first": "Host db\n  ProxyCommand none\nHost *\n  ProxyJump gate\n",
    "no jump first": "Host db\n  ProxyJump none # x\nHost *\n  ProxyJump gate\n",
    "no jump, then a command": "Host db\n  ProxyJump none\nHost *\n  ProxyCommand nc\n",
    "a command called none": "ProxyCommand none # x\n",
    "a URI": "ProxyJump ssh://me@gate:2200\n",
    "a URI without a port": "ProxyJump ssh://gate\n",
    "percent": "Host db\n  HostName %h.example.com\n",
    "Include": "Include {folder}/hosts.conf\nHost *\n  User z\n",
    "Include at a Host": "Host w*\n  Include {folder}/*.conf # both\n  HostKeyAlias w\nHost *\n  Port 2\n",
    "Include at a Match": "Match host db\n  HostName 192.0.2.7\n  Include {folder}/more.conf\nPort 2\n",
    "Include of several": 'Include "{folder}/more.conf" {folder}/nothing {folder}/no*\nUser z\n',
    "Include of itself": "Include {folder}/config\n",
}


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh here")
@pytest.mark.parametrize("case", SSH_CONFIGS)
def test_ssh_config_as_people_write_it(tmp_path: Path, case: str) -> None:
    (tmp_path / "hosts.conf").write_text("Port 3\nHost db\n  User included\n  Port 2299\n", encoding="utf-8")
    (tmp_path / "more.conf").write_text("HostKeyAlias more\nMatch host web1\n  User more\n", encoding="utf-8")
    config = tmp_path / "config"
    config.write_bytes(SSH_CONFIGS[case].replace("{folder}", str(tmp_path)).encode())
    for host in ("db", "web1", "Web2", "WEB3", "#"):
        shown = subprocess.run(["ssh", "-G", "-F", str(config), host], capture_output=True, check=False, timeout=60)
        theirs = dict(line.split(" ", 1) for line in shown.stdout.decode().splitlines() if " " in line)
        try:
            said, _, command = SshConfig(config).of(host)
        except ValueError as error:
            assert shown.returncode, error
            continue
        assert not shown.returncode, shown.stderr
        said = {"port": "22", "username": getpass.getuser(), **said, "hostname": said["hostname"].lower()}
        assert said == {name: theirs[word] for name, word in SshConfig.SAID.items()
                        if word in theirs and theirs[word] not in ("none", host)} | {"hostname": theirs["hostname"]}
        assert command == ("proxycommand" in theirs)


@pytest.mark.long
@pytest.mark.skipif(not ROOT, reason="no other account can be had")
def test_ssh_config_of_an_account_without_a_name(tmp_path: Path) -> None:
    """As in a container that runs under a number; with root's rights, for the interpreter may be closed to others."""
    path = write_inventory(tmp_path, "  - {hostname: db, username: u, password: p, ssh_config: config}\n")
    (tmp_path / "config").write_text("Host *\n  HostName %h.example.com\n", encoding="utf-8")
    (tmp_path / "sitecustomize.py").write_text("import os\nos.setreuid(54321, 0)\n", encoding="utf-8")
    environ = {name: value for name, value in environment({"PYTHONPATH": str(tmp_path)}).items()
               if name not in ("LOGNAME", "USER", "LNAME", "USERNAME")}  # fmt: skip
    ended = subprocess.run(command(path, "check"), env=environ, capture_output=True, encoding="utf-8", check=False,
                           timeout=120)  # fmt: skip
    assert "hostname db.example.com" in ended.stdout, ended


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh here")
@pytest.mark.parametrize("name", ["id_%n", "id_%h", "id_%r_%p", "id_%u", "id_%L", "id_%h #", '"an id" # x'])
def test_key_of_ssh_config(tmp_path: Path, name: str) -> None:
    """`-v` shows what file ssh opens."""
    config = tmp_path / "config"
    words = f"  HostName %h.Example\n  User bob\n  Port 66\n  IdentityFile {name}\n".replace("id", f"{tmp_path}/id")
    config.write_text(f"Host Web1\n{words}".replace(f'"an {tmp_path}/', f'"{tmp_path}/an '), encoding="utf-8")
    command = ["ssh", "-v", "-F", str(config), "-o", "ProxyCommand=false", "-o", "BatchMode=yes", "Web1"]
    shown = subprocess.run(command, capture_output=True, check=False, timeout=60).stderr.decode()
    found = re.search(f"identity file ({re.escape(str(tmp_path))}.*) type", shown)
    assert found and SshConfig(config).of("Web1")[1] is None
    Path(found[1]).touch()
    assert SshConfig(config).of("Web1")[1] == found[1]


def test_what_ssh_config_includes_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or at home; what is not there is nothing."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for name, text in {"[a]/config": "Include conf.d/* nothing\nInclude ~/more\n", "[a]/conf.d/2": "User b\nPort 2\n",
                       "[a]/conf.d/1": "Host a\n  User a\n", "home/more": "Port 3\nHostName 192.0.2.1\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    config = SshConfig(tmp_path / "[a]" / "config")
    assert config.of("a")[0] == {"username": "a", "port": "2", "hostname": "192.0.2.1"}
    assert config.of("b")[0] == {"username": "b", "port": "2", "hostname": "192.0.2.1"}


def test_ssh_config_gives_way_to_the_inventory(tmp_path: Path) -> None:
    """What it says is shown by `check`, and a bastion of it becomes an address."""
    config = CONFIG.format(folder=tmp_path).replace("    ProxyJump gate\n", "")
    (tmp_path / "config").write_text(config, encoding="utf-8")
    (tmp_path / "id_deploy").touch()
    rows = """\
  - {hostname: web1.example.com, ssh_config: config}
  - {hostname: db, ssh_config: config, password: p}
  - {name: db2, hostname: db, ssh_config: config, password: p, username: other, proxy_jump: none}
"""
    inventory = write_inventory(tmp_path, rows)
    web, db, db2 = load_inventory(inventory).resources
    assert (web.name, web.hostname, web.port, web.username) == (
        "web1.example.com", "web1.example.com.internal", 2222, "deploy")
    assert web.key_file == tmp_path / "id_deploy" and web.proxy_jump is None
    assert (db.hostname, db.port, db.username, db.key_file) == ("192.0.2.7", 2244, "monitor", None)
    assert (db.host_key_alias, db.hops) == ("db.example.com", ["jump@gate.example.com:2022", "monitor@far:2200"])
    assert (db2.hostname, db2.port, db2.username, db2.hops) == ("192.0.2.7", 2255, "other", [])
    code, said = run_cheaply("--inventory", str(inventory), "check")
    assert code == 0
    assert ("db, with config: hostname 192.0.2.7, port 2244, username monitor, "
            "proxy_jump jump@gate.example.com:2022,monitor@far:2200, host_key_alias db.example.com") in said


def test_ssh_config_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read once, whatever the number of hosts and users, and once more by the next load."""
    parsed: list[object] = []
    read = SshConfig._read
    monkeypatch.setattr(SshConfig, "_read", lambda self, *what: (parsed.append(what), read(self, *what))[1])
    (tmp_path / "config").write_text("Host h*\n  ProxyJump gate\nHost gate\n  User g\n", encoding="utf-8")
    rows = "  - {hostname: 'h[1:50]', username: u, password: p, ssh_config: config}\n"
    rows += "  - {hostname: other, username: o, password: p, ssh_config: config}\n"
    for number in (1, 2):
        found = load_inventory(write_inventory(tmp_path, rows)).resources
        assert [one.hops for one in found] == [["g@gate:22"]] * 50 + [[]]
        assert len(parsed) == number


def test_ssh_config_of_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host a\n  HostName 192.0.2.1\n", encoding="utf-8")
    rows = "  - {hostname: a, username: u, password: p, ssh_config: true}\n"
    rows += "  - {name: b, hostname: a, username: u, password: p, ssh_config: false}\n"
    first, second = load_inventory(write_inventory(tmp_path, rows)).resources
    assert (first.hostname, second.hostname) == ("192.0.2.1", "a")
    stored = ResourceSettings.model_validate(first.model_dump(mode="json"))
    assert stored.ssh_config == first.ssh_config == tmp_path / ".ssh" / "config"


@OPENSSH
def test_an_alias_is_looked_up_in_known_hosts(servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path) -> None:
    server = servers[0]
    (tmp_path / "known").write_text(f"db.example.com {public_line(server.host_keys['ed25519'])}\n", encoding="ascii")
    context = ConnectionContext(KnownHosts(tmp_path / "known"), Resolver())
    for alias, cause in (("db.example.com", ""), ("other.example.com", "host_key")):
        watched = target(server, host_key="strict", host_key_alias=alias, timeout=AMPLE, **good_login(server))
        answer = poll(watched, CONNECTIONS[watched.settings.platform](watched, context.guard_of(watched), context))
        assert answer.cause == cause


@pytest.mark.long
def test_ssh_config_cannot_be_set_through_the_api(tmp_path: Path) -> None:
    with local_console(tmp_path) as local:
        given = {"name": "a", "hostname": "a", "username": "u", "password": "p", "ssh_config": "inventory.yaml"}
        answer = local.log_in().api("POST", "resources", given)
        assert (answer.status, answer.fields) == (422, {"ssh_config": "can be set in the inventory alone"})


@pytest.mark.long
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_said_of_a_password_after_the_poll(
    servers: tuple[Sshd, Sshd, Sshd], tmp_path: Path, keep: bool
) -> None:
    """By a host behind a bastion: that stays open as long."""
    with no_leaks(), TardySshd() as host:
        bastion = servers[0]
        net = Net(tmp_path / "known", host, bastion)
        gate = net.add(target(bastion, name="gate", keep=keep, timeout=AMPLE, **good_login(bastion)))
        watched = target(host, password="wrong", timeout=3, proxy_jump="gate")
        connection = net.add(watched)
        assert poll(watched, connection).cause == "timeout"
        assert len(host.asked) == 1
        assert poll(watched, connection).reason.startswith("not tried: the host has not answered to the login before")
        host.may_answer.set()
        wait_for(lambda: not late_logins())
        assert len(host.asked) == 1 and connection.record.outcomes == {"refused": 1}
        assert poll(watched, connection).cause == "auth"
        assert len(host.asked) == 1
        gate.close()
        connection.close()


def test_who_reads_through_a_bastion_that_takes_nothing_waits_no_longer_than_its_poll() -> None:
    """What is read makes room, and that the bastion is told: who tells it would wait for ever."""
    class Channel:
        def __init__(self) -> None:
            self.wire, self.told = Wire(), list[bool]()
            self.wire.pause()

        def get_transport(self) -> Any:
            return SimpleNamespace(wire=self.wire, session=None)

        def set_combine_stderr(self, _combine: bool) -> None:
            pass

        def settimeout(self, _seconds: float) -> None:
            pass

        def recv(self, _size: int) -> bytes:
            self.told.append(self.wire.too_late())
            wait_for(lambda: deadline.over)
            self.told.append(self.wire.too_late())
            return b"a"

    channel, deadline = Channel(), Deadline(1)
    HostChannel(cast(Any, channel), deadline).recv(1)
    assert channel.told == [False, True] and not channel.wire.waiting
