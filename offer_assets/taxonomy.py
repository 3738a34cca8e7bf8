"""The category tree: external source and validated artifact. Nothing about offers here."""

from collections import Counter

import dagster as dg

from ml.stages import STAGES, TaxonomyParameters
from ml.taxonomy import Taxonomy
from offer_assets import policies
from offer_assets.metadata import materialization, row_count, schema, table
from resources.compute import Compute
from resources.offer_feed import OfferFeed

catalog_taxonomy_source = dg.AssetSpec(
    "catalog_taxonomy_source",
    description="Category tree as people keep it: CSV with category_id, parent_id, name (CATALOG_TAXONOMY).",
    group_name=policies.FEED,
    kinds={"csv"},
    owners=[policies.DATA_TEAM],
)


@dg.asset(
    deps=[catalog_taxonomy_source],
    group_name=policies.FEED,
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
    context: dg.AssetExecutionContext, offer_feed: OfferFeed, compute: Compute
) -> dg.MaterializeResult:
    """Category tree that offers are sorted into, validated: one version per distinct content."""
    source, fingerprint = offer_feed.taxonomy_source()
    result = compute.run(
        context, "catalog_taxonomy", {}, TaxonomyParameters(source=source, fingerprint=fingerprint)
    )
    taxonomy = Taxonomy.load(compute.folder(result.ref))
    with_root = Counter(taxonomy.ancestors(category)[0] for category in taxonomy)
    top_level = [
        {
            "category": taxonomy.name(root),
            "id": root,
            "categories_below": with_root[root] - 1,
        }
        for root in taxonomy
        if taxonomy.level(root) == 1
    ]
    return materialization(
        result,
        metadata={**row_count(len(taxonomy.ids)), "top_level": table(top_level), "source": source},
    )
