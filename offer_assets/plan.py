"""What the settings mean for each stage: the launchpad shows these fields, and a run may change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from ml.errors import InputError
from ml.learning.encoder_files import encoder_digest, split_layers
from ml.learning.search_space import STAGE_OF, SearchedModel
from ml.runner import relevant_parameters
from ml.serving.device_report import DeviceReport
from ml.serving.machine import this_machine
from ml.serving.prices import read_prices
from ml.stages import (
    STAGES,
    ComparedEncoder,
    EncoderComparisonParameters,
    EvaluationSetParameters,
    FastModelParameters,
    HyperparameterSearchParameters,
    LabellingModel,
    MigratedLabelsParameters,
    Parameters,
    Pooling,
    Precision,
    ServingBenchmarkParameters,
    StudentParameters,
    TeacherLabelsParameters,
    TeacherParameters,
    TrainingSampleParameters,
)
from offer_assets import policies
from resources.failures import input_errors_fail_plainly
from resources.settings import DEFAULT_CHECKS, Settings

SETTING_OF: dict[str, dict[str, str]] = {
    "teacher": {"learning_rate": "teacher_learning_rate", "epochs": "teacher_epochs"},
    "student": {
        "learning_rate": "student_learning_rate",
        "label_weight": "student_label_weight",
        "layers": "student_layers",
    },
    "fast": {"regularisation": "fast_regularisation"},
}
"""Parameters of a model that can be set, of those that a search varies: field of the plan, by parameter."""


class TrainingPlan(dg.ConfigurableResource):
    """How a model is trained; every field has its default from the settings."""

    split_by: Literal["product", "shop"] = Field(description="What must not be on both sides of the split.")
    encoder: str = Field(description="Teacher: 'packaged-minilm', a hub id or a local folder.")
    instruction: str = Field(description="Put before every text, for instruction-tuned encoders.")
    max_tokens: int = Field(description="The teacher cuts longer offer texts to this many tokens.")
    labelled_offers: int = Field(description="At most this many labelled offers in the sample.")
    unlabelled_offers: int = Field(description="At most this many unlabelled offers in the sample.")
    cap_per_category: int = Field(description="At most this many labelled offers of a category.")
    teacher_epochs: int = Field(description="Passes of the teacher over the labelled offers.")
    teacher_learning_rate: float = Field(description="Peak learning rate of the teacher's encoder.")
    teacher_token_dropout: float = Field(description="Share of tokens that a step of the teacher hides.")
    pretraining_epochs: int = Field(description="Passes of the teacher over all offers before the labels.")
    pseudo_label_epochs: int = Field(
        description="Passes of a second training of the teacher, on guesses too."
    )
    lora_rank: int = Field(description="Rank of the teacher's low-rank adapters; 0: all weights are trained.")
    cold_categories: bool = Field(description="Whether leaves without a labelled offer are answers too.")
    cold_loss: float = Field(description="Accuracy on validation offers that those may cost the others.")
    student_encoder: str = Field(description="'teacher' (layers of it) or an encoder as for the teacher.")
    student_layers: int = Field(description="Encoder layers of the student.")
    student_pooling: Pooling = Field(
        description="Whether tokens become one vector behind the student's last layer, or before it."
    )
    student_distilled_from: LabellingModel = Field(
        description="Whose word the student learns: of the teacher's encoder alone, or of the whole teacher."
    )
    student_max_tokens: int = Field(description="The student cuts longer offer texts to this many tokens.")
    student_epochs: int = Field(description="Passes of the student over the teacher's labels.")
    student_learning_rate: float = Field(description="Peak learning rate of the student's encoder.")
    student_token_dropout: float = Field(description="Share of tokens that a step of the student hides.")
    student_label_weight: float = Field(description="What labels count beside the teacher's word.")
    fast_regularisation: float = Field(description="C of the fast model.")
    encoders_compared: str = Field(
        description="Encoders that are compared, separated by commas; encoder:layers keeps that many layers."
    )
    training_precision: Precision = Field(description="Of products in training: auto, bfloat16, float32.")
    devices: int = Field(description="Processes on each machine that share the work; 0: one per GPU.")
    warm_start: bool = Field(description="Whether a training that may start warm does.")
    warm_teacher_epochs: int = Field(description="Passes of a teacher that starts warm.")
    warm_student_epochs: int = Field(description="Passes of a student that starts warm.")

    @classmethod
    def from_settings(cls, settings: Settings) -> TrainingPlan:
        """The plan that the settings describe."""
        return cls(**{name: getattr(settings, name) for name in cls.model_fields})

    def migrated_labels(self) -> MigratedLabelsParameters:
        """Parameters of ``migrated_labels``."""
        return MigratedLabelsParameters(encoder=self.encoder, encoder_digest=encoder_digest(self.encoder))

    def evaluation_set(self) -> EvaluationSetParameters:
        """Parameters of ``evaluation_set``."""
        return EvaluationSetParameters(split_by=self.split_by)

    def training_sample(self) -> TrainingSampleParameters:
        """Parameters of ``training_sample``; it holds out what the evaluation set may still take."""
        return TrainingSampleParameters(
            split_by=self.split_by,
            evaluation_share=self.evaluation_set().share,
            labelled=self.labelled_offers,
            unlabelled=self.unlabelled_offers,
            cap_per_category=self.cap_per_category,
        )

    def teacher(self, *, warm: bool = False) -> TeacherParameters:
        """Parameters of ``teacher_checkpoint``, for a training that starts warm or afresh."""
        return TeacherParameters(
            encoder=self.encoder,
            encoder_digest=encoder_digest(self.encoder),
            instruction=self.instruction,
            max_tokens=self.max_tokens,
            epochs=self.warm_teacher_epochs if warm else self.teacher_epochs,
            learning_rate=self.teacher_learning_rate,
            token_dropout=self.teacher_token_dropout,
            pretraining_epochs=self.pretraining_epochs,
            pseudo_label_epochs=self.pseudo_label_epochs,
            lora_rank=self.lora_rank,
            cold_categories=self.cold_categories,
            cold_loss=self.cold_loss,
            precision=self.training_precision,
            devices=self.devices,
        )

    def teacher_labels(self) -> TeacherLabelsParameters:
        """Parameters of ``teacher_labels``."""
        return TeacherLabelsParameters(precision=self.training_precision, devices=self.devices)

    def student(self, *, warm: bool = False) -> StudentParameters:
        """Parameters of ``student_checkpoint``, for a training that starts warm or afresh."""
        return StudentParameters(
            encoder=self.student_encoder,
            encoder_digest=encoder_digest(self.student_encoder),
            layers=self.student_layers,
            pooling=self.student_pooling,
            distilled_from=self.student_distilled_from,
            max_tokens=self.student_max_tokens,
            epochs=self.warm_student_epochs if warm else self.student_epochs,
            learning_rate=self.student_learning_rate,
            token_dropout=self.student_token_dropout,
            label_weight=self.student_label_weight,
            precision=self.training_precision,
            devices=self.devices,
        )

    def fast_model(self) -> FastModelParameters:
        """Parameters of ``fast_checkpoint``."""
        return FastModelParameters(regularisation=self.fast_regularisation)

    @input_errors_fail_plainly()
    def encoder_comparison(self, encoders: Sequence[str], attempt: int) -> EncoderComparisonParameters:
        """Parameters of ``encoder_comparison`` on this machine; each encoder is trained as the teacher is.

        Args:
            encoders: ``encoder`` or ``encoder:layers`` each; none: those of the plan.
            attempt: Another number measures again what did not change.

        Raises:
            InputFailure: there is no encoder to compare, or it is none.
        """
        chosen = [text.strip() for text in encoders or self.encoders_compared.split(",") if text.strip()]
        if not chosen:
            raise InputError("no encoder to compare: name some in encoders or OFFER_ASSETS_ENCODERS_COMPARED")
        return EncoderComparisonParameters(
            encoders=[_compared(text) for text in chosen],
            training=_relevant("teacher", self.teacher(), "encoder", "encoder_digest", "ensemble"),
            machine=this_machine().description,
            attempt=attempt,
        )

    def hyperparameter_search(
        self, model: SearchedModel, searched: Sequence[str], trials: int, minutes: float, seed: int
    ) -> HyperparameterSearchParameters:
        """Parameters of ``hyperparameter_search``, which begins where the plan is.

        Args:
            model: Whose parameters are searched.
            searched: Which of them; none: those that the search space proposes.
            trials: At most.
            minutes: After which no trial begins; 0: no limit.
            seed: Of what is tried.
        """
        set_now = {"teacher": self.teacher, "student": self.student, "fast": self.fast_model}[model]()
        encoder = {
            name: getattr(set_now, name) for name in ("encoder", "encoder_digest") if hasattr(set_now, name)
        }
        return HyperparameterSearchParameters(
            model=model,
            fixed=_relevant(model, set_now, "encoder", "encoder_digest"),
            searched=list(searched),
            trials=trials,
            budget_seconds=float(minutes * 60),  # as the runner reads it: part of the key
            seed=seed,
            **encoder,
        )


def setting_lines(model: str, chosen: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What a search found, as lines for ``.env``.

    Args:
        model: Whose parameters these are.
        chosen: Values by parameter.

    Returns:
        The lines, and the names of the parameters that have no setting.
    """
    fields = SETTING_OF[model]
    lines = [
        f"{Settings.model_fields[fields[name]].validation_alias}={value}"
        for name, value in chosen.items()
        if name in fields
    ]
    return lines, [name for name in chosen if name not in fields]


