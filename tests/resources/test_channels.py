"""Messages reach people through real servers; whatever those do, no secret leaks and nothing hangs."""

from __future__ import annotations

import base64
import datetime
import email.utils
import functools
import html.parser
import json
import logging
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from resources.channels import TAKEN, Channel, ChannelError, Line, Message
from resources.email_channel import EmailChannel, email_of
from resources.pagerduty_channel import PagerDutyChannel, page_events
from resources.slack_channel import SlackChannel, slack_body
from resources.transport import MailServer, Way
from resources.webhook_channel import WebhookChannel, webhook_body
from tests.receivers import HttpProxy, HttpReceiver, SmtpReceiver, is_signed, self_signed_certificate

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")

NOW = "2026-11-21T04:00:00+00:00"
SECONDS = 5.0
WORD = "h0okSecretT0ken"
ROUTING_KEY = "0123456789abcdef0123456789abcdef"


def a_line(**changes: Any) -> Line:
    values: dict[str, Any] = {
        "kind": "opened",
        "incident": "check:drift_report:volume_is_usual",
        "number": 1,
        "severity": "ERROR",
        "title": "volume_is_usual failed",
        "text": "offers of country IT: 0.0 % of the day's offers, usually 14.1–17.9 %",
        "link": "http://localhost:3000/assets/drift_report",
        "run_link": "http://localhost:3000/runs/7f3a",
        "opened_at": NOW,
        "at": NOW,
    }
    return Line(**values | changes)


def a_message(*lines: Line, **changes: Any) -> Message:
    values: dict[str, Any] = {
        "id": "batch-1",
        "channel": "team",
        "lines": lines or (a_line(),),
        "created_at": NOW,
        "ui_url": "http://localhost:3000",
    }
    return Message(**values | changes)


def many(number: int, **changes: Any) -> Message:
    return a_message(
        *(a_line(incident=f"check:{i}", title=f"check {i} failed", **changes) for i in range(number))
    )


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests() -> None:
    TAKEN._parts.clear()


@pytest.fixture
def receiver() -> Iterator[HttpReceiver]:
    with HttpReceiver() as running:
        yield running


@pytest.fixture
def mail_server() -> Iterator[SmtpReceiver]:
    with SmtpReceiver() as running:
        yield running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return self_signed_certificate(tmp_path_factory.mktemp("certificate"))


def slack(receiver: HttpReceiver, ca_file: Path | None = None, proxy: str | None = None) -> SlackChannel:
    return SlackChannel(
        "team",
        SecretStr(f"{receiver.url}/services/T000/B000/{WORD}"),
        Way(str(ca_file) if ca_file else None, SecretStr(proxy) if proxy else None),
    )


def webhook(receiver: HttpReceiver, clock: Callable[[], float] = time.time) -> WebhookChannel:
    url = SecretStr(f"{receiver.url}/alerts?token={WORD}")
    return WebhookChannel("team", url, SecretStr("signing secret"), {"X-Key": SecretStr(WORD)}, clock=clock)


def pagerduty(receiver: HttpReceiver) -> PagerDutyChannel:
    return PagerDutyChannel("team", f"{receiver.url}/v2/enqueue", SecretStr(ROUTING_KEY), "offer-assets")


def mailer(
    server: SmtpReceiver,
    security: Any = "none",
    login: tuple[str, str] | None = None,
    ca_file: Path | None = None,
    recipients: tuple[str, ...] = ("ann@example.com", "bob@example.com"),
) -> EmailChannel:
    return EmailChannel(
        "team",
        MailServer("127.0.0.1", server.port, security, str(ca_file) if ca_file else None),
        "Offer Assets <alerts@example.com>",
        recipients,
        login[0] if login else None,
        SecretStr(login[1]) if login else None,
    )


def refusal(channel: Channel, message: Message | None = None, seconds: float = SECONDS) -> ChannelError:
    with pytest.raises(ChannelError) as caught:
        channel.send(message or a_message(), seconds)
    return caught.value


# Any HTTP channel


@pytest.fixture(params=[slack, webhook, pagerduty])
def http_channel(request: pytest.FixtureRequest, receiver: HttpReceiver) -> Channel:
    return request.param(receiver)  # type: ignore[no-any-return]


def test_what_the_server_takes_is_sent_once(http_channel: Channel, receiver: HttpReceiver) -> None:
    http_channel.send(a_message(), SECONDS)
    assert len(receiver.effects) == 1


