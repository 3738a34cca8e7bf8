"""What a cascade gains by asking the student about more offers: quality over throughput.

    python -m benchmarks.cascade_curve NAME --models DIR            # DIR: --work of benchmarks.quality

Takes the compiled model of a finished ``benchmarks.quality``, has its fast model answer the offers that it is
surest of, more and more of them, and measures each such cascade on the held-out offers: quality, and offers
per second of one that runs so. "As certified" is the model as it was compiled. A point is chosen on the
offers that it is measured on, so it says what is possible, not what was promised.

``certified by`` is the number of validation offers with which a loss below the limit would be certified, if
the two models are right and wrong on them as often as here: what it would take to choose that point.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks import one_model, report
from benchmarks.one_model import Task
from benchmarks.plots import quality_over_throughput
from benchmarks.quality import scored
from benchmarks.throughput import read_models
from ml.artifacts import MANIFEST, read_manifest, write_manifest
from ml.cores import available_cores
from ml.errors import InputError
from ml.learning.risk_control import CONFIDENCE, paired_loss_p_value
from ml.offers import offer_texts
from ml.progress import Progress
from ml.serving.cascade import FAST_FOLDER, OTHER_COUNTRIES, CascadeSettings, FastThreshold
from ml.serving.fast_model import FastModel
from ml.taxonomy import Taxonomy

SHARES = (0.0, 0.03, 0.06, 0.09, 0.12, 0.15, 0.2, 0.25, 0.35, 0.5, 1.0)
"""Of the offers that the student is asked about."""

LIMITS = (0.01, 0.003)
"""Losses of accuracy that are to be certified."""

# Each a tenth more than the one before, up to half a million.
_NEEDED_OFFERS = tuple(round(250 * 1.1**step) for step in range(80))

_progress = Progress("cascade curve")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = _parser().parse_args(arguments)
    with report.refused_plainly():
        figures = run(options)
    print()
    report.show([_columns(row) for row in figures["models"]])
    report.save(f"cascade_curve_{options.name}", figures)
    path = report.RESULTS / f"cascade_curve_{options.name}.png"
    rows = [
        {
            "model": row["model"],
            "is_ours": row["asked_share"] is not None,
            "quality": row["mean"],
            "offers_per_second": row["offers_per_second"],
        }
        for row in figures["models"]
    ]
    title = f"{options.name}: share of {figures['held_out_offers']:,} offers that the student is asked about"
    quality_over_throughput(rows, title, "mean weighted F1 over the levels", path)
    print(f"drawn in {path}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every point of the curve; returns the content of the result file.

    Raises:
        InputError: there is no compiled model in the folder given.
    """
    places = read_models(options.models)
    if "cascade" not in places["models"]:
        raise InputError(f"{options.models} has no cascade: run benchmarks.quality without --only")
    compiled, evaluation = Path(places["models"]["cascade"]), Path(places["evaluation_set"])
    offers = evaluation / "offers.parquet"
    table = pq.read_table(offers)
    labelled = pq.read_table(Path(places["training_sample"]) / "labelled.parquet", columns=["category_id"])
    counts = Counter(labelled["category_id"].to_pylist())
    taxonomy, truth = Taxonomy.load(Path(places["catalog_taxonomy"])), table["category_id"].to_pylist()
    confidence = _fast_confidence(compiled, offer_texts(table))
    rows, answers = [], []
    with tempfile.TemporaryDirectory(dir=options.models) as temporary:
        for name, share, folder in _variants(compiled, confidence, Path(temporary)):
            _progress.say(f"student asked about {name}")
            given = _asked(options, folder, offers, "answer").answers
            speed = _asked(options, folder, offers, "measure").speed
            assert speed  # of a measurement that ran
            answers.append(np.array(given, dtype=str) == np.array(truth, dtype=str))
            rows.append(
                {
                    "model": name,
                    "asked_share": share,
                    **scored(taxonomy, table, given, counts),
                    "offers_per_second": speed.offers_per_second,
                    "peak_memory_bytes": speed.peak_memory_bytes,
                }
            )
    asked_always = answers[[row["asked_share"] for row in rows].index(1.0)]
    for row, right in zip(rows, answers, strict=True):
        losses, gains = int((asked_always & ~right).sum()), int((right & ~asked_always).sum())
        row["accuracy_lost"] = (losses - gains) / len(right)
        row["certified_by"] = {
            str(limit): offers_needed(losses, gains, len(right), limit) for limit in LIMITS
        }
    return {
        "cores": available_cores(),
        "held_out_offers": table.num_rows,
        "validation_offers": CascadeSettings.read(compiled).thresholds[OTHER_COUNTRIES].offers,
        "models": rows,
    }


