"""A dry run: what the newest release of the taxonomy would change, without taking it."""

import dagster as dg

from ml.stages import TaxonomyParameters
from ml.taxonomy_change.change import read_change
from offer_assets.taxonomy import change_inputs, change_parameters, describe_change, objections_to
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.taxonomy_policy import TaxonomyPolicy
from resources.taxonomy_source import TaxonomySource
from resources.tracking import Tracking

PREVIEW_TAXONOMY = "preview_taxonomy"


@dg.op
def preview_newest_release(
    context: dg.OpExecutionContext,
    taxonomy_source: TaxonomySource,
    taxonomy_policy: TaxonomyPolicy,
    artifact_store: ArtifactStore,
    compute: Compute,
    tracking: Tracking,
) -> None:
    """Compare the newest release with the taxonomy in force, and observe the impact on its source."""
    release = taxonomy_source.newest()
    parameters = TaxonomyParameters(
        source=release.source, files=release.files, fingerprint=release.fingerprint
    )
    taxonomy = compute.run(context, "catalog_taxonomy", {}, parameters)
    inputs = change_inputs(taxonomy.ref, artifact_store, compute, tracking)
    result = compute.run(context, "taxonomy_change", inputs, change_parameters())
    change = read_change(compute.folder(result.ref))
    for impact in change.impact:
        context.log.info(impact.sentence)
    found = objections_to(release, taxonomy.ref, artifact_store, compute, taxonomy_policy)
    for objection in found:
        context.log.warning(f"would be refused: {objection}")
    if not change.impact:
        context.log.info(f"release {release.name} changes nothing")
    context.log_event(
        dg.AssetObservation(
            asset_key="catalog_taxonomy_source",
            metadata={
                "release": release.name,
                "would_be_refused": " ".join(found) or "no",
                **describe_change(change),
            },
        )
    )


@dg.job(
    name=PREVIEW_TAXONOMY,
    description="Dry run: what the newest release of the taxonomy would change and which offers it touches. "
    "Nothing is taken or trained; the result is an observation of catalog_taxonomy_source.",
)
def preview_taxonomy() -> None:
    """Preview the newest release."""
    preview_newest_release()