@pytest.mark.parametrize(
    ("mode", "permanent"),
    [("busy", False), ("broken", False), ("refusing", True), ("dying", False), ("moved", True)],
)
def test_what_the_server_does_not_take_is_told(
    http_channel: Channel, receiver: HttpReceiver, mode: str, permanent: bool
) -> None:
    receiver.mode = mode
    error = refusal(http_channel)
    assert error.permanent is permanent
    assert error.retry_after == (7 if mode == "busy" else None)
    assert len(receiver.requests) == 1  # a redirect is not followed


@pytest.mark.parametrize("mode", ["slow", "dripping"])
def test_a_server_that_does_not_answer_costs_no_more_than_the_seconds_given(
    http_channel: Channel, receiver: HttpReceiver, mode: str
) -> None:
    receiver.mode = mode
    started = time.monotonic()
    error = refusal(http_channel, seconds=0.4)
    assert time.monotonic() - started < 20  # without a limit it would be for ever
    assert "within 0.4 s" in str(error)
    assert not error.permanent
    assert "alert delivery" not in [thread.name for thread in threading.enumerate()]


def test_a_name_server_that_does_not_answer_costs_no_more_either_and_nothing_is_sent_later(
    http_channel: Channel, receiver: HttpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, look_up = threading.Event(), socket.getaddrinfo

    def late(*arguments: Any, **options: Any) -> Any:
        answers.wait()
        return look_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    before = set(threading.enumerate())
    assert "within 0.3 s" in str(refusal(http_channel, seconds=0.3))
    attempts = [each for each in set(threading.enumerate()) - before if each.name == "alert delivery"]
    answers.set()
    for attempt in attempts:
        attempt.join(10)
    assert len(attempts) == 1
    assert not receiver.requests


def test_a_server_that_is_down_is_one_that_can_be_tried_again(
    http_channel: Channel, receiver: HttpReceiver
) -> None:
    receiver.go_down()
    error = refusal(http_channel)
    assert str(error) == "cannot be reached: Connection refused"
    assert not error.permanent
    receiver.come_up()
    http_channel.send(a_message(), SECONDS)
    assert len(receiver.effects) == 1


def test_proxies_of_the_environment_are_not_asked(
    http_channel: Channel, receiver: HttpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    http_channel.send(a_message(), SECONDS)
    assert len(receiver.effects) == 1


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("0", 0), ("30", 30), ("999999999", 999999999), ("soon", None), ("-5", None), ("", None)],
)
def test_retry_after_is_read(receiver: HttpReceiver, said: str, seconds: float | None) -> None:
    receiver.mode, receiver.retry_after = "busy", said
    assert refusal(slack(receiver)).retry_after == seconds


def test_retry_after_may_be_a_date(receiver: HttpReceiver) -> None:
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    receiver.mode, receiver.retry_after = "busy", email.utils.format_datetime(then, usegmt=True)
    seconds = refusal(slack(receiver)).retry_after
    assert seconds is not None
    assert 60 < seconds <= 90


def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: tuple[Path, Path]) -> None:
    with HttpReceiver(certificate=certificate) as receiver:
        error = refusal(slack(receiver))
        assert "certificate is not trusted" in str(error)
        assert error.permanent
        assert not receiver.requests
        slack(receiver, ca_file=certificate[0]).send(a_message(), SECONDS)
        assert len(receiver.effects) == 1


def test_a_certificate_for_another_host_is_refused(tmp_path: Path) -> None:
    files = self_signed_certificate(tmp_path, host="elsewhere.example.com")
    with HttpReceiver(certificate=files) as receiver:
        error = refusal(slack(receiver, ca_file=files[0]))
        assert "it is for another host" in str(error)
        assert "127.0.0.1" not in str(error)
        assert not receiver.requests


def test_a_proxy_that_is_set_is_gone_through(certificate: tuple[Path, Path]) -> None:
    with HttpReceiver(certificate=certificate) as encrypted, HttpReceiver() as plain, HttpProxy() as proxy:
        for receiver in (encrypted, plain):
            slack(receiver, certificate[0], f"http://me:p%40ss@{proxy.address}").send(a_message(), SECONDS)
            assert len(receiver.effects) == 1
        login = "Basic " + base64.b64encode(b"me:p@ss").decode()
        assert proxy.tunnels == [(f"127.0.0.1:{each.port}", login) for each in (encrypted, plain)]


