"""A channel that takes nothing is an incident, as those who listen there cannot know."""

from __future__ import annotations

import pytest

from offer_assets.silent_channels import channel_news
from offer_assets.wording import iso
from resources.alerts import ChannelState

NOW = 1_790_000_000.0


def channel(waits_for: float | None, set_aside: int = 0) -> ChannelState:
    """That has had a message waiting for so many seconds, or none."""
    return ChannelState(
        channel="slack",
        sent=1,
        waiting=set_aside + (waits_for is not None),
        waiting_since=iso(NOW - waits_for) if waits_for is not None else "",
        set_aside=set_aside,
        last_error="answered 404 Not Found",
    )


@pytest.mark.parametrize(
    ("state", "is_silent"),
    [
        (channel(None), False),
        (channel(3599), False),
        (channel(3601), True),
        (channel(None, set_aside=1), True),
    ],
)
def test_a_channel_is_silent_when_a_message_waits_for_an_hour_or_was_set_aside(
    state: ChannelState, is_silent: bool
) -> None:
    news = channel_news([state], [], NOW)
    assert [(item.incident, item.state, item.severity) for item in news] == (
        [("channel:slack", "failing", "ERROR")] if is_silent else []
    )


def test_it_says_since_when_and_why_and_what_to_do() -> None:
    (news,) = channel_news([channel(7200)], [], NOW)
    assert news.title == "The channel slack does not take its messages"
    assert news.text.startswith(f"1 waiting, the oldest since {iso(NOW - 7200)}: answered 404 Not Found. ")
    assert "python -m offer_assets alerts --send-test slack" in news.text


def test_it_is_over_when_the_messages_are_taken_or_the_channel_is_gone() -> None:
    for states in ([channel(60)], []):
        (news,) = channel_news(states, ["channel:slack", "run:a"], NOW)
        assert (news.incident, news.state) == ("channel:slack", "resolved")


def test_while_nothing_changes_it_is_the_same_news() -> None:
    first, second = (channel_news([channel(waits, 1)], [], NOW + waits)[0] for waits in (7200, 9000))
    assert first.id != second.id
    later = channel_news([channel(7200, 1)], [], NOW + 30)[0]
    assert later.id == channel_news([channel(7200, 1)], [], NOW)[0].id
