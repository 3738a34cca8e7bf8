"""What goes wrong, found out and told: failed checks, runs and ticks, versions that are not served.

Every source is read on from where it was left; how far is kept by the alerts, in one step with the news, so
that a crash between reading and telling loses nothing. Checks of old days do not alert: what a backfill, a
replay, or a long feed that is taken for the first time finds is no incident; a run that fails is one, of
whatever day. Who is told, and how, is decided by the routes.
"""

from __future__ import annotations

import contextlib
import datetime
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import dagster as dg
import msgspec
from dagster import AssetKey, DagsterEventType

from ml.errors import InputError
from offer_assets import policies
from offer_assets.check_outcomes import (
    Outcome,
    Slots,
    State,
    check_incident,
    day_of,
    decode_slots,
    in_order,
    is_no_answer,
    judge,
)
from offer_assets.event_log import LoggedEvent, Reading, read_events
from offer_assets.failed_runs import (
    FailedSteps,
    Piece,
    Unmade,
    decode_unmade,
    made_in,
    partition_of,
    run_error,
    run_incident,
    run_name,
    take_out,
)
from offer_assets.failed_ticks import Declared, tick_news
from offer_assets.promotion import MODEL_VERSION
from offer_assets.silent_channels import channel_news
from offer_assets.unserved_versions import is_refusal, version_news
from offer_assets.wording import COMMAND, capital, exception_line, iso, sentences, unix
from resources.alerts import Alerts, Incident, Moved, News
from resources.artifact_store import ArtifactStore
from resources.offer_feed import OfferFeed
from resources.tracking import Tracking

_T = TypeVar("_T")

ALERT_DAYS = 2
"""A failed check of a day alerts while the day is not more than so many days older than the feed's newest."""

ALERTS = dg.AssetSpec(
    "alerts",
    description="What people were told: every incident when it opened, got worse and was resolved.",
    group_name=policies.OPERATION,
    kinds={"slack", "email"},
    owners=[policies.ML_TEAM],
)
"""Its observations are the history of alerts in the UI."""

COLLECTOR, DELIVERY = "incidents", "alert_delivery"
"""The sensors that find out and that tell; each looks after the other."""

_LOOK_BACK_SECONDS = 86_400.0
"""How far the very first look goes back."""
_EVENTS_AT_ONCE = 200
"""What time is left is looked at in between, and each failed run takes up to 35 ms."""
_SECONDS_BETWEEN_LOOKS_AT_REGISTRY = 600.0
_REGISTRY_SECONDS = 20.0
"""A registry that does not answer keeps the sensor for no longer."""
_FEED_SECONDS = 5.0
"""Nor does a feed: one with large new files is read for minutes."""
_FEED_LOOK = "look for the newest day of the feed"
_EVENTS = (
    DagsterEventType.ASSET_CHECK_EVALUATION,
    DagsterEventType.RUN_FAILURE,
    DagsterEventType.RUN_SUCCESS,
)
_BACKFILL_TAG = "dagster/backfill"


class Batch(msgspec.Struct, frozen=True):
    """News, and how far its source was read for it."""

    news: list[News]
    bookmarks: dict[str, str] = {}
    expected: dict[str, str | None] = {}
    """Bookmarks from which it was read: if another process has moved one, it has told this."""


def collect(
    instance: dg.DagsterInstance,
    alerts: Alerts,
    *,
    graph: Any = None,
    offer_feed: OfferFeed | None = None,
    artifact_store: ArtifactStore | None = None,
    tracking: Tracking | None = None,
    declared: Declared | None = None,
    seconds: float = 20.0,
    now: float | None = None,
) -> list[News]:
    """Find out what went wrong, and what is over, since the last time; tell it.

    A source that cannot be read is an incident itself and keeps no other from being read. Told twice, as by
    two processes at the same time, news counts once.

    Args:
        instance: Whose runs, checks and ticks.
        alerts: Where news goes, and where it is kept how far the sources were read.
        graph: Asset graph, for groups and owners.
        offer_feed: Says which day is the newest.
        artifact_store: Says the same where the feed cannot be reached, and whether there is a model.
        tracking: Registry of the models; None: promotions are not looked at.
        declared: Sensors and schedules that there are; None: all that ever were.
        seconds: After about so long the rest is left to the next time.
        now: Unix time; by default the clock's.

    Returns:
        What people will hear of.
    """
    now = time.time() if now is None else now
    history = History(offer_feed, artifact_store, now)
    events = EventSource(instance, alerts, AssetFacts(graph), history, now, seconds)
    told = _ask("event log", events.batches, alerts, now)
    told += _ask("ticks", lambda: _ticks(instance, alerts, now, declared), alerts, now)
    if tracking is not None and artifact_store is not None and _registry_is_due(alerts, artifact_store, now):
        told += _ask("mlflow", lambda: _versions(tracking, alerts, now), alerts, now)
    return told