def test_a_proxy_that_refuses_is_told_without_its_password(receiver: HttpReceiver) -> None:
    with HttpProxy(refuses_with=407) as proxy:
        error = refusal(slack(receiver, proxy=f"http://me:{WORD}@{proxy.address}"))
    assert str(error) == "cannot be reached: the proxy answered 407"
    assert error.permanent
    assert not receiver.requests


# Slack


def slack_texts(message: Message) -> list[str]:
    return [block["text"]["text"] for block in slack_body(message)["blocks"]]


def test_a_slack_message_begins_with_how_much_of_what_and_lists_the_worst_first(
    receiver: HttpReceiver,
) -> None:
    message = a_message(
        a_line(kind="resolved", title="all well again"),
        a_line(severity="WARN", title="a bit odd"),
        a_line(severity="ERROR", title="very odd"),
        a_line(severity="ERROR", title="odd too", kind="reminder", times=12),
    )
    slack(receiver).send(message, SECONDS)
    body = json.loads(receiver.effects[0].body)
    assert body["text"] == "Offer Assets: 2 ERROR, 1 WARN, 1 resolved: very odd …"
    lines = body["blocks"][0]["text"]["text"].splitlines()
    assert lines[0] == "*Offer Assets: 2 ERROR, 1 WARN, 1 resolved*"
    titles = [re.search(r"\|(.*?)> ", line)[1] for line in lines if "|" in line]  # type: ignore[index]
    assert titles == ["very odd", "odd too", "a bit odd", "all well again"]
    assert "ERROR since 2026-11-21 04:00 UTC, found 12 times" in lines[3]


def test_a_slack_line_links_the_page_and_the_run_whatever_the_length_of_its_text() -> None:
    (said,) = slack_texts(a_message(a_line(title="odd", text="x" * 5_000)))
    assert "<http://localhost:3000/assets/drift_report|odd> (<http://localhost:3000/runs/7f3a|run>)" in said
    (said,) = slack_texts(a_message(a_line(title="odd", link=a_line().run_link)))
    assert said.count("/runs/7f3a") == 1


