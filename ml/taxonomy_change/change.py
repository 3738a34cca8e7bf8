"""Stage ``taxonomy_change``: what a new version of the taxonomy changes, where labels go, whom it touches.

The diff goes by id (:mod:`ml.taxonomy_change.diff`), the successors of what is gone are found by
:mod:`ml.taxonomy_change.successors`; here the two are put together with the offers: the teacher says where
offers of a removed category go, and every change is counted in labelled offers, unlabelled offers and
traffic. The first version changes nothing and costs nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.offers import CLEAN_FILE, CLEAN_SCHEMA, offer_texts
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.diff import TaxonomyDiff
from ml.taxonomy_change.releases import read_mapping
from ml.taxonomy_change.successors import Flow, infer_transitions, late_transitions
from ml.taxonomy_change.transitions import Origin, Transition, Transitions, certain_moves, compose

if TYPE_CHECKING:
    from ml.runner import StageContext
    from ml.stages import TaxonomyChangeParameters
    from ml.taxonomy_change.judge import Judge

CHANGE_FILE = "change.json"
IMPACT_FILE = "impact.parquet"

Difference = Literal["new", "changed"]
ChangeKind = Literal["added", "removed", "renamed", "moved", "replaced", "merged", "split"]

BACKGROUND_OFFERS = 400
"""That names are held against, to see how close they are to offers at large."""

_CATALOGUED_FILE = "catalogued.parquet"
_MEMORY_LIMIT = "1GB"
_TEXTS_JUDGED = 20_000
"""In all, however many categories are gone: minutes of a small encoder on two cores."""
_RIVALS = 2
_NEW_RIVALS = 8
_SMALLEST_CONFIDENCE = 0.5
"""An offer of which the teacher is less sure says nothing about where its category went."""
_DOUBT_OFFERS = 2.0
"""Counted as going nowhere known, so that two offers prove less than a hundred."""


class Impact(msgspec.Struct, frozen=True, kw_only=True):
    """One changed category, and the offers that it concerns."""

    category_id: str
    path: str
    """Names from the root: in the new version where the category exists there, else in the one before."""
    change: ChangeKind
    to: list[str]
    """Paths of the categories that its offers go to; the new parent's path if ``moved``."""
    origin: Origin
    confidence: float
    labelled: int
    """Offers that people labelled with it; of a renamed or moved category also those below it."""
    unlabelled: int
    """Offers without a label that the model catalogued there."""
    traffic_share: float
    """Of all catalogued offers, in [0, 1]."""
    sentence: str


class FewLabelled(msgspec.Struct, frozen=True, kw_only=True):
    """A new category that too few labelled offers come with."""

    category_id: str
    path: str
    labelled: int


