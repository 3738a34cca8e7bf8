"""The student, compiled for the hardware that serves it: one partition per target."""

import dagster as dg

from ml.artifacts import ArtifactRef
from ml.evaluation import gate
from ml.stages import STAGES, CompileParameters
from offer_assets import policies
from offer_assets.checks import check_result, partitioned_check
from offer_assets.metadata import materialization
from offer_assets.partitions import COMPILE_TARGETS
from offer_assets.taxonomy import taxonomy_in_force
from resources.compute import Compute
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
    evaluation_set: ArtifactRef,
    taxonomy_change: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
) -> dg.MaterializeResult:
    """Servable model: int8 ONNX for `cpu`; `neuron` needs the AWS Neuron image and says so."""
    result = compute.run(
        context,
        "compiled_student",
        {
            "student_checkpoint": student_checkpoint,
            "evaluation_set": evaluation_set,
            "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
        },
        CompileParameters(target=context.partition_key),
    )
    tracking.record(result.manifest, result.ref)
    return materialization(result)


@partitioned_check(asset="compiled_student", partitions_def=COMPILE_TARGETS)
def compiled_matches_uncompiled(compiled_student: ArtifactRef) -> dg.AssetCheckResult:
    """Compiling changed next to no category on the same offers."""
    return check_result(gate.compiled_matches_uncompiled(compiled_student.metrics, policies.GATE))
