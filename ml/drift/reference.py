"""Stage ``drift_reference``: what is usual on the days that the serving model was trained on.

Made once per served model. The newest days behind its training sample are looked at as any day
will be: the same counts, a uniform sample, the same models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ml.cores import available_cores
from ml.drift.expected import weekdays_are_known
from ml.drift.frame import Frame
from ml.drift.sample import PREDICTED, TRAINED_FILE, rows_of, sampled_offers, with_each_alone, write_trained
from ml.drift.totals import DayTotals, totals_of
from ml.progress import Bar
from ml.runner import StageContext
from ml.serving.predictor import Predictor, prediction_table
from ml.stages import DriftReferenceParameters

_CHUNK_OFFERS = 512
_NOT_LOOKED_AT = ("description", "url")
"""Columns of which no more than their presence is monitored, and that is counted over all offers."""


def write_drift_reference(context: StageContext, parameters: DriftReferenceParameters) -> dict[str, Any]:
    """Write the frame (see :meth:`ml.drift.frame.Frame.save`) and ``trained.parquet``.

    Returns:
        ``days``, ``first_day``, ``last_day``, ``offers`` (of these days, all of them),
        ``offers_looked_at``, ``series`` (of one day) and ``weekdays_allowed_for``.

    Raises:
        InputError: no day of the reference has an offer.
    """
    folders = dict(sorted(context.partitions("offers").items())[-parameters.days :])
    trained = context.output / TRAINED_FILE
    write_trained(context.input("training_sample"), trained)
    number = min(parameters.offers_per_day, max(parameters.max_offers // len(folders), 1))
    predictor = Predictor.load(context.input("compiled_student"), threads=available_cores())
    days, total = {}, list[DayTotals]()
    with context.progress.bar("cataloguing the reference", number * len(folders), "offers") as bar:
        for day, folder in folders.items():
            done = context.checkpoints / f"{day}.parquet"
            if not done.exists():
                offers = sampled_offers(folder, day, number, parameters.seed, trained)
                offers = with_each_alone(offers, predictor)
                _write(_catalogued(offers, predictor, bar).drop_columns(list(_NOT_LOOKED_AT)), done)
            rows = rows_of(pq.read_table(done))
            rows["taxonomy_known"] = True
            total.append(totals_of(folder, day, complete=True))
            days[day] = rows, total[-1]
    context.progress.say(f"measuring what is usual on {len(days)} days")
    frame = Frame.fit(days, parameters)
    frame.save(context.output)
    series = frame.reference_series()
    return {
        "days": len(days),
        "first_day": min(days),
        "last_day": max(days),
        "offers": sum(of_day.offers for of_day in total),
        "offers_looked_at": frame.reference_offers,
        "series": len(series.group_by(["question", "measure", "group", "segment"]).aggregate([])),
        "weekdays_allowed_for": weekdays_are_known(days),
    }


def _catalogued(offers: pa.Table, predictor: Predictor, bar: Bar) -> pa.Table:
    """The offers with what the served model predicts for them."""
    predictions = []
    for start in range(0, len(offers), _CHUNK_OFFERS):
        chunk = offers.slice(start, _CHUNK_OFFERS).to_pylist()
        predictions += predictor.predict(chunk)
        bar.update(len(chunk))
    table = prediction_table(predictions)
    for name in PREDICTED:
        offers = offers.append_column(name, table[name])
    return offers


def _write(table: pa.Table, path: Path) -> None:
    """In one step, so that a killed run leaves a finished day or none."""
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd")
    partial.rename(path)