def look_after_collector(
    instance: dg.DagsterInstance, alerts: Alerts, *, now: float | None = None
) -> list[News]:
    """Tell whether the sensor that finds out what goes wrong does so itself."""
    now = time.time() if now is None else now
    source = f"ticks of {COLLECTOR}"
    return _ask(source, lambda: _ticks(instance, alerts, now, of_collector=True), alerts, now)


def look_after_channels(alerts: Alerts, *, now: float | None = None) -> list[News]:
    """Tell which channels take nothing: who listens at another one hears of it."""
    now = time.time() if now is None else now
    news = channel_news(alerts.channels(), _open(alerts), now)
    return alerts.tell(news) if news else []


def observations(told: Iterable[News]) -> list[dg.AssetObservation]:
    """What was told, as events of the asset ``alerts``."""
    return [
        dg.AssetObservation(
            asset_key=ALERTS.key,
            description=f"resolved: {news.title}" if news.state == "resolved" else news.title,
            metadata={
                "incident": news.incident,
                "state": news.state,
                "severity": news.severity,
                "text": news.text,
                **({"link": dg.MetadataValue.url(news.link)} if news.link else {}),
                **({"run": dg.MetadataValue.dagster_run(news.run)} if news.run else {}),
            },
        )
        for news in told
    ]


