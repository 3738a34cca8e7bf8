"""Stage ``teacher_checkpoint``: fine-tune a pretrained encoder on the labelled offers, beside a linear model.

What goes into it, each of which can be switched off:

* further pretraining on all offers (:mod:`ml.learning.pretraining`),
* a hierarchical loss: cross-entropy over the categories, plus a smaller one at every level above, where the
  probability of an ancestor is the sum over the categories below it. So a near miss costs less than a far
  one, and one softmax serves all levels. A label that a model guessed counts by its confidence,
* every category's name and path as one more labelled text; categories without a labelled offer can be
  answers too (:mod:`ml.learning.cold_categories`),
* low-rank adapters instead of all weights (:mod:`ml.learning.adapters`), for encoders that are large,
* pseudo-labels: unlabelled offers of which the trained encoder is sure, in a second training,
* logit adjustment for rare categories (:mod:`ml.learning.imbalance`),
* an ensemble with a linear model (:mod:`ml.learning.ensemble`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ml.artifacts import read_manifest, short_version
from ml.learning.adapters import add_adapters, merge_adapters
from ml.learning.calibration import fit_temperature, softmax, targets_of, validation_figures
from ml.learning.cold_categories import NamedLayer, bias_of_cold, cold_among, without_cold
from ml.learning.devices import best_device, training_autocast, use_available_cores
from ml.learning.encoder import Classifier, ClassifierSettings, TokenizedTexts
from ml.learning.ensemble import EnsembleWeights, Teacher, fit_weights, linear_logits
from ml.learning.fast_model import Examples, fit_fast_model
from ml.learning.hierarchical_loss import HierarchicalLoss
from ml.learning.imbalance import choose_strength, log_shares
from ml.learning.pretraining import pretrain, pretraining_plan
from ml.learning.training import (
    TrainingArguments,
    TrainingState,
    learning_curve_json,
    train,
    training_metrics,
)
from ml.learning.training_data import LabelledTexts, read_labelled, read_unlabelled
from ml.learning.warm_start import WarmStart, warm_start, warm_start_metrics
from ml.offers import TEXT_VERSION
from ml.runner import StageContext
from ml.serving.fast_model import FastModel, FastModelSettings
from ml.stages import FastModelParameters, TeacherParameters
from ml.taxonomy import Taxonomy


def train_teacher(context: StageContext, parameters: TeacherParameters) -> dict[str, Any]:
    """Read the sample, train, calibrate, write the teacher's folder; returns its metrics.

    Of several processes that share the work, only the first writes.

    Raises:
        InputError: the encoder cannot be had, or the sample has no training or validation offers.
    """
    use_available_cores()
    taxonomy_folder, sample = context.input("catalog_taxonomy"), context.input("training_sample")
    taxonomy = Taxonomy.load(taxonomy_folder)
    training, validation = read_labelled(sample, "train"), read_labelled(sample, "validation")
    unlabelled = read_unlabelled(sample).texts
    labels = _labels(training, taxonomy, parameters)
    settings = ClassifierSettings(
        text_version=TEXT_VERSION,
        taxonomy_version=short_version(read_manifest(taxonomy_folder).digest),
        max_tokens=parameters.max_tokens,
        instruction=parameters.instruction,
    )
    started = warm_start(context, "teacher_checkpoint", parameters, parameters.instruction, labels)
    cold = cold_among(labels, training.categories)
    model = _untrained(started, labels, settings, parameters, cold)
    context.progress.say(
        f"{model.parameter_count / 1e6:.1f} M parameters, {len(training.texts):,} offers to learn from, "
        f"{len(validation.texts):,} to validate on, {len(labels):,} categories"
    )
    lesson = _Lesson(context, parameters, taxonomy, labels, validation, cold)
    state, texts = lesson.learn(model, training, unlabelled, started)
    guessed = lesson.learn_from_guesses(model, training, unlabelled)
    if parameters.lora_rank:
        merge_adapters(model)
    if isinstance(model.head, NamedLayer):
        model.with_head(model.head.merged(), labels)
    logits = model.predict_logits(validation.texts)
    if not context.is_first:
        return {}
    teacher, figures = _put_together(context, model, logits, training, validation, parameters)
    teacher.save(context.output)
    (context.output / "learning_curve.json").write_bytes(learning_curve_json(state))
    shutil.copyfile(taxonomy_folder / "taxonomy.parquet", context.output / "taxonomy.parquet")
    return {
        **training_metrics(model, state, texts, parameters.epochs),
        **warm_start_metrics(started, labels),
        "rows": len(training.texts),
        "pseudo_labelled_rows": guessed,
        "cold_categories": int(cold.sum()),
        **figures,
        "validation_rows": len(validation.texts),
        "size_bytes": sum(path.stat().st_size for path in context.output.rglob("*") if path.is_file()),
    }


def _labels(training: LabelledTexts, taxonomy: Taxonomy, parameters: TeacherParameters) -> list[str]:
    """What the teacher can answer: every category of an offer, and leaves without one if they are wanted."""
    cold = taxonomy.leaves if parameters.cold_categories else []
    return sorted({*training.categories, *cold})


def _untrained(
    started: WarmStart | None,
    labels: list[str],
    settings: ClassifierSettings,
    parameters: TeacherParameters,
    cold: NDArray[np.bool_],
) -> Classifier:
    """The encoder before its first step, on the device to train on."""
    if started:
        model = started.model.with_settings(**msgspec.structs.asdict(settings))
    else:
        model = Classifier.from_encoder(
            parameters.encoder, labels, settings, digest=parameters.encoder_digest
        )
    if parameters.lora_rank:
        torch.manual_seed(parameters.seed)
        add_adapters(model, parameters.lora_rank)
    model.to(best_device())
    if cold.any():
        model.with_head(NamedLayer(model.head.in_features, cold, model.device), labels)
    return model


class _Lesson:
    """What the encoder is taught, and how."""

    def __init__(
        self,
        context: StageContext,
        parameters: TeacherParameters,
        taxonomy: Taxonomy,
        labels: list[str],
        validation: LabelledTexts,
        cold: NDArray[np.bool_],
    ) -> None:
        self._context = context
        self._parameters = parameters
        self._plan = TrainingArguments.of(parameters)
        self._taxonomy = taxonomy
        self._labels = labels
        self._names = [taxonomy.path(label) for label in labels]
        self._validation = validation
        self._cold = torch.from_numpy(cold)

    def learn(
        self,
        model: Classifier,
        training: LabelledTexts,
        unlabelled: Sequence[str],
        started: WarmStart | None,
    ) -> tuple[TrainingState, TokenizedTexts]:
        """Train on the labelled offers; returns the final state and what was read."""

        def initialise() -> None:
            if self._parameters.pretraining_epochs and not started:
                pretrain(
                    model,
                    [*training.texts, *unlabelled],
                    pretraining_plan(self._plan, self._parameters.pretraining_epochs),
                    self._context.checkpoints / "pretraining",
                    self._context.progress,
                )
            self._context.progress.say("initialising the output layer")
            with training_autocast(model.device, self._plan.precision):
                (started or model).initialise_head(training.texts, training.categories, self._names)
                if isinstance(model.head, NamedLayer):
                    model.head.start(model.predict_embeddings(self._names))

        return self._train(model, training, self._plan, self._context.checkpoints, initialise)

    def learn_from_guesses(
        self, model: Classifier, training: LabelledTexts, unlabelled: Sequence[str]
    ) -> int:
        """Train on labelled offers and confident guesses (Lee 2013, "Pseudo-Label"); returns their number."""
        epochs, sure = self._parameters.pseudo_label_epochs, self._parameters.pseudo_label_confidence
        if not epochs or not unlabelled:
            return 0
        targets = targets_of(self._labels, self._validation.categories)
        temperature = fit_temperature(model.predict_logits(self._validation.texts), targets)
        probabilities = softmax(model.predict_logits(unlabelled) / temperature)
        guesses, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        # A guess that falls on a category without offers is the least certain of all: it is not taken.
        rows = np.flatnonzero((confidence >= sure) & ~self._cold.numpy()[guesses]).tolist()
        self._context.progress.say(f"{len(rows):,} of {len(unlabelled):,} unlabelled offers are clear enough")
        if not len(rows):
            return 0
        together = LabelledTexts(
            training.texts + [unlabelled[row] for row in rows],
            training.categories + [self._labels[guesses[row]] for row in rows],
            np.concatenate([training.weights, confidence[rows].astype(np.float64)]),
        )
        plan = msgspec.structs.replace(self._plan, epochs=epochs)
        self._train(model, together, plan, self._context.checkpoints / "pseudo_labels", lambda: None)
        return len(rows)

    def _with_names(self, offers: LabelledTexts) -> LabelledTexts:
        if not self._parameters.category_names:
            return offers
        return LabelledTexts(
            offers.texts + self._names,
            offers.categories + self._labels,
            np.concatenate([offers.weights, np.ones(len(self._names))]),
        )

    def _train(
        self,
        model: Classifier,
        offers: LabelledTexts,
        plan: TrainingArguments,
        checkpoints: Path,
        initialise: Callable[[], None],
    ) -> tuple[TrainingState, TokenizedTexts]:
        hierarchy = HierarchicalLoss(
            self._taxonomy, self._labels, self._parameters.ancestor_loss, model.device
        )
        learned = self._with_names(offers)
        targets = torch.from_numpy(targets_of(self._labels, learned.categories)).to(model.device)
        weights = torch.from_numpy(learned.weights).float().to(model.device)
        cold, has_cold = self._cold.to(model.device), bool(self._cold.any())

        def batch_loss(logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
            index = torch.from_numpy(rows).to(model.device)
            if has_cold:
                logits = without_cold(logits, index < len(offers.texts), cold)
            return hierarchy(logits, targets[index], weights[index])

        texts = model.tokenize(learned.texts)
        validation = self._validation
        state = train(
            model,
            texts,
            batch_loss=batch_loss,
            validate=lambda: validation_figures(
                model.predict_logits(validation.texts), self._labels, validation.categories
            ),
            initialise=initialise,
            plan=plan,
            checkpoints=checkpoints,
            progress=self._context.progress,
        )
        return state, texts


def _put_together(
    context: StageContext,
    model: Classifier,
    logits: NDArray[np.float32],
    training: LabelledTexts,
    validation: LabelledTexts,
    parameters: TeacherParameters,
) -> tuple[Teacher, dict[str, float]]:
    """Encoder and linear model as one teacher, and its figures on the validation offers.

    Args:
        context: Of the stage.
        model: The trained encoder.
        logits: Of the encoder on the validation offers, (offers, classes).
        training: What was learned from.
        validation: What weights and adjustment are chosen by.
        parameters: Of the stage.
    """
    labels = model.labels
    cold = cold_among(labels, training.categories)
    targets = targets_of(labels, validation.categories)
    linear, of_linear = None, None
    if parameters.ensemble:
        linear = _linear_model(context, training, model, parameters)
        of_linear = linear_logits(linear, labels, validation.texts)
    # Categories without offers have no say in how the parts are weighed, nor in how rare ones are lifted.
    weights = _weights(logits, of_linear, targets, cold)
    shares = np.where(cold, 0.0, log_shares(targets_of(labels, training.categories), len(labels)))
    strength = parameters.logit_adjustment
    if strength is None:
        blended = np.where(cold, -np.inf, _blended(logits, of_linear, weights))
        strength = choose_strength(blended, targets, shares)
    if strength and weights.encoder:
        # What is subtracted from the sum of both is a bias of the encoder's output layer.
        logits = logits + _add_to_bias(model, -strength / weights.encoder * shares)
        weights = _weights(logits, of_linear, targets, cold)
    if cold.any() and weights.encoder:
        bias = bias_of_cold(_blended(logits, of_linear, weights), targets, cold, parameters.cold_loss)
        logits = logits + _add_to_bias(model, np.where(cold, bias / weights.encoder, 0.0))
    temperature = fit_temperature(logits, targets)
    alone = validation_figures(logits / temperature, labels, validation.categories)
    figures = validation_figures(_blended(logits, of_linear, weights), labels, validation.categories)
    return Teacher(model.with_settings(temperature=temperature), linear, weights), {
        **{f"validation_{name}": round(value, 6) for name, value in figures.items()},
        **{f"encoder_validation_{name}": round(value, 6) for name, value in alone.items()},
        "temperature": round(temperature, 4),
        "encoder_weight": round(weights.encoder, 4),
        "linear_weight": round(weights.linear, 4),
        "logit_adjustment": strength if weights.encoder else 0.0,
    }


def _weights(
    encoder: NDArray[np.float32],
    linear: NDArray[np.float32] | None,
    targets: NDArray[np.int64],
    cold: NDArray[np.bool_],
) -> EnsembleWeights:
    """The weights of both among the categories that have offers."""
    column = np.cumsum(~cold) - 1
    among = np.where((targets >= 0) & ~cold[targets], column[targets], -1)
    return fit_weights(encoder[:, ~cold], None if linear is None else linear[:, ~cold], among)


def _add_to_bias(model: Classifier, numbers: NDArray[np.floating]) -> NDArray[np.float32]:
    """Add ``numbers`` (classes,) to the bias of the output layer; returns what logits have more now."""
    added = numbers.astype(np.float32)
    with torch.no_grad():
        model.head.bias += torch.from_numpy(added).to(model.device)
    return added


def _blended(
    encoder: NDArray[np.float32], linear: NDArray[np.float32] | None, weights: EnsembleWeights
) -> NDArray[np.float32]:
    blended: NDArray[np.float32] = weights.encoder * encoder
    return blended if linear is None else blended + weights.linear * linear


def _linear_model(
    context: StageContext, training: LabelledTexts, model: Classifier, parameters: TeacherParameters
) -> FastModel:
    context.progress.say("training the linear model")
    labels = sorted(set(training.categories))
    rows = np.arange(len(training.texts))
    examples = Examples(training.texts, rows, targets_of(labels, training.categories), training.weights)
    settings = FastModelSettings(text_version=model.text_version, taxonomy_version=model.taxonomy_version)
    return fit_fast_model(
        examples, labels, settings, FastModelParameters(seed=parameters.seed), context.progress
    )
