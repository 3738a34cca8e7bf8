"""Whole columns side by side: Evidently's report, and its distance for each column.

The distance is the population stability index (PSI). The checks do not go by it, since it tells neither
a country's share from another's nor chance from weekdays; it is there to look at, next to the drawn
distributions. What it is held against comes from the reference: how far its own days are from each other.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.stats import chi2, f

from ml.drift.answers import DistanceOfColumn
from ml.drift.measures import Floats, Integers

LEAST_OFFERS = 100
"""With fewer on either side a column is not compared."""

_MOST_REFERENCE_OFFERS = 8_000
"""More make the page larger and no distance better: that of a day is of a few thousand offers."""
_CHANCE = 0.999
_LEAST_SHARE = 1e-4
"""What Evidently takes a segment's share for that one side does not have."""


def write_evidently_report(day: pa.Table, reference: pa.Table, path: Path) -> list[DistanceOfColumn]:
    """Write Evidently's page and return its distances, the largest in relation to what is usual first.

    Args:
        day: Segments of the day's offers, see :meth:`ml.drift.frame.Frame.columns`.
        reference: Those of the reference, with the column ``day``.
        path: Of the HTML page.
    """
    columns = [
        name
        for name in day.column_names
        if min(len(side) - side[name].null_count for side in (day, reference)) >= LEAST_OFFERS
    ]
    days = np.unique(reference["day"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    usual = {name: _usual_high(day[name], reference[name], days.astype(np.int64)) for name in columns}
    distances = _run_evidently(day.select(columns), reference.select(columns), usual, path)
    found = [
        DistanceOfColumn(column=name, distance=distances[name], usual_high=usual[name]) for name in columns
    ]
    return sorted(found, key=lambda column: (-column.distance / column.usual_high, column.column))


def population_stability_index(counts: Floats, other: Floats) -> float:
    """PSI of two sets of offers, given how many each has per segment; as Evidently computes it."""
    shares, other_shares = (
        np.where(side > 0, side / max(side.sum(), 1.0), _LEAST_SHARE) for side in (counts, other)
    )
    return float(((shares - other_shares) * np.log(shares / other_shares)).sum())


def chance_distance(segments: int, reference_offers: int, offers: int) -> float:
    """PSI that two samples of one population stay below in 999 of 1,000 cases.

    Under equal distributions PSI is close to (1/n + 1/m) times a chi-squared variable with
    ``segments - 1`` degrees of freedom (Yurdakul, 2018).
    """
    return float(chi2.ppf(_CHANCE, max(segments - 1, 1)) * (1 / reference_offers + 1 / offers))


def _usual_high(day: pa.ChunkedArray[Any], reference: pa.ChunkedArray[Any], days: Integers) -> float:
    """What a day of the reference stays below in 999 of 1,000 cases, against the others.

    Distances of days are taken for multiples of chi-squared variables, whose mean and degrees of
    freedom the days tell; never less than what chance alone does to offers as many as these.
    """
    segments, codes = np.unique(reference.to_pandas().astype(object).fillna(""), return_inverse=True)
    is_known = segments[codes] != ""
    if days.max(initial=0) == 0:
        days = np.arange(len(codes)) % 2  # A single day: one half against the other.
    counts = np.zeros((int(days.max()) + 1, len(segments)))
    np.add.at(counts, (days[is_known], codes[is_known]), 1.0)
    counts = counts[:, counts.sum(axis=0) > 0]
    total = counts.sum(axis=0)
    distances = np.array(
        [
            population_stability_index(of_day, total - of_day)
            for of_day in counts
            if min(of_day.sum(), (total - of_day).sum()) >= LEAST_OFFERS
        ]
    )
    by_chance = chance_distance(counts.shape[1], int(total.sum()), len(day) - day.null_count)
    if len(distances) == 0 or distances.mean() == 0:
        return by_chance
    mean, degrees = float(distances.mean()), float(counts.shape[1] - 1)
    if len(distances) > 2:
        # Segments that move together are fewer degrees of freedom than there are segments.
        degrees = min(max(2 * mean**2 / max(float(distances.var(ddof=1)), 1e-12), 1.0), degrees)
    among_days = mean * float(f.ppf(_CHANCE, degrees, degrees * len(distances)))
    return max(among_days, by_chance)


def _run_evidently(
    day: pa.Table, reference: pa.Table, thresholds: dict[str, float], path: Path
) -> dict[str, float]:
    """Distance of each column; the page goes to ``path``."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # read when the library is imported
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    columns = day.column_names
    definition = DataDefinition(categorical_columns=columns)
    preset = DataDriftPreset(columns=columns, cat_method="psi", per_column_threshold=thresholds)
    current, before = (
        Dataset.from_pandas(_spread_out(side), data_definition=definition) for side in (day, reference)
    )
    snapshot = Report([preset]).run(current, before)
    snapshot.save_html(str(path))
    found = {
        metric["config"]["column"]: float(metric["value"])
        for metric in snapshot.dict()["metrics"]
        if metric["config"]["type"].endswith(":ValueDrift")
    }
    return {name: found[name] for name in columns}


def _spread_out(table: pa.Table) -> pd.DataFrame:
    """At most ``_MOST_REFERENCE_OFFERS`` rows, evenly over the table and so over its days."""
    rows = len(table)
    kept = np.unique(np.linspace(0, max(rows - 1, 0), min(rows, _MOST_REFERENCE_OFFERS)).astype(np.int64))
    return pd.DataFrame(
        {name: table[name].take(kept).to_pandas().astype(object) for name in table.column_names}, dtype=object
    )
