"""The door to experiment tracking and to the model registry.

Every artifact can be recorded as a run (parameters, metrics, what it was made of). A compiled
student is registered as a version of the model; one version at a time is in production. What a person
decided about a version, and when and why versions went into production, is kept as tags of the versions,
so that any MLflow server holds it and its own pages show it.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import dagster as dg
import msgspec
from typing_extensions import override

from ml.artifacts import ArtifactRef, JsonValue, Manifest
from ml.errors import InputError
from resources.atomic_files import only_one
from resources.failures import input_errors_fail_plainly
from resources.redaction import without_secrets

_T = TypeVar("_T")

_EXPERIMENT = "offer-assets"
_PRODUCTION = "production"
_LONGEST_PARAMETER = 6000
_LONGEST_REASON = 2000
"""Characters of a reason that are kept: older servers take tags of 5,000."""
_ARTIFACT_TAGS = ("kind", "key", "digest", "uri")
_MOST_PARTS = 10_000
_PARENT_TAG, _PART_TAG = "mlflow.parentRunId", "part"
"""The first one makes MLflow's pages show a run below another."""

APPROVAL_TAG = "approval"
"""``automatic``, ``pending``, ``approved`` or ``rejected``; a person may set it by hand."""
TARGET_TAG = "target"
"""What the version is compiled for; ``cpu`` where it does not say."""
_DECISION_TAG = "approval.decision"
_PROMOTION_TAGS = "promotion."
_PROMOTED_AT_TAG, _PROMOTION_REASON_TAG = "promoted_at", "promotion_reason"
"""All that was kept of a promotion before there was a history."""

BY_HAND = "mlflow"
"""Who decided, where nobody but the tag in MLflow says so."""

