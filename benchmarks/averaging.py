"""How much each of two averaged models should count: what rules choose, and what that is worth.

    python -m benchmarks.averaging NAME --models DIR [DIR ...]      # DIRs: --work of benchmarks.quality

Two pairs of every finished ``benchmarks.quality`` are averaged: the teacher's encoder with its linear model,
and the student with the fast model. A rule chooses the second's share on the validation offers, and what
counts is how many held-out offers the average has right then. Rules:

* ``equal unless clear``, what this project does (:mod:`ml.learning.averaging`),
* ``most right``: the share with the most right validation offers,
* ``Brier``: the lowest Brier score, each average at its best temperature,
* ``likelihood``: the same with the mean logarithm of the right category's probability.

As one set of validation offers is one draw, each rule also chooses on many resamples of them, as many as
there are and 200; the mean of what it then gets right says more than one choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.plots import curves
from benchmarks.throughput import read_models
from ml.errors import InputError
from ml.learning.averaging import SHARES, clearly_best
from ml.learning.calibration import fit_temperature, log_softmax, softmax, targets_of
from ml.learning.cascade import validation_offers
from ml.learning.encoder import Classifier
from ml.learning.ensemble import Teacher, linear_logits
from ml.offers import offer_texts
from ml.progress import Progress
from ml.serving.cascade import blended, deep_labels, placed_logs, places_in
from ml.serving.fast_model import FastModel

_NEEDED = ("teacher", "student", "fast")
_RESAMPLES = 200
_FEW = 200

_progress = Progress("averaging")


class Judged(msgspec.Struct, frozen=True):
    """An average of two models with every share, on some offers."""

    right: NDArray[np.bool_]
    """(shares, offers)."""
    brier: NDArray[np.float64]
    """(shares, offers)."""
    log_loss: NDArray[np.float64]
    """(shares, offers)."""

    def drawn(self, rows: NDArray[np.int64]) -> Judged:
        """The same on these offers."""
        return Judged(self.right[:, rows], self.brier[:, rows], self.log_loss[:, rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge and report."""
    options = _parser().parse_args(arguments)
    with report.refused_plainly():
        rows = [row for folder in options.models for row in _rows(folder)]
    print()
    report.show([_columns(row) for row in rows])
    report.save(f"averaging_{options.name}", {"shares": SHARES, "pairs": rows})
    for pair in dict.fromkeys(row["pair"] for row in rows):
        path = report.RESULTS / f"averaging_{options.name}_{pair.split()[0]}.png"
        _draw([row for row in rows if row["pair"] == pair], path)
        print(f"drawn in {path}")


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What another share of one pair costs on every feed."""
    curves(
        {
            row["feed"]: [
                (100 * share, 100 * (max(row["held_out_right"]) - right))
                for share, right in zip(SHARES, row["held_out_right"], strict=True)
            ]
            for row in rows
        },
        path,
        title=f"{rows[0]['pair']}, averaged",
        x_label="share of the second, %",
        y_label="held-out offers right, points below the best share",
        logarithmic=False,
    )


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Both pairs of one finished run.

    Raises:
        InputError: the run has not all models.
    """
    places = read_models(folder)
    if missing := [name for name in _NEEDED if name not in places["models"]]:
        raise InputError(f"{folder} has no {missing[0]}: run benchmarks.quality without --only")
    validation = validation_offers(Path(places["training_sample"]))
    table = pq.read_table(Path(places["evaluation_set"]) / "offers.parquet")
    texts, categories = offer_texts(table), table["category_id"].to_pylist()
    models = {name: Path(places["models"][name]) for name in _NEEDED}
    for pair, labels, logs in (_teacher(models), _served(models)):
        _progress.say(f"{folder.name}: {pair}")
        parts, of_held_out = logs(validation.texts), logs(texts)
        yield {
            "feed": folder.name,
            "pair": pair,
            "validation_offers": len(validation.texts),
            "held_out_offers": len(texts),
            **compared(
                *parts,
                targets_of(labels, validation.category_ids),
                *of_held_out,
                targets_of(labels, categories),
            ),
        }


_Logs = Callable[[list[str]], tuple[NDArray[np.floating], NDArray[np.floating]]]


