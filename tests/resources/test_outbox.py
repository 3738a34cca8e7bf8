"""What was told reaches every channel once, in order, whatever fails or is killed; on both databases."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.errors import InputError
from resources.alert_routes import Route, Routes
from resources.alerting import channel_states, deliver
from resources.alerts import Delivery, Moved, News
from resources.channels import ChannelError, Message
from resources.outbox import Outbox
from resources.outbox_database import OutboxDatabase, batches, facts, incidents, notifications
from tests.resources.alert_channels import Heard, Receiver
from tests.resources.outbox_daemon import INCIDENTS, open_only, run_daemon, story

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
START = 1_800_000_000.0


def failing(incident: str, number: object = 1, severity: str = "ERROR", **more: Any) -> News:
    text = {"title": f"{incident} is red", "text": "look at it", **more}
    return News(id=f"{incident}/{number}", incident=incident, state="failing", severity=severity, **text)


def resolved(incident: str, number: object = "over", **more: Any) -> News:
    return News(id=f"{incident}/{number}", incident=incident, state="resolved", **more)


class World:
    """An outbox with its clock, and channels that everything is routed to."""

    def __init__(self, url: str, names: tuple[str, ...] = ("people",), **routes: Any) -> None:
        self.url = url
        self.now = START
        self.outbox = self.another_process()
        self.channels = {name: Heard(name) for name in names}
        pauses = {"seconds_between_messages": MINUTE, "gather_seconds": 0.0}
        self.routes = Routes(self.channels, **{"default": names, **pauses} | routes)

    def another_process(self) -> Outbox:
        return Outbox(self.url, clock=lambda: self.now, chance=lambda: 0.5)

    def routed(self, *names: str, **routes: Any) -> None:
        """The routes are changed: these channels hear of everything."""
        self.channels |= {name: Heard(name) for name in names if name not in self.channels}
        known = {name: self.channels[name] for name in names}
        self.routes = Routes(known, **{"default": names, "gather_seconds": 0.0} | routes)

    def tell(self, *news: News, **bookmarks: str) -> list[News]:
        return self.outbox.tell(news, bookmarks, self.routes)

    def deliver(self, after: float = 0.0) -> Delivery:
        self.now += after
        return deliver(self.outbox, self.routes, seconds=10)

    def told(self, name: str = "people") -> list[tuple[str, str]]:
        return self.channels[name].told


@pytest.fixture(autouse=True, scope="module")
def _disks_that_need_no_time() -> Iterator[None]:
    """No test here cuts the power."""

    def hurry(connection: Any, *_: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    sa.event.listen(sa.pool.Pool, "checkout", hurry)
    yield
    sa.event.remove(sa.pool.Pool, "checkout", hurry)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        found: str = request.getfixturevalue("postgres_url")
        return found
    return f"sqlite:///{tmp_path}/outbox.db"


@pytest.fixture
def world(url: str) -> World:
    return World(url)


def down(_: Message) -> None:
    raise ChannelError("nobody answers")


def refuse(_: Message) -> None:
    raise ChannelError("no such recipient", permanent=True)


# Incidents


def test_an_incident_opens_once_however_often_it_is_found(world: World) -> None:
    (news,) = world.tell(failing("a", 1, at="2026-11-04T10:00:00+00:00"))
    assert world.tell(failing("a", 2, text="still red", at="2026-11-04T11:00:00+01:00")) == []
    assert world.tell(failing("a", 3, text="", at="2026-11-04T12:00:00+00:00")) == []
    (incident,) = world.outbox.incidents()
    assert (news.id, incident.key, incident.number, incident.state, incident.times) == (
        "a/1",
        "a",
        1,
        "open",
        3,
    )
    assert (incident.title, incident.text) == ("a is red", "still red")
    assert (incident.opened_at, incident.last_at) == (
        "2026-11-04T10:00:00+00:00",
        "2026-11-04T12:00:00+00:00",
    )
    world.deliver()
    assert world.told() == [("opened", "a")]


def test_news_that_is_told_again_counts_once(world: World) -> None:
    assert len(world.tell(failing("a"), failing("a"))) == 1
    assert world.tell(failing("a")) == []
    world.tell(resolved("a"))
    assert world.tell(failing("a"), resolved("a")) == []
    assert world.outbox.incidents() == []
    (incident,) = world.outbox.incidents(all_of_them=True)
    assert incident.times == 1


def test_an_incident_that_opens_again_gets_the_next_number(world: World) -> None:
    world.tell(failing("a", 1), resolved("a", 2), failing("a", 3))
    world.tell(resolved("a", 4), failing("a", 5))
    assert [(one.number, one.state) for one in world.outbox.incidents(all_of_them=True)] == [
        (1, "resolved"),
        (2, "resolved"),
        (3, "open"),
    ]
    world.deliver()
    assert [(line.kind, line.number) for line in world.channels["people"].lines] == [
        ("opened", 1),
        ("resolved", 1),
        ("opened", 2),
        ("resolved", 2),
        ("opened", 3),
    ]


def test_what_was_not_open_is_not_resolved(world: World) -> None:
    assert world.tell(resolved("a")) == []
    assert world.outbox.incidents(all_of_them=True) == []


def test_a_resolution_says_what_is_resolved(world: World) -> None:
    world.tell(failing("a", severity="CRITICAL", asset="offers", link="/assets/offers"))
    (news,) = world.tell(resolved("a", text="green again"))
    assert (news.title, news.severity, news.asset) == ("a is red", "CRITICAL", "offers")
    world.deliver()
    opened, line = world.channels["people"].lines
    assert (line.kind, line.title, line.text) == ("resolved", "a is red", "green again")
    assert opened.text == "look at it"


def test_severity_only_rises_and_each_rise_is_told_once(world: World) -> None:
    assert len(world.tell(failing("a", 1, "WARN"), failing("a", 2, "CRITICAL"))) == 2
    assert world.tell(failing("a", 3, "ERROR"), failing("a", 4, "CRITICAL")) == []
    assert [one.severity for one in world.outbox.incidents()] == ["CRITICAL"]
    world.deliver()
    assert world.told() == [("opened", "a"), ("worse", "a")]


def test_a_notice_is_told_once_and_is_over(world: World) -> None:
    assert len(world.tell(News(id="n", incident="promoted", state="notice", title="version 3 serves"))) == 1
    world.deliver()
    world.deliver(after=30 * DAY)
    assert world.told() == [("notice", "promoted")]
    assert world.outbox.incidents() == []
    assert [one.state for one in world.outbox.incidents(all_of_them=True)] == ["notice"]


def test_the_oldest_incident_comes_first(world: World) -> None:
    for number, time_of_day in enumerate(("10:00:00.5", "10:00:00", "09:00:00")):
        world.tell(failing(f"c{number}", at=f"2026-11-04T{time_of_day}+00:00"))
    assert [incident.key for incident in world.outbox.incidents()] == ["c2", "c1", "c0"]


def test_bookmarks_are_kept_with_the_news(world: World) -> None:
    assert world.outbox.bookmark("checks") is None
    world.tell(failing("a"), checks="17")
    world.tell(checks="18", runs="x")
    assert (world.outbox.bookmark("checks"), world.outbox.bookmark("runs")) == ("18", "x")


def test_who_has_been_overtaken_keeps_nothing_and_reads_again(world: World) -> None:
    bookmarks = {"checks": "17"}
    world.outbox.tell([failing("a")], bookmarks, world.routes, {"checks": None, "runs": None})
    for expected in ({"checks": None}, {"checks": "16"}, {"checks": "17", "runs": "1"}):
        with pytest.raises(Moved, match="was read on by somebody else"):
            world.outbox.tell([resolved("a")], {"checks": "18"}, world.routes, expected)
    assert [incident.key for incident in world.outbox.incidents()] == ["a"]
    assert world.outbox.bookmark("checks") == "17"
    assert len(world.outbox.tell([resolved("a")], {"checks": "18"}, world.routes, bookmarks)) == 1


def open_and_shut(world: World, *numbers: int, pause: float = 5 * MINUTE) -> None:
    for number in numbers:
        world.tell(failing("a", number))
        world.tell(resolved("a", f"{number} over"))
        world.now += pause


def test_what_comes_and_goes_all_the_time_is_told_as_one_incident_until_it_is_quiet(world: World) -> None:
    open_and_shut(world, 1, 2, 3)
    (told,) = world.tell(failing("a", 4))
    assert told.text == (
        "It opened 4 times within an hour (flapping), and stays open until nothing was found for 30 min. "
        "look at it"
    )
    assert world.tell(resolved("a", "4 over")) == []
    for number in range(5, 9):
        world.deliver(after=29 * MINUTE)
        assert world.tell(failing("a", number), resolved("a", f"{number} over")) == []
    world.deliver(after=29 * MINUTE)
    assert world.told() == [("opened", "a"), ("resolved", "a")] * 3 + [("opened", "a")]
    world.tell(resolved("a", "over again"))
    world.deliver(after=MINUTE)
    assert world.told()[-1] == ("resolved", "a")
    assert world.channels["people"].lines[-1].text == "Nothing was found for 30 min."
    assert world.outbox.incidents() == []


def test_what_flaps_and_still_fails_stays_open_and_a_person_can_end_it(world: World) -> None:
    open_and_shut(world, 1, 2, 3)
    world.tell(failing("a", 4), resolved("a", "4 over"), failing("a", 5))
    world.deliver(after=HOUR)
    assert len(world.outbox.incidents()) == 1
    assert len(world.tell(resolved("a", "by hand", by_hand=True))) == 1
    assert world.outbox.incidents() == []


def test_what_opens_again_now_and_then_does_not_flap(world: World) -> None:
    open_and_shut(world, *range(6), pause=21 * MINUTE)
    assert [one.state for one in world.outbox.incidents(all_of_them=True)] == ["resolved"] * 6


def test_news_without_an_id_is_a_mistake_of_the_program_and_nothing_is_kept(world: World) -> None:
    with pytest.raises(ValueError, match="needs an id"):
        world.tell(failing("a"), News(id="", incident="b", state="failing"), checks="1")
    assert world.outbox.incidents() == []
    assert world.outbox.bookmark("checks") is None


def test_secrets_and_what_no_database_takes_stay_out(world: World) -> None:
    secret = "https://me:hidden@example.com/t?token=hidden"
    texts = {"title": f"one\nline of {secret}", "text": f"\x00\ud800 {secret}", "link": "/r?token=hidden"}
    (told,) = world.tell(failing(f"source:{secret}", **texts, at="yesterday", owners=("team:\x00",)))
    world.deliver()
    kept = repr((told, world.outbox.incidents(), world.channels["people"].messages)).replace(told.id, "")
    assert "hidden" not in kept
    assert told.title == "one line of https://***@example.com/t?token=***"
    assert told.text == "\ufffd? https://***@example.com/t?token=***"


def test_what_the_channels_keep_secret_is_in_no_text_and_no_key(world: World) -> None:
    world.routes = Routes(world.channels, default=["people"], gather_seconds=0, secrets=["hidden in plain"])
    text = "it said hidden in plain, hidden%20in%20plain"
    world.tell(failing(f"key: {text}", title=text, text=text, link=f"/{text}"))
    world.deliver()
    kept = repr((world.outbox.incidents(), world.channels["people"].messages))
    assert "hidden" not in kept
    assert "it said ***, ***" in kept


def test_texts_are_of_bearable_length_and_long_keys_stay_apart(world: World) -> None:
    long = "k" * 5000
    world.tell(failing(long + "1", title=long, text=long * 9), failing(long + "2"))
    one, two = world.outbox.incidents()
    assert (len(one.key), len(one.title), len(one.text)) == (300, 300, 10_000)
    assert one.key != two.key
    assert len(world.tell(resolved(long + "1"))) == 1


def test_links_lead_to_the_ui(world: World) -> None:
    world.routed("people", ui_url="https://dagster.example.com/")
    world.tell(failing("a", link="/assets/a"), failing("b", link="https://elsewhere/x"), failing("c"))
    world.deliver()
    assert [line.link for line in world.channels["people"].lines] == [
        "https://dagster.example.com/assets/a",
        "https://elsewhere/x",
        "",
    ]


def test_the_newest_run_is_kept_beside_the_link(world: World) -> None:
    world.routed("people", ui_url="https://dagster.example.com/", seconds_between_messages=0)
    world.tell(failing("a", link="/assets/a", run="1"))
    world.tell(failing("a", 2), failing("a", 3, "CRITICAL", run="3"), failing("b"))
    assert [incident.run for incident in world.outbox.incidents()] == ["3", None]
    world.tell(resolved("a", run="4"))
    world.deliver()
    runs = [(line.kind, line.run_link) for line in world.channels["people"].lines]
    assert runs == [
        ("opened", "https://dagster.example.com/runs/1"),
        ("worse", "https://dagster.example.com/runs/3"),
        ("opened", ""),
        ("resolved", "https://dagster.example.com/runs/4"),
    ]


# Messages


def test_500_failing_checks_are_one_message_with_500_lines(world: World) -> None:
    assert len(world.tell(*(failing(f"c{number}") for number in range(500)))) == 500
    world.deliver()
    (message,) = world.channels["people"].messages
    assert [line.incident for line in message.lines] == [f"c{number}" for number in range(500)]


def test_what_opens_and_ends_before_it_is_sent_is_in_one_message(world: World) -> None:
    world.tell(failing("a"))
    world.tell(resolved("a"))
    world.deliver()
    (message,) = world.channels["people"].messages
    assert [line.kind for line in message.lines] == ["opened", "resolved"]


def test_between_messages_there_is_a_pause_and_then_one_digest(world: World) -> None:
    world.tell(failing("a"))
    world.deliver()
    for number in range(10):
        world.tell(failing(f"b{number}"))
        assert world.deliver(after=1).sent == ()
    assert world.outbox.channels(["people"])[0].waiting == 1
    (line,) = world.deliver(after=50).sent
    assert line == "people: opened: b0 is red (and 9 more)"


def test_a_message_waits_for_what_comes_with_it(world: World) -> None:
    world.routed("people", gather_seconds=30.0)
    world.tell(failing("a"))
    assert world.deliver().sent == ()
    world.tell(failing("b"))
    assert world.deliver(after=29).sent == ()
    assert world.deliver(after=1).sent == ("people: opened: a is red (and 1 more)",)


def test_what_is_critical_does_not_wait_and_takes_the_rest_along(world: World) -> None:
    world.routed("people", gather_seconds=30.0)
    world.tell(failing("a"))
    world.tell(failing("b", severity="CRITICAL"))
    assert world.deliver().sent == ("people: opened: a is red (and 1 more)",)


def test_without_channels_everything_is_kept_and_nobody_is_told(world: World) -> None:
    world.routes = Routes()
    assert len(world.tell(failing("a"))) == 1
    assert world.deliver() == Delivery(sent=(), failed=(), waiting=0)
    assert len(world.outbox.incidents()) == 1


def test_a_very_long_queue_becomes_several_messages(world: World) -> None:
    world.tell(*(failing(f"c{number}") for number in range(2100)))
    assert world.outbox.channels([])[0].waiting == 3
    for _ in range(3):
        world.deliver(after=MINUTE)
    assert [len(message.lines) for message in world.channels["people"].messages] == [1000, 1000, 100]


# Routes


def test_the_end_is_told_to_who_heard_of_the_beginning(world: World) -> None:
    world.routed("people", "pager", default=["pager"], routes=[Route(["people"], groups=["monitoring"])])
    world.tell(failing("a", group="monitoring"), failing("b"))
    world.deliver()
    world.routed("people", "pager", default=["pager"])
    world.tell(resolved("a"), resolved("b"))
    world.deliver(after=MINUTE)
    assert world.told("people") == [("opened", "a"), ("resolved", "a")]
    assert world.told("pager") == [("opened", "b"), ("resolved", "b")]


def test_what_becomes_worse_reaches_its_channels_and_those_for_the_worse(world: World) -> None:
    worst = Route(["pager"], severities=["CRITICAL"])
    world.routed("people", "pager", routes=[worst], default=["people"])
    world.tell(failing("a"))
    world.tell(failing("a", 2, "CRITICAL"))
    world.tell(resolved("a"))
    world.deliver()
    assert world.told("people") == [("opened", "a"), ("worse", "a"), ("resolved", "a")]
    assert world.told("pager") == [("worse", "a"), ("resolved", "a")]


def test_what_waits_for_a_channel_that_is_removed_is_shown_and_sent_when_it_is_back(world: World) -> None:
    world.routed("people", "pager")
    world.tell(failing("a"))
    world.routed("people")
    world.deliver()
    world.deliver(after=30 * DAY)
    assert (world.told("pager"), world.deliver().waiting) == ([], 0)
    _, pager = channel_states(world.outbox, world.routes)
    assert (pager.channel, pager.waiting) == ("pager", 1)
    assert "not among the channels any more" in pager.last_error
    world.routed("people", "pager")
    world.deliver()
    assert world.told("pager") == [("opened", "a")]


def test_a_channel_that_is_added_hears_of_new_things_and_in_reminders_of_open_ones(world: World) -> None:
    world.tell(failing("a"))
    world.deliver()
    world.routed("people", "new")
    world.tell(failing("b"))
    world.deliver(after=MINUTE)
    assert world.told("new") == [("opened", "b")]
    world.deliver(after=DAY)
    assert world.told("new") == [("opened", "b"), ("reminder", "a"), ("reminder", "b")]
    world.tell(resolved("a"))
    world.deliver(after=MINUTE)
    assert world.told("new")[-1] == ("resolved", "a")


# Reminders


def test_people_are_reminded_of_what_stays_open_and_only_of_that(world: World) -> None:
    world.tell(failing("a"), failing("b"), failing("mild", severity="WARN"))
    world.deliver()
    world.tell(resolved("b"))
    world.deliver(after=DAY - 1)
    del world.channels["people"].messages[:]
    world.deliver(after=1)
    assert world.told() == []
    world.deliver(after=MINUTE)
    assert world.told() == [("reminder", "a")]
    world.deliver(after=DAY - MINUTE)
    world.deliver(after=MINUTE)
    assert world.told() == [("reminder", "a")] * 2


def test_reminders_that_are_due_soon_after_each_other_come_together(world: World) -> None:
    for number in range(4):
        world.now = START + number * HOUR
        world.tell(failing(f"c{number}"))
        world.deliver()
    del world.channels["people"].messages[:]
    world.now = START + DAY
    world.deliver()
    (message,) = world.channels["people"].messages
    assert [line.incident for line in message.lines] == ["c0", "c1", "c2", "c3"]


def test_two_processes_remind_once(world: World) -> None:
    world.tell(*(failing(f"c{number}") for number in range(20)))
    world.deliver()
    world.now += DAY
    processes = [world.another_process() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        reminded = list(threads.map(lambda outbox: outbox.remind(world.routes), processes))
    assert sorted(reminded) == [0, 0, 0, 20]


def test_a_channel_that_is_down_is_not_reminded_of_what_it_has_not_heard(world: World) -> None:
    world.channels["people"].trouble = down
    world.tell(failing("a"))
    for _ in range(10):
        world.deliver(after=DAY)
    world.channels["people"].trouble = None
    world.deliver(after=HOUR)
    world.deliver(after=HOUR)
    assert world.told() == [("opened", "a")]


# Channels that are down


def test_a_channel_that_is_down_is_tried_ever_more_slowly_and_gets_the_same_message(world: World) -> None:
    people = world.channels["people"]
    people.trouble = down
    world.tell(failing("a"))
    times = []
    while len(people.tries) < 7:
        before = len(people.tries)
        world.deliver(after=45)
        if len(people.tries) > before:
            times.append(world.now)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == [45, 90, 180, 360, 720, 1350]
    world.tell(failing("b"))
    assert world.deliver(after=HOUR).failed == ("people: nobody answers",)
    state = world.outbox.channels(["people"])[0]
    assert (state.sent, state.waiting, state.last_error) == (0, 2, "nobody answers")
    people.trouble = None
    world.deliver(after=HOUR)
    world.deliver(after=HOUR)
    assert world.told() == [("opened", "a"), ("opened", "b")]
    assert {message.id for message in people.tries[:-1]} == {people.messages[0].id}
    assert all(message == people.messages[0] for message in people.tries[:-1])


@pytest.mark.parametrize(
    ("chance", "attempt", "pause"), [(0, 1, 30), (1, 1, 60), (0, 99, 900), (1, 99, 1800)]
)
def test_attempts_are_spread_between_half_a_minute_and_half_an_hour(
    tmp_path: Path, chance: float, attempt: int, pause: float
) -> None:
    outbox = Outbox(f"sqlite:///{tmp_path}/outbox.db", clock=lambda: START, chance=lambda: chance)
    outbox.tell([failing("a")], {}, Routes({"people": Heard("people")}, default=["people"]))
    leased = outbox.lease("people")
    assert leased is not None
    with OutboxDatabase(f"sqlite:///{tmp_path}/outbox.db").writing() as connection:
        connection.execute(batches.update().values(attempts=attempt))
    late = type(leased)(message=leased.message, owner=leased.owner, attempt=attempt)
    outbox.failed(late, "down")
    with OutboxDatabase(f"sqlite:///{tmp_path}/outbox.db").reading() as connection:
        assert connection.execute(sa.select(batches.c.next_attempt_at)).scalar() == START + pause


def test_a_channel_that_asks_for_a_pause_gets_it(world: World) -> None:
    def busy(_: Message) -> None:
        raise ChannelError("too many", retry_after=300)

    world.channels["people"].trouble = busy
    world.tell(failing("a"))
    world.deliver()
    world.deliver(after=299)
    assert len(world.channels["people"].tries) == 1
    world.deliver(after=1)
    assert len(world.channels["people"].tries) == 2


def test_a_message_that_is_refused_holds_up_no_other_and_is_tried_slowly(world: World) -> None:
    people = world.channels["people"]
    people.trouble = refuse
    world.tell(failing("bad"))
    assert world.deliver().failed == ("people: no such recipient",)
    people.trouble = None
    world.tell(failing("good"), resolved("bad"))
    world.deliver(after=MINUTE)
    assert world.told() == [("opened", "good")]
    assert world.outbox.channels([])[0].last_error == "no such recipient"
    world.deliver(after=29 * MINUTE)
    world.deliver(after=MINUTE)
    assert world.told() == [("opened", "good"), ("opened", "bad"), ("resolved", "bad")]


def test_a_channel_that_refuses_everything_gets_one_digest_when_it_is_mended(world: World) -> None:
    people = world.channels["people"]
    people.trouble = refuse
    for number in range(30):
        world.tell(failing(f"c{number}"))
        world.deliver(after=4 * MINUTE)
    assert len(people.tries) == 2 * 4
    people.trouble = None
    for _ in range(4):
        world.deliver(after=HOUR / 4)
    assert len(people.messages) == 3
    assert sorted(line.incident for line in people.lines) == sorted(f"c{number}" for number in range(30))


def test_messages_that_are_refused_again_and_again_are_set_aside_and_the_queue_goes_on(url: str) -> None:
    world = World(url, reminder_hours={})
    people = world.channels["people"]

    def refuse_the_bad(message: Message) -> None:
        if any(line.incident.startswith("bad") for line in message.lines):
            raise ChannelError("too odd", permanent=True)

    people.trouble = refuse_the_bad
    for key in ("bad1", "bad2", "good"):
        world.tell(failing(key))
        world.deliver(after=MINUTE)
    assert world.told() == []
    for _ in range(11):
        world.deliver(after=HOUR / 2)
    assert world.told() == [("opened", "good")]
    world.tell(resolved("bad1"), failing("fine"))
    world.deliver(after=HOUR)
    assert world.told() == [("opened", "good"), ("opened", "fine")]
    (state,) = world.outbox.channels(["people"])
    assert (state.waiting, state.set_aside, state.waiting_since, state.last_error) == (3, 2, "", "too odd")
    tries = len(people.tries)
    world.deliver(after=22 * HOUR)
    assert len(people.tries) == tries
    world.deliver(after=HOUR)
    assert len(people.tries) == tries + 2
    people.trouble = None
    world.deliver(after=DAY)
    world.deliver(after=MINUTE)
    assert world.told()[2:] == [("opened", "bad1"), ("opened", "bad2"), ("resolved", "bad1")]


def test_a_channel_says_since_when_its_oldest_message_waits(world: World) -> None:
    def since() -> str:
        return world.outbox.channels(["people"])[0].waiting_since

    assert since() == ""
    world.channels["people"].trouble = down
    world.tell(failing("a"))
    begun = since()
    assert begun == "2027-01-15T08:00:00+00:00"
    world.deliver(after=MINUTE)
    world.tell(failing("b"))
    world.deliver(after=HOUR)
    assert since() == "2027-01-15T08:01:00+00:00"  # since it became a message
    world.channels["people"].trouble = None
    world.deliver(after=HOUR)
    world.deliver(after=HOUR)
    assert since() == ""


def test_a_message_belongs_to_one_sender_at_a_time(world: World) -> None:
    world.tell(failing("a"))
    senders = [world.another_process() for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        leased = [found for found in threads.map(lambda outbox: outbox.lease("people"), senders) if found]
    assert len(leased) == 1


def test_a_sender_that_dies_loses_the_message_and_the_next_one_sends_it_under_the_same_id(
    world: World,
) -> None:
    world.tell(failing("a"))
    first = world.outbox.lease("people")
    world.now += 119
    assert world.outbox.lease("people") is None
    world.now += 1
    second = world.another_process().lease("people")
    assert first is not None
    assert second is not None
    assert (second.message, second.attempt) == (first.message, 2)
    world.outbox.failed(first, "too late to count")
    assert world.outbox.channels([])[0].last_error == ""
    world.outbox.sent(first)  # it was only slow: the channel has it
    world.outbox.sent(second)
    assert world.outbox.channels(["people"])[0].sent == 1
    world.now += HOUR
    assert world.outbox.lease("people") is None


# Pages


def test_what_comes_in_one_message_is_one_page_until_all_of_it_is_over(world: World) -> None:
    world.tell(failing("a"), failing("b"))
    world.deliver()
    world.tell(failing("alone"))
    world.deliver(after=MINUTE)
    world.tell(resolved("a"), failing("b", 2, "CRITICAL"))
    world.deliver(after=MINUTE)
    world.tell(resolved("b"), resolved("alone"))
    world.deliver(after=MINUTE)
    opening, alone, first, last = world.channels["people"].messages
    pages = [[line.page_key for line in message.lines] for message in (opening, alone, first, last)]
    assert pages == [[opening.id] * 2, ["alone"], [opening.id] * 2, [opening.id, "alone"]]
    assert [message.open_page_keys for message in (opening, alone, first, last)] == [
        (opening.id,),
        ("alone",),
        (opening.id,),
        (),
    ]


# What is kept, and for how long


def test_news_is_forgotten_30_days_after_it_was_told_for_the_last_time(world: World) -> None:
    notices = [News(id=name, incident=name, state="notice") for name in ("once", "again and again")]
    world.tell(*notices)
    for _ in range(8):
        world.now += 5 * DAY
        assert world.tell(notices[1]) == []
    assert len(world.tell(*notices)) == 1


def test_what_was_sent_is_dropped_after_30_days_and_what_waits_never(url: str) -> None:
    world = World(url, ("people", "deaf"))
    world.channels["deaf"].trouble = down
    world.tell(failing("a"))
    world.deliver()
    world.now += 31 * DAY
    world.tell(failing("b"))
    with OutboxDatabase(url).reading() as connection:
        kept = connection.execute(sa.select(notifications.c.channel, notifications.c.incident_id)).all()
    assert sorted(kept) == [("deaf", 1), ("deaf", 2), ("people", 2)]
    world.tell(resolved("a"))
    world.channels["deaf"].trouble = None
    world.deliver(after=HOUR)
    world.deliver(after=HOUR)
    for name in world.channels:
        assert ("resolved", "a") in world.told(name)
    assert len(world.outbox.incidents(all_of_them=True)) == 2


def test_tens_of_thousands_of_old_incidents_slow_nothing_down(world: World) -> None:
    world.tell(failing("a"))
    numbers = "WITH RECURSIVE n(i) AS (SELECT 10 UNION ALL SELECT i + 1 FROM n WHERE i < 30009) "
    columns = {name: name for name in incidents.columns.keys()}  # noqa: SIM118 (columns, not their names)
    columns |= {"id": "i", "number": "i", "state": "'resolved'", "key": "'k' || (i % 299)"}
    with OutboxDatabase(world.url).writing() as connection:
        connection.execute(
            sa.text(
                f"{numbers} INSERT INTO alert_incidents ({', '.join(columns)}) "
                f"SELECT {', '.join(columns.values())} FROM alert_incidents, n"
            )
        )
        connection.execute(
            sa.text(f"{numbers} INSERT INTO alert_news_seen SELECT CAST(i AS text), {START} FROM n")
        )
    assert len(world.outbox.incidents(all_of_them=True)) == 30_001
    world.deliver()
    turns = []
    for number in range(10):
        begun = time.perf_counter()
        world.tell(failing(f"k{number}"), at=str(number))
        world.deliver(after=MINUTE)
        world.outbox.incidents()
        turns.append(time.perf_counter() - begun)
    assert min(turns) < 1  # the best of them: the machine may have other work


# Faults


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(moment: int) -> Iterator[Callable[[], None]]:
    """Whoever passes the ``moment``-th moment is killed there; statements and commits are moments."""
    passed = itertools.count()

    def pass_by(*_: object) -> None:
        if next(passed) == moment:
            raise Killed

    def commit(self: Any, connection: Any) -> None:
        pass_by()
        original(self, connection)
        pass_by()

    original = sa.engine.default.DefaultDialect.do_commit
    sa.event.listen(sa.Engine, "after_cursor_execute", pass_by)
    sa.engine.default.DefaultDialect.do_commit = commit
    try:
        yield pass_by
    finally:
        sa.engine.default.DefaultDialect.do_commit = original
        sa.event.remove(sa.Engine, "after_cursor_execute", pass_by)


def test_whatever_the_moment_of_a_kill_each_is_told_once(tmp_path: Path) -> None:
    story = [
        [failing("a"), failing("b", severity="WARN")],
        [failing("a", 2, "CRITICAL"), resolved("b"), resolved("a")],
    ]
    Outbox(f"sqlite:///{tmp_path}/empty.db").bookmark("story")
    moments = 0
    for moment in itertools.count():
        shutil.copy(tmp_path / "empty.db", tmp_path / f"{moment}.db")
        world = World(f"sqlite:///{tmp_path}/{moment}.db", seconds_between_messages=0)
        taken: dict[str, Message] = {}

        def work(world: World, taken: dict[str, Message], pass_by: Callable[[], None]) -> None:
            outbox = world.another_process()
            for number in range(int(outbox.bookmark("story") or 0), len(story) + 1):
                for part in story[number : number + 1]:
                    outbox.tell(part, {"story": str(number + 1)}, world.routes)
                while (leased := outbox.lease("people")) is not None:
                    pass_by()
                    assert taken.setdefault(leased.message.id, leased.message) == leased.message
                    pass_by()
                    outbox.sent(leased)

        was_killed = False
        with killed_at(moment) as pass_by:
            for _ in range(2):
                try:
                    work(world, taken, pass_by)
                except Killed:
                    was_killed = True
                    world.now += 120
        if not was_killed:
            break
        moments += 1
        told = [(line.kind, line.incident) for message in taken.values() for line in message.lines]
        assert sorted(told) == sorted(
            [("opened", "a"), ("opened", "b"), ("worse", "a"), ("resolved", "b"), ("resolved", "a")]
        ), f"killed at moment {moment}"
        assert world.outbox.incidents() == []
    assert moments > 40


def test_whatever_the_moment_of_a_kill_the_next_process_finds_or_makes_the_tables(tmp_path: Path) -> None:
    for moment in itertools.count():
        outbox = Outbox(f"sqlite:///{tmp_path}/{moment}.db")
        with killed_at(moment):
            try:
                outbox.bookmark("story")
            except Killed:
                pass
            else:
                break
        assert Outbox(f"sqlite:///{tmp_path}/{moment}.db").tell([failing("a")], {}, Routes())
    assert moment > 10


def test_a_transaction_that_fails_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.tell(failing("a"), story="1")
    with killed_at(5), pytest.raises(Killed):
        world.tell(failing("b"), resolved("a"), story="2")
    assert [incident.key for incident in world.outbox.incidents()] == ["a"]
    assert world.outbox.bookmark("story") == "1"
    assert len(world.tell(failing("b"), resolved("a"), story="2")) == 2


ACTIONS = st.one_of(
    st.tuples(st.just("fail"), st.sampled_from("abc"), st.sampled_from(["WARN", "ERROR", "CRITICAL"])),
    st.tuples(st.just("resolve"), st.sampled_from("abc")),
    st.tuples(st.just("deliver"), st.sampled_from([0.0, 10.0, 120.0, 2000.0, DAY])),
    st.tuples(
        st.just("trouble"), st.sampled_from(["people", "pager"]), st.sampled_from([None, down, refuse])
    ),
    st.tuples(st.just("die while sending"), st.sampled_from(["people", "pager"])),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, max_size=20))
def test_whatever_happens_every_channel_hears_each_story_whole_and_in_order(
    actions: list[tuple[Any, ...]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(f"sqlite:///{folder}/outbox.db", ("people", "pager"))
        for number, (action, *rest) in enumerate(actions):
            if action == "fail":
                world.tell(failing(rest[0], number, rest[1]))
            elif action == "resolve":
                world.tell(resolved(rest[0], number))
            elif action == "deliver":
                world.deliver(after=rest[0])
            elif action == "trouble":
                world.channels[rest[0]].trouble = rest[1]
            else:
                world.outbox.lease(rest[0])
        for channel in world.channels.values():
            channel.trouble = None
        world.tell(*(resolved(key, "at last") for key in "abc"))
        while world.deliver(after=1800).waiting:
            pass
        for channel in world.channels.values():
            for incident in world.outbox.incidents(all_of_them=True):
                told = [
                    line.kind
                    for line in channel.lines
                    if (line.incident, line.number) == (incident.key, incident.number)
                ]
                assert (told[0], told[-1]) == ("opened", "resolved")
                assert (told.count("opened"), told.count("resolved")) == (1, 1)
                assert told.count("worse") <= 2
            assert len({message.id for message in channel.messages}) == len(channel.messages)


# Processes

KILLS = 12
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.resources.outbox_daemon", "resources.alerting", "resources.outbox"])


def test_processes_that_start_at_once_find_one_outbox(url: str) -> None:
    processes = [PROCESSES.Process(target=open_only, args=(url,)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    (incident,) = Outbox(url).incidents()
    assert incident.times == 1


def test_daemons_that_are_killed_at_random_lose_and_double_nothing(url: str) -> None:
    chance = random.Random(4)
    outbox = Outbox(url)
    # Each time somewhere after so much of the story was told: however slow it goes, a daemon is at work.
    kills = sorted(chance.sample(range(1, len(story()) * 3 // 4), KILLS))
    killed_at_work = 0
    with Receiver(seed=4).running() as receiver:
        daemons = [_daemon(url, receiver.url) for _ in range(2)]
        for place in kills:
            while int(outbox.bookmark("story") or 0) < place:
                time.sleep(0.002)
            time.sleep(chance.uniform(0.0, 0.02))
            doomed, works = daemons.pop(chance.randrange(2))
            assert works.wait(60)
            doomed.kill()
            killed_at_work += not _is_all_told(url)
            doomed.join(60)
            assert doomed.exitcode == -signal.SIGKILL
            daemons.append(_daemon(url, receiver.url))
        for daemon, _ in daemons:
            daemon.join(120)
            assert daemon.exitcode == 0
        told = receiver.told
    wanted = {(kind, f"check-{number}", 1) for number in range(INCIDENTS) for kind in ("opened", "resolved")}
    assert dict(told) == dict.fromkeys(wanted, 2)  # once for each of the two channels
    assert killed_at_work == KILLS
    assert receiver.changed == []
    assert receiver.requests > len(receiver.messages)
    assert Outbox(url).incidents() == []


def _daemon(url: str, receiver: str) -> tuple[Any, Any]:
    """A daemon, and an event that tells when it has begun to work."""
    works = PROCESSES.Event()
    daemon = PROCESSES.Process(target=run_daemon, args=(url, receiver, works), daemon=True)
    daemon.start()
    return daemon, works


def _is_all_told(url: str) -> bool:
    outbox = Outbox(url)
    return not outbox.incidents() and all(not state.waiting for state in outbox.channels([]))


# A database that is not as it should be


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    file = tmp_path / "outbox.db"
    file.write_bytes(b"this was a database once, before the disk was full" * 100)
    with pytest.raises(InputError, match=r"outbox\.db is damaged .*move it away") as caught:
        Outbox(f"sqlite:///{file}").incidents()
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "outbox.db").mkdir()
    with pytest.raises(InputError, match=r"outbox\.db cannot be used: .*Make file and folder writable"):
        Outbox(f"sqlite:///{tmp_path}/outbox.db").tell([failing("a")], {}, Routes())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be made: .*Make file and folder writable"):
        Outbox(f"sqlite:///{tmp_path}/file/outbox.db").incidents()


def test_tables_of_another_version_are_refused(world: World) -> None:
    world.tell(failing("a"))
    with OutboxDatabase(world.url).writing() as connection:
        connection.execute(facts.update().where(facts.c.name == "schema_version").values(value="99"))
    with pytest.raises(InputError, match="has version 99 of its tables, and this code knows 1"):
        world.another_process().incidents()


def test_a_server_that_does_not_answer_is_an_error_that_may_pass_and_tells_no_password() -> None:
    outbox = Outbox("postgresql+psycopg2://me:hidden@127.0.0.1:1/outbox")
    with pytest.raises(dg.Failure, match="does not answer") as caught:
        outbox.bookmark("a")
    assert "hidden" not in str(caught.value)
