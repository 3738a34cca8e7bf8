"""Stage ``student_checkpoint``: a small encoder that learns to say what the teacher says.

It learns on labelled and unlabelled offers alike. Per offer, the teacher's most likely categories
and "any other" are the outcomes; the student's distribution over the same outcomes is drawn to the
teacher's. By default that is the word of the teacher's encoder alone: what its linear model knows, the fast
model brings when both answer together, and learned twice it would count twice. On labelled offers the label
adds a cross-entropy, by its confidence where a model guessed it.
Its vocabulary is trimmed to what all these offers use (:mod:`ml.learning.vocabulary`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ml.artifacts import read_manifest, short_version
from ml.learning.calibration import fit_temperature, targets_of, validation_figures
from ml.learning.devices import best_device, training_autocast, use_available_cores
from ml.learning.encoder import Classifier
from ml.learning.encoder_files import TEACHER
from ml.learning.labelling import TeacherLabels, check_same_offers, read_teacher_labels
from ml.learning.training import TrainingArguments, learning_curve_json, train, training_metrics
from ml.learning.training_data import LabelledTexts, UnlabelledTexts, read_labelled, read_unlabelled, strings
from ml.learning.vocabulary import trim_vocabulary
from ml.learning.warm_start import warm_start, warm_start_metrics
from ml.runner import StageContext
from ml.stages import StudentParameters
from ml.taxonomy import Taxonomy

_NOTHING = -1e4
"""Logit of an outcome that cannot be; finite, because 0 times infinity is not 0."""


class DistillationSet(msgspec.Struct, frozen=True):
    """What the student trains on, and the teacher's choices on the offers it is validated on."""

    texts: list[str]
    targets: NDArray[np.int64]
    """Class of the label, (offers,); -1 where there is none."""
    weights: NDArray[np.float64]
    """What the label counts, (offers,)."""
    teacher: TeacherLabels
    """Of the same offers, by the model that is distilled."""
    teacher_choice_on_validation: NDArray[np.int64]
    labelled: LabelledTexts
    """The labelled offers among them."""


def train_student(context: StageContext, parameters: StudentParameters) -> dict[str, Any]:
    """Distil, calibrate, write the classifier folder; returns its metrics.

    Of several processes that share the work, only the first writes.

    Raises:
        InputError: the encoder cannot be had or has too few layers, or the inputs do not belong
            together.
    """
    use_available_cores()
    taxonomy_folder, sample = context.input("catalog_taxonomy"), context.input("training_sample")
    taxonomy = Taxonomy.load(taxonomy_folder)
    validation = read_labelled(sample, "validation")
    teacher = Classifier.load(context.input("teacher_checkpoint"))
    labels, device = teacher.labels, best_device()
    started = warm_start(context, "student_checkpoint", parameters, _instruction(teacher, parameters), labels)
    data = _distillation_set(context, labels, parameters)
    names = [taxonomy.path(label) for label in labels]
    model = (
        started.model if started else _untrained_student(teacher, parameters, data.texts + names)
    ).with_settings(
        taxonomy_version=short_version(read_manifest(taxonomy_folder).digest),
        max_tokens=parameters.max_tokens,
        temperature=1.0,
    )
    del teacher
    model.to(device)
    context.progress.say(
        f"{model.parameter_count / 1e6:.1f} M parameters, {model.vocabulary_size:,} tokens, "
        f"{len(data.texts):,} offers to learn from "
        f"({int((data.targets >= 0).sum()):,} labelled), {len(validation.texts):,} to validate on"
    )
    loss, plan = DistillationLoss(data, parameters, device), TrainingArguments.of(parameters)

    def initialise() -> None:
        if started or parameters.encoder != TEACHER:
            context.progress.say("initialising the output layer")
            with training_autocast(device, plan.precision):
                (started or model).initialise_head(data.labelled.texts, data.labelled.categories, names)

    def validate() -> dict[str, float]:
        return _figures(model.predict_logits(validation.texts), labels, validation.categories, data)

    texts = model.tokenize(data.texts)
    state = train(
        model,
        texts,
        batch_loss=loss,
        validate=validate,
        initialise=initialise,
        plan=plan,
        checkpoints=context.checkpoints,
        progress=context.progress,
    )
    logits = model.predict_logits(validation.texts)
    temperature = fit_temperature(logits, targets_of(labels, validation.categories))
    figures = _figures(logits / temperature, labels, validation.categories, data)
    if not context.is_first:
        return {}
    model.with_settings(temperature=temperature).save(context.output)
    (context.output / "learning_curve.json").write_bytes(learning_curve_json(state))
    shutil.copyfile(taxonomy_folder / "taxonomy.parquet", context.output / "taxonomy.parquet")
    return {
        **training_metrics(model, state, texts, parameters.epochs),
        **warm_start_metrics(started, labels),
        "vocabulary_size": model.vocabulary_size,
        "labelled_rows": int((data.targets >= 0).sum()),
        "unlabelled_rows": int((data.targets < 0).sum()),
        **{f"validation_{name}": round(value, 6) for name, value in figures.items()},
        "validation_rows": len(validation.texts),
        "temperature": round(temperature, 4),
        "size_bytes": sum(path.stat().st_size for path in context.output.rglob("*") if path.is_file()),
    }


