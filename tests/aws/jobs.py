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
IMAGE = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/offer-assets-training:1"


@contextmanager
def sagemaker_compute(
    stand_in: StandIn, folder: Path, **settings: Any
) -> Iterator[tuple[SageMakerCompute, JobRunner]]:
    """Compute whose jobs run here, in containers that know the stages of ``tests.resources.stand_in``."""
    runner = JobRunner(stand_in, folder / "instances", program="tests.resources.stand_in").install()
    aws = settings.pop("aws", access())
    try:
        yield (
            SageMakerCompute(
                aws=aws,
                store=S3ArtifactStore(aws=aws, location=LOCATION, feed="feed", home=str(folder / "home")),
                **{
                    "program": "tests.resources.stand_in",
                    "training_image": IMAGE,
                    "name": "offer-assets",
                    "poll_seconds": 0.05,
                    "log_seconds": 1.0,
                    **settings,
                },
            ),
            runner,
        )
    finally:
        runner.close()
