"""The student, compiled for the hardware that serves it: one partition per target."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef
from ml.evaluation import gate
from ml.serving.neuron import DEVICE_FAMILY, REFERENCE, SDK_VERSION
from ml.stages import STAGES, CompileParameters
from offer_assets import policies
from offer_assets.checks import check_result, partitioned_check
from offer_assets.metadata import MetadataMapping, materialization, picture, table
from offer_assets.partitions import COMPILE_TARGETS, NEURON
from offer_assets.taxonomy import taxonomy_in_force
from resources.compute import Compute
from resources.device_reports import DeviceReports
from resources.tracking import Tracking


@dg.asset(
    partitions_def=COMPILE_TARGETS,
    group_name=policies.RELEASE,
    kinds={"onnx"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["compiled_student"].version,
)
def compiled_student(
    context: dg.AssetExecutionContext,
    student_checkpoint: ArtifactRef,
    fast_checkpoint: ArtifactRef,
    training_sample: ArtifactRef,
    evaluation_set: ArtifactRef,
    taxonomy_change: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
) -> dg.MaterializeResult:
    """Servable model: the fastest exact graph for `cpu`, bf16 programs for `neuron` (AWS Inferentia 2).

    The fast model stands before it and answers what it is sure of.
    """
    result = compute.run(
        context,
        "compiled_student",
        {
            "student_checkpoint": student_checkpoint,
            "fast_checkpoint": fast_checkpoint,
            "training_sample": training_sample,
            "evaluation_set": evaluation_set,
            "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
        },
        CompileParameters(
            target=context.partition_key, sdk=SDK_VERSION if context.partition_key == NEURON else ""
        ),
    )
    tracking.record(result.manifest, result.ref)
    metrics = result.ref.metrics
    return materialization(
        result, metadata=_backends(metrics) | _cascade_metadata(compute.folder(result.ref), metrics)
    )


def _backends(metrics: Mapping[str, Any]) -> MetadataMapping:
    """For `cpu`, the backend that was taken and every one that was tried."""
    if "backend" not in metrics:
        return {}
    return {
        "backend": metrics["backend"],
        "backend_reason": metrics["backend_reason"],
        "backend_candidates": table(metrics["backend_candidates"]),
    }


def _cascade_metadata(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Thresholds by country, and what they cost."""
    from ml.evaluation.cascade import cascade_pictures
    from ml.serving.cascade import CascadeSettings

    thresholds = [
        {"country": country or "all others", **msgspec.to_builtins(threshold)}
        for country, threshold in CascadeSettings.read(folder).thresholds.items()
    ]
    pictures = cascade_pictures(_of_what_ran(metrics))
    return {
        "thresholds": table(thresholds),
        **{name: picture(content) for name, content in pictures.items()},
    }


def _of_what_ran(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics by one name each, those of a reference beside those of a model that ran itself."""
    return {name.removeprefix(REFERENCE): value for name, value in metrics.items()}


@partitioned_check(asset="compiled_student", partitions_def=COMPILE_TARGETS)
def cascade_keeps_the_student(
    context: dg.AssetCheckExecutionContext, compiled_student: ArtifactRef
) -> dg.AssetCheckResult:
    """What the fast model answers costs no more accuracy than stated; for `neuron` its reference says so."""
    metrics = _of_what_ran(compiled_student.metrics)
    return check_result(gate.cascade_keeps_the_student(metrics, policies.GATE))


@partitioned_check(asset="compiled_student", partitions_def=COMPILE_TARGETS)
def compiled_matches_uncompiled(
    context: dg.AssetCheckExecutionContext, compiled_student: ArtifactRef, device_reports: DeviceReports
) -> dg.AssetCheckResult:
    """Compiling changed next to no category on the same offers; for `neuron` a device report says so."""
    if context.partition_key == NEURON:
        return _matches_on_its_device(compiled_student, device_reports)
    return check_result(gate.compiled_matches_uncompiled(compiled_student.metrics, policies.GATE))


def _matches_on_its_device(model: ArtifactRef, device_reports: DeviceReports) -> dg.AssetCheckResult:
    """What the newest report of this very model says; none is a reason to measure, not to believe."""
    found = device_reports.of(model.digest)
    unreadable = {"unreadable_reports": table([{"problem": line} for line in found.unreadable])}
    metadata = unreadable if found.unreadable else {}
    report = found.newest
    if report is None:
        return dg.AssetCheckResult(
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"no device report of model {model.version} yet: run `python -m ml device-report "
            f"--model … --student … --evaluation-set … --output REPORT.json` on an {DEVICE_FAMILY} host, put "
            f"the file into {device_reports.location}, and materialize this partition again: the model is "
            "found made, the check looks anew"
            + (f" ({len(found.unreadable)} files there cannot be read)" if found.unreadable else ""),
            metadata=metadata,
        )
    judged = check_result(gate.compiled_matches_uncompiled(report.gate_metrics, policies.GATE))
    return judged._replace(
        description=f"{judged.description} Measured on {report.instance_type} at {report.measured_at}.",
        metadata={
            **judged.metadata,
            **metadata,
            "instance_type": report.instance_type,
            "offers_per_second": report.offers_per_second,
            "latency": table([msgspec.to_builtins(latency) for latency in report.latency]),
        },
    )
