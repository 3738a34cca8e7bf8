"""Stage ``migrated_labels``: labels of earlier taxonomies carried over, and labels for new categories.

Every labelled offer is in exactly one place: its label stands (it is in the taxonomy and nothing happened
to it), it moves, it is put aside, or nobody knows it. A label moves with its category where that is
certain; where a category was divided, the offer's own text decides, and where the text does not say, the
label is put aside rather than guessed.

Weak labels are proposals for leaf categories that a change added and that hardly any labelled offer comes
with: offers without a usable label that speak in the category's words, and that the judge puts there rather
than anywhere else. How often that is right nobody knows before people label such offers; it is estimated by
the same search for categories whose labels are known. Where the estimate is low, nothing is proposed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA, offer_texts
from ml.sampling.split import PRODUCT_KEYS
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.change import (
    BACKGROUND_OFFERS,
    offers_database,
    put_table,
    sample_texts,
    see_offers,
    sql_literal,
)
from ml.taxonomy_change.transitions import Transition, Transitions

if TYPE_CHECKING:
    from ml.runner import StageContext
    from ml.stages import MigratedLabelsParameters
    from ml.taxonomy_change.judge import Judge

LABELS_FILE = "labels.parquet"
WEAK_LABELS_FILE = "weak_labels.parquet"

LABELS_SCHEMA = pa.schema(
    dict[str, pa.DataType](
        offer_id=pa.string(),
        delivered_on=pa.string(),
        labelled_as=pa.string(),
        category_id=pa.string(),
        decision=pa.string(),
        confidence=pa.float64(),
    )
)
WEAK_LABELS_SCHEMA = pa.schema(
    dict[str, pa.DataType](
        offer_id=pa.string(),
        delivered_on=pa.string(),
        category_id=pa.string(),
        confidence=pa.float64(),
        similarity=pa.float64(),
    )
)

_BATCH_ROWS = 10_000
_QUESTIONS_PER_SHARD = 4_096
"""What a kill can cost."""
_TEXTS_PER_TRANSITION = 20_000
_TEXTS_OF_TRANSITIONS = 200_000
"""In all: ten minutes of a small encoder on two cores. What is beyond is put aside."""

_SEARCHED_OFFERS = 500_000
"""That candidates are sought among (labelled ones for the estimate), drawn uniformly where there are more."""
_QUESTIONS_OF_WEAK_LABELS = 8_000
_FEWEST_CANDIDATES = 20
_SMALLEST_OVERLAP = 0.3
_WORDS_FROM = "concat_ws(' ', title, left(shop_category, 400), left(description, 400))"

_LEARNED_FROM = 600
_ESTIMATE_CATEGORIES = 60
_ESTIMATE_CANDIDATES = 30
_ESTIMATE_OWN_OFFERS = 3
"""Offers that a category of the estimate is left with: the wanted ones are rare among what is searched."""


def write_migrated_labels(context: StageContext, parameters: MigratedLabelsParameters) -> dict[str, Any]:
    """Write ``labels.parquet`` and ``weak_labels.parquet``.

    Finished shards of judged texts survive a kill; the search for weak labels starts anew.

    Returns:
        ``labelled`` (rows), of these ``kept``, ``migrated``, ``put_aside`` and ``unknown_labels``; decisions
        by kind; ``not_looked_at`` (put aside because they were too many); ``weak``, ``weak_categories``,
        ``few_labelled_categories`` (new leaves), and ``weak_precision``: an estimate, made on categories
        that are not new, so it cannot see what is particular to the new ones, nor that the feed may have no
        offer of them at all; None where nothing was sought.

    Raises:
        InputError: ``taxonomy_change`` leads to another version than ``catalog_taxonomy``.
    """
    folder = context.input("catalog_taxonomy")
    digest = read_manifest(folder).digest
    transitions = Transitions.read(context.input("taxonomy_change"))
    if transitions.history[-1] != digest:
        raise InputError(
            f"taxonomy_change leads to version {short_version(transitions.history[-1])}, catalog_taxonomy is "
            f"{short_version(digest)}; make taxonomy_change of this version first"
        )
    taxonomy = Taxonomy.load(folder)
    with offers_database(context) as database:
        see_offers(database, context, transitions)
        put_table(database, "category", {"category_id": pa.array(taxonomy.ids, pa.string())})
        judges = _Judges(database, context, parameters, taxonomy, transitions)
        metrics = _migrate(database, context, parameters, taxonomy, transitions, judges)
        metrics |= _propose(database, context, parameters, taxonomy, transitions, judges)
    context.progress.say(
        f"of {metrics['labelled']:,} labels {metrics['kept']:,} stand, {metrics['migrated']:,} move, "
        f"{metrics['put_aside']:,} are put aside; {metrics['weak']:,} weak labels"
    )
    return metrics


class _Judges:
    """The judge, made when it is first asked for: most runs do not need it."""

    def __init__(
        self,
        database: duckdb.DuckDBPyConnection,
        context: StageContext,
        parameters: MigratedLabelsParameters,
        taxonomy: Taxonomy,
        transitions: Transitions,
    ) -> None:
        self._database = database
        self._context = context
        self._parameters = parameters
        self._taxonomy = taxonomy
        self._transitions = transitions
        self._judge: Judge | None = None

    def get(self) -> Judge:
        """The judge, which has learned from the labels that stand how much words count."""
        if self._judge is None:
            from ml.taxonomy_change.judge import Judge

            teacher = self._context.optional_input("teacher_checkpoint")
            self._context.progress.say(
                f"the judge is {'the teacher' if teacher else self._parameters.encoder}"
            )
            everything = "SELECT offer_id, delivered_on FROM delivered"
            self._judge = Judge.load(
                self._taxonomy,
                teacher=teacher,
                encoder=self._parameters.encoder,
                encoder_digest=self._parameters.encoder_digest,
                transitions=self._transitions,
                background=sample_texts(self._database, everything, BACKGROUND_OFFERS),
            )
            self._judge.learn_wording(*self._labels_that_stand())
        return self._judge

    def _labels_that_stand(self) -> tuple[list[str], list[str]]:
        """Texts and categories of a sample of offers whose labels needed no decision."""
        put_table(self._database, "leaf", {"category_id": pa.array(self._taxonomy.leaves, pa.string())})
        rows = self._database.sql(f"""
            SELECT {", ".join(CLEAN_SCHEMA.names)} FROM delivered SEMI JOIN leaf USING (category_id)
            ANTI JOIN rule ON delivered.version = rule.version AND delivered.category_id = rule.labelled_as
            ORDER BY md5('wording:' || offer_id), offer_id, delivered_on LIMIT {_LEARNED_FROM}
            """).to_arrow_table()
        return offer_texts(rows), _strings(rows, "category_id")


# Labels that need a decision


def _migrate(
    database: duckdb.DuckDBPyConnection,
    context: StageContext,
    parameters: MigratedLabelsParameters,
    taxonomy: Taxonomy,
    transitions: Transitions,
    judges: _Judges,
) -> dict[str, Any]:
    known = transitions.transitions
    put_table(
        database,
        "known_transition",
        {
            "transition": pa.array(range(len(known)), pa.int32()),
            "origin": pa.array([t.origin for t in known], pa.string()),
            "confidence": pa.array([t.confidence for t in known], pa.float64()),
            "is_open": pa.array([bool(t.to) and not t.certain for t in known], pa.bool_()),
        },
    )
    rule = "delivered.version = rule.version AND delivered.category_id = rule.labelled_as"
    answers = _judge_open_labels(database, context, parameters, taxonomy, known, rule, judges)
    settled = f"""
        SELECT offer_id, delivered_on, labelled_as, moves_to AS category_id,
            CASE WHEN moves_to IS NULL THEN 'put_aside' ELSE origin END AS decision, confidence
        FROM delivered JOIN rule ON {rule} JOIN known_transition USING (transition) WHERE NOT is_open"""
    by_evidence = f"""
        SELECT offer_id, delivered_on, labelled_as,
            CASE WHEN confidence >= {parameters.min_confidence} THEN answer.category_id END AS category_id,
            CASE WHEN confidence >= {parameters.min_confidence} THEN 'by_evidence' ELSE 'put_aside' END,
            coalesce(confidence, 0.0)
        FROM open_label LEFT JOIN {answers} AS answer USING (labelled_as, text)"""
    path = context.output / LABELS_FILE
    rows = database.sql(
        f"SELECT * FROM ({settled} UNION ALL {by_evidence}) ORDER BY delivered_on, offer_id"
    ).to_arrow_reader(_BATCH_ROWS)
    decisions: Counter[str] = Counter(dict.fromkeys(("official", "inferred", "by_evidence", "put_aside"), 0))
    with pq.ParquetWriter(path, LABELS_SCHEMA, compression="zstd") as writer:
        for batch in rows:
            table = pa.Table.from_batches([batch]).rename_columns(LABELS_SCHEMA.names)
            decisions.update(_strings(table, "decision"))
            writer.write_table(table.cast(LABELS_SCHEMA))
    labelled, unknown = database.sql(f"""
        SELECT count(*), count(*) FILTER (rule.labelled_as IS NULL
            AND delivered.category_id NOT IN (SELECT category_id FROM category))
        FROM delivered LEFT JOIN rule ON {rule} WHERE delivered.category_id IS NOT NULL""").fetchall()[0]
    (not_looked_at,) = database.sql(
        f"SELECT count(*) FROM open_label ANTI JOIN {answers} USING (labelled_as, text)"
    ).fetchall()[0]
    if not_looked_at:
        context.progress.say(f"{not_looked_at:,} labels of divided categories are put aside without a look")
    return {
        "labelled": labelled,
        "kept": labelled - unknown - decisions.total(),
        "migrated": decisions.total() - decisions["put_aside"],
        "put_aside": decisions["put_aside"],
        "unknown_labels": unknown,
        "not_looked_at": not_looked_at,
        "decisions": dict(decisions),
    }


def _judge_open_labels(
    database: duckdb.DuckDBPyConnection,
    context: StageContext,
    parameters: MigratedLabelsParameters,
    taxonomy: Taxonomy,
    known: Sequence[Transition],
    rule: str,
    judges: _Judges,
) -> str:
    """View ``open_label`` of the rows that a text decides; SQL of the answers (labelled_as, text, ...).

    Equal texts are one question, so they get one answer.
    """
    path = context.checkpoints / "open_labels.parquet"
    rows = database.sql(f"""
        SELECT {", ".join(CLEAN_SCHEMA.names)}, delivered_on
        FROM delivered JOIN rule ON {rule} JOIN known_transition USING (transition) WHERE is_open
        """).to_arrow_reader(_BATCH_ROWS)
    names = ("offer_id", "delivered_on", "labelled_as", "text")
    schema = pa.schema([pa.field(name, pa.string()) for name in names])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in rows:
            table = pa.Table.from_batches([batch])
            column = pa.array(offer_texts(table), pa.string())
            kept = table.select(["offer_id", "delivered_on", "category_id"]).append_column("text", column)
            writer.write_table(kept.rename_columns(list(names)).cast(schema))
    database.execute(f"CREATE TEMP VIEW open_label AS FROM read_parquet({sql_literal(path)})")
    open_ids = [row[0] for row in database.sql("SELECT DISTINCT labelled_as FROM open_label").fetchall()]
    each = min(_TEXTS_PER_TRANSITION, _TEXTS_OF_TRANSITIONS // max(len(open_ids), 1))
    questions = context.checkpoints / "questions.parquet"
    rows = database.sql(f"""
        SELECT labelled_as, text FROM (SELECT DISTINCT labelled_as, text FROM open_label)
        QUALIFY row_number() OVER (PARTITION BY labelled_as ORDER BY md5(text), text) <= {each}
        ORDER BY labelled_as, md5(text), text""").to_arrow_reader(_BATCH_ROWS)
    # Through a file, because the judge asks the same database while the questions are read.
    with pq.ParquetWriter(questions, rows.schema, compression="zstd") as writer:
        for batch in rows:
            writer.write_batch(batch)
    transition_of = {t.from_id: t for t in known}
    answers_schema = pa.schema(
        dict[str, pa.DataType](
            labelled_as=pa.string(),
            text=pa.string(),
            category_id=pa.string(),
            confidence=pa.float64(),
        )
    )
    empty = context.checkpoints / "answers-none.parquet"
    pq.write_table(answers_schema.empty_table(), empty)
    for number, table in enumerate(_shards(pq.ParquetFile(questions))):
        shard = context.checkpoints / f"answers-{number:06d}.parquet"
        if shard.exists():
            continue
        labels, texts = _strings(table, "labelled_as"), _strings(table, "text")
        context.progress.say(f"judging {len(texts):,} offers of divided categories")
        answers = _answers(judges.get(), [transition_of[label] for label in labels], texts)
        answered = [
            {"labelled_as": label, "text": text, "category_id": category, "confidence": confidence}
            for label, text, (category, confidence) in zip(labels, texts, answers, strict=True)
        ]
        partial = shard.with_suffix(".partial")
        pq.write_table(pa.Table.from_pylist(answered, answers_schema), partial)
        partial.rename(shard)
    return f"read_parquet({sql_literal(context.checkpoints / 'answers-*.parquet')})"


def _strings(table: pa.Table, name: str) -> list[str]:
    """A column without nulls, as Python strings."""
    return [str(value) for value in table[name].to_pylist()]


def _shards(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """Tables of exactly ``_QUESTIONS_PER_SHARD`` rows, and a last smaller one; batches come as they like."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in file.iter_batches(_QUESTIONS_PER_SHARD):
        waiting.append(batch)
        rows += batch.num_rows
        while rows >= _QUESTIONS_PER_SHARD:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, _QUESTIONS_PER_SHARD)
            waiting = table.slice(_QUESTIONS_PER_SHARD).to_batches()
            rows -= _QUESTIONS_PER_SHARD
    if rows:
        yield pa.Table.from_batches(waiting)


