"""Categories that nobody has labelled an offer of: how often the teacher finds them by name and path alone.

    python -m benchmarks.cold_start --offers FEED --taxonomy TAXONOMY.csv

Hides the labels of some categories from training, drawn by hash, and trains the teacher without and with
``cold_categories``: then every leaf of the taxonomy can be an answer, at each stated ``cold_loss``. Held-out
offers of the hidden categories say whether they are found (their own category, it among the five likeliest,
and their parent), those of all others what it costs them. "Among the hidden" leaves the model no other
choice: how well names tell these apart.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.labelled_offers import divide, read_labelled_offers
from benchmarks.our_models import Workshop
from benchmarks.report import save, show
from ml.learning.ensemble import Teacher
from ml.offers import offer_texts
from ml.taxonomy import Taxonomy

_FIRST = 5


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offers", required=True, type=Path, help="labelled feed, Parquet or CSV")
    parser.add_argument("--taxonomy", required=True, type=Path, help="its catalog taxonomy")
    parser.add_argument("--hidden", default=30, type=int, help="categories without a label")
    parser.add_argument("--train", default=3_000, type=int, help="labelled offers to learn from, at most")
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("--losses", default=[0.02, 0.05], type=float, nargs="+", help="values of cold_loss")
    parser.add_argument("--seed", default=17, type=int)
    options = parser.parse_args()
    divided = divide(read_labelled_offers(options.offers).table, "shop", 0.25, options.seed)
    hidden = _hidden(divided.test, options.hidden, options.seed)
    known = divided.train.filter(pa.array(~np.isin(_categories(divided.train), hidden)))
    known = known.take(np.random.default_rng(options.seed).permutation(len(known))[: options.train])
    with tempfile.TemporaryDirectory() as home:
        rows = [
            _measured(Path(home), options, known, divided.test, hidden, loss)
            for loss in (None, *options.losses)
        ]
    show(rows)
    save(
        "cold_start",
        {
            "feed": options.offers.name,
            "training_offers": known.num_rows,
            "epochs": options.epochs,
            "hidden_categories": len(hidden),
            "models": rows,
        },
    )


def _measured(
    home: Path,
    options: argparse.Namespace,
    known: pa.Table,
    test: pa.Table,
    hidden: np.ndarray,
    loss: float | None,
) -> dict[str, Any]:
    changes: dict[str, Any] = {"epochs": options.epochs, "max_tokens": 32}
    if loss is not None:
        changes |= {"cold_categories": True, "cold_loss": loss}
    workshop = Workshop(home, {"teacher_checkpoint": changes})
    taxonomy = workshop.taxonomy(options.taxonomy)
    sample = workshop.training_sample(known, "shop", 0.1, options.seed)
    *_, (_, folder) = workshop.train(
        {"catalog_taxonomy": taxonomy, "training_sample": sample}, "teacher_checkpoint"
    )
    teacher, tree = Teacher.load(folder), Taxonomy.load(taxonomy)
    labels, truth = np.array(teacher.labels), _categories(test)
    probabilities = teacher.predict_probabilities(offer_texts(test))
    answers = labels[probabilities.argmax(axis=1)]
    learned = np.isin(truth, pq.read_table(sample / "labelled.parquet")["category_id"].to_pylist())
    of_hidden = np.isin(truth, hidden)
    first_five = labels[np.argsort(-probabilities[of_hidden], axis=1)[:, :_FIRST]]

    def parent(category: str) -> str:
        return tree.parent(category) or category

    same_parent = np.array([parent(a) == parent(b) for a, b in zip(answers, truth, strict=True)])
    row: dict[str, Any] = {
        "model": "without" if loss is None else f"with cold categories, loss {loss:g}",
        "answers": len(labels),
        "known categories": float((answers == truth)[learned].mean()),
        "hidden": float((answers == truth)[of_hidden].mean()),
        "hidden, in the first five": float((first_five == truth[of_hidden, None]).any(axis=1).mean()),
        "hidden, parent right": float(same_parent[of_hidden].mean()),
        "offers of hidden": int(of_hidden.sum()),
        "among the hidden": None,
    }
    if loss is not None:
        places = np.flatnonzero(np.isin(labels, hidden))
        among = labels[places][probabilities[np.ix_(of_hidden, places)].argmax(axis=1)]
        row["among the hidden"] = float((among == truth[of_hidden]).mean())
    return row


def _hidden(test: pa.Table, count: int, seed: int) -> np.ndarray:
    """Categories that have held-out offers, (count,)."""
    names = np.unique(_categories(test))
    return np.sort(np.random.default_rng(seed).permutation(names)[:count])


def _categories(offers: pa.Table) -> np.ndarray:
    return np.array(offers["category_id"].to_pylist(), dtype=str)


if __name__ == "__main__":
    main()
