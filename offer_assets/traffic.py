"""Who gets the requests besides the version in production: shadows and splits, by jobs that people start.

Neither changes which version is in production: a deployment or a rollback ends both. Who did it and why is
kept in the run and with ``offer_endpoint``, as an observation.
"""

from collections.abc import Sequence
from typing import Any

import dagster as dg
from pydantic import Field

from ml.errors import InputError
from offer_assets.metadata import table
from offer_assets.promotion import OFFER_ENDPOINT, found_version, name_of, servable_folder
from resources.compute import Compute
from resources.endpoints import Endpoints, EndpointStatus, Variant, VariantObservation
from resources.failures import input_errors_fail_plainly
from resources.tracking import RegisteredVersion, Tracking

SHADOW_VERSION = "shadow_version"
SPLIT_TRAFFIC = "split_traffic"


class ShadowRequest(dg.Config):
    """Which version sees copies of the requests."""

    version: str = Field(
        default="",
        description="Its number in the registry, or its model version (the beginning); empty: send no more "
        "copies.",
    )
    percent: float = Field(default=10.0, description="Of the requests: what it sees.")
    by: str = Field(description="Who wants it.")
    reason: str = Field(default="", description="What it is to show.")


class SplitRequest(dg.Config):
    """Which versions share the requests."""

    shares: dict[str, float] = Field(
        description="Weight by version (its number in the registry, or the beginning of its model version), "
        "relative to each other. The version in production has to be among them; alone, it ends a split."
    )
    by: str = Field(description="Who decides.")
    reason: str = Field(description="What the split is to show.")


@dg.op(tags={"kind": "http"})
@input_errors_fail_plainly()
def shadow(
    context: dg.OpExecutionContext,
    config: ShadowRequest,
    tracking: Tracking,
    compute: Compute,
    endpoints: Endpoints,
) -> None:
    """Let a version see copies of the requests, or none any more; its answers go nowhere."""
    with endpoints.releasing():
        if not config.version.strip():
            status = endpoints.end_shadow()
            context.log.info("no version sees copies of the requests any more")
        else:
            version = found_version(tracking, config.version)
            if not (version.passed or version.may_serve):
                raise InputError(
                    f"{name_of(version)} did not pass the gate: nobody will want to serve it; name one that "
                    "passed, or approve it despite the gate first (job decide_version)"
                )
            status = endpoints.shadow(servable_folder(version, compute), version.ref, config.percent)
            context.log.info(f"{name_of(version)} sees copies of {config.percent:g} % of the requests")
        if status is not None:
            context.log_event(_observed(status, by=config.by, reason=config.reason or "none given"))


@dg.op(tags={"kind": "http"})
@input_errors_fail_plainly()
def split(
    context: dg.OpExecutionContext,
    config: SplitRequest,
    tracking: Tracking,
    compute: Compute,
    endpoints: Endpoints,
) -> None:
    """Let versions that may serve share the requests."""
    if not config.by.strip() or not config.reason.strip():
        raise InputError("by or reason is empty: who splits the requests and why is kept; give both")
    with endpoints.releasing():
        versions = [(found_version(tracking, text), weight) for text, weight in config.shares.items()]
        _check_that_they_may_serve([version for version, _ in versions])
        status = endpoints.split(
            [
                Variant(folder=servable_folder(version, compute), ref=version.ref, weight=weight)
                for version, weight in versions
            ]
        )
        shares = ", ".join(f"{variant.name} {variant.weight:.0%}" for variant in status.variants)
        context.log.info(f"requests go to {shares}")
        context.log_event(_observed(status, by=config.by, reason=config.reason))


@dg.job(
    name=SHADOW_VERSION,
    description="Let a version that passed the gate see copies of the requests; clients notice nothing.",
)
def shadow_version() -> None:
    """One shadow beside the version in production, or none any more."""
    shadow()


@dg.job(
    name=SPLIT_TRAFFIC,
    description="Share the requests between the version in production and others that may serve (A/B); ends "
    "with the next deployment, or with the version in production alone.",
)
def split_traffic() -> None:
    """Weighted variants, until the next deployment."""
    split()


TRAFFIC_JOBS = [shadow_version, split_traffic]


def variant_rows(
    status: EndpointStatus, observations: Sequence[VariantObservation] = ()
) -> list[dict[str, Any]]:
    """The variants of an endpoint as rows for people, with what was seen of them."""
    seen = {observation.variant.name: observation for observation in observations}
    return [
        {
            "variant": variant.name,
            "role": "shadow" if variant.is_shadow else "answers",
            "share": f"{variant.weight:.1%}",
            **_seen_cells(seen.get(variant.name)),
        }
        for variant in status.variants
    ]


def _seen_cells(seen: VariantObservation | None) -> dict[str, Any]:
    if seen is None:
        return {"requests": "", "server errors": "", "p99 ms": "", "unsure": ""}
    p99, unsure = seen.p99_milliseconds, seen.low_confidence_share
    return {
        "requests": seen.requests,
        "server errors": seen.errors,
        "p99 ms": "" if p99 is None else f"{p99:,.1f}",
        "unsure": "" if unsure is None else f"{unsure:.1%}",
    }


def _check_that_they_may_serve(versions: Sequence[RegisteredVersion]) -> None:
    for version in versions:
        if not version.may_serve:
            raise InputError(
                f"{name_of(version)} may not serve: it did not pass the gate, was rejected or waits for a "
                "decision; approve it first (job decide_version), or let it be a shadow"
            )
    if not any(version.in_production for version in versions):
        raise InputError(
            "the version in production is not among those that are to share the requests: days are "
            "catalogued by it (`python -m offer_assets versions` shows which it is)"
        )


def _observed(status: EndpointStatus, by: str, reason: str) -> dg.AssetObservation:
    return dg.AssetObservation(
        OFFER_ENDPOINT,
        metadata={
            "url": dg.MetadataValue.url(status.url),
            "variants": table(variant_rows(status)),
            "by": by,
            "reason": reason,
        },
    )
