"""The category tree: its releases, the one in force, and what its last change means."""

from collections import Counter
from typing import Any

import dagster as dg
from pydantic import Field

from ml.artifacts import ArtifactRef
from ml.stages import STAGES, TaxonomyChangeParameters, TaxonomyParameters
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.change import TaxonomyChange, read_change
from ml.taxonomy_change.limits import objections
from ml.taxonomy_change.releases import read_mapping
from ml.taxonomy_change.transitions import Transitions
from offer_assets import policies
from offer_assets.metadata import materialization, picture, row_count, schema, table
from resources.artifact_store import ArtifactStore
from resources.compute import Compute, StageResult
from resources.failures import input_errors_fail_plainly
from resources.taxonomy_policy import TaxonomyPolicy
from resources.taxonomy_source import TaxonomySource
from resources.tracking import Tracking

_ROWS_SHOWN = 100
"""Of the changes; the artifact has all of them."""

catalog_taxonomy_source = dg.AssetSpec(
    "catalog_taxonomy_source",
    description="Releases of the category tree as people keep it: CSV, Google's or Shopify's text, in a "
    "file, a folder, at a URL or in S3 (CATALOG_TAXONOMY).",
    group_name=policies.TAXONOMY,
    kinds={"csv"},
    owners=[policies.DATA_TEAM],
)


class Adoption(dg.Config):
    """How a release is taken; the launchpad shows it."""

    accept_objections: bool = Field(
        default=False,
        description="Take a release although a limit refuses it: a person looked and it is meant so.",
    )


@dg.asset(
    deps=[catalog_taxonomy_source],
    group_name=policies.TAXONOMY,
    kinds={"parquet"},
    owners=[policies.DATA_TEAM],
    metadata={
        "dagster/column_schema": schema(
            [
                ("category_id", "string", "Identifier in the catalog."),
                ("parent_id", "string", "Category above; null at the roots."),
                ("name", "string", "Name shown to people."),
                ("level", "int32", "1 at the roots."),
                ("path", "string", "Names from the root, joined by ' > '."),
                ("path_ids", "list<string>", "Ids from the root to the category itself."),
                ("is_leaf", "bool", "Nothing lies below."),
            ]
        )
    },
    code_version=STAGES["catalog_taxonomy"].version,
)
def catalog_taxonomy(
    context: dg.AssetExecutionContext,
    config: Adoption,
    taxonomy_source: TaxonomySource,
    taxonomy_policy: TaxonomyPolicy,
    artifact_store: ArtifactStore,
    compute: Compute,
) -> dg.MaterializeResult:
    """Category tree that offers are sorted into, validated: one immutable version per distinct content."""
    release = taxonomy_source.newest()
    wanted = context.run.tags.get(policies.TAXONOMY_FINGERPRINT_TAG, release.fingerprint)
    if wanted != release.fingerprint:
        raise dg.Failure(
            f"release {release.name} came after the one that this run was started for; the sensor "
            "taxonomy_changed starts another for it once it is settled",
            allow_retries=False,
        )
    result = compute.run(
        context,
        "catalog_taxonomy",
        {},
        TaxonomyParameters(source=release.source, files=release.files, fingerprint=release.fingerprint),
    )
    found = objections_to(result, artifact_store, compute, taxonomy_policy)
    if found and not config.accept_objections:
        raise dg.Failure(
            f"release {release.name} of the taxonomy is not taken: {' '.join(found)} Correct the release, or "
            "materialize catalog_taxonomy with accept_objections if it is meant so. What was in force stays.",
            allow_retries=False,
        )
    taxonomy = Taxonomy.load(compute.folder(result.ref))
    with_root = Counter(taxonomy.ancestors(category)[0] for category in taxonomy)
    top_level = [
        {"category": taxonomy.name(root), "id": root, "categories_below": with_root[root] - 1}
        for root in taxonomy.roots
    ]
    return materialization(
        result,
        metadata={
            **row_count(len(taxonomy)),
            "release": release.name,
            "source": release.source,
            "top_level": table(top_level),
            **({"accepted_objections": " ".join(found)} if found else {}),
        },
    )


