"""Quality on unchanged, changed and new categories where the truth is known: the demo feed, before and after.

    OFFER_ASSETS_HOME=… python -m benchmarks.new_categories

For a home in which the demo feed's second taxonomy was followed. Days that no model has seen are labelled in
the second version by the feed itself; the newest model of each taxonomy answers them. An answer of the older
model that is no category any more counts as the category its offers most likely belong to.
"""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np

from benchmarks.report import save, show
from ml.artifacts import read_manifest
from ml.demo.feed import DemoFeed
from ml.evaluation.metrics import scores
from ml.serving.predictor import Predictor
from ml.taxonomy_change.change import changed_categories
from ml.taxonomy_change.transitions import Transitions, most_likely_moves
from resources.artifact_store import ArtifactStore
from resources.environment import resources_for
from resources.settings import Settings

_UNSEEN_DAYS = [datetime.date(2027, 3, 1) + datetime.timedelta(days=number) for number in range(20)]


def main() -> None:
    """Measure and report."""
    settings = Settings.from_environment()
    resources = resources_for(settings)
    store: ArtifactStore = resources["artifact_store"]
    change = store.fetch(store.read_pointer("taxonomy_change"))
    groups, transitions = changed_categories(change), Transitions.read(change)
    feed = DemoFeed(seed=settings.demo_seed, offers_per_day=settings.demo_offers_per_day, taxonomy_version=2)
    chunks = [chunk for day in _UNSEEN_DAYS for chunk in feed.chunks(day)]
    offers = [row for chunk in chunks for row in chunk.to_pylist() if row["category_id"]]
    truth = np.array([offer["category_id"] for offer in offers])
    group = np.array([groups.get(category, "unchanged") for category in truth])
    rows = []
    for name, folder in _models(resources, transitions).items():
        moves = most_likely_moves(transitions.for_labels_of(_taxonomy(store, folder)).values())
        answers = [prediction.category_id or "" for prediction in Predictor.load(folder).predict(offers)]
        predicted = np.array([moves.get(answer, answer) for answer in answers])
        rows.append({"model": name, **_by_group(truth, predicted, group)})
    show(rows)
    save(
        "new_categories",
        {"offers": len(offers), "offers_per_day": settings.demo_offers_per_day, "rows": rows},
    )


def _models(resources: dict[str, Any], transitions: Transitions) -> dict[str, Any]:
    """Folder of the newest registered model of the taxonomy before, and of the one in force."""
    store, found = resources["artifact_store"], dict[str, Any]()
    for version in resources["tracking"].versions():
        folder = store.fetch(version.ref)
        is_current = _taxonomy(store, folder) == transitions.history[-1]
        found.setdefault("after" if is_current else "before, mapped", folder)
    return found


def _taxonomy(store: ArtifactStore, folder: Any) -> str:
    return read_manifest(folder).inputs["catalog_taxonomy"]


def _by_group(truth: np.ndarray, predicted: np.ndarray, group: np.ndarray) -> dict[str, Any]:
    figures: dict[str, Any] = {"accuracy": scores(truth, predicted).accuracy}
    for name in ("unchanged", "changed", "new"):
        inside = group == name
        figures |= {
            f"{name}_offers": int(inside.sum()),
            name: scores(truth[inside], predicted[inside]).accuracy,
        }
    return figures


if __name__ == "__main__":
    main()
