"""The taxonomy changed: follow its newest release, one run per version."""

import datetime
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef, short_version
from ml.errors import InputError
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.diff import TaxonomyDiff
from ml.taxonomy_change.limits import TaxonomyLimits, objections
from ml.taxonomy_change.releases import origins_are_checked, read_mapping, read_release, says_more
from ml.taxonomy_change.transitions import Transition, Transitions
from offer_assets import policies
from offer_assets.instance import FEED_TAG, fail_dead_runs, feed_tag
from offer_assets.jobs import ADOPT_TAXONOMY, FOLLOW_TAXONOMY, JOBS, REFRESH_NAMES, open_trainings
from offer_assets.partitions import CPU
from offer_assets.promotion import name_of
from offer_assets.taxonomy import WAY_OUT, taxonomy_before
from offer_assets.unserved_versions import refused_version_news
from resources.alerts import Alerts, News
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.taxonomy_policy import TaxonomyPolicy
from resources.taxonomy_source import FoundRelease, TaxonomySource
from resources.tracking import RegisteredVersion, Tracking
from sensors.taxonomy_decision import (
    ATTEMPT_TAG,
    BASE_TAG,
    FINGERPRINT_TAG,
    NO_BASE,
    RELEASE_TAG,
    SUPERSEDED_TAG,
    Decision,
    Jobs,
    KnownRun,
    RunState,
    Situation,
    decide,
)

_SOURCE = "catalog_taxonomy_source"
_ABOUT_SOURCE: dict[str, Any] = {
    "asset": _SOURCE,
    "link": f"/assets/{_SOURCE}",
    "group": policies.TAXONOMY,
    "owners": (policies.DATA_TEAM,),
}
_JOBS = Jobs(adopt=ADOPT_TAXONOMY, refresh=REFRESH_NAMES, follow=FOLLOW_TAXONOMY)
_TAKING = frozenset({ADOPT_TAXONOMY, REFRESH_NAMES, FOLLOW_TAXONOMY})
_UNREADABLE = "taxonomy-unreadable"
_TICKS_UNTIL_ALERT = 3
"""A source that cannot be read for a moment is no news."""
_REFUSED_FOR_SECONDS = 3600.0
"""After that a refused release is looked at again: the code that refuses it may be another."""

_FINISHED: dict[dg.DagsterRunStatus, RunState] = {
    dg.DagsterRunStatus.SUCCESS: "succeeded",
    dg.DagsterRunStatus.FAILURE: "failed",
    dg.DagsterRunStatus.CANCELED: "canceled",
}


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """The newest release, as long as it stays the same."""

    fingerprint: str
    since: float
    """Unix time of the first look."""


class Outage(msgspec.Struct, frozen=True, kw_only=True):
    """Ticks in a row that could not look."""

    since: float
    ticks: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What a valid release is, held against the taxonomy in force."""

    fingerprint: str
    against: str
    """What it was held against: see :class:`Standing`."""
    same: bool
    """The same tree with the same names, in other words of the file, and no further mapping."""
    only_names: bool


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A release that was refused, and the circumstances in which it would be again."""

    fingerprint: str
    against: str
    limits: TaxonomyLimits
    at: float
    """Unix time."""
    why: str


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """What the sensor remembers. Losing it costs time and a repeated look, never a second run."""

    seen: Seen | None = None
    comparison: Comparison | None = None
    refusal: Refusal | None = None
    outage: Outage | None = None


