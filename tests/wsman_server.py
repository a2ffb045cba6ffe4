"""A loopback WSMan/PSRP server: what a Windows host answers, as far as an unmodified pypsrp can tell.

It runs no PowerShell, unless `open_shell` gives it one (tests/pwsh.py). A script comes in over real sockets, TLS, NTLM
and encryption, and `answer` says what came of it. Each step of the conversation can be made to misbehave, before or
while the server runs.
Sections: certificates, answers, shells, messages, connections, the server.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import datetime
import functools
import gzip
import hashlib
import http.server
import io
import ipaddress
import os
import re
import socket
import socketserver
import ssl
import struct
import sys
import tempfile
import threading
import time
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from xml.sax.saxutils import escape

import spnego
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from psrpcore import CreatePipelineEvent, PSRPPayload, ServerPipeline, ServerRunspacePool, StreamType
from psrpcore.types import (
    ErrorCategoryInfo,
    ErrorRecord,
    HostMethodIdentifier,
    NETException,
    PipelineState,
    PSInvocationState,
)
from spnego.channel_bindings import GssChannelBindings
from typing_extensions import Self  # typing has it from Python 3.11 on
from urllib3.util.wait import wait_for_read

HOST = "127.0.0.1"
REQUEST_LIMIT = 4 * 1024 * 1024  # bytes of one request's body
DRIP_INTERVAL = 0.1  # seconds between two bytes; shorter than any read timeout a test would use
REQUEST_TIME = 30.0  # seconds without a byte inside a request or a handshake
WAITING_TURN = 0.1  # seconds
SHELL_LIMIT = 30  # shells per user, as on Windows

# === Certificates ============================================================


class Certificate(NamedTuple):
    """A self-signed certificate: the files for TLS and the SHA-256 of its DER form in hexadecimal digits."""

    certificate_file: Path
    key_file: Path
    fingerprint: str


def make_certificate(
    folder: Path, name: str, address: str = HOST, days: int = 1, *, hashed: bool = True, host: str = "localhost"
) -> Certificate:
    """Make a certificate for a name and an address that is its own authority; it ends in so many days. Without
    `hashed` its signature names no hash."""
    key: Any = ec.generate_private_key(ec.SECP256R1()) if hashed else ed25519.Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address(address))]
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=30))
    builder = builder.not_valid_after(now + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    )
    certificate = builder.sign(key, hashes.SHA256() if hashed else None)
    made = Certificate(
        folder / f"{name}.crt", folder / f"{name}.key", certificate.fingerprint(hashes.SHA256()).hex()
    )
    made.certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    made.key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return made


# === Answers =================================================================


class Script(str):
    """A script's text that also knows the account and the endpoint it was sent to."""

    user: str
    configuration_name: str


@dataclass(frozen=True)
class Answer:
    """What came of a script.

    `output` are the output objects (an endless iterator makes an endless script), `errors` the texts of its
    error records. With `failed` the last of them is the terminating error. `exit_code` is what `exit` tells the
    client. All comes after `delay` seconds.
    """

    output: Iterable[str] = ()
    errors: tuple[str, ...] = ()
    failed: bool = False
    delay: float = 0.0
    error_id: str = "RuntimeException"
    exit_code: object = None


