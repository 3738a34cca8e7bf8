"""Handing something to somebody else's server: in time, or not at all, and with no secret in the error.

HTTP and SMTP as messages to people need them; what a message says is decided in
:mod:`resources.channels`. ``http.client`` rather than httpx, because httpx logs the address of every
request, and the address of a Slack webhook is a secret.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import http.client
import os
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from email.message import EmailMessage
from http import HTTPStatus
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr
from typing_extensions import override

Security = Literal["starttls", "tls", "none"]

_SECONDS_TO_CONNECT = 10.0
_SECONDS_TO_LET_GO = 0.5
"""Within which an attempt ends whose sockets were shut; only a name server may hold it for longer."""
_MAX_BODY = 65_536
"""Bytes of an answer that are read: enough for any reason that it may give."""
_TEMPORARY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
_FOR_ANOTHER_HOST = (62, 63, 64)
"""X509_V_ERR_{HOSTNAME,EMAIL,IP_ADDRESS}_MISMATCH: OpenSSL's words for these hold the host."""


class TransportError(Exception):
    """It was not taken, or nobody knows whether it was. Names no address."""

    def __init__(self, line: str, *, permanent: bool = False, retry_after: float | None = None) -> None:
        super().__init__(line)
        self.permanent = permanent
        self.retry_after = retry_after


class Deadline:
    """The time by which an attempt must have ended, and the power to end it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._at = time.monotonic() + seconds
        self._was_ended = False
        self._lock = threading.Lock()
        self._handles: list[socket.socket] = []

    def left(self) -> float:
        """Seconds that are left.

        Raises:
            TransportError: none are.
        """
        left = self._at - time.monotonic()
        if self.is_over:
            raise self.error()
        return left

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection that is shut at the deadline, whatever is going on over it."""
        opened = socket.create_connection((host, port), timeout=min(self.left(), _SECONDS_TO_CONNECT))
        with self._lock:
            if self.is_over:
                opened.close()
                raise self.error()
            # Its own handle: the one that is given away changes hands when TLS begins.
            self._handles.append(opened.dup())
        opened.settimeout(self.left())
        return opened

    def end(self) -> None:
        """Shut every connection; no new one is made."""
        with self._lock:
            self._was_ended = True
            for handle in self._handles:
                with contextlib.suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the connections; for who made them, at the end."""
        with self._lock:
            for handle in self._handles:
                handle.close()
            self._handles.clear()

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self._was_ended or time.monotonic() >= self._at

    def error(self) -> TransportError:
        """What to raise when it is over."""
        return TransportError(f"gave no answer within {self.seconds:.3g} s")


def within(seconds: float, attempt: Callable[[Deadline], None]) -> None:
    """Do ``attempt`` in at most about ``seconds``.

    It runs in a thread of its own, because a server that answers byte by byte, or a name server that does
    not answer, keeps any timeout of a single socket operation from ever being reached.

    Raises:
        TransportError: it failed, or did not end in time. Neither its text nor what hangs on it
            (context, frames) knows what ``attempt`` knew.
    """
    deadline = Deadline(seconds)
    failures: list[TransportError] = []

    def work() -> None:
        try:
            attempt(deadline)
        except Exception as error:  # whatever it is, its text may hold a secret
            failures.append(deadline.error() if deadline.is_over else _explained(error, deadline))
        finally:
            deadline.close()

    worker = threading.Thread(target=work, name="alert delivery", daemon=True)
    worker.start()
    worker.join(seconds)
    if worker.is_alive():
        deadline.end()
        worker.join(_SECONDS_TO_LET_GO)
        if worker.is_alive():
            raise deadline.error()
    if failures:
        raise failures[0]


def _explained(error: Exception, deadline: Deadline) -> TransportError:  # noqa: PLR0911 (one line each)
    """``error`` in words that are ours: those of libraries and servers hold addresses."""
    match error:
        case TransportError():
            return TransportError(str(error), permanent=error.permanent, retry_after=error.retry_after)
        case ssl.SSLCertVerificationError():
            is_for_another = error.verify_code in _FOR_ANOTHER_HOST
            reason = "it is for another host" if is_for_another else error.verify_message
            return TransportError(
                f"its certificate is not trusted: {reason}; an authority of your own can be named as ca_file",
                permanent=True,
            )
        case TimeoutError():
            # The deadline is not over: it was not even connected to.
            return TransportError("cannot be reached: it does not answer")
        case (
            smtplib.SMTPServerDisconnected() | ConnectionResetError() | BrokenPipeError() | ssl.SSLEOFError()
        ):
            return TransportError("closed the connection before it answered")
        case ssl.SSLError():
            return TransportError(f"TLS failed ({error.reason or 'no reason given'})")
        case socket.gaierror():
            return TransportError("its host name is not known, or no name server answers")
        case http.client.HTTPException():
            return TransportError("answered something that is not HTTP")
        case OSError() if error.errno:
            return TransportError(f"cannot be reached: {os.strerror(error.errno)}")
        case _:
            return TransportError(f"failed in an unforeseen way ({type(error).__name__})")


def trusted(ca_file: str | None) -> ssl.SSLContext:
    """Verifies certificates by those of ``ca_file``, or of the system."""
    return ssl.create_default_context(cafile=ca_file)


class Answer(NamedTuple):
    """What an HTTP server said when it did not take something."""

    status: int
    body: bytes
    """Its beginning."""
    retry_after: float | None

    @property
    def is_permanent(self) -> bool:
        """Whether the same request would be refused again."""
        return _is_permanent(self.status)

    @property
    def status_line(self) -> str:
        """Code and its meaning; not the server's own phrase, which may hold anything."""
        try:
            return f"{self.status} {HTTPStatus(self.status).phrase}"
        except ValueError:
            return str(self.status)


