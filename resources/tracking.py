"""The door to experiment tracking and to the model registry.

Every artifact can be recorded as a run (parameters, metrics, what it was made of). A compiled
student is registered as a version of the model; one version at a time is in production.
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
from typing import Any, TypeVar

import dagster as dg
import msgspec
from typing_extensions import override

from ml.artifacts import ArtifactRef, JsonValue, Manifest
from resources.atomic_files import only_one
from resources.redaction import without_secrets

_T = TypeVar("_T")

_EXPERIMENT = "offer-assets"
_PRODUCTION = "production"
_LONGEST_PARAMETER = 6000
_ARTIFACT_TAGS = ("kind", "key", "digest", "uri")


class RegisteredVersion(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the model in the registry."""

    name: str
    version: str
    """Number of the version in the registry."""
    ref: ArtifactRef
    """The compiled student."""
    metrics: dict[str, float]
    tags: dict[str, str]
    in_production: bool

    @property
    def model_version(self) -> str:
        """The version that predictions carry."""
        return self.ref.version


class Tracking(dg.ConfigurableResource[Any], ABC):
    """Where runs are recorded and models registered. All of it can be repeated without effect."""

    @abstractmethod
    def record(
        self,
        manifest: Manifest,
        ref: ArtifactRef,
        learning_curve: Sequence[Mapping[str, JsonValue]] = (),
    ) -> str:
        """Record how an artifact was made; returns the id of its run, an existing one where there is one.

        Args:
            manifest: The artifact's manifest.
            ref: The artifact.
            learning_curve: Figures by step, ``{"step": 20, "loss": 1.3, …}``.
        """

    @abstractmethod
    def register(
        self, ref: ArtifactRef, metrics: Mapping[str, JsonValue], tags: Mapping[str, str]
    ) -> RegisteredVersion:
        """Register a compiled student; a digest that is registered gets the new metrics and tags.

        Of ``metrics`` the numbers are kept.
        """

    @abstractmethod
    def version_of(self, ref: ArtifactRef) -> RegisteredVersion | None:
        """The version as which this compiled student is registered, or None."""

    @abstractmethod
    def promote(self, version: RegisteredVersion, reason: str) -> RegisteredVersion:
        """Make ``version`` the one in production, and keep the reason with it."""

    @abstractmethod
    def production(self) -> RegisteredVersion | None:
        """The version in production, or None before the first."""


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
    ) -> str:
        from mlflow.entities import Metric, Param, RunTag

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
            metrics = [
                Metric(name, value, time, 0)
                for name, value in {**_numbers(manifest.metrics), "seconds": manifest.seconds}.items()
            ]
            for number, point in enumerate(learning_curve):
                step = int(point.get("step", number))
                metrics += [
                    Metric(f"curve/{name}", value, time, step)
                    for name, value in _numbers(point).items()
                    if name != "step"
                ]
            tags = {f"input.{name}": digest for name, digest in manifest.inputs.items()}
            tags |= {"code_version": manifest.code_version, "code_revision": manifest.code_revision or ""}
            for some in _batches(metrics, 1000):
                client.log_batch(run_id, metrics=some)
            for some in _batches(list(manifest.parameters.items()), 100):
                client.log_batch(run_id, params=[Param(name, _parameter(value)) for name, value in some])
            for some in _batches(list(tags.items()), 100):
                client.log_batch(run_id, tags=[RunTag(name, value) for name, value in some])
            client.set_terminated(run_id, "FINISHED", end_time=time)
            return run_id

    @override
    def register(
        self, ref: ArtifactRef, metrics: Mapping[str, JsonValue], tags: Mapping[str, str]
    ) -> RegisteredVersion:
        wanted = dict(tags) | {f"metric.{name}": repr(value) for name, value in _numbers(metrics).items()}
        with self._client() as client:
            found = self._version_of(client, ref.digest)
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
    def promote(self, version: RegisteredVersion, reason: str) -> RegisteredVersion:
        with self._client() as client:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            for name, value in {"promoted_at": now, "promotion_reason": reason}.items():
                client.set_model_version_tag(self.model_name, version.version, name, value)
            client.set_registered_model_alias(self.model_name, _PRODUCTION, version.version)
            return self._registered(client, version)

    @override
    def production(self) -> RegisteredVersion | None:
        with self._client() as client:
            models = client.search_registered_models(f"name = '{self.model_name}'")
            if not models or _PRODUCTION not in models[0].aliases:
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
        for name in ("alembic", "mlflow.store.db"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

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

    def _registered(self, client: Any, some_version: Any) -> RegisteredVersion:
        """The version as the registry has it now (search results lack the aliases)."""
        version = client.get_model_version(self.model_name, str(some_version.version))
        tags = {str(name): str(value) for name, value in version.tags.items()}
        artifact = {name: tags.pop(f"artifact.{name}") for name in _ARTIFACT_TAGS}
        metrics = {
            name.removeprefix("metric."): float(tags.pop(name))
            for name in sorted(tags)
            if name.startswith("metric.")
        }
        return RegisteredVersion(
            name=self.model_name,
            version=str(version.version),
            ref=ArtifactRef(**artifact, metrics=dict(metrics)),
            metrics=metrics,
            tags=tags,
            in_production=_PRODUCTION in version.aliases,
        )


def _run_of(client: Any, experiment: str, ref: ArtifactRef) -> Any | None:
    runs = client.search_runs(
        [experiment],
        f"tags.`artifact.kind` = '{ref.kind}' and tags.`artifact.key` = '{ref.key}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return runs[0] if runs else None


def _numbers(values: Mapping[str, JsonValue]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _parameter(value: JsonValue) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= _LONGEST_PARAMETER else text[: _LONGEST_PARAMETER - 1] + "…"


def _batches(items: list[_T], size: int) -> Iterator[list[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
