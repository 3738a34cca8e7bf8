"""One endpoint of SageMaker as the service has it: looked at, begun, waited for, cleared away.

What is to serve, and what a failure means, is :mod:`resources.sagemaker_endpoints`.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
import msgspec

from resources.aws import AwsAccess, aws_errors, error_code
from resources.endpoints import EndpointError
from resources.sagemaker_fleet import TAXONOMY_TAG, Model, Naming

IN_PROGRESS = frozenset({"Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting"})
SERVING = frozenset({"InService", "Updating", "SystemUpdating", "RollingBack", "UpdateRollbackFailed"})
FAILED = frozenset({"Failed", "OutOfService"})
"""All that the service lets one do with such an endpoint is to delete it."""

_LONGEST_SECONDS = 4 * 3_600.0
"""Beyond the longest roll-out that the settings allow."""

_DEPLOYED_TAG = "offer-assets:deployed"
"""Of the endpoint: configuration and ISO time, as autoscaling and failed updates change it too."""

_SECONDS_TO_BE_SEEN = (1.0, 2.0, 4.0, 8.0)
"""Pauses before a call is repeated that does not find what was just created."""

_KEPT = 5
"""Configurations before the one that serves; older ones and their models are deleted."""


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint as ``describe_endpoint`` tells it."""

    status: str
    arn: str
    config: str
    """Configuration in service; while it is created, the one that will be."""
    pending_config: str
    """Configuration to which it is being updated; empty if it is not."""
    failure: str
    """The service's reason why the last change failed."""
    modified: datetime.datetime
    weights: dict[str, float]
    """By variant."""
    instances: dict[str, int]
    """By variant, as wanted by autoscaling."""
    progress: str = ""
    """What the variants that come up are doing."""

    @property
    def under_way(self) -> str:
        """Configuration that is being brought into service; empty if none is."""
        return self.config if self.status == "Creating" else self.pending_config

    @property
    def is_in_progress(self) -> bool:
        """Whether it has to be waited for before it can be changed."""
        return self.status in IN_PROGRESS