class Fault(Exception):
    """A WSMan fault: the code and text that Windows sends with HTTP 500."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


FAULTS = {
    "access denied": Fault(5, "Access is denied."),
    "operation timeout": Fault(
        2150858793, "The WS-Management service cannot complete the operation within the time."
    ),
    "quota": Fault(2150859173, "The maximum number of concurrent shells for this user has been exceeded."),
    "shell gone": Fault(2150858843, "The request contained invalid selectors for the resource."),
    "unencrypted": Fault(
        2150858974, "Unencrypted traffic is currently disabled in the service configuration."
    ),
}

# Where a conversation can be made to misbehave. `Open` is the Receive that waits for the runspace.
STEPS = ("accept", "tls", "auth", "Create", "Open", "Command", "Send", "Receive", "Signal", "Delete")

# How: an HTTP status, a key of FAULTS, or one of these words.
#   silent        takes the request and never answers     cut           ends in the middle of the body
#   drip          a body that comes byte by byte          drop          closes without an answer
#   drip head     headers that come byte by byte          not soap      200 with a page of HTML
#   endless       a body without an end                   bad xml       200 with half an envelope
#   gzip          64 MiB in a small compressed body       wrong reply   an answer to another request
#   continue      100 Continue without an end             garbage       a stream that is no PSRP
# "once" in front (`once operation timeout`) means the first time only.
Misbehaviour = str | int

# === Shells ==================================================================


def stream_fragments(payload: PSRPPayload | None) -> Iterator[bytes]:
    """Cut a payload into its PSRP fragments: Windows sends each one in a stream element of its own."""
    left = payload.data if payload else b""
    while left:
        size = 21 + int.from_bytes(left[17:21], "big")
        yield left[:size]
        left = left[size:]


def error_record(text: str, error_id: str) -> ErrorRecord:
    """An error record as PowerShell would send it."""
    return ErrorRecord(
        Exception=NETException(Message=text), CategoryInfo=ErrorCategoryInfo(), FullyQualifiedErrorId=error_id
    )


class Pipeline:
    """One command of a shell: waits until it is complete, then hands out its answer piece by piece."""

    def __init__(self, pool: ServerRunspacePool, command_id: str) -> None:
        self.pool = pool
        self.server_side = ServerPipeline(pool, uuid.UUID(command_id))
        self.ready_at = float("inf")  # monotonic seconds; never, until the script is complete
        self.stopped = False
        self._pieces: Iterator[bytes] = iter(())

    def start(self, answer: Answer) -> None:
        """Give the pipeline its answer."""
        self.server_side.start()
        self.pool.data_to_send()  # Windows sends no Running state
        self._pieces = self._make_pieces(answer)
        self.ready_at = time.monotonic() + answer.delay

    def stop(self) -> None:
        """What Ctrl-C does: the result is there at once, and it is Stopped."""
        self.stopped = True
        self.ready_at = 0.0
        self._pieces = self._make_pieces(Answer())

    def next_batch(self, limit: int) -> tuple[list[bytes], bool]:
        """Give the fragments of one response, `limit` bytes at most, and whether these are the last."""
        batch: list[bytes] = []
        for piece in self._pieces:
            batch.extend(stream_fragments(PSRPPayload(piece, StreamType.default, None)))
            if sum(map(len, batch)) >= limit // 2:
                return batch, False
        return batch, True

    def _make_pieces(self, answer: Answer) -> Iterator[bytes]:
        state, last_error = PSInvocationState.Completed, None
        for text in answer.output:
            self.server_side.write_output(text)
            yield from self._drain()
        if answer.exit_code is not None:
            self.server_side.host_call(HostMethodIdentifier.SetShouldExit, [answer.exit_code])
        errors = [error_record(text, answer.error_id) for text in answer.errors]
        if answer.failed:
            state, last_error = PSInvocationState.Failed, errors.pop()
        if self.stopped:
            state, last_error = (
                PSInvocationState.Stopped,
                error_record("The pipeline has been stopped.", "Stopped"),
            )
        for error in errors:
            self.server_side.write_error(
                error.Exception, fully_qualified_error_id=error.FullyQualifiedErrorId
            )
        self.server_side.prepare_message(
            PipelineState(PipelineState=int(state), ExceptionAsErrorRecord=last_error)
        )
        yield from self._drain()

    def _drain(self) -> Iterator[bytes]:
        while payload := self.pool.data_to_send(CHUNK_SIZE // 2):
            yield payload.data


class Shell:
    """A runspace pool on the server. `changed` guards everything in it (psrpcore has no locks of its own)."""

    def __init__(self, owner: WSManServer, resource_uri: str, idle_timeout: str) -> None:
        self.id = ""
        self.owner = owner
        self.resource_uri = resource_uri
        self.configuration_name = resource_uri.rpartition("/")[2]
        self.idle_timeout = idle_timeout  # as sent, an XML duration such as PT60S
        self.changed = threading.Condition()
        self.pipelines: dict[str, Pipeline] = {}
        self._pool = ServerRunspacePool()
        self._opening: collections.deque[list[bytes]] = collections.deque()

    def create(self, fragments: bytes) -> None:
        """Take the client's SESSION_CAPABILITY and INIT_RUNSPACEPOOL; the answers wait for its Receives."""
        self._pool.receive_data(PSRPPayload(fragments, StreamType.default, None))
        sent: list[bytes] = []
        while self._pool.next_event():
            sent.extend(stream_fragments(self._pool.data_to_send()))
        self._opening.extend((sent[:-1], sent[-1:]))

    def send(self, user: str, command_id: str, fragments: bytes) -> None:
        """Take a part of a command; what is complete gets its answer."""
        with self.changed:
            for event in self._receive_fragments(command_id, fragments):
                commands = event.pipeline.commands  # a script is what Invoke-Expression is given
                given = [value for command in commands for name, value in command.parameters if not name]
                script = Script("; ".join(map(str, given or commands)))
                script.user, script.configuration_name = user, self.configuration_name
                self.pipelines[command_id].start(self.owner.answer_to(script))
            self.changed.notify_all()

    def receive(self, command_id: str, ends: float) -> tuple[list[bytes], bool]:
        """Give what the shell (no id) or a command has to say until a moment, and whether that is all."""
        with self.changed:
            if not command_id:
                return (self._opening.popleft() if self._opening else []), False
            pipeline = self.pipelines.get(command_id)
            if not pipeline:
                raise FAULTS["shell gone"]
            while (now := time.monotonic()) < pipeline.ready_at:
                self.may_wait(now, ends)
                self.changed.wait(min(ends, pipeline.ready_at) - now)
            return pipeline.next_batch(CHUNK_SIZE)

    def may_wait(self, now: float, ends: float) -> None:
        """Raise what a client hears that has waited long enough, or whose server ends."""
        if self.owner.closing.is_set():
            raise Hangup
        if now >= ends:
            raise FAULTS["operation timeout"]

    def signal(self, command_id: str, terminate: bool) -> None:
        """Stop a command, or forget it."""
        with self.changed:
            if terminate:
                self.pipelines.pop(command_id, None)
            elif command_id in self.pipelines:
                self.pipelines[command_id].stop()
            self.changed.notify_all()

    def close(self) -> None:
        """Wake whoever waits for it."""
        with self.changed:
            self.changed.notify_all()

    def _receive_fragments(self, command_id: str, fragments: bytes) -> list[CreatePipelineEvent]:
        if command_id not in self.pipelines:
            self.pipelines[command_id] = Pipeline(
                self._pool, command_id
            )  # psrpcore wants it before its event
        self._pool.receive_data(PSRPPayload(fragments, StreamType.default, uuid.UUID(command_id)))
        events = iter(self._pool.next_event, None)
        return [event for event in events if isinstance(event, CreatePipelineEvent)]


