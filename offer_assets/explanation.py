"""Why the student gets wrong what it is sure of: for people to look at; nothing depends on it."""

import dagster as dg

from ml.artifacts import ArtifactRef
from ml.stages import STAGES, MistakesExplainedParameters
from offer_assets import policies
from offer_assets.metadata import materialization, row_count
from resources.compute import Compute


@dg.asset(
    group_name=policies.EVALUATION,
    kinds={"pytorch"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["mistakes_explained"].version,
)
def mistakes_explained(
    context: dg.AssetExecutionContext,
    student_evaluation: ArtifactRef,
    evaluation_set: ArtifactRef,
    student_checkpoint: ArtifactRef,
    training_sample: ArtifactRef,
    compute: Compute,
) -> dg.MaterializeResult:
    """The student's most confident mistakes: which words and which labelled offers led to them."""
    inputs = {
        "student_evaluation": student_evaluation,
        "evaluation_set": evaluation_set,
        "student_checkpoint": student_checkpoint,
        "training_sample": training_sample,
    }
    result = compute.run(context, "mistakes_explained", inputs, MistakesExplainedParameters())
    return materialization(
        result,
        metadata={
            **row_count(result.manifest.metrics["explained"]),
            "surest_mistakes": dg.MetadataValue.md(
                (compute.folder(result.ref) / "mistakes.md").read_text(encoding="utf-8")
            ),
        },
    )