Verdict = Literal["passed", "failed"]
Choice = Literal["approved", "rejected"]
Approval = Literal["automatic", "pending", "approved", "rejected"]


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a person decided about a version."""

    decision: Choice
    by: str
    reason: str
    at: str
    """ISO time (UTC); empty where the tag was set by hand in MLflow and nobody has noted when."""
    despite_gate: bool = False
    """Whether a version was approved that did not pass the gate."""


class Promotion(msgspec.Struct, frozen=True, kw_only=True):
    """A version went into production: when, why, by whom, in place of what, and what it was made of."""

    at: str
    """ISO time (UTC)."""
    by: str
    """A person, or the job that promoted it by itself."""
    reason: str
    run_id: str
    kind: Literal["promotion", "rollback", "rename"]
    """``rename``: the model that served before, under other names of the categories."""
    registry_version: str
    model_version: str
    replaced: str | None
    """Model version that was in production before."""
    taxonomy_version: str
    """Empty, like the three below, where the artifact that would tell is gone."""
    data: str
    """Training sample, the short form of its digest."""
    code_revision: str
    """Of the code that trained the student."""
    evaluation: str
    """Digest of the evaluation that the gate judged."""


class RegisteredVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the model in the registry."""

    name: str
    version: str
    """Number of the version in the registry."""
    ref: ArtifactRef
    """The compiled student."""
    metrics: dict[str, float]
    tags: dict[str, str]
    registered_at: str
    """ISO time (UTC)."""
    in_production: bool

    @property
    def model_version(self) -> str:
        """The version that predictions carry."""
        return self.ref.version

    @property
    def passed(self) -> bool:
        """Whether the gate let it pass."""
        return self.tags.get("verdict") == "passed"

    @property
    def approval(self) -> Approval:
        """Whether it may be served as far as people are concerned; unclear tags wait for a person."""
        if APPROVAL_TAG not in self.tags and self.passed and self._has_served:
            return "automatic"
        tag = self.tags.get(APPROVAL_TAG, "").strip().lower()
        approvals: tuple[Approval, ...] = ("automatic", "approved", "rejected")
        return next((approval for approval in approvals if approval == tag), "pending")

    @property
    def decision(self) -> Decision | None:
        """What a person decided, or None; the tag counts, whoever set it."""
        approval = self.approval
        if approval not in ("approved", "rejected"):
            return None
        noted = self._noted
        if noted is not None and noted.decision == approval:
            return noted
        return Decision(decision=approval, by=BY_HAND, reason="decided in MLflow", at="")

    @property
    def may_serve(self) -> bool:
        """Whether gate and people agree that it is served."""
        decision = self.decision
        if self.passed:
            return self.approval in ("automatic", "approved")
        return decision is not None and decision.decision == "approved" and decision.despite_gate

    @property
    def promotions(self) -> list[Promotion]:
        """When it went into production, oldest first."""
        names = sorted(name for name in self.tags if name.startswith(_PROMOTION_TAGS))
        if not names and self._has_served:
            return [self._promotion_without_entry]
        entries = [_decoded(self.tags[name], Promotion) for name in names]
        return [entry for entry in entries if entry is not None]

    @property
    def _has_served(self) -> bool:
        """Whether it is or was in production, going by what was kept before approvals and the history."""
        return self.in_production or _PROMOTED_AT_TAG in self.tags

    @property
    def _promotion_without_entry(self) -> Promotion:
        """What is known of the promotion of a version whose tags have no entry of the history."""
        return Promotion(
            at=as_kept(datetime.datetime.fromisoformat(self.tags.get(_PROMOTED_AT_TAG, self.registered_at))),
            by="automatic" if _PROMOTED_AT_TAG in self.tags else BY_HAND,
            reason=self.tags.get(_PROMOTION_REASON_TAG, "put into production in MLflow"),
            run_id="",
            kind="promotion",
            registry_version=self.version,
            model_version=self.model_version,
            replaced=None,
            taxonomy_version="",
            data="",
            code_revision="",
            evaluation=self.tags.get("evaluation", ""),
        )

    @property
    def _noted(self) -> Decision | None:
        return _decoded(self.tags.get(_DECISION_TAG, ""), Decision)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One of the trainings that an artifact compares: a candidate, a trial."""

    name: str
    """Unique within the artifact."""
    parameters: dict[str, JsonValue]
    metrics: dict[str, JsonValue]
    learning_curve: list[dict[str, JsonValue]] = []
    seconds: float = 0.0
    failed: bool = False
    """Whether it came to no result; such a run is marked so."""
    note: str = ""
    """Why not, or what else is to be said of it."""


class Tracking(dg.ConfigurableResource[Any], ABC):
    """Where runs are recorded and models registered. All of it can be repeated without effect."""

    @abstractmethod
    def record(
        self,
        manifest: Manifest,
        ref: ArtifactRef,
        learning_curve: Sequence[Mapping[str, JsonValue]] = (),
        parts: Sequence[Part] = (),
    ) -> str:
        """Record how an artifact was made; returns the id of its run, an existing one where there is one.

        Args:
            manifest: The artifact's manifest.
            ref: The artifact.
            learning_curve: Figures by step, ``{"step": 20, "loss": 1.3, …}``.
            parts: What it compares; each gets a run of its own below the artifact's.
        """

    @abstractmethod
    def register(
        self,
        ref: ArtifactRef,
        metrics: Mapping[str, JsonValue],
        tags: Mapping[str, str],
        approval: Literal["automatic", "pending"] | None = None,
        carried: Decision | None = None,
    ) -> RegisteredVersion:
        """Register a compiled student; a digest that is registered gets the new metrics and tags.

        Args:
            ref: The compiled student.
            metrics: Of its evaluation; the numbers are kept.
            tags: What else to keep; ``verdict`` is ``passed`` or ``failed``.
            approval: Whether it waits for a person. What a person decided about it stays, and a
                version in production stays what it is; None leaves every version as it is.
            carried: What a person decided about the same model under other names: it holds for this
                version too, in place of ``approval``, unless what was decided about it is newer.
        """

    @abstractmethod
    def version_of(self, ref: ArtifactRef) -> RegisteredVersion | None:
        """The version as which this compiled student is registered, or None."""

    @abstractmethod
    def versions(self) -> list[RegisteredVersion]:
        """All versions of the model, newest first."""

    @abstractmethod
    def decide(
        self,
        version: RegisteredVersion,
        decision: Choice,
        by: str,
        reason: str,
        despite_gate: bool = False,
    ) -> RegisteredVersion:
        """Note what a person decided about ``version``.

        The same decision again changes nothing, unless a version is approved that is not in production:
        that counts as of now.

        Args:
            version: As the registry had it a moment ago.
            decision: Whether it may be served.
            by: Who decided.
            reason: Why.
            despite_gate: Approve it although the gate did not let it pass; noted with the decision.

        Raises:
            InputFailure: nobody or no reason is named, or a version that the gate refused would be
                approved without saying so.
        """

    @abstractmethod
    def annotate(self, version: RegisteredVersion, tags: Mapping[str, str]) -> RegisteredVersion:
        """Keep more tags with ``version``, one after the other as given; what was there is replaced."""

    @abstractmethod
    def promote(self, version: RegisteredVersion, promotion: Promotion) -> RegisteredVersion:
        """Make ``version`` the one in production, and add ``promotion`` to the history.

        A version that is in production already, or whose promotion was interrupted, adds none.
        """

    @abstractmethod
    def production(self) -> RegisteredVersion | None:
        """The version in production, or None before the first."""

    @input_errors_fail_plainly()
    def find(self, text: str) -> RegisteredVersion | None:
        """The version that a person means, or None.

        Args:
            text: Its number in the registry, or its model version (the beginning is enough).

        Raises:
            InputFailure: several model versions begin like this.
        """
        wanted = text.strip().lower()
        versions = self.versions()
        numbered = [version for version in versions if version.version == wanted]
        begun = [version for version in versions if wanted and version.ref.digest.startswith(wanted)]
        found = numbered or begun
        if len(found) > 1:
            names = ", ".join(f"{version.model_version} (version {version.version})" for version in found)
            raise InputError(f"{text} may be any of {names}: give more of it, or the number of the version")
        return found[0] if found else None

    def history(self) -> list[Promotion]:
        """Every promotion and rollback, oldest first."""
        return _history_of(self.versions())


class MlflowTracking(Tracking):
    """MLflow: an SQLite file, or a server."""

    tracking_uri: str
    model_name: str

    @override
    def record(
        self,
        manifest: Manifest,
        ref: ArtifactRef,
        learning_curve: Sequence[Mapping[str, JsonValue]] = (),
        parts: Sequence[Part] = (),
    ) -> str:
        with self._client() as client:
            experiment = self._experiment(client)
            run = _run_of(client, experiment, ref)
            if run is not None and run.info.status == "FINISHED":
                return str(run.info.run_id)
            # Times are the artifact's own: an interrupted record that is repeated adds no second point.
            time = int(datetime.datetime.fromisoformat(manifest.created_at).timestamp() * 1000)
            if run is None:
                run = client.create_run(
                    experiment,
                    start_time=time - int(manifest.seconds * 1000),
                    run_name=f"{manifest.kind} {ref.version}",
                    tags={f"artifact.{name}": str(getattr(ref, name)) for name in _ARTIFACT_TAGS},
                )
            run_id = str(run.info.run_id)
            tags = {f"input.{name}": digest for name, digest in manifest.inputs.items()}
            tags |= {"code_version": manifest.code_version, "code_revision": manifest.code_revision or ""}
            figures = {**_numbers(manifest.metrics), "seconds": manifest.seconds}
            _log(client, run_id, time, manifest.parameters, figures, learning_curve, tags)
            self._record_parts(client, experiment, run_id, time, parts)
            client.set_terminated(run_id, "FINISHED", end_time=time)
            return run_id

    def _record_parts(
        self, client: Any, experiment: str, parent: str, time: int, parts: Sequence[Part]
    ) -> None:
        """A run for each part below the run ``parent``; those that an interruption left are completed."""
        if not parts:
            return
        runs = client.search_runs([experiment], f"tags.`{_PARENT_TAG}` = '{parent}'", max_results=_MOST_PARTS)
        there = {run.data.tags.get(_PART_TAG): run for run in runs}
        for part in parts:
            tags = {_PARENT_TAG: parent, _PART_TAG: part.name} | ({"note": part.note} if part.note else {})
            run = there.get(part.name) or client.create_run(
                experiment, start_time=time - int(part.seconds * 1000), run_name=part.name, tags=tags
            )
            if run.info.status not in ("FINISHED", "FAILED"):
                run_id = str(run.info.run_id)
                figures = {**_numbers(part.metrics), "seconds": part.seconds}
                _log(client, run_id, time, part.parameters, figures, part.learning_curve, {})
                client.set_terminated(run_id, "FAILED" if part.failed else "FINISHED", end_time=time)

    @override
    def register(
        self,
        ref: ArtifactRef,
        metrics: Mapping[str, JsonValue],
        tags: Mapping[str, str],
        approval: Literal["automatic", "pending"] | None = None,
        carried: Decision | None = None,
    ) -> RegisteredVersion:
        wanted = dict(tags) | {f"metric.{name}": repr(value) for name, value in _numbers(metrics).items()}
        with self._client() as client:
            found = self._version_of(client, ref.digest)
            standing = self._registered(client, found) if found is not None else None
            if standing is not None and standing.in_production:
                wanted |= _approval_if_missing(standing)
            else:
                decided = standing.decision if standing is not None else None
                if carried and (decided is None or (decided.at and carried.at > decided.at)):
                    wanted |= tags_of(carried)
                elif approval and decided is None:
                    wanted[APPROVAL_TAG] = approval
            if found is None:
                if not client.search_registered_models(f"name = '{self.model_name}'"):
                    client.create_registered_model(
                        self.model_name, description="Assigns a catalog category to an offer."
                    )
                run = _run_of(client, self._experiment(client), ref)
                found = client.create_model_version(
                    self.model_name,
                    source=ref.uri,
                    run_id=run.info.run_id if run is not None else None,
                    tags=wanted | {f"artifact.{name}": str(getattr(ref, name)) for name in _ARTIFACT_TAGS},
                    description=f"Model version {ref.version}",
                )
            for name, value in wanted.items():
                if found.tags.get(name) != value:
                    client.set_model_version_tag(self.model_name, str(found.version), name, value)
            return self._registered(client, found)

    @override
    def version_of(self, ref: ArtifactRef) -> RegisteredVersion | None:
        with self._client() as client:
            found = self._version_of(client, ref.digest)
            return self._registered(client, found) if found is not None else None

    @override
    def versions(self) -> list[RegisteredVersion]:
        with self._client() as client:
            return self._versions(client)

    @override
    @input_errors_fail_plainly()
    def decide(
        self,
        version: RegisteredVersion,
        decision: Choice,
        by: str,
        reason: str,
        despite_gate: bool = False,
    ) -> RegisteredVersion:
        by, reason = by.strip(), reason.strip()
        name = f"version {version.version} (model {version.model_version})"
        for what, given in (("by", by), ("reason", reason)):
            if not given:
                raise InputError(
                    f"{what} is empty: who decides about {name} and why is kept in the registry; give both"
                )
        with self._client() as client:
            standing = self._registered(client, version)
            if decision == "approved" and not standing.passed and not despite_gate:
                raise InputError(
                    f"{name} did not pass the gate and is not approved: see the checks of "
                    "student_evaluation and compiled_student, or approve it despite the gate "
                    "(despite_gate, --despite-gate), which is kept with the decision"
                )
            wanted = Decision(
                decision=decision,
                by=by,
                reason=shortened(reason, _LONGEST_REASON),
                at=now(),
                despite_gate=decision == "approved" and not standing.passed,
            )
            before = standing.decision
            has_effect = decision == "rejected" or standing.in_production
            if (
                before
                and before.at
                and has_effect
                and msgspec.structs.replace(wanted, at=before.at) == before
            ):
                return standing
            for tag, value in tags_of(wanted).items():
                client.set_model_version_tag(self.model_name, version.version, tag, value)
            return self._registered(client, version)

    @override
    def annotate(self, version: RegisteredVersion, tags: Mapping[str, str]) -> RegisteredVersion:
        with self._client() as client:
            for name, value in tags.items():
                client.set_model_version_tag(self.model_name, version.version, name, value)
            return self._registered(client, version)

    @override
    def promote(self, version: RegisteredVersion, promotion: Promotion) -> RegisteredVersion:
        with self._client() as client:
            versions = self._versions(client)
            self._complete_what_has_served(client, versions)
            history = _history_of(versions)
            # The entry before the alias: a repeat after an interruption in between finds it.
            if not history or history[-1].registry_version != version.version:
                entry = msgspec.structs.replace(
                    promotion, reason=shortened(promotion.reason, _LONGEST_REASON)
                )
                client.set_model_version_tag(
                    self.model_name,
                    version.version,
                    _PROMOTION_TAGS + promotion.at,
                    msgspec.json.encode(entry).decode(),
                )
            client.set_registered_model_alias(self.model_name, _PRODUCTION, version.version)
            return self._registered(client, version)

    def _complete_what_has_served(self, client: Any, versions: Sequence[RegisteredVersion]) -> None:
        """Note as tags what follows from being or having been in production, before that changes."""
        for version in versions:
            if version.promotions:
                missing = _approval_if_missing(version)
                for entry in version.promotions:
                    missing[_PROMOTION_TAGS + entry.at] = msgspec.json.encode(entry).decode()
                for name, value in missing.items():
                    if name not in version.tags:
                        client.set_model_version_tag(self.model_name, version.version, name, value)

    @override
    def production(self) -> RegisteredVersion | None:
        with self._client() as client:
            if self._production_number(client) is None:
                return None
            return self._registered(client, client.get_model_version_by_alias(self.model_name, _PRODUCTION))

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """MLflow's client; one process at a time where the store is a file.

        Raises:
            dg.Failure: one line, when MLflow or its store refuses or does not answer.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        for name in ("alembic", "mlflow.store.db"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # SageMaker's plugin stumbles over every request to a server that is none of SageMaker's, and says so.
        logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
        from mlflow import MlflowClient, set_tracking_uri
        from mlflow.exceptions import MlflowException

        if self.tracking_uri.startswith("arn:"):
            # The plugin signs for the server that is set here, whatever server the client has.
            set_tracking_uri(self.tracking_uri)
        file = self._file()
        with only_one(file.with_name(file.name + ".lock")) if file is not None else nullcontext():
            try:
                yield MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
            except MlflowException as error:
                first_line = str(error).strip().split("\n", maxsplit=1)[0]
                line = f"MLflow at {self.tracking_uri} (MLFLOW_TRACKING_URI): {first_line}"
                # Not chained: MLflow's own text may hold the URI with its password.
                raise dg.Failure(without_secrets(line)) from None

    def _file(self) -> Path | None:
        path = self.tracking_uri.removeprefix("sqlite:///")
        return Path(path) if path != self.tracking_uri else None

    def _experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(_EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        file = self._file()
        # Without a place of its own, MLflow would put artifacts into ./mlruns of whoever comes first.
        place = file.with_name("mlflow-artifacts").as_uri() if file is not None else None
        return str(client.create_experiment(_EXPERIMENT, artifact_location=place))

    def _version_of(self, client: Any, digest: str) -> Any | None:
        found = client.search_model_versions(
            f"name = '{self.model_name}' and tags.`artifact.digest` = '{digest}'"
        )
        return min(found, key=lambda version: int(version.version), default=None)

    def _production_number(self, client: Any) -> str | None:
        models = client.search_registered_models(f"name = '{self.model_name}'")
        number = models[0].aliases.get(_PRODUCTION) if models else None
        return str(number) if number is not None else None

    def _versions(self, client: Any) -> list[RegisteredVersion]:
        production = self._production_number(client)
        found: list[RegisteredVersion] = []
        token = None
        while True:
            page = client.search_model_versions(f"name = '{self.model_name}'", page_token=token)
            found += [
                self._from_registry(version, str(version.version) == production)
                for version in page
                # A version that somebody else registered under this name is none of ours.
                if {f"artifact.{name}" for name in _ARTIFACT_TAGS} <= version.tags.keys()
            ]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: int(version.version), reverse=True)

    def _registered(self, client: Any, some_version: Any) -> RegisteredVersion:
        """The version as the registry has it now (search results lack the aliases)."""
        version = client.get_model_version(self.model_name, str(some_version.version))
        return self._from_registry(version, _PRODUCTION in version.aliases)

    def _from_registry(self, version: Any, in_production: bool) -> RegisteredVersion:
        tags = {str(name): str(value) for name, value in version.tags.items()}
        artifact = {name: tags.pop(f"artifact.{name}") for name in _ARTIFACT_TAGS}
        metrics = {
            name.removeprefix("metric."): float(tags.pop(name))
            for name in sorted(tags)
            if name.startswith("metric.")
        }
        registered_at = datetime.datetime.fromtimestamp(version.creation_timestamp / 1000, datetime.UTC)
        return RegisteredVersion(
            name=self.model_name,
            version=str(version.version),
            ref=ArtifactRef(**artifact, metrics=dict(metrics)),
            metrics=metrics,
            tags=tags,
            registered_at=registered_at.isoformat(timespec="seconds"),
            in_production=in_production,
        )


def _decoded(text: str, kind: type[_T]) -> _T | None:
    """What a tag holds; nothing where a hand in MLflow has made something else of it."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError:
        return None


def tags_of(decision: Decision) -> dict[str, str]:
    """What is kept of a decision; the approval last: until it is there, nothing was decided."""
    return {_DECISION_TAG: msgspec.json.encode(decision).decode(), APPROVAL_TAG: decision.decision}


def _approval_if_missing(version: RegisteredVersion) -> dict[str, str]:
    return {} if APPROVAL_TAG in version.tags or not version.passed else {APPROVAL_TAG: version.approval}


def _history_of(versions: Sequence[RegisteredVersion]) -> list[Promotion]:
    promotions = [promotion for version in versions for promotion in version.promotions]
    return sorted(promotions, key=lambda promotion: promotion.at)


def _run_of(client: Any, experiment: str, ref: ArtifactRef) -> Any | None:
    runs = client.search_runs(
        [experiment],
        f"tags.`artifact.kind` = '{ref.kind}' and tags.`artifact.key` = '{ref.key}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return runs[0] if runs else None


def _log(
    client: Any,
    run_id: str,
    time: int,
    parameters: Mapping[str, JsonValue],
    figures: Mapping[str, float],
    learning_curve: Sequence[Mapping[str, JsonValue]],
    tags: Mapping[str, str],
) -> None:
    """Write all that is known of a run; again, it changes nothing."""
    from mlflow.entities import Metric, Param, RunTag

    metrics = [Metric(name, value, time, 0) for name, value in figures.items()]
    for number, point in enumerate(learning_curve):
        step = int(point.get("step", number))
        metrics += [
            Metric(f"curve/{name}", value, time, step)
            for name, value in _numbers(point).items()
            if name != "step"
        ]
    for some in _batches(metrics, 1000):
        client.log_batch(run_id, metrics=some)
    for batch in _batches(list(parameters.items()), 100):
        client.log_batch(run_id, params=[Param(name, _parameter(value)) for name, value in batch])
    for few in _batches(list(tags.items()), 100):
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in few])


def _numbers(values: Mapping[str, JsonValue]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _parameter(value: JsonValue) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return shortened(text, _LONGEST_PARAMETER)


def shortened(text: str, longest: int) -> str:
    """At most ``longest`` characters of a text; where some are missing, it ends in "…"."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def now() -> str:
    """The time as it is kept with decisions and promotions: ISO, UTC, sortable as text."""
    return as_kept(datetime.datetime.now(datetime.UTC))


def as_kept(time: datetime.datetime) -> str:
    """A time in the form of :func:`now`."""
    # Names of tags may hold no "+".
    return time.astimezone(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _batches(items: list[_T], size: int) -> Iterator[list[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
