"""What SageMaker is asked to serve: the requests for models and configurations, named by their content.

A *fleet* is what one endpoint configuration describes: models in slots, with the machines they run on.
The same fleet has the same name wherever and whenever it is asked for, so that a repeat finds it.

SageMaker takes a guarded roll-out only from one configuration to another with the same variant names.
The name of a variant is therefore a *slot* and no version: what serves alone is always in :data:`MAIN`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from ml.serving.variants import variant_of
from resources.endpoints import RolloutPolicy

MAIN = "main"
"""Slot of what serves alone; in a split, of the version that served before it."""

JSON_TYPES = ("application/json", "application/jsonlines", "application/x-ndjson")
"""Requests and answers of these types are captured as text; others would be in base64."""

TAXONOMY_TAG = "offer-assets:taxonomy-of-"
"""With the model version behind it: tag of a configuration that says what the model knows."""

_INSTANCES_FOR_A_CANARY = 2
_SECONDS_TO_DOWNLOAD = 900
_SECONDS_TO_COME_UP = 300
_SECONDS_TO_PROVISION = 3_600
"""For new instances, their models and health checks, beside the waits of a roll-out."""

_NEURON = re.compile(r"ml\.(inf2|trn)")
_WITH_LOCAL_DISK = re.compile(r"ml\.([cmr]\d[a-z]*d[a-z]*|g[4-9]\w*|p3dn|p[4-9]\w*(-\w+)?|trn\w+)\.")
"""Their disk is encrypted by its own hardware; a key for their volume is refused."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled student as SageMaker is to serve it."""

    version: str
    taxonomy_version: str
    name: str
    """Of the SageMaker model."""
    request: dict[str, Any]
    """Arguments of ``create_model``."""


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a variant of the endpoint."""

    name: str
    model: Model
    weight: float
    """Relative to the other slots; of a shadow: the share of the requests of which it sees a copy."""


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint configuration is to describe."""

    slots: list[Slot]
    shadow: Slot | None = None

    @property
    def models(self) -> list[Model]:
        """Of all slots, the shadow's last."""
        return [slot.model for slot in (*self.slots, *([self.shadow] if self.shadow else []))]


class _ModelFacts(msgspec.Struct, frozen=True):
    """What matters here of a compiled student's ``model.json``."""

    target: str
    taxonomy_version: str


class Naming:
    """Names of what belongs to one endpoint; each begins with the endpoint's."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._model = re.compile(re.escape(endpoint) + r"-([0-9a-f]{12})-[0-9a-f]{8}")
        self._config = re.compile(re.escape(endpoint) + r"-[0-9a-f]{8}-[0-9a-f]{4}")

    def model(self, version: str, request: Mapping[str, Any]) -> str:
        """Of the SageMaker model that serves a version as ``request`` says."""
        return f"{self.endpoint}-{version}-{_digest(request)[:8]}"

    def config(self, request: Mapping[str, Any]) -> str:
        """Of an endpoint configuration. What differs in its weights only shares :meth:`fleet_of` it."""
        weights = [variant["InitialVariantWeight"] for variant in request["ProductionVariants"]]
        unweighted = [
            {name: value for name, value in variant.items() if name != "InitialVariantWeight"}
            for variant in request["ProductionVariants"]
        ]
        fleet = _digest({**request, "ProductionVariants": unweighted})[:8]
        return f"{self.endpoint}-{fleet}-{_digest(weights)[:4]}"

    def fleet_of(self, config: str) -> str:
        """The part of a configuration's name that stands for all but its weights."""
        return config.rpartition("-")[0]

    def version_of(self, model: str) -> str | None:
        """Model version that a SageMaker model serves; None: it is not ours."""
        match = self._model.fullmatch(model)
        return match[1] if match else None

    def is_config(self, name: str) -> bool:
        """Whether an endpoint configuration is one of ours."""
        return self._config.fullmatch(name) is not None