def _compared(text: str) -> ComparedEncoder:
    encoder, layers = split_layers(text)
    try:
        digest = encoder_digest(encoder)
    except InputError:
        digest = ""  # the comparison says what is wrong with it, beside the figures of the others
    return ComparedEncoder(encoder=encoder, layers=layers, digest=digest)


def _relevant(model: str, parameters: Parameters, *without: str) -> dict[str, Any]:
    """What decides how a model comes out, but for parameters that are given otherwise."""
    relevant = relevant_parameters(STAGES[STAGE_OF[model]], parameters)
    return {name: value for name, value in relevant.items() if name not in without}


class RetrainPolicy(dg.ConfigurableResource):
    """When drift starts a training."""

    checks: list[str] = Field(description="Checks of monitoring that may start one; none: drift never does.")
    after_days: int = Field(description="On so many days in a row, the newest, a check must be ERROR.")
    cooldown_days: int = Field(description="Days from one such training to the next.")

    @classmethod
    def from_settings(cls, settings: Settings) -> RetrainPolicy:
        """The policy that the settings describe."""
        checks = [
            check
            for name in settings.checks_that_retrain
            for check in (policies.MENDED_BY_TRAINING if name == DEFAULT_CHECKS else (name,))
        ]
        return cls(
            checks=list(dict.fromkeys(checks)),
            after_days=settings.retrain_after_days,
            cooldown_days=settings.retrain_cooldown_days,
        )


