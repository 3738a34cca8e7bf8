"""Messages by e-mail."""

from __future__ import annotations

import datetime
import html
import logging
from collections.abc import Sequence
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parseaddr

from pydantic import SecretStr
from typing_extensions import override

from resources.channels import (
    COMMAND,
    SENDER,
    TAKEN,
    TITLE_LENGTH,
    Channel,
    Message,
    clean,
    headline,
    links,
    one_line,
    shortened,
    state,
    subject,
    time_of,
    token,
    worst_first,
)
from resources.transport import Deadline, MailServer, TransportError, mail

_LOG = logging.getLogger(__name__)

_MAIL_TEXT = 4_000
_MAIL_SIZE = 1_000_000
"""Characters of all texts of one e-mail: with HTML and encoding some 4 MB, which servers take."""


class EmailChannel(Channel):
    """E-mail by SMTP, one to all recipients: plain text, and the same as simple HTML.

    The Message-ID is made of the message's id: mail programs that look at it show a repeated one once.
    """

    def __init__(
        self,
        name: str,
        server: MailServer,
        sender: str,
        recipients: Sequence[str],
        user: str | None = None,
        password: SecretStr | None = None,
    ) -> None:
        login_line = SecretStr(f"\0{user}\0{password.get_secret_value()}") if password else None
        super().__init__(name, [each for each in (login_line, password) if each])
        self._server = server
        self._sender = sender
        self._recipients = tuple(recipients)
        self._user = user
        self._password = password

    @override
    def _hand_over(self, message: Message, deadline: Deadline) -> None:
        taken = TAKEN.of(message)
        recipients = [each for each in self._recipients if each not in taken]
        if not recipients:
            return
        login = (self._user, self._password.get_secret_value()) if self._user and self._password else None
        email = email_of(message, self._sender, self._recipients)
        refused = mail(self._server, login, parseaddr(self._sender)[1], recipients, email, deadline)
        taken.update(each for each in recipients if each not in refused)
        later = {each: reply for each, reply in refused.items() if reply[0] < 500}
        if later or (refused and not taken):
            raise _recipients_refused(later or refused, permanent=not later)
        for recipient, reply in refused.items():
            # Others got it: to fail would mean to tell them again and again.
            _LOG.warning("%s: %s", self.name, self._without_secrets(_refused_line(recipient, reply)))


def _recipients_refused(refused: dict[str, tuple[int, str]], *, permanent: bool) -> TransportError:
    line = "; ".join(_refused_line(recipient, reply) for recipient, reply in refused.items())
    return TransportError(line, permanent=permanent)


def _refused_line(recipient: str, reply: tuple[int, str]) -> str:
    return f"the mail server refused recipient {recipient}: {reply[0]} {reply[1]}"


def email_of(message: Message, sender: str, recipients: Sequence[str]) -> EmailMessage:
    """``message`` as an e-mail."""
    email = EmailMessage(policy=SMTP)
    email["From"] = sender
    email["To"] = ", ".join(recipients)
    # Without "=?", which would begin an encoded word, and with it anything at all.
    subject_line = f"[{SENDER}] {subject(message.lines)}".replace("=?", "= ?")
    email["Subject"] = "".join(each if each.isprintable() else " " for each in subject_line)
    email["Date"] = format_datetime(time_of(message.created_at) or datetime.datetime.now(datetime.UTC))
    domain = parseaddr(sender)[1].rpartition("@")[2]
    email["Message-ID"] = f"<{token(message.id)}@{domain}>"
    # RFC 3834: no holiday notes in return.
    email["Auto-Submitted"] = "auto-generated"
    text_length = min(_MAIL_TEXT, _MAIL_SIZE // len(message.lines))
    email.set_content(_plain_mail(message, text_length))
    email.add_alternative(_html_mail(message, text_length), subtype="html")
    return email


def _plain_mail(message: Message, text_length: int) -> str:
    parts = [headline(message.lines)]
    for line in worst_first(message.lines):
        part = [f"{state(line)}: {shortened(one_line(line.title), TITLE_LENGTH)}"]
        part += [f"    {each}" for each in shortened(clean(line.text), text_length).splitlines()]
        part += [f"    {address}" for address in links(line).values()]
        parts.append("\n".join(part))
    parts.append(f"All incidents: {COMMAND}" + (f"\nUI: {message.ui_url}" if message.ui_url else ""))
    return "\n\n".join(parts) + "\n"


def _html_mail(message: Message, text_length: int) -> str:
    parts = [f"<p><b>{html.escape(headline(message.lines))}</b></p>"]
    for line in worst_first(message.lines):
        title = html.escape(shortened(one_line(line.title), TITLE_LENGTH))
        found = links(line)
        if "in the UI" in found:
            title = f'<a href="{html.escape(line.link)}">{title or "link"}</a>'
        if "run" in found:
            title += f' (<a href="{html.escape(line.run_link)}">run</a>)'
        text = html.escape(shortened(clean(line.text), text_length)).replace("\n", "<br>\n")
        parts.append(f"<p><b>{html.escape(state(line))}</b>: {title}<br>\n{text}</p>")
    parts.append(f"<p>All incidents: <code>{COMMAND}</code></p>")
    return "<!doctype html>\n<html><body>\n" + "\n".join(parts) + "\n</body></html>\n"
