"""Channels that do not take what people are to be told: who listens at another one hears of it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

from offer_assets.wording import COMMAND, iso, sentences, unix
from resources.alerts import ChannelState, News

_INCIDENT = "channel:"
_WAITS_TOO_LONG_SECONDS = 3600.0
"""Shorter outages end by themselves, and a message about them would come after their end."""


def channel_news(states: Sequence[ChannelState], open_incidents: Collection[str], now: float) -> list[News]:
    """What is to be told of the channels.

    Args:
        states: Of all of them.
        open_incidents: Keys of the incidents that are open.
        now: Unix time.
    """
    news = [_silent(state, now) for state in states if state.set_aside or _late_since(state, now)]
    silent = {item.incident for item in news}
    over = [key for key in open_incidents if key.startswith(_INCIDENT) and key not in silent]
    return news + [
        News(
            id=f"{incident}:resolved:{now:.3f}",
            incident=incident,
            state="resolved",
            text="It takes its messages again.",
            at=iso(now),
        )
        for incident in over
    ]


def _late_since(state: ChannelState, now: float) -> str:
    """Time since which a message waits for too long; empty if none does."""
    since = state.waiting_since
    return since if since and now - unix(since) > _WAITS_TOO_LONG_SECONDS else ""


def _silent(state: ChannelState, now: float) -> News:
    late = _late_since(state, now)
    incident = f"{_INCIDENT}{state.channel}"
    since = f", the oldest since {late}" if late else ""
    reason = f": {state.last_error}" if state.last_error else ""
    return News(
        # Equal while nothing changes: then it stays closed once somebody has closed it by hand.
        id=f"{incident}:{late}:{state.set_aside}",
        incident=incident,
        state="failing",
        title=f"The channel {state.channel} does not take its messages",
        text=sentences(
            f"{state.waiting} waiting{since}{reason}",
            f"Who listens there does not hear of it; they are tried again. See `{COMMAND} --channels` and "
            f"`{COMMAND} --send-test {shlex.quote(state.channel)}`.",
        ),
        at=iso(now),
    )
