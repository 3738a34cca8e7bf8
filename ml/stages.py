"""The catalogue of stages: what each is called, needs and can be told.

A stage turns input artifacts and parameters into one output artifact. The catalogue is cheap to
import: a stage's own module, with torch and the like, is imported only when the stage runs.
Adding a stage is one entry here and one function ``run(context, parameters) -> metrics``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ml.errors import InputError
from ml.serving.device_report import DeviceReport
from ml.serving.prices import InstancePrice

OPERATIONAL = {"operational": True}
"""Marks a parameter that says how the work is done, not what comes out: it is not part of the key."""

AUTO = "auto"
AUTO_WITH_EXTRAS = "auto-with-extras"
"""Values of parameter ``backend`` that name none."""

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0, description="Seed of every random choice of this stage.")]
Precision = Literal["auto", "bfloat16", "float32"]
Pooling = Literal["mean", "query"]

LabellingModel = Literal["teacher", "encoder"]
"""Whose word a row of ``teacher_labels`` is: the whole teacher's, or that of its encoder alone."""

TrainingPrecision = Annotated[
    Precision,
    Meta(
        description="What products are computed in: 'bfloat16', 'float32', or 'auto': bfloat16 where the "
        "device multiplies it fast. Weights are float32."
    ),
]

TokenDropout = Annotated[
    float,
    Meta(ge=0, lt=1, description="Share of a text's tokens that a training step hides, others every time."),
]

Devices = Annotated[
    int,
    Meta(
        ge=0,
        description="Processes on each machine that share the work, one per GPU; 0: as many as it has GPUs.",
        extra=OPERATIONAL,
    ),
]
"""Of parameter ``devices``. Of a stage that has it, any number of processes can share the work."""


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all stage parameters: immutable, typed, unknown names are errors."""


class FeedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a feed, as it was when it was looked at."""

    uri: str
    fingerprint: str
    """Changes when the file's content changes."""
    loaded_on: str
    """ISO date on which the file was first seen: the day of its offers without ``offered_at``."""


class TaxonomyFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a release of the taxonomy."""

    uri: str
    role: Literal["tree", "names", "mapping"]
    """The tree itself, its names in one more locale, or where the ids of the release before went. Trees
    and mappings of earlier releases may come before those of the release itself."""
    locale: str = ""
    """Of a file of names."""


class TaxonomyParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``catalog_taxonomy``."""

    source: Annotated[str, Meta(description="Where the release is from, as messages call it.")]
    files: Annotated[
        list[TaxonomyFile],
        Meta(
            description="Files of the release (uri, role, locale); none: the newest at the source.",
            extra=OPERATIONAL,
        ),
    ] = []
    fingerprint: Annotated[
        str, Meta(description="Digest of all the files' contents; empty: not checked.")
    ] = ""


class TaxonomyChangeParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``taxonomy_change``."""

    certain_from: Annotated[
        Share, Meta(description="An inferred successor of this confidence takes labels without a look.")
    ] = 0.8
    few_labelled: Annotated[
        Count, Meta(description="A new category with fewer labelled offers is pointed out.")
    ] = 10
    offers_judged: Annotated[
        Count, Meta(description="Labelled offers of a removed category that the teacher looks at, at most.")
    ] = 200
    adopted_on: Annotated[
        str,
        Meta(
            pattern=r"^(\d{4}-\d{2}-\d{2})?$",
            description="ISO date on which the release is taken: labels up to that day are of the version "
            "before. Empty: the version that a day was taken with decides alone.",
        ),
    ] = ""
    seed: Seed = 17


class MigratedLabelsParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``migrated_labels``."""

    min_confidence: Annotated[
        Share, Meta(description="A label of a split category moves if the teacher is this sure; else aside.")
    ] = 0.8
    few_labelled: Annotated[
        Count, Meta(description="New categories with fewer labelled offers get weak labels.")
    ] = 10
    weak_per_category: Annotated[
        int, Meta(ge=0, description="At most this many weak labels of a category; 0: none.")
    ] = 30
    candidates_per_category: Annotated[
        Count, Meta(description="Offers that the teacher looks at for a category, at most.")
    ] = 300
    min_weak_confidence: Annotated[
        Share, Meta(description="A weak label is proposed if the teacher is this sure.")
    ] = 0.6
    encoder: Annotated[str, Meta(description="Judges where there is no teacher yet; as for the teacher.")] = (
        "packaged-minilm"
    )
    encoder_digest: Annotated[
        str, Meta(description="SHA-256 of the encoder's weights; empty: not checked.")
    ] = ""
    seed: Seed = 17


class RawOffersParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``raw_offers``."""

    files: Annotated[list[FeedFile], Meta(description="Files that hold offers of the day.")]
    day: Annotated[str, Meta(description="ISO date whose offers are taken.")]


class OffersParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``offers`` (which writes clean and quarantined offers)."""

    max_title_characters: Annotated[Count, Meta(description="Longer titles go to quarantine.")] = 4096


class EvaluationSetParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``evaluation_set``."""

    split_by: Annotated[
        Literal["product", "shop"],
        Meta(description="What must not be on both sides of the split: a product or a shop."),
    ] = "product"
    share: Annotated[Share, Meta(description="Share of products (or shops) held out.")] = 0.15
    cap_per_category: Annotated[Count, Meta(description="At most this many offers of a category.")] = 200
    seed: Seed = 17


class TrainingSampleParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``training_sample``."""

    split_by: Annotated[
        Literal["product", "shop"],
        Meta(description="What must not be on both sides of the split: a product or a shop."),
    ] = "product"
    evaluation_share: Annotated[
        Share, Meta(description="Share of products (or shops) held out; as in evaluation_set.")
    ] = 0.15
    cap_per_category: Annotated[
        Count, Meta(description="At most this many labelled offers of a category.")
    ] = 400
    cap_per_product: Annotated[Count, Meta(description="At most this many labelled offers of a product.")] = 6
    labelled: Annotated[Count, Meta(description="At most this many labelled offers in all.")] = 12_000
    unlabelled: Annotated[int, Meta(ge=0, description="At most this many unlabelled offers.")] = 4_000
    validation_share: Annotated[
        Share, Meta(description="Share of the training products kept for validation.")
    ] = 0.1
    seed: Seed = 17


class EncoderChoice(Parameters, frozen=True, kw_only=True):
    """Which pretrained encoder, and how much of the text it reads."""

    encoder: Annotated[
        str, Meta(description="'packaged-minilm', a hub id, or a local folder in transformers format.")
    ] = "packaged-minilm"
    encoder_digest: Annotated[
        str, Meta(description="SHA-256 of the encoder's weights; empty: not checked.")
    ] = ""
    max_tokens: Annotated[
        int, Meta(ge=8, le=512, description="Longer texts are cut to this many tokens.")
    ] = 48
    instruction: Annotated[
        str, Meta(description="Put before every text, as instruction-tuned encoders want it.")
    ] = ""


