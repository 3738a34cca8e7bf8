"""Offers per second of the models of the newest demo run, on the same offers, one after the other.

Needs a finished ``make demo`` (or another home in ``OFFER_ASSETS_HOME``). Takes offers of the newest
catalogued day, warms each model up, and reports the median of three passes:

* the teacher and the student in torch, batched, as many threads as cores,
* the compiled student in one process of one thread, in a worker process per core, and over HTTP,
* the fast model.

Results of torch and of the compiled student include the time to make the text and to tokenize it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.report import save, show
from ml.learning.encoder import Classifier
from ml.offers import offer_text
from ml.serving.fast_model import FastModel
from ml.serving.pool import PredictorPool
from ml.serving.predictor import Predictor
from resources.environment import resources_for
from resources.settings import Settings

_PASSES = 3
_HTTP_BATCH = 256

Offers = list[dict[str, Any]]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offers", type=int, default=2_000, help="offers per pass")
    options = parser.parse_args()
    resources = resources_for(Settings.from_environment())
    store = resources["artifact_store"]

    def folder(asset: str) -> Path:
        ref = store.read_pointer(asset)
        if ref is None:
            raise SystemExit(f"there is no {asset} yet: run `make demo` first")
        return Path(store.fetch(ref))

    day = max(store.list_pointers("catalogued_offers"))
    table = pq.read_table(folder(f"offers/{day}") / "offers.parquet").slice(0, options.offers)
    offers: Offers = table.to_pylist()
    workers = os.cpu_count() or 1

    def texts(batch: Offers) -> list[str]:
        return [offer_text(offer) for offer in batch]

    teacher, student = (
        Classifier.load(folder("teacher_checkpoint")),
        Classifier.load(folder("student_checkpoint")),
    )
    fast, compiled = FastModel.load(folder("fast_checkpoint")), Predictor.load(folder("offer_endpoint"))
    rows = [
        _measured("teacher, torch fp32", offers, lambda batch: teacher.predict_probabilities(texts(batch))),
        _measured("student, torch fp32", offers, lambda batch: student.predict_probabilities(texts(batch))),
        _measured("student, int8, 1 thread", offers, compiled.predict),
        _measured("fast model", offers, lambda batch: fast.predict_probabilities(texts(batch))),
    ]
    with PredictorPool(folder("offer_endpoint"), workers) as pool:
        rows.append(
            _measured(
                f"student, int8, {workers} workers", offers, lambda batch: list(pool.predict(_batches(batch)))
            )
        )
    endpoints = resources["endpoints"]
    if endpoints.status() is not None:
        rows.append(_measured("student, int8, endpoint", offers, endpoints.invoke))
    show(rows)
    save("throughput", {"offers": len(offers), "models": rows})


def _batches(offers: Offers) -> list[Offers]:
    return [offers[start : start + _HTTP_BATCH] for start in range(0, len(offers), _HTTP_BATCH)]


def _measured(name: str, offers: Offers, predict: Callable[[Offers], object]) -> dict[str, Any]:
    """Median offers per second; every pass sees other texts, so that no cache answers for the model."""
    predict(offers[:64])
    rates = []
    for number in range(_PASSES):
        fresh = [{**offer, "title": f"{offer['title']} {number}"} for offer in offers]
        started_at = time.perf_counter()
        predict(fresh)
        rates.append(len(fresh) / (time.perf_counter() - started_at))
    return {
        "model": name,
        "offers_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
    }


if __name__ == "__main__":
    main()