class AssetFacts:
    """Group and owners of assets, by which routes choose."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def of(self, keys: Sequence[AssetKey]) -> dict[str, Any]:
        """Fields of news about these assets: the first, the group they share, the owners of all."""
        nodes = [self._graph.get(key) for key in keys if self._knows(key)]
        groups = {node.group_name for node in nodes}
        owners = dict.fromkeys(owner for node in nodes for owner in node.owners)
        return {
            "asset": keys[0].to_user_string() if keys else None,
            "group": groups.pop() if len(groups) == 1 else None,
            "owners": tuple(owners),
        }

    def is_partitioned(self, key: AssetKey) -> bool:
        """Whether an asset has partitions; one that the graph does not know may have."""
        return not self._knows(key) or self._graph.get(key).is_partitioned

    def _knows(self, key: AssetKey) -> bool:
        return self._graph is not None and self._graph.has(key)


class History:
    """Which failed checks of days are history."""

    def __init__(
        self, offer_feed: OfferFeed | None, artifact_store: ArtifactStore | None, now: float
    ) -> None:
        self._offer_feed = offer_feed
        self._artifact_store = artifact_store
        self._today = datetime.datetime.fromtimestamp(now, datetime.UTC).date()
        self._newest: datetime.date | None = None
        self._looked = False

    def counts(self, partition: str, tags: Mapping[str, str]) -> bool:
        """Whether a check that fails for this partition, in a run with these tags, is to be told."""
        day = day_of(partition)
        if day is None:
            return True
        oldest = datetime.timedelta(days=ALERT_DAYS)
        if _BACKFILL_TAG in tags and day < self._today - oldest:
            return False
        newest = self._newest_day()
        return newest is None or day >= newest - oldest

    def _newest_day(self) -> datetime.date | None:
        """Looked up once, and only when a check of a day failed: the feed may be far away."""
        if not self._looked:
            self._newest, self._looked = self._find_newest_day(), True
        return self._newest

    def _find_newest_day(self) -> datetime.date | None:
        days: list[str] = []
        # A feed that cannot be reached is told by its own sensor; what was taken says nearly the same. One
        # that is still read since an earlier look is not read a second time beside it.
        if self._offer_feed is not None and not _is_under_way(_FEED_LOOK):
            with contextlib.suppress(dg.Failure, InputError, OSError):
                days = _within(_FEED_SECONDS, self._offer_feed.days, _FEED_LOOK)
        if not days and self._artifact_store is not None:
            days = list(self._artifact_store.list_pointers("offers"))
        return max(filter(None, map(day_of, days)), default=None)


class EventSource:
    """Checks and runs, from the event log."""

    def __init__(
        self,
        instance: dg.DagsterInstance,
        alerts: Alerts,
        facts: AssetFacts,
        history: History,
        now: float,
        seconds: float,
    ) -> None:
        self._instance = instance
        self._alerts = alerts
        self._facts = facts
        self._history = history
        self._now = now
        self._until = time.monotonic() + seconds

    def batches(self) -> Iterator[Batch]:
        """What the log holds after the bookmark, in portions."""
        while True:
            kept = self._alerts.bookmark("events")
            reading = read_events(
                self._instance,
                _EVENTS,
                kept,
                now=self._now,
                look_back=_LOOK_BACK_SECONDS,
                limit=_EVENTS_AT_ONCE,
            )
            if reading.bookmark != kept:
                yield self._batch(reading, kept)
            if reading.is_all or time.monotonic() > self._until:
                return

    def _batch(self, reading: Reading, kept: str | None) -> Batch:
        ids = list({event.entry.run_id for event in reading.events})
        found = self._instance.get_runs(dg.RunsFilter(run_ids=ids)) if ids else []
        runs = {run.run_id: run for run in found}
        open_incidents = _open(self._alerts) if reading.events else {}
        news, outcomes = list[News](), dict[str, list[Outcome]]()
        kept_unmade = decode_unmade(self._alerts.bookmark("runs")) if reading.events else {}
        unmade = {key: pieces for key, pieces in kept_unmade.items() if key in open_incidents}
        if reading.unreadable:
            news.append(_unreadable_rows(reading.unreadable))
        for event in reading.events:
            run = runs.get(event.entry.run_id)
            if event.entry.dagster_event_type == DagsterEventType.ASSET_CHECK_EVALUATION:
                if outcome := self._evaluated(event, run):
                    outcomes.setdefault(check_incident(outcome.check), []).append(outcome)
            elif run is None:
                continue  # somebody deleted it
            elif event.entry.dagster_event_type == DagsterEventType.RUN_FAILURE:
                news += self._failed(event, run, outcomes, unmade)
            else:
                failing_since = _newest_failure(run_incident(run), news, open_incidents)
                news += self._succeeded(event, run, failing_since, unmade)
        bookmarks = {"events": reading.bookmark}
        if unmade != kept_unmade:
            bookmarks["runs"] = msgspec.json.encode(unmade).decode()
        if outcomes:
            slots = decode_slots(self._alerts.bookmark("checks"))
            for incident, of_check in outcomes.items():
                news += self._about_check(incident, of_check, slots, incident in open_incidents)
            bookmarks["checks"] = msgspec.json.encode(slots).decode()
        return Batch(news, bookmarks, {"events": kept})

    def _evaluated(self, event: LoggedEvent, run: dg.DagsterRun | None) -> Outcome | None:
        evaluation = event.entry.get_dagster_event().asset_check_evaluation_data
        if is_no_answer(evaluation):
            return None
        partition = evaluation.partition or self._partition(evaluation.asset_key, run)
        return Outcome(
            check=evaluation.asset_check_key,
            partition=partition,
            at=event.at,
            key=f"check-evaluation:{event.key}",
            passed=evaluation.passed,
            severity=evaluation.severity.value,
            title=f"Check {evaluation.check_name} of {evaluation.asset_key.to_user_string()} failed",
            text=_of_partition(partition, evaluation.description or "the check gives no reason"),
            counts=evaluation.passed or self._history.counts(partition, run.tags if run is not None else {}),
            run=run.run_id if run is not None else None,
        )

    def _partition(self, asset: AssetKey, run: dg.DagsterRun | None) -> str:
        """Partition of the run that is also the asset's: a run may make assets with and without one."""
        return partition_of(run) if run is not None and self._facts.is_partitioned(asset) else ""

    def _about_check(self, incident: str, outcomes: list[Outcome], slots: Slots, is_open: bool) -> list[News]:
        """News of one check. An end that does not last until the last outcome is none."""
        found = list[tuple[Outcome, State, str]]()
        for outcome in in_order(outcomes):
            for state, text in judge(outcome, slots.setdefault(incident, {}), is_open):
                is_open = state == "failing"
                if is_open:
                    found = [item for item in found if item[1] == "failing"]
                found.append((outcome, state, text))
        check = outcomes[0].check
        return [
            News(
                id=outcome.key if state == "failing" else f"{outcome.key}:resolved",
                incident=incident,
                state=state,
                severity=outcome.severity,
                title=outcome.title if state == "failing" else "",
                text=text,
                link=f"/assets/{_path(check.asset_key)}?"
                + urlencode({"view": "checks", "checkDetail": check.name}),
                run=outcome.run,
                at=iso(outcome.at),
                **self._facts.of([check.asset_key]),
            )
            for outcome, state, text in found
        ]

    def _failed(
        self,
        event: LoggedEvent,
        run: dg.DagsterRun,
        outcomes: dict[str, list[Outcome]],
        unmade: dict[str, Unmade],
    ) -> list[News]:
        """What a failed run made all the same, and its failure, unless something else explains it.

        Checks and refused versions are told as what they are. The checks of an old day are not told: then
        the run is.
        """
        steps = FailedSteps.of(self._instance, run.run_id)
        for check, (at, line) in steps.raised.items():
            partition = self._partition(check.asset_key, run)
            outcome = Outcome(
                check=check,
                partition=partition,
                at=at,
                key=f"check-raised:{run.run_id}:{check.to_user_string()}",
                passed=False,
                severity="ERROR",
                title=f"Check {check.name} of {check.asset_key.to_user_string()} could not be evaluated",
                text=_of_partition(partition, f"it raised an error: {line}"),
                counts=self._history.counts(partition, run.tags),
                run=run.run_id,
            )
            outcomes.setdefault(check_incident(check), []).append(outcome)
        news = _mended(steps.made, unmade, event, run)
        partition, incident = partition_of(run), run_incident(run)
        are_checks = steps.explained and not steps.lines
        if is_refusal(steps.lines) or (are_checks and self._history.counts(partition, run.tags)):
            return news
        unmade.pop(incident, None)
        if steps.unmade:
            unmade[incident] = Unmade(event.at, steps.unmade)
        return [
            *news,
            News(
                id=f"run-failure:{run.run_id}",
                incident=incident,
                state="failing",
                title=f"Run of {run_name(run)} failed" + (f" ({partition})" if partition else ""),
                text=sentences(
                    "; ".join((steps.lines or steps.explained)[:3]) or run_error(event),
                    "It is over when the same succeeds"
                    + (", or other runs make what it did not" if steps.unmade else "")
                    + f"; by hand: `{COMMAND} --resolve {shlex.quote(incident)}`.",
                ),
                link=f"/runs/{run.run_id}",
                run=run.run_id,
                at=iso(event.at),
                **self._facts.of(steps.assets),
            ),
        ]

    def _succeeded(
        self, event: LoggedEvent, run: dg.DagsterRun, failing_since: float | None, unmade: dict[str, Unmade]
    ) -> list[News]:
        """What a successful run ends: the failures of the same before it, and of others by what it made."""
        incident, news = run_incident(run), list[News]()
        if failing_since is not None and failing_since <= event.at:
            unmade.pop(incident, None)
            news.append(_over(incident, event, run, "The same succeeded."))
        return news + (_mended(made_in(self._instance, run.run_id), unmade, event, run) if unmade else [])