class TaxonomyChange(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``change.json``: one step from a version to the next."""

    from_version: str | None
    to_version: str
    diff: TaxonomyDiff
    transitions: list[Transition]
    """Of this step only, with those of ids that were gone before and that the official mapping names now;
    ``transitions.json`` has those that hold today."""
    impact: list[Impact]
    """The most labelled offers first."""
    few_labelled: list[FewLabelled]
    changed: dict[str, Difference] = {}
    """Categories of the newer version that the step concerns; see :func:`changed_since`."""


def read_change(folder: Path) -> TaxonomyChange:
    """The change that the artifact in ``folder`` describes.

    Raises:
        InputError: there is none that can be read.
    """
    path = folder / CHANGE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=TaxonomyChange)
    except (FileNotFoundError, msgspec.DecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); make taxonomy_change anew") from None


def changed_categories(folder: Path) -> dict[str, Difference]:
    """Categories of the current version that the last step concerns; every other is unchanged."""
    return read_change(folder).changed


def changed_since(
    earlier: Taxonomy, current: Taxonomy, transitions: Mapping[str, Transition]
) -> dict[str, Difference]:
    """Categories of the current version that are not what they were in an earlier one.

    Args:
        earlier: Any older version, such as that of the model in production.
        current: The newest version.
        transitions: By id, those that labels of ``earlier`` need (:meth:`Transitions.for_labels_of`).

    Returns:
        By id: ``changed`` if it, or a category above it, was renamed or moved, if all offers of another
        category come to it, or if it was there before and gives up offers or gets some; else ``new`` if it
        was not there before. Every other category is unchanged.
    """
    diff = TaxonomyDiff.between(earlier, current)
    found: dict[str, Difference] = dict.fromkeys(_with_another_place_or_name(diff, current), "changed")
    found |= {added.category_id: "new" for added in diff.added}
    for former in transitions.keys() & set(earlier):
        successors = transitions[former].to
        for successor in successors:
            if len(successors) == 1 or successor.category_id in earlier:
                found[successor.category_id] = "changed"
    return dict(sorted(found.items()))


def _with_another_place_or_name(diff: TaxonomyDiff, taxonomy: Taxonomy) -> set[str]:
    """Categories whose path is another: with a department moves (or is renamed) all that is below it."""
    tops = {moved.category_id for moved in diff.moved} | {renamed.category_id for renamed in diff.renamed}
    return {inside for top in tops for inside in _at_or_below(taxonomy, top)}


def write_taxonomy_change(context: StageContext, parameters: TaxonomyChangeParameters) -> dict[str, Any]:
    """Write ``transitions.json``, ``change.json`` and ``impact.parquet``.

    Returns:
        Counts by kind of change, ``labelled_touched``, ``unlabelled_touched``, ``traffic_touched`` (of
        categories that are gone, new, divided, or at or below what was renamed or moved) and others.

    Raises:
        InputError: ``previous_change`` does not lead to ``previous_taxonomy``.
    """
    folder = context.input("catalog_taxonomy")
    digest = read_manifest(folder).digest
    new = Taxonomy.load(folder)
    previous = context.optional_input("previous_taxonomy")
    if previous is None:
        return _write_first_version(context, new, digest)

    old, earlier = Taxonomy.load(previous), _earlier_transitions(context, read_manifest(previous).digest)
    diff = TaxonomyDiff.between(old, new)
    with offers_database(context) as database:
        see_offers(database, context, earlier)
        _choose_labels(database)
        mapping = read_mapping(folder, in_force=previous)
        judge = _judge(database, context, new, earlier, mapping) if diff.removed or mapping else None
        step = infer_transitions(
            old,
            new,
            mapping=mapping,
            flows=_flows(database, context, parameters, old, new, diff, mapping, judge) if judge else {},
            similarity=judge.similarity if judge else None,
            certain_from=parameters.certain_from,
            since=digest,
        ) | late_transitions(earlier.transitions, old, new, mapping, since=digest)
        transitions = Transitions(
            history=[*earlier.history, digest],
            transitions=compose(earlier.transitions, step, old, new),
            added=sorted({*earlier.added, *(category.category_id for category in diff.added)} & set(new)),
            adopted_on=[*earlier.adopted_on, parameters.adopted_on],
        )
        _count_offers(database, context)
        impact = _impact(database, old, new, diff, step)
        few_labelled = _few_labelled(database, new, diff, step, parameters.few_labelled)
        touched = _touched(database, old, diff, step)
    change = TaxonomyChange(
        from_version=short_version(earlier.history[-1]),
        to_version=short_version(digest),
        diff=diff,
        transitions=[step[former] for former in sorted(step)],
        impact=impact,
        few_labelled=few_labelled,
        changed=changed_since(old, new, step),
    )
    _write(context, transitions, change)
    metrics = _metrics(change) | touched
    _tell(context, change, metrics)
    return metrics


def _write_first_version(context: StageContext, new: Taxonomy, digest: str) -> dict[str, Any]:
    locales = list(new.locales)
    nothing = TaxonomyDiff(
        added=[], removed=[], renamed=[], moved=[], locales_before=locales, locales_after=locales
    )
    change = TaxonomyChange(
        from_version=None,
        to_version=short_version(digest),
        diff=nothing,
        transitions=[],
        impact=[],
        few_labelled=[],
    )
    _write(context, _first(digest), change)
    context.progress.say(f"first version, {len(new):,} categories")
    return _metrics(change) | {"labelled_touched": 0, "unlabelled_touched": 0, "traffic_touched": 0.0}


def _earlier_transitions(context: StageContext, previous_digest: str) -> Transitions:
    folder = context.optional_input("previous_change")
    if folder is None:
        return _first(previous_digest)
    earlier = Transitions.read(folder)
    if earlier.history[-1] != previous_digest:
        raise InputError(
            f"previous_change leads to taxonomy version {short_version(earlier.history[-1])}, "
            f"previous_taxonomy is {short_version(previous_digest)}; give the change that led to it"
        )
    return earlier


def _first(digest: str) -> Transitions:
    """Of a first version: whenever labels were given that are valid in it, they are its own."""
    return Transitions(history=[digest], transitions=[], adopted_on=[""])


def _write(context: StageContext, transitions: Transitions, change: TaxonomyChange) -> None:
    transitions.write(context.output)
    encoded = msgspec.json.format(msgspec.json.encode(change), indent=2)
    (context.output / CHANGE_FILE).write_bytes(encoded)
    columns: dict[str, pa.DataType] = {
        "category_id": pa.string(),
        "path": pa.string(),
        "change": pa.string(),
        "to": pa.list_(pa.string()),
        "origin": pa.string(),
        "confidence": pa.float64(),
        "labelled": pa.int64(),
        "unlabelled": pa.int64(),
        "traffic_share": pa.float64(),
        "sentence": pa.string(),
    }
    rows = [msgspec.structs.asdict(impact) for impact in change.impact]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), context.output / IMPACT_FILE)


def _metrics(change: TaxonomyChange) -> dict[str, Any]:
    kinds = Counter(transition.kind for transition in change.transitions)
    return {
        "added": len(change.diff.added),
        "removed": len(change.diff.removed),
        "renamed": len(change.diff.renamed),
        "moved": len(change.diff.moved),
        "merged": kinds["merged"],
        "split": kinds["split"],
        "replaced": kinds["replaced"],
        "inferred": sum(transition.origin == "inferred" for transition in change.transitions),
        "only_names": change.diff.only_names and not change.transitions,
        "is_first": change.from_version is None,
        "few_labelled": len(change.few_labelled),
        "from_version": change.from_version,
        "to_version": change.to_version,
    }


def _tell(context: StageContext, change: TaxonomyChange, metrics: Mapping[str, Any]) -> None:
    counts = ", ".join(
        f"{metrics[name]:,} {name}"
        for name in ("added", "removed", "renamed", "moved", "merged", "split", "replaced")
        if metrics[name]
    )
    context.progress.say(f"version {change.from_version} to {change.to_version}: {counts or 'nothing'}")
    context.progress.say(
        f"{metrics['labelled_touched']:,} labelled and {metrics['unlabelled_touched']:,} unlabelled offers "
        f"concerned, {metrics['traffic_touched']:.1%} of traffic"
    )
    for impact in change.impact[:5]:
        context.progress.say(impact.sentence)
    if change.few_labelled:
        context.progress.say(f"{len(change.few_labelled):,} new categories have few labelled offers")


# The offers, as tables


@contextmanager
def offers_database(context: StageContext) -> Iterator[duckdb.DuckDBPyConnection]:
    """An engine that spills to the workspace instead of growing."""
    settings = {
        "memory_limit": _MEMORY_LIMIT,
        "temp_directory": str(context.scratch),
        "preserve_insertion_order": False,
    }
    with duckdb.connect(config=settings) as database:
        yield database


def _choose_labels(database: duckdb.DuckDBPyConnection) -> None:
    """Table ``newest_label`` (offer_id, delivered_on, label): one row per labelled offer.

    The newest of its labels counts, brought to the version before the change as far as that is certain.
    """
    database.execute("""
        CREATE TEMP TABLE newest_label AS
        SELECT offer_id, delivered_on, coalesce(moves_to, category_id) AS label
        FROM delivered LEFT JOIN rule
            ON delivered.version = rule.version AND delivered.category_id = rule.labelled_as
        WHERE category_id IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY offer_id ORDER BY delivered_on DESC, label) = 1""")


def see_offers(database: duckdb.DuckDBPyConnection, context: StageContext, transitions: Transitions) -> None:
    """View ``delivered`` (all days, with ``delivered_on`` and ``version``) and table ``rule``.

    ``version`` numbers the taxonomies that labels were given under, as far as is known
    (:meth:`Transitions.version_of_labels`). ``rule`` has a row for every
    label of a version that needs a transition: ``version, labelled_as, moves_to`` (null unless certain),
    ``transition`` (its place in ``transitions``).
    """
    days = context.partitions("offers")
    digests = {
        day: transitions.version_of_labels(read_manifest(folder).inputs.get("catalog_taxonomy", ""), day)
        for day, folder in days.items()
    }
    number = {digest: place for place, digest in enumerate(sorted(set(digests.values())))}
    selects = [
        f"SELECT *, {sql_literal(day)} AS delivered_on, {number[digests[day]]} AS version "
        f"FROM read_parquet({sql_literal(folder / CLEAN_FILE)})"
        for day, folder in days.items()
    ]
    if not selects:
        columns = ", ".join(f"NULL::{_sql_type(field.type)} AS {field.name}" for field in CLEAN_SCHEMA)
        selects = [f"SELECT {columns}, NULL::VARCHAR AS delivered_on, 0 AS version LIMIT 0"]
    database.execute(f"CREATE TEMP VIEW delivered AS {' UNION ALL BY NAME '.join(selects)}")
    place = {transition.from_id: at for at, transition in enumerate(transitions.transitions)}
    rules: list[tuple[int, str, str | None, int]] = []
    for digest, version in number.items():
        needed = transitions.for_labels_of(digest)
        certain = certain_moves(needed.values())
        rules += [(version, former, certain.get(former), place[former]) for former in sorted(needed)]
    put_table(
        database,
        "rule",
        {
            "version": pa.array([rule[0] for rule in rules], pa.int32()),
            "labelled_as": pa.array([rule[1] for rule in rules], pa.string()),
            "moves_to": pa.array([rule[2] for rule in rules], pa.string()),
            "transition": pa.array([rule[3] for rule in rules], pa.int32()),
        },
    )


def put_table(database: duckdb.DuckDBPyConnection, name: str, columns: Mapping[str, pa.Array[Any]]) -> None:
    """A temporary table of small columns."""
    database.register("incoming", pa.table(dict(columns)))
    database.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS FROM incoming")
    database.unregister("incoming")


def sample_texts(database: duckdb.DuckDBPyConnection, query: str, offers: int) -> list[str]:
    """Texts of offers drawn uniformly from ``query`` (offer_id, delivered_on), in a fixed order."""
    columns = ", ".join(CLEAN_SCHEMA.names)
    rows = database.sql(f"""
        SELECT {columns} FROM delivered
        SEMI JOIN (SELECT offer_id, delivered_on FROM ({query})
            ORDER BY md5('sample:' || offer_id), offer_id, delivered_on LIMIT {offers})
            USING (offer_id, delivered_on)
        ORDER BY offer_id, delivered_on""")
    return offer_texts(rows.to_arrow_table())


def sql_literal(value: object) -> str:
    """``value`` as an SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def _sql_type(type_: pa.DataType) -> str:
    return (
        "DOUBLE"
        if pa.types.is_floating(type_)
        else "TIMESTAMP"
        if pa.types.is_timestamp(type_)
        else "VARCHAR"
    )


