"""Servers that receive alerts, with switches for what goes wrong with such servers.

Both keep whatever reaches them. ``mode`` may be changed at any time:

``up``         takes everything
``busy``       "not now": HTTP 429 with Retry-After, SMTP 451
``broken``     HTTP 500, SMTP 451 after the text
``refusing``   "never": HTTP 400, SMTP 554
``dying``      takes it, then closes the connection instead of saying so
``slow``       says nothing until the receiver ends
``dripping``   answers byte by byte, without end (HTTP)
``moved``      redirects to ``/elsewhere`` (HTTP)
``silent``     greets, and then says nothing until the receiver ends (SMTP)

and ``go_down`` and ``come_up`` close and open the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email
import email.message
import email.policy
import hashlib
import hmac
import ipaddress
import socket
import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword


@dataclass
class Request:
    """What was POSTed, and the status that it got; None if the connection was closed instead."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int | None


@dataclass
class HttpReceiver:
    """An HTTP server on a port of its own. Used with ``with``."""

    mode: str = "up"
    honours_keys: bool = False
    """Whether a request whose ``Idempotency-Key`` was taken before has no effect, though it gets its 200."""
    retry_after: str = "7"
    answer: bytes = b"ok"
    """Body of every answer; ``{request}`` in it is replaced by all that was received."""
    certificate: tuple[Path, Path] | None = None
    """Files of certificate and key: then it speaks TLS."""
    requests: list[Request] = field(default_factory=list)
    """Whatever came in, in order."""
    effects: list[Request] = field(default_factory=list)
    """What was taken: what people would have seen."""

    def __post_init__(self) -> None:
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._keys: set[str] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self.come_up()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self.go_down()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    def come_up(self) -> None:
        """Listen, on the same port as before."""
        if self._server is not None:
            return
        server = _QuietServer(("127.0.0.1", self.port), self._handler())
        if self.certificate is not None:
            server.socket = _server_context(self.certificate).wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = server.server_port
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def go_down(self) -> None:
        """Refuse connections from now on."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def keep(self, request: Request) -> None:
        """Record ``request``, and its effect if it has one."""
        with self._lock:
            self.requests.append(request)
            if self.mode not in ("up", "dying"):
                return
            key = request.headers.get("idempotency-key", "")
            if not (self.honours_keys and key in self._keys):
                self.effects.append(request)
            self._keys.add(key)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self
        statuses = {"busy": 429, "broken": 500, "refusing": 400, "moved": 302}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                headers = {name.lower(): value for name, value in self.headers.items()}
                mode = receiver.mode
                status = None if mode in ("dying", "slow", "dripping") else statuses.get(mode, 200)
                receiver.keep(Request(self.path, headers, body, status))
                self.close_connection = True
                if mode == "slow":
                    receiver._ending.wait()
                elif mode == "dripping":
                    self._drip()
                if status is not None:
                    self._say(status, f"{self.path} {headers} {body.decode('utf-8', 'replace')}")

            def _drip(self) -> None:
                self.wfile.write(b"HTTP/1.1 ")
                try:
                    while not receiver._ending.wait(0.02):
                        self.wfile.write(b"x")
                except OSError:
                    return

            def _say(self, status: int, request: str) -> None:
                answer = receiver.answer.replace(b"{request}", request.encode())
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", receiver.retry_after)
                if status == 302:
                    self.send_header("Location", f"{receiver.url}/elsewhere")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class HttpProxy:
    """A proxy that tunnels (CONNECT), and keeps where to and with what authorization. Used with ``with``."""

    def __init__(self, refuses_with: int | None = None) -> None:
        self.tunnels: list[tuple[str, str | None]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_CONNECT(self) -> None:
                proxy.tunnels.append((self.path, self.headers.get("Proxy-Authorization")))
                self.close_connection = True
                if refuses_with is not None:
                    self.send_error(refuses_with)
                    return
                host, port = self.path.rsplit(":", 1)
                with socket.create_connection((host, int(port))) as server:
                    self.send_response(200)
                    self.end_headers()
                    back = threading.Thread(target=_copy, args=(server, self.connection), daemon=True)
                    back.start()
                    _copy(self.connection, server)
                    back.join()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _QuietServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that go away are part of the game."""


@dataclass
class Mail:
    """An e-mail as it was taken."""

    sender: str
    recipients: list[str]
    raw: bytes
    user: str | None
    encrypted: bool

    @property
    def message(self) -> email.message.EmailMessage:
        """Parsed as a mail program would."""
        return email.message_from_bytes(self.raw, policy=email.policy.default)  # type: ignore[return-value]