def assert_within_slacks_limits(message: Message) -> None:
    texts = slack_texts(message)
    assert len(texts) <= 50
    assert all(0 < len(text.encode("utf-16-le")) // 2 <= 3_000 for text in texts)
    assert sum(len(text.encode("utf-16-le")) // 2 + 1 for text in texts) <= 40_001


def test_500_lines_are_one_slack_message_that_shows_every_one() -> None:
    message = many(500, text="x" * 1_000)
    assert_within_slacks_limits(message)
    said = "\n".join(slack_texts(message))
    assert all(f"check {i} failed" in said for i in range(500))
    assert "Shortened; all of it: `python -m offer_assets alerts` and <http://localhost:3000|the UI>" in said


def test_what_does_not_fit_in_a_slack_message_is_counted() -> None:
    message = many(3_000)
    assert_within_slacks_limits(message)
    said = "\n".join(slack_texts(message))
    left_out = re.search(r"… and ([0-9]+) more lines, left out here; all of them: `python -m", said)
    assert left_out is not None
    assert said.count("failed") == 3_000 - int(left_out[1])


def test_slacks_reason_is_repeated_and_nothing_else_that_it_says(receiver: HttpReceiver) -> None:
    receiver.mode, receiver.answer = "refusing", b"no_service"
    assert str(refusal(slack(receiver))) == "answered 400 Bad Request: no_service"
    receiver.answer = b"<html>you sent {request}</html>"
    assert str(refusal(slack(receiver))) == "answered 400 Bad Request"


# Webhook


def test_a_webhook_gets_json_that_is_signed(receiver: HttpReceiver) -> None:
    webhook(receiver, clock=lambda: 1_000.7).send(a_message(), SECONDS)
    (request,) = receiver.effects
    assert request.path == f"/alerts?token={WORD}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-key"] == WORD
    assert request.headers["idempotency-key"] == "batch-1"
    assert request.headers["x-signature"].startswith("t=1000,v1=")
    assert is_signed(request, "signing secret", now=1_100)
    assert not is_signed(request, "signing secret", now=2_000)
    assert not is_signed(request, "another secret", now=1_100)
    request.body += b" "
    assert not is_signed(request, "signing secret", now=1_100)


def test_the_webhooks_body_is_what_its_documentation_says(receiver: HttpReceiver) -> None:
    webhook(receiver).send(a_message(), SECONDS)
    body = json.loads(receiver.effects[0].body)
    assert body == {
        "schema_version": 1,
        "id": "batch-1",
        "channel": "team",
        "created_at": NOW,
        "ui_url": "http://localhost:3000",
        "counts": {"CRITICAL": 0, "ERROR": 1, "WARN": 0, "resolved": 0, "notice": 0},
        "lines": [
            {
                "kind": "opened",
                "incident": "check:drift_report:volume_is_usual",
                "number": 1,
                "severity": "ERROR",
                "title": "volume_is_usual failed",
                "text": "offers of country IT: 0.0 % of the day's offers, usually 14.1–17.9 %",
                "link": "http://localhost:3000/assets/drift_report",
                "run_link": "http://localhost:3000/runs/7f3a",
                "opened_at": NOW,
                "at": NOW,
                "times": 1,
                "page_key": "",
            }
        ],
    }
    documented = set(re.findall(r'"([a-z_]+)":', WebhookChannel.__doc__ or ""))
    assert documented >= body.keys() | body["lines"][0].keys()


def test_a_receiver_that_honours_the_key_sees_a_message_once_whose_answer_got_lost(
    receiver: HttpReceiver,
) -> None:
    receiver.honours_keys, receiver.mode = True, "dying"
    assert not refusal(webhook(receiver)).permanent
    receiver.mode = "up"
    webhook(receiver).send(a_message(), SECONDS)
    webhook(receiver).send(a_message(), SECONDS)
    assert len(receiver.requests) == 3
    assert len(receiver.effects) == 1
    assert len({request.body for request in receiver.requests}) == 1


def test_500_lines_are_one_webhook_body_that_servers_take() -> None:
    body = webhook_body(many(500, text="ü" * 20_000))
    assert len(body) < 1_000_000
    assert len(json.loads(body)["lines"]) == 500


# PagerDuty


def test_incidents_with_one_page_key_are_one_event(receiver: HttpReceiver) -> None:
    lines = [a_line(incident=f"check:{i}", title=f"check {i}", page_key="day") for i in range(500)]
    lines.append(a_line(incident="run:1", severity="CRITICAL", title="a run failed"))
    pagerduty(receiver).send(a_message(*lines), SECONDS)
    run, checks = (json.loads(request.body) for request in receiver.effects)
    assert run["routing_key"] == checks["routing_key"] == ROUTING_KEY
    assert run["event_action"] == checks["event_action"] == "trigger"
    assert run["dedup_key"] == "offer-assets:run:1"
    assert run["payload"]["severity"] == "critical"
    assert run["payload"]["summary"] == "1 CRITICAL: a run failed"
    assert run["links"] == [
        {"href": "http://localhost:3000/assets/drift_report", "text": "in the UI"},
        {"href": "http://localhost:3000/runs/7f3a", "text": "run"},
    ]
    assert checks["dedup_key"] == "offer-assets:day"
    assert checks["payload"]["summary"] == "500 ERROR: check 0 …"
    assert len(checks["payload"]["custom_details"]["lines"]) == 500
    assert checks["payload"]["custom_details"]["lines"][0].endswith(
        " | http://localhost:3000/assets/drift_report | http://localhost:3000/runs/7f3a"
    )


def actions(message: Message) -> dict[str, str]:
    return {event["dedup_key"]: event["event_action"] for event in page_events(message, "s")}


def test_a_page_is_resolved_with_the_last_of_its_incidents() -> None:
    gone = a_line(incident="a", kind="resolved", page_key="p")
    assert actions(a_message(gone, open_page_keys=("p",))) == {}
    assert actions(a_message(gone)) == {"s:p": "resolve"}
    assert actions(a_message(gone, a_line(incident="b", page_key="p"))) == {"s:p": "trigger"}
    assert actions(a_message(a_line(incident="a", kind="resolved"))) == {"s:a": "resolve"}


def test_what_opens_and_is_resolved_in_one_message_pages_nobody_and_what_opens_again_does() -> None:
    opened, gone = a_line(incident="a"), a_line(incident="a", kind="resolved")
    assert actions(a_message(opened, gone)) == {"s:a": "resolve"}
    assert actions(a_message(gone, a_line(incident="a", number=2))) == {"s:a": "trigger"}


def test_an_event_that_was_taken_is_not_sent_again_when_the_next_one_fails(receiver: HttpReceiver) -> None:
    lines = [a_line(incident=f"{i}", title=f"check {i}") for i in range(5)]
    message = a_message(*lines, id="partly")
    taken = 0
    receiver_keep = receiver.keep

    def keep(request: Any) -> None:
        nonlocal taken
        receiver_keep(request)
        taken += 1
        receiver.mode = "busy" if taken == 2 else receiver.mode

    receiver.keep = keep  # type: ignore[method-assign]
    channel = pagerduty(receiver)
    assert refusal(channel, message).retry_after == 7
    receiver.mode = "up"
    pagerduty(receiver).send(message, SECONDS)
    told = [json.loads(request.body)["dedup_key"] for request in receiver.effects]
    assert told == [f"offer-assets:{i}" for i in range(5)]


def test_an_event_that_is_refused_for_good_does_not_hold_up_the_others(receiver: HttpReceiver) -> None:
    message = a_message(a_line(incident="bad"), a_line(incident="good"), id="one-bad")
    receiver_keep = receiver.keep

    def keep(request: Any) -> None:
        receiver_keep(request)
        receiver.mode = "up"

    receiver.keep = keep  # type: ignore[method-assign]
    receiver.mode = "refusing"
    receiver.answer = json.dumps({"status": "invalid event", "errors": [f"{ROUTING_KEY} is no key"]}).encode()
    error = refusal(pagerduty(receiver), message)
    assert len(receiver.requests) == 2
    assert error.permanent
    assert str(error) == "answered 400 Bad Request: *** is no key"


def test_pages_keep_within_pagerdutys_limits() -> None:
    lines = [
        a_line(incident=f"{i}", title="ü" * 5_000, text="ü" * 2_000, page_key="p" * 400) for i in range(1_000)
    ]
    (event,) = page_events(a_message(*lines), "s")
    assert len(json.dumps(event, ensure_ascii=False).encode()) < 512_000
    assert len(event["payload"]["summary"]) <= 1_024
    assert len(event["dedup_key"]) <= 255
    shown = len(event["payload"]["custom_details"]["lines"])
    assert event["payload"]["custom_details"]["lines_left_out"] == 1_000 - shown > 0


def test_pages_whose_long_keys_differ_at_the_end_are_two() -> None:
    lines = [a_line(page_key="p" * 400 + end, incident=end) for end in "ab"]
    assert len(actions(a_message(*lines))) == 2


# E-mail


def test_an_e_mail_says_it_in_plain_text_and_in_html(mail_server: SmtpReceiver) -> None:
    message = a_message(a_line(title="Menge unüblich"), a_line(kind="resolved", title="好了"))
    mailer(mail_server).send(message, SECONDS)
    (mail,) = mail_server.mails
    assert mail.sender == "alerts@example.com"
    assert mail.recipients == ["ann@example.com", "bob@example.com"]
    read = mail.message
    assert read["Subject"] == "[Offer Assets] 1 ERROR, 1 resolved: Menge unüblich …"
    assert read["From"] == "Offer Assets <alerts@example.com>"
    assert read["To"] == "ann@example.com, bob@example.com"
    assert read["Message-ID"] == "<batch-1@example.com>"
    assert email.utils.parsedate_to_datetime(read["Date"]).isoformat() == NOW
    plain, rich = (read.get_body((kind,)).get_content() for kind in ("plain", "html"))  # type: ignore[union-attr]
    for text in (plain, rich):
        assert text.index("Menge unüblich") < text.index("usually 14.1–17.9 %") < text.index("好了")
    assert (
        '<a href="http://localhost:3000/assets/drift_report">Menge unüblich</a> '
        '(<a href="http://localhost:3000/runs/7f3a">run</a>)' in rich
    )
    assert "    http://localhost:3000/assets/drift_report" in plain.splitlines()
    assert "    http://localhost:3000/runs/7f3a" in plain.splitlines()


def test_500_lines_are_one_e_mail(mail_server: SmtpReceiver) -> None:
    mailer(mail_server).send(many(500, text="x" * 20_000), SECONDS)
    (mail,) = mail_server.mails
    assert len(mail.raw) < 5_000_000
    assert mail.message.get_body(("plain",)).get_content().count("failed") == 500  # type: ignore[union-attr]


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_e_mail_goes_encrypted_and_with_a_login(certificate: tuple[Path, Path], security: str) -> None:
    login = ("robot", "pass word")
    # aiosmtpd allows logins over STARTTLS, or where it is told that encryption does not matter.
    with SmtpReceiver(security=security, login=login, certificate=certificate) as server:
        mailer(server, security, login, ca_file=certificate[0]).send(a_message(), SECONDS)
        (mail,) = server.mails
        assert mail.encrypted
        assert mail.user == "robot"


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_mail_server_that_nobody_vouches_for_gets_neither_login_nor_mail(
    certificate: tuple[Path, Path], security: str
) -> None:
    login = ("robot", "pass word")
    with SmtpReceiver(security=security, login=login, certificate=certificate) as server:
        error = refusal(mailer(server, security, login))
        assert "certificate is not trusted" in str(error)
        assert not server.mails


def test_a_mail_server_without_starttls_gets_neither_login_nor_mail(mail_server: SmtpReceiver) -> None:
    error = refusal(mailer(mail_server, "starttls", ("robot", "pass word")))
    assert str(error) == "offers no STARTTLS, which tls or user asks for"
    assert error.permanent
    assert mail_server.attempts == 0


def test_a_wrong_password_is_told_without_the_servers_words(certificate: tuple[Path, Path]) -> None:
    with SmtpReceiver(
        security="starttls",
        login=("robot", "right"),
        certificate=certificate,
        auth_refusal="535 5.7.8 {password} is wrong",
    ) as server:
        error = refusal(mailer(server, "starttls", ("robot", "wr0ng-password"), certificate[0]))
        assert str(error) == "did not accept user and password (535)"
        assert error.permanent


@pytest.mark.parametrize(
    ("mode", "permanent", "said"),
    [
        ("busy", False, "451 4.7.1 not now"),
        ("broken", False, "451 4.3.0 no space left"),
        ("refusing", True, "554 5.7.1 not from you"),
        ("dying", False, "closed the connection"),
    ],
)
def test_what_the_mail_server_does_not_take_is_told(
    mail_server: SmtpReceiver, mode: str, permanent: bool, said: str
) -> None:
    mail_server.mode = mode
    error = refusal(mailer(mail_server))
    assert said in str(error)
    assert error.permanent is permanent


@pytest.mark.parametrize("mode", ["slow", "silent"])
def test_a_mail_server_that_does_not_answer_costs_no_more_than_the_seconds_given(
    mail_server: SmtpReceiver, mode: str
) -> None:
    mail_server.mode = mode
    started = time.monotonic()
    assert "within 0.4 s" in str(refusal(mailer(mail_server), seconds=0.4))
    assert time.monotonic() - started < 20  # without a limit it would be for ever
    assert "alert delivery" not in [thread.name for thread in threading.enumerate()]


def test_a_mail_server_that_is_down_can_be_tried_again(mail_server: SmtpReceiver) -> None:
    mail_server.go_down()
    assert not refusal(mailer(mail_server)).permanent
    mail_server.come_up()
    mailer(mail_server).send(a_message(), SECONDS)
    assert len(mail_server.mails) == 1


def test_a_mail_whose_answer_got_lost_goes_again_with_the_same_message_id(mail_server: SmtpReceiver) -> None:
    mail_server.mode = "dying"
    refusal(mailer(mail_server))
    mail_server.mode = "up"
    mailer(mail_server).send(a_message(), SECONDS)
    first, second = (mail.message["Message-ID"] for mail in mail_server.mails)
    assert first == second


def test_a_mail_that_was_taken_is_not_sent_again(mail_server: SmtpReceiver) -> None:
    mailer(mail_server).send(a_message(), SECONDS)
    mailer(mail_server).send(a_message(), SECONDS)
    assert mail_server.attempts == 1


def test_no_recipient_at_all_is_an_error_of_its_kind(mail_server: SmtpReceiver) -> None:
    mail_server.refused_recipients = {"ann@example.com": "550 5.1.1 no such user"}
    channel = mailer(mail_server, recipients=("ann@example.com",))
    error = refusal(channel, a_message(id="nobody"))
    assert str(error) == "the mail server refused recipient ann@example.com: 550 5.1.1 no such user"
    assert error.permanent


def test_one_wrong_recipient_of_several_is_logged_and_holds_up_nothing(
    mail_server: SmtpReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    mail_server.refused_recipients = {"ann@example.com": "550 5.1.1 no such user"}
    mailer(mail_server).send(a_message(id="one-wrong"), SECONDS)
    assert [mail.recipients for mail in mail_server.mails] == [["bob@example.com"]]
    assert "team: the mail server refused recipient ann@example.com: 550" in caplog.text


def test_a_recipient_to_try_later_is_tried_later_and_the_others_are_left_alone(
    mail_server: SmtpReceiver,
) -> None:
    mail_server.refused_recipients = {"ann@example.com": "450 4.2.1 greylisted"}
    message = a_message(id="greylisted")
    assert not refusal(mailer(mail_server), message).permanent
    mail_server.refused_recipients = {}
    mailer(mail_server).send(message, SECONDS)
    assert [mail.recipients for mail in mail_server.mails] == [["bob@example.com"], ["ann@example.com"]]


# Whatever is in the messages

HOSTILE = st.one_of(
    st.text(max_size=200),
    st.text(alphabet="<>&|*`!@#:/\\\"'=?\r\n\t\0\x85\u2028\ud800 a😀", max_size=200),
    st.sampled_from(
        [
            "<!channel> <@U123> <https://evil.example|here>",
            "x\r\nBcc: victim@example.com\r\n\r\nbody",
            "=?utf-8?q?a=0D=0ABcc:_victim@example.com?=",
            "<script>alert(1)</script><img src=x onerror=alert(1)>",
            "&lt;b&gt; &amp;",
            "\r\n.\r\nMAIL FROM:<x@example.com>",
            "{}\x00\x1b[31m",
        ]
    ),
)
LINKS = st.one_of(HOSTILE, st.just("https://ui.example.com/runs/1?a=b&c=d"), st.just("javascript:alert(1)"))
LINES = st.builds(
    functools.partial(a_line),
    kind=st.sampled_from(["opened", "worse", "reminder", "resolved", "notice"]),
    severity=st.sampled_from(["WARN", "ERROR", "CRITICAL"]),
    title=HOSTILE,
    text=HOSTILE,
    link=LINKS,
    run_link=LINKS,
    incident=HOSTILE,
    page_key=HOSTILE,
    opened_at=st.one_of(st.just(NOW), HOSTILE),
)
MESSAGES = st.builds(
    lambda lines, identity: a_message(*lines, id=identity),
    st.lists(LINES, min_size=1, max_size=6),
    st.one_of(st.just("batch-1"), HOSTILE),
)


@given(MESSAGES)
def test_nothing_hostile_is_markup_in_slack(message: Message) -> None:
    assert_within_slacks_limits(message)
    body = slack_body(message)
    json.dumps(body, ensure_ascii=False).encode()
    for text in [*slack_texts(message), body["text"]]:
        rest = re.sub(r"<https?://[^\s<>|]+\|[^<>]*>", "", text)
        assert "<" not in rest
        assert ">" not in re.sub(r"^>", "", rest, flags=re.MULTILINE)
        assert not re.search(r"&(?!(amp|lt|gt);)", rest)


@given(LINES, st.integers(500, 700))
@settings(max_examples=15, deadline=None)
def test_500_hostile_lines_are_within_slacks_limits(line: Line, number: int) -> None:
    assert_within_slacks_limits(a_message(*[line] * number))


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        assert [name for name, _ in attrs] == (["href"] if tag == "a" else [])
        self.links += [value or "" for _, value in attrs]


@given(MESSAGES)
def test_nothing_hostile_is_a_header_or_markup_in_an_e_mail(message: Message) -> None:
    raw = email_of(message, "alerts@example.com", ["ann@example.com"]).as_bytes()
    head = raw.split(b"\r\n\r\n")[0]
    names = [
        line.split(b":")[0].decode() for line in head.split(b"\r\n") if not line.startswith((b" ", b"\t"))
    ]
    expected = [
        "From",
        "To",
        "Subject",
        "Date",
        "Message-ID",
        "Auto-Submitted",
        "MIME-Version",
        "Content-Type",
    ]
    assert sorted(names) == sorted(expected)
    assert raw.replace(b"\r\n", b"").count(b"\n") == raw.replace(b"\r\n", b"").count(b"\r") == 0
    read = email.message_from_bytes(raw, policy=email.policy.default)
    assert read["Subject"].lstrip().startswith("[Offer Assets] ")
    assert read["To"] == "ann@example.com"
    tags = Tags(read.get_body(("html",)).get_content())  # type: ignore[attr-defined]
    assert tags.found <= {"html", "body", "p", "b", "a", "br", "code"}
    assert all(link.startswith(("http://", "https://")) for link in tags.links)


@given(MESSAGES)
def test_nothing_hostile_breaks_json(message: Message) -> None:
    said = json.loads(webhook_body(message).decode())
    assert len(said["lines"]) == len(message.lines)
    for event in page_events(message, "s"):
        assert len(event["dedup_key"]) <= 255
        json.dumps(event, ensure_ascii=False).encode()


@pytest.mark.parametrize("make", [slack, webhook, pagerduty])
@given(MESSAGES)
@settings(max_examples=15, deadline=None)
def test_hostile_messages_arrive(make: Callable[[HttpReceiver], Channel], message: Message) -> None:
    with HttpReceiver() as receiver:
        make(receiver).send(message, SECONDS)


@given(MESSAGES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_e_mails_arrive_as_one(mail_server: SmtpReceiver, message: Message) -> None:
    mail_server.mails.clear()
    mailer(mail_server, recipients=("ann@example.com",)).send(
        a_message(*message.lines, id=f"{time.monotonic_ns()}"), SECONDS
    )
    (mail,) = mail_server.mails
    assert mail.recipients == ["ann@example.com"]


# Secrets


SECRETS = st.text(alphabet="abcXYZ0189-_+/=.~%!", min_size=12, max_size=40).filter(
    lambda s: s.strip("/=") == s
)


def everything_about(error: BaseException) -> str:
    told = [str(error), repr(error), repr(error.args), repr(vars(error))]
    told += traceback.TracebackException.from_exception(error, capture_locals=True).format()
    assert error.__context__ is None
    assert error.__cause__ is None
    return "\n".join(told)


@given(SECRETS, st.sampled_from(["busy", "broken", "refusing", "dying", "moved", "slow", "down"]), st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_failure_of_an_http_channel_tells_a_secret(
    caplog: pytest.LogCaptureFixture, secret: str, mode: str, data: st.DataObject
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    answers = [b"{request}", b'{"errors": ["' + secret.encode() + b'"]}', secret.encode()]
    with HttpReceiver(mode=mode if mode != "down" else "up") as receiver:
        receiver.answer = data.draw(st.sampled_from(answers))
        channels = [
            SlackChannel("team", SecretStr(f"{receiver.url}/services/T/B/{secret}")),
            WebhookChannel(
                "team",
                SecretStr(f"{receiver.url}/x?key={secret}"),
                SecretStr(secret),
                {"Authorization": SecretStr(secret)},
            ),
            PagerDutyChannel("team", f"{receiver.url}/v2/enqueue", SecretStr(secret), "offer-assets"),
        ]
        if mode == "down":
            receiver.go_down()
        for channel in channels:
            error = refusal(channel, seconds=0.2 if mode == "slow" else SECONDS)
            told = everything_about(error) + repr(channel) + str(channel) + caplog.text
            assert secret not in told
            assert "\n" not in str(error)
            assert len(str(error)) <= 300


@given(SECRETS, st.sampled_from(["wrong", "busy", "broken", "refusing", "dying", "down", "plain"]))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_failure_of_an_e_mail_channel_tells_the_password(
    caplog: pytest.LogCaptureFixture, certificate: tuple[Path, Path], secret: str, mode: str
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    right = "right-password" if mode == "wrong" else secret
    with SmtpReceiver(
        mode=mode if mode not in ("wrong", "down", "plain") else "up",
        security="none" if mode == "plain" else "starttls",
        login=("robot", right),
        certificate=certificate,
        auth_refusal="535 not {password}",
        refused_recipients={"ann@example.com": f"550 {secret}", "bob@example.com": f"450 {secret}"}
        if mode == "broken"
        else {},
    ) as server:
        channel = mailer(server, "starttls", ("robot", secret), certificate[0])
        if mode == "down":
            server.go_down()
        error = refusal(channel, a_message(id=f"secret-{time.monotonic_ns()}"))
        assert secret not in everything_about(error) + repr(channel) + str(channel)
        # aiosmtpd, the server, logs what it is sent; what counts is what the client says.
        ours = [
            each.getMessage() for each in caplog.records if not each.name.startswith(("mail.", "asyncio"))
        ]
        assert secret not in "\n".join(ours)


def test_an_error_that_nobody_foresaw_is_told_by_its_type_alone() -> None:
    class Broken(Channel):
        def _hand_over(self, message: Message, deadline: Any) -> None:
            raise ValueError(f"cannot use {WORD}")

    error = refusal(Broken("team"))
    assert str(error) == "failed in an unforeseen way (ValueError)"
    assert WORD not in everything_about(error)
