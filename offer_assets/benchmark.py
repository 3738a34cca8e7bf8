"""What it costs to serve the compiled student, and on which instance."""

import dagster as dg
import msgspec
import pyarrow.parquet as pq
from pydantic import Field

from ml.artifacts import ArtifactRef
from ml.serving.device_report import DeviceReport
from ml.serving.machine import this_machine
from ml.stages import SERVABLE, STAGES, ServingMeasurementParameters
from offer_assets import policies
from offer_assets.metadata import materialization, picture, table
from offer_assets.partitions import CPU
from offer_assets.plan import ServingLimits
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.device_reports import DeviceReports

_BY_DEFAULT = {field.name: field.default for field in msgspec.structs.fields(ServingMeasurementParameters)}


class MeasuringTime(dg.Config):
    """How this machine is measured; the launchpad shows it."""

    seconds: float = Field(
        default=_BY_DEFAULT["seconds"],
        gt=0,
        description="Length of each of six measurements; 20 to decide by.",
    )
    attempt: int = Field(
        default=_BY_DEFAULT["attempt"],
        ge=1,
        description="Another number measures again, if something else kept the machine busy for instance.",
    )


@dg.asset(
    ins={"compiled_student": dg.AssetIn(partition_mapping=dg.SpecificPartitionsPartitionMapping([CPU]))},
    group_name=policies.RELEASE,
    kinds={"onnx", "parquet"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=f"{STAGES['serving_measurement'].version}.{STAGES['serving_benchmark'].version}",
)
def serving_benchmark(
    context: dg.AssetExecutionContext,
    config: MeasuringTime,
    compiled_student: ArtifactRef,
    compute: Compute,
    artifact_store: ArtifactStore,
    device_reports: DeviceReports,
    serving_limits: ServingLimits,
) -> dg.MaterializeResult:
    """Instances side by side: throughput, latency and dollars per million offers, measured or projected."""
    student = compute.origin(compiled_student, "student_checkpoint")
    measured = compute.run(
        context,
        "serving_measurement",
        {
            "compiled_student": compiled_student,
            "student_checkpoint": student,
            "evaluation_set": compute.origin(compiled_student, "evaluation_set"),
        },
        ServingMeasurementParameters(
            machine=this_machine().description, seconds=config.seconds, attempt=config.attempt
        ),
    )
    reports, unreadable = device_reports.all()
    of_student = [report for report in reports if _student_of(report, artifact_store) == student.digest]
    result = compute.run(
        context,
        "serving_benchmark",
        {"serving_measurement": measured.ref},
        serving_limits.parameters(of_student),
    )
    folder = compute.folder(result.ref)
    metrics = result.manifest.metrics
    return materialization(
        result,
        metadata={
            "verdict": metrics["sentence"],
            "prices": metrics["prices"],
            "machine": measured.manifest.metrics["machine"],
            "instances": table(pq.read_table(folder / "benchmark.parquet").to_pylist()),
            "latency": table(pq.read_table(folder / "latency.parquet").to_pylist()),
            **{path.stem: picture(path.read_bytes()) for path in sorted(folder.glob("*.png"))},
            "reports_of_other_students": len(reports) - len(of_student),
            "unreadable_reports": table([{"problem": line} for line in unreadable]),
        },
    )


def _student_of(report: DeviceReport, store: ArtifactStore) -> str:
    """Digest of the student that the measured model was made of; empty where the store does not know it."""
    if report.model_kind not in SERVABLE:
        return ""
    model = store.find_by_digest(report.model_kind, report.model_digest)
    return store.manifest(model).inputs.get("student_checkpoint", "") if model else ""


@dg.asset_check(asset="serving_benchmark")
def an_instance_meets_latency_and_peak_load(serving_benchmark: ArtifactRef) -> dg.AssetCheckResult:
    """Some instance bears the peak load within the limit of latency; WARN: by projection only."""
    metrics = serving_benchmark.metrics
    error = metrics["level"] == "ERROR"
    return dg.AssetCheckResult(
        passed=metrics["level"] == "OK",
        severity=dg.AssetCheckSeverity.ERROR if error else dg.AssetCheckSeverity.WARN,
        description=metrics["sentence"],
        metadata={name: metrics[name] for name in metrics if name.startswith("cheapest")},
    )
