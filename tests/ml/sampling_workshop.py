"""The two sampling stages over days of offers, with all they need beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.artifacts import MANIFEST, Manifest
from ml.offers import CLEAN_SCHEMA
from ml.progress import Progress
from ml.runner import StageContext
from ml.sampling.stages import write_evaluation_set, write_training_sample
from ml.stages import EvaluationSetParameters, TrainingSampleParameters
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.transitions import Transition, Transitions

CATEGORIES = ["a", "b", "c", "d"]
LABELS = pa.schema(
    [
        *[(name, pa.string()) for name in ("offer_id", "delivered_on", "labelled_as", "category_id")],
        ("decision", pa.string()),
        ("confidence", pa.float64()),
    ]
)
WEAK_LABELS = pa.schema(
    [
        *[(name, pa.string()) for name in ("offer_id", "delivered_on", "category_id")],
        ("confidence", pa.float64()),
        ("similarity", pa.float64()),
    ]
)


def describe(folder: Path, digest: str = "", **inputs: str) -> None:
    """Put a manifest into ``folder`` that gives it this digest and says what it was made of."""
    manifest = Manifest(
        kind="",
        key="",
        digest=digest,
        inputs=inputs,
        code_version="",
        code_revision=None,
        parameters={},
        metrics={},
        files={},
        created_at="",
        seconds=0.0,
    )
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


class Workshop:
    """Runs the two stages over days of offers, in a folder of its own. The taxonomy's digests are v1, v2 …"""

    def __init__(self, folder: Path, categories: Iterable[str] = CATEGORIES) -> None:
        self.folder = folder
        self.runs = 0
        self.taxonomy = folder / "taxonomy"
        self.taxonomy.mkdir(parents=True)
        self.history: list[str] = []
        self.transitions: list[Transition] = []
        self.next_version(categories)

    def set_taxonomy(self, categories: Iterable[str]) -> None:
        """Other categories, and nothing says so."""
        Taxonomy([Category(name, None, name) for name in categories]).write(
            self.taxonomy / "taxonomy.parquet"
        )

    def next_version(self, categories: Iterable[str], *transitions: Transition) -> None:
        """The taxonomy changes; ``transitions`` are all that hold from now on."""
        self.set_taxonomy(categories)
        self.history, self.transitions = [*self.history, f"v{len(self.history) + 1}"], list(transitions)
        describe(self.taxonomy, self.history[-1])

    def context(
        self,
        days: Mapping[str, list[dict[str, Any]]],
        labels: Iterable[dict[str, Any]] = (),
        weak: Iterable[dict[str, Any]] = (),
        **inputs: Path,
    ) -> StageContext:
        """What a stage gets: offers by day, what became of their labels, and weak labels."""
        self.runs += 1
        place = self.folder / f"run{self.runs}"
        for name in ("migrated_labels", "taxonomy_change"):
            (place / name).mkdir(parents=True)
            describe(place / name, catalog_taxonomy=self.history[-1])
        pq.write_table(
            pa.Table.from_pylist(list(labels), LABELS), place / "migrated_labels" / "labels.parquet"
        )
        pq.write_table(
            pa.Table.from_pylist(list(weak), WEAK_LABELS), place / "migrated_labels" / "weak_labels.parquet"
        )
        Transitions(history=self.history, transitions=self.transitions).write(place / "taxonomy_change")
        folders = {
            "catalog_taxonomy": self.taxonomy,
            **{name: place / name for name in ("migrated_labels", "taxonomy_change")},
            **inputs,
        }
        for day, offers in days.items():
            folders[f"offers/{day}"] = place / day
            (place / day).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(offers, CLEAN_SCHEMA), place / day / "offers.parquet")
        for name in ("output", "checkpoints"):
            (place / name).mkdir(parents=True)
        return StageContext(folders, place / "output", place / "checkpoints", Progress("test"))

    def evaluation_set(
        self,
        days: Mapping[str, list[dict[str, Any]]],
        previous: Path | None = None,
        labels: Iterable[dict[str, Any]] = (),
        **parameters: Any,
    ) -> tuple[Path, dict[str, Any]]:
        """Folder and metrics of an evaluation set."""
        context = self.context(days, labels, **({"previous": previous} if previous else {}))
        metrics = write_evaluation_set(context, EvaluationSetParameters(**parameters))
        describe(context.output, catalog_taxonomy=self.history[-1])
        return context.output, metrics

    def training_sample(
        self,
        days: Mapping[str, list[dict[str, Any]]],
        evaluation_set: Path,
        labels: Iterable[dict[str, Any]] = (),
        weak: Iterable[dict[str, Any]] = (),
        **parameters: Any,
    ) -> tuple[Path, dict[str, Any]]:
        """Folder and metrics of a training sample."""
        context = self.context(days, labels, weak, evaluation_set=evaluation_set)
        metrics = write_training_sample(context, TrainingSampleParameters(**parameters))
        return context.output, metrics