class ServingLimits(dg.ConfigurableResource):
    """What instances that serve have to do, and what they cost."""

    prices: str = Field(description="TOML file with the prices; empty: the one that comes with the project.")
    peak_offers_per_second: float = Field(description="Load that they bear with one of them missing.")
    alarm_p99_milliseconds: int = Field(description="One request in a hundred may take longer.")
    aws_endpoint_max_instances: int = Field(description="Instances that an endpoint may have.")

    @classmethod
    def from_settings(cls, settings: Settings) -> ServingLimits:
        """The limits that the settings describe."""
        return cls(**{name: getattr(settings, name) for name in cls.model_fields})

    @input_errors_fail_plainly()
    def parameters(self, reports: list[DeviceReport]) -> ServingBenchmarkParameters:
        """Parameters of ``serving_benchmark``, with the prices as they are now.

        Raises:
            InputFailure: the price file cannot be read.
        """
        prices = read_prices(self.prices)
        return ServingBenchmarkParameters(
            prices=prices.instances,
            prices_from=prices.in_words,
            reports=reports,
            peak_offers_per_second=self.peak_offers_per_second,
            p99_milliseconds=float(self.alarm_p99_milliseconds),  # as the runner reads it: part of the key
            max_instances=self.aws_endpoint_max_instances,
        )