class FleetRequests(msgspec.Struct, frozen=True, kw_only=True):
    """Turns models and fleets into requests, by the settings."""

    naming: Naming
    role: str
    vpc: dict[str, Any]
    kms_key: str
    images: dict[str, str]
    """By target of the compiled student."""
    instance_type: str
    instances: int
    capture_percent: int = 0
    capture_uri: str = ""
    instance_setting: str = "OFFER_ASSETS_AWS_ENDPOINT_INSTANCE_TYPE"
    """Where people set the instance type."""

    def model(self, folder: Path, ref: ArtifactRef) -> Model:
        """How a compiled student is served.

        Args:
            folder: Its local folder; ``model.json`` names target and taxonomy version.
            ref: Its place in S3.

        Raises:
            InputError: it does not fit the instance type, an image is not set, or it is not in S3.
        """
        facts = self._facts(folder, ref)
        request = {
            "PrimaryContainer": {
                "Image": self.images[facts.target],
                "ModelDataSource": {
                    "S3DataSource": {
                        "S3Uri": ref.uri.rstrip("/") + "/",
                        "S3DataType": "S3Prefix",
                        "CompressionType": "None",
                    }
                },
            },
            "ExecutionRoleArn": self.role,
            "EnableNetworkIsolation": True,
            **self.vpc,
        }
        return Model(
            version=ref.version,
            taxonomy_version=facts.taxonomy_version,
            name=self.naming.model(ref.version, request),
            request=request,
        )

    def config(self, fleet: Fleet) -> tuple[str, dict[str, Any]]:
        """Name and arguments of ``create_endpoint_config``."""
        request: dict[str, Any] = {"ProductionVariants": [self._variant(slot) for slot in fleet.slots]}
        if fleet.shadow:
            request["ShadowProductionVariants"] = [self._variant(fleet.shadow)]
        if self.capture_percent:
            request["DataCaptureConfig"] = self._capture
        if self.kms_key and not _WITH_LOCAL_DISK.match(self.instance_type):
            request["KmsKeyId"] = self.kms_key
        name = self.naming.config(request)
        tags = {TAXONOMY_TAG + model.version: model.taxonomy_version for model in fleet.models}
        request["Tags"] = [{"Key": key, "Value": value} for key, value in sorted(tags.items())]
        return name, request

    @property
    def _capture(self) -> dict[str, Any]:
        key = {"KmsKeyId": self.kms_key} if self.kms_key else {}
        return {
            "EnableCapture": True,
            "InitialSamplingPercentage": self.capture_percent,
            "DestinationS3Uri": self.capture_uri,
            "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
            "CaptureContentTypeHeader": {"JsonContentTypes": list(JSON_TYPES)},
            **key,
        }

    def _variant(self, slot: Slot) -> dict[str, Any]:
        return {
            "VariantName": slot.name,
            "ModelName": slot.model.name,
            "InstanceType": self.instance_type,
            "InitialInstanceCount": self.instances,
            "InitialVariantWeight": slot.weight,
            "ModelDataDownloadTimeoutInSeconds": _SECONDS_TO_DOWNLOAD,
            "ContainerStartupHealthCheckTimeoutInSeconds": _SECONDS_TO_COME_UP,
            "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        }

    def _facts(self, folder: Path, ref: ArtifactRef) -> _ModelFacts:
        try:
            facts = msgspec.json.decode((folder / "model.json").read_bytes(), type=_ModelFacts)
        except (FileNotFoundError, msgspec.DecodeError) as error:
            raise InputError(f"{folder} cannot be served: its model.json: {error}; compile it anew") from None
        if not ref.uri.startswith("s3://"):
            raise InputError(
                f"model {ref.version} lies in {ref.uri}: SageMaker serves what lies in S3; "
                "make it with OFFER_ASSETS_ENV=aws"
            )
        if facts.target not in self.images:
            known = " and ".join(self.images)
            raise InputError(f"model {ref.version} is compiled for {facts.target}; endpoints serve {known}")
        if not self.images[facts.target]:
            setting = {"neuron": "NEURON"}.get(facts.target, "SERVING")
            raise InputError(
                f"model {ref.version} is compiled for {facts.target}, but "
                f"OFFER_ASSETS_AWS_{setting}_IMAGE is not set"
            )
        if (facts.target == "neuron") != bool(_NEURON.match(self.instance_type)):
            raise InputError(
                f"{self.instance_setting}={self.instance_type} does not run what is compiled "
                f"for {facts.target} (model {ref.version}); neuron needs ml.inf2 or ml.trn1, cpu any other"
            )
        return facts


def split_slots(models: Sequence[tuple[Model, float]], main_version: str | None) -> list[Slot]:
    """Slots of several versions: the one in :data:`MAIN` stays there, or else the heaviest gets it.

    Args:
        models: With their weights, which count relative to each other.
        main_version: The version that is in :data:`MAIN` now.
    """
    total = sum(weight for _, weight in models)
    versions = [model.version for model, _ in models]
    main = main_version if main_version in versions else max(models, key=lambda each: each[1])[0].version
    slots = [
        Slot(
            name=MAIN if model.version == main else slot_name(model),
            model=model,
            weight=round(weight / total, 6),
        )
        for model, weight in models
    ]
    return sorted(slots, key=lambda slot: (slot.name != MAIN, slot.name))


def slot_name(model: Model) -> str:
    """Slot of a version that serves beside :data:`MAIN`, or in its shadow."""
    return variant_of(model.version)


def deployment_config(policy: RolloutPolicy, alarms: Sequence[str], watched_seconds: int) -> dict[str, Any]:
    """``DeploymentConfig`` of a guarded roll-out: a canary (or all at once), alarms, the way back.

    Args:
        policy: How many requests a new version gets at first, and for how long.
        alarms: Names of the alarms that bring the version before back.
        watched_seconds: So long the fleet before is kept and alarms count once all requests moved.
    """
    canary_seconds = math.ceil(policy.canary_seconds)
    routing: dict[str, Any] = {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 0}
    if canary_seconds:
        routing = {
            "Type": "CANARY",
            "WaitIntervalInSeconds": canary_seconds,
            "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": max(1, round(policy.canary_percent))},
        }
    config: dict[str, Any] = {
        "BlueGreenUpdatePolicy": {
            "TrafficRoutingConfiguration": routing,
            "TerminationWaitInSeconds": watched_seconds,
            "MaximumExecutionTimeoutInSeconds": canary_seconds + watched_seconds + _SECONDS_TO_PROVISION,
        }
    }
    if alarms:
        config["AutoRollbackConfiguration"] = {"Alarms": [{"AlarmName": name} for name in alarms]}
    return config


def check_canary(policy: RolloutPolicy, instances: int) -> None:
    """Half of a fleet is the most that a canary may be.

    Raises:
        InputError: there are too few instances for that.
    """
    if policy.canary_seconds and instances < _INSTANCES_FOR_A_CANARY:
        raise InputError(
            f"OFFER_ASSETS_AWS_ENDPOINT_MIN_INSTANCES={instances}: SageMaker's canary is at most half of the "
            f"instances, so it takes {_INSTANCES_FOR_A_CANARY}; or set OFFER_ASSETS_CANARY_SECONDS=0"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