def _ticks(
    instance: dg.DagsterInstance,
    alerts: Alerts,
    now: float,
    declared: Declared | None = None,
    *,
    of_collector: bool = False,
) -> Iterator[Batch]:
    source = f"ticks:{COLLECTOR}" if of_collector else "ticks"
    kept = alerts.bookmark(source)
    news, bookmark = tick_news(
        instance,
        kept,
        _open(alerts),
        lambda name: (name == COLLECTOR) == of_collector,
        declared=declared,
        now=now,
        look_back=_LOOK_BACK_SECONDS,
    )
    if news or bookmark != kept:
        yield Batch(news, {source: bookmark}, {source: kept})


def _versions(tracking: Tracking, alerts: Alerts, now: float) -> Iterator[Batch]:
    """The look is noted first: a registry that does not answer is not asked again at every tick."""
    look = _decode_look(alerts.bookmark("registry"))
    since = look.since if look is not None else now - _LOOK_BACK_SECONDS
    yield Batch([], {"registry": msgspec.json.encode(_Look(since=since, at=now)).decode()})
    versions = _within(_REGISTRY_SECONDS, tracking.versions)
    yield Batch(version_news(versions, _open(alerts), since=since, now=now))


class _Look(msgspec.Struct, frozen=True, kw_only=True):
    since: float
    """Unix time; what happened before is history."""
    at: float
    """Unix time of the last look."""


