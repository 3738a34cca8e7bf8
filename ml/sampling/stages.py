"""Which offers are learned from, and which are only ever measured on.

Everything is chosen by hash, never by chance or by order: an offer's fate depends on its ids, the
seed and the offers beside it, so that shuffled files, more threads or a second run choose the same.
A *group* is what must not lie on both sides: a product, or a shop. Groups whose hash falls into the
held-out share are never trained on, so the evaluation set can grow from them later. Beyond that, a
training offer shares no product, GTIN or title (nor shop, if split by shop) with any evaluation offer.

Labels are those of today's taxonomy: what ``migrated_labels`` decided stands in for what was delivered.
Only labels that people gave, or that moved without a doubt, are validated and measured on. What a model
guessed (a label moved by evidence, a weak label) is at most learned from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA, TEXT_VERSION, offer_texts
from ml.runner import StageContext
from ml.sampling.label_sources import BY_EVIDENCE, GUESSED, HUMAN, MIGRATED, WEAK
from ml.sampling.split import PRODUCT_KEYS, SPLIT_FILE, Split
from ml.sampling.validation_split import write_splits
from ml.stages import EvaluationSetParameters, TrainingSampleParameters
from ml.taxonomy_change.transitions import Transitions, certain_moves

_LABEL_FIELDS = (pa.field("labelled_as", pa.string()), pa.field("label_source", pa.string()))
"""The label as delivered, and where ``category_id`` is from."""
_CONFIDENCE_FIELD = pa.field("label_confidence", pa.float64())
_TEXT_FIELD = pa.field("text", pa.string())
_LABELLED_COLUMNS = (
    "offer_id, delivered_on, category_id, labelled_as, label_source, label_confidence, decision, shop_id, "
    "product, product_key, gtin_key, title_key, group_key, held_out, draw"
)
_BATCH_OFFERS = 10_000
_MEMORY_LIMIT = "1GB"


def write_evaluation_set(context: StageContext, parameters: EvaluationSetParameters) -> dict[str, Any]:
    """Write ``offers.parquet``: the previous evaluation set, extended where it is below the cap.

    Previous rows stay as they are, except that their labels follow certain transitions of the
    taxonomy. Rows whose label may belong in several places (``labels_put_aside``) or nowhere
    (``labels_gone``) are left out. Categories that merge keep the rows of both, even above the cap.
    New rows come from held-out groups only. A category all of whose offers would be held out (or fall
    to a held-out near-copy) keeps one group for training, for good: it has to be learnable before it
    can be measured.

    Returns:
        Counts: ``offers``, ``categories``, ``kept``, ``added``, ``migrated``, ``labels_gone``,
        ``labels_put_aside`` and others.

    Raises:
        InputError: there is nothing to choose from (no labelled offers, or none held out), or the labels
            were migrated to another taxonomy.
    """
    _check_taxonomy(context, "taxonomy_change", "migrated_labels")
    previous = context.optional_input("previous")
    split = Split(
        split_by=parameters.split_by,
        share=parameters.share,
        seed=parameters.seed,
        training_only=Split.read(previous).training_only if previous else [],
    )
    with _database(context) as database:
        _see_offers(database, context, split)
        _collect_labelled(database)
        labels_put_aside, labels_gone = _keep_previous(
            database, previous, Transitions.read(context.input("taxonomy_change")), split
        )
        _free_unlearnable_categories(database, split)
        database.execute(f"""
            CREATE TEMP TABLE added AS
            SELECT offer_id, delivered_on, category_id FROM (
                SELECT *, row_number() OVER (
                    PARTITION BY category_id ORDER BY copies_before, draw, offer_id) AS place
                FROM (SELECT *, row_number() OVER (
                        PARTITION BY category_id, product ORDER BY draw, offer_id) AS copies_before
                    FROM candidate))
            LEFT JOIN (SELECT category_id, count(*) AS covered FROM kept GROUP BY ALL) USING (category_id)
            WHERE place <= {parameters.cap_per_category} - coalesce(covered, 0)""")
        columns = ", ".join([*CLEAN_SCHEMA.names, *(field.name for field in _LABEL_FIELDS)])
        path = context.output / "offers.parquet"
        offers = _write_offers(
            database,
            f"SELECT {columns} FROM kept UNION ALL BY NAME"
            f" SELECT {columns} FROM delivered SEMI JOIN added USING (offer_id, delivered_on)",
            path,
            _LABEL_FIELDS,
        )
        if offers == 0:
            groups = _scalar(database, "SELECT count(DISTINCT group_key) FROM labelled")
            raise InputError(
                f"the evaluation set would be empty: of {groups:,} labelled {split.split_by}s none is held "
                f"out at share {split.share}; raise the share or bring more labelled offers"
            )
        training_only = [row[0] for row in database.sql("FROM training_only ORDER BY 1").fetchall()]
        (context.output / SPLIT_FILE).write_bytes(
            msgspec.json.format(
                msgspec.json.encode(msgspec.structs.replace(split, training_only=training_only))
            )
        )
        kept = _scalar(database, "SELECT count(*) FROM kept")
        categories = "(SELECT category_id FROM kept UNION SELECT category_id FROM added)"
        metrics = {
            "offers": offers,
            "categories": _scalar(database, f"SELECT count(*) FROM {categories}"),
            "labelled_categories": _scalar(database, "SELECT count(DISTINCT category_id) FROM labelled"),
            "kept": kept,
            "added": offers - kept,
            "migrated": _scalar(
                database,
                f"SELECT count(*) FROM read_parquet({_literal(path)}) WHERE label_source = '{MIGRATED}'",
            ),
            "labels_gone": labels_gone,
            "labels_put_aside": labels_put_aside,
            "training_only_groups": len(training_only),
            "split_by": split.split_by,
            "text_version": TEXT_VERSION,
        }
    context.progress.say(
        f"{offers:,} offers of {metrics['categories']:,} categories: {kept:,} kept, {offers - kept:,} added"
    )
    return metrics


def write_training_sample(context: StageContext, parameters: TrainingSampleParameters) -> dict[str, Any]:
    """Write ``labelled.parquet`` (with ``split``) and ``unlabelled.parquet``.

    Labelled offers are capped per product and per category; where they are still too many in all,
    every category keeps a share in proportion to the square root of its size, and at least one
    offer as long as there is room. Weak labels fill the room that others leave under the caps; they
    and labels moved by evidence are trained on, never validated on. Unlabelled offers are drawn
    uniformly; of an offer delivered on several days the newest version counts.

    Returns:
        Counts per file and split, ``categories``, ``categories_with_fewer_than_10``, ``migrated``,
        ``by_evidence``, ``put_aside``, ``weak``, ``categories_with_weak_labels_only`` and others.

    Raises:
        InputError: fewer than two categories are left to learn, the parameters contradict the
            evaluation set, or the labels were migrated to another taxonomy.
    """
    _check_taxonomy(context, "migrated_labels")
    evaluation_set = context.input("evaluation_set")
    split = Split.read(evaluation_set)
    _check_same_split(split, parameters)
    with _database(context) as database:
        _see_offers(database, context, split)
        _collect_labelled(database)
        database.execute(
            "CREATE TEMP TABLE training_only AS SELECT unnest(?::VARCHAR[]) AS group_key",
            [split.training_only],
        )
        _collect_measured(
            database, split.keyed(f"read_parquet({_literal(evaluation_set / 'offers.parquet')})")
        )
        _collect_weak(database, context.input("migrated_labels"))
        _choose_labelled(database, parameters, split)
        _check_learnable(database)
        _choose_unlabelled(database, parameters, split)

        labelled_path = context.output / "labelled.parquet"
        labels = ["category_id", *(field.name for field in (*_LABEL_FIELDS, _CONFIDENCE_FIELD))]
        _write_offers(
            database,
            f"SELECT delivered.* EXCLUDE ({', '.join(labels)}), chosen.* EXCLUDE (offer_id, delivered_on)"
            " FROM delivered JOIN labelled_chosen AS chosen USING (offer_id, delivered_on)",
            labelled_path,
            (*_LABEL_FIELDS, _CONFIDENCE_FIELD),
        )
        splits = write_splits(labelled_path, parameters)
        unlabelled = _write_offers(
            database,
            # A label that left the taxonomy is none.
            f"SELECT * REPLACE (NULL::VARCHAR AS category_id) FROM ({_rows_of('unlabelled_chosen')})",
            context.output / "unlabelled.parquet",
        )
        database.execute(
            "CREATE TEMP VIEW sampled AS SELECT category_id, label_source "
            f"FROM read_parquet({_literal(labelled_path)})"
        )
        metrics = {
            "labelled": splits["train"] + splits["validation"],
            **splits,
            "unlabelled": unlabelled,
            **_label_counts(database),
            "split_by": split.split_by,
            "text_version": TEXT_VERSION,
        }

    context.progress.say(
        f"{splits['train']:,} offers to train and {splits['validation']:,} to validate on, of "
        f"{splits['categories']:,} categories; {unlabelled:,} unlabelled"
    )
    return metrics


# What there is to choose from


@contextmanager
def _database(context: StageContext) -> Iterator[duckdb.DuckDBPyConnection]:
    """An engine that spills to the workspace instead of growing."""
    spill = context.scratch
    with duckdb.connect(
        config={
            "memory_limit": _MEMORY_LIMIT,
            "temp_directory": str(spill),
            "preserve_insertion_order": False,
        }
    ) as database:
        yield database


def _see_offers(database: duckdb.DuckDBPyConnection, context: StageContext, split: Split) -> None:
    """Views ``delivered`` (all days, with today's labels) and ``keyed`` (with keys, group, draw).

    And the tables ``category`` and ``decided`` (what ``migrated_labels`` says). Where it says nothing,
    the delivered label is today's.
    """
    days = [
        f"SELECT *, {_literal(day)} AS delivered_on FROM read_parquet({_literal(folder / 'offers.parquet')})"
        for day, folder in context.partitions("offers").items()
    ]
    taxonomy = context.input("catalog_taxonomy") / "taxonomy.parquet"
    labels = context.input("migrated_labels") / "labels.parquet"
    database.execute(
        "CREATE TEMP TABLE decided AS "
        "SELECT offer_id, delivered_on, category_id AS moved_to, decision, confidence "
        f"FROM read_parquet({_literal(labels)})"
    )
    database.execute(f"""
        CREATE TEMP VIEW delivered AS
        SELECT offer.* REPLACE (if(decision IS NULL, category_id, moved_to) AS category_id),
            category_id AS labelled_as, decision,
            CASE WHEN moved_to IS NOT NULL THEN if(decision = 'by_evidence', '{BY_EVIDENCE}', '{MIGRATED}')
                WHEN decision IS NULL AND category_id IS NOT NULL THEN '{HUMAN}' END AS label_source,
            if(decision IS NULL, 1.0, confidence) AS label_confidence
        FROM ({" UNION ALL BY NAME ".join(days)}) AS offer
        LEFT JOIN decided USING (offer_id, delivered_on)""")
    database.execute(f"CREATE TEMP VIEW keyed AS {split.keyed('delivered')}")
    database.execute(
        f"CREATE TEMP TABLE category AS SELECT category_id FROM read_parquet({_literal(taxonomy)})"
    )


def _collect_labelled(database: duckdb.DuckDBPyConnection) -> None:
    """Table ``labelled``: the newest labelled version of each offer, narrow. A label counts if it exists."""
    database.execute(f"""
        CREATE TEMP TABLE labelled AS
        SELECT {_LABELLED_COLUMNS} FROM keyed SEMI JOIN category USING (category_id)
        QUALIFY 1 = row_number() OVER (
            PARTITION BY offer_id ORDER BY delivered_on DESC, category_id, title_key)
        """)
    categories = _scalar(database, "SELECT count(DISTINCT category_id) FROM labelled")
    if categories >= 2:
        return
    labels = _scalar(database, "SELECT count(category_id) FROM delivered")
    if categories == 0 and labels:
        raise InputError(
            f"none of the {labels:,} labels in the offers is a category of the taxonomy; "
            "check that CATALOG_TAXONOMY is the one that the offers were labelled with"
        )
    found = "none" if categories == 0 else "offers of one category only"
    if put_aside := _scalar(database, _PUT_ASIDE):
        found += f" ({put_aside:,} offers have labels of earlier taxonomies that were put aside)"
    raise InputError(
        f"learning needs labelled offers of at least two categories, found {found}; "
        "bring offers with category_id, or load more days"
    )


_PUT_ASIDE = (
    "SELECT count(DISTINCT offer_id) FROM delivered ANTI JOIN labelled USING (offer_id) "
    "WHERE decision = 'put_aside'"
)
"""How many offers have no label today because it is not clear where theirs belongs."""


# What is measured on


def _keep_previous(
    database: duckdb.DuckDBPyConnection, previous: Path | None, transitions: Transitions, split: Split
) -> tuple[int, int]:
    """Tables ``kept`` (previous evaluation rows, with today's labels) and ``measured_*`` (their keys).

    Returns:
        How many rows were put aside (their category's transition is not certain), and how many are
        gone (their category is, and nothing says where to).
    """
    before, needed, certain = "(SELECT * FROM delivered LIMIT 0)", list[str](), dict[str, str]()
    if previous:
        labelled_under = read_manifest(previous).inputs["catalog_taxonomy"]
        since_then = transitions.for_labels_of(labelled_under)
        needed, certain = sorted(since_then), certain_moves(since_then.values())
        before = f"read_parquet({_literal(previous / 'offers.parquet')})"
    database.execute(
        "CREATE TEMP TABLE move AS SELECT unnest(?::VARCHAR[]) AS former, unnest(?::VARCHAR[]) AS moved_to",
        [needed, [certain.get(former) for former in needed]],
    )
    # By name, so that sets from before labels could move have their label columns too.
    source = f"""(
        SELECT * REPLACE (if(former IS NULL, category_id, moved_to) AS category_id,
                coalesce(labelled_as, category_id) AS labelled_as,
                if(coalesce(moved_to, category_id) = category_id, coalesce(label_source, '{HUMAN}'),
                    '{MIGRATED}') AS label_source)
        FROM (SELECT * FROM {before} UNION ALL BY NAME
            SELECT NULL::VARCHAR AS labelled_as, NULL::VARCHAR AS label_source WHERE false)
        LEFT JOIN move ON category_id = former)"""
    database.execute(
        f"CREATE TEMP TABLE kept AS {split.keyed(source)} SEMI JOIN category USING (category_id)"
    )
    _collect_measured(database, "SELECT * FROM kept")
    in_all = _scalar(database, f"SELECT count(*) FROM {before}")
    put_aside = _scalar(
        database, f"SELECT count(*) FROM {source} WHERE former IS NOT NULL AND moved_to IS NULL"
    )
    return put_aside, in_all - put_aside - _scalar(database, "SELECT count(*) FROM kept")


def _free_unlearnable_categories(database: duckdb.DuckDBPyConnection, split: Split) -> None:
    """Tables ``training_only`` and ``candidate``: held-out offers that cost no category its last offer.

    Where every offer of a category is held out, or shares a key with one that is, the offer with the
    highest draw is freed: its group is for training only, and near-copies of it are no candidates.
    """
    database.execute(
        "CREATE TEMP TABLE training_only AS SELECT unnest(?::VARCHAR[]) AS group_key", [split.training_only]
    )
    database.execute(f"""
        CREATE TEMP TABLE open_candidate AS
        SELECT * FROM labelled
        ANTI JOIN (SELECT offer_id FROM kept) USING (offer_id)
        {_sharing_nothing_with("(FROM labelled SEMI JOIN training_only USING (group_key))", PRODUCT_KEYS)}
        WHERE held_out AND label_source NOT IN {GUESSED}""")
    shared = split.shared_columns
    database.execute(f"""
        CREATE TEMP TABLE freed AS
        WITH trainable AS (SELECT * FROM labelled {_not_measured(shared)}),
        safe AS (
            SELECT category_id FROM (
                SELECT * FROM trainable WHERE NOT held_out OR group_key IN (FROM training_only))
            {_sharing_nothing_with("open_candidate", shared)})
        SELECT * FROM trainable ANTI JOIN safe USING (category_id)
        QUALIFY row_number() OVER (PARTITION BY category_id ORDER BY held_out, draw DESC, offer_id) = 1""")
    database.execute("""
        INSERT INTO training_only
        SELECT DISTINCT group_key FROM freed ANTI JOIN training_only USING (group_key)""")
    database.execute(f"""
        CREATE TEMP TABLE candidate AS
        SELECT * FROM open_candidate
        {_sharing_nothing_with("(FROM labelled SEMI JOIN training_only USING (group_key))", PRODUCT_KEYS)}""")


# What is learned from


def _check_same_split(split: Split, parameters: TrainingSampleParameters) -> None:
    for name, wanted, found in (
        ("split_by", parameters.split_by, split.split_by),
        ("evaluation_share", parameters.evaluation_share, split.share),
    ):
        if wanted != found:
            raise InputError(
                f"{name} is {wanted} here but the evaluation set was made with {found}; set both the same"
            )


def _check_taxonomy(context: StageContext, *migrations: str) -> None:
    """Raise InputError if one of these inputs leads to another taxonomy than the one given."""
    taxonomy = read_manifest(context.input("catalog_taxonomy"))
    for name in migrations:
        led_to = read_manifest(context.input(name)).inputs["catalog_taxonomy"]
        if led_to != taxonomy.digest:
            raise InputError(
                f"{name} leads to version {short_version(led_to)} of the taxonomy, the one given is "
                f"{short_version(taxonomy.digest)}; materialize {name} anew"
            )


def _collect_weak(database: duckdb.DuckDBPyConnection, migrated_labels: Path) -> None:
    """Table ``weak``: as ``labelled``, of offers without a label, each with its most confident weak one."""
    weak_labels = migrated_labels / "weak_labels.parquet"
    database.execute(f"""
        CREATE TEMP TABLE weak AS SELECT {_LABELLED_COLUMNS} FROM (
            SELECT keyed.* REPLACE (proposed.category_id AS category_id, '{WEAK}' AS label_source,
                proposed.confidence AS label_confidence)
            FROM keyed JOIN read_parquet({_literal(weak_labels)}) AS proposed USING (offer_id, delivered_on)
            SEMI JOIN category ON proposed.category_id = category.category_id
            ANTI JOIN labelled ON keyed.offer_id = labelled.offer_id
            QUALIFY 1 = row_number() OVER (PARTITION BY keyed.offer_id
                ORDER BY proposed.confidence DESC, keyed.delivered_on DESC, proposed.category_id))""")


def _choose_labelled(
    database: duckdb.DuckDBPyConnection, parameters: TrainingSampleParameters, split: Split
) -> None:
    """Tables ``eligible`` and ``labelled_chosen``.

    Weak labels come last, in their product and in their category.
    A product that people labelled differently gives each label its turn, the rarest category first.
    Ordered by place in the category over the square root of the category's size, the first offers
    of all categories come first, and from there on each gets room like the root of what it has.
    """
    database.execute(f"""
        CREATE TEMP TABLE eligible AS
        SELECT *, label_source = '{WEAK}' AS is_weak
        FROM (FROM labelled UNION ALL FROM weak) {_not_measured(split.shared_columns)}
        WHERE NOT held_out OR group_key IN (FROM training_only)""")
    database.execute(f"""
        CREATE TEMP TABLE labelled_chosen AS
        WITH sized AS (
            SELECT *, count(*) OVER (PARTITION BY category_id, is_weak) AS available, row_number() OVER (
                PARTITION BY product, category_id, is_weak ORDER BY draw, offer_id) AS copies_before
            FROM eligible),
        of_product AS (
            SELECT *, row_number() OVER (
                PARTITION BY product
                ORDER BY is_weak, copies_before, available, draw, offer_id) AS place_in_product
            FROM sized),
        of_category AS (
            SELECT *, row_number() OVER (
                PARTITION BY category_id ORDER BY is_weak, place_in_product, draw, offer_id) AS place
            FROM of_product WHERE place_in_product <= {parameters.cap_per_product}),
        capped AS (
            SELECT *, count(*) OVER (PARTITION BY category_id) AS size
            FROM of_category WHERE place <= {parameters.cap_per_category})
        SELECT offer_id, delivered_on, category_id, labelled_as, label_source, label_confidence
        FROM capped
        ORDER BY (place - 1) / sqrt(size), draw, offer_id
        LIMIT {parameters.labelled}""")


def _check_learnable(database: duckdb.DuckDBPyConnection) -> None:
    categories = _scalar(
        database,
        f"SELECT count(DISTINCT category_id) FROM labelled_chosen WHERE label_source NOT IN {GUESSED}",
    )
    if categories < 2:
        raise InputError(
            f"apart from the evaluation set there are labelled offers of {categories} categories, learning "
            "needs two; lower the evaluation share, split by product, or bring more labelled offers"
        )


def _choose_unlabelled(
    database: duckdb.DuckDBPyConnection, parameters: TrainingSampleParameters, split: Split
) -> None:
    """Table ``unlabelled_chosen``: offers without a label, not held out, like none in the evaluation set.

    Drawn uniformly, each in its newest version. An offer comes at most once a day and all its versions
    have the same draw, so the first ``unlabelled`` x days rows hold every version of the first
    ``unlabelled`` offers, whatever their number: the heap of the sort stays that small.
    """
    days = _scalar(database, "SELECT count(DISTINCT delivered_on) FROM delivered")
    database.execute(f"""
        CREATE TEMP TABLE unlabelled_chosen AS
        SELECT offer_id, max(delivered_on) AS delivered_on FROM (
            SELECT offer_id, delivered_on, md5('{parameters.seed}:unlabelled:' || offer_id) AS lot
            FROM keyed
            ANTI JOIN (FROM labelled UNION ALL BY NAME FROM labelled_chosen) AS known USING (offer_id)
            {_not_measured(split.shared_columns)}
            WHERE NOT held_out OR group_key IN (FROM training_only)
            ORDER BY lot, offer_id LIMIT {parameters.unlabelled * max(days, 1)})
        GROUP BY offer_id, lot ORDER BY lot, offer_id LIMIT {parameters.unlabelled}""")


def _label_counts(database: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """What became of the labels, from the tables above and the finished sample (``sampled``)."""
    is_weak = f"label_source = '{WEAK}'"
    queries = {
        "labelled_available": "SELECT count(*) FROM labelled",
        "labelled_kept_for_evaluation": ("SELECT count(*) FROM labelled ANTI JOIN eligible USING (offer_id)"),
        "migrated": f"SELECT count(*) FROM sampled WHERE label_source = '{MIGRATED}'",
        "by_evidence": f"SELECT count(*) FROM sampled WHERE label_source = '{BY_EVIDENCE}'",
        "weak": f"SELECT count(*) FROM sampled WHERE {is_weak}",
        "put_aside": _PUT_ASIDE,
        "categories_with_weak_labels_only": (
            f"SELECT count(*) FROM (SELECT category_id FROM sampled GROUP BY ALL HAVING bool_and({is_weak}))"
        ),
        "categories_without_training": (
            "SELECT count(DISTINCT category_id) FROM labelled ANTI JOIN sampled USING (category_id)"
        ),
    }
    return {name: _scalar(database, query) for name, query in queries.items()}


def _rows_of(chosen: str) -> str:
    columns = ", ".join(CLEAN_SCHEMA.names)
    return f"SELECT {columns} FROM delivered SEMI JOIN {chosen} USING (offer_id, delivered_on)"


# SQL


def _collect_measured(database: duckdb.DuckDBPyConnection, query: str) -> None:
    """Tables ``measured_<column>``: the keys and shops of the evaluation set, small enough to hash."""
    for column in (*PRODUCT_KEYS, "shop_id"):
        database.execute(
            f"CREATE TEMP TABLE measured_{column} AS SELECT DISTINCT {column} FROM ({query}) "
            f"WHERE {column} IS NOT NULL"
        )


def _not_measured(columns: list[str]) -> str:
    return " ".join(f"ANTI JOIN measured_{column} USING ({column})" for column in columns)


def _sharing_nothing_with(source: str, columns: Iterable[str]) -> str:
    return " ".join(
        f"ANTI JOIN (SELECT {column} FROM {source}) AS shared_{column} USING ({column})" for column in columns
    )


def _literal(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def _scalar(database: duckdb.DuckDBPyConnection, query: str) -> int:
    return int(database.sql(query).fetchall()[0][0])


def _write_offers(
    database: duckdb.DuckDBPyConnection, query: str, path: Path, label_fields: Iterable[pa.Field[Any]] = ()
) -> int:
    """Write the rows of ``query`` with their text, ordered by offer, in batches; returns their number."""
    reader = database.sql(f"SELECT * FROM ({query}) ORDER BY offer_id").to_arrow_reader(_BATCH_OFFERS)
    schema = pa.schema([*CLEAN_SCHEMA, *label_fields])
    count = 0
    with pq.ParquetWriter(path, schema.append(_TEXT_FIELD)) as writer:
        for batch in reader:
            table = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
            writer.write_table(table.append_column(_TEXT_FIELD, pa.array(offer_texts(table), pa.string())))
            count += len(table)
    return count