class DistillationLoss:
    """Divergence from the teacher over its top outcomes and "any other", plus the label's loss.

    The temperature softens the outcomes' distribution on both sides; the divergence is multiplied by
    its square, which keeps the gradient's size.
    """

    def __init__(self, data: DistillationSet, parameters: StudentParameters, device: torch.device) -> None:
        teacher, temperature = data.teacher, parameters.temperature
        tail = np.maximum(teacher.tail_logsumexp, _NOTHING)[:, None]
        outcomes = torch.from_numpy(np.concatenate([teacher.top_logits, tail], axis=1)).to(device)
        # softened outcome probabilities: temper the normalised logarithms, then normalise again
        tempered = functional.log_softmax(outcomes, dim=1) / temperature
        self._log_teacher = functional.log_softmax(tempered, dim=1)
        self._top = torch.from_numpy(teacher.top_indices).to(device)
        self._targets = torch.from_numpy(data.targets).to(device)
        self._weights = torch.from_numpy(data.weights).float().to(device)
        self._temperature = temperature
        self._distillation_weight = parameters.distillation_weight
        self._label_weight = parameters.label_weight

    def __call__(self, logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Mean loss of logits (rows, classes) of the offers with these numbers (rows,)."""
        index = torch.from_numpy(rows).to(logits.device)
        top, log_teacher, targets = self._top[index], self._log_teacher[index], self._targets[index]
        tail = torch.logsumexp(logits.scatter(1, top, _NOTHING), dim=1, keepdim=True)
        log_outcomes = functional.log_softmax(torch.cat([logits.gather(1, top), tail], dim=1), dim=1)
        log_student = functional.log_softmax(log_outcomes / self._temperature, dim=1)
        divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        log_probabilities = functional.log_softmax(logits, dim=1) * self._weights[index, None]
        loss_sum = functional.nll_loss(log_probabilities, targets, ignore_index=-1, reduction="sum")
        label_loss = loss_sum / len(rows)
        distilled = self._distillation_weight * self._temperature**2 * divergence
        return distilled + self._label_weight * label_loss


def _untrained_student(
    teacher: Classifier, parameters: StudentParameters, texts: Sequence[str]
) -> Classifier:
    """The student before its first step; its vocabulary is what ``texts`` use, if it is to be trimmed."""
    student = _with_fewer_layers(teacher, parameters).with_pooling(parameters.pooling)
    return trim_vocabulary(student, texts) if parameters.trim_vocabulary else student


def _with_fewer_layers(teacher: Classifier, parameters: StudentParameters) -> Classifier:
    if parameters.encoder == TEACHER:
        student = teacher.keep_layers(parameters.layers)
        with torch.no_grad():  # the labels are calibrated logits, so start from the calibrated output layer
            student.head.weight /= teacher.settings.temperature
            student.head.bias /= teacher.settings.temperature
        return student
    settings = msgspec.structs.replace(
        teacher.settings,
        instruction=_instruction(teacher, parameters),
        max_tokens=parameters.max_tokens,
    )
    original = Classifier.from_encoder(
        parameters.encoder, teacher.labels, settings, digest=parameters.encoder_digest
    )
    return original.keep_layers(parameters.layers)


def _instruction(teacher: Classifier, parameters: StudentParameters) -> str:
    """A part of the teacher reads what the teacher read."""
    return teacher.settings.instruction if parameters.encoder == TEACHER else ""


def _distillation_set(
    context: StageContext, labels: list[str], parameters: StudentParameters
) -> DistillationSet:
    sample, label_folder = context.input("training_sample"), context.input("teacher_labels")
    labelled = pq.read_table(sample / "labelled.parquet", columns=["offer_id", "split"])
    training, unlabelled = read_labelled(sample, "train"), read_unlabelled(sample)
    on_labelled = read_teacher_labels(label_folder, "labelled", parameters.distilled_from)
    on_unlabelled = read_teacher_labels(label_folder, "unlabelled", parameters.distilled_from)
    of_teacher = read_teacher_labels(label_folder, "labelled")
    check_same_offers(on_labelled, strings(labelled["offer_id"]), sample)
    check_same_offers(on_unlabelled, unlabelled.offer_ids, sample)
    if not parameters.distillation_weight:  # nothing could be learned from them
        unlabelled, on_unlabelled = UnlabelledTexts([], []), on_unlabelled.rows(np.arange(0))
    split = np.array(strings(labelled["split"]))
    no_label = np.full(len(unlabelled.texts), -1)
    no_weight = np.zeros(len(unlabelled.texts))
    return DistillationSet(
        texts=training.texts + unlabelled.texts,
        targets=np.concatenate([targets_of(labels, training.categories), no_label]),
        weights=np.concatenate([training.weights, no_weight]),
        teacher=_joined(on_labelled.rows(np.flatnonzero(split == "train")), on_unlabelled),
        teacher_choice_on_validation=of_teacher.top_indices[split == "validation", 0],
        labelled=training,
    )


def _joined(first: TeacherLabels, second: TeacherLabels) -> TeacherLabels:
    """All of ``first``, then all of ``second`` (which may be empty)."""
    width = first.top_indices.shape[1]
    return TeacherLabels(
        offer_ids=first.offer_ids + second.offer_ids,
        top_indices=np.concatenate([first.top_indices, second.top_indices.reshape(-1, width)]),
        top_logits=np.concatenate([first.top_logits, second.top_logits.reshape(-1, width)]),
        tail_logsumexp=np.concatenate([first.tail_logsumexp, second.tail_logsumexp]),
    )


def _figures(
    logits: NDArray[np.float32], labels: list[str], categories: list[str], data: DistillationSet
) -> dict[str, float]:
    agreement = float((logits.argmax(axis=1) == data.teacher_choice_on_validation).mean())
    return {**validation_figures(logits, labels, categories), "agreement_with_teacher": agreement}
