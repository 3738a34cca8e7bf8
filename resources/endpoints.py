"""The door to the endpoint: the running service that catalogues offers, with one model version or several.

A new version takes over at once or by a canary that alarms watch; versions share the requests by weight, or
one of them only sees copies. The implementations are :mod:`resources.local_endpoints` and
:mod:`resources.sagemaker_endpoints`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from ml.serving.variants import variant_of


class EndpointError(dg.Failure):
    """The endpoint does not come up or does not answer; what served before, serves on."""


class RolledBackError(EndpointError):
    """An alarm tripped while a version was rolled out; the version before has all requests again.

    The line names the alarm, what it saw and its limit. To try again at once would show clients the same.
    """

    def __init__(self, line: str) -> None:
        super().__init__(line, allow_retries=False)


class VariantStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One of the models that serve side by side."""

    name: str
    """See :func:`variant_name`."""
    model_version: str
    weight: float
    """Its share of the requests, in [0, 1]; of a shadow: the share of which it sees a copy."""
    is_shadow: bool = False


class EndpointStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What serves right now."""

    url: str
    """Offers are sent by POST to ``<url>/invocations``."""
    model_version: str
    """Of the variant with the most weight."""
    taxonomy_version: str
    """What that model knows."""
    started: str
    """ISO time of the deployment (UTC)."""
    variants: list[VariantStatus]
    """Those that answer first, by weight; then the shadow."""
    details: dict[str, str] = {}
    """For people: process and log file here, ARN and instances there."""


class VariantObservation(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of a variant since it got its share (SageMaker: in the last hour)."""

    variant: VariantStatus
    requests: int
    errors: int
    """Requests that ended in a server error (5xx), or found no server."""
    p99_milliseconds: float | None
    """None before the first request."""
    low_confidence_share: float | None
    """Of the offers: those of which the model was less than half sure, in [0, 1]."""


class RolloutPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How a new version takes over, and what brings the version before back."""

    canary_percent: float
    """Of the requests: what the new version gets at first."""
    canary_seconds: float
    """How long it is watched with that share; 0: it gets all requests at once."""
    error_percent: float
    """Of its requests: more server errors trip the alarm."""
    p99_milliseconds: float
    """A slower hundredth of its requests trips the alarm."""
    low_confidence_percent: float
    """Of its offers: more of which it is less than half sure trip the alarm."""


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is to serve beside others."""

    folder: Path
    """The verified local folder of the compiled student."""
    ref: ArtifactRef
    weight: float
    """Relative to those of the others."""