@dg.asset(
    group_name=policies.TAXONOMY,
    kinds={"json"},
    owners=[policies.DATA_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["taxonomy_change"].version,
)
def taxonomy_change(
    context: dg.AssetExecutionContext,
    catalog_taxonomy: ArtifactRef,
    artifact_store: ArtifactStore,
    compute: Compute,
    tracking: Tracking,
) -> dg.MaterializeResult:
    """What the last release changed, where labels go and which offers it touches, before any training."""
    standing = artifact_store.read_pointer("taxonomy_change")
    if standing and taxonomy_in_force(standing, compute).digest == catalog_taxonomy.digest:
        # The change that led here stays the last one, with the models that were in production then.
        result = StageResult(ref=standing, reused=True, manifest=compute.manifest(standing))
    else:
        inputs = change_inputs(catalog_taxonomy, artifact_store, compute, tracking)
        result = compute.run(context, "taxonomy_change", inputs, TaxonomyChangeParameters())
    change = read_change(compute.folder(result.ref))
    return materialization(result, metadata=describe_change(change))


@dg.asset_check(asset="taxonomy_change")
def new_categories_have_labelled_offers(
    taxonomy_change: ArtifactRef, compute: Compute
) -> dg.AssetCheckResult:
    """Every new category has labelled offers to learn from; where not, it gets weak labels for now."""
    few = read_change(compute.folder(taxonomy_change)).few_labelled
    return dg.AssetCheckResult(
        passed=not few,
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(
            f"{category.path}: {category.labelled} labelled offers" for category in few[:10]
        )
        or "every new category has labelled offers",
        metadata={"categories": len(few)},
    )


def taxonomy_in_force(taxonomy_change: ArtifactRef, compute: Compute) -> ArtifactRef:
    """The taxonomy that the last change led to: what offers are labelled in and models learn."""
    return compute.origin(taxonomy_change, "catalog_taxonomy")


def pinned_model(taxonomy_change: ArtifactRef, kind: str, compute: Compute) -> ArtifactRef | None:
    """Teacher or student (``kind``: its stage) that was in production when the taxonomy changed, if any."""
    if kind not in compute.manifest(taxonomy_change).inputs:
        return None
    return compute.origin(taxonomy_change, kind)


def change_inputs(
    catalog_taxonomy: ArtifactRef, artifact_store: ArtifactStore, compute: Compute, tracking: Tracking
) -> dict[str, ArtifactRef | dict[str, ArtifactRef]]:
    """What the stage ``taxonomy_change`` needs for the step from the taxonomy in force to this one.

    The offers and models are those of this moment; they are no dependencies in the graph, because offers
    in turn depend on the taxonomy in force.
    """
    inputs: dict[str, ArtifactRef | dict[str, ArtifactRef]] = {"catalog_taxonomy": catalog_taxonomy}
    standing = artifact_store.read_pointer("taxonomy_change")
    if standing is None:
        return inputs
    inputs |= {"previous_change": standing, "previous_taxonomy": taxonomy_in_force(standing, compute)}
    inputs |= {
        name: refs for name in ("offers", "catalogued_offers") if (refs := artifact_store.list_pointers(name))
    }
    if production := tracking.production():
        student = compute.origin(production.ref, "student_checkpoint")
        inputs |= {
            "student_checkpoint": student,
            "teacher_checkpoint": compute.origin(student, "teacher_checkpoint"),
        }
    return inputs


def describe_change(change: TaxonomyChange) -> dict[str, Any]:
    """A change as the UI shows it."""
    from ml.taxonomy_change.plots import impact_plot

    rows = [
        {
            "category": impact.path,
            "change": impact.change,
            "to": "; ".join(impact.to),
            "origin": impact.origin,
            "confidence": impact.confidence,
            "labelled": impact.labelled,
            "unlabelled": impact.unlabelled,
            "traffic_share": impact.traffic_share,
        }
        for impact in change.impact
    ]
    shown: dict[str, Any] = {"picture": picture(impact_plot(change.impact))} if rows else {}
    shown["impact"] = table(rows[:_ROWS_SHOWN])
    if len(rows) > _ROWS_SHOWN:
        shown["impact_rows_not_shown"] = len(rows) - _ROWS_SHOWN
    if change.few_labelled:
        few = [{"category": category.path, "labelled": category.labelled} for category in change.few_labelled]
        shown["few_labelled"] = table(few[:_ROWS_SHOWN])
    return shown


@input_errors_fail_plainly()
def objections_to(
    result: StageResult, artifact_store: ArtifactStore, compute: Compute, policy: TaxonomyPolicy
) -> list[str]:
    """What speaks against taking this release after the one in force."""
    folder = compute.folder(result.ref)
    standing = artifact_store.read_pointer("taxonomy_change")
    previous = Taxonomy.load(compute.folder(taxonomy_in_force(standing, compute))) if standing else None
    earlier = Transitions.read(compute.folder(standing)).transitions if standing else []
    return objections(previous, Taxonomy.load(folder), read_mapping(folder), earlier, policy.limits())