# === Messages ================================================================

NAMESPACES = {
    "s": "http://www.w3.org/2003/05/soap-envelope",
    "a": "http://schemas.xmlsoap.org/ws/2004/08/addressing",
    "w": "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd",
    "x": "http://schemas.xmlsoap.org/ws/2004/09/transfer",
    "rsp": "http://schemas.microsoft.com/wbem/wsman/1/windows/shell",
    "p": "http://schemas.microsoft.com/powershell",
    "f": "http://schemas.microsoft.com/wbem/wsman/1/wsmanfault",
}
DECLARATIONS = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items())
CHUNK_SIZE = (
    (153600 - 2048) // 4 * 3
)  # bytes of PSRP that fit into the smallest MaxEnvelopeSize once in base64
SOAP = "application/soap+xml;charset=UTF-8"
CERTIFICATE_SCHEME = "http://schemas.dmtf.org/wbem/wsman/1/wsman/secprofile/https/mutual"
PAGE = "<html><head><title>{0}</title></head><body><h1>{0}</h1><hr>proxy.example.com</body></html>"


class Hangup(Exception):
    """The connection is to be closed without another word."""


class Reply(Exception):
    """The request gets this response and no other: status, body, content type, more headers."""

    def __init__(self, status: int, body: bytes = b"", content_type: str = "", **headers: str) -> None:
        self.parts = (status, body, content_type, headers)


class Message:
    """A request's envelope."""

    def __init__(self, xml: bytes) -> None:
        self.root = ElementTree.fromstring(xml)
        self.uri = self.text("s:Header/a:Action")
        self.action = self.uri.rpartition("/")[2]
        self.message_id = self.text("s:Header/a:MessageID")
        self.resource_uri = self.text("s:Header/w:ResourceURI")

    def text(self, path: str) -> str:
        """Give the text of an element, empty without one."""
        return self.root.findtext(path, "", NAMESPACES) or ""

    def attribute(self, path: str, name: str) -> str:
        """Give an attribute of an element, empty without one."""
        element = self.root.find(path, NAMESPACES)
        return "" if element is None else element.get(name, "")

    @property
    def step(self) -> str:
        """Name the step of the conversation (STEPS) that this is."""
        return "Open" if self.action == "Receive" and not self.receiving_command else self.action

    @property
    def receiving_command(self) -> str:
        return self.attribute("s:Body/rsp:Receive/rsp:DesiredStream", "CommandId")

    @property
    def operation_timeout(self) -> float:
        seconds = re.fullmatch(r"PT([\d.]+)S", self.text("s:Header/w:OperationTimeout"))
        return float(seconds[1]) if seconds else 60.0

    @property
    def shell_id(self) -> str:
        return self.text("s:Header/w:SelectorSet/w:Selector[@Name='ShellId']").upper()


