"""From a compiled model to the endpoint. Only a version that passed the gate is served."""

from pathlib import Path

import dagster as dg
import msgspec
import pyarrow.parquet as pq

from ml.artifacts import ArtifactRef
from ml.evaluation import gate
from offer_assets import policies
from offer_assets.evaluation import metrics_for_the_gate
from offer_assets.metadata import table
from offer_assets.partitions import CPU
from resources.compute import Compute
from resources.endpoints import Endpoints
from resources.tracking import Tracking

_REQUEST_BYTES = 4 << 20
"""Well below what an endpoint accepts (6,291,456)."""

_SENT_CHARACTERS = 10_000
"""Of each column; the text that a model reads is made of far fewer."""


@dg.asset(
    ins={"compiled_student": dg.AssetIn(partition_mapping=dg.SpecificPartitionsPartitionMapping([CPU]))},
    group_name=policies.RELEASE,
    kinds={"mlflow"},
    owners=[policies.ML_TEAM],
    code_version=policies.RELEASE_CODE_VERSION,
)
def model_version(
    student_evaluation: ArtifactRef, compiled_student: ArtifactRef, compute: Compute, tracking: Tracking
) -> dg.MaterializeResult:
    """Registered model with its evaluation and the gate's verdict."""
    _refuse_if_not_of_one_student(compute, student_evaluation, compiled_student)
    verdict = gate.judge(
        metrics_for_the_gate(student_evaluation, compute, tracking), compiled_student.metrics, policies.GATE
    )
    registered = tracking.register(
        compiled_student,
        metrics=student_evaluation.metrics,
        tags={"verdict": "passed" if verdict.passed else "failed", "evaluation": student_evaluation.digest},
    )
    return dg.MaterializeResult(
        value=compiled_student,
        data_version=dg.DataVersion(compiled_student.digest),
        metadata={
            "dagster/uri": compiled_student.uri,
            "registered": f"{registered.name} version {registered.version}",
            "model_version": compiled_student.version,
            "verdict": "passed" if verdict.passed else "failed",
            "gate": table(
                [
                    {"proposition": p.name, "passed": p.passed, "value": p.value, "limit": p.limit}
                    for p in verdict.propositions
                ]
            ),
        },
    )


@dg.asset(
    group_name=policies.RELEASE,
    kinds={"http"},
    owners=[policies.ML_TEAM],
    code_version=policies.RELEASE_CODE_VERSION,
)
def offer_endpoint(
    context: dg.AssetExecutionContext,
    model_version: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
    endpoints: Endpoints,
) -> dg.MaterializeResult:
    """Live endpoint that answers with the registered version; a version that failed the gate is refused."""
    registered = tracking.version_of(model_version)
    if registered is None or registered.tags.get("verdict") != "passed":
        raise dg.Failure(
            f"model version {model_version.version} did not pass the gate and is not served; "
            "see the checks of student_evaluation and compiled_student. What was serving goes on serving.",
            allow_retries=False,
        )
    status = endpoints.deploy(compute.folder(model_version), model_version)
    tracking.promote(registered, reason=f"run {context.run_id}")
    return dg.MaterializeResult(
        value=model_version,
        data_version=dg.DataVersion(model_version.digest),
        metadata={
            "url": dg.MetadataValue.url(status.url),
            "model_version": status.model_version,
            "taxonomy_version": status.taxonomy_version,
            "pid": status.pid,
            "started_at": status.started,
            "registered": f"{registered.name} version {registered.version}",
        },
    )


@dg.asset_check(asset="offer_endpoint")
def endpoint_answers(offer_endpoint: ArtifactRef, endpoints: Endpoints) -> dg.AssetCheckResult:
    """The endpoint is up and serves the version that was deployed last."""
    status = endpoints.status()
    serving = status.model_version if status else "nothing"
    return dg.AssetCheckResult(
        passed=serving == offer_endpoint.version,
        description=f"{serving} is serving, {offer_endpoint.version} was deployed",
        metadata={"serving": serving, "deployed": offer_endpoint.version},
    )


@dg.asset_check(asset="offer_endpoint", additional_ins={"evaluation_set": dg.AssetIn("evaluation_set")})
def endpoint_answers_the_same(
    offer_endpoint: ArtifactRef, evaluation_set: ArtifactRef, compute: Compute, endpoints: Endpoints
) -> dg.AssetCheckResult:
    """Over HTTP, the endpoint gives the categories that the artifact gives in this process."""
    from ml.serving.predictor import Predictor

    offers = endpoint_sample(compute.folder(evaluation_set) / "offers.parquet")
    expected = [
        prediction.category_id
        for prediction in Predictor.load(compute.folder(offer_endpoint)).predict(offers)
    ]
    answered = [prediction["category_id"] for prediction in endpoints.invoke(offers)]
    same = sum(left == right for left, right in zip(expected, answered, strict=True))
    return dg.AssetCheckResult(
        passed=same == len(offers),
        description=f"{same:,} of {len(offers):,} offers get the same category over HTTP and in process",
        metadata={"offers": len(offers), "same": same},
    )


def endpoint_sample(table_file: Path) -> list[dict[str, str]]:
    """First offers of a table, with what an endpoint needs to know of them, within one request's size.

    Args:
        table_file: Parquet file with ``offer_id`` and the columns that make an offer's text.

    Returns:
        At most ``ENDPOINT_SAMPLE_OFFERS`` offers; absent values are left out, long ones cut.
    """
    from ml.serving.predictor import TEXT_COLUMNS

    rows = pq.read_table(table_file, columns=["offer_id", *TEXT_COLUMNS])
    sample, size = list[dict[str, str]](), 0
    for row in rows.slice(0, policies.ENDPOINT_SAMPLE_OFFERS).to_pylist():
        offer = {name: value[:_SENT_CHARACTERS] for name, value in row.items() if value is not None}
        size += len(msgspec.json.encode(offer)) + 1
        if sample and size > _REQUEST_BYTES:
            break
        sample.append(offer)
    return sample


def _refuse_if_not_of_one_student(compute: Compute, evaluation: ArtifactRef, compiled: ArtifactRef) -> None:
    evaluated, built = (
        compute.manifest(artifact).inputs["student_checkpoint"] for artifact in (evaluation, compiled)
    )
    if evaluated != built:
        raise dg.Failure(
            f"student_evaluation measured student {evaluated[:12]}, compiled_student[{CPU}] was made of "
            f"{built[:12]}; materialize both again, from the same student_checkpoint",
            allow_retries=False,
        )
