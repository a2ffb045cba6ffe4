"""The loopback WSMan server, as an unmodified pypsrp sees it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import select
import socket
import ssl
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import requests
from conftest import no_leaks, wait_for
from pypsrp.complex_objects import PSInvocationState
from pypsrp.exceptions import (
    AuthenticationError,
    FragmentError,
    WinRMError,
    WinRMTransportError,
    WSManFaultError,
)
from pypsrp.powershell import PowerShell, RunspacePool
from pypsrp.wsman import WSMan
from wsman_server import STEPS, Answer, Misbehaviour, Script, WSManServer

WAYS = [
    ("http", "ntlm"),
    ("http", "negotiate"),
    ("https", "basic"),
    ("https", "ntlm"),
    ("https", "negotiate"),
    ("https", "certificate"),
]
PASSWORD = "correct horse"
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # from pypsrp's failed sessions


@pytest.fixture(scope="module", autouse=True)
def collect_sockets() -> Iterator[None]:
    """What pypsrp leaves to the garbage collector must not be found in a test of another module."""
    yield
    gc.collect()


def settings_for(server: WSManServer, **changes: Any) -> dict[str, Any]:
    """Give WSMan's arguments for a server."""
    settings: dict[str, Any] = {"port": server.port, "ssl": server.scheme == "https", "auth": server.auth}
    settings.update(username="monitor", password=PASSWORD, no_proxy=True, cert_validation=server.ca_file)
    if server.auth == "certificate":
        settings["certificate_pem"] = str(server.client.certificate_file)
        settings["certificate_key_pem"] = str(server.client.key_file)
    return {**settings, **changes}


def invoke(server: WSManServer, script: str = "Get-Date", **changes: Any) -> PowerShell:
    """Run a script in a runspace of its own."""
    endpoint = changes.pop("configuration_name", "Microsoft.PowerShell")
    with (
        WSMan("127.0.0.1", **settings_for(server, **changes)) as wsman,
        RunspacePool(wsman, configuration_name=endpoint, idle_timeout=60) as pool,
    ):
        shell = PowerShell(pool)
        shell.add_script(script).invoke()
        shell.close()  # not by `with`: after an error it would hide that error behind its own
        return shell


@contextlib.contextmanager
def nothing_left_behind() -> Generator[None, None, None]:
    """Fail when the block leaves a thread, a descriptor or the variable with the accounts behind."""
    threads, users = set(threading.enumerate()), os.environ.get("NTLM_USER_FILE")
    with no_leaks():
        yield
        assert set(threading.enumerate()) <= threads
    assert os.environ.get("NTLM_USER_FILE") == users


@pytest.mark.parametrize(("scheme", "auth"), WAYS)
def test_a_script_is_answered(scheme: str, auth: str) -> None:
    seen: list[Script] = []

    def answer(script: Script) -> str:
        seen.append(script)
        return "über 1 GB"

    with WSManServer(scheme, auth, answer=answer) as server:
        assert invoke(server, "Get-Volume # ß").output == ["über 1 GB"]
        assert (server.polls, server.shells) == (1, {})
    user = "certificate" if auth == "certificate" else "monitor"
    assert [(str(script), script.user, script.configuration_name) for script in seen] == [
        ("Get-Volume # ß", user, "Microsoft.PowerShell")
    ]


def test_the_endpoint_is_seen() -> None:
    with WSManServer("https", "basic", answer=lambda script: script.configuration_name) as server:
        assert invoke(server, configuration_name="Health.JEA").output == ["Health.JEA"]


def test_the_idle_time_is_seen() -> None:
    with WSManServer("https", "basic") as server, WSMan("127.0.0.1", **settings_for(server)) as wsman:
        with RunspacePool(wsman, idle_timeout=60):
            assert [shell.idle_timeout for shell in server.shells.values()] == ["PT60S"]
        assert server.shells == {}