def _teacher(models: dict[str, Path]) -> tuple[str, list[str], _Logs]:
    teacher = Teacher.load(models["teacher"])
    linear = teacher.linear
    if linear is None:
        raise InputError(f"{models['teacher']} has no linear model to average with")

    def logs(texts: list[str]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        return teacher.encoder.predict_logits(texts), linear_logits(linear, teacher.labels, texts)

    return "encoder and linear model", list(teacher.labels), logs


def _served(models: dict[str, Path]) -> tuple[str, list[str], _Logs]:
    student, fast = Classifier.load(models["student"]), FastModel.load(models["fast"])
    labels = deep_labels(fast.labels, student.labels)

    def placed(model: Classifier | FastModel, texts: list[str]) -> NDArray[np.floating]:
        return placed_logs(model.predict_probabilities(texts), places_in(model.labels, labels), len(labels))

    return "student and fast model", labels, lambda texts: (placed(student, texts), placed(fast, texts))


def compared(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    targets: NDArray[np.int64],
    held_out_first: NDArray[np.floating],
    held_out_second: NDArray[np.floating],
    held_out_targets: NDArray[np.int64],
) -> dict[str, Any]:
    """What every rule chooses for the second of two models, and the share of held-out offers that are right.

    Args:
        first: Logits of validation offers, (offers, classes).
        second: Of the other model, likewise; both are calibrated before they are averaged.
        targets: Their classes, (offers,); -1 for one that no model knows.
        held_out_first: As ``first``, of held-out offers.
        held_out_second: As ``second``, of held-out offers.
        held_out_targets: Their classes.

    Returns:
        ``held_out_right`` (per share), and per rule its ``share``, what is ``right`` with it, and the means
        of what is right over resamples.
    """
    temperatures = [np.float32(fit_temperature(logits, targets)) for logits in (first, second)]
    one, other = first / temperatures[0], second / temperatures[1]
    judged = _judged(one, other, targets)
    averages = (held_out_first / temperatures[0], held_out_second / temperatures[1])
    right = np.array(
        [
            (blended(averages[1], averages[0], share).argmax(axis=1) == held_out_targets).mean()
            for share in SHARES
        ]
    )
    rng = np.random.default_rng(0)
    every, few = (
        [rng.integers(len(targets), size=number) for _ in range(_RESAMPLES)]
        for number in (len(targets), min(_FEW, len(targets)))
    )
    return {
        "held_out_right": [round(float(value), 4) for value in right],
        "rules": {
            name: {
                "share": SHARES[rule(judged)],
                "right": round(float(right[rule(judged)]), 4),
                "mean_right": round(float(np.mean([right[rule(judged.drawn(rows))] for rows in every])), 4),
                "mean_right_of_few": round(
                    float(np.mean([right[rule(judged.drawn(rows))] for rows in few])), 4
                ),
            }
            for name, rule in RULES.items()
        },
    }


def _judged(one: NDArray[np.floating], other: NDArray[np.floating], targets: NDArray[np.int64]) -> Judged:
    known = targets >= 0
    right, brier, log_loss = [], [], []
    for share in SHARES:
        logits = blended(other[known], one[known], share)
        at_best = logits / np.float32(fit_temperature(logits, targets[known]))
        of_truth = np.arange(len(at_best)), targets[known]
        probabilities = softmax(at_best)
        right.append(logits.argmax(axis=1) == targets[known])
        brier.append(1 - 2 * probabilities[of_truth] + np.square(probabilities).sum(axis=1))
        log_loss.append(-log_softmax(at_best)[of_truth])
    return Judged(np.array(right), np.array(brier, np.float64), np.array(log_loss, np.float64))


RULES: dict[str, Callable[[Judged], int]] = {
    "equal unless clear": lambda judged: SHARES.index(clearly_best(judged.right)),
    "most right": lambda judged: int(judged.right.mean(axis=1).argmax()),
    "Brier": lambda judged: int(judged.brier.mean(axis=1).argmin()),
    "likelihood": lambda judged: int(judged.log_loss.mean(axis=1).argmin()),
}


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    alone = {"first alone": row["held_out_right"][0], "second alone": row["held_out_right"][-1]}
    chosen = {
        name: "{right:.4f} at {share} ({mean_right:.4f}, {mean_right_of_few:.4f})".format(**rule)
        for name, rule in row["rules"].items()
    }
    return {
        "averaged": f"{row['feed']}: {row['pair']}",
        "validation offers": row["validation_offers"],
        **alone,
        **chosen,
        "best share": max(row["held_out_right"]),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the result: benchmarks/results/averaging_NAME.json")
    parser.add_argument(
        "--models", required=True, type=Path, nargs="+", help="work folders of benchmarks.quality"
    )
    return parser


if __name__ == "__main__":
    main()