class TeacherParameters(EncoderChoice, frozen=True, kw_only=True):
    """Parameters of ``teacher_checkpoint``."""

    epochs: Annotated[Count, Meta(description="Passes over the labelled offers.")] = 2
    batch_size: Count = 32
    learning_rate: Annotated[float, Meta(gt=0, description="Peak rate of the encoder (AdamW).")] = 1e-4
    head_learning_rate: Annotated[float, Meta(gt=0, description="Peak rate of the output layer.")] = 3e-3
    ancestor_loss: Annotated[
        float, Meta(ge=0, description="Weight of the loss at each level above the leaf.")
    ] = 0.3
    pretraining_epochs: Annotated[
        int, Meta(ge=0, description="Passes over all offers, labelled or not, before the labels; 0: none.")
    ] = 0
    category_names: Annotated[
        bool, Meta(description="Whether each category's path counts as one more labelled text.")
    ] = True
    cold_categories: Annotated[
        bool,
        Meta(description="Whether leaves without a labelled offer are answers too, by name and path alone."),
    ] = False
    cold_loss: Annotated[
        Share, Meta(description="Accuracy on validation offers that those leaves may cost the others.")
    ] = 0.02
    lora_rank: Annotated[
        int, Meta(ge=0, description="Rank of low-rank adapters; 0: all weights are trained.")
    ] = 0
    pseudo_label_epochs: Annotated[
        int, Meta(ge=0, description="Passes of a second training, on confident guesses too; 0: none.")
    ] = 0
    pseudo_label_confidence: Annotated[
        Share, Meta(description="Unlabelled offers of which the encoder is this sure are taken.")
    ] = 0.9
    logit_adjustment: Annotated[
        float | None,
        Meta(description="How far to lean towards rare categories, 0 to 1; null: as validation says."),
    ] = None
    ensemble: Annotated[
        bool, Meta(description="Whether a linear model answers together with the encoder.")
    ] = True
    token_dropout: TokenDropout = 0.1
    precision: TrainingPrecision = "auto"
    checkpoint_seconds: Annotated[
        float, Meta(gt=0, description="Time between two checkpoints.", extra=OPERATIONAL)
    ] = 20.0
    devices: Devices = 0
    seed: Seed = 17


class TeacherLabelsParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``teacher_labels``."""

    top_k: Annotated[Count, Meta(description="Logits kept per offer, the rest as one tail mass.")] = 16
    batch_size: Count = 64
    shard_offers: Annotated[Count, Meta(description="Offers per shard; finished shards survive a kill.")] = (
        2_000
    )
    precision: TrainingPrecision = "auto"
    devices: Devices = 0


class StudentParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``student_checkpoint``."""

    encoder: Annotated[
        str,
        Meta(description="'teacher': layers of the fine-tuned teacher; or an encoder as for the teacher."),
    ] = "teacher"
    encoder_digest: Annotated[
        str, Meta(description="SHA-256 of the encoder's weights; empty: not checked.")
    ] = ""
    layers: Annotated[Count, Meta(description="Encoder layers kept, spread evenly over the original's.")] = 2
    pooling: Annotated[
        Pooling,
        Meta(
            description="'query': the last layer computes one vector per text, which the mean of its tokens "
            "asks for; needs layers like BERT's. 'mean': one per token, and their mean."
        ),
    ] = "query"
    max_tokens: Annotated[
        int, Meta(ge=8, le=512, description="Longer texts are cut to this many tokens.")
    ] = 32
    epochs: Annotated[Count, Meta(description="Passes over labelled and unlabelled offers.")] = 5
    batch_size: Count = 32
    learning_rate: Annotated[float, Meta(gt=0, description="Peak rate of the encoder (AdamW).")] = 2e-4
    head_learning_rate: Annotated[float, Meta(gt=0, description="Peak rate of the output layer.")] = 1e-3
    trim_vocabulary: Annotated[
        bool, Meta(description="Keep only the tokens that the sample's texts use, and single characters.")
    ] = True
    distilled_from: Annotated[
        LabellingModel,
        Meta(
            description="Whose word the student learns: of the teacher's 'encoder' alone, or of the whole "
            "'teacher' with its linear model."
        ),
    ] = "encoder"
    distillation_weight: Annotated[
        Share, Meta(description="Weight of the teacher's word; 0: learn from the labelled offers alone.")
    ] = 1.0
    label_weight: Annotated[
        Share, Meta(description="Weight of labels beside the teacher's word, on labelled offers.")
    ] = 0.3
    temperature: Annotated[float, Meta(gt=0, description="Softens both sides of the distillation loss.")] = (
        1.0
    )
    token_dropout: TokenDropout = 0.15
    precision: TrainingPrecision = "auto"
    checkpoint_seconds: Annotated[
        float, Meta(gt=0, description="Time between two checkpoints.", extra=OPERATIONAL)
    ] = 20.0
    devices: Devices = 0
    seed: Seed = 17


class FastModelParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``fast_checkpoint``."""

    max_features: Annotated[
        Count,
        Meta(description="n-grams kept of titles, and as many of whole texts, the most frequent first."),
    ] = 100_000
    regularisation: Annotated[float, Meta(gt=0, description="C of the linear support vector machines.")] = 2.0
    pseudo_label_confidence: Annotated[
        Share,
        Meta(
            description="Unlabelled offers of which the teacher is this sure are trained on too, as what it "
            "finds likely; 1: none."
        ),
    ] = 0.5
    label_weight: Annotated[
        Share, Meta(description="Weight of labels on labelled offers; the teacher's word gets the rest.")
    ] = 1.0
    class_balance: Annotated[
        float,
        Meta(
            ge=0,
            description="What the negative logarithm of a category's share of the offers adds to its margin.",
        ),
    ] = 0.02
    rank: Annotated[
        int,
        Meta(
            ge=0,
            description="Where there are more categories, margins are combinations of so many directions; "
            "0: as many as categories.",
        ),
    ] = 512
    seed: Seed = 17


class ComparedEncoder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One candidate of ``encoder_comparison``."""

    encoder: str
    """``packaged-minilm``, a hub id, a local folder or a URI."""
    layers: Annotated[int, Meta(ge=0)] = 0
    """Encoder layers kept, spread evenly over the original's; 0: all."""
    digest: str = ""
    """SHA-256 of the encoder's weights; empty: not checked."""

    @property
    def name(self) -> str:
        """As settings and the launchpad write it: ``packaged-minilm:3``."""
        return f"{self.encoder}:{self.layers}" if self.layers else self.encoder


class EncoderComparisonParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``encoder_comparison``."""

    encoders: Annotated[
        list[ComparedEncoder],
        Meta(min_length=1, description="Encoders to compare (encoder, layers, digest)."),
    ]
    training: Annotated[
        dict[str, Any],
        Meta(description="Parameters of teacher_checkpoint with which each is trained, but for the encoder."),
    ] = {}
    machine: Annotated[
        str,
        Meta(
            description="What it is measured on; must be this machine. Empty: any. Others have other speeds."
        ),
    ] = ""
    timed_offers: Annotated[Count, Meta(description="Offer texts whose prediction is timed.")] = 256
    attempt: Annotated[Count, Meta(description="Another number measures again what did not change.")] = 1


class HyperparameterSearchParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``hyperparameter_search``."""

    model: Annotated[
        Literal["teacher", "student", "fast"], Meta(description="Whose parameters are searched.")
    ]
    encoder: Annotated[
        str, Meta(description="Encoder of teacher or student, as there; the fast model has none.")
    ] = "packaged-minilm"
    encoder_digest: Annotated[
        str, Meta(description="SHA-256 of the encoder's weights; empty: not checked.")
    ] = ""
    fixed: Annotated[
        dict[str, Any],
        Meta(description="Parameters of the model as they are set; the first trial has them all."),
    ] = {}
    searched: Annotated[
        list[str],
        Meta(description="Names of the parameters that vary; none: those that the search space proposes."),
    ] = []
    trials: Annotated[Count, Meta(description="Trials at most, those that are given up early counted.")] = 20
    budget_seconds: Annotated[
        float, Meta(ge=0, description="No trial begins once the trials took so long together; 0: no limit.")
    ] = 3_600.0
    startup_trials: Annotated[
        Count, Meta(description="Trials that are drawn at random and finished, before the search learns.")
    ] = 5
    seed: Seed = 17


class EvaluationParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``student_evaluation``."""

    batch_size: Count = 64
    bootstrap: Annotated[Count, Meta(description="Resamples behind each confidence interval.")] = 500
    min_segment_offers: Annotated[
        Count, Meta(description="Segments with fewer offers (or 10 products) are not compared.")
    ] = 30
    seed: Seed = 17


class MistakesExplainedParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``mistakes_explained``."""

    mistakes: Annotated[Count, Meta(description="Mistakes that are explained, the surest first.")] = 12
    similar: Annotated[Count, Meta(description="Similar labelled offers shown with each.")] = 5


class CompileParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``compiled_student``."""

    target: Literal["cpu", "neuron", "torchscript"] = "cpu"
    parity_offers: Annotated[Count, Meta(description="Offers that both models are compared on.")] = 2_000
    backend: Annotated[
        str,
        Meta(
            description="Of target cpu. 'auto': the fastest in ONNX Runtime that keeps the gate's limits; "
            "'auto-with-extras': OpenVINO is tried too; or a backend's name, e.g. onnx-int8-rows."
        ),
    ] = AUTO
    sdk: Annotated[
        str,
        Meta(description="Version of torch-neuronx that has to compile; empty: whichever is there."),
    ] = ""
    max_loss: Annotated[
        float,
        Meta(
            gt=0,
            lt=1,
            description="Accuracy that the fast model's answers may cost against asking the student about "
            "every offer, kept with 95 % confidence.",
        ),
    ] = 0.01
    min_precision: Annotated[
        float,
        Meta(
            gt=0,
            lt=1,
            description="Share of right answers among those not marked for review, with 95 % confidence.",
        ),
    ] = 0.9
    country_offers: Annotated[
        Count,
        Meta(description="Validation offers from which on a country has a threshold of its own."),
    ] = 1_000


class RenamedStudentParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``renamed_student``; it has none."""


class CataloguedOffersParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``catalogued_offers``."""

    endpoint_url: Annotated[
        str, Meta(description="Where /invocations answers, e.g. http://127.0.0.1:8765.", extra=OPERATIONAL)
    ] = ""
    variant: Annotated[
        str, Meta(description="Variant of the endpoint that has to answer; empty: any.", extra=OPERATIONAL)
    ] = ""
    batch_offers: Annotated[Count, Meta(description="Offers per request.", extra=OPERATIONAL)] = 256
    in_flight: Annotated[Count, Meta(description="Requests under way at once.", extra=OPERATIONAL)] = 4
    prepared: Annotated[
        str,
        Meta(
            description="Folder of the transform_input whose offers a bulk job has answered; empty: ask the "
            "endpoint.",
            extra=OPERATIONAL,
        ),
    ] = ""
    answers: Annotated[
        str,
        Meta(description="Folder of the job's answers: for each <shard> a <shard>.out.", extra=OPERATIONAL),
    ] = ""


class TransformInputParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``transform_input``."""

    shard_offers: Annotated[
        Count, Meta(description="Offers per file, which one instance of the job takes at a time.")
    ] = 20_000
    captured: Annotated[
        str,
        Meta(
            description="Folder of what the endpoint captured of its requests and answers: whatever is in "
            "there when the artifact is made. Empty: nothing.",
            extra=OPERATIONAL,
        ),
    ] = ""


class DriftReferenceParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``drift_reference``."""

    days: Annotated[Count, Meta(description="Newest days of the training data that are the reference.")] = 28
    offers_per_day: Annotated[
        Count, Meta(description="Offers of each day that are looked at one by one (uniform sample).")
    ] = 2_000
    max_offers: Annotated[
        Count, Meta(description="The same of all days together; with more days each gives fewer.")
    ] = 30_000
    seed: Seed = 17


class DriftParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``drift_report``."""

    day: Annotated[
        str, Meta(pattern=r"^\d{4}-\d{2}-\d{2}$", description="ISO date that is held against the reference.")
    ]
    complete: Annotated[
        bool, Meta(description="Whether the day is over; of one that is not, volume is not judged.")
    ] = True
    max_offers: Annotated[
        Count, Meta(description="Offers of the day that are looked at one by one (uniform sample).")
    ] = 4_000
    seed: Seed = 17


class CorrectionsParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``corrections``."""

    files: Annotated[list[FeedFile], Meta(description="Files of the corrections feed; may be none.")]


class LiveQualityParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``live_quality``."""

    newest_day: Annotated[
        str, Meta(pattern=r"^\d{4}-\d{2}-\d{2}$", description="ISO date up to which quality is looked at.")
    ]
    days: Annotated[Count, Meta(description="Days before it that are looked at.")] = 56
    recent_days: Annotated[
        Count, Meta(description="The newest of them, which are held against the others.")
    ] = 7
    seed: Seed = 17


class ServingMeasurementParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``serving_measurement``."""

    machine: Annotated[
        str,
        Meta(description="What it is measured on; must be this machine. Figures of another are others."),
    ]
    seconds: Annotated[float, Meta(gt=0, le=3_600, description="Length of each of six measurements.")] = 2.0
    offers: Annotated[Count, Meta(description="Offers on which model and original are compared.")] = 500
    attempt: Annotated[Count, Meta(description="Another number measures again what did not change.")] = 1


class ServingBenchmarkParameters(Parameters, frozen=True, kw_only=True):
    """Parameters of ``serving_benchmark``."""

    prices: Annotated[list[InstancePrice], Meta(description="Instance types, what they cost and have; JSON.")]
    prices_from: Annotated[str, Meta(description="Region and date of the prices, in words.")]
    reports: Annotated[
        list[DeviceReport], Meta(description="What was measured of the same student on other hosts.")
    ] = []
    peak_offers_per_second: Annotated[
        float, Meta(gt=0, description="Load that the instances must bear together, one of them missing.")
    ] = 80_000.0
    p99_milliseconds: Annotated[
        float, Meta(gt=0, description="One request in a hundred may take longer.")
    ] = 2_000.0
    max_instances: Annotated[Count, Meta(description="Instances that an endpoint may have.")] = 20


@dataclass(frozen=True)
class Stage:
    """One entry of the catalogue."""

    name: str
    """Also the kind of the artifact it writes."""
    version: str
    """Raised whenever the meaning of the output changes: it is part of every artifact's key."""
    summary: str
    entry_point: str
    """``module:function`` of ``run(context, parameters) -> metrics``."""
    parameters: type[Parameters]
    inputs: tuple[str, ...] = ()
    optional_inputs: tuple[str, ...] = ()
    partitioned_inputs: tuple[str, ...] = ()
    """Inputs given once per partition, named ``<input>/<partition>``."""
    optional_partitioned_inputs: tuple[str, ...] = ()
    """The same, where there may be no partition at all."""
    heavy: bool = False
    """Runs as a program of its own behind the compute door."""

    def function(self) -> Callable[..., dict[str, Any]]:
        """Import the stage's module and return its function."""
        module, name = self.entry_point.split(":")
        function: Callable[..., dict[str, Any]] = getattr(import_module(module), name)
        return function


