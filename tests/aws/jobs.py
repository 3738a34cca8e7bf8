"""Heavy stages as jobs of the stand-in, as tests set them up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resources.s3_artifact_store import S3ArtifactStore
from resources.sagemaker_compute import SageMakerCompute
from tests.aws.conftest import BUCKET, access
from tests.aws.stand_in import StandIn
from tests.aws.stand_in_jobs import JobRunner

LOCATION = f"s3://{BUCKET}/offer-assets"
PROGRAM = "tests.resources.stand_in"
IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/offer-assets-training:1"


@contextmanager
def sagemaker_compute(
    stand_in: StandIn, folder: Path, **settings: Any
) -> Iterator[tuple[SageMakerCompute, JobRunner]]:
    """Compute whose jobs run here, in containers that know the stages of ``tests.resources.stand_in``."""
    program = settings.get("program", PROGRAM)
    runner = JobRunner(stand_in, folder / "instances", program=program).install()
    try:
        yield compute_of(folder, **settings), runner
    finally:
        runner.close()


def compute_of(folder: Path, *, location: str = LOCATION, **settings: Any) -> SageMakerCompute:
    """As of one orchestrator, with its own local folder and short pauses."""
    aws = access()
    store = S3ArtifactStore(aws=aws, location=location, feed="feed", home=str(folder / "home"))
    quick = {"program": PROGRAM, "poll_seconds": 0.2, "log_seconds": 1.0}
    return SageMakerCompute(
        aws=aws, store=store, training_image=IMAGE, name="offer-assets", **(quick | settings)
    )