def envelope(message: Message | None, body: str) -> bytes:
    """Write an answer's envelope; without a message it answers another request than the client's."""
    action, relates_to = (message.uri, message.message_id) if message else ("", f"uuid:{uuid.uuid4()}")
    header = (
        f"<a:Action>{action}Response</a:Action><a:MessageID>uuid:{uuid.uuid4()}</a:MessageID>"
        f"<a:To>{NAMESPACES['a']}/role/anonymous</a:To><a:RelatesTo>{escape(relates_to)}</a:RelatesTo>"
    )
    parts = f"<s:Header>{header}</s:Header><s:Body>{body}</s:Body>"
    return f"<s:Envelope {DECLARATIONS}>{parts}</s:Envelope>".encode()


def fault_body(fault: Fault) -> str:
    """Write a fault as WinRM does."""
    text = escape(str(fault))
    return (
        "<s:Fault><s:Code><s:Value>s:Receiver</s:Value>"
        "<s:Subcode><s:Value>w:InternalError</s:Value></s:Subcode></s:Code>"
        f'<s:Reason><s:Text xml:lang="en-US">{text}</s:Text></s:Reason><s:Detail>'
        f'<f:WSManFault Code="{fault.code}" Machine="localhost"><f:Message>{text}</f:Message></f:WSManFault>'
        "</s:Detail></s:Fault>"
    )


def receive_body(fragments: list[bytes], command_id: str, done: bool) -> str:
    """Write the answer to a Receive: a stream element per fragment, and the state of a finished command."""
    owner = f' CommandId="{command_id}"' if command_id else ""
    streams = "".join(
        f'<rsp:Stream Name="stdout"{owner}>{base64.b64encode(fragment).decode()}</rsp:Stream>'
        for fragment in fragments
    )
    state = f'<rsp:CommandState{owner} State="{NAMESPACES["rsp"]}/CommandState/Done"/>' if done else ""
    return f"<rsp:ReceiveResponse>{streams}{state}</rsp:ReceiveResponse>"


def is_bound(token: bytes, bindings: GssChannelBindings) -> bool:
    """Look for the channel binding in an NTLM AUTHENTICATE message, where the client's response covers it.

    spnego's acceptor alone would also take sixteen zero bytes, which is a client that binds to nothing.
    """
    digest = hashlib.md5(bindings.pack()).digest()
    return struct.pack("<HH", 10, len(digest)) + digest in token