def _answers(
    judge: Judge, transitions: Sequence[Transition], texts: Sequence[str]
) -> list[tuple[str, float]]:
    """Category and confidence of each text: the best successor; an only one has to hold against rivals.

    The successors have to be right, and the choice among them: the two confidences multiply.
    """
    answers: list[tuple[str, float]] = [("", 0.0)] * len(texts)
    several = [row for row, transition in enumerate(transitions) if len(transition.to) > 1]
    single = [row for row, transition in enumerate(transitions) if len(transition.to) == 1]
    options = [[successor.category_id for successor in transitions[row].to] for row in several]
    decided = judge.decide([texts[row] for row in several], options)
    for row, some, confidences in zip(several, options, decided, strict=True):
        best = int(confidences.argmax())
        answers[row] = some[best], transitions[row].confidence * float(confidences[best])
    questions = [(place, transitions[row].to[0].category_id) for place, row in enumerate(single)]
    verdict = judge.decide_among_rivals([texts[row] for row in single], questions)
    for row, (_, category), confidence, is_best in zip(
        single, questions, verdict.confidence, verdict.is_best, strict=True
    ):
        answers[row] = category, transitions[row].confidence * float(confidence) if is_best else 0.0
    return answers


# Weak labels


def _propose(
    database: duckdb.DuckDBPyConnection,
    context: StageContext,
    parameters: MigratedLabelsParameters,
    taxonomy: Taxonomy,
    transitions: Transitions,
    judges: _Judges,
) -> dict[str, Any]:
    """Weak labels for leaf categories that a change added and that have few usable labels.

    A category that is rare for years has too few labels as well, but people saw its offers and labelled
    them otherwise: there the teacher's guess is worth less than theirs.
    """
    nothing: dict[str, Any] = {
        "weak": 0,
        "weak_categories": 0,
        "few_labelled_categories": 0,
        "weak_precision": None,
    }
    path = context.output / WEAK_LABELS_FILE
    pq.write_table(WEAK_LABELS_SCHEMA.empty_table(), path)
    new_leaves = [category for category in transitions.added if taxonomy.is_leaf(category)]
    if not new_leaves or not parameters.weak_per_category:
        return nothing
    labelled = _count_usable(database, context.output / LABELS_FILE)
    few = [category for category in new_leaves if labelled[category] < parameters.few_labelled]
    few.sort(key=lambda category: (labelled[category], category))
    nothing["few_labelled_categories"] = len(few)
    searched = few[: _QUESTIONS_OF_WEAK_LABELS // _FEWEST_CANDIDATES]
    if not searched:
        return nothing
    each = min(parameters.candidates_per_category, _QUESTIONS_OF_WEAK_LABELS // len(searched))
    _see_unusable(database, transitions, taxonomy)
    candidates = _candidates(database, taxonomy, searched, "searched_offer", each, aside=True)
    if not candidates.num_rows:
        context.progress.say(
            f"no offer speaks in the words of the {len(few):,} new categories with few labels"
        )
        return nothing
    context.progress.say(
        f"{candidates.num_rows:,} candidates for weak labels of {len(searched):,} new categories"
    )
    judge = judges.get()
    precision = round(_estimated_precision(database, parameters, taxonomy, labelled, judge), 4)
    nothing["weak_precision"] = precision
    context.progress.say(
        f"judged by categories that are not new, about {precision:.0%} of such proposals would be right"
    )
    if precision < parameters.min_weak_confidence:
        context.progress.say(
            f"that is below {parameters.min_weak_confidence:.0%}: no weak labels are proposed"
        )
        return nothing
    proposals = _proposals(judge, candidates, parameters.min_weak_confidence)
    chosen = _one_per_product(proposals, parameters.weak_per_category)
    rows = [{name: row[name] for name in WEAK_LABELS_SCHEMA.names} for row in chosen]
    pq.write_table(pa.Table.from_pylist(rows, WEAK_LABELS_SCHEMA), path)
    return nothing | {
        "weak": len(rows),
        "weak_categories": len({row["category_id"] for row in rows}),
    }


def _count_usable(database: duckdb.DuckDBPyConnection, labels: Path) -> Counter[str]:
    """Table ``usable``: the newest usable label of each offer; returns the offers by category."""
    database.execute(f"""
        CREATE TEMP TABLE usable AS
        SELECT offer_id, delivered_on, category_id FROM (
            SELECT offer_id, delivered_on, CASE WHEN decided.decision IS NULL THEN delivered.category_id
                ELSE decided.category_id END AS category_id
            FROM (SELECT offer_id, delivered_on, category_id FROM delivered WHERE category_id IS NOT NULL)
                AS delivered
            LEFT JOIN read_parquet({sql_literal(labels)}) AS decided USING (offer_id, delivered_on))
        SEMI JOIN category USING (category_id)
        QUALIFY row_number() OVER (PARTITION BY offer_id ORDER BY delivered_on DESC, category_id) = 1""")
    counts = database.sql("SELECT category_id, count(*) FROM usable GROUP BY category_id").fetchall()
    return Counter(dict(counts))


def _see_unusable(database: duckdb.DuckDBPyConnection, transitions: Transitions, taxonomy: Taxonomy) -> None:
    """Tables ``searched_offer`` (offer_id, delivered_on, labelled_as) and ``leads_to`` (labelled_as, ...).

    Searched are offers without a usable label in any of their versions, each in its newest.
    """
    (days,) = database.sql("SELECT count(DISTINCT delivered_on) FROM delivered").fetchall()[0]
    # All versions of an offer have the same lot, so this many rows hold every version of the first offers.
    database.execute(f"""
        CREATE TEMP TABLE searched_offer AS
        SELECT offer_id, max(delivered_on) AS delivered_on, max_by(labelled_as, delivered_on) AS labelled_as
        FROM (
            SELECT offer_id, delivered_on, category_id AS labelled_as, md5('weak:' || offer_id) AS lot
            FROM delivered ANTI JOIN usable USING (offer_id)
            ORDER BY lot, offer_id LIMIT {_SEARCHED_OFFERS * max(days, 1)})
        GROUP BY offer_id, lot ORDER BY lot, offer_id LIMIT {_SEARCHED_OFFERS}""")
    leads = [
        (transition.from_id, successor.category_id)
        for transition in transitions.transitions
        for successor in transition.to
        if taxonomy.is_leaf(successor.category_id)
    ]
    put_table(
        database,
        "leads_to",
        {
            "labelled_as": pa.array([lead[0] for lead in leads], pa.string()),
            "candidate_for": pa.array([lead[1] for lead in leads], pa.string()),
        },
    )


def _words(text: str) -> str:
    """SQL: the distinct words of ``text``, without case and accents."""
    return rf"list_distinct(regexp_extract_all(strip_accents(lower({text})), '[\p{{L}}\p{{N}}]{{2,}}'))"


def _candidates(
    database: duckdb.DuckDBPyConnection,
    taxonomy: Taxonomy,
    categories: Sequence[str],
    offers: str,
    each: int,
    *,
    aside: bool = False,
) -> pa.Table:
    """Offers of the table ``offers`` that may belong to one of ``categories``, the likeliest first.

    An offer is a candidate if it has words that make up enough of the category's name in some language,
    rare words counting more; with ``aside``, also if its own label leads to the category.

    Returns:
        Columns ``candidate_for``, ``overlap``, those of an offer, ``delivered_on`` and the product keys; at
        most ``each`` rows per category.
    """
    locales = (None, *taxonomy.locales)
    named = [
        (category, place, taxonomy.name(category, locale))
        for category in taxonomy.leaves
        for place, locale in enumerate(locales)
    ]
    put_table(
        database,
        "category_name",
        {
            "candidate_for": pa.array([row[0] for row in named], pa.string()),
            "locale": pa.array([row[1] for row in named], pa.int32()),
            "name": pa.array([row[2] for row in named], pa.string()),
        },
    )
    put_table(database, "sought", {"candidate_for": pa.array(categories, pa.string())})
    database.execute(f"""
        CREATE OR REPLACE TEMP TABLE name_word AS
        WITH word_of AS (SELECT candidate_for, locale, unnest({_words("name")}) AS word FROM category_name),
        weighed AS (SELECT word, 1 + ln({len(taxonomy.leaves)} / count(DISTINCT candidate_for)) AS weight
            FROM word_of GROUP BY word)
        SELECT candidate_for, locale, word,
            weight / sum(weight) OVER (PARTITION BY candidate_for, locale) AS part
        FROM word_of JOIN weighed USING (word) SEMI JOIN sought USING (candidate_for)""")
    led = (
        f"UNION ALL SELECT candidate_for, offer_id, delivered_on, 1.0 FROM {offers} "
        "JOIN leads_to USING (labelled_as) SEMI JOIN sought USING (candidate_for)"
        if aside
        else ""
    )
    database.execute(f"""
        CREATE OR REPLACE TEMP TABLE chosen AS
        WITH offer_word AS (
            SELECT offer_id, delivered_on, unnest({_words(_WORDS_FROM)}) AS word
            FROM delivered SEMI JOIN {offers} USING (offer_id, delivered_on)),
        found AS (
            SELECT candidate_for, offer_id, delivered_on, sum(part) AS overlap
            FROM offer_word JOIN name_word USING (word)
            GROUP BY candidate_for, locale, offer_id, delivered_on HAVING overlap >= {_SMALLEST_OVERLAP}
            {led})
        SELECT candidate_for, offer_id, delivered_on, round(max(overlap), 6) AS overlap FROM found
        GROUP BY candidate_for, offer_id, delivered_on
        QUALIFY row_number() OVER (PARTITION BY candidate_for
            ORDER BY round(max(overlap), 6) DESC, md5('weak:' || offer_id), offer_id) <= {each}""")
    columns = ", ".join(CLEAN_SCHEMA.names)
    keys = ", ".join(f"{sql} AS {name}" for name, sql in PRODUCT_KEYS.items())
    found: pa.Table = database.sql(f"""
        SELECT candidate_for, overlap, {columns}, delivered_on, {keys}
        FROM delivered JOIN chosen USING (offer_id, delivered_on)
        ORDER BY candidate_for, overlap DESC, offer_id""").to_arrow_table()
    return found


def _proposals(
    judge: Judge, candidates: pa.Table, min_confidence: float, unknown: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Candidates that the judge would rather see in the category than anywhere else, the surest first."""
    texts = offer_texts(candidates)
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    categories = _strings(candidates, "candidate_for")
    questions = [(row_of[text], category) for text, category in zip(texts, categories, strict=True)]
    verdict = judge.decide_among_rivals(list(row_of), questions, unknown=unknown)
    columns = ["offer_id", "delivered_on", "category_id", *PRODUCT_KEYS]
    rows = candidates.select(columns).to_pylist()
    proposals = [
        row
        | {"labelled_as": row["category_id"]}
        | {"category_id": category, "confidence": float(confidence), "similarity": float(similarity)}
        for row, category, confidence, similarity, is_best in zip(
            rows, categories, verdict.confidence, verdict.similarity, verdict.is_best, strict=True
        )
        if is_best and confidence >= min_confidence
    ]
    return sorted(proposals, key=lambda row: (-row["confidence"], row["category_id"], row["offer_id"]))


def _one_per_product(proposals: Sequence[dict[str, Any]], per_category: int) -> list[dict[str, Any]]:
    """The first proposals, each product (or title) once, at most ``per_category`` of a category."""
    counts: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    chosen = []
    for row in proposals:
        keys = {(name, row[name]) for name in PRODUCT_KEYS if row[name]} | {("offer", row["offer_id"])}
        if counts[row["category_id"]] < per_category and not keys & seen:
            counts[row["category_id"]] += 1
            seen |= keys
            chosen.append(row)
    return sorted(chosen, key=lambda row: row["offer_id"])


def _estimated_precision(
    database: duckdb.DuckDBPyConnection,
    parameters: MigratedLabelsParameters,
    taxonomy: Taxonomy,
    labelled: Counter[str],
    judge: Judge,
) -> float:
    """Estimate of the share of right proposals, from well-labelled categories that are treated as new.

    One right and one wrong are added to what was found, so that a few proposals prove little. The teacher
    has no say in these categories; that it learned to see them still flatters it. Offers with labels stand
    for those without. Where the feed has no offer of a category every proposal for it is wrong, and the
    estimate does not see that.
    """
    well = [category for category in taxonomy.leaves if labelled[category] >= parameters.few_labelled]
    put_table(database, "well", {"category_id": pa.array(well, pa.string())})
    database.execute(f"""
        CREATE TEMP TABLE treated_as_new AS SELECT category_id FROM well
        ORDER BY md5('estimate:' || category_id) LIMIT {_ESTIMATE_CATEGORIES}""")
    database.execute(f"""
        CREATE TEMP TABLE compared AS
        (SELECT * FROM usable SEMI JOIN treated_as_new USING (category_id)
            QUALIFY row_number() OVER (PARTITION BY category_id
                ORDER BY md5('estimate:' || offer_id), offer_id) <= {_ESTIMATE_OWN_OFFERS})
        UNION ALL (SELECT * FROM usable ANTI JOIN treated_as_new USING (category_id)
            ORDER BY md5('estimate:' || offer_id), offer_id LIMIT {_SEARCHED_OFFERS})""")
    drawn = [row[0] for row in database.sql("FROM treated_as_new ORDER BY 1").fetchall()]
    candidates = _candidates(database, taxonomy, drawn, "compared", _ESTIMATE_CANDIDATES)
    truth = dict(
        database.sql("SELECT offer_id, category_id FROM usable SEMI JOIN chosen USING (offer_id)").fetchall()
    )
    proposals = _proposals(judge, candidates, parameters.min_weak_confidence, frozenset(drawn))
    right = len([row for row in proposals if truth[row["offer_id"]] == row["category_id"]])
    return (right + 1) / (len(proposals) + 2)
