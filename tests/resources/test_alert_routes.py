"""The routes' file says who hears of what; whatever is wrong with it is one line that holds no secret."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.errors import InputError
from resources.alert_routes import Route, Routes, read_routes
from resources.alerts import SEVERITIES, Severity
from tests.conftest import ROOT
from tests.receivers import HttpReceiver, SmtpReceiver, self_signed_certificate
from tests.resources.test_channels import a_message

EXAMPLE = ROOT / "alerts.example.toml"
ENVIRON = {
    "CATALOG_TEAM_SLACK_URL": "https://hooks.slack.com/services/T000/B000/XXXXXXXXXXXXXXXX",
    "SMTP_PASSWORD": "an smtp password",
    "TICKET_SYSTEM_SECRET": "a signing secret",
    "TICKET_SYSTEM_AUTHORIZATION": "Bearer of a token",
    "PAGERDUTY_ROUTING_KEY": "0123456789abcdef0123456789abcdef",
}
SLACK = '[channels.team]\ntype = "slack"\nurl = "${CATALOG_TEAM_SLACK_URL}"\n'
ROUTE = '[[routes]]\nchannels = ["team"]\n'
EMAIL = (
    '[channels.mail]\ntype = "email"\nhost = "smtp.example.com"\n'
    'from = "a@example.com"\nto = ["b@example.com"]\n'
)
WEBHOOK = (
    '[channels.hook]\ntype = "webhook"\nurl = "https://hooks.example.com"\n'
    'secret = "${TICKET_SYSTEM_SECRET}"\n'
)
PAGER = '[channels.pager]\ntype = "pagerduty"\nrouting_key = "${PAGERDUTY_ROUTING_KEY}"\n'


def read(folder: Path, text: str, environ: dict[str, str] | None = None) -> Routes:
    path = folder / "alerts.toml"
    path.write_text(text, encoding="utf-8")
    return read_routes(str(path), ENVIRON if environ is None else environ)


def problem(folder: Path, text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read(folder, text, environ)
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith(f"{folder / 'alerts.toml'}: ")
    return told.removeprefix(f"{folder / 'alerts.toml'}: ")


def test_without_a_file_there_are_no_channels() -> None:
    for path in (None, ""):
        routes = read_routes(path, {}, "http://localhost:3000")
        assert routes.channels == {}
        assert routes.channels_for("CRITICAL", "offers", ["team:data"]) == []
        assert routes.reminder_hours == {"ERROR": 24, "CRITICAL": 24}
        assert routes.seconds_between_messages == 60
        assert routes.gather_seconds == 30
        assert routes.ui_url == "http://localhost:3000"


def test_the_example_is_right_and_says_what_it_says() -> None:
    routes = read_routes(str(EXAMPLE), ENVIRON)
    assert list(routes.channels) == ["catalog-team", "data-owners", "ticket-system", "on-call"]
    assert routes.channels_for("WARN", None, []) == ["data-owners"]
    assert routes.channels_for("ERROR", "models", []) == ["catalog-team"]
    assert routes.channels_for("CRITICAL", "models", []) == ["catalog-team", "on-call", "ticket-system"]
    owners = ["team:data-engineering", "x"]
    assert routes.channels_for("ERROR", "feed", owners) == ["catalog-team", "data-owners"]
    assert routes.channels_for("ERROR", "feed", ["team:other"]) == ["catalog-team"]
    assert routes.reminder_hours == {"ERROR": 24, "CRITICAL": 24}
    assert routes.seconds_between_messages == 60
    assert routes.gather_seconds == 30


def test_what_the_example_shows_in_comments_is_right_too(tmp_path: Path) -> None:
    text = re.sub(r"^# (\w+ = )", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    assert text.count("\nuser = ") == 1
    text = text.replace("/etc/ssl/company.pem", str(self_signed_certificate(tmp_path)[0]))
    assert len(read(tmp_path, text).channels) == 4


def test_the_example_refers_to_the_variables_that_it_needs_and_to_no_more() -> None:
    assert set(re.findall(r"\$\{(\w+)\}", EXAMPLE.read_text())) == set(ENVIRON)


def test_every_kind_of_channel_that_is_read_sends(tmp_path: Path) -> None:
    with HttpReceiver() as http, SmtpReceiver() as smtp:
        text = (
            SLACK
            + EMAIL.replace("smtp.example.com", "127.0.0.1")
            + f'port = {smtp.port}\ntls = "none"\n'
            + WEBHOOK.replace("https://hooks.example.com", f"{http.url}/hook")
            + PAGER
            + f'url = "{http.url}/v2/enqueue"\n'
            + ROUTE
        )
        routes = read(tmp_path, text, {**ENVIRON, "CATALOG_TEAM_SLACK_URL": f" {http.url}/slack\n"})
        for name, channel in routes.channels.items():
            assert channel.name == name
            channel.send(a_message(channel=name), 5)
        assert [request.path for request in http.effects] == ["/slack", "/hook", "/v2/enqueue"]
        assert len(smtp.mails) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = [", "is not TOML: "),
        (
            "second_between_messages = 1",
            "which is none of its keys; did you mean seconds_between_messages?",
        ),
        (
            "seconds_between_messages = -1",
            "the file: seconds_between_messages is wrong: Expected `float` >= 0.0",
        ),
        (
            "seconds_between_messages = '5'",
            "the file: seconds_between_messages is wrong: Expected `float`, got `str`",
        ),
        (
            "[reminders]\nERORR = 3",
            "[reminders] has the key 'ERORR', which is none of its keys; did you mean ERROR?",
        ),
        ("[reminders]\nERROR = -3", "[reminders]: ERROR is wrong: Expected `float` >= 0.0"),
        (SLACK, "has channels but no [[routes]]: nobody would hear of anything"),
        (SLACK + "channel = 1\n" + ROUTE, "channels.team has the key 'channel', which is none of its keys"),
        ("[channels.team]\ntype = 'slack'\n" + ROUTE, "channels.team lacks the key url"),
        (
            "[channels.team]\ntype = 'slak'\n" + ROUTE,
            "channels.team.type must be one of slack, email, webhook, pagerduty",
        ),
        ("[channels.team]\ntype = ['slack']\n" + ROUTE, "channels.team.type must be one of slack"),
        ("[channels]\nteam = 3\n" + ROUTE, "the file: channels[...] is wrong: Expected `object`, got `int`"),
        ("[channels.'my team']\n" + ROUTE, "channels.my team: a channel's name has letters, digits, - and _"),
        (
            SLACK + '[[routes]]\nchannels = ["taem"]',
            "route 1 names the channel 'taem', which is none of its channels; did you mean team?",
        ),
        (ROUTE, "route 1 names the channel 'team', but there are no channels"),
        (SLACK + ROUTE + "[[routes]]\n", "route 2 lacks the key channels"),
        (SLACK + "[[routes]]\nchannels = []", "route 1: channels is wrong"),
        (SLACK + ROUTE + "severity = ['ERR']", "route 1: severity[0] is wrong: Invalid enum value 'ERR'"),
        (
            SLACK + ROUTE + "severity = ['WARN']\nminimum_severity = 'WARN'",
            "route 1 has both severity and minimum_severity",
        ),
        (
            SLACK + ROUTE + "group = ['offers']",
            "route 1 has the key 'group', which is none of its keys; did you mean groups?",
        ),
        (SLACK + ROUTE + "default = true\ngroups = ['offers']", "route 1 is the default"),
        (SLACK + (ROUTE + "default = true\n") * 2, "has two default routes"),
        (
            SLACK + ROUTE + "groups = ['offers']",
            "has no route for ERROR without group and owner, of which nobody would hear; add [[routes]] with "
            "default = true and channels",
        ),
        (SLACK + ROUTE + "severity = ['ERROR']", "has no route for CRITICAL without group and owner"),
        (
            EMAIL.replace("smtp.example.com", "${MAIL_HOST}"),
            "channels.mail.host is to come from the environment variable MAIL_HOST, which is not set",
        ),
        (
            EMAIL.replace("b@example.com", "${CATALOG_TEAM_SLACK_URL}"),
            "channels.mail.to: '***' must be an address",
        ),
        (EMAIL + "user = 'me'\n", "channels.mail has only one of user and password"),
        (
            EMAIL.replace("a@example.com", "a@example.com\\r\\nBcc: c@example.com"),
            "channels.mail.from='a@example.com\\r\\nBcc: c@example.com' must be an address",
        ),
        (
            EMAIL.replace("b@example.com", "b@example.com, c@example.com"),
            "channels.mail.to: 'b@example.com, c@example.com' must be an address",
        ),
        (
            EMAIL.replace("smtp.example.com", "smtp.example.com/x"),
            "channels.mail.host must be the name of a mail server",
        ),
        (EMAIL + "port = 0\n", "channels.mail: port is wrong: Expected `int` >= 1"),
        (EMAIL + "tls = 'ssl'\n", "channels.mail: tls is wrong: Invalid enum value 'ssl'"),
        (
            EMAIL + "tls = 'none'\nuser = 'me'\npassword = '${SMTP_PASSWORD}'\n",
            "channels.mail would send its password unencrypted",
        ),
        (
            EMAIL + "ca_file = '/nowhere.pem'\n",
            "channels.mail.ca_file=/nowhere.pem is not a readable file of PEM certificates",
        ),
        (PAGER + "proxy = 'socks5://proxy:1'\n", "channels.pager.proxy must be an address such as http://"),
        (PAGER + "url = 'http://events.example.com'\n", "channels.pager.url must begin with https://"),
        (
            WEBHOOK.replace("https://hooks.example.com", "hooks.example.com"),
            "channels.hook.url must be a whole address",
        ),
        (
            WEBHOOK + "headers = { 'Content-Type' = '${SMTP_PASSWORD}' }\n",
            "channels.hook.headers: 'Content-Type' is no header that can be set",
        ),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text)


def test_a_file_that_is_not_there_is_told_with_one_to_start_from() -> None:
    with pytest.raises(
        InputError, match=r"^/nowhere\.toml: there is no such file; alerts\.example\.toml is one"
    ):
        read_routes("/nowhere.toml", {})


@pytest.mark.parametrize(
    ("text", "key", "variable"),
    [
        (SLACK.replace("${CATALOG_TEAM_SLACK_URL}", "SECRET"), "channels.team.url", "TEAM_URL"),
        (EMAIL + "user = 'me'\npassword = 'SECRET'\n", "channels.mail.password", "MAIL_PASSWORD"),
        (WEBHOOK.replace("${TICKET_SYSTEM_SECRET}", "SECRET"), "channels.hook.secret", "HOOK_SECRET"),
        (WEBHOOK.replace("${TICKET_SYSTEM_SECRET}", "x${SECRET}"), "channels.hook.secret", "HOOK_SECRET"),
        (WEBHOOK.replace("example.com", "example.com?token=SECRET"), "channels.hook.url", "HOOK_URL"),
        (WEBHOOK.replace("hooks.example", "me:SECRET@hooks.example"), "channels.hook.url", "HOOK_URL"),
        (PAGER + "proxy = 'http://me:SECRET@proxy:3128'\n", "channels.pager.proxy", "PAGER_PROXY"),
        (
            WEBHOOK + "headers = { Authorization = 'SECRET' }\n",
            "channels.hook.headers.Authorization",
            "HOOK_HEADERS_AUTHORIZATION",
        ),
        (
            PAGER.replace("${PAGERDUTY_ROUTING_KEY}", "SECRET"),
            "channels.pager.routing_key",
            "PAGER_ROUTING_KEY",
        ),
    ],
)
def test_a_secret_in_the_file_is_refused_with_what_to_write_instead(
    tmp_path: Path, text: str, key: str, variable: str
) -> None:
    told = problem(tmp_path, text)
    assert told == (
        f"{key} is a secret and does not belong in a file: write {key.rpartition('.')[2]} = "
        f'"${{{variable}}}" and set the environment variable {variable} (any name will do)'
    )


def test_any_text_may_refer_to_variables(tmp_path: Path) -> None:
    with SmtpReceiver() as smtp:
        environ = {"HOST": " 127.0.0.1\n", "TEAM": "team-x", "DOMAIN": "example.org", "TLS": "none"}
        text = (
            EMAIL.replace("smtp.example.com", "${HOST}")
            .replace("a@example.com", "Alerts <a@${DOMAIN}>")
            .replace("b@example.com", "${TEAM}@${DOMAIN}")
        )
        text += f'tls = "${{TLS}}"\nport = {smtp.port}\n'
        route = '[[routes]]\nchannels = ["mail"]\n'
        text += f'{route}groups = ["${{TEAM}}"]\n{route}minimum_severity = "ERROR"\n'
        routes = read(tmp_path, text, environ)
        routes.channels["mail"].send(a_message(channel="mail"), 5)
        (mail,) = smtp.mails
    assert (mail.sender, mail.recipients) == ("a@example.org", ["team-x@example.org"])
    assert [routes.channels_for("WARN", group, []) for group in ("team-x", "team-y")] == [["mail"], []]


def test_texts_are_kept_free_of_what_the_file_refers_to(tmp_path: Path) -> None:
    routes = read(tmp_path, SLACK + WEBHOOK + ROUTE, {**ENVIRON, "TICKET_SYSTEM_SECRET": "a key"})
    hook = ENVIRON["CATALOG_TEAM_SLACK_URL"]
    assert routes.without_secrets(f"{hook} XXXXXXXXXXXXXXXX, a key") == "*** ***, a key"


@pytest.mark.parametrize("environ", [{}, {"CATALOG_TEAM_SLACK_URL": ""}])
def test_a_variable_that_is_not_set_is_named(tmp_path: Path, environ: dict[str, str]) -> None:
    assert problem(tmp_path, SLACK + ROUTE, environ) == (
        "channels.team.url is to come from the environment variable CATALOG_TEAM_SLACK_URL, which is not set"
    )


SECRETS = st.text(alphabet="abcXYZ0189-_+=.~%!é \n", min_size=10, max_size=30).filter(
    lambda secret: len(secret.strip()) >= 10
)


@given(SECRETS, st.sampled_from(["{}", "http://{}", "https://{}/x", "https://u:{}@h/", "https://h:{}/"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_problem_with_the_file_tells_a_secret(tmp_path: Path, secret: str, form: str) -> None:
    path = tmp_path / "alerts.toml"
    environ: dict[str, Any] = dict.fromkeys(ENVIRON, form.format(secret))
    for channel in (
        SLACK,
        EMAIL + "user = 'me'\npassword = '${SMTP_PASSWORD}'\n",
        WEBHOOK + "headers = { Authorization = '${TICKET_SYSTEM_AUTHORIZATION}' }\n",
        WEBHOOK.replace("https://hooks.example.com", "${CATALOG_TEAM_SLACK_URL}"),
        PAGER,
    ):
        # Of a channel that is right, something else is wrong: nobody routes to it.
        path.write_text(channel)
        with pytest.raises(InputError) as caught:
            read_routes(str(path), environ)
        error = caught.value
        told = str(error) + "".join(traceback.TracebackException.from_exception(error).format())
        assert secret.strip() not in told
        assert error.__context__ is None


def test_channels_and_routes_show_no_secret(tmp_path: Path) -> None:
    routes = read(tmp_path, EXAMPLE.read_text())
    shown = repr(routes.channels) + str([vars(channel) for channel in routes.channels.values()])
    assert not any(secret in shown for secret in ENVIRON.values())


def test_reminders_that_are_given_change_nothing_else(tmp_path: Path) -> None:
    routes = read(tmp_path, SLACK + ROUTE + "[reminders]\nWARN = 72\nERROR = 0\n")
    assert routes.reminder_hours == {"WARN": 72, "CRITICAL": 24}


@given(
    st.lists(
        st.builds(
            Route,
            channels=st.lists(st.sampled_from("abcd"), min_size=1, max_size=3),
            severities=st.sets(st.sampled_from(SEVERITIES)),
            groups=st.sets(st.sampled_from(["offers", "models"])),
            owners=st.sets(st.sampled_from(["team:x", "team:y"])),
        ),
        max_size=4,
    ),
    st.sampled_from(SEVERITIES),
    st.sampled_from(["offers", "models", None]),
    st.sets(st.sampled_from(["team:x", "team:y", "z@example.com"])),
)
def test_all_routes_that_match_apply_once_and_the_default_only_else(
    routes: list[Route], severity: Severity, group: str | None, owners: set[str]
) -> None:
    found = Routes(routes=routes, default=["fallback"]).channels_for(severity, group, sorted(owners))
    matching = [
        route
        for route in routes
        if severity in route.severities
        and (not route.groups or group in route.groups)
        and (not route.owners or route.owners & owners)
    ]
    assert len(found) == len(set(found))
    assert set(found) == ({name for route in matching for name in route.channels} or {"fallback"})