class SecuredConnection(http.server.BaseHTTPRequestHandler):
    """One TCP connection with what belongs to it: who logged in, and the keys of its message encryption."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # a response leaves in one piece
    disable_nagle_algorithm = True
    server: Listener

    def setup(self) -> None:
        self.owner = self.server.owner
        self.timeout = self.owner.request_time
        super().setup()
        self.certificate = self.owner.certificate
        self.user = ""
        self.token: bytes | None = None  # the last leg's token, for the next response
        self.sealed = False
        self.context: Any = None  # spnego's, of this connection

    def log_message(self, format: str, *args: object) -> None:
        """Tests do not want a log of requests."""

    def handle(self) -> None:
        """Answer requests until the connection ends."""
        self.close_connection = False
        with contextlib.suppress(Hangup):
            while not self.close_connection:
                wait_for_client(self.owner, self.connection)
                self.handle_one_request()

    def _authenticate(self) -> None:
        """Look at the request's credentials; raise the 401 where they do not do."""
        scheme, _, credential = self.headers.get("Authorization", "").partition(" ")
        if self.owner.auth == "basic":
            self.user = self._check_basic(scheme, credential)
        elif self.owner.auth == "certificate":
            self.user = "certificate" if scheme == CERTIFICATE_SCHEME and self._peer_certificate() else ""
        elif scheme.lower() == ("credssp" if self.owner.auth == "credssp" else "negotiate"):
            self._step(base64.b64decode(credential))
        if not self.user:
            raise self._unauthorized()

    def _check_basic(self, scheme: str, credential: str) -> str:
        user, _, password = base64.b64decode(credential).decode().partition(":")
        return user if scheme == "Basic" and user and self.owner.users.get(user) == password else ""

    def _peer_certificate(self) -> bytes | None:
        if not isinstance(self.connection, ssl.SSLSocket):
            return None
        if self.owner.tls.post_handshake_auth and self.connection.getpeercert(True) is None:
            with contextlib.suppress(ssl.SSLError):  # the client said that it would show none
                self.connection.verify_client_post_handshake()
                self._read_certificate(self.connection)
        return self.connection.getpeercert(True)

    def _read_certificate(self, connection: ssl.SSLSocket) -> None:
        """As IIS does: asks once it has the request, and answers that when it has the certificate."""
        connection.do_handshake()
        connection.settimeout(0.1)
        while not self.owner.closing.is_set() and connection.getpeercert(True) is None:
            with contextlib.suppress(TimeoutError, ssl.SSLWantReadError):
                connection.recv(1)
        connection.settimeout(None)

    def _step(self, token: bytes) -> None:
        bindings = self._bindings()
        if self.context is None or self.context.complete:
            self.context, self.user = self.owner.new_context(bindings), ""
        try:
            with ACCOUNTS.holding(self.owner.users):
                answer = self.context.step(token)
            if self.context.complete and bindings and not is_bound(token, bindings):
                raise ValueError("no channel binding")
        except Exception as exc:  # whatever a bad token does to spnego, the client hears 401
            self.context = None
            raise self._unauthorized() from exc
        if not self.context.complete:
            raise self._unauthorized(answer)
        self.user, self.token = self.context.client_principal or "", answer

    def _bindings(self) -> GssChannelBindings | None:
        if not (self.owner.scheme == "https" and self.owner.channel_binding) or self.owner.auth == "credssp":
            return None  # CredSSP has TLS of its own, whose key it binds to
        digest = bytes.fromhex(self.certificate.fingerprint)
        return GssChannelBindings(application_data=b"tls-server-end-point:" + digest)

    def _unauthorized(self, token: bytes | None = None) -> Reply:
        schemes = {"basic": "Basic", "certificate": CERTIFICATE_SCHEME, "credssp": "CredSSP"}
        scheme = schemes.get(self.owner.auth, "Negotiate")
        challenge = f"{scheme} {base64.b64encode(token or b'').decode()}".strip()
        return Reply(401, WWW_Authenticate=challenge)

    def _unseal(self, body: bytes) -> bytes:
        self.sealed = self.headers.get("Content-Type", "").startswith("multipart/encrypted")
        if not self.sealed and self.owner.scheme == "http":
            raise FAULTS["unencrypted"]
        if not self.sealed:
            return body
        payload = body.partition(b"application/octet-stream\r\n")[2].rpartition(b"--Encrypted Boundary--")[0]
        (size,) = struct.unpack("<i", payload[:4])
        try:
            return bytes(self.context.unwrap_winrm(payload[4 : 4 + size], payload[4 + size :]))
        except Exception as exc:  # sealed for another context, or by nobody who logged in
            raise self._unauthorized() from exc

    def _seal(self, xml: bytes) -> tuple[bytes, str]:
        protocol = "application/HTTP-SPNEGO-session-encrypted"
        signature, data, padding = self.context.wrap_winrm(xml)
        head = (
            f"--Encrypted Boundary\r\n\tContent-Type: {protocol}\r\n\tOriginalContent: "
            f"type=application/soap+xml;charset=UTF-8;Length={len(xml) + padding}\r\n"
            "--Encrypted Boundary\r\n\tContent-Type: application/octet-stream\r\n"
        ).encode()
        body = head + struct.pack("<i", len(signature)) + signature + data + b"--Encrypted Boundary--\r\n"
        return body, f'multipart/encrypted;protocol="{protocol}";boundary="Encrypted Boundary"'

    def _reply_soap(self, status: int, message: Message | None, body: str) -> None:
        xml = self.owner.spoil(envelope(message, body))
        payload, content_type = self._seal(xml) if self.sealed else (xml, SOAP)
        self._reply(status, payload, content_type, {})

    def _reply(self, status: int, body: bytes, content_type: str, headers: dict[str, str]) -> None:
        sent, self.wfile = self.wfile, io.BytesIO()
        self.send_response(status)
        if self.token:
            headers["WWW_Authenticate"] = f"Negotiate {base64.b64encode(self.token).decode()}"
        if content_type:
            headers["Content_Type"] = content_type
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        response, self.wfile, self.token = self.wfile.getvalue(), sent, None
        spoiled = self.owner.spoil(response)
        self.close_connection |= spoiled != response  # or the client would wait for what is missing
        self.wfile.write(spoiled)


# Misbehaviour as bytes: what comes first, what comes again and again after it, and the seconds between.
SOAP_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/soap+xml\r\n"
TLS_HEAD = (
    b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"  # a handshake record of 16 KiB: the client waits for the rest
)
BYTE_STREAMS = {
    "drop": (b"", b"", 0),
    "cut": (SOAP_HEAD + b"Content-Length: 5000\r\n\r\n<s:Envelope", b"", 0),
    "drip": (SOAP_HEAD + b"Content-Length: 1000000\r\n\r\n", b" ", DRIP_INTERVAL),
    "drip head": (SOAP_HEAD + b"X: ", b"x", DRIP_INTERVAL),
    "endless": (SOAP_HEAD + b"\r\n", b"<!-- endless -->" * 4096, 0),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2500, 0),
}
EARLY_BYTE_STREAMS = {
    **BYTE_STREAMS,
    "drip": (TLS_HEAD, b"\x00", DRIP_INTERVAL),
}  # where there is no HTTP yet


@functools.cache
def bomb() -> bytes:
    """64 MiB, compressed; making it takes a while."""
    return gzip.compress(bytes(64 << 20), 1)