def _ask(name: str, source: Callable[[], Iterator[Batch]], alerts: Alerts, now: float) -> list[News]:
    """Tell what a source has to say; that it cannot be read is an incident of its own."""
    incident, told = f"source:{name}", list[News]()
    batches = source()
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # whatever it is: the other sources are to be read
            line = exception_line(error)
            return told + alerts.tell(
                [
                    News(
                        id=f"{incident}:{now:.3f}",
                        incident=incident,
                        state="failing",
                        title=f"Incidents cannot be looked for: {name}",
                        text=sentences(line, "What it holds is told once it can be read again."),
                        at=iso(now),
                    )
                ]
            )
        if batch is None:
            break
        # Moved: another process reads the same and tells it; what comes after that, the next look finds.
        with contextlib.suppress(Moved):
            told += alerts.tell(batch.news, batch.bookmarks, batch.expected)
    if incident in _open(alerts):
        news = News(id=f"{incident}:resolved:{now:.3f}", incident=incident, state="resolved", at=iso(now))
        told += alerts.tell([news])
    return told


def _within(seconds: float, function: Callable[[], _T], name: str | None = None) -> _T:
    """What ``function`` returns, if it does so in time; if not, it is left behind.

    Raises:
        TimeoutError: it did not.
    """
    results, errors = list[_T](), list[Exception]()

    def call() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


def _is_under_way(name: str) -> bool:
    return any(thread.name == name for thread in threading.enumerate())


def _open(alerts: Alerts) -> dict[str, Incident]:
    return {incident.key: incident for incident in alerts.incidents()}


def _registry_is_due(alerts: Alerts, artifact_store: ArtifactStore, now: float) -> bool:
    """Importing MLflow takes seconds: not before there is a model, and not at every tick."""
    look = _decode_look(alerts.bookmark("registry"))
    if look is not None and 0 <= now - look.at < _SECONDS_BETWEEN_LOOKS_AT_REGISTRY:
        return False
    return artifact_store.read_pointer(MODEL_VERSION) is not None


def _newest_failure(
    incident: str, news: Sequence[News], open_incidents: Mapping[str, Incident]
) -> float | None:
    """Unix time of the last failure that an incident knows, with this news; None if it is not open."""
    of_it = [item for item in news if item.incident == incident]
    if of_it:
        return unix(of_it[-1].at) if of_it[-1].state == "failing" else None
    known = open_incidents.get(incident)
    return unix(known.last_at) if known is not None else None


def _of_partition(partition: str, *texts: str) -> str:
    """In the text and not in the title: an incident keeps its title while one day follows the other."""
    return sentences(f"{partition}: {texts[0]}" if partition else capital(texts[0]), *texts[1:])


def _mended(
    made: Mapping[Piece, float], unmade: dict[str, Unmade], event: LoggedEvent, run: dg.DagsterRun
) -> list[News]:
    text = "What it did not make is there by now."
    return [_over(incident, event, run, text) for incident in take_out(made, unmade)]


def _over(incident: str, event: LoggedEvent, run: dg.DagsterRun, text: str) -> News:
    return News(
        id=f"run-success:{run.run_id}:{incident}",
        incident=incident,
        state="resolved",
        text=text,
        link=f"/runs/{run.run_id}",
        run=run.run_id,
        at=iso(event.at),
    )


def _unreadable_rows(ids: Sequence[int]) -> News:
    return News(
        id=f"unreadable-events:{ids[0]}",
        incident="event-log:unreadable",
        state="failing",
        severity="WARN",
        title=f"{len(ids)} events of Dagster's log cannot be read",
        text=f"They are left out: rows {', '.join(map(str, ids[:10]))}{', …' if len(ids) > 10 else ''}. If a "
        "newer Dagster wrote them, install it here too. A failed check among them is not told: look "
        f"in the UI, then `{COMMAND} --resolve event-log:unreadable`.",
    )


def _path(asset: AssetKey) -> str:
    return "/".join(quote(part, safe="") for part in asset.path)


def _decode_look(bookmark: str | None) -> _Look | None:
    try:
        return msgspec.json.decode(bookmark, type=_Look) if bookmark else None
    except msgspec.DecodeError:
        return None
