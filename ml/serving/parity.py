"""Whether a compiled model answers like the original, and what either costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ml.errors import InputError
from ml.evaluation.metrics import scores
from ml.learning.encoder import Classifier
from ml.serving.bucketed import torch_threads
from ml.serving.compiled_model import CompiledModel

Probabilities = NDArray[np.float32]


def evaluation_sample(folder: Path, offers: int) -> pa.Table:
    """At most ``offers`` rows (text, category_id, country) of an evaluation set, evenly spread over it.

    Raises:
        InputError: it has none.
    """
    table = pq.read_table(folder / "offers.parquet", columns=["text", "category_id", "country"])
    if table.num_rows == 0:
        raise InputError(f"{folder / 'offers.parquet'} has no offers; the compiled model is compared on them")
    rows = np.linspace(0, table.num_rows - 1, min(offers, table.num_rows)).round().astype(np.int64)
    return table.take(rows)


def compare(classifier: Classifier, compiled: CompiledModel, sample: pa.Table) -> dict[str, Any]:
    """Hold a compiled model against the original, on a sample of :func:`evaluation_sample`.

    Returns:
        ``offers`` compared; ``same_category``: share of them that both models give the same category;
        ``weighted_f1_compiled`` and ``weighted_f1_original``; mean and largest difference of the
        probability that the original's choice has; ``offers_per_second`` and
        ``original_offers_per_second`` per CPU-second of one thread, from text to probabilities.
    """
    texts = [str(text) for text in sample["text"].to_pylist()]
    truth = np.array(sample["category_id"].to_pylist(), dtype=str)
    with torch_threads(1):
        original, original_rate = _timed(classifier.predict_probabilities, texts)
    probabilities, rate = _timed(compiled.predict_probabilities, texts)

    labels = np.array(classifier.labels, dtype=str)
    before, after = original.argmax(axis=1), probabilities.argmax(axis=1)
    rows = np.arange(len(texts))
    difference = np.abs(probabilities[rows, before] - original[rows, before])
    return {
        "offers": len(texts),
        "same_category": float(np.mean(before == after)),
        "weighted_f1_compiled": scores(truth, labels[after]).weighted_f1,
        "weighted_f1_original": scores(truth, labels[before]).weighted_f1,
        "mean_probability_difference": float(difference.mean()),
        "max_probability_difference": float(difference.max()),
        "offers_per_second": round(rate, 1),
        "original_offers_per_second": round(original_rate, 1),
    }


def _timed(
    predict: Callable[[Sequence[str]], Probabilities], texts: Sequence[str]
) -> tuple[Probabilities, float]:
    """Probabilities, and texts per second of this process's CPU time, which other load leaves alone."""
    predict(texts[:1])
    started_at = time.process_time()
    probabilities = predict(texts)
    return probabilities, len(texts) / max(time.process_time() - started_at, 1e-9)
