"""Whether a day of offers still looks like what the model was made for.

Distances are population stability indices (PSI), computed and drawn by Evidently: on ten
thousand offers a p-value finds every difference, a distance only those that matter. A column has
drifted if its distance is beyond the threshold *and* beyond what two samples of this size show by
chance (see :func:`chance_distance`).
"""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy.stats import chi2

from ml.cores import available_cores
from ml.drift.columns import Column, Floats, compared_columns, top_category
from ml.runner import StageContext
from ml.serving.predictor import Predictor
from ml.stages import DriftParameters

LEAST_OFFERS = 100
"""With fewer offers on either side there is no verdict."""

_CHUNK_OFFERS = 512
_CHANCE = 0.999
_MOVES_SHOWN = 5
_MOVES_SAID = 3
_LEAST_OF_LARGEST = 0.25
"""A sentence names a further segment if it moved at least this much, measured by the largest."""
_BREAKDOWNS = ("country", "shop", "top_category")
_LEAST_SEGMENT_SHARE = 0.05
_LEAST_SEGMENT_OFFERS = 30


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One segment, and the share of offers it holds on both sides."""

    segment: str
    reference_share: float
    current_share: float
    contribution: float
    """Its part of the distance."""


class ColumnDrift(msgspec.Struct, frozen=True, kw_only=True):
    """How far one column moved."""

    name: str
    title: str
    compared: bool
    """False where too few offers have a value that can be compared."""
    distance: float
    threshold: float
    drifted: bool
    moves: list[Move]
    """The segments that moved most."""
    sentence: str


class DriftReport(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``drift.json``."""

    day: str
    offers: int
    reference_offers: int
    sufficient: bool
    sentence: str
    columns: list[ColumnDrift]