def send_stream(server: WSManServer, connection: socket.socket, stream: tuple[bytes, bytes, float]) -> None:
    """Send a byte stream until the client or the server closes the connection."""
    head, block, pause = stream
    connection.sendall(head)
    while block and not server.closing.wait(pause):
        connection.sendall(block)


def wait_for_client(server: WSManServer, connection: socket.socket) -> None:
    """Wait until there is something to read, in short turns: under wine nothing wakes a thread in recv."""
    while not wait_for_read(connection, WAITING_TURN):
        if server.closing.is_set():
            raise Hangup


def stay_silent(server: WSManServer, connection: socket.socket) -> None:
    """Take what comes and say nothing until the client or the server closes the connection."""
    wait_for_client(server, connection)
    while connection.recv(65536):
        wait_for_client(server, connection)


class Connection(SecuredConnection):
    """Answers the messages of a connection, or misbehaves."""

    def do_POST(self) -> None:
        """Answer one request, or misbehave."""
        body = self.rfile.read(min(int(self.headers.get("Content-Length") or 0), REQUEST_LIMIT))
        message = None
        try:
            if not self.user or "Authorization" in self.headers:
                self._misbehave("auth", None)
                self._authenticate()
            if not body:
                raise Reply(200, b"", "")
            message = Message(self._unseal(body))
            self.owner.count(message.step)
            self._misbehave(message.step, message)
            self._reply_soap(200, message, getattr(self, f"_on_{message.action.lower()}")(message))
        except Fault as fault:
            self._reply_soap(500, message, fault_body(fault))
        except Reply as reply:
            self._reply(*reply.parts)

    def _on_create(self, message: Message) -> str:
        shell = self.owner.open_shell(
            self.owner, message.resource_uri, message.text("s:Body/rsp:Shell/rsp:IdleTimeOut")
        )
        shell.id = message.attribute("s:Body/rsp:Shell", "ShellId").upper()
        shell.create(base64.b64decode(message.text("s:Body/rsp:Shell/p:creationXml")))
        self.owner.add_shell(shell)
        return (
            "<x:ResourceCreated><a:ReferenceParameters>"
            f"<w:ResourceURI>{escape(shell.resource_uri)}</w:ResourceURI>"
            f'<w:SelectorSet><w:Selector Name="ShellId">{shell.id}</w:Selector></w:SelectorSet>'
            "</a:ReferenceParameters></x:ResourceCreated>"
            f"<rsp:Shell><rsp:ShellId>{shell.id}</rsp:ShellId></rsp:Shell>"
        )

    def _on_get(self, message: Message) -> str:
        shell = self.owner.find_shell(message)
        return f"<rsp:Shell><rsp:ShellId>{shell.id}</rsp:ShellId><rsp:State>Connected</rsp:State></rsp:Shell>"

    def _on_command(self, message: Message) -> str:
        command_id = message.attribute("s:Body/rsp:CommandLine", "CommandId").upper()
        self._take_fragments(message, command_id, message.text("s:Body/rsp:CommandLine/rsp:Arguments"))
        return f"<rsp:CommandResponse><rsp:CommandId>{command_id}</rsp:CommandId></rsp:CommandResponse>"

    def _on_send(self, message: Message) -> str:
        path = "s:Body/rsp:Send/rsp:Stream"
        self._take_fragments(message, message.attribute(path, "CommandId").upper(), message.text(path))
        return "<rsp:SendResponse/>"

    def _take_fragments(self, message: Message, command_id: str, fragments: str) -> None:
        self.owner.find_shell(message).send(self.user, command_id, base64.b64decode(fragments))

    def _on_receive(self, message: Message) -> str:
        shell, command_id = self.owner.find_shell(message), message.receiving_command
        fragments, done = shell.receive(command_id, time.monotonic() + message.operation_timeout)
        return receive_body([*map(self.owner.spoil, fragments)], command_id, done)

    def _on_signal(self, message: Message) -> str:
        command_id = message.attribute("s:Body/rsp:Signal", "CommandId").upper()
        code = message.text("s:Body/rsp:Signal/rsp:Code")
        self.owner.find_shell(message).signal(command_id, code.endswith("Terminate"))
        return "<rsp:SignalResponse/>"

    def _on_delete(self, message: Message) -> str:
        self.owner.remove_shell(message).close()
        return ""

    # --- misbehaviour

    def _misbehave(self, step: str, message: Message | None) -> None:
        """Raise what is asked for at this step instead of the answer; return when nothing is."""
        kind = self.owner.take_misbehaviour(step)
        if kind is None:
            return
        if kind in FAULTS:
            raise FAULTS[str(kind)]
        if kind in BYTE_STREAMS:
            send_stream(self.owner, self.connection, BYTE_STREAMS[str(kind)])
        elif kind == "silent":
            stay_silent(self.owner, self.connection)
        else:
            raise self._status_reply(kind) if isinstance(kind, int) else self._body_reply(kind, message)
        raise Hangup

    def _status_reply(self, status: int) -> Reply:
        if status == 401:
            return self._unauthorized()
        location = {"Location": f"{self.owner.url}/elsewhere"} if 300 <= status < 400 else {}
        return Reply(status, PAGE.format(status).encode(), "text/html", **location)

    def _body_reply(self, kind: str, message: Message | None) -> Reply:
        garbage = receive_body([b"no PSRP at all, but long enough"], "", False)
        if kind == "gzip":
            return Reply(200, bomb(), SOAP, Content_Encoding="gzip")
        bodies = {
            "not soap": PAGE.format("Welcome").encode(),
            "bad xml": envelope(message, "")[:-20],
            "wrong reply": envelope(None, ""),
            "garbage": envelope(message, garbage),
        }
        return Reply(200, bodies[kind], "text/html" if kind == "not soap" else SOAP)