# Where offers of a removed category go


def _judge(
    database: duckdb.DuckDBPyConnection,
    context: StageContext,
    new: Taxonomy,
    earlier: Transitions,
    mapping: Sequence[tuple[str, str]],
) -> Judge | None:
    """The teacher, where there is one."""
    teacher = context.optional_input("teacher_checkpoint")
    if teacher is None:
        return None
    from ml.taxonomy_change.judge import Judge

    return Judge.load(
        new,
        teacher=teacher,
        transitions=earlier,
        divided={former for former, successor in mapping if former != successor},
        background=sample_texts(database, "SELECT offer_id, delivered_on FROM delivered", BACKGROUND_OFFERS),
    )


def _flows(
    database: duckdb.DuckDBPyConnection,
    context: StageContext,
    parameters: TaxonomyChangeParameters,
    old: Taxonomy,
    new: Taxonomy,
    diff: TaxonomyDiff,
    mapping: Sequence[tuple[str, str]],
    judge: Judge,
) -> dict[str, list[Flow]]:
    """By former id: where the judge sees a sample of its labelled offers, as shares of them."""
    official: dict[str, list[str]] = defaultdict(list)
    for former, successor in mapping:
        if former in old and successor in new and successor not in official[former]:
            official[former].append(successor)
    divided = {former for former, successors in official.items() if len(successors) > 1}
    asked = sorted({c.category_id for c in diff.removed if not official[c.category_id]} | divided)
    if not asked:
        return {}
    options_of = _options(judge, old, new, asked, official, [c.category_id for c in diff.added])
    each = max(1, min(parameters.offers_judged, _TEXTS_JUDGED // len(asked)))
    put_table(database, "asked", {"label": pa.array(asked, pa.string())})
    columns = ", ".join(CLEAN_SCHEMA.names)
    rows = database.sql(f"""
        WITH drawn AS (
            SELECT * FROM newest_label SEMI JOIN asked USING (label)
            QUALIFY row_number() OVER (
                PARTITION BY label ORDER BY md5('{parameters.seed}:flow:' || offer_id), offer_id) <= {each})
        SELECT {columns}, label FROM delivered JOIN drawn USING (offer_id, delivered_on)
        ORDER BY label, offer_id""").to_arrow_table()
    if not rows.num_rows:
        return {}
    texts, labels = offer_texts(rows), rows["label"].to_pylist()
    context.progress.say(f"looking at {len(texts):,} offers of {len(set(labels)):,} categories that are gone")
    options = [
        list(dict.fromkeys([*options_of[label], *([] if label in divided else answers)]))
        for label, answers in zip(labels, judge.answers(texts, _RIVALS), strict=True)
    ]
    known = [row for row, some in enumerate(options) if some]
    decided = judge.decide([texts[row] for row in known], [options[row] for row in known])
    counts: dict[str, Counter[str]] = {label: Counter() for label in labels}
    for row, confidences in zip(known, decided, strict=True):
        best = int(confidences.argmax())
        if confidences[best] >= _SMALLEST_CONFIDENCE:
            counts[labels[row]][options[row][best]] += 1
    offers = Counter(labels)
    return {
        label: [
            (category, number / (offers[label] + _DOUBT_OFFERS))
            for category, number in sorted(found.items(), key=lambda item: (-item[1], item[0]))
        ]
        for label, found in counts.items()
        if found
    }


def _options(
    judge: Judge,
    old: Taxonomy,
    new: Taxonomy,
    asked: Sequence[str],
    official: Mapping[str, Sequence[str]],
    added: Sequence[str],
) -> dict[str, list[str]]:
    """Categories that offers of each former one may have gone to, beside what the teacher answers.

    Those of the official mapping if there are; else new leaf categories: under the same parent, and those
    whose names are most similar.
    """
    options = {former: list(official.get(former, ())) for former in asked}
    searched = [former for former in asked if not options[former]]
    new_leaves = [category for category in added if new.is_leaf(category)]
    if not (searched and new_leaves):
        return options
    cosines = judge.similarity([old.path(former) for former in searched], [new.path(c) for c in new_leaves])
    for former, row in zip(searched, cosines, strict=True):
        parent = old.parent(former)
        beside = [c for c in new_leaves if parent is not None and new.parent(c) == parent]
        nearest = [new_leaves[column] for column in (-row).argsort(kind="stable")[:_NEW_RIVALS].tolist()]
        options[former] = list(dict.fromkeys([*beside[:_NEW_RIVALS], *nearest]))
    return options


# Whom the change touches


def _count_offers(database: duckdb.DuckDBPyConnection, context: StageContext) -> None:
    """Tables ``label_count`` (category_id, labelled), ``place_count`` (category_id, unlabelled, offers).

    Places are those that the model catalogued offers in.
    """
    database.execute(
        "CREATE TEMP TABLE label_count AS "
        "SELECT label AS category_id, count(*) AS labelled FROM newest_label GROUP BY label"
    )
    days = [
        f"SELECT offer_id, category_id, {sql_literal(day)} AS delivered_on "
        f"FROM read_parquet({sql_literal(folder / _CATALOGUED_FILE)}) WHERE category_id IS NOT NULL"
        for day, folder in context.partitions("catalogued_offers").items()
    ]
    nothing = "SELECT NULL::VARCHAR AS offer_id, NULL::VARCHAR AS category_id, '' AS delivered_on LIMIT 0"
    database.execute(f"""
        CREATE TEMP TABLE place_count AS
        SELECT category_id, count(*) AS offers, count(*) FILTER (label IS NULL) AS unlabelled FROM (
            SELECT offer_id, category_id FROM ({" UNION ALL ".join(days) or nothing})
            QUALIFY row_number() OVER (PARTITION BY offer_id ORDER BY delivered_on DESC, category_id) = 1)
        LEFT JOIN (SELECT offer_id, label FROM newest_label) USING (offer_id)
        GROUP BY category_id""")


class _Counts(msgspec.Struct):
    """Offers of one or more categories."""

    labelled: int = 0
    unlabelled: int = 0
    offers: int = 0


def _counts(database: duckdb.DuckDBPyConnection) -> tuple[dict[str, _Counts], int]:
    """By category id, and how many offers were catalogued in all."""
    counts: dict[str, _Counts] = defaultdict(_Counts)
    for category, labelled in database.sql("FROM label_count").fetchall():
        counts[category].labelled = labelled
    for category, offers, unlabelled in database.sql(
        "SELECT category_id, offers, unlabelled FROM place_count"
    ).fetchall():
        counts[category].offers, counts[category].unlabelled = offers, unlabelled
    return counts, sum(count.offers for count in counts.values())


def _touched(
    database: duckdb.DuckDBPyConnection, old: Taxonomy, diff: TaxonomyDiff, step: Mapping[str, Transition]
) -> dict[str, Any]:
    counts, offers = _counts(database)
    touched = {c.category_id for c in (*diff.added, *diff.removed)} | set(step)
    touched |= _with_another_place_or_name(diff, old)
    found = [counts[category] for category in touched if category in counts]
    return {
        "labelled_touched": sum(count.labelled for count in found),
        "unlabelled_touched": sum(count.unlabelled for count in found),
        "traffic_touched": round(sum(count.offers for count in found) / offers, 6) if offers else 0.0,
    }


def _impact(
    database: duckdb.DuckDBPyConnection,
    old: Taxonomy,
    new: Taxonomy,
    diff: TaxonomyDiff,
    step: Mapping[str, Transition],
) -> list[Impact]:
    """Every changed category with its offers, the most labelled ones first."""
    counts, offers = _counts(database)

    def impact(
        category: str,
        change: ChangeKind,
        to: Sequence[str],
        what: str,
        *,
        inside: Iterable[str],
        transition: Transition | None = None,
    ) -> Impact:
        found = [counts[member] for member in inside if member in counts]
        labelled = sum(count.labelled for count in found)
        unlabelled = sum(count.unlabelled for count in found)
        share = sum(count.offers for count in found) / offers if offers else 0.0
        numbers = f"{_offers(labelled, 'labelled')}, {_offers(unlabelled, 'unlabelled')}"
        return Impact(
            category_id=category,
            path=transition.from_path if transition and category not in new else new.path(category),
            change=change,
            to=list(to),
            origin=transition.origin if transition else "official",
            confidence=transition.confidence if transition else 1.0,
            labelled=labelled,
            unlabelled=unlabelled,
            traffic_share=round(share, 6),
            sentence=f"{what}; {numbers}, {share:.1%} of traffic.",
        )

    impacts = []
    for former in sorted(step):
        transition = step[former]
        to = [new.path(successor.category_id) for successor in transition.to]
        what = _what_happened(transition, to)
        impacts.append(impact(former, transition.kind, to, what, inside=[former], transition=transition))
    for added in diff.added:
        parent = new.parent(added.category_id)
        place = f"under {new.path(parent)}" if parent else "at the top"
        what = f"“{added.name}” is new {place}"
        impacts.append(impact(added.category_id, "added", [], what, inside=[added.category_id]))
    for renamed in diff.renamed:
        before, after = renamed.before.name, renamed.after.name
        what = (
            f"“{before}” is now called “{after}”"
            if before != after
            else f"“{after}” has another name in {_locales(renamed.before.names, renamed.after.names)}"
        )
        inside = _at_or_below(old, renamed.category_id)
        impacts.append(impact(renamed.category_id, "renamed", [], what, inside=inside))
    for moved in diff.moved:
        place = new.path(moved.after) if moved.after else "the top"
        former_place = old.path(moved.before) if moved.before else "the top"
        what = f"“{new.name(moved.category_id)}” moved from {former_place} to {place}"
        inside = _at_or_below(old, moved.category_id)
        to = [new.path(moved.after)] if moved.after else []
        impacts.append(impact(moved.category_id, "moved", to, what, inside=inside))
    return sorted(impacts, key=lambda i: (-i.labelled, -i.unlabelled, i.category_id, i.change))


def _what_happened(transition: Transition, to: Sequence[str]) -> str:
    name = transition.from_name
    source = "official" if transition.origin == "official" else f"inferred, {transition.confidence:.0%} sure"
    match transition.kind:
        case "removed":
            return f"“{name}” is gone and nothing takes its place ({source})"
        case "replaced":
            return f"“{name}” is now {to[0]} ({source})"
        case "merged":
            return f"“{name}” is now part of {to[0]} ({source})"
        case "split":
            return f"“{name}” is divided into {', '.join(to)} ({source})"


def _offers(number: int, kind: str) -> str:
    return f"{number:,} {kind} offer{'' if number == 1 else 's'}"


def _locales(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    return ", ".join(sorted({n for n in {*before, *after} if before.get(n) != after.get(n)}))


def _at_or_below(taxonomy: Taxonomy, category_id: str) -> list[str]:
    found = [category_id]
    for category in found:
        found.extend(taxonomy.children(category))
    return found


def _few_labelled(
    database: duckdb.DuckDBPyConnection,
    new: Taxonomy,
    diff: TaxonomyDiff,
    step: Mapping[str, Transition],
    enough: int,
) -> list[FewLabelled]:
    """New leaf categories that fewer than ``enough`` labelled offers come to with certainty."""
    counts, _ = _counts(database)
    labelled: Counter[str] = Counter()
    moves = certain_moves(step.values())
    for category, count in counts.items():
        if category in moves or category not in step:
            labelled[moves.get(category, category)] += count.labelled
    return [
        FewLabelled(
            category_id=added.category_id,
            path=new.path(added.category_id),
            labelled=labelled[added.category_id],
        )
        for added in diff.added
        if new.is_leaf(added.category_id) and labelled[added.category_id] < enough
    ]
