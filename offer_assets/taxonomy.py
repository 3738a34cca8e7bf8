"""The category tree: its releases, the one in force, and what its last change means."""

import datetime
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from ml.artifacts import ArtifactRef
from ml.stages import STAGES, TaxonomyChangeParameters, TaxonomyParameters
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.change import TaxonomyChange, read_change
from ml.taxonomy_change.diff import TaxonomyDiff
from ml.taxonomy_change.limits import objections, unlike_renames
from ml.taxonomy_change.releases import origins_are_checked, read_mapping, says_more
from ml.taxonomy_change.transitions import Transitions
from offer_assets import policies
from offer_assets.instance import feed_tag, process_tag
from offer_assets.metadata import materialization, picture, row_count, schema, table
from resources.artifact_store import ArtifactStore
from resources.compute import Compute, StageResult
from resources.failures import input_errors_fail_plainly
from resources.taxonomy_policy import TaxonomyPolicy
from resources.taxonomy_source import FoundRelease, TaxonomySource
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


WAY_OUT = (
    "Correct the release or deliver a newer one; if it is meant so, run the job adopt_taxonomy with the "
    "configuration `ops: {catalog_taxonomy: {config: {accept_objections: true}}}`: the sensor "
    "taxonomy_changed then has the model follow."
)
"""What to do about a release that is refused."""


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
    # Dagster leaves a run whose process is killed as it is: by these tags taxonomy_changed finds out.
    run_id = context.run.run_id
    context.instance.add_run_tags(run_id, process_tag(run_id) | feed_tag(artifact_store))
    release = taxonomy_source.newest()
    result = compute.run(
        context,
        "catalog_taxonomy",
        {},
        TaxonomyParameters(source=release.source, files=release.files, fingerprint=release.fingerprint),
    )
    if in_force := _the_same_in_force(result.ref, artifact_store, compute):
        result = StageResult(ref=in_force, reused=True, manifest=compute.manifest(in_force))
    wanted = context.run.tags.get(policies.TAXONOMY_FINGERPRINT_TAG, release.fingerprint)
    if wanted not in (release.fingerprint, result.manifest.parameters["fingerprint"]):
        raise dg.Failure(
            f"release {release.name} came after the one that this run was started for; the sensor "
            "taxonomy_changed starts another for it once it is settled",
            allow_retries=False,
        )
    found = objections_to(release, result.ref, artifact_store, compute, taxonomy_policy)
    if found and not config.accept_objections:
        raise dg.Failure(
            f"release {release.name} of the taxonomy is not taken: {' '.join(found)} What was in force "
            f"stays. {WAY_OUT}",
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
        result = compute.run(context, "taxonomy_change", inputs, change_parameters())
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


@dg.asset_check(asset="taxonomy_change")
def renames_keep_their_meaning(taxonomy_change: ArtifactRef, compute: Compute) -> dg.AssetCheckResult:
    """No category has a new name that is unlike the old one: its id may be used for something else."""
    unlike = unlike_renames(read_change(compute.folder(taxonomy_change)).diff)
    return dg.AssetCheckResult(
        passed=not unlike,
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(
            f"{renamed.category_id}: {renamed.before.name!r} is now {renamed.after.name!r}"
            for renamed in unlike[:10]
        )
        or "every new name is like the old one",
        metadata={"categories": len(unlike)},
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
    before = taxonomy_before(artifact_store, compute)
    standing = artifact_store.read_pointer("taxonomy_change")
    if before is None or (standing is None and before.digest == catalog_taxonomy.digest):
        return inputs
    inputs["previous_taxonomy"] = before
    if standing is not None:
        inputs["previous_change"] = standing
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


def change_parameters() -> TaxonomyChangeParameters:
    """Parameters of a change that is taken today."""
    return TaxonomyChangeParameters(adopted_on=datetime.datetime.now(datetime.UTC).date().isoformat())


def taxonomy_before(artifact_store: ArtifactStore, compute: Compute) -> ArtifactRef | None:
    """The taxonomy that the next release comes after, or None.

    It is the one in force; where none was ever taken as a change (the home is from before there were
    changes), the one that the model in service knows.
    """
    standing = artifact_store.read_pointer("taxonomy_change")
    if standing is not None:
        return taxonomy_in_force(standing, compute)
    endpoint = artifact_store.read_pointer("offer_endpoint")
    digest = compute.manifest(endpoint).inputs.get("catalog_taxonomy") if endpoint else None
    return artifact_store.find_by_digest("catalog_taxonomy", digest) if digest else None


def says_the_same(new: Taxonomy, mapping: Sequence[tuple[str, str]], folder: Path) -> bool:
    """Whether a release adds nothing to the taxonomy in ``folder``: the same tree, no further mapping."""
    same_tree = TaxonomyDiff.between(Taxonomy.load(folder), new).is_empty
    return same_tree and not says_more(mapping, read_mapping(folder))


def _the_same_in_force(
    taken: ArtifactRef, artifact_store: ArtifactStore, compute: Compute
) -> ArtifactRef | None:
    """The taxonomy in force if ``taken`` says the same in other words; None otherwise."""
    standing = artifact_store.read_pointer("taxonomy_change")
    if standing is None:
        return None
    in_force, folder = taxonomy_in_force(standing, compute), compute.folder(taken)
    same = says_the_same(Taxonomy.load(folder), read_mapping(folder), compute.folder(in_force))
    return in_force if same else None


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
    release: FoundRelease,
    taken: ArtifactRef,
    artifact_store: ArtifactStore,
    compute: Compute,
    policy: TaxonomyPolicy,
) -> list[str]:
    """What speaks against taking this release after the one in force; nothing if it is in force."""
    folder = compute.folder(taken)
    standing = artifact_store.read_pointer("taxonomy_change")
    before = taxonomy_before(artifact_store, compute)
    if standing and before and before.digest == taken.digest:
        return []
    in_force = compute.folder(before) if before else None
    return objections(
        Taxonomy.load(in_force) if in_force else None,
        Taxonomy.load(folder),
        read_mapping(folder, in_force=in_force),
        Transitions.read(compute.folder(standing)).transitions if standing else [],
        policy.limits(),
        origins_are_checked=origins_are_checked(release.files),
    )