_CATALOGUE = (
    Stage(
        name="catalog_taxonomy",
        version="2",
        summary="Read and validate a release of the category tree.",
        entry_point="ml.taxonomy_change.releases:write_taxonomy",
        parameters=TaxonomyParameters,
    ),
    Stage(
        name="taxonomy_change",
        version="1",
        summary="Say what changed since the taxonomy before, where labels go, and which offers it touches.",
        entry_point="ml.taxonomy_change.change:write_taxonomy_change",
        parameters=TaxonomyChangeParameters,
        inputs=("catalog_taxonomy",),
        optional_inputs=("previous_taxonomy", "previous_change", "teacher_checkpoint", "student_checkpoint"),
        optional_partitioned_inputs=("offers", "catalogued_offers"),
        heavy=True,
    ),
    Stage(
        name="raw_offers",
        version="1",
        summary="Take the offers of one day from the feed, exactly as delivered.",
        entry_point="ml.feed.reading:write_raw_offers",
        parameters=RawOffersParameters,
    ),
    Stage(
        name="offers",
        version="2",
        summary="Type and validate the offers of a day; what is wrong goes to quarantine with its reason.",
        entry_point="ml.offers:write_offers",
        parameters=OffersParameters,
        inputs=("raw_offers", "catalog_taxonomy"),
        optional_inputs=("taxonomy_change",),
    ),
    Stage(
        name="migrated_labels",
        version="1",
        summary="Carry the labels of earlier taxonomies over, and propose labels for new categories.",
        entry_point="ml.taxonomy_change.labels:write_migrated_labels",
        parameters=MigratedLabelsParameters,
        inputs=("catalog_taxonomy", "taxonomy_change"),
        optional_inputs=("teacher_checkpoint",),
        partitioned_inputs=("offers",),
        heavy=True,
    ),
    Stage(
        name="evaluation_set",
        version="2",
        summary="Extend the fixed evaluation set by what it does not cover yet.",
        entry_point="ml.sampling.stages:write_evaluation_set",
        parameters=EvaluationSetParameters,
        inputs=("catalog_taxonomy", "taxonomy_change", "migrated_labels"),
        optional_inputs=("previous",),
        partitioned_inputs=("offers",),
    ),
    Stage(
        name="training_sample",
        version="4",
        summary="Draw the capped training sample, apart from everything in the evaluation set.",
        entry_point="ml.sampling.stages:write_training_sample",
        parameters=TrainingSampleParameters,
        inputs=("catalog_taxonomy", "migrated_labels", "evaluation_set"),
        partitioned_inputs=("offers",),
    ),
    Stage(
        name="teacher_checkpoint",
        version="6",
        summary="Fine-tune the large encoder on the labelled offers, beside a linear model.",
        entry_point="ml.learning.teacher:train_teacher",
        parameters=TeacherParameters,
        inputs=("training_sample", "catalog_taxonomy"),
        optional_inputs=("warm_start", "taxonomy_change"),
        heavy=True,
    ),
    Stage(
        name="teacher_labels",
        version="4",
        summary="Let the teacher label labelled and unlabelled offers (top-k logits).",
        entry_point="ml.learning.labelling:write_teacher_labels",
        parameters=TeacherLabelsParameters,
        inputs=("teacher_checkpoint", "training_sample"),
        heavy=True,
    ),
    Stage(
        name="fast_checkpoint",
        version="3",
        summary="Train the traditional model: n-grams and a linear classifier.",
        entry_point="ml.learning.fast_model:train_fast_model",
        parameters=FastModelParameters,
        inputs=("training_sample", "teacher_labels", "catalog_taxonomy"),
        heavy=True,
    ),
    Stage(
        name="student_checkpoint",
        version="5",
        summary="Distil the teacher into a small encoder.",
        entry_point="ml.learning.student:train_student",
        parameters=StudentParameters,
        inputs=("training_sample", "teacher_labels", "teacher_checkpoint", "catalog_taxonomy"),
        optional_inputs=("warm_start", "taxonomy_change"),
        heavy=True,
    ),
    Stage(
        name="encoder_comparison",
        version="2",
        summary="Train several encoders alike and compare quality, throughput and size.",
        entry_point="ml.learning.encoder_comparison:compare_encoders",
        parameters=EncoderComparisonParameters,
        inputs=("training_sample", "catalog_taxonomy"),
        heavy=True,
    ),
    Stage(
        name="hyperparameter_search",
        version="2",
        summary="Search for better parameters of teacher, student or fast model.",
        entry_point="ml.learning.hyperparameter_search:search_hyperparameters",
        parameters=HyperparameterSearchParameters,
        inputs=("training_sample", "catalog_taxonomy"),
        optional_inputs=("teacher_checkpoint", "teacher_labels"),
        heavy=True,
    ),
    Stage(
        name="student_evaluation",
        version="5",
        summary="Measure teacher, student, fast model and the version in production on the evaluation set.",
        entry_point="ml.evaluation.stage:evaluate_student",
        parameters=EvaluationParameters,
        inputs=(
            "evaluation_set",
            "catalog_taxonomy",
            "student_checkpoint",
            "teacher_checkpoint",
            "fast_checkpoint",
        ),
        optional_inputs=("training_sample", "production_model", "taxonomy_change"),
        heavy=True,
    ),
    Stage(
        name="mistakes_explained",
        version="1",
        summary="Say which words and which labelled offers led to the student's most confident mistakes.",
        entry_point="ml.explanation.mistakes:explain_mistakes",
        parameters=MistakesExplainedParameters,
        inputs=("student_evaluation", "evaluation_set", "student_checkpoint", "training_sample"),
        heavy=True,
    ),
    Stage(
        name="compiled_student",
        version="11",
        summary="Compile the student for a target, put the fast model before it, compare with the original.",
        entry_point="ml.serving.compilation:compile_student",
        parameters=CompileParameters,
        inputs=(
            "student_checkpoint",
            "fast_checkpoint",
            "training_sample",
            "evaluation_set",
            "catalog_taxonomy",
        ),
        heavy=True,
    ),
    Stage(
        name="renamed_student",
        version="1",
        summary="Give a compiled student the names of a newer taxonomy that differs in nothing else.",
        entry_point="ml.serving.renaming:rename_student",
        parameters=RenamedStudentParameters,
        inputs=("compiled_student", "student_checkpoint", "catalog_taxonomy"),
    ),
    Stage(
        name="serving_measurement",
        version="1",
        summary="Measure the compiled student on this machine: throughput, and latency over HTTP.",
        entry_point="ml.serving.measurement:measure_serving",
        parameters=ServingMeasurementParameters,
        inputs=("compiled_student", "student_checkpoint", "evaluation_set"),
        heavy=True,
    ),
    Stage(
        name="serving_benchmark",
        version="1",
        summary="Say what instances cost that serve the student, and which is the cheapest.",
        entry_point="ml.serving.benchmark:compare_serving",
        parameters=ServingBenchmarkParameters,
        inputs=("serving_measurement",),
    ),
    Stage(
        name="transform_input",
        version="2",
        summary="Prepare a day's clean offers for a bulk job, without those that captured answers cover.",
        entry_point="ml.serving.transform_input:write_transform_input",
        parameters=TransformInputParameters,
        inputs=("offers", "compiled_student"),
    ),
    Stage(
        name="catalogued_offers",
        version="2",
        summary="Catalogue the clean offers of a day through the endpoint.",
        entry_point="ml.serving.cataloguing:catalogue_offers",
        parameters=CataloguedOffersParameters,
        inputs=("offers", "compiled_student"),
        heavy=True,
    ),
    Stage(
        name="drift_reference",
        version="3",
        summary="Measure what is usual on the days that the serving model was trained on.",
        entry_point="ml.drift.reference:write_drift_reference",
        parameters=DriftReferenceParameters,
        inputs=("training_sample", "compiled_student"),
        partitioned_inputs=("offers",),
        heavy=True,
    ),
    Stage(
        name="drift_report",
        version="4",
        summary="Hold a day of catalogued offers against the reference, question by question.",
        entry_point="ml.drift.report:write_drift_report",
        parameters=DriftParameters,
        inputs=("catalogued_offers", "compiled_student", "offers", "drift_reference", "catalog_taxonomy"),
        optional_partitioned_inputs=("earlier",),
        heavy=True,
    ),
    Stage(
        name="corrections",
        version="1",
        summary="Read what people decided about offers later; what is wrong goes to quarantine.",
        entry_point="ml.quality.corrections:write_corrections",
        parameters=CorrectionsParameters,
        inputs=("catalog_taxonomy", "taxonomy_change"),
    ),
    Stage(
        name="live_quality",
        version="2",
        summary="Measure the categories that were given against what people decided later.",
        entry_point="ml.quality.live:write_live_quality",
        parameters=LiveQualityParameters,
        inputs=("corrections", "catalog_taxonomy", "taxonomy_change"),
        optional_partitioned_inputs=("offers", "catalogued_offers"),
        heavy=True,
    ),
)

SERVABLE = ("compiled_student", "renamed_student")
"""Kinds of artifact that catalogue offers; both are read alike."""

STAGES: dict[str, Stage] = {stage.name: stage for stage in _CATALOGUE}


def stage_named(name: str) -> Stage:
    """The stage of this name.

    Raises:
        InputError: there is none.
    """
    if name not in STAGES:
        raise InputError(f"there is no stage {name!r}; the stages are {', '.join(STAGES)}")
    return STAGES[name]