def offers_needed(losses: int, gains: int, offers: int, limit: float) -> int | None:
    """Fewest offers that certify a loss below ``limit`` if the models differ on them as often as on these.

    Args:
        losses: Of ``offers``, those that only the student has right.
        gains: Those that only the cascade has right.
        offers: All.
        limit: Loss of accuracy.

    Returns:
        In steps of a tenth; None: not even half a million would do.
    """
    error = 1 - CONFIDENCE
    for number in _NEEDED_OFFERS:
        expected = round(losses * number / offers), round(gains * number / offers)
        if paired_loss_p_value(*expected, number, limit, error) <= error:
            return number
    return None


def _fast_confidence(compiled: Path, texts: list[str]) -> NDArray[np.float32]:
    """Of the fast model's best category, calibrated as the cascade reads it without countries, (texts,)."""
    probabilities = FastModel.load(compiled / FAST_FOLDER).predict_probabilities(texts)
    best: NDArray[np.float32] = probabilities.max(axis=1)
    return best


def _variants(
    compiled: Path, confidence: NDArray[np.float32], workspace: Path
) -> Iterator[tuple[str, float | None, Path]]:
    """Name, share of offers asked about, and folder of each cascade."""
    yield "as certified", None, compiled
    for share in SHARES:
        # The ends by a confidence that every offer reaches, and by one that none does.
        threshold = np.quantile(confidence, share) if 0 < share < 1 else share * 2
        folder = workspace / f"{share}"
        _with_threshold(compiled, float(threshold), folder)
        yield f"{share:.0%}", share, folder
        shutil.rmtree(folder)  # one copy of the model at a time


def _with_threshold(compiled: Path, threshold: float, folder: Path) -> None:
    """A copy of a compiled model whose fast model answers from this confidence on, wherever an offer is."""
    shutil.copytree(compiled, folder, copy_function=shutil.copyfile)
    (folder / MANIFEST).unlink()
    settings, manifest = CascadeSettings.read(compiled), read_manifest(compiled)
    chosen = FastThreshold(confidence=threshold, offers=0, answered=0.0, loss=0.0, p_value=None)
    msgspec.structs.replace(
        settings,
        thresholds={OTHER_COUNTRIES: chosen},
        review=msgspec.structs.replace(settings.review, confidence=0.0),
    ).write(folder)
    write_manifest(
        folder,
        kind=manifest.kind,
        key=manifest.key,
        inputs=manifest.inputs,
        code_version=manifest.code_version,
        code_revision=manifest.code_revision,
        parameters=manifest.parameters,
        metrics=manifest.metrics,
        seconds=manifest.seconds,
    )


def _asked(
    options: argparse.Namespace, folder: Path, offers: Path, kind: Literal["answer", "measure"]
) -> one_model.Outcome:
    """What comes of one task, in a process of its own.

    Raises:
        InputError: nothing but a reason.
    """
    task = Task(
        kind=kind,
        model="cascade",
        folder=str(folder),
        result=str(options.models / "outcomes" / "cascade_curve.json"),
        offers=str(offers),
        cores=available_cores(),
        seconds=options.seconds,
    )
    outcome = one_model.run(task)
    if outcome.not_run:
        raise InputError(f"the cascade in {folder} cannot be measured: {outcome.not_run}")
    return outcome


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    certified = {f"certified at {limit} by": number for limit, number in row["certified_by"].items()}
    return {
        "student asked about": row["model"],
        "mean F1": row["mean"],
        "accuracy lost": row["accuracy_lost"],
        "offers/s": round(row["offers_per_second"]),
        "peak MB": round(row["peak_memory_bytes"] / 1e6),
        **certified,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the result: benchmarks/results/cascade_curve_NAME.json")
    parser.add_argument("--models", required=True, type=Path, help="work folder of benchmarks.quality")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement, about")
    return parser


if __name__ == "__main__":
    main()