@pytest.mark.parametrize(("scheme", "auth"), [way for way in WAYS if way[1] != "certificate"])
def test_a_wrong_password_is_refused(scheme: str, auth: str) -> None:
    with WSManServer(scheme, auth) as server:
        with pytest.raises(AuthenticationError):
            invoke(server, password="wrong")
        server.users["monitor"] = "another"
        with pytest.raises(AuthenticationError):
            invoke(server)
        assert invoke(server, password="another").output == [""]


def test_a_domain_account() -> None:
    users = {"EXAMPLE\\monitor": PASSWORD}
    with WSManServer("http", "ntlm", answer=lambda script: script.user, users=users) as server:
        assert invoke(server, username="EXAMPLE\\monitor").output == ["EXAMPLE\\monitor"]
        with pytest.raises(AuthenticationError):
            invoke(server, username="monitor")


def test_two_servers_keep_their_accounts_apart() -> None:
    with (
        WSManServer("http", "ntlm", users={"a": "one"}) as first,
        WSManServer("http", "ntlm", users={"b": "two"}) as second,
    ):
        for server, name, password in [(first, "a", "one"), (second, "b", "two")] * 3:
            assert invoke(server, username=name, password=password).output == [""]
        with pytest.raises(AuthenticationError):
            invoke(second, username="a", password="one")
    assert "NTLM_USER_FILE" not in os.environ


@pytest.mark.parametrize("auth", ["ntlm", "negotiate"])
def test_the_channel_binding_is_demanded(auth: str) -> None:
    with WSManServer("https", auth) as server:
        with pytest.raises(AuthenticationError):
            invoke(server, negotiate_send_cbt=False)
        server.channel_binding = False
        assert invoke(server, negotiate_send_cbt=False).output == [""]


@contextlib.contextmanager
def man_in_the_middle(server: WSManServer, mirror: WSManServer) -> Generator[int, None, None]:
    """Terminate TLS with the certificate of `mirror` and pass everything on to `server`; give the port."""

    def serve() -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            accepted = stack.enter_context(listener.accept()[0])
            accepted.settimeout(60)
            upstream = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            trusting = ssl.create_default_context(cafile=server.ca_file)
            trusting.maximum_version = ssl.TLSVersion.TLSv1_2  # no tickets that are readable yet no data
            client = stack.enter_context(mirror.tls.wrap_socket(accepted, server_side=True))
            target = stack.enter_context(trusting.wrap_socket(upstream, server_hostname="127.0.0.1"))
            other = {client: target, target: client}
            while not ended.is_set():
                for end in select.select([client, target], [], [], 0.05)[0]:
                    while octets := end.recv(65536):
                        other[end].sendall(octets)
                        if not end.pending():
                            break
                    else:
                        return

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        relay = threading.Thread(target=serve)
        relay.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            relay.join(90)
            assert not relay.is_alive()


@pytest.mark.parametrize("bound", [True, False])
def test_a_relayed_login_fails_only_through_the_channel_binding(bound: bool) -> None:
    with (
        WSManServer("https", "ntlm", channel_binding=bound) as server,
        WSManServer("https", "ntlm") as mirror,
        man_in_the_middle(server, mirror) as port,
    ):
        outcome = pytest.raises(AuthenticationError) if bound else contextlib.nullcontext()
        with outcome:
            invoke(server, port=port, cert_validation=mirror.ca_file)
        assert server.polls == (0 if bound else 1)


def test_plain_text_over_http_is_refused() -> None:
    with WSManServer("http", "ntlm") as server, pytest.raises(WSManFaultError, match="Unencrypted"):
        invoke(server, encryption="never")


def test_a_client_without_its_certificate_is_refused() -> None:
    with WSManServer("https", "certificate") as server, WSManServer("https", "certificate") as other:
        assert requests.post(server.url, verify=server.ca_file, timeout=5).status_code == 401
        with pytest.raises(requests.ConnectionError):
            invoke(
                server,
                certificate_pem=str(other.client.certificate_file),
                certificate_key_pem=str(other.client.key_file),
            )