class InForce(msgspec.Struct, frozen=True, kw_only=True):
    """The taxonomy that the last change led to."""

    ref: ArtifactRef
    fingerprint: str
    """Of its release."""
    change: ArtifactRef
    base_before: str
    """Version of the change before, ``none`` if this is the first."""
    previous: str | None
    """Digest of the taxonomy before."""
    pointer_in_step: bool


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What a new release is held against."""

    id: str
    """Digest of the last change; before the first, of the taxonomy that the model knows, if any."""
    taxonomy: ArtifactRef | None
    change: ArtifactRef | None


class RefusedRelease(Exception):
    """A release that can be read and must not be taken."""


@dg.sensor(
    name="taxonomy_changed",
    jobs=[job for job in JOBS if job.name in _TAKING],
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Follows the newest release of the taxonomy once it is settled and valid: takes it while "
    "there is no model, gives the model its names if only names changed, trains on otherwise. One run per "
    "version; a run for an older release is canceled first.",
)
def taxonomy_changed(
    context: dg.SensorEvaluationContext,
    taxonomy_source: TaxonomySource,
    taxonomy_policy: TaxonomyPolicy,
    artifact_store: ArtifactStore,
    compute: Compute,
    tracking: Tracking,
    alerts: Alerts,
) -> dg.SensorResult:
    """Look, decide, and tell; the run key makes a repeat impossible."""
    watch = _Watch(context, taxonomy_source, taxonomy_policy, artifact_store, compute, tracking, alerts)
    try:
        return watch.tick()
    except (InputError, dg.Failure) as error:
        return watch.cannot_look(_line(error))


class _Watch:
    """One tick."""

    def __init__(
        self,
        context: dg.SensorEvaluationContext,
        source: TaxonomySource,
        policy: TaxonomyPolicy,
        store: ArtifactStore,
        compute: Compute,
        tracking: Tracking,
        alerts: Alerts,
    ) -> None:
        self.instance = context.instance
        self.log = context.log
        self.source = source
        self.policy = policy
        self.store = store
        self.compute = compute
        self.tracking = tracking
        self.alerts = alerts
        self.feed = feed_tag(store)
        self.now = time.time()
        self.cursor = _decode(context.cursor)
        self.cursor_is_new = self.cursor.seen is None and self.cursor.outage is None
        self.events: list[dg.AssetObservation] = []

    def tick(self) -> dg.SensorResult:
        """Everything but what to do when something cannot be read.

        Runs whose process was killed are failed first: nothing waits for them, and they are repeated.

        Raises:
            InputError: the source or an artifact cannot be read.
            dg.Failure: the tracking does not answer.
        """
        fail_dead_runs(self.instance)
        release = self.source.newest()
        settled_in = self._settles_in(release)
        in_force = self._in_force()
        if in_force is None or in_force.fingerprint != release.fingerprint:
            if settled_in > 0:
                return self._skip(
                    f"release {release.name} of the taxonomy is new: it is looked at when it has been "
                    f"unchanged for {self.policy.settle_seconds:g} s, in {settled_in:.0f} s"
                )
            try:
                self._compare(release, in_force)
            except RefusedRelease as refused:
                return self._refuse(release, str(refused), in_force)
        situation = self._situation(release, in_force)
        decision = self._with_registry(decide(situation), situation, in_force)
        if decision.action == "nothing" and situation.serves and not situation.serves_in_force:
            self._tell_what_waits(release, in_force)
        if decision.action == "cancel" and settled_in > 0:
            return self._skip(f"release {release.name} of the taxonomy is back: {settled_in:.0f} s to settle")
        return self._act(decision)

    def cannot_look(self, line: str) -> dg.SensorResult:
        """Skip because of ``line``; whoever has to know is told when it stays so."""
        outage = self.cursor.outage or Outage(since=self.now, ticks=0)
        outage = msgspec.structs.replace(outage, ticks=outage.ticks + 1)
        if outage.ticks >= _TICKS_UNTIL_ALERT:
            since = datetime.datetime.fromtimestamp(outage.since, datetime.UTC).isoformat(timespec="seconds")
            self._tell(
                News(
                    id=f"taxonomy-unreadable:{since}",
                    incident=_UNREADABLE,
                    state="failing",
                    title="New releases of the taxonomy cannot be followed",
                    text=f"Since {since}: {line}. What is in force stays; the next look is in a moment.",
                    **_ABOUT_SOURCE,
                )
            )
        cursor = msgspec.structs.replace(self.cursor, outage=outage)
        return dg.SensorResult(skip_reason=line, cursor=_encode(cursor), asset_events=self.events)

    def _settles_in(self, release: FoundRelease) -> float:
        """Seconds until the release counts as settled; one that is seen for the first time is told."""
        seen = self.cursor.seen
        if seen is None or seen.fingerprint != release.fingerprint:
            seen = Seen(fingerprint=release.fingerprint, since=self.now)
            self._observe(release)
        elif seen.since > self.now:  # the clock was set back
            seen = msgspec.structs.replace(seen, since=self.now)
        self.cursor = msgspec.structs.replace(self.cursor, seen=seen)
        return max(0.0, seen.since + self.policy.settle_seconds - self.now)

    def _in_force(self) -> InForce | None:
        change = self.store.read_pointer("taxonomy_change")
        if change is None:
            return None
        inputs = self.compute.manifest(change).inputs
        pointer = self.store.read_pointer("catalog_taxonomy")
        in_step = pointer is not None and pointer.digest == inputs["catalog_taxonomy"]
        ref = pointer if pointer and in_step else self.compute.origin(change, "catalog_taxonomy")
        before = inputs.get("previous_change")
        return InForce(
            ref=ref,
            fingerprint=str(self.compute.manifest(ref).parameters["fingerprint"]),
            change=change,
            base_before=short_version(before) if before else NO_BASE,
            previous=inputs.get("previous_taxonomy"),
            pointer_in_step=in_step,
        )

    def _compare(self, release: FoundRelease, in_force: InForce | None) -> None:
        """Read the release and hold it against what stands, once for both.

        Raises:
            RefusedRelease: it is broken, or a limit speaks against it.
        """
        standing = self._standing(in_force)
        known, refusal = self.cursor.comparison, self.cursor.refusal
        if known and (known.fingerprint, known.against) == (release.fingerprint, standing.id):
            return
        limits = self.policy.limits()
        if (
            refusal
            and (refusal.fingerprint, refusal.against, refusal.limits)
            == (release.fingerprint, standing.id, limits)
            and 0 <= self.now - refusal.at < _REFUSED_FOR_SECONDS
        ):
            raise RefusedRelease(refusal.why)
        try:
            comparison = self._compared(release, standing, limits)
        except RefusedRelease as refused:
            refusal = Refusal(
                fingerprint=release.fingerprint,
                against=standing.id,
                limits=limits,
                at=self.now,
                why=str(refused),
            )
            self.cursor = msgspec.structs.replace(self.cursor, refusal=refusal)
            raise
        self.cursor = msgspec.structs.replace(self.cursor, comparison=comparison, refusal=None)

    def _standing(self, in_force: InForce | None) -> Standing:
        if in_force is not None:
            return Standing(id=in_force.change.digest, taxonomy=in_force.ref, change=in_force.change)
        known = taxonomy_before(self.store, self.compute)
        return Standing(id=known.digest if known else "", taxonomy=known, change=None)

    def _compared(self, release: FoundRelease, standing: Standing, limits: TaxonomyLimits) -> Comparison:
        new, mapping = self._read(release)
        old: Taxonomy | None = None
        further, earlier = False, list[Transition]()
        if standing.taxonomy is not None:
            folder = self.compute.folder(standing.taxonomy)
            old, further = Taxonomy.load(folder), says_more(mapping, read_mapping(folder))
        if standing.change is not None:
            earlier = Transitions.read(self.compute.folder(standing.change)).transitions
        diff = TaxonomyDiff.between(old, new) if old is not None else None
        same = diff is not None and diff.is_empty and not further
        # The mapping of a taxonomy in force was judged, or accepted, when it was taken.
        if not same and (found := self._objections(release, standing, old, new, earlier, limits)):
            raise RefusedRelease(" ".join(found))
        return Comparison(
            fingerprint=release.fingerprint,
            against=standing.id,
            same=same,
            only_names=diff is not None and diff.only_names and not further,
        )

    def _objections(
        self,
        release: FoundRelease,
        standing: Standing,
        old: Taxonomy | None,
        new: Taxonomy,
        earlier: list[Transition],
        limits: TaxonomyLimits,
    ) -> list[str]:
        mapping: list[tuple[str, str]] = []
        if any(file.role == "mapping" for file in release.files):
            # What the mapping in force says already is no news, and must not be judged again.
            in_force = self.compute.folder(standing.taxonomy) if standing.taxonomy is not None else None
            _, mapping = self._read(release, in_force)
        checked = origins_are_checked(release.files)
        return objections(old, new, mapping, earlier, limits, origins_are_checked=checked)

    def _read(
        self, release: FoundRelease, in_force: Path | None = None
    ) -> tuple[Taxonomy, list[tuple[str, str]]]:
        """The content of the release.

        Raises:
            InputError: the source cannot be read (any more), or holds something else by now.
            RefusedRelease: it can be read, and is broken.
        """
        try:
            return read_release(release.files, release.source, in_force)
        except InputError as error:
            # A broken release is broken in the same way at the second look; all else is the network's fault.
            first = _line(error)
            if self.source.newest().fingerprint != release.fingerprint:
                raise InputError(f"release {release.name} changed while it was read") from None
        try:
            return read_release(release.files, release.source, in_force)
        except InputError as error:
            if _line(error) != first:
                raise
            raise RefusedRelease(first) from None

    def _refuse(self, release: FoundRelease, why: str, in_force: InForce | None) -> dg.SensorResult:
        """Start nothing; tell it once."""
        base = in_force.change.version if in_force else NO_BASE
        id = f"taxonomy-refused:{release.fingerprint[:12]}:{base}"
        self._tell(
            News(
                id=id,
                incident=id,
                state="notice",
                title=f"Release {release.name} of the taxonomy is refused",
                text=f"{why} Nothing was started and what is in force stays. {WAY_OUT}",
                **_ABOUT_SOURCE,
            )
        )
        return self._skip(f"release {release.name} of the taxonomy is refused: {why}")

    def _situation(self, release: FoundRelease, in_force: InForce | None) -> Situation:
        comparison = self.cursor.comparison
        fingerprint, only_names = release.fingerprint, False
        endpoint = self.store.read_pointer("offer_endpoint")
        served = self._taxonomy_of(endpoint) if endpoint else None
        if in_force is not None and in_force.fingerprint == fingerprint:
            only_names = served == in_force.previous and bool(in_force.change.metrics.get("only_names"))
        elif comparison is not None:
            only_names = comparison.only_names
            if in_force is not None and comparison.same:
                fingerprint = in_force.fingerprint
        return Situation(
            jobs=_JOBS,
            feed=self.feed.get(FEED_TAG, ""),
            release=release.name,
            fingerprint=fingerprint,
            in_force=in_force.fingerprint if in_force else None,
            base=in_force.change.version if in_force else NO_BASE,
            base_before=in_force.base_before if in_force else NO_BASE,
            pointer_in_step=in_force is None or in_force.pointer_in_step,
            serves=endpoint is not None,
            serves_in_force=in_force is not None and self._knows(served, in_force),
            only_names=only_names,
            runs=self._known_runs(fingerprint),
        )

    def _knows(self, served: str | None, in_force: InForce) -> bool:
        """Whether a model of the taxonomy ``served`` (a digest) has nothing to learn for the one in force."""
        if served is None or served == in_force.ref.digest:
            return served is not None
        known = self.store.find_by_digest("catalog_taxonomy", served)
        if known is None:
            return False
        old, new = (Taxonomy.load(self.compute.folder(ref)) for ref in (known, in_force.ref))
        if not TaxonomyDiff.between(old, new).is_empty:
            return False
        steps = Transitions.read(self.compute.folder(in_force.change))
        age = {version: place for place, version in enumerate(steps.history)}
        since = age.get(served, -1)
        return all(age.get(transition.since, since) <= since for transition in steps.transitions)

    def _known_runs(self, fingerprint: str) -> list[KnownRun]:
        """Runs of this feed for this release, and every open one that takes a release or trains."""
        for_release = self.instance.get_runs(
            filters=dg.RunsFilter(tags={FINGERPRINT_TAG: fingerprint, **self.feed})
        )
        runs = [*for_release, *open_trainings(self.instance, self.feed)]
        return [_known(run) for run in {run.run_id: run for run in runs}.values()]

    def _with_registry(self, decision: Decision, situation: Situation, in_force: InForce | None) -> Decision:
        """``decision``, unless the model registry says that the work was done, or refused for good.

        The registry is asked only before a model would be trained for a taxonomy that is taken already.
        """
        request = decision.request
        if request is None or request.job == ADOPT_TAXONOMY:
            return decision
        if in_force is None or in_force.fingerprint != situation.fingerprint:
            return decision
        production = self.tracking.production()
        if production is not None and self._knows(self._taxonomy_of(production.ref), in_force):
            return Decision(
                action="nothing",
                reason=f"release {request.release} of the taxonomy is in force, with a model that knows it",
            )
        refused = self._refused_version(in_force) if request.attempt > 1 else None
        if refused is None:
            return decision
        why = "was rejected" if refused.passed else "did not pass the gate"
        reason = (
            f"model version {refused.model_version}, trained for release {request.release}, {why} and is not "
            "served; what was serving goes on serving"
        )
        self._tell(
            refused_version_news(
                refused,
                title=f"The model for release {request.release} of the taxonomy {why}",
                text=f"The {reason}. See the gate of model_version, then train with more labelled offers or "
                "deliver a corrected release.",
            )
        )
        return Decision(action="leave", reason=reason)

    def _refused_version(self, in_force: InForce) -> RegisteredVersion | None:
        """The last model version, if it knows the taxonomy in force and gate or people refused it."""
        found = self._last_version(in_force)
        if found is None or found.may_serve:
            return None
        # One that waits for a decision is not refused: its run failed for another reason.
        return found if not found.passed or found.approval == "rejected" else None

    def _last_version(self, in_force: InForce) -> RegisteredVersion | None:
        """The last model version, if it is registered and knows the taxonomy in force."""
        candidate = self.store.read_pointer("model_version")
        if candidate is None or self._taxonomy_of(candidate) != in_force.ref.digest:
            return None
        return self.tracking.version_of(candidate)

    def _tell_what_waits(self, release: FoundRelease, in_force: InForce | None) -> None:
        """Tell once that a model trained for the release in force waits for a person."""
        version = self._last_version(in_force) if in_force else None
        if version is None or not version.passed or version.approval != "pending":
            return
        id = f"taxonomy-waits:{version.model_version}"
        self._tell(
            News(
                id=id,
                incident=id,
                state="notice",
                severity="WARN",
                title=f"The model for release {release.name} of the taxonomy waits for a decision",
                text=f"{name_of(version)} passed the gate. Run the job decide_version, or `python -m "
                f"offer_assets approve {version.version} --reason …`. What was serving goes on serving.",
                asset="model_version",
                link="/assets/model_version",
                group=policies.RELEASE,
                owners=(policies.ML_TEAM,),
            )
        )

    def _act(self, decision: Decision) -> dg.SensorResult:
        for run in decision.cancel:
            self._cancel(run)
        request = decision.request
        if decision.action == "give_up" and request is not None:
            id = f"taxonomy-gave-up:{request.fingerprint[:12]}:{request.base}:{request.job}"
            self._tell(
                News(
                    id=id,
                    incident=id,
                    state="notice",
                    title=f"Release {request.release} of the taxonomy could not be followed",
                    text=f"The sensor {decision.reason}. What was serving goes on serving.",
                    asset="catalog_taxonomy",
                    link="/runs?" + urlencode({"q[0]": f"tag:{FINGERPRINT_TAG}={request.fingerprint}"}),
                    group=policies.TAXONOMY,
                    owners=(policies.DATA_TEAM,),
                )
            )
        if decision.action != "start" or request is None:
            return self._skip(decision.reason)
        self.log.info(f"starting {request.job}: {decision.reason}")
        return self._looked(
            run_requests=[
                dg.RunRequest(
                    run_key=request.run_key,
                    job_name=request.job,
                    tags=request.tags,
                    partition_key=CPU if request.job == FOLLOW_TAXONOMY else None,
                )
            ]
        )

    def _cancel(self, run: KnownRun) -> None:
        """Ask for the end of a run; one that cannot be ended is waited for."""
        seen = self.cursor.seen
        newer = seen.fingerprint if seen else ""
        try:
            self.instance.add_run_tags(run.run_id, {SUPERSEDED_TAG: newer})
            ended = self.instance.run_coordinator.cancel_run(run.run_id)
        except Exception as error:  # whatever the launcher raises: a sensor must outlive it
            self.log.warning(f"run {run.run_id} cannot be canceled: {_line(error)}")
        else:
            self.log.info(f"run {run.run_id} {'is being canceled' if ended else 'cannot be canceled'}")

    def _taxonomy_of(self, model: ArtifactRef) -> str | None:
        """Digest of the taxonomy that a model knows."""
        return self.compute.manifest(model).inputs.get("catalog_taxonomy")

    def _tell(self, news: News) -> None:
        """Tell people; what is new is also in the log and among the events of the source."""
        for told in self.alerts.tell([news]):
            is_over = told.state == "resolved"
            tell = (
                self.log.info if is_over else self.log.warning if told.severity == "WARN" else self.log.error
            )
            tell(f"{told.title}: {told.text}")
            self.events.append(
                dg.AssetObservation(
                    asset_key=_SOURCE,
                    description=f"over: {told.title}" if is_over else told.title,
                    metadata={"alert": told.id, "severity": told.severity, "text": told.text},
                )
            )

    def _observe(self, release: FoundRelease) -> None:
        self.events.append(
            dg.AssetObservation(
                asset_key=_SOURCE,
                description=f"release {release.name}",
                metadata={
                    "release": release.name,
                    "source": release.source,
                    "fingerprint": release.fingerprint,
                },
            )
        )

    def _skip(self, reason: str) -> dg.SensorResult:
        return self._looked(skip_reason=reason)

    def _looked(self, **result: Any) -> dg.SensorResult:
        """The result of a tick that could look: what kept earlier ones from it is over."""
        outage = self.cursor.outage
        if self.cursor_is_new or (outage is not None and outage.ticks >= _TICKS_UNTIL_ALERT):
            self._tell(
                News(
                    id=f"taxonomy-readable:{self.now:.3f}",
                    incident=_UNREADABLE,
                    state="resolved",
                    text="They can be read again.",
                )
            )
        cursor = _encode(msgspec.structs.replace(self.cursor, outage=None))
        return dg.SensorResult(**result, cursor=cursor, asset_events=self.events)


def _known(run: dg.DagsterRun) -> KnownRun:
    attempt = run.tags.get(ATTEMPT_TAG, "1")
    return KnownRun(
        run_id=run.run_id,
        job=run.job_name,
        state=_FINISHED.get(run.status, "open"),
        cancelable=run.is_cancelable,
        fingerprint=run.tags.get(FINGERPRINT_TAG),
        release=run.tags.get(RELEASE_TAG, ""),
        base=run.tags.get(BASE_TAG, ""),
        attempt=int(attempt) if attempt.isdecimal() else 1,
        superseded=SUPERSEDED_TAG in run.tags,
    )


def _decode(cursor: str | None) -> Cursor:
    """The cursor; one that cannot be read is forgotten."""
    try:
        return msgspec.json.decode(cursor, type=Cursor) if cursor else Cursor()
    except msgspec.DecodeError:
        return Cursor()


def _encode(cursor: Cursor) -> str:
    return msgspec.json.encode(cursor).decode()


def _line(error: BaseException) -> str:
    text = error.description if isinstance(error, dg.Failure) and error.description else str(error)
    return text.strip().split("\n", maxsplit=1)[0] or type(error).__name__
