"""The graph on a real labelled feed, beside linear models trained on the very same rows.

    python -m benchmarks.real_offers --offers FEED --taxonomy TAXONOMY.csv [--split-by shop]

Runs the headless graph on the feed in a home of its own (its training rows and evaluation set are
then fixed), trains scikit-learn's LinearSVC on the same training rows, and scores everything on the
same evaluation set: weighted F1 at every level, their mean, and macro F1 at the leaf.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.svm import LinearSVC

from benchmarks.report import save, show
from ml.evaluation.metrics import scores, scores_by_level
from ml.taxonomy import Taxonomy
from resources.artifact_store import ArtifactStore
from resources.environment import resources_for
from resources.settings import Settings


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offers", required=True, type=Path, help="feed with labelled offers")
    parser.add_argument("--taxonomy", required=True, type=Path, help="its catalog taxonomy")
    parser.add_argument("--split-by", default="shop", choices=("shop", "product"))
    parser.add_argument("--name", default="real_offers", help="name of the result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        seconds = _run_graph(options, home)
        settings = Settings(
            home=home, offer_feed=str(options.offers.absolute()), catalog_taxonomy=str(options.taxonomy)
        )
        figures = _compare(resources_for(settings)["artifact_store"])
    show(figures["models"])
    save(
        options.name,
        {"feed": options.offers.name, "split_by": options.split_by, "seconds": seconds, **figures},
    )


def _run_graph(options: argparse.Namespace, home: str) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "OFFER_FEED": str(options.offers.absolute()),
        "CATALOG_TAXONOMY": str(options.taxonomy),
        "OFFER_ASSETS_HOME": home,
        "OFFER_ASSETS_SPLIT_BY": options.split_by,
        "OFFER_ASSETS_ENDPOINT_PORT": str(port),
    }
    started_at = time.perf_counter()
    try:
        subprocess.run([sys.executable, "-m", "offer_assets", "demo"], env=environment, check=True)
    finally:
        subprocess.run([sys.executable, "-m", "offer_assets", "stop"], env=environment, check=False)
    return time.perf_counter() - started_at


def _compare(store: ArtifactStore) -> dict[str, Any]:
    def folder(asset: str) -> Path:
        ref = store.read_pointer(asset)
        assert ref is not None, asset
        return store.fetch(ref)

    taxonomy = Taxonomy.load(folder("catalog_taxonomy"))
    train = pq.read_table(folder("training_sample") / "labelled.parquet")
    train = train.filter(pc.equal(train["split"], "train"))
    test = pq.read_table(folder("evaluation_set") / "offers.parquet")
    truth = np.array(test["category_id"].to_pylist())
    evaluation = msgspec.json.decode((folder("student_evaluation") / "manifest.json").read_bytes())["metrics"]
    models = [
        {
            "model": name,
            **{
                f"level_{n}": evaluation[f"{name}_weighted_f1_level_{n}"]
                for n in range(1, taxonomy.levels + 1)
            },
            "mean": evaluation[f"{name}_mean_weighted_f1"],
            "macro": evaluation[f"{name}_macro_f1"],
        }
        for name in ("teacher", "student", "fast")
    ]
    margins = {}
    for name, column in (("LinearSVC, title", "title"), ("LinearSVC, all fields", "text")):
        classes, margins[name] = _linear(train, test, column)
        models.append({"model": name, **_scored(taxonomy, truth, classes[margins[name].argmax(axis=1)])})
    averaged = sum(margins.values())
    models.append({"model": "the two averaged", **_scored(taxonomy, truth, classes[averaged.argmax(axis=1)])})
    return {"training_offers": train.num_rows, "evaluation_offers": test.num_rows, "models": models}


def _linear(train: pa.Table, test: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A linear support vector machine in its usual form; its classes and margins (offers, classes)."""
    model = make_pipeline(
        FeatureUnion(
            [
                ("words", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)),
                ("characters", TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)),
            ]
        ),
        LinearSVC(),
    )
    model.fit(train[column].to_pylist(), train["category_id"].to_pylist())
    return model.classes_, model.decision_function(test[column].to_pylist())


def _scored(taxonomy: Taxonomy, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    levels = [
        level.weighted_f1
        for level in scores_by_level(truth, predicted, taxonomy.ancestor_at, taxonomy.levels)
    ]
    return {
        **{f"level_{number}": value for number, value in enumerate(levels, 1)},
        "mean": float(np.mean(levels)),
        "macro": scores(truth, predicted).macro_f1,
    }


if __name__ == "__main__":
    main()
