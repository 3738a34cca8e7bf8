"""Choosing an encoder and parameters: by hand, no release waits for it, and nothing is applied by itself."""

from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
from pydantic import Field

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from ml.stages import STAGES, HyperparameterSearchParameters
from offer_assets import policies
from offer_assets.metadata import materialization, picture, table
from offer_assets.partitions import SEARCHED_MODELS
from offer_assets.plan import TrainingPlan, setting_lines
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.failures import input_errors_fail_plainly
from resources.tracking import Part, Tracking

_BY_DEFAULT = {field.name: field.default for field in msgspec.structs.fields(HyperparameterSearchParameters)}


class EncodersToCompare(dg.Config):
    """What is compared: the launchpad shows it."""

    encoders: list[str] = Field(
        default=[],
        description="Encoders as for the teacher (packaged-minilm, a hub id, a local folder), each perhaps "
        "with the layers to keep: packaged-minilm:3. Empty: those of OFFER_ASSETS_ENCODERS_COMPARED.",
    )
    attempt: int = Field(default=1, ge=1, description="Another number measures again what did not change.")


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"pytorch", "huggingface"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["encoder_comparison"].version,
)
def encoder_comparison(
    context: dg.AssetExecutionContext,
    config: EncodersToCompare,
    training_sample: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """Encoders trained alike: quality on validation offers against throughput and size."""
    result = compute.run(
        context,
        "encoder_comparison",
        {
            "training_sample": training_sample,
            "catalog_taxonomy": compute.origin(training_sample, "catalog_taxonomy"),
        },
        plan.encoder_comparison(config.encoders, config.attempt),
    )
    folder = compute.folder(result.ref)
    rows = _read(folder / "encoders.json", list[dict[str, Any]])
    training = result.manifest.parameters["training"]
    tracking.record(result.manifest, result.ref, parts=[_encoder_run(row, training) for row in rows])
    return materialization(
        result,
        metadata={
            "verdict": result.manifest.metrics["sentence"],
            "quality_over_throughput": picture((folder / "quality_over_throughput.png").read_bytes()),
            "table": table(rows),
            "machine": result.manifest.metrics["machine"],
        },
    )


class SearchEffort(dg.Config):
    """How much is tried: the launchpad shows it."""

    trials: int = Field(
        default=_BY_DEFAULT["trials"],
        ge=1,
        description="Trainings at most; those that are given up early count.",
    )
    minutes: float = Field(
        default=_BY_DEFAULT["budget_seconds"] / 60,
        ge=0,
        description="No training begins once they took so long together; 0: no limit.",
    )
    searched: list[str] = Field(
        default=[],
        description="Parameters that vary. Empty: those that ml/learning/search_space.py proposes.",
    )
    seed: int = Field(default=_BY_DEFAULT["seed"], ge=0, description="Of what is tried.")


@dg.asset(
    deps=["training_sample", "teacher_labels"],
    partitions_def=SEARCHED_MODELS,
    group_name=policies.TRAINING,
    kinds={"optuna", "parquet"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["hyperparameter_search"].version,
)
def hyperparameter_search(
    context: dg.AssetExecutionContext,
    config: SearchEffort,
    compute: Compute,
    artifact_store: ArtifactStore,
    tracking: Tracking,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """Better parameters for the teacher, the student or the fast model, as lines for the settings."""
    model = context.partition_key
    parameters = plan.hyperparameter_search(
        model, config.searched, config.trials, config.minutes, config.seed
    )
    result = compute.run(
        context, "hyperparameter_search", _inputs_of(model, compute, artifact_store), parameters
    )
    folder = compute.folder(result.ref)
    trials = _read(folder / "trials.json", list[dict[str, Any]])
    tracking.record(result.manifest, result.ref, parts=[_trial_run(trial) for trial in trials])
    return materialization(
        result,
        metadata={
            "verdict": result.manifest.metrics["sentence"],
            "settings": _settings_text(model, result.manifest.metrics),
            **{path.stem: picture(path.read_bytes()) for path in sorted(folder.glob("*.png"))},
            "trials_table": table([_trial_row(trial) for trial in trials]),
        },
    )


@input_errors_fail_plainly()
def _inputs_of(model: str, compute: Compute, store: ArtifactStore) -> dict[str, ArtifactRef]:
    """What a training of the model needs, all of one training: labels lead to their teacher and sample.

    Raises:
        InputFailure: it was not made yet.
    """
    needed = "training_sample" if model == "teacher" else "teacher_labels"
    newest = store.read_pointer(needed)
    if newest is None:
        raise InputError(
            f"a search of the {model} needs {needed}, which has not been materialized: train first"
        )
    if model == "teacher":
        return {
            "training_sample": newest,
            "catalog_taxonomy": compute.origin(newest, "catalog_taxonomy"),
        }
    return {
        "teacher_labels": newest,
        "teacher_checkpoint": compute.origin(newest, "teacher_checkpoint"),
        "training_sample": compute.origin(newest, "training_sample"),
        "catalog_taxonomy": compute.origin(newest, "training_sample", "catalog_taxonomy"),
    }


def _settings_text(model: str, metrics: dict[str, Any]) -> dg.MarkdownMetadataValue:
    """The winner as lines for ``.env``, and what of it cannot be set."""
    prefix = "best/"
    chosen = {name.removeprefix(prefix): metrics[name] for name in metrics if name.startswith(prefix)}
    lines, without = setting_lines(model, chosen)
    text = "\n".join(["```", *lines, "```"]) if lines else "none of the parameters has a setting"
    if without:
        others = ", ".join(f"{name} = {chosen[name]}" for name in without)
        text += f"\n\nWithout a setting (a default in ml/stages.py): {others}"
    return dg.MetadataValue.md(text)


def _encoder_run(row: dict[str, Any], training: dict[str, Any]) -> Part:
    return Part(
        name=row["name"],
        parameters={"encoder": row["name"], **training},
        metrics={name: row[name] for name in row if name not in ("name", "reason")},
        seconds=row["training_seconds"] or 0.0,
        failed=bool(row["reason"]),
        note=row["reason"],
    )


def _trial_run(trial: dict[str, Any]) -> Part:
    figures = ("mean_weighted_f1", "macro_f1", "accuracy", "last_weighted_f1")
    return Part(
        name=f"trial {trial['number'] + 1}",
        parameters=trial["parameters"],
        metrics={name: trial[name] for name in figures},
        learning_curve=[{"step": step, "weighted_f1": value} for step, value in trial["curve"]],
        seconds=trial["seconds"],
        failed=trial["state"] == "refused",
        note=trial["reason"] or trial["state"],
    )


def _trial_row(trial: dict[str, Any]) -> dict[str, Any]:
    shown = ("state", "mean_weighted_f1", "last_weighted_f1", "seconds", "reason")
    # As text: a learning rate of 0.00002 is more than four digits.
    values = {name: f"{value:.4g}" for name, value in trial["parameters"].items()}
    return {"trial": trial["number"] + 1, **values, **{name: trial[name] for name in shown}}


def _read(path: Path, kind: Any) -> Any:
    return msgspec.json.decode(path.read_bytes(), type=kind)