class Endpoints(dg.ConfigurableResource[Any], ABC):
    """Where compiled students are served."""

    canary_percent: float = 10.0
    canary_seconds: float = 0.0
    alarm_error_percent: float = 1.0
    alarm_p99_milliseconds: float = 2_000.0
    alarm_low_confidence_percent: float = 60.0

    @property
    def policy(self) -> RolloutPolicy:
        """How :meth:`deploy` lets a version take over from another."""
        return RolloutPolicy(
            canary_percent=self.canary_percent,
            canary_seconds=self.canary_seconds,
            error_percent=self.alarm_error_percent,
            p99_milliseconds=self.alarm_p99_milliseconds,
            low_confidence_percent=self.alarm_low_confidence_percent,
        )

    @abstractmethod
    def deploy(self, folder: Path, ref: ArtifactRef, at_once: bool = False) -> EndpointStatus:
        """Serve a compiled student alone; returns when it has all requests. If it has already, it goes on.

        Where another version serves, the new one takes over by the :attr:`policy`. A split and a shadow end.

        Args:
            folder: The verified local folder of the compiled student.
            ref: The compiled student.
            at_once: Without a canary: what serves now is to go, for instance.

        Raises:
            InputFailure: a setting stands in the way (the port is taken, for instance).
            EndpointError: it does not come up. The version before goes on serving.
            RolledBackError: an alarm tripped. The version before has all requests again.
        """

    @abstractmethod
    def split(self, variants: Sequence[Variant]) -> EndpointStatus:
        """Let models share the requests by weight, from now on; a shadow ends.

        Raises:
            InputFailure: no variant, one twice, or a weight that is none.
            EndpointError: one does not come up. What served before goes on serving.
        """

    @abstractmethod
    def shadow(self, folder: Path, ref: ArtifactRef, percent: float) -> EndpointStatus:
        """Send copies of requests to a model whose answers go nowhere; it takes the place of another shadow.

        Args:
            folder: The verified local folder of the compiled student.
            ref: The compiled student.
            percent: Of the requests: what it sees.

        Raises:
            InputFailure: nothing serves, several share the requests, or the model serves already.
            EndpointError: it does not come up. What served before goes on serving.
        """

    @abstractmethod
    def end_shadow(self) -> EndpointStatus | None:
        """Send no more copies; what serves then, None if nothing does."""

    @abstractmethod
    def observations(self) -> list[VariantObservation]:
        """What was seen of each variant, in the order of the status; empty where nothing is watched."""

    @abstractmethod
    def releasing(self) -> AbstractContextManager[None]:
        """Hold what serves for oneself: whoever changes it checks, deploys and promotes in here.

        Whoever else does so waits. Not to be entered twice by the same thread.
        """

    @abstractmethod
    def check_available(self) -> None:
        """Make sure, at next to no cost, that a deployment would find its place.

        Raises:
            InputFailure: a stranger uses it (the port); the line names the setting.
        """

    @abstractmethod
    def status(self) -> EndpointStatus | None:
        """What serves right now, asked of the endpoint itself; None if nothing answers."""

    @abstractmethod
    def invoke(self, offers: Sequence[Mapping[str, Any]], variant: str = "") -> list[dict[str, Any]]:
        """Predictions of the endpoint, one per offer and in their order.

        Args:
            offers: What to catalogue.
            variant: Name of the one that has to answer; empty: any, by weight.

        Raises:
            InputFailure: the endpoint refused the offers, or has no such variant; its own line.
            EndpointError: it does not answer.
        """

    @abstractmethod
    def stop(self) -> bool:
        """End the service, after the requests under way; False if there was none."""


def variant_name(ref: ArtifactRef) -> str:
    """Name of the variant that serves a compiled student."""
    return variant_of(ref.version)


def shares_of(variants: Sequence[Variant]) -> list[float]:
    """What each variant of a split gets; together 1.

    Raises:
        InputError: no variant, one twice, or a weight that is none.
    """
    versions = [variant.ref.version for variant in variants]
    if not variants or len(set(versions)) < len(versions):
        raise InputError(f"split between {versions}: expected one version or more, each once")
    for variant in variants:
        if not (variant.weight > 0 and math.isfinite(variant.weight)):
            raise InputError(
                f"weight {variant.weight:g} of model version {variant.ref.version}: expected a number above 0"
            )
    total = sum(variant.weight for variant in variants)
    return [variant.weight / total for variant in variants]


def check_shadow(version: str, percent: float, answering: Sequence[str]) -> None:
    """Make sure that a shadow would see something, and tell something.

    Args:
        version: Model version of the shadow.
        percent: Of the requests: what it is to see.
        answering: Model versions that answer requests now.

    Raises:
        InputError: it would not.
    """
    if not 0 < percent <= 100:
        raise InputError(f"percent {percent:g}: a shadow sees more than 0 and at most 100")
    if not answering:
        raise InputError("nothing serves whose requests a shadow could see: deploy a version first")
    if len(answering) > 1:
        raise InputError(
            f"{len(answering)} versions share the requests, and only one that serves alone has a shadow: "
            "end the split by a deployment first"
        )
    if answering[0] == version:
        raise InputError(f"model version {version} serves already: its shadow would tell nothing")


def said_in(refusal: str) -> str:
    """The line in a refusal of our server; what is none, as it is."""
    try:
        return str(msgspec.json.decode(refusal, type=dict[str, Any])["error"])
    except (msgspec.DecodeError, KeyError):
        return refusal