def write_drift_report(context: StageContext, parameters: DriftParameters) -> dict[str, Any]:
    """Write ``report.html`` (Evidently) and ``drift.json``.

    Returns:
        ``offers``, ``reference_offers``, ``sufficient``, ``columns``, ``drifted_columns``,
        ``share_drifted``, ``sentence`` and ``distance_<column>`` for each compared column.
    """
    current = _day(context, parameters)
    reference_path = context.input("training_sample") / "reference.parquet"
    available = pq.read_metadata(reference_path).num_rows
    if min(len(current), available) < LEAST_OFFERS:
        report = _too_few(parameters.day, len(current), available)
        (context.output / "report.html").write_text(_page(report.sentence), encoding="utf-8")
    else:
        reference = _predicted_reference(context, reference_path)
        columns = compared_columns(reference, current, _trained(context.input("training_sample")))
        compared = [column for column in columns if _is_comparable(column)]
        thresholds = {column.name: _threshold(column, parameters.column_threshold) for column in compared}
        context.progress.say(f"comparing {len(compared)} columns of {len(current):,} offers")
        distances = _run_evidently(compared, thresholds, context.output / "report.html")
        breakdowns = {column.name: column for column in columns if column.name in _BREAKDOWNS}
        report = _report(parameters.day, columns, distances, thresholds, breakdowns)
    (context.output / "drift.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    context.progress.say(report.sentence)
    return _metrics(report)


def chance_distance(segments: int, reference_offers: int, current_offers: int) -> float:
    """PSI that two samples of one population stay below in 999 of 1,000 cases.

    Under equal distributions PSI is close to (1/n + 1/m) times a chi-squared variable with
    ``segments - 1`` degrees of freedom (Yurdakul, 2018).
    """
    if segments < 2:
        return 0.0
    return float(chi2.ppf(_CHANCE, segments - 1) * (1 / reference_offers + 1 / current_offers))


# Both sides


def _day(context: StageContext, parameters: DriftParameters) -> list[dict[str, Any]]:
    """A uniform sample of the day's offers with what was predicted for them."""
    with duckdb.connect() as database:
        offers = str(context.input("offers") / "offers.parquet")
        catalogued = str(context.input("catalogued_offers") / "catalogued.parquet")
        rows = database.sql(
            """
            SELECT offers.* EXCLUDE (category_id), catalogued.category_path, catalogued.confidence
            FROM read_parquet(?) AS offers JOIN read_parquet(?) AS catalogued USING (offer_id)
            ORDER BY md5(? || ':' || offer_id), offer_id LIMIT ?""",
            params=[offers, catalogued, str(parameters.seed), parameters.max_offers],
        ).to_arrow_table()
    return [row | {"top_category": top_category(row["category_path"])} for row in rows.to_pylist()]


def _predicted_reference(context: StageContext, path: Path) -> list[dict[str, Any]]:
    """The reference offers with what the same model predicts for them."""
    predictor = Predictor.load(context.input("compiled_student"), threads=available_cores())
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    with context.progress.bar("cataloguing the reference", len(rows), "offers") as bar:
        for start in range(0, len(rows), _CHUNK_OFFERS):
            chunk = rows[start : start + _CHUNK_OFFERS]
            for row, prediction in zip(chunk, predictor.predict(chunk), strict=True):
                row["category_path"] = prediction.category_path
                row["top_category"] = top_category(prediction.category_path)
                row["confidence"] = prediction.confidence
            bar.update(len(chunk))
    return rows


def _trained(training_sample: Path) -> set[str]:
    return {
        str(offer_id)
        for name in ("labelled", "unlabelled")
        for offer_id in _column(training_sample / f"{name}.parquet", "offer_id")
    }


def _column(path: Path, name: str) -> list[Any]:
    return pq.read_table(path, columns=[name])[name].to_pylist()


# Distances


def _is_comparable(column: Column) -> bool:
    return min(_filled(column.reference), _filled(column.current)) >= LEAST_OFFERS


def _filled(segments: Sequence[str | None]) -> int:
    return sum(segment is not None for segment in segments)


def _threshold(column: Column, wanted: float) -> float:
    segments = len({*column.reference, *column.current} - {None})
    return max(wanted, chance_distance(segments, _filled(column.reference), _filled(column.current)))


def _run_evidently(columns: Sequence[Column], thresholds: dict[str, float], path: Path) -> dict[str, float]:
    """Distance of each column; the report goes to ``path``."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # read when the library is imported
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    titles = {column.name: column.title for column in columns}
    definition = DataDefinition(categorical_columns=list(titles.values()))
    preset = DataDriftPreset(
        columns=list(titles.values()),
        cat_method="psi",
        per_column_threshold={titles[name]: threshold for name, threshold in thresholds.items()},
    )
    current, reference = (
        Dataset.from_pandas(pd.DataFrame(side, dtype=object), data_definition=definition)
        for side in (
            {column.title: column.current for column in columns},
            {column.title: column.reference for column in columns},
        )
    )
    snapshot = Report([preset]).run(current, reference)
    snapshot.save_html(str(path))
    found = {
        metric["config"]["column"]: float(metric["value"])
        for metric in snapshot.dict()["metrics"]
        if metric["config"]["type"].endswith(":ValueDrift")
    }
    return {name: found[title] for name, title in titles.items()}


def _moves(column: Column) -> list[Move]:
    """The segments that moved, those that add most to the distance first."""
    before, after = (Counter(s for s in side if s is not None) for side in (column.reference, column.current))
    totals = max(before.total(), 1), max(after.total(), 1)
    moves = []
    for segment in {*before, *after}:
        shares = before[segment] / totals[0], after[segment] / totals[1]
        floored = [max(share, 0.5 / total) for share, total in zip(shares, totals, strict=True)]
        moves.append(
            Move(
                segment=segment,
                reference_share=shares[0],
                current_share=shares[1],
                contribution=(floored[1] - floored[0]) * float(np.log(floored[1] / floored[0])),
            )
        )
    return sorted(moves, key=lambda move: (-move.contribution, move.segment))[:_MOVES_SHOWN]


# Words


def _report(
    day: str,
    columns: Sequence[Column],
    distances: dict[str, float],
    thresholds: dict[str, float],
    breakdowns: dict[str, Column],
) -> DriftReport:
    drifts = []
    for column in columns:
        compared = column.name in distances
        distance, threshold = distances.get(column.name, 0.0), thresholds.get(column.name, 0.0)
        moves = _moves(column) if compared else []
        if compared:
            what = _what_moved(column, moves, breakdowns)
            sentence = f"{column.title}: {what} (distance {distance:.2f}, threshold {threshold:.2f})"
        else:
            sentence = f"{column.title}: not compared, fewer than {LEAST_OFFERS} offers that can be"
        drifts.append(
            ColumnDrift(
                name=column.name,
                title=column.title,
                compared=compared,
                distance=distance,
                threshold=threshold,
                drifted=compared and distance >= threshold,
                moves=moves,
                sentence=sentence,
            )
        )
    moved = sorted((d for d in drifts if d.drifted), key=lambda d: -d.distance / d.threshold)
    offers, reference_offers = len(columns[0].current), len(columns[0].reference)
    return DriftReport(
        day=day,
        offers=offers,
        reference_offers=reference_offers,
        sufficient=True,
        sentence=(
            f"{len(moved)} of {sum(d.compared for d in drifts)} columns drifted on {day}: "
            + "; ".join(d.sentence for d in moved)
            + "."
            if moved
            else f"No column drifted on {day} ({offers:,} offers against {reference_offers:,})."
        ),
        columns=drifts,
    )


def _what_moved(column: Column, moves: Sequence[Move], breakdowns: dict[str, Column]) -> str:
    if column.reference_values is not None and column.current_values is not None:
        before = _known(column.reference_values, column.reference)
        after = _known(column.current_values, column.current)
        if len(before) and len(after):
            unit = f" {column.unit}" if column.unit else ""
            average, middle = "median", (np.median(before), np.median(after))
            if middle[0] == middle[1]:  # of a column that is mostly zero, for instance
                average, middle = "mean", (before.mean(), after.mean())
            return f"{average} {middle[0]:.3g} → {middle[1]:.3g}{unit}{_most_in(column, breakdowns)}"
    said = [move for move in moves if move.contribution >= moves[0].contribution * _LEAST_OF_LARGEST]
    return (
        ", ".join(
            f"{move.segment} {move.reference_share:.1%} → {move.current_share:.1%}"
            for move in said[:_MOVES_SAID]
        )
        + " of offers"
    )


def _most_in(column: Column, breakdowns: dict[str, Column]) -> str:
    """Where a number moved most: the country, shop or category with the largest shift of the median."""
    before, after = column.reference_values, column.current_values
    if before is None or after is None:
        return ""
    shifts = []
    for by in breakdowns.values():
        sides = np.array(by.reference, dtype=str), np.array(by.current, dtype=str)
        for segment in sorted(set(by.current) - {None}, key=str):
            inside = sides[0] == segment, sides[1] == segment
            if inside[1].mean() < _LEAST_SEGMENT_SHARE:
                continue
            known = before[inside[0] & ~np.isnan(before)], after[inside[1] & ~np.isnan(after)]
            if min(len(known[0]), len(known[1])) >= _LEAST_SEGMENT_OFFERS:
                medians = float(np.median(known[0])), float(np.median(known[1]))
                shifts.append((abs(medians[1] - medians[0]), by.title, str(segment), medians))
    if not shifts:
        return ""
    _, title, segment, medians = max(shifts)
    return f", most in {title} {segment} ({medians[0]:.3g} → {medians[1]:.3g})"


def _known(values: Floats, segments: Sequence[str | None]) -> Floats:
    """The values that are there and compared."""
    known: Floats = values[~np.isnan(values) & np.array([segment is not None for segment in segments])]
    return known


def _too_few(day: str, offers: int, reference_offers: int) -> DriftReport:
    return DriftReport(
        day=day,
        offers=offers,
        reference_offers=reference_offers,
        sufficient=False,
        sentence=f"No verdict on {day}: {offers:,} offers against a reference of {reference_offers:,}; "
        f"both need at least {LEAST_OFFERS}.",
        columns=[],
    )


def _page(sentence: str) -> str:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Drift</title>"
        f"<p>{html.escape(sentence)}</p></html>"
    )


def _metrics(report: DriftReport) -> dict[str, Any]:
    compared = [column for column in report.columns if column.compared]
    drifted = sum(column.drifted for column in compared)
    return {
        "offers": report.offers,
        "reference_offers": report.reference_offers,
        "sufficient": report.sufficient,
        "columns": len(compared),
        "drifted_columns": drifted,
        "share_drifted": round(drifted / len(compared), 6) if compared else 0.0,
        "sentence": report.sentence,
        **{f"distance_{column.name}": round(column.distance, 6) for column in compared},
    }
