"""Who decides what serves: approval by a person, the history of promotions, and the way back.

A version that passed the gate is served at once, or waits for a person (``OFFER_ASSETS_APPROVAL``). The
decision is kept with the version in the registry; here are the jobs by which people take it. Serving an
approved version is the work of ``offer_endpoint``, started by the sensor ``decided_versions``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import dagster as dg
import msgspec
from dagster._core.definitions.data_version import DATA_VERSION_TAG
from pydantic import Field

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from ml.offers import check_text_version
from offer_assets.metadata import MetadataMapping, table
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.endpoints import Endpoints, EndpointStatus
from resources.failures import input_errors_fail_plainly
from resources.tracking import Promotion, RegisteredVersion, Tracking, now

DECIDE_VERSION = "decide_version"
ROLLBACK = "rollback"
MODEL_VERSION = "model_version"
OFFER_ENDPOINT = "offer_endpoint"

_SHOWN_PROMOTIONS = 10


class ReleasePolicy(dg.ConfigurableResource):
    """Whether a version that passed the gate is served at once or waits for a person."""

    approval: Literal["automatic", "required"]

    @property
    def at_registration(self) -> Literal["automatic", "pending"]:
        """Approval of a version that passed the gate and about which nobody has decided."""
        return "pending" if self.approval == "required" else "automatic"


class VersionDecision(dg.Config):
    """What a person decides about a registered version."""

    version: str = Field(description="Its number in the registry, or its model version (the beginning).")
    decision: Literal["approved", "rejected"] = Field(description="approved or rejected.")
    by: str = Field(description="Who decides.")
    reason: str = Field(description="Why; kept with the version.")
    despite_gate: bool = Field(
        default=False, description="Approve it although it did not pass the gate; kept with the decision."
    )


class RollbackRequest(dg.Config):
    """Which version is to serve again."""

    version: str = Field(
        default="",
        description="Number in the registry or model version of one that has served before; empty: the one "
        "before the version in production.",
    )
    by: str = Field(description="Who decides.")
    reason: str = Field(description="Why the version in production has to go; kept with it.")


@dg.op(tags={"kind": "mlflow"})
@input_errors_fail_plainly()
def decide(
    context: dg.OpExecutionContext,
    config: VersionDecision,
    tracking: Tracking,
    artifact_store: ArtifactStore,
) -> None:
    """Note the decision; an approved version becomes the one that ``offer_endpoint`` serves next."""
    version = found_version(tracking, config.version)
    if config.decision == "rejected" and version.in_production:
        raise InputError(
            f"{name_of(version)} is in production: nothing would be left to serve; roll back instead (job "
            f"{ROLLBACK}, or `python -m offer_assets rollback --reason …`), which rejects it"
        )
    decided = tracking.decide(version, config.decision, config.by, config.reason, config.despite_gate)
    context.log.info(f"{name_of(decided)} is {config.decision} by {config.by}: {config.reason}")
    decision = decided.decision
    if decision is not None and decision.despite_gate:
        context.log.warning(f"{name_of(decided)} did not pass the gate; it is approved despite that")
    if config.decision == "approved":
        event = make_next(decided, artifact_store)
        if event is not None:
            context.log_event(event)


@dg.op(tags={"kind": "http"})
@input_errors_fail_plainly()
def roll_back(
    context: dg.OpExecutionContext,
    config: RollbackRequest,
    tracking: Tracking,
    artifact_store: ArtifactStore,
    compute: Compute,
    endpoints: Endpoints,
) -> None:
    """Serve an earlier version again, and reject the one in production so that it does not come back."""
    if not config.by.strip() or not config.reason.strip():
        raise InputError("by or reason is empty: who rolls back and why is kept in the registry; give both")
    with endpoints.releasing():
        _roll_back(context, config, tracking, artifact_store, compute, endpoints)


def _roll_back(
    context: dg.OpExecutionContext,
    config: RollbackRequest,
    tracking: Tracking,
    artifact_store: ArtifactStore,
    compute: Compute,
    endpoints: Endpoints,
) -> None:
    current = tracking.production()
    if current is None:
        raise InputError("there is no version in production to roll back from; run train_and_release first")
    wanted = found_version(tracking, config.version) if config.version.strip() else None
    model = model_of(current.ref, compute)
    others = [version for version in tracking.versions() if model_of(version.ref, compute) != model]
    target, earlier = rollback_target(others, current, wanted)
    folder = servable_folder(target, compute)
    metadata = _taxonomy_note(context, target, earlier, artifact_store.read_pointer("catalog_taxonomy"))

    # At once: what serves now is to go, and must not be what the other is held against.
    status = endpoints.deploy(folder, target.ref, at_once=True)
    # From here on nothing is asked any more; a repeat after an interruption comes by and finishes.
    for pointer in (MODEL_VERSION, OFFER_ENDPOINT):
        artifact_store.write_pointer(pointer, target.ref)
    tracking.decide(
        current, "rejected", config.by, f"rolled back to {name_of(target)}: {config.reason.strip()}"
    )
    if not target.may_serve:
        tracking.decide(target, "approved", config.by, f"rollback: {config.reason}", despite_gate=True)
    promotion = msgspec.structs.replace(
        earlier,
        at=now(),
        by=config.by.strip(),
        reason=config.reason.strip(),
        run_id=context.run_id,
        kind="rollback",
        replaced=current.model_version,
    )
    promoted = tracking.promote(target, promotion)
    context.log.info(f"{name_of(target)} serves again, instead of {name_of(current)}: {config.reason}")
    metadata |= {"rolled_back_from": name_of(current), "by": config.by, "reason": config.reason}
    context.log_event(_materialization(MODEL_VERSION, promoted, metadata))
    context.log_event(
        _materialization(
            OFFER_ENDPOINT,
            promoted,
            {**metadata, **served_metadata(status, promoted, tracking.history())},
        )
    )


@dg.job(
    name=DECIDE_VERSION,
    description="Approve or reject a registered version; an approved one is served within a minute.",
)
def decide_version() -> None:
    """One decision of a person about one version."""
    decide()


@dg.job(
    name=ROLLBACK,
    description="Serve the version before the one in production (or a given one) again, without losing a "
    "request, and reject the one in production.",
)
def rollback() -> None:
    """Back to a version that has served before."""
    roll_back()


PROMOTION_JOBS = [decide_version, rollback]


def rollback_target(
    versions: Sequence[RegisteredVersion], current: RegisteredVersion, target: RegisteredVersion | None
) -> tuple[RegisteredVersion, Promotion]:
    """The version to go back to, and how it last went into production.

    Args:
        versions: Those that may be gone back to where none is wanted: of other models than ``current``.
        current: The one in production.
        target: The one that is wanted; None: the last one before ``current`` that nobody has rejected.

    Raises:
        InputError: there is none, it never served, it was rejected, or it is the one in production.
    """
    if target is not None:
        if target.version == current.version:
            raise InputError(
                f"{name_of(target)} is in production already: choose an earlier one (`python -m offer_assets "
                "history` lists them), or materialize offer_endpoint if it does not answer"
            )
        if not target.promotions:
            raise InputError(
                f"{name_of(target)} never was in production: there is no way back to it; approve it instead"
            )
        decision = target.decision
        if decision is not None and decision.decision == "rejected":
            raise InputError(
                f"{name_of(target)} was rejected by {decision.by} ({decision.reason}): approve it instead, "
                "if it is to serve after all"
            )
        return target, target.promotions[-1]
    history = sorted(
        (promotion for version in versions for promotion in version.promotions),
        key=lambda promotion: promotion.at,
        reverse=True,
    )
    by_number = {version.version: version for version in versions}
    for promotion in history:
        target = by_number[promotion.registry_version]
        if target.version != current.version and target.approval != "rejected":
            return target, promotion
    raise InputError(
        f"there is no version to go back to: before {name_of(current)} none served that was not rejected "
        "since; approve one instead (`python -m offer_assets versions` lists them)"
    )


def make_next(version: RegisteredVersion, artifact_store: ArtifactStore) -> dg.AssetMaterialization | None:
    """Let the asset ``model_version`` name this version, so that ``offer_endpoint`` serves it next.

    Returns:
        The event to log, or None where it did already.
    """
    named = artifact_store.read_pointer(MODEL_VERSION)
    if named is not None and named.digest == version.ref.digest:
        return None
    artifact_store.write_pointer(MODEL_VERSION, version.ref)
    decision = version.decision
    told = {"by": decision.by, "reason": decision.reason} if decision is not None else {}
    return _materialization(MODEL_VERSION, version, {"approval": version.approval, **told})


def model_of(ref: ArtifactRef, compute: Compute) -> str:
    """Digest of the compiled student that a model is, under whatever names."""
    if ref.kind != "renamed_student":
        return ref.digest
    try:
        return compute.manifest(ref).inputs["compiled_student"]
    except InputError:  # it is gone, and cannot be served either
        return ref.digest


def servable_folder(version: RegisteredVersion, compute: Compute) -> Path:
    """The folder of a registered model.

    Raises:
        InputError: it is gone, or was trained on another offer text than this code makes.
    """
    folder = compute.folder(version.ref)
    settings = msgspec.json.decode((folder / "model.json").read_bytes())
    check_text_version(folder, str(settings.get("text_version")))
    return folder


def name_of(version: RegisteredVersion) -> str:
    """A version as messages call it."""
    return f"version {version.version} (model {version.model_version})"


def served_metadata(
    status: EndpointStatus, version: RegisteredVersion, history: Sequence[Promotion]
) -> MetadataMapping:
    """What the UI shows of a version that serves."""
    return {
        "url": dg.MetadataValue.url(status.url),
        "model_version": status.model_version,
        "taxonomy_version": status.taxonomy_version,
        "started_at": status.started,
        "variants": ", ".join(f"{variant.name} {variant.weight:.0%}" for variant in status.variants),
        **status.details,
        "registered": f"{version.name} version {version.version}",
        "approval": version.approval,
        "history": table(history_rows(history)),
    }


def history_rows(history: Sequence[Promotion], limit: int | None = _SHOWN_PROMOTIONS) -> list[dict[str, Any]]:
    """The last promotions as rows for people, newest first."""
    return [
        {
            "at": promotion.at[:19] + "Z",
            "kind": promotion.kind,
            "version": promotion.registry_version,
            "model_version": promotion.model_version,
            "replaced": promotion.replaced or "",
            "by": promotion.by,
            "reason": promotion.reason,
            "taxonomy": promotion.taxonomy_version,
            "data": promotion.data,
            "code": promotion.code_revision,
            "evaluation": promotion.evaluation[:12],
            "run": promotion.run_id,
        }
        for promotion in list(reversed(history))[:limit]
    ]


def found_version(tracking: Tracking, wanted: str) -> RegisteredVersion:
    """The version that somebody names.

    Raises:
        InputError: there is none.
    """
    version = tracking.find(wanted)
    if version is None:
        raise InputError(
            f"there is no version {wanted!r} of the model: give its number in the registry or the beginning "
            "of its model version (`python -m offer_assets versions` lists them)"
        )
    return version


def _materialization(
    asset: str, version: RegisteredVersion, metadata: MetadataMapping
) -> dg.AssetMaterialization:
    return dg.AssetMaterialization(
        asset_key=asset,
        metadata={
            "dagster/uri": version.ref.uri,
            "registered": f"{version.name} version {version.version}",
            "model_version": version.model_version,
            **metadata,
        },
        tags={DATA_VERSION_TAG: version.ref.digest},
    )


def _taxonomy_note(
    context: dg.OpExecutionContext,
    target: RegisteredVersion,
    promotion: Promotion,
    adopted: ArtifactRef | None,
) -> MetadataMapping:
    """Say so where the version to go back to knows another taxonomy than the one in force."""
    if adopted is None or not promotion.taxonomy_version or adopted.version == promotion.taxonomy_version:
        return {}
    note = (
        f"{name_of(target)} knows taxonomy {promotion.taxonomy_version}, {adopted.version} is adopted: "
        "offers are catalogued in the former until a newer model is served"
    )
    context.log.warning(note)
    return {"other_taxonomy": note}
