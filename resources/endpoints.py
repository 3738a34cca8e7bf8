"""The door to the endpoint: the running service that catalogues offers with one model version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef
from ml.serving.variants import variant_of


class EndpointError(dg.Failure):
    """The endpoint does not come up or does not answer; what served before, serves on."""


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


class Endpoints(dg.ConfigurableResource[Any], ABC):
    """Where compiled students are served."""

    @abstractmethod
    def deploy(self, folder: Path, ref: ArtifactRef) -> EndpointStatus:
        """Serve a compiled student; returns when it answers. Nothing happens if it already does.

        Args:
            folder: The verified local folder of the compiled student.
            ref: The compiled student.

        Raises:
            InputFailure: a setting stands in the way (the port is taken, for instance).
            EndpointError: it does not come up. The version before goes on serving.
        """

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
    def invoke(self, offers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Predictions of the endpoint, one per offer and in their order.

        Raises:
            InputFailure: the endpoint refused the offers; its own line.
            EndpointError: it does not answer.
        """

    @abstractmethod
    def stop(self) -> bool:
        """End the service, after the requests under way; False if there was none."""


def variant_name(ref: ArtifactRef) -> str:
    """Name of the variant that serves a compiled student."""
    return variant_of(ref.version)