class Way(NamedTuple):
    """How an HTTP server is reached: past the proxies of the environment, which are not meant for this."""

    ca_file: str | None = None
    """Certificates to trust instead of the system's."""
    proxy: SecretStr | None = None
    """Address of an HTTP proxy, with user and password if it wants them."""


DIRECTLY = Way()


def post(
    url: str, body: bytes, headers: Mapping[str, str], deadline: Deadline, way: Way = DIRECTLY
) -> Answer | None:
    """POST ``body``; follows no redirect and keeps no connection.

    Returns:
        None if the server took it (2xx), else what it said.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    opened = _opened(host, parts.port or (443 if secure else 80), way, deadline)
    connection: http.client.HTTPConnection
    if secure:
        context = trusted(way.ca_file)
        connection = http.client.HTTPSConnection(host, parts.port, context=context)
        connection.sock = context.wrap_socket(opened, server_hostname=host)
    else:
        connection = http.client.HTTPConnection(host, parts.port)
        connection.sock = opened
    try:
        path = parts.path or "/"
        deadline.left()
        connection.request("POST", f"{path}?{parts.query}" if parts.query else path, body, dict(headers))
        response = connection.getresponse()
        if 200 <= response.status < 300:
            return None
        return Answer(
            response.status, response.read(_MAX_BODY), _seconds_of(response.getheader("Retry-After"))
        )
    finally:
        connection.close()


def _is_permanent(status: int) -> bool:
    return status < 500 and status not in _TEMPORARY


def _opened(host: str, port: int, way: Way, deadline: Deadline) -> socket.socket:
    """A connection to the server, through a tunnel of the proxy (CONNECT) if there is one."""
    if way.proxy is None:
        return deadline.connect(host, port)
    proxy = urlsplit(way.proxy.get_secret_value())
    opened = deadline.connect(proxy.hostname or "", proxy.port or 80)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if proxy.username is not None:
        login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        request += f"Proxy-Authorization: Basic {base64.b64encode(login.encode()).decode()}\r\n"
    opened.sendall(f"{request}\r\n".encode())
    response = http.client.HTTPResponse(opened, method="CONNECT")
    response.begin()
    if response.status != HTTPStatus.OK:
        opened.close()
        raise TransportError(
            f"cannot be reached: the proxy answered {response.status}",
            permanent=_is_permanent(response.status),
        )
    return opened


def _seconds_of(retry_after: str | None) -> float | None:
    """RFC 9110, 10.2.3: seconds, or a date; None where it is neither."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        then = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=datetime.UTC)
    return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())


class MailServer(NamedTuple):
    """An SMTP server, and how to talk to it."""

    host: str
    port: int
    security: Security
    ca_file: str | None = None


def mail(
    server: MailServer,
    login: tuple[str, str] | None,
    sender: str,
    recipients: Sequence[str],
    message: EmailMessage,
    deadline: Deadline,
) -> dict[str, tuple[int, str]]:
    """Hand ``message`` to ``server``.

    Returns:
        Recipients that the server refused, with code and reason; the others will get it.
    """
    try:
        session = _Session(server, deadline)
        try:
            if server.security == "starttls":
                session.starttls(context=trusted(server.ca_file))
            if login is not None:
                session.login(*login)
            deadline.left()
            refused = session.send_message(message, sender, list(recipients))
            with contextlib.suppress(OSError):
                # No waiting for the reply: the message is taken, and a server that says no more goodbye
                # must not make it look as if it were not.
                session.putcmd("quit")
        finally:
            session.close()
    except smtplib.SMTPRecipientsRefused as error:
        refused = error.recipients
    except smtplib.SMTPAuthenticationError as error:
        # Not its reason: servers have been seen to repeat what they were sent.
        permanent = error.smtp_code >= 500
        raise TransportError(
            f"did not accept user and password ({error.smtp_code})", permanent=permanent
        ) from None
    except smtplib.SMTPResponseException as error:
        line = f"answered {error.smtp_code} {_text_of(error.smtp_error)}"
        raise TransportError(line, permanent=error.smtp_code >= 500) from None
    except smtplib.SMTPNotSupportedError:
        wanted = "STARTTLS" if server.security == "starttls" and not session.is_secure else "AUTH"
        raise TransportError(f"offers no {wanted}, which tls or user asks for", permanent=True) from None
    return {recipient: (code, _text_of(reason)) for recipient, (code, reason) in refused.items()}


def _text_of(reply: bytes | str) -> str:
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply


class _Session(smtplib.SMTP):
    """A session over a connection that is shut at the deadline."""

    def __init__(self, server: MailServer, deadline: Deadline) -> None:
        self._server = server
        self._deadline = deadline
        super().__init__(server.host, server.port)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:  # as SMTP_SSL does
        opened = self._deadline.connect(host, port)
        if self._server.security == "tls":
            return trusted(self._server.ca_file).wrap_socket(opened, server_hostname=host)
        return opened

    @override
    def send(self, s: str | bytes | bytearray) -> None:  # type: ignore[override]
        self._deadline.left()
        super().send(s)

    @property
    def is_secure(self) -> bool:
        """Whether what is said from now on is encrypted."""
        return isinstance(self.sock, ssl.SSLSocket)
