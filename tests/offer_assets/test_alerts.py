"""The command `alerts` says what is wrong in lines that people can read, and looks after the channels."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from offer_assets import __main__ as command_line
from resources.alerting import OutboxAlerts
from resources.alerts import ChannelState, News
from resources.channels import Channel, Message


@pytest.fixture
def outbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OutboxAlerts:
    monkeypatch.setenv("OFFER_ASSETS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USER", "anna")
    return OutboxAlerts(home=str(tmp_path / "home"))


def news(key: str, day: str, state: str = "failing") -> News:
    return News(
        id=f"{key}:{day}",
        incident=f"check:{key}",
        state=state,
        severity="WARN",
        title=f"{key} failed",
        text=f"{key} text.",
        link=f"/assets/{key}",
        at=f"2026-11-{day}T10:00:00+00:00",
    )


def test_incidents_are_listed_oldest_first(outbox: OutboxAlerts, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["alerts"]) == 0
    assert capsys.readouterr().out == "no incident is open (--all shows what was)\n"
    outbox.tell([news("a", "01"), news("b", "02"), news("b", "03"), news("a", "04", "resolved")])
    assert command_line.main(["alerts"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2026-11-02T10:00:00Z  WARN      b failed (2 times, last at 2026-11-03T10:00:00Z)",
        "    b text.",
        "    http://localhost:3000/assets/b",
        "    check:b",
        "(python -m offer_assets alerts --resolve KEY closes one by hand)",
    ]
    assert command_line.main(["alerts", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2026-11-01T10:00:00Z  WARN      resolved  a failed"
    assert lines[4].startswith("2026-11-02T10:00:00Z  WARN      open      b failed")


def test_the_run_of_an_incident_is_a_page_of_its_own(
    outbox: OutboxAlerts, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox.tell([msgspec.structs.replace(news("a", "01"), run="r1")])
    run = msgspec.structs.replace(news("b", "02"), run="r2", link="/runs/r2")
    outbox.tell([run])
    command_line.main(["alerts"])
    pages = [line.strip() for line in capsys.readouterr().out.splitlines() if "http" in line]
    assert pages == [
        "http://localhost:3000/assets/a",
        "http://localhost:3000/runs/r1",
        "http://localhost:3000/runs/r2",
    ]


def test_channels_say_since_when_messages_wait_and_which_were_set_aside(
    outbox: OutboxAlerts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ChannelState(
        channel="slack",
        sent=4,
        waiting=3,
        waiting_since="2026-11-01T10:00:00+00:00",
        set_aside=1,
        last_error="no answer",
    )
    monkeypatch.setattr(OutboxAlerts, "channels", lambda _: [state])
    assert command_line.main(["alerts", "--channels"]) == 0
    assert capsys.readouterr().out == (
        "slack: 4 sent, 3 waiting since 2026-11-01T10:00:00Z, 1 of them refused and set aside; "
        "not taken, tried again: no answer\n"
    )


def test_an_incident_that_nothing_closes_is_closed_by_hand(
    outbox: OutboxAlerts, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox.tell([news("a", "01")])
    assert command_line.main(["alerts", "--resolve", "check:b"]) == 2
    assert "no such incident is open; open are: check:a" in capsys.readouterr().err
    assert command_line.main(["alerts", "--resolve", "check:a"]) == 0
    assert outbox.incidents() == []
    assert "Closed by anna." in outbox.incidents(all_of_them=True)[0].text


def test_without_channels_the_commands_say_so(
    outbox: OutboxAlerts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["alerts", "--channels"]) == 0
    assert "there are no channels: OFFER_ASSETS_ALERT_ROUTES" in capsys.readouterr().out
    assert command_line.main(["alerts", "--deliver"]) == 0
    assert capsys.readouterr().out == "nothing to send\n"
    assert command_line.main(["alerts", "--send-test", "slack"]) == 2
    assert "--send-test slack: there is no such channel; there are: none" in capsys.readouterr().err


def test_a_test_message_goes_to_one_channel_past_the_outbox(
    outbox: OutboxAlerts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from resources.alert_routes import Routes
    from resources.transport import TransportError

    sent: list[Message] = []

    class Kept(Channel):
        def _hand_over(self, message: Message, deadline: object) -> None:
            if self.name == "down":
                raise TransportError("no answer within 5 s")
            sent.append(message)

    routes = Routes(channels={name: Kept(name, []) for name in ("up", "down")})
    monkeypatch.setattr("resources.alert_routes.read_routes", lambda *_: routes)
    assert command_line.main(["alerts", "--send-test", "up"]) == 0
    assert capsys.readouterr().out == "up took the test message\n"
    assert [line.severity for message in sent for line in message.lines] == ["WARN"]
    assert command_line.main(["alerts", "--send-test", "down"]) == 2
    assert "down did not take the test message: no answer within 5 s" in capsys.readouterr().err
    assert outbox.incidents(all_of_them=True) == []