def test_another_certificate_is_shown_after_rotation() -> None:
    with WSManServer("https", "basic") as server:
        trusted, before = server.ca_file, server.fingerprint
        server.rotate_certificate()
        assert server.fingerprint != before
        with pytest.raises(requests.exceptions.SSLError):
            invoke(server, cert_validation=trusted)
        assert invoke(server).output == [""]


def test_the_certificate_stands_the_strict_checks_of_newer_pythons() -> None:
    with WSManServer("https", "basic") as server:
        strict = ssl.create_default_context(cafile=server.ca_file)
        strict.verify_flags |= ssl.VERIFY_X509_STRICT
        plain = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        with strict.wrap_socket(plain, server_hostname="localhost") as secured:
            assert secured.getpeercert()


# --- answers


def test_errors_and_a_failure() -> None:
    answer = Answer(output=("part",), errors=("first", "last"), failed=True, error_id="Broken")
    with WSManServer("http", "ntlm", answer=answer) as server:
        shell = invoke(server)
    assert (shell.output, shell.had_errors, shell.state) == (["part"], True, PSInvocationState.FAILED)
    assert [(str(error), error.fq_error) for error in shell.streams.error] == [
        ("first", "Broken"),
        ("last", "Broken"),
    ]


def test_written_errors_are_no_failure() -> None:
    with WSManServer("http", "ntlm", answer=Answer(errors=("written",))) as server:
        shell = invoke(server)
    assert (shell.had_errors, [str(error) for error in shell.streams.error]) == (False, ["written"])


@pytest.mark.parametrize("size", [100, 113_000, 1_500_000])
def test_long_answers_and_long_scripts_come_whole(size: int) -> None:
    with WSManServer("http", "ntlm", answer=lambda script: script[::-1]) as server:
        script = "".join(itertools.islice(itertools.cycle("0123456789"), size))
        assert invoke(server, script).output == [script[::-1]]
        assert (server.requests["Send"] > 0) == (size > 500_000)


def test_a_delay_is_waited_for_with_operation_timeouts() -> None:
    with WSManServer("http", "ntlm", answer=Answer(output=("late",), delay=3)) as server:
        assert invoke(server, operation_timeout=1).output == ["late"]
        assert server.requests["Receive"] >= 2


def test_a_script_can_be_stopped() -> None:
    with (
        WSManServer("http", "ntlm", answer=Answer(delay=float("inf"))) as server,
        WSMan("127.0.0.1", **settings_for(server)) as wsman,
        RunspacePool(wsman) as pool,
        PowerShell(pool) as shell,
    ):
        shell.add_script("Start-Sleep 1000").begin_invoke()
        shell.poll_invoke(timeout=1)
        assert shell.state == PSInvocationState.RUNNING
        shell.stop()
        assert server.requests["Signal"] == 1


def test_the_quota_of_shells() -> None:
    with (
        WSManServer("http", "ntlm", shell_limit=1) as server,
        WSMan("127.0.0.1", **settings_for(server)) as wsman,
    ):
        with RunspacePool(wsman), pytest.raises(WSManFaultError) as caught:
            RunspacePool(wsman).open()
        assert caught.value.code == 2150859173
        assert invoke(server).output == [""]


# --- misbehaviour


@pytest.mark.long
@pytest.mark.windows
@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("accept", "tls", "auth", "Send")])
@pytest.mark.parametrize(
    ("kind", "code"), [("access denied", 5), ("quota", 2150859173), ("shell gone", 2150858843)]
)
def test_faults(step: str, kind: str, code: int) -> None:
    with WSManServer("http", "ntlm", misbehave={step: kind}) as server:
        with pytest.raises(WSManFaultError) as caught:
            invoke(server)
        assert caught.value.code == code
        server.misbehave.clear()
        server.shells.clear()
        assert invoke(server).output == [""]


