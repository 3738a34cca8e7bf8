"""Stage ``teacher_checkpoint``: fine-tune a pretrained encoder on the labelled offers.

The loss is cross-entropy over the categories, plus a smaller cross-entropy at every level above:
the probability of an ancestor is the sum over the categories below it. So a near miss costs less
than a far one, and one softmax serves all levels. A label that a model guessed counts by its confidence.
"""

from __future__ import annotations

import shutil
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ml.artifacts import read_manifest, short_version
from ml.learning.calibration import fit_temperature, targets_of, validation_figures
from ml.learning.devices import best_device, use_available_cores
from ml.learning.encoder import Classifier, ClassifierSettings
from ml.learning.training import TrainingArguments, learning_curve_json, train, training_metrics
from ml.learning.training_data import read_labelled
from ml.learning.warm_start import warm_start, warm_start_metrics
from ml.offers import TEXT_VERSION
from ml.runner import StageContext
from ml.stages import TeacherParameters
from ml.taxonomy import Taxonomy


def train_teacher(context: StageContext, parameters: TeacherParameters) -> dict[str, Any]:
    """Read the sample, train, calibrate, write the classifier folder; returns its metrics.

    Of several processes that share the work, only the first writes.

    Raises:
        InputError: the encoder cannot be had, or the sample has no training or validation offers.
    """
    use_available_cores()
    taxonomy_folder = context.input("catalog_taxonomy")
    taxonomy = Taxonomy.load(taxonomy_folder)
    training = read_labelled(context.input("training_sample"), "train")
    validation = read_labelled(context.input("training_sample"), "validation")
    labels = sorted(set(training.categories))
    settings = ClassifierSettings(
        text_version=TEXT_VERSION,
        taxonomy_version=short_version(read_manifest(taxonomy_folder).digest),
        max_tokens=parameters.max_tokens,
        instruction=parameters.instruction,
    )
    started = warm_start(context, "teacher_checkpoint", parameters, parameters.instruction, labels)
    model = (
        started.model.with_settings(**msgspec.structs.asdict(settings))
        if started
        else Classifier.from_encoder(
            parameters.encoder, labels, settings, digest=parameters.encoder_digest
        ).to(best_device())
    )
    context.progress.say(
        f"{model.parameter_count / 1e6:.1f} M parameters, {len(training.texts):,} offers to learn from, "
        f"{len(validation.texts):,} to validate on, {len(labels):,} categories"
    )
    hierarchy = HierarchicalLoss(taxonomy, labels, parameters.ancestor_loss, model.device)
    targets = torch.from_numpy(targets_of(labels, training.categories)).to(model.device)
    weights = torch.from_numpy(training.weights).float().to(model.device)

    def batch_loss(logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
        index = torch.from_numpy(rows)
        return hierarchy(logits, targets[index], weights[index])

    def initialise() -> None:
        context.progress.say("initialising the output layer")
        names = [taxonomy.path(label) for label in labels]
        (started or model).initialise_head(training.texts, training.categories, names)

    texts = model.tokenize(training.texts)
    state = train(
        model,
        texts,
        batch_loss=batch_loss,
        validate=lambda: validation_figures(
            model.predict_logits(validation.texts), labels, validation.categories
        ),
        initialise=initialise,
        plan=TrainingArguments.of(parameters),
        checkpoints=context.checkpoints,
        progress=context.progress,
    )
    logits = model.predict_logits(validation.texts)
    temperature = fit_temperature(logits, targets_of(labels, validation.categories))
    figures = validation_figures(logits / temperature, labels, validation.categories)
    if not context.is_first:
        return {}
    model.with_settings(temperature=temperature).save(context.output)
    (context.output / "learning_curve.json").write_bytes(learning_curve_json(state))
    shutil.copyfile(taxonomy_folder / "taxonomy.parquet", context.output / "taxonomy.parquet")
    return {
        **training_metrics(model, state, texts, parameters.epochs),
        **warm_start_metrics(started, labels),
        **{f"validation_{name}": round(value, 6) for name, value in figures.items()},
        "validation_rows": len(validation.texts),
        "temperature": round(temperature, 4),
        "size_bytes": sum(path.stat().st_size for path in context.output.rglob("*") if path.is_file()),
    }


class HierarchicalLoss:
    """Cross-entropy at the category, plus a weighted one at every level above it.

    A label may itself have children that are labels: its probability then counts for its own subtree
    like theirs does, and rows of it have no loss below its own level.
    """

    def __init__(
        self, taxonomy: Taxonomy, labels: list[str], ancestor_weight: float, device: torch.device
    ) -> None:
        self._ancestor_weight = ancestor_weight
        self._groupings = [
            torch.from_numpy(grouping).to(device) for grouping in ancestor_groups(taxonomy, labels)
        ]
        self._level = torch.tensor([taxonomy.level(label) for label in labels], device=device)

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Mean over the rows of their ``weights`` (rows,) times their losses.

        Args:
            logits: Shape (rows, classes).
            targets: Class numbers, (rows,).
            weights: What each row counts, (rows,).
        """
        log_probabilities = functional.log_softmax(logits, dim=1)
        # Logarithms are weighed, not losses: so torch adds up rows of weight 1 as if there were no weights.
        loss = functional.nll_loss(log_probabilities * weights[:, None], targets)
        if not self._ancestor_weight:
            return loss
        for level, group_of_class in enumerate(self._groupings, start=1):
            below = self._level[targets] > level
            in_group = group_of_class[None, :] == group_of_class[targets[below], None]
            kept = log_probabilities[below].masked_fill(~in_group, -torch.inf)
            of_ancestors = torch.logsumexp(kept, dim=1) * weights[below]
            loss = loss - self._ancestor_weight * of_ancestors.sum() / len(targets)
        return loss


def ancestor_groups(taxonomy: Taxonomy, labels: list[str]) -> list[NDArray[np.int64]]:
    """Which labels belong together at each level above the deepest label.

    Returns:
        Arrays (classes,), one per level from the root down: the number of the label's ancestor (or
        of the label itself) at that level, -1 where the label lies above the level.
    """
    paths = [taxonomy.ancestors(label) for label in labels]
    groupings = []
    for level in range(1, max(len(path) for path in paths)):
        nodes = [path[level - 1] if len(path) >= level else None for path in paths]
        number = {node: index for index, node in enumerate(dict.fromkeys(nodes)) if node is not None}
        groupings.append(np.array([number.get(node, -1) if node else -1 for node in nodes], dtype=np.int64))
    return groupings
