"""A warm start: training goes on from an earlier model whose taxonomy had other categories.

The encoder is taken as it is. A category that is what it was keeps its row of the output layer. Every
other row is made anew: it points half to where the rows of its predecessors point, if it has any, and
half to its own texts, and lies where a typical offer finds it as unlikely as any other category. A
category that gave up a part of itself is its own predecessor.

Measured before the first step (2,000 GS1 GPC offers, 8 categories new, 15 former ones split or merged in
pairs; accuracy on all, and on categories that did not change, which was 0.793): 0.741 and 0.773. With
copied and averaged rows of the predecessors: 0.692 and 0.780. With new rows at the centroids of their
texts, as in a fresh output layer, 0.572 and 0.605: they take offers from all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ml.artifacts import read_manifest
from ml.errors import InputError
from ml.learning.calibration import targets_of
from ml.learning.encoder import INITIAL_SCALE, Classifier
from ml.runner import StageContext
from ml.stages import StudentParameters, TeacherParameters
from ml.taxonomy_change.transitions import Transition, Transitions

Sources = list[tuple[int, float]]
"""Rows of the earlier output layer that a row is made of, with weights that add up to 1."""


@dataclass
class WarmStart:
    """An earlier model under the new labels; its output layer is set by :meth:`initialise_head`."""

    model: Classifier
    """In use by nobody else; of temperature 1."""
    sources: list[Sources]
    """Of each new label."""
    kept: NDArray[np.bool_]
    """Which of the new labels the earlier model knew as what they are."""
    earlier_weight: NDArray[np.float32]
    """(earlier classes, hidden), calibrated: divided by the earlier model's temperature."""
    earlier_bias: NDArray[np.float32]
    """(earlier classes,), calibrated as well."""

    @classmethod
    def of(
        cls, earlier: Classifier, labels: Sequence[str], transitions: Mapping[str, Transition]
    ) -> WarmStart:
        """Take ``earlier`` over, in place.

        Args:
            earlier: The earlier model.
            labels: Category ids of the new model, in the order of the output.
            transitions: By former id, since the earlier model's taxonomy.
        """
        unchanged, temperature = set(earlier.labels) - set(transitions), earlier.settings.temperature
        head = nn.Linear(earlier.head.in_features, len(labels), device=earlier.device)
        return cls(
            sources=row_sources(earlier.labels, labels, transitions),
            kept=np.array([label in unchanged for label in labels]),
            earlier_weight=earlier.head.weight.detach().cpu().numpy() / np.float32(temperature),
            earlier_bias=earlier.head.bias.detach().cpu().numpy() / np.float32(temperature),
            model=earlier.with_head(head, labels).with_settings(temperature=1.0),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Labels that keep their row, that have predecessors, and that have none."""
        kept, new = int(self.kept.sum()), sum(not sources for sources in self.sources)
        return {"rows_kept": kept, "rows_merged": len(self.sources) - kept - new, "rows_new": new}

    def initialise_head(
        self, texts: Sequence[str], categories: Sequence[str], category_names: Sequence[str]
    ) -> None:
        """Set the rows of the output layer.

        Directions are seen from the mean of the earlier rows, and from the mean of all texts. A row that is
        made anew is as long as the earlier rows typically are, and its bias makes its logit for the mean
        text the median of theirs.

        Args:
            texts: Offer texts, (n,).
            categories: Category id of each text, (n,); all among the labels.
            category_names: Name or path of each label, (classes,); each counts as one more text.
        """
        weight = np.zeros((len(self.sources), self.earlier_weight.shape[1]), dtype=np.float32)
        bias = np.zeros(len(self.sources), dtype=np.float32)
        for number, sources in enumerate(self.sources):
            for row, share in sources:
                weight[number] += np.float32(share) * self.earlier_weight[row]
                bias[number] += np.float32(share) * self.earlier_bias[row]
        if not self.kept.all():
            anew = ~self.kept
            embeddings = self.model.predict_embeddings(texts)
            mean_text = embeddings.mean(axis=0)
            sums = self.model.category_sums(embeddings, categories, category_names)
            texts_of = 1 + np.bincount(targets_of(self.model.labels, categories), minlength=len(sums))
            to_texts = _of_length_one((sums / texts_of[:, None])[anew] - mean_text)
            middle = self.earlier_weight.mean(axis=0)
            has_sources = np.array([bool(sources) for sources in self.sources])[anew, None]
            to_predecessors = _of_length_one((weight[anew] - middle) * has_sources)
            length = np.median(np.linalg.norm(self.earlier_weight - middle, axis=1)) or INITIAL_SCALE
            level = np.median(self.earlier_weight @ mean_text + self.earlier_bias)
            weight[anew] = middle + length * _of_length_one(to_texts + to_predecessors)
            bias[anew] = level - weight[anew] @ mean_text
        head = self.model.head
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(weight))
            head.bias.copy_(torch.from_numpy(bias))


def warm_start(
    context: StageContext,
    kind: str,
    parameters: TeacherParameters | StudentParameters,
    instruction: str,
    labels: Sequence[str],
) -> WarmStart | None:
    """The model to go on from, if the stage was given one.

    The encoder, its number of layers and the instruction have to be what they were; ``max_tokens`` may
    change.

    Args:
        context: With the inputs ``warm_start`` and ``taxonomy_change``, or neither.
        kind: Of artifact that ``warm_start`` has to be.
        parameters: Of the stage.
        instruction: What the new model puts before every text.
        labels: Category ids of the new model, in the order of the output.

    Raises:
        InputError: only one of the two inputs was given, or the earlier model does not fit.
    """
    folder, change = context.optional_input("warm_start"), context.optional_input("taxonomy_change")
    if folder is None and change is None:
        return None
    if folder is None or change is None:
        missing = "warm_start" if folder is None else "taxonomy_change"
        raise InputError(
            f"{kind} lacks the input {missing}: warm_start and taxonomy_change are given together, or neither"
        )
    earlier = Classifier.load(folder)
    _check_fits(folder, kind, earlier, parameters, instruction)
    known = Transitions.read(change)
    version = known.digest_of(earlier.taxonomy_version)
    started = WarmStart.of(earlier, labels, known.for_labels_of(version))
    counts = started.counts
    context.progress.say(
        f"going on from {folder.name}: of {len(labels):,} categories {counts['rows_kept']:,} keep their row, "
        f"{counts['rows_merged']:,} have predecessors, {counts['rows_new']:,} are new"
    )
    return started


def warm_start_metrics(started: WarmStart | None, labels: Sequence[str]) -> dict[str, bool | int]:
    """What both training stages report of how they started."""
    if started is None:
        return {"warm_start": False, "rows_kept": 0, "rows_merged": 0, "rows_new": len(labels)}
    return {"warm_start": True, **started.counts}


def row_sources(
    earlier_labels: Sequence[str], labels: Sequence[str], transitions: Mapping[str, Transition]
) -> list[Sources]:
    """Which rows of the earlier output layer each label's row is made of.

    Args:
        earlier_labels: Category ids of the earlier model, in the order of its output.
        labels: Category ids of the new model.
        transitions: By former id, since the earlier model's taxonomy.

    Returns:
        Per label: its own earlier row, if the category is what it was; else those of its predecessors,
        weighted by the share of their offers that goes to it; else none.
    """
    row_of = {label: row for row, label in enumerate(earlier_labels)}
    predecessors: dict[str, Sources] = {}
    for former, transition in transitions.items():
        for successor in transition.to:
            if former in row_of and successor.share > 0:
                predecessors.setdefault(successor.category_id, []).append((row_of[former], successor.share))
    sources: list[Sources] = []
    for label in labels:
        if label in row_of and label not in transitions:
            sources.append([(row_of[label], 1.0)])
            continue
        former_rows = sorted(predecessors.get(label, []))
        total = sum(share for _, share in former_rows)
        sources.append([(row, share / total) for row, share in former_rows])
    return sources


def _of_length_one(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows divided by their length; a row of zeros stays one."""
    result: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
    return result


def _check_fits(
    folder: Path,
    kind: str,
    earlier: Classifier,
    parameters: TeacherParameters | StudentParameters,
    instruction: str,
) -> None:
    """Refuse an earlier model that these parameters would not have led to."""
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise InputError(f"warm_start {folder} is a {manifest.kind}, expected a {kind}")
    choice = parameters.encoder
    before, digest_before = (str(manifest.parameters.get(name, "")) for name in ("encoder", "encoder_digest"))
    both_known = bool(digest_before and parameters.encoder_digest)
    differs = digest_before != parameters.encoder_digest if both_known else before != choice
    differences = [f"encoder {choice!r} instead of {before!r}"] if differs else []
    if earlier.settings.instruction != instruction:
        differences.append(f"instruction {instruction!r} instead of {earlier.settings.instruction!r}")
    layers = int(earlier.encoder.config.num_hidden_layers)
    if isinstance(parameters, StudentParameters) and parameters.layers != layers:
        differences.append(f"{parameters.layers} layers instead of {layers}")
    pooling = earlier.settings.pooling
    if isinstance(parameters, StudentParameters) and parameters.pooling != pooling:
        differences.append(f"pooling {parameters.pooling} instead of {pooling}")
    if differences:
        raise InputError(
            f"warm_start {folder} was trained otherwise: now {', '.join(differences)}; retrain fully "
            "(without warm_start), or set what it was trained with"
        )
    earlier.check_max_tokens(parameters.max_tokens)