def test_an_operation_timeout_once_is_asked_again() -> None:
    with WSManServer("http", "ntlm", misbehave={"Receive": "once operation timeout"}) as server:
        assert invoke(server).output == [""]
        assert server.requests["Receive"] == 2


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (401, AuthenticationError),
        (403, WinRMTransportError),
        (404, WinRMTransportError),
        (500, WinRMTransportError),
        (503, WinRMTransportError),
        ("not soap", SyntaxError),
        ("bad xml", SyntaxError),
        ("wrong reply", WinRMError),
        ("cut", requests.exceptions.ChunkedEncodingError),
        ("drop", requests.exceptions.ConnectionError),
    ],
)
def test_answers_that_are_none(kind: Misbehaviour, error: type[Exception]) -> None:
    with WSManServer("https", "basic", misbehave={"Create": kind}) as server:
        with pytest.raises(error):
            WSMan("127.0.0.1", **settings_for(server)).create(
                "http://example.com", ElementTree.Element("Shell")
            )
        assert server.requests["Create"] == 1


def test_a_stream_that_is_no_psrp() -> None:
    with WSManServer("https", "basic", misbehave={"Open": "garbage"}) as server, pytest.raises(FragmentError):
        invoke(server)


# --- the end


HANGS: list[tuple[str, str, str]] = [
    *(
        ("http", step, kind)
        for step in ("accept", "auth", "Create")
        for kind in ("silent", "drip", "endless")
    ),
    *(("http", step, "silent") for step in ("Open", "Command", "Receive", "Signal", "Delete")),
    *(("http", "Receive", kind) for kind in ("drip head", "continue")),
    *(("https", "tls", kind) for kind in ("silent", "drip", "endless")),
    *(("https", "Receive", kind) for kind in ("silent", "drip", "endless")),
]


@pytest.mark.long
@pytest.mark.windows
@pytest.mark.parametrize(("scheme", "step", "kind"), HANGS)
def test_leaving_ends_everything_while_a_client_hangs(scheme: str, step: str, kind: str) -> None:
    reached = threading.Event()

    class Watched(WSManServer):
        def take_misbehaviour(self, step: str) -> Misbehaviour | None:
            taken = super().take_misbehaviour(step)
            if taken is not None:
                reached.set()
            return taken

    def hang(server: WSManServer) -> None:
        with contextlib.suppress(Exception):  # whatever the hang ends in
            invoke(server, read_timeout=90, connection_timeout=90)

    with nothing_left_behind():
        with Watched(scheme, "ntlm", misbehave={step: kind}) as server:
            client = threading.Thread(target=hang, args=(server,))
            client.start()
            assert reached.wait(60)
            began = time.monotonic()
        assert time.monotonic() - began < 60  # the client would wait for 90
        client.join(60)
        gc.collect()  # requests leaves the sockets of failed sessions to it


def poll_once(shell: PowerShell) -> None:
    """Wait for a result until the connection ends."""
    with contextlib.suppress(Exception):  # whatever the end of the server looks like
        shell.poll_invoke(timeout=30)


def test_leaving_ends_idle_connections_and_waiting_scripts() -> None:
    with nothing_left_behind():
        with WSManServer("http", "ntlm", answer=Answer(delay=float("inf"))) as server:
            idle = socket.create_connection(("127.0.0.1", server.port), 30)
            wsman = WSMan("127.0.0.1", **settings_for(server))
            pool = RunspacePool(wsman)
            pool.open()
            shell = PowerShell(pool)
            shell.add_script("Start-Sleep 1000").begin_invoke()
            waiting = threading.Thread(target=poll_once, args=(shell,))
            waiting.start()
            wait_for(lambda: server.requests["Receive"] == 1)
        idle.close()
        waiting.join(60)
        wsman.close()
        del shell, pool, wsman
        gc.collect()