class Configured(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint configuration as the service has it."""

    models: dict[str, str]
    """SageMaker model by variant."""
    shadow: tuple[str, str, float] | None
    """Variant, SageMaker model and share of the requests."""
    instance_types: set[str]
    taxonomy_versions: dict[str, str]
    """By model version."""


class EndpointService:
    """The calls that concern one endpoint."""

    def __init__(self, aws: AwsAccess, naming: Naming, seconds_between_looks: float) -> None:
        self._aws = aws
        self._naming = naming
        self._name = naming.endpoint
        self._seconds_between_looks = seconds_between_looks

    def look(self) -> Described | None:
        """The endpoint right now; None: there is none."""
        sagemaker = self._aws.client("sagemaker")
        found: dict[str, Any] = {}
        with aws_errors(f"looking at endpoint {self._name}"), _absence_is_fine():
            found = sagemaker.describe_endpoint(EndpointName=self._name)
        if not found:
            return None
        pending = found.get("PendingDeploymentSummary", {})
        variants = found.get("ProductionVariants", [])
        return Described(
            status=found["EndpointStatus"],
            arn=found["EndpointArn"],
            config=found.get("EndpointConfigName", ""),
            pending_config=pending.get("EndpointConfigName", ""),
            failure=found.get("FailureReason", ""),
            modified=found["LastModifiedTime"],
            weights={each["VariantName"]: each.get("CurrentWeight", 0.0) for each in variants},
            instances={
                each["VariantName"]: each.get("DesiredInstanceCount", each.get("CurrentInstanceCount", 0))
                for each in variants
            },
            progress=_progress(pending.get("ProductionVariants", [])),
        )

    def configured(self, config: str) -> Configured | None:
        """What a configuration describes; None: there is none of that name."""
        sagemaker = self._aws.client("sagemaker")
        found: dict[str, Any] = {}
        with aws_errors(f"reading endpoint configuration {config}"), _absence_is_fine():
            found = sagemaker.describe_endpoint_config(EndpointConfigName=config)
            tags = self._tags(found["EndpointConfigArn"])
        if not found:
            return None
        variants = found["ProductionVariants"]
        shadows = [
            (each["VariantName"], each["ModelName"], float(each["InitialVariantWeight"]))
            for each in found.get("ShadowProductionVariants", [])
        ]
        return Configured(
            models={each["VariantName"]: each["ModelName"] for each in variants},
            shadow=shadows[0] if shadows else None,
            instance_types={each["InstanceType"] for each in variants},
            taxonomy_versions={
                key.removeprefix(TAXONOMY_TAG): value
                for key, value in tags.items()
                if key.startswith(TAXONOMY_TAG)
            },
        )

    def deployed_at(self, described: Described) -> str:
        """ISO time (UTC) at which what serves was deployed; of the last change, where that was not noted."""
        with aws_errors(f"reading the tags of endpoint {self._name}"), _absence_is_fine():
            config, _, at = self._tags(described.arn).get(_DEPLOYED_TAG, "").partition(" ")
            if config == described.config:
                return at
        return described.modified.astimezone(datetime.UTC).isoformat(timespec="seconds")

    def note_deployed(self, described: Described) -> None:
        """Note in a tag that what serves was just deployed; again, it stays at the first time."""
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"tagging endpoint {self._name}"), _absence_is_fine():
            if self._tags(described.arn).get(_DEPLOYED_TAG, "").partition(" ")[0] != described.config:
                noted = f"{described.config} {self.deployed_at(described)}"
                sagemaker.add_tags(ResourceArn=described.arn, Tags=[{"Key": _DEPLOYED_TAG, "Value": noted}])

    def settled(self) -> Described | None:
        """The endpoint once nothing is in progress any more; progress goes to the log.

        Raises:
            EndpointError: that takes longer than any roll-out may.
        """
        deadline = time.monotonic() + _LONGEST_SECONDS
        said = ""
        while (described := self.look()) is not None and described.is_in_progress:
            say = f"endpoint {self._name}: {described.status} {described.under_way} {described.progress}"
            if say != said:
                dg.get_dagster_logger().info(say.rstrip())
                said = say
            if time.monotonic() > deadline:
                raise EndpointError(
                    f"endpoint {self._name} is still {described.status} after {_LONGEST_SECONDS:.0f} s; "
                    "see the SageMaker console, and run again"
                )
            time.sleep(self._seconds_between_looks)
        return described

    def make_model(self, model: Model) -> None:
        """Create a SageMaker model unless it is there; its name says all that it is made of."""
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"looking at model {model.name}"), _absence_is_fine():
            sagemaker.describe_model(ModelName=model.name)
            return
        with aws_errors(f"creating model {model.name}"), _presence_is_fine():
            sagemaker.create_model(ModelName=model.name, **model.request)

    def make_config(self, config: str, request: dict[str, Any]) -> None:
        """Create an endpoint configuration unless it is there; its name says all that it is made of."""
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"looking at endpoint configuration {config}"), _absence_is_fine():
            sagemaker.describe_endpoint_config(EndpointConfigName=config)
            return
        with aws_errors(f"creating endpoint configuration {config}"), _presence_is_fine():
            _once_all_is_seen(lambda: sagemaker.create_endpoint_config(EndpointConfigName=config, **request))

    def begin_creation(self, config: str) -> bool:
        """Begin to create the endpoint; False: somebody else just did."""
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"creating endpoint {self._name}"), _presence_is_fine():
            _once_all_is_seen(
                lambda: sagemaker.create_endpoint(EndpointName=self._name, EndpointConfigName=config)
            )
            return True
        return False

    def begin_update(
        self, config: str, deployment: dict[str, Any] | None, *, keeps_instances: bool = True
    ) -> bool:
        """Begin to update the endpoint.

        Args:
            config: The configuration to serve.
            deployment: ``DeploymentConfig``; None: blue/green, all at once and without alarms.
            keeps_instances: Those that autoscaling added stay; else there are as many as ``config`` says.

        Returns:
            False: somebody else just began an update of it.
        """
        sagemaker = self._aws.client("sagemaker")
        guarded = {"DeploymentConfig": deployment} if deployment else {}
        of_config = ["DesiredWeight", "DataCaptureConfig"] + ["DesiredInstanceCount"] * (not keeps_instances)
        with aws_errors(f"updating endpoint {self._name}"), _change_under_way_is_fine():
            _once_all_is_seen(
                lambda: sagemaker.update_endpoint(
                    EndpointName=self._name,
                    EndpointConfigName=config,
                    RetainAllVariantProperties=True,
                    ExcludeRetainedVariantProperties=[{"VariantPropertyType": name} for name in of_config],
                    **guarded,
                )
            )
            return True
        return False

    def begin_weighing(self, weights: dict[str, float]) -> bool:
        """Begin to share the requests out otherwise; False: somebody else just began an update."""
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"weighing the variants of endpoint {self._name}"), _change_under_way_is_fine():
            sagemaker.update_endpoint_weights_and_capacities(
                EndpointName=self._name,
                DesiredWeightsAndCapacities=[
                    {"VariantName": slot, "DesiredWeight": weight} for slot, weight in weights.items()
                ],
            )
            return True
        return False

    def delete(self) -> None:
        """Delete the endpoint and wait until it is gone."""
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"deleting endpoint {self._name}"), _absence_is_fine():
            sagemaker.delete_endpoint(EndpointName=self._name)
        self.settled()

    def forget(self, config: str, models: list[str]) -> None:
        """Delete a configuration that serves nowhere, and its models."""
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"deleting endpoint configuration {config}"), _absence_is_fine():
            sagemaker.delete_endpoint_config(EndpointConfigName=config)
        for model in models:
            with aws_errors(f"deleting model {model}"), _absence_is_fine():
                sagemaker.delete_model(ModelName=model)

    def forget_superseded(self, in_service: str) -> set[str]:
        """Delete what served long ago; the last few stay.

        Returns:
            Versions of the models that are still there.
        """
        sagemaker = self._aws.client("sagemaker")
        with aws_errors(f"listing configurations and models of endpoint {self._name}"):
            pages = sagemaker.get_paginator("list_endpoint_configs").paginate(
                NameContains=self._name, SortBy="CreationTime", SortOrder="Descending"
            )
            configs = [each["EndpointConfigName"] for page in pages for each in page["EndpointConfigs"]]
            pages = sagemaker.get_paginator("list_models").paginate(NameContains=self._name)
            models = [each["ModelName"] for page in pages for each in page["Models"]]
        before = [name for name in configs if self._naming.is_config(name) and name != in_service]
        kept = {in_service, *before[:_KEPT]}
        needed = {model for name in kept for model in self._models_of(name)}
        for name in before[_KEPT:]:
            self.forget(name, [])
        versions = set()
        for model in models:
            version = self._naming.version_of(model)
            if version and model in needed:
                versions.add(version)
            elif version:
                with aws_errors(f"deleting model {model}"), _absence_is_fine():
                    sagemaker.delete_model(ModelName=model)
        return versions

    def _tags(self, arn: str) -> dict[str, str]:
        sagemaker = self._aws.client("sagemaker")
        pages = sagemaker.get_paginator("list_tags").paginate(ResourceArn=arn)
        return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}

    def _models_of(self, config: str) -> list[str]:
        configured = self.configured(config)
        if configured is None:
            return []
        return [*configured.models.values(), *([configured.shadow[1]] if configured.shadow else [])]


def _progress(variants: list[dict[str, Any]]) -> str:
    """``main: Baking``, as the service says of variants that come up."""
    return ", ".join(
        f"{each['VariantName']}: {'/'.join(status['Status'] for status in each.get('VariantStatus', []))}"
        for each in variants
    )


def _once_all_is_seen(call: Callable[[], object]) -> None:
    """Make a call that names what was created a moment ago: SageMaker may need a while to find it."""
    for seconds in _SECONDS_TO_BE_SEEN:
        with _absence_is_fine():
            call()
            return
        time.sleep(seconds)
    call()


@contextmanager
def _absence_is_fine() -> Iterator[None]:
    with _tolerated("could not find", "does not exist"):
        yield


@contextmanager
def _presence_is_fine() -> Iterator[None]:
    with _tolerated("already existing", "already exist"):
        yield


@contextmanager
def _change_under_way_is_fine() -> Iterator[None]:
    with _tolerated("in-progress", "in progress"):
        yield


@contextmanager
def _tolerated(*phrases: str) -> Iterator[None]:
    """SageMaker has one code for all that is wrong with a request; its message tells them apart."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if error_code(error) not in {"ValidationException", "ResourceNotFound", "ResourceInUse"}:
            raise
        if not any(phrase in str(error).lower() for phrase in phrases):
            raise
