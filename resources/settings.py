"""All settings, from environment variables (and ``.env``), checked before anything starts.

``.env.example`` lists them for people; a test holds it against this class.
"""

from __future__ import annotations

import datetime
import difflib
import glob
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

import msgspec
from dotenv import dotenv_values
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import SettingsConfigDict

from ml.demo import OFFERS_PER_DAY
from ml.errors import InputError
from ml.learning.encoder_files import PACKAGED_ENCODER, split_layers
from ml.stages import (
    FastModelParameters,
    LabellingModel,
    Parameters,
    Pooling,
    Precision,
    ServingBenchmarkParameters,
    StudentParameters,
    TeacherParameters,
    TrainingSampleParameters,
)
from resources.aws_settings import AwsSettings
from resources.redaction import without_secrets

DEFAULT_CHECKS = "default"
"""Stands among the checks of ``OFFER_ASSETS_RETRAIN_ON_DRIFT`` for those that a new training can mend."""

_ENV_FILE = ".env"
_PREFIX = "OFFER_ASSETS_"
_TRACKING_SCHEMES = (
    "http",
    "https",
    "sqlite",
    "postgresql",
    "postgresql+psycopg2",
    "mysql",
    "mysql+pymysql",
    "arn",
)
_SAGEMAKER_MLFLOW = re.compile(
    r"^arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:mlflow-(tracking-server|app)/[\w-]+$"
)

_PLAINER = {
    "date_from_datetime_parsing": "must be an ISO date such as 2026-11-01",
    "int_parsing": "must be a whole number",
    "string_pattern_mismatch": "must have neither spaces nor / or :",
}
"""What pydantic says less plainly, by its name for the error."""


class SettingsError(InputError):
    """A setting is missing, wrong or contradicts another; the message names it in one line."""


def _default(parameters: type[Parameters], name: str) -> Any:
    """Default of a stage parameter: the stage's own is the only one."""
    return next(field.default for field in msgspec.structs.fields(parameters) if field.name == name)


def _existing_feed(value: str) -> str:
    """A URI as it is; a local file, folder or glob as an absolute path, which must lead to something."""
    path = local_path(value)
    if path is None:
        return value
    pattern_leads_somewhere = any(glob.iglob(path, recursive=True))  # noqa: PTH207 (it is absolute)
    if not Path(path).exists() and not pattern_leads_somewhere:
        raise ValueError(f"points nowhere: nothing matches {path}")
    return path


def _existing_file_or_folder(value: str) -> str:
    """A URI as it is; a local path as an absolute one, which must exist."""
    path = local_path(value)
    if path is None:
        return value
    if not Path(path).exists():
        raise ValueError(f"points nowhere: there is no file or folder {path}")
    return path


def _existing_encoder(value: str) -> str:
    """A name, hub id or URI as it is; what is plainly a path must be a folder and becomes absolute."""
    path = local_path(value)
    if path is None or not (value.startswith((".", "/", "~", "file:")) or Path(path).is_dir()):
        return value
    if not Path(path, "config.json").is_file():
        raise ValueError(f"points nowhere: {path} is not a folder with an encoder (it has no config.json)")
    return path


def _encoders_to_compare(value: str) -> str:
    """Encoders, perhaps with the layers that are kept, separated by commas; local ones become absolute."""
    choices = []
    for text in filter(None, map(str.strip, value.split(","))):
        try:
            encoder, layers = split_layers(text)
        except InputError as error:
            raise ValueError(str(error)) from None
        encoder = _existing_encoder(encoder)
        choices.append(f"{encoder}:{layers}" if layers else encoder)
    return ",".join(dict.fromkeys(choices))


def _existing_file(value: str) -> str:
    """An absolute path, which must be a file; empty stays empty."""
    path = local_path(value)
    if value and (path is None or not Path(path).is_file()):
        raise ValueError(f"points nowhere: there is no file {path or value}")
    return path or ""


def _absolute_folder(value: Path) -> Path:
    folder = value.expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"must be a folder, but {folder} is a file")
    return folder