@dataclass
class SmtpReceiver:
    """An SMTP server on a port of its own. Used with ``with``."""

    mode: str = "up"
    security: str = "none"
    """``none``, ``starttls`` (required) or ``tls``."""
    login: tuple[str, str] | None = None
    """User and password, which are then required."""
    certificate: tuple[Path, Path] | None = None
    refused_recipients: dict[str, str] = field(default_factory=dict)
    """Reply by address, e.g. ``550 no such user``."""
    auth_refusal: str = "535 5.7.8 no"
    """Reply to a wrong login; ``{password}`` in it is replaced by what was given."""
    mails: list[Mail] = field(default_factory=list)
    """What was taken."""
    attempts: int = 0
    """How often a text was sent, taken or not."""

    def __post_init__(self) -> None:
        self._controller: _Controller | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self.come_up()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_down()

    def come_up(self) -> None:
        """Listen, on the same port as before."""
        if self._controller is not None:
            return
        listening = socket.create_server(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        context = _server_context(self.certificate) if self.certificate else None
        options: dict[str, Any] = {}
        if self.security == "starttls":
            options = {"tls_context": context, "require_starttls": True}
        if self.login is not None:
            options |= {
                "authenticator": self._authenticate,
                "auth_required": True,
                "auth_require_tls": self.security == "starttls",
            }
        self._controller = _Controller(
            _Handler(self), listening, ssl_context=context if self.security == "tls" else None, **options
        )
        self._controller.start()

    def go_down(self) -> None:
        """Refuse connections from now on."""
        controller, self._controller = self._controller, None
        if controller is not None:
            controller.stop(no_assert=True)

    def _authenticate(self, server: SMTP, _session: Any, _envelope: Any, _way: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        given = (data.login.decode(), data.password.decode())
        if given == self.login:
            return AuthResult(success=True, auth_data=given[0])
        refusal = self.auth_refusal.replace("{password}", given[1])
        return AuthResult(success=False, handled=False, message=refusal)


class _Controller(Controller):
    """Listens on a socket that was opened before: a free port stays free no longer than it is looked for."""

    def __init__(self, handler: _Handler, listening: socket.socket, **options: Any) -> None:
        super().__init__(handler, hostname="127.0.0.1", port=listening.getsockname()[1], **options)
        self._listening = listening

    def _create_server(self) -> Any:
        return self.loop.create_server(self._factory_invoker, sock=self._listening, ssl=self.ssl_context)

    def factory(self) -> SMTP:
        return SMTP(self.handler, **self.SMTP_kwargs)


class _Handler:
    def __init__(self, receiver: SmtpReceiver) -> None:
        self._receiver = receiver

    async def handle_EHLO(
        self, server: SMTP, session: Any, _envelope: Any, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        if self._receiver.mode == "silent":
            await asyncio.Event().wait()
        return responses

    async def handle_RCPT(
        self, _server: SMTP, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        refusal = self._receiver.refused_recipients.get(address)
        if refusal is not None:
            return refusal
        if self._receiver.mode == "busy":
            return "451 4.7.1 not now"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Any, envelope: Any) -> str:
        receiver = self._receiver
        receiver.attempts += 1
        if receiver.mode == "broken":
            return "451 4.3.0 no space left"
        if receiver.mode == "refusing":
            return "554 5.7.1 not from you"
        if receiver.mode == "slow":
            await asyncio.Event().wait()
        user = session.auth_data if session.authenticated else None
        encrypted = session.ssl is not None or receiver.security == "tls"
        receiver.mails.append(
            Mail(envelope.mail_from, list(envelope.rcpt_tos), envelope.content, user, encrypted)
        )
        if receiver.mode == "dying":
            server.transport.abort()
        return "250 OK"


def _server_context(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def self_signed_certificate(folder: Path, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """Files of a certificate for ``host`` that only trusts itself, and of its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "receiver of tests")])
    try:
        names: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        names = x509.DNSName(host)
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = (folder / "certificate.pem", folder / "key.pem")
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


def is_signed(request: Request, secret: str, now: float, tolerance: float = 300) -> bool:
    """What a receiver of the webhook does: is the signature that of the body, and not an old one?"""
    given = dict(part.split("=", 1) for part in request.headers["x-signature"].split(","))
    digest = hmac.new(secret.encode(), given["t"].encode() + b"." + request.body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(digest, given["v1"]) and abs(now - int(given["t"])) <= tolerance