# === The server ==============================================================


class Listener(socketserver.ThreadingTCPServer):
    """The listening socket, a thread per connection, and the open connections (under `sockets_lock`)."""

    request_queue_size = 128
    daemon_threads = False  # so that closing waits for every thread

    def __init__(self, owner: WSManServer) -> None:
        self.owner = owner
        self.sockets_lock = threading.Lock()
        self.sockets: set[socket.socket] = set()
        super().__init__((HOST, 0), Connection)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Do the TLS handshake in the connection's own thread, then speak HTTP."""
        connection: socket.socket = request
        try:
            connection.settimeout(self.owner.request_time)
            self._keep(connection, connection)
            self._misbehave_early("accept", connection)
            if self.owner.scheme == "https":
                self._misbehave_early("tls", connection)
                secured = self.owner.tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
                self._keep(secured, connection)
                connection = secured
                wait_for_client(self.owner, secured)
                secured.do_handshake()
            Connection(connection, client_address, self)
        except Hangup:
            pass
        except ssl.SSLError:  # closing with something unread would take the alert back
            socket.socket.shutdown(connection, socket.SHUT_WR)
            while socket.socket.recv(connection, 65536):
                pass
        finally:
            self._forget(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up or refuses the certificate is no error of the server."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def close_connections(self) -> None:
        """Wake every thread that waits for its client."""
        with self.sockets_lock:
            for connection in self.sockets:
                with contextlib.suppress(OSError):  # a TLS socket's own would take its state from under its thread
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def _misbehave_early(self, step: str, connection: socket.socket) -> None:
        kind = self.owner.take_misbehaviour(step)
        if kind is None:
            return
        if kind == "silent":
            stay_silent(self.owner, connection)
        else:
            send_stream(self.owner, connection, EARLY_BYTE_STREAMS[str(kind)])
        raise Hangup

    def _keep(self, connection: socket.socket, instead_of: socket.socket) -> None:
        with self.sockets_lock:
            self.sockets.discard(instead_of)
            self.sockets.add(connection)
        if self.owner.closing.is_set():
            raise Hangup

    def _forget(self, connection: socket.socket) -> None:
        with self.sockets_lock:
            self.sockets.discard(connection)
        connection.close()


class AccountFile:
    """Where spnego finds the accounts: a file that an environment variable names, one for the whole process.

    The variable stays while any server runs, for a client that reads the environment in another thread would
    stumble over one that goes. What the file holds belongs to one server for one step of one login.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below, the file and the variable
        self._servers = 0
        self._path = Path()
        self._before: str | None = None

    def begin(self) -> None:
        """For a server that starts."""
        with self._lock:
            self._servers += 1
            if self._servers == 1:
                handle, path = tempfile.mkstemp(prefix="wsman-users-")
                os.close(handle)
                self._path, self._before = Path(path), os.environ.get("NTLM_USER_FILE")
                os.environ["NTLM_USER_FILE"] = path

    def end(self) -> None:
        """For a server that ended."""
        with self._lock:
            self._servers -= 1
            if self._servers == 0:
                self._path.unlink()
                del os.environ["NTLM_USER_FILE"]
                if self._before is not None:
                    os.environ["NTLM_USER_FILE"] = self._before

    @contextlib.contextmanager
    def holding(self, users: dict[str, str]) -> Generator[None, None, None]:
        """Lets spnego find `users` (name to password) inside the block."""
        lines = [":".join((*name.rpartition("\\")[::2], secret)) for name, secret in users.items()]
        with self._lock:
            self._path.write_text("\n".join(lines), encoding="utf-8")
            yield


ACCOUNTS = AccountFile()


@dataclass
class WSManServer:
    """The server as a context manager; leaving it ends every thread and closes every socket.

    `scheme` is http or https; `auth` is ntlm, negotiate, basic, certificate or, with https, credssp. `users` (name to
    password, the name with a domain as DOMAIN\\name) and `misbehave` (step to Misbehaviour) may be changed any time.
    """

    scheme: str = "https"
    auth: str = "negotiate"
    answer: Callable[[Script], Answer | str] | Answer | str = ""
    misbehave: dict[str, Misbehaviour] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=lambda: {"monitor": "correct horse"})
    channel_binding: bool = True
    shell_limit: int = SHELL_LIMIT
    open_shell: Callable[[WSManServer, str, str], Shell] = Shell  # of a server, a resource URI and an idle time
    request_time: float = REQUEST_TIME
    spoil: Callable[[bytes], bytes] = bytes  # what becomes of a fragment, of the envelope around it, of a response

    def __post_init__(self) -> None:
        self.polls = 0  # scripts answered
        self.requests: collections.Counter[str] = collections.Counter()  # by step
        self.shells: dict[str, Shell] = {}
        self.closing = threading.Event()
        self._lock = threading.Lock()  # guards polls, requests, shells and misbehave

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="wsman-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self._serial = 0
        self.client = make_certificate(self.folder, "client")
        self.rotate_certificate()
        self._listener = Listener(self)
        ACCOUNTS.begin()
        self.port = int(self._listener.server_address[1])
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(0.05,), name="wsman-server"
        )
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._listener.shutdown()
        self._thread.join(60)
        self._listener.close_connections()
        for shell in list(self.shells.values()):
            shell.close()
        self._listener.server_close()
        ACCOUNTS.end()
        self._folder.cleanup()

    @property
    def url(self) -> str:
        """The address, without the path that WSMan adds."""
        return f"{self.scheme}://{HOST}:{self.port}"

    @property
    def ca_file(self) -> str:
        """The file that verifies the server's certificate."""
        return str(self.certificate.certificate_file)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the server's certificate, 64 hexadecimal digits."""
        return self.certificate.fingerprint

    def rotate_certificate(self, address: str = HOST, days: int = 1, *, hashed: bool = True) -> None:
        """Show new connections another certificate, for an address and so many days."""
        self._serial += 1
        self.certificate = make_certificate(self.folder, f"server-{self._serial}", address, days, hashed=hashed)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.certificate.certificate_file, self.certificate.key_file)
        if self.auth == "certificate":
            tls.verify_mode = ssl.CERT_OPTIONAL  # as WinRM: without one, the answer is 401
            tls.load_verify_locations(self.client.certificate_file)
        self.tls = tls

    def end_connections(self) -> None:
        """What WinRM does to a client that is idle for two minutes; shells stay."""
        self._listener.close_connections()

    def count(self, step: str) -> None:
        """Count a request."""
        with self._lock:
            self.requests[step] += 1

    def take_misbehaviour(self, step: str) -> Misbehaviour | None:
        """Give what to do wrong at a step; what is for `once` is gone then."""
        with self._lock:
            kind = self.misbehave.get(step)
            if isinstance(kind, str) and kind.startswith("once "):
                del self.misbehave[step]
                kind = kind[len("once ") :]
                return int(kind) if kind.isdecimal() else kind
            return kind

    def answer_to(self, script: Script) -> Answer:
        """Ask `answer`."""
        with self._lock:
            self.polls += 1
        given = self.answer(script) if callable(self.answer) else self.answer
        return Answer(output=(given,)) if isinstance(given, str) else given

    def add_shell(self, shell: Shell) -> None:
        """Open a shell, unless the user has too many."""
        with self._lock:
            if len(self.shells) >= self.shell_limit:
                raise FAULTS["quota"]
            self.shells[shell.id] = shell

    def find_shell(self, message: Message) -> Shell:
        """Give the shell that a message is for."""
        with self._lock:
            return self.shells.get(message.shell_id) or _raise(FAULTS["shell gone"])

    def remove_shell(self, message: Message) -> Shell:
        """Take out the shell that a message is for."""
        with self._lock:
            return self.shells.pop(message.shell_id, None) or _raise(FAULTS["shell gone"])

    def new_context(self, bindings: GssChannelBindings | None) -> Any:
        """Make a connection's side of NTLM, in Python on every system: SSPI knows nothing of `users`."""
        with ACCOUNTS.holding(self.users):
            return spnego.server(
                protocol=self.auth,
                channel_bindings=bindings,
                options=spnego.NegotiateOptions.use_ntlm
                if self.auth == "ntlm"
                else spnego.NegotiateOptions.use_negotiate,
            )


def _raise(fault: Fault) -> NoReturn:
    raise fault