def _known_tracking_uri(value: str) -> str:
    if value and value.split(":", maxsplit=1)[0] not in _TRACKING_SCHEMES:
        raise ValueError("must be a URI such as https://mlflow.example.com or sqlite:////data/mlflow.db")
    if value.startswith("arn:") and not _SAGEMAKER_MLFLOW.match(value):
        raise ValueError(
            "must be the ARN of MLflow in SageMaker, such as "
            "arn:aws:sagemaker:eu-central-1:123456789012:mlflow-tracking-server/offer-assets"
        )
    return value


def _page_address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError("must be an address such as http://localhost:3000")
    if "@" in parts.netloc:
        raise ValueError("must have no user and password: it is a part of every message")
    return value.rstrip("/")


def _known_checks(value: str) -> str:
    """Names of checks, separated by commas; each must exist."""
    given = [name.strip() for name in value.split(",") if name.strip()]
    known = [DEFAULT_CHECKS, *monitoring_checks()] if given else []
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"names no check of monitoring: {name!r}; did you mean {nearest}? "
                f"There are {', '.join(known)}"
            )
    return ",".join(dict.fromkeys(given))


Encoder = Annotated[str, AfterValidator(_existing_encoder)]


class Settings(AwsSettings):
    """Everything that can be set, with its environment variable (the alias) and its default."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_file=_ENV_FILE,
        env_ignore_empty=True,
        case_sensitive=True,
        extra="ignore",
        populate_by_name=True,
    )

    offer_feed: Annotated[str, AfterValidator(_existing_feed)] = Field(
        default="",
        validation_alias="OFFER_FEED",
        description="Offer feed: file, folder, glob or URI (Parquet, CSV, JSON lines, also gzipped). "
        "Empty: the embedded demo feed.",
    )
    catalog_taxonomy: Annotated[str, AfterValidator(_existing_file_or_folder)] = Field(
        default="",
        validation_alias="CATALOG_TAXONOMY",
        description="Catalog taxonomy of that feed: a file, a folder of versions, an http(s) URL or an S3 "
        "prefix; CSV (category_id,parent_id,name[,name_<locale>...]), Google's or Shopify's text.",
    )
    corrections_feed: Annotated[str, AfterValidator(_existing_feed)] = Field(
        default="",
        validation_alias="CORRECTIONS_FEED",
        description="What people decided about offers later: file, folder, glob or URI with offer_id, "
        "category_id, decided_at (formats as of the offer feed). Empty: none; the demo feed has its own.",
    )
    home: Annotated[Path, AfterValidator(_absolute_folder)] = Field(
        default=Path(".offer_assets"),
        validation_alias="OFFER_ASSETS_HOME",
        validate_default=True,
        description="Folder of the artifacts, of Dagster's state and of the experiment tracking.",
    )
    environment: Literal["local", "aws"] = Field(
        default="local",
        validation_alias="OFFER_ASSETS_ENV",
        description="Where it runs: local (this machine) or aws.",
    )
    first_day: datetime.date = Field(
        default=datetime.date(2026, 11, 1),
        validation_alias="OFFER_ASSETS_FIRST_DAY",
        description="First daily partition (ISO date); older offers are not read.",
    )
    demo_days: int = Field(
        default=3,
        ge=1,
        validation_alias="OFFER_ASSETS_DEMO_DAYS",
        description="Days of the demo feed.",
    )
    demo_offers_per_day: int = Field(
        default=OFFERS_PER_DAY,
        ge=1,
        validation_alias="OFFER_ASSETS_DEMO_OFFERS_PER_DAY",
        description="Offers on each day of the demo feed.",
    )
    demo_seed: int = Field(
        default=17,
        ge=0,
        validation_alias="OFFER_ASSETS_DEMO_SEED",
        description="Seed of the demo feed: the same seed gives the same offers.",
    )
    split_by: Literal["product", "shop"] = Field(
        default=_default(TrainingSampleParameters, "split_by"),
        validation_alias="OFFER_ASSETS_SPLIT_BY",
        description="What must not be on both sides of the evaluation split: product or shop.",
    )
    labelled_offers: int = Field(
        default=_default(TrainingSampleParameters, "labelled"),
        ge=1,
        validation_alias="OFFER_ASSETS_LABELLED_OFFERS",
        description="At most this many labelled offers in the training sample.",
    )
    unlabelled_offers: int = Field(
        default=_default(TrainingSampleParameters, "unlabelled"),
        ge=0,
        validation_alias="OFFER_ASSETS_UNLABELLED_OFFERS",
        description="At most this many unlabelled offers in the training sample.",
    )
    cap_per_category: int = Field(
        default=_default(TrainingSampleParameters, "cap_per_category"),
        ge=1,
        validation_alias="OFFER_ASSETS_CAP_PER_CATEGORY",
        description="At most this many labelled offers of one category in the training sample.",
    )
    encoder: Encoder = Field(
        default=_default(TeacherParameters, "encoder"),
        validation_alias="OFFER_ASSETS_ENCODER",
        description="Teacher's encoder: packaged-minilm, a hub id, a local folder or an S3 prefix, "
        "e.g. intfloat/multilingual-e5-large-instruct.",
    )
    instruction: str = Field(
        default=_default(TeacherParameters, "instruction"),
        validation_alias="OFFER_ASSETS_INSTRUCTION",
        description="Put before every text, as instruction-tuned encoders want it.",
    )
    max_tokens: int = Field(
        default=_default(TeacherParameters, "max_tokens"),
        ge=8,
        le=512,
        validation_alias="OFFER_ASSETS_MAX_TOKENS",
        description="The teacher cuts longer offer texts to this many tokens (8 to 512).",
    )
    teacher_epochs: int = Field(
        default=_default(TeacherParameters, "epochs"),
        ge=1,
        validation_alias="OFFER_ASSETS_TEACHER_EPOCHS",
        description="Teacher's passes over the labelled offers.",
    )
    teacher_learning_rate: float = Field(
        default=_default(TeacherParameters, "learning_rate"),
        gt=0,
        validation_alias="OFFER_ASSETS_TEACHER_LEARNING_RATE",
        description="Peak learning rate of the teacher's encoder (hyperparameter_search looks for it).",
    )
    teacher_token_dropout: float = Field(
        default=_default(TeacherParameters, "token_dropout"),
        ge=0,
        lt=1,
        validation_alias="OFFER_ASSETS_TEACHER_TOKEN_DROPOUT",
        description="Share of a text's tokens that a training step of the teacher hides, others every time.",
    )
    pretraining_epochs: int = Field(
        default=_default(TeacherParameters, "pretraining_epochs"),
        ge=0,
        validation_alias="OFFER_ASSETS_PRETRAINING_EPOCHS",
        description="Teacher's passes over all offers, labelled or not, before it sees a label; 0: none.",
    )
    pseudo_label_epochs: int = Field(
        default=_default(TeacherParameters, "pseudo_label_epochs"),
        ge=0,
        validation_alias="OFFER_ASSETS_PSEUDO_LABEL_EPOCHS",
        description="Teacher's passes of a second training, on its own confident guesses too; 0: none.",
    )
    lora_rank: int = Field(
        default=_default(TeacherParameters, "lora_rank"),
        ge=0,
        validation_alias="OFFER_ASSETS_LORA_RANK",
        description="Rank of the low-rank adapters that the teacher's encoder is trained by; 0: all weights "
        "are trained.",
    )
    cold_categories: bool = Field(
        default=_default(TeacherParameters, "cold_categories"),
        validation_alias="OFFER_ASSETS_COLD_CATEGORIES",
        description="Whether leaves of the taxonomy without a labelled offer can be answers too, by their "
        "names alone (true, false).",
    )
    cold_loss: float = Field(
        default=_default(TeacherParameters, "cold_loss"),
        ge=0,
        le=1,
        validation_alias="OFFER_ASSETS_COLD_LOSS",
        description="Accuracy on validation offers that leaves without a labelled offer may cost the others.",
    )
    student_encoder: Encoder = Field(
        default=_default(StudentParameters, "encoder"),
        validation_alias="OFFER_ASSETS_STUDENT_ENCODER",
        description="Student's encoder: teacher (layers of the fine-tuned teacher), or as for the teacher, "
        "e.g. microsoft/Multilingual-MiniLM-L12-H384.",
    )
    student_layers: int = Field(
        default=_default(StudentParameters, "layers"),
        ge=1,
        validation_alias="OFFER_ASSETS_STUDENT_LAYERS",
        description="Encoder layers that the student keeps.",
    )
    student_pooling: Pooling = Field(
        default=_default(StudentParameters, "pooling"),
        validation_alias="OFFER_ASSETS_STUDENT_POOLING",
        description="query: the student's last layer computes one vector per text, for encoders with layers "
        "like BERT's; mean: one per token, which takes longer.",
    )
    student_distilled_from: LabellingModel = Field(
        default=_default(StudentParameters, "distilled_from"),
        validation_alias="OFFER_ASSETS_STUDENT_DISTILLED_FROM",
        description="Whose word the student learns: encoder (of the teacher, alone) or teacher (with its "
        "linear model, which the fast model then brings a second time).",
    )
    student_max_tokens: int = Field(
        default=_default(StudentParameters, "max_tokens"),
        ge=8,
        le=512,
        validation_alias="OFFER_ASSETS_STUDENT_MAX_TOKENS",
        description="The student cuts longer offer texts to this many tokens (8 to 512).",
    )
    student_epochs: int = Field(
        default=_default(StudentParameters, "epochs"),
        ge=1,
        validation_alias="OFFER_ASSETS_STUDENT_EPOCHS",
        description="Student's passes over labelled and unlabelled offers.",
    )
    student_learning_rate: float = Field(
        default=_default(StudentParameters, "learning_rate"),
        gt=0,
        validation_alias="OFFER_ASSETS_STUDENT_LEARNING_RATE",
        description="Peak learning rate of the student's encoder.",
    )
    student_token_dropout: float = Field(
        default=_default(StudentParameters, "token_dropout"),
        ge=0,
        lt=1,
        validation_alias="OFFER_ASSETS_STUDENT_TOKEN_DROPOUT",
        description="Share of a text's tokens that a training step of the student hides, others every time.",
    )
    student_label_weight: float = Field(
        default=_default(StudentParameters, "label_weight"),
        ge=0,
        le=1,
        validation_alias="OFFER_ASSETS_STUDENT_LABEL_WEIGHT",
        description="What labels count beside the teacher's word when the student learns (0 to 1).",
    )
    fast_regularisation: float = Field(
        default=_default(FastModelParameters, "regularisation"),
        gt=0,
        validation_alias="OFFER_ASSETS_FAST_REGULARISATION",
        description="The fast model's C: the larger, the closer it follows its training offers.",
    )
    encoders_compared: Annotated[str, AfterValidator(_encoders_to_compare)] = Field(
        default=f"{PACKAGED_ENCODER},{PACKAGED_ENCODER}:3,{PACKAGED_ENCODER}:1",
        validation_alias="OFFER_ASSETS_ENCODERS_COMPARED",
        description="Encoders that encoder_comparison compares, separated by commas; each as for the "
        "teacher, and perhaps with the number of layers to keep, e.g. packaged-minilm:3.",
    )
    training_precision: Precision = Field(
        default=_default(TeacherParameters, "precision"),
        validation_alias="OFFER_ASSETS_TRAINING_PRECISION",
        description="What teacher and student are trained in: bfloat16 (mixed precision), float32, or auto: "
        "bfloat16 where GPU or CPU multiplies it fast.",
    )
    devices: int = Field(
        default=_default(TeacherParameters, "devices"),
        ge=0,
        validation_alias="OFFER_ASSETS_DEVICES",
        description="Processes on each machine that share the teacher's and the student's work, one per GPU. "
        "0: as many as it has GPUs; without a GPU, one.",
    )
    warm_start: bool = Field(
        default=True,
        validation_alias="OFFER_ASSETS_WARM_START",
        description="After a change of the taxonomy, train on from the model in production (false: afresh).",
    )
    warm_teacher_epochs: int = Field(
        default=1,
        ge=1,
        validation_alias="OFFER_ASSETS_WARM_TEACHER_EPOCHS",
        description="Teacher's passes when it starts from the model in production.",
    )
    warm_student_epochs: int = Field(
        default=1,
        ge=1,
        validation_alias="OFFER_ASSETS_WARM_STUDENT_EPOCHS",
        description="Student's passes when it starts from the model in production.",
    )
    taxonomy_settle_seconds: float = Field(
        default=60.0,
        ge=0,
        validation_alias="OFFER_ASSETS_TAXONOMY_SETTLE_SECONDS",
        description="A new release of the taxonomy must be unchanged for so long before it is followed.",
    )
    taxonomy_max_removed_share: float = Field(
        default=0.3,
        ge=0,
        le=1,
        validation_alias="OFFER_ASSETS_TAXONOMY_MAX_REMOVED_SHARE",
        description="A release that removes more of the categories, not saying where they went, is refused.",
    )
    approval: Literal["automatic", "required"] = Field(
        default="automatic",
        validation_alias="OFFER_ASSETS_APPROVAL",
        description="Whether what passed the gate is served at once (automatic) or a person decides.",
    )
    retrain_on_drift: Annotated[str, AfterValidator(_known_checks)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_RETRAIN_ON_DRIFT",
        description="Checks of drift_report and live_quality, separated by commas, whose lasting ERROR "
        "starts a training; default: those that a training can mend. Empty: never.",
    )
    retrain_after_days: int = Field(
        default=2,
        ge=1,
        le=28,
        validation_alias="OFFER_ASSETS_RETRAIN_AFTER_DAYS",
        description="On so many days in a row, the newest, such a check must be ERROR.",
    )
    retrain_cooldown_days: int = Field(
        default=7,
        ge=1,
        validation_alias="OFFER_ASSETS_RETRAIN_COOLDOWN_DAYS",
        description="Days from one such training to the next; drift that lasts meanwhile is told to people.",
    )
    alert_routes: Annotated[str, AfterValidator(_existing_file)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_ALERT_ROUTES",
        description="TOML file that says which alerts go to Slack, e-mail, webhooks or PagerDuty "
        "(alerts.example.toml shows all). Empty: alerts stay in the outbox and the UI.",
    )
    ui_url: Annotated[str, AfterValidator(_page_address)] = Field(
        default="http://localhost:3000",
        validation_alias="OFFER_ASSETS_UI_URL",
        description="Where people find the Dagster UI: links of alerts begin with it.",
    )
    endpoint_port: int = Field(
        default=8765,
        ge=1,
        le=65535,
        validation_alias="OFFER_ASSETS_ENDPOINT_PORT",
        description="Port of the local endpoint.",
    )
    endpoint_workers: int = Field(
        default=2,
        ge=1,
        validation_alias="OFFER_ASSETS_ENDPOINT_WORKERS",
        description="Worker processes of the local endpoint, one thread each.",
    )
    canary_percent: int = Field(
        default=10,
        ge=1,
        le=50,
        validation_alias="OFFER_ASSETS_CANARY_PERCENT",
        description="Share of the requests that a new version gets at first, beside the one before.",
    )
    canary_seconds: int = Field(
        default=0,
        ge=0,
        le=3600,
        validation_alias="OFFER_ASSETS_CANARY_SECONDS",
        description="So long alarms watch a new version before it gets all requests; one that trips brings "
        "the version before back. 0: it gets all at once (aws: and is watched afterwards).",
    )
    alarm_error_percent: float = Field(
        default=1.0,
        gt=0,
        le=100,
        validation_alias="OFFER_ASSETS_ALARM_ERROR_PERCENT",
        description="Alarm of a roll-out: more of the requests than this end in a server error (5xx).",
    )
    alarm_p99_milliseconds: int = Field(
        default=2_000,
        ge=1,
        validation_alias="OFFER_ASSETS_ALARM_P99_MILLISECONDS",
        description="Alarm of a roll-out: one request in a hundred takes longer than this.",
    )
    alarm_low_confidence_percent: float = Field(
        default=60.0,
        gt=0,
        le=100,
        validation_alias="OFFER_ASSETS_ALARM_LOW_CONFIDENCE_PERCENT",
        description="Alarm of a roll-out: of more offers than this the model is less than half sure.",
    )
    device_reports: str = Field(
        default="",
        validation_alias="OFFER_ASSETS_DEVICE_REPORTS",
        description="Reports that python -m ml device-report wrote on other hosts: a folder or an S3 prefix. "
        "Empty: device-reports in OFFER_ASSETS_HOME.",
    )
    prices: Annotated[str, AfterValidator(_existing_file)] = Field(
        default="",
        validation_alias="OFFER_ASSETS_PRICES",
        description="TOML file with what instances cost and have, for serving_benchmark. Empty: "
        "ml/serving/prices.toml, which is one to start from, not to rely on.",
    )
    peak_offers_per_second: float = Field(
        default=_default(ServingBenchmarkParameters, "peak_offers_per_second"),
        gt=0,
        validation_alias="OFFER_ASSETS_PEAK_OFFERS_PER_SECOND",
        description="Load that serving_benchmark finds instances for; they bear it with one of them missing.",
    )
    mlflow_tracking_uri: Annotated[str, AfterValidator(_known_tracking_uri)] = Field(
        default="",
        validation_alias="MLFLOW_TRACKING_URI",
        description="MLflow server or database. Empty: an SQLite file in OFFER_ASSETS_HOME.",
    )
    model_name: str = Field(
        default="offer-categories",
        pattern=r"^[^/:\s]+$",
        validation_alias="OFFER_ASSETS_MODEL_NAME",
        description="Name of the model in the registry.",
    )

    @classmethod
    def from_environment(cls) -> Self:
        """Read and check all settings, and the files with alert routes, jobs and prices that they name.

        Raises:
            SettingsError: one line that names the variable, its value and what is expected.
        """
        _reject_unknown(cls)
        try:
            settings = cls()
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(cls, each) for each in error.errors())) from None
        _check_routes(settings.alert_routes)
        _check_jobs(settings.aws_jobs)
        _check_prices(settings.prices)
        return settings

    @property
    def is_demo(self) -> bool:
        """Whether the offers come from the embedded demo feed."""
        return not self.offer_feed

    @property
    def tracking_uri(self) -> str:
        """Where MLflow keeps runs and models, with the default filled in."""
        return self.mlflow_tracking_uri or f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def device_reports_location(self) -> str:
        """Where reports of devices lie, with the default filled in; a local path is absolute."""
        return local_path(self.device_reports) or self.device_reports or str(self.home / "device-reports")

    @property
    def checks_that_retrain(self) -> tuple[str, ...]:
        """Names of the checks, and perhaps ``default``; empty where drift starts no training."""
        return tuple(self.retrain_on_drift.split(",")) if self.retrain_on_drift else ()

    @property
    def region(self) -> str:
        """AWS region, with the usual variables in place of an empty setting."""
        given = variables()
        return self.aws_region or given.get("AWS_REGION", "") or given.get("AWS_DEFAULT_REGION", "")

    @model_validator(mode="after")
    def _aws_has_what_it_needs(self) -> Self:
        if self.environment != "aws":
            return self
        needed = {
            "OFFER_ASSETS_AWS_STORE": self.aws_store,
            "OFFER_ASSETS_AWS_REGION": self.region,
            "OFFER_ASSETS_AWS_ROLE": self.aws_role,
            "OFFER_ASSETS_AWS_TRAINING_IMAGE": self.aws_training_image,
            "OFFER_ASSETS_AWS_SERVING_IMAGE": self.aws_serving_image,
            "OFFER_ASSETS_POSTGRES_URL": self.postgres_url,
            "MLFLOW_TRACKING_URI": self.mlflow_tracking_uri,
        }
        if missing := [name for name, value in needed.items() if not value]:
            raise ValueError(
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: OFFER_ASSETS_ENV=aws "
                "needs all of them; .env.example says what each is"
            )
        return self

    @model_validator(mode="after")
    def _instances_and_network_fit_together(self) -> Self:
        if self.aws_endpoint_min_instances > self.aws_endpoint_max_instances:
            raise ValueError(
                f"OFFER_ASSETS_AWS_ENDPOINT_MIN_INSTANCES={self.aws_endpoint_min_instances} is more than "
                f"OFFER_ASSETS_AWS_ENDPOINT_MAX_INSTANCES={self.aws_endpoint_max_instances}"
            )
        if bool(self.aws_subnets) != bool(self.aws_security_groups):
            given, missing = "SUBNETS", "SECURITY_GROUPS"
            if not self.aws_subnets:
                given, missing = missing, given
            raise ValueError(
                f"OFFER_ASSETS_AWS_{missing} is missing: OFFER_ASSETS_AWS_{given} is set, a VPC needs both"
            )
        return self

    @model_validator(mode="after")
    def _feed_and_taxonomy_belong_together(self) -> Self:
        if bool(self.offer_feed) != bool(self.catalog_taxonomy):
            given, missing = ("OFFER_FEED", "CATALOG_TAXONOMY")
            if not self.offer_feed:
                given, missing = missing, given
            raise ValueError(
                f"{missing} is missing: {given} is set, and the offers and their taxonomy belong together; "
                "set both, or neither for the demo feed"
            )
        return self

    @model_validator(mode="after")
    def _corrections_are_of_the_feed(self) -> Self:
        if self.corrections_feed and self.is_demo:
            raise ValueError(
                "OFFER_FEED is missing: CORRECTIONS_FEED is set, and the demo feed has corrections of its "
                "own; set OFFER_FEED and CATALOG_TAXONOMY too, or unset CORRECTIONS_FEED"
            )
        return self

    @model_validator(mode="after")
    def _cool_down_lasts_until_drift_can_be_seen_again(self) -> Self:
        if self.retrain_on_drift and self.retrain_cooldown_days < self.retrain_after_days:
            raise ValueError(
                f"OFFER_ASSETS_RETRAIN_COOLDOWN_DAYS={self.retrain_cooldown_days} is less than "
                f"OFFER_ASSETS_RETRAIN_AFTER_DAYS={self.retrain_after_days}: it would be over before anybody "
                "could tell whether the training helped"
            )
        return self


def variables() -> dict[str, str]:
    """Variables of the environment and of ``.env``; what the environment says wins."""
    in_file = {name: value or "" for name, value in dotenv_values(_ENV_FILE).items()}
    return {**in_file, **os.environ}


def monitoring_checks() -> list[str]:
    """Names of the checks of ``drift_report`` and ``live_quality``."""
    from ml.drift import questions as drift
    from ml.quality import questions as quality

    return [question.name for question in (*drift.QUESTIONS, *quality.QUESTIONS)]


def local_path(source: str) -> str | None:
    """Absolute local path (or glob) that ``source`` means; None where it is empty or a remote URI."""
    if not source:
        return None
    if source.startswith("file:"):
        return unquote(urlsplit(source).path)
    if "://" in source:
        return None
    return str(Path(source).expanduser().absolute())


def _reject_unknown(settings: type[Settings]) -> None:
    """A misspelt setting must not be silently ignored."""
    known = _variables(settings)
    for name in sorted(variables()):
        if name.startswith(_PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            # Without its value: it may be a secret that alert routes name.
            raise SettingsError(
                f"{name} is not a setting; did you mean {nearest}? (.env.example lists all; a secret that "
                f"alert routes name must not begin with {_PREFIX})"
            )


def _check_routes(file: str) -> None:
    """Routes that cannot be read are told now, and not when the first alert is to be sent."""
    if not file:
        return
    from resources.alert_routes import read_routes

    try:
        read_routes(file, variables())
    except InputError as error:
        raise SettingsError(f"OFFER_ASSETS_ALERT_ROUTES: {error}") from None


def _check_jobs(file: str) -> None:
    """As for the routes: a plan that cannot be read is told now, and not when the first job is to start."""
    from resources.job_plan import read_plan

    try:
        read_plan(file)
    except InputError as error:
        raise SettingsError(f"OFFER_ASSETS_AWS_JOBS: {error}") from None


def _check_prices(file: str) -> None:
    """As for the routes."""
    from ml.serving.prices import read_prices

    try:
        read_prices(file)
    except InputError as error:
        raise SettingsError(f"OFFER_ASSETS_PRICES: {error}") from None


def _variables(settings: type[Settings]) -> list[str]:
    return [str(field.validation_alias) for field in settings.model_fields.values()]


def _explain(settings: type[Settings], error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if not error["loc"]:
        return str(message)
    name = str(error["loc"][0])
    variable = name if name not in settings.model_fields else settings.model_fields[name].validation_alias
    message = _PLAINER.get(error["type"], message)
    return without_secrets(f"{variable}={error['input']} {message}")
